"""Hidden states of a model during prompts, tree forwards and decoding steps: they equal those of transformers, and the
model is not changed."""

import copy
import weakref
from functools import partial
from types import FunctionType, MethodType

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import specdec_triton as sdt
from families import FAMILIES, NEVER, VOCAB, build, enlarge_weights, prompt
from helpers import TREES, Launches, compiled_graphs, snapshot
from simulated_graph import SimulatedGraphs
from specdec_triton.drafters.early_exit import with_layers
from specdec_triton.forward import runner as runners
from specdec_triton.forward.copies import decoder_layers
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.forward.taps import TappedModel
from specdec_triton.forward.versions import CACHE
from specdec_triton.tree import DraftTree, Topology

TREE = TREES["skipping"]
LENGTH = 9  # columns of a prompt
CAPACITY = 40


def all_taps(model):
    return (*range(model.config.num_hidden_layers), "last", "final")


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def expected_states(model, input_ids, mask):
    """The states of `all_taps` by transformers' `output_hidden_states` and by a hook, in a copy of the model."""
    model, last = copy.deepcopy(model), []
    layers = decoder_layers(model, "test")[1]
    layers[-1].register_forward_hook(lambda layer, inputs, output: last.append(output))
    with torch.no_grad():
        outputs = model(
            input_ids, attention_mask=mask, position_ids=positions_of(mask), output_hidden_states=True, use_cache=False
        )
    last = last[0] if torch.is_tensor(last[0]) else last[0][0]
    return *outputs.hidden_states[:-1], last, outputs.hidden_states[-1]


def started(model, inputs, read=None, arguments=None, **options):
    """A runner with a prefilled cache, and all taps unless `options` name others."""
    mask = inputs["attention_mask"]
    arguments = {"attention_mask": mask, "position_ids": positions_of(mask), **(arguments or {})}
    options = {"taps": all_taps(model), "impl": "reference", **options}
    runner = TreeRunner(model, mask.shape[1] - mask.sum(1), last_position=255, **options)
    with torch.no_grad():
        runner.prefill(inputs["input_ids"], model.generation_config, arguments, CAPACITY, read)
    return runner


def draft_tree(topology=TREE, seed=1):
    tokens = torch.randint(3, VOCAB, (2, topology.num_nodes), generator=torch.Generator().manual_seed(seed))
    return DraftTree.from_topology(topology, tokens)


def forward(runner, tree, **more):
    base = torch.full((2,), LENGTH)
    with torch.no_grad():
        return runner.run(tree.tokens, tree.depth, tree.ancestors, base, **more)


def assert_close(states, wanted, keep=slice(None)):
    for ours, theirs in zip(states, wanted, strict=True):
        torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-3, atol=1e-3)


def assert_states_of_tree(model, inputs, tree, states, topology=TREE):
    """Compare the states at each node with forwards over the prompt and the paths to the leaves."""
    for leaf in set(range(topology.num_nodes)) - set(topology.parents):
        path = [leaf]
        while path[0]:
            path.insert(0, topology.parents[path[0]])
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, len(path)), value=1)
        wanted = expected_states(model, torch.cat([inputs["input_ids"], tree.tokens[:, path]], 1), mask)
        assert_close([each[:, path] for each in states], [each[:, LENGTH:] for each in wanted])


def chunks_and_tree(model, chunk=4, **options):
    """Compare all states of a prompt in chunks, a tree forward and a decoding step. Returns the runner."""
    inputs, seen, before = prompt(), [], whole(model)
    mask = inputs["attention_mask"]

    def read(states, first_column):
        seen.append((first_column, states))
        assert whole(model) == before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "PREFILL_CHUNK", chunk)
        runner = started(model, inputs, read, **options)
    assert runner.states == ()
    assert [column for column, _ in seen] == list(range(0, LENGTH, chunk))
    states = [torch.cat(parts, 1) for parts in zip(*(states for _, states in seen), strict=True)]
    assert_close(states, expected_states(model, inputs["input_ids"], mask), mask.bool())
    tree = draft_tree()
    forward(runner, tree)
    assert_states_of_tree(model, inputs, tree, runner.states)
    assert whole(model) == before
    return runner


