"""Fused decoder layers: which modules are replaced, that the model stays as it is, and that nothing else is computed.

Through the references, a fused forward is equal to the model's own bit for bit, in every dtype. Through the kernels,
the text is the same in fp32.
"""

import ast
import threading
from functools import partial, wraps
from pathlib import Path
from types import MethodType
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama

import specdec_triton as sdt
from families import FAMILIES, NEVER, build, perturbed, prompt
from helpers import TREES, capture_here, oracle, prefilled, snapshot, speculative
from specdec_triton.forward import known_forwards
from specdec_triton.forward.checks import graph_hazard
from specdec_triton.forward.fused_modules import FusedNorm, Handover
from specdec_triton.forward.fusion import fuse
from specdec_triton.forward.versions import CACHE
from specdec_triton.tree import DraftTree

GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": NEVER}
# every kind of layer, norm, attention and rotary embedding
QUICK = ("gemma3", "glm4", "granite", "olmo2", "phi3", "qwen3", "smollm3")
QUICK_KERNELS = ("gemma3", "glm4")
# folders of transformers that have all known sources
FOLDERS = (
    "apertus", "emu3", "ernie4_5", "exaone4", "exaone4_5", "gemma", "gemma2", "gemma3", "glm", "glm4", "glm4_moe",
    "granite", "granitemoe", "helium", "hy_v3", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi3",
    "qwen2", "qwen3", "qwen3_vl", "seed_oss", "smollm3",
)  # fmt: skip
TABLES = known_forwards.NORMS, known_forwards.MLPS, known_forwards.ATTENTIONS, known_forwards.LAYERS
# family of the tests -> the kinds of modules that are replaced in it
WHOLE = "RMSNorm", "MLP", "Attention", "DecoderLayer"
REPLACED = {
    **dict.fromkeys(("llama", "qwen2", "qwen2_window", "qwen3", "mistral", "mistral_window", "gemma", "gemma2"), WHOLE),
    **dict.fromkeys(("gemma3", "phi3", "phi3_window", "olmo2", "granite", "smollm3", "glm4", "exaone4"), WHOLE),
    **dict.fromkeys(("qwen3_moe", "mixtral"), ("RMSNorm", "Attention", "DecoderLayer")),
    "deepseek_v3": ("RMSNorm", "MLP", "DecoderLayer"),
    "gpt_oss": ("RMSNorm",),
    **dict.fromkeys(("cohere2", "stablelm"), ("MLP",)),
}


def forward(model, inputs, fused):
    """Logits and cache of a tree forward, by the references."""
    runner = prefilled(model, inputs, fused=fused, impl="reference")
    topology = TREES["skipping"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (2, topology.num_nodes), generator=generator)
    tree = DraftTree.from_topology(topology, tokens)
    base = torch.full((2,), inputs["input_ids"].shape[1] - 1)
    with torch.no_grad():
        logits = runner.forward(tree.tokens, tree.depth, tree.ancestors, base)
    assert bool(runner.fused.replaced) <= fused
    return logits, runner.cache.storage


