"""The cache of a call: its growth, and caches of earlier turns, with which plain and speculative calls continue."""

import re

import pytest
import torch
import transformers
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache, StaticCache

import specdec_triton as sdt
from families import NEVER, VOCAB, build, perturbed, prompt
from helpers import prefilled
from specdec_triton.forward.cache import BUCKET
from specdec_triton.forward.versions import CACHE

OPTIONS = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": NEVER, "return_dict_in_generate": True}
LOOKUP = {"prompt_lookup_num_tokens": 3}


def turns(model, inputs, kinds, empty, seed=0):
    """The texts of a conversation and its last cache. Each turn is plain or uses the given assistance."""
    generator, texts, cache = torch.Generator().manual_seed(seed), [], empty()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for assistance in kinds:
        output = model.generate(ids, attention_mask=mask, **OPTIONS, **{CACHE: cache}, **assistance)
        texts.append(output.sequences)
        cache = output[CACHE]
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        said = torch.randint(3, VOCAB, (len(ids), 5), generator=generator)
        ids = torch.cat([output.sequences, said], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
    return texts, cache


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
@pytest.mark.parametrize("typed", [False, True], ids=["history", "windows"])
def test_a_conversation(family, typed):
    """In a cache that is created from the config, layers with a sliding window hold only their window."""
    model, inputs, drafts = build(family), prompt(padding=2), []
    empty = (lambda: DynamicCache(config=model.config)) if typed else DynamicCache
    expected, cache = turns(model, inputs, [{}, {}, {}], empty)
    assistance = {"assistant_model": perturbed(family)}
    with sdt.patched(model):
        for kinds in ([LOOKUP] * 3, [{}, assistance, {}], [assistance, {}, LOOKUP]):
            texts, ours = turns(model, inputs, kinds, empty)
            assert all(torch.equal(text, plain) for text, plain in zip(texts, expected, strict=True))
            drafts.append(ours)
    for ours in drafts:
        for layer, plain in zip(ours.layers, cache.layers, strict=True):
            assert type(layer) is type(plain) and layer.get_seq_length() == plain.get_seq_length()
            torch.testing.assert_close(layer.keys, plain.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.values, plain.values, rtol=1e-4, atol=1e-4)


def test_only_new_tokens_are_run():
    model, inputs, widths = build("llama"), prompt(padding=0), []
    cache = DynamicCache()
    with sdt.patched(model):
        first = model.generate(**inputs, **OPTIONS, **LOOKUP, **{CACHE: cache}).sequences
        hook = model.register_forward_pre_hook(
            lambda m, args, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
        )
        text = torch.cat([first, first[:, :4]], dim=1)
        model.generate(text, attention_mask=torch.ones_like(text), **OPTIONS, **LOOKUP, **{CACHE: cache})
        hook.remove()
    assert widths[0] == 5  # the last emitted token is not in the cache
    assert cache.get_seq_length() == text.shape[1] + 7  # the caller's own cache has grown


def test_an_edited_turn():
    """As in multi-turn chats: the part of the cache that no longer matches is cropped."""
    model, inputs = build("llama"), prompt(padding=2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with sdt.patched(model):
        cache = DynamicCache()
        first = model.generate(ids, attention_mask=mask, **OPTIONS, **LOOKUP, **{CACHE: cache}).sequences
        edited = torch.cat([first[:, :11], (first[:, 11:14] + 7) % 50 + 3], dim=1)
        mask = torch.nn.functional.pad(mask, (0, edited.shape[1] - mask.shape[1]), value=1)
        cache.crop(11 - cache.get_seq_length())
        ours = model.generate(edited, attention_mask=mask, **OPTIONS, **LOOKUP, **{CACHE: cache}).sequences
    assert torch.equal(ours, model.generate(edited, attention_mask=mask, **OPTIONS).sequences)


def test_a_caches_caller_need_not_ask_for_a_dictionary():
    model, inputs, caches = build("llama"), prompt(padding=0), (DynamicCache(), DynamicCache())
    options = {**OPTIONS, "return_dict_in_generate": False}
    plain = model.generate(**inputs, **options, **{CACHE: caches[0]})
    with sdt.patched(model):
        assert torch.equal(model.generate(**inputs, **options, **LOOKUP, **{CACHE: caches[1]}), plain)
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)


def test_caches_that_cannot_be_used_are_refused():
    model, inputs = build("llama"), prompt(padding=0)
    full, shorter = DynamicCache(), {name: tensor[:, :6] for name, tensor in inputs.items()}
    model.generate(**inputs, **OPTIONS, **{CACHE: full})
    new = {"input_ids": inputs["input_ids"][:, :3], "attention_mask": torch.ones(2, 19, dtype=torch.int64)}
    with sdt.patched(model):
        for call, cache, message in (
            (
                inputs,
                StaticCache(config=model.config, max_cache_len=64),
                "must be None or a DynamicCache .*StaticCache",
            ),
            (shorter, full, "must hold fewer columns than the 6 of input_ids.*got 16: crop it"),
            (new, full, "must hold fewer columns than the 3 of input_ids"),
        ):
            with pytest.raises(ValueError, match=f"generate: {CACHE} {message}"):
                model.generate(**call, **OPTIONS, **LOOKUP, **{CACHE: cache})


@pytest.mark.parametrize("saved", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_cache_options_of_the_generation_config_are_overridden(saved):
    """A cache implementation in the model's saved generation config is overridden; in a call it is refused."""
    model, inputs = build("llama"), prompt()
    plain = model.generate(**inputs, **OPTIONS).sequences
    model.generation_config.update(**saved)
    before = model.generation_config.to_dict()
    name = next(iter(saved))
    for generate in (
        lambda: model.generate(**inputs, **OPTIONS, **LOOKUP),
        lambda: model.generate(
            **inputs, **OPTIONS, custom_generate=sdt.SpeculativeGenerate(drafter=sdt.PromptLookupDrafter(3))
        ),
    ):
        with sdt.patched(model), pytest.warns(UserWarning, match=f"generate: {name}=.*is not used with speculative"):
            assert torch.equal(generate().sequences, plain)
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda outputs: outputs.__setitem__(CACHE, None), "must leave a cache of keys and values, got NoneType"),
        (lambda outputs: outputs[CACHE].layers.clear(), "must leave a cache of keys and values, got DynamicCache"),
        (lambda outputs: outputs[CACHE].crop(-1), "keys and values of its 9 columns in every layer, got 8"),
        (lambda outputs: outputs[CACHE].layers[1].crop(-2), "its 9 columns in every layer, got 7, 9"),
        (
            lambda outputs: setattr(outputs[CACHE].layers[0], "values", outputs[CACHE].layers[0].values.half()),
            "of the same dtype, device and batch size.*float16.*without mixed precision",
        ),
    ],
)
def test_the_cache_of_a_prefill_is_checked(spoil, message):
    model = build("llama")

    def after(module, args, outputs):
        if outputs[CACHE].get_seq_length() == 9:
            spoil(outputs)

    hook = model.register_forward_hook(after)
    with sdt.patched(model), pytest.raises(ValueError, match=f"generate: .*{message}"):
        model.generate(**prompt(), **OPTIONS, **LOOKUP)
    hook.remove()
    assert type(model) is transformers.LlamaForCausalLM


