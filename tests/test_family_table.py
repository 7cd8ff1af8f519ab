"""The README's table of models is what the rows of the tests give."""

import importlib.util
from pathlib import Path

import pytest

from families import FAMILIES, REFUSED

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("family_table", ROOT / "bench" / "family_table.py")
family_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(family_table)


def row(family, implementation="reference", transformers="5.9.0", result="exact", **more):
    origin = {"device": "cpu", "torch": "2", "commit": "abc", "date": "2026-01-01T00:00:00"}
    model = {"family": family, "model": family.upper(), "attention": "GQA", "tests": 2}
    return {**origin, **model, "implementation": implementation, "transformers": transformers, "result": result, **more}


def test_the_readmes_table_is_made_of_the_rows():
    text = (ROOT / "README.md").read_text()
    assert text == family_table.with_table(text, family_table.read_rows()), "run: python bench/family_table.py table"


def test_every_family_has_its_rows_in_every_version():
    rows = family_table.read_rows()
    found = {(row["transformers"], row["family"], row["implementation"]): row["result"] for row in rows}
    for version in {row["transformers"] for row in rows}:
        for family in FAMILIES:
            for implementation in ("reference", "interpreter"):
                assert found[version, family, implementation] == "exact"
        for family in REFUSED:
            assert found[version, family, family_table.REFUSING] == "refused"


def test_versions_are_merged_and_failures_shown():
    refused = {"result": "refused", "message": "patch: the model must be small, got C: make it so"}
    lines = family_table.table(
        [
            row("a"),
            row("a", transformers="5.10.0"),
            row("b"),
            row("b", "interpreter", result="wrong"),
            row("d_window"),
            row("d_window", transformers="5.10.0"),
            row("c", "patch", **refused),
        ]
    ).splitlines()
    assert lines == [
        "| attention | models | reference, 5.9.0 | reference, 5.10.0 | kernels, interpreter, 5.9.0 |",
        "| --- | --- | --- | --- | --- |",
        "| GQA | `A`, `D_WINDOW` with a window | exact | exact | not run |",
        "| GQA | `B` | exact | not run | **wrong** |",
        "",
        "| a model must | or is refused when patched | 5.9.0 | 5.10.0 |",
        "| --- | --- | --- | --- |",
        "| be small | `C` | refused | not run |",
        "",
        "transformers 5.9.0 and 5.10.0: 14 tests on cpu, torch 2, 2026-01-01, commit abc.",
    ]


def test_a_text_without_markers_is_refused():
    with pytest.raises(ValueError, match="must have the markers"):
        family_table.with_table("text", [row("a")])
