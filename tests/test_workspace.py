"""Graphs and buffers that outlive a call: later calls reuse them, any change drops them, and no text ever differs.

Graphs are simulated: a stale one would write a wrong text or read values of an earlier call.
"""

import copy
import dataclasses
import gc
import io
import pickle
import threading
import weakref
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_flatten

import specdec_triton as sdt
from families import EOS, NEVER, build, prompt
from helpers import DRAFTERS, TREES, HostDrafter, capture_here, drafter_of, eos_in_mid_row, perturbed
from simulated_graph import storage_of
from specdec_triton import _patch
from specdec_triton.engine import generate, workspace
from specdec_triton.engine.workspace import capacity_bucket
from specdec_triton.forward import cache
from specdec_triton.forward.fingerprint import fingerprint
from specdec_triton.forward.runner import TreeRunner

OPTIONS = {"do_sample": False, "eos_token_id": NEVER, "max_new_tokens": 24}


@pytest.fixture(autouse=True)
def captured(monkeypatch):
    capture_here(monkeypatch, 1)


def fresh(family="llama"):
    """A model that the test may change."""
    return copy.deepcopy(build(family))


def decode(model, inputs):
    """Decode with a patched model, check the text, and return the statistics."""
    text = model.generate(**inputs)
    with Plain(model) as plain:
        assert torch.equal(text, plain.generate(**inputs))
    return sdt.stats(model)


