"""Measures the tokens a round of a real pair that samples, by rule, temperature and shape of the draft.

    python bench/bench_sampling.py TARGET DRAFT --prompts prompts.jsonl --out bench/results/sampling/pair.json

The prompts run as one batch, with the same seeds in every row. Acceptance does not depend on the machine, so a CPU can
measure it, and no times are reported. Rows in `--out` are kept, so a run can be continued. `--flips` counts other
numbers instead: tokens of `coupled` texts in bf16 that differ if a draft is verified, and tokens that differ between
two batch sizes without a draft.
"""

import json

import torch
from bench_acceptance import loaded, one_per_task, pair_parser, read_prompts, rows_of, write
from rich.progress import track

import specdec_triton as sdt
from specdec_triton.drafters import NoDrafter
from specdec_triton.tools import models

TEMPERATURES = (0.7, 1.0, 0.5)
CHAIN = sdt.Topology.chain(5)
TREE = sdt.Topology.from_paths([(0, 0, 0, 0, 0), (1, 0, 0), (0, 1), (2,), (0, 0, 1)])
DRAFTS = {
    ("coupled", "chain of 5"): CHAIN,
    ("rejection", "chain of 5"): CHAIN,
    ("block", "chain of 5"): CHAIN,
    ("multi_round", "tree of 11"): TREE,
    ("traversal", "tree of 11"): TREE,
    ("coupled", "tree of 11"): TREE,
}


def encode(tokenizer, prompts: list[dict], device: torch.device) -> dict[str, torch.Tensor]:
    """The prompts as one batch, padded on the left."""
    texts = [models.encode_chat(tokenizer, prompt["prompt"], device)["input_ids"][0] for prompt in prompts]
    longest = max(len(text) for text in texts)
    pad = tokenizer.pad_token_id or 0
    rows = [torch.nn.functional.pad(text, (longest - len(text), 0), value=pad) for text in texts]
    masks = [torch.arange(longest, device=device) >= longest - len(text) for text in texts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks).long()}


def measure(target, draft, inputs, rule: str, topology, temperature: float, max_new_tokens: int) -> dict:
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": max_new_tokens}
    with sdt.patched(target, drafter=sdt.ModelDrafter(draft, tree=topology), rule=rule, seed=0):
        target.generate(**inputs, **options)
    stats = sdt.stats(target)
    return {
        "nodes": topology.num_nodes,
        "acceptance_length": round(stats.acceptance_length, 3),
        "row_rounds": stats.row_rounds,
        "emitted": stats.emitted,
    }


def flips(model, inputs, max_new_tokens: int, seeds: list[int]) -> dict:
    """The share of `coupled` tokens in the model's dtype that change if several tokens are verified at a time. "null":
    the share that change if each row is decoded alone. Counted up to the first difference of each text, inclusive."""
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_new_tokens}
    prompt = inputs["input_ids"].shape[1]

    def sample(drafter, rows=slice(None)):
        with sdt.patched(model, drafter=drafter, seed=seeds[rows]):
            part = {name: value[rows] for name, value in inputs.items()}
            return model.generate(**part, **options)[:, prompt:]

    plain = sample(NoDrafter())
    drafted = sample(sdt.EarlyExitDrafter(model.config.num_hidden_layers * 3 // 4, num_tokens=4))
    acceptance_length = round(sdt.stats(model).acceptance_length, 3)
    alone = [sample(NoDrafter(), slice(row, row + 1))[0] for row in range(len(plain))]
    return {
        "drafted": _differences(plain, drafted),
        "null": _differences(plain, alone),
        "acceptance_length": acceptance_length,
    }


def _differences(texts, others) -> dict:
    flipped = compared = 0
    for text, other in zip(texts, others, strict=True):
        length = min(len(text), len(other))
        differ = (text[:length] != other[:length]).nonzero()
        flipped += len(differ) > 0
        compared += int(differ[0]) + 1 if len(differ) else length
    return {"flipped": flipped, "tokens": compared, "rate": round(flipped / compared, 5)}


def main() -> None:
    parser = pair_parser(__doc__, count=8)
    parser.add_argument("--max-prompt-tokens", type=int, default=160, help="longer prompts are left out")
    parser.add_argument("--flips", action="store_true", help="count tokens that rounding changes")
    options = parser.parse_args()
    target, tokenizer, draft, _, report = loaded(options)
    lines = read_prompts(options)
    short = [line for line in lines if len(tokenizer(line["prompt"])["input_ids"]) <= options.max_prompt_tokens]
    inputs = encode(tokenizer, one_per_task(short, options.count), target.device)
    report |= {"prompts": options.count, "max_prompt_tokens": options.max_prompt_tokens}
    if options.flips:
        report["what"] = "tokens of coupled sampling that differ when verified with a draft, and alone (null)"
        report |= flips(target, inputs, options.max_new_tokens, list(range(options.count)))
        write(options.out, report)
        print(json.dumps(report, indent=1))
        return

    report["what"] = "acceptance of a real pair, sampled, real inputs"
    rows = rows_of(options.out)
    done = {(row["rule"], row["shape"], row["temperature"]) for row in rows}
    wanted = [(*kind, temperature) for temperature in TEMPERATURES for kind in DRAFTS]
    for rule, shape, temperature in track([each for each in wanted if each not in done], "rows"):
        found = measure(target, draft, inputs, rule, DRAFTS[rule, shape], temperature, options.max_new_tokens)
        rows.append({"rule": rule, "shape": shape, "temperature": temperature, **found})
        write(options.out, report | {"rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
