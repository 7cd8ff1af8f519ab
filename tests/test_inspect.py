"""`specdec-triton inspect`: counts of the machine code, occupancy and limiters."""

import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from specdec_triton.tools import cli, compile_report, inspection
from specdec_triton.tools.inspection import ARCHES, Instruction

ROOT = pathlib.Path(__file__).resolve().parent.parent

# compiles cases, the first one also on one warp; adds the FLOPs of the tensor cores in a pass of the hot loop
DRIVER = """
import json, re, sys
from specdec_triton.tools import inspection

def tensor_flops(code, case, lanes):
    warps = lanes // 32
    total = 0
    for name, _ in inspection.hot_loop(code, case.tile_bytes, lanes):
        if found := re.match(r"HGMMA[.](\\d+)x(\\d+)x(\\d+)", name):
            total += 2 * int(found[1]) * int(found[2]) * int(found[3]) * warps // 4
        elif name.startswith("HMMA.16816"):
            total += 2 * 16 * 8 * 16 * warps
    return total

counts, launch_of = inspection._tile, inspection.launch_of
inspection._tile = lambda *given: counts(*given) | {"counted_flops": tensor_flops(given[1], given[0], given[2])}

def one_warp(case, arch):
    launch = launch_of(case, arch)
    narrow = case.name.endswith(" on one warp")
    return launch._replace(options=launch.options | {"num_warps": 1}) if narrow else launch

inspection.launch_of = one_warp
found = list(inspection.cases(90, sys.argv[1]))
narrow = [(f"{name} on one warp", case._replace(name=f"{case.name} on one warp")) for name, case in found[:1]]
print(json.dumps(inspection.measure(found + narrow, 90)))
"""


@pytest.fixture(scope="module")
def attention():
    """Rows of tree attention; the last one spills, since it is compiled for one warp."""
    command = [sys.executable, "-c", DRIVER, r"tree_attention/bf16 d128 m(16|32|128) n\d+ split$"]
    done = subprocess.run(command, cwd=ROOT, env=inspection.environment(), capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_kernel_that_spills_fails(attention):
    (spilling,) = (name for name in attention if name.endswith("on one warp"))
    row = attention.pop(spilling)
    assert row["spill_bytes"] > 0 and inspection.faults(spilling, row)
    sound = spilling.removesuffix(" on one warp")
    assert not inspection.faults(sound, attention[sound])
    kept = {sound: {field: row[field] for field in compile_report.FIELDS}}
    changed = "\n".join(compile_report.compare(kept, compile_report.committed(90)["rows"], whole=False))
    assert "spill_bytes 0 ->" in changed and "registers" in changed


def test_the_hot_loop_is_one_tile(attention):
    """One pass moves the bytes and computes the FLOPs that the case states for a tile."""
    rows = {name: row for name, row in attention.items() if not name.endswith("on one warp")}
    assert len(rows) == 3
    for name, row in rows.items():
        tile = row["tile"]
        assert tile["moved_bytes"] == tile["bytes"] > 0, name
        assert tile["counted_flops"] == tile["tensor_flops"] > 0, name
        assert tile["special_instructions"] * 32 * row["warps"] >= tile["tensor_flops"] // 512, (
            name
        )  # exp of each score


def test_rows_equal_the_committed_table(attention):
    rows = {name: row for name, row in attention.items() if not name.endswith("on one warp")}
    assert all(row["ldgsts128"] and (row["hgmma"] or " m128 " not in name) for name, row in rows.items())
    kept = {name: {field: row[field] for field in compile_report.FIELDS} for name, row in rows.items()}
    assert not compile_report.findings(kept, 90, whole=False)


