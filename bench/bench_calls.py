"""The time of a whole call: the first of its kind, one that captures its rounds, and one that reuses the graphs of an
earlier call; the costs and trees of `tree="auto"`.

    python bench/bench_calls.py [--out FOLDER] [--budget SECONDS] [--rehearse]

Target and draft are those of bench_generate. "first_ms" includes compilations, "captures_ms" the captures; "ms" is the
time of the last call, which reuses graphs if rounds are captured. For "auto", a row has the measured costs and the
chosen trees.
"""

import dataclasses
import sys

import torch
from _common import Bench, simulate_graphs
from _models import prompts, spider
from bench_generate import elapsed, generate, pair, shown_options

import specdec_triton as sdt
from specdec_triton.engine import auto_tree


@dataclasses.dataclass(frozen=True)
class Case:
    """`way`: "plain", "oracle" or "auto"."""

    way: str
    cuda_graphs: bool | str = "auto"
    tokens: int = 24
    context: int = 2048


CASES = [Case("plain"), Case("oracle"), Case("auto", tokens=200), Case("plain", tokens=200)]
CASES += [Case("oracle", tokens=200), Case("plain", False), Case("oracle", False)]
REHEARSED = [dataclasses.replace(case, context=12, tokens=20) for case in CASES[:3]]
NODES, DEPTH, ERRORS = 64, 7, 0.2


def measure(bench: Bench, case: Case) -> None:
    device, large = bench.device, bench.size == "gpu"
    name, target, draft = pair(large, device)
    ids = prompts(1, case.context, target.config.vocab_size, device)
    found = {}
    with bench.guarded(found):
        if case.way == "auto":
            drafter, options = sdt.ModelDrafter(draft), {"tree": "auto"}
        elif case.way == "oracle":
            text = generate(target, ids, case.tokens, custom_generate=sdt.SpeculativeGenerate(drafter=None))
            drafter, options = sdt.OracleDrafter(text, ERRORS, tree=spider(NODES if large else 8, DEPTH)), {}
        else:
            drafter, options = None, {}
        calls = []
        for reuses in (False, False, True):
            bench.check_time()
            if not reuses:  # a new object has no graphs yet
                custom = sdt.SpeculativeGenerate(drafter=drafter, cuda_graphs=case.cuda_graphs, **options)
            calls.append(time_call(target, ids, case.tokens, custom, device))
        first, captures, last = calls
        found |= last | {"first_ms": first["ms"], "captures_ms": captures["ms"], "measure_ms": first["measure_ms"]}
        found |= {"captured": captures["captured"], "capture_ms": captures["capture_ms"]}
        if case.way == "auto":
            costs = [each for known in auto_tree._measured.values() for each in known.values()][-1]
            chosen = sdt.stats(target).auto
            found["verify_ms"] = [[size, round(1e3 * seconds, 3)] for size, seconds in costs.verify]
            found["draft_ms"] = [[depth, round(1e3 * seconds, 3)] for depth, seconds in costs.draft]
            found["trees"] = [list(tree.values()) for tree in chosen["trees"]]
            found["speedup_expected"] = round(chosen["speedup"], 3)
        found["said"] = in_words(found)
    shapes = {"model": name, **dataclasses.asdict(case)} | shown_options((), device)
    bench.add(case.way, shapes, "bf16" if large else "fp32", found)


def time_call(target, ids: torch.Tensor, tokens: int, custom: sdt.SpeculativeGenerate, device: torch.device) -> dict:
    """Times and counts of one call."""
    seconds = elapsed(lambda: generate(target, ids, tokens, custom_generate=custom), device)
    stats = sdt.stats(target)
    spent = {f"{name}_ms": round(1e3 * stats.seconds.get(name, 0.0), 1) for name in ("prefill", "measure", "capture")}
    found = {"ms": round(1e3 * seconds, 1), **spent, "rounds": stats.rounds}
    counts = {"captured": stats.captured, "reused": stats.reused, "replayed": stats.replayed}
    return found | counts | {"why_eager": stats.why_eager}


def in_words(found: dict) -> str:
    text = (
        f"{found['ms']:.0f} ms (first {found['first_ms']:.0f}, with captures {found['captures_ms']:.0f}): prompt "
        f"{found['prefill_ms']:.0f}, capture {found['capture_ms']:.0f}; {found['rounds']} rounds, {found['captured']} "
        f"graphs, {found['reused']} reused, {found['replayed']} replays"
    )
    if found["why_eager"]:
        text += f"; {found['why_eager'][:60]}"
    if "trees" in found:
        text += f"; measuring {found['measure_ms']:.0f} ms: verify {found['verify_ms']}, draft {found['draft_ms']}"
        text += f"; chosen (nodes, depth, rounds): {found['trees'][:6]}"
    return text


def main() -> int:
    bench = Bench("calls", __doc__)
    simulate_graphs(bench)
    return bench.run(measure, CASES, REHEARSED, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
