"""The seam into transformers: an attention implementation that reads a packed tree from the `attention_mask` slot.

transformers hands a 4-D tensor in that slot to the attention function untouched, in every family that uses its
attention interface. The packed tree of `DraftTree.pack` travels there as [B, 1, N, W + 3] int64. The implementation
is switched on around verify forwards only, since models built from one config share the setting.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import CodeType

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from . import ops
from .reference import TREE_FIELDS

# one registered name an implementation, so that an explicit choice needs no global state
NAMES = {None: "specdec_tree", "triton": "specdec_tree_triton", "reference": "specdec_tree_reference"}
NOT_PASSED = "not passed"
CORRECTED_MODULES = ("Llama4TextAttention",)  # they take positions from the cache: see _temperature_correction
DENSE_MASK_MODELS = ("doge", "moshi")  # they make more of their dense mask than attention is told
RECURRENT_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "ssm", "hybrid")
# kinds of layers whose visible keys follow from positions alone, and kinds without attention; any other is refused
KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe", "dummy"}

HOST_READS = {"bincount", "item", "nonzero", "tolist", "unique"}  # methods that wait for a value


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None | str = NOT_PASSED,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    impl: str | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature around `ops.tree_attention`.

    Args:
        query, key, value: [B, Hq, N, D], [B, Hkv, S, D], [B, Hkv, S, Dv]; key and value as the cache returned them.
        attention_mask: [B, 1, T, W + 3] int64, the packed tree.

    Returns:
        [B, N, Hq, Dv] and None (no attention weights).

    Raises:
        ValueError: the mask is not a packed tree, which happens only outside a verify forward.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        got = "None" if attention_mask is None else f"{attention_mask.dtype} {list(attention_mask.shape)}"
        raise ValueError(
            f"{NAMES[impl]}: attention_mask must be a packed tree, torch.int64 [B, 1, N, W + 3], got {got}: is another "
            "thread running a model that shares its config with one that is verifying drafts?"
        )
    if sliding_window == NOT_PASSED:
        sliding_window = getattr(module.config, "sliding_window", None)
        if sliding_window is not None:
            raise ValueError(
                f"{NAMES[impl]}: sliding_window must be passed to the attention function, got a "
                f"{type(module).__name__} that has a window of {sliding_window} in its dense mask only: decode it "
                "without speculation"
            )
    # Llama 4: chunks on layers with rope, a temperature on those without
    use_rope = getattr(module, "use_rope", False)
    chunk_size = getattr(module.config, "attention_chunk_size", None) if use_rope else None
    if getattr(module, "attn_temperature_tuning", False) and not use_rope:
        factor = _temperature_correction(module, attention_mask[:, 0], query.shape[2], key.shape[2])
        query = (query * factor).to(query.dtype)
    output = ops.tree_attention(
        query,
        key,
        value,
        attention_mask[:, 0],
        scale=scaling,
        sliding_window=sliding_window,
        chunk_size=chunk_size,
        softcap=softcap,
        sinks=s_aux,
        impl=impl,
    )
    return output, None


def _temperature_correction(module: nn.Module, packed_tree: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
    """What makes up for Llama 4's attention temperature at wrong positions: [B, 1, N, 1], a factor for each query.

    It scales a query by its column (padding counts), which it takes to be the cache's length and on: here, after all
    slots. A node stands at its sequence's length + depth.
    """

    def temperature(columns: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((columns.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    taken = slots + torch.arange(rows, device=packed_tree.device)
    columns = (packed_tree[..., -1] + packed_tree[..., -TREE_FIELDS])[:, -rows:]
    return (temperature(columns) / temperature(taken))[:, None, :, None]


for _impl, _name in NAMES.items():
    AttentionInterface.register(_name, partial(tree_attention_forward, impl=_impl))
    AttentionMaskInterface.register(_name, sdpa_mask)


def own_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The distinct config objects that the model's modules read their attention implementation from."""
    configs = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs.setdefault(id(config), config)
    return list(configs.values())


