"""The prompt lookup kernel against its reference and a lookup by hand; on a CPU in Triton's interpreter."""

import numpy as np
import pytest
import torch

from specdec_triton import ops
from specdec_triton.kernels import ngram_lookup as kernel
from specdec_triton.ops import reference
from specdec_triton.tree import DraftTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULE = {"first": 0.8, "threshold": 0.75, "learning": 0.2, "drift": 0.02}
POISON = 2**62 + 7


def texts(*rows, start=0, columns=None):
    """Tokens [B, C], start and length; all columns outside of the texts hold one token."""
    columns = columns or start + max(map(len, rows)) + 3
    tokens = torch.full((len(rows), columns), POISON)
    for row, text in enumerate(rows):
        tokens[row, start : start + len(text)] = torch.tensor(text)
    length = torch.tensor([start + len(text) - 1 for text in rows])
    return tokens.to(DEVICE), torch.full_like(length, start).to(DEVICE), length.to(DEVICE)


def new_state(length, longest=4):
    estimates = (torch.arange(1, longest + 1) * 0.8).repeat(len(length), 1).to(DEVICE)
    none = torch.zeros_like(length)
    return estimates, torch.stack([none, none, length], 1)


def check(tokens, start, length, state, num_nodes=12, max_depth=11, **rule):
    """Assert that kernel and reference agree bit for bit, states included. Returns the chain."""
    rule = {**RULE, **rule}
    states = [[part.clone() for part in state] for _ in range(2)]
    got, want = (
        lookup(tokens, start, length, *own, num_nodes, max_depth, *rule.values())
        for lookup, own in zip((kernel.ngram_lookup, reference.ngram_lookup), states, strict=True)
    )
    for mine, theirs in zip((*got, *states[0]), (*want, *states[1]), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    for part, new in zip(state, states[0], strict=True):
        part.copy_(new)
    return DraftTree(*got, max_depth=max_depth, is_chain=True)


def by_hand(text, longest, depth):
    """Length of the best match, and its continuation."""
    best, found = 0, []
    for end in range(len(text) - 1):
        size = 0
        while size < min(longest, end + 1) and text[end - size] == text[len(text) - 1 - size]:
            size += 1
        if size > best:
            best, found = size, text[end + 1 :][:depth]
    return best, found


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_hand_worked(impl):
    tokens, start, length = texts([5, 6, 7, 8, 9, 5, 6], [1, 2, 3], [4, 4])
    state = new_state(length)
    chain, parents, depth, ancestors = ops.ngram_lookup(
        tokens, start, length, *state, num_nodes=4, max_depth=2, **RULE, impl=impl
    )
    assert chain.tolist() == [[6, 7, 8, 0], [3, 0, 0, 0], [4, 4, 0, 0]]
    assert parents.tolist() == [[-1, 0, 1, -1], [-1] * 4, [-1, 0, -1, -1]] and parents.dtype == torch.int32
    assert depth.tolist() == [[0, 1, 2, 0], [0] * 4, [0, 1, 0, 0]]
    assert ancestors[..., 0].tolist() == [[1, 3, 7, 8], [1, 2, 4, 8], [1, 3, 4, 8]]
    assert state[1].tolist() == [[2, 2, 6], [0, 0, 2], [1, 1, 1]]


@pytest.mark.parametrize("alphabet", [1, 2, 4, 50])
@pytest.mark.parametrize("longest", [1, 3, 9])
def test_random_texts(alphabet, longest):
    random = np.random.default_rng(alphabet * 10 + longest)
    rows = [random.integers(0, alphabet, size).tolist() for size in (1, 2, 7, 40, 300, 600)]
    tokens, start, length = texts(*rows, start=3)
    tree = check(tokens, start, length, new_state(length, longest), threshold=0.0)
    tree.check(tokens.gather(1, length[:, None])[:, 0], alphabet, "lookup")
    same = DraftTree.from_parents(tree.tokens, tree.parents)
    assert torch.equal(tree.depth, same.depth) and torch.equal(tree.ancestors, same.ancestors)
    for row, text in enumerate(rows):
        _, found = by_hand(text, longest, 11)
        assert tree.tokens[row, 1 : 1 + len(found)].tolist() == found
        assert int((tree.parents[row] >= 0).sum()) == len(found)


def test_the_earliest_of_equal_matches_in_different_blocks():
    text = list(range(100, 1400))
    for at in (10, 11 + kernel.BLOCK_C, 5 + 3 * kernel.BLOCK_C):
        text[at : at + 3] = [1, 2, at]
    text += [1, 2]
    tokens, start, length = texts(text)
    assert check(tokens, start, length, new_state(length)).tokens[0, 1] == 10
    # a longer match is better, wherever it is; n-grams also match across the border of two blocks
    border = 2 * kernel.BLOCK_C
    tokens[0, border - 1 : border + 3] = torch.tensor([99, 1, 2, 77])
    tokens[0, length[0] - 2] = 99
    assert check(tokens, start, length, new_state(length)).tokens[0, 1] == 77


@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, 130])
def test_sizes_of_the_chain(nodes):
    rows = [7] * 200, [*range(20), *range(10)], [3, 4, 5]
    tokens, start, length = texts(*rows)
    for depth in {0, nodes // 2, nodes - 1}:
        tree = check(tokens, start, length, new_state(length), nodes, depth)
        tree.check(tokens.gather(1, length[:, None])[:, 0], 20, "lookup")
        assert (tree.parents >= 0).sum(1).tolist() == [depth, min(depth, 20), 0]


@pytest.mark.parametrize("threshold", [0.0, 0.75, 1.6])
def test_estimates_over_rounds(threshold):
    """Rounds of random length, and calls between which the text did not grow."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, 3, size).tolist() for size in (5, 60, 33)]
    tokens, start, length = texts(*rows, columns=400)
    state, drafted = new_state(length), set()
    for number in range(20):
        before = [part.clone() for part in state]
        tree = check(tokens, start, length, state, max_depth=number % 4, threshold=threshold)
        drafted |= set((tree.parents >= 0).any(1).tolist())
        again = [part.clone() for part in state]
        check(tokens, start, length, state, max_depth=number % 4, threshold=threshold)
        assert torch.equal(state[0], again[0])  # nothing is learned twice
        if number:
            assert not torch.equal(state[0], before[0]) or not before[1][:, 0].any()
        count = torch.from_numpy(random.integers(1, 5, 3)).to(DEVICE)
        for row in range(3):
            new = slice(int(length[row]) + 1, int(length[row] + count[row]) + 1)
            tokens[row, new] = torch.from_numpy(random.integers(0, 3, int(count[row]))).to(DEVICE)
        length += count
    assert True in drafted


def test_strided_inputs_and_poison():
    rows = [1, 2, 3, 4, 1, 2], [8, 9, 8]
    tokens, start, length = texts(*rows, start=2)
    wanted = check(tokens, start, length, new_state(length))
    wide = torch.full((4, 2 * tokens.shape[1]), POISON, device=DEVICE)
    wide[::2, 1::2] = tokens
    pairs = torch.stack([start, length], 1)
    got = check(wide[::2, 1::2], pairs[:, 0], pairs[:, 1], new_state(length))
    assert torch.equal(got.tokens, wanted.tokens) and (got.tokens < POISON).all()
    # a text that fills all columns
    assert check(tokens[:, :8], start, length, new_state(length)).tokens[0, :5].tolist() == [2, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 9)}, r"tokens must be torch.int64 \[B, C\], none of them 0, got torch.float32"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, r"start must be torch.int64 \[2\], got torch.int64 \[3\]"),
        ({"estimates": torch.zeros(2, 3).double()}, r"estimates must be torch.float32 \[2, G\]"),
        ({"estimates": torch.zeros(3, 2).T}, r"estimates must be contiguous, got .* with strides \[1, 2\]"),
        ({"last_draft": torch.zeros(2, 2, dtype=torch.int64)}, r"last_draft must be int64 \[2, 3\], got"),
        ({"max_depth": 4}, "max_depth must be 0 to num_nodes - 1 = 3, got 4"),
        ({"num_nodes": 2.0}, "num_nodes must be an integer of 64 bits, got 2.0"),
        ({"impl": "cuda"}, 'impl must be None, "triton" or "reference", got'),
    ],
    ids=lambda value: "",
)
def test_bad_arguments(changes, message):
    ids = torch.zeros(2, dtype=torch.int64)
    arguments = {"tokens": torch.zeros(2, 9, dtype=torch.int64), "start": ids, "length": ids}
    arguments |= {"estimates": torch.zeros(2, 3), "last_draft": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^ngram_lookup: {message}"):
        ops.ngram_lookup(**{**arguments, "num_nodes": 4, "max_depth": 3, **changes})


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("columns", [300, 8192, 32768, 131072])
def test_long_texts(batch, columns):
    random = torch.Generator().manual_seed(columns)
    tokens = torch.randint(0, 30, (batch, columns), generator=random).to(DEVICE)
    length = torch.randint(columns // 2, columns, (batch,), generator=random).to(DEVICE)
    check(tokens, length // 7, length, new_state(length))


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_texts_and_the_host_reads_nothing():
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (4, 3000), generator=random).to(DEVICE)
    start, length = (torch.full((4,), column, device=DEVICE) for column in (5, 900))
    state = new_state(length)
    given = [part.clone() for part in state]
    kernel.ngram_lookup(tokens, start, length, *state, 12, 11, *RULE.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.cuda.set_sync_debug_mode("error")
        try:
            chain = kernel.ngram_lookup(tokens, start, length, *state, 12, 11, *RULE.values())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for part, first in zip(state, given, strict=True):
        part.copy_(first)
    for _ in range(9):
        wanted = reference.ngram_lookup(tokens, start, length, *given, 12, 11, *RULE.values())
        graph.replay()
        for mine, theirs in zip((*chain, *state), (*wanted, *given), strict=True):
            assert torch.equal(mine, theirs)
        length += torch.randint(1, 5, (4,), generator=random).to(DEVICE)
