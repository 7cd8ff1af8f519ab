"""Tables and plots from rows, and the goals: met, missed or not measured.

    python bench/report.py FOLDER    # of one run: report.md and plots beside its rows.json; a short table on the screen
    python bench/report.py FOLDER --add RUN  # the same, after FOLDER took in the rows of a later run on the same device
    python bench/report.py --readme  # the README's table, from the rows under bench/results

Needs no torch; without matplotlib there are no plots, and the report says so. Rows of a rehearsal are shown as such,
and never count.
"""

import argparse
import collections
import importlib.util
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

from _goals import GOALS, LARGE, LLAMA, Rows
from _rows import CALIBRATION, REPLAYED, REPORT, RESULTS, ROOT, ROWS, Results

README = ROOT / "README.md"
BEGIN, END = "<!-- made by bench/report.py: begin -->", "<!-- made by bench/report.py: end -->"
STAGES = {"draft": "#9ecae1", "verify": "#3182bd", "accept": "#e6550d", "compact": "#31a354", "emit": "#756bb1"}
ROUND_COLUMNS = {"kernels": "kernels", "host reads": "host_reads", "host µs": "host_us", "waiting µs": "wait_us"}
ROUND_COLUMNS |= {"GPU idle": "idle_share"}
REST = "#d9d9d9"
MARKS = {"met": "met", "missed": "**missed**", "not measured": "not measured"}
NO_PLOTS = "matplotlib is not installed: no plots. Make them elsewhere: python bench/report.py FOLDER"
GOAL_HEADS = ("goal", "what", "wanted", "measured", "verdict")
LONGEST_REASON = 160
MOST_LINES, MOST_FAULTS, LONGEST_LINE, LONGEST_FAULT = 60, 10, 170, 320  # on the screen
KERNELS = ("tree_attention", "accept", "accept_sample", "compact")
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
    """The goals; with `size`, those that rows of this size can meet."""
    lines = []
    for check in GOALS:
        if size in (None, check.size):
            value, verdict = check.judge(rows)
            goal = f"{'≥' if check.sign == '>=' else '≤'} {check.bound:g}"
            lines.append([check.goal, check.what, goal, number(value), MARKS[verdict]])
    return lines


def goals_table(rows: list[dict], size: str | None = None) -> list[str]:
    return table(GOAL_HEADS, goals_lines(rows, size), text=(0, 1, 4))


def origin(rows: list[dict]) -> str:
    """Where rows are from, in words."""
    said = {name: sorted({row[name] for row in rows}) for name in ("device", "driver", "commit")}
    packages = ("torch", "triton", "transformers")
    versions = [f"{name} {', '.join(sorted({row[name] for row in rows}))}" for name in packages]
    dates = sorted({row["date"][:10] for row in rows})
    return (
        f"{', '.join(said['device'])}, driver {', '.join(said['driver'])}, {', '.join(versions)}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(said['commit'])}"
    )


def shown(row: dict) -> str:
    """A row's sizes, and how it ran, as a table's first cell."""
    return ", ".join(f"{name} {value}" for name, value in row["shapes"].items() if value not in (None, False))


def share(value: float) -> str:
    return f"{value:.0%}" if value <= 1 else number(value)


def kernel_table(rows: list[dict], bench: str) -> list[str]:
    """Times of each provider: median µs, p20 to p80, share of the ceiling."""
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


