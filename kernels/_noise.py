"""Philox4x32-10, and uniform and Gumbel noise computed from its words, in Triton.

The integers equal those of `specdec_triton.ops.noise`; the floats agree to a few units in the last place. A token uses
lane token % 4 of counter block token // 4.
"""

import triton
import triton.language as tl

# purposes, with the same numbers as in `specdec_triton.ops.noise`
COUPLED: tl.constexpr = tl.constexpr(0)
DRAFT: tl.constexpr = tl.constexpr(1)
ACCEPT: tl.constexpr = tl.constexpr(2)
RECOVER: tl.constexpr = tl.constexpr(3)
BONUS: tl.constexpr = tl.constexpr(4)

ROUNDS: tl.constexpr = tl.constexpr(10)
MULTIPLIER_0: tl.constexpr = tl.constexpr(0xD2511F53)
MULTIPLIER_1: tl.constexpr = tl.constexpr(0xCD9E8D57)
KEY_STEP_0: tl.constexpr = tl.constexpr(0x9E3779B9)
KEY_STEP_1: tl.constexpr = tl.constexpr(0xBB67AE85)
WORD: tl.constexpr = tl.constexpr(0xFFFFFFFF)
BELOW_ONE: tl.constexpr = tl.constexpr(1 - 2**-24)  # the largest fp32 below 1
UNIT: tl.constexpr = tl.constexpr(2**-32)


@triton.jit
def philox(seed, position, node, purpose, block):
    """Four uint32 words for each counter block. Seed and position are int64; the others may be any integers."""
    c0, c1 = block.to(tl.uint32), (position & WORD).to(tl.uint32)
    c2, c3 = node.to(tl.uint32), (block * 0 + purpose).to(tl.uint32)
    # 64 bits, because the interpreter warns of overflow
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in tl.static_range(ROUNDS):
        first, second = c0.to(tl.uint64) * MULTIPLIER_0, c2.to(tl.uint64) * MULTIPLIER_1
        c0, c1, c2, c3 = (
            (second >> 32).to(tl.uint32) ^ c1 ^ k0.to(tl.uint32),
            second.to(tl.uint32),
            (first >> 32).to(tl.uint32) ^ c3 ^ k1.to(tl.uint32),
            first.to(tl.uint32),
        )
        k0, k1 = (k0 + KEY_STEP_0) & WORD, (k1 + KEY_STEP_1) & WORD
    return c0, c1, c2, c3


@triton.jit
def unit(words):
    """32 random bits -> fp32 strictly between 0 and 1."""
    return tl.minimum((words.to(tl.float32) + 0.5) * UNIT, BELOW_ONE)


@triton.jit
def uniform(seed, position, nodes, purpose):
    """A number in (0, 1) for each of a vector of nodes."""
    word, _, _, _ = philox(seed, position, nodes, purpose, nodes * 0)
    return unit(word)


@triton.jit
def gumbel(seed, position, node, purpose, first, BLOCK_V: tl.constexpr):
    """fp32 [BLOCK_V], finite: the noise of tokens first (a multiple of 4), first + 1, ..."""
    block = first // 4 + tl.arange(0, BLOCK_V // 4)
    w0, w1, w2, w3 = philox(seed, position, node + block * 0, purpose, block)
    w = unit(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
    # -log1p(-w): the factor compensates for the rounding of 1 - w, because the smallest exponential must be exact
    y = 1.0 - w
    exponential = tl.where(y == 1.0, w, -tl.log(y) * (w / tl.where(y == 1.0, 1.0, 1.0 - y)))
    return -tl.log(exponential)
