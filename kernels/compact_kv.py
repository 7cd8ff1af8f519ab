"""KV compaction: moves the keys and values of accepted nodes to the slots after the root's, for all layers at once.

There is one launch. A program handles some columns of one plane of one sequence for all steps of the path. Step k
copies slot base + path[k] to slot base + 1 + k. The target of a step may be the source of an earlier one. Since the
path is strictly increasing, path[k] >= k + 1. No step therefore reads a slot that an earlier step wrote, but no step
may write before the earlier steps have read. Steps are processed in ascending chunks: all reads of a chunk come before
its writes.

Elements are moved as bits, in the widest integers that the address of the storage and the widths of all planes permit.
One access moves a *unit*: 16 bytes (two int64 lanes), or 8, 4, 2 or 1 bytes (one lane).

Letters: B sequences, S slots, P planes (keys or values of one layer), D steps of the path.
Reference: `specdec_triton.ops.reference.compact_kv`.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from ._launch import FP_FUSION, CompileCase, abstract, launching_on

# Lanes and steps that a program holds. Each thread of its two warps holds one 128-bit unit of 8 steps. At batch 1, 64
# planes with slots of 2 KiB give 128 programs. Chosen by compile reports (no spill). Timed on an H200, without
# alternatives: 2.7 us for five steps at batch 1, 74% of the bandwidth for 17 steps at batch 16.
BLOCK_C = 128
BLOCK_K = 8
NUM_WARPS = 2

LANE_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["S", "D"])
def _compact_kv_kernel(
    storage_ptr,  # [lanes] int64, int32, int16 or int8, in place: planes [B, S, width], one after another
    planes_ptr,  # [P, 2] int64: first unit of the plane, units per slot
    base_ptr,  # [B] int64
    path_ptr,  # [B, D] int32
    S,
    D,
    UNIT: tl.constexpr,  # lanes per unit
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    plane_ptr = planes_ptr + 2 * tl.program_id(2)
    # multiplied by UNIT here and not in the table, so that the compiler knows that every slot starts on a whole unit
    width = tl.load(plane_ptr + 1) * UNIT
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    root = tl.load(plane_ptr) * UNIT + (row * S + tl.load(base_ptr + row)) * width
    columns_ptr = storage_ptr + root + column[None, :]
    in_slot = (column < width)[None, :]

    first = 0
    while first < D:
        step = first + tl.arange(0, BLOCK_K)
        nodes = tl.load(path_ptr + row * D + step, mask=step < D, other=-1)
        # nodes that are in place already are not moved; padding (-1) is below every step and is not moved either
        moves = (nodes > step + 1)[:, None] & in_slot
        values = tl.load(columns_ptr + nodes.to(tl.int64)[:, None] * width, mask=moves)
        tl.debug_barrier()  # all threads have read before any thread writes
        tl.store(columns_ptr + (step + 1).to(tl.int64)[:, None] * width, values, mask=moves)
        first = tl.where(tl.min(nodes, 0) < 0, D, first + BLOCK_K)


def compact_kv(storage: torch.Tensor, widths: Sequence[int], base: torch.Tensor, path: torch.Tensor) -> None:
    """See `specdec_triton.ops.compact_kv`, which checks the arguments. Nothing is read on the host.

    The first call for a layout copies a table of the planes to the device, so it must not be inside a graph capture.

    Args:
        storage: [B * S * sum(widths)], any dtype, contiguous; changed in place.
        widths: P numbers, the elements per slot in each plane.
        base: [B] int64.
        path: [B, D] int32, D >= 1.
    """
    batch, max_depth = path.shape
    itemsize = storage.element_size()
    alignment = (storage.data_ptr() | storage.storage_offset() * itemsize) % 16
    slots = storage.numel() // (batch * sum(widths))
    layout = _layout(tuple(widths), itemsize, alignment, batch, slots, storage.device)
    planes, lane_dtype, unit, blocks = layout
    with launching_on(storage):
        _compact_kv_kernel[(blocks, batch, len(widths))](
            storage.view(lane_dtype), planes, base.contiguous(), path.contiguous(), slots, max_depth,
            UNIT=unit, BLOCK_C=BLOCK_C, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip


@functools.cache  # unbounded: captured graphs read the tables
def _layout(
    widths: tuple[int, ...], itemsize: int, alignment: int, batch: int, slots: int, device: torch.device
) -> tuple[torch.Tensor, torch.dtype, int, int]:
    """The table of planes [P, 2] int64 on the device, the dtype of a lane, lanes per unit, and blocks of columns."""
    unit_bytes = math.gcd(16, alignment, *(width * itemsize for width in widths))
    lane_bytes = min(unit_bytes, 8)
    table, offset = [], 0
    for width in widths:
        units = width * itemsize // unit_bytes
        table.append((offset, units))
        offset += batch * slots * units
    planes = torch.tensor(table, dtype=torch.int64, device=device)
    blocks = triton.cdiv(max(widths) * itemsize // lane_bytes, BLOCK_C)
    return planes, LANE_DTYPES[lane_bytes], unit_bytes // lane_bytes, blocks


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration; the same on all architectures."""
    base, path = abstract(torch.int64, 1), abstract(torch.int32, 1, 8)
    for unit_bytes in (16, 8, 4, 2, 1):
        yield CompileCase(
            f"{unit_bytes}-byte units",
            _compact_kv_kernel,
            functools.partial(compact_kv, abstract(torch.int8, 512 * unit_bytes), [unit_bytes], base, path),
            wide_loads=unit_bytes == 16,
            tile_bytes=2 * BLOCK_K * BLOCK_C * min(unit_bytes, 8),
        )
