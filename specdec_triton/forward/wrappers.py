"""Find the transformers model inside PEFT and `torch.compile` wrappers."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel


def unwrap(model, owner: str = "patch") -> PreTrainedModel:
    """The transformers model inside PEFT and `torch.compile` wrappers.

    Raises:
        ValueError: there is no such model, it is wrapped in something else, or a PEFT adapter adds tokens or keys. The
            message begins with `owner`.
    """
    inner = model
    if hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod
    if not isinstance(inner, PreTrainedModel) and callable(getattr(inner, "get_base_model", None)):
        _check_adapters(inner, owner)
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel) or not isinstance(inner, GenerationMixin):
        raise ValueError(
            f"{owner}: model must be a transformers model with generate(), got {type(model).__module__}."
            f"{type(model).__qualname__}: pass the wrapped model itself"
        )
    return inner


def _check_adapters(wrapper, owner: str) -> None:
    adapters = getattr(wrapper, "peft_config", None) or {}
    active = getattr(wrapper, "active_adapters", adapters)
    for name in [active] if isinstance(active, str) else active:
        if getattr(adapters.get(name), "is_prompt_learning", False):
            raise ValueError(
                f"{owner}: a PEFT adapter must change weights (such as LoRA), got {type(adapters[name]).__name__} "
                f"{name!r}, which adds tokens or keys before the prompt: decode it without speculation"
            )


def embedded_tokens(model: PreTrainedModel) -> int:
    """Number of rows of the model's token embedding.

    The embedding need not be an `nn.Embedding`: adapters (LoRA, trainable tokens) and quantized layers may replace it.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if isinstance(getattr(embedding, "num_embeddings", None), int):
        return embedding.num_embeddings
    return model.config.get_text_config().vocab_size if weight is None else weight.shape[0]


def output_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """The model's logits [..., V] after hidden states [..., Ht] that have passed its final norm."""
    config = model.config.get_text_config(decoder=True)
    logits = model.get_output_embeddings()(states)
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    logits = logits * (getattr(config, "output_multiplier", None) or 1.0)  # Muse Glimmer
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def num_weights(module: nn.Module) -> int:
    """Number of elements of a module's parameters."""
    return sum(weight.numel() for weight in module.parameters())
