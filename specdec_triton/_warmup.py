"""Prepares later calls before the first request arrives."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ._patch import last_stats
from ._stats import Stats
from .engine.generate import endless
from .forward.wrappers import unwrap

NEW_TOKENS = 128  # several rounds of any draft, and enough tokens left for captures


def warmup(model: PreTrainedModel, *, batch: int = 1, length: int = 1024, **options: Any) -> Stats:
    """Run one `generate` call on an artificial prompt, so that later calls of its kind start at full speed.

    It compiles kernels, measures costs for `tree="auto"`, and on a GPU captures the rounds as CUDA graphs. Later calls
    replay these graphs if they have the same batch size and options and texts of a similar length, and if neither the
    model nor the drafter has changed. `release` frees the memory. A drafter that drafts on the host, such as
    `SuffixDrafter`, may draft other shapes later. Those are captured in later calls.

    Args:
        model: a patched model. If its patch has no drafter, `options` must ask for assistance.
        batch: number of sequences.
        length: number of tokens of the longest text that later calls will have, prompt and output.
        options: the arguments of later `generate` calls that decide how they decode, for example `do_sample`, `top_p`
            or `prompt_lookup_num_tokens`.

    Returns:
        Statistics of the call. `captured` and `why_eager` say whether its rounds were captured.

    Raises:
        ValueError: `batch` or `length` is out of range, `options` have a prompt or a length, or the call does not
            decode speculatively.
    """
    for name, number, least in (("batch", batch, 1), ("length", length, 2)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"warmup: {name} must be an integer of at least {least}, got {number!r}")
    chosen_here = {"input_ids", "inputs", "inputs_embeds", "attention_mask", "max_length", "max_new_tokens"}
    if given := sorted(chosen_here & options.keys()):
        raise ValueError(f"warmup: the prompt and its length are artificial, got {', '.join(given)}")
    target = unwrap(model)
    before = last_stats(target)
    new_tokens = min(NEW_TOKENS, length - 1)
    prompt = torch.ones(batch, length - new_tokens, dtype=torch.int64, device=target.device)
    ignores_end = endless.set(True)
    try:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, **options)
    finally:
        endless.reset(ignores_end)
    after = last_stats(target)
    if after is None or after is before:
        raise ValueError(
            f"warmup: the call must decode speculatively, got a {type(target).__name__} that decodes without: patch it "
            "with a drafter, or pass the arguments that ask for assistance"
        )
    return after
