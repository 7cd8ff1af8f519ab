"""Filtered log-probabilities of rows of logits, in Triton: temperature, top-k, top-p and min-p.

The `Distribution` of a row consists of six numbers. They are computed from the row's statistics (`_rows`) and filters.
The log-probability of a token follows from its logit and these numbers.

Thresholds are found on integers that have the same order as the logits, with integer counts (top-k) and fixed-point
masses (top-p), because sums of integers do not depend on the order of summation.
Reference: `specdec_triton.ops.filters`.

Letters: B sequences, V vocabulary, S = ceil(V / BLOCK_V) tiles.
"""

from collections import namedtuple
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._keys import MAX_ID, NAN_ORDER, NEG_INF, NO_KEY, id_in, order_in, order_of, value_of
from ._launch import contiguous
from ._rows import load_inverse_temperature, load_logits

FIXED_ONE: tl.constexpr = tl.constexpr(2.0**40)  # mass of the most likely token; masses below 2^-40 of it become 0
NO_MASS: tl.constexpr = tl.constexpr(28.0)  # exp(-28) < 2^-40


# kernel argument: the tensors of `ops.filters.Filters`, [B] fp32, int64, fp64 and fp32, or None
Filters = namedtuple("Filters", "temperature top_k top_p min_p", defaults=(None,) * 4)

# The filtered probabilities of a row:
#   row                  `Row`, its logits
#   peak                 fp32, the highest logit
#   log_sum              fp32, log of the sum of exp((logit - peak) / temperature) over the kept tokens; NaN if the
#                        logits do not define a distribution
#   threshold            fp32, logits above it are kept
#   inverse_temperature  fp32
#   first_tie            int32, tokens whose logit equals the threshold are kept if their id is at least this
#   greedy_id            int32, the only token of a row with temperature 0; -1 for other rows
Distribution = namedtuple("Distribution", "row peak log_sum threshold inverse_temperature first_tie greedy_id")


@triton.jit
def is_invalid(distribution):
    """True if the logits do not define a distribution."""
    return (distribution.log_sum == distribution.log_sum) == 0


@triton.jit
def log_probs(distribution, ids):
    """[BLOCK_V] fp32: log-probabilities of a tile. -inf for filtered tokens; NaN if there is no distribution."""
    return _log_probs_of(distribution, load_logits(distribution.row, ids), ids)


@triton.jit
def log_prob_of(distribution, token):
    """Log-probability of a token or of several tokens. They must be in the vocabulary."""
    row = distribution.row
    return _log_probs_of(distribution, tl.load(row.ptr + token.to(tl.int64) * row.stride_v).to(tl.float32), token)


@triton.jit
def _log_probs_of(distribution, logits, ids):
    threshold, greedy_id = distribution.threshold, distribution.greedy_id
    kept = (logits > threshold) | ((logits == threshold) & (ids >= distribution.first_tie))
    scores = (logits - distribution.peak) * distribution.inverse_temperature - distribution.log_sum
    found = tl.where(kept | is_invalid(distribution), scores, NEG_INF)
    return tl.where(greedy_id >= 0, tl.where(ids == greedy_id, 0.0, NEG_INF), found)


