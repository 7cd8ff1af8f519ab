"""Exceptions anywhere in a call: afterwards the model and its text are exactly as before."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from transformers import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import specdec_triton as sdt
from families import NEVER, VOCAB, build, prompt
from helpers import snapshot
from specdec_triton.drafters import Drafter, DraftSession
from specdec_triton.drafters.level_session import LevelSession

OPTIONS = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": NEVER}


class Fault(BaseException):
    """A BaseException that is not an Exception, like KeyboardInterrupt."""


class Tripwire:
    """Raises at its first call after at least `at` rounds. Remembers the number of rounds."""

    def __init__(self, model, at, error):
        self.model, self.at, self.error, self.rounds = model, at, error, []

    def __call__(self, *args, **kwargs):
        if self.model not in sdt._patch._stats:
            return  # the streamer gets the prompt before the engine runs
        self.rounds.append(sdt.stats(self.model).rounds)
        if self.rounds[-1] >= self.at:
            raise self.error


class Streamer(BaseStreamer):
    def __init__(self, put=lambda: None, end=lambda: None):
        self.got, self._put, self.end = [], put, end

    def put(self, value):
        self._put()
        self.got.append(value.flatten().tolist())


def criterion(call):
    def ask(input_ids, scores, **kwargs):
        call()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return ask


def processor(call, stateless=False):
    def process(input_ids, scores):
        call()
        return scores

    process.stateless = stateless
    return process


def before(function, call):
    """`function`, with `call` before it."""

    def run(*args, **kwargs):
        call()
        return function(*args, **kwargs)

    return run


def during_forward(name):
    def place(wire, target, draft, monkeypatch):
        model = {"target": target, "draft": draft}[name]
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *args: wire())
        return {}, hook.remove

    return place


def in_function(owner, name):
    def place(wire, target, draft, monkeypatch):
        monkeypatch.setattr(owner, name, before(getattr(owner, name), wire))
        return {}, monkeypatch.undo

    return place


def as_argument(make):
    return lambda wire, target, draft, monkeypatch: (make(wire), lambda: None)


# name of a place in a call -> function that makes it raise; returns (arguments of generate, function that undoes it)
PLACES = {
    "processor": as_argument(lambda wire: {"logits_processor": [processor(wire)]}),
    "grammar": as_argument(lambda wire: {"prefix_allowed_tokens_fn": lambda row, text: wire() or list(range(VOCAB))}),
    "criterion": as_argument(lambda wire: {"stopping_criteria": [criterion(wire)]}),
    "streamer": as_argument(lambda wire: {"streamer": Streamer(put=wire)}),
    "streamer's end": as_argument(lambda wire: {"streamer": Streamer(end=wire)}),
    "target forward": during_forward("target"),
    "draft forward": during_forward("draft"),
    "drafter": in_function(LevelSession, "draft"),
    "drafter told": in_function(LevelSession, "observe"),
    "placing": in_function(sdt.TreeCache, "place"),
    "acceptance": in_function(sdt.ops, "accept_greedy"),
    "compaction": in_function(sdt.ops, "compact_kv"),
    "appending": in_function(sdt.ops, "append_tokens"),
    "cache growth": in_function(sdt.TreeCache, "_allocate"),
}


ERRORS = (KeyboardInterrupt(), torch.OutOfMemoryError("no memory"), Fault())
MOMENTS = ("first", "third", "last")
# each place with each error and at each moment; the quick tests skip some of these combinations
CELLS = [
    pytest.param(place, at, error, marks=[] if (number + first + second) % 3 == 0 else pytest.mark.slow)
    for number, place in enumerate(PLACES)
    for first, at in enumerate(MOMENTS)
    for second, error in enumerate(ERRORS)
]


@pytest.fixture(scope="module")
def short():
    """A short call of a small model, and its plain text."""
    call = {**prompt(batch=1, length=6), **OPTIONS, "max_new_tokens": 10}
    return call, build("llama", num_hidden_layers=2).generate(**call)


@pytest.mark.parametrize(("place", "at", "error"), CELLS, ids=repr)
def test_nothing_is_left_behind(place, at, error, short, monkeypatch):
    monkeypatch.setattr(sdt.forward.cache, "BUCKET", 1)  # makes the cache grow in every round
    monkeypatch.setattr(sdt.engine.generate, "FIRST_RESERVE", 1)
    model, draft = (build("llama", seed=seed, num_hidden_layers=2) for seed in (0, 1))
    call, plain = short
    draft.generation_config.num_assistant_tokens = 3
    sdt.patch(model, tree=sdt.Topology.from_widths([2, 1]))
    unarmed = Tripwire(model, NEVER, error)
    arguments, remove = PLACES[place](unarmed, model, draft, monkeypatch)
    assert torch.equal(model.generate(**call, assistant_model=draft, **arguments), plain)
    remove()
    assert sdt.stats(model).rounds > 6
    assert len(unarmed.rounds) == 1 if place == "streamer's end" else len(set(unarmed.rounds)) > 2
    del sdt._patch._stats[model]

    monkeypatch.setattr(sdt.forward.cache, "BUCKET", 1)
    monkeypatch.setattr(sdt.engine.generate, "FIRST_RESERVE", 1)
    wire = Tripwire(model, {"first": 0, "third": 2, "last": max(unarmed.rounds)}[at], error)
    before_fault = snapshot(model), snapshot(draft)
    arguments, remove = PLACES[place](wire, model, draft, monkeypatch)
    arguments = {"streamer": Streamer()} | arguments
    with pytest.raises(type(error)) as raised:
        model.generate(**call, **arguments, assistant_model=draft)
    remove()
    assert raised.value is error
    assert (snapshot(model), snapshot(draft)) == before_fault
    text = sum(arguments["streamer"].got, [])
    assert text == plain[0, : len(text)].tolist()
    if at != "first":
        assert len(text) > call["input_ids"].shape[1]
    assert torch.equal(model.generate(**call, assistant_model=draft), plain)
    sdt.unpatch(model)
    assert torch.equal(model.generate(**call), plain)


class Countdown:
    """A callback that raises at its n-th call."""

    def __init__(self, calls, error=Fault):
        self.calls, self.error = calls, error

    def __call__(self):
        self.calls -= 1
        if self.calls <= 0:
            raise self.error


@pytest.mark.parametrize("calls", [1, 2, 5, 9])
@pytest.mark.parametrize("where", ["logits_processor", "stateless", "stopping_criteria"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_text_before_a_callback_raised_is_streamed(batch, where, calls):
    """The same text is streamed as by plain `generate`, although a later round may have run."""
    model, inputs = build("llama"), prompt(batch=batch)
    text = model.generate(**inputs, **OPTIONS)
    make = criterion if where == "stopping_criteria" else partial(processor, stateless=where == "stateless")
    where = where if where == "stopping_criteria" else "logits_processor"
    got = []
    for context in (nullcontext(), sdt.patched(model, drafter=sdt.OracleDrafter(text, tree=sdt.Topology.chain(3)))):
        streamer = Streamer()
        with context, pytest.raises(Fault):
            model.generate(**inputs, **OPTIONS, streamer=streamer, **{where: [make(Countdown(calls))]})
        got.append(streamer.got)
    assert got[0] == got[1] and len(got[0]) >= calls


@pytest.mark.parametrize("place", ["acceptance", "drafter", "target forward", "processor"])
@pytest.mark.parametrize("rule", ["coupled", "multi_round"])
def test_nothing_is_left_behind_by_sampling(rule, place, monkeypatch):
    model, draft, inputs, error = build("llama"), build("llama", seed=1), prompt(), KeyboardInterrupt()
    options = {**OPTIONS, "do_sample": True, "top_k": 30, "max_new_tokens": 10}
    sdt.patch(model, drafter=sdt.ModelDrafter(draft, tree=sdt.Topology.from_widths([2, 1])), rule=rule, seed=4)
    text = model.generate(**inputs, **options)
    asked = as_argument(lambda wire: {"logits_processor": [processor(wire, stateless=True)]})
    places = {**PLACES, "acceptance": in_function(sdt.ops, "accept_sample"), "processor": asked}
    state = snapshot(model), snapshot(draft)
    del sdt._patch._stats[model]
    arguments, remove = places[place](Tripwire(model, 2, error), model, draft, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as raised:
        model.generate(**inputs, **options, **arguments)
    remove()
    assert raised.value is error and (snapshot(model), snapshot(draft)) == state
    assert torch.equal(model.generate(**inputs, **options), text)


def test_an_interrupt_after_the_end_is_raised():
    """An interrupt is not an error of the processor and must not be dropped."""
    model, inputs = build("llama"), prompt(batch=1)
    text = model.generate(**inputs, **OPTIONS)
    stop = {"stopping_criteria": [lambda ids, scores, **k: torch.tensor([ids.shape[1] >= 12])]}
    with sdt.patched(model, drafter=sdt.OracleDrafter(text)), pytest.raises(KeyboardInterrupt):
        wire = processor(Countdown(4, KeyboardInterrupt), stateless=True)
        model.generate(**inputs, **OPTIONS, **stop, logits_processor=[wire])


def test_scores_of_the_text_before_a_processor_raised():
    """A criterion gets the scores of this text."""
    model, inputs, seen = build("llama"), prompt(batch=1), ([], [])
    text = model.generate(**inputs, **OPTIONS)
    options = {"output_scores": True, "return_dict_in_generate": True}
    for context, got in zip((nullcontext(), sdt.patched(model, drafter=sdt.OracleDrafter(text))), seen, strict=True):

        def ask(ids, scores, got=got, **kwargs):
            got.append(scores[-1].clone())
            return torch.zeros(1, dtype=torch.bool)

        with context, pytest.raises(Fault):
            wire = processor(Countdown(5))
            model.generate(**inputs, **OPTIONS, **options, logits_processor=[wire], stopping_criteria=[ask])
    assert len(seen[0]) == len(seen[1]) == 4
    for plain, ours in zip(*seen, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_an_exception_of_a_processor_after_the_end_is_dropped():
    """Plain `generate` would have stopped before calling the processor."""
    model, inputs = build("llama"), prompt(batch=1)
    text = model.generate(**inputs, **OPTIONS)
    stop = {"stopping_criteria": [MaxLengthCriteria(14), lambda ids, scores, **k: torch.tensor([ids.shape[1] >= 12])]}
    plain = model.generate(**inputs, **OPTIONS, **stop, logits_processor=[processor(Countdown(4, ValueError))])
    assert plain.shape[1] == 12
    with sdt.patched(model, drafter=sdt.OracleDrafter(text, tree=sdt.Topology.chain(5))):
        for stateless in (True, False):  # called once more, or not at all
            wire = processor(Countdown(4, ValueError), stateless)
            assert torch.equal(model.generate(**inputs, **OPTIONS, **stop, logits_processor=[wire]), plain)


class Broken(Drafter):
    """A drafter that returns a chain of ones, changed by `spoil`."""

    def __init__(self, spoil):
        self.spoil = spoil

    def start(self, context, tree=None):
        return BrokenSession(context, self.spoil)


class BrokenSession(DraftSession):
    max_nodes, max_depth = 4, 3

    def __init__(self, context, spoil):
        self.context, self.spoil = context, spoil

    def draft(self):
        tokens = torch.ones(len(self.context.length), 4, dtype=torch.int64)
        tokens[:, 0] = self.context.root
        return self.spoil(tokens)


def chain(tokens, parents=(-1, 0, 1, 2), **changes):
    parents = torch.tensor([parents] * len(tokens), dtype=torch.int32)
    return sdt.DraftTree(**{**vars(sdt.DraftTree.from_parents(tokens, parents, 3)), **changes})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: chain(t.index_fill(1, torch.tensor([2]), 61)), "tokens must be 0 to 60"),
        (lambda t: chain(t.index_fill(1, torch.tensor([3]), -1)), "tokens must be 0 to 60"),
        (lambda t: chain(t.index_fill(1, torch.tensor([0]), 5)), "must be the last emitted token"),
        (lambda t: chain(t, (0, 0, 1, 2)), r"parents\[:, 0\] must be -1"),
        (lambda t: chain(t, (-1, 2, 1, 2)), r"parents\[:, i\] must be -1 \(padding\) or a real node before i"),
        (lambda t: chain(t, (-1, 0, -1, 2)), r"parents\[:, i\] must be -1 \(padding\) or a real node before i"),
        (lambda t: chain(t, max_depth=2), "depth must be at most max_depth, 2"),
        (lambda t: chain(t, depth=torch.tensor([[0, 1, 1, 2]])), "depth must count the edges from the root"),
        (lambda t: chain(t, ancestors=torch.tensor([[[1], [3], [5], [15]]])), "ancestors must be those of parents"),
        (lambda t: chain(t, (-1, 0, 0, 1), is_chain=True), "is_chain must hold"),
        (lambda t: chain(t.repeat(2, 1)), r"tokens must be torch.int64 \[1, 4\], got torch.int64 \[2, 4\]"),
        (lambda t: replace(chain(t), tokens=t.int()), "tokens must be torch.int64 .*got torch.int32"),
        (lambda t: chain(t, ancestors=torch.zeros(1, 4, 2, dtype=torch.int64)), r"ancestors must be .*\[1, 4, 1\]"),
        (lambda t: chain(t, sampling="without"), "sampling must be one of none, with, without, with draft_logits and"),
        (lambda t: chain(t, sampling="junk"), "sampling must be one of none, with, without.*got 'junk'"),
    ],
)
def test_a_drafters_garbage_is_refused_by_name(spoil, message):
    model, inputs = build("llama"), prompt(batch=1)
    before = snapshot(model)
    with (
        sdt.patched(model, drafter=Broken(spoil)),
        pytest.raises(ValueError, match=f"Broken: malformed draft tree.*{message}"),
    ):
        model.generate(**inputs, **OPTIONS)
    assert snapshot(model) == before


def test_a_drafter_must_return_a_tree():
    model = build("llama")
    with (
        sdt.patched(model, drafter=Broken(lambda tokens: tokens)),
        pytest.raises(ValueError, match="Broken: draft must return a DraftTree, got Tensor"),
    ):
        model.generate(**prompt(batch=1), **OPTIONS)


@pytest.mark.parametrize("at", [1, 5])
def test_nan_logits_of_a_draft_are_an_error_that_names_it(at):
    model, draft, calls = build("llama"), build("llama", seed=1), []
    state = snapshot(model), snapshot(draft)

    def spoil(module, inputs, output):
        calls.append(output)
        if len(calls) > at:
            output[1] = float("nan")

    hook = draft.lm_head.register_forward_hook(spoil)
    with (
        sdt.patched(model, drafter=sdt.ModelDrafter(draft, tree=6)),
        pytest.raises(RuntimeError, match="ModelDrafter: the draft's logits must be finite .*in row 1 of 2"),
    ):
        model.generate(**prompt(), **OPTIONS)
    hook.remove()
    assert (snapshot(model), snapshot(draft)) == state


def test_a_drafter_of_ones_own():
    model, inputs = build("llama"), prompt()
    plain = model.generate(**inputs, **OPTIONS)
    with sdt.patched(model, drafter=Broken(chain)):
        assert torch.equal(model.generate(**inputs, **OPTIONS), plain)


def lines_of(*modules):
    """A trace function for the files of the package."""
    return {module.__file__ for module in modules}


def interrupted(action, files, at=None):
    """Run `action`. Raise an exception at the first visit of line `at`, a (file, number) pair; without `at`, return the
    visited lines."""
    visited = {}

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in files:
            return None
        place = frame.f_code.co_filename, frame.f_lineno
        if event == "line":
            visited.setdefault(place)
            if place == at:
                raise Fault
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return list(visited)


def enter_and_leave(model):
    with sdt.patched(model, tree=3), sdt.patched(model, drafter=sdt.PromptLookupDrafter()):
        pass


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize("action", [sdt.patch, sdt.unpatch, enter_and_leave], ids=lambda action: action.__name__)
def test_an_interrupt_at_any_line_of_patching(action, patched_before):
    """After the interrupt the model is as before, and the next call succeeds."""
    if action is sdt.unpatch and not patched_before:
        pytest.skip("there is nothing to undo")
    model, files = build("llama"), lines_of(sdt.forward.checks, sdt._patch)
    enter_and_leave(model)  # fills caches, whose lines run once per process
    untouched = snapshot(model)

    def prepare():
        if patched_before:
            sdt.patch(model, tree=2)
        return snapshot(model)

    before = prepare()
    places = interrupted(lambda: action(model), files)
    assert len(places) > 20
    if action is not enter_and_leave:
        assert (snapshot(model) == before) == (action is sdt.patch and patched_before)
    for at in places:
        if type(model) is not transformers.LlamaForCausalLM:
            sdt.unpatch(model)
        assert snapshot(model) == untouched
        before = prepare()
        with pytest.raises(Fault):
            interrupted(lambda: action(model), files, at)
        assert snapshot(model) == before, f"{at} left something behind"
        if patched_before:
            assert in_force(model).tree == 2


def in_force(model):
    return sdt._patch._current_options(model)


def test_an_interrupt_at_any_line_around_a_verify_forward():
    model, inputs = build("llama", num_hidden_layers=1), prompt(batch=1, length=5)
    options = {**OPTIONS, "max_new_tokens": 4}
    plain = model.generate(**inputs, **options)
    sdt.patch(model, drafter=sdt.PromptLookupDrafter(3))
    files = lines_of(sdt.forward.attention, sdt.forward.runner, sdt._patch)
    before, places = snapshot(model), interrupted(lambda: model.generate(**inputs, **options), files)
    assert len(places) > 60
    for at in places:
        with pytest.raises(Fault):
            interrupted(lambda: model.generate(**inputs, **options), files, at)
        assert snapshot(model) == before, f"{at} left something behind"
        with torch.no_grad():
            model(**inputs)  # with its own attention
    assert torch.equal(model.generate(**inputs, **options), plain)
    sdt.unpatch(model)


def test_a_half_unpatched_model_is_restored():
    """An interrupt between two assignments cannot always be excluded. The next call of any kind restores the model."""
    plain_class, inputs = transformers.LlamaForCausalLM, prompt(batch=1)
    for heal in (
        lambda model: model.generate(**inputs, **OPTIONS),
        sdt.unpatch,
        lambda model: enter_and_leave(model),
        lambda model: (sdt.patch(model), sdt.unpatch(model)),
    ):
        model = build("llama")
        sdt.patch(model, drafter=sdt.PromptLookupDrafter())
        del vars(model)[sdt._patch.STATE]
        assert type(model) is not plain_class
        heal(model)
        assert type(model) is plain_class
