"""Texts that outlive a call: a corpus, and the outputs of earlier calls."""

import os
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .matches import END, ScannedText, SuffixArray, Texts, token_ids

# Outputs are scanned until there are so many tokens, which then become one index. Building it takes about 40 ms.
SEGMENT = 65_536
SEGMENTS = 8  # so many indexes at least, if the bound is above SEGMENT: the oldest one is dropped as a whole
NO_SEEDS = np.empty(0, dtype=np.int64)
FORMAT, VERSION = "specdec_triton.history", "1"

# Held while a state is replaced, which takes microseconds. One lock for all histories: a history then has none of its
# own, which could be neither pickled nor used by a forked child of a thread that held it.
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _State(NamedTuple):
    """Never changed in place."""

    corpora: tuple[SuffixArray, ...] = ()
    segments: tuple[SuffixArray, ...] = ()  # earlier outputs, the oldest first
    recent: np.ndarray = END[:0]  # [n] int32, later outputs, each followed by a separator
    lengths: tuple[int, ...] = ()  # of the texts in `recent`, with their separators
    removed: int = 0  # number of texts that were ever removed from the front of `recent`
    seeds: np.ndarray = NO_SEEDS  # [k] int64, of sampled outputs, the oldest first: all that are kept, and maybe more

    @property
    def num_outputs(self) -> int:
        """Tokens of the outputs."""
        return sum(each.num_tokens for each in self.segments) + len(self.recent) - len(self.lengths)

    def without_recent(self, count: int) -> "_State":
        """Without the first `count` texts of `recent`."""
        recent = self.recent[sum(self.lengths[:count]) :]
        return self._replace(recent=recent, lengths=self.lengths[count:], removed=self.removed + count)

    def bounded(self, max_tokens: int) -> "_State":
        """Without the oldest outputs, so that at most `max_tokens` tokens of outputs are left."""
        state, excess = self, self.num_outputs - max_tokens
        while excess > 0 and state.segments:
            excess -= state.segments[0].num_tokens
            state = state._replace(segments=state.segments[1:])
        count = 0
        while excess > 0:
            excess -= state.lengths[count] - 1
            count += 1
        state = state.without_recent(count) if count else state
        texts = len(state.lengths) + sum(each.num_texts for each in state.segments)
        return state._replace(seeds=state.seeds[max(len(state.seeds) - texts, 0) :])


