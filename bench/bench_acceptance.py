"""Measures the tokens a round of a real target and draft, and checks that the text is plain `generate`'s.

    python bench/bench_acceptance.py TARGET DRAFT --prompts prompts.jsonl --out bench/results/acceptance.json

Acceptance does not depend on the machine, so a CPU can measure it, and no times are reported. The prompts file has a
line of JSON for each prompt: id, task, prompt. Finished prompts in `--out` are kept, so a run can be continued.
"""

import argparse
import json
from pathlib import Path

import torch
from _common import provenance
from rich.progress import track

import specdec_triton as sdt
from specdec_triton.tools import models

DRAFTS = {
    "chain of 5": sdt.Topology.chain(5),
    "tree of 16, by rank acceptance": sdt.Topology.from_budget(16),
    "tree of 16, 5 deep": sdt.Topology.from_paths(
        [(0, 0, 0, 0, 0), (1, 0, 0), (2, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (0, 2)]
    ),
}


def one_per_task(prompts: list[dict], count: int) -> list[dict]:
    """`count` prompts, taken from each task in turn."""
    tasks = list(dict.fromkeys(prompt["task"] for prompt in prompts))
    by_task = {task: [prompt for prompt in prompts if prompt["task"] == task] for task in tasks}
    turns = [by_task[task][turn] for turn in range(len(prompts)) for task in tasks if turn < len(by_task[task])]
    return turns[:count]


def measure(target, draft, tokenizer, prompt: str, max_new_tokens: int) -> dict:
    """Acceptance of each draft on one prompt."""
    inputs = models.encode_chat(tokenizer, prompt, target.device)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens}
    plain = target.generate(**inputs, **options)
    row = {"new_tokens": plain.shape[1] - inputs["input_ids"].shape[1], "drafts": {}}
    for name, topology in DRAFTS.items():
        with sdt.patched(target, drafter=sdt.ModelDrafter(draft, tree=topology)):
            text = target.generate(**inputs, **options)
        stats = sdt.stats(target)
        row["drafts"][name] = {
            "identical": torch.equal(text, plain),
            "rounds": stats.rounds,
            "emitted_in_rounds": stats.accepted + stats.row_rounds,
            "acceptance_length": round(stats.acceptance_length, 3),
        }
    return row


def summary(rows: list[dict]) -> dict:
    """Over all prompts: tokens a round, and the number of texts that equal plain's."""
    totals = {}
    for name in DRAFTS:
        found = [row["drafts"][name] for row in rows]
        totals[name] = {
            "nodes": DRAFTS[name].num_nodes,
            "identical": sum(each["identical"] for each in found),
            "prompts": len(found),
            "acceptance_length": round(
                sum(each["emitted_in_rounds"] for each in found) / sum(each["rounds"] for each in found), 3
            ),
        }
    return totals


def pair_parser(description: str, count: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft", nargs="?")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="official names of target and draft, for the report")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    return parser


def loaded(options: argparse.Namespace) -> tuple:
    """The target, its tokenizer, the draft (None without one), and the report's fields about them."""
    target, tokenizer, _ = models.load(options.target, options.dtype)
    draft = models.load(options.draft, options.dtype)[0].to(models.default_device()) if options.draft else None
    names = options.names or [options.target, options.draft]
    report = dict(zip(("target", "draft"), filter(None, names), strict=False))
    report |= {"dtype": options.dtype, "max_new_tokens": options.max_new_tokens}
    return target.to(models.default_device()), tokenizer, draft, report | provenance(models.default_device())


def read_prompts(options: argparse.Namespace) -> list[dict]:
    return [json.loads(line) for line in options.prompts.read_text().splitlines()]


def rows_of(file: Path) -> list[dict]:
    """The rows of an earlier run, which is continued."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def write(file: Path, report: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    options = pair_parser(__doc__, count=12).parse_args()
    target, tokenizer, draft, report = loaded(options)
    rows = rows_of(options.out)
    done = {row["id"] for row in rows}
    for prompt in track(one_per_task(read_prompts(options), options.count), "prompts"):
        if prompt["id"] not in done:
            row = measure(target, draft, tokenizer, prompt["prompt"], options.max_new_tokens)
            rows.append({"id": prompt["id"], "task": prompt["task"], **row})
            what = {"what": "acceptance of a real pair, greedy, real inputs"}
            write(options.out, what | report | {"summary": summary(rows), "rows": rows})
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
