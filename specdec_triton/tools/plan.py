"""Does speculation pay for this pair on this card? Predicted from shapes and ceilings, before anything is rented.

A forward over N rows of each sequence takes at least

    max(bytes / bandwidth, flops / peak) + KERNELS_A_LAYER * layers * seconds a kernel

with the bytes and FLOPs of `roofline`. A round is a verify forward, as many draft forwards of one row as the tree is
deep, and `overhead`. Acceptance is the user's: by rank, the same at every depth. The tree is the one of most tokens a
second under these costs.

On a CPU, where few rows already share little, the forwards are not predicted but timed, with random weights.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ..forward.runner import TreeRunner
from ..tree_choice.costs import Costs, measure_costs
from ..tree_choice.search import LADDER, expected_tokens, optimal_topology
from .files import read_config, reading
from .roofline import Ceilings, Shape, ceilings_of, efficiency_bytes, forward_work, shape_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS_A_LAYER = 10  # two norms, q/k/v, rope, cache write, attention, its output, gate and up, activation, down
MAX_DEPTH = 16
CPU_NODES = 32
NO_DRAFT = "none"
PLOT_BATCHES = (1, 4, 16, 64)
PLOT_ACCEPTANCES = np.linspace(0.05, 0.95, 37)

_LLAMA = {"model_type": "llama", "hidden_act": "silu"}
_QWEN = {"model_type": "qwen2", "hidden_act": "silu"}


def dense(layers, hidden, intermediate, heads, kv_heads, vocab, tied=False, family=_LLAMA) -> dict[str, Any]:
    """Sizes by their names in a config."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}
    return family | sizes | {"tie_word_embeddings": tied}


