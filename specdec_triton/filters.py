"""Temperature, top-k, top-p and min-p, each row of a batch with its own: logits in, log-probabilities out.

The meaning is that of transformers' warpers in the order in which `generate` applies them. Letters: B sequences,
N tree nodes, V vocabulary.
"""

from typing import NamedTuple

import torch


class Filters(NamedTuple):
    """Sampling parameters, one number a sequence; None is off for all of them.

    Attributes:
        temperature: [B] fp32. Divides the logits; 0 makes the row greedy: its argmax (lowest id of equals) is certain.
        top_k: [B] int64. Keeps the k highest logits and all that tie with the lowest of them; 0 is off.
        top_p: [B] fp32. Keeps the fewest tokens, likeliest first, whose mass reaches top_p; 1 is off. Of tied tokens
            the lowest ids are dropped first, as a stable ascending sort would.
        min_p: [B] fp32. Keeps tokens of at least min_p times the likeliest one's probability; 0 is off.
    """

    temperature: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None


def filtered_log_probs(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Log-probabilities after the filters: [B, N, V] fp32, -inf for what must not come out.

    A node without a distribution (its logits hold NaN or +inf, or nothing but -inf) has NaN somewhere, or is greedy.

    Args:
        logits: [B, N, V] fp32, bf16 or fp16.
        filters: per row.
    """
    temperature, top_k, top_p, min_p = (None if option is None else option[:, None, None] for option in filters)
    scores = logits.float()
    if temperature is not None:
        scores = scores / torch.where(temperature == 0, 1.0, temperature)
    if top_k is not None or top_p is not None:
        scores = scores.masked_fill(_dropped_by_rank(scores, top_k, top_p), float("-inf"))
    if min_p is not None:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    log_probs = scores.log_softmax(-1)
    if temperature is None:
        return log_probs
    certain = torch.full_like(log_probs, float("-inf")).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    return torch.where(temperature == 0, certain, log_probs)


def _dropped_by_rank(scores: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """[B, N, V] bool: outside the top k, or outside the top-p nucleus of what top-k keeps."""
    vocab = scores.shape[-1]
    ascending, order = scores.sort(dim=-1, stable=True)
    dropped = torch.zeros_like(ascending, dtype=torch.bool)
    if top_k is not None:
        kept = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)
        lowest = ascending.gather(-1, (vocab - kept).expand(*scores.shape[:-1], 1))
        dropped = ascending < lowest
    if top_p is not None:
        mass = ascending.masked_fill(dropped, float("-inf")).softmax(-1).cumsum(-1)
        outside = (mass <= 1 - top_p) & (top_p < 1)
        outside[..., -1] = False  # the likeliest stays, whatever top_p is
        dropped = dropped | outside
    return torch.zeros_like(dropped).scatter(-1, order, dropped)
