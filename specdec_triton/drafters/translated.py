"""The forwards of a draft model with another tokenizer.

The draft model has a text of its own, in its own tokens. One token of the target is one or several tokens there, its
pieces. At the beginning of each round, the pieces of the tokens that were emitted last are appended on the device.

Letters: B sequences, V target tokens, DV draft tokens, L the largest number of pieces of a target token, C columns.
"""

import numpy as np
import torch
from transformers import PreTrainedModel

from .base import DraftContext
from .forwards import ModelForwards
from .vocabulary import VocabularyMap


class DraftText(DraftContext):
    """The sequences of a call in the draft's tokens. `tokens`, `start` and `length` have the meaning that they have in
    `DraftContext`, but the tokens that were emitted last are missing until `append`. The prompts are padded on the left
    to one width.

    Args:
        context: the call's sequences.
        vocabulary: the map between the vocabularies, with as many target tokens as `context.vocab_size`.
        most_emitted: largest number of tokens that a row emits in a round.

    Attributes:
        is_short: True if rounds begin before the first token of a row, because its prompt is shorter than L tokens.
    """

    def __init__(self, context: DraftContext, vocabulary: VocabularyMap, most_emitted: int):
        self._sequences, self._vocabulary = context, vocabulary
        self._counts = vocabulary.counts.cpu().numpy()
        most, buffers, device = vocabulary.most_pieces, context.buffers, context.start.device
        self._places = buffers.put("draft.places", torch.arange(most, device=device))
        self._emitted = buffers.put("draft.emitted", torch.arange(1, most_emitted + 1, device=device))
        columns = int(context.host_length[0])  # of the prompt
        prompt = context.tokens[:, :columns]
        real = torch.arange(columns, device=device) >= context.start[:, None]
        numbers, counts = self._pieces_of(prompt, real)
        first, beginning = numbers[torch.arange(len(prompt), device=device), context.start, 0], vocabulary.beginning
        begins = (first != beginning).long() * (beginning >= 0)  # 1 for rows that get a beginning before their text
        total = begins + counts.sum(1)
        width = max(int(total.max()), most)  # a round's first column is at least 0
        start = width - total
        self.is_short = bool((total < most).any())
        buffers.agree("draft.is_short", self.is_short)
        # the last column takes the places that have no piece
        tokens = prompt.new_zeros(len(prompt), most * (context.tokens.shape[1] + 1) + 1)
        tokens.scatter_(1, start[:, None], max(beginning, 0))
        self._write(tokens, start - 1 + begins, numbers, counts)
        self._seen = buffers.put("draft.seen", torch.full_like(context.length, columns - 1))
        self._host_seen, self._host_length = (np.full(len(prompt), each - 1) for each in (columns, width))
        self._ratio = -(-4 * width // columns)  # 4 times the draft's columns for each of the target's, rounded up
        super().__init__(
            tokens=buffers.put("draft.tokens", tokens),
            start=buffers.put("draft.start", start),
            length=buffers.put("draft.length", torch.full_like(start, width - 1)),
            host_tokens=context.host_tokens,
            host_length=np.full(len(prompt), width),  # as if the first token had one piece; see `read`
            host_budget=context.host_budget,
            max_length=tokens.shape[1] - 1,
            vocab_size=len(vocabulary.image),
            target=context.target,
            impl=context.impl,
            fixed_shapes=context.fixed_shapes,
            compiled=context.compiled,
            fused=context.fused,
            buffers=buffers,
        )

    def __post_init__(self) -> None:
        pass  # `position` is that of the target's tokens

    def _pieces_of(self, tokens: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pieces [B, n, L] of target tokens [B, n] and their numbers [B, n], 0 for tokens that are not `real`."""
        known = tokens.clamp(max=len(self._vocabulary.counts) - 1)
        return self._vocabulary.pieces[known], torch.where(real, self._vocabulary.counts[known], 0)

    def _write(
        self, tokens: torch.Tensor, last: torch.Tensor, pieces: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Write pieces [B, n, L], of which `counts` [B, n] are used, after the columns `last` [B]. Returns the last
        columns written."""
        ends = counts.cumsum(1)
        columns = (last[:, None] + 1 + ends - counts)[..., None] + self._places
        columns = torch.where(self._places < counts[..., None], columns, tokens.shape[1] - 1)
        tokens.scatter_(1, columns.flatten(1), pieces.flatten(1))
        return last + ends[:, -1]

    def append(self) -> None:
        """Append the pieces of the tokens that were emitted since the last call, of at most `most_emitted` tokens."""
        context = self._sequences
        columns = self._seen[:, None] + self._emitted
        real = columns <= context.length[:, None]
        emitted = context.tokens.gather(1, columns.clamp(max=context.tokens.shape[1] - 1))
        self.length.copy_(self._write(self.tokens, self.length, *self._pieces_of(emitted, real)))
        self._seen.add_(real.sum(1))

    def read(self) -> None:
        """Count the pieces of the tokens that the host has read, and bound the number of those that it has not."""
        context = self._sequences
        for row, (seen, length) in enumerate(zip(self._host_seen, context.host_length, strict=True)):
            if length > seen:
                known = context.host_tokens[row, seen + 1 : length + 1].clip(max=len(self._counts) - 1)
                self._host_length[row] += self._counts[known].sum()
                self._host_seen[row] = length
        self.host_length[:] = self._host_length
        self.unread_tokens = self._vocabulary.most_pieces * context.unread_tokens

    def cache_capacity(self, room: int) -> int:
        cache = self.target.cache if self.fixed_shapes else None
        return room + (int(self.host_length[0]) if cache is None else -(-self._ratio * cache.capacity // 4))


class TranslatedForwards(ModelForwards):
    """Forwards of a draft model with another tokenizer. Tokens and logits are the target's; tokens that the draft lacks
    have logit -inf.

    Args:
        model: the draft model.
        context: the call's sequences.
        most_nodes: largest number of nodes that a round forwards after the root.
        max_depth: largest depth of a node that is verified.
        vocabulary: the map between the vocabularies, with as many target tokens as `context.vocab_size`.
    """

    context: DraftText

    def __init__(
        self, model: PreTrainedModel, context: DraftContext, most_nodes: int, max_depth: int, vocabulary: VocabularyMap
    ):
        self._sequences, self._vocabulary = context, vocabulary
        context.buffers.keep(vocabulary)  # captured rounds read its tables
        text = DraftText(context, vocabulary, max(max_depth, context.verified_depth) + 1)
        super().__init__(model, text, most_nodes, most_pieces=vocabulary.most_pieces)
        self._skipped = False  # True if the last round of some row verified no draft of the model

    def follow(self, levels, rows=None):
        self.context.read()
        if levels and self._skipped:
            self.context.append()  # the columns that the model lacks are counted from the last
        self._skipped = not levels or (rows is not None and not rows.all())
        super().follow(levels, rows)

    def advance(self):
        self.context.append()
        return self._sequences.root[:, None]

    def begin(self):
        self.context.append()
        _, logits = super().begin()
        return self._sequences.root[:, None], self._translated(logits)

    def expand(self, tokens, parents, depth, ancestors):
        tokens = self._vocabulary.preimage[tokens].clamp(min=0)
        return self._translated(super().expand(tokens, parents, depth, ancestors))

    def _translated(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, n, V] of the target's tokens from those of the draft's, [B, n, DV]."""
        vocabulary = self._vocabulary
        everywhere = logits.new_full((*logits.shape[:-1], len(vocabulary.preimage)), float("-inf"))
        return everywhere.index_copy_(-1, vocabulary.images, logits.index_select(-1, vocabulary.drafted))

    def _forward(self, tokens, depth, ancestors):
        if self.context.is_short:
            depth, ancestors = self._without_padding(depth, ancestors)
        return super()._forward(tokens, depth, ancestors)

    def _without_padding(self, depth: torch.Tensor, ancestors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tree in the draft's cache, without its first nodes in columns before the text: no other node sees them,
        and their positions are 0."""
        padding = (self.context.start - self._first).clamp(min=0)[:, None]
        words = ancestors.clone()
        node = torch.arange(ancestors.shape[1], device=words.device)
        words[..., 0] &= torch.where(node < padding, -1, -1 << padding)
        return depth.maximum(padding), words
