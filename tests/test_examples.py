"""Each example runs on a tiny model, as its docstring says, and prints the text of plain `generate`."""

import ast
import json
import re
import runpy
import shutil
import string
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec_triton as sdt
import tiny
from specdec_triton import ops

EXAMPLES = Path(__file__).parent.parent / "examples"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A tiny model that writes letters."""
    return save(letters(tiny.model()), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """The same with some noise, which drafts half of its tokens right."""
    model = letters(tiny.model())
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return save(model, tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A model without attention: the next letter depends on the last one alone, so that the text soon repeats."""
    model = letters(tiny.model())
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return save(model, tmp_path_factory.mktemp("repeating"))


def letters(model):
    """Only letters can win: a byte that is no text would be lost in printing."""
    other = [index for index, token in enumerate(tiny.TOKENS) if token not in string.ascii_letters]
    model.lm_head.weight.data[other] = 0
    return model


def save(model, folder):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as a script, and return its output."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def variable(name, variable):
    """A constant of an example."""
    for node in ast.parse((EXAMPLES / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == variable:
            return ast.literal_eval(node.value)
    raise ValueError(f"{name}.py: no {variable}")


def plain(folder, prompts, tokens, whole=False, **options):
    """The texts of plain greedy `generate`, with or without their prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(DEVICE)
    ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": tokens} | options)
    begin = 0 if whole else inputs["input_ids"].shape[1]
    return tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)


def chat(prompt):
    return tiny.tokenizer().apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def acceptance_lengths(output):
    return [float(number) for number in re.findall(r"acceptance[ _]length[ =]([\d.]+\d)", output)]


def test_prompt_lookup(run, repeating):
    text, report = run("prompt_lookup", repeating).split("\n\n")
    assert [text] == plain(repeating, [chat(variable("prompt_lookup", "PROMPT"))], 96)
    assert acceptance_lengths(report)[0] > 2


def test_draft_model_batch(run, target, draft):
    *texts, report = run("draft_model_batch", target, "--draft", draft).split("\n\n")
    prompts = variable("draft_model_batch", "PROMPTS")
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    assert texts == plain(target, prompts, 48, whole=True)
    assert acceptance_lengths(report)[0] > 1.3


def test_seeded_sampling(run, target, draft):
    lengths, count, text = run("seeded_sampling", target, "--draft", draft).rstrip("\n").split("\n\n")
    assert count == "different texts: 1"
    warm = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    texts = {}
    for seed in (7, 8):
        engine = sdt.SpeculativeGenerate(seed=seed)
        texts[seed] = plain(target, ["Once upon a time"], 48, whole=True, **warm, custom_generate=engine)
    assert texts[7] == [text] != texts[8]
    without, _, chain, tree = acceptance_lengths(lengths)
    assert without == 1 and chain > 1.2 and tree > 1.2


def test_own_drafter(run, repeating):
    text, stats = run("own_drafter", repeating).split("\n\n")
    assert [text] == plain(repeating, ["One, two, three, four, one, two, three, four, one,"], 48, whole=True)
    assert acceptance_lengths(stats)[0] > 1.5


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_kernels_alone(run, monkeypatch, implementation):
    if implementation == "triton" and not ops.HAS_TRITON:
        pytest.skip("triton is not installed")
    for module in (ops, ops.registry):
        monkeypatch.setattr(module, "implementation", lambda op, device: (implementation, "asked for"))
    chosen, attention, greedy, sampled, compacted = run("kernels_alone").splitlines()
    assert chosen == f"implementation: {implementation} asked for"
    assert attention == "tree_attention: [1, 4, 4, 16]"
    for line in (greedy, sampled):  # node 2, then the target's own token
        assert "path=tensor([[ 2, -1]]" in line and "next_ids=tensor([1]" in line
    assert compacted == f"compact_kv: {[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 8.0, 9.0, 10.0, 11.0]}"


def test_pipeline_streaming(run, repeating, monkeypatch):
    import transformers

    pieces = []

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)
            super().on_finalized_text(text, stream_end)

    monkeypatch.setattr(transformers, "TextStreamer", Streamer)
    streamed, report = run("pipeline_streaming", repeating).split("\n\n")
    assert [streamed] == ["".join(pieces)] == plain(repeating, [chat(variable("pipeline_streaming", "PROMPT"))], 64)
    assert acceptance_lengths(report)[0] > 2


def test_lm_eval_harness(run, repeating, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    questions = ["abc", "a longer question", "one two three", "q", "last"]
    answers = plain(repeating, questions, 32)
    answers[1] += "wrong"
    rows = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "letters.yaml").write_text(json.dumps(task))
    output = run("lm_eval_harness", repeating, "--task", "letters", "--task-folder", tmp_path)
    # four of five answers are those of the model without a patch
    assert re.search(r"'exact_match,none': (np\.float64\()?0\.8\b", output)
    assert acceptance_lengths(output)[0] > 2


def test_trl_rollouts(run, target, draft, monkeypatch):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    trainer, rollouts = trl.GRPOTrainer, []

    def recording(model, reward, **options):
        def recorded(completions, **columns):
            rollouts.append(completions)
            return reward(completions, **columns)

        return trainer(model, recorded, **options)

    monkeypatch.setattr(trl, "GRPOTrainer", recording)
    output = run("trl_rollouts", target, "--draft", draft)
    drafted, rollouts = rollouts, []
    monkeypatch.setattr(sdt, "ModelDrafter", lambda *_, **__: sdt.NoDrafter())
    without = run("trl_rollouts", target, "--draft", draft)
    assert [len(group) for group in drafted] == [4, 4] and len(set(drafted[0])) > 1
    # the noise comes from torch's generator, which the trainer seeds
    assert drafted == rollouts
    assert acceptance_lengths(output)[0] > 1.3 and acceptance_lengths(without) == [1]


@pytest.mark.parametrize("place", ["argument", "repository"])
def test_custom_generate(target, draft, repeating, place, monkeypatch, tmp_path):
    from transformers import dynamic_module_utils

    # transformers copies the module to its cache and imports it from there
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    assistant = AutoModelForCausalLM.from_pretrained(draft).to(DEVICE)
    inputs = tiny.tokenizer()(["Hello", "A longer prompt"], return_tensors="pt", padding=True, padding_side="left")
    for source, options in ((repeating, {}), (target, {"assistant_model": assistant, "tree": 8})):
        if place == "argument":
            model = AutoModelForCausalLM.from_pretrained(source)
            options = options | {"custom_generate": str(EXAMPLES / "custom_generate"), "trust_remote_code": True}
        else:  # the folder is part of the model's own repository
            repository = tmp_path / source.name
            shutil.copytree(source, repository)
            shutil.copytree(EXAMPLES / "custom_generate", repository, dirs_exist_ok=True)
            model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
        ids = model.to(DEVICE).generate(**inputs.to(DEVICE), do_sample=False, max_new_tokens=40, **options)
        texts = tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
        assert texts == plain(source, ["Hello", "A longer prompt"], 40, whole=True)
        assert sdt.stats(model).acceptance_length > 1.3
        with pytest.raises(ValueError, match="must be patched"):  # the patch is gone after the call
            sdt.unpatch(model)


def test_serve(repeating, monkeypatch):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers[serving] is not installed")
    from transformers.cli.serving.model_manager import ModelManager

    monkeypatch.setattr(ModelManager, "_load_model", ModelManager._load_model)  # restored at the end
    server = runpy.run_path(str(EXAMPLES / "serve.py"))["main"](str(repeating), port=0, non_blocking=True)
    try:
        deadline = time.monotonic() + 60
        while not server.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.server.servers[0].sockets[0].getsockname()[1]

        def ask(**options):
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, **options}
            headers = {"Content-Type": "application/json"}
            url = f"http://localhost:{port}/v1/chat/completions"
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            return urllib.request.urlopen(request, timeout=60).read().decode()

        (wanted,) = plain(repeating, [chat("Hello")], 40)
        assert json.loads(ask())["choices"][0]["message"]["content"] == wanted
        (loaded,) = server._model_manager.loaded_models.values()
        first = sdt.stats(loaded.model)
        assert first.acceptance_length > 2
        events = [json.loads(line[6:]) for line in ask(stream=True).splitlines() if line.startswith("data: {")]
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
        assert "".join(pieces) == wanted and len(pieces) > 2
        assert sdt.stats(loaded.model) is not first
    finally:
        server.kill_server()
    assert not any(thread.name == "uvicorn-thread" for thread in threading.enumerate())


def test_every_example_is_short_and_listed_and_has_a_test():
    listed, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert scripts
    for script in scripts:
        name, text = script.name, script.read_text()
        assert len(text.splitlines()) < 40, name
        assert f"\npython examples/{name}" in ast.get_docstring(ast.parse(text)), name
        assert f"[`{name}`]({name})" in listed and f"`python examples/{name}" in listed, name
        assert f"\ndef test_{script.stem}(" in tests, name
    assert "[`custom_generate/`](custom_generate/README.md)" in listed
    names = {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    assert names == {"README.md", "custom_generate", *(script.name for script in scripts)}
