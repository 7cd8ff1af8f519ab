"""The benches: wrong outputs get no time, absent providers are rows, and interrupted runs continue."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import _common
import bench_accept
import bench_draft
import bench_layers
import pytest
import torch
from _common import Bench, Provider

from bench_helpers import CEILINGS, bench, rows
from bench_helpers import quick as quick
from specdec_triton import ops
from specdec_triton.tools import calibration, cli, provenance, roofline

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("quick")


def test_a_wrong_kernel_has_no_time(tmp_path, monkeypatch):
    right = ops.accept_greedy

    def spoiled(*args, impl, **kwargs):
        accepted = right(*args, impl=impl, **kwargs)
        if impl == "triton":
            accepted.next_ids.add_(1)
        return accepted

    monkeypatch.setattr(ops, "accept_greedy", spoiled)
    run = bench(tmp_path)
    assert run.run(bench_accept.measure, [], [], [(1, 3, 70)]) == 1
    (spoiled_row,) = rows(tmp_path, provider="triton", dtype="fp32")
    assert spoiled_row["wrong"].startswith("path, length or next_ids differ")
    assert "p50_us" not in spoiled_row and "untimed" not in spoiled_row
    (honest,) = rows(tmp_path, provider="reference", dtype="fp32")
    assert honest["p50_us"] > 0 and "wrong" not in honest


def test_a_kernel_in_the_interpreter_is_checked_and_not_timed(tmp_path):
    assert bench(tmp_path).run(bench_accept.measure, [], [], [(1, 3, 70)]) == 0
    for row in rows(tmp_path, provider="triton"):
        assert ("p50_us" in row) == torch.cuda.is_available() and row["device"] and row["commit"]


@pytest.mark.parametrize("spoiled", ["tokens", "log_probs"])
def test_a_wrong_draft_level_has_no_time(tmp_path, monkeypatch, spoiled):
    right = ops.draft_topk

    def wrong(*args, impl, **kwargs):
        found = right(*args, impl="reference", **kwargs)
        if impl == "triton":
            getattr(found, spoiled)[0, -1, -1] += 1
        return found

    monkeypatch.setattr(ops, "draft_topk", wrong)
    cases = [(1, 2, 2, 70, kind) for kind in bench_draft.DYNAMIC]
    assert bench(tmp_path, name="draft").run(bench_draft.measure, [], [], cases) == 1
    found = rows(tmp_path, bench="draft", provider="triton")
    what = {"tokens": "candidates", "log_probs": "log-probabilities"}[spoiled]
    assert [row["wrong"] for row in found] == [f"the {what} differ from the reference's"] * 3
    assert not any("p50_us" in row or "untimed" in row for row in found)
    honest = rows(tmp_path, bench="draft", provider="reference")
    assert len(honest) == 3 and all(row["p50_us"] > 0 for row in honest)


@pytest.mark.parametrize("kind", ["DFlash block", "DFlash tree"])
def test_a_wrong_draft_of_a_head_has_no_time(tmp_path, monkeypatch, kind):
    """The root is one row late in the block."""
    case, folders = bench_draft.HeadCase(kind, 2, 12), [tmp_path / "right", tmp_path / "wrong"]
    run = bench_draft.DFlashMarginals._run

    def shifted(source, tokens, first, **more):
        return run(source, tokens, first, **more | {"inputs_embeds": more["inputs_embeds"].roll(1, 1)})

    assert bench(folders[0], name="draft").run(bench_draft.measure, [], [], [case]) == 0
    monkeypatch.setattr(bench_draft.DFlashMarginals, "_run", shifted)
    assert bench(folders[1], name="draft").run(bench_draft.measure, [], [], [case]) == 1
    (right,) = rows(folders[0], bench="draft", provider="reference")
    wrong = rows(folders[1], bench="draft")
    assert right["p50_us"] > 0 and len(wrong) == 2
    assert all("follow" in row["wrong"] and "p50_us" not in row for row in wrong)


def test_a_reduced_vocabulary_is_a_share_of_the_whole_one():
    (scattered,) = [case for case in bench_draft.CASES if isinstance(case, tuple) and case[-1] == "scattered"]
    assert scattered == (1, 10, 10, 128256, "scattered")
    assert (1, 10, 10, 32000, "dynamic") in bench_draft.CASES  # the scattered case is compared with it
    inputs = bench_draft.make_inputs(*scattered, torch.device("cpu"))
    ids, logits = inputs["ids"], inputs["logits"]
    assert logits.shape == (1, 10, 32000) and len(ids.unique()) == 32000 and ids.max() < 128256
    found = bench_draft.candidates(inputs, "reference")
    # ties go to the lower id, and `ids` ascend
    kept = bench_draft.candidates(inputs | {"ids": None}, "reference")
    assert torch.equal(found.tokens, ids[kept.tokens])
    torch.testing.assert_close(found.log_probs, kept.log_probs)
    reduced = bench_draft.make_inputs(*scattered[:-1], "reduced", torch.device("cpu"))
    assert reduced["logits"].shape == (1, 10, 128256) and reduced["ids"] is None
    assert (reduced["logits"].isfinite().sum(-1) == 32000).all()


@pytest.mark.parametrize("kind", bench_layers.KINDS)
def test_fused_ops_are_verified_and_timed_against_transformers_code(tmp_path, kind):
    run = bench(tmp_path, name="layers")
    assert run.run(bench_layers.measure, [], [], [(kind, "tiny", 3)]) == 0
    found = {row["provider"]: row for row in rows(tmp_path, bench="layers")}
    # 3 rows of 256 columns; 8 + 4 + 4 heads of 32, cos and sin, and slots of 8 bytes
    nbytes = {"rms_norm": 13 * 512, "rms_norm, no residual": 7 * 512, "rotary_and_cache": 6552}
    for provider in ("eager", "triton" if torch.cuda.is_available() else "reference"):
        assert found[provider]["p50_us"] > 0 and found[provider]["bytes"] == nbytes.get(kind, 9 * 512)
        assert found[provider]["of_ceiling"] > 0
    if not torch.cuda.is_available():
        assert "untimed" in found["triton"] and found["liger"]["absent"]
    assert "torch.compile of eager" not in found


@pytest.mark.parametrize(
    ("kind", "output"), [(name, place) for name, op in bench_layers.KINDS.items() for place in range(len(op.ulps))]
)
def test_a_wrong_fused_op_has_no_time(tmp_path, monkeypatch, kind, output):
    """One element of one output is one unit in the last place more from the reference's than the op promises. For the
    rotation, outputs 1 and 2 are the cache: the element belongs to a token that the op does not write."""
    op, too_far = kind.partition(",")[0], bench_layers.KINDS[kind].ulps[output] + 1
    right = getattr(ops, op)

    def spoiled(*args, impl, **kwargs):
        found = right(*args, impl="reference", **kwargs)
        if impl == "triton":
            outputs = {"rotary_and_cache": (found, kwargs.get("keys"), kwargs.get("values"))}.get(op, found)
            bits = (outputs if isinstance(outputs, tuple) else (outputs,))[output].view(torch.int16)
            bits[(0, *[-1] * (bits.dim() - 1))] += too_far
        return found

    monkeypatch.setattr(ops, op, spoiled)
    assert bench(tmp_path, name="layers").run(bench_layers.measure, [], [], [(kind, "tiny", 3)]) == 1
    (wrong,) = rows(tmp_path, provider="triton")
    assert wrong["wrong"] == f"output {output} is {too_far} units in the last place from the reference's"
    assert "p50_us" not in wrong and "untimed" not in wrong
    (honest,) = rows(tmp_path, provider="eager")
    assert honest["p50_us"] > 0


@pytest.mark.parametrize("kind", bench_layers.KINDS)
def test_peers_may_round_elsewhere_and_no_more(kind):
    """fp32 inside, rounded once at the end, as compilers do, passes; another formula or NaN does not."""
    torch.manual_seed(0)
    op = bench_layers.KINDS[kind](bench_layers.SHAPES["tiny"], 3, torch.device("cpu"))
    sets = op.make_sets(2)

    def precise(inputs):
        found = op.ours(bench_layers.copied(inputs, torch.float32), "reference")
        return tuple(output.to(bench_layers.DTYPE) for output in found)

    bench_layers.check_error(op, sets, precise)
    bench_layers.check_error(op, sets, op.eager)
    for spoil in (lambda output: output * (1 + 2**-5), lambda output: output * float("nan")):
        with pytest.raises(AssertionError, match="output 0 has an error of"):
            bench_layers.check_error(op, sets, lambda inputs, spoil=spoil: tuple(map(spoil, precise(inputs))))


def test_units_in_the_last_place_are_counted_across_zero():
    apart, numbers = bench_layers.ulps_apart, torch.tensor([0.0, -0.0, 1.0, -1.0]).bfloat16()
    larger = (numbers.view(torch.int16) + torch.tensor([1, 1, 3, 3], dtype=torch.int16)).view(torch.bfloat16)
    assert apart(numbers, larger) == apart(larger, numbers) == 3
    assert apart(larger[:1], larger[1:2]) == 2 and apart(numbers[:1], numbers[1:2]) == 0
    assert apart(numbers, torch.full_like(numbers, float("nan"))) > 1000


def measure_three(run, case):
    def check(call):
        call(None)

    for provider in (
        Provider("good", lambda _: None),
        Provider("bad", lambda _: 1 // 0),
        Provider("gone", None, absent="not installed"),
    ):
        run.measure(provider, {"case": case}, "fp32", [None], check, nbytes=2e10)


def test_failures_and_absences_are_rows_and_stop_nothing(tmp_path):
    run = bench(tmp_path)
    assert run.run(measure_three, [], [], [1, 2]) == 1
    assert [row["failed"] for row in rows(tmp_path, provider="bad")] == ["ZeroDivisionError: " + ZERO] * 2
    assert [row["absent"] for row in rows(tmp_path, provider="gone")] == ["not installed"] * 2
    (row, _) = rows(tmp_path, provider="good")
    assert row["floor_us"] == 1e6 and row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    with pytest.raises(SystemExit) as stopped:
        bench(tmp_path)
    assert stopped.value.code == 1  # complete, with faults


ZERO = "integer division or modulo by zero"


def test_inputs_that_cannot_be_made_are_a_row_too(tmp_path):
    def measure(run, case):
        raise MemoryError("no room")

    assert bench(tmp_path).run(measure, [], [], ["large"]) == 1
    assert [row["failed"] for row in rows(tmp_path, provider="inputs")] == ["MemoryError: no room"]


def test_a_run_goes_on_where_it_stopped(tmp_path):
    measured = []

    def measure(run, case):
        measured.append(case)
        run.add("one", {"case": case}, "fp32", {"p50_us": len(measured)})
        if case == 2:
            run.options.budget = 0

    first = bench(tmp_path)
    assert first.run(measure, [], [], [1, 2, 3]) == 0
    assert measured == [1, 2] and first.state["left"] == 1 and not first.state["complete"]
    second = bench(tmp_path)
    second.run(measure, [], [], [1, 2, 3])
    assert measured == [1, 2, 3] and second.state["complete"]
    assert [row["p50_us"] for row in rows(tmp_path)] == [1, 2, 3]
    with pytest.raises(SystemExit) as stopped:
        bench(tmp_path)
    assert stopped.value.code == 0
    assert bench(tmp_path, name="other").state["done"] == []


def test_a_bench_that_is_stopped_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(_common.os, "_exit", sys.exit)

    def measure(run, case):
        run.add("one", {"case": case}, "fp32", {"p50_us": 1})
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        bench(tmp_path).run(measure, [], [], [1, 2])
    assert stopped.value.code == _common.TERMINATED
    assert len(rows(tmp_path)) == 1 and bench(tmp_path).state["done"] == []


def test_a_budget_ends_inside_a_case(tmp_path):
    """A case may take long, since it has many providers; the rest of it is left for a later run."""
    seen = []

    def measure(run, case):
        for name in ("one", "two", "three"):
            if name == "three" and not again:
                run.options.budget = -1.0
            run.measure(Provider(name, seen.append), {"case": case}, "fp32", [name], lambda call: None)

    again = False
    run = bench(tmp_path)
    assert run.run(measure, [], [], [1, 2]) == 0
    assert set(seen) == {"one", "two"} and run.state["done"] == [] and run.state["left"] == 2
    again = True
    later = bench(tmp_path)
    assert later.run(measure, [], [], [1, 2]) == 0 and later.state["complete"] and "three" in seen


def test_providers_that_compile_are_measured_in_a_separate_run(tmp_path):
    def measure(run, case):
        for name, compiles in (("ours", False), ("peer", True)):
            provider = Provider(name, lambda _: None, compiles=compiles)
            run.measure(provider, {"case": case}, "fp32", [None], lambda call: None)

    bench(tmp_path).run(measure, [], [], [1])
    assert [row["provider"] for row in rows(tmp_path)] == ["ours"]
    run = bench(tmp_path, "--compiled")
    run.run(measure, [], [], [1])
    assert [row["provider"] for row in rows(tmp_path)] == ["ours", "peer"]
    assert {row["bench"] for row in rows(tmp_path)} == {"accept"} and list(run.results.steps) == [
        "accept", "accept compiled",
    ]  # fmt: skip


def test_a_case_that_hangs_ends_the_process_and_the_next_one_goes_on(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(_common, "HANGS", 0.05)
    monkeypatch.setattr(_common.os, "_exit", lambda status: ended.append(status))
    run = bench(tmp_path, "--budget", "0.01")
    run.options.budget = 0.2

    def measure(run, case):
        time.sleep(0.6)

    run.run(measure, [], [], ["stuck", "next"])
    assert ended == [_common.DEAD]
    (row,) = [row for row in rows(tmp_path) if "failed" in row]
    assert row["shapes"] == {"case": "'stuck'"} and row["failed"].startswith("no answer")
    assert "'stuck'" in run.state["done"]


def test_a_lost_gpu_ends_the_process_and_the_next_one_goes_on(tmp_path, monkeypatch):
    def measure(run, case):
        found = {}
        with run.guarded(found):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        run._dead = case == 1  # as `guarded` sets it after asking the GPU
        run.add("one", {"case": case}, "fp32", found)

    with pytest.raises(SystemExit) as stopped:
        bench(tmp_path).run(measure, [], [], [1, 2])
    assert stopped.value.code == _common.DEAD
    again = bench(tmp_path)
    assert again.run(measure, [], [], [1, 2]) == 1 and again.state["complete"]
    (first, second) = rows(tmp_path)
    assert first["failed"] == second["failed"] == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_rehearsals_and_real_rows_have_separate_folders(tmp_path):
    bench(tmp_path)._save()
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patched:
        patched.setattr(_common.torch.cuda, "is_available", lambda: False)
        Bench("accept", "", argv=["--out", str(tmp_path)])


def test_a_rehearsal_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_common, "results_folder", lambda device: tmp_path)
    assert bench(None).run(measure_three, [], [], [1]) == 1
    assert list(tmp_path.iterdir()) == []


def test_ceilings_are_kept_for_an_hour_on_the_same_machine(tmp_path, monkeypatch):
    device = torch.device("cpu")
    assert calibration.ceilings(device, tmp_path) == CEILINGS
    monkeypatch.setattr(calibration, "calibrate", lambda device: {"copy_bytes_s": 1.0})
    assert calibration.ceilings(device, tmp_path) == CEILINGS
    file = tmp_path / calibration.FILE
    for change in ({"date": "2020-01-01T00:00:00+00:00"}, {"device": "another"}):
        file.write_text(json.dumps({**json.loads(file.read_text()), "ceilings": CEILINGS, **change}))
        assert calibration.ceilings(device, tmp_path) == {"copy_bytes_s": 1.0}


def test_the_calibration_command(tmp_path, capsys):
    assert calibration.main(["--where"]) == 0
    assert Path(capsys.readouterr().out.strip()).parent == ROOT / "bench" / "results"
    assert calibration.main(["--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == CEILINGS
    assert json.loads((tmp_path / calibration.FILE).read_text())["ceilings"] == CEILINGS


def test_without_a_checkout_the_command_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    assert provenance.bench_folder() == ROOT / "bench"
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for url, place in (("https://host/project", r" \(https://host/project\)"), (None, " that this package was built")):
        monkeypatch.setattr(provenance, "source_url", lambda url=url: url)
        assert cli.main(["bench", "round", "--out", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        wanted = (
            f"specdec-triton bench: benchmarks must run in a checkout .* no {tmp_path}/bench. Get a checkout of the"
        )
        assert re.match(f"{wanted} repository{place}.*, run pip install -e", line), line


@pytest.mark.parametrize(
    ("metadata", "record", "url"),
    [
        ("Project-URL: Docs, https://docs\nProject-URL: Source, https://host/project\n", "{}", "https://host/project"),
        ("", '{"url": "https://host/project.git", "vcs_info": {"vcs": "git"}}', "https://host/project.git"),
        ("", '{"url": "file:///home/me/project", "dir_info": {}}', "file:///home/me/project"),
        ("", '{"url": "file:///home/me/some.whl", "archive_info": {}}', None),
        ("", None, None),
    ],
)
def test_the_address_of_the_repository_is_the_installed_packages(tmp_path, monkeypatch, metadata, record, url):
    folder = tmp_path / "some_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n{metadata}")
    if record:
        (folder / "direct_url.json").write_text(record)
    monkeypatch.syspath_prepend(tmp_path)
    assert provenance.source_url("some-package") == url
    assert provenance.source_url("no-such-package") is None


def test_no_bench_imports_from_the_tests():
    ours = {path.stem for path in (ROOT / "tests").iterdir()} | {"tests"}
    for path in (ROOT / "bench").glob("*.py"):
        text = path.read_text()
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        assert not imported & ours and not re.search(r"sys\.path.*tests", text), path.name


def test_clocks_quantiles_and_floors():
    clocked, quantiles, floor_seconds = calibration.clocked, calibration.quantiles, roofline.floor_seconds
    assert quantiles([3.0]) == (3.0, 3.0, 3.0) and quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    assert floor_seconds(CEILINGS, 4e10, 1e11) == 2.0 and floor_seconds(CEILINGS, 0, 5e11) == 5.0
    calls = []
    assert len(clocked(calls.append, ["a", "b"], lambda call, x: call(x), 0.0)) == 5
    assert calls == ["a", "b", "a", "a", "b", "a", "b", "a"]
    with pytest.raises(ValueError, match="clocked: sets must hold at least one set of inputs, got none"):
        clocked(calls.append, [], lambda call, x: call(x), 0.0)
