"""Prompt lookup: its drafts on the host and on the device."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import context
from simulated_graph import Record
from specdec_triton.drafters import prompt_lookup
from specdec_triton.drafters import timed as timing
from specdec_triton.drafters.prompt_lookup import _matches
from specdec_triton.ops.reference import Acceptance
from specdec_triton.tools.host_sync import count_host_reads
from specdec_triton.tree_choice.costs import OnlineCosts


def test_matches_are_the_longest_first_then_the_earliest():
    text = np.array([1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 7, 1, 2, 3])
    assert _matches(text, 3, 9) == ([2, 9, 5], 3)
    assert _matches(text, 2, 9) == ([2, 5, 9], 2)
    assert _matches(text, 1, 2) == ([2, 5], 1)
    assert _matches(np.array([4]), 3, 1) == _matches(np.array([4, 5]), 3, 1) == ([], 0)
    assert _matches(np.array([4, 4]), 3, 1) == ([0], 1)


def test_lookup_copies_the_continuation():
    session = sdt.PromptLookupDrafter(num_tokens=3).start(context([[5, 6, 7, 8, 9, 5, 6]]))
    tree = session.draft()
    assert tree.tokens.tolist() == [[6, 7, 8, 9]] and tree.is_chain
    assert session.max_nodes == 4


def test_lookup_branches_share_common_prefixes():
    rows = [[5, 1, 2, 3, 5, 1, 4, 3, 5], [7, 8, 9]]
    tree = sdt.PromptLookupDrafter(num_tokens=3, branches=2, adaptive=False).start(context(rows)).draft()
    assert tree.tokens[0].tolist() == [5, 1, 4, 3, 2, 3, 0, 0]  # padded to a multiple of 4
    # no match in the second row, so it is padding
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 1, 4, -1, -1], [-1] * 8]
    tree.check(torch.tensor([5, 9]), 100, "lookup")


def test_no_match_is_no_draft():
    tree = sdt.PromptLookupDrafter().start(context([[1, 2, 3]])).draft()
    assert tree.num_nodes == 1


def test_lookup_does_not_match_padding_and_stops_at_the_budget():
    assert sdt.PromptLookupDrafter().start(context([[0]], start=5)).draft().num_nodes == 1
    eager = sdt.PromptLookupDrafter(adaptive=False)
    assert eager.start(context([[1, 2, 3, 4, 1]], budget=3)).draft().tokens.tolist() == [[1, 2, 3, 0]]  # then padding
    assert eager.start(context([[1, 2, 1]], budget=1)).draft().num_nodes == 1


def test_lookup_drafts_where_matches_of_such_a_length_have_paid():
    phrase = [5, 6, 7, 8]
    now = context([[*phrase, 1, 2, 3, 20, *phrase]], budget=400, max_length=400)

    def after(*tokens):
        """The width of the draft after the target has emitted `tokens` in one round."""
        now.host_tokens[0, now.host_length[0] + 1 :][: len(tokens)] = tokens
        now.host_length = now.host_length + len(tokens)
        return session.draft().num_nodes

    session = sdt.PromptLookupDrafter(num_tokens=3).start(now)
    assert session.draft().num_nodes == 4  # a match of four tokens
    assert after(5) == 4 and after(60) == 1  # a match of one token, whose draft is rejected
    assert after(5) == 1  # matches of one token are skipped now
    assert after(6) == 4  # a longer match is drafted
    tries = 0
    while after(5) == 1 and tries < 99:  # after a few skips, the short match is tried again
        tries += 1
        assert after(1000 + tries) == 1
    assert 20 < tries < 90
    steady = sdt.PromptLookupDrafter(num_tokens=3, adaptive=False).start(now)
    assert steady.draft().num_nodes == steady.draft().num_nodes == 4


def test_a_tree_asked_of_the_lookup():
    lookup = sdt.PromptLookupDrafter(num_tokens=9, adaptive=False)
    for tree in (3, sdt.Topology.chain(2)):
        assert lookup.start(context([[1, 2, 3, 4, 1]]), tree).draft().parents.tolist() == [[-1, 0, 1, -1]]
    with pytest.raises(ValueError, match="PromptLookupDrafter: tree must be None, a number of nodes or a chain"):
        lookup.check(build("llama"), tree=sdt.Topology.from_widths([2]))


def accepted_in(tree, length):
    """The `Acceptance` of a round with this number of accepted tokens in each row."""
    return Acceptance(
        path=torch.full((len(length), tree.max_depth), -1, dtype=torch.int32),
        length=length,
        next_ids=torch.zeros_like(length),
        has_nan=torch.zeros_like(length, dtype=torch.bool),
    )


def say(now, count, random, alphabet):
    """Let the target emit this number of tokens in each row, on the host and on the device."""
    for row, number in enumerate(count):
        columns = slice(now.host_length[row] + 1, now.host_length[row] + 1 + number)
        now.host_tokens[row, columns] = random.integers(0, alphabet, number)
        now.tokens[row, columns] = torch.from_numpy(now.host_tokens[row, columns])
    now.host_length = now.host_length + count
    now.length.copy_(torch.from_numpy(now.host_length))


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"num_tokens": 3}, None),
        ({"num_tokens": 5, "max_ngram": 2, "adaptive": False}, None),
        ({"num_tokens": 4, "branches": 3}, None),
        ({"num_tokens": 6, "branches": 4, "max_ngram": 3, "adaptive": False}, None),
        ({"num_tokens": 5, "branches": 3}, 7),
        ({"num_tokens": 4, "branches": 40, "max_ngram": 1}, None),
        ({"num_tokens": 4, "branches": 2, "max_ngram": 99}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lookups_on_device_and_host_agree(options, asked, impl):
    """The drafts are equal node for node, at a constant width and without host reads, over rounds with accepted and
    rejected drafts."""
    random, lookup, drafted = np.random.default_rng(0), sdt.PromptLookupDrafter(**options), 0
    for alphabet in (1, 2, 3, 9):
        texts = [random.integers(0, alphabet, length).tolist() for length in (2, 9, 30, 17)]
        now = context(texts, start=5, budget=99)
        now.start.copy_(torch.tensor([5, 7, 5, 21]))  # the text of the last row has one token
        now.tokens.masked_fill_(torch.arange(65) > now.length[:, None], 0)
        host = lookup.start(now, asked)
        now.fixed_shapes, now.impl = True, impl
        device = lookup.start(now, asked)
        assert device.on_device and not host.on_device
        for number in range(8):
            limit = sdt.Topology.chain(number - 2) if number % 3 == 2 else None
            assert host.prepare(limit) == device.prepare(limit)
            wanted = host.draft()
            with count_host_reads() as reads:
                tree = device.draft()
            assert not reads.total
            tree.check(now.root, 100, "lookup")
            assert tree.num_nodes == device.prepare(limit)[0] >= wanted.num_nodes and tree.max_depth <= device.max_depth
            missing = tree.num_nodes - wanted.num_nodes
            real = wanted.parents >= 0
            assert torch.equal(tree.parents, torch.nn.functional.pad(wanted.parents, (0, missing), value=-1))
            assert torch.equal(tree.tokens[:, : wanted.num_nodes][real], wanted.tokens[real])
            drafted += int(real.sum())
            length = torch.from_numpy(random.integers(0, 3, 4)).minimum(tree.depth.amax(1))
            with count_host_reads() as reads:
                device.observe(tree, accepted_in(tree, length))
            assert not reads.total
            say(now, (length + 1).numpy(), random, alphabet)
    assert (drafted > 0) == (asked != 1)


@pytest.mark.parametrize("depth", [None, 0])
def test_a_lookup_on_the_device_is_one_op(depth):
    """The op is two launches. Views and allocations launch nothing."""
    now = context([[1, 2, 3, 1, 2], [4, 5, 6]])
    now.fixed_shapes, now.impl = True, "triton"
    session = sdt.PromptLookupDrafter().start(now)
    session.prepare(None if depth is None else sdt.Topology.chain(depth))
    with Record() as record:
        tree = session.draft()
        session.observe(tree, None)
    names = [func.name() for func, *_ in record.operations]
    assert names.count("specdec_triton::ngram_lookup") == 1
    assert {*names} <= {"specdec_triton::ngram_lookup", "aten::slice.Tensor"}, names


class FixedShapes(sdt.PromptLookupDrafter):
    def start(self, context, tree=None):
        context.fixed_shapes = True
        return super().start(context, tree)


@pytest.mark.parametrize("branches", [1, 3])
def test_the_text_of_the_lookup_on_the_device(branches):
    model, options = build("llama"), {"do_sample": False, "max_new_tokens": 30, "eos_token_id": NEVER}
    plain = model.generate(**prompt(), **options)
    with sdt.patched(model, drafter=FixedShapes(3, max_ngram=1, branches=branches, adaptive=False)):
        assert torch.equal(model.generate(**prompt(), **options), plain)
    assert sdt.stats(model).accepted > 0


STEEP = sdt.Costs(verify=((1, 1.0), (4, 2.0), (12, 2.25)))
FLAT = sdt.Costs(verify=((1, 1.0), (12, 1.0)))


def timed(rows, times=STEEP, rule="greedy", **options):
    """A context and a session that chooses its drafts by the given times."""
    now = context(rows, budget=400, max_length=400)
    now.target, now.rule = SimpleNamespace(model=torch.nn.Module(), cache=None), rule
    session = sdt.PromptLookupDrafter(**options).start(now)
    if session.drafter.adaptive:
        session.times.costs = times
    return now, session


def emit(now, *rows):
    """Let the target emit these tokens, one list for each row."""
    for row, tokens in enumerate(rows):
        now.host_tokens[row, now.host_length[row] + 1 :][: len(tokens)] = tokens
    now.host_length = now.host_length + [len(tokens) for tokens in rows]


LONG = [*range(10, 40), 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]  # the end is a match of ten tokens


def test_a_draft_must_pay_by_the_times_of_a_forward():
    """A match of one token is worth a draft if more rows take no time, and not if they take twice as long."""
    for rows, times, width in (
        ([5, 6, 7, 8, 9, 20, 21, 5], FLAT, 8),
        ([5, 6, 7, 8, 9, 20, 21, 5], STEEP, 1),
        (LONG, STEEP, 12),
        (LONG, sdt.Costs(verify=((1, 1.0), (12, 12.0))), 1),
        (LONG, sdt.Costs(verify=((1, 1.0), (4, 1.0), (12, 10.0))), 4),  # as long as pays
        # 6.44 tokens are expected, which is 1.15 times as many per second as plain steps, or 1.05 times
        (LONG, sdt.Costs(verify=((1, 1.0), (4, 5.6), (12, 5.6))), 12),
        (LONG, sdt.Costs(verify=((1, 1.0), (4, 6.13), (12, 6.13))), 1),
        ([1, 2, 3], FLAT, 1),
    ):
        _, session = timed([rows], times)
        assert session.draft().num_nodes == width, (rows, times)
    _, session = timed([LONG], sdt.Costs(verify=((1, 1.0), (12, 12.0))), adaptive=False)
    assert session.draft().num_nodes == 12


def test_auto_trees_decide_alone():
    """The controller has chosen the depth by times. Otherwise no draft would be made that the controller can learn
    from."""
    for row in ([5, 6, 7, 8, 9, 20, 21, 5], LONG):
        _, session = timed([row], sdt.Costs(verify=((1, 1.0), (4, 9.0))))
        session.prepare()
        assert session.draft().num_nodes == 1
        for depth in (1, 2):
            session.prepare(sdt.Topology.chain(depth))
            assert session.draft().depth.amax() == depth
        session.prepare()
        assert session.draft().num_nodes == 1


def test_acceptance_is_learned_from_the_rounds():
    now, session = timed([LONG])
    widths = []
    for number in range(9):
        widths.append(session.draft().num_nodes)
        emit(now, [100 + number])  # nothing is accepted
        assert session.draft().num_nodes == 1
        emit(now, LONG[-10:])
    assert widths[0] == 12 and widths[-1] == 1
    now, session = timed([[*LONG, *LONG]])
    before = session.chances.now.copy()
    tree = session.draft()
    emit(now, tree.tokens[0, 1:5].tolist() + [99])  # four tokens are accepted, the fifth is rejected
    session.draft()
    place = timing.class_of(10)
    rate = first = before[0, place]
    for hit in (1, 1, 1, 1, 0):  # each token is compared with the chance that the draft gave it
        rate += timing.LEARNING * (hit - first)
    assert session.chances.now[0, place] == pytest.approx(rate) != first
    assert np.count_nonzero(session.chances.now != before) == 1


def test_a_draft_of_one_row_must_pay_for_all_rows():
    texts = [LONG, *([number, number + 1] for number in (50, 60, 70, 80, 90))]
    assert timed(texts[:2])[1].draft().num_nodes > 1
    assert (
        timed(texts)[1].draft().num_nodes == 1
    )  # five rows without a match wait for a forward that takes twice as long
    now, session = timed(texts)
    now.host_budget[1:] = 0  # finished rows do not wait
    assert session.draft().num_nodes == 12


def test_times_are_learned_from_rounds_and_kept_for_later_calls(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    now, session = timed([LONG], OnlineCosts(timing.CPU_TIMES))
    widths = []
    for number in range(9):
        for new in (lambda tree, number=number: [*tree.tokens[0, 1:].tolist(), 100 + number], lambda _: LONG[-10:]):
            tree = session.draft()
            widths.append(tree.num_nodes)
            clock.now += 3.0 if tree.num_nodes == 1 else 60.0
            session.observe(tree, None)
            clock.now += 1000.0  # other steps are not timed
            emit(now, new(tree))
    assert widths[0] == 12 and widths[-2] == 1  # twenty times the time does not pay
    assert session.times.costs.costs.verify_seconds(1) == 3.0
    later = sdt.PromptLookupDrafter().start(now)
    assert later.times.costs.costs.verify_seconds(12) / later.times.costs.costs.verify_seconds(1) > 4
    other = SimpleNamespace(model=torch.nn.Module(), cache=None)
    now.target = other
    assert sdt.PromptLookupDrafter().start(now).times.costs.costs == timing.CPU_TIMES


@pytest.mark.parametrize("rule", ["rejection", "block", "multi_round", "traversal", "typical", "coupled", "greedy"])
def test_drafts_use_times_only_if_the_text_does_not_depend_on_them(rule):
    now = context([LONG])
    now.target, now.rule = SimpleNamespace(model=torch.nn.Module(), cache=None), rule
    session = sdt.PromptLookupDrafter().start(now)
    assert hasattr(session, "times") == (rule in ("greedy", "coupled"))


@pytest.mark.parametrize("times", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "coupled"])
def test_the_text_does_not_depend_on_the_times(times, sampled, monkeypatch):
    model = build("llama")
    options = {"do_sample": sampled, "max_new_tokens": 40, "eos_token_id": NEVER}
    baseline = sdt.SpeculativeGenerate(seed=3)
    plain = model.generate(**prompt(), **options, custom_generate=baseline)
    monkeypatch.setattr(prompt_lookup._TimedLookupSession, "observe", lambda *_: None)
    monkeypatch.setattr(timing, "CPU_TIMES", times)
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter(4), seed=3):
        assert torch.equal(model.generate(**prompt(), **options), plain)