class Plain:
    """The model without its patch, which keeps its graphs and buffers."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.kind, self.model.__class__ = type(self.model), type(self.model).__bases__[1]
        return self.model

    def __exit__(self, *error):
        self.model.__class__ = self.kind


@pytest.mark.parametrize("name", DRAFTERS)
def test_ten_calls_capture_once(name):
    model, inputs = fresh(), {**prompt(batch=3), **OPTIONS}
    text = model.generate(**{**inputs, "max_new_tokens": 30})
    sdt.patch(model, drafter=drafter_of(name, text) or sdt.NoDrafter())
    first = decode(model, inputs)
    assert first.captured == 2 and first.reused == 0
    for call in range(9):
        stats = decode(model, {**inputs, "max_new_tokens": 3 + call})
        assert (stats.captured, stats.reused, stats.why_eager) == (0, 2, None)
        assert stats.replayed == 2 * stats.rounds, "no round is eager"


def test_the_contents_of_buffers_are_those_of_each_call():
    """Other prompts, paddings, ends, temperatures and seeds reuse the graphs of the first call."""
    model, tree = fresh(), sdt.ModelDrafter(perturbed("llama", 0.1), tree=TREES["wide"])
    sampled = {"do_sample": True, "max_new_tokens": 24, "eos_token_id": [NEVER, EOS]}
    calls = []
    for seed in range(4):
        inputs = prompt(batch=2)
        ids = inputs["input_ids"]
        inputs["input_ids"] = torch.where(ids > 2, (ids + 7 * seed) % 58 + 3, ids)
        calls.append({**inputs, **sampled, "temperature": 0.6 + seed / 4, "top_k": 9 + seed})
    calls[3]["eos_token_id"] = eos_in_mid_row(model, prompt(batch=2), **OPTIONS)
    alone = []
    for number, call in enumerate(calls):
        torch.manual_seed(number)
        alone.append(model.generate(**call, custom_generate=sdt.SpeculativeGenerate(drafter=tree)))
    sdt.patch(model, drafter=tree)
    for number, (call, expected) in enumerate(zip(calls, alone, strict=True)):
        torch.manual_seed(number)
        assert torch.equal(model.generate(**call), expected), number
        stats = sdt.stats(model)
        assert stats.captured == (0 if number else 2) and stats.replayed > 4


def test_what_a_draft_of_the_host_needs_is_reused():
    model, inputs = fresh(), {**prompt(batch=2), **OPTIONS, "max_new_tokens": 60}
    sdt.patch(model, drafter=HostDrafter(model.generate(**inputs)))
    assert decode(model, inputs).captured > 0
    assert decode(model, inputs).reused > 0


@pytest.mark.parametrize(
    "other", [{"repetition_penalty": 5.0}, {"return_dict_in_generate": True, "output_scores": True}]
)
def test_calls_with_processors_or_scores_use_no_kept_graph(other):
    model, inputs = fresh(), {**prompt(batch=2), **OPTIONS}
    sdt.patch(model, drafter=sdt.NoDrafter())
    decode(model, inputs)
    found = model.generate(**inputs, **other)
    assert sdt.stats(model).reused == 0
    with Plain(model) as plain:
        wanted = plain.generate(**inputs, **other)
    if "output_scores" in other:
        assert len(found.scores) == len(wanted.scores)
        found, wanted = found.sequences, wanted.sequences
    assert torch.equal(found, wanted)
    assert decode(model, inputs).reused == 2, "the graphs of other calls are still there"


def test_a_draft_length_rule_that_changes_is_seen():
    model, draft, inputs = fresh(), copy.deepcopy(perturbed("llama", 0.1)), {**prompt(), **OPTIONS}
    config = draft.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.99
    sdt.patch(model, drafter=sdt.ModelDrafter(draft))
    decode(model, inputs)
    config.assistant_confidence_threshold = 0.0
    stats = decode(model, inputs)
    assert stats.reused == 0 and stats.drafted >= 4 * (stats.rounds - 2)


def test_a_streamer_may_call_generate_at_the_end():
    model, inputs = fresh(), {**prompt(batch=1), **OPTIONS, "return_dict_in_generate": True}
    sdt.patch(model, drafter=sdt.NoDrafter())
    wanted = model.generate(**inputs).past_key_values.layers[0].keys

    class Streamer:
        def put(self, value):
            pass

        def end(self):
            model.generate(**{**inputs, "input_ids": inputs["input_ids"].flip(1)})

    found = model.generate(**inputs, streamer=Streamer()).past_key_values.layers[0].keys
    assert torch.equal(found, wanted)


def in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1.5)


def load(model):
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})


def out_of_place(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.flip(0).clone()


def replace_module(model):
    model.lm_head = copy.deepcopy(model.lm_head)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)


def rescale(model):
    model.model.layers[1].self_attn.scaling *= -20


def norm(model):
    model.model.norm.variance_epsilon = 0.5


def activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def rounded(model):
    model.to(torch.bfloat16).to(torch.float32)


CHANGES = [in_place, load, out_of_place, replace_module, rescale, norm, activation, rounded]


@pytest.mark.parametrize(
    ("changed", "change"),
    [
        pytest.param(changed, change, marks=[] if (place + (changed == "draft")) % 2 else pytest.mark.slow)
        for changed in ("target", "draft")
        for place, change in enumerate(CHANGES)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_change_is_never_missed(changed, change):
    model, draft, inputs = fresh(), copy.deepcopy(perturbed("llama", 0.1)), {**prompt(batch=2), **OPTIONS}
    sdt.patch(model, drafter=sdt.ModelDrafter(draft, num_tokens=3))
    before = decode(model, inputs)
    with Plain(model):
        change(model if changed == "target" else draft)
    stats = decode(model, inputs)
    is_seen = change in (in_place, load)  # a replay reads the weights at the same addresses
    if change is not rounded:  # its new weights may be at the old addresses
        assert stats.captured == (0 if is_seen else 2)
    if changed == "draft" and change not in (rescale, rounded):  # which hardly change a random model
        assert stats.accepted_by_position != before.accepted_by_position, "the draft is still the old one"
    assert decode(model, inputs).captured == 0, "and the new graphs are kept"


def test_hooks_are_run():
    model, inputs = fresh(), {**prompt(), **OPTIONS}
    sdt.patch(model, drafter=sdt.NoDrafter())
    decode(model, inputs)
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output.roll(1, -1))
    assert "hooks" in decode(model, inputs).why_eager
    hook.remove()
    assert decode(model, inputs).why_eager is None


def test_adapters_are_switched():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(fresh(), config, adapter_name="first").eval()
    tuned.add_adapter("second", config)
    model, inputs = tuned.base_model.model, {**prompt(), **OPTIONS}
    sdt.patch(model, drafter=sdt.EarlyExitDrafter(1, num_tokens=2))
    texts = []
    for switch in (
        lambda: None,
        lambda: tuned.set_adapter("second"),
        tuned.base_model.disable_adapter_layers,
        tuned.base_model.enable_adapter_layers,
        tuned.merge_adapter,
    ):
        switch()
        decode(model, inputs)
        texts.append(model.generate(**inputs).tolist())
        assert sdt.stats(model).captured == 0
    assert texts[0] != texts[1] != texts[2] != texts[3]


def test_an_exception_leaves_nothing():
    model, inputs = fresh(), {**prompt(), **OPTIONS}
    sdt.patch(model, drafter=sdt.ModelDrafter(perturbed("llama", 0.1), num_tokens=2))

    class Full(Exception):
        pass

    class Streamer:
        left = 4

        def put(self, value):
            self.left -= 1
            if not self.left:
                raise Full

        def end(self):
            pass

    decode(model, inputs)
    with pytest.raises(Full):
        model.generate(**inputs, streamer=Streamer())
    assert sdt.release(model) == 0, "the buffers of a call that failed are not used again"
    assert decode(model, inputs).captured == 2


def test_calls_of_two_threads_have_their_own(monkeypatch):
    """The second call starts while the first is under way and ends after it."""
    model, texts = fresh(), {}
    calls = [{**prompt(batch=2), **OPTIONS, "max_new_tokens": number} for number in (24, 40)]
    expected = [model.generate(**call) for call in calls]
    sdt.patch(model, drafter=sdt.ModelDrafter(perturbed("llama", 0.1), num_tokens=2))
    model.generate(**calls[0])
    started, may_end = threading.Event(), threading.Event()

    def hold(input_ids, scores, **kwargs):
        started.set()
        may_end.wait(30)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def run(number, **options):
        texts[number] = model.generate(**calls[number], **options)

    thread = threading.Thread(target=run, args=(1,), kwargs={"stopping_criteria": [hold]})
    thread.start()
    started.wait(30)
    run(0)
    may_end.set()
    thread.join()
    assert all(torch.equal(texts[number], text) for number, text in enumerate(expected))


def test_inference_mode_has_its_own():
    model, inputs = fresh(), {**prompt(), **OPTIONS}
    sdt.patch(model, drafter=sdt.NoDrafter())
    for _ in range(2):
        with torch.inference_mode():
            model.generate(**inputs)
        decode(model, inputs)
    assert sdt.stats(model).reused == 2


@pytest.mark.parametrize("free", ["release", "unpatch", "patch", "block", "model"])
def test_memory_is_freed(free, monkeypatch):
    model, inputs = fresh(), {**prompt(), **OPTIONS}
    drafter = sdt.NoDrafter()
    if free == "block":
        with sdt.patched(model, drafter=drafter):
            model.generate(**inputs)
            tensor = weakref.ref(only(model).buffers._tensors["target.cache"])
    else:
        sdt.patch(model, drafter=drafter)
        model.generate(**inputs)
        tensor = weakref.ref(only(model).buffers._tensors["target.cache"])
        assert tensor().numel() > 0
        if free == "release":
            assert sdt.release(model) > 0 == sdt.release(model)
        elif free == "model":
            del model
        else:
            sdt.unpatch(model) if free == "unpatch" else sdt.patch(model, drafter=drafter)
    gc.collect()
    assert tensor() is None


def only(model):
    (kept,) = _patch._workspaces[model]._idle
    return kept


def test_copies_and_pickles_carry_nothing():
    model, inputs = fresh(), {**prompt(), **OPTIONS}
    sdt.patch(model, drafter=sdt.NoDrafter())
    size = len(pickle.dumps(model))
    model.generate(**inputs)
    assert len(pickle.dumps(model)) <= size + 200
    saved = io.BytesIO()
    torch.save(model, saved)
    assert sdt.release(copy.deepcopy(model)) == 0
    custom = sdt.SpeculativeGenerate(drafter=sdt.PromptLookupDrafter())
    fresh().generate(**inputs, custom_generate=custom)
    assert "PromptLookup" in repr(pickle.loads(pickle.dumps(custom)).options)


def test_memory_is_bounded(monkeypatch):
    model = fresh()
    sdt.patch(model, drafter=sdt.NoDrafter())
    for batch in range(1, 8):
        model.generate(**{**prompt(batch=batch), **OPTIONS})
    idle = _patch._workspaces[model]._idle
    assert [len(each.buffers._tensors["start"]) for each in idle] == [4, 5, 6, 7]
    decode(model, {**prompt(batch=4), **OPTIONS})
    assert [len(each.buffers._tensors["start"]) for each in idle] == [5, 6, 7, 4], "least recently used first"
    monkeypatch.setattr(workspace, "memory_of", lambda device: 10 * idle[-1].nbytes + 9)
    stats = decode(model, {**prompt(batch=4), **OPTIONS})
    assert stats.reused == 2 and len(idle) == 1
    monkeypatch.setattr(workspace, "memory_of", lambda device: 9 * idle[-1].nbytes)
    assert decode(model, {**prompt(batch=4), **OPTIONS}).reused == 2
    assert not idle, "one that is too large is freed after its call"


def test_a_prompt_that_lacks_memory_gets_that_of_idle_buffers():
    model, inputs = fresh(), {**prompt(batch=2), **OPTIONS}
    sdt.patch(model, drafter=sdt.NoDrafter())
    decode(model, inputs)
    prefill, failures = TreeRunner.prefill, [torch.OutOfMemoryError("4 GiB")] * 3

    def fail(self, *args, **named):
        if failures:
            raise failures.pop()
        return prefill(self, *args, **named)

    with mock.patch.object(TreeRunner, "prefill", fail):
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(**{**inputs, **prompt(batch=1)})  # fails again after the buffers were freed
        with pytest.raises(torch.OutOfMemoryError):
            model.generate(**inputs)  # nothing was left to free
    decode(model, inputs)
    failures.append(torch.OutOfMemoryError("4 GiB"))
    with mock.patch.object(TreeRunner, "prefill", fail):
        assert decode(model, {**inputs, **prompt(batch=1)}).captured == 2
    assert decode(model, inputs).captured == 2


def storages_of(value, found, seen):
    """Add the addresses of all tensors inside a value."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        found.add(storage_of(value))
    elif isinstance(value, dict):
        for each in value.values():
            storages_of(each, found, seen)
    elif isinstance(value, (list, tuple)):
        for each in value:
            storages_of(each, found, seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        storages_of(vars(value), found, seen)


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, "coupled") for name in ("none", "lookup", "oracle", "host")]
    + [(name, "greedy") for name in ("model", "tree", "dynamic", "early")]
    + [pytest.param(name, "greedy", marks=pytest.mark.slow) for name in ("none", "lookup", "oracle", "host")]
    + [pytest.param(name, "coupled", marks=pytest.mark.slow) for name in ("tree", "dynamic", "early")]
    + [("model", "rejection"), pytest.param("early", "rejection", marks=pytest.mark.slow)],
)
def test_a_kept_graph_reads_only_what_is_kept(name, rule):
    """A tensor that only the call owned is freed after it, and a replay would read whatever is there then."""
    model, inputs = fresh(), {**prompt(batch=2), **OPTIONS, "do_sample": rule != "greedy"}
    text = model.generate(**{**inputs, "do_sample": False, "max_new_tokens": 40})
    drafter = HostDrafter(text) if name == "host" else drafter_of(name, text) or sdt.NoDrafter()
    sdt.patch(model, drafter=drafter, rule=None if rule == "greedy" else rule, seed=1)
    model.generate(**inputs)
    kept = only(model)
    owned = set()
    models = [model, *(each for each in vars(drafter).values() if isinstance(each, torch.nn.Module))]
    for each in models:
        storages_of([*each.parameters(), *each.buffers()], owned, set())
    buffers = kept.buffers
    graphs = [graph for shape in kept.graph_runner._graphs.values() for graph in shape.values()]
    assert len(graphs) >= 2 and all(graph.function is None for graph in graphs)
    storages_of([buffers._tensors, buffers._kept, kept.copies, [graph.outputs for graph in graphs]], owned, set())
    for graph in graphs:
        made = set()
        for func, args, kwargs, results in graph.replay.__self__.operations:
            read = {storage_of(each) for each in tree_flatten((args, kwargs))[0] if torch.is_tensor(each)}
            if func is torch.ops.aten.lift_fresh.default:  # of a constant that was just made
                made |= read
            assert read <= owned | made, f"{name}: {func} reads a tensor that only the call owned"
            made |= {storage_of(each) for each in tree_flatten(results)[0] if torch.is_tensor(each)}


