"""The model of DFlash draft heads (Chen et al. 2026, arXiv 2602.06036).

The head predicts a block of tokens in one forward. Its layers see the text through the target: each position of the
text that the target has run gives a context row, which the head makes from hidden states of the target. The rows of the
block are the last token and mask tokens. A layer computes keys and values of both kinds of rows, but it computes
queries, and passes on, only the rows of the block. The keys and values of context rows are kept, those of the block's
rows are used once.

Letters: B sequences, R context rows, n rows of the block, H hidden size of the head, Ht of the target, T nodes of a
packed tree, W words of its bits, DV tokens that the head can name.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from ..forward.versions import CACHE
from ..ops.reference import TREE_FIELDS, pack_bits
from .checkpoint import Checkpoint
from .dflash_layouts import DFlashLayout, dflash_layout_of
from .reader import Meaning, check_choices, check_tensors, load_model, match_biases
from .target import check_fit, named_taps, num_layers


class PartialRotaryAttention(Qwen3Attention):
    """Attention of Qwen 3 whose rotary embedding changes only the first elements of each head, as in MiMo."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The update of rows [B, N, H]. Arguments are those of `Qwen3Attention`, with fewer cosines and sines."""
        heads = *hidden_states.shape[:-1], -1, self.head_dim
        cache, count = kwargs.pop(CACHE), hidden_states.shape[1]
        queries = _rotated(self.q_norm(self.q_proj(hidden_states).view(heads)), position_embeddings)
        keys, values = write(self, hidden_states, position_embeddings, cache)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        options = {"scaling": self.scaling, "sliding_window": self.sliding_window, **kwargs}
        attended, _ = attend(self, queries, keys, values, attention_mask, **options)
        return self.o_proj(attended.view(len(attended), count, -1)), None


class BlockLayer(nn.Module):
    """A decoder layer over the rows of a block. The context rows do not pass its norms.

    The attention is that of Qwen 3 over context rows and block, so that it runs fused. The results at context rows,
    which are few, are dropped.

    Args:
        layout: the head.
        layer_idx: number of the layer.
    """

    def __init__(self, layout: DFlashLayout, layer_idx: int):
        super().__init__()
        config = layout.config
        is_partial = layout.rotary_size < config.head_dim
        self.self_attn = (PartialRotaryAttention if is_partial else Qwen3Attention)(config, layer_idx)
        self.self_attn.sliding_window, self.value_scale = layout.windows[layer_idx], layout.value_scale
        sinks = nn.Parameter(torch.empty(config.num_attention_heads)) if layout.has_sinks else None
        self.self_attn.register_parameter("attention_sink_bias", sinks)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, stream: torch.Tensor, features: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The residual stream after the layer.

        Args:
            stream: [B, n, H]. The residual stream of the block's rows.
            features: [B, R, H]. The context rows.
            arguments: those of the attention. The cosines and sines [B, R + n, D] are those of the context rows and
                then of the block.

        Returns:
            [B, n, H].
        """
        rows = torch.cat((features, self.input_layernorm(stream)), dim=1)
        if (sinks := self.self_attn.attention_sink_bias) is not None:
            arguments["s_aux"] = sinks
        update = self.self_attn(hidden_states=rows, **arguments)[0][:, features.shape[1] :]
        if self.value_scale != 1:  # the attention is linear in the values, and its output has no bias
            update = update * self.value_scale
        stream = stream + update
        return stream + self.mlp(self.post_attention_layernorm(stream))


def write(
    attention: Qwen3Attention, rows: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: Cache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write keys and values of rows [B, N, H] to a cache. Cosines and sines are [B, N, D]. Returns the keys and values
    that the layer sees."""
    heads = *rows.shape[:-1], -1, attention.head_dim
    keys = _rotated(attention.k_norm(attention.k_proj(rows).view(heads)), position_embeddings)
    values = attention.v_proj(rows).view(heads).transpose(1, 2)
    return cache.update(keys, values, attention.layer_idx)


