"""Drafts a topology with a model, level by level, in the draft's own key-value cache or in the target's."""

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from .. import ops
from ..forward.runner import TreeRunner
from ..forward.wrappers import embedded_tokens
from ..ops.reference import Acceptance
from ..ops.rules import WEIGHING_RULES
from ..tree import DraftTree, Topology, topology_tensors
from .base import DraftContext, DraftSession
from .length import ChainLength, LengthRule, in_steps
from .levels import Plan, plan_of

# Each round begins with two tokens: the root is never in the draft's cache, and the last accepted token may be missing.
CATCH_UP = 2
CHUNK = 128  # largest number of tokens per forward while the draft catches up


class ModelSession(DraftSession):
    """Drafts a topology with a model, level by level.

    Args:
        model: the draft model.
        context: the call's sequences.
        topology: the topology to draft.
        shares_cache: True if the model consists of the target's first layers and uses the target's cache. It then has
            no prompt to run and no tokens to catch up with.
        replacement: see `ModelDrafter`.
        length: if given, `topology` is a chain and this rule limits the number of tokens drafted in each round.

    Attributes:
        forwards: number of forwards that drafted. The prompt and catching up are not counted.
    """

    trusted = reusable = True

    def __init__(
        self,
        model: PreTrainedModel,
        context: DraftContext,
        topology: Topology,
        shares_cache: bool = False,
        replacement: bool = False,
        length: LengthRule | None = None,
    ):
        self._length = self._stops = None if length is None else ChainLength(context, length)
        context.buffers.agree("draft.confidence", None if length is None else length.confidence)
        if self._length is not None:
            topology = Topology.chain(self._length.longest)
        self.on_device = self._length is None or not self._length.looks
        self.forwards = 0
        self.context, self.topology = context, topology
        self.max_nodes, self.max_depth = topology.num_nodes, topology.max_depth
        self._sampling = "none"
        if context.rule in WEIGHING_RULES:
            self._sampling = "with" if replacement else "without"
        self._noise = "coupled" if context.rule == "coupled" else "none" if self._sampling == "none" else "draft"
        self._shares_cache, self._catch_up = shares_cache, 1 if shares_cache else CATCH_UP
        columns = torch.arange(self._catch_up, device=context.start.device)
        self._catch_up_columns = context.buffers.put("draft.columns", columns)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or context.max_length
        known = embedded_tokens(model)
        self._last_token = known - 1
        self._knows_all = known >= max(context.vocab_size, embedded_tokens(context.target.model))
        last = (context.max_length - context.start).clamp(max=limit) - 1
        fixed, buffers = context.fixed_shapes, context.buffers
        self._runner = TreeRunner(
            model, context.start, last, context.impl, fixed, context.compiled, context.fused, buffers, "draft"
        )
        self._behind = 0  # rounds since the draft model last ran
        self._plans: dict[Topology, Plan] = {}  # never dropped, because captured rounds read their tensors
        if shares_cache:
            self._runner.cache = context.target.cache
        else:
            self._prefill()

    def _prefill(self) -> None:
        """Run the prompt through the draft model, left padding included, so that its cache has the target's columns."""
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
        """Number of cache slots that a round needs after the root's column."""
        return self._catch_up + self.max_nodes

    @property
    def level_cost_ratio(self) -> float:
        draft, target = (
            sum(weight.numel() for weight in runner.model.parameters())
            for runner in (self._runner, self.context.target)
        )
        return draft / target

    def prepare(self, tree=None):
        context, topology = self.context, self.topology if tree is None else tree
        self._stops = self._length if tree is None else None
        if self._stops is not None:
            self._levels = self._stops.next_round()
            topology = Topology.chain(in_steps(self._levels, self._stops.longest))
        else:
            topology = topology if context.fixed_shapes else topology.limited(context.useful_depth)
            self._levels = topology.max_depth
        if self.on_device:
            self.forwards += self._levels  # counted here, because `draft` does not run if the round is replayed
        self._follow(self._levels > 0)
        if topology not in self._plans:
            device = context.length.device
            self._plans[topology] = plan_of(topology, self._catch_up, self._sampling, device)
            context.buffers.keep(self._plans[topology], topology_tensors(topology, device))
        self._drafted = topology
        return topology, self._levels, self._runner.cache.slots

    def _follow(self, drafts: bool) -> None:
        """Reserve cache slots for the round. If it drafts, first run the tokens of earlier rounds that did not."""
        self._runner.cache.reserve(self.context.longest + self._room)
        if not drafts:
            self._behind += 1
        elif self._behind:
            self._catch_up_with(self._behind)
            self._behind = 0

    def _catch_up_with(self, rounds: int) -> None:
        """Run the tokens of the last `rounds` rounds, which drafted nothing: each emitted one token per unfinished
        row."""
        context = self.context
        if self._shares_cache:
            return
        # a finished row emitted fewer tokens, so this goes back too far; its first token is the limit
        first = torch.maximum(context.length - (self._catch_up - 1) - rounds, context.start)
        for done in range(0, rounds, CHUNK):
            base = first + done
            columns = base[:, None] + torch.arange(min(CHUNK, rounds - done), device=first.device)
            self._runner.forward_chain(self._embedded(context.tokens.gather(1, columns)), base)

    def draft(self) -> DraftTree:
        context, stops, plan = self.context, self._stops, self._plans[self._drafted]
        first, fed = self._catching_up()
        position = None if context.seeds is None else context.position
        tokens, drawn_from, flags = [fed[:, -1:]], [], []
        going = drafted = None
        if stops is not None:
            going = stops.going()
            drafted = going.long()  # number of draft tokens of each row
        for level in plan.levels[: self._levels]:
            depth, ancestors = (part.expand(len(first), *part.shape[1:]) for part in (level.depth, level.ancestors))
            logits = self._runner.forward(self._embedded(fed), depth, ancestors, first)
            logits = logits[:, -level.num_parents :, : context.vocab_size]
            found = ops.draft_topk(
                logits,
                level.num_candidates,
                filters=context.filters,
                noise=self._noise,
                seeds=context.seeds,
                position=position,
                depth=level.depth_below,
                nodes=level.nodes,
                rows=level.rows,
                with_log_probs=stops is not None,
                impl=context.impl,
            )
            candidates = found.tokens.flatten(1)
            tokens.append(candidates)
            flags.append(found.has_nan)
            drawn_from.append(logits)
            fed = candidates if level.expanded is None else candidates[:, level.expanded]
            if stops is not None:
                going = stops.goes_on(going, level.depth_below, candidates[:, 0], found.log_probs[:, 0, 0].exp())
                drafted = drafted + going
                if stops.looks and not going.any():
                    break
        if not self.on_device:
            self.forwards += len(drawn_from)
        drafts = torch.cat(tokens, 1)
        if stops is None:
            has_nan = torch.cat(flags, 1).any(1) if flags else None
            drafts = drafts if plan.order is None else drafts[:, plan.order]
            tree = DraftTree.from_topology(self._drafted, drafts, has_nan)
            draft_row = plan.draft_row.expand(len(first), -1)
        else:
            node = torch.arange(drafts.shape[1], device=first.device)
            expanded = node < drafted[:, None]
            # logits after the end of a row's draft are undefined
            has_nan = (torch.cat(flags, 1) & expanded[:, : len(flags)]).any(1) if flags else None
            tree = DraftTree.chain(drafts, drafted, has_nan)
            draft_row = torch.where(expanded, node, -1).int()
        if context.rule not in WEIGHING_RULES or not drawn_from:
            return tree
        draft_logits = torch.cat(drawn_from, 1)
        unknown = context.vocab_size - draft_logits.shape[-1]  # tokens that the draft's vocabulary lacks; never drawn
        if unknown:
            draft_logits = pad(draft_logits, (0, unknown), value=float("-inf"))
        return tree.drawn(self._sampling, draft_logits, draft_row, context.filters)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens, or the draft's last token for those that it has no embedding of."""
        return tokens if self._knows_all else tokens.clamp(max=self._last_token)

    def _catching_up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot [B] in the draft's cache at which a round begins, and the tokens [B, catch-up] that it begins with.
        The root is the last of them."""
        first = self.context.length - (self._catch_up - 1)
        return first, self.context.tokens.gather(1, first[:, None] + self._catch_up_columns)

    def observe_on_host(self, drafted, emitted):
        if self._length is not None:
            self._length.observe_on_host(drafted, emitted)

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        if self._shares_cache or tree.is_chain or tree.max_depth == 0:
            return
        slots = self._plans[self._drafted].slots
        path = torch.where(accepted.path >= 0, slots[accepted.path.clamp(min=0).long()], -1).int()
        self._runner.cache.compact(self.context.length, path, self.context.impl)
