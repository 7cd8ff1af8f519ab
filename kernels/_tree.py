"""Draft trees in Triton: nodes and depths, ancestors, and the last step of acceptance, which stores the path and the
next token.

Letters: B sequences, N tree nodes, D edges on the longest path, W = ceil(N/64) words, E ids that end the text.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from ._launch import FP_FUSION

# Options of the walk kernels of sampled acceptance. Without a limit, Triton 3.6 uses 32 registers and spills two. A
# multiprocessor has enough registers, because it runs only one of these programs.
WALK_OPTIONS = {"num_warps": 4, "maxnreg": 128, **FP_FUSION}
NO_STEP: tl.constexpr = tl.constexpr(2**63 - 1)
WORD_BITS: tl.constexpr = tl.constexpr(64)


# kernel argument: tokens [B, N] int64, parents [B, N] int32, seeds [B] int64, position [B] int64
Inputs = namedtuple("Inputs", "tokens parents seeds position")
# kernel argument, the outputs: path [B, D] int32, length [B] int64, next_ids [B] int64, has_nan [B] bool
Acceptance = namedtuple("Acceptance", "path length next_ids has_nan")
# [BLOCK_N] int32 each: node numbers, parents and tokens; parents and tokens are -1 at the root and at padding
Tree = namedtuple("Tree", "node parents tokens")


def new_acceptance(logits: torch.Tensor, max_depth: int) -> Acceptance:
    """Outputs for logits [B, N, V]."""
    batch = logits.shape[0]
    return Acceptance(
        path=logits.new_empty((batch, max_depth), dtype=torch.int32),
        length=logits.new_empty(batch, dtype=torch.int64),
        next_ids=logits.new_empty(batch, dtype=torch.int64),
        has_nan=logits.new_empty(batch, dtype=torch.bool),
    )


def new_tree(tokens: torch.Tensor, num_nodes: int) -> tuple[torch.Tensor, ...]:
    """Outputs of a tree for each sequence of tokens [B, ...] int64: tokens [B, N] int64, parents [B, N] int32, depth
    [B, N] int64 and ancestors [B, N, W] int64."""
    batch = tokens.shape[0]
    drafts, depth = (tokens.new_empty(batch, num_nodes) for _ in range(2))
    parents = tokens.new_empty(batch, num_nodes, dtype=torch.int32)
    return drafts, parents, depth, tokens.new_empty(batch, num_nodes, triton.cdiv(num_nodes, WORD_BITS.value))


@triton.jit
def store_ancestors(depth_ptr, ancestors_ptr, parents_ptr, node, N, D, W, BLOCK_W: tl.constexpr):
    """Walk from nodes up to the root, and store their depths and ancestor words.

    Args:
        depth_ptr: [N] int64, out.
        ancestors_ptr: [N, W] int64, out.
        parents_ptr: [N] int32, which all threads can read.
        node: [n] int32. The nodes; those from N on are skipped.
    """
    word = tl.arange(0, BLOCK_W)[None, :]
    here = tl.where(node < N, node, -1)  # the node that the walk has reached; -1 above the root
    depth = tl.zeros(node.shape, tl.int64)
    bits = tl.zeros([node.shape[0], BLOCK_W], tl.int64)
    for _ in range(D + 1):
        bit = tl.full(node.shape, 1, tl.int64) << (here & (WORD_BITS - 1)).to(tl.int64)
        bits |= tl.where((here // WORD_BITS)[:, None] == word, tl.where(here >= 0, bit, 0)[:, None], 0)
        here = tl.load(parents_ptr + here, mask=here >= 0, other=-1)
        depth += (here >= 0).to(tl.int64)
    tl.store(depth_ptr + node, depth, mask=node < N)
    tl.store(ancestors_ptr + node[:, None] * W + word, bits, mask=(node < N)[:, None] & (word < W))


@triton.jit
def load_tree(inputs, row, N, V, CHAIN: tl.constexpr, BLOCK_N: tl.constexpr):
    """The `Tree` of a sequence. With CHAIN, a node that is not the child of the node before it is padding."""
    node = tl.arange(0, BLOCK_N)
    parents = tl.load(inputs.parents + row * N + node, mask=node < N, other=-1)
    tokens = tl.load(inputs.tokens + row * N + node, mask=node < N, other=-1)
    real = (tokens >= 0) & (tokens < V) & (parents < node)
    if CHAIN:
        real &= parents == node - 1
    return Tree(node, tl.where(real, parents, -1), tl.where(real, tokens, -1).to(tl.int32))


@triton.jit
def depths_of(parents_ptr, row, N, BLOCK_N: tl.constexpr):
    """[BLOCK_N] int32: the depth of every node, by pointer doubling: one load, then log2(depth) steps in registers.

    A node without a parent counts as a child of the root. Parents are clamped to the node before, so that the loop
    always ends.
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
    """The depth of one node."""
    return tl.max(tl.where(tl.arange(0, BLOCK_N) == node, depths_of(parents_ptr, row, N, BLOCK_N), 0), 0)


