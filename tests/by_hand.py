"""The ops and the search in texts in plain Python, one token at a time, and random cases of filters."""

import itertools
import math
import struct

import torch
from hypothesis import strategies as st

from specdec_triton.ops import FILTER_DTYPES
from specdec_triton.ops.filters import Filters

INF = float("inf")


def attention_by_hand(
    query, key, value, visible, scale=None, sliding_window=None, chunk_size=None, softcap=None, sinks=None
):
    """`ops.tree_attention`, computed for one token and head after another.

    Args:
        visible: (row of the batch, row of `query`) -> its position, and the (slot, position) of each key that it sees
            if there is no window or chunk.
    """
    batch, heads, rows, dim = query.shape
    group = heads // key.shape[1]
    output = torch.empty(batch, rows, heads, value.shape[-1])
    for b, h, i in itertools.product(range(batch), range(heads), range(rows)):
        own, seen = visible(b, i)
        slots = [
            slot
            for slot, position in seen
            if (sliding_window is None or own - position < sliding_window)
            and (chunk_size is None or own // chunk_size == position // chunk_size)
        ]
        scores = key[b, h // group, slots].float() @ query[b, h, i].float() * (dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks[h : h + 1].float()])
        output[b, i, h] = scores.softmax(0)[: len(slots)] @ value[b, h // group, slots].float()
    return output


def accept_greedy_by_hand(logits, tokens, parents, max_depth, budget, eos_ids):
    """Path, length and next token of one row: `ops.accept_greedy` in single steps.

    Args:
        logits: [N, V].
        tokens, parents: N numbers.
        eos_ids: numbers.
    """
    node, path = 0, []
    while budget and len(path) < min(budget - 1, max_depth):
        target = int(logits[node].argmax())
        children = [i for i in range(len(tokens)) if parents[i] == node and tokens[i] == target]
        if target in eos_ids or not children:
            break
        node = children[0]
        path.append(node)
    following = int(logits[node].argmax()) if budget else -1
    return path + [-1] * (max_depth - len(path)), len(path), following


def append_by_hand(
    text, length, position, budget, tokens, parents, path, accepted_length, next_ids, has_nan, eos_ids, draft_nan
):
    """`ops.append_tokens` for one row after another. All arguments are lists.

    Returns:
        The report, and the new text, length, position and budget.
    """
    report = []
    for row, left in enumerate(budget):
        emitted = []
        if left > 0:
            emitted = [*(tokens[row][node] for node in path[row][: accepted_length[row]]), next_ids[row]]
        for token in emitted:
            length[row] += 1
            position[row] += 1
            budget[row] -= 1
            text[row][length[row]] = token
        if emitted and next_ids[row] in (eos_ids or []):
            budget[row] = 0
        drafted = sum(parent >= 0 for parent in parents[row]) if left > 0 else 0
        flags = [int(has_nan[row]), int(left > 0 and draft_nan is not None and draft_nan[row])]
        padding = [next_ids[row]] * (len(path[row]) + 1 - len(emitted))
        report.append([*emitted, *padding, *path[row], len(emitted), drafted, budget[row], *flags])
    return report, text, length, position, budget


def build_by_hand(tokens, parents, scores, num_nodes):
    """`ops.build_tree` for one row after another. All arguments but the number are lists."""
    rows = []
    for row_tokens, row_parents, row_scores in zip(tokens, parents, scores, strict=True):
        left, kept = list(range(1, len(row_tokens))), [0]
        while len(kept) < num_nodes:
            best = max(left, key=lambda node: (-INF if math.isnan(row_scores[node]) else row_scores[node], -node))
            left.remove(best)
            kept.append(best)
        kept.sort()
        paths = [[0]]
        for node in kept[1:]:
            paths.append([*paths[kept.index(row_parents[node])], len(paths)])
        rows.append(([row_tokens[node] for node in kept], *_tree_of(paths), kept))
    return tuple(map(list, zip(*rows, strict=True)))


def _tree_of(paths):
    """parents, depths and ancestor words of the nodes of a tree, from the path of each node, root and node included."""
    words = range(-(-len(paths) // 64))
    bits = [[sum(1 << node - 64 * word for node in path if node // 64 == word) for word in words] for path in paths]
    bits = [[word - (1 << 64) if word >> 63 else word for word in row] for row in bits]
    return [-1] + [path[-2] for path in paths[1:]], [len(path) - 1 for path in paths], bits


def best_first_by_hand(root, candidates, log_probs, num_nodes):
    """`ops.best_first_tree` for one row after another. All arguments but the number are lists."""
    rows = []
    for row_root, row_candidates, row_log_probs in zip(root, candidates, log_probs, strict=True):
        tokens, paths, left = [row_root], [[0]], []
        score = 0.0
        while True:
            # children of the new node: score, depth, parent and rank, in the order of preference
            depth, best = len(paths[-1]), 0.0
            for rank, number in enumerate(row_log_probs[depth - 1] if depth <= len(row_log_probs) else []):
                best = min(best, -INF if math.isnan(number) else number)
                # a sum in fp64, rounded once, is that of fp32
                left.append((-struct.unpack("f", struct.pack("f", score + best))[0], depth, len(paths) - 1, rank))
            if len(paths) == num_nodes:
                break
            chosen = min(left)
            left.remove(chosen)
            score, (_, depth, parent, rank) = -chosen[0], chosen
            tokens.append(row_candidates[depth - 1][rank])
            paths.append([*paths[parent], len(paths)])
        rows.append((tokens, *_tree_of(paths)))
    return tuple(map(list, zip(*rows, strict=True)))


def tree_inputs_by_hand(depth, ancestors, start, base, last_position, origin, num_rows):
    """`ops.tree_inputs` for one node after another. All arguments are lists, except the number of rows.

    Returns:
        The packed tree, the positions and the slots.
    """
    first = len(depth[0]) - num_rows
    lengths = list(zip(depth, ancestors, start, base, last_position, strict=True))
    packed = [
        [[*words, edges, begin, root] for words, edges in zip(rows, depths, strict=True)]
        for depths, rows, begin, root, _ in lengths
    ]
    columns = [
        [min(root + edges, begin + last) for edges in depths[first:]] for depths, _, begin, root, last in lengths
    ]
    planes = [
        [[column - zero for column in row] for row, zero in zip(columns, plane, strict=True)]
        for plane in (origin if isinstance(origin[0], list) else [origin])
    ]
    slots = [[root + node for node in range(first, len(depth[0]))] for root in base]
    return packed, planes if isinstance(origin[0], list) else planes[0], slots


def rotary_by_hand(
    query, key, value, cos, sin, keys, values, slots,
    interleaved=False, query_norm=None, key_norm=None, eps=0.0, style="cast_first",
):  # fmt: skip
    """`ops.rotary_and_cache` in fp32, one head after another.

    Returns:
        The rotated query, and new keys and values.
    """
    keys, values = keys.clone(), values.clone()
    rotated = torch.empty_like(query, memory_format=torch.contiguous_format)
    dims = cos.shape[-1]
    pairs = [(2 * place, 2 * place + 1) if interleaved else (place, place + dims // 2) for place in range(dims // 2)]

    def head(states, b, i, weight):
        row = [float(each) for each in states]
        if weight is not None:
            inverse = float(torch.tensor(sum(each * each for each in row) / len(row) + eps).rsqrt())
            scale = [float(each) + (style == "one_plus") for each in weight]
            row = [each * inverse * factor for each, factor in zip(row, scale, strict=True)]
        turned = list(row)
        c, s = (each[b % len(each), i].tolist() for each in (cos, sin))
        for place, (one, other) in enumerate(pairs):
            first, second = (place, place) if interleaved else (one, other)
            turned[one] = row[one] * c[first] - row[other] * s[first]
            turned[other] = row[other] * c[second] + row[one] * s[second]
        return torch.tensor(turned)

    for b, i in itertools.product(range(query.shape[0]), range(query.shape[1])):
        for h in range(query.shape[2]):
            rotated[b, i, h] = head(query[b, i, h], b, i, query_norm)
        for h in range(key.shape[2]):
            keys[b, h, slots[b, i]] = head(key[b, i, h], b, i, key_norm)
            values[b, h, slots[b, i]] = value[b, i, h]
    return rotated, keys, values


# --- filters


def filters_of(max_top_k=None, **options):
    """`Filters` from lists, which have a value for each row."""
    rows = {name: torch.tensor(values, dtype=FILTER_DTYPES[name]) for name, values in options.items()}
    return Filters(**rows, max_top_k=max_top_k)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# each makes logits [V] whose thresholds are hard to find, from normally distributed numbers
PALETTES = {
    "negative": lambda drawn, dtype: drawn - 9,
    "tied": lambda drawn, dtype: drawn.round() / 4 - 1,
    "all tied": lambda drawn, dtype: torch.full_like(drawn, -1.25),
    "few finite": lambda drawn, dtype: torch.where(drawn.abs() < 1.5, -INF, drawn),
    "denormal": lambda drawn, dtype: (
        (drawn * 2).round() * 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    ),
    "signed zeros": lambda drawn, dtype: torch.where(drawn > 1.5, -drawn, drawn.sign() * 0.0),
    "large": lambda drawn, dtype: drawn * 2 + torch.finfo(torch.float16).max / 2,
    "huge": lambda drawn, dtype: drawn * torch.finfo(dtype).max / 8,
}


def paint(palette, dtype, vocab, seed):
    """Logits [V] of one of these kinds. At least one of them is finite."""
    drawn = torch.randn(vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = PALETTES[palette](drawn, dtype).to(dtype)
    if not (logits > -INF).any():
        logits[vocab // 2] = -0.75
    return logits


def check_filters_by_hand(logits, found, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Assert that `found` [V] are the log-probabilities of `logits` [V] under the filters, applied one after another in
    float64.

    Rounding in fp32 may keep or drop tokens that are almost on the threshold; all other tokens are compared.
    """
    exact = logits.double()
    peak, vocab = exact.max(), len(logits)
    if temperature == 0:
        assert found.tolist() == [0.0 if token == int(exact.argmax()) else -INF for token in range(vocab)]
        return
    below = (exact - peak) / temperature  # log of the ratio to the most likely token
    slack = 1e-5 + 4e-7 * (exact / temperature).abs().clamp(max=1e300)
    keeps, drops = exact > -INF, exact == -INF
    if 0 < top_k < vocab:
        drops = drops | (exact < exact.sort().values[vocab - top_k])
        keeps = ~drops
    if top_p < 1:
        order = torch.where(drops, -INF, exact).argsort(stable=True)  # among equals, lower ids first
        mass = torch.where(drops, -INF, below).softmax(-1)[order].cumsum(-1)
        rounding = 1e-5 + float((slack * below.exp()).nan_to_num(0).max())
        outside, inside = mass <= 1 - top_p - rounding, mass > 1 - top_p + rounding
        outside[-1], inside[-1] = False, True
        # tokens whose mass is 0 in fixed point may be dropped or kept
        keeps = keeps & inside[order.argsort()] & (below > -26)
        drops = drops | outside[order.argsort()]
    if min_p > 0:
        least = math.log(min(min_p, 1.0))
        keeps = keeps & ((below - slack > least) | (exact == peak))
        drops = drops | (below + slack < least)
    kept = found > -INF
    assert not found.isnan().any() and not (kept & drops).any() and not (keeps & (below > -80) & ~kept).any()
    wanted = torch.where(kept, below, -INF).softmax(-1)
    close = min(1e-4 + 1e-6 * abs(float(peak / temperature)), 0.05)
    torch.testing.assert_close(found.double().exp(), wanted, rtol=close, atol=1e-7)


def draw_filters(draw, palette):
    """Random filters for one row; each of them is sometimes off."""
    # powers of two, so that no quotient is rounded and different quotients stay different
    temperatures = [1.0, 0.5, 4.0, 0.0, 2.0**-120, *([] if palette == "denormal" else [2.0**20, 2.0**100])]
    return {
        "temperature": draw(st.sampled_from(temperatures)),
        "top_k": draw(st.just(0) | st.integers(1, 80)),
        "top_p": draw(st.just(1.0) | st.floats(0, 0.999)),
        "min_p": draw(st.sampled_from([0.0, 1e-6, 0.1, 0.7, 1.0])),
    }


def followers(texts, sequence):
    """{token: number of places of the texts at which it follows `sequence`}, in ascending order."""
    counts, length = {}, len(sequence)
    for text in texts:
        for end in range(length, len(text)):
            if text[end - length : end] == sequence:
                counts[text[end]] = counts.get(text[end], 0) + 1
    return dict(sorted(counts.items()))
