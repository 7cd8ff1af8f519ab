"""Every argument and entry point of transformers' generation, on a model that is patched with a drafter.

Each is served (the text is that of plain decoding), refused by name, or not used, with a warning or because plain
decoding does not use it either. An argument of a newer transformers that is in no table fails a test here.
"""

import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
    WatermarkingConfig,
)

import specdec_triton as sdt
from families import EOS, NEVER, VOCAB, build, perturbed, prompt
from helpers import oracle

LENGTH = {"max_new_tokens": 14, "eos_token_id": NEVER, "pad_token_id": 0}
SAMPLED = {"do_sample": True}
# argument -> arguments of a call that must give the text of plain decoding
SERVED = {
    "bad_words_ids": {"bad_words_ids": [[7], [9, 11]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 6, 7]},
    "disable_compile": {"disable_compile": True},
    "do_sample": SAMPLED,
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "eos_token_id": {"eos_token_id": EOS},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.02},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.02},
    "exponential_decay_length_penalty": {"eos_token_id": EOS, "exponential_decay_length_penalty": (3, 1.4)},
    "forced_bos_token_id": {"forced_bos_token_id": 4},
    "forced_eos_token_id": {"eos_token_id": 4, "forced_eos_token_id": 4},
    "guidance_scale": {"guidance_scale": 1.5},
    "max_length": {"max_new_tokens": None, "max_length": 20},
    "max_new_tokens": {"max_new_tokens": 5},
    "max_time": {"max_time": 1000.0},
    "min_length": {"eos_token_id": EOS, "min_length": 15},
    "min_new_tokens": {"eos_token_id": EOS, "min_new_tokens": 5},
    "min_p": {**SAMPLED, "min_p": 0.05},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "num_beams": {"num_beams": 1},
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 2},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": EOS},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "sequence_bias": {"sequence_bias": [[[7], 4.0], [[9, 11], -3.0]]},
    "suppress_tokens": {"suppress_tokens": [5, 6, 7, 8]},
    "temperature": {**SAMPLED, "temperature": 0.6},
    "top_h": {**SAMPLED, "top_h": 0.5},
    "top_k": {**SAMPLED, "top_k": 9},
    "top_p": {**SAMPLED, "top_p": 0.7},
    "typical_p": {**SAMPLED, "typical_p": 0.6},
    "use_cache": {"use_cache": True},
    "watermarking_config": {"watermarking_config": WatermarkingConfig()},
}
# transformers runs these from the hub, if it may
CUSTOM = {"trust_remote_code": True}
# argument -> a call that is refused, and the error's text
REFUSED = {
    "assistant_early_exit": ({"assistant_early_exit": 1}, "assistance must come from one place"),
    "assistant_ensemble_weight": ({"assistant_ensemble_weight": 0.5}, "assistance must come from one place"),
    "cache_implementation": ({"cache_implementation": "static"}, "cache_implementation must be None or 'dynamic'"),
    "constraints": ({"constraints": [object()], **CUSTOM}, "must run greedy search or sampling, got constrained"),
    "dola_layers": ({"dola_layers": "low", **CUSTOM}, "must run greedy search or sampling, got dola"),
    "force_words_ids": ({"force_words_ids": [[[5]]], "num_beams": 2, **CUSTOM}, "got constrained"),
    "num_beam_groups": (
        {"num_beams": 2, "num_beam_groups": 2, **CUSTOM},
        "must run greedy search or sampling, got group",
    ),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions must be"),
    "output_hidden_states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states must be False",
    ),
    "penalty_alpha": (
        {"penalty_alpha": 0.5, "top_k": 4, **CUSTOM},
        "must run greedy search or sampling, got contrastive",
    ),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, "assistance must come from one place"),
    "speculation_type": ({"speculation_type": "dflash"}, "assistance must come from one place"),
    "use_mtp": ({"use_mtp": True}, "assistance must come from one place"),
}
# argument -> a call that gives the text of the call without it, and a warning
WARNED = {
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.1},
    "compile_config": {"compile_config": CompileConfig()},
    "max_matching_ngram_size": {"max_matching_ngram_size": 3},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
}
# argument -> why plain decoding does not use it either
NEUTRAL = {
    "assistant_lookbehind": "of transformers' way to compare texts of two tokenizers",
    "bos_token_id": "the prompt is given",
    "cache_config": "of quantized caches, which are refused",
    "continuous_batching_config": "of generate_batch, which is refused",
    "decoder_start_token_id": "of encoder-decoder models, which patch refuses",
    "diversity_penalty": "of beam groups, which are refused",
    "early_stopping": "of beam search, which is refused",
    "is_assistant": "transformers sets it on its own drafts",
    "length_penalty": "of beam search",
    "low_memory": "of beam and contrastive search",
    "max_cache_len": "of static caches, which are refused",
    "stop_strings": "needs a tokenizer: test_generate",
    "target_lookbehind": "of transformers' way to compare texts of two tokenizers",
    "token_healing": "changes the prompt before decoding begins; needs a tokenizer",
    "transformers_version": "says who wrote the config",
}
# named arguments of generate() beside the config's
CALL_SERVED = {
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=6, eos_token_id=NEVER)},
    "inputs": {},
    "negative_prompt_attention_mask": {
        "guidance_scale": 1.5,
        "negative_prompt_ids": torch.full((2, 3), 5),
        "negative_prompt_attention_mask": torch.ones(2, 3, dtype=torch.int64),
    },
    "negative_prompt_ids": {"guidance_scale": 1.5, "negative_prompt_ids": torch.full((2, 3), 5)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3, VOCAB, 2))},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids.shape[1] > 15])},
    "logits_processor": {"logits_processor": [lambda ids, scores: -scores]},
}
CALL_TESTED_ELSEWHERE = {
    "assistant_model": "test_patch",
    "custom_generate": "below",
    "kwargs": "the config's arguments, above, and the model's: test_preparation",
    "self": "",
    "streamer": "test_output",
    "synced_gpus": "test_generate",
}


