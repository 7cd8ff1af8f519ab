"""Attention of draft-tree nodes over a ragged prefix and their own ancestors.

B sequences, N query rows (the last N of T tree nodes), W = ceil(T/64) ancestor words, Hq/Hkv query/key-value heads,
G = Hq/Hkv heads a group, S cache slots, D head dim of keys, Dv of values, P splits.

A program owns one KV head, a tile of the G * N (node, head) rows that share it, and one split of the keys: a K/V tile
is read once for up to 128 rows. Keys come in tiles of BLOCK_N slots: first the prefix, counted from the sequence's
start, then the tree, counted from its first slot, so that a tree tile needs one ancestor word a row. A split is a
fixed number of tiles. Where the whole capacity is one split a single launch writes the output; else a second kernel
merges the splits in index order. Lengths are read on the device: the grid covers the capacity, empty splits return.

Under one plan a row's result depends on its own start, length and path only: a tile or split in which it sees nothing
leaves every bit of it as it was, whatever other rows, nodes and sequences are there. Each row selects its scores, but
all rows of a tile share its values, and 0 * NaN is NaN. So if some row does not see the whole tile, a slot with values
that are not finite is read as 0, and rows that see the slot get a score of NaN.
Reference: specdec_triton.ops.reference.tree_attention
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import (
    DTYPES,
    FP_FUSION,
    INTERPRETED,
    CompileCase,
    abstract,
    architecture,
    launching_on,
    multiprocessors,
    pow2,
)

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
WORD_BITS: tl.constexpr = tl.constexpr(64)


class AttentionConfig(NamedTuple):
    """How tree attention computes a shape: one entry of the tables below, which say what each rests on."""

    block_m: int  # rows a program
    block_n: int  # slots a tile
    num_warps: int
    num_stages: int
    programs: int  # planned for a multiprocessor at a time, at most; 2 if the compile report says that 2 fit
    most_rows: int = 0  # chosen for shapes of up to this many rows; 0: for one row tile


# By bytes an element and head dim (`ops.MAX_HEAD_DIMS` are the greatest), narrowest first; the last entry also takes
# more rows. Timed on an H200 with Triton 3.6, 2026-11-28 (bench/tune_tree_attention.py): head dim 128 in bf16, 4, 64,
# 128, 256 and 512 rows in several splits. The other entries rest on the compile report only.
_ATTENTION = {
    (2, 64): ((16, 64, 4, 3, 2), (32, 64, 4, 3, 2), (64, 64, 4, 3, 2), (128, 64, 8, 3, 1)),
    # Row tiles of 128 took 4 to 6% longer for up to 512 rows at 8192 and 32768 slots, 5% less for 512 rows at 2048.
    (2, 128): ((16, 64, 4, 3, 2), (32, 64, 4, 3, 2), (64, 64, 4, 3, 2, 512), (128, 64, 8, 3, 1)),
    (2, 256): ((16, 32, 4, 3, 2), (32, 64, 8, 2, 1), (64, 32, 8, 2, 1)),
    (2, 512): ((16, 16, 8, 2, 1),),
    (4, 64): ((16, 16, 4, 2, 2),),
    (4, 128): ((16, 16, 4, 2, 2),),
    (4, 256): ((16, 16, 4, 2, 2),),
}
# The same where those spill (before sm_90, and with a window or chunks) or want more shared memory than sm_120 has.
# None of these was timed.
_ATTENTION_TIGHT = _ATTENTION | {
    (2, 64): (_ATTENTION[2, 64][0], (32, 32, 4, 3, 2), (64, 32, 4, 3, 2), _ATTENTION[2, 64][3]),
    (2, 128): (*_ATTENTION[2, 128][:2], (64, 32, 8, 3, 2), (128, 32, 8, 3, 1)),
    (2, 256): (*_ATTENTION[2, 256][:2], (64, 16, 8, 2, 1)),
    (4, 256): ((16, 16, 8, 2, 2),),
}


def attention_config(
    arch: int, rows: int, head_dim: int, bytes: int, one_split: bool, limited: bool
) -> AttentionConfig:
    """For rows = nodes * heads a group, the greater head dim and the element size; limited: by a window or chunks."""
    table = _ATTENTION_TIGHT if limited or not 90 <= arch < 120 else _ATTENTION
    configs = [AttentionConfig(*entry) for entry in table[bytes, max(pow2(head_dim), 64)]]
    if one_split:  # narrow row tiles fill the card, and the keys that they share stay in the L2 cache
        rows = 16 if rows <= 64 else 32
    return next((config for config in configs if max(config.block_m, config.most_rows) >= rows), configs[-1])


# A capacity up to this, the tree's own slots left out, is one split: a prefix of 256 slots, in a cache that is rounded
# up to a multiple of 128. On an H200 one split of 1024 slots took longer than 2048 slots in many (19 against 11 us).
SHORT_SLOTS = 256 + 127
# A split has at least this many slots, and this many times the rows of a row tile. For D = Dv and two bytes an element
# a program then moves at most half as much for its partial results, written and read once, as for its keys and values.
MIN_SPLIT_SLOTS = 128
MIN_SPLIT_ROWS = 4
# Programs planned for a multiprocessor at a time, for each row tile and up to the configuration's. On an H200 one row
# tile of 8 KV heads was fastest with one (8192 slots, N = 16: 17.9 us in 15 splits, 21.7 in 33), more with two.
PROGRAMS_A_ROW_TILE = 1
MAX_WAVES = 4  # plans of up to this many waves are compared
WAVE_TILES = 4  # what starting a program and merging its results costs, in tiles: an estimate
MERGE_SPLITS = 16  # splits merged at a time
MERGE_ROWS = 4  # rows a program of the merge: for every shape, so that a row's sums never depend on how many there are


@functools.lru_cache(maxsize=1024)
def attention_plan(
    arch, multiprocessors, batch, kv_heads, group, rows, nodes, slots, head_dim, value_dim, bytes, limited
):
    """Grid (row tiles, splits, sequences * KV heads), tiles a split, compile-time arguments of tree attention and of
    its merge.

    Functions of shapes and of the device, never of lengths. A split's size follows the capacity and the number of row
    tiles and KV heads; it does not depend on B, nor on an N with the same configuration and row
    tiles, nor on T unless the slots that T leaves are few enough for one split.
    """
    one_split = slots - nodes <= SHORT_SLOTS
    config = attention_config(arch, rows * group, max(head_dim, value_dim), bytes, one_split, limited)
    block_m, block_n, num_warps, num_stages, programs, _ = config
    row_tiles = triton.cdiv(rows * group, block_m)
    tiles = triton.cdiv(slots, block_n) + 1  # as many as prefix and tree of any length may take
    split_tiles = tiles
    if not one_split:
        least = max(MIN_SPLIT_ROWS * block_m, MIN_SPLIT_SLOTS) // block_n
        at_a_time = multiprocessors * min(row_tiles * PROGRAMS_A_ROW_TILE, programs)
        split_tiles = _split_tiles(tiles, least, row_tiles * kv_heads, at_a_time)
    splits = triton.cdiv(triton.cdiv(slots - nodes, block_n) + triton.cdiv(nodes, block_n), split_tiles)
    shared = {"G": group, "DV": value_dim, "BLOCK_N": block_n, "BLOCK_DV": max(pow2(value_dim), 16), **FP_FUSION}
    blocks = {"D": head_dim, "BLOCK_M": block_m, "BLOCK_D": max(pow2(head_dim), 16)}
    meta = shared | blocks | _attention_options(block_m, blocks["BLOCK_D"], bytes, num_warps, num_stages)
    merge_meta = shared | _merge_blocks(splits, shared["BLOCK_DV"])
    return (row_tiles, splits, batch * kv_heads), split_tiles, meta, merge_meta


def _split_tiles(tiles: int, least: int, programs_a_split: int, at_a_time: int) -> int:
    """Tiles a split, such that one sequence at full capacity fills whole waves of `at_a_time` programs."""

    def size(waves):
        return max(triton.cdiv(tiles, max(waves * at_a_time // programs_a_split, 1)), least)

    def cost(size):
        return triton.cdiv(programs_a_split * triton.cdiv(tiles, size), at_a_time) * (size + WAVE_TILES)

    return min(map(size, range(1, MAX_WAVES + 1)), key=cost)


def _attention_options(block_m: int, block_d: int, bytes: int, num_warps: int, num_stages: int) -> dict[str, int]:
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if bytes == 4:  # spills more the more it is given
        return options
    # Left alone, the compiler aims at 128 or 168 registers and spills one or two. The narrowest tiles fit 168, with
    # which three programs fit on a multiprocessor.
    return options | {"maxnreg": 168 if block_m * block_d <= 1024 else 255}


def _merge_blocks(splits: int, block_dv: int) -> dict[str, int]:
    # a thread loads 128 bits of each split
    warps = max(MERGE_ROWS * block_dv // 128, 1)
    blocks = {"ROWS": MERGE_ROWS, "BLOCK_P": max(pow2(splits), MERGE_SPLITS), "MERGE_P": MERGE_SPLITS}
    # left alone, the compiler aims at 128 registers, and spilled two of them with a window
    return blocks | {"num_warps": warps, "maxnreg": min(168, 2048 // warps)}


@triton.jit
def _sequence(tree_ptr, W, T, BLOCK_N: tl.constexpr):
    """Start and length in slots, and how many tiles prefix and tree take."""
    start = tl.load(tree_ptr + W + 1).to(tl.int32)
    length = tl.load(tree_ptr + W + 2).to(tl.int32)
    return start, length, tl.cdiv(length - start, BLOCK_N), tl.cdiv(T, BLOCK_N)


@triton.jit
def _first_position(position, window, chunk):
    """The first position that a row at `position` sees."""
    first = position * 0
    if window is not None:
        first = tl.maximum(first, position - window + 1)
    if chunk is not None:
        first = tl.maximum(first, position // chunk * chunk)
    return first


@triton.jit
def _load_query(row_ptr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[BLOCK_M, BLOCK_DIM]: the rows at `row_ptr` [BLOCK_M], zeros after them."""
    dim = tl.arange(0, BLOCK_DIM)
    return tl.load(row_ptr[:, None] + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def _load_tile(ptr, slot, stride_slot, used, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[BLOCK_N, BLOCK_DIM] keys or values from `slot` on; zero where `used` is false (None: all are used)."""
    column = tl.arange(0, BLOCK_N)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    ptrs = ptr + slot.to(tl.int64) * stride_slot + column * stride_slot + dim
    if used is not None:
        return tl.load(ptrs, mask=used[:, None] & (dim < DIM), other=0.0)
    elif DIM == BLOCK_DIM:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=dim < DIM, other=0.0)


@triton.jit
def _load_finite(ptr, slot, stride_slot, used, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """A tile of values, [BLOCK_N, BLOCK_DIM], with zeros in the slots that have values that are not finite; and which
    slots have none of those, [BLOCK_N] bool."""
    values = _load_tile(ptr, slot, stride_slot, used, DIM, BLOCK_N, BLOCK_DIM)
    finite = tl.min((tl.abs(values.to(tl.float32)) < float("inf")).to(tl.int32), 1) > 0
    if values.dtype == tl.float32:  # twice the registers: rather read once more than kept until then (compile report)
        values = _load_tile(ptr, slot, stride_slot, finite if used is None else used & finite, DIM, BLOCK_N, BLOCK_DIM)
    else:
        values = tl.where(finite[:, None], values, 0.0)
    return values, finite


@triton.jit
def _attend(query, keys, values, visible, finite, mixed, peak, total, inner, outer):
    """One step of the online softmax: `mixed`, `peak` and `total` after a tile.

    `visible` [BLOCK_M, BLOCK_N] and `finite` [BLOCK_N] say which slots a row sees, and whose values are what they were;
    None: it sees all of them.
    """
    if INTERPRETED:
        query, keys = query.to(tl.float32), keys.to(tl.float32)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if inner is not None:
        # tanh; an exponential that overflows gives 1
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E * inner)))
    if visible is None:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * outer)
        base = new_peak
    else:
        scores = tl.where(visible, tl.where(finite[None, :], scores, float("nan")), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * outer)
        # a row that has seen nothing yet: -inf - -inf is NaN
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * outer - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(weights, 1)
    mixed = mixed * fade[:, None]
    weights = weights.to(values.dtype)
    if INTERPRETED:
        weights, values = weights.to(tl.float32), values.to(tl.float32)
    return tl.dot(weights, values, mixed, input_precision="ieee"), new_peak, total


@triton.jit(do_not_specialize=["stride_tb", "stride_tn", "N", "T", "split_tiles"])
def _tree_attention_kernel(
    out_ptr,  # [B, N, Hq, Dv] query's dtype, contiguous, out; None if there are several splits
    partial_ptr,  # [B, Hkv, P, N * G, Dv] fp32, out: sums of values; None if there is one split
    stats_ptr,  # [B, Hkv, P, N * G, 2] fp32, out: peak (base 2) and sum of weights; None if there is one split
    query_ptr,  # [B, Hq, N, D] fp32, bf16 or fp16
    key_ptr,  # [B, Hkv, S, D] query's dtype
    value_ptr,  # [B, Hkv, S, Dv] query's dtype
    tree_ptr,  # [B, T, W + 3] int64: ancestor words, depth, start, length
    sinks_ptr,  # [Hq] float, or None
    inner,  # scores become tanh(inner * query @ key) first; None without softcap
    outer,  # then the exponent of 2 is outer * scores; positive
    window,  # sliding window in positions, or None
    chunk,  # chunk size in positions, or None
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_tb, stride_tn,
    Hkv, N, T, W,
    split_tiles,  # tiles a split
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows a program
    BLOCK_N: tl.constexpr,  # slots a tile: divides 64
    BLOCK_D: tl.constexpr,  # powers of two >= D, Dv
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    batch = (tl.program_id(2) // Hkv).to(tl.int64)
    head = tl.program_id(2) % Hkv

    # rows past the last repeat the last node; they are not stored
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node = tl.minimum(row // G, N - 1)
    query_head = head * G + row % G
    row_query_ptr = query_ptr + batch * stride_qb + query_head * stride_qh + node * stride_qn  # [BLOCK_M]
    # First of all, so that it is on its way while the lengths are: both are far. In fp32 that spills (compile report).
    QUERY_FIRST: tl.constexpr = query_ptr.dtype.element_ty != tl.float32
    if QUERY_FIRST:
        query = _load_query(row_query_ptr, D, BLOCK_D)
    tree_ptr += batch * stride_tb
    start, length, prefix_tiles, tree_tiles = _sequence(tree_ptr, W, T, BLOCK_N)
    begin = split * split_tiles
    end = tl.minimum(begin + split_tiles, prefix_tiles + tree_tiles)
    row_tree_ptr = tree_ptr + (T - N + node) * stride_tn  # [BLOCK_M]
    if window is not None or chunk is not None:
        depth = tl.load(row_tree_ptr + W).to(tl.int32)
        first = _first_position(length - start + depth, window, chunk)
        begin = tl.maximum(begin, tl.minimum(tl.min(first, 0) // BLOCK_N, prefix_tiles))
    if begin >= end:
        return

    if not QUERY_FIRST:
        query = _load_query(row_query_ptr, D, BLOCK_D)
    key_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    value_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    column = tl.arange(0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # tiles of the prefix that only some rows see all of: few, and nothing is fetched ahead, which would take registers
    whole_tiles = (length - start) // BLOCK_N
    if window is not None or chunk is not None:
        seen_from = tl.minimum(tl.cdiv(tl.max(first, 0), BLOCK_N), tl.minimum(end, whole_tiles))
        for tile in tl.range(begin, seen_from, num_stages=1):
            slot = start + tile * BLOCK_N
            keys = _load_tile(key_ptr, slot, stride_ks, None, D, BLOCK_N, BLOCK_D)
            values, finite = _load_finite(value_ptr, slot, stride_vs, None, DV, BLOCK_N, BLOCK_DV)
            visible = (tile * BLOCK_N + column)[None, :] >= first[:, None]
            mixed, peak, total = _attend(query, keys, values, visible, finite, mixed, peak, total, inner, outer)
        begin = tl.maximum(begin, seen_from)

    # tiles of the prefix that all rows see
    for tile in range(begin, tl.minimum(end, whole_tiles)):
        slot = start + tile * BLOCK_N
        keys = _load_tile(key_ptr, slot, stride_ks, None, D, BLOCK_N, BLOCK_D)
        values = _load_tile(value_ptr, slot, stride_vs, None, DV, BLOCK_N, BLOCK_DV)
        mixed, peak, total = _attend(query, keys, values, None, None, mixed, peak, total, inner, outer)

    # the prefix's last, partial tile, and the tree: a word says what a row sees of a tile
    # fp32's products without tensor cores take more registers if nothing is fetched ahead (compile report)
    TAIL_STAGES: tl.constexpr = 2 if query_ptr.dtype.element_ty == tl.float32 else 1
    tail_word = ~(tl.full([], -1, tl.int64) << (length - start) % BLOCK_N)
    for tile in tl.range(tl.maximum(begin, whole_tiles), end, num_stages=TAIL_STAGES):
        in_tree = tile >= prefix_tiles
        tile_node = tl.maximum(tile - prefix_tiles, 0) * BLOCK_N
        slot = tl.where(in_tree, length + tile_node, start + tile * BLOCK_N)
        used = slot + column < tl.where(in_tree, length + T, length)
        keys = _load_tile(key_ptr, slot, stride_ks, used, D, BLOCK_N, BLOCK_D)
        values, finite = _load_finite(value_ptr, slot, stride_vs, used, DV, BLOCK_N, BLOCK_DV)
        word = tl.load(row_tree_ptr + tile_node // WORD_BITS) >> tile_node % WORD_BITS
        word = tl.where(in_tree, word, tail_word)
        if BLOCK_N <= 32:
            word = word.to(tl.int32)
        visible = ((word[:, None] >> column[None, :]) & 1) != 0
        if window is not None or chunk is not None:
            key_node = tile_node + column
            key_depth = tl.load(tree_ptr + key_node * stride_tn + W, mask=key_node < T, other=0).to(tl.int32)
            position = tl.where(in_tree, length - start + key_depth, tile * BLOCK_N + column)
            visible &= position[None, :] >= first[:, None]
        mixed, peak, total = _attend(query, keys, values, visible, finite, mixed, peak, total, inner, outer)

    stored = row < N * G
    dim = tl.arange(0, BLOCK_DV)
    stored_tile = stored[:, None] & (dim < DV)[None, :]
    if partial_ptr is None:
        if sinks_ptr is not None:
            total += tl.exp2(tl.load(sinks_ptr + query_head).to(tl.float32) * LOG2E - peak)
        out_row = (batch * N + node) * (Hkv * G) + query_head
        tl.store(out_ptr + out_row[:, None] * DV + dim[None, :], mixed / total[:, None], mask=stored_tile)
    else:
        partial_row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + split) * (N * G) + row
        tl.store(partial_ptr + partial_row[:, None] * DV + dim[None, :], mixed, mask=stored_tile)
        tl.store(stats_ptr + partial_row * 2, peak, mask=stored)
        tl.store(stats_ptr + partial_row * 2 + 1, total, mask=stored)


@triton.jit
def _load_partials(ptr, split, used, stride_split, row, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr):
    """[splits, ROWS, BLOCK_DV] sums of values from `row` on; zero in the splits for which `used` [splits] is false."""
    # read as [splits, ROWS * BLOCK_DV]: a thread then has the same place in every split, in each version of Triton
    column = tl.arange(0, ROWS * BLOCK_DV)
    dim = column % BLOCK_DV
    # rows past the last repeat it
    row = tl.minimum(row + column // BLOCK_DV, stride_split - 1)
    ptrs = ptr + (split.to(tl.int64) * stride_split * DV)[:, None] + (row * DV + dim)[None, :]
    partials = tl.load(ptrs, mask=used[:, None] & (dim < DV)[None, :], other=0.0)
    return tl.reshape(partials, [split.shape[0], ROWS, BLOCK_DV])


@triton.jit(do_not_specialize=["stride_tb", "stride_tn", "N", "T", "P", "split_tiles"])
def _merge_kernel(
    out_ptr,  # [B, N, Hq, Dv] query's dtype, contiguous, out
    partial_ptr,  # [B, Hkv, P, N * G, Dv] fp32
    stats_ptr,  # [B, Hkv, P, N * G, 2] fp32
    tree_ptr,  # [B, T, W + 3] int64
    sinks_ptr,  # [Hq] float, or None
    window,
    chunk,
    stride_tb, stride_tn,
    Hkv, N, T, W, P,
    split_tiles,
    G: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,  # rows a program
    BLOCK_N: tl.constexpr,  # as in the first kernel
    BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr,  # power of two >= P
    MERGE_P: tl.constexpr,  # splits at a time: a power of two, at most BLOCK_P
):  # fmt: skip
    batch = (tl.program_id(1) // Hkv).to(tl.int64)
    # rows past the last repeat it; they are not stored
    first_row = tl.program_id(0) * ROWS
    row = tl.minimum(first_row + tl.arange(0, ROWS), N * G - 1)
    node = row // G
    query_head = (tl.program_id(1) % Hkv) * G + row % G

    # loaded before the lengths are known: splits that were not written hold anything
    stride_split = N * G
    first_split_row = tl.program_id(1).to(tl.int64) * P * stride_split
    partial_ptr += first_split_row * DV
    stats_ptr += first_split_row * 2
    split = tl.arange(0, BLOCK_P)
    exists = split < P
    stats_ptrs = stats_ptr + (split[:, None] * stride_split + row[None, :]) * 2
    peaks = tl.load(stats_ptrs, mask=exists[:, None], other=0.0)
    totals = tl.load(stats_ptrs + 1, mask=exists[:, None], other=0.0)
    ONE_PASS: tl.constexpr = BLOCK_P == MERGE_P
    LIMITED: tl.constexpr = window is not None or chunk is not None

    tree_ptr += batch * stride_tb
    start, length, prefix_tiles, tree_tiles = _sequence(tree_ptr, W, T, BLOCK_N)
    end = tl.cdiv(prefix_tiles + tree_tiles, split_tiles)
    begin = row * 0
    least = 0
    if LIMITED:
        # the first kernel skipped the splits before the first position that its tile sees; a row counts its own
        depth = tl.load(tree_ptr + (T - N + node) * stride_tn + W).to(tl.int32)
        first = _first_position(length - start + depth, window, chunk)
        begin = tl.minimum(first // BLOCK_N, prefix_tiles) // split_tiles
        least = tl.min(begin, 0)
    if ONE_PASS:  # the sums of written splits alone: in a long cache of short texts most are not
        used = (split >= least) & (split < end)
        partials = _load_partials(partial_ptr, split, used, stride_split, first_row, DV, BLOCK_DV, ROWS)

    written = (split[:, None] >= begin[None, :]) & (split < end)[:, None]
    peaks = tl.where(written, peaks, float("-inf"))
    peak = tl.max(peaks, 0)
    fades = tl.exp2(peaks - peak[None, :])
    total = tl.sum(tl.where(written, totals, 0.0) * fades, 0)
    if sinks_ptr is not None:
        total += tl.exp2(tl.load(sinks_ptr + query_head).to(tl.float32) * LOG2E - peak)

    if ONE_PASS:
        mixed = tl.sum(tl.where(written[:, :, None], partials, 0.0) * fades[:, :, None], 0)
    else:
        # From the first split of any row here, in whole passes: those before a row's own add zeros to it.
        mixed = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        for first_split in range(least // MERGE_P * MERGE_P, end, MERGE_P):
            some = first_split + tl.arange(0, MERGE_P)
            some_used = (some >= least) & (some < end)
            some_written = (some[:, None] >= begin[None, :]) & (some < end)[:, None]
            some_ptrs = stats_ptr + (some[:, None] * stride_split + row[None, :]) * 2
            partials = _load_partials(partial_ptr, some, some_used, stride_split, first_row, DV, BLOCK_DV, ROWS)
            some_fades = tl.exp2(tl.load(some_ptrs, mask=some_written, other=float("-inf")) - peak[None, :])
            if LIMITED:
                partials = tl.where(some_written[:, :, None], partials, 0.0)
            mixed += tl.sum(partials * some_fades[:, :, None], 0)
    dim = tl.arange(0, BLOCK_DV)[None, :]
    out_row = (batch * N + node) * (Hkv * G) + query_head
    stored = (first_row + tl.arange(0, ROWS) < N * G)[:, None] & (dim < DV)
    tl.store(out_ptr + out_row[:, None] * DV + dim, mixed / total[:, None], mask=stored)


def tree_attention(
    query, key, value, packed_tree, scale, sliding_window=None, chunk_size=None, softcap=None, sinks=None
):
    """See `specdec_triton.ops.tree_attention`, which checks the arguments.

    Any strides; tensors whose last dimension is not contiguous are copied.
    """
    query, key, value, packed_tree = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value, packed_tree)
    )
    sinks = None if sinks is None else sinks.contiguous()
    batch, query_heads, rows, head_dim = query.shape
    _, kv_heads, slots, value_dim = value.shape
    _, nodes, fields = packed_tree.shape
    group, device = query_heads // kv_heads, query.device
    limited = sliding_window is not None or chunk_size is not None
    shape = batch, kv_heads, group, rows, nodes, slots, head_dim, value_dim, query.element_size(), limited
    grid, split_tiles, meta, merge_meta = attention_plan(architecture(device), multiprocessors(device), *shape)
    if scale <= 0 and softcap is None:  # the kernel takes the maximum before it scales
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    inner, outer = (None, scale) if softcap is None else (scale / softcap, softcap)

    out = torch.empty((batch, rows, query_heads, value_dim), dtype=query.dtype, device=device)
    partial = stats = None
    if grid[1] > 1:
        partial = torch.empty((grid[2], grid[1], rows * group, value_dim), dtype=torch.float32, device=device)
        stats = torch.empty((grid[2], grid[1], rows * group, 2), dtype=torch.float32, device=device)
    tree_strides = packed_tree.stride()[:2]
    sizes = (kv_heads, rows, nodes, fields - 3)
    with launching_on(query):
        _tree_attention_kernel[grid](
            out if partial is None else None, partial, stats, query, key, value, packed_tree, sinks,
            inner, outer * LOG2E.value, sliding_window, chunk_size,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *tree_strides, *sizes, split_tiles,
            **meta,
        )  # fmt: skip
        if partial is not None:
            _merge_kernel[(triton.cdiv(rows * group, merge_meta["ROWS"]), batch * kv_heads)](
                out, partial, stats, packed_tree, sinks, sliding_window, chunk_size,
                *tree_strides, *sizes, grid[1], split_tiles, **merge_meta,
            )  # fmt: skip
    return out


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every configuration of tree attention for 4 query heads a group, with the features that change the code."""
    features = {"": {}, " chunk": {"chunk_size": 8192}, " window softcap": {"sliding_window": 4096, "softcap": 50.0}}
    features[" window sinks"] = {"sliding_window": 4096, "sinks": abstract(torch.bfloat16, 32)}

    def call(dtype, dim, nodes, slots, kv_heads=8, feature=""):
        query = abstract(DTYPES[dtype], 1, 4 * kv_heads, nodes, dim)
        keys = abstract(DTYPES[dtype], 1, kv_heads, slots, dim)
        tree = abstract(torch.int64, 1, nodes, triton.cdiv(nodes, WORD_BITS.value) + 3)
        return functools.partial(tree_attention, query, keys, keys, tree, dim**-0.5, **features[feature])

    shapes = [("bf16", dim, feature) for dim in (64, 128, 256, 512) for feature in features]
    shapes += [("bf16", 80, ""), ("bf16", 192, ""), ("fp16", 128, "")]
    shapes += [("fp32", dim, feature) for dim in (64, 128, 256) for feature in ("", " window softcap")]
    for (dtype, dim, feature), one_split in itertools.product(shapes, (True, False)):
        if one_split and feature not in ("", " window sinks"):
            continue
        itemsize = DTYPES[dtype].itemsize
        chosen = {}  # the least rows of each configuration
        for rows in (16, 32, 64, 128, 512, 1024):
            chosen.setdefault(attention_config(arch, rows, dim, itemsize, one_split, feature != ""), rows)
        for config, rows in chosen.items():
            name = f"{dtype} d{dim} m{config.block_m} n{config.block_n} {'one' if one_split else 'split'}{feature}"
            width, cores = 2 * pow2(dim), dtype != "fp32"
            yield CompileCase(
                name,
                _tree_attention_kernel,
                call(dtype, dim, rows // 4, SHORT_SLOTS if one_split else 8192, feature=feature),
                tensor_cores=cores,
                tile_bytes=config.block_n * width * itemsize,
                tile_flops=2 * config.block_m * config.block_n * width if cores else 0,
            )
    merges = [(dim, splits, "") for dim in (64, 128, 256, 512) for splits in (16, 64)]
    for dim, splits, feature in [*merges, (128, 16, " window sinks"), (256, 64, " window sinks")]:
        yield CompileCase(
            f"merge d{dim} p{splits}{feature}",
            _merge_kernel,
            # the fewer KV heads, the more splits fill the card
            call("bf16", dim, 4, 8000, 8 if splits == 16 else 2, feature),
            tile_bytes=MERGE_SPLITS * MERGE_ROWS * (dim + 1) * 4,
        )
