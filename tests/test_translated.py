"""Drafts of a model with another tokenizer.

A wrong draft never changes the text. The drafts' models have the target's weights, so that drafts are accepted only if
the model has read the right text.
"""

import copy
import pickle
from functools import cache

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build
from helpers import TREES, accept_more, capture_here, eos_in_mid_row, record_drafts, snapshot, speculative
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.drafters.translated import TranslatedForwards
from specdec_triton.drafters.vocabulary import VocabularyMap
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.forward.versions import CACHE
from specdec_triton.tools.host_sync import count_host_reads
from vocabularies import byte_level, draft_tokenizers, sentences, target_tokenizer, texts, twin

PAIRS = ("bytes", "sentences")
MIXED = 0.03
BEYOND = 3  # tokens of the target beyond its tokenizer
GREEDY = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": NEVER, "pad_token_id": 0}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
SHAPES = {**TREES, "dynamic": sdt.DynamicTree(9, 3, 3)}


@cache
def tokenizers(pair):
    return {"tokenizer": target_tokenizer(), "assistant_tokenizer": draft_tokenizers()[pair]}


@cache
def target_model():
    """The next token depends most on the last one. A twin is then often right after tokens that it lacks, too."""
    model = build("llama", vocab_size=len(target_tokenizer()) + BEYOND)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= MIXED
            layer.mlp.down_proj.weight *= MIXED
    return model


@cache
def draft_model(pair, noise=0.0):
    vocabulary = VocabularyMap.from_tokenizers(*tokenizers(pair).values())
    return twin(target_model(), vocabulary, noise)


def drafter_of(pair="bytes", noise=0.0, **options):
    return sdt.ModelDrafter(draft_model(pair, noise), **tokenizers(pair), **options)


def prompts(batch=3, length=9, padding=3):
    return texts(batch, length, target_model().config.vocab_size, padding)


@cache
def plain(sampled=False, seed=None):
    options = SAMPLED if sampled else GREEDY
    if not sampled:
        return target_model().generate(**prompts(), **options)
    return speculative(target_model(), None, {**prompts(), **options}, seed=seed)[0]


def outside(text):
    """The share of the tokens of a text that the draft's vocabulary lacks."""
    vocabulary = VocabularyMap.from_tokenizers(*tokenizers("bytes").values())
    vocabulary = vocabulary.resized(target_model().config.vocab_size, torch.device("cpu"))
    return (vocabulary.preimage[text] < 0).float().mean().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_greedy_text(pair, shape):
    """A padded batch, whose text has tokens that the draft lacks."""
    text, stats = speculative(target_model(), drafter_of(pair, tree=SHAPES[shape]), {**prompts(), **GREEDY})
    assert torch.equal(text, plain()) and 0.1 < outside(text[:, 9:]) < 0.6
    assert stats.acceptance_length > 1.5


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", ["chain", "wide", "dynamic"])
def test_coupled_text_with_a_seed(pair, shape):
    """It does not depend on the draft."""
    options = {"seed": 5, "rule": "coupled"}
    text, stats = speculative(target_model(), drafter_of(pair, tree=SHAPES[shape]), {**prompts(), **SAMPLED}, **options)
    assert torch.equal(text, plain(sampled=True, seed=5)) and stats.acceptance_length > 1.2


RULES = {
    "rejection": {"num_tokens": 4},
    "block": {"num_tokens": 4},
    "multi_round": {"tree": TREES["wide"]},
    "traversal": {"tree": TREES["skipping"], "replacement": True},
    "typical": {"tree": TREES["wide"]},
}


@pytest.mark.parametrize("rule", RULES)
def test_draft_probabilities_are_zero_outside_the_image(rule, monkeypatch):
    """In trees of every rule, all tokens are images. Where probabilities are given, all others have logit -inf."""
    vocabulary = VocabularyMap.from_tokenizers(*tokenizers("bytes").values())
    size = target_model().config.vocab_size
    image = torch.zeros(size, dtype=torch.bool)
    image[vocabulary.images] = True
    seen = record_drafts(monkeypatch)
    _, stats = speculative(target_model(), drafter_of(**RULES[rule]), {**prompts(), **SAMPLED}, rule=rule, seed=2)
    assert stats.acceptance_length > 1.1 and 0.5 < image.float().mean() < 1
    for _, _, budget, tree in seen:
        drafted = tree.tokens[budget > 0][:, 1:]
        assert image[drafted].all()
        if rule != "typical" and tree.max_depth:
            assert tree.draft_logits.shape[-1] == size
            assert (tree.draft_logits.isneginf() == ~image).all() and tree.draft_logits[..., image].isfinite().all()


