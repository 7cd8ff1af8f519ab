"""MTP layers of a target's own checkpoint: their tensors, the reads of files, and refusals."""

import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import specdec_triton as sdt
from families import build
from specdec_triton.heads import mtp
from specdec_triton.heads.mtp import MtpModel, MtpTensors, find_mtp, mtp_config

LAYERS = 3  # of the targets
HIDDEN = 32
DEEPSEEK = {
    "enorm": "model.layers.{at}.enorm",
    "hnorm": "model.layers.{at}.hnorm",
    "eh_proj": "model.layers.{at}.eh_proj",
    "norm": "model.layers.{at}.shared_head.norm",
    "block": "model.layers.{at}",
}
QWEN = {
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "eh_proj": "mtp.fc",
    "norm": "mtp.norm",
    "block": "mtp.layers.{k}",
}
MIMO = {
    "enorm": "model.mtp_layers.{k}.token_layernorm",
    "hnorm": "model.mtp_layers.{k}.hidden_layernorm",
    "eh_proj": "model.mtp_layers.{k}.input_proj",
    "norm": "model.mtp_layers.{k}.final_layernorm",
    "block": "model.mtp_layers.{k}",
}
ERNIE = {
    "enorm": "model.mtp_emb_norm.{k}",
    "hnorm": "model.mtp_hidden_norm.{k}",
    "eh_proj": "model.mtp_linear_proj.{k}",
    "block": "model.mtp_block.{k}",
}


def saved(folder, family="deepseek_v3", names=DEEPSEEK, count=1, edit=None, **options):
    """Write a target with random MTP layers to a folder.

    Args:
        folder: the folder. The MTP layers are in a shard of their own.
        family: of the target and its layers, see `build`.
        names: parts of an MTP layer -> name in the file.
        count: number of MTP layers.
        edit: is called with the tensors of the MTP layers before they are written.
        options: of the target's config.
    """
    build(family, **options).save_pretrained(folder)
    of_blocks = folder / "blocks"
    # the decoder layers of a target whose layers are all mixtures of experts, if it has any
    build(family, 1, **{**options, "first_k_dense_replace": 0} if family == "deepseek_v3" else options).save_pretrained(
        of_blocks
    )
    random, tensors = torch.Generator().manual_seed(0), {}
    for k in range(count):
        place = {part: name.format(at=LAYERS + k, k=k) for part, name in names.items()}
        for part in names.keys() - {"block"}:
            shape = (HIDDEN, 2 * HIDDEN) if part == "eh_proj" else (HIDDEN,)
            tensors[f"{place[part]}.weight"] = torch.randn(shape, generator=random)
        for name, tensor in load_file(of_blocks / "model.safetensors").items():
            if name.startswith(f"model.layers.{k}."):
                tensors[name.replace(f"model.layers.{k}", place["block"])] = tensor
    if edit is not None:
        edit(tensors)
    of_target = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": of_target, "model-00002-of-00002.safetensors": tensors}
    for file, shard in shards.items():
        save_file(shard, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("deepseek"), count=2)


# --- names


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.enorm.weight", (3, "enorm.weight")),
        ("model.language_model.layers.4.shared_head.norm.weight", (4, "norm.weight")),
        ("model.layers.3.transformer.shared_head.norm.weight", (3, "norm.weight")),
        ("model.layers.3.final_layernorm.weight", (3, "norm.weight")),
        ("model.layers.3.mlp.experts.1.up_proj.weight", (3, "block.mlp.experts.1.up_proj.weight")),
        ("model.layers.3.mlp.experts.gate_up_proj", (3, "block.mlp.experts.gate_up_proj")),
        ("mtp.fc.weight", (0, "eh_proj.weight")),
        ("mtp.pre_fc_norm_hidden.weight", (0, "hnorm.weight")),
        ("mtp.norm.weight", (0, "norm.weight")),
        ("mtp.layers.1.self_attn.q_norm.weight", (1, "block.self_attn.q_norm.weight")),
        ("model.mtp_layers.1.token_layernorm.weight", (1, "enorm.weight")),
        ("model.mtp_layers.0.mlp.up_proj.weight", (0, "block.mlp.up_proj.weight")),
        ("model.mtp.layers.2.eh_proj.weight", (2, "eh_proj.weight")),
        ("model.mtp.layers.0.pre_mlp_layernorm.weight", (0, "block.post_attention_layernorm.weight")),
        ("model.mtp_linear_proj.1.bias", (1, "eh_proj.bias")),
        ("model.mtp_emb_norm.0.weight", (0, "enorm.weight")),
        ("model.mtp_block.0.self_attn.o_proj.weight", (0, "block.self_attn.o_proj.weight")),
        # of the target, or copies of its tensors
        ("model.layers.2.self_attn.o_proj.weight", None),
        ("model.layers.3.embed_tokens.weight", None),
        ("model.layers.3.shared_head.head.weight", None),
        ("model.layers.3.transformer.shared_head.output.weight", None),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        ("vision_tower.layers.7.mlp.up_proj.weight", None),
    ],
)
def test_the_place_of_a_tensor(name, place):
    assert mtp._place(name, LAYERS) == place


