"""Sampled acceptance against the rules of the papers on single rows, by hand and at random, and in numerical edge
cases."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossless import exact
from specdec_triton import DraftTree, Topology, ops
from specdec_triton.ops import noise, rules
from specdec_triton.ops.filters import Filters, filtered_log_probs

INF, NAN = float("inf"), float("nan")


def logs(*probs):
    return [math.log(prob) if prob else -INF for prob in probs]


def accept(logits, tokens, parents, rule, *, draft=None, sampling="without", rows=1, seeds=None, **options):
    """Apply a rule to one tree with many seeds. logits and draft are N lists of V numbers; row i of the draft is for
    the children of node i."""

    def repeat(values, dtype):
        return torch.tensor([values] * rows, dtype=dtype)

    drawn = {}
    if draft is not None:
        row = [i if numbers is not None else -1 for i, numbers in enumerate(draft)]
        filled = [numbers if numbers is not None else [NAN] * len(logits[0]) for numbers in draft]
        drawn = {"draft_logits": repeat(filled, torch.float32), "draft_row": repeat(row, torch.int32)}
    return ops.accept_sample(
        repeat(logits, torch.float32),
        repeat(tokens, torch.int64),
        repeat(parents, torch.int32),
        rule=rule,
        seeds=torch.arange(rows) if seeds is None else seeds,
        position=torch.full((rows,), 11),
        max_depth=options.pop("max_depth", len(tokens) - 1),
        sampling=sampling if draft is not None else "none",
        **drawn,
        **options,
    )


def share(result, node):
    """The share of walks that end at `node`, and the distribution of the next token in them."""
    last = torch.where(
        result.length > 0, result.path.gather(1, (result.length - 1).clamp(min=0)[:, None]).squeeze(1).long(), 0
    )
    here = last == node
    following = torch.bincount(result.next_ids[here], minlength=4).double()
    return float(here.double().mean()), (following / following.sum().clamp(min=1)).tolist()


MANY = 20_000
NEAR = {"abs": 4 * 0.5 / MANY**0.5}


@pytest.mark.parametrize("rule", ["rejection", "block", "multi_round", "traversal"])
def test_one_drawn_token_by_hand(rule):
    """Target (1/2, 1/4, 1/4), draft (1/4, 3/4, 0). Token 1 was drawn and is accepted with 1/3; otherwise the residual
    is (1/4, 0, 1/4)."""
    target, draft = logs(0.5, 0.25, 0.25), logs(0.25, 0.75, 0)
    result = accept([target, logs(0, 0, 1)], [0, 1], [-1, 0], rule, draft=[draft, None], rows=MANY)
    chance, following = share(result, 1)
    assert chance == pytest.approx(1 / 3, **NEAR) and following == [0, 0, 1, 0]
    chance, following = share(result, 0)
    assert following[1] == 0 and following[0] == pytest.approx(0.5, abs=0.02)
    # token 0 is always accepted
    certain = accept([target, logs(0, 0, 1)], [0, 0], [-1, 0], rule, draft=[draft, None], rows=500)
    assert bool((certain.length == 1).all())


@pytest.mark.parametrize(("sampling", "stays"), [("with", 1.0), ("without", 0.5)])
def test_the_second_sibling_by_hand(sampling, stays):
    """Target (1/2, 1/5, 3/10), draft (1/5, 3/5, 1/5); 1 and then 2 were drawn.

    Token 1 is accepted with 1/3. Otherwise the residual is (3/10, 0, 1/10), normalised (3/4, 0, 1/4). Token 2 was drawn
    with 1/5, or with 1/2 without replacement. In the latter case it is accepted with 1/2; if it is rejected, the
    residual (3/4, 0, 1/4) - (1/2, 0, 1/2) contains only token 0.
    """
    result = accept(
        [logs(0.5, 0.2, 0.3), logs(1, 0, 0), logs(1, 0, 0)], [0, 1, 2], [-1, 0, 0], "multi_round",
        draft=[logs(0.2, 0.6, 0.2), None, None], sampling=sampling, rows=MANY,
    )  # fmt: skip
    assert share(result, 1)[0] == pytest.approx(1 / 3, **NEAR)
    assert share(result, 2)[0] == pytest.approx(2 / 3 * stays, **NEAR)
    if stays < 1:
        assert share(result, 0)[1] == [1, 0, 0, 0]


@pytest.mark.parametrize("rule", ["multi_round", "traversal"])
def test_repeated_siblings_without_chance(rule):
    """Token 1 twice, then 2. The second 1 has no effect."""
    result = accept([logs(0.4, 0.35, 0.25), *[logs(1, 0, 0)] * 3], [0, 1, 1, 2], [-1, 0, 0, 0], rule, rows=MANY)
    assert share(result, 1)[0] == pytest.approx(0.35, **NEAR)
    assert share(result, 2)[0] == 0
    assert share(result, 3)[0] == pytest.approx(0.25, **NEAR)
    assert share(result, 0)[1] == [1, 0, 0, 0]


def test_traversal_by_hand():
    """The token-level probability 1/2 x 1 becomes min(1/2 x 4/3, 1) for the pair: the first example of the paper."""
    target = [logs(0.3, 0.7), logs(0.8, 0.2), logs(0.5, 0.5)]
    draft = [logs(0.6, 0.4), logs(0.6, 0.4), None]
    pair = accept(target, [0, 0, 0], [-1, 0, 1], "traversal", draft=draft, rows=MANY)
    assert share(pair, 2)[0] == pytest.approx(2 / 3, **NEAR)
    one_by_one = accept(target, [0, 0, 0], [-1, 0, 1], "rejection", draft=draft, rows=MANY)
    assert share(one_by_one, 2)[0] == pytest.approx(1 / 2, **NEAR)


def test_typical_by_hand():
    """A flat target accepts every token, a peaked one only its most likely token. The deepest accepted path is
    taken."""
    flat, sharp = logs(0.25, 0.25, 0.25, 0.25), logs(0.01, 0.97, 0.01, 0.01)
    result = accept([flat, sharp, sharp, flat], [0, 2, 3, 1], [-1, 0, 0, 2], "typical", rows=50)
    assert result.path[:, :2].tolist() == [[2, 3]] * 50
    result = accept([sharp, flat, flat, flat], [0, 2, 3, 1], [-1, 0, 0, 2], "typical", rows=50)
    assert result.length.tolist() == [0] * 50


@pytest.mark.parametrize("rule", ["rejection", "block", "multi_round", "traversal"])
def test_equal_distributions_accept_everything(rule):
    numbers = torch.randn(3, 40, generator=torch.Generator().manual_seed(3)).tolist()
    result = accept(numbers, [0, 5, 39], [-1, 0, 1], rule, draft=[*numbers[:2], None], rows=3000)
    assert bool((result.length == 2).all())


@pytest.mark.parametrize("rule", rules.RULES)
def test_eos_and_budget_cut_the_emitted_tokens(rule):
    """A chain that every rule accepts: 1, 2, 3, and then 0."""
    logits = [[0.0 if token == (node + 1) % 4 else -INF for token in range(4)] for node in range(4)]
    chain = ([0, 1, 2, 3], [-1, 0, 1, 2])

    def emitted(result):
        return result.path[0].tolist(), int(result.length), int(result.next_ids)

    assert emitted(accept(logits, *chain, rule)) == ([1, 2, 3], 3, 0)
    assert emitted(accept(logits, *chain, rule, eos_ids=torch.tensor([9, 2]))) == ([1, -1, -1], 1, 2)
    assert emitted(accept(logits, *chain, rule, eos_ids=torch.tensor([0]))) == ([1, 2, 3], 3, 0)
    assert emitted(accept(logits, *chain, rule, budget=torch.tensor([3]))) == ([1, 2, -1], 2, 3)
    assert emitted(accept(logits, *chain, rule, budget=torch.tensor([1]))) == ([-1, -1, -1], 0, 1)
    assert emitted(accept(logits, *chain, rule, budget=torch.tensor([0]))) == ([-1, -1, -1], 0, -1)
    assert emitted(accept(logits, *chain, rule, max_depth=1)) == ([1], 1, 2)
    both = accept(logits, *chain, rule, budget=torch.tensor([2]), eos_ids=torch.tensor([1]))
    assert emitted(both) == ([-1, -1, -1], 0, 1)


@pytest.mark.parametrize("rule", rules.RULES)
def test_nan_is_reported_where_it_matters(rule):
    logits = [[0.0 if token == (node + 1) % 4 else -INF for token in range(4)] for node in range(3)]
    chain = ([0, 1, 2], [-1, 0, 1])
    assert not accept(logits, *chain, rule).has_nan.any()
    for node, entry in itertools.product(range(3), (NAN, INF)):
        broken = [list(numbers) for numbers in logits]
        broken[node][2] = entry
        assert accept(broken, *chain, rule).has_nan.tolist() == [True], (node, entry)
        assert not accept(broken, *chain, rule, budget=torch.tensor([0])).has_nan.any()
        # cut before it is reached
        assert accept(broken, *chain, rule, budget=torch.tensor([1])).has_nan.tolist() == [node == 0]
    nothing = [logits[0], [-INF] * 4, logits[2]]
    assert accept(nothing, *chain, rule).has_nan.tolist() == [True]
    aside = [logits[0], logits[1], [NAN] * 4]  # a sibling that the target does not choose
    assert not accept(aside, [0, 1, 3], [-1, 0, 0], rule).has_nan.any()


@pytest.mark.parametrize("rule", ["rejection", "block", "multi_round", "traversal"])
def test_a_draft_without_probabilities_costs_acceptance_only(rule):
    target = [logs(0.5, 0.3, 0.2), logs(1, 0, 0)]
    for draft in ([NAN] * 3, [-INF] * 3, None):
        result = accept(target, [0, 1], [-1, 0], rule, draft=[draft, None], rows=MANY)
        assert bool((result.length == 0).all()) and not result.has_nan.any()
        assert share(result, 0)[1][:3] == pytest.approx([0.5, 0.3, 0.2], **NEAR)


@pytest.mark.parametrize("rule", ["multi_round", "traversal"])
def test_exhausted_support(rule):
    """Two tokens can be drawn. A third child carries one of them again, or a token of probability 0."""
    target, draft = logs(0.25, 0.25, 0.25, 0.25), logs(0.5, 0.5, 0, 0)
    for third in (0, 1, 2):
        result = accept([target] * 4, [0, 0, 1, third], [-1, 0, 0, 0], rule, draft=[draft, None, None, None], rows=MANY)
        assert share(result, 3)[0] == 0
        assert share(result, 1)[0] == pytest.approx(0.5, **NEAR)
        # the residual (0, 0, 1/4, 1/4) is 0 at the second token
        assert share(result, 2)[0] == 0 and share(result, 0)[1][2] == pytest.approx(0.5, abs=0.02)


def test_a_confident_draft_keeps_its_digits():
    """A token of mass 1 - 9e-8 was drawn and rejected. fp32 cannot represent this number, but the remaining draft mass
    matters."""
    rest = 3e-8
    target, draft = logs(0.1, 0.1, 0.4, 0.4), logs(1 - 3 * rest, rest, rest, rest)
    result = accept([target] * 3, [0, 0, 1], [-1, 0, 0], "multi_round", draft=[draft, None, None], rows=MANY)
    assert share(result, 1)[0] == pytest.approx(0.1, **NEAR)
    # 1/9 of the target's residual, drawn with 1/3
    assert share(result, 2)[0] == pytest.approx(0.9 / 3, **NEAR)


def test_nothing_left_by_rounding():
    """If the residual has mass 0, no more children are accepted, and the next token is the target's own."""
    target = torch.tensor([[0.25, 0.75, 0.0, 0.0]]).expand(MANY, -1)
    for draft in (None, torch.full((MANY, 4), 0.25)):
        zeros, ones = torch.zeros(MANY), torch.ones(MANY)
        nothing = rules.Siblings(torch.zeros(MANY, 4), zeros, zeros, draft, ones, ones.bool())
        chance, drawn = rules.acceptance(nothing, torch.ones(MANY).long())
        assert bool(drawn.all()) and not chance.any()
        nodes = torch.zeros(MANY, 1, dtype=torch.int64)
        round = rules.SampledRound(
            tokens=nodes, parents=nodes - 1, max_depth=0, log_probs=lambda node: target.log(), draft_probs=None,
            draft_row=None, replaces=True, seeds=torch.arange(MANY), position=torch.full((MANY,), 3),
        )  # fmt: skip
        assert bool(rules.passes(round, round.roots, rules.leaf_accept_prob(nothing)).all())
        following = torch.bincount(rules.next_token(round, round.roots, nothing), minlength=4) / MANY
        assert following.tolist() == pytest.approx([0.25, 0.75, 0, 0], **NEAR)


