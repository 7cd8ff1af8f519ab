"""RMSNorm of the residual stream after an update was added to it.

There is one launch, with one program per row. If the row has at most `MAX_BLOCK_C` columns, the program holds it
in registers and reads it once. Longer rows are read in loops: one for each sum of squares, and one for the output.

Letters: B sequences, N tree nodes, C hidden size. Reference: `specdec_triton.ops.layers_reference.rms_norm`.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, CompileCase, abstract, contiguous, launching_on, pow2
from ._norm import exact, inverse_rms, rounded, scaled

# Columns that a program holds; longer rows are read in steps of as many. Chosen by compile reports: with twice as many,
# a row with two norms spills in fp32, and in bf16 if its loads are narrow.
MAX_BLOCK_C = 8192
# Columns per thread: one 128-bit load of bf16, or two of fp32. With few rows, the time of a launch is the latency of
# its loads, so that a row is spread over many threads. Not timed.
THREAD_C = 8
# Without it, the compiler limits loops to 32 registers, and some spill.
LOOP_OPTIONS = {"maxnreg": 64}


@triton.jit
def _summed(stream, residual, multiplier):
    """residual + multiplier * stream, rounded after the product and after the sum."""
    product = rounded(exact(stream) * multiplier, residual.dtype)
    return rounded(exact(residual) + exact(product), residual.dtype)


@triton.jit
def _rms_norm_kernel(
    normed_ptr,  # [B, N, C], out, or None without a weight
    summed_ptr,  # [B, N, C], out, or None without a residual
    hidden_ptr,  # [B, N, C] fp32, bf16 or fp16; rows are contiguous
    residual_ptr,  # [B, N, C], same dtype, or None; rows are contiguous
    weight_ptr,  # [C], same dtype, or None
    update_weight_ptr,  # [C], same dtype, or None
    hidden_stride_b,
    hidden_stride_n,
    residual_stride_b,
    residual_stride_n,
    multiplier,
    eps,
    C,
    STYLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_C >= C
):
    node, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    hidden_ptr += row * hidden_stride_b + node * hidden_stride_n
    if residual_ptr is not None:
        residual_ptr += row * residual_stride_b + node * residual_stride_n
        summed_ptr += (row * tl.num_programs(0) + node) * C
    if weight_ptr is not None:
        normed_ptr += (row * tl.num_programs(0) + node) * C
    column = tl.arange(0, BLOCK_C)
    # lanes after the row are 0 and add nothing to the sums of squares
    if WHOLE:
        inside = column < C
        # all loads come first, so that the launch waits for memory once
        stream = tl.load(hidden_ptr + column, mask=inside, other=0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + column, mask=inside, other=0.0)
        if update_weight_ptr is not None:
            update_weight = tl.load(update_weight_ptr + column, mask=inside, other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        if update_weight_ptr is not None:
            update = exact(stream)
            stream = scaled(update, inverse_rms(tl.sum(update * update, 0), C, eps), update_weight, STYLE)
        if residual_ptr is not None:
            stream = _summed(stream, residual, multiplier)
            tl.store(summed_ptr + column, stream, mask=inside)
        if weight_ptr is not None:
            values = exact(stream)
            inverse = inverse_rms(tl.sum(values * values, 0), C, eps)
            tl.store(normed_ptr + column, scaled(values, inverse, weight, STYLE), mask=inside)
    else:
        inner = 0.0
        if update_weight_ptr is not None:
            squares = tl.zeros([BLOCK_C], tl.float32)
            for first in range(0, C, BLOCK_C):
                update = exact(tl.load(hidden_ptr + first + column, mask=first + column < C, other=0.0))
                squares += update * update
            inner = inverse_rms(tl.sum(squares, 0), C, eps)
        squares = tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, C, BLOCK_C):
            place = first + column
            stream = tl.load(hidden_ptr + place, mask=place < C, other=0.0)
            if update_weight_ptr is not None:
                update_weight = tl.load(update_weight_ptr + place, mask=place < C, other=0.0)
                stream = scaled(exact(stream), inner, update_weight, STYLE)
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + place, mask=place < C, other=0.0)
                stream = _summed(stream, residual, multiplier)
                tl.store(summed_ptr + place, stream, mask=place < C)
            values = exact(stream)
            squares += values * values
        if weight_ptr is not None:
            inverse = inverse_rms(tl.sum(squares, 0), C, eps)
            stream_ptr = hidden_ptr
            if residual_ptr is not None:
                stream_ptr = summed_ptr
                tl.debug_barrier()  # all threads have written the row before any thread reads it
            for first in range(0, C, BLOCK_C):
                place = first + column
                values = exact(tl.load(stream_ptr + place, mask=place < C, other=0.0))
                weight = tl.load(weight_ptr + place, mask=place < C, other=0.0)
                tl.store(normed_ptr + place, scaled(values, inverse, weight, STYLE), mask=place < C)


def rms_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    style: str,
    residual: torch.Tensor | None = None,
    multiplier: float = 1.0,
    update_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.rms_norm`, which checks the arguments. Nothing is read on the host.

    Args:
        hidden: [B, N, C] fp32, bf16 or fp16. Loads are 128 bits wide if C and the strides of rows are multiples of 16.
        weight: [C], same dtype, or None if there is a residual.
        eps: added to the mean of squares.
        style: "cast_first", "cast_last" or "one_plus".
        residual: [B, N, C], same dtype, or None.
        multiplier: 1 without a residual.
        update_weight: [C], same dtype, or None.

    Returns:
        normed and summed, [B, N, C]. The former is empty without a weight, the latter without a residual.
    """
    batch, nodes, columns = hidden.shape
    nothing = hidden.new_empty(0)
    normed = nothing if weight is None else hidden.new_empty(hidden.shape)
    summed = nothing if residual is None else hidden.new_empty(hidden.shape)
    hidden, residual = _with_rows(hidden), residual if residual is None else _with_rows(residual)
    whole = columns <= MAX_BLOCK_C
    block = min(max(pow2(columns), 32 * THREAD_C), MAX_BLOCK_C)
    with launching_on(hidden):
        _rms_norm_kernel[(nodes, batch)](
            None if weight is None else normed, None if residual is None else summed,
            hidden, residual, contiguous(weight), contiguous(update_weight),
            *hidden.stride()[:2], *(0, 0) if residual is None else residual.stride()[:2],
            multiplier, eps, columns,
            STYLE=style, BLOCK_C=block, WHOLE=whole,
            num_warps=block // (32 * THREAD_C), **{} if whole else LOOP_OPTIONS,
            # a fused multiply-add of multiplier, update and residual would round once where the reference rounds twice
            enable_fp_fusion=False,
        )  # fmt: skip
    return normed, summed


