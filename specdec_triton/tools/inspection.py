"""Compiles every default configuration of every kernel and describes the machine code; no GPU is needed.

A case is an entry of its module's `compile_cases` (see kernels/_launch.py): a call of a launcher, of whose launches one
is recorded and compiled. Cases are compiled in separate processes, since Triton's interpreter and its compiler cannot
share one. The compiler reports registers, spills and shared memory; instructions are counted in the machine code.
Occupancy follows from these numbers. The limiter is an estimate for a multiprocessor that holds as many programs as
fit.
"""

import collections
import importlib
import itertools
import json
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .roofline import GPU, GPUS

FOLDER = pathlib.Path(__file__).resolve().parent.parent
# not from `ops`, which would import torch for the command line's help
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
    "rotary_and_cache",
    "rms_norm",
    "gated_activation",
)
PROCESSES = os.cpu_count() or 1
CASES_PER_PROCESS = 8  # at least: a process takes seconds to start
PROCESS_STEPS = 4  # of the progress: Python started, torch imported, kernels imported, machine code read
INSTRUCTION_BYTES = 16
WARP = 32
TABLE_WIDTH = 176

# Unloaded, in clocks; 466 on A100 and 479 on H100 (Luo et al., arXiv 2402.13499). Assumed for B200 too.
MEMORY_LATENCY = 480
# Of a multiprocessor: warps that issue in a clock, lanes of special functions, bytes of shared memory reserved for each
# program, and the unit in which a warp gets registers (CUDA programming guide, compute capabilities 8.0 to 10.0)
ISSUE, SPECIAL_LANES, RESERVED_BYTES, REGISTER_UNIT = 4, 16, 1024, 256


class Arch(NamedTuple):
    """A multiprocessor's limits (CUDA programming guide), its clock, and the GPU that represents the architecture."""

    gpu: GPU
    warps: int
    programs: int
    registers: int
    shared_bytes: int
    fp32_lanes: int
    clock: float  # Hz


ARCHES = {
    80: Arch(GPUS["a100"], 64, 32, 65536, 164 * 1024, 64, 1.41e9),
    90: Arch(GPUS["h100"], 64, 32, 65536, 228 * 1024, 128, 1.83e9),
    100: Arch(GPUS["b200"], 64, 32, 65536, 228 * 1024, 128, 1.85e9),
}

TENSOR = r"[HIQ]G?MMA|UTC\w*MMA"
# in the tables of `bench/results/compile`; the 128-bit ones copy from global memory to registers, to shared memory, and
# back
COUNTED = {
    "hmma": r"HMMA|UTC\w*MMA",
    "hgmma": r"HGMMA",
    "ldg128": r"LDG\.\S*128",
    "ldgsts128": r"LDGSTS\.\S*128",
    "stg128": r"STG\.\S*128",
    "local": r"LDL|STL",
}
# the instruction mix; the kinds in `WIDE` are counted by width
MIX = {"tensor": TENSOR, "special": r"MUFU", "barrier": r"BAR\.", "local": r"LDL|STL"}
WIDE = {"load": r"LDG\.", "async_load": r"LDGSTS", "store": r"STG\."}
# operations a lane: multiply-adds are two, the packed ones of sm_100 work on pairs
FP32 = {r"FFMA2": 4, r"FADD2|FMUL2": 2, r"FFMA": 2, r"FADD|FMUL": 1}


class Instruction(NamedTuple):
    name: str
    target: int | None  # index of the instruction that it jumps to


def cases(arch: int, only: str = "") -> Iterator[tuple[str, Any]]:
    """("op/case name", case) of all kernel modules; only names that match the regular expression `only`."""
    for op in OPS:
        for case in importlib.import_module(f"specdec_triton.kernels.{op}").compile_cases(arch):
            name = f"{op}/{case.name}"
            if re.search(only, name):
                yield name, case


