"""The controller behind `tree="auto"`. It chooses the next tree by the acceptance and the times of earlier rounds."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..tree import Topology
from .costs import Costs, OnlineCosts
from .search import Search, check_acceptance, check_limits, check_type, expected_tokens

PLAIN_ROUNDS = 3  # number of plain rounds at the start if costs are learned; they give the baseline
MARGIN = 1.05  # a tree whose expected speedup over plain decoding is below this is only tried as a trial
STAY = 0.98  # the current tree is kept while its expected tokens per second are at least this share of the best tree's
# The allowance bounds the time that may be lost compared with plain decoding. Its unit is the time of a plain round.
ALLOWANCE = 2.0  # allowance at the start of a call
ALLOWANCE_RATE = 0.01  # added to the allowance for each emitted token
ALLOWANCE_MOST = 4.0  # cap on the allowance: however much was gained, at most this much may be lost in a row

DECAY = 0.97  # the counts of a depth are multiplied by this each time the depth is observed again
PRIOR_WEIGHT = 4.0  # number of tries that the prior expectation for a depth counts as
CAUTION = 0.95  # the expected acceptance at a depth is multiplied by this, relative to the depth above
RESTED = 4.0  # rounds without a tree reduce the counts of a depth, but not below this number of tries
RESTING = 0.9  # factor by which each round without a tree multiplies the counts
DISTRUST = 0.5  # factor by which all counts are multiplied if the allowance is used up

_ROOT = Topology((-1,), (0,))


class AdaptiveTree:
    """Chooses the tree of each round of one `generate` call, by the acceptance and the times of earlier rounds.

    The candidate is the tree with the most expected tokens per second. It is used if its expected speedup over plain
    decoding is at least `MARGIN` and the observations alone, without the prior, support it. Otherwise the controller
    runs a trial: a tree whose possible loss is within the allowance, or a plain round if there is no such tree. The
    allowance starts at `ALLOWANCE` plain rounds, grows by `ALLOWANCE_RATE` for each token, and changes by the gains and
    losses of the rounds. Trials start with 2 nodes and double with each success. A drafter whose tokens are never
    accepted therefore costs only a bounded share of the time, and is tried again when the allowance permits.

    `choose` and `record` alternate. With late reports, a round may be recorded after the next one was chosen. The
    controller uses no random numbers.

    Args:
        costs: the costs of rounds, either given or learned from the seconds passed to `record`.
        max_nodes: largest number of nodes, root included.
        max_depth: largest depth.
        chain: True if all trees must be chains.
        max_rank: number of candidates that the drafter has for each node. Ranks are below it.
        start: expected acceptance before the first round. Either by rank, [K], the same at every depth; or by depth
            and rank, [D, K], with the last row used for deeper levels.
        every: smallest number of rounds between two searches for the best tree.

    Raises:
        ValueError: an argument has another type or is out of range.
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
        self._risked: deque[float] = deque()  # possible loss of each round that is chosen but not recorded yet
        self._trial_nodes = 2
        self._trees: Counter[tuple[int, int]] = Counter()
        self._tree = _ROOT
        self._plain_rounds = 0
        if isinstance(costs, OnlineCosts):
            self._plain_rounds = max(PLAIN_ROUNDS - costs.rounds(1), 0)
        self._plan()

    def choose(self) -> Topology:
        """The tree of the next round. A tree of one node means plain decoding."""
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
        """Record the result of the oldest round that was chosen but not recorded.

        Args:
            topology: the tree that was verified. It may be smaller than the chosen one.
            accepted: for each unfinished row, its accepted nodes from shallow to deep.
            drafted: for each unfinished row, True if it had draft tokens.
            seconds: host time of "verify" and "draft" in the round, for `OnlineCosts`; None if it is not known.
            built: True if the tree is verified even if no row has draft tokens, as in rounds of fixed shape.

        Raises:
            ValueError: the tree is deeper or has higher ranks than allowed, `accepted` and `drafted` have different
                lengths, or a path does not lead down the tree.
        """
        check_type("AdaptiveTree.record", "topology", topology, Topology)
        if topology.max_depth > self.max_depth or max(topology.ranks) >= self._ranks:
            raise ValueError(
                f"AdaptiveTree.record: topology must be at most {self.max_depth} deep with ranks below {self._ranks}, "
                f"got {topology.max_depth} and {max(topology.ranks)}"
            )
        if len(accepted) != len(drafted):
            raise ValueError(
                f"AdaptiveTree.record: accepted and drafted must have the same length, got {len(accepted)} and "
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
        # if no row has draft tokens, only the root was verified
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
        """The choices so far, for `Stats.auto`.

        Returns:
            A dict. "trees": the nodes, depth and number of rounds of each shape that was chosen. "acceptance": for each
            depth the estimated probability that some child of an accepted node is accepted. "speedup": the expected
            speedup of the current tree over plain decoding.
        """
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
        """Expected speedup over plain decoding in tokens per second."""
        return expected_tokens(tree, acceptance) / (1 + self._risk(tree))

    def _risk(self, tree: Topology) -> float:
        """Loss if no draft token is accepted, in plain rounds."""
        return self._now.round_seconds(tree.num_nodes, tree.max_depth) / self._plain - 1

    def _trial(self, spare: float) -> Topology:
        """The largest tree of at most `_trial_nodes` nodes whose possible loss is at most `spare`."""
        for size in reversed(self._search.sizes):
            if 1 < size <= self._trial_nodes:
                tree = self._search.best(self._now, (size,))
                if self._risk(tree) <= spare:
                    return tree
        return _ROOT


class _Seen:
    """Estimates acceptance by depth and rank from the observed rounds. Older rounds count less.

    The prior expectation of a depth follows from the estimate for the depth above; that of the first depth is `start`.
    Depths that are rarely reached therefore have sensible estimates, too.

    Args:
        start: [D, K] expected acceptance; the last row is used for deeper levels.
        max_depth, ranks: shape of the estimate.
    """

    def __init__(self, start: np.ndarray, max_depth: int, ranks: int):
        self._start = np.zeros((max_depth, ranks))
        rows = np.minimum(np.arange(max_depth), len(start) - 1)
        self._start[:, : start.shape[1]] = start[rows, :ranks]
        self._tried, self._taken = np.zeros((2, max_depth, ranks))
        self._rows, self._drafted = 0.0, 0.0

    def add(self, topology: Topology, accepted: Sequence[Sequence[int]], drafted: Sequence[bool]) -> None:
        """Count the accepted and rejected nodes of a round, in rows that had draft tokens."""
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
        """Reduce the counts after a round without a tree, but not below `RESTED` tries."""
        tried = self._tried.max(1, initial=RESTED)
        keep = np.maximum(RESTING, RESTED / tried)[:, None]
        self._tried *= keep
        self._taken *= keep

    def forget(self) -> None:
        """Reduce all counts, because the observations were misleading."""
        self._tried *= DISTRUST
        self._taken *= DISTRUST

    def means(self, share: bool = False, hoped: bool = True) -> np.ndarray:
        """Estimated acceptance [D, K].

        Args:
            share: count rows without draft tokens as rows that accept nothing.
            hoped: use the prior. False replaces it by an expectation of 0, so that only observations count.
        """
        means, above = [], None
        # lists are faster than arrays for so few numbers
        for start, tried, taken in zip(self._start.tolist(), self._tried.tolist(), self._taken.tolist(), strict=True):
            expected = [prob * hoped for prob in start]
            if above is not None:
                # the estimate of the depth above, times the ratio of the two depths in the prior
                expected = [
                    CAUTION * mean * prob / before if before else 0.0
                    for mean, prob, before in zip(means[-1], start, above, strict=True)
                ]
                expected = _at_most_1(expected)
            above = start
            first = (taken[0] + PRIOR_WEIGHT * expected[0]) / (tried[0] + PRIOR_WEIGHT)
            # The other candidates share the probability that the first one leaves. If the first one is accepted less
            # often than expected, they are expected to be worse, too.
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
    """For each node below the root: its parent, and its index (depth - 1, rank) in a table of acceptance."""
    return np.array(topology.parents[1:]), (np.array(topology.depths[1:]) - 1, np.array(topology.ranks[1:]))
