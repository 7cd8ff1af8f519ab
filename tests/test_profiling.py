"""Profiles of rounds: the record is complete, the engine is left as it was, and the floors are worked by hand."""

import json
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import specdec_triton as sdt
import tiny
from families import NEVER, build, prompt
from helpers import capture_here
from specdec_triton.engine.round import RoundSteps
from specdec_triton.tools import cli, host_sync, models, profiling
from specdec_triton.tools.plan import Workload, forward_seconds, make_plan, planned_shape, predicted_costs
from specdec_triton.tools.profiling import record_rounds
from specdec_triton.tools.roofline import Ceilings, efficiency_bytes, round_work, shape_of

CPU = torch.device("cpu")
TREE = sdt.Topology.from_widths((2, 2))


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def decode(model, drafter=None, tokens=12):
    ids = torch.arange(3, 9)[None]
    with sdt.patched(model, drafter=drafter or sdt.ModelDrafter(tiny.model(layers=1), tree=TREE)):
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, eos_token_id=None)


def test_every_round_is_recorded_stage_by_stage(model):
    plain = decode(model)
    before = dict(vars(RoundSteps))
    with profiling.record_rounds(CPU) as rounds:
        assert torch.equal(decode(model), plain)
    assert dict(vars(RoundSteps)) == before
    assert len(rounds) == sdt.stats(model).rounds
    for found in rounds:
        assert list(dict.fromkeys(name for name, _ in found.stages)) == list(profiling.STAGES)
        spent = sum(span.host_seconds for _, span in found.stages)
        assert 0 < spent <= found.whole.host_seconds and found.whole.events is None
    assert (rounds[0].nodes, rounds[0].depth, rounds[0].branches) == (7, 2, True)


def test_an_exception_leaves_the_engine_as_it_was(model, monkeypatch):
    before = dict(vars(RoundSteps))
    monkeypatch.setattr(sdt.DraftTree, "from_topology", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), profiling.record_rounds(CPU):
        decode(model)
    assert dict(vars(RoundSteps)) == before


def test_a_profile_counts_reads_and_writes_a_trace(model, tmp_path):
    trace = tmp_path / "trace.json"
    found = profiling.profile_rounds(lambda: decode(model), CPU, trace)
    assert found.host_reads == 1.0
    assert found.stages == list(profiling.STAGES)
    assert found.kernels is found.idle_share is found.joules is found.host_seconds is None
    assert len(found.stage_seconds("verify")) == len(found.steady) == len(found.rounds) - 2
    assert all(seconds > 0 for seconds in found.stage_seconds("verify") + found.round_seconds())
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {profiling.LABEL + stage for stage in (*profiling.STAGES, "whole")} <= names


def test_a_call_without_rounds_is_refused(model):
    ids = torch.arange(3, 9)[None]
    with pytest.raises(ValueError, match="profile_rounds: generate must run at least one speculative round, got none"):
        profiling.profile_rounds(lambda: model.generate(ids, max_new_tokens=2), CPU)
    with pytest.raises(ValueError, match="generate more than one token, since the prompt's forward emits the first"):
        profiling.profile_rounds(lambda: decode(model, tokens=1), CPU)


def test_the_union_of_intervals():
    assert profiling.covered([]) == 0
    assert profiling.covered([(4, 6), (0, 2), (1, 3), (1, 2)]) == 5


def test_rounds_on_a_gpu_are_told_from_its_events(monkeypatch):
    """Stand-ins for events that hold the time of their record, and a host that waits half of the time; no GPU."""

    class At:
        def __init__(self, milliseconds):
            self.at = milliseconds

        def elapsed_time(self, other):
            return other.at - self.at

    rounds = [
        profiling.Round(
            profiling.Span(begin=i, end=i + 0.5, events=(At(10 * i), At(10 * i + 8))),
            [("verify", profiling.Span(begin=i, end=i + 0.25, events=(At(10 * i), At(10 * i + 6))))],
            nodes=4,
            depth=2,
            mark=10.0 + 0.2 * i,  # the prompt's wait is no round's
        )
        for i in range(6)
    ]
    waits = host_sync.HostWaits(count=6, seconds=1.2)
    found = profiling.Profile(torch.device("cuda"), rounds, waits, 0)
    assert found.round_seconds() == [0.01] * 3
    assert found.stage_seconds("verify") == [0.006] * 4 and found.stage_seconds("verify", host=True) == [0.25] * 4
    assert found.host_seconds == pytest.approx(0.3) and found.wait_seconds == pytest.approx([0.2] * 3)
    assert (found.nodes, found.depth) == (4, 2)


