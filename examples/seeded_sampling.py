"""Seeded sampling: the text depends on the seed only, not on the drafter. It is the same without any draft.

python examples/seeded_sampling.py HuggingFaceTB/SmolLM2-360M-Instruct --draft HuggingFaceTB/SmolLM2-135M-Instruct

The rule is `coupled`, the default. The models run in fp32: rounding in bf16 may decide a near-tie in the other way.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec_triton as sdt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-360M-Instruct")
    parser.add_argument("--draft", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    names = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(names.model)
    model, draft = (AutoModelForCausalLM.from_pretrained(n, dtype="float32") for n in (names.model, names.draft))
    model, draft = model.to(DEVICE), draft.to(DEVICE)
    inputs = tokenizer("Once upon a time", return_tensors="pt").to(DEVICE)
    texts = set()
    chain, tree = sdt.ModelDrafter(draft, num_tokens=5), sdt.ModelDrafter(draft, tree=12)
    for drafter in (sdt.NoDrafter(), sdt.PromptLookupDrafter(), chain, tree):
        with sdt.patched(model, drafter=drafter, rule="coupled", seed=7):
            ids = model.generate(**inputs, do_sample=True, temperature=0.8, top_p=0.95, max_new_tokens=48)
        texts.add(tokenizer.decode(ids[0], skip_special_tokens=True))
        print(f"acceptance length {sdt.stats(model).acceptance_length:.2f} with {drafter!r}")
    print(f"\ndifferent texts: {len(texts)}\n", *texts, sep="\n")


if __name__ == "__main__":
    main()
