"""The references against loops over single tokens, heads and rows."""

import itertools

import pytest
import torch

from by_hand import accept_greedy_by_hand, attention_by_hand
from specdec_triton import DraftTree, Topology, ops
from specdec_triton.ops import reference

NAN = float("nan")


def attention_case(seed, batch=2, heads=(4, 2), dims=(8, 8), slots=40, topology=None, rows=None):
    """Random tensors with different lengths. All values that must not be read are NaN."""
    generator = torch.Generator().manual_seed(seed)
    topology = topology or Topology.from_widths([3, 2])
    nodes = topology.num_nodes
    rows = rows or nodes
    start = torch.randint(0, 4, (batch,), generator=generator)
    length = torch.randint(4, slots - nodes + 1, (batch,), generator=generator)
    query = torch.randn(batch, rows, heads[0], dims[0], generator=generator).transpose(1, 2)
    key = torch.randn(batch, slots, heads[1], dims[0], generator=generator)
    value = torch.randn(batch, slots, heads[1], dims[1], generator=generator)
    for row in range(batch):
        unused = torch.ones(slots, dtype=torch.bool)
        unused[start[row] : length[row] + nodes] = False
        key[row, unused], value[row, unused] = NAN, NAN
    tree = DraftTree.from_topology(topology, torch.zeros(batch, nodes, dtype=torch.int64))
    visible = seen_by_each(topology, rows, start, length)
    return query, key.transpose(1, 2), value.transpose(1, 2), tree.pack(start, length), visible


