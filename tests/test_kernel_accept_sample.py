"""The sampled acceptance kernel against its reference; on a CPU in Triton's interpreter.

Sums and logarithms may round differently, which may change a decision that is close. If a row differs, the reference
must give the kernel's result for logits that are changed by the size of such a rounding error.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import DTYPES, PALETTES, paint
from by_hand import check_filters_by_hand as check_by_hand
from by_hand import draw_filters as options_of
from by_hand import filters_of as made
from first_gpu import covering, marked, turns
from helpers import DEVICE
from sampled_cases import FILTERS, case, draw_tokens, filters_of, on_device
from specdec_triton import ops
from specdec_triton.kernels import _filters, _noise, _rows, _tree, accept_coupled, accept_weighted
from specdec_triton.kernels import accept_sample as kernel
from specdec_triton.ops import noise, reference, rules
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.rules import RULES, SAMPLING, WEIGHING_RULES

NAN, INF = float("nan"), float("inf")
FIELDS = reference.Acceptance._fields
ROUNDING = 4e-6
pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
]
CELLS = [(rule, sampling) for rule in RULES for sampling in SAMPLING if rule in WEIGHING_RULES or sampling == "none"]


def run(arguments):
    return reference.Acceptance(*kernel.accept_sample(**arguments))


def check(arguments, exact=False):
    """Assert that kernel and reference agree. For rows without a distribution, only has_nan must agree. Returns the
    kernel's result."""
    got, want = run(arguments), reference.accept_sample(**arguments)
    for field, wanted in zip(got, want, strict=True):
        assert (field.shape, field.dtype, field.is_contiguous()) == (wanted.shape, wanted.dtype, True)
    right = same(got, want)
    for attempt in range(0 if exact else 40):
        if right.all():
            break
        right = right | same(got, reference.accept_sample(**arguments | nudged(arguments, attempt)))
    wrong = (~right).nonzero().flatten().tolist()
    assert not wrong, "\n".join(
        f"row {row}: {name} {getattr(got, name)[row].tolist()}, not {getattr(want, name)[row].tolist()}"
        for row in wrong
        for name in FIELDS
    )
    return got


def same(got, want):
    """[B] bool: True for rows with equal results."""
    equal = (got.path == want.path).all(1) & (got.length == want.length) & (got.next_ids == want.next_ids)
    return (got.has_nan == want.has_nan) & (equal | want.has_nan)


def nudged(arguments, attempt):
    random = torch.Generator(DEVICE).manual_seed(attempt)
    changed = {}
    for name in ("logits", "draft_logits"):
        if arguments[name] is not None:
            logits = arguments[name].float()
            changed[name] = logits + ROUNDING * (torch.rand(logits.shape, generator=random, device=DEVICE) - 0.5)
    return changed


# Parts of the kernels


@triton.jit
def _noise_probe(out_ptr, words_ptr, unit_ptr, seed_ptr, position_ptr, node, purpose, first, BLOCK_V: tl.constexpr):
    lane = tl.arange(0, BLOCK_V)
    seed, position = tl.load(seed_ptr), tl.load(position_ptr)
    tl.store(out_ptr + lane, _noise.gumbel(seed, position, node, purpose, first, BLOCK_V))
    w0, w1, w2, w3 = _noise.philox(seed, position, lane * 0 + node, purpose, lane)
    tl.store(words_ptr + 4 * lane, w0.to(tl.int64))
    tl.store(words_ptr + 4 * lane + 1, w1.to(tl.int64))
    tl.store(words_ptr + 4 * lane + 2, w2.to(tl.int64))
    tl.store(words_ptr + 4 * lane + 3, w3.to(tl.int64))
    tl.store(unit_ptr + lane, _noise.uniform(seed, position, lane, purpose))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-1, 5), (2**63 - 1, 2**33 + 7), (-(2**63), 2**31)])
def test_noise_is_the_references(seed, position):
    seeds, at = torch.tensor([seed], device=DEVICE), torch.tensor([position], device=DEVICE)
    out, unit = torch.empty(2, 64, device=DEVICE)
    words = torch.empty(256, dtype=torch.int64, device=DEVICE)
    _noise_probe[(1,)](out, words, unit, seeds, at, 9, 3, 32, BLOCK_V=64)
    wanted = torch.broadcast_tensors(*noise._words(seeds, at, 9, 3, torch.arange(64, device=DEVICE)))
    assert torch.equal(words, torch.stack(wanted, -1).flatten())
    assert torch.equal(unit, noise.uniform(seeds.expand(64), at, torch.arange(64, device=DEVICE), 3))
    torch.testing.assert_close(out, noise.gumbel(seeds, at, 9, 3, 96)[0, 32:], rtol=1e-6, atol=1e-6)


