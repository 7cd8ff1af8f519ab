"""The steps of a round: draft, verify, accept, compact, emit.

The drafter proposes a tree of tokens for every sequence. The target verifies all of them in one forward. The longest
path that the target agrees with is accepted, and its keys and values move into place. Its tokens and the target's own
next token are appended to the text. A round therefore emits at least one token, and every token is the target's.

All data stays on the device. `Generation` prepares a round and reads its report; `GraphRunner` captures and replays it.

Letters: B sequences, N tree nodes, D edges on the longest path, V vocabulary.
"""

from dataclasses import dataclass

import torch

from .. import ops
from .._stats import Stats, records_time
from ..drafters import DraftContext, DraftSession
from ..drafters.base import check_draft
from ..ops.filters import Filters
from ..ops.reference import Acceptance
from ..tree import DraftTree
from .call import Call
from .scores import Scores
from .stateful_processors import Lockstep

Kept = dict[str, torch.Tensor]  # scores to keep [B, D + 1, V], by name


@dataclass(eq=False)
class RoundSteps:
    """The steps of a call's rounds."""

    call: Call
    context: DraftContext  # the call's sequences, updated in place
    budget: torch.Tensor  # [B] int64: number of tokens that each row may still emit, updated in place
    scores: Scores  # applies the call's logits processors
    lockstep: Lockstep | None  # runs processors that must be called exactly as by plain `generate`
    plain_steps: bool  # rounds without a draft may use the model's own attention, faster than the reference
    stats: Stats  # the time of each step is added to it
    session: DraftSession | None = None  # the drafter's session, once it has started

    def after_draft(self, tree: DraftTree) -> tuple[torch.Tensor, Kept]:
        """Run all steps after the draft. Returns the report for the host, and the scores to keep."""
        accepted, kept, self.context.states = self.verify_accept_compact(tree)
        self.session.observe(tree, accepted)
        return self.emit(tree, accepted), kept

    def verify_accept_compact(self, tree: DraftTree) -> tuple[Acceptance, Kept, tuple[torch.Tensor, ...]]:
        """Returns the accepted path, the scores to keep, and the hidden states that the drafter taps."""
        logits = self.verify(tree)
        states = self.context.target.states
        accepted, kept = self.accept(tree, logits)
        self.compact(tree, accepted)
        return accepted, kept, states

    @records_time("draft")
    def draft(self) -> DraftTree:
        """The drafter's tree of N tokens. Its root is the last emitted token."""
        tree = self.session.draft()
        if not self.session.trusted:
            check_draft(self.call.drafter, self.session, self.context, tree)
        return tree

    @records_time("verify")
    def verify(self, tree: DraftTree) -> torch.Tensor:
        """The target's logits [B, N, V] at every node."""
        # the root alone, in unpadded rows of equal length, needs no mask; the reference would spend time on it
        length = int(self.context.host_length[0])
        if self.plain_steps and tree.num_nodes == 1 and (self.context.host_length == length).all():
            return self.context.target.decode(tree.tokens, length)
        return self.context.target.forward(tree.tokens, tree.depth, tree.ancestors, self.context.length)

    @records_time("accept")
    def accept(self, tree: DraftTree, logits: torch.Tensor) -> tuple[Acceptance, Kept]:
        """The accepted path, and the scores to keep at the root and along the path."""
        call, context = self.call, self.context
        if self.lockstep:
            return self.lockstep.accept(tree, logits, self.scores.choose, self.scores.kept), {}
        scores, parents = self.scores.process(tree, logits)
        shape = {"max_depth": tree.max_depth, "budget": self.budget, "eos_ids": context.eos_ids, "impl": context.impl}
        if call.rule == "greedy":
            accepted = ops.accept_greedy(scores, tree.tokens, parents, **shape)
        else:
            sampled = {"seeds": context.seeds, "position": context.position, "filters": context.filters}
            drawn = {"sampling": tree.sampling, "draft_logits": tree.draft_logits, "draft_row": tree.draft_row}
            drawn["draft_filters"] = tree.draft_filters or Filters()
            accepted = ops.accept_sample(scores, tree.tokens, parents, rule=call.rule, **sampled, **drawn, **shape)
        return accepted, self.scores.along(accepted.path, scores, logits)

    @records_time("compact")
    def compact(self, tree: DraftTree, accepted: Acceptance) -> None:
        """Move the accepted keys and values behind the root's in the target's cache."""
        if not tree.is_chain:
            self.context.target.cache.compact(self.context.length, accepted.path, self.context.impl)

    @records_time("emit")
    def emit(self, tree: DraftTree, accepted: Acceptance) -> torch.Tensor:
        """Append the accepted tokens and the target's own token to the text. Returns the report for the host, see
        `ops.append_tokens`."""
        context = self.context
        return ops.append_tokens(
            context.tokens,
            context.length,
            context.position,
            self.budget,
            tree.tokens,
            tree.parents,
            accepted,
            eos_ids=context.eos_ids,
            draft_nan=tree.has_nan,
            impl=context.impl,
        )
