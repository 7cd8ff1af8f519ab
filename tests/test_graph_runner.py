"""Captured rounds and late reports change only the time: the texts are those of plain `generate`. Graphs are kept while
they are used."""

from functools import partial

import pytest
import torch
import torch._dynamo

import specdec_triton as sdt
from families import FAMILIES, NEVER, build, prompt
from helpers import (
    DRAFTERS,
    TREES,
    HostDrafter,
    HostSession,
    capture_here,
    drafter_of,
    eos_in_mid_row,
    oracle,
    speculative,
)
from operation_trace import trace
from simulated_graph import CUDA, HostRead, SimulatedGraphs
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.engine import generate, graph_runner
from specdec_triton.engine.round import RoundSteps
from specdec_triton.forward import cache, checks, runner
from specdec_triton.forward.attention import call_with_tree_attention, config_ids
from specdec_triton.forward.runner import TreeRunner

OPTIONS = {"do_sample": False, "eos_token_id": NEVER, "max_new_tokens": 24}
QUICK_GRAPHS = [("llama", name) for name in ("tree", "lookup")]


@pytest.fixture(params=[0, 1], ids=["lag0", "lag1"])
def captured(request, monkeypatch):
    """Let functions be captured on a CPU, too, with reports read at once or late."""
    capture_here(monkeypatch, request.param)


@pytest.fixture
def captured_late(monkeypatch):
    capture_here(monkeypatch, 1)


@pytest.mark.parametrize(
    ("lag", "name"),
    [
        pytest.param(lag, name, marks=[] if (lag + place) % 2 else pytest.mark.slow)
        for lag in (0, 1)
        for place, name in enumerate(DRAFTERS)
    ],
)
def test_captured_rounds_give_the_same_text(monkeypatch, lag, name):
    capture_here(monkeypatch, lag)
    model, inputs = build("llama"), {**prompt(batch=3), **OPTIONS}
    inputs["eos_token_id"] = eos_in_mid_row(model, prompt(batch=3), **OPTIONS)
    plain = model.generate(**inputs)
    text, stats = speculative(model, drafter_of(name, plain), inputs)
    assert torch.equal(text, plain)
    assert stats.why_eager is None and stats.captured == 2 and stats.replayed > 5


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=pytest.mark.slow if place % 2 else []) for place, family in enumerate(FAMILIES)],
)
def test_every_family_is_captured(captured_late, family):
    model, inputs = build(family), {**prompt(), **OPTIONS}
    plain = model.generate(**inputs)
    text, stats = speculative(model, oracle(plain, tree=TREES["skipping"]), inputs)
    assert torch.equal(text, plain)
    assert stats.why_eager is None and stats.replayed > 5 and stats.lag == 1


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("coupled", "tree"),
        ("multi_round", "lookup"),
        *(pytest.param(rule, "tree", marks=pytest.mark.slow) for rule in ("traversal", "multi_round")),
        *(pytest.param(rule, "lookup", marks=pytest.mark.slow) for rule in ("coupled", "traversal")),
    ],
)
def test_captured_rounds_sample_the_same_text(captured_late, rule, name):
    model = build("llama")
    inputs = {**prompt(batch=3), **OPTIONS, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8}
    inputs["max_new_tokens"] = 18
    text, captured = speculative(model, drafter_of(name, None), inputs, rule=rule, seed=7, cuda_graphs=True)
    expected, stats = speculative(model, drafter_of(name, None), inputs, rule=rule, seed=7, cuda_graphs=False)
    deepest = 3  # tokens drafted after the end of the text count if the draft is not cut there
    assert torch.equal(text[:, :-deepest], expected[:, :-deepest]) and stats.why_eager == "cuda_graphs=False"
    assert captured.replayed > 5


def test_options_of_generate_keep_their_meaning(captured_late):
    """Penalties, kept scores and criteria work with captured rounds, which continue until the host has read the end."""
    model, inputs = build("llama"), {**prompt(batch=3), **OPTIONS}
    inputs |= {"repetition_penalty": 1.3, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}

    def third_stop(input_ids, scores, **kwargs):
        """A criterion that ends each row at the third of its tokens that is divisible by a number."""
        return (input_ids[:, 9:] % torch.tensor([[2], [3], [5]]) == 0).sum(1) >= 3

    inputs["stopping_criteria"] = [third_stop]
    plain = model.generate(**inputs)
    for name in ("none", "dynamic", "lookup", "oracle"):
        output, stats = speculative(model, drafter_of(name, plain.sequences), inputs)
        assert torch.equal(output.sequences, plain.sequences), name
        scores, expected = torch.stack(output.scores), torch.stack(plain.scores)
        assert torch.allclose(scores, expected, atol=1e-3), name
        emitted = (plain.sequences[:, 9:] != 0).sum()
        assert stats.emitted <= emitted + 3, name  # a row that emits token 0 counts it, too


