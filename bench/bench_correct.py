"""Checks results on this device before anything is timed on it.

    python bench/bench_correct.py [--cases NAME,NAME] [--out FOLDER] [--budget SECONDS] [--rehearse]

1. tests: a selection of the tests of kernels and of captured drafts, in a separate process that runs at the same time.
2. attention: tree attention at real sizes, captured once and replayed with other lengths, against the reference.
3. text: captured and uncaptured rounds and transformers' own `generate`, greedy and with every rule, in fp32. In bf16 a
   token may differ if the target's logits are near-ties (see bench_generate).
4. recovery: after a capture that failed on purpose, the stream, the allocator, the random generator and the next call.

In a rehearsal on a CPU, simulated graphs capture rounds.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import torch
from _common import ROOT, Bench, named_cases, simulate_graphs
from _models import prompts, synthetic
from bench_generate import check
from bench_tree_attention import LLAMA, TOLERANCE, dtype_of, make_inputs, ours

import specdec_triton as sdt
from specdec_triton import ops
from specdec_triton.engine import graphs
from specdec_triton.tools import support

KERNELS = (
    "compact_kv",
    "ngram_lookup",
    "append_tokens",
    "tree_inputs",
    "draft_topk",
    "build_tree",
    "best_first_tree",
    "accept_greedy",
    "accept_sample",
    "gated_activation",
    "rms_norm",
    "rotary_and_cache",
    "tree_attention",
)
TESTS = [*(f"tests/test_kernel_{name}.py" for name in KERNELS), "tests/test_library.py", "tests/test_families.py"]
TESTS.append("tests/test_captured_drafts.py")
PROCESSES, TESTS_SECONDS = 14, 120
SUMMARY = re.compile(r"\d+ (passed|failed|errors?|tests? collected)|\d+/\d+ tests collected")
TOKENS = 48
FEW_TOKENS = 22  # on a CPU
MODELS = {"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gpt_oss": "GptOssForCausalLM"}
SEED = 2  # of weights whose greedy texts have no near tie
TREE = sdt.Topology.from_widths([3, 2, 1])
DRAFTERS = ("none", "model", "tree", "dynamic", "lookup", "oracle", "early", "skip")
SAMPLED = (("do_sample", True), ("temperature", 0.8))
FILTERED = (*SAMPLED, ("top_k", 20), ("top_p", 0.9), ("min_p", 0.02))
RULES = {"coupled": "tree", "rejection": "model", "block": "model", "multi_round": "tree", "traversal": "tree"}
RULES |= {"typical": "tree"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One check; see the module. `generate` are arguments of `generate`, `rule` is a sampling rule, `sizes` are N, S,
    Hq, Hkv, D."""

    kind: str
    family: str = ""
    drafter: str = ""
    generate: tuple[tuple[str, object], ...] = ()
    rule: str | None = None
    sizes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name for `--cases`."""
        return f"{self.kind} {self.family}".rstrip()


SIZES = [(1, 2432, *LLAMA), (8, 2432, *LLAMA), (64, 2432, *LLAMA), (128, 9088, *LLAMA), (64, 700, 14, 2, 64)]
SIZES += [(33, 4000, 8, 4, 256)]
PENALISED = (("repetition_penalty", 1.2), ("no_repeat_ngram_size", 3))
TEXTS = [Case("text", "llama", name) for name in DRAFTERS]
TEXTS += [Case("text", "llama", name, SAMPLED, rule) for rule, name in RULES.items()]
TEXTS += [Case("text", "llama", "tree", FILTERED, "coupled"), Case("text", "llama", "none", SAMPLED, "coupled")]
TEXTS += [Case("text", "llama", "tree", PENALISED)]
TEXTS += [
    Case("text", family, name) for family in ("gemma2", "gpt_oss") for name in ("model", "tree", "dynamic", "lookup")
]
TEXTS += [Case("bf16 text", drafter=name) for name in ("none", "tree", "oracle")]
LAST = Case("tests")
CASES = [*(Case("attention", sizes=sizes) for sizes in SIZES), Case("recovery"), *TEXTS, LAST]
REHEARSED = [Case("attention", sizes=(5, 70, 4, 2, 16)), Case("recovery"), TEXTS[0], TEXTS[4]]
REHEARSED += [Case("text", "llama", "tree", FILTERED, "coupled"), TEXTS[-1], LAST]


class Tests:
    """The selected tests, running in the background. In a rehearsal, the tests of one file are collected only."""

    def __init__(self, bench: Bench):
        self.log = tempfile.TemporaryFile("w+")
        tests, command = (
            TESTS,
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-m", "first_gpu"],
        )
        if bench.size != "gpu":
            command, tests = [*command, "--collect-only"], TESTS[:1]
        elif importlib.util.find_spec("xdist"):
            command += ["-n", str(PROCESSES), "--dist", "worksteal"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [*command, *tests], cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.until = time.perf_counter() + TESTS_SECONDS
        bench.on_exit = self.kill

    def kill(self) -> None:
        """End the process and all its workers: nothing may run while later steps are timed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def found(self) -> dict:
        """Wait for the tests and return pytest's summary.

        Raises:
            AssertionError: tests failed, or did not end in `TESTS_SECONDS`.
        """
        try:
            self.process.wait(max(self.until - time.perf_counter(), 1.0))
        except subprocess.TimeoutExpired:
            self.kill()
        self.log.seek(0)
        lines = self.log.read().splitlines()
        print("\n".join(lines[-200:]), flush=True)
        summaries = [line.strip("= ") for line in lines if SUMMARY.search(line)]
        status = self.process.returncode
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        assert status == 0, "; ".join([f"exit status {status}", *summaries[-1:], *wrong[:12]])
        return {"said": summaries[-1]}