def test_kernels_and_idle_time_are_of_the_steady_rounds():
    """A prompt, two rounds that compile and capture, four of two kernels and a copy each, a quarter of it idle."""
    wholes = [100.0, 300.0, 4.0, 4.0, 4.0, 4.0]  # microseconds
    rounds = [profiling.Round(profiling.Span(begin=0.0, end=whole / 1e6)) for whole in wholes]
    events, begin = [(0.0, 50.0, "prompt"), (60.0, 70.0, "eager round")], 460.0
    for number in range(4):
        at = begin + 4 * number
        events += [(at, at + 1, "verify"), (at + 1, at + 2, "accept"), (at + 3, at + 4, "Memcpy DtoH")]
    kernels, idle = profiling.kernels_and_idle_share(events, rounds)
    assert kernels == 2 and idle == pytest.approx(0.25)
    times = {name: (launches, seconds) for name, launches, seconds in profiling.kernel_times(events, rounds)}
    assert times == dict.fromkeys(("verify", "accept", "Memcpy DtoH"), (1.0, pytest.approx(1e-6)))


def test_the_hosts_waits_are_marked_round_by_round(model, monkeypatch):
    class Rising:
        count, asked = 0, 0

        @property
        def seconds(self):
            self.asked += 1
            return float(self.asked)

    monkeypatch.setattr(profiling, "time_host_waits", lambda: nullcontext(Rising()))
    found = profiling.profile_rounds(lambda: decode(model), CPU, count_reads=False)
    assert len(found.rounds) > 2 and set(found.wait_seconds) == {1.0}


def test_waits_for_the_gpu_are_timed_once_and_undone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (time.sleep(0.01), torch.ones(1).tolist()))
    before = [vars(torch.Tensor).get(name) for name in host_sync.WAITING_METHODS]
    slow = torch.cuda.synchronize
    with host_sync.time_host_waits() as waits:
        torch.ones(2).tolist()  # on the CPU: nothing to wait for
        assert waits.count == 0
        torch.cuda.synchronize()
        on_gpu = SimpleNamespace(is_cuda=True, tolist=list)
        with pytest.raises(TypeError):
            torch.Tensor.tolist(on_gpu)
    assert waits.count == 2 and waits.seconds >= 0.01
    assert torch.cuda.synchronize is slow
    assert [vars(torch.Tensor).get(name) for name in host_sync.WAITING_METHODS] == before


def test_the_floors_of_a_round_by_hand(model):
    """2 layers, hidden 64, 4 heads of 16 over 2 KV heads, feed-forward 128, fp32."""
    vocab = len(tiny.TOKENS)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    numbers = 2 * layer + 64 + vocab * 64
    shape = shape_of(model)
    assert (shape.weight_bytes, shape.weights, shape.kv * shape.itemsize) == (4 * numbers, numbers, 2 * 2 * 32 * 4)
    work = round_work(shape, batch=3, nodes=5, context=10, accepted=2, draft=shape, draft_forwards=4)
    assert work["verify"].nbytes == 4 * numbers + 3 * 15 * 512 + 15 * vocab * 4
    assert work["verify"].flops == 2 * 15 * numbers + 4 * 15 * 15 * 2 * 4 * 16
    assert work["accept"].nbytes == 15 * vocab * 4 and work["compact"].nbytes == 2 * 3 * 2 * 512
    assert work["draft"].nbytes == 4 * (4 * numbers + 3 * 11 * 512 + 3 * vocab * 4)
    assert round_work(shape, 1, 1, 10)["draft"].nbytes == 0
    assert efficiency_bytes(shape, 3, 10, shape, 4) == 5 * 4 * numbers + 30 * 512


def test_a_tied_head_is_read_with_its_embedding(model):
    tied = tiny.model()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert shape_of(tied) == shape_of(model)


def test_a_plan_counts_what_a_profile_counts(model):
    """Of the same forward: the config alone, as `plan` reads it, and the model, as `profile` does."""
    planned, shape = planned_shape(model.config, "").stored(32, 4), shape_of(model)
    assert planned == shape
    workload, ceilings = Workload(3, 10), Ceilings(1.0, float("inf"), 0.0, "a byte a second")
    seconds, _ = forward_seconds(planned, 5, workload, ceilings)
    assert seconds == round_work(shape, batch=3, nodes=5, context=10)["verify"].nbytes
    costs = predicted_costs(planned, planned, workload, ceilings)
    found = make_plan(costs, [0.9], workload, planned, planned, ceilings)
    assert found.eta * found.round_seconds == pytest.approx(efficiency_bytes(shape, 3, 10, shape, found.depth))