@contextmanager
def tree_attention_enabled(configs: list[PreTrainedConfig], impl: str | None = None) -> Iterator[None]:
    """Attention through `ops.tree_attention` inside, exactly what was there before afterwards, whatever happens.

    Args:
        configs: from `own_configs`.
        impl: the implementation that the op is told to use.
    """
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAMES[impl]
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def check_supported(model: PreTrainedModel, role: str = "the model") -> None:
    """Refuse, by name, what tree verification cannot serve.

    Raises:
        ValueError: an encoder-decoder, a model with recurrent state or with layers that choose their keys by content,
            one outside the attention interface, or one whose positions, window or softcap attention is not told.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"patch: {role} must be decoder-only, got the encoder-decoder {name}: use transformers' own assisted "
            "decoding"
        )
    layer_types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    recurrent = sorted({kind for kind in layer_types if any(word in kind for word in RECURRENT_LAYERS)})
    if getattr(model, "_is_stateful", False) or recurrent:
        what = f" (layers {', '.join(recurrent)})" if recurrent else ""
        raise ValueError(
            f"patch: {role} must keep all its state in keys and values, got {name} with recurrent state{what}, which "
            "cannot be rolled back: decode it without speculation"
        )
    unknown = sorted(set(layer_types) - KNOWN_LAYERS)
    if unknown:
        raise ValueError(
            f"patch: {role} must attend to keys by their positions, got {name} with layers {', '.join(unknown)}, which "
            "choose keys otherwise: decode it without speculation"
        )
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"patch: {role} must take its attention from transformers' AttentionInterface, got {name}, which does not: "
            "decode it without speculation or port its attention to the interface"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters or config.model_type in DENSE_MASK_MODELS:
        raise ValueError(
            f"patch: {role} must take position_ids and no more than a mask's visible slots, got {name}, which derives "
            "positions or attention from the cache or a dense mask: decode it without speculation"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        raise ValueError(
            f"patch: {role} must apply its softcap, got {name} under sdpa, which drops it: call "
            "model.set_attn_implementation('eager') first"
        )
    for module in model.modules():
        _check_attention(module, role, name)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"patch: {role} must be on one device, with its weights there, got {name} on {sorted(map(str, devices))}: "
            "load it without offloading"
        )


def constant_rope_limit(model: PreTrainedModel, prompt_length: int) -> int | None:
    """How long a text may become before the model's rotary embedding changes with its length; None: it never does.

    "dynamic" rope changes with every token beyond a length. "longrope" has one set of frequencies up to a length and
    another beyond, where a prompt of `prompt_length` may be already. A draft tree reaches ahead of the text, so what it
    would change must not be reached at all.
    """
    limits = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "dynamic":
                limits.append(module.original_max_seq_len)
            elif kind == "longrope":
                options = module.config.rope_parameters
                length = (options if layer is None else options[layer])["original_max_position_embeddings"]
                limits += [length] if prompt_length <= length else []
    return min(limits, default=None)


def graph_hazard(model: PreTrainedModel) -> str | None:
    """What in the model's forward cannot be captured as a CUDA graph; or None.

    A rope that may change with the length compares positions; experts run one by one list the tokens of each. And
    hooks are Python, which a replay does not run.
    """
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "forward hooks of all modules"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{type(module).__name__}: has hooks or a forward of its own"
        kinds = getattr(module, "rope_type", None)
        changing = {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds])
        if changing:
            return f"{type(module).__name__}: {changing.pop()} rope compares positions on the host"
        reads = sorted(HOST_READS & _words_of_forward(type(module)))
        if reads and (
            not hasattr(type(module).forward, "__wrapped__") or module.config._experts_implementation == "eager"
        ):
            return f"{type(module).__name__}: its forward reads values on the host ({', '.join(reads)})"
    return None


def _check_attention(module: nn.Module, role: str, name: str) -> None:
    """Refuse an attention module whose call of the attention function leaves something out.

    Only a forward would tell otherwise, so its compiled code is read.
    """
    words = _attention_words(type(module))
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if words and window is not None and "sliding_window" not in words:
        raise ValueError(
            f"patch: {role} must pass its sliding_window to the attention function, got {name}, whose "
            f"{type(module).__name__} has a window of {window} in its dense mask only: decode it without speculation, "
            "or load it with sliding_window=None if texts stay shorter"
        )
    if "get_seq_length" in words and type(module).__name__ not in CORRECTED_MODULES:
        raise ValueError(
            f"patch: {role} must take its positions from position_ids, got {name}, whose {type(module).__name__} takes "
            "them from the cache: decode it without speculation"
        )


@cache
def _attention_words(module_class: type[nn.Module]) -> frozenset:
    """The names and constants in the code of `forward`, keywords of its calls among them, if it calls the attention
    function; else nothing."""
    words = _words_of_forward(module_class)
    return words if "ALL_ATTENTION_FUNCTIONS" in words else frozenset()


@cache
def _words_of_forward(module_class: type[nn.Module]) -> frozenset:
    code = getattr(inspect.unwrap(module_class.forward), "__code__", None)
    return frozenset() if code is None else frozenset(_words(code))


def _words(code: CodeType) -> Iterator:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        else:
            yield from constant if isinstance(constant, tuple) else [constant]
