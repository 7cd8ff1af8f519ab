"""Statistics of a call: rounds, tokens, and the time of its stages."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any


@dataclass(repr=False)
class Stats:
    """Statistics of one `generate` call. `dataclasses.asdict` and `json.dumps` take it as it is.

    Attributes:
        rule: acceptance rule.
        lossless: the rule leaves the target's output distribution unchanged.
        rounds: target forwards after the prompt's.
        drafted: draft tokens verified, in rows that were unfinished.
        accepted: of those, accepted.
        accepted_by_position: in how many row rounds the draft token at depth 1, 2, ... was accepted. Divided by
            `row_rounds`: the acceptance rate by position.
        emitted: tokens emitted, all rows; the prompt's forward emits the first of each row.
        row_rounds: (row, round) pairs in which the row was unfinished.
        seconds: host time by stage: prefill, measure (costs), draft, verify, accept, compact, emit; capture: of
            stages as CUDA graphs, which counts among these stages, too; and replay: of captured ones. On a GPU, stages
            run behind the host: only their sum means something.
        why_eager: why rounds ran without CUDA graphs, or None.
        captured, replayed: stages captured as a CUDA graph, and run by replaying one.
        graph_bytes: device memory that the graphs held at the end of the call; it is free again afterwards.
        lag: rounds that the host looked back.
        auto: with `tree="auto"`, what was chosen: see `AdaptiveTree.summary`.
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
    replayed: int = 0
    graph_bytes: int = 0
    lag: int = 0
    auto: dict[str, Any] | None = None

    def __repr__(self) -> str:
        shown: dict[str, Any] = {"rounds": self.rounds, "acceptance_length": round(self.acceptance_length, 2)}
        shown |= {name: getattr(self, name) for name in ("drafted", "accepted", "emitted")}
        if self.why_eager is not None:
            shown["why_eager"] = self.why_eager
        return f"Stats({self.rule}, {', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def acceptance_length(self) -> float:
        """Tokens that an unfinished row emitted in a round, on average; 0.0 without rounds."""
        return (self.accepted + self.row_rounds) / self.row_rounds if self.row_rounds else 0.0

    def add_round(self, counts: Sequence[int], drafted: Sequence[int]) -> None:
        """Count a round but for `rounds` and `emitted`.

        Args:
            counts: tokens that each row emitted; 0 if it was finished.
            drafted: draft tokens that were verified in each row.
        """
        self.row_rounds += sum(count > 0 for count in counts)
        self.drafted += sum(nodes for nodes, count in zip(drafted, counts, strict=True) if count)
        self.accepted += sum(count - 1 for count in counts if count)
        for position in range(max(counts) - 1):
            if position == len(self.accepted_by_position):
                self.accepted_by_position.append(0)
            self.accepted_by_position[position] += sum(count - 1 > position for count in counts)


def timed(stage: str) -> Callable:
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