def seen_by_each(topology, rows, start, length):
    """The slots and positions that each row sees, for `attention_by_hand`. They are computed from the topology, not
    from a packed tree."""

    def visible(b, i):
        path = [topology.num_nodes - rows + i]
        while topology.parents[path[-1]] >= 0:
            path.append(topology.parents[path[-1]])
        first, base = int(start[b]), int(length[b])
        position = {node: base - first + topology.depths[node] for node in path}
        prefix = [(slot, slot - first) for slot in range(first, base)]
        return position[path[0]], prefix + [(base + node, position[node]) for node in path]

    return visible


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 3},
        {"sliding_window": 9},
        {"chunk_size": 4},
        {"softcap": 2.0},
        {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    ],
    ids=str,
)
def test_tree_attention_is_attention_over_prefix_and_ancestors(options, seed):
    query, key, value, packed, visible = attention_case(seed)
    wanted = attention_by_hand(query, key, value, visible, **options)
    got = ops.tree_attention(query, key, value, packed, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()


@pytest.mark.parametrize(
    "options",
    [
        {"heads": (3, 3), "dims": (8, 4)},
        {"heads": (6, 1)},
        {"topology": Topology.chain(0)},
        {"topology": Topology.chain(69), "slots": 100},
        {"topology": Topology.from_widths([4, 4, 4]), "slots": 120, "batch": 3},
        {"topology": Topology.from_widths([2, 2]), "rows": 4},
    ],
    ids=str,
)
def test_tree_attention_of_other_shapes(options):
    query, key, value, packed, visible = attention_case(7, **options)
    for window in (None, 5):
        wanted = attention_by_hand(query, key, value, visible, sliding_window=window)
        got = ops.tree_attention(query, key, value, packed, sliding_window=window)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_tree_attention_by_hand():
    """One head of width 1 with scale 0, so that all visible values have equal weights."""
    tree = DraftTree.from_topology(Topology((-1, 0, 0, 1), (0, 0, 1, 0)), torch.zeros(1, 4, dtype=torch.int64))
    packed = tree.pack(torch.tensor([1]), torch.tensor([3]))
    assert packed[0].tolist() == [[0b0001, 0, 1, 3], [0b0011, 1, 1, 3], [0b0101, 1, 1, 3], [0b1011, 2, 1, 3]]
    value = torch.tensor([NAN, 2.0, 4.0, 6.0, 12.0, 100.0, 20.0, NAN]).view(1, 1, 8, 1)
    zeros = torch.zeros(1, 1, 4, 1)
    got = ops.tree_attention(zeros, torch.zeros_like(value), value, packed)
    assert got.flatten().tolist() == pytest.approx([12 / 3, 24 / 4, 112 / 4, 44 / 5])


@pytest.mark.parametrize("seed", range(40))
def test_accept_greedy_walks_down_the_tree(seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    batch, nodes, vocab = int(integers(1, 4)), int(integers(1, 15)), int(integers(2, 5))
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    for b, i in itertools.product(range(batch), range(1, nodes)):
        parent = int(integers(0, i))
        # a tenth of the nodes, and all nodes below them, are padding
        parents[b, i] = parent if (parent == 0 or parents[b, parent] >= 0) and integers(0, 10) else -1
    tokens, logits = integers(0, vocab, batch, nodes), integers(0, 3, batch, nodes, vocab).float()  # with many ties
    budget = integers(0, 6, batch)
    eos = integers(0, vocab, int(integers(0, 3)))
    max_depth = nodes - 1
    got = ops.accept_greedy(
        logits, tokens, parents, max_depth=max_depth, budget=budget, eos_ids=eos if len(eos) else None
    )
    for b in range(batch):
        wanted = accept_greedy_by_hand(
            logits[b], tokens[b].tolist(), parents[b].tolist(), max_depth, int(budget[b]), eos.tolist()
        )
        assert (got.path[b].tolist(), int(got.length[b]), int(got.next_ids[b])) == wanted
    assert got.path.dtype == torch.int32 and got.next_ids.dtype == torch.int64 and not got.has_nan.any()


def test_accept_greedy_by_hand():
    """Root 7 with children 3 and 5; node 5 with children 1 and 3. The target's tokens are 5, then 3, then 9."""
    logits = torch.zeros(1, 5, 10)
    for node, target in enumerate([5, 0, 3, 0, 9]):
        logits[0, node, target] = 1.0
    tree = {"tokens": torch.tensor([[7, 3, 5, 1, 3]]), "parents": torch.tensor([[-1, 0, 0, 2, 2]], dtype=torch.int32)}
    path, length, next_ids, has_nan = ops.accept_greedy(logits, **tree, max_depth=2)
    assert (path.tolist(), length.tolist(), next_ids.tolist(), has_nan.tolist()) == ([[2, 4]], [2], [9], [False])
    ended = ops.accept_greedy(logits, **tree, max_depth=2, eos_ids=torch.tensor([3]))
    assert (ended.path.tolist(), ended.length.tolist(), ended.next_ids.tolist()) == ([[2, -1]], [1], [3])
    short = ops.accept_greedy(logits, **tree, max_depth=2, budget=torch.tensor([2]))
    assert (short.path.tolist(), short.next_ids.tolist()) == ([[2, -1]], [3])
    logits[0, 1, 4] = NAN  # at a node that is not reached
    assert not ops.accept_greedy(logits, **tree, max_depth=2).has_nan.any()
    logits[0, 4, 4] = NAN
    assert ops.accept_greedy(logits, **tree, max_depth=2).has_nan.tolist() == [True]
    assert ops.accept_greedy(logits, **tree, max_depth=2, budget=torch.tensor([0])).has_nan.tolist() == [False]


@pytest.mark.parametrize("widths", [[3], [4, 4], [2, 2, 5, 5], [3, 1, 3]])
def test_compact_kv_moves_rows_and_nothing_else(widths):
    base, path = torch.tensor([2, 5]), torch.tensor([[2, 3, 6], [1, 4, -1]], dtype=torch.int32)
    storage = torch.arange(2 * 12 * sum(widths), dtype=torch.float32)
    storage[0] = NAN
    wanted = storage.clone()
    offset = 0
    for width in widths:
        plane = wanted[offset : offset + 2 * 12 * width].view(2, 12, width)
        plane[0, 3:6] = plane[0, [4, 5, 8]].clone()
        plane[1, 6:8] = plane[1, [6, 9]].clone()
        offset += 2 * 12 * width
    ops.compact_kv(storage, widths, base, path)
    assert torch.equal(storage.nan_to_num(-1), wanted.nan_to_num(-1))


def valid_arguments():
    query, key, value, packed, _ = attention_case(0)
    return {"query": query, "key": key, "value": value, "packed_tree": packed}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": torch.zeros(2, 4, 8)},
            r"query must be fp32, bf16 or fp16 \[B, Hq, N, D\], none of them 0, got torch.float32 \[2, 4, 8\] on cpu",
        ),
        ({"query": torch.zeros(2, 4, 10, 8, dtype=torch.float64)}, "query must be fp32, bf16 or fp16"),
        ({"key": torch.zeros(2, 2, 40, 9)}, r"key must be torch.float32 \[2, Hkv, S, 8\]"),
        ({"key": torch.zeros(2, 3, 40, 8)}, "key must be a tensor whose number of heads divides 4"),
        ({"value": torch.zeros(2, 2, 39, 8)}, r"value must be torch.float32 \[2, 2, 40, Dv\]"),
        ({"value": torch.zeros(2, 2, 40, 8, dtype=torch.float16)}, "value must be torch.float32"),
        ({"packed_tree": torch.zeros(2, 10, 4)}, r"packed_tree must be torch.int64 \[2, T, W \+ 3\]"),
        ({"packed_tree": torch.zeros(2, 10, 5, dtype=torch.int64)}, "packed_tree must be 10 to 40 nodes"),
        ({"packed_tree": torch.zeros(2, 9, 4, dtype=torch.int64)}, "packed_tree must be 10 to 40 nodes"),
        ({"sliding_window": 0}, "sliding_window must be None or positive, got 0"),
        ({"softcap": -1.0}, "softcap must be None or positive"),
        ({"chunk_size": 0}, "chunk_size must be None or positive"),
        ({"sinks": torch.zeros(3)}, r"sinks must be float \[4\]"),
        ({"impl": "eager"}, 'impl must be None, "triton" or "reference"'),
        ({"packed_tree": torch.zeros(2, 10, 4, dtype=torch.int64, device="meta")}, "packed_tree must be on cpu"),
    ],
)
def test_tree_attention_refuses_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=f"^tree_attention: {message}"):
        ops.tree_attention(**{**valid_arguments(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(1, 3)}, r"logits must be fp32, bf16 or fp16 \[B, N, V\]"),
        ({"logits": torch.zeros(1, 3, 4, dtype=torch.int64)}, "logits must be fp32"),
        ({"logits": torch.zeros(1, 0, 4)}, r"logits must be fp32, bf16 or fp16 \[B, N, V\], none of them 0"),
        ({"tokens": torch.zeros(1, 2, dtype=torch.int64)}, r"tokens must be torch.int64 \[1, 3\]"),
        ({"parents": torch.zeros(1, 3, dtype=torch.int64)}, r"parents must be torch.int32 \[1, 3\]"),
        ({"max_depth": 3}, "max_depth must be 0 to 2 for 3 nodes, got 3"),
        ({"budget": torch.zeros(2, dtype=torch.int64)}, r"budget must be torch.int64 \[1\]"),
        ({"eos_ids": torch.zeros(1)}, r"eos_ids must be torch.int64 \[E\]"),
    ],
)
def test_accept_greedy_refuses_bad_arguments(changes, message):
    arguments = {
        "logits": torch.zeros(1, 3, 4),
        "tokens": torch.zeros(1, 3, dtype=torch.int64),
        "parents": torch.tensor([[-1, 0, 1]], dtype=torch.int32),
        "max_depth": 2,
    }
    with pytest.raises(ValueError, match=f"^accept_greedy: {message}"):
        ops.accept_greedy(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": torch.zeros(2, 3)}, "storage must be contiguous"),
        ({"storage": torch.zeros(64)[::2]}, r"storage must be contiguous .*\[32\] on cpu with strides \[2\]"),
        ({"widths": [5]}, r"widths must be positive and B \* sum\(widths\) = 10"),
        ({"widths": [3, -1]}, "widths must be positive"),
        ({"base": torch.zeros(2)}, r"base must be torch.int64 \[B\]"),
        ({"path": torch.zeros(2, 3, dtype=torch.int64)}, r"path must be torch.int32 \[2, D\]"),
    ],
)
def test_compact_kv_refuses_bad_arguments(changes, message):
    arguments = {
        "storage": torch.zeros(2 * 8 * 2),
        "widths": [1, 1],
        "base": torch.zeros(2, dtype=torch.int64),
        "path": torch.zeros(2, 3, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=f"^compact_kv: {message}"):
        ops.compact_kv(**{**arguments, **changes})


def acceptance(batch=2, depth=2, **changes):
    fields = {
        "path": torch.full((batch, depth), -1, dtype=torch.int32),
        "length": torch.zeros(batch, dtype=torch.int64),
        "next_ids": torch.zeros(batch, dtype=torch.int64),
        "has_nan": torch.zeros(batch, dtype=torch.bool),
    }
    return ops.Acceptance(**fields | changes)


LONGS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": torch.zeros(2, 9)}, r"text must be torch.int64 \[B, C\], none of them 0, got torch.float32"),
        (
            {"text": torch.zeros(9, 2, dtype=torch.int64).t()},
            r"text must be \[B, C\] with contiguous rows that do not overlap, got .* with strides \[1, 2\]",
        ),
        ({"text": LONGS[:1].expand(2, -1)}, r"text must be \[B, C\] with contiguous rows that do not overlap"),
        ({"length": LONGS[0]}, r"length must be torch.int64 \[2\], got torch.int64 \[3\]"),
        ({"length": LONGS[:, 0]}, r"length must be contiguous \[B\], got torch.int64 \[2\] on cpu with strides \[3\]"),
        ({"position": LONGS[:, 0]}, r"position must be contiguous \[B\]"),
        ({"budget": LONGS[0, 0].expand(2)}, r"budget must be contiguous \[B\]"),
        ({"budget": torch.zeros(2)}, r"budget must be torch.int64 \[2\]"),
        ({"tokens": LONGS[:1]}, r"tokens must be torch.int64 \[2, N\]"),
        ({"parents": LONGS[:, :2]}, r"parents must be torch.int32 or torch.int64 \[2, 3\]"),
        ({"accepted": None}, "accepted must be an Acceptance, got NoneType"),
        ({"accepted": tuple(acceptance())}, "accepted must be an Acceptance, got tuple"),
        ({"accepted": acceptance(path=LONGS)}, r"accepted.path must be torch.int32 \[2, D\]"),
        ({"accepted": acceptance(depth=3)}, r"accepted.path must be \[2, D\] with D below 3, the number of nodes"),
        ({"accepted": acceptance(length=LONGS)}, r"accepted.length must be torch.int64 \[2\]"),
        ({"accepted": acceptance(next_ids=LONGS)}, r"accepted.next_ids must be torch.int64 \[2\]"),
        ({"accepted": acceptance(has_nan=LONGS[:, 0])}, r"accepted.has_nan must be torch.bool \[2\]"),
        ({"eos_ids": LONGS}, r"eos_ids must be torch.int64 \[E\]"),
        ({"draft_nan": LONGS[:, 0]}, r"draft_nan must be torch.bool \[2\]"),
        ({"draft_nan": torch.zeros(2, dtype=torch.bool, device="meta")}, "draft_nan must be on cpu"),
        ({"impl": "eager"}, 'impl must be None, "triton" or "reference"'),
    ],
)
def test_append_tokens_refuses_bad_arguments(changes, message):
    arguments = {
        "text": torch.zeros(2, 9, dtype=torch.int64),
        **{name: torch.zeros(2, dtype=torch.int64) for name in ("length", "position", "budget")},
        "tokens": LONGS,
        "parents": LONGS - 1,
        "accepted": acceptance(),
    }
    ops.append_tokens(**arguments)
    with pytest.raises(ValueError, match=f"^append_tokens: {message}"):
        ops.append_tokens(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": torch.zeros(2, 3)}, r"depth must be torch.int64 \[B, T\], none of them 0, got torch.float32"),
        ({"depth": LONGS[0]}, r"depth must be torch.int64 \[B, T\]"),
        ({"ancestors": LONGS}, r"ancestors must be torch.int64 \[2, 3, W\]"),
        ({"ancestors": LONGS[:, :2, None]}, r"ancestors must be torch.int64 \[2, 3, W\], got torch.int64 \[2, 2, 1\]"),
        ({"start": LONGS[0]}, r"start must be torch.int64 \[2\], got torch.int64 \[3\]"),
        ({"base": LONGS[:, 0].int()}, r"base must be torch.int64 \[2\], got torch.int32"),
        ({"last_position": 7}, "last_position must be a tensor, got 7"),
        ({"last_position": LONGS[:, :1]}, r"last_position must be torch.int64 \[2\]"),
        ({"origin": LONGS[0]}, r"origin must be torch.int64 \[2\]"),
        ({"origin": LONGS}, r"origin must be torch.int64 \[P, 2\]"),
        ({"origin": LONGS[:0, :2]}, r"origin must be torch.int64 \[P, 2\]"),
        ({"origin": LONGS[:, 0].to("meta")}, "origin must be on cpu"),
        ({"num_rows": 0}, "num_rows must be 1 to 3, the number of nodes, got 0"),
        ({"num_rows": 4}, "num_rows must be 1 to 3, the number of nodes, got 4"),
        ({"num_rows": 1.0}, "num_rows must be an integer of 64 bits, got 1.0"),
        ({"impl": "eager"}, 'impl must be None, "triton" or "reference"'),
    ],
)
def test_tree_inputs_refuses_bad_arguments(changes, message):
    lengths = dict.fromkeys(("start", "base", "last_position", "origin"), LONGS[:, 0])
    arguments = {"depth": LONGS, "ancestors": LONGS[:, :, None], **lengths, "num_rows": 2}
    ops.tree_inputs(**arguments)
    with pytest.raises(ValueError, match=f"^tree_inputs: {message}"):
        ops.tree_inputs(**{**arguments, **changes})


