"""The demo's model on its five prompts, greedy: plain `generate`, transformers' prompt lookup, ours, ours with
`tree="auto"`; and what `tree="auto"` loses with a drafter that is never right.

    python bench/bench_demo.py [--model MODEL] [--pairs 5] [--out FOLDER]

All ways run in turn, every second time in reverse order; a ratio is the median over these pairs, with the extremes. A
row whose text is not plain's has none. "forwards" and "rows" are the target's after the prompt's, counted.
"""

import argparse
import statistics
import sys
import time

import torch
from _common import Bench

import specdec_triton as sdt
from specdec_triton.tools import host_sync, models
from specdec_triton.tools.prompts import PROMPTS

TOKENS = {"code edit": 256, "no hope": 256}
FEWER = 64
HOPELESS = "no hope"  # the chat prompt, with an oracle that is always wrong
PLAIN, THEIRS = "plain generate", "transformers' lookup"
OURS, AUTO = "specdec_triton", 'specdec_triton, tree="auto"'
COUNTED = (8, 40)  # tokens of the calls whose host reads are counted: what the prompt costs is in both


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub name, local folder or .gguf file (default: the demo's)")
    parser.add_argument("--max-new-tokens", type=int, help=f"default: {TOKENS['code edit']} for the edit, else {FEWER}")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each way (default %(default)s)")
    parser.add_argument("--prompts", nargs="+", choices=[*PROMPTS, HOPELESS], help="default: all")


def ways_of(prompt: str, text: torch.Tensor) -> dict[str, tuple[dict | None, dict]]:
    """Name -> options of `patched` (None: unpatched), arguments of `generate`."""
    ours = {
        OURS: ({}, {"prompt_lookup_num_tokens": 10}),
        AUTO: ({"tree": "auto"}, {"prompt_lookup_num_tokens": 10}),
    }
    if prompt == HOPELESS:
        ours = {AUTO: ({"drafter": sdt.OracleDrafter(text, 1.0), "tree": "auto"}, {})}
    return {PLAIN: (None, {}), THEIRS: (None, {"prompt_lookup_num_tokens": 10})} | ours


def run(model, inputs: dict, options: dict | None, **generate) -> dict:
    """One call: its text, seconds, and the target's forwards and rows after the prompt's."""
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, given, named: rows.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        if options is None:
            begin = time.perf_counter()
            text = model.generate(**inputs, **generate)
            seconds = time.perf_counter() - begin
        else:
            with sdt.patched(model, cuda_graphs=False, **options):
                begin = time.perf_counter()
                text = model.generate(**inputs, **generate)
                seconds = time.perf_counter() - begin
    finally:
        hook.remove()
    return {"text": text[0].tolist(), "seconds": seconds, "forwards": len(rows) - 1, "rows": sum(rows[1:])}


def host_reads(model, inputs: dict, options: dict | None, more: dict) -> float:
    """Host reads that a longer text adds, for each of the target's forwards that it adds."""
    counted = []
    for tokens in COUNTED:
        with host_sync.count_host_reads() as reads:
            done = run(model, inputs, options, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **more)
        counted.append((reads.total, done["forwards"]))
    (few, first), (many, last) = counted
    return round((many - few) / (last - first), 2)


def main() -> int:
    bench = Bench("demo", __doc__, arguments)
    name = models.find_default_model(bench.options.model, "float32")
    model, tokenizer, description = models.load(name, "float32", print)
    model.to(bench.device)

    def measure(bench: Bench, prompt: str) -> None:
        tokens = bench.options.max_new_tokens or TOKENS.get(prompt, FEWER)
        inputs = models.encode_chat(tokenizer, PROMPTS["chat" if prompt == HOPELESS else prompt], model.device)
        limits = {"do_sample": False, "max_new_tokens": tokens}
        text = model.generate(**inputs, **limits)
        ways = ways_of(prompt, torch.nn.functional.pad(text, (0, tokens)))
        runs = {way: [] for way in ways}
        for pair in range(bench.options.pairs):
            for way in ways if pair % 2 == 0 else reversed(ways):
                options, more = ways[way]
                runs[way].append(run(model, inputs, options, **limits, **more))
        for way, done in runs.items():
            found = {}
            with bench.guarded(found):
                assert all(each["text"] == text[0].tolist() for each in done), "the text is not plain's"
                found |= {"forwards": done[-1]["forwards"], "rows": done[-1]["rows"], "pairs": len(done)}
                found["host_reads"] = host_reads(model, inputs, *ways[way])
                for against, other in (("plain", PLAIN), ("lookup", THEIRS)):
                    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs[other], done, strict=True)]
                    found[f"ratio_{against}"] = round(statistics.median(ratios), 3)
                    found[f"ratio_{against}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            emitted = text.shape[1] - inputs["input_ids"].shape[1]
            shapes = {"model": description.partition(" ")[0], "prompt": prompt, "new_tokens": emitted}
            bench.add(way, shapes, "fp32", found, "the demo's prompts")

    chosen = bench.options.prompts or [*PROMPTS, HOPELESS]
    return bench.run(measure, chosen, chosen, chosen)


if __name__ == "__main__":
    sys.exit(main())
