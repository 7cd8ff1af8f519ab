"""Tensors that keep their addresses from one `generate` call to the next.

A CUDA graph reads and writes fixed addresses. If a later call puts its text, lengths and keys into the tensors of an
earlier one, it can replay the graphs of that call.
"""

from collections.abc import Hashable

import torch


class Buffers:
    """Named tensors of a call, and of later calls of the same kind.

    Args:
        fixed: True to keep addresses. False if nothing is captured: `put` then returns its argument.

    Attributes:
        version: grows if a tensor is allocated or a value of `agree` changes. Graphs of an earlier version are invalid.
    """

    def __init__(self, fixed: bool = False):
        self.fixed, self.version = fixed, 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._values: dict[str, Hashable] = {}
        self._kept: dict[int, object] = {}

    def put(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The tensor of this name, with the contents of `value`. It is allocated anew if shape or dtype changes."""
        if not self.fixed:
            return value
        held = self._tensors.get(name)
        if held is None or (held.shape, held.dtype, held.device) != (value.shape, value.dtype, value.device):
            held = self._tensors[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
            self.version += 1
        return held.copy_(value)

    def zeros(self, name: str, size: int, like: torch.Tensor) -> torch.Tensor:
        """A tensor [size] with the dtype and device of `like`. It is 0 when it is allocated; if the tensor of this name
        has that size already, its contents are those of its last use."""
        held = self._tensors.get(name) if self.fixed else None
        if held is None or (len(held), held.dtype, held.device) != (size, like.dtype, like.device):
            held = torch.zeros(size, dtype=like.dtype, device=like.device)
            if self.fixed:
                self._tensors[name] = held
                self.version += 1
        return held

    def size(self, name: str) -> int:
        """The number of elements of the tensor of this name; 0 if there is none."""
        return self._tensors[name].numel() if name in self._tensors else 0

    def agree(self, name: str, value: Hashable) -> None:
        """State a value that is part of the captured code. If it differs from that of the last call, graphs become
        invalid."""
        if self.fixed and (name not in self._values or self._values[name] != value):
            self._values[name] = value
            self.version += 1

    def keep(self, *constants: object) -> None:
        """Keep tensors alive that captured code reads and that are not in a buffer."""
        if self.fixed:
            self._kept |= {id(constant): constant for constant in constants}

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
