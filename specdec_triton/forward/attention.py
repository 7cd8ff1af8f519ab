"""The seam into transformers: an attention function that reads a packed tree from the `attention_mask` slot.

transformers hands a 4-D tensor in that slot to the attention function untouched, in every family that uses its
attention interface. The packed tree of `DraftTree.pack` travels there as [B, 1, N, W + 3] int64.

A verify forward runs in a `contextvars` context of its own, in which the model's configs name our function as their
`_attn_implementation`. The one change that lasts is a property of transformers' `PreTrainedConfig`, which returns the
stored name outside of such a context. So there is nothing to restore: forwards of the same model in other threads,
models that share its config, and other models that a hook runs meanwhile, run as always.
"""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from .. import ops
from ..ops.reference import TREE_FIELDS

# (implementation, whether the cache keeps all keys) -> a registered name, so that a choice needs no global state
NAMES = {
    (impl, all_keys): "specdec_tree" + (f"_{impl}" if impl else "") + ("_all_keys" if all_keys else "")
    for impl in (None, "triton", "reference")
    for all_keys in (False, True)
}
SETTING = "_attn_implementation_internal"  # where a config keeps the name of its attention function

# our function's name, and the ids of the configs that are to answer with it
_current: ContextVar[tuple[str | None, frozenset[int]]] = ContextVar("specdec_triton_attention", default=(None, ()))


@torch.compiler.assume_constant_result  # Dynamo cannot trace a context variable; graphs differ by their mask anyway
def _current_name() -> str | None:
    return _current.get()[0]


def _get_setting(config: PreTrainedConfig) -> str | None:
    name = _current_name()
    if name is not None and (torch.compiler.is_compiling() or id(config) in _current.get()[1]):
        return name
    try:
        return config.__dict__[SETTING]
    except KeyError:
        raise AttributeError(f"{type(config).__name__} has no attribute {SETTING}") from None


def _set_setting(config: PreTrainedConfig, name: str | None) -> None:
    config.__dict__[SETTING] = name


# Models read the name of their attention function from a config. Several models and threads may share a config, so the
# property returns our name only inside a verify forward.
setattr(PreTrainedConfig, SETTING, property(_get_setting, _set_setting))


def config_ids(model: PreTrainedModel) -> frozenset[int]:
    """Of the config objects that the model's modules, or parts of these configs, read their attention function from."""
    pending = [model.config, *(getattr(module, "config", None) for module in model.modules())]
    found = set()
    while pending:
        config = pending.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found.add(id(config))
            pending += [getattr(config, name, None) for name in config.sub_configs]
    return frozenset(found)


def call_with_tree_attention(
    impl: str | None, configs: frozenset[int], call: Callable, all_keys: bool = False, **arguments
) -> Any:
    """`call(**arguments)`, with attention through `ops.tree_attention` inside.

    Only this call is affected: not other threads, and nothing after it, however it ends.

    Args:
        impl: the implementation that the op is told to use.
        configs: `config_ids` of the model.
        call: the model; its `attention_mask` is a packed tree.
        all_keys: plain decoding would have all keys, see `window_of_cache`.
    """
    context = copy_context()
    context.run(_current.set, (NAMES[impl, all_keys], configs))
    return context.run(call, **arguments)


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    impl: str | None = None,
    all_keys: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature around `ops.tree_attention`.

    Args:
        query, key, value: [B, Hq, N, D], [B, Hkv, S, D], [B, Hkv, S, Dv]; key and value as the cache returned them.
        attention_mask: [B, 1, T, W + 3] int64, the packed tree.
        sliding_window: positions that a query sees, its own included; 0 and None are no window.

    Returns:
        [B, N, Hq, Dv] and None (no attention weights).

    Raises:
        ValueError: the mask is not a packed tree, which happens only outside a verify forward.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        got = "None" if attention_mask is None else f"{attention_mask.dtype} {list(attention_mask.shape)}"
        raise ValueError(
            f"{NAMES[impl, all_keys]}: attention_mask must be a packed tree, torch.int64 [B, 1, N, W + 3], got {got}: "
            "this attention runs in verify forwards only; choose another with model.set_attn_implementation"
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
        sliding_window=sliding_window or (None if all_keys else window_of_cache(module.config)),
        chunk_size=chunk_size,
        softcap=softcap,
        sinks=s_aux,
        impl=impl,
    )
    return output, None


def window_of_cache(config: PreTrainedConfig) -> int | None:
    """Keys that plain decoding has, whatever the attention asks for: without layer types, the cache that `generate`
    makes keeps no more than a window that the config names, even if the class never reads it. A `DynamicCache()` of the
    caller's keeps all keys."""
    return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None) or None


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


for (_impl, _all_keys), _name in NAMES.items():
    AttentionInterface.register(_name, partial(tree_attention_forward, impl=_impl, all_keys=_all_keys))
    AttentionMaskInterface.register(_name, sdpa_mask)
