"""Tensors of the kernel tests: their bits, distances in units in the last place, and surroundings."""

import math

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


def bits(tensor):
    """The bits of a contiguous tensor of floating-point numbers, as integers."""
    return tensor.view(INTEGERS[tensor.element_size()])


def ulps_apart(got, want):
    """The distance of each pair of numbers: how many numbers of their dtype lie between them, plus one. Zeros of both
    signs are equal, and so are NaNs. A NaN is farther from a number than any two numbers are from each other."""
    assert got.dtype == want.dtype and got.shape == want.shape
    places = []
    for tensor in (got, want):
        found = bits(tensor.contiguous())
        magnitude = (found & torch.iinfo(found.dtype).max).long()
        places.append(torch.where(found < 0, -magnitude, magnitude))
    apart = (places[0] - places[1]).abs()
    apart = apart.masked_fill(got.isnan() & want.isnan(), 0)
    return apart.masked_fill(got.isnan() != want.isnan(), 2**40)


def inside(tensor):
    """A copy on the tests' device inside of a tensor of NaN, so that a read outside of a row changes the result."""
    wide = torch.full([size + 2 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 9], math.nan, dtype=tensor.dtype)
    place = (*(slice(1, 1 + size) for size in tensor.shape[:-1]), slice(3, 3 + tensor.shape[-1]))
    return wide.to(DEVICE)[place].copy_(tensor)
