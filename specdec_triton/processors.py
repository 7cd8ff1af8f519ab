"""Logits processors over a draft tree: every node that matters gets the row that plain `generate` would give it."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from transformers import LogitsProcessorList

from .tree import DraftTree


def process_path(
    processors: LogitsProcessorList,
    tree: DraftTree,
    scores: torch.Tensor,
    host_tokens: np.ndarray,
    host_length: np.ndarray,
    host_budget: np.ndarray,
    eos_ids: list[int],
) -> Iterator[dict[int, tuple[int, int]]]:
    """Process the scores of the tree in place, wherever greedy acceptance will look.

    The walk goes down each row's tree on the host, from the root to the child that carries the processed scores' first
    choice, so processors are called once for each emitted token and never with a text that the target did not choose.
    A processor may keep something by row index: a call holds every sequence at its own row, those that are not asked
    about with their own text, cut to this length or, like a finished row, padded to it. What comes out for them is
    dropped. Other nodes keep their raw logits.

    Args:
        processors: as `generate` prepared them; functions of (input_ids, scores) alone.
        scores: [B, N, V] fp32. The target's logits.
        host_tokens: [B, columns] int64. Prompt and emitted tokens, padding beyond.
        host_length: [B] int64. Column of each root.
        host_budget: [B] int64. Tokens each row may still emit; rows without any are left as they are.
        eos_ids: tokens that end a text.

    Yields:
        after each call of the processors, for each row asked about: the node, and its first choice.
    """
    tokens, parents = torch.stack([tree.tokens, tree.parents.long()]).tolist()
    children = [
        {(parent, token): node for node, (parent, token) in reversed(list(enumerate(zip(*row, strict=True)))) if node}
        for row in zip(parents, tokens, strict=True)
    ]
    at = {int(row): 0 for row in np.flatnonzero(host_budget)}
    text = {row: host_tokens[row, : host_length[row] + 1] for row in at}
    while at:
        by_length = defaultdict(list)
        for row in at:
            by_length[len(text[row])].append(row)
        following = {}
        for length, rows in by_length.items():
            input_ids = host_tokens[:, :length].copy()
            call_scores = scores[:, 0].clone()
            for row in rows:
                input_ids[row] = text[row]
                call_scores[row] = scores[row, at[row]]
            processed = processors(torch.from_numpy(input_ids).to(scores.device), call_scores)
            choices = processed.argmax(-1).tolist()
            for row in rows:
                scores[row, at[row]] = processed[row]
                child = children[row].get((at[row], choices[row]))
                if (
                    child is not None
                    and choices[row] not in eos_ids
                    and len(text[row]) - host_length[row] < host_budget[row]
                ):
                    following[row] = child
                    text[row] = np.append(text[row], choices[row])
            yield {row: (at[row], choices[row]) for row in rows}
        at = following
