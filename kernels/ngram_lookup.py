"""Prompt lookup: a chain of draft tokens, copied from behind the best earlier occurrence of the last tokens.

There are two launches. In the first, each program compares the n-grams that end in some columns of a sequence with the
last one, and stores the best match as a key, which is ordered by longer match and then by earlier column. In the
second, one program for each sequence selects the best key, updates the estimates and writes the chain.

Letters: B sequences, C columns, G longest n-gram, S = ceil(C / BLOCK_C) blocks, N tree nodes, W = ceil(N/64) words.
Reference: `specdec_triton.ops.reference.ngram_lookup`.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._launch import CompileCase, abstract, block_of, launching_on
from ._tree import WORD_BITS, new_tree

# At 32k columns and batch 1 there are 128 programs, about one for each multiprocessor. Not timed.
BLOCK_C = 256
SEARCH_WARPS = 2
BLOCK_S = 512  # keys that the second launch holds at once
CHAIN_WARPS = 4
COLUMN_MASK: tl.constexpr = tl.constexpr(0x7FFFFFFF)
# a multiplication and an addition that are fused would round differently from the estimates on the host
UNFUSED = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["C", "G"])
def _search_kernel(
    keys_ptr,  # [B, S] int64, out: length of the match * 2**32 + COLUMN_MASK - its last column, 0 for none
    tokens_ptr,  # [B, C] int64
    stride_b,
    stride_c,
    start_ptr,  # [B] int64
    length_ptr,  # [B] int64
    C,
    G,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, length = tl.load(start_ptr + row), tl.load(length_ptr + row)
    tokens_ptr += row * stride_b
    running = (column >= start) & (column < length)
    matched = tl.zeros([BLOCK_C], tl.int32)
    for back in range(G):
        before = column - back
        inside = (before >= start) & (column < length)
        token = tl.load(tokens_ptr + before.to(tl.int64) * stride_c, mask=inside, other=0)
        last = tl.load(tokens_ptr + tl.maximum(length - back, 0) * stride_c)
        running = running & inside & (token == last)
        matched += running.to(tl.int32)
    key = tl.where(matched > 0, (matched.to(tl.int64) << 32) + (COLUMN_MASK - column), 0)
    tl.store(keys_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.max(key, 0))


@triton.jit(do_not_specialize=["S", "G", "D"])
def _chain_kernel(
    chain_tokens_ptr,  # [B, N] int64, out
    parents_ptr,  # [B, N] int32, out
    depth_ptr,  # [B, N] int64, out
    ancestors_ptr,  # [B, N, W] int64, out
    estimates_ptr,  # [B, G] fp32, in place
    last_draft_ptr,  # [B, 3] int64, in place: length of the match, number of draft tokens, column of the root
    keys_ptr,  # [B, S] int64
    tokens_ptr,  # [B, C] int64
    stride_b,
    stride_c,
    length_ptr,  # [B] int64
    S,
    G,
    D,
    first,
    threshold,
    learning,
    drift,
    N,
    BLOCK_N: tl.constexpr,  # power of two >= N
    BLOCK_S: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens_ptr += row * stride_b
    length = tl.load(length_ptr + row)

    best = tl.zeros([BLOCK_S], tl.int64)
    for block in range(0, S, BLOCK_S):
        place = block + tl.arange(0, BLOCK_S)
        best = tl.maximum(best, tl.load(keys_ptr + row * S + place, mask=place < S, other=0))
    key = tl.max(best, 0)
    matched = tl.where(D > 0, key >> 32, 0)
    end = COLUMN_MASK - (key & COLUMN_MASK)

    # learn from the last draft
    estimates_ptr += row * G
    last_draft_ptr += row * 3
    before, drafted, root = tl.load(last_draft_ptr), tl.load(last_draft_ptr + 1), tl.load(last_draft_ptr + 2)
    learns = (before > 0) & (length > root)
    place = tl.maximum(before - 1, 0)
    estimate = tl.load(estimates_ptr + place)
    accepted = (length - root - 1).to(tl.float32)
    learnt = estimate + learning * (accepted - estimate)
    drifted = estimate + drift * (first * before.to(tl.float32) - estimate)
    new = tl.where(learns, tl.where(drafted > 0, learnt, drifted), estimate)
    tl.store(estimates_ptr + place, new)

    expected = tl.load(estimates_ptr + tl.maximum(matched - 1, 0))
    expected = tl.where(matched == before, new, expected)
    count = tl.where((matched > 0) & (expected >= threshold), tl.minimum(length - end, D), 0)
    tl.store(last_draft_ptr, matched)
    tl.store(last_draft_ptr + 1, count)
    tl.store(last_draft_ptr + 2, length)

    node = tl.arange(0, BLOCK_N)
    in_tree, real = node < N, node <= count
    source = tl.where(node == 0, length, end + node)
    token = tl.load(tokens_ptr + source * stride_c, mask=in_tree & real, other=0)
    out = row * N + node
    tl.store(chain_tokens_ptr + out, token, mask=in_tree)
    tl.store(parents_ptr + out, tl.where(real, node - 1, -1), mask=in_tree)
    tl.store(depth_ptr + out, tl.where(real, node, 0).to(tl.int64), mask=in_tree)
    for word in tl.static_range(W):
        bit = tl.minimum(tl.maximum(node - word * WORD_BITS, 0), WORD_BITS - 1).to(tl.int64)
        own = tl.full([BLOCK_N], 1, tl.int64) << bit
        # the bits of the node and of those before it in this word
        upto = own | (own - 1)
        starts, ends = node >= word * WORD_BITS, node < (word + 1) * WORD_BITS
        alone = tl.where(starts & ends, own, 0)
        bits = tl.where(real, tl.where(starts, upto, 0), alone)
        tl.store(ancestors_ptr + out * W + word, bits, mask=in_tree)


def ngram_lookup(
    tokens: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    estimates: torch.Tensor,
    last_draft: torch.Tensor,
    num_nodes: int,
    max_depth: int,
    first: float,
    threshold: float,
    learning: float,
    drift: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.ngram_lookup`, which checks the arguments. Nothing is read on the host.

    Args:
        tokens: [B, C] int64, any strides.
        start, length: [B] int64.
        estimates: [B, G] fp32, contiguous; changed in place.
        last_draft: [B, 3] int64, contiguous; changed in place.
        num_nodes: N.
        max_depth: D < N.
        first, threshold, learning, drift: numbers.

    Returns:
        tokens [B, N] int64, parents [B, N] int32, depth [B, N] int64, ancestors [B, N, W] int64.
    """
    batch, columns = tokens.shape
    blocks = triton.cdiv(columns, BLOCK_C)
    keys = tokens.new_empty(batch, blocks)
    chain, parents, depth, ancestors = new_tree(tokens, num_nodes)
    start, length, longest = start.contiguous(), length.contiguous(), estimates.shape[1]
    with launching_on(tokens):
        _search_kernel[(blocks, batch)](
            keys, tokens, *tokens.stride(), start, length, columns, longest,
            BLOCK_C=BLOCK_C, num_warps=SEARCH_WARPS, **UNFUSED,
        )  # fmt: skip
        _chain_kernel[(batch,)](
            chain, parents, depth, ancestors, estimates, last_draft, keys, tokens, *tokens.stride(), length,
            blocks, longest, max_depth, first, threshold, learning, drift, num_nodes,
            BLOCK_N=block_of(num_nodes), BLOCK_S=BLOCK_S, W=ancestors.shape[2], num_warps=CHAIN_WARPS, **UNFUSED,
        )  # fmt: skip
    return chain, parents, depth, ancestors


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration; the same on all architectures."""

    def call(nodes, columns=32768):
        texts, row = abstract(torch.int64, 1, columns), abstract(torch.int64, 1)
        state = abstract(torch.float32, 1, 4), abstract(torch.int64, 1, 3)
        return functools.partial(ngram_lookup, texts, row, row, *state, nodes, nodes - 1, 0.8, 0.75, 0.2, 0.02)

    yield CompileCase("search", _search_kernel, call(12), wide_loads=False, tile_bytes=8 * BLOCK_C)
    for nodes in (16, 32, 64, 128):
        yield CompileCase(f"chain n{nodes}", _chain_kernel, call(nodes), wide_loads=False)
