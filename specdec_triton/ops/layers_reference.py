"""PyTorch references of the ops in `layers`. They run the same operations and casts, in the same order, as the modules
of transformers, so their results are equal bit for bit.

Letters: B sequences, N tree nodes, Hq/Hkv query/key-value heads, D head dim of keys, Dv of values, S cache slots, R
rotated dims, C hidden size.
"""

import torch
from torch.nn import functional

NORM_STYLES = ("cast_first", "cast_last", "one_plus")
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda hidden: functional.gelu(hidden, approximate="tanh"),
}


def _normed(hidden: torch.Tensor, weight: torch.Tensor, eps: float, style: str) -> torch.Tensor:
    exact = hidden.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if style == "cast_first":
        return weight * exact.to(hidden.dtype)
    return (exact * (weight.float() if style == "cast_last" else 1.0 + weight.float())).to(hidden.dtype)


def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    style: str,
    residual: torch.Tensor | None = None,
    multiplier: float = 1.0,
    update_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.rms_norm`. An output that was not asked for is empty."""
    if update_weight is not None:
        hidden = _normed(hidden, update_weight, eps, style)
    if multiplier != 1.0:
        hidden = hidden * multiplier
    nothing = hidden.new_empty(0)
    if residual is None:
        return _normed(hidden, weight, eps, style), nothing
    summed = residual + hidden
    return nothing if weight is None else _normed(summed, weight, eps, style), summed


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first R dims of `states` [B, N, H, D]; cos and sin are [B, N, R]."""
    rotated_dims = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, passed = states[..., :rotated_dims], states[..., rotated_dims:]
    if interleaved:
        cos, sin = (part[..., : rotated_dims // 2].repeat_interleave(2, dim=-1) for part in (cos, sin))
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    turned = (turned * cos + partner * sin).to(states.dtype)
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


def rotary_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    style: str = "cast_first",
) -> torch.Tensor:
    """See `ops.rotary_and_cache`."""
    if query_norm is not None:
        query = _normed(query, query_norm, eps, style)
    if key_norm is not None:
        key = _normed(key, key_norm, eps, style)
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    keys[rows, :, slots] = _rotated(key, cos, sin, interleaved)
    values[rows, :, slots] = value
    return _rotated(query, cos, sin, interleaved).contiguous()


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `ops.gated_activation`."""
    return ACTIVATIONS[activation](gate) * up
