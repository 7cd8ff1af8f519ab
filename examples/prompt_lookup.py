"""Prompt lookup: drafts are copied from the text so far. No draft model is needed.

python examples/prompt_lookup.py HuggingFaceTB/SmolLM2-135M-Instruct

It pays if the answer repeats its input, as in edits, quotes and summaries.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec_triton as sdt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = """class Inventory:
    def add(self, item, count, price):
        self.items[item] = {"count": count, "price": price}
        self.history.append(("add", item, count))

Rewrite the code above with the class renamed to Warehouse. Output the full code."""


def main(name="HuggingFaceTB/SmolLM2-135M-Instruct"):
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).to(DEVICE)
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    sdt.patch(model)
    text = model.generate(**inputs.to(DEVICE), do_sample=False, max_new_tokens=96, prompt_lookup_num_tokens=10)
    print(tokenizer.decode(text[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    stats = sdt.stats(model)
    print(f"\n{stats.emitted} tokens, acceptance length {stats.acceptance_length:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
