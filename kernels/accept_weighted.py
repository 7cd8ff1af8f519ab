"""Sampled acceptance by rules that use draft probabilities.

These are "rejection" and "block" on chains, "multi_round" and "traversal" on trees. The children of a node are tried
one after another. The residual of a node is max(weight * target - draft_scale * draft, 0), without the tokens that were
tried. It is never stored, since it follows from two numbers and the tree. Three numbers per node determine the tests:

    accept_prob      The probability that the node is accepted when it is tried. NaN means that it is accepted. Under
                     "traversal" it is also the node's weight. Under "block" it is the ratio of target to draft.
                     NOT_DRAWN means that the node cannot be tried: it is padding, its token has draft probability 0, or
                     its parent has no distribution.
    draft_scale      The factor of the draft in the node's residual, after all its children were rejected.
    own_accept_prob  Only "traversal": the probability that the node itself is accepted after all its children were
                     rejected.

The launches are:

    statistics  One tile of the vocabulary for one row of the target or the draft (`_rows.row_statistics`).
    rows        One node: the distributions of its target and draft, and the test of each of its children, assuming that
                the children before were rejected.
    weights     Only "traversal": the tests of the children of the nodes of one depth. There is one launch for each
                depth below the root.
    draws       One tile of the vocabulary at the last node of the walk: the highest noisy score of the residual.
                Under "block", that node is only known after the masses of the residuals are, so all nodes are computed.
    walk        One sequence: the path, the token after it, and the cut at EOS and budget.

Letters: B sequences, N tree nodes, P expanded nodes, V vocabulary, S = ceil(V / BLOCK_V) tiles, D edges on the longest
path, E ids that end the text. References: `specdec_triton.ops.reference.accept_sample`, `specdec_triton.ops.rules`.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from ._filters import Distribution, Filters, is_invalid, log_prob_of, log_probs, row_distribution
from ._keys import MAX_ID, NEG_INF, NO_KEY, highest_score, id_in, key_of, order_of
from ._launch import COUNTS, FP_FUSION, block_of
from ._noise import ACCEPT, BONUS, RECOVER, gumbel, uniform
from ._rows import BLOCK_V, NUM_WARPS, ROW_OPTIONS, logits_argument, row_of, row_statistics
from ._tree import WALK_OPTIONS, Acceptance, Inputs, depth_of, emit_path, load_tree, new_acceptance

RULES = ("rejection", "block", "multi_round", "traversal")
CHAIN_RULES = ("rejection", "block")

# kernel argument: see above; [B, N] fp32 each
Tests = namedtuple("Tests", "accept_prob draft_scale own_accept_prob")

NOT_DRAWN: tl.constexpr = tl.constexpr(-1.0)  # value of accept_prob for nodes that cannot be tried
FROM_RESIDUAL: tl.constexpr = tl.constexpr(2**31)  # bit 31 of a key: set if the residual is not 0 in the whole tile
NUMBERS: tl.constexpr = tl.constexpr(6)  # number of values in a stored distribution


@triton.jit
def was_drawn(accept_prob):
    """True if the node can be tried. NaN counts as a probability."""
    return (accept_prob == NOT_DRAWN) == 0


@triton.jit
def _store_distribution(ptr, distribution):
    """Store a distribution, without its row, as [NUMBERS] int32."""
    tl.store(ptr, distribution.peak.to(tl.int32, bitcast=True))
    tl.store(ptr + 1, distribution.log_sum.to(tl.int32, bitcast=True))
    tl.store(ptr + 2, distribution.threshold.to(tl.int32, bitcast=True))
    tl.store(ptr + 3, distribution.inverse_temperature.to(tl.int32, bitcast=True))
    tl.store(ptr + 4, distribution.first_tie)
    tl.store(ptr + 5, distribution.greedy_id)


@triton.jit
def _load_distribution(ptr, row):
    peak = tl.load(ptr).to(tl.float32, bitcast=True)
    log_sum = tl.load(ptr + 1).to(tl.float32, bitcast=True)
    threshold = tl.load(ptr + 2).to(tl.float32, bitcast=True)
    inverse_temperature = tl.load(ptr + 3).to(tl.float32, bitcast=True)
    return Distribution(row, peak, log_sum, threshold, inverse_temperature, tl.load(ptr + 4), tl.load(ptr + 5))


@triton.jit
def _draft_row(draft_logits, draft_rows_ptr, batch, index, V):
    """The draft's logits that the children of node `index` = batch * N + node were drawn from."""
    return row_of(draft_logits, batch, tl.maximum(tl.load(draft_rows_ptr + index), 0), V)


