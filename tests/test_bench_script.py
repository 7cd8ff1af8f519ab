"""bench/gpu.sh: its control flow with a stand-in for Python, then a whole rehearsal; the commands that run benches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import specdec_triton as sdt
import tiny
from specdec_triton import cli, models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import _rows  # noqa: E402

STEPS = ("tree_attention", "accept", "accept_sample", "compact", "generate", "round")
# round fails, the kernels' benches lose their GPU twice, generate is complete
STAND_IN = """#!/bin/bash
echo "$@" >>"$CALLS"
case $1 in
	bench/_rows.py) [[ $3 == generate ]]; exit ;;
	bench/bench_round.py) echo "out of luck"; exit 1 ;;
	bench/bench_kernels.py) [[ $(grep -c bench_kernels.py "$CALLS") -lt 3 ]] && exit 3 ;;
	bench/report.py) echo "the table" ;;
esac
exit 0
"""


def run_script(*arguments, **env):
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PY": sys.executable, **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)


def test_a_failure_stops_nothing_and_is_reported(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    done = run_script(tmp_path / "out", PY=str(python), CALLS=str(calls))
    assert done.returncode == 1
    assert "round: exit status 1; its log ends: out of luck" in done.stdout
    assert "generate: complete already" in done.stdout and "kernels: ran" in done.stdout
    started = [line.split()[0] for line in calls.read_text().splitlines() if line.startswith("bench/")]
    started = [script for script in started if script != "bench/_rows.py"]
    assert started == [f"bench/{name}.py" for name in (*["bench_kernels"] * 3, "bench_round", "report")]
    assert done.stdout.splitlines()[-2] == "the table"


@pytest.mark.parametrize("arguments", [[], ["out", "--fast"], ["--rehearse"]])
def test_wrong_arguments_are_refused(arguments, tmp_path):
    done = run_script(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: bash bench/gpu.sh OUT [--rehearse]")


@pytest.mark.timeout(400)
def test_a_rehearsal_runs_every_step_and_lists_what_is_absent(tmp_path):
    done = run_script(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-3000:]
    found = json.loads((tmp_path / "rows.json").read_text())
    assert tuple(found["steps"]) == STEPS
    for step in found["steps"].values():
        assert step["complete"] and step["rehearsal"] and step["left"] == step["wrong"] == step["failed"] == 0
    rows = found["rows"]
    assert {row["size"] for row in rows} == {"rehearsal"}
    absent = {row["provider"]: row["absent"] for row in rows if "absent" in row}
    if not torch.cuda.is_available():
        assert {"flex_attention", "flashinfer", "flashspec", "transformers static cache, compiled"} <= set(absent)
        assert {row["provider"] for row in rows if "untimed" in row} == {"triton"}
    measured = {(row["bench"], row["provider"]) for row in rows if "p50_us" in row or "p50_tokens_s" in row}
    for provider in ("ours, plain", "ours, oracle", "ours, draft model", "ours, prompt lookup", "transformers eager"):
        assert ("generate", provider) in measured
    assert {("generate", "transformers assisted"), ("generate", "transformers prompt lookup")} <= measured
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A rehearsal") and all(reason in text for reason in absent.values())
    assert len(done.stdout) < 8000 and "goals not measured" in done.stdout
    assert set(json.loads((tmp_path / "calibration.json").read_text())["ceilings"]) >= {"copy_bytes_s", "read_bytes_s"}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(models, "default_device", lambda: torch.device("cpu"))


def test_the_bench_command_runs_the_scripts_and_shows_their_table(tmp_path, capfd):
    out = tmp_path / "rows"
    assert cli.main(["bench", "round", "--rehearse", "--out", str(out)]) == 0
    captured = capfd.readouterr()
    assert "round            complete" in captured.out and "absent" in captured.out
    assert "{" not in captured.out and f"tables: {out / 'report.md'}" in captured.err
    assert {row["bench"] for row in _rows.Results(out).rows} == {"round"}


def test_the_bench_command_says_where_the_benches_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdt, "__file__", str(tmp_path / "site-packages" / "specdec_triton" / "__init__.py"))
    assert cli.main(["bench", "kernels"]) == 2
    assert "they come with the repository, not with the package" in capsys.readouterr().err


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
