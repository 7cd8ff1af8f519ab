"""Children tried one after the other, in Triton: a node's residual, the chances that follow, and where the walk ends.

A node's residual is max(weight * target - cut * draft, 0) without the children tried: two numbers and the tree stand
for it. `chance` [B, N] is the chance that a node passes its test if its turn comes (NaN passes; -1: it cannot be tried:
padding, its draft could not have drawn it, or its parent has no distribution), and under `traversal` its weight, too.
Under `block` it is the ratio of target to draft. Reference: `specdec_triton.ops.rules`.
"""

import triton
import triton.language as tl

from ._common import MAX_ID
from ._law import load_logits, log_probs
from ._noise import ACCEPT, uniform

NOT_DRAWN: tl.constexpr = tl.constexpr(-1.0)  # a chance


@triton.jit
def tree_of(parents_ptr, tokens_ptr, row, N, V, RULE: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N] int32 each: nodes; parents and tokens, -1 at the root and at padding."""
    node = tl.arange(0, BLOCK_N)
    parents = tl.load(parents_ptr + row * N + node, mask=node < N, other=-1)
    tokens = tl.load(tokens_ptr + row * N + node, mask=node < N, other=-1)
    real = (tokens >= 0) & (tokens < V) & (parents < node)
    if RULE == "rejection" or RULE == "block":
        real &= parents == node - 1
    return node, tl.where(real, parents, -1), tl.where(real, tokens, -1).to(tl.int32)


@triton.jit
def was_drawn(chance):
    """Also where it is NaN."""
    return (chance == NOT_DRAWN) == 0


@triton.jit
def depths_of(parents_ptr, row, N, BLOCK_N: tl.constexpr):
    """[BLOCK_N] int32: the depth of every node, by pointer doubling: one load, then log2(depth) steps in registers.

    A node without a parent is a child of the root, and a parent is at most the node before.
    """
    node = tl.arange(0, BLOCK_N)
    above = tl.load(parents_ptr + row * N + node, mask=node < N, other=-1)
    above = tl.maximum(tl.minimum(above, node - 1), 0)
    depth = (node > 0).to(tl.int32)
    while tl.max(above, 0) > 0:
        depth += tl.gather(depth, above, 0)
        above = tl.gather(above, above, 0)
    return depth


@triton.jit
def depth_of(parents_ptr, row, node, N, BLOCK_N: tl.constexpr):
    """Of one node."""
    return tl.max(tl.where(tl.arange(0, BLOCK_N) == node, depths_of(parents_ptr, row, N, BLOCK_N), 0), 0)


@triton.jit
def untried(ids, first, tried, BLOCK_V: tl.constexpr):
    """[BLOCK_V] bool: a tile's ids that are not among `tried` [BLOCK_N] int32 (-1 is none)."""
    free = ids >= 0
    inside = (tried >= first) & (tried < first + BLOCK_V)
    token = tl.min(tl.where(inside, tried, MAX_ID), 0)
    while token < MAX_ID:
        free &= ids != token
        token = tl.min(tl.where(inside & (tried > token), tried, MAX_ID), 0)
    return free


@triton.jit
def residual(weight, target_log_probs, cut, draft_log_probs):
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
        free = untried(ids, first, tried, BLOCK_V)
        target = log_probs(load_logits(row_ptr, stride_v, ids, V), ids, law)
        if SAMPLING == "none":
            masses += tl.where(free, weight * tl.exp(target), 0.0)
        else:
            draft = log_probs(load_logits(draft_row_ptr, draft_stride_v, ids, V), ids, draft_law)
            masses += tl.where(free, residual(weight, target, cut, draft), 0.0)
            if SAMPLING == "without":
                lefts += tl.where(free, tl.exp(draft), 0.0)
    left = tl.sum(lefts, 0) if SAMPLING == "without" else 1.0
    return tl.sum(masses, 0), left


@triton.jit
def prob_of(row_ptr, stride_v, token, law):
    """Probability of one token, or of each of several."""
    return tl.exp(log_probs(tl.load(row_ptr + token.to(tl.int64) * stride_v).to(tl.float32), token, law))


@triton.jit
def weigh_children(
    chance_ptr,  # [B, N] fp32, out at the node's children
    cut_ptr,  # [B, N] fp32, out
    pass_ptr,  # [B, N] fp32, out (traversal): the chance that the node passes when all its children have failed
    row_ptr, stride_v, law, draft_row_ptr, draft_stride_v, draft_law, weight,
    node, parents, tokens, batch, here, N, V,
    RULE: tl.constexpr, SAMPLING: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The children of node `here`, one after the other, each as if those before it had failed."""
    is_child = parents == here
    _, log_sum, _, _, _, _ = law
    if (log_sum == log_sum) == 0:
        tl.store(chance_ptr + batch * N + node, NOT_DRAWN, mask=is_child)
        is_child = node < 0
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
        shares = tl.where(is_child, weight * prob_of(row_ptr, stride_v, tl.maximum(tokens, 0), law), 0.0)
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
            wanted = tl.where(again, 0.0, residual(weight, target, cut, draft))
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
def last_accepted(node, parents, chance, passed, N, RULE: tl.constexpr):
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
                drawn = tl.max(((node == child) & was_drawn(chance)).to(tl.int32), 0) > 0
                goes_on = goes_on | ((node == parent) & (found & drawn))
        child = tl.min(tl.where((parents == 0) & was_drawn(chance) & goes_on, node, N), 0)
        while child < N:
            last = child
            child = tl.min(tl.where((parents == last) & was_drawn(chance) & goes_on, node, N), 0)
    return last


@triton.jit
def tests_of(chance_ptr, pass_ptr, node, parents, seed, position, batch, N, RULE: tl.constexpr):
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
def block_weight(chance_ptr, batch, node, N):
    """The weight of a chain's node: min(1, weight above * ratio), from the root down; -1 where it cannot be tried."""
    weight = tl.full((), 1.0, tl.float32)
    drawn = weight > 0
    for above in range(1, node + 1):
        ratio = tl.load(chance_ptr + batch * N + above)
        drawn = drawn & was_drawn(ratio)
        weight = lowered(weight, ratio)
    return tl.where(drawn, weight, NOT_DRAWN)


@triton.jit
def lowered(weight, ratio):
    product = tl.where((weight == 0) | (ratio == 0), 0.0, weight * ratio)
    return tl.where(product > 1, 1.0, product)
