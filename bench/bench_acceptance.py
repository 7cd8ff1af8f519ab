"""Measures the tokens a round of a real target and draft, and checks that the text is plain `generate`'s.

    python bench/bench_acceptance.py TARGET DRAFT --prompts prompts.jsonl --out bench/results/acceptance.json

Acceptance does not depend on the machine, so a CPU can measure it, and no times are reported. The prompts file has a
line of JSON for each prompt: id, task, prompt. Finished prompts in `--out` are kept, so a run can be continued.
`--translate` is for a draft with another tokenizer. It also measures the assisted generation of transformers, in tokens
per forward of the target; its first forward computes the prompt as well.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from _common import provenance
from rich.progress import track

import specdec_triton as sdt
from specdec_triton.drafters.vocabulary import VocabularyMap
from specdec_triton.tools import models
from specdec_triton.tools.host_sync import count_forwards

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


def measure(target, draft, tokenizer, prompt: str, max_new_tokens: int, translation: dict) -> dict:
    """Acceptance of each draft on one prompt.

    Args:
        translation: the arguments `tokenizer` and `assistant_tokenizer` of `ModelDrafter` and `generate`; empty if the
            draft has the target's tokenizer.
    """
    inputs = models.encode_chat(tokenizer, prompt, target.device)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens}
    plain = target.generate(**inputs, **options)
    row = {"new_tokens": plain.shape[1] - inputs["input_ids"].shape[1], "drafts": {}}
    for name, topology in DRAFTS.items():
        with sdt.patched(target, drafter=sdt.ModelDrafter(draft, tree=topology, **translation)):
            text = target.generate(**inputs, **options)
        stats = sdt.stats(target)
        row["drafts"][name] = {
            "identical": torch.equal(text, plain),
            "rounds": stats.rounds,
            "emitted_in_rounds": stats.accepted + stats.row_rounds,
            "acceptance_length": round(stats.acceptance_length, 3),
        }
    if translation:
        assistant = copy.deepcopy(draft)  # transformers may change it
        with count_forwards(target) as forwards:
            text = target.generate(**inputs, **options, assistant_model=assistant, **translation)
        row["transformers"] = {
            "identical": torch.equal(text, plain),
            "forwards": len(forwards),
            "tokens_per_forward": round((text.shape[1] - inputs["input_ids"].shape[1]) / len(forwards), 3),
        }
    return row


def shared_tokens(translation: dict) -> dict:
    """The tokens that both vocabularies have, as shares of the draft's and of the target's; empty without a
    translation."""
    if not translation:
        return {}
    vocabulary = VocabularyMap.from_tokenizers(*translation.values())
    sizes = {"draft": len(vocabulary.image), "target": len(vocabulary.counts)}
    return {"shared_tokens": {name: round(vocabulary.num_shared / size, 3) for name, size in sizes.items()}}


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
    assisted = [row for row in rows if "transformers" in row]
    if assisted:
        totals["transformers, assisted"] = {
            "identical": sum(row["transformers"]["identical"] for row in assisted),
            "prompts": len(assisted),
            "tokens_per_forward": round(
                sum(row["new_tokens"] for row in assisted) / sum(row["transformers"]["forwards"] for row in assisted), 3
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
    """The target and the draft, each with its tokenizer (None without a draft), and the report's fields about them."""
    device = models.default_device()
    target, tokenizer, _ = models.load(options.target, options.dtype)
    draft, draft_tokenizer, _ = models.load(options.draft, options.dtype) if options.draft else (None, None, None)
    names = options.names or [options.target, options.draft]
    report = dict(zip(("target", "draft"), filter(None, names), strict=False))
    report |= {"dtype": options.dtype, "max_new_tokens": options.max_new_tokens} | provenance(device)
    return target.to(device), tokenizer, draft if draft is None else draft.to(device), draft_tokenizer, report


def read_prompts(options: argparse.Namespace) -> list[dict]:
    return [json.loads(line) for line in options.prompts.read_text().splitlines()]


def rows_of(file: Path) -> list[dict]:
    """The rows of an earlier run, which is continued."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def write(file: Path, report: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = pair_parser(__doc__, count=12)
    parser.add_argument("--translate", action="store_true", help="the draft has another tokenizer than the target")
    options = parser.parse_args()
    target, tokenizer, draft, draft_tokenizer, report = loaded(options)
    translation = {"tokenizer": tokenizer, "assistant_tokenizer": draft_tokenizer} if options.translate else {}
    report |= shared_tokens(translation)
    rows = rows_of(options.out)
    done = {row["id"] for row in rows}
    for prompt in track(one_per_task(read_prompts(options), options.count), "prompts"):
        if prompt["id"] not in done:
            row = measure(target, draft, tokenizer, prompt["prompt"], options.max_new_tokens, translation)
            rows.append({"id": prompt["id"], "task": prompt["task"], **row})
            what = {"what": "acceptance of a real pair, greedy, real inputs"}
            write(options.out, what | report | {"summary": summary(rows), "rows": rows})
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
