"""Search in texts: all results equal counts by brute force."""

import pickle
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import followers
from specdec_triton.drafters import matches
from specdec_triton.drafters.matches import LARGEST_ID, ScannedText, SuffixArray, joined

# Limits at which the search changes its method: the module's own, and small ones that short texts exceed.
LIMITS = [
    {"SORTED": 128},
    {"SORTED": 2, "FEW_TOKENS": 0, "FEW_PLACES": 0, "DENSE": 10**9},
    {"SORTED": 4, "FEW_TOKENS": 1, "FEW_PLACES": 2, "DENSE": 0},
    {"SORTED": 8, "FEW_TOKENS": 0, "FEW_PLACES": 1, "DENSE": 4},
]


def text(alphabet, max_size=40):
    return st.lists(st.integers(0, alphabet - 1), max_size=max_size)


@st.composite
def cases(draw, max_texts=4):
    """Texts over few tokens, some of which repeat a phrase or another text; and a sequence, often from a text."""
    alphabet = draw(st.integers(1, 3))
    texts = draw(st.lists(text(alphabet), min_size=1, max_size=max_texts))
    if draw(st.booleans()):
        texts.append(draw(text(alphabet, 6)) * draw(st.integers(2, 5)))
    if draw(st.booleans()):
        texts.append(list(draw(st.sampled_from(texts))))
    sequence = draw(st.lists(st.integers(0, alphabet), min_size=1, max_size=12))
    origin = draw(st.sampled_from(texts))
    if origin and draw(st.booleans()):
        begin = draw(st.integers(0, len(origin) - 1))
        sequence = sequence[: draw(st.integers(0, 2))] + origin[begin:][:12]
    return texts, sequence


def check(found, texts, sequence, depth):
    counts = followers(texts, sequence)
    assert found.count == sum(counts.values())
    for least in (1, 2, 3, 7):
        tokens = found.next_tokens(least)
        assert list(tokens.items()) == [each for each in counts.items() if each[1] >= least]
    assert [found.count_of(token) for token in range(5)] == [counts.get(token, 0) for token in range(5)]
    for token in range(4) if depth else ():
        check(found.after(token), texts, [*sequence, token], depth - 1)


def check_search(source, texts, sequence):
    lengths = [n for n in range(1, len(sequence) + 1) if followers(texts, sequence[-n:])]
    tokens = np.array(sequence)
    longest = source.longest(tokens)
    assert longest == max(lengths, default=0)
    for least in range(len(sequence) + 2):
        assert source.longest(tokens, least) == (longest if longest >= least else 0)
    for length in {longest, len(sequence), 1} - {0}:
        check(source.find(tokens[-length:]), texts, sequence[-length:], 2)


