"""Texts that outlive calls: the bound on kept texts, threads, processes, files."""

import copy
import json
import os
import pickle
import signal
import struct
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from by_hand import followers
from specdec_triton.drafters import history, matches
from specdec_triton.drafters.history import History
from specdec_triton.drafters.matches import ScannedText, SuffixArray

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=30)
FEW = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=3)


def counted(kept, sequence):
    """As `followers`, summed over the sources of a history."""
    total = {}
    for source in kept.sources():
        for token, count in source.find(np.array(sequence)).next_tokens().items():
            total[token] = total.get(token, 0) + count
    return dict(sorted(total.items()))


def check(kept, texts):
    """All results of `kept` are those of the texts."""
    texts = [each for each in texts if each]
    assert kept.num_texts == len(texts) and kept.num_tokens == sum(map(len, texts))
    for sequence in ([0], [1], [2], [0, 1], [1, 1, 0], [2, 0, 2, 1]):
        assert counted(kept, sequence) == followers(texts, sequence)


@given(texts=TEXTS, corpus=FEW, max_tokens=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_the_oldest_outputs_are_dropped_first(texts, corpus, max_tokens):
    kept, expected = History(max_tokens), []
    kept.add_corpus(corpus)
    for text in texts:
        kept.add(text)
        if max_tokens and text:
            expected.append(text[-max_tokens:])
        while sum(map(len, expected)) > max_tokens:
            del expected[0]
        check(kept, corpus + expected)
    assert len(kept.sources()) == bool(expected) + bool(corpus)  # all outputs are scanned
    kept.clear()
    check(kept, corpus)


@given(texts=TEXTS, corpus=FEW, max_tokens=st.integers(17, 100))
@settings(max_examples=60, deadline=None)
def test_indexed_outputs_are_dropped_in_order_and_most_are_kept(texts, corpus, max_tokens):
    with mock.patch.object(history, "SEGMENT", 16):
        kept = History(max_tokens)
        kept.add_corpus(corpus)
        for number, text in enumerate(texts, start=1):
            kept.add(text)
            added = [each[-max_tokens:] for each in texts[:number] if each]
            expected = added[len(added) + len(corpus) - kept.num_texts :]
            check(kept, corpus + expected)
            outputs = sum(map(len, expected))
            assert outputs <= max_tokens
            # at most one index was dropped too many: an eighth of the bound, and one text
            assert expected == added or outputs + max_tokens // 8 + 12 > max_tokens


def test_outputs_become_indexes(monkeypatch):
    monkeypatch.setattr(history, "SEGMENT", 100)
    kept = History(1000)
    for number in range(60):
        kept.add([number] * 10)
    kinds = [type(source) for source in kept.sources()]
    # the latest first; each text takes 11 places, so the tenth completes 100
    assert kinds == [SuffixArray] * 6
    assert [source.longest(np.array([59, 59])) for source in kept.sources()] == [2, 0, 0, 0, 0, 0]
    kept.add([1, 2])
    assert [type(source) for source in kept.sources()] == [ScannedText, *kinds]


def test_sources_do_not_change(monkeypatch):
    monkeypatch.setattr(history, "SEGMENT", 50)
    kept = History(120)
    kept.add_corpus([[1, 2, 3]])
    kept.add([4, 5, 6])
    sources = kept.sources()
    for _ in range(40):
        kept.add([4, 5, 7, 7, 1, 2])
    assert counted(kept, [4, 5]).keys() == {7}
    kept.clear()
    kept.add_corpus([[1, 2, 9]])
    assert [source.longest(np.array([4, 5])) for source in sources] == [2, 0]
    assert [source.longest(np.array([1, 2])) for source in sources] == [0, 2]
    assert sources[0].find(np.array([4, 5])).next_tokens() == {6: 1}
    assert counted(kept, [1, 2]) == {3: 1, 9: 1}


def test_an_added_text_is_copied():
    kept, text = History(), np.array([1, 2, 3])
    kept.add(text)
    text[:] = 9
    assert counted(kept, [1, 2]) == {3: 1}


def test_memory_is_bounded():
    kept = History(100_000)
    generator = np.random.default_rng(0)
    for _ in range(100):
        kept.add(generator.integers(0, 50, 5000))
        assert kept.num_tokens <= 100_000
    assert kept.num_tokens > 80_000
    assert kept.nbytes <= 8.1 * kept.num_tokens


@pytest.mark.parametrize("max_tokens", [-1, 1.5, "many", True, None])
def test_wrong_bounds_are_refused(max_tokens):
    with pytest.raises(ValueError, match=f"History: max_tokens must be an integer of at least 0, got {max_tokens!r}"):
        History(max_tokens)


def test_wrong_texts_are_refused():
    kept = History()
    with pytest.raises(ValueError, match=r"History.add: tokens must have token ids from 0 to 2\*\*31 - 2, got -100"):
        kept.add([1, -100])
    with pytest.raises(ValueError, match=r"History.add: tokens must be a sequence of token ids, got int64 \[1, 2\]"):
        kept.add(np.array([[1, 2]]))
    with pytest.raises(ValueError, match=r"texts\[1\] must be a sequence of token ids, got float64 \[1\]"):
        kept.add_corpus([[1], [0.5]])
    assert kept.num_tokens == 0 and kept.sources() == ()


def test_ten_threads_lose_nothing(monkeypatch, request):
    """Threads add and search, while outputs are indexed all the time."""
    monkeypatch.setattr(history, "SEGMENT", 64)
    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-6)  # so that threads take turns within a call
    kept, errors, start = History(10**6), [], threading.Barrier(10)

    def work(number):
        start.wait()
        try:
            for step in range(60):
                kept.add([number, step + 100, number, 7])
                # its own texts are found at once, in whichever source
                assert counted(kept, [number, step + 100]) == {number: 1}
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert kept.num_texts == 600 and kept.num_tokens == 2400
    for number in range(10):
        assert counted(kept, [number]) == dict.fromkeys(range(100, 160), 1) | {7: 60} or number == 7
    assert sum(isinstance(source, SuffixArray) for source in kept.sources()) > 5


