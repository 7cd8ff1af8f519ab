"""Suffix decoding with a draft model or a trained head as fallback.

Wrong drafts never change the text, and only lower acceptance. The logits from which the fallback drafts are therefore
compared with those of a new session that starts from the same text.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch

import specdec_triton as sdt
from checkpoints import PARALLEL_LAYOUTS, target_of, write_head
from dflash_checkpoints import write_dflash
from families import NEVER, VOCAB, add_noise, build, prompt
from helpers import TREES, capture_here, eos_in_mid_row
from mtp_checkpoints import write_mtp
from specdec_triton.drafters.base import DelegatingDrafter, DraftSession
from specdec_triton.drafters.fallback import FallbackSession
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.heads.checkpoint import Checkpoint
from specdec_triton.heads.medusa import MedusaHeads
from specdec_triton.ops.rules import CHAIN_RULES
from specdec_triton.tools.check_distribution import prove
from specdec_triton.tools.host_sync import count_forwards
from specdec_triton.tree import DraftTree
from vocabularies import draft_tokenizers, target_tokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
CHAIN, FIXED = sdt.Topology.chain(3), sdt.Topology.from_widths([3, 2, 1])
DYNAMIC = sdt.DynamicTree(12, width=3, depth=3)


# --- drafters


class Proposal(NamedTuple):
    """A draft for one row: tokens and parents, the root first, and the expected number of accepted tokens."""

    tokens: list[int]
    parents: list[int]
    expected: float

    def first(self, nodes):
        return Proposal(self.tokens[:nodes], self.parents[:nodes], 0.0)


class Scripted(DraftSession):
    """Proposes the continuations of known texts in some rounds. It then expects as many accepted tokens as it proposes.

    Args:
        context: the call's sequences.
        text: [B, T]. The texts, padded as in the call.
        pattern: a function of the row and the number of the round: the number of tokens to propose, 0 for none.
        branches: True for trees, in which each token has a wrong sibling before it.
    """

    trusted, max_depth, times = True, 12, None

    def __init__(self, context, text, pattern, branches):
        self.context, self.text, self.pattern, self.branches = context, text, pattern, branches
        self.max_nodes = 1 + self.max_depth * (1 + branches)
        self.rounds = self.finished = 0
        self.taken = []  # the number of nodes of each row, for each tree

    def draft(self):
        raise AssertionError("the session that has a fallback drafts")

    def propose(self):
        context, proposals = self.context, []
        for row, (length, budget) in enumerate(zip(context.host_length, context.host_budget, strict=True)):
            depth = max(min(self.pattern(row, self.rounds), budget - 1, self.text.shape[1] - 1 - length), 0)
            tokens, parents, node = [int(context.host_tokens[row, length])], [-1], 0
            for token in self.text[row, length + 1 : length + 1 + depth].tolist():
                for child in ((token + 1) % context.vocab_size, token) if self.branches else (token,):
                    tokens.append(child)
                    parents.append(node)
                node = len(tokens) - 1
            proposals.append(Proposal(tokens, parents, float(depth)))
        self.rounds += 1
        return proposals

    def cut(self, proposals):
        return proposals

    def tree_of(self, proposals):
        sizes = [len(proposal.tokens) for proposal in proposals]
        self.taken.append(sizes)
        width = -(-max(sizes) // 4) * 4
        tokens = [proposal.tokens + [0] * (width - len(proposal.tokens)) for proposal in proposals]
        parents = [proposal.parents + [-1] * (width - len(proposal.tokens)) for proposal in proposals]
        depth = min(self.max_depth, width - 1)
        parents = torch.tensor(parents, dtype=torch.int32)
        return DraftTree.from_parents(torch.tensor(tokens), parents, depth, is_chain=not self.branches)

    def finish(self):
        self.finished += 1


def alternating(row, number):
    """Rows are in different phases, so that most rounds are mixed. Some paths are longer than those of any head."""
    return (0, 7, 0, 0, 11, 2)[(number + 2 * row) % 6]


def together(row, number):
    """All rows take the same kind of draft."""
    return (0, 5, 11, 0, 0)[number % 5]


class WithFallback(DelegatingDrafter):
    """Scripted drafts with a fallback. The arguments are those of `Scripted`.

    Attributes:
        session: the last session, an attribute of the class: calls with equal drafters share their graphs.
    """

    def __init__(self, drafter, text, pattern=alternating, branches=True, below=1.0):
        super().__init__(drafter)
        self.text, self.pattern, self.branches, self.below = text, pattern, branches, below

    def start(self, context, tree=None):
        scripted = Scripted(context, self.text, self.pattern, self.branches)
        WithFallback.session = FallbackSession(scripted, self.drafter, self.below, context, tree)
        return self.session

    @property
    def scripted(self):
        return self.session._suffix


class Drafted(NamedTuple):
    """The draft for one row in one round: its text without padding, the root included; the number of tokens that it may
    still emit; and the tokens and the logits [n, V] of each forward."""

    row: int
    text: list[int]
    budget: int
    steps: list[tuple[torch.Tensor, torch.Tensor]]


class Enough(Exception):
    """Ends a call after its first draft."""


class Watched(DelegatingDrafter):
    """Records the drafts of another drafter for unfinished rows. With `once`, a call ends after its first draft."""

    def __init__(self, drafter, once=False):
        super().__init__(drafter)
        self.once, self.drafts = once, []

    def start(self, context, tree=None):
        session, steps = self.drafter.start(context, tree), []
        draft = session.draft

        if hasattr(session, "_forwards"):
            forwards = session._forwards
            begin, expand = forwards.begin, forwards.expand

            def beginning():
                root, logits = begin()
                steps.append((root.clone(), logits.clone()))
                return root, logits

            def expanding(tokens, *rest):
                logits = expand(tokens, *rest)
                steps.append((tokens.clone(), logits.clone()))
                return logits

            forwards.begin, forwards.expand = beginning, expanding
        else:
            logits = session._source.logits

            def predicting(depth):
                found = logits(depth)
                steps.append((context.root[:, None], found.clone()))
                return found

            session._source.logits = predicting

        def drafting():
            steps.clear()
            tree = draft()
            for row, budget in enumerate(context.host_budget.tolist()):
                if budget > 1 and steps:
                    text = context.tokens[row, context.start[row] : context.length[row] + 1].tolist()
                    own = [(tokens[row], logits[row]) for tokens, logits in steps]
                    self.drafts.append(Drafted(row, text, budget, own))
            if self.once:
                raise Enough
            return tree

        session.draft = drafting
        return session


def medusa(target, folder):
    random, hidden = torch.Generator().manual_seed(3), target.config.hidden_size
    tensors = {}
    for head in range(4):
        tensors[f"{head}.0.linear.weight"] = torch.randn(hidden, hidden, generator=random) / hidden**0.5
        tensors[f"{head}.0.linear.bias"] = torch.randn(hidden, generator=random)
        noise = torch.randn(VOCAB, hidden, generator=random)
        tensors[f"{head}.1.weight"] = target.get_output_embeddings().weight.detach() + 0.1 * noise
    return sdt.MedusaDrafter(MedusaHeads.from_checkpoint(Checkpoint("random heads", {}, tensors)))


def eagle(layout, **shape):
    def drafter(target, folder):
        write_head(folder, target, layout)
        return sdt.EagleDrafter.from_pretrained(folder, target, **shape)

    return drafter


def dflash(**shape):
    def drafter(target, folder):
        write_dflash(folder, target, "z-lab")
        return sdt.DFlashDrafter.from_pretrained(folder, target, **shape)

    return drafter


def model(**options):
    return lambda target, folder: sdt.ModelDrafter(add_noise(target_of(), 0.2), **options)


def translated(pair, **options):
    """A draft model with another tokenizer."""
    names = {"tokenizer": target_tokenizer(), "assistant_tokenizer": draft_tokenizers()[pair]}
    draft = build("llama", 2, vocab_size=len(names["assistant_tokenizer"]))
    return lambda target, folder: sdt.ModelDrafter(draft, **names, **options)


def mtp(family, num_layers, **shape):
    """The checkpoint has a target of its own."""
    return family, num_layers, shape


# name -> a function of the target and a folder
FALLBACKS = {
    "model": model(num_tokens=3),
    "model, default": model(),
    "model, tree": model(tree=TREES["skipping"]),
    "model, dynamic": model(tree=DYNAMIC),
    "model, other tokens": translated("bytes", num_tokens=3),
    "model, other tokens, tree": translated("sentences", tree=TREES["skipping"]),
    "PARD": model(parallel=60),
    "early exit": lambda target, folder: sdt.EarlyExitDrafter(4, num_tokens=3),
    "skipped layers": lambda target, folder: sdt.EarlyExitDrafter(skip=[2, 5], num_tokens=3),
    "EAGLE-3": eagle("safeailab", tree=DYNAMIC),
    "EAGLE-1, chain": eagle("eagle1", num_tokens=3),
    "P-EAGLE": eagle(PARALLEL_LAYOUTS["vllm"], num_tokens=3),
    "DFlash": dflash(),
    "DFlash, tree": dflash(tree=FIXED),
    "Medusa": medusa,
    "MTP": mtp("deepseek_v3", 1, tree=DYNAMIC),
    "MTP, three layers": mtp("mimo", 3),
}
SLOW = ("model, dynamic", "model, other tokens", "skipped layers", "EAGLE-1, chain", "DFlash, tree")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function of a name in `FALLBACKS`: a target, the drafter, and the target's greedy text after `prompt(3)`."""

    @cache
    def make(name):
        folder, drafter = tmp_path_factory.mktemp("head"), FALLBACKS[name]
        if isinstance(drafter, tuple):
            family, num_layers, shape = drafter
            target = write_mtp(folder, family, num_layers).target()
            drafter = sdt.MTPDrafter.from_target(target, **shape)
        else:
            target = target_of()
            drafter = drafter(target, folder)
        return target, drafter, target.generate(**prompt(3), **GREEDY)

    return make