@pytest.mark.slow
def test_json_alone_on_standard_output(capfd):
    assert cli.main(["inspect", "compact_kv", "--arch", "sm_90", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report.keys() == {"arch", "rows"} and report["arch"] == "sm_90"
    names = [f"{row['op']}/{row['config']}" for row in report["rows"]]
    assert names == [name for name, _ in inspection.cases(90, "^compact_kv/")]
    expected = compile_report.committed(90)
    for name, row in zip(names, report["rows"], strict=True):
        assert {"registers", "spills", "shared_bytes", "occupancy", "mix", "tile_bytes", "limiter"} <= row.keys()
        assert 0 < row["occupancy"] <= 1 and row["spills"] == 0
        if expected["versions"] == compile_report.versions():
            assert row["registers"] == expected["rows"][name]["registers"]
    sixteen = report["rows"][0]["mix"]
    assert sixteen["load_128"] and sixteen["store_128"] and not sixteen["tensor"]


def row(**changes):
    tile = {
        "bytes": 32768,
        "tensor_flops": 4e6,
        "instructions": 500,
        "fp32_instructions": 50,
        "special_instructions": 40,
    }
    tile |= changes.pop("tile", {})
    return {"registers": 128, "shared_bytes": 0, "warps": 4, "stages": 3, "ldgsts128": 8, "tile": tile} | changes


@pytest.mark.parametrize(
    ("changes", "arch", "programs", "limit"),
    [
        ({}, 90, 4, "registers"),  # 128 x 32 = 4096 a warp, 16 warps
        ({"registers": 129}, 90, 3, "registers"),  # given out by eights: 136 x 32 = 4352, 3 warps a scheduler
        ({"registers": 255, "warps": 8}, 90, 1, "registers"),
        ({"registers": 24}, 90, 16, "warps"),
        ({"registers": 24, "warps": 1}, 90, 32, "programs"),
        ({"shared_bytes": 75 * 1024}, 90, 3, "shared memory"),
        ({"shared_bytes": 76 * 1024}, 90, 2, "shared memory"),  # one KiB more for each program: 231 of 228
        ({"shared_bytes": 75 * 1024}, 80, 2, "shared memory"),
    ],
)
def test_occupancy(changes, arch, programs, limit):
    assert inspection.occupancy(row(**changes), arch) == (programs, limit)


@pytest.mark.parametrize(
    ("changes", "programs", "limit"),
    [
        ({}, 2, "memory"),  # 32 KiB at 25.4 GB/s a multiprocessor: 1.29 us, 0.53 us of tensor cores, 0.27 us of issue
        ({"tile": {"tensor_flops": 4e7}}, 2, "tensor cores"),
        ({"tile": {"instructions": 5000}}, 2, "instruction issue"),
        ({"tile": {"special_instructions": 900}}, 2, "special functions"),
        ({"tile": {"fp32_instructions": 9000}}, 2, "fp32 units"),
        ({"tile": {"bytes": 0}}, 2, "latency"),
        ({"tile": {"bytes": 4096, "tensor_flops": 0, "instructions": 50, "special_instructions": 0}}, 1, "memory"),
        (
            {"tile": {"bytes": 2048, "tensor_flops": 0, "instructions": 20, "special_instructions": 0}},
            1,
            "bytes in flight",
        ),
    ],
)
def test_limiter(changes, programs, limit):
    changes = {"tile": {"fp32_instructions": 0}, **changes}
    assert inspection.limiter(row(**changes), 90, programs) == limit


def test_hot_loop():
    names = ["MOV", "LDG.E", "BRA", "LDG.E.128", "FADD", "BRA", "LDG.E.128", "LDG.E.128", "BRA", "BRA", "EXIT", "BRA"]
    targets = [None, None, 1, None, None, 3, None, None, 6, 0, None, 11]
    code = [Instruction(*pair) for pair in zip(names, targets, strict=True)]
    assert inspection.hot_loop(code, 32 * 16, 32) == code[3:6]
    assert inspection.hot_loop(code, 32 * 32, 32) == code[6:9]
    assert inspection.hot_loop(code, 32 * 40, 32) == code[:10]
    assert inspection.hot_loop(code, 32 * 999, 32) == code


@pytest.mark.parametrize("arch", ARCHES)
def test_committed_occupancy(arch):
    """Every default configuration fits."""
    for name, row in compile_report.committed(arch)["rows"].items():
        assert inspection.occupancy(row, arch)[0] >= 1, name


def test_the_progress_advances_while_kernels_compile(monkeypatch, tmp_path):
    """Each line of a process that compiles is a step: the first ones come long before its rows."""
    program = tmp_path / "python"
    lines = ["started", "torch imported", "kernels imported", "compact_kv/a", "compact_kv/b"]
    wait = f"while [ ! -e {tmp_path}/seen ]; do sleep .05; done"
    program.write_text("\n".join(["#!/bin/sh", *(f"echo {line}" for line in lines), wait, "echo '{}'", ""]))
    program.chmod(0o755)
    monkeypatch.setattr(inspection.sys, "executable", str(program))
    steps = []

    def progress():
        steps.append(None)
        if len(steps) == len(lines):
            (tmp_path / "seen").touch()  # else the process never ends

    assert inspection.compile_table(90, "^compact_kv/", 1, progress) == {}
    assert len(steps) == len(lines) + 1 == 2 + inspection.PROCESS_STEPS


def test_a_process_that_fails_gives_its_error(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho started\necho no compiler >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(inspection.sys, "executable", str(program))
    with pytest.raises(ChildProcessError, match="inspect: sm_90 does not compile:\nno compiler"):
        inspection.compile_table(90, "^compact_kv/")


def test_refusals():
    with pytest.raises(ValueError, match="inspect: arch must be one of sm_80, sm_90, sm_100, got sm_70"):
        inspection.compile_table(70)
    with pytest.raises(SystemExit):
        cli.main(["inspect", "attention"])


def test_table(capsys):
    """Nothing is cut off, in a terminal of any width."""
    from rich.console import Console

    counted = {"bytes": 32768, "tensor_flops": 4194304, "fp32_flops": 0, "instructions": 500}
    counted |= {"fp32_instructions": 0, "special_instructions": 40}
    mix = {"tensor": 64, "special": 21, "barrier": 17, "local": 0, "async_load_128": 96, "load_128": 2, "load_32": 5}
    rows = {
        name: row(tile=tile, shared_bytes=71936, spill_bytes=0, instructions=1496, mix=mix)
        for name, tile in (
            ("tree_attention/bf16 d128 m128 n64 split window softcap", counted),
            ("op/walk", {"bytes": 0}),
        )
    }
    described = [inspection.describe(name, found, 90) for name, found in rows.items()]
    Console(width=inspection.TABLE_WIDTH).print(inspection.as_table(described, 90))
    lines = capsys.readouterr().out.splitlines()
    assert not any("…" in line for line in lines)
    shown = next(line for line in lines if "window softcap" in line).split()
    assert shown[-15:] == "128 0 70.2 19 shared memory 64 98 5 21 17 32.0 128.0 2000 memory".split()
    assert next(line for line in lines if line.split()[:1] == ["walk"]).split()[-1] == "latency"
