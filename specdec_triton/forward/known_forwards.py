"""The forwards of transformers' modules that fused modules can replace, recognised by their source.

A class is recognised if the source of its forward, and of the functions that it calls by name, is known. Comments,
docstrings, annotations and decorators do not count. A class whose forward was changed, by a new version of transformers
or by a subclass, is therefore not recognised, and runs as it is. Classes of other libraries with the same source are
recognised, too.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from .checks import package_of

NOT_COMPARED = {"annotation", "ctx", "decorator_list", "kind", "returns", "type_comment", "type_params"}
RENAMED = ("past_key_values", "cache")  # an argument that transformers 5.24 renamed
NEW_ARGUMENT = "kwargs"  # an argument of `Cache.update` since 5.24, which caches may ignore


@dataclass(frozen=True)
class Norm:
    """RMSNorm.

    Attributes:
        style: see `ops.rms_norm`.
        eps: name of the attribute that holds the number added to the mean of squares.
    """

    style: str
    eps: str = "variance_epsilon"


@dataclass(frozen=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)).

    Attributes:
        activation: name of the attribute that holds the activation.
        joint: name of the linear layer that computes gate and up at once, or None.
    """

    activation: str = "act_fn"
    joint: str | None = None


@dataclass(frozen=True)
class Attention:
    """Projections, rotary embedding, cache, attention, output projection.

    Attributes:
        options: returns the arguments that the module passes to the attention function, besides its scaling.
        norms: None; "head" for norms of queries and keys over the head dim; "projection" for norms over all heads.
        joint: name of the linear layer that computes queries, keys and values at once, or None.
        lacks: returns the reason why this module does not work as described, or None.
    """

    options: Callable[[Any], dict[str, Any]] = lambda module: {}
    norms: str | None = None
    joint: str | None = None
    lacks: Callable[[Any], str | None] = lambda module: None


@dataclass(frozen=True)
class Rotary:
    """The function that applies the rotary embedding.

    Attributes:
        interleaved: see `ops.rotary_and_cache`.
        in_fp32: True if queries and keys are cast to fp32 first.
    """

    interleaved: bool = False
    in_fp32: bool = False


@dataclass(frozen=True)
class Layer:
    """A decoder layer: two updates of the residual stream.

    Attributes:
        norms: names of the norms before attention, of its output, before the MLP, and of its output; None for no norm.
        mlp: name of the MLP.
        multiplier: name of the attribute by which updates are multiplied, or None.
        dropouts: names of dropouts of the updates.
    """

    norms: tuple[str | None, str | None, str | None, str | None]
    mlp: str = "mlp"
    multiplier: str | None = None
    dropouts: tuple[str, ...] = ()


def _own_window(module: nn.Module) -> dict[str, Any]:
    return {"sliding_window": module.sliding_window}


def _window_of_config(module: nn.Module) -> dict[str, Any]:
    return {"sliding_window": getattr(module.config, "sliding_window", None)}


NO_ROTARY = "it has no rotary embedding"
BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)

