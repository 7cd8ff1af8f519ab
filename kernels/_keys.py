"""Keys that order as values do, in Triton.

A key, int64, stands for a value and its token id. The highest key is that of the highest value, and of equal values
that of the lowest id. Bits 32-63 are the *order*: the fp32 value's bits, rearranged so that integers order as the
floats do, NaN above all. Bit 31 is free. Bits 0-30 are MAX_ID - token id.
"""

import triton
import triton.language as tl

MAX_ID: tl.constexpr = tl.constexpr(2**31 - 1)
NAN_ORDER: tl.constexpr = tl.constexpr(2**31 - 1)  # of all fp32 values only a NaN has these bits
NO_KEY: tl.constexpr = tl.constexpr(-(2**63))
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def order_of(values):
    """fp32 -> int32 that orders the same way; -0.0 and 0.0 are one."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(order):
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def key_of(order, token_id):
    return (order.to(tl.int64) << 32) | (MAX_ID - token_id)


@triton.jit
def order_in(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def id_in(key):
    token_id = MAX_ID - (key & MAX_ID).to(tl.int32)
    return token_id  # assigned first: the interpreter would return a constexpr


@triton.jit
def highest_logit(logits, first_id, BLOCK_V: tl.constexpr):
    """The key of the highest logit of a tile, NaN above all, and the highest logit (any value if there is a NaN)."""
    lane = tl.arange(0, BLOCK_V)
    peak = tl.max(logits, 0)
    # the lowest lane that holds the maximum (if all are -inf, one before the masked tail); NaN lanes count from
    # -BLOCK_V, so they come before any other, whatever max made of them
    lead = tl.min(tl.where(logits != logits, lane - BLOCK_V, tl.where(logits == peak, lane, BLOCK_V)), 0)
    is_nan = lead < 0
    order = tl.where(is_nan, NAN_ORDER, order_of(peak))
    return key_of(order, first_id + tl.where(is_nan, lead + BLOCK_V, lead)), peak


@triton.jit
def highest_score(scores, first_id, V, BLOCK_V: tl.constexpr):
    """The key of the highest score of a tile. NaN gives some key of an id below V."""
    lane = tl.arange(0, BLOCK_V)
    best = tl.max(scores, 0)
    place = tl.min(tl.where(scores == best, lane, BLOCK_V), 0)
    return key_of(order_of(best), tl.minimum(first_id + place, V - 1))
