"""lm-evaluation-harness: `HFLM` takes a patched model, and tasks that generate text have the same results.

python examples/lm_eval_harness.py HuggingFaceTB/SmolLM2-135M-Instruct --task gsm8k --limit 8

Tasks that only score given answers (loglikelihood) generate nothing, so they take as long as before.
"""

import argparse

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec_triton as sdt


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--task-folder", help="folder with YAML files of your own tasks, instead of the harness's")
    parser.add_argument("--limit", type=int, help="number of examples (default: all)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").to(device)
    sdt.patch(model, drafter=sdt.PromptLookupDrafter())
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(arguments.model), batch_size=4)
    tasks = TaskManager(include_path=arguments.task_folder, include_defaults=not arguments.task_folder)
    results = simple_evaluate(lm, tasks=[arguments.task], task_manager=tasks, limit=arguments.limit)
    print(results["results"][arguments.task])
    print("last batch:", sdt.stats(model))


if __name__ == "__main__":
    main()
