"""Which models are exact and which are refused: rows from the tests, and the README's table from the rows.

    python bench/family_table.py run    # tests/test_families.py, slow cells too, under the transformers installed here
    python bench/family_table.py table  # the table between the README's markers, from the rows of all versions

A run under another transformers adds a file of rows to `bench/results/families`, and its columns to the table.
"""

import argparse
import json
import pathlib
import re
import sys
from collections import defaultdict

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "families"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by bench/family_table.py: begin -->", "<!-- made by bench/family_table.py: end -->"
IMPLEMENTATIONS = {"reference": "reference", "interpreter": "kernels, interpreter", "triton": "kernels"}
REFUSING = "patch"  # the implementation of a row about a refusal


class Recorder:
    """A pytest plugin: the outcomes by (family, implementation), and what refusals said."""

    def __init__(self, kernels: str):
        self.kernels = kernels
        self.outcomes: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.messages: dict[str, str | None] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or (report.when != "call" and report.outcome == "passed"):
            return report
        family = parameters["family"]
        implementation = parameters.get(
            "impl", REFUSING if item.originalname == "test_refused_by_name" else "reference"
        )
        implementation = self.kernels if implementation == "triton" else implementation
        self.outcomes[family, implementation].append(report.outcome)
        self.messages[family] = dict(report.user_properties).get("refusal")
        return report


def run(pytest_arguments: list[str]) -> int:
    """Run the tests and write this version's rows; the exit status of pytest."""
    import torch
    from _common import provenance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = provenance(device)
    recorder = Recorder("triton" if device.type == "cuda" else "interpreter")
    tests = ROOT / "tests" / "test_families.py"
    status = pytest.main(["-q", "-p", "no:cacheprovider", str(tests), *pytest_arguments], plugins=[recorder])
    families = sys.modules["families"]
    rows = []
    for (family, implementation), outcomes in recorder.outcomes.items():
        refused = implementation == REFUSING
        exact = set(outcomes) == {"passed"}
        description = (families.REFUSED if refused else families.FAMILIES)[family]
        row = {"family": family, "model": description.model, "implementation": implementation}
        row |= {"message": recorder.messages.get(family)} if refused else {"attention": description.features}
        row |= {"tests": len(outcomes), "result": ("refused" if refused else "exact") if exact else "wrong"}
        rows.append(row | origin)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"transformers-{origin['transformers']}-{device.type}.json"
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} rows in {file.relative_to(ROOT)}")
    return int(status)


def read_rows() -> list[dict]:
    return [row for file in sorted(RESULTS.glob("*.json")) for row in json.loads(file.read_text())]


def table(rows: list[dict]) -> str:
    """Markdown: models by what their attention asks for, then the refused by reason."""
    versions = sorted({row["transformers"] for row in rows}, key=_by_number)
    found = {(row["family"], row["implementation"], row["transformers"]): row for row in rows}
    ran = {(row["implementation"], row["transformers"]) for row in rows}
    columns = [(how, version) for how in IMPLEMENTATIONS for version in versions if (how, version) in ran]
    groups = defaultdict(list)
    for family, label, attention in _families(rows, refused=False):
        cells = [found.get((family, *column), {"result": "not run"})["result"] for column in columns]
        groups[(attention or "plain", *cells)].append(label)
    heads = ["attention", "models", *(f"{IMPLEMENTATIONS[how]}, {version}" for how, version in columns)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for (attention, *cells), labels in sorted(groups.items()):
        lines.append(_line([attention, ", ".join(labels), *(f"**{c}**" if c == "wrong" else c for c in cells)]))

    refusals = defaultdict(list)
    for family, label, message in _families(rows, refused=True):
        cells = [found.get((family, REFUSING, version), {"result": "not run"})["result"] for version in versions]
        refusals[(_reason(message), *cells)].append(label)
    heads = ["a model must", "or is refused when patched", *versions]
    lines += ["", _line(heads), _line(["---"] * len(heads))]
    lines += [_line([reason, ", ".join(labels), *cells]) for (reason, *cells), labels in sorted(refusals.items())]

    lines += [
        "",
        f"transformers {' and '.join(versions)}: {_origin(rows)}.",
    ]
    return "\n".join(lines)


def _families(rows: list[dict], refused: bool) -> list[tuple[str, str, str]]:
    """(family, label, attention or refusal), each family once, as last seen."""
    seen = {}
    for row in rows:
        if (row["implementation"] == REFUSING) == refused:
            label = f"`{row['model']}`" + (" with a window" if row["family"].endswith("_window") else "")
            seen[row["family"]] = (row["family"], label, row["message"] if refused else row["attention"])
    return list(seen.values())


def _reason(message: str | None) -> str:
    found = re.search(r" must (.*?), got ", message or "")
    return found.group(1) if found else "**wrong**"


def _origin(rows: list[dict]) -> str:
    """Where the rows are from, in words."""
    devices, torches, commits = (
        ", ".join(sorted({row[name] for row in rows})) for name in ("device", "torch", "commit")
    )
    dates = sorted({row["date"][:10] for row in rows})
    return (
        f"{sum(row['tests'] for row in rows)} tests on {devices}, torch {torches}, "
        f"{' to '.join(sorted({dates[0], dates[-1]}))}, commit {commits}"
    )


def _by_number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_table(text: str, rows: list[dict]) -> str:
    """`text` with the table of `rows` between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"family_table: the text must have the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("pytest_arguments", nargs="*", help="after --, for `run`")
    options = parser.parse_args()
    if options.action == "run":
        return run(options.pytest_arguments)
    README.write_text(with_table(README.read_text(), read_rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
