"""Rows of logits and their statistics, in Triton. The first launch of sampled acceptance reads each tile once.

Letters: B sequences, N tree nodes, P expanded nodes, V vocabulary, S = ceil(V / BLOCK_V) tiles.
"""

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl

from ._keys import NEG_INF, highest_logit, order_in, value_of
from ._launch import COUNTS, FP_FUSION

# All launches of sampled acceptance use one tile size, so that a row's result depends only on its own logits.
BLOCK_V = 2048
NUM_WARPS = 4
# Without a limit, the compiler uses up to 215 registers. With 128, four programs fit on a multiprocessor. If V or a
# stride permits only narrow loads, 128 registers spill.
STATISTICS_REGISTERS, NARROW_REGISTERS = 128, 168
# Options of launches with one program per row. Without a limit, the compiler uses 128 registers and spills one or two.
ROW_OPTIONS = {"num_warps": 8, "maxnreg": 168, **FP_FUSION}
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)  # smallest normal fp32 number; GPUs may flush smaller ones to 0


# kernel argument: [B, N, V] fp32, bf16 or fp16
Logits = namedtuple("Logits", "ptr stride_b stride_n stride_v")
# one row of logits
Row = namedtuple("Row", "ptr stride_v V")
# Kernel argument with values for each tile of V. keys: [B, N + P, S] int64, key of the highest logit. sums:
# [B, N + P, S] fp32, sum of exp((logit - highest logit) / temperature). noisy: [B, N + P, S] int64 or None, key of the
# highest noisy score, see `tile_scores`.
Statistics = namedtuple("Statistics", "keys sums noisy", defaults=(None,))


@triton.jit
def row_of(logits, batch, node, V):
    return Row(logits.ptr + batch * logits.stride_b + node.to(tl.int64) * logits.stride_n, logits.stride_v, V)


@triton.jit
def load_raw(row, ids):
    """A tile of logits in their own dtype. Lanes after the vocabulary get -inf, which means probability 0."""
    return tl.load(row.ptr + ids.to(tl.int64) * row.stride_v, mask=ids < row.V, other=NEG_INF)


@triton.jit
def load_logits(row, ids):
    return load_raw(row, ids).to(tl.float32)


@triton.jit
def load_inverse_temperature(temperature_ptr, batch):
    """1 / temperature (1 if the temperature is 0), and True if the temperature is 0."""
    inverse, greedy = tl.full((), 1.0, tl.float32), tl.full((), 0, tl.int1)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + batch)
        greedy = temperature == 0
        # neither inf nor 0, because inf times a difference of 0, and 0 times -inf, are NaN
        inverse = tl.minimum(tl.maximum(1.0 / tl.where(greedy, 1.0, temperature), SMALLEST), LARGEST)
    return inverse, greedy


@triton.jit
def tile_scores(logits, inverse_temperature, first_id, BLOCK_V: tl.constexpr):
    """The highest key of a tile, and its scores: differences from its highest logit, divided by the temperature."""
    key, peak = highest_logit(logits, first_id, BLOCK_V)
    # differences from the tile's highest logit are accurate even if the logits are large
    return key, tl.where(logits == NEG_INF, NEG_INF, (logits - peak) * inverse_temperature)


@triton.jit
def row_scores(noisy, peaks, peak, inverse_temperature):
    """The noisy scores of tiles, converted to be relative to the row's highest logit `peak` instead of the tiles'
    highest logits `peaks`.

    A row of -inf is invalid. Its scores must not become NaN, because NaN has no order.
    """
    return tl.where(peaks == NEG_INF, NEG_INF, value_of(order_in(noisy)) + (peaks - peak) * inverse_temperature)


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    statistics,  # Statistics, out
    logits,  # Logits [B, N, V]
    draft_logits,  # Logits [B, P, V], or None if P is 0
    temperature_ptr,  # [B] fp32, or None
    draft_temperature_ptr,
    N, P, V, S,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first_id = tile * BLOCK_V
    ids = first_id + tl.arange(0, BLOCK_V)
    out = (batch * (N + P) + row) * S + tile
    inverse, _ = load_inverse_temperature(temperature_ptr, batch)
    if draft_logits is None:
        values = load_logits(row_of(logits, batch, row, V), ids)
    else:
        values = tl.full([BLOCK_V], NEG_INF, tl.float32)
        if row >= N:
            values = load_logits(row_of(draft_logits, batch, row - N, V), ids)
            inverse, _ = load_inverse_temperature(draft_temperature_ptr, batch)
        else:
            values = load_logits(row_of(logits, batch, row, V), ids)
    key, scores = tile_scores(values, inverse, first_id, BLOCK_V)
    tl.store(statistics.keys + out, key)
    tl.store(statistics.sums + out, tl.sum(tl.exp(scores), 0))


def logits_argument(logits: torch.Tensor | None) -> Logits | None:
    """The kernel argument for logits [B, N, V]."""
    return None if logits is None else Logits(logits, *logits.stride())


def row_statistics(logits, temperature, draft_logits=None, draft_temperature=None) -> Statistics:
    """Launch `statistics_kernel` for logits [B, N, V] and, if given, draft logits [B, P, V]."""
    batch, nodes, vocab = logits.shape
    expanded, tiles = 0 if draft_logits is None else draft_logits.shape[1], triton.cdiv(vocab, BLOCK_V)
    shape = batch, nodes + expanded, tiles
    statistics = Statistics(logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32))
    statistics_kernel[tiles, nodes + expanded, batch](
        statistics, logits_argument(logits), logits_argument(draft_logits), temperature, draft_temperature,
        nodes, expanded, vocab, tiles, BLOCK_V=BLOCK_V, **statistics_options(logits),
    )  # fmt: skip
    return statistics


def statistics_options(logits: torch.Tensor) -> dict[str, Any]:
    """Options of launches that load logits once. Fewer registers are used if Triton can use 128-bit loads."""
    multiples = logits.shape[2], *logits.stride()[:2], logits.data_ptr()
    is_wide = logits.stride(2) == 1 and all(number % 16 == 0 for number in multiples)
    return {"num_warps": NUM_WARPS, "maxnreg": STATISTICS_REGISTERS if is_wide else NARROW_REGISTERS, **FP_FUSION}
