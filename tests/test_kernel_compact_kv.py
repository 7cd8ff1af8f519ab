"""The KV compaction kernel against its reference, bit for bit; on a CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_triton import ops
from specdec_triton.kernels import compact_kv as kernel
from specdec_triton.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"


@pytest.fixture(params=["in order", "reversed"])
def program_order(request, monkeypatch):
    """Run the programs in forward or backward order, because a GPU may run them in any order."""
    if request.param == "reversed":
        if not INTERPRETED:
            pytest.skip("the order of programs is the GPU's")
        from triton.runtime.interpreter import interpreter_builder as builder

        forwards = builder.set_grid_idx
        monkeypatch.setattr(
            builder,
            "set_grid_idx",
            lambda *index: forwards(*(size - 1 - place for size, place in zip(builder.grid_dim, index, strict=True))),
        )
    return request.param


def bits(tensor):
    return tensor.view(torch.uint8)


def random_storage(count, dtype, seed=0):
    """Random bits, including NaNs with payloads, infinities and denormals."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=random, dtype=torch.uint8, device=DEVICE)
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype)


def paths(*rows):
    """Paths as rows, padded with -1 to one more than the longest."""
    longest = max(map(len, rows)) + 1
    return torch.tensor([[*row] + [-1] * (longest - len(row)) for row in rows], dtype=torch.int32, device=DEVICE)


def check(storage, widths, base, path):
    """Assert that kernel and reference leave the same bits everywhere. Returns the storage afterwards."""
    got, want = storage.clone(), storage.clone()
    kernel.compact_kv(got, widths, base, path)
    reference.compact_kv(want, widths, base, path)
    assert torch.equal(bits(got), bits(want))
    return got


def bases(*values):
    return torch.tensor(values, device=DEVICE)


def test_hand_worked():
    # two planes, two sequences of 6 slots; plane 0 has 2 elements per slot, plane 1 has 1
    storage = torch.tensor(
        [
            [10, 11], [20, 21], [30, 31], [40, 41], [50, 51], [60, 61],
            [110, 111], [120, 121], [130, 131], [140, 141], [150, 151], [160, 161],
        ], dtype=torch.int16, device=DEVICE,
    ).flatten()  # fmt: skip
    storage = torch.cat([storage, storage[::2] + 5])
    # sequence 0: the root is in slot 1, nodes 2 and 4 (slots 3 and 5) move to slots 2 and 3; sequence 1: the root is in
    # slot 0, node 3
    ops.compact_kv(storage, [2, 1], bases(1, 0), paths([2, 4], [3]), impl="triton")
    assert storage.tolist() == [
        10, 11, 20, 21, 40, 41, 60, 61, 50, 51, 60, 61,
        110, 111, 140, 141, 130, 131, 140, 141, 150, 151, 160, 161,
        15, 25, 45, 65, 55, 65,
        115, 145, 135, 145, 155, 165,
    ]  # fmt: skip


# paths in which sources and targets overlap in all ways that a wrong order would corrupt
OVERLAPPING = {
    "shift by one": [range(2, 34)],
    "shift by two": [range(3, 31)],
    "every other": [range(2, 50, 2)],
    "in place": [range(1, 20)],
    "in place, then spread": [[1, 2, 3, 4, 9, 10, 11, 12, 13, 40]],
    "one": [[1]],
    "one, far": [[49]],
    "none": [[]],
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_overlapping_paths(kind, program_order):
    slots = 60
    storage = random_storage(slots * 11, torch.float16)
    for base in (0, 8):
        check(storage, [8, 3], bases(base), paths(*OVERLAPPING[kind]))


def test_sequences_have_their_own_paths_and_bases(program_order):
    widths, slots = [64, 16, 16, 24], 70
    storage = random_storage(4 * slots * sum(widths), torch.bfloat16)
    path = paths(range(2, 30), [], [5], [1, 3, 4, 17, 18, 19, 20, 21, 22, 40])
    check(storage, widths, bases(3, 0, 39, 2), path)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.float64, torch.bool],
    ids=str,
)
@pytest.mark.parametrize("widths", [[8, 8], [3], [1, 2, 5], [16, 4], [257, 255]], ids=str)
def test_dtypes_and_widths(dtype, widths):
    storage = random_storage(2 * 12 * sum(widths), dtype)
    check(storage, widths, bases(1, 0), paths([2, 3, 7], [4, 8]))