def assert_equal_bits(model, inputs=None, fused=True):
    """The fused forward has the bits of the other one. Attention gets queries with the same strides in both, because
    BLAS may choose the order of a sum by strides."""
    inputs, attention = inputs or prompt(), sdt.ops.tree_attention

    def contiguous(query, *args, **options):
        return attention(query.contiguous(), *args, **options)

    with mock.patch.object(sdt.ops, "tree_attention", contiguous):
        for ours, plain in zip(forward(model, inputs, fused), forward(model, inputs, False), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_and_replaced_modules(family, dtype):
    model = build(family).to(dtype)
    assert_equal_bits(model)
    kinds = {kind for kind in WHOLE for name in fuse(model).replaced if name.endswith(kind)}
    assert kinds == set(REPLACED.get(family, ()))


@pytest.mark.parametrize(
    ("family", "impl"),
    [
        pytest.param(family, impl, marks=[] if family in quick else pytest.mark.slow)
        for family in REPLACED
        for impl, quick in (("reference", QUICK), ("triton", QUICK_KERNELS))
    ],
)
def test_text_is_plain_generates(family, impl):
    size = {"num_hidden_layers": 2} if impl == "triton" else {}
    model, inputs = build(family, **size), prompt()
    options = {**GREEDY, "max_new_tokens": 8 if impl == "triton" else 24, "repetition_penalty": 1.3}
    plain, before = model.generate(**inputs, **options), snapshot(model)
    drafters = oracle(plain, 0.5, tree=TREES["skipping"]), sdt.ModelDrafter(perturbed(family, **size), num_tokens=2)
    for drafter in drafters:
        with sdt.patched(model, drafter=drafter, impl=impl, fuse=True):
            assert torch.equal(model.generate(**inputs, **options), plain)
        stats = sdt.stats(model)
        assert stats.accepted and stats.fused
    assert snapshot(model) == before


def test_auto():
    model, text = build("llama"), torch.zeros(2, 40, dtype=torch.int64)
    for options, fused in (
        ({}, False),
        ({"fuse": True}, True),
        ({"fuse": False, "impl": "triton"}, False),
        ({"impl": "triton"}, True),
        ({"impl": "reference"}, False),
        ({"impl": "triton", "compile": True}, False),
    ):
        asked = sdt.SpeculativeGenerate(drafter=oracle(text), **options).options
        assert asked.fuses(torch.device("cpu")) == fused
    _, stats = speculative(model, oracle(text), {**prompt(), **GREEDY})
    assert stats.fused == stats.not_fused == {}
    assert not sdt.SpeculativeGenerate(fuse="auto", compile=True).options.fuses(torch.device("cuda"))
    assert sdt.SpeculativeGenerate().options.fuses(torch.device("cuda")) == sdt.ops.HAS_TRITON


@pytest.mark.parametrize("wrong", [None, "yes", 1])
def test_wrong_options(wrong):
    with pytest.raises(ValueError, match=f'patch: fuse must be "auto", True or False, got {wrong!r}'):
        sdt.patch(build("llama"), fuse=wrong)


def test_stats_say_what_was_fused_and_what_was_not():
    model = build("smollm3")
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    _, stats = speculative(model, oracle(torch.zeros(2, 40, dtype=torch.int64)), {**prompt(), **GREEDY}, fuse=True)
    assert stats.fused == {
        "SmolLM3Attention": 2, "SmolLM3MLP": 2, "SmolLM3RMSNorm": 7, "SmolLM3DecoderLayer": 3
    }  # fmt: skip
    assert stats.not_fused["SmolLM3MLP"] == "its activation is Tanh"
    assert stats.not_fused["SmolLM3Attention"] == "it has no rotary embedding"


# --- modules that are left alone


def with_a_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 2)


def with_a_hook_that_changes_its_input_in_place(model):
    model.model.layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].mul_(2),))


def with_a_hooked_norm(model):
    model.model.layers[1].input_layernorm.register_forward_hook(lambda module, inputs, output: output + 1)


def with_a_hooked_final_norm(model):
    model.model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3 + 1,))


def with_a_hooked_projection(model):
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def with_a_hooked_activation(model):
    model.model.layers[0].mlp.act_fn = nn.SiLU()
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, inputs, output: output * 2)


def with_a_replaced_forward(model):
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda hidden: hidden * norm.weight


