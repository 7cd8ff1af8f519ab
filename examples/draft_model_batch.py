"""A draft model for a batch: prompts of different lengths, padded on the left, each with its own tree of draft tokens.

python examples/draft_model_batch.py HuggingFaceTB/SmolLM2-360M-Instruct --draft HuggingFaceTB/SmolLM2-135M-Instruct

transformers' own assisted decoding takes one sequence at a time. Here each row advances at its own pace.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec_triton as sdt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = ["The capital of France is", "Water boils at 100 degrees, and it freezes at", "def fibonacci(n):"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-360M-Instruct")
    parser.add_argument("--draft", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model, draft = (AutoModelForCausalLM.from_pretrained(n).to(DEVICE) for n in (arguments.model, arguments.draft))
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(DEVICE)
    tree = sdt.DynamicTree(12, width=3, depth=5)  # the 12 likeliest nodes, chosen anew in each round
    with sdt.patched(model, drafter=sdt.ModelDrafter(draft, tree=tree)):
        texts = model.generate(**inputs, do_sample=False, max_new_tokens=48)
    for text in tokenizer.batch_decode(texts, skip_special_tokens=True):
        print(f"{text}\n")
    stats = sdt.stats(model)
    print(f"{stats.emitted} tokens in {stats.rounds} rounds, acceptance length {stats.acceptance_length:.2f}")


if __name__ == "__main__":
    main()
