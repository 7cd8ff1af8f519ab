"""What transformers' own `generate` would give a model at its next decoding step.

Between `generate` and a forward stands the model's `prepare_inputs_for_generation`. It may count positions in its own
way (PaliGemma counts from 1, Qwen-VL has several planes) and add arguments. So the model itself is asked, once after
the prompt, and verify forwards go on from its answer.
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
# arguments that a verify forward has of its own, or has no use for
_OWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "return_dict"}
_UNUSED = {"cache_position", "is_first_iteration", "logits_to_keep", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class NextStep:
    """Arguments of a model's next forwards.

    Attributes:
        origin: [B] or [P, B] int64. A token in column c has position c - origin, in each of P planes.
        token_types: name -> [B, 1]. Each new token has this type.
        constants: other arguments, the same at every step.
    """

    origin: torch.Tensor
    token_types: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def positions(self, columns: torch.Tensor) -> torch.Tensor:
        """[B, N] or [P, B, N] int64, of tokens in `columns` [B, N]."""
        return columns - self.origin[..., None]


def is_neutral(name: str, value: Any) -> bool:
    """Whether a forward does the same with and without this argument."""
    if name in TOKEN_TYPES and isinstance(value, torch.Tensor):
        return not value.any()
    return value is None or value is False or (isinstance(value, (dict, list, tuple, str)) and not value)


def next_step(model: PreTrainedModel, input_ids: torch.Tensor, outputs: ModelOutput, model_kwargs: dict) -> NextStep:
    """What comes after a forward over `input_ids` [B, T].

    Args:
        outputs: of that forward, with the cache.
        model_kwargs: the call's, as they were before it.

    Raises:
        ValueError: the step is not one more token of text after the T that there are.
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
    """A copy of the model with the same weights and layers, to be asked instead of it: some models note on themselves
    what they prepared last (Qwen-VL's `rope_deltas`)."""
    shadow = copy.copy(model)
    shadow._buffers = dict(model._buffers)
    shadow._modules = {
        name: _shadow(part) if isinstance(part, PreTrainedModel) else part for name, part in model._modules.items()
    }
    return shadow


def check_preparation(model: PreTrainedModel, role: str) -> None:
    """Ask for two steps after a short made-up prompt, one row of it padded.

    Raises:
        ValueError: the model cannot be asked, or its positions do not grow by one.
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
