"""The kernel that builds a draft tree against its reference, exactly; on a CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import build_by_hand
from specdec_triton import ops
from specdec_triton.kernels import build_tree as kernel
from specdec_triton.ops import reference
from specdec_triton.tree import DraftTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
UNUSED = 2**62 + 1  # between the elements of strided inputs

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

# each makes the number by which a node's score is below its parent's, from uniformly distributed numbers
FALLS = {
    "distinct": lambda drawn: drawn,
    "ties": lambda drawn: (drawn * 3).floor(),
    "all equal": lambda drawn: drawn * 0,
    "some -inf": lambda drawn: torch.where(drawn < 0.4, INF, drawn),
    "some NaN": lambda drawn: torch.where(drawn < 0.4, NAN, drawn),
    "tiny": lambda drawn: (drawn * 3).floor() * 1e-44,
}


def case(batch, candidates, max_depth, kind="distinct", seed=0):
    """Random candidates by name: tokens, parents and scores. With depth 0, the candidates are children of the root, and
    only the root may be kept."""
    random = torch.Generator().manual_seed(seed)
    fall = FALLS[kind](torch.rand(batch, candidates, generator=random))
    share = torch.rand(batch, candidates, generator=random)
    parents, scores = torch.full((batch, candidates), -1), torch.zeros(batch, candidates)
    depth = torch.zeros(batch, candidates, dtype=torch.int64)
    for node in range(1, candidates):
        parent = (share[:, node] * node).long()[:, None]
        shallow = depth.gather(1, parent) < max_depth
        parent = torch.where(shallow, parent, 0)
        parents[:, node] = parent[:, 0]
        depth[:, node] = depth.gather(1, parent)[:, 0] + 1
        scores[:, node] = scores.gather(1, parent)[:, 0] - fall[:, node]
    tokens = torch.randint(0, 50, (batch, candidates), generator=random)
    return {"tokens": tokens.to(DEVICE), "parents": parents.to(DEVICE), "scores": scores.to(DEVICE)}


def check(arguments, num_nodes, max_depth):
    """Assert that kernel and reference return the same. Returns the tree and the numbers of its nodes."""
    sizes = {"num_nodes": num_nodes, "max_depth": max_depth}
    got, want = (build(**arguments, **sizes) for build in (kernel.build_tree, reference.build_tree))
    for name, mine, theirs in zip(("tokens", "parents", "depth", "ancestors", "nodes"), got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert mine.is_contiguous()
    return DraftTree(*got[:4], max_depth=max_depth), got[4]


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_hand_worked(impl):
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 26]], device=DEVICE)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 3], [-1, 0, 0, 0, 3, 4, 5]], device=DEVICE)
    scores = torch.tensor([[0, -1, -2, -1, -2, -5, -1], [0, -3, -INF, -1, -1, NAN, NAN]], device=DEVICE)
    kept, parents, depth, ancestors, nodes = ops.build_tree(
        tokens, parents, scores, num_nodes=5, max_depth=3, impl=impl
    )
    # node 2 and not node 4, which has the same score; -inf before a NaN, which counts as -inf
    assert nodes.tolist() == [[0, 1, 2, 3, 6], [0, 1, 2, 3, 4]]
    assert kept.tolist() == [[10, 11, 12, 13, 16], [20, 21, 22, 23, 24]]
    assert parents.tolist() == [[-1, 0, 0, 1, 3], [-1, 0, 0, 0, 3]] and parents.dtype == torch.int32
    assert depth.tolist() == [[0, 1, 1, 2, 3], [0, 1, 1, 1, 2]]
    assert ancestors.tolist() == [[[1], [3], [5], [11], [27]], [[1], [3], [5], [9], [25]]]


@pytest.mark.parametrize("kind", FALLS)
def test_random_trees(kind):
    for seed, (candidates, num_nodes) in enumerate([(40, 17), (40, 40), (70, 66), (33, 1)]):
        arguments = case(3, candidates, 6, kind, seed)
        tree, nodes = check(arguments, num_nodes, min(6, num_nodes - 1))
        tree.check(arguments["tokens"][:, 0], 50, kind)
        assert torch.equal(tree.tokens, arguments["tokens"].gather(1, nodes))


# around powers of two and multiples of 64
@pytest.mark.parametrize(
    ("batch", "candidates", "num_nodes", "max_depth"),
    [
        *[(1, 1, 1, 0), (5, 2, 1, 0), (2, 2, 2, 1), (3, 16, 3, 2), (2, 17, 17, 16), (2, 64, 63, 5), (2, 65, 64, 63)],
        *[(2, 129, 65, 4), (1, 300, 130, 129), (1, 257, 200, 12)],
    ],
)
def test_sizes(batch, candidates, num_nodes, max_depth):
    tree, nodes = check(case(batch, candidates, max_depth, "ties"), num_nodes, max_depth)
    assert nodes.shape == tree.tokens.shape == (batch, num_nodes)


def test_a_chain_of_all_candidates():
    """The longest walk, through two words."""
    row = torch.arange(100, device=DEVICE)[None]
    tree, nodes = check({"tokens": row, "parents": row - 1, "scores": -row.float()}, 70, 69)
    assert torch.equal(nodes, row[:, :70]) and torch.equal(tree.depth, nodes)
    assert (tree.ancestors[0, 69].tolist(), tree.ancestors[0, 63].tolist()) == ([-1, 63], [-1, 0])


def test_scores_of_all_signs_and_sizes():
    """The order of the scores is that of floats: both zeros are equal, and denormal numbers differ from them."""
    scores = torch.tensor([INF, 3e38, 1.0, 1e-45, 0.0, -0.0, -1e-45, -1.0, -3e38, -INF], device=DEVICE)
    order = torch.tensor([0, 9, 5, 3, 8, 4, 1, 7, 2, 6], device=DEVICE)
    row = torch.arange(10, device=DEVICE)[None]
    arguments = {"tokens": row, "parents": (row > 0).long() - 1, "scores": scores[order][None]}
    found = []
    for num_nodes in range(1, 11):
        _, nodes = check(arguments, num_nodes, min(1, num_nodes - 1))
        found += set(nodes[0].tolist()) - set(found)
    wanted = scores[order].sort(descending=True, stable=True).indices.tolist()
    assert found == wanted


@pytest.mark.parametrize("root", [NAN, -INF, -4.0, INF])
def test_the_root_is_kept_whatever_its_score(root):
    arguments = case(2, 30, 4, seed=3)
    arguments["scores"][:, 0] = root
    _, nodes = check(arguments, 9, 4)
    assert (nodes[:, 0] == 0).all()
    assert torch.equal(nodes, check(case(2, 30, 4, seed=3), 9, 4)[1])


def test_scores_that_exceed_their_parents():
    """The tree is malformed, but every index is in range, and the result is that of the reference."""
    arguments = case(4, 60, 5, seed=1)
    arguments["scores"] = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments["scores"][1, ::2], arguments["scores"][2] = NAN, NAN
    tree, nodes = check(arguments, 20, 5)
    places = torch.arange(20, device=DEVICE)
    assert (tree.parents[0, 1:] < 0).any() and ((tree.parents >= -1) & (tree.parents < places.clamp(min=1))).all()
    assert (nodes[:, 1:] > nodes[:, :-1]).all() and (nodes < 60).all() and (tree.depth <= 5).all()
    assert torch.equal(nodes[2], places)


def test_strides():
    arguments = case(3, 21, 4, "ties", seed=2)
    strided = {}
    for name, value in arguments.items():
        wide = torch.full([2 * size + 1 for size in value.shape], UNUSED, device=DEVICE).to(value.dtype)
        strided[name] = wide[tuple(slice(1, 2 * size, 2) for size in value.shape)].copy_(value)
    strided["parents"] = arguments["parents"][1:2].expand(3, -1)
    given = {name: value.clone() for name, value in strided.items()}
    tree, nodes = check(strided, 11, 4)
    assert torch.equal(nodes, check({name: value.contiguous() for name, value in given.items()}, 11, 4)[1])
    assert (tree.tokens < 50).all() and all(torch.equal(strided[name], given[name]) for name in given)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_property(data):
    batch, candidates = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    depth, num_nodes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, candidates))
    arguments = case(batch, candidates, depth, data.draw(st.sampled_from([*FALLS])), data.draw(st.integers(0, 999)))
    max_depth = min(depth, num_nodes - 1)
    want = build_by_hand(**{name: value.tolist() for name, value in arguments.items()}, num_nodes=num_nodes)
    for build in (kernel.build_tree, reference.build_tree):
        got = build(**arguments, num_nodes=num_nodes, max_depth=max_depth)
        assert tuple(each.tolist() for each in got) == want


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": IDS.int()}, r"tokens must be torch.int64 \[B, C\], none of them 0, got torch.int32"),
        ({"tokens": IDS[:, :0]}, r"tokens must be torch.int64 \[B, C\], none of them 0, got torch.int64 \[2, 0\]"),
        ({"parents": IDS.int()}, r"parents must be torch.int64 \[2, 5\], got torch.int32"),
        ({"parents": IDS[:, :4]}, r"parents must be torch.int64 \[2, 5\], got torch.int64 \[2, 4\]"),
        ({"scores": IDS.double()}, r"scores must be torch.float32 \[2, 5\], got torch.float64"),
        ({"scores": IDS[:1].float()}, r"scores must be torch.float32 \[2, 5\], got torch.float32 \[1, 5\]"),
        ({"scores": torch.zeros(2, 5, device="meta")}, "scores must be on cpu, got .* on meta"),
        ({"num_nodes": 0}, "num_nodes must be 1 to 5 for 5 candidates, got 0"),
        ({"num_nodes": 6}, "num_nodes must be 1 to 5 for 5 candidates, got 6"),
        ({"num_nodes": 2.0}, "num_nodes must be an integer of 64 bits, got 2.0"),
        ({"max_depth": 3}, "max_depth must be 0 to num_nodes - 1 = 2, got 3"),
        ({"max_depth": -1}, "max_depth must be 0 to num_nodes - 1 = 2, got -1"),
        ({"impl": "cuda"}, 'impl must be None, "triton" or "reference", got'),
    ],
    ids=lambda value: "",
)
def test_bad_arguments(changes, message):
    arguments = {"tokens": IDS, "parents": IDS - 1, "scores": IDS.float(), "num_nodes": 3, "max_depth": 2}
    ops.build_tree(**arguments)
    with pytest.raises(ValueError, match=f"^build_tree: {message}"):
        ops.build_tree(**arguments | changes)


@pytest.mark.parametrize(("candidates", "num_nodes"), [(ops.MAX_CANDIDATES + 1, 3), (600, ops.MAX_BUILT_NODES + 1)])
def test_sizes_beyond_the_kernels(candidates, num_nodes):
    """They are refused with an explicit choice of the kernel, and by default computed by the reference."""
    row = torch.arange(candidates, device=DEVICE)[None]
    arguments = {"tokens": row, "parents": (row > 0).long() - 1, "scores": row.float().cos()}
    sizes = {"num_nodes": num_nodes, "max_depth": 1}
    message = (
        r'^build_tree: with impl="triton", tokens must have at most 4096 candidates, and num_nodes must be at most 512 '
        rf"\(impl=None uses the reference\), got {candidates} and {num_nodes}"
    )
    with pytest.raises(ValueError, match=message):
        ops.build_tree(**arguments, **sizes, impl="triton")
    *_, nodes = ops.build_tree(**arguments, **sizes)
    assert torch.equal(nodes, reference.build_tree(**arguments, **sizes)[-1])


# candidates of DynamicTree(60, 10, 8) and (64, 8, 6), of Medusa's default tree, and the limits
REAL = [(711, 60, 8), (329, 64, 6), (203, 64, 4), (4096, 512, 12), (2049, 100, 20)]


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize(("candidates", "num_nodes", "max_depth"), REAL)
def test_no_race_in_many_trials(candidates, num_nodes, max_depth):
    for kind in ("distinct", "ties"):
        arguments = case(16, candidates, max_depth, kind)
        for _ in range(10):
            check(arguments, num_nodes, max_depth)
            order = torch.randperm(16, device=DEVICE)
            arguments = {name: value[order] for name, value in arguments.items()}


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    own = case(4, 100, 5)
    kernel.build_tree(**own, num_nodes=30, max_depth=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            built = torch.ops.specdec_triton.build_tree(*own.values(), 30, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed, kind in enumerate(FALLS):
        given = case(4, 100, 5, kind, seed)
        for name, value in given.items():
            own[name].copy_(value)
        graph.replay()
        for mine, theirs in zip(built, reference.build_tree(**given, num_nodes=30, max_depth=5), strict=True):
            assert torch.equal(mine, theirs)
