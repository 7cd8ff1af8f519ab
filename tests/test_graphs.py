"""A capture that fails does not change the state of the process."""

import gc
import weakref

import pytest
import torch

from simulated_graph import HostRead, SimulatedCuda
from specdec_triton.engine import graphs
from specdec_triton.tools import calibration


@pytest.fixture
def cuda(monkeypatch):
    made = SimulatedCuda()
    monkeypatch.setattr(graphs, "cuda", made)
    monkeypatch.setattr(graphs, "_streams", {})
    return made


def number():
    return torch.ones(1).add_(1)


def interrupted():
    number()
    raise KeyboardInterrupt


READS = {
    "item": lambda: number().item(),
    "cpu": lambda: number().cpu(),
    "numpy": lambda: number().numpy(),
    "mask": lambda: number()[number() > 0],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_capture_that_fails_leaves_the_process_as_it_was(cuda, read):
    pool = cuda.graph_pool_handle()
    graphs.capture(number, pool)
    for into in (pool, None):
        with pytest.raises(HostRead, match="in a captured stage"):
            graphs.capture(read, into)
        cuda.assert_sound()
    assert cuda.users[pool] == 1, "the pool must be released as often as it was taken, but for the graph that holds it"
    graph, outputs = graphs.capture(number)
    graph.replay()
    assert outputs.tolist() == [2]


def test_a_capture_that_failed_holds_nothing(cuda):
    """The function's tensors (in practice a cache of gigabytes) are freed at once, not by the next garbage
    collection."""

    cache = number()

    def stage():
        return cache.item()

    held = weakref.ref(stage)
    gc.collect()
    gc.disable()
    try:
        graphs.capture(stage)
    except HostRead:
        del stage
    finally:
        gc.enable()
    assert held() is None


def test_an_exception_of_the_stage_is_its_own(cuda):
    with pytest.raises(KeyboardInterrupt):
        graphs.capture(interrupted)
    cuda.assert_sound()


def test_a_capture_that_cannot_begin(cuda, monkeypatch):
    def refuse(self, pool):
        raise RuntimeError("no memory")

    monkeypatch.setattr("simulated_graph.SimulatedGraph.capture_begin", refuse)
    with pytest.raises(RuntimeError, match="no memory"):
        graphs.capture(number)
    cuda.assert_sound()


def test_each_device_has_a_capture_stream(cuda):
    """torch's own capture stream belongs to the first device. If kernels of a second device were captured on it, their
    order would be undefined."""
    for cuda.device in (0, 1, 0):
        graphs.capture(number)
        cuda.assert_sound()
    assert list(graphs._streams.values()) == ["stream of device 0", "stream of device 1"]


def test_clocks_come_back_from_a_capture_that_fails(cuda):
    calls = []

    def read_in_the_capture(tensor):
        calls.append(tensor)
        return tensor.cpu() if len(calls) > 3 else tensor

    with pytest.raises(HostRead):
        calibration.captured(read_in_the_capture, [number()])
    cuda.assert_sound()