def test_the_constants_are_the_references():
    assert sorted(accept_coupled.RULES + accept_weighted.RULES) == sorted(RULES)
    assert [purpose.value for purpose in (_noise.COUPLED, _noise.ACCEPT, _noise.RECOVER, _noise.BONUS)] == [
        noise.COUPLED, noise.ACCEPT, noise.RECOVER, noise.BONUS,
    ]  # fmt: skip
    assert set(accept_weighted.RULES) == set(WEIGHING_RULES)
    assert accept_weighted.CHAIN_RULES == rules.CHAIN_RULES
    assert accept_coupled.TYPICAL_EPSILON.value == rules.TYPICAL_EPSILON
    assert accept_coupled.TYPICAL_DELTA.value == rules.TYPICAL_DELTA


@triton.jit
def _depths_probe(out_ptr, parents_ptr, N, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    node = tl.arange(0, BLOCK_N)
    tl.store(out_ptr + row * N + node, _tree.depths_of(parents_ptr, row, N, BLOCK_N), mask=node < N)


def depths(parents):
    out = torch.full_like(parents, -7)
    nodes = parents.shape[1]
    _depths_probe[(len(parents),)](out, parents.to(DEVICE), nodes, BLOCK_N=max(16, triton.next_power_of_2(nodes)))
    return out.tolist()


def depths_by_hand(parents):
    """Depths by walking up from each node. A node without a parent counts as a child of the root; parents are clamped
    to the node before."""
    found = []
    for node in range(len(parents)):
        found.append(0)
        while node > 0:
            node = min(parents[node], node - 1)
            found[-1] += 1
    return found


@pytest.mark.parametrize("nodes", [1, 2, 15, 16, 17, 65, 256])
def test_depths(nodes):
    """Chains, stars, random trees, and invalid parents."""
    random = torch.Generator().manual_seed(nodes)
    parents = torch.zeros(6, nodes, dtype=torch.int32)
    parents[0] = torch.arange(-1, nodes - 1)
    parents[2] = -1
    for node in range(1, nodes):
        parents[3, node] = int(torch.randint(max(0, node - 3), node, (), generator=random))
    parents[4:] = torch.randint(-3, nodes + 3, (2, nodes), generator=random)
    assert depths(parents.to(DEVICE)) == [depths_by_hand(row) for row in parents.tolist()]


@pytest.mark.parametrize(("rule", "kind"), [("coupled", "none"), ("coupled", "top_k"), ("traversal", "none")])
@pytest.mark.skipif(DEVICE != "cpu", reason="counts the interpreter's loads")
def test_a_chain_takes_no_more_loads_than_a_star(monkeypatch, rule, kind):
    """Depths are computed without walking up by loads that depend on each other."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = []
    for name in ("create_load", "create_masked_load"):
        load = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(InterpreterBuilder, name, lambda *given, load=load: (counts.append(1), load(*given))[1])
    for family in (accept_coupled, accept_weighted):
        monkeypatch.setattr(family, "walk_kernel", Recorder("walk", []))
    monkeypatch.setattr(accept_weighted, "draws_kernel", Recorder("draws", []))
    arguments = case(rule, "none", batch=1, nodes=24, vocab=5, kind=kind, seed=3) | {"max_depth": 2}
    found = []
    for parents in (torch.arange(-1, 23), torch.zeros(24).index_fill(0, torch.tensor([0]), -1)):
        arguments["parents"][:] = parents.int()
        counts.clear()
        run(arguments)
        found.append(len(counts))
    assert 0 < found[0] <= found[1]


@triton.jit
def _log_probs_probe(
    out_ptr, logits_ptr, keys_ptr, sums_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, V, S,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    filters = _filters.Filters(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr)
    statistics = _rows.Statistics(keys_ptr, sums_ptr, None)
    logits = _rows.Row(logits_ptr + row * V, 1, V)
    distribution = _filters.row_distribution(logits, statistics, row, row, S, filters, BLOCK_S, BLOCK_V)
    for first in range(0, V, BLOCK_V):
        ids = first + tl.arange(0, BLOCK_V)
        tl.store(out_ptr + row * V + ids, _filters.log_probs(distribution, ids), mask=ids < V)


def kernel_log_probs(logits, filters):
    """[B, V]: the kernel's log-probabilities of logits [B, V]."""
    batch, vocab = logits.shape
    statistics = _rows.row_statistics(logits[:, None], filters.temperature)
    out = torch.empty(batch, vocab, device=DEVICE)
    _log_probs_probe[(batch,)](
        out, logits, statistics.keys, statistics.sums, *filters.tensors, vocab, statistics.keys.shape[2],
        BLOCK_S=16, BLOCK_V=_rows.BLOCK_V,
    )  # fmt: skip
    return out


def check_filters(logits, filters):
    filters = Filters(*(None if field is None else field.to(DEVICE) for field in filters))
    logits = logits.to(DEVICE)
    got, want = kernel_log_probs(logits, filters), filtered_log_probs(logits[:, None], filters)[:, 0]
    assert torch.equal(got == -INF, want == -INF), "other tokens are kept"
    torch.testing.assert_close(got, want, rtol=2e-6, atol=4e-6)
    return (got > -INF).sum(1).tolist()


def full(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def doubles(*values):
    return full(*values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FILTERS)
def test_filters(kind, dtype):
    random = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(3, 301, generator=random)).to(dtype)
    logits[0, 5:200] = -INF
    check_filters(logits, filters_of(kind, 3, random))


# each filter alone, then together; with a nucleus that cuts a tie, and with top-k above the number of finite logits
FIXED = [
    {"top_k": 5},
    {"top_p": 0.55},
    {"temperature": 0.5, "min_p": 0.3},
    {"temperature": 4.0, "top_k": 30, "top_p": 0.8, "min_p": 1e-6},
]
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def skip_what_the_interpreter_cannot(palette, dtype):
    if palette == "denormal" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter converts denormal bf16 numbers to others")


def check_by_hand_in_float64(logits, rows):
    """Compare rows of one launch, each with its own filters, with the filters applied one after another in float64."""
    given = made(**{name: [row.get(name, value) for row in rows] for name, value in OFF.items()})
    found = kernel_log_probs(logits.to(DEVICE), Filters(*(option.to(DEVICE) for option in given.tensors))).cpu()
    for row, options in enumerate(rows):
        check_by_hand(logits[row], found[row], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("palette", PALETTES)
def test_filters_by_hand(palette, dtype):
    skip_what_the_interpreter_cannot(palette, dtype)
    check_by_hand_in_float64(torch.stack([paint(palette, dtype, 41, seed) for seed in range(len(FIXED))]), FIXED)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), vocab=st.integers(1, 70))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("palette", PALETTES)
