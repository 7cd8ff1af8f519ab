"""Greedy acceptance: the argmax of every node's logits, split over the card, then the walk down the tree.

Two launches. The first reads the logits once: a program takes one block of the vocabulary of one node and leaves a
*key*, an integer whose order is the order of (value, then lower id first). The second has one program a sequence: it
takes the highest key of each node and follows, from the root, the first child that carries the target's token.

A key is int64. Bits 32-63: the fp32 value's bits, rearranged so that integers order as the floats do, NaN above all.
Bits 0-30: MAX_ID - token id.

Letters: B sequences, N tree nodes, V vocabulary, S = ceil(V / BLOCK_V) blocks, D edges on the longest path, E ids
that end the text. Reference: `specdec_triton.ops.reference.accept_greedy`.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._common import FP_FUSION, MAX_ID, NAN_ORDER, NO_KEY, CompileCase, launching_on, pow2

NO_STEP: tl.constexpr = tl.constexpr(2**63 - 1)

# Vocabulary ids a program, by B * N. Up to 16 rows, short blocks spread the read over the card (16 rows of 128k ids:
# 2,000 programs); above, long ones keep four to eight 128-bit loads a thread in flight (at 66 registers seven programs
# share a multiprocessor: 56 KB) and leave few keys to the walk. Chosen by compile reports (no spill); timed on an H200,
# without alternatives: 12.1 us for 64 rows in bf16, 40 us and 76% of the bandwidth for 256 in fp32.
FEW_ROWS = 16
BLOCK_V_FEW, BLOCK_V_MANY = 1024, 4096
NUM_WARPS = 4
# Keys the walk holds at once: 16 a thread. Rests on compile reports (no spill; at 64 nodes every warp holds the whole
# tree, so a step of the walk is two warp reductions and no barrier)
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
    lane = tl.arange(0, BLOCK_V)
    ids = block * BLOCK_V + lane
    logits_ptr += row * stride_b + node * stride_n
    logits = tl.load(logits_ptr + ids.to(tl.int64) * stride_v, mask=ids < V, other=float("-inf")).to(tl.float32)

    best = tl.max(logits, 0)
    # the lowest lane that holds the maximum (where all are -inf, one before the masked tail); NaN lanes count from
    # -BLOCK_V, so they come before any other, whatever max made of them
    first = tl.min(tl.where(logits != logits, lane - BLOCK_V, tl.where(logits == best, lane, BLOCK_V)), 0)
    is_nan = first < 0
    token_id = block * BLOCK_V + tl.where(is_nan, first + BLOCK_V, first)

    bits = tl.where(best == 0, 0.0, best).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are a tie
    order = tl.where(is_nan, NAN_ORDER, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    key = (order.to(tl.int64) << 32) | (MAX_ID - token_id)
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
    # no node is the child of -1, so lanes beyond the tree are never reached, like padding nodes
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
    live = budget > 0
    is_nan = (best >> 32).to(tl.int32) == NAN_ORDER
    reached = node == 0
    target_ids = MAX_ID - (best & MAX_ID).to(tl.int32)

    # a target that ends the text is kept as its complement: no token is negative, so the walk stops there by itself
    goals = target_ids
    if eos_ids_ptr is not None:
        for index in range(E):
            goals = tl.where(target_ids == tl.load(eos_ids_ptr + index), ~target_ids, goals)

    # node above goal in one integer: a single minimum finds the first child and what the target says after it
    steps = (node.to(tl.int64) << 32) | (goals.to(tl.int64) & 0xFFFFFFFF)
    here = tl.min(steps, 0)  # the root's
    path = tl.full([BLOCK_N], -1, tl.int32)
    length = 0
    limit = tl.minimum(D, budget - 1)
    walking = length < limit
    while walking:
        carries = (parents == (here >> 32)) & (tokens == here.to(tl.int32))
        child = tl.min(tl.where(carries, steps, NO_STEP), 0)
        found = child != NO_STEP
        here = tl.where(found, child, here)
        path = tl.where(found & (node == length), (child >> 32).to(tl.int32), path)
        reached |= found & (node == (child >> 32))
        length += found.to(tl.int32)
        walking = found & (length < limit)

    goal = here.to(tl.int32)
    tl.store(path_ptr + row * D + node, path, mask=node < D)
    tl.store(length_ptr + row, length)
    tl.store(next_ids_ptr + row, tl.where(live, tl.where(goal < 0, ~goal, goal), -1))
    tl.store(has_nan_ptr + row, live & (tl.max((reached & is_nan).to(tl.int32), 0) > 0))


def accept_greedy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.accept_greedy`, which checks the arguments. Reads nothing on the host.

    Args:
        logits: [B, N, V] fp32, bf16 or fp16, any strides; 128-bit loads where the last is 1 and the others and V are
            multiples of 16.
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
    path = logits.new_empty((batch, max_depth), dtype=torch.int32)
    length = logits.new_empty(batch, dtype=torch.int64)
    next_ids = logits.new_empty(batch, dtype=torch.int64)
    has_nan = logits.new_empty(batch, dtype=torch.bool)
    with launching_on(logits):
        _argmax_kernel[(blocks, nodes, batch)](
            keys, logits, *logits.stride(), vocab, BLOCK_V=block_v, num_warps=NUM_WARPS, **FP_FUSION
        )
        _walk_kernel[(batch,)](
            path, length, next_ids, has_nan,
            keys, tokens.contiguous(), parents.contiguous(), budget.contiguous(),
            None if eos_ids is None else eos_ids.contiguous(),
            nodes, blocks, max_depth, 0 if eos_ids is None else eos_ids.shape[0],
            **_walk_blocks(nodes), num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return path, length, next_ids, has_nan


def _walk_blocks(nodes: int) -> dict[str, int]:
    block_n = max(16, pow2(nodes))
    return {"BLOCK_N": block_n, "BLOCK_S": max(1, WALK_KEYS // block_n)}


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration on a CUDA architecture; the same on all of them."""
    options = {"num_warps": NUM_WARPS, **FP_FUSION}
    for dtype in ("bf16", "fp16", "fp32"):
        for block_v in (BLOCK_V_FEW, BLOCK_V_MANY):
            # GPT-2's 50257 is of the odd kind: rows begin anywhere, so loads are narrow
            for kind, number in (("", "i32:16"), (" odd V", "i32")):
                yield CompileCase(
                    name=f"{dtype} argmax {block_v}{kind}",
                    kernel=_argmax_kernel,
                    signature={"keys_ptr": "*i64:16", "logits_ptr": f"*{dtype}:16"}
                    | dict.fromkeys(("stride_b", "stride_n", "V"), number),
                    constexprs={"stride_v": 1, "BLOCK_V": block_v},
                    options=options,
                    wide_loads=not kind,
                    tile_bytes=block_v * (4 if dtype == "fp32" else 2) + 8,
                )
    outputs = {"path_ptr": "*i32:16", "length_ptr": "*i64:16", "next_ids_ptr": "*i64:16", "has_nan_ptr": "*i1:16"}
    inputs = {"keys_ptr": "*i64:16", "tokens_ptr": "*i64:16", "parents_ptr": "*i32:16"}
    inputs |= {"budget_ptr": "*i64:16", "eos_ids_ptr": "*i64:16"}
    for nodes in (16, 32, 64, 128, 256, 512):
        yield CompileCase(
            name=f"walk n{nodes}",
            kernel=_walk_kernel,
            signature=outputs | inputs | {"N": "i32:16", "S": "i32", "D": "i32", "E": "i32"},
            constexprs=_walk_blocks(nodes),
            options=options,
            wide_loads=False,
        )
