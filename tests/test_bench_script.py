"""bench/gpu.sh: its control flow with a stand-in for Python, and a rehearsal, whose second part runs in this process;
and the commands that run benches."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import _rows
import pytest
import report
import steps
import torch
from _rows import way_of
from transformers import GenerationConfig

import tiny
from specdec_triton.engine import graph_runner
from specdec_triton.tools import cli, models

ROOT = Path(__file__).resolve().parent.parent

FIRST = ("correct", "calls", "tree_attention", "accept", "accept_sample", "compact", "layers", "round")
HEADS = ("EAGLE head", "EAGLE head, dynamic tree", "DFlash head")
SECOND = ("generate", "draft", "tree_attention compiled")
# the first part loses its GPU twice, the second one fails
STAND_IN = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$1 $3" in
	"bench/steps.py first") [[ $(grep -c "steps.py.* first" "$CALLS") -lt 3 ]] && exit 3 ;;
	"bench/steps.py second") echo "out of luck"; exit 9 ;;
	"bench/report.py "*) echo "the table" ;;
esac
exit 0
"""


def run_script(*arguments, **env):
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *map(str, arguments)]
    env = {**os.environ, "PY": sys.executable, **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)


@pytest.fixture
def stand_in(tmp_path):
    """A function that runs the script with a stand-in for Python; returns the process and the parts that it started."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(*arguments):
        calls.write_text("")
        done = run_script(tmp_path / "out", *arguments, PY=str(python), CALLS=str(calls))
        started = [line.split() for line in calls.read_text().splitlines() if line.startswith("bench/")]
        return done, [words[2] if words[0] == "bench/steps.py" else words[0] for words in started]

    return run


def test_a_failure_stops_nothing_and_is_reported(stand_in):
    done, started = stand_in()
    assert done.returncode == 1
    assert done.stdout.count("first: the GPU was lost") == 2
    assert "second: exit status 9; its log ends: out of luck" in done.stdout
    assert started == ["first", "first", "first", "second", "rest", "bench/report.py"]
    assert done.stdout.splitlines()[-2] == "the table"


@pytest.mark.parametrize("part", ["first", "second"])
def test_a_part_alone(stand_in, part):
    done, started = stand_in("--rehearse", f"--{part}")
    assert set(started) == {part, "bench/report.py"} and done.returncode == (part == "second")


@pytest.mark.parametrize(
    "arguments", [[], ["out", "--fast"], ["--rehearse"], ["out", "--first", "--second"], ["out", "more"]]
)
def test_wrong_arguments_are_refused(arguments):
    done = run_script(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bash bench/gpu.sh OUT [--first | --second] [--rehearse]")


@pytest.fixture
def in_this_process(tmp_path, monkeypatch, capsys):
    """A function that runs the steps of a part and the report like the script, but in this process, which has imported
    torch; returns their output."""
    monkeypatch.setattr(graph_runner, "CAPTURES", dict(graph_runner.CAPTURES))
    monkeypatch.setattr(graph_runner, "LAG", dict(graph_runner.LAG))
    before = signal.getsignal(signal.SIGTERM)

    def run(part):
        monkeypatch.setattr(sys, "argv", ["steps.py", str(tmp_path), part, "--rehearse"])
        assert steps.main() == 0
        report.report(tmp_path)
        return capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.timeout(400)
def test_a_rehearsal_runs_every_step_and_lists_what_is_absent(tmp_path, in_this_process):
    done = run_script(tmp_path, "--first", "--rehearse")
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    assert tuple(json.loads((tmp_path / "rows.json").read_text())["steps"]) == FIRST
    assert len(done.stdout.splitlines()) <= 60 + 15 and len(done.stdout) < 12000
    second = in_this_process("second")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert tuple(found["steps"]) == FIRST + SECOND
    assert [line.split(":")[0] for line in second.splitlines() if line.startswith("== ")] == [f"== {s}" for s in SECOND]
    for step in found["steps"].values():
        assert step["complete"] and step["rehearsal"] and step["left"] == step["wrong"] == step["failed"] == 0
    rows = found["rows"]
    assert {row["size"] for row in rows} == {"rehearsal"}
    said = {row["provider"]: row["said"] for row in rows if row["bench"] == "correct"}
    assert set(said) == {"attention", "recovery", "text", "bf16 text", "tests"}
    assert "capturing failed: _local_scalar_dense in a captured stage; next call:" in said["recovery"]
    assert re.search(r"\d+/\d+ tests collected", said["tests"])
    (auto,) = [row for row in rows if row["bench"] == "calls" and row["provider"] == "auto"]
    assert len(auto["verify_ms"]) > 4 and auto["captured"] > 0 and auto["trees"]
    absent = {row["provider"]: row["absent"] for row in rows if "absent" in row}
    if not torch.cuda.is_available():
        assert {"flex_attention", "flashinfer", "liger", "transformers static cache, compiled"} <= set(absent)
        assert {row["provider"] for row in rows if "untimed" in row} == {"triton"}
    measured = {(row["bench"], row["provider"]) for row in rows if "p50_us" in row or "p50_tokens_s" in row}
    for provider in ("plain", "oracle", "draft model", "prompt lookup", *HEADS):
        assert ("generate", f"ours, {provider}") in measured
    drafted = {row["shapes"].get("kind"): row["shapes"] for row in rows if row["bench"] == "draft"}
    assert drafted["DFlash block"]["D"] == 3 and drafted["DFlash tree"]["N"] == 64
    for provider in ("eager", "assisted", "prompt lookup"):
        assert ("generate", f"transformers {provider}") in measured
    fused = {row["provider"]: row for row in rows if row["bench"] == "generate" and "fused" in row}
    assert fused["ours, EAGLE head, dynamic tree"]["shapes"]["N"] == 60
    assert fused["ours, DFlash head"]["shapes"]["N"] == 64
    for name in ("generate", "round"):
        assert any(row["bench"] == name and way_of(row["shapes"]) == "fused" and "fused" in row for row in rows)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A rehearsal") and all(reason in text for reason in absent.values())
    assert "goals not measured" in done.stdout and len(list(tmp_path.iterdir())) <= 8
    assert set(json.loads((tmp_path / "calibration.json").read_text())["ceilings"]) >= {"copy_bytes_s", "read_bytes_s"}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(models, "default_device", lambda: torch.device("cpu"))


@pytest.mark.slow
def test_the_bench_command_runs_the_scripts_and_shows_their_table(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "rows"
    assert cli.main(["bench", "round", "--rehearse", "--out", str(out)]) == 0
    captured = capfd.readouterr()
    assert "round            complete" in captured.out and "absent" in captured.out
    assert "{" not in captured.out and f"tables: {out / 'report.md'}" in captured.err
    assert {row["bench"] for row in _rows.Results(out).rows} == {"round"}


def test_the_profile_command(tmp_path, capsys):
    target, draft = str(tiny.save(tmp_path / "target")), str(tiny.save(tmp_path / "draft", layers=1))
    # with a threshold, uncaptured rounds read the draft on the host after each token
    whole = GenerationConfig.from_pretrained(draft)
    whole.assistant_confidence_threshold = 0.0
    whole.save_pretrained(draft)
    command = ["profile", "--model", target, "--prompt", "abab", "--max-new-tokens", "12", "--dtype", "float32"]
    capsys.readouterr()
    assert cli.main([*command, "--draft", draft, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["stages"]) == ["draft", "verify", "accept", "compact", "emit"]
    assert found["stages"]["draft"]["bytes"] > 0 and 0 < found["eta"] < 1 and found["host_reads"] == 1.0
    assert found["kernels"] is found["idle_share"] is found["tokens_per_joule"] is None
    assert cli.main([*command, "--out", str(tmp_path / "seen")]) == 0
    captured = capsys.readouterr()
    assert "verify" in captured.out and "GPU idle share: not measured here" in captured.out
    assert {file.name for file in (tmp_path / "seen").iterdir()} == {"profile.json", "trace.json"}
    assert json.loads((tmp_path / "seen" / "profile.json").read_text())["stages"]["draft"]["bytes"] == 0
