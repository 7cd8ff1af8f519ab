"""The ops that draft trees, and attention over trees. See `ops` for the rules of all ops.

Letters: B sequences, T tree nodes, N query rows, W = ceil(T/64) mask words, Hq/Hkv query/key-value heads, S cache
slots, D head dim of keys, Dv of values, V vocabulary, P expanded nodes of a draft.
"""

import torch

from . import reference
from .arguments import ANY_FLOAT, FLOAT_DTYPES, Check, check_filters, typed
from .filters import NO_FILTERS, Filters
from .reference import DRAFT_NOISE, TREE_FIELDS, WORD_BITS, Candidates, TreeInputs
from .registry import register, resolve

# Bytes per element -> largest head dim of tree_attention's kernel. A program holds whole heads; wider ones do not fit
# into its registers and shared memory.
MAX_HEAD_DIMS = {2: 512, 4: 256}
# Largest numbers of candidates of build_tree's kernel, and of nodes of its trees and of best_first_tree's. A program
# holds whole trees in registers.
MAX_CANDIDATES, MAX_BUILT_NODES = 4096, 512


@typed
def tree_inputs(
    depth: torch.Tensor,
    ancestors: torch.Tensor,
    start: torch.Tensor,
    base: torch.Tensor,
    last_position: torch.Tensor,
    origin: torch.Tensor,
    *,
    num_rows: int,
    impl: str | None = None,
) -> TreeInputs:
    """The inputs of a forward over the last N nodes of trees of T nodes, except their tokens: the packed tree, the
    positions of the N nodes, and the cache slots to which their keys and values are written.

    Strides: any; all tensors are read in place.

    Args:
        depth: [B, T] int64. Number of edges from node 0.
        ancestors: [B, T, W] int64. Ancestor words, see `DraftTree`.
        start: [B] int64. First slot that holds a real token.
        base: [B] int64. Slot of node 0; node i has slot base + i.
        last_position: [B] int64. Largest position that may be fed, counted from 0 at `start`. Deeper nodes, which can
            never be emitted, get this position.
        origin: [B] int64, or [P, B] for P planes of positions. A token in column c has position c - origin.
        num_rows: N, 1 to T.
        impl: None, "triton" or "reference".

    Returns:
        packed_tree: [B, T, W + 3] int64. For each node its ancestor words, depth, start and base.
        position_ids: [B, N] or [P, B, N] int64, min(base + depth, start + last_position) - origin.
        slots: [B, N] int64, base + T - N, base + T - N + 1, ...

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "tree_inputs"
    check = Check(op)
    _, nodes = check("depth", depth, "B, T", torch.int64)
    check("ancestors", ancestors, "B, T, W", torch.int64)
    for name, tensor in (("start", start), ("base", base), ("last_position", last_position)):
        check(name, tensor, "B", torch.int64)
    check("origin", origin, "P, B" if origin.dim() == 2 else "B", torch.int64)
    if not 1 <= num_rows <= nodes:
        raise ValueError(f"{op}: num_rows must be 1 to {nodes}, the number of nodes, got {num_rows}")
    compute = resolve(op, impl, depth.device)
    return TreeInputs(*compute(depth, ancestors, start, base, last_position, origin, num_rows))


@typed
def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed_tree: torch.Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention of draft-tree nodes over the text before the tree and over their own ancestors.

    Row i of the query is tree node T - N + i. It attends to the slots [start, length) of its sequence and to slot
    length + j for every node j whose bit is set in its ancestor words, which include the node itself. Slots outside
    [start, length + T) are ignored, whatever they hold. Softmax and sums are computed in fp32. A query, key or value
    that is not finite affects only the rows that attend to it; their outputs may be NaN.

    With the kernel, the bits of a row depend only on the row's own start, length and path, inside a configuration
    bucket: the same device, dtype, heads, head dims, options, S, N and T, and the same smallest power of two >= B.
    Other rows, and slots that it does not see, do not change them.

    Strides: any. Query, key, value and packed tree are read in place if their last dimension is contiguous.

    Args:
        query: [B, Hq, N, D] fp32, bf16 or fp16.
        key: [B, Hkv, S, D], same dtype. Query heads h * Hq/Hkv to (h + 1) * Hq/Hkv - 1 use key head h.
        value: [B, Hkv, S, Dv], same dtype.
        packed_tree: [B, T, W + 3] int64, T >= N, as `DraftTree.pack` returns it. For each node: its ancestor words
            (bit j % 64 of word j // 64 is node j), its depth, and the start and length of its sequence in slots. The
            caller must ensure that length + T <= S; it is not checked, because lengths are only read on the device.
        scale: factor for query @ key; D ** -0.5 by default.
        sliding_window: a row sees only keys whose position is less than this number of positions before its own.
        chunk_size: a row sees only keys of its own chunk of positions (Llama 4).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [Hq] float. An additional logit per head in the softmax's denominator (gpt-oss).
        impl: None, "triton" or "reference". The kernel supports D and Dv up to 512, in fp32 up to 256. None selects
            the reference for wider heads.

    Returns:
        [B, N, Hq, Dv], query's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "tree_attention"
    check = Check(op)
    _, query_heads, rows, head_dim = check("query", query, "B, Hq, N, D", *FLOAT_DTYPES)
    _, kv_heads, slots, _ = check("key", key, "B, Hkv, S, D", query.dtype)
    if query_heads % kv_heads:
        raise check.refusal("key", f"a tensor whose number of heads divides {query_heads}", key)
    *_, value_dim = check("value", value, "B, Hkv, S, Dv", query.dtype)
    _, nodes, fields = check("packed_tree", packed_tree, "B, T, W + 3", torch.int64)
    if not rows <= nodes <= slots or fields != -(-nodes // WORD_BITS) + TREE_FIELDS:
        wanted = f"{rows} to {slots} nodes of ceil(T/{WORD_BITS}) + {TREE_FIELDS} fields"
        raise check.refusal("packed_tree", wanted, packed_tree)
    for name, option in (("sliding_window", sliding_window), ("chunk_size", chunk_size), ("softcap", softcap)):
        if option is not None and not option > 0:
            raise ValueError(f"{op}: {name} must be None or positive, got {option}")
    if sinks is not None:
        check("sinks", sinks, "Hq", *ANY_FLOAT)
    widest = MAX_HEAD_DIMS[query.element_size()]
    if max(head_dim, value_dim) > widest:
        if impl == "triton":
            name, tensor = ("key", key) if head_dim > widest else ("value", value)
            wanted = f'a tensor with a head dim of at most {widest} for impl="triton" (impl=None uses the reference)'
            raise check.refusal(name, wanted, tensor)
        impl = impl or "reference"
    compute = resolve(op, impl, query.device)
    scale = head_dim**-0.5 if scale is None else scale
    return compute(query, key, value, packed_tree, scale, sliding_window, chunk_size, softcap, sinks)


@typed
def draft_topk(
    logits: torch.Tensor,
    k: int,
    *,
    filters: Filters = NO_FILTERS,
    noise: str = "none",
    seeds: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    depth: int = 0,
    depths: torch.Tensor | None = None,
    nodes: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    with_log_probs: bool = False,
    noisy_log_probs: bool = False,
    impl: str | None = None,
) -> Candidates:
    """The k best tokens after each expanded node of a draft, by logit or by noisy log-probability.

    The noise is a function of the row's seed, `position` and the depth or node (see `noise`). Among equal scores, the
    lower id is better. If fewer than k tokens are left after the filters, the other tokens follow in the order of their
    ids; their log-probability is -inf. Nothing is read on the host.

    The kernel takes two launches. Their time grows with k, which is the number of passes over keys in registers.

    Strides: any, also for the tensors in `filters`. Logits are read in place.

    Args:
        logits: [B, P, V] fp32, bf16 or fp16. The draft's logits at its P expanded nodes.
        k: number of candidates, 1 to V.
        filters: `Filters` of the draft. A row with temperature 0 is greedy. With "none", filters change
            log-probabilities alone, not the candidates.
        noise: "none": tokens are ranked by their logits. "coupled": by filtered log-probability plus the noise with
            which the target will sample at `depth`; it is the same for all nodes of a depth. "draft": by filtered
            log-probability plus noise of each node's own, so that the candidates are draws without replacement.
        seeds: [B] int64. Seed of each row; needed if there is noise.
        position: [B] int64. Number of real tokens before the root; needed if there is noise.
        depth: depth of the candidates, with "coupled".
        depths: [G] int64. A depth for each group, in place of `depth`.
        nodes: [G] int64. The numbers of the nodes whose noise is used, with "draft".
        rows: [G] int64. For each group of candidates, the row of `logits` that they are taken from, 0 to P - 1, which
            is not checked. By default there are G = P groups, one for each row.
        with_log_probs: True if `log_probs` is needed.
        noisy_log_probs: True if `log_probs` is the log-softmax of the noisy log-probabilities.
        impl: None, "triton" or "reference".

    Returns:
        `Candidates`: tokens [B, G, k] int64, has_nan [B, G] bool, log_probs [B, G, k] fp32 or None.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "draft_topk"
    check = Check(op)
    _, groups, vocab = check("logits", logits, "B, P, V", *FLOAT_DTYPES)
    if not 1 <= k <= vocab:
        raise ValueError(f"{op}: k must be 1 to {vocab} for {vocab} tokens, got {k}")
    if noise not in DRAFT_NOISE:
        raise ValueError(f"{op}: noise must be one of {', '.join(DRAFT_NOISE)}, got {noise!r}")
    for name, flag in (("with_log_probs", with_log_probs), ("noisy_log_probs", noisy_log_probs)):
        if not isinstance(flag, bool):
            raise ValueError(f"{op}: {name} must be True or False, got {flag!r}")
    if noisy_log_probs and (noise == "none" or not with_log_probs):
        raise ValueError(
            f"{op}: noisy_log_probs must be False without noise or without with_log_probs, got True with noise "
            f'"{noise}" and with_log_probs={with_log_probs}'
        )
    check_filters(check, "filters", filters)
    if rows is not None:
        (groups,) = check("rows", rows, "G", torch.int64)
    check.sizes["G"] = groups
    needed = {"seeds": (seeds, "B"), "position": (position, "B")} if noise != "none" else {}
    needed |= {"nodes": (nodes, "G")} if noise == "draft" else {}
    needed |= {"depths": (depths, "G")} if noise == "coupled" and depths is not None else {}
    for name, (tensor, shape) in needed.items():
        if tensor is None:
            raise ValueError(f'{op}: {name} must be given with noise "{noise}", got None')
        check(name, tensor, shape, torch.int64)
    compute = resolve(op, impl, logits.device)
    given = filters if compute is reference.draft_topk else filters.tensors  # the registered op takes lists of tensors
    drawn = (seeds, position) if noise != "none" else (None, None)
    nodes, depth, depths = nodes if noise == "draft" else None, *((depth, depths) if noise == "coupled" else (0, None))
    flags = with_log_probs, noisy_log_probs
    tokens, has_nan, log_probs = compute(logits, k, given, noise, *drawn, depth, depths, nodes, rows, *flags)
    return Candidates(tokens, has_nan, log_probs if with_log_probs else None)


