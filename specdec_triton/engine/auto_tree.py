"""`tree="auto"` in a call: what its rounds cost here, and the controller that is told.

On a GPU costs are timed before the first round, once for each model and batch size: verification of some sizes and
drafts of some depths, as the rounds will run them. They write only to slots that the next round overwrites. On a CPU,
where a forward is dear, costs are learned from the rounds themselves, and only matrix products of single layers are
timed before: they tell how a forward grows with its rows.
"""

import itertools
import math
import time
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ..drafters import DraftContext, DraftSession
from ..drafters.early_exit import decoder_layers
from ..ops.rules import CHAIN_RULES
from ..tree import RANK_ACCEPTANCE, Topology
from ..tree_choice.controller import AdaptiveTree
from ..tree_choice.costs import CPU_PRIOR, Costs, OnlineCosts, measure_costs
from ..tree_choice.search import LADDER
from .stages import Stages

MOST_NODES = {"cuda": 64}
MOST_NODES_ELSEWHERE = 16
MOST_DEPTH = 16
DRAFT_DEPTHS = (1, 4)  # timed; a level more costs what the levels between them do

GROWTH_REPEATS = 3

# model -> (batch, drafter, ...) -> what was measured
_measured: WeakKeyDictionary = WeakKeyDictionary()
_growth: WeakKeyDictionary = WeakKeyDictionary()


def most_nodes(device: torch.device) -> int:
    """Nodes of the largest tree that may be chosen."""
    return MOST_NODES.get(device.type, MOST_NODES_ELSEWHERE)


def controller(
    context: DraftContext, session: DraftSession, stages: Stages, costs: Costs | None = None
) -> AdaptiveTree:
    """What chooses the trees of a call.

    Args:
        context: the call's sequences, after the prompt.
        session: the drafter's; `resizable`.
        stages: how the call runs its stages.
        costs: of its rounds, where they are given.
    """
    most = min(session.max_nodes, most_nodes(context.start.device))
    if costs is None and (context.fixed_shapes or context.start.device.type == "cuda"):  # whose clock says nothing
        costs = measured_costs(context, session, stages)
        most = min(most, costs.verify[-1][0])
    elif costs is None:
        share = session.level_cost
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
    """What a forward over N rows a sequence takes, of one over a single row: (N, ratio) pairs, from the model's linear
    layers, layer after layer so that none is in a cache. Timed once for each model and batch size."""
    known = _growth.setdefault(model, {})
    if (batch, most) not in known:
        try:
            _, layers = decoder_layers(model)
        except ValueError:  # no list of layers that is clearly the decoder's
            return CPU_PRIOR.verify
        layers = [[part for part in layer.modules() if type(part) is torch.nn.Linear] for layer in layers]
        if not all(layers):  # quantized, say
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


def measured_costs(context: DraftContext, session: DraftSession, stages: Stages) -> Costs:
    """Seconds of verifying and drafting, timed now or, for a call with as much room in its cache within a factor of
    two, before."""
    target, captured = context.target, stages.why_eager is None
    known = _measured.setdefault(target.model, {})
    call = (
        len(context.start), target.cache.capacity.bit_length(), target.cache.storage.dtype, context.start.device,
        context.impl, context.compiled, captured, type(session), session.level_cost, session.max_nodes,
    )  # fmt: skip
    if call in known:
        return known[call]
    # none of the graphs that the rounds will hold
    timing = Stages(context.start.device, stages.why_eager, max_shapes=math.inf)
    costs = _measure(context, session, timing)
    stages.why_eager = timing.why_eager
    if (timing.why_eager is None) == captured:  # else capturing was given up on the way
        known[call] = costs
    return costs


def _measure(context: DraftContext, session: DraftSession, stages: Stages) -> Costs:
    device = context.start.device
    context.target.cache.reserve(context.longest + session.max_nodes)

    def verify(num_nodes: int) -> None:
        tokens = context.root[:, None].expand(-1, num_nodes)

        def forward() -> torch.Tensor:
            return context.target.forward_chain(tokens, context.length)[:, -1].amax(-1)

        stages.run("time verify", num_nodes, forward)

    def draft(depth: int) -> None:
        stages.run("time draft", session.prepare(Topology.chain(depth)), session.draft)

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    measured, sizes = (), [*(size for size in LADDER if size < session.max_nodes), session.max_nodes]
    while not measured:
        try:
            measured = measure_costs(verify, sizes, synchronize)
        except torch.OutOfMemoryError:
            if len(sizes) == 1:
                raise
            sizes.pop()  # and no larger tree is chosen
    depths = [depth for depth in DRAFT_DEPTHS if depth <= session.max_depth]
    drafting = measure_costs(draft, depths, synchronize)
    stages.forget()
    return Costs(measured, drafting)