def _num_processes(num_cases: int, processes: int) -> int:
    return max(min(processes, num_cases // CASES_PER_PROCESS), 1)


def num_steps(arch: int, only: str = "", processes: int = PROCESSES) -> int:
    """How often `compile_table` calls its `progress`: for each case, and `PROCESS_STEPS` times for each process."""
    num_cases = sum(1 for _ in cases(arch, only))
    return num_cases + PROCESS_STEPS * _num_processes(num_cases, processes)


def compile_table(
    arch: int, only: str = "", processes: int = PROCESSES, progress: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """{"op/case name": row} for sm_`arch`.

    Args:
        arch: a key of `ARCHES`.
        only: a regular expression; cases whose name it does not match are left out.
        processes: how many may compile at a time.
        progress: called from any thread as each process starts, and as each case is compiled: see `num_steps`.

    Raises:
        ValueError: unknown `arch`.
        ImportError: no triton.
        ChildProcessError: a configuration does not compile.
    """
    if arch not in ARCHES:
        raise ValueError(f"inspect: arch must be one of {', '.join(f'sm_{known}' for known in ARCHES)}, got sm_{arch}")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("inspect: needs the package triton, which has no build for this system")

    def part(which):
        return list(_work(arch, only, which, processes, progress).items())

    processes = _num_processes(sum(1 for _ in cases(arch, only)), processes)
    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(part, range(processes)))
    return dict(item for items in itertools.zip_longest(*parts) for item in items if item)


def environment() -> dict[str, str]:
    """The environment of a process that compiles: this package, without the interpreter."""
    path = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path}


def _work(arch, only, which, parts, progress):
    code = "import sys; from specdec_triton.tools import inspection; inspection.main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, (arch, only, which, parts))]
    lines = []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                lines.append(line)
                progress()
        if process.returncode:
            errors.seek(0)
            raise ChildProcessError(f"inspect: sm_{arch} does not compile:\n{errors.read()[-4000:]}")
    return json.loads(lines[-1])


def measure(some: Sequence[tuple[str, Any]], arch: int, progress: Callable[[str], None] = lambda name: None) -> dict:
    """Compile (name, case) pairs for sm_`arch` in this process: {name: row}.

    A row has registers and spilled bytes of a thread, bytes of shared memory of a program, warps and stages, and the
    instructions by kind (`COUNTED`, and "mix" for the whole program). "tile" is one pass of the hot loop: its bytes and
    tensor_flops, as the case states them; moved_bytes and fp32_flops of all lanes, and the instructions of a warp, fp32
    and special ones among them, as counted in the code.
    """
    rows, codes = {}, []
    for name, case in some:
        compiled = _compile(launch_of(case, arch), arch)
        with tempfile.TemporaryDirectory() as folder:
            cubin = pathlib.Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        codes.append(_machine_code(compiled.asm["cubin"]))
        rows[name] = {
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
            "shared_bytes": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
            "stages": compiled.metadata.num_stages,
            "tensor_cores": case.tensor_cores,
            "wide_loads": case.wide_loads,
        }
        progress(name)
    for (name, case), code in zip(some, _disassemble(codes, arch) if codes else (), strict=True):
        rows[name] |= _counts(code) | {"tile": _tile(case, code, WARP * rows[name]["warps"])}
    return rows


class Launch(NamedTuple):
    """A launch as Triton compiles it: arguments of `ASTSource`, and the key of its cache."""

    function: Any
    key: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]


class _Recorder:
    """A driver for Triton of an absent GPU; its device number is the architecture."""

    def __init__(self, arch: int, note: Callable[[Launch], None] | None = None):
        self.arch, self.note = arch, note

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def record_launches(arch: int, note: Callable[[Launch], None]) -> None:
    """From now on, launches in this process neither compile nor run; each is passed to `note`, specialised for
    sm_`arch`.

    Triton's own rules specialise the arguments. Tensors may be on any device, "meta" included.
    """
    import triton
    from triton.runtime.jit import JITFunction

    def note_in_place_of_kernel(function, key, signature, device, constexprs, options, attrs, *_, **__):
        launch = Launch(function, key, signature, constexprs, attrs, dict(options.__dict__))
        kernel = types.SimpleNamespace(function=None, packed_metadata=None, launch_metadata=lambda *_: None)
        kernel.run = lambda *_: triton.runtime.driver.active.note(launch)
        kernel_cache, *_ = function.device_caches[device]
        kernel_cache[key] = kernel
        return kernel

    triton.runtime.driver.set_active(_Recorder(arch, note))
    JITFunction._do_compile = note_in_place_of_kernel


