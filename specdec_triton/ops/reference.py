"""PyTorch references of the ops. They define the results of the kernels, and they run if there is no GPU.

Letters: B sequences, T tree nodes, N query rows (the last N of the T nodes), W = ceil(T/64) mask words,
Hq/Hkv query/key-value heads, S cache slots, D head dim of keys, Dv of values, V vocabulary, P cache planes.

Arguments are described and checked in `ops` and not checked again here. No function reads a value on the host.
"""

import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .filters import Filters, filtered_log_probs
from .noise import COUPLED, DRAFT, gumbel
from .rules import RULES, SampledRound

WORD_BITS = 64
DRAFT_NOISE = ("none", "coupled", "draft")
# `first_max` splits the rows of at least so many scores in all into blocks. Larger and smaller blocks are slower.
MANY_SCORES, SCORES_BLOCK = 100_000, 128
TREE_FIELDS = 3  # columns of a packed tree after its W ancestor words: depth, start, length

# The masks of the current forward, because all layers with one window or chunk size use the same mask: the arguments of
# `_masks` -> the packed tree and its masks. None: masks are not shared.
_shared_masks: ContextVar[dict | None] = ContextVar("specdec_triton_masks", default=None)


class Candidates(NamedTuple):
    """The best tokens of G groups, one group for each expanded node of a draft.

    Attributes:
        tokens: [B, G, k] int64. The best token first.
        has_nan: [B, G] bool. True if the group's logits hold a NaN. With noise, it is also True if they hold +inf or
            only -inf, which do not define a distribution. The group's other results are then undefined, but its tokens
            are below V.
        log_probs: [B, G, k] fp32. Log-probability of each token after the filters, without noise unless it was asked
            for with noise; None if it was not asked for.
    """

    tokens: torch.Tensor
    has_nan: torch.Tensor
    log_probs: torch.Tensor | None


class TreeInputs(NamedTuple):
    """The inputs of a forward over the last N nodes of trees of T nodes, except their tokens.

    Attributes:
        packed_tree: [B, T, W + 3] int64, see `pack_tree`.
        position_ids: [B, N], or with P planes of positions [P, B, N] int64.
        slots: [B, N] int64. The cache slot of each of the N nodes.
    """

    packed_tree: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor


class Acceptance(NamedTuple):
    """The result of verifying a draft tree.

    Attributes:
        path: [B, D] int32. Accepted nodes from shallow to deep, without the root, padded with -1.
        length: [B] int64. Number of accepted draft tokens, 0 to D.
        next_ids: [B] int64. The target's own token after the last accepted node. It is the recovered token if a draft
            token was rejected, the bonus token if a whole path was accepted, and -1 if the row's budget is 0.
        has_nan: [B] bool. True if the row's budget is not 0 and the logits of the root or of a node on the path hold a
            NaN. With sampling, it is also True if they hold +inf or only -inf, which do not define a distribution. The
            row's other results are then undefined.
    """

    path: torch.Tensor
    length: torch.Tensor
    next_ids: torch.Tensor
    has_nan: torch.Tensor


