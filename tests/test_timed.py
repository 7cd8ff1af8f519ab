"""The decision whether drafts copied from texts pay."""

import numpy as np
import pytest
import torch

import specdec_triton as sdt
from helpers import context
from specdec_triton.drafters import timed
from specdec_triton.drafters.timed import Chances, Proposal, RoundTimes, tree_of


def tree(*nodes, matched=3):
    """A proposal from (token, parent, chance)."""
    tokens, parents, chances = zip((9, -1, 1.0), *nodes, strict=True)
    return Proposal([*tokens], [*parents], [*chances], matched)


def chain(count, chance, matched=3):
    return tree(*((token, token, chance ** (token + 1)) for token in range(count)), matched=matched)


@pytest.mark.parametrize(
    ("few_shapes", "widths"), [(False, {1: 1, 2: 4, 4: 4, 5: 8, 9: 12}), (True, {1: 1, 2: 4, 5: 8, 9: 16, 16: 16})]
)
def test_widths(few_shapes, widths):
    for nodes, width in widths.items():
        assert timed.width_of(nodes, few_shapes) == width


def test_a_tree_of_proposals():
    proposals = [chain(3, 0.5), Proposal.nothing(9), tree((1, 0, 0.5), (2, 0, 0.3), (3, 1, 0.2), (4, 2, 0.1))]
    found = tree_of(proposals, 9, torch.device("cpu"))
    found.check(torch.tensor([9, 9, 9]), 100, "proposals")
    assert found.parents.tolist() == [[-1, 0, 1, 2] + [-1] * 4, [-1] * 8, [-1, 0, 0, 1, 2, -1, -1, -1]]
    assert found.max_depth == 4 and not found.is_chain
    chains = tree_of(proposals[:2], 2, torch.device("cpu"))
    assert chains.is_chain and chains.num_nodes == 4 and chains.max_depth == 2
    for count in (5, 6, 7):  # few shapes: equal for all of them
        few = tree_of([chain(count, 0.5)], 9, torch.device("cpu"), chains=False, few_shapes=True)
        assert (few.num_nodes, few.max_depth, few.is_chain) == (8, 7, False)


def test_chances_follow_the_tokens_that_were_emitted():
    chances, place = Chances(2), timed.class_of(3)
    before = chances.now.copy()

    def moved(proposal, emitted):
        chances.now[:] = before
        chances.learn(1, proposal, emitted)
        assert (chances.now[0] == before[0]).all()
        return {index: round(float(chances.now[1, index] - before[1, index]), 6) for index in range(len(before[1]))}

    both = tree((1, 0, 0.4), (2, 0, 0.2), (3, 1, 0.1))
    for emitted, deltas in (
        ([1], {place: 0.4}),  # one of the children with a chance of 0.6 is right
        ([2], {place: 0.4}),
        ([7, 1], {place: -0.6}),  # nothing is known about tokens after a wrong one
        ([1, 3, 5], {place: 0.4, place + 1: 0.75}),  # after 4 agreeing tokens; the proposal ends there
        ([1, 4], {place: 0.4, place + 1: -0.25}),
        ([2, 3], {place: 0.4}),  # the second branch has no further tokens
        ([], {}),
    ):
        found = moved(both, emitted)
        for index, delta in found.items():
            wanted = np.clip(before[1, index] + timed.LEARNING * deltas.get(index, 0), 0, 1) - before[1, index]
            assert delta == pytest.approx(wanted, abs=1e-6), emitted
    assert not any(moved(Proposal.nothing(9), [1, 2]).values())


def test_the_chance_of_a_token_has_bounds():
    chances = Chances(1)
    for _ in range(99):
        chances.learn(0, tree((1, 0, 1e-3)), [1])
    assert chances.of(0, 3) == 1
    for _ in range(99):
        chances.learn(0, tree((1, 0, 1.0)), [2])
    assert chances.of(0, 3) == timed.LEAST_CHANCE < chances.of(0, 2)


def test_siblings_of_a_lookup_are_equally_likely():
    found = Chances(1).applied(0, tree((1, 0, 1.0), (2, 0, 1.0), (3, 2, 1.0), matched=1))
    first, second = timed.FIRST_CHANCES[:2]
    assert found.chances == pytest.approx([1, first / 2, first / 2, first / 2 * second])


@pytest.mark.parametrize(
    ("verify", "nodes"),
    [
        (((1, 1.0), (12, 1.0)), 11),  # rows are free
        (((1, 1.0), (4, 1.5), (12, 9.0)), 4),
        (((1, 1.0), (4, 4.0), (12, 12.0)), 1),
    ],
)
def test_the_number_of_nodes_that_pays_best(verify, nodes):
    now = context([[1, 2], [3, 4]])
    now.target = type("Target", (), {"model": torch.nn.Module(), "cache": None})()
    times = RoundTimes(now)
    times.costs = sdt.Costs(verify)
    proposals = [chain(10, 0.9), Proposal.nothing(9)]
    assert times.best(proposals, [True, False]) == nodes
    assert times.best(proposals, [False, True]) == times.best(proposals, [False, False]) == 1
    # a row without a draft waits for the forward, too
    both = times.best(proposals, [True, True])
    assert both <= nodes
