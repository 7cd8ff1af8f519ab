"""Suffix decoding against a literal statement, the text of calls, and the life cycle of a drafter that outlives them.

`literal_suffix.py` counts by scanning all texts. A session must propose the same tokens with the same chances. Equally
likely tokens may be drafted in any order.
"""

import concurrent.futures
import copy
import os
import pickle
import signal
import sys
import threading
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.streamers import BaseStreamer

import literal_suffix as literal
import specdec_triton as sdt
import tiny
from families import NEVER, PAD, VOCAB, build, prompt
from helpers import capture_here, context, eos_in_mid_row, speculative
from specdec_triton.drafters import history, matches, suffix
from specdec_triton.ops.rules import CHAIN_RULES, LOSSY_RULES, RULES
from specdec_triton.tools.check_distribution import exact_distribution, prove
from specdec_triton.tree import Topology

PROMPT_TAIL = 3  # instead of the package's, so that many prompts are longer


# --- counts

PHRASES = [[0, 1, 0, 2, 1], [1, 1, 0], [2, 0, 2, 0]]


@st.composite
def texts(draw, least=1, most=24):
    """A text of few different tokens with repeated phrases."""
    parts = st.one_of(st.sampled_from(PHRASES), st.lists(st.integers(0, 2), min_size=1, max_size=3))
    text = [token for part in draw(st.lists(parts, min_size=1, max_size=6)) for token in part]
    return text[:most] if len(text) >= least else [*text, *[0] * least][:least]


@given(st.lists(texts(), max_size=4), texts(), st.lists(st.integers(0, 3), max_size=3))
@settings(max_examples=70, deadline=None)
def test_searches_are_the_literal_ones(corpus, tail, then):
    """An index of several texts, and a scan of each of them."""
    for found, known in (
        (matches.SuffixArray(corpus), corpus),
        *((matches.ScannedText(np.array(t)), [t]) for t in corpus),
    ):
        longest = literal.longest(known, tail)
        for least in (1, 2, 5):
            assert found.longest(np.array(tail), least) == (longest if longest >= least else 0)
        for length in range(1, len(tail) + 1):
            sequence = tail[-length:]
            at = found.find(np.array(sequence))
            for token in (None, *then):
                if token is not None:
                    at, sequence = at.after(token), [*sequence, token]
                counts = literal.followers(known, sequence)
                assert at.count == counts.total() and at.next_tokens() == counts
                for least in (2, 3):
                    assert at.next_tokens(least) == {t: n for t, n in counts.items() if n >= least}


@st.composite
def calls(draw):
    """The batches of several calls: for each row the prompt, the tokens that look like padding before it, and the
    tokens that each round emits. None stands for the proposal's own tokens."""
    batches = []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.integers(1, 3))
        columns = draw(st.integers(1, 14))
        padding = [draw(st.integers(0, columns - 1)) for _ in range(rows)]
        prompts = [draw(texts(columns, columns)) for _ in range(rows)]
        emitted = st.one_of(st.none(), texts(1, 5))
        rounds = draw(st.lists(st.lists(emitted, min_size=rows, max_size=rows), min_size=1, max_size=4))
        batches.append((prompts, padding, rounds))
    return batches


options = st.fixed_dictionaries(
    {
        "num_tokens": st.sampled_from([1, 3, 32]),
        "tokens_per_match": st.sampled_from([0.3, 1.0, 2.5, 4.0]),
        "min_prob": st.sampled_from([0.0123, 0.1017, 0.3019, 0.5077]),  # no quotient of small counts
        "history_tokens": st.sampled_from([0, 9, 25, 1000]),
    }
)


