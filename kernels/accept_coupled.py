"""Sampled acceptance by rules that need no draft probabilities: "coupled" and "typical".

The target's token after a node is the token with the highest noisy logit (Gumbel-max sampling). Under "coupled" the
nodes of one depth use the same noise, and the walk follows the target's tokens, as in greedy acceptance. Under
"typical" each node is kept or dropped by its own probability, and only the token after the path is sampled.

The launches are the following. "Filtered" means with top-k, top-p or min-p, regardless of the temperature.

    statistics  A program computes, for one tile of the vocabulary, the highest logit and the sum of exponentials. If
                filtered, it handles one row. If unfiltered, it handles several rows one after another, and also
                computes their highest noisy logits.
    rows        Not used by unfiltered "coupled". A program computes, for one row, its distribution, the target's token
                and the children that are kept.
    walk        A program computes, for one sequence, the path, the token after it, and the cut at EOS and budget.

Letters: B sequences, N tree nodes, V vocabulary, S = ceil(V / BLOCK_V) tiles, D edges on the longest path, E ids that
end the text. Reference: `specdec_triton.ops.reference.accept_sample`.
"""

import torch
import triton
import triton.language as tl

from ._filters import Filters, is_invalid, log_prob_of, log_probs, row_distribution
from ._keys import MAX_ID, NAN_ORDER, NEG_INF, NO_KEY, highest_score, id_in, key_of, order_in, order_of, value_of
from ._launch import COUNTS, block_of
from ._noise import BONUS, COUPLED, gumbel
from ._rows import (
    BLOCK_V,
    ROW_OPTIONS,
    Statistics,
    load_inverse_temperature,
    load_raw,
    logits_argument,
    row_of,
    row_scores,
    row_statistics,
    statistics_options,
    tile_scores,
)
from ._tree import (
    WALK_OPTIONS,
    Acceptance,
    Inputs,
    depth_of,
    depths_of,
    emit_path,
    follow_targets,
    load_tree,
    new_acceptance,
)

RULES = ("coupled", "typical")

TYPICAL_EPSILON: tl.constexpr = tl.constexpr(0.09)
TYPICAL_DELTA: tl.constexpr = tl.constexpr(0.3)

# A program handles this many nodes one after another; nodes of one depth reuse the noise. Chosen by compile reports.
# Timed on an H200, without alternatives: 41 us for 64 rows of 128k ids in bf16 (coupled).
NODES_A_PROGRAM = 8
WALK_KEYS = 1024  # number of keys that the walk holds at once


