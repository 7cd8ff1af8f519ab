"""What launchers share: the device to launch on, options of every launch, and launches to compile for a report.

Each kernel module that is named like its op exports

    def compile_cases(arch: int) -> Iterator[CompileCase]

with its default configurations on a CUDA architecture (80, 90, 100). `specdec_triton.tools.inspection` compiles them
without a GPU, `specdec_triton.tools.compile_report` compares them with the committed tables, and
`tests/test_compile.py` says what must be true of them.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# tl.dot of bf16 operands is wrong in Triton's interpreter, without an error: operands are cast to fp32 there
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Arguments of acceptance that are not worth a compilation for each kind of number.
COUNTS = ["N", "P", "S", "D", "E", "depth"]

# Passed to every launch: Triton's default changes between versions, and rounding changes with it.
FP_FUSION = {"enable_fp_fusion": True}


class CompileCase(NamedTuple):
    """A launch to compile, and what must be true of its machine code.

    Attributes:
        name: unique within the module, stable, short: "bf16 d128 m64 split window".
        kernel: the `@triton.jit` function. Of its launches in `call`, the first is compiled.
        call: calls the launcher with tensors of `abstract`. Types, alignment, constants and options are those of the
            launches that it makes.
        tensor_cores: the kernel must show HMMA or HGMMA.
        wide_loads: the kernel must show 128-bit loads from global memory.
        tile_bytes: read and written by one pass of a program's loop over keys, logits or slots, or by the program if
            it has no such loop. 0: nothing streams, the time is latency.
        tile_flops: floating-point operations of the tensor cores in that pass, padding included.
    """

    name: str
    kernel: Any
    call: Callable[[], Any]
    tensor_cores: bool = False
    wide_loads: bool = True
    tile_bytes: int = 0
    tile_flops: int = 0


# of compile cases, by the word for them in names
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def abstract(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without memory, for a `CompileCase`; Triton finds its address aligned, like that of an allocation."""
    return torch.empty(shape, dtype=dtype, device="meta")


def pow2(number: int) -> int:
    """The least power of two that is at least `number`."""
    return triton.next_power_of_2(number)


def block_of(count: int) -> int:
    """Lanes for `count` nodes or tiles."""
    return max(16, pow2(count))


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def architecture(device: torch.device) -> int:
    """80, 90, 100, ...: a CUDA device's compute capability. Other devices: 90 in the interpreter, else the recorder's.

    Without a GPU, only a recorder of launches can be Triton's driver.
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
    """A CUDA device's; 132, an H100's, for other devices."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launching_on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