def launch_of(case: Any, arch: int) -> Launch:
    """The launch that a `CompileCase` describes."""
    launches: list[Launch] = []
    record_launches(arch, launches.append)
    case.call()
    return next(launch for launch in launches if launch.function is case.kernel)


def _compile(launch, arch):
    import triton
    from triton.compiler import ASTSource

    return triton.compile(
        ASTSource(launch.function, launch.signature, launch.constexprs, launch.attrs),
        target=_Recorder(arch).get_current_target(),
        options=launch.options,
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    binary = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(binary), *arguments], check=True, capture_output=True, text=True).stdout


def _machine_code(cubin: bytes) -> bytes:
    """The contents of the one section of a cubin (64-bit ELF) that holds a kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_bytes, entries, names_entry = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * entry_bytes) for index in range(entries)]
    names = sections[names_entry][4]
    (found,) = (
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if cubin.startswith(b".text.", names + name)
    )
    return found


def _disassemble(codes: Sequence[bytes], arch: int) -> Iterator[list[Instruction]]:
    """The instructions of each kernel. All kernels share one call: most of its time is the start of the process."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "code"
        path.write_bytes(b"".join(codes))
        text = _tool("nvdisasm", "-b", f"SM{arch}{'a' if arch >= 90 else ''}", str(path))
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    first = 0
    for code in codes:
        count = len(code) // INSTRUCTION_BYTES
        if len(lines) < first + count:
            raise ValueError(f"nvdisasm: {len(lines)} instructions, too few for {len(codes)} kernels")
        yield [Instruction(name, _target(name, operands, first)) for name, operands in lines[first : first + count]]
        first += count


def _target(name, operands, first):
    found = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
    return int(found[1], 16) // INSTRUCTION_BYTES - first if found else None


def _counts(code: Sequence[Instruction]) -> dict[str, Any]:
    counts, mix = collections.Counter(), collections.Counter()
    for name, number in collections.Counter(instruction.name for instruction in code).items():
        for kind, pattern in COUNTED.items():
            counts[kind] += number * bool(re.match(pattern, name))
        for kind, pattern in MIX.items():
            mix[kind] += number * bool(re.match(pattern, name))
        for kind, pattern in WIDE.items():
            if re.match(pattern, name):
                mix[f"{kind}_{_bits(name)}"] += number
    widths = {kind: count for kind, count in sorted(mix.items()) if kind not in MIX}
    return {
        **{kind: counts[kind] for kind in COUNTED},
        "instructions": len(code),
        "mix": {kind: mix[kind] for kind in MIX} | widths,
    }


def _bits(name: str) -> int:
    found = re.search(r"\.(128|64|[US]16|[US]8)\b", name)
    return int(found[1].lstrip("US")) if found else 32


def _moved_bytes(instruction, lanes):
    return lanes * _bits(instruction.name) // 8 if re.match("|".join(WIDE.values()), instruction.name) else 0


def hot_loop(code: Sequence[Instruction], tile_bytes: int, lanes: int) -> Sequence[Instruction]:
    """The shortest loop in which `lanes` lanes move at least a tile from or to global memory; all code if there is no
    such loop."""
    moved = [_moved_bytes(instruction, lanes) for instruction in code]
    loops = [(target, index + 1) for index, (_, target) in enumerate(code) if target is not None and target <= index]
    tiles = [loop for loop in loops if loop[0] >= 0 and sum(moved[slice(*loop)]) >= tile_bytes]
    begin, end = min(tiles, key=lambda loop: loop[1] - loop[0], default=(0, len(code)))
    return code[begin:end]


def _tile(case, code, lanes):
    loop = hot_loop(code, case.tile_bytes, lanes)
    fp32 = [next((flops for kind, flops in FP32.items() if re.match(kind, entry.name)), 0) for entry in loop]
    return {
        "bytes": case.tile_bytes,
        "tensor_flops": case.tile_flops,
        "moved_bytes": sum(_moved_bytes(instruction, lanes) for instruction in loop),
        "fp32_flops": lanes * sum(fp32),
        "instructions": len(loop),
        "fp32_instructions": sum(bool(flops) for flops in fp32),
        "special_instructions": sum(entry.name.startswith("MUFU") for entry in loop),
    }


