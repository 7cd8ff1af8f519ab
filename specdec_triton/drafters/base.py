"""Drafters propose a tree of tokens for every sequence, once a round.

A `Drafter` holds options and may serve many calls and models. `start` opens a `DraftSession`, which lives for one
`generate` call.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ..forward.runner import TreeRunner
from ..ops.filters import Filters
from ..ops.reference import Acceptance
from ..ops.rules import CHAIN_RULES, check_legal
from ..tree import DraftTree, DynamicTree, Topology


@dataclass
class DraftContext:
    """The sequences of one call between two rounds. Drafters read it and never write to it.

    Attributes:
        tokens: [B, max_length + 1] int64 on the device. Prompt (left padding included) and emitted tokens by column;
            what lies beyond `length` means nothing.
        start: [B] int64. First column that holds a real token.
        length: [B] int64. Column of the last emitted token, the tree's root.
        host_tokens: [B, max_length] int64. The same tokens on the host; what was read with the last round.
        host_length: [B] int64. The same lengths.
        host_budget: [B] int64. Tokens each row may still emit; 0 when it is done.
        max_length: columns that may ever be filled.
        vocab_size: draft tokens must be below it.
        target: the target with its cache. A drafter that runs a part of the target may write keys and values from slot
            `length` on: verification overwrites them.
        rule: acceptance rule of the call.
        seeds: [B] int64. What each row's noise is keyed by; None with "greedy".
        filters: the call's temperature, top-k, top-p and min-p.
        eos_ids: [E] int64. Tokens after which a row emits nothing; None for none.
        impl: implementation of the ops that was asked for.
        fixed_shapes: rounds may be captured, and read late: shapes of a session that is `on_device` must not follow the
            host's view of the text.
        compiled: models are run through `torch.compile`.
        ahead: tokens that a row may have emitted beyond the host's view.
    """

    tokens: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    host_tokens: np.ndarray
    host_length: np.ndarray
    host_budget: np.ndarray
    max_length: int
    vocab_size: int
    target: TreeRunner
    rule: str = "greedy"
    seeds: torch.Tensor | None = None
    filters: Filters = Filters()
    eos_ids: torch.Tensor | None = None
    impl: str | None = None
    fixed_shapes: bool = False
    compiled: bool = False
    ahead: int = 0

    @property
    def root(self) -> torch.Tensor:
        """[B] int64. The last emitted tokens."""
        return self.tokens.gather(1, self.length[:, None]).squeeze(1)

    @property
    def position(self) -> torch.Tensor:
        """[B] int64. The roots' positions: real tokens before them."""
        return self.length - self.start

    @property
    def longest(self) -> int:
        """The largest `length` there can be, by what the host knows."""
        return min(int(self.host_length.max()) + self.ahead, self.max_length - 1)

    @property
    def useful_depth(self) -> int:
        """Deepest draft token that any row could still emit."""
        return max(int(self.host_budget.max()) - 1, 0)


class DraftSession(ABC):
    """One drafter during one `generate` call.

    Attributes:
        max_nodes: largest N, root included, that `draft` returns.
        max_depth: largest depth.
        trusted: the trees need not be checked on the host. The trees of a drafter from outside are checked in every
            round, so its drafts are not captured, and the host reads each round before the next.
        on_device: `draft` and `observe` are tensor operations only, on tensors that stay where they are from round to
            round: no value is read on the host, no host state (`host_tokens`, `host_length`, `host_budget`) is used,
            and no shape depends on values. So a round can be captured once and replayed.
        chains_only: of the trees that `prepare` may ask for, it can make chains only.
        level_cost: seconds that drafting one level takes, of the target's for one token; 0 where no model runs.
    """

    max_nodes: int
    max_depth: int
    trusted = False
    on_device = False
    chains_only = False
    level_cost = 0.0

    def prepare(self, tree: Topology | None = None) -> Hashable:  # noqa: B027, most have nothing to prepare
        """The host's part of the next draft, called before each.

        Args:
            tree: the shape asked for by `tree="auto"`, or None.

        Returns:
            What tells drafts of different shapes apart.
        """

    @abstractmethod
    def draft(self) -> DraftTree:
        """A tree for each sequence, its root the context's last emitted token."""

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:  # noqa: B027, most have no use for it
        """Called after each round with the accepted path, before the context moves on."""

    def observe_on_host(self, drafted: list[int], emitted: list[int]) -> None:  # noqa: B027, most have no use for it
        """Called on the host when it has read a round's report, in order. Later rounds may have begun by then.

        Args:
            drafted: draft tokens of each row.
            emitted: tokens that each row emitted, its accepted ones and the target's own; 0 where the row had ended.
        """


