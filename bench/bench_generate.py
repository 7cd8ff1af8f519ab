"""Decoding end to end: ours against transformers' own, with and without speculation.

    python bench/bench_generate.py [--rehearse] [--cases NAME,NAME]

The target has the shape of Llama 3.1 8B (a tiny one on a CPU) and random weights, see `_models`. The oracle drafter
replays the target's text with errors at a set rate: its rows say "controlled acceptance", and its draft costs nothing.
Acceptance in a short text varies with the errors, so a few seeds are tried, and the one whose acceptance length
between the two texts below is nearest to the wanted one is kept. The draft model has a set error rate too; its cost is
real. So have the EAGLE head and the DFlash head, which have the shapes of published ones. They all err at the same
tokens. The EAGLE head's chain has the acceptance length of the draft model's. In its dynamic tree, and among the
likeliest nodes of the DFlash head, no other branch is right if the likeliest path errs.

One case replays a real pair: random weights of the pair's sizes, and a draft that is wrong at the tokens at which the
real one was. In a chain, acceptance depends on nothing else. The text takes the same number of flags from each of
several prompts; see `flags_of`.

The methods of a case take turns in one run (in reverse order in every second turn), each with a short and a long text.
"tokens_s" is of the difference between the two, and includes neither prompt nor set-up; "call_tokens_s" is of the whole
long call. The time of captures is left out. If rounds are captured, both calls must capture the same number of graphs
and replay them; otherwise the difference would include uncaptured rounds, and the row has failed. Ratios are medians
over turns. Before timing, a method's text must equal that of transformers' eager `generate`. In bf16 it may differ if
every token, teacher-forced, is within `GAP` of the target's largest logit.

A forward that is captured runs in one of three ways: with fused layers (the default on a GPU), compiled, or eager in
the graph. Rows of fused layers have "fuse" among their shapes. Other rows have layers as transformers runs them, since
they were measured with `fuse=False` or before there was this option.

"eta", the round efficiency, is a floor over the time of a round. The floor is the time to read the target's weights,
its keys and values, and the draft's weights once for each of its forwards, at the bandwidth measured here. The part of
a head that reads the target's hidden states runs once a round.
"""

import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from _common import Bench, first_line, named_cases, simulate_graphs
from _models import SHAPES, dflash_head, eagle_head, error_rate, prompts, spider, synthetic, wrong_after
from _rows import CONTROLLED, REPLAYED, RESULTS

import specdec_triton as sdt
from specdec_triton.engine.generate import WORTH_CAPTURING
from specdec_triton.heads.dflash import DFlashModel
from specdec_triton.heads.eagle import EagleModel
from specdec_triton.options import Options
from specdec_triton.tools import calibration, profiling
from specdec_triton.tools.host_sync import count_forwards
from specdec_triton.tools.roofline import efficiency_bytes, floor_seconds, shape_of
from specdec_triton.tree import DynamicTree, Topology