@pytest.mark.parametrize(
    ("rule", "topology"),
    [
        *((rule, Topology.chain(4)) for rule in rules.RULES),
        *((rule, Topology((-1, 0, 1, 1, 3), (0, 0, 0, 1, 0))) for rule in rules.RULES if rule not in rules.CHAIN_RULES),
    ],
    ids=lambda value: value if isinstance(value, str) else "chain" if value.is_chain else "tree",
)
def test_greedy_rows_walk_greedily(rule, topology):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 4, (60, 5, 6), generator=generator).float()
    tokens = torch.randint(0, 6, (60, 5), generator=generator)
    best = logits.argmax(-1)
    tokens[:, 1], tokens[:, 2] = best[:, 0], best[:, 1]
    tree = DraftTree.from_topology(topology, tokens)
    chance = torch.where(torch.arange(60) % 2 == 0, 0.0, 1.0)
    options = {"max_depth": topology.max_depth, "eos_ids": torch.tensor([2]), "budget": torch.arange(60) % 5}
    wanted = ops.accept_greedy(logits, tree.tokens, tree.parents, **options)
    got = ops.accept_sample(
        logits, tree.tokens, tree.parents, rule=rule, seeds=torch.arange(60), position=torch.arange(60),
        filters=Filters(temperature=chance), **options,
    )  # fmt: skip
    assert wanted.length[::2].max() > 1
    for name in ("path", "length", "next_ids"):
        assert torch.equal(getattr(got, name)[::2], getattr(wanted, name)[::2]), name


