"""Sampled acceptance: from logits to the accepted path, with no probability ever written.

Launches, and which rules have them:

    statistics   all                one tile of the vocabulary of one row: its highest logit, its sum of exponentials
                                    and, where `coupled` or `typical` has only a temperature, its highest noisy logit
    laws         all, except        one row: temperature and thresholds as the six numbers of `_law`; the chances of the
                 `coupled` without  node's children, one after the other; where `coupled` or `typical` has thresholds,
                 thresholds         the highest noisy logit
    weights      traversal          the same chances for the nodes of one depth, once for each depth below the root
    draws        rejection, block,  one tile of the vocabulary at the node where the walk ends: the highest noisy residual.
                 multi_round,       `block` needs the residuals' masses to know that node: all nodes, and their masses
                 traversal
    walk         all                one sequence: the walk, the token after it, EOS and budget

A node's residual is max(weight * target - cut * draft, 0) without the children tried: two numbers and the tree stand
for it. `chance` [B, N] is the chance that a node passes its test if its turn comes (NaN passes; -1: it cannot be tried:
padding, or its draft could not have drawn it), and under `traversal` its weight, too. Under `block` it is the ratio of
target to draft. What it means that the tests' order is the order of nodes: see `specdec_triton.rules`.

Letters: B sequences, N tree nodes, P expanded nodes, V vocabulary, S = ceil(V / BLOCK_V) tiles, D edges on the longest
path, E ids that end the text. Reference: `specdec_triton.reference.accept_sample`.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from ._common import FP_FUSION, MAX_ID, NAN_ORDER, NO_KEY, CompileCase, launching_on, pow2
from ._law import (
    NEG_INF,
    highest,
    id_in,
    inverse_temperature,
    key_of,
    law_of,
    load_law,
    load_logits,
    log_probs,
    order_in,
    order_of,
    store_law,
    value_of,
)
from ._noise import ACCEPT, BONUS, COUPLED, RECOVER, gumbel, uniform

TYPICAL_EPSILON: tl.constexpr = tl.constexpr(0.09)
TYPICAL_DELTA: tl.constexpr = tl.constexpr(0.3)
NOT_DRAWN: tl.constexpr = tl.constexpr(-1.0)  # a chance
FROM_RESIDUAL: tl.constexpr = tl.constexpr(2**31)  # bit 31 of a key: the residual is not zero all over its tile

# One tile size in every launch and for every shape: what a row comes to depends on its own logits only. Of the nodes
# that a program takes one after the other, those of one depth share their noise. Rests on compile reports; not timed.
BLOCK_V = 2048
NODES_A_PROGRAM = 8
NUM_WARPS, LAW_WARPS = 4, 8
WALK_KEYS = 1024  # keys the walk holds at once

SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
WEIGHING = ("rejection", "block", "multi_round", "traversal")


@triton.jit
def _tree(parents_ptr, tokens_ptr, row, N, V, RULE: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N] int32 each: nodes; parents and tokens, -1 at the root and at padding."""
    node = tl.arange(0, BLOCK_N)
    parents = tl.load(parents_ptr + row * N + node, mask=node < N, other=-1)
    tokens = tl.load(tokens_ptr + row * N + node, mask=node < N, other=-1)
    real = (tokens >= 0) & (tokens < V) & (parents < node)
    if RULE == "rejection" or RULE == "block":
        real &= parents == node - 1
    return node, tl.where(real, parents, -1), tl.where(real, tokens, -1).to(tl.int32)


@triton.jit
def _drawn(chance):
    """Also where it is NaN."""
    return (chance == NOT_DRAWN) == 0


@triton.jit
def _depth(parents_ptr, row, node, N):
    depth = node * 0
    while node > 0:
        node = tl.minimum(tl.load(parents_ptr + row * N + node), node - 1)
        depth += 1
    return depth


