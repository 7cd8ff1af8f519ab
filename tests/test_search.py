"""The search for the best tree: compared with all trees, its limits, and its amount of work."""

import itertools
import sys

import numpy as np
import pytest

from specdec_triton import Topology
from specdec_triton.tree_choice.costs import CPU_PRIOR, Costs, OnlineCosts
from specdec_triton.tree_choice.search import LADDER, expected_tokens, optimal_topology

GPU = Costs(verify=((1, 1.0), (64, 1.0), (128, 2.0)), draft=((1, 0.05),))
ACCEPTANCE = np.tile([0.7, 0.12, 0.06, 0.03], (16, 1))


def random_acceptance(generator, depth, ranks):
    return generator.dirichlet(np.full(ranks + 1, 0.7), size=depth)[:, :ranks]


def every_tree(max_nodes, max_depth, ranks):
    """All trees, as sets of paths that contain the parent of each path."""
    trees = level = {frozenset([()])}
    for _ in range(max_nodes - 1):
        level = {
            tree | {(*path, rank)}
            for tree in level
            for path in tree
            for rank in range(ranks)
            if len(path) < max_depth and (*path, rank) not in tree
        }
        trees = trees | level
    return trees


def rate_of(tree, acceptance, costs):
    """Expected tokens per second, from the definition."""
    tokens = sum(np.prod([acceptance[depth, rank] for depth, rank in enumerate(path)]) for path in tree)
    return tokens / costs.round_seconds(len(tree), max(map(len, tree)))


@pytest.mark.parametrize(("max_nodes", "max_depth", "ranks"), [(6, 5, 2), (6, 2, 3), (5, 4, 3), (4, 3, 4), (1, 3, 2)])
def test_the_best_tree_is_the_best_of_all(max_nodes, max_depth, ranks):
    generator = np.random.default_rng(max_nodes * 100 + ranks)
    trees = every_tree(max_nodes, max_depth, ranks)
    sizes = {size for size in LADDER if size <= max_nodes} | {max_nodes}
    won = set()
    for _ in range(12):
        acceptance = random_acceptance(generator, max_depth, ranks)
        seconds = np.cumsum(generator.uniform(0.01, 0.4, size=max_nodes))
        costs = Costs(
            verify=tuple(enumerate((0.5 + seconds).tolist(), start=1)),
            draft=((1, generator.uniform(0, 0.2)),),
        )

        best = optimal_topology(acceptance, costs, max_nodes, max_depth)
        tokens = expected_tokens(best, acceptance)
        wanted = max(rate_of(tree, acceptance, costs) for tree in trees if len(tree) in sizes)
        assert tokens / costs.round_seconds(best.num_nodes, best.max_depth) == pytest.approx(wanted)
        won.add(best)
    assert len(won) == 1 if max_nodes == 1 else len(won) > 3


@pytest.mark.parametrize("num_nodes", [2, 3, 8, 24, 64])
def test_without_a_depth_limit_it_is_the_tree_from_a_budget(num_nodes):
    ranks = (0.61, 0.17, 0.07, 0.023)
    costs = Costs(verify=((1, 1.0), (num_nodes, 1.001), (num_nodes + 1, 99.0)))
    best = optimal_topology(np.tile(ranks, (num_nodes, 1)), costs, 128, num_nodes)
    assert best == Topology.from_budget(num_nodes, ranks)


def test_limits_hold_and_a_tree_that_cannot_pay_is_a_lone_root():
    assert optimal_topology(ACCEPTANCE, GPU, 30, 3).max_depth == 3
    assert optimal_topology(ACCEPTANCE, GPU, 30, 3).num_nodes in (24, 30)
    assert optimal_topology(ACCEPTANCE, GPU, 30, 5, chain=True) == Topology.chain(5)
    assert optimal_topology(ACCEPTANCE[:2], GPU, 30, 5).max_depth == 2
    assert optimal_topology(ACCEPTANCE, CPU_PRIOR, 30, 3).num_nodes == 1
    assert optimal_topology(np.zeros((3, 2)), GPU, 30, 3).num_nodes == 1
    # by the verify time alone, half a token more would not be faster
    dear = Costs(verify=((1, 1.0), (2, 1.8)), other=2.0)
    assert optimal_topology([[0.5]], dear, 2, 1).num_nodes == 2
    # parents before children, even if all are equally likely
    assert optimal_topology(np.ones((4, 1)), GPU, 5, 4) == Topology.chain(4)


def test_the_search_loops_over_levels_and_over_the_nodes_of_one_tree():
    """It must not loop over candidates, of which there are thousands, because it runs in the middle of a text."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        optimal_topology(ACCEPTANCE, GPU, 64, 10)
    finally:
        sys.setprofile(None)
    assert 100 < len(calls) < 1500


def test_bad_arguments_of_the_search_are_refused():
    for acceptance, limits in itertools.product(([0.5], [[0.6, 0.6]], [[float("nan")]], []), [(4, 2)]):
        with pytest.raises(ValueError, match=r"^optimal_topology: acceptance must be \[D, K\] probabilities"):
            optimal_topology(acceptance, GPU, *limits)
    with pytest.raises(ValueError, match="^optimal_topology: costs must be Costs, got OnlineCosts"):
        optimal_topology([[0.5]], OnlineCosts(), 4, 2)
    with pytest.raises(ValueError, match="^optimal_topology: max_nodes must be a whole number of at least 1, got 0"):
        optimal_topology([[0.5]], GPU, 0, 2)
    with pytest.raises(ValueError, match="^expected_tokens: topology must be Topology, got list"):
        expected_tokens([-1], [[0.5]])
    with pytest.raises(ValueError, match="^expected_tokens: acceptance must be"):
        expected_tokens(Topology.chain(1), [0.5])
