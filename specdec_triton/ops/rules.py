"""Acceptance rules: they decide which draft tokens of a sampled round are accepted, and choose the token after them.

Each rule is one function that follows the paper cited in its docstring. It takes a `SampledRound` and returns
`(last, next_ids)`: the last accepted node and the token after it. `reference.accept_sample` then cuts the result at EOS
and at each row's budget, for all rules. All rules except `typical` preserve the target's distribution.

The parts that the papers have in common are also here. The children of a node are tried one after another. The
*residual* of the node is the part of the target's probabilities that has not been used yet, unnormalised. It starts as
the target's probabilities. A child token x that was drawn from the draft's probabilities is accepted with probability
residual(x) / draft(x). If it is rejected, the draft's probabilities are subtracted from the residual, and negative
entries are set to 0. A token that was chosen without sampling counts as a draw from a one-hot distribution, so its
rejection removes it from the residual.

A child whose token has draft probability 0 counts as padding. This happens if the support of the draft is exhausted or
the draft's logits hold NaN. The children of a node whose target logits do not define a distribution also count as
padding. Such a node is tested as a leaf, by the acceptance probability of its own token. If a row ends there, `has_nan`
reports it; otherwise the node has no effect.

Letters: B sequences, N tree nodes, P expanded nodes, D edges on the longest path, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import noise

SAMPLING = ("none", "with", "without")
CHAIN_RULES = ("rejection", "block")

# Typical acceptance: the constants in Medusa's code
TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3


def check_legal(rule: str, sampling: str, is_chain: bool) -> None:
    """Refuse a rule that cannot be applied to a tree or would give biased samples.

    Args:
        rule: "greedy" or a name in `RULES`.
        sampling: how the tree's tokens were chosen. "none": without sampling, for example by top-k or n-gram. "with"
            or "without": siblings were drawn from the draft's probabilities with or without replacement.
        is_chain: True if every node is the child of the node before it.

    Raises:
        ValueError: the rule does not accept such a tree; the message names both.
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
            f'rule "{rule}" needs a chain, got {drawn[sampling]}: use "multi_round" or "traversal", or draft a chain '
            "and set is_chain of the DraftTree"
        )


@dataclass(frozen=True)
class SampledRound:
    """The inputs of a rule.

    Attributes:
        tokens, parents: [B, N] int64.
        max_depth: D.
        log_probs: function from nodes [B] int64 to [B, V] fp32, the target's filtered log-probabilities after each
            row's node.
        draft_probs: [B, P, V] fp32. The draft's filtered probabilities; None if tokens were chosen without sampling.
        draft_row: [B, N] int64. The row of `draft_probs` that a node's children were drawn from; -1 if it has none.
        replaces: True if siblings were drawn with replacement.
        seeds, position: [B] int64. Seed of each row, and position of its root.
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
        """[B] int64 zeros: the root of every row."""
        return torch.zeros_like(self.seeds)

    def probs(self, node: torch.Tensor) -> torch.Tensor:
        """[B] nodes -> [B, V] fp32: the target's probabilities."""
        return self.log_probs(node).exp()

    def draft(self, node: torch.Tensor) -> torch.Tensor | None:
        """[B] nodes -> [B, V] fp32: the draft's probabilities for the children of each node, 0 for nodes that were not
        expanded. None if tokens were chosen without sampling."""
        if self.draft_probs is None:
            return None
        row = self.draft_row.gather(1, node[:, None])
        probs = self.draft_probs.gather(1, row.clamp(min=0)[..., None].expand(-1, -1, self.draft_probs.shape[2]))
        return torch.where(row >= 0, probs.squeeze(1), 0.0)


class Siblings(NamedTuple):
    """The state of one node per row whose children are being tried.

    Attributes:
        residual: [B, V] fp32. The part of the target's probabilities that has not been used yet, unnormalised.
        mass: [B] fp32. Sum of the residual.
        missing_mass: [B] fp32. 1 - the node's weight. The residual is normalised by mass + missing_mass.
        draft: [B, V] fp32. The draft's probabilities of tokens that can still be drawn, unnormalised; None if tokens
            were chosen without sampling.
        draft_mass: [B] fp32. Sum of `draft`.
        tried: [B] bool. True if a child was tried.
    """

    residual: torch.Tensor
    mass: torch.Tensor
    missing_mass: torch.Tensor
    draft: torch.Tensor | None
    draft_mass: torch.Tensor
    tried: torch.Tensor


def first_of(round: SampledRound, node: torch.Tensor, weight: torch.Tensor) -> Siblings:
    """The state of `node` [B] before any child is tried. `weight` [B] is the probability with which the node's path may
    be accepted."""
    return Siblings(
        residual=weight[:, None] * round.probs(node),
        mass=weight,
        missing_mass=1 - weight,
        draft=round.draft(node),
        draft_mass=torch.ones_like(weight),
        tried=torch.zeros_like(node).bool(),
    )


