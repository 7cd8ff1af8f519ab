"""Without a GPU, Triton kernels run in its interpreter; the variable must be set before triton is first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def pytest_addoption(parser):
    parser.addoption("--captured", action="store_true", help="run every test with rounds captured and read late")


@pytest.fixture(autouse=True)
def _captured(request, monkeypatch):
    if request.config.getoption("--captured"):
        from simulated_graph import SimulatedGraphs
        from specdec_triton import engine

        monkeypatch.setitem(engine.CAPTURES, "cpu", SimulatedGraphs)
        monkeypatch.setitem(engine.LAG, "cpu", 1)