def test_coupled_follows_its_noise():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    seed, position = torch.tensor([77]), torch.tensor([11])
    row = [noise.gumbel(seed, position + 1 + depth, 0, noise.COUPLED, 30)[0] for depth in range(3)]
    first = int((logits[0] + row[0]).argmax())
    second = int((logits[2] + row[1]).argmax())
    third = int((logits[4] + row[2]).argmax())
    other = (first + 1) % 30
    result = accept(logits.tolist(), [0, other, first, other, second], [-1, 0, 0, 1, 2], "coupled", seeds=seed)
    assert (result.path[0, :2].tolist(), int(result.length), int(result.next_ids)) == ([2, 4], 2, third)


def cases():
    """A random tree and distributions with zeros, ties, one-token nuclei and equal entries, with tokens that could be
    drawn."""
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 10**6),
            "nodes": st.integers(1, 7),
            "vocab": st.integers(1, 5),
            "sampling": st.sampled_from(rules.SAMPLING),
            "zeros": st.sampled_from([0.0, 0.3, 0.7]),
            "chain": st.booleans(),
        }
    )


def random_tree(seed, nodes, vocab, sampling, zeros, chain):
    random = np.random.default_rng(seed)

    def distribution():
        weights = random.integers(1, 4, vocab) * random.choice([1.0, 1.0, 30.0], vocab)
        weights = weights * (random.random(vocab) >= zeros)
        weights[random.integers(vocab)] += weights.sum() == 0
        return weights / weights.sum()

    parents, tokens = [-1], [0]
    target = [distribution() for _ in range(nodes)]
    draft = [target[i] if random.random() < 0.2 else distribution() for i in range(nodes)]
    used = {}
    for node in range(1, nodes):
        parent = node - 1 if chain else int(random.integers(0, node))
        while parent > 0 and parents[parent] < 0:
            parent = parent - 1
        offered = draft[parent].copy() if sampling != "none" else np.ones(vocab)
        if sampling == "without":
            offered[used.get(parent, [])] = 0
        # exhausted support: sometimes with a token nevertheless
        real = offered.sum() > 0 and (chain and (parent == node - 1) or not chain and random.random() > 0.1)
        tokens.append(int(random.choice(vocab, p=offered / offered.sum())) if real else int(random.integers(vocab)))
        parents.append(parent if real or (offered.sum() == 0 and parent == node - 1) else -1)
        used.setdefault(parent, []).append(tokens[-1])
    return exact.Tree(parents, tokens, target, None if sampling == "none" else draft, sampling == "with")