def visible_slots(
    packed_tree: torch.Tensor,
    num_rows: int,
    num_slots: int,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """The attention mask of the last `num_rows` tree nodes: [B, num_rows, num_slots] bool.

    A row sees the slots [start, length) of the text and, among the tree's slots [length, length + T), its ancestors and
    itself. Sliding window and chunks compare positions. The position of a slot is slot - start in the text and
    length - start + depth in the tree.
    """
    batch, num_nodes, fields = packed_tree.shape
    words, depth = packed_tree[..., : fields - TREE_FIELDS], packed_tree[..., -TREE_FIELDS]
    start, length = packed_tree[:, :1, -2], packed_tree[:, :1, -1]
    slots = torch.arange(num_slots, device=packed_tree.device)
    nodes = torch.arange(num_nodes, device=packed_tree.device)

    prefix = (slots >= start) & (slots < length)
    ancestor_bits = (words[:, -num_rows:, nodes // WORD_BITS] >> (nodes % WORD_BITS)) & 1
    tree_slots = (length + nodes)[:, None, :].expand(-1, num_rows, -1)
    visible = prefix[:, None, :].expand(-1, num_rows, -1).scatter(2, tree_slots, ancestor_bits.bool())
    if sliding_window is None and chunk_size is None:
        return visible

    key_position = (slots - start).scatter(1, length + nodes, length - start + depth)[:, None, :]
    row_position = (length - start + depth)[:, -num_rows:, None]
    if sliding_window is not None:
        visible = visible & (row_position - key_position < sliding_window)
    if chunk_size is not None:
        visible = visible & (row_position // chunk_size == key_position // chunk_size)
    return visible


def pack_tree(depth: torch.Tensor, ancestors: torch.Tensor, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Pack trees into the tensor that `ops.tree_attention` reads.

    Args:
        depth: [B, T] int64. Number of edges from the root.
        ancestors: [B, T, W] int64. Ancestor words, see `DraftTree`.
        start: [B] int64. First slot that holds a real token, after the left padding.
        length: [B] int64. Number of slots in use, which is the slot of the root.

    Returns:
        [B, T, W + 3] int64: for each node its ancestor words, depth, start and length.
    """
    row = torch.stack([start, length], dim=-1)[:, None, :].expand(-1, depth.shape[1], -1)
    return torch.cat([ancestors, depth[..., None], row], dim=-1)


def tree_inputs(
    depth: torch.Tensor,
    ancestors: torch.Tensor,
    start: torch.Tensor,
    base: torch.Tensor,
    last_position: torch.Tensor,
    origin: torch.Tensor,
    num_rows: int,
) -> TreeInputs:
    """See `ops.tree_inputs`."""
    nodes, root = depth.shape[1], base[:, None]
    first = nodes - num_rows
    columns = torch.minimum(root + depth[:, first:], (start + last_position)[:, None])
    slots = root + torch.arange(first, nodes, device=depth.device)
    return TreeInputs(pack_tree(depth, ancestors, start, base), columns - origin[..., None], slots)


def share_masks() -> None:
    """In the current `contextvars` context, compute a mask only once. The masks are kept as long as the context, so the
    context must be that of a single forward."""
    _shared_masks.set({})


def _masks(packed_tree: torch.Tensor, *arguments: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`visible_slots`, and the scores [B, 1, N, S] of slots that are not scored: NaN if they are visible, else -inf."""
    # Dynamo cannot trace a context variable; compilers merge equal masks by themselves
    shared = None if torch.compiler.is_compiling() else _shared_masks.get()
    if shared is None:
        return _new_masks(packed_tree, *arguments)
    key = packed_tree.device, packed_tree.data_ptr(), packed_tree.shape, packed_tree.stride(), *arguments
    if key not in shared:
        # the tree is kept, so that no other tree gets its address
        shared[key] = packed_tree, _new_masks(packed_tree, *arguments)
    return shared[key][1]


def _new_masks(packed_tree: torch.Tensor, *arguments: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    visible = visible_slots(packed_tree, *arguments)
    return visible, torch.where(visible, float("nan"), float("-inf"))[:, None]


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_tree: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.tree_attention`."""
    dtype = query.dtype
    batch, query_heads, rows, head_dim = query.shape
    kv_heads, num_slots = key.shape[1], key.shape[2]
    query, key, value = query.float(), key.float(), value.float()
    # Keys and values that are not finite may only affect the rows that see them. Scores are masked by selection,
    # because NaN plus -inf is NaN. Values are not masked: that would take a copy for every row, and 0 * NaN is NaN.
    # Instead, values that are not finite become 0, and the scores of all rows that see such a slot become NaN. One such
    # value marks the slot for all heads.
    visible, unseen = _masks(packed_tree, rows, num_slots, sliding_window, chunk_size)
    finite = (value.amax((1, 3)).isfinite() & value.amin((1, 3)).isfinite())[:, None]
    value = value.nan_to_num(0.0, 0.0, 0.0)

    scores = (query * scale).reshape(batch, kv_heads, -1, head_dim) @ key.transpose(2, 3)
    scores = scores.view(batch, query_heads, rows, num_slots)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = torch.where((visible & finite)[:, None], scores, unseen)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float().view(1, -1, 1, 1).expand(batch, -1, rows, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    mixed = weights.reshape(batch, kv_heads, -1, num_slots) @ value
    return mixed.view(batch, query_heads, rows, -1).transpose(1, 2).to(dtype).contiguous()


def draft_topk(
    logits: torch.Tensor,
    k: int,
    filters: Filters,
    noise: str,
    seeds: torch.Tensor | None,
    position: torch.Tensor | None,
    depth: int,
    depths: torch.Tensor | None,
    nodes: torch.Tensor | None,
    rows: torch.Tensor | None,
    with_log_probs: bool,
    noisy_log_probs: bool,
) -> Candidates:
    """See `ops.draft_topk`."""
    vocab, log_probs = logits.shape[2], None
    if noise != "none" or with_log_probs:
        log_probs = filtered_log_probs(logits, filters)
        log_probs = log_probs if rows is None else log_probs[:, rows]
    if noise == "none":
        scores = logits if rows is None else logits[:, rows]
    elif noise == "coupled":
        positions = position[:, None] + (depth if depths is None else depths)
        scores = log_probs + gumbel(seeds[:, None], positions, 0, COUPLED, vocab)
    else:
        scores = log_probs + gumbel(seeds[:, None], position[:, None], nodes, DRAFT, vocab)
    best, tokens = (each[..., None] for each in first_max(scores)) if k == 1 else _best(scores, k)
    if noise == "none":
        has_nan = best[..., 0].isnan()
    else:
        has_nan = ~logits.amax(-1).isfinite()
        has_nan = has_nan if rows is None else has_nan[:, rows]
    if noisy_log_probs:
        log_probs = scores.log_softmax(-1)
    return Candidates(tokens, has_nan, log_probs.gather(-1, tokens) if with_log_probs else None)


def _best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest scores [B, G, k] and their ids, the lower id first among equal scores. `topk` does not define which
    of several equal scores it takes, and in which order."""
    best, ids = scores.topk(k, dim=-1)
    lowest, places = best[..., -1:], torch.arange(k, device=scores.device)
    # of the tokens that tie with the lowest of them, take the first ones
    tied = (scores == lowest).cumsum(-1, dtype=torch.int32)
    above = (best != lowest).sum(-1, keepdim=True)
    first = torch.searchsorted(tied, (places - above + 1).clamp(min=1).int()).clamp(max=scores.shape[-1] - 1)
    ids = torch.where(places < above, ids, first)
    # NaN compares with nothing, so the ids of such a row may repeat
    ids, order = ids.sort(-1)
    best, again = torch.sort(best.gather(-1, order), dim=-1, descending=True, stable=True)
    return best, ids.gather(-1, again)


def first_max(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest of the scores [..., V] and its index, the lowest one among equal scores: `scores.max(-1)`.

    On a CPU, PyTorch's maximum with an index is not vectorised, but its maximum without one is. The index is therefore
    looked up only in the first block that has the maximum.
    """
    block = math.gcd(scores.shape[-1], SCORES_BLOCK) if scores.numel() >= MANY_SCORES else 1
    if 4 * block < SCORES_BLOCK:
        return scores.max(-1)
    blocks = scores.unflatten(-1, (-1, block))
    best, place = blocks.amax(-1).max(-1)
    inside = blocks.gather(-2, place[..., None, None].expand(*place.shape, 1, block)).squeeze(-2).argmax(-1)
    return best, place * block + inside


def accept_greedy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None = None,
) -> Acceptance:
    """See `ops.accept_greedy`."""
    batch, num_nodes, _ = logits.shape
    if num_nodes == 1:  # the root: there is no path to follow
        best, target_ids = first_max(logits[:, 0])
        finished = budget <= 0
        next_ids, has_nan = target_ids.masked_fill(finished, -1), best.isnan().masked_fill(finished, False)
        return Acceptance(parents[:, 1:], torch.zeros_like(budget), next_ids, has_nan)
    live = budget > 0
    best, target_ids = first_max(logits)
    nodes = torch.arange(num_nodes, device=logits.device)
    parents = parents.long()

    # followed[b, i]: the first child of node i that carries the target's token
    carries = (parents[:, None, :] == nodes[:, None]) & (tokens[:, None, :] == target_ids[:, :, None])
    followed = carries.int().argmax(-1)
    goes_on = carries.any(-1)
    if eos_ids is not None:
        goes_on = goes_on & ~torch.isin(target_ids, eos_ids)

    # a node is reached if every step from the root to it is followed; computed by pointer jumping in log2(N) steps
    jump = parents.clamp(min=0)
    reached = goes_on.gather(1, jump) & (followed.gather(1, jump) == nodes)
    reached[:, 0] = True
    for _ in range((num_nodes - 1).bit_length()):
        reached = reached & reached.gather(1, jump)
        jump = jump.gather(1, jump)

    rank = reached.cumsum(1) - 1  # depth on the reached path, because parents come before children
    kept = reached & (rank < budget[:, None]) & (rank <= max_depth)
    length = (kept.sum(1) - 1).clamp(min=0)
    last = torch.where(kept, nodes, 0).amax(1)
    next_ids = target_ids.gather(1, last[:, None]).squeeze(1)

    path = torch.full((batch, max_depth + 1), -1, dtype=torch.int32, device=logits.device)
    place = torch.where(kept & (rank > 0), rank - 1, max_depth)  # other nodes are written to the last column
    path.scatter_(1, place, nodes.int().expand(batch, -1))
    return Acceptance(
        path=path[:, :max_depth].contiguous(),
        length=length,
        next_ids=torch.where(live, next_ids, -1),
        has_nan=live & (kept & best.isnan()).any(1),
    )


def accept_sample(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    rule: str,
    seeds: torch.Tensor,
    position: torch.Tensor,
    filters: Filters,
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None,
    sampling: str,
    draft_logits: torch.Tensor | None,
    draft_row: torch.Tensor | None,
    draft_filters: Filters,
) -> Acceptance:
    """See `ops.accept_sample`. The rules are in `rules`; this function contains their common parts."""
    if sampling == "none" or draft_logits is None:
        draft_probs, draft_row = None, None
    else:
        draft_probs, draft_row = filtered_log_probs(draft_logits, draft_filters).exp(), draft_row.long()
    if rule == "coupled":  # looks at one node of each depth, so filters are applied to single nodes

        def log_probs(node):
            return filtered_log_probs(_row(logits, node), filters).squeeze(1)
    else:
        all_log_probs = filtered_log_probs(logits, filters)

        def log_probs(node):
            return _row(all_log_probs, node).squeeze(1)

    # The token of the root is not used. A node is padding if its token is not in the target's vocabulary, or if its
    # parent's logits do not define a distribution. The parent is then tested as a leaf, by the probability of its own
    # token, so that no NaN affects a decision.
    vocab, parents = logits.shape[2], parents.long()
    has_distribution = logits.amax(-1).isfinite()
    is_real = (tokens >= 0) & (tokens < vocab) & has_distribution.gather(1, parents.clamp(min=0))
    round = SampledRound(
        tokens=tokens.clamp(0, vocab - 1),
        parents=torch.where(is_real, parents, -1),
        max_depth=max_depth,
        log_probs=log_probs,
        draft_probs=draft_probs,
        draft_row=draft_row,
        replaces=sampling == "with",
        seeds=seeds,
        position=position,
    )
    return _emitted(has_distribution, round, *RULES[rule](round), budget, eos_ids)


def _emitted(
    has_distribution: torch.Tensor,
    round: SampledRound,
    last: torch.Tensor,
    next_ids: torch.Tensor,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None,
) -> Acceptance:
    """The path to node `last` [B], followed by `next_ids` [B], cut after the first EOS and at the budget and the depth.

    `has_distribution` is [B, N] bool. If the cut is within the path, the last remaining token becomes `next_ids`.
    """
    batch, num_nodes = round.tokens.shape
    nodes = torch.arange(num_nodes, device=last.device)
    on_path, node = nodes == last[:, None], last[:, None]
    for _ in range(num_nodes - 1):
        node = round.parents.gather(1, node).clamp(min=0)
        on_path = on_path | (nodes == node)
    rank = on_path.cumsum(1) - 1  # depth, because parents come before children
    accepted = rank[:, -1]

    # emitted[b, k]: the k-th token of the row; accepted tokens first, then next_ids
    emitted = torch.full((batch, num_nodes + 1), -1, dtype=torch.int64, device=last.device)
    emitted.scatter_(1, torch.where(on_path & (nodes > 0), rank - 1, num_nodes), round.tokens)
    emitted.scatter_(1, accepted[:, None], next_ids[:, None])
    end = torch.minimum(accepted, budget - 1).clamp(min=0, max=round.max_depth)
    if eos_ids is not None:
        is_end = torch.isin(emitted, eos_ids)
        is_end[:, -1] = True
        end = torch.minimum(end, is_end.int().argmax(1))
    live = budget > 0
    length = torch.where(live, end, 0)

    path = torch.full((batch, round.max_depth + 1), -1, dtype=torch.int32, device=last.device)
    stays = on_path & (nodes > 0) & (rank <= length[:, None])
    # other nodes are written to the last column
    path.scatter_(1, torch.where(stays, rank - 1, round.max_depth), nodes.int().expand(batch, -1))
    return Acceptance(
        path=path[:, : round.max_depth].contiguous(),
        length=length,
        next_ids=torch.where(live, emitted.gather(1, end[:, None]).squeeze(1), -1),
        has_nan=live & (~has_distribution & (stays | (nodes == 0))).any(1),
    )


def _row(rows: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
    """[B, N, V] and [B] nodes -> [B, 1, V]."""
    return rows.gather(1, node[:, None, None].expand(-1, -1, rows.shape[2]))


def compact_kv(storage: torch.Tensor, widths: Sequence[int], base: torch.Tensor, path: torch.Tensor) -> None:
    """See `ops.compact_kv`."""
    batch, max_depth = path.shape
    slots = storage.numel() // (batch * sum(widths))
    target = base[:, None] + 1 + torch.arange(max_depth, device=storage.device)
    # an entry of -1 copies its target slot onto itself
    source = torch.where(path >= 0, base[:, None] + path, target)
    rows = torch.arange(batch, device=storage.device)[:, None]
    offset = plane = 0
    while plane < len(widths):
        width = widths[plane]
        count = 1
        while plane + count < len(widths) and widths[plane + count] == width:
            count += 1
        size = count * batch * slots * width
        planes = storage[offset : offset + size].view(count, batch, slots, width)
        # all reads happen before the writes, so sources and targets may overlap
        planes[:, rows, target] = planes[:, rows, source]
        offset, plane = offset + size, plane + count


def append_tokens(
    text: torch.Tensor,
    length: torch.Tensor,
    position: torch.Tensor,
    budget: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    path: torch.Tensor,
    accepted_length: torch.Tensor,
    next_ids: torch.Tensor,
    has_nan: torch.Tensor,
    eos_ids: torch.Tensor | None = None,
    draft_nan: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.append_tokens`."""
    live, last = budget > 0, next_ids[:, None]
    if tokens.shape[1] == 1:  # the root alone: nothing was drafted or accepted, `accepted_length` is 0
        count, drafted = live.long(), accepted_length
        emitted, columns = last, (length + count)[:, None]
    else:
        count, drafted = (accepted_length + 1) * live, (parents >= 0).sum(1) * live
        place = torch.arange(path.shape[1] + 1, device=text.device)
        drafts = torch.cat([tokens.gather(1, path.clamp(min=0).long()), last], dim=1)
        emitted = torch.where(place < accepted_length[:, None], drafts, last)
        columns = length[:, None] + torch.minimum(place + 1, count[:, None])
    # places after the last token write that token again, and finished rows write their root again: nothing else changes
    text.scatter_(1, columns, torch.where(live[:, None], emitted, text.gather(1, length[:, None])))
    length.add_(count)
    position.add_(count)
    budget.sub_(count)
    if eos_ids is not None:
        budget.masked_fill_((last == eos_ids).any(1), 0)

    draft_nan = torch.zeros_like(live) if draft_nan is None else live & draft_nan
    fields = [count, drafted, budget, has_nan, draft_nan]
    if tokens.shape[1] == 1:
        return torch.stack([next_ids, *fields], dim=1)
    return torch.cat([emitted, path, torch.stack(fields, dim=1)], dim=1)


def ngram_lookup(
    tokens: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    estimates: torch.Tensor,
    last_draft: torch.Tensor,
    num_nodes: int,
    max_depth: int,
    first: float,
    threshold: float,
    learning: float,
    drift: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.ngram_lookup`."""
    update_estimates(length, estimates, last_draft, first, learning, drift)
    matched, end = (best[:, 0] for best in longest_matches(tokens, start, length, estimates.shape[1], 1))
    if not max_depth:
        matched = torch.zeros_like(matched)
    expected = estimates.gather(1, (matched - 1).clamp(min=0)[:, None])[:, 0]
    drafts = (matched > 0) & (expected >= threshold)
    count = torch.where(drafts, (length - end).clamp(max=max_depth), 0)
    last_draft.copy_(torch.stack([matched, count, length], 1))

    node = torch.arange(num_nodes, device=tokens.device)
    real = node <= count[:, None]
    source = torch.where(node == 0, length[:, None], end[:, None] + node)
    chain = torch.where(real, tokens.gather(1, torch.where(real, source, 0)), 0)
    ancestors = (node <= node[:, None]) & real[..., None] | torch.eye(num_nodes, dtype=torch.bool, device=tokens.device)
    shift = node % WORD_BITS
    words = [
        (ancestors[..., at : at + WORD_BITS].long() << shift[at : at + WORD_BITS])
        for at in range(0, num_nodes, WORD_BITS)
    ]
    ancestors = torch.stack([word.sum(-1) for word in words], -1)
    return chain, torch.where(real, node - 1, -1).int(), torch.where(real, node, 0), ancestors


def update_estimates(
    length: torch.Tensor,
    estimates: torch.Tensor,
    last_draft: torch.Tensor,
    first: float,
    learning: float,
    drift: float,
) -> None:
    """The part of `ngram_lookup` that updates `estimates` with the result of the last draft, in place."""
    matched, drafted, root = last_draft.T
    place = (matched - 1).clamp(min=0)[:, None]
    estimate = estimates.gather(1, place)[:, 0]
    learnt = estimate + learning * ((length - root - 1).float() - estimate)
    drifted = estimate + drift * (first * matched.float() - estimate)
    learns = (matched > 0) & (length > root)
    estimate = torch.where(learns, torch.where(drafted > 0, learnt, drifted), estimate)
    estimates.scatter_(1, place, estimate[:, None])


def longest_matches(
    tokens: torch.Tensor, start: torch.Tensor, length: torch.Tensor, max_ngram: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Earlier occurrences of the last tokens of the texts, longest first, then earliest. Returns the length of at most
    `count` matches, 0 for none, and their last columns: two tensors [B, M] int64."""
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    running = (columns >= start[:, None]) & (columns < length[:, None])
    matched = torch.zeros_like(tokens)
    for back in range(min(max_ngram, len(columns))):
        same = tokens[:, : len(columns) - back] == tokens.gather(1, (length[:, None] - back).clamp(min=0))
        running = running & torch.nn.functional.pad(same, (back, 0)) & (columns - back >= start[:, None])
        matched = matched + running
    order = torch.where(matched > 0, (matched + 1) * len(columns) - columns, 0)
    best, end = order.topk(min(count, len(columns)), dim=1)
    return torch.where(best > 0, matched.gather(1, end), 0), end


def build_tree(
    tokens: torch.Tensor, parents: torch.Tensor, scores: torch.Tensor, num_nodes: int, max_depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.build_tree`."""
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    scores[:, 0] = torch.inf
    # a stable sort keeps a parent before a child with the same score
    nodes = scores.argsort(dim=1, descending=True, stable=True)[:, :num_nodes].sort(1).values
    return *_kept(tokens, parents, nodes, max_depth), nodes


def best_first_tree(
    root: torch.Tensor, candidates: torch.Tensor, log_probs: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.best_first_tree`."""
    batch, positions, width = candidates.shape
    max_depth = min(positions, num_nodes - 1)
    log_probs = log_probs.nan_to_num(-torch.inf, 0.0, -torch.inf).clamp(max=0).cummin(2).values
    tokens, scores = [root[:, None]], [log_probs.new_zeros(batch, 1)]
    parents = [torch.full_like(tokens[0], -1)]
    first = 0  # number of the first node of the last level
    for position in range(max_depth):
        level = (scores[-1][:, :, None] + log_probs[:, position, None]).flatten(1)
        best, place = (each[:, :num_nodes] for each in level.sort(dim=1, descending=True, stable=True))
        parents.append(first + place // width)
        tokens.append(candidates[:, position].gather(1, place % width))
        first += scores[-1].shape[1]
        scores.append(best)
    # a stable sort keeps the shallower of two nodes with the same score first
    nodes = torch.cat(scores, 1).argsort(dim=1, descending=True, stable=True)[:, :num_nodes]
    return _kept(torch.cat(tokens, 1), torch.cat(parents, 1), nodes, max_depth)


def _kept(
    tokens: torch.Tensor, parents: torch.Tensor, nodes: torch.Tensor, max_depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, parents, depth and ancestors, as `ops.build_tree` returns them, of the nodes [B, N] int64 of a tree.
    Their order is that of `nodes`; the root is the first."""
    place = torch.full_like(parents, -1)
    place.scatter_(1, nodes, torch.arange(nodes.shape[1], device=nodes.device).expand_as(nodes))
    kept_parents = place.gather(1, parents.gather(1, nodes).clamp(min=0))
    kept_parents[:, 0] = -1
    member = ancestor_matrix(kept_parents, max_depth)
    return tokens.gather(1, nodes), kept_parents.int(), member.sum(-1) - 1, pack_bits(member)


def ancestor_matrix(parents: torch.Tensor, max_depth: int | None = None) -> torch.Tensor:
    """[..., N] parents -> [..., N, N] bool: True at [i, j] if node j is node i or an ancestor of it. Takes log2(D)
    squarings of a matrix, where D is `max_depth`, a bound on the depth, or N - 1."""
    num_nodes = parents.shape[-1]
    nodes = torch.arange(num_nodes, device=parents.device)
    member = (nodes == nodes[:, None]) | (parents[..., None] == nodes)
    depth = num_nodes - 1 if max_depth is None else max_depth
    for _ in range(max(depth - 1, 0).bit_length()):
        member = (member.float() @ member.float()) > 0
    return member


def pack_bits(member: torch.Tensor) -> torch.Tensor:
    """[..., N, N] bool -> [..., N, W] int64, column j in bit j % 64 of word j // 64."""
    num_nodes = member.shape[-1]
    words = -(-num_nodes // WORD_BITS)
    padded = torch.nn.functional.pad(member.long(), (0, words * WORD_BITS - num_nodes))
    bits = torch.arange(WORD_BITS, device=member.device)
    # distinct bits add without a carry, so the sum is a bitwise or; bit 63 is the sign
    return (padded.unflatten(-1, (words, WORD_BITS)) << bits).sum(-1)
