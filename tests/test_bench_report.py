"""Reports are made from rows: goals worked by hand, rows that never count, plots, the documentation's tables."""

import json
import subprocess
import sys
from pathlib import Path

import _goals
import _rows
import pytest
import report

ROOT = Path(__file__).resolve().parent.parent

ORIGIN = {"device": "Card 1", "driver": "1", "torch": "2", "triton": "3", "transformers": "5", "commit": "abc"}
ORIGIN |= {"date": "2026-01-01T00:00:00+00:00"}
TIMES = {"p20_us": 1.0, "p80_us": 99.0, "launches": 1}


def row(bench, provider, shapes, size="gpu", dtype="bf16", **found):
    return {
        "bench": bench, "provider": provider, "dtype": dtype, "inputs": "synthetic", "shapes": shapes, "size": size,
        **found, **ORIGIN,
    }  # fmt: skip


def attention(provider, nodes, context, us, share):
    shapes = {"B": 1, "Hq": 32, "Hkv": 8, "D": 128, "context": context, "N": nodes}
    return row("tree_attention", provider, shapes, p50_us=us, of_ceiling=share, **TIMES)


def generated(provider, case, ratio, eta=0.5, length=1.0, **shapes):
    shapes = {"case": case, "model": "llama 8B", "B": 1, "N": 64, "cuda_graphs": True, **shapes}
    rates = {"p20_tokens_s": 9.0, "p50_tokens_s": 10.0, "p80_tokens_s": 11.0, "identical": True}
    return row("generate", provider, shapes, ratio=ratio, eta=eta, acceptance_length=length, **rates)


def rounds(nodes, verify, graphs=True, **found):
    shapes = {"B": 1, "context": 2048, "N": nodes, "cuda_graphs": graphs}
    stages = {"draft": {"us": 50.0}, "verify": {"us": verify}, "accept": {"us": 20.0}}
    found = {"host_us": 100.0, "idle_share": 0.01, "host_reads": 1.0, "wait_us": 5.0, "kernels": 40.0, **found}
    return row("round", "ours", shapes, stages=stages, p50_us=verify + 100.0, peak_bytes=2**30, **found)


def gpu_rows():
    """Rows of a GPU that meets every goal."""
    rows = []
    for context, share in ((512, 0.3), (1024, 0.4), (8192, 0.72), (32768, 0.86)):
        for nodes in (1, 16, 32, 64, 128):
            us = 6.0 if context <= 1024 else context / 400
            rows.append(attention("triton", nodes, context, us, share))
            rows.append(attention("sdpa, dense mask", nodes, context, 6 * us, share / 6))
            rows.append(attention("flex_attention", nodes, context, 1.4 * us, share / 1.4))
            rows.append(attention("flashinfer", nodes, context, 1.5 * us, share / 1.5))
    rows.append(row("accept", "triton", {"B": 1, "N": 64, "V": 128256}, p50_us=11.0, of_ceiling=0.5, **TIMES))
    for nodes in (32, 64):
        for filters, us in (("temperature", 15.0), ("filtered", 40.0)):
            shapes = {"B": 1, "N": nodes, "V": 128256, "rule": "coupled", "sampling": "none", "filters": filters}
            rows.append(row("accept_sample", "triton", shapes, p50_us=us, of_ceiling=0.3, **TIMES))
    rows.append(row("compact", "triton", {"model": "8B", "B": 1, "path": "long"}, p50_us=9.0, of_ceiling=0.2, **TIMES))
    appended = {"op": "append_tokens", "B": 1, "N": 64, "D": 7}
    rows.append(row("compact", "triton", appended, p50_us=3.0, of_ceiling=0.01, **TIMES))
    layer = {"op": "rms_norm", "model": "llama 8B", "N": 64}
    rows.append(row("layers", "triton", layer, p50_us=2.5, of_ceiling=0.1, **TIMES))
    rows += [rounds(1, 5000.0), rounds(64, 5400.0), rounds(128, 6000.0), rounds(64, 9000.0, graphs=False)]
    plain, assisted, eager = "ours, plain", "transformers assisted", "transformers eager"
    rows.append(generated(plain, "compiled", {}, eta=0.9, compile=True, N=1))
    rows.append(generated(plain, "drafts", {}, eta=0.5, N=1))
    rows.append(generated("ours, oracle", "drafts", {plain: 3.6, eager: 14.0}, eta=0.75, length=4.4))
    rows.append(generated("ours, draft model", "drafts", {plain: 2.6, assisted: 4.2, eager: 11.0}, length=4.1, N=6))
    for length, ratio in ((1.5, 1.3), (2.0, 1.7), (3.0, 2.5), (4.5, 3.7)):
        rows.append(generated("ours, oracle", "acceptance", {plain: ratio}, length=length, N=32, tau=length))
    rows.append(generated("ours, oracle", "batch of 16", {plain: 1.7}, length=3.0, B=16, N=8))
    rows.append(generated("ours, oracle", "batch of 64", {plain: 1.5}, length=3.0, B=64, N=4))
    rows.append(row("generate", "flashspec", {"case": "engines"}, absent="flashspec is not installed"))
    return rows


