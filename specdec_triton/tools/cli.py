"""The command `specdec-triton`: demo, generate, prove, bench, profile, inspect, plan, models, doctor."""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import TextStreamer

import specdec_triton as sdt

from .. import ops
from ..engine.graph_runner import LAG, MAX_SHAPES, cannot_capture
from ..ops.rules import CHAIN_RULES, LOSSY_RULES, RULES
from . import inspection, models, plan, profiling, prompts
from .calibration import calibrate
from .check_distribution import exact_distribution, prove
from .provenance import bench_folder, version
from .roofline import GPUS, shape_of

PACKAGES = ("torch", "triton", "transformers", "numpy", "gguf", "platformdirs", "rich")
MISSING = "not installed"
PROMPT_LOOKUP = 10
INTERRUPTED = 130
PROOF_ROWS = 500  # sampled in a batch
BENCHES = {
    "kernels": ("tree_attention", "accept", "accept_sample", "compact"),
    "generate": ("generate",),
    "round": ("round",),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (the demo's texts or a proof's counts differ), 2 (an error),
    130 (interrupted)."""
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
        prog="specdec-triton", description="Speculative decoding for Hugging Face models: the same text, sooner."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, help, *options) in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        for option in options:
            exclusive = isinstance(option, list)
            group = command.add_mutually_exclusive_group() if exclusive else command
            for flag, settings in option if exclusive else [option]:
                group.add_argument(flag, **settings)
    return parser


def _option(flag: str, help: str = "", **settings) -> tuple[str, dict]:
    """Arguments of `add_argument`; the help names a default."""
    shows_default = settings.get("default") not in (None, "")
    return flag, settings | {"help": f"{help} (%(default)s)".strip() if shows_default else help}


def _count(flag: str, default: int, help: str = "", metavar: str = "N") -> tuple[str, dict]:
    return _option(flag, help, type=positive_int, default=default, metavar=metavar)


def _dtype(args: argparse.Namespace, device: torch.device) -> str:
    return args.dtype if args.dtype != "auto" else {"cuda": "bfloat16"}.get(device.type, "float32")


def _load(role: str, name: str, dtype: str, device: torch.device, more: str = ""):
    """The model on the device, and its tokenizer; says which model was loaded."""
    model, tokenizer, description = models.load(name, dtype, _say)
    _say(f"{role}: {description}{more}")
    return model.to(device), tokenizer


def _prompt(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _demo(args: argparse.Namespace) -> int:
    _require_rich()
    from . import demo

    return demo.run(args.model, args.dtype, args.max_new_tokens)


def _generate(args: argparse.Namespace) -> int:
    device = models.default_device()
    dtype, prompt = _dtype(args, device), _prompt(args.prompt)
    model, tokenizer = _load("model", args.model, dtype, device, f", {dtype}, {device}")
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    speculation = nullcontext()
    if args.draft:
        speculation = sdt.patched(model, drafter=sdt.ModelDrafter(_load("draft", args.draft, dtype, device)[0]))
    elif not args.plain:
        speculation = sdt.patched(model)
        options["prompt_lookup_num_tokens"] = args.prompt_lookup or PROMPT_LOOKUP

    inputs = models.encode_chat(tokenizer, prompt, device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    with speculation:
        output = model.generate(**inputs, **options, streamer=streamer)
    seconds = time.perf_counter() - start

    emitted = output.shape[1] - inputs["input_ids"].shape[1]
    _say(f"\n{emitted} tokens in {seconds:.2f} s: {emitted / seconds:.1f} tokens/s")
    if not args.plain:
        _say(_stats_lines(sdt.stats(model)))
    return 0


def _prove(args: argparse.Namespace) -> int:
    if args.tree < 2 or args.tokens < 2:
        raise ValueError("--tree and --tokens must be at least 2: nothing would be drafted and verified otherwise")
    device = models.default_device()
    if args.model:
        model, tokenizer = _load("target", args.model, args.dtype, device)
        input_ids = tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(device)
    else:
        model, input_ids = models.tiny().to(device), torch.tensor([[3, 4, 5, 3]], device=device)
        _say("target: a tiny random Llama (no --model)")
    layers = max(model.config.get_text_config().num_hidden_layers // 2, 1)
    if args.draft:
        draft, _ = _load("draft", args.draft, args.dtype, device)
    else:
        _say(f"draft: the first {layers} layers of the target (no --draft)")
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
    exact = exact_distribution(model, input_ids, args.tokens, **options)
    print(f"{'rule':12}outcomes  total variation (of honest samples)   p-value  acceptance length")
    agrees = True
    for rule in RULES if args.rule == "all" else [args.rule]:
        tree = _bushy(args.tree) if rule not in CHAIN_RULES else args.tree
        drafter = sdt.ModelDrafter(draft, tree=tree) if args.draft else sdt.EarlyExitDrafter(layers, tree=tree)
        found = prove(
            model, drafter, rule, input_ids,
            tokens=args.tokens, samples=args.samples, rows=PROOF_ROWS, seed=args.seed, exact=exact, **options,
        )  # fmt: skip
        low, high = found.null
        verdict = "agrees" if found.agrees else "DIFFERS"
        if rule in LOSSY_RULES:
            verdict += " (lossy by design)"
        print(
            f"{rule:12}{found.outcomes:8}  {found.cell.distance:.4f}          ({low:.4f} to {high:.4f})   "
            f"{found.cell.p_value:7.2g}  {found.acceptance_length:17.2f}  {verdict}"
        )
        agrees &= found.agrees != (rule in LOSSY_RULES)
    return 0 if agrees else 1


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
    device = models.default_device()
    dtype = _dtype(args, device)
    name = models.find_default_model(args.model, dtype)
    model, tokenizer = _load("model", name, dtype, device, f", {dtype}, {device}")
    draft, drafter = None, sdt.PromptLookupDrafter(args.prompt_lookup or PROMPT_LOOKUP)
    if args.draft:
        draft, _ = _load("draft", args.draft, dtype, device)
        drafter = sdt.ModelDrafter(draft)
    prompt = prompts.CODE_EDIT if args.prompt is None else _prompt(args.prompt)
    inputs = models.encode_chat(tokenizer, prompt, device)
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    with sdt.patched(model, drafter=drafter):
        model.generate(**inputs, **options)  # warms up
        found = profiling.profile_rounds(
            lambda: model.generate(**inputs, **options), device, args.out and args.out / "trace.json"
        )
    report = _profile_report(model, draft, found, inputs["input_ids"].shape[1])
    if args.out:
        (args.out / "profile.json").write_text(json.dumps(report, indent=1) + "\n")
        _say(f"{args.out / 'profile.json'}; {args.out / 'trace.json'} opens in https://ui.perfetto.dev")
    print(json.dumps(report) if args.json else _profile_text(report))
    return 0


def _profile_report(model, draft, found: profiling.Profile, prompt_length: int) -> dict:
    stats, ceilings = sdt.stats(model), calibrate(found.device)
    context = prompt_length + stats.emitted / 2
    drafting = (shape_of(draft), found.depth) if draft else ()
    return {
        "device": _describe(found.device),
        **{name: version(name, MISSING) for name in ("torch", "triton", "transformers")},
        "ceilings": ceilings,
        "nodes": round(found.nodes, 2),
        "acceptance_length": round(stats.acceptance_length, 3),
        # both drafters make chains, whose accepted keys are in place
        **profiling.summary_row(found, ceilings, shape_of(model), 1, found.nodes, context, *drafting),
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
    lines.append(f"{'round':10}{report['p50_us']:10.1f}  ({report['p20_us']:.1f} to {report['p80_us']:.1f})")
    words = {
        "rounds": "rounds", "nodes": "nodes a round", "acceptance_length": "acceptance length", "eta": "eta",
        "host_reads": "host reads a round", "host_us": "host work a round, µs", "wait_us": "waits a round, µs",
        "kernels": "kernels a round", "idle_share": "GPU idle share", "tokens_per_joule": "tokens per joule",
    }  # fmt: skip
    for name, what in words.items():
        lines.append(f"{what}: {'not measured here' if report[name] is None else report[name]}")
    return "\n".join(lines)


def _bushy(nodes: int) -> sdt.Topology:
    """Two children a node, so that a second sibling is tried; level by level, cut at so many nodes."""
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
    rows = [("python", platform.python_version()), ("specdec-triton", version("specdec-triton", MISSING))]
    rows += [(name, version(name, MISSING)) for name in PACKAGES]
    rows.append(("device", _describe(device)))
    rows.append(("demo's model", models.find_default_model()))
    for op in ops.OPS:
        name, reason = ops.implementation(op, device)
        rows.append((op, f"{name} ({reason})"))
    lag = LAG.get(device.type, 0)
    graphs = f"captured, at most {MAX_SHAPES} shapes at a time; the host looks {lag} round back"
    rows.append(("CUDA graphs", cannot_capture(device) or graphs))
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:{width}}  {text}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    _require_rich()
    from rich.console import Console
    from rich.progress import Progress

    arch = int(args.arch.removeprefix("sm_"))
    only = f"^{args.op}/" if args.op else ""
    total = inspection.num_steps(arch, only)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"compiling for {args.arch}", total=total)
        table = inspection.compile_table(arch, only, progress=lambda: progress.advance(task))
    rows = [inspection.describe(name, row, arch) for name, row in table.items()]
    if args.json:
        print(json.dumps({"arch": args.arch, "rows": rows}))
    else:
        # narrower, nothing could be read; a terminal folds the lines
        Console(width=inspection.TABLE_WIDTH).print(inspection.as_table(rows, arch))
    return 0


def _plan(args: argparse.Namespace) -> int:
    planner = plan.Planner(plan.Request(*(getattr(args, name) for name in plan.Request._fields)))
    if args.plot:
        planner.check_plot(args.plot)
    found = planner.plan()
    if args.json:
        print(json.dumps(planner.report(found)))
    else:
        _require_rich()
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


def _require_rich() -> None:
    if importlib.util.find_spec("rich") is None:
        raise ImportError("needs the package rich: pip install 'specdec-triton[demo]'")


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"no GPU; CPU with {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    return (
        f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    )


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be probabilities separated by commas, such as 0.8 or 0.6,0.2, got {text!r}"
        ) from None


def _say(line: str) -> None:
    # standard output carries the generated text and nothing else
    print(line, file=sys.stderr)


MODEL = "hub name, local folder or .gguf file"
CONFIG = f"a model folder, a config.json, a hub name, or one of {', '.join(plan.PRESETS)}"
BITS = "a weight, scales included, if it is quantized"
AUTO_DTYPE = "auto: bfloat16 on a GPU, float32 without one"
OWN_DTYPE = _option("--dtype", "of the weights", choices=models.DTYPES, default="float32")
AUTOMATIC_DTYPE = _option("--dtype", AUTO_DTYPE, choices=["auto", *models.DTYPES], default="auto")
DRAFTING = [
    _option("--draft", f"a smaller model that drafts: {MODEL}", metavar="MODEL"),
    _option(
        "--prompt-lookup", f"draft up to N tokens from the text so far (the default, with N = {PROMPT_LOOKUP})",
        type=positive_int, metavar="N",
    ),
]  # fmt: skip
# name: function, help and options; the options of a list exclude one another
COMMANDS = {
    "demo": (
        _demo, "a real model with and without speculation, side by side",
        _option("--model", f"{MODEL} (default: SmolLM2-135M-Instruct, wherever it can be had)"),
        _count("--max-new-tokens", 256, "of the code edit"),
        OWN_DTYPE,
    ),
    "generate": (
        _generate, "answer one prompt, streamed",
        _option("--model", MODEL, required=True),
        _option("--prompt", "the text, or - to read it from standard input", required=True),
        [*DRAFTING, _option("--plain", "no speculation", action="store_true")],
        _count("--max-new-tokens", 256),
        AUTOMATIC_DTYPE,
    ),
    "prove": (
        _prove, "sample with speculation and hold the counts against the exact distribution",
        _option("--rule", "acceptance rule; typical must fail", choices=[*RULES, "all"], default="coupled"),
        _option("--model", f"the target (default: a tiny random one): {MODEL}"),
        _option("--draft", f"drafts (default: the target's first half): {MODEL}"),
        _option("--prompt", "what is continued", default="The quick brown"),
        _count("--tree", 5, "nodes, the root too"),
        _count("--tokens", 3, "to sample", "L"),
        _count("--samples", 2000),
        _option("--temperature", type=float, default=1.0),
        _count("--top-k", 4, "keeps the enumeration small", None),
        _option("--top-p", type=float, default=1.0),
        _option("--min-p", "(off)", type=float),
        _option("--seed", type=int, default=0),
        OWN_DTYPE,
    ),
    "bench": (
        _bench, "the benchmarks of a checkout: kernels, generate, round",
        _option("what", choices=BENCHES),
        _option("--out", "folder of rows and report", type=Path, default=Path("bench-results")),
        _option("--budget", "for each bench; then it can be continued", type=float, metavar="SECONDS"),
        _option("--rehearse", "tiny sizes, numbers that mean nothing", action="store_true"),
    ),
    "profile": (
        _profile, "where the time of a round goes, against its floor",
        _option("--model", f"the target (default: the demo's): {MODEL}"),
        _option("--prompt", "the text, or - to read it from standard input (default: the demo's edit)"),
        DRAFTING,
        _count("--max-new-tokens", 64),
        AUTOMATIC_DTYPE,
        _option("--out", "for profile.json, and trace.json (for Perfetto)", type=Path, metavar="FOLDER"),
        _option("--json", "nothing but JSON on standard output", action="store_true"),
    ),
    "doctor": (_doctor, "what is installed, and which implementation each op will use"),
    "inspect": (
        _inspect, "what the compiler makes of the kernels: registers, occupancy, instructions; needs no GPU",
        _option("op", "(all)", nargs="?", choices=inspection.OPS),
        _option("--arch", choices=[f"sm_{arch}" for arch in inspection.ARCHES], default="sm_90"),
        _option("--json", "rows on standard output, nothing else", action="store_true"),
    ),
    "plan": (
        _plan, "predict from shapes whether speculation pays for a pair on a device",
        _option("--target", CONFIG, required=True, metavar="CONFIG"),
        _option("--draft", "the same, or none: drafting is free", required=True, metavar="CONFIG"),
        _option(
            "--device", "a GPU, by its calibration or datasheet; cpu: forwards are timed here", required=True,
            choices=[*GPUS, "cpu"],
        ),
        _option(
            "--acceptance", required=True, type=_numbers, metavar="P[,P...]",
            help="probability that a draft token is accepted, its parent being so; several, by rank, allow a tree",
        ),
        _count("--batch", 1, "sequences"),
        _count("--context", 2048, "tokens"),
        _option("--dtype", choices=plan.DTYPES, default="bf16"),
        _count("--max-depth", plan.MAX_DEPTH, "of the tree", "D"),
        _option("--target-bits", BITS, type=_positive, metavar="BITS"),
        _option("--draft-bits", BITS, type=_positive, metavar="BITS"),
        _option("--overhead-us", "of a round, beside its forwards", type=_positive, default=0.0, metavar="US"),
        _option("--calibration", "of specdec_triton.tools.calibration", type=Path, metavar="FILE"),
        _option("--json", "on standard output, nothing else", action="store_true"),
        _option("--plot", "speedup against acceptance, by batch", type=Path, metavar="FILE"),
    ),
    "models": (
        _models, "try every model type of transformers, each built tiny; or make the page",
        _option("--mapping", choices=["causal", "image-text", "all"], default="all"),
        _option("--filter", "only types and classes with this in their name", default="", metavar="NAME"),
        _option("--json", "for the rows", type=Path, metavar="FILE"),
        _option("--rows", "of files of rows: try nothing, make --page of them", type=Path, metavar="FOLDER"),
        _option("--page", "Markdown: exact, refused and why, by version", type=Path, metavar="FILE"),
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
