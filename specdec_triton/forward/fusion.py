"""Copies a model's modules with fused forwards, for verify and draft forwards.

The copy shares all parameters, buffers and all modules that are not replaced. The model itself is not changed, so
there is nothing to restore, and other threads may run it at the same time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..ops import FLOAT_DTYPES
from . import known_forwards
from .checks import has_hooks, layer_forward
from .fused_modules import FORWARDS, AttentionPart, FusedNorm, Handover, LayerPart, MLPPart, NormPart
from .known_forwards import activation_of, source_id

ROTARY_FUNCTIONS = "apply_rotary_pos_emb", "rotate_half"  # names that the forward of an attention refers to
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
        self.norms: dict[int, FusedNorm] = {}  # by id of the module
        self.copies: dict[int, nn.Module] = {}
        reason = self.unfit_model(model)
        if reason:
            self.result.left[type(model).__name__] = reason
            return
        self.result.model = self.copy_of(model)

    def unfit_model(self, model: PreTrainedModel) -> str | None:
        if model.training:
            return "it is in training mode"
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
        part = self.part_of(module)
        changed = any(parts[name] is not child for name, child in module._modules.items())
        forward = layer_forward(module)
        if changed and forward is None:
            # the replaced forward may refer to the original modules
            self.leave(module, "its forward was replaced")
            changed, part = False, None
        copied = module
        if part is not None or changed:
            copied = copy.copy(module)
            copied._modules = parts
            if vars(copied).pop("forward", None) is not None and part is None:
                copied.forward = MethodType(forward, copied)  # that of a layer of another library
        if part is not None:
            copied.__class__ = _fused_class(type(module), FORWARDS[type(part)])
            copied.fused = part
            name = type(module).__name__
            self.result.replaced[name] = self.result.replaced.get(name, 0) + 1
        if changed:
            self.link(module, copied)
        self.copies[id(module)] = copied
        return copied

    def leave(self, module: nn.Module, reason: str) -> None:
        self.result.left.setdefault(type(module).__name__, reason)

    def part_of(self, module: nn.Module) -> Part | None:
        """The fused forward's data, or None if the module is not replaced."""
        describe = _kind_of(type(module))
        if describe is None:
            return None
        try:
            _check_untouched(module)
            return getattr(self, describe)(module)
        except _Unfit as reason:
            self.leave(module, str(reason))
            return None

    def norm(self, module: nn.Module) -> NormPart:
        return NormPart(self.impl, self.norm_of(module))

    def norm_of(self, module: nn.Module) -> FusedNorm:
        """The constants of a norm. One norm has one object."""
        if id(module) not in self.norms:
            spec = known_forwards.NORMS.get(_source_of(type(module)))
            if spec is None:
                raise _Unfit(f"the source of {type(module).__name__} is not known")
            _check_untouched(module)
            weight = module.weight
            if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype != self.dtype:
                raise _Unfit(f"the weight of its norm is a {type(weight).__name__} of {weight.dtype}")
            self.norms[id(module)] = FusedNorm(module, spec.style, getattr(module, spec.eps))
        return self.norms[id(module)]

    def mlp(self, module: nn.Module) -> MLPPart:
        spec = _spec(module)
        act = getattr(module, spec.activation)
        activation = activation_of(act)
        if activation is None:
            raise _Unfit(f"its activation is {type(act).__name__}")
        _check_untouched(act)
        return MLPPart(self.impl, spec, activation)

    def attention(self, module: nn.Module) -> AttentionPart:
        spec = _spec(module)
        forward = _own_forward(type(module))
        rotary = known_forwards.ROTARIES.get(source_id(*(forward.__globals__.get(each) for each in ROTARY_FUNCTIONS)))
        if rotary is None:
            raise _Unfit("the source of its rotary embedding is not known")
        if not spec.applies(module):
            raise _Unfit("it has no rotary embedding, or an option that fused modules lack")
        norms = None
        if spec.norms == "head":
            norms = self.norm_of(module.q_norm), self.norm_of(module.k_norm)
            _check_alike(norms)
        return AttentionPart(self.impl, spec, rotary, norms, spec.options(module))

    def layer(self, module: nn.Module) -> LayerPart:
        spec = _spec(module)
        norms = tuple(name and self.norm_of(getattr(module, name)) for name in spec.norms)
        _check_alike(norms)
        for name in spec.dropouts:
            _check_untouched(getattr(module, name))
        multiplier = getattr(module, spec.multiplier) if spec.multiplier else 1.0
        return LayerPart(self.impl, spec, norms, multiplier, self.handover)

    def link(self, module: nn.Module, copied: nn.Module) -> None:
        """Let the layers of a list compute the norm that follows them."""
        final = getattr(module, "norm", None)
        for layers in (child for child in copied._modules.values() if isinstance(child, nn.ModuleList)):
            following = self.norms.get(id(final))
            for layer in reversed(layers):
                part = vars(layer).get("fused")
                if not isinstance(part, LayerPart):
                    following = None
                    continue
                alike = following and all(_alike(norm, following) for norm in part.norms if norm)
                part.following = following if alike else None
                following = part.norms[0]
        copied_final = copied._modules.get("norm")
        if copied_final is not None and "fused" in vars(copied_final):
            copied_final.fused.handover = self.handover


def _alike(one: FusedNorm, other: FusedNorm) -> bool:
    return (one.style, one.eps) == (other.style, other.eps)


def _check_alike(norms: tuple[FusedNorm | None, ...]) -> None:
    present = [norm for norm in norms if norm]
    if any(not _alike(norm, present[0]) for norm in present):
        raise _Unfit("its norms differ in style or eps")


def _check_untouched(module: nn.Module) -> None:
    """Raise `_Unfit` if the module computes more than its class's forward."""
    if layer_forward(module) is not type(module).forward:
        raise _Unfit("its forward was replaced")
    if has_hooks(module):
        raise _Unfit("it has forward hooks")
    if module.training:
        raise _Unfit("it is in training mode")


@cache
def _kind_of(kind: type) -> str | None:
    """The method of `_Fusion` that describes modules of this class, or None."""
    for method, table in (
        ("norm", known_forwards.NORMS),
        ("mlp", known_forwards.MLPS),
        ("attention", known_forwards.ATTENTIONS),
        ("layer", known_forwards.LAYERS),
    ):
        if _source_of(kind) in table:
            return method
    return None


def _spec(module: nn.Module) -> Any:
    source = _source_of(type(module))
    tables = known_forwards.NORMS, known_forwards.MLPS, known_forwards.ATTENTIONS, known_forwards.LAYERS
    return next(table[source] for table in tables if source in table)


def _own_forward(kind: type) -> Callable:
    forward = kind.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


@cache
def _source_of(kind: type) -> str | None:
    """`source_id` of the class's forward, and of its `_norm` if it has one."""
    helper = getattr(kind, "_norm", None)
    return source_id(kind.forward, *([helper] if helper else []))


@cache
def _fused_class(kind: type, forward: Callable) -> type:
    """A subclass with another forward. isinstance works, and so do the class's other methods."""
    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})
