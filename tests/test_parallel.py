"""Parallel drafts: P-EAGLE heads, and PARD models through `ModelDrafter(parallel=...)`.

A wrong draft never changes the text, and only lowers acceptance. The marginals of drafts are therefore compared with
literal statements, `literal_parallel`.
"""

import copy
from contextlib import nullcontext
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

import specdec_triton as sdt
from checkpoints import PARALLEL_LAYOUTS, favouring, target_of, write_head
from families import NEVER, add_noise, build, prompt
from helpers import accept_more, accepted, capture_here, eos_in_mid_row
from literal_parallel import MISTAKES, PEAGLE_MISTAKES, LiteralHead, LiteralModel
from specdec_triton.drafters.dynamic import DynamicSession
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.drafters.marginals import MarginalSession
from specdec_triton.drafters.parallel import HeadMarginals, ModelMarginals
from specdec_triton.tools.check_distribution import prove
from specdec_triton.tools.host_sync import count_forwards, count_host_reads

MASK = 60
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
TREE = sdt.DynamicTree(16, width=4, depth=4)
FIXED = sdt.Topology.from_widths([3, 2, 1, 1])
# The drafter computes in fp32, the literal statement in fp64. Drafts in which two scores differ by less than TOLERANCE
# are not compared by their tokens, and log-probabilities may differ by ERROR.
TOLERANCE, ERROR = 5e-4, 2e-3
LAYOUTS = tuple(PARALLEL_LAYOUTS)
PARD = ("llama", "gemma3", "gpt2", "qwen3")  # families of PARD models


def pard_of(family="llama", **options):
    """A model whose config names a mask token. It is sometimes right about the text of `target_of()`."""
    model = favouring(build(family, 2, **options))
    model.config.pard_token, model.config.spd_type = MASK, "pard"
    return model


class Drafted(NamedTuple):
    """The draft for one row in one round: the row, its tokens without padding, the root included, and the logits [D, V]
    of the next tokens, as far as they can be emitted."""

    row: int
    text: list[int]
    logits: torch.Tensor


def record(monkeypatch):
    """A list to which each later draft appends a `Drafted` for each unfinished row. Drafts read nothing on the host;
    reads are not counted if models are compiled."""
    drafts = []

    def spying(logits, self, depth):
        with nullcontext() if self.context.compiled else count_host_reads() as reads:
            found = logits(self, depth)
        assert reads is None or not reads.total
        now = self.context
        for row, budget in enumerate(now.host_budget.tolist()):
            if budget:
                text = now.tokens[row, now.start[row] : now.length[row] + 1].tolist()
                drafts.append(Drafted(row, text, found[row, :budget].clone()))
        return found

    for source in (HeadMarginals, ModelMarginals):
        logits = source.logits
        monkeypatch.setattr(source, "logits", lambda self, depth, logits=logits: spying(logits, self, depth))
    return drafts


class Run(NamedTuple):
    """One call with a parallel draft.

    Attributes:
        literal: a function of a text, the number of drafted tokens and a mistake: the literal statement.
        drafts: see `record`.
        text: the return value of `generate`.
    """

    literal: object
    drafts: list[Drafted]
    text: torch.Tensor


def run(kind, folder, inputs=None, options=GREEDY, more=False, target=None, draft=None, first=0, tree=None, **settings):
    """Run a call. `kind` is a layout of a P-EAGLE head or a family of PARD models; `draft` is the model, if it is not
    `pard_of(kind)`. For `more` see `accept_more`, for `first` see `LiteralDraft`."""
    target = target or target_of()
    if kind in LAYOUTS:
        head, judge = write_head(folder, target, PARALLEL_LAYOUTS[kind]), copy.deepcopy(target)
        drafter = sdt.EagleDrafter.from_pretrained(folder, target, tree=tree)

        def literal(text, count, mistake=""):
            return LiteralHead(head, judge, text, count, mistake, first)

    else:
        draft = draft or pard_of(kind)
        drafter, judge = sdt.ModelDrafter(draft, tree=tree, parallel=True), copy.deepcopy(draft).double()
        literal = partial(LiteralModel, judge, MASK)
    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=drafter, **settings):
        drafts = record(patches)
        if more:
            accept_more(patches)
        text = target.generate(**(inputs or prompt()), **options)
    return Run(literal, drafts, text)