@pytest.mark.parametrize("limits", LIMITS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_an_index_equals_brute_force(limits, case):
    texts, sequence = case
    with mock.patch.multiple(matches, **limits):
        index = SuffixArray(texts)
        check_search(index, texts, sequence)
    assert index.num_tokens == sum(map(len, texts)) and index.num_texts == sum(map(bool, texts))


@pytest.mark.parametrize("limits", LIMITS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_a_scan_equals_brute_force(limits, case):
    texts, sequence = case
    with mock.patch.multiple(matches, **limits):
        check_search(ScannedText(np.array(texts[0], dtype=np.int64)), texts[:1], sequence)
        check_search(ScannedText(joined(texts)), texts, sequence)


@given(texts=st.lists(text(3), min_size=1, max_size=5), sorted_by=st.sampled_from([2, 4, 8, 128]))
@settings(max_examples=60, deadline=None)
def test_positions_are_sorted(texts, sorted_by):
    with mock.patch.object(matches, "SORTED", sorted_by):
        index = SuffixArray(texts)
    whole = joined(texts).tolist()
    assert index.text.tolist() == whole
    assert sorted(index.positions.tolist()) == [place for place, token in enumerate(whole) if token >= 0]

    def key(place):
        rest = whole[place : whole.index(-1, place)]
        return [*rest, LARGEST_ID + 1][:sorted_by]  # the end of a text sorts last

    keys = [key(place) for place in index.positions.tolist()]
    assert keys == sorted(keys)


def test_sequences_beyond_the_sorted_length_are_found():
    """Texts that agree in more tokens than are sorted."""
    shared = [5 + token % 7 for token in range(200)]
    texts = [[*shared, 1, 1], [*shared, 2], [3, *shared, 2, 4], shared, [*shared[:150], 9, 9]]
    sizes = (126, 127, 128, 129, 200)
    tails = [[1, *shared[-size:]] for size in sizes] + [[3, *shared[:size]] for size in sizes]
    lengths = [[n for n in range(1, len(tail) + 1) if followers(texts, tail[-n:])] for tail in tails]
    for source in (SuffixArray(texts), ScannedText(joined(texts))):
        for size in sizes:
            check(source.find(np.array(shared[-size:])), texts, shared[-size:], 0)
            check(source.find(np.array(shared[:size])), texts, shared[:size], 0)
        for tail, occurring in zip(tails, lengths, strict=True):
            for least in (1, 127, 128, 129, 250):
                longest = max(length for length in [0, *occurring] if length >= least or not length)
                assert source.longest(np.array(tail), least) == longest
        found = source.find(np.array(shared[:1]))
        for end, token in enumerate(shared[1:], start=1):
            assert found.next_tokens() == followers(texts, shared[:end])
            found = found.after(token)
        assert found.next_tokens() == {1: 1, 2: 2} and found.after(2).next_tokens() == {4: 1}


def test_the_end_of_a_text_does_not_match_itself():
    for source in (ScannedText(np.array([1, 2, 3, 1, 2])), SuffixArray([[1, 2, 3, 1, 2]])):
        assert source.longest(np.array([3, 1, 2])) == 2
        assert source.find(np.array([3, 1, 2])).count == 0
        assert source.find(np.array([1, 2])).next_tokens() == {3: 1}


def test_nothing_is_found_in_nothing():
    tail = np.array([1, 2])
    for source in (SuffixArray([]), SuffixArray([[], [1]]), ScannedText(np.array([], int)), ScannedText(np.array([2]))):
        assert source.longest(tail) == source.longest(tail[:0]) == 0
        found = source.find(tail)
        assert found.count == found.after(1).count == 0 and found.next_tokens() == {}


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_all_token_ids_and_dtypes(dtype):
    largest = min(LARGEST_ID, np.iinfo(dtype).max)
    texts = [np.array(each, dtype=dtype) for each in ([0, largest, 0, 256], [largest, 0], [256, 0, largest, 1])]
    for source in (SuffixArray(texts), ScannedText(joined(texts))):
        assert source.find(np.array([0, largest])).next_tokens() == {0: 1, 1: 1}
        assert source.find(np.array([largest])).next_tokens() == {0: 2, 1: 1}
        assert source.longest(np.array([largest, 256, 0, largest])) == 3
        assert source.find(np.array([0])).after(LARGEST_ID + 5).count == 0


def test_a_large_range_is_counted_exactly():
    """Counts of a range of 20,000 places, which is not read as a whole."""
    generator = np.random.default_rng(0)
    following = np.minimum(generator.geometric(0.3, 20_000), 12) + 100
    text = np.stack([np.full_like(following, 7), following], 1).ravel()
    found = SuffixArray([text]).find(np.array([7]))
    tokens, counts = np.unique(following, return_counts=True)
    for least in (1, 2, 100, 999, 2000, 7000, 20_000, 10**9):
        want = {token: n for token, n in zip(tokens.tolist(), counts.tolist(), strict=True) if n >= least}
        assert found.next_tokens(least) == want
    read = []
    with mock.patch.object(matches._Range, "_next", lambda self, place: read.append(place) or text.item(place + 1)):
        found.next_tokens(2000)
    assert 0 < len(read) < 500


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[1], [2, -1]], r"texts\[1\] must have token ids from 0 to 2\*\*31 - 2, got -1"),
        ([[LARGEST_ID + 1]], rf"texts\[0\] must have token ids from 0 to 2\*\*31 - 2, got {LARGEST_ID + 1}"),
        ([[1], [0.5]], r"texts\[1\] must be a sequence of token ids, got float64 \[1\]"),
        ([[[1, 2]]], r"texts\[0\] must be a sequence of token ids, got int64 \[1, 2\]"),
        (["words"], r"texts\[0\] must be a sequence of token ids, got <U5 \[\]"),
    ],
)
def test_texts_that_are_not_token_ids_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        SuffixArray(texts)


def test_an_index_can_be_pickled():
    texts = [[1, 2, 1, 3], [2, 1, 1]]
    index = SuffixArray(texts)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.positions.tolist() == index.positions.tolist() and copy.num_texts == 2
    assert copy.nbytes == index.nbytes == 8 * index.num_tokens + 4 * index.num_texts
    check_search(copy, texts, [2, 1])
