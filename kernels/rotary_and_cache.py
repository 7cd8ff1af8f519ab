"""Rotary embedding of queries and keys, after an optional RMSNorm over the head dim, and the write of keys and values
to their cache slots.

There is one launch. A program handles some heads of one node: query heads, key heads, or value heads, which are only
copied. The halves of the rotated dims are two tiles of the same layout, so that a thread loads each dim together with
its partner, and each once. Interleaved dims are one tile, which is split in registers.

Each operation is rounded to the dtype that PyTorch would give its result. In fp32, a fused multiply-add would skip one
of these roundings, so the compiler may not use any.

Letters: B sequences, N tree nodes, Hq/Hkv query/key-value heads, D head dim of keys, Dv of values, S cache slots, R
rotated dims.
Reference: `specdec_triton.ops.layers_reference.rotary_and_cache`.
"""

import functools
from collections import namedtuple
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._launch import DTYPES, CompileCase, abstract, launching_on, pow2
from ._norm import exact, inverse_rms, rounded, scaled

# Elements that a warp holds of its heads. In bf16 with D = 128, these are four heads, and each thread has one 128-bit
# load for each half of them. Chosen by compile reports (no spill).
WARP_ELEMENTS = 512
# Up to this number of nodes a program has one warp, so that a single node gives a program for every four heads. With
# more nodes it has two, because the start of a program takes time, too. Not timed.
FEW_NODES, FEW_WARPS, MANY_WARPS = 64, 1, 2

# kernel arguments: [B, N, Hq or Hkv, D or Dv], in the layout of projections; and [B, Hkv, S, D or Dv]
Heads = namedtuple("Heads", "ptr stride_b stride_n stride_h")
Plane = namedtuple("Plane", "ptr stride_b stride_h stride_s")
# kernel argument: [B, N, R]
Angles = namedtuple("Angles", "ptr stride_b stride_n")


