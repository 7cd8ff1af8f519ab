"""Positions and arguments from the model's own preparation, and caches of earlier turns."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

import specdec_triton as sdt
from families import NEVER, add_noise, build, enlarge_weights, perturbed, prompt
from helpers import snapshot
from specdec_triton.forward.preparation import is_neutral, next_step
from specdec_triton.forward.versions import CACHE

OPTIONS = {"do_sample": False, "max_new_tokens": 14, "eos_token_id": NEVER}
LOOKUP = {**OPTIONS, "prompt_lookup_num_tokens": 3}


def preparing(change, family="llama"):
    """A model of a class that changes the prepared inputs."""
    model = build(family)
    own = type(model)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return change(own.prepare_inputs_for_generation(self, *args, **kwargs))

    methods = {"prepare_inputs_for_generation": prepare_inputs_for_generation, "__module__": own.__module__}
    model.__class__ = type(own.__name__, (own,), methods)
    return model


def with_positions(change):
    return lambda inputs: {**inputs, "position_ids": change(inputs["position_ids"])}


@pytest.mark.parametrize("shift", [1, 7])
@pytest.mark.parametrize("padding", [0, 3])
def test_positions_that_do_not_count_from_0(shift, padding):
    """Rotary embeddings depend on differences of positions, so a common shift would not be noticed. Learned positions
    show it."""
    model = preparing(with_positions(lambda positions: positions + shift), "gpt2")
    inputs = prompt(padding=padding)
    plain = model.generate(**inputs, **OPTIONS)
    assert not torch.equal(plain, build("gpt2").generate(**inputs, **OPTIONS))
    for drafter in (sdt.PromptLookupDrafter(3), sdt.ModelDrafter(perturbed("gpt2"), tree=6), sdt.EarlyExitDrafter(2)):
        with sdt.patched(model, drafter=drafter):
            assert torch.equal(model.generate(**inputs, **OPTIONS), plain)
    assert sdt.stats(model).accepted


def test_the_callers_positions():
    model, inputs = build("gpt2"), prompt(padding=0)
    positions = torch.arange(9).expand(2, -1) + torch.tensor([[5], [0]])
    plain = model.generate(**inputs, position_ids=positions, **OPTIONS)
    assert not torch.equal(plain, model.generate(**inputs, **OPTIONS))
    with sdt.patched(model):
        assert torch.equal(model.generate(**inputs, position_ids=positions, **LOOKUP), plain)


def test_planes_of_positions():
    inputs, model = prompt(padding=2)["input_ids"], build("llama")
    planes = torch.arange(9).expand(3, 2, -1) + torch.tensor([0, 10, 20])[:, None, None]
    cache = DynamicCache()
    model(inputs, **{CACHE: cache})
    outputs = transformers.utils.ModelOutput({CACHE: cache})
    step = next_step(model, inputs, outputs, {CACHE: cache, "position_ids": planes})
    assert step.origin.tolist() == [[0, 0], [-10, -10], [-20, -20]]
    assert step.positions(torch.tensor([[9, 10], [9, 11]]))[1].tolist() == [[19, 20], [19, 21]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_positions(lambda positions: None), "position_ids, got none: it drops them"),
        (with_positions(lambda positions: 2 * positions), "positions that grow by one, got others"),
        (with_positions(lambda positions: positions.repeat(1, 2)), "position_ids of one token in 2 rows, got shape"),
        (lambda inputs: {**inputs, "pixel_values": torch.ones(1)}, "arguments of text alone, got pixel_values"),
        (lambda inputs: {**inputs, "input_ids": None}, "input_ids of the last token, got other inputs"),
        (lambda inputs: {**inputs, "attention_mask": torch.ones(2, 9)}, r"of 5 columns, got one of shape \[2, 9\]"),
        (lambda inputs: inputs["no such"], "KeyError"),
    ],
)
def test_a_model_that_cannot_continue_is_refused_in_patch(change, message):
    model = preparing(change)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"patch: the model must continue a text token by token, got Llama.*{message}"):
        sdt.patch(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="patch: the draft model must continue a text token by token"):
        sdt.ModelDrafter(model)


def test_a_preparation_replaced_after_patch_is_refused_in_the_call():
    """PEFT does this for prompt tuning, for the duration of a call."""
    model, inputs = build("llama"), prompt()
    sdt.patch(model)
    own = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {**own(*args, **kwargs), "position_ids": None}
    before = snapshot(model)
    with pytest.raises(ValueError, match="generate: the model must continue a text token by token.*drops them"):
        model.generate(**inputs, **LOOKUP)
    assert snapshot(model) == before


def test_constants_and_token_types_go_to_every_forward():
    """GPT-2 adds the embedding of token type 0 if token types are given."""
    model, inputs = build("gpt2"), prompt()
    types = torch.zeros_like(inputs["input_ids"])
    plain = model.generate(**inputs, token_type_ids=types, **OPTIONS)
    assert not torch.equal(plain, model.generate(**inputs, **OPTIONS))
    with sdt.patched(model):
        assert torch.equal(model.generate(**inputs, token_type_ids=types, **LOOKUP), plain)
        with pytest.raises(ValueError, match="model arguments must be among .*got token_type_ids"):
            model.generate(**inputs, token_type_ids=types + 1, **LOOKUP)
    seen = []
    scaled = preparing(lambda inputs: {**inputs, "output_router_logits": True})
    hook = scaled.register_forward_pre_hook(
        lambda m, args, named: seen.append(named.get("output_router_logits")), with_kwargs=True
    )
    with sdt.patched(scaled):
        scaled.generate(**inputs, **LOOKUP)
    hook.remove()
    assert len(seen) > 3 and all(seen)


def test_neutral_arguments():
    nothing = [("mm_encoder_outputs", {}), ("x", None), ("x", []), ("x", False), ("token_type_ids", torch.zeros(1, 2))]
    something = [("x", {"a": 1}), ("x", 0.5), ("token_type_ids", torch.ones(1, 2)), ("pixel_values", torch.zeros(1))]
    assert all(is_neutral(*each) for each in nothing) and not any(is_neutral(*each) for each in something)


def _vision(**options):
    return {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        **options,
    }


_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _paligemma():
    text = transformers.GemmaConfig(**_TEXT, **_SPECIAL, head_dim=8).to_dict()
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            text_config=text, vision_config=_vision(), image_token_index=95, vocab_size=96, projection_dim=32
        )
    )


def _gemma3():
    window = {"sliding_window": 6, "sliding_window_pattern": 2}
    text = transformers.Gemma3TextConfig(**_TEXT, **_SPECIAL, **window, head_dim=8).to_dict()
    tokens = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text, vision_config=_vision(), mm_tokens_per_image=4, **tokens, tie_word_embeddings=False
        )
    )


def _qwen2_vl():
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config={**_TEXT, **_SPECIAL, "rope_parameters": rope}, vision_config=vision, **tokens, **_SPECIAL
        )
    )


@pytest.mark.parametrize("make", [_paligemma, _gemma3, _qwen2_vl], ids=lambda make: make.__name__.strip("_"))
def test_text_through_a_vision_language_model(make):
    torch.manual_seed(0)
    model, inputs = enlarge_weights(make()), prompt(padding=2)
    draft = add_noise(copy.deepcopy(model), 0.1)
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])} if make is not _qwen2_vl else {}
    for more in ({}, types):
        plain = model.generate(**inputs, **more, **OPTIONS)
        with sdt.patched(model):
            assert torch.equal(model.generate(**inputs, **more, **LOOKUP), plain)
            assert torch.equal(model.generate(**inputs, **more, **OPTIONS, assistant_model=draft), plain)
            assert 0 < sdt.stats(model).accepted < sdt.stats(model).drafted


def test_preparation_uses_a_copy_of_the_model():
    """Qwen-VL stores its last preparation as an attribute, and another thread may be in the middle of a text."""
    model = enlarge_weights(_qwen2_vl())
    model.model.rope_deltas = noted = torch.tensor([[7]])
    with sdt.patched(model):
        sdt.ModelDrafter(model)
        assert model.model.rope_deltas is noted
