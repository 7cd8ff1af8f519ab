"""Attention of draft-tree nodes over the text before the tree (the prefix) and over their own ancestors.

Letters: B sequences, N query rows (the last N of T tree nodes), W = ceil(T/64) ancestor words, Hq/Hkv query/key-value
heads, G = Hq/Hkv query heads per key-value head, S cache slots, D head dim of keys, Dv of values, P splits.

A program handles one KV head, a tile of the G * N (node, head) rows that use it, and one split of the keys. A tile of
keys and values is therefore read once for up to 128 rows. Keys are processed in tiles of BLOCK_N slots. The prefix
comes first, counted from the sequence's start; then the tree, counted from its first slot, so that a tree tile needs
one ancestor word per row. A split is a fixed number of tiles. If the whole capacity fits in one split, a single launch
writes the output. Otherwise a second kernel merges the splits in index order. Lengths are read on the device: the grid
covers the capacity, and programs of empty splits return at once.

With a given plan, the result of a row depends only on its own start, length and path. A tile or split in which the row
sees nothing does not change any bit of its result, whatever other rows, nodes and sequences there are. The plan depends
on the capacity, the number of row tiles, and the batch bucket: the power of two >= B. Inside a bucket, the bits of a
row are therefore the same in every batch. In another bucket, the keys may be split at other places, which changes the
rounding of sums.

Each row masks its scores, but all rows of a tile use the same values, and 0 * NaN is NaN. If some row does not see the
whole tile, values that are not finite are therefore read as 0, and rows that see such a slot get a score of NaN.

Reference: `specdec_triton.ops.reference.tree_attention`.
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
    """The configuration of tree attention for a shape: one entry of the tables below."""

    block_m: int  # rows per program
    block_n: int  # slots per tile
    num_warps: int
    num_stages: int
    programs: int  # largest number of programs planned per multiprocessor; 2 if 2 fit by the compile report
    most_rows: int = 0  # the entry is used for up to this many rows; 0: for one row tile


# (bytes per element, head dim) -> entries, narrowest first; the last entry is also used for more rows. The largest head
# dims are those of `ops.MAX_HEAD_DIMS`. Timed on an H200 with Triton 3.6, 2026-11-28 (bench/tune_tree_attention.py):
# head dim 128 in bf16 with 4, 64, 128, 256 and 512 rows in several splits. The other entries were chosen by compile
# reports only.
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
# The entries for cases in which those above spill (before sm_90, and with a window or chunks) or need more shared
# memory than sm_120 has. None of these was timed.
_ATTENTION_TIGHT = _ATTENTION | {
    (2, 64): (_ATTENTION[2, 64][0], (32, 32, 4, 3, 2), (64, 32, 4, 3, 2), _ATTENTION[2, 64][3]),
    (2, 128): (*_ATTENTION[2, 128][:2], (64, 32, 8, 3, 2), (128, 32, 8, 3, 1)),
    (2, 256): (*_ATTENTION[2, 256][:2], (64, 16, 8, 2, 1)),
    (4, 256): ((16, 16, 8, 2, 2),),
}


def attention_config(arch: int, rows: int, head_dim: int, bytes: int, narrow: bool, limited: bool) -> AttentionConfig:
    """The configuration for a shape.

    Args:
        arch: compute capability times 10.
        rows: N * G.
        head_dim: the larger one of D and Dv.
        bytes: bytes per element.
        narrow: True for the narrowest row tiles.
        limited: True if a window or chunks limit the keys that a row sees.
    """
    table = _ATTENTION_TIGHT if limited or not 90 <= arch < 120 else _ATTENTION
    configs = [AttentionConfig(*entry) for entry in table[bytes, max(pow2(head_dim), 64)]]
    if narrow:
        return configs[0]
    return next((config for config in configs if max(config.block_m, config.most_rows) >= rows), configs[-1])


def one_split_config(config: AttentionConfig, head_dim: int, bytes: int) -> AttentionConfig:
    """The configuration if the keys are one split. With tiles of 32 slots, the widest heads would spill."""
    spills = bytes == 2 and pow2(head_dim) == 256 and config.block_m == 64
    return config._replace(block_n=16) if spills else config


# A capacity of up to this many slots, without the tree's own, is one split: a prefix of 256 slots in a cache that is
# rounded up to a multiple of 128. Longer ones are one split if that is estimated to be faster.
SHORT_SLOTS = 256 + 127
# In a short capacity, up to this many rows use the narrowest row tiles, as long as each of their programs has a
# multiprocessor of its own. On an H200 with one split of 512 slots, 32 rows took 12.8 us in tiles of 16 and 15.7 us in
# one of 32. 128 rows took 12.3 us in tiles of 64 and 15.4 us in tiles of 32; in a batch of 16, 18.6 and 39.2 us.
NARROW_ROWS = 64
# A split has at least MIN_SPLIT_SLOTS slots, and at least MIN_SPLIT_ROWS times as many slots as a row tile has rows.
# With D = Dv and two bytes per element, the partial results of a program, written and read once, then take at most half
# as much traffic as its keys and values.
MIN_SPLIT_SLOTS = 128
MIN_SPLIT_ROWS = 4
MAX_WAVES = 4  # plans with up to this many waves are compared
# Estimated times, in units of the time that a program alone on its multiprocessor takes for a tile. They were fitted to
# 46 sizes of bench/tune_tree_attention.py --splits on an H200 (Triton 3.6, 2026-11-28). Any SHARED_TILE from 1.2 to 1.4
# gives the same mean. The constants are ratios of times, so other cards use them too.
SHARED_TILE = 1.3  # a tile of each of two programs on the same multiprocessor
MERGE_PASS = 3  # merging MERGE_SPLITS splits, apart from the traffic of partial results
MERGE_TRAFFIC = 1.5  # writing and reading partial results of as many bytes as a tile of keys and values
MERGE_SPLITS = 16  # number of splits merged at a time
MERGE_ROWS = 4  # rows per program of the merge; the same for every shape, so that sums do not depend on the row count


@functools.lru_cache(maxsize=1024)
def attention_plan(
    arch, multiprocessors, batch, kv_heads, group, rows, nodes, slots, head_dim, value_dim, bytes, limited
):
    """The launch plan of a shape.

    It depends on shapes and on the device, never on lengths. The size of a split depends on the capacity, the number of
    row tiles and KV heads, and the batch bucket, which is the power of two >= B. It depends on N only through the
    configuration and the number of row tiles, and on T only through the choice of a single split for small capacities.

    Returns:
        The grid (row tiles, splits, sequences * KV heads), the number of tiles per split, and the compile-time
        arguments of tree attention and of its merge.
    """
    bucket = pow2(batch)
    short = slots - nodes <= SHORT_SLOTS
    narrow_programs = bucket * kv_heads * triton.cdiv(rows * group, 16)
    narrow = short and rows * group <= NARROW_ROWS and narrow_programs <= multiprocessors
    config = attention_config(arch, rows * group, max(head_dim, value_dim), bytes, narrow, limited)
    block_m, block_n, num_warps, num_stages, programs, _ = config
    row_tiles = triton.cdiv(rows * group, block_m)
    tiles = triton.cdiv(slots, block_n) + 1  # largest number of tiles that prefix and tree may take
    split_tiles = tiles
    if not short:
        least = max(MIN_SPLIT_ROWS * block_m, MIN_SPLIT_SLOTS) // block_n
        traffic = 2 * block_m * value_dim * 4 / (block_n * (head_dim + value_dim) * bytes)
        # A program of 64 rows takes its tiles faster than memory gives them, unless others read the same ones. Two then
        # gain nothing: on an H200, N = 16 at 32768 slots took 41 us in 16 splits and 44 us in 33.
        at_a_time = 1 if row_tiles == 1 and block_m >= 64 else programs
        split_tiles = _split_tiles(tiles, least, bucket * kv_heads * row_tiles, multiprocessors, at_a_time, traffic)
    splits = triton.cdiv(triton.cdiv(slots - nodes, block_n) + triton.cdiv(nodes, block_n), split_tiles)
    if splits == 1:
        block_n = one_split_config(config, max(head_dim, value_dim), bytes).block_n
        split_tiles = triton.cdiv(slots, block_n) + 1
    shared = {"G": group, "DV": value_dim, "BLOCK_N": block_n, "BLOCK_DV": max(pow2(value_dim), 16), **FP_FUSION}
    blocks = {"D": head_dim, "BLOCK_M": block_m, "BLOCK_D": max(pow2(head_dim), 16)}
    meta = shared | blocks | _attention_options(block_m, blocks["BLOCK_D"], bytes, num_warps, num_stages)
    merge_meta = shared | _merge_blocks(splits, shared["BLOCK_DV"])
    return (row_tiles, splits, batch * kv_heads), split_tiles, meta, merge_meta


def _split_tiles(
    tiles: int, least: int, programs_a_split: int, multiprocessors: int, at_a_time: int, traffic: float
) -> int:
    """Number of tiles per split with the smallest estimated time for sequences at full capacity.

    Args:
        tiles: of the capacity.
        least: smallest number of tiles per split.
        programs_a_split: row tiles * KV heads * sequences.
        multiprocessors: of the GPU.
        at_a_time: programs on a multiprocessor, 1 or 2.
        traffic: bytes of a program's partial results, written and read, divided by those of a tile.
    """

    def time(size):
        splits = triton.cdiv(tiles, size)
        programs = programs_a_split * splits
        together, alone = divmod(triton.cdiv(programs, multiprocessors), at_a_time)
        waves = together * (SHARED_TILE if at_a_time > 1 else 1) + alone
        if splits == 1:
            return waves * size
        merge = MERGE_PASS * triton.cdiv(splits, MERGE_SPLITS) + MERGE_TRAFFIC * traffic * programs / multiprocessors
        return waves * size + merge

    most = max(MAX_WAVES * multiprocessors * at_a_time // programs_a_split, 1)
    sizes = {min(max(triton.cdiv(tiles, splits), least), tiles) for splits in range(1, min(most, tiles) + 1)}
    return min(sorted(sizes, reverse=True), key=time)  # of equal times, the fewest splits


def _attention_options(block_m: int, block_d: int, bytes: int, num_warps: int, num_stages: int) -> dict[str, int]:
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if bytes == 4:  # fp32 spills more if it may use more registers
        return options
    # Without a limit, the compiler uses 128 or 168 registers and spills one or two. The narrowest tiles need at most
    # 168, so that three programs fit on a multiprocessor.
    return options | {"maxnreg": 168 if block_m * block_d <= 1024 else 255}


def _merge_blocks(splits: int, block_dv: int) -> dict[str, int]:
    # a thread loads 128 bits of each split
    warps = max(MERGE_ROWS * block_dv // 128, 1)
    blocks = {"ROWS": MERGE_ROWS, "BLOCK_P": max(pow2(splits), MERGE_SPLITS), "MERGE_P": MERGE_SPLITS}
    # without a limit, the compiler uses 128 registers, and spilled two with a window
    return blocks | {"num_warps": warps, "maxnreg": min(168, 2048 // warps)}


@triton.jit
def _sequence(tree_ptr, W, T, BLOCK_N: tl.constexpr):
    """Start and length of a sequence in slots, and the numbers of tiles of its prefix and its tree."""
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
    """[BLOCK_M, BLOCK_DIM]: the rows at `row_ptr` [BLOCK_M], padded with zeros after column DIM."""
    dim = tl.arange(0, BLOCK_DIM)
    return tl.load(row_ptr[:, None] + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def _load_tile(ptr, slot, stride_slot, used, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[BLOCK_N, BLOCK_DIM]: keys or values from `slot` on. Slots for which `used` [BLOCK_N] is False are 0; None means
    that all slots are used."""
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
    """A tile of values [BLOCK_N, BLOCK_DIM], in which slots with values that are not finite are 0; and [BLOCK_N] bool,
    True for slots whose values are all finite."""
    values = _load_tile(ptr, slot, stride_slot, used, DIM, BLOCK_N, BLOCK_DIM)
    finite = tl.min((tl.abs(values.to(tl.float32)) < float("inf")).to(tl.int32), 1) > 0
    if values.dtype == tl.float32:  # takes twice the registers, so it is read again instead of kept (compile report)
        values = _load_tile(ptr, slot, stride_slot, finite if used is None else used & finite, DIM, BLOCK_N, BLOCK_DIM)
    else:
        values = tl.where(finite[:, None], values, 0.0)
    return values, finite


