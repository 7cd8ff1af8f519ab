"""Predicts from shapes and ceilings, without loading a model, whether speculation pays for a pair on a device.

A forward over N rows of each sequence takes at least

    max(bytes / bandwidth, flops / peak) + KERNELS_PER_LAYER * layers * seconds a kernel

with the bytes and FLOPs of `roofline`. A round is a verify forward, one draft forward of one row for each level of the
tree, and `overhead`. The user gives the acceptance: by rank, the same at every depth. The tree is the one that decodes
most tokens a second under these costs.

On a CPU the forwards are timed with random weights instead of predicted: there a few rows already cost more than one.
"""

import dataclasses
import importlib.util
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
from .files import one_line, read_config, reading
from .roofline import Ceilings, Shape, ceilings_of, efficiency_bytes, forward_work, shape_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS_PER_LAYER = 10  # two norms, q/k/v, rope, cache write, attention, its output, gate and up, activation, down
MAX_DEPTH = 16
CPU_NODES = 32
NO_DRAFT = "none"
PLOT_BATCHES = (1, 4, 16, 64)
PLOT_ACCEPTANCES = np.linspace(0.05, 0.95, 37)

# Aliases that work without the hub: the fields of each model's own config.json that decide its shape
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_LLAMA2 = {"model_type": "llama", "vocab_size": 32000}
_QWEN = {"model_type": "qwen2", "vocab_size": 152064}
_SMALL_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
_SMOLLM = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA2, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32,
    },
    "llama-2-13b": {
        **_LLAMA2, "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824,
        "num_attention_heads": 40,
    },
    "llama-33b": {
        **_LLAMA2, "num_hidden_layers": 60, "hidden_size": 6656, "intermediate_size": 17920,
        "num_attention_heads": 52,
    },
    "llama-2-70b": {
        **_LLAMA2, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        **_LLAMA, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **_LLAMA, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    },
    "llama-3.2-1b": {
        **_LLAMA, "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **_LLAMA, "num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
        "head_dim": 128, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        **_SMALL_QWEN, "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": {
        **_SMALL_QWEN, "num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960,
        "num_attention_heads": 12,
    },
    "qwen2.5-7b": {
        **_QWEN, "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen2.5-32b": {
        **_QWEN, "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "smollm2-135m": {
        **_SMOLLM, "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "smollm2-1.7b": {
        **_SMOLLM, "num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
    },
}  # fmt: skip
REFUSED_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "is_encoder_decoder")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A prediction. Rates are tokens a second of all sequences together; times are in seconds.

    Attributes:
        plain_rate, rate, speedup: without and with speculation, and their ratio.
        nodes, depth: of the best tree, root included; 1 and 0 if no tree beats plain decoding.
        acceptance_length: expected tokens a round, for one sequence.
        eta: round efficiency: the time to read `efficiency_bytes` over the time of a round. None if no bandwidth is
            known.
        plain_seconds, round_seconds, verify_seconds, draft_seconds: of a plain step, a round, and its parts.
        limiter: the verify forward is limited by "memory" or "compute"; "measured" if it was timed.
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


def load_config(name: str, argument: str = "config") -> Any:
    """The transformers config of a preset, a model folder, a config.json or a model on the hub.

    Args:
        name: a name in `PRESETS`, a path, or a hub name such as "meta-llama/Llama-3.1-8B".
        argument: for errors.

    Raises:
        ValueError: `name` is none of these, the hub cannot be reached or refuses access, or the model is not a dense
            decoder with plain keys and values.
    """
    path = pathlib.Path(name)
    if name in PRESETS:
        config = AutoConfig.for_model(**PRESETS[name])
    elif path.exists():
        config = read_config(path)
    else:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # transformers and huggingface_hub let many kinds through
            raise ValueError(
                f"plan: {argument} must be a model folder, a config.json, a hub name or one of {', '.join(PRESETS)}, "
                f"got {name!r}: there is no such path, and the hub gave no config: {one_line(error)}"
            ) from error
    config = config.get_text_config()
    for field in REFUSED_FIELDS:
        if getattr(config, field, None):
            raise ValueError(
                f"plan: {argument} must be a dense decoder with plain keys and values, got {config.model_type} with "
                f"{field}"
            )
    return config


def planned_shape(config: Any, name: str) -> Shape:
    """The shape of a model with this config; no weights are allocated.

    Raises:
        ValueError: transformers has no causal language model for this config.
    """
    with reading(f"the config of {name}"), torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config), name)


class Workload(NamedTuple):
    """Number of sequences, tokens in the cache of each, and seconds of a round outside its forwards."""

    batch: int
    context: int
    overhead: float = 0.0


def forward_seconds(shape: Shape, rows: int, workload: Workload, ceilings: Ceilings) -> tuple[float, str]:
    """Seconds of a forward over `rows` rows of each sequence, and whether memory or compute is the limit."""
    work = forward_work(shape, workload.batch, rows, workload.context)
    launches = KERNELS_PER_LAYER * shape.layers * ceilings.kernel_seconds
    return ceilings.seconds(work) + launches, ceilings.limiter(work)


