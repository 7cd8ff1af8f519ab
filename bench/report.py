"""Tables and plots from rows, and the goals: met, missed or not measured.

    python bench/report.py FOLDER            # write report.md and plots next to the folder's rows.json; print a summary
    python bench/report.py FOLDER --add RUN  # the same, after adding the rows of RUN, a later run on the same device
    python bench/report.py --docs            # rewrite the tables of docs/benchmarks.md from the rows in bench/results

Torch is not needed. Without matplotlib no plots are drawn, and the report says so. Rows of a rehearsal are marked and
never count towards a goal.
"""

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence

from _goals import GOALS, LARGE, LLAMA, MODEL, Rows
from _rows import CALIBRATION, REPLAYED, REPORT, RESULTS, ROOT, ROWS, Results, way_of

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by bench/report.py: begin -->", "<!-- made by bench/report.py: end -->"
STAGES = {"draft": "#9ecae1", "verify": "#3182bd", "accept": "#e6550d", "compact": "#31a354", "emit": "#756bb1"}
ROUND_COLUMNS = {"kernels": "kernels", "host reads": "host_reads", "host µs": "host_us", "waiting µs": "wait_us"}
ROUND_COLUMNS |= {"GPU idle": "idle_share"}
REST = "#d9d9d9"
MARKS = {"met": "met", "missed": "**missed**", "not measured": "not measured"}
NO_PLOTS = "matplotlib is not installed: no plots. Make them elsewhere: python bench/report.py FOLDER"
GOAL_HEADS = ("goal", "quantity", "wanted", "measured", "verdict")
LONGEST_REASON = 160
MOST_LINES, MOST_FAULTS, LONGEST_LINE, LONGEST_FAULT = 60, 10, 170, 320  # on the screen
KERNELS = ("tree_attention", "accept", "accept_sample", "compact", "draft", "layers")
UNSHARED = ("tune_tree_attention",)  # benches whose rows are too many for `bench/results`


def table(heads: Sequence[str], lines: Sequence[Sequence], text: Sequence[int] = (0,)) -> list[str]:
    """Markdown; the columns `text` are text, the others are numbers."""
    rule = ["---" if place in text else "---:" for place in range(len(heads))]
    return ["| " + " | ".join(map(str, line)) + " |" for line in (heads, rule, *lines)] + [""]


def columns(rows: list[dict], heads: dict[str, Callable[[dict], object]]) -> list[str]:
    """A table with a line for each row; `heads` maps a column's head to a function of the row."""
    return table(list(heads), [[read(row) for read in heads.values()] for row in rows])


def having(rows: list[dict], bench: str, name: str) -> list[dict]:
    return [row for row in rows if row["bench"] == bench and name in row]


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"


def goals_lines(rows: list[dict], size: str | None = None) -> list[list[str]]:
    """A line for each goal; with `size`, only for goals that rows of this size can meet."""
    lines = []
    for check in GOALS:
        if size in (None, check.size):
            value, verdict, way = check.judge(rows)
            goal = f"{'≥' if check.sign == '>=' else '≤'} {check.bound:g}"
            measured = number(value) + (f" ({way})" if way else "")
            lines.append([check.goal, check.quantity, goal, measured, MARKS[verdict]])
    return lines


def goals_table(rows: list[dict], size: str | None = None) -> list[str]:
    return table(GOAL_HEADS, goals_lines(rows, size), text=(0, 1, 4))


def origin(rows: list[dict]) -> str:
    """Device, versions, dates and commits of rows, in words."""
    found = {name: sorted({row[name] for row in rows}) for name in ("device", "driver", "commit")}
    packages = ("torch", "triton", "transformers")
    versions = [f"{name} {', '.join(sorted({row[name] for row in rows}))}" for name in packages]
    dates = sorted({row["date"][:10] for row in rows})
    return (
        f"{', '.join(found['device'])}, driver {', '.join(found['driver'])}, {', '.join(versions)}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(found['commit'])}"
    )


def shown(row: dict) -> str:
    """A row's sizes and options, for a table's first column."""
    return ", ".join(f"{name} {value}" for name, value in row["shapes"].items() if value not in (None, False))


def way_name(shapes: dict) -> str:
    """Appended to a method's name if its layers do not run as in transformers."""
    return ", fused" * bool(shapes.get("fuse")) + ", compiled" * bool(shapes.get("compile"))


