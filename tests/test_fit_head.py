"""The conventions of a head: found by measurements on a tiny target, for heads that are right under one of them."""

import json
import random
import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoints
import specdec_triton as sdt
import tiny
from families import build
from specdec_triton.heads.checkpoint import Checkpoint, read_checkpoint
from specdec_triton.heads.dflash import DFlashModel
from specdec_triton.heads.eagle import EagleModel
from specdec_triton.tools import cli, fit_head, models
from specdec_triton.tools.fit_head import Convention, Fit, Measured

LAYERS, TARGET_HIDDEN = 6, 64
IDS = (1, 3, 4)  # outputs are meant if nothing is said, because the first is 1
HIDDEN = len(IDS) * TARGET_HIDDEN
TEXT = "".join(random.Random(0).choices(string.ascii_letters, k=300))
PLACES, CONTEXT, NEW_TOKENS = 12, 20, 20


@pytest.fixture(scope="module")
def target():
    return tiny.model(layers=LAYERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("models") / "target", layers=LAYERS))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(models, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(fit_head, "NEW_TOKENS", NEW_TOKENS)


def write_head(folder, meaning, trained_base=5000.0, attends=False, silent=False):
    """An EAGLE-3 head whose first draft token is right at most places, if it is read as it was "trained".

    All its weights are random, except the output layer, which is fitted to the target's own text.

    Args:
        folder: where it is written.
        meaning: what its layer ids meant.
        trained_base: its rope base. The config says 5000.
        attends: its states are mostly those of its attention. Otherwise the rope base does not matter.
        silent: the output layer is left zero.
    """
    generator = torch.Generator().manual_seed(0)

    def weight(rows, columns, size=1.0):
        return torch.randn(rows, columns, generator=generator) * size / columns**0.5

    norms = {f"midlayer.{name}.weight": HIDDEN for name in ("hidden_norm", "post_attention_layernorm")}
    norms |= {"midlayer.input_layernorm.weight": TARGET_HIDDEN, "norm.weight": HIDDEN}
    tensors = {
        "fc.weight": torch.eye(HIDDEN) * (0.02 if attends else 1),
        "lm_head.weight": torch.zeros(len(tiny.TOKENS), HIDDEN),
        "midlayer.self_attn.o_proj.weight": weight(HIDDEN, 256, 8.0 * attends),
        "midlayer.mlp.down_proj.weight": torch.zeros(HIDDEN, 8),
        **{f"midlayer.self_attn.{part}_proj.weight": weight(256, TARGET_HIDDEN + HIDDEN, 8.0) for part in "qkv"},
        **{f"midlayer.mlp.{part}_proj.weight": weight(8, HIDDEN) for part in ("gate", "up")},
        **{name: torch.ones(size) for name, size in norms.items()},
    }
    config = {
        "hidden_size": HIDDEN,
        "target_hidden_size": TARGET_HIDDEN,
        "intermediate_size": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 8,
        "rope_theta": 5000.0,
        "vocab_size": len(tiny.TOKENS),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(IDS)},
    }
    folder.mkdir(exist_ok=True)
    target = tiny.model(layers=LAYERS)
    prompts = fit_head.windows(tiny.tokenizer(), TEXT, PLACES, CONTEXT)
    with torch.no_grad():
        text = target.generate(prompts, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=10_000)
        states = target(text, output_hidden_states=True).hidden_states
        head = EagleModel.from_checkpoint(
            Checkpoint("a head", config, tensors), rope_theta=trained_base, layer_meaning=meaning
        )
        features = head.features([states[each + (meaning == "output")] for each in IDS])
        positions = torch.arange(text.shape[1] - 2)
        embeds = target.get_input_embeddings()(text[:, 1:-1])
        out = head(inputs_embeds=embeds, features=features[:, :-2], position_ids=positions[None]).last_hidden_state
    # the row of a place has its last token but one, and predicts the second token after it
    states, wanted = head.final_norm(out)[:, CONTEXT - 2 :].flatten(0, 1), text[:, CONTEXT:].flatten()
    wanted = torch.nn.functional.one_hot(wanted, len(tiny.TOKENS)).float()
    if not silent:
        tensors["lm_head.weight"] = torch.linalg.lstsq(states, wanted).solution.T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_block_head(folder, meaning):
    """A DFlash head whose first draft token is right at most places, if its layer ids mean `meaning`.

    All its weights are random, except the output layer, which is fitted to the target's own text.
    """
    hidden, vocab, random = 256, len(tiny.TOKENS), torch.Generator().manual_seed(0)
    sizes = {
        "fc": (hidden, HIDDEN), "embed_tokens": (vocab, hidden), "layers.0.mlp.down_proj": (hidden, 8),
        **{f"layers.0.mlp.{part}_proj": (8, hidden) for part in ("gate", "up")},
        **{f"layers.0.self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"},
    }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(size, generator=random) / size[1] ** 0.5 for name, size in sizes.items()}
    norms = {f"layers.0.{name}": hidden for name in ("input_layernorm", "post_attention_layernorm")}
    norms |= {"hidden_norm": hidden, "norm": hidden} | {f"layers.0.self_attn.{part}_norm": 32 for part in "qk"}
    tensors |= {f"{name}.weight": torch.ones(size) for name, size in norms.items()}
    tensors["lm_head.weight"] = torch.zeros(vocab, hidden)
    config = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "target_hidden_size": TARGET_HIDDEN,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "rope_theta": 5000.0,
        "vocab_size": vocab,
        "block_size": 4,
        "dflash_config": {"mask_token_id": 1, "target_layer_ids": list(IDS)},
    }
    head = DFlashModel.from_checkpoint(Checkpoint("a head", config, dict(tensors)), layer_meaning=meaning)
    states = []
    head.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][:, 0]))
    prompts = fit_head.windows(tiny.tokenizer(), TEXT, PLACES, CONTEXT)
    # no draft is accepted, so each round is that of one token of the text
    custom = sdt.SpeculativeGenerate(drafter=sdt.DFlashDrafter(head, num_tokens=1))
    text = tiny.model(layers=LAYERS).generate(
        prompts, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=10_000, custom_generate=custom
    )
    wanted = torch.nn.functional.one_hot(text[:, CONTEXT + 1 :], vocab).float().transpose(0, 1)[: len(states)]
    assert len(wanted) == len(states) >= NEW_TOKENS - 2
    solution = torch.linalg.lstsq(torch.cat(states), wanted.flatten(0, 1)).solution
    tensors["lm_head.weight"] = solution.T.contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fitted(target, head, **options):
    return fit_head.fit(target, tiny.tokenizer(), head, TEXT, **{"places": PLACES, "context": CONTEXT, **options})


