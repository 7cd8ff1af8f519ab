"""Sampled acceptance: from logits to the accepted path, without storing probabilities.

There are two families of rules: `accept_coupled` needs no draft probabilities, `accept_weighted` does. This is the only
kernel module that imports other ones. Reference: `specdec_triton.ops.reference.accept_sample`.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch

from . import accept_coupled, accept_weighted
from ._filters import filters_argument
from ._launch import DTYPES, CompileCase, abstract, contiguous, launching_on
from ._rows import BLOCK_V, statistics_kernel
from ._tree import Inputs


def accept_sample(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    rule: str,
    seeds: torch.Tensor,
    position: torch.Tensor,
    filters: Sequence[torch.Tensor | None],
    max_depth: int,
    budget: torch.Tensor,
    eos_ids: torch.Tensor | None,
    sampling: str,
    draft_logits: torch.Tensor | None,
    draft_row: torch.Tensor | None,
    draft_filters: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.accept_sample`, which checks the arguments. Nothing is read on the host.

    Logits may have any strides. Loads are 128 bits wide if the last stride is 1 and the other strides and V are
    multiples of 16.

    Returns:
        The fields of `reference.Acceptance`: path [B, D] int32, length [B] int64, next_ids [B] int64, has_nan [B] bool.
    """
    inputs = Inputs(*map(contiguous, (tokens, parents, seeds, position)))
    common = logits, inputs, rule, filters_argument(filters), max_depth, contiguous(budget), contiguous(eos_ids)
    with launching_on(logits):
        if rule in accept_coupled.RULES:
            return tuple(accept_coupled.accept_coupled(*common))
        if rule in accept_weighted.RULES:
            draft = draft_logits, contiguous(draft_row), filters_argument(draft_filters)
            return tuple(accept_weighted.accept_weighted(*common, sampling, *draft))
    raise ValueError(f"accept_sample: rule must be one that a kernel implements, got {rule!r}")


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every rule, with the filters and kinds of sampling that change the code; the same on all architectures."""
    temperature = (abstract(torch.float32, 1),)
    filtered = *temperature, abstract(torch.int64, 1), abstract(torch.float64, 1), abstract(torch.float32, 1)

    def call(rule, dtype="bf16", sampling="none", filters=filtered, nodes=64, vocab=128256):
        logits, tokens = abstract(DTYPES[dtype], 1, nodes, vocab), abstract(torch.int64, 1, nodes)
        sequence, parents = abstract(torch.int64, 1), abstract(torch.int32, 1, nodes)
        ends = 8, sequence, abstract(torch.int64, 2)  # depth, budget, ids that end the text
        draft = (None, None, ()) if sampling == "none" else (logits, parents, filtered)
        return functools.partial(
            accept_sample, logits, tokens, parents, rule, sequence, sequence, filters, *ends, sampling, *draft
        )

    def tile(dtype, tensors=1):
        return {"tile_bytes": BLOCK_V * tensors * DTYPES[dtype].itemsize}

    noisy_kernel = accept_coupled.noisy_statistics_kernel
    for dtype in DTYPES:
        for name, rule, kernel in (
            ("plain", "multi_round", statistics_kernel),
            ("coupled", "coupled", noisy_kernel),
            ("typical", "typical", noisy_kernel),
        ):
            for kind, vocab in (("", 128256), (" odd V", 50257)):
                launches, wide = call(rule, dtype, filters=temperature, vocab=vocab), not kind
                yield CompileCase(f"{dtype} statistics {name}{kind}", kernel, launches, wide_loads=wide, **tile(dtype))
        launches = call("multi_round", dtype, "without")
        yield CompileCase(f"{dtype} statistics drafted", statistics_kernel, launches, **tile(dtype))
        for rule in ("coupled", "typical"):
            launches = call(rule, dtype)
            yield CompileCase(f"{dtype} rows {rule} filtered", accept_coupled.rows_kernel, launches, **tile(dtype))
    weighted = [("bf16", rule, sampling) for rule in accept_weighted.RULES for sampling in ("none", "with")]
    weighted += [(dtype, rule, "without") for dtype in ("bf16", "fp32") for rule in ("multi_round", "traversal")]
    for dtype, rule, sampling in weighted:
        name, launches = f"{rule} {sampling}", call(rule, dtype, sampling)
        yield CompileCase(f"{dtype} rows {name} filtered", accept_weighted.rows_kernel, launches, **tile(dtype))
        if rule == "traversal":
            yield CompileCase(f"{dtype} weights {name}", accept_weighted.weights_kernel, launches, **tile(dtype))
        tiles = tile(dtype, 1 if sampling == "none" else 2)
        yield CompileCase(f"{dtype} draws {name}", accept_weighted.draws_kernel, launches, **tiles)
    for rule, nodes in itertools.product(("coupled", "typical", "block", "multi_round", "traversal"), (64, 256)):
        family = accept_weighted if rule in accept_weighted.RULES else accept_coupled
        launches = call(rule, filters=temperature, nodes=nodes)
        yield CompileCase(f"walk {rule} n{nodes}", family.walk_kernel, launches, wide_loads=False)
