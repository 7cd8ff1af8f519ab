"""The append kernel against its reference, exactly; on a CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import append_by_hand
from specdec_triton import ops
from specdec_triton.kernels import append_tokens as kernel
from specdec_triton.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_PLACE = ("text", "length", "position", "budget")
UNUSED = 2**62 + 1  # in columns after the text

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def numbers(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def case(batch, nodes, depth, seed=0, eos=2, flags=True, parents_dtype=torch.int32):
    """Random arguments by name. About a fifth of the rows are finished, and a live row's budget may be used up."""
    random = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    columns = 30 + 2 * nodes
    length, left = integers(0, 20, batch), integers(0, 4, batch)
    finished = torch.rand(batch, generator=random) < 0.2
    accepted = torch.where(finished, 0, integers(0, depth + 1, batch))
    place = torch.arange(depth)
    path = torch.stack([1 + torch.randperm(nodes - 1, generator=random)[:depth].sort().values for _ in range(batch)])
    parents = torch.where(torch.rand(batch, nodes, generator=random) < 0.3, -1, torch.arange(-1, nodes - 1))
    text = torch.where(torch.arange(columns) <= length[:, None], integers(0, 99, batch, columns), UNUSED)
    arguments = {
        "text": text,
        "length": length,
        "position": length - integers(0, 3, batch),
        "budget": torch.where(finished, 0, accepted + 1 + left),
        "tokens": integers(0, 9, batch, nodes),
        "parents": parents.to(parents_dtype),
        "path": torch.where(place < accepted[:, None], path.view(batch, depth), -1).int(),
        "accepted_length": accepted,
        "next_ids": torch.where(finished, -1, integers(0, 9, batch)),
        "has_nan": torch.rand(batch, generator=random) < 0.3,
        "eos_ids": None if eos is None else integers(0, 9, eos),
        "draft_nan": torch.rand(batch, generator=random) < 0.5 if flags else None,
    }
    return {name: value if value is None else value.to(DEVICE) for name, value in arguments.items()}


