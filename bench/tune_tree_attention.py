"""Times tree attention with other tiles, warps, stages and splits than its defaults in `kernels/tree_attention.py`.

    python bench/tune_tree_attention.py [--splits] [--warm] [--out FOLDER] [--budget SECONDS] [--rehearse]

Llama 3.1 8B's heads in bf16. Every candidate is verified against the reference, then timed as in bench_tree_attention.
The last lines give the default and the fastest candidates for each size. Compiling takes most of the time, so several
processes do it first: `--compile 3` runs the fourth process's share, and `--warm` skips this step.

With --splits, only the number of splits varies, also for batches, and the tiles are the default ones. Few kernels are
compiled then.
"""

import argparse
import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import torch
from _common import ROOT, Bench, Provider
from bench_tree_attention import LLAMA, check_output, dtype_of, least_work, make_inputs, ours

from specdec_triton.kernels import tree_attention as kernels

# rows a tile: slots a tile, warps, stages
TILES = {
    16: [(64, 4, 3), (64, 4, 4), (64, 4, 5), (32, 4, 4), (32, 4, 6)],
    32: [(64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 4)],
    64: [(64, 4, 2), (64, 4, 3), (32, 4, 3), (32, 4, 4), (64, 8, 3), (32, 8, 3)],
    128: [(64, 8, 2), (64, 8, 3), (32, 8, 3), (32, 8, 4)],
}
PROGRAMS = (1, 2)  # at a time on a multiprocessor, as the plan assumes
LEAST_ROWS = (1, 2, 4)  # a split has this many times the rows of a tile, at least
SHORT = 1024  # contexts that one split may cover
CASES = [(context, nodes) for context in (2048, 8192, 1024, 32768, 512) for nodes in (128, 64, 32, 16, 1)]
CASES = [(1, *case) for case in CASES]  # batch, context, N
REHEARSED = [(1, 60, 2), (2, 200, 4)]
# for --splits
SPLIT_SIZES = [(1, 2048), (1, 512), (1, 1024), (64, 2048), (16, 2048), (1, 8192), (4, 2048), (16, 512), (64, 512)]
SPLIT_SIZES += [(1, 32768), (4, 8192), (16, 8192)]
SPLIT_CASES = [
    (batch, context, nodes)
    for batch, context in SPLIT_SIZES
    for nodes in ((32, 8, 64, 1, 128) if batch == 1 else (8, 32, 1))
]
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
COMPILERS = 12
PLANNED_BY = (
    "attention_config",
    "SHORT_SLOTS",
    "MIN_SPLIT_ROWS",
    "MIN_SPLIT_SLOTS",
    "_split_tiles",
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration, and the split of keys; `least_rows` None: the keys are one split, or `split_tiles` is given."""

    config: kernels.AttentionConfig
    least_rows: int | None
    split_tiles: int | None = None

    def use(self) -> None:
        """Plan every call with this candidate from now on."""
        kernels.attention_config = lambda *_: self.config
        if self.split_tiles is not None:
            kernels.SHORT_SLOTS = 0
            kernels._split_tiles = lambda *_: self.split_tiles
            kernels.attention_plan.cache_clear()
            return
        kernels.SHORT_SLOTS = 0 if self.least_rows else sys.maxsize
        kernels.MIN_SPLIT_ROWS = self.least_rows or 1
        kernels.MIN_SPLIT_SLOTS = self.config.block_n
        kernels.attention_plan.cache_clear()


def candidates(context: int, nodes: int) -> Iterator[Candidate]:
    rows = nodes * LLAMA[0] // LLAMA[1]
    widths = [width for width in TILES if min(rows, 256) // 4 <= width < 2 * rows]
    for width in [16] if rows <= 16 else widths:
        for slots, warps, stages in TILES[width]:
            config = kernels.AttentionConfig(width, slots, warps, stages, 1)
            for programs in PROGRAMS:
                for least in LEAST_ROWS:
                    yield Candidate(config._replace(programs=programs), least)
            if context <= SHORT and width <= 32:
                yield Candidate(config, None)


def split_candidates(context: int, nodes: int) -> Iterator[Candidate]:
    """The default tiles, and for short contexts the narrowest, with different numbers of splits."""
    rows = nodes * LLAMA[0] // LLAMA[1]
    configs = [kernels.attention_config(90, rows, LLAMA[2], 2, narrow, False) for narrow in (False, True)]
    for config in dict.fromkeys(configs[: 1 + (context <= SHORT)]):
        tiles = -(-context // config.block_n) + -(-nodes // config.block_n)
        for split_tiles in sorted({-(-tiles // splits) for splits in SPLITS if splits <= tiles}):
            yield Candidate(config, None, split_tiles)


def measure(bench: Bench, case: tuple[int, int, int]) -> None:
    batch, context, nodes = case
    heads, kv_heads, dim = LLAMA if bench.size == "gpu" else (4, 2, 64)
    name, dtype = dtype_of(bench.device)
    sizes = batch, heads, kv_heads, dim, context, nodes
    work = least_work(*sizes, dtype)
    sets = [make_inputs(*sizes, dtype, bench.device) for _ in range(bench.num_sets(work["nbytes"]))]
    wanted = ours(sets[0], "reference")

    def call(inputs: dict) -> torch.Tensor:
        return ours(inputs, "triton")

    def verify(call) -> None:
        check_output(call(sets[0]), wanted)

    shapes = {"B": batch, "context": context, "N": nodes, "Hq": heads, "Hkv": kv_heads, "D": dim}
    with plans_restored():
        bench.measure(Provider("default", call, kernel=True), shapes, name, sets, verify, **work)
        seen = set()
        tried_here = split_candidates if bench.options.splits else candidates
        for candidate in list(tried_here(context, nodes))[: None if bench.size == "gpu" else 2]:
            candidate.use()
            grid, split_tiles, *_ = plan_of(sets[0])
            tried = candidate.config[:4], split_tiles, grid[1]
            if tried in seen:
                continue
            seen.add(tried)
            block_m, block_n, warps, stages, *_ = candidate.config
            label = f"m{block_m} n{block_n} w{warps} s{stages}, {grid[1]} splits"
            bench.measure(Provider(label, call, kernel=True), shapes, name, sets, verify, **work)


@contextlib.contextmanager
def plans_restored() -> Iterator[None]:
    """On exit, restore the kernels' own configurations and constants."""
    before = {name: getattr(kernels, name) for name in PLANNED_BY}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)
        kernels.attention_plan.cache_clear()


