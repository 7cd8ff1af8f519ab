"""The acceptance rules in the papers' normalised form: one row, one token at a time, in float64.

A rule calls `decide(node, chance)` for every random decision. If `decide` uses the op's random numbers, the rule gives
the op's expected output. If it takes every outcome in turn (`outcomes`), the rule gives its exact distribution.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Tree:
    """parents and tokens: N numbers. target and draft: N arrays [V]; draft None for tokens chosen without sampling."""

    parents: list
    tokens: list
    target: list
    draft: list | None = None
    replaces: bool = False

    def children(self, node):
        return [i for i in range(1, len(self.parents)) if self.parents[i] == node]

    def offered(self, node, token):
        """The draft's distribution from which a child of `node` with this token came."""
        if self.draft is None:
            return np.eye(len(self.target[0]))[token]
        return self.draft[node]

    def chain(self):
        """The nodes that form a chain from the root."""
        end = 1
        while (
            end < len(self.parents)
            and self.parents[end] == end - 1
            and self.offered(end - 1, self.tokens[end])[self.tokens[end]] > 0
        ):
            end += 1
        return range(1, end)


def normalised(weights, otherwise):
    return weights / weights.sum() if weights.sum() > 0 else otherwise


def rejection(tree, decide):
    here = 0
    for node in tree.chain():
        draft = tree.offered(here, tree.tokens[node])
        if not decide(node, min(1.0, tree.target[here][tree.tokens[node]] / draft[tree.tokens[node]])):
            return here, normalised(np.maximum(tree.target[here] - draft, 0), tree.target[here])
        here = node
    return here, tree.target[here]


def block(tree, decide):
    weights = [1.0]
    chain = [0, *tree.chain()]
    for above, node in zip(chain, chain[1:], strict=False):
        token = tree.tokens[node]
        weights.append(min(1.0, weights[-1] * tree.target[above][token] / tree.offered(above, token)[token]))
    # the longest prefix that passes is the first one found from the end
    for node in reversed(chain):
        if node == chain[-1]:
            if node == 0 or decide(node, weights[node]):
                return node, tree.target[node]
            continue
        residual = np.maximum(weights[node] * tree.target[node] - tree.offered(node, tree.tokens[node + 1]), 0)
        chance = residual.sum() / (residual.sum() + 1 - weights[node]) if residual.sum() + 1 - weights[node] else 1.0
        if node == 0 or decide(node, chance):
            return node, normalised(residual, tree.target[node])


def multi_round(tree, decide):
    here, moved = 0, True
    while moved:
        moved, target, draft = False, tree.target[here], None
        for node in tree.children(here):
            token = tree.tokens[node]
            if tree.draft is None or draft is None:
                draft = tree.offered(here, token)
            if draft[token] == 0:
                continue
            if target[token] > 0 and decide(node, min(1.0, target[token] / draft[token])):
                here, moved = node, True
                break
            target = normalised(np.maximum(target - draft, 0), np.zeros_like(target))
            draft = without(draft, token, tree.replaces)
    return here, normalised(target, tree.target[here])


def traversal(tree, decide):
    def visit(node, weight):
        target, draft = tree.target[node], None
        for child in tree.children(node):
            token = tree.tokens[child]
            if tree.draft is None or draft is None:
                draft = tree.offered(node, token)
            if draft[token] == 0:
                continue
            found = visit(child, min(1.0, weight * target[token] / draft[token]))
            if found:
                return found
            rest = np.maximum(weight * target - draft, 0)
            weight = rest.sum() / (rest.sum() + 1 - weight) if rest.sum() + 1 - weight else 1.0
            target = normalised(rest, np.zeros_like(target))
            draft = without(draft, token, tree.replaces)
        if node == 0 or decide(node, weight):
            return node, normalised(target, tree.target[node])
        return None

    return visit(0, 1.0)


def without(draft, token, replaces):
    if replaces:
        return draft
    draft = draft.copy()
    draft[token] = 0
    return normalised(draft, draft)


RULES = {"rejection": rejection, "block": block, "multi_round": multi_round, "traversal": traversal}


def outcomes(rule, tree):
    """Every outcome of a rule: (probability, last node, distribution [V] of the next token)."""
    scripts = [()]
    while scripts:
        script = scripts.pop()
        weight, asked = 1.0, 0

        def decide(node, chance):
            nonlocal weight, asked, script
            if chance <= 0 or chance >= 1:
                return chance > 0
            if asked == len(script):
                scripts.append((*script, False))
                script = (*script, True)
            answer = script[asked]
            asked += 1
            weight *= chance if answer else 1 - chance
            return answer

        last, following = rule(tree, decide)
        yield weight, last, following