def paths_of(proposal):
    """The draft tokens from the root to each node."""
    paths = [()]
    for token, parent in zip(proposal.tokens[1:], proposal.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def assert_proposal(proposal, sources, text, depth, nodes, drafter, is_chain=False):
    """Assert that a proposal is the best of the literal drafts after `text` from each of `sources`."""
    assert proposal.tokens[0] == text[-1] and proposal.parents[0] == -1 and proposal.chances[0] == 1
    paths, chances = paths_of(proposal), proposal.chances[1:]
    assert len(set(paths)) == len(paths) <= nodes
    assert chances == sorted(chances, reverse=True)
    drafts, all_unique = [], True
    for known in sources:
        matched = literal.longest(known, text, suffix.MOST_MATCHED)
        if matched and depth > 0:
            tail = text[-matched:]
            deepest = min(depth, max(int(matched * drafter.tokens_per_match), 1))
            if is_chain:
                nodes_, unique = literal.likeliest_chain(known, tail, min(nodes, deepest), drafter.min_prob)
                all_unique = all_unique and unique
            else:
                nodes_ = literal.best_first(known, tail, nodes, drafter.min_prob, deepest)
            drafts.append((known, tail, nodes_))
    if is_chain and paths:
        assert any(is_likeliest_chain(known, tail, paths[-1]) for known, tail, _ in drafts)
    if not all_unique:  # several chains are right
        return
    most = max((literal.expected(nodes_) for _, _, nodes_ in drafts), default=0.0)
    assert proposal.expected == pytest.approx(most, abs=1e-6)
    if not paths:
        return
    fits = [
        np.allclose(chances, [node.chance for node in nodes_])
        and np.allclose(chances, [literal.chance(known, tail, path) for path in paths])
        and proposal.matched == len(tail)
        for known, tail, nodes_ in drafts
        if len(nodes_) == len(paths)
    ]
    assert any(fits), (text, sources, proposal)


def is_likeliest_chain(known, tail, path):
    """Whether each token of `path` is one of the most frequent ones after those before it."""
    steps = [(literal.followers(known, [*tail, *path[:depth]]), token) for depth, token in enumerate(path)]
    return all(counts and counts[token] == max(counts.values()) for counts, token in steps)


def run_call(drafter, earlier, prompts, padding, rounds, rule="greedy", corpus=()):
    """Run a session by hand and compare each proposal. The last column of the prompts is the first emitted token.
    Returns the number of proposed tokens."""
    columns = len(prompts[0])
    now = context(prompts, budget=40, max_length=columns + 60)
    now.rule = rule
    now.start = torch.tensor(padding)
    session = drafter.start(now)
    proposed = 0
    for given_tokens in rounds:
        proposals = session.propose()
        for row, proposal in enumerate(proposals):
            text = now.host_tokens[row, padding[row] : now.host_length[row] + 1].tolist()
            depth = min(drafter.num_tokens, session.max_nodes - 1, int(now.host_budget[row]) - 1)
            sources = [[text], [*corpus, *earlier.outputs]]
            assert_proposal(proposal, sources, text, depth, session.max_nodes - 1, drafter, rule in CHAIN_RULES)
            proposed += len(proposal.tokens) - 1
        lengths = []
        for row, tokens in enumerate(given_tokens):
            if tokens is None:
                tokens = [*max(paths_of(proposals[row]), key=len, default=())[:4], 0]
            tokens = tokens[: int(now.host_budget[row])]
            begin = now.host_length[row] + 1
            now.host_tokens[row, begin : begin + len(tokens)] = tokens
            lengths.append(len(tokens))
        now.host_length = now.host_length + lengths
        now.host_budget = now.host_budget - lengths
    session.finish()
    for row in range(len(prompts)):
        begin = max(padding[row], columns - 1 - PROMPT_TAIL)
        earlier.add(now.host_tokens[row, begin : now.host_length[row] + 1].tolist())
    return proposed


@given(calls(), options, st.sampled_from(["greedy", "greedy", "rejection"]))
@settings(max_examples=60, deadline=None)
def test_proposals_are_the_literal_ones(batches, made, rule):
    """Over several calls of one drafter: every row is searched without its padding, together with the outputs of
    earlier calls, of which the first are dropped first."""
    drafter, earlier = sdt.SuffixDrafter(**made, adaptive=False), literal.LiteralHistory(made["history_tokens"])
    with mock.patch.object(suffix, "PROMPT_TAIL", PROMPT_TAIL):
        for batch in batches:
            run_call(drafter, earlier, *batch, rule)
            assert drafter.history.num_tokens == sum(map(len, earlier.outputs))
            assert drafter.history.num_texts == len(earlier.outputs)


@given(st.lists(texts(), max_size=3), calls(), options)
@settings(max_examples=30, deadline=None)
def test_proposals_from_a_corpus_and_indexed_outputs(corpus, batches, made):
    """A corpus is never evicted. Outputs that are indexed together are evicted together."""
    most = made["history_tokens"]
    with mock.patch.multiple(history, SEGMENT=8, SEGMENTS=2), mock.patch.object(suffix, "PROMPT_TAIL", PROMPT_TAIL):
        drafter, outputs = sdt.SuffixDrafter(**made, adaptive=False), literal.LiteralHistory(10**6)
        drafter.history.add_corpus(corpus)
        for batch in batches:
            run_call(drafter, outputs, *batch, corpus=corpus)
            outputs.outputs = [text[-most:] for text in outputs.outputs if most]
            number = drafter.history.num_texts - len(corpus)
            outputs.outputs = outputs.outputs[len(outputs.outputs) - number :]
            tokens = sum(map(len, outputs.outputs))
            assert drafter.history.num_tokens == tokens + sum(map(len, corpus)) and tokens <= most


@pytest.mark.parametrize("min_prob", [0.0123, 0.1017])
def test_trees_of_many_counts(min_prob):
    """Trees that branch at every level, until the product of the shares is too small or there are as many nodes as
    fit. The last token has many places, and no token before it is repeated."""
    random, sizes = np.random.default_rng(0), []
    chain = Topology.chain(9)
    for alphabet, length in ((2, 150), (2, 400), (3, 250)):
        drafter = sdt.SuffixDrafter(9, tokens_per_match=7, min_prob=min_prob, adaptive=False)
        rows = [random.integers(0, alphabet, length) for _ in range(2)]
        for row in rows:
            row[::7] = 9
        rows = [[*row.tolist(), 8, 9] for row in rows]
        drafter.history.add(rows[0])
        session = drafter.start(context(rows, max_length=500))
        for text, proposal in zip(rows, session.propose(), strict=True):
            assert proposal.matched == 1 or text is rows[0]
            assert_proposal(proposal, [[text], [rows[0]]], text, 9, session.max_nodes - 1, drafter)
            sizes.append(len(proposal.tokens))
        session = drafter.start(context(rows, max_length=500), chain)
        for text, proposal in zip(rows, session.propose(), strict=True):
            assert_proposal(proposal, [[text], [rows[0]]], text, 9, 9, drafter, is_chain=True)
    assert max(sizes) == 64 if min_prob < 0.1 else 8 < max(sizes) < 32, sizes


@pytest.mark.parametrize("total", [100, 200, 300])
def test_a_share_of_exactly_min_prob_is_drafted(total):
    """0.07 * 100 is above 7 in floating point."""
    drafter = sdt.SuffixDrafter(2, min_prob=0.07, adaptive=False)
    few = total * 7 // 100
    drafter.history.add_corpus([[9, token] for token in [1] * few + [2] * (total - few)])
    (proposal,) = drafter.start(context([[8, 9]])).propose()
    drafted = dict(zip(proposal.tokens[1:], proposal.chances[1:], strict=True))
    assert drafted == {1: pytest.approx(0.07), 2: pytest.approx(0.93)}


def test_the_better_of_two_sources_is_copied():
    """The text has the longer match, but what followed differs each time."""
    text = [7, 1, 2, 3, 7, 1, 2, 4, 7, 1, 2, 5, 7, 1, 2]
    for min_prob, tokens, matched in ((0.4, [2, 8, 9], 2), (0.3, [2, 3, 4, 5], 3)):
        drafter = sdt.SuffixDrafter(1 if min_prob < 0.4 else 4, tokens_per_match=1, min_prob=min_prob, adaptive=False)
        drafter.history.add([1, 2, 8, 9, 7])
        (proposal,) = drafter.start(context([text])).propose()
        assert (proposal.tokens, proposal.matched) == (tokens, matched)


def test_tokens_that_the_target_does_not_have_are_not_drafted():
    drafter = sdt.SuffixDrafter(4, tokens_per_match=float("inf"), adaptive=False)
    drafter.history.add_corpus([[8, 9, 100, 1], [8, 9, 99, 2, 3]])
    (proposal,) = drafter.start(context([[8, 9]], vocab=100)).propose()
    assert (proposal.tokens, proposal.chances) == ([9, 99, 2, 3], [1, 0.5, 0.5, 0.5])


# --- texts of calls


OPTIONS = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}


