"""Clocks, and the ceilings of the machine in hand as they measure them: no fraction is quoted of a datasheet.

    python -m specdec_triton.tools.calibration [--out FOLDER]  # writes calibration.json
    python -m specdec_triton.tools.calibration --where  # prints the folder under bench/results of this machine's rows

Ceilings are bandwidth of reads and copies, matrix products, launches, graph replays and host reads. The benches quote
fractions of those in `calibration.json` if it is less than an hour old.

On a GPU a call is timed in a captured CUDA graph that runs once over all sets of inputs, or, where it waits for the
host, between CUDA events; on a CPU by the host's clock.
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

BUSY_CYCLES = 100_000  # some 50 us, longer than it takes to launch a graph
EAGER_LAUNCHES = 200  # queued in one go: far fewer than a stream holds before it makes the host wait


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(times) < 2:
        return (times[0],) * 3
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def in_turn(ways: Sequence, turns: int) -> Iterator:
    """Every way in each turn, every second turn in reverse order: a machine that slows down slows all of them."""
    for turn in range(turns):
        yield from ways if turn % 2 == 0 else reversed(ways)


def timed(
    call: Callable[[Any], Any], sets: Sequence, device: torch.device, seconds: float, graph: bool = True
) -> tuple[str, list[float]]:
    """How it was timed, and seconds a call, measured for about `seconds`.

    Args:
        call: takes one set of inputs.
        sets: inputs in rotation.
        device: where it runs.
        seconds: to spend.
        graph: the call can be captured in a CUDA graph (no wait for the host).
    """
    if device.type == "cpu":
        return "host clock", clocked(call, sets, _host_clock, seconds)
    if not graph:
        return "cuda events", clocked(call, sets, _event_clock, seconds)
    recorded = captured(call, sets)
    replays = clocked(lambda _: recorded.replay(), [None], _busy_event_clock, seconds)
    return "cuda graph", [replay / len(sets) for replay in replays]


def captured(call: Callable[[Any], Any], sets: Sequence) -> torch.cuda.CUDAGraph:
    """A graph of one call for each set, warmed up (compilers and autotuners must not run in a capture)."""
    for _ in range(3):
        call(sets[0])

    def all_of_them() -> None:
        for inputs in sets:
            call(inputs)

    return capture(all_of_them)[0]


def clocked(call: Callable[[Any], Any], sets: Sequence, clock: Callable, seconds: float) -> list[float]:
    """Seconds of each call, at least five, until `seconds` are over; the first three go unmeasured.

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
    """Of a call that does not wait for the host: the device is busy until the call is queued, so that its launch takes
    no part of the time."""
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
    """This machine's ceilings, in this run, from random data.

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
        return statistics.median(timed(call, sets, device, seconds)[1])

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
    """Host time to hand the call's work to the device, which begins idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _host_clock(call, inputs)


def ceilings(device: torch.device, folder: pathlib.Path | None = None) -> dict[str, float]:
    """This machine's ceilings: read from `FILE` in the folder if it is of this machine and fresh, else measured now and
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
    parser.add_argument("--where", action="store_true", help="print that folder, measure nothing")
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
