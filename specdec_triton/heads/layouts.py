"""The layouts of EAGLE checkpoints: names of tensors, and configs.

Letters: H hidden size of the draft, Ht of the target, E width of the embeddings, T taps, DV tokens that the draft can
name, V tokens of the target.

Sources: SafeAILab/EAGLE, SpecForge, vllm-project/speculators, NVIDIA Model Optimizer, NeMo AutoModel, vLLM. The names
and shapes of tensors decide. A config gives only the numbers and flags that no shape shows.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.configuration_utils import PreTrainedConfig

from ..ops import FLOAT_DTYPES
from .checkpoint import Checkpoint, kind_of, layer_config, plain_name, rope_options

Kind = Literal["eagle3", "eagle"]
Meaning = Literal["input", "output"]
# beginnings of names in files -> those in `EagleModel`
RENAMED = {
    "midlayer.": "layers.0.",
    "transformer.": "layers.0.",
    "fusion_fc.": "fc.",
    "norm.": "final_norm.",
    "pre_lm_head_layernorm.": "final_norm.",
}
# the target's tokens that the draft can name, a table of the rotary embedding, and parts of the target
IGNORED = re.compile(r"^t2d$|(^|\.)inv_freq$|^verifier_")
# types of rotary embeddings -> options that must be given
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
DEFAULT_ROPE_THETA = 10000.0  # of the official code, whatever the target's is
# names that config.json may have for the mask token of P-EAGLE, in the order of vLLM
MASK_TOKEN_NAMES = ("mask_token_id", "pard_token", "ptd_token_id")
NUM_DRAFTED = 7  # of a P-EAGLE head whose config states no number: the number in the cards of the authors' heads


@dataclass(frozen=True)
class Layout:
    """An EAGLE checkpoint in the names of `EagleModel`.

    Attributes:
        source: see `Checkpoint`.
        kind: "eagle3", or "eagle" for EAGLE-1 and EAGLE-2.
        config: of the layers.
        tensors: name in `EagleModel` -> tensor.
        names: name in `EagleModel` -> name in the file.
        target_ids: [DV] int64, the target's id of each token of the draft; None if they are the same.
        target_hidden_size: Ht.
        num_taps: T.
        embedding_size: E.
        layer_ids: the layers whose hidden states are the taps; None for the default, or if the tap is the target's last
            hidden state.
        layer_meaning: "input" if the id i means the input of layer i, "output" if it means the output.
        final_tap: True if the only tap is the target's last hidden state.
        norm_before_residual: True if the first layer adds its update to the normed feature.
        norm_output: True if the state that is fed back is that after the final norm (EAGLE-3.1). SpecForge wrote the
            flag with another meaning for some months; without it in a config, all writers mean False.
        mask_token_id: the token of P-EAGLE's mask rows, whose feature is made from the tensor `mask_hidden`; None for
            other heads.
        num_drafted: number of tokens that a P-EAGLE head drafts in one forward, if the user asks for no other number;
            None for other heads.
    """

    source: str
    kind: Kind
    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]
    target_ids: torch.Tensor | None
    target_hidden_size: int
    num_taps: int
    embedding_size: int
    layer_ids: tuple[int, ...] | None
    layer_meaning: Meaning
    final_tap: bool
    norm_before_residual: bool
    norm_output: bool
    mask_token_id: int | None = None
    num_drafted: int | None = None


def layout_of(
    checkpoint: Checkpoint,
    rope_theta: float | None = None,
    layers: tuple[int, ...] | None = None,
    layer_meaning: Meaning | None = None,
) -> Layout:
    """Read the layout of a checkpoint.

    Args:
        checkpoint: the files.
        rope_theta, layers, layer_meaning: replace the values of the checkpoint; None keeps them.

    Raises:
        ValueError: it is not an EAGLE head, a number is missing, or tensors and config contradict each other.
    """
    return _Reader(checkpoint).layout(rope_theta, layers, layer_meaning)


class _Reader:
    def __init__(self, checkpoint: Checkpoint):
        self.source, self.config = checkpoint.source, checkpoint.config
        try:
            kind = kind_of(checkpoint.tensors, checkpoint.config)
        except ValueError as error:
            raise self.error(str(error)) from None
        if kind not in ("eagle3", "eagle"):
            raise self.error(f"must hold an EAGLE head, got {kind or 'tensors of another model'}")
        self.kind: Kind = kind
        self.section = layer_config(self.config)
        self.nested = self.config.get("eagle_config") or {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[str, str] = {}
        for name, tensor in checkpoint.tensors.items():
            own = plain_name(name)
            if IGNORED.search(own):
                continue
            start = next((start for start in RENAMED if own.startswith(start)), "")
            own = RENAMED.get(start, "") + own[len(start) :]
            if own in self.tensors:
                raise self.error(f"must have each tensor once, got {self.names[own]} and {name}")
            self.tensors[own], self.names[own] = tensor, name

    def error(self, text: str) -> ValueError:
        return ValueError(f"EagleModel: {self.source}: {text}")

    def layout(self, rope_theta: float | None, layers: tuple[int, ...] | None, layer_meaning: Meaning | None) -> Layout:
        self.check_dtypes()
        config = self.layer_options(rope_theta)
        hidden = config.hidden_size
        offsets = self.tensors.pop("d2t", None)
        first = "layers.0.self_attn.q_proj.weight" if self.kind == "eagle3" else "fc.weight"
        embedding = self.shape(first, 2)[1] - hidden
        if embedding < 1:
            raise self.error(
                f"{self.names[first]} must have more than hidden_size={hidden} columns (embedding and feature), got "
                f"{list(self.tensors[first].shape)}"
            )
        num_taps, target = 1, hidden
        if self.kind == "eagle3":
            target = self.flag("target_hidden_size", hidden)
            width = self.shape("fc.weight", 2)[1] if "fc.weight" in self.tensors else hidden
            num_taps = width // target
            if not num_taps or width % target:
                raise self.error(
                    f"fc.weight must have a multiple of the target's hidden size {target} as its columns, got {width}"
                )
        final_tap = self.kind == "eagle" or (layers is None and self.flag("use_aux_hidden_state", True) is False)
        ids = None if final_tap and layers is None else self.layer_ids(layers)
        if ids is not None and self.kind == "eagle":
            raise self.error(f"layers must be None for EAGLE-1, which takes the last hidden state, got {list(ids)}")
        if ids is not None and len(ids) != num_taps:
            raise self.error(f"layers must name the {num_taps} layers whose hidden states it takes, got {list(ids)}")
        if final_tap and num_taps != 1:
            raise self.error(f"fc.weight must take one hidden state (use_aux_hidden_state is false), got {num_taps}")
        self.check_norms()
        self.tie_head()
        is_peagle = "mask_hidden" in self.tensors or self.config.get("speculators_model_type") == "peagle"
        parallel = self.kind == "eagle3" and is_peagle
        return Layout(
            source=self.source,
            kind=self.kind,
            config=config,
            tensors=self.tensors,
            names=self.names,
            target_ids=None if offsets is None else self.target_ids(offsets),
            target_hidden_size=target,
            num_taps=num_taps,
            embedding_size=embedding,
            layer_ids=ids,
            layer_meaning=layer_meaning or self.default_meaning(ids),
            final_tap=final_tap,
            norm_before_residual=bool(self.flag("norm_before_residual", False)),
            norm_output=self.kind == "eagle3" and bool(self.flag("norm_output", False)),
            mask_token_id=self.mask_token_id(num_taps * target) if parallel else None,
            num_drafted=self.num_drafted() if parallel else None,
        )

    def flag(self, name: str, default: Any) -> Any:
        """An option of the head. Some exports nest it."""
        found = (self.config.get(name), self.nested.get(name))
        return next((each for each in found if each is not None), default)

    def number(self, name: str) -> int:
        if not self.section.get(name):
            raise self.error(f"config.json must have {name}, got {self.section.get(name)}")
        return self.section[name]

    def shape(self, name: str, dims: int) -> torch.Size:
        """The shape of a tensor that must exist."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dim() != dims:
            got = "none" if tensor is None else list(tensor.shape)
            raise self.error(f"{self.names.get(name, name)} must be a tensor of {dims} dimensions, got {got}")
        return tensor.shape

    def check_dtypes(self) -> None:
        if self.config.get("quantization_config") or self.section.get("quantization_config"):
            raise self.error("must not be quantized, got a quantization_config: use the head in bf16 or fp16")
        for name, tensor in self.tensors.items():
            if name != "d2t" and tensor.dtype not in FLOAT_DTYPES:
                raise self.error(
                    f"{self.names[name]} must be in fp32, bf16 or fp16, got {tensor.dtype}: quantized heads are not "
                    "supported"
                )

    def check_norms(self) -> None:
        """The flags of norms before `fc`, if they are given, must agree with the tensors."""
        for flag, norm in (("norm_before_fc", "input_norm.weight"), ("fc_norm", "fc_norm.0.weight")):
            wanted = self.flag(flag, None)
            if wanted is not None and bool(wanted) != (norm in self.tensors):
                raise self.error(f"{norm} must {'' if wanted else 'not '}be there with {flag}={wanted} in config.json")

    def mask_token_id(self, size: int) -> int:
        """The mask token of a P-EAGLE head. Its tensor `mask_hidden` of `size` elements gets the shape [1, 1, size]."""
        found = self.tensors.get("mask_hidden")
        if found is None or found.numel() != size:
            got = "none" if found is None else list(found.shape)
            raise self.error(f"mask_hidden must be [1, 1, {size}], as wide as its states of the target, got {got}")
        self.tensors["mask_hidden"] = found.reshape(1, 1, size)
        stated = next((each for name in MASK_TOKEN_NAMES if (each := self.flag(name, None)) is not None), None)
        token = int(stated) if isinstance(stated, str) and stated.isdecimal() else stated
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise self.error(f"config.json must have {' or '.join(MASK_TOKEN_NAMES)}, the mask token, got {stated!r}")
        return token

    def num_drafted(self) -> int:
        """The number of tokens that a P-EAGLE head was trained to draft. speculators and AutoModel state it."""
        proposals = (self.config.get("speculators_config") or {}).get("proposal_methods") or [{}]
        stated = proposals[0].get("speculative_tokens") or self.flag("num_depths", None) or NUM_DRAFTED
        if isinstance(stated, bool) or not isinstance(stated, int) or stated < 1:
            raise self.error(f"the number of tokens that it drafts must be at least 1, got {stated!r}")
        return stated

    def tie_head(self) -> None:
        """If embeddings are tied and the head has its own, they are also its output layer."""
        embedding = self.tensors.get("embed_tokens.weight")
        if self.section.get("tie_word_embeddings") and embedding is not None and "lm_head.weight" not in self.tensors:
            self.tensors["lm_head.weight"], self.names["lm_head.weight"] = embedding, self.names["embed_tokens.weight"]

    def layer_options(self, rope_theta: float | None) -> PreTrainedConfig:
        """The config of the layers. The number of layers, and which tensors they have, is that of the file."""
        heads = self.number("num_attention_heads")
        rows = self.shape("layers.0.self_attn.q_proj.weight", 2)[0]
        found = {int(match[1]) for name in self.tensors if (match := re.match(r"layers\.(\d+)\.", name))}
        windows = self.windows(max(found) + 1)
        kind = Qwen3Config if "layers.0.self_attn.q_norm.weight" in self.tensors else LlamaConfig
        return kind(
            vocab_size=self.section.get("vocab_size") or 1,
            hidden_size=self.number("hidden_size"),
            intermediate_size=self.number("intermediate_size"),
            num_hidden_layers=max(found) + 1,
            num_attention_heads=heads,
            num_key_value_heads=self.section.get("num_key_value_heads") or heads,
            head_dim=self.section.get("head_dim") or rows // heads,
            hidden_act=self.section.get("hidden_act") or "silu",
            max_position_embeddings=self.section.get("max_position_embeddings") or 2048,
            rms_norm_eps=self.section.get("rms_norm_eps") or 1e-6,
            rope_parameters=self.rope_parameters(rope_theta),
            bos_token_id=None,
            eos_token_id=None,
            **windows,
        )

    def windows(self, num_layers: int) -> dict[str, Any]:
        """The options of a config for layers with a sliding window; none if there are no such layers."""
        types, window = self.section.get("layer_types") or [], self.section.get("sliding_window")
        unknown = sorted({*types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise self.error(f"layer_types must be full_attention or sliding_attention, got {unknown[0]}")
        if (
            not window
            or self.section.get("use_sliding_window") is False
            or "sliding_attention" not in types[:num_layers]
        ):
            return {}
        if len(types) < num_layers:
            raise self.error(f"layer_types must name the {num_layers} layers of the file, got {len(types)}")
        return {"layer_types": types[:num_layers], "sliding_window": window, "use_sliding_window": True}

    def rope_parameters(self, rope_theta: float | None) -> dict:
        options = dict(rope_options(self.section))
        kind = options.pop("type", None)
        options.setdefault("rope_type", kind or "default")
        base = rope_theta or options.get("rope_theta") or self.section.get("rope_theta") or DEFAULT_ROPE_THETA
        kind = options["rope_type"]
        if kind not in ROPE_TYPES:
            raise self.error(f"the rope type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
        lacking = [name for name in ROPE_TYPES[kind] if options.get(name) is None]
        if lacking:
            raise self.error(f"rope of type {kind!r} must have {', '.join(ROPE_TYPES[kind])}, got no {lacking[0]}")
        partial = options.get("partial_rotary_factor", self.section.get("partial_rotary_factor"))
        if partial not in (None, 1.0):
            raise self.error(f"the rotary embedding must cover the whole head, got partial_rotary_factor={partial}")
        return {**options, "rope_theta": float(base)}

    def layer_ids(self, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        name = "eagle_aux_hidden_state_layer_ids"
        ids = self.flag(name, None) if layers is None else layers
        if not ids:
            return None
        if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in ids):
            raise self.error(f"layers must be numbers of layers from 0, got {list(ids)}")
        return tuple(ids)

    def default_meaning(self, ids: tuple[int, ...] | None) -> Meaning:
        """speculators writes inputs of layers. In the lists of SpecForge, SGLang and Model Optimizer, which begin with
        1, the ids are those of layers whose outputs are taken."""
        of_speculators = "speculators_model_type" in self.config or "speculators_config" in self.config
        return "output" if ids and ids[0] == 1 and not of_speculators else "input"

    def target_ids(self, offsets: torch.Tensor) -> torch.Tensor | None:
        """[DV] int64, or None if the draft's ids are the target's."""
        if offsets.dim() != 1 or offsets.dtype.is_floating_point or offsets.dtype == torch.bool:
            raise self.error(f"d2t must be integers [DV], got {offsets.dtype} {list(offsets.shape)}")
        places, vocabulary = torch.arange(len(offsets)), self.section.get("vocab_size")
        ids = offsets.to("cpu", torch.int64) + places
        distinct, largest = len(ids.unique()), int(ids.max())
        if distinct < len(ids) or int(ids.min()) < 0 or (vocabulary and largest >= vocabulary):
            as_ids = len(offsets.unique()) == len(ids) and (not vocabulary or int(offsets.max()) < vocabulary)
            raise self.error(
                f"d2t must hold offsets (the target's id of token i is i + d2t[i]) to distinct ids below vocab_size="
                f"{vocabulary}, got {distinct} distinct ids of {len(ids)}, from {int(ids.min())} to {largest}"
                + (": it seems to hold the ids themselves" if as_ids else "")
            )
        if self.shape("lm_head.weight", 2)[0] != len(ids):
            raise self.error(
                f"lm_head.weight must have a row for each of the {len(ids)} tokens of d2t, got "
                f"{list(self.tensors['lm_head.weight'].shape)}"
            )
        return None if len(ids) == vocabulary and torch.equal(ids, places) else ids
