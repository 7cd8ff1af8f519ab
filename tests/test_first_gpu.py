"""The selection of tests that run first on a new GPU: it is small and covers every feature of the kernels."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import test_kernel_accept_sample as sample
import test_kernel_tree_attention as attention
from first_gpu import MOST, covering, turns
from specdec_triton import ops

ROOT = Path(__file__).resolve().parent.parent
MODULES = {op: importlib.import_module(f"test_kernel_{op}") for op in sorted(ops.OPS)}
MODULES |= {name: importlib.import_module(f"test_{name}") for name in ("library", "captured_drafts")}
CHOSEN = {"test_on_gpu", "test_real_sizes"}  # tests with a selection of cells; of other tests all cells run
DTYPES = {torch.bfloat16, torch.float16, torch.float32}


def marks_of(test):
    return {mark.name: mark for mark in getattr(test, "pytestmark", [])}


def gpu_tests(module):
    """{name: test} of the tests marked gpu."""
    return {name: test for name, test in vars(module).items() if name[:5] == "test_" and "gpu" in marks_of(test)}


def cells(test, only_first=True):
    """The cells of a test as [{argument: value}], as pytest makes them from its parametrize marks."""
    axes = []
    for mark in test.pytestmark:
        if mark.name == "parametrize":
            names, values = mark.args
            single, axis = isinstance(names, str), []
            for value in values:
                is_param = hasattr(value, "marks")
                if only_first and test.__name__ in CHOSEN and not any(each.name == "first_gpu" for each in value.marks):
                    continue
                value = value.values if is_param else (value,) if single else value
                axis.append(dict(zip([names] if single else names, value, strict=True)))
            axes.append(axis)
    return [{name: value for part in cell for name, value in part.items()} for cell in itertools.product(*axes)]


def first(module):
    return [cell for test in gpu_tests(module).values() for cell in cells(test)]


def test_there_are_few_of_each_kernel():
    counts = {name: len(first(module)) for name, module in MODULES.items()}
    assert sum(counts.values()) <= MOST and min(counts.values()) >= 6 and counts["library"] >= len(ops.OPS)


def test_only_large_products_of_parameters_are_cut():
    """The selection therefore has all tests of races, captured graphs and 64-bit offsets, and none that runs without a
    GPU."""
    for module in MODULES.values():
        for name, test in vars(module).items():
            if name[:5] == "test_":
                marks = marks_of(test)
                assert ("first_gpu" in marks) == ("gpu" in marks and name not in CHOSEN), name


def test_each_dtype_of_each_kernel_that_has_one():
    for op in ("tree_attention", "accept_greedy", "accept_sample"):
        assert {cell["dtype"] for cell in first(MODULES[op]) if "dtype" in cell} == DTYPES, op


def test_each_rule_sampling_and_filter():
    chosen = cells(sample.test_real_sizes)
    assert {(cell["rule"], cell["sampling"]) for cell in chosen} == set(sample.CELLS)
    assert {(cell["rule"], cell["kind"]) for cell in chosen} == set(itertools.product(sample.RULES, sample.FILTERS))
    for name, values in (("rule", sample.RULES), ("kind", sample.FILTERS), ("sampling", sample.SAMPLING)):
        assert {(cell[name], cell["dtype"]) for cell in chosen} == set(itertools.product(values, DTYPES))


def test_each_feature_and_shape_of_attention():
    everything, chosen = cells(attention.test_on_gpu, only_first=False), cells(attention.test_on_gpu)
    assert len(everything) > 4 * len(chosen)
    axes = everything[0]
    for name, other in itertools.permutations(axes, 2):  # all pairs in bf16; each value in the other dtypes
        for dtype in DTYPES:
            pairs, wanted = (
                {(str(cell[name]), str(cell[other]) if dtype == torch.bfloat16 else "") for cell in some}
                for some in ([each for each in found if each["dtype"] == dtype] for found in (chosen, everything))
            )
            assert pairs == wanted
    rows, slots = zip(*(cell["size"] for cell in chosen), strict=True)
    assert max(rows) >= 200 and min(slots) <= attention.kernel.SHORT_SLOTS < max(slots)
    assert {"sliding_window", "chunk_size", "softcap", "sinks"} == set().union(*attention.OPTIONS) - {"scale"}


def test_covering():
    axes = [1, 2, 3], "ab", [None, {}]
    chosen = covering(list(itertools.product(*axes)))
    assert len(chosen) == 6 and chosen[0] == (1, "a", None)
    for one, other in itertools.combinations(range(3), 2):
        assert len({(str(cell[one]), str(cell[other])) for cell in chosen}) == len(axes[one]) * len(axes[other])
    assert turns("ab", [1, 2, 3]) == [("a", 1), ("b", 2), ("a", 3)]


@pytest.mark.slow
def test_compilations_are_counted_without_a_gpu():
    command = [sys.executable, "bench/count_compilations.py", "--processes", "1", "--", "-m", "first_gpu"]
    command += ["tests/test_kernel_compact_kv.py", "tests/test_kernel_accept_greedy.py", "-k", "captured"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    # tests, launches, compilations, most compilations of one test; launches after the failed replay are not counted
    assert ["all", "2", "6", "3", "2"] in lines, done.stdout + done.stderr
    assert "compilations in one of 1 processes: 3 if all are shared, 3 if none are" in done.stdout
