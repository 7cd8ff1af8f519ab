"""Every lossless rule keeps the target's distribution, with every tree and filter that it supports.

All texts of a small vocabulary are enumerated. Samples are rows of a batch, generated over several rounds. Mutants of
the rules and drafts are rejected with the same models and sample size.
"""

import functools
import itertools

import numpy as np
import pytest
import torch

from specdec_triton.ops import rules
from specdec_triton.ops.filters import filtered_log_probs
from specdec_triton.tools import goodness_of_fit

from . import exact, mutants, table_models

SAMPLES, MANY_SAMPLES = 20_000, 100_000
RATE = 0.01  # the rate of false alarms among alarms
ALARM = 1e-6  # p-values of mutants are below this, those of the rules far above

# models, and the length of their texts. This draft is independent of the target: most drafts are rejected
WIDE = table_models.TableModels.random(vocab=5, seed=2, spread=1.0, agreement=0.0), 2
# longer texts and more -inf, ties and equal distributions
LONG = table_models.TableModels.random(vocab=3, seed=1, spread=1.5, agreement=0.3), 3

CHAINS = ("sampled chain", "sampled chain without", "one-hot chain")
TREES = ("tree with replacement", "tree without replacement", "ranked tree")
COUPLED_DRAFTS = ("coupled chain", "coupled tree")
LEGAL = [
    *itertools.product(("coupled", "multi_round", "traversal"), ("sampled chain", "one-hot chain", *TREES)),
    *itertools.product(("rejection", "block"), CHAINS),
    ("coupled", "no draft"),
    *itertools.product(("coupled",), COUPLED_DRAFTS),
]

ALONE = ("temperature", "top_k", "top_p", "min_p")


def ways(pair, samples) -> tuple[str, ...]:
    """The filter options for a rule and tree: all, or at fewer samples no filters, every filter, and a single one."""
    if samples == MANY_SAMPLES:
        return tuple(table_models.OPTIONS)
    return "plain", "all", ALONE[LEGAL.index(pair) % len(ALONE)]


@functools.cache
def text_probs(setup, options: str):
    models, length = setup
    return models.text_probs(table_models.OPTIONS[options], length)


@functools.cache
def run(setup, rule, tree, options):
    models, length = setup
    return table_models.generate(models, rule, tree, table_models.OPTIONS[options], length, SAMPLES)


@functools.cache
def examined(setup, rule, tree, options, samples):
    if samples == SAMPLES:
        counts = run(setup, rule, tree, options).counts
    else:  # too large for the cache
        counts = table_models.generate(setup[0], rule, tree, table_models.OPTIONS[options], setup[1], samples).counts
    return goodness_of_fit.examine(counts, text_probs(setup, options))


@functools.cache
def bracket(setup, options, samples):
    return goodness_of_fit.null_bracket(text_probs(setup, options), samples, confidence=1 - 1e-4)


def hold(setup, rule, tree, samples):
    for options in ways((rule, tree), samples):
        cell = examined(setup, rule, tree, options, samples)
        high = bracket(setup, options, samples)[1]
        assert cell.low == 0 and cell.distance <= high, f"{rule}, {tree}, {options}: {cell}"


def hold_all(setup, samples):
    cells = [(*pair, options) for pair in LEGAL for options in ways(pair, samples)]
    p_values = [examined(setup, *cell, samples).p_value for cell in cells]
    alarms = goodness_of_fit.benjamini_hochberg(p_values, RATE)
    assert not any(alarms), [cell for cell, alarm in zip(cells, alarms, strict=True) if alarm]


@pytest.mark.parametrize(("rule", "tree"), LEGAL, ids=lambda name: name.replace(" ", "-"))
def test_total_variation_is_that_of_true_samples(rule, tree):
    hold(WIDE, rule, tree, SAMPLES)


