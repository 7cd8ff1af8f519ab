"""The last two launches of sampled acceptance, in Triton: the token after the walk's end, and the walk.

Letters: B sequences, N tree nodes, P expanded nodes, V vocabulary, S = ceil(V / BLOCK_V) tiles, D edges on the longest
path, E ids that end the text. See `accept_sample`; references: `specdec_triton.ops.rules` and `.reference`.
"""

import triton
import triton.language as tl

from ._chances import NOT_DRAWN, block_weight, last_accepted, lowered, residual, tests_of, tree_of, untried, was_drawn
from ._common import COUNTS, NAN_ORDER, NO_KEY
from ._law import (
    NEG_INF,
    highest,
    id_in,
    inverse_temperature,
    key_of,
    load_law,
    load_logits,
    log_probs,
    order_in,
    order_of,
    value_of,
)
from ._noise import ACCEPT, BONUS, RECOVER, gumbel, uniform

FROM_RESIDUAL: tl.constexpr = tl.constexpr(2**31)  # bit 31 of a key: the residual is not zero all over its tile


@triton.jit(do_not_specialize=COUNTS)
def draws_kernel(
    drawn_ptr,  # [B, S] int64, out; [B, N, S] under block
    masses_ptr,  # [B, N, S] fp32, out (block)
    chance_ptr,  # [B, N] fp32
    cut_ptr,  # [B, N] fp32
    pass_ptr,  # [B, N] fp32 (traversal)
    keys_ptr,  # [B, N + P, S] int64
    floats_ptr,  # [2, B, N, 4] fp32
    ints_ptr,  # [2, B, N, 2] int32
    logits_ptr,  # [B, N, V]
    draft_logits_ptr,  # [B, P, V], or None
    draft_row_ptr,  # [B, N] int32, or None
    tokens_ptr,  # [B, N] int64
    parents_ptr,  # [B, N] int32
    seeds_ptr,  # [B] int64
    position_ptr,  # [B] int64
    stride_b, stride_n, stride_v, draft_stride_b, draft_stride_p, draft_stride_v,
    N, P, V, S,
    RULE: tl.constexpr, SAMPLING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    seed, position = tl.load(seeds_ptr + batch), tl.load(position_ptr + batch)
    node, parents, tokens = tree_of(parents_ptr, tokens_ptr, batch, N, V, RULE, BLOCK_N)
    if RULE == "block":
        last = tl.program_id(1)
        weight = tl.full((), 1.0, tl.float32)
        # nodes that do not continue the one before have no ratio
        reached = tl.sum(((node > 0) & (node <= last) & (parents >= 0)).to(tl.int32), 0) == last
        if reached:
            weight = block_weight(chance_ptr, batch, last, N)
        if (reached == 0) | (weight == NOT_DRAWN):
            return
        chance = tl.load(chance_ptr + batch * N + node, mask=parents >= 0, other=NOT_DRAWN)
        out = (batch * N + last) * S + tile
    else:
        chance, passed = tests_of(chance_ptr, pass_ptr, node, parents, seed, position, batch, N, RULE)
        last = last_accepted(node, parents, chance, passed, N, RULE)
        weight = tl.full((), 1.0, tl.float32)
        if RULE == "traversal":
            weight = tl.where(last > 0, tl.max(tl.where(node == last, chance, NOT_DRAWN), 0), 1.0)
        out = batch * S + tile

    index = batch * N + last
    first = tile * BLOCK_V
    ids = first + tl.arange(0, BLOCK_V)
    law = load_law(floats_ptr, ints_ptr, index)
    target = log_probs(
        load_logits(logits_ptr + batch * stride_b + last.to(tl.int64) * stride_n, stride_v, ids, V), ids, law
    )
    tried = tl.where((parents == last) & was_drawn(chance), tokens, -1)
    was_tried = tl.max(tried, 0) >= 0
    rest = tl.zeros([BLOCK_V], tl.float32)
    if was_tried:
        if SAMPLING == "none":
            rest = weight * tl.exp(target)
        else:
            draft_row = tl.maximum(tl.load(draft_row_ptr + index), 0).to(tl.int64)
            draft_start = draft_logits_ptr + batch * draft_stride_b + draft_row * draft_stride_p
            draft_law = load_law(floats_ptr, ints_ptr, tl.num_programs(2).to(tl.int64) * N + index)
            draft = log_probs(load_logits(draft_start, draft_stride_v, ids, V), ids, draft_law)
            if RULE == "block":
                cut = weight + (1 - weight)
            else:
                cut = tl.load(cut_ptr + index)
            rest = residual(weight, target, cut, draft)
        rest = tl.where(untried(ids, first, tried, BLOCK_V), rest, 0.0)
        if RULE == "block":
            tl.store(masses_ptr + out, tl.sum(rest, 0))
    # a residual of no mass can only come from rounding: the target stands in, if no tile has any
    from_rest = tl.max(rest, 0) > 0
    scores = target
    if from_rest:
        scores = tl.where(rest > 0, tl.log(tl.where(rest > 0, rest, 1.0)), NEG_INF)
    key = key_of(order_of(NEG_INF), first)
    if tl.max(tl.where(scores == scores, scores, NEG_INF), 0) > NEG_INF:
        purpose = tl.where(was_tried, RECOVER, BONUS)
        scores += gumbel(seed, position, last, purpose, first, BLOCK_V)
        key = highest(scores, first, V, BLOCK_V)
    tl.store(drawn_ptr + out, tl.where(from_rest, key | FROM_RESIDUAL, key))


@triton.jit
def _best_drawn(drawn_ptr, S, BLOCK_S: tl.constexpr):
    tile = tl.arange(0, BLOCK_S)
    keys = tl.load(drawn_ptr + tile, mask=tile < S, other=NO_KEY)
    from_rest = (keys & FROM_RESIDUAL) != 0
    best = tl.max(tl.where(from_rest, keys, NO_KEY), 0)
    best = tl.where(best == NO_KEY, tl.max(keys, 0), best)
    return id_in(best)


@triton.jit(do_not_specialize=COUNTS)
def walk_kernel(
    path_ptr,  # [B, D] int32, out
    length_ptr,  # [B] int64, out
    next_ids_ptr,  # [B] int64, out
    has_nan_ptr,  # [B] bool, out
    chance_ptr,  # [B, N] fp32; None under coupled
    pass_ptr,  # [B, N] fp32 (traversal)
    masses_ptr,  # [B, N, S] fp32 (block)
    drawn_ptr,  # [B, S] int64, [B, N, S] under block; None under coupled and typical
    chosen_ptr,  # [B, N] int32 (typical, coupled with thresholds)
    bad_ptr,  # [B, N] bool; None under coupled without thresholds
    keys_ptr,  # [B, N, S] int64 (coupled without thresholds)
    noisy_ptr,  # [B, N, S] int64 (coupled without thresholds)
    temperature_ptr,  # [B] fp32, or None
    tokens_ptr,  # [B, N] int64
    parents_ptr,  # [B, N] int32
    seeds_ptr,  # [B] int64
    position_ptr,  # [B] int64
    budget_ptr,  # [B] int64
    eos_ids_ptr,  # [E] int64, or None
    N, V, S, D, E,
    RULE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, WALK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    node, parents, tokens = tree_of(parents_ptr, tokens_ptr, row, N, V, RULE, BLOCK_N)
    seed, position = tl.load(seeds_ptr + row), tl.load(position_ptr + row)
    budget = tl.load(budget_ptr + row)

    if bad_ptr is not None:
        bad = tl.load(bad_ptr + row * N + node, mask=node < N, other=0) != 0
    if RULE == "coupled":
        if chosen_ptr is not None:
            chosen = tl.load(chosen_ptr + row * N + node, mask=node < N, other=-1)
        else:
            chosen, bad = _best_of_tiles(keys_ptr, noisy_ptr, temperature_ptr, row, node, N, S, BLOCK_N, WALK_S)
        last = tl.full((), 0, tl.int32)
        next_id = tl.max(tl.where(node == 0, chosen, -1), 0)
        child = tl.min(tl.where((parents == 0) & (tokens == next_id), node, N), 0)
        while child < N:
            last = child
            next_id = tl.max(tl.where(node == last, chosen, -1), 0)
            child = tl.min(tl.where((parents == last) & (tokens == next_id), node, N), 0)
    elif RULE == "block":
        last = tl.full((), 0, tl.int32)
        weight = tl.full((), 1.0, tl.float32)
        chance = tl.load(chance_ptr + row * N + node, mask=parents >= 0, other=NOT_DRAWN)
        numbers = uniform(seed, position, node, ACCEPT)
        here = tl.full((), 1, tl.int32)
        tile = tl.arange(0, BLOCK_S)
        while here < N:
            ratio = tl.sum(tl.where(node == here, chance, 0.0), 0)
            weight = lowered(weight, ratio)
            followed = tl.max(((node == here + 1) & was_drawn(chance)).to(tl.int32), 0) > 0
            mass = weight
            if followed:
                mass = tl.sum(tl.load(masses_ptr + (row * N + here) * S + tile, mask=tile < S, other=0.0), 0)
            passed = (tl.sum(tl.where(node == here, numbers, 0.0), 0) >= mass / (mass + (1 - weight))) == 0
            drawn = was_drawn(ratio)
            last = tl.where(drawn & passed, here, last)
            here = tl.where(drawn, here + 1, N)
        next_id = _best_drawn(drawn_ptr + (row * N + last) * S, S, BLOCK_S)
    else:
        chance, passed = tests_of(chance_ptr, pass_ptr, node, parents, seed, position, row, N, RULE)
        last = last_accepted(node, parents, chance, passed, N, RULE)
        if RULE == "typical":
            next_id = tl.load(chosen_ptr + row * N + last)
        else:
            next_id = _best_drawn(drawn_ptr + row * S, S, BLOCK_S)

    # from the last node up to the root: the path and what it emits
    accepted = tl.full((), 0, tl.int32)
    here = last
    while here > 0:
        here = tl.max(tl.where(node == here, parents, -1), 0)
        accepted += 1
    path = tl.full([BLOCK_N], -1, tl.int32)
    emitted = tl.where(node == accepted, next_id, -1)
    is_bad = tl.zeros([BLOCK_N], tl.int1)
    here, place = last, accepted
    while here > 0:
        place -= 1
        path = tl.where(node == place, here, path)
        emitted = tl.where(node == place, tl.max(tl.where(node == here, tokens, -1), 0), emitted)
        is_bad = is_bad | ((node == place) & (tl.max(((node == here) & bad).to(tl.int32), 0) > 0))
        here = tl.max(tl.where(node == here, parents, -1), 0)

    live = budget > 0
    end = tl.minimum(tl.minimum(accepted.to(tl.int64), tl.maximum(budget - 1, 0)), D).to(tl.int32)
    if eos_ids_ptr is not None:
        for which in range(E):
            eos_id = tl.load(eos_ids_ptr + which)
            end = tl.minimum(end, tl.min(tl.where((emitted == eos_id) & (node <= accepted), node, N), 0))
    length = tl.where(live, end, 0)
    next_id = tl.max(tl.where(node == end, emitted, -1), 0)
    bad_root = tl.max(((node == 0) & bad).to(tl.int32), 0) > 0
    bad_path = tl.max((is_bad & (node < length)).to(tl.int32), 0) > 0
    tl.store(path_ptr + row * D + node, tl.where(node < length, path, -1), mask=node < D)
    tl.store(length_ptr + row, length)
    tl.store(next_ids_ptr + row, tl.where(live, next_id, -1))
    tl.store(has_nan_ptr + row, live & (bad_root | bad_path))


@triton.jit
def _best_of_tiles(keys_ptr, noisy_ptr, temperature_ptr, row, node, N, S, BLOCK_N: tl.constexpr, WALK_S: tl.constexpr):
    """[BLOCK_N] each, from the tiles: the id of the highest noisy logit, and whether there is no distribution."""
    inverse, greedy = inverse_temperature(temperature_ptr, row)
    # one reduction after each loop: in the loop, every load would wait for the one before
    best = tl.full([WALK_S, BLOCK_N], -(2**31), tl.int32)
    for first in range(0, S, WALK_S):
        tile = first + tl.arange(0, WALK_S)
        at = (row * N + node)[None, :] * S + tile[:, None]
        keys = tl.load(keys_ptr + at, mask=(tile < S)[:, None] & (node < N)[None, :], other=NO_KEY)
        best = tl.maximum(best, order_in(keys))
    order = tl.max(best, 0)
    peak = value_of(order)
    bad = (order == NAN_ORDER) | (tl.abs(peak) == float("inf"))
    chosen = tl.full([WALK_S, BLOCK_N], NO_KEY, tl.int64)
    for first in range(0, S, WALK_S):
        tile = first + tl.arange(0, WALK_S)
        at = (row * N + node)[None, :] * S + tile[:, None]
        mask = (tile < S)[:, None] & (node < N)[None, :]
        peaks = value_of(order_in(tl.load(keys_ptr + at, mask=mask, other=NO_KEY)))
        noisy = tl.load(noisy_ptr + at, mask=mask, other=NO_KEY)
        scores = tl.where(peaks == NEG_INF, NEG_INF, value_of(order_in(noisy)) + (peaks - peak[None, :]) * inverse)
        chosen = tl.maximum(chosen, tl.where(mask, key_of(order_of(scores), id_in(noisy)), NO_KEY))
    return tl.where(node < N, id_in(tl.max(chosen, 0)), -1), bad
