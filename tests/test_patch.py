"""Patching: it affects single instances, is reversible, and refuses unsupported models and options by name."""

import asyncio
import concurrent.futures
import copy
import dataclasses
import gc
import inspect
import io
import os
import pickle
import queue
import signal
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

import specdec_triton as sdt
from checkpoints import write_head
from families import NEVER, VOCAB, build, prompt
from helpers import snapshot
from specdec_triton.heads.eagle import EagleModel

OPTIONS = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": NEVER}


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(autouse=True)
def unchanged(request):
    """After each test, the shared model must be exactly as before."""
    if "model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("model")
    before = snapshot(model)
    yield
    assert snapshot(model) == before


def test_patch_and_unpatch_leave_nothing(model):
    before, options = snapshot(model), prompt()
    plain = model.generate(**options, **OPTIONS)
    sdt.patch(model)
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, transformers.LlamaForCausalLM)
    assert type(model).__module__ == before["class"].__module__
    assert torch.equal(model.generate(**options, **OPTIONS), plain)
    assert torch.equal(model.generate(**options, **OPTIONS, prompt_lookup_num_tokens=3), plain)
    sdt.unpatch(model)
    assert snapshot(model) == before
    assert sdt.stats(model).rounds > 0  # must be kept


def test_a_patched_model_without_assistance_is_untouched(model):
    fresh = build("llama")
    with sdt.patched(fresh):
        for options in ({"num_beams": 3}, {"do_sample": True}, {}):
            torch.manual_seed(1)
            plain = model.generate(**prompt(), max_new_tokens=8, **options)
            torch.manual_seed(1)
            assert torch.equal(fresh.generate(**prompt(), max_new_tokens=8, **options), plain)
        with pytest.raises(RuntimeError, match="stats: no speculative"):
            sdt.stats(fresh)


def test_patching_again_replaces_the_options_and_one_unpatch_restores(model):
    sdt.patch(model)
    sdt.patch(model, drafter=sdt.PromptLookupDrafter())
    model.generate(**prompt(), **OPTIONS)
    first = sdt.stats(model)
    sdt.patch(model)
    model.generate(**prompt(), **OPTIONS)
    assert sdt.stats(model) is first
    sdt.unpatch(model)
    with pytest.raises(ValueError, match="unpatch: model must be patched"):
        sdt.unpatch(model)


def test_patched_restores_the_state(model):
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()):
        ours = type(model)
        with sdt.patched(model):
            assert type(model) is ours
        model.generate(**prompt(), **OPTIONS)
        assert sdt.stats(model).rounds
    assert type(model) is transformers.LlamaForCausalLM
    with pytest.raises(KeyboardInterrupt), sdt.patched(model):
        raise KeyboardInterrupt


def test_the_class_is_made_once_and_instances_are_apart():
    first, second, third = build("llama"), build("llama"), build("llama")
    sdt.patch(first)
    sdt.patch(second, drafter=sdt.PromptLookupDrafter())
    assert type(first) is type(second) and type(third) is transformers.LlamaForCausalLM
    first.generate(**prompt(), **OPTIONS)
    second.generate(**prompt(), **OPTIONS)
    assert sdt.stats(second).rounds
    with pytest.raises(RuntimeError, match="stats: no speculative"):
        sdt.stats(first)
    sdt.unpatch(first)
    assert type(second) is not transformers.LlamaForCausalLM


def test_a_model_may_draft_for_another_that_shares_its_config():
    target = build("llama")
    draft = transformers.LlamaForCausalLM(target.config).eval()
    assert draft.config is target.config
    plain = target.generate(**prompt(), **OPTIONS)
    with sdt.patched(target):
        assert torch.equal(target.generate(**prompt(), **OPTIONS, assistant_model=draft), plain)
    assert target.config._attn_implementation == "sdpa"


def test_unpatch_refuses_a_class_that_is_no_longer_ours(model):
    sdt.patch(model)
    ours = type(model)
    model.__class__ = type("Wrapped", (ours,), {})
    with pytest.raises(ValueError, match="unpatch: the model's class must be the one that patch gave it, got Wrapped"):
        sdt.unpatch(model)
    model.__class__ = ours
    sdt.unpatch(model)


