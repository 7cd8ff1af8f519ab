"""The tree attention kernel against its reference: in Triton's interpreter without a GPU, compiled with one."""

import dataclasses
import itertools
import math
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from first_gpu import covering, marked, turns
from specdec_triton import ops
from specdec_triton.forward.cache import in_buckets
from specdec_triton.ops import reference
from specdec_triton.ops.reference import visible_slots
from specdec_triton.tools import inspection
from specdec_triton.tree import DraftTree, Topology

pytest.importorskip("triton")
from specdec_triton.kernels import tree_attention as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass
class Case:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    packed: torch.Tensor

    def run(self, impl="triton", **options):
        return ops.tree_attention(self.query, self.key, self.value, self.packed, impl=impl, **options)


def random_trees(batch, nodes, generator):
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    for row in parents:
        for node in range(1, nodes):
            # close parents make deep trees, distant ones bushy trees
            low = 0 if node % 2 else max(0, node - 3)
            row[node] = int(torch.randint(low, node, (), generator=generator))
    return DraftTree.from_parents(torch.zeros(batch, nodes, dtype=torch.int64), parents)


def make_case(
    batch=2, query_heads=4, kv_heads=2, rows=7, slots=160, head_dim=64, value_dim=None, nodes=None,
    dtype=torch.float32, lengths=None, starts=None, seed=0,
):  # fmt: skip
    """Slot-major storage seen through transposed views. All slots outside [start, length + T) hold NaN or inf."""
    generator = torch.Generator().manual_seed(seed)
    value_dim, nodes = value_dim or head_dim, nodes or rows
    if lengths is None:
        lengths = torch.randint(0, slots - nodes + 1, (batch,), generator=generator).tolist()
        lengths[0] = slots - nodes
    if starts is None:
        fractions = torch.rand(batch, generator=generator).tolist()
        starts = [int(length * fraction) for length, fraction in zip(lengths, fractions, strict=True)]
    packed = random_trees(batch, nodes, generator).pack(torch.tensor(starts), torch.tensor(lengths))
    shapes = (rows, query_heads, head_dim), (slots, kv_heads, head_dim), (slots, kv_heads, value_dim)
    query, key, value = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for tensor in (key, value):
            tensor[row, :start] = math.nan
            tensor[row, length + nodes :] = math.inf
            tensor[row, length + nodes :: 2] = math.nan
    query, key, value, packed = (tensor.to(DEVICE) for tensor in (query, key, value, packed))
    return Case(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), packed)


