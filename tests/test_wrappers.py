"""Wrapped models: adapters, compilation, quantized weights, hooks. The text equals that of the same model without a
patch, and the wrapper is unchanged afterwards."""

import pytest
import torch
import torch._dynamo
import transformers

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import oracle, snapshot

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
    with sdt.patched(model, drafter=sdt.EarlyExitDrafter(inner.config.num_hidden_layers - 1, tree=6)):
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
