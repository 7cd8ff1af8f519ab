"""Without a GPU, Triton kernels run in Triton's interpreter. The variable must be set before triton is first
imported."""

import importlib.util
import itertools
import os

import hypothesis
import pytest

# the same examples in every run; `make test-full` draws new ones
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("new", derandomize=False)
hypothesis.settings.load_profile("same")

# pytest-xdist distributes whole files. These start first, because otherwise the last of them would run alone at the
# end.
LONG = (
    "test_bench_script",
    "test_kernel_accept_sample",
    "test_lossless",
    "test_graph_runner",
    "test_families",
    "test_sampling",
    "test_faults",
    "test_packaging",
    "test_inspect",
)

# parts of test names for `-m first_gpu`, for which single tests are distributed; the longest compilations start first
FIRST_GPU = ("test_on_gpu[torch.float32", "test_library", "test_real_sizes[", "test_no_race")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    runs_tests = hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)
    if runs_tests:  # pytest-xdist's controller process runs no tests and imports nothing
        prepare()


def prepare():
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # the models are tiny; more threads would only wait for each other
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from quick_interpreter import quicken

        quicken()


@pytest.hookimpl(trylast=True)  # after the selection by -m
def pytest_collection_modifyitems(config, items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        for item in [] if torch.cuda.is_available() else on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    first_gpu = all(item.get_closest_marker("first_gpu") for item in items)
    if first_gpu:
        items.sort(key=lambda item: [part not in item.nodeid for part in FIRST_GPU])
    else:
        items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if first_gpu and hasattr(config, "workerinput"):
        # --dist worksteal first gives each worker a contiguous part of the list, so that each part begins with long
        # tests
        workers = config.workerinput["workercount"]
        items[:] = itertools.chain(*sorted((items[worker::workers] for worker in range(workers)), key=len))


def pytest_addoption(parser):
    parser.addoption("--captured", action="store_true", help="run every test with rounds captured and read late")


@pytest.fixture
def poisoned_outputs():
    """Fill new tensors with NaN, the largest integer or True."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    # warn_only, because some operations of the references would raise on CUDA; memory is filled in any case
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _captured(request, monkeypatch):
    if request.config.getoption("--captured"):
        from helpers import capture_here

        capture_here(monkeypatch, 1)