# --- texts and drafts


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        pytest.param(name, pattern, marks=[] if name in quick else pytest.mark.slow)
        for pattern, quick in ((alternating, set(FALLBACKS) - set(SLOW)), (together, ("model", "EAGLE-3")))
        for name in FALLBACKS
    ],
)
def test_drafts_are_those_of_a_new_session(name, pattern, made):
    """Rows are padded on the left. They verify both kinds of drafts, in the same round and in turn."""
    target, drafter, plain = made(name)
    watched = Watched(drafter)
    hybrid = WithFallback(watched, plain, pattern)
    with sdt.patched(target, drafter=hybrid):
        assert torch.equal(target.generate(**prompt(3), **GREEDY), plain)
    assert hybrid.scripted.finished == 1
    taken = torch.tensor(hybrid.scripted.taken)
    assert (taken.amax(1) > 20).any()
    assert (taken == 1).any() if pattern is alternating else len(taken) < hybrid.scripted.rounds
    compared = 0
    for drafted in watched.drafts[3:12]:
        new = Watched(drafter, once=True)
        text = torch.tensor([drafted.text[:-1]])
        with sdt.patched(target, drafter=new), pytest.raises(Enough):
            target.generate(text, **{**GREEDY, "max_new_tokens": drafted.budget + 1})
        assert new.drafts[0].text == drafted.text and new.drafts[0].budget == drafted.budget
        for (fed, logits), (tokens, wanted) in zip(drafted.steps, new.drafts[0].steps, strict=False):
            if not torch.equal(fed, tokens):
                break  # two tokens nearly tied
            count = min(len(logits), len(wanted))
            torch.testing.assert_close(logits[:count], wanted[:count], rtol=1e-3, atol=1e-3)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("model, tree", "MTP") else pytest.mark.slow) for name in FALLBACKS]
)
def test_sampled_texts_and_early_ends(name, made):
    """Under "coupled" a text does not depend on its drafts. The first row ends in the middle, another never."""
    target, drafter, _ = made(name)
    options = {**SAMPLED, "eos_token_id": eos_in_mid_row(target, prompt(3), **GREEDY)}
    with sdt.patched(target, drafter=sdt.NoDrafter(), seed=1):
        plain = target.generate(**prompt(3), **options)
    for branches in (False, True):
        hybrid = WithFallback(drafter, plain, branches=branches)
        with sdt.patched(target, drafter=hybrid, seed=1):
            assert torch.equal(target.generate(**prompt(3), **options), plain)
        assert sdt.stats(target).acceptance_length > 2