def test_a_node_may_have_as_many_children_as_there_are_shared_tokens():
    shared = VocabularyMap.from_tokenizers(*tokenizers("bytes").values()).num_shared
    target = target_model()
    speculative(
        target, drafter_of(tree=sdt.Topology.from_widths([shared])), {**prompts(), **GREEDY, "max_new_tokens": 4}
    )
    message = f"at most {shared} children, the tokens that both vocabularies have, got {shared + 1}"
    for tree in (sdt.Topology.from_widths([shared + 1]), sdt.DynamicTree(9, shared + 1, 2)):
        with pytest.raises(ValueError, match=message):
            sdt.patch(target, drafter=drafter_of(tree=tree))


def check_first_level(seen, draft, names, starts, before=()):
    """Assert that the children of each root are the draft's likeliest tokens after the pieces of the whole text, in a
    plain forward. The keys of accepted tokens are then right, too. Returns the number of roots.

    Args:
        seen: see `record_drafts`.
        draft: the draft model.
        names: the tokenizers.
        starts: the first column of each row's text.
        before: draft tokens before each text.
    """
    vocabulary = VocabularyMap.from_tokenizers(*names.values())
    vocabulary, compared = vocabulary.resized(target_model().config.vocab_size, torch.device("cpu")), 0
    for tokens, lengths, budget, tree in seen:
        for row, start in enumerate(starts):
            children = tree.tokens[row][tree.parents[row] == 0]
            if budget[row] < 2 or not len(children):
                continue
            own = tokens[row, start : lengths[row] + 1]
            pieces = [piece for token in own for piece in vocabulary.pieces[token, : vocabulary.counts[token]].tolist()]
            logits = draft(torch.tensor([[*before, *pieces]])).logits[0, -1].detach()
            wanted = logits[vocabulary.drafted].sort(descending=True).values[: len(children)]
            torch.testing.assert_close(logits[vocabulary.preimage[children]], wanted, rtol=1e-4, atol=1e-4)
            compared += 1
    return compared


def skip_some(monkeypatch):
    """For the rest of the test, some rounds draft nothing. Returns a list with a bool for each round."""
    prepare, skipped = LevelSession.prepare, []

    def sometimes(session, tree=None, rows=None):
        skipped.append(len(skipped) % 7 in (2, 4, 5))
        return prepare(session, sdt.Topology.chain(0) if skipped[-1] else tree, rows)

    monkeypatch.setattr(LevelSession, "prepare", sometimes)
    return skipped


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", ["chain", "skipping"])
def test_the_draft_reads_the_whole_text(pair, shape, monkeypatch):
    """Paths of all lengths are accepted, and some rounds draft nothing."""
    accept_more(monkeypatch)
    rounds = skip_some(monkeypatch)
    seen, draft = record_drafts(monkeypatch), build("llama", seed=1, vocab_size=len(draft_tokenizers()[pair]))
    drafter = sdt.ModelDrafter(draft, tree=TREES[shape], **tokenizers(pair))
    _, stats = speculative(target_model(), drafter, {**prompts(), **GREEDY, "max_new_tokens": 60})
    assert stats.acceptance_length > 1.3 and sum(rounds) > 5
    assert check_first_level(seen, draft, tokenizers(pair), (3, 3, 0)) > 20


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("length", [1, 3])
def test_prompts_shorter_than_a_token_has_pieces(length, family, monkeypatch):
    """Rows of a single token, alone and beside a longer one. The draft's first rounds begin before its text."""
    draft = build(family, seed=1, vocab_size=len(draft_tokenizers()["bytes"]))
    drafter = sdt.ModelDrafter(draft, tree=TREES["wide"], **tokenizers("bytes"))
    inputs, seen = prompts(length=length, padding=length - 1), record_drafts(monkeypatch)
    inputs["input_ids"][0, -1] = 0 if length == 1 else inputs["input_ids"][0, -1]
    text, _ = speculative(target_model(), drafter, {**inputs, **GREEDY})
    assert torch.equal(text, target_model().generate(**inputs, **GREEDY))
    assert check_first_level(seen, draft, tokenizers("bytes"), (length - 1, length - 1, 0)) > 20


