"""The ops that accept tokens and store them: acceptance, compaction of the cache, and append. See `ops` for the rules
of all ops.

Letters: B sequences, N tree nodes, D edges on the longest path, V vocabulary, S cache slots, P cache planes (in
`accept_sample` expanded nodes).
"""

from collections.abc import Sequence

import torch

from . import reference
from .arguments import FLOAT_DTYPES, Check, check_filters, typed
from .filters import NO_FILTERS, Filters
from .reference import Acceptance
from .registry import register, resolve
from .rules import WEIGHING_RULES, check_legal


@typed
def accept_greedy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    *,
    max_depth: int,
    budget: torch.Tensor | None = None,
    eos_ids: torch.Tensor | None = None,
    impl: str | None = None,
) -> Acceptance:
    """Greedy acceptance: follow the target's argmax from the root until no child carries it.

    If the target's token is in `eos_ids`, the walk stops and that token becomes `next_ids`. A drafted EOS is therefore
    emitted as the target's token and never counted as accepted.

    Strides: any. Logits are read in place.

    Args:
        logits: [B, N, V] fp32, bf16 or fp16. The target's logits after the path that ends at each node. Among equal
            maxima the lowest id is used.
        tokens: [B, N] int64. Draft token of each node; node 0 is the root, the last emitted token.
        parents: [B, N] int32. -1 at the root and at padding nodes, which are never reached; parents[:, i] < i at all
            other nodes. Among siblings with the same token the first is followed.
        max_depth: D, number of edges on the longest path.
        budget: [B] int64. Number of tokens that each row may still emit. At most budget - 1 draft tokens are accepted;
            a row with budget 0 emits nothing. No limit by default.
        eos_ids: [E] int64. Tokens that end a text; None if there are none.
        impl: None, "triton" or "reference".

    Returns:
        `Acceptance`: path [B, D] int32, length [B] int64, next_ids [B] int64, has_nan [B] bool. A row whose budget is
        not 0 emits length + 1 tokens.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "accept_greedy"
    budget = _check_acceptance(Check(op), logits, tokens, parents, max_depth, budget, eos_ids)
    return Acceptance(*resolve(op, impl, logits.device)(logits, tokens, parents, max_depth, budget, eos_ids))


@typed
def accept_sample(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    *,
    rule: str,
    seeds: torch.Tensor,
    position: torch.Tensor,
    filters: Filters = NO_FILTERS,
    max_depth: int,
    budget: torch.Tensor | None = None,
    eos_ids: torch.Tensor | None = None,
    sampling: str = "none",
    draft_logits: torch.Tensor | None = None,
    draft_row: torch.Tensor | None = None,
    draft_filters: Filters = NO_FILTERS,
    impl: str | None = None,
) -> Acceptance:
    """Stochastic acceptance. The emitted tokens have the distribution of the target's own samples.

    Temperature, top-k, top-p and min-p are applied here, to the target's logits and to the draft's. The rules are
    functions in `rules`; each cites its paper. All noise is a function of the row's seed, `position` and the node (see
    `noise`). The op therefore has no state, and rows do not depend on each other.

    The emitted tokens are the accepted draft tokens followed by `next_ids`. They are cut after the first EOS and at the
    budget; the last remaining token is then `next_ids`. Nothing is read on the host. Logits of nodes that are not
    reached may hold any values. If the logits of an accepted node do not define a distribution, its children count as
    padding, so the path ends there.

    Strides: any, also for the tensors in `filters` and `draft_filters`. Logits and draft logits are read in place.

    Args:
        logits: [B, N, V] fp32, bf16 or fp16. The target's logits after the path that ends at each node.
        tokens: [B, N] int64. Draft token of each node; node 0 is the root, the last emitted token. A node whose token
            is outside 0 to V - 1 is padding.
        parents: [B, N] int32. -1 at the root and at padding nodes, which are never reached; parents[:, i] < i at all
            other nodes. Siblings are tried in index order. If they were drawn, this must be the order of the draws.
        rule: a name in `rules.RULES`; "typical" is lossy. For "rejection" and "block", nodes that are not the child of
            the node before them are padding.
        seeds: [B] int64. Seed of each row.
        position: [B] int64. Number of real tokens before the root.
        filters: `Filters` of the target. A row with temperature 0 is greedy.
        max_depth: D, number of edges on the longest path.
        budget: [B] int64. Number of tokens that each row may still emit; a row with budget 0 emits nothing. No limit by
            default.
        eos_ids: [E] int64. Tokens that end a text; None if there are none.
        sampling: how the draft tokens were chosen. "none": without sampling. "with" or "without": siblings were drawn
            from the draft's filtered probabilities with or without replacement, and none was cut or reordered by value.
        draft_logits: [B, P, V] fp32, bf16 or fp16. The draft's logits at its P expanded nodes, if tokens were drawn.
        draft_row: [B, N] int32. The row of `draft_logits` that a node's children were drawn from; -1 if it has none.
            The caller must ensure that rows are below P; it is not checked.
        draft_filters: `Filters` that were applied to `draft_logits` before the draws.
        impl: None, "triton" or "reference".

    Returns:
        `Acceptance`: path [B, D] int32, length [B] int64, next_ids [B] int64, has_nan [B] bool. A row whose budget is
        not 0 emits length + 1 tokens.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above, or the rule does not accept such a tree.
    """
    op = "accept_sample"
    if rule == "greedy":
        raise ValueError(f'{op}: rule "greedy" is ops.accept_greedy')
    try:
        check_legal(rule, sampling, is_chain=True)
    except ValueError as refusal:
        raise ValueError(f"{op}: {refusal}") from None
    check = Check(op)
    budget = _check_acceptance(check, logits, tokens, parents, max_depth, budget, eos_ids)
    check("seeds", seeds, "B", torch.int64)
    check("position", position, "B", torch.int64)
    check_filters(check, "filters", filters)
    check_filters(check, "draft_filters", draft_filters)
    if (draft_logits is None) != (draft_row is None):
        raise ValueError(f"{op}: draft_logits and draft_row must both be given or both be None, got one of them")
    if draft_logits is not None and draft_row is not None:
        if sampling == "none":
            raise ValueError(f'{op}: draft_logits must be None with sampling="none", got a tensor')
        check("draft_logits", draft_logits, "B, P?, V", *FLOAT_DTYPES)
        check("draft_row", draft_row, "B, N", torch.int32)
    elif sampling != "none" and rule in WEIGHING_RULES and tokens.shape[1] > 1:
        raise ValueError(
            f'{op}: draft_logits must be given with rule "{rule}", which needs the draft probabilities of a tree drawn '
            f"{sampling} replacement, got None"
        )
    if draft_logits is not None and not draft_logits.shape[1]:
        draft_logits, draft_row, sampling = None, None, "none"
    compute = resolve(op, impl, logits.device)
    # the registered op takes lists of tensors
    both = (filters, draft_filters) if compute is reference.accept_sample else (filters.tensors, draft_filters.tensors)
    return Acceptance(
        *compute(
            logits, tokens, parents, rule, seeds, position, both[0], max_depth, budget, eos_ids,
            sampling, draft_logits, draft_row, both[1],
        )
    )  # fmt: skip


def _check_acceptance(check: Check, logits, tokens, parents, max_depth, budget, eos_ids) -> torch.Tensor:
    """Check the common arguments of the acceptance ops. Returns the budget; if it is None, one that does not limit."""
    batch, nodes, _ = check("logits", logits, "B, N, V", *FLOAT_DTYPES)
    check("tokens", tokens, "B, N", torch.int64)
    check("parents", parents, "B, N", torch.int32)
    if not 0 <= max_depth < nodes:
        raise ValueError(f"{check.owner}: max_depth must be 0 to {nodes - 1} for {nodes} nodes, got {max_depth}")
    if budget is None:
        budget = torch.full((batch,), max_depth + 1, dtype=torch.int64, device=logits.device)
    check("budget", budget, "B", torch.int64)
    if eos_ids is not None:
        check("eos_ids", eos_ids, "E?", torch.int64)
    return budget


@typed
def compact_kv(
    storage: torch.Tensor, widths: Sequence[int], base: torch.Tensor, path: torch.Tensor, *, impl: str | None = None
) -> None:
    """Move the keys and values of accepted nodes to the slots after the root's, in place, for all layers at once.

    The cache is one flat buffer of P planes. A plane holds the keys or the values of one layer; plane p has shape
    [B, S, widths[p]], so the row of a token is contiguous. In every plane, slot base + path[k] is copied to slot
    base + 1 + k.

    Strides: the storage must be contiguous, since it is changed in place; base and path may have any strides.

    Args:
        storage: [B * S * sum(widths)], any dtype, contiguous.
        widths: P numbers, the elements per slot in each plane (heads * head dim).
        base: [B] int64. Slot of the root.
        path: [B, D] int32. Strictly increasing node numbers, then -1 as padding. The caller must ensure that
            base + D < S; it is not checked.
        impl: None, "triton" or "reference".

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "compact_kv"
    check = Check(op, storage.device)
    if storage.dim() != 1 or not storage.is_contiguous() or not storage.numel():
        raise check.refusal("storage", "contiguous [B * S * sum(widths)], not empty", storage)
    (batch,) = check("base", base, "B?", torch.int64)
    check("path", path, "B?, D?", torch.int32)
    slot_elements = sum(widths)
    if batch == 0 or slot_elements == 0 or min(widths) <= 0 or storage.numel() % (batch * slot_elements):
        raise ValueError(
            f"{op}: widths must be positive and B * sum(widths) = {batch * slot_elements} must divide the storage's "
            f"{storage.numel()} elements, got {len(widths)} widths from {min(widths, default=0)}"
        )
    if path.shape[1]:
        resolve(op, impl, storage.device)(storage, widths, base, path)


