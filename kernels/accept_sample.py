"""Sampled acceptance: from logits to the accepted path, with no probability ever written.

The launches, and which rules have them ("filtered": with top-k, top-p or min-p; temperature is no matter):

    statistics  all. One tile of the vocabulary of one row: its highest logit, its sum of exponentials and, for
                unfiltered `coupled` and `typical`, its highest noisy logit.
    laws        all but unfiltered `coupled`. One row: what temperature and thresholds come to (`_law`); the chances of
                the node's children, one after the other; for filtered `coupled` and `typical`, the highest noisy logit.
    weights     `traversal`. The chances of children at the nodes of one depth: a launch for each depth below the root.
    draws       `rejection`, `block`, `multi_round`, `traversal`. One tile of the vocabulary at the node where the walk
                ends: the highest noisy residual. `block` knows that node by the residuals' masses only: all nodes.
    walk        all. One sequence: the walk, the token after it, EOS and budget.

Letters: B sequences, N tree nodes, P expanded nodes, V vocabulary, S = ceil(V / BLOCK_V) tiles, D edges on the longest
path, E ids that end the text. Reference: `specdec_triton.ops.reference.accept_sample`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._chances import depth_of, depths_of, prob_of, tree_of, was_drawn, weigh_children
from ._common import COUNTS, FP_FUSION, MAX_ID, NAN_ORDER, NO_KEY, CompileCase, launching_on, pow2
from ._law import (
    NEG_INF,
    highest,
    id_in,
    inverse_temperature,
    key_of,
    law_of,
    load_law,
    load_logits,
    load_raw,
    log_probs,
    order_in,
    order_of,
    store_law,
    value_of,
)
from ._noise import BONUS, COUPLED, gumbel
from ._walk import draws_kernel, walk_kernel

TYPICAL_EPSILON: tl.constexpr = tl.constexpr(0.09)
TYPICAL_DELTA: tl.constexpr = tl.constexpr(0.3)

# One tile size in every launch and for every shape: what a row comes to depends on its own logits only. Of the nodes
# that a program takes one after the other, those of one depth share their noise. Chosen by compile reports; timed on an
# H200, without alternatives: 41 us for 64 rows of 128k ids in bf16 (coupled).
BLOCK_V = 2048
NODES_A_PROGRAM = 8
NUM_WARPS = 4
# Left alone, the compiler takes up to 215 registers. With 128, four programs fit on a multiprocessor; if V or a stride
# allows only narrow loads, that spills.
STATISTICS_REGISTERS, NARROW_REGISTERS = 128, 168
# Left alone, the compiler aims at 128 registers and spills one or two
LAW_OPTIONS = {"num_warps": 8, "maxnreg": 168, **FP_FUSION}
# Left alone, Triton 3.6 aims at 32 registers and spills two; a multiprocessor has them to spare for one program
WALK_OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": 128, **FP_FUSION}
WALK_KEYS = 1024  # keys the walk holds at once

SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
WEIGHING = ("rejection", "block", "multi_round", "traversal")


@triton.jit(do_not_specialize=COUNTS)
def _statistics_kernel(
    keys_ptr,  # [B, N + P, S] int64, out
    sums_ptr,  # [B, N + P, S] fp32, out; None if NOISE is COUPLED
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
    BLOCK_N: tl.constexpr,  # power of two >= N; None unless NOISE is COUPLED
    BLOCK_V: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first = tile * BLOCK_V
    ids = first + tl.arange(0, BLOCK_V)
    row = tl.program_id(1) * ROWS
    end = tl.minimum(row + ROWS, N + P)
    keys_ptr += batch * (N + P) * S + tile
    if sums_ptr is not None:
        sums_ptr += batch * (N + P) * S + tile
    start = logits_ptr + batch * stride_b
    inverse, greedy = inverse_temperature(temperature_ptr, batch)
    if NOISE is None:
        logits = tl.full([BLOCK_V], NEG_INF, tl.float32)
        if draft_logits_ptr is not None:
            if row >= N:
                draft_start = draft_logits_ptr + batch * draft_stride_b + (row - N).to(tl.int64) * draft_stride_p
                logits = load_logits(draft_start, draft_stride_v, ids, V)
                inverse, greedy = inverse_temperature(draft_temperature_ptr, batch)
            else:
                logits = load_logits(start + row.to(tl.int64) * stride_n, stride_v, ids, V)
        else:
            logits = load_logits(start + row.to(tl.int64) * stride_n, stride_v, ids, V)
        key, scores = _scores_of(logits, inverse, first, BLOCK_V)
        tl.store(keys_ptr + row * S, key)
        tl.store(sums_ptr + row * S, tl.sum(tl.exp(scores), 0))
    else:
        tl.static_assert(draft_logits_ptr is None)
        noisy_ptr += batch * N * S + tile
        # the next row's logits are loaded while one row is worked on
        coming = load_raw(start + row.to(tl.int64) * stride_n, stride_v, ids, V)
        place = tl.arange(0, ROWS)
        if NOISE == COUPLED:
            # of this program's rows alone: the depths of all would cost half of the occupancy (compile report)
            depths = tl.gather(depths_of(parents_ptr, batch, N, BLOCK_N), tl.minimum(row + place, BLOCK_N - 1), 0)
        else:
            position = tl.load(position_ptr + batch)
        noise = tl.zeros([BLOCK_V], tl.float32)
        noise_of = tl.full((), -1, tl.int32)
        first_row = row
        for row in range(first_row, end):
            # loaded for each row: else the compiler keeps all keys of Philox in registers through the loop
            seed = tl.load(seeds_ptr + batch)
            # before the logits become fp32: they may still be loading, and take fewer registers
            if NOISE == COUPLED:
                position = tl.load(position_ptr + batch)
                depth = tl.max(tl.where(place == row - first_row, depths, 0), 0)
                if depth != noise_of:
                    noise = gumbel(seed, position + 1 + depth, 0, NOISE, first, BLOCK_V)
                    noise_of = depth
            else:
                noise = gumbel(seed, position, row, NOISE, first, BLOCK_V)
            logits = coming.to(tl.float32)
            following = tl.minimum(row + 1, end - 1).to(tl.int64)
            coming = load_raw(start + following * stride_n, stride_v, ids, V)
            key, scores = _scores_of(logits, inverse, first, BLOCK_V)
            tl.store(keys_ptr + row * S, key)
            if sums_ptr is not None:
                tl.store(sums_ptr + row * S, tl.sum(tl.exp(scores), 0))
            scores += tl.where(greedy, 0.0, noise)
            tl.store(noisy_ptr + row * S, highest(scores, first, V, BLOCK_V))


@triton.jit
def _scores_of(logits, inverse, first, BLOCK_V: tl.constexpr):
    """The highest key of a tile, and its scores: relative to its highest logit, at the row's temperature."""
    lane = tl.arange(0, BLOCK_V)
    peak = tl.max(logits, 0)
    # NaN lanes count before any other, whatever max made of them
    lead = tl.min(tl.where(logits != logits, lane - BLOCK_V, tl.where(logits == peak, lane, BLOCK_V)), 0)
    is_nan = lead < 0
    order = tl.where(is_nan, NAN_ORDER, order_of(peak))
    key = key_of(order, first + tl.where(is_nan, lead + BLOCK_V, lead))
    # differences from the tile's highest logit keep their digits, however large the logits are
    return key, tl.where(logits == NEG_INF, NEG_INF, (logits - peak) * inverse)


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