@pytest.mark.parametrize(
    ("widths", "itemsize", "alignment", "lane", "unit"),
    [
        ((1024, 1024), 2, 0, torch.int64, 2),
        ((1024, 1028), 2, 0, torch.int64, 1),
        ((1024, 2), 2, 0, torch.int32, 1),
        ((1024, 1023), 2, 0, torch.int16, 1),
        ((1024, 1023), 1, 0, torch.int8, 1),
        ((1024, 1024), 2, 8, torch.int64, 1),
        ((1024, 1024), 2, 2, torch.int16, 1),
    ],
)
def test_accesses_are_as_wide_as_they_may_be(widths, itemsize, alignment, lane, unit):
    planes, dtype, lanes, blocks = kernel._layout(widths, itemsize, alignment, 2, 3, torch.device(DEVICE))
    assert (dtype, lanes) == (lane, unit)
    size = dtype.itemsize * lanes // itemsize if dtype.itemsize * lanes >= itemsize else 1
    assert planes.tolist() == [[0, widths[0] // size], [6 * widths[0] // size, widths[1] // size]]
    assert blocks * kernel.BLOCK_C * dtype.itemsize >= max(widths) * itemsize


@pytest.mark.parametrize("offset", range(9))
def test_a_storage_that_begins_anywhere(offset):
    whole = random_storage(16 + 2 * 10 * 24, torch.float16)
    before, widths = whole.clone(), [16, 8]
    storage = whole[offset : offset + 2 * 10 * 24]
    want = storage.clone()
    path = paths([2, 5], [3])
    kernel.compact_kv(storage, widths, bases(0, 1), path)
    reference.compact_kv(want, widths, bases(0, 1), path)
    assert torch.equal(bits(storage), bits(want))
    assert torch.equal(bits(whole[:offset]), bits(before[:offset]))
    assert torch.equal(bits(whole[offset + 480 :]), bits(before[offset + 480 :]))


def test_nothing_but_the_targets_changes():
    widths, batch, slots = [24, 40], 2, 20
    storage = torch.full((batch * slots * 64,), float("nan"), device=DEVICE)
    planes = [
        plane.view(batch, slots, width)
        for plane, width in zip(storage.split([batch * slots * width for width in widths]), widths, strict=True)
    ]
    base, nodes = [4, 1], [[2, 5, 6], [7]]
    for plane in planes:
        for row in range(batch):
            plane[row, base[row] : base[row] + 10] = torch.randn(10, plane.shape[2], device=DEVICE)
    before = storage.clone()
    ops.compact_kv(storage, widths, bases(*base), paths(*nodes), impl="triton")
    changed = (bits(storage) != bits(before)).view(-1, 4).any(1)
    moved = torch.zeros_like(storage, dtype=torch.bool)
    places = moved.split([batch * slots * width for width in widths])
    for place, plane, width in zip(places, planes, widths, strict=True):
        old = before[plane.storage_offset() :][: plane.numel()].view_as(plane)
        for row in range(batch):
            for step, node in enumerate(nodes[row]):
                assert torch.equal(plane[row, base[row] + 1 + step], old[row, base[row] + node])
                place.view(batch, slots, width)[row, base[row] + 1 + step] = True
    assert not (changed & ~moved).any()
    assert not storage[moved].isnan().any()


def test_nothing_may_follow_the_end_of_a_path():
    path = torch.tensor([[2, -1, -1, -1, -1, -1, -1, -1, -1, -1]], dtype=torch.int32, device=DEVICE)
    storage = random_storage(12 * 16, torch.float16)
    after = check(storage, [16], bases(0), path)
    assert torch.equal(bits(after[:16]), bits(storage[:16])) and torch.equal(bits(after[32:]), bits(storage[32:]))


def test_strided_arguments():
    storage = random_storage(2 * 30 * 16, torch.float16)
    path = paths([2, 3, 9], [4])
    check(storage, [16], bases([3, 0], [5, 0]).t()[0], path.t().contiguous().t())
    check(storage, [16], bases(3)[:1].expand(2), path[:1].expand(2, -1))


def test_the_table_of_planes_is_copied_to_the_device_once():
    storage, path = random_storage(40 * 24, torch.float16), paths([2])
    kernel._layout.cache_clear()
    for _ in range(3):
        kernel.compact_kv(storage, [8, 16], bases(0), path)
    kernel.compact_kv(storage, (8, 16), bases(5), paths([2, 3, 4]))
    assert kernel._layout.cache_info().misses == 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_property(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int8]))
    batch = data.draw(st.integers(1, 3))
    widths = data.draw(st.lists(st.integers(1, 40) | st.sampled_from([64, 160]), min_size=1, max_size=3))
    rows = [sorted(data.draw(st.sets(st.integers(1, 25), max_size=20))) for _ in range(batch)]
    base = [data.draw(st.integers(0, 5)) for _ in range(batch)]
    slots = 31 + data.draw(st.integers(0, 3))
    storage = random_storage(batch * slots * sum(widths), dtype, seed=data.draw(st.integers(0, 99)))
    check(storage, widths, bases(*base), paths(*rows))


