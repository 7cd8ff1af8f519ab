"""Expected acceptance length of each rule, exact and measured, on a pair of table-driven models; a table and a plot.

    python -m tests.lossless.acceptance bench/results/rules         # measures; writes rows, table and plot
    python -m tests.lossless.acceptance bench/results/rules --draw  # table and plot from the rows that are there

The models (five tokens, logits from a table) and the exact values are those of the tests in this folder: every draft
and every outcome of chance is enumerated in float64. Measured values are one round of the op's reference on 20,000
rows. The acceptance length is the number of accepted tokens + 1.

"coupled", the default rule, drafts the likeliest tokens after adding the target's noise, as `ModelDrafter` does. The
other rules draw their drafts from the draft's probabilities.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

from specdec_triton.tools.provenance import provenance

from . import test_lossless as lossless

FILTERS = ("plain", "temperature", "top_k", "top_p", "min_p", "all")
TITLE = "Expected acceptance length of each rule, without filters"


def measure() -> list[dict]:
    rows = []
    for (rule, tree), options in itertools.product(lossless.MEASURED, FILTERS):
        exact = lossless.accepted(lossless.WIDE, rule, tree, options)
        accepted = lossless.run(lossless.WIDE, rule, tree, options).accepted.double()
        rows.append(
            {
                "rule": rule,
                "tree": tree,
                "filters": options,
                "exact": round(1 + float(exact), 4),
                "measured": round(1 + float(accepted.mean()), 4),
                "standard_error": round(float(accepted.std()) / len(accepted) ** 0.5, 4),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: exact (measured), a column for each kind of filters."""
    found = {(row["rule"], row["tree"], row["filters"]): row for row in rows}
    lines = [["tree", "rule", *FILTERS], ["---"] * (2 + len(FILTERS))]
    for rule, tree in dict.fromkeys((row["rule"], row["tree"]) for row in rows):
        values = [found[rule, tree, filters] for filters in FILTERS]
        lines.append([tree, rule, *(f"{value['exact']:.3f} ({value['measured']:.3f})" for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(report: dict, file: Path) -> None:
    """Draw the rows without filters to a file of any type that matplotlib writes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "rules"  # the same rows make the same file
    plain = [row for row in report["rows"] if row["filters"] == "plain"]
    figure, axes = plt.subplots(figsize=(9, 4))
    places = range(len(plain))
    colors = ["#3182bd" if row["rule"] == "coupled" else "#9ecae1" for row in plain]
    axes.bar(places, [row["exact"] for row in plain], color=colors, label='exact (darker: "coupled", the default)')
    errors = [3 * row["standard_error"] for row in plain]
    measured = [row["measured"] for row in plain]
    axes.errorbar(places, measured, errors, fmt="k.", capsize=3, label="measured, ± 3 standard errors")
    labels = ["\n".join([row["rule"], *row["tree"].split()]) for row in plain]
    axes.set_xticks(places, labels, fontsize=7)
    axes.set_ylim(0, 1.3 * max(row["exact"] for row in plain))
    axes.set_ylabel("acceptance length (tokens a round)")
    axes.set_title(TITLE, fontsize=11, loc="left", pad=18)
    origin = f"{report['device']}, commit {report['commit']}; models of five tokens, {report['samples']:,} samples"
    axes.text(0, 1.02, origin, transform=axes.transAxes, fontsize=8, color="0.4")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of acceptance.json, acceptance.md and acceptance.svg")
    parser.add_argument("--draw", action="store_true", help="measure nothing: table and plot from acceptance.json")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.draw:
        report = json.loads((out / "acceptance.json").read_text())
    else:
        report = {"what": "expected acceptance length by rule, exact and measured", "rows": measure()}
        report |= {"samples": lossless.SAMPLES, **provenance(torch.device("cpu"))}
        (out / "acceptance.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "acceptance.md").write_text(table(report["rows"]) + "\n")
    plot(report, out / "acceptance.svg")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