# --- cost


def test_forwards_of_a_model():
    """Rounds without the fallback's draft take no forward of it. The next draft takes one more forward if tokens are
    lacking, also if other drafts were verified while it drafted."""
    target, draft = build("llama"), build("llama")  # every draft is right
    plain = target.generate(**prompt(2), **GREEDY)

    def forwards(pattern):
        hybrid = WithFallback(sdt.ModelDrafter(draft, tree=CHAIN), plain, pattern)
        with sdt.patched(target, drafter=hybrid), count_forwards(draft) as rows:
            assert torch.equal(target.generate(**prompt(2), **GREEDY), plain)
        stats = sdt.stats(target)
        assert stats.emitted == 2 * 40 and stats.rounds == hybrid.scripted.rounds
        return rows[1:], stats  # without the prompt's

    rows, stats = forwards(lambda row, number: 0)
    assert rows == [2, 1, 1] * 9 + [2, 1] and stats.rounds == 10
    # 4 tokens of the first round, of which the draft has run 1 column beyond the root, and 2 * 8 of the next two
    rows, _ = forwards(lambda row, number: 7 * (number in (1, 2)))
    assert rows[:7] == [2, 1, 1, 19 - 1, 2, 1, 1] and rows[7:10] == [2, 1, 1]
    # row 1 verifies 7 other tokens; the root and the last of them are in the next round's first forward
    rows, _ = forwards(lambda row, number: 7 * (number == 1 and row == 1))
    assert rows[:10] == [2, 1, 1, 2, 1, 1, 7 - 1, 2, 1, 1] and rows[10:13] == [2, 1, 1]
    # a single token is not lacking, because the next round's first forward runs it
    rows, _ = forwards(lambda row, number: number == 1 and row == 1)
    assert rows[:9] == [2, 1, 1] * 3