def share(value: float) -> str:
    return f"{value:.0%}" if value <= 1 else number(value)


def kernel_table(rows: list[dict], bench: str) -> list[str]:
    """Times of each provider: median and p20 to p80 in µs, and the share of the ceiling."""
    found = having(rows, bench, "p50_us")
    heads = {
        "sizes": lambda row: f"{shown(row)}, {row['dtype']}",
        "provider": lambda row: row["provider"],
        "µs": lambda row: number(row["p50_us"]),
        "p20 to p80": lambda row: f"{number(row['p20_us'])} to {number(row['p80_us'])}",
        "of the ceiling": lambda row: (
            f"{row['of_ceiling']:.0%}" if row["of_ceiling"] <= 1 else number(row["of_ceiling"])
        ),
        "launches": lambda row: row["launches"] or "–",
    }
    return [f"### {bench}", "", *columns(found, heads)] if found else []


def rate(row: dict, digits: int = 3) -> str:
    """The median of tokens/s, with its spread."""
    low, median, high = (number(row[f"{name}_tokens_s"], digits) for name in ("p20", "p50", "p80"))
    return f"{median} ({low} to {high})"


def generate_table(rows: list[dict]) -> list[str]:
    found = having(rows, "generate", "p50_tokens_s")
    heads = {
        "case": shown,
        "provider": lambda row: row["provider"],
        "tokens/s (p20 to p80)": lambda row: rate(row, 4),
        "ratio": lambda row: "; ".join(f"{ratio:.2f} × {name}" for name, ratio in row["ratio"].items()) or "–",
        "acceptance length": lambda row: row["acceptance_length"],
        "inputs": lambda row: row["inputs"],
        "eta": lambda row: number(row["eta"]),
        "host µs a round": lambda row: number(row.get("host_us")),
        "GPU idle": lambda row: number(row.get("idle_share")),
        "text identical": lambda row: (
            "yes" if row["identical"] else f"{row['flipped_rows']} rows, gap {row['worst_gap']}"
        ),
    }
    note = (
        "*Controlled acceptance*: an oracle, a draft model or a draft head with a set error rate; the oracle's drafts "
        "take no time. "
        "*Replayed acceptance*: random weights of a real pair's sizes; the draft is wrong at the tokens at which "
        "the real one was. tokens/s exclude the prompt and the set-up."
    )
    return ["### generate", "", note, "", *columns(found, heads)] if found else []


def round_table(rows: list[dict]) -> list[str]:
    found = having(rows, "round", "stages")
    heads = {"round": shown, "µs": lambda row: number(row["p50_us"])}
    for stage in STAGES:
        heads[stage] = lambda row, stage=stage: number(row["stages"].get(stage, {"us": None})["us"])
    for head, name in ROUND_COLUMNS.items():
        heads[head] = lambda row, name=name: number(row[name])
    heads["peak MiB"] = lambda row: number(row["peak_bytes"] / 2**20)
    return (
        ["### round", "", "Medians of a round and of each of its stages, µs.", "", *columns(found, heads)]
        if found
        else []
    )


def kernels_table(rows: list[dict]) -> list[str]:
    """Kernels of the batch-1 rounds replayed from CUDA graphs; those of a round from the slowest to the fastest."""
    lines = []
    for row in rows:
        if row["bench"] == "round" and row["shapes"]["B"] == 1 and row["shapes"].get("cuda_graphs"):
            lines += [
                [f"`{kernel['name']}`", way_of(row["shapes"]), row["shapes"]["N"]]
                + [number(kernel["launches"]), number(kernel["us"])]
                for kernel in row.get("kernel_us", ())
            ]
    note = "Batch 1, replayed from graphs: number of launches in a round, and µs of all of them together."
    heads = ("kernel", "layers", "N", "launches", "µs")
    return ["### kernels of a round", "", note, "", *table(heads, lines, text=(0, 1))] if lines else []


def unmeasured(rows: list[dict]) -> list[str]:
    """Wrong, failed, absent and untimed rows with the reason; equal ones are counted together."""
    kinds = ("wrong", "failed", "absent", "untimed")
    counts = collections.Counter(
        (f"**{kind}**" if kind in kinds[:2] else kind, row["bench"], row["provider"], row[kind][:LONGEST_REASON])
        for kind in kinds
        for row in rows
        if kind in row
    )
    lines = [[*key, count] for key, count in counts.items()]
    return ["## Not measured", "", *table(["", "bench", "provider", "reason", "rows"], lines)] if lines else []


