"""Statistics of one `generate` call: rounds, tokens and the time of each stage."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any


@dataclass(repr=False)
class Stats:
    """Statistics of one `generate` call. `dataclasses.asdict` converts it to a dict that `json.dumps` accepts.

    Attributes:
        rule: acceptance rule.
        lossless: True if the rule leaves the target's output distribution unchanged.
        rounds: number of target forwards after the prompt's.
        drafted: number of draft tokens verified in unfinished rows.
        accepted: number of draft tokens accepted.
        accepted_by_position: entry d - 1 is the number of (row, round) pairs in which the draft token at depth d was
            accepted. Divide by `row_rounds` for the acceptance rate at each position.
        emitted: number of tokens emitted in all rows. The prompt's forward emits the first token of each row.
        row_rounds: number of (row, round) pairs in which the row was unfinished.
        seconds: host time in seconds by stage: "prefill", "measure" (costs for `tree="auto"`), "draft", "verify",
            "accept", "compact" and "emit". "capture" is the time spent capturing CUDA graphs and "replay" the time
            spent launching them; "capture" is also part of the stage that was captured. On a GPU the host does not
            wait for each stage, so only the sum is meaningful.
        why_eager: the reason why rounds ran without CUDA graphs, or None.
        captured: number of CUDA graphs captured.
        reused: number of CUDA graphs of earlier calls that were replayed.
        replayed: number of CUDA graph launches.
        graph_bytes: bytes of device memory that the graphs held at the end of the call.
        fused: number of the target's modules that ran in fewer kernels, by class; see `Options.fuse`.
        not_fused: class of a module that could not -> the reason.
        lag: number of rounds by which the host reads reports late.
        why_no_lag: the reason why the host reads each report before the next round, or None.
        auto: with `tree="auto"`, the choices that were made; see `AdaptiveTree.summary`.
    """

    rule: str
    lossless: bool = True
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    emitted: int = 0
    row_rounds: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    why_eager: str | None = None
    captured: int = 0
    reused: int = 0
    replayed: int = 0
    graph_bytes: int = 0
    fused: dict[str, int] = field(default_factory=dict)
    not_fused: dict[str, str] = field(default_factory=dict)
    lag: int = 0
    why_no_lag: str | None = None
    auto: dict[str, Any] | None = None

    def __repr__(self) -> str:
        shown: dict[str, Any] = {"rounds": self.rounds, "acceptance_length": round(self.acceptance_length, 2)}
        shown |= {name: getattr(self, name) for name in ("drafted", "accepted", "emitted")}
        if self.why_eager is not None:
            shown["why_eager"] = self.why_eager
        return f"Stats({self.rule}, {', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def acceptance_length(self) -> float:
        """Mean number of tokens that an unfinished row emitted in a round; 0.0 if there were no rounds."""
        return (self.accepted + self.row_rounds) / self.row_rounds if self.row_rounds else 0.0

    def add_round(self, counts: Sequence[int], drafted: Sequence[int]) -> None:
        """Add a round to all counts except `rounds` and `emitted`.

        Args:
            counts: number of tokens that each row emitted; 0 if the row was finished.
            drafted: number of draft tokens that were verified in each row.
        """
        self.row_rounds += sum(count > 0 for count in counts)
        self.drafted += sum(nodes for nodes, count in zip(drafted, counts, strict=True) if count)
        self.accepted += sum(count - 1 for count in counts if count)
        for position in range(max(counts) - 1):
            if position == len(self.accepted_by_position):
                self.accepted_by_position.append(0)
            self.accepted_by_position[position] += sum(count - 1 > position for count in counts)


def records_time(stage: str) -> Callable:
    """Add a method's host time to `stats.seconds[stage]`."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def run(self: Any, *args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(self, *args)
            finally:
                spent = self.stats.seconds
                spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - begin

        return run

    return decorate