def test_a_cache_that_grew_is_reused_with_its_size(monkeypatch):
    for module, name, value in ((generate, "FIRST_RESERVE", 4), (generate, "NODES_RESERVE", 4), (cache, "BUCKET", 16)):
        monkeypatch.setattr(module, name, value)
    model, inputs = fresh(), {**prompt(), **OPTIONS, "max_new_tokens": 45}
    sdt.patch(model, drafter=sdt.ModelDrafter(perturbed("llama", 0.1), num_tokens=2))
    assert decode(model, inputs).captured >= 4
    decode(model, inputs)  # the draft's cache grows once more, to the size of the target's
    assert decode(model, inputs).captured == 0


def test_capacities():
    sizes = [capacity_bucket(slots) for slots in range(1, 100_000, 37)]
    assert all(128 <= size and size % 128 == 0 for size in sizes) and sizes == sorted(sizes)
    for slots in range(600, 100_000, 991):
        assert slots <= capacity_bucket(slots) <= 1.25 * slots + 128
    assert len({capacity_bucket(slots) for slots in range(1024, 32768)}) <= 4 * 5 + 1


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "top_p": 0.9}])
def test_warmup(sampled):
    model = fresh()
    model.generation_config.eos_token_id = list(range(61))  # every token ends a text
    sdt.patch(model)
    stats = sdt.warmup(model, batch=2, length=70, assistant_early_exit=1, **sampled)
    assert stats.captured > 0 and stats.rounds > 3
    inputs = {**prompt(batch=2), "max_new_tokens": 50, "assistant_early_exit": 1, **sampled}
    text = model.generate(**inputs)
    assert text.shape[1] == prompt(batch=2)["input_ids"].shape[1] + 1, "the end counts again"
    model.generation_config.eos_token_id = [NEVER]
    sdt.warmup(model, batch=2, length=70, assistant_early_exit=1, **sampled)
    model.generate(**inputs)
    assert sdt.stats(model).captured == 0 < sdt.stats(model).reused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"length": 1.5}, "length must be an integer of at least 2, got 1.5"),
        ({"max_new_tokens": 3}, "the prompt and its length are artificial, got max_new_tokens"),
        ({}, "must decode speculatively, got a LlamaForCausalLM"),
    ],
)
def test_warmup_refuses(arguments, message):
    model = fresh()
    sdt.patch(model)
    with pytest.raises(ValueError, match=f"warmup: .*{message}"):
        sdt.warmup(model, **arguments)


def test_fingerprints():
    model = fresh()
    before = fingerprint(model)
    assert before == fingerprint(model) and hash(before) is not None
    assert before != fingerprint(copy.deepcopy(model)), "other weights"
    model.register_buffer("extra", torch.ones(1))
    assert before != fingerprint(model)
    del model.extra
    assert before == fingerprint(model)
    for attribute, value in (("config", copy.deepcopy(model.config)), ("training", True), ("note", [1, {"a": 2}])):
        model.__dict__[attribute], kept = value, model.__dict__.get(attribute)
        assert before != fingerprint(model) or attribute == "config"
        if attribute == "note":
            noted = fingerprint(model)
            value[1]["a"] = 3
            assert noted != fingerprint(model)
            del model.note
        else:
            model.__dict__[attribute] = kept
    assert before == fingerprint(model)
    model.config.rms_norm_eps *= 2
    assert before != fingerprint(model)
