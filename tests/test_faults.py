"""An exception anywhere in mid-generation: the model is afterwards exactly as before, and so is its text."""

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import specdec_triton as sdt
from families import NEVER, build, prompt
from specdec_triton.drafters import Drafter, DraftSession
from test_patch import snapshot

OPTIONS = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": NEVER}


class Fault(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


class Countdown:
    """Raises at its n-th call."""

    def __init__(self, calls, error):
        self.calls, self.error = calls, error

    def __call__(self, *args, **kwargs):
        self.calls -= 1
        if self.calls <= 0:
            raise self.error
        return args[1] if len(args) == 2 and isinstance(args[1], torch.Tensor) else None


class Streamer(BaseStreamer):
    def __init__(self, countdown):
        self.countdown = countdown

    def put(self, value):
        self.countdown()

    def end(self):
        self.countdown()


def criterion(countdown):
    def ask(input_ids, scores, **kwargs):
        countdown()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return ask


def during_forward(model, countdown):
    return model.model.layers[1].mlp.register_forward_hook(lambda *args: countdown())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no memory"), Fault()], ids=repr)
@pytest.mark.parametrize("calls", [1, 4, 9])
@pytest.mark.parametrize("place", ["processor", "criterion", "streamer", "target forward", "draft forward", "drafter"])
def test_nothing_is_left_behind(place, calls, error):
    model, draft, inputs = build("llama"), build("llama", seed=1), prompt(batch=1)
    plain = model.generate(**inputs, **OPTIONS)
    sdt.patch(model)
    before, draft_before = snapshot(model), snapshot(draft)
    countdown, options, hook = Countdown(calls, error), {"assistant_model": draft}, None
    draft.generation_config.num_assistant_tokens = 3
    if place == "processor":
        options["logits_processor"] = [countdown]
    elif place == "criterion":
        options["stopping_criteria"] = [criterion(countdown)]
    elif place == "streamer":
        options["streamer"] = Streamer(countdown)
    elif place == "target forward":
        hook = during_forward(model, countdown)
    elif place == "draft forward":
        hook = during_forward(draft, countdown)
    else:
        sdt.patch(model, drafter=Broken(countdown))
        options = {}
    with pytest.raises(type(error)) as raised:
        model.generate(**inputs, **OPTIONS, **options)
    assert raised.value is error
    if hook is not None:
        hook.remove()
    draft.generation_config.num_assistant_tokens = None
    assert snapshot(model) == before and snapshot(draft) == draft_before
    sdt.patch(model)
    assert torch.equal(model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=3), plain)
    sdt.unpatch(model)
    assert torch.equal(model.generate(**inputs, **OPTIONS), plain)


class Broken(Drafter):
    """Drafts a chain of ones; `spoil` may raise, or return another tree."""

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
        tree = sdt.DraftTree.from_topology(sdt.Topology.chain(3), tokens)
        if not isinstance(self.spoil, Countdown):
            return self.spoil(tokens)
        self.spoil()
        return tree


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


def test_a_drafter_of_ones_own():
    model, inputs = build("llama"), prompt()
    plain = model.generate(**inputs, **OPTIONS)
    with sdt.patched(model, drafter=Broken(chain)):
        assert torch.equal(model.generate(**inputs, **OPTIONS), plain)
