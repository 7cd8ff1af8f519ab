"""The gated activation of a decoder's MLP: activation(gate) * up.

There is one launch. A program handles some columns of one row.

Letters: B sequences, N tree nodes, I intermediate size.
Reference: `specdec_triton.ops.layers_reference.gated_activation`.
"""

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, FP_FUSION, CompileCase, abstract, launching_on
from ._norm import exact, rounded

# Columns per program: each thread has one 128-bit load of gate and of up in bf16, two in fp32.
BLOCK_I = 1024
NUM_WARPS = 4

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
# ln 2 in two parts; products of the first, which has 16 bits, with exponents are exact in fp32
LN2_HIGH: tl.constexpr = tl.constexpr(0.693145751953125)
LN2_LOW: tl.constexpr = tl.constexpr(math.log(2) - 0.693145751953125)
SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
# GELU's tanh(u) has u = GELU_SCALE * (x + GELU_CUBIC * x^3)
GELU_SCALE: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))
GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)
# Approximate divisions return 0 if the divisor exceeds 2^126, which is less than the largest exponential. Numerator and
# divisor are therefore multiplied by this.
SHRINK: tl.constexpr = tl.constexpr(2.0**-4)


@triton.jit
def _exp(values):
    """The exponential in fp32 within three units in the last place, from 0 up to infinity.

    `tl.exp` multiplies by log2(e) first. The rounding of that product is an error of 40 units at 80.
    """
    values = tl.minimum(tl.maximum(values, -87.0), 89.0)
    power = tl.floor(values * LOG2E)
    rest = (values - power * LN2_HIGH) - power * LN2_LOW
    half = ((power.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True)  # 2^(power - 1); finite
    return tl.exp2(rest * LOG2E) * half * 2.0


@triton.jit
def _times_sigmoid(values, logits, precise: tl.constexpr):
    """values / (1 + exp(-logits)). If the exponential overflows, finite values become 0 and -inf becomes NaN.

    In 16 bits, the errors of the fast exponential and division do not matter.
    """
    if precise:
        return tl.div_rn(values, 1.0 + _exp(-logits))
    return values * SHRINK / (tl.exp(-logits) * SHRINK + SHRINK)


@triton.jit
def _activated(values, activation: tl.constexpr, precise: tl.constexpr):
    """The activation of fp32 values, in fp32."""
    if activation == "silu":
        return _times_sigmoid(values, values, precise)
    if activation == "gelu":
        return values * 0.5 * (1.0 + tl.erf(values * SQRT_HALF))
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u, which does not cancel if u is negative
    cube = values * values * values
    return _times_sigmoid(values, (values + cube * GELU_CUBIC) * GELU_SCALE * 2.0, precise)


@triton.jit
def _gated_activation_kernel(
    out_ptr,  # [B, N, I], out
    gate_ptr,  # [B, N, I] fp32, bf16 or fp16; rows are contiguous
    up_ptr,  # [B, N, I], same dtype; rows are contiguous
    gate_stride_b,
    gate_stride_n,
    up_stride_b,
    up_stride_n,
    num_columns,  # I
    ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    node, row = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < num_columns
    # lanes after the row are computed and not stored
    gate = tl.load(gate_ptr + row * gate_stride_b + node * gate_stride_n + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride_b + node * up_stride_n + column, mask=inside, other=0.0)
    active = rounded(_activated(exact(gate), ACTIVATION, gate.dtype == tl.float32), gate.dtype)
    out = rounded(exact(active) * exact(up), gate.dtype)
    tl.store(out_ptr + (row * tl.num_programs(0) + node) * num_columns + column, out, mask=inside)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `specdec_triton.ops.gated_activation`, which checks the arguments. Nothing is read on the host.

    Args:
        gate: [B, N, I] fp32, bf16 or fp16. Loads are 128 bits wide if I and the strides of rows are multiples of 16.
        up: [B, N, I], same dtype.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        [B, N, I], same dtype, contiguous.
    """
    batch, nodes, columns = gate.shape
    out = gate.new_empty(gate.shape)
    gate, up = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (gate, up))
    with launching_on(gate):
        _gated_activation_kernel[(nodes, triton.cdiv(columns, BLOCK_I), batch)](
            out, gate, up, *gate.stride()[:2], *up.stride()[:2], columns,
            ACTIVATION=activation, BLOCK_I=BLOCK_I, num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return out


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration; the same on all architectures."""
    for name, dtype in DTYPES.items():
        for activation in ("silu", "gelu", "gelu_tanh"):
            # I = 14336 (Llama 8B); 1001 is odd, so rows are not aligned and loads are narrow
            for kind, columns in (("", 14336), (" odd I", 1001)) if activation == "silu" else (("", 14336),):
                gate = abstract(dtype, 1, 16, columns)
                yield CompileCase(
                    f"{name} {activation}{kind}",
                    _gated_activation_kernel,
                    functools.partial(gated_activation, gate, gate, activation),
                    wide_loads=not kind,
                    tile_bytes=3 * BLOCK_I * dtype.itemsize,
                )
