"""Drafts a topology level by level, with a draft model or a trained head."""

import torch
from torch.nn.functional import pad

from .. import ops
from ..forward.wrappers import num_weights
from ..ops.reference import Acceptance
from ..ops.rules import WEIGHING_RULES
from ..tree import DraftTree, Topology, topology_tensors, with_rows
from .base import DraftContext
from .forwards import DraftForwards, ForwardsSession, slots_of
from .length import ChainLength, in_steps
from .levels import Plan, plan_of


class LevelSession(ForwardsSession):
    """Drafts a topology level by level.

    Args:
        forwards: the forwards of the draft.
        context: the call's sequences.
        topology: the topology to draft. Levels that `forwards` does not have are not drafted: `tree="auto"` starts a
            session with the deepest tree that it might ask for.
        replacement: see `ModelDrafter`.
        length: if given, `topology` is a chain of its longest length, and it limits the number of tokens drafted in
            each round.

    Attributes:
        num_forwards: number of forwards that drafted. The prompt and catching up are not counted.
    """

    trusted = reusable = True

    def __init__(
        self,
        forwards: DraftForwards,
        context: DraftContext,
        topology: Topology,
        replacement: bool = False,
        length: ChainLength | None = None,
    ):
        self._forwards, self._length, self._stops = forwards, length, length
        context.buffers.agree("draft.confidence", None if length is None else length.confidence)
        self.on_device = length is None or not length.looks
        self.num_forwards = 0
        self.context = context
        self.max_nodes, self.max_depth = topology.num_nodes, topology.max_depth
        if forwards.max_depth is not None:
            self.max_depth = min(self.max_depth, forwards.max_depth)
        self.topology = topology
        self._sampling = "none"
        if context.rule in WEIGHING_RULES:
            self._sampling = "with" if replacement else "without"
        self._noise = "coupled" if context.rule == "coupled" else "none" if self._sampling == "none" else "draft"
        self._plans: dict[Topology, Plan] = {}  # never dropped, because captured rounds read their tensors

    @property
    def level_cost_ratio(self) -> float:
        return self._forwards.weights / num_weights(self.context.target.model)

    @property
    def draws(self) -> bool:
        return self._sampling != "none"

    def prepare(self, tree=None, rows=None):
        context, topology = self.context, self.topology if tree is None else tree
        self._stops = self._length if tree is None else None
        if self._stops is not None:
            self._levels = self._stops.next_round(rows)
            topology = Topology.chain(in_steps(self._levels, self._stops.longest))
        else:
            depth = self.max_depth if context.fixed_shapes else min(self.max_depth, context.useful_depth)
            topology = topology.limited(depth if rows is None or rows.any() else 0)
            self._levels = topology.max_depth
        if self.on_device:
            self.num_forwards += self._levels  # counted here, because `draft` does not run if the round is replayed
        self._forwards.follow(self._levels, rows)
        if topology not in self._plans:
            device = context.length.device
            self._plans[topology] = plan_of(topology, self._forwards.num_first, self._sampling, device)
            context.buffers.keep(self._plans[topology], topology_tensors(topology, device))
        self._drafted = topology
        return topology, self._levels, self._forwards.slots

    def draft(self) -> DraftTree:
        context, stops, plan = self.context, self._stops, self._plans[self._drafted]
        batch, device = len(context.length), context.length.device
        position = None if context.seeds is None else context.position
        drawn_from, flags = [], []
        going = drafted = None
        if stops is not None:
            going = stops.going()
            drafted = going.long()  # number of draft tokens of each row
        root, logits = self._forwards.begin() if self._levels else (self._forwards.advance(), None)
        tokens, fed = [root], root
        for level in plan.levels[: self._levels]:
            if level.depth_below > 1:
                depth, ancestors = with_rows(batch, (level.depth, level.ancestors))
                logits = self._forwards.expand(fed, level.parents, depth, ancestors)
            logits = logits[..., : context.vocab_size]
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
            self.num_forwards += len(drawn_from)
        drafts = torch.cat(tokens, 1)
        if stops is None:
            has_nan = torch.cat(flags, 1).any(1) if flags else None
            drafts = drafts if plan.order is None else drafts[:, plan.order]
            tree = DraftTree.from_topology(self._drafted, drafts, has_nan)
            draft_row = plan.draft_row.expand(batch, -1)
        else:
            node = torch.arange(drafts.shape[1], device=device)
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

    def observe_on_host(self, drafted, emitted):
        if self._length is not None:
            self._length.observe_on_host(drafted, emitted)

    def observe(self, tree: DraftTree, accepted: Acceptance, rows: torch.Tensor | None = None) -> None:
        slots = None if self._drafted.is_chain else self._plans[self._drafted].slots
        self._forwards.observe(accepted, slots_of(slots, tree, rows))
