"""Shared by the benches: outputs are verified before timing, caches are cold, and every row has its origin.

A bench describes its cases and providers; `Bench` does the rest:

    def measure(bench, nodes):
        sets = [inputs() for _ in range(bench.num_sets(nbytes))]  # in rotation: larger than any cache
        bench.measure(Provider("triton", call, kernel=True), {"N": nodes}, "bf16", sets, verify, nbytes=nbytes)

    bench = Bench("accept", __doc__)  # parses --rehearse, --out, --seconds, --budget
    sys.exit(bench.run(measure, CASES, SMALL, REHEARSED))  # 1 if an output was wrong or a provider failed

Rows go to `rows.json` in the folder of `--out`, which all benches share. A run that was interrupted or used up its
`--budget` continues if it is started again with the same folder. If the commit has changed, its rows are measured
again.

Without a GPU a bench runs small sizes: PyTorch is timed on this CPU, and Triton's kernels are verified in the
interpreter but not timed. `--rehearse` runs tiny sizes on any machine; it shows that the bench works, and its numbers
mean nothing.
"""

import argparse
import atexit
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from _rows import COMPILED, ROOT, Results

COLD_BYTES = 200e6  # several times the largest L2 cache: the inputs of a call are evicted before its next use
MAX_SETS = 128
HANGS = 40  # seconds after the budget within which a bench must end
TERMINATED, DEAD = 143, 3  # exit statuses: stopped (a shell's); this process lost its GPU
UNTIMED = "verified in Triton's interpreter, not timed"

sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton's first import

