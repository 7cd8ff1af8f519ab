"""Forwards of decoder layers in few kernels. `fusion` gives them to copies of a model's modules.

Each function replaces the forward of a module whose source is known, see `known_forwards`. It computes the same with
the same roundings; `ops.layers` says where a kernel may differ in the last place. Linear layers are called as modules,
so quantized layers and adapters stay as they are.

Letters: B sequences, N tree nodes, C hidden size, D head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from .cache import TreeCache
from .known_forwards import Attention, GatedMLP, Layer, Rotary
from .versions import CACHE

OLD_CACHE = "past_key_values"  # since transformers 5.24, a deprecated name of the argument `CACHE`
CACHES = {CACHE, OLD_CACHE}


@dataclass(frozen=True)
class FusedNorm:
    """An RMSNorm: its weight, read from the module at each call, and its constants."""

    module: nn.Module
    style: str
    eps: float


class Handover:
    """The norm of a layer's output. The last kernel of a layer adds the update to the residual stream and also computes
    the norm that the next layer begins with. The layer returns the stream, as the model expects it, and leaves the
    norm here. The next layer takes it if its input is that very tensor, unchanged, and its norm is that very module."""

    def __init__(self) -> None:
        self._stream: torch.Tensor | None = None
        self._norm: FusedNorm | None = None
        self._normed: torch.Tensor | None = None
        self._version = 0

    def leave(self, stream: torch.Tensor, norm: FusedNorm, normed: torch.Tensor) -> None:
        self._stream, self._norm, self._normed, self._version = stream, norm, normed, _version(stream)

    def take(self, stream: torch.Tensor, norm: FusedNorm) -> torch.Tensor | None:
        """The norm of `stream`, or None if it was not left here."""
        fits = self._stream is stream and self._norm is norm and self._version == _version(stream)
        normed = self._normed if fits else None
        self._stream = self._norm = self._normed = None
        return normed


def _version(tensor: torch.Tensor) -> int:
    """The number of changes in place. In inference mode and in compiled code, tensors do not count them."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


@dataclass
class NormPart:
    """Data of a fused norm.

    Attributes:
        impl: implementation of the ops, here and in the other parts.
        norm: the norm.
        handover: given to the final norm of a model, which may find its result there.
    """

    impl: str | None
    norm: FusedNorm
    handover: Handover | None = None


@dataclass
class MLPPart:
    """Data of a fused MLP.

    Attributes:
        activation: see `ops.gated_activation`.
    """

    impl: str | None
    spec: GatedMLP
    activation: str


@dataclass
class AttentionPart:
    """Data of a fused attention.

    Attributes:
        norms: those of queries and keys over the head dim; None if there are none.
        options: arguments of the attention function.
    """

    impl: str | None
    spec: Attention
    rotary: Rotary
    norms: tuple[FusedNorm, FusedNorm] | None
    options: dict[str, Any]


@dataclass
class LayerPart:
    """Data of a fused layer.

    Attributes:
        norms: in the order of `known_forwards.Layer.norms`.
        multiplier: the factor of both updates.
        handover: shared by all layers and the final norm.
        following: the norm after the layer, which its last kernel computes; None if it computes the sum alone.
    """

    impl: str | None
    spec: Layer
    norms: tuple[FusedNorm | None, ...]
    multiplier: float
    handover: Handover
    following: FusedNorm | None = None


def norm_forward(module: nn.Module, *inputs: Any, **named: Any) -> torch.Tensor:
    part: NormPart = module.fused_part
    if not _fits(inputs, named, part.norm):
        return super(type(module), module).forward(*inputs, **named)
    (hidden_states,) = inputs
    normed = part.handover and part.handover.take(hidden_states, part.norm)
    return _normed(hidden_states, part.norm, part.impl) if normed is None else normed


def _fits(inputs: tuple, named: dict, norm: FusedNorm | None = None) -> bool:
    """True if the arguments are one tensor that the ops take. Otherwise the forward of the class runs."""
    if named or len(inputs) != 1 or not inputs[0].numel():
        return False
    return inputs[0].dtype == norm.module.weight.dtype if norm else inputs[0].dtype in ops.FLOAT_DTYPES


def _normed(hidden: torch.Tensor, norm: FusedNorm, impl: str | None) -> torch.Tensor:
    normed, _ = ops.rms_norm(_rows(hidden), norm.module.weight, eps=norm.eps, style=norm.style, impl=impl)
    return normed.view(hidden.shape)


def _rows(states: torch.Tensor) -> torch.Tensor:
    """[B, N, C] for states [B, N, C], or [1, rows, C] for states with other leading dimensions."""
    return states if states.dim() == 3 else states.reshape(1, -1, states.shape[-1])


