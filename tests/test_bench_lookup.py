"""The bench of drafts copied from texts: its counts, and runs that are continued."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import bench_lookup
import pytest
import repeated_edits
from replay import replay

import specdec_triton as sdt
import tiny

MOST = 32
# the third prompt is the first one again, so that its answer is known only across calls
PROMPTS = [
    {"id": number, "task": task, "prompt": prompt, "max_new_tokens": MOST}
    for number, (task, prompt) in enumerate([("one", "abcdef"), ("two", "xyxyxy"), ("one", "abcdef")])
]
REPORT = {"what": "test", "commit": "c0ffee"}


@pytest.fixture(scope="module")
def target():
    return tiny.model()


def measured(target, out, plain=None, prompts=PROMPTS, seconds=float("inf"), report=REPORT):
    texts = bench_lookup.PlainTexts(plain)
    bench_lookup.run(target, tiny.tokenizer(), prompts, report, out, texts, seconds)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def whole(target, tmp_path_factory):
    """The folder of a run, and its report."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, measured(target, folder / "out.json", folder / "plain.jsonl")


def test_counts_of_real_calls(whole):
    folder, found = whole
    for row in found["rows"]:
        for calls in row["drafters"].values():
            assert calls["identical"] and calls["rounds"] + calls["accepted"] == row["new_tokens"] - 1
            assert calls["rounds"] + calls["drafted"] <= calls["rows"]  # some rows are padding
    first, _, again = (row["drafters"] for row in found["rows"])
    assert first["suffix, within the call"] == again["suffix, within the call"]
    assert again[bench_lookup.ACROSS]["rounds"] < first[bench_lookup.ACROSS]["rounds"] / 2
    total = found["summary"]["all"][bench_lookup.ACROSS]
    assert total["identical"] == found["summary"]["all"]["prompts"] == 3
    assert total["tokens_a_round"] == round(sum(row["new_tokens"] - 1 for row in found["rows"]) / total["rounds"], 3)
    assert found["summary"]["one"]["prompts"] == 2 and "repeated edits" not in found["summary"]
    assert {file.name for file in folder.iterdir()} == {"out.json", "plain.jsonl"}


def test_a_replay_has_the_counts_of_real_calls(whole, tmp_path, target):
    folder, found = whole
    texts = bench_lookup.PlainTexts(folder / "plain.jsonl")
    bench_lookup.run_replay(target, tiny.tokenizer(), PROMPTS, REPORT, tmp_path / "out.json", texts)
    replayed = json.loads((tmp_path / "out.json").read_text())["summary"]
    for group in ("one", "two", "all"):
        real = found["summary"][group]
        assert real.pop("prompts") == replayed["adaptive=True"][group].pop("prompts")
        for name, counts in replayed["adaptive=True"][group].items():
            assert counts == {key: number for key, number in real[name].items() if key != "identical"}
    drafted = [total["all"][bench_lookup.ACROSS]["drafted"] for total in replayed.values()]
    assert drafted[0] < drafted[1]  # drafts that do not pay


def test_the_command(whole, tmp_path, capsys, monkeypatch):
    folder, found = whole
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("\n".join(json.dumps(prompt) for prompt in PROMPTS[1:]))
    monkeypatch.setattr(bench_lookup, "PROMPTS", PROMPTS[:1])
    words = f"{tiny.save(tmp_path / 'model')} --prompts {prompts} --out {out} --plain {folder / 'plain.jsonl'} --replay"
    monkeypatch.setattr(
        "sys.argv", ["bench_lookup", *words.split(), f"--max-new-tokens={MOST}", f"--edit-tokens={MOST}"]
    )
    bench_lookup.main()
    report = json.loads(out.read_text())
    assert report["replayed"] and report["commit"] and report["edit_tokens"] == MOST
    counts = report["summary"]["adaptive=True"]["all"]
    assert counts["prompts"] == 3 and bench_lookup.table(report["summary"]["adaptive=True"]) in capsys.readouterr().out
    name = "suffix, within the call"
    assert counts[name].items() <= found["summary"]["all"][name].items()


def test_the_last_token_of_a_replayed_text_is_the_targets_own():
    """As in a call that ends there: its last token counts as emitted, and not as accepted."""
    lookup = sdt.PromptLookupDrafter(adaptive=False)
    assert replay(lookup, [1, 2, 3, 1], [2, 3, 1, 2], 20) == {"rounds": 1, "drafted": 3, "accepted": 2}


def test_a_run_is_continued_with_the_earlier_outputs_and_plain_texts(whole, tmp_path, target, monkeypatch):
    folder, found = whole
    clock = iter(range(100))
    monkeypatch.setattr(bench_lookup, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for number in range(1, 4):  # one prompt in each run
        part = measured(target, tmp_path / "out.json", folder / "plain.jsonl", seconds=1)
        assert part["rows"] == found["rows"][:number]
    assert len((folder / "plain.jsonl").read_text().splitlines()) == 3  # no text was made again


def test_another_text_than_plains_is_not_identical(whole, tmp_path, target):
    folder, _ = whole
    line = json.loads((folder / "plain.jsonl").read_text().splitlines()[0])
    line["output_ids"][-1] += 1
    (tmp_path / "plain.jsonl").write_text(json.dumps(line) + "\n")
    found = measured(target, tmp_path / "out.json", tmp_path / "plain.jsonl", PROMPTS[:1])
    assert not any(call["identical"] for call in found["rows"][0]["drafters"].values())
    assert found["summary"]["all"][bench_lookup.ACROSS]["identical"] == 0


def test_rows_of_another_commit_are_measured_again(whole, tmp_path, target):
    folder, _ = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    texts, other = tmp_path / "plain.jsonl", REPORT | {"commit": "decade"}
    found = measured(target, tmp_path / "out.json", texts, PROMPTS[1:2], report=other)
    assert [row["id"] for row in found["rows"]] == [1] and found["commit"] == "decade"


def test_the_page_has_the_tables_of_the_results():
    """One table of all groups, and one of their sums with `adaptive=False`."""
    root = Path(__file__).resolve().parent.parent
    report = json.loads((root / "bench/results/acceptance/lookup-smollm2-135m-replayed.json").read_text())
    page = (root / "docs/benchmarks.md").read_text()
    groups, always = report["summary"]["adaptive=True"], report["summary"]["adaptive=False"]
    sums = {group: always[group] for group in ("repeated edits", "other prompts", "all")}
    assert bench_lookup.table(groups) in page and bench_lookup.table(sums) in page
    assert report["commit"] in page and "dirty" not in report["commit"]


def test_each_repeated_edit_has_the_file_that_the_edits_before_it_left():
    prompts = [prompt["prompt"] for prompt in repeated_edits.PROMPTS]
    ids = [prompt["id"] for prompt in repeated_edits.PROMPTS]
    assert len(set(prompts)) == len(set(ids)) == len(prompts)
    files = [prompt.split("```")[1] for prompt in prompts if "```" in prompt]
    for before, after in zip(files, files[1:], strict=False):
        assert before != after
    assert "class Shape:" in files[0] and "class Rectangle:" in files[1] and 'unit="cm"' in files[3]
    assert '"port": 8080' in files[4] and '"port": 9090' in files[5]
