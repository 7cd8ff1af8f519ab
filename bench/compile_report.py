"""What the compiler makes of every default configuration of every kernel, for GPUs that need not be there.

    python bench/compile_report.py                 # rewrites bench/results/compile/sm_80.json, sm_90.json, sm_100.json
    python bench/compile_report.py --check         # compares with them instead; exit status 1 where they differ
    python bench/compile_report.py --arch 90 --only "tree_attention/bf16 d128" --print

The tables keep the compiler's numbers and the instructions that must not change unseen; `specdec-triton inspect` shows
the rest of what `specdec_triton.tools.inspection` finds.
"""

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "compile"

sys.path.insert(0, str(ROOT))
from specdec_triton.tools.inspection import ARCHES, COUNTED, compile_table, faults  # noqa: E402

FIELDS = ("registers", "spill_bytes", "shared_bytes", "warps", "stages", *COUNTED, "instructions")
FIELDS += ("tensor_cores", "wide_loads")
# may differ between versions of the compiler; --check tells, and does not fail
ADVISORY = ("instructions",)


def table(arch: int, only: str = "") -> dict[str, dict]:
    """{"op/case name": row} for sm_`arch`, compiled now."""
    return {name: {field: row[field] for field in FIELDS} for name, row in compile_table(arch, only).items()}


def committed(arch: int) -> dict:
    return json.loads((RESULTS / f"sm_{arch}.json").read_text())


def versions() -> dict:
    import triton

    return {"triton": triton.__version__}


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
    parser.add_argument(
        "--only", default="", help="cases whose name matches this regular expression; the rest of a table stays"
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed tables")
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args()
    wrong = []
    for arch in options.arch or ARCHES:
        rows = table(arch, options.only)
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
            if options.only:
                expected = committed(arch)
                if expected["versions"] != versions():
                    parser.error(f"--only must have the table's {expected['versions']}, got {versions()}")
                rows = expected["rows"] | rows
            text = json.dumps({"versions": versions(), "rows": rows}, indent=0, sort_keys=True)
            # one row a line
            text = re.sub(r"(?<=[,{])\n(?=\"(?!rows|versions)\w+\":)", " ", text).replace("\n}", " }")
            (RESULTS / f"sm_{arch}.json").write_text(text + "\n")
            print(f"sm_{arch}: {len(rows)} configurations")
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