GAP = 1.0  # logits
SEEDS, NEAR = (
    5,
    0.05,
)  # of the oracle's errors; tolerance of an acceptance length, as a share of the wanted or replayed one
DRAFT_TOKENS = 5
DRAFT_ERRORS = 0.1
HEAD_TREE = DynamicTree(60, width=10, depth=6)
BLOCK_NODES = 64  # the likeliest ones of a DFlash head
LOOKUP = 10
PROFILED_TOKENS = 24  # under torch's profiler, which takes long to read
PROFILED_BATCH = 16  # prompts of larger batches take long
DEPTH = 7  # of the oracle's chains
PLAIN, ORACLE = "ours, plain", "ours, oracle"
EAGER, ASSISTED = "transformers eager", "transformers assisted"
BASELINES = (PLAIN, EAGER, ASSISTED)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and its draft: names in `SHAPES`, on a GPU and elsewhere.

    Attributes:
        trace: file of the recorded agreement that the draft replays; None: the draft errs on a share of the tokens.
    """

    large: tuple[str, str]
    tiny: tuple[str, str]
    trace: str | None = None


PAIRS = {
    "llama": Pair(("llama 8B", "llama 1B"), ("tiny", "tiny draft")),
    "qwen": Pair(
        ("qwen 1.5B", "qwen 0.5B"), ("tiny qwen", "tiny qwen draft"), "acceptance/qwen2.5-coder-agreement.json"
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Methods of decoding that take turns.

    Attributes:
        oracle: (N, acceptance length) pairs.
        options: of our methods.
        pair: a name in `PAIRS`.
        seconds: expected time of the case on an H100. If less time is left, the case is left for a later run.
    """

    name: str
    ways: tuple[str, ...]
    batch: int = 1
    context: int = 2048
    tokens: tuple[int, int] = (2 * WORTH_CAPTURING, 6 * WORTH_CAPTURING)  # both are long enough to be captured
    oracle: tuple[tuple[int, float], ...] = ()
    options: tuple[tuple[str, object], ...] = ()
    turns: int = 3
    repeats: bool = False
    pair: str = "llama"
    seconds: float = 0.0


GRAPHS = (("cuda_graphs", True),)
EAGER_ROUNDS = (("cuda_graphs", False),)
COMPILED = (*GRAPHS, ("compile", True))
FUSED, EAGER_LAYERS = (*GRAPHS, ("fuse", True)), (*GRAPHS, ("fuse", False))
DRAFTED, LOOKED_UP, THEIR_LOOKUP = "ours, draft model", "ours, prompt lookup", "transformers prompt lookup"
HEADED, HEADED_TREE = "ours, EAGLE head", "ours, EAGLE head, dynamic tree"
BLOCKS = "ours, DFlash head"
STATIC = "transformers static cache, compiled"
COUNTED = (ASSISTED, THEIR_LOOKUP)  # they emit several tokens a forward of the target
CASES = [
    Case(
        "drafts",
        (PLAIN, DRAFTED, HEADED, HEADED_TREE, BLOCKS, EAGER, ASSISTED),
        oracle=((64, 4.5),),
        options=GRAPHS,
        turns=2,
    ),
    Case("drafts", (PLAIN, DRAFTED), oracle=((64, 4.5),), options=EAGER_LAYERS, turns=2, seconds=25),
    Case(
        "replayed pair", (PLAIN, DRAFTED, ASSISTED), tokens=(32, 222), options=GRAPHS, turns=2, pair="qwen", seconds=40
    ),
    Case("batch of 16", (PLAIN,), 16, oracle=((8, 3.0),), options=GRAPHS, turns=2, seconds=50),
    Case(
        "acceptance",
        (PLAIN,),
        tokens=(2 * WORTH_CAPTURING, 14 * WORTH_CAPTURING),  # with 15 rounds the spread was 16%
        oracle=((32, 1.5), (32, 2.0), (32, 3.0), (32, 4.5)),
        options=GRAPHS,
        turns=2,
        seconds=40,
    ),
    Case("batch of 64", (PLAIN,), 64, tokens=(32, 64), oracle=((4, 3.0),), options=GRAPHS, turns=1, seconds=65),
    Case("compiled plain", (PLAIN,), options=COMPILED, turns=2, seconds=40),
    Case("compiled", (PLAIN,), oracle=((64, 4.5),), options=COMPILED, turns=2, seconds=100),
    Case("repetition", (PLAIN, LOOKED_UP, THEIR_LOOKUP), options=GRAPHS, repeats=True),
    Case("nodes", (PLAIN,), oracle=((4, 2.0), (8, 2.0), (32, 2.0), (64, 2.0)), options=GRAPHS),
    Case("without graphs", (PLAIN, DRAFTED), oracle=((64, 4.5),), options=EAGER_ROUNDS),
    Case("static cache", (EAGER, STATIC), turns=2),
]


