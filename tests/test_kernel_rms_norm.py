"""The kernel of RMSNorm against its reference; on a CPU in Triton's interpreter."""

import itertools

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from first_gpu import marked, turns
from specdec_triton import ops
from specdec_triton.kernels import rms_norm as kernel
from specdec_triton.ops import layers_reference as reference
from specdec_triton.tools import inspection
from tensors import inside, ulps_apart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STYLES = {"cast_first": LlamaRMSNorm, "cast_last": Olmo2RMSNorm, "one_plus": GemmaRMSNorm}
# mode -> has a residual, a weight, an update_weight; and the multiplier, which neither bf16 nor fp16 can represent
MODES = {
    "norm": (False, True, False, 1.0),
    "residual": (True, True, False, 1.0),
    "granite": (True, True, False, 0.22),
    "sum": (True, False, False, 0.22),
    "update": (True, True, True, 1.0),
    "update granite": (True, True, True, 0.22),
    "update sum": (True, False, True, 1.0),
}
NAN, INF = float("nan"), float("inf")
# rows that are read in a loop: one that ends one column after a step, and one that ends with a step
LONG_ROWS = [kernel.MAX_BLOCK_C + 1, 2 * kernel.MAX_BLOCK_C]

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def most_ulps(dtype, style):
    """The bound of the contract. "cast_first" rounds before the product with the weight."""
    return 8 if dtype == torch.float32 else 2 if style == "cast_first" else 1


def plain(tensor):
    return tensor.to(DEVICE)


def case(batch, nodes, columns, dtype, mode="residual", style="cast_first", seed=0, eps=1e-6, layout=inside):
    """Random arguments by name. Values of a row have very different sizes."""
    random = torch.Generator().manual_seed(seed)
    has_residual, has_weight, has_update, multiplier = MODES[mode]

    def normal(*shape):
        values = torch.randn(shape, generator=random) * torch.randn(shape, generator=random).exp()
        return layout(values.to(dtype))

    return {
        "hidden": normal(batch, nodes, columns),
        "weight": normal(columns) if has_weight else None,
        "eps": eps,
        "style": style,
        "residual": normal(batch, nodes, columns) if has_residual else None,
        "multiplier": multiplier,
        "update_weight": normal(columns) if has_update else None,
    }


def copies(given):
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in given.items()}


def assert_equal(got, want, text=""):
    assert ulps_apart(got, want).count_nonzero() == 0, text


def check(given, most=None):
    """Assert that the sum is exact, that each norm is within the contract's bound, and that the inputs do not change.
    Returns normed and summed.

    A norm of the update is compared by a call whose residual is 0. The sum must then be that of this update.
    """
    before = copies(given)
    hidden, weight, eps, style, residual, multiplier, update_weight = given.values()
    most = most_ulps(hidden.dtype, style) if most is None else most
    normed, summed = kernel.rms_norm(**given)
    update = hidden
    if update_weight is not None:
        zero = residual.clone(memory_format=torch.preserve_format).zero_()
        zero = zero if residual.is_contiguous() else inside(zero)
        _, update = kernel.rms_norm(hidden, weight, eps, style, zero, 1.0, update_weight)
        want, _ = reference.rms_norm(hidden, update_weight, eps, style)
        assert ulps_apart(update, want).max() <= most
    if residual is None:
        assert summed.shape == (0,) and summed.dtype == hidden.dtype
        stream = hidden
    else:
        _, stream = reference.rms_norm(update, None, eps, style, residual, multiplier)
        assert_equal(summed, stream, "summed")
        assert summed.is_contiguous()
    if weight is None:
        assert normed.shape == (0,) and normed.dtype == hidden.dtype
    else:
        want, _ = reference.rms_norm(stream, weight, eps, style)
        assert ulps_apart(normed, want).max() <= most
        assert normed.is_contiguous()
    for name, value in before.items():
        if torch.is_tensor(value):
            assert_equal(given[name], value, name)
    return normed, summed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_hand_worked(impl, dtype):
    def tensor(*values):
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    hidden, residual = tensor([[0.25, 0.5], [-1.0, 0.5]]), tensor([[0.5, 6.0], [3.0, -5.5]])
    weight = tensor(10.0, -20.0)
    # squares of 1, 7 and of 1, -4.5 have the means 25 and 10.625
    for style in STYLES:
        normed, summed = ops.rms_norm(
            hidden, weight, eps=0.0, style=style, residual=residual, multiplier=2.0, impl=impl
        )
        assert summed.tolist() == [[[1.0, 7.0], [1.0, -4.5]]]
        want = [[2.0, -28.0], [10 / 10.625**0.5, 90 / 10.625**0.5]]
        if style == "one_plus":
            want = [[2.2, -26.6], [11 / 10.625**0.5, 85.5 / 10.625**0.5]]
        tolerance = 1e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(normed.float().cpu(), torch.tensor([want]), rtol=tolerance, atol=0)
    normed, summed = ops.rms_norm(residual, weight, eps=63.875, impl=impl)  # 18.125 + 63.875 = 82
    assert summed is residual
    torch.testing.assert_close(normed[0, 0].float().cpu(), torch.tensor([5.0, -120.0]) / 82**0.5, rtol=8e-3, atol=0)
    # the update's own norm is 0.2, 1.4 times 5, 10
    normed, summed = ops.rms_norm(
        tensor([[1.0, 7.0]]), None, eps=0.0, residual=tensor([[4.0, 4.0]]), update_weight=tensor(5.0, 10.0), impl=impl
    )
    assert normed is None
    torch.testing.assert_close(summed.float().cpu(), torch.tensor([[[5.0, 18.0]]]), rtol=8e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode, dtype):
    for seed, style in enumerate(STYLES):
        check(case(2, 3, 61, dtype, mode, style, seed))


