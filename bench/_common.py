"""What the benches share: verify, then time; cold caches; rows that say where they come from.

A bench describes its cases and providers and leaves the rest to `Bench`:

    bench = Bench("accept", __doc__)                          # parses --rehearse, --out, --seconds
    sets = [inputs() for _ in range(bench.num_sets(nbytes))]  # buffers in rotation: more than any cache holds
    bench.measure(Provider("triton", call), {"N": 64}, "bf16", sets, verify, nbytes=nbytes)
    sys.exit(bench.finish())                                  # writes bench/results/accept.json; 1 if a check was red

On a GPU a call is timed in a captured CUDA graph that runs once over all sets, or, where a provider waits for the host,
between CUDA events; on a CPU by the host's clock. `--rehearse` runs tiny sizes, on the CPU in Triton's interpreter
too: it shows that the bench works, and its numbers mean nothing, so nothing is written.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COLD_BYTES = 200e6  # several times the largest L2 cache: what one call reads, the calls between it and the next evict
MAX_SETS = 128

sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton's first import


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: as the row says it.
        call: takes one set of inputs, returns the outputs.
        graph: it can be captured in a CUDA graph (no wait for the host).
        absent: why it cannot run here; then it is reported, not timed.
    """

    name: str
    call: Callable[[Any], Any] | None
    graph: bool = True
    absent: str | None = None


class Bench:
    def __init__(self, name: str, description: str):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rehearse", action="store_true", help="tiny sizes, nothing written")
        parser.add_argument("--out", type=pathlib.Path, default=RESULTS / f"{name}.json", help="default: %(default)s")
        parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each row (default %(default)s)")
        options = parser.parse_args()
        self.name, self.out = name, options.out
        self.rehearse = options.rehearse
        self.seconds = 0.02 if options.rehearse else options.seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu" and not self.rehearse:
            parser.error("no CUDA GPU here: --rehearse runs the bench at tiny sizes, as a check of the bench itself")
        self.provenance = provenance(self.device)
        self.ceilings = calibrate(self.device)
        self.rows: list[dict] = []
        self.red = False
        print(json.dumps(self.provenance), json.dumps(self.ceilings), sep="\n", flush=True)

    def num_sets(self, nbytes: float) -> int:
        """How many sets of inputs, of which a call touches `nbytes`, must rotate so that no cache helps."""
        return 2 if self.rehearse else min(MAX_SETS, int(COLD_BYTES / nbytes) + 2)

    def measure(
        self,
        provider: Provider,
        shapes: dict[str, Any],
        dtype: str,
        sets: Sequence,
        verify: Callable[[Callable], None],
        nbytes: float = 0,
        flops: float = 0,
        inputs: str = "synthetic",
    ) -> dict:
        """Add one row.

        Args:
            provider: what runs.
            shapes: the sizes, by the letters of the op.
            dtype: as the row says it.
            sets: inputs in rotation, `provider.call` takes one.
            verify: given `provider.call`, raises AssertionError where its outputs are wrong.
            nbytes: read and written once, at least; with `flops` it gives the floor of the time.
            flops: at least.
            inputs: "synthetic", or where real ones came from.
        """
        row = {"op": self.name, "provider": provider.name, "dtype": dtype, "inputs": inputs, **shapes}
        if provider.absent is not None:
            row["absent"] = provider.absent
        else:
            try:
                verify(provider.call)
            except AssertionError as fault:
                self.red = True
                row["wrong"] = str(fault).partition("\n")[0] or "outputs differ"
            else:
                method, times = timed(provider, sets, self.device, self.seconds)
                p20, p50, p80 = (1e6 * quantile for quantile in quantiles(times))
                row |= {"method": method, "calls": len(times), "sets": len(sets)}
                row |= {"p20_us": round(p20, 3), "p50_us": round(p50, 3), "p80_us": round(p80, 3)}
                bandwidth = max(self.ceilings["copy_bytes_s"], self.ceilings["read_bytes_s"])
                floor = max(nbytes / bandwidth, flops / self.ceilings["matmul_flops_s"])
                row |= {"floor_us": round(1e6 * floor, 3), "of_ceiling": round(1e6 * floor / p50, 4)}
        print(json.dumps(row), flush=True)
        self.rows.append(row | self.ceilings | self.provenance)
        return row

    def finish(self) -> int:
        """Write the rows; the exit status: 1 where an output was wrong."""
        if self.rehearse:
            print("rehearsal: the numbers above mean nothing, nothing is written")
        else:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n")
            print(f"{len(self.rows)} rows in {self.out}")
        return int(self.red)


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(times) < 2:
        return (times[0],) * 3
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def timed(provider: Provider, sets: Sequence, device: torch.device, seconds: float) -> tuple[str, list[float]]:
    """How it was timed, and seconds a call, measured for about `seconds`."""
    if device.type == "cpu":
        return "host clock", _times(provider.call, sets, _host_clock, seconds)
    if not provider.graph:
        return "cuda events", _times(provider.call, sets, _event_clock, seconds)
    graph = captured(provider.call, sets)
    replays = _times(lambda _: graph.replay(), [None], _event_clock, seconds)
    return "cuda graph", [replay / len(sets) for replay in replays]


def captured(call: Callable, sets: Sequence) -> torch.cuda.CUDAGraph:
    """A graph of one call for each set, warmed up (compilers and autotuners must not run in a capture)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(inputs)
    return graph


def _times(call: Callable, sets: Sequence, clock: Callable, seconds: float) -> list[float]:
    for inputs in sets[:3]:
        call(inputs)
    times, until = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        times.append(clock(call, sets[len(times) % len(sets)]))
    return times


def _host_clock(call: Callable, inputs: Any) -> float:
    start = time.perf_counter()
    call(inputs)
    return time.perf_counter() - start


def _event_clock(call: Callable, inputs: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call(inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.lru_cache(maxsize=2)
def calibrate(device: torch.device) -> dict[str, float]:
    """This machine's ceilings, in this run: bandwidth of a copy (read + write) and a read, bf16 products, launches."""
    on_gpu = device.type == "cuda"
    count = 2**29 if on_gpu else 2**22
    source = torch.ones(count, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    width, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    left = torch.randn(width, width, device=device, dtype=dtype)
    tiny = torch.zeros(1, device=device)
    calls = {
        "copy": lambda _: target.copy_(source),
        "read": lambda _: source.view(torch.float32).amax(),
        "matmul": lambda _: left @ left,
        "launch": lambda _: tiny.zero_(),
    }
    seconds = 0.3 if on_gpu else 0.02
    medians = {
        name: statistics.median(timed(Provider(name, call), [None], device, seconds)[1]) for name, call in calls.items()
    }
    launches = timed(Provider("launches", calls["launch"]), [None] * 100, device, seconds)[1]
    nbytes = source.numel() * source.element_size()
    return {
        "copy_bytes_s": 2 * nbytes / medians["copy"],
        "read_bytes_s": nbytes / medians["read"],
        "matmul_flops_s": 2 * width**3 / medians["matmul"],
        "graph_replay_us": 1e6 * medians["launch"],
        "graph_kernel_us": 1e6 * statistics.median(launches),
    }


def provenance(device: torch.device) -> dict[str, str]:
    """What a row must say about where it was measured."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        if on_gpu
        else "none",
        **{package: _version(package) for package in ("torch", "triton", "transformers")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
    }


def absent_unless_importable(package: str) -> str | None:
    """The reason for `Provider.absent`, or None where `package` is installed."""
    return None if _version(package) != "absent" else f"{package} is not installed"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