def with_a_replaced_model_forward(model):
    inner = model.model.forward

    def doubled(*args, **kwargs):
        outputs = inner(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * 2
        return outputs

    model.model.forward = doubled


def with_a_subclass(model):
    class Louder(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x) * 2

    model.model.layers[0].mlp.__class__ = Louder


def with_another_activation(model):
    model.model.layers[1].mlp.act_fn = nn.Tanh()


def with_another_eps(model):
    model.model.norm.variance_epsilon = 0.5
    model.model.layers[1].post_attention_layernorm.variance_epsilon = 0.25


def with_a_layer_that_is_not_known(model):
    class Own(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, **kwargs):
            return self.layer(hidden_states, **kwargs) * 2

    model.model.layers[1] = Own(model.model.layers[1])


def with_a_norm_that_is_called_otherwise(model):
    class Doubled(type(model.model.norm)):
        def __call__(self, hidden):
            return super().__call__(hidden) * 2

    model.model.layers[1].input_layernorm.__class__ = Doubled


def with_a_builtin_activation(model):
    mlp = model.model.layers[1].mlp
    del mlp.act_fn
    mlp.act_fn = torch.tanh


def with_a_parametrized_weight(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    for module in (model.model.layers[1].input_layernorm, model.model.layers[2].self_attn.q_proj):
        nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def with_a_layer_that_has_an_attribute_of_our_name(model):
    with_a_layer_that_is_not_known(model)
    model.model.layers[1].fused_part = True


CHANGES = [each for name, each in list(globals().items()) if name.startswith("with_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_module_computes_what_it_computes(change):
    model, inputs = build("llama", num_hidden_layers=3), prompt()
    unchanged = forward(model, inputs, True)[0]
    change(model)
    before = snapshot(model)
    assert_equal_bits(model, inputs)
    assert not torch.equal(forward(model, inputs, True)[0], unchanged)
    assert snapshot(model) == before


def doubled(function):
    return wraps(function)(lambda *args, **kwargs: function(*args, **kwargs) * 2)


def rotated_twice(function):
    return wraps(function)(lambda q, k, *args, **kwargs: function(*function(q, k, *args), *args, **kwargs))


@pytest.mark.parametrize(
    ("place", "name", "wrapper"),
    [
        (modeling_llama.LlamaMLP, "forward", doubled),
        (modeling_llama.LlamaRMSNorm, "forward", doubled),
        (SiLUActivation, "forward", doubled),
        (modeling_llama, "apply_rotary_pos_emb", rotated_twice),
        (modeling_llama, "rotate_half", doubled),
    ],
)
def test_a_class_that_was_changed_after_it_was_fused(place, name, wrapper, monkeypatch):
    """Some libraries replace the forward of a class, or a function that it calls, and keep the name of the original."""
    model, inputs = build("llama"), prompt()
    unchanged = forward(model, inputs, True)[0]
    monkeypatch.setattr(place, name, wrapper(getattr(place, name)))
    assert_equal_bits(model, inputs)
    assert not torch.equal(forward(model, inputs, True)[0], unchanged)


def test_a_dropout_of_another_kind():
    class Scaled(nn.Dropout):
        def forward(self, hidden):
            return hidden * 3

    model = build("phi3")
    model.model.layers[1].resid_mlp_dropout = Scaled().eval()
    assert_equal_bits(model)
    assert fuse(model).left["Phi3DecoderLayer"] == "its resid_mlp_dropout is a Scaled"


def test_global_hooks():
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, modeling_llama.LlamaRMSNorm) else output
    )
    try:
        model = build("llama")
        assert fuse(model).left == {"LlamaForCausalLM": "all modules have forward hooks"}
        assert_equal_bits(model, fused=False)
    finally:
        hook.remove()


def test_the_kernels_package_wraps_the_rotary_embedding(monkeypatch):
    """It makes a module of the function, and may give this module another forward."""
    function = modeling_llama.apply_rotary_pos_emb

    class Wrapped(nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    wrapped = Wrapped().eval()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", wrapped)
    model = build("llama")
    assert fuse(model).replaced["LlamaAttention"] == 2
    assert_equal_bits(model)
    wrapped.forward = rotated_twice(function)
    assert "LlamaAttention" not in fuse(model).replaced
    assert_equal_bits(model)


def test_a_layer_with_the_old_name_of_the_cache():
    """transformers 5.24 renamed the argument and still takes the old name."""

    class OlderDecoderLayer(type(build("llama").model.layers[0])):
        def forward(self, hidden_states, **kwargs):
            normed, cache = self.input_layernorm(hidden_states), kwargs.pop(CACHE)
            return hidden_states + self.self_attn(hidden_states=normed, past_key_values=cache, **kwargs)[0]

    model = build("llama")
    model.model.layers[0].__class__ = OlderDecoderLayer
    assert_equal_bits(model)
    assert fuse(model).replaced["LlamaAttention"] == 2 and fuse(model).left["OlderDecoderLayer"].startswith(
        "the source"
    )


def test_calls_that_the_ops_do_not_take():
    model = build("llama")
    mine, theirs = fuse(model).model.model, model.model
    for shape in ((0, 32), (2, 0, 32), (7, 32), (1, 2, 3, 32)):
        hidden = torch.randn(shape)
        for name in ("mlp", "input_layernorm"):
            ours, plain = getattr(mine.layers[0], name), getattr(theirs.layers[0], name)
            assert torch.equal(ours(hidden), plain(hidden))
            assert ours(hidden).shape == hidden.shape
    assert torch.equal(mine.norm(hidden_states=hidden), theirs.norm(hidden))
    assert torch.equal(mine.norm(hidden.double()), theirs.norm(hidden.double()))
    assert torch.equal(mine.layers[0].mlp(x=hidden), theirs.layers[0].mlp(hidden))


def test_a_norm_is_handed_over_only_for_an_unchanged_tensor():
    norm, other = (FusedNorm(build("llama").model.norm, "cast_first", 1e-6) for _ in range(2))
    stream, normed, handover = torch.zeros(1, 2, 8), torch.ones(1, 2, 8), Handover()
    for change, kept in (
        (lambda: (stream, norm), True),
        (lambda: (stream.clone(), norm), False),
        (lambda: (stream, other), False),
        (lambda: (stream.add_(1), norm), False),
    ):
        handover.leave(stream, norm, normed)
        assert (handover.take(*change()) is normed) == kept
        assert handover.take(stream, norm) is None


def test_a_hook_on_the_copy_is_not_one_on_the_model():
    model = build("llama")
    fuse(model).model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not model.model.layers[0]._forward_hooks


def test_a_wrapped_forward_is_not_bypassed():
    """A copy with fused parts would run the forward that was replaced, which is bound to the original modules."""
    model = build("llama")
    with_a_replaced_model_forward(model)
    found = fuse(model)
    assert found.model is model and found.left["LlamaModel"] == "its forward was replaced" and not found.replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_multiplier_of_the_updates(dtype):
    model = build("granite", residual_multiplier=0.22).to(dtype)
    assert_equal_bits(model)
    assert fuse(model).replaced["GraniteDecoderLayer"] == 3


def test_a_final_norm_unlike_those_of_the_layers():
    """It cannot be computed in one kernel with the norm of the last update."""
    model = build("gemma3")
    model.model.norm.eps = 0.5
    assert_equal_bits(model)
    assert fuse(model).replaced["Gemma3DecoderLayer"] == 3


def test_a_norm_whose_helper_was_replaced():
    model = build("gemma")
    for norm in (model.model.norm, model.model.layers[1].input_layernorm):
        norm._norm = lambda hidden: hidden * 2
    assert_equal_bits(model)
    assert fuse(model).replaced["GemmaDecoderLayer"] == 2


def test_norms_with_a_weight_for_each_head():
    model = build("qwen3")
    attention = model.model.layers[0].self_attn
    attention.q_norm.weight = nn.Parameter(torch.rand(4, attention.head_dim))
    assert_equal_bits(model)
    assert fuse(model).replaced["Qwen3Attention"] == 2


def test_hooks_that_transformers_left_behind():
    """They stay on all layers after one call with `output_hidden_states=True`."""
    model, inputs = build("llama"), prompt()
    model(**inputs, output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks and graph_hazard(model) is None
    assert_equal_bits(model)
    assert fuse(model).replaced == fuse(build("llama")).replaced


def test_layers_of_other_libraries():
    """A forward of Liger-Kernel's is kept on the copy, and the class's own forward as an attribute counts as such."""
    liger = pytest.importorskip("liger_kernel.transformers.model.llama")
    model = build("llama")
    norm, layer = model.model.norm, model.model.layers[0]
    norm.forward, layer.mlp.forward = (
        MethodType(type(norm).forward, norm),
        MethodType(type(layer.mlp).forward, layer.mlp),
    )
    model.forward = MethodType(liger.lce_forward, model)
    found = fuse(model)
    assert found.replaced == fuse(build("llama")).replaced and not found.left
    assert found.model.forward.__self__ is found.model and "forward" not in vars(found.model.model.norm)
    assert_equal_bits(model)


@pytest.mark.parametrize(("change", "reason"), [("train", "training mode"), ("compile", r"module\.compile\(\) was")])
def test_models_that_are_left_alone(change, reason):
    model = build("llama")
    model.train() if change == "train" else model.compile(backend="eager")
    found = fuse(model)
    assert found.model is model and not found.replaced and reason.replace("\\", "") in found.left["LlamaForCausalLM"]


def test_norms_in_another_dtype():
    model = build("gemma").bfloat16()
    for layer in model.model.layers:
        layer.post_attention_layernorm.float()
    assert_equal_bits(model)
    found = fuse(model)
    assert "GemmaDecoderLayer" not in found.replaced
    assert "it has another weight than [C] in torch.bfloat16" in found.left["GemmaRMSNorm"]


# --- the model


def test_the_model_is_not_changed_while_it_is_fused():
    model, inputs, seen = build("llama"), prompt(), []
    before, parameters = snapshot(model), [id(each) for each in model.parameters()]
    mlp = model.model.layers[0].mlp.down_proj
    mlp.register_forward_hook(lambda *_: seen.append((snapshot(model)["attributes"], threading.get_ident())))
    expected = snapshot(model)["attributes"]
    speculative(model, oracle(torch.zeros(2, 40, dtype=torch.int64)), {**inputs, **GREEDY}, fuse=True)
    assert len(seen) > 3 and all(attributes == expected for attributes, _ in seen)
    mlp._forward_hooks.clear()
    assert snapshot(model) == before and [id(each) for each in model.parameters()] == parameters


def test_the_copy_is_a_model_like_any_other():
    model, inputs = build("gemma3"), prompt()
    with torch.no_grad():
        ours, plain = (each(**inputs) for each in (fuse(model).model, model))
    assert torch.equal(ours.logits, plain.logits)


def test_weights_are_shared():
    model = build("llama")
    found = fuse(model).model
    assert [id(each) for each in found.parameters()] == [id(each) for each in model.parameters()]
    assert isinstance(found.model.layers[0], type(model.model.layers[0])) and found.config is model.config
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)
    assert_equal_bits(model)
    model.model.layers[0].input_layernorm.weight = nn.Parameter(model.model.layers[0].input_layernorm.weight + 1)
    assert found.model.layers[0].fused_part.norms[0].module.weight is model.model.layers[0].input_layernorm.weight


def test_an_exception_in_a_fused_forward_leaves_the_model_as_it_was(monkeypatch):
    model, inputs = build("llama"), prompt()
    plain, before, calls = model.generate(**inputs, **GREEDY), snapshot(model), []
    rotary = sdt.ops.rotary_and_cache

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("failed on purpose")
        return rotary(*args, **options)

    monkeypatch.setattr(sdt.ops, "rotary_and_cache", failing)
    with sdt.patched(model, drafter=oracle(plain), fuse=True):
        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(**inputs, **GREEDY)
        monkeypatch.undo()
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert snapshot(model) == before


def test_captured_rounds_and_later_calls(monkeypatch):
    capture_here(monkeypatch, 1)
    model, inputs = build("llama"), {**prompt(), **GREEDY, "max_new_tokens": 60}
    plain = model.generate(**inputs)
    with sdt.patched(model, drafter=sdt.ModelDrafter(perturbed("llama"), num_tokens=3), fuse=True):
        for call in range(3):
            assert torch.equal(model.generate(**inputs), plain)
            assert sdt.stats(model).why_eager is None
            assert bool(sdt.stats(model).reused) == (call > 0)
            assert sdt.stats(model).fused["LlamaDecoderLayer"] == 2
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight.mul_(2)
        other = model.generate(**inputs)
    assert torch.equal(other, model.generate(**inputs)) and not torch.equal(other, plain)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_compiled(monkeypatch):
    """`fuse=True` with `compile=True` does both, except for the cache writes, and later calls compile nothing."""
    monkeypatch.setattr(sdt.ops, "rotary_and_cache", None)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, inputs = build("llama"), prompt()
    plain = model.generate(**inputs, **GREEDY)
    with sdt.patched(model, drafter=oracle(plain), fuse=True, compile=True):
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **GREEDY), plain)
            assert sdt.stats(model).fused and counters["stats"]["unique_graphs"] == 1


def test_an_early_exit():
    """The norm after the last layer of the draft is not the one that the whole model has there."""
    model, inputs = build("llama", num_hidden_layers=3), prompt()
    plain = model.generate(**inputs, **GREEDY)
    accepted = set()
    for fused in (True, False):
        with sdt.patched(model, drafter=sdt.EarlyExitDrafter(2, num_tokens=3), fuse=fused):
            assert torch.equal(model.generate(**inputs, **GREEDY), plain)
        accepted.add(sdt.stats(model).accepted)
    assert len(accepted) == 1


def test_an_adapter():
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    base = build("llama")
    unadapted = forward(base, prompt(), True)[0]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, **options)).eval().get_base_model()
    assert_equal_bits(model)
    assert fuse(model).replaced["LlamaAttention"] == 2
    assert not torch.equal(forward(model, prompt(), True)[0], unadapted)


