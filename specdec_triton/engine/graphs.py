"""Captures CUDA graphs and cleans up after a capture that failed.

If an operation is not permitted in a capture, `torch.cuda.graph` (2.11 to 2.13) does not clean up. The capture stream
stays current, the allocator assumes that the capture continues (the next `empty_cache` fails with an assertion), and
the default random generator refuses to draw. `capture` restores all three.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import cuda

# device index -> capture stream; torch's own capture stream exists only on the device of the first capture
_streams: dict[int, Any] = {}
captured = 0  # number of graphs captured in this process
# graphs of failed captures; they must stay alive because torch's allocator of pinned memory keeps pointers to them
_failed: list[Any] = []


def capture_stream(device: int) -> "torch.cuda.Stream":
    """The stream that is used for all captures on the CUDA device of this index."""
    if device not in _streams:
        _streams[device] = cuda.Stream(device)
    return _streams[device]


def capture(function: Callable[[], Any], pool: Any = None) -> tuple["torch.cuda.CUDAGraph", Any]:
    """Capture a function as a CUDA graph on the current device.

    Args:
        function: the function. It must have run before, because compilers and autotuners cannot run in a capture.
        pool: a handle from `torch.cuda.graph_pool_handle()`, to share memory with graphs that are never replayed at the
            same time. None gives the graph its own pool.

    Returns:
        The graph and the function's outputs. Each replay overwrites the outputs. The capture itself computes nothing.

    Raises:
        Exception: the function's own exception, or a RuntimeError if the capture could not begin or end. The state of
            the process is restored, but nothing more may be captured into `pool`.
    """
    device, outer = cuda.current_device(), cuda.current_stream()
    stream = capture_stream(device)
    graph, pool, failure = cuda.CUDAGraph(), pool or cuda.graph_pool_handle(), None
    try:
        # other threads may run operations that are not permitted in a capture
        with cuda.graph(graph, pool, stream=stream, capture_error_mode="thread_local"):
            try:
                outputs = function()
            except BaseException as error:  # the end of the capture may raise another error, which is less specific
                failure = error
                raise
    except BaseException as error:
        failure = failure or error
        _leave(graph, pool, device, outer)
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # a reference cycle with its traceback would keep the function and its tensors alive
    global captured
    captured += 1
    return graph, outputs


def _leave(graph: Any, pool: Any, device: int, outer: Any) -> None:
    """Clean up after a capture that failed."""
    cuda.set_stream(outer)
    try:
        cuda.memory._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # the capture had ended, so torch has cleaned up
    cuda.memory._cuda_releasePool(device, pool)
    _failed.append(graph)
    # the generator leaves capture mode at the end of any capture; an empty capture only gives a warning
    with contextlib.suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with cuda.graph(cuda.CUDAGraph(), stream=capture_stream(device), capture_error_mode="thread_local"):
            pass


class CudaGraphs:
    """Captures functions as CUDA graphs that share one memory pool. The graphs must be replayed on one stream.

    Attributes:
        nbytes: bytes of device memory that the pool holds.
    """

    def __init__(self):
        self._pool = None
        self.nbytes = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture a function. Returns a function that replays it, and its outputs; see `capture`."""

        def counted() -> Any:
            before = cuda.memory_reserved()
            outputs = function()
            self.nbytes += cuda.memory_reserved() - before
            return outputs

        self._pool = self._pool or cuda.graph_pool_handle()
        graph, outputs = capture(counted, self._pool)
        return graph.replay, outputs
