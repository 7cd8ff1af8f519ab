"""Distances of floating-point numbers in units in the last place."""

import torch

INTEGERS = {2: torch.int16, 4: torch.int32}


def ulps_apart(got, want):
    """The distance of each pair of numbers: how many numbers of their dtype lie between them, plus one. Zeros of both
    signs are equal, and so are NaNs. A NaN is farther from a number than any two numbers are from each other."""
    assert got.dtype == want.dtype and got.shape == want.shape
    places = []
    for tensor in (got, want):
        bits = tensor.contiguous().view(INTEGERS[tensor.element_size()])
        magnitude = (bits & torch.iinfo(bits.dtype).max).long()
        places.append(torch.where(bits < 0, -magnitude, magnitude))
    apart = (places[0] - places[1]).abs()
    apart = apart.masked_fill(got.isnan() & want.isnan(), 0)
    return apart.masked_fill(got.isnan() != want.isnan(), 2**40)
