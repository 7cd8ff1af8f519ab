"""Copies a model's modules with fused forwards, for verify and draft forwards.

The copy shares all parameters, buffers and all modules that are not replaced. The model itself is not changed, so
there is nothing to restore, and other threads may run it at the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers import PreTrainedModel

from ..ops import FLOAT_DTYPES
from . import known_forwards
from .checks import has_hooks, layer_forward, text_decoder
from .copies import shared_copy, subclass
from .fused_modules import FORWARDS, AttentionPart, FusedNorm, Handover, LayerPart, MLPPart, NormPart
from .known_forwards import Attention, GatedMLP, Layer, Norm, source_id, unwrapped

# kind of modules -> their table
TABLES = {
    "norm": known_forwards.NORMS,
    "mlp": known_forwards.MLPS,
    "attention": known_forwards.ATTENTIONS,
    "layer": known_forwards.LAYERS,
}
SIMILAR = ("Attention", "MLP", "RMSNorm", "DecoderLayer")  # ends of class names of which the reader is told
REPLACED, UNKNOWN = "its forward was replaced", "the source of its forward is not known"
Part = NormPart | MLPPart | AttentionPart | LayerPart


class _Unfit(Exception):
    """A module is not replaced; the message says why."""


@dataclass
class Fused:
    """A model with fused forwards.

    Attributes:
        model: the copy, or the model itself if nothing was replaced.
        replaced: number of replaced modules by class.
        left: class of a module that is like a replaceable one -> the reason why it was not replaced.
    """

    model: PreTrainedModel
    replaced: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def fuse(model: PreTrainedModel, impl: str | None = None) -> Fused:
    """Replace all modules of a model that can be replaced, in a copy.

    Args:
        model: the model. It is not changed.
        impl: implementation of the ops.
    """
    return _Fusion(model, impl).result


class _Fusion:
    def __init__(self, model: PreTrainedModel, impl: str | None):
        self.impl, self.handover, self.dtype = impl, Handover(), model.dtype
        self.result = Fused(model)
        self.decoder = {id(module) for module in text_decoder(model).modules()}
        self.norms: dict[int, FusedNorm] = {}  # by id of the module
        self.copies: dict[int, nn.Module] = {}
        reason = self.unfit_model(model)
        if reason:
            self.result.left[type(model).__name__] = reason
            return
        self.result.model = self.copy_of(model)
        for module in self.result.model.modules():
            if "fused_part" in vars(module):
                name = type(module).__bases__[0].__name__
                self.result.replaced[name] = self.result.replaced.get(name, 0) + 1

    def unfit_model(self, model: PreTrainedModel) -> str | None:
        if model.training:
            return "it is in training mode"
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            return "all modules have forward hooks"
        if model.dtype not in FLOAT_DTYPES:
            return f"it is in {model.dtype}"
        if any(module._compiled_call_impl is not None for module in model.modules()):
            return "module.compile() was called"
        return None

    def copy_of(self, module: nn.Module) -> nn.Module:
        """The module with all replaceable parts replaced. It is the module itself if there are none."""
        if id(module) in self.copies:
            return self.copies[id(module)]
        parts = {name: None if child is None else self.copy_of(child) for name, child in module._modules.items()}
        part, forward = self.part_of(module), layer_forward(module)
        changed = any(parts[name] is not child for name, child in module._modules.items())
        if changed and forward is None:  # it may refer to the original modules
            self.leave(module, REPLACED)
            changed, part = False, None
        copied = module
        if part is not None or changed:
            copied = shared_copy(module, parts)
        if part is not None:
            vars(copied).pop("forward", None)  # the class's own, as an attribute
            copied.__class__ = subclass(type(module), "Fused", FORWARDS[type(part)])
            copied.fused_part = part
        if changed:
            self.link(module, copied)
        self.copies[id(module)] = copied
        return copied

    def leave(self, module: nn.Module, reason: str) -> None:
        self.result.left.setdefault(type(module).__name__, reason)

    def part_of(self, module: nn.Module) -> Part | None:
        """The fused forward's data, or None if the module is not replaced."""
        method, spec = _described(type(module))
        if method is None:
            if type(module).__name__.endswith(SIMILAR) and id(module) in self.decoder:
                self.leave(module, UNKNOWN)
            return None
        try:
            _check_untouched(module)
            return getattr(self, method)(module, spec)
        except _Unfit as reason:
            self.leave(module, str(reason))
            return None

    def norm(self, module: nn.Module, spec: Norm) -> NormPart:
        return NormPart(self.impl, self.norm_of(module, "it"))

    def norm_of(self, module: nn.Module, name: str = "its norm") -> FusedNorm:
        """The constants of a norm. One norm has one object."""
        if id(module) not in self.norms:
            _, spec = _described(type(module))
            if not isinstance(spec, Norm):
                raise _Unfit(f"the source of {type(module).__name__} is not known")
            _check_untouched(module, name)
            _check_called_as_is(module, name)
            weight = module.weight
            if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype != self.dtype or weight.dim() != 1:
                found = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, torch.Tensor) else weight
                raise _Unfit(f"{name} has another weight than [C] in {self.dtype}: a {type(weight).__name__}, {found}")
            self.norms[id(module)] = FusedNorm(module, spec.style, getattr(module, spec.eps))
        return self.norms[id(module)]

    def mlp(self, module: nn.Module, spec: GatedMLP) -> MLPPart:
        act = getattr(module, spec.activation)
        activation = known_forwards.activation_of(act)
        if activation is None:
            raise _Unfit(f"its activation is {type(act).__name__}")
        _check_untouched(act, "its activation", training=True)
        _check_called_as_is(act, "its activation")
        return MLPPart(self.impl, spec, activation)

    def attention(self, module: nn.Module, spec: Attention) -> AttentionPart:
        rotary = known_forwards.ROTARIES.get(_rotary_source(unwrapped(type(module).forward)))
        if rotary is None:
            raise _Unfit("the source of its rotary embedding is not known")
        lacking = spec.lacks(module)
        if lacking:
            raise _Unfit(lacking)
        norms = None
        if spec.norms == "head":
            norms = self.norm_of(module.q_norm), self.norm_of(module.k_norm)
            _check_alike(norms)
        return AttentionPart(self.impl, spec, rotary, norms, spec.options(module))

    def layer(self, module: nn.Module, spec: Layer) -> LayerPart:
        norms = tuple(name and self.norm_of(getattr(module, name)) for name in spec.norms)
        _check_alike(norms)
        for name in spec.dropouts:
            dropout = getattr(module, name)
            if type(dropout) not in (nn.Dropout, nn.Identity):
                raise _Unfit(f"its {name} is a {type(dropout).__name__}")
            _check_untouched(dropout, "its dropout")
        multiplier = getattr(module, spec.multiplier) if spec.multiplier else 1.0
        return LayerPart(self.impl, spec, norms, multiplier, self.handover)

    def link(self, module: nn.Module, copied: nn.Module) -> None:
        """Let the layers of a list compute the norm that follows them."""
        final = module._modules.get("norm")
        for layers in (child for child in copied._modules.values() if isinstance(child, nn.ModuleList)):
            following = self.norms.get(id(final))
            for layer in reversed(layers):
                part = vars(layer).get("fused_part")
                if not isinstance(part, LayerPart):
                    following = None
                    continue
                alike = following and all(_alike(norm, following) for norm in part.norms if norm)
                part.following = following if alike else None
                following = part.norms[0]
        part = getattr(copied._modules.get("norm"), "fused_part", None)
        if isinstance(part, NormPart):
            part.handover = self.handover