def test_copies_and_pickles_are_of_the_models_own_class(tmp_path):
    model = build("llama")
    with sdt.patched(model):
        copied = copy.deepcopy(model)
        pickled = pickle.load(io.BytesIO(pickle.dumps(model)))
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for other in (copied, pickled, loaded):
        assert type(other) is transformers.LlamaForCausalLM
        assert torch.equal(other.generate(**prompt(), **OPTIONS), model.generate(**prompt(), **OPTIONS))


@pytest.mark.parametrize("drafter", [None, sdt.ModelDrafter, lambda model: sdt.EarlyExitDrafter(1)])
def test_nothing_keeps_a_model_alive(drafter):
    """This also holds if the drafter refers to the model itself."""
    model = build("llama")
    if drafter is None:
        sdt.patch(model)
        model.generate(**prompt(), **OPTIONS, prompt_lookup_num_tokens=3)
    else:
        sdt.patch(model, drafter=drafter(model))
        model.generate(**prompt(), **OPTIONS)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_compiled_wrapper_is_looked_through():
    model = build("llama")
    with sdt.patched(torch.compile(model)):
        assert type(model) is not transformers.LlamaForCausalLM


def test_vocabularies_may_differ_by_padding_only():
    target, plain = build("llama", vocab_size=400), None
    plain = target.generate(**prompt(), **OPTIONS)
    with sdt.patched(target):
        padded = build("llama", seed=1, vocab_size=403)
        assert torch.equal(target.generate(**prompt(), **OPTIONS, assistant_model=padded), plain)
        smaller = build("llama", seed=1, vocab_size=397)
        assert torch.equal(target.generate(**prompt(), **OPTIONS, assistant_model=smaller), plain)
        with pytest.raises(
            ValueError, match="the draft model must have the target's vocabulary of 400 tokens.*got 390"
        ):
            target.generate(**prompt(), **OPTIONS, assistant_model=build("llama", vocab_size=390))


def test_assistant_model_may_be_a_head_or_a_drafter(model, tmp_path, monkeypatch):
    """A head is loaded once for a name, until the model is released."""
    write_head(tmp_path, model, "eagle1")
    plain, loaded, load = model.generate(**prompt(), **OPTIONS), [], EagleModel.from_checkpoint
    monkeypatch.setattr(EagleModel, "from_checkpoint", lambda *args, **named: loaded.append(1) or load(*args, **named))
    with sdt.patched(model):
        for assistant in (tmp_path, str(tmp_path), tmp_path):
            assert torch.equal(model.generate(**prompt(), **OPTIONS, assistant_model=assistant), plain)
            assert sdt.stats(model).drafted > 0
        assert len(loaded) == 1
        with pytest.raises(ValueError, match=f"must be a DFlash model .*, got {tmp_path}, which EagleDrafter runs"):
            model.generate(**prompt(), **OPTIONS, assistant_model=tmp_path, speculation_type="dflash")
        drafter = sdt.EagleDrafter.from_pretrained(tmp_path, model, num_tokens=2)
        with pytest.raises(ValueError, match="got EagleModel, which reads hidden states .* EagleDrafter"):
            model.generate(**prompt(), **OPTIONS, assistant_model=drafter.model)
        assert torch.equal(model.generate(**prompt(), **OPTIONS, assistant_model=drafter), plain)
        sdt.release(model)
        model.generate(**prompt(), **OPTIONS, assistant_model=tmp_path)
        assert len(loaded) == 3
        with pytest.raises(ValueError, match="must be a local folder or the name of a repository on the hub"):
            model.generate(**prompt(), **OPTIONS, assistant_model=str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["Gemma4AssistantForCausalLM", "MuseGlimmerAssistantModel"])
