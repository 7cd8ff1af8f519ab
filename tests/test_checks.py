"""Models that `patch` refuses, and models that it must not refuse."""

from functools import partial, wraps

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import specdec_triton as sdt
from families import NEVER, WINDOW, build, prompt
from helpers import snapshot
from specdec_triton.forward.versions import CACHE

OPTIONS = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": NEVER}
LOOKUP = {**OPTIONS, "prompt_lookup_num_tokens": 3}


def assert_exact(model, inputs=None):
    inputs = inputs or prompt()
    plain = model.generate(**inputs, **OPTIONS)
    with sdt.patched(model):
        assert torch.equal(model.generate(**inputs, **LOOKUP), plain)


def assert_refused(model, message):
    before = snapshot(model)
    for role, check in (("model", sdt.patch), ("draft model", sdt.ModelDrafter)):
        with pytest.raises(ValueError, match=f"patch: the {role} must {message}"):
            check(model)
    assert snapshot(model) == before


def halved(module, query, key, value, mask, **kwargs):
    return sdpa_attention_forward(module, query / 2, key, value, mask, **kwargs)


@pytest.fixture
def registered():
    """Registers custom attention functions."""
    AttentionInterface.register("halved", halved)
    AttentionInterface.register("exact_partial", partial(sdpa_attention_forward, dropout=0.0))
    for name in ("halved", "exact_partial"):
        AttentionMaskInterface.register(name, sdpa_mask)
    yield
    for mapping in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        for name in ("halved", "exact_partial"):
            del mapping[name]


def test_an_attention_function_of_the_users_is_refused(registered):
    model = build("llama")
    model.set_attn_implementation("halved")
    assert_refused(model, "run an attention function of transformers.*with 'halved', a function of test_checks")
    model.set_attn_implementation("exact_partial")
    assert_exact(model)
    sdt.patch(model)
    model.set_attn_implementation("halved")  # after patch
    with pytest.raises(ValueError, match="run an attention function of transformers"):
        model.generate(**prompt(), **LOOKUP)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_replaced_attention_function_is_refused(name, monkeypatch):
    model = build("llama")
    model.set_attn_implementation(name)
    assert_exact(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, halved)
    assert_refused(model, f"run an attention function of transformers.*with '{name}', a function of test_checks")


def test_an_unknown_attention_is_refused():
    model = build("llama")
    model.config._attn_implementation_internal = "nonsense"
    assert_refused(model, "run an attention function of transformers.*with 'nonsense', which is not registered")


