"""What a call did, and how long its stages took."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps


@dataclass
class Stats:
    """What a generation did.

    Attributes:
        rule: acceptance rule.
        lossless: the rule leaves the target's output distribution unchanged.
        rounds: target forwards after the prompt's.
        drafted: draft tokens verified, in rows that were unfinished.
        accepted: of those, accepted.
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
    emitted: int = 0
    row_rounds: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    why_eager: str | None = None
    captured: int = 0
    replayed: int = 0
    graph_bytes: int = 0
    lag: int = 0
    auto: dict | None = None

    @property
    def acceptance_length(self) -> float:
        """Tokens that an unfinished row emitted in a round, on average; 0.0 without rounds."""
        return (self.accepted + self.row_rounds) / self.row_rounds if self.row_rounds else 0.0


def timed(stage: str) -> Callable:
    """Add a method's host time to `stats.seconds[stage]`."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def run(self, *args):
            begin = time.perf_counter()
            try:
                return method(self, *args)
            finally:
                self.stats.seconds[stage] += time.perf_counter() - begin

        return run

    return decorate
