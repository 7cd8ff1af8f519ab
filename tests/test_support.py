"""The walk through transformers' model types: tiny configs, the outcome of a class, rows and the page."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import transformers
from transformers import Gemma3Config, LlamaConfig, Qwen2VLConfig

from families import enlarge_weights
from specdec_triton.tools import cli, shrink, support, support_page
from specdec_triton.tools.support import CRASH, EXACT, LATE, NOT_BUILT, REFUSED, WRONG, Kind, Outcome, check

ROOT = Path(__file__).resolve().parent.parent
ROWS, PAGE = ROOT / "bench" / "results" / "models", ROOT / "docs" / "supported_models.md"
# not in families.py; together they have every kind of attention, positions and inputs that a tiny config must keep
QUICK = (
    Kind("bert", "BertLMHeadModel", "causal"),
    Kind("gpt_oss", "GptOssForCausalLM", "causal"),
    Kind("nemotron", "NemotronForCausalLM", "causal"),
    Kind("qwen2_vl", "Qwen2VLForConditionalGeneration", "image-text"),
    Kind("gemma3", "Gemma3ForConditionalGeneration", "image-text"),
)


def llama(seed=0, of=transformers.LlamaForCausalLM):
    model = of(shrink.tiny_config(LlamaConfig))
    torch.manual_seed(seed)
    return enlarge_weights(model)


class ShiftsPositions(transformers.LlamaForCausalLM):
    """After the prompt, a forward of several tokens has its positions shifted by one."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, cache=None, **kwargs):
        state = cache if past_key_values is None else past_key_values
        if position_ids is not None and input_ids.shape[1] > 1 and state is not None and state.get_seq_length():
            position_ids = position_ids + 1
        name = "past_key_values" if cache is None else "cache"
        return super().forward(input_ids=input_ids, position_ids=position_ids, **{name: state}, **kwargs)


