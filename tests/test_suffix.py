"""Suffix decoding: the options, the shapes of its trees, the choice among the places of the text, and the history."""

from types import SimpleNamespace

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import capture_here, context
from specdec_triton.drafters import suffix
from specdec_triton.drafters.matches import SuffixArray
from specdec_triton.drafters.timed import FIRST_CHANCES
from specdec_triton.forward.fingerprint import fingerprint
from specdec_triton.tree_choice.costs import Costs

TEXT = [5, 6, 7, 8, 9, 5, 6, 7, 1, 2, 5, 6, 7, 8, 3, 4, 5, 6, 7]  # "5 6 7" is followed by 8 9, 1 2 and 8 3


def start(rows=(TEXT,), tree=None, kept=(), budget=40, target=None, **options):
    drafter = sdt.SuffixDrafter(**{"adaptive": False, **options})
    for text in kept:
        drafter.history.add(text)
    now = context(rows, budget=budget, max_length=200)
    now.target = target
    return drafter.start(now, tree)


def test_the_tokens_that_followed_are_drafted_by_their_frequency():
    (proposal,) = start(num_tokens=3).propose()
    assert proposal.matched == 3
    third = 1 / 3
    by_path = {path(proposal, node): chance for node, chance in enumerate(proposal.chances)}
    assert by_path == pytest.approx(
        {
            (): 1,
            (8,): 2 * third,
            (1,): third,
            (8, 9): third,
            (8, 3): third,
            (1, 2): third,
            (8, 9, 5): third,
            (8, 3, 4): third,
            (1, 2, 5): third,
        }
    )
    assert proposal.chances == sorted(proposal.chances, reverse=True)
    assert proposal.expected == pytest.approx(2 * third + 7 * third)


def path(proposal, node):
    return (*path(proposal, proposal.parents[node]), proposal.tokens[node]) if node else ()


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"num_tokens": 1}, {(8,), (1,)}),
        ({"num_tokens": 1, "tokens_per_match": float("inf")}, {(8,), (1,)}),
        ({"num_tokens": 9, "tokens_per_match": 0.4}, {(8,), (1,)}),  # at most 1.2 tokens after a match of three
        ({"num_tokens": 9, "tokens_per_match": 0.67, "min_prob": 0.5}, {(8,)}),
        ({"num_tokens": 2, "min_prob": 0.34}, {(8,)}),
        ({"num_tokens": 2, "min_prob": 1 / 3}, {(8,), (1,), (8, 9), (8, 3), (1, 2)}),
        ({"num_tokens": 9, "tree": 2}, {(8,)}),
        ({"num_tokens": 3, "tree": sdt.Topology.chain(2)}, {(8,), (8, 3)}),
        ({"budget": 1}, set()),
        ({"budget": 2}, {(8,), (1,)}),
    ],
    ids=str,
)
def test_the_limits_of_a_draft(options, paths):
    (proposal,) = start(**options).propose()
    found = {path(proposal, node) for node in range(1, len(proposal.tokens))}
    if (8, 3) in paths and (8, 9) not in paths:
        found = {(8, 3) if each == (8, 9) else each for each in found}  # equally frequent
    assert found == paths


def test_a_kept_text_is_drafted_if_it_agrees_for_longer():
    for adaptive in (False, True):
        (proposal,) = start(kept=[[8, 3, 4, 5, 6, 7, 50, 51]], num_tokens=2, adaptive=adaptive).propose()
        assert proposal.matched == 6 and proposal.tokens == [7, 50, 51]
        # the text itself is preferred to a kept one after equally long matches
        (proposal,) = start(kept=[[9, 5, 6, 7, 50, 51]], num_tokens=2, adaptive=adaptive).propose()
        assert proposal.tokens[1] == 8
    # several kept texts are counted together
    session = start(rows=[[90, 91]], kept=[[90, 91, 1], [90, 91, 2, 2], [90, 91, 2, 3], [91, 4]], num_tokens=1)
    (proposal,) = session.propose()
    assert proposal.tokens[1:] == [2, 1] and proposal.chances[1:] == pytest.approx([2 / 3, 1 / 3])