def measure(bench: Bench, case: Case, tests: Tests | None) -> None:
    kinds = {"attention": attention, "text": text, "bf16 text": rounded_text, "recovery": recovery}
    found = {}
    with bench.guarded(found):
        found |= tests.found() if case == LAST else kinds[case.kind](bench.device, case)
    fields = {name: value for name, value in dataclasses.asdict(case).items() if value and name != "kind"}
    bench.add(case.kind, fields, "bf16" if case.kind in ("attention", "bf16 text") else "fp32", found)


def attention(device: torch.device, case: Case) -> dict:
    """Captured once, replayed with other lengths."""
    nodes, slots, *heads = case.sizes
    dtype, room = dtype_of(device)[1], slots - nodes
    inputs = make_inputs(2, *heads, room, nodes, dtype, device)
    packed = inputs["packed_tree"]

    def call_without_waits() -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return ours(inputs, "triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    out = ours(inputs, "triton")
    if device.type == "cuda":
        graph, out = graphs.capture(call_without_waits)
        replay = graph.replay
    else:

        def replay() -> None:
            out.copy_(ours(inputs, "triton"))

    worst = 0.0
    for lengths in ((room, room // 3), (min(64, room), min(65, room)), (1, room // 2), (0, room)):
        packed[..., -2], packed[..., -1] = 0, torch.tensor(lengths, device=device)[:, None]
        replay()
        worst = max(worst, (out.float() - ours(inputs, "reference").float()).abs().max().item())
    assert worst <= TOLERANCE[dtype], f"differs from the reference by {worst}"
    return {"said": f"worst difference {worst:.1e}"}


def made(family: str, device: torch.device, noise: float = 0.0):
    """A tiny model; with noise on its weights, a draft that is sometimes right."""
    model = support.build(support.Kind(family, MODELS[family], "causal"), SEED)
    model = support.noisy(model, noise).to(device)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # some releases drop the softcap under sdpa
    if "grouped_mm" in model.get_experts_implementation().values():
        model.set_experts_implementation("batched_mm")  # an fp32 grouped product cannot be captured
    return model


def oracle(plain: torch.Tensor, errors: float = 0.3) -> sdt.OracleDrafter:
    return sdt.OracleDrafter(torch.nn.functional.pad(plain, (0, TOKENS)), errors, tree=TREE)


def drafter_of(name: str, family: str, plain: torch.Tensor) -> sdt.Drafter | None:
    draft = functools.partial(made, family, plain.device, 0.05)
    return {
        "none": lambda: None,
        "model": lambda: sdt.ModelDrafter(draft(), num_tokens=3),
        "tree": lambda: sdt.ModelDrafter(draft(), tree=TREE),
        "dynamic": lambda: sdt.ModelDrafter(draft(), tree=sdt.DynamicTree(9, 3, 3)),
        "lookup": lambda: sdt.PromptLookupDrafter(branches=2),
        "oracle": lambda: oracle(plain),
        "early": lambda: sdt.EarlyExitDrafter(1, num_tokens=3),
        "skip": lambda: sdt.EarlyExitDrafter(skip=[1], num_tokens=3),
    }[name]()


def tokens_on(device: torch.device) -> int:
    return TOKENS if device.type == "cuda" else FEW_TOKENS


@functools.lru_cache(maxsize=1)
def target_of(family: str, device: torch.device) -> tuple:
    """The model, arguments of `generate`, and the greedy text of transformers."""
    model = made(family, device)
    inputs = {name: tensor.to(device) for name, tensor in support.padded_prompt(3).items()}
    inputs |= support.GREEDY | {"max_new_tokens": tokens_on(device)}
    return model, inputs, model.generate(**inputs)


def text(device: torch.device, case: Case) -> dict:
    model, inputs, plain = target_of(case.family, device)
    options = {"rule": case.rule, "seed": 3} if case.rule else {}
    inputs = {**inputs, **dict(case.generate)}
    texts, stats = {}, {}
    for captured in ("auto", False):
        drafter = drafter_of(case.drafter, case.family, plain)
        custom = sdt.SpeculativeGenerate(drafter=drafter, cuda_graphs=captured, **options)
        texts[captured] = model.generate(**inputs, custom_generate=custom)
        stats[captured] = sdt.stats(model)
        if captured:
            texts["reused"] = model.generate(**inputs, custom_generate=custom)
            stats["reused"] = sdt.stats(model)
    wanted = texts[False] if case.rule else model.generate(**inputs) if case.generate else plain
    # drafts near the end are cut only in uncaptured rounds, which changes the last tokens of a sampled text
    columns = slice(None, -4 if case.rule else None)
    for captured, found in texts.items():
        same = torch.equal(found[:, columns], wanted[:, columns])
        assert same, (
            f"cuda_graphs={captured} writes another text than {'uncaptured rounds' if case.rule else 'generate'}"
        )
    reused = stats["reused"].reused
    assert reused or case.generate, "the second call replays no graph of the first"
    found = graphs_in_words(stats["auto"])
    return found | {"said": f"{found['said']}; the next call reuses {reused} graphs"}


def graphs_in_words(stats: sdt.Stats) -> dict:
    """Counts of captured rounds and of fused modules, in words.

    Raises:
        AssertionError: no round was replayed.
    """
    assert stats.replayed, f"no round was replayed: {stats.why_eager}"
    tokens = f"{stats.acceptance_length:.2f} tokens each"
    said = f"{stats.rounds} rounds, {tokens}, {stats.captured} graphs, {stats.replayed} replays"
    return {"said": f"{said}, {sum(stats.fused.values())} modules fused"}


def rounded_text(device: torch.device, case: Case) -> dict:
    target, draft = (
        synthetic(name, torch.bfloat16, device, errors) for name, errors in (("tiny", 0), ("tiny draft", 0.1))
    )
    ids = prompts(2, 40, target.config.vocab_size, device)
    inputs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": tokens_on(device)}
    plain = target.generate(ids, **inputs)
    drafter = {"none": None, "tree": sdt.ModelDrafter(draft, tree=TREE), "oracle": oracle(plain, 0.2)}[case.drafter]
    found = target.generate(ids, **inputs, custom_generate=sdt.SpeculativeGenerate(drafter=drafter))
    said = graphs_in_words(sdt.stats(target))["said"]
    compared = check(target, found, plain, ids.shape[1])
    return {"said": f"{'identical' if compared['identical'] else compared}, {said}"}


def recovery(device: torch.device, case: Case) -> dict:
    """A capture fails, since its stage reads a value on the host. The text, the next operations and the next call must
    be the same as without the attempt."""
    model, inputs, plain = target_of("llama", device)
    accept = ops.accept_greedy

    def reading(*arguments, **options):
        accepted = accept(*arguments, **options)
        accepted.length.max().item()  # invalidates the capture; torch refuses other operations before CUDA does
        return accepted

    ops.accept_greedy = reading
    try:
        found = model.generate(**inputs, custom_generate=sdt.SpeculativeGenerate())
    finally:
        ops.accept_greedy = accept
    why = sdt.stats(model).why_eager
    assert torch.equal(found, plain), "the text of the call whose capture failed differs"
    assert why and why.startswith("capturing failed"), f"the capture was to fail, got {why}"
    if device.type == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream(), "the capture stream is still current"
        torch.cuda.empty_cache()
        torch.rand(1, device=device)
    found = model.generate(**inputs, custom_generate=sdt.SpeculativeGenerate())
    assert torch.equal(found, plain), "the text of the next call differs"
    return {"said": f"{why.splitlines()[0][:90]}; next call: {graphs_in_words(sdt.stats(model))['said']}"}


def main() -> int:
    bench = Bench("correct", __doc__, named_cases)
    simulate_graphs(bench)
    torch.manual_seed(0)
    names = bench.options.cases
    wanted = repr(LAST) not in bench.state["done"] and (names is None or LAST.name in names)
    tests = Tests(bench) if wanted else None
    try:
        return bench.run(functools.partial(measure, tests=tests), CASES, REHEARSED, REHEARSED, names)
    finally:
        if tests is not None:
            tests.kill()


if __name__ == "__main__":
    sys.exit(main())