def run_case(tree, sampling, rule, rows, **options):
    with np.errstate(divide="ignore"):
        draft = None if tree.draft is None else [np.log(row).tolist() for row in tree.draft]
        return accept(
            [np.log(row).tolist() for row in tree.target], tree.tokens, tree.parents, rule,
            draft=draft, sampling=sampling, rows=rows, **options,
        )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(case=cases(), rule=st.sampled_from(sorted(exact.RULES)))
def test_every_decision_follows_the_paper(case, rule):
    """In float64, one row at a time, the same random numbers give the same decisions, and the next token is a possible
    one."""
    tree, rows = random_tree(**case), 16
    if rule in rules.CHAIN_RULES and case["sampling"] != "none" and not case["chain"]:
        return
    result = run_case(tree, case["sampling"], rule, rows)
    uniforms = noise.uniform(
        torch.arange(rows)[:, None], torch.full((rows, 1), 11), torch.arange(case["nodes"]), noise.ACCEPT
    ).double()
    assert not result.has_nan.any()
    for row in range(rows):
        close = False

        def decide(node, chance, row=row):
            nonlocal close
            close |= abs(float(uniforms[row, node]) - chance) < 1e-5
            return float(uniforms[row, node]) < chance

        last, following = exact.RULES[rule](tree, decide)
        if not close:
            wanted = exact.path(tree, last)
            assert result.path[row, : len(wanted)].tolist() == wanted and int(result.length[row]) == len(wanted)
            assert following[int(result.next_ids[row])] > 1e-7


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    rule=st.sampled_from(sorted(rules.RULES)),
    budget=st.integers(0, 8),
    eos=st.none() | st.integers(0, 4),
    options=st.fixed_dictionaries(
        {
            "temperature": st.none() | st.sampled_from([0.0, 0.5, 1.0, 4.0]),
            "top_k": st.none() | st.integers(0, 6),
            "top_p": st.none() | st.sampled_from([0.0, 0.5, 1.0]),
            "min_p": st.none() | st.sampled_from([0.0, 0.4, 1.0]),
        }
    ),
)
def test_emitted_tokens_are_possible(case, rule, budget, eos, options):
    """With any filters, no impossible token is emitted, the budget is not exceeded, and the results are consistent."""
    tree, rows = random_tree(**case), 8
    if rule in rules.CHAIN_RULES and not case["chain"]:
        return
    dtypes = ops.FILTER_DTYPES
    made = {
        name: torch.full((rows,), value, dtype=dtypes[name]) for name, value in options.items() if value is not None
    }
    budgets = torch.full((rows,), budget)
    eos_ids = None if eos is None else torch.tensor([eos])
    extra = {"draft_filters": Filters(**made)} if tree.draft is not None else {}
    result = run_case(
        tree, case["sampling"], rule, rows, filters=Filters(**made), budget=budgets, eos_ids=eos_ids, **extra
    )
    with np.errstate(divide="ignore"):
        target = torch.tensor(np.log(np.array(tree.target)), dtype=torch.float32)[None].expand(rows, -1, -1)
    possible = filtered_log_probs(target, Filters(**made)).isfinite()
    assert not result.has_nan.any()
    for row in range(rows):
        path, length = result.path[row].tolist(), int(result.length[row])
        assert path[length:] == [-1] * (len(path) - length) and length <= max(0, budget - 1)
        if not budget:
            assert int(result.next_ids[row]) == -1
            continue
        nodes = [0, *path[:length]]
        said = [tree.tokens[node] for node in nodes[1:]] + [int(result.next_ids[row])]
        assert all(tree.parents[child] == parent for parent, child in itertools.pairwise(nodes))
        # typical acceptance also accepts only tokens that the target may emit
        assert all(bool(possible[row, node, token]) for node, token in zip(nodes, said, strict=True))
        assert eos not in said[:-1]


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(5)
    logits, draft = torch.randn(2, 7, 4, 9, generator=generator)
    tokens = torch.randint(0, 9, (7, 4), generator=generator)
    parents = torch.tensor([[-1, 0, 0, 1]] * 7).int()
    seeds, position = torch.randint(-(2**62), 2**62, (7,), generator=generator), torch.arange(7) * 3
    order = torch.randperm(7, generator=generator)
    for rule in ("coupled", "multi_round", "traversal", "typical"):

        def call(rows, rule=rule):
            return ops.accept_sample(
                logits[rows], tokens[rows], parents[rows], rule=rule, seeds=seeds[rows], position=position[rows],
                max_depth=2, sampling="with", draft_logits=draft[rows, :2], draft_row=(parents[rows] + 1).clamp(max=1),
            )  # fmt: skip

        together = call(order)
        alone = [call(order[place : place + 1]) for place in range(7)]
        for name in together._fields:
            assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone])), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_count_in_fp32(dtype):
    logits = torch.randn(30, 3, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens, parents = torch.tensor([[0, 4, 7]] * 30), torch.tensor([[-1, 0, 1]] * 30).int()
    for rule in rules.RULES:
        results = [
            ops.accept_sample(
                given, tokens, parents, rule=rule, seeds=torch.arange(30), position=torch.arange(30), max_depth=2
            )
            for given in (logits, logits.float())
        ]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_an_out_of_range_token_is_padding():
    for rule in rules.RULES:
        result = accept([logs(0, 1, 0)] * 3, [999, -1, 1], [-1, 0, 0], rule)
        assert int(result.length) == (rule not in rules.CHAIN_RULES)  # node 2 is not the child of node 1
        assert int(accept([logs(0, 1, 0)] * 2, [-7, 3], [-1, 0], rule).length) == 0


@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("rule", rules.RULES)
def test_nothing_is_read_on_the_host(rule, most):
    """A meta tensor has no values, so reading one raises an error."""
    batch, nodes, vocab = 2, 5, 8
    on = {"device": "meta"}
    filters = Filters(*(torch.empty(batch, dtype=dtype, **on) for dtype in ops.FILTER_DTYPES.values()), most)
    result = ops.accept_sample(
        torch.empty(batch, nodes, vocab, **on),
        torch.empty(batch, nodes, dtype=torch.int64, **on),
        torch.empty(batch, nodes, dtype=torch.int32, **on),
        rule=rule,
        seeds=torch.empty(batch, dtype=torch.int64, **on),
        position=torch.empty(batch, dtype=torch.int64, **on),
        filters=filters,
        max_depth=3,
        budget=torch.empty(batch, dtype=torch.int64, **on),
        eos_ids=torch.empty(2, dtype=torch.int64, **on),
        sampling="without",
        draft_logits=torch.empty(batch, 2, vocab, **on),
        draft_row=torch.empty(batch, nodes, dtype=torch.int32, **on),
        draft_filters=filters,
    )
    assert result.path.shape == (batch, 3) and result.path.dtype == torch.int32
    assert [field.dtype for field in result[1:]] == [torch.int64, torch.int64, torch.bool]


VALID = {
    "logits": torch.zeros(1, 3, 4),
    "tokens": torch.zeros(1, 3, dtype=torch.int64),
    "parents": torch.tensor([[-1, 0, 1]], dtype=torch.int32),
    "rule": "multi_round",
    "seeds": torch.zeros(1, dtype=torch.int64),
    "position": torch.zeros(1, dtype=torch.int64),
    "max_depth": 2,
    "sampling": "with",
    "draft_logits": torch.zeros(1, 2, 4),
    "draft_row": torch.tensor([[0, 1, -1]], dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(3, 4)}, "logits must be fp32, bf16 or fp16"),
        ({"tokens": torch.zeros(1, 2, dtype=torch.int64)}, r"tokens must be torch.int64 \[1, 3\]"),
        ({"parents": torch.zeros(1, 3, dtype=torch.int64)}, r"parents must be torch.int32 \[1, 3\]"),
        ({"max_depth": 3}, "max_depth must be 0 to 2 for 3 nodes"),
        ({"budget": torch.zeros(1)}, r"budget must be torch.int64 \[1\]"),
        ({"eos_ids": torch.zeros(1, 1, dtype=torch.int64)}, r"eos_ids must be torch.int64 \[E\]"),
        ({"seeds": torch.zeros(1)}, r"seeds must be torch.int64 \[1\]"),
        ({"position": torch.zeros(2, dtype=torch.int64)}, r"position must be torch.int64 \[1\]"),
        ({"position": torch.zeros(1, dtype=torch.int64, device="meta")}, "position must be on cpu"),
        ({"filters": (None, None, None, None)}, "filters must be a Filters, got tuple"),
        ({"filters": Filters(temperature=torch.ones(1).double())}, r"filters.temperature must be torch.float32 \[1\]"),
        ({"filters": Filters(top_k=[2])}, "filters.top_k must be a tensor, got list"),
        ({"filters": Filters(top_k=torch.ones(2).long())}, r"filters.top_k must be torch.int64 \[1\]"),
        ({"filters": Filters(max_top_k=2)}, "filters.max_top_k must be None, or at least 1 with a top_k, got 2"),
        (
            {"filters": Filters(top_k=torch.ones(1).long(), max_top_k=0)},
            "filters.max_top_k must be None, or at least 1",
        ),
        ({"draft_filters": Filters(top_p=torch.ones(1, 1))}, r"draft_filters.top_p must be torch.float64 \[1\]"),
        ({"draft_logits": torch.zeros(1, 2, 5)}, r"draft_logits must be fp32, bf16 or fp16 \[1, P, 4\]"),
        ({"draft_row": torch.zeros(1, 3)}, r"draft_row must be torch.int32 \[1, 3\]"),
        ({"draft_row": None}, "draft_logits and draft_row must both be given"),
        ({"sampling": "none"}, 'draft_logits must be None with sampling="none", got a tensor'),
        ({"draft_logits": None, "draft_row": None}, 'draft_logits must be given with rule "multi_round"'),
        ({"sampling": "some"}, 'rule "multi_round": sampling must be one of none, with, without'),
        ({"rule": "greedy"}, 'rule "greedy" is ops.accept_greedy'),
        ({"rule": "greed"}, "rule must be one of greedy, coupled"),
        ({"impl": "cuda"}, "impl must be None"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^accept_sample: {message}"):
        ops.accept_sample(**{**VALID, **changes})
    ops.accept_sample(**VALID)


def test_legal_trees():
    for rule, sampling in itertools.product(("greedy", *rules.RULES), rules.SAMPLING):
        rules.check_legal(rule, sampling, is_chain=True)
        if rule not in rules.CHAIN_RULES:
            rules.check_legal(rule, sampling, is_chain=False)
    for rule, (sampling, words) in itertools.product(
        rules.CHAIN_RULES, {"none": "chosen without sampling", "with": "with rep", "without": "without rep"}.items()
    ):
        with pytest.raises(ValueError, match=f'rule "{rule}" needs a chain, got a tree .*{words}'):
            rules.check_legal(rule, sampling, is_chain=False)