@triton.jit
def _untried(ids, first_id, tried, BLOCK_V: tl.constexpr):
    """[BLOCK_V] bool: True for ids of a tile that are not in `tried` [BLOCK_N] int32, in which -1 means no token."""
    untried = ids >= 0
    inside = (tried >= first_id) & (tried < first_id + BLOCK_V)
    token = tl.min(tl.where(inside, tried, MAX_ID), 0)
    while token < MAX_ID:
        untried &= ids != token
        token = tl.min(tl.where(inside & (tried > token), tried, MAX_ID), 0)
    return untried


@triton.jit
def _residual(weight, target_log_probs, draft_scale, draft_log_probs):
    """max(weight * target - draft_scale * draft, 0), or NaN if the difference is NaN. The second term is 0 if the draft
    probability is 0, whatever draft_scale is."""
    draft_probs = tl.exp(draft_log_probs)
    rest = weight * tl.exp(target_log_probs) - tl.where(draft_probs > 0, draft_scale * draft_probs, 0.0)
    return tl.where(rest <= 0, 0.0, rest)


@triton.jit
def _masses_left(target, draft, weight, draft_scale, tried, SAMPLING: tl.constexpr, BLOCK_V: tl.constexpr):
    """Masses of the residual and of the draft over the tokens that were not tried. The draft's mass is 1 if siblings
    were drawn with replacement."""
    residual_sums, draft_sums = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for first_id in range(0, target.row.V, BLOCK_V):
        ids = first_id + tl.arange(0, BLOCK_V)
        untried = _untried(ids, first_id, tried, BLOCK_V)
        target_log_probs = log_probs(target, ids)
        if SAMPLING == "none":
            residual_sums += tl.where(untried, weight * tl.exp(target_log_probs), 0.0)
        else:
            draft_log_probs = log_probs(draft, ids)
            rest = _residual(weight, target_log_probs, draft_scale, draft_log_probs)
            residual_sums += tl.where(untried, rest, 0.0)
            if SAMPLING == "without":
                draft_sums += tl.where(untried, tl.exp(draft_log_probs), 0.0)
    draft_mass = tl.sum(draft_sums, 0) if SAMPLING == "without" else 1.0
    return tl.sum(residual_sums, 0), draft_mass