def whole(model):
    """`snapshot`, and the identities of all modules and their attributes."""
    parts = {name: [(key, id(value)) for key, value in vars(each).items()] for name, each in model.named_modules()}
    children = [id(child) for module in model.modules() for child in module._modules.values()]
    return snapshot(model), parts, children


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_those_of_transformers(family):
    chunks_and_tree(build(family))


@pytest.mark.parametrize("family", ["llama", "gemma3", "glm4", "granite", "olmo2", "phi3", "gpt_oss", "deepseek_v3"])
def test_states_of_fused_layers(family):
    """The layers hand norms over to each other, and nevertheless get and return the whole residual stream."""
    runner = chunks_and_tree(build(family), fused=True)
    assert runner.fused.replaced


def test_a_prompt_without_padding_and_in_one_chunk():
    model, inputs, seen = build("llama"), prompt(batch=1), []
    started(model, inputs, lambda *each: seen.append(each))
    ((states, first_column),) = seen
    assert first_column == 0
    assert_close(states, expected_states(model, inputs["input_ids"], inputs["attention_mask"]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_columns_in_the_callers_cache_are_not_read(family):
    model, inputs, seen = build(family), prompt(), []
    mask, cache = inputs["attention_mask"], DynamicCache()
    with torch.no_grad():
        model(
            inputs["input_ids"][:, :5],
            attention_mask=mask[:, :5],
            position_ids=positions_of(mask)[:, :5],
            **{CACHE: cache},
        )
    started(model, inputs, lambda *each: seen.append(each), {CACHE: cache})
    ((states, first_column),) = seen
    assert first_column == 5
    assert_close(states, [each[:, 5:] for each in expected_states(model, inputs["input_ids"], mask)])


def test_the_calls_chunk_size_and_one_chunk_in_memory():
    model, inputs, seen = build("llama"), prompt(batch=1), []
    model.generation_config.prefill_chunk_size = 3

    def read(states, first_column):
        assert all(state() is None for _, _, held in seen for state in held)
        seen.append((first_column, states[0].shape[1], [weakref.ref(state) for state in states[1:]]))

    runner = started(model, inputs, read, taps=(1, "last", "final"))
    assert [each[:2] for each in seen] == [(0, 3), (3, 3), (6, 3)]
    assert all(state() is None for _, _, held in seen for state in held) and runner.states == ()


def test_a_decoding_step():
    model, inputs = build("gpt_neox"), prompt(batch=1)
    runner, token = started(model, inputs), torch.tensor([[7]])
    with torch.no_grad():
        logits = runner.decode(token, LENGTH)
    text = torch.cat([inputs["input_ids"], token], 1)
    assert_close(runner.states, [each[:, -1:] for each in expected_states(model, text, torch.ones_like(text))])
    torch.testing.assert_close(logits, model(text).logits[:, -1:], rtol=1e-3, atol=1e-3)


def test_an_exception_in_the_reader_changes_nothing():
    model, inputs = build("llama"), prompt()
    before, plain = whole(model), model(**inputs).logits

    def read(states, first_column):
        assert whole(model) == before
        raise KeyError("from the reader")

    runner = TreeRunner(model, torch.tensor([3, 0]), 255, taps=(1, "last", "final"))
    arguments = {"attention_mask": inputs["attention_mask"]}
    with torch.no_grad(), pytest.raises(KeyError, match="from the reader"):
        runner.prefill(inputs["input_ids"], model.generation_config, arguments, CAPACITY, read)
    assert whole(model) == before and torch.equal(model(**inputs).logits, plain)
    seen = []
    with torch.no_grad():  # the runner is not changed either
        runner.prefill(
            inputs["input_ids"], model.generation_config, arguments, CAPACITY, lambda *each: seen.append(each)
        )
    assert len(seen) == 1


def test_without_taps_nothing_is_copied(monkeypatch):
    model, calls = build("llama"), []
    plain = forward(started(model, prompt(), taps=()), draft_tree()).logits
    monkeypatch.setattr(runners, "TappedModel", None)
    monkeypatch.setattr(LlamaForCausalLM, "forward", recorded(LlamaForCausalLM.forward, calls))
    runner = started(model, prompt(), taps=())
    assert torch.equal(forward(runner, draft_tree()).logits, plain)
    assert runner.states == () and len(calls) == 2 and all(each is model for each in calls)


def recorded(function, calls):
    """A function that appends its first argument to `calls`."""

    def call(module, *args, **kwargs):
        calls.append(module)
        return function(module, *args, **kwargs)

    call.__wrapped__ = function
    return call


@pytest.mark.parametrize("fused", [False, True])
def test_taps_launch_nothing(fused):
    model, launches = build("llama"), []
    for taps in ((), all_taps(model)):
        runner = started(model, prompt(), taps=taps, fused=fused)
        forward(runner, draft_tree())
        count = Launches()
        count.run(lambda runner=runner: forward(runner, draft_tree()))
        launches.append(count.names)
    assert launches[0] == launches[1] and launches[0]


# --- compiled and captured forwards


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that models are compiled to."""
    yield from compiled_graphs(monkeypatch)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_compilation_serves_all_numbers_of_nodes_and_all_calls(fused, graphs):
    """Other taps are compiled once more."""
    model = build("llama")
    for number, taps in enumerate(((1, "last", "final"), (0, "final")), 1):
        for nodes in (6, 12):
            tree = draft_tree(Topology.chain(nodes), nodes)
            compiled, plain = (
                started(model, prompt(), taps=taps, compiled=each, fused=fused) for each in (True, False)
            )
            logits = [forward(each, tree).logits for each in (compiled, plain)]
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            assert_close(compiled.states, plain.states)
        assert len(graphs) == number


@pytest.mark.parametrize("fused", [False, True])
def test_a_replay_gives_the_states_of_its_tokens(fused):
    model, inputs = build("llama"), prompt()
    runner = started(model, inputs, fixed=True, fused=fused)
    tree, base = draft_tree(seed=1), torch.full((2,), LENGTH)

    def stage():
        logits = runner.forward(tree.tokens, tree.depth, tree.ancestors, base)
        return logits, runner.states

    with torch.no_grad():
        stage()
        replay, (logits, states) = SimulatedGraphs()(stage)
    tree.tokens.copy_(draft_tree(seed=2).tokens)
    replay()
    assert_states_of_tree(model, inputs, draft_tree(seed=2), states)
    assert torch.equal(logits, forward(started(model, inputs, taps=(), fused=fused), tree).logits)


# --- further arguments of a model


class WithFeatures(LlamaForCausalLM):
    """A Llama that adds features to the embeddings of its tokens."""

    def forward(self, input_ids=None, features=None, **kwargs):
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) + features, **kwargs)


@pytest.mark.parametrize("compiled", [False, True])
def test_further_arguments_and_a_cache_from_elsewhere(compiled, graphs):
    config = build("llama").config
    torch.manual_seed(0)
    model, inputs = enlarge_weights(WithFeatures(config)), prompt(padding=0)
    features = torch.randn(2, 64, config.hidden_size)
    for nodes in (7, 4, 9):
        tree, cache = draft_tree(Topology.chain(nodes - 1)), DynamicCache()
        runner = TreeRunner(model, torch.zeros(2, dtype=torch.int64), 255, "reference", compiled=compiled)
        with torch.no_grad():
            model(inputs["input_ids"], features=features[:, :LENGTH], **{CACHE: cache})
            runner.take_cache(cache, CAPACITY, LENGTH)
            fed = features[:, LENGTH : LENGTH + nodes]
            outputs = forward(runner, tree, features=fed if nodes == 7 else fed.clone())  # views are compiled alike
            text = torch.cat([inputs["input_ids"], tree.tokens], 1)
            wanted = model(text, features=features[:, : text.shape[1]], output_hidden_states=True)
        torch.testing.assert_close(outputs.logits, wanted.logits[:, LENGTH:], rtol=1e-3, atol=1e-3)
    assert len(graphs) == compiled


def test_a_cache_that_lacks_columns_is_refused():
    model, cache = build("llama"), DynamicCache()
    runner = TreeRunner(model, torch.zeros(2, dtype=torch.int64), 255)
    with torch.no_grad():
        model(prompt()["input_ids"], **{CACHE: cache})
    with pytest.raises(ValueError, match="must leave keys and values of its 10 columns in every layer, got 9"):
        runner.take_cache(cache, CAPACITY, 10)


# --- models that others have changed


class Noting(LlamaForCausalLM):
    """A Llama that stores the shift of its positions in its forward, like `rope_deltas` of Qwen-VL."""

    shift = None

    def forward(self, *args, **kwargs):
        if self.shift is None:
            self.shift = 100
        return super().forward(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if self.shift is not None:
            inputs["position_ids"] = inputs["position_ids"] + self.shift
        return inputs


def test_a_model_that_stores_its_next_step():
    model = Noting(build("llama").config).eval()
    runner = started(model, prompt())
    assert (LENGTH - runner.step.origin).tolist() == [106, 109]
    assert model.shift is None


def test_a_peft_adapter():
    peft = pytest.importorskip("peft")
    wanted = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), wanted).eval().get_base_model()
    chunks_and_tree(model, fused=True)


class OtherLinear(nn.Linear):
    """A layer of another class, like those of bitsandbytes. Its results are other than those of its weight."""

    def forward(self, hidden):
        return super().forward(hidden) * 1.5


def test_replaced_linear_layers():
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = OtherLinear
    chunks_and_tree(model, fused=True)


def as_ligers(function):
    """The function as if it were defined in Liger-Kernel."""
    return FunctionType(function.__code__, {**globals(), "__name__": "liger_kernel.here"})


def double_norm(module, hidden_states):
    return modeling_llama.LlamaRMSNorm.forward(module, hidden_states) * 2


def own_decoder(module, *args, **kwargs):
    return modeling_llama.LlamaModel.forward(module, *args, **kwargs)


def own_model(module, *args, **kwargs):
    return LlamaForCausalLM.forward(module, *args, **kwargs)


@pytest.mark.parametrize("fused", [False, True])
def test_forwards_that_liger_kernel_has_set(fused):
    model = build("llama")
    for kind, function in (
        (modeling_llama.LlamaRMSNorm, double_norm),
        (modeling_llama.LlamaModel, own_decoder),
        (LlamaForCausalLM, own_model),
    ):
        for module in model.modules():
            if type(module) is kind:
                module.forward = MethodType(as_ligers(function), module)
    chunks_and_tree(model, fused=fused)


def test_a_hook_of_accelerate_on_a_layer():
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama")
    hooks.add_hook_to_module(model.model.layers[1], hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    runner = chunks_and_tree(model)
    assert runner.fused.model is model


@pytest.mark.parametrize("part", ["model", "layer"])
def test_modules_compiled_in_place(part):
    torch._dynamo.reset()
    model = build("llama")
    (model if part == "model" else model.model.layers[1]).compile(backend="eager")
    chunks_and_tree(model)
    torch._dynamo.reset()


def test_a_patched_model_and_the_users_hooks():
    model, calls = build("llama"), []
    for module in (model, model.model, model.model.layers[1]):
        module.register_forward_hook(lambda module, inputs, output: calls.append(type(module).__name__))
    with sdt.patched(model, drafter=sdt.NoDrafter()):
        started(model, prompt())
        assert sorted(name.removeprefix("Recording") for name in calls) == [
            "LlamaDecoderLayer",
            "LlamaForCausalLM",
            "LlamaModel",
        ]
        calls.clear()
        text = model.generate(**prompt(), do_sample=False, max_new_tokens=4, eos_token_id=NEVER)
    assert torch.equal(text, build("llama").generate(**prompt(), do_sample=False, max_new_tokens=4, eos_token_id=NEVER))


# --- models and taps that are refused


@pytest.mark.parametrize("tap", [-1, 2, True, "first", None])
def test_other_taps_are_refused(tap):
    model = build("llama")
    with pytest.raises(
        ValueError, match=r"Owner: taps must be the 2 layers of LlamaForCausalLM.model.layers, 0 to 1.*got \["
    ):
        TappedModel(model, (0, tap, "final"), "Owner")


def test_models_that_have_no_taps():
    model = build("llama")
    reads = "generate: the drafter reads hidden states of the target: "
    hooked = copy.deepcopy(model)
    hooked.model.forward = partial(hooked.model.forward)
    with pytest.raises(
        ValueError, match=reads + "forward must be the class's own, got a LlamaModel whose.*remove its hooks"
    ):
        TreeRunner(hooked, torch.zeros(2), 255, taps=(0,))
    model.model.other = nn.ModuleList(nn.Identity() for _ in range(2))
    with pytest.raises(
        ValueError, match=reads + "the model must have one list of its 2 layers, got LlamaForCausalLM with"
    ):
        TreeRunner(model, torch.zeros(2), 255, taps=(0,))
    del model.model.other
    model.model.config = copy.copy(model.model.config)
    tapped = TappedModel(model, (0, 1))
    tapped.model.model.config.num_hidden_layers = 1  # the forward skips the last layer
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"must call every decoder layer, got no state for the taps \[1\]"),
    ):
        tapped(**prompt())


def test_a_reader_needs_taps():
    with pytest.raises(ValueError, match="TreeRunner: read needs taps, got none"):
        started(build("llama"), prompt(), lambda *each: None, taps=())


class Stacking(nn.Module):
    """A layer that returns several streams, like those of Gemma 3n."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states[None]


def test_states_of_several_streams_are_refused():
    model = build("llama")
    model.model.layers[1] = Stacking()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"must be \[B, n, Ht\], got \[\[1, 2, 9, 32\]\] for "),
    ):
        TappedModel(model, ("last",))(**prompt())


