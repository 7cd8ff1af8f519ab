"""The arguments that transformers' own `generate` would pass to a model at its next decoding step.

`generate` calls the model's `prepare_inputs_for_generation` before each forward. This method may count positions in its
own way (PaliGemma counts from 1, Qwen-VL has several planes) and add arguments. It is therefore called once after the
prompt, and verify forwards continue from its result.
"""

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from .versions import CACHE

TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"}
# arguments that a verify forward sets itself (_OWN) or does not need (_UNUSED)
_OWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "return_dict"}
_UNUSED = {"cache_position", "is_first_iteration", "logits_to_keep", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class NextStep:
    """Arguments of a model's next forwards.

    Attributes:
        origin: [B] or, with P planes of positions, [P, B] int64. A token in column c has position c - origin.
        token_types: name -> [B, 1], the type of all new tokens.
        constants: other arguments, which are the same at every step.
    """

    origin: torch.Tensor
    token_types: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def positions(self, columns: torch.Tensor | int) -> torch.Tensor:
        """Positions of tokens in `columns` [B, N], or of one token in each row in the same column: [B, N] or [P, B, N]
        int64."""
        return torch.rsub(self.origin[..., None], columns)


def is_neutral(name: str, value: Any) -> bool:
    """True if a forward gives the same result without this argument."""
    if name in TOKEN_TYPES and isinstance(value, torch.Tensor):
        return not value.any()
    return value is None or value is False or (isinstance(value, (dict, list, tuple, str)) and not value)


def next_step(model: PreTrainedModel, input_ids: torch.Tensor, outputs: ModelOutput, model_kwargs: dict) -> NextStep:
    """The step that follows a forward over `input_ids` [B, T].

    Args:
        model: the model.
        input_ids: [B, T] int64.
        outputs: outputs of that forward, with the cache.
        model_kwargs: arguments of the call before that forward.

    Raises:
        ValueError: the model does not prepare a step that appends one token of text to the T tokens.
    """
    batch, columns = input_ids.shape
    kwargs = model._update_model_kwargs_for_generation(outputs, dict(model_kwargs))
    following = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
    prepared = model.prepare_inputs_for_generation(following, next_sequence_length=1, **kwargs)

    mask, tokens = prepared.get("attention_mask"), prepared.get("input_ids")
    if tokens is None or tokens.shape != (batch, 1) or prepared.get("inputs_embeds") is not None:
        raise _refusal(model, "input_ids of the last token", "other inputs")
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != columns + 1):
        raise _refusal(model, f"an attention_mask of {columns + 1} columns", f"one of shape {list(mask.shape)}")
    types = {name: prepared.pop(name)[:, -1:] for name in TOKEN_TYPES & prepared.keys() if prepared[name] is not None}
    constants = {
        name: value
        for name, value in prepared.items()
        if name not in _OWN and name not in _UNUSED and not is_neutral(name, value)
    }
    strange = sorted(name for name, value in constants.items() if not isinstance(value, (bool, int, float, str)))
    if strange:
        raise _refusal(model, "arguments of text alone", ", ".join(strange))
    return NextStep(_origin(model, batch, columns, prepared, kwargs), types, constants)


def _origin(model: PreTrainedModel, batch: int, columns: int, prepared: dict, kwargs: dict) -> torch.Tensor:
    positions = prepared.get("position_ids")
    if positions is None and kwargs.get("position_ids") is not None:
        raise _refusal(model, "position_ids", "none: it drops them")
    if positions is None:  # a forward that is given none counts the cache's columns
        return torch.zeros(batch, dtype=torch.int64, device=model.device)
    if positions.shape[-1] != 1 or positions.shape[-2] not in (1, batch):
        raise _refusal(model, f"position_ids of one token in {batch} rows", f"shape {list(positions.shape)}")
    return (columns - positions[..., 0].long()).expand(*positions.shape[:-2], batch)


def _refusal(model: PreTrainedModel, wanted: str, got: str) -> ValueError:
    return ValueError(
        f"prepare_inputs_for_generation of {type(model).__name__} must give a decoding step {wanted}, got {got}"
    )


def _shadow(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model that shares its weights and layers. Its `prepare_inputs_for_generation` is called instead of
    the model's own, because some models store results as attributes (`rope_deltas` of Qwen-VL)."""
    shadow = copy.copy(model)
    shadow._buffers = dict(model._buffers)
    shadow._modules = {
        name: _shadow(part) if isinstance(part, PreTrainedModel) else part for name, part in model._modules.items()
    }
    return shadow


def check_preparation(model: PreTrainedModel, role: str) -> None:
    """Prepare two steps after a short artificial prompt in which one row is padded.

    Raises:
        ValueError: the preparation fails, or positions do not grow by one.
    """
    device, model = model.device, _shadow(model)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device=device)
    input_ids, kwargs = torch.ones_like(mask), {"attention_mask": mask, "use_cache": True}
    try:
        if "position_ids" in inspect.signature(model.forward).parameters:
            kwargs["position_ids"] = model._prepare_position_ids_for_generation(input_ids, kwargs)
        kwargs[CACHE] = cache = DynamicCache()
        model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        origins = []
        for tokens in (input_ids.shape[1], 1):
            states = torch.zeros(2, 1, tokens, 1, device=device)
            cache.update(states, states, 0)
            outputs = ModelOutput({CACHE: cache})
            origins.append(next_step(model, input_ids, outputs, kwargs).origin)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            input_ids = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
        if not torch.equal(*origins):
            raise _refusal(model, "positions that grow by one", "others")
    except Exception as error:
        raise ValueError(
            f"patch: {role} must continue a text token by token, got {type(model).__name__}: {error} "
            f"({type(error).__name__}): decode it without speculation"
        ) from error
