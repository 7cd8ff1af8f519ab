"""Which tree pays: the topology of most expected tokens a second, under measured acceptance and costs.

Acceptance is a table [D, K]: the probability that the child of rank k of a node at depth d is the accepted one, given
that the node was. Siblings exclude each other, so rows sum to at most 1. A tree emits one token and, for every node
below the root, the product of the acceptances on its path more, in expectation.

Source: Sequoia (Chen et al. 2024, arXiv 2402.12374), which maximises the same sum by a dynamic programme. A child is
never likelier than its parent, so the likeliest nodes are always a tree, and ranking them gives the same optimum.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..tree import Topology
from .costs import Costs

LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # node counts: few shapes, few compiled graphs


def expected_tokens(topology: Topology, acceptance: np.ndarray | Sequence[Sequence[float]]) -> float:
    """Tokens that a round with this tree emits in expectation, 1 without a draft.

    Args:
        topology: the tree.
        acceptance: [D, K], see above; 0 for deeper nodes and higher ranks.

    Raises:
        ValueError: an argument is not as above.
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
    """The tree of most expected tokens a second; a lone root where no tree beats plain decoding.

    Args:
        acceptance: [D, K], see above.
        costs: what a round takes.
        max_nodes: N, root included, at most. Only `LADDER` and the largest N possible are considered.
        max_depth: depth at most; D if that is less.
        chain: no node has two children; the candidates of rank 0 alone count.

    Raises:
        ValueError: an argument is not as above.
    """
    acceptance = check_acceptance("optimal_topology", acceptance)
    check_limits("optimal_topology", max_nodes, max_depth)
    check_type("optimal_topology", "costs", costs, Costs)
    search = Search(acceptance[:, :1] if chain else acceptance, max_nodes, max_depth)
    return search.best(costs, search.sizes)


class Search:
    """The likeliest nodes under a depth limit, for every limit and number of nodes at once.

    Args:
        acceptance: [D, K].
        max_nodes, max_depth: limits.

    Attributes:
        sizes: numbers of nodes considered.
    """

    def __init__(self, acceptance: np.ndarray, max_nodes: int, max_depth: int):
        depth = min(max_depth, len(acceptance), max_nodes - 1)
        ranks = acceptance.shape[1]
        self._parents, self._ranks = [np.array([-1])], [np.array([0])]
        # for each depth limit, the likeliest nodes' numbers; how many tokens the first n of them emit, 0 for too few
        self._nodes, self._tokens = [np.array([0])], np.zeros((max_nodes, depth + 1))
        self._tokens[0] = 1.0
        level, mass, first = np.array([0]), np.array([1.0]), 0  # the last level's nodes, likeliest first
        nodes, likeliest = level, mass
        for limit, by_rank in enumerate(acceptance[:depth], start=1):
            children = (mass[:, None] * by_rank).ravel()
            order = np.argsort(-children, kind="stable")[: max_nodes - 1]
            self._parents.append(level[order // ranks])
            self._ranks.append(order % ranks)
            first += len(level)
            level, mass = first + np.arange(len(order)), children[order]
            nodes, likeliest = np.concatenate([nodes, level]), np.concatenate([likeliest, mass])
            # stable: where a child is as likely as its parent, the parent comes first
            order = np.argsort(-likeliest, kind="stable")[:max_nodes]
            nodes, likeliest = nodes[order], likeliest[order]
            self._nodes.append(nodes)
            self._tokens[: len(nodes), limit] = np.cumsum(likeliest)
        self._parents, self._ranks = np.concatenate(self._parents), np.concatenate(self._ranks)
        most = len(nodes)
        self.sizes = tuple(size for size in LADDER if size < most) + (most,)

    def best(self, costs: Costs, sizes: Sequence[int]) -> Topology:
        """The tree of most tokens a second among those of `sizes` nodes; the smallest and shallowest of equals."""
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
    """`table` as an array, refused unless it holds probabilities of siblings that exclude each other."""
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
        raise ValueError(f"{owner}: {name} must be {shapes} probabilities, of sum 1 at most in a row, got {table!r}")
    return array
