"""Finds the conventions that an EAGLE or DFlash head was trained with, by the acceptance of its drafts.

A checkpoint does not say whether the numbers of the target's layers mean their inputs or their outputs, and some
checkpoints state no rope base, or another than that of their training. A wrong convention never changes a text. It
only lowers the acceptance.

Every combination drafts chains at the same places of a text. The context of a place is the text's, and the few tokens
after it are the target's greedy ones, so that all combinations draft for the same tokens.

Letters: P places, D depth of the chains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

import specdec_triton as sdt

from ..drafters import Drafter, MedusaDrafter
from ..drafters.heads import drafter_of
from ..heads.checkpoint import Checkpoint, kind_of, read_checkpoint, rope_options
from ..heads.dflash import DFlashModel
from ..heads.dflash_layouts import DFlashLayout, dflash_layout_of
from ..heads.eagle import EagleModel
from ..heads.layouts import Layout, layout_of
from ..heads.medusa import MedusaHeads
from ..heads.reader import DEFAULT_ROPE_THETA

DEPTH = 5  # tokens of a chain, at most as many as a head predicts at once
NEW_TOKENS = 24  # tokens that are decoded at each place
PLACES, CONTEXT = 16, 512
LEAST_TEXT = 32  # tokens
LONG_ROPE_THETA = 1e6  # of many models with long contexts
POOR = 0.1  # share of accepted first tokens below which the head may belong to another model
# A difference is clear if its mean over the places is at least this many standard errors from 0.
STANDARD_ERRORS = 3.0


class Convention(NamedTuple):
    """A way to read a checkpoint: arguments of `from_pretrained`, None for those that do not matter."""

    layer_meaning: str | None = None
    rope_theta: float | None = None


@dataclass(frozen=True)
class Measured:
    """The rounds of one convention at P places.

    Attributes:
        accepted: [P, D]. Number of rounds in which the draft token at depth d + 1 was accepted.
        rounds: [P]. Number of rounds.
    """

    accepted: np.ndarray
    rounds: np.ndarray

    @cached_property
    def by_position(self) -> np.ndarray:
        """[D]. Share of the rounds in which the draft token was accepted."""
        return self.accepted.sum(0) / self.rounds.sum()

    @property
    def length(self) -> float:
        """Acceptance length."""
        return 1 + float(self.by_position.sum())

    def clearly_above(self, other: "Measured") -> bool:
        """True if more is accepted than of `other`, by the differences at the places."""
        gain = self.accepted.sum(1) / self.rounds - other.accepted.sum(1) / other.rounds
        error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else float("inf")
        return bool(gain.mean() > 0 and gain.mean() >= STANDARD_ERRORS * error)


@dataclass(frozen=True)
class Fit:
    """The acceptance of a head under each convention.

    Attributes:
        kind: see `kind_of`.
        layer_ids: numbers of the target's layers in the checkpoint; None if it has none.
        found: convention -> its rounds. The first is that of a call without arguments.
        places, context: P, and the number of tokens before each place.
    """

    kind: str
    layer_ids: tuple[int, ...] | None
    found: dict[Convention, Measured]
    places: int
    context: int

    @property
    def default(self) -> Convention:
        return next(iter(self.found))

    def best(self, **fixed: object) -> Convention:
        """The convention of the highest acceptance among those with the given fields."""
        among = [each for each in self.found if all(getattr(each, name) == value for name, value in fixed.items())]
        return max(among, key=lambda each: self.found[each].length)

    @cached_property
    def meanings(self) -> list[str | None]:
        """The possible meanings of layer numbers, that of the highest acceptance first."""
        meanings = dict.fromkeys(each.layer_meaning for each in self.found)
        return sorted(meanings, key=lambda each: -self.found[self.best(layer_meaning=each)].length)

    @cached_property
    def is_decided(self) -> bool:
        """False if the numbers of layers have two meanings, and the evidence for one of them is too thin."""
        best = [self.found[self.best(layer_meaning=each)] for each in self.meanings]
        return len(best) == 1 or best[0].clearly_above(best[1])

    @cached_property
    def convention(self) -> Convention:
        """The convention to use: that of a call without arguments, except where another is clearly better."""
        meaning = self.meanings[0] if self.is_decided else self.default.layer_meaning
        usual, best = Convention(meaning, self.default.rope_theta), self.best(layer_meaning=meaning)
        return best if self.found[best].clearly_above(self.found[usual]) else usual

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of `from_pretrained` that `convention` needs."""
        pairs = zip(Convention._fields, self.convention, self.default, strict=True)
        return {name: value for name, value, usual in pairs if value != usual}

    def lines(self, head: str) -> list[str]:
        """The table, and the findings in words. `head` is the name that the user gave."""
        depth = next(iter(self.found.values())).accepted.shape[1]
        labels = {each: label(each, self.layer_ids) for each in self.found}
        labels[self.default] += " (without arguments)"
        width = max(map(len, labels.values()))
        lines = [f"{'':{width}}  {'tokens a round':>14}" + "".join(f"{f'at {at}':>8}" for at in range(1, depth + 1))]
        for convention, measured in self.found.items():
            shares = "".join(f"{share:8.1%}" for share in measured.by_position)
            lines.append(f"{labels[convention]:{width}}  {measured.length:14.2f}{shares}")
        rounds = [int(measured.rounds.sum()) for measured in self.found.values()]
        lines.append(
            f"{self.places} places with {self.context} tokens of context, {self.places * NEW_TOKENS} tokens, "
            f"{min(rounds)} to {max(rounds)} rounds"
        )
        return lines + self.findings(head)

    def findings(self, head: str) -> list[str]:
        lines = []
        if self.found[self.best()].by_position[0] < POOR:
            lines.append("Few drafts are accepted: the head may be that of another model, or of texts of another kind.")
        if self.kind == "medusa":
            return [*lines, "Medusa's heads have no conventions to choose."]
        chosen = self.convention
        if not self.is_decided:
            lines.append(
                f"The evidence is too thin to tell the {self.meanings[0]}s of layers from their {self.meanings[1]}s: "
                "give a longer --text of the kind that the head was trained for, or more --places."
            )
        elif len(self.meanings) > 1:
            lines.append(f"The checkpoint means the {chosen.layer_meaning}s of layers.")
        if chosen.rope_theta != self.default.rope_theta:
            lines.append(f"Its rope base is {chosen.rope_theta:.10g}.")
        else:
            lines.append(f"No rope base is clearly better than {chosen.rope_theta:.10g}.")
        drafter = "DFlashDrafter" if self.kind == "dflash" else "EagleDrafter"
        call = f"Use {drafter}.from_pretrained({head!r}, target"
        if self.arguments:
            given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
            lines.append(f"{call}, {given}).")
        else:
            lines.append(f"{call}), without other arguments.")
        return lines

    def report(self) -> dict:
        """The contents of `lines` for JSON."""
        rows = [
            {
                **convention._asdict(), "acceptance_length": measured.length,
                "by_position": measured.by_position.tolist(), "rounds": int(measured.rounds.sum()),
            }
            for convention, measured in self.found.items()
        ]  # fmt: skip
        return {
            "kind": self.kind, "layer_ids": self.layer_ids, "places": self.places, "context": self.context,
            "tokens": self.places * NEW_TOKENS, "rows": rows, "decided": self.is_decided, "arguments": self.arguments,
        }  # fmt: skip


