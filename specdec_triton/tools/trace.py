"""Traces of acceptance, one JSON object a line, and estimates of the acceptance of other trees on the same text.

    with sdt.patched(model, drafter=TracingDrafter(sdt.ModelDrafter(draft, tree=32), "trace.jsonl")):
        model.generate(**inputs)
    for call in read_trace("trace.jsonl"):
        print(replay(call, sdt.Topology.chain(5)))

A line is a call, {"call": drafter, "rule", "batch"}, or one of its rounds, {"round", "nodes", "depth", "sampling",
"rows", "ms"}. Finished rows are left out. The entries of a row:

- "position": real tokens before the root
- "parents", "depths": the row's tree
- "path": the accepted nodes
- "ranks": for each emitted token, the recovered or bonus token last, [its rank among the draft's candidates at that
  place (its place among siblings; null if it is none of them), number of candidates]
- "entropy": entropy in nats of the draft's logits at each expanded node, if the tree carries them

"ms" is host time in milliseconds: "draft", "verify_accept", and "between" the last round's acceptance and this draft.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..drafters import DraftContext, Drafter, DraftSession
from ..drafters.base import DelegatingDrafter
from ..ops.reference import Acceptance
from ..tree import DraftTree, Topology


class TracingDrafter(DelegatingDrafter):
    """Another drafter, whose rounds are written to a file. Drafts and texts do not change.

    Each round reads more tensors on the host and is not captured as a CUDA graph, so its times are not those of an
    untraced round.

    Args:
        drafter: proposes the draft tokens.
        file: the file that traces are appended to.

    Raises:
        ValueError: `drafter` is no `Drafter`.
    """

    def __init__(self, drafter: Drafter, file: str | os.PathLike):
        if not isinstance(drafter, Drafter):
            raise ValueError(f"TracingDrafter: drafter must be a Drafter, got {type(drafter).__name__}")
        super().__init__(drafter)
        self.file = Path(file)

    def graph_hazard(self):
        return None  # its sessions draft eagerly

    def start(self, context, tree=None):
        header = {"call": type(self.drafter).__name__, "rule": context.rule, "batch": len(context.host_length)}
        _append(self.file, header)
        return _TracingSession(self.drafter.start(context, tree), context, self.file)


class _TracingSession(DraftSession):
    def __init__(self, session: DraftSession, context: DraftContext, file: Path):
        self._session, self._context, self._file = session, context, file
        self.max_nodes, self.max_depth, self.trusted = session.max_nodes, session.max_depth, session.trusted
        self._round, self._drafting, self._drafted, self._observed = 0, 0.0, 0.0, None

    def prepare(self, *arguments):
        return self._session.prepare(*arguments)

    def draft(self) -> DraftTree:
        self._drafting = time.perf_counter()
        tree = self._session.draft()
        self._drafted = time.perf_counter()
        return tree

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        length, next_ids = accepted.length.tolist(), accepted.next_ids.tolist()  # waits for acceptance
        seen = time.perf_counter()
        milliseconds = {"draft": self._drafted - self._drafting, "verify_accept": seen - self._drafted}
        if self._observed is not None:
            milliseconds["between"] = self._drafting - self._observed
        line = {"round": self._round, "nodes": tree.num_nodes, "depth": tree.max_depth, "sampling": tree.sampling}
        line["rows"] = list(self._rows(tree, accepted.path.tolist(), length, next_ids))
        line["ms"] = {stage: round(1e3 * spent, 4) for stage, spent in milliseconds.items()}
        _append(self._file, line)
        self._round += 1
        self._session.observe(tree, accepted)
        self._observed = time.perf_counter()

    def observe_on_host(self, drafted: list[int], emitted: list[int]) -> None:
        self._session.observe_on_host(drafted, emitted)

    def finish(self) -> None:
        self._session.finish()

    def _rows(self, tree: DraftTree, paths: list, lengths: list, next_ids: list) -> Iterator[dict]:
        tokens, parents, depths = tree.tokens.tolist(), tree.parents.tolist(), tree.depth.tolist()
        positions = self._context.position.tolist()
        entropies = None
        if tree.draft_logits is not None:
            entropies = torch.distributions.Categorical(logits=tree.draft_logits.float()).entropy().tolist()
        for row, length in enumerate(lengths):
            if self._context.host_budget[row] <= 0:
                continue
            path = paths[row][:length]
            ranks = [
                ranked(parents[row], tokens[row], node, token)
                for node, token in zip([0, *path], [*(tokens[row][node] for node in path), next_ids[row]], strict=True)
            ]
            found = {"row": row, "position": positions[row], "parents": parents[row], "depths": depths[row]}
            found |= {"path": path, "ranks": ranks}
            if entropies is not None:
                found["entropy"] = [round(entropy, 4) for entropy in entropies[row]]
            yield found


def ranked(parents: list[int], tokens: list[int], node: int, token: int) -> tuple[int | None, int]:
    """The place of `token` among the children of `node` (None if it is none of them), and the number of children."""
    children = [tokens[child] for child, parent in enumerate(parents) if parent == node and child > 0]
    return (children.index(token) if token in children else None), len(children)


def _append(file: Path, line: dict) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


@dataclass
class TracedCall:
    """One call of a trace.

    Attributes:
        drafter, rule: names of the drafter's class and of the acceptance rule.
        rounds: the lines of its rounds, parsed.
        ranks: for each row, [(rank or None, candidates), ...] of every token that the rounds emitted, in order.
    """

    drafter: str
    rule: str
    rounds: list[dict] = field(default_factory=list)
    ranks: list[list[tuple[int | None, int]]] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """Tokens that a row emitted in a round, on average; 0.0 without rounds."""
        count = sum(len(found["rows"]) for found in self.rounds)
        return sum(map(len, self.ranks)) / count if count else 0.0


def read_trace(file: str | os.PathLike) -> list[TracedCall]:
    """The calls in a file.

    Raises:
        ValueError: a line is no call and no round.
    """
    calls: list[TracedCall] = []
    for number, text in enumerate(Path(file).read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
            if "call" in line:
                calls.append(TracedCall(line["call"], line["rule"], ranks=[[] for _ in range(line["batch"])]))
                continue
            for row in line["rows"]:
                calls[-1].ranks[row["row"]] += [tuple(pair) for pair in row["ranks"]]
            calls[-1].rounds.append(line)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"read_trace: every line must be a call or a round of one, got line {number} of {Path(file).name}: "
                f"{type(error).__name__}"
            ) from None
    return calls


@dataclass(frozen=True)
class Replay:
    """Acceptance of another tree on a traced text. Candidates that were never drafted are unknown, hence two bounds.

    Attributes:
        rounds: (row, round) pairs if no unknown candidate is accepted.
        least, most: acceptance length if no unknown candidate is accepted, and if all of them are.
    """

    rounds: int
    least: float
    most: float


def replay(calls: TracedCall | Iterable[TracedCall], topology: Topology) -> Replay:
    """Walk another tree along the text of a trace.

    The trace has the rank of each emitted token among the draft's candidates. The result is exact if candidates depend
    on the text before them alone (a draft model, skipped layers, heads). It is an estimate if they also depend on the
    place at which a round begins (prompt lookup). The two bounds are equal if the traced trees were at least as deep
    and as wide as `topology`.

    Args:
        calls: from `read_trace`.
        topology: a child of rank r carries candidate r.

    Raises:
        ValueError: tokens were drawn (their ranks mean nothing for another tree), or nothing was traced.
    """
    calls = [calls] if isinstance(calls, TracedCall) else list(calls)
    drawn = {line["sampling"] for call in calls for line in call.rounds} - {"none"}
    if drawn:
        raise ValueError(f"replay: trees must be chosen without sampling, got {', '.join(sorted(drawn))}")
    texts = [ranks for call in calls for ranks in call.ranks if ranks]
    if not texts:
        raise ValueError("replay: the trace must hold at least one round, got none")
    children = [{} for _ in topology.parents]
    for node, parent in enumerate(topology.parents):
        if node:
            children[parent][topology.ranks[node]] = node
    heights = [0] * topology.num_nodes
    for node in range(topology.num_nodes - 1, 0, -1):
        parent = topology.parents[node]
        heights[parent] = max(heights[parent], heights[node] + 1)

    def rounds(hopeful: bool) -> int:
        count = 0
        for text in texts:
            place = 0
            while place < len(text):
                place += _accepted(text[place:], children, heights, hopeful) + 1
                count += 1
        return count

    emitted, pessimistic = sum(map(len, texts)), rounds(False)
    return Replay(pessimistic, emitted / pessimistic, emitted / rounds(True))


def _accepted(text: list, children: list[dict[int, int]], heights: list[int], hopeful: bool) -> int:
    """Number of draft tokens accepted in a round that begins before `text`."""
    node = 0
    for count, (rank, candidates) in enumerate(text):
        if rank is None and hopeful:
            # the unknown child that may lead furthest
            unknown = [child for place, child in children[node].items() if place >= candidates]
            node = max(unknown, key=lambda child: heights[child], default=None)
        else:
            node = children[node].get(rank)
        if node is None:
            return count
    return len(text)