def test_processors_of_the_host_keep_rounds_as_they_were(captured):
    model, inputs = build("llama"), {**prompt(), **OPTIONS}
    inputs["logits_processor"] = [lambda input_ids, scores: scores.roll(1, -1)]
    plain = model.generate(**inputs)
    text, stats = speculative(model, sdt.PromptLookupDrafter(), inputs)
    assert torch.equal(text, plain) and "on the host" in stats.why_eager and stats.lag == 0
    with pytest.raises(ValueError, match='cuda_graphs must be "auto" or False.*on the host'):
        speculative(model, sdt.PromptLookupDrafter(), inputs, cuda_graphs=True)


def test_drafts_of_the_host_are_verified_by_captured_rounds(captured, monkeypatch):
    monkeypatch.setattr(graph_runner, "MAX_SHAPES", 2)
    model, inputs = build("llama"), {**prompt(batch=3), **OPTIONS, "max_new_tokens": 60}
    plain = model.generate(**inputs)
    HostSession.observed = 0
    text, stats = speculative(model, HostDrafter(plain), inputs)
    assert torch.equal(text, plain) and HostSession.observed == stats.rounds
    assert stats.captured > 4 and stats.replayed > 4 and stats.lag == 0
    assert stats.seconds["capture"] > 0 < stats.seconds["replay"]


@pytest.mark.parametrize(
    "name", ["tree", "early", *(pytest.param(n, marks=pytest.mark.slow) for n in ("none", "dynamic"))]
)
def test_a_cache_that_grows_is_captured_anew(captured_late, name, monkeypatch):
    monkeypatch.setattr(generate, "FIRST_RESERVE", 4)
    monkeypatch.setattr(generate, "NODES_RESERVE", 4)
    monkeypatch.setattr(cache, "BUCKET", 16)
    model, inputs = build("llama"), {**prompt(), **OPTIONS, "max_new_tokens": 45}
    plain = model.generate(**inputs)
    text, stats = speculative(model, drafter_of(name, plain), inputs)
    assert torch.equal(text, plain) and stats.captured >= 4


class Failing(SimulatedGraphs):
    """Captures `good` functions; later captures fail."""

    good, error = 0, None

    def __init__(self):
        super().__init__()
        self.left = self.good

    def __call__(self, stage):
        self.left -= 1

        def fail():
            stage()
            if isinstance(self.error, HostRead):
                torch.zeros(1).cpu()
            raise self.error

        return super().__call__(fail if self.left < 0 else stage)


@pytest.mark.parametrize("name", ["dynamic", pytest.param("lookup", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("good", "error", "says"),
    [
        (0, RuntimeError("not permitted"), "capturing failed: not permitted"),
        (1, torch.OutOfMemoryError("4 GiB"), "out of memory"),
        (1, HostRead(), "capturing failed: cpu in a captured stage"),
    ],
    ids=["at once", "later", "host read"],
)
def test_where_capturing_fails_rounds_go_on(monkeypatch, name, good, error, says):
    capture_here(monkeypatch, 1, type("Failing", (Failing,), {"good": good, "error": error}))
    model, inputs = build("llama"), {**prompt(batch=3), **OPTIONS}
    plain = model.generate(**inputs)
    with pytest.warns(UserWarning, match=f"the remaining rounds run without CUDA graphs.*{says}"):
        text, stats = speculative(model, drafter_of(name, plain), inputs, cuda_graphs=True)
    assert torch.equal(text, plain) and says in stats.why_eager and stats.captured == good
    CUDA.assert_sound()
    graph_runner.CAPTURES["cpu"] = SimulatedGraphs
    text, stats = speculative(model, drafter_of(name, plain), inputs)
    assert torch.equal(text, plain) and stats.why_eager is None and stats.replayed > 5


def test_the_host_reads_the_report_of_the_round_before(monkeypatch):
    monkeypatch.setitem(graph_runner.LAG, "cpu", 1)
    sent, read = [], []
    put, take = graph_runner.Reports.put, graph_runner.Reports.take

    def put_one(self, report, kept, on_host):
        sent.append(on_host[0])
        put(self, report, kept, on_host)

    def take_one(self):
        rows, kept, on_host = take(self)
        read.append((on_host[0], sent[-1]))
        return rows, kept, on_host

    monkeypatch.setattr(graph_runner.Reports, "put", put_one)
    monkeypatch.setattr(graph_runner.Reports, "take", take_one)
    model, inputs = build("llama"), {**prompt(batch=3), **OPTIONS}
    plain = model.generate(**inputs)
    for name in DRAFTERS:
        sent.clear(), read.clear()
        text, stats = speculative(model, drafter_of(name, plain), inputs)
        assert torch.equal(text, plain)
        late = [number < newest for number, newest in read[1:]]  # the first report is that of the prompt
        assert all(late[:-1]) and len(late) >= stats.rounds - 1, name


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[] if (family, name) in QUICK_GRAPHS else pytest.mark.slow)
        for family in ("llama", "gpt_oss")
        for name in DRAFTERS
    ],
)
def test_rounds_are_one_graph(monkeypatch, family, name):
    """Two rounds run the same operations on the same addresses and read nothing on the host, which a CUDA graph
    requires."""
    monkeypatch.setitem(graph_runner.LAG, "cpu", 1)
    rounds = []

    def step(self, whole=generate.Generation.step):
        lines, _ = trace(lambda: whole(self))
        rounds.append(lines)

    monkeypatch.setattr(generate.Generation, "step", step)
    model, inputs = build(family), {**prompt(batch=3), **OPTIONS, "max_new_tokens": 20}
    plain = model.generate(**inputs)
    drafter = sdt.EarlyExitDrafter(1, num_tokens=3) if name == "early" else drafter_of(name, plain)
    text, stats = speculative(model, drafter, inputs)
    assert torch.equal(text, plain)
    assert len(rounds) == stats.rounds > 4
    for lines in rounds[2:]:
        assert len(lines) == len(rounds[1])
        assert not [both for both in zip(lines, rounds[1], strict=True) if repr(both[0]) != repr(both[1])][:1]


