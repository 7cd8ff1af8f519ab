"""Measures the tokens a round of drafts that are copied from texts, and checks that the text is plain `generate`'s.

    python bench/bench_lookup.py MODEL --prompts prompts.jsonl --out lookup.json --plain plain.jsonl [--replay]

The calls have a batch of 1. Those of `repeated_edits.py` come first, then those of the prompts file, which has a line
of JSON for each prompt: id, task, prompt. One of the drafters serves all calls, in this order, so that it knows the
earlier outputs.

No times are reported or measured. By default, a drafter decides by measured times on a CPU whether a draft pays; here
it decides by the times `CPU_TIMES`, so that the counts depend on the texts alone.

With `--replay`, the texts of plain `generate` are fed through the drafters, see `replay.py`. It takes seconds and gives
the counts of real calls, also for `adaptive=False`.

A run that is stopped can be continued: finished prompts in `--out` are kept if the commit is the same, and the texts of
plain `generate` in `--plain`.
"""

import json
import time
from pathlib import Path

import torch
from bench_acceptance import loaded, one_per_task, pair_parser, read_prompts, write
from repeated_edits import PROMPTS
from replay import replay
from rich.progress import track

import specdec_triton as sdt
from specdec_triton.drafters.timed import CPU_TIMES
from specdec_triton.tools import models

ACROSS = "suffix, across calls"
COUNTS = ("rounds", "drafted", "accepted", "rows")


class Counted(sdt.Drafter):
    """Another drafter, which decides by `CPU_TIMES` whether a draft pays, if it is adaptive.

    Attributes:
        rows: number of rows in all verify forwards so far, padding included.
    """

    def __init__(self, drafter: sdt.Drafter):
        self.drafter, self.rows = drafter, 0

    def check(self, model, rule=None, tree=None):
        self.drafter.check(model, rule, tree)

    def start(self, context, tree=None):
        session = self.drafter.start(context, tree)
        if self.drafter.adaptive:
            session.times.costs = CPU_TIMES
        draft = session.draft

        def counted():
            tree = draft()
            self.rows += tree.num_nodes
            return tree

        session.draft = counted
        return session


def drafters(across: sdt.SuffixDrafter) -> dict[str, Counted]:
    """The drafters of a call, by name. `across` has served the earlier calls, and gives `adaptive`."""
    found = {
        "prompt lookup": sdt.PromptLookupDrafter(adaptive=across.adaptive),
        "suffix, within the call": sdt.SuffixDrafter(adaptive=across.adaptive),
        ACROSS: across,
    }
    return {name: Counted(drafter) for name, drafter in found.items()}


def measure(target, inputs: dict, plain: torch.Tensor, across: sdt.SuffixDrafter, max_new_tokens: int) -> dict:
    """The counts of one prompt, by drafter.

    Args:
        target: the model.
        inputs: input_ids and attention_mask, [1, tokens].
        plain: [1, tokens]. The text of plain `generate`, with the prompt.
        across: the drafter that serves all calls.
        max_new_tokens: of the call.
    """
    found = {}
    for name, drafter in drafters(across).items():
        with sdt.patched(target, drafter=drafter):
            text = target.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        stats = sdt.stats(target)
        counts = {"rounds": stats.rounds, "drafted": stats.drafted, "accepted": stats.accepted, "rows": drafter.rows}
        found[name] = {"identical": torch.equal(text, plain)} | counts
    return found


def measure_replay(inputs: dict, plain: torch.Tensor, across: sdt.SuffixDrafter, max_new_tokens: int) -> dict:
    """As `measure`, without a model."""
    prompt = inputs["input_ids"][0].tolist()
    output, found = plain[0, len(prompt) :].tolist(), {}
    for name, drafter in drafters(across).items():
        counts = replay(drafter, prompt, output, max_new_tokens)
        found[name] = counts | {"rows": drafter.rows}
    return found


def totals(rows: list[dict]) -> dict:
    """Over these prompts, by drafter: sums, tokens a round and rows a round."""
    summed = {}
    for name in rows[0]["drafters"]:
        calls = [row["drafters"][name] for row in rows]
        counts = {count: sum(call[count] for call in calls) for count in COUNTS}
        rounds = max(counts["rounds"], 1)
        # a replay compares no texts
        identical = {"identical": sum(call["identical"] for call in calls)} if "identical" in calls[0] else {}
        summed[name] = identical | {
            "tokens_a_round": round((counts["accepted"] + counts["rounds"]) / rounds, 3),
            "rows_a_round": round(counts["rows"] / rounds, 2),
            **counts,
        }
    return summed


def summary(rows: list[dict]) -> dict:
    """The totals of each task, of the repeated edits, of the other prompts and of all."""
    edits = {prompt["task"] for prompt in PROMPTS}
    groups = {task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(row["task"] for row in rows)}
    groups["repeated edits"] = [row for row in rows if row["task"] in edits]
    groups["other prompts"] = [row for row in rows if row["task"] not in edits]
    groups["all"] = rows
    return {name: {"prompts": len(group)} | totals(group) for name, group in groups.items() if group}


