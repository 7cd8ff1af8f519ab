"""Temperature, top-k, top-p and min-p with separate values for each row of a batch: logits in, log-probabilities out.

The semantics are those of transformers' warpers, in the order in which `generate` applies them.

Letters: B sequences, N tree nodes, V vocabulary.
"""

from typing import NamedTuple

import torch

LARGEST = 3.4e38  # slightly below the largest fp32 number


class Filters(NamedTuple):
    """Sampling parameters with one value for each sequence. A parameter that is None is off for all sequences.

    Attributes:
        temperature: [B] fp32. Divides the logits. A row with temperature 0 is greedy: its argmax (the lowest id among
            equals) has probability 1.
        top_k: [B] int64. Keeps the k highest logits and all logits that tie with the lowest of them; 0 is off.
        top_p: [B] fp64, the value of the caller, so that 1 - top_p is rounded only once. Keeps the smallest set of most
            likely tokens whose total probability reaches top_p; 1 is off. Among tied tokens the lowest ids are dropped
            first, as a stable ascending sort would.
        min_p: [B] fp32. Keeps tokens whose probability is at least min_p times the highest one; 0 is off.
        max_top_k: if given, the caller guarantees that top_k of every row is between 1 and this. Results do not change,
            but the vocabulary need not be sorted.
    """

    temperature: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    max_top_k: int | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The four parameters that have a value for each sequence."""
        return self[:4]

    def of_rows(self, rows: list[int]) -> "Filters":
        """The parameters of the given sequences."""
        return Filters(*(None if option is None else option[rows] for option in self.tensors), max_top_k=self.max_top_k)


NO_FILTERS = Filters()


def filtered_log_probs(logits: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Log-probabilities after the filters.

    If the logits of a node do not define a distribution (they hold NaN or +inf, or only -inf), the result contains a
    NaN unless the row is greedy. A temperature so low or high that it would overflow is replaced by the nearest one
    that does not.

    Args:
        logits: [B, N, V] fp32, bf16 or fp16.
        filters: sampling parameters of each row.

    Returns:
        [B, N, V] fp32; -inf for tokens that are filtered out.
    """
    temperature, top_k, top_p, min_p = (None if option is None else option[:, None, None] for option in filters.tensors)
    scores = logits.float()
    if temperature is not None:
        peak, peak_ids = scores.max(-1, keepdim=True)
        # if the temperature is so low that the peak would overflow, only the peak remains, whatever the exact value
        divisor = torch.where(temperature == 0, 1.0, temperature).clamp(max=LARGEST).maximum(peak.abs() / LARGEST)
        scores = scores / divisor
    if top_k is not None or top_p is not None:
        scores = torch.where(_dropped_by_rank(scores, top_k, top_p, filters.max_top_k), float("-inf"), scores)
    if min_p is not None:
        probs = scores.softmax(-1)
        scores = torch.where(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"), scores)
    log_probs = scores.log_softmax(-1)
    if temperature is None:
        return log_probs
    certain = torch.full_like(log_probs, float("-inf")).scatter(-1, peak_ids, 0.0)
    return torch.where(temperature == 0, certain, log_probs)


def _dropped_by_rank(
    scores: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, max_top_k: int | None
) -> torch.Tensor:
    """[B, N, V] bool: True for tokens that are outside the top k or outside the top-p nucleus of the top k."""
    vocab = scores.shape[-1]
    if top_k is None or max_top_k is None:
        ascending = scores.sort(dim=-1).values
    else:
        ascending = scores.topk(min(max_top_k, vocab)).values.flip(-1)
    lowest = None
    if top_k is not None:
        width = ascending.shape[-1]
        kept = torch.where(top_k > 0, top_k, width).clamp(max=width)
        lowest = ascending.gather(-1, (width - kept).expand(*scores.shape[:-1], 1))
        outside_k = scores < lowest
        if top_p is None:
            return outside_k
        # Construct exactly the array that sorting the filtered vocabulary would give, in ascending order: dropped
        # tokens, then tokens that tie with the lowest kept one, then the top k. Sums over it then have the same
        # rounding as sums over the sorted vocabulary.
        place = torch.arange(vocab - width, device=scores.device)
        before = torch.where(place < outside_k.sum(-1, keepdim=True), float("-inf"), lowest)
        ascending = torch.cat([before, ascending.masked_fill(ascending < lowest, float("-inf"))], dim=-1)
    mass, threshold = ascending.softmax(-1).cumsum(-1), (1 - top_p).float().expand(*scores.shape[:-1], 1)
    outside = torch.searchsorted(mass, threshold.contiguous(), right=True)
    outside = torch.where(top_p < 1, outside.clamp(max=vocab - 1), 0)  # the most likely token is always kept
    cutoff = ascending.gather(-1, outside)
    if lowest is not None:
        cutoff = cutoff.maximum(lowest)  # if top-p is off, the first one is dropped by top-k
    below, tied = scores < cutoff, scores == cutoff
    return below | (tied & (tied.cumsum(-1, dtype=torch.int32) <= outside - torch.searchsorted(ascending, cutoff)))
