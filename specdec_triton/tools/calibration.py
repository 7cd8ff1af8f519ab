"""Clocks, and this machine's ceilings as they measure them; fractions are of these, not of a datasheet.

    python -m specdec_triton.tools.calibration [--out FOLDER]  # writes calibration.json
    python -m specdec_triton.tools.calibration --where  # prints the folder under bench/results for this machine's rows

Ceilings are the bandwidth of reads and copies, and the speed of matrix products, launches, graph replays and host
reads. The benches use a `calibration.json` that is less than an hour old, and measure again otherwise.

On a GPU a call is timed in a captured CUDA graph that runs once over all sets of inputs. A call that waits for the host
is timed between CUDA events. On a CPU the host's clock is used.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..engine.graphs import capture
from .provenance import provenance, results_folder

FILE, HOURS = "calibration.json", 1

BUSY_CYCLES = 100_000  # about 50 us, longer than the launch of a graph
EAGER_LAUNCHES = 200  # queued at once; a stream holds many more before the host has to wait


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(times) < 2:
        return (times[0],) * 3
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def in_turn(ways: Sequence, turns: int) -> Iterator:
    """All of `ways` in each turn, in reverse order in every second turn, so that a machine that slows down slows all of
    them."""
    for turn in range(turns):
        yield from ways if turn % 2 == 0 else reversed(ways)


def time_calls(
    call: Callable[[Any], Any], sets: Sequence, device: torch.device, seconds: float, graph: bool = True
) -> tuple[str, list[float]]:
    """Time a call for about `seconds`: the method, and the seconds of each call.

    Args:
        call: takes one set of inputs.
        sets: inputs in rotation.
        device: the device that runs it.
        seconds: time to spend.
        graph: the call can be captured in a CUDA graph: it does not wait for the host.
    """
    if device.type == "cpu":
        return "host clock", clocked(call, sets, _host_clock, seconds)
    if not graph:
        return "cuda events", clocked(call, sets, _event_clock, seconds)
    recorded = captured(call, sets)
    replays = clocked(lambda _: recorded.replay(), [None], _busy_event_clock, seconds)
    return "cuda graph", [replay / len(sets) for replay in replays]


def captured(call: Callable[[Any], Any], sets: Sequence) -> torch.cuda.CUDAGraph:
    """A graph of one call for each set. Calls are warmed up first: compilers and autotuners must not be captured."""
    for _ in range(3):
        call(sets[0])

    def all_of_them() -> None:
        for inputs in sets:
            call(inputs)

    return capture(all_of_them)[0]


def clocked(call: Callable[[Any], Any], sets: Sequence, clock: Callable, seconds: float) -> list[float]:
    """Seconds of each call, for at least five calls and until `seconds` are over; three calls before are not measured.

    Raises:
        ValueError: there are no inputs.
    """
    if not sets:
        raise ValueError("clocked: sets must hold at least one set of inputs, got none")
    for inputs in (*sets, *sets, *sets)[:3]:
        call(inputs)
    times, until = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        times.append(clock(call, sets[len(times) % len(sets)]))
    return times


def _host_clock(call: Callable, inputs: Any) -> float:
    start = time.perf_counter()
    call(inputs)
    return time.perf_counter() - start


def _busy_event_clock(call: Callable, inputs: Any) -> float:
    """Times a call that does not wait for the host. The device is busy until the call is queued, so that the time of
    the launch is not included."""
    return _event_clock(call, inputs, lambda: torch.cuda._sleep(BUSY_CYCLES))


def _event_clock(call: Callable, inputs: Any, before: Callable[[], Any] = lambda: None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before()
    start.record()
    call(inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.lru_cache(maxsize=4)
def calibrate(device: torch.device) -> dict[str, float]:
    """Measure this machine's ceilings now, with random data.

    Returns:
        copy_bytes_s (read and written), read_bytes_s (the better of two reductions), matmul_flops_s (bf16 on a GPU,
        fp32 on a CPU), launch_us (host time of one eager op); on a GPU also graph_replay_us (a graph of one kernel,
        from an idle device), graph_kernel_us (one of 100 kernels in a graph) and host_read_us (a value read after an
        idle queue).
    """
    on_gpu = device.type == "cuda"
    seconds = 0.3 if on_gpu else 0.02
    source = torch.randn(2**28 if on_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    width, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    left = torch.randn(width, width, device=device, dtype=dtype)
    tiny = torch.zeros(1, device=device)

    def median(call: Callable[[Any], Any], sets: Sequence = (None,)) -> float:
        return statistics.median(time_calls(call, sets, device, seconds)[1])

    def launches(_: Any) -> None:
        for _ in range(EAGER_LAUNCHES):
            tiny.zero_()

    nbytes = source.numel() * source.element_size()
    found = {
        "copy_bytes_s": 2 * nbytes / median(lambda _: target.copy_(source)),
        "read_bytes_s": nbytes / min(median(lambda _: source.amax()), median(lambda _: source.sum())),
        "matmul_flops_s": 2 * width**3 / median(lambda _: left @ left),
        "launch_us": 1e6 * statistics.median(clocked(launches, [None], _queueing_clock, seconds)) / EAGER_LAUNCHES,
    }
    if on_gpu:
        single = captured(lambda _: tiny.zero_(), [None])
        replays = clocked(lambda _: single.replay(), [None], _event_clock, seconds)
        found["graph_replay_us"] = 1e6 * statistics.median(replays)
        found["graph_kernel_us"] = 1e6 * median(lambda _: tiny.zero_(), [None] * 100)
        found["host_read_us"] = 1e6 * statistics.median(clocked(lambda _: tiny.item(), [None], _host_clock, seconds))
    return found


def _queueing_clock(call: Callable, inputs: Any) -> float:
    """Host time to queue the work of a call on an idle device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _host_clock(call, inputs)


def ceilings(device: torch.device, folder: pathlib.Path | None = None) -> dict[str, float]:
    """This machine's ceilings: read from `FILE` in the folder if it is fresh and of this machine, else measured now and
    written there."""
    file, origin = folder and folder / FILE, provenance(device)
    if file and file.exists():
        found = json.loads(file.read_text())
        age = datetime.datetime.fromisoformat(origin["date"]) - datetime.datetime.fromisoformat(found["date"])
        same = all(found[name] == origin[name] for name in ("device", "driver"))
        if same and age < datetime.timedelta(hours=HOURS):
            return found["ceilings"]
    measured = calibrate(device)
    if file:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"ceilings": measured, **origin}, indent=1) + "\n")
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder (default: bench/results/DEVICE)")
    parser.add_argument("--where", action="store_true", help="print that folder and measure nothing")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.out or results_folder(device)
    if options.where:
        print(folder)
        return 0
    (folder / FILE).unlink(missing_ok=True)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in ceilings(device, folder).items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
