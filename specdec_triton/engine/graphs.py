"""CUDA graphs, and how to come back from a capture that failed.

If an operation is not permitted in a capture, `torch.cuda.graph` (2.11 to 2.13) does not clean up: the capture stream
stays current, the allocator believes that a capture is under way (the next `empty_cache` asserts), and the default
generator refuses to draw. `capture` restores all three.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import cuda

# torch has one capture stream a process, on the device that was current at the first capture
_streams: dict[int, Any] = {}
captured = 0  # graphs, in this process
# of captures that failed: torch's allocator of pinned memory keeps a pointer to each
_failed: list[Any] = []


def capture_stream(device: int) -> "torch.cuda.Stream":
    """The stream on which everything is captured on this CUDA device (its index)."""
    if device not in _streams:
        _streams[device] = cuda.Stream(device)
    return _streams[device]


def capture(stage: Callable[[], Any], pool: Any = None) -> tuple["torch.cuda.CUDAGraph", Any]:
    """Capture a stage on the current device.

    Args:
        stage: what to capture. It must have run before: compilers and autotuners cannot run in a capture.
        pool: from `torch.cuda.graph_pool_handle()`, for graphs that are never replayed at the same time. None: a pool
            of its own.

    Returns:
        The graph, and the stage's outputs, which each replay overwrites. Nothing is computed yet.

    Raises:
        Exception: the stage's own, or RuntimeError if the capture could not begin or end. The process is as before, but
            nothing more may be captured into `pool`.
    """
    device, outer = cuda.current_device(), cuda.current_stream()
    stream = capture_stream(device)
    graph, pool, failure = cuda.CUDAGraph(), pool or cuda.graph_pool_handle(), None
    try:
        # other threads may go on with what a capture would forbid
        with cuda.graph(graph, pool, stream=stream, capture_error_mode="thread_local"):
            try:
                outputs = stage()
            except BaseException as error:  # the end of the capture may raise another one, which says less
                failure = error
                raise
    except BaseException as error:
        failure = failure or error
        _leave(graph, pool, device, outer)
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # a cycle with its own traceback would keep the stage, and what it holds, alive
    global captured
    captured += 1
    return graph, outputs


def _leave(graph: Any, pool: Any, device: int, outer: Any) -> None:
    """Clean up after an error in a capture, or at its beginning or end."""
    cuda.set_stream(outer)
    try:
        cuda.memory._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # the capture itself ended, and torch has cleaned up
    cuda.memory._cuda_releasePool(device, pool)
    _failed.append(graph)
    # the generator leaves its capture mode at the end of any capture; an empty one is only warned of
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with cuda.graph(cuda.CUDAGraph(), stream=capture_stream(device), capture_error_mode="thread_local"):
            pass


class CudaGraphs:
    """Captures stages as CUDA graphs that share one memory pool: they are replayed on one stream, one at a time.

    Attributes:
        nbytes: device memory that the pool took.
    """

    def __init__(self):
        self._pool = None
        self.nbytes = 0

    def __call__(self, stage: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays the stage, and its outputs: see `capture`."""

        def counted() -> Any:
            before = cuda.memory_reserved()
            outputs = stage()
            self.nbytes += cuda.memory_reserved() - before
            return outputs

        self._pool = self._pool or cuda.graph_pool_handle()
        graph, outputs = capture(counted, self._pool)
        return graph.replay, outputs
