"""The layers for multi-token prediction (MTP) in a target's own checkpoint. transformers does not load them with the
target.

An MTP layer joins the embedding of a token and a hidden state, and runs a decoder layer of the target's own class.

Sources: DeepSeek-V3 (arXiv 2412.19437); transformers' `MtpModel`; vLLM's `mimo_mtp`, `mimo_v2_mtp`, `step3p5_mtp`,
`hy_v3_mtp`, `exaone_moe_mtp` and `qwen3_next_mtp`; FastDeploy's `ernie4_5_mtp`.

Letters: B sequences, n tokens, H hidden size, L layers of the target, K MTP layers.
"""

import copy
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..forward.checks import text_decoder
from ..forward.copies import decoder_layers, shared_copy
from ..forward.versions import CACHE
from ..forward.wrappers import unwrap
from .target import check_fit

# forms of the names of an MTP layer's tensors: the number of the layer, if there is one, and the name in the layer
NUMBERED = re.compile(r"(?:model\.|language_model\.)*layers\.(?P<layer>\d+)\.(?:transformer\.)?(?P<part>.+)")
NAMES = tuple(
    re.compile(rf"(?:model\.)?{form}")
    for form in (
        r"mtp\.layers\.(?P<layer>\d+)\.(?P<part>.+)",  # Qwen, Mellum, EXAONE, MiMo-V2
        r"mtp_layers\.(?P<layer>\d+)\.(?P<part>.+)",  # MiMo
        r"mtp_block\.(?P<layer>\d+)\.(?P<part>.+)",  # ERNIE
        r"(?P<part>mtp_(?:emb_norm|hidden_norm|linear_proj))\.(?P<layer>\d+)\..+",
        r"mtp\.(?P<part>.+)",
    )
)
# parts of an MTP layer outside of its decoder layer: names in files -> name in `MtpLayer`
PARTS = {
    **dict.fromkeys(("enorm", "token_layernorm", "pre_fc_norm_embedding", "mtp_emb_norm"), "enorm"),
    **dict.fromkeys(("hnorm", "hidden_layernorm", "pre_fc_norm_hidden", "mtp_hidden_norm"), "hnorm"),
    **dict.fromkeys(("eh_proj", "input_proj", "fc", "mtp_linear_proj"), "eh_proj"),
    **dict.fromkeys(("shared_head.norm", "final_layernorm", "norm"), "norm"),
}
RENAMED = {"pre_mlp_layernorm": "post_attention_layernorm"}  # in the decoder layer of MiMo-V2
# copies of the target's embedding and language head, and tables of rotary embeddings
IGNORED = re.compile(r"^(embed_tokens|shared_head\.(head|output)|lm_head)\.|(^|\.)inv_freq$")
FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes of safetensors
# `model_type` of targets with MTP layers of a kind that is not supported -> the kind
UNSUPPORTED = {
    "longcat_flash": "a decoder layer with one attention, unlike the target's",
}
SLIDING, FULL = "sliding_attention", "full_attention"
# types of attention of the MTP layers if the config does not name them; full attention in all other families
ATTENTION = {"mimo_v2_flash": SLIDING, "mellum": SLIDING}
# MiMo-V2 trains every layer on the target's states, not on those of the layer before; vLLM, too, runs the first alone
FIRST_ALONE = ("mimo_v2_flash",)


@dataclass(frozen=True)
class MtpTensors:
    """The tensors of a checkpoint's MTP layers.

    Attributes:
        source: the folder or the name on the hub.
        names: name in `MtpModel`, before the conversions of the target's own weights -> name in the file.
        num_layers: K.
        hidden_first: True if the projection's input begins with the hidden state, not with the embedding.
        final_norm: True if the layers have no norm of their own at the end, but use the target's final norm.
    """

    source: str
    names: Mapping[str, str]
    num_layers: int
    hidden_first: bool
    final_norm: bool

    def is_sparse(self, layer: int) -> bool:
        """True if the decoder layer of an MTP layer is a mixture of experts."""
        return any(
            name.startswith(f"layers.{layer}.block.") and re.search(r"\.(experts|moe)\.", name) for name in self.names
        )


class MtpLayer(nn.Module):
    """One MTP layer.

    Args:
        config: of the MTP layers.
        index: number of the layer among the MTP layers; its keys and values have this number in a cache.
        block: class of the decoder layer.
        norm: class of the norms.
        bias: True if the projection has a bias.
        tensors: the tensors of all layers.

    Attributes:
        norm: the last norm; None if it is the target's final norm, which `from_target` sets.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        index: int,
        block: type[nn.Module],
        norm: type[nn.Module],
        bias: bool,
        tensors: MtpTensors,
    ):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_first = tensors.hidden_first
        self.enorm, self.hnorm = norm(hidden, eps=eps), norm(hidden, eps=eps)
        self.norm = None if tensors.final_norm else norm(hidden, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=bias)
        self.block = block(config, index)

    def joined(self, inputs_embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The input [B, n, H] of the decoder layer, for embeddings and hidden states [B, n, H]."""
        parts = self.enorm(inputs_embeds), self.hnorm(features)
        return self.eh_proj(torch.cat(parts[::-1] if self.hidden_first else parts, dim=-1))


