"""CUDA graphs on a CPU: the operations of a stage are recorded with their tensors, and replayed without Python.

A replay computes each recorded operation on the recorded tensors and writes results to the recorded places, as a CUDA
graph does. A Python value that changed after the capture, a replaced tensor or a value read by the host therefore shows
as a wrong text or an error.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from specdec_triton.engine import graphs

READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}


class HostRead(RuntimeError):
    """An operation that waits for the host; CUDA does not permit it in a capture."""


class Record(TorchDispatchMode):
    """Executes and records operations as (op, arguments, keywords, results). `broken`: one of them is not permitted."""

    def __init__(self):
        super().__init__()
        self.operations, self.broken = [], False

    @classmethod
    def is_infra_mode(cls):
        """True: compiled code runs compiled under this mode."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in READS or any(torch.is_tensor(index) and index.dtype == torch.bool for index in indices):
            self.refuse(name)
        results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, results))
        return results

    def refuse(self, name):
        self.broken = True
        raise HostRead(f"{name} in a captured stage")


class SimulatedCuda:
    """The part of `torch.cuda` that a capture uses. Like torch 2.11, it does not clean up if a capture fails: the
    capture stream stays current, its memory pool stays in use, and the generator stays in capture mode."""

    def __init__(self):
        self.memory = self
        self.stream = self.default_stream = "default stream"
        self.underway, self.users, self.handles = [], Counter(), 0
        self.generator_captures = False
        self.device = 0

    def Stream(self, device):
        return f"stream of device {device}"

    def CUDAGraph(self):
        return SimulatedGraph(self)

    def current_device(self):
        return self.device

    def current_stream(self):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream

    def graph_pool_handle(self):
        self.handles += 1
        return 0, self.handles

    def memory_reserved(self):
        return 0

    def empty_cache(self):
        assert not self.underway, "INTERNAL ASSERT FAILED: captures_underway.empty()"

    def rand(self):
        assert not self.generator_captures, "Offset increment outside graph capture encountered unexpectedly."

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert stream.endswith(f"device {self.device}"), f"{stream} cannot capture on device {self.device}"
        self.empty_cache()
        outer, self.stream = self.stream, stream
        graph.capture_begin(pool or self.graph_pool_handle())
        try:
            yield
        finally:
            graph.capture_end()
            self.stream = outer

    def _cuda_endAllocateToPool(self, device, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def _cuda_releasePool(self, device, pool):
        self.users[pool] -= 1

    def assert_sound(self):
        """Assert that the state is as before the first capture."""
        assert self.stream == self.default_stream
        self.empty_cache()
        self.rand()


class SimulatedGraph:
    def __init__(self, cuda):
        self.cuda, self.operations = cuda, None

    def capture_begin(self, pool):
        assert self.cuda.stream != self.cuda.default_stream
        self.pool = pool
        self.cuda.underway.append(pool)
        self.cuda.users[pool] += 1
        self.cuda.generator_captures = True
        self.record, self.undo = Record(), Undo()  # capturing computes nothing
        self.patch = mock.patch.multiple(torch.Tensor, **{name: self.read(name) for name in ("cpu", "numpy", "tolist")})
        for mode in (self.patch, self.record, self.undo):
            mode.__enter__()

    def read(self, name):
        return lambda *arguments, **options: self.record.refuse(name)

    def capture_end(self):
        for mode in (self.undo, self.record, self.patch):
            mode.__exit__(None, None, None)
        if self.record.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.cuda._cuda_endAllocateToPool(self.cuda.device, self.pool)
        self.cuda.generator_captures = False
        self.operations = self.record.operations

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(results)[0], tree_flatten(again)[0], strict=True):
                    if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


CUDA = SimulatedCuda()


class SimulatedGraphs(graphs.CudaGraphs):
    """`CudaGraphs` with `CUDA` for `torch.cuda`."""

    def __init__(self):
        with mock.patch.object(graphs, "cuda", CUDA):
            super().__init__()

    def __call__(self, stage):
        with mock.patch.object(graphs, "cuda", CUDA):
            return super().__call__(stage)


class Undo(TorchDispatchMode):
    """On exit, restores tensors made outside that operations inside wrote to."""

    is_infra_mode = Record.is_infra_mode

    def __enter__(self):
        self._made, self._before = set(), {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if torch.is_tensor(value) and argument.alias_info is not None and argument.alias_info.is_write:
                    self._save(value)
        results = func(*args, **kwargs)
        given = {storage_of(each) for each in tree_flatten((args, kwargs))[0] if torch.is_tensor(each)}
        self._made |= {storage_of(each) for each in tree_flatten(results)[0] if torch.is_tensor(each)} - given
        return results

    def _save(self, tensor):
        if storage_of(tensor) not in self._made and storage_of(tensor) not in self._before:
            with _disable_current_modes():
                self._before[storage_of(tensor)] = tensor.untyped_storage(), tensor.untyped_storage().clone()

    def __exit__(self, *error):
        left = super().__exit__(*error)
        with _disable_current_modes():
            for storage, before in self._before.values():
                storage.copy_(before)
        return left


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()