def test_filters_by_hand_at_length(palette, dtype, data, seed, vocab):
    skip_what_the_interpreter_cannot(palette, dtype)
    rows = [options_of(data.draw, palette) for _ in range(3)]
    check_by_hand_in_float64(torch.stack([paint(palette, dtype, vocab, seed + row) for row in range(3)]), rows)


def test_filters_over_several_tiles():
    random = torch.Generator().manual_seed(4)
    vocab = 2 * _rows.BLOCK_V + 3
    logits = (2 * torch.randn(2, vocab, generator=random)).half()
    check_filters(logits, Filters(top_k=torch.tensor([2, 700])))
    logits = torch.zeros(2, vocab, dtype=torch.bfloat16)
    # all logits tie and sums are exact, because 1,000 of a power of two are dropped
    logits[:, 4096:] = -INF
    assert check_filters(logits, Filters(top_p=doubles(1 - 1000 / 4096, 0.5))) == [3096, 2048]


def test_ties():
    logits = full(1, 3, 3, 2, 3, 2, 2, 0).repeat(6, 1)
    kept = check_filters(logits, Filters(top_k=torch.tensor([1, 3, 4, 7, 8, 0])))
    assert kept == [3, 3, 6, 7, 8, 8]
    even = torch.zeros(6, 8)
    assert check_filters(even, Filters(top_p=doubles(0.25, 0.5, 0.26, 1.0, 0.0, -1.0))) == [2, 4, 3, 8, 1, 1]
    logits = full(0, 5, 5, 5, 5, -30).repeat(3, 1)
    assert check_filters(logits, Filters(top_k=torch.tensor([2, 2, 2]), top_p=doubles(0.5, 0.3, 0.9))) == [2, 2, 4]
    logits = full(-0.0, 0.0, -0.0, -1.0).repeat(2, 1)
    assert check_filters(logits, Filters(top_k=torch.tensor([1, 2]))) == [3, 3]
    assert check_filters(logits, Filters(min_p=full(1.0, 0.5))) == [3, 3]