@triton.jit(do_not_specialize=COUNTS)
def noisy_statistics_kernel(
    statistics,  # Statistics, out; sums is None under coupled
    logits,  # Logits [B, N, V]
    inputs,  # Inputs
    temperature_ptr,  # [B] fp32, or None
    N, V, S,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,  # rows per program
    BLOCK_N: tl.constexpr,  # None unless coupled
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first_id = tile * BLOCK_V
    ids = first_id + tl.arange(0, BLOCK_V)
    first_row = tl.program_id(1) * ROWS
    end = tl.minimum(first_row + ROWS, N)
    # added before the loop, because it would spill in the loop on sm_100 (compile report)
    out = batch * N * S + tile
    keys_ptr, noisy_ptr = statistics.keys + out, statistics.noisy + out
    if RULE == "typical":
        sums_ptr = statistics.sums + out
    inverse, greedy = load_inverse_temperature(temperature_ptr, batch)
    # the logits of the next row are loaded while a row is processed
    coming = load_raw(row_of(logits, batch, first_row, V), ids)
    place = tl.arange(0, ROWS)
    if RULE == "coupled":
        # only the depths of this program's rows; keeping all depths would halve the occupancy (compile report)
        depths = tl.gather(depths_of(inputs.parents, batch, N, BLOCK_N), tl.minimum(first_row + place, BLOCK_N - 1), 0)
    else:
        position = tl.load(inputs.position + batch)
    noise = tl.zeros([BLOCK_V], tl.float32)
    noise_depth = tl.full((), -1, tl.int32)
    for row in range(first_row, end):
        # loaded for each row, because otherwise the compiler keeps all Philox keys in registers during the loop
        seed = tl.load(inputs.seeds + batch)
        # before the logits are converted to fp32, because they may still be loading and take fewer registers
        if RULE == "coupled":
            position = tl.load(inputs.position + batch)
            depth = tl.max(tl.where(place == row - first_row, depths, 0), 0)
            if depth != noise_depth:
                noise = gumbel(seed, position + 1 + depth, 0, COUPLED, first_id, BLOCK_V)
                noise_depth = depth
        else:
            noise = gumbel(seed, position, row, BONUS, first_id, BLOCK_V)
        values = coming.to(tl.float32)
        coming = load_raw(row_of(logits, batch, tl.minimum(row + 1, end - 1), V), ids)
        key, scores = tile_scores(values, inverse, first_id, BLOCK_V)
        tl.store(keys_ptr + row * S, key)
        if RULE == "typical":
            tl.store(sums_ptr + row * S, tl.sum(tl.exp(scores), 0))
        scores += tl.where(greedy, 0.0, noise)
        tl.store(noisy_ptr + row * S, highest_score(scores, first_id, V, BLOCK_V))


@triton.jit(do_not_specialize=COUNTS)
def rows_kernel(
    chosen_ptr,  # [B, N] int32, out: the target's token
    invalid_ptr,  # [B, N] bool, out: True if the logits do not define a distribution
    kept_ptr,  # [B, N] bool, out, written at the node's children (typical)
    statistics,  # Statistics; with noisy if unfiltered
    logits,  # Logits [B, N, V]
    filters,  # Filters
    inputs,  # Inputs
    N, V, S,
    RULE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    index = batch * N + here
    target = row_distribution(row_of(logits, batch, here, V), statistics, index, batch, S, filters, BLOCK_S, BLOCK_V)
    tl.store(invalid_ptr + index, is_invalid(target))
    if RULE == "typical":
        entropies = tl.zeros([BLOCK_V], tl.float32)
        for first_id in range(0, V, BLOCK_V):
            found = log_probs(target, first_id + tl.arange(0, BLOCK_V))
            entropies -= tl.where(found == NEG_INF, 0.0, tl.exp(found) * found)
        least = tl.minimum(TYPICAL_DELTA * tl.exp(-tl.sum(entropies, 0)), TYPICAL_EPSILON)
        tree = load_tree(inputs, batch, N, V, False, BLOCK_N)
        # the children of a node without a distribution are not kept
        kept = (tl.exp(log_prob_of(target, tl.maximum(tree.tokens, 0))) > least) & (is_invalid(target) == 0)
        tl.store(kept_ptr + batch * N + tree.node, kept, mask=tree.parents == here)
    if statistics.noisy is not None:
        chosen = _best_tile(statistics, index, S, target.inverse_temperature, BLOCK_S)
    else:
        seed, position = tl.load(inputs.seeds + batch), tl.load(inputs.position + batch)
        if RULE == "coupled":
            depth = depth_of(inputs.parents, batch, here, N, BLOCK_N)
            chosen = _sampled(target, statistics.keys + index * S, seed, position + 1 + depth, 0, COUPLED, BLOCK_V)
        else:
            chosen = _sampled(target, statistics.keys + index * S, seed, position, here, BONUS, BLOCK_V)
    tl.store(chosen_ptr + index, chosen)


@triton.jit
def _best_tile(statistics, index, S, inverse_temperature, BLOCK_S: tl.constexpr):
    """The id of a row's highest noisy logit, from the tiles' highest noisy scores, which are relative to each tile's
    highest logit."""
    tile = tl.arange(0, BLOCK_S)
    keys = tl.load(statistics.keys + index * S + tile, mask=tile < S, other=NO_KEY)
    noisy = tl.load(statistics.noisy + index * S + tile, mask=tile < S, other=NO_KEY)
    peaks = tl.where(tile < S, value_of(order_in(keys)), NEG_INF)
    scores = row_scores(noisy, peaks, tl.max(peaks, 0), inverse_temperature)
    return id_in(tl.max(tl.where(tile < S, key_of(order_of(scores), id_in(noisy)), NO_KEY), 0))


@triton.jit
def _sampled(target, keys_ptr, seed, position, node, PURPOSE: tl.constexpr, BLOCK_V: tl.constexpr):
    """The id of the highest noisy log-probability of a row. Tiles below the threshold are skipped."""
    lane = tl.arange(0, BLOCK_V)
    best, best_ids = tl.full([BLOCK_V], NEG_INF, tl.float32), tl.full([BLOCK_V], MAX_ID, tl.int32)
    for first_id in range(0, target.row.V, BLOCK_V):
        if value_of(order_in(tl.load(keys_ptr + first_id // BLOCK_V))) >= target.threshold:
            ids = first_id + lane
            scores = log_probs(target, ids) + gumbel(seed, position, node, PURPOSE, first_id, BLOCK_V)
            higher = scores > best
            best, best_ids = tl.where(higher, scores, best), tl.where(higher, ids, best_ids)
    best_score = tl.max(best, 0)
    return tl.minimum(tl.min(tl.where(best == best_score, best_ids, MAX_ID), 0), target.row.V - 1)


@triton.jit(do_not_specialize=COUNTS)
def walk_kernel(
    out,  # Acceptance
    chosen_ptr,  # [B, N] int32; None under unfiltered coupled
    invalid_ptr,  # [B, N] bool; None under unfiltered coupled
    kept_ptr,  # [B, N] bool; None unless typical
    statistics,  # Statistics with noisy; None unless unfiltered coupled
    temperature_ptr,  # [B] fp32, or None
    inputs,  # Inputs
    budget_ptr,  # [B] int64
    eos_ids_ptr,  # [E] int64, or None
    N, V, S, D, E,
    RULE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tree = load_tree(inputs, row, N, V, False, BLOCK_N)
    budget = tl.load(budget_ptr + row)
    if chosen_ptr is None:
        chosen, invalid = _best_tiles(statistics, temperature_ptr, row, tree.node, N, S, BLOCK_N, BLOCK_S)
    else:
        chosen = tl.load(chosen_ptr + row * N + tree.node, mask=tree.node < N, other=-1)
        invalid = tl.load(invalid_ptr + row * N + tree.node, mask=tree.node < N, other=0) != 0
    if RULE == "coupled":
        follow_targets(out, tree, chosen, invalid, budget, eos_ids_ptr, row, D, E, BLOCK_N)
    else:
        # nothing was written at the root and at padding nodes
        kept = tl.load(kept_ptr + row * N + tree.node, mask=tree.parents >= 0, other=0) != 0
        last = _deepest_kept(tree, kept, N)
        next_id = tl.max(tl.where(tree.node == last, chosen, -1), 0)
        emit_path(out, tree, last, next_id, invalid, budget, eos_ids_ptr, row, N, D, E, BLOCK_N)


@triton.jit
def _best_tiles(statistics, temperature_ptr, row, node, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """From the tiles of each node: [BLOCK_N] ids of the highest noisy logits, and [BLOCK_N] bool, True if the logits do
    not define a distribution."""
    inverse, _ = load_inverse_temperature(temperature_ptr, row)
    # the reduction is after each loop; in the loop, every load would wait for the previous one
    best = tl.full([BLOCK_S, BLOCK_N], -(2**31), tl.int32)
    for first in range(0, S, BLOCK_S):
        tile = first + tl.arange(0, BLOCK_S)
        at = (row * N + node)[None, :] * S + tile[:, None]
        keys = tl.load(statistics.keys + at, mask=(tile < S)[:, None] & (node < N)[None, :], other=NO_KEY)
        best = tl.maximum(best, order_in(keys))
    order = tl.max(best, 0)
    peak = value_of(order)
    invalid = (order == NAN_ORDER) | (tl.abs(peak) == float("inf"))
    chosen = tl.full([BLOCK_S, BLOCK_N], NO_KEY, tl.int64)
    for first in range(0, S, BLOCK_S):
        tile = first + tl.arange(0, BLOCK_S)
        at = (row * N + node)[None, :] * S + tile[:, None]
        mask = (tile < S)[:, None] & (node < N)[None, :]
        peaks = value_of(order_in(tl.load(statistics.keys + at, mask=mask, other=NO_KEY)))
        noisy = tl.load(statistics.noisy + at, mask=mask, other=NO_KEY)
        scores = row_scores(noisy, peaks, peak[None, :], inverse)
        chosen = tl.maximum(chosen, tl.where(mask, key_of(order_of(scores), id_in(noisy)), NO_KEY))
    return tl.where(node < N, id_in(tl.max(chosen, 0)), -1), invalid


@triton.jit
def _deepest_kept(tree, kept, N):
    """The deepest node that is kept together with all its ancestors; the first one among equally deep nodes."""
    depth = tl.where(tree.node == 0, 0, -1)
    for child in range(1, N):
        parent = tl.max(tl.where(tree.node == child, tree.parents, -1), 0)
        above = tl.max(tl.where(tree.node == parent, depth, -1), 0)
        reached = (above >= 0) & (tl.max(((tree.node == child) & kept).to(tl.int32), 0) > 0)
        depth = tl.where((tree.node == child) & reached, above + 1, depth)
    return tl.min(tl.where(depth == tl.max(depth, 0), tree.node, N), 0)


def accept_coupled(
    logits: torch.Tensor,
    inputs: Inputs,
    rule: str,
    filters: Filters,
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None,
) -> Acceptance:
    """`accept_sample` under "coupled" and "typical"."""
    batch, nodes, vocab = logits.shape
    tiles, block_n = triton.cdiv(vocab, BLOCK_V), block_of(nodes)
    is_coupled, is_filtered = rule == "coupled", any(option is not None for option in filters[1:])
    chosen = invalid = kept = None
    out = new_acceptance(logits, max_depth)
    if is_filtered:
        statistics = row_statistics(logits, filters.temperature)
    else:
        keys = logits.new_empty((batch, nodes, tiles), dtype=torch.int64)
        sums = None if is_coupled else torch.empty_like(keys, dtype=torch.float32)
        statistics = Statistics(keys, sums, noisy=torch.empty_like(keys))
        noisy_statistics_kernel[tiles, triton.cdiv(nodes, NODES_A_PROGRAM), batch](
            statistics, logits_argument(logits), inputs, filters.temperature, nodes, vocab, tiles,
            RULE=rule, ROWS=NODES_A_PROGRAM, BLOCK_N=block_n if is_coupled else None, BLOCK_V=BLOCK_V,
            **statistics_options(logits),
        )  # fmt: skip
    if is_filtered or not is_coupled:
        chosen = logits.new_empty((batch, nodes), dtype=torch.int32)
        invalid = torch.empty_like(chosen, dtype=torch.bool)
        kept = None if is_coupled else torch.empty_like(invalid)
        rows_kernel[nodes, batch](
            chosen, invalid, kept, statistics, logits_argument(logits), filters, inputs, nodes, vocab, tiles,
            RULE=rule, BLOCK_N=block_n, BLOCK_S=block_of(tiles), BLOCK_V=BLOCK_V, **ROW_OPTIONS,
        )  # fmt: skip
        statistics = None
    walk_kernel[batch,](
        out, chosen, invalid, kept, statistics, filters.temperature if chosen is None else None,
        inputs, budget, eos_ids, nodes, vocab, tiles, max_depth, 0 if eos_ids is None else eos_ids.shape[0],
        RULE=rule, BLOCK_N=block_n, BLOCK_S=max(1, WALK_KEYS // block_n), **WALK_OPTIONS,
    )  # fmt: skip
    return out
