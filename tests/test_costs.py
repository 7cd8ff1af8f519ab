"""Costs: tables, costs learned from rounds, and measured costs."""

import pytest

from specdec_triton.tree_choice import costs as module
from specdec_triton.tree_choice.costs import CPU_PRIOR, Costs, OnlineCosts, measure_costs


def test_tables_are_read_between_before_and_beyond_their_points():
    costs = Costs(verify=((2, 4.0), (6, 6.0), (8, 10.0)), draft=((2, 1.0), (4, 1.5)), other=0.25)
    assert [costs.verify_seconds(n) for n in (1, 2, 4, 6, 7, 8, 11)] == [4, 4, 5, 6, 8, 10, 16]
    assert [costs.draft_seconds(d) for d in (0, 1, 2, 3, 4, 6)] == [0, 0.5, 1, 1.25, 1.5, 2]
    assert costs.round_seconds(7, 3) == 8 + 1.25 + 0.25
    flat = Costs(verify=((4, 2.0),), draft=((3, 0.6),))
    assert (flat.verify_seconds(1), flat.verify_seconds(99)) == (2, 2)
    assert flat.draft_seconds(5) == pytest.approx(1.0) and Costs(verify=((1, 1.0),)).draft_seconds(9) == 0
    assert CPU_PRIOR.verify_seconds(6) == 5 * CPU_PRIOR.verify_seconds(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify": ()}, "verify must have an entry, got none"),
        ({"verify": 3}, "verify must be .* pairs.*, got 3"),
        ({"verify": ((1, 1.0, 2),)}, "verify must be .* pairs"),
        ({"verify": ((0, 1.0),)}, "verify must be .*at least 1"),
        ({"verify": ((1.5, 1.0),)}, "verify must be .*whole number"),
        ({"verify": ((1, 0.0),)}, "verify must be .*above 0"),
        ({"verify": ((1, float("nan")),)}, "verify must be .*finite"),
        ({"verify": ((1, 1.0), (1, 2.0))}, "the first increasing"),
        ({"verify": ((1, 2.0), (2, 1.0))}, "the second not decreasing"),
        ({"verify": ((1, 1.0),), "draft": ((0, 1.0),)}, "draft must be .*at least 1"),
        ({"verify": ((1, 1.0),), "draft": ((1, -1.0),)}, "draft must be .*of at least 0"),
        ({"verify": ((1, 1.0),), "other": float("inf")}, "other must be finite seconds of at least 0, got inf"),
    ],
)
def test_bad_costs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^Costs: .*{message}"):
        Costs(**arguments)


def test_bad_calls_are_refused():
    costs = Costs(verify=((1, 1.0),))
    with pytest.raises(ValueError, match="^Costs.verify_seconds: num_nodes must be at least 1, got 0"):
        costs.verify_seconds(0)
    with pytest.raises(ValueError, match="^Costs.draft_seconds: depth must be at least 0, got -1"):
        costs.draft_seconds(-1)
    with pytest.raises(ValueError, match="^OnlineCosts: prior must be a Costs with draft seconds above 0"):
        OnlineCosts(Costs(verify=((1, 1.0),), draft=((1, 0.0),)))
    with pytest.raises(ValueError, match="^OnlineCosts.record: num_nodes must be at least 1, got 0"):
        OnlineCosts().record(0, 0, verify=1.0)
    with pytest.raises(ValueError, match="^OnlineCosts.record: verify must be finite seconds above 0, got 0.0"):
        OnlineCosts().record(2, 1, verify=0.0)
    with pytest.raises(ValueError, match="^OnlineCosts.record: draft must be finite seconds of at least 0, got nan"):
        OnlineCosts().record(2, 1, draft=float("nan"))
    with pytest.raises(ValueError, match="^measure_costs: sizes must be increasing"):
        measure_costs(print, [4, 2])
    with pytest.raises(ValueError, match="^measure_costs: repeats must be at least 1, got 0"):
        measure_costs(print, [1], repeats=0)


def test_nothing_measured_is_the_prior_and_one_size_measured_scales_it():
    learned = OnlineCosts(Costs(verify=((1, 1.0), (6, 5.0)), draft=((1, 0.5),), other=0.1))
    assert learned.costs == learned.prior
    learned.record(1, 0, verify=0.02)
    costs = learned.costs
    assert costs.verify_seconds(1) == 0.02 and costs.other == pytest.approx(0.002)
    assert costs.verify_seconds(11) == pytest.approx(0.02 * 9)
    assert costs.draft_seconds(3) == pytest.approx(0.02 * 1.5)


def test_measured_sizes_replace_the_prior_and_affect_their_neighbours():
    learned = OnlineCosts()
    for _ in range(4):
        learned.record(1, 0, verify=1.0)
        learned.record(6, 5, verify=1.5, draft=0.2)
    costs = learned.costs
    assert (costs.verify_seconds(1), costs.verify_seconds(6)) == (1.0, 1.5)
    assert 1.0 <= costs.verify_seconds(3) <= 1.5
    assert costs.verify_seconds(10) >= 1.5
    # a few more rows cost as little as the measured ones, and many rows as much as the prior says
    assert costs.verify_seconds(12) == pytest.approx(1.5 + 0.1 * 6)
    assert costs.verify_seconds(32) == pytest.approx(1.5 + 0.1 * 6 + 0.8 * 20)
    assert costs.draft_seconds(5) == pytest.approx(0.2) and costs.draft_seconds(10) == pytest.approx(0.4)


def test_one_slow_round_moves_nothing_and_lasting_change_is_followed():
    learned = OnlineCosts()
    for _ in range(2 * module.WINDOW):
        learned.record(1, 0, verify=1.0)
    learned.record(4, 3, verify=100.0)  # the first round of this size
    assert learned.costs.verify_seconds(4) == pytest.approx(CPU_PRIOR.verify_seconds(4))
    learned.record(1, 0, verify=100.0)
    assert learned.costs.verify_seconds(1) == 1.0
    for _ in range(module.WINDOW):
        learned.record(1, 0, verify=3.0)
    assert learned.costs.verify_seconds(1) == 3.0


def test_learned_costs_never_decrease_with_the_rows():
    learned = OnlineCosts()
    for _ in range(5):
        for size, seconds in ((1, 1.0), (11, 3.0), (12, 2.0), (16, 2.2)):
            learned.record(size, size - 1, verify=seconds, draft=1.0 / size)
    seconds = [learned.costs.verify_seconds(n) for n in range(1, 40)]
    assert seconds == sorted(seconds)
    # 11 and 12 rows contradict each other, so both and 16 have their mean
    assert seconds[10] == seconds[11] == seconds[15] == pytest.approx(2.4)
    drafts = [learned.costs.draft_seconds(d) for d in range(40)]
    assert drafts == sorted(drafts)


def test_timing_warms_up_takes_the_median_and_waits_for_the_device(monkeypatch):
    clock, runs, waits = [0.0], [], []
    # the first run of a size is slow, and one timed run of each size is disturbed
    slow = {(1, 0): 50, (1, 2): 9, (4, 0): 70, (4, 1): 9, (8, 3): 9}

    def forward(size):
        clock[0] += slow.get((size, runs.count(size)), {1: 1.0, 4: 3.0, 8: 2.0}[size])
        runs.append(size)

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    table = measure_costs(forward, [1, 4, 8], lambda: waits.append(len(runs)), repeats=3)
    assert table == ((1, 1.0), (4, 2.5), (8, 2.5))
    assert len(runs) == 12 and {3, 4, 12} <= set(waits)
    assert Costs(verify=table).verify_seconds(6) == 2.5
