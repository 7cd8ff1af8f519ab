"""The kernel that builds the likeliest draft tree against its reference, exactly; on a CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import best_first_by_hand
from specdec_triton import ops
from specdec_triton.kernels import best_first_tree as kernel
from specdec_triton.ops import reference
from specdec_triton.tree import DraftTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
UNUSED = 2**62 + 1  # between the elements of strided inputs

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

# each makes log-probabilities from uniformly distributed numbers [B, D, K]
KINDS = {
    "distinct": lambda drawn: (drawn * 4).log_softmax(-1).sort(-1, descending=True).values,
    "ties": lambda drawn: -(drawn * 3).floor().sort(-1).values,
    "all certain": lambda drawn: drawn * 0,
    "greedy": lambda drawn: torch.where(torch.arange(drawn.shape[2]) > 0, -INF, drawn * 0),
    "some -inf": lambda drawn: torch.where(drawn.sort(-1).values > 0.6, -INF, -drawn.sort(-1).values),
    "some NaN": lambda drawn: torch.where(drawn < 0.2, NAN, -drawn.sort(-1).values),
    "all NaN": lambda drawn: drawn + NAN,
    "tiny": lambda drawn: -(drawn * 3).floor().sort(-1).values * 1e-45,
    "lost in sums": lambda drawn: -(drawn * 2).floor().sort(-1).values * 1e8 - drawn.sort(-1).values,
    "in any order": lambda drawn: drawn * 6 - 5,
    "infinite": lambda drawn: torch.where(drawn < 0.5, INF, -INF),
}


def case(batch, positions, width, kind="distinct", seed=0):
    """Random inputs by name: root, candidates and log-probabilities."""
    random = torch.Generator().manual_seed(seed)
    log_probs = KINDS[kind](torch.rand(batch, positions, width, generator=random))
    root = torch.randint(0, 50, (batch,), generator=random)
    candidates = torch.randint(0, 50, (batch, positions, width), generator=random)
    return {"root": root.to(DEVICE), "candidates": candidates.to(DEVICE), "log_probs": log_probs.to(DEVICE)}


def check(arguments, num_nodes):
    """Assert that kernel and reference return the same. Returns the tree."""
    arguments = {**arguments, "num_nodes": num_nodes}
    got, want = kernel.best_first_tree(**arguments), reference.best_first_tree(**arguments)
    for name, mine, theirs in zip(("tokens", "parents", "depth", "ancestors"), got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert mine.is_contiguous() and mine.dtype == theirs.dtype
    return DraftTree(*got, max_depth=min(arguments["candidates"].shape[1], num_nodes - 1))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_hand_worked(impl):
    root = torch.tensor([7, 8, 9], device=DEVICE)
    candidates = torch.tensor([[[10, 11], [20, 21], [30, 31]]], device=DEVICE).expand(3, -1, -1)
    log_probs = torch.tensor(
        [
            [[-1, -2], [-1, -3], [-1, -INF]],
            [[0, 0], [0, -1], [0, 0]],
            [[-1, NAN], [-2, -1], [1, -4]],
        ],
        device=DEVICE,
    )
    tokens, parents, depth, ancestors = ops.best_first_tree(root, candidates, log_probs, num_nodes=6, impl=impl)
    # first row: of the nodes with score -2, the shallower first; of those with -3, again, and then the lower parent
    assert tokens[0].tolist() == [7, 10, 11, 20, 20, 30]
    assert parents[0].tolist() == [-1, 0, 0, 1, 2, 3] and parents.dtype == torch.int32
    assert depth[0].tolist() == [0, 1, 1, 2, 2, 3]
    assert ancestors[0].tolist() == [[1], [3], [5], [11], [21], [43]]
    # second row: all have score 0; third row: NaN is -inf, 21 counts as much as 20, and 30 as certain
    assert tokens[1].tolist() == [8, 10, 11, 20, 20, 30] and parents[1].tolist() == [-1, 0, 0, 1, 2, 3]
    assert tokens[2].tolist() == [9, 10, 20, 21, 30, 30] and parents[2].tolist() == [-1, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_random_trees(kind):
    for seed, (positions, width, num_nodes) in enumerate([(3, 4, 12), (2, 3, 13), (5, 2, 17)]):
        arguments = case(2, positions, width, kind, seed)
        check(arguments, num_nodes).check(arguments["root"], 50, kind)


# around powers of two and multiples of 64, full trees, and more positions and candidates than nodes
@pytest.mark.parametrize(
    ("batch", "positions", "width", "num_nodes"),
    [
        *[(1, 0, 3, 1), (3, 4, 2, 1), (2, 1, 1, 2), (1, 3, 2, 15), (1, 4, 2, 16), (1, 4, 3, 17), (1, 6, 2, 64)],
        *[(1, 5, 3, 65), (1, 15, 1, 16), (1, 40, 1, 9), (2, 1, 40, 7), (1, 7, 2, 129)],
    ],
)
def test_sizes(batch, positions, width, num_nodes):
    arguments = case(batch, positions, width, "ties")
    check(arguments, num_nodes).check(arguments["root"], 50, "sizes")


def test_a_chain():
    """The longest walk, through two words."""
    row = torch.arange(1, 100, device=DEVICE)
    tree = check({"root": row[:1] - 1, "candidates": row[None, :, None], "log_probs": -row[None, :, None].float()}, 70)
    assert torch.equal(tree.tokens[0], torch.arange(70, device=DEVICE)) and torch.equal(tree.depth, tree.tokens)
    assert (tree.ancestors[0, 69].tolist(), tree.ancestors[0, 63].tolist()) == ([-1, 63], [-1, 0])


def test_a_smaller_tree_is_the_beginning_of_a_larger_one():
    arguments = case(2, 4, 3, "ties", seed=5)
    large = check(arguments, 30)
    for num_nodes in (1, 2, 11):
        small = check(arguments, num_nodes)
        for name in ("tokens", "parents", "depth"):
            assert torch.equal(getattr(small, name), getattr(large, name)[:, :num_nodes])


def test_strides():
    arguments = case(3, 4, 3, "ties", seed=2)
    strided = {}
    for name, value in arguments.items():
        wide = torch.full([2 * size + 1 for size in value.shape], UNUSED, device=DEVICE).to(value.dtype)
        strided[name] = wide[tuple(slice(1, 2 * size, 2) for size in value.shape)].copy_(value)
    strided["candidates"] = arguments["candidates"][1:2].expand(3, -1, -1)
    given = {name: value.clone() for name, value in strided.items()}
    tree = check(strided, 11)
    assert torch.equal(tree.tokens, check({name: value.contiguous() for name, value in given.items()}, 11).tokens)
    assert (tree.tokens < 50).all() and all(torch.equal(strided[name], given[name]) for name in ("root", "candidates"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_property(data):
    batch, positions, width = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    num_nodes = data.draw(st.integers(1, min(15, sum(width**depth for depth in range(positions + 1)))))
    arguments = case(batch, positions, width, data.draw(st.sampled_from([*KINDS])), data.draw(st.integers(0, 999)))
    want = best_first_by_hand(**{name: value.tolist() for name, value in arguments.items()}, num_nodes=num_nodes)
    for build in (kernel.best_first_tree, reference.best_first_tree):
        assert tuple(each.tolist() for each in build(**arguments, num_nodes=num_nodes)) == want


@pytest.mark.parametrize("kind", ["distinct", "ties", "some -inf", "lost in sums"])
def test_no_other_tree_is_more_likely(kind):
    """The scores of the nodes are the highest of the full tree, computed from all its paths."""
    for seed, (positions, width, num_nodes) in enumerate([(3, 5, 40), (6, 2, 70), (4, 4, 64)]):
        arguments = case(1, positions, width, kind, seed)
        log_probs, every = arguments["log_probs"][0], [torch.zeros(1, device=DEVICE)]
        for position in range(positions):
            every.append((every[-1][:, None] + log_probs[position]).flatten())
        ranks = torch.arange(width, device=DEVICE).expand_as(arguments["candidates"])  # tokens that name their ranks
        tree = DraftTree.best_first(arguments["root"], ranks, arguments["log_probs"], num_nodes)
        paths, scores = [()], every[0][:1]
        for parent, rank in zip(tree.parents[0, 1:].tolist(), tree.tokens[0, 1:].tolist(), strict=True):
            scores = torch.cat([scores, scores[parent] + log_probs[len(paths[parent]), rank, None]])
            paths.append((*paths[parent], rank))
        assert len(set(paths)) == num_nodes
        assert torch.equal(scores, torch.cat(every).sort(descending=True).values[:num_nodes])


IDS = torch.zeros(2, 3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": IDS[:, 0, 0].int()}, r"root must be torch.int64 \[B\], got torch.int32"),
        ({"root": IDS[:1, 0, 0]}, r"candidates must be torch.int64 \[1, D, K\], got torch.int64 \[2, 3, 4\]"),
        ({"candidates": IDS.int()}, r"candidates must be torch.int64 \[2, D, K\], got torch.int32"),
        ({"candidates": IDS[..., :0]}, r"candidates must be torch.int64 \[2, D, K\], got torch.int64 \[2, 3, 0\]"),
        ({"log_probs": IDS.double()}, r"log_probs must be torch.float32 \[2, 3, 4\], got torch.float64"),
        ({"log_probs": IDS[:, 1:].float()}, r"log_probs must be torch.float32 \[2, 3, 4\], got torch.float32 \[2, 2"),
        ({"log_probs": torch.zeros(2, 3, 4, device="meta")}, "log_probs must be on cpu, got .* on meta"),
        ({"num_nodes": 0}, "num_nodes must be 1 to 85, the nodes of the full tree, got 0"),
        ({"num_nodes": 86}, "num_nodes must be 1 to 85, the nodes of the full tree, got 86"),
        ({"num_nodes": 2.0}, "num_nodes must be an integer of 64 bits, got 2.0"),
        ({"impl": "cuda"}, 'impl must be None, "triton" or "reference", got'),
    ],
    ids=lambda value: "",
)
def test_bad_arguments(changes, message):
    arguments = {"root": IDS[:, 0, 0], "candidates": IDS, "log_probs": IDS.float(), "num_nodes": 85}
    ops.best_first_tree(**arguments, impl="reference")
    with pytest.raises(ValueError, match=f"^best_first_tree: {message}"):
        ops.best_first_tree(**arguments | changes)


def test_sizes_beyond_the_kernel():
    """They are refused with an explicit choice of the kernel, and by default computed by the reference."""
    arguments, num_nodes = case(1, 3, 10), ops.MAX_BUILT_NODES + 1
    message = (
        r'^best_first_tree: with impl="triton", num_nodes must be at most 512 \(impl=None uses the reference\), got 513'
    )
    with pytest.raises(ValueError, match=message):
        ops.best_first_tree(**arguments, num_nodes=num_nodes, impl="triton")
    found = ops.best_first_tree(**arguments, num_nodes=num_nodes)
    wanted = reference.best_first_tree(**arguments, num_nodes=num_nodes)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


# Medusa's default tree, blocks of 8 and of 16 tokens, and the limit
REAL = [(4, 10, 64), (7, 10, 64), (15, 10, 64), (16, 16, 130), (3, 64, 512), (600, 1, 512)]


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize(("positions", "width", "num_nodes"), REAL)
def test_no_race_in_many_trials(positions, width, num_nodes):
    for kind in ("distinct", "ties"):
        arguments = case(16, positions, width, kind)
        for _ in range(10):
            check(arguments, num_nodes)
            order = torch.randperm(16, device=DEVICE)
            arguments = {name: value[order] for name, value in arguments.items()}


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    own = case(4, 5, 6)
    kernel.best_first_tree(**own, num_nodes=30)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            built = torch.ops.specdec_triton.best_first_tree(*own.values(), 30)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed, kind in enumerate(KINDS):
        given = case(4, 5, 6, kind, seed)
        for name, value in given.items():
            own[name].copy_(value)
        graph.replay()
        for mine, theirs in zip(built, reference.best_first_tree(**given, num_nodes=30), strict=True):
            assert torch.equal(mine, theirs)