def occupancy(row: dict[str, Any], arch: int) -> tuple[int, str]:
    """The number of programs that a multiprocessor of sm_`arch` holds at a time, and the resource that limits it."""
    has = ARCHES[arch]
    registers_a_warp = -(-row["registers"] * WARP // REGISTER_UNIT) * REGISTER_UNIT
    # each scheduler has a quarter of the registers, and each warp one scheduler
    warps = has.registers // ISSUE // registers_a_warp * ISSUE
    limits = {
        "registers": warps // row["warps"],
        "shared memory": has.shared_bytes // (row["shared_bytes"] + RESERVED_BYTES),
        "warps": has.warps // row["warps"],
        "programs": has.programs,
    }
    least = min(limits, key=limits.get)
    return limits[least], least


def limiter(row: dict[str, Any], arch: int, programs: int) -> str:
    """The resource that limits a pass of the hot loop, if a multiprocessor has its share of the GPU; an estimate.

    "latency" if the loop streams nothing. "bytes in flight" if memory is the slowest resource and the programs request
    too few bytes at a time to keep it busy (Little's law).
    """
    has, tile, warps = ARCHES[arch], row["tile"], row["warps"]
    if not tile["bytes"]:
        return "latency"
    bandwidth = has.gpu.bandwidth / has.gpu.multiprocessors
    seconds = {
        "memory": tile["bytes"] / bandwidth,
        "tensor cores": tile["tensor_flops"] * has.gpu.multiprocessors / has.gpu.tensor_flops,
        "instruction issue": tile["instructions"] * warps / ISSUE / has.clock,
        "fp32 units": tile["fp32_instructions"] * WARP * warps / has.fp32_lanes / has.clock,
        "special functions": tile["special_instructions"] * WARP * warps / SPECIAL_LANES / has.clock,
    }
    slowest = max(seconds, key=seconds.get)
    tiles = max(row["stages"] - 1, 1) if row["ldgsts128"] else 1
    if slowest == "memory" and programs * tiles * tile["bytes"] < bandwidth * MEMORY_LATENCY / has.clock:
        return "bytes in flight"
    return slowest


PLANNED_CONTEXTS, PLANNED_NODES, PLANNED_BATCHES = (1024, 2048, 8192, 32768), (1, 8, 16, 32, 64, 128), (1, 16, 64)


class PlannedAttention(NamedTuple):
    """Tree attention of one layer, in a cache whose capacity is used up."""

    batch: int
    context: int
    nodes: int
    splits: int
    programs: int  # with work
    waves: float  # programs / multiprocessors
    partial_bytes: int  # written; the merge reads them again

    @property
    def filled(self) -> float:
        """Programs divided by those of whole waves."""
        return self.waves / math.ceil(self.waves)


def planned_attention(
    batch: int, context: int, nodes: int, heads: int = 32, kv_heads: int = 8, dim: int = 128,
    multiprocessors: int = 132, arch: int = 90,
) -> PlannedAttention:  # fmt: skip
    """The plan of tree attention in 16-bit floats, without a window. Defaults: Llama 3.1 8B's heads on an H200."""
    from ..forward.cache import in_buckets
    from ..kernels.tree_attention import attention_plan

    slots, group = in_buckets(context + nodes), heads // kv_heads
    shape = batch, kv_heads, group, nodes, nodes, slots, dim, dim, 2, False
    (row_tiles, splits, sequences), split_tiles, meta, _ = attention_plan(arch, multiprocessors, *shape)
    tiles = -(-slots // meta["BLOCK_N"])
    programs = row_tiles * sequences * -(-tiles // split_tiles)
    nbytes = 4 * sequences * splits * nodes * group * (dim + 2) if splits > 1 else 0
    return PlannedAttention(batch, context, nodes, splits, programs, programs / multiprocessors, nbytes)


def plan_lines() -> Iterator[str]:
    """A Markdown table of `planned_attention`."""
    yield "| batch | context | " + " | ".join(f"N = {nodes}" for nodes in PLANNED_NODES) + " |"
    yield "| --- | --- |" + " --- |" * len(PLANNED_NODES)
    for batch, context in itertools.product(PLANNED_BATCHES, PLANNED_CONTEXTS):
        plans = [planned_attention(batch, context, nodes) for nodes in PLANNED_NODES]
        cells = [f"{plan.programs}, {plan.waves:.2f}, {plan.partial_bytes / 1e6:.1f}" for plan in plans]
        yield f"| {batch} | {context // 1024}k | " + " | ".join(cells) + " |"


def describe(name: str, row: dict[str, Any], arch: int) -> dict[str, Any]:
    """A row of `specdec-triton inspect`."""
    op, _, config = name.partition("/")
    programs, limited_by = occupancy(row, arch)
    tile = row["tile"]
    flops = tile["tensor_flops"] + tile["fp32_flops"] if tile["bytes"] else 0
    return {
        "op": op,
        "config": config,
        "registers": row["registers"],
        "spills": row["spill_bytes"],
        "shared_bytes": row["shared_bytes"],
        "occupancy": round(programs * row["warps"] / ARCHES[arch].warps, 4),
        "occupancy_limit": limited_by,
        "programs": programs,
        "warps": row["warps"],
        "stages": row["stages"],
        "instructions": row["instructions"],
        "mix": row["mix"],
        "tile_bytes": tile["bytes"],
        "tile_flops": flops,
        "tile_instructions": tile["instructions"] * row["warps"] if tile["bytes"] else 0,
        "intensity": round(flops / tile["bytes"], 3) if tile["bytes"] else None,
        "limiter": limiter(row, arch, programs),
    }


def as_table(rows: Sequence[dict[str, Any]], arch: int):
    """A `rich` table of described rows, `TABLE_WIDTH` characters wide."""
    from rich.table import Table

    has = ARCHES[arch]
    table = Table(
        title=f"sm_{arch}; {has.warps} warps are full occupancy; limiters are estimates for {has.gpu.name}",
        caption=(
            "tensor to barrier: numbers of instructions; 128 and narrow are loads of 128 and fewer bits. pass: KiB "
            "moved in a pass of the hot loop; issued: instructions of all warps in it."
        ),
        box=None,
    )
    table.add_column("config", no_wrap=True)
    for heading in ("registers", "spills\nB", "shared\nKiB", "occupied\n%"):
        table.add_column(heading, justify="right")
    table.add_column("by", no_wrap=True)
    for heading in ("tensor", "128", "narrow", "special", "barrier", "pass\nKiB", "FLOP/B", "issued"):
        table.add_column(heading, justify="right")
    table.add_column("limiter", no_wrap=True)
    op = None
    for row in rows:
        if row["op"] != op:
            op = row["op"]
            table.add_row(f"[bold]{op}[/bold]")
        mix = row["mix"]
        loads = {kind: count for kind, count in mix.items() if kind.startswith(("load", "async"))}
        wide = sum(count for kind, count in loads.items() if kind.endswith("_128"))
        streams = [""] * 3
        if row["tile_bytes"]:
            streams = [f"{row['tile_bytes'] / 1024:.1f}", f"{row['intensity']:.1f}", str(row["tile_instructions"])]
        table.add_row(
            row["config"], str(row["registers"]), str(row["spills"]), f"{row['shared_bytes'] / 1024:.1f}",
            f"{100 * row['occupancy']:.0f}", row["occupancy_limit"], str(mix["tensor"]), str(wide),
            str(sum(loads.values()) - wide), str(mix["special"]), str(mix["barrier"]), *streams, row["limiter"],
        )  # fmt: skip
    return table


def faults(name: str, row: dict[str, Any]) -> list[str]:
    """Properties of a row that no default configuration may have: spills, or missing fast instructions."""
    found = []
    if row["spill_bytes"] or row["local"]:
        found.append(f"{name}: spills {row['spill_bytes']} bytes, {row['local']} local accesses")
    if row["tensor_cores"] and not row["hmma"] + row["hgmma"]:
        found.append(f"{name}: no tensor core instruction")
    if row["wide_loads"] and not row["ldg128"] + row["ldgsts128"]:
        found.append(f"{name}: no 128-bit load")
    return found


def main(arch: str, only: str, which: str, parts: str) -> None:
    """The main function of a process that compiles. Each line of output is a step of the progress; the last one has the
    rows, as JSON."""
    print("started", flush=True)
    importlib.import_module("torch")
    print("torch imported", flush=True)
    share = list(cases(int(arch), only))[int(which) :: int(parts)]
    print("kernels imported", flush=True)
    rows = measure(share, int(arch), lambda name: print(name, flush=True))
    print(json.dumps(rows))
