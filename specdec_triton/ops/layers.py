"""The ops of fused decoder layers: RMSNorm with the residual, rotary embedding with the cache writes, and the gated
activation. See `ops` for the rules of all ops.

Every op computes what transformers' modules compute, with the same casts between the operations. Its reference equals
them bit for bit. Its kernel rounds at the same places; it differs only by the order of sums and by the approximation of
exponentials and square roots, as each docstring says.

Letters: B sequences, N tree nodes, Hq/Hkv query/key-value heads, D head dim of keys, Dv of values, S cache slots, R
rotated dims, C hidden size, I intermediate size.
"""

import torch

from . import layers_reference
from .arguments import FLOAT_DTYPES, Check, typed
from .layers_reference import ACTIVATIONS, NORM_STYLES
from .registry import register, resolve


def _check_style(op: str, style: str) -> None:
    if style not in NORM_STYLES:
        raise ValueError(f"{op}: style must be one of {', '.join(NORM_STYLES)}, got {style!r}")


@typed
def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    style: str = "cast_first",
    residual: torch.Tensor | None = None,
    multiplier: float = 1.0,
    update_weight: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """RMSNorm of the residual stream after an update was added to it.

        update = hidden, or norm(hidden, update_weight)
        summed = residual + multiplier * update
        normed = norm(summed, weight)

    norm(x, w) is x / sqrt(mean(x²) + eps) in fp32, times w. Each result is rounded to the dtype of `hidden` before it
    is used further: the inner norm, the product with the multiplier, and the sum. Source of the method: Zhang and
    Sennrich 2019.

    The kernel is one launch. It sums in another order. A norm is therefore within one unit in the last place of bf16 or
    fp16 of the reference's, and within eight in fp32. With style "cast_first" it is within two in bf16 or fp16, because
    the product with the weight may double a difference. `summed` is bit-equal to the reference's. With an
    `update_weight`, the norm of the update is within the bound, `summed` is exact for that update, and `normed` is
    within the bound for that sum.

    Strides: any. `hidden` and `residual` are read in place if their rows are contiguous.

    Args:
        hidden: [B, N, C] fp32, bf16 or fp16. The update of the residual stream, or the stream if there is no residual.
        weight: [C], same dtype. None: `normed` is not computed, which needs a residual.
        eps: added to the mean of squares.
        style: the place of the cast to the dtype of `hidden` and of the weight. "cast_first": w * cast(x̂), as Llama.
            "cast_last": cast(w * x̂), as OLMo 2. "one_plus": cast((1 + w) * x̂), as Gemma.
        residual: [B, N, C], same dtype. None: the stream is `hidden`.
        multiplier: factor of the update (Granite). 1 without a residual.
        update_weight: [C], same dtype. The update is normed by it first (Gemma 2 and 3, OLMo 2). None without a
            residual.
        impl: None, "triton" or "reference".

    Returns:
        normed [B, N, C], or None without a weight; and summed [B, N, C], which is `hidden` itself without a residual.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "rms_norm"
    check = Check(op)
    check("hidden", hidden, "B, N, C", *FLOAT_DTYPES)
    for name, tensor, shape in (
        ("weight", weight, "C"),
        ("residual", residual, "B, N, C"),
        ("update_weight", update_weight, "C"),
    ):
        if tensor is not None:
            check(name, tensor, shape, hidden.dtype)
    _check_style(op, style)
    if residual is None and (weight is None or update_weight is not None or multiplier != 1.0):
        raise ValueError(
            f"{op}: residual must be given without a weight, with an update_weight or with a multiplier, got None"
        )
    compute = resolve(op, impl, hidden.device)
    normed, summed = compute(hidden, weight, eps, style, residual, multiplier, update_weight)
    return None if weight is None else normed, hidden if residual is None else summed


@typed
def rotary_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    style: str = "cast_first",
    impl: str | None = None,
) -> torch.Tensor:
    """Rotary embedding of queries and keys, and the write of keys and values to their cache slots.

    Queries and keys are first normed over the head dim if there are weights for it (Qwen3, Gemma 3), see `rms_norm`.
    Of each head, the first R dims are rotated, the others pass: y = x * cos + x' * sin, where x' holds the negated
    partner of each dim of the first half and the partner of each dim of the second. Source of the method: Su et al.
    2021.

    Products and sums are rounded as in transformers: to the dtype of the query if cos and sin have that dtype, and to
    fp32 if they are fp32, with one cast at the end.

    The kernel is one launch. Without norms it is bit-equal to the reference. With them, the normed numbers are within
    one unit in the last place of bf16 or fp16 (two with "cast_first", which rounds twice), and within eight in fp32;
    their rotation rounds like the reference's.

    Strides: any. Query, key and value are read in place if their last dimension is contiguous. `keys` and `values` are
    written in place; their last dimension must be contiguous.

    Args:
        query: [B, N, Hq, D] fp32, bf16 or fp16.
        key: [B, N, Hkv, D], same dtype.
        value: [B, N, Hkv, Dv], same dtype.
        cos, sin: [B, N, R] or [1, N, R], the query's dtype or fp32, R even and at most D.
        keys: [B, Hkv, S, D], same dtype. The layer's keys in the cache, changed in place.
        values: [B, Hkv, S, Dv], same dtype. The layer's values, changed in place.
        slots: [B, N] int64. Slot of each node, 0 to S - 1, which is not checked because slots are only read on the
            device. The slots of a sequence must differ from each other.
        interleaved: False: dim d of the first half is rotated with dim d + R/2, by cos[d] and cos[d + R/2] (Llama).
            True: dims 2d and 2d + 1 are rotated with each other, both by cos[d] (GLM).
        query_norm, key_norm: [D], the query's dtype. Weights of the norms over the head dim; None for no norm.
        eps, style: of these norms, see `rms_norm`.
        impl: None, "triton" or "reference".

    Returns:
        The rotated query [B, N, Hq, D], contiguous.

    Raises:
        ValueError: a shape, dtype, device, stride or option differs from the above.
    """
    op = "rotary_and_cache"
    check = Check(op)
    batch, nodes, _, head_dim = check("query", query, "B, N, Hq, D", *FLOAT_DTYPES)
    check("key", key, "B, N, Hkv, D", query.dtype)
    check("value", value, "B, N, Hkv, Dv", query.dtype)
    cos, sin = (
        part.expand(batch, -1, -1) if part.dim() == 3 and part.shape[0] == 1 < batch else part for part in (cos, sin)
    )
    *_, rotated = check("cos", cos, "B, N, R", *{query.dtype: None, torch.float32: None})
    check("sin", sin, "B, N, R", cos.dtype)
    if rotated % 2 or rotated > head_dim:
        raise check.refusal("cos", f"[{batch}, {nodes}, R] with R even and at most {head_dim}", cos)
    check("keys", keys, "B, Hkv, S, D", query.dtype)
    check("values", values, "B, Hkv, S, Dv", query.dtype)
    for name, plane in (("keys", keys), ("values", values)):
        if plane.stride(3) != 1 and plane.shape[3] > 1:
            raise check.refusal(name, "a tensor whose last dimension is contiguous", plane)
    check("slots", slots, "B, N", torch.int64)
    if not isinstance(interleaved, bool):
        raise ValueError(f"{op}: interleaved must be True or False, got {interleaved!r}")
    for name, weight in (("query_norm", query_norm), ("key_norm", key_norm)):
        if weight is not None:
            check(name, weight, "D", query.dtype)
    _check_style(op, style)
    compute = resolve(op, impl, query.device)
    cache = keys, values, slots
    return compute(query, key, value, cos, sin, *cache, interleaved, query_norm, key_norm, eps, style)


@typed
def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, *, activation: str = "silu", impl: str | None = None
) -> torch.Tensor:
    """The gated activation of a decoder's MLP: activation(gate) * up. SwiGLU with "silu", GEGLU with "gelu" and
    "gelu_tanh" (Shazeer 2020).

    The activation is computed in fp32 and rounded to the dtype of `gate` before the product, as in transformers. The
    kernel is one launch. Its results are within two units in the last place of bf16 or fp16, and within eight in fp32,
    because its exponential is another approximation. With "gelu" and "gelu_tanh" they may also differ by
    2^-21 * |gate * up|, because PyTorch's 1 + erf and 1 + tanh cancel if the gate is negative.

    Strides: any. The tensors are read in place if their last dimension is contiguous, such as the halves of a joint
    product.

    Args:
        gate: [B, N, I] fp32, bf16 or fp16.
        up: [B, N, I], same dtype.
        activation: "silu", "gelu" (by erf), or "gelu_tanh".
        impl: None, "triton" or "reference".

    Returns:
        [B, N, I], same dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, device or option differs from the above.
    """
    op = "gated_activation"
    check = Check(op)
    check("gate", gate, "B, N, I", *FLOAT_DTYPES)
    check("up", up, "B, N, I", gate.dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return resolve(op, impl, gate.device)(gate, up, activation)


def _fake_rms_norm(hidden, weight, eps, style, residual, multiplier, update_weight):
    sizes = [(0,) if missing is None else hidden.shape for missing in (weight, residual)]
    return tuple(hidden.new_empty(size) for size in sizes)


def _fake_rotary_and_cache(query, *others):
    return query.new_empty(query.shape)


def _fake_gated_activation(gate, up, activation):
    return gate.new_empty(gate.shape)


register(
    "rms_norm(Tensor hidden, Tensor? weight, float eps, str style, Tensor? residual, float multiplier, "
    "Tensor? update_weight) -> (Tensor normed, Tensor summed)",
    _fake_rms_norm,
    layers_reference,
)
register(
    "rotary_and_cache(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor slots, bool interleaved, Tensor? query_norm, Tensor? key_norm, float eps, str style) "
    "-> Tensor",
    _fake_rotary_and_cache,
    layers_reference,
)
register(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor",
    _fake_gated_activation,
    layers_reference,
)