def _alike(one: FusedNorm, other: FusedNorm) -> bool:
    return (one.style, one.eps) == (other.style, other.eps)


def _check_alike(norms: tuple[FusedNorm | None, ...]) -> None:
    present = [norm for norm in norms if norm]
    if any(not _alike(norm, present[0]) for norm in present):
        raise _Unfit("its norms differ in style or eps")


def _check_untouched(module: nn.Module, name: str = "it", training: bool = False) -> None:
    """Raise `_Unfit` if the module computes more than its class's forward. `training`: training mode makes no
    difference."""
    if layer_forward(module) is not type(module).forward or "_norm" in vars(module):
        raise _Unfit(REPLACED if name == "it" else f"the forward of {name} was replaced")
    if has_hooks(module):
        raise _Unfit(f"{name} has forward hooks")
    if module.training and not training:
        raise _Unfit(f"{name} is in training mode")


def _check_called_as_is(module: nn.Module, name: str) -> None:
    """Raise `_Unfit` if calling the module does more than its forward. A fused layer does not call it."""
    if type(module).__call__ is not nn.Module.__call__:
        raise _Unfit(f"{name} has a __call__ of its own")


def _described(kind: type) -> tuple[str, Any] | tuple[None, None]:
    """The method of `_Fusion` for modules of this class, and their description; None for classes that are not known.
    The forward of a class may be replaced at any time."""
    helper = getattr(kind, "_norm", None)
    source = source_id(kind.forward, *([helper] if helper else []))
    return next(((method, table[source]) for method, table in TABLES.items() if source in table), (None, None))


def _rotary_source(forward: Callable) -> str | None:
    """`source_id` of the functions that apply the rotary embedding in the forward of an attention."""
    apply = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
    if isinstance(apply, nn.Module) and layer_forward(apply) is type(apply).forward and not has_hooks(apply):
        # the package `kernels` makes a module of the function; `kernelize` may give the module another forward
        inside = [cell.cell_contents for cell in getattr(type(apply).forward, "__closure__", None) or ()]
        apply = next((each for each in inside if isinstance(each, FunctionType)), None)
    apply = unwrapped(apply)
    return source_id(apply, getattr(apply, "__globals__", {}).get("rotate_half"))
