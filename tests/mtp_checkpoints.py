"""Tiny random targets whose checkpoints also hold layers for multi-token prediction (MTP), in the published layouts.

Sources of the layouts: the DeepSeek-V3 report (arXiv 2412.19437), transformers' `MtpModel`, vLLM's `deepseek_mtp`,
`mimo_mtp`, `mimo_v2_flash_mtp`, `exaone_moe_mtp`, `step3p5_mtp` and `qwen3_next_mtp`, FastDeploy's `ernie4_5_mtp`.

Letters: L layers of the target, K MTP layers, H hidden size, V vocabulary.
"""

import copy
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from checkpoints import favouring
from families import _GROUPED, FAMILIES, REFUSED, WINDOW, enlarge_weights
from specdec_triton.tools.shrink import tiny_config

EPS = 0.03  # of norms


class Names(NamedTuple):
    """Names in the file: of the beginning of the block's tensors, and of the five other tensors of an MTP layer. `{at}`
    is the number of the layer counted from the target's first, `{k}` that among the MTP layers.

    Attributes:
        block: the beginning of the names of the decoder block.
        enorm, hnorm: norms of the embedding and of the hidden state.
        eh_proj: the projection [H, 2 H] of both.
        post_norm: norm of the block's output; None if it is the target's final norm.
        copies: names under which the file repeats the target's embedding and language head, if it does.
        renamed: (a part of a name in a block of transformers' model, that part in the file).
        hidden_first: True if the projection's input begins with the hidden state.
    """

    block: str
    enorm: str
    hnorm: str
    eh_proj: str
    post_norm: str | None
    copies: tuple[str, str] | None = None
    renamed: tuple[str, str] | None = None
    hidden_first: bool = False


DEEPSEEK = Names(
    "model.layers.{at}.",
    "model.layers.{at}.enorm",
    "model.layers.{at}.hnorm",
    "model.layers.{at}.eh_proj",
    "model.layers.{at}.shared_head.norm",
    ("model.layers.{at}.embed_tokens", "model.layers.{at}.shared_head.head"),
)
_QWEN = Names("mtp.layers.{k}.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
_ERNIE = Names(
    "model.mtp_block.{k}.",
    "model.mtp_emb_norm.{k}",
    "model.mtp_hidden_norm.{k}",
    "model.mtp_linear_proj.{k}",
    post_norm=None,
)
_MIMO = Names(
    "model.mtp_layers.{k}.",
    "model.mtp_layers.{k}.token_layernorm",
    "model.mtp_layers.{k}.hidden_layernorm",
    "model.mtp_layers.{k}.input_proj",
    "model.mtp_layers.{k}.final_layernorm",
    hidden_first=True,
)
_MIMO_V2 = Names(
    "model.mtp.layers.{k}.",
    "model.mtp.layers.{k}.enorm",
    "model.mtp.layers.{k}.hnorm",
    "model.mtp.layers.{k}.eh_proj",
    "model.mtp.layers.{k}.final_layernorm",
    renamed=("post_attention_layernorm", "pre_mlp_layernorm"),
)
_STEP = DEEPSEEK._replace(
    post_norm="model.layers.{at}.transformer.shared_head.norm",
    copies=("model.layers.{at}.embed_tokens", "model.layers.{at}.transformer.shared_head.output"),
)


@dataclass(frozen=True)
class Family:
    """A family of targets with MTP layers.

    Attributes:
        model: the target's class.
        options: of the target's config.
        block: options of the MTP blocks that differ from those of the target.
        names: in the file.
        count: key of config.json with the number of MTP layers; None if the config does not state it.
        more: further entries of config.json about the MTP layers.
        most_layers: largest K for which drafts are compared.
        plus_one: True if norms multiply by one plus their weight.
    """

    model: str
    options: dict[str, Any]
    block: dict[str, Any]
    names: Names = DEEPSEEK
    count: str | None = "num_nextn_predict_layers"
    more: dict[str, Any] = field(default_factory=dict)
    most_layers: int = 2
    plus_one: bool = False


_SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
_LATENT = {**FAMILIES["deepseek_v3"].options, **_SMALL}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4}
_KINDS = ["full_attention", "sliding_attention"]
_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
}
_HALF_ROPE = {kind: {**rope, "partial_rotary_factor": 0.5} for kind, rope in _ROPE.items()}
_MIXED = {**_GROUPED, **_SMALL, "sliding_window": WINDOW, "layer_types": _KINDS, "rope_parameters": _ROPE}
_FLAT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 90.0}}
_SLIDING_BLOCK = {"layer_types": ["sliding_attention"]}