@pytest.mark.slow
@pytest.mark.parametrize("widths", [[1024] * 8, [1024, 512, 640, 576]], ids=str)
def test_real_sizes(widths, program_order):
    storage = random_storage(3 * 300 * sum(widths), torch.bfloat16)
    check(storage, widths, bases(0, 17, 40), paths(range(2, 258), range(1, 200, 3), [1, 2, 3, 60]))


MANY_PLANES = {
    "16 bytes": ([1024] * 64, torch.bfloat16),  # the layout of an 8B model; bytes per access
    "8 bytes": ([1028, 512, 644] * 8, torch.bfloat16),
    "4 bytes": ([1026, 512, 642] * 8, torch.bfloat16),
    "2 bytes": ([1023, 512, 640] * 8, torch.bfloat16),
    "1 byte": ([1023, 512, 640] * 8, torch.int8),
}


def many_planes(kind):
    """A function from a seed to storage of four sequences, and the other arguments of `check`."""
    widths, dtype = MANY_PLANES[kind]
    # the longest path and its padding end in the last slot of the sequence with the highest base
    path = paths(range(2, 258), range(3, 60), range(1, 120, 2), [1, 2, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49])
    return lambda seed: random_storage(4 * 300 * sum(widths), dtype, seed), widths, bases(0, 40, 9, 42), path


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("kind", MANY_PLANES)
def test_no_race_in_many_trials(kind):
    storage, *arguments = many_planes(kind)
    for trial in range(20):
        check(storage(trial), *arguments)


def test_the_race_test_keeps_its_slots_apart():
    """An index out of bounds would make all later tests of the process fail on a GPU."""
    for kind in MANY_PLANES:
        _, widths, base, path = many_planes(kind)
        assert int(base.max()) + path.shape[1] < 300
    small = random_storage(4 * 300 * 3, torch.int8)
    reference.compact_kv(small, [2, 1], base, path)


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_planes_beyond_32_bit_offsets():
    widths, slots = [1024] * 4, 600_000  # 2.5e9 elements
    storage = torch.zeros(slots * sum(widths), dtype=torch.int8, device=DEVICE)
    storage.view(4, slots, 1024)[:, -10:] = torch.arange(10, dtype=torch.int8, device=DEVICE)[:, None]
    ops.compact_kv(storage, widths, bases(slots - 10), paths([3, 7, 8]), impl="triton")
    assert storage.view(4, slots, 1024)[:, -10:, 17].tolist() == [[0, 3, 7, 8, 4, 5, 6, 7, 8, 9]] * 4


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_paths_and_the_host_reads_nothing():
    widths = [1024] * 8
    storage = random_storage(2 * 64 * sum(widths), torch.bfloat16)
    base, path = bases(0, 0), paths([2, 3], [])
    ops.compact_kv(storage, widths, base, path, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.compact_kv(storage, widths, base, path, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for trial, rows in enumerate(([[2, 5], [1]], [[7], [3, 9]])):
        want = storage.clone()
        base.copy_(bases(trial, 20))
        path.copy_(torch.nn.functional.pad(paths(*rows), (0, 1), value=-1)[:, :3])
        graph.replay()
        reference.compact_kv(want, widths, base, path)
        assert torch.equal(bits(storage), bits(want))
