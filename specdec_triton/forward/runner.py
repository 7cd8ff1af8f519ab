"""Runs a model with a tree cache: transformers runs the prompt, then forwards run over tree nodes. It is used for both
target and draft models."""

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch._dynamo
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .. import ops
from ..tree import chain_tensors, with_rows
from .attention import call_with_tree_attention, config_ids, window_of_cache
from .buffers import Buffers
from .cache import TreeCache
from .fusion import Fused, fuse
from .preparation import NextStep, next_step
from .taps import Read, Tap, TappedModel
from .versions import CACHE

RECOMPILES = 64  # number of shapes for which a model may be compiled; torch's limit of 8 applies to all models together
PREFILL_CHUNK = 8192  # number of columns per forward over a long prompt, unless the call sets one


class TreeRunner:
    """A model during one `generate` call.

    Args:
        model: the model. It is not changed outside of `forward`.
        start: [B] int64. First column that holds a real token.
        last_position: [B] int64, or one number for all rows. Largest position that may be fed, counted from 0 at
            `start`. The positions of deeper nodes, which can never be emitted, are clamped to it.
        impl: implementation of the ops, see `ops`.
        fixed: True to keep shapes and addresses, see `TreeCache.from_prefill`.
        compiled: True to run tree forwards through `torch.compile`.
        fused: True to run tree forwards with fused decoder layers, see `fusion`.
        buffers: holds the tensors that captured forwards read; None allocates them for this runner alone. `start` must
            be in it already.
        name: prefix of the names in `buffers`.
        taps: hidden states that the forwards are to return, see `taps`.

    Attributes:
        fused: the modules that were replaced; None before the first tree forward.
        states: the hidden states [B, N, Ht] of each tap at the N nodes of the last tree forward or decoding step; ()
            without taps. A captured function must return them, because a replay overwrites those of its capture.

    Raises:
        ValueError: the model does not have the taps, see `TappedModel`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: torch.Tensor,
        last_position: torch.Tensor | int,
        impl: str | None = None,
        fixed: bool = False,
        compiled: bool = False,
        fused: bool = False,
        buffers: Buffers | None = None,
        name: str = "target",
        taps: tuple[Tap, ...] = (),
    ):
        self.model, self.start, self.impl, self._fixed = model, start, impl, fixed
        self._buffers, self._name = buffers or Buffers(), name
        self._compiled, self._recompiles = compiled, nullcontext
        if compiled:
            self._recompiles = partial(torch._dynamo.config.patch, recompile_limit=RECOMPILES)
        self._fuses = fused
        self._forward: Callable | None = None
        self.taps, self.states = taps, ()
        # runs the prompt and plain decoding steps
        self._tapped = TappedModel(model, taps) if taps else None
        self.fused: Fused | None = None
        last_position = torch.as_tensor(last_position, device=start.device).expand(len(start))
        self.last_position = self._buffers.put(f"{name}.last_position", last_position)
        self.cache: TreeCache | None = None
        self.step = NextStep(origin=start)
        self._configs = config_ids(model)
        self._all_keys = False  # True if the cache keeps all keys although the config has a window
        # some mixture-of-experts models would use the attention mask to compute a training loss
        routers = "output_router_logits" in inspect.signature(model.forward).parameters
        self._arguments = {"output_router_logits": False} if routers else {}

    def prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        capacity: int,
        read: Read | None = None,
    ) -> torch.Tensor:
        """Run the prompt as transformers does, with the model's own attention.

        A prompt longer than `PREFILL_CHUNK` runs in chunks, unless the generation config sets a size.

        Args:
            input_ids: [B, T] int64.
            generation_config: the call's generation config.
            model_kwargs: `attention_mask`, `position_ids` and other arguments, as `generate` prepared them. If they
                include a cache of the caller, tokens that it holds are not run again.
            capacity: number of cache slots to allocate.
            read: called after each forward over a chunk of the prompt, with the states [B, n, Ht] of each tap and the
                first column of the chunk. Columns that the caller's cache holds are in no chunk. It needs taps.

        Returns:
            Logits [B, 1, V] after the last column.

        Raises:
            ValueError: `read` is given without taps, the cache does not hold the keys and values of all T columns after
                the forward, or the model does not continue the text token by token.
        """
        if read is not None and not self.taps:
            raise ValueError(
                "TreeRunner: read needs taps, got none: the taps of a drafter must name the states that it reads"
            )
        cache = model_kwargs.get(CACHE)
        self._all_keys = cache is not None and not any(layer.is_sliding for layer in cache.layers)
        if cache is None:
            cache = DynamicCache()  # without a config, it keeps all tokens in layers with a sliding window, too
        model_kwargs = {**model_kwargs, CACHE: cache, "use_cache": True}
        columns, is_fresh = input_ids.shape[1], not cache.get_seq_length()
        if columns > PREFILL_CHUNK and generation_config.prefill_chunk_size is None and is_fresh:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = PREFILL_CHUNK
        # the forward may set attributes of the model, from which the next step is prepared
        model = self._tapped.model if self._tapped else self.model
        with self._tapped.reading(read, cache) if self._tapped else nullcontext():
            outputs = model._prefill(input_ids, generation_config, model_kwargs)
        buffers, name = self._buffers, self._name
        is_first_call = not buffers.size(f"{name}.cache")
        self.take_cache(outputs.get(CACHE), capacity, columns)
        try:
            step = next_step(model, input_ids, outputs, model_kwargs)
        except ValueError as error:
            raise ValueError(
                f"generate: the model must continue a text token by token with speculative decoding: {error}: decode "
                "it without speculation"
            ) from None
        types = {kind: buffers.put(f"{name}.{kind}", last) for kind, last in step.token_types.items()}
        self.step = NextStep(buffers.put(f"{name}.origin", step.origin), types, step.constants)
        buffers.agree(f"{name}.arguments", (self._all_keys, *types, *sorted(step.constants.items())))
        if is_first_call:  # later calls may replay graphs alone
            self._make_forward()
        return outputs.logits[:, -1:]

    def take_cache(self, prefilled: Cache | None, capacity: int, columns: int) -> None:
        """Continue from a cache that holds the keys and values of a prompt of this number of columns. `capacity` and
        errors: see `TreeCache.from_prefill`."""
        self.cache = TreeCache.from_prefill(prefilled, capacity, self._fixed, columns, self._buffers, self._name)

    def _arguments_of(self, tokens: torch.Tensor, position_ids: torch.Tensor) -> dict:
        """Arguments of a forward over tokens [B, N] at positions [B, N] or [P, B, N], except the mask."""
        types = {name: last.expand(len(tokens), tokens.shape[1]) for name, last in self.step.token_types.items()}
        return {
            "input_ids": tokens,
            "position_ids": position_ids,
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
        """Logits [B, N, V] of the last N nodes of a tree, see `run`."""
        return self.run(tokens, depth, ancestors, base).logits

    def run(
        self, tokens: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor, base: torch.Tensor, **more: Any
    ) -> ModelOutput:
        """The model's outputs for the last N nodes of a tree of T nodes. The first T - N nodes are already in the
        cache.

        Args:
            tokens: [B, N] int64. Tokens of the last N nodes.
            depth: [B, T] int64. Number of edges from node 0.
            ancestors: [B, T, W] int64. See `DraftTree`.
            base: [B] int64. Slot of node 0; node i is written to slot base + i.
            more: further arguments of the model. Tensors are [B, N, ...].
        """
        # `ops.tree_inputs` without its checks, which take a third of its time on a CPU: the tensors are the runner's
        # own, and those of trees that this package built or checked
        tree_inputs = ops.resolve("tree_inputs", self.impl, depth.device)
        lengths = self.start, base, self.last_position, self.step.origin
        packed_tree, position_ids, slots = tree_inputs(depth, ancestors, *lengths, tokens.shape[1])
        self.cache.place(slots)
        arguments = self._arguments_of(tokens, position_ids)
        arguments["attention_mask"] = packed_tree[:, None]
        if self._forward is None:
            self._make_forward()
        if self._compiled:
            more = self._let_shapes_vary(arguments, more)
        with self._recompiles():
            outputs = call_with_tree_attention(
                self.impl, self._configs, self._forward, self._all_keys, **arguments, **more
            )
        if self.taps:
            outputs, self.states = outputs
        return outputs

    def _let_shapes_vary(self, arguments: dict, more: dict) -> dict:
        """Let one compilation serve all numbers of nodes and of cache slots. Otherwise torch compiles the first shape,
        and once more for each dimension that changes. It always compiles forwards over one node separately. Returns
        `more` without views, which are compiled separately."""
        more = {name: _no_view(each) if torch.is_tensor(each) else each for name, each in more.items()}
        arguments["input_ids"] = _no_view(arguments["input_ids"])
        of_nodes = [self.cache.written, *(each for each in arguments.values() if torch.is_tensor(each))]
        planes = [plane for layer in self.cache.layers if layer.is_initialized for plane in (layer.keys, layer.values)]
        for tensor, *dims in (
            *((each, 1) for each in of_nodes if each.dim() == 2),
            *((each, 1) for each in more.values() if torch.is_tensor(each)),
            *((plane, 2) for plane in planes),
            (arguments["attention_mask"], 2, 3),
        ):
            torch._dynamo.maybe_mark_dynamic(tensor, dims)
        return more

    def _make_forward(self) -> None:
        """Make the model that runs tree forwards. It is made after the prompt's forward, which may set attributes of
        modules."""
        self.fused = fuse(self.model, self.impl) if self._fuses else Fused(self.model)
        model = self._tapped or self.fused.model
        if self._tapped and self.fused.model is not self.model:
            model = TappedModel(self.fused.model, self.taps)
        self._forward = torch.compile(model, fullgraph=True) if self._compiled else model

    @property
    def can_decode(self) -> bool:
        """True if `decode`, which attends to all keys, sees the same keys as plain decoding."""
        return self._all_keys or window_of_cache(self.model.config.get_text_config(decoder=True)) is None

    def forward_chain(self, tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """`forward` over a chain of tokens [B, N], the first of them at slot `base`. Returns logits [B, N, V]."""
        depth, ancestors = chain_tensors(tokens.shape[1], tokens.device)
        return self.forward(tokens, *with_rows(len(tokens), (depth, ancestors)), base)

    def decode(self, tokens: torch.Tensor, length: int) -> torch.Tensor:
        """Run transformers' own decoding step over one token [B, 1] after `length` unpadded tokens. Returns logits
        [B, 1, V]. See `can_decode`."""
        self.cache.place_after(length)
        arguments = self._arguments_of(tokens, self.step.positions(length))
        if self._tapped is None:
            return self.model(**arguments).logits
        outputs, self.states = self._tapped(**arguments)
        return outputs.logits


def _no_view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor._is_view() else tensor
