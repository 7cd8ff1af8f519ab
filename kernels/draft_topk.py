"""The candidates of a draft level, or of several: the k best tokens at each parent, by logit or by noisy
log-probability.

There are two launches. Without top-k, top-p and min-p:

    tiles   A program stores the k best keys (`_keys`) of one tile of the vocabulary, for one parent or, if parents use
            the same noise, for several parents one after another.
    merge   A program selects the k best keys of all tiles, for one parent.

With these filters:

    statistics  See `_rows`. A program handles one tile of one row of logits.
    select      A program computes, for one parent, the thresholds of the filters (`_filters`), reads the vocabulary
                tile by tile and keeps the k best keys.

Each of k passes over the keys in registers takes the highest key below the last one; all keys are different.

Letters: B sequences, N parents of a level, G groups of candidates (N unless `rows` is given), K candidates of each
group, V vocabulary, S tiles. Reference: `specdec_triton.ops.reference.draft_topk`.
"""

import functools
import itertools
from collections import namedtuple
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from ._filters import Filters, filters_argument, is_invalid, log_prob_of, log_probs, row_distribution
from ._keys import NAN_ORDER, NEG_INF, NO_KEY, id_in, key_of, order_in, order_of, value_of
from ._launch import DTYPES, FP_FUSION, CompileCase, abstract, block_of, contiguous, launching_on, pow2
from ._noise import COUPLED, DRAFT, gumbel
from ._rows import (
    BLOCK_V,
    ROW_OPTIONS,
    Statistics,
    load_inverse_temperature,
    load_logits,
    logits_argument,
    row_of,
    row_scores,
    row_statistics,
    tile_scores,
)

# Vocabulary ids per program of the tiles kernel, for every number of rows, so that a row's result does not depend on
# its neighbours. 128k ids are 126 programs for one row, about one for each multiprocessor.
TILE_V = 1024
NUM_WARPS = 4
ROWS_A_PROGRAM = 8  # parents that a program handles one after another if they use the same noise
MERGE_KEYS = 4096  # largest number of keys that the merge holds in registers; of more keys, it reads chunks again
ABOVE: tl.constexpr = tl.constexpr(2**63 - 1)  # above all keys
# Arguments that Triton must not specialize: separate compilations would not make the kernels faster.
COUNTS = ["N", "G", "K", "S", "depth"]

# kernel argument: seeds and position [B] int64; of_group [G] int64, the nodes under "draft" and the depths under
# "depths", else None
Noise = namedtuple("Noise", "seeds position of_group")
# kernel argument, the outputs: tokens [B, G, K] int64, has_nan [B, G] bool, log_probs [B, G, K] fp32 or None
Candidates = namedtuple("Candidates", "tokens has_nan log_probs")


@triton.jit
def _group_noise(noise, batch, group, depth, first_id, NOISE: tl.constexpr, BLOCK_V: tl.constexpr):
    """[BLOCK_V] fp32: the noise of a tile. Under "coupled" it is that of the sequence at this depth, under "depths" at
    the group's depth, and under "draft" that of the group's node."""
    seed, position = tl.load(noise.seeds + batch), tl.load(noise.position + batch)
    if NOISE == "coupled":
        found = gumbel(seed, position + depth, 0, COUPLED, first_id, BLOCK_V)
    else:
        of_group = tl.load(noise.of_group + group)
        if NOISE == "depths":
            found = gumbel(seed, position + of_group, 0, COUPLED, first_id, BLOCK_V)
        else:
            found = gumbel(seed, position, of_group, DRAFT, first_id, BLOCK_V)
    return found


@triton.jit
def _keys_of(scores, ids, V):
    """Keys of the scores of a tile. NaN is above all; lanes after the vocabulary have no key."""
    order = tl.where(scores != scores, NAN_ORDER, order_of(scores))
    return tl.where(ids < V, key_of(order, ids), NO_KEY)


@triton.jit
def _noisy_log_prob(distribution, log_sum, key, token):
    """Noisy log-probability of a token whose noisy score is in `key`; `log_sum` is that of all noisy scores."""
    greedy_id = distribution.greedy_id
    certain = tl.where(token == greedy_id, 0.0, NEG_INF)
    return tl.where(greedy_id >= 0, certain, value_of(order_in(key)) - log_sum)


