"""Ranks a draft's tokens by the probability that the target chooses them."""

import torch

from .. import ops
from ..ops.filters import filtered_log_probs
from ..ops.noise import COUPLED, gumbel
from .base import DraftContext


def ranked(
    context: DraftContext, logits: torch.Tensor, width: int, depth: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The most likely choices of the target, after the call's filters. None is sampled.

    Under "coupled", the noise that the target will use is added to the log-probabilities first, and the result is the
    log-softmax of the sum. This is a heuristic. If draft and target agree, the choices are in the target's order, but
    the results are not calibrated probabilities, so a choice of paths by them may not be optimal.

    Args:
        context: the call's sequences.
        logits: [B, n, V]. The draft's logits after n parents.
        width: K, number of choices, at most V.
        depth: depth of the choices: one number for all parents, or [n] int64 on the device.

    Returns:
        Log-probabilities [B, n, K] fp32 in descending order, tokens [B, n, K] int64, and [B, n] bool, True if logits
        are NaN.
    """
    if context.rule != "coupled":
        found = ops.draft_topk(logits, width, filters=context.filters, with_log_probs=True, impl=context.impl)
        return found.log_probs, found.tokens, found.has_nan
    noise = gumbel(context.seeds[:, None], context.position[:, None] + depth, 0, COUPLED, logits.shape[-1])
    best, tokens = (filtered_log_probs(logits, context.filters) + noise).log_softmax(-1).topk(width)
    return best, tokens, best[..., 0].isnan()
