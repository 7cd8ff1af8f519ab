"""Expected acceptance length of each rule, exactly and as measured, on a small world; a table and a plot.

    python -m tests.lossless.acceptance bench/results/rules

The world (a target and a draft of five tokens, as a table of logits) and the exact enumeration are those of the tests
beside this file: every draft that may be drawn and every outcome of chance, in float64. Measured: one round of the op's
reference on 20,000 rows. An acceptance length is accepted tokens + 1.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

from specdec_triton.tools.provenance import provenance

from . import test_lossless as lossless

WAYS = ("plain", "temperature", "top_k", "top_p", "min_p", "all")


def measure() -> list[dict]:
    rows = []
    for (rule, tree), options in itertools.product(lossless.DRAWN, WAYS):
        exact, _ = lossless.exactly(lossless.WIDE, rule, tree, options)
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
    """Markdown, exact (measured), a column for each kind of filters."""
    found = {(row["rule"], row["tree"], row["filters"]): row for row in rows}
    lines = [["tree", "rule", *WAYS], ["---"] * (2 + len(WAYS))]
    for rule, tree in lossless.DRAWN:
        cells = [found[rule, tree, way] for way in WAYS]
        lines.append([tree, rule, *(f"{cell['exact']:.3f} ({cell['measured']:.3f})" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "rules"  # the same rows make the same file
    plain = [row for row in rows if row["filters"] == "plain"]
    figure, axes = plt.subplots(figsize=(8, 3.5))
    places = range(len(plain))
    axes.bar(places, [row["exact"] for row in plain], color="#9ecae1", label="exact")
    errors = [3 * row["standard_error"] for row in plain]
    axes.errorbar(
        places, [row["measured"] for row in plain], errors, fmt="k.", capsize=3, label="measured, 3 standard errors"
    )
    axes.set_xticks(
        places, [f"{row['rule']}\n{row['tree'].replace(' re', chr(10) + 're')}" for row in plain], fontsize=7
    )
    axes.set_ylim(1, None)
    axes.set_ylabel("acceptance length")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = measure()
    report = {"what": "expected acceptance length by rule, exact and measured", "rows": rows}
    report |= {"samples": lossless.SAMPLES, **provenance(torch.device("cpu"))}
    (out / "acceptance.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "acceptance.md").write_text(table(rows) + "\n")
    plot(rows, out / "acceptance.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
