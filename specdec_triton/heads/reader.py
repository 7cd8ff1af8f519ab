"""Reads the tensors and the config of a draft head with decoder layers, and makes its model from them.

Letters: B sequences, H hidden size of the head, Ht of the target, T taps, DV tokens that the head can name, V tokens of
the target.

The names and shapes of tensors decide. A config gives only the numbers and flags that no shape shows.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.configuration_utils import PreTrainedConfig

from ..ops import FLOAT_DTYPES
from .checkpoint import Checkpoint, kind_of, layer_config, plain_name, rope_options

Meaning = Literal["input", "output"]
# the target's tokens that the head can name, a table of the rotary embedding, and parts of the target
IGNORED = re.compile(r"^t2d$|(^|\.)inv_freq$|^verifier_")
# types of rotary embeddings -> options that must be given
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
DEFAULT_ROPE_THETA = 10000.0  # of the official code, whatever the target's is
QUERY = "layers.0.self_attn.q_proj.weight"


class HeadLayout(Protocol):
    """A checkpoint in the names of its model, which is made from it.

    Attributes:
        source: see `Checkpoint`.
        tensors: name in the model -> tensor.
        names: name in the model -> name in the file.
    """

    @property
    def source(self) -> str: ...
    @property
    def tensors(self) -> dict[str, torch.Tensor]: ...
    @property
    def names(self) -> dict[str, str]: ...


Model = TypeVar("Model", bound=PreTrainedModel)


def load_model(
    kind: type[Model], layout: HeadLayout, dtype: torch.dtype | None, device: torch.device | str | None
) -> Model:
    """The model `kind(layout)` with the tensors of the layout.

    Args:
        kind: the class of the model.
        layout: the head.
        dtype: of the weights; None for that of the file.
        device: None for the CPU.

    Raises:
        ValueError: a tensor is missing, not known, or of another shape; the message names it.
    """
    with torch.device("meta"):
        model = kind(layout)
    check_tensors(layout, model)
    dtype = dtype or layout.tensors[QUERY].dtype
    model.load_state_dict({name: each.to(device, dtype) for name, each in layout.tensors.items()}, assign=True)
    return model.to(device or "cpu").requires_grad_(False).eval()


def check_tensors(layout: HeadLayout, model: PreTrainedModel) -> None:
    """Compare the tensors of the file with those of the model.

    Raises:
        ValueError: a tensor is missing, not known, or of another shape.
    """
    wanted, problem = model.state_dict(), None
    for name in [*wanted, *layout.tensors]:
        shown = layout.names.get(name, name)
        if name not in layout.tensors:
            problem = f"{shown} must be {list(wanted[name].shape)}, got none"
        elif name not in wanted:
            problem = f"{shown} must not be there, got {list(layout.tensors[name].shape)}: this tensor is not known"
        elif wanted[name].shape != layout.tensors[name].shape:
            problem = f"{shown} must be {list(wanted[name].shape)}, got {list(layout.tensors[name].shape)}"
        if problem:
            raise ValueError(f"{type(model).__name__}: {layout.source}: {problem}")


def match_biases(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give each linear layer of the model a bias if the tensors have one, and none otherwise."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bias = nn.Parameter(module.weight.new_empty(module.out_features))
            module.bias = bias if f"{name}.bias" in tensors else None


def check_choices(owner: str, layers: Sequence[int] | None, layer_meaning: str | None) -> tuple[int, ...] | None:
    """The layers that the user chose.

    Raises:
        ValueError: `layers` is not a list, or `layer_meaning` is not one; the message names `owner`.
    """
    if layer_meaning not in (None, "input", "output"):
        raise ValueError(f"{owner}: layer_meaning must be 'input', 'output' or None, got {layer_meaning!r}")
    if layers is not None and not isinstance(layers, (list, tuple, range)):
        raise ValueError(f"{owner}: layers must be a list of numbers of layers or None, got {layers!r}")
    return None if layers is None else tuple(layers)


class HeadReader:
    """Finds the tensors and options of a head.

    Args:
        checkpoint: the files.

    Attributes:
        config: config.json.
        section: the part of it that describes the layers.
        nested: further options of the head, which some exports nest.
        kind: see `kind_of`.
        tensors, names: see `HeadLayout`.

    Raises:
        ValueError: the head is of another kind, or has a tensor twice.
    """

    owner: ClassVar[str]  # class of the model, for error messages
    kinds: ClassVar[tuple[str, ...]]  # kinds of heads that the model runs
    wanted: ClassVar[str]  # their name
    renamed: ClassVar[dict[str, str]]  # beginnings of names in files -> those in the model
    nested_in: ClassVar[str]  # entry of the config with further options

    def __init__(self, checkpoint: Checkpoint):
        self.source, self.config = checkpoint.source, checkpoint.config
        try:
            kind = kind_of(checkpoint.tensors, checkpoint.config)
        except ValueError as error:
            raise self.error(str(error)) from None
        if kind not in self.kinds:
            raise self.error(f"must hold {self.wanted}, got {kind or 'tensors of another model'}")
        self.kind = kind
        self.section = layer_config(self.config)
        self.nested = self.config.get(self.nested_in) or {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[str, str] = {}
        for name, tensor in checkpoint.tensors.items():
            own = plain_name(name)
            if IGNORED.search(own):
                continue
            start = next((start for start in self.renamed if own.startswith(start)), "")
            own = self.renamed.get(start, "") + own[len(start) :]
            if own in self.tensors:
                raise self.error(f"must have each tensor once, got {self.names[own]} and {name}")
            self.tensors[own], self.names[own] = tensor, name

    def num_taps(self, target: int) -> int:
        """T, the number of hidden states of size `target` that `fc` takes. A head without `fc` takes one."""
        width = self.shape("fc.weight", 2)[1] if "fc.weight" in self.tensors else self.number("hidden_size")
        if width < target or width % target:
            raise self.error(
                f"fc.weight must have a multiple of the target's hidden size {target} as its columns, got {width}"
            )
        return width // target

    def checked_ids(self, ids: Sequence[int] | None, num_taps: int) -> tuple[int, ...] | None:
        """The numbers of the layers whose hidden states are the taps; None if there are none."""
        if not ids:
            return None
        if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in ids):
            raise self.error(f"layers must be numbers of layers from 0, got {list(ids)}")
        if len(ids) != num_taps:
            raise self.error(f"layers must name the {num_taps} layers whose hidden states it takes, got {list(ids)}")
        return tuple(ids)

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.owner}: {self.source}: {text}")

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

    def mask_token(self, names: Sequence[str]) -> int:
        """The mask token, which config.json has under the first of these names that it has."""
        stated = next((each for name in names if (each := self.flag(name, None)) is not None), None)
        token = int(stated) if isinstance(stated, str) and stated.isdecimal() else stated
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise self.error(f"config.json must have {' or '.join(names)}, the mask token, got {stated!r}")
        return token

    def layer_options(self, rope_theta: float | None, **windows: Any) -> PreTrainedConfig:
        """The config of the layers. The number of layers, and which tensors they have, is that of the file. `windows`:
        options of a config for layers with a sliding window."""
        heads = self.number("num_attention_heads")
        rows = self.shape(QUERY, 2)[0]
        kind = Qwen3Config if "layers.0.self_attn.q_norm.weight" in self.tensors else LlamaConfig
        return kind(
            vocab_size=self.section.get("vocab_size") or 1,
            hidden_size=self.number("hidden_size"),
            intermediate_size=self.number("intermediate_size"),
            num_hidden_layers=self.num_layers(),
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

    def num_layers(self) -> int:
        """The number of layers in the file."""
        self.shape(QUERY, 2)
        return 1 + max(int(match[1]) for name in self.tensors if (match := re.match(r"layers\.(\d+)\.", name)))

    def layer_types(self) -> list[str]:
        """The types of the layers; [] if the config does not name them."""
        types = self.section.get("layer_types") or []
        unknown = sorted({*types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise self.error(f"layer_types must be full_attention or sliding_attention, got {unknown[0]}")
        if "sliding_attention" in types and len(types) < self.num_layers():
            raise self.error(f"layer_types must name the {self.num_layers()} layers of the file, got {len(types)}")
        return types[: self.num_layers()]

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
        options.pop("partial_rotary_factor", None)
        return {**options, "rope_theta": float(base)}

    def rotary_share(self) -> float:
        """The share of each head that the rotary embedding changes."""
        stated = rope_options(self.section).get("partial_rotary_factor") or self.section.get("partial_rotary_factor")
        return 1.0 if stated is None else stated

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