def test_assistants_of_other_kinds_are_no_draft_models(name):
    """They read keys or hidden states of their target."""
    kind = getattr(transformers, name)
    assistant = kind.__new__(kind)
    vars(assistant)["config"] = SimpleNamespace(model_type=kind.config_class.model_type)
    with pytest.raises(ValueError, match=f"ModelDrafter: model must draft from tokens alone, got {name}"):
        sdt.ModelDrafter(assistant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "lookup"}, "drafter must be a Drafter or None, got str"),
        ({"rule": "greedily"}, "rule must be None, greedy or one of coupled, rejection"),
        ({"tree": 0}, "tree must be None, a Topology or a number"),
        ({"tree": "best"}, 'tree must be "auto", a Topology'),
        ({"tree": True}, "tree must be None, a Topology or a number"),
        ({"seed": "x"}, "seed must be None, a 64-bit integer or a list of them"),
        ({"cuda_graphs": "always"}, 'cuda_graphs must be "auto", True or False'),
        ({"compile": "max-autotune"}, "compile must be True or False"),
        ({"impl": "cuda"}, "impl must be None"),
        ({"drafter": torch.nn.Linear(2, 2)}, "drafter must be .* got Linear: wrap it, sdt.ModelDrafter\\(model\\)"),
    ],
)
def test_bad_options_are_refused_by_the_one_who_was_given_them(model, options, message):
    for name, call in front_door(model).items():
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            call(**options)


def front_door(model):
    return {
        "patch": partial(sdt.patch, model),
        "patched": lambda **options: sdt.patched(model, **options).__enter__(),
        "SpeculativeGenerate": sdt.SpeculativeGenerate,
        "Options": sdt.Options,
    }


@pytest.mark.parametrize(
    ("option", "nearest"), [("drafters", "drafter"), ("cuda_graph", "cuda_graphs"), ("seeds", "seed")]
)
def test_an_unknown_option_is_a_type_error_that_names_the_nearest(model, option, nearest):
    for name, call in front_door(model).items():
        wanted = f"^{name}: options must be among drafter, rule.*got {option}, did you mean {nearest}"
        with pytest.raises(TypeError, match=wanted if name != "Options" else option):
            call(**{option: None})
    with pytest.raises(TypeError, match="got xyzzy$"):
        sdt.patch(model, xyzzy=1)
    assert not isinstance(model, sdt._patch.SpeculativeModel)


def test_signatures_name_the_options():
    options = [field.name for field in dataclasses.fields(sdt.Options)]
    for call in (sdt.patch, sdt.patched, sdt.SpeculativeGenerate):
        parameters = inspect.signature(call).parameters.values()
        assert [each.name for each in parameters if each.kind is each.KEYWORD_ONLY] == options
        assert {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY} == {
            field.name: field.default for field in dataclasses.fields(sdt.Options)
        }


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), None])
def test_a_value_that_is_not_a_model_is_refused(other):
    name = f"{type(other).__module__}.{type(other).__name__}"
    with pytest.raises(ValueError, match=f"patch: model must be .*got {name}"):
        sdt.patch(other)


def lookup(**more):
    return {"prompt_lookup_num_tokens": 3, **more}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lookup(num_beams=2), "must run greedy search or sampling, got beam_search"),
        (lookup(use_cache=False), "use_cache must be True"),
        (lookup(cache_implementation="static"), "cache_implementation must be None or 'dynamic'"),
        (lookup(synced_gpus=True), "synced_gpus must be False"),
        (lookup(return_dict_in_generate=True, output_attentions=True), "output_attentions must be False"),
        (lookup(return_dict_in_generate=True, output_hidden_states=True), "output_hidden_states must be False"),
        (lookup(assistant_early_exit=1), "one kind of assistance must be asked for"),
        (lookup(assistant_ensemble_weight=0.5), "got .*assistant_ensemble_weight"),
        ({"speculation_type": "dflash"}, 'speculation_type must be None, or "dflash" with an assistant_model'),
        (lookup(speculation_type="dflash"), "got 'dflash' with prompt_lookup_num_tokens"),
        (lookup(use_mtp=True), "one kind of assistance must be asked for"),
    ],
)
def test_calls_that_cannot_be_honoured_are_refused(model, options, message):
    with sdt.patched(model), pytest.raises(ValueError, match=f"generate: .*{message}"):
        model.generate(**prompt(), max_new_tokens=4, **options)