@triton.jit
def _statistics_kernel(
    keys_ptr,  # [B, N + P, S] int64, out
    sums_ptr,  # [B, N + P, S] fp32, out; None where NOISE is and there are no thresholds
    noisy_ptr,  # [B, N, S] int64, out; None where NOISE is None
    logits_ptr,  # [B, N, V] fp32, bf16 or fp16
    draft_logits_ptr,  # [B, P, V] fp32, bf16 or fp16; None: P is 0
    parents_ptr,  # [B, N] int32
    seeds_ptr,  # [B] int64
    position_ptr,  # [B] int64
    temperature_ptr,  # [B] fp32, or None
    draft_temperature_ptr,
    stride_b,
    stride_n,
    stride_v,
    draft_stride_b,
    draft_stride_p,
    draft_stride_v,
    N,
    P,
    V,
    S,
    NOISE: tl.constexpr,  # None, COUPLED or BONUS
    ROWS: tl.constexpr,  # a program takes
    BLOCK_V: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first = tile * BLOCK_V
    ids = first + tl.arange(0, BLOCK_V)
    seed, position = tl.load(seeds_ptr + batch), tl.load(position_ptr + batch)
    noise = tl.zeros([BLOCK_V], tl.float32)
    noise_of = tl.full((), -1, tl.int32)
    for place in range(ROWS):
        row = tl.program_id(1) * ROWS + place
        if row < N + P:
            index = (batch * (N + P) + row) * S + tile
            if draft_logits_ptr is None:
                logits = load_logits(logits_ptr + batch * stride_b + row.to(tl.int64) * stride_n, stride_v, ids, V)
                inverse, greedy = inverse_temperature(temperature_ptr, batch)
            elif row < N:
                logits = load_logits(logits_ptr + batch * stride_b + row.to(tl.int64) * stride_n, stride_v, ids, V)
                inverse, greedy = inverse_temperature(temperature_ptr, batch)
            else:
                start = draft_logits_ptr + batch * draft_stride_b + (row - N).to(tl.int64) * draft_stride_p
                logits = load_logits(start, draft_stride_v, ids, V)
                inverse, greedy = inverse_temperature(draft_temperature_ptr, batch)

            # NaN lanes count before any other, whatever max made of them
            lane = tl.arange(0, BLOCK_V)
            peak = tl.max(logits, 0)
            lead = tl.min(tl.where(logits != logits, lane - BLOCK_V, tl.where(logits == peak, lane, BLOCK_V)), 0)
            is_nan = lead < 0
            order = tl.where(is_nan, NAN_ORDER, order_of(peak))
            tl.store(keys_ptr + index, key_of(order, first + tl.where(is_nan, lead + BLOCK_V, lead)))
            # differences from the tile's highest logit keep their digits, however large the logits are
            scores = tl.where(logits == NEG_INF, NEG_INF, (logits - peak) * inverse)
            if sums_ptr is not None:
                tl.store(sums_ptr + index, tl.sum(tl.exp(scores), 0))
            if NOISE is not None:
                which = _depth(parents_ptr, batch, row, N) if NOISE == COUPLED else row
                if which != noise_of:
                    if NOISE == COUPLED:
                        noise = gumbel(seed, position + 1 + which, 0, NOISE, first, BLOCK_V)
                    else:
                        noise = gumbel(seed, position, which, NOISE, first, BLOCK_V)
                    noise_of = which
                scores += tl.where(greedy, 0.0, noise)
                tl.store(noisy_ptr + (batch * N + row) * S + tile, highest(scores, first, V, BLOCK_V))


@triton.jit
def _chosen(keys_ptr, noisy_ptr, row, noisy_row, S, inverse, BLOCK_S: tl.constexpr):
    """The id of a row's highest noisy logit, from its tiles': scores there are relative to the tile's highest logit."""
    tile = tl.arange(0, BLOCK_S)
    keys = tl.load(keys_ptr + row * S + tile, mask=tile < S, other=NO_KEY)
    noisy = tl.load(noisy_ptr + noisy_row * S + tile, mask=tile < S, other=NO_KEY)
    peaks = tl.where(tile < S, value_of(order_in(keys)), NEG_INF)
    peak = tl.max(peaks, 0)
    # a row of -inf is flagged; it must not become NaN, which has no order
    scores = tl.where(peaks == NEG_INF, NEG_INF, value_of(order_in(noisy)) + (peaks - peak) * inverse)
    return id_in(tl.max(tl.where(tile < S, key_of(order_of(scores), id_in(noisy)), NO_KEY), 0))


@triton.jit
def _draw(row_ptr, keys_ptr, stride_v, V, law, seed, position, node, NOISE: tl.constexpr, BLOCK_V: tl.constexpr):
    """The id of the highest noisy log-probability of a row; tiles below the threshold are not looked at."""
    peak, log_sum, threshold, inverse, least, certain = law
    lane = tl.arange(0, BLOCK_V)
    best, best_ids = tl.full([BLOCK_V], NEG_INF, tl.float32), tl.full([BLOCK_V], MAX_ID, tl.int32)
    for first in range(0, V, BLOCK_V):
        if value_of(order_in(tl.load(keys_ptr + first // BLOCK_V))) >= threshold:
            ids = first + lane
            scores = log_probs(load_logits(row_ptr, stride_v, ids, V), ids, law)
            scores += gumbel(seed, position, node, NOISE, first, BLOCK_V)
            higher = scores > best
            best, best_ids = tl.where(higher, scores, best), tl.where(higher, ids, best_ids)
    highest_score = tl.max(best, 0)
    return tl.minimum(tl.min(tl.where(best == highest_score, best_ids, MAX_ID), 0), V - 1)


@triton.jit
def _untried(ids, first, tried, BLOCK_V: tl.constexpr):
    """[BLOCK_V] bool: a tile's ids that are not among `tried` [BLOCK_N] int32 (-1 is none)."""
    free = ids >= 0
    inside = (tried >= first) & (tried < first + BLOCK_V)
    token = tl.min(tl.where(inside, tried, MAX_ID), 0)
    while token < MAX_ID:
        free &= ids != token
        token = tl.min(tl.where(inside & (tried > token), tried, MAX_ID), 0)
    return free


@triton.jit
def _residual(weight, target_log_probs, cut, draft_log_probs):
    """max(weight * target - cut * draft, 0), NaN where it is; no draft, no term."""
    draft = tl.exp(draft_log_probs)
    rest = weight * tl.exp(target_log_probs) - tl.where(draft > 0, cut * draft, 0.0)
    return tl.where(rest <= 0, 0.0, rest)


@triton.jit
def _masses(
    row_ptr, stride_v, law, draft_row_ptr, draft_stride_v, draft_law, weight, cut, tried, V,
    SAMPLING: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of what is left: the residual's mass, and the draft's (1 where siblings were drawn with replacement)."""
    masses, lefts = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, V, BLOCK_V):
        ids = first + tl.arange(0, BLOCK_V)
        free = _untried(ids, first, tried, BLOCK_V)
        target = log_probs(load_logits(row_ptr, stride_v, ids, V), ids, law)
        if SAMPLING == "none":
            masses += tl.where(free, weight * tl.exp(target), 0.0)
        else:
            draft = log_probs(load_logits(draft_row_ptr, draft_stride_v, ids, V), ids, draft_law)
            masses += tl.where(free, _residual(weight, target, cut, draft), 0.0)
            if SAMPLING == "without":
                lefts += tl.where(free, tl.exp(draft), 0.0)
    left = tl.sum(lefts, 0) if SAMPLING == "without" else 1.0
    return tl.sum(masses, 0), left


@triton.jit
def _at(row_ptr, stride_v, token, law):
    """Probability of one token, or of each of several."""
    return tl.exp(log_probs(tl.load(row_ptr + token.to(tl.int64) * stride_v).to(tl.float32), token, law))


@triton.jit
def _weigh_children(
    chance_ptr,  # [B, N] fp32, out at the node's children
    cut_ptr,  # [B, N] fp32, out
    pass_ptr,  # [B, N] fp32, out (traversal): the chance that the node passes when all its children have failed
    row_ptr, stride_v, law, draft_row_ptr, draft_stride_v, draft_law, weight,
    node, parents, tokens, batch, here, N, V,
    RULE: tl.constexpr, SAMPLING: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The children of node `here`, one after the other, each as if those before it had failed."""
    is_child = parents == here
    mass, short = weight, 1 - weight
    left, cut = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float32)
    tried = tl.full(node.shape, -1, tl.int32)
    is_stale = here < 0
    if SAMPLING == "none":
        # what no child can take, once; and what each child can, the first of those with the same token
        rest, _ = _masses(
            row_ptr, stride_v, law, row_ptr, stride_v, law, weight, cut, tl.where(is_child, tokens, -1), V,
            SAMPLING, BLOCK_V,
        )  # fmt: skip
        shares = tl.where(is_child, weight * _at(row_ptr, stride_v, tl.maximum(tokens, 0), law), 0.0)
        child = tl.min(tl.where(is_child, node, N), 0)
        while child < N:
            token = tl.max(tl.where(node == child, tokens, -1), 0)
            shares = tl.where((tokens == token) & (node > child), 0.0, shares)
            child = tl.min(tl.where(is_child & (node > child), node, N), 0)
    child = tl.min(tl.where(is_child, node, N), 0)
    while child < N:
        token = tl.max(tl.where(node == child, tokens, -1), 0)
        again = tl.max((tried == token).to(tl.int32), 0) > 0
        target = log_probs(tl.load(row_ptr + token.to(tl.int64) * stride_v).to(tl.float32), token, law)
        if SAMPLING == "none":
            wanted = tl.where(again, 0.0, weight * tl.exp(target))
            offered, drawn = tl.full((), 1.0, tl.float32), here >= 0
        else:
            if is_stale:
                mass, left = _masses(
                    row_ptr, stride_v, law, draft_row_ptr, draft_stride_v, draft_law, weight, cut, tried, V,
                    SAMPLING, BLOCK_V,
                )  # fmt: skip
                is_stale = here < 0
            draft = log_probs(
                tl.load(draft_row_ptr + token.to(tl.int64) * draft_stride_v).to(tl.float32), token, draft_law
            )
            offered = tl.exp(draft)
            # an integer between: the interpreter makes floats of a number's comparison when it meets a vector
            drawn = (offered > 0).to(tl.int32) > 0
            if SAMPLING == "without":
                drawn = drawn & (again == 0)
            wanted = tl.where(again, 0.0, _residual(weight, target, cut, draft))
        total = mass + short
        ratio = wanted * left / (total * offered)
        if RULE != "block":
            ratio = tl.where(ratio > 1, 1.0, ratio)
        chance = tl.where(wanted == 0, 0.0, ratio)
        tl.store(chance_ptr + batch * N + child, tl.where(drawn, chance, NOT_DRAWN))
        if RULE == "traversal":  # unless children of its own say otherwise, in a later launch
            tl.store(pass_ptr + batch * N + child, chance / (chance + (1 - chance)))
        tried = tl.where((node == child) & drawn, token, tried)
        cut = tl.where(drawn, cut + total / left, cut)
        if SAMPLING == "none":
            shares = tl.where(node == child, 0.0, shares)
            mass = rest + tl.sum(shares, 0)
        else:
            is_stale = is_stale | drawn
        child = tl.min(tl.where(is_child & (node > child), node, N), 0)
    tl.store(cut_ptr + batch * N + here, cut)
    if RULE == "traversal":
        if SAMPLING != "none":
            if is_stale:
                mass, left = _masses(
                    row_ptr, stride_v, law, draft_row_ptr, draft_stride_v, draft_law, weight, cut, tried, V,
                    SAMPLING, BLOCK_V,
                )  # fmt: skip
        tl.store(pass_ptr + batch * N + here, mass / (mass + short))


@triton.jit
def _laws_kernel(
    floats_ptr,  # [2, B, N, 4] fp32, out: the laws of the targets and of the drafts (`_law.store_law`)
    ints_ptr,  # [2, B, N, 2] int32, out
    bad_ptr,  # [B, N] bool, out: no distribution
    chance_ptr,  # [B, N] fp32, out
    cut_ptr,  # [B, N] fp32, out (weighing rules)
    pass_ptr,  # [B, N] fp32, out (traversal)
    chosen_ptr,  # [B, N] int32, out (coupled, typical)
    keys_ptr,  # [B, N + P, S] int64
    sums_ptr,  # [B, N + P, S] fp32, or None
    noisy_ptr,  # [B, N, S] int64, or None
    logits_ptr,  # [B, N, V]
    draft_logits_ptr,  # [B, P, V], or None
    draft_row_ptr,  # [B, N] int32, or None
    tokens_ptr,  # [B, N] int64
    parents_ptr,  # [B, N] int32
    seeds_ptr,  # [B] int64
    position_ptr,  # [B] int64
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,  # [B] fp32, int64, fp32, fp32, or None each
    draft_temperature_ptr, draft_top_k_ptr, draft_top_p_ptr, draft_min_p_ptr,
    stride_b, stride_n, stride_v, draft_stride_b, draft_stride_p, draft_stride_v,
    N, P, V, S,
    RULE: tl.constexpr, SAMPLING: tl.constexpr, SHIFT: tl.constexpr, DRAFT_SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    count = tl.num_programs(1).to(tl.int64) * N
    index = batch * N + here
    keys_row = (batch * (N + P) + here) * S
    row_ptr = logits_ptr + batch * stride_b + here.to(tl.int64) * stride_n
    law, bad = law_of(
        row_ptr, keys_ptr + keys_row, sums_ptr + keys_row, batch, stride_v, V, S,
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, SHIFT, BLOCK_S, BLOCK_V,
    )  # fmt: skip
    tl.store(bad_ptr + index, bad)
    if RULE == "coupled" or RULE == "typical":
        peak, log_sum, threshold, inverse, first, certain = law
        if noisy_ptr is not None:
            chosen = _chosen(keys_ptr, noisy_ptr, batch * (N + P) + here, index, S, inverse, BLOCK_S)
        else:
            seed, position = tl.load(seeds_ptr + batch), tl.load(position_ptr + batch)
            if RULE == "coupled":
                depth = _depth(parents_ptr, batch, here, N)
                chosen = _draw(
                    row_ptr, keys_ptr + keys_row, stride_v, V, law, seed, position + 1 + depth, 0, COUPLED, BLOCK_V
                )
            else:
                chosen = _draw(row_ptr, keys_ptr + keys_row, stride_v, V, law, seed, position, here, BONUS, BLOCK_V)
        tl.store(chosen_ptr + index, chosen)
    if RULE == "typical":
        node, parents, tokens = _tree(parents_ptr, tokens_ptr, batch, N, V, RULE, BLOCK_N)
        entropies = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_V):
            ids = start + tl.arange(0, BLOCK_V)
            target = log_probs(load_logits(row_ptr, stride_v, ids, V), ids, law)
            entropies -= tl.where(target == NEG_INF, 0.0, tl.exp(target) * target)
        least = tl.minimum(TYPICAL_DELTA * tl.exp(-tl.sum(entropies, 0)), TYPICAL_EPSILON)
        is_child = parents == here
        # NaN is kept
        kept = (_at(row_ptr, stride_v, tl.maximum(tokens, 0), law) <= least) == 0
        tl.store(chance_ptr + batch * N + node, kept.to(tl.float32), mask=is_child)
    if RULE == "rejection" or RULE == "block" or RULE == "multi_round" or RULE == "traversal":
        node, parents, tokens = _tree(parents_ptr, tokens_ptr, batch, N, V, RULE, BLOCK_N)
        store_law(floats_ptr, ints_ptr, index, law)
        draft_start, draft_law = row_ptr, law
        if SAMPLING != "none":
            draft_start, draft_law = _draft_law(
                keys_ptr, sums_ptr, draft_logits_ptr, draft_row_ptr, draft_temperature_ptr, draft_top_k_ptr,
                draft_top_p_ptr, draft_min_p_ptr, draft_stride_b, draft_stride_p, draft_stride_v,
                batch, index, N, P, V, S, DRAFT_SHIFT, BLOCK_S, BLOCK_V,
            )  # fmt: skip
            store_law(floats_ptr, ints_ptr, count + index, draft_law)
        if (RULE != "traversal") | (here == 0):
            _weigh_children(
                chance_ptr, cut_ptr, pass_ptr, row_ptr, stride_v, law, draft_start, draft_stride_v, draft_law,
                tl.full((), 1.0, tl.float32), node, parents, tokens, batch, here, N, V, RULE, SAMPLING, BLOCK_V,
            )  # fmt: skip


@triton.jit
def _draft_law(
    keys_ptr, sums_ptr, draft_logits_ptr, draft_row_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    stride_b, stride_p, stride_v, batch, index, N, P, V, S,
    SHIFT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Where the draft's logits for a node's children lie, and their law: nothing is kept where there are none."""
    draft_row = tl.load(draft_row_ptr + index)
    row = tl.maximum(draft_row, 0).to(tl.int64)
    row_ptr = draft_logits_ptr + batch * stride_b + row * stride_p
    keys_row = (batch * (N + P) + N + row) * S
    law, _ = law_of(
        row_ptr, keys_ptr + keys_row, sums_ptr + keys_row, batch, stride_v, V, S,
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, SHIFT, BLOCK_S, BLOCK_V,
    )  # fmt: skip
    peak, log_sum, threshold, inverse, first, certain = law
    absent = draft_row < 0
    log_sum = tl.where(absent, 0.0, log_sum)
    threshold = tl.where(absent, float("inf"), threshold)
    first, certain = tl.where(absent, MAX_ID, first), tl.where(absent, -1, certain)
    return row_ptr, (peak, log_sum, threshold, inverse, first, certain)


@triton.jit
def _weights_kernel(
    chance_ptr,  # [B, N] fp32, in and out
    cut_ptr,  # [B, N] fp32, out
    pass_ptr,  # [B, N] fp32, out
    floats_ptr,  # [2, B, N, 4] fp32
    ints_ptr,  # [2, B, N, 2] int32
    logits_ptr,  # [B, N, V]
    draft_logits_ptr,  # [B, P, V], or None
    draft_row_ptr,  # [B, N] int32, or None
    tokens_ptr,  # [B, N] int64
    parents_ptr,  # [B, N] int32
    stride_b, stride_n, stride_v, draft_stride_b, draft_stride_p, draft_stride_v,
    N, V, depth,
    SAMPLING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Traversal: a node's weight is its chance, so the nodes of one depth wait for those above."""
    here = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if _depth(parents_ptr, batch, here, N) != depth:
        return
    node, parents, tokens = _tree(parents_ptr, tokens_ptr, batch, N, V, "traversal", BLOCK_N)
    index = batch * N + here
    weight = tl.load(chance_ptr + index)
    has_children = tl.max((parents == here).to(tl.int32), 0) > 0
    if (has_children & _drawn(weight)) & (tl.sum(tl.where(node == here, parents, 0), 0) >= 0):
        law = load_law(floats_ptr, ints_ptr, index)
        row_ptr = logits_ptr + batch * stride_b + here.to(tl.int64) * stride_n
        draft_start, draft_law = row_ptr, law
        if SAMPLING != "none":
            count = tl.num_programs(1).to(tl.int64) * N
            draft_law = load_law(floats_ptr, ints_ptr, count + index)
            draft_row = tl.maximum(tl.load(draft_row_ptr + index), 0).to(tl.int64)
            draft_start = draft_logits_ptr + batch * draft_stride_b + draft_row * draft_stride_p
        _weigh_children(
            chance_ptr, cut_ptr, pass_ptr, row_ptr, stride_v, law, draft_start, draft_stride_v, draft_law,
            weight, node, parents, tokens, batch, here, N, V, "traversal", SAMPLING, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _last(node, parents, chance, passed, N, RULE: tl.constexpr):
    """The last accepted node. `chance` [BLOCK_N] says which children were drawn, `passed` which pass their test."""
    last = tl.full((), 0, tl.int32)
    if RULE == "typical":  # the deepest, of equals the first
        depth = tl.where(node == 0, 0, -1)
        for child in range(1, N):
            parent = tl.max(tl.where(node == child, parents, -1), 0)
            above = tl.max(tl.where(node == parent, depth, -1), 0)
            kept = (above >= 0) & (tl.max(((node == child) & passed).to(tl.int32), 0) > 0)
            depth = tl.where((node == child) & kept, above + 1, depth)
        last = tl.min(tl.where(depth == tl.max(depth, 0), node, N), 0)
    else:
        goes_on = passed
        if RULE == "traversal":  # below which some node passes, itself included: leaves first
            for place in range(1, N):
                child = N - place
                found = tl.max(((node == child) & goes_on).to(tl.int32), 0) > 0
                parent = tl.max(tl.where(node == child, parents, -1), 0)
                drawn = tl.max(((node == child) & _drawn(chance)).to(tl.int32), 0) > 0
                goes_on = goes_on | ((node == parent) & (found & drawn))
        child = tl.min(tl.where((parents == 0) & _drawn(chance) & goes_on, node, N), 0)
        while child < N:
            last = child
            child = tl.min(tl.where((parents == last) & _drawn(chance) & goes_on, node, N), 0)
    return last


@triton.jit
def _tests(chance_ptr, pass_ptr, node, parents, seed, position, batch, N, RULE: tl.constexpr):
    """[BLOCK_N] each: the chances, and which nodes pass their test, by a number of their own. NaN passes."""
    # at the root and at padding nothing was written
    chance = tl.load(chance_ptr + batch * N + node, mask=parents >= 0, other=NOT_DRAWN)
    if RULE == "typical":
        passed = chance > 0
    else:
        tested = chance
        if RULE == "traversal":
            tested = tl.load(pass_ptr + batch * N + node, mask=parents >= 0, other=0.0)
        passed = (uniform(seed, position, node, ACCEPT) >= tested) == 0
    return chance, passed


@triton.jit
def _block_weight(chance_ptr, batch, node, N):
    """The weight of a chain's node: min(1, weight above * ratio), from the root down; -1 where it cannot be tried."""
    weight = tl.full((), 1.0, tl.float32)
    drawn = weight > 0
    for above in range(1, node + 1):
        ratio = tl.load(chance_ptr + batch * N + above)
        drawn = drawn & _drawn(ratio)
        weight = _lowered(weight, ratio)
    return tl.where(drawn, weight, NOT_DRAWN)


@triton.jit
def _lowered(weight, ratio):
    product = tl.where((weight == 0) | (ratio == 0), 0.0, weight * ratio)
    return tl.where(product > 1, 1.0, product)


@triton.jit
def _draws_kernel(
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
    node, parents, tokens = _tree(parents_ptr, tokens_ptr, batch, N, V, RULE, BLOCK_N)
    if RULE == "block":
        last = tl.program_id(1)
        weight = tl.full((), 1.0, tl.float32)
        # nodes that do not continue the one before have no ratio
        reached = tl.sum(((node > 0) & (node <= last) & (parents >= 0)).to(tl.int32), 0) == last
        if reached:
            weight = _block_weight(chance_ptr, batch, last, N)
        if (reached == 0) | (weight == NOT_DRAWN):
            return
        chance = tl.load(chance_ptr + batch * N + node, mask=parents >= 0, other=NOT_DRAWN)
        out = (batch * N + last) * S + tile
    else:
        chance, passed = _tests(chance_ptr, pass_ptr, node, parents, seed, position, batch, N, RULE)
        last = _last(node, parents, chance, passed, N, RULE)
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
    tried = tl.where((parents == last) & _drawn(chance), tokens, -1)
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
            rest = _residual(weight, target, cut, draft)
        rest = tl.where(_untried(ids, first, tried, BLOCK_V), rest, 0.0)
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


@triton.jit
def _walk_kernel(
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
    node, parents, tokens = _tree(parents_ptr, tokens_ptr, row, N, V, RULE, BLOCK_N)
    seed, position = tl.load(seeds_ptr + row), tl.load(position_ptr + row)
    budget = tl.load(budget_ptr + row)

    if bad_ptr is not None:
        bad = tl.load(bad_ptr + row * N + node, mask=node < N, other=0) != 0
    if RULE == "coupled":
        if chosen_ptr is not None:
            chosen = tl.load(chosen_ptr + row * N + node, mask=node < N, other=-1)
        else:
            best, chosen, bad = _best_of_tiles(
                keys_ptr, noisy_ptr, temperature_ptr, row, node, N, S, BLOCK_N, WALK_S
            )
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
            weight = _lowered(weight, ratio)
            followed = tl.max(((node == here + 1) & _drawn(chance)).to(tl.int32), 0) > 0
            mass = weight
            if followed:
                mass = tl.sum(tl.load(masses_ptr + (row * N + here) * S + tile, mask=tile < S, other=0.0), 0)
            passed = (tl.sum(tl.where(node == here, numbers, 0.0), 0) >= mass / (mass + (1 - weight))) == 0
            drawn = _drawn(ratio)
            last = tl.where(drawn & passed, here, last)
            here = tl.where(drawn, here + 1, N)
        next_id = _best_drawn(drawn_ptr + (row * N + last) * S, S, BLOCK_S)
    else:
        chance, passed = _tests(chance_ptr, pass_ptr, node, parents, seed, position, row, N, RULE)
        last = _last(node, parents, chance, passed, N, RULE)
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
def _best_of_tiles(
    keys_ptr, noisy_ptr, temperature_ptr, row, node, N, S, BLOCK_N: tl.constexpr, WALK_S: tl.constexpr
):
    """[BLOCK_N] each, from the tiles: the highest key, the id of the highest noisy logit, and no distribution."""
    inverse, greedy = inverse_temperature(temperature_ptr, row)
    best = tl.full([BLOCK_N], NO_KEY, tl.int64)
    for first in range(0, S, WALK_S):
        tile = first + tl.arange(0, WALK_S)
        at = (row * N + node)[None, :] * S + tile[:, None]
        keys = tl.load(keys_ptr + at, mask=(tile < S)[:, None] & (node < N)[None, :], other=NO_KEY)
        best = tl.maximum(best, tl.max(keys, 0))
    peak = value_of(order_in(best))
    bad = (order_in(best) == NAN_ORDER) | (tl.abs(peak) == float("inf"))
    chosen = tl.full([BLOCK_N], NO_KEY, tl.int64)
    for first in range(0, S, WALK_S):
        tile = first + tl.arange(0, WALK_S)
        at = (row * N + node)[None, :] * S + tile[:, None]
        mask = (tile < S)[:, None] & (node < N)[None, :]
        peaks = value_of(order_in(tl.load(keys_ptr + at, mask=mask, other=NO_KEY)))
        noisy = tl.load(noisy_ptr + at, mask=mask, other=NO_KEY)
        scores = tl.where(
            peaks == NEG_INF, NEG_INF, value_of(order_in(noisy)) + (peaks - peak[None, :]) * inverse
        )
        keys = tl.where(mask, key_of(order_of(scores), id_in(noisy)), NO_KEY)
        chosen = tl.maximum(chosen, tl.max(keys, 0))
    return best, tl.where(node < N, id_in(chosen), -1), bad


def accept_sample(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    rule: str,
    seeds: torch.Tensor,
    position: torch.Tensor,
    filters: Sequence[torch.Tensor | None],
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None,
    sampling: str,
    draft_logits: torch.Tensor | None,
    draft_row: torch.Tensor | None,
    draft_filters: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.accept_sample`, which checks the arguments. Reads nothing on the host.

    Logits may have any strides; loads are of 128 bits where the last is 1 and the others and V are multiples of 16.

    Returns:
        The fields of `reference.Acceptance`: path [B, D] int32, length [B] int64, next_ids [B] int64, has_nan [B] bool.
    """
    batch, nodes, vocab = logits.shape
    weighing = rule in WEIGHING
    if not weighing or draft_logits is None:
        sampling, draft_logits, draft_row, draft_filters = "none", None, None, (None,) * 4
    expanded = 0 if draft_logits is None else draft_logits.shape[1]
    temperature, *thresholds = filters = [_contiguous(option) for option in filters]
    draft_filters = [_contiguous(option) for option in draft_filters]
    has_thresholds = any(option is not None for option in thresholds)
    noise = None if weighing or has_thresholds else COUPLED if rule == "coupled" else BONUS
    has_laws = rule != "coupled" or has_thresholds

    tiles = triton.cdiv(vocab, BLOCK_V)
    rows = nodes + expanded

    def scratch(*shape, dtype=torch.float32, needed=True):
        return logits.new_empty((batch, *shape), dtype=dtype) if needed else None

    keys = scratch(rows, tiles, dtype=torch.int64)
    sums = scratch(rows, tiles, needed=has_laws)
    noisy = scratch(nodes, tiles, dtype=torch.int64, needed=noise is not None)
    # targets first, then drafts
    floats = scratch(2 * nodes, 4, needed=weighing)
    ints = scratch(2 * nodes, 2, dtype=torch.int32, needed=weighing)
    bad = scratch(nodes, dtype=torch.bool, needed=has_laws)
    chance = scratch(nodes, needed=rule != "coupled")
    cut = scratch(nodes, needed=weighing)
    passing = scratch(nodes, needed=rule == "traversal")
    chosen = scratch(nodes, dtype=torch.int32, needed=has_laws and not weighing)
    masses = scratch(nodes, tiles, needed=rule == "block")
    drawn = scratch(*([nodes] if rule == "block" else []), tiles, dtype=torch.int64, needed=weighing)
    path = scratch(max_depth, dtype=torch.int32)
    length, next_ids = scratch(dtype=torch.int64), scratch(dtype=torch.int64)
    has_nan = scratch(dtype=torch.bool)

    tokens, parents, seeds, position, budget, eos_ids, draft_row = (
        _contiguous(tensor) for tensor in (tokens, parents, seeds, position, budget, eos_ids, draft_row)
    )
    strides = (*logits.stride(), *((0, 0, 0) if draft_logits is None else draft_logits.stride()))
    blocks = _blocks(nodes, tiles)
    block_n, block_s = {"BLOCK_N": blocks["BLOCK_N"]}, {"BLOCK_S": blocks["BLOCK_S"]}
    rows_a_program = 1 if noise is None else NODES_A_PROGRAM
    with launching_on(logits):
        _statistics_kernel[(tiles, triton.cdiv(rows, rows_a_program), batch)](
            keys, sums, noisy, logits, draft_logits, parents, seeds, position, temperature, draft_filters[0],
            *strides, nodes, expanded, vocab, tiles,
            NOISE=noise, ROWS=rows_a_program, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
        if has_laws:
            _laws_kernel[(nodes, batch)](
                floats, ints, bad, chance, cut, passing, chosen, keys, sums, noisy,
                logits, draft_logits, draft_row, tokens, parents, seeds, position, *filters, *draft_filters,
                *strides, nodes, expanded, vocab, tiles,
                RULE=rule, SAMPLING=sampling, SHIFT=SHIFTS[logits.dtype],
                DRAFT_SHIFT=0 if draft_logits is None else SHIFTS[draft_logits.dtype],
                **block_n, **block_s, BLOCK_V=BLOCK_V, num_warps=LAW_WARPS, **FP_FUSION,
            )  # fmt: skip
        for depth in range(1, max_depth) if rule == "traversal" else ():
            _weights_kernel[(nodes, batch)](
                chance, cut, passing, floats, ints, logits, draft_logits, draft_row, tokens, parents,
                *strides, nodes, vocab, depth,
                SAMPLING=sampling, **block_n, BLOCK_V=BLOCK_V, num_warps=LAW_WARPS, **FP_FUSION,
            )  # fmt: skip
        if weighing:
            _draws_kernel[(tiles, nodes if rule == "block" else 1, batch)](
                drawn, masses, chance, cut, passing, keys, floats, ints,
                logits, draft_logits, draft_row, tokens, parents, seeds, position, *strides,
                nodes, expanded, vocab, tiles,
                RULE=rule, SAMPLING=sampling, **block_n, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS, **FP_FUSION,
            )  # fmt: skip
        _walk_kernel[(batch,)](
            path, length, next_ids, has_nan, chance, passing, masses, drawn, chosen, bad, keys, noisy,
            temperature, tokens, parents, seeds, position, budget, eos_ids,
            nodes, vocab, tiles, max_depth, 0 if eos_ids is None else eos_ids.shape[0],
            RULE=rule, **blocks, num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return path, length, next_ids, has_nan


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _blocks(nodes: int, tiles: int) -> dict[str, int]:
    block_n = max(16, pow2(nodes))
    return {"BLOCK_N": block_n, "BLOCK_S": max(16, pow2(tiles)), "WALK_S": max(1, WALK_KEYS // block_n)}


_FILTERS = dict(zip(("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"), ("*fp32", "*i64", "*fp32", "*fp32"), strict=True))
_THRESHOLDS = {"": {}, " temperature": {"temperature_ptr": "*fp32:16"}}
_THRESHOLDS[" filtered"] = {name: f"{dtype}:16" for name, dtype in _FILTERS.items()}


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration on a CUDA architecture, for 64 nodes; the same on all of them."""
    pointers = {"keys_ptr": "*i64", "sums_ptr": "*fp32", "noisy_ptr": "*i64", "floats_ptr": "*fp32", "ints_ptr": "*i32"}
    pointers |= {"bad_ptr": "*i1", "chance_ptr": "*fp32", "cut_ptr": "*fp32", "pass_ptr": "*fp32", "drawn_ptr": "*i64"}
    pointers |= {"chosen_ptr": "*i32", "masses_ptr": "*fp32", "tokens_ptr": "*i64", "parents_ptr": "*i32"}
    pointers |= {"seeds_ptr": "*i64", "position_ptr": "*i64", "budget_ptr": "*i64", "eos_ids_ptr": "*i64"}
    pointers |= {"path_ptr": "*i32", "length_ptr": "*i64", "next_ids_ptr": "*i64", "has_nan_ptr": "*i1"}
    pointers = {name: f"{dtype}:16" for name, dtype in pointers.items()}
    common = pointers | dict.fromkeys(("stride_b", "stride_n", "draft_stride_b", "draft_stride_p", "N", "P", "V"), "i32:16")
    common |= {"stride_v": 1, "draft_stride_v": 1, "S": "i32", "D": "i32", "E": "i32", "depth": "i32"}
    common |= {"BLOCK_V": BLOCK_V, **_blocks(64, 63), "DRAFT_SHIFT": 0}

    def case(name, kernel, arguments, warps, wide_loads=True):
        arguments = common | arguments
        signature = {key: arguments[key] for key in kernel.arg_names if key not in ("RULE", "SAMPLING") and isinstance(arguments.get(key), str)}
        constexprs = {key: arguments.get(key) for key in kernel.arg_names if key not in signature}
        return CompileCase(name, kernel, signature, constexprs, {"num_warps": warps, **FP_FUSION}, wide_loads=wide_loads)

    def target(dtype, odd=False):
        narrow = dict.fromkeys(("stride_b", "stride_n", "draft_stride_b", "draft_stride_p", "V"), "i32") if odd else {}
        return {"logits_ptr": f"*{dtype}:16", "SHIFT": SHIFTS[getattr(torch, _TORCH[dtype])], **narrow}

    def drafted(dtype):
        draft = {f"draft_{name}": value for name, value in _THRESHOLDS[" filtered"].items()}
        draft |= {"draft_logits_ptr": f"*{dtype}:16", "draft_row_ptr": "*i32:16"}
        return draft | {"DRAFT_SHIFT": SHIFTS[getattr(torch, _TORCH[dtype])]}

    for dtype, (noise, rows) in itertools.product(_TORCH, ((None, 1), (COUPLED, NODES_A_PROGRAM), (BONUS, NODES_A_PROGRAM))):
        kind = {"NOISE": noise, "ROWS": rows, **_THRESHOLDS[" temperature"]}
        kind |= {"noisy_ptr": None} if noise is None else {"sums_ptr": None} if noise is COUPLED else {}
        name = "plain" if noise is None else "coupled" if noise is COUPLED else "typical"
        yield case(f"{dtype} statistics {name}", _statistics_kernel, target(dtype) | kind, NUM_WARPS)
        yield case(f"{dtype} statistics {name} odd V", _statistics_kernel, target(dtype, True) | kind, NUM_WARPS, False)
        if noise is None:
            yield case(f"{dtype} statistics drafted", _statistics_kernel, target(dtype) | drafted(dtype) | kind, NUM_WARPS)
    for dtype, rule in itertools.product(_TORCH, ("coupled", "typical")):
        laws = target(dtype) | {"RULE": rule, "SAMPLING": "none", "noisy_ptr": None, **_THRESHOLDS[" filtered"]}
        yield case(f"{dtype} laws {rule} filtered", _laws_kernel, laws, LAW_WARPS)
    for dtype, rule, sampling in itertools.product(_TORCH, WEIGHING, ("none", "with", "without")):
        if dtype == "fp16" and (rule, sampling) != ("multi_round", "without"):
            continue
        kind = target(dtype) | {"RULE": rule, "SAMPLING": sampling} | ({} if sampling == "none" else drafted(dtype))
        name = f"{rule} {sampling}"
        laws = kind | {"noisy_ptr": None} | _THRESHOLDS[" filtered"]
        yield case(f"{dtype} laws {name} filtered", _laws_kernel, laws, LAW_WARPS)
        if rule == "traversal":
            yield case(f"{dtype} weights {name}", _weights_kernel, kind, LAW_WARPS)
        yield case(f"{dtype} draws {name}", _draws_kernel, kind, NUM_WARPS)
    for rule, nodes in itertools.product(("coupled", "typical", *WEIGHING), (16, 64, 256)):
        kind = {"RULE": rule, **_blocks(nodes, 63), **({"bad_ptr": None, "chosen_ptr": None} if rule == "coupled" else {})}
        yield case(f"walk {rule} n{nodes}", _walk_kernel, kind, NUM_WARPS, False)


_TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