@pytest.mark.parametrize("columns", [1, 2, 16, 255, 256, 257, 576, 1025])
def test_sizes(columns):
    for (seed, mode), dtype in zip(enumerate(("norm", "update granite", "granite")), DTYPES, strict=True):
        style = [*STYLES][(columns + seed) % 3]
        check(case(1, 2, columns, dtype, mode, style, seed))


@pytest.mark.parametrize("columns", LONG_ROWS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_that_are_read_in_a_loop(mode, columns):
    place = [*MODES].index(mode)
    check(case(1, 2, columns, DTYPES[place % 3], mode, [*STYLES][(place + columns) % 3], seed=place))


def test_the_bound_is_reached_by_chance_only():
    """A norm differs from the reference only if the fp32 value is next to a tie, which is rare in 16 bits."""
    given = case(1, 1, 4096, torch.bfloat16, "norm", "cast_last")
    normed, _ = kernel.rms_norm(**given)
    want, _ = reference.rms_norm(**given)
    assert (ulps_apart(normed, want) > 0).float().mean() < 0.002


@pytest.mark.parametrize("mode", ["granite", "update"])
def test_rows_are_read_in_place_or_copied(mode):
    """The layouts that callers have: a part of a joint product, one row for all, transposed, every second element."""
    given = case(3, 4, 48, torch.float16, mode, "cast_last", layout=plain)
    want = check(given)
    layouts = {
        "joint": lambda tensor: torch.cat((tensor * NAN, tensor), -1)[..., tensor.shape[-1] :],
        "columns first": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "nodes first": lambda tensor: (
            tensor if tensor.dim() == 1 else tensor.transpose(0, 1).contiguous().transpose(0, 1)
        ),
        "every second": lambda tensor: torch.stack((tensor, tensor * NAN), -1)[..., 0],
    }
    for name, layout in layouts.items():
        laid_out = {key: layout(value) for key, value in given.items() if torch.is_tensor(value)}
        assert not laid_out["hidden"].is_contiguous()
        for changes in (laid_out, {"hidden": laid_out["hidden"]}, {"residual": laid_out["residual"]}):
            for got, wanted in zip(kernel.rms_norm(**given | changes), want, strict=True):
                assert_equal(got, wanted, name)
                assert got.is_contiguous()
    same = given | {name: given[name][1:2, 2:3].expand(3, 4, -1) for name in ("hidden", "residual")}
    for got, wanted in zip(check(same), want, strict=True):
        assert_equal(got, wanted[1:2, 2:3].expand(3, 4, -1).contiguous())


def test_a_row_does_not_depend_on_other_rows():
    given = case(3, 4, 96, torch.bfloat16, "update", "one_plus", layout=plain)
    want = kernel.rms_norm(**given)
    for row, node in ((0, 0), (1, 3), (2, 1)):
        own = copies(given)
        for name in ("hidden", "residual"):
            own[name] = own[name].fill_(NAN)
            own[name][row, node] = given[name][row, node]
        for batch, place in ((own, (row, node)), (dict(own), (0, 0))):
            if place == (0, 0):  # a batch of one sequence with one node
                batch |= {name: own[name][row : row + 1, node : node + 1] for name in ("hidden", "residual")}
            for got, wanted in zip(kernel.rms_norm(**batch), want, strict=True):
                assert_equal(got[place], wanted[row, node])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["norm", "granite", "update"])
@pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered")  # by the interpreter
def test_values_that_are_not_finite_or_not_normal(mode, dtype):
    given = case(1, 8, 40, dtype, mode, layout=plain)
    hidden, largest, smallest = given["hidden"][0], torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    hidden[0, 3] = NAN
    hidden[1, 5] = INF
    hidden[2, 7], hidden[2, 8] = -INF, INF
    hidden[3] = 0
    hidden[4, ::2] = largest  # the squares overflow in fp32 and bf16
    hidden[5] = 0.3 * smallest  # subnormal in every dtype
    if given["residual"] is not None:
        given["residual"][0, 3] = 0
        given["residual"][0, 4, ::3] = largest  # the sum overflows
        given["residual"][0, 5] = 0.4 * smallest
        given["residual"][0, 6, 9] = NAN
    normed, summed = check(given)
    assert normed[0, 0].isnan().all() and normed[0, 1].isnan().any()
    assert normed[0, 7].isfinite().all()
    if given["residual"] is None:
        assert (normed[0, 3] == 0).all()
        zero = given | {"hidden": torch.zeros_like(given["hidden"]), "eps": 0.0}  # the inverse of 0 is infinite
        assert check(zero)[0].isnan().all()
    else:
        assert (summed[0, 6].isnan().sum(), normed[0, 6].isnan().sum()) == (1, 40)


def test_nothing_is_written_after_the_outputs(monkeypatch):
    allocated, new_empty = [], torch.Tensor.new_empty

    def with_guard(tensor, shape, **options):
        if options or not isinstance(shape, torch.Size):  # not an output
            return new_empty(tensor, shape, **options)
        allocated.append(torch.full((shape.numel() + 99,), 7, dtype=tensor.dtype, device=tensor.device))
        return allocated[-1][: shape.numel()].view(shape)

    for columns, mode in ((61, "update"), (LONG_ROWS[0], "residual")):
        given = case(1, 1, columns, torch.float16, mode)
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "new_empty", with_guard)
            check(given)
    # normed and summed, and both once more for the norm of the update
    assert len(allocated) == 6 and all((each[-99:] == 7).all() for each in allocated)


def test_the_compiler_fuses_no_products_and_sums():
    """In fp32 this would skip the rounding of the product with the multiplier."""
    (row,) = inspection.compile_table(90, "rms_norm/fp32 c4096 sum$").values()
    tile = row["tile"]
    assert tile["fp32_flops"] == 32 * row["warps"] * tile["fp32_instructions"] > 0


# --- the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_the_reference_is_what_transformers_computes(style, dtype):
    given = case(2, 3, 40, dtype, "update granite", style, layout=plain)
    hidden, weight, eps, _, residual, multiplier, update_weight = given.values()
    norms = []
    for values in (update_weight, weight):
        norms.append(STYLES[style](40, eps=eps).to(dtype).to(DEVICE))
        norms[-1].weight.data = values
    with torch.no_grad():
        want = residual + norms[0](hidden) * multiplier
        assert_equal(reference.rms_norm(**given)[1], want)
        assert_equal(reference.rms_norm(**given)[0], norms[1](want))
        assert_equal(reference.rms_norm(hidden, weight, eps, style)[0], norms[1](hidden))