# `source_id` -> description. A comment names the first class with this source.
NORMS = {
    "33a7db2eeae6": Norm("cast_first"),  # Llama
    "b191e07b4157": Norm("cast_last"),  # Olmo2
    "7404ea88767d": Norm("cast_last"),  # Helium
    "c134aef001f1": Norm("one_plus", "eps"),  # Gemma
}
MLPS = {
    "ec1a335bf2e2": GatedMLP(),  # Llama
    "d3a25014ed23": GatedMLP(),  # Exaone4_5_
    "939598faa7e5": GatedMLP(),  # SeedOss; its dropout does nothing outside of training
    "591e4b515918": GatedMLP("activation_fn", "gate_up_proj"),  # Phi3
}
ATTENTIONS = {
    # Llama
    "406f5b6b3d3b": Attention(),
    # Qwen2
    "d69705d53f33": Attention(_own_window),
    # Mistral
    "ba495e341473": Attention(_window_of_config),
    # Phi3
    "272ad976ba38": Attention(_window_of_config, joint="qkv_proj"),
    # Gemma2
    "98fc073bd642": Attention(
        lambda module: {"sliding_window": module.sliding_window, "softcap": module.attn_logit_softcapping}
    ),
    # Gemma3
    "dae5ea32d878": Attention(_own_window, norms="head"),
    # Qwen3
    "ccd91e5eebb9": Attention(_own_window, norms="head"),
    # Qwen3VLText
    "242733cc8cc5": Attention(norms="head"),
    # HYV3
    "c023b953f9e4": Attention(norms="head"),
    # Glm4Moe
    "10a6ed776275": Attention(
        norms="head", lacks=lambda module: None if module.use_qk_norm else "use_qk_norm is False"
    ),
    # Olmo2
    "b2df94ca6f1f": Attention(norms="projection"),
    # Olmo3
    "efa8639c7bd2": Attention(_own_window, norms="projection"),
    # Olmo
    "a3a28dc81169": Attention(lacks=lambda module: None if module.config.clip_qkv is None else "clip_qkv is set"),
    # SmolLM3
    "cadd9ba12dcd": Attention(_own_window, lacks=lambda module: None if module.use_rope else NO_ROTARY),
    # Exaone4
    "bbc257bd3b51": Attention(
        lambda module: {"sliding_window": module.sliding_window if module.is_sliding else None},
        norms="head",
        lacks=lambda module: None if module.sliding_window is None or module.is_sliding else NO_ROTARY,
    ),
    # SeedOss
    "c002333b3351": Attention(),
}
ROTARIES = {
    "4c695f973e31": Rotary(),  # llama
    "7676d0e115e9": Rotary(),  # olmo
    "01610b2ddbb3": Rotary(),  # phi3
    "fe993ba8b89e": Rotary(),  # glm4_moe
    "db85f12e2db3": Rotary(interleaved=True),  # glm
    "0b8020eacee8": Rotary(interleaved=True),  # helium
    "7b3c60bdef21": Rotary(interleaved=True, in_fp32=True),  # ernie4_5
}
LAYERS = {
    # Llama
    "5a2c96f86e30": Layer(BEFORE),
    # Mixtral
    "a2614aec8f11": Layer(BEFORE),
    # Qwen3VLText
    "0616b5e0a3ab": Layer(BEFORE),
    # Granite
    "11374561e08c": Layer(BEFORE, multiplier="residual_multiplier"),
    # GraniteMoe
    "e392a726ad46": Layer(BEFORE, mlp="block_sparse_moe", multiplier="residual_multiplier"),
    # Phi3
    "e8f9adab26b0": Layer(BEFORE, dropouts=("resid_attn_dropout", "resid_mlp_dropout")),
    # Emu3
    "9e8cb1d6f214": Layer(BEFORE, dropouts=("dropout",)),
    # Gemma2
    "cf995ded58f3": Layer(
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    ),
    # Glm4
    "30f5469cd4d5": Layer(
        ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    ),
    # Olmo2
    "ed647b8a662a": Layer((None, "post_attention_layernorm", None, "post_feedforward_layernorm")),
}
# classes of activations -> the activation's name in `ops.gated_activation`
SILU = (nn.SiLU, SiLUActivation)


def activation_of(module: Any) -> str | None:
    """The name of an activation in `ops.gated_activation`, or None."""
    kind, act = type(module), getattr(module, "__dict__", {}).get("act")
    if not is_of_library(getattr(kind, "forward", None)):
        return None
    if kind in SILU:
        return "silu"
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind is GELUActivation and act is nn.functional.gelu:
        return "gelu"
    if kind is GELUTanh and getattr(act, "func", None) is nn.functional.gelu:
        return "gelu_tanh"
    return None


def unwrapped(function: Any) -> Any:
    """The function inside of wrappers that torch and transformers put around it. A wrapper of anybody else may change
    the result, so it is returned as it is."""
    while hasattr(function, "__wrapped__") and is_of_library(function):
        function = function.__wrapped__
    return function


def is_of_library(function: Any) -> bool:
    """True if the code of a function is in torch or transformers, whatever name it took from a function it wraps."""
    return package_of(function) in ("torch", "transformers")


@cache
def source_id(*functions: Callable | None) -> str | None:
    """A hash of the functions' source, without the parts that do not change the result.

    Returns:
        None if a function has no source, or if it is inside of a wrapper that is not torch's or transformers'.
    """
    functions = tuple(map(unwrapped, functions))
    if any(hasattr(function, "__wrapped__") for function in functions):
        return None
    try:
        sources = [textwrap.dedent(inspect.getsource(function)) for function in functions]
        return id_of([ast.parse(source).body[0] for source in sources])
    except (OSError, TypeError, SyntaxError):
        return None


def id_of(trees: Sequence[ast.AST]) -> str:
    """`source_id` of functions that were parsed. Their docstrings are removed."""
    for tree in trees:
        if isinstance(tree, ast.FunctionDef) and ast.get_docstring(tree) is not None:
            del tree.body[0]
    return hashlib.sha256(";".join(map(_text, trees)).encode()).hexdigest()[:12]


def _text(node: Any) -> str:
    """A node of a syntax tree as text, the same in all versions of Python."""
    if isinstance(node, ast.AST):
        if isinstance(node, ast.keyword) and node.arg == NEW_ARGUMENT:
            return ""
        fields = ((name, getattr(node, name, None)) for name in node._fields if name not in NOT_COMPARED)
        shown = (f"{name}={_text(field)}" for name, field in fields if field is not None)
        return f"{type(node).__name__}({','.join(shown)})"
    if isinstance(node, list):
        return f"[{','.join(filter(None, map(_text, node)))}]"
    return repr(node).replace(*RENAMED)
