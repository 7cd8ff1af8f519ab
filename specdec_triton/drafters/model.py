"""Drafts from a smaller model: a chain, or a tree whose children are expanded level by level."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from ..checks import check_supported, graph_hazard
from ..filters import filtered_log_probs
from ..noise import COUPLED, DRAFT, gumbel
from ..reference import Acceptance
from ..rules import WEIGHING_RULES
from ..runner import TreeRunner
from ..tree import DraftTree, DynamicTree, Topology, topology_tensors
from .base import DraftContext, Drafter, DraftSession, check_rule, check_tree, topology_of

# The draft's cache may lack the last accepted token and always lacks the root, so each round begins with both.
CATCH_UP = 2
CHUNK = 128  # tokens a forward, where the draft has more to catch up with
VOCABULARY_PADDING = 0.01  # vocabularies whose sizes differ by no more share a tokenizer, padded differently
DEFAULT_TOKENS = 20  # as in transformers, where a generation config says nothing


class ModelDrafter(Drafter):
    """A draft model with the target's tokenizer.

    A node's children are what the call's acceptance rule has use for: the draft's likeliest tokens, by rank; under
    "coupled" the likeliest with the target's own noise added; under the rules that weigh a token by its draft
    probability, draws from the draft's distribution, filtered as the target's is. A `DynamicTree` is cut by value, so
    it is made without chance under every rule, and those weigh its tokens as certain.

    The draft keeps its own tree cache through the call: a token's keys and values are computed once (the last one
    twice, to keep shapes fixed).

    Args:
        model: decoder-only, in transformers' attention interface, on the target's device.
        num_tokens: length of a chain; default the model's own `generation_config.num_assistant_tokens`,
            else 20.
        tree: a topology, a number of nodes (root included) or a `DynamicTree`; instead of a chain.
        replacement: siblings that are drawn may be equal; else the draft's distribution loses a token once drawn.

    Raises:
        ValueError: the model cannot draft, both shapes are given, or a number is below 1.
    """

    resizable = True

    def __init__(
        self,
        model: PreTrainedModel,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
    ):
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"ModelDrafter: model must be a transformers PreTrainedModel, got {type(model).__name__}")
        check_supported(model, "the draft model")
        self.model, self.num_tokens, self.tree, self.replacement = model, num_tokens, tree, replacement
        check_shape(self)

    def check(self, model, rule=None, tree=None):
        if self.model.device != model.device:
            raise ValueError(f"ModelDrafter: the draft model must be on {model.device}, got {self.model.device}")
        sizes = [each.config.get_text_config().vocab_size for each in (model, self.model)]
        if abs(sizes[0] - sizes[1]) > VOCABULARY_PADDING * max(sizes):
            raise ValueError(
                f"ModelDrafter: the draft model must have the target's vocabulary of {sizes[0]} tokens, up to "
                f"{VOCABULARY_PADDING:.0%} of padding, got {sizes[1]}"
            )
        draft_shape(self, tree, self.model, rule, min(sizes))

    def graph_hazard(self):
        return graph_hazard(self.model)

    def start(self, context, tree=None):
        shape = draft_shape(self, tree, self.model, context.rule, context.vocab_size)
        return start_session(self.model, context, shape, replacement=self.replacement)


def check_shape(drafter: Drafter) -> None:
    """Refuse a drafter's options: both shapes at once, and what is none."""
    name, length = type(drafter).__name__, drafter.num_tokens
    if length is not None and drafter.tree is not None:
        raise ValueError(f"{name}: give num_tokens (a chain) or tree, got both")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"{name}: num_tokens must be an integer of at least 1, got {length!r}")
    check_tree(name, drafter.tree)
    if not isinstance(drafter.replacement, bool):
        raise ValueError(f"{name}: replacement must be True or False, got {drafter.replacement!r}")