def steady(**options):
    """A drafter whose drafts do not depend on the clock."""
    return sdt.SuffixDrafter(**{"adaptive": False, **options})


class Collector(BaseStreamer):
    def __init__(self):
        self.puts = []

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.puts.append("end")


def no_three(ids, scores):
    """A processor that runs on the host, token by token."""
    return scores.masked_fill(ids[:, -1:] % 3 == torch.arange(VOCAB) % 3, -1e4)


def no_even(ids, scores):
    """A processor that runs on the host, at once over all nodes of a tree."""
    return scores - 3.0 * (torch.arange(VOCAB) % 2 == 0)


no_even.stateless = True

# name -> options of `generate`
CALLS = {
    "greedy": {},
    "EOS": {"eos_token_id": None},
    "processors on the device": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "processors on the host": {"logits_processor": [no_three], "pad_token_id": PAD},
    "stateless processors": {"logits_processor": [no_even], "pad_token_id": PAD},
    "criterion": {"stopping_criteria": [lambda ids, scores, **_: ids[:, -1] % 7 == 0], "pad_token_id": PAD},
}


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param(name, batch, marks=[] if (number + batch // 2) % 2 else pytest.mark.slow)
        for number, name in enumerate(CALLS)
        for batch in (1, 3)
    ],
)
def test_greedy_text_is_plains(name, batch, model):
    """The second call drafts the output of the first, a third one with adaptive drafts."""
    inputs, call = prompt(batch=batch), {**OPTIONS, **CALLS[name]}
    if call["eos_token_id"] is None:
        call["eos_token_id"] = eos_in_mid_row(model, inputs, **call)
    theirs, drafter = Collector(), steady()
    streamed = {"streamer": theirs} if batch == 1 else {}
    plain = model.generate(**inputs, **call, **streamed)
    for number in range(3):
        ours = Collector()
        drafter.adaptive = number == 2
        streamed = {"streamer": ours} if batch == 1 else {}
        with sdt.patched(model, drafter=drafter):
            assert torch.equal(model.generate(**inputs, **call, **streamed), plain)
        stats = sdt.stats(model)
        assert batch > 1 or ours.puts == theirs.puts
        if number == 1:
            assert stats.accepted > 0.4 * stats.emitted and drafter.history.num_texts == 2 * batch


