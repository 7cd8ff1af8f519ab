"""Logits processors on draft trees: each node gets the scores that transformers' own call for its whole row gives."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PrefixConstrainedLogitsProcessor
from transformers.generation import logits_process as hf

import specdec_triton as sdt
from families import NEVER, VOCAB, build, prompt
from specdec_triton.ops.filters import filtered_log_probs
from specdec_triton.processors.device import is_vectorised, process_nodes
from specdec_triton.processors.host import process_each, process_path, split_processors
from specdec_triton.tools.host_sync import count_host_reads
from specdec_triton.tree import DraftTree

INF, NAN = float("inf"), float("nan")
_ENDS = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -INF)
DECAY_KEEPS_THE_IMPOSSIBLE = not hf.ExponentialDecayLengthPenalty((0, 2.0), 0, 0)(*_ENDS).isnan().any()  # not in 5.17
PENALTY_BY_ROW = hasattr(hf.SequenceBiasLogitsProcessor({(1,): 0.0}), "multi_token_biases")  # new in 5.23, too


def sequences(rng, vocab):
    return {
        tuple(rng.integers(0, vocab, rng.choice([1, 2, 2, 3, 5, 12])).tolist()): float(rng.integers(-8, 9)) / 8
        for _ in range(12)
    }


def ids(rng, vocab):
    return rng.integers(0, vocab, rng.integers(1, 4)).tolist()


def ignored(rng, columns, batch):
    return [None, int(columns), int(columns) + 2, torch.from_numpy(rng.integers(0, columns + 3, batch))][
        rng.integers(0, 4 if PENALTY_BY_ROW else 3)
    ]


# name -> function that makes a processor from a random generator, V, columns of the prompt, and B; a root is at the
# last column of the prompt or some columns later
MADE = {
    "repetition": lambda rng, v, c, b: hf.RepetitionPenaltyLogitsProcessor(
        float(rng.choice([0.75, 1.5, 3.0])), ignored(rng, c, b)
    ),
    "no repeat": lambda rng, v, c, b: hf.NoRepeatNGramLogitsProcessor(int(rng.choice([1, 2, 2, 3, 4, 15]))),
    "bad words": lambda rng, v, c, b: hf.NoBadWordsLogitsProcessor([list(s) for s in sequences(rng, v)], ids(rng, v)),
    "bias": lambda rng, v, c, b: hf.SequenceBiasLogitsProcessor(sequences(rng, v)),
    "min length": lambda rng, v, c, b: hf.MinLengthLogitsProcessor(int(c + rng.integers(0, 5)), ids(rng, v)),
    "min new": lambda rng, v, c, b: hf.MinNewTokensLengthLogitsProcessor(int(c), int(rng.integers(0, 5)), ids(rng, v)),
    "suppress": lambda rng, v, c, b: hf.SuppressTokensLogitsProcessor(ids(rng, v)),
    "at begin": lambda rng, v, c, b: hf.SuppressTokensAtBeginLogitsProcessor(ids(rng, v), int(c + rng.integers(0, 3))),
    "forced end": lambda rng, v, c, b: hf.ForcedEOSTokenLogitsProcessor(int(c + rng.integers(1, 5)), ids(rng, v)),
    "decay": lambda rng, v, c, b: hf.ExponentialDecayLengthPenalty(
        (int(rng.integers(0, 3)), float(rng.choice([1.3, 0.9, 2.0]))), ids(rng, v), int(c)
    ),
    "finite": lambda rng, v, c, b: hf.InfNanRemoveLogitsProcessor(),
    "normalised": lambda rng, v, c, b: hf.LogitNormalization(),
    "temperature": lambda rng, v, c, b: hf.TemperatureLogitsWarper(float(rng.choice([0.3, 0.7, 1.9]))),
    "top k": lambda rng, v, c, b: hf.TopKLogitsWarper(int(rng.integers(1, v + 3)), -100.0, int(rng.integers(1, 3))),
    "top p": lambda rng, v, c, b: hf.TopPLogitsWarper(float(rng.uniform(0, 1)), min_tokens_to_keep=2),
    "min p": lambda rng, v, c, b: hf.MinPLogitsWarper(float(rng.uniform(0, 1))),
    "typical": lambda rng, v, c, b: hf.TypicalLogitsWarper(float(rng.uniform(0.05, 0.95))),
    "epsilon": lambda rng, v, c, b: hf.EpsilonLogitsWarper(float(rng.uniform(0.01, 0.3)), min_tokens_to_keep=2),
    "top h": lambda rng, v, c, b: hf.TopHLogitsWarper(float(rng.uniform(0.1, 1))),
    "eta": lambda rng, v, c, b: hf.EtaLogitsWarper(float(rng.uniform(0.01, 0.5)), min_tokens_to_keep=2),
}


def case(rng, batch=3, nodes=9, vocab=11, columns=7, impossible=0.1, nan=0.0):
    """A tree, logits, tokens [B, C] whose tails are invalid, and root columns. The vocabulary is small, so that tokens
    repeat."""
    some = rng.integers(0, vocab, 3)

    def draw(*shape):
        return np.where(rng.random(shape) < 0.8, rng.choice(some, shape), rng.integers(0, vocab, shape))

    padding = rng.integers(0, columns, (batch, 1)) * (rng.random((batch, 1)) < 0.5)
    tokens = np.where(np.arange(columns) < padding, 0, draw(batch, columns))
    length = rng.integers(0, columns, batch)
    parents = np.full((batch, nodes), -1, np.int32)
    for row, node in itertools.product(range(batch), range(1, nodes)):
        real = [0, *np.flatnonzero(parents[row] >= 0)]
        if rng.random() < 0.85:  # otherwise padding
            parents[row, node] = real[-1] if rng.random() < 0.6 else rng.choice(real)
    drafted = draw(batch, nodes)
    drafted[:, 0] = tokens[np.arange(batch), length]
    tree = DraftTree.from_parents(torch.from_numpy(drafted), torch.from_numpy(parents))
    logits = torch.from_numpy(rng.integers(-40, 41, (batch, nodes, vocab)).astype(np.float32) / 8)
    logits += torch.from_numpy(rng.random((batch, nodes, vocab)).astype(np.float32)) * float(rng.random() < 0.5)
    odd = torch.from_numpy(rng.random((batch, nodes, vocab)))
    logits[odd < impossible] = -INF
    logits[odd > 1 - nan] = NAN
    return tree, logits, torch.from_numpy(tokens), torch.from_numpy(length)


def path_of(tree, row, node):
    """The nodes on the path to `node`, without the root."""
    path = []
    while node > 0:
        path.insert(0, node)
        node = int(tree.parents[row, node])
    return path


def text_of(tree, tokens, length, row, node):
    path = path_of(tree, row, node)
    return torch.cat([tokens[row, : length[row] + 1], tree.tokens[row, path]])


def real_nodes(tree):
    return [
        (row, node)
        for row, parents in enumerate(tree.parents.tolist())
        for node, parent in enumerate(parents)
        if parent >= 0 or node == 0
    ]


def by_hand(processors, tree, logits, tokens, length):
    """{(row, node): scores [V]} by transformers' own call for the node's whole row; None if it raises because of
    NaN."""
    wanted = {}
    for row, node in real_nodes(tree):
        text = text_of(tree, tokens, length, row, node).expand(len(tokens), -1)
        try:
            wanted[row, node] = processors(text, logits[row, node].expand(len(tokens), -1).clone())[row]
        except ValueError as error:
            assert "Categorical" in str(error)
            wanted[row, node] = None
    return wanted


def check(processors, tree, logits, tokens, length):
    assert is_vectorised(processors, logits.shape[-1])
    wanted = by_hand(processors, tree, logits, tokens, length)
    before = logits.clone()
    got = process_nodes(processors, tree, logits, tokens, length)
    assert got.dtype == torch.float32 and torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    for (row, node), scores in wanted.items():
        if scores is not None:
            torch.testing.assert_close(got[row, node], scores, rtol=0, atol=0, equal_nan=True)


SIZES = {"batch": st.integers(1, 4), "nodes": st.integers(1, 12), "columns": st.integers(1, 14)}


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), vocab=st.integers(2, 14), **SIZES)
def test_each_alone(name, seed, vocab, batch, nodes, columns):
    rng = np.random.default_rng(seed)
    impossible = 0.0 if name == "decay" and not DECAY_KEEPS_THE_IMPOSSIBLE else float(rng.choice([0, 0.2]))
    tree, logits, tokens, length = case(rng, batch, nodes, vocab, columns, impossible, float(rng.choice([0, 0.05])))
    processor = MADE[name](rng, vocab, columns // 2 + 1, batch)
    check(LogitsProcessorList([processor]), tree, logits, tokens, length)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    names=st.lists(st.sampled_from(sorted(MADE)), min_size=2, max_size=6),
    vocab=st.integers(2, 14),
    **SIZES,
)
def test_random_lists(seed, names, vocab, batch, nodes, columns):
    rng = np.random.default_rng(seed)
    names = [name for name in names if name != "decay" or DECAY_KEEPS_THE_IMPOSSIBLE]
    processors = LogitsProcessorList(MADE[name](rng, vocab, columns // 2 + 1, batch) for name in names)
    check(processors, *case(rng, batch, nodes, vocab, columns, nan=float(rng.choice([0, 0.02]))))


@pytest.mark.parametrize("nodes", [64, 65, 130])
def test_trees_of_more_than_a_word_of_ancestors(nodes):
    rng = np.random.default_rng(nodes)
    made = [MADE[name](rng, 40, 5, 2) for name in ("repetition", "no repeat", "bias")]
    check(LogitsProcessorList(made), *case(rng, 2, nodes, 40, 10))


def test_by_hand():
    """Prompt 5 6 | 5. Nodes: 1 is token 6 after the root, 2 is 7 after the root, 3 is 5 after node 1, 4 is padding."""
    tokens, length = torch.tensor([[5, 6, 5, 0, 0]]), torch.tensor([2])
    parents = torch.tensor([[-1, 0, 0, 1, -1]], dtype=torch.int32)
    tree = DraftTree.from_parents(torch.tensor([[5, 6, 7, 5, 3]]), parents)
    logits = torch.ones(1, 5, 9)

    def changed(processor):
        scores = process_nodes(LogitsProcessorList([processor]), tree, logits, tokens, length)
        return [(row != 1).nonzero().flatten().tolist() for row in scores[0, :4]]

    assert changed(hf.RepetitionPenaltyLogitsProcessor(2.0)) == [[5, 6], [5, 6], [5, 6, 7], [5, 6]]
    assert changed(hf.RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=3)) == [[], [6], [7], [5, 6]]
    assert changed(hf.NoRepeatNGramLogitsProcessor(2)) == [[6], [5], [], [6]]
    assert changed(hf.NoRepeatNGramLogitsProcessor(3)) == [[], [5], [], [6]]
    assert changed(hf.NoBadWordsLogitsProcessor([[5, 6, 8], [7, 1], [2]])) == [[2], [2, 8], [1, 2], [2]]
    assert changed(hf.MinNewTokensLengthLogitsProcessor(3, 2, [0])) == [[0], [0], [0], []]


@pytest.mark.parametrize("name", ["repetition", "no repeat", "bad words", "bias"])
def test_a_penalty_blind_to_ancestors_would_be_seen(name):
    failed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tree, *rest = case(rng, nodes=12)
        processors = LogitsProcessorList([MADE[name](rng, 11, 4, 3)])
        wanted = by_hand(processors, tree, *rest)
        orphans = DraftTree.from_parents(tree.tokens, torch.full_like(tree.parents, -1))
        for blind in (replace(orphans, depth=tree.depth), orphans):
            got = process_nodes(processors, blind, *rest)
            failed += any(not torch.equal(got[at], scores) for at, scores in wanted.items())
    assert failed > 20


@pytest.mark.skipif(not PENALTY_BY_ROW, reason="5.17 raises for ids beyond the logits")
def test_ids_beyond_the_logits():
    rng = np.random.default_rng(0)
    tree, logits, tokens, length = case(rng, vocab=20)
    processors = LogitsProcessorList(MADE[name](rng, 8, 3, 3) for name in ("repetition", "no repeat", "no repeat"))
    check(processors, tree, logits[..., :8], tokens, length)
    with pytest.raises(ValueError, match="vocabulary size is 8, but"):
        process_nodes(
            LogitsProcessorList([hf.SequenceBiasLogitsProcessor({(9,): 1.0})]), tree, logits[..., :8], tokens, length
        )


def test_a_nan_at_one_node_stays_there():
    rng = np.random.default_rng(0)
    tree, logits, tokens, length = case(rng)
    processors = LogitsProcessorList(MADE[name](rng, 11, 3, 3) for name in ("eta", "top h", "typical"))
    clean = process_nodes(processors, tree, logits, tokens, length)
    logits[1, 2] = NAN
    spoilt = process_nodes(processors, tree, logits, tokens, length)
    assert spoilt[1, 2].isnan().any()
    spoilt[1, 2] = clean[1, 2]
    assert torch.equal(spoilt, clean)


def test_only_known_processors_are_vectorised():
    class Mine(hf.TemperatureLogitsWarper):
        pass

    warper = hf.TemperatureLogitsWarper(0.5)
    assert is_vectorised(LogitsProcessorList(), 9) and is_vectorised(LogitsProcessorList([warper]), 9)
    for other in (Mine(0.5), lambda ids, scores: scores, PrefixConstrainedLogitsProcessor(None, 1)):
        assert not is_vectorised(LogitsProcessorList([warper, other]), 9)
    for last in (hf.ForcedEOSTokenLogitsProcessor(9, [2, 8]), hf.ExponentialDecayLengthPenalty((1, 2.0), [8], 4)):
        assert is_vectorised(LogitsProcessorList([last]), 9)
        assert not is_vectorised(LogitsProcessorList([last]), 8)  # they raise if they reach that length


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MADE)
def test_no_host_read_and_no_loop_over_nodes_or_rows(name):
    rng, counts = np.random.default_rng(0), []
    for batch, nodes in ((1, 2), (4, 40)):
        arguments = case(rng, batch, nodes)
        processors = LogitsProcessorList([MADE[name](np.random.default_rng(6), 11, 3, batch)])
        process_nodes(processors, *arguments)  # some initialise themselves in the first call
        with count_host_reads() as reads, Calls() as calls:
            process_nodes(processors, *arguments)
        assert reads.total == 0, reads.by_name
        counts.append(calls.count)
    assert counts[0] == counts[1]


# --- processors that become filters

SAMPLING = {
    "temperature": 0.7,
    "top_h": 0.9,
    "top_k": 12,
    "top_p": 0.8,
    "min_p": 0.05,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.02,
    "renormalize_logits": True,
    "repetition_penalty": 1.3,
}
FILTERS = ("temperature", "top_k", "top_p", "min_p")


def prepared(model, inputs, **options):
    """The list of processors that `generate` creates."""
    config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=0, **{"top_k": 0, **options})
    model._prepare_special_tokens(config, True, device="cpu")
    return model._get_logits_processor(config, inputs.shape[1], device="cpu", model_kwargs={})


def check_split(processors, fused, inputs):
    others, filters, warpers = split_processors(processors, 2, torch.device("cpu"))
    assert [*others, *warpers] == list(processors)
    assert {name for name in FILTERS if getattr(filters, name) is not None} == fused
    assert all(option is None or option.shape == (2,) for option in filters.tensors)
    assert filters.max_top_k == (12 if "top_k" in fused else None)
    # no two logits tie, because transformers' top-p has no defined order among ties
    logits = torch.stack([torch.randperm(VOCAB) for _ in range(2)]) / 8
    got = filtered_log_probs(others(inputs, logits.clone())[:, None], filters)[:, 0]
    wanted = processors(inputs, logits.clone()).log_softmax(-1)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(warpers(inputs, others(inputs, logits.clone())), processors(inputs, logits.clone()))


@pytest.mark.parametrize(
    "sizes", [(0, 1, 2, 3, 9, 10), pytest.param(range(4, 9), marks=pytest.mark.slow)], ids=["few or most", "others"]
)
def test_lists_made_by_generate(sizes):
    model, inputs = build("llama"), prompt()["input_ids"]
    for size in sizes:
        for names in itertools.combinations(SAMPLING, size):
            processors = prepared(model, inputs, **{name: SAMPLING[name] for name in names})
            after = {"typical_p", "epsilon_cutoff", "eta_cutoff"} & {*names}
            between = {"temperature", "top_h"} <= {*names}
            fused = set() if after or between else {*FILTERS} & {*names}
            check_split(processors, fused, inputs)


def test_lists_of_the_callers():
    inputs, order = prompt()["input_ids"], list(FILTERS)
    warpers = {
        "temperature": hf.TemperatureLogitsWarper(0.7),
        "top_k": hf.TopKLogitsWarper(12),
        "top_p": hf.TopPLogitsWarper(0.8),
        "min_p": hf.MinPLogitsWarper(0.05),
    }
    last, penalty = hf.LogitNormalization(), hf.RepetitionPenaltyLogitsProcessor(1.5)
    for size in range(5):
        for names in itertools.permutations(warpers, size):
            made = [warpers[name] for name in names]
            in_order = sorted(names, key=order.index) == list(names)
            for processors in ([penalty, *made, last], [penalty, last, *made], made):
                check_split(LogitsProcessorList(processors), {*names} if in_order else set(), inputs)
            for processors in ([*made, penalty], [*made, penalty, last], [*made, last, last]):
                check_split(LogitsProcessorList(processors), set(), inputs)
    check_split(LogitsProcessorList([warpers["top_k"], *warpers.values()]), set(), inputs)


@pytest.mark.parametrize(
    "odd",
    [hf.TopKLogitsWarper(3, filter_value=-50.0), hf.TopPLogitsWarper(0.5, min_tokens_to_keep=2)],
    ids=["filter_value", "min_tokens_to_keep"],
)
def test_odd_warpers_are_not_fused(odd):
    inputs = prompt()["input_ids"]
    check_split(LogitsProcessorList([odd]), set(), inputs)
    check_split(LogitsProcessorList([hf.TemperatureLogitsWarper(0.5), odd]), set(), inputs)
    check_split(LogitsProcessorList([odd, hf.MinPLogitsWarper(0.5)]), set(), inputs)


# --- node by node, on the host


class ByRow(LogitsProcessor):
    """Forbids tokens by the row, its whole text and its earlier calls."""

    def __init__(self, batch, seed=0):
        self.state = torch.randint(0, 100, (batch,), generator=torch.Generator().manual_seed(seed))

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == len(self.state)
        key = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(1) + self.state
        return scores.scatter(1, (key[:, None] * 7 + torch.arange(0, 30, 4)) % scores.shape[1], -INF)


def on_host(arguments, budget=None, ends=()):
    tree, logits, tokens, length = arguments
    budget = np.full(len(tokens), 50) if budget is None else budget
    room = torch.nn.functional.pad(tokens, (0, 50)).numpy()  # for all nodes that the budget permits
    return tree, logits.clone(), room, length.numpy(), budget, list(ends)


def reachable(processors, arguments, budget, ends):
    """{(row, node): scores} of the nodes that the target can reach, computed independently from the root."""
    tree, logits, tokens, length = arguments
    wanted = {}
    for row, node in real_nodes(tree):
        path = path_of(tree, row, node)
        parents = [0, *path][: len(path)]
        possible = all((row, parent) in wanted for parent in parents) and len(path) < budget[row]
        for parent, child in zip(parents, path, strict=True):
            token = int(tree.tokens[row, child])
            possible = possible and wanted[row, parent][token] > -INF and token not in ends
        if possible:
            text = text_of(tree, tokens, length, row, node).expand(len(tokens), -1)
            wanted[row, node] = processors(text, logits[row, node].expand(len(tokens), -1).clone())[row]
    return wanted


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), **SIZES)
def test_each_node_that_can_be_reached_is_processed(seed, batch, nodes, columns):
    rng = np.random.default_rng(seed)
    arguments = case(rng, batch, nodes, 11, columns)
    processors = LogitsProcessorList([ByRow(batch, seed)])
    budget, ends = rng.choice([0, 1, 2, 3, 50], batch), ids(rng, 11)[:1]
    tree, scores, *host = on_host(arguments, budget, ends)
    process_each(processors, tree, scores, *host)
    wanted = reachable(processors, arguments, budget, ends)
    for row, node in itertools.product(range(batch), range(nodes)):
        assert torch.equal(scores[row, node], wanted.get((row, node), arguments[1][row, node]))


def test_a_grammar_gets_only_its_own_texts():
    """A grammar whose sentences count up or down from the last token of the prompt, or have ended. It raises an
    exception for any other text."""
    asked, end = [], 19

    def allowed(row, text):
        if end in text:
            assert text[4] == end and not text[5:].any(), "not ended as a row ends"
            return [0]
        steps = text[3:].diff().tolist()
        assert all(step == 1 for step in steps) or all(step == -1 for step in steps), "not a sentence"
        asked.append((row, tuple(text.tolist())))
        way = steps or [1, -1]
        return [(int(text[-1]) + step) % 20 for step in {way[0], way[-1]}]

    tokens, length = torch.tensor([[0, 0, 0, 9], [1, 1, 1, 5]]), torch.tensor([3, 3])
    drafted = torch.tensor([[9, 10, 8, 11, 9, 7, 12, 13, 3], [5, 6, 4, 5, 3, 3, 4, 4, 0]])
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 3, -1], [-1, 0, 0, 1, 2, 1, 5, 4, -1]], dtype=torch.int32)
    tree = DraftTree.from_parents(drafted, parents)
    arguments = tree, torch.randn(2, 9, 20), tokens, length
    _, scores, *host = on_host(arguments, ends=[end])
    process_each(LogitsProcessorList([PrefixConstrainedLogitsProcessor(allowed, 1)]), tree, scores, *host)
    finite = [[node for node in range(9) if scores[row, node].isinf().any()] for row in range(2)]
    assert finite == [[0, 1, 2, 3, 5, 6], [0, 1, 2, 4]]
    assert {text[4:] for row, text in asked if row == 0} == {(), (10,), (8,), (10, 11), (8, 7), (10, 11, 12)}
    assert {text[4:] for row, text in asked if row == 1} == {(), (6,), (4,), (4, 3)}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), **SIZES)
def test_a_path_of_ones_own_choice(seed, batch, nodes, columns):
    """The walk follows any given choice, such as one with noise keyed by row and depth."""
    rng = np.random.default_rng(seed)
    tree, logits, tokens, length = arguments = case(rng, batch, nodes, 11, columns, impossible=0.0)
    noise = torch.from_numpy(rng.gumbel(size=(batch, nodes, 11)).astype(np.float32) * 4)
    processors, ends = LogitsProcessorList([ByRow(batch, seed)]), ids(rng, 11)[:1]
    budget = rng.choice([0, 1, 2, 3, 50], batch)

    def choose(scores, rows, depth):
        return (scores + noise[rows, depth]).argmax(-1).tolist()

    tree, scores, *host = on_host(arguments, budget, ends)
    walked = {row: [] for row in range(batch)}
    for step in process_path(processors, tree, scores, *host, choose=choose):
        for row, (node, token) in step.items():
            walked[row].append((node, token))
    for row in range(batch):
        node, wanted = (0 if budget[row] else None), []
        processed = {}
        while node is not None:
            text = text_of(tree, tokens, length, row, node).expand(batch, -1)
            processed[node] = processors(text, logits[row, node].expand(batch, -1).clone())[row]
            token = int((processed[node] + noise[row, len(wanted)]).argmax())
            wanted.append((node, token))
            follows = token not in ends and len(wanted) < budget[row]
            children = [
                child
                for child in range(1, nodes)
                if tree.parents[row, child] == node and tree.tokens[row, child] == token
            ]
            node = children[0] if children and follows else None
        assert walked[row] == wanted
        for node in range(nodes):
            assert torch.equal(scores[row, node], processed.get(node, logits[row, node]))


# --- in `generate`

GREEDY = {
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[7], [9, 10], [3, 4, 5]],
    "sequence_bias": {(11,): -2.0, (12, 13): 3.0, (5, 6, 7): 1.5},
    "min_new_tokens": 9,
    "suppress_tokens": [20, 21],
    "begin_suppress_tokens": [22, 23, 24],
    "exponential_decay_length_penalty": (4, 1.1),
    "forced_eos_token_id": 1,
    "remove_invalid_values": True,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("names", [*((name,) for name in GREEDY), tuple(GREEDY)], ids=lambda names: names[-1])
def test_greedy_as_generate_does_it(names, monkeypatch):
    monkeypatch.setattr(sdt.engine.scores, "process_path", None)  # the host does not walk the tree
    model, inputs = build("llama"), prompt(batch=3, padding=4)
    end = int(model.generate(**inputs, do_sample=False, eos_token_id=NEVER, max_new_tokens=6)[0, -1])
    options = {name: GREEDY[name] for name in names}
    options |= {"do_sample": False, "max_new_tokens": 24, "eos_token_id": end, "return_dict_in_generate": True}
    options["output_scores"] = True
    plain = model.generate(**inputs, **options)
    shapes = sdt.Topology.from_widths([3, 2, 1]), sdt.Topology.chain(5)
    for shape in shapes:
        with sdt.patched(model, drafter=sdt.OracleDrafter(plain.sequences, 0.2, tree=shape)):
            ours = model.generate(**inputs, **options)
        assert torch.equal(ours.sequences, plain.sequences)
        assert sdt.stats(model).acceptance_length > 1.2
        live = torch.ones(3, dtype=torch.bool)
        emitted = plain.sequences[:, -len(plain.scores) :].T
        for got, wanted, token in zip(ours.scores, plain.scores, emitted, strict=True):
            torch.testing.assert_close(got[live], wanted[live], rtol=1e-4, atol=1e-4)
            live &= token != end
