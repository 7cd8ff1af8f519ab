"""Topologies, packed trees and the best-first builder."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_triton import DraftTree, DynamicTree, Topology
from specdec_triton.ops.filters import Filters
from specdec_triton.tree import bits_of_nodes, with_children


@st.composite
def topologies(draw, most=70):
    nodes = draw(st.integers(1, most))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, nodes))]
    ranks = [parents[:node].count(parent) for node, parent in enumerate(parents)]
    return Topology(tuple(parents), tuple(ranks))


def ancestors_of(parents, node):
    path = {node}
    while parents[node] >= 0:
        node = parents[node]
        path.add(node)
    return path


@settings(max_examples=60, deadline=None)
@given(topologies())
def test_words_hold_exactly_the_ancestors(topology):
    tokens = torch.zeros(2, topology.num_nodes, dtype=torch.int64)
    fixed = DraftTree.from_topology(topology, tokens)
    free = DraftTree.from_parents(tokens, fixed.parents)
    assert torch.equal(fixed.ancestors, free.ancestors) and torch.equal(fixed.depth, free.depth)
    assert fixed.depth[0].tolist() == list(topology.depths)
    for node, words in enumerate(fixed.ancestors[1].tolist()):
        bits = {64 * w + bit for w, word in enumerate(words) for bit in range(64) if word >> bit & 1}
        assert bits == ancestors_of(topology.parents, node)


@settings(max_examples=60, deadline=None)
@given(topologies(), st.integers(0, 6))
def test_limited_drops_deeper_nodes(topology, depth):
    limited = topology.limited(depth)
    assert limited.max_depth == min(depth, topology.max_depth)
    assert limited.num_nodes == sum(d <= depth for d in topology.depths)


def test_topologies_by_hand():
    assert Topology.chain(3).parents == (-1, 0, 1, 2) and Topology.chain(3).is_chain
    assert Topology.chain(0).max_depth == 0
    wide = Topology.from_widths([2, 2])
    assert (wide.parents, wide.ranks) == ((-1, 0, 0, 1, 1, 2, 2), (0, 0, 1, 0, 1, 0, 1))
    assert Topology.from_paths([(0, 1), (2,)]) == Topology((-1, 0, 0, 1), (0, 0, 2, 1))
    # with probabilities of 0.6 for the first candidate and 0.3 for the second, the four best nodes besides the root
    assert Topology.from_budget(5, (0.6, 0.3)) == Topology.from_paths([(0, 0, 0), (1,)])
    assert Topology.from_budget(1).num_nodes == 1


@pytest.mark.parametrize(
    ("parents", "ranks"),
    [((), ()), ((-1, 0), (0,)), ((0, 0), (0, 0)), ((-1, 1), (0, 0)), ((-1, 0, 0), (0, 1, 1)), ((-1, 0), (0, -1))],
)
def test_bad_topologies_are_refused(parents, ranks):
    with pytest.raises(ValueError, match="^Topology: "):
        Topology(parents, ranks)


def test_bad_trees_are_refused():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="DraftTree: tokens must be torch.int64"):
        DraftTree.from_topology(Topology.chain(3), tokens)
    with pytest.raises(ValueError, match="DraftTree: tokens must be torch.int64"):
        DraftTree.from_parents(tokens.int(), tokens.int())
    with pytest.raises(ValueError, match="DraftTree: parents must be torch.int32"):
        DraftTree.from_parents(tokens, tokens)
    with pytest.raises(ValueError, match="best_first_tree: num_nodes must be 1 to 4, the nodes of"):
        DraftTree.best_first(tokens[:, 0], tokens[:, None], torch.zeros(2, 1, 3), 9)
    with pytest.raises(ValueError, match="Topology.from_budget: num_nodes must be at least 1"):
        Topology.from_budget(0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
def test_best_first_takes_the_likeliest_nodes(depth, width, nodes, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    nodes = min(nodes, sum(width**d for d in range(depth + 1)))
    candidates = torch.stack([torch.randperm(50, generator=generator)[:width] for _ in range(depth)])[None]
    probs = torch.rand(1, depth, width, generator=generator).sort(-1, descending=True).values
    if ties:
        probs = (probs * 2).round() / 2  # ties, zeros and ones
    root = torch.tensor([7])
    tree = DraftTree.best_first(root, candidates, probs.double().log(), nodes)
    assert tree.max_depth == min(depth, nodes - 1)
    tree.check(root, 50, "best_first")
    parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
    mass = {}
    for node in range(nodes):
        path = sorted(ancestors_of(parents, node))[1:]
        mass[tuple(tokens[n] for n in path)] = torch.tensor(
            [probs[0, d, candidates[0, d].tolist().index(tokens[n])] for d, n in enumerate(path)]
        ).prod()
    assert len(mass) == nodes  # no node twice
    every = [
        torch.tensor([probs[0, d, k] for d, k in enumerate(path)]).prod()
        for length in range(depth + 1)
        for path in itertools.product(range(width), repeat=length)
    ]
    wanted = torch.stack(every).sort(descending=True).values[:nodes]
    torch.testing.assert_close(torch.stack(list(mass.values())).sort(descending=True).values, wanted)


def test_a_drawn_tree_carries_its_draft_logits():
    tree = DraftTree.from_topology(Topology.chain(2), torch.zeros(3, 3, dtype=torch.int64))
    assert tree.sampling == "none" and tree.draft_logits is None
    logits, row = torch.zeros(3, 2, 7), torch.tensor([[0, 1, -1]] * 3, dtype=torch.int32)
    drawn = tree.drawn("without", logits, row)
    assert drawn.sampling == "without" and drawn.draft_logits is logits and drawn.draft_row is row
    assert drawn.draft_filters == Filters() and drawn.is_chain and torch.equal(drawn.tokens, tree.tokens)
    drawn.check(torch.zeros(3, dtype=torch.int64), 7, "Drafter")
    with pytest.raises(ValueError, match="Drafter: malformed draft tree in row 0: draft_row must be -1 or below 1"):
        tree.drawn("with", logits[:, :1], row).check(torch.zeros(3, dtype=torch.int64), 7, "Drafter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "none"}, 'sampling must be "with" or "without"'),
        ({"draft_logits": torch.zeros(2, 2, 7)}, r"draft_logits must be float \[3, P, V\]"),
        ({"draft_row": torch.zeros(3, 3)}, r"draft_row must be torch.int32 \[3, 3\]"),
        (
            {"draft_logits": torch.zeros(3, 2, 7, device="meta")},
            "draft_logits must be on cpu, got .* on meta",
        ),
    ],
)
def test_a_drawn_tree_refuses_wrong_shapes(changes, message):
    tree = DraftTree.from_topology(Topology.chain(2), torch.zeros(3, 3, dtype=torch.int64))
    given = {"sampling": "with", "draft_logits": torch.zeros(3, 2, 7), "draft_row": tree.parents} | changes
    with pytest.raises(ValueError, match=f"^DraftTree.drawn: .*{message}"):
        tree.drawn(**given)


def test_ancestors_of_a_tree_that_grows():
    """Added level by level, to more than one word and more than two words."""
    random, parents = torch.Generator().manual_seed(0), torch.full((2, 1), -1, dtype=torch.int64)
    grown, own_bits = DraftTree.root_only(parents).ancestors, bits_of_nodes(142).expand(2, -1, -1)
    for level in (1, 40, 30, 70):
        first = parents.shape[1]
        above = torch.randint(first, (2, level), generator=random)
        grown = with_children(grown, above, own_bits[:, first : first + level])
        parents = torch.cat([parents, above], 1)
        assert torch.equal(grown, DraftTree.from_parents(parents, parents.int()).ancestors)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 2, 2), "DynamicTree: num_nodes must be an integer of at least 1, got 0"),
        ((4, 2.0, 2), "DynamicTree: width must be an integer of at least 1, got 2.0"),
        ((4, 2, True), "DynamicTree: depth must be an integer of at least 1, got True"),
        ((8, 2, 2), "DynamicTree: num_nodes must be at most the 7 candidates of width 2 and depth 2, got 8"),
    ],
)
def test_invalid_dynamic_trees(numbers, message):
    with pytest.raises(ValueError, match=message):
        DynamicTree(*numbers)
    assert [DynamicTree(7, 2, 2).num_candidates(levels) for levels in range(4)] == [1, 3, 7, 11]