@pytest.mark.parametrize("tree", [1, pytest.param(2, marks=pytest.mark.slow), 9, Topology.chain(3), "auto"], ids=str)
def test_greedy_text_with_a_requested_tree(tree, model):
    inputs, drafter = {**prompt(), **OPTIONS}, steady()
    plain = model.generate(**inputs)
    costs = sdt.Costs(verify=((1, 1.0), (64, 1.0)), draft=((1, 0.0), (16, 0.0)))
    for _ in range(2):
        with sdt.patched(model, drafter=drafter, tree=tree, costs=costs if tree == "auto" else None):
            assert torch.equal(model.generate(**inputs), plain)
    assert (sdt.stats(model).accepted > 0) == (tree != 1)


def test_stop_strings():
    model, tokenizer, drafter = tiny.model(), tiny.tokenizer(), steady()
    inputs = dict(tokenizer("abc", return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    pieces = [tokenizer.decode(plain[0, at : at + 1]) for at in range(plain.shape[1])]
    stop = next(piece for at, piece in enumerate(pieces) if at > 12 and piece.isascii() and piece.isalpha())
    call = {**inputs, "do_sample": False, "max_new_tokens": 40, "stop_strings": [stop], "tokenizer": tokenizer}
    stopped = model.generate(**call)
    with sdt.patched(model, drafter=drafter):
        assert torch.equal(
            model.generate(**inputs, do_sample=False, max_new_tokens=40), plain
        )  # drafted beyond the stop
        added = record_added(drafter)
        assert torch.equal(model.generate(**call), stopped) and sdt.stats(model).accepted > 5
    assert added == [stopped[0].tolist()]


SAMPLED = {"do_sample": True, "max_new_tokens": 16, "eos_token_id": NEVER, "temperature": 0.9, "top_k": 24}


@pytest.mark.parametrize("penalty", [pytest.param(1.0, marks=pytest.mark.slow), 1.2])
def test_coupled_text_is_plains(penalty, model):
    inputs, call, drafter = prompt(batch=3), {**SAMPLED, "repetition_penalty": penalty}, steady()
    plain = model.generate(**inputs, **call, custom_generate=sdt.SpeculativeGenerate(seed=4))
    for _ in range(2):
        with sdt.patched(model, drafter=drafter, seed=4):
            assert torch.equal(model.generate(**inputs, **call), plain)
    stats = sdt.stats(model)
    assert stats.rule == "coupled" and stats.accepted > 0.4 * stats.emitted
    with sdt.patched(model, drafter=drafter, seed=5):
        assert not torch.equal(model.generate(**inputs, **call), plain)


SMALL = {"vocab_size": 5, "num_hidden_layers": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module")
def enumerated():
    """A model of five tokens, a prompt, options, and the probability of each continuation."""
    small, ids, call = build("llama", **SMALL), torch.tensor([[3, 4, 1, 2, 3, 4]]), {"top_k": 0, "temperature": 1.3}
    return small, ids, call, exact_distribution(small, ids, 3, **call)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, marks=[] if rule in ("rejection", "multi_round") else pytest.mark.slow)
        for rule in RULES
        if rule not in LOSSY_RULES
    ],
)
def test_sampling_keeps_the_distribution(rule, enumerated):
    """Later batches draft the outputs of earlier ones, which had other seeds."""
    small, ids, call, exact = enumerated
    drafter = steady(min_prob=0.05)
    found = prove(small, drafter, rule, ids, tokens=3, samples=900, rows=300, exact=exact, **call)
    assert found.agrees and found.is_conclusive, found
    assert drafter.history.num_texts == 900


