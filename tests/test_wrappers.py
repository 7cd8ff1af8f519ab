"""Wrapped models: adapters, compilation, quantized weights, hooks, layers that other libraries fused. The text equals
that of the same model without a patch, and the wrapper is unchanged afterwards."""

import gc
import weakref
from functools import wraps
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch._dynamo
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import TREES, capture_here, oracle, snapshot
from specdec_triton.forward import checks
from specdec_triton.forward.fingerprint import fingerprint
from specdec_triton.forward.wrappers import output_logits

OPTIONS = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": NEVER}


def assert_same_text(model, inner=None):
    """Compare plain text with that of prompt lookup, a draft model and an early exit. `inner` is the transformers model
    inside the wrapper."""
    inner = model if inner is None else inner
    inputs, before = prompt(), snapshot(inner)
    plain = model.generate(**inputs, **OPTIONS)
    with sdt.patched(model):
        for assistance in (
            {"prompt_lookup_num_tokens": 4},
            {"assistant_model": build("llama", seed=1)},
            {"assistant_model": model},
        ):
            assert torch.equal(model.generate(**inputs, **OPTIONS, **assistance), plain)
    assert sdt.stats(model).accepted > sdt.stats(model).rounds  # drafted for itself
    for fuse in (False, True):
        drafter = sdt.EarlyExitDrafter(inner.config.num_hidden_layers - 1, tree=6)
        with sdt.patched(model, drafter=drafter, fuse=fuse):
            assert torch.equal(model.generate(**inputs, **OPTIONS), plain)
    assert snapshot(inner) == before
    return plain


def adapted(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    wanted = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(build("llama"), wanted, adapter_name="first").eval()


def test_a_peft_adapter():
    model = adapted()
    base = model.get_base_model()
    text = assert_same_text(model, base)
    assert not torch.equal(text, build("llama").generate(**prompt(), **OPTIONS))  # the adapter changes the text
    assert type(base) is transformers.LlamaForCausalLM


def test_a_peft_adapter_switched_off_and_on_between_calls():
    model, inputs = adapted(), prompt()
    with_adapter, options = model.generate(**inputs, **OPTIONS), {**OPTIONS, "prompt_lookup_num_tokens": 3}
    with sdt.patched(model):
        with model.disable_adapter():
            assert torch.equal(model.generate(**inputs, **options), build("llama").generate(**inputs, **OPTIONS))
        assert torch.equal(model.generate(**inputs, **options), with_adapter)


def test_a_peft_draft():
    model, draft = build("llama"), adapted()
    plain = model.generate(**prompt(), **OPTIONS)
    with sdt.patched(model):
        assert torch.equal(model.generate(**prompt(), **OPTIONS, assistant_model=draft), plain)


def test_the_compiled_wrapper():
    model = build("llama")
    assert_same_text(torch.compile(model, backend="eager"), model)


@pytest.mark.slow
def test_a_model_compiled_in_place():
    """A verify forward uses a different attention than the compiled forward, so it must be traced again."""
    model = build("llama", num_hidden_layers=2)
    plain = model.generate(**prompt(), **OPTIONS)
    model.compile(backend="eager")
    assert torch.equal(assert_same_text(model), plain)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_forward(dynamic):
    torch._dynamo.reset()
    model = build("llama", num_hidden_layers=1)
    plain = model.generate(**prompt(), **OPTIONS)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=dynamic)
    with sdt.patched(model, drafter=oracle(plain, 0.0, tree=4)):
        assert torch.equal(model.generate(**prompt(), **OPTIONS), plain)
    assert sdt.stats(model).accepted
    message = "EarlyExitDrafter: forward must be the class's own, got a LlamaFor"
    with sdt.patched(model), pytest.raises(ValueError, match=message):
        model.generate(**prompt(), **OPTIONS, assistant_early_exit=1)


def test_torchao_weights():
    torchao = pytest.importorskip("torchao.quantization")
    model = build("llama")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    assert type(model.model.layers[0].mlp.up_proj.weight) not in (torch.Tensor, torch.nn.Parameter)
    assert_same_text(model)


