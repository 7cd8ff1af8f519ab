"""The host's side of a generation: tokens as they arrive, streamed and judged exactly as plain `generate` would.

Sequences of a batch emit different numbers of tokens a round. Stopping criteria and streamers of transformers expect
whole columns, one step at a time, so the transcript advances column by column, and only over columns that every
sequence has reached: each call gets the very batch that plain decoding would have passed.
"""

from collections import deque

import numpy as np
import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Transcript:
    """See the module.

    Args:
        input_ids: [B, T] int64. The prompt, padding included.
        max_length: columns at most.
        eos_ids: tokens that end a row.
        pad_id: what fills a row after its end, or None: rows go on until all have stopped (plain `generate` does so
            when no EOS is set).
        criteria: stopping criteria that must be asked; EOS and `max_length` are known here already.
        streamer: gets [B] tokens a column.
        keep: names of the per-token scores to keep ("scores", "logits"); `criteria` get the first where it is kept.

    Attributes:
        tokens: [B, max_length] int64 on the host; what no row has reached is padding.
        length: [B] int64. Column of each row's last token.
        done: every row has stopped.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        eos_ids: list[int],
        pad_id: int | None,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        keep: tuple[str, ...] = (),
    ):
        batch, self.prompt_length = input_ids.shape
        self.device = input_ids.device
        self.max_length, self.eos_ids, self.pad_id = max_length, eos_ids, pad_id
        self.criteria, self.streamer = criteria, streamer
        self.tokens = np.full((batch, max_length), 0 if pad_id is None else pad_id, dtype=np.int64)
        self.tokens[:, : self.prompt_length] = input_ids.cpu().numpy()
        self.length = np.full(batch, self.prompt_length - 1)
        self.column = self.prompt_length  # the next column to judge
        self.unfinished = np.ones(batch, dtype=bool)
        self.done = False
        self._ended = np.zeros(batch, dtype=bool)  # emits nothing more
        self._kept = {name: [deque() for _ in range(batch)] for name in keep}  # of columns not judged yet
        self.columns_kept = dict.fromkeys(keep, ())

    def append(self, tokens: list[list[int]], counts: list[int], kept: dict[str, torch.Tensor]) -> list[int]:
        """Take in a round.

        Args:
            tokens: [B][>= count] emitted tokens.
            counts: [B] how many of them.
            kept: name -> [B, >= count, V] scores of those tokens.

        Returns:
            Rows that a criterion has stopped just now and that must emit no more.
        """
        for row, count in enumerate(counts):
            first = self.length[row] + 1
            self.tokens[row, first : first + count] = tokens[row][:count]
            self.length[row] += count
            if count:
                self._ended[row] = tokens[row][count - 1] in self.eos_ids or self.length[row] + 1 == self.max_length
                for name, scores in kept.items():
                    self._kept[name][row] += scores[row, :count].clone().unbind()  # a view would hold all of scores
        stopped = []
        while not self.done and np.all(self._ended | (self.length >= self.column)):
            stopped += self._judge_column()
        return stopped

    def _judge_column(self) -> list[int]:
        column, before = self.column, self.unfinished.copy()
        self.column += 1
        self._keep_column(column)
        at_end = column + 1 == self.max_length
        ended = (self.length == column) & self._ended
        flagged = np.zeros_like(ended)
        if self.criteria:
            input_ids = torch.from_numpy(self.tokens[:, : column + 1].copy()).to(self.device)
            scores = self.columns_kept.get("scores")
            flagged = self.criteria(input_ids, scores).cpu().numpy()
        self.unfinished &= ~(ended | flagged)
        stopped = [] if self.pad_id is None else np.flatnonzero(before & flagged & ~ended).tolist()
        for row in stopped:
            self.length[row], self._ended[row] = column, True
            self.tokens[row, column + 1 :] = self.pad_id
        if self.streamer is not None:
            self.streamer.put(torch.from_numpy(self.tokens[:, column].copy()))
        self.done = at_end or not self.unfinished.any()
        return stopped

    def _keep_column(self, column: int) -> None:
        """One [B, V] of each kept score; a row that has ended has none and gets -inf."""
        for name, rows in self._kept.items():
            scores = [row.popleft() if column <= last else None for row, last in zip(rows, self.length, strict=True)]
            ended = torch.full_like(next(score for score in scores if score is not None), float("-inf"))
            self.columns_kept[name] += (torch.stack([ended if score is None else score for score in scores]),)

    @property
    def sequences(self) -> torch.Tensor:
        """[B, columns judged] int64 on the device."""
        return torch.from_numpy(self.tokens[:, : self.column].copy()).to(self.device)