def test_a_token_that_is_frequent_in_two_texts_together_is_drafted():
    """Kept texts are in several indexes. 1 follows at 2 of 10 places in each, 2 to 9 at one."""
    session = start(rows=[[90, 91]], num_tokens=1, min_prob=0.15)
    texts = [
        [tok for each in (1, 1, *range(2, 10)) for tok in (90, 91, each + 10 * more * (each > 1))] for more in (0, 1)
    ]
    session._kept = SuffixArray([texts[0]]), SuffixArray([texts[1]])
    (proposal,) = session.propose()
    assert proposal.tokens[1:] == [1] and proposal.chances[1:] == pytest.approx([4 / 20])


def test_a_kept_text_must_match_more_than_the_text_itself():
    for kept, token in (([9, 6, 7, 50], 8), ([9, 5, 6, 7, 50], 8), ([4, 5, 6, 7, 50], 50)):
        session = start(kept=[kept], num_tokens=1, adaptive=True)
        session.chances[1].now[:] = 1.0
        assert session.propose()[0].tokens[1] == token
    session = start(rows=[[1, 2]], kept=[[2, 3, 4]], adaptive=True)
    assert session.propose()[0].tokens == [2]  # one token is too short a match


def test_tokens_that_the_target_lacks_are_not_drafted():
    (proposal,) = start(rows=[[90, 91]], kept=[[90, 91, 100, 5], [90, 91, 99, 100]]).propose()
    assert proposal.tokens == [91, 99]


def test_rows_are_drafted_alone_and_padded():
    session = start([TEXT, [1, 2, 3], TEXT[:8]], num_tokens=2)
    session.prepare()
    tree = session.draft()
    tree.check(session.context.root, 100, "suffix")
    assert tree.num_nodes == 8 and (tree.parents[1] == -1).all()
    assert tree.max_depth == 2 and not tree.is_chain
    assert start([[1, 2, 3]]).draft().num_nodes == 1


def test_estimates_follow_the_rounds_also_without_a_draft():
    session = start(adaptive=True, rows=[[1, 2, 3, 4, 5, 6, 7, 8, 1]], budget=90)
    now, before = session.context, session.chances[0].now.copy()
    session.draft()
    for number in range(60):  # after each 1 comes another token than before
        now.host_tokens[0, now.host_length[0] + 1 :][:2] = 40 + number, 1
        now.host_length = now.host_length + 2
        session.draft()
    learned = session.chances[0].now[0]
    assert learned[0] < 0.15 < before[0, 0] and (learned[1:] == FIRST_CHANCES[1:]).all()


def test_times_decide_on_a_cpu():
    target = SimpleNamespace(model=torch.nn.Module(), cache=None)
    for verify, width in ((((1, 1.0), (64, 1.0)), 8), (((1, 1.0), (4, 1.5), (8, 9.0)), 4), (((1, 1.0), (4, 9.0)), 1)):
        session = start(target=target, adaptive=True, num_tokens=2, min_prob=0.05)
        session.times.costs = Costs(verify)
        assert session.draft().num_nodes == width, verify
    # `tree="auto"` has decided by times already
    session.prepare(sdt.Topology.chain(1))
    assert session.draft().depth.amax() == 1


def test_few_shapes_if_rounds_are_captured():
    shapes = set()
    for count in range(2, 30):
        session = start([[*range(count), *range(3)]], num_tokens=32, tokens_per_match=9)
        session.context.fixed_shapes = True
        session.__init__(session.drafter, session.context)
        session.prepare()
        tree = session.draft()
        shapes.add((tree.num_nodes, tree.max_depth, tree.is_chain))
        assert tree.num_nodes <= session.max_nodes and tree.max_depth <= session.max_depth
    assert shapes == {(1, 0, True), (4, 3, False), (8, 7, False), (16, 15, False), (32, 31, False)}


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_rules_for_chains_get_chains(rule):
    drafter = sdt.SuffixDrafter(adaptive=False)
    drafter.check(build("llama"), rule)
    now = context([TEXT])
    now.rule = rule
    tree = drafter.start(now).draft()
    assert tree.is_chain and tree.tokens[0, 1] == 8


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"num_tokens": 0}, "num_tokens must be an integer of 1 to 64, got 0"),
        ({"num_tokens": 65}, "num_tokens must be an integer of 1 to 64, got 65"),
        ({"num_tokens": True}, "num_tokens must be an integer of 1 to 64, got True"),
        ({"tokens_per_match": 0}, "tokens_per_match must be a number above 0"),
        ({"min_prob": 0}, "min_prob must be a number above 0, at most 1, got 0"),
        ({"min_prob": 1.5}, "min_prob must be a number above 0, at most 1, got 1.5"),
        ({"history_tokens": -1}, "history_tokens must be an integer of at least 0, got -1"),
    ],
    ids=str,
)
def test_options_are_checked(options, wanted):
    with pytest.raises(ValueError, match="SuffixDrafter") as error:
        sdt.SuffixDrafter(**options)
    assert wanted in str(error.value)


