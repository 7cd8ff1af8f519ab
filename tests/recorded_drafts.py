"""Records the drafts of a call, and compares those of dynamic trees with a literal statement."""

from typing import NamedTuple

import torch

from literal_eagle import LiteralDraft
from specdec_triton.tree import DraftTree

# The drafter computes in fp32, the literal statement in fp64. Drafts in which two scores differ by less than TOLERANCE
# are not compared, and scores of the others may differ by ERROR.
TOLERANCE, ERROR = 5e-4, 2e-3


class Drafted(NamedTuple):
    """The draft for one row in one round.

    Attributes:
        row: the row.
        text: its tokens without padding, the root included.
        budget: the number of tokens that it may still emit.
        tree: the trees of the round.
        scores: [B, N] scores of the nodes of a dynamic tree, else None.
    """

    row: int
    text: list[int]
    budget: int
    tree: DraftTree
    scores: torch.Tensor | None


def watch(monkeypatch, drafter, before, after):
    """Each later draft of the drafter calls `before()`, and then `after(row, text, budget, tree)` for each unfinished
    row. The arguments are those of `Drafted`."""
    start = type(drafter).start

    def starting(self, context, *args):
        session = start(self, context, *args)
        draft = session.draft

        def drafting():
            before()
            tree = draft()
            for row, budget in enumerate(context.host_budget.tolist()):
                text = context.tokens[row, context.start[row] : context.length[row] + 1].tolist()
                if budget:
                    after(row, text, budget, tree.clone())
            return tree

        session.draft = drafting
        return session

    monkeypatch.setattr(type(drafter), "start", starting)


def record(monkeypatch, drafter):
    """A list to which each later draft of the drafter appends a `Drafted` for each unfinished row."""
    drafts, scores, likeliest = [], [], DraftTree.likeliest

    def choosing(tokens, parents, given, *rest):
        tree, kept = likeliest(tokens, parents, given, *rest)
        scores.append(given.gather(1, kept))
        return tree, kept

    def after(*drafted):
        drafts.append(Drafted(*drafted, scores[0].clone() if scores else None))

    monkeypatch.setattr(DraftTree, "likeliest", staticmethod(choosing))
    watch(monkeypatch, drafter, scores.clear, after)
    return drafts


def agreements(
    drafts,
    head,
    target,
    mistake="",
    width=4,
    rank=None,
    first=0,
    limit=24,
    literal_draft=LiteralDraft,
    error=ERROR,
):
    """For each draft, whether it is the one of the literal statement. Left out are drafts deeper than the rest of the
    text, and those that a rounding error could have changed.

    Args:
        drafts: see `record`.
        head, target, mistake, first: see `LiteralDraft`.
        width: of the dynamic tree.
        rank: a function that makes `rank` of `LiteralDraft.dynamic` from a draft; None for log-probabilities.
        limit: at most so many drafts are compared.
        literal_draft: the literal statement; `head` is its first argument.
        error: the largest difference between scores.
    """
    found, close = [], 0
    for drafted in drafts:
        row, levels = drafted.row, drafted.tree.max_depth
        if levels == 0 or drafted.budget <= levels or len(found) == limit:
            continue
        literal = literal_draft(head, target, drafted.text, mistake, first)
        ranked = None if rank is None else rank(drafted)
        tokens, parents, scores = literal.dynamic(drafted.tree.num_nodes, width, levels, ranked)
        if literal.margin < TOLERANCE:
            close += 1
            continue
        found.append(
            drafted.tree.tokens[row].tolist() == tokens
            and drafted.tree.parents[row].tolist() == parents
            and torch.allclose(drafted.scores[row].double(), torch.tensor(scores).double(), rtol=0, atol=error)
        )
    assert close <= 2 * len(found), f"{close} of {close + len(found)} drafts had nodes of equal scores"
    return found
