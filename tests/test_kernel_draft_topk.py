"""The candidates of a draft level: the kernel against its reference, and both against plain statements of the choice.

Noisy scores may round differently, which may change the order of two that are close. If candidates differ, their scores
must be equal up to such a rounding error.
"""

import pytest
import torch

from by_hand import filters_of as made
from first_gpu import turns
from helpers import DEVICE
from sampled_cases import FILTERS, filters_of
from specdec_triton import ops
from specdec_triton.kernels import _noise, _rows
from specdec_triton.kernels import draft_topk as kernel
from specdec_triton.ops import noise, reference
from specdec_triton.ops.filters import Filters, filtered_log_probs

NAN, INF = float("nan"), float("inf")
TILE = kernel.TILE_V
ROUNDING = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]


def case(batch, parents, vocab, noise="none", kind="none", dtype=torch.float32, seed=0, rows=None):
    """Arguments of the op. The logits are a window of a larger tensor that is +inf everywhere else, so that a read
    outside finds a maximum. The noise "depths" is coupled noise with a depth for each group."""
    random = torch.Generator().manual_seed(seed)
    surroundings = torch.full((batch, parents + 1, vocab + 7), INF, dtype=dtype)
    surroundings[:, 1:, 3 : vocab + 3] = 3 * torch.randn(batch, parents, vocab, generator=random)
    filters = filters_of(kind, batch, random)
    groups = parents if rows is None else len(rows)
    return {
        "logits": surroundings.to(DEVICE)[:, 1:, 3 : vocab + 3],
        "filters": Filters(*(None if option is None else option.to(DEVICE) for option in filters.tensors)),
        "noise": "coupled" if noise == "depths" else noise,
        "seeds": torch.arange(batch, device=DEVICE) * 2**40 - seed,
        "position": torch.arange(batch, device=DEVICE) * 3 + 2**20,
        "depth": 2,
        "depths": torch.arange(groups, device=DEVICE) * 3 + 1 if noise == "depths" else None,
        "nodes": torch.arange(groups, device=DEVICE) * 5 + 1,
        "rows": None if rows is None else torch.tensor(rows, device=DEVICE),
    }


def noisy_scores(arguments):
    """[B, G, V] fp32: the scores that candidates are ranked by, as a literal statement."""
    logits, rows, vocab = arguments["logits"], arguments["rows"], arguments["logits"].shape[2]
    if rows is not None:
        logits = logits[:, rows]
    if arguments["noise"] == "none":
        return logits.float()
    scores, seeds, position = (
        filtered_log_probs(logits, arguments["filters"]),
        arguments["seeds"],
        arguments["position"],
    )
    if arguments["noise"] == "coupled":
        depths = [arguments["depth"]] * scores.shape[1] if arguments["depths"] is None else arguments["depths"].tolist()
        drawn = [noise.gumbel(seeds, position + depth, 0, noise.COUPLED, vocab) for depth in depths]
        return scores + torch.stack(drawn, 1)
    return scores + noise.gumbel(seeds[:, None], position[:, None], arguments["nodes"], noise.DRAFT, vocab)


