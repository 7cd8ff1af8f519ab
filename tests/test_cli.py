"""The command line: its parsing, calls, output and exit codes, with the engine replaced and with the real one."""

import io
import json
import random
import re
import runpy
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import save_file

import checkpoints
import specdec_triton as sdt
import tiny
from helpers import capture_here
from specdec_triton import ops
from specdec_triton.drafters import heads
from specdec_triton.drafters.heads import is_head, load_head
from specdec_triton.ops import rules
from specdec_triton.ops.rules import RULES
from specdec_triton.tools import cli, demo, host_sync, inspection, models, prompts
from specdec_triton.tools.check_distribution import prove


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("models") / "target"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("models") / "draft", layers=1))


@pytest.fixture(scope="module")
def similar(tmp_path_factory):
    """A draft model that agrees with the target often, but not always."""
    folder = tiny.save(tmp_path_factory.mktemp("models") / "similar")
    model = tiny.model()
    head = model.lm_head.weight.data
    head += 0.2 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(models, "default_device", lambda: torch.device("cpu"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(host_sync, "COUNTED_TOKENS", (2, 6))
    monkeypatch.setattr(prompts, "CODE_EDIT", "abcabcabc")
    monkeypatch.setattr(prompts, "CHAT", "xyz")


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for the engine: plain decoding, and with `spoil` the last token comes out wrong."""
    record = SimpleNamespace(options=[], calls=[], spoil=False)

    @contextmanager
    def patched(model, **options):
        record.options.append(options)
        generate = model.generate

        def stand_in(prompt_lookup_num_tokens=None, **kwargs):
            record.calls.append(kwargs | {"prompt_lookup_num_tokens": prompt_lookup_num_tokens})
            output = generate(**kwargs)
            output[0, -1] += record.spoil
            return output

        model.generate = stand_in
        try:
            yield model
        finally:
            del model.generate

    stats = SimpleNamespace(
        rounds=4, drafted=30, accepted=5, emitted=10, acceptance_length=2.25, rule="greedy", lossless=True
    )
    stats.seconds = {"draft": 0.5, "verify": 1.0}
    monkeypatch.setattr(sdt, "patched", patched)
    monkeypatch.setattr(sdt, "stats", lambda model: stats)
    monkeypatch.setattr(sdt, "ModelDrafter", lambda model, tree: ("drafter", model.config.num_hidden_layers))
    return record


def generate(*args):
    return cli.main(["generate", *args, "--max-new-tokens", "12", "--dtype", "float32"])


def plain_text(folder, prompt):
    model, tokenizer, _ = models.load(folder)
    inputs = models.encode_chat(tokenizer, prompt, model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_plain_streams_the_text_to_stdout_and_the_rest_to_stderr(target, engine, capsys):
    assert generate("--model", target, "--prompt", "hello", "--plain") == 0
    out, err = capsys.readouterr()
    assert out == plain_text(target, "hello") + "\n"
    assert "tokens/s" in err and "rounds" not in err
    assert engine.options == []


def test_generate_uses_prompt_lookup_unless_told_otherwise(target, engine, capsys):
    assert generate("--model", target, "--prompt", "hello") == 0
    out, err = capsys.readouterr()
    assert out == plain_text(target, "hello") + "\n"
    assert engine.options == [{}]
    assert "4 rounds, acceptance length 2.25, 5 of 30 draft tokens accepted" in err
    assert "rule greedy (lossless); draft 0.50 s, verify 1.00 s" in err


def test_generate_hands_the_draft_model_to_the_engine(target, draft, engine, capsys):
    assert generate("--model", target, "--prompt", "hello", "--draft", draft) == 0
    assert engine.options == [{"drafter": ("drafter", 1)}]
    assert "draft: draft (folder" in capsys.readouterr().err


def test_generate_drafts_from_a_corpus_of_files(target, engine, tmp_path, capsys):
    texts, lines, out = tmp_path / "a.py", tmp_path / "b.jsonl", tmp_path / "texts.corpus"
    texts.write_text("hello ab hello")
    lines.write_text('{"text": "xyx"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    build = ["corpus", "build", "--tokenizer", target, "--out", str(out)]
    assert cli.main([*build, str(texts), str(lines)]) == 0
    tokens = 13 + 2 + 4
    report = re.escape(f"{out}: {tokens} tokens of 3 texts in ") + r"\d+\.\d s, (\d\.\d) bytes a token\n"
    assert float(re.fullmatch(report, capsys.readouterr().out)[1]) == pytest.approx(8 + 4 * 3 / tokens, abs=0.06)

    assert generate("--model", target, "--prompt", "hello", "--corpus", str(out)) == 0
    drafter = engine.options[0]["drafter"]
    assert isinstance(drafter, sdt.SuffixDrafter) and drafter.history.num_tokens == tokens
    assert f"draft: {out} (a corpus of {tokens} tokens)" in capsys.readouterr().err
    assert generate("--model", target, "--prompt", "hello", "--suffix") == 0
    drafter = engine.options[1]["drafter"]
    assert isinstance(drafter, sdt.SuffixDrafter) and drafter.history.num_tokens == 0
    # one drafter makes the drafts, and a repeated call of `profile` does not find the answer of the first
    assert [call["prompt_lookup_num_tokens"] for call in engine.calls] == [None, None]
    assert drafter.history.max_tokens == 0


def test_a_malformed_corpus_or_text_is_one_line_that_names_the_file(target, tmp_path, capsys):
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": 3}\n')
    build = ["corpus", "build", "--tokenizer", target, "--out", str(tmp_path / "out")]
    assert cli.main([*build, str(broken)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"specdec-triton corpus: read_texts: {broken}:2 must have strings in 'text', got int"
    assert cli.main([*build[:3], "./nowhere", *build[4:], str(broken)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("specdec-triton corpus: load: wanted a model folder, a .gguf file or a hub name, got")
    assert generate("--model", target, "--prompt", "p", "--corpus", str(broken)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"specdec-triton generate: History.load: {broken} must be a file of History.save")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_gguf_file_is_read_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "converted_folder", lambda *args: pytest.fail("the model was converted"))
    file = tmp_path / "tiny.gguf"
    tiny.save_gguf(file, tiny.model(layers=1))
    text = "hello ab"
    assert models.load_tokenizer(file).encode(text) == tiny.tokenizer().encode(text)


def test_generate_passes_its_options_on(target, engine, monkeypatch):
    monkeypatch.setattr(sdt, "stats", lambda model: sdt.Stats("block"))
    sampling = ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "7", "--min-p", "0.1", "--seed", "5"]
    more = ["--tree", "chain:6", "--rule", "block", "--batch", "3"]
    assert generate("--model", target, "--prompt", "hello", *sampling, *more) == 0
    assert engine.options == [{"tree": sdt.Topology.chain(6), "rule": "block", "seed": 5}]
    (call,) = engine.calls
    assert call["prompt_lookup_num_tokens"] == 6 and call["input_ids"].shape[0] == 3
    assert {name: call[name] for name in ("do_sample", "temperature", "top_p", "top_k", "min_p")} == {
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
    }  # fmt: skip


def test_generate_reads_the_prompt_from_standard_input(target, engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert generate("--model", target, "--prompt", "-", "--plain") == 0
    assert capsys.readouterr().out == plain_text(target, "hello") + "\n"


def test_a_tokenizer_without_a_chat_template_takes_the_bare_text():
    tokenizer = tiny.tokenizer()
    with_template = models.encode_chat(tokenizer, "hi", torch.device("cpu"))
    tokenizer.chat_template = None
    bare = models.encode_chat(tokenizer, "hi", torch.device("cpu"))
    assert tokenizer.decode(with_template["input_ids"][0]) == "<|user|>hi<|end|><|assistant|>"
    assert tokenizer.decode(bare["input_ids"][0]) == "hi"
    assert set(bare) == set(with_template) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "p", "--draft", "d", "--plain"],
        ["generate", "--model", "m", "--prompt", "p", "--draft", "d", "--mtp"],
        ["generate", "--model", "m", "--prompt", "p", "--draft", "d", "--suffix"],
        ["generate", "--model", "m", "--prompt", "p", "--suffix", "--corpus", __file__],
        ["prove", "--model", "m", "--draft", "d", "--mtp"],
        ["corpus", "--tokenizer", "m", "--out", "o", __file__],
        ["corpus", "build", "--tokenizer", "m", "--out", "o"],
        ["generate", "--model", "m", "--prompt", "p", "--prompt-lookup", "0"],
        ["demo", "--max-new-tokens", "-1"],
        ["demo", "--dtype", "int8"],
    ],
)
def test_wrong_arguments_are_refused_by_the_parser(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    assert "specdec-triton" in capsys.readouterr().err


def test_an_error_is_one_line_and_exit_code_2(capsys):
    assert cli.main(["generate", "--model", "./nowhere", "--prompt", "p"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("specdec-triton generate: load: wanted a model folder")


def with_config(**changed):
    def spoil(folder):
        found = tiny.saved_config(folder) | changed
        (folder / "config.json").write_text(json.dumps({key: found[key] for key in found if found[key] != "none"}))

    return spoil


def written(name, text):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir() if text is None else (folder / name).write_bytes(text)

    return spoil


def cut(name, size):
    def spoil(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return spoil


def sharded(folder):
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MALFORMED = {
    "a list": (written("config.json", b"[1, 2]"), "config.json must be a JSON object, got a list"),
    "no JSON": (written("config.json", b"{hidden"), "config.json must be JSON, got Expecting property name"),
    "binary": (written("config.json", b"\xff\xfe"), "config.json must be JSON, got 'utf-8' codec"),
    "a folder": (written("config.json", None), "Is a directory: '.*config.json'"),
    "no keys": (written("config.json", b"{}"), "config.json cannot be read: Unrecognized model"),
    "only a type": (
        written("config.json", b'{"model_type": "llama"}'),
        "config.json must describe the model in the folder, got a LlamaForCausalLM of 6738415616 weights",
    ),
    "no heads": (with_config(num_attention_heads=0), "config.json: num_attention_heads must be at least 1, got 0"),
    "odd size": (with_config(hidden_size=65), r"config.json cannot be read: .*\(65\) is not a multiple"),
    "a word": (with_config(num_hidden_layers="two"), "config.json cannot be read: .*num_hidden_layers.*got str"),
    "unknown": (with_config(model_type="nonesuch"), "config.json cannot be read: .*model type `nonesuch`"),
    "another kind": (with_config(model_type="t5"), "config.json cannot be read: .*"),
    "activation": (with_config(hidden_act="nonesuch"), "config.json cannot be read: KeyError: 'nonesuch'"),
    "more layers": (with_config(num_hidden_layers=3), "must hold every weight .*got none for model.layers.2."),
    "other sizes": (with_config(vocab_size=99), "must hold every weight .*got another shape for lm_head.weight"),
    "empty weights": (written("model.safetensors", b""), "model.safetensors cannot be read: .*header too small"),
    "cut header": (cut("model.safetensors", 100), "model.safetensors cannot be read: .*header"),
    "cut weights": (cut("model.safetensors", -1000), "model.safetensors cannot be read: .*not fully covered"),
    "no shard": (sharded, "index.json must name files in the folder, got no model-00001-of-00002.safetensors"),
    "cut tokenizer": (cut("tokenizer.json", 400), "tokenizer.json must be JSON, got Unterminated string"),
    "bare tokenizer": (written("tokenizer.json", b"{}"), "the tokenizer in .* cannot be read: KeyError"),
    "options": (written("generation_config.json", b"[]"), "generation_config.json must be a JSON object, got a list"),
    "template": (written("chat_template.jinja", b"{% for x in %}"), "the chat template of .*: TemplateSyntaxError"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_folder_is_one_line_that_names_the_file(fault, target, tmp_path, capsys):
    spoil, message = MALFORMED[fault]
    folder = Path(shutil.copytree(target, tmp_path / "spoilt"))
    spoil(folder)
    assert generate("--model", str(folder), "--prompt", "hello", "--plain") == 2
    *told, line = capsys.readouterr().err.splitlines()
    assert re.match(f"specdec-triton generate: .*{message}", line) and str(folder) in line
    assert all(each.startswith(("loading", "model:")) for each in told)


def test_every_command_that_loads_a_model_says_so(target, tmp_path, capsys):
    folder = Path(shutil.copytree(target, tmp_path / "spoilt"))
    written("config.json", b"[]")(folder)
    model, card = ["--model", str(folder)], ["--draft", "none", "--device", "cpu", "--acceptance", "0.8"]
    for command in (
        ["generate", "--model", target, "--draft", str(folder), "--prompt", "p"],
        ["prove", *model],
        ["profile", *model],
        ["demo", *model],
        ["plan", "--target", str(folder), *card],
        ["plan", "--target", str(folder / "config.json"), *card],
    ):
        assert cli.main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(
            f"specdec-triton {command[0]}: load: {folder}/config.json must be a JSON object, got a l"
        )


def test_a_malformed_gguf_file_is_one_line_that_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "cache_folder", lambda: tmp_path / "cache")
    file, noise = tmp_path / "bad.gguf", random.Random(0)
    tiny.save_gguf(file, tiny.model(layers=1))
    whole = file.read_bytes()
    cuts = [4, 10, 30, 200, 3000, len(whole) - 1000]
    spoilt = [whole[:size] for size in cuts] + [b"", b"PK" + whole[2:], whole.replace(b"llama", b"xlama")]
    spoilt += [whole[:4] + bytes(4) + whole[8:], whole[:8] + b"\xff" * 16 + whole[24:], whole[:24] + bytes(5000)]
    spoilt += [whole[:24] + noise.randbytes(4000) for _ in range(3)]
    for data in spoilt:
        file.write_bytes(data)
        assert generate("--model", str(file), "--prompt", "hello", "--plain") == 2
        *told, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"specdec-triton generate: load: {file} ")
        assert all(each.startswith("converting") for each in told)
    assert not any((tmp_path / "cache").iterdir())


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", interrupted)
    assert cli.main(["generate", "--model", "m", "--prompt", "p"]) == 130
    assert capsys.readouterr().err == "specdec-triton generate: interrupted\n"


def test_demo_says_when_rich_is_missing(monkeypatch, capsys):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "rich" else real(name))
    assert cli.main(["demo"]) == 2
    assert "needs the package rich: pip install 'specdec-triton[demo]'" in capsys.readouterr().err


def test_demo_prints_identical_and_exits_0(target, engine, short, capsys):
    assert cli.main(["demo", "--model", target, "--max-new-tokens", "10"]) == 0
    out = capsys.readouterr().out
    assert "float32, cpu" in out and target in out.replace("\n", "")
    assert out.count("identical") == 4 and "DIFFERENT" not in out
    for heading in ("tokens/s", "speedup", "forwards", "tokens", "host"):
        assert heading in out
    assert "2.00" in out and "2.25" not in out  # 10 tokens in 5 forwards; 2.25 a round
    assert "Free chat" in out


def test_demo_prints_different_and_exits_1(target, engine, short, capsys):
    engine.spoil = True
    assert cli.main(["demo", "--model", target, "--max-new-tokens", "10"]) == 1
    out = capsys.readouterr().out
    assert out.count("DIFFERENT: specdec_triton") == 2
    assert "from new token 9 on" in out
    assert out.count("identical: transformers' lookup") == 2


def test_demo_counts_forwards_of_each_way(target, engine, short):
    model, tokenizer, _ = models.load(target)
    hooks = len(model._forward_pre_hooks)
    records = demo.compare(model, tokenizer, "abcabcabc", 10, step=lambda text: demo.nullcontext())
    plain, theirs, ours = (records[way].runs for way in demo.WAYS)
    assert [len(runs) for runs in (plain, theirs, ours)] == [demo.PAIRS] * 3
    assert plain[0].forwards == len(plain[0].token_ids)
    assert 1 <= theirs[0].forwards <= plain[0].forwards
    # four rounds after the prompt's forward: all five count, as they do for transformers
    assert ours[0].forwards == 5 and ours[0].tokens_per_forward == len(ours[0].token_ids) / 5
    assert theirs[0].tokens_per_forward == len(theirs[0].token_ids) / theirs[0].forwards
    assert len(model._forward_pre_hooks) == hooks


def test_demo_survives_an_answer_that_ends_at_once(target, engine, short, capsys, monkeypatch):
    load = models.load

    def load_mute(*args):
        model, tokenizer, description = load(*args)
        model.generation_config.eos_token_id = list(range(model.config.vocab_size))
        return model, tokenizer, description

    monkeypatch.setattr(models, "load", load_mute)
    assert cli.main(["demo", "--model", target, "--max-new-tokens", "10"]) == 0
    assert "–" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "place"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0)]
)
def test_first_difference(a, b, place):
    assert demo._first_difference(a, b) == place


def test_the_chat_verdict_says_what_was_measured():
    assert "gains nothing there: 0.98 times plain" in demo._chat_verdict(0.98)
    assert "2.00 times plain" in demo._chat_verdict(2.0) and "gains nothing" not in demo._chat_verdict(2.0)


def test_the_prompts_are_five_and_the_code_edit_is_mostly_code():
    assert list(prompts.PROMPTS) == ["code edit", "summary", "chat", "list", "math"]
    assert 40 <= len(prompts._INVENTORY.splitlines()) <= 60
    compile(prompts._INVENTORY, "inventory", "exec")


def test_doctor_names_versions_device_and_the_implementation_of_each_op(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "transformers", "triton", "no GPU; CPU with", "demo's model"):
        assert word in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    for op in ops.OPS:
        name, reason = ops.implementation(op, torch.device("cpu"))
        assert f"{name} ({reason})" in lines[op]


def test_doctor_of_a_model(target, capsys):
    assert cli.main(["doctor", "--model", target]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "model               LlamaForCausalLM is supported".split() in [line.split() for line in out]
    assert ["fused", "2", "LlamaAttention"] in [line.split() for line in out]
    assert "its CUDA graphs can be captured on a GPU".split() in [line.split() for line in out]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy's own: it is imported here already
def test_doctor_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["specdec_triton.tools.cli", "doctor"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("specdec_triton.tools.cli", run_name="__main__")
    assert ended.value.code == 0 and "tree_attention" in capsys.readouterr().out


def test_real_engine_demo(target, short, capsys):
    assert cli.main(["demo", "--model", target, "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out.count("identical: specdec_triton") == 2


@pytest.mark.parametrize("way", ["--prompt-lookup", "--draft", "--suffix"])
def test_real_engine_generate(target, draft, capsys, way):
    value = {"--draft": [draft], "--prompt-lookup": ["4"], "--suffix": []}[way]
    assert generate("--model", target, "--prompt", "hello hello", way, *value) == 0
    out, err = capsys.readouterr()
    assert out == plain_text(target, "hello hello") + "\n"
    assert "acceptance length" in err and "rule greedy (lossless)" in err


def sampled(capsys, *args):
    assert generate(*args) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_real_engine_generate_samples_batches_repeatably(target, draft, capsys):
    """Each row has its own seed. A row's text does not depend on the draft."""
    options = ["--model", target, "--prompt", "hello hello", "--temperature", "0.7", "--seed", "3"]
    batch, err = sampled(capsys, *options, "--batch", "2", "--draft", draft, "--tree", "6")
    _, first, second = batch.split("--- ")
    assert first.startswith("1 of 2 ---\n") and second.startswith("2 of 2 ---\n")
    first, second = (text.partition("\n")[2] for text in (first, second))
    assert first != second and "rule coupled (lossless)" in err and "24 tokens in" in err
    single, _ = sampled(capsys, *options, "--tree", "auto")
    assert single == first == sampled(capsys, *options, "--assistant-early-exit", "1")[0]
    other, _ = sampled(capsys, *options[:-1], "4")
    assert other != first


def test_plain_generate_is_repeatable_with_a_seed(target, capsys):
    options = ["--model", target, "--prompt", "hello", "--plain", "--seed"]
    first, second, other = (sampled(capsys, *options, seed)[0] for seed in ("3", "3", "4"))
    assert first == second != other


def test_rows_are_cut_after_their_end(target):
    model, _, _ = models.load(target)
    rows = torch.tensor([[5, 0, 0], [5, 6, 7], [0, 5, 0]])
    assert cli._without_padding(model, rows) == [[5, 0], [5, 6, 7], [0]]
    model.generation_config.eos_token_id = [6, 7]
    assert cli._without_padding(model, rows) == [[5, 0, 0], [5, 6], [0, 5, 0]]
    model.generation_config.eos_token_id = None
    assert cli._without_padding(model, rows) == rows.tolist()


def test_prove_holds_every_rule_against_the_exact_distribution(capsys):
    """Typical acceptance must differ, which does not make the command fail."""
    assert cli.main(["prove", "--rule", "all", "--samples", "600"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(RULES)
    for line in lines:
        assert line.endswith("DIFFERS (lossy by design)" if line.startswith("typical") else "agrees"), line


def test_prove_finds_a_rule_that_is_wrong(capsys, monkeypatch):
    """Recovered tokens from the target's own distribution instead of the residual."""
    honest = rules.next_token

    def no_residual(round, node, siblings):
        return honest(round, node, rules.first_of(round, node, torch.ones_like(siblings.mass)))

    monkeypatch.setattr(rules, "next_token", no_residual)
    assert cli.main(["prove", "--rule", "rejection", "--samples", "1500"]) == 1
    assert capsys.readouterr().out.splitlines()[1].endswith("DIFFERS")


PAIR = ["--samples", "300", "--top-k", "2", "--prompt", "ab", "--temperature", "0.8"]


def test_prove_takes_a_pair_of_ones_own(target, similar, capsys):
    assert cli.main(["prove", "--model", target, "--draft", similar, "--rule", "multi_round", *PAIR]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:2] == ["multi_round", "8"] and target in captured.err


class WrongDrafter(sdt.ModelDrafter):
    """Likes least the tokens that its model likes best."""

    def __init__(self, model, tree):
        head = model.get_output_embeddings().weight
        head.data.neg_()
        super().__init__(model, tree=tree)


def test_prove_proves_nothing_if_no_draft_is_accepted(target, capsys, monkeypatch):
    monkeypatch.setattr(sdt, "ModelDrafter", WrongDrafter)
    assert cli.main(["prove", "--model", target, "--draft", target, *PAIR]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[-5:] == ["1.00", "0", "300", "NOT", "PROVEN"]
    assert captured.err.splitlines()[-1].startswith(
        "coupled: nothing is proven, since 0 drafts were accepted and 300 rejected, and at least 50 of each are needed"
    )


def test_prove_proves_nothing_if_no_draft_is_rejected(target, capsys):
    assert cli.main(["prove", "--model", target, "--draft", target, *PAIR, "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "NOT PROVEN" and (found["accepted"], found["rejected"]) == (300, 0)
    assert found["rule"] == "coupled" and found["samples"] == 300 and found["outcomes"] == 8


def test_prove_counts_rejected_drafts_in_captured_rounds_too(monkeypatch):
    model, input_ids, drafter = models.tiny(), torch.tensor([[3, 4, 5, 3]]), sdt.EarlyExitDrafter(1, num_tokens=2)
    unlike = torch.arange(100)[:, None].expand(-1, 20), torch.full((100,), 0.01, dtype=torch.float64)
    long = {"rule": "coupled", "tokens": 20, "samples": 100, "exact": unlike}
    eager = prove(model, drafter, input_ids=input_ids, **long)
    assert eager.accepted > 0 < eager.rejected and not eager.agrees
    for lag in (0, 1):
        capture_here(monkeypatch, lag)
        captured = prove(model, drafter, input_ids=input_ids, **long)
        assert sdt.stats(model).replayed
        assert (captured.accepted, captured.rejected) == (eager.accepted, eager.rejected)


@pytest.fixture
def medusa(tmp_path):
    """Writes random Medusa heads for a model to a folder."""

    def write(model, file="medusa_lm_head.pt", prefix=""):
        hidden, vocab = model.config.hidden_size, model.config.vocab_size
        torch.manual_seed(0)
        tensors = {}
        for head in range(3):
            tensors[f"{prefix}{head}.0.linear.weight"] = torch.randn(hidden, hidden) / hidden**0.5
            tensors[f"{prefix}{head}.0.linear.bias"] = torch.randn(hidden)
            tensors[f"{prefix}{head}.1.weight"] = torch.randn(vocab, hidden)
        folder = tmp_path / "medusa"
        folder.mkdir()
        (torch.save if file.endswith(".pt") else save_file)(tensors, folder / file)
        (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))
        return str(folder)

    return write


def test_generate_drafts_with_a_trained_head(target, medusa, tmp_path, capsys):
    eagle = str(checkpoints.write_head(tmp_path / "eagle", tiny.model(), "eagle1").folder)
    for head, kind, tree in ((medusa(tiny.model()), "MedusaHeads", "40"), (eagle, "EagleModel", "chain:2")):
        assert generate("--model", target, "--prompt", "hello", "--draft", head, "--tree", tree) == 0
        out, err = capsys.readouterr()
        assert out == plain_text(target, "hello") + "\n"
        assert f"draft: {head} (a trained head, {kind})" in err and "draft tokens accepted" in err


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory):
    """A target that favours a few tokens, so that random MTP layers draft some of its tokens."""
    folder = tiny.save(tmp_path_factory.mktemp("models") / "target")
    checkpoints.favouring(tiny.model()).save_pretrained(folder)
    tiny.add_mtp_layer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dflash(tmp_path_factory):
    """A function that writes a random DFlash head for a model to a folder."""

    def write(model):
        folder, hidden = tmp_path_factory.mktemp("dflash"), model.config.hidden_size
        config = {
            "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": model.config.vocab_size,
            "block_size": 4, "dflash_config": {"mask_token_id": 1, "target_layer_ids": [0]},
        }  # fmt: skip
        sizes = {
            "fc": (hidden, hidden), "hidden_norm": (hidden,), "norm": (hidden,),
            "layers.0.input_layernorm": (hidden,), "layers.0.post_attention_layernorm": (hidden,),
            "layers.0.self_attn.q_proj": (32, hidden), "layers.0.self_attn.k_proj": (16, hidden),
            "layers.0.self_attn.v_proj": (16, hidden), "layers.0.self_attn.o_proj": (hidden, 32),
            "layers.0.self_attn.q_norm": (16,), "layers.0.self_attn.k_norm": (16,),
            "layers.0.mlp.gate_proj": (32, hidden), "layers.0.mlp.up_proj": (32, hidden),
            "layers.0.mlp.down_proj": (hidden, 32),
        }  # fmt: skip
        random = torch.Generator().manual_seed(0)
        tensors = {f"{name}.weight": torch.randn(size, generator=random) / 4 for name, size in sizes.items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def test_generate_drafts_blocks(target, dflash, capsys):
    head = dflash(tiny.model())
    for tree, drafted in (("12", 11), ("chain:3", 3)):
        assert generate("--model", target, "--prompt", "hello", "--draft", head, "--tree", tree) == 0
        out, err = capsys.readouterr()
        assert out == plain_text(target, "hello") + "\n"
        assert f"draft: {head} (a trained head, DFlashModel)" in err
        rounds, most = re.search(r"(\d+) rounds.* of (\d+) draft tokens", err).groups()
        assert 0 < int(most) <= drafted * int(rounds)


def test_generate_drafts_with_mtp_layers(with_mtp, capsys):
    assert generate("--model", with_mtp, "--prompt", "hello", "--mtp", "--tree", "chain:2", "--batch", "2") == 0
    out, err = capsys.readouterr()
    assert out.count(plain_text(with_mtp, "hello")) == 2
    assert f"draft: the MTP layers of {with_mtp} (1)" in err and "draft tokens accepted" in err


def test_prove_and_profile_draft_with_blocks_and_mtp_layers(target, with_mtp, dflash, capsys):
    prove = ["prove", "--rule", "multi_round", "--samples", "400", "--temperature", "4"]
    for more in (["--draft", dflash(models.tiny())], ["--mtp", "--model", with_mtp, "--prompt", "ab"]):
        assert cli.main([*prove, *more]) == 0
        assert re.search(r"^multi_round .* agrees$", capsys.readouterr().out, re.MULTILINE)
    for more in (["--draft", dflash(tiny.model()), "--model", target], ["--mtp", "--model", with_mtp]):
        assert cli.main(["profile", "--prompt", "hello", "--max-new-tokens", "6", "--json", *more]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        assert stages["draft"]["us"] > 0 and stages["verify"]["bytes"] > 0


def test_mtp_layers_must_be_there(target, capsys):
    assert generate("--model", target, "--prompt", "hello", "--mtp") == 2
    err = capsys.readouterr().err
    assert "specdec-triton generate: MtpModel: " in err and target in err
    assert cli.main(["prove", "--mtp"]) == 2
    assert "--mtp must come with --model: the default target has no MTP layers" in capsys.readouterr().err


def test_prove_and_profile_draft_with_a_trained_head(target, medusa, tmp_path, capsys):
    head = medusa(models.tiny(), "model.safetensors", "medusa_head.")
    assert cli.main(["prove", "--draft", head, "--rule", "multi_round", "--samples", "400"]) == 0
    assert re.search(r"^multi_round .* agrees$", capsys.readouterr().out, re.MULTILINE)
    eagle = str(checkpoints.write_head(tmp_path / "eagle", tiny.model(), "eagle1").folder)
    profile = ["profile", "--model", target, "--draft", eagle, "--prompt", "hello", "--max-new-tokens", "6", "--json"]
    assert cli.main(profile) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages["draft"]["us"] > 0 and stages["verify"]["bytes"] > 0


LLAMA = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
EAGLE3 = ("fc.weight", "midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight")
# name -> tensors, config, whether it is a head, and words of the error if it is a head that is not supported
NAMED = {
    "a model": (LLAMA, {}, False, None),
    "a model with layers for MTP": ((*LLAMA, "model.layers.9.eh_proj.weight", "mtp.fc.weight"), {}, False, None),
    "the same with images": (
        ("model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "mtp.fc.weight"), {}, False,
        None,
    ),
    "no weights": ((), {}, False, None),
    "EAGLE-3": (EAGLE3, {}, True, None),
    "Medusa": (("0.0.linear.weight", "0.1.weight"), {}, True, None),
    "Medusa in its target": ((*LLAMA, "medusa_head.0.0.linear.weight"), {}, True, None),
    "Medusa of vLLM": (("medusa_heads.blocks.0.layers.0.weight", "lm_heads.0.weight"), {}, True, None),
    "DFlash": (("fc.weight", "hidden_norm.weight", "norm.weight"), {"dflash_config": {}}, True, None),
    "MTP": (("mtp.fc.weight", "mtp.norm.weight"), {}, True, "MTP"),
    "Hydra": (("hydra_lm_head.weight",), {}, True, "Hydra"),
    "Gemma 4": ((*LLAMA, "pre_projection.weight"), {"model_type": "gemma4_assistant"}, True, "a Gemma 4 assistant"),
    "Muse": (("encoder.fc.weight",), {"model_type": "muse_glimmer_assistant"}, True, None),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_heads_are_told_from_models_by_the_names_of_their_tensors(name, target, tmp_path, capsys, monkeypatch):
    names, config, is_one, refused = NAMED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if names:
        save_file({each: torch.ones(1) for each in names}, tmp_path / "model.safetensors")
    assert is_head(tmp_path) is is_one
    if refused:
        assert generate("--model", target, "--prompt", "p", "--draft", str(tmp_path)) == 2
        message = f"the draft head must be EAGLE-1, EAGLE-2, EAGLE-3, P-EAGLE, DFlash or Medusa, got {refused}"
        assert re.search(message, capsys.readouterr().err)
    elif not is_one:
        with pytest.raises(ValueError, match="must hold a draft head, got tensors of another model|must have a file"):
            load_head(tmp_path, tiny.model())
    # the same on the hub; only config.json and the names of the tensors are downloaded
    hub = Hub(["config.json", *(["model.safetensors"] if names else [])], names, tmp_path / "config.json")
    hub.replace(monkeypatch)
    assert is_head("owner/name") is is_one


class Hub:
    """A stand-in for huggingface_hub and a repository of these files and tensors."""

    def __init__(self, files, names=(), config=None, cached=None):
        self.files, self.names, self.config, self.cached = files, names, config, cached

    def replace(self, monkeypatch):
        for name in ("snapshot_download", "list_repo_files", "get_safetensors_metadata", "hf_hub_download"):
            monkeypatch.setattr(heads.huggingface_hub, name, getattr(self, name))

    def snapshot_download(self, name, local_files_only):
        assert local_files_only
        if self.cached is None:
            raise LocalEntryNotFoundError("not there")
        return str(self.cached)

    def list_repo_files(self, name):
        if self.files is None:
            raise OfflineModeIsEnabled("no network")
        return self.files

    def get_safetensors_metadata(self, name):
        return SimpleNamespace(weight_map=dict.fromkeys(self.names, "model.safetensors"))

    def hf_hub_download(self, name, file):
        assert file == "config.json"
        return str(self.config)


@pytest.mark.parametrize(
    ("files", "is_one"),
    [
        (["config.json", "pytorch_model.bin"], True),
        (["medusa_lm_head.pt", "README.md"], True),
        (["pytorch_model.bin", "model.gguf"], False),
        (["README.md"], False),
        (None, False),
    ],
)
def test_pickled_weights_alone_are_those_of_a_head(files, is_one, monkeypatch):
    Hub(files).replace(monkeypatch)
    assert is_head("owner/name") is is_one


def test_a_repository_in_the_cache_is_read_without_a_network(target, medusa, monkeypatch):
    for folder, is_one in ((target, False), (medusa(tiny.model()), True)):
        Hub(None, cached=folder).replace(monkeypatch)
        assert is_head("owner/name") is is_one


def test_paths_and_broken_folders_are_no_heads(target, tmp_path, monkeypatch):
    Hub(["pytorch_model.bin"]).replace(monkeypatch)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x")
    for name in (tmp_path / "model.gguf", "./nowhere", tmp_path / "broken", tmp_path / "nowhere"):
        assert not is_head(name) and not is_head(str(name))


def test_prove_shows_a_progress_bar_on_a_terminal(capsys, monkeypatch):
    assert cli.main(["prove", "--samples", "600"]) == 0
    assert "sampling" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["prove", "--samples", "600", "--json"]) == 0
    captured = capsys.readouterr()
    assert "sampling" in captured.err and json.loads(captured.out)


def test_json_does_not_need_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(inspection, "compile_table", lambda arch, only, progress: {})
    shapes = ["--target", "smollm2-135m", "--draft", "none", "--device", "h100", "--acceptance", "0.8"]
    for command in (["inspect"], ["plan", *shapes], ["prove", "--samples", "600"]):
        assert cli.main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
    for command in (["inspect"], ["plan", *shapes], ["demo"]):
        assert cli.main(command) == 2
        assert "needs the package rich" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "5"], "samples must be many more than the 64 outcomes"),
        (["--top-k", "1"], "samples must be many more than the 1 outcomes, none of them nearly certain"),
    ],
)
def test_prove_refuses_a_test_without_power(options, message, capsys):
    assert cli.main(["prove", *options]) == 2
    assert message in capsys.readouterr().err


def test_prove_refuses_too_many_outcomes(target, capsys):
    assert cli.main(["prove", "--model", target, "--top-k", "200", "--tokens", "3", "--prompt", "ab"]) == 2
    assert "use a smaller top_k, or fewer tokens" in capsys.readouterr().err
