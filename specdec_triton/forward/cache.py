"""A key-value cache for tree verification. One buffer holds all layers and is written in place, at slots that a tensor
gives.

Letters: B sequences, S slots, H key-value heads, D head dim, N tree nodes, P planes (keys or values of one layer).

A plane is [B, S, H, D]. The row of a token is contiguous, so accepting a path moves whole rows. The model sees
[B, H, S, D] views. Slots correspond to columns of the prompt, padding included, so the sequences of a batch differ only
in their lengths. Layers with a sliding window keep all tokens; attention applies the window.
"""

from itertools import groupby

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import ops
from .buffers import Buffers

BUCKET = 128  # the number of slots, both allocated and visible to the model, is a multiple of this


def in_buckets(slots: int) -> int:
    """`slots` rounded up to a multiple of `BUCKET`."""
    return -(-slots // BUCKET) * BUCKET


class TreeLayer(CacheLayerMixin):
    """The views of one layer into the buffer. `TreeCache` writes to them."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        raise RuntimeError("TreeLayer: the buffer must be created by TreeCache.from_prefill")

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError("TreeLayer: keys and values must be written by TreeCache.update, which knows the slots")

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class TreeCache(Cache):
    """The cache of one `generate` call; see the module. It is created by `from_prefill`. `place` or `place_after` sets
    the slots to which the next forward writes.

    Attributes:
        storage: [B * S * sum(widths)]. The planes one after another: keys of all layers, then values of all layers.
        widths: P numbers, H * D of each plane.
        capacity: S, the number of allocated slots.
        slots: number of slots that the model sees: a multiple of `BUCKET`, at least the number passed to `reserve`.
    """

    def __init__(
        self,
        prefilled: Cache,
        capacity: int,
        fixed: bool = False,
        buffers: Buffers | None = None,
        name: str = "target",
    ):
        layers = prefilled.layers
        # layers that use the keys and values of other layers are not initialized and are kept unchanged
        self._own = [index for index, layer in enumerate(layers) if layer.is_initialized]
        self._place_of = {index: place for place, index in enumerate(self._own)}
        shapes = [layers[index].keys.shape for index in self._own] + [layers[index].values.shape for index in self._own]
        first = layers[self._own[0]].keys
        self._dtype = first.dtype
        self._shapes = [(shape[1], shape[3]) for shape in shapes]
        self.widths = [heads * dim for heads, dim in self._shapes]
        self._batch = first.shape[0]
        self._buffers, self._name = buffers or Buffers(), name
        self._rows = self._buffers.put(f"{name}.rows", torch.arange(self._batch, device=first.device))[:, None]
        self.written: torch.Tensor | None = None
        self._length: int | None = None
        super().__init__(layers=list(layers))
        self._fixed = fixed
        held = self._buffers.size(f"{name}.cache") // (self._batch * sum(self.widths))
        self._allocate(max(in_buckets(capacity), held), first)
        self._show(self.capacity if fixed else in_buckets(layers[self._own[0]].get_seq_length()))

    @classmethod
    def from_prefill(
        cls,
        prefilled: Cache | None,
        capacity: int,
        fixed: bool = False,
        columns: int | None = None,
        buffers: Buffers | None = None,
        name: str = "target",
    ) -> "TreeCache":
        """Create a cache with the keys and values of a prefill.

        Args:
            prefilled: cache whose layers hold keys [B, H, T, D] and values [B, H, T, Dv] of all T columns. A layer with
                a sliding window may hold only the last columns, if they include all that the next column can see.
            capacity: number of slots, at least T; rounded up to a multiple of `BUCKET`. If `buffers` has a larger
                cache, its capacity is used.
            fixed: True if the model is to see all slots from the start, so that views change only if the buffer grows.
            columns: T; None for the length of the cache.
            buffers: where the memory comes from; None allocates it for this cache alone.
            name: prefix of the names in `buffers`.

        Raises:
            ValueError: there is no such cache, a layer lacks columns, or the layers differ in dtype, device, batch size
                or length.
        """
        layers = [layer for layer in getattr(prefilled, "layers", ()) if layer.is_initialized]
        if not layers or any(not isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
            raise ValueError(
                f"generate: the prompt's forward must leave a cache of keys and values, got {type(prefilled).__name__} "
                "without any: check that the model is not in training mode with gradient checkpointing, and that its "
                "forward was not replaced"
            )
        lengths = sorted({layer.get_seq_length() for layer in layers})
        if lengths != [lengths[0] if columns is None else columns]:
            raise ValueError(
                f"generate: the prompt's forward must leave keys and values of its {columns or lengths[0]} columns in "
                f"every layer, got {', '.join(map(str, lengths))}: prompt tuning and prefix tuning add columns; decode "
                "such a model without speculation"
            )
        kinds = {
            (tensor.dtype, tensor.device, tensor.shape[0]) for layer in layers for tensor in (layer.keys, layer.values)
        }
        if len(kinds) != 1 or any(not _reaches_back(layer) for layer in layers):
            raise ValueError(
                "generate: every layer must have keys and values of the same dtype, device and batch size, and all "
                f"columns within its window, got {sorted(map(str, kinds))}: load the model in one dtype, without mixed "
                "precision"
            )
        cache = cls(prefilled, capacity, fixed, buffers, name)
        filled = [layer.keys for layer in layers] + [layer.values for layer in layers]
        for plane, part in zip(cache._views(0, lengths[0]), filled, strict=True):
            plane[:, :, -part.shape[2] :].copy_(part)
        return cache

    def _allocate(self, capacity: int, like: torch.Tensor) -> None:
        """Allocate the buffer. The layers' views are set later, by `_show`. Slots that were not written hold zeros or
        values of an earlier call, which attention does not see."""
        self.capacity = capacity
        slots = self._batch * capacity
        # after `place_after`, for each plane the slot to write, and the slots that the layer sees then
        self._next: list[torch.Tensor] = []
        self._seen: list[torch.Tensor] = []
        self.storage = self._buffers.zeros(f"{self._name}.cache", slots * sum(self.widths), like)
        # consecutive planes of one shape are a block [n, B, H, S, D]
        runs = [(shape, len(list(run))) for shape, run in groupby(self._shapes)]
        parts = self.storage.split([slots * count * shape[0] * shape[1] for shape, count in runs])
        self._blocks = [
            part.view(count, self._batch, capacity, *shape).transpose(2, 3)
            for part, (shape, count) in zip(parts, runs, strict=True)
        ]

    def _views(self, first: int, count: int) -> list[torch.Tensor]:
        """[B, H, count, D] for each plane: slots first, first + 1, ... All are made at once, because slicing the planes
        one by one takes longer than writing a token's keys and values."""
        return [plane for block in self._blocks for plane in block.narrow(3, first, count).unbind()]

    def _show(self, slots: int) -> None:
        """Give the model views of the first `slots` slots."""
        self.slots, planes = slots, self._views(0, slots)
        for index, keys, values in zip(self._own, planes, planes[len(self._own) :], strict=False):
            self.layers[index] = TreeLayer(keys, values)

    def reserve(self, slots: int) -> None:
        """Make at least `slots` slots visible to the model. A buffer that is too small is copied to a larger one."""
        slots = in_buckets(slots)
        if slots > self.capacity:
            old, had = self._blocks, self.capacity
            self._allocate(max(slots, in_buckets(self.capacity * 3 // 2)), self.storage)
            for new, block in zip(self._blocks, old, strict=True):
                new.narrow(3, 0, had).copy_(block)
        if slots > self.slots:
            self._show(self.capacity if self._fixed else slots)

    def place(self, slots: torch.Tensor) -> None:
        """Let the next forward write its N tokens to `slots` [B, N] int64 of each sequence."""
        self.written, self._length = slots, None

    def place_after(self, length: int) -> None:
        """Let the next forward write one token to slot `length` of every sequence, and behave like an ordinary cache of
        that length. It is for a plain decoding step, in which the token attends to all slots up to its own.
        """
        self._length = length
        self._next, self._seen = self._views(length, 1), self._views(0, length + 1)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Write keys [B, H, N, D] and values [B, H, N, Dv] to the slots set by `place` or `place_after`. Returns the
        keys and values that the layer is to see."""
        if self._length is not None:
            self._check_dtypes(key_states.dtype, value_states.dtype)
            key = self._place_of[layer_idx]
            value = key + len(self._own)
            self._next[key].copy_(key_states)
            self._next[value].copy_(value_states)
            return self._seen[key], self._seen[value]
        keys, values = planes = self.planes(layer_idx, key_states.dtype, value_states.dtype)
        # with this indexing, Inductor writes the rows in place; with a transposed view it would copy the whole plane
        keys[self._rows, :, self.written] = key_states.transpose(1, 2)
        values[self._rows, :, self.written] = value_states.transpose(1, 2)
        return planes

    def planes(self, layer_idx: int, *dtypes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys [B, H, S, D] and values [B, H, S, Dv] that a layer sees.

        Raises:
            ValueError: the planes do not have the `dtypes` of new keys and values.
        """
        self._check_dtypes(*dtypes)
        layer = self.layers[layer_idx]
        return layer.keys, layer.values

    def _check_dtypes(self, *dtypes: torch.dtype) -> None:
        for dtype in dtypes:
            if dtype != self._dtype:
                raise ValueError(
                    f"TreeCache: keys and values must be {self._dtype}, as the prompt's were, got "
                    f"{' and '.join(map(str, dtypes))}: load the model in one dtype, without mixed precision"
                )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self._length is None:
            return self.layers[self._own[0]].get_seq_length()  # `slots`, but torch.compile knows that it may vary
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() if self._length is None else self._length + query_length, 0

    def compact(self, base: torch.Tensor, path: torch.Tensor, impl: str | None = None) -> None:
        """Move accepted nodes next to each other, see `ops.compact_kv`."""
        ops.compact_kv(self.storage, self.widths, base, path, impl=impl)

    def to_dynamic(self, length: int, into: DynamicCache | None = None) -> DynamicCache:
        """Copy the first `length` slots to an ordinary cache.

        Args:
            length: number of slots.
            into: the cache of the prefill, whose keys and values are replaced; None creates a new cache.
        """
        dynamic = DynamicCache() if into is None else into
        for index in self._own:
            layer = self.layers[index]
            if into is None:
                dynamic.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
                continue
            filled = into.layers[index]
            first = max(0, length - filled.sliding_window + 1) if filled.is_sliding else 0
            filled.keys = layer.keys[:, :, first:length].clone()
            filled.values = layer.values[:, :, first:length].clone()
            if filled.is_sliding:
                filled.cumulative_length = length
        return dynamic


def _reaches_back(layer: CacheLayerMixin) -> bool:
    """True if the layer holds all columns that later columns can attend to."""
    held, length = layer.keys.shape[2], layer.get_seq_length()
    needed = min(length, layer.sliding_window - 1) if layer.is_sliding else length
    return layer.values.shape[2] == held >= needed
