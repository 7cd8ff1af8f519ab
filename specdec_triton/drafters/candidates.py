"""Ranks a draft's tokens by the probability that the target chooses them."""

import torch

from .. import ops
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
        are NaN. Under "coupled", also if they are +inf or all -inf.
    """
    options = {"filters": context.filters, "with_log_probs": True, "impl": context.impl}
    if context.rule == "coupled":
        options |= {"noise": "coupled", "noisy_log_probs": True, "seeds": context.seeds, "position": context.position}
        options["depths" if isinstance(depth, torch.Tensor) else "depth"] = depth
    found = ops.draft_topk(logits, width, **options)
    return found.log_probs, found.tokens, found.has_nan
