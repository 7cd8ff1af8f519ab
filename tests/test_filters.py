"""Temperature, top-k, top-p and min-p against transformers' own, alone and together, with different values for each
row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from by_hand import DTYPES, PALETTES, check_filters_by_hand, draw_filters, filters_of, paint
from specdec_triton.ops.filters import filtered_log_probs

INF, NAN = float("inf"), float("nan")
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def filtered(logits, **options):
    """The filters for one node: from a list of logits to a list of log-probabilities, with and without a bound on
    top-k."""
    given = filters_of(**{name: [value] for name, value in options.items()})
    logits = torch.tensor(logits)[None, None]
    result = filtered_log_probs(logits, given)
    if options.get("top_k"):
        for most in (options["top_k"], options["top_k"] + 1, 99):
            bounded = filtered_log_probs(logits, given._replace(max_top_k=most))
            torch.testing.assert_close(bounded, result, rtol=0, atol=0, equal_nan=True)
    return result[0, 0]


def kept(logits, **options):
    return filtered(logits, **options).isfinite().nonzero().flatten().tolist()


def test_by_hand():
    logits = [math.log(x) for x in (0.5, 0.25, 0.125, 0.0625, 0.0625)]
    assert filtered(logits).exp().tolist() == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.0625])
    assert filtered(logits, temperature=0.5).exp()[:2].tolist() == pytest.approx([64 / 86, 16 / 86])
    assert filtered(logits, top_k=2).exp().tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    assert kept(logits, top_p=0.75) == [0, 1] and kept(logits, top_p=0.76) == [0, 1, 2]
    assert kept(logits, min_p=0.24) == [0, 1, 2] and kept(logits, min_p=1.0) == [0]
    assert kept(logits, top_k=1) == kept(logits, top_p=0.0) == [0]
    assert kept(logits, top_k=99) == kept(logits, top_k=0, top_p=1.0, min_p=0.0) == [0, 1, 2, 3, 4]


def test_ties():
    tied = [1.0, 0.0, 1.0, 1.0, 0.0]
    assert kept(tied, top_k=1) == kept(tied, top_k=2) == [0, 2, 3]  # all that tie with the k-th are kept
    assert kept(tied, top_k=4) == [0, 1, 2, 3, 4]
    # the lowest ids are dropped first
    assert kept([0.0] * 4, top_p=0.5) == [2, 3] and kept([0.0] * 4, top_p=0.2) == [3]
    assert kept(tied, top_k=1, top_p=0.6) == [2, 3]
    assert kept(tied, temperature=0.0) == [0]


def test_impossible_tokens_stay_impossible_and_greedy_rows_are_certain():
    assert kept([-INF, 0.0, -INF], top_k=3, top_p=0.99, min_p=0.01, temperature=2.0) == [1]
    assert filtered([-INF, 3.0, -INF, -INF]).tolist() == [-INF, 0.0, -INF, -INF]
    assert filtered([1.0, 5.0, 5.0], temperature=0.0, top_k=2).tolist() == [-INF, 0.0, -INF]
    assert filtered([NAN, 1.0]).isnan().any() and filtered([-INF, -INF]).isnan().any()


def test_each_row_has_its_own():
    logits = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    options = {"temperature": [0.0, 1.0, 0.5, 2.0], "top_k": [5, 0, 3, 40], "top_p": [0.9, 1.0, 0.5, 0.8]}
    options["min_p"] = [0.0, 0.2, 0.0, 0.05]
    together = filtered_log_probs(logits, filters_of(**options))
    for row in range(4):
        alone = filters_of(**{name: values[row : row + 1] for name, values in options.items()})
        assert torch.equal(together[row], filtered_log_probs(logits[row : row + 1], alone)[0])


def check_reference(palette, dtype, data, seed):
    logits, options = paint(palette, dtype, data.draw(st.integers(1, 70)), seed), draw_filters(data.draw, palette)
    given = filters_of(**{name: [value] for name, value in options.items()})
    for most in {None, options["top_k"] or None}:
        found = filtered_log_probs(logits[None, None], given._replace(max_top_k=most))[0, 0]
        check_filters_by_hand(logits, found, **options)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("palette", PALETTES)
def test_by_hand_in_float64(palette, dtype, data, seed):
    check_reference(palette, dtype, data, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("palette", PALETTES)
def test_by_hand_in_float64_at_length(palette, dtype, data, seed):
    check_reference(palette, dtype, data, seed)


def test_temperatures_that_would_overflow():
    logits = torch.tensor([[[1e4, -INF, 2e4, 2e4]], [[-1e4, -INF, -3e4, -1e4]], [[0.0, -INF, -1e-30, -1.0]]])
    coldest = filtered_log_probs(logits, filters_of(temperature=[1e-45] * 3)).exp()[:, 0]
    assert coldest.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5], [1, 0, 0, 0]]
    hottest = filtered_log_probs(logits, filters_of(temperature=[INF] * 3)).exp()
    torch.testing.assert_close(hottest, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]).expand(3, 1, 4))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    impossible=st.floats(0, 0.9),
    temperature=st.none() | st.floats(0.0625, 5, width=32),
    top_k=st.none() | st.integers(1, 80),
    top_p=st.none() | st.floats(0.0625, 0.9375),
    min_p=st.none() | st.floats(0.0, 1.0, width=32),
)
def test_as_transformers_does_it(seed, vocab, dtype, impossible, **options):
    generator = torch.Generator().manual_seed(seed)
    # no two logits tie, because transformers' top-p has no defined order among ties
    logits = (torch.stack([torch.randperm(vocab, generator=generator) for _ in range(6)]) / 8).to(dtype)
    logits[torch.rand(6, vocab, generator=generator) < impossible] = -INF
    logits[:, vocab // 2] = vocab / 8
    options = {name: value for name, value in options.items() if value is not None}
    warpers = LogitsProcessorList([WARPERS[name](options[name]) for name in WARPERS if name in options])
    wanted = warpers(None, logits.float())
    given = filters_of(**{name: [value] * 2 for name, value in options.items()}, max_top_k=options.get("top_k"))
    got = filtered_log_probs(logits.view(2, 3, vocab), given)
    wanted = wanted.log_softmax(-1).view_as(got)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_ties_keep_as_much_as_transformers_does():
    logits = torch.randint(0, 4, (200, 12), generator=torch.Generator().manual_seed(1)).float()
    for top_p in (0.3, 0.6, 0.85):
        wanted = TopPLogitsWarper(top_p)(None, logits).log_softmax(-1)
        got = filtered_log_probs(logits[:, None], filters_of(top_p=[top_p] * 200)).squeeze(1)
        assert torch.equal(got.isfinite().sum(-1), wanted.isfinite().sum(-1))
        torch.testing.assert_close(got.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize("top_p", [step / 20 for step in range(1, 20)])
def test_the_threshold_is_transformers_own(top_p):
    """With equal tokens, sums lie on the threshold, and the last bit decides on which side."""
    for size in range(2, 41):
        logits = torch.zeros(1, size)
        wanted = TopPLogitsWarper(top_p)(None, logits).isfinite().sum()
        assert filtered_log_probs(logits[None], filters_of(top_p=[top_p])).isfinite().sum() == wanted
        bounded = filters_of(top_k=[1], top_p=[top_p], max_top_k=1)
        assert filtered_log_probs(logits[None], bounded).isfinite().sum() == wanted


KINDS = {
    "random": lambda logits: logits,
    "tied": lambda logits: logits.round(),
    "few values": lambda logits: logits.sign() * 0.37,
    "uniform": torch.zeros_like,
    "signed zeros": lambda logits: torch.where(logits > 2, logits, logits.sign() * 0.0),
    "bf16": lambda logits: logits.bfloat16(),
    "fp16": lambda logits: logits.half(),
}


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 70) | st.sampled_from([1000, 4097]),
    kind=st.sampled_from(sorted(KINDS)),
    odd=st.sampled_from([None, -INF, INF, NAN]),
    share=st.floats(0, 1),
    top_k=st.lists(st.integers(1, 80), min_size=2, max_size=2),
    slack=st.integers(0, 9),
    top_p=st.none() | st.lists(st.floats(0, 1) | st.sampled_from([0.5, 0.8, 0.9]), min_size=2, max_size=2),
    rest=st.sampled_from([{}, {"min_p": [0.1, 0.0]}, {"temperature": [0.0, 0.7]}]),
)
def test_a_bound_on_top_k_changes_nothing(seed, vocab, kind, odd, share, top_k, slack, top_p, rest):
    """Results are equal in every bit, however many logits tie with the k-th."""
    generator = torch.Generator().manual_seed(seed)
    logits = KINDS[kind](3 * torch.randn(2, 3, vocab, generator=generator))
    if odd is not None:
        logits[torch.rand(logits.shape, generator=generator) < share] = odd
    given = filters_of(top_k=top_k, **rest, **({} if top_p is None else {"top_p": top_p}))
    bounded = given._replace(max_top_k=max(top_k) + slack)
    wanted, got = (filtered_log_probs(logits, filters) for filters in (given, bounded))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_with_a_bound_nothing_is_sorted(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", refuse)
    filtered_log_probs(torch.zeros(1, 1, 9), filters_of(top_k=[2], top_p=[0.5], max_top_k=2))
    with pytest.raises(AssertionError, match="sorted"):
        filtered_log_probs(torch.zeros(1, 1, 9), filters_of(top_k=[2]))
