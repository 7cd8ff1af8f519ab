"""Find the transformers model inside PEFT and `torch.compile` wrappers."""

from transformers import GenerationMixin, PreTrainedModel


def unwrap(model, owner: str = "patch") -> PreTrainedModel:
    """The transformers model inside PEFT and `torch.compile` wrappers.

    Raises:
        ValueError: it is none, is wrapped in something else, or has a PEFT adapter that adds tokens or keys; names
            `owner`.
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
            f"{type(model).__qualname__}: pass the model inside it"
        )
    return inner


def _check_adapters(wrapper, owner: str) -> None:
    adapters = getattr(wrapper, "peft_config", None) or {}
    active = getattr(wrapper, "active_adapters", adapters)
    for name in [active] if isinstance(active, str) else active:
        if getattr(adapters.get(name), "is_prompt_learning", False):
            raise ValueError(
                f"{owner}: a PEFT adapter must change weights (LoRA and the like), got {type(adapters[name]).__name__} "
                f"{name!r}, which puts tokens or keys of its own before the prompt: decode it without speculation"
            )


def embedded_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model's embedding has rows for.

    It need not be an `nn.Embedding`: adapters (LoRA, trainable tokens) and quantized layers stand in its place.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if isinstance(getattr(embedding, "num_embeddings", None), int):
        return embedding.num_embeddings
    return model.config.get_text_config().vocab_size if weight is None else weight.shape[0]