def check(arguments):
    """Assert that kernel and reference return the same report and leave the same tensors. Returns the report."""
    results = []
    for append in (kernel.append_tokens, reference.append_tokens):
        own = {name: arguments[name].clone() for name in IN_PLACE}
        results.append((append(**arguments | own), *own.values()))
    for name, got, want in zip(("report", *IN_PLACE), *results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert got.is_contiguous()
    return results[0][0]


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_hand_worked(impl):
    text = numbers([5, 6, 7, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 2, 0], [5, 6, 0, 0, 0, 0, 0])
    length, position, budget = numbers(2, 0, 5, 1), numbers(2, 0, 4, 0), numbers(4, 5, 0, 1)
    tokens = numbers([7, 10, 11, 12], [5, 20, 21, 22], [2, 30, 31, 32], [6, 40, 41, 42])
    parents = numbers([-1, 0, 0, 2], [-1, 0, -1, -1], [-1, 0, 1, 2], [-1, -1, -1, -1], dtype=torch.int32)
    accepted = ops.Acceptance(
        path=numbers([2, 3], [1, -1], [-1, -1], [-1, -1], dtype=torch.int32),
        length=numbers(2, 1, 0, 0),
        next_ids=numbers(13, 2, -1, 43),
        has_nan=numbers(0, 1, 0, 0, dtype=torch.bool),
    )
    flags = numbers(1, 0, 1, 0, dtype=torch.bool)
    report = ops.append_tokens(
        text, length, position, budget, tokens, parents, accepted, eos_ids=numbers(3, 2), draft_nan=flags, impl=impl
    )
    assert text.tolist() == [
        [5, 6, 7, 11, 12, 13, 0],
        [5, 20, 2, 0, 0, 0, 0],  # the target's token ends the text
        [5, 6, 7, 8, 9, 2, 0],  # was finished before
        [5, 6, 43, 0, 0, 0, 0],  # the last token that the budget permits
    ]
    assert (length.tolist(), position.tolist(), budget.tolist()) == ([5, 2, 5, 2], [5, 2, 4, 1], [1, 0, 0, 0])
    assert report.tolist() == [
        # emitted tokens, path, their number, draft tokens, budget, flags
        [11, 12, 13, 2, 3, 3, 3, 1, 0, 1],
        [20, 2, 2, 1, -1, 2, 1, 0, 1, 0],
        [-1, -1, -1, -1, -1, 0, 0, 0, 0, 0],
        [43, 43, 43, -1, -1, 1, 0, 0, 0, 0],
    ]
    assert report.dtype == torch.int64


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("eos", [None, 0, 1, 3])
def test_end_of_text_lists_and_flags(eos, flags):
    check(case(12, 6, 3, seed=eos or 7, eos=eos, flags=flags))


@pytest.mark.parametrize(
    ("batch", "nodes", "depth"),
    [(1, 1, 0), (5, 1, 0), (3, 2, 1), (3, 4, 0), (4, 16, 15), (4, 17, 16), (2, 65, 3), (2, 130, 129)],
)
def test_sizes(batch, nodes, depth):
    for seed in range(3):
        report = check(case(batch, nodes, depth, seed))
        assert report.shape == (batch, 2 * depth + 6)


def test_parents_may_be_int64():
    arguments = case(6, 9, 4, seed=1)
    wide = arguments | {"parents": arguments["parents"].long()}
    assert torch.equal(check(arguments), check(wide))


def test_strides():
    arguments = case(4, 7, 3, seed=2)
    strided = {}
    for name, value in arguments.items():
        if name in IN_PLACE:
            strided[name] = value
        elif name == "parents":  # as of a tree that is equal in all rows
            strided[name] = value[1:2].expand(4, -1)
        else:
            wide = torch.full([2 * size + 1 for size in value.shape], 77, device=DEVICE).to(value.dtype)
            strided[name] = wide[tuple(slice(1, 2 * size, 2) for size in value.shape)].copy_(value)
    assert not any(value.is_contiguous() for name, value in strided.items() if name not in IN_PLACE)
    check(strided)


@pytest.mark.parametrize("append", [kernel.append_tokens, reference.append_tokens])
def test_a_text_that_is_a_part_of_a_buffer(append):
    arguments = case(5, 6, 3, seed=3)
    whole, own = ({name: value.clone() for name, value in arguments.items()} for _ in range(2))
    buffer = torch.full((7, whole["text"].shape[1] + 9), -5, device=DEVICE)
    part = own["text"] = buffer[1:6, 4:-5].copy_(arguments["text"])
    assert torch.equal(append(**own), append(**whole))
    assert torch.equal(part, whole["text"])
    part.fill_(-5)
    assert (buffer == -5).all()


def test_the_last_column_can_be_filled():
    arguments = case(1, 4, 3, seed=4)
    text = torch.arange(8, device=DEVICE)[None]
    path = numbers([1, 2, 3], dtype=torch.int32)
    full = {"text": text, "length": numbers(3), "budget": numbers(4), "next_ids": numbers(70)}
    full |= {"path": path, "accepted_length": numbers(3)}
    check(arguments | full)
    kernel.append_tokens(**arguments | full)
    assert text[0, 4:].tolist() == [*arguments["tokens"][0, 1:].tolist(), 70]
    assert (full["length"].tolist(), full["budget"].tolist()) == ([7], [0])


def test_other_columns_and_finished_rows_do_not_change():
    arguments = case(40, 9, 6, seed=5)
    own = {name: value.clone() for name, value in arguments.items()}
    report = kernel.append_tokens(**own)
    count = report[:, -5]
    columns = torch.arange(own["text"].shape[1], device=DEVICE)
    first = arguments["length"][:, None] + 1
    written = (columns >= first) & (columns < first + count[:, None])
    assert torch.equal(own["text"][~written], arguments["text"][~written])
    assert not (own["text"][written] == UNUSED).any()
    finished = arguments["budget"] == 0
    assert 4 < finished.sum() < 20 and (count[finished] == 0).all() and (count[~finished] > 0).all()
    for name in IN_PLACE:
        assert torch.equal(own[name][finished], arguments[name][finished]), name
    for name in arguments.keys() - set(IN_PLACE):
        assert torch.equal(own[name], arguments[name]), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_property(data):
    batch, nodes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    depth = data.draw(st.integers(0, nodes - 1))
    eos, flags = data.draw(st.sampled_from([None, 0, 1, 4])), data.draw(st.booleans())
    arguments = case(batch, nodes, depth, data.draw(st.integers(0, 999)), eos, flags)
    want = append_by_hand(**{name: value if value is None else value.tolist() for name, value in arguments.items()})
    for append in (kernel.append_tokens, reference.append_tokens):
        own = {name: value if value is None else value.clone() for name, value in arguments.items()}
        got = append(**own), *(own[name] for name in IN_PLACE)
        assert tuple(each.tolist() for each in got) == want


SIZES = [(1, 1, 0), (1, 6, 5), (3, 17, 16), (64, 64, 8), (64, 8, 7), (16, 128, 127), (2, 512, 300)]


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize(("batch", "nodes", "depth"), SIZES)
def test_no_race_in_many_trials(batch, nodes, depth):
    for seed in range(20):
        check(case(batch, nodes, depth, seed))


def test_the_race_test_stays_within_the_text():
    """An index out of bounds would make all later tests of the process fail on a GPU."""
    for sizes in SIZES:
        for seed in range(3):
            arguments = case(*sizes, seed)
            last = arguments["length"] + arguments["budget"]
            assert last.max() < arguments["text"].shape[1]


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    given = case(4, 9, 5, seed=0)
    own = {name: value.clone() for name, value in given.items()}
    kernel.append_tokens(**own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            report = torch.ops.specdec_triton.append_tokens(*own.values())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        given = case(4, 9, 5, seed)
        for name, value in given.items():
            own[name].copy_(value)
        graph.replay()
        assert torch.equal(report, reference.append_tokens(**given))
        for name in IN_PLACE:
            assert torch.equal(own[name], given[name]), name