@triton.jit
def _load_pairs(ptr, in_heads, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The rotated dims as two tiles: the first and the second of each pair that is rotated together."""
    if INTERLEAVED:
        dim = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        # the zeros of lanes after the rotated dims are not stored and do not change a sum of squares
        both = tl.load(ptr + dim, mask=in_heads & (dim < 2 * HALF), other=0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK_HALF, 2)))
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        inside = in_heads & (pair < HALF)
        # the zeros of other lanes: as above
        first = tl.load(ptr + pair, mask=inside, other=0)
        second = tl.load(ptr + HALF + pair, mask=inside, other=0)
    return first, second


@triton.jit
def _store_pairs(ptr, first, second, in_heads, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        dim = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK_HALF))
        tl.store(ptr + dim, both, mask=in_heads & (dim < 2 * HALF))
    else:
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        inside = in_heads & (pair < HALF)
        tl.store(ptr + pair, first, mask=inside)
        tl.store(ptr + HALF + pair, second, mask=inside)


@triton.jit
def _product(states, factor):
    return exact(rounded(exact(states) * exact(factor), factor.dtype))


@triton.jit
def _rotate_heads(
    target_ptr,  # rows of D, out
    source_ptr,  # rows of D
    in_heads,  # False for lanes after the heads
    cos_ptr,  # [R]
    sin_ptr,  # [R]
    norm_ptr,  # [D], or None
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STYLE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # power of two >= R / 2
    BLOCK_REST: tl.constexpr,  # power of two >= D - R, or 0 if R = D
):
    HALF: tl.constexpr = R // 2
    # Rows that all heads share are loaded once for each head, from the first level of cache. With one row, the compiler
    # would exchange its elements between threads through shared memory.
    no_offset = tl.zeros_like(in_heads).to(tl.int32)
    # all loads come first, so that the program waits for memory once
    first, second = _load_pairs(source_ptr, in_heads, HALF, BLOCK_HALF, INTERLEAVED)
    if BLOCK_REST:
        rest_dim = R + tl.arange(0, BLOCK_REST)[None, :]
        in_rest = in_heads & (rest_dim < D)
        rest = tl.load(source_ptr + rest_dim, mask=in_rest, other=0)  # zeros of other lanes: see `_load_pairs`
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = in_heads & (pair < HALF)
    # results of lanes after the heads and after the rotated dims are not stored
    cos_one = tl.load(cos_ptr + no_offset + pair, mask=inside, other=0)
    sin_one = tl.load(sin_ptr + no_offset + pair, mask=inside, other=0)
    if INTERLEAVED:
        cos_other, sin_other = cos_one, sin_one
    else:
        cos_other = tl.load(cos_ptr + no_offset + HALF + pair, mask=inside, other=0)
        sin_other = tl.load(sin_ptr + no_offset + HALF + pair, mask=inside, other=0)

    if norm_ptr is not None:
        one_weight, other_weight = _load_pairs(norm_ptr + no_offset, in_heads, HALF, BLOCK_HALF, INTERLEAVED)
        one, other = exact(first), exact(second)
        squares = tl.sum(one * one + other * other, 1, keep_dims=True)
        if BLOCK_REST:
            rest_weight = tl.load(norm_ptr + no_offset + rest_dim, mask=in_rest, other=0)
            squares += tl.sum(exact(rest) * exact(rest), 1, keep_dims=True)
        inverse = inverse_rms(squares, D, eps)
        first, second = scaled(one, inverse, one_weight, STYLE), scaled(other, inverse, other_weight, STYLE)
        if BLOCK_REST:
            rest = scaled(exact(rest), inverse, rest_weight, STYLE)

    one = rounded(_product(first, cos_one) - _product(second, sin_one), cos_one.dtype)
    other = rounded(_product(second, cos_other) + _product(first, sin_other), cos_one.dtype)
    one, other = rounded(exact(one), first.dtype), rounded(exact(other), first.dtype)
    _store_pairs(target_ptr, one, other, in_heads, HALF, BLOCK_HALF, INTERLEAVED)
    if BLOCK_REST:
        tl.store(target_ptr + rest_dim, rest, mask=in_rest)


@triton.jit(do_not_specialize=["slots_stride_b", "slots_stride_n", "Hq", "Hkv"])
def _rotary_and_cache_kernel(
    rotated_ptr,  # [B, N, Hq, D], out
    keys,  # Plane [B, Hkv, S, D], in place
    values,  # Plane [B, Hkv, S, Dv], in place
    query,  # Heads [B, N, Hq, D]
    key,  # Heads [B, N, Hkv, D]
    value,  # Heads [B, N, Hkv, Dv]
    cos,  # Angles [B, N, R]
    sin,  # Angles [B, N, R]
    slots_ptr,  # [B, N] int64
    query_norm_ptr,  # [D], or None
    key_norm_ptr,  # [D], or None
    eps,
    slots_stride_b,
    slots_stride_n,
    Hq,
    Hkv,
    D: tl.constexpr,
    Dv: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    STYLE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,  # power of two >= Dv
):
    node, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    query_groups, key_groups = tl.cdiv(Hq, BLOCK_H), tl.cdiv(Hkv, BLOCK_H)
    lane = tl.arange(0, BLOCK_H)[:, None]
    cos_ptr = cos.ptr + batch * cos.stride_b + node * cos.stride_n
    sin_ptr = sin.ptr + batch * sin.stride_b + node * sin.stride_n
    if group < query_groups:
        head = (group * BLOCK_H + lane).to(tl.int64)
        source_ptr = query.ptr + batch * query.stride_b + node * query.stride_n + head * query.stride_h
        target_ptr = rotated_ptr + ((batch * tl.num_programs(0) + node) * Hq + head) * D
        _rotate_heads(
            target_ptr, source_ptr, head < Hq, cos_ptr, sin_ptr, query_norm_ptr, eps,
            D, R, INTERLEAVED, STYLE, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + batch * slots_stride_b + node * slots_stride_n)
        group -= query_groups
        if group < key_groups:
            head = (group * BLOCK_H + lane).to(tl.int64)
            source_ptr = key.ptr + batch * key.stride_b + node * key.stride_n + head * key.stride_h
            target_ptr = keys.ptr + batch * keys.stride_b + head * keys.stride_h + slot * keys.stride_s
            _rotate_heads(
                target_ptr, source_ptr, head < Hkv, cos_ptr, sin_ptr, key_norm_ptr, eps,
                D, R, INTERLEAVED, STYLE, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
        else:
            head = ((group - key_groups) * BLOCK_H + lane).to(tl.int64)
            dim = tl.arange(0, BLOCK_V)[None, :]
            inside = (head < Hkv) & (dim < Dv)
            source_ptr = value.ptr + batch * value.stride_b + node * value.stride_n + head * value.stride_h
            target_ptr = values.ptr + batch * values.stride_b + head * values.stride_h + slot * values.stride_s
            tl.store(target_ptr + dim, tl.load(source_ptr + dim, mask=inside), mask=inside)


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
    """See `specdec_triton.ops.rotary_and_cache`, which checks the arguments. Nothing is read on the host.

    Args:
        query: [B, N, Hq, D] fp32, bf16 or fp16.
        key: [B, N, Hkv, D], same dtype.
        value: [B, N, Hkv, Dv], same dtype.
        cos, sin: [B, N, R], the query's dtype or fp32.
        keys: [B, Hkv, S, D], same dtype as the query, last dimension contiguous; changed in place.
        values: [B, Hkv, S, Dv], likewise.
        slots: [B, N] int64.
        interleaved, eps, style: as in the op.
        query_norm, key_norm: [D], same dtype as the query, or None.

    Returns:
        The rotated query [B, N, Hq, D].
    """
    batch, nodes, heads, head_dim = query.shape
    kv_heads, value_dim, rotated_dims = value.shape[2], value.shape[3], cos.shape[2]
    rotated = query.new_empty(query.shape)
    warps, block_h = _program(batch * nodes, max(heads, kv_heads), head_dim)
    groups = triton.cdiv(heads, block_h) + 2 * triton.cdiv(kv_heads, block_h)
    with launching_on(query):
        _rotary_and_cache_kernel[(nodes, groups, batch)](
            rotated, Plane(keys, *keys.stride()[:3]), Plane(values, *values.stride()[:3]),
            _heads(query), _heads(key), _heads(value), _angles(cos), _angles(sin), slots,
            _row(query_norm), _row(key_norm), float(eps), *slots.stride(), heads, kv_heads,
            D=head_dim, Dv=value_dim, R=rotated_dims, INTERLEAVED=interleaved, STYLE=style,
            BLOCK_H=block_h, BLOCK_HALF=pow2(rotated_dims // 2),
            BLOCK_REST=pow2(head_dim - rotated_dims) if rotated_dims < head_dim else 0, BLOCK_V=pow2(value_dim),
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return rotated


def _program(nodes, heads, head_dim):
    """The warps and the heads of a program."""
    warps = FEW_WARPS if nodes <= FEW_NODES else MANY_WARPS
    return warps, max(1, min(WARP_ELEMENTS * warps // pow2(head_dim), pow2(heads)))


def _row(tensor):
    """The tensor itself if its last dimension is contiguous, else a copy; None stays."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _heads(tensor):
    tensor = _row(tensor)
    return Heads(tensor, *tensor.stride()[:3])


def _angles(tensor):
    tensor = _row(tensor)
    return Angles(tensor, *tensor.stride()[:2])


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Default configurations of common models; the same on all architectures."""
    # name -> heads, dim, rotated dims, options
    models = {
        "d128": (32, 8, 128, 128, {}),
        "d128 norms": (32, 8, 128, 128, {"norms": True}),
        "d64": (32, 8, 64, 64, {}),
        "d256 norms one_plus": (8, 4, 256, 256, {"norms": True, "style": "one_plus"}),
        "d128 half interleaved": (32, 2, 128, 64, {"interleaved": True}),
        "d80 r32": (32, 32, 80, 32, {}),
        "d96": (32, 32, 96, 96, {}),
    }
    for name, (heads, kv_heads, dim, rotated_dims, options) in models.items():
        for dtype_name, dtype in DTYPES.items():
            for nodes in (FEW_NODES, FEW_NODES + 1) if name[:4] == "d128" else (FEW_NODES,):
                call = functools.partial(_compile_call, dtype, nodes, heads, kv_heads, dim, rotated_dims, **options)
                _, block_h = _program(nodes, heads, dim)
                tile_bytes = 2 * block_h * dim * dtype.itemsize
                case = f"{dtype_name} {name} n{nodes}"
                yield CompileCase(case, _rotary_and_cache_kernel, call, tile_bytes=tile_bytes)


def _compile_call(dtype, nodes, heads, kv_heads, dim, rotated_dims, norms=False, style="cast_first", interleaved=False):
    joint = abstract(dtype, 1, nodes, heads + 2 * kv_heads, dim)
    angles = abstract(dtype, 1, nodes, rotated_dims)
    plane = abstract(dtype, 1, 512, kv_heads, dim).transpose(1, 2)
    weight = abstract(dtype, dim) if norms else None
    rotary_and_cache(
        *joint.split([heads, kv_heads, kv_heads], 2), angles, angles, plane, plane, abstract(torch.int64, 1, nodes),
        interleaved, weight, weight, 1e-6, style,
    )  # fmt: skip
