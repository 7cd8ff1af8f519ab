"""Where each microsecond of a round goes: its stages, kernels, host reads and waits, with and without CUDA graphs.

    python bench/bench_round.py [--rehearse]

Target and oracle drafter as in bench_generate, at an acceptance length of 3 (2 for small trees); more nodes only make
the trees wider. On a GPU a stage's time lies between CUDA events around it, waits for the host included; on a CPU it is
the host's. "host_us" is the host's own work in a round, its waits for the GPU left out. The text is held against that
of transformers' `generate` first.
"""

import dataclasses
import functools
import sys

from _common import Bench, first_line, simulate_graphs
from bench_generate import EAGER_ROUNDS, GRAPHS, PLAIN, Case, Setup, Way, check

from specdec_triton.tools import profiling
from specdec_triton.tools.roofline import shape_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """One kind of round; N = 1 is plain decoding."""

    nodes: int
    batch: int = 1
    context: int = 2048
    tokens: int = 96
    options: tuple[tuple[str, object], ...] = GRAPHS


NODES = (1, 64, 128, 8, 32)
CELLS = [Cell(nodes) for nodes in NODES] + [Cell(nodes, options=EAGER_ROUNDS) for nodes in (64, 1)]
CELLS += [Cell(1, 16), Cell(8, 16), Cell(1, 64, tokens=64), Cell(4, 64, tokens=64)]
SMALL = [Cell(nodes, batch, 64, 48, ()) for batch in (1, 4) for nodes in (1, 8, 32)]
REHEARSED = [Cell(1, 1, 12, 20, ()), Cell(8, 2, 12, 20, ()), Cell(8, 1, 12, 20, EAGER_ROUNDS), Cell(8, 1, 12, 20)]


def measure(bench: Bench, cell: Cell) -> None:
    large = bench.size == "gpu"
    case = Case("round", (PLAIN,), cell.batch, cell.context, (8, cell.tokens), options=cell.options)
    setup = Setup(case, large, bench.device)
    way = setup.way(PLAIN) if cell.nodes == 1 else setup.oracle(cell.nodes, 3.0 if cell.nodes > 4 else 2.0)
    found = {"absent": way.absent} if way.absent else {}
    if not found:
        with bench.guarded(found):
            found |= profiled(bench, cell, setup, way)
    shapes = {"model": setup.model, "B": cell.batch, "context": cell.context, "N": cell.nodes, **dict(cell.options)}
    bench.add(way.name, shapes, "bf16" if large else "fp32", found, way.inputs)


def profiled(bench: Bench, cell: Cell, setup: Setup, way: Way) -> dict:
    try:
        found = check(setup.target, way.call(cell.tokens), setup.plain, cell.context)
    except ValueError as refusal:
        return {"absent": first_line(refusal)}
    bench.check_time()
    calls = [functools.partial(way.call, tokens) for tokens in (cell.tokens, cell.tokens // 2)]
    seen = profiling.profile_rounds(calls[0], bench.device, shorter=calls[1])
    context, shape = cell.context + cell.tokens / 2, shape_of(setup.target)
    return found | profiling.summary_row(seen, bench.ceilings, shape, cell.batch, cell.nodes, context)


def main() -> int:
    bench = Bench("round", __doc__)
    simulate_graphs(bench)
    return bench.run(measure, CELLS, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
