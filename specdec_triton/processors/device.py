"""Applies logits processors of transformers to all nodes of a draft tree at once, on the device.

Every node gets the scores that plain `generate` would compute for its text. The text of a node consists of the row's
columns up to the root, left padding included, followed by the tokens on the node's path.

Letters: B sequences, N tree nodes, V vocabulary, C columns of text, G sequences of tokens of one length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from ..ops.reference import WORD_BITS
from ..tree import DraftTree

NEVER = float("-inf")


def is_vectorised(processors: LogitsProcessorList, vocab_size: int) -> bool:
    """True if `process_nodes` supports all processors. It may read on the host, so it is called once per `generate`.

    Each processor must have exactly one of the supported types, because a subclass may behave differently. Processors
    whose EOS token is outside the vocabulary are not supported: transformers raises an exception for them in the middle
    of a text.
    """
    indexing = hf.ForcedEOSTokenLogitsProcessor, hf.ExponentialDecayLengthPenalty
    return all(
        type(processor) in OVER_NODES
        and not (type(processor) in indexing and (processor.eos_token_id >= vocab_size).any())
        for processor in processors
    )


def process_nodes(
    processors: LogitsProcessorList, tree: DraftTree, logits: torch.Tensor, tokens: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """Processed scores of every node. Nothing is read on the host.

    Scores of padding nodes and finished rows are undefined.

    Args:
        processors: processors for which `is_vectorised` is True.
        tree: draft tree of N nodes.
        logits: [B, N, V] floating point. The target's logits.
        tokens: [B, C] int64. Prompt and emitted tokens; later columns may hold any values.
        length: [B] int64. Column of each root.

    Returns:
        [B, N, V] fp32, a new tensor.
    """
    texts = _Texts(tree, tokens, length)
    scores = logits.to(torch.float32, copy=True)
    for processor in processors:
        scores = OVER_NODES[type(processor)](processor, scores, texts)
    return scores


@dataclass(frozen=True)
class _Texts:
    """The texts that end in each node. The fields are arguments of `process_nodes`."""

    tree: DraftTree
    tokens: torch.Tensor
    length: torch.Tensor

    @cached_property
    def count(self) -> torch.Tensor:
        """[B, N] int64. Number of columns of each text."""
        return self.length[:, None] + self.tree.depth + 1

    @cached_property
    def columns(self) -> torch.Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @cached_property
    def on_path(self) -> torch.Tensor:
        """[B, N, N] bool. Entry [i, j] is True if the text of node i contains the token of node j."""
        bits = torch.arange(WORD_BITS, device=self.tokens.device)
        return ((self.tree.ancestors[..., None] >> bits) & 1).bool().flatten(-2)[..., : self.tree.num_nodes]

    def last(self, size: int) -> torch.Tensor:
        """[B, N, size] int64. The last tokens of each text, in order; -1 before its first token."""
        node = torch.arange(self.tree.num_nodes, device=self.tokens.device).expand_as(self.tree.tokens)
        column = self.length[:, None] + self.tree.depth
        last = []
        for _ in range(size):
            emitted = self.tokens.gather(1, column.clamp(0, self.tokens.shape[1] - 1)).masked_fill(column < 0, -1)
            last.append(torch.where(column > self.length[:, None], self.tree.tokens.gather(1, node), emitted))
            node = self.tree.parents.long().gather(1, node).clamp(min=0)
            column = column - 1
        return torch.stack(last[::-1], dim=-1)

    def occurring(self, columns: torch.Tensor, nodes: torch.Tensor, vocab: int) -> torch.Tensor:
        """[B, N, V] bool. For each text, True for the tokens in the marked columns and nodes.

        Args:
            columns: [B, N or 1, C] bool. Columns of the text.
            nodes: [B, N, N] bool. Nodes of the tree.
            vocab: V.
        """
        # a spare token V stands for places that are not marked, and for ids outside the vocabulary
        found = columns.new_zeros(*columns.shape[:2], vocab + 1)
        found.scatter_(2, torch.where(columns, self.tokens[:, None].clamp(max=vocab), vocab), True)
        found = found.expand(-1, self.tree.num_nodes, -1)
        return found.scatter(2, torch.where(nodes, self.tree.tokens[:, None].clamp(max=vocab), vocab), True)[
            ..., :vocab
        ]


def _repetition(processor: hf.RepetitionPenaltyLogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    ignored = processor.prompt_ignore_length  # a tensor with a value for each row, a number for all rows, or None
    if isinstance(ignored, torch.Tensor):
        ignored = ignored.to(scores.device, non_blocking=True)[:, None, None]
    ignored = 0 if ignored is None else ignored
    columns = (texts.columns <= texts.length[:, None, None]) & (texts.columns >= ignored)
    nodes = texts.on_path & (texts.count[:, None] > ignored)
    penalised = torch.where(scores < 0, scores * processor.penalty, scores / processor.penalty)
    return torch.where(texts.occurring(columns, nodes, scores.shape[-1]), penalised, scores)


def _no_repeat_ngram(processor: hf.NoRepeatNGramLogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    size = processor.ngram_size
    last = texts.last(size)
    # an n-gram bans its last token if the text ends with its other tokens
    columns = ((texts.columns <= texts.length[:, None]) & (texts.columns >= size - 1))[:, None]
    nodes = texts.on_path
    for back in range(1, size):
        wanted = last[:, :, None, -back]
        columns = columns & (texts.tokens.roll(back, 1)[:, None] == wanted)
        nodes = nodes & (last[:, None, :, -back - 1] == wanted)
    return scores.masked_fill(texts.occurring(columns, nodes, scores.shape[-1]), NEVER)


# processor -> device -> result of `_prefixed`; cached because the host waits for a copy to the device
_prefixed_made: WeakKeyDictionary = WeakKeyDictionary()


def _prefixed(
    processor: hf.SequenceBiasLogitsProcessor, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The biased sequences of two or more tokens, grouped by length. Each group has the first tokens [G, length - 1]
    int64, the last token [G] int64, and the bias [G] fp32."""
    made = _prefixed_made.setdefault(processor, {})
    if device not in made:
        by_length = {}
        for sequence, bias in processor.sequence_bias.items():
            if len(sequence) > 1:
                by_length.setdefault(len(sequence), []).append((sequence[:-1], sequence[-1], bias))
        dtypes = torch.int64, torch.int64, torch.float32
        made[device] = [
            tuple(
                torch.tensor(column, dtype=dtype, device=device)
                for column, dtype in zip(zip(*group, strict=True), dtypes, strict=True)
            )
            for group in by_length.values()
        ]
    return made[device]


