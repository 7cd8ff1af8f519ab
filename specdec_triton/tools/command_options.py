"""Options of the command line: types that refuse a value in readable words, and groups that several commands share."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import specdec_triton as sdt

from ..engine.call import LEAST_TEMPERATURE
from ..ops.rules import RULES
from . import models, plan

MODEL = "hub name, local folder or .gguf file"
HEAD = "a trained head for the model: EAGLE, DFlash or Medusa (hub name or local folder)"
PROMPT_LOOKUP = 10
FILTERS = ("temperature", "top_k", "top_p", "min_p")

Option = tuple[str, dict[str, Any]]  # arguments of `add_argument`
MTP: Option = (
    "--mtp",
    {
        "help": "draft with the layers for multi-token prediction (MTP) in the model's own checkpoint",
        "action": "store_true",
    },
)


class Group(NamedTuple):
    """Options under one heading of a command's help; of `exclusive` ones a call may have one."""

    options: list[Option]
    title: str | None = None
    description: str | None = None
    exclusive: bool = False

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        group: Any = parser
        if self.title:
            group = parser.add_argument_group(self.title, self.description)
        if self.exclusive:
            group = group.add_mutually_exclusive_group()
        for flag, settings in self.options:
            group.add_argument(flag, **settings)


def option(flag: str, help: str, **settings: Any) -> Option:
    """One option; its help ends with the default, if there is one."""
    has_default = settings.get("default") not in (None, "") and settings.get("action") != "store_true"
    return flag, settings | {"help": f"{help} (default: %(default)s)" if has_default else help}


def number(wanted: str, is_valid: Callable[[Any], bool], kind: type = float) -> Callable[[str], Any]:
    """The type of an option that is a number; the error says `wanted` and the text that came."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def at_least(least: int, why: str = "") -> Callable[[str], int]:
    return number(f"an integer of at least {least}{why}", lambda value: value >= least, int)


POSITIVE = number("a number above 0", lambda value: 0 < value < float("inf"))
TEMPERATURE = number(
    f"a finite number of at least {LEAST_TEMPERATURE}", lambda value: LEAST_TEMPERATURE <= value < float("inf")
)
TOP_P = number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
MIN_P = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
SEED = number("a 64-bit integer", lambda value: -(2**63) <= value < 2**63, int)


def tree(text: str) -> sdt.Topology | int | str:
    """The type of `--tree`, for the option `tree` of `patch`."""
    if text == "auto":
        return text
    found = re.fullmatch(r"(chain:)?([1-9]\d{0,8})", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"must be auto, a number of nodes of at least 1, or chain:N with N of at least 1, got {text!r}"
        )
    size = int(found[2])
    return sdt.Topology.chain(size) if found[1] else size


def drafting_tree(text: str) -> sdt.Topology | int:
    """The type of a `--tree` that has a fixed shape and at least one draft token."""
    try:
        found = tree(text)
    except argparse.ArgumentTypeError:
        found = 1
    if found in (1, "auto"):
        raise argparse.ArgumentTypeError(
            f"must be a number of nodes of at least 2, or chain:N with N of at least 1, got {text!r}"
        )
    return found


def acceptance(text: str) -> list[float]:
    """The type of `--acceptance`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not plan.is_acceptance(found):
        raise argparse.ArgumentTypeError(
            f"must be probabilities above 0 that sum to at most 1, such as 0.8 or 0.6,0.2, got {text!r}"
        )
    return found


def input_file(text: str) -> Path:
    """The type of a file to read."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a file, got {text!r}")
    return path


def output_file(text: str) -> Path:
    """The type of a file to write: refused before the work if it could not be written after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def output_folder(text: str) -> Path:
    """The type of a folder to write to, which the command makes if it does not exist."""
    path = Path(text)
    if not path.is_dir() and (path.exists() or not path.parent.is_dir()):
        raise argparse.ArgumentTypeError(f"must be a folder, or a new one in a folder that exists, got {text!r}")
    return path


def count(flag: str, default: int, help: str, least: int = 1, why: str = "", metavar: str = "N") -> Option:
    """An option that is an integer of at least `least`."""
    return option(flag, help, type=at_least(least, why), default=default, metavar=metavar)