def label(convention: Convention, layer_ids: tuple[int, ...] | None) -> str:
    """A convention in words."""
    parts = []
    if convention.layer_meaning:
        parts.append(f"{convention.layer_meaning}s of layers {', '.join(map(str, layer_ids or ()))}")
    if convention.rope_theta:
        parts.append(f"rope base {convention.rope_theta:.10g}")
    return ", ".join(parts) or "Medusa's heads"


def fit(
    target: PreTrainedModel,
    tokenizer,
    head: str | Path,
    text: str,
    places: int = PLACES,
    context: int = CONTEXT,
    progress: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Measure the acceptance of a head under all conventions that it may have.

    Args:
        target: the model that the head was trained for.
        tokenizer: its tokenizer.
        head: a local folder, or a name on the hub.
        text: of the kind that the head was trained for.
        places: number of places in the text.
        context: number of tokens before each place, at most; half of the text if it is shorter.
        progress: called with one line of text before each measurement.

    Raises:
        ValueError: the text is too short, or the head is not supported or does not fit the target.
    """
    prompts = windows(tokenizer, text, places, context).to(target.device)
    checkpoint = read_checkpoint(head)
    kind = kind_of(checkpoint.tensors, checkpoint.config)
    if kind is None:
        raise ValueError(f"fit-head: {head} must hold a draft head, got tensors of another model")
    found, layer_ids = {}, None
    options = {"dtype": target.dtype, "device": target.device}
    if kind == "medusa":
        heads = MedusaHeads.from_checkpoint(checkpoint, **options)
        depth = min(heads.num_heads, DEPTH)
        found[Convention()] = measure(target, MedusaDrafter(heads, sdt.Topology.chain(depth)), depth, prompts)
    else:
        layout = layout_of_kind(kind, checkpoint)
        layer_ids = layout.layer_ids
        for each in conventions(layout, target):
            progress(f"measuring {label(each, layer_ids)}")
            of_kind = DFlashModel if kind == "dflash" else EagleModel
            model = of_kind.from_checkpoint(checkpoint, **each._asdict(), **options)
            depth = min(DEPTH, model.num_drafted or DEPTH)
            found[each] = measure(target, drafter_of(model, sdt.Topology.chain(depth)), depth, prompts)
    return Fit(kind, layer_ids, found, *prompts.shape)


def windows(tokenizer, text: str, places: int, context: int) -> torch.Tensor:
    """[P, T] int64: the tokens before P places, which are spread evenly over the text. If the tokenizer puts tokens
    before a text, each row begins with them."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    before = whole[: len(whole) - len(tokens)] if whole[len(whole) - len(tokens) :] == tokens else []
    if len(tokens) < LEAST_TEXT:
        raise ValueError(f"fit-head: --text must have at least {LEAST_TEXT} tokens, got {len(tokens)}")
    context = min(context, len(tokens) // 2)
    ends = np.unique(np.linspace(context, len(tokens), places).astype(int)).tolist()
    return torch.tensor([before + tokens[end - context : end] for end in ends])


def layout_of_kind(kind: str, checkpoint: Checkpoint) -> Layout | DFlashLayout:
    """The layout of a head of EAGLE or DFlash; `kind` is that of `kind_of`."""
    return dflash_layout_of(checkpoint) if kind == "dflash" else layout_of(checkpoint)


def conventions(layout: Layout | DFlashLayout, target: PreTrainedModel) -> list[Convention]:
    """All conventions that a head may have for this target, that of a call without arguments first."""
    of_target = rope_options(config := target.config.get_text_config(decoder=True).to_dict())
    bases = [
        layout.config.rope_parameters["rope_theta"],
        DEFAULT_ROPE_THETA,
        of_target.get("rope_theta") or config.get("rope_theta"),
        LONG_ROPE_THETA,
    ]
    meanings: list[str | None] = [None]
    if layout.layer_ids:
        last = {"input": config["num_hidden_layers"], "output": config["num_hidden_layers"] - 1}
        possible = [each for each in last if max(layout.layer_ids) <= last[each]]
        # the checkpoint's own first, also if it does not fit: the error then names both sides
        meanings = list(dict.fromkeys([layout.layer_meaning, *possible]))
    bases = list(dict.fromkeys(float(base) for base in bases if base))
    return [Convention(meaning, base) for meaning in meanings for base in bases]


def measure(target: PreTrainedModel, drafter: Drafter, depth: int, prompts: torch.Tensor) -> Measured:
    """Decode a few tokens greedily after each of the prompts [P, T], with chains of `depth` draft tokens, and count the
    accepted ones. Rounds at the end, in which fewer than `depth` + 1 tokens are left to emit, are not counted."""
    start, rounds = drafter.start, []

    def recording(context, tree=None):
        session = start(context, tree)

        def observe_on_host(drafted: list[int], emitted: list[int]) -> None:
            rounds.append((emitted, (context.host_budget + emitted).tolist()))

        session.observe_on_host = observe_on_host
        return session

    drafter.start = recording
    target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=target.config.get_text_config().vocab_size + 1,  # no token ends a row
        pad_token_id=0,
        custom_generate=sdt.SpeculativeGenerate(drafter=drafter),
    )
    emitted, left = np.moveaxis(np.array(rounds), 1, 0)  # [rounds, P] each; left: tokens to emit before the round
    counted = (emitted > 0) & (left > depth)
    accepted = [(counted & (emitted > at)).sum(0) for at in range(1, depth + 1)]
    return Measured(np.stack(accepted, 1), counted.sum(0))
