"""Drafts from marginals: one forward predicts the tokens at all next depths, independently of each other.

Medusa's heads, DFlash's blocks and parallel drafts have this form. The probability of a path is the product of those of
its tokens, so the likeliest tree is known without further forwards. A node's draft probabilities depend on its depth
only. They are known before its tokens are drawn, so every acceptance rule may use them.

Letters: B sequences, N tree nodes, D depths, V vocabulary of the draft.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..ops.reference import Acceptance
from ..ops.rules import CHAIN_RULES
from ..tree import DraftTree, DynamicTree, Topology
from .base import DraftContext, Drafter, check_children, check_rule, check_tree, most_nodes_each
from .candidates import ranked
from .dynamic import DynamicSession
from .forwards import DraftForwards, ForwardsSession
from .level_session import LevelSession

NODES, WIDTH = 64, 10  # nodes of the default tree, and tokens of each depth among which a tree of likely nodes chooses
Shape = Topology | DynamicTree | int  # a number is that of the likeliest nodes, root included


class Marginals(ABC):
    """The marginals of one drafter during one call.

    A round runs `follow` on the host, then `logits` or `skip`, and `observe` after verification.

    Attributes:
        max_depth: D, the number of depths that are predicted.
        num_known: number of tokens that it can name; None if these are all of the target's.
    """

    max_depth: int
    num_known: int | None = None

    @property
    @abstractmethod
    def weights(self) -> int:
        """Number of weights that a round reads."""

    @property
    def slots(self) -> int:
        """Number of cache slots that the forward sees; 0 without a cache."""
        return 0

    def follow(self, levels: int) -> None:  # noqa: B027, those without a cache have nothing to prepare
        """Prepare a round of this number of levels on the host. If it is 0, the round runs `skip`, not `logits`."""

    def skip(self) -> None:  # noqa: B027, those without a cache have nothing to do
        """Process the tokens that were accepted last, in a round that drafts nothing."""

    @abstractmethod
    def logits(self, depth: int) -> torch.Tensor:
        """Process the tokens that were accepted last. Returns logits [B, depth, V] of the tokens at depths 1 to
        `depth`; those of tokens that it cannot name are -inf."""

    @abstractmethod
    def observe(self, accepted: Acceptance) -> None:
        """Called after verification, before `context.length` advances."""


def start_session(
    source: Marginals, context: DraftContext, shape: Shape, replacement: bool = False
) -> "LevelSession | MarginalSession":
    """Start the session that drafts a shape from marginals."""
    if isinstance(shape, int):
        return MarginalSession(source, context, shape)
    forwards = MarginalForwards(source, context)
    if isinstance(shape, DynamicTree):
        return DynamicSession(forwards, context, shape)
    return LevelSession(forwards, context, shape, replacement)


def shape_of(tree: Shape | None, default: Shape, rule: str | None, max_depth: int) -> Shape:
    """The shape that `tree` asks for; None gives `default`. Rules that accept only chains get a chain instead of a
    number of nodes, at most `max_depth` tokens long."""
    shape = default if tree is None else tree
    if isinstance(shape, int) and rule in CHAIN_RULES:
        return Topology.chain(min(shape - 1, max_depth))
    return shape


def default_nodes(batch: int) -> int:
    """Number of nodes of the default tree of each of `batch` sequences."""
    return min(NODES, most_nodes_each(batch))


def check_marginal_tree(owner: str, tree: Shape | None, max_depth: int) -> None:
    """Refuse a tree that is deeper than `max_depth` depths, or has more nodes than they have likely ones.

    Raises:
        ValueError: the message begins with `owner`.
    """
    check_tree(owner, tree)
    if isinstance(tree, int) and tree > (most := most_nodes(WIDTH, max_depth)):
        raise ValueError(
            f"{owner}: tree must have at most {most} nodes, those of the {WIDTH} best tokens at each of {max_depth} "
            f"depths, got {tree}"
        )
    if isinstance(tree, (Topology, DynamicTree)) and tree.max_depth > max_depth:
        raise ValueError(
            f"{owner}: tree must be at most {max_depth} deep, the number of depths that one forward predicts, got "
            f"depth {tree.max_depth}"
        )


def check_marginals(
    drafter: Drafter, shape: Shape, rule: str | None, num_known: int, limit: str = "the number of tokens"
) -> None:
    """Refuse a shape that the rule does not accept, or with a node of more children than there are tokens."""
    sampling = "without" if isinstance(shape, Topology) else "none"
    check_rule(drafter, rule, isinstance(shape, Topology) and shape.is_chain, sampling)
    if not isinstance(shape, int):
        check_children(drafter, shape, num_known, limit)


class MarginalForwards(DraftForwards):
    """The levels of a draft from marginals. Only the first takes a forward.

    Args:
        source: the marginals.
        context: the call's sequences.
    """

    num_first = 1

    def __init__(self, source: Marginals, context: DraftContext):
        self._source, self.context, self.max_depth = source, context, source.max_depth

    @property
    def slots(self):
        return self._source.slots

    @property
    def weights(self):
        return self._source.weights // self._source.max_depth

    def follow(self, levels, rows=None):
        self._levels = levels
        self._source.follow(levels)

    def advance(self):
        self._source.skip()
        return self.context.root[:, None]

    def begin(self):
        self._logits, self._level = self._source.logits(self._levels), 0
        return self.context.root[:, None], self._logits[:, :1]

    def expand(self, tokens, parents, depth, ancestors):
        self._level += 1
        return self._logits[:, self._level, None].expand(-1, tokens.shape[1], -1)

    def observe(self, accepted, slots):
        self._source.observe(accepted)


class _Round(NamedTuple):
    """The shape of a round's tree, a key for graphs."""

    num_nodes: int
    depth: int
    slots: int