class DiesOfTrees(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise RuntimeError("no such mask")
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class NeedsImages(transformers.LlamaForCausalLM):
    def generate(self, *args, pixel_values=None, **kwargs):
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return super().generate(*args, **kwargs)


class Rolls(transformers.LlamaForCausalLM):
    """Gives another text at each call."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        output = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        output.logits = output.logits + torch.randn_like(output.logits)
        return output


def test_every_size_is_small_and_the_rest_is_the_default():
    config, default = shrink.tiny_config(LlamaConfig), LlamaConfig()
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (64, 4, 16)
    assert (config.num_key_value_heads, config.num_hidden_layers, config.vocab_size) == (2, 2, 96)
    assert config.rms_norm_eps == default.rms_norm_eps and config.hidden_act == default.hidden_act


def test_parts_fit_together_and_agree_about_special_tokens():
    config = shrink.tiny_config(Gemma3Config)
    text = config.text_config
    assert config.vision_config.hidden_size == text.hidden_size == 64
    assert text.layer_types == ["sliding_attention", "full_attention"] and text.sliding_window == shrink.WINDOW
    special = [config.boi_token_index, config.eoi_token_index, config.image_token_index]
    assert len(set(special)) == 3 and all(shrink.WORDS <= token < text.vocab_size for token in special)
    # 4 + 2 + 2: half a head
    assert shrink.tiny_config(Qwen2VLConfig).text_config.rope_parameters["mrope_section"] == [4, 2, 2]


def test_a_tiny_config_has_every_kind_of_layer():
    assert shrink._every_kind(["a", "a", "b", "c", "a"], 4) == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("of", "outcome", "reason"),
    [
        (transformers.LlamaForCausalLM, EXACT, ""),
        (ShiftsPositions, WRONG, "OracleDrafter, 2 rows: from new token"),
        (DiesOfTrees, CRASH, "RuntimeError: no such mask (test_support.py:"),
        (NeedsImages, NOT_BUILT, "plain generate: ValueError: You have to specify pixel_values"),
        (Rolls, NOT_BUILT, "plain generate: another text each time"),
    ],
)
def test_an_outcome_is_called_by_its_name(of, outcome, reason):
    found = check(lambda seed: llama(seed, of))
    assert found.word == outcome and found.reason.startswith(reason), found


def searches_beams(seed):
    model = llama(seed)
    model.generation_config.num_beams = 2
    return model


def test_a_refusal_says_whether_patch_had_accepted_the_model():
    mamba = Kind("mamba", "MambaForCausalLM", "causal")
    assert check(lambda seed: support.build(mamba, seed)) == Outcome(REFUSED, "keep all its state in keys and values")
    found = check(searches_beams)
    assert found.word == LATE and "got beam_search (num_beams=2)" in found.reason


def test_a_class_that_cannot_be_built_gives_the_reason():
    assert check(lambda seed: 1 / 0) == Outcome(NOT_BUILT, "ZeroDivisionError: division by zero")


def test_a_check_that_accepts_nothing_or_rejects_nothing_is_none(monkeypatch):
    oracle = support.sdt.OracleDrafter
    monkeypatch.setattr(support.sdt, "OracleDrafter", lambda text, rate, tree: oracle(text, 1.0, tree=tree))
    found = check(lambda seed: llama(seed))
    assert found == Outcome(NOT_BUILT, "no check: of OracleDrafter's drafts all or none were accepted")


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        (lambda kind, pipe: os._exit(3), Outcome(NOT_BUILT, "build: the process ended with 3")),
        (lambda kind, pipe: (pipe.send(("speculate", None)), os._exit(3)), Outcome(CRASH, "the process ended with 3")),
        (lambda kind, pipe: (pipe.send(("speculate", None)), signal.pause()), Outcome(CRASH, "did not end in 1 s")),
        (lambda kind, pipe: pipe.send(("end", Outcome(EXACT))), Outcome(EXACT)),
    ],
)
def test_a_class_that_dies_or_hangs_does_not_end_the_walk(monkeypatch, child, reason):
    """One child never ends by itself; the walk must end it to continue."""
    monkeypatch.setattr(support, "_child", child)
    context = multiprocessing.get_context("fork")
    assert support.try_apart(Kind("x", "X", "causal"), context, limit_s=1.0) == reason


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.model_type)
def test_types_of_the_version_installed_here_are_exact(kind):
    assert check(lambda seed: support.build(kind, seed), kind.mapping == "image-text") == Outcome(EXACT)


def walked(version, **outcomes):
    rows = [
        {"type": name, "model": name.upper(), "mapping": "causal", "outcome": word, **({"reason": why} if why else {})}
        for name, (word, why) in outcomes.items()
    ]
    origin = {"torch": "2", "date": "2026-01-01", "commit": "abc", "seconds": 1}
    return {"transformers": version, **origin, "rows": rows}


def test_the_page_groups_types_that_are_the_same_in_every_version():
    exact, refused = (EXACT, ""), (REFUSED, "be small")
    lines = support_page.page(
        [
            walked("5.9.0", a=exact, b=refused, c=(CRASH, "boom"), d=(NOT_BUILT, "no | size"), f=exact),
            walked("5.10.0", a=exact, b=refused, c=exact, d=(NOT_BUILT, "no | size"), e=exact, f=refused),
        ]
    ).splitlines()
    begin = lines.index("| 5.9.0 | 2 | 2026-01-01 | abc | 2 of 5 exact | 0 of 0 exact |")
    assert lines[begin + 1 : lines.index("## Vision-language models, with text alone")] == [
        "| 5.10.0 | 2 | 2026-01-01 | abc | 3 of 6 exact | 0 of 0 exact |",
        "",
        "## Decoders",
        "",
        "### Exact (2)",
        "",
        "`a`, `e` (since 5.10.0)",
        "",
        "### Not the same in every version",
        "",
        "| type | 5.9.0 | 5.10.0 |",
        "| --- | --- | --- |",
        "| `c` | **crash** | exact |",
        "| `f` | exact | **refused in patch** |",
        "",
        "### Refused in patch (1)",
        "",
        "| a model must | refused |",
        "| --- | --- |",
        "| be small | `b` |",
        "",
        "### Not built (1)",
        "",
        "| no plain text of a tiny model, because | not built |",
        "| --- | --- |",
        "| no \\| size | `d` |",
        "",
    ]


def test_the_committed_page_is_made_of_the_rows_which_have_no_fault():
    walks = support_page.read(ROWS)
    assert PAGE.read_text() == support_page.page(walks), "run: specdec-triton models --rows ... --page ..."
    for found in walks:
        faults = [row for row in found["rows"] if row["outcome"] in support.FAULTS]
        assert not faults, f"{found['transformers']}: {faults}"


def test_rows_are_written_and_read_back_in_order(tmp_path):
    found = support_page.record([(Kind("a", "A", "causal"), Outcome(REFUSED, "be small"))], lambda line: None)
    support_page.write(found | {"transformers": "5.10.0"}, tmp_path / "x" / "new.json")
    support_page.write(found | {"transformers": "5.9.0"}, tmp_path / "x" / "old.json")
    old, new = support_page.read(tmp_path / "x")
    assert (old["transformers"], new["transformers"]) == ("5.9.0", "5.10.0") and new["rows"] == found["rows"]
    assert support_page.counts(new) == "causal: 1 refused in patch"
    with pytest.raises(ValueError, match="models: rows must be a folder"):
        support_page.read(tmp_path)


def test_the_command(monkeypatch, tmp_path, capsys):
    outcomes = {"gpt2": Outcome(EXACT)}
    monkeypatch.setattr(support, "walk", lambda todo: ((kind, outcomes.get(kind.model_type)) for kind in todo))
    command = ["models", "--filter", "GPT2LMHead", "--mapping", "causal", "--json", str(tmp_path / "rows.json")]
    outcomes["gpt-sw3"] = Outcome(EXACT)
    assert cli.main(command) == 0
    assert "gpt2" in capsys.readouterr().out
    assert {row["type"] for row in support_page.read(tmp_path)[0]["rows"]} == {"gpt2", "gpt-sw3"}
    outcomes["gpt2"] = Outcome(WRONG, "from new token 2 on")
    assert cli.main(command) == 1
    page = tmp_path / "page.md"
    assert cli.main(["models", "--rows", str(tmp_path), "--page", str(page)]) == 0
    assert page.read_text() == support_page.page(support_page.read(tmp_path))
    assert cli.main(["models", "--filter", "no such type"]) == 2
    assert cli.main(["models", "--rows", str(tmp_path)]) == 2
    assert "must be given together" in capsys.readouterr().err


def test_kinds_are_the_mappings_of_the_version_installed_here():
    kinds = support.kinds()
    assert len(set(kinds)) == len(kinds) > 200
    assert Kind("llama", "LlamaForCausalLM", "causal") in kinds
    assert {kind.model_type for kind in support.kinds("image-text", "paligemma")} == {"paligemma"}
    assert not [kind for kind in support.kinds("causal") if kind.mapping != "causal"]
