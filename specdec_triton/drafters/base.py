"""The interface of drafters: in every round, a drafter proposes a tree of tokens for every sequence.

A `Drafter` holds options and may serve many calls and models. Its method `start` opens a `DraftSession`, which serves a
single `generate` call.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from ..forward.buffers import Buffers
from ..forward.runner import TreeRunner
from ..forward.taps import Read, Tap
from ..ops.filters import Filters
from ..ops.reference import Acceptance
from ..ops.rules import CHAIN_RULES, check_legal
from ..tree import DraftTree, DynamicTree, Topology

# Default trees have so many nodes in all sequences of a batch together. On an H200, a round of an 8B target with 16
# trees of 8 nodes took 1.3 times as long as a plain step of the batch (commit 8c943c0).
MOST_ROWS, FEWEST_NODES = 128, 4


@dataclass
class DraftContext:
    """The state of one call's sequences between two rounds. Drafters must not write to it.

    Attributes:
        tokens: [B, C] int64 on the device, C > max_length. Prompt (left padding included) and emitted tokens by column.
            Columns after `length` are undefined.
        start: [B] int64 on the device. First column that holds a real token.
        length: [B] int64 on the device. Column of the last emitted token, which is the root of the tree.
        host_tokens: [B, max_length] int64. The tokens on the host, as of the last report that the host has read.
        host_length: [B] int64. The lengths on the host, as of the same report.
        host_budget: [B] int64. Number of tokens that each row may still emit; 0 if the row is finished.
        max_length: number of columns that may be filled.
        vocab_size: draft tokens must be below it.
        target: the target with its cache. A drafter that runs a part of the target may write keys and values from slot
            `length` on, because verification overwrites them.
        rule: acceptance rule of the call.
        seeds: [B] int64. Seeds of the noise of each row; None with "greedy".
        filters: the call's temperature, top-k, top-p and min-p.
        eos_ids: [E] int64. Tokens after which a row emits nothing; None if there are none.
        impl: implementation of the ops; see `Options`.
        fixed_shapes: True if rounds may be captured as CUDA graphs and their reports read late. The tensor shapes of a
            session that is `on_device` must then not depend on `host_tokens`, `host_length` or `host_budget`.
        compiled: True if models run through `torch.compile`.
        fused: True if decoder layers run in fewer kernels, see `forward.fusion`.
        unread_tokens: upper bound on the number of tokens that a row has emitted but the host has not read.
        buffers: holds tensors for later calls, see `DraftSession.reusable`.
        prompt_reader: the return value of `Drafter.prompt_reader` after the prompt's forward.
        states: [B, N, Ht] for each of the drafter's taps. The target's hidden states at the nodes of the verified tree;
            they are set before `observe`.
        position: [B] int64 on the device. Position of each root: the number of real tokens before it.
        verified_depth: depth of the deepest node of another drafter that may be verified in place of a session's draft,
            see `ForwardsSession`; 0 if there is no other. A drafter that combines others sets it before it starts them.
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
    fused: bool = False
    unread_tokens: int = 0
    buffers: Buffers = field(default_factory=Buffers)
    prompt_reader: Read | None = None
    states: tuple[torch.Tensor, ...] = ()
    verified_depth: int = 0
    position: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        # later updated in place, together with `length`
        self.position = self.buffers.put("position", self.length - self.start)

    @property
    def root(self) -> torch.Tensor:
        """[B] int64. The last emitted tokens."""
        return self.roots.squeeze(1)

    @property
    def roots(self) -> torch.Tensor:
        """[B, 1] int64. The last emitted tokens, as `DraftTree.root_only` takes them."""
        return self.tokens.gather(1, self.length[:, None])

    @property
    def longest(self) -> int:
        """Upper bound on `length` in all rows, computed on the host."""
        return min(int(self.host_length.max()) + self.unread_tokens, self.max_length - 1)

    def cache_capacity(self, room: int) -> int:
        """Number of slots for a draft's cache with the columns before the root and `room` more. If shapes are fixed, it
        has room for as many columns as the target's."""
        cache = self.target.cache if self.fixed_shapes else None
        return room + (int(self.host_length[0]) if cache is None else cache.capacity)

    @property
    def useful_depth(self) -> int:
        """Depth of the deepest draft token that any row could still emit."""
        return max(int(self.host_budget.max()) - 1, 0)