def predicted_costs(target: Shape, draft: Shape | None, workload: Workload, ceilings: Ceilings) -> Costs:
    """Seconds of verifying and drafting under `ceilings`."""
    verify = tuple((n, forward_seconds(target, n, workload, ceilings)[0]) for n in LADDER)
    step = 0.0 if draft is None else forward_seconds(draft, 1, workload, ceilings)[0]
    return Costs(verify, tuple((depth, depth * step) for depth in (1, MAX_DEPTH)), workload.overhead)


def cpu_costs(target: Any, draft: Any, workload: Workload, dtype: torch.dtype) -> Costs:
    """Seconds of verifying and drafting on this CPU, timed: forwards of models with these configs and random weights.

    Raises:
        ValueError: the weights need more than half of this machine's memory.
    """
    verify = _time_forwards(target, workload, dtype, [n for n in LADDER if n <= CPU_NODES])
    step = 0.0 if draft is None else _time_forwards(draft, workload, dtype, [1])[0][1]
    return Costs(verify, tuple((depth, depth * step) for depth in (1, MAX_DEPTH)), workload.overhead)


def _time_forwards(config, workload, dtype, sizes):
    nbytes = planned_shape(config, "").weights * dtype.itemsize
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * nbytes > memory:
        raise ValueError(
            f"plan: on a CPU the weights must take at most half of {memory / 2**30:.0f} GiB of memory, "
            f"got {nbytes / 2**30:.0f} GiB"
        )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.zeros(workload.batch, workload.context, dtype=torch.int64)
    runner = TreeRunner(model, ids.new_zeros(workload.batch), workload.context + max(sizes))
    length = ids.new_full((workload.batch,), workload.context)
    with torch.inference_mode():
        # as in a round: a chain through our cache and attention, a single row as a plain step
        runner.prefill(ids, GenerationConfig(), {"logits_to_keep": 1}, workload.context + max(sizes))
        runner.cache.reserve(workload.context + max(sizes))

        def forward(rows):
            tokens = ids.new_zeros(workload.batch, rows)
            if rows == 1:
                runner.decode(tokens, workload.context)
            else:
                runner.forward_chain(tokens, length)

        return measure_costs(forward, sizes)


def is_acceptance(values: Sequence[float]) -> bool:
    """Whether these are probabilities of siblings: above 0, with a sum of at most 1."""
    return bool(values) and all(value > 0 for value in values) and sum(values) <= 1


def check_acceptance(acceptance: Sequence[float]) -> None:
    """Raises ValueError unless `is_acceptance`."""
    if not is_acceptance(acceptance):
        raise ValueError(f"plan: acceptance must be numbers above 0 that sum to at most 1, got {list(acceptance)}")