def test_torchao_weights_are_captured(monkeypatch):
    torchao = pytest.importorskip("torchao.quantization")
    capture_here(monkeypatch, 1)
    model = build("llama")
    assert_captured(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    assert_captured(model)
    before = fingerprint(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.scale = weight.scale.clone()
    assert fingerprint(model) != before


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_torchaos_dynamic_activations(granularity):
    """With one scale for all rows of a forward, each row depends on the others, with and without speculation. This
    limit cannot be detected. With a scale for each row, rows are independent."""
    torchao = pytest.importorskip("torchao.quantization")
    config = torchao.Int8DynamicActivationInt8WeightConfig(granularity=getattr(torchao, granularity)())
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        rows = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    torchao.quantize_(layer, config)
    alone = torch.cat([layer(rows[:, row : row + 1]) for row in range(5)], dim=1)
    assert torch.equal(layer(rows), alone) == (granularity == "PerRow")

    model = build("llama", hidden_size=64, intermediate_size=64)
    torchao.quantize_(model, config)
    with sdt.patched(model):
        text = model.generate(**prompt(), **OPTIONS, prompt_lookup_num_tokens=4)
    assert text.shape[1] == prompt()["input_ids"].shape[1] + OPTIONS["max_new_tokens"]


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    # above 0, the columns kept in high precision are chosen by all rows of a product together: then even plain decoding
    # depends on the other rows of the batch
    wanted = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_threshold=0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=wanted, device_map="cpu")
    assert "Linear" in type(model.model.layers[0].mlp.up_proj).__name__
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert_same_text(model)


def test_accelerate_on_one_device(tmp_path):
    pytest.importorskip("accelerate")
    build("llama").save_pretrained(tmp_path)
    assert_same_text(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}))


def test_accelerates_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = build("llama"), prompt()
    plain = model.generate(**inputs, **OPTIONS)
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with sdt.patched(model):
        for assistance in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": build("llama", seed=1)}):
            assert torch.equal(model.generate(**inputs, **OPTIONS, **assistance), plain)


def test_weights_on_more_than_one_device_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(ValueError, match="the model must be on one device, with its weights there, got LlamaFor"):
        sdt.patch(model)


def test_a_saved_patched_model_is_a_plain_one(tmp_path):
    model = build("llama")
    plain = model.generate(**prompt(), **OPTIONS)
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter()):
        model.save_pretrained(tmp_path)
        files = {file.suffix for file in tmp_path.iterdir()}
    assert files == {".json", ".safetensors"}
    assert "specdec" not in "".join(file.read_text() for file in tmp_path.glob("*.json"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**prompt(), **OPTIONS), plain)


# --- layers that other libraries fused


def assert_captured(model, **options):
    """Compare the text with plain `generate`, and assert that the rounds of two calls were captured once. Returns the
    text."""
    assert checks.graph_hazard(model) is None
    inputs, before = {**prompt(), **OPTIONS, "max_new_tokens": 24}, snapshot(model)
    plain = model.generate(**inputs)
    custom = sdt.SpeculativeGenerate(drafter=oracle(plain, tree=TREES["skipping"]), cuda_graphs=True, **options)
    for captured, reused in ((2, 0), (0, 2)):
        assert torch.equal(model.generate(**inputs, custom_generate=custom), plain)
        stats = sdt.stats(model)
        assert (stats.captured, stats.reused, stats.why_eager) == (captured, reused, None) and stats.accepted
    assert snapshot(model) == before
    return plain


@pytest.fixture
def liger(monkeypatch):
    """Liger-Kernel. Its changes to transformers are undone after the test. Its kernels need a GPU; on a CPU, their
    results come from PyTorch, and a norm is twice as large, so that texts show whether it ran."""
    module = pytest.importorskip("liger_kernel.transformers")
    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)
    if not torch.cuda.is_available():
        functional, rotate = nn.functional, modeling_llama.apply_rotary_pos_emb
        norm = SimpleNamespace(apply=lambda x, weight, eps, *_: 2 * functional.rms_norm(x, weight.shape, weight, eps))
        monkeypatch.setattr("liger_kernel.transformers.rms_norm.LigerRMSNormFunction", norm)
        act = SimpleNamespace(apply=lambda gate, up, *_: functional.silu(gate) * up)
        monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerSiLUMulFunction", act)
        monkeypatch.setattr("liger_kernel.transformers.rope.dispatch", lambda name, *args: rotate(*args[:4]))
    return module


