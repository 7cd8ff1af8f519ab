"""Graphs, key-value caches and token buffers that outlive a call (`Workspace`), and the store of them (`Workspaces`).

Without them, every call would run its first rounds eagerly and capture its graphs again. A call takes a workspace of an
earlier call of the same kind and returns it when it ends. Nothing is stored if the call raised an exception. The store
is bounded: the least recently used workspaces are dropped.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from ..forward.buffers import Buffers
from ..forward.cache import in_buckets
from ..forward.fingerprint import fingerprint
from ..tree import DraftTree
from .call import Call
from .graph_runner import GraphRunner

MOST_KEPT = 4  # number of idle workspaces
KEPT_SHARE = 0.1  # share of the device's memory that idle workspaces may hold; a larger one is freed after its call
STEPS_PER_DOUBLING = 4  # capacities between two powers of two
MOST_UNUSED = 2  # a workspace is reused if it has at most this many times the capacity that the call needs


@dataclass(eq=False)
class Workspace:
    """The state of one kind of call.

    Attributes:
        key: equal for calls that can share graphs.
        capacity: slots of the target's cache at the start of a call.
        width: columns of the text.
        graph_runner: runs the rounds, and holds their graphs.
        buffers: the tensors that the graphs read and write.
        fixed: True if shapes and addresses must not change from round to round: rounds are captured or read late.
        copies: trees that were drafted on the host, copied to the addresses that the graphs read, by shape.
        version: the version of `buffers` for which graphs were captured.
        fused: `Stats.fused` and `Stats.not_fused` of calls with these graphs.
    """

    key: Hashable
    capacity: int
    width: int
    graph_runner: GraphRunner
    buffers: Buffers
    fixed: bool
    copies: dict[Hashable, DraftTree] = field(default_factory=dict)
    version: int = 0
    fused: tuple[dict[str, int], dict[str, str]] = field(default_factory=lambda: ({}, {}))

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the workspace holds."""
        fields = (field for tree in self.copies.values() for field in vars(tree).values())
        copied = sum(field.nbytes for field in fields if isinstance(field, torch.Tensor))
        return self.buffers.nbytes + self.graph_runner.nbytes + copied

    def forget(self) -> None:
        """Drop the graphs, and the copies of trees that they read."""
        self.graph_runner.forget()
        self.copies.clear()


class Workspaces:
    """The idle workspaces of a model, most recently used last. A call holds its workspace alone, so calls of several
    threads get workspaces of their own."""

    def __init__(self) -> None:
        self._idle: list[Workspace] = []

    def take(self, call: Call, capacity: int, reserve: int, lag: int) -> Workspace:
        """A workspace for a call; a new one if none fits. A call with logits processors or scores to return gets one
        without a key, which is not kept: its graphs read tensors of the processors.

        Args:
            call: the call.
            capacity: number of cache slots that the call needs at its start.
            reserve: number of additional slots if shapes are fixed.
            lag: number of rounds by which reports are read late.
        """
        runner = GraphRunner(call.device, call.why_eager())
        fixed = runner.why_eager is None or lag > 0
        capacity += reserve if fixed else 0
        if runner.why_eager is not None:
            return Workspace(None, capacity, call.max_length + 1, runner, Buffers(), fixed)
        shares = not call.processors and not call.keep
        key = key_of(call) if shares else None
        width = capacity_bucket(call.max_length + 1)
        most = MOST_UNUSED * max(capacity_bucket(capacity), width)
        for held in reversed(list(self._idle)) if shares else ():  # other threads may change the list
            fits = capacity <= held.capacity <= most and width <= held.width <= most
            if fits and held.key == key and self._remove(held):
                held.graph_runner.begin_call()
                return held
        return Workspace(key, capacity_bucket(capacity), width, runner, Buffers(fixed=True), fixed)

    def put_back(self, workspace: Workspace) -> None:
        """Keep a workspace for later calls. It must not be called if the call raised an exception."""
        runner = workspace.graph_runner
        if workspace.key is None or runner.why_eager is not None:
            runner.forget()
            return
        runner.end_call()
        self._idle.append(workspace)
        limit = KEPT_SHARE * memory_of(runner.device)
        for oldest in list(self._idle):
            if len(self._idle) > MOST_KEPT or self.nbytes > limit:
                self._drop(oldest)

    def release(self) -> int:
        """Drop all idle workspaces. Returns the number of bytes that they held."""
        freed = 0
        for held in list(self._idle):
            freed += held.nbytes
            self._drop(held)
        return freed

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that idle workspaces hold."""
        return sum(held.nbytes for held in list(self._idle))

    def _remove(self, workspace: Workspace) -> bool:
        """Remove a workspace. False if another thread has removed it."""
        try:
            self._idle.remove(workspace)
        except ValueError:
            return False
        return True

    def _drop(self, workspace: Workspace) -> None:
        if self._remove(workspace):
            workspace.forget()


def key_of(call: Call) -> Hashable:
    """Equal keys mean that a call can replay the graphs of another, if the capacities fit, too.

    It has what captured code depends on, except the contents of buffers, the values that sessions state by
    `Buffers.agree`, and the key of each round: the models' fingerprint, the drafter, the options, the kinds of sampling
    parameters, and torch's settings.
    """
    options, filters = call.options, call.filters
    eos = None if call.eos_ids is None else len(call.eos_ids)
    shape = (
        len(call.input_ids),
        call.rule,
        eos,
        tuple(each is None for each in filters.tensors),
        top_k_bucket(filters.max_top_k),
    )
    matmul = torch.backends.cuda.matmul
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer interface
        precision = matmul.fp32_precision
    settings = (
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.cuda.current_stream(call.device).cuda_stream if call.device.type == "cuda" else None,
    )
    asked = options.tree, options.impl, options.compile, options.fuse, call.vocab_size
    return shape, settings, fingerprint(asked, call.model, type(call.drafter), vars(call.drafter))


def capacity_bucket(slots: int) -> int:
    """`slots` rounded up, so that calls of similar lengths share graphs."""
    step = in_buckets(max(2 ** (slots.bit_length() - 1) // STEPS_PER_DOUBLING, 1))
    return -(-slots // step) * step


def top_k_bucket(max_top_k: int | None) -> int | None:
    """`Filters.max_top_k` rounded up to a power of two, so that calls with other values share graphs."""
    return max_top_k and 1 << (max_top_k - 1).bit_length()


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**36
