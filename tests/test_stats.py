"""Statistics of a call as users print and save them, and drafters as they are printed."""

import dataclasses
import json

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import oracle

OPTIONS = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
FLAT = sdt.Costs(verify=((1, 1.0), (64, 1.0)), draft=((1, 0.0), (16, 0.0)))


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.mark.parametrize("tree", [sdt.Topology.from_widths([2, 2, 1]), "auto"])
def test_stats_are_plain_data(model, tree):
    inputs = {**prompt(batch=2), **OPTIONS}
    plain = model.generate(**inputs)
    options = {"tree": tree, "costs": FLAT if tree == "auto" else None}
    custom = sdt.SpeculativeGenerate(drafter=oracle(plain, 0.3), **options)
    assert torch.equal(model.generate(**inputs, custom_generate=custom), plain)
    stats = sdt.stats(model)
    fields = json.loads(json.dumps(dataclasses.asdict(stats)))
    assert sdt.Stats(**fields) == stats
    assert 0 < stats.accepted == sum(stats.accepted_by_position)
    rates = [count / stats.row_rounds for count in stats.accepted_by_position]
    assert all(0 < later <= earlier <= 1 for earlier, later in zip(rates, rates[1:], strict=False))
    assert 1 + sum(rates) == pytest.approx(stats.acceptance_length)
    if tree == "auto":
        assert {"nodes", "depth", "rounds"} == fields["auto"]["trees"][0].keys()
    for said in ("greedy", f"rounds={stats.rounds}", f"acceptance_length={stats.acceptance_length:.1f}"):
        assert said in repr(stats)


def test_positions_count_rows_that_had_not_ended(model):
    """A chain of 2 that is always right. Of 7 tokens, a row emits 3 in each of two rounds, and the last one in a
    third."""
    inputs = {**prompt(batch=3), **OPTIONS, "max_new_tokens": 8}
    plain = model.generate(**inputs)
    model.generate(**inputs, custom_generate=sdt.SpeculativeGenerate(drafter=oracle(plain, 0.0, tree=3)))
    stats = sdt.stats(model)
    assert (stats.row_rounds, stats.accepted_by_position) == (9, [6, 6])


@pytest.mark.parametrize(
    ("drafter", "said"),
    [
        (lambda model: sdt.ModelDrafter(model, tree=16), "ModelDrafter(model=LlamaForCausalLM, tree=16)"),
        (lambda model: sdt.PromptLookupDrafter(branches=2), "PromptLookupDrafter(branches=2)"),
        (lambda model: sdt.PromptLookupDrafter(), "PromptLookupDrafter()"),
        (lambda model: sdt.OracleDrafter(torch.zeros(2, 9), 0.1), "OracleDrafter(text=[2, 9], error_rate=0.1)"),
        (lambda model: sdt.EarlyExitDrafter(skip=[1]), "EarlyExitDrafter(skip=[1])"),
    ],
)
def test_repr_of_drafters_shows_their_arguments(model, drafter, said):
    assert repr(drafter(model)).startswith(said)