def test_g_tests_over_all_cells():
    hold_all(WIDE, SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("setup", [WIDE, LONG], ids=["wide", "long"])
@pytest.mark.parametrize(("rule", "tree"), LEGAL, ids=lambda name: name.replace(" ", "-"))
def test_many_samples(rule, tree, setup):
    hold(setup, rule, tree, MANY_SAMPLES)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("setup", [WIDE, LONG], ids=["wide", "long"])
def test_g_tests_of_many_samples(setup):
    hold_all(setup, MANY_SAMPLES)


@pytest.mark.parametrize("options", table_models.OPTIONS)
def test_coupled_gives_the_same_text_with_every_tree_and_without_one(options):
    wanted = run(WIDE, "coupled", "no draft", options).text
    for rule, tree in LEGAL:
        if rule == "coupled":
            assert torch.equal(run(WIDE, rule, tree, options).text, wanted), tree


@pytest.mark.parametrize(("rule", "tree"), LEGAL, ids=lambda name: name.replace(" ", "-"))
def test_tokens_after_which_the_target_is_nan_keep_their_probability(rule, tree):
    """The logits after three of the five tokens are NaN, so a text may end there, but neither earlier nor later."""
    models, _ = WIDE
    broken = table_models.TableModels(models.target.clone(), models.draft)
    broken.target[models.vocab, 1:4, 2:] = float("nan")
    for options in ("plain", "all"):
        found = table_models.generate(broken, rule, tree, table_models.OPTIONS[options], 1, SAMPLES)
        cell = goodness_of_fit.examine(found.counts, models.text_probs(table_models.OPTIONS[options], 1))
        assert cell.p_value > 1e-4, f"{rule}, {tree}, {options}: {cell}"


# Through the kernel in fp16: logits are below 0, and the first ones have fewer finite values than top-k. In half
# precision a threshold is rebuilt from a part of its bits.
HALF = table_models.TableModels(*((table - 9).half() for table in (WIDE[0].target, WIDE[0].draft)))
HALF.target[-1, -1, [0, 3, 4]] = -torch.inf


def kernel_cell(rule, tree, options, length, samples):
    found = table_models.generate(HALF, rule, tree, options, length, samples, impl="triton")
    return goodness_of_fit.examine(found.counts, HALF.text_probs(options, length))


# the interpreter takes a tenth of a second a row, so there are few rows of one token
def test_the_kernel_in_half_precision():
    cell = kernel_cell("coupled", "no draft", {"top_k": 3}, 1, 40)
    assert cell.p_value > 1e-4, cell


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter uses the patched function")
def test_a_threshold_of_the_wrong_bits_is_rejected(monkeypatch):
    from specdec_triton.kernels import _filters

    monkeypatch.setattr(_filters, "value_of_shifted", lambda shifted, SHIFT: _filters.value_of(shifted << SHIFT))
    assert kernel_cell("coupled", "no draft", {"top_k": 3}, 1, 40).p_value < ALARM


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", table_models.OPTIONS)
@pytest.mark.parametrize(("rule", "tree"), LEGAL, ids=lambda name: name.replace(" ", "-"))
def test_the_kernel_in_half_precision_at_length(rule, tree, options):
    cell = kernel_cell(rule, tree, table_models.OPTIONS[options], 2, 500)
    assert cell.p_value > 1e-6, cell


def mutant_cells(cases, patched):
    for name, (_, names, tree, options) in cases.items():
        for rule in names:
            yield pytest.param(name, rule, tree, options, patched, id=f"{name}-{rule}".replace(" ", "-"))


@pytest.mark.parametrize(
    ("name", "rule", "tree", "options", "patched"),
    [*mutant_cells(mutants.PATCHES, True), *mutant_cells(mutants.DRAFTS, False)],
)
def test_mutants_are_rejected(monkeypatch, name, rule, tree, options, patched):
    models, length = WIDE
    if patched:
        mutants.PATCHES[name][0](monkeypatch)
        found = table_models.generate(models, rule, tree, table_models.OPTIONS[options], length, SAMPLES)
    else:
        wrong = mutants.DRAFTS[name][0]
        found = table_models.generate(models, rule, tree, table_models.OPTIONS[options], length, SAMPLES, draft=wrong)
    cell = goodness_of_fit.examine(found.counts, text_probs(WIDE, options))
    assert cell.p_value < ALARM and cell.distance > bracket(WIDE, options, SAMPLES)[1], cell


@pytest.mark.parametrize("tree", ["sampled chain", *TREES])
@pytest.mark.parametrize("options", table_models.OPTIONS)
def test_typical_acceptance_is_rejected(options, tree):
    models, length = WIDE
    found = table_models.generate(models, "typical", tree, table_models.OPTIONS[options], length, SAMPLES)
    cell = goodness_of_fit.examine(found.counts, text_probs(WIDE, options))
    assert cell.p_value < ALARM and cell.low > 0, cell


# Exact results of a round: every draft and every outcome of chance is enumerated in float64


def distributions(setup, options=None):
    """text -> [V] float64: the target's and the draft's distributions after it."""
    models, _ = setup
    given = table_models.filters(options or {}, 1)

    def probs(table):
        def after(text):
            earlier, later = (models.vocab, models.vocab, *text)[-2:]
            row = filtered_log_probs(table[earlier, later][None, None], given)[0, 0].double().exp().numpy()
            return row / row.sum()

        return functools.cache(after)

    return probs(models.target), probs(models.draft)


@functools.cache
def exactly(setup, rule, tree, options="plain", horizon=1):
    topology, _, sampling = table_models.TREES[tree]
    target_of, draft_of = distributions(setup, table_models.OPTIONS[options])
    return exact.one_round(exact.RULES[rule], topology.parents, target_of, draft_of, sampling, horizon)


@functools.cache
def accepted(setup, rule, tree, options="plain"):
    """The expected number of accepted tokens of a round."""
    if rule == "coupled":
        topology, *_ = table_models.TREES[tree]
        return exact.coupled_accepted(topology, *distributions(setup, table_models.OPTIONS[options]))
    return exactly(setup, rule, tree, options)[0]


DRAWN = [
    *itertools.product(("rejection", "block", "multi_round", "traversal"), ("sampled chain",)),
    *itertools.product(("multi_round", "traversal"), ("tree with replacement", "tree without replacement")),
]


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize(("rule", "tree"), DRAWN, ids=lambda name: name.replace(" ", "-"))
def test_the_rules_are_exact_on_paper(rule, tree, options):
    _, found = exactly(LONG, rule, tree, options, 3)
    np.testing.assert_allclose(found.flatten(), text_probs(LONG, options), atol=1e-7)  # the models' logits are fp32
    assert found.sum() == pytest.approx(1, abs=1e-12)


MEASURED = [*itertools.product(("coupled",), COUPLED_DRAFTS), *DRAWN]


@pytest.mark.parametrize(("rule", "tree"), MEASURED, ids=lambda name: name.replace(" ", "-"))
def test_acceptance_is_the_exact_one(rule, tree):
    for options in ("plain", "all"):
        wanted = accepted(WIDE, rule, tree, options)
        measured = run(WIDE, rule, tree, options).accepted.double()
        assert float(measured.mean()) == pytest.approx(wanted, abs=4 * float(measured.std()) / SAMPLES**0.5)


@pytest.mark.parametrize("setup", [WIDE, LONG], ids=["wide", "long"])
def test_on_chains_block_accepts_most_and_traversal_is_block(setup):
    found = {rule: accepted(setup, rule, "sampled chain") for rule in exact.RULES}
    assert found["block"] > found["rejection"]
    assert found["multi_round"] == pytest.approx(found["rejection"], abs=1e-12)
    assert found["traversal"] == pytest.approx(found["block"], abs=1e-12)


def test_traversal_is_block_on_chains_token_for_token():
    for tree in CHAINS:
        block, traversal = (
            table_models.generate(WIDE[0], rule, tree, {}, 2, 2000).text for rule in ("block", "traversal")
        )
        assert torch.equal(block, traversal)


def test_every_illegal_combination_is_refused():
    refused = []
    for rule, (tree, (topology, _, sampling)) in itertools.product(rules.RULES, table_models.TREES.items()):
        try:
            rules.check_legal(rule, sampling, topology.is_chain)
        except ValueError as refusal:
            assert rule in str(refusal) and "tree" in str(refusal)
            refused.append((rule, tree))
    assert refused == [*itertools.product(("rejection", "block"), (*TREES, "coupled tree"))]


def test_target_and_draft_may_have_different_filters():
    """A draft may be drawn under other filters than the target's if the rule gets them."""
    models, length = WIDE
    options = {"temperature": 0.7, "top_k": 3}

    def draft(models, tree, root, seeds, position, _):
        return table_models.draft_tree(models, tree, root, seeds, position, options)

    for rule, tree in (("block", "sampled chain"), ("traversal", "tree without replacement")):
        found = table_models.generate(models, rule, tree, {}, length, SAMPLES, draft=draft)
        assert goodness_of_fit.examine(found.counts, text_probs(WIDE, "plain")).p_value > 1e-3