def _sequence_bias(processor: hf.SequenceBiasLogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    if processor.length_1_bias is None:
        processor(texts.tokens[:, :1], scores[:, 0])  # initialises length_1_bias, or refuses ids outside the vocabulary
    bias = torch.zeros_like(scores) + processor.length_1_bias
    # transformers 5.17 needs one more token of text than the prefix of a sequence has
    spare = 0 if hasattr(processor, "multi_token_biases") else 1
    for prefixes, ends, biases in _prefixed(processor, scores.device):
        size = prefixes.shape[1]
        last = texts.last(size)
        matching = (texts.count >= size + spare)[..., None]
        for place in range(size):
            matching = matching & (last[..., place, None] == prefixes[:, place])
        bias.index_add_(2, ends, torch.where(matching, biases, 0.0))
    return scores + bias


def _ids(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """[V] bool: True for the given ids. `torch.isin` is not used because it may read on the host."""
    vocab = torch.arange(scores.shape[-1], device=scores.device)
    return (vocab == ids.to(scores.device, non_blocking=True).view(-1, 1)).any(0)


def _min_length(processor: hf.MinLengthLogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    short = (texts.count < processor.min_length)[..., None]
    return scores.masked_fill(short & _ids(processor.eos_token_id, scores), NEVER)


def _min_new_tokens(
    processor: hf.MinNewTokensLengthLogitsProcessor, scores: torch.Tensor, texts: _Texts
) -> torch.Tensor:
    short = (texts.count - processor.prompt_length_to_skip < processor.min_new_tokens)[..., None]
    return scores.masked_fill(short & _ids(processor.eos_token_id, scores), NEVER)


def _suppress(processor: hf.SuppressTokensLogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    return scores.masked_fill(_ids(processor.suppress_tokens, scores), NEVER)


def _suppress_at_begin(
    processor: hf.SuppressTokensAtBeginLogitsProcessor, scores: torch.Tensor, texts: _Texts
) -> torch.Tensor:
    begins = (texts.count == processor.begin_index)[..., None]
    return scores.masked_fill(begins & _ids(processor.begin_suppress_tokens, scores), NEVER)


def _forced_eos(processor: hf.ForcedEOSTokenLogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    ends = (texts.count == processor.max_length - 1)[..., None]
    forced = torch.where(_ids(processor.eos_token_id, scores), 0.0, NEVER)
    return torch.where(ends, forced, scores)


def _decaying_length(processor: hf.ExponentialDecayLengthPenalty, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    beyond = (texts.count - processor.regulation_start).clamp(min=0)
    # in fp64, as the Python float of transformers, before it is rounded to fp32
    factor = (torch.pow(float(processor.regulation_factor), beyond.double()) - 1).float()[..., None]
    # a score of -inf stays -inf; transformers 5.17 made it NaN
    raised = (factor != 0) & scores.isfinite() & _ids(processor.eos_token_id, scores)
    return torch.where(raised, scores + scores.abs() * factor, scores)


def _finite(processor: hf.InfNanRemoveLogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    return scores.nan_to_num(0.0)


def _normalised(processor: hf.LogitNormalization, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    return scores.log_softmax(-1)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy [..., 1]. `torch.distributions` is not used: it reads the logits on the host and raises for NaN."""
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    return -(log_probs.clamp(min=torch.finfo(logits.dtype).min) * log_probs.softmax(-1)).sum(-1, keepdim=True)


def _top_h(processor: hf.TopHLogitsWarper, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    best, order = scores.topk(min(processor.top_n, scores.shape[-1]), dim=-1)
    probs = (best - best.logsumexp(-1, keepdim=True)).softmax(-1)
    within = (-probs * probs.log()).cumsum(-1) <= _entropy(best) * processor.top_h
    within[..., 0] = True
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, within)
    return scores.masked_fill(~kept, processor.filter_value)


def _eta(processor: hf.EtaLogitsWarper, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    epsilon = processor.epsilon.to(scores.device, non_blocking=True)
    eta = torch.minimum(epsilon, epsilon.sqrt() * (-_entropy(scores)).exp())
    least = scores.topk(min(processor.min_tokens_to_keep, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill((scores.softmax(-1) < eta) & (scores < least), processor.filter_value)


def _of_scores_alone(processor: hf.LogitsProcessor, scores: torch.Tensor, texts: _Texts) -> torch.Tensor:
    """Calls the processor itself. It treats each row of scores independently and does not look at the text."""
    return processor(None, scores.flatten(0, 1)).view_as(scores)


OVER_NODES: dict[type, Callable[[hf.LogitsProcessor, torch.Tensor, _Texts], torch.Tensor]] = {
    hf.RepetitionPenaltyLogitsProcessor: _repetition,
    hf.NoRepeatNGramLogitsProcessor: _no_repeat_ngram,
    hf.SequenceBiasLogitsProcessor: _sequence_bias,
    hf.NoBadWordsLogitsProcessor: _sequence_bias,
    hf.MinLengthLogitsProcessor: _min_length,
    hf.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    hf.SuppressTokensLogitsProcessor: _suppress,
    hf.SuppressTokensAtBeginLogitsProcessor: _suppress_at_begin,
    hf.ForcedEOSTokenLogitsProcessor: _forced_eos,
    hf.ExponentialDecayLengthPenalty: _decaying_length,
    hf.InfNanRemoveLogitsProcessor: _finite,
    hf.LogitNormalization: _normalised,
    hf.TemperatureLogitsWarper: _of_scores_alone,
    hf.TopKLogitsWarper: _of_scores_alone,
    hf.TopPLogitsWarper: _of_scores_alone,
    hf.MinPLogitsWarper: _of_scores_alone,
    hf.TypicalLogitsWarper: _of_scores_alone,
    hf.EpsilonLogitsWarper: _of_scores_alone,
    hf.TopHLogitsWarper: _top_h,
    hf.EtaLogitsWarper: _eta,
}