def generate_table(rows: list[dict]) -> list[str]:
    found = having(rows, "generate", "p50_tokens_s")
    heads = {
        "case": shown,
        "provider": lambda row: row["provider"],
        "tokens/s": lambda row: number(row["p50_tokens_s"], 4),
        "p20 to p80": lambda row: f"{number(row['p20_tokens_s'], 4)} to {number(row['p80_tokens_s'], 4)}",
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
        "Rows with an oracle or a draft of set errors have *controlled acceptance*; the oracle's draft costs nothing. "
        "*Replayed acceptance*: random weights of a real pair's sizes; the draft is wrong where the real one was. "
        "tokens/s leave out the prompt and set-up."
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
    return ["### round", "", "µs a round and of each stage, medians.", "", *columns(found, heads)] if found else []


def kernels_table(rows: list[dict]) -> list[str]:
    """The kernels of the batch-1 rounds that are replayed, by time."""
    lines = []
    for row in rows:
        if row["bench"] == "round" and row["shapes"]["B"] == 1 and row["shapes"].get("cuda_graphs"):
            lines += [
                [f"`{kernel['name']}`", row["shapes"]["N"], number(kernel["launches"]), number(kernel["us"])]
                for kernel in row.get("kernel_us", ())
            ]
    note = "Launches and µs of all of them in a round, batch 1, replayed from graphs."
    return ["### kernels of a round", "", note, "", *table(["kernel", "N", "launches", "µs"], lines)] if lines else []


def unmeasured(rows: list[dict]) -> list[str]:
    """What was wrong, what failed and what was absent, with the reason; alike ones together."""
    kinds = ("wrong", "failed", "absent", "untimed")
    counts = collections.Counter(
        (f"**{kind}**" if kind in kinds[:2] else kind, row["bench"], row["provider"], row[kind][:LONGEST_REASON])
        for kind in kinds
        for row in rows
        if kind in row
    )
    lines = [[*key, count] for key, count in counts.items()]
    return ["## Not measured", "", *table(["", "bench", "provider", "why", "rows"], lines)] if lines else []


def steps_table(steps: dict[str, dict]) -> list[str]:
    heads = ("step", "complete", "cases left", "wrong", "failed", "seconds")
    lines = [
        [name, "yes" if step["complete"] else "no", step.get("left", "–"), *(step[head] for head in heads[3:])]
        for name, step in steps.items()
    ]
    return table(heads, lines) if lines else []


def report(folder: pathlib.Path) -> None:
    """Write report.md and the plots of a folder. report.md is written before the plots, too: drawing them may fail."""
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
    said = learned(rows)
    lines += ["## What was learned", "", *(f"- {line}" for line in said), ""] if said else []
    lines += ["## Kernels", ""]
    for bench in KERNELS:
        lines += kernel_table(rows, bench)
    lines += ["## End to end", "", *generate_table(rows), *round_table(rows), *kernels_table(rows)]
    lines += unmeasured(rows)
    (folder / REPORT).write_text("\n".join(lines))
    plots = [f"![{name}]({name})" for name in draw(rows, folder)]
    lines += ["## Plots", "", *(plots or [NO_PLOTS if not has_matplotlib() else "no rows to draw"]), ""]
    (folder / REPORT).write_text("\n".join(lines))


def learned(rows: list[dict]) -> list[str]:
    """A line for each thing that was learned, alike ones together; faults are listed elsewhere."""
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
            if _is_a_goals(row["bench"], shapes):
                lines.append(
                    f"{row['bench']}, {shown(row)}: {number(row['p50_us'])} us, {row['of_ceiling']:.0%} of the ceiling"
                )
        elif row["bench"] == "round" and "stages" in row:
            stages = ", ".join(f"{name} {number(stage['us'])}" for name, stage in row["stages"].items())
            idle = "" if row["idle_share"] is None else f", idle {row['idle_share']:.0%}, {row['kernels']} kernels"
            lines.append(f"round, {shown(row)}: {number(row['p50_us'])} us: {stages}{idle}")
        elif row["bench"] == "generate" and "p50_tokens_s" in row:
            ratios = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in row["ratio"].items())
            provider = row["provider"] + ", replayed" * (row["inputs"] == REPLAYED)
            lines.append(
                f"generate, {shapes['case']}, {provider}, N {shapes['N']}: {number(row['p50_tokens_s'], 4)} "
                f"tokens/s, eta {number(row['eta'])}, tau {row['acceptance_length']}; {ratios}"
            )
    return [line[:LONGEST_LINE] for line in lines]


def _is_a_goals(bench: str, shapes: dict) -> bool:
    """Whether these are sizes that a goal asks for."""
    if bench == "tree_attention":
        llama = all(shapes[name] == size for name, size in LLAMA.items())
        return llama and shapes["context"] in (1024, 8192, 32768) and shapes["N"] in (1, 32, 64, 128)
    if bench == "compact":
        return shapes["model"] == "8B" and shapes["B"] == 1 and shapes["path"] == "spread"
    return (
        shapes["B"] == 1 and shapes["V"] == LARGE and shapes["N"] == 64 and shapes.get("rule", "coupled") == "coupled"
    )


