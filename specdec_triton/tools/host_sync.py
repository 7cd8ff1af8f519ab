"""Counts the forwards of a model and the host's reads of device values, and times the host's waits."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VALUE_METHODS = {
    "tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__",
    "__format__", "__complex__", "equal",
}  # fmt: skip
WAITING_METHODS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
COUNTED_TOKENS = (8, 40)  # lengths of two texts, whose difference is free of prompt and set-up
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
    """Count the calls in the block that make the host wait for a device: values read through tensor methods, and ops
    whose output shape depends on data. On a CPU the same calls are counted, although there is no wait."""
    reads = HostReads()
    with _Methods(reads), _Ops(reads):
        yield reads


@contextmanager
def count_forwards(model: torch.nn.Module) -> Iterator[list[int]]:
    """A list with an entry for each forward of the model in the block: its rows of each sequence. Replays of CUDA
    graphs are not counted."""
    rows = []

    def count(module, args, named):
        rows.append(named["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def host_reads_a_forward(generate: Callable[[int], int]) -> float | None:
    """Host reads that a longer text adds, for each of the forwards that it adds; None if it adds none.

    Args:
        generate: a call of so many tokens; returns the number of the target's forwards.
    """
    counted = []
    for tokens in COUNTED_TOKENS:
        with count_host_reads() as reads:
            forwards = generate(tokens)
        counted.append((reads.total, forwards))
    (few_reads, few), (many_reads, many) = counted
    return (many_reads - few_reads) / (many - few) if many > few else None


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
        self._reads.by_name = before  # ops that the method dispatches belong to the same read
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


@dataclass
class HostWaits:
    """Waits of the host for a GPU: their number and total time."""

    count: int = 0
    seconds: float = 0.0


@contextmanager
def time_host_waits() -> Iterator[HostWaits]:
    """Time the host's reads of CUDA tensors in the block, and its waits for events, streams and devices. Unlike
    `count_host_reads` it slows no other call, and does not count ops whose shapes depend on data."""
    waits, inside = HostWaits(), False

    def waiting(method, cuda_tensor: bool):
        @wraps(method)
        def run(*args, **kwargs):
            nonlocal inside
            if inside or (cuda_tensor and not args[0].is_cuda):
                return method(*args, **kwargs)
            begin, inside = time.perf_counter(), True
            try:
                return method(*args, **kwargs)
            finally:
                inside = False
                waits.count += 1
                waits.seconds += time.perf_counter() - begin

        return run

    places = [(torch.Tensor, name, True) for name in WAITING_METHODS]
    places += [(owner, "synchronize", False) for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream)]
    own = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    try:
        for owner, name, cuda_tensor in places:
            setattr(owner, name, waiting(getattr(owner, name), cuda_tensor))
        yield waits
    finally:
        for owner, name, method in own:
            if method is None:
                delattr(owner, name)  # inherited before
            else:
                setattr(owner, name, method)
