"""The random numbers: published test vectors of the generator, distinct keys, and distributions."""

import math

import pytest
import torch

from specdec_triton.ops import noise


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, wanted):
    """The known answers of Random123, with which philox4x32-10 was published."""
    assert noise.philox(words(counter), words(key)) == words(wanted)


def test_the_words_are_laid_out_as_said():
    seed = torch.tensor(0x299F31D0A4093822)
    bits = noise.philox((torch.tensor(1), 7, 3, noise.RECOVER), (seed & noise.WORD, seed >> 32))
    row = noise.gumbel(seed[None], torch.tensor([7]), 3, noise.RECOVER, 8)
    wanted = [-math.log(-math.log1p(-(int(word) + 0.5) * 2**-32)) for word in bits]
    assert row.shape == (1, 8) and row[0, 4:].tolist() == pytest.approx(wanted, abs=1e-6)
    first = noise.philox((torch.tensor(0), 7, 3, noise.ACCEPT), (seed & noise.WORD, seed >> 32))[0]
    assert float(noise.uniform(seed, 7, 3, noise.ACCEPT)) == pytest.approx((int(first) + 0.5) * 2**-32)


@pytest.mark.parametrize("vocab", [1, 3, 4, 5, 130])
def test_a_token_has_the_same_noise_in_every_vocabulary(vocab):
    seeds, node = torch.tensor([-1, 2**63 - 1, 5]), torch.tensor([0, 4, 2])
    whole = noise.gumbel(seeds, 3, node, noise.BONUS, 256)
    assert torch.equal(noise.gumbel(seeds, 3, node, noise.BONUS, vocab), whole[:, :vocab])


def test_arguments_broadcast():
    seeds, position = torch.tensor([3, 4]), torch.tensor([10, 20])
    grid = noise.uniform(seeds[:, None], position[:, None], torch.arange(5), noise.ACCEPT)
    assert grid.shape == (2, 5) and grid.dtype == torch.float32
    assert grid[1, 3] == noise.uniform(torch.tensor(4), 20, 3, noise.ACCEPT)
    purpose = torch.tensor([noise.RECOVER, noise.BONUS])
    rows = noise.gumbel(seeds, position, torch.tensor([1, 2]), purpose, 9)
    assert torch.equal(rows[1:], noise.gumbel(seeds[1:], 20, 2, noise.BONUS, 9))


def test_nothing_that_differs_shares_a_number():
    base = {"seeds": 5, "position": 6, "node": 7, "purpose": noise.DRAFT}
    changes = [{}, {"seeds": 6}, {"seeds": 5 + 2**32}, {"seeds": -5}, {"position": 7}, {"node": 6}, {"purpose": 2}]
    others = [base | change for change in changes]
    rows = [noise.gumbel(torch.tensor(other.pop("seeds")), **other, vocab=64) for other in others]
    assert len(set(torch.stack(rows).flatten().tolist())) == len(rows) * 64


def test_extreme_words_stay_inside():
    ends = torch.tensor([0, 1, 2**31, noise.WORD - 1, noise.WORD])
    uniform = noise._unit(ends)
    assert uniform.dtype == torch.float32 and bool((uniform > 0).all()) and bool((uniform < 1).all())
    gumbel = -(-torch.log1p(-uniform)).log()
    assert bool(gumbel.isfinite().all())
    assert bool((gumbel[:4].diff() < 0).all()) and gumbel[4] <= gumbel[3]  # these two may round to the same number
    # the end that decides an argmax keeps its resolution
    assert float(gumbel[0]) == pytest.approx(math.log(2**33), rel=1e-6)


def test_the_distributions():
    stats = pytest.importorskip("scipy.stats")
    seeds = torch.arange(200)
    uniform = noise.uniform(seeds[:, None], torch.arange(50), 0, noise.ACCEPT).flatten()
    gumbel = noise.gumbel(seeds, 1, 2, noise.BONUS, 50).flatten()
    assert stats.kstest(uniform.double().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(gumbel.double().numpy(), "gumbel_r").pvalue > 1e-3
    # neighbours are independent: tokens of a row, rows of a batch
    for one, other in ((gumbel[:-1], gumbel[1:]), (gumbel[:-50], gumbel[50:])):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.04
