"""Marginals from a block: rows that stand for the next tokens, in the same forward as the text that was accepted last.

The forward has R rows of text, of which the first `count` of a sequence are valid, and then n rows of the block. The
keys and values of the valid text rows are kept. Those of all other rows are overwritten in the next round.

Letters: B sequences, R text rows, n block rows, T = R + n, W words of bits.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..forward.runner import TreeRunner
from ..tree import Topology, bits_of_nodes, topology_tensors, with_rows
from .base import DraftContext
from .forwards import TextRows
from .marginals import Marginals


class BlockLayout(NamedTuple):
    """The constant parts of `BlockMarginals._tree`.

    Attributes:
        offsets: [1, n] int64. Number of each block row.
        text_depth, text_words: [1, R], [1, R, W] int64. Depths of text rows, and the words of the rows that they see.
        seen_text: [R + 1, 1, W] int64. The words of the first 0 to R text rows.
        seen_block: [n, W] int64. The words of the block rows that each block row sees.
    """

    offsets: torch.Tensor
    text_depth: torch.Tensor
    text_words: torch.Tensor
    seen_text: torch.Tensor
    seen_block: torch.Tensor


@lru_cache(maxsize=64)
def layout_of(num_text: int, num_block: int, causal: bool, device: torch.device) -> BlockLayout:
    """The layout of R text rows and n block rows. With `causal`, a block row sees the block rows up to itself, else
    all."""
    own = bits_of_nodes(num_text + num_block)
    seen = own.cumsum(0)  # sums of different bits are their unions
    block = seen - seen[num_text - 1]
    parts = BlockLayout(
        offsets=torch.arange(num_block)[None],
        text_depth=torch.arange(num_text)[None],
        text_words=seen[None, :num_text],
        seen_text=torch.cat([torch.zeros_like(own[:1]), seen[:num_text]])[:, None],
        seen_block=block[num_text:] if causal else block[-1:].expand(num_block, -1).contiguous(),
    )
    return BlockLayout(*(each.to(device) for each in parts))


class BlockMarginals(Marginals):
    """The part that all drafts with blocks have: the tree of the forward, the cache and the count of valid rows.

    In the cache, the first text row of a round has the slot of the column `length - count`, counted from the first
    column of the cache. Padding among the text rows is not seen by block rows.

    Args:
        model: the model that drafts, on the target's device.
        context: the call's sequences.
        max_depth: number of depths that a round predicts.
        deepest: depth of the deepest node that is drafted. R is `TextRows.count`.
        num_block: n.
        causal: True if a block row does not see later block rows.
        first_column: the column of the cache's first slot.
        start: [B] int64. First slot that holds a real token.
        last_position: largest position that may be fed: a number or [B] int64.
        count: number of valid text rows of the first round.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: DraftContext,
        max_depth: int,
        deepest: int,
        num_block: int,
        causal: bool,
        first_column: int,
        start: torch.Tensor,
        last_position: torch.Tensor | int,
        count: int,
    ):
        self._model, self.context, self.max_depth = model, context, max_depth
        buffers, device = context.buffers, start.device
        self._text_rows, self._num_block, self._causal = TextRows(context, deepest), num_block, causal
        self._room = self._text_rows.most + num_block  # cache slots that a round needs after the root's column
        self._first_column = buffers.put("draft.column", torch.tensor(first_column, device=device))
        self._start = buffers.put("draft.start", start)
        buffers.keep(self._layout, self._chain)  # captured rounds read them
        self._count = buffers.put("draft.count", torch.full_like(start, count))
        self._runner = TreeRunner(
            model,
            self._start,
            last_position,
            context.impl,
            context.fixed_shapes,
            context.compiled,
            context.fused,
            buffers,
            "draft",
        )

    def _take(self, prompt: Any) -> None:
        """Continue from the cache of a prompt's reader, which then drops it, because it was copied."""
        columns = int(self.context.host_length[0]) - prompt.first
        self._runner.take_cache(prompt.cache, self.context.cache_capacity(self._room), columns)
        prompt.cache = None

    @property
    def slots(self):
        return self._runner.cache.slots

    @property
    def _layout(self) -> BlockLayout:
        return layout_of(self._text_rows.count, self._num_block, self._causal, self._start.device)

    @property
    def _chain(self) -> tuple[torch.Tensor, ...]:
        return topology_tensors(Topology.chain(self._text_rows.count - 1), self._start.device)

    def follow(self, levels):
        self._text_rows.follow()
        self._runner.cache.reserve(self.context.longest + self._room)

    def _first(self) -> torch.Tensor:
        """[B] int64. The slot of the first text row."""
        return (self.context.length - self._first_column - self._count).clamp(min=0)

    def _text_tokens(self, first: torch.Tensor, shift: int) -> torch.Tensor:
        """[B, R] int64. The tokens of the text rows' columns, each moved on by `shift` columns."""
        columns = first[:, None] + self._layout.text_depth + self._first_column + shift
        return self.context.tokens.gather(1, columns.clamp(max=self.context.tokens.shape[1] - 1))

    def _run(self, tokens: torch.Tensor, first: torch.Tensor, **more: Any) -> ModelOutput:
        """The model's outputs for text rows and block.

        Args:
            tokens: [B, T] int64.
            first: [B] int64. The slot of the first text row.
            more: further arguments of the model.
        """
        layout, count = self._layout, self._count
        batch = len(count)
        depth = torch.cat([layout.text_depth.expand(batch, -1), count[:, None] + layout.offsets], 1)
        block = layout.seen_text[count] | layout.seen_block
        ancestors = torch.cat([layout.text_words.expand(batch, -1, -1), block], 1)
        return self._runner.run(tokens, depth, ancestors, first, **more)

    def _run_text(self, tokens: torch.Tensor, first: torch.Tensor, **more: Any) -> ModelOutput:
        """The model's outputs for text rows [B, R] alone. See `_run`."""
        _, depth, ancestors = with_rows(len(tokens), self._chain)
        return self._runner.run(tokens, depth, ancestors, first, **more)

    def observe(self, accepted):
        self._count.copy_(accepted.length + 1)
