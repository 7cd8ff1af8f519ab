"""Acceptance rules: which draft tokens of a sampled round stay, and which token follows them.

Each rule is one function, to be read beside its paper. It sees a `SampledRound` and gives `(last, next_ids)`: the last
accepted node and the token after it. Cutting that at EOS and at a row's budget is common to all, in
`reference.accept_sample`. All rules but `typical` leave the target's distribution as it is.

What the papers have in common is here, too. At a node whose children are tried one after the other, the *residual* is
what the target's probabilities still have to give, unnormalised. It starts as the target's own probabilities. A child
token x that was drawn from the draft's probabilities is accepted with probability residual(x) / draft(x). If it is
rejected, the draft's probabilities are subtracted from the residual, and what falls below zero is cut. A token that
was chosen without sampling is a draw from a one-hot distribution: subtracting that takes the token out.

A child that its draft could not have drawn (probability 0: the support was exhausted, or the draft's logits hold NaN)
counts as padding. So do the children of a node whose target logits make no distribution: that node is tested as a leaf,
by the acceptance probability of its own token. A row that ends there is reported; in all others the node has no effect.

Letters: B sequences, N tree nodes, P expanded nodes, D edges on the longest path, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import noise

SAMPLING = ("none", "with", "without")
CHAIN_RULES = ("rejection", "block")

# Typical acceptance: the constants of Medusa's own code
TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3


def check_legal(rule: str, sampling: str, is_chain: bool) -> None:
    """Refuse a rule on a tree that it cannot use, or would be biased on.

    Args:
        rule: "greedy" or a name in `RULES`.
        sampling: how the tree's tokens came about: "none" (chosen without sampling: top-k, n-gram), or drawn from the
            draft's probabilities "with" or "without" replacement among siblings.
        is_chain: every node continues the one before.

    Raises:
        ValueError: names the rule and the tree.
    """
    if rule != "greedy" and rule not in RULES:
        raise ValueError(f"rule must be one of greedy, {', '.join(RULES)}, got {rule!r}")
    if sampling not in SAMPLING:
        raise ValueError(f'rule "{rule}": sampling must be one of {", ".join(SAMPLING)}, got {sampling!r}')
    if rule in CHAIN_RULES and not is_chain:
        drawn = {
            "none": "a tree of tokens chosen without sampling",
            "with": "a tree drawn with replacement",
            "without": "a tree drawn without replacement",
        }
        raise ValueError(
            f'rule "{rule}" takes a chain, got {drawn[sampling]}: use "multi_round" or "traversal", or a chain '
            "(DraftTree's is_chain says that it is one)"
        )


@dataclass(frozen=True)
class SampledRound:
    """What a rule sees of one round.

    Attributes:
        tokens, parents: [B, N] int64.
        max_depth: D.
        log_probs: nodes [B] int64 -> [B, V] fp32, the target's filtered log-probabilities after each row's node.
        draft_probs: [B, P, V] fp32, the draft's filtered probabilities; None for tokens chosen without sampling.
        draft_row: [B, N] int64, the row of `draft_probs` that a node's children were drawn from; -1 for none.
        replaces: siblings were drawn with replacement.
        seeds, position: [B] int64; the position is the root's.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    max_depth: int
    log_probs: Callable[[torch.Tensor], torch.Tensor]
    draft_probs: torch.Tensor | None
    draft_row: torch.Tensor | None
    replaces: bool
    seeds: torch.Tensor
    position: torch.Tensor

    @property
    def roots(self) -> torch.Tensor:
        """[B] int64 zeros: every row's root."""
        return torch.zeros_like(self.seeds)

    def probs(self, node: torch.Tensor) -> torch.Tensor:
        """[B] nodes -> [B, V] fp32: the target's probabilities."""
        return self.log_probs(node).exp()

    def draft(self, node: torch.Tensor) -> torch.Tensor | None:
        """[B] nodes -> [B, V] fp32: the draft's probabilities for their children, 0 if none; None without sampling."""
        if self.draft_probs is None:
            return None
        row = self.draft_row.gather(1, node[:, None])
        probs = self.draft_probs.gather(1, row.clamp(min=0)[..., None].expand(-1, -1, self.draft_probs.shape[2]))
        return torch.where(row >= 0, probs.squeeze(1), 0.0)