def test_texts_dropped_while_they_are_indexed_stay_dropped(monkeypatch):
    """`clear` and later outputs come in the middle of an indexing."""
    monkeypatch.setattr(history, "SEGMENT", 20)
    kept, of = History(1000), SuffixArray.of
    later = [lambda: kept.clear(), lambda: kept.add([8, 9, 8])]

    def slow(text):
        index = of(text)
        for step in later:
            step()
        return index

    monkeypatch.setattr(SuffixArray, "of", slow)
    kept.add([1, 2, 3] * 10)
    assert counted(kept, [1]) == {} and counted(kept, [9]) == {8: 1} and kept.num_texts == 1
    del later[0]
    kept.add([1, 2, 3] * 10)
    assert counted(kept, [1, 2]) == {3: 10} and counted(kept, [9]) == {8: 2} and kept.num_texts == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_independent(monkeypatch, copied):
    monkeypatch.setattr(history, "SEGMENT", 20)
    kept = filled()
    other = copied(kept)
    before = counted(kept, [1, 2])
    other.add([1, 2, 50])
    assert counted(kept, [1, 2]) == before and counted(other, [1, 2]) == before | {50: 1}
    assert other.max_tokens == 100


def filled():
    """Two corpora, indexed outputs and recent ones, if SEGMENT is 20."""
    kept = History(100)
    kept.add_corpus([[1, 2, 3], [4]])
    kept.add_corpus([[1, 2, 30]])
    for number in range(5):
        kept.add([1, 2, 3, 1, 2, number, 5, 5])
    assert [type(each) for each in kept.sources()] == [ScannedText, *[SuffixArray] * 4]
    return kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_children_can_use_it():
    """Children that are forked while another thread adds."""
    kept, done = History(), threading.Event()

    def add():
        while not done.is_set():
            kept.add([3, 4, 5] * 1000)

    thread = threading.Thread(target=add)
    thread.start()
    children = [_forked(kept) for _ in range(20)]
    done.set()
    thread.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 20


def _forked(kept):
    """Process id of a child that exits with 0 if it adds and finds a text; it is ended if it waits for ever."""
    child = os.fork()
    if not child:
        signal.alarm(20)
        kept.add([1, 2, 1])
        os._exit(0 if counted(kept, [1, 2]) == {1: 1} else 1)
    return child


# --- files


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "SEGMENT", 20)
    path = tmp_path / "kept.safetensors"
    filled().save(path)
    return path


def test_a_saved_history_is_loaded_without_indexing(file, monkeypatch):
    kept = filled()
    with monkeypatch.context() as patch:
        patch.setattr(matches, "_sorted_positions", None)
        loaded = History.load(file, 100)
    assert (loaded.num_tokens, loaded.num_texts, loaded.nbytes) == (kept.num_tokens, kept.num_texts, kept.nbytes)
    for ours, theirs in zip(kept.sources(), loaded.sources(), strict=True):
        assert type(ours) is type(theirs)
        for sequence in ([1], [1, 2], [2, 3, 1], [5]):
            assert ours.longest(np.array(sequence)) == theirs.longest(np.array(sequence))
            assert ours.find(np.array(sequence)).next_tokens() == theirs.find(np.array(sequence)).next_tokens()
    loaded.add([1, 2, 60])
    assert counted(loaded, [1, 2]) == counted(kept, [1, 2]) | {60: 1}


