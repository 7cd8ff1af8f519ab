"""Collects the emitted tokens on the host and passes them to stopping criteria and streamers, as plain `generate` does.

The sequences of a batch emit different numbers of tokens in a round. Stopping criteria and streamers of transformers
expect whole columns, one step at a time. `Output` therefore advances column by column, and only over columns that every
sequence has reached. Each call gets the batch that plain decoding would have passed.

If a row ends by EOS, acceptance has cut its path there and `RoundSteps.emit` has set its budget to 0, so it emits no
more tokens. If a criterion ends it, the host cuts the row here and `Generation.process_report` sets its budget to 0.
Other rows go on. A finished row shows pad tokens. If its scores, keys or values are needed, `FinishedRows` computes
them.
"""

import contextlib
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

# (finished rows, number of columns n) -> name -> scores of their next columns, [B, at most n, V]
More = Callable[[list[int], int], dict[str, torch.Tensor]]
AHEAD = 32  # number of columns of finished rows whose scores are computed at once, if criteria need them


class Output:
    """The texts of one call.

    Args:
        input_ids: [B, T] int64. The prompt, padding included.
        max_length: largest number of columns.
        eos_ids: tokens that end a row.
        pad_id: the token that fills a row after its end. None: rows go on until all have stopped, as in plain
            `generate` without an EOS token.
        criteria: the other stopping criteria; EOS and `max_length` are checked here.
        streamer: gets [B] tokens for each column.
        keep: names of the scores to keep ("scores", "logits"). `criteria` get "scores" if they are kept.

    Attributes:
        tokens: [B, max_length] int64 on the host. Columns that a row has not reached hold padding.
        length: [B] int64. Column of each row's last token.
        ended: [B] bool. True if the row emits no more tokens.
        column: the next column for criteria and the streamer.
        done: True if every row has stopped.
        columns_kept: name -> kept scores, a tuple with [B, V] for each column; complete once `done` is True.
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
        # name -> for each row the scores of columns that are not in `columns_kept` yet
        self._kept = {name: [deque() for _ in range(batch)] for name in keep}
        self.columns_kept = dict.fromkeys(keep, ())
        # for criteria: the text on the device, the number of columns copied to it, and the stream that they run on
        self._copied, self._known, self._stream = None, 0, None

    def append(
        self, tokens: list[list[int]], counts: list[int], kept: dict[str, torch.Tensor], more: More | None = None
    ) -> list[int]:
        """Append the tokens of a round.

        Args:
            tokens: for each row a list of at least `counts[row]` emitted tokens.
            counts: for each row the number of tokens to append.
            kept: name -> [B, >= count, V] scores of those tokens.
            more: computes scores of finished rows that were not passed to `keep`.

        Returns:
            Rows that a criterion has stopped in this call. They must emit no more tokens.
        """
        for row, count in enumerate(counts):
            if not count:
                continue
            first = int(self.length[row]) + 1
            self.tokens[row, first : first + count] = tokens[row][:count]
            self.length[row] = last = first + count - 1
            self.ended[row] = tokens[row][count - 1] in self.eos_ids or last + 1 == self.max_length
            if kept:
                self.keep([row], {name: scores[:, :count] for name, scores in kept.items()})
        stopped = []
        while not self.done and self._column_is_full():
            stopped += self._finish_column(more)
        if self.done:
            self._keep_columns(more)
        return stopped

    def keep(self, rows: list[int], kept: dict[str, torch.Tensor]) -> None:
        """Append scores [B, n, V], by name, of the next n columns of `rows`. The rows may be finished."""
        for name, scores in kept.items():
            for row in rows:
                self._kept[name][row] += scores[row].clone().unbind()  # a view would keep all scores alive

    def _column_is_full(self) -> bool:
        rows = zip(self.ended.tolist(), self.length.tolist(), strict=True)  # lists are faster than small arrays
        return all(ended or length >= self.column for ended, length in rows)

    def _finish_column(self, more: More | None) -> list[int]:
        column = self.column
        self.column += 1
        at_end = column + 1 == self.max_length
        ended = (self.length == column) & self.ended
        stopped = []
        if self.criteria:
            self._keep_columns(more)
            with self._aside():
                flagged = self.criteria(self._columns(), self.columns_kept.get("scores")).cpu().numpy()
            if self.pad_id is not None:
                stopped = np.flatnonzero(self.unfinished & flagged & ~ended).tolist()
            ended |= flagged
        self.unfinished &= ~ended
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
        """On a GPU, run criteria on a separate stream, so that they do not wait for the round in flight. They do wait
        for it if they get scores, because those are assembled on the current stream."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        self._stream = self._stream or torch.cuda.Stream(self.device)
        if self._kept:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _columns(self) -> torch.Tensor:
        """The text [B, finished columns] int64 on the device. Only new columns are copied, without waiting."""
        if self._copied is None:
            self._copied = torch.empty(self.tokens.shape, dtype=torch.int64, device=self.device)
        new = torch.from_numpy(self.tokens[:, self._known : self.column].copy())
        if self.device.type == "cuda":
            new = new.pin_memory()
        self._copied[:, self._known : self.column].copy_(new, non_blocking=True)
        self._known = self.column
        return self._copied[:, : self.column].clone()

    def _keep_columns(self, more: More | None) -> None:
        """Move the kept scores of all finished columns to `columns_kept`. It is called for each column if there are
        criteria; without criteria, the missing scores of finished rows are computed all at once at the end."""
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
        """The text [B, finished columns] int64 on the device."""
        return torch.from_numpy(self.tokens[:, : self.column].copy()).to(self.device)