@triton.jit
def _attend(query, keys, values, visible, finite, mixed, peak, total, inner, outer):
    """One step of the online softmax: `mixed`, `peak` and `total` after a tile.

    Args:
        visible: [BLOCK_M, BLOCK_N] bool. True for slots that a row sees. None: every row sees all slots.
        finite: [BLOCK_N] bool. False for slots whose values were replaced by 0. None if `visible` is None.
    """
    if INTERPRETED:
        query, keys = query.to(tl.float32), keys.to(tl.float32)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if inner is not None:
        # tanh; if the exponential overflows, the result is 1
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E * inner)))
    if visible is None:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * outer)
        base = new_peak
    else:
        scores = tl.where(visible, tl.where(finite[None, :], scores, float("nan")), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * outer)
        # for a row that has seen no slot yet, the peak is -inf, and -inf - -inf would be NaN
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
    partial_ptr,  # [B, Hkv, P, N * G, Dv] fp32, out: weighted sums of values; None if there is one split
    stats_ptr,  # [B, Hkv, P, N * G, 2] fp32, out: peak (base 2) and sum of weights; None if there is one split
    query_ptr,  # [B, Hq, N, D] fp32, bf16 or fp16
    key_ptr,  # [B, Hkv, S, D] query's dtype
    value_ptr,  # [B, Hkv, S, Dv] query's dtype
    tree_ptr,  # [B, T, W + 3] int64: ancestor words, depth, start, length
    sinks_ptr,  # [Hq] float, or None
    inner,  # with softcap: scores are tanh(inner * query @ key); None without
    outer,  # positive; the exponent of 2 is outer * scores
    window,  # sliding window in positions, or None
    chunk,  # chunk size in positions, or None
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_tb, stride_tn,
    Hkv, N, T, W,
    split_tiles,  # tiles per split
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows per program
    BLOCK_N: tl.constexpr,  # slots per tile; divides 64
    BLOCK_D: tl.constexpr,  # powers of two >= D, Dv
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    batch = (tl.program_id(2) // Hkv).to(tl.int64)
    head = tl.program_id(2) % Hkv

    # rows after the last one repeat the last node; they are not stored
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node = tl.minimum(row // G, N - 1)
    query_head = head * G + row % G
    row_query_ptr = query_ptr + batch * stride_qb + query_head * stride_qh + node * stride_qn  # [BLOCK_M]
    # The query is loaded first, so that its latency overlaps with that of the lengths. In fp32 this would spill
    # (compile report).
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

    # Tiles of the prefix that some rows see only in part. There are few, so they are not prefetched, which saves
    # registers.
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

    # The last, partial tile of the prefix, and the tree. For each row, the bits of a word give the visible slots of a
    # tile. In fp32, products without tensor cores take more registers if nothing is prefetched (compile report).
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
    """[splits, ROWS, BLOCK_DV]: weighted sums of values from `row` on; 0 in splits whose `used` [splits] is False."""
    # read as [splits, ROWS * BLOCK_DV], so that in all versions of Triton a thread has the same place in every split
    column = tl.arange(0, ROWS * BLOCK_DV)
    dim = column % BLOCK_DV
    # rows after the last one repeat it
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
    ROWS: tl.constexpr,  # rows per program
    BLOCK_N: tl.constexpr,  # as in the first kernel
    BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr,  # power of two >= P
    MERGE_P: tl.constexpr,  # splits merged at a time; power of two, at most BLOCK_P
):  # fmt: skip
    batch = (tl.program_id(1) // Hkv).to(tl.int64)
    # rows after the last one repeat it; they are not stored
    first_row = tl.program_id(0) * ROWS
    row = tl.minimum(first_row + tl.arange(0, ROWS), N * G - 1)
    node = row // G
    query_head = (tl.program_id(1) % Hkv) * G + row % G

    # loaded before the lengths are known; the values of splits that were not written are undefined
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
        # The first kernel skipped splits before the first position that any row of its tile sees. Here each row uses
        # the splits from its own first position on.
        depth = tl.load(tree_ptr + (T - N + node) * stride_tn + W).to(tl.int32)
        first = _first_position(length - start + depth, window, chunk)
        begin = tl.minimum(first // BLOCK_N, prefix_tiles) // split_tiles
        least = tl.min(begin, 0)
    if ONE_PASS:  # only written splits are loaded; with short texts in a long cache, most splits are not written
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
        # Whole passes, from the first split that any row of this program uses. Splits before a row's first one add 0.
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

    Tensors may have any strides; those whose last dimension is not contiguous are copied.
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
    if scale <= 0 and softcap is None:  # the kernel takes the maximum before scaling, which needs a positive scale
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
    """Every configuration of tree attention for 4 query heads per KV head, with the features that change the code."""
    features = {"": {}, " chunk": {"chunk_size": 8192}, " window softcap": {"sliding_window": 4096, "softcap": 50.0}}
    features[" window sinks"] = {"sliding_window": 4096, "sinks": abstract(torch.bfloat16, 32)}

    def call(dtype, dim, nodes, slots, kv_heads=8, feature="", batch=1):
        query = abstract(DTYPES[dtype], batch, 4 * kv_heads, nodes, dim)
        keys = abstract(DTYPES[dtype], batch, kv_heads, slots, dim)
        tree = abstract(torch.int64, batch, nodes, triton.cdiv(nodes, WORD_BITS.value) + 3)
        return functools.partial(tree_attention, query, keys, keys, tree, dim**-0.5, **features[feature])

    shapes = [("bf16", dim, feature) for dim in (64, 128, 256, 512) for feature in features]
    shapes += [("bf16", 80, ""), ("bf16", 192, ""), ("fp16", 128, "")]
    shapes += [("fp32", dim, feature) for dim in (64, 128, 256) for feature in ("", " window softcap")]
    for (dtype, dim, feature), one_split in itertools.product(shapes, (True, False)):
        if one_split and feature not in ("", " window sinks"):
            continue
        itemsize = DTYPES[dtype].itemsize
        chosen = {}  # configuration -> smallest number of rows that uses it
        for rows in (16, 32, 64, 128, 512, 1024):
            chosen.setdefault(attention_config(arch, rows, dim, itemsize, False, feature != ""), rows)
        for config, rows in chosen.items():
            if one_split:
                config = one_split_config(config, dim, itemsize)
            name = f"{dtype} d{dim} m{config.block_m} n{config.block_n} {'one' if one_split else 'split'}{feature}"
            width, cores = 2 * pow2(dim), dtype != "fp32"
            yield CompileCase(
                name,
                _tree_attention_kernel,
                # in a large batch, the keys are one split
                call(dtype, dim, rows // 4, 8192, feature=feature, batch=1024 if one_split else 1),
                tensor_cores=cores,
                tile_bytes=config.block_n * width * itemsize,
                tile_flops=2 * config.block_m * config.block_n * width if cores else 0,
            )
    merges = [(dim, splits, "") for dim in (64, 128, 256, 512) for splits in (16, 64)]
    for dim, splits, feature in [*merges, (128, 16, " window sinks"), (256, 64, " window sinks")]:
        yield CompileCase(
            f"merge d{dim} p{splits}{feature}",
            _merge_kernel,
            # with fewer KV heads, the plan has more splits
            call("bf16", dim, 4, 8000, 8 if splits == 16 else 2, feature),
            tile_bytes=MERGE_SPLITS * MERGE_ROWS * (dim + 1) * 4,
        )