@pytest.mark.parametrize("meaning", ["input", pytest.param("output", marks=pytest.mark.slow)])
def test_the_meaning_of_layer_ids_is_found(target, tmp_path, meaning):
    found = fitted(target, write_head(tmp_path, meaning))
    assert list(found.found) == [
        Convention(each, base) for each in ("output", "input") for base in (5000.0, 10000.0, 1000000.0)
    ]
    assert found.is_decided and found.convention == Convention(meaning, 5000.0)
    assert found.arguments == ({"layer_meaning": "input"} if meaning == "input" else {})
    for convention, measured in found.found.items():
        first = measured.by_position[0]
        assert first > 0.7 if convention.layer_meaning == meaning else first < 0.4
        # this head does not attend
        assert (measured.accepted == found.found[Convention(convention.layer_meaning, 5000.0)].accepted).all()


def test_the_conventions_of_a_block_head_are_found(target, tmp_path):
    found = fitted(target, write_block_head(tmp_path, "input"))
    assert list(found.found) == [
        Convention(each, base) for each in ("output", "input") for base in (5000.0, 10000.0, 1000000.0)
    ]
    assert found.is_decided and found.arguments == {"layer_meaning": "input"}
    for convention, measured in found.found.items():
        assert measured.accepted.shape[1] == 3  # the tokens of a block
        right = convention == Convention("input", 5000.0)
        assert (measured.by_position[0] > 0.7) == right, convention
    use = "Use DFlashDrafter.from_pretrained('owner/head', target, layer_meaning='input')."
    assert found.findings("owner/head")[-1] == use


