"""The kernel of tree inputs against its reference, exactly; on a CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import tree_inputs_by_hand
from specdec_triton import ops
from specdec_triton.kernels import tree_inputs as kernel
from specdec_triton.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def numbers(*values):
    return torch.tensor(values, device=DEVICE)


def case(batch, nodes, rows, planes=None, seed=0):
    """Random arguments by name, with words of all 64 bits and slots that do not fit in 32 bits. About half of the nodes
    are deeper than the last position."""
    random = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    start = integers(0, 9, batch) + 2**33
    arguments = {
        "depth": integers(0, 20, batch, nodes),
        "ancestors": integers(-(2**63), 2**63 - 1, batch, nodes, -(-nodes // 64)),
        "start": start,
        "base": start + integers(0, 2**33, batch),
        "last_position": None,
        "origin": start + integers(-9, 9, *([batch] if planes is None else [planes, batch])),
    }
    arguments["last_position"] = arguments["base"] + 10 - start
    return {name: value.to(DEVICE) for name, value in arguments.items()} | {"num_rows": rows}


def check(arguments):
    """Assert that kernel and reference return the same contiguous tensors. Returns them."""
    got, want = kernel.tree_inputs(**arguments), reference.tree_inputs(**arguments)
    for name, ours, theirs in zip(want._fields, got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert ours.is_contiguous() and ours.dtype == torch.int64
    return reference.TreeInputs(*got)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("planes", [False, True])
def test_hand_worked(impl, planes):
    origin = numbers([3, 0], [1, -4], [0, 0]) if planes else numbers(3, 0)
    inputs = ops.tree_inputs(
        depth=numbers([0, 1, 1, 2], [0, 1, 2, 3]),
        ancestors=numbers([[1], [3], [5], [11]], [[1], [3], [7], [15]]),
        start=numbers(3, 0),
        base=numbers(10, 20),
        last_position=numbers(9, 21),
        origin=origin,
        num_rows=3,
        impl=impl,
    )
    assert inputs.packed_tree.tolist() == [
        # ancestors, depth, start, base
        [[1, 0, 3, 10], [3, 1, 3, 10], [5, 1, 3, 10], [11, 2, 3, 10]],
        [[1, 0, 0, 20], [3, 1, 0, 20], [7, 2, 0, 20], [15, 3, 0, 20]],
    ]
    # columns 11, 11, 12 and 21, 21 (the last position), 21
    first = [[8, 8, 9], [21, 21, 21]]
    others = [[[10, 10, 11], [25, 25, 25]], [[11, 11, 12], [21, 21, 21]]]
    assert inputs.position_ids.tolist() == ([first, *others] if planes else first)
    assert inputs.slots.tolist() == [[11, 12, 13], [21, 22, 23]]


SIZES = [
    # batch, nodes, rows, planes
    (1, 1, 1, None),
    (3, 1, 1, 1),
    (3, 5, 2, 3),
    (2, 64, 64, None),  # fills a program
    (1, 65, 1, None),  # two words of ancestors
    (2, 65, 65, 3),
    (2, 52, 52, 9),  # more positions than elements of the packed tree
    (1, 200, 30, None),
    (1, 711, 70, 4),
]


@pytest.mark.parametrize(("batch", "nodes", "rows", "planes"), SIZES)
def test_sizes(batch, nodes, rows, planes):
    inputs = check(case(batch, nodes, rows, planes))
    assert inputs.packed_tree.shape == (batch, nodes, -(-nodes // 64) + 3)
    assert inputs.position_ids.shape == (batch, rows) if planes is None else (planes, batch, rows)


def sliced(tensor):
    """A view of every second element of a larger tensor; the other elements are invalid values."""
    wide = torch.full([2 * size + 1 for size in tensor.shape], -77, device=DEVICE)
    return wide[tuple(slice(1, 2 * size, 2) for size in tensor.shape)].copy_(tensor)


@pytest.mark.parametrize("planes", [None, 2])
@pytest.mark.parametrize(
    "arrange",
    [
        sliced,
        lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else sliced(tensor),
        # equal in all rows, as the tree of a topology and the last position of a call
        lambda tensor: tensor[..., :1].expand(tensor.shape) if tensor.dim() == 1 else tensor[:1].expand(tensor.shape),
    ],
    ids=["sliced", "transposed", "expanded"],
)
def test_strides(arrange, planes):
    arguments = case(3, 70, 9, planes, seed=2)
    for names in ([*arguments], *([name] for name in arguments)):  # all of them, and each alone
        strided = {
            name: arrange(value) if name in names and torch.is_tensor(value) else value
            for name, value in arguments.items()
        }
        check(strided)
    assert not any(arrange(value).is_contiguous() for value in arguments.values() if torch.is_tensor(value))


def test_the_inputs_do_not_change():
    arguments = case(2, 20, 7, 2, seed=3)
    before = {name: value.clone() for name, value in arguments.items() if torch.is_tensor(value)}
    kernel.tree_inputs(**arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_property(data):
    batch, nodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    rows, planes = data.draw(st.integers(1, nodes)), data.draw(st.sampled_from([None, 1, 3]))
    arguments = case(batch, nodes, rows, planes, data.draw(st.integers(0, 999)))
    lists = {name: value.tolist() if torch.is_tensor(value) else value for name, value in arguments.items()}
    want = tree_inputs_by_hand(**lists)
    for compute in (kernel.tree_inputs, reference.tree_inputs):
        assert tuple(each.tolist() for each in compute(**arguments)) == want


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize(("batch", "nodes", "rows"), [(1, 1, 1), (1, 60, 60), (64, 16, 16), (16, 128, 5), (3, 711, 70)])
def test_real_sizes_in_many_trials(batch, nodes, rows):
    for seed in range(10):
        for planes in (None, 3):
            check(case(batch, nodes, rows, planes, seed))


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    own = case(4, 9, 5, seed=0)
    kernel.tree_inputs(**own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            inputs = torch.ops.specdec_triton.tree_inputs(*own.values())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        given = case(4, 9, 5, seed=seed)
        for name, value in given.items():
            if torch.is_tensor(value):
                own[name].copy_(value)
        graph.replay()
        for got, want in zip(inputs, reference.tree_inputs(**given), strict=True):
            assert torch.equal(got, want)
