"""What the benches share: verify, then time; cold caches; rows that say where they come from.

A bench describes its cases and providers and leaves the rest to `Bench`:

    def measure(bench, nodes):
        sets = [inputs() for _ in range(bench.num_sets(nbytes))]  # in rotation: more than any cache holds
        bench.measure(Provider("triton", call, kernel=True), {"N": nodes}, "bf16", sets, verify, nbytes=nbytes)

    bench = Bench("accept", __doc__)  # parses --rehearse, --out, --seconds, --budget
    sys.exit(bench.run(measure, CASES, SMALL, REHEARSED))  # 1 if a check was red or a provider failed

Rows go to `rows.json` in the folder of `--out`, which all benches share. A run that was interrupted, or ran out of its
`--budget`, goes on where it stopped when it is started again with the same folder, unless the commit is another one by
then: its rows are measured anew.

Without a GPU a bench runs small sizes: what is timed then is PyTorch on this CPU, and Triton's kernels are verified in
its interpreter, without a time. `--rehearse` runs tiny sizes anywhere: it shows that the bench works, and its numbers
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

COLD_BYTES = 200e6  # several times the largest L2 cache: what one call reads, the calls between it and the next evict
MAX_SETS = 128
HANGS = 40  # seconds after its budget, in which a bench must come to its end
TERMINATED, DEAD = 143, 3  # exit statuses: stopped, as a shell says it; the GPU is lost to this process
UNTIMED = "Triton's interpreter: checked, has no speed"

sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton's first import

from specdec_triton.tools import calibration, roofline  # noqa: E402
from specdec_triton.tools.provenance import provenance, results_folder, version  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: as the row says it.
        call: takes one set of inputs, returns the outputs.
        graph: it can be captured in a CUDA graph (no wait for the host).
        absent: why it cannot run here; then it is reported, not timed.
        kernel: a Triton kernel: without a GPU it is verified, not timed.
        compiles: it compiles for seconds at each size: it is measured with `--compiled`, in a run of its own.
    """

    name: str
    call: Callable[[Any], Any] | None
    graph: bool = True
    absent: str | None = None
    kernel: bool = False
    compiles: bool = False


class OutOfTime(Exception):
    """The budget is spent in the middle of a case, which a later run does again."""