@triton.jit
def follow_targets(out, tree, target_ids, invalid, budget, eos_ids_ptr, row, D, E, BLOCK_N: tl.constexpr):
    """From the root, follow the first child that carries the target's token. Store the acceptance.

    Args:
        target_ids: [BLOCK_N] int32. The target's token after each node.
        invalid: [BLOCK_N] bool. True for nodes whose logits do not define a distribution.
        budget: int64. Number of tokens that the sequence may still emit.
        eos_ids_ptr: [E] int64, or None.
    """
    live = budget > 0
    reached = tree.node == 0
    # a target token that ends the text is stored as its complement; no token is negative, so the walk stops there
    goals = target_ids
    if eos_ids_ptr is not None:
        for index in range(E):
            goals = tl.where(target_ids == tl.load(eos_ids_ptr + index), ~target_ids, goals)

    # the upper half of each integer is a node and the lower half the node's goal, so that a single minimum finds both
    # the first child and the target's token after it
    steps = (tree.node.to(tl.int64) << 32) | (goals.to(tl.int64) & 0xFFFFFFFF)
    here = tl.min(steps, 0)  # the root's
    path = tl.full([BLOCK_N], -1, tl.int32)
    length = 0
    limit = tl.minimum(D, budget - 1)
    walking = length < limit
    while walking:
        carries = (tree.parents == (here >> 32)) & (tree.tokens == here.to(tl.int32))
        child = tl.min(tl.where(carries, steps, NO_STEP), 0)
        found = child != NO_STEP
        here = tl.where(found, child, here)
        path = tl.where(found & (tree.node == length), (child >> 32).to(tl.int32), path)
        reached |= found & (tree.node == (child >> 32))
        length += found.to(tl.int32)
        walking = found & (length < limit)

    goal = here.to(tl.int32)
    tl.store(out.path + row * D + tree.node, path, mask=tree.node < D)
    tl.store(out.length + row, length)
    tl.store(out.next_ids + row, tl.where(live, tl.where(goal < 0, ~goal, goal), -1))
    tl.store(out.has_nan + row, live & (tl.max((reached & invalid).to(tl.int32), 0) > 0))


@triton.jit
def emit_path(out, tree, last, next_id, invalid, budget, eos_ids_ptr, row, N, D, E, BLOCK_N: tl.constexpr):
    """Store the acceptance of the path that ends at node `last`, followed by the token `next_id`.

    The emitted tokens are cut after the first one that ends the text, and at the budget; the last remaining token
    becomes the next token. For the other arguments see `follow_targets`.
    """
    node, parents, tokens = tree.node, tree.parents, tree.tokens
    accepted = tl.full((), 0, tl.int32)
    here = last
    while here > 0:
        here = tl.max(tl.where(node == here, parents, -1), 0)
        accepted += 1
    path = tl.full([BLOCK_N], -1, tl.int32)
    emitted = tl.where(node == accepted, next_id, -1)
    path_invalid = tl.zeros([BLOCK_N], tl.int1)
    here, place = last, accepted
    while here > 0:
        place -= 1
        path = tl.where(node == place, here, path)
        emitted = tl.where(node == place, tl.max(tl.where(node == here, tokens, -1), 0), emitted)
        path_invalid |= (node == place) & (tl.max(((node == here) & invalid).to(tl.int32), 0) > 0)
        here = tl.max(tl.where(node == here, parents, -1), 0)

    live = budget > 0
    end = tl.minimum(tl.minimum(accepted.to(tl.int64), tl.maximum(budget - 1, 0)), D).to(tl.int32)
    if eos_ids_ptr is not None:
        for index in range(E):
            eos_id = tl.load(eos_ids_ptr + index)
            end = tl.minimum(end, tl.min(tl.where((emitted == eos_id) & (node <= accepted), node, N), 0))
    length = tl.where(live, end, 0)
    next_id = tl.max(tl.where(node == end, emitted, -1), 0)
    root_invalid = tl.max(((node == 0) & invalid).to(tl.int32), 0) > 0
    path_invalid = tl.max((path_invalid & (node < length)).to(tl.int32), 0) > 0
    tl.store(out.path + row * D + node, tl.where(node < length, path, -1), mask=node < D)
    tl.store(out.length + row, length)
    tl.store(out.next_ids + row, tl.where(live, next_id, -1))
    tl.store(out.has_nan + row, live & (root_invalid | path_invalid))