@pytest.mark.parametrize("begun", [False, True])
def test_the_beginning_of_the_drafts_text(begun, monkeypatch):
    """The token that the draft's tokenizer puts before each text, unless the prompt begins with it."""
    names = {"tokenizer": byte_level("ab", first=("<s>",)), "assistant_tokenizer": sentences("ab", begins=True)}
    draft = build("llama", seed=1, vocab_size=len(names["assistant_tokenizer"]))
    inputs, seen = texts(3, 9, len(names["tokenizer"]), padding=3), record_drafts(monkeypatch)
    if begun:
        inputs["input_ids"][:2, 3] = inputs["input_ids"][2, 0] = 0
    target = target_model()
    drafter = sdt.ModelDrafter(draft, tree=TREES["wide"], **names)
    text, _ = speculative(target, drafter, {**inputs, **GREEDY})
    assert torch.equal(text, target.generate(**inputs, **GREEDY))
    assert check_first_level(seen, draft, names, (3, 3, 0), before=() if begun else (1,)) > 20


@pytest.mark.parametrize(
    "shape",
    [*(pytest.param(shape, marks=pytest.mark.slow) for shape in ("chain", "wide", "dynamic")), "skipping", None],
)
def test_captured_rounds(shape, monkeypatch):
    """Their drafts are those of uncaptured rounds. Later calls replay them, also if the tokenizers were made again. The
    host knows an upper bound on the length of the draft's text."""
    caches, take = [], TreeRunner.take_cache

    def recording(runner, *args):
        take(runner, *args)
        caches.append(runner.cache)  # of the target, then of the draft

    def kept_keys():
        """In columns of the draft's text that all rounds have left behind."""
        return caches[-1].layers[-1].keys[:, :, 12:45].clone()

    def following(forwards, levels, rows=None):
        follow(forwards, levels, rows)
        text = forwards.context
        text.append()
        assert text.length.max() <= text.longest < text.length.max() + 4 * (text.unread_tokens + 1)

    follow = TranslatedForwards.follow
    capture_here(monkeypatch, 1)
    monkeypatch.setattr(TreeRunner, "take_cache", recording)
    monkeypatch.setattr(TranslatedForwards, "follow", following)
    if shape == "skipping":
        skip_some(monkeypatch)
    target, inputs = target_model(), {**prompts(), **GREEDY, "max_new_tokens": 40}
    drafter = sdt.ModelDrafter(draft_model("bytes"), tree=SHAPES.get(shape), **tokenizers("bytes"))
    text, wanted = speculative(target, drafter, inputs, cuda_graphs=False)
    keys = kept_keys()
    assert torch.equal(text, target.generate(**inputs)) and wanted.acceptance_length > 1.3
    with sdt.patched(target, cuda_graphs=True, tree=SHAPES.get(shape)):
        for call in range(2):
            names = {"tokenizer": target_tokenizer(), "assistant_tokenizer": draft_tokenizers()["bytes"]}
            assert torch.equal(target.generate(**inputs, assistant_model=draft_model("bytes"), **names), text)
            found = sdt.stats(target)
            assert found.why_eager is None and found.replayed > 0 and bool(found.reused) == bool(call)
            assert abs(found.rounds - wanted.rounds) <= 1
            torch.testing.assert_close(kept_keys(), keys, rtol=1e-3, atol=1e-3)


def test_rounds_read_nothing_on_the_host(monkeypatch):
    draft = LevelSession.draft

    def counting(session):
        with count_host_reads() as reads:
            found = draft(session)
        assert not reads.total
        return found

    monkeypatch.setattr(LevelSession, "draft", counting)
    text, stats = speculative(target_model(), drafter_of(tree=TREES["wide"]), {**prompts(), **GREEDY})
    assert torch.equal(text, plain()) and stats.rounds > 5


