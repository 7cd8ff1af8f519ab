"""Statistical tests of whether samples come from a distribution that is known exactly.

A *cell* is one experiment: counts of each outcome, and the exact probability of each. Over many cells, Benjamini and
Hochberg's procedure limits the share of honest cells among those that are rejected. Letters: K outcomes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

# outcomes with fewer expected counts are pooled: below about five the statistic is no longer chi-squared
LEAST_EXPECTED = 5.0


class Cell(NamedTuple):
    """Result of an experiment.

    Attributes:
        samples: outcomes counted.
        g: the likelihood-ratio statistic, 2 sum O log(O/E); inf if an impossible outcome occurred.
        degrees: its degrees of freedom.
        p_value: probability of at least this g if the samples come from the distribution.
        distance: total variation between the counts and the distribution, in [0, 1].
        low, high: confidence interval for the total variation between the samples' true distribution and the given one.
    """

    samples: int
    g: float
    degrees: int
    p_value: float
    distance: float
    low: float
    high: float


def examine(counts: torch.Tensor, probs: torch.Tensor, confidence: float = 0.999) -> Cell:
    """Compare counts of K outcomes with their exact probabilities.

    Args:
        counts: [K], nonnegative integers.
        probs: [K] float64; sums to 1.
        confidence: confidence level of the interval.

    Raises:
        ValueError: shapes differ, nothing was counted, or the probabilities do not sum to 1.
    """
    if counts.shape != probs.shape or counts.dim() != 1:
        raise ValueError(f"examine: counts and probs must be [K], got {list(counts.shape)} and {list(probs.shape)}")
    counts, probs = counts.double(), probs.double()
    samples = int(counts.sum())
    if not samples or abs(float(probs.sum()) - 1) > 1e-6:
        raise ValueError(f"examine: wanted counts and probabilities, got sums {samples} and {float(probs.sum())}")
    g, degrees, p_value = g_test(counts, probs)
    distance = 0.5 * float((counts / samples - probs).abs().sum())
    low, high = total_variation_interval(distance, probs, samples, confidence)
    return Cell(samples, g, degrees, p_value, distance, low, high)


def g_test(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int, float]:
    """The G-test of goodness of fit: statistic, degrees of freedom, p-value.

    Rare outcomes are pooled into one. If the pool is still rare, it is merged with the rarest other outcome. An
    outcome of probability 0 must not occur at all.
    """
    counts, probs = counts.double(), probs.double()
    if bool((counts[probs <= 0] > 0).any()):
        return math.inf, int((probs > 0).sum()), 0.0
    expected = probs * counts.sum()
    order = expected.argsort(descending=True)
    observed, expected = counts[order], expected[order]
    whole = max(1, int((expected >= LEAST_EXPECTED).sum()))
    observed, expected = (
        torch.cat([part[:whole], part[whole:].sum()[None]]) if len(part) > whole else part
        for part in (observed, expected)
    )
    if len(expected) > 1 and expected[-1] < LEAST_EXPECTED:
        observed, expected = (torch.cat([part[:-2], part[-2:].sum()[None]]) for part in (observed, expected))
    g = max(0.0, 2 * float(torch.special.xlogy(observed, observed / expected).sum()))
    degrees = len(expected) - 1
    return g, degrees, chi_squared_tail(g, degrees)


def chi_squared_tail(statistic: float, degrees: int) -> float:
    """Probability that a chi-squared variable reaches `statistic`; 1 for 0 degrees of freedom."""
    if not degrees:
        return 1.0
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def total_variation_interval(
    distance: float, probs: torch.Tensor, samples: int, confidence: float
) -> tuple[float, float]:
    """A confidence interval for the true total variation, given that of the counts; valid at every sample size.

    One sample changes the counts' distance by at most 1/n, so the distance stays near its mean (McDiarmid 1989). The
    mean exceeds the true value by at most half the sum of the outcomes' standard deviations (Jensen).
    """
    slack = math.sqrt(math.log(2 / (1 - confidence)) / (2 * samples))
    excess = 0.5 * float((probs * (1 - probs) / samples).clamp(min=0).sqrt().sum())
    return max(0.0, distance - slack - excess), min(1.0, distance + slack)


def benjamini_hochberg(p_values: Sequence[float], rate: float) -> list[bool]:
    """Whether each hypothesis is rejected, with at most a share of `rate` false rejections among them in expectation.

    Benjamini and Hochberg (1995).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    passed = [rank for rank, index in enumerate(order, 1) if p_values[index] <= rate * rank / len(order)]
    rejected = set(order[: passed[-1]] if passed else [])
    return [index in rejected for index in range(len(order))]


def null_bracket(probs: torch.Tensor, samples: int, confidence: float = 0.999) -> tuple[float, float]:
    """Bounds of the total variation of honest samples, from 20,000 draws of the exact distribution itself.

    They show how large a total variation sampling noise alone causes.
    """
    probs = probs.double().numpy()
    drawn = np.random.default_rng(0).multinomial(samples, probs / probs.sum(), size=20_000)
    distances = 0.5 * np.abs(drawn / samples - probs).sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(distances, [tail, 1 - tail])
    return float(low), float(high)