def test_the_bound_of_a_loaded_history_is_its_own(file):
    loaded = History.load(file, 10)
    assert counted(loaded, [1, 2]) == {3: 2, 4: 1, 30: 1}  # the corpora and the last output
    assert counted(History.load(file, max_tokens=0), [1, 2]) == {3: 1, 30: 1}
    with pytest.raises(ValueError, match="History: max_tokens must be"):
        History.load(file, -1)


def test_an_empty_history_is_saved_and_loaded(tmp_path):
    History().save(tmp_path / "empty")
    assert History.load(tmp_path / "empty").sources() == ()


def test_a_file_is_replaced_as_a_whole(file, monkeypatch):
    before = file.read_bytes()
    for owner, name in ((history, "save"), (Path, "replace")):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(owner, name, mock.Mock(side_effect=MemoryError))
            filled().save(file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    History().save(file)
    assert History.load(file).num_tokens == 0 and list(file.parent.iterdir()) == [file]


def with_metadata(data, **changes):
    """The bytes of a safetensors file with other metadata."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda data: b"some text, long enough", "a file that is not safetensors, or is cut off"),
        (lambda data: b"", "a file that is not safetensors, or is cut off"),
        (lambda data: data[:-5], "a file that is not safetensors, or is cut off"),
        (lambda data: data[:-8] + b"12345678", "a broken one: its checksum is wrong"),
        (lambda data: data.replace(b"corpora.1", b"corpora.2"), "a broken one: its checksum is wrong"),
        (lambda data: with_metadata(data, version="2"), "version 2"),
        (lambda data: with_metadata(data, format="pt"), "a safetensors file of another kind (format 'pt')"),
    ],
)
def test_broken_files_are_refused(file, broken, message):
    file.write_bytes(broken(file.read_bytes()))
    with pytest.raises(ValueError) as caught:
        History.load(file)
    assert str(caught.value).startswith(
        f"History.load: {file} must be a file of History.save, version 1, got {message}"
    )


def test_other_paths_are_refused(tmp_path):
    save_file({"weight": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"weights must be .*, got a safetensors file of another kind \(format None\)"):
        History.load(tmp_path / "weights")
    with pytest.raises(ValueError, match="must be .*, got a folder"):
        History.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        History.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        History().save(tmp_path / "absent" / "file")


def test_a_loaded_history_keeps_as_much_as_its_bound_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "SEGMENT", 64)
    kept = History(1000)
    for number in range(120):
        kept.add([number] * 7, seed=number)
    assert len(kept._state.segments) > 5
    kept.save(tmp_path / "kept")
    for bound, least in ((0, 0), (20, 2), (60, 8), (500, 60)):
        loaded = History.load(tmp_path / "kept", bound)
        sources = loaded.sources()
        found = [number for number in range(120) if any(each.longest(np.array([number])) for each in sources)]
        assert found == [*range(120 - len(found), 120)] and len(found) >= least
        assert loaded.num_tokens == 7 * len(found) <= bound
        assert not loaded.sources([119]) and bool(loaded.sources([1000])) == bool(found)


def test_no_output_is_searched_by_a_call_with_the_seed_of_one(tmp_path):
    history = History(10)
    history.add_corpus([[7, 8]])
    history.add([1, 2, 3], seed=-5)
    history.add([1, 2, 4], seed=3)
    history.add([1, 2], seed=2**62)
    history.save(tmp_path / "kept")
    for each in (history, pickle.loads(pickle.dumps(history)), History.load(tmp_path / "kept", 10)):
        (corpus,) = each.sources([9, -5])
        assert corpus.longest(np.array([7])) == 1
        assert each.sources([2**62]) == (corpus,)
        assert len(each.sources([9])) == len(each.sources()) == 2
    history.add([5, 6, 7], seed=1)  # the first output is dropped
    history.add([5, 6, 7])  # not sampled; the second output is dropped
    assert len(history.sources([-5])) == 2 and len(history.sources([2**62])) == len(history.sources([1])) == 1
    history.clear()
    history.add([1, 2])
    assert len(history.sources([1])) == 2
