"""Splits logits processors into filters that acceptance applies and others, and calls processors on the host.

On the host, processors are called for single nodes of a draft tree. Each of these nodes gets the scores that plain
`generate` would compute. Processors that can process all nodes at once are in `device`.

Letters: B sequences, N tree nodes, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkLogitsProcessor,
)

from ..ops.filters import Filters
from ..tree import DraftTree
from .device import OVER_NODES

# in the order in which the filters apply: type -> (field of Filters, the processor's attribute, dtype)
FUSED = {
    TemperatureLogitsWarper: ("temperature", "temperature", torch.float32),
    TopKLogitsWarper: ("top_k", "top_k", torch.int64),
    TopPLogitsWarper: ("top_p", "top_p", torch.float64),
    MinPLogitsWarper: ("min_p", "min_p", torch.float32),
}

# processors that treat each row of their arguments independently and keep no state
STATELESS = (
    *OVER_NODES,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    WatermarkLogitsProcessor,
)

Choose = Callable[[torch.Tensor, list[int], list[int]], list[int]]


def is_stateless(processor: LogitsProcessor) -> bool:
    """True if row i of a processor's result is known to depend only on row i of its arguments, for any number and order
    of calls.

    This is known if the processor has exactly one of the types in `STATELESS`, or if it has an attribute `stateless`
    that is True. For a `PrefixConstrainedLogitsProcessor`, its function must have this attribute.
    """
    if type(processor) is PrefixConstrainedLogitsProcessor:
        processor = processor._prefix_allowed_tokens_fn
    return type(processor) in STATELESS or getattr(processor, "stateless", False) is True


def check_stateless(processors: LogitsProcessorList, rule: str) -> None:
    """Refuse processors that may keep state, for a rule that looks at several nodes of one depth.

    Raises:
        ValueError: `is_stateless` is False for a processor; the message names it and suggests a remedy.
    """
    for processor in processors:
        if not is_stateless(processor):
            name, on = type(processor).__name__, "its class"
            if type(processor) is PrefixConstrainedLogitsProcessor:
                on = "the function given as prefix_allowed_tokens_fn"
            elif not isinstance(processor, LogitsProcessor):
                name, on = getattr(processor, "__name__", name), "it"
            raise ValueError(
                f'generate: logits_processor must be functions of their arguments with rule "{rule}", which calls them '
                f"with texts that plain decoding never has, got {name}, which may keep state between calls or look at "
                f'other rows: use rule="coupled" (the default), or set stateless = True on {on} if row i of the scores '
                "that it returns depends only on row i of its arguments"
            )


def split_processors(
    processors: LogitsProcessorList, batch: int, device: torch.device
) -> tuple[LogitsProcessorList, Filters, LogitsProcessorList]:
    """Split off the processors that `Filters` can represent: temperature, top-k, top-p and min-p, in this order, at the
    end of the list.

    A `LogitNormalization` at the very end does not change the distribution and is split off with them. If another
    processor comes between or after them, nothing is split off, because the later ones must get its scores.

    Args:
        processors: as `generate` prepared them for sampling.
        batch: B.
        device: device of the filters.

    Returns:
        others: the processors to apply to the logits, in order, before the filters.
        filters: the filters of each sequence, with `max_top_k`.
        warpers: the processors that the filters replace. They are applied to scores that the call returns.
    """
    start = len(processors)
    if processors and type(processors[-1]) is LogitNormalization:
        start -= 1
    order = list(FUSED)
    while start and type(processors[start - 1]) in order and _is_fusible(processors[start - 1]):
        start -= 1
        order = order[: order.index(type(processors[start]))]
    others, warpers = LogitsProcessorList(processors[:start]), LogitsProcessorList(processors[start:])
    if any(type(processor) in FUSED for processor in others):
        return LogitsProcessorList(processors), Filters(), LogitsProcessorList()
    options = {}
    for warper in warpers:
        if type(warper) in FUSED:
            name, attribute, dtype = FUSED[type(warper)]
            value = getattr(warper, attribute)
            options[name] = torch.full((batch,), value, dtype=dtype, device=device)
            if name == "top_k":
                options["max_top_k"] = value
    return others, Filters(**options), warpers


def _is_fusible(processor: LogitsProcessor) -> bool:
    """True if a processor is one of the types in `FUSED` with the options that `generate` sets for sampling."""
    filtered, least = getattr(processor, "filter_value", float("-inf")), getattr(processor, "min_tokens_to_keep", 1)
    return type(processor) in FUSED and filtered == float("-inf") and least == 1


def first_choice(scores: torch.Tensor, rows: list[int], depth: list[int]) -> list[int]:
    """The token that greedy decoding chooses for each row of scores [R, V]."""
    return scores.argmax(-1).tolist()


def children_of(tree: DraftTree) -> list[dict[tuple[int, int], int]]:
    """For each row a dict (node, token) -> first child of the node with that token. The host reads the tree."""
    tokens, parents = torch.stack([tree.tokens, tree.parents.long()]).tolist()
    return [
        {(parent, token): node for node, (parent, token) in reversed(list(enumerate(zip(*row, strict=True)))) if node}
        for row in zip(parents, tokens, strict=True)
    ]


def process_path(
    processors: LogitsProcessorList,
    tree: DraftTree,
    scores: torch.Tensor,
    host_tokens: np.ndarray,
    host_length: np.ndarray,
    host_budget: np.ndarray,
    eos_ids: list[int],
    choose: Choose = first_choice,
) -> Iterator[dict[int, tuple[int, int]]]:
    """Process, in place, the scores on the path that acceptance will follow. For rules that make one choice at each
    node.

    On the host, the walk goes down each row's tree from the root, each time to the child with the token that the
    processed scores choose. Processors are therefore called once for each emitted token, and only with texts that the
    target chose. Other nodes keep their raw logits.

    Args:
        processors: as `generate` prepared them; `is_stateless` must be True for all of them.
        tree: draft tree of N nodes.
        scores: [B, N, V] fp32. The target's logits, changed in place.
        host_tokens: [B, columns] int64. Prompt and emitted tokens, then padding.
        host_length: [B] int64. Column of each root.
        host_budget: [B] int64. Number of tokens that each row may still emit; rows with 0 are skipped.
        eos_ids: tokens that end a text.
        choose: (processed scores [R, V], R row numbers in the batch, R depths) -> R tokens.

    Yields:
        After each call of the processors, a dict from row to (node, chosen token).
    """
    children = children_of(tree)
    idle = _ended_texts(host_tokens, host_length, host_budget, eos_ids, scores.shape[-1])
    at = {int(row): 0 for row in np.flatnonzero(host_budget)}
    text = {row: host_tokens[row, : host_length[row] + 1] for row in at}
    while at:
        by_length = defaultdict(list)
        for row in at:
            by_length[len(text[row])].append(row)
        following = {}
        for rows in by_length.values():
            processed = _process_rows(processors, scores, idle, at, {row: text[row] for row in rows})
            depth = {row: int(len(text[row]) - 1 - host_length[row]) for row in rows}
            choices = choose(processed, rows, list(depth.values()))
            for row, choice in zip(rows, choices, strict=True):
                child = children[row].get((at[row], choice))
                if child is not None and choice not in eos_ids and depth[row] + 1 < host_budget[row]:
                    following[row] = child
                    text[row] = np.append(text[row], choice)
            yield {row: (at[row], choice) for row, choice in zip(rows, choices, strict=True)}
        at = following


def process_each(
    processors: LogitsProcessorList,
    tree: DraftTree,
    scores: torch.Tensor,
    host_tokens: np.ndarray,
    host_length: np.ndarray,
    host_budget: np.ndarray,
    eos_ids: list[int],
) -> None:
    """Process, in place, the scores of every node that the target can reach.

    A node is processed only if its token is possible by its parent's processed scores. A grammar is therefore never
    called with a text that it forbade. Other nodes keep their raw logits; no rule reaches them.

    The host reads the tree, and once for each depth the tokens that are possible.

    Args:
        processors, tree, scores, host_tokens, host_length, host_budget, eos_ids: see `process_path`.
    """
    tokens, parents, depth = torch.stack([tree.tokens, tree.parents.long(), tree.depth]).tolist()
    idle = _ended_texts(host_tokens, host_length, host_budget, eos_ids, scores.shape[-1])
    # row -> node -> text, for the nodes to process at the current depth
    asked = {int(row): {0: host_tokens[row, : host_length[row] + 1]} for row in np.flatnonzero(host_budget)}
    for level in range(1, tree.max_depth + 2):
        by_length = defaultdict(dict)
        for row, texts in asked.items():
            by_length[host_length[row] + level][row] = list(texts.items())
        for pending in by_length.values():
            for turn in range(max(len(nodes) for nodes in pending.values())):
                now = {row: nodes[turn] for row, nodes in pending.items() if turn < len(nodes)}
                at, text = ({row: pair[part] for row, pair in now.items()} for part in (0, 1))
                _process_rows(processors, scores, idle, at, text)
        links = [
            (row, node, parents[row][node], tokens[row][node])
            for row in asked
            for node in range(1, tree.num_nodes)
            if depth[row][node] == level and parents[row][node] in asked[row] and level < host_budget[row]
        ]
        if not links:
            return
        row, _, parent, token = torch.tensor(links, device=scores.device).T
        possible = (scores[row, parent, token] > float("-inf")).tolist()
        texts, asked = asked, defaultdict(dict)
        for (row, node, parent, token), reached in zip(links, possible, strict=True):
            if reached and token not in eos_ids:
                asked[row][node] = np.append(texts[row][parent], token)


def _ended_texts(
    host_tokens: np.ndarray, host_length: np.ndarray, host_budget: np.ndarray, eos_ids: list[int], vocab: int
) -> np.ndarray:
    """The texts [B, columns] with EOS and padding after each root. They fill the rows of a call that are not needed."""
    ended, live = host_tokens.copy(), np.flatnonzero(host_budget)
    ends = [token for token in eos_ids if token < vocab]
    if ends:
        ended[live, host_length[live] + 1] = ends[0]
    return ended


def _process_rows(
    processors: LogitsProcessorList,
    scores: torch.Tensor,
    idle: np.ndarray,
    at: dict[int, int],
    text: dict[int, np.ndarray],
) -> torch.Tensor:
    """Process, in place, the scores of one node in each row of `text`.

    A processor may store data by row index, so each call passes all B rows in order. Rows that are not in `text` get
    their text in `idle`, cut to the same length, and their results are dropped.

    Args:
        processors, scores: see `process_path`.
        idle: [B, columns] int64, see `_ended_texts`.
        at: row -> node.
        text: row -> text of the node. All texts have the same length.

    Returns:
        Processed scores [R, V] of the rows of `text`.
    """
    rows = list(text)
    input_ids = idle[:, : len(text[rows[0]])].copy()
    call_scores = scores[:, 0].clone()
    for row in rows:
        input_ids[row] = text[row]
        call_scores[row] = scores[row, at[row]]
    processed = processors(torch.from_numpy(input_ids).to(scores.device), call_scores)
    for row in rows:
        scores[row, at[row]] = processed[row]
    return processed[rows]
