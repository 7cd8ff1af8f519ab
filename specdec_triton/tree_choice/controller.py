"""The controller behind `tree="auto"`: which tree to draft next, from what earlier rounds accepted and took."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..tree import Topology
from .costs import Costs, OnlineCosts
from .search import Search, check_acceptance, check_limits, check_type, expected_tokens

PLAIN_ROUNDS = 3  # that come first where costs are learned: all other rounds are measured against them
MARGIN = 1.05  # expected gain over plain decoding below which a tree is a trial
STAY = 0.98  # share of the best tree's tokens a second at which the last tree stays
# Losses are counted in plain rounds.
ALLOWANCE = 2.0  # what may be lost before anything was gained
ALLOWANCE_RATE = 0.01  # earned with every token
ALLOWANCE_MOST = 4.0  # gains and waiting buy no longer series of losses than this

DECAY = 0.97  # of what was seen at a depth, a round that sees it again
PRIOR_WEIGHT = 4.0  # tries that the expectation for a depth counts as
CAUTION = 0.95  # what a depth is expected to accept, of the depth above it
RESTED = 4.0  # tries that remain of what was seen, when no tree was verified for long
RESTING = 0.9  # what remains of more than that after one more such round
DISTRUST = 0.5  # what remains of what was seen, when a tree that should pay has used up the allowance

_ROOT = Topology((-1,), (0,))


class AdaptiveTree:
    """Chooses the tree of each round of one `generate` call, from what earlier rounds accepted and took.

    The tree of most expected tokens a second is verified where it is expected to beat plain decoding by `MARGIN`.
    Unless what was seen supports it without the prior, and in trials of trees that are not expected to pay, no more is
    risked than the allowance: `ALLOWANCE` plain rounds, and `ALLOWANCE_RATE` a token, less the losses since. A trial
    starts with 2 nodes and doubles with each success. So a drafter without hope costs a bounded share of the time,
    and is asked again as often as the allowance lets it.

    `choose` and `record` alternate; the record of a round may come after the next choice. Nothing is random.

    Args:
        costs: what a round takes: given, or learned from the seconds told to `record`.
        max_nodes: N, root included, at most.
        max_depth: depth at most.
        chain: the trees must be chains.
        max_rank: candidates that the drafter has for a node: ranks are below it.
        start: expected acceptance before the first round, by rank ([K], the same at every depth) or by depth and rank
            ([D, K], its last row holding below).
        every: rounds between two plans, at least.

    Raises:
        ValueError: an argument is not as above.
    """

    def __init__(
        self,
        costs: Costs | OnlineCosts,
        max_nodes: int,
        max_depth: int,
        chain: bool,
        max_rank: int,
        start: np.ndarray | Sequence[float] | Sequence[Sequence[float]],
        every: int = 4,
    ):
        check_type("AdaptiveTree", "costs", costs, Costs, OnlineCosts)
        check_limits("AdaptiveTree", max_nodes, max_depth)
        for name, number in (("max_rank", max_rank), ("every", every)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"AdaptiveTree: {name} must be a whole number of at least 1, got {number!r}")
        start = check_acceptance("AdaptiveTree", start, name="start", dims=(1, 2))
        self.costs, self.max_nodes, self.max_depth, self.every = costs, max_nodes, max_depth, every
        self._ranks = 1 if chain else max_rank
        self._seen = _Seen(np.atleast_2d(start), max_depth, self._ranks)
        self._allowance = ALLOWANCE
        self._risked: deque[float] = deque()  # by rounds chosen and not yet recorded
        self._trial_nodes = 2
        self._trees: Counter[tuple[int, int]] = Counter()
        self._tree = _ROOT
        self._plain_rounds = 0
        if isinstance(costs, OnlineCosts):
            self._plain_rounds = max(PLAIN_ROUNDS - costs.rounds(1), 0)
        self._plan()

    def choose(self) -> Topology:
        """The tree of the next round; of one node for plain decoding."""
        if self._rounds >= self.every and self._news:
            self._plan()
        spare = self._allowance - sum(self._risked)
        tree = self._tree
        if self._plain_rounds:
            self._plain_rounds -= 1
            tree = _ROOT
        elif self._speedup < MARGIN or not self._proven:
            tree = self._trial(spare)
        self._risked.append(self._risk(tree))
        self._trees[tree.num_nodes, tree.max_depth] += 1
        return tree

    def record(
        self,
        topology: Topology,
        accepted: Sequence[Sequence[int]],
        drafted: Sequence[bool],
        seconds: dict[str, float] | None = None,
        built: bool = False,
    ) -> None:
        """Learn from a finished round, the oldest that was chosen and not recorded.

        Args:
            topology: the tree that was verified, which may be smaller than the chosen one.
            accepted: for each row that was unfinished, its accepted nodes from shallow to deep.
            drafted: for each of these rows, whether it had a draft.
            seconds: the round's time in "verify" and "draft", where the host's clock tells. Used by `OnlineCosts`.

        Raises:
            ValueError: the tree is larger than asked for, the rows of `accepted` and `drafted` differ in number, or a
                path does not lead down the tree.
        """
        check_type("AdaptiveTree.record", "topology", topology, Topology)
        if topology.max_depth > self.max_depth or max(topology.ranks) >= self._ranks:
            raise ValueError(
                f"AdaptiveTree.record: topology must be at most {self.max_depth} deep with ranks below {self._ranks}, "
                f"got {topology.max_depth} and {max(topology.ranks)}"
            )
        if len(accepted) != len(drafted):
            raise ValueError(
                f"AdaptiveTree.record: accepted and drafted must be of one length, got {len(accepted)} and "
                f"{len(drafted)}"
            )
        for path in accepted:
            if any(
                not 0 < node < topology.num_nodes or topology.parents[node] != before
                for before, node in zip((0, *path), path, strict=False)
            ):
                raise ValueError(
                    f"AdaptiveTree.record: accepted must be paths from the root of a tree of {topology.num_nodes} "
                    f"nodes, got {list(path)}"
                )
        if self._risked:
            self._risked.popleft()
        self._rounds += 1
        if not accepted:
            return
        # a tree without a draft in any row is never built
        tree = topology if built or any(drafted) else _ROOT
        if isinstance(self.costs, OnlineCosts) and seconds and tree == topology:
            self.costs.record(tree.num_nodes, tree.max_depth, seconds.get("verify"), seconds.get("draft"))
            self._news = True
        tokens = 1 + sum(map(len, accepted)) / len(accepted)
        loss = 1 + self._risk(tree) - tokens
        self._allowance = min(self._allowance + ALLOWANCE_RATE * tokens - loss, ALLOWANCE_MOST)
        if tree.num_nodes == 1:
            self._seen.rest()
            return
        self._news = True
        self._seen.add(tree, accepted, drafted)
        self._trial_nodes = min(2 * tree.num_nodes, self.max_nodes) if loss < 0 else 2
        if self._allowance < 0:
            self._allowance = 0.0
            self._seen.forget()

    @property
    def summary(self) -> dict:
        """For the stats: `trees`, the shapes chosen, each with its nodes, depth and rounds; `acceptance`, by depth, of
        some child of an accepted node, as estimated; `speedup`, expected of the last plan over plain decoding."""
        return {
            "trees": [
                {"nodes": nodes, "depth": depth, "rounds": rounds} for (nodes, depth), rounds in self._trees.items()
            ],
            "acceptance": self._seen.means().sum(1).tolist(),
            "speedup": self._speedup,
        }

    def _plan(self) -> None:
        self._now = self.costs.costs if isinstance(self.costs, OnlineCosts) else self.costs
        self._plain = self._now.round_seconds(1, 0)
        acceptance = self._seen.means(share=True)
        self._search = Search(acceptance, self.max_nodes, self.max_depth)
        best = self._search.best(self._now, self._search.sizes)
        if self._gain(self._tree, acceptance) < STAY * self._gain(best, acceptance):
            self._tree = best
        self._speedup = self._gain(self._tree, acceptance)
        self._proven = self._gain(self._tree, self._seen.means(share=True, hoped=False)) >= 1
        self._rounds, self._news = 0, False

    def _gain(self, tree: Topology, acceptance: np.ndarray) -> float:
        """Expected tokens a second, of plain decoding's."""
        return expected_tokens(tree, acceptance) / (1 + self._risk(tree))

    def _risk(self, tree: Topology) -> float:
        """Plain rounds lost where nothing is accepted."""
        return self._now.round_seconds(tree.num_nodes, tree.max_depth) / self._plain - 1

    def _trial(self, spare: float) -> Topology:
        """The largest tree that has earned a trial and risks no more than is spare."""
        for size in reversed(self._search.sizes):
            if 1 < size <= self._trial_nodes:
                tree = self._search.best(self._now, (size,))
                if self._risk(tree) <= spare:
                    return tree
        return _ROOT