def scaled(case: Case, batch: int, graphs: tuple = (), **sizes) -> Case:
    """The case at other sizes, with the options `graphs` in place of captured rounds, which a CPU does not have."""
    options = graphs if case.options == GRAPHS else case.options
    return dataclasses.replace(case, options=options, batch=min(case.batch, batch), **sizes)


SMALL = [
    scaled(case, 4, context=64, tokens=(4, 36))
    for case in CASES
    # a CPU captures nothing, and its layers are never fused by default
    if case.options not in (EAGER_ROUNDS, EAGER_LAYERS)
]
REHEARSED = [
    scaled(case, 2, EAGER_ROUNDS, context=12, tokens=(2, 10), turns=1)
    for case in CASES
    # these would repeat a part of "drafts"
    if case.name not in ("acceptance", "batch of 64", "nodes") and case.options not in (EAGER_ROUNDS, EAGER_LAYERS)
]
REHEARSED.append(
    Case("graphs", (PLAIN, DRAFTED, HEADED_TREE, BLOCKS), context=12, tokens=(28, 40), turns=1, options=FUSED)
)


def fuses(options: tuple[tuple[str, object], ...], device: torch.device) -> bool:
    """Whether our methods fuse layers under these options."""
    return Options(**dict(options)).fuses(device)


def shown_options(options: tuple[tuple[str, object], ...], device: torch.device) -> dict[str, object]:
    """The options for a row's shapes; see the module for "fuse"."""
    shown = {name: value for name, value in options if name != "fuse"}
    return shown | ({"fuse": True} if fuses(options, device) else {})


def check_fused(target, options: tuple[tuple[str, object], ...]) -> dict[str, object]:
    """The fused modules of the last call, and the reasons for the others, as fields of a row.

    Raises:
        RuntimeError: the options fuse layers, but the call did not; the row would be of another way than it says.
    """
    if not fuses(options, target.device):
        return {}
    stats = sdt.stats(target)
    if not stats.fused:
        raise RuntimeError(f"layers must be fused, got none: {stats.not_fused}")
    return {"fused": stats.fused, "not_fused": stats.not_fused}


class Replay(NamedTuple):
    """The text on which a draft replays a trace: it follows `context` tokens and has a short or long form."""

    trace: str
    context: int
    tokens: tuple[int, int]


def replay_of(case: Case | None) -> Replay | None:
    trace = None if case is None else PAIRS[case.pair].trace
    return trace and Replay(trace, case.context, case.tokens)


def flags_of(replay: Replay) -> list[int]:
    """For each token of the long text, whether the draft predicts it. The tokens after the short text, which are the
    measured ones, take the first flags of every prompt, the same number of each; the short text takes their last."""
    prompts = list(json.loads((RESULTS / replay.trace).read_text())["flags"].values())
    short, long = replay.tokens
    ends = [(long - short) * place // len(prompts) for place in range(len(prompts) + 1)]
    counted = [flag for flags, a, b in zip(prompts, ends, ends[1:], strict=False) for flag in flags[: b - a]]
    if len(counted) != long - short or short > len(counted):
        raise ValueError(f"{replay.trace} has too few flags for texts of {short} and {long} tokens")
    return counted[len(counted) - short :] + counted


def rounds_of(flags: list[int]) -> int:
    """Rounds of a chain of `DRAFT_TOKENS` over a text with these flags. The prompt's forward gives the first token."""
    at, rounds = 1, 0
    while at < len(flags):
        window = [*flags[at : at + DRAFT_TOKENS], 0]
        at, rounds = at + window.index(0) + 1, rounds + 1
    return rounds


def replayed_length(replay: Replay) -> float:
    """Acceptance length of a chain, between the short and the long text."""
    flags, (short, long) = flags_of(replay), replay.tokens
    return (long - short) / (rounds_of(flags) - rounds_of(flags[:short]))


def pair(large: bool, device: torch.device, case: Case | None = None):
    """The target and draft of a case; without a case, Llama's."""
    shapes = PAIRS["llama" if case is None else case.pair]
    return _made(shapes.large if large else shapes.tiny, large, device, replay_of(case))


@functools.lru_cache(maxsize=1)
def _made(names: tuple[str, str], large: bool, device: torch.device, replay: Replay | None):
    dtype, errors = torch.bfloat16 if large else torch.float32, DRAFT_ERRORS
    if replay is not None:
        vocab_size = SHAPES[names[0]]["vocab_size"]
        last = prompts(1, replay.context, vocab_size, torch.device("cpu"))[0, -1]
        errors = wrong_after(flags_of(replay), int(last), vocab_size)
    target, draft = synthetic(names[0], dtype, device), synthetic(names[1], dtype, device, errors)
    draft.generation_config.num_assistant_tokens = DRAFT_TOKENS
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return names[0], target, draft


def head_bytes(head: EagleModel | DFlashModel, forwards: int) -> float:
    """Bytes of the head's weights that a round of so many forwards reads."""
    once = sum(weight.nbytes for weight in head.fc.parameters())
    return once + forwards * (sum(weight.nbytes for weight in head.parameters()) - once)


def generate(target, input_ids: torch.Tensor, tokens: int, **options) -> torch.Tensor:
    mask = torch.ones_like(input_ids)
    return target.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, **options)


