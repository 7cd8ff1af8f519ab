"""The layouts of EAGLE checkpoints: names of tensors, and configs.

Letters: H hidden size of the draft, Ht of the target, E width of the embeddings, T taps, DV tokens that the draft can
name, V tokens of the target.

Sources: SafeAILab/EAGLE, SpecForge, vllm-project/speculators, NVIDIA Model Optimizer, NeMo AutoModel, vLLM. The names
and shapes of tensors decide. A config gives only the numbers and flags that no shape shows.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.configuration_utils import PreTrainedConfig

from .checkpoint import Checkpoint
from .reader import QUERY, HeadReader, Meaning

Kind = Literal["eagle3", "eagle"]
# beginnings of names in files -> those in `EagleModel`
RENAMED = {
    "midlayer.": "layers.0.",
    "transformer.": "layers.0.",
    "fusion_fc.": "fc.",
    "norm.": "final_norm.",
    "pre_lm_head_layernorm.": "final_norm.",
}
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


class _Reader(HeadReader):
    owner, kinds, wanted, nested_in = "EagleModel", ("eagle3", "eagle"), "an EAGLE head", "eagle_config"
    renamed = RENAMED

    def layout(self, rope_theta: float | None, layers: tuple[int, ...] | None, layer_meaning: Meaning | None) -> Layout:
        self.check_dtypes()
        config = self.layer_options(rope_theta, **self.windows())
        if (share := self.rotary_share()) != 1:
            raise self.error(f"the rotary embedding must cover the whole head, got partial_rotary_factor={share}")
        hidden = config.hidden_size
        offsets = self.tensors.pop("d2t", None)
        first = QUERY if self.kind == "eagle3" else "fc.weight"
        embedding = self.shape(first, 2)[1] - hidden
        if embedding < 1:
            raise self.error(
                f"{self.names[first]} must have more than hidden_size={hidden} columns (embedding and feature), got "
                f"{list(self.tensors[first].shape)}"
            )
        num_taps, target = 1, hidden
        if self.kind == "eagle3":
            target = self.flag("target_hidden_size", hidden)
            num_taps = self.num_taps(target)
        final_tap = self.kind == "eagle" or (layers is None and self.flag("use_aux_hidden_state", True) is False)
        if layers and self.kind == "eagle":
            raise self.error(f"layers must be None for EAGLE-1, which takes the last hidden state, got {list(layers)}")
        if layers is None and not final_tap:
            layers = self.flag("eagle_aux_hidden_state_layer_ids", None)
        ids = self.checked_ids(layers, num_taps)
        if final_tap and num_taps != 1:
            raise self.error(f"fc.weight must take one hidden state (use_aux_hidden_state is false), got {num_taps}")
        self.check_norms()
        self.tie_head()
        is_peagle = "mask_hidden" in self.tensors or self.config.get("speculators_model_type") == "peagle"
        parallel = self.kind == "eagle3" and is_peagle
        return Layout(
            source=self.source,
            kind="eagle3" if self.kind == "eagle3" else "eagle",
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
        return self.mask_token(MASK_TOKEN_NAMES)

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

    def windows(self) -> dict[str, Any]:
        """The options of a config for layers with a sliding window; none if there are no such layers."""
        types, window = self.layer_types(), self.section.get("sliding_window")
        if not window or self.section.get("use_sliding_window") is False or "sliding_attention" not in types:
            return {}
        return {"layer_types": types, "sliding_window": window, "use_sliding_window": True}

    def default_meaning(self, ids: tuple[int, ...] | None) -> Meaning:
        """speculators writes inputs of layers. In the lists of SpecForge, SGLang and Model Optimizer, which begin with
        1, the ids are those of layers whose outputs are taken."""
        of_speculators = "speculators_model_type" in self.config or "speculators_config" in self.config
        return "output" if ids and ids[0] == 1 and not of_speculators else "input"
