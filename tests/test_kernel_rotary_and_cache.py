"""The kernel of rotary embedding and cache writes against its reference, bit for bit; on a CPU in Triton's interpreter.

The reference is compared with transformers' own modules.
"""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from first_gpu import marked, turns
from specdec_triton import ops
from specdec_triton.kernels import rotary_and_cache as kernel
from specdec_triton.tools import inspection
from tensors import INTEGERS, bits, ulps_apart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STYLES = {"cast_first": Qwen3RMSNorm, "cast_last": Olmo2RMSNorm, "one_plus": Gemma3RMSNorm}
NAN = float("nan")
# Most units in the last place by which the kernel's norm differs from the reference's. "cast_first" rounds before the
# product with the weight, which may turn one unit into two: in bf16, 1.9375 and 1.9375 * (1 + 2 ** -7) are two apart.
NORM_ULPS = {"cast_first": 2, "cast_last": 1, "one_plus": 1}
FP32_NORM_ULPS = 8  # up to 6 in 120,000 random rows of 64 to 256 dims, 8 if rsqrt has the largest error of a GPU's

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def buffer(dtype, batch, slots, kv_heads, dim, seed=0):
    """Plane [B, Hkv, S, D] in a larger buffer, [B, S + 2, Hkv, D], of NaNs with random payloads."""
    random = torch.Generator().manual_seed(seed)
    shape = batch, slots + 2, kv_heads, dim
    payloads = torch.randint(1, 100, shape, generator=random).to(INTEGERS[dtype.itemsize])
    whole = (payloads | torch.tensor(torch.inf, dtype=dtype).view(payloads.dtype)).view(dtype).to(DEVICE)
    assert whole.isnan().all()
    return whole[:, 1:-1].transpose(1, 2)


