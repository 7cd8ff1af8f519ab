"""A model with its tree cache: prefilled by transformers, then run over tree nodes. Serves target and draft alike."""

import copy
import inspect
from contextlib import nullcontext
from functools import partial

import torch
import torch._dynamo
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..tree import chain_tensors, pack_tree
from .attention import call_with_tree_attention, config_ids, window_of_cache
from .cache import TreeCache
from .preparation import NextStep, next_step
from .versions import CACHE

RECOMPILES = 64  # shapes that one process may compile a model for; torch's own limit of 8 counts all models together
PREFILL_CHUNK = 8192  # columns of a long prompt that one forward takes, where the call does not say


class TreeRunner:
    """One model during one generation.

    Args:
        model: the model, left as it is outside `forward`.
        start: [B] int64. First column that holds a real token.
        last_position: [B] int64, or one for all. Largest position that may be fed, counted from 0 at `start`; deeper
            nodes, which can never be emitted, are clamped to it.
        impl: implementation of the ops, see `ops`.
        fixed: shapes and addresses stay, see `TreeCache.from_prefill`.
        compiled: run tree nodes through `torch.compile`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: torch.Tensor,
        last_position: torch.Tensor | int,
        impl: str | None = None,
        fixed: bool = False,
        compiled: bool = False,
    ):
        self.model, self.start, self.impl, self._fixed = model, start, impl, fixed
        self._call, self._recompiles = model, nullcontext
        if compiled:
            self._call = torch.compile(model, fullgraph=True)
            self._recompiles = partial(torch._dynamo.config.patch, recompile_limit=RECOMPILES)
        self.last_position = torch.as_tensor(last_position, device=start.device).expand(len(start))
        self.cache: TreeCache | None = None
        self.step = NextStep(origin=start)
        self._configs = config_ids(model)
        self._all_keys = False  # the cache keeps them, whatever window the config names
        # some mixtures of experts read the attention mask for a training loss when their config says so
        routers = "output_router_logits" in inspect.signature(model.forward).parameters
        self._arguments = {"output_router_logits": False} if routers else {}

    def prefill(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict, capacity: int
    ) -> torch.Tensor:
        """Run the prompt [B, T] as transformers does, under the model's own attention.

        Args:
            model_kwargs: `attention_mask`, `position_ids` and the like, as `generate` prepared them; the caller's cache
                if it is to be used: what it holds of the prompt is not run again.
            capacity: slots to hold.

        A prompt longer than `PREFILL_CHUNK` is run in chunks, unless the generation config has a size of its own.

        Returns:
            logits [B, 1, V] after the last column.

        Raises:
            ValueError: the forward does not leave the keys and values of all T columns, or the model would not go on
                from there token by token.
        """
        cache = model_kwargs.get(CACHE)
        self._all_keys = cache is not None and not any(layer.is_sliding for layer in cache.layers)
        if cache is None:
            cache = DynamicCache()  # without layer types: it keeps the whole history in sliding layers too
        model_kwargs = {**model_kwargs, CACHE: cache, "use_cache": True}
        columns, is_fresh = input_ids.shape[1], not cache.get_seq_length()
        if columns > PREFILL_CHUNK and generation_config.prefill_chunk_size is None and is_fresh:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = PREFILL_CHUNK
        outputs = self.model._prefill(input_ids, generation_config, model_kwargs)
        self.cache = TreeCache.from_prefill(outputs.get(CACHE), capacity, self._fixed, columns)
        try:
            self.step = next_step(self.model, input_ids, outputs, model_kwargs)
        except ValueError as error:
            raise ValueError(
                f"generate: the model must continue a text token by token with speculative decoding: {error}: decode "
                "it without speculation"
            ) from None
        return outputs.logits[:, -1:]

    def _arguments_of(self, tokens: torch.Tensor, columns: torch.Tensor) -> dict:
        """Arguments of a forward over tokens [B, N] that stand in `columns` [B, N], but for its mask."""
        types = {name: last.expand(len(tokens), tokens.shape[1]) for name, last in self.step.token_types.items()}
        return {
            "input_ids": tokens,
            "position_ids": self.step.positions(columns),
            CACHE: self.cache,
            "use_cache": True,
            "return_dict": True,
            **types,
            **self.step.constants,
            **self._arguments,
        }

    def forward(
        self, tokens: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor, base: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, N, V] of the last N nodes of a tree of T, whose first T - N are in the cache already.

        Args:
            tokens: [B, N] int64.
            depth: [B, T] int64. Edges from node 0.
            ancestors: [B, T, W] int64. See `DraftTree`.
            base: [B] int64. Slot of node 0; node i goes to slot base + i.
        """
        num_rows, first = tokens.shape[1], depth.shape[1] - tokens.shape[1]
        last_column = (self.start + self.last_position)[:, None]
        self.cache.place(base + first, num_rows)
        with self._recompiles():
            outputs = call_with_tree_attention(
                self.impl,
                self._configs,
                self._call,
                self._all_keys,
                attention_mask=pack_tree(depth, ancestors, self.start, base)[:, None],
                **self._arguments_of(tokens, torch.minimum(base[:, None] + depth[:, first:], last_column)),
            )
        return outputs.logits

    @property
    def can_decode(self) -> bool:
        """Whether `decode` attends to the keys that plain decoding has: it attends to all of them."""
        return self._all_keys or window_of_cache(self.model.config.get_text_config(decoder=True)) is None

    def forward_chain(self, tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """`forward` of tokens [B, N] that continue each other, the first at slot `base`: logits [B, N, V]."""
        depth, ancestors = chain_tensors(tokens.shape[1], tokens.device)
        return self.forward(tokens, *(part.expand(len(tokens), *part.shape[1:]) for part in (depth, ancestors)), base)

    def decode(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Logits [B, 1, V] of one token [B, 1] after `length` unpadded ones: transformers' own decoding step, see
        `can_decode`."""
        self.cache.place_after(length)
        return self.model(**self._arguments_of(tokens, torch.full_like(tokens, length))).logits
