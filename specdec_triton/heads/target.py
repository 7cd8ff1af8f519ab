"""The target of a head: which of its hidden states the head reads, and whether the head was made for it.

Letters: H hidden size of the head, Ht of the target, DV tokens that the head can name.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..forward.wrappers import embedded_tokens

PADDING = 0.01  # two vocabularies are the same if their sizes differ by at most this share, which is padding


class FeatureHead(Protocol):
    """A head that reads hidden states of a target.

    Attributes:
        config: of its layers; `hidden_size` is H.
        source: see `Checkpoint`.
        target_hidden_size: Ht.
        embedding_size: width of the embeddings of tokens.
        target_ids: [DV] int64. The target's id of each token that the head can name; None if they are the target's.
        largest_id: the largest of them.
        mask_token_id: token of its mask rows; None if it has none.
        embed_tokens, lm_head: its own embedding and output layer; None for the target's.
    """

    config: PreTrainedConfig
    source: str
    target_hidden_size: int
    embedding_size: int
    target_ids: torch.Tensor | None
    largest_id: int
    mask_token_id: int | None
    embed_tokens: nn.Embedding | None
    lm_head: nn.Linear | None

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def taps(self, target: PreTrainedModel) -> tuple: ...


def named_taps(head: FeatureHead, target: PreTrainedModel, ids: Sequence[int], meaning: str) -> tuple[int | str, ...]:
    """The taps of the layers `ids`, whose inputs or outputs are meant.

    Raises:
        ValueError: the target has no such layer.
    """
    count, shift = num_layers(target), int(meaning == "output")
    unfit = [each for each in ids if each + shift > count]
    if unfit:
        raise ValueError(
            f"{type(head).__name__}: layer ids must be at most {count - shift} ({meaning}s of the {count} layers of "
            f"{type(target).__name__}), got {unfit[0]} in {head.source}: give layers= and layer_meaning="
        )
    return tuple("last" if each + shift == count else each + shift for each in ids)


def num_layers(target: PreTrainedModel) -> int:
    return target.config.get_text_config(decoder=True).num_hidden_layers


def check_fit(head: FeatureHead, target: PreTrainedModel) -> None:
    """Refuse a target that the head was not made for.

    Raises:
        ValueError: hidden size, vocabulary, mask token, layer ids, width of shared embeddings or of a shared output
            layer, device or dtype do not fit. The message names both sides.
    """
    config = target.config.get_text_config(decoder=True)
    if config.hidden_size != head.target_hidden_size:
        raise _unfit(head, target, "the target's hidden size", head.target_hidden_size, config.hidden_size)
    head.taps(target)
    vocabulary, of_vocabulary = config.vocab_size, "the target's vocabulary"
    if head.target_ids is not None:
        if head.largest_id >= vocabulary:
            raise _unfit(head, target, of_vocabulary, f"larger than {head.largest_id}, an id in d2t", vocabulary)
    elif head.lm_head is not None and not _same_size(head.lm_head.out_features, vocabulary):
        raise _unfit(head, target, of_vocabulary, f"{head.lm_head.out_features}, the rows of lm_head", vocabulary)
    if head.embed_tokens is not None:
        rows = head.embed_tokens.num_embeddings
        if rows < vocabulary and not _same_size(rows, vocabulary):
            raise _unfit(head, target, of_vocabulary, f"at most {rows}, the rows of embed_tokens", vocabulary)
    else:
        width = getattr(target.get_input_embeddings(), "embedding_dim", config.hidden_size)
        if width != head.embedding_size:
            what = "the width of the target's embeddings, which are shared,"
            raise _unfit(head, target, what, head.embedding_size, width)
    if head.mask_token_id is not None:
        rows = embedded_tokens(target) if head.embed_tokens is None else head.embed_tokens.num_embeddings
        if head.mask_token_id >= rows:
            what = "the number of embeddings"
            raise _unfit(head, target, what, f"larger than {head.mask_token_id}, the mask token", rows)
    if head.lm_head is None and config.hidden_size != head.config.hidden_size:
        what = "the input of the target's output layer, which is shared,"
        raise _unfit(head, target, what, head.config.hidden_size, config.hidden_size)
    if target.device != head.device:
        raise _unfit(head, target, "the device", head.device, target.device)
    if target.dtype != head.dtype:
        raise _unfit(head, target, "the dtype", head.dtype, target.dtype)


def _unfit(head: FeatureHead, target: PreTrainedModel, what: str, wanted: Any, got: Any) -> ValueError:
    """The error that a property of the target differs from the wanted one."""
    return ValueError(
        f"{type(head).__name__}: {head.source} does not fit {type(target).__name__}: {what} must be {wanted}, got {got}"
    )


def _same_size(one: int, other: int) -> bool:
    return abs(one - other) <= PADDING * max(one, other)