def check(arguments, k, with_log_probs=False, noisy=False):
    """Assert that kernel and reference agree, and that the reference has the k first ids of a stable sort. Groups with
    NaN are only flagged. Returns the kernel's result."""
    flags = {"with_log_probs": with_log_probs or noisy, "noisy_log_probs": noisy}
    got, want = (ops.draft_topk(**arguments, k=k, **flags, impl=impl) for impl in ("triton", "reference"))
    vocab = arguments["logits"].shape[2]
    assert [(field.dtype, field.shape) for field in got[:2]] == [(field.dtype, field.shape) for field in want[:2]]
    assert torch.equal(got.has_nan, want.has_nan)
    for found in (got, want):
        assert ((found.tokens >= 0) & (found.tokens < vocab)).all()
    right = ~want.has_nan
    scores = noisy_scores(arguments)
    ranked = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(want.tokens[right], ranked[right])
    if not torch.equal(got.tokens[right], ranked[right]):
        assert arguments["noise"] != "none"
        found = got.tokens[right]
        assert all(len(set(group)) == k for group in found.tolist()), "a candidate is repeated"
        scores, wanted = scores[right].gather(-1, found), scores[right].gather(-1, ranked[right])
        torch.testing.assert_close(scores, wanted, rtol=ROUNDING, atol=ROUNDING)
        assert torch.equal(found[wanted == -INF], ranked[right][wanted == -INF])
    if with_log_probs or noisy:
        rows = arguments["rows"]
        if noisy:
            log_probs = noisy_scores(arguments).log_softmax(-1)
            assert torch.equal(want.log_probs[right], log_probs.gather(-1, want.tokens)[right])
        else:
            log_probs = filtered_log_probs(arguments["logits"], arguments["filters"])
            log_probs = log_probs if rows is None else log_probs[:, rows]
        wanted = log_probs.gather(-1, got.tokens)[right]
        torch.testing.assert_close(got.log_probs[right], wanted, rtol=ROUNDING, atol=ROUNDING)
    else:
        assert got.log_probs is want.log_probs is None
    return got


def test_hand_worked():
    logits = torch.tensor([[[1.0, 4.0, 2.0, 4.0, NAN], [0.0, -1.0, 3.0, -INF, 3.0]]], device=DEVICE)
    got = ops.draft_topk(logits[..., :4], 3, impl="triton")
    assert got.tokens.tolist() == [[[1, 3, 2], [2, 0, 1]]] and got.has_nan.tolist() == [[False, False]]
    got = ops.draft_topk(logits, 5, with_log_probs=True, impl="triton")
    assert got.has_nan.tolist() == [[True, False]] and got.tokens[0, 1].tolist() == [2, 4, 0, 1, 3]
    probs = torch.tensor([20.0855, 20.0855, 1.0, 0.36788, 0.0], device=DEVICE)
    torch.testing.assert_close(got.log_probs[0, 1].exp(), probs / probs.sum(), rtol=1e-4, atol=0)


def test_the_purpose_is_the_references():
    assert _noise.DRAFT.value == noise.DRAFT


@pytest.mark.parametrize("kind", ["none", "temperature", "all"])
@pytest.mark.parametrize("noise", reference.DRAFT_NOISE)
@pytest.mark.parametrize(("k", "dtype"), [(1, torch.float32), (5, torch.bfloat16)])
def test_random_logits(noise, kind, k, dtype):
    check(case(3, 2, 61, noise, kind, dtype, seed=k), k, with_log_probs=True)
    check(case(2, 3, 130, noise, kind, dtype, seed=k + 1), k)


@pytest.mark.parametrize("kind", ["none", "temperature", "all"])
@pytest.mark.parametrize("noise", ["coupled", "depths", "draft"])
def test_noisy_log_probabilities(noise, kind):
    check(case(2, 3, 61, noise, kind, seed=14), 5, noisy=True)
    check(case(2, 2, 61, noise, kind, torch.bfloat16, seed=15, rows=[1, 0, 1, 1]), 1, noisy=True)
    # several tiles, of which some have no token that is left
    arguments = case(1, 2, 2 * _rows.BLOCK_V + 9, noise, kind, seed=16)
    arguments["logits"][:, 1, :TILE] += 40
    check(arguments, 3, noisy=True)


def test_groups_of_different_depths_have_the_noise_of_their_depths():
    arguments = case(2, kernel.ROWS_A_PROGRAM + 1, 40, "depths", "temperature", seed=4)
    got = check(arguments, 3)
    for group, depth in enumerate(arguments["depths"].tolist()):
        alone = arguments | {"depth": depth, "depths": None, "logits": arguments["logits"][:, group, None]}
        assert torch.equal(check(alone, 3).tokens[:, 0], got.tokens[:, group])
    assert not torch.equal(check(arguments | {"depths": None}, 3).tokens, got.tokens)