@dataclasses.dataclass
class Way:
    """One method of decoding.

    Attributes:
        call: a number of new tokens -> [B, T] int64.
        ours: it is our engine, which leaves `sdt.stats`.
        nodes: N, the root included.
        draft_bytes: bytes of weights that drafting reads in a round.
        draft_errors: the share of tokens after which the draft is wrong, if it is set.
        wanted: the acceptance length that the oracle aims at.
        calls: alternatives to `call`; the one nearest to `wanted` becomes `call`.
        inputs: for rows.
    """

    name: str
    call: Callable[[int], torch.Tensor] | None
    ours: bool = True
    nodes: int = 1
    draft_bytes: float = 0.0
    draft_errors: float | None = None
    wanted: float | None = None
    calls: tuple[Callable[[int], torch.Tensor], ...] = ()
    inputs: str = "synthetic"
    absent: str | None = None


_TEXTS: dict[tuple, torch.Tensor] = {}


class Setup:
    """Models, prompt and plain text, shared by the methods of a case.

    Attributes:
        replay: the text that the draft replays a trace on, or None.
        model: the target's name.
        target, draft: the models.
        run: `generate` of the target after the prompt.
        plain: [B, context + tokens] int64. transformers' greedy text, which every method must reproduce.
    """

    def __init__(self, case: Case, large: bool, device: torch.device):
        self.case, self.device, self.replay = case, device, replay_of(case)
        self.model, self.target, self.draft = pair(large, device, case)
        ids = prompts(case.batch, case.context, self.target.config.vocab_size, device, case.repeats)
        self.run = functools.partial(generate, self.target, ids)
        key = (case.pair, large, device, case.batch, case.context, case.tokens[1], case.repeats)
        if key not in _TEXTS:
            _TEXTS[key] = self.run(case.tokens[1])
        self.plain = _TEXTS[key]

    @functools.cached_property
    def head(self) -> EagleModel:
        """An EAGLE head for the target, which errs as the draft does."""
        return eagle_head(self.model, self.target, DRAFT_ERRORS)

    @functools.cached_property
    def blocks(self) -> DFlashModel:
        """A DFlash head for the target, which errs as the draft does."""
        return dflash_head(self.model, self.target, DRAFT_ERRORS)

    def way(self, name: str) -> Way:
        drafted = {"nodes": DRAFT_TOKENS + 1, "draft_bytes": DRAFT_TOKENS * shape_of(self.draft).weight_bytes}
        if self.replay:
            drafted |= {"inputs": REPLAYED}
        else:
            drafted |= {"inputs": CONTROLLED, "draft_errors": DRAFT_ERRORS}
        if name == PLAIN:
            return self.ours(name, None)
        if name == DRAFTED:
            return self.ours(name, sdt.ModelDrafter(self.draft, num_tokens=DRAFT_TOKENS), **drafted)
        if name in (HEADED, HEADED_TREE):
            tree = HEAD_TREE if name == HEADED_TREE else Topology.chain(DRAFT_TOKENS)
            drafted |= {"nodes": tree.num_nodes, "draft_bytes": head_bytes(self.head, tree.max_depth)}
            return self.ours(name, sdt.EagleDrafter(self.head, tree=tree), **drafted)
        if name == BLOCKS:
            drafted |= {"nodes": BLOCK_NODES, "draft_bytes": head_bytes(self.blocks, 1)}
            return self.ours(name, sdt.DFlashDrafter(self.blocks, tree=BLOCK_NODES), **drafted)
        if name == LOOKED_UP:
            return self.ours(name, sdt.PromptLookupDrafter(LOOKUP), nodes=LOOKUP + 1)
        if name == EAGER:
            return Way(name, self.run, False)
        if name == ASSISTED:
            return Way(name, functools.partial(self.run, assistant_model=self.draft), False, **drafted)
        if name == THEIR_LOOKUP:
            return Way(name, functools.partial(self.run, prompt_lookup_num_tokens=LOOKUP), False, LOOKUP + 1)
        absent = None if self.device.type == "cuda" else "compiled on a GPU only"
        return Way(name, functools.partial(self.run, cache_implementation="static"), False, absent=absent)

    def oracle(self, nodes: int, wanted: float) -> Way:
        known = {"nodes": nodes, "wanted": wanted, "inputs": CONTROLLED}
        topology = spider(nodes, min(DEPTH, nodes - 1))
        rate = error_rate(topology, wanted)
        if rate is None:
            return Way(ORACLE, None, **known, absent=f"{nodes} nodes cannot accept so many")
        drafters = [sdt.OracleDrafter(self.plain, rate, tree=topology, seed=seed) for seed in range(SEEDS)]
        first, *others = (self.ours(ORACLE, drafter, **known) for drafter in drafters)
        return dataclasses.replace(first, calls=tuple(way.call for way in others))

    def ours(self, name: str, drafter: sdt.Drafter | None, **fields) -> Way:
        """Decoding with our engine; absent if an option is refused."""
        options = dict(self.case.options)
        if options.get("compile") and self.device.type != "cuda":
            return Way(name, None, absent="compiled on a GPU only", **fields)
        try:
            custom = sdt.SpeculativeGenerate(drafter=drafter, **options)
        except ValueError as refusal:
            return Way(name, None, absent=first_line(refusal), **fields)
        return Way(name, functools.partial(self.run, custom_generate=custom), **fields)


