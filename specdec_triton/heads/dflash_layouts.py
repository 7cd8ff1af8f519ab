"""The layouts of DFlash checkpoints: names of tensors, and configs.

Letters: H hidden size of the draft, Ht of the target, T taps, DV tokens that the draft can name.

Sources: z-lab/dflash, SpecForge, vllm-project/speculators, transformers' Muse Glimmer; and vLLM and SGLang, if training
code does not show a convention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .checkpoint import MASK_EMBEDDING, MUSE, Checkpoint
from .reader import HeadReader, Meaning

# beginnings of names in files -> those in `DFlashModel`
RENAMED = {
    "encoder.fc.": "fc.",
    "encoder.output_norm_enc.": "hidden_norm.",
    "norm.": "final_norm.",
    "midlayer.": "layers.0.",
}


@dataclass(frozen=True)
class DFlashLayout:
    """A DFlash checkpoint in the names of `DFlashModel`.

    Attributes:
        source: see `Checkpoint`.
        config: of the layers.
        tensors: name in `DFlashModel` -> tensor.
        names: name in `DFlashModel` -> name in the file.
        target_ids: [DV] int64, the target's id of each token of the draft; None if they are the same.
        target_hidden_size: Ht.
        num_taps: T.
        layer_ids: the layers whose hidden states are the taps; None for the default.
        layer_meaning: "input" if the id i means the input of layer i, "output" if it means the output.
        windows: for each layer, the number of positions that a row sees, its own included; None for all.
        causal: for each layer, False if the rows of a block see each other, True if they see only those before them.
        block_size: number of rows of a block.
        mask_token_id: the token of all rows of a block but the first.
        first_predicts: True if row i of a block predicts the token after row i, False if it predicts the token at
            row i.
        has_sinks: True if the layers have attention sinks.
        value_scale: factor of the values of attention.
        rotary_size: number of elements of each query and key that the rotary embedding changes, the first ones.
    """

    source: str
    config: PreTrainedConfig
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]
    target_ids: torch.Tensor | None
    target_hidden_size: int
    num_taps: int
    layer_ids: tuple[int, ...] | None
    layer_meaning: Meaning
    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    block_size: int
    mask_token_id: int
    first_predicts: bool
    has_sinks: bool
    value_scale: float
    rotary_size: int


def dflash_layout_of(
    checkpoint: Checkpoint,
    rope_theta: float | None = None,
    layers: tuple[int, ...] | None = None,
    layer_meaning: Meaning | None = None,
) -> DFlashLayout:
    """Read the layout of a checkpoint.

    Args:
        checkpoint: the files.
        rope_theta, layers, layer_meaning: replace the values of the checkpoint; None keeps them.

    Raises:
        ValueError: it is not a DFlash head, a number is missing, or tensors and config contradict each other.
    """
    return _Reader(checkpoint).layout(rope_theta, layers, layer_meaning)


class _Reader(HeadReader):
    owner, kinds, wanted, nested_in = "DFlashModel", ("dflash",), "a DFlash head", "dflash_config"
    renamed = RENAMED

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self.is_muse = self.config.get("model_type") == MUSE
        if self.is_muse:  # its files may leave out the options that have a default in transformers
            options = {name: value for name, value in self.config.items() if name != "model_type"}
            self.config = self.section = AutoConfig.for_model(MUSE, **options).to_dict()

    def layout(
        self, rope_theta: float | None, layers: tuple[int, ...] | None, layer_meaning: Meaning | None
    ) -> DFlashLayout:
        self.check_dtypes()
        config = self.layer_options(rope_theta)
        target = self.flag("target_hidden_size", config.hidden_size)
        if MASK_EMBEDDING in self.tensors:  # [H] or [1, H]
            self.tensors[MASK_EMBEDDING] = self.tensors[MASK_EMBEDDING].flatten()
        offsets, num_taps = self.tensors.pop("d2t", None), self.num_taps(target)
        named, meaning = self.named_layers()
        first_predicts = bool(self.flag("sample_from_anchor", False) or self.flag("shift_label", False))
        return DFlashLayout(
            source=self.source,
            config=config,
            tensors=self.tensors,
            names=self.names,
            target_ids=None if offsets is None else self.target_ids(offsets),
            target_hidden_size=target,
            num_taps=num_taps,
            layer_ids=self.checked_ids(named if layers is None else layers, num_taps),
            layer_meaning=layer_meaning or meaning,
            windows=self.windows(),
            causal=self.causal(),
            block_size=self.block_size(1 if first_predicts else 2),
            mask_token_id=self.mask_token(("mask_token_id",)),
            first_predicts=first_predicts,
            has_sinks=self.has_sinks(),
            value_scale=self.value_scale(),
            rotary_size=int(config.head_dim * self.rotary_share()),
        )

    def block_size(self, least: int) -> int:
        size = self.flag("block_size", None)
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise self.error(f"config.json must have block_size, a number of at least {least}, got {size!r}")
        return size

    def named_layers(self) -> tuple[Any, Meaning]:
        """The ids of layers in the config, and their meaning. speculators writes inputs of layers, the others outputs;
        SGLang and vLLM read "eagle_aux_hidden_state_layer_ids" as inputs."""
        of_speculators = self.config.get("aux_hidden_state_layer_ids")
        outputs = self.flag("target_layer_ids", None)
        if of_speculators or outputs is None:
            ids = of_speculators or self.flag("eagle_aux_hidden_state_layer_ids", None)
            return ids, "input" if ids or "speculators_model_type" in self.config else "output"
        return outputs, "output"

    def windows(self) -> tuple[int | None, ...]:
        """For each layer, the number of positions that a row sees. SpecForge, SGLang and vLLM count the row's own;
        transformers sees so many positions before it. speculators counts from the first row of the block in training,
        but its heads run in vLLM."""
        count, types = self.num_layers(), self.layer_types()
        all_slide = bool(self.flag("use_swa", False)) and "sliding_attention" not in types
        slides = [all_slide or each == "sliding_attention" for each in types or [""] * count]
        window = None if self.section.get("use_sliding_window") is False else self.section.get("sliding_window")
        window = self.flag("swa_window_size", window)
        if not any(slides):
            return (None,) * count
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise self.error(f"sliding_window must be a number of at least 1 for sliding layers, got {window!r}")
        window += int(self.is_muse)
        return tuple(window if each else None for each in slides)

    def causal(self) -> tuple[bool, ...]:
        """For each layer, True if a row of a block does not see later rows. In SpecForge and speculators, and unless
        the config says otherwise, these are the layers that it names sliding ones."""
        count, types = self.num_layers(), self.layer_types()
        given = False if self.is_muse else self.flag("is_causal", self.nested.get("causal"))
        if self.config.get("sliding_window_non_causal"):
            given = False
        if given is not None:
            return (bool(given),) * count
        return tuple(each == "sliding_attention" for each in types or [""] * count)

    def value_scale(self) -> float:
        scale = float(self.flag("attention_value_scale", 1.0))
        if scale != 1 and "layers.0.self_attn.o_proj.bias" in self.tensors:  # it is applied after the projection
            raise self.error(f"attention_value_scale must be 1 if o_proj has a bias, got {scale}")
        return scale

    def has_sinks(self) -> bool:
        given = any(name.endswith(".attention_sink_bias") for name in self.tensors)
        return given or bool(self.flag("attention_sink_bias", False))
