"""The goals, and what the rows say of them: one list, read by report.py.

A goal has one or more checks. A check reads a number from the rows of one GPU (of a CPU where it says so); without the
rows that it needs it is "not measured". Of several rows the worst counts.
"""

import dataclasses
import math
from collections.abc import Callable

LLAMA = {"Hq": 32, "Hkv": 8, "D": 128, "B": 1}
LARGE = 128256
MODEL = "llama 8B"  # of bench_generate; no goal is about another one
NEEDS = ("wrong", "failed", "absent", "untimed")


class Rows:
    """Rows of one machine, those with a result.

    Args:
        rows: from `rows.json`.
        size: "gpu", "cpu" or "rehearsal": others are left out.
    """

    def __init__(self, rows: list[dict], size: str = "gpu"):
        self.rows = [row for row in rows if row["size"] == size and not any(name in row for name in NEEDS)]

    def find(self, bench: str, provider: str | None = None, dtype: str | None = None, **shapes) -> list[dict]:
        """Rows of these; a tuple of values means any of them."""

        def fits(row: dict) -> bool:
            return (
                row["bench"] == bench
                and provider in (None, row["provider"])
                and dtype in (None, row["dtype"])
                and all(_among(row["shapes"].get(name), value) for name, value in shapes.items())
            )

        return [row for row in self.rows if fits(row)]


def _among(found, wanted) -> bool:
    return found in wanted if isinstance(wanted, tuple) else found == wanted


@dataclasses.dataclass(frozen=True)
class Check:
    """A number that must be at least (">=") or at most ("<=") a bound.

    Attributes:
        what: in words, with its unit.
        read: from the rows; None where they do not say.
        size: whose rows it reads.
    """

    goal: str
    what: str
    sign: str
    bound: float
    read: Callable[[Rows], float | None]
    size: str = "gpu"

    def judge(self, rows: list[dict]) -> tuple[float | None, str]:
        """The number, and "met", "missed" or "not measured"."""
        value = self.read(Rows(rows, self.size))
        if value is None or math.isnan(value):
            return None, "not measured"
        return value, "met" if (value >= self.bound if self.sign == ">=" else value <= self.bound) else "missed"


def worst(values: list[float | None], sign: str) -> float | None:
    """The least of values that must be large, the greatest of those that must be small; None where one is missing."""
    if not values or None in values:
        return None
    return min(values) if sign == ">=" else max(values)


def field(sign: str, name: str, *where, **shapes) -> Callable[[Rows], float | None]:
    """The worst `name` of the rows there; all values that a tuple asks for must be there."""

    def read(rows: Rows) -> float | None:
        found = rows.find(*where, **shapes)
        asked = {key: set(value) for key, value in shapes.items() if isinstance(value, tuple)}
        if any(values - {row["shapes"].get(key) for row in found} for key, values in asked.items()):
            return None
        return worst([row.get(name) for row in found], sign)

    return read


def attention(sign: str, name: str, **shapes) -> Callable[[Rows], float | None]:
    return field(sign, name, "tree_attention", "triton", **LLAMA, **shapes)


def against(peer: str, room: float = math.inf) -> Callable[[Rows], float | None]:
    """Least time of a peer over ours; where we are at `room` of the roofline, no more can be asked than the bound."""

    def read(rows: Rows) -> float | None:
        ratios = []
        for nodes in (32, 64):
            for context in (8192, 32768):
                shapes = {**LLAMA, "N": nodes, "context": context}
                ours, theirs = (rows.find("tree_attention", provider, **shapes) for provider in ("triton", peer))
                if not ours or not theirs:
                    return None
                ratio = theirs[0]["p50_us"] / ours[0]["p50_us"]
                ratios.append(max(ratio, PEER_RATIO) if ours[0]["of_ceiling"] >= room else ratio)
        return min(ratios)

    return read


PEER_RATIO = 1.3


