"""Options of the command line: values that are refused before any model is loaded, and the words of the help."""

import argparse

import pytest
import torch

import specdec_triton as sdt
from specdec_triton.tools import cli, command_options, models

MODEL = ["--model", "m"]
REQUIRED = {
    "generate": [*MODEL, "--prompt", "p"],
    "profile": MODEL,
    "prove": MODEL,
    "demo": MODEL,
    "plan": ["--target", "smollm2-135m", "--draft", "none", "--device", "h100", "--acceptance", "0.8"],
    "models": [],
    "bench": ["kernels"],
    "corpus": ["build", "--tokenizer", "m", "--out", "o", __file__],
}
DECODING = {
    "--top-p": ("2", "must be a number above 0 and at most 1, got '2'"),
    "--temperature": ("-1", "must be a finite number of at least 1e-20, got '-1'"),
    "--top-k": ("-3", "must be an integer of at least 0, got '-3'"),
    "--min-p": ("nan", "must be a number from 0 to 1, got 'nan'"),
    "--seed": ("1.5", "must be a 64-bit integer, got '1.5'"),
    "--batch": ("0", "must be an integer of at least 1, got '0'"),
    "--rule": ("nonesuch", "invalid choice: 'nonesuch' (choose from"),
    "--tree": ("wide", "must be auto, a number of nodes of at least 1, or chain:N with N of at least 1, got 'wide'"),
    "--prompt-lookup": ("x", "must be an integer of at least 1, got 'x'"),
    "--assistant-early-exit": ("0", "must be an integer of at least 1, got '0'"),
}
REFUSED = [(command, flag, *case) for command in ("generate", "profile") for flag, case in DECODING.items()]
REFUSED += [("prove", flag, *DECODING[flag]) for flag in ("--top-p", "--temperature", "--top-k", "--min-p", "--seed")]
REFUSED += [
    ("generate", "--tree", "chain:0", "got 'chain:0'"),
    ("generate", "--temperature", "0", "got '0'"),
    ("generate", "--temperature", "inf", "got 'inf'"),
    ("prove", "--tree", "auto", "must be a number of nodes of at least 2, or chain:N with N of at least 1, got 'auto'"),
    ("prove", "--tree", "1", "got '1'"),
    ("prove", "--tokens", "2", "must be an integer of at least 3: the first comes from the prompt, the last"),
    ("profile", "--max-new-tokens", "1", "must be an integer of at least 2: the first comes from the prompt"),
    ("demo", "--max-new-tokens", "many", "must be an integer of at least 1, got 'many'"),
    ("plan", "--acceptance", "x", "must be probabilities above 0 that sum to at most 1, such as 0.8 or 0.6,0.2, got"),
    ("plan", "--acceptance", "0.8,0.3", "got '0.8,0.3'"),
    ("plan", "--overhead-us", "-1", "must be a number of at least 0, got '-1'"),
    ("plan", "--target-bits", "four", "must be a number above 0, got 'four'"),
    ("plan", "--plot", "no/such/plot.png", "must be a file in a folder that exists, got 'no/such/plot.png'"),
    ("models", "--json", "no/such/rows.json", "must be a file in a folder that exists, got"),
    ("models", "--page", ".", "must be a file in a folder that exists, got '.'"),
    ("profile", "--out", "no/such/folder", "must be a folder, or a new one in a folder that exists, got"),
    ("generate", "--corpus", "no/such/file", "must be a file, got 'no/such/file'"),
    ("corpus", "--out", "no/such/file", "must be a file in a folder that exists, got 'no/such/file'"),
    ("bench", "--out", __file__, "must be a folder, or a new one in a folder that exists, got"),
]


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(models, "tiny", lambda: pytest.fail("a model was made"))