class DFlashModel(PreTrainedModel):
    """The layers of a DFlash head. It is not tied to a target.

    Args:
        layout: the head. Its tensors are not read, only their names and shapes; `from_checkpoint` loads them.

    Attributes:
        config: of the layers; `hidden_size` is H.
        source: see `Checkpoint`.
        block_size, mask_token_id, layer_ids, layer_meaning, target_hidden_size: see `DFlashLayout`.
        causal: see `DFlashLayout`.
        num_drafted: number of tokens that a block predicts.
        target_ids: [DV] int64. The target's id of each token that the head can name; None if they are the target's.
        embed_tokens: the head's own embedding; None if that of the target is to be used.
        mask_embedding: [H]. The embedding of the mask token; None if it is in the table of all tokens.
        lm_head: the head's own output layer; None if that of the target is to be used.
    """

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    target_ids: torch.Tensor | None

    def __init__(self, layout: DFlashLayout):
        config, tensors = layout.config, layout.tensors
        super().__init__(config)
        self.source, self.block_size, self.mask_token_id = layout.source, layout.block_size, layout.mask_token_id
        self.layer_ids, self.layer_meaning = layout.layer_ids, layout.layer_meaning
        self.target_hidden_size, self.num_taps = layout.target_hidden_size, layout.num_taps
        self.embedding_size = hidden = config.hidden_size
        self.causal, self._first = layout.causal, int(not layout.first_predicts)
        self.num_drafted = self.block_size - self._first
        self.fc = nn.Linear(self.num_taps * self.target_hidden_size, hidden)
        self.hidden_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(layout, index) for index in range(config.num_hidden_layers))
        self.final_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.embed_tokens = self.lm_head = None
        if "embed_tokens.weight" in tensors:
            self.embed_tokens = nn.Embedding(len(tensors["embed_tokens.weight"]), hidden)
        mask = nn.Parameter(torch.empty(hidden)) if "mask_embedding" in tensors else None
        self.register_parameter("mask_embedding", mask)
        if "lm_head.weight" in tensors:
            self.lm_head = nn.Linear(hidden, len(tensors["lm_head.weight"]))
        match_biases(self, tensors)
        rotary = copy.copy(config)
        rotary.head_dim = layout.rotary_size
        with torch.device("cpu"):
            self.rotary_emb = Qwen3RotaryEmbedding(rotary)
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
    ) -> "DFlashModel":
        """Load a head.

        Args:
            checkpoint: the files, see `read_checkpoint`.
            rope_theta: base of the rotary embedding; None for that of the checkpoint, and 10000 if it names none.
            layers: ids of the layers whose hidden states are the taps; None for those of the checkpoint, and z-lab's
                default if it names none, see `taps`.
            layer_meaning: "input" or "output" of these layers; None decides by the layout.
            dtype: of the weights; None for that of the file.
            device: None for the CPU.

        Raises:
            ValueError: the head is of another kind, is quantized, has missing, unknown or misshapen tensors, or has
                options that are not supported. The message names the tensor or the option, and the source.
        """
        layers = check_choices("DFlashModel", layers, layer_meaning)
        return load_model(cls, dflash_layout_of(checkpoint, rope_theta, layers, layer_meaning), dtype, device)

    @classmethod
    def from_assistant(cls, model: PreTrainedModel) -> "DFlashModel":
        """The head in a `MuseGlimmerAssistantModel` of transformers. It shares the parameters of that model.

        Raises:
            ValueError: the model is of another class, is quantized, or was changed; the message names a parameter.
        """
        source = model.name_or_path or type(model).__name__
        layout = dflash_layout_of(Checkpoint(source, model.config.to_dict(), dict(model.named_parameters())))
        with torch.device("meta"):
            head = cls(layout)
        check_tensors(layout, head)
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(layout.tensors[name].requires_grad)  # loading sets that of the other model
        head.load_state_dict(layout.tensors, assign=True)
        head.rotary_emb.to(model.device)
        return head.eval()

    def extra_repr(self) -> str:
        ids, base = f"{self.layer_ids or 'default'} ({self.layer_meaning})", self.config.rope_parameters["rope_theta"]
        return f"source={self.source!r}, block_size={self.block_size}, layers={ids}, rope_theta={base}"

    def taps(self, target: PreTrainedModel) -> tuple:
        """The hidden states of the target that `features` takes. z-lab's default are the outputs of layers at equal
        distances, from the second to the last but two, or of the middle one.

        Raises:
            ValueError: a layer id does not fit the target's number of layers.
        """
        if self.layer_ids is not None:
            return named_taps(self, target, self.layer_ids, self.layer_meaning)
        count, steps = num_layers(target), self.num_taps - 1
        span = count - 4  # from layer 1 to layer count - 3
        if span < steps:
            raise ValueError(
                f"DFlashModel: {self.source} names no layers and takes {self.num_taps} hidden states; the default is "
                f"for at least {steps + 4} layers, and {type(target).__name__} has {count}: give layers="
            )
        ids = [round(1 + tap * span / steps) for tap in range(self.num_taps)] if steps else [count // 2]
        return named_taps(self, target, ids, "output")

    def check_target(self, target: PreTrainedModel) -> None:
        """Refuse a target that the head was not made for; see `check_fit`."""
        check_fit(self, target)

    def features(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The context rows [B, R, H] of positions that the target has run.

        Args:
            states: tensors [B, R, Ht], the hidden states named by `taps`.
        """
        return self.hidden_norm(self.fc(torch.cat(tuple(states), dim=-1)))

    def embedded(self, target: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
        """The rows [B, n, H] of a block. A scale of the target's embedding is applied, as by z-lab's code; the norm of
        Muse's is not, as by transformers.

        Args:
            target: the model that the head drafts for.
            tokens: [B, n] int64.
        """
        if self.embed_tokens is not None:
            embeds = self.embed_tokens(tokens.clamp(max=self.embed_tokens.num_embeddings - 1))
        else:
            table = target.get_input_embeddings()
            embeds = functional.embedding(tokens, table.weight) if hasattr(table, "embed_norm") else table(tokens)
        if self.mask_embedding is None:
            return embeds
        return torch.where((tokens == self.mask_token_id)[..., None], self.mask_embedding, embeds)

    def forward(
        self,
        features: torch.Tensor,
        position_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers over a block. Keys and values of context rows and then of the block's rows go to the cache.

        Args:
            features: [B, R, H]. The context rows that are not in the cache.
            position_ids: [B, R + n] int64. Positions of the context rows and of the block's rows, counted from 0 at
                each sequence's first token.
            inputs_embeds: [B, n, H]. The block's rows. None runs no block: `position_ids` is [B, R], and only keys and
                values are written.
            attention_mask: [B, 1, T, W + 3] int64. A packed tree whose last n nodes are the rows of the block, which
                see each other. Layers that are causal in the block do not look at later nodes. Not read without a
                block.
            use_cache: not read; the keys and values are always kept.
            kwargs: the cache, named `forward.versions.CACHE`. Arguments of other models are not read.

        Returns:
            `last_hidden_state` [B, n, H], the argument of `logits_input`; None without a block.

        Raises:
            ValueError: a block has no packed tree.
        """
        cache, position_embeddings = kwargs[CACHE], self.rotary_emb(features, position_ids)
        if inputs_embeds is None:
            for layer in self.layers:
                write(layer.self_attn, features, position_embeddings, cache)
            return BaseModelOutputWithPast(last_hidden_state=None, **{CACHE: cache})
        if attention_mask is None or attention_mask.dim() != 4 or attention_mask.dtype != torch.int64:
            got = None if attention_mask is None else f"{attention_mask.dtype} {list(attention_mask.shape)}"
            raise ValueError(
                "DFlashModel: attention_mask must be a packed tree, torch.int64 [B, 1, T, W + 3], for a block, got "
                f"{got}"
            )
        masks = {False: attention_mask}
        if any(self.causal):
            masks[True] = _without_later_nodes(attention_mask)
        stream, arguments = inputs_embeds, {"position_embeddings": position_embeddings, CACHE: cache}
        for layer, causal in zip(self.layers, self.causal, strict=True):
            stream = layer(stream, features, attention_mask=masks[causal], **arguments)
        return BaseModelOutputWithPast(last_hidden_state=stream, **{CACHE: cache})

    def logits_input(self, states: torch.Tensor) -> torch.Tensor:
        """The input of the output layer: the normed states [B, num_drafted, H] of the rows that predict the next token,
        the one after it, and so on.

        Args:
            states: [B, n, H]. `last_hidden_state` of `forward`.
        """
        return self.final_norm(states[:, self._first :])


def _rotated(heads: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The rotary embedding of the first D elements of queries or keys [B, N, heads, C], by cosines and sines [B, N, D].
    Returns [B, heads, N, C]."""
    cos, sin = (each[:, None] for each in position_embeddings)
    turned, rest = heads.transpose(1, 2).tensor_split((cos.shape[-1],), dim=-1)
    turned = turned * cos + rotate_half(turned) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _without_later_nodes(packed_tree: torch.Tensor) -> torch.Tensor:
    """A packed tree [B, 1, T, W + 3] in which no node sees nodes after it."""
    nodes = packed_tree.shape[2]
    earlier = pack_bits(torch.ones(nodes, nodes, dtype=torch.bool, device=packed_tree.device).tril())
    return packed_tree & functional.pad(earlier, (0, TREE_FIELDS), value=-1)
