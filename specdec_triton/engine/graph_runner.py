"""Runs the functions of a round as CUDA graphs (`GraphRunner`), and passes reports to the host (`Reports`).

An eager forward of a transformers model launches about forty kernels per layer, one by one, from Python. A function
whose tensors keep their addresses is captured on its second run; the first run compiles and tunes its kernels. From
then on it is replayed with a single launch. A function that cannot be captured runs eagerly, with the same results.
"""

import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from .graphs import CudaGraphs

MAX_SHAPES = 12  # largest number of round shapes with graphs at a time; a new one replaces the least recently used one
LAG = {"cuda": 1}  # by device type: number of rounds by which the host reads reports late; 0 for other devices


CAPTURES: dict[str, Callable] = {"cuda": CudaGraphs}  # by device type


def cannot_capture(device: torch.device) -> str | None:
    """The reason why nothing can be captured on this device, or None."""
    return None if device.type in CAPTURES else f"tensors on {device.type}: CUDA graphs need a CUDA GPU"


@dataclass(eq=False)
class _Graph:
    """A captured function.

    Attributes:
        replay: launches the graph.
        outputs: the function's outputs, which each replay overwrites.
        function: the function. During its call it is stored because it keeps the tensors alive that the graph reads.
        is_new: True if the present call captured or has replayed the graph.
    """

    replay: Callable[[], None]
    outputs: Any
    function: Callable | None
    is_new: bool = True


class GraphRunner:
    """Runs the functions of a call, eagerly or as CUDA graphs. A later call may use the same runner and its graphs: see
    `begin_call` and `end_call`.

    Args:
        device: the model's device.
        why_eager: the reason why nothing is to be captured, or None.
        max_shapes: largest number of round shapes that have graphs at a time.

    Attributes:
        why_eager: as given, or the reason why capturing was given up.
        device: as given.
        captured: number of graphs captured in this call.
        reused: number of graphs of earlier calls that this call replayed.
        replayed: number of graph launches.
        capture_seconds, replay_seconds: host time spent on captures and on launches, in seconds. A capture first waits
            for the device.
        worthwhile: False if too few rounds are left to capture new graphs.
    """

    def __init__(self, device: torch.device, why_eager: str | None = None, max_shapes: float = MAX_SHAPES):
        self.why_eager = why_eager = why_eager or cannot_capture(device)
        self.device, self._max_shapes = device, max_shapes
        self._capture = None if why_eager else CAPTURES[device.type]()
        # shape -> name -> graph; least recently used shape first
        self._graphs: OrderedDict[Hashable, dict[str, _Graph]] = OrderedDict()
        self._seen: Counter[tuple[str, Hashable]] = Counter()  # eager runs since the graph was evicted, or at all
        self._evicted: Counter[Hashable] = Counter()
        self.begin_call()

    def begin_call(self) -> None:
        """Set the counts to 0."""
        self.captured = self.reused = self.replayed = 0
        self.capture_seconds = self.replay_seconds = 0.0
        self.worthwhile = True

    def end_call(self) -> None:
        """Keep the graphs, but not the functions, which refer to the call. The caller must keep the tensors alive that
        the graphs read."""
        for graphs in self._graphs.values():
            for graph in graphs.values():
                graph.function, graph.is_new = None, False

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the graphs hold."""
        return self._capture.nbytes if self._graphs else 0

    def captures(self, name: str, shape: Hashable) -> bool:
        """True if the next run of this function is a replay, of a graph that exists or is captured then."""
        if self.why_eager is not None:
            return False
        if name in self._graphs.get(shape, ()):
            return True
        # the number of eager runs doubles with each eviction, so that shapes cannot keep evicting each other
        return self.worthwhile and self._seen[name, shape] >= 2 ** self._evicted[shape]

    def run(self, name: str, shape: Hashable, function: Callable[[], Any]) -> Any:
        """Run a function and return its outputs. If it is replayed, its next run overwrites them.

        Args:
            name: name of the function within a round.
            shape: a hashable key of the round. In rounds of equal shape, the function must run the same operations on
                the same tensors: tensors that existed before the round, and outputs of earlier functions of the round.
            function: the function.
        """
        if self.why_eager is not None:
            return function()
        if not self.captures(name, shape):
            self._seen[name, shape] += 1
            return function()
        if name not in self._graphs.get(shape, ()):
            try:
                self._capture_as(name, shape, function)
            except Exception as error:
                self._give_up(error)
                return function()
        self._graphs.move_to_end(shape)
        graph = self._graphs[shape][name]
        begin = time.perf_counter()
        graph.replay()
        self.replay_seconds += time.perf_counter() - begin
        self.replayed += 1
        if not graph.is_new:
            graph.is_new = True
            self.reused += 1
        return graph.outputs

    def _capture_as(self, name: str, shape: Hashable, function: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        if shape not in self._graphs and len(self._graphs) >= self._max_shapes:
            self._synchronize()
            oldest, graphs = self._graphs.popitem(last=False)
            self._evicted[oldest] += 1
            for evicted in graphs:
                del self._seen[evicted, oldest]
        graph = _Graph(*self._capture(function), function)
        self._graphs.setdefault(shape, {})[name] = graph
        self.captured += 1
        self.capture_seconds += time.perf_counter() - begin

    def forget(self) -> None:
        """Drop all graphs, because they are not needed any more or tensors that they use have moved."""
        if self._graphs:
            self._synchronize()
            self._capture = CAPTURES[self.device.type]()  # with a new memory pool
        self._graphs.clear()
        self._seen.clear()
        self._evicted.clear()

    def _synchronize(self) -> None:
        """Wait for the device. A graph must not be destroyed while it runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _give_up(self, error: Exception) -> None:
        self.forget()
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        self.why_eager = "out of memory while capturing" if out_of_memory else f"capturing failed: {error}"
        warnings.warn(
            "generate: the remaining rounds run without CUDA graphs, which is slower but gives the same results: "
            f"{self.why_eager}",
            stacklevel=2,
        )


class Reports:
    """The queue of reports from the rounds to the host. Reports are read in order, `lag` rounds late.

    Args:
        device: the device of the reports.
        lag: number of rounds that are in flight while a report is read.
    """

    def __init__(self, device: torch.device, lag: int):
        self.lag = lag
        self._pinned = device.type == "cuda"
        self._waiting: deque[tuple] = deque()

    def put(self, report: torch.Tensor, kept: dict[str, torch.Tensor], on_host: Any) -> None:
        """Start the copy of a round's report to the host.

        Args:
            report: [B, F] int64 on the device.
            kept: tensors that `take` returns with the report.
            on_host: a value that `take` returns with the report.
        """
        arrived = None
        if self._pinned:
            host = torch.empty(report.shape, dtype=report.dtype, device="cpu", pin_memory=True)
            host.copy_(report, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            host = report.clone() if self.lag else report
        if self.lag:
            kept = {name: scores.clone() for name, scores in kept.items()}  # the next round would overwrite them
        self._waiting.append((host, arrived, kept, on_host))

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> tuple[list[list[int]], dict[str, torch.Tensor], Any]:
        """The oldest report as a list, and the other arguments of its `put`. It is the host's only wait in a round."""
        host, arrived, kept, on_host = self._waiting.popleft()
        if arrived is not None:
            arrived.synchronize()
        return host.tolist(), kept, on_host
