"""Greedy acceptance: the argmax of every node's logits, then the walk down the tree.

There are two launches. The first reads the logits once. Each program handles one block of the vocabulary of one node
and stores its highest *key* (`_keys`), an integer that is ordered by value and then by lower id. The second launch has
one program per sequence. It finds the highest key of each node and follows, from the root, the first child that carries
the target's token.

Letters: B sequences, N tree nodes, V vocabulary, S = ceil(V / BLOCK_V) blocks, D edges on the longest path, E ids
that end the text. Reference: `specdec_triton.ops.reference.accept_greedy`.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._keys import NAN_ORDER, NO_KEY, highest_logit, id_in, order_in
from ._launch import DTYPES, FP_FUSION, CompileCase, abstract, block_of, contiguous, launching_on
from ._tree import Acceptance, Tree, follow_targets, new_acceptance

# Vocabulary ids per program, by the number of rows B * N. Up to 16 rows, short blocks distribute the read over all
# multiprocessors (16 rows of 128k ids: 2,000 programs). For more rows, long blocks keep four to eight 128-bit loads per
# thread in flight and leave few keys for the walk; with 66 registers, seven programs (56 KB) share a multiprocessor.
# Chosen by compile reports (no spill). Timed on an H200, without alternatives: 12.1 us for 64 rows in bf16, 40 us and
# 76% of the bandwidth for 256 rows in fp32.
FEW_ROWS = 16
BLOCK_V_FEW, BLOCK_V_MANY = 1024, 4096
NUM_WARPS = 4
# Number of keys that the walk holds at once: 16 per thread. Chosen by compile reports: no spill, and at 64 nodes every
# warp holds the whole tree, so that a step of the walk is two warp reductions without a barrier.
WALK_KEYS = 2048


@triton.jit
def _argmax_kernel(
    keys_ptr,  # [B, S, N] int64, out
    logits_ptr,  # [B, N, V] fp32, bf16 or fp16
    stride_b,
    stride_n,
    stride_v,
    V,
    BLOCK_V: tl.constexpr,
):
    block = tl.program_id(0)
    node = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits_ptr += row * stride_b + node * stride_n
    logits = tl.load(logits_ptr + ids.to(tl.int64) * stride_v, mask=ids < V, other=float("-inf")).to(tl.float32)

    key, _ = highest_logit(logits, block * BLOCK_V, BLOCK_V)
    tl.store(keys_ptr + (row * tl.num_programs(0) + block) * tl.num_programs(1) + node, key)


@triton.jit(do_not_specialize=["S", "D", "E"])
def _walk_kernel(
    path_ptr,  # [B, D] int32, out
    length_ptr,  # [B] int64, out
    next_ids_ptr,  # [B] int64, out
    has_nan_ptr,  # [B] bool, out
    keys_ptr,  # [B, S, N] int64
    tokens_ptr,  # [B, N] int64
    parents_ptr,  # [B, N] int32
    budget_ptr,  # [B] int64
    eos_ids_ptr,  # [E] int64, or None
    N,
    S,
    D,
    E,
    BLOCK_N: tl.constexpr,  # power of two >= N
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK_N)
    in_tree = node < N
    # no node is the child of -1, so lanes after the tree are never reached, like padding nodes
    parents = tl.load(parents_ptr + row * N + node, mask=in_tree, other=-1)
    tokens = tl.load(tokens_ptr + row * N + node, mask=in_tree, other=-1)
    budget = tl.load(budget_ptr + row)

    best = tl.full([BLOCK_N], NO_KEY, tl.int64)
    for first in range(0, S, BLOCK_S):
        block = first + tl.arange(0, BLOCK_S)
        keys = tl.load(
            keys_ptr + (row * S + block)[:, None] * N + node[None, :],
            mask=(block < S)[:, None] & in_tree[None, :],
            other=NO_KEY,
        )
        best = tl.maximum(best, tl.max(keys, 0))
    invalid = order_in(best) == NAN_ORDER
    out = Acceptance(path_ptr, length_ptr, next_ids_ptr, has_nan_ptr)
    tree = Tree(node, parents, tokens)
    follow_targets(out, tree, id_in(best), invalid, budget, eos_ids_ptr, row, D, E, BLOCK_N)


def accept_greedy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.accept_greedy`, which checks the arguments. Nothing is read on the host.

    Args:
        logits: [B, N, V] fp32, bf16 or fp16, any strides. Loads are 128 bits wide if the last stride is 1 and the other
            strides and V are multiples of 16.
        tokens: [B, N] int64.
        parents: [B, N] int32.
        max_depth: D < N.
        budget: [B] int64.
        eos_ids: [E] int64, or None.

    Returns:
        The fields of `reference.Acceptance`: path [B, D] int32, length [B] int64, next_ids [B] int64, has_nan [B] bool.
    """
    batch, nodes, vocab = logits.shape
    block_v = BLOCK_V_FEW if batch * nodes <= FEW_ROWS else BLOCK_V_MANY
    blocks = triton.cdiv(vocab, block_v)
    keys = logits.new_empty((batch, blocks, nodes), dtype=torch.int64)
    out = new_acceptance(logits, max_depth)
    with launching_on(logits):
        _argmax_kernel[(blocks, nodes, batch)](
            keys, logits, *logits.stride(), vocab, BLOCK_V=block_v, num_warps=NUM_WARPS, **FP_FUSION
        )
        _walk_kernel[(batch,)](
            *out, keys, *map(contiguous, (tokens, parents, budget, eos_ids)),
            nodes, blocks, max_depth, 0 if eos_ids is None else eos_ids.shape[0],
            **_walk_blocks(nodes), num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return tuple(out)


def _walk_blocks(nodes: int) -> dict[str, int]:
    block_n = block_of(nodes)
    return {"BLOCK_N": block_n, "BLOCK_S": max(1, WALK_KEYS // block_n)}


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration; the same on all architectures."""

    def call(dtype, nodes, vocab=128256):
        tree = abstract(torch.int64, 1, nodes), abstract(torch.int32, 1, nodes)
        budget, eos_ids = abstract(torch.int64, 1), abstract(torch.int64, 2)
        return functools.partial(accept_greedy, abstract(dtype, 1, nodes, vocab), *tree, nodes - 1, budget, eos_ids)

    for name, dtype in DTYPES.items():
        for block_v, nodes in ((BLOCK_V_FEW, FEW_ROWS), (BLOCK_V_MANY, 64)):
            # V = 50257 (GPT-2) is odd, so rows are not aligned and loads are narrow
            for kind, vocab in (("", 128256), (" odd V", 50257)):
                yield CompileCase(
                    f"{name} argmax {block_v}{kind}",
                    _argmax_kernel,
                    call(dtype, nodes, vocab),
                    wide_loads=not kind,
                    tile_bytes=block_v * dtype.itemsize + 8,
                )
    for nodes in (16, 32, 64, 128, 256, 512):
        yield CompileCase(f"walk n{nodes}", _walk_kernel, call(torch.bfloat16, nodes), wide_loads=False)
