"""Suffix decoding with a draft model or a trained head as fallback."""

from typing import NamedTuple

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from specdec_triton.drafters.base import Drafter, DraftSession
from specdec_triton.drafters.fallback import FallbackSession
from specdec_triton.tree import DraftTree

GREEDY = {"do_sample": False, "max_new_tokens": 48, "eos_token_id": NEVER}


class Proposal(NamedTuple):
    tokens: list[int]
    parents: list[int]
    expected: float

    def first(self, nodes):
        return Proposal(self.tokens[:nodes], self.parents[:nodes], 0.0)


class Scripted(DraftSession):
    """Proposes the continuation of a known text in some rounds of each row, in which it expects many accepted tokens.

    Args:
        text: [B, T]. The text, padded as in the call.
        pattern: a function of the row and the number of the round: the number of tokens to propose; 0 for none.
        branches: True for trees: each token has a wrong sibling before it.
    """

    trusted, max_depth, times = True, 12, None

    def __init__(self, context, text, pattern, branches=False):
        self.context, self.text, self.pattern, self.branches = context, text, pattern, branches
        self.max_nodes = 1 + self.max_depth * (1 + branches)
        self.round, self.taken, self.finished = 0, [], 0

    def draft(self):
        raise AssertionError

    def propose(self):
        context, proposals = self.context, []
        for row, (length, budget) in enumerate(zip(context.host_length, context.host_budget, strict=True)):
            depth = max(min(self.pattern(row, self.round), budget - 1, self.text.shape[1] - 1 - length), 0)
            tokens, parents, node = [int(context.host_tokens[row, length])], [-1], 0
            for token in self.text[row, length + 1 : length + 1 + depth].tolist():
                if self.branches:
                    tokens.append((token + 1) % 61)
                    parents.append(node)
                tokens.append(token)
                parents.append(node)
                node = len(tokens) - 1
            proposals.append(Proposal(tokens, parents, float(depth)))
        self.round += 1
        return proposals

    def cut(self, proposals):
        return proposals

    def tree_of(self, proposals):
        self.taken.append([len(proposal.tokens) - 1 for proposal in proposals])
        width = -(-max(len(proposal.tokens) for proposal in proposals) // 4) * 4
        tokens = [proposal.tokens + [0] * (width - len(proposal.tokens)) for proposal in proposals]
        parents = [proposal.parents + [-1] * (width - len(proposal.tokens)) for proposal in proposals]
        parents = torch.tensor(parents, dtype=torch.int32)
        return DraftTree.from_parents(
            torch.tensor(tokens), parents, min(self.max_depth, width - 1), is_chain=not self.branches
        )

    def finish(self):
        self.finished += 1


class ScriptedDrafter(Drafter):
    def __init__(self, fallback, text, pattern, branches=False):
        self.fallback, self.text, self.pattern, self.branches = fallback, text, pattern, branches

    def taps(self, model):
        return self.fallback.taps(model)

    def prompt_reader(self, context):
        return self.fallback.prompt_reader(context)

    def check(self, model, rule=None, tree=None):
        self.fallback.check(model, rule, tree)

    def graph_hazard(self):
        return self.fallback.graph_hazard()

    def start(self, context, tree=None):
        self.suffix = Scripted(context, self.text, self.pattern, self.branches)
        self.session = FallbackSession(self.suffix, self.fallback, 1.0, context, tree)
        return self.session


def alternating(row, number):
    """Rows are in different phases, so that most rounds are mixed."""
    return (0, 7, 0, 0, 11, 2)[(number + 2 * row) % 6]


def together(row, number):
    """All rows take the same kind of draft."""
    return (0, 5, 9, 0, 0)[number % 5]


@pytest.mark.parametrize("pattern", [alternating, together])
def test_model(pattern):
    target = build("llama")
    plain = target.generate(**prompt(3), **GREEDY)
    for options in (
        {"num_tokens": 3},
        {},
        {"tree": sdt.Topology.from_widths([3, 2, 1])},
        {"tree": sdt.DynamicTree(9, 3, 3)},
    ):
        for branches in (False, True):
            drafter = ScriptedDrafter(sdt.ModelDrafter(build("llama"), **options), plain, pattern, branches)
            with sdt.patched(target, drafter=drafter):
                text = target.generate(**prompt(3), **GREEDY)
            print(
                options,
                branches,
                sdt.stats(target).rounds,
                sdt.stats(target).accepted_by_position,
                sdt.stats(target).acceptance_length,
            )
            assert torch.equal(text, plain)