def check(target, text: torch.Tensor, plain: torch.Tensor, context: int) -> dict:
    """The differences of a text from the plain one, as fields of a row.

    Raises:
        AssertionError: the differences are larger than rounding errors.
    """
    assert text.shape == plain.shape, f"{list(text.shape)} tokens, plain has {list(plain.shape)}"
    flipped = (text != plain).any(1)
    if not flipped.any():
        return {"identical": True}
    worst = 0.0
    for row in text[flipped]:
        with torch.no_grad():
            logits = target(row[None], logits_to_keep=len(row) - context + 1).logits[0, :-1].float()
        gaps = logits.amax(-1) - logits.gather(1, row[context:, None]).squeeze(1)
        worst = max(worst, gaps.max().item())
    assert target.dtype != torch.float32, "the text is not that of transformers' generate"
    assert worst <= GAP, f"a token is {worst:.3f} logits below the target's choice"
    return {"identical": False, "flipped_rows": int(flipped.sum()), "worst_gap": round(worst, 4)}


class Call(NamedTuple):
    """The time of one call, and its graphs."""

    seconds: float  # without captures
    captured: int
    replayed: int


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds from an idle device until all work of a call is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def clocked(way: Way, tokens: int, target, device: torch.device) -> Call:
    """Time one call that begins on an idle device."""
    seconds = elapsed(functools.partial(way.call, tokens), device)
    if not way.ours:
        return Call(seconds, 0, 0)
    stats = sdt.stats(target)
    return Call(seconds - stats.seconds.get("capture", 0.0), stats.captured, stats.replayed)


