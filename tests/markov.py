"""Texts of a Markov chain, and the fit of a target and of a head to them.

A token depends on the token at the distance `LAG`, so a head must find that token, which takes correct positions.
"""

import torch
from torch.nn.functional import cross_entropy

LAG, NOISE = 4, 0.1  # the order of the chain, and the share of its tokens that are random
LENGTH = 60  # of texts
STEPS, RATE = 300, 6e-3


class MarkovTexts:
    """Texts over an alphabet: each token is a function of the token at distance `LAG`, except for noise."""

    def __init__(self, alphabet: torch.Tensor):
        self.alphabet, self.random = alphabet, torch.Generator().manual_seed(0)
        self.following = torch.randperm(len(alphabet), generator=self.random)

    def draw(self, batch: int, length: int) -> torch.Tensor:
        """[batch, length] int64."""
        texts = torch.randint(len(self.alphabet), (batch, length), generator=self.random)
        for column in range(LAG, length):
            kept = torch.rand(batch, generator=self.random) < NOISE
            texts[:, column] = texts[:, column].where(kept, self.following[texts[:, column - LAG]])
        return self.alphabet[texts]


def fit(parameters, loss_of_step):
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of_step().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def fit_target(target, texts: MarkovTexts) -> None:
    def loss():
        tokens = texts.draw(12, LENGTH)
        logits = target(tokens).logits[:, LAG - 1 : -1]
        return cross_entropy(logits.flatten(0, 1), tokens[:, LAG:].flatten())

    fit(target.parameters(), loss)
    target.requires_grad_(False).eval()


def rows_seen(levels: int, count: int) -> torch.Tensor:
    """Mask [1, 1, levels * count, levels * count] for `count` rows of verified tokens and as many of each level of
    drafts. The row of position i at level k sees the verified rows up to i - k, and the drafted rows after it."""
    level, position = torch.arange(levels * count).div(count, rounding_mode="floor"), torch.arange(count).repeat(levels)
    verified = position - level
    seen = (level == 0) & (position <= verified[:, None])
    seen |= (level <= level[:, None]) & (verified == verified[:, None])
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9)[None, None]