def test_greedy_rows_and_degenerate_ones():
    logits = full(1, 3, 3, -INF).repeat(4, 1)
    kept = check_filters(logits, Filters(temperature=full(0, 1e-4, 1e4, 1), top_k=torch.tensor([3, 3, 0, 9])))
    assert kept == [1, 3, 3, 3]
    assert check_filters(logits[:1, :1], Filters(top_p=doubles(0.5), top_k=torch.tensor([1]), min_p=full(0.5))) == [1]
    lone = torch.full((2, 5), -INF)
    lone[:, 3] = torch.tensor([-3e38, 3e38])
    assert check_filters(lone, Filters(top_p=doubles(0.9, 0.1), top_k=torch.tensor([2, 1]))) == [1, 1]
    large = full(1e4, 1e4 + 2, -1e4)[None]
    assert check_filters(large, Filters(min_p=full(0.2))) == [1]
    # the threshold is between two fp32 numbers
    assert check_filters(full(1e6, 1e6 - 0.0625)[None], Filters(min_p=full(0.951))) == [1]
    extreme = Filters(temperature=full(1e-45, INF))
    for options in (extreme, extreme._replace(top_p=doubles(0.99, 0.99), min_p=full(0.5, 0.5))):
        assert (kernel_log_probs(logits[:2], options).cpu() > -30).sum(1).tolist() == [2, 3]


# The whole op


@pytest.mark.parametrize(
    ("rule", "sampling", "kind", "dtype"),
    [
        pytest.param(*cell, *kind, marks=[] if number % 2 == place else pytest.mark.slow)
        for number, cell in enumerate(CELLS)
        for place, kind in enumerate((("none", torch.float32), ("temperature", torch.bfloat16)))
    ],
)
def test_random_trees(rule, sampling, kind, dtype):
    assert check(case(rule, sampling, batch=3, kind=kind, dtype=dtype, seed=0)).length.sum()


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in FILTERS[2:5]), "all"])
@pytest.mark.parametrize(
    ("rule", "sampling"),
    [("coupled", "none"), ("typical", "none"), ("multi_round", "without"), ("block", "with"), ("traversal", "none")],
)
def test_random_trees_filtered(rule, sampling, kind):
    check(case(rule, sampling, batch=2, nodes=5, vocab=40, kind=kind, dtype=torch.bfloat16, seed=len(kind)))


@pytest.mark.parametrize(
    ("rule", "sampling", "batch", "nodes", "vocab"),
    [
        ("coupled", "none", 1, 1, 5), ("coupled", "none", 5, 2, 1000), ("coupled", "none", 1, 40, 5),
        ("coupled", "none", 1, 3, 4099), ("typical", "none", 1, 5, 4099), ("typical", "none", 1, 40, 7),
        ("rejection", "with", 1, 1, 61), ("rejection", "none", 1, 4, 4099), ("block", "with", 1, 4, 4099),
        ("block", "none", 1, 17, 5), ("multi_round", "without", 1, 4, 4099), ("multi_round", "with", 1, 40, 5),
        ("traversal", "without", 1, 17, 5), ("traversal", "with", 1, 4, 4099), ("traversal", "none", 1, 1, 1),
    ],
)  # fmt: skip
def test_awkward_shapes(rule, sampling, batch, nodes, vocab):
    check(case(rule, sampling, batch, nodes, vocab, seed=nodes + vocab))