class Bench:
    """One bench's run, see the module.

    Args:
        name: of the bench, as its rows say it.
        description: for --help.
        arguments: adds the bench's own to the parser.
    """

    def __init__(
        self, name: str, description: str, arguments: Callable | None = None, argv: Sequence[str] | None = None
    ):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rehearse", action="store_true", help="tiny sizes, numbers that mean nothing")
        parser.add_argument("--out", type=pathlib.Path, help="folder (default: bench/results/DEVICE; none to rehearse)")
        parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each row (default %(default)s)")
        parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for the whole bench")
        parser.add_argument("--compiled", action="store_true", help="only what compiles for seconds at each size")
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
            parser.error(f"--out must be a folder of its own for rehearsals, got {folder} with {kept} of {self.step}")
        if self.state["complete"]:
            parser.exit(self.status, f"{self.step}: complete in {self.results.file}\n")
        self.ceilings = calibration.ceilings(self.device, folder)
        self._case, self._dead = "", False
        self.on_exit: Callable[[], None] = lambda: None  # before the process is ended from outside, or for a hang
        self._before = self.state["seconds"]
        signal.signal(signal.SIGTERM, lambda *_: self._stopped())
        atexit.register(self.results.save)
        print(json.dumps(self.provenance), json.dumps(self.ceilings), sep="\n", flush=True)

    @property
    def size(self) -> str:
        """ "gpu", "cpu" or "rehearsal": which of the cases run."""
        return "rehearsal" if self.rehearse else "gpu" if self.device.type == "cuda" else "cpu"

    @property
    def seconds_left(self) -> float:
        return self.options.budget - (time.perf_counter() - self.began)

    def check_time(self) -> None:
        """To be called now and then inside a case.

        Raises:
            OutOfTime: the budget is spent; `run` ends there.
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
        """Measure the cases that are not done yet, until the budget is spent, each in its own fault barrier.

        Args:
            measure: takes this bench and a case.
            full, small, rehearsed: the cases on a GPU, on a CPU, and in a rehearsal; what matters most comes first. On
                a GPU, a case with `seconds` is passed over if less time is left.
            names: only the cases of these names are measured; the others are left for a later run.

        Returns:
            The exit status: 1 where an output was wrong or something failed, 2 where no case has one of `names`.
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
        atexit.unregister(self.results.save)  # another bench of this process may save rows from here on
        rows = sum(row["bench"] == self.name for row in self.results.rows)
        print(f"{self.step}: {rows} rows in {self.results.file or 'no file'}, {self.state['left']} cases left")
        return self.status

    def _watch(self) -> threading.Timer:
        """Ends the process if a case goes on long after the budget: it hangs."""

        def hung() -> None:
            self._dead = False  # or adding the row would only end this thread
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
        """At once: an exception could be caught by whatever runs at the moment."""
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
        """How many sets of inputs, of which a call touches `nbytes`, must rotate so that no cache helps."""
        return min(MAX_SETS, int(COLD_BYTES / nbytes) + 2) if self.size == "gpu" else 2

    def made(self, name: str, make: Callable[[], Provider]) -> Provider:
        """What `make` returns; a provider of that name, absent, where it cannot be set up."""
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
        """Add one row: a time only where the outputs are right. None, and no row, if the provider is another run's:
        see `Provider.compiles`.

        Args:
            provider: what runs.
            shapes: the sizes, by the letters of the op.
            dtype: as the row says it.
            sets: inputs in rotation, `provider.call` takes one.
            verify: given `provider.call`, raises AssertionError where its outputs are wrong.
            nbytes: read and written once, at least; with `flops` it gives the floor of the time.
            flops: at least.
            count: the launches of a kernel of ours are wanted: a run under the profiler.

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
                    counts = count and provider.kernel and self.device.type == "cuda"
                    found["launches"] = launches(provider.call, sets[0]) if counts else None
        return self.add(provider.name, shapes, dtype, found)

    def _timed(self, provider: Provider, sets: Sequence, nbytes: float, flops: float) -> dict:
        try:
            method, times = calibration.timed(provider.call, sets, self.device, self.seconds, provider.graph)
        except RuntimeError:
            if provider.kernel or not provider.graph or self.device.type == "cpu":
                raise
            # others may wait for the host at some sizes
            method, times = calibration.timed(provider.call, sets, self.device, self.seconds, graph=False)
            method += ", since it cannot be captured"
        p20, p50, p80 = (1e6 * quantile for quantile in calibration.quantiles(times))
        floor = 1e6 * roofline.floor_seconds(self.ceilings, nbytes, flops)
        return {
            "method": method,
            "calls": len(times),
            "sets": len(sets),
            "p20_us": round(p20, 3),
            "p50_us": round(p50, 3),
            "p80_us": round(p80, 3),
            "floor_us": round(floor, 3),
            "of_ceiling": round(floor / p50, 4),
        }

    @contextlib.contextmanager
    def guarded(self, found: dict) -> Iterator[None]:
        """Note what goes wrong inside, and go on: a wrong answer as "wrong", any other error as "failed". After one
        that leaves this process without its GPU, the next row ends the bench: see `add`."""
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
        """Add a row of what was found, and print it.

        Raises:
            SystemExit: `DEAD`: the GPU is lost to this process. The case counts as done, so that a new process goes on
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
    """For `Bench(arguments=...)`: its `options.cases` are for `Bench.run`."""
    parser.add_argument("--cases", type=lambda text: text.split(","), metavar="NAME,NAME", help="only these cases")


def simulate_graphs(bench: Bench) -> None:
    """In a rehearsal on a CPU, rounds are captured by simulated graphs, and read late."""
    if bench.size == "rehearsal" and bench.device.type == "cpu":
        from simulated_graph import SimulatedGraphs
        from specdec_triton.engine import graph_runner

        graph_runner.CAPTURES["cpu"], graph_runner.LAG["cpu"] = SimulatedGraphs, 1


def progress(cases: Sequence, what: str) -> Iterator:
    """The cases; with a bar on a terminal where rich is installed."""
    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield from cases
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(cases, what, console=Console(stderr=True))


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def launches(call: Callable, inputs: Any) -> int | None:
    """Kernels that one call launches; None where the profiler cannot say."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call(inputs)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events) or None


def absent_unless_importable(*packages: str) -> str | None:
    """The reason for `Provider.absent`, or None where one of `packages` is installed."""
    if any(version(package) != "absent" for package in packages):
        return None
    return f"{packages[0]} is not installed"
