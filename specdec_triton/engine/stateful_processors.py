"""Runs logits processors that may keep state, with exactly the calls that plain `generate` would make.

All rows walk down their trees together, one column at a time. The processors get the texts and scores of all B rows;
finished rows have pad tokens and the scores after them. Then a token is chosen for each unfinished row, and the
stopping criteria get the column. The walk continues while the chosen token of every unfinished row is a draft token of
its tree. After a round, all rows therefore have the same length.

Letters: B sequences, N tree nodes, D edges on the longest path, V vocabulary.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from transformers import LogitsProcessorList

from ..drafters import DraftContext
from ..ops.reference import Acceptance
from ..processors.host import Choose, children_of
from ..tree import DraftTree
from .finished_rows import CHUNK, FinishedRows
from .output import Output

Keep = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


class Lockstep:
    """The processors of one call.

    Args:
        processors: as `generate` prepared them.
        context: the call's sequences.
        output: gets each column as its tokens are chosen.
        finished: computes the logits of finished rows.

    Attributes:
        stopped: rows that a criterion stopped in the last round.
    """

    def __init__(self, processors: LogitsProcessorList, context: DraftContext, output: Output, finished: FinishedRows):
        self._processors, self._context, self._output, self._finished = processors, context, output, finished
        self._ahead = [deque() for _ in context.host_length]  # for each finished row: logits [V] of its next columns
        self.stopped: list[int] = []

    def prepare(self, max_depth: int) -> None:
        """Compute the logits that finished rows will need in a round of at most `max_depth` levels. It must be called
        before the round is verified."""
        context, columns = self._context, max_depth + 1
        ended = self._output.ended & (self._finished.reached() < context.max_length - 1)
        rows = [row for row in np.flatnonzero(ended).tolist() if len(self._ahead[row]) < columns]
        if rows:
            for _, logits, _, counts in self._finished.run(rows, max(columns, CHUNK)):
                for row in rows:
                    self._ahead[row] += logits[row, : counts[row]].to(torch.float32, copy=True).unbind()

    def accept(self, tree: DraftTree, logits: torch.Tensor, choose: Choose, keep: Keep) -> Acceptance:
        """Walk down the trees of all rows. Returns the accepted paths and the token after each of them.

        Output, criteria and streamer get each column before the processors are called for the next one. If a token
        cannot be chosen because of NaN, the walk stops before its column.

        Args:
            tree: draft tree of N nodes.
            logits: [B, N, V] floating point. The target's logits.
            choose: (processed scores [R, V], R row numbers in the batch, R depths) -> R tokens.
            keep: (processed scores [B, V], logits [B, V]) -> the scores to keep, [B, V] by name.
        """
        output, device = self._output, logits.device
        live, batch = np.flatnonzero(self._context.host_budget).tolist(), len(logits)
        ended = sorted({*range(batch)} - {*live})
        children, rows, at = children_of(tree), torch.arange(batch, device=device), np.zeros(batch, dtype=np.int64)
        path = np.full((batch, tree.max_depth), -1, dtype=np.int32)
        next_ids, has_nan = np.full(batch, -1), np.zeros(batch, dtype=bool)
        depth, self.stopped = 0, []
        while True:
            given = logits[rows, torch.from_numpy(at).to(device)].to(torch.float32, copy=True)
            for row in ended:
                given[row] = self._ahead[row].popleft()
            processed = self._processors(output.sequences, given)
            best = processed[live].amax(-1)
            has_nan[live] = (best.isnan() if self._context.rule == "greedy" else ~best.isfinite()).tolist()
            if has_nan.any():
                break
            next_ids[live] = choose(processed[live], live, [depth] * len(live))
            kept = {name: scores[:, None] for name, scores in keep(processed, given).items()}
            output.keep(ended, kept)
            counts = [int(row in live) for row in range(batch)]
            self.stopped += output.append(next_ids[:, None].tolist(), counts, kept)
            following = [children[row].get((int(at[row]), int(next_ids[row]))) for row in live]
            if output.done or output.ended[live].any() or None in following:
                break
            at[live] = path[live, depth] = following
            depth += 1
        length = np.where(self._context.host_budget > 0, depth, 0)
        return Acceptance(*(torch.from_numpy(part).to(device) for part in (path, length, next_ids, has_nan)))
