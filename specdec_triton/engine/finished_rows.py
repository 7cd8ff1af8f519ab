"""Rows that have finished while other rows go on. Plain `generate` feeds them a pad token in every step.

Rounds do not change a finished row. Pad tokens are fed only if the row's scores are needed, or its keys and values in a
returned cache. One forward then feeds many columns.

Letters: B sequences, n columns, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ..drafters import DraftContext
from ..tree import DraftTree, Topology
from .output import Output

CHUNK = 64  # largest number of columns per forward


class FinishedRows:
    """The finished rows of one call.

    Each row advances by the columns that `run` was asked for. In the context, its root is then the next token to feed,
    and the keys and values before it are in the cache.

    Args:
        context: the call's sequences; `length`, `tokens` and `host_length` of finished rows are updated.
        output: holds the text and the end of each row.
    """

    def __init__(self, context: DraftContext, output: Output):
        self._context, self._output = context, output
        self._begun = np.zeros(len(context.host_length), dtype=bool)

    def reached(self) -> np.ndarray:
        """[B] int64. Number of columns whose keys and values are in the cache; valid for finished rows."""
        return np.where(self._begun, self._context.host_length, self._output.length)

    def run(self, rows: list[int], count: int) -> Iterator[tuple[DraftTree, torch.Tensor, torch.Tensor, np.ndarray]]:
        """Feed `count` more tokens to each of `rows`, or fewer if a row reaches its last column.

        The iterator must be consumed completely. It must not run between a verification and its compaction.

        Args:
            rows: finished rows.
            count: number of tokens, at least 1.

        Yields:
            A chain of n tokens; the logits [B, n, V] after each of them; [B] int64, the column of the first token; and
            [B] int64 on the host, the number of these tokens that are within the row's columns. The values of rows that
            are not in `rows` are undefined.
        """
        context, end, pad = self._context, self._output.length, self._output.pad_id
        device = context.length.device
        index = torch.tensor(rows, device=device)
        # a row that a criterion stopped may have advanced further on the device
        context.host_length[rows] = self.reached()[rows]
        context.length[index] = torch.from_numpy(context.host_length[rows]).to(device)
        self._begun[rows] = True
        columns = torch.arange(context.tokens.shape[1], device=device)
        own = context.tokens[index]
        context.tokens[index] = torch.where(columns > context.length[index, None], pad, own)

        left = np.zeros_like(end)
        left[rows] = np.minimum(context.max_length - 1 - context.host_length[rows], count)
        count = int(left.max())
        # keys and values of other rows are written to unused slots
        base = torch.maximum(context.length, torch.from_numpy(end).to(device))
        context.target.cache.reserve(max(context.longest, int(end.max())) + -(-count // CHUNK) * CHUNK)
        for done in range(0, count, CHUNK):
            wanted = min(CHUNK, count - done)
            width = 1 << (wanted - 1).bit_length()  # powers of two, for few shapes
            fed = context.tokens.new_full((len(base), width), pad)
            if not done:
                last = self._output.tokens[rows, context.host_length[rows]]
                fed[index, 0] = torch.from_numpy(last).to(device)
            tree = DraftTree.from_topology(Topology.chain(width - 1), fed)
            logits = context.target.forward(tree.tokens, tree.depth, tree.ancestors, base + done)
            yield tree, logits, (base + done).clamp(max=context.max_length - 1), (left - done).clip(0, wanted)
        context.host_length[rows] += left[rows]
        context.length[index] += torch.from_numpy(left[rows]).to(device)
