"""Copies of a model that share its parameters, with other modules in some places. The model itself is not changed, so
there is nothing to restore, and other threads may run it at the same time."""

import copy
from collections.abc import Callable
from functools import cache
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from .checks import layer_forward, text_decoder

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
# attribute of a model: unless it is True, transformers may add hooks to the layers, which are those of the copies, too
CAPTURES = "_output_capturing_hooks_installed"


def shared_copy(module: nn.Module, parts: dict[str, nn.Module | None]) -> nn.Module:
    """A copy of a module with other parts. It shares the module's parameters, buffers and attributes.

    Args:
        module: the module, whose `layer_forward` must not be None.
        parts: the modules inside of the copy by name.
    """
    copied = object.__new__(type(module))
    # a compiled forward is that of the original module
    copied.__dict__ = {**vars(module), "_modules": parts, "_compiled_call_impl": None}
    for name in HOOKS:  # hooks that are added to the copy must not be added to the model
        copied.__dict__[name] = copy.copy(vars(module)[name])
    if isinstance(module, PreTrainedModel):
        copied.__dict__[CAPTURES] = True
    if "forward" in vars(module):
        copied.forward = MethodType(layer_forward(module), copied)
    return copied


def copy_with(model: PreTrainedModel, name: str, module: nn.Module, owner: str) -> list[nn.Module]:
    """Copy a model with another module in one place. Only the modules that contain this place are copied.

    Args:
        model: the model. It is not changed.
        name: the dotted name of the place.
        module: the module that the copy has there.
        owner: the beginning of error messages.

    Returns:
        The copied modules: the model, and those inside it down to the one that has `module`.

    Raises:
        ValueError: `forward` was replaced on a module that contains the place, for example by a hook of accelerate's.
            The copy would run the original modules. The forward of a fused layer is a method, which the copy gets.
    """
    *path, last = name.split(".")
    copies = [_own_forward_copy(model, owner)]
    for child in path:
        inside = _own_forward_copy(copies[-1]._modules[child], owner)
        copies[-1]._modules[child] = inside
        copies.append(inside)
    copies[-1]._modules[last] = module
    return copies


def _own_forward_copy(module: nn.Module, owner: str) -> nn.Module:
    if layer_forward(module) is None:
        raise ValueError(
            f"{owner}: forward must be the class's own, got a {type(module).__name__} whose forward was replaced: "
            "remove its hooks, or use another drafter"
        )
    return shared_copy(module, dict(module._modules))


@cache
def subclass(kind: type[nn.Module], prefix: str, forward: Callable) -> type[nn.Module]:
    """A subclass with another forward, for copies. isinstance works, and so do the class's other methods. It is made
    once, so that compiled code serves all copies."""
    return type(f"{prefix}{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def decoder_layers(model: PreTrainedModel, owner: str) -> tuple[str, nn.ModuleList]:
    """The dotted name of the decoder's list of layers, and the list.

    Args:
        model: the model.
        owner: the beginning of error messages.

    Raises:
        ValueError: the model has no such list, or more than one candidate.
    """
    total, decoder = model.config.get_text_config().num_hidden_layers, text_decoder(model)
    inside = next(name for name, module in model.named_modules() if module is decoder)
    lists = [
        (name, module)
        for name, module in decoder.named_modules(prefix=inside)
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    outermost = min((name.count(".") for name, _ in lists), default=0)
    lists = [(name, module) for name, module in lists if name.count(".") == outermost]
    if len(lists) != 1:
        raise ValueError(
            f"{owner}: the model must have one list of its {total} layers, got {type(model).__name__} with "
            f"{[name for name, _ in lists]}: use another drafter"
        )
    return lists[0]
