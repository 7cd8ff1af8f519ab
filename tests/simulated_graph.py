"""CUDA graphs on a CPU: a stage's operations are recorded with the tensors they touched, and replayed without Python.

A replay computes each recorded operation on the recorded tensors and puts results where they were put then. So it
does what a CUDA graph does, for better or worse: a Python value that has changed since, a tensor that is another one
by now or a value read by the host shows as a wrong text or as an error.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}


class HostRead(RuntimeError):
    """What CUDA calls an operation not permitted when a stream is capturing."""


class Record(TorchDispatchMode):
    """Executes and records. `operations` are (op, arguments, keywords, results)."""

    def __init__(self):
        super().__init__()
        self.operations = []

    @classmethod
    def is_infra_mode(cls):
        """What is compiled already runs as compiled."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in READS or any(torch.is_tensor(index) and index.dtype == torch.bool for index in indices):
            raise HostRead(f"{name} in a captured stage")
        results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, results))
        return results


class SimulatedGraphs:
    """Stands in for `engine.CudaGraphs`."""

    nbytes = 0

    def __call__(self, stage):
        with Record() as record:
            outputs = self.without_effect(stage)
        operations = record.operations

        def replay():
            with torch.no_grad():
                for func, args, kwargs, results in operations:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_flatten(results)[0], tree_flatten(again)[0], strict=True):
                        if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay, outputs

    def without_effect(self, stage):
        """Capturing computes nothing: what the stage wrote to tensors that were there before is undone."""
        with Undo():
            return stage()


class Undo(TorchDispatchMode):
    """Restores, on leaving, what operations inside wrote to tensors made outside."""

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
        given = {_storage(each) for each in tree_flatten((args, kwargs))[0] if torch.is_tensor(each)}
        self._made |= {_storage(each) for each in tree_flatten(results)[0] if torch.is_tensor(each)} - given
        return results

    def _save(self, tensor):
        if _storage(tensor) not in self._made and _storage(tensor) not in self._before:
            with _disable_current_modes():
                self._before[_storage(tensor)] = tensor.untyped_storage(), tensor.untyped_storage().clone()

    def __exit__(self, *error):
        left = super().__exit__(*error)
        with _disable_current_modes():
            for storage, before in self._before.values():
                storage.copy_(before)
        return left


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


def trace(stage):
    """What a stage did, and its outputs: a line for each operation, its tensors by address where they were there before
    and by the operation that made them otherwise. What a CUDA graph would hold, so equal lines are equal graphs."""
    with Record() as record:
        outputs = stage()
    made, lines = {}, []

    def named(value):
        if not torch.is_tensor(value):
            return value
        place = made.get(_storage(value), value.data_ptr())
        return place, value.storage_offset() if _storage(value) in made else 0, tuple(value.shape), value.stride()

    for number, (func, args, kwargs, results) in enumerate(record.operations):
        flat = tree_flatten((args, kwargs))[0]
        if func.overloadpacket.__name__ == "lift_fresh":  # a number of the Python code
            lines.append((str(func), args[0].tolist()))
            made[_storage(args[0])] = f"result 0 of {number}"
            continue
        lines.append((str(func), *map(named, flat)))
        given = {_storage(each) for each in flat if torch.is_tensor(each)}
        for part, result in enumerate(tree_flatten(results)[0]):
            if torch.is_tensor(result) and _storage(result) not in given:
                made[_storage(result)] = f"result {part} of {number}"
    return lines, outputs