def in_float64(case, scale=None, softcap=None, sinks=None, **limits):
    """The reference's formula in float64: [B, N, Hq, Dv]."""
    visible = reference.visible_slots(case.packed, case.query.shape[2], case.key.shape[2], **limits)[:, None]
    group = case.query.shape[1] // case.key.shape[1]
    key, value = (tensor.double().nan_to_num(0, 0, 0).repeat_interleave(group, 1) for tensor in (case.key, case.value))
    scores = case.query.double() @ key.mT * (case.query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    sink = scores.new_full((scores.shape[1],), -math.inf) if sinks is None else sinks.double()
    weights = torch.cat([scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2)


def check(case, **options):
    """Compare the kernel with the reference. The tolerance is a small multiple of the reference's own fp32 error and
    of one rounding of the largest value. In half precision it also covers one rounding of each weight and of the
    output."""
    wanted = case.run("reference", **options)
    got = case.run("triton", **options)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.is_contiguous()
    exact = in_float64(case, **options)
    single = Case(case.query.float(), case.key.float(), case.value.float(), case.packed).run("reference", **options)
    greatest = case.value[case.value.isfinite()].abs().max().item()
    roundings = 4 * torch.finfo(torch.float32).eps
    if got.dtype != torch.float32:
        roundings += torch.finfo(got.dtype).eps
    # the kernel's tanh is exact to a rounding of 1, and the softcap multiplies the error
    roundings += 2 * (options.get("softcap") or 0) * torch.finfo(torch.float32).eps
    tolerance = 8 * (single - exact).abs().max().item() + roundings * greatest
    for name, result in (("the exact result", exact), ("the reference", wanted.double())):
        difference = (got.double() - result).abs().max().item()
        assert difference <= tolerance, f"differs from {name} by {difference}, allowed are {tolerance}"


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Fill all tensors that the launcher allocates with NaN. Other code also uses `torch.empty`, and not all of its
    dtypes can hold NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(kernel.torch, "empty", poisoned)


@pytest.fixture
def small_splits(monkeypatch):
    """Use tiles of 16 rows and 32 slots, two tiles per split, and merge two splits at a time, so that every loop runs
    more than once at small sizes."""
    config = kernel.AttentionConfig(16, 32, 4, 2, 2)
    monkeypatch.setattr(kernel, "attention_config", lambda *shape: config)
    monkeypatch.setattr(kernel, "SHORT_SLOTS", 0)
    monkeypatch.setattr(kernel, "_split_tiles", lambda *shape: 2)
    monkeypatch.setattr(kernel, "MERGE_SPLITS", 2)
    kernel.attention_plan.cache_clear()
    yield
    kernel.attention_plan.cache_clear()


@pytest.fixture
def ordered_products(monkeypatch):
    """Make the interpreter's matrix product sum in a fixed order. Its BLAS chooses the order by processor, shape and
    row.

    Elementwise products and sums of floats are the same on every processor. With a GPU, the interpreter is not used.
    """
    calls = []

    def matmul(left, right, dtype):
        calls.append(left.shape)
        total = np.zeros((left.shape[0], right.shape[1]), dtype)
        for column, row in zip(left.T.astype(dtype), right.astype(dtype), strict=True):
            total += column[:, None] * row[None, :]
        return total

    monkeypatch.setattr(np, "matmul", matmul)
    yield
    assert calls or not kernel.INTERPRETED.value, "the interpreter's product is no longer np.matmul"


OPTIONS = [
    {},
    {"sliding_window": 20},
    {"sliding_window": 1},
    {"chunk_size": 48},
    {"chunk_size": 3},
    {"softcap": 5.0},
    {"sinks": True},
    {"sliding_window": 40, "chunk_size": 32, "softcap": 2.0, "sinks": True, "scale": 0.3},
]


def with_sinks(options, query_heads):
    if not options.get("sinks"):
        return options
    return options | {"sinks": torch.linspace(-2, 3, query_heads, device=DEVICE)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_split(options):
    check(make_case(rows=11), **with_sinks(options, 4))


@pytest.mark.parametrize("merged", [2, 16], ids=["in passes", "at once"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_several_splits(small_splits, monkeypatch, options, merged):
    monkeypatch.setattr(kernel, "MERGE_SPLITS", merged)
    check(make_case(rows=4, slots=200, query_heads=3, kv_heads=1), **with_sinks(options, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "query_heads", "kv_heads", "rows", "slots", "head_dim", "value_dim", "nodes"),
    [
        (1, 1, 1, 1, 1, 64, 64, 1),  # first token, no prefix
        (3, 2, 2, 1, 65, 64, 64, 1),  # plain decoding, one query head per KV head
        (2, 7, 1, 3, 97, 80, 80, 3),  # rows and head dim that are not powers of two
        (2, 4, 2, 5, 100, 96, 64, 9),  # D != Dv, N < T
        (1, 4, 2, 4, 70, 192, 128, 4),
        (1, 4, 4, 2, 70, 256, 256, 70),  # N < T, W = 2, the tree fills the capacity
        (1, 2, 1, 65, 140, 64, 64, 65),  # W = 2, one node in the second word
        (2, 2, 1, 20, 200, 32, 48, 130),  # W = 3
    ],
)
def test_shapes(batch, query_heads, kv_heads, rows, slots, head_dim, value_dim, nodes, dtype):
    check(make_case(batch, query_heads, kv_heads, rows, slots, head_dim, value_dim, nodes, dtype))


def test_wide_tree_in_several_splits(small_splits):
    check(make_case(1, 1, 1, rows=40, slots=300, nodes=100), sliding_window=90)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 150])
def test_lengths_around_tile_edges(small_splits, length):
    check(make_case(1, 1, 1, rows=3, slots=160, lengths=[length], starts=[0], seed=length))


def test_start_next_to_length():
    check(make_case(batch=3, rows=4, slots=90, lengths=[50, 50, 50], starts=[50, 49, 17]))


def test_default_configuration_above_one_split():
    check(make_case(1, 4, 2, rows=3, slots=1300, lengths=[1290], starts=[5]))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_256_nodes(options):
    check(make_case(1, 2, 1, rows=256, slots=1500, lengths=[1200], starts=[3]), **with_sinks(options, 2))


AXES = [64, 80, 128, 256], [(1, 300), (16, 300), (16, 9000), (64, 9000), (200, 3000)], OPTIONS
ON_GPU = list(itertools.product([torch.bfloat16, torch.float16, torch.float32], *AXES))
FIRST_ON_GPU = covering([cell for cell in ON_GPU if cell[0] == torch.bfloat16])
FIRST_ON_GPU += turns([torch.float16], *AXES) + turns([torch.float32], *AXES)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "head_dim", "size", "options"), marked(ON_GPU, FIRST_ON_GPU), ids=str)
def test_on_gpu(dtype, head_dim, size, options):
    rows, slots = size
    check(make_case(2, 8, 2, rows, slots, head_dim, dtype=dtype), **with_sinks(options, 8))


# Properties of plans: Llama 3.1 8B's attention on a GPU with 132 multiprocessors.
CONTEXTS, NODES, BATCHES = (1024, 2048, 8192, 32768), (1, 8, 16, 32, 64, 128), (1, 16, 64)


def plan(nodes, slots, batch=1, kv_heads=8, group=4, head_dim=128, value_dim=128, multiprocessors=132):
    shape = batch, kv_heads, group, nodes, nodes, slots, head_dim, value_dim, 2, False
    return kernel.attention_plan(90, multiprocessors, *shape)


# (batch, context) -> N of the shapes whose whole work is less than 4 tiles of 64 slots for each multiprocessor
TOO_SMALL = {(1, 1024): {1, 8, 16, 32}, (1, 2048): {1, 8, 16}}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_programs_fill_whole_waves(context, batch):
    """At least 80% of each wave, counted for one program per multiprocessor, in a cache whose capacity is used up."""
    below, small = set(), set()
    for nodes in NODES:
        slots = in_buckets(context + nodes)
        (row_tiles, splits, sequences), _, meta, _ = plan(nodes, slots, batch)
        planned = inspection.planned_attention(batch, context, nodes)
        assert planned.programs <= row_tiles * splits * sequences
        if planned.programs < 0.8 * 132 * -(-planned.programs // 132):
            below.add(nodes)
        if row_tiles * sequences * -(-slots // meta["BLOCK_N"]) < 4 * 132:
            small.add(nodes)
        assert (planned.filled < 0.8) == (nodes in below)
    assert small == TOO_SMALL.get((batch, context), set())
    assert below == small


def test_the_planned_programs_in_the_docs():
    lines = (pathlib.Path(__file__).parent.parent / "docs" / "kernels.md").read_text().splitlines()
    expected = list(inspection.plan_lines())
    first = lines.index(expected[0])
    assert lines[first : first + len(expected)] == expected


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("context", (512, *CONTEXTS))
def test_keys_are_not_split_if_the_programs_without_splits_fill_the_card(context, nodes):
    assert plan(nodes, in_buckets(context + nodes), 64)[0][1] == 1
    if nodes >= 32:
        assert plan(nodes, in_buckets(context + nodes), 16)[0][1] == 1


def test_the_sizes_that_the_tuner_found_fastest():
    """Splits of the fastest plans on an H200 (bench/results/nvidia-h200/tree_attention_splits.json), by batch, context
    and N. A capacity is used up, and rounded as in the benchmark."""
    fastest = {(1, 8192, 32): 15, (1, 8192, 64): 8, (1, 32768, 128): 4, (4, 2048, 32): 4, (4, 8192, 8): 8}
    fastest |= {(1, 512, 128): 1, (1, 1024, 64): 4, (1, 2048, 32): 7, (16, 8192, 8): 2, (16, 8192, 32): 1}
    for (batch, context, nodes), splits in fastest.items():
        assert plan(nodes, context + nodes, batch)[0][1] == splits, (batch, context, nodes)


@pytest.mark.parametrize(
    ("kv_heads", "nodes"), [(1, 1), (2, 16), (3, 7), (5, 64), (8, 96), (10, 33), (32, 1), (32, 64)]
)
@pytest.mark.parametrize("multiprocessors", [16, 58, 108, 132, 148])
def test_other_heads_and_cards(kv_heads, nodes, multiprocessors):
    """At full capacity most of the GPU is busy, for any number of heads. The last wave counts as a full one. With few
    KV heads, more passes of the merge may outweigh fuller waves."""
    grid, split_tiles, meta, _ = plan(nodes, 32768, kv_heads=kv_heads, multiprocessors=multiprocessors)
    waves = -(-math.prod(grid) // multiprocessors)
    tiles = 32768 // meta["BLOCK_N"]
    # splits are whole tiles, so 2.4 tiles become 3
    least = 0.78 if grid[1] <= 2 * kernel.MERGE_SPLITS else 0.3
    assert grid[0] * grid[2] * tiles / (waves * multiprocessors * split_tiles) > least
    assert grid[1] <= 2 * kernel.MERGE_SPLITS or kv_heads <= 3


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_partial_results_stay_small(context, nodes):
    """The traffic of a program's partial results is at most half of that of its keys and values."""
    for batch in BATCHES:
        grid, split_tiles, meta, _ = plan(nodes, in_buckets(context + nodes), batch)
        partial = 2 * meta["BLOCK_M"] * 128 * 4 if grid[1] > 1 else 0
        assert 2 * partial <= split_tiles * meta["BLOCK_N"] * 2 * 128 * 2


def test_a_splits_size_is_a_function_of_its_own_shape():
    """Inside a batch bucket, the size of a split depends neither on the batch nor on the tree, as long as the number of
    row tiles and the configuration are the same."""
    for slots in (300, 2176, 8320, 32896):
        for bucket in ((1,), (2,), (3, 4), (5, 7, 8), (33, 50, 64)):
            plans = [plan(nodes, slots, batch) for nodes in (17, 25, 32) for batch in bucket]
            assert len({(split_tiles, *meta.items()) for _, split_tiles, meta, _ in plans}) == 1
    assert plan(32, 8320, 1)[1] != plan(32, 8320, 16)[1]


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize(("kv_heads", "blocks"), [(8, {16, 32}), (2, {16, 32, 64, 128})], ids=str)
def test_a_growing_cache_compiles_rarely(kv_heads, blocks, nodes):
    """Attention is compiled once, or twice if the first capacities are one split; the merge once for each power of two
    of splits."""
    compiled, merges = set(), set()
    for slots in range(512, 40960 + 1, 128):
        grid, _, meta, merge_meta = plan(nodes, slots, kv_heads=kv_heads)
        compiled.add((grid[1] > 1, *meta.items()))
        merges |= {tuple(merge_meta.items())} if grid[1] > 1 else set()
    assert len(compiled) <= 2
    assert len(merges) == len({dict(meta)["BLOCK_P"] for meta in merges})
    assert {dict(meta)["BLOCK_P"] for meta in merges} <= blocks


@pytest.mark.parametrize("nodes", [1, 7, 64, 128, 256])
def test_a_short_context_is_one_launch(nodes):
    """This holds for any number of nodes and rounding of the capacity. From 1024 slots on, more programs outweigh a
    merge, except for 256 nodes."""
    for context in (1, 129, 256):
        assert plan(nodes, in_buckets(context + nodes))[0][1] == 1
    assert plan(nodes, in_buckets(1024 + nodes))[0][1] > 1 or nodes == 256


def test_narrow_row_tiles_are_used_only_if_the_card_is_not_full():
    def width(nodes, batch):
        return plan(nodes, in_buckets(256 + nodes), batch)[2]["BLOCK_M"]

    assert {nodes: width(nodes, 1) for nodes in (1, 8, 16, 32, 64)} == {1: 16, 8: 16, 16: 16, 32: 64, 64: 64}
    assert {nodes: width(nodes, 16) for nodes in (1, 8, 16, 32, 64)} == {1: 16, 8: 32, 16: 64, 32: 64, 64: 64}


def wide(head_dim, value_dim, dtype=torch.float16):
    return make_case(1, 2, 1, rows=3, slots=40, head_dim=head_dim, value_dim=value_dim, dtype=dtype)


class Launched(Exception):
    pass


@pytest.fixture
def no_launch(monkeypatch):
    def refuse(op):
        raise Launched(op)

    monkeypatch.setattr(ops.registry, "launcher", refuse)


def test_heads_too_wide_are_refused(no_launch):
    """Head dims of absorbed MLA, 576 and 512. They are refused before a launch."""
    message = r'tree_attention: key must be a tensor with a head dim of at most 512 for impl="triton"'
    with pytest.raises(ValueError, match=message + r".*got torch.float16 \[1, 1, 40, 576\]"):
        wide(576, 512).run()
    with pytest.raises(ValueError, match=message.replace("key", "value") + r".*\[1, 1, 40, 513\]"):
        wide(64, 513).run()
    with pytest.raises(ValueError, match=message.replace("512", "256")):
        wide(320, 64, torch.float32).run()
    for case in (wide(512, 512), wide(256, 256, torch.float32), wide(192, 128)):
        with pytest.raises(Launched):
            case.run()
    for itemsize, widest in ops.MAX_HEAD_DIMS.items():
        assert widest == max(dim for size, dim in kernel._ATTENTION if size == itemsize)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(512, 512), (320, 96), (64, 400)])
def test_wide_heads(head_dim, value_dim):
    check(wide(head_dim, value_dim))


def test_heads_too_wide_take_the_reference_by_default(no_launch, monkeypatch):
    monkeypatch.setattr(ops.registry, "implementation", lambda op, device: ("triton", "as on a GPU"))
    case = wide(576, 512)
    assert torch.equal(case.run(None), case.run("reference"))
    with pytest.raises(Launched):
        wide(192, 128).run(None)
    with pytest.raises(ValueError, match="impl must be None"):
        case.run("pallas")


def test_by_hand():
    """Prefix slot 1 (slot 0 is padding), a root and its two children. The keys are 0, so all visible values have equal
    weights."""
    tree = DraftTree.from_topology(Topology.from_widths([2]), torch.zeros(1, 3, dtype=torch.int64))
    packed = tree.pack(torch.tensor([1]), torch.tensor([2]))
    assert packed.tolist() == [[[0b001, 0, 1, 2], [0b011, 1, 1, 2], [0b101, 1, 1, 2]]]
    value = torch.tensor([math.nan, 8.0, 4.0, 2.0, 1.0, math.nan]).view(1, 1, 6, 1).expand(-1, -1, -1, 16).contiguous()
    key = torch.zeros(1, 1, 6, 16)
    query = torch.ones(1, 1, 3, 16)
    case = Case(*(tensor.to(DEVICE) for tensor in (query, key, value, packed)))
    assert case.run()[0, :, 0, 0].tolist() == pytest.approx([12 / 2, 14 / 3, 13 / 3])
    # position 2, a child: it sees itself and its parent
    assert case.run(sliding_window=2)[0, :, 0, 0].tolist() == pytest.approx([12 / 2, 6 / 2, 5 / 2])
    # positions 0 1 | 2: the children are alone in their chunk
    assert case.run(chunk_size=2)[0, :, 0, 0].tolist() == pytest.approx([12 / 2, 2.0, 1.0])
    # a sink with logit 0 has the weight of a key but no value
    assert case.run(sinks=torch.zeros(1, device=DEVICE))[0, :, 0, 0].tolist() == pytest.approx([12 / 3, 14 / 4, 13 / 4])


def test_strides(small_splits, ordered_products):
    """No tensor is contiguous except in the last dimension."""
    case = make_case(2, 2, 1, rows=4, slots=100)
    views = []
    for tensor in (case.query, case.key, case.value):
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), math.nan, device=DEVICE)
        views.append(wide[..., 1 : 1 + tensor.shape[-1]].copy_(tensor))
    packed = torch.full((2, 4 + 2, case.packed.shape[2] + 1), -1, device=DEVICE)[:, 1:5, :-1]
    packed.copy_(case.packed)
    wanted = case.run()
    assert torch.equal(Case(*views, packed).run(), wanted)
    # a cache with heads before slots
    dense = [tensor.contiguous() for tensor in (case.query, case.key, case.value)]
    assert torch.equal(Case(*dense, packed).run(), wanted)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale_that_is_not_positive(scale):
    check(make_case(1, 2, 1, rows=3, slots=60), scale=scale)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 30, "sinks": True}], ids=str)