def steps_table(steps: dict[str, dict]) -> list[str]:
    heads = ("step", "complete", "cases left", "wrong", "failed", "seconds")
    lines = [
        [name, "yes" if step["complete"] else "no", step.get("left", "–"), *(step[head] for head in heads[3:])]
        for name, step in steps.items()
    ]
    return table(heads, lines) if lines else []


def report(folder: pathlib.Path) -> None:
    """Write report.md and the plots of a folder. report.md is written once before the plots: drawing may fail."""
    results = Results(folder)
    rows, rehearsal = results.rows, any(row["size"] == "rehearsal" for row in results.rows)
    title = "A rehearsal: the numbers mean nothing" if rehearsal else "Results"
    lines = [f"# {title}", "", origin(rows) if rows else "no rows", ""]
    lines += ["## Goals", "", *goals_table(rows), "## Steps", "", *steps_table(results.steps)]
    file = folder / CALIBRATION
    if file.exists():
        ceilings = json.loads(file.read_text())["ceilings"]
        measured = [[name, f"{value:.4g}"] for name, value in ceilings.items()]
        lines += ["## Ceilings", "", *table(["ceiling", "measured"], measured)]
    found = highlights(rows)
    lines += ["## Highlights", "", *(f"- {line}" for line in found), ""] if found else []
    lines += ["## Kernels", ""]
    for bench in KERNELS:
        lines += kernel_table(rows, bench)
    lines += ["## End to end", "", *generate_table(rows), *round_table(rows), *kernels_table(rows)]
    lines += unmeasured(rows)
    (folder / REPORT).write_text("\n".join(lines))
    plots = [f"![{name}]({name})" for name in draw(rows, folder)]
    lines += ["## Plots", "", *(plots or [NO_PLOTS if not has_matplotlib() else "no rows to draw"]), ""]
    (folder / REPORT).write_text("\n".join(lines))


def highlights(rows: list[dict]) -> list[str]:
    """A line for each result that a goal or a reader asks about. Equal checks share a line; faults are not listed."""
    lines, texts = [], collections.defaultdict(list)
    for row in rows:
        shapes = row["shapes"]
        if row["bench"] == "correct":
            texts[row["provider"], shapes.get("family", "")].append(row)
        elif row["bench"] == "calls" and "said" in row:
            graphs = "" if shapes["cuda_graphs"] == "auto" else ", no graphs"
            lines.append(f"calls: {row['provider']}, {shapes['tokens']} tokens{graphs}: {row['said']}")
    for (kind, family), found in texts.items():
        right = [row for row in found if "said" in row]
        said = right[0]["said"] if right and (len(found) == 1 or kind == "attention") else ""
        if kind == "attention" and right:
            said = "worst " + max(row["said"].split()[-1] for row in right)
        lines.append(f"correct: {kind} {family}".rstrip() + f": {len(right)} of {len(found)} {said}".rstrip())
    for row in rows:
        shapes = row["shapes"]
        if row["bench"] in KERNELS and row["provider"] == "triton" and row["size"] == "gpu" and "p50_us" in row:
            if _has_goal_sizes(row["bench"], shapes):
                lines.append(
                    f"{row['bench']}, {shown(row)}: {number(row['p50_us'])} us, {row['of_ceiling']:.0%} of the ceiling"
                )
        elif row["bench"] == "round" and "stages" in row:
            stages = ", ".join(f"{name} {number(stage['us'])}" for name, stage in row["stages"].items())
            idle = "" if row["idle_share"] is None else f", idle {row['idle_share']:.0%}, {row['kernels']} kernels"
            lines.append(f"round, {shown(row)}: {number(row['p50_us'])} us: {stages}{idle}")
        elif row["bench"] == "generate" and "p50_tokens_s" in row:
            ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in row["ratio"].items())
            provider = row["provider"] + way_name(shapes) + ", replayed" * (row["inputs"] == REPLAYED)
            lines.append(
                f"generate, {shapes['case']}, {provider}, N {shapes['N']}: {number(row['p50_tokens_s'], 4)} "
                f"tokens/s, eta {number(row['eta'])}, tau {row['acceptance_length']}; {ratios}"
            )
    return [line[:LONGEST_LINE] for line in lines]


