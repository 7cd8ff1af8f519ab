"""Selects the gpu tests that run first on a new GPU, because time on it is short: `pytest -m first_gpu` (see
CONTRIBUTING.md)."""

import itertools

import pytest

MOST = 225  # largest number of tests in the selection


def covering(cells):
    """A selection of the cells, chosen greedily, that contains every pair of values which some cell has in the same two
    places.

    Args:
        cells: tuples of equal length. Among equally good cells the earliest is chosen.
    """
    pairs = [set(itertools.combinations(enumerate(map(str, cell)), 2)) for cell in cells]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cells)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        chosen.append(cells[best])
    return chosen


def turns(*axes):
    """As many cells as the longest axis has values; shorter axes repeat."""
    return [tuple(axis[turn % len(axis)] for axis in axes) for turn in range(max(map(len, axes)))]


def marked(cells, first):
    """Arguments for `pytest.mark.parametrize`: all cells, of which those in `first` are marked first_gpu."""
    assert all(cell in cells for cell in first)
    return [pytest.param(*cell, marks=[pytest.mark.first_gpu] if cell in first else []) for cell in cells]