@pytest.mark.parametrize("kind", FILTERS[2:5])
def test_each_filter(kind):
    check(case(2, 1, 70, "coupled", kind, torch.float16, seed=3), 4)


@pytest.mark.parametrize("noise", ["coupled", "draft"])
@pytest.mark.parametrize(
    ("vocab", "kind"),
    [(1, "all"), (1, "none"), (17, "all"), (TILE - 1, "none"), (TILE, "none"), (TILE + 1, "none"),
     (3 * TILE + 5, "temperature"), (2 * _rows.BLOCK_V + 3, "all")],
)  # fmt: skip
def test_awkward_vocabularies(noise, vocab, kind):
    check(case(1, 2, vocab, noise, kind, torch.bfloat16, seed=vocab), min(3, vocab), with_log_probs=True)


@pytest.mark.parametrize("parents", [1, kernel.ROWS_A_PROGRAM, kernel.ROWS_A_PROGRAM + 1])
def test_parents_share_the_coupled_noise(parents):
    arguments = case(2, parents, 40, "coupled", "temperature", seed=4)
    arguments["logits"][:] = arguments["logits"][:, :1].clone()
    tokens = check(arguments, 3).tokens
    assert (tokens == tokens[:, :1]).all()
    arguments["noise"] = "draft"
    assert parents == 1 or not (check(arguments, 3).tokens == tokens).all()


def test_draws_with_replacement_use_noise_of_their_own():
    got = check(case(3, 2, 50, "draft", "all", seed=5, rows=[0, 0, 0, 1]), 1)
    assert got.tokens.shape == (3, 4, 1)
    check(case(3, 2, 50, "draft", "none", seed=5, rows=[1, 0, 1]), 1, with_log_probs=True)
    check(case(2, 3, 50, "none", "none", seed=5, rows=[2, 0, 2, 1]), 2)


def test_the_frequencies_of_draws_are_the_probabilities():
    """Gumbel top-k without replacement: the first candidate follows the filtered distribution."""
    batch = 4000
    arguments = case(1, 1, 4, "draft", seed=6)
    arguments |= {name: arguments[name].expand(batch, *arguments[name].shape[1:]) for name in ("logits", "position")}
    arguments |= {"seeds": torch.arange(batch, device=DEVICE), "filters": Filters()}
    tokens = ops.draft_topk(**arguments, k=2, impl="reference").tokens[:, 0]
    probs = arguments["logits"][0, 0].softmax(-1)
    counts = torch.bincount(tokens[:, 0], minlength=4) / batch
    torch.testing.assert_close(counts, probs, rtol=0, atol=0.03)
    assert (tokens[:, 0] != tokens[:, 1]).all()


@pytest.mark.parametrize("noise", reference.DRAFT_NOISE)
@pytest.mark.parametrize("kind", ["none", "all"])
def test_more_candidates_than_tokens_are_left(noise, kind):
    """Tokens without probability follow in the order of their ids."""
    arguments = case(2, 1, TILE + 9, noise, kind, seed=7)
    arguments["logits"][:, :, [3, TILE + 4]] = 50.0
    arguments["logits"][:, :, :3] = -INF
    if kind == "none":
        arguments["logits"][:, :, 4:] = -INF
        arguments["logits"][1, :, TILE + 4] = 50.0
    if kind == "all":
        arguments["filters"] = made(top_k=[2, 1], top_p=[0.99, 0.9])
        arguments["filters"] = Filters(*(None if o is None else o.to(DEVICE) for o in arguments["filters"].tensors))
    tokens = check(arguments, 6).tokens
    if noise != "none" or kind == "none":
        assert tokens[0, 0, -3:].tolist() == ([2, 4, 5] if kind == "none" else [1, 2, 4])