@triton.jit(do_not_specialize=COUNTS)
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
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,  # [B] fp32, int64, fp64, fp32, or None each
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
                depth = depth_of(parents_ptr, batch, here, N, BLOCK_N)
                chosen = _draw(
                    row_ptr, keys_ptr + keys_row, stride_v, V, law, seed, position + 1 + depth, 0, COUPLED, BLOCK_V
                )
            else:
                chosen = _draw(row_ptr, keys_ptr + keys_row, stride_v, V, law, seed, position, here, BONUS, BLOCK_V)
        tl.store(chosen_ptr + index, chosen)
    if RULE == "typical":
        node, parents, tokens = tree_of(parents_ptr, tokens_ptr, batch, N, V, RULE, BLOCK_N)
        entropies = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_V):
            ids = start + tl.arange(0, BLOCK_V)
            target = log_probs(load_logits(row_ptr, stride_v, ids, V), ids, law)
            entropies -= tl.where(target == NEG_INF, 0.0, tl.exp(target) * target)
        least = tl.minimum(TYPICAL_DELTA * tl.exp(-tl.sum(entropies, 0)), TYPICAL_EPSILON)
        # a node without a distribution has no children: NaN is not kept
        kept = prob_of(row_ptr, stride_v, tl.maximum(tokens, 0), law) > least
        tl.store(chance_ptr + batch * N + node, tl.where(bad, 0.0, kept.to(tl.float32)), mask=parents == here)
    if RULE == "rejection" or RULE == "block" or RULE == "multi_round" or RULE == "traversal":
        node, parents, tokens = tree_of(parents_ptr, tokens_ptr, batch, N, V, RULE, BLOCK_N)
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
            weigh_children(
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


@triton.jit(do_not_specialize=COUNTS)
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
    if depth_of(parents_ptr, batch, here, N, BLOCK_N) != depth:
        return
    node, parents, tokens = tree_of(parents_ptr, tokens_ptr, batch, N, V, "traversal", BLOCK_N)
    index = batch * N + here
    weight = tl.load(chance_ptr + index)
    has_children = tl.max((parents == here).to(tl.int32), 0) > 0
    if (has_children & was_drawn(weight)) & (tl.sum(tl.where(node == here, parents, 0), 0) >= 0):
        law = load_law(floats_ptr, ints_ptr, index)
        row_ptr = logits_ptr + batch * stride_b + here.to(tl.int64) * stride_n
        draft_start, draft_law = row_ptr, law
        if SAMPLING != "none":
            count = tl.num_programs(1).to(tl.int64) * N
            draft_law = load_law(floats_ptr, ints_ptr, count + index)
            draft_row = tl.maximum(tl.load(draft_row_ptr + index), 0).to(tl.int64)
            draft_start = draft_logits_ptr + batch * draft_stride_b + draft_row * draft_stride_p
        weigh_children(
            chance_ptr, cut_ptr, pass_ptr, row_ptr, stride_v, law, draft_start, draft_stride_v, draft_law,
            weight, node, parents, tokens, batch, here, N, V, "traversal", SAMPLING, BLOCK_V,
        )  # fmt: skip


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
    # what the host may know beside the four tensors is of no use here
    temperature, *thresholds = filters = [_contiguous(option) for option in filters[:4]]
    draft_filters = [_contiguous(option) for option in draft_filters[:4]]
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
            NOISE=noise, ROWS=rows_a_program, BLOCK_N=blocks["BLOCK_N"] if noise is COUPLED else None, BLOCK_V=BLOCK_V,
            **_statistics_options(wide=_loads_are_wide(logits)),
        )  # fmt: skip
        if has_laws:
            _laws_kernel[(nodes, batch)](
                floats, ints, bad, chance, cut, passing, chosen, keys, sums, noisy,
                logits, draft_logits, draft_row, tokens, parents, seeds, position, *filters, *draft_filters,
                *strides, nodes, expanded, vocab, tiles,
                RULE=rule, SAMPLING=sampling, SHIFT=SHIFTS[logits.dtype],
                DRAFT_SHIFT=0 if draft_logits is None else SHIFTS[draft_logits.dtype],
                **block_n, **block_s, BLOCK_V=BLOCK_V, **LAW_OPTIONS,
            )  # fmt: skip
        for depth in range(1, max_depth) if rule == "traversal" else ():
            _weights_kernel[(nodes, batch)](
                chance, cut, passing, floats, ints, logits, draft_logits, draft_row, tokens, parents,
                *strides, nodes, vocab, depth,
                SAMPLING=sampling, **block_n, BLOCK_V=BLOCK_V, **LAW_OPTIONS,
            )  # fmt: skip
        if weighing:
            draws_kernel[(tiles, nodes if rule == "block" else 1, batch)](
                drawn, masses, chance, cut, passing, keys, floats, ints,
                logits, draft_logits, draft_row, tokens, parents, seeds, position, *strides,
                nodes, expanded, vocab, tiles,
                RULE=rule, SAMPLING=sampling, **block_n, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS, **FP_FUSION,
            )  # fmt: skip
        walk_kernel[(batch,)](
            path, length, next_ids, has_nan, chance, passing, masses, drawn, chosen, bad, keys, noisy,
            temperature, tokens, parents, seeds, position, budget, eos_ids,
            nodes, vocab, tiles, max_depth, 0 if eos_ids is None else eos_ids.shape[0],
            RULE=rule, **blocks, **WALK_OPTIONS,
        )  # fmt: skip
    return path, length, next_ids, has_nan


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _loads_are_wide(logits: torch.Tensor) -> bool:
    """Whether Triton can load rows by 128 bits: by its rules, not by the itemsize."""
    multiples = logits.shape[2], *logits.stride()[:2], logits.data_ptr()
    return logits.stride(2) == 1 and all(number % 16 == 0 for number in multiples)