def cpu_rows():
    found = {
        ("specdec_triton", "code edit"): (3.4, 1.1),
        ("specdec_triton", "chat"): (0.99, 1.05),
        ("specdec_triton, suffix", "code edit"): (4.4, 1.6),
        ("specdec_triton, suffix", "chat"): (1.01, 1.2),
    }
    return [
        row("demo", way, {"prompt": p}, "cpu", "fp32", ratio_plain=a, ratio_lookup=b, host_reads=1.0)
        for (way, p), (a, b) in found.items()
    ]


def verdicts(rows):
    return {(check.goal, check.quantity): check.judge(rows)[1] for check in _goals.GOALS}


def test_every_goal_of_the_list_has_a_check_that_rows_can_meet():
    assert {check.goal for check in _goals.GOALS} == {*map(str, range(1, 15)), "CPU"}
    found = verdicts(gpu_rows() + cpu_rows())
    assert set(found.values()) == {"met"}, {check for check, verdict in found.items() if verdict != "met"}


def test_without_rows_nothing_is_met():
    assert set(verdicts([]).values()) == {"not measured"}


@pytest.mark.parametrize("size", ["rehearsal", "cpu"])
def test_rows_of_no_gpu_never_count(size):
    rows = [{**found, "size": size} for found in gpu_rows()]
    assert set(verdicts(rows).values()) == {"not measured"}


@pytest.mark.parametrize("fault", ["wrong", "failed", "absent", "untimed"])
def test_a_faulty_row_is_no_measurement(fault):
    rows = gpu_rows()
    for found in rows:
        if found["bench"] == "compact":
            found[fault] = "a reason"
    assert {found for (goal, _), found in verdicts(rows).items() if goal == "8"} == {"not measured"}


@pytest.mark.parametrize(
    ("goal", "spoil"),
    [
        ("1", lambda f: f["bench"] == "tree_attention" and f["shapes"]["N"] == 16 and f.update(of_ceiling=0.1)),
        ("3", lambda f: f["provider"] == "sdpa, dense mask" and f["shapes"]["N"] == 64 and f.update(p50_us=1.0)),
        ("4", lambda f: f["provider"] == "flex_attention" and f["shapes"]["N"] == 1 and f.update(p50_us=10.0)),
        ("5", lambda f: f["shapes"].get("context") == 512 and f.update(launches=2)),
        ("7", lambda f: f["shapes"].get("filters") == "filtered" and f.update(p50_us=90.0)),
        ("9", lambda f: f["bench"] == "round" and f["shapes"]["N"] == 128 and f["stages"]["verify"].update(us=7e3)),
        ("10", lambda f: f["bench"] == "round" and f["shapes"]["N"] == 64 and f.update(idle_share=0.2)),
        ("13", lambda f: f["provider"] == "ours, oracle" and f["ratio"].update({"ours, plain": 3.4})),
    ],
)
def test_a_number_beyond_its_bound_misses_its_goal(goal, spoil):
    rows = gpu_rows()
    for found in rows:
        spoil(found)
    assert "missed" in {verdict for (number, _), verdict in verdicts(rows).items() if number == goal}


def fused(rows, speed, ratio=1.0):
    """Copies of rows of whole forwards in graphs, as if fused layers were `speed` times as fast as eager ones and had
    `ratio` times the ratios to baselines."""
    found = [json.loads(json.dumps(found)) for found in rows if _rows.way_of(found["shapes"]) == "eager in graph"]
    for row in found:
        row["shapes"]["fuse"] = True
        for name in ("eta", "p50_tokens_s"):
            if name in row:
                row[name] *= speed
        for stage in row.get("stages", {}).values():
            stage["us"] /= speed
        row["p50_us"] = row.get("p50_us", 1.0) / speed
        row["ratio"] = {name: ratio * value for name, value in row.get("ratio", {}).items()}
    return found


