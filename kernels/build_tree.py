"""Selection of a draft tree: the nodes with the highest scores out of many candidates, and the tensors of their tree.

There is one launch, with one program per sequence. It holds the scores of all candidates as integers of the same order
and finds the lowest kept score by bisection. A prefix sum numbers the kept nodes. Their tokens and parents are written
to memory, and then every kept node walks up to the root through the parents.

Letters: B sequences, C candidates, N kept nodes, D edges on the longest path, W = ceil(N/64) words.
Reference: `specdec_triton.ops.reference.build_tree`.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._keys import NEG_INF, NO_ORDER, order_of
from ._launch import FP_FUSION, CompileCase, abstract, block_of, launching_on, pow2
from ._tree import new_tree, store_ancestors

# Candidates that a warp holds, and the smallest number of warps. Chosen by compile reports: no spill at 4096 candidates
# and 512 nodes, the limits of `ops.build_tree`. Not timed.
WARP_C = 512
MIN_WARPS = 4
ROOT: tl.constexpr = tl.constexpr(2**31 - 1)  # above the order of every number
COUNT_BITS: tl.constexpr = tl.constexpr(16)
COUNT_MASK: tl.constexpr = tl.constexpr(2**16 - 1)


@triton.jit
def kept_places(scores_ptr, C, N, BLOCK_C: tl.constexpr):
    """[BLOCK_C] int32: the number of each candidate among the kept ones; -1 if it is not kept.

    Args:
        scores_ptr: [C] fp32.
    """
    lane = tl.arange(0, BLOCK_C)
    scores = tl.load(scores_ptr + lane, mask=lane < C, other=0.0)
    order = order_of(tl.where(scores != scores, NEG_INF, scores))
    order = tl.where(lane == 0, ROOT, tl.where(lane < C, order, NO_ORDER))
    # the highest `low` of which at least N orders are not below it
    low, high = tl.full((), NO_ORDER, tl.int64), tl.full((), ROOT, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        count = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(count >= N, middle, low)
        high = tl.where(count > N, high, tl.where(count == N, middle, middle - 1))
    higher, equal = order > low.to(tl.int32), order == low.to(tl.int32)
    # one prefix sum counts both kinds
    counts = tl.cumsum((higher.to(tl.int32) << COUNT_BITS) | equal.to(tl.int32), 0)
    of_equal = counts & COUNT_MASK
    most_equal = N - tl.sum(higher.to(tl.int32), 0)
    kept = higher | (equal & (of_equal <= most_equal))
    return tl.where(kept, (counts >> COUNT_BITS) + tl.minimum(of_equal, most_equal) - 1, -1)


@triton.jit(do_not_specialize=["C", "N", "D", "W"])
def _build_tree_kernel(
    kept_tokens_ptr,  # [B, N] int64, out
    kept_parents_ptr,  # [B, N] int32, out
    depth_ptr,  # [B, N] int64, out
    ancestors_ptr,  # [B, N, W] int64, out
    nodes_ptr,  # [B, N] int64, out
    tokens_ptr,  # [B, C] int64
    parents_ptr,  # [B, C] int64
    scores_ptr,  # [B, C] fp32
    C,
    N,
    D,
    W,
    BLOCK_C: tl.constexpr,  # power of two >= C
    BLOCK_N: tl.constexpr,  # power of two >= N
    BLOCK_W: tl.constexpr,  # power of two >= W
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    # lanes after the candidates are not kept, so their tokens and parents are not used
    tokens = tl.load(tokens_ptr + row * C + lane, mask=lane < C, other=0)
    parents = tl.load(parents_ptr + row * C + lane, mask=lane < C, other=0).to(tl.int32)
    place = kept_places(scores_ptr + row * C, C, N, BLOCK_C)
    above = tl.where(lane == 0, -1, tl.gather(place, tl.maximum(parents, 0), 0))
    kept_parents_ptr += row * N
    tl.store(kept_tokens_ptr + row * N + place, tokens, mask=place >= 0)
    tl.store(nodes_ptr + row * N + place, lane.to(tl.int64), mask=place >= 0)
    tl.store(kept_parents_ptr + place, above, mask=place >= 0)

    tl.debug_barrier()  # all threads have written the parents before any thread reads them
    node = tl.arange(0, BLOCK_N)
    store_ancestors(depth_ptr + row * N, ancestors_ptr + row * N * W, kept_parents_ptr, node, N, D, W, BLOCK_W)


def build_tree(
    tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, num_nodes: int, max_depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.build_tree`, which checks the arguments. Nothing is read on the host.

    Args:
        tokens: [B, C] int64, C <= 4096.
        parents: [B, C] int64.
        scores: [B, C] fp32.
        num_nodes: N <= min(C, 512).
        max_depth: D < N.

    Returns:
        tokens [B, N] int64, parents [B, N] int32, depth [B, N] int64, ancestors [B, N, W] int64, nodes [B, N] int64.
    """
    batch, candidates = tokens.shape
    kept, kept_parents, depth, ancestors = new_tree(tokens, num_nodes)
    nodes = tokens.new_empty(batch, num_nodes)
    block, words = block_of(candidates), ancestors.shape[2]
    with launching_on(tokens):
        _build_tree_kernel[(batch,)](
            kept, kept_parents, depth, ancestors, nodes, tokens.contiguous(), parents.contiguous(), scores.contiguous(),
            candidates, num_nodes, max_depth, words,
            BLOCK_C=block, BLOCK_N=block_of(num_nodes), BLOCK_W=pow2(words),
            num_warps=max(MIN_WARPS, block // WARP_C), **FP_FUSION,
        )  # fmt: skip
    return kept, kept_parents, depth, ancestors, nodes


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration of these sizes; the same on all architectures."""
    for candidates, nodes in ((256, 64), (1024, 64), (1024, 128), (2048, 512), (4096, 512)):
        ids, scores = abstract(torch.int64, 1, candidates), abstract(torch.float32, 1, candidates)
        call = functools.partial(build_tree, ids, ids, scores, nodes, min(nodes - 1, 8))
        yield CompileCase(f"c{candidates} n{nodes}", _build_tree_kernel, call, wide_loads=False)
