"""Search in texts of tokens: where a sequence occurs, and the tokens that follow it with their counts.

`ScannedText` searches one short text, which may change from round to round. `SuffixArray` indexes texts that do not
change (Manber and Myers 1993). Suffix decoding (Oliaro et al. 2024, arXiv 2411.04975) walks suffix trees instead. A
node of such a tree corresponds to a range of the array.

Token ids are 0 <= id < 2^31 - 1, also in sequences that are searched. Texts are joined with `SEPARATOR` between them.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

SORTED = 128  # positions are sorted by so many tokens; a power of two
SEPARATOR = -1  # between texts: as four unsigned bytes, it sorts after all tokens
SEPARATOR_BYTES = b"\xff" * 4
END = np.array([SEPARATOR], dtype=np.int32)
LARGEST_ID = 2**31 - 2
# A text is compared as a whole, instead of place by place, while more than one of so many places match.
DENSE = 16
FEW_PLACES = 8  # so few places are compared one by one with all tokens
FEW_TOKENS = 256  # so few tokens are counted by a dict, and more by sorting


class Matches(ABC):
    """The places at which a sequence of tokens occurs in texts, and is followed by another token of the same text.

    Attributes:
        count: number of such places.
    """

    count: int

    @abstractmethod
    def next_tokens(self, least: int = 1) -> dict[int, int]:
        """The tokens that follow at `least` places or more, in ascending order, with their numbers of places."""

    @abstractmethod
    def count_of(self, token: int) -> int:
        """Number of places at which `token` follows."""

    @abstractmethod
    def after(self, token: int) -> "Matches":
        """The places at which the sequence and then `token` occur, and another token of the same text follows."""


class Texts(ABC):
    """Texts that can be searched."""

    @abstractmethod
    def longest(self, tail: np.ndarray, least: int = 1) -> int:
        """How many of the last tokens of `tail` [L] occur together, followed by another token; 0 if fewer than `least`.

        An index answers much faster if there are fewer than `least`.
        """

    @abstractmethod
    def find(self, tokens: np.ndarray) -> Matches:
        """The places of `tokens` [m], m >= 1."""


class _Places(Matches):
    """Places one by one.

    Args:
        text: [n] int, texts joined by `SEPARATOR`.
        places: [count] int, in ascending order of the text or of the suffixes. Indices of the tokens that follow; none
            is a separator.
    """

    def __init__(self, text: np.ndarray, places: np.ndarray):
        self._text, self._places = text, places
        self.count = len(places)

    def next_tokens(self, least: int = 1) -> dict[int, int]:
        if self.count < max(least, 1):
            return {}
        if self.count == 1:
            return {self._text.item(self._places.item(0)): 1}
        tokens = self._text[self._places]
        if self.count <= FEW_TOKENS:
            found = sorted(Counter(tokens.tolist()).items())
        else:
            values, counts = np.unique(tokens, return_counts=True)
            found = list(zip(values.tolist(), counts.tolist(), strict=True))
        return {token: count for token, count in found if count >= least}

    def count_of(self, token: int) -> int:
        return int(np.count_nonzero(self._text[self._places] == token))

    def after(self, token: int) -> Matches:
        text, places = self._text, self._places
        if self.count == 1:
            place = places.item(0)
            if text.item(place) == token and place + 1 < len(text) and text.item(place + 1) >= 0:
                return _Places(text, places + 1)
            return NOTHING
        places = places[text[places] == token] + 1
        places = places[places < len(text)]
        return _Places(text, places[text[places] >= 0])


NOTHING = _Places(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64))


class ScannedText(Texts):
    """One text [L] of int, searched by scanning. Nothing is prepared, and the text is not copied.

    An occurrence at the end of the text is not followed by a token, so the end of the text does not match itself.
    A negative token separates two texts: no match contains one or is followed by one.
    """

    def __init__(self, text: np.ndarray):
        self._text = text
        # The last search: its tokens and its result. `find` often follows `longest` with the same tokens.
        self._last: tuple[list[int], np.ndarray, int] = [], NOTHING._places, 0

    def longest(self, tail: np.ndarray, least: int = 1) -> int:
        tokens = tail.tolist()
        ends, length = self._search(tail, tokens)
        self._last = tokens, ends, length
        return length if length >= least else 0

    def find(self, tokens: np.ndarray) -> Matches:
        wanted = tokens.tolist()
        tail, ends, length = self._last
        if length != len(wanted) or tail[len(tail) - length :] != wanted:
            ends, length = self._search(tokens, wanted)
        return _Places(self._text, ends + 1) if length == len(wanted) else NOTHING

    def _search(self, tail: np.ndarray, tokens: list[int]) -> tuple[np.ndarray, int]:
        """The longest end of `tail` that occurs and is followed by a token: the indices of its last token [count], and
        its length."""
        text = self._text
        if len(text) < 2 or not tokens:
            return NOTHING._places, 0
        matching = text[:-1] == tokens[-1]
        matching &= text[1:] >= 0
        count, length = np.count_nonzero(matching), 1
        if count * DENSE > len(text):
            text = text.astype(np.int32, copy=False)  # compared in half the time of int64
        while count * DENSE > len(text) and length < len(tokens):
            longer = np.zeros_like(matching)
            np.equal(text[: -1 - length], tokens[-1 - length], out=longer[length:])
            longer &= matching
            count = np.count_nonzero(longer)
            if not count:
                break
            matching, length = longer, length + 1
        ends = np.flatnonzero(matching)
        while len(ends) > FEW_PLACES and length < len(tokens):
            longer = ends[ends >= length] if ends[0] < length else ends
            longer = longer[text[longer - length] == tokens[-1 - length]]
            if not len(longer):
                return ends, length
            ends, length = longer, length + 1
        if len(ends) > FEW_PLACES:
            return ends, length
        lengths = [_agreement(text[max(end + 1 - len(tail), 0) : end + 1], tail) for end in ends.tolist()]
        length = max(lengths, default=0)
        return ends[np.array(lengths, dtype=np.int64) == length], length


def _agreement(text: np.ndarray, tail: np.ndarray) -> int:
    """The number of equal tokens at the ends of two sequences; `text` is not the longer one."""
    differs = text[::-1] != tail[len(tail) - len(text) :][::-1]
    first = int(differs.argmax())
    return first if differs[first] else len(text)


class SuffixArray(Texts):
    """Texts that are indexed once and never change: the positions of all tokens, sorted by the tokens from there on.

    Positions are compared up to the end of their text, and at most `SORTED` tokens. Longer sequences are found place by
    place among those that share their first tokens. 8 bytes are kept for each token (and for each text), and building
    takes about 10 times as many.

    Args:
        texts: token ids of each text. Empty texts are ignored.

    Attributes:
        num_tokens, num_texts: how many are indexed.
        nbytes: memory of the index.
        text: [n] int32, big-endian. The texts, each followed by `SEPARATOR`.
        positions: [num_tokens] int32. Indices into `text`, sorted.

    Raises:
        ValueError: a text is not a sequence of integers, or an id is not 0 <= id < 2^31 - 1, or there are 2^31 tokens.
    """

    def __init__(self, texts: Iterable[Sequence[int] | np.ndarray]):
        text = joined(texts)
        self._set(text, _sorted_positions(text))

    @classmethod
    def of(cls, text: np.ndarray, positions: np.ndarray | None = None) -> "SuffixArray":
        """The index of texts that are joined, [n] int32; `positions` are those of an earlier index of it. Neither is
        checked."""
        index = cls.__new__(cls)
        index._set(text, _sorted_positions(text) if positions is None else positions)
        return index

    def _set(self, text: np.ndarray, positions: np.ndarray) -> None:
        # Slices of big-endian bytes compare like sequences of tokens.
        self._bytes = text.astype(">i4").tobytes()
        self.text = np.frombuffer(self._bytes, dtype=">i4")
        self.positions = np.ascontiguousarray(positions, dtype=np.int32)
        self._view = memoryview(self.positions)  # its items are Python's integers
        self.num_tokens, self.num_texts = len(positions), len(text) - len(positions)
        self.nbytes = self.text.nbytes + self.positions.nbytes

    def __reduce__(self):
        return SuffixArray.of, (self.text, self.positions)

    def longest(self, tail: np.ndarray, least: int = 1) -> int:
        # If a sequence occurs, so do its ends: lengths are tried with growing steps, then by bisection.
        pattern = tail.astype(">i4").tobytes()
        known, missing, step = min(max(least, 1), SORTED - 1) - 1, min(len(tail), SORTED - 1) + 1, 1
        while missing - known > 1:
            length = known + min(step, (missing - known) // 2)
            if self._occurs(pattern[len(pattern) - 4 * length :]):
                known, step = length, 2 * step
            else:
                missing = length
        while SORTED - 1 <= known < len(tail) and self.find(tail[len(tail) - known - 1 :]).count:
            known += 1
        return known if known >= least else 0

    def find(self, tokens: np.ndarray) -> Matches:
        first = tokens[: SORTED - 1]
        pattern, depth = first.astype(">i4").tobytes(), len(first)
        low = self._lower_bound(pattern)
        data, width = self._bytes, 4 * depth + 4
        end = pattern + SEPARATOR_BYTES
        high = bisect_left(self._view, end, low, key=lambda place: data[4 * place : 4 * place + width])
        matches = self._matches(low, high, depth)
        for token in tokens[depth:].tolist():
            matches = matches.after(token)
        return matches

    def _lower_bound(self, pattern: bytes) -> int:
        """The first of the sorted positions at which `pattern` or something greater begins."""
        data, width = self._bytes, len(pattern)
        return bisect_left(self._view, pattern, key=lambda place: data[4 * place : 4 * place + width])

    def _occurs(self, pattern: bytes) -> bool:
        """Whether `pattern` occurs and is followed by a token. Places at the end of a text are sorted last."""
        low = self._lower_bound(pattern)
        if low == self.num_tokens:
            return False
        begin = 4 * self._view[low]
        end = begin + len(pattern)
        return self._bytes[begin:end] == pattern and self._bytes[end : end + 4] != SEPARATOR_BYTES

    def _matches(self, low: int, high: int, depth: int) -> Matches:
        """The matches at sorted positions low <= i < high, of a sequence of `depth` tokens."""
        if high - low > 1:
            return _Range(self, low, high, depth)
        return _Places(self.text, self.positions[low:high] + depth) if low < high else NOTHING


class _Range(Matches):
    """A range of a suffix array, in which the tokens that follow are sorted.

    Args:
        index: the array.
        low, high: the range low <= i < high.
        depth: number of tokens of the sequence, below `SORTED`.
    """

    def __init__(self, index: SuffixArray, low: int, high: int, depth: int):
        self._index, self._low, self._high, self._depth = index, low, high, depth
        self.count = high - low

    def _next(self, place: int) -> int:
        return self._index.text.item(place + self._depth)

    def next_tokens(self, least: int = 1) -> dict[int, int]:
        index, view = self._index, self._index._view
        if least <= 1 or self.count <= FEW_TOKENS:
            return _Places(index.text, index.positions[self._low : self._high] + self._depth).next_tokens(least)
        # Every `least`-th place is read. A token with so many places is at one of them.
        probes = index.text[index.positions[self._low + least - 1 : self._high : least] + self._depth].tolist()
        found, begin = {}, 0
        while begin < len(probes):
            token, end = probes[begin], begin + 1
            while end < len(probes) and probes[end] == token:
                end += 1
            first = self._low + (begin + 1) * least - 1  # place of the token's first probe
            last = first + (end - begin - 1) * least
            low = bisect_left(view, token, max(first - least + 1, self._low), first, key=self._next)
            high = bisect_left(view, token + 1, last + 1, min(last + least, self._high), key=self._next)
            if high - low >= least:
                found[token] = high - low
            begin = end
        return found

    def count_of(self, token: int) -> int:
        view = self._index._view
        low = bisect_left(view, token, self._low, self._high, key=self._next)
        return bisect_left(view, token + 1, low, self._high, key=self._next) - low

    def after(self, token: int) -> Matches:
        index, depth = self._index, self._depth
        low = bisect_left(index._view, token, self._low, self._high, key=self._next)
        if depth + 2 > SORTED:  # the tokens after `token` are not sorted
            high = bisect_left(index._view, token + 1, low, self._high, key=self._next)
            return _Places(index.text, index.positions[low:high] + depth).after(token)
        item = index.text.item

        def is_beyond(place: int) -> bool:
            # places at which a text ends after `token` are sorted last
            return item(place + depth) > token or item(place + depth + 1) < 0

        return index._matches(low, bisect_left(index._view, True, low, self._high, key=is_beyond), depth + 1)


def token_ids(name: str, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """One text [L] int32.

    Raises:
        ValueError: `name` must be a sequence of integers 0 <= id < 2^31 - 1.
    """
    text = np.asarray(tokens)
    if not text.size and text.ndim == 1:
        return text.astype(np.int32)
    if text.ndim != 1 or text.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a sequence of token ids, got {text.dtype} {list(text.shape)}")
    low, high = text.min(), text.max()
    if low < 0 or high > LARGEST_ID:
        raise ValueError(f"{name} must have token ids from 0 to 2**31 - 2, got {low if low < 0 else high}")
    return text.astype(np.int32)


def joined(texts: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Texts, each followed by `SEPARATOR`, [n] int32. Empty texts are left out.

    Raises:
        ValueError: as for `SuffixArray`.
    """
    parts = [np.empty(0, dtype=np.int32)]
    for number, each in enumerate(texts):
        text = token_ids(f"SuffixArray: texts[{number}]", each)
        if len(text):
            parts += [text, END]
    length = sum(map(len, parts))
    if length >= 2**31:
        raise ValueError(f"SuffixArray: texts must have fewer than 2**31 tokens, got {length}")
    return np.concatenate(parts)


