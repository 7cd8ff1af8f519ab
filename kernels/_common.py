"""What the kernels share: facts decided at import, the device to launch on, and how a kernel is compiled for a report.

Each kernel module exports

    def compile_cases(arch: int) -> Iterator[CompileCase]

with one case for every default configuration on a CUDA architecture (80, 90, 100).
`specdec_triton.tools.inspection` compiles them without a GPU; `bench/compile_report.py` compares registers, spills and
instructions with the committed tables; `tests/test_compile.py` holds what must be true of them.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# tl.dot on bf16 is garbage in Triton's interpreter: operands are cast to fp32 there
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# A key, int64, stands for a value and its token id. Bits 32-63: the fp32 value's bits, rearranged so that integers
# order as the floats do, NaN above all. Bits 0-30: MAX_ID - token id.
MAX_ID: tl.constexpr = tl.constexpr(2**31 - 1)
NAN_ORDER: tl.constexpr = tl.constexpr(2**31 - 1)  # of all fp32 values only a NaN has these bits
NO_KEY: tl.constexpr = tl.constexpr(-(2**63))

# arguments of acceptance: few of their values would be worth a compilation of their own
COUNTS = ["N", "P", "S", "D", "E", "depth"]

# passed to every launch: Triton's default changes between versions, and rounding with it
FP_FUSION = {"enable_fp_fusion": True}


class CompileCase(NamedTuple):
    """One specialisation of a kernel, as a launch would compile it.

    Attributes:
        name: unique within the module, stable, short: "bf16 d128 m64 split window".
        kernel: the `@triton.jit` function.
        signature: type of each runtime argument by name: "*bf16", "*i64", "fp32", "i32", "i64"; a suffix ":16" says
            that the pointer is aligned to, or the number a multiple of, 16, as launches find it.
        constexprs: value of every other argument by name: the `tl.constexpr` ones, arguments passed as None, and
            integers that are 1 in every launch (Triton makes constants of those).
        options: {"num_warps": 4, "num_stages": 3}.
        tensor_cores: the kernel must show HMMA or HGMMA.
        wide_loads: the kernel must show 128-bit loads from global memory.
        tile_bytes: read and written by one pass of a program's loop over keys, logits or slots, or by the program where
            it has no such loop. 0: nothing streams, the time is latency.
        tile_flops: floating-point operations of the tensor cores in that pass, padding included.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    tensor_cores: bool = False
    wide_loads: bool = True
    tile_bytes: int = 0
    tile_flops: int = 0

    @classmethod
    def of(cls, name: str, kernel: Any, arguments: dict[str, Any], options: dict[str, Any], **wanted) -> "CompileCase":
        """From one dictionary: a string is a type, anything else a constant; an argument that it lacks is None."""
        signature = {key: arguments[key] for key in kernel.arg_names if isinstance(arguments.get(key), str)}
        constexprs = {key: arguments.get(key) for key in kernel.arg_names if key not in signature}
        return cls(name, kernel, signature, constexprs, options, **wanted)


class AttentionConfig(NamedTuple):
    """How tree attention computes a shape: one entry of the tables below, which say what each rests on."""

    block_m: int  # rows a program
    block_n: int  # slots a tile
    num_warps: int
    num_stages: int
    programs: int  # planned for a multiprocessor at a time, at most; 2 where the compile report says that 2 fit
    most_rows: int = 0  # chosen for shapes of up to this many rows; 0: for one row tile


# By bytes an element and head dim (`ops.MAX_HEAD_DIMS` are the greatest), narrowest first; the last entry also takes
# more rows. Timed on an H200 with Triton 3.6, 2026-11-27 (bench/tune_tree_attention.py): head dim 128 in bf16, 4, 64,
# 128 and 256 rows in several splits. The other entries rest on the compile report only.
_ATTENTION = {
    (2, 64): ((16, 64, 4, 3, 2), (32, 64, 4, 3, 2), (64, 64, 4, 3, 2), (128, 64, 8, 3, 1)),
    # 128 and 256 rows took 4 to 12% longer in row tiles of 128; 512 rows were not timed
    (2, 128): ((16, 64, 4, 3, 2), (32, 64, 4, 3, 2), (64, 64, 4, 3, 2, 256), (128, 64, 8, 3, 1)),
    (2, 256): ((16, 32, 4, 3, 2), (32, 64, 8, 2, 1), (64, 32, 8, 2, 1)),
    (2, 512): ((16, 16, 8, 2, 1),),
    (4, 64): ((16, 16, 4, 2, 2),),
    (4, 128): ((16, 16, 4, 2, 2),),
    (4, 256): ((16, 16, 4, 2, 2),),
}
# The same where those spill (before sm_90, and with a window or chunks) or want more shared memory than sm_120 has.
# None of these was timed.
_ATTENTION_TIGHT = _ATTENTION | {
    (2, 64): (_ATTENTION[2, 64][0], (32, 32, 4, 3, 2), (64, 32, 4, 3, 2), _ATTENTION[2, 64][3]),
    (2, 128): (*_ATTENTION[2, 128][:2], (64, 32, 8, 3, 2), (128, 32, 8, 3, 1)),
    (2, 256): (*_ATTENTION[2, 256][:2], (64, 16, 8, 2, 1)),
    (4, 256): ((16, 16, 8, 2, 2),),
}