def test_forwards_of_a_head(made):
    """Each round takes one forward over the tokens that were accepted last, and one for each further level of a draft.
    Only rounds after longer paths have more rows."""
    target, drafter, plain = made("EAGLE-1, chain")
    forward, rows = drafter.model.forward, []

    def counting(*args, **named):
        rows.append(named["features"].shape[1])
        return forward(*args, **named)

    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=WithFallback(drafter, plain, together)):
        patches.setattr(drafter.model, "forward", counting)
        target.generate(**prompt(3), **GREEDY)
    assert rows[1:10] == [4, 1, 1, 4, 8, 13, 1, 1, 4]


@pytest.mark.parametrize(
    ("pattern", "bounds"),
    [
        (lambda row, number: 3 * (number in (1, 2)), [[4, 4], [4, 4], [4, 4], [6, 6], [8, 8]]),
        (lambda row, number: 3 * (number > 0 and row == 0), [[4, 4], [4, 6], [4, 8], [4, 10]]),
    ],
)
def test_lengths_of_chains_follow_own_drafts_alone(pattern, bounds, monkeypatch):
    """The schedule of transformers raises the bound after each draft that is accepted in full. Rows that verified
    another draft do not count."""
    target, draft, seen, observe = build("llama"), build("llama"), [], FallbackSession.observe_on_host
    draft.generation_config.update(
        num_assistant_tokens=2, assistant_confidence_threshold=0.0, num_assistant_tokens_schedule="heuristic"
    )
    plain = target.generate(**prompt(2), **GREEDY)

    def observing(session, *counts):
        observe(session, *counts)
        seen.append(session._fallback._length._bound.tolist())

    monkeypatch.setattr(FallbackSession, "observe_on_host", observing)
    with sdt.patched(target, drafter=WithFallback(sdt.ModelDrafter(draft), plain, pattern)):
        assert torch.equal(target.generate(**prompt(2), **GREEDY), plain)
    assert seen[: len(bounds)] == bounds
    # as in transformers, the config keeps the bound for later calls
    assert draft.generation_config.num_assistant_tokens == sum(seen[-1]) // 2 > 4


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("model", "DFlash") else pytest.mark.slow) for name in FALLBACKS]
)
def test_captured_rounds(name, made, monkeypatch):
    """The draft runs eagerly, and verification is captured. A later call replays the graphs."""
    target, drafter, plain = made(name)
    inputs = {**prompt(3), **GREEDY}
    hybrid = WithFallback(drafter, plain)
    with sdt.patched(target, drafter=hybrid, cuda_graphs=False):
        target.generate(**inputs)
    eager = sdt.stats(target)
    capture_here(monkeypatch, 1)
    with sdt.patched(target, drafter=hybrid):
        for call in range(2):
            assert torch.equal(target.generate(**inputs), plain)
            stats = sdt.stats(target)
            assert stats.why_eager is None and stats.lag == 0 and abs(stats.rounds - eager.rounds) <= 1
            assert stats.replayed > 2 and bool(stats.reused) == bool(call)