def draft_shape(
    drafter: Drafter,
    tree: Topology | DynamicTree | int | None,
    model: PreTrainedModel,
    rule: str | None,
    vocab_size: int,
) -> Topology | DynamicTree:
    """The tree asked for in the call, else the drafter's, else a chain as long as the drafter or `model` says.

    Raises:
        ValueError: the rule cannot use it, or it has more children a node than there are tokens.
    """
    length = drafter.num_tokens or model.generation_config.num_assistant_tokens or DEFAULT_TOKENS
    shape = topology_of(drafter.tree if tree is None else tree, Topology.chain(length), rule)
    dynamic = isinstance(shape, DynamicTree)
    check_rule(drafter, rule, shape.is_chain, "none" if dynamic else "without")
    children = shape.width if dynamic else 1 + max(shape.ranks)
    if children > vocab_size:
        raise ValueError(
            f"{type(drafter).__name__}: tree must not have more children a node than the vocabulary's {vocab_size} "
            f"tokens, got {children}"
        )
    return shape


def start_session(
    model: PreTrainedModel,
    context: DraftContext,
    shape: Topology | DynamicTree,
    shares_cache: bool = False,
    replacement: bool = False,
) -> "ModelSession":
    """The session that drafts such a shape: for the arguments see `ModelSession`."""
    if isinstance(shape, DynamicTree):
        from .dynamic import DynamicSession  # which builds on this module

        return DynamicSession(model, context, shape, shares_cache)
    return ModelSession(model, context, shape, shares_cache, replacement)


