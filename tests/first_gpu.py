"""Which gpu-marked tests run first on a new GPU, where a minute counts: `pytest -m first_gpu` (see CONTRIBUTING.md)."""

import itertools

import pytest

MOST = 160  # tests in the selection


def covering(cells):
    """Some of the cells, chosen greedily: any two values that a cell has in two places, one of these has there, too.

    Args:
        cells: tuples of equal length. The earlier of equally good ones is chosen.
    """
    pairs = [set(itertools.combinations(enumerate(map(str, cell)), 2)) for cell in cells]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cells)), key=lambda index: len(pairs[index] & missing))
        missing -= pairs[best]
        chosen.append(cells[best])
    return chosen


def turns(*axes):
    """As many cells as the longest axis has values; the shorter ones begin again."""
    return [tuple(axis[turn % len(axis)] for axis in axes) for turn in range(max(map(len, axes)))]


def marked(cells, first):
    """For `pytest.mark.parametrize`: all cells, those in `first` marked first_gpu."""
    assert all(cell in cells for cell in first)
    return [pytest.param(*cell, marks=[pytest.mark.first_gpu] if cell in first else []) for cell in cells]
