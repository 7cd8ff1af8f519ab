"""Compiles every default configuration of every kernel and writes or checks a checkout's tables; needs no GPU.

    python -m specdec_triton.tools.compile_report            # rewrites bench/results/compile/sm_80.json, ...
    python -m specdec_triton.tools.compile_report --check    # compares with them instead; exit status 1 if they differ
    python -m specdec_triton.tools.compile_report --arch 90 --only "tree_attention/bf16 d128" --print

The tables hold the compiler's numbers and the instructions that must not change unnoticed. `specdec-triton inspect`
shows all that `specdec_triton.tools.inspection` finds.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable

from .inspection import ARCHES, COUNTED, FOLDER, compile_table, faults

RESULTS = FOLDER.parent / "bench" / "results" / "compile"
FIELDS = ("registers", "spill_bytes", "shared_bytes", "warps", "stages", *COUNTED, "instructions")
FIELDS += ("tensor_cores", "wide_loads")
# may differ between versions of the compiler; --check ignores them
ADVISORY = ("instructions",)


def table(arch: int, only: str = "", progress: Callable[[], None] = lambda: None) -> dict[str, dict]:
    """{"op/case name": row} for sm_`arch`, compiled now; `progress` as in `compile_table`."""
    rows = compile_table(arch, only, progress=progress)
    return {name: {field: row[field] for field in FIELDS} for name, row in rows.items()}


def committed(arch: int) -> dict:
    return json.loads((RESULTS / f"sm_{arch}.json").read_text())


def versions() -> dict:
    import triton

    return {"triton": triton.__version__}


def compare(rows: dict, expected: dict, whole: bool = True) -> list[str]:
    """Differences of `rows` from the committed table; with `whole`, rows missing from either are differences too."""
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


def findings(rows: dict, arch: int, whole: bool = True) -> list[str]:
    """Faults of rows, and their differences from the committed table if this Triton made it."""
    expected = committed(arch)
    found = [fault for name, row in rows.items() for fault in faults(name, row)]
    return found + (compare(rows, expected["rows"], whole) if expected["versions"] == versions() else [])


def write(arch: int, rows: dict) -> None:
    text = json.dumps({"versions": versions(), "rows": rows}, indent=0, sort_keys=True)
    # one row a line
    text = re.sub(r"(?<=[,{])\n(?=\"(?!rows|versions)\w+\":)", " ", text).replace("\n}", " }")
    (RESULTS / f"sm_{arch}.json").write_text(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHES, action="append", help="default: all")
    parser.add_argument(
        "--only", default="", help="only cases whose name matches this regular expression; other rows stay"
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed tables")
    parser.add_argument("--print", action="store_true", help="print the rows and write nothing")
    options = parser.parse_args()
    wrong = []
    for arch in options.arch or ARCHES:
        rows, expected = table(arch, options.only), committed(arch)
        if options.print:
            for name, row in rows.items():
                print(f"sm_{arch} {name}: " + " ".join(f"{field}={row[field]}" for field in row))
            continue
        same_versions = expected["versions"] == versions()
        if options.check:
            if not same_versions:
                print(f"sm_{arch}: the table was made with {expected['versions']}, this is {versions()}")
            wrong += [f"sm_{arch} {found}" for found in findings(rows, arch, whole=not options.only)]
            continue
        wrong += [f"sm_{arch} {fault}" for name, row in rows.items() for fault in faults(name, row)]
        if options.only and not same_versions:
            parser.error(f"--only must have the table's {expected['versions']}, got {versions()}")
        rows = expected["rows"] | rows if options.only else rows
        write(arch, rows)
        print(f"sm_{arch}: {len(rows)} configurations")
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