MTP_FAMILIES = {
    "deepseek_v3": Family("DeepseekV3ForCausalLM", {**_LATENT, **_FLAT_ROPE}, {"first_k_dense_replace": 0}),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {**_GROUPED, **_SMALL, **_ROUTED, "head_dim": 8, "first_k_dense_replace": 1, "use_qk_norm": True},
        {"first_k_dense_replace": 0},
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        {
            **{key: value for key, value in _LATENT.items() if key != "first_k_dense_replace"},
            "mlp_layer_types": ["dense", "sparse"],
        },
        {"mlp_layer_types": ["sparse"]},
    ),
    "ernie4_5": Family("Ernie4_5ForCausalLM", {**_GROUPED, **_SMALL, "head_dim": 8}, {}, _ERNIE, most_layers=1),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        {**_GROUPED, **_SMALL, "moe_intermediate_size": 24, "moe_k": 2, "moe_num_experts": 4},
        {"moe_layer_start_index": 100},
        _ERNIE,
        most_layers=1,
    ),
    "mellum": Family(
        "MellumForCausalLM",
        {**_MIXED, **_EXPERTS, "num_experts": 4, "head_dim": 8, "mlp_layer_types": ["sparse", "sparse"]},
        {**_SLIDING_BLOCK, "mlp_layer_types": ["sparse"]},
        _QWEN,
        most_layers=1,
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM",
        {
            **_MIXED,
            **_EXPERTS,
            **_FLAT_ROPE,
            "num_experts": 4,
            "head_dim": 8,
            "layer_types": _KINDS[::-1],
            "mlp_layer_types": ["dense", "sparse"],
        },
        {**_SLIDING_BLOCK, "mlp_layer_types": ["dense"]},
        _QWEN,
        more={"mtp_layer_types": ["sliding_attention"]},
        most_layers=1,
    ),
    "mimo": Family("Qwen2ForCausalLM", {**_GROUPED, **_SMALL}, {}, _MIMO, most_layers=1),
    "mimo_v2_flash": Family(
        "MiMoV2FlashForCausalLM",
        {
            **_MIXED,
            **_ROUTED,
            "rope_parameters": _HALF_ROPE,
            "head_dim": 12,
            "v_head_dim": 8,
            "mlp_layer_types": ["dense", "sparse"],
        },
        {**_SLIDING_BLOCK, "mlp_layer_types": ["dense"]},
        _MIMO_V2,
        count=None,
        most_layers=1,
    ),
    "step3p7": Family(
        "Step3p7ForConditionalGeneration",
        {
            **_MIXED,
            **_ROUTED,
            "rope_parameters": _HALF_ROPE,
            "head_dim": 8,
            "share_expert_dim": 24,
            "mlp_layer_types": ["dense", "sparse"],
        },
        {**_SLIDING_BLOCK, "mlp_layer_types": ["dense"]},
        _STEP,
        plus_one=True,
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            **REFUSED["qwen3_next"].options,
            **_EXPERTS,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 1,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        {"layer_types": ["full_attention"]},
        _QWEN,
        count=None,
        most_layers=1,
        plus_one=True,
    ),
}


class Layer(NamedTuple):
    """An MTP layer.

    Attributes:
        enorm, hnorm, post_norm: norms. `post_norm` is the target's final norm if the layer has none of its own.
        eh_proj: the projection from 2 H to H.
        block: the decoder block, a module of transformers.
    """

    enorm: nn.Module
    hnorm: nn.Module
    eh_proj: nn.Linear
    post_norm: nn.Module
    block: nn.Module