@typed
def build_tree(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    *,
    num_nodes: int,
    max_depth: int,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The draft tree of the nodes with the highest scores, from a tree of C candidates (EAGLE-2, Li et al. 2024, arXiv
    2406.16858).

    Among equal scores, the candidate with the lower number is kept. A NaN counts as -inf. The root is always kept. The
    kept nodes have the order of their numbers. Nothing is read on the host.

    Strides: any.

    Args:
        tokens: [B, C] int64. The tokens of the candidates.
        parents: [B, C] int64. -1 at candidate 0, the root; 0 <= parents[:, i] < i at all others, which is not checked.
        scores: [B, C] fp32. A score must not exceed that of the candidate's parent; it is not checked. If one does, its
            node may be kept without its parent. Then the parent of the kept node is -1, and the tree is malformed.
        num_nodes: N, the number of nodes to keep, root included; 1 to C.
        max_depth: D, 0 to N - 1. No kept node may be deeper; it is not checked. The ancestors of a deeper node would be
            incomplete.
        impl: None, "triton" or "reference". The kernel supports up to 4096 candidates and 512 kept nodes. None selects
            the reference for more.

    Returns:
        tokens [B, N] int64, parents [B, N] int32, depth [B, N] int64 and ancestors [B, N, ceil(N/64)] int64, see
        `DraftTree`; and nodes [B, N] int64, the number of each kept node among the candidates, ascending.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "build_tree"
    check = Check(op)
    _, candidates = check("tokens", tokens, "B, C", torch.int64)
    check("parents", parents, "B, C", torch.int64)
    check("scores", scores, "B, C", torch.float32)
    if not 1 <= num_nodes <= candidates:
        raise ValueError(f"{op}: num_nodes must be 1 to {candidates} for {candidates} candidates, got {num_nodes}")
    if not 0 <= max_depth < num_nodes:
        raise ValueError(f"{op}: max_depth must be 0 to num_nodes - 1 = {num_nodes - 1}, got {max_depth}")
    if candidates > MAX_CANDIDATES or num_nodes > MAX_BUILT_NODES:
        if impl == "triton":
            raise ValueError(
                f'{op}: with impl="triton", tokens must have at most {MAX_CANDIDATES} candidates, and num_nodes must '
                f"be at most {MAX_BUILT_NODES} (impl=None uses the reference), got {candidates} and {num_nodes}"
            )
        impl = impl or "reference"
    return resolve(op, impl, tokens.device)(tokens, parents, scores, num_nodes, max_depth)


@typed
def best_first_tree(
    root: torch.Tensor,
    candidates: torch.Tensor,
    log_probs: torch.Tensor,
    *,
    num_nodes: int,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The most likely draft tree of N nodes, if the candidates of different positions are independent of each other, as
    those of Medusa's heads are (Cai et al. 2024, arXiv 2401.10774).

    The score of a node is the sum of the candidates' log-probabilities along its path, added in fp32 from the root
    down. It never exceeds its parent's, so the nodes with the highest scores form a tree. They are numbered by falling
    scores: a tree of fewer nodes is the beginning of a larger one. Among equal scores, the shallower node comes first,
    then the node whose parent comes first, then the earlier candidate. Nothing is read on the host.

    Strides: any.

    Args:
        root: [B] int64. The last emitted tokens.
        candidates: [B, D, K] int64. K candidate tokens for each of the next D positions, the most likely first.
        log_probs: [B, D, K] fp32. Log-probability of each candidate. NaN counts as -inf, and positive numbers as 0. The
            numbers of a position must not grow; one that is larger than the one before it counts as equal to it.
        num_nodes: N, root included; at most the number of nodes of the full tree, 1 + K + ... + K ** D.
        impl: None, "triton" or "reference". The kernel supports up to 512 nodes. None selects the reference for more.

    Returns:
        tokens [B, N] int64, parents [B, N] int32, depth [B, N] int64 and ancestors [B, N, ceil(N/64)] int64, see
        `DraftTree`.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "best_first_tree"
    check = Check(op)
    check("root", root, "B", torch.int64)
    _, positions, width = check("candidates", candidates, "B, D?, K", torch.int64)
    check("log_probs", log_probs, "B, D?, K", torch.float32)
    full = sum(width**depth for depth in range(positions + 1))
    if not 1 <= num_nodes <= full:
        raise ValueError(f"{op}: num_nodes must be 1 to {full}, the nodes of the full tree, got {num_nodes}")
    if num_nodes > MAX_BUILT_NODES:
        if impl == "triton":
            raise ValueError(
                f'{op}: with impl="triton", num_nodes must be at most {MAX_BUILT_NODES} (impl=None uses the '
                f"reference), got {num_nodes}"
            )
        impl = impl or "reference"
    return resolve(op, impl, root.device)(root, candidates, log_probs, num_nodes)


@typed
def ngram_lookup(
    tokens: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    estimates: torch.Tensor,
    last_draft: torch.Tensor,
    *,
    num_nodes: int,
    max_depth: int,
    first: float = 0.0,
    threshold: float = 0.0,
    learning: float = 0.0,
    drift: float = 0.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt lookup: draft the tokens that followed an earlier occurrence of the last tokens of each text.

    The longest match is used, of at most G tokens, and the earliest among equally long ones. The draft is a chain. Each
    row estimates the number of accepted tokens for each length of the match, and drafts only if the estimate is at
    least `threshold`. If the text has grown since the last call, that call's draft updates the estimate e of its match
    of m tokens: e += learning * (accepted - e) if tokens were drafted, else e += drift * (first * m - e).

    Strides: estimates and last_draft must be contiguous, since they are changed in place. The other tensors may have
    any strides, and tokens are read in place.

    Args:
        tokens: [B, C] int64. The texts; row b has tokens in the columns from start[b] to length[b].
        start: [B] int64. First column of each text.
        length: [B] int64. Last column of each text, below C; it holds the root.
        estimates: [B, G] fp32, in place. The estimates by length of the match, from 1 to G.
        last_draft: [B, 3] int64, in place. The length of the match of the last draft (0 for none), the number of its
            draft tokens, and the column of its root. Zeros, and `length` as the last column, before the first call.
        num_nodes: N >= 1, root included. Nodes after the draft tokens are padding.
        max_depth: D, 0 to N - 1. Largest number of draft tokens.
        first: estimates drift towards this number for each token of the match.
        threshold: smallest estimate for which tokens are drafted. 0 drafts for every match.
        learning: weight of the last draft in the new estimate.
        drift: weight of the first estimate in the new estimate.
        impl: None, "triton" or "reference".

    Returns:
        tokens [B, N] int64, parents [B, N] int32, depth [B, N] int64 and ancestors [B, N, ceil(N/64)] int64, see
        `DraftTree`.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "ngram_lookup"
    check = Check(op)
    check("tokens", tokens, "B, C", torch.int64)
    check("start", start, "B", torch.int64)
    check("length", length, "B", torch.int64)
    check("estimates", estimates, "B, G", torch.float32)
    if last_draft.dim() != 2 or last_draft.shape[1] != 3:
        raise check.refusal("last_draft", f"int64 [{tokens.shape[0]}, 3]", last_draft)
    check("last_draft", last_draft, "B, F", torch.int64)
    for name, state in (("estimates", estimates), ("last_draft", last_draft)):
        if not state.is_contiguous():
            raise check.refusal(name, "contiguous", state)
    if not 0 <= max_depth < num_nodes:
        raise ValueError(f"{op}: max_depth must be 0 to num_nodes - 1 = {num_nodes - 1}, got {max_depth}")
    compute = resolve(op, impl, tokens.device)
    state = estimates, last_draft
    return compute(tokens, start, length, *state, num_nodes, max_depth, first, threshold, learning, drift)


def _fake_tree_inputs(depth, ancestors, start, base, last_position, origin, num_rows):
    batch, nodes, words = ancestors.shape
    packed = depth.new_empty((batch, nodes, words + TREE_FIELDS))
    return packed, depth.new_empty((*origin.shape, num_rows)), depth.new_empty((batch, num_rows))


def _fake_tree_attention(query, key, value, packed_tree, scale, sliding_window, chunk_size, softcap, sinks):
    batch, query_heads, rows, _ = query.shape
    return query.new_empty((batch, rows, query_heads, value.shape[3]))


def _fake_draft_topk(
    logits, k, filters, noise, seeds, position, depth, depths, nodes, rows, with_log_probs, noisy_log_probs
):
    batch, groups, _ = logits.shape
    groups = groups if rows is None else rows.shape[0]
    tokens = logits.new_empty((batch, groups, k), dtype=torch.int64)
    log_probs = logits.new_empty((batch, groups, k if with_log_probs else 0), dtype=torch.float32)
    return tokens, logits.new_empty((batch, groups), dtype=torch.bool), log_probs


def _empty_tree(tokens, num_nodes):
    batch = tokens.shape[0]
    drafts, depth = (tokens.new_empty((batch, num_nodes)) for _ in range(2))
    parents = tokens.new_empty((batch, num_nodes), dtype=torch.int32)
    return drafts, parents, depth, tokens.new_empty((batch, num_nodes, -(-num_nodes // WORD_BITS)))


def _fake_build_tree(tokens, parents, scores, num_nodes, max_depth):
    return *_empty_tree(tokens, num_nodes), tokens.new_empty((tokens.shape[0], num_nodes))


def _fake_best_first_tree(root, candidates, log_probs, num_nodes):
    return _empty_tree(root, num_nodes)


def _fake_ngram_lookup(tokens, start, length, estimates, last_draft, num_nodes, *options):
    return _empty_tree(tokens, num_nodes)


register(
    "tree_inputs(Tensor depth, Tensor ancestors, Tensor start, Tensor base, Tensor last_position, Tensor origin, "
    "SymInt num_rows) -> (Tensor packed_tree, Tensor position_ids, Tensor slots)",
    _fake_tree_inputs,
    reference,
)
register(
    "tree_attention(Tensor query, Tensor key, Tensor value, Tensor packed_tree, float scale, int? sliding_window, "
    "int? chunk_size, float? softcap, Tensor? sinks) -> Tensor",
    _fake_tree_attention,
    reference,
)
# a `Filters` is passed as the list of its tensors
register(
    "draft_topk(Tensor logits, SymInt k, Tensor?[] filters, str noise, Tensor? seeds, Tensor? position, int depth, "
    "Tensor? depths, Tensor? nodes, Tensor? rows, bool with_log_probs, bool noisy_log_probs) "
    "-> (Tensor tokens, Tensor has_nan, Tensor log_probs)",
    _fake_draft_topk,
    reference,
)
register(
    "build_tree(Tensor tokens, Tensor parents, Tensor scores, SymInt num_nodes, SymInt max_depth) "
    "-> (Tensor kept_tokens, Tensor kept_parents, Tensor depth, Tensor ancestors, Tensor nodes)",
    _fake_build_tree,
    reference,
)
register(
    "best_first_tree(Tensor root, Tensor candidates, Tensor log_probs, SymInt num_nodes) "
    "-> (Tensor tokens, Tensor parents, Tensor depth, Tensor ancestors)",
    _fake_best_first_tree,
    reference,
)
register(
    "ngram_lookup(Tensor tokens, Tensor start, Tensor length, Tensor(a!) estimates, Tensor(b!) last_draft, "
    "SymInt num_nodes, SymInt max_depth, float first, float threshold, float learning, float drift) "
    "-> (Tensor tokens, Tensor parents, Tensor depth, Tensor ancestors)",
    _fake_ngram_lookup,
    reference,
)