@pytest.mark.slow
def test_typical_is_lossy_and_says_so(enumerated):
    small, ids, call, exact = enumerated
    found = prove(small, steady(), "typical", ids, tokens=3, samples=1200, rows=600, exact=exact, **call)
    assert not found.agrees and not sdt.stats(small).lossless


@pytest.mark.parametrize("rule", sorted(CHAIN_RULES))
def test_chains_for_the_rules_that_need_them(rule, model, monkeypatch):
    drafter, trees, draft = steady(), [], suffix.SuffixSession.draft
    drafter.history.add_corpus([[token, other] for token in range(VOCAB) for other in (5, 6, 7)])
    monkeypatch.setattr(suffix.SuffixSession, "draft", lambda self: trees.append(draft(self)) or trees[-1])
    with sdt.patched(model, drafter=drafter, rule=rule, seed=0):
        model.generate(**prompt(), **SAMPLED)
    assert any(tree.num_nodes > 1 for tree in trees) and all(tree.is_chain for tree in trees)
    for tree in trees:
        tree.check(tree.tokens[:, 0], VOCAB, "suffix")


@pytest.mark.parametrize(
    ("sampled", "adaptive"),
    [
        pytest.param(sampled, adaptive, marks=[] if (sampled, adaptive) == (True, False) else pytest.mark.slow)
        for sampled in (False, True)
        for adaptive in (False, True)
    ],
)
def test_verification_is_captured(sampled, adaptive, model, monkeypatch):
    """Drafts are made on the host, so no report is read late. All other steps are captured."""
    capture_here(monkeypatch, 1)
    drafter = steady(num_tokens=3, adaptive=adaptive)
    inputs = {**prompt(), **(SAMPLED if sampled else OPTIONS), "max_new_tokens": 32}
    made = {"rule": "coupled", "seed": 3} if sampled else {}
    plain = model.generate(**inputs, custom_generate=sdt.SpeculativeGenerate(cuda_graphs=False, **made))
    for _ in range(2):
        text, stats = speculative(model, drafter, inputs, cuda_graphs=True, **made)
        assert torch.equal(text, plain)
        assert stats.why_eager is None and stats.replayed > 0 and stats.lag == 0
        assert stats.why_no_lag == "SuffixDrafter drafts on the host"
    assert stats.accepted > 15