def short(rows: list[dict], steps: dict[str, dict]) -> list[str]:
    """At most `MOST_LINES` lines. A terminal shows the last ones: goals and faults are there."""
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
    said = learned(rows)
    room = MOST_LINES - len(lines)
    if len(said) > room:
        said = [*said[: room - 1], f"and {len(said) - room + 1} lines more: see report.md"]
    return [*said, *lines]


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
    for goal, what, wanted, measured, verdict in goals_lines(rows):
        if measured == "–":
            unread.append(goal)
        else:
            lines.append(f"{goal:4} {verdict.strip('*'):7} {measured:>8} (wanted {wanted})  {what}")
    if unread:
        lines.append(f"goals not measured, or not wholly: {', '.join(dict.fromkeys(unread))}")
    return lines


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows: list[dict], folder: pathlib.Path) -> list[str]:
    """The plots that the rows allow; their file names."""
    if not has_matplotlib():
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "report"  # the same rows make the same files
    drawn = []
    for name, plot in (("bandwidth.svg", bandwidth_plot), ("speedup.svg", speedup_plot), ("round.svg", round_plot)):
        figure, axes = plt.subplots(figsize=(8, 4.5))
        if plot(rows, axes):
            where = {
                f"{row['device']}, commit {row['commit']}" + ", REHEARSAL" * (row["size"] == "rehearsal")
                for row in rows
            }
            axes.set_title("; ".join(sorted(where)), fontsize=8, loc="left")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            figure.tight_layout()
            figure.savefig(folder / name, metadata={"Date": None})
            drawn.append(name)
        plt.close(figure)
    return drawn


def bandwidth_plot(rows: list[dict], axes) -> bool:
    """Share of the ceiling against context: our kernel by N, its peers at N = 32."""
    found = [row for row in rows if row["bench"] == "tree_attention" and "p50_us" in row and row["shapes"]["B"] == 1]
    on_gpu = any(row["provider"] == "triton" for row in found)
    if on_gpu:
        found = [row for row in found if all(row["shapes"][name] == size for name, size in LLAMA.items())]
    ours = "triton" if on_gpu else "reference"
    lines = collections.defaultdict(list)
    for row in found:
        if row["provider"] == ours or row["shapes"]["N"] == 32:
            lines[row["provider"], row["shapes"]["N"]].append(row)
    for (provider, nodes), line in sorted(lines.items(), key=lambda item: (item[0][0] != ours, item[0])):
        line.sort(key=lambda row: row["shapes"]["context"])
        style = "o-" if provider == ours else "x--"
        points = [(row["shapes"]["context"], 100 * row["of_ceiling"]) for row in line]
        axes.plot(*zip(*points, strict=True), style, label=f"{provider}, N = {nodes}", markersize=4)
    if not lines:
        return False
    axes.set_xscale("log", base=2)
    contexts = sorted({row["shapes"]["context"] for line in lines.values() for row in line})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("share of the measured ceiling (%)")
    top = max(100 * row["of_ceiling"] for line in lines.values() for row in line)
    axes.set_ylim(0, 100 if on_gpu else 1.15 * top)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return True


def speedup_plot(rows: list[dict], axes) -> bool:
    """Speedup over our own plain decoding against acceptance length; what free rounds would give."""
    over = "ours, plain"
    lines = collections.defaultdict(list)
    for row in rows:
        if row["bench"] == "generate" and over in row.get("ratio", {}) and row["provider"].startswith("ours"):
            shapes = row["shapes"]
            name = f"{row['provider'].removeprefix('ours, ')}, batch {shapes['B']}, N = {shapes['N']}"
            name += " compile" * bool(shapes.get("compile"))
            name += ", no graphs" if shapes.get("cuda_graphs") is False else ""
            name += ", replayed" * (row["inputs"] == REPLAYED)
            lines[name].append((row["acceptance_length"], row["ratio"][over]))
    if not lines:
        return False
    for place, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), "osD^vP*X"[place % 8] + "-", label=name, markersize=5)
    furthest = 1.05 * max(length for points in lines.values() for length, _ in points)
    axes.plot([0, furthest], [0, furthest], ":", color="0.5", label="a round as cheap as a plain step")
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set_xlim(0, furthest)
    axes.set_ylim(0, 1.08 * max([furthest, *(ratio for points in lines.values() for _, ratio in points)]))
    axes.set_xlabel("acceptance length (tokens a round)")
    axes.set_ylabel("speedup over plain decoding (×)")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return True


def round_plot(rows: list[dict], axes) -> bool:
    """One bar a kind of round: its stages, one after another, and what lies between rounds."""
    found = [row for row in rows if row["bench"] == "round" and "stages" in row]
    if not found:
        return False
    labels = []
    for place, row in enumerate(found):
        shapes, at = row["shapes"], 0.0
        graphs = {True: ", graphs", False: ", no graphs", None: ""}[shapes.get("cuda_graphs")]
        labels.append(f"batch {shapes['B']}, N = {shapes['N']}{graphs}")
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
    return True


def readme_lines(folders: Iterator[pathlib.Path]) -> list[str]:
    """What the README says: the goals on each GPU, and on CPUs, ratios and counts alone."""
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
                lines += [f"On a CPU, {origin(measured)}:", "", *table(GOAL_HEADS, kept)]
            lines += [*demo_table(measured), *cpu_ratios(measured)] if size == "cpu" else []
            lines += [f"All rows: [`{folder.relative_to(ROOT)}`]({folder.relative_to(ROOT)}).", ""]
    if not on_gpu:
        lines = ["No GPU has been measured: there are no rows of one.", "", *lines]
    return lines


