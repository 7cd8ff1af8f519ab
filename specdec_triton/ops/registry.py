"""Selects the implementation of an op, and registers kernels as ops of `torch.ops.specdec_triton`."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch

OPS = (
    "tree_attention",
    "tree_inputs",
    "ngram_lookup",
    "draft_topk",
    "build_tree",
    "best_first_tree",
    "accept_greedy",
    "accept_sample",
    "compact_kv",
    "append_tokens",
    "rms_norm",
    "rotary_and_cache",
    "gated_activation",
)
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Library.define and impl take 3 µs of host time per call, torch.library.custom_op 15 to 25 µs
_LIBRARY = torch.library.Library("specdec_triton", "FRAGMENT")
_references: dict[str, ModuleType] = {}


def implementation(op: str, device: torch.device | str) -> tuple[str, str]:
    """The implementation that `impl=None` selects for tensors on `device`, and the reason for it.

    For `tree_attention`, the result holds for head dims up to `MAX_HEAD_DIMS`, for `build_tree` up to
    `MAX_CANDIDATES` and `MAX_BUILT_NODES`, and for `best_first_tree` up to `MAX_BUILT_NODES`.

    Returns:
        ("triton" or "reference", reason).

    Raises:
        ValueError: `op` is not the name of an op.
    """
    if op not in OPS:
        raise ValueError(f"implementation: op must be one of {', '.join(OPS)}, got {op!r}")
    device = torch.device(device)
    if device.type != "cuda":
        return "reference", f"tensors on {device.type}: Triton kernels run on CUDA GPUs"
    return ("triton", "tensors on cuda") if HAS_TRITON else ("reference", "triton is not installed")


def resolve(op: str, impl: str | None, device: torch.device) -> Callable:
    """The function that computes `op`: the reference, or the registered op that calls the kernel's launcher
    `specdec_triton.kernels.<op>.<op>` (see `register`).

    Raises:
        ValueError: `impl` is unknown, or it is "triton" and the kernel cannot run on `device`.
    """
    if impl is None:
        impl, _ = implementation(op, device)
    elif impl not in ("triton", "reference"):
        raise ValueError(f'{op}: impl must be None, "triton" or "reference", got {impl!r}')
    if impl == "reference":
        return reference_of(op)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'{op}: impl="triton" needs tensors on a CUDA GPU (or TRITON_INTERPRET=1 set before triton is first '
            f"imported), got tensors on {device.type}"
        )
    return getattr(torch.ops.specdec_triton, op).default


def reference_of(op: str) -> Callable:
    """The PyTorch reference of an op."""
    return getattr(_references[op], op)


@functools.cache
def launcher(op: str) -> Callable:
    """The function that launches the op's kernel. Its module is imported on first use."""
    return getattr(importlib.import_module(f"specdec_triton.kernels.{op}"), op)


def register(schema: str, fake: Callable, references: ModuleType) -> None:
    """Register a kernel as `torch.ops.specdec_triton.<op>`.

    Args:
        schema: the op's schema.
        fake: returns empty outputs of the right shapes and dtypes for compilers.
        references: the module that has the op's reference.
    """
    op = schema.partition("(")[0]
    _references[op] = references
    _LIBRARY.define(schema)
    _LIBRARY.impl(op, lambda *arguments: launcher(op)(*arguments), "CompositeExplicitAutograd")
    torch.library.register_fake(f"specdec_triton::{op}", fake, lib=_LIBRARY)