@pytest.mark.parametrize("base", [pytest.param(5000.0, marks=pytest.mark.slow), 1000000.0])
def test_the_rope_base_is_found(target, tmp_path, base):
    found = fitted(target, write_head(tmp_path, "output", base, attends=True))
    assert found.is_decided and found.convention == Convention("output", base)
    assert found.arguments == ({} if base == 5000 else {"rope_theta": base})


def test_without_evidence_nothing_is_decided(target, tmp_path):
    """The head drafts the same token everywhere."""
    found = fitted(target, write_head(tmp_path, "input", silent=True), places=2)
    assert not found.is_decided and found.convention == Convention("output", 5000.0) and not found.arguments
    few, thin, *_, use = found.findings("owner/head")
    assert few.startswith("Few drafts are accepted") and thin.startswith("The evidence is too thin to tell the outputs")
    assert use == "Use EagleDrafter.from_pretrained('owner/head', target), without other arguments."


def measured(*accepted):
    """Rounds of ten at each place, of which so many accepted the first token."""
    return Measured(np.array(accepted)[:, None], np.full(len(accepted), 10))


def test_a_difference_is_clear_if_the_places_agree():
    low = measured(1, 2, 3, 2)
    assert measured(4, 5, 6, 5).clearly_above(low)  # by the same everywhere
    assert measured(5, 5, 6, 6).clearly_above(low)
    assert not measured(1, 2, 3, 3).clearly_above(low)  # one standard error
    assert not low.clearly_above(low) and not low.clearly_above(measured(5, 5, 6, 6))
    assert not measured(9).clearly_above(measured(1))  # of one place nothing is known
    assert measured(5, 5).length == 1.5


@pytest.mark.parametrize(
    ("rounds", "decided", "convention"),
    [
        # the best in every column, but only one column is clear
        (((5, 5, 5), (5, 6, 5), (1, 1, 1), (1, 1, 2)), True, Convention("output", 1.0)),
        (((1, 1, 1), (1, 1, 2), (5, 5, 5), (8, 8, 8)), True, Convention("input", 2.0)),
        (((1, 1, 1), (4, 4, 4), (1, 1, 2), (4, 5, 4)), False, Convention("output", 2.0)),
        (((1, 1, 1), (1, 1, 1), (1, 2, 1), (9, 1, 1)), False, Convention("output", 1.0)),
    ],
)
def test_only_clear_differences_change_the_arguments(rounds, decided, convention):
    places = [Convention(meaning, base) for meaning in ("output", "input") for base in (1.0, 2.0)]
    fit = Fit("eagle3", IDS, {place: measured(*each) for place, each in zip(places, rounds, strict=True)}, 3, 9)
    assert (fit.is_decided, fit.convention) == (decided, convention)
    changed = {name: value for name, value in convention._asdict().items() if value not in ("output", 1.0)}
    assert fit.arguments == changed
    assert json.loads(json.dumps(fit.report()))["arguments"] == changed


@pytest.mark.parametrize(
    ("layout", "config", "meanings", "bases"),
    [
        ("specforge", {}, ["output", "input"], [5000.0, 10000.0, 70.0, 1000000.0]),
        ("speculators", {}, ["input", "output"], [5000.0, 10000.0, 70.0, 1000000.0]),
        ("safeailab", {}, [None], [10000.0, 70.0, 1000000.0]),  # no layers, no base
        ("eagle1_qwen2", {"rope_theta": 1e6}, [None], [1000000.0, 10000.0, 70.0]),
        # 8 is the output of the last of 8 layers, before the final norm
        ("speculators_qwen3", {}, ["input"], [5000.0, 10000.0, 70.0, 1000000.0]),
    ],
)
def test_the_conventions_that_a_head_may_have(tmp_path, layout, config, meanings, bases):
    model = build("llama", num_hidden_layers=8, rope_parameters={"rope_type": "default", "rope_theta": 70.0})
    checkpoint = read_checkpoint(checkpoints.write_head(tmp_path, model, layout).folder)
    checkpoint = replace(checkpoint, config=checkpoint.config | config)
    layout = fit_head.layout_of_kind("eagle3", checkpoint)
    assert fit_head.conventions(layout, model) == [Convention(each, base) for each in meanings for base in bases]