class ModelSession(DraftSession):
    """A model that drafts a topology, level by level.

    Args:
        model: drafts.
        context: the call's sequences.
        topology: what to draft.
        shares_cache: the model is made of the target's first layers, and the target's keys and values are its own:
            there is no prompt to run and nothing to catch up with.
        replacement: see `ModelDrafter`.
    """

    trusted = on_device = True

    def __init__(
        self,
        model: PreTrainedModel,
        context: DraftContext,
        topology: Topology,
        shares_cache: bool = False,
        replacement: bool = False,
    ):
        self.context, self.topology = context, topology
        self.max_nodes, self.max_depth = topology.num_nodes, topology.max_depth
        self._replacement = replacement
        self._shares_cache, self._catch_up = shares_cache, 1 if shares_cache else CATCH_UP
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context.max_length
        self._last_token = model.get_input_embeddings().num_embeddings - 1
        last = (context.max_length - context.start).clamp(max=limit) - 1
        self._runner = TreeRunner(model, context.start, last, context.impl, context.fixed_shapes, context.compiled)
        self._behind = 0  # rounds since the draft model last ran
        self._plans: dict[Topology, _Plan] = {}  # kept: captured rounds read their tensors
        if shares_cache:
            self._runner.cache = context.target.cache
        else:
            self._prefill()

    def _prefill(self) -> None:
        """The prompt, left padding and all, through the draft: its cache has the target's columns."""
        context, model = self.context, self._runner.model
        prompt = context.tokens[:, : int(context.host_length[0])]
        columns = torch.arange(prompt.shape[1], device=prompt.device)
        real = columns >= context.start[:, None]
        kwargs = {
            "attention_mask": real.long(),
            "position_ids": (columns - context.start[:, None])
            .clamp(min=0)
            .minimum(self._runner.last_position[:, None]),
        }
        if model._supports_logits_to_keep():
            kwargs["logits_to_keep"] = 1
        room = self._room + (context.target.cache.capacity - prompt.shape[1] if context.fixed_shapes else 0)
        self._runner.prefill(prompt.clamp(max=self._last_token), GenerationConfig(), kwargs, prompt.shape[1] + room)

    @property
    def _room(self) -> int:
        """Slots that a round needs beyond the root's column."""
        return self._catch_up + self.max_nodes

    @property
    def level_cost(self) -> float:
        draft, target = (
            sum(weight.numel() for weight in runner.model.parameters())
            for runner in (self._runner, self.context.target)
        )
        return draft / target

    def prepare(self, tree=None):
        context, topology = self.context, self.topology if tree is None else tree
        if not context.fixed_shapes:
            topology = topology.limited(context.useful_depth)
        self._follow(topology.num_nodes > 1)
        if topology not in self._plans:
            self._plans[topology] = _plan(topology, self._catch_up, context.length.device)
        self._drafted = topology
        return topology, self._runner.cache.slots

    def _follow(self, drafts: bool) -> None:
        """Room for the round; and before one that drafts, what the rounds left out that did not."""
        self._runner.cache.reserve(self.context.longest + self._room)
        if not drafts:
            self._behind += 1
        elif self._behind:
            self._catch_up_with(self._behind)
            self._behind = 0

    def _catch_up_with(self, rounds: int) -> None:
        """Run the tokens of rounds that drafted nothing, one a round, in a row that had not ended."""
        context = self.context
        if self._shares_cache:
            return
        # a row that had ended goes back too far, and no further than to its first token
        first = torch.maximum(context.length - (self._catch_up - 1) - rounds, context.start)
        for done in range(0, rounds, CHUNK):
            base = first + done
            columns = base[:, None] + torch.arange(min(CHUNK, rounds - done), device=first.device)
            self._runner.forward_chain(context.tokens.gather(1, columns).clamp(max=self._last_token), base)

    def draft(self) -> DraftTree:
        context, topology = self.context, self._drafted
        first, fed = self._catching_up()
        tokens, has_nan = [fed[:, -1:]], torch.zeros_like(first, dtype=torch.bool)
        plan = self._plans[topology]
        drawn_from = []
        for level in plan.levels:
            depth, ancestors = (part.expand(len(first), *part.shape[1:]) for part in (level.depth, level.ancestors))
            logits = self._runner.forward(fed.clamp(max=self._last_token), depth, ancestors, first)
            logits = logits[:, -level.num_parents :, : context.vocab_size]
            best, children = self._children(level, logits)
            has_nan |= best.isnan().any(1)
            tokens.append(children)
            fed = children[:, level.expanded]
            drawn_from.append(logits)
        tree = DraftTree.from_topology(topology, torch.cat(tokens, 1)[:, plan.order], has_nan)
        if context.rule not in WEIGHING_RULES or not drawn_from:
            return tree
        unknown = context.vocab_size - drawn_from[0].shape[-1]  # padding of a larger vocabulary, never drawn
        return tree.drawn(
            "with" if self._replacement else "without",
            pad(torch.cat(drawn_from, 1), (0, unknown), value=float("-inf")),
            plan.draft_row.expand(len(first), -1),
            context.filters,
        )

    def _catching_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a round begins in the draft's cache [B], and the tokens that it begins with [B, catch-up], the root the
        last of them."""
        first = self.context.length - (self._catch_up - 1)
        columns = first[:, None] + torch.arange(self._catch_up, device=first.device)
        return first, self.context.tokens.gather(1, columns)

    def _perturbed(self, logits: torch.Tensor, depth: int) -> torch.Tensor:
        """[B, n, V]: filtered log-probabilities with the noise that the target will have at this depth."""
        context = self.context
        noise = gumbel(context.seeds, context.position + depth, 0, COUPLED, logits.shape[-1])
        return filtered_log_probs(logits, context.filters) + noise[:, None]

    def _children(self, level: "_Level", logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The level's candidates from its parents' logits [B, parents, V].

        Returns:
            [B, parents], the best score at each parent: a NaN ranks first; [B, children] int64, the tokens.
        """
        context = self.context
        if context.rule == "coupled":
            logits = self._perturbed(logits, level.depth_below)
        elif context.rule in WEIGHING_RULES:
            log_probs = filtered_log_probs(logits, context.filters)
            row = context.seeds[:, None], context.position[:, None]
            if self._replacement:
                noise = gumbel(*row, level.children, DRAFT, logits.shape[-1])
                tokens = (log_probs[:, level.parent_rows] + noise).argmax(-1)
                return log_probs.amax(-1), tokens
            logits = log_probs + gumbel(*row, level.parents, DRAFT, logits.shape[-1])
            best, drawn = logits.topk(level.num_draws, dim=-1)
            return best[:, :, 0], drawn[:, level.parent_rows, level.draws]
        best, ranked = logits.topk(level.num_ranks, dim=-1)
        return best[:, :, 0], ranked[:, level.parent_rows, level.ranks]

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        if self._shares_cache or tree.is_chain or tree.max_depth == 0:
            return
        slots = self._plans[self._drafted].slots
        path = torch.where(accepted.path >= 0, slots[accepted.path.clamp(min=0).long()], -1).int()
        self._runner.cache.compact(self.context.length, path, self.context.impl)


