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
from _rows import CONTROLLED
from bench_generate import EAGER_ROUNDS, GRAPHS, Case, check, make_oracle, make_way, pair, plain_text

from specdec_triton.tools import profiling
from specdec_triton.tools.roofline import efficiency_bytes, round_work, shape_of


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
    device, large = bench.device, bench.size == "gpu"
    model, target, _ = pair(large, device)
    case = Case("round", ("ours, plain",), cell.batch, cell.context, (8, cell.tokens), options=cell.options)
    if cell.nodes == 1:
        way = make_way("ours, plain", case, large, device)
    else:
        way = make_oracle(cell.nodes, 3.0 if cell.nodes > 4 else 2.0, case, large, device)
    found = {"absent": way.absent} if way.absent else {}
    if not found:
        with bench.guarded(found):
            found |= profiled(bench, cell, case, way, target)
    shapes = {"model": model, "B": cell.batch, "context": cell.context, "N": cell.nodes, **dict(cell.options)}
    inputs = CONTROLLED if cell.nodes > 1 else "synthetic"
    bench.add(way.name, shapes, "bf16" if large else "fp32", found, inputs)


def profiled(bench: Bench, cell: Cell, case: Case, way, target) -> dict:
    plain = plain_text(case, bench.size == "gpu", bench.device)
    try:
        found = check(target, way.call(cell.tokens), plain, cell.context)
    except ValueError as refusal:
        return {"absent": first_line(refusal)}
    bench.check_time()
    calls = [functools.partial(way.call, tokens) for tokens in (cell.tokens, cell.tokens // 2)]
    seen = profiling.profile_rounds(calls[0], bench.device, shorter=calls[1])
    context = cell.context + cell.tokens / 2
    work = round_work(shape_of(target), cell.batch, cell.nodes, context)
    nbytes = efficiency_bytes(shape_of(target), cell.batch, context)
    found["stages"] = profiling.stage_rows(seen, work, bench.ceilings)
    return found | profiling.summary_row(seen, nbytes, bench.ceilings)


def main() -> int:
    bench = Bench("round", __doc__)
    simulate_graphs(bench)
    return bench.run(measure, CELLS, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