def _statistics_options(wide: bool) -> dict[str, Any]:
    registers = STATISTICS_REGISTERS if wide else NARROW_REGISTERS
    return {"num_warps": NUM_WARPS, "maxnreg": registers, **FP_FUSION}


def _blocks(nodes: int, tiles: int) -> dict[str, int]:
    block_n = max(16, pow2(nodes))
    return {"BLOCK_N": block_n, "BLOCK_S": max(16, pow2(tiles)), "WALK_S": max(1, WALK_KEYS // block_n)}


_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FILTERS = {"temperature_ptr": "*fp32", "top_k_ptr": "*i64", "top_p_ptr": "*fp64", "min_p_ptr": "*fp32"}
# what a pointer's name says of its type; all are aligned, since they are allocations or rows of a batch
_POINTERS = {
    "i64": ("keys", "noisy", "drawn", "tokens", "seeds", "position", "budget", "eos_ids", "length", "next_ids"),
    "fp32": ("sums", "floats", "chance", "cut", "pass", "masses"),
    "i32": ("ints", "chosen", "parents", "path"),
    "i1": ("bad", "has_nan"),
}
_STRIDES = ("stride_b", "stride_n", "draft_stride_b", "draft_stride_p")


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """The default configurations on a CUDA architecture, for V = 128,256; the same on all of them.

    Kernels see the rule and how a tree was sampled as constants: what compiles to the same code is listed once.
    """
    common = {f"{name}_ptr": f"*{dtype}:16" for dtype, names in _POINTERS.items() for name in names}
    common |= dict.fromkeys((*_STRIDES, "V"), "i32:16") | dict.fromkeys(COUNTS, "i32")
    common |= {"stride_v": 1, "draft_stride_v": 1, "BLOCK_V": BLOCK_V, "DRAFT_SHIFT": 0, **_blocks(64, 63)}
    options = {"num_warps": NUM_WARPS, **FP_FUSION}
    filters = {name: f"{dtype}:16" for name, dtype in _FILTERS.items()}

    def case(name, kernel, options, constants=None, wide_loads=True, **arguments):
        arguments, constants = common | arguments, constants or {}
        types = {name: arguments[name] for name in kernel.arg_names if isinstance(arguments.get(name), str)}
        rest = {name: constants.get(name, arguments.get(name)) for name in kernel.arg_names if name not in types}
        tiles = ("logits_ptr", "draft_logits_ptr") if kernel is draws_kernel else ("logits_ptr",)
        itemsizes = [4 if types[logits].startswith("*fp32") else 2 for logits in tiles if logits in types]
        tile_bytes = 0 if kernel is walk_kernel else BLOCK_V * sum(itemsizes)
        return CompileCase(name, kernel, types, rest, options, wide_loads=wide_loads, tile_bytes=tile_bytes)

    def target(dtype):
        return {"logits_ptr": f"*{dtype}:16", "SHIFT": SHIFTS[_TORCH[dtype]]}

    def drafted(dtype):
        draft = {f"draft_{name}": value for name, value in filters.items()}
        draft |= {"draft_logits_ptr": f"*{dtype}:16", "draft_row_ptr": "*i32:16"}
        return draft | {"DRAFT_SHIFT": SHIFTS[_TORCH[dtype]]}

    for dtype in _TORCH:
        for name, noise in (("plain", None), ("coupled", COUPLED), ("typical", BONUS)):
            kind = target(dtype) | {"NOISE": noise, "ROWS": 1 if noise is None else NODES_A_PROGRAM}
            kind |= {"temperature_ptr": filters["temperature_ptr"], **({} if noise is COUPLED else {"BLOCK_N": None})}
            kind |= {"noisy_ptr": None} if noise is None else {"sums_ptr": None} if noise is COUPLED else {}
            yield case(f"{dtype} statistics {name}", _statistics_kernel, _statistics_options(True), **kind)
            kind |= dict.fromkeys((*_STRIDES, "V"), "i32")
            yield case(
                f"{dtype} statistics {name} odd V",
                _statistics_kernel,
                _statistics_options(False),
                wide_loads=False,
                **kind,
            )
        kind = target(dtype) | drafted(dtype) | {"NOISE": None, "ROWS": 1, "BLOCK_N": None, "noisy_ptr": None}
        yield case(f"{dtype} statistics drafted", _statistics_kernel, _statistics_options(True), **kind)
        for rule in ("coupled", "typical"):
            kind = target(dtype) | filters | {"noisy_ptr": None}
            constants = {"RULE": rule, "SAMPLING": "none"}
            yield case(f"{dtype} laws {rule} filtered", _laws_kernel, LAW_OPTIONS, constants, **kind)
    weighed = [("bf16", rule, sampling) for rule in WEIGHING for sampling in ("none", "with")]
    weighed += [(dtype, rule, "without") for dtype in ("bf16", "fp32") for rule in ("multi_round", "traversal")]
    for dtype, rule, sampling in weighed:
        kind = target(dtype) | ({} if sampling == "none" else drafted(dtype))
        constants, name = {"RULE": rule, "SAMPLING": sampling}, f"{rule} {sampling}"
        yield case(
            f"{dtype} laws {name} filtered",
            _laws_kernel,
            LAW_OPTIONS,
            constants,
            **kind | filters | {"noisy_ptr": None},
        )
        if rule == "traversal":
            yield case(f"{dtype} weights {name}", _weights_kernel, LAW_OPTIONS, constants, **kind)
        yield case(f"{dtype} draws {name}", draws_kernel, options, constants, **kind)
    for rule, nodes in itertools.product(("coupled", "typical", "block", "multi_round", "traversal"), (64, 256)):
        kind = _blocks(nodes, 63) | ({"bad_ptr": None, "chosen_ptr": None} if rule == "coupled" else {})
        yield case(f"walk {rule} n{nodes}", walk_kernel, WALK_OPTIONS, {"RULE": rule}, wide_loads=False, **kind)