class Drafter(ABC):
    """See the module.

    Attributes:
        resizable: its sessions draft what `prepare` asks for, so that `tree="auto"` can choose.
    """

    resizable = False

    def __repr__(self) -> str:
        """The arguments that are not the defaults; of a model its class, of a tensor its shape."""
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name, parameter.default)
            if isinstance(value, torch.nn.Module):
                shown.append(f"{name}={type(value).__name__}")
            elif isinstance(value, (torch.Tensor, np.ndarray)):
                shown.append(f"{name}={list(value.shape)}")
            elif value != parameter.default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def check(  # noqa: B027, most serve every target
        self, model: PreTrainedModel, rule: str | None = None, tree: Topology | DynamicTree | int | None = None
    ) -> None:
        """Refuse what this drafter cannot draft for; asked in `patch` and before each `generate`.

        Args:
            model: the target.
            rule: acceptance rule, or None where the call decides.
            tree: as in `start`.

        Raises:
            ValueError: names the drafter, what is wanted and what came.
        """

    def graph_hazard(self) -> str | None:
        """Why rounds with this drafter cannot be captured as CUDA graphs, or None."""
        return None

    @abstractmethod
    def start(self, context: DraftContext, tree: Topology | DynamicTree | int | None = None) -> DraftSession:
        """Open a session.

        Args:
            context: the call's sequences after the prompt; updated in place from round to round.
            tree: the shape asked for in `patch`: a topology, a number of nodes (root included), a dynamic tree, or None
                for the drafter's own.

        Raises:
            ValueError: this drafter cannot make such a tree.
        """


def topology_of(
    tree: Topology | DynamicTree | int | None, default: Topology, rule: str | None = None
) -> Topology | DynamicTree:
    """The topology that `tree` asks for: itself, the likeliest of so many nodes (a chain where the rule takes no
    other), or the drafter's default."""
    if tree is None:
        return default
    if not isinstance(tree, int):
        return tree
    return Topology.chain(tree - 1) if rule in CHAIN_RULES else Topology.from_budget(tree)


def check_tree(owner: str, tree: Topology | DynamicTree | int | None) -> None:
    """Refuse what is no shape of a tree.

    Raises:
        ValueError: names `owner`.
    """
    is_number = isinstance(tree, int) and not isinstance(tree, bool) and tree >= 1
    if tree is not None and not isinstance(tree, (Topology, DynamicTree)) and not is_number:
        raise ValueError(
            f"{owner}: tree must be None, a Topology or a number of nodes of at least 1, or a DynamicTree, got {tree!r}"
        )


def check_static(owner: str, tree: Topology | DynamicTree | int | None) -> None:
    """Refuse a dynamic tree, for a drafter without probabilities.

    Raises:
        ValueError: names `owner`.
    """
    if isinstance(tree, DynamicTree):
        raise ValueError(
            f"{owner}: tree must not be a DynamicTree, which takes a draft's probabilities (ModelDrafter and "
            f"EarlyExitDrafter have them), got {tree}"
        )


def check_draft(drafter: Drafter, session: DraftSession, context: DraftContext, tree: DraftTree) -> None:
    """Refuse what a session of someone else's drafter returned, unless it is a tree that a round can verify.

    Raises:
        ValueError: names the drafter.
    """
    name = type(drafter).__name__
    if not isinstance(tree, DraftTree):
        raise ValueError(f"{name}: draft must return a DraftTree, got {type(tree).__name__}")
    tree.check(context.root, context.vocab_size, name)
    check_rule(drafter, context.rule, tree.is_chain, tree.sampling)
    if tree.num_nodes > session.max_nodes:
        raise ValueError(
            f"{name}: draft must return at most its max_nodes, {session.max_nodes} nodes, got {tree.num_nodes}"
        )


def check_rule(drafter: Drafter, rule: str | None, is_chain: bool, sampling: str = "none") -> None:
    """Refuse a rule that cannot use, or would be biased on, the trees that `drafter` makes."""
    try:
        check_legal(rule or "greedy", sampling, is_chain)
    except ValueError as refusal:
        raise ValueError(f"{type(drafter).__name__}: {refusal}") from None


class NoDrafter(Drafter):
    """No draft: every round is a plain decoding step of the same engine. The honest baseline."""

    resizable = True

    def start(self, context: DraftContext, tree: Topology | DynamicTree | int | None = None) -> DraftSession:
        return _NoSession(context)


class _NoSession(DraftSession):
    max_nodes, max_depth, trusted, on_device = 1, 0, True, True

    def __init__(self, context: DraftContext):
        self.context = context

    def draft(self) -> DraftTree:
        return DraftTree.root_only(self.context.root[:, None])
