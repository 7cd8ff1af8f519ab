"""Files of rows of a walk through transformers' model types, and the page made from them."""

import datetime
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers

from .provenance import commit
from .support import EXACT, MAPPINGS, NOT_BUILT, REFUSED, Kind, Outcome

TITLES = {"causal": "Decoders", "image-text": "Vision-language models, with text alone"}
INTRODUCTION = """# Supported models

Every model type of transformers' `{causal}` and of its `{image}`, built tiny with random
weights and tried in fp32 on a CPU, greedily, with a left-padded batch of two and with one sequence. *Exact* means that
every token is plain `generate`'s with three drafters (prompt lookup; a tree that is right half of the time; a draft
model), of which drafts were accepted and rejected. The tree and the draft model also run with
[fused layers](fused_layers.md). Texts are longer than every window and chunk. Vision-language models get text alone; a
call with images is refused by name. `patch` refuses a model if it finds a reason why its text would not be exact.

This page is made of measured rows:

```
specdec-triton models --json bench/results/models/NAME.json                       # tries all, minutes
specdec-triton models --rows bench/results/models --page docs/supported_models.md # makes the page
```
"""


def record(found: Iterable[tuple[Kind, Outcome]], report: Callable[[str], None]) -> dict:
    """The rows of a walk and their origin; `report` is called with a line for each type."""
    start, rows = time.perf_counter(), []
    for kind, outcome in found:
        row = {"type": kind.model_type, "model": kind.model, "mapping": kind.mapping, "outcome": outcome.word}
        rows.append(row | ({"reason": outcome.reason} if outcome.reason else {}))
        report(f"{kind.mapping:10} {kind.model_type:28} {outcome.word}{f': {outcome.reason}' * bool(outcome.reason)}")
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }


def write(walked: dict, file: Path) -> None:
    """Write a file with one row a line."""
    head = json.dumps({name: value for name, value in walked.items() if name != "rows"})
    rows = ",\n".join(json.dumps(row) for row in walked["rows"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{head[:-1]}, "rows": [\n{rows}\n]}}\n')


def read(folder: Path) -> list[dict]:
    """The files of a folder, sorted by version of transformers.

    Raises:
        ValueError: the folder has none.
    """
    files = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    if not files:
        raise ValueError(f"models: rows must be a folder with files of --json, got none in {folder}")
    return sorted(files, key=lambda walked: [int(part) for part in re.findall(r"\d+", walked["transformers"])])


def counts(walked: dict) -> str:
    """A line for each mapping: the number of each outcome."""
    lines = []
    for mapping in MAPPINGS:
        found = Counter(row["outcome"] for row in walked["rows"] if row["mapping"] == mapping)
        if found:
            lines.append(f"{mapping}: {', '.join(f'{number} {word}' for word, number in found.most_common())}")
    return "\n".join(lines)


def page(walks: list[dict]) -> str:
    """The page in Markdown, from walks under several versions of transformers, the newest last."""
    versions = [walked["transformers"] for walked in walks]
    lines = [INTRODUCTION.format(causal=MAPPINGS["causal"], image=MAPPINGS["image-text"])]
    lines += [*_table(["transformers", "torch", "date", "commit", *TITLES.values()])]
    for walked in walks:
        shares = [_share(walked, mapping) for mapping in TITLES]
        origin = [walked[name] for name in ("transformers", "torch", "date", "commit")]
        lines += [_line([*origin, *shares])]
    for mapping, title in TITLES.items():
        lines += ["", f"## {title}", *_sections(walks, versions, mapping)]
    return "\n".join(lines) + "\n"


def _sections(walks: list[dict], versions: list[str], mapping: str) -> list[str]:
    by_type: dict[str, list[dict | None]] = defaultdict(lambda: [None] * len(walks))
    for at, walked in enumerate(walks):
        for row in walked["rows"]:
            if row["mapping"] == mapping:
                by_type[row["type"]][at] = row
    always, mixed, groups = [], [], {REFUSED: defaultdict(list), NOT_BUILT: defaultdict(list)}
    for kind, rows in sorted(by_type.items()):
        words = [row["outcome"] if row else "not in it" for row in rows]
        last = next(row for row in reversed(rows) if row)
        if set(words) <= {EXACT, "not in it"}:
            since = next(version for version, word in zip(versions, words, strict=True) if word == EXACT)
            always.append(f"`{kind}`" + (f" (since {since})" if since != versions[0] else ""))
        elif last["outcome"] in groups and set(words) <= {last["outcome"], "not in it"}:
            groups[last["outcome"]][last["reason"]].append(f"`{kind}`")
        else:
            mixed.append([f"`{kind}`", *(word if word in (EXACT, "not in it") else f"**{word}**" for word in words)])
    lines = ["", f"### Exact ({len(always)})", "", ", ".join(always)]
    if mixed:
        lines += ["", "### Not the same in every version", "", *_table(["type", *versions]), *map(_line, mixed)]
    heads = {REFUSED: ["a model must", "refused"], NOT_BUILT: ["no plain text of a tiny model, because", "not built"]}
    for word, by_reason in groups.items():
        if by_reason:
            number = sum(map(len, by_reason.values()))
            lines += ["", f"### {word.capitalize()} ({number})", "", *_table(heads[word])]
            lines += [_line([_escaped(reason), ", ".join(kinds)]) for reason, kinds in sorted(by_reason.items())]
    return lines


def _share(walked: dict, mapping: str) -> str:
    words = [row["outcome"] for row in walked["rows"] if row["mapping"] == mapping]
    return f"{words.count(EXACT)} of {len(words)} exact"


def _table(heads: list[str]) -> list[str]:
    return [_line(heads), _line(["---"] * len(heads))]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