class MarginalSession(ForwardsSession):
    """Drafts the likeliest nodes, among the `WIDTH` best tokens of each depth. Tokens are ranked by their probability
    after filters, see `candidates`; none is sampled.

    Args:
        source: the marginals.
        context: the call's sequences.
        num_nodes: number of nodes, root included.
    """

    trusted = on_device = reusable = True

    def __init__(self, source: Marginals, context: DraftContext, num_nodes: int):
        self._source, self.context = source, context
        self._width = min(WIDTH, source.num_known or WIDTH, context.vocab_size)
        self.max_depth = min(source.max_depth, num_nodes - 1)
        self.max_nodes = min(num_nodes, most_nodes(self._width, self.max_depth))
        depths = torch.arange(1, source.max_depth + 1, device=context.start.device)
        self._depths = context.buffers.put("draft.depths", depths)

    def prepare(self, tree: Topology | None = None, rows: np.ndarray | None = None):
        context = self.context
        depth = self.max_depth if context.fixed_shapes else min(self.max_depth, context.useful_depth)
        if rows is not None and not rows.any():
            depth = 0
        self._source.follow(depth)
        self._round = _Round(min(self.max_nodes, most_nodes(self._width, depth)), depth, self._source.slots)
        return self._round

    def draft(self) -> DraftTree:
        context, (num_nodes, depth, _) = self.context, self._round
        if not depth:
            self._source.skip()
            return DraftTree.root_only(context.roots)
        logits = self._source.logits(depth)[..., : context.vocab_size]
        log_probs, tokens, has_nan = ranked(context, logits, self._width, self._depths[:depth])
        tree = DraftTree.best_first(context.root, tokens, log_probs, num_nodes, context.impl)
        return replace(tree, has_nan=has_nan.any(1))

    def observe(self, tree: DraftTree, accepted: Acceptance, rows: torch.Tensor | None = None) -> None:
        self._source.observe(accepted)


def most_nodes(width: int, depth: int) -> int:
    """Number of nodes, root included, of a tree in which each node above `depth` has `width` children."""
    return sum(width**level for level in range(depth + 1))