def test_shapes_are_checked():
    model, drafter = build("llama"), sdt.SuffixDrafter()
    for tree in (sdt.Topology.from_widths([2]), sdt.DynamicTree(4, width=2, depth=2)):
        with pytest.raises(ValueError, match="SuffixDrafter: tree must"):
            drafter.check(model, tree=tree)
    assert repr(sdt.SuffixDrafter(8, min_prob=0.2)) == "SuffixDrafter(num_tokens=8, min_prob=0.2)"


def test_the_second_call_drafts_the_output_of_the_first():
    model, options = build("llama"), {"do_sample": False, "max_new_tokens": 40, "eos_token_id": NEVER}
    inputs = prompt(batch=3)
    plain = model.generate(**inputs, **options)
    drafter = sdt.SuffixDrafter()
    rounds = []
    for _ in range(2):
        with sdt.patched(model, drafter=drafter):
            assert torch.equal(model.generate(**inputs, **options), plain)
        rounds.append(sdt.stats(model).rounds)
    assert rounds[0] > 30 > 6 > rounds[1]
    assert sdt.stats(model).why_no_lag == "SuffixDrafter drafts on the host"
    drafter.clear()
    with sdt.patched(model, drafter=drafter):
        model.generate(**inputs, **options)
    assert sdt.stats(model).rounds == rounds[0]


def test_an_output_is_kept_with_the_end_of_the_prompt():
    model = build("llama")
    inputs, drafter = prompt(batch=2), sdt.SuffixDrafter()
    with sdt.patched(model, drafter=drafter):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=9, eos_token_id=NEVER)
    width = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].sum(1)
    texts = [row[-9 - min(int(count), suffix.PROMPT_TAIL) :] for row, count in zip(out, real, strict=True)]
    assert drafter.history.num_texts == 2 and width > real.amin()
    assert drafter.history.num_tokens == sum(map(len, texts))
    for text in texts:
        found = [source.find(text[:-1].numpy()) for source in drafter.history.sources()]
        assert [each.next_tokens() for each in found if each.count] == [{int(text[-1]): 1}]


def test_verification_is_captured_and_reused_by_later_calls(monkeypatch):
    capture_here(monkeypatch, 1)
    model, inputs = build("llama"), prompt(batch=2)
    options = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": NEVER}
    plain, seen = model.generate(**inputs, **options), []
    with sdt.patched(model, drafter=sdt.SuffixDrafter(tokens_per_match=0.2, adaptive=False)):
        for _ in range(4):
            assert torch.equal(model.generate(**inputs, **options), plain)
            seen.append(sdt.stats(model))
    assert all(stats.lag == 0 and stats.why_no_lag == "SuffixDrafter drafts on the host" for stats in seen)
    assert seen[0].captured > 0 and all(stats.reused > 0 and stats.accepted > 0 for stats in seen[1:])
    assert seen[-1].captured == 0
    drafters = [sdt.SuffixDrafter(history_tokens=100) for _ in range(2)]
    drafters[0].history.add([1, 2])
    assert fingerprint(*map(vars, drafters[:1])) == fingerprint(*map(vars, drafters[1:]))
    assert fingerprint(vars(drafters[0])) != fingerprint(vars(sdt.SuffixDrafter(9, history_tokens=100)))


@pytest.mark.parametrize("rule", ["rejection", "block", "multi_round", "traversal", "typical", "coupled"])
def test_drafts_do_not_depend_on_the_random_numbers_that_verify_them(rule):
    drafter, model = sdt.SuffixDrafter(tokens_per_match=9, adaptive=False), build("llama")
    options = {"do_sample": True, "max_new_tokens": 30, "eos_token_id": NEVER}

    def accepted(seed):
        with sdt.patched(model, drafter=drafter, rule=rule, seed=seed):
            model.generate(**prompt(batch=2), **options)
        return sdt.stats(model).accepted

    own = accepted(1)  # copied from the text of the call
    again = accepted(1)
    assert (again > own + 20) if rule == "coupled" else (again == own)
    assert drafter.history.num_texts == 4