@triton.jit
def _test_children(
    tests, target, draft, weight, tree, batch, here, N,
    RULE: tl.constexpr, SAMPLING: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute the tests of the children of node `here`, each assuming that the children before it were rejected.

    It stores accept_prob at the children, draft_scale at the node, and own_accept_prob at the node and its children.
    """
    node, tokens = tree.node, tree.tokens
    is_child = tree.parents == here
    if is_invalid(target):
        tl.store(tests.accept_prob + batch * N + node, NOT_DRAWN, mask=is_child)
        is_child = node < 0
    residual_mass, missing_mass = weight, 1 - weight
    draft_mass, draft_scale = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float32)
    tried = tl.full(node.shape, -1, tl.int32)
    is_stale = here < 0  # True if a child was tried since the masses were summed; False at first
    if SAMPLING == "none":
        # the mass of tokens that no child carries, computed once; and the mass of each child's token, which is stored
        # at the first child with that token
        untaken, _ = _masses_left(target, draft, weight, draft_scale, tl.where(is_child, tokens, -1), SAMPLING, BLOCK_V)
        shares = tl.where(is_child, weight * tl.exp(log_prob_of(target, tl.maximum(tokens, 0))), 0.0)
        child = tl.min(tl.where(is_child, node, N), 0)
        while child < N:
            token = tl.max(tl.where(node == child, tokens, -1), 0)
            shares = tl.where((tokens == token) & (node > child), 0.0, shares)
            child = tl.min(tl.where(is_child & (node > child), node, N), 0)
    child = tl.min(tl.where(is_child, node, N), 0)
    while child < N:
        token = tl.max(tl.where(node == child, tokens, -1), 0)
        again = tl.max((tried == token).to(tl.int32), 0) > 0
        target_log_prob = log_prob_of(target, token)
        if SAMPLING == "none":
            residual = tl.where(again, 0.0, weight * tl.exp(target_log_prob))
            draft_prob, drawn = tl.full((), 1.0, tl.float32), here >= 0
        else:
            if is_stale:
                residual_mass, draft_mass = _masses_left(target, draft, weight, draft_scale, tried, SAMPLING, BLOCK_V)
                is_stale = here < 0
            draft_log_prob = log_prob_of(draft, token)
            draft_prob = tl.exp(draft_log_prob)
            # by way of an integer, because the interpreter turns a scalar comparison into a float next to a vector
            drawn = (draft_prob > 0).to(tl.int32) > 0
            if SAMPLING == "without":
                drawn = drawn & (again == 0)
            residual = tl.where(again, 0.0, _residual(weight, target_log_prob, draft_scale, draft_log_prob))
        total = residual_mass + missing_mass
        ratio = residual * draft_mass / (total * draft_prob)
        if RULE != "block":
            ratio = tl.where(ratio > 1, 1.0, ratio)
        accept_prob = tl.where(residual == 0, 0.0, ratio)
        tl.store(tests.accept_prob + batch * N + child, tl.where(drawn, accept_prob, NOT_DRAWN))
        if RULE == "traversal":  # for leaves; a later launch overwrites it at nodes with children
            own_accept_prob = accept_prob / (accept_prob + (1 - accept_prob))
            tl.store(tests.own_accept_prob + batch * N + child, own_accept_prob)
        tried = tl.where((node == child) & drawn, token, tried)
        draft_scale = tl.where(drawn, draft_scale + total / draft_mass, draft_scale)
        if SAMPLING == "none":
            shares = tl.where(node == child, 0.0, shares)
            residual_mass = untaken + tl.sum(shares, 0)
        else:
            is_stale = is_stale | drawn
        child = tl.min(tl.where(is_child & (node > child), node, N), 0)
    tl.store(tests.draft_scale + batch * N + here, draft_scale)
    if RULE == "traversal":
        if SAMPLING != "none":
            if is_stale:
                residual_mass, draft_mass = _masses_left(target, draft, weight, draft_scale, tried, SAMPLING, BLOCK_V)
        tl.store(tests.own_accept_prob + batch * N + here, residual_mass / (residual_mass + missing_mass))


@triton.jit(do_not_specialize=COUNTS)
def rows_kernel(
    distributions_ptr,  # [2, B, N, NUMBERS] int32, out: distributions of the targets, then of the drafts
    invalid_ptr,  # [B, N] bool, out: True if the logits do not define a distribution
    tests,  # Tests, out
    statistics,  # Statistics
    logits,  # Logits [B, N, V]
    draft_logits,  # Logits [B, P, V], or None; not in one tuple with draft_rows_ptr: Triton 3.6 would lose its fields
    draft_rows_ptr,  # [B, N] int32, or None: row of draft_logits that a node's children were drawn from; -1 if none
    inputs,  # Inputs
    filters,  # Filters
    draft_filters,  # Filters
    N, P, V, S,
    RULE: tl.constexpr, SAMPLING: tl.constexpr, CHAIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    index = batch * N + here
    place = batch * (N + P) + here
    target = row_distribution(row_of(logits, batch, here, V), statistics, place, batch, S, filters, BLOCK_S, BLOCK_V)
    tl.store(invalid_ptr + index, is_invalid(target))
    _store_distribution(distributions_ptr + NUMBERS * index, target)
    draft = target
    if SAMPLING != "none":
        draft_row = tl.load(draft_rows_ptr + index)
        place = batch * (N + P) + N + tl.maximum(draft_row, 0)
        row = row_of(draft_logits, batch, tl.maximum(draft_row, 0), V)
        drawn = row_distribution(row, statistics, place, batch, S, draft_filters, BLOCK_S, BLOCK_V)
        absent = draft_row < 0  # the draft is then a distribution that keeps no token
        draft = Distribution(
            row, drawn.peak, tl.where(absent, 0.0, drawn.log_sum),
            tl.where(absent, float("inf"), drawn.threshold), drawn.inverse_temperature,
            tl.where(absent, MAX_ID, drawn.first_tie), tl.where(absent, -1, drawn.greedy_id),
        )  # fmt: skip
        _store_distribution(distributions_ptr + NUMBERS * (tl.num_programs(1).to(tl.int64) * N + index), draft)
    if (RULE != "traversal") | (here == 0):
        tree = load_tree(inputs, batch, N, V, CHAIN, BLOCK_N)
        weight = tl.full((), 1.0, tl.float32)
        _test_children(tests, target, draft, weight, tree, batch, here, N, RULE, SAMPLING, BLOCK_V)


@triton.jit(do_not_specialize=COUNTS)
def weights_kernel(
    tests,  # Tests, in and out
    distributions_ptr,  # [2, B, N, NUMBERS] int32
    logits,  # Logits [B, N, V]
    draft_logits,  # Logits [B, P, V], or None
    draft_rows_ptr,  # [B, N] int32, or None
    inputs,  # Inputs
    N, V, depth,
    SAMPLING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Traversal: the weight of a node is its accept_prob, so the nodes of one depth must wait for those above them."""
    here = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if depth_of(inputs.parents, batch, here, N, BLOCK_N) != depth:
        return
    tree = load_tree(inputs, batch, N, V, False, BLOCK_N)
    index = batch * N + here
    weight = tl.load(tests.accept_prob + index)
    has_children = tl.max((tree.parents == here).to(tl.int32), 0) > 0
    if (has_children & was_drawn(weight)) & (tl.sum(tl.where(tree.node == here, tree.parents, 0), 0) >= 0):
        target = _load_distribution(distributions_ptr + NUMBERS * index, row_of(logits, batch, here, V))
        draft = target
        if SAMPLING != "none":
            drafts_ptr = distributions_ptr + NUMBERS * (tl.num_programs(1).to(tl.int64) * N + index)
            draft = _load_distribution(drafts_ptr, _draft_row(draft_logits, draft_rows_ptr, batch, index, V))
        _test_children(tests, target, draft, weight, tree, batch, here, N, "traversal", SAMPLING, BLOCK_V)


@triton.jit
def _test(tests, tree, seed, position, batch, N, RULE: tl.constexpr):
    """[BLOCK_N] each: accept_prob, and True for nodes that pass their test by their own random number. NaN passes."""
    # nothing was written at the root and at padding nodes
    accept_prob = tl.load(tests.accept_prob + batch * N + tree.node, mask=tree.parents >= 0, other=NOT_DRAWN)
    tested = accept_prob
    if RULE == "traversal":
        tested = tl.load(tests.own_accept_prob + batch * N + tree.node, mask=tree.parents >= 0, other=0.0)
    return accept_prob, (uniform(seed, position, tree.node, ACCEPT) >= tested) == 0


@triton.jit
def _last_accepted(tree, accept_prob, passed, N, RULE: tl.constexpr):
    """The last accepted node.

    Args:
        accept_prob: [BLOCK_N] fp32. NOT_DRAWN at nodes that cannot be tried.
        passed: [BLOCK_N] bool. True for nodes that pass their test.
    """
    node, parents = tree.node, tree.parents
    if RULE == "traversal":  # a node passes if it or a node below it passes its test; computed from the leaves up
        for place in range(1, N):
            child = N - place
            found = tl.max(((node == child) & passed).to(tl.int32), 0) > 0
            parent = tl.max(tl.where(node == child, parents, -1), 0)
            drawn = tl.max(((node == child) & was_drawn(accept_prob)).to(tl.int32), 0) > 0
            passed = passed | ((node == parent) & (found & drawn))
    last = tl.full((), 0, tl.int32)
    child = tl.min(tl.where((parents == 0) & was_drawn(accept_prob) & passed, node, N), 0)
    while child < N:
        last = child
        child = tl.min(tl.where((parents == last) & was_drawn(accept_prob) & passed, node, N), 0)
    return last


@triton.jit
def _lowered(weight, ratio):
    """min(1, weight * ratio), or 0 if either factor is 0."""
    product = tl.where((weight == 0) | (ratio == 0), 0.0, weight * ratio)
    return tl.where(product > 1, 1.0, product)


@triton.jit
def _block_weight(ratio_ptr, last):
    """The weight of a node of a chain: min(1, parent's weight * ratio), computed from the root down. NOT_DRAWN if a
    node on the way cannot be tried."""
    weight = tl.full((), 1.0, tl.float32)
    drawn = weight > 0
    for above in range(1, last + 1):
        ratio = tl.load(ratio_ptr + above)
        drawn = drawn & was_drawn(ratio)
        weight = _lowered(weight, ratio)
    return tl.where(drawn, weight, NOT_DRAWN)


@triton.jit(do_not_specialize=COUNTS)
def draws_kernel(
    drawn_ptr,  # [B, S] int64, out; [B, N, S] under block
    masses_ptr,  # [B, N, S] fp32, out (block): masses of the residual
    tests,  # Tests
    distributions_ptr,  # [2, B, N, NUMBERS] int32
    logits,  # Logits [B, N, V]
    draft_logits,  # Logits [B, P, V], or None
    draft_rows_ptr,  # [B, N] int32, or None
    inputs,  # Inputs
    N, V, S,
    RULE: tl.constexpr, SAMPLING: tl.constexpr, CHAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    seed, position = tl.load(inputs.seeds + batch), tl.load(inputs.position + batch)
    tree = load_tree(inputs, batch, N, V, CHAIN, BLOCK_N)
    node, parents = tree.node, tree.parents
    weight = tl.full((), 1.0, tl.float32)
    if RULE == "block":
        last = tl.program_id(1)
        # nodes that are not the child of the node before them have no ratio
        reached = tl.sum(((node > 0) & (node <= last) & (parents >= 0)).to(tl.int32), 0) == last
        if reached:
            weight = _block_weight(tests.accept_prob + batch * N, last)
        if (reached == 0) | (weight == NOT_DRAWN):
            return
        accept_prob = tl.load(tests.accept_prob + batch * N + node, mask=parents >= 0, other=NOT_DRAWN)
        out = (batch * N + last) * S + tile
    else:
        accept_prob, passed = _test(tests, tree, seed, position, batch, N, RULE)
        last = _last_accepted(tree, accept_prob, passed, N, RULE)
        if RULE == "traversal":
            weight = tl.where(last > 0, tl.max(tl.where(node == last, accept_prob, NOT_DRAWN), 0), 1.0)
        out = batch * S + tile

    index = batch * N + last
    first_id = tile * BLOCK_V
    ids = first_id + tl.arange(0, BLOCK_V)
    target = _load_distribution(distributions_ptr + NUMBERS * index, row_of(logits, batch, last, V))
    target_log_probs = log_probs(target, ids)
    tried = tl.where((parents == last) & was_drawn(accept_prob), tree.tokens, -1)
    was_tried = tl.max(tried, 0) >= 0
    residual = tl.zeros([BLOCK_V], tl.float32)
    if was_tried:
        if SAMPLING == "none":
            residual = weight * tl.exp(target_log_probs)
        else:
            drafts_ptr = distributions_ptr + NUMBERS * (tl.num_programs(2).to(tl.int64) * N + index)
            draft = _load_distribution(drafts_ptr, _draft_row(draft_logits, draft_rows_ptr, batch, index, V))
            draft_log_probs = log_probs(draft, ids)
            if RULE == "block":
                draft_scale = weight + (1 - weight)
            else:
                draft_scale = tl.load(tests.draft_scale + index)
            residual = _residual(weight, target_log_probs, draft_scale, draft_log_probs)
        residual = tl.where(_untried(ids, first_id, tried, BLOCK_V), residual, 0.0)
        if RULE == "block":
            tl.store(masses_ptr + out, tl.sum(residual, 0))
    # a residual of mass 0 can only result from rounding; if all tiles have mass 0, the target's distribution is used
    from_residual = tl.max(residual, 0) > 0
    scores = target_log_probs
    if from_residual:
        scores = tl.where(residual > 0, tl.log(tl.where(residual > 0, residual, 1.0)), NEG_INF)
    key = key_of(order_of(NEG_INF), first_id)
    if tl.max(tl.where(scores == scores, scores, NEG_INF), 0) > NEG_INF:
        purpose = tl.where(was_tried, RECOVER, BONUS)
        scores += gumbel(seed, position, last, purpose, first_id, BLOCK_V)
        key = highest_score(scores, first_id, V, BLOCK_V)
    tl.store(drawn_ptr + out, tl.where(from_residual, key | FROM_RESIDUAL, key))


@triton.jit
def _best_drawn(drawn_ptr, S, BLOCK_S: tl.constexpr):
    """The id of the highest key of the tiles with a nonzero residual or, if there are none, of all tiles."""
    tile = tl.arange(0, BLOCK_S)
    keys = tl.load(drawn_ptr + tile, mask=tile < S, other=NO_KEY)
    best = tl.max(tl.where((keys & FROM_RESIDUAL) != 0, keys, NO_KEY), 0)
    return id_in(tl.where(best == NO_KEY, tl.max(keys, 0), best))


@triton.jit
def _last_of_block(ratio_ptr, masses_ptr, tree, seed, position, N, S, BLOCK_S: tl.constexpr):
    """The last accepted node of a chain: the deepest one that passes its test."""
    node = tree.node
    last = tl.full((), 0, tl.int32)
    weight = tl.full((), 1.0, tl.float32)
    ratios = tl.load(ratio_ptr + node, mask=tree.parents >= 0, other=NOT_DRAWN)
    numbers = uniform(seed, position, node, ACCEPT)
    here = tl.full((), 1, tl.int32)
    tile = tl.arange(0, BLOCK_S)
    while here < N:
        ratio = tl.sum(tl.where(node == here, ratios, 0.0), 0)
        weight = _lowered(weight, ratio)
        followed = tl.max(((node == here + 1) & was_drawn(ratios)).to(tl.int32), 0) > 0
        mass = weight
        if followed:
            mass = tl.sum(tl.load(masses_ptr + here.to(tl.int64) * S + tile, mask=tile < S, other=0.0), 0)
        passed = (tl.sum(tl.where(node == here, numbers, 0.0), 0) >= mass / (mass + (1 - weight))) == 0
        drawn = was_drawn(ratio)
        last = tl.where(drawn & passed, here, last)
        here = tl.where(drawn, here + 1, N)
    return last


@triton.jit(do_not_specialize=COUNTS)
def walk_kernel(
    out,  # Acceptance
    tests,  # Tests
    masses_ptr,  # [B, N, S] fp32 (block)
    drawn_ptr,  # [B, S] int64; [B, N, S] under block
    invalid_ptr,  # [B, N] bool
    inputs,  # Inputs
    budget_ptr,  # [B] int64
    eos_ids_ptr,  # [E] int64, or None
    N, V, S, D, E,
    RULE: tl.constexpr, CHAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tree = load_tree(inputs, row, N, V, CHAIN, BLOCK_N)
    seed, position = tl.load(inputs.seeds + row), tl.load(inputs.position + row)
    budget = tl.load(budget_ptr + row)
    invalid = tl.load(invalid_ptr + row * N + tree.node, mask=tree.node < N, other=0) != 0
    if RULE == "block":
        masses_ptr += row * N * S
        last = _last_of_block(tests.accept_prob + row * N, masses_ptr, tree, seed, position, N, S, BLOCK_S)
        next_id = _best_drawn(drawn_ptr + (row * N + last) * S, S, BLOCK_S)
    else:
        accept_prob, passed = _test(tests, tree, seed, position, row, N, RULE)
        last = _last_accepted(tree, accept_prob, passed, N, RULE)
        next_id = _best_drawn(drawn_ptr + row * S, S, BLOCK_S)
    emit_path(out, tree, last, next_id, invalid, budget, eos_ids_ptr, row, N, D, E, BLOCK_N)


def accept_weighted(
    logits: torch.Tensor,
    inputs: Inputs,
    rule: str,
    filters: Filters,
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None,
    sampling: str,
    draft_logits: torch.Tensor | None,
    draft_row: torch.Tensor | None,
    draft_filters: Filters,
) -> Acceptance:
    """`accept_sample` for one of `RULES`."""
    batch, nodes, vocab = logits.shape
    tiles, expanded = triton.cdiv(vocab, BLOCK_V), 0
    if draft_logits is None:
        sampling, draft_filters = "none", Filters()
    else:
        expanded = draft_logits.shape[1]

    def scratch(*shape, dtype=torch.float32, needed=True):
        return logits.new_empty((batch, *shape), dtype=dtype) if needed else None

    is_block = rule == "block"
    distributions = scratch(2 * nodes, NUMBERS.value, dtype=torch.int32)  # targets, then drafts
    invalid = scratch(nodes, dtype=torch.bool)
    tests = Tests(scratch(nodes), scratch(nodes), scratch(nodes, needed=rule == "traversal"))
    masses = scratch(nodes, tiles, needed=is_block)
    drawn = scratch(*([nodes] if is_block else []), tiles, dtype=torch.int64)
    out = new_acceptance(logits, max_depth)

    given = logits_argument(logits), logits_argument(draft_logits), draft_row, inputs
    kind = {"RULE": rule, "CHAIN": rule in CHAIN_RULES, "BLOCK_N": block_of(nodes)}
    statistics = row_statistics(logits, filters.temperature, draft_logits, draft_filters.temperature)
    rows_kernel[nodes, batch](
        distributions, invalid, tests, statistics, *given, filters, draft_filters, nodes, expanded, vocab, tiles,
        SAMPLING=sampling, BLOCK_S=block_of(tiles), BLOCK_V=BLOCK_V, **kind, **ROW_OPTIONS,
    )  # fmt: skip
    for depth in range(1, max_depth) if rule == "traversal" else ():
        weights_kernel[nodes, batch](
            tests, distributions, *given, nodes, vocab, depth,
            SAMPLING=sampling, BLOCK_N=block_of(nodes), BLOCK_V=BLOCK_V, **ROW_OPTIONS,
        )  # fmt: skip
    draws_kernel[tiles, nodes if is_block else 1, batch](
        drawn, masses, tests, distributions, *given, nodes, vocab, tiles,
        SAMPLING=sampling, BLOCK_V=BLOCK_V, **kind, num_warps=NUM_WARPS, **FP_FUSION,
    )  # fmt: skip
    walk_kernel[batch,](
        out, tests, masses, drawn, invalid, inputs, budget, eos_ids,
        nodes, vocab, tiles, max_depth, 0 if eos_ids is None else eos_ids.shape[0],
        BLOCK_S=block_of(tiles), **kind, **WALK_OPTIONS,
    )  # fmt: skip
    return out