class DraftSession(ABC):
    """One drafter during one `generate` call.

    Attributes:
        max_nodes: largest number of nodes, root included, that `draft` returns.
        max_depth: largest depth of a node that `draft` returns.
        trusted: True if the trees need not be checked. If it is False, the host checks the tree of every round. The
            draft is then not captured as a CUDA graph, and the host reads each round's report before the next round.
        on_device: True if `draft` and `observe` consist of tensor operations on tensors that keep their addresses from
            round to round. They must not read values on the host, must not use `host_tokens`, `host_length` or
            `host_budget`, and no shape may depend on values. A round can then be captured once and replayed.
        reusable: True if a later call may replay graphs that were captured with this session. Every tensor that `draft`
            and `observe` read or write must then come from `context`, from `context.buffers` or from the drafter, and
            they must not depend on other values of the call than the key of `prepare`, the drafter's attributes, and
            values that the session states by `context.buffers.agree`. Constant tensors are kept alive by
            `context.buffers.keep`.
        chains_only: True if the session can only draft chains when `prepare` asks for a tree.
        level_cost_ratio: estimated time to draft one level, divided by the time of a target forward over one token.
            0 if no model runs. `ModelDrafter` estimates it by the ratio of the numbers of parameters.
    """

    max_nodes: int
    max_depth: int
    trusted = False
    on_device = False
    reusable = False
    chains_only = False
    level_cost_ratio = 0.0

    def prepare(self, tree: Topology | None = None) -> Hashable:  # noqa: B027, most have nothing to prepare
        """Prepare the next draft on the host. It is called before every `draft`.

        Args:
            tree: the shape that `tree="auto"` asks for, or None.

        Returns:
            A hashable key. Equal keys mean equal shapes.
        """

    @abstractmethod
    def draft(self) -> DraftTree:
        """Return a tree for each sequence. Its root is the last emitted token, `context.root`."""

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:  # noqa: B027, most have no use for it
        """Called after verification with the accepted path, before `context.length` advances."""

    def observe_on_host(self, drafted: list[int], emitted: list[int]) -> None:  # noqa: B027, most have no use for it
        """Called each time the host has read the report of a round, in the order of the rounds. Later rounds may have
        begun already.

        Args:
            drafted: number of draft tokens of each row.
            emitted: number of tokens that each row emitted: its accepted tokens and the target's own token. 0 if the
                row was finished.
        """

    def finish(self) -> None:  # noqa: B027, most have no use for it
        """Called once after the last round of a call, unless the call ends with an exception. `context.host_tokens` and
        `context.host_length` then hold the whole texts. It is not called if the prompt's forward emits the only token,
        or in `warmup`."""


class Drafter(ABC):
    """Base class of drafters; see the module.

    A drafter outlives calls. A session may leave data with its drafter in `DraftSession.finish`. Calls of several
    threads may run at the same time.

    Attributes:
        resizable: True if its sessions draft the tree that `prepare` asks for. `tree="auto"` requires it.
        follows_text: True if its sessions are `ForwardsSession`s, between whose drafts those of another drafter may be
            verified. A fallback needs it, see `SuffixDrafter`.
    """

    resizable = follows_text = False

    def __repr__(self) -> str:
        """The arguments that differ from their defaults. Models are shown by class, tensors by shape."""
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
        """Refuse arguments that this drafter does not support. It is called in `patch` and before each `generate`.

        Args:
            model: the target.
            rule: acceptance rule, or None if each call decides.
            tree: as in `start`.

        Raises:
            ValueError: an argument is not supported; the message names the drafter, the values that it takes and the
                value that it got.
        """

    def taps(self, model: PreTrainedModel) -> tuple[Tap, ...]:
        """The hidden states of the target `model` that sessions of this drafter need. The prompt reader and
        `DraftContext.states` get them in this order."""
        return ()

    def prompt_reader(self, context: DraftContext) -> Read | None:
        """A function that gets the taps of the prompt, see `TreeRunner.prefill`. `context.target` has no cache yet."""
        return None

    def graph_hazard(self) -> str | None:
        """The reason why rounds with this drafter cannot be captured as CUDA graphs, or None."""
        return None

    @abstractmethod
    def start(self, context: DraftContext, tree: Topology | DynamicTree | int | None = None) -> DraftSession:
        """Open a session.

        Args:
            context: the call's sequences after the prompt. It is updated in place after every round.
            tree: the shape asked for in `patch`: a topology, a number of nodes (root included), a dynamic tree, or None
                for the drafter's own shape.

        Raises:
            ValueError: this drafter cannot draft such a tree.
        """