@pytest.mark.parametrize(
    ("draft", "levels", "takes"),
    [
        ("right", 4, 3),  # 4 tokens are accepted at most
        ("wrong", 4, 1),
        ("right", 1, 1),
        ("large", 4, 1),  # each of its levels takes as long as a plain step
    ],
)
def test_the_estimated_threshold(draft, levels, takes, monkeypatch):
    """It is the number of tokens at which both drafts emit equally many per second. Rounds of the fallback come
    first."""
    target, model = build("llama", num_hidden_layers=4), build("llama", num_hidden_layers=4)
    if draft == "wrong":
        model = build("llama", seed=3)
    if draft != "large":
        monkeypatch.setattr(LevelSession, "level_cost_ratio", 0.05)
    options = {**GREEDY, "max_new_tokens": 120}
    plain = target.generate(**prompt(1), **options)
    drafter = sdt.ModelDrafter(model, tree=sdt.Topology.chain(levels))
    taken = {}
    for proposed in (1, 2, 3, 4):
        hybrid = WithFallback(drafter, plain, lambda row, number, most=proposed: most * (number >= 15), True, None)
        with sdt.patched(target, drafter=hybrid):
            assert torch.equal(target.generate(**prompt(1), **options), plain)
        taken[proposed] = len(hybrid.scripted.taken) > 0
    assert taken == {proposed: proposed >= takes for proposed in taken}


# --- distributions


def proof(rule, pattern, **shape):
    """The copied drafts are of random tokens."""
    options = {"vocab_size": 5, "num_hidden_layers": 1}
    target, draft = build("llama", **options), build("llama", seed=1, **options)
    copied = torch.randint(0, 5, (2000, 12), generator=torch.Generator().manual_seed(0))
    branches = rule not in CHAIN_RULES
    hybrid = WithFallback(sdt.ModelDrafter(draft, **shape), copied, pattern, branches)
    found = prove(target, hybrid, rule, torch.tensor([[3, 4, 1]]), tokens=4, samples=2000, rows=2000, temperature=1.3)
    return found, hybrid.scripted


def by_row(row, number):
    return (row + number) % 3