def config_of(**options):
    return build("deepseek_v3", **options).config


def test_layers_of_the_target_that_it_lacks_are_no_mtp_layers():
    """A target may be loaded with fewer layers than its checkpoint has."""
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(8)]
    names += ["model.layers.7.enorm.weight", "model.layers.8.enorm.weight"]
    found = find_mtp(names, "folder", config_of())
    assert found.num_layers == 2
    assert dict(found.names) == {
        "layers.0.block.self_attn.o_proj.weight": "model.layers.7.self_attn.o_proj.weight",
        "layers.0.enorm.weight": "model.layers.7.enorm.weight",
        "layers.1.enorm.weight": "model.layers.8.enorm.weight",
    }


def test_layers_that_share_their_projection_are_refused():
    names = ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"own projection, got 2 layers in folder that share mtp\.fc\.weight"):
        find_mtp(names, "folder", config_of())


def test_mimo_v2_has_one_usable_layer():
    config = config_of()
    names = [f"model.mtp.layers.{k}.enorm.weight" for k in range(3)]
    assert find_mtp(names, "folder", config).num_layers == 3
    config.model_type = "mimo_v2_flash"
    assert find_mtp(names, "folder", config).num_layers == 1


# --- config of the layers


@pytest.mark.parametrize("sparse", [False, True])
def test_the_tensors_decide_on_experts(sparse):
    part = "mlp.experts.0.up_proj.weight" if sparse else "mlp.up_proj.weight"
    names = {f"layers.{layer}.block.{part}": part for layer in range(2)}
    config = mtp_config(config_of(first_k_dense_replace=1), MtpTensors("folder", names, 2, False, False))
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (2, 0 if sparse else 2)


def test_the_config_is_a_copy_without_quantization():
    config = config_of()
    config.quantization_config = {"quant_method": "fp8"}
    before = config.to_dict()
    own = mtp_config(config, MtpTensors("folder", {}, 1, False, False))
    assert not hasattr(own, "quantization_config") and config.to_dict() == before


# --- loading


@pytest.mark.parametrize(
    ("family", "names", "hidden_first"),
    [("deepseek_v3", DEEPSEEK, False), ("qwen3", QWEN, False), ("qwen2", MIMO, True), ("qwen3", ERNIE, False)],
    ids=["deepseek", "qwen", "mimo", "ernie"],
)
def test_a_layer_is_the_literal_one(tmp_path, family, names, hidden_first):
    """The output of the whole layer, with the target's own decoder layer of the same weights."""
    options = {"first_k_dense_replace": 0} if family == "deepseek_v3" else {"rms_norm_eps": 0.1}
    target = loaded(saved(tmp_path, family, names, **options))
    model = MtpModel.from_target(target)
    file = load_file(tmp_path / "model-00002-of-00002.safetensors")
    own = {part: file.get(f"{name.format(at=LAYERS, k=0)}.weight") for part, name in names.items()}
    blocks = loaded(tmp_path / "blocks").model
    random = torch.Generator().manual_seed(3)
    embeds, features = torch.randn(2, 1, 7, HIDDEN, generator=random)

    def norm(states, weight):
        eps = target.config.rms_norm_eps
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps) * weight

    parts = [norm(embeds, own["enorm"]), norm(features, own["hnorm"])]
    joined = torch.cat(parts[::-1] if hidden_first else parts, -1) @ own["eh_proj"].T
    places = torch.arange(7)[None] + 5
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    rotary = blocks.rotary_emb(joined, places)
    states = blocks.layers[0](joined, attention_mask=mask, position_ids=places, position_embeddings=rotary)
    last = target.model.norm.weight if own.get("norm") is None else own["norm"]
    got = model(inputs_embeds=embeds, features=features, position_ids=places).last_hidden_state
    torch.testing.assert_close(got, norm(states, last), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits_input(got), got, rtol=0, atol=0)


