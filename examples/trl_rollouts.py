"""TRL: the rollouts of `GRPOTrainer` come from a patched model, with the same distribution as without the patch.

python examples/trl_rollouts.py HuggingFaceTB/SmolLM2-360M-Instruct --draft HuggingFaceTB/SmolLM2-135M-Instruct

bf16=True, TRL's default, means autocast, which a patched model refuses: use model_init_kwargs={"dtype": "bfloat16"}.
"""

import argparse
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import specdec_triton as sdt


def reward(completions, **_):
    return [float(text.count("e")) for text in completions]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-360M-Instruct")
    parser.add_argument("--draft", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    names = parser.parse_args()
    prompts = Dataset.from_dict({"prompt": ["The sea is", "Every morning", "The largest city", "A good friend"]})
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 32, "max_steps": 2}
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(folder, **options, bf16=False, report_to="none", save_strategy="no")
        trainer = GRPOTrainer(names.model, reward, args=config, train_dataset=prompts)
        draft = AutoModelForCausalLM.from_pretrained(names.draft, dtype=trainer.model.dtype)
        sdt.patch(trainer.model, drafter=sdt.ModelDrafter(draft.to(trainer.model.device), num_tokens=5))
        trainer.train()
    print("last rollouts:", sdt.stats(trainer.model))


if __name__ == "__main__":
    main()
