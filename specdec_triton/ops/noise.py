"""Stateless random numbers: Philox4x32-10, whose key is the row's seed and whose counter encodes the use of the number.

Every number is a function of (row seed, position, node, purpose, token) alone. No state is kept on the host, rows do
not depend on each other, and a number can be computed again at any time. The random integers here and in the Triton
kernels are identical. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

Letters: V vocabulary. Tensor arguments broadcast against each other.
"""

import torch

# Purposes of random numbers. Two uses with the same purpose would be correlated, which would bias the output.
COUPLED, DRAFT, ACCEPT, RECOVER, BONUS = range(5)

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LANES = 4
BELOW_ONE = 1 - 2**-24  # the largest fp32 below 1


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four random words for each counter.

    Args:
        counter: four int64 tensors that broadcast, with values from 0 to 2^32 - 1.
        key: two such tensors.

    Returns:
        Four int64 tensors of values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap around; their bits equal those of the unsigned 64-bit product
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & WORD) ^ c1 ^ k0,
            second & WORD,
            ((first >> 32) & WORD) ^ c3 ^ k1,
            first & WORD,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _words(seeds, position, node, purpose, block) -> tuple[torch.Tensor, ...]:
    """The four words of one counter. Position, node and purpose may be plain numbers."""
    return philox((block, position & WORD, node & WORD, purpose & WORD), (seeds & WORD, (seeds >> 32) & WORD))


def _unit(words: torch.Tensor) -> torch.Tensor:
    """32 random bits -> fp32 strictly between 0 and 1."""
    return ((words.float() + 0.5) * 2**-32).clamp(max=BELOW_ONE)


def uniform(
    seeds: torch.Tensor, position: torch.Tensor | int, node: torch.Tensor | int, purpose: torch.Tensor | int
) -> torch.Tensor:
    """A uniform random number in the open interval (0, 1) for each (seed, position, node, purpose).

    Args:
        seeds: int64. All 64 bits are used as the key.
        position, node, purpose: int64 tensors or numbers. The lowest 32 bits are used.

    Returns:
        fp32, with the broadcast shape of the arguments.
    """
    return _unit(_words(seeds, position, node, purpose, torch.zeros_like(seeds))[0])


def gumbel(
    seeds: torch.Tensor,
    position: torch.Tensor | int,
    node: torch.Tensor | int,
    purpose: torch.Tensor | int,
    vocab: int,
) -> torch.Tensor:
    """Gumbel noise for every token, so that argmax(log p + noise) is a sample from p.

    Token t uses lane t % 4 of counter block t // 4.

    Args:
        seeds, position, node, purpose: see `uniform`.
        vocab: V.

    Returns:
        fp32 [..., V], finite. The leading shape is the broadcast shape of the other arguments.
    """
    seeds, position, node, purpose = (
        word[..., None] if torch.is_tensor(word) else word for word in (seeds, position, node, purpose)
    )
    blocks = torch.arange(-(-vocab // LANES), device=seeds.device)
    words = torch.stack(torch.broadcast_tensors(*_words(seeds, position, node, purpose, blocks)), dim=-1)
    # the smallest exponential determines the argmax and must be exact, hence log1p of a uniform that is exact near 0
    exponential = -torch.log1p(-_unit(words.flatten(-2)[..., :vocab]))
    return -exponential.log()


def row_seeds(seed: int, rows: int) -> torch.Tensor:
    """A seed for each row of a batch: [B] int64. Each is a function of (seed, row) alone."""
    numbers = torch.arange(rows)
    key = torch.tensor(seed & WORD), torch.tensor((seed >> 32) & WORD)
    low, high, _, _ = philox((numbers, numbers * 0, numbers * 0, numbers * 0), key)
    return low | (high << 32)
