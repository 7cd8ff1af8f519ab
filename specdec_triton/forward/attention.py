"""An attention function for transformers that reads a packed tree from the `attention_mask` argument.

In every model that uses its attention interface, transformers passes a 4-D `attention_mask` to the attention function
unchanged. The packed tree of `DraftTree.pack` is passed this way, as [B, 1, N, W + 3] int64.

A verify forward runs in its own `contextvars` context. In it, `_attn_implementation` of the model's configs is the name
of our function. The only permanent change is a property on transformers' `PreTrainedConfig`; outside of such a context,
it returns the stored name. Nothing needs to be restored: forwards of the same model in other threads, models that share
its config, and other models that a hook runs at the same time are not affected.
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
from ..ops.reference import TREE_FIELDS, share_masks

# (implementation, True if the cache keeps all keys) -> registered name; separate names avoid global state
NAMES = {
    (impl, all_keys): "specdec_tree" + (f"_{impl}" if impl else "") + ("_all_keys" if all_keys else "")
    for impl in (None, "triton", "reference")
    for all_keys in (False, True)
}
SETTING = "_attn_implementation_internal"  # attribute of a config that holds the name of its attention function

# the name of our function, and the ids of the configs that return it
_current: ContextVar[tuple[str | None, frozenset[int]]] = ContextVar("specdec_triton_attention", default=(None, ()))


@torch.compiler.assume_constant_result  # Dynamo cannot trace a context variable; graphs differ by their mask
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
    """The ids of all config objects, sub-configs included, from which modules of the model read the name of their
    attention function."""
    # without `getattr`, which takes long for the many modules that have none
    pending = [model.config, *(vars(module).get("config") for module in model.modules())]
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
    """Return `call(**arguments)`, with `ops.tree_attention` as the model's attention.

    Other threads and later calls are not affected, even if the call raises an exception.

    Args:
        impl: implementation of the op.
        configs: `config_ids` of the model.
        call: the model. Its `attention_mask` must be a packed tree.
        all_keys: True if plain decoding would keep all keys, see `window_of_cache`.
    """
    context = copy_context()
    context.run(_current.set, (NAMES[impl, all_keys], configs))
    context.run(share_masks)  # the tree is not changed during a forward
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
    """`ops.tree_attention` with the signature of transformers' attention functions.

    Args:
        query, key, value: [B, Hq, N, D], [B, Hkv, S, D], [B, Hkv, S, Dv]. Key and value are those that the cache
            returned.
        attention_mask: [B, 1, T, W + 3] int64. The packed tree.
        sliding_window: number of positions that a query sees, its own included; 0 and None mean no window.
        softcap, s_aux: `softcap` and `sinks` of `ops.tree_attention`.
        impl, all_keys: see `call_with_tree_attention`.

    Returns:
        [B, N, Hq, Dv], and None in place of attention weights.

    Raises:
        ValueError: the mask is not a packed tree, which only happens outside a verify forward.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        got = "None" if attention_mask is None else f"{attention_mask.dtype} {list(attention_mask.shape)}"
        raise ValueError(
            f"{NAMES[impl, all_keys]}: attention_mask must be a packed tree, torch.int64 [B, 1, N, W + 3], got {got}: "
            "this attention function is for verify forwards only; choose another with model.set_attn_implementation"
        )
    # Llama 4: layers with rotary embedding attend in chunks, the others scale queries by a temperature
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
    """The window to which the cache of plain `generate` is limited, or None.

    If a config has a sliding window but no layer types, the cache that `generate` creates keeps only the keys within
    that window, even if the model's attention does not use the window. A `DynamicCache()` that the caller passes keeps
    all keys.
    """
    return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None) or None


def _temperature_correction(module: nn.Module, packed_tree: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
    """Correct Llama 4's attention temperature: a factor for each query, [B, 1, N, 1].

    Llama 4 scales a query by a function of its column, padding included. It assumes that new tokens are in the columns
    after the cache's length, which in a tree forward is the number of slots. The column of a node is in fact its
    sequence's length + depth.
    """

    def temperature(columns: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((columns.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    taken = slots + torch.arange(rows, device=packed_tree.device)
    columns = (packed_tree[..., -1] + packed_tree[..., -TREE_FIELDS])[:, -rows:]
    return (temperature(columns) / temperature(taken))[:, None, :, None]


for (_impl, _all_keys), _name in NAMES.items():
    AttentionInterface.register(_name, partial(tree_attention_forward, impl=_impl, all_keys=_all_keys))
    AttentionMaskInterface.register(_name, sdpa_mask)
