"""Suffix decoding with a fallback: a draft model or a trained head drafts for the sequences that have no good match.

Source: the hybrid mode of SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975).

Letters: B sequences, N tree nodes.
"""

from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch.nn.functional import pad

from ..ops.reference import Acceptance
from ..tree import WORD_BITS, DraftTree, DynamicTree, Topology, bits_of_nodes
from .base import DraftContext, Drafter, DraftSession
from .forwards import ForwardsSession

# The threshold is estimated if the user sets none. FIRST_ACCEPTED is the number of tokens that are expected of the
# fallback's first draft, LEARNING the weight of the latest round in later estimates, and LEAST the lowest threshold.
# Chosen by replaying greedy texts of SmolLM2-135M-Instruct on 22 prompts (Spec-Bench, and edits of one text). The
# fallback drafted 5 tokens, each right with a probability of 0.6, 0.75 or 0.9, and a level took 0.08 or 0.33 of the
# time of a plain step. The estimate emitted -1 to 29% more tokens per second than the constant 1.5, and 0 to 20% more
# than the constant 1.
FIRST_ACCEPTED, LEARNING, LEAST = 2.0, 0.1, 0.25


class FallbackSession(DraftSession):
    """Suffix trees for the sequences that have a good match, and another drafter's draft for the others.

    A sequence takes its suffix tree if the expected number of accepted tokens reaches a threshold. The host decides
    before anything is drafted. By default, the threshold is the number at which both kinds of drafts emit equally many
    tokens per second: (1 + a) / (1 + d * c) - 1, if the fallback's recent drafts had a tokens accepted on average, and
    took d levels of the cost c (`level_cost_ratio`).

    If no sequence needs the fallback, its draft does not run. A head then only processes the tokens that were accepted
    last. A draft model does nothing, and runs the tokens that it lacks before its next draft.

    If the fallback ranks its tokens, each sequence is decided alone, and one `DraftTree` holds both kinds of trees. If
    it draws them from its probabilities, all sequences take the same kind, because a `DraftTree` is drawn as a whole
    or not at all. They take their suffix trees if the mean expectation reaches the threshold.

    Why this is lossless: the decision depends only on tokens that were emitted in earlier rounds. Given those, each
    rule keeps the target's distribution for either kind of draft, and the noise of the round is independent of the
    decision. A decision that depends on the tokens which the fallback draws in the same round would bias the text.

    Args:
        suffix: the `SuffixSession`.
        fallback: the other drafter, which `follows_text`.
        below: the threshold, or None for the estimate above.
        context: the call's sequences.
        tree: the shape that the fallback drafts, see `Drafter.start`.
    """

    trusted = True

    def __init__(
        self,
        suffix: Any,
        fallback: Drafter,
        below: float | None,
        context: DraftContext,
        tree: Topology | DynamicTree | int | None = None,
    ):
        context.verified_depth = suffix.max_depth
        session = cast(ForwardsSession, fallback.start(context, tree))
        self._suffix, self._fallback, self._below, self.context = suffix, session, below, context
        self._level_cost, self._levels, self._accepted = session.level_cost_ratio, 0, FIRST_ACCEPTED
        self.max_nodes = max(suffix.max_nodes, session.max_nodes)
        self.max_depth = max(suffix.max_depth, session.max_depth)

    def prepare(self, tree=None):
        """Decide which rows take the fallback's draft, and prepare it."""
        self._suffix.prepare()
        self._proposals = self._suffix.cut(self._suffix.propose())
        self._rows = self._rows_of_fallback()
        return self._fallback.prepare(tree, self._rows)

    def _rows_of_fallback(self) -> np.ndarray:
        """[B] bool: True for the rows that take the fallback's draft."""
        expected = np.array([proposal.expected for proposal in self._proposals])
        live = self.context.host_budget > 1  # other rows emit no draft token
        if not live.any():
            return live
        rows = live & ((expected[live].mean() if self._fallback.draws else expected) < self._threshold)
        return np.ones_like(rows) if rows[live].all() else rows

    @property
    def _threshold(self) -> float:
        if self._below is not None:
            return self._below
        return max((1 + self._accepted) / (1 + self._levels * self._level_cost) - 1, LEAST)

    def draft(self) -> DraftTree:
        tree, self._mask = self._fallback.draft(), None
        if self._rows.any():
            self._levels = tree.max_depth
        if not self._rows.all():
            taken = [
                proposal.first(1) if falls_back else proposal
                for proposal, falls_back in zip(self._proposals, self._rows.tolist(), strict=True)
            ]
            copied = self._suffix.tree_of(taken)
            if self._rows.any():
                self._mask = torch.from_numpy(self._rows).to(copied.tokens.device)
                tree = merged(tree, copied, self._mask)
            else:
                tree = copied
        if self._suffix.times is not None:
            self._suffix.times.drafted(tree.num_nodes)
        return tree

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        self._suffix.observe(tree, accepted)
        self._fallback.observe(tree, accepted, self._mask)

    def observe_on_host(self, drafted, emitted):
        """The fallback does not learn from rows that verified another draft: to it, they are as finished rows."""
        self._suffix.observe_on_host(drafted, emitted)
        own = [count * falls_back for count, falls_back in zip(emitted, self._rows.tolist(), strict=True)]
        self._fallback.observe_on_host(drafted, own)
        accepted = [count - 1 for count in own if count]
        if accepted:
            self._accepted += LEARNING * (sum(accepted) / len(accepted) - self._accepted)

    def finish(self):
        self._suffix.finish()
        self._fallback.finish()


def merged(one: DraftTree, other: DraftTree, rows: torch.Tensor) -> DraftTree:
    """The trees of `one` in `rows` [B] bool, and those of `other` in all other rows. Neither may be drawn."""
    width = max(one.num_nodes, other.num_nodes)
    one, other = padded(one, width), padded(other, width)
    chosen = rows[:, None]
    return DraftTree(
        tokens=torch.where(chosen, one.tokens, other.tokens),
        parents=torch.where(chosen, one.parents, other.parents),
        depth=torch.where(chosen, one.depth, other.depth),
        ancestors=torch.where(chosen[..., None], one.ancestors, other.ancestors),
        max_depth=max(one.max_depth, other.max_depth),
        is_chain=one.is_chain and other.is_chain,
        has_nan=None if one.has_nan is None else one.has_nan & rows,
    )


def padded(tree: DraftTree, num_nodes: int) -> DraftTree:
    """The tree with padding up to this number of nodes. Flags and draft probabilities are not kept."""
    batch, own = tree.tokens.shape
    more, words = num_nodes - own, -(-num_nodes // WORD_BITS)
    bits = _bits(num_nodes, tree.tokens.device)[own:].expand(batch, -1, -1)
    ancestors = pad(tree.ancestors, (0, words - tree.ancestors.shape[2]))
    return DraftTree(
        tokens=pad(tree.tokens, (0, more)),
        parents=pad(tree.parents, (0, more), value=-1),
        depth=pad(tree.depth, (0, more)),
        ancestors=torch.cat([ancestors, bits], 1),
        max_depth=tree.max_depth,
        is_chain=tree.is_chain,
        has_nan=tree.has_nan,
    )


@lru_cache(maxsize=64)
def _bits(num_nodes: int, device: torch.device) -> torch.Tensor:
    return bits_of_nodes(num_nodes).to(device)