def speed_table(rows: list[dict]) -> list[str]:
    """Whole generations on a GPU: tokens a second, and how many times those of three others."""

    def way(row: dict) -> str:
        shapes = row["shapes"]
        more = ", compiled" * bool(shapes.get("compile")) + f", batch {shapes['B']}" * (shapes["B"] > 1)
        return f"{shapes['model']}, {row['provider']}{more}"

    found = having(Rows(rows, "gpu").rows, "generate", "p50_tokens_s")
    heads = {"way": way, "N": lambda row: row["shapes"]["N"]}
    heads |= {"tokens a round": lambda row: f"{row['acceptance_length']:.2f}"}
    heads |= {"tokens/s": lambda row: number(row["p50_tokens_s"])}
    for name in ("ours, plain", "transformers eager", "transformers assisted"):
        ratio = lambda row, name=name: f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "–"  # noqa: E731
        heads["× " + name.replace(",", "")] = ratio
    said = (
        "Decoding, bf16, greedy, batch 1 unless it is said, 2048 tokens of context, weights random and of the real "
        "shapes, acceptance controlled (a draft with set errors; the oracle's drafts cost nothing) or, for qwen, "
        "replayed from a recorded pair. Tokens a second without the prompt, and × three others in the same run:"
    )
    return [said, "", *columns(found, heads)] if found else []


def demo_table(rows: list[dict]) -> list[str]:
    """The demo's model on its prompts: what each way takes, and its speed against two others, with the extremes."""

    def ratio(row: dict, against: str) -> str:
        low, high = row[f"ratio_{against}_range"]
        return f"{row[f'ratio_{against}']:.2f} ({low:.2f} to {high:.2f})"

    found = having(Rows(rows, "cpu").rows, "demo", "ratio_plain_range")
    if not found:
        return []
    heads = {
        "prompt, new tokens": lambda row: f"{row['shapes']['prompt']}, {row['shapes']['new_tokens']}",
        "way": lambda row: row["provider"],
        "forwards": lambda row: row["forwards"],
        "rows": lambda row: row["rows"],
        "host reads each": lambda row: number(row["host_reads"]),
        "× plain": lambda row: ratio(row, "plain"),
        "× transformers' lookup": lambda row: ratio(row, "lookup"),
    }
    model, pairs = f"{found[0]['shapes']['model']}, {found[0]['dtype']}", found[0]["pairs"]
    said = (
        f"{model}, greedy, batch 1, all texts plain's: the target's forwards and rows after the prompt's, and speed "
        f"(median of {pairs} runs in turn, and the extremes). “no hope” is the chat prompt with a drafter that is "
        "never right."
    )
    return [said, "", *columns(found, heads)]


def cpu_ratios(rows: list[dict]) -> list[str]:
    """Speedups over our plain decoding on a CPU, by acceptance length; of a tiny random model."""
    found = Rows(rows, "cpu").find("generate", "ours, oracle", case="acceptance")
    points = [(row["acceptance_length"], row["ratio"]["ours, plain"]) for row in found if "ours, plain" in row["ratio"]]
    if not points:
        return []
    text = ", ".join(f"{length:.2f} → {ratio:.2f} ×" for length, ratio in sorted(points))
    median = statistics.median(row["shapes"]["N"] for row in found)
    return [f"Tiny random model, controlled acceptance, N = {median:g}, acceptance length → speedup: {text}.", ""]


def with_table(text: str, lines: list[str]) -> str:
    """`text` with the lines between its markers.

    Raises:
        ValueError: it has none.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"report: the text must have the markers {BEGIN} and {END}")
    body = "\n".join(lines).strip("\n")
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def combine(folder: pathlib.Path, run: pathlib.Path) -> None:
    """Take the rows of `run` into those of `folder`: they replace rows of the same bench, provider and shapes. A step's
    state is the later one; its commit names both.

    Raises:
        ValueError: the rows are of another device, or of a rehearsal.
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
    parser.add_argument("folder", type=pathlib.Path, nargs="?", help="with a rows.json")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table")
    parser.add_argument("--add", type=pathlib.Path, metavar="RUN", help="folder of a later run to take in")
    options = parser.parse_args()
    if options.readme == (options.folder is not None):
        parser.error("give a folder, or --readme")
    if options.readme:
        README.write_text(with_table(README.read_text(), readme_lines(measured_folders())))
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