def check_graphs(case: Case, turns: list[tuple[Call, Call]]) -> None:
    """Check that short and long calls differ by replayed rounds alone.

    Raises:
        RuntimeError: they differ in captures, or one did not replay.
    """
    for short, long in turns:
        if not 0 < short.replayed < long.replayed or short.captured != long.captured:
            raise RuntimeError(
                f"calls of {case.tokens[0]} and {case.tokens[1]} tokens must capture the same number of graphs and "
                f"replay them, got {short.captured} and {long.captured} captured, {short.replayed} and "
                f"{long.replayed} replayed"
            )


def measure(bench: Bench, case: Case) -> None:
    device, large = bench.device, bench.size == "gpu"
    setup = Setup(case, large, device)
    target = setup.target
    ways = [*map(setup.way, case.ways), *(setup.oracle(*oracle) for oracle in case.oracle)]
    found, times = [{} for _ in ways], [[] for _ in ways]
    for way, row in zip(ways, found, strict=True):
        bench.check_time()
        if way.absent is None:
            with bench.guarded(row):
                verify(bench, way, row, setup)
        else:
            row["absent"] = way.absent
    ready = [place for place, row in enumerate(found) if "identical" in row]
    for place in calibration.in_turn(ready, case.turns):
        bench.check_time()
        times[place].append(tuple(clocked(ways[place], tokens, target, device) for tokens in case.tokens))
        if ways[place].ours:
            found[place]["seconds"] = {name: round(spent, 5) for name, spent in sdt.stats(target).seconds.items()}
    if dict(case.options).get("cuda_graphs"):
        for place in [place for place in ready if ways[place].ours]:
            with bench.guarded(found[place]):
                check_graphs(case, times[place])
        ready = [place for place in ready if "failed" not in found[place]]
    rates = {
        place: [case.batch * new_tokens(case) / max(b.seconds - a.seconds, 1e-9) for a, b in times[place]]
        for place in ready
    }
    for place, (way, row) in enumerate(zip(ways, found, strict=True)):
        if place in ready:
            row |= summary(bench, setup, way, row["rounds"], times[place], rates[place])
            row["ratio"] = {
                ways[other].name: round(
                    statistics.median(a / b for a, b in zip(rates[place], rates[other], strict=True)), 3
                )
                for other in ready
                if ways[other].name in BASELINES and other != place
            }
        shapes = {"case": case.name, "model": setup.model, "B": case.batch, "context": case.context, "N": way.nodes}
        shapes |= {
            "tau": way.wanted,
            "repeats": case.repeats,
            **(shown_options(case.options, device) if way.ours else {}),
        }
        bench.add(way.name, shapes, "bf16" if large else "fp32", row, way.inputs)


def new_tokens(case: Case) -> int:
    return case.tokens[1] - case.tokens[0]


class Tried(NamedTuple):
    """The long text of a method, and rounds and acceptance length between its short and long texts."""

    text: torch.Tensor
    rounds: int
    acceptance_length: float


