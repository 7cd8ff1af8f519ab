"""Mutants: rules and drafts with mistakes found in real code. The tests must reject every one.

A mutant replaces functions of `rules` while a test runs (`monkeypatch`), or drafts a tree in a wrong way.
"""

import torch

from specdec_triton.ops import noise, rules
from specdec_triton.ops.filters import Filters

from . import table_models


def same_ratio(monkeypatch):
    """Every sibling is tested against target/draft, as if no earlier sibling had been rejected."""
    honest = rules.rejected

    def rejected(siblings, token, replaces):
        after = honest(siblings, token, replaces)
        # the first residual and draft stay for the next sibling; recovered tokens come from max(target - draft, 0)
        return siblings._replace(tried=after.tried)

    def next_token(round, node, siblings):
        left = (round.probs(node) - round.draft(node)).clamp(min=0)
        return recovered(round, node, siblings._replace(residual=left, mass=left.sum(-1)))

    recovered = rules.next_token
    monkeypatch.setattr(rules, "rejected", rejected)
    monkeypatch.setattr(rules, "next_token", next_token)


def no_residual(monkeypatch):
    """The token after a rejection is the target's own sample."""
    honest = rules.next_token
    monkeypatch.setattr(
        rules,
        "next_token",
        lambda round, node, siblings: honest(round, node, siblings._replace(mass=torch.zeros_like(siblings.mass))),
    )


def residual_of_the_wrong_row(monkeypatch):
    """The recovered token of a node comes from its parent's distributions."""
    honest = rules.next_token

    def next_token(round, node, siblings):
        parent = round.parents.gather(1, node[:, None]).squeeze(1).clamp(min=0)
        left = (round.probs(parent) - round.draft(parent)).clamp(min=0)
        return honest(round, node, siblings._replace(residual=left, mass=left.sum(-1)))

    monkeypatch.setattr(rules, "next_token", next_token)


def one_uniform_for_all_siblings(monkeypatch):
    """All siblings are tested with the random number of their parent."""
    honest = rules.passes

    def passes(round, node, chance):
        return honest(round, round.parents.gather(1, node[:, None]).squeeze(1), chance)

    monkeypatch.setattr(rules, "passes", passes)


def keyed_by_position(monkeypatch):
    """All noise is keyed by the position of the token, so that the next round uses the numbers of this one again."""
    uniform, gumbel = noise.uniform, noise.gumbel

    def moved(position, node, purpose):
        # in a chain, node i is i positions after the root; the token after node i and the draft of node i + 1 have the
        # same position
        offset = torch.as_tensor(node) + (torch.as_tensor(purpose) >= noise.RECOVER)
        return position + offset

    monkeypatch.setattr(
        noise,
        "uniform",
        lambda seeds, position, node, purpose: uniform(seeds, moved(position, node, purpose), 0, purpose),
    )
    monkeypatch.setattr(
        noise,
        "gumbel",
        lambda seeds, position, node, purpose, vocab: gumbel(seeds, moved(position, node, purpose), 0, purpose, vocab),
    )


def one_stream_for_draft_and_recovered(monkeypatch):
    """The recovered token of a node is chosen with the noise of its children's draws."""
    monkeypatch.setattr(noise, "RECOVER", noise.DRAFT)


def filters_on_one_side(models, tree, root, seeds, position, options):
    """The draft is drawn under filters, but the rule gets none for it."""
    draft = table_models.draft_tree(models, tree, root, seeds, position, options)
    draft.draft_filters = Filters()
    return draft


def cut_by_value(models, tree, root, seeds, position, options):
    """Three children of the root are drawn; the two with the larger draft probability stay, the larger first."""
    wide = table_models.sampled(
        models, table_models.Topology.from_widths((3,)), root, seeds, position, options, "without"
    )
    logits = models.draft[root[:, 0], root[:, 1]].gather(1, wide.tokens[:, 1:])
    logits = logits.masked_fill(wide.parents[:, 1:] < 0, -torch.inf)
    kept = 1 + logits.sort(descending=True, stable=True).indices[:, :2]
    nodes = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1)
    return table_models.Draft(
        tokens=wide.tokens.gather(1, nodes),
        parents=wide.parents.gather(1, nodes),
        contexts=wide.contexts.gather(1, nodes[..., None].expand(-1, -1, 2)),
        sampling=wide.sampling,
        draft_row=wide.draft_row[:, :1] * torch.tensor([1, 0, 0]).int() - torch.tensor([0, 1, 1]).int(),
        draft_filters=wide.draft_filters,
    )


def ranked_as_drawn(models, tree, root, seeds, position, options):
    """The draft's likeliest tokens, tested with its probabilities as if they were drawn."""
    draft = table_models.ranked(models, table_models.BRANCHES, root)
    draft.sampling, draft.draft_filters = "without", table_models.filters(options, len(root))
    draft.draft_row = torch.arange(draft.tokens.shape[1]).int().expand(len(root), -1).contiguous()
    return draft


# name -> (the mutation: a patch or a drafting function; rules; tree; options under which it must be rejected)
PATCHES = {
    "same-ratio siblings": (same_ratio, ("multi_round",), "tree with replacement", "plain"),
    "same-ratio siblings, drawn without": (same_ratio, ("multi_round",), "tree without replacement", "plain"),
    "no residual": (no_residual, ("rejection", "block", "multi_round", "traversal"), "sampled chain", "plain"),
    "no residual on a ranked tree": (no_residual, ("multi_round", "traversal"), "ranked tree", "plain"),
    "residual of the wrong row": (residual_of_the_wrong_row, ("rejection", "block"), "sampled chain", "plain"),
    "residual of the wrong row, tree": (
        residual_of_the_wrong_row, ("multi_round", "traversal"), "tree with replacement", "plain",
    ),
    "one uniform for all siblings": (
        one_uniform_for_all_siblings, ("multi_round",), "tree without replacement", "plain",
    ),
    "position-keyed noise": (keyed_by_position, ("block", "traversal"), "sampled chain", "plain"),
    "draft and recovered share a stream": (
        one_stream_for_draft_and_recovered, ("multi_round",), "tree without replacement", "plain",
    ),
    "draft and recovered share a stream, chain": (
        one_stream_for_draft_and_recovered, ("rejection", "block", "traversal"), "sampled chain without", "plain",
    ),
}  # fmt: skip
DRAFTS = {
    "top-p on one side": (filters_on_one_side, ("rejection", "block"), "sampled chain", "top_p"),
    "top-p on one side, tree": (filters_on_one_side, ("multi_round", "traversal"), "tree with replacement", "top_p"),
    "cut by value": (cut_by_value, ("multi_round", "traversal"), "tree without replacement", "plain"),
    "ranked as if drawn": (ranked_as_drawn, ("multi_round", "traversal"), "tree without replacement", "plain"),
}