# from the models' own config.json
SHAPES = {
    "llama-2-7b": dense(32, 4096, 11008, 32, 32, 32000),
    "llama-2-13b": dense(40, 5120, 13824, 40, 40, 32000),
    "llama-33b": dense(60, 6656, 17920, 52, 52, 32000),
    "llama-2-70b": dense(80, 8192, 28672, 64, 8, 32000),
    "llama-3.1-8b": dense(32, 4096, 14336, 32, 8, 128256),
    "llama-3.1-70b": dense(80, 8192, 28672, 64, 8, 128256),
    "llama-3.2-1b": dense(16, 2048, 8192, 32, 8, 128256, tied=True) | {"head_dim": 64},
    "llama-3.2-3b": dense(28, 3072, 8192, 24, 8, 128256, tied=True) | {"head_dim": 128},
    "qwen2.5-0.5b": dense(24, 896, 4864, 14, 2, 151936, tied=True, family=_QWEN),
    "qwen2.5-1.5b": dense(28, 1536, 8960, 12, 2, 151936, tied=True, family=_QWEN),
    "qwen2.5-7b": dense(28, 3584, 18944, 28, 4, 152064, family=_QWEN),
    "qwen2.5-32b": dense(64, 5120, 27648, 40, 8, 152064, family=_QWEN),
    "smollm2-135m": dense(30, 576, 1536, 9, 3, 49152, tied=True),
    "smollm2-1.7b": dense(24, 2048, 8192, 32, 32, 49152, tied=True),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A prediction. Rates are tokens a second of all sequences together; times are seconds.

    Attributes:
        plain_rate, rate, speedup: without and with speculation, and their ratio.
        nodes, depth: of the best tree, root included; 1 and 0: no tree beats plain decoding.
        acceptance_length: tokens a round and sequence, in expectation.
        eta: round efficiency: the time of `efficiency_bytes` over the round's. None if no bandwidth is known.
        plain_seconds, round_seconds, verify_seconds, draft_seconds: of a plain step, a round, and its parts.
        limiter: of the verify forward: "memory", "compute", or "measured".
    """

    plain_rate: float
    rate: float
    speedup: float
    nodes: int
    depth: int
    acceptance_length: float
    eta: float | None
    plain_seconds: float
    round_seconds: float
    verify_seconds: float
    draft_seconds: float
    limiter: str


def load_config(name: str) -> Any:
    """The transformers config of a built-in shape, a model folder or a config.json.

    Raises:
        ValueError: none of these, or not a dense decoder with plain keys and values.
    """
    path = pathlib.Path(name)
    if name in SHAPES:
        sizes = dict(SHAPES[name])
        config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    elif path.exists():
        config = read_config(path).get_text_config()
    else:
        raise ValueError(f"plan: config must be a folder, a config.json or one of {', '.join(SHAPES)}, got {name!r}")
    for field in ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "is_encoder_decoder"):
        if getattr(config, field, None):
            raise ValueError(
                f"plan: config must be a dense decoder with plain keys and values, got {config.model_type} with {field}"
            )
    return config


def planned_shape(config: Any, name: str) -> Shape:
    """The shape of a model of this config; no weights are allocated.

    Raises:
        ValueError: transformers has no causal language model for this config.
    """
    with reading(f"the config of {name}"), torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config), name)


class Engine(NamedTuple):
    """How a pair runs: sequences, tokens in the cache, and seconds of a round outside its forwards."""

    batch: int
    context: int
    overhead: float = 0.0


def forward_seconds(shape: Shape, rows: int, engine: Engine, ceilings: Ceilings) -> tuple[float, str]:
    """Seconds of a forward over `rows` rows of each sequence, and whether memory or compute is the limit."""
    work = forward_work(shape, engine.batch, rows, engine.context)
    launches = KERNELS_A_LAYER * shape.layers * ceilings.kernel_seconds
    return ceilings.seconds(work) + launches, ceilings.limiter(work)


def predicted_costs(target: Shape, draft: Shape | None, engine: Engine, ceilings: Ceilings) -> Costs:
    """What rounds take under `ceilings`."""
    verify = tuple((n, forward_seconds(target, n, engine, ceilings)[0]) for n in LADDER)
    step = 0.0 if draft is None else forward_seconds(draft, 1, engine, ceilings)[0]
    return Costs(verify, tuple((depth, depth * step) for depth in (1, MAX_DEPTH)), engine.overhead)


def measured_costs(target: Any, draft: Any, engine: Engine, dtype: torch.dtype) -> Costs:
    """What rounds take on this CPU: forwards of models of these configs with random weights, timed.

    Raises:
        ValueError: the weights need more than half of this machine's memory.
    """
    verify = _timed_forwards(target, engine, dtype, [n for n in LADDER if n <= CPU_NODES])
    step = 0.0 if draft is None else _timed_forwards(draft, engine, dtype, [1])[0][1]
    return Costs(verify, tuple((depth, depth * step) for depth in (1, MAX_DEPTH)), engine.overhead)


def _timed_forwards(config, engine, dtype, sizes):
    nbytes = planned_shape(config, "").weights * dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * nbytes > memory:
        raise ValueError(
            f"plan: weights to be timed must take at most half of {memory / 2**30:.0f} GiB of memory, "
            f"got {nbytes / 2**30:.0f} GiB"
        )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.zeros(engine.batch, engine.context, dtype=torch.int64)
    runner = TreeRunner(model, ids.new_zeros(engine.batch), engine.context + max(sizes))
    length = ids.new_full((engine.batch,), engine.context)
    with torch.inference_mode():
        # as a round runs them: a chain through our cache and attention, one row as a plain step
        runner.prefill(ids, GenerationConfig(), {"logits_to_keep": 1}, engine.context + max(sizes))
        runner.cache.reserve(engine.context + max(sizes))

        def forward(rows):
            tokens = ids.new_zeros(engine.batch, rows)
            if rows == 1:
                runner.decode(tokens, engine.context)
            else:
                runner.forward_chain(tokens, length)

        return measure_costs(forward, sizes)


def make_plan(
    costs: Costs,
    acceptance: Sequence[float],
    engine: Engine,
    target: Shape,
    draft: Shape | None,
    ceilings: Ceilings | None = None,
    max_depth: int = MAX_DEPTH,
) -> Plan:
    """The best tree under `costs`, and what it comes to.

    Args:
        costs: what a round takes.
        acceptance: probability that the child of each rank is accepted, at every depth; one number: a chain.
        engine: how the pair runs.
        target, draft: as they are stored, for the bytes in eta; draft None: drafting is free (prompt lookup).
        ceilings: None where the costs were measured.
        max_depth: of the tree.

    Raises:
        ValueError: `acceptance` is not numbers above 0 that sum to at most 1.
    """
    if not acceptance or min(acceptance) <= 0 or sum(acceptance) > 1:
        raise ValueError(f"plan: acceptance must be numbers above 0 that sum to at most 1, got {list(acceptance)}")
    most = LADDER[-1] if ceilings else CPU_NODES
    table = np.tile(np.asarray(acceptance, dtype=float), (max_depth, 1))
    tree = optimal_topology(table, costs, most, max_depth, chain=len(acceptance) == 1)
    nodes, depth = tree.num_nodes, tree.max_depth
    tokens = expected_tokens(tree, table)
    plain, seconds = costs.round_seconds(1, 0), costs.round_seconds(nodes, depth)
    eta, limiter = None, "measured"
    if ceilings:
        nbytes = efficiency_bytes(target, engine.batch, engine.context, draft, depth)
        eta = nbytes / ceilings.bandwidth / seconds
        limiter = forward_seconds(target, nodes, engine, ceilings)[1]
    return Plan(
        plain_rate=engine.batch / plain,
        rate=engine.batch * tokens / seconds,
        speedup=tokens * plain / seconds,
        nodes=nodes,
        depth=depth,
        acceptance_length=tokens,
        eta=eta,
        plain_seconds=plain,
        round_seconds=seconds,
        verify_seconds=costs.verify_seconds(nodes),
        draft_seconds=costs.draft_seconds(depth),
        limiter=limiter,
    )


def scaled(acceptance: Sequence[float], first: float) -> list[float]:
    """The same candidates with `first` for the likeliest: the others share what it leaves as they did."""
    left = (1 - first) / (1 - acceptance[0]) if acceptance[0] < 1 else 0.0
    return [first, *(value * left for value in acceptance[1:])]


class Request(NamedTuple):
    """What `specdec-triton plan` was asked; see `specdec-triton plan --help`."""

    target: str
    draft: str
    card: str
    acceptance: Sequence[float]
    batch: int
    context: int
    dtype: str
    max_depth: int
    target_bits: float | None
    draft_bits: float | None
    overhead_us: float
    calibration: pathlib.Path | None


class Planner:
    """Plans of one pair on one card, for any batch and acceptance."""

    def __init__(self, request: Request):
        self.request = request
        itemsize = DTYPES[request.dtype].itemsize
        names, bits = (request.target, request.draft), (request.target_bits, request.draft_bits)
        self.configs = [None if name == NO_DRAFT else load_config(name) for name in names]
        if self.configs[0] is None:
            raise ValueError("plan: target must be a model, got none")
        self.target, self.draft = (
            config and planned_shape(config, name).stored(each or 8 * itemsize, itemsize)
            for config, name, each in zip(self.configs, names, bits, strict=True)
        )
        self.ceilings = None
        if request.card != "cpu":
            self.ceilings = ceilings_of(request.card, request.dtype, request.calibration)
        elif request.calibration or request.target_bits or request.draft_bits:
            raise ValueError("plan: calibration and bits must be left out on a CPU, whose forwards are timed in dtype")

    def plan(self, batch: int | None = None, acceptance: Sequence[float] | None = None) -> Plan:
        request = self.request
        engine = Engine(batch or request.batch, request.context, request.overhead_us / 1e6)
        if self.ceilings:
            costs = predicted_costs(self.target, self.draft, engine, self.ceilings)
        else:
            costs = measured_costs(*self.configs, engine, DTYPES[request.dtype])
        return make_plan(
            costs, acceptance or request.acceptance, engine, self.target, self.draft, self.ceilings, request.max_depth
        )

    def source(self) -> str:
        """Where times come from, for the report."""
        if self.ceilings is None:
            return f"forwards of random weights timed on this CPU, {torch.get_num_threads()} threads"
        has = self.ceilings
        return (
            f"{has.source}: {has.bandwidth / 1e12:.2f} TB/s, {has.flops / 1e12:.0f} TFLOP/s, "
            f"{KERNELS_A_LAYER} kernels a layer at {1e6 * has.kernel_seconds:.1f} us"
        )

    def report(self, plan: Plan) -> dict[str, Any]:
        """The request, where its times come from, and the plan, for JSON."""
        asked = self.request._asdict()
        asked["acceptance"], asked["calibration"] = list(asked["acceptance"]), str(asked["calibration"] or "")
        return asked | {"ceilings": self.source()} | dataclasses.asdict(plan)

    def as_table(self, plan: Plan):
        """A `rich` table."""
        from rich.table import Table

        asked = self.request
        table = Table(title=f"{asked.target}, draft {asked.draft}, on {asked.card}", caption=self.source())
        table.add_column("")
        table.add_column("plain", justify="right")
        table.add_column("speculative", justify="right")
        pays = "" if plan.nodes > 1 else " (does not pay)"
        eta = "-" if plan.eta is None else f"{plan.eta:.2f}"
        rows = [
            ("tokens/s, all sequences", f"{plan.plain_rate:.1f}", f"{plan.rate:.1f}"),
            ("speedup", "1.00 ×", f"{plan.speedup:.2f} ×{pays}"),
            ("tokens a round", "1.00", f"{plan.acceptance_length:.2f}"),
            ("nodes, depth", "1, 0", f"{plan.nodes}, {plan.depth}"),
            ("round, ms", f"{1e3 * plan.plain_seconds:.3f}", f"{1e3 * plan.round_seconds:.3f}"),
            ("  verify, ms", f"{1e3 * plan.plain_seconds:.3f}", f"{1e3 * plan.verify_seconds:.3f} ({plan.limiter})"),
            ("  draft, ms", "", f"{1e3 * plan.draft_seconds:.3f}"),
            ("round efficiency η", "", eta),
        ]
        for row in rows:
            table.add_row(*row)
        return table

    def plot(self, path: pathlib.Path) -> None:
        """Draw speedup against acceptance, a line for each batch, to a file of any type that matplotlib writes.

        Raises:
            ValueError: on a CPU, where each batch would have to be timed.
        """
        if self.ceilings is None:
            raise ValueError("plan: plot must be of a GPU: on a CPU every batch would have to be timed")
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        asked = self.request
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for batch in PLOT_BATCHES:
            speedups = [self.plan(batch, scaled(asked.acceptance, first)).speedup for first in PLOT_ACCEPTANCES]
            axes.plot(PLOT_ACCEPTANCES, speedups, label=f"batch {batch}")
        axes.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="plain decoding")
        axes.axvline(asked.acceptance[0], color="grey", linewidth=0.8, linestyle=":", label="acceptance asked for")
        axes.set_xlabel("acceptance of the likeliest draft token (probability)")
        axes.set_ylabel("speedup over plain decoding (ratio)")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        title = f"{asked.target}, draft {asked.draft}: {asked.card}, {asked.dtype}, {asked.context} tokens of context"
        axes.set_title(f"{title}\nfloors from {self.ceilings.source}", fontsize=9)
        axes.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