@dataclass(frozen=True)
class MtpLayers:
    """The MTP layers of a target, for their literal statement.

    Attributes:
        family: a name in `MTP_FAMILIES`.
        layers: the layers.
        blocks: the model to which the blocks of the layers belong. It has their rotary embedding.
    """

    family: str
    layers: tuple[Layer, ...]
    blocks: PreTrainedModel

    @property
    def layout(self) -> Family:
        return MTP_FAMILIES[self.family]

    def kind(self, k: int) -> str:
        """The attention of layer k: "full_attention" or "sliding_attention"."""
        kinds = getattr(self.blocks.get_decoder().config, "layer_types", None)
        return kinds[k] if kinds else "full_attention"

    def cos_sin(self, x: torch.Tensor, positions: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary embedding of layer k for rows x [B, n, H] at positions [B, n]."""
        rotary = self.blocks.get_decoder().rotary_emb
        has_kinds = isinstance(rotary.rope_type, dict)
        return rotary(x, positions, self.kind(k)) if has_kinds else rotary(x, positions)


@dataclass(frozen=True)
class MtpCheckpoint:
    """A checkpoint that was written.

    Attributes:
        folder: its folder.
        mtp: its MTP layers, in fp64.
        names: the names of the tensors of the MTP layers in the file, without the copies of the target's tensors.
    """

    folder: Path
    mtp: MtpLayers
    names: frozenset[str]

    def target(self, **options) -> PreTrainedModel:
        """The target, as transformers loads it. Its text consists mostly of `checkpoints.FAVOURED` tokens."""
        model_class = getattr(transformers, self.mtp.layout.model)
        return model_class.from_pretrained(self.folder, **{"dtype": torch.float32, **options}).eval()


def write_mtp(
    folder: Path, family: str, num_layers: int = 1, seed: int = 0, shards: int = 1, names: Names | None = None, **more
) -> MtpCheckpoint:
    """Write a random target with `num_layers` MTP layers. See `random_mtp` and `write_layers` for the arguments."""
    return write_layers(folder, *random_mtp(family, num_layers, seed, **more), shards, names)


def random_mtp(family: str, num_layers: int = 1, seed: int = 0, **more) -> tuple[PreTrainedModel, MtpLayers]:
    """A random target and its MTP layers.

    Args:
        family: a name in `MTP_FAMILIES`.
        num_layers: K.
        seed: of the weights.
        more: further entries of the target's config.
    """
    layout = MTP_FAMILIES[family]
    block = {key: value * num_layers if isinstance(value, list) else value for key, value in layout.block.items()}
    options = {**layout.options, **layout.more}
    if layout.count is not None:
        options[layout.count] = num_layers
    if family == "step3p7":  # its lists of layers go on with the MTP layers
        options |= {key: options[key] + value for key, value in block.items() if isinstance(value, list)}
    target = favouring(_random(layout.model, {**options, **more}, seed))
    blocks = _random(layout.model, {**layout.options, **block, "num_hidden_layers": num_layers, **more}, seed + 1)
    blocks.set_attn_implementation("eager")
    blocks.set_experts_implementation("eager")  # the others have no fp64
    decoder = target.get_decoder()
    hidden, random = decoder.config.hidden_size, torch.Generator().manual_seed(seed + 2)
    layers = []
    for found in blocks.get_decoder().layers:
        enorm, hnorm, post_norm = (_perturbed(type(decoder.norm)(hidden, eps=EPS), random) for _ in range(3))
        eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        with torch.no_grad():
            eh_proj.weight.copy_(torch.randn(hidden, 2 * hidden, generator=random) / hidden**0.5)
        layers.append(Layer(enorm, hnorm, eh_proj, post_norm if layout.names.post_norm else decoder.norm, found))
    return target, MtpLayers(family, tuple(layers), blocks)


def write_layers(
    folder: Path, target: PreTrainedModel, mtp: MtpLayers, shards: int = 1, names: Names | None = None
) -> MtpCheckpoint:
    """Write a target with MTP layers.

    Args:
        folder: the folder to write.
        target, mtp: see `random_mtp`.
        shards: the number of files. With more than one there is an index, and the last file holds the MTP tensors and
            some of the target's.
        names: other names in the file than those of the family.
    """
    names, below = names or mtp.layout.names, target.get_decoder().config.num_hidden_layers
    tensors: dict[str, torch.Tensor] = {}
    of_blocks, copies = _published(mtp.blocks), {}
    for k, layer in enumerate(mtp.layers):
        places = {"at": below + k, "k": k}
        for name, tensor in of_blocks.items():
            if name.startswith(f"model.layers.{k}."):
                name = name.removeprefix(f"model.layers.{k}.").replace(*(names.renamed or ("", "")))
                tensors[names.block.format(**places) + name] = tensor
        for name in ("enorm", "hnorm", "eh_proj", "post_norm"):
            if getattr(names, name) is not None:
                tensors[f"{getattr(names, name).format(**places)}.weight"] = getattr(layer, name).weight.detach()
        shared = target.get_input_embeddings(), target.get_output_embeddings()
        for name, module in zip(names.copies or (), shared, strict=False):
            copies[f"{name.format(**places)}.weight"] = module.weight.detach().clone()
    target.save_pretrained(folder)
    _write(folder, load_file(folder / "model.safetensors"), {**tensors, **copies}, shards)
    copied = copy.deepcopy(mtp)
    for module in (copied.blocks, *(module for layer in copied.layers for module in layer)):
        module.double()
    return MtpCheckpoint(folder, copied, frozenset(tensors))


def _random(model: str, options: dict[str, Any], seed: int) -> PreTrainedModel:
    """A model with random weights, norms and biases of routers."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, model)
    options = {**options, "rms_norm_eps": EPS}
    if "vision_config" in model_class.config_class.sub_configs:
        options = {"text_config": options, "vision_config": tiny_config(model_class.config_class).vision_config}
    made = enlarge_weights(model_class(model_class.config_class(**options)))
    random = torch.Generator().manual_seed(seed)
    for module in made.modules():
        if "Norm" in type(module).__name__:
            _perturbed(module, random)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "sinks")):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))
    return made


def _perturbed(norm: nn.Module, random: torch.Generator) -> nn.Module:
    """The norm with random weights. With weights of one, states before and after it are alike for the next norm."""
    with torch.no_grad():
        norm.weight += 0.4 * torch.randn(norm.weight.shape, generator=random)
    return norm


def _published(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model under the names of published checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _write(folder: Path, target: dict[str, torch.Tensor], mtp: dict[str, torch.Tensor], shards: int) -> None:
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file({**target, **mtp}, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(target)
    files = [{name: target[name] for name in names[place::shards]} for place in range(shards)]
    files[-1] |= mtp
    index = {}
    for place, tensors in enumerate(files):
        file = f"model-{place + 1:05}-of-{shards:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    total = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    written = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))
