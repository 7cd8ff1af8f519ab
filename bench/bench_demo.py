"""The demo's model on its five prompts, greedy: plain `generate`, transformers' prompt lookup, ours, ours with
`tree="auto"`, and suffix decoding within the call; and the loss of `tree="auto"` with a drafter that is never right.

    python bench/bench_demo.py [--model MODEL] [--pairs 5] [--cases "chat,code edit"] [--out FOLDER]

All methods take turns, in reverse order every second time. A ratio is the median over these pairs, with the extremes. A
row whose text differs from plain's has no ratio. "forwards" and "rows" count the target's, without the prompt's.
"""

import argparse
import statistics
import sys
from typing import NamedTuple

import torch
from _common import Bench, named_cases

import specdec_triton as sdt
from specdec_triton.tools import demo, host_sync, models
from specdec_triton.tools.calibration import in_turn
from specdec_triton.tools.demo import LOOKUP, OURS, PLAIN, THEIRS, WAYS, Way
from specdec_triton.tools.prompts import PROMPTS

TOKENS = {"code edit": 256, "no hope": 256}
FEWER = 64
HOPELESS = "no hope"  # the chat prompt, with an oracle that is always wrong
AUTO, SUFFIX = 'specdec_triton, tree="auto"', "specdec_triton, suffix"


class Case(NamedTuple):
    """A prompt."""

    name: str


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="hub name, local folder or .gguf file (default: the demo's)")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each method (default %(default)s)")
    named_cases(parser)


def ways_of(prompt: str, text: torch.Tensor) -> dict[str, Way]:
    """The methods by name, with new drafters: a call of suffix decoding must not know the text of an earlier one."""
    theirs, eager = {name: WAYS[name] for name in (PLAIN, THEIRS)}, {"cuda_graphs": False}  # forwards are counted
    if prompt == HOPELESS:
        hopeless = sdt.OracleDrafter(torch.nn.functional.pad(text, (0, TOKENS[prompt])), 1.0)
        return theirs | {AUTO: Way(eager | {"tree": "auto", "drafter": hopeless}, {})}
    ours = {OURS: Way(eager, LOOKUP), AUTO: Way(eager | {"tree": "auto"}, LOOKUP)}
    return theirs | ours | {SUFFIX: Way(eager | {"drafter": sdt.SuffixDrafter()}, {})}


def main() -> int:
    bench = Bench("demo", __doc__, arguments)
    name = models.find_default_model(bench.options.model, "float32")
    model, tokenizer, description = models.load(name, "float32", print)
    label = description.partition(" ")[0].partition(".")[0]  # without the format of the file
    model.to(bench.device)

    def measure(bench: Bench, case: Case) -> None:
        prompt = case.name
        tokens = TOKENS.get(prompt, FEWER)
        inputs = models.encode_chat(tokenizer, PROMPTS["chat" if prompt == HOPELESS else prompt], model.device)
        text = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        new_tokens = text[0, inputs["input_ids"].shape[1] :].tolist()
        runs = {way: [] for way in ways_of(prompt, text)}
        for way in in_turn(list(runs), bench.options.pairs):
            runs[way].append(demo.generate(model, inputs, ways_of(prompt, text)[way], max_new_tokens=tokens))
        for way, done in runs.items():

            def forwards(tokens: int, way: str = way) -> int:
                once = ways_of(prompt, text)[way]
                return demo.generate(model, inputs, once, max_new_tokens=tokens, min_new_tokens=tokens).forwards

            found = {}
            with bench.guarded(found):
                assert all(run.token_ids == new_tokens for run in done), "the text is not plain's"
                _, *rows = done[-1].rows
                found |= {"forwards": len(rows), "rows": sum(rows), "pairs": len(done)}
                found["host_reads"] = round(host_sync.host_reads_a_forward(forwards), 2)
                for against, other in (("plain", PLAIN), ("lookup", THEIRS)):
                    ratios = [a.seconds / b.seconds for a, b in zip(runs[other], done, strict=True)]
                    found[f"ratio_{against}"] = round(statistics.median(ratios), 3)
                    found[f"ratio_{against}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            shapes = {"model": label, "prompt": prompt, "new_tokens": len(new_tokens)}
            bench.add(way, shapes, "fp32", found, "the demo's prompts")

    cases = [Case(name) for name in (*PROMPTS, HOPELESS)]
    return bench.run(measure, cases, cases, cases, bench.options.cases)


if __name__ == "__main__":
    sys.exit(main())