def by_an_early_exit(model):
    """The numbers of drafts of the first layer that were accepted. The text must be plain `generate`'s."""
    plain = model.generate(**prompt(), **OPTIONS)
    with sdt.patched(model, drafter=sdt.EarlyExitDrafter(1, tree=6)):
        assert torch.equal(model.generate(**prompt(), **OPTIONS), plain)
    return sdt.stats(model).accepted_by_position


PARTS = {"rope": False, "rms_norm": False, "swiglu": False, "fused_linear_cross_entropy": False}


@pytest.mark.parametrize("part", [None, *PARTS])
def test_liger_kernel_is_captured(liger, monkeypatch, part):
    capture_here(monkeypatch, 1)
    model = build("llama")
    plain, accepted = assert_captured(model), by_an_early_exit(model)
    liger.apply_liger_kernel_to_llama(model=model, **({} if part is None else {**PARTS, part: True}))
    changed = {module for module in model.modules() if "forward" in vars(module)}
    assert len(changed) == {None: 8, "rope": 0, "rms_norm": 5, "swiglu": 2, "fused_linear_cross_entropy": 1}[part]
    is_same = part not in (None, "rms_norm")
    assert torch.equal(assert_captured(model), plain) == is_same
    assert (by_an_early_exit(model) == accepted) >= is_same


def test_classes_of_liger_kernel_are_captured(liger, monkeypatch):
    capture_here(monkeypatch, 1)
    plain = build("llama")
    liger.apply_liger_kernel_to_llama()
    model = type(plain)(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert type(model.model.norm) is liger.LigerRMSNorm and "forward" not in vars(model)
    assert_captured(model)


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_kernel_on_gpu(liger, dtype):
    model = build("llama", head_dim=16).to("cuda", dtype)
    liger.apply_liger_kernel_to_llama(model=model)
    inputs = {**prompt(), **OPTIONS, "max_new_tokens": 24}
    inputs |= {name: value.cuda() for name, value in inputs.items() if torch.is_tensor(value)}
    plain = model.generate(**inputs)
    with sdt.patched(model, drafter=oracle(plain, tree=TREES["skipping"]), cuda_graphs=True):
        text = model.generate(**inputs)
    assert sdt.stats(model).why_eager is None and sdt.stats(model).captured == 2
    assert torch.equal(text, plain) or dtype != torch.float32


def test_experts_of_liger_kernel_read_on_the_host(liger, monkeypatch):
    """Its grouped product reads the number of tiles on the host, in a function that the forward does not name."""
    from transformers.models.mixtral import modeling_mixtral

    for name in ("MixtralRMSNorm", "MixtralExperts", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_mixtral, name, getattr(modeling_mixtral, name))
    model = build("mixtral")
    assert checks.graph_hazard(model) is None
    liger.apply_liger_kernel_to_mixtral(model=model, swiglu=False)
    assert checks.graph_hazard(model) is None
    liger.apply_liger_kernel_to_mixtral(model=model)
    assert checks.graph_hazard(model) == "MixtralExperts: its forward reads values on the host (item)"


class HubNorm(nn.Module):
    """A layer as in a kernel repository of the hub: without state, for modules of another class."""

    def forward(self, hidden_states):
        return -nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@pytest.fixture
def kernelize(monkeypatch):
    """What `use_kernels=True` does in transformers. A class with a `kernel_layer_name` gets the forward of a layer of
    the hub, or its own forward if there is no such layer."""
    for kind in (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP):
        monkeypatch.setattr(kind, "kernel_layer_name", kind.__name__, raising=False)

    def run(model, layers):
        for module in model.modules():
            if hasattr(type(module), "kernel_layer_name"):
                layer = layers.get(type(module).kernel_layer_name, type(module))
                module.forward = MethodType(layer.forward, module)

    return run


@pytest.mark.parametrize("layers", [{}, {"LlamaRMSNorm": HubNorm}], ids=["no layer", "layer"])
def test_kernels_of_the_hub_are_captured(kernelize, monkeypatch, layers):
    capture_here(monkeypatch, 1)
    model = build("llama")
    plain = assert_captured(model)
    kernelize(model, layers)
    assert sum("forward" in vars(module) for module in model.modules()) == 7
    assert torch.equal(assert_captured(model), plain) != bool(layers)


def fused_by_liger(model, liger, **parts):
    liger.apply_liger_kernel_to_llama(model=model, **{**PARTS, **parts})


def test_a_fused_layer_that_is_set_or_removed_between_calls(liger, kernelize, monkeypatch):
    """No graph that was captured before the change is replayed after it."""
    capture_here(monkeypatch, 1)
    model, inputs = build("llama"), {**prompt(), **OPTIONS, "max_new_tokens": 24}
    custom = sdt.SpeculativeGenerate(drafter=sdt.NoDrafter(), cuda_graphs=True)
    texts = []

    def decode(captured):
        for new in (captured, 0):
            assert torch.equal(model.generate(**inputs, custom_generate=custom), plain := model.generate(**inputs))
            assert (sdt.stats(model).captured, sdt.stats(model).why_eager) == (new, None)
        texts.append(plain.tolist())

    def remove():
        for module in model.modules():
            vars(module).pop("forward", None)
        modeling_llama.apply_rotary_pos_emb = rotate

    rotate = modeling_llama.apply_rotary_pos_emb
    decode(2)
    for change in (
        lambda: fused_by_liger(model, liger, rms_norm=True),
        lambda: fused_by_liger(model, liger, fused_linear_cross_entropy=True),
        lambda: fused_by_liger(model, liger, swiglu=True),
        lambda: fused_by_liger(model, liger, rope=True),
        lambda: kernelize(model, {"LlamaRMSNorm": HubNorm}),
        remove,
    ):
        change()
        decode(2)
    assert texts[0] != texts[1] != texts[5] != texts[6] == texts[0]
    assert texts[1] == texts[2] == texts[3] == texts[4]


def test_a_replaced_function_of_transformers_is_noticed(monkeypatch):
    """Liger-Kernel replaces the rotary embedding of a family for all its models. `rotate_half` is named only by a
    function that the forward names."""
    llama, qwen2 = build("llama"), build("qwen2")
    before, other = fingerprint(llama, qwen2), fingerprint(qwen2)
    for name in ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward"):
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, name, lambda *args: args)
            assert fingerprint(llama, qwen2) != before
            assert fingerprint(qwen2) == other
    assert fingerprint(llama, qwen2) == before