class Siblings(NamedTuple):
    """A node whose children are being tried, in each row.

    Attributes:
        residual: [B, V] fp32. What the target still has to give, unnormalised.
        mass: [B] fp32. Its sum.
        missing_mass: [B] fp32. 1 - the node's weight: the residual is normalised by mass + missing_mass.
        draft: [B, V] fp32. The draft's probabilities of what can still be drawn, unnormalised; None without sampling.
        draft_mass: [B] fp32. Their sum.
        tried: [B] bool. A child was tried.
    """

    residual: torch.Tensor
    mass: torch.Tensor
    missing_mass: torch.Tensor
    draft: torch.Tensor | None
    draft_mass: torch.Tensor
    tried: torch.Tensor


def first_of(round: SampledRound, node: torch.Tensor, weight: torch.Tensor) -> Siblings:
    """Before any child of `node` [B] is tried; `weight` [B] is the node's probability so far."""
    return Siblings(
        residual=weight[:, None] * round.probs(node),
        mass=weight,
        missing_mass=1 - weight,
        draft=round.draft(node),
        draft_mass=torch.ones_like(weight),
        tried=torch.zeros_like(node).bool(),
    )


def acceptance(siblings: Siblings, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] fp32 probability that the next child, `token` [B], is accepted; [B] bool, whether it could be drawn at all.

    min(1, residual(token) / draft(token)), both normalised; 0 where the residual is, even if nothing is left of it.
    """
    wanted, total = _at(siblings.residual, token), siblings.mass + siblings.missing_mass
    if siblings.draft is None:
        ratio, drawn = wanted / total, torch.ones_like(siblings.tried)
    else:
        offered = _at(siblings.draft, token)
        ratio, drawn = wanted * siblings.draft_mass / (total * offered), offered > 0
    return torch.where(wanted == 0, 0.0, ratio.clamp(max=1)), drawn


def leaf_accept_prob(siblings: Siblings) -> torch.Tensor:
    """[B] fp32 acceptance probability of a node itself, once its children are rejected: its weight, if none was tried.

    No mass is missing at the root, so its probability is 1 (or 0/0, which passes: see `passes`).
    """
    return siblings.mass / (siblings.mass + siblings.missing_mass)


def rejected(siblings: Siblings, token: torch.Tensor, replaces: bool) -> Siblings:
    """After the child `token` [B] was rejected: residual <- max(residual - draft, 0), and the token leaves the draft.

    The rejected token's own residual is zero by this rule, since its acceptance probability was below 1. It is set to
    exactly that.
    """
    residual, mass, missing_mass, draft, draft_mass, _ = siblings
    if draft is not None:
        residual = (residual - ((mass + missing_mass) / draft_mass)[:, None] * draft).clamp(min=0)
        if not replaces:
            draft = _without(draft, token)
            # summed anew: 1 minus the mass of likely tokens would keep no digit of a small remainder
            draft_mass = draft.sum(-1)
    residual = _without(residual, token)
    return Siblings(residual, residual.sum(-1), missing_mass, draft, draft_mass, torch.ones_like(siblings.tried))


def next_token(round: SampledRound, node: torch.Tensor, siblings: Siblings) -> torch.Tensor:
    """[B] int64: a recovered token from the residual at `node` [B], the bonus token where no child was tried.

    A residual of no mass can only come from rounding; the target's own distribution stands in for it.
    """
    use_target = ~siblings.tried | ~(siblings.mass > 0)
    scores = torch.where(use_target[:, None], round.log_probs(node), siblings.residual.log())
    purpose = torch.where(siblings.tried, noise.RECOVER, noise.BONUS)
    return (scores + noise.gumbel(round.seeds, round.position, node, purpose, scores.shape[-1])).argmax(-1)


def passes(round: SampledRound, node: torch.Tensor, accept_prob: torch.Tensor) -> torch.Tensor:
    """[B] bool: each row's `node` [B] passes with probability `accept_prob` [B], by the node's own random number.

    A probability of NaN passes.
    """
    return ~(noise.uniform(round.seeds, round.position, node, noise.ACCEPT) >= accept_prob)


def coupled(round: SampledRound) -> tuple[torch.Tensor, torch.Tensor]:
    """The target samples every node with noise that only (seed, position, token) decide; a child that matches stays.

    The text is the one that the target alone would sample with this noise, whatever was drafted. Siblings share their
    position's noise: that is what makes it so. Daliri, Musco and Suresh, "Coupling without communication and
    drafter-invariant speculative decoding" (2024).
    """
    nodes = torch.arange(round.tokens.shape[1], device=round.tokens.device)
    last, next_ids, walking = round.roots, None, torch.ones_like(round.seeds).bool()
    for depth in range(round.max_depth + 1):
        log_probs = round.log_probs(last)
        row = noise.gumbel(round.seeds, round.position + 1 + depth, 0, noise.COUPLED, log_probs.shape[-1])
        chosen = (log_probs + row).argmax(-1)
        next_ids = chosen if next_ids is None else torch.where(walking, chosen, next_ids)
        if depth < round.max_depth:
            matches = (round.parents == last[:, None]) & (round.tokens == chosen[:, None]) & (nodes > 0)
            walking = walking & matches.any(1)
            last = torch.where(walking, matches.int().argmax(1), last)
    return last, next_ids


def rejection(round: SampledRound) -> tuple[torch.Tensor, torch.Tensor]:
    """Down a chain: each token is accepted with probability min(1, target/draft), until one is not.

    Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding" (2023), algorithm 1;
    Chen et al., "Accelerating large language model decoding with speculative sampling" (2023), algorithm 2.
    """
    last, walking = round.roots, torch.ones_like(round.seeds).bool()
    siblings = first_of(round, last, torch.ones_like(walking).float())
    for node in range(1, round.tokens.shape[1]):
        token, child = round.tokens[:, node], torch.full_like(last, node)
        accept_prob, drawn = acceptance(siblings, token)
        walking = walking & drawn & (round.parents[:, node] == node - 1)
        accepted = walking & passes(round, child, accept_prob)
        siblings = _where(walking & ~accepted, rejected(siblings, token, replaces=True), siblings)
        walking = accepted
        siblings = _where(accepted, first_of(round, child, torch.ones_like(accept_prob)), siblings)
        last = torch.where(accepted, child, last)
    return last, next_token(round, last, siblings)


def block(round: SampledRound) -> tuple[torch.Tensor, torch.Tensor]:
    """A chain tested as a whole: the longest prefix that passes its own test stays.

    weight_i = min(1, weight_{i-1} target/draft) is the probability that prefix i may have. The last one passes with its
    weight, prefix i before it with S / (S + 1 - weight_i), where S is the mass of max(weight_i target - draft, 0):
    the residual, should it be the longest. Sun et al., "Block verification accelerates speculative decoding" (2024),
    algorithm 2.
    """
    last = round.roots
    weight, goes_on = torch.ones_like(last).float(), torch.ones_like(last).bool()
    siblings = first_of(round, last, weight)
    kept = siblings
    for node in range(1, round.tokens.shape[1] + 1):
        end = node == round.tokens.shape[1]
        if not end:
            token = round.tokens[:, node]
            accept_prob, drawn = acceptance(siblings, token)
            child_follows = goes_on & drawn & (round.parents[:, node] == node - 1)
            siblings = _where(child_follows, rejected(siblings, token, replaces=True), siblings)
        # node - 1 is tested after its child, if it has one: the test needs the residual that the child leaves
        here = torch.full_like(last, node - 1)
        passed = goes_on & passes(round, here, leaf_accept_prob(siblings))
        last, kept = torch.where(passed, here, last), _where(passed, siblings, kept)
        if not end:
            goes_on, weight = child_follows, accept_prob
            siblings = first_of(round, torch.full_like(last, node), weight)
    return last, next_token(round, last, kept)


def multi_round(round: SampledRound) -> tuple[torch.Tensor, torch.Tensor]:
    """Down a tree: sibling after sibling, each against the residual that the last one left.

    With replacement: Miao et al., "SpecInfer" (2024), algorithm 2. Without, the rejected token leaves the draft's
    distribution, which is renormalised: Chen et al., "Sequoia" (2024), algorithm 2. Siblings come in draw order, and
    children after their parents, so one pass over the nodes is the walk.
    """
    last = round.roots
    certain = torch.ones_like(last).float()
    siblings = first_of(round, last, certain)
    for node in range(1, round.tokens.shape[1]):
        token, child = round.tokens[:, node], torch.full_like(last, node)
        accept_prob, drawn = acceptance(siblings, token)
        is_tried = drawn & (round.parents[:, node] == last)
        accepted = is_tried & passes(round, child, accept_prob)
        siblings = _where(is_tried, rejected(siblings, token, round.replaces), siblings)
        siblings = _where(accepted, first_of(round, child, certain), siblings)
        last = torch.where(accepted, child, last)
    return last, next_token(round, last, siblings)


def traversal(round: SampledRound) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves first: a node is tested when all below it were rejected, by the probability of its whole path.

    A node's weight is its probability when its turn comes: min(1, residual/draft) at its parent, whose
    residual began with the parent's own weight. Its children take theirs from it; what they leave, S, passes with
    probability S / (S + 1 - weight), a leaf with its weight. If a node fails, its parent's residual loses the draft's
    probabilities, and the next sibling has its turn. Weng et al., "Traversal verification for speculative tree
    decoding" (arXiv 2505.12398), algorithm 1. On a chain this is `block`.

    A step enters a child or tests a node, so 2N - 1 of them end in every tree.
    """
    batch, num_nodes = round.tokens.shape
    nodes = torch.arange(num_nodes, device=round.tokens.device)
    here, done = round.roots, torch.zeros_like(round.seeds).bool()
    entered = (nodes == 0).expand(batch, -1)
    # each node's siblings, as they stand: the path from the root to `here` is in use
    opened = first_of(round, here, torch.ones_like(here).float())
    stack = Siblings(*(None if field is None else torch.stack([field] * num_nodes, dim=1) for field in opened))
    for _ in range(2 * num_nodes - 1):
        siblings = _pick(stack, here)
        waiting = (round.parents == here[:, None]) & ~entered
        child = waiting.int().argmax(1)
        accept_prob, drawn = acceptance(siblings, _at(round.tokens, child))
        has_child = waiting.any(1) & ~done
        enters = has_child & drawn
        entered = entered | ((nodes == child[:, None]) & has_child[:, None])

        tested = ~has_child & ~done
        passed = tested & passes(round, here, leaf_accept_prob(siblings))
        failed = tested & ~passed
        done = done | passed

        parent = _at(round.parents, here).clamp(min=0)
        back = rejected(_pick(stack, parent), _at(round.tokens, here), round.replaces)
        following = torch.where(enters, child, torch.where(failed, parent, here))
        after = _where(enters, first_of(round, child, accept_prob), _where(failed, back, siblings))
        _put(stack, following, after)
        here = following
    return here, next_token(round, here, _pick(stack, here))


