"""Captured rounds and late reads change nothing but the time: the texts are plain generate's."""

import pytest
import torch

import specdec_triton as sdt
from families import FAMILIES, NEVER, build, prompt
from simulated_graph import SimulatedGraphs
from specdec_triton import engine
from test_generate import TREES, oracle


@pytest.fixture(params=[0, 1], ids=["lag0", "lag1"])
def captured(request, monkeypatch):
    """Stages are captured on this device, too, and read late."""
    monkeypatch.setitem(engine.CAPTURES, "cpu", SimulatedGraphs)
    monkeypatch.setitem(engine.LAG, "cpu", request.param)


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setitem(engine.LAG, "cpu", 1)


def drafters(model, text):
    return {
        "none": None,
        "model": sdt.ModelDrafter(build("llama", seed=1), num_tokens=3),
        "tree": sdt.ModelDrafter(build("llama", seed=0, num_hidden_layers=1), tree=TREES["wide"]),
        "lookup": sdt.PromptLookupDrafter(branches=2),
        "oracle": oracle(text, tree=TREES["wide"]),
        "early": sdt.EarlyExitDrafter(2, num_tokens=3),
    }


def speculative(model, drafter, inputs, **options):
    text = model.generate(**inputs, custom_generate=sdt.SpeculativeGenerate(drafter=drafter, **options))
    return text, sdt.stats(model)


@pytest.mark.parametrize("name", ["none", "model", "tree", "lookup", "oracle", "early"])
def test_captured_rounds_give_the_same_text(captured, name):
    model = build("llama")
    inputs = {**prompt(batch=3), "do_sample": False, "eos_token_id": NEVER, "max_new_tokens": 40}
    plain = model.generate(**inputs)
    text, stats = speculative(model, drafters(model, plain)[name], inputs)
    assert torch.equal(text, plain)
    assert stats.why_eager is None and stats.replayed > 5, stats