@pytest.mark.parametrize(
    ("rule", "sampling"),
    [
        pytest.param(rule, sampling, marks=[] if (first + second) % 2 else pytest.mark.slow)
        for first, rule in enumerate(("multi_round", "traversal"))
        for second, sampling in enumerate(SAMPLING)
    ],
)
def test_siblings_one_after_the_other(rule, sampling):
    """Stars of a bad draft: most first children are rejected, and later children, some with repeated tokens, are tried
    against the residual."""
    arguments = case(rule, sampling, batch=6, nodes=6, vocab=6, seed=21, spread=2.0)
    arguments["parents"][:, 1:] = 0
    arguments["max_depth"] = 1
    tokens = full(1, 1, 2, 3, 2).long().expand(6, -1)
    if sampling != "none":
        random = torch.Generator().manual_seed(5)
        # draft_row of the root is the last row of draft_logits
        probs = arguments["draft_logits"][:, 5].softmax(-1).cpu()
        tokens = torch.multinomial(probs, 5, sampling == "with", generator=random)
    arguments["tokens"][:, 1:] = tokens
    got = check(arguments)
    assert len(set(got.path[:, 0].tolist())) >= 2


@pytest.mark.parametrize("kind", ["none", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_accept_probs_equal_the_references(monkeypatch, sampling, kind):
    """The probabilities of all children, each assuming that the ones before were rejected. A walk would rarely reach
    most of them."""
    arguments = case("multi_round", sampling, batch=6, nodes=10, vocab=17, kind=kind, seed=31, spread=1.5)
    arguments["logits"] /= 4
    if sampling != "none":
        arguments["draft_logits"] /= 2
    arguments["parents"][:, 1:] = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2], dtype=torch.int32)
    random, draft_probs = torch.Generator().manual_seed(5), None
    if sampling != "none":
        draft_probs = filtered_log_probs(arguments["draft_logits"], arguments["draft_filters"]).exp()
        by_node = draft_probs.flip(1).cpu()
        tokens = arguments["tokens"].cpu()
        draw_tokens(tokens, arguments["parents"].cpu(), by_node, sampling, random)
        arguments["tokens"] = tokens.to(DEVICE)
    seen, walk = [], accept_weighted.walk_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *given, **options: (seen.append(given[1].accept_prob.clone()), walk[grid](*given, **options))

    monkeypatch.setattr(accept_weighted, "walk_kernel", Spy())
    run(arguments)
    log_probs = filtered_log_probs(arguments["logits"], arguments["filters"])
    round = rules.SampledRound(
        tokens=arguments["tokens"],
        parents=arguments["parents"].long(),
        max_depth=9,
        log_probs=lambda node: log_probs[torch.arange(6, device=DEVICE), node],
        draft_probs=draft_probs,
        draft_row=None if sampling == "none" else arguments["draft_row"].long(),
        replaces=sampling == "with",
        seeds=arguments["seeds"],
        position=arguments["position"],
    )
    some = 0
    for parent, children in ((0, range(1, 6)), (1, range(6, 9)), (2, [9])):
        here = torch.full_like(round.seeds, parent)
        siblings = rules.first_of(round, here, torch.ones(6, device=DEVICE))
        for child in children:
            chance, drawn = rules.acceptance(siblings, round.tokens[:, child])
            got = seen[0][:, child]
            assert torch.equal(got == -1, ~drawn)
            torch.testing.assert_close(got[drawn], chance[drawn], rtol=2e-4, atol=2e-5)
            some += int(((chance > 0) & (chance < 1) & drawn).sum())
            after = rules.rejected(siblings, round.tokens[:, child], sampling == "with")
            siblings = rules._where(drawn, after, siblings)
    assert some > 8


@pytest.mark.parametrize("rule", ["coupled", "typical"])
def test_tiles_of_unlike_height(rule):
    arguments = case(rule, "none", batch=3, nodes=2, vocab=2 * _rows.BLOCK_V + 3, seed=22)
    arguments["logits"][..., _rows.BLOCK_V :] -= 40
    arguments["logits"][2] += 1e4
    got = check(arguments)
    assert (got.next_ids < _rows.BLOCK_V).all()


@pytest.mark.parametrize("rule", ["rejection", "multi_round", "block", "traversal"])
def test_a_tile_with_nothing_left(rule):
    """The drafted token is alone in its tile. After its rejection, the next token is in the other tile."""
    arguments = case(rule, "none", batch=8, nodes=2, vocab=_rows.BLOCK_V + 5, seed=23)
    arguments["logits"][..., : _rows.BLOCK_V] = -INF
    arguments["logits"][:, 0, 7] = 3.0
    arguments["tokens"][:, 1] = 7
    got = check(arguments)
    assert 0 < int(got.length.sum()) < 8
    assert (got.next_ids >= _rows.BLOCK_V).all()