def test_the_cache_grows_and_keeps_its_contents():
    cache = prefilled(build("llama"), prompt(), capacity=9).cache
    assert cache.capacity == cache.slots == BUCKET
    address, before = cache.storage.data_ptr(), [layer.keys[:, :, :9].clone() for layer in cache.layers]
    cache.reserve(BUCKET)
    assert cache.storage.data_ptr() == address
    cache.reserve(BUCKET + 1)
    assert cache.capacity == cache.slots == 2 * BUCKET and cache.storage.data_ptr() != address
    cache.reserve(2 * BUCKET + 1)
    assert cache.slots == 3 * BUCKET
    for layer, keys in zip(cache.layers, before, strict=True):
        assert layer.keys.shape[2] == cache.slots
        assert torch.equal(layer.keys[:, :, :9], keys) and not layer.keys[:, :, 9:].any()
    dynamic = cache.to_dynamic(7)
    assert dynamic.get_seq_length() == 7 and torch.equal(dynamic.layers[1].keys, before[1][:, :, :7])


def test_a_compiled_write_copies_no_plane():
    """Inductor's code writes the rows in place; none of its loops runs over a whole plane."""
    cache = prefilled(build("llama", num_hidden_layers=1), prompt(length=9)).cache
    heads, _, dim = cache.layers[0].keys.shape[1:]
    states = torch.randn(2, heads, 4, dim)

    def write(states, base):
        cache.place(base[:, None] + torch.arange(4))
        return [plane.sum() for plane in cache.update(states, states, 0)]

    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True):
        _, [code] = run_and_get_code(torch.compile(write, fullgraph=True), states, torch.tensor([9, 5]))
    bounds = [int(bound) for bound in re.findall(r"<static_cast<int64_t>\((\d+)L\)", code)]
    reads, plane = 2, cache.layers[0].keys.numel()
    assert bounds.count(plane) == reads, f"{bounds.count(plane) - reads} loops copy a plane"
    for row, base in enumerate((9, 5)):
        assert torch.equal(cache.layers[0].values[row, :, base : base + 4], states[row])


def test_a_cache_that_dropped_its_history_is_refused():
    short = DynamicCache()
    short.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    short.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    with pytest.raises(ValueError, match="leave keys and values of its 3 columns in every layer, got 3, 5"):
        sdt.TreeCache.from_prefill(short, 10)