# --- life cycle


def record_added(drafter):
    """A list of the texts that are added to the history of the drafter from now on, if they are not empty."""
    added, add = [], drafter.history.add

    def adding(tokens, *rest):
        added.append(list(map(int, tokens)))
        add(tokens, *rest)

    drafter.history.add = adding
    return added


def kept(text, lengths, inputs, repeats=1):
    """The texts that a call keeps: for each row of `text` the last prompt tokens and `lengths[row]` output tokens."""
    columns = inputs["input_ids"].shape[1]
    starts = (1 - inputs["attention_mask"]).sum(1).repeat_interleave(repeats).tolist()
    return [
        row[max(start, columns - suffix.PROMPT_TAIL) : columns + length]
        for row, start, length in zip(text.tolist(), starts, lengths, strict=True)
    ]


# name -> options of `generate`, and the length of each row's output
ENDS = {
    "length": ({"max_new_tokens": 11}, (11, 11, 11)),
    "one token": ({"max_new_tokens": 1}, None),
    "two tokens": ({"max_new_tokens": 2}, (2, 2, 2)),
    "criterion": (
        {"stopping_criteria": [lambda ids, scores, **_: ids.shape[1] >= torch.tensor([25, 31, 26])]},
        (5, 11, 6),
    ),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("pad", [PAD, None])
def test_outputs_are_kept_exactly_once(name, pad, model):
    """Also if a criterion ends rows in the middle of a round, and if no token can be used for padding."""
    call, lengths = ENDS[name]
    inputs = prompt(batch=3, length=20)
    call = {
        **OPTIONS,
        "max_new_tokens": 30,
        "pad_token_id": pad,
        "eos_token_id": NEVER if pad is not None else None,
        **call,
    }
    if name == "criterion" and pad is None:
        lengths = (11, 11, 11)  # rows go on until all have stopped
    small = build("llama", pad_token_id=pad, eos_token_id=None, bos_token_id=None) if pad is None else model
    plain, drafter = small.generate(**inputs, **call), steady()
    long = {**call, "max_new_tokens": 30, "stopping_criteria": []}
    with sdt.patched(small, drafter=drafter):
        for _ in range(2):
            small.generate(**inputs, **long)
        added = record_added(drafter)
        assert torch.equal(small.generate(**inputs, **call), plain)
    assert sdt.stats(small).accepted > 0 or call["max_new_tokens"] < 3
    # a call without a round has no session
    assert added == ([] if lengths is None else kept(plain, lengths, inputs))


def test_outputs_that_end_by_eos_are_kept_without_padding(model):
    inputs = prompt(batch=3)
    eos = eos_in_mid_row(model, inputs, max_new_tokens=20)
    plain = model.generate(**inputs, **{**OPTIONS, "eos_token_id": eos})
    tails = plain[:, inputs["input_ids"].shape[1] :]
    lengths = [next((at + 1 for at, t in enumerate(row) if t in eos), len(row)) for row in tails.tolist()]
    assert min(lengths) < tails.shape[1]
    drafter = steady()
    added = record_added(drafter)
    with sdt.patched(model, drafter=drafter):
        model.generate(**inputs, **{**OPTIONS, "eos_token_id": eos})
    assert added == kept(plain, lengths, inputs)
    assert drafter.history.num_texts == 3 and drafter.history.num_tokens == sum(map(len, added))


def test_every_returned_sequence_is_kept(model):
    inputs, drafter = prompt(), steady()
    added = record_added(drafter)
    with sdt.patched(model, drafter=drafter, seed=5):
        text = model.generate(**inputs, **SAMPLED, num_return_sequences=3)
    assert added == kept(text, [16] * 6, inputs, repeats=3) and len({*map(tuple, added)}) == 6


class Fault(Exception):
    pass


def fail(*args, **kwargs):
    raise Fault


def fail_after(columns):
    def ask(ids, scores, **_):
        if ids.shape[1] >= columns:
            raise Fault
        return torch.zeros(len(ids), dtype=torch.bool)

    return ask


class Failing(Collector):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def put(self, value):
        super().put(value)
        if len(self.puts) == self.at:
            raise Fault

    def end(self):
        raise Fault


@pytest.mark.parametrize(
    "call",
    [
        {"stopping_criteria": [fail_after(14)]},
        {"logits_processor": [lambda ids, scores: fail() if ids.shape[1] > 13 else scores]},
        {"streamer": Failing(6)},
        {"streamer": Failing(-1)},
    ],
    ids=["criterion", "processor", "streamer", "streamer's end"],
)
def test_nothing_is_kept_of_a_call_that_raises(call, model):
    inputs, drafter = prompt(batch=1), steady()
    plain = model.generate(**inputs, **OPTIONS)
    with sdt.patched(model, drafter=drafter):
        with pytest.raises(Fault):
            model.generate(**inputs, **OPTIONS, **call)
        assert drafter.history.num_texts == 0
        assert torch.equal(model.generate(**inputs, **OPTIONS), plain) and drafter.history.num_texts == 1


def test_clear_and_a_bound_of_zero_tokens(model):
    inputs = prompt(batch=1)
    for drafter in (steady(), steady(history_tokens=0)):
        accepted = []
        with sdt.patched(model, drafter=drafter):
            for _ in range(3):
                model.generate(**inputs, **OPTIONS)
                accepted.append(sdt.stats(model).accepted)
                if len(accepted) == 2:
                    drafter.clear()
        assert accepted[0] == accepted[2]
        assert (accepted[1] > accepted[0]) == bool(drafter.history_tokens)
        assert drafter.history.num_texts == bool(drafter.history_tokens)


@pytest.mark.parametrize("count", [1, 2], ids=["one model", "two models"])
def test_ten_calls_of_two_threads(count):
    """Nothing is lost, and all texts are right."""
    models = [build(family, num_hidden_layers=1) for family in ("llama", "qwen2")[:count]]
    inputs = [{**prompt(batch=2, seed=seed), **OPTIONS, "max_new_tokens": 10} for seed in range(10)]
    plain = [models[number % count].generate(**each) for number, each in enumerate(inputs)]
    drafter, interval = steady(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ExitStack() as blocks:
            for each in models:
                blocks.enter_context(sdt.patched(each, drafter=drafter))
            pool = blocks.enter_context(concurrent.futures.ThreadPoolExecutor(2))
            texts = list(pool.map(lambda number: models[number % count].generate(**inputs[number]), range(10)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(*pair) for pair in zip(texts, plain, strict=True))
    wanted = [row for text, each in zip(plain, inputs, strict=True) for row in kept(text, (10, 10), each)]
    assert drafter.history.num_texts == 20 and drafter.history.num_tokens == sum(map(len, wanted))
    for row in wanted:
        assert any(source.longest(np.array(row[:-1])) == len(row) - 1 for source in drafter.history.sources())


def proposals_of(drafter, text):
    (proposal,) = drafter.start(context([text])).propose()
    return proposal


@pytest.mark.parametrize("way", ["save", "pickle", "deepcopy"])
def test_a_copy_proposes_the_same_and_has_its_own_history(way, model, tmp_path):
    drafter = steady(num_tokens=5, min_prob=0.2)
    drafter.history.add_corpus([[9, 8, 7, 6], [9, 8, 5, 5]])
    with sdt.patched(model, drafter=drafter):
        plain = model.generate(**prompt(), **OPTIONS)
    if way == "save":
        drafter.save(tmp_path / "texts.safetensors")
        other = sdt.SuffixDrafter.load(tmp_path / "texts.safetensors", num_tokens=5, min_prob=0.2, adaptive=False)
    else:
        other = pickle.loads(pickle.dumps(drafter)) if way == "pickle" else copy.deepcopy(drafter)
    assert (other.history.num_texts, other.history.num_tokens) == (
        drafter.history.num_texts,
        drafter.history.num_tokens,
    )
    for text in ([3, 9, 8], plain[0, 3:20].tolist(), plain[1, :15].tolist(), [1, 2, 3]):
        assert proposals_of(other, text) == proposals_of(drafter, text)
    assert proposals_of(other, [3, 9, 8]).expected == 2
    assert len(proposals_of(other, plain[1, :15].tolist()).tokens) == 6
    other.history.add([9, 8, 4])
    assert 4 not in proposals_of(drafter, [3, 9, 8]).tokens and 4 in proposals_of(other, [3, 9, 8]).tokens
    drafter.clear()
    with sdt.patched(model, drafter=other):
        assert torch.equal(model.generate(**prompt(), **OPTIONS), plain)
    assert sdt.stats(model).accepted > 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_children_forked_while_threads_add_texts(model):
    """No child waits for a lock that a thread of its parent held. Its outputs stay its own."""
    inputs, drafter, done = {**prompt(), **OPTIONS, "max_new_tokens": 8}, steady(history_tokens=500), threading.Event()
    with sdt.patched(model, drafter=drafter):
        plain = model.generate(**inputs)

        def add():
            while not done.is_set():
                drafter.history.add(range(40))

        threads = [threading.Thread(target=add) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            codes = []
            for number in range(8):
                child = os.fork()
                if not child:
                    signal.alarm(30)
                    code = 1
                    try:
                        before = drafter.history.num_texts
                        drafter.history.add([1, 2, 3])
                        right = torch.equal(model.generate(**inputs), plain) if number == 0 else True
                        code = not (right and before)
                    finally:
                        os._exit(code)
                codes.append(os.waitpid(child, 0)[1])
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert codes == [0] * 8


# --- statistics


def test_why_no_lag(model, monkeypatch):
    inputs = {**prompt(), **OPTIONS, "max_new_tokens": 4}

    def reason(drafter, **call):
        with sdt.patched(model, drafter=drafter):
            model.generate(**inputs, **call)
        stats = sdt.stats(model)
        assert (stats.lag == 0) == (stats.why_no_lag is not None)
        return stats.why_no_lag

    assert reason(sdt.NoDrafter()) == "tensors on cpu"
    assert reason(steady()) == "SuffixDrafter drafts on the host"
    capture_here(monkeypatch, 1)
    assert reason(sdt.NoDrafter()) is None and reason(sdt.EarlyExitDrafter(1)) is None
    assert reason(steady()) == "SuffixDrafter drafts on the host"
    assert "function in logits_processor runs on the host" in reason(sdt.NoDrafter(), logits_processor=[no_three])
    assert reason(sdt.NoDrafter(), repetition_penalty=1.2) is None