@triton.jit
def row_distribution(row, statistics, index, batch, S, filters, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr):
    """The `Distribution` of a row; `index` is its place in the statistics. It is invalid if the logits hold NaN or +inf
    or only -inf."""
    # number of low bits of the order that carry no information in this dtype
    SHIFT: tl.constexpr = (
        0 if row.ptr.dtype.element_ty == tl.float32 else 13 if row.ptr.dtype.element_ty == tl.float16 else 16
    )
    tile = tl.arange(0, BLOCK_S)
    keys = tl.load(statistics.keys + index * S + tile, mask=tile < S, other=NO_KEY)
    key = tl.max(keys, 0)
    peak = value_of(order_in(key))
    invalid = (order_in(key) == NAN_ORDER) | (tl.abs(peak) == float("inf"))
    inverse, greedy = load_inverse_temperature(filters.temperature, batch)
    greedy_id = tl.where(greedy, id_in(key), -1)
    threshold, first_tie = tl.full((), NEG_INF, tl.float32), tl.full((), MAX_ID, tl.int32)
    log_sum = tl.where(greedy & (invalid == 0), 0.0, float("nan"))

    if filters.top_k is None and filters.top_p is None and filters.min_p is None:
        if not (invalid | greedy):
            sums = tl.load(statistics.sums + index * S + tile, mask=tile < S, other=0.0)
            peaks = tl.where(tile < S, value_of(order_in(keys)), NEG_INF)
            log_sum = tl.log(tl.sum(sums * tl.exp((peaks - peak) * inverse), 0))
    elif not (invalid | greedy):
        lowest = tl.min(tl.where(tile < S, keys, key), 0)  # lowest of the tiles' maxima
        if filters.top_k is not None:
            count = tl.load(filters.top_k + batch)
            if (count > 0) & (count < row.V):
                # each tile has at least one logit that is not below the lowest maximum
                floor = tl.where(count <= S, order_in(lowest) >> SHIFT, order_of(NEG_INF) >> SHIFT)
                found, _ = _highest_order(
                    row, floor, order_in(key) >> SHIFT, count, count * 0, floor, peak, inverse, False, SHIFT, BLOCK_V
                )
                threshold = value_of_shifted(found, SHIFT)
                first_tie = 0
        if filters.top_p is not None:
            top_p = tl.load(filters.top_p + batch)
            if top_p < 1:
                # logits below this have no mass in fixed point
                floor = order_of(tl.maximum(peak - NO_MASS / inverse, threshold)) >> SHIFT
                whole = _mass_from(row, floor, peak, inverse, SHIFT, BLOCK_V)
                dropped = ((1 - top_p).to(tl.float32).to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
                dropped = tl.minimum(dropped, whole - 1)  # the most likely token is always kept
                found, from_found = _highest_order(
                    row, floor, order_in(key) >> SHIFT, whole - dropped, whole, floor, peak, inverse, True, SHIFT,
                    BLOCK_V,
                )  # fmt: skip
                threshold = value_of_shifted(found, SHIFT)
                tie_mass = tl.maximum(_fixed(tl.exp((threshold - peak) * inverse)), 1)
                ties = (dropped - (whole - from_found)) // tie_mass
                first_tie = _id_of_tie(row, threshold, ties, BLOCK_V)
        if filters.min_p is not None:
            least = tl.load(filters.min_p + batch)
            if least > 0:
                distance = tl.log(tl.minimum(least, 1.0)) / inverse
                lowered = peak + distance
                # if it was rounded down, it would keep a logit that is too low; the next fp32 value does not
                lowered = tl.where(lowered - peak < distance, value_of(order_of(lowered) + 1), lowered)
                first_tie = tl.where(lowered > threshold, 0, first_tie)
                threshold = tl.maximum(lowered, threshold)
        kept = Distribution(row, peak, 0.0, threshold, inverse, first_tie, -1)
        total = tl.zeros([BLOCK_V], tl.float32)
        for first_id in range(0, row.V, BLOCK_V):
            total += tl.exp(log_probs(kept, first_id + tl.arange(0, BLOCK_V)))
        log_sum = tl.log(tl.sum(total, 0))
    return Distribution(row, peak, log_sum, threshold, inverse, first_tie, greedy_id)


@triton.jit
def value_of_shifted(shifted, SHIFT: tl.constexpr):
    """The value for which `order_of(value) >> SHIFT` is `shifted`, in a dtype with this SHIFT.

    The bits that the shift dropped are zeros for positive values and ones for negative values.
    """
    order = shifted << SHIFT
    return value_of(tl.where(shifted < 0, order | ((1 << SHIFT) - 1), order))


@triton.jit
def _fixed(weights):
    return (weights * FIXED_ONE).to(tl.int64)


@triton.jit
def _mass_from(row, floor, peak, inverse, SHIFT: tl.constexpr, BLOCK_V: tl.constexpr):
    """The fixed-point mass of all logits whose shifted order is at least `floor`."""
    total = tl.zeros([BLOCK_V], tl.int64)
    for first_id in range(0, row.V, BLOCK_V):
        logits = load_logits(row, first_id + tl.arange(0, BLOCK_V))
        order = order_of(logits) >> SHIFT
        total += tl.where(order >= floor, _fixed(tl.exp((logits - peak) * inverse)), 0)
    return tl.sum(total, 0)


@triton.jit
def _highest_order(
    row,
    low,  # int32: an order at which the mass or count reaches `goal`
    high,  # int32, the highest order
    goal,  # int64
    from_low,  # int64: mass or count of orders >= `low`
    floor,  # int32: lower orders have no mass
    peak, inverse,
    MASS: tl.constexpr,  # True: sum fixed-point masses; False: count logits
    SHIFT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The highest shifted order for which the mass or count of all orders from it on reaches `goal`; and that mass or
    count."""
    # the goal is reached from `low` on but not from `high` on; each pass tests three pivots and leaves a quarter
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    while high - low > 1:
        step = (high - low + 3) // 4
        pivot_1, pivot_2, pivot_3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        above_1 = tl.zeros([BLOCK_V], tl.int64 if MASS else tl.int32)
        above_2, above_3 = above_1, above_1
        for first_id in range(0, row.V, BLOCK_V):
            logits = load_logits(row, first_id + tl.arange(0, BLOCK_V))
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
def _id_of_tie(row, value, skipped, BLOCK_V: tl.constexpr):
    """The id of a logit that equals `value`: the first one, in order of ids, after `skipped` of them."""
    found = tl.full((), 0, tl.int32)
    if skipped > 0:
        found = tl.full((), MAX_ID, tl.int32)
        seen = skipped * 0
        first_id = tl.full((), 0, tl.int32)
        while (first_id < row.V) & (found == MAX_ID):
            ids = first_id + tl.arange(0, BLOCK_V)
            ties = load_logits(row, ids) == value
            rank = seen + tl.cumsum(ties.to(tl.int32), 0)
            found = tl.min(tl.where(ties & (rank > skipped), ids, MAX_ID), 0)
            seen += tl.sum(ties.to(tl.int32), 0)
            first_id += BLOCK_V
    return found


def filters_argument(filters: Sequence[torch.Tensor | None]) -> Filters:
    """The kernel argument for filters. Only the four tensors are used, not `max_top_k`."""
    return Filters(*map(contiguous, filters[:4]))
