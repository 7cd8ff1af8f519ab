"""Drafts a dynamic tree with a model or a trained head, on the device. The shape follows the draft's probabilities in
every round.

Source: EAGLE-2 (Li et al. 2024, arXiv 2406.16858). Its draft is a trained head; here it may also be any model.

Letters: B sequences, N nodes kept, K nodes expanded per level and children of each, C candidate nodes, V vocabulary.
"""

from dataclasses import replace

import torch

from .. import ops
from ..ops.filters import filtered_log_probs
from ..ops.noise import COUPLED, gumbel
from ..ops.reference import Acceptance
from ..tree import DraftTree, DynamicTree, Topology, topology_tensors, with_children
from .base import DraftContext
from .forwards import DraftForwards
from .level_session import LevelSession


class DynamicSession(LevelSession):
    """Drafts a `DynamicTree`. Tokens are ranked by their probability after filters; none is sampled.

    Under "coupled", the noise that the target will use is added to the log-probabilities first, and the score of a node
    is the log-softmax of the sum. This is a heuristic. If the two models agree, siblings are in the target's order, but
    the scores are not calibrated probabilities, so the choice of paths may not be optimal.

    Args:
        forwards: the forwards of the draft.
        context: the call's sequences.
        tree: the tree to draft.
    """

    def __init__(self, forwards: DraftForwards, context: DraftContext, tree: DynamicTree):
        super().__init__(forwards, context, tree)
        self._kept, self._levels = tree.num_nodes, tree.max_depth
        # every level's tree begins with this chain; stored here because captured rounds read its tensors
        self._path = topology_tensors(Topology.chain(forwards.num_first - 1), context.start.device)
        context.buffers.keep(self._path)
        # [B, N]: slot of each node in the draft's cache, relative to the root's slot; -1 if it was not forwarded
        slots = torch.full((len(context.start), tree.num_nodes), -1, device=context.start.device)
        self._slots = context.buffers.put("draft.slots", slots)

    def prepare(self, tree: Topology | DynamicTree | None = None):
        """A requested `tree` limits the number of nodes kept and the number of levels."""
        wanted, context = self.topology, self.context
        self._kept, self._levels = wanted.num_nodes, wanted.max_depth
        if tree is not None:
            self._kept, self._levels = min(self._kept, tree.num_nodes), min(self._levels, tree.max_depth)
        if not context.fixed_shapes:
            self._levels = min(self._levels, context.useful_depth)
        self._kept = min(self._kept, wanted.num_candidates(self._levels))
        self.num_forwards += self._levels
        self._forwards.follow(self._levels > 0)
        return self._levels, self._kept, self._forwards.cache.slots

    def draft(self) -> DraftTree:
        context, width, above_root = self.context, self.topology.width, self._forwards.num_first - 1
        root, logits = self._forwards.begin() if self._levels else (self._forwards.advance(), None)
        batch, device = len(root), root.device
        # the candidates so far; slots are -1 for nodes that are not forwarded
        tokens, parents, scores = [root], [torch.full_like(root, -1)], [torch.zeros(batch, 1, device=device)]
        slots = [torch.zeros_like(root)]
        flags = []
        # the tree in the draft's cache: the chain that ends in the root, and the expanded nodes
        _, depth, ancestors = (part.expand(batch, *part.shape[1:]) for part in self._path)
        at, made = torch.zeros_like(root), 1  # the nodes to expand, and the number of candidates so far
        fed, above = root, at  # their tokens, and their parents among the nodes that were expanded before
        mass, row = scores[0], torch.full_like(root, above_root)
        for level in range(1, self._levels + 1):
            if level > 1:
                logits = self._forwards.expand(fed, above, depth, ancestors)
            best, children, has_nan = self._candidates(logits[..., : context.vocab_size], level)
            flags.append(has_nan)
            mass, children = (mass[:, :, None] + best).flatten(1), children.flatten(1)
            tokens.append(children)
            parents.append(at.repeat_interleave(width, 1))
            scores.append(mass)
            slots.append(torch.full_like(children, -1))
            if level == self._levels:
                break
            mass, place = mass.topk(width)
            slot = 1 + (level - 1) * width + torch.arange(width, device=device)
            slots[-1].scatter_(1, place, slot.expand(batch, -1))
            fed, at, made = children.gather(1, place), made + place, made + children.shape[1]
            above = place // width
            ancestors = with_children(ancestors, row.gather(1, above))
            row = (slot + above_root).expand(batch, -1)
            depth = torch.cat([depth, torch.full_like(fed, above_root + level)], 1)
        tree, nodes = DraftTree.likeliest(
            torch.cat(tokens, 1),
            torch.cat(parents, 1),
            torch.cat(scores, 1),
            self._kept,
            self._levels,
        )
        self._slots[:, : self._kept].copy_(torch.cat(slots, 1).gather(1, nodes))
        return replace(tree, has_nan=torch.cat(flags, 1).any(1) if flags else None)

    def _candidates(self, logits: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The most likely choices of the target at `depth`, from the draft's logits [B, n, V] of n parents.

        Returns:
            Log-probabilities [B, n, K], tokens [B, n, K] int64, and [B, n] bool, True if logits are NaN.
        """
        context, width = self.context, self.topology.width
        if context.rule != "coupled":
            found = ops.draft_topk(logits, width, filters=context.filters, with_log_probs=True, impl=context.impl)
            return found.log_probs, found.tokens, found.has_nan
        noise = gumbel(context.seeds, context.position + depth, 0, COUPLED, logits.shape[-1])[:, None]
        best, tokens = (filtered_log_probs(logits, context.filters) + noise).log_softmax(-1).topk(width)
        return best, tokens, best[..., 0].isnan()

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        self._forwards.observe(accepted, self._slots if tree.max_depth else None)
