"""The list of goals, each with checks that read rows; used by report.py.

A goal has one or more checks. A check reads numbers from the rows of one GPU, or of a CPU if its `size` says so, and
the worst number counts. If rows that it needs are missing, the check is "not measured".

Checks of whole forwards are made for each of `WAYS`. The fastest way counts, even if a slower one has a better ratio.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from _rows import WAYS, way_of

LLAMA = {"Hq": 32, "Hkv": 8, "D": 128, "B": 1}
LARGE = 128256
MODEL = "llama 8B"  # of bench_generate; all goals are about this one
NEEDS = ("wrong", "failed", "absent", "untimed")
IN_WAYS = ("generate", "round")  # benches of whole forwards
PEER_RATIO = 1.3
LONG = (8192, 32768)


class Missing(Exception):
    """Rows that a check needs are missing."""


class Rows:
    """The rows of one machine that have a result.

    Args:
        rows: from `rows.json`.
        size: "gpu", "cpu" or "rehearsal"; rows of another size are left out.
        way: one of `WAYS`; whole forwards that ran in another way are left out. None: all rows.
    """

    def __init__(self, rows: list[dict], size: str = "gpu", way: str | None = None):
        rows = [row for row in rows if row["size"] == size and not any(name in row for name in NEEDS)]
        self.rows = [row for row in rows if way is None or row["bench"] not in IN_WAYS or way_of(row["shapes"]) == way]

    def find(self, bench: str, provider: str | None = None, dtype: str | None = None, **shapes) -> list[dict]:
        """Rows with these values; a tuple means any of its values."""

        def fits(row: dict) -> bool:
            return (
                row["bench"] == bench
                and provider in (None, row["provider"])
                and dtype in (None, row["dtype"])
                and all(row["shapes"].get(name) in _all(value) for name, value in shapes.items())
            )

        return [row for row in self.rows if fits(row)]

    def one(self, *names, **shapes) -> dict:
        """The first row of `find`.

        Raises:
            Missing: there is no such row.
        """
        for row in self.find(*names, **shapes):
            return row
        raise Missing


def _all(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


Read = Callable[[Rows], list[float | None]]


class Verdict(NamedTuple):
    """The worst number, "met", "missed" or "not measured", and the way of forwards that was judged."""

    value: float | None = None
    verdict: str = "not measured"
    way: str | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """A number that must be at least (">=") or at most ("<=") a bound.

    Attributes:
        quantity: in words, with its unit.
        read: reads numbers from rows, of which the worst counts. None, `Missing` or no number: not measured.
        size: of the rows that are read.
        speed: reads numbers from the rows of one way; the way whose least number is the largest counts. None: the check
            is not about whole forwards.
    """

    goal: str
    quantity: str
    sign: str
    bound: float
    read: Read
    size: str = "gpu"
    speed: Read | None = None

    def judge(self, rows: list[dict]) -> Verdict:
        if self.speed is None:
            return self._judge(Rows(rows, self.size))
        tried = []
        for way in WAYS:
            of_way = Rows(rows, self.size, way)
            found, speeds = self._judge(of_way)._replace(way=way), numbers(self.speed, of_way)
            if found.value is not None and speeds:
                tried.append((min(speeds), found))
        return max(tried, key=lambda each: each[0])[1] if tried else Verdict()

    def _judge(self, rows: Rows) -> Verdict:
        values = numbers(self.read, rows)
        if not values:
            return Verdict()
        value = min(values) if self.sign == ">=" else max(values)
        met = value >= self.bound if self.sign == ">=" else value <= self.bound
        return Verdict(value, "met" if met else "missed")


def numbers(read: Read, rows: Rows) -> list[float]:
    """The numbers that `read` finds; none if one is missing."""
    try:
        values = read(rows)
    except Missing:
        return []
    return [] if None in values or any(map(math.isnan, values)) else values


def field(name: str, *names, **shapes) -> Read:
    """The field `name` of the rows with these values. Of a tuple, every value must have a row."""

    def read(rows: Rows) -> list[float | None]:
        found = rows.find(*names, **shapes)
        if any(set(_all(value)) - {row["shapes"].get(key) for row in found} for key, value in shapes.items()):
            raise Missing
        return [row.get(name) for row in found]

    return read


def attention(name: str, nodes: Any, context: Any) -> Read:
    return field(name, "tree_attention", "triton", **LLAMA, N=nodes, context=context)


def share(nodes: Any, context: int) -> Read:
    return attention("of_ceiling", nodes, context)


def against(peer: str, room: float = math.inf) -> Read:
    """Times of a peer over ours. If ours is at `room` of the roofline, the ratio counts as at least the bound."""

    def read(rows: Rows) -> list[float | None]:
        ratios = []
        for shapes in ({**LLAMA, "N": nodes, "context": context} for nodes in (32, 64) for context in LONG):
            ours, theirs = (rows.one("tree_attention", provider, **shapes) for provider in ("triton", peer))
            ratio = theirs["p50_us"] / ours["p50_us"]
            ratios.append(max(ratio, PEER_RATIO) if ours["of_ceiling"] >= room else ratio)
        return ratios

    return read


def tree_tax(rows: Rows) -> list[float | None]:
    """Our time at N = 32 over the best time of any provider at N = 1."""
    taxes = []
    for context in LONG:
        single = [row["p50_us"] for row in rows.find("tree_attention", None, **LLAMA, N=1, context=context)]
        wide = rows.one("tree_attention", "triton", **LLAMA, N=32, context=context)
        taxes.append(wide["p50_us"] / min(single) if single else None)
    return taxes


def filters_cost(name: str) -> Read:
    """The increase of `name` by filters, under `coupled` at N = 32."""

    def read(rows: Rows) -> list[float | None]:
        shapes = {**COUPLED, "N": 32}
        filtered, plain = (
            rows.one("accept_sample", "triton", **{**shapes, "filters": filters}).get(name)
            for filters in ("filtered", "temperature")
        )
        return [None if None in (filtered, plain) else filtered - plain]

    return read


def verify_us(nodes: int) -> Read:
    """Time of the verify stage at N."""

    def read(rows: Rows) -> list[float | None]:
        return [rows.one("round", None, **{**ROUND, "N": nodes})["stages"].get("verify", {"us": None})["us"]]

    return read


def verify_growth(nodes: int, bound: float) -> Check:
    """Time of the verify stage at N over that at N = 1."""

    def read(rows: Rows) -> list[float | None]:
        wide, single = (verify_us(n)(rows)[0] for n in (nodes, 1))
        return [None if None in (wide, single) else wide / single]

    quantity = f"verify forward, 8B, 2k: N = {nodes} over N = 1"
    return Check("9", quantity, "<=", bound, read, speed=inverse(verify_us(nodes)))


def inverse(read: Read) -> Read:
    """Speeds of times."""
    return lambda rows: [None if value is None else 1 / value for value in read(rows)]


def speedup(goal: str, quantity: str, bound: float, provider: str, over: str, **shapes) -> Check:
    """A check of paired ratios of tokens/s. Methods of ours are compared with ours in the same way."""

    def found(rows: Rows) -> list[dict]:
        return rows.find("generate", provider, model=MODEL, **shapes)

    def read(rows: Rows) -> list[float | None]:
        return [row["ratio"].get(over) for row in found(rows)]

    return Check(goal, quantity, ">=", bound, read, speed=lambda rows: [row["p50_tokens_s"] for row in found(rows)])


def drafts(quantity: str, bound: float, provider: str, over: str, **shapes) -> Check:
    """A check of goal 13."""
    return speedup("13", quantity, bound, provider, over, case=("drafts", "compiled"), **shapes)


def efficiency(goal: str, quantity: str, bound: float, provider: str, **shapes) -> Check:
    """A check of the best eta."""

    def read(rows: Rows) -> list[float | None]:
        found = [row["eta"] for row in rows.find("generate", provider, model=MODEL, B=1, **shapes)]
        return [max(found)] if found else []

    return Check(goal, quantity, ">=", bound, read, speed=read)


def of_rounds(quantity: str, bound: float, name: str) -> Check:
    speed = inverse(field("p50_us", "round", **ROUND))
    return Check("10", quantity, "<=", bound, field(name, "round", **ROUND), speed=speed)


def demo(name: str, provider: str = "specdec_triton", **shapes) -> Read:
    return field(name, "demo", provider, **shapes)


ROUND = {"B": 1, "context": 2048, "cuda_graphs": True, "N": (1, 64)}
COUPLED = {"B": 1, "N": 64, "V": LARGE, "rule": "coupled", "filters": "temperature"}
APPEND = {"op": "append_tokens", "B": 1, "N": 64}
SHORT = ((1, 16, 32, 64), (512, 1024))
SDPA = "sdpa, dense mask"
SUFFIX = "specdec_triton, suffix"  # the provider of bench_demo
PLAIN, ORACLE, DRAFTED = "ours, plain", "ours, oracle", "ours, draft model"
ASSISTED, EAGER = "transformers assisted", "transformers eager"
GOALS = [
    Check("1", "attention, N = 16 and 32, 32k: share of bandwidth", ">=", 0.85, share((16, 32), 32768)),
    Check("1", "attention, N = 16 and 32, 8k: share of bandwidth", ">=", 0.70, share((16, 32), 8192)),
    Check("2", "attention, N = 64, 32k: share of the roofline", ">=", 0.60, share(64, 32768)),
    Check("2", "attention, N = 128, 32k: share of the roofline", ">=", 0.50, share(128, 32768)),
    Check("3", "attention, N = 32 and 64, 8k and 32k: × SDPA with a dense mask", ">=", 5.0, against(SDPA)),
    Check("3", "the same: × FlexAttention, or 85% of the roofline", ">=", PEER_RATIO, against("flex_attention", 0.85)),
    Check("3", "the same: × FlashInfer, or 85% of the roofline", ">=", PEER_RATIO, against("flashinfer", 0.85)),
    Check("4", "tree tax: N = 32 over the best N = 1, 8k and 32k", "<=", 1.10, tree_tax),
    Check("5", "attention, N ≤ 64, context ≤ 1k: µs", "<=", 8.0, attention("p50_us", *SHORT)),
    Check("5", "the same: launches", "<=", 1, attention("launches", *SHORT)),
    Check(
        "6",
        "greedy acceptance, N = 64, 128k: µs",
        "<=",
        12.0,
        field("p50_us", "accept", "triton", "bf16", B=1, N=64, V=LARGE),
    ),
    Check(
        "6",
        "coupled acceptance with temperature, N = 64, 128k: µs",
        "<=",
        18.0,
        field("p50_us", "accept_sample", "triton", **COUPLED),
    ),
    Check("6", "the same: launches", "<=", 2, field("launches", "accept_sample", "triton", **COUPLED)),
    Check("7", "filters, N = 32, 128k: µs more", "<=", 30.0, filters_cost("p50_us")),
    Check("7", "the same: launches more", "<=", 1, filters_cost("launches")),
    Check("8", "compaction, 8B, batch 1: µs", "<=", 10.0, field("p50_us", "compact", "triton", model="8B", B=1)),
    Check("8", "the same: launches", "<=", 1, field("launches", "compact", "triton", model="8B", B=1)),
    Check("8", "append, N = 64, batch 1: launches", "<=", 1, field("launches", "compact", "triton", **APPEND)),
    verify_growth(64, 1.10),
    verify_growth(128, 1.25),
    of_rounds("host work a round: µs", 150.0, "host_us"),
    of_rounds("GPU idle share (a wait on the critical path shows here)", 0.05, "idle_share"),
    efficiency("11", "our decoding without speculation: eta", 0.85, PLAIN),
    efficiency("12", "round efficiency eta, 8B, N = 64", 0.70, ORACLE, N=64),
    drafts("controlled acceptance 4.5: × our graphed decoding", 3.5, ORACLE, PLAIN, N=64),
    drafts("with a draft of some 0.6 of a plain step a round: × our graphed decoding", 2.5, DRAFTED, PLAIN),
    drafts("with the same draft: × transformers' assisted", 4.0, DRAFTED, ASSISTED),
    drafts("with the same draft: × transformers eager", 10.0, DRAFTED, EAGER),
    speedup("14", "batch 16, N = 8, acceptance 3: × our graphed decoding", 1.6, ORACLE, PLAIN, B=16),
    speedup("14", "batch 64, N = 4, acceptance 3: × our graphed decoding", 1.4, ORACLE, PLAIN, B=64),
    Check("CPU", "demo model, code edit: × plain generate", ">=", 3.0, demo("ratio_plain", prompt="code edit"), "cpu"),
    Check("CPU", "the same with suffix decoding", ">=", 3.0, demo("ratio_plain", SUFFIX, prompt="code edit"), "cpu"),
    Check("CPU", "suffix decoding, chat: × plain", ">=", 1.0, demo("ratio_plain", SUFFIX, prompt="chat"), "cpu"),
    Check(
        "CPU",
        "demo model, the least of five prompts: × transformers' prompt lookup",
        ">=",
        1.0,
        demo("ratio_lookup"),
        "cpu",
    ),
    Check("CPU", "demo model: host reads a round", "<=", 1.0, demo("host_reads"), "cpu"),
]