def _with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if its rows are not contiguous."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration; the same on all architectures."""
    # mode -> style; is there a residual, a weight, and an update_weight
    modes = {
        "norm": ("cast_last", False, True, False),
        "residual": ("cast_first", True, True, False),
        "sum": ("cast_first", True, False, False),
        "update": ("one_plus", True, True, True),
    }
    for name, dtype in DTYPES.items():
        # rows of 8191 and 8193 permit only narrow loads
        cases = [*((mode, 4096) for mode in modes), ("update", 8192), ("update", 16384), ("update", 8191)]
        if dtype == torch.bfloat16:
            cases += [("residual", 576), ("norm", 16384), ("residual", 16384), ("sum", 16384), ("update", 8193)]
        for mode, columns in cases:
            style, has_residual, has_weight, has_update = modes[mode]
            row, vector = abstract(dtype, 1, 16, columns), abstract(dtype, columns)
            arguments = vector if has_weight else None, 1e-6, style, row if has_residual else None, 1.0
            tensors = 1 + 2 * has_residual + has_update  # read and written by a step that adds the residual
            if columns <= MAX_BLOCK_C:
                tensors += 2 * has_weight
            yield CompileCase(
                f"{name} c{columns} {mode}",
                _rms_norm_kernel,
                functools.partial(rms_norm, row, *arguments, vector if has_update else None),
                wide_loads=columns % 16 == 0,
                tile_bytes=min(columns, MAX_BLOCK_C) * dtype.itemsize * tensors,
            )