def mlp_forward(module: nn.Module, *inputs: Any, **named: Any) -> torch.Tensor:
    part: MLPPart = module.fused_part
    if not _fits(inputs, named):
        return super(type(module), module).forward(*inputs, **named)
    (hidden_states,) = inputs
    if part.spec.joint:
        gate, up = getattr(module, part.spec.joint)(hidden_states).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
    gated = ops.gated_activation(_rows(gate), _rows(up), activation=part.activation, impl=part.impl)
    return module.down_proj(gated.view(gate.shape))


def attention_forward(module: nn.Module, *inputs: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    part: AttentionPart = module.fused_part
    cache = named.get(CACHE, named.get(OLD_CACHE))
    # torch.compile would copy the whole cache around a kernel that writes to it
    if inputs or not isinstance(cache, TreeCache) or torch.compiler.is_compiling():
        return super(type(module), module).forward(*inputs, **named)
    return _attention(module, part, cache, **{key: value for key, value in named.items() if key not in CACHES})


def _attention(
    module: nn.Module,
    part: AttentionPart,
    cache: TreeCache,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    spec = part.spec
    if spec.joint:
        query, key, value = _split(module, getattr(module, spec.joint)(hidden_states))
    else:
        query, key, value = (getattr(module, name)(hidden_states) for name in ("q_proj", "k_proj", "v_proj"))
    if spec.norms == "projection":
        query, key = module.q_norm(query), module.k_norm(key)
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    query, key, value = query.view(heads), key.view(heads), value.view(heads)
    keys, values = cache.planes(module.layer_idx, key.dtype)
    cos, sin = position_embeddings
    if part.rotary.in_fp32:
        cos, sin = cos.float(), sin.float()
    norms = {}
    if part.norms:
        of_query, of_key = part.norms
        weights = {"query_norm": of_query.module.weight, "key_norm": of_key.module.weight}
        norms = {**weights, "eps": of_query.eps, "style": of_query.style}
    query = ops.rotary_and_cache(
        query,
        key,
        value,
        cos,
        sin,
        keys,
        values,
        cache.written,
        interleaved=part.rotary.interleaved,
        **norms,
        impl=part.impl,
    )
    attention = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    scaling = {"scaling": module.scaling}
    output, _ = attention(
        module, query.transpose(1, 2), keys, values, attention_mask, **scaling, **part.options, **kwargs
    )
    return module.o_proj(output.flatten(2)), None


def _split(module: nn.Module, joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a joint product."""
    of_queries = module.config.num_attention_heads * module.head_dim
    of_keys = (joint.shape[-1] - of_queries) // 2
    return joint.split([of_queries, of_keys, of_keys], dim=-1)


def layer_forward(module: nn.Module, *inputs: Any, **named: Any) -> torch.Tensor:
    part: LayerPart = module.fused_part
    norm = next(norm for norm in part.norms if norm)
    if not _fits(inputs, {}, norm):
        return super(type(module), module).forward(*inputs, **named)
    return _layer(module, part, *inputs, **named)


def _layer(module: nn.Module, part: LayerPart, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    before_attention, after_attention, before_mlp, after_mlp = part.norms
    stream, normed = hidden_states, hidden_states
    if before_attention is not None:
        normed = part.handover.take(stream, before_attention)
        if normed is None:
            normed = _normed(stream, before_attention, part.impl)
    update, _ = module.self_attn(hidden_states=normed, **kwargs)
    normed, stream = _add(part, update, stream, after_attention, before_mlp)
    update = getattr(module, part.spec.mlp)(stream if normed is None else normed)
    normed, stream = _add(part, update, stream, after_mlp, part.following)
    if normed is not None:
        part.handover.leave(stream, part.following, normed)
    return stream


def _add(
    part: LayerPart, update: torch.Tensor, stream: torch.Tensor, inner: FusedNorm | None, outer: FusedNorm | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Add an update, normed by `inner`, to the residual stream. Returns the sum normed by `outer`, or None, and the
    sum."""
    constants = inner or outer
    if constants is None and part.multiplier == 1.0:
        return None, stream + update
    weight = {"update_weight": inner.module.weight} if inner else {}
    return ops.rms_norm(
        update,
        outer.module.weight if outer else None,
        eps=constants.eps if constants else 0.0,
        style=constants.style if constants else "cast_first",
        residual=stream,
        multiplier=part.multiplier,
        **weight,
        impl=part.impl,
    )


FORWARDS = {
    NormPart: norm_forward,
    MLPPart: mlp_forward,
    AttentionPart: attention_forward,
    LayerPart: layer_forward,
}
