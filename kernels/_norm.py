"""RMSNorm in Triton: its statistics, its scaling, and the casts between fp32 and a model's dtype.

Reference: `specdec_triton.ops.layers_reference`.
"""

import triton
import triton.language as tl

from ._launch import INTERPRETED


@triton.jit
def exact(values):
    """The values in fp32. Triton's interpreter converts subnormal bf16 numbers wrongly, so it shifts their bits."""
    if INTERPRETED and values.dtype == tl.bfloat16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """fp32 values in `dtype`, rounded to the nearest number and, in a tie, to the even one.

    Triton's interpreter truncates when it casts to bf16, so it adds just below half a unit to the bits first, and
    another one if the number below is odd. NaN must not become infinite by that.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values != values, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def inverse_rms(total, count, eps):
    """1 / sqrt(total / count + eps), where `total` is a sum of `count` squares."""
    return tl.rsqrt(tl.div_rn(total, tl.cast(count, tl.float32)) + eps)


@triton.jit
def scaled(values, inverse, weight, style: tl.constexpr):
    """fp32 values times `inverse` and the weight, rounded to the dtype of the weight."""
    values = values * inverse
    if style == "cast_first":
        values = exact(rounded(values, weight.dtype)) * exact(weight)
    elif style == "cast_last":
        values = values * exact(weight)
    else:
        values = values * (1.0 + exact(weight))
    return rounded(values, weight.dtype)
