"""The time of a round by stage, with its kernels, host reads and waits, with and without CUDA graphs.

    python bench/bench_round.py [--rehearse]

Target and oracle drafter are those of bench_generate, with an acceptance length of 3 (2 for small trees); trees with
more nodes are wider, not deeper. On a GPU a stage is timed between CUDA events, waits for the host included; on a CPU
by the host's clock. "host_us" is the host's work in a round without its waits for the GPU. Before timing, the text must
equal that of transformers' `generate`.
Forwards run in the ways that bench_generate names.
"""

import dataclasses
import functools
import sys

from _common import Bench, first_line, simulate_graphs
from bench_generate import (
    COMPILED,
    EAGER_LAYERS,
    EAGER_ROUNDS,
    FUSED,
    GRAPHS,
    PLAIN,
    Case,
    Setup,
    Way,
    check,
    check_fused,
    shown_options,
)

from specdec_triton.tools import profiling
from specdec_triton.tools.roofline import shape_of


@dataclasses.dataclass(frozen=True)
class RoundCase:
    """One kind of round; N = 1 is plain decoding. `seconds` are those of `Bench.run`."""

    nodes: int
    batch: int = 1
    context: int = 2048
    tokens: int = 96
    options: tuple[tuple[str, object], ...] = GRAPHS
    seconds: float = 0.0


NODES = (1, 64, 128, 8, 32)
CASES = [RoundCase(nodes) for nodes in NODES]
CASES += [RoundCase(nodes, options=EAGER_LAYERS) for nodes in NODES[:3]]
CASES += [RoundCase(nodes, options=EAGER_ROUNDS) for nodes in (64, 1)]
CASES += [RoundCase(1, 16), RoundCase(8, 16), RoundCase(1, 64, tokens=64), RoundCase(4, 64, tokens=64)]
CASES += [RoundCase(nodes, options=COMPILED, seconds=50) for nodes in NODES[:3]]
SMALL = [RoundCase(nodes, batch, 64, 48, ()) for batch in (1, 4) for nodes in (1, 8, 32)]
REHEARSED = [
    RoundCase(1, 1, 12, 20, ()),
    RoundCase(8, 2, 12, 20, ()),
    RoundCase(8, 1, 12, 20, EAGER_ROUNDS),
    RoundCase(8, 1, 12, 20, FUSED),
]


def measure(bench: Bench, case: RoundCase) -> None:
    large = bench.size == "gpu"
    decoding = Case("round", (PLAIN,), case.batch, case.context, (8, case.tokens), options=case.options)
    setup = Setup(decoding, large, bench.device)
    way = setup.way(PLAIN) if case.nodes == 1 else setup.oracle(case.nodes, 3.0 if case.nodes > 4 else 2.0)
    found = {"absent": way.absent} if way.absent else {}
    if not found:
        with bench.guarded(found):
            found |= profiled(bench, case, setup, way)
    shapes = {"model": setup.model, "B": case.batch, "context": case.context, "N": case.nodes}
    shapes |= shown_options(case.options, bench.device)
    bench.add(way.name, shapes, "bf16" if large else "fp32", found, way.inputs)


def profiled(bench: Bench, case: RoundCase, setup: Setup, way: Way) -> dict:
    try:
        found = check(setup.target, way.call(case.tokens), setup.plain, case.context)
    except ValueError as refusal:
        return {"absent": first_line(refusal)}
    found |= check_fused(setup.target, case.options)
    bench.check_time()
    calls = [functools.partial(way.call, tokens) for tokens in (case.tokens, case.tokens // 2)]
    seen = profiling.profile_rounds(calls[0], bench.device, shorter=calls[1])
    context, shape = case.context + case.tokens / 2, shape_of(setup.target)
    return found | profiling.summary_row(seen, bench.ceilings, shape, case.batch, case.nodes, context)


def main() -> int:
    bench = Bench("round", __doc__)
    simulate_graphs(bench)
    return bench.run(measure, CASES, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