def path(tree, node):
    """Nodes from the root's child down to `node`."""
    found = []
    while node > 0:
        found.append(node)
        node = tree.parents[node]
    return found[::-1]


def drafts(parents, draft_of, sampling):
    """Every tree of tokens that can be drawn into a shape: (probability, tokens). Token of the root: 0.

    Args:
        parents: N numbers.
        draft_of: tuple of tokens after the root -> distribution [V].
        sampling: "with" or "without".
    """

    def grow(node, tokens, prefixes, used):
        if node == len(parents):
            yield 1.0, tokens
            return
        prefix = prefixes[parents[node]]
        draft = draft_of(prefix)
        if sampling == "without":
            draft = draft.copy()
            drawn = list(used.get(parents[node], ()))
            draft[drawn] = 0
            if not draft.sum():  # exhausted: a token that cannot be drawn counts as padding
                draft[drawn[:1]] = 1
            draft = draft / draft.sum()
        for token in np.flatnonzero(draft):
            token = int(token)
            taken = {**used, parents[node]: (*used.get(parents[node], ()), token)}
            for weight, rest in grow(node + 1, [*tokens, token], [*prefixes, (*prefix, token)], taken):
                yield weight * draft[token], rest

    yield from grow(1, [0], [()], {})


def one_round(rule, parents, target_of, draft_of, sampling, horizon):
    """Expected accepted tokens of a round, and the exact distribution of the first `horizon` tokens. Tokens after the
    round are the target's own."""
    vocab = len(target_of(()))
    text_probs, accepted = np.zeros((vocab,) * horizon), 0.0
    for chance, tokens in drafts(parents, draft_of, sampling):
        prefixes = [()]
        for node in range(1, len(parents)):
            prefixes.append((*prefixes[parents[node]], tokens[node]))
        tree = Tree(
            parents, tokens, [target_of(p) for p in prefixes], [draft_of(p) for p in prefixes], sampling == "with"
        )
        for weight, last, following in outcomes(rule, tree):
            accepted += chance * weight * len(path(tree, last))
            extend(text_probs, chance * weight, prefixes[last], following, target_of, horizon)
    return accepted, text_probs


def coupled_accepted(topology, target_of, draft_of):
    """Expected accepted tokens of a round under "coupled", whose drafts use the target's own Gumbel noise: children are
    ranked by log draft + noise.

    At a node the target chooses x, and x has rank r in the draft, if log target(y) + noise(y) is less than that of x
    for every other y, and log draft(y) + noise(y) is greater for exactly r of them. With E(y) = exp(-noise(y)), which
    is exponential, each condition bounds E(y) by a multiple of E(x). The probability is a sum of terms
    1 / (1 + sum of multiples).

    Args:
        topology: whose children have ranks 0 and 1 at most.
        target_of, draft_of: tuple of tokens after the root -> distribution [V].
    """

    def expected(node, prefix):
        target, draft = target_of(prefix), draft_of(prefix)
        total = 0.0
        for child in range(1, len(topology.parents)):
            if topology.parents[child] == node:
                for token in np.flatnonzero((target > 0) & (draft > 0)):
                    chance = ranked_match(target, draft, int(token), topology.ranks[child])
                    if chance > 0:
                        total += chance * (1 + expected(child, (*prefix, int(token))))
        return total

    return expected(0, ())


def ranked_match(target, draft, token, rank):
    """Probability that the target chooses `token` and that the draft ranks it `rank` (0 or 1), with the same noise."""
    others = np.arange(len(target)) != token
    chosen = target[others] / target[token]
    first = np.maximum(chosen, draft[others] / draft[token])
    if rank == 0:
        return 1 / (1 + first.sum())
    rest = 1 + first.sum() - first
    return (1 / (rest + chosen) - 1 / (rest + first)).sum()


def extend(text_probs, weight, prefix, following, target_of, horizon):
    if len(prefix) >= horizon:
        text_probs[prefix[:horizon]] += weight
        return
    for token, chance in enumerate(following):
        if chance > 0:
            longer = (*prefix, token)
            extend(text_probs, weight * chance, longer, target_of(longer), target_of, horizon)