@pytest.fixture(scope="module")
def model():
    return build("llama")


def sequences(output):
    return output if isinstance(output, torch.Tensor) else output.sequences


def assert_served(model, options):
    """The text of plain decoding, with accepted drafts; sampled texts follow from the seed under `coupled`."""
    inputs, options = prompt(), {**LENGTH, **options}
    if options.get("do_sample"):
        plain = sdt.SpeculativeGenerate(seed=1)
        text = sequences(model.generate(**inputs, **options, custom_generate=plain))
    else:
        text = sequences(model.generate(**inputs, **{"do_sample": False, **options}))
    with sdt.patched(model, drafter=oracle(text), seed=1), warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate:")
        ours = sequences(model.generate(**inputs, **{"do_sample": False, **options}))
        assert torch.equal(ours, text)
        assert sdt.stats(model).rounds


def test_every_argument_of_the_generation_config_is_in_one_table():
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    tables = [SERVED, REFUSED, WARNED, NEUTRAL]
    listed = [name for table in tables for name in table]
    assert len(listed) == len(set(listed))
    assert known <= set(listed), "say how a model that is patched with a drafter treats these arguments"


def test_every_argument_of_generate_is_in_a_table():
    known = set(inspect.signature(GenerationMixin.generate).parameters)
    assert known <= set(CALL_SERVED) | set(CALL_TESTED_ELSEWHERE)


@pytest.mark.parametrize("name", SERVED)
def test_served(model, name):
    assert_served(model, SERVED[name])


@pytest.mark.parametrize("name", [name for name in CALL_SERVED if name != "inputs"])
def test_served_arguments_of_the_call(model, name):
    assert_served(model, CALL_SERVED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(model, name):
    options, message = REFUSED[name]
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()), pytest.raises(ValueError, match=message):
        model.generate(**prompt(), **{**LENGTH, "do_sample": False, **options})


@pytest.mark.parametrize("name", WARNED)
def test_not_used_with_a_warning(model, name):
    call = {**prompt(), **LENGTH, "do_sample": False}
    plain = model.generate(**call)
    asked = pytest.warns(UserWarning, match=f"generate: {name} of the call is not used with speculative decoding")
    with sdt.patched(model, drafter=sdt.ModelDrafter(perturbed("llama"))), asked:
        assert torch.equal(model.generate(**call, **WARNED[name]), plain)
    assert sdt.stats(model).rounds
    with asked, sdt.patched(model):
        model.generate(**call, **WARNED[name], assistant_model=perturbed("llama"))
    # nor is plain decoding bothered
    with sdt.patched(model), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(**call, **({} if name == "compile_config" else WARNED[name]))