WHOLE = ("9", "10", "11", "12", "13", "14")  # goals of whole forwards


@pytest.mark.parametrize("ratio", [0.9, 1.1])
@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_the_fastest_way_is_judged_even_if_another_has_a_better_ratio(speed, ratio):
    eager = gpu_rows()
    rows = eager + fused(eager, speed, ratio)
    checks = [check for check in _goals.GOALS if check.goal in WHOLE]
    assert len(checks) == 12 and {check.judge(eager).way for check in checks} == {"eager in graph", "compiled"}
    for check in checks:
        before, now = check.judge(eager), check.judge(rows)
        if speed < 1 or before.way == "compiled":
            assert now == before
        else:
            assert now.way == "fused"
            assert check.goal not in ("13", "14") or now.value == pytest.approx(ratio * before.value)
    assert all(check.judge(rows).way is None for check in _goals.GOALS if check.goal not in WHOLE)


def test_a_way_without_a_number_leaves_its_goal_to_the_others():
    eager = gpu_rows()
    faster = fused(eager, 2.0)
    for row in faster:
        row["ratio"].pop("transformers eager", None)
        if row["shapes"].get("N") == 128:
            row["failed"] = "a reason"
    found = {check.quantity: check.judge(eager + faster).way for check in _goals.GOALS if check.goal in WHOLE}
    others = {quantity for quantity, way in found.items() if way == "eager in graph"}
    assert others == {"verify forward, 8B, 2k: N = 128 over N = 1", "with the same draft: × transformers eager"}


def test_tables_name_the_way_that_was_judged():
    eager = gpu_rows()
    lines = report.goals_lines(eager + fused(eager, 2.0))
    assert [line[3] for line in lines if line[0] == "9"] == ["1.08 (fused)", "1.2 (fused)"]
    (line,) = [line for line in lines if line[0] == "11"]
    assert line[3] == "1 (fused)"
    names = [line.split("|")[1].strip() for line in report.speed_table(eager + fused(eager, 2.0)) if "batch 16" in line]
    assert names == ["llama 8B, ours, oracle, batch 16", "llama 8B, ours, oracle, fused, batch 16"]


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_rows_of_another_model_never_count(factor):
    rows = gpu_rows()
    others = [json.loads(json.dumps(found)) for found in rows if "ratio" in found]
    for found in others:
        found["shapes"]["model"] = "qwen 1.5B"
        found["eta"] *= factor
        found["ratio"] = {name: factor * ratio for name, ratio in found["ratio"].items()}
    judged = [check.judge(rows) for check in _goals.GOALS]
    assert len(others) > 4 and [check.judge(rows + others) for check in _goals.GOALS] == judged
    generate = [check for check in _goals.GOALS if check.goal in ("11", "12", "13", "14")]
    assert {check.judge(others)[1] for check in generate} == {"not measured"}


def test_the_report_says_which_rows_are_replayed(tmp_path):
    replayed = generated("ours, draft model", "replayed pair", {"ours, plain": 2.0}, model="qwen 1.5B", N=6)
    replayed["inputs"] = _rows.REPLAYED
    rows = [*gpu_rows(), replayed]
    (line,) = [line for line in report.generate_table(rows) if "replayed pair" in line]
    assert "qwen 1.5B" in line and _rows.REPLAYED in line
    assert [line for line in report.highlights(rows) if "ours, draft model, replayed, N 6" in line]


def test_a_goal_is_not_met_while_one_of_its_sizes_is_missing():
    rows = [r for r in gpu_rows() if not (r["bench"] == "tree_attention" and r["shapes"]["N"] == 16)]
    found = {quantity: verdict for (_, quantity), verdict in verdicts(rows).items()}
    assert found["attention, N = 16 and 32, 32k: share of bandwidth"] == "not measured"


def test_a_peer_that_leaves_no_room_is_not_held_against_us():
    rows = gpu_rows()
    for found in rows:
        if found["provider"] == "flex_attention" and found["shapes"]["context"] == 32768:
            found["p50_us"] /= 1.4  # as fast as we are, and we are at 86% of the roofline
    assert min(_goals.against("flex_attention", 0.85)(_goals.Rows(rows))) == pytest.approx(_goals.PEER_RATIO)
    assert min(_goals.against("flex_attention")(_goals.Rows(rows))) == pytest.approx(1.0)