class MtpModel(PreTrainedModel):
    """The MTP layers of a target. Embedding and language head are the target's. `from_target` reads the weights.

    A row of layer k joins a token and a feature: the hidden state of the position before. In layer 0, the feature is
    the target's hidden state after its final norm, and in layer k > 0 the output of layer k - 1. Drafted tokens have no
    hidden state of the target yet: the feature of a single layer is then its own output.

    Args:
        config: of the MTP layers, see `mtp_config`.
        target: the target. It is not changed; small parts of it are copied.
        tensors: the names of the tensors.

    Attributes:
        source, num_layers: see `MtpTensors`.
        embed_tokens: None, or the target's embedding without the norm inside it, if it has one.
        lm_head, target_ids, mask_token_id: None, see `FeatureHead`.
    """

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    lm_head = target_ids = mask_token_id = None
    largest_id = -1

    def __init__(self, config: PreTrainedConfig, target: PreTrainedModel, tensors: MtpTensors):
        super().__init__(config)
        self.source, self.num_layers = tensors.source, tensors.num_layers
        self.target_hidden_size = self.embedding_size = config.hidden_size
        decoder = text_decoder(target)
        block = type(decoder_layers(target, "MtpModel")[1][-1])
        norm, bias = type(decoder.norm), any(name.endswith("eh_proj.bias") for name in tensors.names)
        self.layers = nn.ModuleList(
            MtpLayer(config, index, block, norm, bias, tensors) for index in range(self.num_layers)
        )
        types = getattr(config, "layer_types", None) or [FULL] * self.num_layers
        self._windowed = tuple(each == SLIDING for each in types)
        with torch.device("cpu"):
            self.rotary_emb = type(decoder.rotary_emb)(config)
        # some rotary embeddings have a table for each type of attention
        by_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        self._rotary = tuple({"layer_type": each} if by_type else {} for each in types)
        self._keep_in_fp32_modules = getattr(target, "_keep_in_fp32_modules", None)
        self._keep_in_fp32_modules_strict = getattr(target, "_keep_in_fp32_modules_strict", None)
        self.embed_tokens = None

    @classmethod
    def from_target(cls, target: PreTrainedModel, name_or_path: str | PathLike | None = None) -> "MtpModel":
        """Read the MTP layers of a target. Only their tensors are read, each once; shards without them are not opened.

        Args:
            target: the model that the layers draft for. They get its device and dtype.
            name_or_path: the checkpoint, a local folder or a name on the hub; None for the one that the target was
                loaded from.

        Raises:
            ValueError: there is no such checkpoint, it has no MTP layers, they are quantized or of a kind that is not
                supported, or tensors are missing, unknown or misshapen. The message names them and the source.
        """
        target = unwrap(target, "MtpModel.from_target")
        config = target.config.get_text_config(decoder=True)
        if config.model_type in UNSUPPORTED:
            raise ValueError(
                f"MtpModel: the MTP layers of {type(target).__name__} are not supported, got {config.model_type}, in "
                f"which they have {UNSUPPORTED[config.model_type]}"
            )
        source = str(name_or_path or target.config.name_or_path)
        if not source:
            raise ValueError(
                f"MtpModel: the target must have been loaded from a folder or from the hub, got a "
                f"{type(target).__name__} without a name: give name_or_path"
            )
        files = _Files(source, None if name_or_path else getattr(target.config, "_commit_hash", None))
        tensors = find_mtp(files.names, source, config)
        with torch.device("meta"):
            model = cls(mtp_config(config, tensors), target, tensors)
        model.layers.to(target.dtype)
        with ExitStack() as opened:
            slices = files.slices(tensors.names, opened)
            loaded, _ = convert_and_load_state_dict_in_model(
                model,
                slices,
                LoadStateDictConfig(
                    device_map={"": target.device},
                    dtype=target.dtype,
                    dtype_plan=model._get_dtype_plan(target.dtype),
                    weight_mapping=_conversions(target),
                ),
            )
        _check_loaded(loaded, tensors)
        embedding = target.get_input_embeddings()
        if hasattr(embedding, "embed_norm"):
            model.embed_tokens = shared_copy(embedding, {"embed_norm": nn.Identity()})
        model.rotary_emb.to(target.device)
        model.requires_grad_(False).eval()
        if tensors.final_norm:
            for layer in model.layers:
                layer.norm = text_decoder(target).norm
        return model

    @classmethod
    def _can_set_experts_implementation(
        cls,
    ) -> bool:  # asked by transformers when the config names one, as the target's
        return True

    def extra_repr(self) -> str:
        return f"source={self.source!r}, num_layers={self.num_layers}"

    def taps(self, target: PreTrainedModel) -> tuple:
        """The hidden states of the target that `features` takes."""
        return ("final",)

    def check_target(self, target: PreTrainedModel) -> None:
        """Refuse a target that the layers do not belong to; see `check_fit`."""
        check_fit(self, target)

    def features(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The features [B, n, H] of verified positions, for the one hidden state that `taps` names."""
        return states[0]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        layer: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run one layer.

        Args:
            inputs_embeds: [B, n, H]. Embeddings of the tokens.
            features: [B, n, H]. Hidden states of the positions before the tokens.
            position_ids: [B, n] int64. Only their differences matter.
            attention_mask: 0 for padding, [B, cached + n]; or a packed tree; or None.
            use_cache: passed to the decoder layer.
            layer: number of the layer.
            kwargs: the cache, named `forward.versions.CACHE`. Arguments of other models are not read.

        Returns:
            `last_hidden_state` [B, n, H] after the layer's last norm: the next feature, and the argument of
            `logits_input`.
        """
        cache, mtp = kwargs.get(CACHE), self.layers[layer]
        mask_of = create_sliding_window_causal_mask if self._windowed[layer] else create_causal_mask
        options = {"position_ids": position_ids, CACHE: cache}
        states = mtp.block(
            mtp.joined(inputs_embeds, features),
            attention_mask=mask_of(self.config, features, attention_mask, layer_idx=layer, **options),
            position_embeddings=self.rotary_emb(features, position_ids, **self._rotary[layer]),
            use_cache=use_cache,
            **options,
        )
        return BaseModelOutputWithPast(last_hidden_state=mtp.norm(states), **{CACHE: cache})

    def logits_input(self, states: torch.Tensor) -> torch.Tensor:
        """The input [B, n, H] of the target's output layer, for the `last_hidden_state` of `forward`."""
        return states


def find_mtp(names: Iterable[str], source: str, config: PreTrainedConfig) -> MtpTensors:
    """Find the tensors of MTP layers by their names.

    Args:
        names: all names in the checkpoint.
        source: for error messages.
        config: text config of the target.

    Raises:
        ValueError: there are none.
    """
    found: dict[int, dict[str, str]] = {}  # number of the layer -> name in the layer -> name in the file
    for name in names:
        place = _place(name, config.num_hidden_layers)
        if place is not None:
            found.setdefault(place[0], {})[place[1]] = name
    # layers of the target that it was loaded without have the same form of names
    numbers = [number for number in sorted(found) if not all(name.startswith("block.") for name in found[number])]
    if not numbers:
        raise ValueError(
            f"MtpModel: the target's checkpoint must have MTP layers, got none in {source} of type "
            f"{config.model_type}: use another drafter"
        )
    if config.model_type in FIRST_ALONE:
        numbers = numbers[:1]
    layers = {
        f"layers.{index}.{own}": name for index, number in enumerate(numbers) for own, name in found[number].items()
    }
    shared = [name for name in layers.values() if re.match(r"(model\.)?mtp\.fc\.", name)]
    if shared and (len(found) > 1):
        raise ValueError(
            f"MtpModel: each MTP layer must have its own projection, got {len(found)} layers in {source} that share "
            f"{shared[0]}"
        )
    return MtpTensors(
        source,
        layers,
        len(numbers),
        hidden_first=any(".input_proj." in name for name in layers.values()),
        final_norm=any(".mtp_linear_proj." in name or ".mtp_emb_norm." in name for name in layers.values()),
    )


def _place(name: str, num_layers: int) -> tuple[int, str] | None:
    """The number of an MTP layer and the name of a tensor in `MtpLayer`; None if it is no tensor of an MTP layer.
    Layers are numbered from 0, or after the target's layers."""
    match = next(filter(None, (form.fullmatch(name) for form in NAMES)), None)
    if match is None:
        match = NUMBERED.fullmatch(name)
        if match is None or int(match["layer"]) < num_layers:
            return None
    number, part = int(match.groupdict().get("layer") or 0), match["part"]
    if part in PARTS:  # the number is between the part and the tensor
        return number, f"{PARTS[part]}.{name.rsplit('.', 1)[1]}"
    if IGNORED.search(part):
        return None
    start, _, last = part.rpartition(".")
    if start in PARTS:
        return number, f"{PARTS[start]}.{last}"
    return number, f"block.{RENAMED.get(start, start)}.{last}"


def mtp_config(config: PreTrainedConfig, tensors: MtpTensors) -> PreTrainedConfig:
    """The config with which the target's own class of decoder layers builds the MTP layers, numbered from 0 and
    unquantized.

    Args:
        config: text config of the target.
        tensors: the tensors decide which layers are mixtures of experts.
    """
    count, sparse = tensors.num_layers, [tensors.is_sparse(layer) for layer in range(tensors.num_layers)]
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    types = [ATTENTION.get(config.model_type, FULL)] * count
    types = (getattr(config, "mtp_layer_types", None) or types)[:count]
    options = {
        "layer_types": types,
        "num_hidden_layers": count,
        "mlp_layer_types": ["sparse" if each else "dense" for each in sparse],
        "first_k_dense_replace": 0 if sparse[0] else count,
        # ERNIE
        "moe_layer_interval": 1,
        "moe_layer_start_index": 0 if sparse[0] else count,
        "moe_layer_end_index": count,
        # Qwen
        "decoder_sparse_step": 1,
        "mlp_only_layers": [] if sparse[0] else list(range(count)),
        # Step: limits of activations are those of the target's layers
        "swiglu_limits": None,
        "swiglu_limits_shared": None,
    }
    for name, value in options.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if getattr(config, "num_sliding_attention_heads", None):  # Step
        windowed = {"num_attention_heads": config.num_sliding_attention_heads}
        config.per_layer_config = {layer: windowed for layer, kind in enumerate(types) if kind == SLIDING}
    return config


class _Files:
    """The safetensors files of a checkpoint. They are found, not opened.

    Attributes:
        names: all names of tensors.
    """

    def __init__(self, source: str, revision: str | None):
        self.source, self._revision = source, revision
        index = self._path(SAFE_WEIGHTS_INDEX_NAME)
        if index is not None:
            with open(index, encoding="utf-8") as file:
                self._file_of = json.load(file)["weight_map"]
        else:
            single = self._path(SAFE_WEIGHTS_NAME)
            if single is None:
                raise ValueError(
                    f"MtpModel: the target's checkpoint must be a local folder or a name on the hub with "
                    f"{SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}, got {source!r}"
                )
            with safe_open(single, framework="pt") as opened:
                self._file_of = dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)

    @property
    def names(self) -> Iterable[str]:
        return self._file_of

    def _path(self, file: str) -> str | None:
        try:
            return cached_file(self.source, file, revision=self._revision, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ValueError(
                f"MtpModel: the target's checkpoint must be a local folder or a name on the hub, got {self.source!r}: "
                f"{error}"
            ) from error

    def slices(self, names: Mapping[str, str], opened: ExitStack) -> dict[str, Any]:
        """Tensors that are not read yet.

        Args:
            names: wanted name -> name in the file.
            opened: gets the opened files.

        Raises:
            ValueError: a file is missing, or a tensor is quantized.
        """
        files = {}
        for file in sorted({self._file_of[name] for name in names.values()}):
            path = self._path(file)
            if path is None:
                raise ValueError(f"MtpModel: {self.source} must have the file {file} of its index, got none")
            files[file] = opened.enter_context(safe_open(path, framework="pt"))
        found = {own: files[self._file_of[name]].get_slice(name) for own, name in names.items()}
        for own, tensor in found.items():
            if tensor.get_dtype() not in FLOATS:
                raise ValueError(
                    f"MtpModel: {names[own]} in {self.source} must be in fp32, bf16 or fp16, got "
                    f"{tensor.get_dtype()}: quantized MTP layers are not supported"
                )
        return found


def _conversions(target: PreTrainedModel) -> list:
    """transformers' conversions of the target's weights, such as those of experts, for all modules."""
    conversions = get_model_conversion_mapping(target, add_legacy=False)
    for conversion in conversions:
        conversion.scope_prefix = None  # the MTP layers are in no part of a larger model
    return conversions


def _check_loaded(loaded: Any, tensors: MtpTensors) -> None:
    """Refuse a checkpoint whose tensors are not those of the model.

    Raises:
        ValueError: a tensor is missing, unknown or misshapen.
    """

    def shown(names: Iterable[str]) -> str:
        places = (re.fullmatch(r"layers\.(\d+)\.(?:block\.)?(.+)", name) for name in sorted(names))
        return ", ".join(f"{place[2]} of layer {place[1]}" for place in places if place)

    problem = None
    if loaded.conversion_errors:
        problem = f"tensors that can be joined, got {'; '.join(map(str, loaded.conversion_errors.values()))}"
    elif loaded.mismatched_keys:
        name, got, wanted = min(loaded.mismatched_keys)
        problem = f"{shown([name])} {list(wanted)}, got {list(got)}"
    elif loaded.missing_keys:
        problem = f"{shown(loaded.missing_keys)}, got none"
    elif loaded.unexpected_keys:
        problem = f"no other tensors, got {shown(loaded.unexpected_keys)}"
    if problem:
        raise ValueError(f"MtpModel: the MTP layers in {tensors.source} must have {problem}")