def test_a_models_own_config_gets_no_warning():
    model = build("llama")
    model.generation_config.num_assistant_tokens = 3
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()), warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate:")
        model.generate(**prompt(), **LENGTH, do_sample=False)


ENTRIES = {
    "generate_batch": lambda model, **given: model.generate_batch([[3, 4]], **given),
    "init_continuous_batching": lambda model, **given: model.init_continuous_batching(**given),
    "continuous_batching_context_manager": lambda model, **given: model.continuous_batching_context_manager(**given),
}
OTHER_METHODS = {
    "adjust_generation_fn": "called while a model is loaded",
    "compute_transition_scores": "reads scores that a call returned",
    "destroy_cached_continuous_batching_manager": "of managers, of which there are none",
    "generate": "above",
    "heal_tokens": "called by generate",
    "load_custom_generate": "called by generate",
    "prepare_inputs_for_generation": "called by generate",
}


def test_every_entry_point_is_in_a_table():
    public = {name for name, _ in inspect.getmembers(GenerationMixin, inspect.isfunction) if not name.startswith("_")}
    assert public <= set(ENTRIES) | set(OTHER_METHODS)


@pytest.mark.parametrize("name", ENTRIES)
def test_continuous_batching_is_refused_with_a_drafter(model, monkeypatch, name):
    """It decodes without speculation. A model that is patched without a drafter serves it as ever."""
    called = SimpleNamespace(count=0)

    def counted(*args, **kwargs):
        called.count += 1

    monkeypatch.setattr(GenerationMixin, name, counted)
    message = f"{name}: a model that is patched with a drafter.*got PromptLookupDrafter: call generate"
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()), pytest.raises(ValueError, match=message):
        ENTRIES[name](model)
    config = GenerationConfig(prompt_lookup_num_tokens=3)
    with sdt.patched(model), pytest.raises(ValueError, match=f"{name}: .*got prompt_lookup_num_tokens"):
        ENTRIES[name](model, generation_config=config)
    assert not called.count
    with sdt.patched(model):
        ENTRIES[name](model)
        ENTRIES[name](model, continuous_batching_config=ContinuousBatchingConfig())
    assert called.count == 2


def test_a_paged_cache_is_continuous_batching(model):
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()), pytest.raises(ValueError, match="generate_batch: "):
        model.generate(prompt()["input_ids"], cache_implementation="paged", max_new_tokens=4)


def test_a_loop_of_the_callers_decodes_without_the_drafter_and_this_is_said(model, tmp_path):
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return input_ids

    folder = tmp_path / "loop" / "custom_generate"
    folder.mkdir(parents=True)
    (folder / "generate.py").write_text("def generate(model, input_ids, **kwargs):\n    return input_ids\n")
    inputs = prompt()
    for custom in ({"custom_generate": loop}, {"custom_generate": str(folder.parent), "trust_remote_code": True}):
        said = pytest.warns(UserWarning, match="custom_generate decodes by itself, without the PromptLookupDrafter")
        with sdt.patched(model, drafter=sdt.PromptLookupDrafter()), said:
            assert torch.equal(model.generate(**inputs, **custom), inputs["input_ids"])
        with sdt.patched(model), warnings.catch_warnings():
            warnings.filterwarnings("error", message="generate:")
            model.generate(**inputs, **custom)
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()), warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate:")
        model.generate(**inputs, **LENGTH, do_sample=False, custom_generate=sdt.SpeculativeGenerate())


@pytest.mark.parametrize("name", ["constraints", "dola_layers", "force_words_ids", "num_beam_groups", "penalty_alpha"])
def test_other_searches_are_refused_without_a_patch(model, name):
    """A `custom_generate` of the caller's switches off the check of transformers."""
    options = {key: value for key, value in REFUSED[name][0].items() if key not in CUSTOM}
    with pytest.raises(ValueError, match="greedy search or sampling|num_beams must be 1"):
        model.generate(**prompt(), **LENGTH, **options, custom_generate=sdt.SpeculativeGenerate())


def test_prompt_lookup_in_the_call_uses_its_ngram_size(model):
    call = {**prompt(), **LENGTH, "do_sample": False, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 3}
    with sdt.patched(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate:")
        model.generate(**call)
    assert sdt.stats(model).rounds
