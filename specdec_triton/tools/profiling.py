"""Times of a round and of its stages, by CUDA events and by the host's clock, with the floor of each.

    found = profile_rounds(lambda: model.generate(**inputs), model.device)
    found.stage_seconds("verify"), found.idle_share, found.kernels

Stages are the methods of `engine.round.RoundSteps` by those names. Nothing here waits for the device inside a round.
"""

import ctypes
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ..engine.generate import Generation
from ..engine.graph_runner import GraphRunner
from ..engine.round import RoundSteps
from .calibration import quantiles
from .host_sync import HostWaits, count_host_reads, time_host_waits
from .roofline import Shape, efficiency_bytes, floor_seconds, measured, round_work

STAGES = ("draft", "verify", "accept", "compact", "emit")
LABEL = "round: "  # before a stage's name in traces
NO_KERNELS = ("Memcpy", "Memset")
MOST_KERNELS, KERNEL_NAME = 16, 120  # most kernels that a row lists, and most letters of a name


@dataclass
class Span:
    """A part of one round: host times in seconds, and on a GPU the events around its work."""

    begin: float
    end: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @property
    def host_seconds(self) -> float:
        return self.end - self.begin

    @property
    def seconds(self) -> float:
        """Time between its events, or by the host's clock if there are none."""
        return self.events[0].elapsed_time(self.events[1]) / 1e3 if self.events else self.host_seconds


@dataclass
class Round:
    """One round.

    Attributes:
        whole: the span of the whole round.
        stages: (name, span) in the order in which they ran; a stage may run more than once.
        nodes, depth: N and D of the tree; 0 if `draft` did not return one.
        branches: the tree is no chain.
        mark: the number that the recorder's `mark` returned before the round.
    """

    whole: Span
    stages: list[tuple[str, Span]] = field(default_factory=list)
    nodes: int = 0
    depth: int = 0
    branches: bool = False
    mark: float = 0.0


@contextmanager
def record_rounds(device: torch.device, mark: Callable[[], float] = lambda: 0.0) -> Iterator[list[Round]]:
    """Record every round of every call in the block, in order.

    Times may be read after the block. Stages are also ranges of NVTX and of torch's profiler. Calls of other threads
    are recorded too. A round that is replayed from CUDA graphs has three stages: "draft", "verify" (with all later
    steps on the device), and "emit" (the host reads the report).

    Args:
        device: the model's device.
        mark: called before each round; the round keeps the number that it returns.
    """
    rounds: list[Round] = []
    on_gpu = device.type == "cuda"

    @contextmanager
    def span(name: str) -> Iterator[Span]:
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) if on_gpu else None
        with torch.profiler.record_function(LABEL + name), torch.cuda.nvtx.range(name) if on_gpu else nullcontext():
            if on_gpu:
                events[0].record()
            found = Span(time.perf_counter(), events=events)
            try:
                yield found
            finally:
                found.end = time.perf_counter()
                if on_gpu:
                    events[1].record()

    def whole(method: Callable) -> Callable:
        @wraps(method)
        def run(*args, **kwargs):
            before = mark()
            with span("whole") as found:
                rounds.append(Round(found, mark=before))
                return method(*args, **kwargs)

        return run

    def stage(name: str, method: Callable) -> Callable:
        @wraps(method)
        def run(*args, **kwargs):
            # the prompt's own acceptance comes before the first round, and a stage that is being captured does not run
            outside = not rounds or rounds[-1].whole.end
            if outside or (on_gpu and torch.cuda.is_current_stream_capturing()):
                return method(*args, **kwargs)
            with span(name) as found:
                rounds[-1].stages.append((name, found))
                result = method(*args, **kwargs)
            if name == "draft":
                rounds[-1].nodes = getattr(result, "num_nodes", 0)
                rounds[-1].depth = getattr(result, "max_depth", 0)
                rounds[-1].branches = not getattr(result, "is_chain", True)
            return result

        return run

    def replay(method: Callable) -> Callable:
        @wraps(method)
        def run(runner: GraphRunner, name: str, shape: Hashable, compute: Callable):
            recorded = stage(name, method) if runner.captures(name, shape) else method
            return recorded(runner, name, shape, compute)

        return run

    def look(method: Callable) -> Callable:
        """The host's read of the report follows the round's other stages, and ends the round."""

        @wraps(method)
        def run(*args):
            if not rounds:
                return method(*args)
            with span("emit") as found:
                rounds[-1].stages.append(("emit", found))
                method(*args)
            rounds[-1].whole.end = found.end
            if on_gpu:
                rounds[-1].whole.events[1].record()

        return run

    wrapped = [(Generation, "step", whole), (Generation, "read", look), (GraphRunner, "run", replay)]
    wrapped += [(RoundSteps, name, partial(stage, name)) for name in STAGES]
    with ExitStack() as patches:
        for owner, name, wrap in wrapped:
            patches.enter_context(mock.patch.object(owner, name, wrap(vars(owner)[name])))
        try:
            yield rounds
        finally:
            if on_gpu:
                torch.cuda.synchronize(device)


