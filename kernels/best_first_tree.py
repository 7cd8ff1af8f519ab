"""Best-first draft tree: the nodes with the highest scores, if the candidates of different positions are independent.

There is one launch, with one program of one warp per sequence. Each node holds the most likely of its children that are
not in the tree yet. The best of these children becomes the next node, N - 1 times, so that the time does not depend on
the numbers of positions and candidates. Then every node walks up to the root through the parents.

Letters: B sequences, D positions, K candidates of each position, N nodes, W = ceil(N/64) words.
Reference: `specdec_triton.ops.reference.best_first_tree`.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._keys import NEG_INF, NO_ORDER, order_of, value_of
from ._launch import FP_FUSION, CompileCase, abstract, block_of, launching_on, pow2
from ._tree import new_tree, store_ancestors

# The two reductions of each step need no shared memory with a single warp. Chosen by compile reports: no spill at 512
# nodes, the limit of `ops.best_first_tree`. Not timed.
NUM_WARPS = 1
WALK_N = 64  # nodes that walk up at the same time
# The place of a child: from high to low bits its position, which is its parent's depth, its parent, and its rank among
# the candidates. All are below N.
BITS: tl.constexpr = tl.constexpr(10)
MASK: tl.constexpr = tl.constexpr(2**10 - 1)
LAST_PLACE: tl.constexpr = tl.constexpr(2**31 - 1)  # above all places


@triton.jit
def _log_prob(log_probs_ptr, position, rank, D, K):
    """The log-probability of a candidate, at most 0. The caller must not use it if there is no such candidate."""
    loaded = tl.load(log_probs_ptr + position * K + rank, mask=(position < D) & (rank < K), other=0.0)
    return tl.where(loaded <= 0, loaded, tl.where(loaded > 0, 0.0, NEG_INF))


@triton.jit(do_not_specialize=["D", "K", "N", "W"])
def _best_first_tree_kernel(
    tokens_ptr,  # [B, N] int64, out
    parents_ptr,  # [B, N] int32, out
    depth_ptr,  # [B, N] int64, out
    ancestors_ptr,  # [B, N, W] int64, out
    root_ptr,  # [B] int64
    candidates_ptr,  # [B, D, K] int64
    log_probs_ptr,  # [B, D, K] fp32
    D,
    K,
    N,
    W,
    BLOCK_N: tl.constexpr,  # power of two >= N
    BLOCK_W: tl.constexpr,  # power of two >= W
    WALK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    candidates_ptr += row * D * K
    log_probs_ptr += row * D * K
    parents_ptr += row * N
    node = tl.arange(0, BLOCK_N)
    # of each node: its place as a child, and its score
    own_places, scores = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.float32)
    # of each node's next child: its place, and the order of its score
    places = tl.zeros([BLOCK_N], tl.int32)
    orders = tl.where(node == 0, order_of(_log_prob(log_probs_ptr, 0, 0, D, K)), NO_ORDER)
    for new in range(1, N):
        # reductions of 32 bits are single instructions
        best = tl.max(orders, 0)
        place = tl.min(tl.where(orders == best, places, LAST_PLACE), 0)
        position, parent, rank = place >> (2 * BITS), (place >> BITS) & MASK, place & MASK
        score = value_of(best)
        is_parent, is_new = node == parent, node == new
        own_places = tl.where(is_new, place, own_places)
        scores = tl.where(is_new, score, scores)

        # in the lanes of other nodes, the sum is not used
        sibling = tl.minimum(scores + _log_prob(log_probs_ptr, position, rank + 1, D, K), score)
        sibling = tl.where(rank + 1 < K, order_of(sibling), NO_ORDER)
        child = order_of(score + _log_prob(log_probs_ptr, position + 1, 0, D, K))
        child = tl.where(position + 1 < D, child, NO_ORDER)
        first_places = ((position + 1) << (2 * BITS)) | (node << BITS)
        orders = tl.where(is_parent, sibling, tl.where(is_new, child, orders))
        places = tl.where(is_parent, place + 1, tl.where(is_new, first_places, places))

    position, parent, rank = own_places >> (2 * BITS), (own_places >> BITS) & MASK, own_places & MASK
    # the root is no candidate, and lanes after the nodes are not stored
    drafts = tl.load(candidates_ptr + position * K + rank, mask=(node > 0) & (node < N), other=0)
    tl.store(tokens_ptr + row * N + node, tl.where(node == 0, tl.load(root_ptr + row), drafts), mask=node < N)
    tl.store(parents_ptr + node, tl.where(node == 0, -1, parent), mask=node < N)
    most = tl.minimum(D, N - 1)
    tl.debug_barrier()  # all threads have written the parents before any thread reads them
    for first in range(0, N, WALK_N):
        walking = first + tl.arange(0, WALK_N)
        store_ancestors(depth_ptr + row * N, ancestors_ptr + row * N * W, parents_ptr, walking, N, most, W, BLOCK_W)


def best_first_tree(
    root: torch.Tensor, candidates: torch.Tensor, log_probs: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.best_first_tree`, which checks the arguments. Nothing is read on the host.

    Args:
        root: [B] int64.
        candidates: [B, D, K] int64.
        log_probs: [B, D, K] fp32.
        num_nodes: N <= 512, at most the number of nodes of the full tree.

    Returns:
        tokens [B, N] int64, parents [B, N] int32, depth [B, N] int64, ancestors [B, N, W] int64.
    """
    batch, positions, width = candidates.shape
    tokens, parents, depth, ancestors = new_tree(root, num_nodes)
    block, words = block_of(num_nodes), ancestors.shape[2]
    with launching_on(root):
        _best_first_tree_kernel[(batch,)](
            tokens, parents, depth, ancestors, root.contiguous(), candidates.contiguous(), log_probs.contiguous(),
            positions, width, num_nodes, words,
            BLOCK_N=block, BLOCK_W=pow2(words), WALK_N=min(block, WALK_N), num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return tokens, parents, depth, ancestors


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration; the same on all architectures."""
    for nodes in (16, 64, 128, 512):
        candidates, log_probs = (abstract(dtype, 1, 15, 10) for dtype in (torch.int64, torch.float32))
        call = functools.partial(best_first_tree, abstract(torch.int64, 1), candidates, log_probs, nodes)
        yield CompileCase(f"n{nodes}", _best_first_tree_kernel, call, wide_loads=False)
