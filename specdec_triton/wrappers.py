"""What people wrap a model in, looked through."""

from transformers import GenerationMixin, PreTrainedModel


def unwrap(model, owner: str = "patch") -> PreTrainedModel:
    """The transformers model inside PEFT and `torch.compile` wrappers.

    Raises:
        ValueError: it is none, or is wrapped in something else; names `owner`.
    """
    inner = model
    if hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod
    if not isinstance(inner, PreTrainedModel) and callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel) or not isinstance(inner, GenerationMixin):
        raise ValueError(
            f"{owner}: model must be a transformers model with generate(), got {type(model).__module__}."
            f"{type(model).__qualname__}: pass the model inside it"
        )
    return inner


def embedded_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model's embedding has rows for.

    It need not be an `nn.Embedding`: adapters (LoRA, trainable tokens) and quantized layers stand in its place.
    """
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if isinstance(getattr(embedding, "num_embeddings", None), int):
        return embedding.num_embeddings
    return model.config.get_text_config().vocab_size if weight is None else weight.shape[0]