from specdec_triton.tools import calibration, roofline  # noqa: E402
from specdec_triton.tools.provenance import provenance, results_folder, version  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: for rows.
        call: takes one set of inputs, returns the outputs.
        graph: the call can be captured in a CUDA graph: it does not wait for the host.
        absent: the reason if it cannot run here; it is then reported and not timed.
        kernel: it is a Triton kernel, which is verified but not timed without a GPU.
        compiles: it compiles for seconds at each size, and is therefore measured in a separate run with `--compiled`.
    """

    name: str
    call: Callable[[Any], Any] | None
    graph: bool = True
    absent: str | None = None
    kernel: bool = False
    compiles: bool = False


class OutOfTime(Exception):
    """The budget is spent within a case; a later run repeats the case."""


class Bench:
    """The run of one bench; see the module.

    Args:
        name: the bench's name, for rows.
        description: for --help.
        arguments: a function that adds the bench's own arguments to the parser.
    """

    def __init__(
        self, name: str, description: str, arguments: Callable | None = None, argv: Sequence[str] | None = None
    ):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rehearse", action="store_true", help="run tiny sizes; the numbers mean nothing")
        parser.add_argument("--out", type=pathlib.Path, help="folder (default: bench/results/DEVICE; none to rehearse)")
        parser.add_argument("--seconds", type=float, default=0.5, help="time for each row (default %(default)s)")
        parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for the whole bench")
        parser.add_argument("--compiled", action="store_true", help="only providers that compile for seconds")
        if arguments is not None:
            arguments(parser)
        self.began = time.perf_counter()
        self.options = parser.parse_args(argv)
        self.name, self.rehearse, self.compiled = name, self.options.rehearse, self.options.compiled
        self.step = name + COMPILED * self.compiled
        self.seconds = 0.005 if self.rehearse else self.options.seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.provenance = provenance(self.device)
        folder = self.options.out
        if folder is None and not self.rehearse:
            folder = results_folder(self.device)
        self.results = Results(folder)
        self.state = self.results.step(self.step, self.provenance["commit"], self.rehearse)
        if self.state["rehearsal"] != self.rehearse:
            kept = "a rehearsal" if self.state["rehearsal"] else "real rows"
            parser.error(f"--out must not mix rehearsals and real rows, got {folder} with {kept} of {self.step}")
        if self.state["complete"]:
            parser.exit(self.status, f"{self.step}: complete in {self.results.file}\n")
        self.ceilings = calibration.ceilings(self.device, folder)
        self._case, self._dead = "", False
        self.on_exit: Callable[[], None] = lambda: None  # called before the process ends by a signal or a hang
        self._before = self.state["seconds"]
        signal.signal(signal.SIGTERM, lambda *_: self._stopped())
        atexit.register(self.results.save)
        print(json.dumps(self.provenance), json.dumps(self.ceilings), sep="\n", flush=True)

    @property
    def size(self) -> str:
        """ "gpu", "cpu" or "rehearsal", which decides the cases."""
        return "rehearsal" if self.rehearse else "gpu" if self.device.type == "cuda" else "cpu"

    @property
    def seconds_left(self) -> float:
        return self.options.budget - (time.perf_counter() - self.began)

    def check_time(self) -> None:
        """End the run if the budget is spent; a case calls this repeatedly.

        Raises:
            OutOfTime: the budget is spent.
        """
        if self.seconds_left < 0:
            raise OutOfTime

    def run(
        self,
        measure: Callable[["Bench", Any], None],
        full: Sequence,
        small: Sequence,
        rehearsed: Sequence,
        names: Sequence[str] | None = None,
    ) -> int:
        """Measure the cases that are not done yet until the budget is spent; a fault ends only its own case.

        Args:
            measure: takes this bench and a case.
            full, small, rehearsed: the cases on a GPU, on a CPU, and in a rehearsal; the most important come first. On
                a GPU, a case with `seconds` is skipped if less time is left.
            names: measure only the cases with these names; the others are left for a later run.

        Returns:
            The exit status: 1 if an output was wrong or something failed, 2 if no case has one of `names`.
        """
        chosen = {"gpu": full, "cpu": small, "rehearsal": rehearsed}[self.size]
        if names is not None and (unknown := set(names) - {case.name for case in chosen}):
            known = ", ".join(dict.fromkeys(case.name for case in chosen))
            print(f"{self.step}: no case {', '.join(sorted(unknown))}; the cases are {known}", file=sys.stderr)
            return 2
        todo = [
            case for case in chosen if repr(case) not in self.state["done"] and (names is None or case.name in names)
        ]
        watch = self._watch()
        for case in progress(todo, self.name):
            if self.size == "gpu" and getattr(case, "seconds", 0.0) > self.seconds_left:
                continue
            found, self._case = {}, repr(case)
            try:
                self.check_time()
                with self.guarded(found):
                    measure(self, case)
            except OutOfTime:
                break
            if found:
                self.add("inputs", {"case": repr(case)}, "", found)
            self._case_done()
        watch.cancel()
        self.state["left"] = sum(repr(case) not in self.state["done"] for case in chosen)
        self.state["complete"] = not self.state["left"]
        self._save()
        atexit.unregister(self.results.save)  # another bench of this process may save rows from now on
        rows = sum(row["bench"] == self.name for row in self.results.rows)
        print(f"{self.step}: {rows} rows in {self.results.file or 'no file'}, {self.state['left']} cases left")
        return self.status

    def _watch(self) -> threading.Timer:
        """A timer that ends the process if a case runs long after the budget is spent."""

        def hung() -> None:
            self._dead = False  # otherwise `add` would only end this thread
            late = f"no answer {HANGS} s after the budget of {self.options.budget:.0f} s"
            self.state["failed"] += 1
            self.add("inputs", {"case": self._case}, "", {"failed": late})
            self._case_done()
            self.on_exit()
            os._exit(DEAD)

        watch = threading.Timer(min(max(self.seconds_left, 0.0) + HANGS, threading.TIMEOUT_MAX), hung)
        watch.daemon = True
        watch.start()
        return watch

    def _case_done(self) -> None:
        self.state["done"].append(self._case)
        self._save()

    def _stopped(self) -> None:
        """Exit at once: an exception could be caught by the code that is running."""
        self._save()
        self.on_exit()
        os._exit(TERMINATED)

    @property
    def status(self) -> int:
        return int(bool(self.state["wrong"] or self.state["failed"]))

    def _save(self) -> None:
        self.state["seconds"] = round(self._before + time.perf_counter() - self.began, 1)
        self.results.save()

    def num_sets(self, nbytes: float) -> int:
        """The number of sets of inputs to rotate, of `nbytes` each, so that no cache holds a set until its next use."""
        return min(MAX_SETS, int(COLD_BYTES / nbytes) + 2) if self.size == "gpu" else 2

    def made(self, name: str, make: Callable[[], Provider]) -> Provider:
        """The provider that `make` returns, or an absent one of that name if `make` fails."""
        try:
            return make()
        except Exception as error:
            absent = f"cannot be set up: {type(error).__name__}: {first_line(error)}"
            return Provider(name, None, absent=absent, compiles=self.compiled)

    def measure(
        self,
        provider: Provider,
        shapes: dict[str, Any],
        dtype: str,
        sets: Sequence,
        verify: Callable[[Callable], None],
        nbytes: float = 0,
        flops: float = 0,
        count: bool = False,
    ) -> dict | None:
        """Add one row, with times if the outputs are right. Returns None and adds no row if the provider belongs to
        another run (see `Provider.compiles`).

        Args:
            provider: the provider to run.
            shapes: the sizes, by the letters of the op.
            dtype: for the row.
            sets: inputs in rotation; `provider.call` takes one.
            verify: called with `provider.call`; raises AssertionError if its outputs are wrong.
            nbytes: the least number of bytes read and written; with `flops` it gives the floor of the time.
            flops: the least number of floating-point operations.
            count: on a GPU, count the launches of the call, which takes a run under the profiler.

        Raises:
            OutOfTime: the budget is spent.
        """
        if provider.compiles != self.compiled:
            return None
        self.check_time()
        found = {}
        if provider.absent is not None:
            found["absent"] = provider.absent
        else:
            with self.guarded(found):
                verify(provider.call)
                if provider.kernel and self.device.type == "cpu":
                    found["untimed"] = UNTIMED
                else:
                    found |= self._timed(provider, sets, nbytes, flops)
                    counts = count and self.device.type == "cuda"
                    found["launches"] = launches(provider.call, sets[0]) if counts else None
        return self.add(provider.name, shapes, dtype, found)

    def _timed(self, provider: Provider, sets: Sequence, nbytes: float, flops: float) -> dict:
        try:
            method, times = calibration.time_calls(provider.call, sets, self.device, self.seconds, provider.graph)
        except RuntimeError:
            if provider.kernel or not provider.graph or self.device.type == "cpu":
                raise
            # others may wait for the host at some sizes
            method, times = calibration.time_calls(provider.call, sets, self.device, self.seconds, graph=False)
            method += ", since it cannot be captured"
        p20, p50, p80 = (1e6 * quantile for quantile in calibration.quantiles(times))
        floor = 1e6 * roofline.floor_seconds(self.ceilings, nbytes, flops)
        return {
            "method": method,
            "calls": len(times),
            "bytes": nbytes,
            "sets": len(sets),
            "p20_us": round(p20, 3),
            "p50_us": round(p50, 3),
            "p80_us": round(p80, 3),
            "floor_us": round(floor, 3),
            "of_ceiling": round(floor / p50, 4),
        }

    @contextlib.contextmanager
    def guarded(self, found: dict) -> Iterator[None]:
        """Catch errors: an AssertionError becomes the field "wrong" of `found`, any other error "failed". If an
        error costs this process its GPU, the next row ends the bench: see `add`."""
        try:
            yield
        except AssertionError as fault:
            found.clear()
            found["wrong"] = first_line(fault) or "outputs differ"
        except OutOfTime:
            raise
        except Exception as error:
            found.clear()
            found["failed"] = f"{type(error).__name__}: {first_line(error)}"
            if self.device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    self._dead = True
        for kind in ("wrong", "failed"):
            self.state[kind] += kind in found

    def add(self, provider: str, shapes: dict[str, Any], dtype: str, found: dict, inputs: str = "synthetic") -> dict:
        """Add a row with the fields `found`, and print it.

        Raises:
            SystemExit: `DEAD`, if this process lost its GPU. The case counts as done, so that a new process continues
                with the next.
        """
        row = {"bench": self.name, "provider": provider, "dtype": dtype, "inputs": inputs, "shapes": shapes, **found}
        print(json.dumps(row), flush=True)
        size = {"size": self.size, "seconds_asked": self.seconds}
        self.results.add(row | size | self.ceilings | self.provenance)
        if self._dead:
            self._case_done()
            raise SystemExit(DEAD)
        return row


def named_cases(parser: argparse.ArgumentParser) -> None:
    """Add the argument --cases, for `Bench(arguments=...)`; `options.cases` is for `Bench.run`."""
    parser.add_argument("--cases", type=lambda text: text.split(","), metavar="NAME,NAME", help="only these cases")


def simulate_graphs(bench: Bench) -> None:
    """In a rehearsal on a CPU, capture rounds with simulated graphs and read their results late, as on a GPU."""
    if bench.size == "rehearsal" and bench.device.type == "cpu":
        from simulated_graph import SimulatedGraphs
        from specdec_triton.engine import graph_runner

        graph_runner.CAPTURES["cpu"], graph_runner.LAG["cpu"] = SimulatedGraphs, 1


def progress(cases: Sequence, description: str) -> Iterator:
    """The cases, with a progress bar if standard error is a terminal and rich is installed."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield from cases
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(cases, description, console=Console(stderr=True))


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def launches(call: Callable, inputs: Any) -> int | None:
    """The number of kernels that a call launches; None if the profiler sees none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call(inputs)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) or None


def absent_unless_importable(*packages: str) -> str | None:
    """None if one of `packages` is installed, else the reason for `Provider.absent`."""
    if any(version(package) != "absent" for package in packages):
        return None
    return f"{packages[0]} is not installed"
