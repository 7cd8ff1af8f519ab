"""Decides whether drafts copied from texts pay: the expected number of accepted tokens, and the time of a forward.

On a GPU, a forward over more rows takes hardly longer. On a CPU it does, and the times of the call's own rounds decide.

Letters: B sequences, C classes of matches.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..tree import DraftTree
from ..tree_choice.costs import Costs, OnlineCosts
from .base import DraftContext

# The number of nodes is padded to a multiple of this. On CPUs a matrix product over 2, 3 or 11 rows takes longer than
# one over 4 or 12, and fewer widths mean fewer compiled graphs.
NODE_BUCKET = 4
# The classes are matches of at least so many tokens, and the first estimates of `Chances` for them. The estimates
# follow counts in greedy texts of SmolLM2-135M-Instruct (64 prompts, 7,668 tokens), and are lower for short matches: a
# wrong draft at the beginning of a short text is not earned back. LEARNING is the weight of the latest token in an
# estimate. A draft must be expected to emit MARGIN times as many tokens per second as a plain step. All were chosen by
# replaying these texts with the times of `CPU_TIMES`; the results hardly depend on LEARNING and MARGIN.
MATCH_CLASSES = np.array([1, 2, 3, 4, 6, 10, 16, 32])
FIRST_CHANCES = (0.25, 0.45, 0.6, 0.7, 0.82, 0.88, 0.92, 0.97)
LEARNING, MARGIN = 0.1, 1.1
LEAST_CHANCE = 0.01  # of an estimate, so that it can rise again
# Time of a forward by its rows, until it is measured. From SmolLM2-135M in fp32 on 1 and 2 cores of an x86_64: 4 rows
# took 1.7 to 2.2 times as long as one row, 12 rows 2.2 to 2.3 times.
CPU_TIMES = Costs(verify=((1, 1.0), (4, 2.0), (12, 2.25)))
# If nothing is drafted, the times are estimated anew after this many rounds. An estimate takes as long as a lookup.
REFRESH = 8
# model -> (batch, capacity, ...) -> the latest times; a call continues with those of earlier calls
_known_times: WeakKeyDictionary = WeakKeyDictionary()


class Proposal(NamedTuple):
    """A draft for one sequence. Every prefix of it is a tree.

    Attributes:
        tokens: the last emitted token, and the draft tokens.
        parents: the number of each token's parent; -1 for the first.
        chances: estimated probability that each token is accepted; 1 for the first. They do not increase along a path.
        matched: number of tokens, up to the last emitted one, that also precede the copied tokens; 0 for no draft.
    """

    tokens: list[int]
    parents: list[int]
    chances: list[float]
    matched: int

    @classmethod
    def nothing(cls, root: int) -> "Proposal":
        """No draft after the token `root`."""
        return cls([root], [-1], [1.0], 0)

    @property
    def expected(self) -> float:
        """Expected number of accepted tokens."""
        return sum(self.chances) - 1

    def first(self, nodes: int) -> "Proposal":
        """The first nodes, the last emitted token included."""
        return Proposal(self.tokens[:nodes], self.parents[:nodes], self.chances[:nodes], self.matched)


def padded_width(nodes: int) -> int:
    """`nodes` rounded up to a multiple of `NODE_BUCKET`; a tree of the root alone is not padded."""
    return nodes if nodes == 1 else -(-nodes // NODE_BUCKET) * NODE_BUCKET


def width_of(nodes: int, few_shapes: bool = False) -> int:
    """`padded_width`, or a power of two of at least `NODE_BUCKET` for few shapes."""
    return max(1 << (nodes - 1).bit_length(), NODE_BUCKET) if few_shapes and nodes > 1 else padded_width(nodes)


def tree_of(
    proposals: Sequence[Proposal],
    max_depth: int,
    device: torch.device,
    chains: bool | None = None,
    few_shapes: bool = False,
) -> DraftTree:
    """The tree with a proposal for each sequence.

    Args:
        proposals: the proposals.
        max_depth: a bound on their depth.
        device: where the tree is made.
        chains: True if the proposals are chains; None to see.
        few_shapes: pad to a power of two, and let the bound on the depth depend on the number of nodes only.
    """
    rows = [(proposal.tokens, proposal.parents) for proposal in proposals]
    widest = max(len(tokens) for tokens, _ in rows)
    width = width_of(widest, few_shapes)
    if few_shapes:
        widest = width
    if chains is None:
        chains = all(parents == list(range(-1, len(parents) - 1)) for _, parents in rows)
    tokens = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows], device=device)
    parents = torch.tensor([parents + [-1] * (width - len(parents)) for _, parents in rows], dtype=torch.int32)
    return DraftTree.from_parents(tokens, parents.to(device), min(max_depth, widest - 1), is_chain=chains)


class Chances:
    """The chance that a copied token is right, by the number of tokens that are known to agree before it. Each row of a
    call learns its own.

    Args:
        batch: number of rows.
        first: the first estimate for each class of matches.

    Attributes:
        now: [B, C]. The estimates.
    """

    def __init__(self, batch: int, first: Sequence[float] = FIRST_CHANCES):
        self.now = np.tile(first, (batch, 1))

    def of(self, row: int, matched: int) -> float:
        """The chance of a token after `matched` >= 1 tokens that agree."""
        return float(self.now[row, class_of(matched)])

    def applied(self, row: int, proposal: Proposal) -> Proposal:
        """The proposal with chances by these estimates. Siblings are equally likely."""
        chances, depths, parents = [1.0], [0], proposal.parents
        for parent in parents[1:]:
            chance = self.of(row, proposal.matched + depths[parent]) / parents.count(parent)
            chances.append(chances[parent] * chance)
            depths.append(depths[parent] + 1)
        return proposal._replace(chances=chances)

    def learn(self, row: int, proposal: Proposal, emitted: Sequence[int]) -> None:
        """Compare a proposal with the tokens that were emitted instead. It need not have been drafted."""
        children: dict[int, dict[int, int]] = {}
        for child, (token, parent) in enumerate(zip(proposal.tokens, proposal.parents, strict=True)):
            children.setdefault(parent, {})[token] = child
        node = 0
        for depth, token in enumerate(emitted):
            if node not in children:  # the proposal ends here
                return
            predicted = sum(proposal.chances[child] for child in children[node].values()) / proposal.chances[node]
            place = row, class_of(proposal.matched + depth)
            moved = self.now[place] + LEARNING * ((token in children[node]) - predicted)
            self.now[place] = min(max(moved, LEAST_CHANCE), 1.0)
            if token not in children[node]:
                return
            node = children[node][token]


def class_of(matched: int) -> int:
    """Index in `MATCH_CLASSES` of a match of `matched` >= 1 tokens."""
    return int(np.searchsorted(MATCH_CLASSES, matched, side="right")) - 1


def may_use_times(context: DraftContext) -> bool:
    """True if drafts may depend on measured times: the rule gives the same text for any draft, and host times are those
    of the forwards."""
    return context.rule in ("greedy", "coupled") and context.start.device.type == "cpu" and context.target is not None


class RoundTimes:
    """The times of a call's verify forwards. They are learned from the rounds themselves, which costs no forward.

    Attributes:
        costs: the times. They may be set to a `Costs`; nothing is then measured.
    """

    def __init__(self, context: DraftContext):
        target = context.target
        self._known = _known_times.setdefault(target.model, {})
        # times grow with the text
        capacity = 0 if target.cache is None else target.cache.capacity.bit_length()
        dtype = target.cache and target.cache.storage.dtype
        self._call = len(context.start), capacity, dtype, context.impl, context.compiled, context.fused
        self.costs: Costs | OnlineCosts = OnlineCosts(self._known.get(self._call, CPU_TIMES))
        self._drafted: tuple[int, float] | None = None
        self._estimated, self._age = CPU_TIMES, REFRESH  # the last estimate, and the number of rounds since

    def drafted(self, nodes: int) -> None:
        """Call it when a tree of this number of nodes has been drafted, just before its verification."""
        self._drafted = nodes, time.perf_counter()

    def verified(self) -> None:
        """Call it after the verification."""
        if self._drafted and isinstance(self.costs, OnlineCosts):
            nodes, begin = self._drafted
            self.costs.record(nodes, 0, max(time.perf_counter() - begin, 1e-9))
            self._age += 1 if nodes == 1 else REFRESH
        self._drafted = None

    @property
    def _times(self) -> Costs:
        if isinstance(self.costs, Costs):
            return self.costs
        if self._age >= REFRESH:
            self._estimated, self._age = self.costs.costs, 0
            self._known[self._call] = self._estimated
        return self._estimated

    def best(self, proposals: Sequence[Proposal], live: Sequence[bool]) -> int:
        """The number of nodes, the root included, to which every proposal should be cut.

        Args:
            proposals: one for each row.
            live: True for the rows that are not finished. They all wait for the forward.
        """
        widest = max(len(proposal.tokens) for proposal in proposals)
        if widest == 1 or not any(live):
            return 1
        # tokens that the batch emits, by the number of nodes of each row
        emitted = np.zeros(widest)
        for proposal, is_live in zip(proposals, live, strict=True):
            if is_live:
                chances = np.cumsum(proposal.chances)
                emitted[: len(chances)] += chances
                emitted[len(chances) :] += chances[-1]
        rates = emitted / _seconds(self._times, widest)
        best = int(rates.argmax())
        return 1 + best if rates[best] >= MARGIN * rates[0] else 1


@lru_cache(maxsize=64)
def _seconds(times: Costs, widest: int) -> np.ndarray:
    """[widest]. The seconds of a forward over 1, 2, ... nodes, with their padding."""
    return np.array([times.round_seconds(padded_width(nodes), 0) for nodes in range(1, widest + 1)])
