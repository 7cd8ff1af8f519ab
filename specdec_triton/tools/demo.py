"""The demo: one model, with and without speculation, on a prompt that suits prompt lookup and on one that does not.

Three ways decode the same prompt greedily: plain `generate`, transformers' own prompt lookup, and the same call on the
patched model. Timings are paired: each pair runs all three ways, every second pair in reverse order, so that a change
of the machine's speed affects all of them. Tokens/s include the prompt's own forward.
"""

import statistics
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import specdec_triton as sdt

from . import host_sync, models, prompts
from .calibration import in_turn

PLAIN, THEIRS, OURS = "plain generate", "transformers' lookup", "specdec_triton"
LOOKUP = {"prompt_lookup_num_tokens": 10}
PAIRS = 2
CHAT_TOKENS = 64
SHOWN_LINES = 14
# a smaller speedup is reported as no gain
GAIN = 1.2


class Way(NamedTuple):
    """A way to decode: options of `patched` (None: the model as it is) and arguments of `generate`."""

    patched: dict[str, Any] | None
    generate: dict[str, Any]


WAYS = {PLAIN: Way(None, {}), THEIRS: Way(None, LOOKUP), OURS: Way({}, LOOKUP)}


@dataclass(frozen=True)
class Run:
    """One call of generate.

    Attributes:
        token_ids: that were emitted.
        seconds: wall time.
        rows: of each forward of the target that was not replayed from a CUDA graph, the prompt's first.
        forwards: of the target, the prompt's included.
    """

    token_ids: list[int]
    seconds: float
    rows: list[int]
    forwards: int

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over all forwards of the target: one definition for every way, ours and transformers'."""
        return len(self.token_ids) / self.forwards


@dataclass
class Record:
    """Measurements of one way on one prompt; `runs` has one entry for each pair, in order."""

    host_reads: float | None
    runs: list[Run] = field(default_factory=list)

    def tokens_per_second(self) -> float:
        return statistics.median(len(run.token_ids) / run.seconds for run in self.runs)

    def speedup_over(self, plain: "Record") -> float:
        """Median over pairs of the ratio of tokens/s within the pair."""
        ours, theirs = ([len(run.token_ids) / run.seconds for run in record.runs] for record in (self, plain))
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def run(model_name: str | None, dtype: str, max_new_tokens: int) -> int:
    """Load the model, compare the ways on both prompts, and print the tables. Returns 0 if speculation left both texts
    as they were, else 1."""
    console = Console(highlight=False)
    name = models.find_default_model(model_name, dtype)
    model, tokenizer, description = models.load(
        name, dtype, lambda line: console.print(line, style="dim", markup=False)
    )
    device = models.default_device()
    model.to(device)
    processor = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    console.print(f"model: {description}\n{dtype}, {device.type}, {processor}", markup=False, soft_wrap=True)
    console.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}; greedy decoding\n", markup=False
    )

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("", total=2 * len(WAYS) * (1 + PAIRS))

        @contextmanager
        def step(text: str):
            progress.update(task, description=text)
            yield
            progress.advance(task)

        edit = compare(model, tokenizer, prompts.CODE_EDIT, max_new_tokens, step)
        title = f"Code edit: most of the answer is in the prompt ({max_new_tokens} new tokens at most)"
        same = _show(console, tokenizer, title, edit)

        chat_tokens = min(CHAT_TOKENS, max_new_tokens)
        chat = compare(model, tokenizer, prompts.CHAT, chat_tokens, step)
        same &= _show(console, tokenizer, f"Free chat: nothing to look up ({chat_tokens} new tokens at most)", chat)
    console.print(_chat_verdict(chat[OURS].speedup_over(chat[PLAIN])))
    if not same and dtype != "float32":
        console.print(f"In {dtype} a near-tie between two tokens may fall the other way; compare in float32.")
    return 0 if same else 1


def compare(model, tokenizer, prompt: str, max_new_tokens: int, step) -> dict[str, Record]:
    """Decode one prompt in all ways. Host reads are counted first, which also warms up; then pairs are timed.

    `step(text)` returns a context manager around each part of the work, for a progress bar.
    """
    inputs = models.encode_chat(tokenizer, prompt, model.device)
    records = {}
    for name, way in WAYS.items():
        with step(f"{name}: warming up"):
            call = partial(generate, model, inputs, way)
            reads = host_sync.host_reads_a_forward(lambda tokens, call=call: call(max_new_tokens=tokens).forwards)
            records[name] = Record(reads)
    for name in in_turn(list(WAYS), PAIRS):
        with step(f"{name}: {len(records[name].runs) + 1} of {PAIRS}"):
            records[name].runs.append(generate(model, inputs, WAYS[name], max_new_tokens=max_new_tokens))
    return records


def generate(model, inputs, way: Way, **options) -> Run:
    """One greedy call."""
    patched = nullcontext() if way.patched is None else sdt.patched(model, **way.patched)
    with patched, host_sync.count_forwards(model) as rows:
        start = time.perf_counter()
        output = model.generate(**inputs, do_sample=False, **options, **way.generate)
        # the copy to the host waits for the GPU
        token_ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - start
    # rounds that are replayed from a CUDA graph call no forward
    forwards = len(rows) if way.patched is None else sdt.stats(model).rounds + 1
    return Run(token_ids, seconds, rows, forwards)


def _show(console: Console, tokenizer, title: str, records: dict[str, Record]) -> bool:
    """Print the table, the end of the text and the comparison; True if our token ids are plain generate's."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("tokens/s", "speedup", "target\nforwards", "tokens\na forward", "host reads\na round"):
        table.add_column(heading, justify="right", no_wrap=True)
    for way, record in records.items():
        last = record.runs[-1]
        table.add_row(
            way,
            f"{record.tokens_per_second():.1f}",
            f"{record.speedup_over(records[PLAIN]):.2f}×",
            str(last.forwards),
            f"{last.tokens_per_forward:.2f}",
            "–" if record.host_reads is None else f"{record.host_reads:.1f}",
        )
    console.print(table)
    console.print("tokens a forward: new tokens / forwards of the target, the prompt's included\n", style="dim")

    text = tokenizer.decode(records[OURS].runs[-1].token_ids, skip_special_tokens=True)
    lines = text.splitlines()
    tail = "\n".join(["…", *lines[-SHOWN_LINES:]] if len(lines) > SHOWN_LINES else lines)
    console.print(Panel(Text(tail), title="the text, its end", title_align="left", border_style="dim"))

    plain = records[PLAIN].runs[0].token_ids
    same = True
    for way in (OURS, THEIRS):
        place = next(
            (at for run in records[way].runs if (at := _first_difference(plain, run.token_ids)) is not None), None
        )
        if place is None:
            console.print(f"[bold green]identical[/]: {way}, the same {len(plain)} token ids as {PLAIN}")
        else:
            console.print(f"[bold red]DIFFERENT[/]: {way}, from new token {place} on, compared with {PLAIN}")
            same &= way != OURS
    console.print()
    return same


def _first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chat_verdict(speedup: float) -> str:
    if speedup < GAIN:
        return (
            f"Free chat repeats nothing, so prompt lookup gains nothing there: {speedup:.2f} times plain. "
            "A draft model is for that: specdec-triton generate --draft."
        )
    return f"This chat repeated itself, so prompt lookup gained here ({speedup:.2f} times plain); do not count on it."