def _has_goal_sizes(bench: str, shapes: dict) -> bool:
    """Whether a goal asks for these sizes."""
    if bench == "tree_attention":
        llama = all(shapes[name] == size for name, size in LLAMA.items())
        return llama and shapes["context"] in (1024, 8192, 32768) and shapes["N"] in (1, 32, 64, 128)
    if bench == "draft":
        return shapes["B"] == 1 and ("model" in shapes or (shapes["V"] == LARGE and shapes["k"] == 10))
    if bench == "layers":
        return shapes["model"] == MODEL and shapes["N"] in (1, 64)
    if bench == "compact":
        return shapes["B"] == 1 and shapes.get("path", "spread") == "spread" and shapes.get("model", "8B") == "8B"
    return (
        shapes["B"] == 1 and shapes["V"] == LARGE and shapes["N"] == 64 and shapes.get("rule", "coupled") == "coupled"
    )


def short(rows: list[dict], steps: dict[str, dict]) -> list[str]:
    """At most `MOST_LINES` lines; goals and faults come last, since a terminal shows the end."""
    faults = dict.fromkeys(
        f"{kind}: {', '.join(filter(None, (row['bench'], row['provider'], shown(row))))}: {row[kind]}"[:LONGEST_FAULT]
        for kind in ("wrong", "failed")
        for row in rows
        if kind in row
    )
    faults = list(faults)
    lines = [*summary(rows, steps), *faults[:MOST_FAULTS]]
    if len(faults) > MOST_FAULTS:
        lines.append(f"and {len(faults) - MOST_FAULTS} more of these in report.md")
    found = highlights(rows)
    room = MOST_LINES - len(lines)
    if len(found) > room:
        found = [*found[: room - 1], f"and {len(found) - room + 1} lines more: see report.md"]
    return [*found, *lines]


def summary(rows: list[dict], steps: dict[str, dict]) -> list[str]:
    """Steps and goals."""
    lines = []
    for name, step in steps.items():
        state = "complete" if step["complete"] else f"{step.get('left', '?')} cases left"
        faults = "".join(f", {step[kind]} {kind}" for kind in ("wrong", "failed") if step[kind])
        lines.append(f"{name:16} {state}{faults}, {step['seconds']:.0f} s")
    absent = dict.fromkeys(f"{row['bench']}: {row['provider']}" for row in rows if "absent" in row)
    lines.append(f"absent, at least in some cases: {'; '.join(absent) or 'nothing'}")
    if not has_matplotlib():
        lines.append(NO_PLOTS)
    unread = []
    for goal, quantity, wanted, measured, verdict in goals_lines(rows):
        if measured == "–":
            unread.append(goal)
        else:
            lines.append(f"{goal:4} {verdict.strip('*'):7} {measured:>8} (wanted {wanted})  {quantity}")
    if unread:
        lines.append(f"goals not measured, or not wholly: {', '.join(dict.fromkeys(unread))}")
    return lines


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows: list[dict], folder: pathlib.Path) -> list[str]:
    """Draw each plot that has rows; return the file names."""
    if not has_matplotlib():
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "report"  # the same rows make the same files
    drawn = []
    for name, (title, plot) in PLOTS.items():
        figure, axes = plt.subplots(figsize=(8, 4.8))
        shown_rows = plot(rows, axes)
        if shown_rows:
            axes.set_title(title, fontsize=11, loc="left", pad=18)
            axes.text(0, 1.02, plot_origin(shown_rows), transform=axes.transAxes, fontsize=8, color="0.4")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            figure.tight_layout()
            figure.savefig(folder / name, metadata={"Date": None})
            drawn.append(name)
        plt.close(figure)
    return drawn


def plot_origin(rows: list[dict]) -> str:
    """Devices and commits of the rows in a plot."""
    devices, commits = (", ".join(sorted({row[name] for row in rows})) for name in ("device", "commit"))
    return f"{devices}, commit {commits}" + ", REHEARSAL" * any(row["size"] == "rehearsal" for row in rows)