def _sorted_positions(text: np.ndarray) -> np.ndarray:
    """The positions of the tokens of `text` [n], sorted by the next `SORTED` tokens of their texts, [num_tokens] int32.

    Prefix doubling: if positions are sorted by h tokens, the ranks of the position and of the one h tokens later sort
    it by 2h tokens. Only positions that are not yet distinct are sorted again.
    """
    n = len(text)
    # Each separator is a different one, so that no comparison goes beyond it.
    ids = np.where(text < 0, 2**31 + np.arange(n), text).astype(np.uint64)
    keys = ids << np.uint64(32)
    keys[:-1] |= ids[1:]
    order = np.argsort(keys)
    keys, rank, h = keys[order], np.empty(n, dtype=np.int64), 2
    tied, positions = np.arange(n), order
    while True:
        # Positions with equal keys are one group, whose rank is the place of its first. `tied` are places in `order`.
        begins = np.ones(len(keys) + 1, dtype=bool)
        np.not_equal(keys[1:], keys[:-1], out=begins[1:-1])
        rank[positions] = np.maximum.accumulate(np.where(begins[:-1], tied, 0))
        tied = tied[~(begins[:-1] & begins[1:])]
        if h >= SORTED or not len(tied):
            break
        positions = order[tied]
        keys = rank[positions] * n + rank[positions + h]
        by_key = np.argsort(keys)
        keys, positions, h = keys[by_key], positions[by_key], 2 * h
        order[tied] = positions
    return order[: np.count_nonzero(text >= 0)].astype(np.int32)
