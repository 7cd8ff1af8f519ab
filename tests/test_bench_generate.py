"""bench_generate times captured rounds, or says that it did not."""

import sys
from pathlib import Path

import pytest

from test_engine import capture_here

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import bench_generate  # noqa: E402
from bench_generate import GRAPHS, PLAIN, Call, Case, check_graphs  # noqa: E402

from test_bench import bench, rows  # noqa: E402
from test_bench import quick as quick  # noqa: E402, F401

SHORT = Case("graphs", (PLAIN,), context=12, tokens=(8, 40), turns=1, options=GRAPHS)


def test_a_short_call_that_is_not_captured_gives_no_row(tmp_path, monkeypatch):
    """Eight tokens are not worth a capture: the difference would hold what the long call's captures took. (Where both
    are captured: the rehearsal of gpu.sh.)"""
    capture_here(monkeypatch, 1)
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], [SHORT]) == 1
    for row in rows(tmp_path, bench="generate"):
        assert "p50_tokens_s" not in row and "8 and 40 tokens must capture as many graphs and replay" in row["failed"]


@pytest.mark.parametrize("short", [Call(1.0, 0, 0), Call(1.0, 4, 20), Call(1.0, 2, 90)])
def test_calls_must_differ_by_replayed_rounds_alone(short):
    check_graphs(SHORT, [(Call(1.0, 2, 20), Call(2.0, 2, 60))])
    with pytest.raises(RuntimeError, match="must capture as many graphs and replay them, got"):
        check_graphs(SHORT, [(Call(1.0, 2, 20), Call(2.0, 2, 60)), (short, Call(2.0, 2, 60))])


def test_every_case_that_asks_for_graphs_is_long_enough():
    for case in bench_generate.CASES:
        if dict(case.options).get("cuda_graphs"):
            deepest = bench_generate.LOOKUP if case.repeats else bench_generate.DEPTH
            # the prompt's token, one round that is not captured, and enough left to be worth a capture
            assert case.tokens[0] >= 1 + (deepest + 1) + bench_generate.WORTH_CAPTURING