def attention_config(
    arch: int, rows: int, head_dim: int, bytes: int, one_split: bool, limited: bool
) -> AttentionConfig:
    """For rows = nodes * heads a group, the greater head dim and the element size; limited: by a window or chunks."""
    table = _ATTENTION_TIGHT if limited or not 90 <= arch < 120 else _ATTENTION
    configs = [AttentionConfig(*entry) for entry in table[bytes, max(pow2(head_dim), 64)]]
    if one_split:  # narrow row tiles fill the card, and the keys that they share stay in the L2 cache
        rows = 16 if rows <= 64 else 32
    return next((config for config in configs if max(config.block_m, config.most_rows) >= rows), configs[-1])


# A capacity up to this, the tree's own slots left out, is one split: a prefix of 256 slots, in a cache that is rounded
# up to a multiple of 128. On an H200 one split of 1024 slots took longer than 2048 slots in many (19 against 11 us).
SHORT_SLOTS = 256 + 127
# A split has at least this many slots, and this many times the rows of a row tile. For D = Dv and two bytes an element
# a program then moves at most half as much for its partial results, written and read once, as for its keys and values.
MIN_SPLIT_SLOTS = 128
MIN_SPLIT_ROWS = 4
# Programs planned for a multiprocessor at a time, for each row tile and up to the configuration's. On an H200 one row
# tile of 8 KV heads was fastest with one (8192 slots, N = 16: 17.9 us in 15 splits, 21.7 in 33), more with two.
PROGRAMS_A_ROW_TILE = 1
MAX_WAVES = 4  # plans of up to this many waves are compared
WAVE_TILES = 4  # what starting a program and merging its results costs, in tiles: an estimate
MERGE_SPLITS = 16  # splits merged at a time
MERGE_ROWS = 4  # rows a program of the merge: for every shape, so that a row's sums never depend on how many there are


@functools.lru_cache(maxsize=1024)
def attention_plan(
    arch, multiprocessors, batch, kv_heads, group, rows, nodes, slots, head_dim, value_dim, bytes, limited
):
    """Grid (row tiles, splits, sequences * KV heads), tiles a split, compile-time arguments of tree attention and of
    its merge.

    Functions of shapes and of the device, never of lengths. A split's size follows the capacity and the number of row
    tiles and KV heads; it does not depend on B, nor on an N with the same configuration and row
    tiles, nor on T unless the slots that T leaves are few enough for one split.
    """
    one_split = slots - nodes <= SHORT_SLOTS
    config = attention_config(arch, rows * group, max(head_dim, value_dim), bytes, one_split, limited)
    block_m, block_n, num_warps, num_stages, programs, _ = config
    row_tiles = triton.cdiv(rows * group, block_m)
    tiles = triton.cdiv(slots, block_n) + 1  # as many as prefix and tree of any length may take
    split_tiles = tiles
    if not one_split:
        least = max(MIN_SPLIT_ROWS * block_m, MIN_SPLIT_SLOTS) // block_n
        at_a_time = multiprocessors * min(row_tiles * PROGRAMS_A_ROW_TILE, programs)
        split_tiles = _split_tiles(tiles, least, row_tiles * kv_heads, at_a_time)
    splits = triton.cdiv(triton.cdiv(slots - nodes, block_n) + triton.cdiv(nodes, block_n), split_tiles)
    shared = {"G": group, "DV": value_dim, "BLOCK_N": block_n, "BLOCK_DV": max(pow2(value_dim), 16), **FP_FUSION}
    blocks = {"D": head_dim, "BLOCK_M": block_m, "BLOCK_D": max(pow2(head_dim), 16)}
    meta = shared | blocks | _attention_options(block_m, blocks["BLOCK_D"], bytes, num_warps, num_stages)
    merge_meta = shared | _merge_blocks(splits, shared["BLOCK_DV"])
    return (row_tiles, splits, batch * kv_heads), split_tiles, meta, merge_meta