def typical(round: SampledRound) -> tuple[torch.Tensor, torch.Tensor]:
    """LOSSY: a token stays if the target's probability of it exceeds min(epsilon, delta exp(-entropy)); deepest wins.

    Cai et al., "Medusa" (2024), section 2.3.1. Of equally deep paths the one whose last node comes first is taken.
    The token after it is the target's own, sampled.
    """
    num_nodes = round.tokens.shape[1]
    last = round.roots
    depth = [torch.zeros_like(last)]
    for node in range(1, num_nodes):
        parent = round.parents[:, node]
        log_probs = round.log_probs(parent.clamp(min=0))
        entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        threshold = (TYPICAL_DELTA * (-entropy).exp()).clamp(max=TYPICAL_EPSILON)
        kept = ~(_at(log_probs, round.tokens[:, node]).exp() <= threshold)
        above = _at(torch.stack(depth, dim=1), parent.clamp(min=0))
        depth.append(torch.where(kept & (parent >= 0) & (above >= 0), above + 1, -1))
    last = torch.stack(depth, dim=1).argmax(1)
    return last, next_token(round, last, first_of(round, last, torch.ones_like(last).float()))


RULES: dict[str, Callable[[SampledRound], tuple[torch.Tensor, torch.Tensor]]] = {
    "coupled": coupled,
    "rejection": rejection,
    "block": block,
    "multi_round": multi_round,
    "traversal": traversal,
    "typical": typical,
}
LOSSY_RULES = ("typical",)
# rules that weigh a sampled token by its draft probability
WEIGHING_RULES = ("rejection", "block", "multi_round", "traversal")


def _at(rows: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, token[:, None]).squeeze(1)


def _without(rows: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return rows.scatter(1, token[:, None], 0.0)


def _where(rows: torch.Tensor, one: Siblings, other: Siblings) -> Siblings:
    return Siblings(
        *(
            None if left is None else torch.where(rows.view(-1, *[1] * (left.dim() - 1)), left, right)
            for left, right in zip(one, other, strict=True)
        )
    )


def _pick(stack: Siblings, node: torch.Tensor) -> Siblings:
    rows = torch.arange(len(node), device=node.device)
    return Siblings(*(None if field is None else field[rows, node] for field in stack))


def _put(stack: Siblings, node: torch.Tensor, siblings: Siblings) -> None:
    rows = torch.arange(len(node), device=node.device)
    for field, value in zip(stack, siblings, strict=True):
        if field is not None:
            field[rows, node] = value