def test_trees_chosen_by_measured_costs():
    text, _ = speculative(target_model(), drafter_of(), {**prompts(), **GREEDY}, tree="auto")
    assert torch.equal(text, plain())


@pytest.mark.parametrize("shape", ["chain", "dynamic"])
def test_a_cache_of_the_caller(shape):
    """Of the first columns. The draft runs the whole prompt."""
    target, inputs = target_model(), prompts(batch=1, padding=0)
    drafter = drafter_of(tree=SHAPES[shape])
    with torch.no_grad():
        cache = target(inputs["input_ids"][:, :5], use_cache=True).past_key_values
    text, stats = speculative(target, drafter, {**inputs, **GREEDY, CACHE: cache})
    assert torch.equal(text, target.generate(**inputs, **GREEDY)) and stats.acceptance_length > 1.3


@pytest.mark.parametrize("shape", ["chain", "wide", None])
def test_rows_end_by_their_own_end_of_sequence(shape):
    target = target_model()
    options = {**GREEDY, "eos_token_id": eos_in_mid_row(target, prompts(), **GREEDY)}
    text, _ = speculative(target, drafter_of(tree=SHAPES.get(shape)), {**prompts(), **options})
    wanted = target.generate(**prompts(), **options)
    assert torch.equal(text, wanted) and (wanted[:, -1] == 0).any()


def test_tokens_beyond_the_tokenizer():
    """In the prompt and in the text: the padding of the target's vocabulary."""
    target = copy.deepcopy(target_model())
    size = target.config.vocab_size
    with torch.no_grad():
        target.lm_head.weight[size - BEYOND :] *= 3
    inputs = prompts()
    inputs["input_ids"][:, 5:] = size - 1
    text, _ = speculative(target, drafter_of(tree=TREES["wide"]), {**inputs, **GREEDY})
    assert torch.equal(text, target.generate(**inputs, **GREEDY))
    assert (text[:, 9:] >= size - BEYOND).float().mean() > 0.2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_draft_with_fewer_positions_than_its_text(family):
    draft = build(family, seed=1, vocab_size=len(draft_tokenizers()["sentences"]), max_position_embeddings=24)
    for shape in ("chain", "dynamic"):
        drafter = sdt.ModelDrafter(draft, tree=SHAPES[shape], **tokenizers("sentences"))
        text, _ = speculative(target_model(), drafter, {**prompts(), **GREEDY})
        assert torch.equal(text, plain())


def test_the_assistant_is_not_changed():
    """Neither by a drafter nor by arguments of the call; greedy and sampled."""
    target, assistant = target_model(), copy.deepcopy(draft_model("bytes"))
    assistant.generation_config.repetition_penalty = 1.3

    def state():
        tensors = {
            name: (id(each), each.clone()) for name, each in [*assistant.named_parameters(), *assistant.named_buffers()]
        }
        modules = {name: (id(each), type(each)) for name, each in assistant.named_modules()}
        return snapshot(assistant), modules, tensors

    before = state()
    for options in (GREEDY, SAMPLED):
        with sdt.patched(target):
            target.generate(**prompts(), **options, assistant_model=assistant, **tokenizers("bytes"))
        drafter = sdt.ModelDrafter(assistant, tree=TREES["wide"], **tokenizers("bytes"))
        speculative(target, drafter, {**prompts(), **options})
    after = state()
    assert before[:2] == after[:2] and before[2].keys() == after[2].keys()
    for name, (identity, tensor) in before[2].items():
        assert after[2][name][0] == identity and torch.equal(after[2][name][1], tensor)


@pytest.mark.parametrize("sampled", [False, True])
def test_arguments_of_generate(sampled):
    """On a patched model, with a stop string, which needs the tokenizer as well."""
    target, names = target_model(), tokenizers("sentences")
    with sdt.patched(target, seed=5):
        text = target.generate(
            **prompts(), **(SAMPLED if sampled else GREEDY), assistant_model=draft_model("sentences"), **names
        )
        assert sdt.stats(target).acceptance_length > 1.2
        assert torch.equal(text, plain(sampled, 5 if sampled else None))
        if not sampled:
            word = names["tokenizer"].decode(text[-1, 20:22])
            stopping = {**prompts(), **GREEDY, "stop_strings": word}
            stopped = target.generate(**stopping, assistant_model=draft_model("sentences"), **names)
            assert torch.equal(stopped, target.generate(**stopping, tokenizer=names["tokenizer"]))
            assert stopped.shape[1] <= text.shape[1]


