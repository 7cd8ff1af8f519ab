"""The model of EAGLE draft heads: EAGLE-1, EAGLE-2, EAGLE-3, EAGLE-3.1 and P-EAGLE, and their variants.

It runs transformers' own attention, MLP, norm and rotary modules, so it runs with an ordinary cache over a prompt, with
a tree cache over tree nodes, and with fused layers.

Letters: B sequences, N tokens, H hidden size of the draft, Ht of the target, E width of the embeddings, T taps, DV
tokens that the draft can name, V tokens of the target, L layers of the target.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

from ..forward.versions import CACHE
from .checkpoint import Checkpoint
from .layouts import Layout, layout_of
from .reader import Meaning, check_choices, load_model, match_biases
from .target import check_fit, named_taps, num_layers


class UnnormedLayer(nn.Module):
    """A decoder layer without a norm before attention: the first layer of EAGLE-1.

    Args:
        config: of the layers.
        input_size: width of the attention's input.
    """

    def __init__(self, config: PreTrainedConfig, input_size: int):
        super().__init__()
        attention, mlp = (Qwen3Attention, Qwen3MLP) if isinstance(config, Qwen3Config) else (LlamaAttention, LlamaMLP)
        self.self_attn = attention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.self_attn, name, nn.Linear(input_size, getattr(self.self_attn, name).out_features))
        self.mlp = mlp(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, stream: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The residual stream [B, N, H] after the layer. `arguments` are those of the attention."""
        return self.add_updates(stream, stream, arguments)

    def add_updates(self, stream: torch.Tensor, attended: torch.Tensor, arguments: dict) -> torch.Tensor:
        """Add the updates of attention and MLP to the stream [B, N, H]. `attended` [B, N, `input_size`] is the input of
        the attention."""
        stream = stream + self.self_attn(hidden_states=attended, **arguments)[0]
        return stream + self.mlp(self.post_attention_layernorm(stream))