# --- arguments


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": zeros(2, 8)}, r"hidden must be fp32, bf16 or fp16 \[B, N, C\], none of them 0, got .*\[2, 8\]"),
        ({"hidden": zeros(2, 0, 8)}, r"hidden must be .* none of them 0, got .*\[2, 0, 8\]"),
        ({"hidden": zeros(2, 3, 8, dtype=torch.float64)}, "hidden must be fp32, bf16 or fp16 .* got torch.float64"),
        ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
        ({"weight": zeros(7)}, r"weight must be torch.float32 \[8\], got torch.float32 \[7\]"),
        ({"weight": zeros(8).half()}, r"weight must be torch.float32 \[8\], got torch.float16 \[8\]"),
        ({"weight": zeros(8, device="meta")}, "weight must be on cpu, got torch.float32 .* on meta"),
        ({"weight": None, "residual": None}, "residual must be given without a weight, .* got None"),
        ({"residual": None}, "residual must be given .* with an update_weight .* got None"),
        ({"residual": None, "update_weight": None, "multiplier": 2.0}, "residual .* with a multiplier, got None"),
        ({"residual": zeros(2, 4, 8)}, r"residual must be torch.float32 \[2, 3, 8\], got .*\[2, 4, 8\]"),
        ({"residual": zeros(2, 3, 8).bfloat16()}, "residual must be torch.float32 .* got torch.bfloat16"),
        ({"update_weight": zeros(8, 1)}, r"update_weight must be torch.float32 \[8\], got .*\[8, 1\]"),
        ({"eps": None}, "eps must be a finite number, got NoneType"),
        ({"eps": NAN}, "eps must be a finite number, got nan"),
        ({"multiplier": "2"}, "multiplier must be a finite number, got '2'"),
        ({"style": "llama"}, "style must be one of cast_first, cast_last, one_plus, got 'llama'"),
        ({"style": None}, "style must be a string, got NoneType"),
        ({"impl": "cuda"}, 'impl must be None, "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    arguments = {"hidden": zeros(2, 3, 8), "weight": zeros(8), "eps": 1e-6}
    arguments |= {"residual": zeros(2, 3, 8), "update_weight": zeros(8)}
    ops.rms_norm(**arguments)
    with pytest.raises(ValueError, match=f"^rms_norm: {message}"):
        ops.rms_norm(**arguments | changes)


# --- real sizes

# hidden sizes of SmolLM2 135M, Granite, Gemma 2, Llama 3, Qwen 3 32B, Llama 3 70B, Llama 3 405B, and awkward ones
COLUMNS = [576, 2048, 2304, 4096, 5120, 8192, 16384, 3000, 61]
ROWS = [(1, 1), (1, 64), (16, 8)]
CELLS = [
    (columns, ROWS[turn % 3], mode, [*STYLES][turn // 3 % 3], dtype)
    for turn, (columns, mode, dtype) in enumerate(itertools.product(COLUMNS, MODES, DTYPES))
]
CHOSEN = {*turns(COLUMNS, [*MODES], DTYPES), *((4096, "update granite", dtype) for dtype in DTYPES)}
FIRST = [cell for cell in CELLS if (cell[0], cell[2], cell[4]) in CHOSEN]


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "rows", "mode", "style", "dtype"), marked(CELLS, FIRST))
def test_on_gpu(columns, rows, mode, style, dtype):
    check(case(*rows, columns, dtype, mode, style, layout=plain))


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "rows", "mode", "style", "dtype"), FIRST)
def test_real_rows(columns, rows, mode, style, dtype):
    check(case(*rows, columns, dtype, mode, style, layout=plain))


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_rows_beyond_32_bit_offsets():
    batch, nodes, columns = 2, 1100, 1_000_000  # 2.2e9 elements
    hidden = torch.ones(batch, nodes, columns, dtype=torch.bfloat16, device=DEVICE)
    hidden[-1, -1] = 3
    weight = torch.full((columns,), 2, dtype=torch.bfloat16, device=DEVICE)
    normed, summed = ops.rms_norm(hidden, weight, eps=0.0, residual=hidden, impl="triton")
    assert (summed[0] == 2).all() and (summed[-1, -1] == 6).all()
    assert (normed == 2).all()


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    own = case(2, 5, 2304, torch.bfloat16, "update granite", "one_plus", layout=plain)
    ops.rms_norm(**own, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = ops.rms_norm(**own, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        for name, value in case(2, 5, 2304, torch.bfloat16, "update granite", "one_plus", seed, layout=plain).items():
            if torch.is_tensor(value):
                own[name].copy_(value)
        graph.replay()
        for one, other in zip(got, check(own), strict=True):
            assert_equal(one, other)