def test_another_thread_runs_the_model_as_it_is(monkeypatch):
    """The other thread generates while a fused forward waits in the middle of a layer."""
    model, inputs = build("llama"), prompt()
    plain, inside, go_on = model.generate(**inputs, **GREEDY), threading.Event(), threading.Event()
    act, found = sdt.ops.gated_activation, []

    def waiting(*args, **options):
        inside.set()
        assert go_on.wait(30)
        return act(*args, **options)

    monkeypatch.setattr(sdt.ops, "gated_activation", waiting)
    assist = sdt.SpeculativeGenerate(drafter=oracle(plain), fuse=True)
    thread = threading.Thread(target=lambda: found.append(model.generate(**inputs, **GREEDY, custom_generate=assist)))
    thread.start()
    assert inside.wait(30)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    go_on.set()
    thread.join(30)
    assert torch.equal(found[0], plain)


# --- recognition


def sources():
    """`source_id`s of forwards in the installed transformers, and of the pairs of rotary functions, by parsing."""
    found = set()
    for folder in FOLDERS:
        path = Path(transformers.__file__).parent / "models" / folder / f"modeling_{folder}.py"
        if not path.exists():  # an older version
            continue
        functions = {}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                functions[node.name] = node
            if isinstance(node, ast.ClassDef):
                methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
                if "forward" in methods:
                    found.add(known_forwards.id_of([methods[name] for name in ("forward", "_norm") if name in methods]))
        pair = [functions.get(name) for name in ("apply_rotary_pos_emb", "rotate_half")]
        if all(pair):
            found.add(known_forwards.id_of(pair))
    return found


def test_every_known_source_is_one_of_transformers():
    found = sources()
    for table in (*TABLES, known_forwards.ROTARIES):
        assert not set(table) - found


def one(x):
    """A docstring."""
    return x + 0


def two(x: int) -> int:  # a comment
    return x + 0


def three(x):
    return x + 1


def test_a_source_is_known_by_what_it_computes():
    one_again = two
    one_again.__name__ = "one"
    ids = [known_forwards.source_id(each) for each in (one, two, three)]
    bodies = [known_forwards.id_of(ast.parse(text).body) for text in ("f(0)", "f(None)", "f(False)", "f('')", "f()")]
    assert len({*bodies}) == 5
    assert ids[0] != ids[2] and ids[1] != ids[2]
    assert known_forwards.source_id(len) is None and known_forwards.source_id(None) is None
