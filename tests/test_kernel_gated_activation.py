"""The kernel of gated activations against its reference; on a CPU in Triton's interpreter."""

import itertools

import pytest
import torch

from first_gpu import marked, turns
from specdec_triton import ops
from specdec_triton.kernels import gated_activation as kernel
from specdec_triton.ops import layers_reference as reference
from tensors import inside, ulps_apart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
BLOCK = kernel.BLOCK_I
NAN, INF = float("nan"), float("inf")
# Largest difference from the reference, as in the contract. The product with `up` may double that of the activation.
ULPS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 8}
CANCELLATION = {"silu": 0.0, "gelu": 2.0**-21, "gelu_tanh": 2.0**-21}  # times |gate * up|

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]  # by the interpreter


def plain(tensor):
    return tensor.to(DEVICE)


def case(batch, nodes, columns, dtype, seed=0, layout=inside):
    """Random gate and up."""
    random = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, batch, nodes, columns, generator=random)
    return layout((3 * gate).to(dtype)), layout(up.to(dtype))


def assert_equal(got, want):
    assert ulps_apart(got, want).count_nonzero() == 0


def check(gate, up, activation, ulps=None):
    """Assert that the kernel's results are within the contract's bound of the reference's. Returns them."""
    before = gate.clone(), up.clone()
    got, want = kernel.gated_activation(gate, up, activation), reference.gated_activation(gate, up, activation)
    slack = (gate.double() * up.double()).abs() * CANCELLATION[activation]
    close = ulps_apart(got, want) <= (ULPS[gate.dtype] if ulps is None else ulps)
    close |= (got.double() - want.double()).abs() <= slack
    assert close.all(), f"{(~close).sum()} of {close.numel()}"
    assert got.is_contiguous()
    assert_equal(gate, before[0])
    assert_equal(up, before[1])
    return got


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    ("activation", "want"),
    [
        ("silu", [0.0, 1.4621172, -0.5378828, 15.999998, -4.5397869e-4]),
        ("gelu", [0.0, 1.6826895, -0.3173105, 16.0, 0.0]),
        ("gelu_tanh", [0.0, 1.6823840, -0.3176160, 16.0, 0.0]),
    ],
)
def test_hand_worked(activation, want, impl):
    gate, up = torch.tensor([[[0.0, 1.0, -1.0, 16.0, -10.0]], [[9.0, 2.0, 2.0, 1.0, 1.0]]], device=DEVICE)[:, None]
    got = ops.gated_activation(gate, up, activation=activation, impl=impl)
    torch.testing.assert_close(got.cpu(), torch.tensor([[want]]), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gate_of_16_bits(activation, dtype):
    """The activation alone is within one unit in the last place."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    if activation == "gelu":  # on a CPU, PyTorch's flushes subnormal numbers and overflows at half of the largest one
        info = torch.finfo(dtype)
        numbers = numbers[(numbers == 0) | (numbers.abs() >= 4 * info.smallest_normal) & (numbers.abs() < info.max / 4)]
    gate = plain(numbers[None, None])
    check(gate, torch.ones_like(gate), activation, ulps=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_gates_of_32_bits(activation):
    """Gates for which the exponential is large, overflows (at -88.72), or is the smallest."""
    lines = [(-6, 6), (-30, 30), (-89.5, -87), (-88.7230, -88.7226), (87, 89.5), (-1e-3, 1e-3)]
    gate = torch.stack([torch.linspace(first, last, 4001) for first, last in lines])[None]
    check(plain(gate), torch.ones_like(plain(gate)), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite(activation, dtype):
    largest = torch.finfo(dtype).max
    gates = [INF, -INF, NAN, 0.0, -0.0, largest / 8, -largest / 8, -88.0, -88.5, -100.0]
    pairs = torch.tensor(list(itertools.product(gates, [1.0, -2.0, 0.0, INF, -INF, NAN])), dtype=dtype, device=DEVICE)
    gate, up = pairs.t()[:, None, None]
    want = reference.gated_activation(gate, up, activation)
    # on a CPU, PyTorch's gelu(inf) is NaN
    want[gate == INF] = gate[gate == INF] * up[gate == INF]
    got = kernel.gated_activation(gate.contiguous(), up.contiguous(), activation)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    finite = got.isfinite()
    assert ulps_apart(got[finite], want[finite]).max() <= ULPS[dtype]
    assert torch.equal(got[~got.isnan()].signbit(), want[~got.isnan()].signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 61, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 300])
def test_sizes(columns, dtype):
    batch, nodes = (2, 3) if columns < BLOCK else (1, 2)
    check(*case(batch, nodes, columns, dtype, seed=columns), ACTIVATIONS[columns % 3])


def test_products_are_rounded_after_the_activation():
    """The result is the rounded activation times up, not the activation times up."""
    gate, up = case(1, 1, 4000, torch.bfloat16, layout=plain)
    got = check(gate, up, "silu")
    active = kernel.gated_activation(gate, torch.ones_like(up), "silu")
    assert_equal(got, active * up)
    once = (torch.nn.functional.silu(gate.float()) * up.float()).bfloat16()
    assert (ulps_apart(got, once) > 0).sum() > 400


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strides(dtype):
    gate, up = case(3, 4, 48, dtype, seed=1, layout=plain)
    want = check(gate, up, "silu")
    joint = torch.cat((gate, up), -1)
    layouts = {
        "halves of a joint product": joint.chunk(2, -1),
        "halves of some sequences": torch.cat((joint * NAN, joint))[3:].chunk(2, -1),
        "nodes first": [each.transpose(0, 1).contiguous().transpose(0, 1) for each in (gate, up)],
        "columns first": [each.transpose(0, 2).contiguous().transpose(0, 2) for each in (gate, up)],
        "every second": torch.stack((gate, up), -1).unbind(-1),
        "only one": (gate, torch.stack((up, up * NAN), -1)[..., 0]),
    }
    for name, tensors in layouts.items():
        assert not tensors[1].is_contiguous(), name
        assert_equal(check(*tensors, "silu"), want)
    one = check(gate[1:2, 2:3].expand(3, 4, -1), up, "gelu_tanh")
    assert_equal(one[1, 2], kernel.gated_activation(gate, up, "gelu_tanh")[1, 2])


def test_a_row_does_not_depend_on_other_rows():
    gate, up = case(3, 4, 96, torch.bfloat16, layout=plain)
    want = kernel.gated_activation(gate, up, "gelu")
    for row, node in ((0, 0), (1, 3), (2, 1)):
        own = [torch.full_like(each, NAN) for each in (gate, up)]
        for mine, each in zip(own, (gate, up), strict=True):
            mine[row, node] = each[row, node]
        assert_equal(kernel.gated_activation(*own, "gelu")[row, node], want[row, node])
        alone = [each[row : row + 1, node : node + 1] for each in (gate, up)]
        assert_equal(kernel.gated_activation(*alone, "gelu")[0, 0], want[row, node])


def test_nothing_is_written_after_the_output(monkeypatch):
    allocated, new_empty = [], torch.Tensor.new_empty

    def with_guard(tensor, shape, **options):
        if options or not isinstance(shape, torch.Size):  # not an output
            return new_empty(tensor, shape, **options)
        allocated.append(torch.full((shape.numel() + 99,), 7, dtype=tensor.dtype, device=tensor.device))
        return allocated[-1][: shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", with_guard)
    for columns in (61, BLOCK + 2):
        check(*case(1, 1, columns, torch.float16), "silu")
    assert len(allocated) == 2 and all((each[-99:] == 7).all() for each in allocated)


# --- arguments


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": zeros(2, 8)}, r"gate must be fp32, bf16 or fp16 \[B, N, I\], none of them 0, got .*\[2, 8\]"),
        ({"gate": zeros(2, 3, 0)}, r"gate must be .* none of them 0, got .*\[2, 3, 0\]"),
        ({"gate": zeros(2, 3, 8, dtype=torch.int64)}, "gate must be fp32, bf16 or fp16 .* got torch.int64"),
        ({"gate": None}, "gate must be a tensor, got NoneType"),
        ({"up": zeros(2, 3, 9)}, r"up must be torch.float32 \[2, 3, 8\], got torch.float32 \[2, 3, 9\]"),
        ({"up": zeros(2, 3, 8).half()}, r"up must be torch.float32 \[2, 3, 8\], got torch.float16"),
        ({"up": zeros(2, 3, 8, device="meta")}, "up must be on cpu, got torch.float32 .* on meta"),
        ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
        ({"activation": None}, "activation must be a string, got NoneType"),
        ({"impl": "cuda"}, 'impl must be None, "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    arguments = {"gate": zeros(2, 3, 8), "up": zeros(2, 3, 8)}
    ops.gated_activation(**arguments)
    with pytest.raises(ValueError, match=f"^gated_activation: {message}"):
        ops.gated_activation(**arguments | changes)


# --- real sizes

# intermediate sizes of SmolLM2 135M, Gemma 2 2B, Llama 3 8B, Qwen 3 32B, Llama 3 70B, and awkward ones
COLUMNS = [1536, 9216, 14336, 25600, 28672, 11008, 1001, 61]
ROWS = [(1, 1), (1, 64), (16, 8)]
CELLS = [
    (columns, ROWS[turn % 3], activation, dtype)
    for turn, (columns, activation, dtype) in enumerate(itertools.product(COLUMNS, ACTIVATIONS, DTYPES))
]
CHOSEN = {*itertools.product([14336], ACTIVATIONS, DTYPES), *turns([1536, 1001, 61], ACTIVATIONS, DTYPES)}
FIRST = [cell for cell in CELLS if (cell[0], *cell[2:]) in CHOSEN]


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "rows", "activation", "dtype"), marked(CELLS, FIRST))
def test_on_gpu(columns, rows, activation, dtype):
    gate, up = torch.cat(case(*rows, columns, dtype, layout=plain), -1).chunk(2, -1)
    check(gate, up, activation)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "dtype"), [*itertools.product(ACTIVATIONS, DTYPES)])
def test_real_rows(activation, dtype):
    check(*case(2, 3, 14336, dtype, layout=plain), activation)


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_rows_beyond_32_bit_offsets():
    batch, nodes, columns = 2, 160_000, 7000  # 2.2e9 elements; more nodes than a grid's second dimension has programs
    gate = torch.zeros(batch, nodes, columns, dtype=torch.bfloat16, device=DEVICE)
    gate[-1, -1] = 100
    out = ops.gated_activation(gate, gate, impl="triton")
    assert (out[-1, -1] == 10_000).all()
    out[-1, -1] = 0
    assert not out.any()


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    own = case(2, 5, 5000, torch.bfloat16, layout=plain)
    ops.gated_activation(*own, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = ops.gated_activation(*own, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        for tensor, new in zip(own, case(2, 5, 5000, torch.bfloat16, seed, layout=plain), strict=True):
            tensor.copy_(new)
        graph.replay()
        assert_equal(got, check(*own, "silu"))