@pytest.mark.parametrize("noise", reference.DRAFT_NOISE)
@pytest.mark.parametrize("kind", ["temperature", "all"])
def test_greedy_rows(noise, kind):
    arguments = case(3, 2, TILE + 30, noise, kind, torch.bfloat16, seed=8)
    arguments["filters"].temperature[1:] = 0.0
    arguments["logits"][1, :, [0, TILE + 2]] = 60.0
    arguments["logits"][2, :, TILE + 2] = 60.0
    got = check(arguments, 3, with_log_probs=True)
    assert got.tokens[1:, :, 0].tolist() == [[0, 0], [TILE + 2] * 2]
    if noise != "none":
        assert got.tokens[1:, 0].tolist() == [[0, 1, 2], [TILE + 2, 0, 1]]
        for found in (got, check(arguments, 3, noisy=True)):
            assert (found.log_probs[1:, :, 0] == 0).all() and (found.log_probs[1:, :, 1:] == -INF).all()


def test_ties_go_to_the_lowest_id():
    random = torch.Generator().manual_seed(9)
    arguments = case(3, 3, TILE + 200, seed=9)
    shape = arguments["logits"].shape
    arguments["logits"].copy_(torch.randint(-3, 3, shape, generator=random))
    for k in (1, 2, 7):
        check(arguments, k)
    arguments["logits"].fill_(-0.0)
    arguments["logits"][..., 5:] = 0.0
    assert check(arguments, 6).tokens[0, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("noise", reference.DRAFT_NOISE)
@pytest.mark.parametrize("kind", ["temperature", "all"])
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_rows_without_a_distribution_are_flagged(noise, kind, value):
    arguments = case(3, 3, TILE + 5, noise, kind, seed=10)
    arguments["filters"].temperature[2] = 0.0
    arguments["logits"][0, 1, slice(None) if value == -INF else TILE + 2] = value
    arguments["logits"][2, 2, slice(None) if value == -INF else 1] = value
    got = check(arguments, 2)
    flagged = value != value or noise != "none"
    assert got.has_nan.nonzero().tolist() == ([[0, 1], [2, 2]] if flagged else [])


@pytest.mark.parametrize(("noise", "kind"), [("none", "none"), ("coupled", "temperature"), ("draft", "all")])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_strides_and_neighbours(noise, kind, order):
    arguments = case(3, 2, 70, noise, kind, seed=11)
    whole = check(arguments, 3)
    back = [order.index(place) for place in range(3)]
    strided = arguments | {
        "logits": arguments["logits"].permute(order).contiguous().permute(back),
        "seeds": torch.stack([arguments["seeds"]] * 2, 1)[:, 0],
        "nodes": torch.stack([arguments["nodes"]] * 2, 1)[:, 0],
    }
    assert torch.equal(check(strided, 3).tokens, whole.tokens)
    assert torch.equal(check(arguments | {"logits": arguments["logits"][:, -2:]}, 3).tokens, whole.tokens)
    for row in range(3):
        alone = arguments | {name: arguments[name][row : row + 1] for name in ("logits", "seeds", "position")}
        alone["filters"] = arguments["filters"].of_rows([row])
        assert torch.equal(check(alone, 3).tokens[0], whole.tokens[row])


@pytest.mark.parametrize(("noise", "kind"), [("none", "none"), ("coupled", "temperature"), ("draft", "all")])
def test_more_keys_than_the_merge_holds_at_once(monkeypatch, noise, kind):
    monkeypatch.setattr(kernel, "MERGE_KEYS", 128)
    check(case(1, 2, 2 * TILE + 3, noise, kind, torch.bfloat16, seed=12), 70, with_log_probs=True)


@pytest.mark.parametrize("noise", reference.DRAFT_NOISE)
def test_all_tokens_are_candidates(noise):
    got = check(case(1, 1, 33, noise, "top_p", seed=13), 33)
    assert sorted(got.tokens[0, 0].tolist()) == list(range(33))


class Recorder:
    """A kernel that launches nothing and records its name."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(self.name)


@pytest.mark.parametrize("noise", reference.DRAFT_NOISE)
@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("rows", [None, [0, 1, 1]])
def test_two_launches(monkeypatch, noise, kind, rows):
    launches = []
    for module, name in (
        (kernel, "_tiles_kernel"),
        (kernel, "_merge_kernel"),
        (kernel, "_select_kernel"),
        (_rows, "statistics_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(name, launches))
    ops.draft_topk(**case(2, 2, 50, noise, kind, rows=rows), k=3, with_log_probs=True, impl="triton")
    filtered = kind not in ("none", "temperature")
    assert launches == (["statistics_kernel", "_select_kernel"] if filtered else ["_tiles_kernel", "_merge_kernel"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be 1 to 9 for 9 tokens, got 0"),
        ({"k": 10}, "k must be 1 to 9 for 9 tokens, got 10"),
        ({"k": 1.5}, "k must be an integer of 64 bits, got 1.5"),
        ({"noise": "gumbel"}, "noise must be one of none, coupled, draft, got 'gumbel'"),
        ({"noise": "coupled", "seeds": None}, 'seeds must be given with noise "coupled", got None'),
        ({"noise": "coupled", "position": None}, 'position must be given with noise "coupled", got None'),
        ({"noise": "draft", "nodes": None}, 'nodes must be given with noise "draft", got None'),
        (
            {"noise": "draft", "nodes": torch.zeros(3, dtype=torch.int64)},
            r"nodes must be torch.int64 \[2\], got torch.int64 \[3\]",
        ),
        (
            {"noise": "coupled", "depths": torch.zeros(3, dtype=torch.int64)},
            r"depths must be torch.int64 \[2\], got torch.int64 \[3\]",
        ),
        ({"noisy_log_probs": 1}, "noisy_log_probs must be True or False, got 1"),
        (
            {"noisy_log_probs": True, "with_log_probs": True},
            'noisy_log_probs must be False without noise .* got True with noise "none" and with_log_probs=True',
        ),
        ({"noisy_log_probs": True, "noise": "coupled"}, 'noisy_log_probs must be False .*"coupled" and .*=False'),
        ({"rows": torch.zeros(2)}, r"rows must be torch.int64 \[G\], got torch.float32 \[2\]"),
        ({"seeds": torch.zeros(1), "noise": "coupled"}, r"seeds must be torch.int64 \[2\], got torch.float32 \[1\]"),
        ({"filters": None}, "filters must be a Filters, got NoneType"),
        ({"logits": torch.zeros(2, 2, 9).long()}, "logits must be fp32, bf16 or fp16"),
        ({"impl": "cuda"}, 'impl must be None, "triton" or "reference", got \'cuda\''),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    arguments = {name: value.cpu() if torch.is_tensor(value) else value for name, value in case(2, 2, 9).items()}
    with pytest.raises(ValueError, match=f"^draft_topk: {message}"):
        ops.draft_topk(**{**arguments, "k": 2, **changes})


REAL_SIZES = turns(reference.DRAFT_NOISE, ["none", "temperature", "all", "all"], DTYPES, [1, 4, 16])


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize(("noise", "kind", "dtype", "k"), REAL_SIZES)
def test_real_sizes_on_gpu(noise, kind, dtype, k):
    check(case(2, 3, 128256, noise, kind, dtype, seed=k), k, with_log_probs=True)
    check(case(1, 9, 50257, noise, kind, dtype, seed=k), k)
    if noise != "none":
        check(case(2, 15, 128256, "depths", kind, dtype, seed=k), k, noisy=True)


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("kind", ["temperature", "all"])
def test_one_captured_graph_serves_new_inputs_and_the_host_reads_nothing(kind):
    arguments = case(2, 2, 5000, "coupled", kind, torch.bfloat16)
    ops.draft_topk(**arguments, k=3, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.draft_topk(**arguments, k=3, impl="triton")
    for seed in (1, 2):
        arguments["logits"].copy_(case(2, 2, 5000, "coupled", kind, torch.bfloat16, seed=seed)["logits"])
        arguments["position"] += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        want = ops.draft_topk(**arguments, k=3, impl="triton")
        for field, wanted in zip(got[:2], want[:2], strict=True):
            assert torch.equal(field, wanted)