def test_assistance_comes_from_one_place(model):
    draft = build("llama")
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()):
        with pytest.raises(ValueError, match="a drafter in patch\\(\\) and prompt_lookup_num_tokens"):
            model.generate(**prompt(), **OPTIONS, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="must run greedy search or sampling, got beam_search"):
            model.generate(**prompt(), max_new_tokens=4, num_beams=2)
    with sdt.patched(model), pytest.raises(ValueError, match="one kind of assistance"):
        model.generate(**prompt(), **OPTIONS, prompt_lookup_num_tokens=3, assistant_model=draft)
    generate = sdt.SpeculativeGenerate(drafter=sdt.PromptLookupDrafter())
    with pytest.raises(ValueError, match="SpeculativeGenerate: assistance must be given as its drafter"):
        model.generate(**prompt(), **OPTIONS, prompt_lookup_num_tokens=3, custom_generate=generate)
    with pytest.raises(ValueError, match="num_beams must be 1"):
        model.generate(**prompt(), num_beams=2, max_new_tokens=4, custom_generate=generate)


@pytest.mark.parametrize(
    "mask", [[[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 0, 1, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 1]]]
)
def test_only_left_padding_is_accepted(model, mask):
    with sdt.patched(model), pytest.raises(ValueError, match="generate: attention_mask must be zeros, then ones"):
        model.generate(
            torch.full((2, 4), 5), attention_mask=torch.tensor(mask), prompt_lookup_num_tokens=3, max_new_tokens=4
        )


def test_embeddings_need_their_tokens(model):
    inputs, lookup = prompt(padding=0), {**OPTIONS, "prompt_lookup_num_tokens": 3}
    embeds = 2 * model.get_input_embeddings()(inputs["input_ids"])
    plain = model.generate(**inputs, inputs_embeds=embeds, **OPTIONS)
    assert not torch.equal(plain, model.generate(**inputs, **OPTIONS))
    with sdt.patched(model):
        assert torch.equal(model.generate(**inputs, inputs_embeds=embeds, **lookup), plain)
        with pytest.raises(ValueError, match="input_ids must hold a prompt"):
            model.generate(inputs_embeds=embeds, **lookup)
        with pytest.raises(ValueError, match="inputs_embeds must have the 9 columns of input_ids .*got 8"):
            model.generate(**inputs, inputs_embeds=embeds[:, 1:], **lookup)


def test_state_that_cannot_be_rolled_back_is_refused(model):
    with sdt.patched(model):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast must be off"):
            model.generate(**prompt(), **OPTIONS, prompt_lookup_num_tokens=3)


def test_positions_that_are_not_asked_for_are_refused():
    bart = transformers.BartForCausalLM(
        transformers.BartConfig(vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2)
    )
    with pytest.raises(ValueError, match="must take position_ids.*got BartForCausalLM"):
        sdt.patch(bart)


def test_a_router_loss_does_not_see_the_packed_tree():
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    other = transformers.MixtralForCausalLM(config).eval()
    plain = other.generate(**prompt(batch=1), **OPTIONS)
    with sdt.patched(other):
        assert torch.equal(other.generate(**prompt(batch=1), **OPTIONS, prompt_lookup_num_tokens=3), plain)


def test_threads_share_a_model(model):
    plain = model.generate(**prompt(), **OPTIONS)
    with sdt.patched(model), concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(model.generate, **prompt(), **OPTIONS, prompt_lookup_num_tokens=3) for _ in range(6)]
        assert all(torch.equal(call.result(), plain) for call in calls)


