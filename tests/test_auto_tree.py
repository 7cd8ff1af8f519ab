"""`tree="auto"`: the text does not change, speculation is tried at a bounded cost, and the trees depend on the
costs."""

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import TREES, HostDrafter, capture_here, drafter_of, eos_in_mid_row, oracle, speculative
from specdec_triton.engine import auto_tree, generate, graph_runner
from specdec_triton.forward import cache
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.tree_choice.search import LADDER

OPTIONS = {"do_sample": False, "eos_token_id": NEVER, "max_new_tokens": 28}
FLAT = sdt.Costs(verify=((1, 1.0), (64, 1.1)), draft=((1, 0.02), (10, 0.2)))
STEEP = sdt.Costs(verify=((1, 1.0), (6, 5.0)))
ROOT = sdt.Topology((-1,), (0,))


@pytest.fixture
def rows(monkeypatch):
    """Number of rows per sequence in each forward of the target after the prompt's."""
    seen = []

    def spy(name):
        method = getattr(TreeRunner, name)

        def run(self, tokens, *rest):
            seen.append(tokens.shape[1])
            return method(self, tokens, *rest)

        monkeypatch.setattr(TreeRunner, name, run)

    spy("forward"), spy("decode")
    return seen


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_without_hope_little_is_lost(rows, batch):
    model, inputs = build("llama"), {**prompt(batch=batch, padding=0), **OPTIONS, "max_new_tokens": 220}
    plain = model.generate(**inputs)
    text, stats = speculative(model, oracle(plain, 1.0), inputs, tree="auto", costs=STEEP)
    assert torch.equal(text, plain) and stats.accepted == 0 < stats.drafted
    assert len(rows) == stats.rounds == 219
    assert sum(rows) <= 1.05 * len(rows)


def test_a_lookup_of_fixed_width_loses_little_where_nothing_is_found(monkeypatch):
    """Captured rounds verify the full width even without a match."""
    capture_here(monkeypatch, 1)
    model, inputs = build("llama"), {**prompt(batch=1, padding=0), **OPTIONS, "max_new_tokens": 220}
    plain = model.generate(**inputs)
    text, stats = speculative(model, sdt.PromptLookupDrafter(adaptive=False), inputs, tree="auto", costs=STEEP)
    assert torch.equal(text, plain)
    trees = stats.auto["trees"]
    spent = sum(STEEP.verify_seconds(tree["nodes"]) * tree["rounds"] for tree in trees)
    assert spent <= 1.08 * (219 + 4), trees


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("lag", [0, 1])
def test_rows_that_end_early_are_caught_up_within_their_text(monkeypatch, family, lag):
    """One step further back would be a position for which the model has no learned embedding."""
    if lag:
        capture_here(monkeypatch, 1)
    script = Script([*[ROOT] * 12, sdt.Topology.chain(2)])
    monkeypatch.setattr(generate, "controller", lambda *arguments: script)
    model, inputs = build(family), {**prompt(batch=3), **OPTIONS, "max_new_tokens": 40}
    inputs["eos_token_id"] = eos_in_mid_row(model, prompt(batch=3), **OPTIONS)
    plain = model.generate(**inputs)
    text, _ = speculative(model, sdt.ModelDrafter(build(family)), inputs, tree="auto")
    assert torch.equal(text, plain)


def test_trees_follow_the_costs(rows):
    model, inputs = build("llama"), {**prompt(batch=1), **OPTIONS, "max_new_tokens": 160}
    plain = model.generate(**inputs)
    text, stats = speculative(model, oracle(plain, 0.1), inputs, tree="auto", costs=FLAT)
    assert torch.equal(text, plain)
    assert max(rows) >= 8 and stats.acceptance_length > 3 and stats.auto["speedup"] > 2
    assert sum(tree["rounds"] for tree in stats.auto["trees"]) >= stats.rounds
    rows.clear()
    speculative(model, oracle(plain, 0.1), inputs, tree="auto", costs=STEEP)
    assert sum(rows) <= 4 * len(rows)


@pytest.mark.parametrize(
    ("name", "lag"),
    [
        ("model", 1),
        ("lookup", 1),
        ("oracle", 0),
        ("early", 0),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (("model", 0), ("early", 1))),
    ],
)
def test_the_text_stays(monkeypatch, name, lag):
    if lag:
        capture_here(monkeypatch, 1)
    model, inputs = build("llama"), {**prompt(batch=3), **OPTIONS}
    plain = model.generate(**inputs)
    drafter = sdt.PromptLookupDrafter() if name == "lookup" else drafter_of(name, plain)
    for _ in range(2):
        text, stats = speculative(model, drafter, inputs, tree="auto")
        assert torch.equal(text, plain) and stats.auto["trees"]
    sampled = {**inputs, "do_sample": True, "top_k": 20}
    text, _ = speculative(model, drafter, sampled, tree="auto", seed=3)
    assert torch.equal(text, speculative(model, None, sampled, seed=3)[0])


class Script:
    """A controller that chooses the given trees in turn."""

    summary = {}

    def __init__(self, trees):
        self.trees, self.recorded = trees, []

    def choose(self):
        self.trees = self.trees[1:] + self.trees[:1]
        return self.trees[-1]

    def record(self, topology, accepted, drafted, seconds, built=False):
        self.recorded.append((topology, accepted, drafted))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("replacement", [True, False])