@pytest.mark.parametrize("taps", [(0,), (0, "final")])
def test_a_config_that_asks_for_hidden_states(taps):
    """Transformers would add its hooks to the layers, which the model shares with its copies, once for each copy."""
    model = build("llama")
    model.config.output_hidden_states = True
    before = snapshot(model)
    forward(started(model, prompt(), taps=taps), draft_tree())
    with torch.no_grad():
        with_layers(model, [0])(**prompt())
    assert snapshot(model) == before


def test_a_tapped_model_keeps_no_layer_alive():
    model = build("llama")
    tapped, layer = TappedModel(model, all_taps(model)), weakref.ref(model.model.layers[1])
    with torch.no_grad():
        tapped(**prompt())
    del tapped, model
    assert layer() is None


def test_vision_language_models():
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
    config = transformers.Qwen2VLConfig(text_config={**sizes, "rope_parameters": rope}, vision_config=vision, **tokens)
    model = enlarge_weights(transformers.Qwen2VLForConditionalGeneration(config))
    inputs, tree = prompt(), draft_tree()
    mask, taps = inputs["attention_mask"], (0, 1, "last", "final")
    for fused in (False, True):
        runner = TreeRunner(model, mask.shape[1] - mask.sum(1), 255, "reference", fused=fused, taps=taps)
        before = whole(model)
        with torch.no_grad():
            runner.prefill(inputs["input_ids"], model.generation_config, {"attention_mask": mask}, CAPACITY)
        forward(runner, tree)
        assert whole(model) == before
        assert_states_of_tree(model, inputs, tree, runner.states)


def test_a_vision_tower_as_deep_as_the_decoder():
    """The layers are those of the decoder."""
    text = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    tower = {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": 58, "video_token_id": 59, "vision_start_token_id": 57}
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **tokens)
    )
    name, layers = decoder_layers(model, "a drafter")
    assert name == "model.language_model.layers" and layers is model.model.language_model.layers