def agreements(found, mistake="", limit=12):
    """For each of the first drafts, whether its marginals are those of the literal statement."""
    agree = []
    for _, text, logits in found.drafts[:limit]:
        wanted = found.literal(text, len(logits), mistake).marginals.log_softmax(-1)
        given = logits.double().log_softmax(-1)
        agree.append(torch.allclose(given, wanted, rtol=0, atol=ERROR))  # -inf is close to -inf alone
    return agree


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A function of a kind: its `Run`, in which drafts were accepted in part. Each kind runs once."""
    return cache(lambda kind: run(kind, tmp_path_factory.mktemp("head"), more=True))


# --- drafts


@pytest.mark.parametrize(
    "kind", [*LAYOUTS, "llama", *(pytest.param(family, marks=pytest.mark.slow) for family in PARD[1:])]
)
def test_marginals_equal_the_literal_statement(kind, recorded):
    """A row is padded on the left. The cache holds keys of mask rows that were replaced by those of accepted tokens."""
    found = recorded(kind)
    assert len(found.drafts[0].logits) == {"vllm": 7, "automodel": 6, "speculators": 5}.get(
        kind, 12 if kind in PARD else 7
    )
    agree, counts = agreements(found), accepted(found.drafts)
    assert len(agree) == 12 and all(agree)
    assert sum(0 < count < 4 for count in counts) >= 3 and max(counts) > 1


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        *(
            (kind, mistake)
            for kind, mistakes in (("vllm", PEAGLE_MISTAKES[:-1]), ("llama", MISTAKES))
            for mistake in mistakes
        ),
        ("automodel", "no norms of mask states"),
    ],
)
def test_a_mistake_would_be_noticed(kind, mistake, recorded):
    assert not any(agreements(recorded(kind), mistake, limit=4))


OTHER_CALLS = {
    "batch": {"inputs": prompt(batch=4, length=14, padding=6)},
    "one row": {"inputs": prompt(batch=1, length=12)},
    "chunks": {"options": {**GREEDY, "prefill_chunk_size": 4}},
    "fused": {"fuse": True},
    "compiled": {"compile": True},
    "kernels": {"impl": "triton", "options": {**GREEDY, "max_new_tokens": 8}, "tree": sdt.Topology.chain(3)},
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=[] if case in ("batch", "fused") and quick else pytest.mark.slow)
        for case in OTHER_CALLS
        for kind, quick in (("speculators", True), ("llama", True), ("vllm", False), ("qwen3", False))
    ],
)
def test_other_calls(case, kind, tmp_path):
    found = run(kind, tmp_path, **OTHER_CALLS[case])
    agree = agreements(found)
    assert len(agree) >= 4 and all(agree)


@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_a_cache_of_an_earlier_call(kind, tmp_path):
    """A head knows the columns that this call runs, and no earlier ones. A model runs the whole text."""
    target = target_of()
    first = target.generate(**prompt(batch=1), **{**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True})
    turn = torch.cat([first.sequences, prompt(batch=1, length=5, seed=1)["input_ids"]], 1)
    plain = target.generate(turn, **GREEDY)
    known = first.past_key_values.get_seq_length()
    inputs = {"input_ids": turn, "past_key_values": first.past_key_values}
    found = run(kind, tmp_path, inputs, target=target, first=known)
    assert torch.equal(found.text, plain)
    agree = agreements(found, limit=6)
    assert len(agree) == 6 and all(agree)


@pytest.mark.parametrize("kind", ["vllm", "llama"])
def test_rounds_without_a_draft(kind, monkeypatch, tmp_path):
    """`tree="auto"` asks for them. A model takes no forward then; it catches up in the next round with a draft."""
    prepare, rounds, root = LevelSession.prepare, [], sdt.Topology.chain(0)

    def preparing(self, tree=None):
        rounds.append(len(rounds) % 4 == 0)
        return prepare(self, tree if rounds[-1] else root)

    monkeypatch.setattr(LevelSession, "prepare", preparing)
    draft, forwards = pard_of(), []
    draft.register_forward_pre_hook(lambda *_: forwards.append(True))
    chain = sdt.Topology.chain(3)
    found = run(kind, tmp_path, prompt(batch=3), {**GREEDY, "max_new_tokens": 60}, more=True, tree=chain, draft=draft)
    drafted = sum(rounds)
    assert kind != "llama" or len(forwards) <= 2 * drafted  # with that of the prompt; the first round need not catch up
    agree = agreements(found, limit=24)
    assert drafted > 5 and len(agree) > 15 and all(agree) and max(accepted(found.drafts)) > 5


def test_a_model_of_fewer_tokens_than_the_target(monkeypatch):
    """Tokens that the draft has no embedding of are replaced by its last one. The model computes logits of all rows."""
    monkeypatch.setattr(LlamaForCausalLM, "_supports_logits_to_keep", lambda self: False)
    target = favouring(build("llama", 1, vocab_size=200))
    draft, inputs = pard_of(vocab_size=199), prompt()
    inputs["input_ids"][:, 5] = 199
    found = run("llama", None, inputs, target=target, draft=draft)
    assert torch.equal(found.text, target.generate(**inputs, **GREEDY))
    clamped = [drafted._replace(text=[min(token, 198) for token in drafted.text]) for drafted in found.drafts]
    assert all(agreements(found._replace(drafts=clamped)))


def record_trees(monkeypatch):
    """A list to which each later draft of fixed or dynamic trees appends the trees, if it drafts tokens."""
    trees = []

    def spying(draft, self):
        drafted = draft(self)
        if drafted.max_depth:
            trees.append(drafted.clone())
        return drafted

    for session in (LevelSession, DynamicSession):
        monkeypatch.setattr(session, "draft", lambda self, draft=session.draft: spying(draft, self))
    return trees


@pytest.mark.parametrize("tree", [TREE, FIXED], ids=["dynamic", "fixed"])
def test_trees_of_the_literal_marginals(tree, monkeypatch, tmp_path):
    trees = record_trees(monkeypatch)
    found, compared = run("vllm", tmp_path, prompt(batch=1), tree=tree), 0
    for (row, text, logits), drafted in zip(found.drafts, trees, strict=True):
        if drafted.max_depth < tree.max_depth:
            continue
        literal = found.literal(text, len(logits))
        if tree is FIXED:
            tokens, parents = literal.ranked(tree), list(tree.parents)
        else:
            tokens, parents, _ = literal.dynamic(tree.num_nodes, tree.width, tree.depth)
        if literal.margin > TOLERANCE:
            assert (drafted.tokens[row].tolist(), drafted.parents[row].tolist()) == (tokens, parents)
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("kind", ["vllm", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", ["multi_round", pytest.param("block", marks=pytest.mark.slow)])
def test_drawn_trees_state_the_literal_probabilities(rule, kind, monkeypatch, tmp_path):
    """Rules that weigh tokens need the probabilities from which they were drawn, zero outside a reduced vocabulary."""
    trees, shape = record_trees(monkeypatch), FIXED if rule == "multi_round" else sdt.Topology.chain(4)
    found, compared = run(kind, tmp_path, prompt(batch=1), SAMPLED, tree=shape, rule=rule), 0
    for (_, text, logits), drafted in list(zip(found.drafts, trees, strict=True))[:6]:
        wanted = found.literal(text, len(logits)).marginals.log_softmax(-1)
        for node, place in enumerate(drafted.draft_row[0].tolist()):
            if place >= 0:
                given = drafted.draft_logits[0, place].double().log_softmax(-1)
                torch.testing.assert_close(given, wanted[int(drafted.depth[0, node])], rtol=0, atol=ERROR)
                compared += 1
    assert compared >= 20


# --- texts


def drafter_of(kind, target, folder, **options):
    if kind in LAYOUTS:
        write_head(folder, target, PARALLEL_LAYOUTS[kind])
        return sdt.EagleDrafter.from_pretrained(folder, target, **options)
    return sdt.ModelDrafter(add_noise(pard_of(), 0.02), parallel=True, **options)


SHAPES = {
    "default": None,
    "likeliest": 12,
    "one node": 1,
    "dynamic": TREE,
    "widths": FIXED,
    "chain": sdt.Topology.chain(3),
    "auto": "auto",
}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, marks=[] if shape in quick else pytest.mark.slow)
        for kind, quick in (("vllm", ("default",)), ("llama", ("auto",)), ("speculators", ()))
        for shape in SHAPES
    ],
)
def test_the_text_is_the_targets(kind, shape, tmp_path):
    """The coupled text is that without a draft. Rows end early."""
    target, inputs = target_of(), prompt(batch=3)
    drafter = drafter_of(kind, target, tmp_path)
    ends = {**GREEDY, "eos_token_id": eos_in_mid_row(target, inputs, **GREEDY)}
    for options in (GREEDY, SAMPLED, ends):
        text = target.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
        with sdt.patched(target, drafter=drafter, seed=1, tree=SHAPES[shape]):
            assert torch.equal(target.generate(**inputs, **options), text)


@pytest.mark.parametrize(
    ("rule", "tree"),
    [
        ("multi_round", sdt.Topology.from_widths([2, 1])),
        *(
            pytest.param(rule, tree, marks=pytest.mark.slow)
            for rule, tree in (("block", None), ("rejection", 4), ("traversal", 6), ("multi_round", 5), ("coupled", 6))
        ),
    ],
)
def test_rules_keep_the_distribution(rule, tree):
    model, draft = (build("llama", seed, vocab_size=5, num_hidden_layers=1) for seed in (0, 1))
    drafter = sdt.ModelDrafter(draft, parallel=4, tree=tree, num_tokens=None if tree else 3)
    found = prove(model, drafter, rule, torch.tensor([[3, 4, 1]]), samples=1500, rows=1500)
    assert found.agrees and found.acceptance_length > 1


# --- cost


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "tree", "options"),
    [
        pytest.param(kind, tree, options, marks=[] if quick == name else pytest.mark.slow, id=f"{kind}-{name}")
        for kind, quick in (("vllm", "likeliest"), ("llama", "chain"))
        for name, tree, options in (("likeliest", 8, GREEDY), ("chain", sdt.Topology.chain(3), SAMPLED))
    ],
)
def test_captured_rounds_draft_the_same(kind, tree, options, lag, monkeypatch, tmp_path):
    """Random drafts are accepted equally often only if they are equal."""
    target = target_of()
    drafter = drafter_of(kind, target, tmp_path, tree=tree)
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


@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        pytest.param(kind, tree, marks=[] if quick else pytest.mark.slow, id=f"{kind}-{name}")
        for kind, chosen in (("vllm", "dynamic"), ("llama", "likeliest"))
        for name, tree in (("likeliest", 12), ("dynamic", TREE), ("fixed", FIXED))
        for quick in [name == chosen]
    ],
)
def test_forwards_and_host_reads_of_a_round(kind, tree, tmp_path):
    """A round takes one forward of the target, one of the draft, and at most one read by the host."""
    target = target_of()
    drafter, drafted, reads = drafter_of(kind, target, tmp_path, tree=tree), [], []
    drafter.model.register_forward_pre_hook(lambda *_: drafted.append(True))
    for length in (8, 28):
        with (
            sdt.patched(target, drafter=drafter),
            count_host_reads() as counted,
            count_forwards(target) as verified,
        ):
            drafted.clear()
            target.generate(**prompt(), **{**GREEDY, "max_new_tokens": length})
        rounds = sdt.stats(target).rounds
        assert len(verified) == rounds + 1  # and one for the prompt
        assert rounds - 1 <= len(drafted) - 1 <= rounds  # the last round of a text needs none
        reads.append((counted.total, rounds))
    (few_reads, few), (many_reads, many) = reads  # their difference is free of the prompt
    assert many - few > 5 and many_reads - few_reads <= many - few


# --- arguments


def shape_drafted(drafter, target, **options):
    """The session of a call, and the number of nodes and the depth of its first tree."""
    sessions, start = [], type(drafter).start

    def starting(self, context, tree=None):
        sessions.append(start(self, context, tree))
        return sessions[-1]

    inputs, rule = options.pop("inputs", prompt(batch=1)), options.pop("rule", None)
    options = {**(SAMPLED if rule else GREEDY), **options}
    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=drafter, rule=rule):
        patches.setattr(type(drafter), "start", starting)
        target.generate(**inputs, **options)
    return type(sessions[0]), sessions[0].max_nodes, sessions[0].max_depth


def test_shapes_of_a_head(tmp_path):
    target = target_of()
    short = {"max_new_tokens": 2}
    drafter = drafter_of("speculators", target, tmp_path)
    assert shape_drafted(drafter, target, **short) == (MarginalSession, 64, 5)
    assert shape_drafted(drafter, target, inputs=prompt(batch=8), **short) == (MarginalSession, 16, 5)
    assert shape_drafted(drafter, target, rule="block", **short) == (LevelSession, 6, 5)
    longer = sdt.EagleDrafter(drafter.model, num_tokens=9)
    assert shape_drafted(longer, target, **short) == (LevelSession, 10, 9)


def test_shapes_of_a_model():
    target, draft = build("llama"), pard_of()
    short = {"max_new_tokens": 2}
    assert shape_drafted(sdt.ModelDrafter(draft, parallel=True), target, **short) == (LevelSession, 13, 12)
    assert shape_drafted(sdt.ModelDrafter(draft, parallel=True, tree=16), target, **short) == (MarginalSession, 16, 12)
    assert shape_drafted(sdt.ModelDrafter(draft, parallel=True, tree=6), target, rule="block", **short)[1:] == (6, 5)
    draft.generation_config.num_assistant_tokens = 4
    assert shape_drafted(sdt.ModelDrafter(draft, parallel=5), target, **short) == (LevelSession, 5, 4)
    assert shape_drafted(sdt.ModelDrafter(draft, num_tokens=14, parallel=5), target, **short)[1:] == (15, 14)


def test_a_pard_model_without_the_argument_is_an_ordinary_draft_model():
    target, draft = build("llama"), pard_of()
    drafter = sdt.ModelDrafter(draft, num_tokens=3)
    assert repr(drafter) == "ModelDrafter(model=LlamaForCausalLM, num_tokens=3)"
    assert repr(sdt.ModelDrafter(draft, parallel=True)) == "ModelDrafter(model=LlamaForCausalLM, parallel=True)"
    with sdt.patched(target, drafter=drafter), count_forwards(draft) as drafted:
        target.generate(**prompt(), **GREEDY)
    assert len(drafted) > 2 * sdt.stats(target).rounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": True, "plain": True}, "parallel=True needs a PARD model, whose config has pard_token, got Llama"),
        ({"parallel": 61}, "the mask token of parallel must be the id of one of the 61 embeddings of .*, got 61"),
        ({"parallel": -1}, "the mask token of parallel must be the id of one of the 61 embeddings of .*, got -1"),
        ({"parallel": "mask"}, "the mask token of parallel must be the id of .*, got 'mask'"),
        (
            {"parallel": True, "confidence_threshold": 0.3},
            "confidence_threshold must be None or 0 with parallel, which drafts all tokens at once, got 0.3",
        ),
        ({"parallel": True, "num_tokens": 3, "tree": 4}, "give either num_tokens .a chain. or tree, got both"),
    ],
)
def test_arguments_of_a_model_that_are_refused(options, message):
    options = dict(options)
    draft = build("llama") if options.pop("plain", False) else pard_of()
    with pytest.raises(ValueError, match=f"^ModelDrafter: {message}"):
        sdt.ModelDrafter(draft, **options)


@pytest.mark.parametrize(
    ("kind", "tree", "rule", "message"),
    [
        ("vllm", sdt.Topology.chain(8), None, "EagleDrafter: tree must be at most 7 deep.*, got depth 8"),
        ("llama", sdt.DynamicTree(30, 3, 13), None, "ModelDrafter: tree must be at most 12 deep.*, got depth 13"),
        ("vllm", FIXED, "block", 'EagleDrafter: rule "block" needs a chain'),
        (
            "vllm",
            sdt.Topology.from_widths([41]),
            None,
            "a node of the tree must have at most 40 children, the size of the",
        ),
        (
            "llama",
            sdt.Topology.from_widths([62]),
            None,
            "a node of the tree must have at most 61 children, the size of the",
        ),
    ],
)
def test_trees_that_are_refused(kind, tree, rule, message, tmp_path):
    target = target_of()
    drafter = drafter_of(kind, target, tmp_path)
    with pytest.raises(ValueError, match=message):
        drafter.check(target, rule, tree)