def test_captured_rounds_have_two_stages_and_the_hosts_look(monkeypatch):
    capture_here(monkeypatch, 1)
    model = build("llama")
    inputs = {**prompt(batch=2), "do_sample": False, "eos_token_id": NEVER, "max_new_tokens": 30}
    with record_rounds(model.device) as rounds:
        model.generate(**inputs, custom_generate=sdt.SpeculativeGenerate(drafter=sdt.EarlyExitDrafter(1, num_tokens=2)))
    last = rounds[-1]
    assert list(dict.fromkeys(name for name, _ in last.stages)) == ["draft", "verify", "emit"]
    assert last.nodes == 3 and last.whole.end >= last.stages[-1][1].end


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny.save(folder / name, layers=layers)) for name, layers in (("target", 2), ("draft", 1))]


def profiled(monkeypatch, capsys, target, *args, tokens=16):
    """The output of `specdec-triton profile`, and the options of the speculation that it ran."""
    monkeypatch.setattr(models, "default_device", lambda: CPU)
    seen, patched = [], sdt.patched
    monkeypatch.setattr(sdt, "patched", lambda model, **options: seen.append(options) or patched(model, **options))
    command = ["profile", "--model", target, "--prompt", "abab", "--max-new-tokens", str(tokens)]
    assert cli.main([*command, "--dtype", "float32", *args]) == 0
    return capsys.readouterr().out, seen[0]


def test_the_command_profiles_a_tree(folders, monkeypatch, capsys):
    target = folders[0]
    # the target as its own draft, so that some drafts are accepted
    out, options = profiled(monkeypatch, capsys, target, "--draft", target, "--tree", "6", "--batch", "2", "--json")
    found = json.loads(out)
    assert options["tree"] == 6 and found["batch"] == 2 and found["rule"] == "greedy"
    assert found["nodes"] == 6 and found["acceptance_length"] > 1.5
    # keys and values of 2 layers, 2 heads of 16, fp32, read and written for each accepted token of each row
    moved = 2 * 2 * (found["acceptance_length"] - 1) * (2 * 2 * 2 * 16 * 4)
    assert found["stages"]["compact"]["bytes"] == pytest.approx(moved, rel=1e-3)
    out, _ = profiled(monkeypatch, capsys, target, "--draft", target, "--tree", "chain:5", "--json")
    assert 1 < json.loads(out)["nodes"] <= 6 and json.loads(out)["stages"]["compact"]["bytes"] == 0


def test_the_command_profiles_sampling(folders, monkeypatch, capsys):
    sampling = ["--rule", "multi_round", "--temperature", "0.8", "--json"]
    out, options = profiled(monkeypatch, capsys, folders[0], "--draft", folders[1], "--tree", "5", *sampling)
    assert json.loads(out)["rule"] == "multi_round" and options["seed"] == 0
    _, options = profiled(monkeypatch, capsys, folders[0], *sampling, "--rule", "coupled", "--seed", "7")
    assert options == {"rule": "coupled", "seed": 7}


def test_the_command_profiles_early_exit_and_chosen_trees(folders, monkeypatch, capsys):
    target, early = folders[0], ("--assistant-early-exit", "1", "--json")
    out, _ = profiled(monkeypatch, capsys, target, *early, "--tree", "chain:2")
    found = json.loads(out)["stages"]["draft"]
    # two forwards of one layer: more than its weights twice, less than two of both layers
    half, whole = (2 * shape_of(tiny.model(layers=layers)).weight_bytes for layers in (1, 2))
    assert half < found["bytes"] < whole
    out, options = profiled(monkeypatch, capsys, target, *early, "--tree", "auto")
    assert options == {"tree": "auto"} and json.loads(out)["rounds"] > 0


def test_one_timed_round_has_no_spread(folders, monkeypatch, capsys):
    # random models of one layer more and one less agree on nothing
    args = folders[0], "--draft", folders[1], "--tree", "chain:2"
    out, _ = profiled(monkeypatch, capsys, *args, tokens=4)
    assert "rounds: 3\n" in out and "one round was timed, so there is no spread: raise --max-new-tokens" in out
    out, _ = profiled(monkeypatch, capsys, *args, tokens=12)
    assert "p20 to p80: " in out and "no spread" not in out


def test_the_command_refuses_more_early_layers_than_there_are(monkeypatch, capsys, folders):
    monkeypatch.setattr(models, "default_device", lambda: CPU)
    command = ["profile", "--model", folders[0], "--prompt", "abab", "--assistant-early-exit", "99"]
    assert cli.main(command) == 2
    assert "--assistant-early-exit must be below the model's 2 layers, got 99" in capsys.readouterr().err