def bandwidth_plot(rows: list[dict], axes) -> list[dict]:
    """Share of the ceiling against context: our kernel at each N, other providers at N = 32. Returns the rows drawn."""
    found = [row for row in rows if row["bench"] == "tree_attention" and "p50_us" in row and row["shapes"]["B"] == 1]
    on_gpu = any(row["provider"] == "triton" for row in found)
    if on_gpu:
        found = [row for row in found if all(row["shapes"][name] == size for name, size in LLAMA.items())]
    ours = "triton" if on_gpu else "reference"
    found = [row for row in found if row["provider"] == ours or row["shapes"]["N"] == 32]
    lines = collections.defaultdict(list)
    for row in found:
        lines[row["provider"], row["shapes"]["N"]].append(row)
    for (provider, nodes), line in sorted(lines.items(), key=lambda item: (item[0][0] != ours, item[0])):
        line.sort(key=lambda row: row["shapes"]["context"])
        style = "o-" if provider == ours else "x--"
        points = [(row["shapes"]["context"], 100 * row["of_ceiling"]) for row in line]
        axes.plot(*zip(*points, strict=True), style, label=f"{provider}, N = {nodes}", markersize=4)
    if not found:
        return []
    axes.set_xscale("log", base=2)
    contexts = sorted({row["shapes"]["context"] for row in found})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("share of the measured ceiling (%)")
    axes.set_ylim(0, 100 if on_gpu else 115 * max(row["of_ceiling"] for row in found))
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return found


def comparable(row: dict) -> tuple:
    """A hashable key; rows of a generation with equal keys differ in their acceptance length alone."""
    fixed = {name: value for name, value in row["shapes"].items() if name != "tau"}
    return (*(row[name] for name in ("provider", "dtype", "inputs", "device", "size")), json.dumps(fixed))


def line_name(row: dict) -> str:
    """The legend's name of a line of the speedup plot."""
    shapes = row["shapes"]
    name = f"{shapes['case']}: {shapes['model']}, {row['provider'].removeprefix('ours, ')}"
    name += f", batch {shapes['B']}, N = {shapes['N']}" + way_name(shapes)
    name += ", no graphs" if shapes.get("cuda_graphs") is False else ""
    return name + ", replayed" * (row["inputs"] == REPLAYED)


def speedup_plot(rows: list[dict], axes) -> list[dict]:
    """Speedup over our own plain decoding against acceptance length. Returns the rows drawn.

    Rows are joined only if they are comparable. An error bar is the spread of the row's tokens/s, scaled to its ratio:
    ratios are medians over turns, and their own spread is not in the rows.
    """
    over = "ours, plain"
    found = [row for row in rows if row["bench"] == "generate" and over in row.get("ratio", {})]
    found = [row for row in found if row["provider"].startswith("ours")]
    lines = collections.defaultdict(list)
    for row in found:
        lines[comparable(row)].append(row)
    if not found:
        return []
    highest = 0.0
    for place, line in enumerate(lines.values()):
        line.sort(key=lambda row: row["acceptance_length"])
        lengths, ratios = [row["acceptance_length"] for row in line], [row["ratio"][over] for row in line]
        shares = [[row[f"{name}_tokens_s"] / row["p50_tokens_s"] for row in line] for name in ("p20", "p80")]
        below = [ratio * (1 - low) for ratio, low in zip(ratios, shares[0], strict=True)]
        above = [ratio * (high - 1) for ratio, high in zip(ratios, shares[1], strict=True)]
        style = "osD^vP*X"[place % 8] + "-"
        axes.errorbar(lengths, ratios, [below, above], fmt=style, label=line_name(line[0]), markersize=5, capsize=3)
        highest = max(highest, *(ratio + more for ratio, more in zip(ratios, above, strict=True)))
    furthest = 1.05 * max(row["acceptance_length"] for row in found)
    axes.plot([0, furthest], [0, furthest], ":", color="0.5", label="limit: a round takes the time of a plain step")
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set_xlim(0, furthest)
    axes.set_ylim(0, 1.08 * max(furthest, highest))
    axes.set_xlabel("acceptance length (tokens a round)")
    axes.set_ylabel("speedup over plain decoding (×)\nbars: p20 to p80 of tokens/s", fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="upper left")
    return found


