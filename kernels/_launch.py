"""Common parts of launchers: the device to launch on, options of every launch, and launches to compile for a report.

Each kernel module that is named like its op exports

    def compile_cases(arch: int) -> Iterator[CompileCase]

with its default configurations on a CUDA architecture (80, 90, 100). `specdec_triton.tools.inspection` compiles them
without a GPU, `specdec_triton.tools.compile_report` compares them with the committed tables, and
`tests/test_compile.py` contains the requirements that they must meet.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Triton's interpreter gives wrong results for tl.dot of bf16 operands, without an error; they are cast to fp32 there
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Arguments of acceptance kernels that Triton must not specialize: separate compilations would not make them faster.
COUNTS = ["N", "P", "S", "D", "E", "depth"]

# Passed to every launch, because Triton's default differs between versions and affects rounding.
FP_FUSION = {"enable_fp_fusion": True}


class CompileCase(NamedTuple):
    """A launch to compile, and requirements for its machine code.

    Attributes:
        name: short, stable name that is unique within the module, such as "bf16 d128 m64 split window".
        kernel: the `@triton.jit` function. Its first launch in `call` is compiled.
        call: calls the launcher with tensors made by `abstract`. Types, alignment, constants and options are taken from
            the launch.
        tensor_cores: True if the machine code must contain HMMA or HGMMA instructions.
        wide_loads: True if the machine code must contain 128-bit loads from global memory.
        tile_bytes: bytes that are read and written by one pass of a program's loop over keys, logits or slots, or by
            the whole program if it has no such loop. 0 if the kernel is limited by latency.
        tile_flops: floating-point operations of the tensor cores in that pass, padding included.
    """

    name: str
    kernel: Any
    call: Callable[[], Any]
    tensor_cores: bool = False
    wide_loads: bool = True
    tile_bytes: int = 0
    tile_flops: int = 0


# name of a dtype in compile cases -> dtype
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def abstract(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without memory, for a `CompileCase`. Triton treats its address as aligned, as that of an allocation."""
    return torch.empty(shape, dtype=dtype, device="meta")


def pow2(number: int) -> int:
    """`number` rounded up to a power of two."""
    return triton.next_power_of_2(number)


def block_of(count: int) -> int:
    """Block size for `count` nodes or tiles: a power of two, at least 16."""
    return max(16, pow2(count))


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device times 10: 80, 90, 100, ... For other devices it is 90 in the interpreter, and
    otherwise that of the recorder.

    Without a GPU, Triton's driver can only be a recorder of launches (`specdec_triton.tools.inspection`).
    """
    if device.type == "cuda":
        return _capability(device)
    return 90 if INTERPRETED.value else triton.runtime.driver.active.get_current_target().arch


@functools.lru_cache(maxsize=64)
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device. For other devices it is 132, that of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launching_on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current, because Triton launches on the current device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