def test_a_window_of_0_and_a_leftover_key_are_no_windows():
    qwen2_moe = build_of("Qwen2MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    assert qwen2_moe.config.sliding_window is not None
    assert_exact(qwen2_moe)
    leftover = build("llama")
    for leftover.config.sliding_window in (4, 4096):
        assert_exact(leftover)
    assert_exact(build("qwen2", sliding_window=0))
    window = build_of("PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW)
    assert_refused(window, "pass its sliding_window")
    assert_exact(build_of("PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=None))


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("padding", [0, 3])
def test_an_unused_window_limits_the_cache(padding, impl):
    """Llama does not use `sliding_window`. The cache that `generate` creates still keeps only that many keys; a
    `DynamicCache()` keeps all."""
    model, inputs = build("llama"), prompt(padding=padding)
    without = model.generate(**inputs, **OPTIONS)
    model.config.sliding_window = 4
    for make in (dict, lambda: {CACHE: DynamicCache(config=model.config)}, lambda: {CACHE: DynamicCache()}):
        plain = model.generate(**inputs, **OPTIONS, **make())
        assert torch.equal(plain, without) == (make().get(CACHE) is not None and not make()[CACHE].layers)
        for drafter in (None, sdt.PromptLookupDrafter(3, max_ngram=1), sdt.ModelDrafter(build("llama"), num_tokens=3)):
            with sdt.patched(model, drafter=drafter, impl=impl):
                ours = model.generate(**inputs, **OPTIONS, **make())
                assert torch.equal(ours, plain), drafter
                lookup = model.generate(**inputs, **LOOKUP, **make()) if drafter is None else plain
                assert torch.equal(lookup, plain)


def build_of(name, **options):
    """A tiny model of a class that is not in `FAMILIES`."""
    model_class = getattr(transformers, name)
    common = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = model_class.config_class(**common, **options, initializer_range=0.3, tie_word_embeddings=False)
    return model_class(config).eval()


class Delegates(transformers.LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return self.language_model.generate(*args, **kwargs)


class Prepares(transformers.LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)


def test_a_generate_of_a_submodule_is_refused():
    """A patch would have no effect on such a class."""
    model = build("llama")
    model.__class__ = Prepares
    assert_exact(model)
    model.__class__ = Delegates
    model.language_model = build("llama")
    with pytest.raises(ValueError, match="generate by GenerationMixin.generate, got Delegates.*patch the submodule"):
        sdt.patch(model)
    assert type(model) is Delegates
    assert_exact(model.language_model)


class OwnAttention(torch.nn.Module):
    """A module that computes attention itself, as the text decoder next to a vision tower may."""

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        past_key_values.update(hidden_states, hidden_states, 0)
        return hidden_states, None


def test_only_the_text_decoders_attention_counts():
    model = build("llama")
    model.vision_tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    assert_exact(model)
    model.vision_tower.own = OwnAttention()  # not used
    model.vision_tower.config._attn_implementation_internal = "nonsense"
    assert_exact(model)
    model = build("llama")
    model.vision_tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    for layer in model.model.layers:
        layer.self_attn = OwnAttention()
    assert_refused(model, "take its attention from transformers' AttentionInterface.*whose OwnAttention does not")
    mixed = build("llama")
    mixed.model.layers[1].self_attn = OwnAttention()
    assert_refused(mixed, "take its attention from transformers' AttentionInterface.*whose OwnAttention does not")


def test_a_text_decoder_that_attends_by_itself_beside_a_vision_tower():
    """In GIT, the image encoder is part of the module that it names its decoder."""
    config = transformers.GitConfig(
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    assert_refused(transformers.GitForCausalLM(config).eval(), "take its attention.*whose GitSelfAttention does not")


def hand_wrapped(model, wrap):
    model.forward = wrap(model.forward)
    return model


def passing_on(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs)


def narrowing(forward):
    def narrow(input_ids, attention_mask=None, past_key_values=None, cache=None, use_cache=None, return_dict=None):
        raise AssertionError("never called")

    return narrow


def logging(forward):
    @wraps(forward)
    def logged(*args, **kwargs):
        return forward(*args, **kwargs)

    return logged


def test_a_forward_that_was_wrapped_by_hand():
    """Plain `generate` inspects the signature of forward. Without position_ids in it, positions include padded
    columns."""
    for wrap in (passing_on, logging):
        for inputs in (prompt(padding=0), prompt(padding=3)):
            assert_exact(hand_wrapped(build("llama"), wrap), inputs)
    assert_refused(
        hand_wrapped(build("llama"), narrowing), "have a forward that takes position_ids.*was replaced by one"
    )


@pytest.mark.parametrize("wrap", [lambda f: f, logging, passing_on])
def test_a_forward_under_autocast_is_refused(wrap):
    model = hand_wrapped(build("llama"), lambda forward: wrap(torch.autocast("cpu", torch.bfloat16)(forward)))
    assert_refused(model, "run in the dtype of its weights.*under torch.autocast")


def test_accelerates_mixed_precision_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(build("llama"))
    assert_refused(model, "run in the dtype of its weights.*under torch.autocast")


def test_gradient_checkpointing_in_training_is_refused():
    model = build("llama")
    model.gradient_checkpointing_enable()
    assert_exact(model)
    model.train()
    assert_refused(model, "keep keys and values.*gradient checkpointing.*call model.eval")
    model.eval()
    sdt.patch(model)
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.generate(**prompt(), **LOOKUP)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_tuned_prompts_are_refused(kind):
    """Prompt tuning adds tokens or keys before the prompt. However it is applied, the text must not change without an
    error."""
    peft = pytest.importorskip("peft")
    base = build("llama")
    tuned = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ValueError, match=f"PEFT adapter must change weights.*got {kind} 'default'"):
        sdt.patch(tuned)
    with sdt.patched(base), pytest.raises(ValueError, match="generate: "):
        tuned.generate(**prompt(), **LOOKUP)
    assert type(base) is transformers.LlamaForCausalLM