def tree_tax(rows: Rows) -> float | None:
    """Our N = 32 over anyone's best N = 1."""
    taxes = []
    for context in (8192, 32768):
        wide = rows.find("tree_attention", "triton", **LLAMA, N=32, context=context)
        single = rows.find("tree_attention", None, **LLAMA, N=1, context=context)
        if not wide or not single:
            return None
        taxes.append(wide[0]["p50_us"] / min(row["p50_us"] for row in single))
    return max(taxes)


def filters_cost(name: str) -> Callable[[Rows], float | None]:
    """What filters add to `coupled`, N = 32."""

    def read(rows: Rows) -> float | None:
        shapes = {"B": 1, "N": 32, "V": LARGE, "rule": "coupled"}
        with_, without = (
            rows.find("accept_sample", "triton", **shapes, filters=f) for f in ("filtered", "temperature")
        )
        if not with_ or not without or None in (with_[0].get(name), without[0].get(name)):
            return None
        return with_[0][name] - without[0][name]

    return read


def verify_growth(nodes: int) -> Callable[[Rows], float | None]:
    """The verify stage at N over N = 1, both as CUDA graphs."""

    def read(rows: Rows) -> float | None:
        shapes = {"B": 1, "context": 2048, "cuda_graphs": True}
        wide, single = (rows.find("round", None, N=n, **shapes) for n in (nodes, 1))
        if not wide or not single or any("verify" not in row["stages"] for row in (wide[0], single[0])):
            return None
        return wide[0]["stages"]["verify"]["us"] / single[0]["stages"]["verify"]["us"]

    return read


def speedup(provider: str, over: str, **shapes) -> Callable[[Rows], float | None]:
    """Paired ratio of tokens a second, bench_generate."""

    def read(rows: Rows) -> float | None:
        return worst([row["ratio"].get(over) for row in rows.find("generate", provider, model=MODEL, **shapes)], ">=")

    return read


def efficiency(provider: str, **shapes) -> Callable[[Rows], float | None]:
    """The best eta of the options measured."""

    def read(rows: Rows) -> float | None:
        found = [row["eta"] for row in rows.find("generate", provider, model=MODEL, B=1, **shapes)]
        return max(found, default=None)

    return read


def demo(name: str, sign: str, **shapes) -> Callable[[Rows], float | None]:
    return field(sign, name, "demo", "specdec_triton", **shapes)


