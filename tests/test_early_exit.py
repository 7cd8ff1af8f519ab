"""Layers of the target as a draft model: their drafts equal those of a model with only these layers."""

from functools import partial

import pytest
import torch
import transformers

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import TREES, assert_ranked_by, snapshot

SHAPES = [sdt.Topology.from_widths([3, 2, 2]), TREES["skipping"]]


@pytest.mark.parametrize(
    ("family", "tree"),
    [
        ("llama", SHAPES[0]),
        ("llama", SHAPES[1]),
        ("gemma3", SHAPES[1]),
        pytest.param("gemma3", SHAPES[0], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "kept", [[0], pytest.param([0, 1], marks=pytest.mark.slow), [0, 1, 2], [0, 2], [1, 2]], ids=str
)
def test_layers_left_out_draft_like_a_model_without_them(family, kept, tree, monkeypatch):
    """The draft uses the target's cache if the first layers are kept, and its own cache otherwise."""
    target, draft = (build(family, num_hidden_layers=3) for _ in range(2))
    draft.model.layers = torch.nn.ModuleList(draft.model.layers[layer] for layer in kept)
    draft.config.num_hidden_layers = len(kept)
    for index, layer in enumerate(draft.model.layers):
        layer.self_attn.layer_idx = index
    if family == "gemma3":
        draft.config.layer_types = [draft.config.layer_types[layer] for layer in kept]
    before = snapshot(target)
    drafter = sdt.EarlyExitDrafter(skip=[layer for layer in range(3) if layer not in kept], tree=tree)
    assert_ranked_by(draft, target, drafter, monkeypatch)
    assert snapshot(target) == before


def test_an_early_exit_runs_no_prompt():
    """The first layers run once for the prompt, then for the draft and the verification of each round."""
    model, calls = build("llama"), []
    hook = model.model.layers[0].register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    with sdt.patched(model, drafter=sdt.EarlyExitDrafter(1, num_tokens=2)):
        model.generate(**prompt(batch=1), do_sample=False, max_new_tokens=4, eos_token_id=NEVER)
    hook.remove()
    assert calls[:4] == [9, 1, 1, 3] and 9 not in calls[1:]


def test_assistant_early_exit():
    model, options = (
        build("llama", num_hidden_layers=3),
        {"do_sample": False, "max_new_tokens": 20, "eos_token_id": NEVER},
    )
    model.generation_config.num_assistant_tokens = 4
    plain = model.generate(**prompt(), **options)
    with sdt.patched(model):
        assert torch.equal(model.generate(**prompt(), **options, assistant_early_exit=2), plain)
        assert sdt.stats(model).drafted > 0
        with pytest.raises(ValueError, match="EarlyExitDrafter: num_layers must be 1 to the 3 of LlamaFor.*got 4"):
            model.generate(**prompt(), **options, assistant_early_exit=4)


def test_models_that_an_early_exit_refuses():
    model = build("llama", num_hidden_layers=3)
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="EarlyExitDrafter: layers must not share inputs or caches"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(2))
    model.config.num_kv_shared_layers = 0
    with pytest.raises(ValueError, match=r"EarlyExitDrafter: skip must name some of the layers 0 to 2.*got \[0, 3\]"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(skip=[0, 3]))
    with pytest.raises(ValueError, match=r"EarlyExitDrafter: skip must name some.*not all, got \[0, 1, 2\]"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(skip=[2, 1, 0]))
    with pytest.raises(ValueError, match="EarlyExitDrafter: num_layers must be 1 to the 3 of .*model.layers, got 0"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(0))
    assert type(model) is transformers.LlamaForCausalLM
    model.model.forward = partial(model.model.forward)
    with pytest.raises(ValueError, match="forward was replaced"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(1))
    model.model.other = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match="must have one list of its 3 layers, got LlamaForCausalLM with"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(1))