@dataclass(frozen=True)
class _Level:
    """One forward of the draft: the nodes of one depth that have children.

    Attributes:
        num_parents: nodes expanded; the last rows of the forward.
        num_ranks, num_draws: candidates wanted of each, by rank or by drawing them.
        parent_rows, ranks, draws: [children] int64. Which expanded node, and which of its candidates, each child is.
        expanded: [next level's parents] int64. Which children are expanded in their turn.
        depth, ancestors: [1, T], [1, T, W] int64. The draft cache's tree so far: catch-up tokens and expanded nodes.
        parents, children: [parents], [children] int64. Their nodes in the tree.
        depth_below: depth of the children.
    """

    num_parents: int
    num_ranks: int
    num_draws: int
    parent_rows: torch.Tensor
    ranks: torch.Tensor
    draws: torch.Tensor
    expanded: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    parents: torch.Tensor
    children: torch.Tensor
    depth_below: int


@dataclass(frozen=True)
class _Plan:
    """How to draft a topology.

    Attributes:
        levels: forwards in order.
        order: [N] int64. Where each node's token stands when root and levels are put one after another.
        slots: [N] int64. Slot of each expanded node in the draft's cache, from the root's; -1: never forwarded.
        draft_row: [1, N] int32. Place of each node among the expanded ones, -1: not expanded.
    """

    levels: tuple[_Level, ...]
    order: torch.Tensor
    slots: torch.Tensor
    draft_row: torch.Tensor


@lru_cache(maxsize=64)
def _plan(topology: Topology, catch_up: int, device: torch.device) -> _Plan:
    depths, parents = topology.depths, topology.parents
    by_depth = [[node for node, depth in enumerate(depths) if depth == at] for at in range(topology.max_depth + 1)]
    inner = set(parents)
    slots, levels = {0: 0}, []
    cache_parents, cache_ranks = list(range(-1, catch_up - 1)), [0] * catch_up
    for below, (level, children) in enumerate(zip(by_depth, by_depth[1:], strict=False), 1):
        expanded = [node for node in level if node in inner]
        for node in expanded:
            if node:
                slots[node] = len(slots)
                cache_parents.append(slots[parents[node]] + catch_up - 1)
                cache_ranks.append(topology.ranks[node])
        of_parent = [parents[node] for node in children]
        draws = [of_parent[:place].count(parent) for place, parent in enumerate(of_parent)]
        _, depth, ancestors = topology_tensors(Topology(tuple(cache_parents), tuple(cache_ranks)), device)
        levels.append(
            _Level(
                num_parents=len(expanded),
                num_ranks=1 + max(topology.ranks[node] for node in children),
                num_draws=1 + max(draws),
                parent_rows=torch.tensor([expanded.index(parent) for parent in of_parent], device=device),
                ranks=torch.tensor([topology.ranks[node] for node in children], device=device),
                draws=torch.tensor(draws, device=device),
                expanded=torch.tensor(
                    [place for place, node in enumerate(children) if node in inner], dtype=torch.int64, device=device
                ),
                depth=depth,
                ancestors=ancestors,
                parents=torch.tensor(expanded, device=device),
                children=torch.tensor(children, device=device),
                depth_below=below,
            )
        )
    rows = {node: row for row, node in enumerate(node for level in by_depth for node in level if node in inner)}
    listed = [node for level in by_depth for node in level]
    return _Plan(
        levels=tuple(levels),
        order=torch.tensor([listed.index(node) for node in range(topology.num_nodes)], device=device),
        slots=torch.tensor([slots.get(node, -1) for node in range(topology.num_nodes)], device=device),
        draft_row=torch.tensor(
            [[rows.get(node, -1) for node in range(topology.num_nodes)]], dtype=torch.int32, device=device
        ),
    )