def test_each_tensor_is_read_once_and_no_other(deepseek, monkeypatch):
    target, opened, read = loaded(deepseek), [], []

    class Spy:
        def __init__(self, path, *args, **kwargs):
            opened.append(str(path).rsplit("/", 1)[1])
            self._file = safetensors.safe_open(path, *args, **kwargs)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def keys(self):
            return self._file.keys()

        def get_slice(self, name):
            read.append(name)
            return self._file.get_slice(name)

    monkeypatch.setattr(mtp, "safe_open", Spy)
    model = MtpModel.from_target(target)
    names = load_file(deepseek / "model-00002-of-00002.safetensors").keys()
    assert opened == ["model-00002-of-00002.safetensors"] and sorted(read) == sorted(names)
    # a drafter that is made from the model, and its calls, read nothing
    drafter = sdt.MTPDrafter(model)
    with sdt.patched(target, drafter=drafter):
        target.generate(torch.arange(5, 12)[None], max_new_tokens=6)
    assert len(read) == len(names)


def test_the_number_of_layers_is_that_of_the_file(deepseek):
    """configs often lack it, or have another number."""
    config = AutoConfig.from_pretrained(deepseek)
    config.num_mtp_layers = 7
    assert MtpModel.from_target(loaded(deepseek, config=config)).num_layers == 2


def test_another_checkpoint(deepseek):
    target = build("deepseek_v3")
    with pytest.raises(ValueError, match="loaded from a folder or from the hub.*give name_or_path"):
        MtpModel.from_target(target)
    model = MtpModel.from_target(target, deepseek)
    assert model.source == str(deepseek) and repr(str(deepseek)) in repr(model)
    assert sdt.MTPDrafter.from_target(target, deepseek).model.num_layers == 2


def test_a_quantized_target_has_plain_layers(deepseek):
    """The layers are built from a config without quantization, in the dtype that the target computes in. The
    target's list of modules that stay in fp32 holds for them, too."""
    target = loaded(deepseek).to(torch.bfloat16)
    target.config.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    model = MtpModel.from_target(target)
    assert not hasattr(model.config, "quantization_config") and hasattr(target.config, "quantization_config")
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear} and model.dtype == torch.bfloat16
    others = {name for name, tensor in model.state_dict().items() if tensor.dtype != torch.bfloat16}
    kept = target._keep_in_fp32_modules_strict  # transformers 5.24 also keeps the router's weights
    assert others == {name for name in model.state_dict() if any(part in name for part in kept)} != set()


def test_the_embedding_is_the_targets_without_a_norm_inside(deepseek):
    target = loaded(deepseek)
    assert MtpModel.from_target(target).embed_tokens is None

    class NormedEmbedding(nn.Embedding):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.embed_norm = nn.LayerNorm(HIDDEN)

        def forward(self, tokens):
            return self.embed_norm(super().forward(tokens))

    embedding = NormedEmbedding(*target.get_input_embeddings().weight.shape)
    target.set_input_embeddings(embedding)
    own, tokens = MtpModel.from_target(target).embed_tokens, torch.arange(9)[None]
    torch.testing.assert_close(own(tokens), embedding.weight[tokens], rtol=0, atol=0)
    assert own.weight is embedding.weight and isinstance(embedding.embed_norm, nn.LayerNorm)