@dataclass
class Profile:
    """Results of `profile_rounds`.

    Attributes:
        device: the model's device.
        rounds: rounds of the timed call; the mark of each is the seconds that the host had waited before it.
        waits: the host's waits in the whole timed call.
        peak_bytes: largest device memory in use; on a CPU, the process's largest so far.
        joules: energy of the whole timed call by the GPU's own counter; None if it cannot be read.
        kernels: kernels launched in a round; None on a CPU or without CUPTI.
        kernel_times: (name, launches, seconds) of each kernel in a round, longest first; empty if `kernels` is None.
        idle_share: share of the rounds' time in which the GPU ran nothing; None if `kernels` is None.
        host_reads: reads of device values by the host in a round; None if they were not counted.
    """

    device: torch.device
    rounds: list[Round]
    waits: HostWaits
    peak_bytes: int
    joules: float | None = None
    kernels: float | None = None
    kernel_times: list[tuple[str, float, float]] = field(default_factory=list)
    idle_share: float | None = None
    host_reads: float | None = None

    @property
    def steady(self) -> list[Round]:
        """The rounds after the first two, which may compile or capture; all rounds if there are no more than two."""
        return self.rounds[2:] or self.rounds

    def round_seconds(self) -> list[float]:
        """Time from the beginning of each steady round to that of the next. A single round has its own time."""
        steady = self.steady
        if self.device.type == "cuda":
            gaps = [a.whole.events[0].elapsed_time(b.whole.events[0]) / 1e3 for a, b in pairwise(steady)]
        else:
            gaps = [b.whole.begin - a.whole.begin for a, b in pairwise(steady)]
        return gaps or [steady[-1].whole.seconds]

    def stage_seconds(self, name: str, host: bool = False) -> list[float]:
        """A stage's time in each steady round, on the device or (on a CPU, or if `host`) by the host's clock."""
        return [
            sum(span.host_seconds if host else span.seconds for stage, span in found.stages if stage == name)
            for found in self.steady
        ]

    @property
    def stages(self) -> list[str]:
        """Names of the stages that ran, in order."""
        return list(dict.fromkeys(name for found in self.rounds for name, _ in found.stages))

    @property
    def wait_seconds(self) -> list[float]:
        """The host's waits in each steady round but the last."""
        return [b.mark - a.mark for a, b in pairwise(self.steady)]

    @property
    def host_seconds(self) -> float | None:
        """Host work of a round on a GPU: median of the steady rounds' host time without their waits."""
        if self.device.type != "cuda" or len(self.steady) < 2:
            return None
        spans = [found.whole.host_seconds for found in self.steady]
        return statistics.median(max(span - wait, 0.0) for span, wait in zip(spans, self.wait_seconds, strict=False))

    @property
    def nodes(self) -> float:
        """N of a steady round: the median, as for its times."""
        return statistics.median(found.nodes for found in self.steady)

    @property
    def depth(self) -> float:
        """D of a steady round: the median."""
        return statistics.median(found.depth for found in self.steady)

    @property
    def branching(self) -> float:
        """Share of the steady rounds whose tree is no chain: these move accepted keys and values."""
        return statistics.mean(found.branches for found in self.steady)


def profile_rounds(
    generate: Callable[[], object],
    device: torch.device,
    trace: Path | None = None,
    count_reads: bool = True,
    shorter: Callable[[], object] | None = None,
) -> Profile:
    """Run `generate` three times: timed, under torch's profiler, and with its host reads counted.

    Args:
        generate: one whole call, the same each time, which has been run before to warm up.
        device: the model's device.
        trace: a file for the profiler's Chrome trace, which Perfetto opens.
        count_reads: do the third run.
        shorter: a call of fewer rounds for the second and third runs, since a profile takes long to read. Their counts
            are divided by the number of rounds.

    Raises:
        ValueError: no round of speculative decoding ran.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with energy(device) as joules, time_host_waits() as waits, record_rounds(device, lambda: waits.seconds) as rounds:
        generate()
    if not rounds:
        raise ValueError(
            "profile_rounds: generate must run at least one speculative round, got none: patch the model, and generate "
            "more than one token, since the prompt's forward emits the first"
        )
    # Linux counts in KiB
    peak = (
        torch.cuda.max_memory_allocated(device) if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    found = Profile(device, rounds, waits, peak, joules=joules[0] if joules else None)
    if on_gpu or trace:
        events, traced = _traced(shorter or generate, device, trace)
        if events:
            found.kernels, found.idle_share = kernels_and_idle_share(events, traced)
            found.kernel_times = kernel_times(events, traced)
    if count_reads:
        with count_host_reads() as reads, record_rounds(device, lambda: reads.total) as counted:
            (shorter or generate)()
        if len(counted) > 1:
            found.host_reads = (counted[-1].mark - counted[0].mark) / (len(counted) - 1)
    return found


Event = tuple[float, float, str]  # begin and end in microseconds, and name, of a kernel, copy or fill


def _traced(
    generate: Callable[[], object], device: torch.device, trace: Path | None
) -> tuple[list[Event], list[Round]]:
    """The GPU's events in a run under the profiler (none on a CPU), and the rounds of that run."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    if trace or not on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CPU)
    with torch.profiler.profile(activities=activities) as profiler, record_rounds(device) as rounds:
        generate()
    if trace:
        profiler.export_chrome_trace(str(trace))
    events = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in (profiler.events() if on_gpu else ())
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(LABEL)
    ]
    return events, rounds


