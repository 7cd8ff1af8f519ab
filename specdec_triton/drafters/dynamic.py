"""Drafts a dynamic tree with a model or a trained head, on the device. The shape follows the draft's probabilities in
every round.

Source: EAGLE-2 (Li et al. 2024, arXiv 2406.16858). Its draft is a trained head; here it may also be any model.

Letters: B sequences, N nodes kept, K nodes expanded per level and children of each, C candidate nodes, V vocabulary.
"""

from dataclasses import replace
from functools import lru_cache

import torch

from ..ops.reference import Acceptance
from ..tree import DraftTree, DynamicTree, Topology, bits_of_nodes, topology_tensors, with_children, with_rows
from .base import DraftContext
from .candidates import ranked
from .forwards import DraftForwards, slots_of
from .level_session import LevelSession


class DynamicSession(LevelSession):
    """Drafts a `DynamicTree`. Tokens are ranked by their probability after filters, see `candidates`; none is sampled.

    Args:
        forwards: the forwards of the draft.
        context: the call's sequences.
        tree: the tree to draft.
    """

    def __init__(self, forwards: DraftForwards, context: DraftContext, tree: DynamicTree):
        super().__init__(forwards, context, tree)
        self._kept, self._levels = tree.num_nodes, tree.max_depth
        self._constants = _constants(forwards.num_first, tree.width, self._levels, context.start.device)
        context.buffers.keep(self._constants)  # captured rounds read them
        # [B, N]: slot of each node in the draft's cache, relative to the root's slot; -1 if it was not forwarded
        slots = torch.full((len(context.start), tree.num_nodes), -1, device=context.start.device)
        self._slots = context.buffers.put("draft.slots", slots)

    draws = False

    def prepare(self, tree: Topology | DynamicTree | None = None, rows=None):
        """A requested `tree` limits the number of nodes kept and the number of levels."""
        wanted, context = self.topology, self.context
        self._kept, self._levels = wanted.num_nodes, wanted.max_depth
        if tree is not None:
            self._kept, self._levels = min(self._kept, tree.num_nodes), min(self._levels, tree.max_depth)
        if not context.fixed_shapes:
            self._levels = min(self._levels, context.useful_depth)
        if rows is not None and not rows.any():
            self._levels = 0
        self._kept = min(self._kept, wanted.num_candidates(self._levels))
        self.num_forwards += self._levels
        self._forwards.follow(self._levels, rows)
        return self._levels, self._kept, self._forwards.slots

    def draft(self) -> DraftTree:
        context, width, levels = self.context, self.topology.width, self._levels
        root, logits = self._forwards.begin() if levels else (self._forwards.advance(), None)
        batch, num_first = len(root), self._forwards.num_first
        mass = torch.zeros(batch, 1, device=root.device)
        tokens, scores, flags = [root], [mass], []  # of the candidates
        expanded, made = [torch.zeros_like(root)], 1  # the nodes that were expanded, and the number of candidates
        # the tree in the draft's cache: the chain that ends in the root, and the expanded nodes
        depth, ancestors, own_bits, slots = with_rows(batch, self._constants)
        fed, above = (
            root,
            expanded[0],
        )  # tokens of the expanded nodes, and their parents among those of the level before
        for level in range(1, levels + 1):
            if level > 1:
                logits = self._forwards.expand(fed, above, depth[:, : ancestors.shape[1]], ancestors)
            best, children, has_nan = ranked(context, logits[..., : context.vocab_size], width, level)
            flags.append(has_nan)
            mass, children = (mass[:, :, None] + best).flatten(1), children.flatten(1)
            tokens.append(children)
            scores.append(mass)
            if level == levels:
                break
            mass, place = mass.topk(width)
            fed, above = children.gather(1, place), place // width
            expanded.append(made + place)
            made += children.shape[1]
            first = ancestors.shape[1]
            parents = above + (num_first - 1 if level == 1 else first - width)
            ancestors = with_children(ancestors, parents, own_bits[:, first : first + width])
        if not levels:
            return DraftTree.root_only(root)
        numbers = torch.cat(expanded, 1)
        parents = torch.nn.functional.pad(numbers.repeat_interleave(width, 1), (1, 0), value=-1)
        candidates = torch.cat(tokens, 1), parents, torch.cat(scores, 1)
        tree, nodes = DraftTree.likeliest(*candidates, self._kept, levels, context.impl)
        of_candidates = torch.full_like(parents, -1).scatter_(1, numbers, slots[:, : numbers.shape[1]])
        self._slots[:, : self._kept].copy_(of_candidates.gather(1, nodes))
        return replace(tree, has_nan=torch.cat(flags, 1).any(1))

    def observe(self, tree: DraftTree, accepted: Acceptance, rows: torch.Tensor | None = None) -> None:
        self._forwards.observe(accepted, slots_of(self._slots if self._levels else None, tree, rows))


@lru_cache(maxsize=64)
def _constants(num_first: int, width: int, levels: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Tensors of the tree in the draft's cache, which has `num_first` nodes up to the root and T in all.

    Returns:
        depth [1, T] int64, the ancestor words of the first nodes [1, num_first, W] int64, the words of each node alone
        [1, T, W] int64, and the slots of the root and the expanded nodes, relative to the root's.
    """
    _, depth, ancestors = topology_tensors(Topology.chain(num_first - 1), torch.device("cpu"))
    expanded = max(levels - 1, 0) * width
    below = num_first + torch.arange(max(levels - 1, 0)).repeat_interleave(width)
    constants = (
        torch.cat([depth, below[None]], 1),
        ancestors,
        bits_of_nodes(num_first + expanded)[None],
        torch.arange(1 + expanded)[None],
    )
    return tuple(each.to(device) for each in constants)