def plan_of(inputs: dict):
    query, key, tree = inputs["query"], inputs["key"], inputs["packed_tree"]
    kv_heads, slots, dim = key.shape[1:]
    group, nodes, device = query.shape[1] // kv_heads, tree.shape[1], query.device
    shape = len(key), kv_heads, group, query.shape[2], nodes, slots, dim, dim, key.element_size()
    return kernels.attention_plan(kernels.architecture(device), kernels.multiprocessors(device), *shape, False)


def compile_share(share: int) -> None:
    """Launch each configuration of this share once, to fill Triton's cache."""
    device = torch.device("cuda")
    # tiles of more than 32 rows are not tried with one split
    todo = {(tiles, width, split) for width in TILES for tiles in TILES[width] for split in (True, width > 32)}
    for number, ((slots, warps, stages), width, split) in enumerate(sorted(todo)):
        if number % COMPILERS == share:
            Candidate(kernels.AttentionConfig(width, slots, warps, stages, 1), 1 if split else None).use()
            ours(make_inputs(1, *LLAMA, 512, 16, torch.bfloat16, device), "triton")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--warm", action="store_true", help="do not compile first")
    parser.add_argument("--splits", action="store_true", help="vary only the number of splits")


def main() -> int:
    if sys.argv[1:2] == ["--compile"]:
        compile_share(int(sys.argv[2]))
        return 0
    bench = Bench("tune_tree_attention", __doc__, arguments)
    if bench.size == "gpu" and not bench.options.warm and not bench.options.splits:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--compile"]
        shares = [subprocess.Popen([*command, str(share)], cwd=ROOT, env=environment) for share in range(COMPILERS)]
        for process in shares:
            process.wait()
    torch.manual_seed(0)
    status = bench.run(measure, SPLIT_CASES if bench.options.splits else CASES, [], REHEARSED)
    for line in fastest(bench.results.rows):
        print(line)
    return status


def fastest(rows: list[dict]) -> Iterator[str]:
    """A line for each size: the default and the five fastest candidates."""
    sizes: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["bench"] == "tune_tree_attention" and "p50_us" in row:
            size = row["shapes"].get("B", 1), row["shapes"]["context"], row["shapes"]["N"]
            sizes.setdefault(size, []).append(row)
    for (batch, context, nodes), found in sorted(sizes.items()):
        best = sorted((row for row in found if row["provider"] != "default"), key=lambda row: row["p50_us"])[:5]
        default = next(row["p50_us"] for row in found if row["provider"] == "default")
        said = "; ".join(f"{row['provider']}: {row['p50_us']:.1f}" for row in best)
        yield f"tuned B {batch}, {context}, N {nodes}: default {default:.1f} us; {said}"


if __name__ == "__main__":
    sys.exit(main())