@pytest.mark.parametrize(("rule", "sampling"), [cell for cell in CELLS if cell[1] != "none"])
def test_a_draft_that_is_the_target(rule, sampling):
    """Every first child is accepted, and its residual is exactly 0."""
    arguments = case(rule, sampling, nodes=6, spread=0.0, seed=5)
    got = check(arguments)
    for row in range(2):
        depth = node = 0
        while (arguments["parents"][row] == node).any():
            node = int((arguments["parents"][row] == node).int().argmax())
            depth += 1
        assert int(got.length[row]) == depth


QUICK_CELLS = [("typical", "none"), ("multi_round", "without"), ("block", "with"), ("traversal", "none")]
ONE_OF_EACH_RULE = [*QUICK_CELLS, ("coupled", "none"), ("rejection", "with")]
ONE_OF_EACH_SAMPLING = [("coupled", "none"), ("multi_round", "without"), ("block", "with")]


@pytest.mark.parametrize(
    ("rule", "sampling"),
    [cell if cell in ONE_OF_EACH_SAMPLING else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS],
)
def test_impossible_tokens_are_never_emitted(rule, sampling):
    """Greedy rows, nuclei of one token, -inf, repeated siblings, exhausted support: impossible tokens are never
    emitted."""
    arguments = case(rule, sampling, batch=4, nodes=6, vocab=6, seed=8)
    logits = arguments["logits"]
    logits[:, :, [0, 5]] = -INF
    if rule not in ("rejection", "block"):
        arguments["parents"][1, 1:] = 0
    arguments["tokens"][1, 1:] = full(2, 2, 3, 4, 1).long()
    filters = Filters(temperature=full(0, 1, 0.7, 1), top_p=doubles(1, 1, 1e-6, 1), top_k=torch.tensor([0, 0, 0, 2]))
    arguments |= on_device({"filters": filters, "draft_filters": filters})
    arguments["eos_ids"] = torch.tensor([0, 5], device=DEVICE)
    got = check(arguments)
    assert not ((got.next_ids == 0) | (got.next_ids == 5)).any()


@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[] if rule in ("coupled", "traversal") else pytest.mark.slow) for rule in RULES]
)
def test_end_of_text_budget_and_depth(rule):
    arguments = case(rule, "none", batch=6, nodes=5, vocab=4, seed=9)
    arguments |= on_device({"budget": torch.tensor([0, 1, 2, 3, -1, 2**40]), "eos_ids": torch.tensor([3, 9])})
    got = check(arguments)
    assert got.next_ids[[0, 4]].tolist() == [-1, -1] and (got.path[[0, 1, 4]] == -1).all()
    if rule != "traversal":  # weights are computed depth by depth, so max_depth must be the depth of the tree
        check(arguments | {"max_depth": 1, "eos_ids": None})
    check(arguments | {"eos_ids": torch.tensor([], dtype=torch.int64, device=DEVICE)})


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        pytest.param(
            rule,
            value,
            marks=[] if (rule, value) in (("coupled", NAN), ("block", -INF), ("traversal", NAN)) else pytest.mark.slow,
        )
        for rule in RULES
        for value in (NAN, INF, -INF)
    ],
)
def test_no_distribution_is_flagged(rule, value):
    arguments = case(rule, "none", batch=5, nodes=5, vocab=7, seed=11)
    arguments["parents"][:] = torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int32)
    places = [(0, 0), (1, 1), (2, 3), (3, 4), (4, 0)]
    for row, node in places:
        arguments["logits"][row, node, slice(None) if value == -INF else 4] = value
    arguments["budget"][4] = 0
    filters = [Filters(), Filters(temperature=torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0], device=DEVICE))]
    filters += [Filters(top_p=torch.full((5,), 0.9, dtype=torch.float64, device=DEVICE))] * (rule == "coupled")
    for options in filters if value != -INF else filters[:1]:
        got = check(arguments | {"filters": options})
        assert got.has_nan[0] and not got.has_nan[4]