def _steady_part(events: Sequence[Event], rounds: Sequence[Round]) -> tuple[list[Event], int]:
    """The events of the steady rounds, and the number of these rounds. The first two may compile and capture."""
    rounds = rounds[2:] or rounds
    # the trace ends with the rounds
    begin = max(end for _, end, _ in events) - 1e6 * sum(found.whole.seconds for found in rounds)
    return [event for event in events if event[0] >= begin], len(rounds)


def kernels_and_idle_share(events: Sequence[Event], rounds: Sequence[Round]) -> tuple[float, float]:
    """Kernels of a steady round, and the share of the steady rounds' time in which the GPU ran nothing.

    Args:
        events: all events of a call.
        rounds: the rounds of that call.
    """
    part, count = _steady_part(events, rounds)
    kernels = sum(not name.startswith(NO_KERNELS) for _, _, name in part) / count
    whole = max(end for _, end, _ in part) - min(begin for begin, _, _ in part)
    busy = covered([(begin, end) for begin, end, _ in part]) / whole
    return round(kernels, 1), round(1 - busy, 4)


def kernel_times(events: Sequence[Event], rounds: Sequence[Round]) -> list[tuple[str, float, float]]:
    """(name, launches, seconds) of each kernel, copy and fill in a steady round, longest first.

    Args:
        events, rounds: as for `kernels_and_idle_share`.
    """
    part, count = _steady_part(events, rounds)
    found: dict[str, list[float]] = {}
    for begin, end, name in part:
        launches, seconds = found.setdefault(name, [0.0, 0.0])
        found[name] = [launches + 1 / count, seconds + (end - begin) / count / 1e6]
    return sorted(((name, *times) for name, times in found.items()), key=lambda entry: -entry[2])


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of the intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


@contextmanager
def energy(device: torch.device) -> Iterator[list[float]]:
    """A list that holds, after the block, the joules used in it by the GPU's own counter. It stays empty without NVML
    or the counter (Volta and later)."""
    found: list[float] = []
    before = _millijoules(device)
    yield found
    if before is not None:
        torch.cuda.synchronize(device)
        found.append((_millijoules(device) - before) / 1e3)


def _millijoules(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, count = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count))
    )
    return None if failed else count.value


def _us(seconds: float, digits: int = 2) -> float:
    return round(1e6 * seconds, digits)


def summary_row(
    found: Profile,
    ceilings: dict[str, float],
    target: Shape,
    batch: int,
    nodes: float,
    context: float,
    draft: Shape | None = None,
    draft_forwards: float = 0.0,
    accepted: float = 0.0,
) -> dict[str, Any]:
    """A round: its stages (median and floor of each), its time (p50_us, its spread, and the number of samples), eta,
    and the work of host and GPU in it.

    Args:
        found: from `profile_rounds`.
        ceilings: from `calibrate`.
        target, batch, nodes, context, draft, draft_forwards, accepted: as for `roofline.round_work`.
    """
    work = round_work(target, batch, nodes, context, accepted, draft, draft_forwards)
    nbytes = efficiency_bytes(target, batch, context, draft, draft_forwards)
    stages = {
        name: {
            "us": _us(statistics.median(found.stage_seconds(name))),
            "host_us": _us(statistics.median(found.stage_seconds(name, host=True))),
            "bytes": work[name].nbytes,
            "flops": work[name].flops,
            "floor_us": _us(measured(ceilings).seconds(work[name]), digits=3),
        }
        for name in found.stages
    }
    seconds = found.round_seconds()
    times, count = quantiles(seconds), len(found.rounds)
    return {
        "stages": stages,
        "rounds": count,
        "samples": len(seconds),
        **{f"{name}_us": _us(time) for name, time in zip(("p20", "p50", "p80"), times, strict=True)},
        "eta": round(floor_seconds(ceilings, nbytes) / times[1], 4),
        "host_us": None if found.host_seconds is None else _us(found.host_seconds),
        "waits": round(found.waits.count / count, 2),
        "wait_us": _us(statistics.median(found.wait_seconds or [0.0])),
        "kernels": found.kernels,
        "kernel_us": [
            {"name": name[:KERNEL_NAME], "launches": round(launches, 2), "us": _us(seconds)}
            for name, launches, seconds in found.kernel_times[:MOST_KERNELS]
        ],
        "idle_share": found.idle_share,
        "host_reads": found.host_reads,
        "peak_bytes": found.peak_bytes,
        "joules": found.joules,
    }
