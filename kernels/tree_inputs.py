"""Tree inputs: the packed tree, the positions and the cache slots of a forward over the last nodes of draft trees.

There is one launch. A program handles BLOCK places of each output of one sequence, counted from the output's first
element. Shorter outputs end before the last program. A place is divided into a node and a field by the sizes that come
at launch, so one compilation serves all trees.

Letters: B sequences, T tree nodes, W words of ancestor bits, N rows (the last N of the T nodes), P planes of positions.
Reference: `specdec_triton.ops.reference.tree_inputs`.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._launch import FP_FUSION, CompileCase, abstract, launching_on

# A tree of 64 nodes with one word of ancestors has 256 packed elements, so it takes one program. Each thread of its
# four warps then has two independent elements. Chosen by compile reports: no spill.
BLOCK = 256
NUM_WARPS = 4

STRIDES = [
    "depth_row", "depth_node", "ancestors_row", "ancestors_node", "ancestors_word", "start_row", "base_row",
    "last_position_row", "origin_plane", "origin_row",
]  # fmt: skip


@triton.jit(do_not_specialize=[*STRIDES, "T", "W", "N", "P"])
def _tree_inputs_kernel(
    packed_ptr,  # [B, T, W + 3] int64, out
    positions_ptr,  # [P, B, N] int64, out
    slots_ptr,  # [B, N] int64, out
    depth_ptr,  # [B, T] int64
    ancestors_ptr,  # [B, T, W] int64
    start_ptr,  # [B] int64
    base_ptr,  # [B] int64
    last_position_ptr,  # [B] int64
    origin_ptr,  # [P, B] int64
    depth_row,
    depth_node,
    ancestors_row,
    ancestors_node,
    ancestors_word,
    start_row,
    base_row,
    last_position_row,
    origin_plane,
    origin_row,
    T,
    W,
    N,
    P,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(start_ptr + row * start_row)
    base = tl.load(base_ptr + row * base_row)
    last_column = start + tl.load(last_position_ptr + row * last_position_row)
    depth_ptr += row * depth_row
    ancestors_ptr += row * ancestors_row

    fields = W + 3
    node, field = (place // fields).to(tl.int64), place % fields
    in_tree = place < T * fields
    # a lane loads either a word or a depth, or none of them; the other values are not selected
    words = ancestors_ptr + node * ancestors_node + field.to(tl.int64) * ancestors_word
    packed = tl.load(words, mask=in_tree & (field < W), other=0)
    depth = tl.load(depth_ptr + node * depth_node, mask=in_tree & (field == W), other=0)
    packed = tl.where(field == W, depth, packed)
    packed = tl.where(field == W + 1, start, packed)
    packed = tl.where(field == W + 2, base, packed)
    tl.store(packed_ptr + row * T * fields + place, packed, mask=in_tree)

    plane, node = (place // N).to(tl.int64), T - N + place % N
    has_position = place < P * N
    # lanes without a position store nothing
    depth = tl.load(depth_ptr + node.to(tl.int64) * depth_node, mask=has_position, other=0)
    origin = tl.load(origin_ptr + plane * origin_plane + row * origin_row, mask=has_position, other=0)
    position = tl.minimum(base + depth, last_column) - origin
    tl.store(positions_ptr + (plane * tl.num_programs(0) + row) * N + place % N, position, mask=has_position)
    tl.store(slots_ptr + row * N + place, base + (T - N) + place, mask=place < N)


def tree_inputs(
    depth: torch.Tensor,
    ancestors: torch.Tensor,
    start: torch.Tensor,
    base: torch.Tensor,
    last_position: torch.Tensor,
    origin: torch.Tensor,
    num_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.tree_inputs`, which checks the arguments. Nothing is read on the host.

    Args:
        depth: [B, T] int64.
        ancestors: [B, T, W] int64.
        start, base, last_position: [B] int64.
        origin: [B] or [P, B] int64.
        num_rows: N, 1 to T.

    Returns:
        The fields of `reference.TreeInputs`: [B, T, W + 3], [B, N] or [P, B, N], and [B, N] int64.
    """
    batch, nodes, words = ancestors.shape
    planes = origin if origin.dim() == 2 else origin[None]
    packed = depth.new_empty((batch, nodes, words + 3))
    positions = depth.new_empty((*origin.shape, num_rows))
    slots = depth.new_empty((batch, num_rows))
    places = max(nodes * (words + 3), len(planes) * num_rows)
    with launching_on(depth):
        _tree_inputs_kernel[(batch, triton.cdiv(places, BLOCK))](
            packed, positions, slots, depth, ancestors, start, base, last_position, planes,
            *depth.stride(), *ancestors.stride(), *start.stride(), *base.stride(), *last_position.stride(),
            *planes.stride(), nodes, words, num_rows, len(planes),
            BLOCK=BLOCK, num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return packed, positions, slots


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """The configuration of all trees; the same on all architectures."""
    row = abstract(torch.int64, 1)
    tree = abstract(torch.int64, 1, 60), abstract(torch.int64, 1, 60, 1)
    call = functools.partial(tree_inputs, *tree, row, row, row, row, 60)
    yield CompileCase("all trees", _tree_inputs_kernel, call, wide_loads=False)
