"""Logits processors and draft trees: what is fused into acceptance, and, on the host, what is asked node by node.

Every node that is asked about gets the row that plain `generate` would give it. Processors that can do all nodes at
once are in `penalties`. Letters: B sequences, N tree nodes, V vocabulary.
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

# these look at one row of their arguments at a time, and remember nothing
STATELESS = (
    *OVER_NODES,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    WatermarkLogitsProcessor,
)

Choose = Callable[[torch.Tensor, list[int], list[int]], list[int]]


def is_stateless(processor: LogitsProcessor) -> bool:
    """Row i of what it returns is known to depend on row i of its arguments alone, however often and in whatever order
    it is called: it is exactly of a type that does so, or says so by an attribute `stateless = True`, as may the
    function of a `PrefixConstrainedLogitsProcessor`."""
    if type(processor) is PrefixConstrainedLogitsProcessor:
        processor = processor._prefix_allowed_tokens_fn
    return type(processor) in STATELESS or getattr(processor, "stateless", False) is True


def check_stateless(processors: LogitsProcessorList, rule: str) -> None:
    """Refuse what is not known to be `is_stateless`, for a rule that looks at many nodes of one depth.

    Raises:
        ValueError: names the processor, and what to do.
    """
    for processor in processors:
        if not is_stateless(processor):
            name, on = type(processor).__name__, "its class"
            if type(processor) is PrefixConstrainedLogitsProcessor:
                on = "the function given as prefix_allowed_tokens_fn"
            elif not isinstance(processor, LogitsProcessor):
                name, on = getattr(processor, "__name__", name), "it"
            raise ValueError(
                f'generate: logits_processor must be functions of their arguments with rule "{rule}", which asks about '
                f"texts that plain decoding never has, got {name}, which may keep state from call to call or look "
                f'across rows: use rule="coupled" (the default), or set stateless = True on {on}, if row i of the '
                "scores it returns depends on row i of its arguments alone"
            )


def split_processors(
    processors: LogitsProcessorList, batch: int, device: torch.device
) -> tuple[LogitsProcessorList, Filters, LogitsProcessorList]:
    """Split off what `Filters` can say: temperature, top-k, top-p and min-p at the end of the list, in this order.

    A normalisation at the very end leaves a distribution as it is, and goes with them. Where a processor comes between
    or after them, nothing is fused: what comes after it must see its scores.

    Args:
        processors: as `generate` prepared them for sampling.
        batch: B.
        device: of the filters.

    Returns:
        others: to be applied to the logits, in order, before the filters.
        filters: a number for each sequence, with the bound on top-k.
        warpers: what the filters stand for, for scores that are put out.
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
                options["most"] = value
    return others, Filters(**options), warpers


def _is_fusible(processor: LogitsProcessor) -> bool:
    """A warper of the fused group as `generate` makes it for sampling."""
    filtered, least = getattr(processor, "filter_value", float("-inf")), getattr(processor, "min_tokens_to_keep", 1)
    return type(processor) in FUSED and filtered == float("-inf") and least == 1


def first_choice(scores: torch.Tensor, rows: list[int], depth: list[int]) -> list[int]:
    """Greedy's choice of a token for each row of scores [R, V]."""
    return scores.argmax(-1).tolist()


def children_of(tree: DraftTree) -> list[dict[tuple[int, int], int]]:
    """By row: (node, token) -> the first child of the node that carries the token. The host reads the tree."""
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
    """Process the scores of the tree in place, wherever acceptance will look that follows one choice from each node.

    The walk goes down each row's tree on the host, from the root to the child that carries the token chosen by the
    processed scores, so processors are called once for each emitted token and never with a text that the target did
    not choose. Other nodes keep their raw logits.

    Args:
        processors: as `generate` prepared them; all of them `is_stateless`.
        scores: [B, N, V] fp32. The target's logits.
        host_tokens: [B, columns] int64. Prompt and emitted tokens, padding beyond.
        host_length: [B] int64. Column of each root.
        host_budget: [B] int64. Tokens each row may still emit; rows without any are left as they are.
        eos_ids: tokens that end a text.
        choose: (processed scores [R, V], their R rows in the batch, the R nodes' depths) -> R tokens.

    Yields:
        after each call of the processors, for each row asked about: the node, and the token chosen.
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
    """Process the scores of the tree in place, at every node that the target can reach.

    A node is asked about only if its parent's processed scores leave its token possible, so that a grammar is never
    asked about a text that it forbade. Other nodes keep their raw logits: no rule gets there.

    Args: as those of `process_path`. The host reads the tree, and once for each depth what is possible.
    """
    tokens, parents, depth = torch.stack([tree.tokens, tree.parents.long(), tree.depth]).tolist()
    idle = _ended_texts(host_tokens, host_length, host_budget, eos_ids, scores.shape[-1])
    # by row: the nodes to ask about at a depth, and their texts
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
    """The texts [B, columns] as they would go on if every row had ended: to a processor, nothing out of the way."""
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
    """Process in place a node of each row of `text`, texts of one length; `at` names the nodes. Returns them: [R, V].

    A processor may keep something by row index: the call holds every sequence at its own row, those that are not asked
    about with their text of `idle`, cut to this length. What comes out for them is dropped.
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
