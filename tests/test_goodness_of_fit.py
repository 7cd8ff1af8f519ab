"""The statistics of the proof: against scipy, worked by hand, and on honest and biased samples."""

import math

import pytest
import torch

from specdec_triton.tools import goodness_of_fit

PROBS = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0])


def test_the_g_test_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    counts = torch.tensor([480, 260, 130, 70, 60])
    wanted = stats.power_divergence(counts.numpy(), (PROBS[:5] * 1000).numpy(), lambda_="log-likelihood")
    g, degrees, p_value = goodness_of_fit.g_test(counts, PROBS[:5])
    assert (g, degrees, p_value) == (pytest.approx(wanted.statistic), 4, pytest.approx(wanted.pvalue))
    for statistic, degrees in ((0.3, 1), (40.0, 20), (900.0, 500)):
        assert goodness_of_fit.chi_squared_tail(statistic, degrees) == pytest.approx(
            stats.chi2.sf(statistic, degrees), rel=1e-6
        )


def test_rare_and_impossible_outcomes():
    # of 60 samples the last two outcomes expect 3.75 each: together they count as one
    assert goodness_of_fit.g_test(torch.tensor([30, 15, 7, 4, 4, 0]), PROBS)[1] == 3
    # of 30 all but two are rare, and still so when pooled: 1.875 * 2 joins the rarest
    assert goodness_of_fit.g_test(torch.tensor([15, 8, 4, 2, 1, 0]), PROBS)[1] == 2
    assert goodness_of_fit.g_test(torch.tensor([500, 250, 125, 62, 62, 1]), PROBS) == (math.inf, 5, 0.0)
    assert goodness_of_fit.g_test(torch.tensor([7]), torch.ones(1)) == (0.0, 0, 1.0)


def test_benjamini_hochberg_by_hand():
    # the fourth is below 4/5 of the rate, so the three before it count, though the third alone would not
    assert goodness_of_fit.benjamini_hochberg([0.03, 0.005, 0.9, 0.035, 0.038], 0.05) == [True, True, False, True, True]
    assert goodness_of_fit.benjamini_hochberg([0.2, 0.02], 0.03) == [False, False]
    assert goodness_of_fit.benjamini_hochberg([], 0.05) == []


def test_an_honest_sample_and_a_biased_one():
    generator = torch.Generator().manual_seed(0)
    low, high = goodness_of_fit.null_bracket(PROBS, 20_000)
    assert 0 < low < high < 0.02

    def cell(probs):
        drawn = torch.multinomial(probs, 20_000, replacement=True, generator=generator)
        return goodness_of_fit.examine(torch.bincount(drawn, minlength=len(PROBS)), PROBS)

    honest = cell(PROBS)
    assert honest.p_value > 0.01 and honest.low == 0 and low <= honest.distance <= high
    moved = PROBS + torch.tensor([-0.05, 0.05, 0, 0, 0, 0])
    biased = cell(moved)
    assert biased.p_value < 1e-9 and 0 < biased.low < 0.05 < biased.high and biased.distance > high


def test_p_values_of_honest_samples_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(1)
    p_values = []
    for _ in range(300):
        drawn = torch.multinomial(PROBS, 2000, replacement=True, generator=generator)
        p_values.append(goodness_of_fit.examine(torch.bincount(drawn, minlength=len(PROBS)), PROBS).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_the_interval_holds_the_truth():
    generator = torch.Generator().manual_seed(2)
    moved = PROBS + torch.tensor([-0.03, 0.03, 0, 0, 0, 0])
    for _ in range(200):
        drawn = torch.multinomial(moved, 1000, replacement=True, generator=generator)
        cell = goodness_of_fit.examine(torch.bincount(drawn, minlength=len(PROBS)), PROBS, confidence=0.95)
        assert cell.low <= 0.03 <= cell.high


def test_refusals():
    with pytest.raises(ValueError, match=r"counts and probs must be \[K\], got \[2\] and \[3\]"):
        goodness_of_fit.examine(torch.ones(2), torch.ones(3) / 3)
    with pytest.raises(ValueError, match="got sums 2 and 2.0"):
        goodness_of_fit.examine(torch.ones(2), torch.ones(2))