def case(
    dtype=torch.float32,
    batch=2,
    nodes=3,
    heads=3,
    kv_heads=2,
    dim=16,
    rotated=None,
    value_dim=None,
    *,
    angle_dtype=None,
    angle_batch=None,
    norms=(False, False),
    slots=9,
    seed=0,
    **options,
):
    """Random arguments by name. The states are slices of one product, with NaN between them."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(dtype).to(DEVICE)

    value_dim, rotated = value_dim or dim, rotated or dim
    widths = heads * dim, kv_heads * dim, kv_heads * value_dim
    gap = 16
    joint = torch.full((batch, nodes, sum(widths) + 4 * gap), NAN, dtype=dtype, device=DEVICE)
    states, first = [], gap
    for width, size in zip(widths, (dim, dim, value_dim), strict=True):
        states.append(joint[..., first : first + width].copy_(normal(batch, nodes, width)).unflatten(-1, (-1, size)))
        first += width + gap
    angles = torch.rand(2, angle_batch or batch, nodes, rotated, generator=random, dtype=torch.float64) * 2 - 1
    cos, sin = angles.to(angle_dtype or dtype).to(DEVICE)
    order = torch.stack([torch.randperm(slots, generator=random)[:nodes] for _ in range(batch)])
    weights = [normal(dim) * 0.3 + 1 if present else None for present in norms]
    planes = [buffer(dtype, batch, slots, kv_heads, size, seed) for size in (dim, value_dim)]
    names = "query", "key", "value", "cos", "sin", "keys", "values", "slots", "query_norm", "key_norm"
    given = dict(zip(names, (*states, cos, sin, *planes, order.to(DEVICE), *weights), strict=True))
    return given | ({"eps": 1e-6} if any(norms) else {}) | options


def run(arguments, impl):
    """The rotated query, and copies of the buffers that hold the keys and the values, changed by the op."""
    own = {}
    for name in ("keys", "values"):
        plane = arguments[name]
        whole = plane._base.clone()
        own[name] = whole.as_strided(plane.shape, plane.stride(), plane.storage_offset())
    rotated = ops.rotary_and_cache(**arguments | own, impl=impl)
    return rotated, own["keys"]._base, own["values"]._base


def assert_same(got, want):
    """The same bits, or NaN in both."""
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    different = (bits(got) != bits(want)) & ~(got.isnan() & want.isnan())
    assert not different.any(), f"{int(different.sum())} of {got.numel()} elements differ"


def assert_only_the_slots_changed(arguments, changed):
    for name, whole in zip(("keys", "values"), changed, strict=True):
        plane = arguments[name]
        written = torch.zeros(plane._base.shape, dtype=torch.bool, device=DEVICE)
        rows = torch.arange(len(plane), device=DEVICE)[:, None]
        written.as_strided(plane.shape, plane.stride(), plane.storage_offset())[rows, :, arguments["slots"]] = True
        assert torch.equal(bits(whole)[~written], bits(plane._base)[~written]), name
        assert written.any() and not written.all()


def check(arguments):
    """Assert that kernel and reference leave the same bits, and change no other slots. Returns the kernel's results."""
    got, want = (run(arguments, impl) for impl in ("triton", "reference"))
    for mine, theirs in zip(got, want, strict=True):
        assert_same(mine, theirs)
    assert_only_the_slots_changed(arguments, got[1:])
    assert got[0].is_contiguous()
    return got


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_hand_worked(impl):
    # node 0 is rotated by 90 degrees, in node 1 the first pair is rotated by 180 and the second doubled
    cos, sin = torch.tensor([[[0.0, 0, 0, 0], [-1, 2, -1, 2]], [[1.0, 1, 1, 1], [0, 0, 0, 0]]], device=DEVICE)[:, None]
    query = torch.tensor([[[[1.0, 2, 3, 4, 5]], [[6, 7, 8, 9, 10]]]], device=DEVICE)
    keys = torch.full((1, 1, 4, 5), -1.0, device=DEVICE)
    values = torch.full((1, 1, 4, 2), -1.0, device=DEVICE)
    value = torch.tensor([[[[70.0, 71]], [[80, 81]]]], device=DEVICE)
    slots = torch.tensor([[3, 1]], device=DEVICE)
    given = query, 10 * query, value, cos, sin, keys, values, slots
    assert ops.rotary_and_cache(*given, impl=impl).tolist() == [[[[-3, -4, 1, 2, 5]], [[-6, 14, -8, 18, 10]]]]
    assert keys.tolist() == [[[[-1] * 5, [-60, 140, -80, 180, 100], [-1] * 5, [-30, -40, 10, 20, 50]]]]
    assert values.tolist() == [[[[-1, -1], [80, 81], [-1, -1], [70, 71]]]]
    turned = ops.rotary_and_cache(*given, interleaved=True, impl=impl)
    assert turned.tolist() == [[[[-2, 1, -4, 3, 5]], [[-6, -7, 16, 18, 10]]]]
    assert keys.tolist() == [[[[-1] * 5, [-60, -70, 160, 180, 100], [-1] * 5, [-20, 10, -40, 30, 50]]]]


