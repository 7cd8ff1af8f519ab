"""`tree="auto"`: measures the costs of a call's rounds and creates the controller that chooses the trees.

On a GPU, costs are measured before the first round, once for each model and batch size: verification at several sizes
and drafts of several depths, run as in the rounds. The measurements write only to cache slots that the next round
overwrites. On a CPU, forwards are too slow to be run only for timing. Costs are learned from the rounds themselves, and
only the linear layers are timed in advance, which shows how the time of a forward grows with its rows.
"""

import itertools
import math
import time
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..drafters import DraftContext, DraftSession
from ..forward.copies import decoder_layers
from ..ops.rules import CHAIN_RULES
from ..tree import RANK_ACCEPTANCE, Topology
from ..tree_choice.controller import AdaptiveTree
from ..tree_choice.costs import CPU_PRIOR, Costs, OnlineCosts, measure_costs
from ..tree_choice.search import LADDER
from .graph_runner import GraphRunner

MOST_NODES = {"cuda": 64}
MOST_NODES_ELSEWHERE = 16
MOST_DEPTH = 16
DRAFT_DEPTHS = (1, 4)  # depths that are timed; the cost of a level is interpolated between them and extrapolated

GROWTH_REPEATS = 3

# model -> (batch, drafter, ...) -> measured costs
_measured: WeakKeyDictionary = WeakKeyDictionary()
_growth: WeakKeyDictionary = WeakKeyDictionary()


def most_nodes(device: torch.device) -> int:
    """Number of nodes of the largest tree that the controller may choose."""
    return MOST_NODES.get(device.type, MOST_NODES_ELSEWHERE)


def controller(
    context: DraftContext, session: DraftSession, graph_runner: GraphRunner, costs: Costs | None = None
) -> AdaptiveTree:
    """Create the controller that chooses the trees of a call.

    Args:
        context: the call's sequences, after the prompt.
        session: the session of a drafter that is `resizable`.
        graph_runner: the call's graph runner.
        costs: costs of the rounds; None if they are to be measured or learned.
    """
    most = min(session.max_nodes, most_nodes(context.start.device))
    # host times of single rounds are meaningless on a GPU, so costs are measured in advance
    if costs is None and (context.fixed_shapes or context.start.device.type == "cuda"):
        costs = cached_costs(context, session, graph_runner)
        most = min(most, costs.verify[-1][0])
    elif costs is None:
        share = session.level_cost_ratio
        growth = row_growth(context.target.model, len(context.start), most)
        costs = OnlineCosts(Costs(growth, ((1, share), (2, 2 * share)) if share else ()))
    return AdaptiveTree(
        costs,
        max_nodes=most,
        max_depth=min(session.max_depth, MOST_DEPTH),
        chain=session.chains_only or context.rule in CHAIN_RULES,
        max_rank=len(RANK_ACCEPTANCE),
        start=RANK_ACCEPTANCE,
    )


def row_growth(model: PreTrainedModel, batch: int, most: int) -> tuple[tuple[int, float], ...]:
    """Time of a forward over N rows per sequence, relative to a forward over a single row: (N, ratio) pairs.

    Only the linear layers are timed. Successive timings use different decoder layers, so that weights are not in the
    processor's cache. The result is cached for each model and batch size.
    """
    known = _growth.setdefault(model, {})
    if (batch, most) not in known:
        try:
            _, layers = decoder_layers(model, "row_growth")
        except ValueError:  # no unique list of decoder layers
            return CPU_PRIOR.verify
        layers = [[part for part in layer.modules() if type(part) is torch.nn.Linear] for layer in layers]
        if not all(layers):  # for example quantized
            return CPU_PRIOR.verify
        turns = itertools.cycle(layers)
        seconds = {size: [] for size in LADDER if size <= most}
        for size in [*seconds] * GROWTH_REPEATS:
            linears = next(turns)
            rows = [part.weight.new_ones(batch * size, part.in_features) for part in linears]
            begin = time.perf_counter()
            for part, row in zip(linears, rows, strict=True):
                torch.nn.functional.linear(row, part.weight)
            seconds[size].append(time.perf_counter() - begin)
        fastest = [min(times) for times in seconds.values()]
        growing = itertools.accumulate(fastest, max)
        known[batch, most] = tuple((size, best / fastest[0]) for size, best in zip(seconds, growing, strict=True))
    return known[batch, most]


def cached_costs(context: DraftContext, session: DraftSession, graph_runner: GraphRunner) -> Costs:
    """Measured seconds of verifying and drafting. They are reused for later calls with the same batch size, drafter and
    options whose key-value cache has the same capacity within a factor of two."""
    target, captured = context.target, graph_runner.why_eager is None
    known = _measured.setdefault(target.model, {})
    call = (
        len(context.start), target.cache.capacity.bit_length(), target.cache.storage.dtype, context.start.device,
        context.impl, context.compiled, context.fused, captured, type(session),
        session.level_cost_ratio, session.max_nodes,
    )  # fmt: skip
    if call in known:
        return known[call]
    # a separate runner, so that graphs captured for timing do not count among those of the rounds
    timing = GraphRunner(context.start.device, graph_runner.why_eager, max_shapes=math.inf)
    costs = _measure(context, session, timing)
    graph_runner.why_eager = timing.why_eager
    if (timing.why_eager is None) == captured:  # False if capturing failed during the measurement
        known[call] = costs
    return costs


def _measure(context: DraftContext, session: DraftSession, graph_runner: GraphRunner) -> Costs:
    device = context.start.device
    context.target.cache.reserve(context.longest + session.max_nodes)

    def verify(num_nodes: int) -> None:
        tokens = context.root[:, None].expand(-1, num_nodes)

        def forward() -> torch.Tensor:
            return context.target.forward_chain(tokens, context.length)[:, -1].amax(-1)

        graph_runner.run("time verify", num_nodes, forward)

    def draft(depth: int) -> None:
        graph_runner.run("time draft", session.prepare(Topology.chain(depth)), session.draft)

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    measured, sizes = (), [*(size for size in LADDER if size < session.max_nodes), session.max_nodes]
    while not measured:
        try:
            measured = measure_costs(verify, sizes, synchronize)
        except torch.OutOfMemoryError:
            if len(sizes) == 1:
                raise
            sizes.pop()  # larger trees are then never chosen
    depths = [depth for depth in DRAFT_DEPTHS if depth <= session.max_depth]
    drafting = measure_costs(draft, depths, synchronize)
    graph_runner.forget()
    return Costs(measured, drafting)