def in_turn(row, number):
    """Whole batches take turns, because the fallback draws its tokens."""
    return (0, 2)[number % 2]


@pytest.mark.parametrize(
    ("rule", "pattern", "shape"),
    [
        ("rejection", in_turn, {"num_tokens": 2}),
        pytest.param("multi_round", in_turn, {"tree": sdt.Topology.from_widths([2, 1])}, marks=pytest.mark.slow),
        ("multi_round", by_row, {"tree": sdt.DynamicTree(5, 2, 2)}),
        pytest.param("block", in_turn, {"num_tokens": 2}, marks=pytest.mark.slow),
        pytest.param("traversal", in_turn, {"tree": sdt.Topology.from_widths([2, 1])}, marks=pytest.mark.slow),
        pytest.param("traversal", by_row, {"tree": sdt.DynamicTree(5, 2, 2)}, marks=pytest.mark.slow),
        pytest.param("coupled", by_row, {"tree": FIXED}, marks=pytest.mark.slow),
    ],
)
def test_the_distribution_is_kept(rule, pattern, shape):
    found, scripted = proof(rule, pattern, **shape)
    assert found.agrees and found.is_conclusive, found
    taken = torch.tensor(scripted.taken)
    assert (taken > 1).any() and (len(taken) < scripted.rounds or (taken == 1).any())


def test_a_choice_by_drawn_tokens_is_caught(monkeypatch):
    """A decision for or against the fallback after its tokens are drawn biases the text."""
    draft = FallbackSession.draft

    def choosing(session):
        tree = draft(session)
        if tree.sampling != "none":
            tree.parents[tree.tokens[:, 1] < 2, 1:] = -1
        return tree

    monkeypatch.setattr(FallbackSession, "draft", choosing)
    found, _ = proof("rejection", in_turn, num_tokens=2)
    assert not found.agrees


# --- SuffixDrafter


@pytest.mark.parametrize("name", ["EAGLE-3", pytest.param("model, default", marks=pytest.mark.slow)])
def test_suffix_drafter(name, made):
    """In a second call, its own output is the match of all rows but the first rounds."""
    target, fallback, plain = made(name)
    drafter = sdt.SuffixDrafter(fallback=fallback, adaptive=False)
    assert not drafter.resizable and drafter.taps(target) == fallback.taps(target)
    with sdt.patched(target, drafter=drafter):
        lengths = []
        for _ in range(2):
            assert torch.equal(target.generate(**prompt(3), **GREEDY), plain)
            lengths.append(sdt.stats(target).acceptance_length)
    assert lengths[0] > 1.2 and lengths[1] > 10
    assert type(fallback).__name__ in repr(drafter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fallback": "model"}, "fallback must be a drafter that runs a model or a trained head, got str"),
        ({"fallback": sdt.SuffixDrafter()}, "that runs a model or a trained head, got SuffixDrafter"),
        ({"fallback": sdt.PromptLookupDrafter()}, "that runs a model or a trained head, got PromptLookupDrafter"),
        ({"fallback_below": 0}, "fallback_below must be a number above 0, at most inf, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sdt.SuffixDrafter(**options)


def test_the_fallback_is_checked(made):
    """A tree of the call is the fallback's."""
    target, _, _ = made("model")
    drafter = sdt.SuffixDrafter(fallback=sdt.EarlyExitDrafter(4, num_tokens=3))
    for tree in (FIXED, DYNAMIC):
        with sdt.patched(target, drafter=drafter, tree=tree):
            assert torch.equal(target.generate(**prompt(3), **GREEDY), made("model")[2])
    with pytest.raises(ValueError, match="EarlyExitDrafter: rule .rejection. needs a chain"):
        sdt.patch(target, drafter=drafter, tree=FIXED, rule="rejection")
    with pytest.raises(ValueError, match="suffix decoding without a fallback"):
        sdt.patch(target, drafter=drafter, tree="auto")