def filters(temperature: float | None = None, top_k: int | None = None, top_p: float | None = None) -> list[Option]:
    """The options that filter a distribution before a token is drawn, with these defaults."""
    return [
        option(
            "--temperature", "divides the logits; below 1 likely tokens become likelier", type=TEMPERATURE,
            default=temperature, metavar="T",
        ),
        option(
            "--top-k", "keep the K likeliest tokens; 0: all", type=at_least(0), default=top_k, metavar="K",
        ),
        option(
            "--top-p", "keep the fewest likeliest tokens whose probabilities sum to P; 1: all", type=TOP_P,
            default=top_p, metavar="P",
        ),
        option(
            "--min-p", "keep tokens of at least P times the probability of the likeliest; 0: all", type=MIN_P,
            metavar="P",
        ),
    ]  # fmt: skip


def dtype(default: str, help: str = "of the weights") -> Option:
    choices = ["auto", *models.DTYPES] if default == "auto" else list(models.DTYPES)
    return option("--dtype", help, choices=choices, default=default)


def drafting(*more: Option) -> Group:
    """Sources of draft tokens, of which a call may have one."""
    return Group(
        [
            option("--draft", f"a smaller model that drafts ({MODEL}), or {HEAD}", metavar="MODEL"),
            MTP,
            option(
                "--prompt-lookup",
                "draft up to N tokens that followed the same words earlier in the text (the default drafter; "
                f"N is {PROMPT_LOOKUP}, or the depth of --tree)",
                type=at_least(1), metavar="N",
            ),
            option(
                "--assistant-early-exit",
                "draft with the first N layers of the model; wants a checkpoint trained for it, such as LayerSkip's "
                "(facebook/layerskip-llama3.2-1B): other models accept next to none of these drafts",
                type=at_least(1), metavar="N",
            ),
            option(
                "--suffix",
                "draft the tokens that most often followed the same words earlier in the text, as a tree",
                action="store_true",
            ),
            option(
                "--corpus", "like --suffix, and look the words up in a corpus, too: a file of `corpus build`",
                type=input_file, metavar="FILE",
            ),
            *more,
        ],
        "drafting", "One of these at a time.", exclusive=True,
    )  # fmt: skip


def decoding(seed: str = "a new one each time") -> list[Group]:
    """Options of every command that calls `generate`, read by `patch_options` and `generate_options`.

    Args:
        seed: the default, in words.
    """
    return [
        Group(
            [
                option(
                    "--tree",
                    "auto, a number of nodes (root included), or chain:N for N draft tokens in a row (default: the "
                    "drafter's own)",
                    type=tree,
                ),
                option(
                    "--rule",
                    "acceptance rule for sampled texts; all but typical leave the distribution as it is (default: "
                    "coupled)",
                    choices=["greedy", *RULES],
                ),
                count("--batch", 1, "number of sequences that are decoded together, all with the same prompt"),
                dtype("auto", "of the weights; auto: bfloat16 on a GPU, float32 without one"),
            ],
            "decoding",
        ),
        Group(
            [
                *filters(),
                option(
                    "--seed",
                    f"sampled texts are the same for the same seed, with any drafter and --tree (default: {seed})",
                    type=SEED,
                ),
            ],
            "sampling",
            "Decoding is greedy unless one of these options, or a --rule other than greedy, is given. Options that are "
            "not given then have the values of the model's generation config.",
        ),
    ]


def patch_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `sdt.patched` that were given, but for the drafter."""
    return {name: value for name in ("tree", "rule", "seed") if (value := getattr(args, name)) is not None}


def generate_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate`, but for the prompt and the assistance.

    Raises:
        ValueError: `--rule greedy` with sampling options.
    """
    given = {name: value for name in FILTERS if (value := getattr(args, name)) is not None}
    asked = [*given, *(["seed"] if args.seed is not None else [])]
    if asked and args.rule == "greedy":
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ValueError(f"--rule must be one of {', '.join(RULES)} with sampling options, got greedy with {flags}")
    is_sampled = bool(asked) or args.rule in RULES
    return {"do_sample": is_sampled, "max_new_tokens": args.max_new_tokens, **given}


def assistance(args: argparse.Namespace) -> dict[str, int]:
    """The argument of `generate` that asks for drafts, unless a drafter of its own makes them."""
    if args.draft or args.mtp or args.suffix or args.corpus:
        return {}
    if args.assistant_early_exit:
        return {"assistant_early_exit": args.assistant_early_exit}
    shape = args.tree
    depth = max(shape - 1, 1) if isinstance(shape, int) else getattr(shape, "max_depth", PROMPT_LOOKUP)
    return {"prompt_lookup_num_tokens": args.prompt_lookup or depth}
