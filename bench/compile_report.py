"""What the compiler makes of every default configuration of every kernel, for GPUs that need not be there.

    python bench/compile_report.py                 # rewrites bench/results/compile/sm_80.json, sm_90.json, sm_100.json
    python bench/compile_report.py --check         # compares with them instead; exit status 1 where they differ
    python bench/compile_report.py --arch 90 --only "tree_attention/bf16 d128" --print

A case is an entry of its module's `compile_cases` (see kernels/_common.py). The compiler runs in a subprocess:
Triton's interpreter and its compiler cannot share a process.
"""

import argparse
import collections
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "compile"
ARCHES = (80, 90, 100)
OPS = ("tree_attention", "accept_greedy", "accept_sample", "compact_kv")

# SASS: what a mnemonic counts as; copies by 128 bits, from global memory to registers, to shared memory, and back
COUNTED = {
    "hmma": r"HMMA|UTC\w*MMA",
    "hgmma": r"HGMMA",
    "ldg128": r"LDG\.\S*128",
    "ldgsts128": r"LDGSTS\.\S*128",
    "stg128": r"STG\.\S*128",
    "local": r"LDL|STL",
}
# may differ between versions of the compiler; --check tells, and does not fail
ADVISORY = ("instructions",)


def measure(case, arch: int) -> dict:
    """Compile one case for sm_`arch`: registers and bytes a thread, bytes of shared memory, instructions by kind."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specdec_triton.kernels._common import FP_FUSION

    names = case.kernel.arg_names
    given = set(case.signature) | set(case.constexprs)
    if given != set(names):
        raise ValueError(f"{case.name}: arguments missing {set(names) - given}, unknown {given - set(names)}")
    signature = {name: case.signature.get(name, "constexpr").removesuffix(":16") for name in names}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if case.signature.get(name, "").endswith(":16")
    }
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constexprs, attrs),
        target=GPUTarget("cuda", arch, 32),
        options={**FP_FUSION, **case.options},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _tool("cuobjdump", "-sass", str(cubin), path=os.path.dirname(_binary("nvdisasm")))
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    row = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
    }
    counts = collections.Counter()
    for mnemonic in mnemonics:
        for kind, pattern in COUNTED.items():
            counts[kind] += bool(re.match(pattern, mnemonic))
    row |= {kind: counts[kind] for kind in COUNTED}
    row["instructions"] = len(mnemonics)
    return row


def _binary(name: str) -> str:
    import triton

    return str(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _tool(name: str, *arguments: str, path: str = "") -> str:
    env = os.environ | {"PATH": os.pathsep.join([path, os.environ.get("PATH", "")])}
    return subprocess.run([_binary(name), *arguments], check=True, capture_output=True, text=True, env=env).stdout


def cases(arch: int, only: str = ""):
    """("op/case name", case) of every kernel module whose name matches the regular expression `only`."""
    for op in OPS:
        for case in importlib.import_module(f"specdec_triton.kernels.{op}").compile_cases(arch):
            name = f"{op}/{case.name}"
            if re.search(only, name):
                yield name, case


def compile_table(arch: int, only: str = "") -> dict:
    """{"op/case name": row} for sm_`arch`, compiled in a process of its own."""
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--worker", "--arch", str(arch), "--only", only]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compile_report: sm_{arch} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def committed(arch: int) -> dict:
    return json.loads((RESULTS / f"sm_{arch}.json").read_text())


def versions() -> dict:
    import triton

    return {"triton": triton.__version__}


def faults(name: str, row: dict) -> list[str]:
    """What no default configuration may do."""
    found = []
    if row["spill_bytes"] or row["local"]:
        found.append(f"{name}: spills {row['spill_bytes']} bytes, {row['local']} local accesses")
    if row["tensor_cores"] and not row["hmma"] + row["hgmma"]:
        found.append(f"{name}: no tensor core instruction")
    if row["wide_loads"] and not row["ldg128"] + row["ldgsts128"]:
        found.append(f"{name}: no 128-bit load")
    return found


def compare(rows: dict, expected: dict, whole: bool = True) -> list[str]:
    """Where `rows` differ from the committed table; `whole`: nothing may be missing from either."""
    found = []
    for name, row in rows.items():
        if name not in expected:
            found.append(f"{name}: not in the committed table")
            continue
        for field in row.keys() | expected[name].keys():
            if field not in ADVISORY and row.get(field) != expected[name].get(field):
                found.append(f"{name}: {field} {expected[name].get(field)} -> {row.get(field)}")
    if whole:
        found += [f"{name}: in the committed table, not compiled" for name in expected.keys() - rows.keys()]
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="cases whose name matches this regular expression")
    parser.add_argument("--check", action="store_true", help="compare with the committed tables")
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only and not (options.check or options.print or options.worker):
        parser.error("--only needs --check or --print: a table is written whole")
    if options.worker:
        table = {}
        for name, case in cases(options.arch[0], options.only):
            wanted = {"tensor_cores": case.tensor_cores, "wide_loads": case.wide_loads}
            table[name] = measure(case, options.arch[0]) | wanted
        json.dump(table, sys.stdout)
        return 0
    wrong = []
    for arch in options.arch or ARCHES:
        rows = compile_table(arch, options.only)
        wrong += [f"sm_{arch} {fault}" for name, row in rows.items() for fault in faults(name, row)]
        if options.print:
            for name, row in rows.items():
                print(f"sm_{arch} {name}: " + " ".join(f"{field}={row[field]}" for field in row))
        elif options.check:
            expected = committed(arch)
            if expected["versions"] != versions():
                print(f"sm_{arch}: the table was made with {expected['versions']}, this is {versions()}")
            wrong += [f"sm_{arch} {found}" for found in compare(rows, expected["rows"], whole=not options.only)]
        else:
            RESULTS.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"versions": versions(), "rows": rows}, indent=0, sort_keys=True)
            # one row a line
            text = re.sub(r"(?<=[,{])\n(?=\"(?!rows|versions)\w+\":)", " ", text).replace("\n}", " }")
            (RESULTS / f"sm_{arch}.json").write_text(text + "\n")
            print(f"sm_{arch}: {len(rows)} configurations")
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