def round_plot(rows: list[dict], axes) -> list[dict]:
    """A bar for each kind of round: its stages one after another, then the time between rounds. Returns the rows
    drawn."""
    found = [row for row in rows if row["bench"] == "round" and "stages" in row]
    if not found:
        return []
    found.sort(key=lambda row: (row["shapes"].get("cuda_graphs") is False, row["shapes"]["B"], row["shapes"]["N"]))
    labels = []
    for place, row in enumerate(found):
        shapes, at = row["shapes"], 0.0
        graphs = {True: ", graphs", False: ", no graphs", None: ""}[shapes.get("cuda_graphs")]
        labels.append(f"batch {shapes['B']}, N = {shapes['N']}{way_name(shapes)}{graphs}")
        for name, color in STAGES.items():
            width = row["stages"].get(name, {"us": 0.0})["us"] / 1e3
            axes.barh(place, width, left=at, color=color, label=name if place == 0 else None)
            at += width
        rest = max(row["p50_us"] / 1e3 - at, 0.0)
        axes.barh(place, rest, left=at, color=REST, label="between" if place == 0 else None)
        other = row["p50_us"] - row["stages"].get("verify", {"us": 0.0})["us"]
        axes.text(at + rest, place, f"  all but verify: {number(other)} µs", va="center", fontsize=7)
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3e-3 * max(row["p50_us"] for row in found))
    axes.set_xlabel("time in a round (ms), medians")
    axes.legend(frameon=False, fontsize=8, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return found


# file: title, function that draws rows on axes
PLOTS = {
    "bandwidth.svg": ("Tree attention: share of the memory and compute ceiling", bandwidth_plot),
    "speedup.svg": ("Speedup of speculative over plain decoding", speedup_plot),
    "round.svg": ("Time of a round by stage", round_plot),
}


def page_lines(folders: Iterable[pathlib.Path], page: pathlib.Path = PAGE) -> list[str]:
    """The tables of a page: speeds and goals on each GPU; on CPUs, ratios and counts alone.

    Args:
        folders: of rows.
        page: the Markdown file that shows the lines; links are relative to it.
    """
    lines, on_gpu = [], False
    for folder in folders:
        rows = Results(folder).rows
        for size in ("gpu", "cpu"):
            measured = [row for row in rows if row["size"] == size]
            if not measured:
                continue
            on_gpu |= size == "gpu"
            kept = [line for line in goals_lines(measured) if line[3] != "–"]
            if size == "gpu":
                lines += [f"On {origin(measured)}:", "", *speed_table(measured), *goals_table(measured, size)]
            elif kept:
                lines += [f"On a CPU, {origin(measured)}:", "", *table(GOAL_HEADS, kept, text=(0, 1, 4))]
            lines += [*demo_table(measured), *cpu_ratios(measured)] if size == "cpu" else []
            link = pathlib.Path(os.path.relpath(folder, page.parent)).as_posix()
            lines += [f"All rows: [`{folder.relative_to(ROOT)}`]({link}).", ""]
    if not on_gpu:
        lines = ["No GPU has been measured: there are no rows of one.", "", *lines]
    return lines


def speed_table(rows: list[dict]) -> list[str]:
    """Whole generations on a GPU: tokens a second, and the ratio to three baselines."""

    def method(row: dict) -> str:
        shapes = row["shapes"]
        more = way_name(shapes) + f", batch {shapes['B']}" * (shapes["B"] > 1)
        return f"{shapes['model']}, {row['provider']}{more}"

    found = having(Rows(rows, "gpu").rows, "generate", "p50_tokens_s")
    heads = {"method": method, "N": lambda row: row["shapes"]["N"]}
    heads |= {"tokens a round": lambda row: f"{row['acceptance_length']:.2f}"}
    heads |= {"tokens/s (p20 to p80)": rate}
    for name in ("ours, plain", "transformers eager", "transformers assisted"):
        ratio = lambda row, name=name: f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "–"  # noqa: E731
        heads["× " + name.replace(",", "")] = ratio
    note = (
        "Greedy decoding in bf16, batch 1 unless stated, 2048 tokens of context, random weights of the real shapes. "
        "Acceptance is controlled: draft model and EAGLE head have a set error rate, and so has the oracle, whose "
        "drafts take no time. For qwen it is replayed from a recorded pair. Tokens/s exclude the prompt; ratios are to "
        "baselines of the same run:"
    )
    return [note, "", *columns(found, heads)] if found else []


def demo_table(rows: list[dict]) -> list[str]:
    """The demo's model on its prompts: forwards and rows of each method, and its speed against two baselines, with the
    extremes."""

    def ratio(row: dict, against: str) -> str:
        low, high = row[f"ratio_{against}_range"]
        return f"{row[f'ratio_{against}']:.2f} ({low:.2f} to {high:.2f})"

    found = having(Rows(rows, "cpu").rows, "demo", "ratio_plain_range")
    if not found:
        return []
    heads = {
        "prompt, new tokens": lambda row: f"{row['shapes']['prompt']}, {row['shapes']['new_tokens']}",
        "method": lambda row: row["provider"],
        "forwards": lambda row: row["forwards"],
        "rows": lambda row: row["rows"],
        "host reads a round": lambda row: number(row["host_reads"]),
        "× plain": lambda row: ratio(row, "plain"),
        "× transformers' lookup": lambda row: ratio(row, "lookup"),
    }
    model, pairs = f"{found[0]['shapes']['model']}, {found[0]['dtype']}", found[0]["pairs"]
    note = (
        f"{model}, greedy, batch 1; all texts equal those of plain decoding. Forwards of the target and their rows, "
        f"without the prompt's, and speed (median of {pairs} alternating runs, and the extremes). “no hope” is the "
        "chat prompt with a drafter that is never right."
    )
    return [note, "", *columns(found, heads)]


def cpu_ratios(rows: list[dict]) -> list[str]:
    """Speedups of a tiny random model over our plain decoding on a CPU, by acceptance length."""
    found = Rows(rows, "cpu").find("generate", "ours, oracle", case="acceptance")
    points = [(row["acceptance_length"], row["ratio"]["ours, plain"]) for row in found if "ours, plain" in row["ratio"]]
    if not points:
        return []
    text = ", ".join(f"{length:.2f} → {ratio:.2f} ×" for length, ratio in sorted(points))
    median = statistics.median(row["shapes"]["N"] for row in found)
    return [f"Tiny random model, controlled acceptance, N = {median:g}, acceptance length → speedup: {text}.", ""]


def with_table(text: str, lines: list[str]) -> str:
    """`text` with `lines` between its markers.

    Raises:
        ValueError: the text has no markers.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"report: the text must have the markers {BEGIN} and {END}")
    body = "\n".join(lines).strip("\n")
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def combine(folder: pathlib.Path, run: pathlib.Path) -> None:
    """Add the rows of `run` to those of `folder`; they replace rows of the same bench, provider and shapes. A step
    takes the state of the later run, and its commit names both.

    Raises:
        ValueError: the rows are of another device or of a rehearsal.
    """
    results, later = Results(folder), Results(run)
    devices = {row["device"] for row in results.rows + later.rows}
    if len(devices) > 1 or any(row["size"] == "rehearsal" for row in later.rows):
        raise ValueError(f"report: --add wants rows of one device, and no rehearsal, got {', '.join(sorted(devices))}")
    for row in later.rows:
        if row["bench"] not in UNSHARED:
            results.add(row)
    for bench, state in later.steps.items():
        if bench not in UNSHARED:
            earlier = results.steps.get(bench, {}).get("commit", "").split(", ")
            commits = [*(commit for commit in earlier if commit not in ("", state["commit"])), state["commit"]]
            results.steps[bench] = {**state, "commit": ", ".join(commits)}
    results.save()


def measured_folders() -> list[pathlib.Path]:
    return sorted(file.parent for file in RESULTS.glob(f"*/{ROWS}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, nargs="?", help="folder with a rows.json")
    parser.add_argument("--docs", action="store_true", help=f"rewrite the tables of {PAGE.relative_to(ROOT)}")
    parser.add_argument("--add", type=pathlib.Path, metavar="RUN", help="folder of a later run; its rows are added")
    options = parser.parse_args()
    if options.docs == (options.folder is not None):
        parser.error("give either a folder or --docs")
    if options.docs:
        PAGE.write_text(with_table(PAGE.read_text(), page_lines(measured_folders())))
        return 0
    for folder in [options.folder, *([options.add] if options.add else [])]:
        if not (folder / ROWS).exists():
            print(f"report: wanted a folder with a {ROWS}, got {folder}", file=sys.stderr)
            return 2
    if options.add:
        try:
            combine(options.folder, options.add)
        except ValueError as refusal:
            print(refusal, file=sys.stderr)
            return 2
    results = Results(options.folder)
    print("\n".join(short(results.rows, results.steps)), flush=True)
    report(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
