"""Reading the files of draft heads, and telling their kinds apart."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from specdec_triton.heads import checkpoint
from specdec_triton.heads.checkpoint import kind_of, read_checkpoint

TENSORS = {"fc.weight": torch.arange(6.0).view(2, 3), "midlayer.hidden_norm.weight": torch.ones(2)}


def same(found, wanted=TENSORS):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_safetensors(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 2, "name": "ä"}, ensure_ascii=False), "utf-8")
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")  # the same weights in most repositories
    found = read_checkpoint(tmp_path)
    same(found.tensors)
    assert found.source == str(tmp_path) and found.config == {"hidden_size": 2, "name": "ä"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "torch < 1.6"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "medusa_lm_head.pt"])
def test_pickled_tensors(tmp_path, name, zipped):
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    for rest in ("training_args.bin", "optimizer.pt", "rng_state_0.pt"):
        (tmp_path / rest).write_bytes(b"of the trainer")
    found = read_checkpoint(str(tmp_path))
    same(found.tensors)
    assert found.config == {}


def test_shards(tmp_path):
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    same(read_checkpoint(tmp_path).tensors)
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"must have each tensor once, got fc.weight again in model-0.safetensors"):
        read_checkpoint(tmp_path)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "model.safetensors")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "some/head":
            raise OSError("no such repository")
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    found = read_checkpoint("some/head")
    same(found.tensors)
    assert found.source == "some/head"
    assert asked == [("some/head", ["config.json", "*.safetensors", "*.bin", "*.pt"])]
    with pytest.raises(
        ValueError, match="a local folder or the name of a repository on the hub, got 'no/head': no such"
    ):
        read_checkpoint("no/head")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_code_in_a_pickle_does_not_run(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="pytorch_model.bin must hold tensors only"):
        read_checkpoint(tmp_path)


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must have a file \*.safetensors or \*.bin or \*.pt, got none in"):
        read_checkpoint(tmp_path)
    torch.save({"state_dict": TENSORS}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be a dict of tensors, got another value for state_dict"):
        read_checkpoint(tmp_path)
    torch.save(torch.ones(2), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be a dict of tensors, got another value for pytorch_model.bin"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match="model.safetensors must hold tensors only, and could not be read"):
        read_checkpoint(tmp_path)


LAYER = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
EAGLE3 = ("fc.weight", "midlayer.hidden_norm.weight", *(f"midlayer.{name}" for name in LAYER))
EAGLE1 = ("fc.weight", *(f"layers.0.{name}" for name in LAYER))
DFLASH = ("fc.weight", "hidden_norm.weight", "layers.0.self_attn.q_proj.weight", "norm.weight")
MUSE = ("encoder.fc.weight", "encoder.output_norm_enc.weight", *DFLASH[2:])
MODEL = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(f"model.layers.{index}.{name}" for index in (0, 1) for name in LAYER),
)
MLA = ("self_attn.kv_a_proj_with_mqa.weight", "self_attn.q_a_proj.weight")


@pytest.mark.parametrize(
    "names, config, kind",
    [
        (EAGLE3, {}, "eagle3"),
        ([f"draft_model.{name}" for name in EAGLE3], {}, "eagle3"),
        ([*(f"model.{name}" for name in EAGLE3), "lm_head.weight", "embed_tokens.weight", "norm.weight"], {}, "eagle3"),
        ([name.replace("midlayer", "layers.0") for name in EAGLE3], {"speculators_model_type": "eagle3"}, "eagle3"),
        ([*EAGLE3, "mask_hidden"], {}, "eagle3"),  # P-EAGLE
        (EAGLE3, {"speculators_model_type": "peagle"}, "eagle3"),
        (["layers.0.hidden_norm.weight", "lm_head.weight"], {}, "eagle3"),  # one tap and no fc
        (EAGLE1, {}, "eagle"),
        ([*EAGLE1, "embed_tokens.weight", "norm.weight"], {}, "eagle"),
        (["fusion_fc.weight", "transformer.self_attn.q_proj.weight"], {"speculators_model_type": "eagle"}, "eagle"),
        (DFLASH, {}, "dflash"),
        ([*DFLASH, "embed_tokens.weight", "lm_head.weight", "d2t"], {"speculators_model_type": "dflash"}, "dflash"),
        ([f"model.{name}" for name in DFLASH], {"dflash_config": {"projector_type": "dflash"}}, "dflash"),
        (MUSE, {"model_type": "muse_glimmer_assistant"}, "dflash"),
        (["0.0.linear.weight", "0.0.linear.bias", "0.1.weight"], {}, "medusa"),
        (["medusa_head.0.0.linear.weight", "medusa_head.0.1.weight"], {"medusa_num_heads": 2}, "medusa"),
        (["blocks.0.layers.0.weight", "lm_heads.0.weight"], {}, "medusa"),
        (MODEL, {}, None),
        ([*MODEL, "mtp.fc.weight", "model.layers.1.eh_proj.weight", f"model.layers.0.{MLA[0]}"], {}, None),
        (MODEL, {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1]}}, None),
        (MODEL, {"dflash_config": {"mask_token_id": 3}}, None),
        (["fc.weight"], {}, None),
        ([], {}, None),
    ],
)  # fmt: skip
def test_kinds(names, config, kind):
    assert kind_of(names, config) == kind


MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24]}


@pytest.mark.parametrize(
    "names, config, named",
    [
        (DFLASH, {"speculators_model_type": "dspark"}, "DSpark: use another one"),
        (DFLASH, {"dflash_config": {"projector_type": "dspark"}}, "DSpark"),
        ([*DFLASH, "markov_head.markov_w1.weight"], {}, "DSpark"),
        ([*DFLASH, "logit_head.confidence_head.proj.weight"], {}, "DSpark"),
        (DFLASH, {"dflash_config": {"projector_type": "domino", "shift_label": True}}, "Domino"),
        ([*DFLASH, "prefix_gru.weight_ih_l0", "embed_proj.0.weight"], {}, "Domino"),
        (DFLASH, {"speculators_model_type": "dflash2"}, "DFlash 2"),
        ([*DFLASH, "candidate_selector.successor_codebook"], {}, "DFlash 2"),
        ([*DFLASH, "layers.0.attention_conv.base_kernel"], {}, "DFlash 2"),
        ([*DFLASH, "layers.0.mlp.experts.0.up_proj.weight"], {}, "DFlash with a mixture of experts"),
        ([*DFLASH, f"layers.0.{MLA[0]}"], {}, r"DFlash with latent attention \(MLA\)"),
        (DFLASH, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "DFlash with .* \\(mrope\\)"),
        ((*MODEL, "pre_projection.weight"), {"model_type": "gemma4_assistant"}, "a Gemma 4 assistant"),
        ([*EAGLE3, *(f"midlayer.{name}" for name in MLA)], {}, r"latent attention \(MLA\)"),
        (EAGLE3, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope"),
        (EAGLE3, {"transformer_layer_config": {"rope_parameters": MROPE}}, "mrope"),
        (["0.0.linear.weight"], {"hydra_num_heads": 4}, "Hydra"),
        (["hydra_head.0.0.linear.weight"], {}, "Hydra"),
        (["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"], {}, "MTP: .* with MTPDrafter.from_target"),
        (["model.layers.61.eh_proj.weight", "model.layers.61.enorm.weight"], {}, "MTP"),
        (["emb.0.weight", "head.0.weight", "ln.0.weight", "proj.0.weight"], {}, "MLPSpeculator"),
        ([*EAGLE1, "parallel_draft_heads.0.medusa_layers.0.linear.weight"], {}, "parallel Medusa heads"),
        ([*EAGLE3, "midlayer.mlp.experts.0.up_proj.weight"], {}, "mixture of experts"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(names, config, named):
    with pytest.raises(
        ValueError, match=f"must be EAGLE-1, EAGLE-2, EAGLE-3, P-EAGLE, DFlash or Medusa, got .*{named}"
    ):
        kind_of(names, config)