class Backend:
    """A torch.compile backend that counts graphs."""

    graphs = 0

    def __call__(self, module, examples):
        self.graphs += 1
        return module.forward


@pytest.mark.parametrize("stage", ["verify", pytest.param("draft", marks=pytest.mark.slow), "accept"])
def test_a_stage_compiles_to_one_graph(monkeypatch, stage):
    torch._dynamo.reset()
    monkeypatch.setitem(graph_runner.LAG, "cpu", 1)
    backend, compiled = Backend(), {}

    def through_compiler(method):
        def run(self, *arguments):
            if isinstance(self, RoundSteps) and not self.stats.rounds:
                return method(self, *arguments)  # the tree of the prompt has one node
            if method not in compiled:
                compiled[method] = torch.compile(method, backend=backend, fullgraph=True, dynamic=False)
            # compilers do not trace a context manager
            runner = self._forwards._runner if isinstance(self, LevelSession) else self
            runner = self.context.target if isinstance(self, RoundSteps) else runner
            return call_with_tree_attention(None, config_ids(runner.model), partial(compiled[method], self, *arguments))

        return run

    def routed_outside(impl, configs, call, all_keys, **arguments):
        if torch.compiler.is_compiling():
            return call(**arguments)
        return call_with_tree_attention(impl, configs, call, all_keys, **arguments)

    monkeypatch.setattr(runner, "call_with_tree_attention", routed_outside)

    if stage == "accept":
        for name in ("accept", "emit"):
            monkeypatch.setattr(RoundSteps, name, through_compiler(getattr(RoundSteps, name).__wrapped__))
    elif stage == "verify":
        monkeypatch.setattr(TreeRunner, "forward", through_compiler(TreeRunner.forward))
    else:
        monkeypatch.setattr(LevelSession, "draft", through_compiler(LevelSession.draft))
    layers = 2 if stage == "draft" else 1  # the draft model has one layer
    model, inputs = build("llama", num_hidden_layers=layers), {**prompt(batch=3), **OPTIONS, "max_new_tokens": 120}
    plain = model.generate(**inputs)
    drafter = drafter_of("tree", plain) if stage == "draft" else oracle(plain, 0.7, tree=TREES["wide"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        text, stats = speculative(model, drafter, inputs)
    assert torch.equal(text, plain) and stats.rounds >= 50
    assert backend.graphs == {"verify": 1, "draft": 1, "accept": 2}[stage]


@pytest.mark.slow
def test_models_run_compiled(captured_late, monkeypatch):
    torch._dynamo.reset()
    backend, compile_it = Backend(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_it(call, backend=backend, **options))
    model, inputs = build("llama", num_hidden_layers=1), {**prompt(batch=3), **OPTIONS}
    plain = model.generate(**inputs)
    for name in ("tree", "oracle"):
        text, stats = speculative(model, drafter_of(name, plain), inputs, compile=True)
        assert torch.equal(text, plain) and stats.accepted
    assert 2 <= backend.graphs <= 6
    assert "forward" not in vars(model)


def test_hazards_are_named(monkeypatch):
    capture_here(monkeypatch, 1)
    experts = build("mixtral", experts_implementation="eager")
    dynamic = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    hooked = build("llama")
    hooked.model.layers[0].register_forward_hook(lambda *args: None)
    for model, says in ((experts, "nonzero"), (dynamic, "dynamic rope"), (hooked, "hooks")):
        with pytest.raises(ValueError, match=f'patch: cuda_graphs must be "auto" or False.*{says}'):
            sdt.patch(model, cuda_graphs=True)
        with pytest.warns(UserWarning, match=f"without CUDA graphs.*{says}"):
            sdt.patch(model)
        inputs = {**prompt(), **OPTIONS, "max_new_tokens": 12}
        text = model.generate(**inputs, prompt_lookup_num_tokens=3)
        assert says in sdt.stats(model).why_eager
        sdt.unpatch(model)
        assert torch.equal(text, model.generate(**inputs))
        with pytest.warns(UserWarning, match=f"without CUDA graphs.*{says}"):
            sdt.patch(build("llama"), drafter=sdt.ModelDrafter(model))
        with pytest.raises(ValueError, match="rounds cannot be captured"):
            sdt.patch(build("llama"), drafter=sdt.ModelDrafter(model), cuda_graphs=True)


def test_grouped_experts_in_fp32_are_a_hazard_off_the_cpu():
    """torch 2.11 computes grouped_mm in fp32 on an H200 with a loop on the host, so capturing failed there."""
    for dtype, experts, says in (
        (torch.float32, "grouped_mm", "grouped_mm in fp32"),
        (torch.bfloat16, "grouped_mm", None),
        (torch.float32, "batched_mm", None),
    ):
        model = build("gpt_oss", experts_implementation=experts).to(dtype)
        assert checks.graph_hazard(model) is None
        found = checks.graph_hazard(model.to("meta"))
        assert found is None if says is None else says in found


def test_no_gpu_no_graphs():
    model = build("llama")
    with pytest.raises(ValueError, match="got True: tensors on cpu: CUDA graphs need a CUDA GPU"):
        sdt.patch(model, cuda_graphs=True)
    speculative(model, sdt.PromptLookupDrafter(), {**prompt(), **OPTIONS, "max_new_tokens": 4})
    assert "CUDA GPU" in sdt.stats(model).why_eager and sdt.stats(model).lag == 0
    assert graph_runner.LAG == {"cuda": 1}


def test_the_simulation_detects_errors():
    """In the simulation, a captured function that reads a value raises an error, and one that depends on Python state
    gives wrong results."""
    there, number = torch.zeros(2), [1.0]
    with pytest.raises(HostRead):
        SimulatedGraphs()(lambda: (there > 0).any().item())
    replay, result = SimulatedGraphs()(lambda: there.add_(number[0]).sum())
    assert there.tolist() == [0.0, 0.0]
    number[0] = 5.0
    replay(), replay()
    assert there.tolist() == [2.0, 2.0] and result == 4.0
    first, _ = trace(lambda: there + 1)
    assert first == trace(lambda: there + 1)[0] != trace(lambda: there.clone() + 1)[0]


def run(shapes, made):
    """For each of these rounds, True if it ran as a graph."""
    replayed = []
    for shape in shapes:
        before = made.replayed
        made.run("verify", shape, lambda: torch.ones(1).add_(1))
        replayed.append(made.replayed > before)
    return replayed


@pytest.fixture
def make_runner(captured_late):
    return partial(graph_runner.GraphRunner, torch.device("cpu"))


def test_the_shape_used_longest_ago_makes_room(make_runner):
    made = make_runner(max_shapes=3)
    assert sum(run([0, 1, 2] * 10, made)) == 27
    assert sum(run([3] * 100 + [1, 2] * 5, made)) == 99 + 10, "a fourth shape is captured, in place of the first"
    assert made.captured == 4
    assert run([0, 0, 0, 0], made) == [False, False, True, True], "one that had been evicted waits longer"


def test_shapes_that_evict_each_other_are_captured_ever_more_rarely(make_runner):
    made = make_runner(max_shapes=3)
    run([0, 1, 2, 3] * 100, made)
    assert made.captured <= 4 * 7


def test_graphs_of_a_measurement_are_all_kept(make_runner):
    made = make_runner(max_shapes=float("inf"))
    assert sum(run([*range(20)] * 5, made)) == 80 and made.captured == 20 and made.capture_seconds > 0


def test_forgetting_forgets_all(make_runner):
    made = make_runner(max_shapes=1)
    run([0, 0, 1, 1], made)
    made.forget()
    assert run([0, 0, 1], made) == [False, True, False] and isinstance(made._capture, SimulatedGraphs)
    CUDA.assert_sound()