ROUND = {"B": 1, "context": 2048, "cuda_graphs": True, "N": (1, 64)}
SHORT = {"N": (1, 16, 32, 64), "context": (512, 1024)}
COUPLED = {"B": 1, "N": 64, "V": LARGE, "rule": "coupled", "filters": "temperature"}
GOALS = [
    Check(
        "1",
        "attention, N = 16 and 32, 32k: share of bandwidth",
        ">=",
        0.85,
        attention(">=", "of_ceiling", N=(16, 32), context=32768),
    ),
    Check(
        "1",
        "attention, N = 16 and 32, 8k: share of bandwidth",
        ">=",
        0.70,
        attention(">=", "of_ceiling", N=(16, 32), context=8192),
    ),
    Check(
        "2",
        "attention, N = 64, 32k: share of the roofline",
        ">=",
        0.60,
        attention(">=", "of_ceiling", N=64, context=32768),
    ),
    Check(
        "2",
        "attention, N = 128, 32k: share of the roofline",
        ">=",
        0.50,
        attention(">=", "of_ceiling", N=128, context=32768),
    ),
    Check(
        "3", "attention, N = 32 and 64, 8k and 32k: × SDPA with a dense mask", ">=", 5.0, against("sdpa, dense mask")
    ),
    Check("3", "the same: × FlexAttention, or 85% of the roofline", ">=", PEER_RATIO, against("flex_attention", 0.85)),
    Check("3", "the same: × FlashInfer, or 85% of the roofline", ">=", PEER_RATIO, against("flashinfer", 0.85)),
    Check("4", "tree tax: N = 32 over the best N = 1, 8k and 32k", "<=", 1.10, tree_tax),
    Check("5", "attention, N ≤ 64, context ≤ 1k: µs", "<=", 8.0, attention("<=", "p50_us", **SHORT)),
    Check("5", "the same: launches", "<=", 1, attention("<=", "launches", **SHORT)),
    Check(
        "6",
        "greedy acceptance, N = 64, 128k: µs",
        "<=",
        12.0,
        field("<=", "p50_us", "accept", "triton", "bf16", B=1, N=64, V=LARGE),
    ),
    Check(
        "6",
        "coupled acceptance with temperature, N = 64, 128k: µs",
        "<=",
        18.0,
        field("<=", "p50_us", "accept_sample", "triton", **COUPLED),
    ),
    Check("6", "the same: launches", "<=", 2, field("<=", "launches", "accept_sample", "triton", **COUPLED)),
    Check("7", "filters, N = 32, 128k: µs more", "<=", 30.0, filters_cost("p50_us")),
    Check("7", "the same: launches more", "<=", 1, filters_cost("launches")),
    Check("8", "compaction, 8B, batch 1: µs", "<=", 10.0, field("<=", "p50_us", "compact", "triton", model="8B", B=1)),
    Check("8", "the same: launches", "<=", 1, field("<=", "launches", "compact", "triton", model="8B", B=1)),
    Check("9", "verify forward, 8B, 2k: N = 64 over N = 1", "<=", 1.10, verify_growth(64)),
    Check("9", "verify forward, 8B, 2k: N = 128 over N = 1", "<=", 1.25, verify_growth(128)),
    Check("10", "host work a round: µs", "<=", 150.0, field("<=", "host_us", "round", **ROUND)),
    Check(
        "10",
        "GPU idle share (a wait on the critical path shows here)",
        "<=",
        0.05,
        field("<=", "idle_share", "round", **ROUND),
    ),
    Check("11", "our decoding without speculation, compiled: eta", ">=", 0.85, efficiency("ours, plain", compile=True)),
    Check("12", "round efficiency eta, 8B, N = 64", ">=", 0.70, efficiency("ours, oracle", N=64)),
    Check(
        "13",
        "controlled acceptance 4.5: × our graphed decoding",
        ">=",
        3.5,
        speedup("ours, oracle", "ours, plain", case="drafts"),
    ),
    Check(
        "13",
        "with a draft of some 0.6 of a plain step a round: × our graphed decoding",
        ">=",
        2.5,
        speedup("ours, draft model", "ours, plain", case="drafts"),
    ),
    Check(
        "13",
        "with the same draft: × transformers' assisted",
        ">=",
        4.0,
        speedup("ours, draft model", "transformers assisted", case="drafts"),
    ),
    Check(
        "13",
        "with the same draft: × transformers eager",
        ">=",
        10.0,
        speedup("ours, draft model", "transformers eager", case="drafts"),
    ),
    Check(
        "14",
        "batch 16, N = 8, acceptance 3: × our graphed decoding",
        ">=",
        1.6,
        speedup("ours, oracle", "ours, plain", B=16),
    ),
    Check(
        "14",
        "batch 64, N = 4, acceptance 3: × our graphed decoding",
        ">=",
        1.4,
        speedup("ours, oracle", "ours, plain", B=64),
    ),
    Check(
        "CPU",
        "demo model, code edit: × plain generate",
        ">=",
        3.0,
        demo("ratio_plain", ">=", prompt="code edit"),
        "cpu",
    ),
    Check(
        "CPU",
        "demo model, the least of five prompts: × transformers' prompt lookup",
        ">=",
        1.0,
        demo("ratio_lookup", ">="),
        "cpu",
    ),
    Check("CPU", "demo model: host reads a round", "<=", 1.0, demo("host_reads", "<="), "cpu"),
]
