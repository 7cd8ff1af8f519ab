"""The length of a drafted chain if the user did not fix it. The assistant's generation config decides, as in
transformers. If it sets no `num_assistant_tokens`, the bound is 5 and not transformers' 20.

`num_assistant_tokens` bounds the length of a draft. `assistant_confidence_threshold` ends a draft after a token whose
draft probability, after filters, is below the threshold; that token is still verified. `num_assistant_tokens_schedule`
changes the bound after each round. The threshold is constant; transformers adapts it during a call if scikit-learn is
installed.

Letters: B sequences, N tree nodes.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig

from .base import DraftContext

# If the generation config sets no value. Transformers' bound is 20. If each draft token is accepted with probability
# 0.8, a longer chain seldom is, and each level takes a forward of the draft model.
DEFAULT_TOKENS = 5
DEFAULT_CONFIDENCE = 0.4  # transformers' default
SCHEDULES = ("heuristic", "heuristic_transient")  # the schedules that change the bound
LONGEST = 128  # upper limit, in tokens, of a bound that a schedule changes
FIRST_GUESS = 4  # guessed length of a draft, in tokens, before the first round
LEARNING = 0.5  # weight of the latest round in later guesses


@dataclass(frozen=True)
class LengthRule:
    """The rule that sets the length of a call's chains.

    Attributes:
        tokens: upper bound on the draft tokens of the first round.
        confidence: a draft ends after a token whose draft probability is below this; 0 disables it.
        config: the generation config whose schedule changes the bound; None if the bound is constant.
    """

    tokens: int
    confidence: float
    config: GenerationConfig | None = None


def assistant_tokens(owner: str, config: GenerationConfig, default: int = DEFAULT_TOKENS) -> int:
    """`num_assistant_tokens` of the config, or `default`.

    Raises:
        ValueError: it is not a number of at least 0; the message begins with `owner`.
    """
    tokens = default if config.num_assistant_tokens is None else config.num_assistant_tokens
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not tokens >= 0:
        raise ValueError(
            f"{owner}: num_assistant_tokens of the draft's generation_config must be a number of at least 0, got "
            f"{tokens!r}: set it, or give num_tokens"
        )
    return int(tokens)


def assistant_rule(owner: str, config: GenerationConfig, confidence: float | None = None) -> LengthRule:
    """The rule that the draft's generation config asks for. `confidence`, unless it is None, replaces the config's
    threshold."""
    if confidence is None:
        confidence = config.assistant_confidence_threshold
    return LengthRule(
        assistant_tokens(owner, config),
        DEFAULT_CONFIDENCE if confidence is None else confidence,
        config if config.num_assistant_tokens_schedule in SCHEDULES else None,
    )


class ChainLength:
    """The lengths of one call's drafts. Each row's length depends only on that row's own rounds.

    The host sets a bound for each row before a round, and the device may stop a row earlier. If rounds are not
    captured, the host checks after each token whether any row goes on, and the draft ends when none does. If rounds are
    captured, the host cannot check. It then also limits each row to a guess of the length at which the confidence
    threshold will stop it. The guess is a power of two, so that few lengths are captured.

    Why this is lossless: whether a row stops depends on tokens that it has drawn already and on earlier rounds, never
    on the next token. Given the tokens before it, every drawn token therefore follows the draft's distribution.
    "rejection" and "block" require nothing else: "rejection" tests one token after another, and "block" tests every
    prefix from the last token backwards, which is valid for any length. "coupled" and "greedy" do not depend on how
    draft tokens were chosen.

    Attributes:
        longest: upper limit on the draft tokens of any round.
        limit: [B] int64 on the device. Bound of each row in this round; 0 if the row needs no draft.
        confidence: the rule's.
        looks: True if the host reads one number per level to end the draft early.
    """

    def __init__(self, context: DraftContext, rule: LengthRule):
        batch, self._context, self._rule = len(context.start), context, rule
        self.confidence = rule.confidence
        self.longest = rule.tokens if rule.config is None else max(rule.tokens, min(LONGEST, context.useful_depth))
        self.limit = context.buffers.put("draft.limit", torch.zeros_like(context.length))
        self.looks = rule.confidence > 0 and not context.fixed_shapes
        self._bound = np.full(batch, rule.tokens)
        guesses = rule.confidence > 0 and context.fixed_shapes
        self._guess = np.full(batch, float(FIRST_GUESS)) if guesses else None
        self._rounds: deque[np.ndarray] = deque()  # limits of the rounds whose reports the host has not read

    def next_round(self, rows: np.ndarray | None = None) -> int:
        """Set `limit` for the next round. Returns the number of levels that the round may take.

        Args:
            rows: [B] bool. Rows that draft; None for all.
        """
        context, limit = self._context, self._bound
        if self._guess is not None:
            limit = np.minimum(limit, 2 ** np.round(np.log2(self._guess)).astype(np.int64))
        if not context.fixed_shapes:
            limit = np.minimum(limit, context.host_budget - 1).clip(0)
        if rows is not None:
            limit = np.where(rows, limit, 0)
        if not self._rounds or (limit != self._rounds[-1]).any():
            on_host = torch.from_numpy(limit)
            if self.limit.is_cuda:
                on_host = on_host.pin_memory()  # a copy from pageable memory would wait for the device
            self.limit.copy_(on_host, non_blocking=True)
        self._rounds.append(limit)
        levels = int(limit[context.host_budget > 0].max(initial=0))
        return in_steps(levels, self.longest) if context.fixed_shapes else levels

    def going(self) -> torch.Tensor:
        """[B] bool: True for rows that draft a first token."""
        return self.limit > 0

    def goes_on(self, going: torch.Tensor, depth: int, tokens: torch.Tensor, draft_prob: torch.Tensor) -> torch.Tensor:
        """[B] bool: True for rows that draft another token.

        Args:
            going: [B] bool. Rows that drafted the last token.
            depth: number of tokens drafted.
            tokens: [B] int64. The last drafted token.
            draft_prob: [B] fp32. Draft probability of that token.
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
            # transformers, too, stores the bound in the config at the end of a call
            if rule.config.num_assistant_tokens_schedule == "heuristic" and not self._context.host_budget.any():
                rule.config.num_assistant_tokens = int(self._bound.mean())
        if self._guess is not None:
            # a draft that reached its limit and was fully accepted might have been longer
            seen = np.where((drafted == limit) & (emitted > drafted), 1.5 * limit, drafted).clip(1)
            self._guess = np.where(live, self._guess + LEARNING * (seen - self._guess), self._guess)


def in_steps(levels: int, longest: int) -> int:
    """`levels` rounded up to a power of two, at most `longest`; 0 stays 0. Few lengths mean few plans and graphs."""
    return min(1 << max(levels - 1, 0).bit_length(), longest) if levels else 0
