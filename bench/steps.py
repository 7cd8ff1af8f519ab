"""The benches that `gpu.sh` runs, in one process: torch, transformers and the models are loaded once.

    python bench/steps.py OUT first|second|rest [--budget SECONDS] [--rehearse]
    python bench/steps.py OUT --step 90:"bench_generate --cases drafts" --step 30:bench_round [--budget SECONDS]

The second form runs the given steps, each with its share of the time in seconds.

Each step gets its share of the remaining time. A step that is complete in OUT is skipped. Exit status: 0; 1 if an
output was wrong or something failed; 3 if this process lost its GPU or a case hung: a new process then continues with
the next case.
"""

import argparse
import importlib
import math
import os
import pathlib
import shlex
import sys
import time
import traceback

from _common import DEAD
from _rows import COMPILED

from quick_interpreter import quicken

QUICK = ("--seconds", "0.05")
# script, its arguments, and its expected seconds on an H100; the most important steps come first
STEPS = {
    "first": [
        ("bench_correct", (), 130),
        ("bench_calls", (), 45),
        ("bench_tree_attention", QUICK, 65),
        ("bench_accept", QUICK, 15),
        ("bench_accept_sample", QUICK, 40),
        ("bench_compact", QUICK, 15),
        ("bench_layers", QUICK, 25),
        ("bench_round", (), 85),
    ],
    "second": [
        ("bench_generate", (), 165),
        ("bench_draft", QUICK, 20),
        ("bench_tree_attention", (*QUICK, "--compiled"), 70),
    ],
}
STEPS["rest"] = [*STEPS["first"], *STEPS["second"]]
STEPS["rest"] += [("bench_accept_sample", (*QUICK, "--compiled"), 45), ("bench_layers", (*QUICK, "--compiled"), 40)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder")
    parser.add_argument("part", choices=STEPS, nargs="?")
    parser.add_argument(
        "--step", type=step, action="append", metavar="SHARE:'SCRIPT ARGUMENTS'", help="in place of a part"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all steps")
    parser.add_argument("--rehearse", action="store_true", help="run tiny sizes; the numbers mean nothing")
    options = parser.parse_args()
    if (options.part is None) == (options.step is None):
        parser.error("give either first, second or rest, or --step")
    if options.rehearse and os.environ.get("TRITON_INTERPRET") == "1":
        quicken()
    until, steps = time.perf_counter() + options.budget, options.step or STEPS[options.part]
    shared = sum(share for _, _, share in steps)
    common = ["--out", str(options.out), *(["--rehearse"] if options.rehearse else [])]
    counts, status = Counts(), run("specdec_triton.tools.calibration", common[:2])
    for script, arguments, share in steps:
        budget = max(0.0, until - time.perf_counter()) * share / shared
        shared -= share
        begin = time.perf_counter()
        code = run(script, [*common, "--budget", str(budget), *arguments])
        status = max(status, code)
        seconds = time.perf_counter() - begin
        name = script.removeprefix("bench_") + COMPILED * ("--compiled" in arguments)
        print(f"== {name}: exit status {code}, {seconds:.0f} s, {counts.since()}", flush=True)
    return status


def step(text: str) -> tuple[str, tuple[str, ...], float]:
    """The type of --step: a step as in `STEPS`."""
    share, _, command = text.partition(":")
    script, *arguments = shlex.split(command)
    return script, tuple(arguments), float(share)


def run(script: str, arguments: list[str]) -> int:
    """The exit status of a script's `main` with these arguments; 1 if it raises.

    Raises:
        SystemExit: `DEAD`, if this process lost its GPU.
    """
    sys.argv[1:] = arguments
    try:
        return importlib.import_module(script).main()
    except Exception:
        traceback.print_exc()
        return 1
    except SystemExit as stop:
        if stop.code == DEAD:
            raise
        return int(stop.code or 0)


class Counts:
    """Counts the CUDA graphs captured and the Triton kernels compiled by this process, not those of tests it starts."""

    def __init__(self):
        from specdec_triton.engine import graphs

        self._graphs, self._compiled, self._before = graphs, 0, (0, 0)
        knobs = getattr(importlib.import_module("triton"), "knobs", None)
        if knobs is not None and hasattr(knobs.runtime, "jit_post_compile_hook"):
            knobs.runtime.jit_post_compile_hook = self._count

    def _count(self, **compiled) -> None:
        self._compiled += 1

    def since(self) -> str:
        """The counts since the last call, in words."""
        now = self._graphs.captured, self._compiled
        captured, compiled = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        return f"{captured} graphs captured, {compiled} kernels compiled"


if __name__ == "__main__":
    sys.exit(main())
