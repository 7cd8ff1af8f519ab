"""The greedy acceptance kernel against its reference, exactly; on a CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_triton import ops
from specdec_triton.kernels import accept_greedy as kernel
from specdec_triton.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW, MANY = kernel.BLOCK_V_FEW, kernel.BLOCK_V_MANY
NAN, INF = float("nan"), float("inf")
FIELDS = reference.Acceptance._fields

# `poisoned_outputs` makes PyTorch warn about nondeterministic operations, such as cumsum on CUDA
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]


def case(batch, nodes, vocab, dtype=torch.float32, seed=0, accepted=0.5, twins=0.2, padding=0.1, ties=False):
    """Random trees with a path that carries the target's tokens (a node joins it with probability `accepted`), equal
    siblings and padding.

    The logits are a window of a larger tensor that is +inf everywhere else, so that a read outside finds a maximum.
    """
    random = torch.Generator().manual_seed(seed)

    def chance():
        return float(torch.rand((), generator=random))

    surroundings = torch.full((batch, nodes + 1, vocab + 7), INF, dtype=dtype)
    logits = surroundings[:, 1:, 3 : vocab + 3]
    if ties:
        logits.copy_(torch.randint(-3, 3, (batch, nodes, vocab), generator=random))
    else:
        logits.copy_(torch.randn(batch, nodes, vocab, generator=random))
    targets = logits.max(-1).indices
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=random)
    for row in range(batch):
        last, real = 0, [0]
        for node in range(1, nodes):
            if chance() < accepted:
                parent = last
                last = node
                tokens[row, node] = targets[row, parent]
            else:
                parent = real[int(chance() * len(real))]
                if chance() < twins:
                    tokens[row, node] = targets[row, parent]
                if chance() < padding:
                    continue
            parents[row, node] = parent
            real.append(node)
    # keeps the tensor a window on a GPU, too
    return surroundings.to(DEVICE)[:, 1:, 3 : vocab + 3], tokens.to(DEVICE), parents.to(DEVICE)


def budgets(*values):
    return torch.tensor(values, device=DEVICE)


def check(logits, tokens, parents, max_depth=None, budget=None, eos_ids=None):
    """Assert that kernel and reference agree in every bit and dtype. For rows with NaN, only has_nan must agree."""
    batch, nodes, _ = logits.shape
    max_depth = nodes - 1 if max_depth is None else max_depth
    budget = torch.full((batch,), nodes, device=DEVICE) if budget is None else budget
    got = reference.Acceptance(*kernel.accept_greedy(logits, tokens, parents, max_depth, budget, eos_ids))
    want = reference.accept_greedy(logits, tokens, parents, max_depth, budget, eos_ids)
    torch.testing.assert_close(got.has_nan, want.has_nan, rtol=0, atol=0)
    for name in FIELDS:
        field, wanted = getattr(got, name), getattr(want, name)
        assert field.is_contiguous()
        torch.testing.assert_close(field[~want.has_nan], wanted[~want.has_nan], rtol=0, atol=0, msg=name)
    return got


def test_hand_worked():
    #        0:7                      the target says 3 after node 0
    #    1:3     2:3     3:5          nodes 1 and 2 are twins: the first is followed; the target says 4 after node 1
    #   4:6 5:4          6:4          node 5 is followed; the target says 1 after node 5, and no child carries it
    #       7:0
    parents = torch.tensor([[-1, 0, 0, 0, 1, 1, 3, 5]], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([[7, 3, 3, 5, 6, 4, 4, 0]], device=DEVICE)
    logits = torch.zeros(1, 8, 8, device=DEVICE)
    for node, target in enumerate([3, 4, 0, 4, 2, 1, 2, 2]):
        logits[0, node, target] = 1.0
    got = ops.accept_greedy(logits, tokens, parents, max_depth=3, budget=budgets(9), impl="triton")
    assert got.path.tolist() == [[1, 5, -1]]
    assert (got.length.tolist(), got.next_ids.tolist(), got.has_nan.tolist()) == ([2], [1], [False])
    assert [field.dtype for field in got] == [torch.int32, torch.int64, torch.int64, torch.bool]

    got = ops.accept_greedy(
        logits, tokens, parents, max_depth=3, budget=budgets(9), eos_ids=budgets(4), impl="triton"
    )  # the target's token is 4, which ends the text: it is the next token, and its draft is not accepted
    assert (got.path.tolist(), got.length.tolist(), got.next_ids.tolist()) == ([[1, -1, -1]], [1], [4])

    got = ops.accept_greedy(logits, tokens, parents, max_depth=3, budget=budgets(2), impl="triton")
    assert (got.path.tolist(), got.length.tolist(), got.next_ids.tolist()) == ([[1, -1, -1]], [1], [4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize(("batch", "nodes"), [(1, 1), (3, 2), (2, 17)])
def test_random_trees(batch, nodes, vocab, dtype):
    check(*case(batch, nodes, vocab, dtype, seed=vocab + nodes), eos_ids=budgets(0, vocab - 1))


@pytest.mark.parametrize("nodes", [63, 64, 65, 130])
def test_wide_trees(nodes):
    got = check(*case(1, nodes, 40, seed=nodes, accepted=0.8, twins=0.02))
    assert got.length.max() > 4


@pytest.mark.parametrize(
    ("batch", "nodes", "vocab"),
    [
        (1, 2, FEW - 1), (1, 2, FEW), (2, 2, FEW + 1), (1, 3, 3 * FEW + 17),
        (1, 17, MANY - 1), (1, 17, MANY), (1, 17, MANY + 1),
    ],
)  # fmt: skip
def test_vocabularies_of_several_blocks(batch, nodes, vocab):
    logits, tokens, parents = case(batch, nodes, vocab, torch.float16, seed=nodes)
    # equal maxima in different blocks, one of them at the last id; the lowest id is chosen
    logits[:, 0, [vocab - 1, vocab // 2]] = 50.0
    logits[:, 1, vocab - 1] = 50.0
    tokens[:, 1], parents[:, 1] = vocab // 2, 0
    got = check(logits, tokens, parents)
    assert (got.path[:, 0] == 1).all() and got.length.min() >= 1


def test_more_blocks_than_the_walk_holds_at_once():
    blocks = kernel._walk_blocks(1)["BLOCK_S"]
    logits = torch.zeros(1, 1, (blocks + 1) * FEW + 5, device=DEVICE)
    tokens, parents = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), budgets([-1]).int()
    logits[0, 0, [FEW + 3, logits.shape[2] - 1]] = torch.tensor([1.0, 2.0], device=DEVICE)
    assert check(logits, tokens, parents).next_ids.tolist() == [logits.shape[2] - 1]


def test_ties_go_to_the_lowest_id():
    check(*case(3, 9, 130, seed=1, ties=True))
    logits, tokens, parents = case(1, 1, 2 * FEW + 9, seed=2)
    logits.fill_(-0.0)
    logits[0, 0, FEW : 2 * FEW] = 0.0  # fill a whole block, so that its maximum is not -0.0
    assert check(logits, tokens, parents).next_ids.tolist() == [0]


@pytest.mark.parametrize("place", [1, FEW + 1, 2 * FEW + 1])
def test_blocks_of_negative_logits(place):
    logits, tokens, parents = case(1, 2, 2 * FEW + 9, seed=2)
    logits[:] = -1 - logits.abs()
    logits[0, :, [2, FEW + 2, 2 * FEW + 2]] = torch.tensor([-0.75, -0.875, -0.8125], device=DEVICE)
    logits[0, :, place] = -0.5
    assert check(logits, tokens, parents, max_depth=0).next_ids.tolist() == [place]


def test_infinities():
    logits, tokens, parents = case(2, 4, FEW + 1, seed=3)
    logits[:, 0] = -INF  # all logits are -inf: the lowest id is chosen, as in torch
    logits[:, 1, FEW] = INF
    logits[0, 2, :FEW] = -INF
    logits[1, 2] = torch.finfo(logits.dtype).min
    got = check(logits, tokens, parents, max_depth=0)
    assert got.next_ids.tolist() == [0, 0] and not got.has_nan.any()
    check(logits, tokens, parents)


@pytest.mark.parametrize("place", [0, 5, FEW - 1, FEW, FEW + 2])
@pytest.mark.parametrize("value", [NAN, -NAN])
def test_nan_is_flagged_for_its_row_alone(place, value):
    logits, tokens, parents = case(4, 5, FEW + 3, seed=4)
    parents[:, 1], parents[:, 2:] = 0, -1
    tokens[1, 1] = logits[1, 0].argmax()  # on the followed path
    logits[0, 0, place] = INF
    logits[0, 1, place] = value  # never reached, so no flag is set
    tokens[0, 1] = place + 1
    logits[1, 1, place] = value
    logits[2, 0, place] = value  # a row with budget 0 has no flag
    logits[3, 0, place] = value
    got = check(logits, tokens, parents, budget=budgets(9, 9, 0, 1))
    assert got.has_nan.tolist() == [False, True, False, True]


@pytest.mark.parametrize("fill", [1.0, INF, -INF, NAN])
def test_results_stay_in_range_beside_nan(fill):
    logits, tokens, parents = case(1, 2, FEW + 3, seed=5)
    logits[0, 0] = fill
    logits[0, 0, FEW + 1] = NAN
    got = check(logits, tokens, parents)
    assert got.has_nan.all() and 0 <= int(got.next_ids) < FEW + 3 and 0 <= int(got.length) <= 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 16])
def test_end_of_text_lists(count):
    logits, tokens, parents = case(4, 12, 24, seed=count, accepted=0.9)
    check(logits, tokens, parents, eos_ids=torch.arange(count, device=DEVICE))
    check(logits, tokens, parents, eos_ids=torch.arange(2 * count, device=DEVICE)[::2])


def test_budgets():
    batch = 7
    logits, tokens, parents = (
        column.expand(batch, *column.shape[1:]) for column in case(1, 17, 6, seed=8, accepted=1.0)
    )
    got = check(logits, tokens, parents, budget=budgets(-1, 0, 1, 2, 3, 5, 2**40))
    assert got.length.tolist()[:6] == [0, 0, 0, 1, 2, 4] and got.length[6] > 4
    assert got.next_ids[:2].tolist() == [-1, -1] and (got.path[:3] == -1).all()


@pytest.mark.parametrize("max_depth", [0, 1, 3, 16])
def test_no_deeper_than_max_depth(max_depth):
    logits, tokens, parents = case(2, 17, 3, seed=9, accepted=1.0)
    got = check(logits, tokens, parents, max_depth=max_depth)
    assert got.path.shape == (2, max_depth)


def test_padding_nodes_are_never_reached():
    logits = torch.zeros(1, 4, 3, device=DEVICE)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)  # every draft token is the target's choice
    parents = budgets([-1, -1, -1, 0]).int()
    assert check(logits, tokens, parents).path.tolist() == [[3, -1, -1]]


def test_a_tree_that_is_its_own_parent_does_not_loop():
    logits = torch.zeros(1, 3, 4, device=DEVICE)
    tokens = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    parents = budgets([0, 2, 1]).int()
    path, length, _, _ = kernel.accept_greedy(logits, tokens, parents, 2, budgets(9), None)
    assert length.tolist() == [2] and path.tolist() == [[0, 0]]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_strides(order):
    logits, tokens, parents = case(2, 6, 70, seed=10)
    back = [order.index(place) for place in range(3)]
    strided = logits.permute(order).contiguous().permute(back)
    assert torch.equal(strided, logits)
    check(strided, tokens, parents)
    check(logits.expand(2, 6, 70), tokens.t().contiguous().t(), parents.t().contiguous().t(), budget=budgets([4, 2])[0])
    check(logits[1:].expand(2, -1, -1), tokens[1:].expand(2, -1), parents[1:].expand(2, -1))


def test_a_row_does_not_depend_on_its_neighbours():
    # 21 nodes in total use long blocks; a single sequence uses short ones
    logits, tokens, parents = case(3, 7, 130, seed=11)
    whole = check(logits, tokens, parents)
    for row in range(3):
        alone = check(*(tensor[row : row + 1] for tensor in (logits, tokens, parents)))
        for name in FIELDS:
            torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[row], rtol=0, atol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_property(data):
    batch, nodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    vocab = data.draw(st.integers(1, 6))
    numbers = st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, INF, NAN]) if data.draw(st.booleans()) else st.integers(0, 2)
    flat = st.lists(numbers, min_size=batch * nodes * vocab, max_size=batch * nodes * vocab)
    logits = torch.tensor(data.draw(flat), dtype=torch.float32, device=DEVICE).view(batch, nodes, vocab)
    parents = [[-1] + [data.draw(st.integers(-1, node - 1)) for node in range(1, nodes)] for _ in range(batch)]
    tokens = [[data.draw(st.integers(0, vocab - 1)) for _ in range(nodes)] for _ in range(batch)]
    budget = [data.draw(st.integers(-1, nodes + 1)) for _ in range(batch)]
    eos_ids = data.draw(st.none() | st.lists(st.integers(0, vocab), max_size=4))
    check(
        logits,
        torch.tensor(tokens, device=DEVICE),
        torch.tensor(parents, dtype=torch.int32, device=DEVICE),
        data.draw(st.integers(0, nodes - 1)),
        torch.tensor(budget, device=DEVICE),
        None if eos_ids is None else torch.tensor(eos_ids, dtype=torch.int64, device=DEVICE),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "nodes", "vocab"), [(1, 256, 50257), (2, 33, 128256), (1, 1, 262144), (5, 300, 257)])
def test_real_sizes(batch, nodes, vocab, dtype):
    check(*case(batch, nodes, vocab, dtype, accepted=0.9), eos_ids=budgets(2, 7))


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "nodes", "vocab"), [(1, 256, 50257), (2, 8, 128256), (2, 33, 128256), (1, 1, 262144)]
)
def test_real_sizes_on_gpu(batch, nodes, vocab, dtype):
    check(*case(batch, nodes, vocab, dtype, accepted=0.9), eos_ids=budgets(2, 7))


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_rows_beyond_32_bit_offsets():
    logits = torch.zeros(70, 256, 128256, dtype=torch.bfloat16, device=DEVICE)  # 2.3e9 elements
    targets = torch.arange(70 * 256, device=DEVICE).view(70, 256) % 128256
    logits.scatter_(2, targets[..., None], 1.0)
    tokens = targets.roll(1, dims=1)  # a chain that is followed at every node
    parents = torch.arange(-1, 255, dtype=torch.int32, device=DEVICE).expand(70, -1)
    got = ops.accept_greedy(logits, tokens, parents, max_depth=255, impl="triton")
    assert (got.length == 255).all() and torch.equal(got.next_ids, targets[:, -1])


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    logits, tokens, parents = case(2, 33, 5000, torch.bfloat16, accepted=0.9)
    budget, eos_ids = budgets(40, 40), budgets(2)
    call = {"max_depth": 32, "budget": budget, "eos_ids": eos_ids}
    ops.accept_greedy(logits, tokens, parents, **call, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = ops.accept_greedy(logits, tokens, parents, **call, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        for tensor, new in zip((logits, tokens, parents), case(2, 33, 5000, torch.bfloat16, seed, 0.9), strict=True):
            tensor.copy_(new)
        budget.copy_(budgets(40, seed))
        graph.replay()
        want = ops.accept_greedy(logits, tokens, parents, **call, impl="reference")
        for name in FIELDS:
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0)