def test_places_are_spread_over_the_text():
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("0123456789" * 4)["input_ids"]
    rows = fit_head.windows(tokenizer, "0123456789" * 4, 3, 10).tolist()
    assert rows == [tokens[:10], tokens[15:25], tokens[30:]]
    assert fit_head.windows(tokenizer, "0123456789" * 4, 50, 512).shape == (21, 20)  # half of the text

    def with_first(text, add_special_tokens=True):
        return {"input_ids": [2] * add_special_tokens + tokens}

    assert fit_head.windows(with_first, "", 2, 10).tolist() == [[2, *tokens[:10]], [2, *tokens[30:]]]
    with pytest.raises(ValueError, match="--text must have at least 32 tokens, got 31"):
        fit_head.windows(tokenizer, "0" * 31, 3, 10)


def run(folder, head, *more, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    small = ["--places", str(PLACES), "--context", str(CONTEXT)]
    return cli.main(["fit-head", folder, str(head), "--text", str(tmp_path / "text.txt"), *small, *more])


def test_the_command_says_what_to_pass(folder, tmp_path, capsys):
    head = write_head(tmp_path / "head", "input")
    assert run(folder, head, tmp_path=tmp_path) == 0
    out, err = capsys.readouterr()
    header, *rows, total, meaning, base, use = out.splitlines()
    assert header.split() == "tokens a round at 1 at 2 at 3 at 4 at 5".split() and len(rows) == 6
    assert rows[0].startswith("outputs of layers 1, 3, 4, rope base 5000 (without arguments) ")
    assert total.startswith("12 places with 20 tokens of context, 240 tokens, ")
    assert (meaning, base) == (
        "The checkpoint means the inputs of layers.",
        "No rope base is clearly better than 5000.",
    )
    assert use == f"Use EagleDrafter.from_pretrained({str(head)!r}, target, layer_meaning='input')."
    assert err.count("measuring ") == 6


def test_the_command_measures_medusas_heads(target, folder, tmp_path, capsys):
    """The heads draft a token that the target never emits."""
    head, hidden, vocab = tmp_path / "head", TARGET_HIDDEN, len(tiny.TOKENS)
    head.mkdir()
    prompts = fit_head.windows(tiny.tokenizer(), TEXT, PLACES, CONTEXT)
    text = target.generate(prompts, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=10_000)
    never = next(token for token in range(vocab) if token not in text)
    tensors = {}
    for each in range(2):
        tensors[f"{each}.0.linear.weight"] = torch.zeros(hidden, hidden)
        tensors[f"{each}.0.linear.bias"] = torch.full((hidden,), 100.0)  # the states are then positive
        tensors[f"{each}.1.weight"] = torch.zeros(vocab, hidden).index_fill(0, torch.tensor([never]), 1.0)
    save_file(tensors, head / "model.safetensors")
    assert run(folder, head, tmp_path=tmp_path) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("at 1    at 2") and out[-1] == "Medusa's heads have no conventions to choose."
    assert run(folder, head, "--json", tmp_path=tmp_path) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert found["kind"] == "medusa" and found["tokens"] == 240 and len(row["by_position"]) == 2
    # each round emits one of the 19 tokens after the first; the last two rounds could not accept two drafts
    assert row["by_position"] == [0, 0] and row["rounds"] == PLACES * (NEW_TOKENS - 3)


def test_other_heads_are_refused_by_name(folder, tmp_path, capsys):
    (tmp_path / "head").mkdir()
    save_file({"hydra_lm_head.weight": torch.ones(1)}, tmp_path / "head" / "model.safetensors")
    assert run(folder, tmp_path / "head", tmp_path=tmp_path) == 2
    assert "the draft head must be EAGLE-1, EAGLE-2, EAGLE-3, P-EAGLE, DFlash or Medusa, got Hydra" in (
        capsys.readouterr().err
    )
    assert run(folder, folder, tmp_path=tmp_path) == 2
    assert f"{folder} must hold a draft head, got tensors of another model" in capsys.readouterr().err


def test_the_text_must_be_a_file(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit-head", "model", "head", "--text", "no/such/text"])
    assert "argument --text: must be a file, got 'no/such/text'" in capsys.readouterr().err
