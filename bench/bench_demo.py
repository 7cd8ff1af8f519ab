"""The demo's model on its five prompts: plain `generate`, transformers' prompt lookup, and the same call when patched.

    python bench/bench_demo.py [--model MODEL] [--out FOLDER]

Timed as the demo times: in pairs that run all ways, every second pair in reverse order; ratios are medians over pairs.
A row whose text is not plain's has no ratio.
"""

import argparse
import contextlib
import sys

from _common import Bench

from specdec_triton import demo, models
from specdec_triton.prompts import PROMPTS

TOKENS = {"code edit": 256}
FEWER = 64


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub name, local folder or .gguf file (default: the demo's)")
    parser.add_argument("--max-new-tokens", type=int, help=f"default: {TOKENS['code edit']} for the edit, else {FEWER}")


def main() -> int:
    bench = Bench("demo", __doc__, arguments)
    name = models.find_default_model(bench.options.model, "float32")
    model, tokenizer, description = models.load(name, "float32", print)
    model.to(bench.device)
    report = {"model": description.partition(" ")[0]}

    def measure(bench: Bench, prompt: str) -> None:
        tokens = bench.options.max_new_tokens or TOKENS.get(prompt, FEWER)
        records = demo.compare(model, tokenizer, PROMPTS[prompt], tokens, lambda what: contextlib.nullcontext())
        plain = records[demo.PLAIN]
        for way, record in records.items():
            found = {}
            with bench.guarded(found):
                assert all(run.token_ids == plain.runs[0].token_ids for run in record.runs), "the text is not plain's"
                last = record.runs[-1]
                found |= {
                    "p50_tokens_s": round(record.tokens_per_second(), 2),
                    "ratio_plain": round(record.speedup_over(plain), 3),
                    "ratio_lookup": round(record.speedup_over(records[demo.THEIRS]), 3),
                    "acceptance_length": round(last.acceptance_length, 3),
                    "forwards": last.forwards,
                    "host_reads": record.host_reads,
                    "pairs": len(record.runs),
                }
            shapes = report | {"prompt": prompt, "new_tokens": len(plain.runs[0].token_ids)}
            bench.add(way, shapes, "fp32", found, "the demo's prompts")

    return bench.run(measure, list(PROMPTS), list(PROMPTS), list(PROMPTS))


if __name__ == "__main__":
    sys.exit(main())