@pytest.mark.parametrize(("command", "flag", "value", "message"), REFUSED)
def test_a_value_out_of_range_is_refused_by_its_option(command, flag, value, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *REQUIRED[command], flag, value])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"specdec-triton {command}: error: argument {flag}: ") and message in line
    assert "invalid" not in message or "choice" in message


def parsed(*args):
    return cli._parser().parse_args(["generate", *REQUIRED["generate"], *args])


@pytest.mark.parametrize(
    ("args", "patch", "generate"),
    [
        ([], {}, {"do_sample": False}),
        (["--rule", "greedy", "--tree", "auto"], {"rule": "greedy", "tree": "auto"}, {"do_sample": False}),
        (["--tree", "12", "--seed", "-3"], {"tree": 12, "seed": -3}, {"do_sample": True}),
        (["--rule", "block"], {"rule": "block"}, {"do_sample": True}),
        (["--tree", "chain:3"], {"tree": sdt.Topology.chain(3)}, {"do_sample": False}),
        (
            ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "0", "--min-p", "0"],
            {},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0},
        ),
    ],
)
def test_options_become_those_of_patch_and_of_generate(args, patch, generate):
    args = parsed(*args)
    assert command_options.patch_options(args) == patch
    assert command_options.generate_options(args) == generate | {"max_new_tokens": 256}
    assert sdt.Options(**patch)


@pytest.mark.parametrize(
    ("args", "assistance"),
    [
        ([], {"prompt_lookup_num_tokens": 10}),
        (["--prompt-lookup", "4", "--tree", "auto"], {"prompt_lookup_num_tokens": 4}),
        (["--tree", "32"], {"prompt_lookup_num_tokens": 31}),
        (["--tree", "chain:5"], {"prompt_lookup_num_tokens": 5}),
        (["--tree", "auto"], {"prompt_lookup_num_tokens": 10}),
        (["--assistant-early-exit", "2"], {"assistant_early_exit": 2}),
        (["--draft", "d"], {}),
        (["--suffix"], {}),
        (["--corpus", __file__], {}),
    ],
)
def test_drafts_come_from_prompt_lookup_unless_asked_otherwise(args, assistance):
    assert command_options.assistance(parsed(*args)) == assistance


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_a_greedy_rule_is_refused_with_sampling(command, capsys):
    args = [command, *REQUIRED[command], "--rule", "greedy", "--top-k", "3", "--seed", "1"]
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert "--rule must be one of coupled, " in error and "got greedy with --top-k, --seed" in error


def test_plain_decoding_is_refused_with_options_of_speculation(capsys):
    assert cli.main(["generate", *REQUIRED["generate"], "--plain", "--tree", "8"]) == 2
    assert "--plain must come without options of speculation, got --tree" in capsys.readouterr().err


def test_the_version_names_the_package_and_its_dependencies(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    package, *dependencies = capsys.readouterr().out.splitlines()
    assert package == f"specdec-triton {sdt.__version__}"
    assert [line.split()[0] for line in dependencies] == ["torch", "triton", "transformers"]
    assert dependencies[0] == f"torch {torch.__version__}"


def test_the_help_of_every_option_says_more_than_its_default():
    parser = cli._parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert set(commands.choices) == set(cli.COMMANDS)
    for name, command in commands.choices.items():
        for action in command._actions:
            words, _, default = action.help.partition(" (default: ")
            assert len(words) > 8, f"{name} {action.option_strings}: {action.help!r}"
            if action.default not in (None, "", False, argparse.SUPPRESS):
                assert default == "%(default)s)", f"{name} {action.option_strings}: {action.help!r}"


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_early_exit_says_which_models_it_wants(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "wants a checkpoint trained for it, such as LayerSkip's" in " ".join(capsys.readouterr().out.split())


def test_output_paths(tmp_path):
    assert command_options.output_file(str(tmp_path / "new.png")) == tmp_path / "new.png"
    assert command_options.output_folder(str(tmp_path)) == tmp_path
    assert command_options.output_folder(str(tmp_path / "new")) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
