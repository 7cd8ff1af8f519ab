"""The texts on the host: tokens as they arrive, passed to stopping criteria and streamers as plain `generate` does.

Sequences of a batch emit different numbers of tokens a round. Stopping criteria and streamers of transformers expect
whole columns, one step at a time. So `Output` advances column by column, and only over columns that every sequence has
reached: each call gets the batch that plain decoding would have passed.

When a row ends by EOS, acceptance has cut its path there and `Round.emit` has set its budget to 0, so it emits nothing
more. If a criterion ends it, the host cuts the row here, and `Generation.process_report` sets its budget to 0. Other
rows go on. A finished row shows pad tokens; its scores, keys and values come from `FinishedRows` if they are needed.
"""

import contextlib
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

# (finished rows, how many columns) -> name -> [B, at most so many, V] scores of their next columns
More = Callable[[list[int], int], dict[str, torch.Tensor]]
AHEAD = 32  # columns of finished rows, for criteria, that are computed at once


class Output:
    """The texts of one call.

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
        ended: [B] bool. The row emits nothing more.
        column: the next one that criteria and streamer get.
        done: every row has stopped.
        columns_kept: name -> the scores kept, a [B, V] for each column; complete once `done`.
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
        self.column = self.prompt_length
        self.unfinished = np.ones(batch, dtype=bool)
        self.done = False
        self.ended = np.zeros(batch, dtype=bool)
        # of columns that are not in `columns_kept` yet
        self._kept = {name: [deque() for _ in range(batch)] for name in keep}
        self.columns_kept = dict.fromkeys(keep, ())
        # for criteria: the text on the device, how many of its columns are there, and the stream they run on
        self._copied, self._known, self._stream = None, 0, None

    def append(
        self, tokens: list[list[int]], counts: list[int], kept: dict[str, torch.Tensor], more: More | None = None
    ) -> list[int]:
        """Take in a round.

        Args:
            tokens: [B][>= count] emitted tokens.
            counts: [B] how many of them.
            kept: name -> [B, >= count, V] scores of those tokens.
            more: gives scores of finished rows that `keep` did not get.

        Returns:
            Rows that a criterion has stopped just now and that must emit no more.
        """
        for row, count in enumerate(counts):
            first = self.length[row] + 1
            self.tokens[row, first : first + count] = tokens[row][:count]
            self.length[row] += count
            if count:
                self.ended[row] = tokens[row][count - 1] in self.eos_ids or self.length[row] + 1 == self.max_length
                self.keep([row], {name: scores[:, :count] for name, scores in kept.items()})
        stopped = []
        while not self.done and np.all(self.ended | (self.length >= self.column)):
            stopped += self._finish_column(more)
        if self.done:
            self._keep_columns(more)
        return stopped

    def keep(self, rows: list[int], kept: dict[str, torch.Tensor]) -> None:
        """Take in scores [B, n, V] by name: those of the next n columns of `rows`, finished or not."""
        for name, scores in kept.items():
            for row in rows:
                self._kept[name][row] += scores[row].clone().unbind()  # a view would hold all of scores

    def _finish_column(self, more: More | None) -> list[int]:
        column, before = self.column, self.unfinished.copy()
        self.column += 1
        at_end = column + 1 == self.max_length
        ended = (self.length == column) & self.ended
        flagged = np.zeros_like(ended)
        if self.criteria:
            self._keep_columns(more)
            with self._aside():
                flagged = self.criteria(self._columns(), self.columns_kept.get("scores")).cpu().numpy()
        self.unfinished &= ~(ended | flagged)
        stopped = [] if self.pad_id is None else np.flatnonzero(before & flagged & ~ended).tolist()
        for row in stopped:
            self.length[row], self.ended[row] = column, True
            self.tokens[row, column + 1 :] = self.pad_id
            for rows in self._kept.values():
                rows[row].clear()
        if self.streamer is not None:
            self.streamer.put(torch.from_numpy(self.tokens[:, column].copy()))
        self.done = at_end or not self.unfinished.any()
        return stopped

    def _aside(self) -> contextlib.AbstractContextManager:
        """On a GPU, a stream of its own: criteria do not wait for the round that is on its way, unless they get scores,
        which are put together behind it."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(self.device)
        if self._kept:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _columns(self) -> torch.Tensor:
        """[B, columns finished] int64 on the device; only new columns are copied there, without a wait."""
        if self._copied is None:
            self._copied = torch.empty(self.tokens.shape, dtype=torch.int64, device=self.device)
        new = torch.from_numpy(self.tokens[:, self._known : self.column].copy())
        if self.device.type == "cuda":
            new = new.pin_memory()
        self._copied[:, self._known : self.column].copy_(new, non_blocking=True)
        self._known = self.column
        return self._copied[:, : self.column].clone()

    def _keep_columns(self, more: More | None) -> None:
        """Put together the kept scores up to the last finished column. Criteria may get them at each column; if there
        are none, the scores of finished rows are computed all at once."""
        if not self._kept:
            return
        had, rows = next(iter(self.columns_kept.values())), next(iter(self._kept.values()))
        columns = self.column - self.prompt_length - len(had)
        lacking = [row for row, scores in enumerate(rows) if len(scores) < columns]
        if lacking:
            most = max(columns - len(rows[row]) for row in lacking)
            self.keep(lacking, more(lacking, most if self.done else max(most, AHEAD)))
        for name, rows in self._kept.items():
            self.columns_kept[name] += tuple(torch.stack([row.popleft() for row in rows]) for _ in range(columns))

    @property
    def sequences(self) -> torch.Tensor:
        """[B, columns finished] int64 on the device."""
        return torch.from_numpy(self.tokens[:, : self.column].copy()).to(self.device)