def test_another_threads_patched_block_is_not_disturbed(model):
    """While a thread is inside `patched`, no other thread may patch or unpatch the model, but it may call generate."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with sdt.patched(model, drafter=sdt.PromptLookupDrafter()), sdt.patched(model, tree=5):
            for call in (lambda: sdt.patch(model), lambda: sdt.unpatch(model), lambda: sdt.patched(model).__enter__()):
                with pytest.raises(ValueError, match="must not be inside another thread's `with patched"):
                    pool.submit(call).result()
            pool.submit(model.generate, **prompt(), **OPTIONS, prompt_lookup_num_tokens=3).result()
            assert sdt._patch._current_options(model).tree == 5
        pool.submit(sdt.patch, model).result()
        pool.submit(sdt.unpatch, model).result()


def test_other_calls_in_other_threads_run_as_always():
    """Plain calls, beam search and direct forwards of target and draft give the usual results while drafts are
    verified."""
    target, draft = build("llama"), build("llama", seed=1)
    for each in (target, draft):
        each.set_attn_implementation("eager")
    inputs, stop = prompt(padding=2), threading.Event()
    plain, beams = (target.generate(**inputs, **OPTIONS, num_beams=beams) for beams in (1, 2))
    logits = [each(**inputs).logits.detach() for each in (target, draft)]

    def others():
        while not stop.is_set():
            assert torch.equal(target.generate(**inputs, **OPTIONS), plain)
            assert torch.equal(target.generate(**inputs, **OPTIONS, num_beams=2), beams)
            for each, expected in zip((target, draft), logits, strict=True):
                with torch.no_grad():
                    torch.testing.assert_close(each(**inputs).logits, expected, rtol=1e-5, atol=1e-5)

    with sdt.patched(target), concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(others)
        try:
            for _ in range(4):
                assert torch.equal(target.generate(**inputs, **OPTIONS, assistant_model=draft), plain)
        finally:
            stop.set()
        running.result()


def test_a_hook_may_run_another_model():
    """The other model uses its own attention, although it runs during a verify forward."""
    model, inputs = build("llama"), prompt()
    for other in (build("gpt2"), build("llama", seed=1)):
        expected, seen = other(inputs["input_ids"]).logits, []
        hook = model.model.layers[1].register_forward_hook(
            lambda *args, other=other, seen=seen: seen.append(other(inputs["input_ids"]).logits) and None
        )
        plain = model.generate(**inputs, **OPTIONS)
        with sdt.patched(model):
            assert torch.equal(model.generate(**inputs, **lookup(**OPTIONS)), plain)
        hook.remove()
        assert len(seen) > 14 and all(torch.equal(logits, expected) for logits in seen)


def test_two_models_run_side_by_side():
    """Each thread waits for the other in the middle of its text. With a shared lock, neither could continue."""
    models, barrier = (build("llama"), build("qwen2")), threading.Barrier(2, timeout=60)

    def meet(ids, scores, **kwargs):
        barrier.wait()
        return torch.zeros(len(ids), dtype=torch.bool)

    plain = [model.generate(**prompt(), **OPTIONS) for model in models]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for model in models:
            sdt.patch(model)
        calls = [
            pool.submit(model.generate, **prompt(), **lookup(**OPTIONS), stopping_criteria=[meet]) for model in models
        ]
        assert all(torch.equal(call.result(), text) for call, text in zip(calls, plain, strict=True))


def test_two_calls_of_one_model_run_side_by_side(model):
    barrier = threading.Barrier(2, timeout=60)

    def meet(ids, scores, **kwargs):
        barrier.wait()
        return torch.zeros(len(ids), dtype=torch.bool)

    plain = model.generate(**prompt(), **OPTIONS)
    with sdt.patched(model), concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(model.generate, **prompt(), **lookup(**OPTIONS), stopping_criteria=[meet]) for _ in range(2)
        ]
        assert all(torch.equal(call.result(), plain) for call in calls)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_in_the_middle_of_a_call_can_call(model):
    plain = model.generate(**prompt(), **OPTIONS)
    children = []

    def fork(ids, scores, **kwargs):
        if not children:
            done = queue.Queue()
            threading.Thread(
                target=lambda: done.put(_answer_of_a_child(model, plain))
            ).start()  # while this thread is inside
            children.append(done.get(timeout=120))
        return torch.zeros(len(ids), dtype=torch.bool)

    with sdt.patched(model):
        assert torch.equal(model.generate(**prompt(), **lookup(**OPTIONS), stopping_criteria=[fork]), plain)
    assert children == [0]


def _answer_of_a_child(model, plain):
    """Exit code of a forked child that patches again and generates: 0 if the text is correct, 2 if it waits for
    ever."""
    child = os.fork()
    if not child:
        signal.alarm(60)
        with sdt.patched(build("qwen2")):
            os._exit(not torch.equal(model.generate(**prompt(), **lookup(**OPTIONS)), plain))
    _, status = os.waitpid(child, 0)
    return 2 if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def test_blocks_of_tasks_may_overlap_and_end_in_any_order(model):
    """Every call uses the options of its own task's block, and the model is unpatched after all blocks have ended."""
    plain, seen = model.generate(**prompt(), **OPTIONS), {}

    async def task(name, nodes, enter, leave, wait_for):
        await wait_for.wait()
        with sdt.patched(model, drafter=sdt.PromptLookupDrafter(nodes)):
            enter.set()
            await asyncio.sleep(0)
            assert torch.equal(model.generate(**prompt(), **OPTIONS), plain)
            seen[name] = sdt._patch._current_options(model).drafter.num_tokens
            await leave.wait()
            seen[name, "at the end"] = sdt._patch._current_options(model).drafter.num_tokens

    async def overlap():
        first_in, second_in, first_may_leave, second_may_leave, go = (asyncio.Event() for _ in range(5))
        go.set()
        first = asyncio.create_task(task("first", 2, first_in, first_may_leave, go))
        second = asyncio.create_task(task("second", 5, second_in, second_may_leave, first_in))
        await second_in.wait()
        first_may_leave.set()
        await first
        assert type(model) is not transformers.LlamaForCausalLM
        assert torch.equal(model.generate(**prompt(), **OPTIONS), plain)
        second_may_leave.set()
        await second

    asyncio.run(overlap())
    assert seen == {"first": 2, "second": 5, ("first", "at the end"): 2, ("second", "at the end"): 5}
    assert type(model) is transformers.LlamaForCausalLM