def written(folder, rows, size="gpu"):
    results = _rows.Results(folder)
    results.step("generate", "abc", size == "rehearsal") | {}
    for found in rows:
        results.add(found)
    results.save()
    return folder


def reported(folder, rows):
    """Writes rows and report; returns the lines for the screen."""
    results = _rows.Results(written(folder, rows))
    report.report(folder)
    return report.short(results.rows, results.steps)


def test_a_report_has_its_tables_and_plots(tmp_path):
    lines = reported(tmp_path, [*gpu_rows(), *cpu_rows(), row("compact", "eager", {}, wrong="storage")])
    text = (tmp_path / "report.md").read_text()
    assert any("layers, op rms_norm, model llama 8B, N 64: 2.5 us" in line for line in lines)
    for heading in ("## Goals", "### tree_attention", "### accept_sample", "### layers", "### generate", "### round"):
        assert heading in text
    assert "| **wrong** | compact | eager | storage | 1 |" in text
    assert "| absent | generate | flashspec | flashspec is not installed | 1 |" in text
    assert "| 4 | tree tax: N = 32 over the best N = 1, 8k and 32k | ≤ 1.1 | 1 | met |" in text
    assert any("wrong: compact, eager: storage" in line for line in lines)
    assert sum(len(line) + 1 for line in lines) < 8000  # a screen, or the tail of a log, shows them
    if report.has_matplotlib():
        for name, axis in (("bandwidth", "context (tokens)"), ("speedup", "acceptance length"), ("round", "(ms)")):
            assert axis in (tmp_path / f"{name}.svg").read_text().replace("\n", " ") and f"![{name}.svg]" in text
    else:
        assert report.NO_PLOTS in text and report.NO_PLOTS in lines


def test_without_matplotlib_there_are_no_plots_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "has_matplotlib", lambda: False)
    assert report.NO_PLOTS in reported(tmp_path, gpu_rows())
    assert report.NO_PLOTS in (tmp_path / "report.md").read_text() and not list(tmp_path.glob("*.svg"))


def test_a_rehearsal_is_called_one(tmp_path):
    report.report(written(tmp_path, [{**found, "size": "rehearsal"} for found in gpu_rows()], "rehearsal"))
    assert (tmp_path / "report.md").read_text().startswith("# A rehearsal: the numbers mean nothing")


def test_the_page_shows_gpus_goals_and_says_when_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    page = tmp_path / "docs" / "page.md"

    def lines(name, rows, size="gpu"):
        return report.page_lines([written(tmp_path / name, rows, size)], page)

    rehearsed = lines("r", [{**found, "size": "rehearsal"} for found in gpu_rows()], "rehearsal")
    assert rehearsed[0] == "No GPU has been measured: there are no rows of one."
    on_cpu = lines("c", cpu_rows())
    assert on_cpu[0].startswith("No GPU") and any("code edit" in line and "3.4" in line for line in on_cpu)
    on_gpu = "\n".join(lines("g", gpu_rows()))
    assert "No GPU" not in on_gpu and "On Card 1, driver 1" in on_gpu and "| ≥ 0.85 | 0.86 | met |" in on_gpu
    assert "[`g`](../g)" in on_gpu  # relative to the page


def test_tokens_a_second_have_their_spread():
    noisy = generated("ours, oracle", "drafts", {}) | {"p20_tokens_s": 541.55, "p50_tokens_s": 589.34}
    noisy["p80_tokens_s"] = 637.14
    for table in (report.speed_table([noisy]), report.generate_table([noisy])):
        assert any("589 (542 to 637)" in line or "589.3 (541.5 to 637.1)" in line for line in table), table


def test_the_pages_tables_are_made_of_the_rows():
    text = report.PAGE.read_text()
    made = report.with_table(text, report.page_lines(report.measured_folders()))
    assert text == made, "run: python bench/report.py --docs"
    with pytest.raises(ValueError, match="must have the markers"):
        report.with_table("text", [])


def test_the_docs_option_rewrites_the_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\nrest\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "measured_folders", lambda: [written(tmp_path / "g", gpu_rows())])
    monkeypatch.setattr(sys, "argv", ["report.py", "--docs"])
    assert report.main() == 0
    text = page.read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\nrest\n") and "old" not in text and "Card 1" in text