def _split_tiles(tiles: int, least: int, programs_a_split: int, at_a_time: int) -> int:
    """Tiles a split, such that one sequence at full capacity fills whole waves of `at_a_time` programs."""

    def size(waves):
        return max(triton.cdiv(tiles, max(waves * at_a_time // programs_a_split, 1)), least)

    def cost(size):
        return triton.cdiv(programs_a_split * triton.cdiv(tiles, size), at_a_time) * (size + WAVE_TILES)

    return min(map(size, range(1, MAX_WAVES + 1)), key=cost)


def _attention_options(block_m: int, block_d: int, bytes: int, num_warps: int, num_stages: int) -> dict[str, int]:
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if bytes == 4:  # spills more the more it is given
        return options
    # Left alone, the compiler aims at 128 or 168 registers and spills one or two. The narrowest tiles fit 168, with
    # which three programs fit on a multiprocessor.
    return options | {"maxnreg": 168 if block_m * block_d <= 1024 else 255}


def _merge_blocks(splits: int, block_dv: int) -> dict[str, int]:
    # a thread loads 128 bits of each split
    warps = max(MERGE_ROWS * block_dv // 128, 1)
    blocks = {"ROWS": MERGE_ROWS, "BLOCK_P": max(pow2(splits), MERGE_SPLITS), "MERGE_P": MERGE_SPLITS}
    # left alone, the compiler aims at 128 registers, and spilled two of them with a window
    return blocks | {"num_warps": warps, "maxnreg": min(168, 2048 // warps)}


def attention_launches(arch: int) -> Iterator[tuple[str, dict[str, Any], dict[str, int], bool]]:
    """(name, arguments, options, tensor cores?) of each configuration of tree attention, for a model of G = 4."""
    strides = [f"stride_{name}" for name in ("qb", "qh", "qn", "kb", "kh", "ks", "vb", "vh", "vs")]
    common = dict.fromkeys(("stride_tb", "stride_tn", "Hkv", "N", "T", "P"), "i32") | dict.fromkeys(strides, "i32:16")
    common |= {"tree_ptr": "*i64:16", "outer": "fp32", "W": 1, "G": 4, "split_tiles": "i32"}
    partials = {"partial_ptr": "*fp32:16", "stats_ptr": "*fp32:16"}
    features = {"": {}, " chunk": {"chunk": "i32"}, " window softcap": {"window": "i32", "inner": "fp32"}}
    features[" window sinks"] = {"window": "i32", "sinks_ptr": "*bf16:16"}
    shapes = [
        *itertools.product(["bf16"], (64, 128, 256, 512), features),
        *itertools.product(["bf16"], (80, 192), [""]),
    ]
    shapes += [("fp16", 128, ""), *itertools.product(["fp32"], (64, 128, 256), ("", " window softcap"))]
    for (dtype, dim, feature), one_split in itertools.product(shapes, (True, False)):
        if one_split and feature not in ("", " window sinks"):
            continue
        arguments = common | features[feature] | dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), f"*{dtype}:16")
        arguments |= {"out_ptr": f"*{dtype}:16"} if one_split else partials
        arguments |= {"D": dim, "DV": dim, "BLOCK_D": pow2(dim), "BLOCK_DV": pow2(dim)}
        shape = dim, 4 if dtype == "fp32" else 2, one_split, feature != ""
        chosen = dict.fromkeys(attention_config(arch, rows, *shape) for rows in (16, 32, 64, 128, 512))
        for block_m, block_n, num_warps, num_stages, *_ in chosen:
            name = f"{dtype} d{dim} m{block_m} n{block_n} {'one' if one_split else 'split'}{feature}"
            tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n}
            yield (
                name,
                arguments | tiles,
                _attention_options(block_m, pow2(dim), shape[1], num_warps, num_stages),
                dtype != "fp32",
            )
    merges = [*itertools.product((64, 128, 256, 512), (16, 64), [""])]
    merges += [(128, 16, " window sinks"), (256, 64, " window sinks")]
    for dim, splits, feature in merges:
        arguments = common | partials | {"out_ptr": "*bf16:16", "DV": dim, "BLOCK_DV": dim, "BLOCK_N": 64}
        arguments |= features[feature] | _merge_blocks(splits, dim)
        options = {name: arguments.pop(name) for name in ("num_warps", "maxnreg")}
        yield f"merge d{dim} p{splits}{feature}", arguments, options, False


def pow2(number: int) -> int:
    """The least power of two that is at least `number`."""
    return triton.next_power_of_2(number)


@functools.lru_cache(maxsize=64)
def architecture(device: torch.device) -> int:
    """80, 90, 100, ...: the compute capability of a CUDA device; 90 where the interpreter stands in for one."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; an H100's 132 where the interpreter stands in for one."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launching_on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
