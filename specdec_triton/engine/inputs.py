"""What a call brings, checked: where its rows begin, and their seeds."""

from collections.abc import Sequence

import torch

from ..ops.noise import row_seeds


def row_seeds_of(seed: int | Sequence[int] | None, batch: int) -> torch.Tensor:
    """[B] int64. A list is taken as it is.

    Raises:
        ValueError: a list is not of one seed for each row.
    """
    if isinstance(seed, (list, tuple)):
        if len(seed) != batch:
            raise ValueError(
                f"generate: seed must be a number or a list of one for each of the {batch} rows (each prompt's "
                f"num_return_sequences among them), got {len(seed)}"
            )
        return torch.tensor(seed, dtype=torch.int64)
    return row_seeds(int(torch.randint(2**62, ())) if seed is None else seed, batch)


def left_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """First real column of each sequence: [B] int64, from `attention_mask` [B, T] or, without one, 0.

    Raises:
        ValueError: the mask is of another shape, has holes or padding on the right, or a row is all padding.
    """
    batch, length = input_ids.shape
    columns = torch.arange(length, device=input_ids.device)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    if real.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must be [{batch}, {length}], one number for each of input_ids, got "
            f"{list(real.shape)}: with a cache of earlier turns, pass the whole conversation as input_ids"
        )
    real = real.bool()
    start = length - real.sum(1)
    if not torch.equal(real, columns >= start[:, None]) or not real[:, -1].all():
        raise ValueError(
            "generate: attention_mask must be zeros, then ones (padding on the left only) when speculation is on, got "
            "holes, padding on the right, or a row without tokens: set tokenizer.padding_side = 'left', or pass "
            "attention_mask if it was inferred from a pad token in mid-prompt"
        )
    return start
