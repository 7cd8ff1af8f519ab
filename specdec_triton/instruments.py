"""Counting what a decoding loop makes the host wait for."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VALUE_METHODS = {
    "tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
    "__format__", "__complex__", "equal",
}  # fmt: skip
DATA_DEPENDENT = {"nonzero", "masked_select", "unique", "_unique2", "unique_dim", "unique_consecutive", "equal"}


class HostReads:
    """Reads of tensor values by the host. `total` is their number, `by_name` how many of each kind."""

    def __init__(self):
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_name.values())


@contextmanager
def count_host_reads() -> Iterator[HostReads]:
    """Count, inside, the calls that make the host wait for a device: values read through tensor methods, and ops
    whose output shape depends on data. On CPU the same calls are counted, though there is nothing to wait for."""
    reads = HostReads()
    with _Methods(reads), _Ops(reads):
        yield reads


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in VALUE_METHODS:
            return func(*args, **(kwargs or {}))
        self._reads.by_name[name] += 1
        before = Counter(self._reads.by_name)
        result = func(*args, **(kwargs or {}))
        self._reads.by_name = before  # what the method itself dispatches is the same read
        return result


class _Ops(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") and len(args) > 1 else ()
        boolean = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices or ())
        if name in DATA_DEPENDENT or boolean:
            self._reads.by_name[name] += 1
        return func(*args, **(kwargs or {}))