def table(groups: dict) -> str:
    """Tokens a round of each group of prompts, and rows a round in parentheses, as a table of Markdown."""
    names = [name for name in next(iter(groups.values())) if name != "prompts"]
    lines = [f"| prompts | number | {' | '.join(names)} |", f"| --- |{' ---: |' * (1 + len(names))}"]
    for group, found in groups.items():
        cells = (f"{found[name]['tokens_a_round']:.2f} ({found[name]['rows_a_round']:.1f})" for name in names)
        lines.append(f"| {group} | {found['prompts']} | {' | '.join(cells)} |")
    return "\n".join(lines)


class PlainTexts:
    """Texts of plain `generate` on one model, kept in a file of JSON lines."""

    def __init__(self, file: Path | None):
        self.file = file
        lines = file.read_text().splitlines() if file and file.exists() else []
        self._known = {(line["id"], line["max_new_tokens"]): line["output_ids"] for line in map(json.loads, lines)}

    def of(self, target, key: int | str, inputs: dict, max_new_tokens: int) -> torch.Tensor:
        """[1, tokens]. The prompt `inputs` and its continuation."""
        known = self._known.get((key, max_new_tokens))
        prompt = inputs["input_ids"]
        if known is not None:
            return torch.cat([prompt, torch.tensor([known], device=prompt.device)], 1)
        text = target.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        if self.file:
            output = text[0, prompt.shape[1] :].tolist()
            with self.file.open("a") as lines:
                lines.write(json.dumps({"id": key, "max_new_tokens": max_new_tokens, "output_ids": output}) + "\n")
        return text


def row_of(prompt: dict, inputs: dict, plain: torch.Tensor) -> dict:
    length = inputs["input_ids"].shape[1]
    sizes = {"prompt_tokens": length, "new_tokens": plain.shape[1] - length}
    return {"id": prompt["id"], "task": prompt["task"]} | sizes


def run(target, tokenizer, prompts: list[dict], report: dict, out: Path, plain: PlainTexts, seconds: float) -> None:
    """Measure the prompts that `out` lacks, for about so many seconds. Each prompt has its own `max_new_tokens`."""
    earlier = json.loads(out.read_text()) if out.exists() else {}
    rows = earlier["rows"] if earlier.get("commit") == report["commit"] else []
    history = out.with_suffix(".history")  # of the drafter that serves all calls
    across = sdt.SuffixDrafter.load(history) if rows else sdt.SuffixDrafter()
    begin = time.monotonic()
    for prompt in track(prompts[len(rows) :], "prompts"):
        if time.monotonic() - begin > seconds:
            return
        inputs, most = models.encode_chat(tokenizer, prompt["prompt"], target.device), prompt["max_new_tokens"]
        text = plain.of(target, prompt["id"], inputs, most)
        rows.append(row_of(prompt, inputs, text) | {"drafters": measure(target, inputs, text, across, most)})
        across.save(history)
        write(out, report | {"summary": summary(rows), "rows": rows})
    history.unlink(missing_ok=True)


def run_replay(target, tokenizer, prompts: list[dict], report: dict, out: Path, plain: PlainTexts) -> None:
    """Replay all prompts, with adaptive drafters and with others. Only the sums are kept."""
    found = {adaptive: (sdt.SuffixDrafter(adaptive=adaptive), []) for adaptive in (True, False)}
    for prompt in track(prompts, "prompts"):
        inputs, most = models.encode_chat(tokenizer, prompt["prompt"], target.device), prompt["max_new_tokens"]
        text = plain.of(target, prompt["id"], inputs, most)
        for across, rows in found.values():
            counts = measure_replay(inputs, text, across, most)
            rows.append(row_of(prompt, inputs, text) | {"drafters": counts})
    summaries = {f"adaptive={adaptive}": summary(rows) for adaptive, (_, rows) in found.items()}
    write(out, report | {"replayed": True, "summary": summaries})


def main() -> None:
    parser = pair_parser(__doc__, count=48)
    parser.add_argument("--plain", type=Path, metavar="FILE", help="file that keeps the texts of plain generate")
    parser.add_argument("--replay", action="store_true", help="run no forwards, except for plain texts")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the prompt that runs then")
    parser.add_argument("--edit-tokens", type=int, default=128, help="longest answer to a repeated edit")
    options = parser.parse_args()
    target, tokenizer, _, _, report = loaded(options)
    report = {"what": "tokens a round of drafts copied from texts, greedy, real inputs"} | report
    report["edit_tokens"] = options.edit_tokens
    prompts = [prompt | {"max_new_tokens": options.edit_tokens} for prompt in PROMPTS]
    others = one_per_task(read_prompts(options), options.count)
    prompts += [prompt | {"max_new_tokens": options.max_new_tokens} for prompt in others]
    arguments = target, tokenizer, prompts, report, options.out, PlainTexts(options.plain)
    if options.replay:
        run_replay(*arguments)
    else:
        run(*arguments, options.seconds)
    found = json.loads(options.out.read_text())["summary"]
    for groups in found.values() if options.replay else [found]:
        print(table(groups))


if __name__ == "__main__":
    main()
