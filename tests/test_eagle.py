"""EAGLE draft heads: their drafts for random checkpoints in every published layout, and the text and cost of calls.

A wrong draft never changes the text, and only lowers acceptance. Tokens, parents and scores of drafts are therefore
compared with a literal statement, `literal_eagle`.
"""

import copy
import gc
import weakref
from functools import cache

import pytest
import torch
from transformers import DynamicCache

import specdec_triton as sdt
from checkpoints import FAVOURED, LAYOUTS, target_of, write_head
from families import NEVER, VOCAB, prompt
from helpers import accept_more, accepted, capture_here
from literal_eagle import MISTAKES, LiteralDraft
from recorded_drafts import TOLERANCE, agreements, record
from specdec_triton import _patch
from specdec_triton.drafters.eagle import DEFAULT_TREE, default_tree
from specdec_triton.forward import runner
from specdec_triton.heads.medusa import MedusaHeads
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.noise import COUPLED, gumbel, row_seeds
from specdec_triton.tools.host_sync import count_forwards, count_host_reads

TREE = sdt.DynamicTree(16, width=4, depth=4)
DEEP = sdt.DynamicTree(30, width=4, depth=7)
FIXED = sdt.Topology.from_widths([3, 2, 1, 1])
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
LONG = {**GREEDY, "max_new_tokens": 36}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}


