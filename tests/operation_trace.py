"""The operations of a function as lines that can be compared."""

import torch
from torch.utils._pytree import tree_flatten

from simulated_graph import Record, storage_of


def trace(stage):
    """Run a function. Returns a line for each operation, and its outputs. Tensors that existed before are shown by
    address, others by the operation that made them. A CUDA graph records the same information, so equal lines mean
    equal graphs."""
    with Record() as record:
        outputs = stage()
    made, lines = {}, []

    def named(value):
        if not torch.is_tensor(value):
            return value
        place = made.get(storage_of(value), value.data_ptr())
        return place, value.storage_offset() if storage_of(value) in made else 0, tuple(value.shape), value.stride()

    for number, (func, args, kwargs, results) in enumerate(record.operations):
        flat = tree_flatten((args, kwargs))[0]
        if func.overloadpacket.__name__ == "lift_fresh":  # a number from Python code
            lines.append((str(func), args[0].tolist()))
            made[storage_of(args[0])] = f"result 0 of {number}"
            continue
        lines.append((str(func), *map(named, flat)))
        given = {storage_of(each) for each in flat if torch.is_tensor(each)}
        for part, result in enumerate(tree_flatten(results)[0]):
            if torch.is_tensor(result) and storage_of(result) not in given:
                made[storage_of(result)] = f"result {part} of {number}"
    return lines, outputs
