"""Without a GPU, Triton kernels run in its interpreter; the variable must be set before triton is first imported."""

import importlib.util
import os

import hypothesis
import pytest

# the same examples every time; `make test-full` draws new ones
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("new", derandomize=False)
hypothesis.settings.load_profile("same")

# pytest-xdist hands out whole files; these start first, since the last of them to end would keep one worker alone
LONG = (
    "test_bench_script",
    "test_kernel_accept_sample",
    "test_engine",
    "test_lossless",
    "test_sampling",
    "test_families",
    "test_wrappers",
    "test_verify",
    "test_packaging",
    "test_inspect",
)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    runs_tests = hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)
    if runs_tests:  # pytest-xdist's first process does not, and imports nothing
        prepare()


def prepare():
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # the models are tiny: more threads only wait for each other
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from quick_interpreter import quicken

        quicken()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_addoption(parser):
    parser.addoption("--captured", action="store_true", help="run every test with rounds captured and read late")


@pytest.fixture(autouse=True)
def _captured(request, monkeypatch):
    if request.config.getoption("--captured"):
        from simulated_graph import SimulatedGraphs
        from specdec_triton import engine

        monkeypatch.setitem(engine.CAPTURES, "cpu", SimulatedGraphs)
        monkeypatch.setitem(engine.LAG, "cpu", 1)
