"""Finds the topology with the most expected tokens per second, given acceptance probabilities and costs.

Acceptance is a table [D, K]. Entry [d, k] is the probability that the child of rank k of a node at depth d is accepted
if the node itself is accepted. At most one of several siblings is accepted, so each row sums to at most 1. The expected
number of tokens of a tree is 1 plus, for every node below the root, the product of the acceptances along its path.

Source: Sequoia (Chen et al. 2024, arXiv 2402.12374), which maximises the same sum by dynamic programming. Here nodes
are ranked by the probability of their path. This gives the same optimum: a child is never more likely than its parent,
so the most likely nodes always form a tree.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..tree import Topology
from .costs import Costs

# The numbers of nodes that are considered. Few sizes mean few shapes and few compiled graphs.
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def expected_tokens(topology: Topology, acceptance: np.ndarray | Sequence[Sequence[float]]) -> float:
    """Expected number of tokens that a round with this tree emits; 1.0 for a tree of one node.

    Args:
        topology: the tree.
        acceptance: [D, K] acceptance probabilities by depth and rank. Entry [d, k] is the probability that the child of
            rank k of a node at depth d is accepted if that node is accepted. Deeper nodes and higher ranks have
            probability 0.

    Raises:
        ValueError: an argument has another type, shape or range.
    """
    acceptance = check_acceptance("expected_tokens", acceptance)
    check_type("expected_tokens", "topology", topology, Topology)
    depth, ranks = acceptance.shape
    mass = [1.0]
    for node in range(1, topology.num_nodes):
        parent, rank, level = topology.parents[node], topology.ranks[node], topology.depths[node] - 1
        mass.append(mass[parent] * float(acceptance[level, rank]) if level < depth and rank < ranks else 0.0)
    return sum(mass)


def optimal_topology(
    acceptance: np.ndarray | Sequence[Sequence[float]],
    costs: Costs,
    max_nodes: int,
    max_depth: int,
    chain: bool = False,
) -> Topology:
    """The tree with the most expected tokens per second. It is the root alone if no tree is faster than plain decoding.

    Args:
        acceptance: [D, K] acceptance probabilities by depth and rank, see `expected_tokens`.
        costs: costs of a round.
        max_nodes: largest number of nodes, root included. Only the sizes in `LADDER` and the largest possible size are
            considered.
        max_depth: largest depth; D if D is smaller.
        chain: True if the tree must be a chain. Only candidates of rank 0 are then used.

    Raises:
        ValueError: an argument has another type, shape or range.
    """
    acceptance = check_acceptance("optimal_topology", acceptance)
    check_limits("optimal_topology", max_nodes, max_depth)
    check_type("optimal_topology", "costs", costs, Costs)
    search = Search(acceptance[:, :1] if chain else acceptance, max_nodes, max_depth)
    return search.best(costs, search.sizes)


class Search:
    """The most likely nodes for every depth limit and every number of nodes.

    Args:
        acceptance: [D, K] acceptance probabilities.
        max_nodes, max_depth: largest number of nodes and largest depth.

    Attributes:
        sizes: the numbers of nodes that are considered.
    """

    def __init__(self, acceptance: np.ndarray, max_nodes: int, max_depth: int):
        depth = min(max_depth, len(acceptance), max_nodes - 1)
        ranks = acceptance.shape[1]
        self._parents, self._ranks = [np.array([-1])], [np.array([0])]
        # for each depth limit: the most likely nodes in order, and the expected tokens of the first n of them (0 if
        # there are fewer than n nodes)
        self._nodes, self._tokens = [np.array([0])], np.zeros((max_nodes, depth + 1))
        self._tokens[0] = 1.0
        level, mass, first = np.array([0]), np.array([1.0]), 0  # nodes of the last level, most likely first
        nodes, likeliest = level, mass
        for limit, by_rank in enumerate(acceptance[:depth], start=1):
            children = (mass[:, None] * by_rank).ravel()
            order = np.argsort(-children, kind="stable")[: max_nodes - 1]
            self._parents.append(level[order // ranks])
            self._ranks.append(order % ranks)
            first += len(level)
            level, mass = first + np.arange(len(order)), children[order]
            nodes, likeliest = np.concatenate([nodes, level]), np.concatenate([likeliest, mass])
            # a stable sort keeps a parent before a child of equal probability
            order = np.argsort(-likeliest, kind="stable")[:max_nodes]
            nodes, likeliest = nodes[order], likeliest[order]
            self._nodes.append(nodes)
            self._tokens[: len(nodes), limit] = np.cumsum(likeliest)
        self._parents, self._ranks = np.concatenate(self._parents), np.concatenate(self._ranks)
        most = len(nodes)
        self.sizes = tuple(size for size in LADDER if size < most) + (most,)

    def best(self, costs: Costs, sizes: Sequence[int]) -> Topology:
        """The tree with the most expected tokens per second among those of `sizes` nodes. Among equal ones, the
        smallest and then the shallowest is returned."""
        verify = np.array([costs.verify_seconds(size) for size in sizes])
        draft = np.array([costs.draft_seconds(depth) + costs.other for depth in range(len(self._nodes))])
        rate = self._tokens[np.array(sizes) - 1] / (verify[:, None] + draft)
        place, depth = divmod(int(rate.argmax()), len(draft))
        return self._topology(sizes[place], depth)

    def _topology(self, size: int, depth: int) -> Topology:
        paths = {-1: ()}
        for node in np.sort(self._nodes[depth][:size]).tolist():
            parent = int(self._parents[node])
            paths[node] = (*paths[parent], int(self._ranks[node])) if node else ()
        return _from_paths(tuple(paths.values()))


@lru_cache(maxsize=256)
def _from_paths(paths: tuple[tuple[int, ...], ...]) -> Topology:
    return Topology.from_paths(paths)


def check_type(owner: str, name: str, value: object, *kinds: type) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{owner}: {name} must be {wanted}, got {type(value).__name__}")


def check_limits(owner: str, max_nodes: int, max_depth: int) -> None:
    for name, number, least in (("max_nodes", max_nodes, 1), ("max_depth", max_depth, 0)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{owner}: {name} must be a whole number of at least {least}, got {number!r}")


def check_acceptance(owner: str, table, name: str = "acceptance", dims: tuple[int, ...] = (2,)) -> np.ndarray:
    """Return `table` as an array. Raise a `ValueError` unless it holds probabilities whose rows sum to at most 1."""
    try:
        array = np.asarray(table, dtype=float)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if (
        array.ndim not in dims
        or not array.shape[-1]
        or not ((array >= 0) & (array <= 1)).all()
        or (array.sum(-1) > 1 + 1e-6).any()
    ):
        shapes = " or ".join({1: "[K]", 2: "[D, K]"}[dim] for dim in dims)
        raise ValueError(f"{owner}: {name} must be {shapes} probabilities with row sums of at most 1, got {table!r}")
    return array