class History:
    """Texts that outlive calls: a corpus, which stays, and outputs, of which the oldest are dropped first.

    All methods may be called from several threads. A history can be pickled and copied, and a forked child process has
    a copy of its own.

    The last outputs are searched by scanning. Whenever there are 65,536 tokens of them, `add` indexes them, which takes
    about 40 ms (or about 0.6 µs a token, if one output is longer). An index is dropped as a whole, so that at least
    seven eighths of `max_tokens` are kept, unless single outputs are longer than that. A history of at most 65,536
    tokens is always scanned, and its outputs are dropped one by one. The indexes are searched one after another.

    Args:
        max_tokens: bound on the number of tokens of outputs that are kept. 0 keeps none. Memory is 8 bytes a token.

    Raises:
        ValueError: `max_tokens` is not an integer of at least 0.
    """

    in_fingerprint = False  # captured rounds do not depend on the texts, see `forward.fingerprint`

    def __init__(self, max_tokens: int = 1_000_000):
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 0:
            raise ValueError(f"History: max_tokens must be an integer of at least 0, got {max_tokens!r}")
        self.max_tokens = max_tokens
        self._segment = SEGMENT if max_tokens <= SEGMENT else min(SEGMENT, max_tokens // SEGMENTS)
        self._state = _State()

    def add(self, tokens: np.ndarray | Sequence[int], seed: int | None = None) -> None:
        """Keep one output.

        Args:
            tokens: [L]. If it is longer than `max_tokens`, its last `max_tokens` tokens are kept.
            seed: the 64-bit seed with which it was sampled, see `sources`; None if it was not sampled.

        Raises:
            ValueError: `tokens` is not a sequence of integers 0 <= id < 2^31 - 1.
        """
        text = token_ids("History.add: tokens", tokens)
        text = text[max(len(text) - self.max_tokens, 0) :]
        if not len(text):
            return
        with _lock:
            before = self._state
            recent = np.concatenate([before.recent, text, END])
            seeds = before.seeds if seed is None else np.append(before.seeds, np.int64(seed))
            state = before._replace(recent=recent, lengths=(*before.lengths, len(text) + 1), seeds=seeds)
            state = self._state = state.bounded(self.max_tokens)
        # One thread indexes: the one whose text reaches a multiple of the segment's size. The others do not wait.
        if self.max_tokens > SEGMENT and len(before.recent) // self._segment < len(recent) // self._segment:
            self._index_recent(state)

    def _index_recent(self, now: _State) -> None:
        segment = SuffixArray.of(now.recent)
        with _lock:
            state = self._state
            if state.removed == now.removed:  # else some of these texts were dropped meanwhile
                state = state.without_recent(len(now.lengths))
                self._state = state._replace(segments=(*state.segments, segment))

    def add_corpus(self, texts: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Index texts that stay, at once. A million tokens take about a second.

        The texts must not have been sampled with seeds of later calls, see `sources`.

        Raises:
            ValueError: see `SuffixArray`.
        """
        corpus = SuffixArray(texts)
        if corpus.num_tokens:
            with _lock:
                self._state = self._state._replace(corpora=(*self._state.corpora, corpus))

    def sources(self, seeds: Sequence[int] = ()) -> tuple[Texts, ...]:
        """The texts as they are now: first the outputs, from the latest to the oldest ones, then the corpora. Later
        changes of the history do not change them.

        Args:
            seeds: seeds of a call whose drafts must not depend on its random numbers. If a kept output was sampled with
                one of them, no output is among the texts.
        """
        state = self._state
        if len(seeds) and np.isin(seeds, state.seeds).any():
            return state.corpora
        recent = (ScannedText(state.recent),) if state.lengths else ()
        return *recent, *reversed(state.segments), *state.corpora

    @property
    def num_tokens(self) -> int:
        """Tokens of the outputs and of the corpora."""
        state = self._state
        return state.num_outputs + sum(each.num_tokens for each in state.corpora)

    @property
    def num_texts(self) -> int:
        """Number of outputs and of texts of the corpora."""
        state = self._state
        return len(state.lengths) + sum(each.num_texts for each in (*state.segments, *state.corpora))

    @property
    def nbytes(self) -> int:
        """Memory of the texts and their indexes."""
        state = self._state
        return state.recent.nbytes + sum(each.nbytes for each in (*state.segments, *state.corpora))

    def clear(self) -> None:
        """Drop all outputs. The corpora stay."""
        with _lock:
            state = self._state
            self._state = _State(state.corpora, removed=state.removed + len(state.lengths))

    def save(self, path: str | Path) -> None:
        """Write all texts and their indexes to a safetensors file. An existing file is replaced when all is written.

        Raises:
            OSError: the file cannot be written.
        """
        state = self._state
        tensors = {"recent": state.recent, "seeds": state.seeds}
        for name in ("corpora", "segments"):
            for number, index in enumerate(getattr(state, name)):
                tensors[f"{name}.{number}.text"] = index.text.astype(np.int32)
                tensors[f"{name}.{number}.positions"] = index.positions
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        metadata = {"format": FORMAT, "version": VERSION, "checksum": _checksum(tensors)}
        try:
            unfinished.write_bytes(save(tensors, metadata))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, max_tokens: int = 1_000_000) -> "History":
        """A history from a file of `save`. The indexes are read, not built again.

        Args:
            path: the file.
            max_tokens: see `History`. If the file has more, the oldest outputs are dropped. The others are then indexed
                anew.

        Raises:
            ValueError: the file is of another kind or version, or broken.
            OSError: it cannot be read.
        """
        history = cls(max_tokens)
        tensors = _read(Path(path))
        recent = tensors["recent"]
        indexes: dict[str, list[SuffixArray]] = {"corpora": [], "segments": []}
        for name, found in indexes.items():
            while (text := tensors.get(f"{name}.{len(found)}.text")) is not None:
                found.append(SuffixArray.of(text, tensors[f"{name}.{len(found)}.positions"]))
        lengths = np.diff(np.flatnonzero(recent < 0), prepend=-1).tolist()
        corpora, segments = (tuple(found) for found in indexes.values())
        state = _State(corpora, segments, recent, tuple(lengths), seeds=tensors["seeds"])
        if state.num_outputs <= max_tokens:
            history._state = state
            return history
        history._state = _State(corpora)
        outputs = np.concatenate([*(each.text for each in segments), recent])
        for text in np.split(outputs, np.flatnonzero(outputs < 0) + 1)[:-1]:
            history.add(text[:-1])
        history._state = history._state._replace(seeds=state.seeds)
        return history


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(np.ascontiguousarray(tensors[name]), zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of `History.save`."""
    wanted = f"History.load: {path} must be a file of History.save, version {VERSION}"
    if path.is_dir():
        raise ValueError(f"{wanted}, got a folder")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            kind, version = metadata.get("format"), metadata.get("version")
            if kind != FORMAT:
                raise ValueError(f"{wanted}, got a safetensors file of another kind (format {kind!r})")
            if version != VERSION:
                raise ValueError(f"{wanted}, got version {version}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{wanted}, got a file that is not safetensors, or is cut off: {error}") from None
    if _checksum(tensors) != metadata.get("checksum"):
        raise ValueError(f"{wanted}, got a broken one: its checksum is wrong")
    return tensors
