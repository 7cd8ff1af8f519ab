"""Integer keys that have the same order as values, in Triton.

A key is an int64 that encodes a value and its token id. The highest key has the highest value and, among equal values,
the lowest id. Bits 32-63 are the *order*: the bits of the fp32 value, rearranged so that integers have the same order
as the floats, with NaN above all. Bit 31 is free. Bits 0-30 are MAX_ID - token id.
"""

import triton
import triton.language as tl

MAX_ID: tl.constexpr = tl.constexpr(2**31 - 1)
NAN_ORDER: tl.constexpr = tl.constexpr(2**31 - 1)  # only a NaN has these bits
NO_ORDER: tl.constexpr = tl.constexpr(-(2**31))  # below the order of every number
NO_KEY: tl.constexpr = tl.constexpr(-(2**63))
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def order_of(values):
    """fp32 -> int32 with the same order; -0.0 and 0.0 are equal."""
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
    return token_id  # assigned first, because the interpreter would return a constexpr


@triton.jit
def highest_logit(logits, first_id, BLOCK_V: tl.constexpr):
    """The key of the highest logit of a tile, with NaN above all, and the highest logit, which is undefined if there is
    a NaN."""
    lane = tl.arange(0, BLOCK_V)
    peak = tl.max(logits, 0)
    # The lowest lane that holds the maximum. If all logits are -inf, it is before the masked tail. NaN lanes are
    # numbered from -BLOCK_V, so they come before all others, whatever the result of max.
    lead = tl.min(tl.where(logits != logits, lane - BLOCK_V, tl.where(logits == peak, lane, BLOCK_V)), 0)
    is_nan = lead < 0
    order = tl.where(is_nan, NAN_ORDER, order_of(peak))
    return key_of(order, first_id + tl.where(is_nan, lead + BLOCK_V, lead)), peak


@triton.jit
def highest_score(scores, first_id, V, BLOCK_V: tl.constexpr):
    """The key of the highest score of a tile. With NaN, the key is undefined, but its id is below V."""
    lane = tl.arange(0, BLOCK_V)
    best = tl.max(scores, 0)
    place = tl.min(tl.where(scores == best, lane, BLOCK_V), 0)
    return key_of(order_of(best), tl.minimum(first_id + place, V - 1))