def test_rows_are_independent(small_splits, ordered_products, options):
    """With one plan, no bit of a row depends on other rows, nodes or sequences, or on the contents of unused slots."""
    options = with_sinks(options, 2)
    case = make_case(query_heads=2, kv_heads=1, rows=12, slots=190, lengths=[150, 40], starts=[7, 0])
    whole = case.run(**options)
    alone = Case(*(tensor[1:] for tensor in (case.query, case.key, case.value, case.packed)))
    assert torch.equal(alone.run(**options), whole[1:]), "depends on other sequences"
    last = Case(case.query[:, :, -3:], case.key, case.value, case.packed)
    assert torch.equal(last.run(**options), whole[:, -3:]), "depends on other rows"
    first = Case(case.query[:, :, :5], case.key, case.value, case.packed[:, :5])
    assert torch.equal(first.run(**options), whole[:, :5]), "depends on later nodes"
    for row, (start, length) in enumerate([(7, 150), (0, 40)]):
        for tensor in (case.key, case.value):
            tensor[row, :, :start] = tensor[row, :, length + 12 :] = 1e30
    assert torch.equal(case.run(**options), whole), "depends on unused slots"


@pytest.mark.parametrize("batches", [[3, 4], [2], [1]], ids=str)
def test_rows_are_equal_inside_a_batch_bucket(ordered_products, monkeypatch, batches):
    """With the default plans, whatever the other rows hold. Batches of 1, of 2, and of 3 and 4 have splits of different
    sizes."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 4)
    lengths, starts = [880, 100, 7, 300], [3, 0, 0, 9]
    whole = make_case(batch=4, query_heads=2, kv_heads=1, rows=2, slots=900, lengths=lengths, starts=starts)
    shape = 1, 2, 2, 2, 900, 64, 64, 4, False
    sizes = {batch: kernel.attention_plan(90, 4, batch, *shape)[1] for batch in (1, 2, 3, 4)}
    assert sizes[1] < sizes[2] < sizes[3] == sizes[4]
    wanted = None
    for batch in batches:
        for seed in (1, 2):
            tensors = [tensor[:batch].clone() for tensor in (whole.query, whole.key, whole.value, whole.packed)]
            if batch > 1:
                tensors[0][1:] *= seed
            first = Case(*tensors).run()[:1]
            wanted = first if wanted is None else wanted
            assert torch.equal(first, wanted)


@pytest.mark.parametrize("merged", [2, 16], ids=["in passes", "at once"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}, {"chunk_size": 160, "sinks": True}], ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_rows_are_independent_in_the_merge(small_splits, ordered_products, monkeypatch, group, options, merged):
    """No bit of a row depends on the number of rows or on the rows of the same program.

    The case is a chain at positions 155 to 167, with splits of 64 slots. With the window, the row at position 167
    begins at the third split (slot 128) and the others at the second. With chunks, rows from position 160 on begin at
    the third split and the others at the first.
    """
    monkeypatch.setattr(kernel, "MERGE_SPLITS", merged)
    options = with_sinks(options, group)
    case = make_case(1, group, 1, rows=13, slots=200, lengths=[162], starts=[7])
    parents = torch.arange(-1, 12, dtype=torch.int32)[None]
    tree = DraftTree.from_parents(torch.zeros(1, 13, dtype=torch.int64), parents)
    packed = tree.pack(torch.tensor([7]), torch.tensor([162])).to(DEVICE)
    whole = Case(case.query, case.key, case.value, packed).run(**options)
    for count in (1, 3, 6):
        last = Case(case.query[:, :, -count:], case.key, case.value, packed)
        assert torch.equal(last.run(**options), whole[:, -count:])
        first = Case(case.query[:, :, :count], case.key, case.value, packed[:, :count])
        assert torch.equal(first.run(**options), whole[:, :count])


# slots 3 to 69 are the prefix, 70 to 75 the tree; the finite number overflows in the product
PLACES = [(71, math.nan), (72, math.inf), (73, math.nan), (74, -math.inf), (75, 3e38), (2, math.nan), (36, math.nan)]
PLACES += [(38, math.nan), (69, math.nan), (76, math.inf)]


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 34, "softcap": 2.0, "sinks": True}, {"chunk_size": 68}], ids=str
)
@pytest.mark.parametrize("splits", ["one split", pytest.param("several splits", marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_hidden_slots_do_not_affect_a_row(request, impl, splits, options):
    """One slot of each sequence, or one query, is not finite. Rows that do not see it have the results that they have
    if it is finite."""
    if splits != "one split":
        request.getfixturevalue("small_splits")
    places = [("key", *place) for place in PLACES] + [("value", *place) for place in PLACES] + [("query", 4, math.nan)]
    batch, parents = len(places), torch.tensor([-1, 0, 0, 1, 1, 3], dtype=torch.int32)
    tree = DraftTree.from_parents(torch.zeros(batch, 6, dtype=torch.int64), parents.expand(batch, -1))
    packed = tree.pack(torch.full((batch,), 3), torch.full((batch,), 70)).to(DEVICE)
    random = torch.Generator().manual_seed(5)
    made = [torch.randn(batch, *shape, generator=random) for shape in ((2, 6, 16), (1, 80, 16), (1, 80, 16))]
    case = Case(*(tensor.to(DEVICE) for tensor in made), packed)
    options = with_sinks(options, 2)
    wanted = case.run(impl, **options)
    visible = visible_slots(packed, 6, 80, options.get("sliding_window"), options.get("chunk_size"))
    sees = torch.stack([visible[row, :, slot] for row, (_, slot, _) in enumerate(places)])
    sees[-1] = torch.arange(6, device=DEVICE) == 4
    assert 20 < int(sees.sum()) < 100
    for row, (name, slot, value) in enumerate(places):
        getattr(case, name)[row, 0, slot, 1:3] = value
    got = case.run(impl, **options)
    torch.testing.assert_close(got[~sees], wanted[~sees], rtol=0, atol=1e-6)
    is_nan = torch.tensor([value != value for _, _, value in places], device=DEVICE)
    assert got[sees & is_nan[:, None]].isnan().any(-1).any(-1).all(), "a row that sees a NaN must say so"


def test_more_capacity_changes_nothing(small_splits, ordered_products):
    case = make_case(1, 2, 1, rows=6, slots=300, lengths=[100], starts=[2])
    small = Case(case.query, case.key[:, :, :110], case.value[:, :, :110], case.packed)
    assert torch.equal(small.run(), case.run())


def test_lengths_are_read_on_the_device(small_splits):
    """The same launch arguments work for every length, which a captured graph needs."""
    case = make_case(1, 2, 1, rows=4, slots=200, lengths=[196], starts=[0])
    for start, length in ((0, 0), (10, 37), (64, 128), (0, 196)):
        case.packed[..., -2], case.packed[..., -1] = start, length
        check(case)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_tree(data):
    def integers(low, high):
        return data.draw(st.integers(low, high))

    kv_heads, group, nodes = integers(1, 2), integers(1, 5), integers(1, 70)
    rows = integers(1, nodes)
    length = integers(0, 150)
    start = integers(0, length)
    options = {
        "sliding_window": data.draw(st.none() | st.integers(1, 100)),
        "chunk_size": data.draw(st.none() | st.integers(1, 100)),
        "softcap": data.draw(st.none() | st.floats(0.5, 50)),
        "sinks": data.draw(st.sampled_from([None, True])),
    }
    slots = length + nodes + integers(0, 40)
    seed = integers(0, 1000)
    heads = kv_heads * group, kv_heads
    case = make_case(1, *heads, rows, slots, 16, 32, nodes, lengths=[length], starts=[start], seed=seed)
    check(case, **with_sinks(options, kv_heads * group))
