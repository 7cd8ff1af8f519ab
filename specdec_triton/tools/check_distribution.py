"""Tests whether speculation leaves a model's output distribution as it is, for any pair of models.

Every continuation of a prompt is enumerated with its exact probability, from the target alone under transformers' own
logits processors. Then speculative `generate` samples the same prompt many times, and the counts are compared with the
probabilities. Filters that leave few tokens (a small top-k) keep the enumeration small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, PreTrainedModel

import specdec_triton as sdt

from ..drafters import Drafter
from ..drafters.base import DelegatingDrafter
from ..ops.reference import Acceptance
from ..tree import DraftTree
from .goodness_of_fit import LEAST_EXPECTED, Cell, examine, null_bracket

MOST_OUTCOMES = 20_000
LEAST_SAMPLES = 10  # samples for each outcome, for up to as many outcomes
LEAST_JUDGED, LEAST_JUDGED_SHARE = 50, 0.05  # drafts accepted, and rejected: so many, and so many for each sample
FORWARD_ROWS = 256  # sequences in a forward of the enumeration


@dataclass(frozen=True)
class Finding:
    """Result of one experiment.

    Attributes:
        rule: acceptance rule.
        outcomes: continuations of nonzero probability.
        cell: counts against probabilities, see `goodness_of_fit.examine`.
        null: bounds of the total variation of as many honest samples, at 99.9%.
        acceptance_length: tokens a row emitted in a round, on average.
        accepted: draft tokens that were accepted.
        rejected: rounds of a row that ended because none of the candidates was accepted.
        agrees: p-value and total variation are those of honest samples.
    """

    rule: str
    outcomes: int
    cell: Cell
    null: tuple[float, float]
    acceptance_length: float
    accepted: int
    rejected: int
    agrees: bool

    @property
    def least_judged(self) -> int:
        """Drafts that must be accepted, and rejected, before agreement says anything about the rule."""
        return max(LEAST_JUDGED, round(LEAST_JUDGED_SHARE * self.cell.samples))

    @property
    def is_conclusive(self) -> bool:
        """Enough drafts were accepted and rejected; without them the counts are those of plain sampling."""
        return min(self.accepted, self.rejected) >= self.least_judged


def prove(
    model: PreTrainedModel,
    drafter: Drafter,
    rule: str,
    input_ids: torch.Tensor,
    *,
    tokens: int = 3,
    samples: int = 2000,
    rows: int = 500,
    seed: int = 0,
    exact: tuple[torch.Tensor, torch.Tensor] | None = None,
    progress: Callable[[], None] = lambda: None,
    **options,
) -> Finding:
    """Sample `tokens` tokens after `input_ids` [1, T] with speculation, and compare with the exact distribution.

    Args:
        model: the target.
        drafter: proposes the draft tokens.
        rule: see `Options`.
        tokens: L, length of the continuations.
        samples: number of continuations to draw, `rows` in a batch.
        seed: seed of the first batch; the following count up.
        exact: the result of `exact_distribution`, if it is known already.
        progress: called after each batch.
        **options: sampling options of `generate`.

    Raises:
        ValueError: there are too many outcomes to enumerate, or too few samples for them.
    """
    sequences, probs = exact or exact_distribution(model, input_ids, tokens, **options)
    index = {tuple(sequence): place for place, sequence in enumerate(sequences.tolist())}
    if probs.max() * samples > samples - LEAST_EXPECTED or samples < LEAST_SAMPLES * min(len(probs), LEAST_SAMPLES):
        raise ValueError(
            f"prove: samples must be many more than the {len(probs)} outcomes, none of them nearly certain, got "
            f"{samples}: nothing could be told from them"
        )
    counts = torch.zeros(len(index) + 1)  # the last: all impossible continuations
    judged = _JudgedDrafter(drafter)
    rounds = emitted = 0
    for batch, first in enumerate(range(0, samples, rows)):
        prompts = input_ids.expand(min(rows, samples - first), -1)
        with sdt.patched(model, drafter=judged, rule=rule, seed=seed + batch):
            text = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), **sampling_call(model, tokens), **options
            )
        for sequence in text[:, input_ids.shape[1] :].tolist():
            counts[index.get(tuple(sequence), -1)] += 1
        stats = sdt.stats(model)
        rounds, emitted = rounds + stats.row_rounds, emitted + stats.accepted + stats.row_rounds
        progress()
    cell = examine(counts, torch.cat([probs, torch.zeros(1)]))
    null = null_bracket(probs, samples)
    agrees = cell.p_value > 1e-3 and cell.distance <= null[1]
    length = emitted / rounds if rounds else 0.0
    return Finding(rule, len(index), cell, null, length, emitted - rounds, judged.rejected, agrees)


class _JudgedDrafter(DelegatingDrafter):
    """Another drafter, whose rejected drafts are counted on the device, in captured rounds as well."""

    def __init__(self, drafter: Drafter):
        super().__init__(drafter)
        self._counts: list[torch.Tensor] = []  # one for each call

    @property
    def rejected(self) -> int:
        return sum(int(count) for count in self._counts)

    @property
    def resizable(self):
        return self.drafter.resizable

    def start(self, context, tree=None):
        session = self.drafter.start(context, tree)
        observe, count = session.observe, torch.zeros((), dtype=torch.int64, device=context.length.device)
        self._counts.append(count)

        def counted(drafts: DraftTree, accepted: Acceptance) -> None:
            path = torch.nn.functional.pad(accepted.path.long(), (1, 0))  # from the root
            last = path.gather(1, accepted.length.long()[:, None])
            had_candidates = (drafts.parents == last).any(1)
            left = context.max_length - 1 - context.length  # tokens that the row may still emit
            # the last of them is the target's own, for which no candidate is tried
            count.add_((had_candidates & (accepted.length + 1 < left)).sum())
            observe(drafts, accepted)

        session.observe = counted
        return session


def sampling_call(model: PreTrainedModel, tokens: int) -> dict:
    """Options of `generate` for exactly so many sampled tokens: no token ends the text."""
    nothing = model.config.get_text_config().vocab_size + 1
    return {"do_sample": True, "max_new_tokens": tokens, "eos_token_id": nothing, "pad_token_id": 0}


@torch.no_grad()
def exact_distribution(
    model: PreTrainedModel, input_ids: torch.Tensor, tokens: int, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every continuation that sampling may give, and its probability.

    Args:
        model: the target, which runs without speculation and without a cache.
        input_ids: [1, T] int64.
        tokens: L.
        **options: sampling options of `generate`.

    Returns:
        [K, L] int64 and [K] float64.

    Raises:
        ValueError: K would pass 20,000.
    """
    processors = _prepared_processors(model, input_ids, tokens, options)
    prefixes, probs = input_ids, torch.ones(1, dtype=torch.float64)
    for _ in range(tokens):
        rows = []
        for part in prefixes.split(FORWARD_ROWS):
            logits = model(part, attention_mask=torch.ones_like(part), use_cache=False).logits[:, -1].float()
            rows.append(processors(part, logits).double().softmax(-1).cpu())
        joint = probs[:, None] * torch.cat(rows)
        kept = joint.nonzero()
        if len(kept) > MOST_OUTCOMES:
            raise ValueError(
                f"exact_distribution: the continuations to enumerate must be at most {MOST_OUTCOMES}, got {len(kept)}: "
                "use a smaller top_k, or fewer tokens"
            )
        probs = joint[kept[:, 0], kept[:, 1]]
        prefixes = torch.cat([prefixes[kept[:, 0]], kept[:, 1:].to(prefixes.device)], dim=1)
    return prefixes[:, input_ids.shape[1] :].cpu(), probs / probs.sum()


def _prepared_processors(model, input_ids, tokens, options) -> LogitsProcessorList:
    """The processors that `generate` would apply to every row of scores, warpers included."""
    caught = []

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        caught.append(logits_processor)
        return input_ids

    mask = torch.ones_like(input_ids)
    model.generate(input_ids, attention_mask=mask, custom_generate=catch, **sampling_call(model, tokens), **options)
    return caught[0]
