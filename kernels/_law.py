"""A row of logits as probabilities: temperature, top-k, top-p and min-p, in Triton.

What a row's filters come to is six numbers, its *law*, and a token's log-probability follows from its logit and them:

    peak       fp32, the highest logit
    log_sum    fp32, log of the sum of exp((logit - peak) / temperature) over what is kept; NaN: no distribution
    threshold  fp32, logits above it are kept
    inverse    fp32, 1 / temperature
    first      int32, of the logits equal to the threshold those of this id and above are kept
    certain    int32, the one token of a greedy row (temperature 0), else -1

Thresholds are found on integer keys that order as the logits do, with integer counts (top-k) and masses in fixed point
(top-p): sums of integers do not depend on their order. Reference: `specdec_triton.ops.filters`.
"""

import triton
import triton.language as tl

from ._common import MAX_ID, NAN_ORDER, NO_KEY

FIXED_ONE: tl.constexpr = tl.constexpr(2.0**40)  # the likeliest token's mass; less than 2^-40 of it counts as none
NO_MASS: tl.constexpr = tl.constexpr(28.0)  # exp(-28) < 2^-40
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)  # of those that no GPU takes for 0
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
def value_of_shifted(shifted, SHIFT: tl.constexpr):
    """The value of which `order_of(value) >> SHIFT` is `shifted`, of a dtype that has one: see SHIFT in `law_of`.

    The bits that the shift dropped are zeros in the orders of positive values, and ones in those of negative values.
    """
    order = shifted << SHIFT
    return value_of(tl.where(shifted < 0, order | ((1 << SHIFT) - 1), order))


@triton.jit
def key_of(order, token_id):
    """int64: the order in bits 32-63, then the lower id first. Bit 31 is free."""
    return (order.to(tl.int64) << 32) | (MAX_ID - token_id)


