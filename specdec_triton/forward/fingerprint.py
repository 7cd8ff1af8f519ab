"""A fingerprint of everything that captured code of a model may depend on: if two are equal, graphs that were captured
at the first may be replayed at the second.

A CUDA graph reads weights at fixed addresses, so weights that are changed in place are seen by a replay. Everything
else is fixed at the capture: the addresses, shapes and dtypes of tensors, and all Python values that the forward read.
The fingerprint therefore includes all attributes of all modules: plain values by value, tensors by address, and other
objects by identity. It also includes the functions and classes that the forwards of the modules' classes name, because
some libraries replace a function of transformers by a fused one.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
BY_IDENTITY = (type, FunctionType)
MAX_DEPTH = 6  # objects that are nested deeper are compared by identity
# Attributes that a captured forward does not depend on, or that are included otherwise. A model with forward hooks is
# not captured.
IGNORED = (set(vars(nn.Module())) - {"training"}) | {"generation_config", "warnings_issued", "_specdec_triton"}


class _Identity:
    """Equal to another one if both are of the same object, which still exists."""

    def __init__(self, value: Any):
        try:
            self._get: Callable[[], Any] = weakref.ref(value)
        except TypeError:  # it does not support weak references
            self._get = lambda: value
        self._hash = id(value)

    def __eq__(self, other: object) -> bool:
        value = self._get()
        return value is not None and isinstance(other, _Identity) and value is other._get()

    def __hash__(self) -> int:
        return self._hash


def fingerprint(*values: Any) -> Hashable:
    """The fingerprint of models, drafters and other values. It keeps no module alive."""
    seen: dict[int, int] = {}
    return tuple(_mark(value, seen, 0) for value in values)


def _mark(value: Any, seen: dict[int, int], depth: int) -> Hashable:
    if type(value) in PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value, seen, depth)
    if not getattr(type(value), "in_fingerprint", True):
        return type(value)
    if id(value) in seen:
        return "seen", seen[id(value)]
    if isinstance(value, nn.Module):
        seen[id(value)] = len(seen)
        return _module(value, seen)
    if isinstance(value, MethodType):  # its hash would keep the module alive
        return MethodType, _mark(value.__func__, seen, depth + 1), _mark(value.__self__, seen, depth + 1)
    contains = isinstance(value, (dict, list, tuple, set, frozenset))
    kind = type(value)
    if not contains and kind.__eq__ is not object.__eq__ and kind.__hash__ not in (None, object.__hash__):
        return value  # a value type, such as `Topology`
    if isinstance(value, BY_IDENTITY) or depth > MAX_DEPTH or not (contains or hasattr(value, "__dict__")):
        return _Identity(value)
    seen[id(value)] = len(seen)
    below = depth + 1
    if isinstance(value, dict):
        return dict, tuple((_mark(key, seen, below), _mark(item, seen, below)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_mark(item, seen, below) for item in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_mark(item, seen, below) for item in value)
    return _Identity(value), _mark(vars(value), seen, below)


def _module(module: nn.Module, seen: dict[int, int]) -> Hashable:
    attributes = tuple((name, _mark(value, seen, 1)) for name, value in vars(module).items() if name not in IGNORED)
    tensors = tuple(
        (name, None if tensor is None else _tensor(tensor, seen, 1))
        for group in (module._parameters, module._buffers)
        for name, tensor in group.items()
    )
    parts = tuple((name, _mark(part, seen, 0)) for name, part in module._modules.items())
    kind = type(module)
    return _Identity(kind), _Identity(kind.forward), _named_by(kind.forward, seen), attributes, tensors, parts


def _named_by(forward: Callable, seen: dict[int, int]) -> Hashable:
    """The functions, classes and modules that a forward names, and those that the named functions of the same Python
    module name. Empty if the forward was seen before."""
    pending: list[Any] = [forward]
    found: list[Hashable] = []
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen[id(function)] = len(seen)
        pending.append(getattr(function, "__wrapped__", None))
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
                pending.append(value)
            if isinstance(value, (*BY_IDENTITY, nn.Module)):
                found.append(_mark(value, seen, 1))
    return tuple(found)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _tensor(tensor: torch.Tensor, seen: dict[int, int], depth: int) -> Hashable:
    try:
        place: Hashable = tensor.data_ptr(), tensor.stride()
    except RuntimeError:  # a tensor without storage
        place = _Identity(tensor)
    extra = vars(tensor) if type(tensor) not in (torch.Tensor, nn.Parameter) else None  # for example a quantization
    return tensor.shape, tensor.dtype, tensor.device, place, _mark(extra, seen, depth + 1) if extra else None