def verify(bench: Bench, way: Way, row: dict, setup: Setup) -> None:
    """Warm up, and compare the text with plain's; a refused method is absent. An oracle keeps the first errors whose
    acceptance length is within `NEAR` of the wanted one, or else the nearest."""
    tried = {}
    try:
        for call in (way.call, *way.calls):
            found = tried[call] = try_out(bench, dataclasses.replace(way, call=call), setup)
            if way.wanted is None or abs(found.acceptance_length / way.wanted - 1) <= NEAR:
                break
    except ValueError as refusal:
        row["absent"] = first_line(refusal)
        return
    if way.wanted is not None:
        way.call = min(tried, key=lambda call: abs(tried[call].acceptance_length / way.wanted - 1))
    if way.ours:
        row |= check_fused(setup.target, setup.case.options)
    row |= check(setup.target, tried[way.call].text, setup.plain, setup.case.context)
    row["rounds"] = tried[way.call].rounds
    row["acceptance_length"] = round(tried[way.call].acceptance_length, 3)
    if way.inputs == REPLAYED:
        row["replayed_length"] = length = round(replayed_length(setup.replay), 3)
        # transformers' rounds begin one token earlier, since it drafts the first token too
        near = not way.ours or abs(row["acceptance_length"] / length - 1) <= NEAR
        assert near, f"acceptance length {row['acceptance_length']}, the trace's is {length}"


def try_out(bench: Bench, way: Way, setup: Setup) -> Tried:
    target, case = setup.target, setup.case
    rounds, row_rounds, accepted = [], [], []
    for tokens in case.tokens:
        bench.check_time()
        with count_forwards(target) if way.name in COUNTED else contextlib.nullcontext() as forwards:
            text = way.call(tokens)
        if way.ours:
            stats = sdt.stats(target)
            rounds.append(stats.rounds), row_rounds.append(stats.row_rounds), accepted.append(stats.accepted)
        else:
            rounds.append(len(forwards) if way.name in COUNTED else tokens)
    between = rounds[1] - rounds[0]
    if not way.ours:
        return Tried(text, between, new_tokens(case) / max(between, 1))
    row_rounds = row_rounds[1] - row_rounds[0]
    return Tried(text, between, (accepted[1] - accepted[0] + row_rounds) / max(row_rounds, 1))


def summary(bench: Bench, setup: Setup, way: Way, rounds: int, times: list, rates: list[float]) -> dict:
    """The row of a timed method; on a GPU its rounds are profiled too."""
    case, target = setup.case, setup.target
    found = {"turns": case.turns, "new_tokens": new_tokens(case)}
    if way.draft_errors is not None:
        found["draft_errors"] = way.draft_errors
    for name, rate in zip(("p20", "p50", "p80"), calibration.quantiles(rates), strict=True):
        found[f"{name}_tokens_s"] = round(rate, 2)
    found["call_tokens_s"] = round(
        statistics.median(case.batch * case.tokens[1] / long.seconds for _, long in times), 2
    )
    round_seconds = case.batch * new_tokens(case) / statistics.median(rates) / max(rounds, 1)
    context = case.context + sum(case.tokens) / 2
    nbytes = efficiency_bytes(shape_of(target), case.batch, context) + way.draft_bytes
    found["round_ms"] = round(1e3 * round_seconds, 4)
    found["eta"] = round(floor_seconds(bench.ceilings, nbytes) / round_seconds, 4)
    if way.ours and bench.device.type == "cuda" and case.batch <= PROFILED_BATCH:
        long = case.tokens[1]
        calls = [functools.partial(way.call, tokens) for tokens in (long, min(PROFILED_TOKENS, long))]
        seen = profiling.profile_rounds(calls[0], bench.device, count_reads=False, shorter=calls[1])
        found |= {"host_us": round(1e6 * seen.host_seconds, 1), "idle_share": seen.idle_share, "kernels": seen.kernels}
        found["joules_per_token"] = None if seen.joules is None else seen.joules / case.batch / case.tokens[1]
    return found


def main() -> int:
    bench = Bench("generate", __doc__, named_cases)
    simulate_graphs(bench)
    return bench.run(measure, CASES, SMALL, REHEARSED, bench.options.cases)


if __name__ == "__main__":
    sys.exit(main())