@triton.jit
def order_in(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def id_in(key):
    return MAX_ID - (key & MAX_ID).to(tl.int32)


@triton.jit
def highest(scores, first, V, BLOCK_V: tl.constexpr):
    """The key of the highest score of a tile, the lowest id of equals. NaN gives some key of an id below V."""
    lane = tl.arange(0, BLOCK_V)
    best = tl.max(scores, 0)
    place = tl.min(tl.where(scores == best, lane, BLOCK_V), 0)
    return key_of(order_of(best), tl.minimum(first + place, V - 1))


@triton.jit
def load_raw(row_ptr, stride_v, ids, V):
    """In the dtype of the logits; -inf beyond the vocabulary: probability 0."""
    return tl.load(row_ptr + ids.to(tl.int64) * stride_v, mask=ids < V, other=NEG_INF)


@triton.jit
def load_logits(row_ptr, stride_v, ids, V):
    return load_raw(row_ptr, stride_v, ids, V).to(tl.float32)


@triton.jit
def inverse_temperature(temperature_ptr, row):
    """1 / temperature (1 where that is 0), and whether it is 0."""
    inverse, greedy = tl.full((), 1.0, tl.float32), tl.full((), 0, tl.int1)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        greedy = temperature == 0
        # neither inf nor 0: times -inf or a difference of 0, those are NaN
        inverse = tl.minimum(tl.maximum(1.0 / tl.where(greedy, 1.0, temperature), SMALLEST), LARGEST)
    return inverse, greedy


@triton.jit
def log_probs(logits, ids, law):
    """Of tokens `ids` (a tile or a number): -inf for what is filtered out; NaN where there is no distribution."""
    peak, log_sum, threshold, inverse, first, certain = law
    kept = (logits > threshold) | ((logits == threshold) & (ids >= first))
    found = tl.where(kept | ((log_sum == log_sum) == 0), (logits - peak) * inverse - log_sum, NEG_INF)
    return tl.where(certain >= 0, tl.where(ids == certain, 0.0, NEG_INF), found)


@triton.jit
def store_law(floats_ptr, ints_ptr, index, law):
    peak, log_sum, threshold, inverse, first, certain = law
    tl.store(floats_ptr + 4 * index, peak)
    tl.store(floats_ptr + 4 * index + 1, log_sum)
    tl.store(floats_ptr + 4 * index + 2, threshold)
    tl.store(floats_ptr + 4 * index + 3, inverse)
    tl.store(ints_ptr + 2 * index, first)
    tl.store(ints_ptr + 2 * index + 1, certain)


@triton.jit
def load_law(floats_ptr, ints_ptr, index):
    peak = tl.load(floats_ptr + 4 * index)
    log_sum = tl.load(floats_ptr + 4 * index + 1)
    threshold = tl.load(floats_ptr + 4 * index + 2)
    inverse = tl.load(floats_ptr + 4 * index + 3)
    first = tl.load(ints_ptr + 2 * index)
    certain = tl.load(ints_ptr + 2 * index + 1)
    return peak, log_sum, threshold, inverse, first, certain


@triton.jit
def law_of(
    row_ptr,  # [V] fp32, bf16 or fp16, with stride_v
    keys_ptr,  # [S] int64: the highest key of each tile
    sums_ptr,  # [S] fp32: the sum of exp((logit - tile's highest) / temperature)
    row,
    stride_v,
    V,
    S,
    temperature_ptr,  # [B] fp32, or None; so are the others
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    SHIFT: tl.constexpr,  # low bits that no two orders of the dtype's values differ in alone
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row's law, and whether its logits have a NaN, +inf or nothing but -inf."""
    tile = tl.arange(0, BLOCK_S)
    keys = tl.load(keys_ptr + tile, mask=tile < S, other=NO_KEY)
    key = tl.max(keys, 0)
    peak = value_of(order_in(key))
    bad = (order_in(key) == NAN_ORDER) | (tl.abs(peak) == float("inf"))
    inverse, greedy = inverse_temperature(temperature_ptr, row)
    certain = tl.where(greedy, id_in(key), -1)
    threshold, first = tl.full((), NEG_INF, tl.float32), tl.full((), MAX_ID, tl.int32)
    log_sum = tl.where(greedy & (bad == 0), 0.0, float("nan"))

    if top_k_ptr is None and top_p_ptr is None and min_p_ptr is None:
        if not (bad | greedy):
            sums = tl.load(sums_ptr + tile, mask=tile < S, other=0.0)
            peaks = tl.where(tile < S, value_of(order_in(keys)), NEG_INF)
            log_sum = tl.log(tl.sum(sums * tl.exp((peaks - peak) * inverse), 0))
    elif not (bad | greedy):
        lowest = tl.min(tl.where(tile < S, keys, key), 0)  # of the tiles' highest
        if top_k_ptr is not None:
            kept = tl.load(top_k_ptr + row)
            if (kept > 0) & (kept < V):
                # each tile has one logit as high as the lowest of their maxima
                floor = tl.where(kept <= S, order_in(lowest) >> SHIFT, order_of(NEG_INF) >> SHIFT)
                found, _ = _highest_order(
                    row_ptr, stride_v, V, floor, order_in(key) >> SHIFT, kept, kept * 0, floor, peak, inverse,
                    False, SHIFT, BLOCK_V,
                )  # fmt: skip
                threshold = value_of_shifted(found, SHIFT)
                first = 0
        if top_p_ptr is not None:
            top_p = tl.load(top_p_ptr + row)
            if top_p < 1:
                # whatever lies lower has no mass in fixed point
                floor = order_of(tl.maximum(peak - NO_MASS / inverse, threshold)) >> SHIFT
                whole = _mass_from(row_ptr, stride_v, V, floor, peak, inverse, SHIFT, BLOCK_V)
                dropped = ((1 - top_p).to(tl.float32).to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
                dropped = tl.minimum(dropped, whole - 1)  # the likeliest stays, whatever top_p is
                found, from_here = _highest_order(
                    row_ptr, stride_v, V, floor, order_in(key) >> SHIFT, whole - dropped, whole, floor, peak, inverse,
                    True, SHIFT, BLOCK_V,
                )  # fmt: skip
                threshold = value_of_shifted(found, SHIFT)
                mass = tl.maximum(_fixed(tl.exp((threshold - peak) * inverse)), 1)
                ties = (dropped - (whole - from_here)) // mass
                first = _id_of_tie(row_ptr, stride_v, V, threshold, ties, BLOCK_V)
        if min_p_ptr is not None:
            least = tl.load(min_p_ptr + row)
            if least > 0:
                distance = tl.log(tl.minimum(least, 1.0)) / inverse
                lowered = peak + distance
                # rounded down, it would keep a logit that is too low: the next fp32 value does not
                lowered = tl.where(lowered - peak < distance, value_of(order_of(lowered) + 1), lowered)
                first = tl.where(lowered > threshold, 0, first)
                threshold = tl.maximum(lowered, threshold)
        law = peak, 0.0, threshold, inverse, first, -1
        total = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_V):
            ids = start + tl.arange(0, BLOCK_V)
            total += tl.exp(log_probs(load_logits(row_ptr, stride_v, ids, V), ids, law))
        log_sum = tl.log(tl.sum(total, 0))
    return (peak, log_sum, threshold, inverse, first, certain), bad


@triton.jit
def _fixed(weights):
    return (weights * FIXED_ONE).to(tl.int64)


@triton.jit
def _mass_from(row_ptr, stride_v, V, floor, peak, inverse, SHIFT: tl.constexpr, BLOCK_V: tl.constexpr):
    """The fixed-point mass of logits whose order (shifted) is at least `floor`."""
    total = tl.zeros([BLOCK_V], tl.int64)
    for start in range(0, V, BLOCK_V):
        logits = load_logits(row_ptr, stride_v, start + tl.arange(0, BLOCK_V), V)
        order = order_of(logits) >> SHIFT
        total += tl.where(order >= floor, _fixed(tl.exp((logits - peak) * inverse)), 0)
    return tl.sum(total, 0)


@triton.jit
def _highest_order(
    row_ptr,
    stride_v,
    V,
    low,  # int32: from here on there is enough
    high,  # int32, the highest order
    goal,  # int64
    from_low,  # int64: what there is from `low` on
    floor,  # int32: lower orders have no mass
    peak,
    inverse,
    MASS: tl.constexpr,  # fixed-point masses are summed, else logits counted
    SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The highest order (shifted) from which on the mass or count reaches `goal`, and what it is from there."""
    # enough from `low` on, too little from `high` on: three pivots a pass leave a quarter
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    while high - low > 1:
        step = (high - low + 3) // 4
        pivot_1, pivot_2, pivot_3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        above_1 = tl.zeros([BLOCK_V], tl.int64 if MASS else tl.int32)
        above_2, above_3 = above_1, above_1
        for start in range(0, V, BLOCK_V):
            logits = load_logits(row_ptr, stride_v, start + tl.arange(0, BLOCK_V), V)
            order = order_of(logits) >> SHIFT
            if MASS:
                amount = tl.where(order >= floor, _fixed(tl.exp((logits - peak) * inverse)), 0)
            else:
                amount = tl.full([BLOCK_V], 1, tl.int32)
            above_1 += tl.where(order >= pivot_1.to(tl.int32), amount, 0)
            above_2 += tl.where(order >= pivot_2.to(tl.int32), amount, 0)
            above_3 += tl.where(order >= pivot_3.to(tl.int32), amount, 0)
        sum_1 = tl.sum(above_1, 0).to(tl.int64)
        sum_2 = tl.sum(above_2, 0).to(tl.int64)
        sum_3 = tl.sum(above_3, 0).to(tl.int64)
        high = tl.where(sum_1 < goal, pivot_1, tl.where(sum_2 < goal, pivot_2, tl.where(sum_3 < goal, pivot_3, high)))
        low = tl.where(sum_3 >= goal, pivot_3, tl.where(sum_2 >= goal, pivot_2, tl.where(sum_1 >= goal, pivot_1, low)))
        from_low = tl.where(
            sum_3 >= goal, sum_3, tl.where(sum_2 >= goal, sum_2, tl.where(sum_1 >= goal, sum_1, from_low))
        )
    return low.to(tl.int32), from_low


@triton.jit
def _id_of_tie(row_ptr, stride_v, V, value, skipped, BLOCK_V: tl.constexpr):
    """The id of the logit equal to `value` that comes after `skipped` others of them, in order of ids."""
    found = tl.full((), 0, tl.int32)
    if skipped > 0:
        found = tl.full((), MAX_ID, tl.int32)
        seen = skipped * 0
        start = tl.full((), 0, tl.int32)
        while (start < V) & (found == MAX_ID):
            ids = start + tl.arange(0, BLOCK_V)
            ties = load_logits(row_ptr, stride_v, ids, V) == value
            rank = seen + tl.cumsum(ties.to(tl.int32), 0)
            found = tl.min(tl.where(ties & (rank > skipped), ids, MAX_ID), 0)
            seen += tl.sum(ties.to(tl.int32), 0)
            start += BLOCK_V
    return found