def drafts_of(folder, target, layout, head_seed=0, inputs=None, tree=TREE, options=GREEDY, more=False, **settings):
    """A head, its recorded drafts in one call, and the text of the call. `more` accepts more drafts, see
    `accept_more`."""
    head = write_head(folder, target, layout, head_seed)
    drafter = sdt.EagleDrafter.from_pretrained(folder, target, tree=tree)
    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=drafter, **settings):
        drafts = record(patches, drafter)
        if more:
            accept_more(patches)
        text = target.generate(**(inputs or prompt()), **options)
    return head, drafts, text


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A function of a layout: a head, its drafts of one call, and a copy of the target. Each layout runs once."""

    @cache
    def run(layout):
        target = target_of()
        head, drafts, _ = drafts_of(tmp_path_factory.mktemp("head"), target, layout, options=LONG, more=True)
        return head, drafts, copy.deepcopy(target)

    return run


# --- drafts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_equal_the_literal_statement(layout, recorded):
    """A row is padded on the left. Drafts are accepted in part, so the head's cache holds rows of tree nodes that were
    replaced by rows of verified tokens."""
    head, drafts, judge = recorded(layout)
    found = agreements(drafts, head, judge, limit=16)
    assert len(found) >= 12 and all(found)
    counts = accepted(drafts[:16])
    assert sum(0 < count < TREE.depth for count in counts) >= 5 and max(counts) > 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_seeds_and_deeper_trees(layout, seed, tmp_path):
    target = target_of(seed=seed)
    options = {**GREEDY, "max_new_tokens": 60}
    head, drafts, _ = drafts_of(tmp_path, target, layout, seed, tree=DEEP, options=options, more=True)
    found = agreements(drafts, head, copy.deepcopy(target), width=DEEP.width, limit=100)
    assert len(found) >= 12 and all(found)
    counts = accepted(drafts)
    assert sum(0 < count < DEEP.depth for count in counts) >= 5 and max(counts) > 2


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", "safeailab"),
        ("gemma3", "eagle1"),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (("qwen3", "eagle1"), ("gemma3", "safeailab"))),
    ],
)
def test_targets_of_other_families(family, layout, tmp_path):
    """Gemma 3 scales its embeddings, which the head shares."""
    target = target_of(family)
    head, drafts, _ = drafts_of(tmp_path, target, layout)
    found = agreements(drafts, head, copy.deepcopy(target), limit=12)
    assert len(found) >= 10 and all(found)


OTHER_CALLS = {
    "batch": {"inputs": prompt(batch=4, length=14, padding=6)},
    "one row": {"inputs": prompt(batch=1, length=12)},
    "chunks": {"options": {**GREEDY, "prefill_chunk_size": 4}},
    "fused": {"fuse": True},
    "compiled": {"compile": True},
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=[] if quick and case != "compiled" else pytest.mark.slow)
        for case in OTHER_CALLS
        for layout, quick in (("speculators_3.1", True), ("specforge", False), ("hass", False))
    ],
)
def test_other_calls(case, layout, tmp_path):
    target = target_of()
    head, drafts, _ = drafts_of(tmp_path, target, layout, **OTHER_CALLS[case])
    found = agreements(drafts, head, copy.deepcopy(target), limit=12)
    assert len(found) >= 10 and all(found)


def test_long_prompts_run_in_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 4)
    target = target_of()
    head, drafts, _ = drafts_of(tmp_path, target, "safeailab", inputs=prompt(length=15, padding=5))
    found = agreements(drafts, head, copy.deepcopy(target), limit=8)
    assert len(found) == 8 and all(found)


@pytest.mark.parametrize("layout", ["safeailab", pytest.param("eagle1_two_layers", marks=pytest.mark.slow)])
def test_a_cache_of_an_earlier_call(layout, tmp_path):
    """The head knows the columns that this call runs, and no earlier ones."""
    target, judge = target_of(), target_of()
    options = {**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True}
    first = target.generate(**prompt(padding=0), **options)
    turn = torch.cat([first.sequences, prompt(length=5, padding=0, seed=1)["input_ids"]], 1)
    known = first.past_key_values.get_seq_length()
    inputs = {"input_ids": turn, "past_key_values": first.past_key_values}
    head, drafts, text = drafts_of(tmp_path, target, layout, inputs=inputs)
    assert torch.equal(text, judge.generate(turn, **GREEDY))
    found = agreements(drafts, head, judge, first=known, limit=12)
    assert len(found) >= 10 and all(found)


@pytest.mark.slow  # because kernels run in Triton's interpreter
@pytest.mark.parametrize("layout", ["safeailab", "eagle1"])
def test_kernels(layout, tmp_path):
    target, tree = target_of(), sdt.DynamicTree(6, width=2, depth=3)
    options = {**GREEDY, "max_new_tokens": 8}
    head, drafts, _ = drafts_of(tmp_path, target, layout, tree=tree, options=options, impl="triton")
    found = agreements(drafts, head, copy.deepcopy(target), width=2)
    assert len(found) >= 2 and all(found)


@pytest.mark.parametrize("layout", ["safeailab", pytest.param("eagle1", marks=pytest.mark.slow)])
def test_coupled_drafts_rank_by_the_targets_noise(layout, tmp_path):
    target, seeds = target_of(), row_seeds(5, 2)
    head, drafts, _ = drafts_of(tmp_path, target, layout, options=SAMPLED, seed=5)
    filters = Filters(torch.tensor([0.8], dtype=torch.float64), torch.tensor([20]))

    def rank(drafted):
        def ranked(logits, depth):
            log_probs = filtered_log_probs(logits[None, None], filters)[0, 0]
            noise = gumbel(seeds[drafted.row], torch.tensor(len(drafted.text) - 1 + depth), 0, COUPLED, VOCAB)
            return (log_probs + noise).log_softmax(-1)

        return ranked

    found = agreements(drafts, head, copy.deepcopy(target), rank=rank, limit=12)
    assert len(found) >= 10 and all(found)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param(shape, layout, id=f"{name}-{layout}", marks=[] if quick else pytest.mark.slow)
        for name, shape in (("widths", FIXED), ("chain", sdt.Topology.chain(4)), ("budget", 12))
        for layout, quick in (("safeailab", True), ("speculators_qwen3", False), ("eagle1_two_layers", False))
    ],
)
def test_fixed_trees_equal_the_literal_statement(shape, layout, tmp_path):
    target = target_of()
    head, drafts, _ = drafts_of(tmp_path, target, layout, tree=shape)
    topology = sdt.Topology.from_budget(shape) if isinstance(shape, int) else shape
    judge, compared = copy.deepcopy(target), 0
    for drafted in drafts[:12]:
        if drafted.budget > drafted.tree.max_depth == topology.max_depth:
            literal = LiteralDraft(head, judge, drafted.text)
            tokens = literal.ranked(topology)
            if literal.margin > TOLERANCE:
                assert drafted.tree.tokens[drafted.row].tolist() == tokens
                assert drafted.tree.parents[drafted.row].tolist() == list(topology.parents)
                compared += 1
    assert compared >= 6


@pytest.mark.parametrize("layout", ["safeailab", pytest.param("eagle1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", ["multi_round", "block"])
def test_drawn_trees_state_the_literal_probabilities(rule, layout, tmp_path):
    """Rules that weigh tokens need the probabilities from which they were drawn, zero outside a reduced vocabulary."""
    target = target_of()
    shape = FIXED if rule == "multi_round" else sdt.Topology.chain(4)
    head, drafts, _ = drafts_of(tmp_path, target, layout, tree=shape, options=SAMPLED, rule=rule)
    judge, compared = copy.deepcopy(target), 0
    for row, text, budget, tree, _ in drafts[:10]:
        if budget <= tree.max_depth:
            continue
        literal, paths = LiteralDraft(head, judge, text), [()]
        for node, parent in enumerate(tree.parents[row].tolist()):
            if node:
                paths.append((*paths[parent], int(tree.tokens[row, node])))
            place = int(tree.draft_row[0 if len(tree.draft_row) == 1 else row, node])
            if place >= 0:
                given = tree.draft_logits[row, place].double().log_softmax(-1)
                wanted = literal.logits(paths[node]).log_softmax(-1)
                torch.testing.assert_close(given, wanted, rtol=0, atol=2 * TOLERANCE)
                compared += 1
    assert compared >= 20


# mistake -> a layout that it concerns
CONCERNED = {
    "offsets as ids": "safeailab",
    "states in reverse order": "safeailab",
    "neighbouring states": "speculators_qwen3",
    "hidden before embedding": "specforge_model",
    "other residual": "speculators_norm_before_fc",
    "other feedback": "safeailab",
    "no shift": "safeailab",
    "rope base of the target": "safeailab",
    "no rope scaling": "specforge",
    "one position for all levels": "safeailab",
    "own score": "safeailab",
    "embedding of the target": "safeailab_whole_vocabulary",
    "no bias of fc": "eagle1",
    "no biases of attention": "eagle1_qwen2",
    "no norms of queries and keys": "speculators_qwen3",
    "an input norm too many": "eagle1",
    "no norms of inputs": "hass",
    "other norm before the head": "eagle1",
    "one layer": "eagle1_two_layers",
    "no window": "speculators_qwen3_window",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_noticed(mistake, recorded):
    head, drafts, judge = recorded(CONCERNED[mistake])
    assert not all(agreements(drafts, head, judge, mistake, limit=5))


# --- texts


SHAPES = {
    "default": None,
    "dynamic": TREE,
    "root only": sdt.DynamicTree(1, 2, 2),
    "widths": FIXED,
    "chain": sdt.Topology.chain(3),
    "auto": "auto",
}


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        pytest.param(layout, shape, marks=[] if quick and shape in ("default", "auto") else pytest.mark.slow)
        for layout, quick in (("safeailab", True), ("safeailab_wider_target", False), ("hass", False))
        for shape in SHAPES
    ],
)
def test_the_text_is_the_targets(layout, shape, tmp_path):
    target, inputs = target_of(), prompt(batch=3)
    write_head(tmp_path, target, layout)
    drafter = sdt.EagleDrafter.from_pretrained(tmp_path, target)
    for options in (GREEDY, SAMPLED):
        text = target.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
        with sdt.patched(target, drafter=drafter, seed=1, tree=SHAPES[shape]):
            assert torch.equal(target.generate(**inputs, **options), text)


def test_a_text_longer_than_the_heads_positions(tmp_path):
    """Its config states 16 positions; the texts have 9 + 60 tokens."""
    target = target_of()
    options = {**GREEDY, "max_new_tokens": 60}
    head, drafts, text = drafts_of(tmp_path, target, "specforge", options=options)
    assert torch.equal(text, target.generate(**prompt(), **options))
    late = [drafted for drafted in drafts if len(drafted.text) > 40]
    found = agreements(late, head, copy.deepcopy(target), limit=6)
    assert len(found) >= 4 and all(found)


def test_a_row_that_ends_early(tmp_path):
    target = target_of()
    options = {**GREEDY, "eos_token_id": [FAVOURED[3]]}
    plain = target.generate(**prompt(batch=4), **options)
    _, _, text = drafts_of(tmp_path, target, "safeailab", inputs=prompt(batch=4), options=options)
    assert torch.equal(text, plain)


# --- cost


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [GREEDY, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "coupled"])
@pytest.mark.parametrize("layout", ["safeailab", pytest.param("eagle1", marks=pytest.mark.slow)])
def test_captured_rounds_draft_the_same(layout, options, lag, monkeypatch, tmp_path):
    """Random drafts are accepted equally often only if they are equal."""
    target = target_of()
    write_head(tmp_path, target, layout)
    drafter = sdt.EagleDrafter.from_pretrained(tmp_path, target, tree=sdt.DynamicTree(8, width=3, depth=3))
    with sdt.patched(target, drafter=drafter, seed=1, cuda_graphs=False):
        text = target.generate(**prompt(), **options)
    eager = sdt.stats(target)
    with sdt.patched(target, drafter=drafter, seed=1):
        capture_here(monkeypatch, lag)
        for call in range(2):  # a later call replays the graphs of the first
            assert torch.equal(target.generate(**prompt(), **options), text)
            stats = sdt.stats(target)
            assert stats.replayed > 5 and (stats.captured, stats.reused) == ((0, 2) if call else (2, 0))
            # the last drafts differ, because captured rounds also draft tokens that can no longer be emitted
            assert stats.accepted_by_position[:2] == pytest.approx(eager.accepted_by_position[:2], abs=1)


@pytest.mark.parametrize("tree", [TREE, FIXED], ids=["dynamic", "fixed"])
def test_forwards_and_host_reads_of_a_round(tree, monkeypatch, tmp_path):
    """A round takes one forward of the target, at most one of the head for each level, and at most one read by the
    host."""
    target = target_of()
    write_head(tmp_path, target, "safeailab")
    drafter = sdt.EagleDrafter.from_pretrained(tmp_path, target, tree=tree)
    forward, forwards, reads = type(drafter.model).forward, [], []

    def counting(self, *args, **named):
        forwards.append("head")
        return forward(self, *args, **named)

    monkeypatch.setattr(type(drafter.model), "forward", counting)
    for length in (8, 28):
        forwards.clear()
        with sdt.patched(target, drafter=drafter), count_host_reads() as counted, count_forwards(target) as verified:
            target.generate(**prompt(), **{**GREEDY, "max_new_tokens": length})
        rounds = sdt.stats(target).rounds
        assert len(verified) == rounds + 1  # and one for the prompt
        assert 0.5 * rounds * tree.max_depth < len(forwards) - 1 <= rounds * tree.max_depth
        reads.append((counted.total, rounds))
    (few_reads, few), (many_reads, many) = reads  # their difference is free of the prompt
    assert many - few > 5 and many_reads - few_reads <= many - few


@pytest.mark.parametrize("drafter", ["eagle", "medusa"])
def test_later_turns_of_a_conversation_replay_graphs(drafter, monkeypatch, tmp_path):
    """The head sees only the columns that a turn runs; their number is not part of the graphs. Nothing accumulates."""
    capture_here(monkeypatch, 1)
    target = target_of()
    if drafter == "eagle":
        write_head(tmp_path, target, "safeailab")
        drafter = sdt.EagleDrafter.from_pretrained(tmp_path, target, num_tokens=3)
    else:
        random = torch.Generator().manual_seed(0)
        weights = (torch.randn(shape, generator=random) for shape in ((1, 3, 32, 32), (3, VOCAB, 32)))
        layers, outputs = (each / 6 for each in weights)
        drafter = sdt.MedusaDrafter(MedusaHeads(layers, None, outputs), tree=6)
    cache, text, reused, kept = DynamicCache(), prompt(batch=1)["input_ids"], [], []
    with sdt.patched(target, drafter=drafter):
        for _ in range(5):
            options = {**GREEDY, "max_new_tokens": 20, "past_key_values": cache}
            text = target.generate(text, attention_mask=torch.ones_like(text), **options)
            reused.append(sdt.stats(target).reused)
            kept.append(len(_patch._workspaces[target]._idle[-1].buffers._kept))
            text = torch.cat([text, text[:, :3]], 1)
    assert reused.count(2) >= 3, "the capacity grows once"
    assert kept[1] == kept[-1]


@pytest.mark.parametrize("tree", [TREE, FIXED], ids=["dynamic", "fixed"])
def test_nothing_of_a_call_outlives_it(tree, monkeypatch, tmp_path):
    """Not even until Python collects reference cycles. Of a chunk of the prompt, one state is kept."""
    target = target_of()
    write_head(tmp_path, target, "safeailab")
    drafter, alive = sdt.EagleDrafter.from_pretrained(tmp_path, target, tree=tree), []
    start = type(drafter).start

    def starting(self, context, *args):
        session = start(self, context, *args)
        reader = context.prompt_reader
        alive.extend(map(weakref.ref, (context, context.target, reader)))
        assert reader.cache is None and reader.last.untyped_storage().nbytes() == reader.last.nbytes
        return session

    monkeypatch.setattr(type(drafter), "start", starting)
    gc.collect()
    gc.disable()
    try:
        target.generate(**prompt(), **GREEDY, custom_generate=sdt.SpeculativeGenerate(drafter=drafter))
        assert [each() for each in alive] == [None] * 3
    finally:
        gc.enable()


def test_the_default_tree_is_smaller_in_batches():
    trees = [default_tree(batch) for batch in (1, 2, 3, 8, 64, 1000)]
    assert trees[0] is trees[1] is DEFAULT_TREE
    sizes = [tree.num_nodes for tree in trees]
    assert sizes == sorted(sizes, reverse=True) and sizes[3] == 16 and sizes[-1] == 4
    assert all(tree.depth < tree.num_nodes for tree in trees)