def test_the_target_is_not_changed(tmp_path):
    """Not even the final norm, which the layers of ERNIE share."""
    target = loaded(saved(tmp_path, "qwen3", ERNIE))
    model = MtpModel.from_target(target)
    assert model.layers[0].norm is target.model.norm and target.model.norm.weight.requires_grad
    assert not model.layers[0].enorm.weight.requires_grad


# --- refusals


def without(name):
    return lambda tensors: tensors.pop(name)


def changed(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("model.layers.3.enorm.weight"), r"must have enorm\.weight of layer 0, got none"),
        (without("model.layers.3.shared_head.norm.weight"), r"must have norm\.weight of layer 0, got none"),
        (
            without("model.layers.3.self_attn.kv_a_layernorm.weight"),
            r"must have self_attn\.kv_a_layernorm\.weight of layer 0, got none",
        ),
        (
            changed("model.layers.3.eh_proj.weight", lambda weight: weight[:, :40].clone()),
            r"must have eh_proj\.weight of layer 0 \[32, 64\], got \[32, 40\]",
        ),
        (without("model.layers.3.mlp.experts.2.up_proj.weight"), r"must have "),
        (
            lambda tensors: tensors.update({"model.layers.3.mlp.extra.weight": torch.ones(2)}),
            r"must have no other tensors, got mlp\.extra\.weight of layer 0",
        ),
        (
            changed("model.layers.3.eh_proj.weight", lambda weight: weight.to(torch.float8_e4m3fn)),
            r"model\.layers\.3\.eh_proj\.weight in .* must be in fp32, bf16 or fp16, got F8_E4M3: quantized MTP layers",
        ),
        (dict.clear, r"must have MTP layers, got none in .* of type deepseek_v3"),
    ],
    ids=["enorm", "norm", "block", "shape", "expert", "unknown", "quantized", "none"],
)
def test_other_tensors_are_refused(tmp_path, edit, message):
    folder = saved(tmp_path, edit=edit)
    with pytest.raises(ValueError, match=message) as refusal:
        MtpModel.from_target(build("deepseek_v3"), folder)
    assert str(folder) in str(refusal.value)


def test_a_missing_shard(deepseek, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text((deepseek / "model.safetensors.index.json").read_text())
    with pytest.raises(ValueError, match=r"must have the file model-00002-of-00002\.safetensors of its index"):
        MtpModel.from_target(build("deepseek_v3"), tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"or model\.safetensors\.index\.json, got"):
        MtpModel.from_target(build("deepseek_v3"), tmp_path)


def test_a_refusal_of_the_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("gated")

    monkeypatch.setattr(mtp, "cached_file", refuse)
    with pytest.raises(ValueError, match="a local folder or a name on the hub, got 'nobody/nothing': gated"):
        MtpModel.from_target(build("deepseek_v3"), "nobody/nothing")


def test_other_kinds_are_refused_by_name(deepseek):
    target = build("deepseek_v3")
    target.config.model_type = "longcat_flash"
    with pytest.raises(ValueError, match="got longcat_flash, in which they have a decoder layer with one attention"):
        MtpModel.from_target(target, deepseek)


def test_what_is_no_model_is_refused(deepseek):
    with pytest.raises(ValueError, match=r"model must be an MtpModel, got DeepseekV3ForCausalLM.*from_target"):
        sdt.MTPDrafter(build("deepseek_v3"))


@pytest.mark.parametrize(
    ("options", "levels"),
    [({"num_tokens": 3}, 3), ({"tree": sdt.DynamicTree(8, 2, 4)}, 4), ({"tree": 16}, 7)],
)
def test_several_layers_draft_no_deeper_than_their_number(deepseek, options, levels):
    target = loaded(deepseek)
    drafter = sdt.MTPDrafter.from_target(target, **options)
    with pytest.raises(ValueError, match=rf"at most 2 levels deep with the 2 MTP layers of .*, got {levels} levels"):
        sdt.patch(target, drafter=drafter)


def test_another_target_is_refused(deepseek):
    drafter = sdt.MTPDrafter.from_target(loaded(deepseek))
    for target, message in (
        (build("llama", hidden_size=16), "the target's hidden size must be 32, got 16"),
        (build("deepseek_v3").to(torch.bfloat16), r"the dtype must be torch\.float32, got torch\.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            sdt.patch(target, drafter=drafter)