def test_the_same_vocabulary_needs_no_translation():
    names = {"tokenizer": target_tokenizer(), "assistant_tokenizer": target_tokenizer()}
    draft = build("llama", vocab_size=target_model().config.vocab_size)
    drafter = sdt.ModelDrafter(draft, num_tokens=3, **names)
    assert drafter._vocabulary is None
    text, _ = speculative(target_model(), drafter, {**prompts(), **GREEDY})
    assert torch.equal(text, plain())


def test_a_drafter_is_shown_copied_and_pickled():
    drafter = drafter_of(num_tokens=3)
    assert repr(drafter) == "ModelDrafter(model=LlamaForCausalLM, num_tokens=3, shared_tokens=32)"
    for copied in (copy.deepcopy(drafter), pickle.loads(pickle.dumps(drafter))):
        text, _ = speculative(target_model(), copied, {**prompts(), **GREEDY})
        assert torch.equal(text, plain())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": None}, "tokenizer must be a tokenizer of transformers, together with the other's, got None"),
        ({"assistant_tokenizer": None}, "assistant_tokenizer must be a tokenizer of transformers, .*, got None"),
        ({"tokenizer": "path"}, "tokenizer must be a tokenizer of transformers, .*, got str"),
        ({"parallel": 3}, "tokenizer and assistant_tokenizer must be None with parallel, got both"),
        ({"assistant_tokenizer": "large"}, "assistant_tokenizer must be the tokenizer of the draft model, which has"),
    ],
)
def test_refused_tokenizers(given, message):
    if given.get("assistant_tokenizer") == "large":
        given = {"assistant_tokenizer": byte_level("abcdefghijklmnop", "qrstabc")}
    with pytest.raises(ValueError, match=f"ModelDrafter: {message}"):
        sdt.ModelDrafter(draft_model("bytes"), **tokenizers("bytes") | given)


def test_tokenizers_that_do_not_fit_the_target():
    names = tokenizers("bytes") | {"tokenizer": byte_level("abcdefghijklmnop", "qrstabc", "ponmlk", "jihgfed", "srq")}
    with pytest.raises(
        ValueError, match="tokenizer must be the tokenizer of the target model, which has .* got one of"
    ):
        sdt.patch(target_model(), drafter=sdt.ModelDrafter(draft_model("bytes"), **names))
    with pytest.raises(ValueError, match="if it has another tokenizer, give tokenizer and assistant_tokenizer"):
        sdt.patch(target_model(), drafter=sdt.ModelDrafter(draft_model("sentences")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": None}, "must come with assistant_model and tokenizer on a patched model, got no tokenizer"),
        ({"assistant_model": None}, "must come with assistant_model and tokenizer .*, got no assistant_model"),
        ({"assistant_model": None, "prompt_lookup_num_tokens": 3}, "must come with .*, got no assistant_model"),
        (
            {"assistant_model": sdt.PromptLookupDrafter()},
            "must be None unless assistant_model is a draft model, got it",
        ),
        ({"assistant_model": "folder"}, "must be None unless assistant_model is a draft model, got it with str"),
    ],
)
def test_refused_arguments_of_generate(given, message):
    target, arguments = target_model(), {"assistant_model": draft_model("bytes"), **tokenizers("bytes"), **given}
    with sdt.patched(target), pytest.raises(ValueError, match=f"generate: assistant_tokenizer {message}"):
        target.generate(**prompts(), **GREEDY, **arguments)


def test_a_drafter_and_tokenizers_in_the_call_are_refused():
    target = target_model()
    with (
        sdt.patched(target, drafter=drafter_of()),
        pytest.raises(ValueError, match="got a drafter in patch.* and assis"),
    ):
        target.generate(**prompts(), **GREEDY, **tokenizers("bytes"))