def test_a_patched_block_may_be_left_by_another_thread(model):
    """This happens if a generator is closed in another thread."""
    block = sdt.patched(model, drafter=sdt.PromptLookupDrafter())
    block.__enter__()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(block.__exit__, None, None, None).result()
        assert type(model) is transformers.LlamaForCausalLM
        pool.submit(sdt.patch, model).result()
    sdt.unpatch(model)


def test_leaving_a_patched_block_checks_nothing_again(model):
    draft = build("llama", seed=1)
    with sdt.patched(model, drafter=sdt.ModelDrafter(draft)):
        outer = sdt._patch._current_options(model)
        with sdt.patched(model, tree=5):
            draft.to("meta")  # the outer drafter would now be refused
        assert sdt._patch._current_options(model) is outer
    assert type(model) is transformers.LlamaForCausalLM


def test_a_class_changed_inside_a_patched_block_locks_nothing():
    model = build("llama")
    with pytest.raises(ValueError, match="the model's class must be the one that patch gave it"), sdt.patched(model):
        ours = type(model)
        model.__class__ = type("Wrapped", (ours,), {})
    model.__class__ = ours
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(sdt.unpatch, model).result()
    assert type(model) is transformers.LlamaForCausalLM


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 20,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_a_rope_that_changes_with_the_length(rope):
    """Draft tokens would reach the length at which the embedding changes before the text does."""
    longest = 20 if rope == "dynamic" else 256
    model = build("llama", rope_parameters=ROPES[rope], max_position_embeddings=longest)
    within, beyond = {**OPTIONS, "max_new_tokens": 11}, {**OPTIONS, "max_new_tokens": 12}
    plain = model.generate(**prompt(), **within)
    with sdt.patched(model):
        assert torch.equal(model.generate(**prompt(), **within, assistant_model=build("llama")), plain)
        with pytest.raises(
            ValueError, match="generate: the text must be at most 20 tokens .*got 21: beyond that length the rotary"
        ):
            model.generate(**prompt(), **beyond, assistant_model=build("llama"))
        if rope == "longrope":  # a prompt that is longer stays beyond it
            inputs = prompt(length=24)
            plain = model.generate(**inputs, **beyond)
            model.generate(**prompt(), **within, prompt_lookup_num_tokens=2)
            assert torch.equal(model.generate(**inputs, **beyond, assistant_model=build("llama")), plain)


def test_the_body_of_patched_may_unpatch(model):
    with sdt.patched(model):
        sdt.unpatch(model)
    sdt.patch(model)
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()):
        sdt.unpatch(model)
    sdt.unpatch(model)
    with pytest.raises(KeyError), sdt.patched(model):
        sdt.unpatch(model)
        raise KeyError


def test_triton_on_cpu_outside_the_interpreter_is_refused(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("the model is on a CPU here, the kernels would be compiled")
    with (
        sdt.patched(model, impl="triton"),
        pytest.raises(ValueError, match='impl="triton" needs tensors on a CUDA GPU'),
    ):
        model.generate(**prompt(), **OPTIONS, prompt_lookup_num_tokens=3)