@typed
def append_tokens(
    text: torch.Tensor,
    length: torch.Tensor,
    position: torch.Tensor,
    budget: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    accepted: Acceptance,
    *,
    eos_ids: torch.Tensor | None = None,
    draft_nan: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Append the accepted tokens and the target's own token to the text, in place, and report the round.

    A row whose budget is not 0 emits accepted.length + 1 tokens. Its length and position grow by their number, and its
    budget falls by it. If the target's token is in `eos_ids`, the budget becomes 0. Finished rows, whose budget is 0,
    do not change.

    Strides: text, length, position and budget are changed in place. The rows of the text must be contiguous and must
    not overlap, and the others must be contiguous. All other tensors may have any strides.

    Args:
        text: [B, C] int64. The tokens of each row by column.
        length: [B] int64. Column of each row's last token, the root of its tree. The caller must ensure that length +
            budget < C; it is not checked, because lengths are only read on the device.
        position: [B] int64. Position of that token.
        budget: [B] int64. Number of tokens that each row may still emit; 0 if the row is finished.
        tokens: [B, N] int64. Draft token of each node.
        parents: [B, N] int32 or int64. -1 at the root and at padding nodes.
        accepted: the acceptance of the tree, with D < N, as `accept_greedy` or `accept_sample` returned it under the
            same budget.
        eos_ids: [E] int64. Tokens that end a text; None if there are none.
        draft_nan: [B] bool. True if the draft's logits hold a NaN; None if there is no such row.
        impl: None, "triton" or "reference".

    Returns:
        The report [B, 2 D + 6] int64: the emitted tokens, the last of them repeated up to D + 1 places; the path of D
        nodes; then the number of emitted tokens, the number of draft tokens, the remaining budget, and two flags for
        NaN in the target's and the draft's logits. The numbers and the draft's flag are 0 in finished rows.

    Raises:
        ValueError: a shape, dtype, device or stride differs from the above.
    """
    op = "append_tokens"
    check = Check(op)
    batch, columns = check("text", text, "B, C", torch.int64)
    if text.stride(1) != 1 and columns > 1 or text.stride(0) < columns and batch > 1:
        raise check.refusal("text", "[B, C] with contiguous rows that do not overlap", text)
    for name, tensor in (("length", length), ("position", position), ("budget", budget)):
        check(name, tensor, "B", torch.int64)
        if not tensor.is_contiguous():
            raise check.refusal(name, "contiguous [B]", tensor)
    _, nodes = check("tokens", tokens, "B, N", torch.int64)
    check("parents", parents, "B, N", torch.int32, torch.int64)
    if not isinstance(accepted, Acceptance):
        raise ValueError(f"{op}: accepted must be an Acceptance, got {type(accepted).__name__}")
    _, max_depth = check("accepted.path", accepted.path, "B, D?", torch.int32)
    if max_depth >= nodes:
        raise check.refusal("accepted.path", f"[{batch}, D] with D below {nodes}, the number of nodes", accepted.path)
    check("accepted.length", accepted.length, "B", torch.int64)
    check("accepted.next_ids", accepted.next_ids, "B", torch.int64)
    check("accepted.has_nan", accepted.has_nan, "B", torch.bool)
    if eos_ids is not None:
        check("eos_ids", eos_ids, "E?", torch.int64)
    if draft_nan is not None:
        check("draft_nan", draft_nan, "B", torch.bool)
    compute = resolve(op, impl, text.device)
    return compute(text, length, position, budget, tokens, parents, *accepted, eos_ids, draft_nan)


def _fake_accept_greedy(logits, tokens, parents, max_depth, budget, eos_ids):
    batch = logits.shape[0]
    path = logits.new_empty((batch, max_depth), dtype=torch.int32)
    length, next_ids = (logits.new_empty(batch, dtype=torch.int64) for _ in range(2))
    return path, length, next_ids, logits.new_empty(batch, dtype=torch.bool)


def _fake_accept_sample(logits, tokens, parents, rule, seeds, position, filters, max_depth, budget, eos_ids, *draft):
    return _fake_accept_greedy(logits, tokens, parents, max_depth, budget, eos_ids)


def _fake_compact_kv(storage, widths, base, path):
    return None


def _fake_append_tokens(text, length, position, budget, tokens, parents, path, *others):
    return tokens.new_empty((tokens.shape[0], 2 * path.shape[1] + 6))


register(
    "accept_greedy(Tensor logits, Tensor tokens, Tensor parents, SymInt max_depth, Tensor budget, Tensor? eos_ids) "
    "-> (Tensor path, Tensor length, Tensor next_ids, Tensor has_nan)",
    _fake_accept_greedy,
    reference,
)
register(
    "accept_sample(Tensor logits, Tensor tokens, Tensor parents, str rule, Tensor seeds, Tensor position, "
    "Tensor?[] filters, SymInt max_depth, Tensor budget, Tensor? eos_ids, str sampling, Tensor? draft_logits, "
    "Tensor? draft_row, Tensor?[] draft_filters) -> (Tensor path, Tensor length, Tensor next_ids, Tensor has_nan)",
    _fake_accept_sample,
    reference,
)
register("compact_kv(Tensor(a!) storage, int[] widths, Tensor base, Tensor path) -> ()", _fake_compact_kv, reference)
register(
    "append_tokens(Tensor(a!) text, Tensor(b!) length, Tensor(c!) position, Tensor(d!) budget, Tensor tokens, "
    "Tensor parents, Tensor path, Tensor accepted_length, Tensor next_ids, Tensor has_nan, Tensor? eos_ids, "
    "Tensor? draft_nan) -> Tensor",
    _fake_append_tokens,
    reference,
)
