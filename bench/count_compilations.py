"""Counts, without a GPU, the Triton compilations that the tests of a pytest command need on one.

    python bench/count_compilations.py [--processes 14] [--arch 90] -- -m first_gpu

The arguments after -- go to pytest, which runs here with CPU tensors. Triton computes the key of each launch
(constants, types, alignment, options) as for a GPU, but nothing is compiled or run. Outputs are garbage and tests fail:
a launch after a failed assertion is not counted, and neither are the kernels of torch.compile. Two numbers bound the
compilations of a process: an even share if all processes share compilations (Triton's cache on disk), and all that its
own tests need if they do not.
"""

import argparse
import collections
import contextlib
import math
import os
import pathlib
import sys
import types

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest
import torch

from specdec_triton import ops
from specdec_triton.ops import reference
from specdec_triton.tools.inspection import record_launches

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Counter:
    """A pytest plugin: {test: [key of each of its launches]}."""

    def __init__(self):
        self.launches = {}
        self.current = []

    def pytest_collection_finish(self, session):
        for item in session.items:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]

    def pytest_runtest_logstart(self, nodeid):
        self.current = self.launches[nodeid] = []

    def note(self, launch):
        self.current.append((launch.function.__module__, launch.function.__name__, launch.key))


def pretend(counter: Counter, arch: int) -> None:
    """Patch this process: launches are counted, ops take CPU tensors, references and graphs compute nothing."""
    record_launches(arch, counter.note)
    impls = {op: getattr(torch.ops.specdec_triton, op).default for op in ops.OPS}
    for module in (ops.trees, ops.acceptance):
        module.resolve = lambda op, impl, device: getattr(reference, op) if impl == "reference" else impls[op]
    reference.tree_attention, reference.compact_kv = ops.trees._fake_tree_attention, ops.acceptance._fake_compact_kv

    def acceptance(logits, tokens, parents, *others, max_depth=None, **_):
        """Outputs of the right shapes; max_depth is the first number after the three tensors."""
        depth = max_depth if max_depth is not None else next(each for each in others if isinstance(each, int))
        return reference.Acceptance(*ops.acceptance._fake_accept_greedy(logits, tokens, parents, depth, None, None))

    reference.accept_greedy = reference.accept_sample = acceptance
    reference.draft_topk = lambda *given: reference.Candidates(*ops.trees._fake_draft_topk(*given))
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.CUDAGraph = lambda: types.SimpleNamespace(replay=lambda: None)
    torch.cuda.graph = lambda graph: contextlib.nullcontext()
    torch.cuda.set_sync_debug_mode = lambda mode: None
    torch.compile = lambda function, **_: function
    for name, shape in (("zeros", lambda *size, **_: size), ("randint", lambda low, high, size, **_: size)):
        setattr(torch, name, unless_large(getattr(torch, name), shape))


def unless_large(make, shape):
    """`make`, but large tensors are not filled."""

    def made(*arguments, dtype=None, **options):
        size = shape(*arguments)
        if all(isinstance(each, int) for each in size) and math.prod(size) > 2**26:
            return torch.empty(size, dtype=dtype)
        return make(*arguments, dtype=dtype, **options)

    return made


def table(launches: dict[str, list[tuple]], processes: int) -> list[str]:
    """A line for each file, one for all files, and the compilations of a process."""
    files = collections.defaultdict(dict)
    for test, keys in launches.items():
        files[test.partition("::")[0]][test] = keys
    lines = [f"{'':40} {'tests':>6} {'launches':>9} {'compilations':>13} {'most of one test':>17}"]
    for name, tests in [*files.items(), ("all", launches)]:
        most = max((len(set(keys)) for keys in tests.values()), default=0)
        total, distinct = sum(map(len, tests.values())), len(set().union(*tests.values()))
        lines.append(f"{name:40} {len(tests):6} {total:9} {distinct:13} {most:17}")
    silent = sum(not keys for keys in launches.values())
    parts = [list(launches.values())[part::processes] for part in range(processes)]
    most = max(len(set().union(*part)) for part in parts)
    least = -(-len(set().union(*launches.values())) // processes)
    lines.append(f"{silent} tests launched nothing")
    lines.append(f"compilations in one of {processes} processes: {least} if all are shared, {most} if none are")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("pytest", nargs="*", help="pytest's arguments, after --")
    arguments = parser.parse_args()
    counter = Counter()
    pretend(counter, arguments.arch)
    os.chdir(ROOT)
    quiet = ["-q", "--tb=no", "-rN", "-W", "ignore", "-p", "no:cacheprovider"]
    pytest.main([*quiet, *arguments.pytest], plugins=[counter])
    print("\n".join(table(counter.launches, arguments.processes)))


if __name__ == "__main__":
    main()
