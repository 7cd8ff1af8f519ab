"""Without a GPU, Triton kernels run in its interpreter; the variable must be set before triton is first imported."""

import functools
import importlib.util
import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the models are tiny: more threads only wait for each other
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))


# the same examples every time; `make test-full` draws new ones
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("new", derandomize=False)
hypothesis.settings.load_profile("same")


def _hasten_interpreter():
    """At every call of a device function the interpreter searches triton.language for what it has to replace, though
    it has replaced it at the launch: here once a launch and module. It also remembers what does not change."""
    from triton import language
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = {}

    @functools.cache
    def modules_of(function):
        return tuple({id(value) for value in function.__globals__.values() if value in (language, language.core)})

    def replace_once(function):
        modules = modules_of(function)
        if modules not in replaced:
            replaced[modules] = replace(function)
        return replaced[modules]

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_anew
    numpy_type, by_name = interpreter._get_np_dtype, {}

    def remembered(dtype):
        name = dtype.scalar.name
        if name not in by_name:
            by_name[name] = numpy_type(dtype)
        return by_name[name]

    interpreter._get_np_dtype = remembered


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _hasten_interpreter()


def pytest_addoption(parser):
    parser.addoption("--captured", action="store_true", help="run every test with rounds captured and read late")


@pytest.fixture(autouse=True)
def _captured(request, monkeypatch):
    if request.config.getoption("--captured"):
        from simulated_graph import SimulatedGraphs
        from specdec_triton import engine

        monkeypatch.setitem(engine.CAPTURES, "cpu", SimulatedGraphs)
        monkeypatch.setitem(engine.LAG, "cpu", 1)