class Axes:
    """Records the lines of a plot in place of matplotlib's axes."""

    def __init__(self):
        self.bars = {}

    def errorbar(self, x, y, yerr, label, **_):
        self.bars[label] = list(zip(x, y, *yerr, strict=True))

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_the_speedup_plot_joins_comparable_rows_only():
    """One line for each case, model, provider, batch, N, options and inputs; the bar is the spread of tokens/s."""
    over = {"ours, plain": 2.0}
    rows = [
        generated("ours, oracle", "acceptance", over, length=3.0, tau=3.0),
        generated("ours, oracle", "acceptance", {"ours, plain": 1.0}, length=2.0, tau=2.0),
    ]
    others = [
        generated("ours, oracle", "drafts", over, length=3.0, tau=3.0),
        generated("ours, oracle", "acceptance", over, length=3.0, tau=3.0, model="qwen 1.5B"),
        generated("ours, draft model", "acceptance", over, length=3.0, tau=3.0),
        generated("ours, oracle", "acceptance", over, length=3.0, tau=3.0, B=4),
        generated("ours, oracle", "acceptance", over, length=3.0, tau=3.0, N=8),
        generated("ours, oracle", "acceptance", over, length=3.0, tau=3.0, compile=True),
        generated("ours, oracle", "acceptance", over, length=3.0, tau=3.0, cuda_graphs=False),
        generated("ours, oracle", "acceptance", over, length=3.0, tau=3.0) | {"inputs": _rows.REPLAYED},
    ]
    axes = Axes()
    assert len(report.speedup_plot(rows + others, axes)) == len(rows + others)
    assert len(axes.bars) == 1 + len(others)  # no two share a name either
    (joined,) = [line for line in axes.bars.values() if len(line) > 1]
    # 9 to 11 tokens/s about 10: a tenth of each ratio
    assert [number for point in joined for number in point] == pytest.approx([2, 1, 0.1, 0.1, 3, 2, 0.2, 0.2])


def test_plots_have_a_title_and_the_origin_of_their_rows(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*gpu_rows(), row("compact", "triton", {"B": 2}, p50_us=1.0) | {"commit": "not drawn"}]
    assert report.draw(rows, tmp_path) == list(report.PLOTS)
    for name, (title, _) in report.PLOTS.items():
        text = (tmp_path / name).read_text()
        assert f"<!-- {title} -->" in text and "<!-- Card 1, commit abc -->" in text


def test_the_command_refuses_a_folder_without_rows(tmp_path):
    done = subprocess.run([sys.executable, report.__file__, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "wanted a folder with a rows.json" in done.stderr


def test_rows_of_another_commit_are_dropped(tmp_path):
    written(tmp_path, gpu_rows())
    results = _rows.Results(tmp_path)
    count = len(results.rows)
    assert results.step("generate", "abc", False) == results.steps["generate"] and len(results.rows) == count
    assert results.step("generate", "def", False)["done"] == []
    assert {found["bench"] for found in results.rows} == {
        "tree_attention",
        "accept",
        "accept_sample",
        "compact",
        "layers",
        "round",
    }
    assert json.loads((tmp_path / "rows.json").read_text())["steps"]["generate"]["commit"] == "abc"


def test_a_later_run_is_taken_in(tmp_path, monkeypatch, capsys):
    """Its rows replace those of equal shapes; others stay. Rows of another device are refused and change nothing."""

    def folder(name, rows):
        results = _rows.Results(tmp_path / name)
        for one in rows:
            results.step(one["bench"], one["commit"], False)
            results.add(one)
        results.save()
        return str(tmp_path / name)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        return report.main()

    first = [attention("triton", 32, context, 20.0, 0.5) | {"commit": "a"} for context in (1024, 8192)]
    known = folder("known", first)
    later = folder("later", [attention("triton", 32, 8192, 10.0, 0.9) | {"commit": "b"}])
    other = folder("other", [attention("triton", 32, 8192, 5.0, 0.9) | {"device": "another", "commit": "c"}])
    assert run(known, "--add", later) == 0
    assert run(known, "--add", other) == 2 and "another" in capsys.readouterr().err
    assert run(known, "--add", str(tmp_path / "none")) == 2
    results = _rows.Results(tmp_path / "known")
    assert [(one["commit"], one["p50_us"]) for one in results.rows] == [("a", 20.0), ("b", 10.0)]
    assert results.steps["tree_attention"]["commit"] == "a, b"
