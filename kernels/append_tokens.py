"""Append: adds the accepted tokens and the target's own token to the text, and writes the report of the round.

There is one launch, with one program per sequence.

Letters: B sequences, C columns of the text, N tree nodes, D edges on the longest path, E ids that end the text.
Reference: `specdec_triton.ops.reference.append_tokens`.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._launch import FP_FUSION, CompileCase, abstract, block_of, contiguous, launching_on
from ._tree import Acceptance

# A program holds a few numbers for each node. With a single warp, sums need no shared memory. Chosen by compile
# reports: no spill at 512 nodes.
NUM_WARPS = 1


@triton.jit(do_not_specialize=["text_stride", "N", "D", "E"])
def _append_tokens_kernel(
    report_ptr,  # [B, 2 D + 6] int64, out
    text_ptr,  # [B, C] int64, in place; rows are contiguous
    length_ptr,  # [B] int64, in place
    position_ptr,  # [B] int64, in place
    budget_ptr,  # [B] int64, in place
    tokens_ptr,  # [B, N] int64
    parents_ptr,  # [B, N] int32 or int64
    accepted,  # Acceptance
    eos_ids_ptr,  # [E] int64, or None
    draft_nan_ptr,  # [B] bool, or None
    text_stride,
    N,
    D,
    E,
    BLOCK_N: tl.constexpr,  # power of two >= N > D
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_N)  # a node, and a place on the path or among the emitted tokens
    budget = tl.load(budget_ptr + row)
    length = tl.load(length_ptr + row)
    position = tl.load(position_ptr + row)
    next_id = tl.load(accepted.next_ids + row)
    live = budget > 0
    path = tl.load(accepted.path + row * D + place, mask=place < D, other=-1)
    accepted_length = tl.load(accepted.length + row)
    count = tl.where(live, accepted_length + 1, 0)
    # the lanes after the path hold the next token, as the report does
    drafts = tl.load(tokens_ptr + row * N + path, mask=(place < accepted_length) & (path >= 0), other=-1)
    emitted = tl.where(place < accepted_length, drafts, next_id)
    # lanes after the tree count as padding nodes
    parents = tl.load(parents_ptr + row * N + place, mask=place < N, other=-1)
    drafted = tl.where(live, tl.sum((parents >= 0).to(tl.int32), 0), 0)
    left = budget - count
    if eos_ids_ptr is not None:
        for index in range(E):
            left = tl.where(live & (next_id == tl.load(eos_ids_ptr + index)), 0, left)
    has_nan = tl.load(accepted.has_nan + row) != 0
    draft_nan = live & False
    if draft_nan_ptr is not None:
        draft_nan = live & (tl.load(draft_nan_ptr + row) != 0)

    tl.debug_barrier()  # all threads have read before any thread writes in place
    tl.store(text_ptr + row * text_stride + length + 1 + place, emitted, mask=place < count)
    tl.store(length_ptr + row, length + count)
    tl.store(position_ptr + row, position + count)
    tl.store(budget_ptr + row, left)
    report_ptr += row * (2 * D + 6)
    tl.store(report_ptr + place, emitted, mask=place <= D)
    report_ptr += D + 1
    tl.store(report_ptr + place, path.to(tl.int64), mask=place < D)
    report_ptr += D
    tl.store(report_ptr, count)
    tl.store(report_ptr + 1, drafted.to(tl.int64))
    tl.store(report_ptr + 2, left)
    tl.store(report_ptr + 3, has_nan.to(tl.int64))
    tl.store(report_ptr + 4, draft_nan.to(tl.int64))


def append_tokens(
    text: torch.Tensor,
    length: torch.Tensor,
    position: torch.Tensor,
    budget: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    path: torch.Tensor,
    accepted_length: torch.Tensor,
    next_ids: torch.Tensor,
    has_nan: torch.Tensor,
    eos_ids: torch.Tensor | None = None,
    draft_nan: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `specdec_triton.ops.append_tokens`, which checks the arguments. Nothing is read on the host.

    Args:
        text: [B, C] int64 with contiguous rows; changed in place.
        length, position, budget: [B] int64, contiguous; changed in place.
        tokens: [B, N] int64.
        parents: [B, N] int32 or int64.
        path, accepted_length, next_ids, has_nan: the fields of `reference.Acceptance`: [B, D] int32 with D < N, [B]
            int64, [B] int64 and [B] bool.
        eos_ids: [E] int64, or None.
        draft_nan: [B] bool, or None.

    Returns:
        The report [B, 2 D + 6] int64.
    """
    batch, nodes = tokens.shape
    max_depth = path.shape[1]
    report = tokens.new_empty((batch, 2 * max_depth + 6))
    accepted = Acceptance(*map(contiguous, (path, accepted_length, next_ids, has_nan)))
    with launching_on(text):
        _append_tokens_kernel[(batch,)](
            report, text, length, position, budget, tokens.contiguous(), parents.contiguous(), accepted,
            contiguous(eos_ids), contiguous(draft_nan),
            text.stride(0), nodes, max_depth, 0 if eos_ids is None else eos_ids.shape[0],
            BLOCK_N=block_of(nodes), num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return report


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every default configuration; the same on all architectures."""
    for nodes in (16, 64, 128, 512):
        row, flag = abstract(torch.int64, 1), abstract(torch.bool, 1)
        tree = abstract(torch.int64, 1, nodes), abstract(torch.int32, 1, nodes)
        accepted = abstract(torch.int32, 1, min(nodes - 1, 32)), row, row, flag
        arguments = abstract(torch.int64, 1, 4097), row, row, row, *tree, *accepted, abstract(torch.int64, 2), flag
        call = functools.partial(append_tokens, *arguments)
        yield CompileCase(f"n{nodes}", _append_tokens_kernel, call, wide_loads=False)