DIMS = [(16, 16), (24, 24), (64, 64), (80, 80), (96, 96), (64, 32), (64, 16), (80, 32), (24, 6), (16, 2)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotated"), DIMS)
def test_head_dims(dim, rotated, dtype, interleaved):
    check(case(dtype, 2, 2, dim=dim, rotated=rotated, value_dim=40, interleaved=interleaved))


@pytest.mark.parametrize("angle_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_cos_and_sin(dtype, angle_dtype):
    for angle_batch, interleaved in ((None, False), (1, True)):
        options = {"angle_dtype": angle_dtype, "angle_batch": angle_batch, "interleaved": interleaved}
        check(case(dtype, nodes=2, rotated=12, **options))


@pytest.mark.parametrize(
    ("batch", "nodes", "heads", "kv_heads"),
    [(1, 1, 1, 1), (1, 1, 48, 8), (3, 2, 5, 5), (2, 3, 9, 3), (1, 5, 33, 1)],
)
def test_heads_and_nodes(batch, nodes, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(kernel, "FEW_NODES", 5)
    for dim in (64, 200):  # up to 8 and up to 2 heads in a program of few nodes, twice as many in one of many
        check(case(torch.bfloat16, batch, nodes, heads, kv_heads, dim, slots=nodes + 1))


def test_programs_are_as_many_as_the_nodes_and_heads_need(monkeypatch):
    seen = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append((grid, options["num_warps"]))

    monkeypatch.setattr(kernel, "_rotary_and_cache_kernel", Recorded())
    for batch, nodes in ((1, 1), (1, 64), (64, 8)):
        given = case(torch.bfloat16, batch, nodes, 32, 8, 128, slots=nodes)
        ops.rotary_and_cache(**given, impl="triton")
    assert seen == [((1, 12, 1), 1), ((64, 12, 1), 1), ((8, 6, 64), 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_or_not_normal(dtype):
    given = case(dtype, dim=32, rotated=24, heads=8)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    special = torch.tensor([NAN, torch.inf, -torch.inf, 0.0, -0.0, smallest, -7 * smallest, torch.finfo(dtype).max])
    random = torch.Generator().manual_seed(1)
    for name in ("query", "key", "value", "cos", "sin"):
        picked = special[torch.randint(0, len(special), given[name].shape, generator=random)].to(dtype).to(DEVICE)
        where = torch.rand(given[name].shape, generator=random) < 0.4
        given[name] = torch.where(where.to(DEVICE), picked, given[name])
    for interleaved in (False, True):
        rotated, keys, values = check(given | {"interleaved": interleaved})
        assert rotated.isnan().any() and not rotated.isnan().all()
        # dims that are not rotated, and values, are copied as bits
        assert torch.equal(bits(rotated)[..., 24:], bits(given["query"])[..., 24:])


def test_strides():
    given = case(torch.float16, batch=2, nodes=3, rotated=8, norms=(True, True), seed=3)
    strided = {}
    for name, value in given.items():
        if torch.is_tensor(value) and name not in ("keys", "values"):
            wide = torch.full([2 * size + 1 for size in value.shape], 77, device=DEVICE).to(value.dtype)
            strided[name] = wide[tuple(slice(1, 2 * size, 2) for size in value.shape)].copy_(value)
            assert not strided[name].is_contiguous()
    for mine, theirs in zip(run(given | strided, "triton"), run(given, "triton"), strict=True):
        assert_same(mine, theirs)
    transposed = {name: given[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("cos", "sin", "slots")}
    transposed["query"] = given["query"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(tensor.is_contiguous() for tensor in transposed.values())
    for mine, theirs in zip(run(given | transposed, "triton"), run(given, "triton"), strict=True):
        assert_same(mine, theirs)


def test_planes_that_are_contiguous_or_parts_of_wider_heads():
    given = case(torch.bfloat16, dim=16, value_dim=24)
    want = run(given, "reference")
    wide = torch.full((2, 2, 9, 50), 5.0, dtype=torch.bfloat16, device=DEVICE)
    own = {"keys": torch.zeros(2, 2, 9, 16, dtype=torch.bfloat16, device=DEVICE), "values": wide[..., 10:34]}
    assert_same(ops.rotary_and_cache(**given | own, impl="triton"), want[0])
    rows = torch.arange(2, device=DEVICE)[:, None]
    for name, whole in zip(own, want[1:], strict=True):
        wanted = whole[:, 1:-1].transpose(1, 2)[rows, :, given["slots"]]
        assert_same(own[name][rows, :, given["slots"]], wanted)
        own[name][rows, :, given["slots"]] = 5
    assert (wide == 5).all()


def without_rotation(arguments):
    """The same arguments, with the rotation by 0 degrees."""
    zero = torch.zeros_like(arguments["sin"])
    return arguments | {"cos": zero + 1, "sin": zero}


def check_norms(arguments):
    """Assert that the norms are close to the reference's, and that the rotation of the kernel's own norms is exact."""
    style, dtype = arguments["style"], arguments["query"].dtype
    most = FP32_NORM_ULPS if dtype == torch.float32 else NORM_ULPS[style]
    level = without_rotation(arguments)
    normed, wanted = (run(level, impl) for impl in ("triton", "reference"))
    rows = torch.arange(len(arguments["slots"]), device=DEVICE)[:, None]
    for place, (got, want) in enumerate(zip(normed, wanted, strict=True)):
        if place:
            got, want = (each[:, 1:-1].transpose(1, 2)[rows, :, arguments["slots"]] for each in (got, want))
        assert got.isfinite().all() and ulps_apart(got, want).max() <= most, style
    key = normed[1][:, 1:-1].transpose(1, 2)[rows, :, arguments["slots"]]
    plain = arguments | {"query": normed[0], "key": key, "query_norm": None, "key_norm": None}
    rotated = run(arguments, "triton")
    for got, want in zip(rotated, run(plain, "reference"), strict=True):
        assert_same(got, want)
    assert_only_the_slots_changed(arguments, rotated[1:])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype, style):
    for dim, rotated, interleaved in ((64, 64, False), (80, 32, True), (24, 6, False)):
        options = {"norms": (True, True), "style": style, "interleaved": interleaved, "seed": dim}
        check_norms(case(dtype, 1, 3, dim=dim, rotated=rotated, **options))


@pytest.mark.parametrize("norms", [(True, False), (False, True)])
def test_one_norm(norms):
    check_norms(case(torch.float16, dim=96, norms=norms, style="cast_first"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_zeros_and_of_values_that_are_not_finite(dtype):
    given = case(dtype, norms=(True, True), eps=1e-6)
    given["query"] = given["query"].clone()
    given["query"][0, 0] = 0
    given["query"][0, 1, :, 3] = torch.inf
    given["query"][1, 2, 1, 5] = NAN
    got, want = (run(given, impl)[0] for impl in ("triton", "reference"))
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any() and not got.isnan().all()
    assert (got[0, 0] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    nothing = given | {"eps": 0.0}  # the inverse of 0 is infinite
    assert run(nothing, "triton")[0][0, 0].isnan().all() and run(nothing, "reference")[0][0, 0].isnan().all()


def test_the_compiler_fuses_no_products_and_sums():
    """In fp32 this would skip a rounding. In 16 bits each product is rounded by a cast."""
    (row,) = inspection.compile_table(90, "rotary_and_cache/fp32 d128 n64$").values()
    tile = row["tile"]
    assert tile["fp32_flops"] == 32 * row["warps"] * tile["fp32_instructions"] > 0


# --- the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("angle_dtype", [None, torch.float32])
@pytest.mark.parametrize(("module", "rotated"), [(modeling_llama, 64), (modeling_glm, 64), (modeling_glm, 32)])
def test_the_reference_is_what_transformers_computes(module, rotated, dtype, angle_dtype):
    given = case(dtype, dim=64, rotated=rotated, angle_dtype=angle_dtype, interleaved=module is modeling_glm)
    states = [given[name].transpose(1, 2) for name in ("query", "key")]
    query, key = (each.to(dtype) for each in module.apply_rotary_pos_emb(*states, given["cos"], given["sin"]))
    rotated, keys, values = run(given, "reference")
    assert_same(rotated, query.transpose(1, 2).contiguous())
    rows = torch.arange(2, device=DEVICE)[:, None]
    for got, want in ((keys, key.transpose(1, 2)), (values, given["value"])):
        assert_same(got[:, 1:-1][rows, given["slots"]].contiguous(), want.contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_the_norms_of_the_reference_are_those_of_transformers(style, dtype):
    given = case(dtype, dim=64, norms=(True, True), style=style)
    normed = {}
    for name in ("query", "key"):
        module = STYLES[style](64, eps=1e-6).to(dtype).to(DEVICE)
        module.weight.data = given[f"{name}_norm"]
        normed[name] = module(given[name]).detach()
    plain = given | normed | {"query_norm": None, "key_norm": None}
    for got, want in zip(run(given, "reference"), run(plain, "reference"), strict=True):
        assert_same(got, want)


# --- arguments


def tensor(*shape, dtype=torch.float32, **options):
    return torch.zeros(shape, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "query must be a tensor, got NoneType"),
        ({"query": tensor(2, 3, 4)}, r"query must be fp32, bf16 or fp16 \[B, N, Hq, D\], none of them 0, got"),
        ({"query": tensor(2, 3, 4, 8, dtype=torch.float64)}, "query must be fp32, bf16 or fp16 .* got torch.float64"),
        ({"key": tensor(2, 3, 2, 6)}, r"key must be torch.float32 \[2, 3, Hkv, 8\], got torch.float32 \[2, 3, 2, 6\]"),
        ({"key": tensor(2, 3, 2, 8, dtype=torch.float16)}, r"key must be torch.float32 .* got torch.float16"),
        ({"value": tensor(2, 3, 1, 6)}, r"value must be torch.float32 \[2, 3, 2, Dv\]"),
        ({"cos": tensor(3, 8)}, r"cos must be torch.float32 \[2, 3, R\]"),
        ({"cos": tensor(3, 3, 8)}, r"cos must be torch.float32 \[2, 3, R\], got torch.float32 \[3, 3, 8\]"),
        ({"cos": tensor(2, 3, 8, dtype=torch.bfloat16)}, "cos must be torch.float32 .* got torch.bfloat16"),
        ({"sin": tensor(2, 3, 6)}, r"sin must be torch.float32 \[2, 3, 8\]"),
        (dict.fromkeys(("cos", "sin"), tensor(2, 3, 7)), r"cos must be \[2, 3, R\] with R even and at most 8, got"),
        (dict.fromkeys(("cos", "sin"), tensor(2, 3, 10)), r"cos must be \[2, 3, R\] with R even and at most 8, got"),
        ({"keys": tensor(2, 2, 9, 6)}, r"keys must be torch.float32 \[2, 2, S, 8\]"),
        ({"keys": tensor(2, 9, 2, 8)}, r"keys must be torch.float32 \[2, 2, S, 8\]"),
        (
            {"keys": tensor(2, 2, 8, 9).transpose(2, 3)},
            r"keys must be a tensor whose last dimension is contiguous, got .* with strides \[144, 72, 1, 9\]",
        ),
        ({"values": tensor(2, 2, 8, 6)}, r"values must be torch.float32 \[2, 2, 9, 6\]"),
        ({"values": tensor(2, 2, 6, 9).transpose(2, 3)}, "values must be a tensor whose last dimension is contiguous"),
        ({"slots": tensor(2, 3, dtype=torch.int32)}, r"slots must be torch.int64 \[2, 3\], got torch.int32"),
        ({"slots": tensor(2, 3, dtype=torch.int64, device="meta")}, "slots must be on cpu, got torch.int64 .* on meta"),
        ({"interleaved": 1}, "interleaved must be True or False, got 1"),
        ({"query_norm": tensor(7)}, r"query_norm must be torch.float32 \[8\]"),
        ({"key_norm": tensor(8, dtype=torch.bfloat16)}, "key_norm must be torch.float32 .* got torch.bfloat16"),
        ({"eps": None}, "eps must be a finite number, got NoneType"),
        ({"style": "llama"}, "style must be one of cast_first, cast_last, one_plus, got 'llama'"),
        ({"impl": "eager"}, 'impl must be None, "triton" or "reference", got \'eager\''),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    arguments = {
        "query": tensor(2, 3, 4, 8),
        "key": tensor(2, 3, 2, 8),
        "value": tensor(2, 3, 2, 6),
        **dict.fromkeys(("cos", "sin"), tensor(2, 3, 8)),
        "keys": tensor(2, 2, 9, 8),
        "values": tensor(2, 2, 9, 6),
        "slots": torch.arange(6).view(2, 3),
    }
    ops.rotary_and_cache(**arguments)
    with pytest.raises(ValueError, match=f"^rotary_and_cache: {message}"):
        ops.rotary_and_cache(**arguments | changes)


# --- real sizes

# name -> heads, key-value heads, dim, rotated dims, options
MODELS = {
    "Llama 3": (32, 8, 128, 128, {}),
    "Qwen 3": (32, 8, 128, 128, {"norms": (True, True)}),
    "Gemma 3": (8, 4, 256, 256, {"norms": (True, True), "style": "one_plus", "angle_batch": 1}),
    "GLM 4": (48, 4, 128, 64, {"interleaved": True}),
    "Phi 2": (32, 32, 80, 32, {"angle_dtype": torch.float32}),
    "Falcon": (71, 1, 64, 64, {}),
}
SIZES = [(1, 1), (1, 64), (64, 1), (16, 8), (2, 128)]
CELLS = [(name, *size, dtype) for name in MODELS for size in SIZES for dtype in DTYPES]
FIRST = [(name, *size, dtype) for name, size, dtype in turns([*MODELS], SIZES, DTYPES)]


def check_model(name, batch, nodes, dtype):
    heads, kv_heads, dim, rotated, options = MODELS[name]
    options = {"slots": nodes + 300, **options}
    given = case(dtype, batch, nodes, heads, kv_heads, dim, rotated, **options)
    if "norms" in options:
        check_norms({"style": "cast_first"} | given)
    else:
        check(given)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "batch", "nodes", "dtype"), marked(CELLS, FIRST))
def test_on_gpu(name, batch, nodes, dtype):
    check_model(name, batch, nodes, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_real_heads(name):
    for dtype in DTYPES:
        check_model(name, 2, 3, dtype)


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("large", ["keys", "values"])
def test_slots_beyond_32_bit_offsets(large):
    dims = {"keys": 16, "values": 16, large: 128}
    batch, slots = 2, 1_100_000  # 2.25e9 elements
    given = case(torch.bfloat16, batch, 4, 8, 8, dims["keys"], value_dim=dims["values"], slots=16)
    wholes = {
        name: torch.zeros(batch, slots, 8, dim, dtype=torch.bfloat16, device=DEVICE) for name, dim in dims.items()
    }
    far = torch.tensor([[0, slots - 1, 5, 9], [slots - 1, slots - 7, 1, 0]], device=DEVICE)
    _, *want = run(given, "reference")
    planes = {name: whole.transpose(1, 2) for name, whole in wholes.items()}
    ops.rotary_and_cache(**given | planes | {"slots": far}, impl="triton")
    rows = torch.arange(batch, device=DEVICE)[:, None]
    for name, wanted in zip(("keys", "values"), want, strict=True):
        whole = wholes[name]
        assert torch.equal(whole[rows, far], wanted[:, 1:-1][rows, given["slots"]])
        whole[rows, far] = 0
        assert not whole.any()


@pytest.mark.gpu
@pytest.mark.first_gpu
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing():
    make = {"dtype": torch.bfloat16, "nodes": 5, "heads": 8, "dim": 64, "norms": (True, True), "slots": 40}
    given = case(**make)
    own = {name: value.clone() if torch.is_tensor(value) else value for name, value in given.items()}
    ops.rotary_and_cache(**own, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # capturing synchronises first
        torch.cuda.set_sync_debug_mode("error")
        try:
            rotated = ops.rotary_and_cache(**own, impl="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        given = case(**make, seed=seed)
        for name, value in given.items():
            if torch.is_tensor(value):
                own[name].copy_(value)
        graph.replay()
        want, keys, values = run(given, "triton")
        assert_same(rotated, want)
        for name, whole in (("keys", keys), ("values", values)):
            assert_same(own[name].contiguous(), whole[:, 1:-1].transpose(1, 2).contiguous())