@pytest.mark.parametrize(
    ("rule", "sampling"),
    [cell if cell in QUICK_CELLS else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS],
)
def test_a_node_without_a_distribution_is_a_leaf(rule, sampling):
    """Each row has one such node, mostly off the path. The text of the row is that without the node's children."""
    arguments = case(rule, sampling, batch=6, nodes=7, vocab=7, seed=33)
    if rule not in ("rejection", "block"):
        arguments["parents"][:] = torch.tensor([-1, 0, 0, 1, 1, 2, 3], dtype=torch.int32)
    node = torch.tensor([1, 2, 3, 1, 2, 3], device=DEVICE)
    rows, logits = torch.arange(6, device=DEVICE), arguments["logits"].clone()
    logits[rows, node] = torch.where(rows < 4, NAN, -INF)[:, None]
    got = check(arguments | {"logits": logits})
    cut = arguments["parents"].masked_fill(arguments["parents"] == node[:, None], -1)
    wanted = reference.accept_sample(**arguments | {"parents": cut})
    assert torch.equal(got.path, wanted.path) and torch.equal(got.length, wanted.length)
    assert torch.equal(got.has_nan, (got.path == node[:, None]).any(1))
    assert torch.equal(got.next_ids[~got.has_nan], wanted.next_ids[~got.has_nan])
    assert not got.has_nan.all()


@pytest.mark.parametrize("rule", ["multi_round", "traversal", "block"])
def test_a_draft_without_a_distribution_drew_nothing(rule):
    arguments = case(rule, "with", batch=3, nodes=5, vocab=9, seed=12)
    arguments["draft_logits"][0] = NAN
    arguments["draft_row"][1] = -1
    arguments["draft_logits"][2, 4, 3] = NAN  # the row of the root
    assert check(arguments).length.tolist() == [0, 0, 0]


def test_tokens_beyond_the_vocabulary_are_padding():
    for rule in RULES:
        arguments = case(rule, "none", batch=3, nodes=4, vocab=4, seed=13)
        arguments["tokens"][:, 0] = 99
        arguments["tokens"][:, 2] = full(-1, 4, 2**40).long()
        check(arguments)


