"""The forwards by which a session drafts, level by level: the interface, and the forwards of a draft model. Those of
trained heads are in `head_forwards` and `marginals`.

Letters: B sequences, N tree nodes, V vocabulary of the draft, W words of ancestor bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from ..forward.runner import TreeRunner
from ..forward.wrappers import embedded_tokens, num_weights
from ..ops.reference import Acceptance
from ..tree import DraftTree, Topology, topology_tensors, with_rows
from .base import DraftContext, DraftSession
from .length import in_steps

CHUNK = 128  # largest number of tokens per forward while the draft catches up


class DraftForwards(ABC):
    """The forwards of one drafter during one call.

    A round runs `advance` or `begin` once, then `expand` once for each further level. The tree of a level in the
    draft's cache consists of a chain of `num_first` nodes that ends in the root, followed by the expanded nodes.

    Attributes:
        num_first: number of nodes in a level's tree up to the root, included.
        max_depth: the largest number of levels; None if there is no limit.
    """

    num_first: int
    max_depth: int | None = None

    @property
    @abstractmethod
    def slots(self) -> int:
        """Number of cache slots that forwards of the draft see; 0 without a cache."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """Number of weights that a forward reads."""

    @abstractmethod
    def follow(self, levels: int, rows: np.ndarray | None = None) -> None:
        """Prepare a round of at most this number of levels on the host. If it is 0, the round runs `advance`, not
        `begin`. `rows`: see `ForwardsSession.prepare`."""

    @abstractmethod
    def advance(self) -> torch.Tensor:
        """Begin a round that drafts nothing. Returns the root's tokens [B, 1]."""

    @abstractmethod
    def begin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Process the text of the last round. Returns the root's tokens [B, 1], and the draft's logits [B, 1, V] at the
        root."""

    @abstractmethod
    def expand(
        self, tokens: torch.Tensor, parents: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor
    ) -> torch.Tensor:
        """The draft's logits [B, n, V] at n nodes, which become the last nodes of the tree in the draft's cache.

        Args:
            tokens: [B, n] int64. Tokens of the nodes.
            parents: [n] or [B, n] int64. The parents, as numbers among the nodes of the call before (0 after `begin`).
            depth: [B, T] int64. Depth of all nodes of the tree; the first has depth 0.
            ancestors: [B, T, W] int64. Ancestor words of all nodes of the tree, see `DraftTree`.
        """

    @abstractmethod
    def observe(self, accepted: Acceptance, slots: torch.Tensor | None) -> None:
        """Called after verification, before `context.length` advances.

        Args:
            accepted: the accepted path.
            slots: [N] or [B, N] int64. Slot of each node of the verified tree in the draft's cache, relative to the
                root's; -1 if it was not forwarded. None if the accepted nodes are in their final slots.
        """


class ModelForwards(DraftForwards):
    """Forwards of a draft model over tokens.

    Args:
        model: the draft model.
        context: the call's sequences.
        most_nodes: largest number of nodes that a round forwards after the root.
        shares_cache: True if the model consists of the target's first layers and uses the target's cache. It then has
            no prompt to run and no tokens to catch up with.
        most_pieces: largest number of the model's tokens that stand for one of the target's. If it is given, `context`
            is the text in the model's tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: DraftContext,
        most_nodes: int,
        shares_cache: bool = False,
        most_pieces: int | None = None,
    ):
        self.context, self._shares_cache = context, shares_cache
        # a round begins with the target's own last token, which is never in the draft's cache, and the last accepted
        # token, which may be missing
        self.num_first = 1 if shares_cache else (most_pieces or 1) + 1
        self._room = self.num_first + most_nodes  # cache slots that a round needs after the root's column
        columns = torch.arange(self.num_first, device=context.start.device)
        self._columns = context.buffers.put("draft.columns", columns)
        self._path = topology_tensors(Topology.chain(self.num_first - 1), context.start.device)
        context.buffers.keep(self._path)  # captured rounds read it
        self._known = known_tokens(model, context) if most_pieces is None else None
        last, fixed, buffers = last_position(model, context), context.fixed_shapes, context.buffers
        self._runner = TreeRunner(
            model, context.start, last, context.impl, fixed, context.compiled, context.fused, buffers, "draft"
        )
        if shares_cache:
            self._runner.cache = context.target.cache
        else:
            run_prompt(self._runner, context, self._room, self._known)
        # the first forward of a round runs the root, and the token before it
        self._missing = MissingColumns(self._runner, context, self._known, ahead=1)

    @property
    def slots(self):
        return self._runner.cache.slots

    @property
    def weights(self):
        return num_weights(self._runner.model)

    def follow(self, levels, rows=None):
        """Reserve cache slots for the round. If it drafts, first run the tokens that were emitted without the model."""
        self._runner.cache.reserve(self.context.longest + self._room)
        if not self._shares_cache:
            self._missing.follow(levels > 0, rows)

    def advance(self):
        return self.context.root[:, None]  # later rounds catch up, see `follow`

    def begin(self):
        # the slot at which the round begins
        self._first = self.context.length - (self.num_first - 1)
        tokens = self.context.tokens.gather(1, self._first[:, None] + self._columns)
        _, depth, ancestors = with_rows(len(tokens), self._path)
        logits = self._forward(tokens, depth, ancestors)
        return tokens[:, -1:], logits[:, -1:]

    def expand(self, tokens, parents, depth, ancestors):
        return self._forward(tokens, depth, ancestors)

    def _forward(self, tokens: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """Logits [B, n, V] at tokens [B, n], the last nodes of the tree in the draft's cache."""
        return self._runner.forward(as_known(tokens, self._known), depth, ancestors, self._first)

    def observe(self, accepted, slots):
        if self._shares_cache or slots is None:
            return
        path = slots.expand(len(accepted.path), -1).gather(1, accepted.path.clamp(min=0).long())
        path = torch.where(accepted.path >= 0, path, -1).int()
        self._runner.cache.compact(self.context.length, path, self.context.impl)


class MissingColumns:
    """Runs the columns of the text that a draft model has not run: tokens of rounds in which it drafted nothing, and
    accepted tokens of other drafters.

    Args:
        runner: runs the draft model. Its cache holds the prompt.
        context: the call's sequences.
        known: see `known_tokens`.
        ahead: number of columns, counted from the root's, that a round of the model runs.
    """

    def __init__(self, runner: TreeRunner, context: DraftContext, known: int | None, ahead: int):
        self._runner, self._context, self._known, self._ahead = runner, context, known, ahead
        # [B] number of columns that the model has run; a lower bound if reports are read late
        self._run = context.host_length.copy()
        # [B] True if the model's own draft was verified last; its next round then runs all columns that it lacks
        self._follows = np.ones(len(self._run), dtype=bool)

    def follow(self, drafts: bool, rows: np.ndarray | None = None) -> None:
        """Prepare a round on the host. If the model drafts, first run the columns that it lacks before the last
        accepted token. `rows`: see `ForwardsSession.prepare`."""
        if not drafts:
            self._follows = np.zeros_like(self._follows)
            return
        context = self._context
        lacking = context.host_length + context.unread_tokens - 1 - self._run
        count = int(lacking[~self._follows & (context.host_budget > 0)].max(initial=0))
        if count:
            # in other rows this goes back too far; the first token is the limit
            first = torch.maximum(context.length - 1 - count, context.start)
            run_columns(self._runner, context, first, count, self._known)
        self._run = context.host_length + self._ahead
        self._follows = np.ones_like(self._follows) if rows is None else rows


class TextRows:
    """The number of rows of the text in a head's forward: those of the root and of the tokens that were accepted last.

    It is constant if all drafts are the head's own. A round after a longer path of another drafter has more rows. The
    host then knows the length of the path, because it reads each report before the next round.

    Args:
        context: the call's sequences.
        max_depth: largest depth of a node of the head's own drafts.
        older: number of older columns whose rows are computed again.

    Attributes:
        count: the number in the present round.
        most: the largest number.
    """

    def __init__(self, context: DraftContext, max_depth: int, older: int = 0):
        self._context, self._length, self._older = context, context.host_length.copy(), older
        self.count = self._own = max_depth + 1 + older
        self.most = max(max_depth, context.verified_depth) + 1 + older

    def follow(self) -> None:
        """Update `count` for the next round."""
        if self.most == self._own:
            return
        length = self._context.host_length
        needed = int((length - self._length).max()) + self._older
        self.count = self._own if needed <= self._own else in_steps(needed, self.most)
        self._length = length.copy()


class ForwardsSession(DraftSession):
    """A session that runs forwards of a draft, and can follow the text while rows verify the drafts of another drafter.

    Attributes:
        draws: True if tokens are drawn from the draft's probabilities.
    """

    draws = False

    @abstractmethod
    def prepare(self, tree: Topology | None = None, rows: np.ndarray | None = None) -> Hashable:
        """See `DraftSession.prepare`.

        Args:
            tree: the shape that `tree="auto"` asks for, or None.
            rows: [B] bool on the host. True for rows whose draft will be verified; None for all. If there is no such
                row, `draft` drafts nothing. It must be called nevertheless.
        """

    @abstractmethod
    def observe(self, tree: DraftTree, accepted: Acceptance, rows: torch.Tensor | None = None) -> None:
        """See `DraftSession.observe`.

        Args:
            tree: the verified tree.
            accepted: the accepted path.
            rows: [B] bool on the device, as in `prepare`. Nodes of other rows are those of another drafter.
        """


def slots_of(slots: torch.Tensor | None, tree: DraftTree, rows: torch.Tensor | None) -> torch.Tensor | None:
    """The argument `slots` of `DraftForwards.observe` if the draft was verified in `rows` alone: [B, N] int64.

    Args:
        slots: [n] or [B, n] int64. Slots of the draft's own nodes; None if they are in their final slots.
        tree: the verified tree of N nodes.
        rows: [B] bool; None for all.
    """
    if slots is None or rows is None:
        return slots
    slots = pad(slots[..., : tree.num_nodes], (0, max(tree.num_nodes - slots.shape[-1], 0)), value=-1)
    return torch.where(rows[:, None], slots, -1)


def last_position(model: PreTrainedModel, context: DraftContext) -> torch.Tensor:
    """[B] int64. Largest position that the draft model may be fed in each row."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context.max_length
    return (context.max_length - context.start).clamp(max=limit) - 1


def known_tokens(model: PreTrainedModel, context: DraftContext) -> int | None:
    """Number of tokens that the draft model has an embedding of; None if these are all tokens of a text."""
    known = embedded_tokens(model)
    return None if known >= max(context.vocab_size, embedded_tokens(context.target.model)) else known


def as_known(tokens: torch.Tensor, known: int | None) -> torch.Tensor:
    """The tokens, or the draft's last token for those that it has no embedding of. `known`: see `known_tokens`."""
    return tokens if known is None else tokens.clamp(max=known - 1)


def run_prompt(runner: TreeRunner, context: DraftContext, room: int, known: int | None) -> None:
    """Run the prompt through a draft model, left padding included, so that its cache has the target's columns. `room`:
    cache slots that a round needs after the root's column. `known`: see `known_tokens`."""
    prompt = context.tokens[:, : int(context.host_length[0])]
    columns = torch.arange(prompt.shape[1], device=prompt.device)
    real = columns >= context.start[:, None]
    kwargs = {
        "attention_mask": real.long(),
        "position_ids": (columns - context.start[:, None]).clamp(min=0).minimum(runner.last_position[:, None]),
    }
    if runner.model._supports_logits_to_keep():
        kwargs["logits_to_keep"] = 1
    runner.prefill(as_known(prompt, known), GenerationConfig(), kwargs, context.cache_capacity(room))


def run_columns(runner: TreeRunner, context: DraftContext, first: torch.Tensor, count: int, known: int | None) -> None:
    """Run the tokens of `count` columns from `first` [B] int64 on through a draft model. Columns after the root's are
    overwritten later. `known`: see `known_tokens`."""
    for done in range(0, count, CHUNK):
        base = first + done
        columns = base[:, None] + torch.arange(min(CHUNK, count - done), device=first.device)
        tokens = context.tokens.gather(1, columns.clamp(max=context.tokens.shape[1] - 1))
        runner.forward_chain(as_known(tokens, known), base)