class DelegatingDrafter(Drafter):
    """Base class of drafters that wrap another one: all but `start` and `resizable` is the other's.

    Args:
        drafter: the other drafter.
    """

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    def check(
        self, model: PreTrainedModel, rule: str | None = None, tree: Topology | DynamicTree | int | None = None
    ) -> None:
        self.drafter.check(model, rule, tree)

    def taps(self, model: PreTrainedModel) -> tuple[Tap, ...]:
        return self.drafter.taps(model)

    def prompt_reader(self, context: DraftContext) -> Read | None:
        return self.drafter.prompt_reader(context)

    def graph_hazard(self) -> str | None:
        return self.drafter.graph_hazard()


def topology_of(
    tree: Topology | DynamicTree | int | None, default: Topology, rule: str | None = None
) -> Topology | DynamicTree:
    """The topology that `tree` asks for. A topology or dynamic tree is returned as it is, None gives `default`, and a
    number of nodes gives the most likely tree of that size, or a chain if the rule accepts only chains."""
    if tree is None:
        return default
    if not isinstance(tree, int):
        return tree
    return Topology.chain(tree - 1) if rule in CHAIN_RULES else Topology.from_budget(tree)


def most_nodes_each(batch: int) -> int:
    """Largest number of nodes of the default tree of each of `batch` sequences."""
    return max(MOST_ROWS // batch, FEWEST_NODES)


def check_tree(owner: str, tree: Topology | DynamicTree | int | None) -> None:
    """Refuse a value that does not describe the shape of a tree.

    Raises:
        ValueError: the message begins with `owner`.
    """
    is_number = isinstance(tree, int) and not isinstance(tree, bool) and tree >= 1
    if tree is not None and not isinstance(tree, (Topology, DynamicTree)) and not is_number:
        raise ValueError(
            f"{owner}: tree must be None, a Topology or a number of nodes of at least 1, or a DynamicTree, got {tree!r}"
        )


def check_static(owner: str, tree: Topology | DynamicTree | int | None) -> None:
    """Refuse a dynamic tree, on behalf of a drafter without draft probabilities.

    Raises:
        ValueError: `tree` is a dynamic tree; the message begins with `owner`.
    """
    if isinstance(tree, DynamicTree):
        raise ValueError(
            f"{owner}: tree must not be a DynamicTree, which needs draft probabilities (draft models "
            f"and trained heads have them), got {tree}"
        )


def check_draft(drafter: Drafter, session: DraftSession, context: DraftContext, tree: DraftTree) -> None:
    """Check the return value of a third-party drafter's `draft`.

    Raises:
        ValueError: it is not a tree that a round can verify; the message names the drafter.
    """
    name = type(drafter).__name__
    if not isinstance(tree, DraftTree):
        raise ValueError(f"{name}: draft must return a DraftTree, got {type(tree).__name__}")
    tree.check(context.root, context.vocab_size, name)
    check_rule(drafter, context.rule, tree.is_chain, tree.sampling)
    if tree.num_nodes > session.max_nodes:
        raise ValueError(
            f"{name}: draft must return at most {session.max_nodes} nodes (its max_nodes), got {tree.num_nodes}"
        )


def check_rule(drafter: Drafter, rule: str | None, is_chain: bool, sampling: str = "none") -> None:
    """Refuse a rule that cannot be applied to the trees of `drafter`, or would give biased samples."""
    try:
        check_legal(rule or "greedy", sampling, is_chain)
    except ValueError as refusal:
        raise ValueError(f"{type(drafter).__name__}: {refusal}") from None


def check_children(drafter: Drafter, shape: Topology | DynamicTree, vocab_size: int, limit: str) -> None:
    """Refuse a shape with a node of more children than there are tokens. `limit` is the number of tokens in words."""
    children = shape.width if isinstance(shape, DynamicTree) else 1 + max(shape.ranks)
    if children > vocab_size:
        raise ValueError(
            f"{type(drafter).__name__}: a node of the tree must have at most {vocab_size} children, {limit}, got "
            f"{children}"
        )


class NoDrafter(Drafter):
    """Drafts nothing: every round is a plain decoding step of the same engine. Use it as the baseline in benchmarks."""

    resizable = True

    def start(self, context: DraftContext, tree: Topology | DynamicTree | int | None = None) -> DraftSession:
        return _NoSession(context)


class _NoSession(DraftSession):
    max_nodes, max_depth, trusted, on_device, reusable = 1, 0, True, True, True

    def __init__(self, context: DraftContext):
        self.context = context

    def draft(self) -> DraftTree:
        return DraftTree.root_only(self.context.roots)