def make_plan(
    costs: Costs,
    acceptance: Sequence[float],
    workload: Workload,
    target: Shape,
    draft: Shape | None,
    ceilings: Ceilings | None = None,
    max_depth: int = MAX_DEPTH,
) -> Plan:
    """The best tree under `costs`, and its speed.

    Args:
        costs: seconds of verifying and drafting.
        acceptance: probability that the child of each rank is accepted, at every depth; one number: a chain.
        workload: sequences, context and overhead.
        target, draft: as they are stored, for the bytes in eta; draft None: drafting is free (prompt lookup).
        ceilings: None if the costs were measured.
        max_depth: of the tree.

    Raises:
        ValueError: `acceptance` is not numbers above 0 that sum to at most 1.
    """
    check_acceptance(acceptance)
    most = LADDER[-1] if ceilings else CPU_NODES
    table = np.tile(np.asarray(acceptance, dtype=float), (max_depth, 1))
    tree = optimal_topology(table, costs, most, max_depth, chain=len(acceptance) == 1)
    nodes, depth = tree.num_nodes, tree.max_depth
    tokens = expected_tokens(tree, table)
    plain, seconds = costs.round_seconds(1, 0), costs.round_seconds(nodes, depth)
    eta, limiter = None, "measured"
    if ceilings:
        nbytes = efficiency_bytes(target, workload.batch, workload.context, draft, depth)
        eta = nbytes / ceilings.bandwidth / seconds
        limiter = forward_seconds(target, nodes, workload, ceilings)[1]
    return Plan(
        plain_rate=workload.batch / plain,
        rate=workload.batch * tokens / seconds,
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
    """`first` for the likeliest candidate; the others keep their shares of the remaining probability."""
    left = (1 - first) / (1 - acceptance[0]) if acceptance[0] < 1 else 0.0
    return [first, *(value * left for value in acceptance[1:])]


class Request(NamedTuple):
    """The options of `specdec-triton plan`; see `specdec-triton plan --help`."""

    target: str
    draft: str
    device: str
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
    """Plans of one pair on one device, for any batch and acceptance.

    Raises:
        ValueError: an option is wrong; the message names it.
    """

    def __init__(self, request: Request):
        self.request = request
        check_acceptance(request.acceptance)
        itemsize = DTYPES[request.dtype].itemsize
        names, bits = (request.target, request.draft), (request.target_bits, request.draft_bits)
        if request.target == NO_DRAFT:
            raise ValueError("plan: target must be a model, got none")
        self.configs = [
            None if name == NO_DRAFT else load_config(name, argument)
            for name, argument in zip(names, ("target", "draft"), strict=True)
        ]
        self.target, self.draft = (
            config and planned_shape(config, name).stored(each or 8 * itemsize, itemsize)
            for config, name, each in zip(self.configs, names, bits, strict=True)
        )
        self.ceilings = None
        if request.device != "cpu":
            self.ceilings = ceilings_of(request.device, request.dtype, request.calibration)
        elif request.calibration or request.target_bits or request.draft_bits:
            raise ValueError(
                "plan: calibration, target-bits and draft-bits must be left out with the device cpu: its forwards are "
                "timed in dtype"
            )

    def plan(self, batch: int | None = None, acceptance: Sequence[float] | None = None) -> Plan:
        request = self.request
        workload = Workload(batch or request.batch, request.context, request.overhead_us / 1e6)
        if self.ceilings:
            costs = predicted_costs(self.target, self.draft, workload, self.ceilings)
        else:
            costs = cpu_costs(*self.configs, workload, DTYPES[request.dtype])
        return make_plan(
            costs, acceptance or request.acceptance, workload, self.target, self.draft, self.ceilings, request.max_depth
        )

    def source(self) -> str:
        """The origin of the times, for the report."""
        if self.ceilings is None:
            return f"forwards of random weights timed on this CPU, {torch.get_num_threads()} threads"
        has = self.ceilings
        return (
            f"{has.source}: {has.bandwidth / 1e12:.2f} TB/s, {has.flops / 1e12:.0f} TFLOP/s, "
            f"{KERNELS_PER_LAYER} kernels a layer at {1e6 * has.kernel_seconds:.1f} us"
        )

    def report(self, plan: Plan) -> dict[str, Any]:
        """The request, the origin of its times, and the plan, for JSON."""
        asked = self.request._asdict()
        asked["acceptance"], asked["calibration"] = list(asked["acceptance"]), str(asked["calibration"] or "")
        return asked | {"ceilings": self.source()} | dataclasses.asdict(plan)

    def as_table(self, plan: Plan):
        """A `rich` table."""
        from rich.table import Table

        asked = self.request
        table = Table(title=f"{asked.target}, draft {asked.draft}, on {asked.device}", caption=self.source())
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

    def check_plot(self, path: pathlib.Path) -> None:
        """Refuse a plot that could not be drawn or written, before any work.

        Raises:
            ValueError: the device is the CPU, on which each batch would have to be timed; or `path` is in no folder,
                is one, or has a type that matplotlib does not write.
            ImportError: no matplotlib.
        """
        if self.ceilings is None:
            raise ValueError("plan: plot must be of a GPU, got the device cpu: every batch would have to be timed")
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("plan: plot needs the package matplotlib: pip install 'specdec-triton[bench]'")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"plan: plot must be a file in a folder that exists, got {path}")
        from matplotlib.backend_bases import FigureCanvasBase

        types = FigureCanvasBase.get_supported_filetypes()
        if path.suffix.removeprefix(".").lower() not in types:
            raise ValueError(f"plan: plot must end in one of {', '.join(f'.{kind}' for kind in types)}, got {path}")

    def plot(self, path: pathlib.Path) -> None:
        """Draw speedup against acceptance, a line for each batch, to a file of any type that matplotlib writes.

        Raises:
            ValueError, ImportError: as `check_plot`.
        """
        self.check_plot(path)
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        asked = self.request
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for batch in PLOT_BATCHES:
            speedups = [self.plan(batch, scaled(asked.acceptance, first)).speedup for first in PLOT_ACCEPTANCES]
            axes.plot(PLOT_ACCEPTANCES, speedups, label=f"batch {batch}")
        axes.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="plain decoding")
        axes.axvline(asked.acceptance[0], color="grey", linewidth=0.8, linestyle=":", label="given acceptance")
        axes.set_xlabel("acceptance of the likeliest draft token (probability)")
        axes.set_ylabel("speedup over plain decoding (ratio)")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_title("Predicted speedup of speculative over plain decoding", fontsize=11, loc="left", pad=30)
        pair = f"{asked.target}, draft {asked.draft}: {asked.device}, {asked.dtype}, {asked.context} tokens of context"
        origin = f"{pair}\nceilings: {self.ceilings.source}"
        axes.text(0, 1.02, origin, transform=axes.transAxes, fontsize=8, color="0.4")
        axes.legend()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