class _Seen:
    """Acceptance by depth and rank, estimated from rounds, older ones counting less.

    A depth's estimate starts from that of the depth above, the first from `start`: little is lost where deep nodes
    are rarely reached.

    Args:
        start: [D, K] expected acceptance; the last row holds below.
        max_depth, ranks: shape of the estimate.
    """

    def __init__(self, start: np.ndarray, max_depth: int, ranks: int):
        self._start = np.zeros((max_depth, ranks))
        rows = np.minimum(np.arange(max_depth), len(start) - 1)
        self._start[:, : start.shape[1]] = start[rows, :ranks]
        self._tried, self._taken = np.zeros((2, max_depth, ranks))
        self._rows, self._drafted = 0.0, 0.0

    def add(self, topology: Topology, accepted: Sequence[Sequence[int]], drafted: Sequence[bool]) -> None:
        """Count a round's rows that had a draft."""
        paths = [path for path, has_draft in zip(accepted, drafted, strict=True) if has_draft]
        visits = np.bincount(
            np.array([node for path in paths for node in path], dtype=int), minlength=topology.num_nodes
        )
        visits[0] = len(paths)
        parents, place = _places(topology)
        tried, taken = np.zeros((2, *self._tried.shape))
        np.add.at(tried, place, visits[parents])
        np.add.at(taken, place, visits[1:])
        keep = np.where(tried.any(1), DECAY, 1.0)[:, None]
        self._tried = keep * self._tried + tried
        self._taken = keep * self._taken + taken
        self._rows = DECAY * self._rows + len(drafted)
        self._drafted = DECAY * self._drafted + len(paths)

    def rest(self) -> None:
        """After a round without a tree: old evidence counts less, and soon no more than a few tries."""
        tried = self._tried.max(1, initial=RESTED)
        keep = np.maximum(RESTING, RESTED / tried)[:, None]
        self._tried *= keep
        self._taken *= keep

    def forget(self) -> None:
        """What was seen has misled."""
        self._tried *= DISTRUST
        self._taken *= DISTRUST

    def means(self, share: bool = False, hoped: bool = True) -> np.ndarray:
        """Estimated acceptance [D, K].

        Args:
            share: of all rows, those without a draft accepting nothing.
            hoped: start from the prior; else from none accepted, so that only what was seen counts.
        """
        means, above = [], None
        # lists: of so few numbers, faster than arrays
        for start, tried, taken in zip(self._start.tolist(), self._tried.tolist(), self._taken.tolist(), strict=True):
            expected = [prob * hoped for prob in start]
            if above is not None:
                # the prior's course from one depth to the next, from where the depth above has been found to be
                expected = [
                    CAUTION * mean * prob / before if before else 0.0
                    for mean, prob, before in zip(means[-1], start, above, strict=True)
                ]
                expected = _at_most_1(expected)
            above = start
            first = (taken[0] + PRIOR_WEIGHT * expected[0]) / (tried[0] + PRIOR_WEIGHT)
            # other candidates share what a better first one leaves; a worse one says that they may be no better
            fall = first / expected[0] if expected[0] else 1.0
            room = (1 - first) / (1 - expected[0]) if expected[0] < 1 else 1.0
            scale = PRIOR_WEIGHT * min(room, math.sqrt(fall * room))
            others = [
                (hits + scale * prob) / (tries + PRIOR_WEIGHT)
                for tries, hits, prob in zip(tried[1:], taken[1:], expected[1:], strict=True)
            ]
            means.append(_at_most_1([first, *others]))
        means = np.array(means).reshape(self._start.shape)
        if share and self._rows and len(means):
            means[0] *= self._drafted / self._rows
        return means


def _at_most_1(probs: list[float]) -> list[float]:
    total = sum(probs)
    return probs if total <= 1 else [prob / total for prob in probs]


@lru_cache(maxsize=256)
def _places(topology: Topology) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Of each node below the root: its parent, and its place (depth - 1, rank) in a table of acceptance."""
    return np.array(topology.parents[1:]), (np.array(topology.depths[1:]) - 1, np.array(topology.ranks[1:]))
