"""How the stages of a round run, and how the host follows: CUDA graphs captured once and replayed, reports read late.

An eager forward of a transformers model launches some forty kernels a layer, one by one, from Python. A stage whose
tensors stay where they are is captured the second time it is wanted (the first time compiles and tunes what it calls)
and from then on replayed: one launch. A stage that cannot be captured runs as it is, with the same results.
"""

import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .graphs import CudaGraphs

MAX_SHAPES = 12  # of a call's rounds that are captured at a time: the least recently used one makes room for another
LAG = {"cuda": 1}  # rounds that the host looks back, by kind of device; 0 where there is nothing to wait for


CAPTURES: dict[str, Callable] = {"cuda": CudaGraphs}  # by kind of device


def cannot_capture(device: torch.device) -> str | None:
    """Why nothing can be captured on this device, or None."""
    return None if device.type in CAPTURES else f"tensors on {device.type}: CUDA graphs need a CUDA GPU"


class Stages:
    """Runs the stages of one call.

    Args:
        device: where the model is.
        why_eager: why nothing is to be captured; None: stages are.
        max_shapes: kinds of rounds that are captured at a time.

    Attributes:
        why_eager: as given, or why capturing was given up.
        captured: graphs captured.
        replayed: stages run by replaying one.
        capture_seconds, replay_seconds: host time of both; a capture waits for the device first.
        worthwhile: what is not captured yet may be: enough rounds are left to pay for it.
    """

    def __init__(self, device: torch.device, why_eager: str | None = None, max_shapes: float = MAX_SHAPES):
        self.why_eager = why_eager = why_eager or cannot_capture(device)
        self._device, self._max_shapes = device, max_shapes
        self._capture = None if why_eager else CAPTURES[device.type]()
        # shape -> stage -> what replays it, its outputs, and the stage, which holds what it reads; last used last
        self._graphs: OrderedDict[Hashable, dict[str, tuple[Callable[[], None], Any, Callable]]] = OrderedDict()
        self._seen: Counter[tuple[str, Hashable]] = Counter()  # runs since it was captured last, or ever
        self._evicted: Counter[Hashable] = Counter()
        self.captured = self.replayed = 0
        self.capture_seconds = self.replay_seconds = 0.0
        self.worthwhile = True

    @property
    def nbytes(self) -> int:
        """Device memory that the graphs hold."""
        return self._capture.nbytes if self._graphs else 0

    def captures(self, name: str, shape: Hashable) -> bool:
        """Whether the next run of this stage is a graph's."""
        if self.why_eager is not None:
            return False
        if name in self._graphs.get(shape, ()):
            return True
        # twice as many runs after each eviction: shapes that keep evicting each other stay as they are
        return self.worthwhile and self._seen[name, shape] >= 2 ** self._evicted[shape]

    def run(self, name: str, shape: Hashable, stage: Callable[[], Any]) -> Any:
        """The stage's outputs; those of a replayed stage are overwritten by its next run.

        Args:
            name: which stage of a round.
            shape: tells rounds apart. In rounds of one shape, a stage does the same to the same tensors: those that
                were there before the round, and the outputs of the stages before it.
        """
        if not self.captures(name, shape):
            self._seen[name, shape] += 1
            return stage()
        if name not in self._graphs.get(shape, ()):
            try:
                self._capture_as(name, shape, stage)
            except Exception as error:
                self._give_up(error)
                return stage()
        self._graphs.move_to_end(shape)
        replay, outputs, _ = self._graphs[shape][name]
        begin = time.perf_counter()
        replay()
        self.replay_seconds += time.perf_counter() - begin
        self.replayed += 1
        return outputs

    def _capture_as(self, name: str, shape: Hashable, stage: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        if shape not in self._graphs and len(self._graphs) >= self._max_shapes:
            self._synchronize()
            oldest, stages = self._graphs.popitem(last=False)
            self._evicted[oldest] += 1
            for evicted in stages:
                del self._seen[evicted, oldest]
        graph = *self._capture(stage), stage
        self._graphs.setdefault(shape, {})[name] = graph
        self.captured += 1
        self.capture_seconds += time.perf_counter() - begin

    def forget(self) -> None:
        """Drop all graphs: the call is over, or tensors that they write to are no longer where they were."""
        if self._graphs:
            self._synchronize()
            self._capture = CAPTURES[self._device.type]()  # with a pool of its own
        self._graphs.clear()
        self._seen.clear()
        self._evicted.clear()

    def _synchronize(self) -> None:
        """Before graphs go: one must not be destroyed while it runs."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _give_up(self, error: Exception) -> None:
        self.forget()
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        self.why_eager = "out of memory while capturing" if out_of_memory else f"capturing failed: {error}"
        warnings.warn(
            f"generate: rounds run without CUDA graphs from here on, slower, with the same results: {self.why_eager}",
            stacklevel=2,
        )


class Reports:
    """What the rounds tell the host, read in order and `lag` rounds late.

    Args:
        device: where reports are made.
        lag: rounds that are on their way when one is read.
    """

    def __init__(self, device: torch.device, lag: int):
        self.lag = lag
        self._pinned = device.type == "cuda"
        self._waiting: deque[tuple] = deque()

    def put(self, report: torch.Tensor, kept: dict[str, torch.Tensor], beside: Any) -> None:
        """Send a round's report [B, F] int64 on its way; `kept` tensors and `beside` wait for it."""
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
        self._waiting.append((host, arrived, kept, beside))

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> tuple[list[list[int]], dict[str, torch.Tensor], Any]:
        """The oldest report, and what waited for it. The one wait of a round."""
        host, arrived, kept, beside = self._waiting.popleft()
        if arrived is not None:
            arrived.synchronize()
        return host.tolist(), kept, beside