class Eagle3Layer(UnnormedLayer):
    """The first layer of EAGLE-3. Its attention reads the normed embedding and the normed feature, one after the other.

    Args:
        config: of the layers.
        embedding_size: E.
        norm_before_residual: see `Layout`.
    """

    def __init__(self, config: PreTrainedConfig, embedding_size: int, norm_before_residual: bool):
        super().__init__(config, embedding_size + config.hidden_size)
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = LlamaRMSNorm(embedding_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, features: torch.Tensor, inputs_embeds: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The residual stream [B, N, H], for features [B, N, H] and embeddings [B, N, E]."""
        normed = self.hidden_norm(features)
        attended = torch.cat((self.input_layernorm(inputs_embeds), normed), dim=-1)
        return self.add_updates(normed if self.norm_before_residual else features, attended, arguments)


class EagleModel(PreTrainedModel):
    """The layers of an EAGLE head (Li et al. 2024, 2025). It is not tied to a target.

    A row pairs the embedding of token t_{i+1} with the feature of position i. The feature is that of the target for
    verified tokens, and the head's own output for drafted ones.

    Args:
        layout: the head. Its tensors are not read, only their names and shapes; `from_checkpoint` loads them.

    Attributes:
        config: of the layers; `hidden_size` is H.
        source: see `Checkpoint`.
        kind: "eagle3", or "eagle" for EAGLE-1 and EAGLE-2.
        layer_ids, layer_meaning, target_hidden_size, norm_output, mask_token_id, num_drafted: see `Layout`.
        mask_hidden: [1, 1, T * Ht]. Stands for the target's hidden states in P-EAGLE's mask rows; None for other heads.
        target_ids: [DV] int64. The target's id of each token that the head can name; None if they are the target's.
        embed_tokens: the head's own embedding; None if that of the target is to be used.
        lm_head: the head's own output layer; None if that of the target is to be used.
    """

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    target_ids: torch.Tensor | None

    def __init__(self, layout: Layout):
        config, tensors = layout.config, layout.tensors
        super().__init__(config)
        self.source, self.kind = layout.source, layout.kind
        self.layer_ids, self.layer_meaning = layout.layer_ids, layout.layer_meaning
        self.target_hidden_size, self.num_taps = layout.target_hidden_size, layout.num_taps
        self.embedding_size = layout.embedding_size
        self.norm_output, self._final_tap = layout.norm_output, layout.final_tap
        self.mask_token_id, self.num_drafted = layout.mask_token_id, layout.num_drafted
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        self._windows = tuple(config.sliding_window if each == "sliding_attention" else None for each in types)
        hidden, given = config.hidden_size, {name.removesuffix(".weight") for name in tensors}
        is_eagle3, of_taps = self.kind == "eagle3", self.num_taps * self.target_hidden_size

        def norm(name: str, size: int) -> LlamaRMSNorm | None:
            return LlamaRMSNorm(size, eps=config.rms_norm_eps) if name in given else None

        self.input_norm = norm("input_norm", of_taps)
        self.fc_norm = self.fc = None
        if "fc_norm.0" in given:
            each = self.target_hidden_size
            self.fc_norm = nn.ModuleList(LlamaRMSNorm(each, eps=config.rms_norm_eps) for _ in range(self.num_taps))
        if "fc" in given:
            self.fc = nn.Linear(of_taps if is_eagle3 else self.embedding_size + hidden, hidden)
        self.embedding_layernorm = norm("embedding_layernorm", self.embedding_size)
        self.hidden_states_layernorm = norm("hidden_states_layernorm", hidden)
        layer = Qwen3DecoderLayer if isinstance(config, Qwen3Config) else LlamaDecoderLayer
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        if is_eagle3:
            self.layers[0] = Eagle3Layer(config, self.embedding_size, layout.norm_before_residual)
        elif "layers.0.input_layernorm" not in given:
            self.layers[0] = UnnormedLayer(config, hidden)
        self.final_norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps) if is_eagle3 else norm("final_norm", hidden)
        self.mask_hidden = None
        if self.mask_token_id is not None:
            self.mask_hidden = nn.Parameter(torch.empty(1, 1, of_taps))
        self.embed_tokens = self.lm_head = None
        if "embed_tokens" in given:
            self.embed_tokens = nn.Embedding(len(tensors["embed_tokens.weight"]), self.embedding_size)
        if "lm_head" in given:
            self.lm_head = nn.Linear(hidden, len(tensors["lm_head.weight"]))
        match_biases(self, tensors)
        with torch.device("cpu"):
            self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_buffer("target_ids", layout.target_ids, persistent=False)
        self.largest_id = -1 if layout.target_ids is None else int(layout.target_ids.max())

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        rope_theta: float | None = None,
        layers: Sequence[int] | None = None,
        layer_meaning: Meaning | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "EagleModel":
        """Load a head.

        Args:
            checkpoint: the files, see `read_checkpoint`.
            rope_theta: base of the rotary embedding; None for that of the checkpoint, and 10000 if it names none.
            layers: ids of the layers whose hidden states are the taps; None for those of the checkpoint, and the inputs
                of layers 2, L // 2 and L - 3 if it names none.
            layer_meaning: "input" or "output" of these layers; None decides by the layout, see `Layout`.
            dtype: of the weights; None for that of the file.
            device: None for the CPU.

        Raises:
            ValueError: the head is of another kind, is quantized, or has missing, unknown or misshapen tensors. The
                message names the tensor and the source.
        """
        layers = check_choices("EagleModel", layers, layer_meaning)
        return load_model(cls, layout_of(checkpoint, rope_theta, layers, layer_meaning), dtype, device)

    def extra_repr(self) -> str:
        ids = "final" if self._final_tap else f"{self.layer_ids or 'default'} ({self.layer_meaning})"
        rope = self.config.rope_parameters
        return f"{self.kind}, source={self.source!r}, layers={ids}, rope_theta={rope['rope_theta']}"

    def taps(self, target: PreTrainedModel) -> tuple:
        """The hidden states of the target that `features` takes.

        Raises:
            ValueError: a layer id does not fit the target's number of layers, or the checkpoint names no layers and has
                no default.
        """
        if self._final_tap:
            return ("final",)
        ids, meaning, count = self.layer_ids, self.layer_meaning, num_layers(target)
        if ids is None:
            ids, meaning = (2, count // 2, count - 3), "input"
            if self.num_taps != len(ids) or not ids[0] < ids[1] < ids[2]:
                raise ValueError(
                    f"EagleModel: {self.source} names no layers and takes {self.num_taps} hidden states; the default is"
                    f" 3 of at least 7 layers, and {type(target).__name__} has {count} layers: give layers="
                )
        return named_taps(self, target, ids, meaning)

    def check_target(self, target: PreTrainedModel) -> None:
        """Refuse a target that the head was not made for; see `check_fit`."""
        check_fit(self, target)

    def features(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The features [B, n, H] of verified positions.

        Args:
            states: T tensors [B, n, Ht], the hidden states named by `taps`.
        """
        if self.kind == "eagle":
            return states[0]
        if self.fc_norm is not None:
            states = [norm(each) for norm, each in zip(self.fc_norm, states, strict=True)]
        joint = torch.cat(tuple(states), dim=-1)
        if self.input_norm is not None:
            joint = self.input_norm(joint)
        return joint if self.fc is None else self.fc(joint)

    @property
    def mask_feature(self) -> torch.Tensor | None:
        """The feature [1, 1, H] of P-EAGLE's mask rows; None for other heads."""
        if self.mask_hidden is None:
            return None
        return self.features(self.mask_hidden.split(self.target_hidden_size, dim=-1))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers.

        Args:
            inputs_embeds: [B, N, E]. Embeddings of the tokens t_{i+1}.
            features: [B, N, H]. Those of the positions i.
            position_ids: [B, N] int64. i, counted from 0 at each sequence's first token.
            attention_mask: 0 for padding, [B, cached + N]; or a packed tree; or None.
            use_cache: passed to the layers.
            kwargs: the cache, named `forward.versions.CACHE`. Arguments of other models are not read.

        Returns:
            `last_hidden_state` [B, N, H]: the features of the drafted tokens, and the argument of `logits_input`.
        """
        cache = kwargs.get(CACHE)
        if self.embedding_layernorm is not None:
            inputs_embeds = self.embedding_layernorm(inputs_embeds)
        if self.hidden_states_layernorm is not None:
            features = self.hidden_states_layernorm(features)
        masks = {}
        for window in set(self._windows):
            mask_of = create_sliding_window_causal_mask if window else create_causal_mask
            masks[window] = mask_of(self.config, features, attention_mask, position_ids=position_ids, **{CACHE: cache})
        arguments = {
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(features, position_ids),
            "use_cache": use_cache,
            CACHE: cache,
        }
        stream = features
        if self.kind == "eagle":
            stream = self.fc(torch.cat((inputs_embeds, features), dim=-1))
        for layer, window in zip(self.layers, self._windows, strict=True):
            more = {"attention_mask": masks[window]}
            if window and not isinstance(self.config, Qwen3Config):  # Qwen3's attention passes its window itself
                more["sliding_window"] = window
            if isinstance(layer, Eagle3Layer):
                more["inputs_embeds"] = inputs_embeds
            stream = layer(stream, **more, **arguments)
        if self.norm_output:
            stream = self.final_norm(stream)
        return BaseModelOutputWithPast(last_hidden_state=stream, **{CACHE: cache})

    def logits_input(self, states: torch.Tensor) -> torch.Tensor:
        """The input [B, n, H] of the output layer.

        Args:
            states: [B, n, H]. `last_hidden_state` of `forward`.
        """
        return states if self.final_norm is None or self.norm_output else self.final_norm(states)