@triton.jit
def _row_of_group(rows_ptr, group):
    """The row of logits that a group's candidates are taken from."""
    if rows_ptr is None:
        row = group
    else:
        row = tl.load(rows_ptr + group).to(tl.int32)
    return row


@triton.jit(do_not_specialize=COUNTS)
def _tiles_kernel(
    best_ptr,  # [B, G, S, K] int64, out: the best keys of each tile, the highest first
    # Statistics [B, G, S], out, or None without noise and log-probabilities. sums is None without log-probabilities;
    # it is that of the noisy scores if they are noisy.
    statistics,
    logits,  # Logits [B, N, V]
    rows_ptr,  # [G] int64, or None
    noise,  # Noise, or None
    temperature_ptr,  # [B] fp32, or None
    G, K, V, S, depth,
    NOISE: tl.constexpr,  # "none", "coupled", "depths" or "draft"
    # flags, because in a loop Triton 3.6 cannot ask whether a tuple or its field is None
    STATISTICS: tl.constexpr,
    LOG_PROBS: tl.constexpr,  # "none", "plain" or "noisy"
    ROWS: tl.constexpr,  # groups per program
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first_id = tile * BLOCK_V
    ids = first_id + tl.arange(0, BLOCK_V)
    first_group = tl.program_id(1) * ROWS
    if NOISE == "coupled":
        shared = _group_noise(noise, batch, first_group, depth, first_id, NOISE, BLOCK_V)
    for group in range(first_group, tl.minimum(first_group + ROWS, G)):
        scores = load_logits(row_of(logits, batch, _row_of_group(rows_ptr, group), V), ids)
        place = (batch * G + group) * S + tile
        if STATISTICS:
            inverse, _ = load_inverse_temperature(temperature_ptr, batch)
            key, relative = tile_scores(scores, inverse, first_id, BLOCK_V)
            tl.store(statistics.keys + place, key)
            if LOG_PROBS == "plain":
                tl.store(statistics.sums + place, tl.sum(tl.exp(relative), 0))
            # the merge does not use the noise of rows whose temperature is 0
            if NOISE == "coupled":
                scores = relative + shared
            elif NOISE != "none":
                scores = relative + _group_noise(noise, batch, group, depth, first_id, NOISE, BLOCK_V)
            if LOG_PROBS == "noisy":
                # noise is below 24, so there is no overflow
                tl.store(statistics.sums + place, tl.sum(tl.exp(scores), 0))
        keys = _keys_of(scores, ids, V)
        best = tl.max(keys, 0)
        tl.store(best_ptr + place * K, best)
        for rank in range(1, K):
            best = tl.max(tl.where(keys < best, keys, NO_KEY), 0)
            tl.store(best_ptr + place * K + rank, best)


@triton.jit
def _row_keys(best_ptr, statistics, place, first, peak, inverse, K, S, NOISY: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] keys of a group from `first` on. Noisy scores are converted to be relative to the row's highest logit
    `peak`."""
    lane = first + tl.arange(0, BLOCK)
    keys = tl.load(best_ptr + place * S * K + lane, mask=lane < S * K, other=NO_KEY)
    if NOISY:
        peaks = value_of(order_in(tl.load(statistics.keys + place * S + lane // K, mask=lane < S * K, other=NO_KEY)))
        scores = row_scores(keys, peaks, peak, inverse)
        # in the invalid row of a NaN, scores may be NaN, which has no order; any order will do
        keys = tl.where(keys == NO_KEY, NO_KEY, key_of(order_of(scores), id_in(keys)))
    return keys


@triton.jit(do_not_specialize=COUNTS)
def _merge_kernel(
    out,  # Candidates, out
    best_ptr,  # [B, G, S, K] int64
    statistics,  # Statistics [B, G, S], or None
    logits,  # Logits [B, N, V]
    rows_ptr,  # [G] int64, or None
    filters,  # Filters with at most a temperature
    G, K, V, S,
    NOISY: tl.constexpr,
    STATISTICS: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    SINGLE: tl.constexpr,  # True if all keys fit into one block
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    place = batch * G + group
    peak, inverse = tl.full((), 0.0, tl.float32), tl.full((), 1.0, tl.float32)
    greedy_id = tl.full((), -1, tl.int32)
    if STATISTICS:
        tile = tl.arange(0, BLOCK_S)
        key = tl.max(tl.load(statistics.keys + place * S + tile, mask=tile < S, other=NO_KEY), 0)
        peak = value_of(order_in(key))
        inverse, greedy = load_inverse_temperature(filters.temperature, batch)
        if NOISY:
            greedy_id = tl.where(greedy, id_in(key), -1)
            invalid = (order_in(key) == NAN_ORDER) | (tl.abs(peak) == float("inf"))
        else:
            invalid = order_in(key) == NAN_ORDER
        tl.store(out.has_nan + place, invalid)
    if LOG_PROBS != "none":
        row = row_of(logits, batch, _row_of_group(rows_ptr, group), V)
        distribution = row_distribution(row, statistics, place, batch, S, filters, BLOCK_S, 16)
    best = tl.full((), ABOVE, tl.int64)
    keys = _row_keys(best_ptr, statistics, place, 0, peak, inverse, K, S, NOISY, BLOCK)
    for rank in range(K):
        if SINGLE:
            best = tl.max(tl.where(keys < best, keys, NO_KEY), 0)
        else:
            last = best
            best = tl.full((), NO_KEY, tl.int64)
            for first in range(0, S * K, BLOCK):
                keys = _row_keys(best_ptr, statistics, place, first, peak, inverse, K, S, NOISY, BLOCK)
                best = tl.maximum(best, tl.max(tl.where(keys < last, keys, NO_KEY), 0))
        if not STATISTICS:
            if rank == 0:
                tl.store(out.has_nan + place, order_in(best) == NAN_ORDER)
        token = id_in(best)
        if NOISY:
            # all other tokens of a greedy row have probability 0, so they tie
            others = rank - 1 + (rank > greedy_id).to(tl.int32)
            token = tl.where(greedy_id >= 0, tl.where(rank == 0, greedy_id, others), token)
        tl.store(out.tokens + place * K + rank, token.to(tl.int64))
        if LOG_PROBS == "plain":
            tl.store(out.log_probs + place * K + rank, log_prob_of(distribution, token))
        elif LOG_PROBS == "noisy":
            found = _noisy_log_prob(distribution, distribution.log_sum, best, token)
            tl.store(out.log_probs + place * K + rank, found)


@triton.jit(do_not_specialize=COUNTS)
def _select_kernel(
    out,  # Candidates, out
    statistics,  # Statistics [B, N, S]
    logits,  # Logits [B, N, V]
    rows_ptr,  # [G] int64, or None
    noise,  # Noise, or None
    filters,  # Filters
    N, G, K, V, S, depth,
    NOISE: tl.constexpr,
    LOG_PROBS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # power of two >= K
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    here = _row_of_group(rows_ptr, group)
    index, place = batch * N + here, batch * G + group
    row = row_of(logits, batch, here, V)
    distribution = row_distribution(row, statistics, index, batch, S, filters, BLOCK_S, BLOCK_V)
    if NOISE == "none":
        tile = tl.arange(0, BLOCK_S)
        key = tl.max(tl.load(statistics.keys + index * S + tile, mask=tile < S, other=NO_KEY), 0)
        tl.store(out.has_nan + place, order_in(key) == NAN_ORDER)
    else:
        tl.store(out.has_nan + place, is_invalid(distribution))

    lane = tl.arange(0, BLOCK_K)
    # lanes after K hold a key that no other replaces
    kept = tl.where(lane < K, tl.full([BLOCK_K], NO_KEY, tl.int64), ABOVE)
    least = tl.min(kept, 0)
    total = tl.full((), 0.0, tl.float32)
    for first_id in range(0, V, BLOCK_V):
        tile_peak = value_of(order_in(tl.load(statistics.keys + index * S + first_id // BLOCK_V)))
        # tiles below the threshold have no token of the distribution; they only fill places that would stay empty
        if (least == NO_KEY) | (tile_peak >= distribution.threshold) | is_invalid(distribution):
            ids = first_id + tl.arange(0, BLOCK_V)
            if NOISE == "none":
                scores = load_logits(row, ids)
            else:
                scores = log_probs(distribution, ids)
                scores += _group_noise(noise, batch, group, depth, first_id, NOISE, BLOCK_V)
            if LOG_PROBS == "noisy":
                total += tl.sum(tl.exp(scores), 0)
            keys = _keys_of(scores, ids, V)
            best = tl.max(keys, 0)
            while best > least:
                # the lowest key, which may be in several empty lanes, is replaced in the first of them
                lowest = tl.min(tl.where(kept == least, lane, BLOCK_K), 0)
                kept = tl.where(lane == lowest, best, kept)
                least = tl.min(kept, 0)
                best = tl.max(tl.where(keys < best, keys, NO_KEY), 0)

    kept = tl.where(lane < K, kept, NO_KEY)
    best = tl.full((), ABOVE, tl.int64)
    for rank in range(K):
        best = tl.max(tl.where(kept < best, kept, NO_KEY), 0)
        token = id_in(best)
        tl.store(out.tokens + place * K + rank, token.to(tl.int64))
        if LOG_PROBS == "plain":
            tl.store(out.log_probs + place * K + rank, log_prob_of(distribution, token))
        elif LOG_PROBS == "noisy":
            found = _noisy_log_prob(distribution, tl.log(total), best, token)
            tl.store(out.log_probs + place * K + rank, found)


def draft_topk(
    logits: torch.Tensor,
    k: int,
    filters: Sequence[torch.Tensor | None],
    noise: str,
    seeds: torch.Tensor | None,
    position: torch.Tensor | None,
    depth: int,
    depths: torch.Tensor | None,
    nodes: torch.Tensor | None,
    rows: torch.Tensor | None,
    with_log_probs: bool,
    noisy_log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `specdec_triton.ops.draft_topk`, which checks the arguments. Nothing is read on the host.

    Logits may have any strides. Loads are 128 bits wide if the last stride is 1 and the other strides and V are
    multiples of 16.

    Returns:
        tokens [B, G, K] int64, has_nan [B, G] bool, log_probs [B, G, K] fp32; [B, G, 0] without log-probabilities.
    """
    batch, parents, vocab = logits.shape
    groups = parents if rows is None else rows.shape[0]
    filters, rows = filters_argument(filters), contiguous(rows)
    if noise == "none" and not with_log_probs:
        filters = Filters()
    log_probs = logits.new_empty((batch, groups, k if with_log_probs else 0), dtype=torch.float32)
    out = Candidates(
        logits.new_empty((batch, groups, k), dtype=torch.int64),
        logits.new_empty((batch, groups), dtype=torch.bool),
        log_probs if with_log_probs else None,
    )
    drawn = None
    if noise != "none":
        drawn = Noise(*map(contiguous, (seeds, position, nodes if noise == "draft" else depths)))
    noise = "depths" if noise == "coupled" and depths is not None else noise
    kind = ("noisy" if noisy_log_probs else "plain") if with_log_probs else "none"
    with launching_on(logits):
        if any(option is not None for option in filters[1:]):
            tiles = triton.cdiv(vocab, BLOCK_V)
            statistics = row_statistics(logits, filters.temperature)
            _select_kernel[groups, batch](
                out, statistics, logits_argument(logits), rows, drawn, filters, parents, groups, k, vocab, tiles, depth,
                NOISE=noise, LOG_PROBS=kind, BLOCK_K=block_of(k), BLOCK_S=block_of(tiles), BLOCK_V=BLOCK_V,
                **ROW_OPTIONS,
            )  # fmt: skip
            return out.tokens, out.has_nan, log_probs
        tiles, statistics = triton.cdiv(vocab, TILE_V), None
        best = logits.new_empty((batch, groups, tiles, k), dtype=torch.int64)
        if drawn is not None or with_log_probs:
            keys = logits.new_empty((batch, groups, tiles), dtype=torch.int64)
            statistics = Statistics(keys, torch.empty_like(keys, dtype=torch.float32) if with_log_probs else None)
        flags = {"STATISTICS": statistics is not None, "LOG_PROBS": kind}
        together = ROWS_A_PROGRAM if noise == "coupled" else 1
        _tiles_kernel[tiles, triton.cdiv(groups, together), batch](
            best, statistics, logits_argument(logits), rows, drawn, filters.temperature, groups, k, vocab, tiles, depth,
            NOISE=noise, **flags, ROWS=together, BLOCK_V=TILE_V, num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
        block = min(max(pow2(tiles * k), 128), MERGE_KEYS)
        _merge_kernel[groups, batch](
            out, best, statistics, logits_argument(logits), rows, filters, groups, k, vocab, tiles,
            NOISY=noise != "none", **flags, SINGLE=tiles * k <= block, BLOCK=block, BLOCK_S=block_of(tiles),
            num_warps=NUM_WARPS, **FP_FUSION,
        )  # fmt: skip
    return out.tokens, out.has_nan, log_probs


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Each kind of noise and each dtype, without and with filters; the same on all architectures."""
    temperature = (abstract(torch.float32, 1),)
    filtered = *temperature, abstract(torch.int64, 1), abstract(torch.float64, 1), abstract(torch.float32, 1)

    def call(dtype, noise="none", k=1, filters=(), vocab=128256, parents=1, log_probs=False, rows=False, noisy=False):
        numbers, of_group = abstract(torch.int64, 1), abstract(torch.int64, parents)
        return functools.partial(
            draft_topk, abstract(DTYPES[dtype], 1, parents, vocab), k, filters, noise, numbers, numbers, 1,
            of_group if noisy else None, of_group if noise == "draft" else None, of_group if rows else None,
            log_probs or noisy, noisy,
        )  # fmt: skip

    for dtype, noise in itertools.product(DTYPES, ("none", "coupled", "draft")):
        filters = () if noise == "none" else temperature
        for kind, vocab in (("", 128256), (" odd V", 50257)):
            yield CompileCase(
                f"{dtype} tiles {noise}{kind}",
                _tiles_kernel,
                call(dtype, noise, 4, filters, vocab, 16),
                wide_loads=not kind,
                tile_bytes=TILE_V * DTYPES[dtype].itemsize,
            )
        yield CompileCase(
            f"{dtype} select {noise}",
            _select_kernel,
            call(dtype, noise, 4, filtered, log_probs=noise == "none"),
            tile_bytes=BLOCK_V * DTYPES[dtype].itemsize,
        )
    yield CompileCase(
        "bf16 tiles draft log_probs rows",
        _tiles_kernel,
        call("bf16", "draft", 1, temperature, parents=4, log_probs=True, rows=True),
        tile_bytes=TILE_V * 2,
    )
    yield CompileCase(
        "bf16 select draft rows", _select_kernel, call("bf16", "draft", 1, filtered, parents=4, rows=True),
        tile_bytes=BLOCK_V * 2,
    )  # fmt: skip
    for noise, k in itertools.product(("none", "coupled"), (1, 4, 16, 64)):
        filters = () if noise == "none" else temperature
        launches = call("bf16", noise, k, filters)
        yield CompileCase(f"merge {noise} k{k}", _merge_kernel, launches, wide_loads=False)
    launches = call("bf16", "coupled", 1, temperature, log_probs=True)
    yield CompileCase("merge coupled log_probs", _merge_kernel, launches, wide_loads=False)
    launches = call("bf16", "coupled", 10, temperature, parents=15, noisy=True)
    yield CompileCase("bf16 tiles depths noisy log_probs", _tiles_kernel, launches, tile_bytes=TILE_V * 2)
    yield CompileCase("merge depths noisy log_probs", _merge_kernel, launches, wide_loads=False)
    launches = call("bf16", "coupled", 10, filtered, parents=15, noisy=True)
    yield CompileCase("bf16 select depths noisy log_probs", _select_kernel, launches, tile_bytes=BLOCK_V * 2)
