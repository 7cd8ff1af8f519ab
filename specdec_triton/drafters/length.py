"""How long a chain is drafted where nobody fixed its length: by the assistant's own generation config, with the meaning
that transformers gives it.

`num_assistant_tokens` bounds a draft. `assistant_confidence_threshold` ends it after a token whose draft probability,
after filters, is below it; that token is still verified. `num_assistant_tokens_schedule` moves the bound from
round to round. The threshold stays: where scikit-learn is installed, transformers moves it within a call.

Letters: B sequences, N tree nodes.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig

from .base import DraftContext

DEFAULT_TOKENS, DEFAULT_CONFIDENCE = 20, 0.4  # transformers' own, where a generation config says nothing
SCHEDULES = ("heuristic", "heuristic_transient")  # those that move the bound
LONGEST = 128  # tokens that a schedule's bound may grow to
FIRST_GUESS = 4  # tokens until the next stop, before the first is seen
LEARNING = 0.5  # share of the newest round in that guess


@dataclass(frozen=True)
class LengthRule:
    """What a call is to do about the length of its chains.

    Attributes:
        tokens: bound of the first round.
        confidence: draft probability of a token below which nothing is drafted after it; 0 for never.
        config: whose `num_assistant_tokens` the schedule moves; None: the bound stays.
    """

    tokens: int
    confidence: float
    config: GenerationConfig | None = None


def assistant_tokens(owner: str, config: GenerationConfig) -> int:
    """`num_assistant_tokens`, or transformers' default.

    Raises:
        ValueError: it is no number of at least 0; names `owner`.
    """
    tokens = DEFAULT_TOKENS if config.num_assistant_tokens is None else config.num_assistant_tokens
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not tokens >= 0:
        raise ValueError(
            f"{owner}: num_assistant_tokens of the draft's generation_config must be a number of at least 0, got "
            f"{tokens!r}: set it, or give num_tokens"
        )
    return int(tokens)


def assistant_rule(owner: str, config: GenerationConfig, confidence: float | None = None) -> LengthRule:
    """What the draft's generation config asks for; `confidence`, where it is given, is the drafter's own."""
    if confidence is None:
        confidence = config.assistant_confidence_threshold
    return LengthRule(
        assistant_tokens(owner, config),
        DEFAULT_CONFIDENCE if confidence is None else confidence,
        config if config.num_assistant_tokens_schedule in SCHEDULES else None,
    )


class ChainLength:
    """The lengths of one call's drafts, each row's by what the row itself has seen.

    The host bounds each row before a round, and the device ends it within the bound. Where the host may look, it does
    after each token, and a round ends with its last row. Where rounds are captured it may not: there the bound is also
    its guess of where confidence will end, a power of two, so that few lengths are captured.

    A row's stop depends on tokens that it has drawn already and on earlier rounds, never on the token that would come
    next: given the tokens before it, every token that is drawn has the draft's distribution. That is all that
    "rejection" and "block" ask of a draft: the former tests one token after the other; the latter tests every prefix
    from the last token backwards, which holds whatever the prefix at which a draft ends. ("coupled" and
    "greedy" do not look at how tokens came about.)

    Attributes:
        longest: tokens that a draft may ever have.
        limit: [B] int64 on the device. Each row's bound in this round; 0 where nothing is of use.
        looks: the host reads one number a level.
    """

    def __init__(self, context: DraftContext, rule: LengthRule):
        batch, self._context, self._rule = len(context.start), context, rule
        self.longest = rule.tokens if rule.config is None else max(rule.tokens, min(LONGEST, context.useful_depth))
        self.limit = torch.zeros_like(context.length)
        self.looks = rule.confidence > 0 and not context.fixed_shapes
        self._bound = np.full(batch, rule.tokens)
        guesses = rule.confidence > 0 and context.fixed_shapes
        self._guess = np.full(batch, float(FIRST_GUESS)) if guesses else None
        self._rounds: deque[np.ndarray] = deque()  # the limits of rounds whose reports the host has not read

    def next_round(self) -> int:
        """Set the rows' limits: the levels that the round may take."""
        context, limit = self._context, self._bound
        if self._guess is not None:
            limit = np.minimum(limit, 2 ** np.round(np.log2(self._guess)).astype(np.int64))
        if not context.fixed_shapes:
            limit = np.minimum(limit, context.host_budget - 1).clip(0)
        if not self._rounds or (limit != self._rounds[-1]).any():
            on_host = torch.from_numpy(limit)
            if self.limit.is_cuda:
                on_host = on_host.pin_memory()  # a copy from elsewhere would wait for the device
            self.limit.copy_(on_host, non_blocking=True)
        self._rounds.append(limit)
        levels = int(limit[context.host_budget > 0].max(initial=0))
        return in_steps(levels, self.longest) if context.fixed_shapes else levels

    def going(self) -> torch.Tensor:
        """[B] bool: the rows that draft a first token."""
        return self.limit > 0

    def goes_on(self, going: torch.Tensor, depth: int, tokens: torch.Tensor, draft_prob: torch.Tensor) -> torch.Tensor:
        """[B] bool: the rows that draft another token, of those that were `going`.

        Args:
            depth: tokens drafted.
            tokens: [B] int64, the last of them.
            draft_prob: [B] fp32, its draft probability.
        """
        going = going & (self.limit > depth) & (draft_prob >= self._rule.confidence)
        if self._context.eos_ids is not None:
            going = going & (tokens[:, None] != self._context.eos_ids).all(1)
        return going

    def observe_on_host(self, drafted: list[int], emitted: list[int]) -> None:
        """See `DraftSession.observe_on_host`."""
        limit, rule = self._rounds.popleft(), self._rule
        drafted, emitted = np.array(drafted), np.array(emitted)
        live = emitted > 0
        if rule.config is not None:
            moved = np.where(emitted > drafted, self._bound + 2, self._bound - 1).clip(1, self.longest)
            self._bound = np.where(live, moved, self._bound)
            # as transformers leaves it behind when a call has ended
            if rule.config.num_assistant_tokens_schedule == "heuristic" and not self._context.host_budget.any():
                rule.config.num_assistant_tokens = int(self._bound.mean())
        if self._guess is not None:
            # a draft that reached its limit and was right might have gone on
            seen = np.where((drafted == limit) & (emitted > drafted), 1.5 * limit, drafted).clip(1)
            self._guess = np.where(live, self._guess + LEARNING * (seen - self._guess), self._guess)


def in_steps(levels: int, longest: int) -> int:
    """The least power of two that is at least `levels`, or `longest`: few lengths, so few plans and graphs."""
    return min(1 << max(levels - 1, 0).bit_length(), longest) if levels else 0