def test_strides_and_neighbours():
    arguments = case("multi_round", "without", batch=3, nodes=5, vocab=33, kind="temperature", seed=14)
    whole = check(arguments)
    strided = arguments | {
        "logits": arguments["logits"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "draft_logits": arguments["draft_logits"].transpose(0, 1).contiguous().transpose(0, 1),
        "tokens": arguments["tokens"].t().contiguous().t(),
        "parents": arguments["parents"].t().contiguous().t(),
        "seeds": torch.stack([arguments["seeds"]] * 2, 1)[:, 0],
    }
    for name, field in run(strided)._asdict().items():
        assert torch.equal(field, getattr(whole, name))
    for row in range(3):
        alone = {
            name: Filters(*(None if field is None else field[row : row + 1] for field in value))
            if isinstance(value, Filters)
            else value[row : row + 1]
            if torch.is_tensor(value)
            else value
            for name, value in arguments.items()
        }
        for name, field in run(alone)._asdict().items():
            assert torch.equal(field[0], getattr(whole, name)[row])


def test_through_the_op():
    arguments = case("multi_round", "without", seed=15)
    got = ops.accept_sample(**arguments, impl="triton")
    for name, field in ops.accept_sample(**arguments, impl="reference")._asdict().items():
        assert torch.equal(field, getattr(got, name))


def properties(data, most_nodes):
    rule = data.draw(st.sampled_from(list(RULES)))
    sampling = data.draw(st.sampled_from(SAMPLING)) if rule in WEIGHING_RULES else "none"
    batch, nodes, vocab = (data.draw(st.integers(1, most)) for most in (2, most_nodes, 5))
    seed = data.draw(st.integers(0, 1000))
    kind = data.draw(st.sampled_from(FILTERS))
    arguments = case(rule, sampling, batch, nodes, vocab, kind, torch.bfloat16, seed)
    # zeros, ties and repeated siblings; few values, so that all of them are likely
    if data.draw(st.booleans()):
        values = torch.tensor([-INF, -2.0, 0.0, 0.5, 3.0])
        random = torch.Generator().manual_seed(seed)
        for name in ("logits", "draft_logits"):
            if arguments[name] is not None:
                chosen = values[torch.randint(0, 5, arguments[name].shape, generator=random)]
                arguments[name] = chosen.to(DEVICE, torch.bfloat16)
    arguments["budget"][:] = data.draw(st.integers(0, nodes + 1))
    if data.draw(st.booleans()):
        arguments["eos_ids"] = torch.tensor([data.draw(st.integers(0, vocab))], device=DEVICE)
    check(arguments)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_property(data):
    properties(data, 5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_property_at_length(data):
    properties(data, 9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize(("rule", "sampling"), CELLS)
def test_every_cell(rule, sampling, kind):
    for seed, vocab in enumerate((5, 61, 1000)):
        check(case(rule, sampling, 2, 9, vocab, kind, (torch.float32, torch.float16, torch.bfloat16)[seed], 100 + seed))


REAL_SIZES = [(*cell, kind, torch.bfloat16) for cell in CELLS for kind in FILTERS]
# in the other dtypes, each rule once and each filter once
OTHER_SIZES = [(*cell, kind, torch.float32) for cell, kind in turns(ONE_OF_EACH_RULE, FILTERS)]
OTHER_SIZES += [(*cell, kind, torch.float16) for cell, kind in turns(ONE_OF_EACH_RULE[::-1], FILTERS)]
FIRST_SIZES = covering(REAL_SIZES) + OTHER_SIZES


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("purpose", [noise.COUPLED, noise.BONUS])
def test_noise_of_a_vocabulary(purpose):
    """The highest of many noise values decides, and there the logarithms of a GPU are least accurate."""
    seeds, at = torch.tensor([77], device=DEVICE), torch.tensor([2**31], device=DEVICE)
    wanted = noise.gumbel(seeds, at, 9, purpose, 2**18)[0]
    got, unit = torch.empty(2, 2**18, device=DEVICE)
    words = torch.empty(4096, dtype=torch.int64, device=DEVICE)
    for first in range(0, 2**18, 1024):
        _noise_probe[(1,)](got[first:], words, unit, seeds, at, 9, purpose, first, BLOCK_V=1024)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "sampling", "kind", "dtype"), marked(REAL_SIZES + OTHER_SIZES, FIRST_SIZES), ids=str)
def test_real_sizes(rule, sampling, kind, dtype):
    check(case(rule, sampling, 2, 33, 128256, kind, dtype, 1))


# Costs


class Recorder:
    """Replaces a kernel: counts launches and computes nothing."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.name, grid))


def cost(monkeypatch, rule, sampling="none", filtered=True, batch=8, nodes=64, vocab=128256, depth=8):
    """Launches and allocated bytes at the size of a real call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if torch.is_tensor(made) and not any(
                torch.is_tensor(given) and given.untyped_storage()._cdata == made.untyped_storage()._cdata
                for given in args
            ):
                self.nbytes += made.untyped_storage().nbytes()
            return made

    launches = []
    for module in (_rows, accept_coupled, accept_weighted):
        for name in ("statistics", "noisy_statistics", "rows", "weights", "draws", "walk"):
            if hasattr(module, f"{name}_kernel"):
                monkeypatch.setattr(module, f"{name}_kernel", Recorder(name, launches))

    def of(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    filters = Filters(of(batch, dtype=torch.float32))
    if filtered:
        filters = Filters(filters[0], of(batch), filters[0].double(), filters[0])
    draft = (None, None, Filters())
    if sampling != "none":
        draft = of(batch, nodes, vocab, dtype=torch.bfloat16), of(batch, nodes, dtype=torch.int32), filters
    torch.use_deterministic_algorithms(False)  # new tensors are not filled
    arguments = (
        of(batch, nodes, vocab, dtype=torch.bfloat16), of(batch, nodes), of(batch, nodes, dtype=torch.int32), rule,
        of(batch), of(batch), filters, depth, of(batch), of(2), sampling, *draft,
    )  # fmt: skip
    with Allocations() as allocations:
        kernel.accept_sample(*arguments)
    return [name for name, _ in launches], allocations.nbytes


@pytest.mark.parametrize(("rule", "sampling"), CELLS)
@pytest.mark.parametrize("filtered", [False, True])
def test_launches_and_memory(monkeypatch, rule, sampling, filtered):
    launches, nbytes = cost(monkeypatch, rule, sampling, filtered)
    most = {"coupled": 3 if filtered else 2, "typical": 3, "traversal": 4 + 7}.get(rule, 4)
    assert len(launches) == most
    assert launches[0].endswith("statistics") and launches[-1] == "walk"
    assert 100_000 < nbytes < 4 * 2**20
