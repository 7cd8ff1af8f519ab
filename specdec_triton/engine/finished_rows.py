"""Rows that ended while others go on. Plain `generate` feeds them pad tokens in every step.

Rounds leave such a row as it is. Only if its scores, or its keys and values in a returned cache, are needed, pad tokens
are fed, many columns in one forward.

Letters: B sequences, n columns, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ..drafters import DraftContext
from ..tree import DraftTree, Topology
from .output import Output

CHUNK = 64  # columns a forward at most


class FinishedRows:
    """The rows of one call that ended.

    Each is taken further by the columns that were asked for: its root, in the context, is the next pad token to feed,
    and the keys and values before it stay.

    Args:
        context: the call's sequences; `length`, `tokens` and `host_length` of rows that ended move on.
        output: knows which rows ended, and where.
    """

    def __init__(self, context: DraftContext, output: Output):
        self._context, self._output = context, output
        self._begun = np.zeros(len(context.host_length), dtype=bool)

    def reached(self) -> np.ndarray:
        """[B] int64. Columns whose keys and values are in the cache, in rows that ended."""
        return np.where(self._begun, self._context.host_length, self._output.length)

    def run(self, rows: list[int], count: int) -> Iterator[tuple[DraftTree, torch.Tensor, torch.Tensor, np.ndarray]]:
        """Feed `count` further tokens, fewer where a row's columns end; to be consumed whole, and not between a
        verification and its compaction.

        Args:
            rows: of those that ended.
            count: tokens, at least 1.

        Yields:
            a chain of n tokens, the logits [B, n, V] after each, [B] int64 the column of the first, and [B] int64 on
            the host: how many of them `rows` have columns for. Other rows' are of no text.
        """
        context, end, pad = self._context, self._output.length, self._output.pad_id
        device = context.length.device
        index = torch.tensor(rows, device=device)
        # a row that a criterion stopped had gone on
        context.host_length[rows] = self.reached()[rows]
        context.length[index] = torch.from_numpy(context.host_length[rows]).to(device)
        self._begun[rows] = True
        columns = torch.arange(context.tokens.shape[1], device=device)
        own = context.tokens[index]
        context.tokens[index] = torch.where(columns > context.length[index, None], pad, own)

        left = np.zeros_like(end)
        left[rows] = np.minimum(context.max_length - 1 - context.host_length[rows], count)
        count = int(left.max())
        # what is written for other rows lies where nothing is kept
        base = torch.maximum(context.length, torch.from_numpy(end).to(device))
        context.target.cache.reserve(max(context.longest, int(end.max())) + -(-count // CHUNK) * CHUNK)
        for done in range(0, count, CHUNK):
            wanted = min(CHUNK, count - done)
            width = 1 << (wanted - 1).bit_length()  # few shapes
            fed = context.tokens.new_full((len(base), width), pad)
            if not done:
                last = self._output.tokens[rows, context.host_length[rows]]
                fed[index, 0] = torch.from_numpy(last).to(device)
            tree = DraftTree.from_topology(Topology.chain(width - 1), fed)
            logits = context.target.forward(tree.tokens, tree.depth, tree.ancestors, base + done)
            yield tree, logits, (base + done).clamp(max=context.max_length - 1), (left - done).clip(0, wanted)
        context.host_length[rows] += left[rows]
        context.length[index] += torch.from_numpy(left[rows]).to(device)