def acceptance(siblings: Siblings, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The acceptance probability of the next child, whose token is `token` [B].

    Returns:
        [B] fp32: min(1, residual(token) / draft(token)), both normalised; 0 if residual(token) is 0, even if the whole
        residual is 0. And [B] bool: True if the draft's probability of the token is above 0.
    """
    wanted, total = _at(siblings.residual, token), siblings.mass + siblings.missing_mass
    if siblings.draft is None:
        ratio, drawn = wanted / total, torch.ones_like(siblings.tried)
    else:
        offered = _at(siblings.draft, token)
        ratio, drawn = wanted * siblings.draft_mass / (total * offered), offered > 0
    return torch.where(wanted == 0, 0.0, ratio.clamp(max=1)), drawn


def leaf_accept_prob(siblings: Siblings) -> torch.Tensor:
    """[B] fp32: acceptance probability of a node after all its children were rejected. It is the node's weight if no
    child was tried.

    The missing mass of the root is 0, so its probability is 1, or 0/0 = NaN, which passes (see `passes`).
    """
    return siblings.mass / (siblings.mass + siblings.missing_mass)


def rejected(siblings: Siblings, token: torch.Tensor, replaces: bool) -> Siblings:
    """The state after the child with `token` [B] was rejected: residual <- max(residual - draft, 0). Without
    replacement, the token is also removed from the draft.

    The residual of the rejected token itself is 0 by this formula, because its acceptance probability was below 1. It
    is set to 0 explicitly, so that rounding cannot leave a remainder.
    """
    residual, mass, missing_mass, draft, draft_mass, _ = siblings
    if draft is not None:
        residual = (residual - ((mass + missing_mass) / draft_mass)[:, None] * draft).clamp(min=0)
        if not replaces:
            draft = _without(draft, token)
            # summed again, because 1 minus the mass of likely tokens would lose all digits of a small remainder
            draft_mass = draft.sum(-1)
    residual = _without(residual, token)
    return Siblings(residual, residual.sum(-1), missing_mass, draft, draft_mass, torch.ones_like(siblings.tried))


def next_token(round: SampledRound, node: torch.Tensor, siblings: Siblings) -> torch.Tensor:
    """[B] int64: a recovered token drawn from the residual at `node` [B], or the bonus token if no child was tried.

    A residual whose sum is 0 can only result from rounding. The target's own distribution then replaces it.
    """
    use_target = ~siblings.tried | ~(siblings.mass > 0)
    scores = torch.where(use_target[:, None], round.log_probs(node), siblings.residual.log())
    purpose = torch.where(siblings.tried, noise.RECOVER, noise.BONUS)
    return (scores + noise.gumbel(round.seeds, round.position, node, purpose, scores.shape[-1])).argmax(-1)


def passes(round: SampledRound, node: torch.Tensor, accept_prob: torch.Tensor) -> torch.Tensor:
    """[B] bool: True with probability `accept_prob` [B], by the random number of `node` [B]. A probability of NaN gives
    True.
    """
    return ~(noise.uniform(round.seeds, round.position, node, noise.ACCEPT) >= accept_prob)


def coupled(round: SampledRound) -> tuple[torch.Tensor, torch.Tensor]:
    """The target samples a token at every node with noise that depends only on (seed, position, token). A child with
    that token is accepted.

    The text is the one that the target alone would sample with this noise, whatever was drafted, because all nodes at a
    position use the same noise. Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant
    speculative decoding" (2024).
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
    """Walk down a chain. Each token is accepted with probability min(1, target/draft), until one is rejected.

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
    """Test every prefix of a chain, and accept the longest prefix that passes.

    The weight of prefix i is weight_i = min(1, weight_{i-1} target/draft). The full chain passes with probability equal
    to its weight. A shorter prefix i passes with probability S / (S + 1 - weight_i). Here S is the sum of
    max(weight_i target - draft, 0), which is the residual if prefix i is accepted. Sun et al., "Block verification
    accelerates speculative decoding" (2024), algorithm 2.
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
    """Walk down a tree. Siblings are tried one after another; each rejection updates the residual.

    With replacement: Miao et al., "SpecInfer" (2024), algorithm 2. Without replacement, a rejected token is removed
    from the draft's distribution, which is renormalised: Chen et al., "Sequoia" (2024), algorithm 2. Siblings are in
    the order in which they were drawn and children come after their parents, so a single pass over the nodes is enough.
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
    """Test the nodes of a tree from the leaves up. A node is tested after all nodes below it were rejected.

    The weight of a node is min(1, residual/draft), computed from the state of its parent when the node is entered. The
    residual of a node starts as its weight times the target's probabilities, and each rejected child reduces it. The
    node then passes with probability S / (S + 1 - weight), S being the sum of its residual; a leaf passes with
    probability equal to its weight. If a node fails, the draft's probabilities are subtracted from its parent's
    residual, and the next sibling is entered. Weng et al., "Traversal verification for speculative tree decoding"
    (arXiv 2505.12398), algorithm 1. On a chain the rule equals `block`.

    Each step enters a child or tests a node, so 2N - 1 steps are enough for every tree.
    """
    batch, num_nodes = round.tokens.shape
    nodes = torch.arange(num_nodes, device=round.tokens.device)
    here, done = round.roots, torch.zeros_like(round.seeds).bool()
    entered = (nodes == 0).expand(batch, -1)
    # the state of each node; only those on the path from the root to `here` are in use
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
    """LOSSY. A token is accepted if its target probability exceeds min(epsilon, delta exp(-entropy)). The deepest path
    of accepted tokens is taken.

    Among equally deep paths, the one whose last node has the lowest index is taken. The token after it is sampled from
    the target's distribution. Cai et al., "Medusa" (2024), section 2.3.1.
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
# rules that use the draft probabilities of sampled tokens
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
