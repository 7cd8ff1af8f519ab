"""Temperature, top-k, top-p and min-p, each row of a batch with its own: logits in, log-probabilities out.

The meaning is that of transformers' warpers in the order in which `generate` applies them. Letters: B sequences,
N tree nodes, V vocabulary.
"""

from typing import NamedTuple

import torch

LARGEST = 3.4e38  # just below what fp32 can hold


class Filters(NamedTuple):
    """Sampling parameters, one number a sequence; None is off for all of them. And what the host knows of them.

    Attributes:
        temperature: [B] fp32. Divides the logits; 0 makes the row greedy: its argmax (lowest id of equals) is certain.
        top_k: [B] int64. Keeps the k highest logits and all that tie with the lowest of them; 0 is off.
        top_p: [B] fp64, as the caller wrote it: 1 - top_p is rounded once. Keeps the fewest tokens, likeliest first,
            whose mass reaches top_p; 1 is off. Of tied tokens the lowest ids are dropped first, as a stable ascending
            sort would.
        min_p: [B] fp32. Keeps tokens of at least min_p times the likeliest one's probability; 0 is off.
        most: every row's top_k is between 1 and this, by the caller's promise. It changes no result: the vocabulary is
            then not sorted.
    """

    temperature: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    most: int | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The four that are numbers of the rows."""
        return self[:4]

    def of_rows(self, rows: list[int]) -> "Filters":
        """Those of some of the sequences."""
        return Filters(*(None if option is None else option[rows] for option in self.tensors), most=self.most)


def filtered_log_probs(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Log-probabilities after the filters: [B, N, V] fp32, -inf for what must not come out.

    A node without a distribution (its logits hold NaN or +inf, or nothing but -inf) has NaN somewhere, or is greedy. So
    low or high a temperature as would overflow is taken for the nearest that does not.

    Args:
        logits: [B, N, V] fp32, bf16 or fp16.
        filters: per row.
    """
    temperature, top_k, top_p, min_p = (None if option is None else option[:, None, None] for option in filters.tensors)
    scores = logits.float()
    if temperature is not None:
        peak, peak_ids = scores.max(-1, keepdim=True)
        # so low a temperature that the peak would overflow leaves nothing but the peak, whatever it is exactly
        divisor = torch.where(temperature == 0, 1.0, temperature).clamp(max=LARGEST).maximum(peak.abs() / LARGEST)
        scores = scores / divisor
    if top_k is not None or top_p is not None:
        scores = torch.where(_dropped_by_rank(scores, top_k, top_p, filters.most), float("-inf"), scores)
    if min_p is not None:
        probs = scores.softmax(-1)
        scores = torch.where(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"), scores)
    log_probs = scores.log_softmax(-1)
    if temperature is None:
        return log_probs
    certain = torch.full_like(log_probs, float("-inf")).scatter(-1, peak_ids, 0.0)
    return torch.where(temperature == 0, certain, log_probs)


def _dropped_by_rank(
    scores: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, most: int | None
) -> torch.Tensor:
    """[B, N, V] bool: outside the top k, or outside the top-p nucleus of what top-k keeps."""
    vocab = scores.shape[-1]
    if top_k is None or most is None:
        ascending = scores.sort(dim=-1).values
    else:
        ascending = scores.topk(min(most, vocab)).values.flip(-1)
    lowest = None
    if top_k is not None:
        width = ascending.shape[-1]
        kept = torch.where(top_k > 0, top_k, width).clamp(max=width)
        lowest = ascending.gather(-1, (width - kept).expand(*scores.shape[:-1], 1))
        outside_k = scores < lowest
        if top_p is None:
            return outside_k
        # What a sort of all that top-k keeps would give, to the bit: the likeliest, before them as many of the lowest
        # as tie with it, before those the dropped. Sums over it round as sums over the sorted vocabulary do.
        place = torch.arange(vocab - width, device=scores.device)
        before = torch.where(place < outside_k.sum(-1, keepdim=True), float("-inf"), lowest)
        ascending = torch.cat([before, ascending.masked_fill(ascending < lowest, float("-inf"))], dim=-1)
    mass, threshold = ascending.softmax(-1).cumsum(-1), (1 - top_p).float().expand(*scores.shape[:-1], 1)
    outside = torch.searchsorted(mass, threshold.contiguous(), right=True)
    outside = torch.where(top_p < 1, outside.clamp(max=vocab - 1), 0)  # the likeliest stays, whatever top_p is
    cutoff = ascending.gather(-1, outside)
    if lowest is not None:
        cutoff = cutoff.maximum(lowest)  # where top-p is off, the first in order is one that top-k drops
    below, tied = scores < cutoff, scores == cutoff
    return below | (tied & (tied.cumsum(-1, dtype=torch.int32) <= outside - torch.searchsorted(ascending, cutoff)))