def test_a_draft_model_catches_up_after_plain_rounds(monkeypatch, lag, replacement):
    """The draft model equals the target, so its drafts are right if it has seen the whole text."""
    if lag:
        capture_here(monkeypatch, 1)
        monkeypatch.setattr(graph_runner, "MAX_SHAPES", 2)  # some shapes are evicted and captured again
    script = Script([ROOT, ROOT, ROOT, sdt.Topology.chain(3), ROOT, TREES["wide"], sdt.Topology.chain(1)])
    monkeypatch.setattr(generate, "controller", lambda *arguments: script)
    model, inputs = build("llama"), {**prompt(batch=3), **OPTIONS, "max_new_tokens": 60}
    plain = model.generate(**inputs)
    drafter = sdt.ModelDrafter(build("llama"), replacement=replacement)
    text, stats = speculative(model, drafter, inputs, tree="auto")
    assert torch.equal(text, plain)
    whole = [each for each in script.recorded if each[0].num_nodes > 1][:-3]  # the last tree may be cut by the budget
    assert len(whole) > 4
    for topology, accepted, drafted in whole:
        assert drafted == [True] * 3 and [len(path) for path in accepted] == [topology.max_depth] * 3


def test_on_a_cpu_the_growth_of_a_forward_is_measured_on_layers():
    model = build("llama")
    growth = auto_tree.row_growth(model, 2, 16)
    assert [rows for rows, _ in growth] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert growth[0][1] == 1 and all(a <= b for (_, a), (_, b) in zip(growth, growth[1:], strict=False))
    assert auto_tree.row_growth(model, 2, 16) is growth
    assert auto_tree.row_growth(build("gpt2"), 1, 8) == auto_tree.CPU_PRIOR.verify  # layers without nn.Linear


def test_costs_are_measured_once(monkeypatch):
    capture_here(monkeypatch, 1)
    model, inputs = build("llama"), {**prompt(batch=2), **OPTIONS, "max_new_tokens": 8}
    measured = []
    measure = auto_tree._measure
    monkeypatch.setattr(auto_tree, "_measure", lambda *arguments: measured.append(measure(*arguments)) or measured[-1])
    for _ in range(2):
        speculative(model, sdt.PromptLookupDrafter(), inputs, tree="auto")
    assert len(measured) == 1
    assert [size for size, _ in measured[0].verify] == [1, 2, 3, 4, 6, 8, 12]
    speculative(model, sdt.PromptLookupDrafter(), {**inputs, **prompt(batch=1)}, tree="auto")
    assert len(measured) == 2


def test_measuring_captures_drafts_too_and_takes_no_room_from_the_rounds(monkeypatch):
    """There are as many verification sizes alone as a call may have shapes with graphs."""
    capture_here(monkeypatch, 1)
    monkeypatch.setattr(graph_runner, "MAX_SHAPES", 3)
    model, inputs, timing = build("llama"), {**prompt(batch=2), **OPTIONS, "max_new_tokens": 40}, []
    measure = auto_tree._measure

    def watched(context, session, runner):
        found = measure(context, session, runner)
        timing.append(runner)
        return found

    monkeypatch.setattr(auto_tree, "_measure", watched)
    drafter = sdt.ModelDrafter(build("llama", num_hidden_layers=1))
    _, stats = speculative(model, drafter, inputs, tree="auto")
    sizes = len([size for size in LADDER if size <= auto_tree.most_nodes(model.device)])
    assert timing[0].captured == sizes + len(auto_tree.DRAFT_DEPTHS)
    assert stats.replayed > 0 and stats.captured <= 2 * stats.rounds


def test_costs_hold_for_about_as_long_texts(monkeypatch):
    """A cache grows in buckets. Costs are not measured again for a call whose cache is slightly larger."""
    capture_here(monkeypatch, 1)
    monkeypatch.setattr(cache, "BUCKET", 16)
    model, measured, measure = build("llama"), [], auto_tree._measure
    monkeypatch.setattr(auto_tree, "_measure", lambda *arguments: measured.append(1) or measure(*arguments))
    capacities = set()
    reserve = cache.TreeCache.reserve
    monkeypatch.setattr(
        cache.TreeCache, "reserve", lambda self, slots: (reserve(self, slots), capacities.add(self.capacity))[0]
    )
    for length in (6, 100):
        speculative(model, sdt.PromptLookupDrafter(), {**prompt(length=length), **OPTIONS}, tree="auto")
    assert len(capacities) == 2 and len(measured) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sessions_reserve_memory_for_the_largest_tree(device):
    device = torch.device(device)
    for rule in ("greedy", "block"):
        tree = auto_tree.largest_tree(device, rule)
        assert tree.max_depth == min(auto_tree.most_nodes(device) - 1, auto_tree.MOST_DEPTH)
        assert tree.is_chain if rule == "block" else tree.num_nodes == auto_tree.most_nodes(device)


def test_refusals():
    model = build("llama")
    with pytest.raises(ValueError, match='drafter must be resizable with tree="auto", got Host'):
        sdt.patch(model, drafter=HostDrafter(None), tree="auto")
    with pytest.raises(ValueError, match="got PromptLookupDrafter: give a tree .resizable are prompt lookup with"):
        sdt.patch(model, drafter=sdt.PromptLookupDrafter(branches=2), tree="auto")
    with pytest.raises(ValueError, match="costs must be a Costs or None, got float"):
        sdt.patch(model, tree="auto", costs=1.0)
    with pytest.raises(ValueError, match='costs must be None unless tree="auto", got them with tree=4'):
        sdt.patch(model, tree=4, costs=FLAT)