def test_a_method_of_a_module_keeps_no_model_alive(liger, monkeypatch):
    capture_here(monkeypatch, 1)
    model = build("llama")
    fused_by_liger(model, liger, fused_linear_cross_entropy=True)
    custom = sdt.SpeculativeGenerate(drafter=sdt.NoDrafter(), cuda_graphs=True)
    model.generate(**{**prompt(), **OPTIONS, "max_new_tokens": 24}, custom_generate=custom)
    assert sdt.stats(model).captured == 2
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def users_norm(module, hidden_states):
    return hidden_states


class UsersNorm(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


def test_forwards_of_the_users_are_not_captured(liger, kernelize):
    model = build("llama")
    fused_by_liger(model, liger, rms_norm=True)
    norm, fused = model.model.norm, liger.LigerRMSNorm.forward
    other = model.model.layers[0].input_layernorm

    @wraps(fused)
    def logged(module, hidden_states):
        return fused(module, hidden_states)

    def hub_norm(module, hidden_states):
        return hidden_states

    hub_norm.__qualname__ = "HubNorm.forward"  # another function has this name
    for forward in (
        lambda hidden_states: hidden_states,
        MethodType(users_norm, norm),
        MethodType(logged, norm),
        MethodType(hub_norm, norm),
        MethodType(fused, other),
        torch.compile(norm.forward, backend="eager"),
    ):
        norm.forward = forward
        assert checks.graph_hazard(model) == "LlamaRMSNorm: has hooks or a replaced forward"
    norm.forward = MethodType(fused, norm)
    assert checks.graph_hazard(model) is None
    mlp = model.lm_head
    mlp.forward = MethodType(UsersNorm.forward, mlp)  # of a class that no library fuses
    assert checks.graph_hazard(model) == "Linear: has hooks or a replaced forward"


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("granite", {"logits_scaling": 8.0}), ("cohere2", {"logit_scale": 0.25}), ("gemma2", {})],
)
def test_logits_after_a_hidden_state(family, options):
    """They include the model's scale and softcap."""
    model = build(family, **options)
    outputs = model(prompt(batch=1)["input_ids"], output_hidden_states=True)
    torch.testing.assert_close(output_logits(model, outputs.hidden_states[-1]), outputs.logits)