def test_a_root_alone():
    """Rows with a NaN, without one, and the same two finished."""
    logits = torch.tensor([[[0.0, NAN, 1.0]], [[0.0, 3.0, 1.0]]]).repeat(2, 1, 1)
    tree, budget = DraftTree.root_only(torch.zeros(4, 1, dtype=torch.int64)), torch.tensor([2, 2, 0, 0])
    accepted = ops.accept_greedy(logits, tree.tokens, tree.parents, max_depth=0, budget=budget)
    assert accepted.path.shape == (4, 0) and accepted.path.dtype == torch.int32
    assert accepted.next_ids[1:].tolist() == [1, -1, -1] and accepted.length.tolist() == [0, 0, 0, 0]
    assert accepted.has_nan.tolist() == [True, False, False, False]


@pytest.mark.parametrize("vocab", [64 * 70, 128 * 33, 32 * 129, 5003])  # blocks of 64, 128 and 32, and no blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_maximum(vocab, dtype, monkeypatch):
    """In bf16 several of so many scores are equal."""
    monkeypatch.setattr(reference, "MANY_SCORES", 3 * vocab)
    scores = torch.randn(1, 7, vocab, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[0, 1, [40, 300, 301]] = 9.0
    scores[0, 2, [77, 3000]] = NAN
    scores[0, 3] = -torch.inf
    scores[0, 4, 4000:] = torch.inf
    for given in (scores, scores[:, :2], scores.transpose(1, 2).contiguous().transpose(1, 2)):
        best, ids = reference.first_max(given)
        highest = given.amax(-1, keepdim=True)
        first = (given == highest).logical_or(given.isnan()).int().argmax(-1)
        assert torch.equal(ids, first)
        torch.testing.assert_close(best, highest[..., 0], rtol=0, atol=0, equal_nan=True)
    assert ids[0, 1:5].tolist() == [40, 77, 0, 4000]


def test_which_implementation_and_why():
    assert ops.implementation("tree_attention", "cpu")[0] == "reference"
    assert ops.implementation("tree_attention", "cuda")[0] == "triton"
    with pytest.raises(ValueError, match="op must be one of tree_attention"):
        ops.implementation("attention", "cpu")
