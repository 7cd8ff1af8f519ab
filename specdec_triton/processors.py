"""Logits processors over a draft tree: every node gets the row that plain `generate` would give it."""

from collections import defaultdict

import numpy as np
import torch
from transformers import LogitsProcessorList

from .tree import DraftTree


def process_nodes(
    processors: LogitsProcessorList,
    tree: DraftTree,
    logits: torch.Tensor,
    host_tokens: np.ndarray,
    host_length: np.ndarray,
    host_budget: np.ndarray,
) -> torch.Tensor:
    """Processed fp32 scores [B, N, V] of every node of every unfinished row.

    A processor may look at the whole text and may keep something by row index, so a node's call holds its sequence at
    that sequence's own row of the batch: padding, prompt, emitted tokens, then the node's path. Nodes of different
    sequences whose texts are equally long share a call; a row without such a node carries another's text, and what
    comes out there is dropped. Runs on the host: one read of the tree's tokens and parents.

    Args:
        processors: as `generate` prepared them; functions of (input_ids, scores) alone.
        logits: [B, N, V], the target's.
        host_tokens: [B, columns] int64. Prompt and emitted tokens.
        host_length: [B] int64. Column of each root.
        host_budget: [B] int64. Tokens each row may still emit; rows without any are left as they are.
    """
    scores = logits.to(torch.float32, copy=True)
    batch = scores.shape[0]
    tokens, parents = torch.stack([tree.tokens, tree.parents.long()]).tolist()
    calls = defaultdict(list)  # (text length, k): the k-th node of that length, of each row
    for row in np.flatnonzero(host_budget):
        column = int(host_length[row])
        paths = {0: host_tokens[row, : column + 1]}
        count = defaultdict(int)
        for node in range(tree.num_nodes):
            if node:
                if parents[row][node] < 0:
                    continue
                paths[node] = np.append(paths[parents[row][node]], tokens[row][node])
            length = len(paths[node])
            calls[length, count[length]].append((row, node, paths[node]))
            count[length] += 1
    for members in calls.values():
        row, node, path = members[0]
        input_ids = np.tile(path, (batch, 1))
        call_scores = scores[row, node].repeat(batch, 1)
        for row, node, path in members:
            input_ids[row] = path
            call_scores[row] = scores[row, node]
        processed = processors(torch.from_numpy(input_ids).to(scores.device), call_scores)
        for row, node, _ in members:
            scores[row, node] = processed[row]
    return scores
