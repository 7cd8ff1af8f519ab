"""Drafts by a model with another tokenizer, through `ModelDrafter(tokenizer=..., assistant_tokenizer=...)`.

The map between the vocabularies is compared with the texts of all tokens, and drafts with the literal statement
`literal_translated`. A wrong draft never changes the text, and only lowers acceptance.
"""

import copy
import json
from functools import cache
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import specdec_triton as sdt
from families import NEVER, add_noise, build
from helpers import accept_more, accepted, capture_here, eos_in_mid_row, snapshot
from literal_translated import MISTAKES, SIGNS, LiteralTranslation, Special, texts_of
from recorded_drafts import ERROR, TOLERANCE, record
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.drafters.translated import TranslatedForwards
from specdec_triton.drafters.vocabulary import VocabularyMap
from specdec_triton.engine.round import RoundSteps
from specdec_triton.tools.check_distribution import prove
from specdec_triton.tools.models import find_default_model
from specdec_triton.tree import DraftTree

END, USER = "<|end|>", "<|user|>"
PROSE = "the cat sat on the mat and then the dog ran to the cat that sat there with its naïve hat"
CODE = "def then(that): return [each for each in that if each.name == 'cat'] # über naïve"
GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MISSING = {0x04, 0xC0, 0xF1}  # bytes without a token in some vocabularies, among them that of SmolLM2
SPARE = 3  # rows of an embedding that belong to no token


# --- tokenizers


def fast(core, special=(), **named):
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def trained(text, size, special=(END,), alphabet=ALPHABET):
    """A byte-level BPE tokenizer whose merges are those of a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text] * 3, trainer)
    return fast(core, special, eos_token=END if END in special else special[0])


def beginning(tokenizer, name):
    """The tokenizer, changed so that its texts begin with a token."""
    number = tokenizer.convert_tokens_to_ids(name)
    processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, number)])
    tokenizer.backend_tokenizer.post_processor, tokenizer.bos_token = processor, name
    return tokenizer


def with_bytes(text, size, kind="bpe"):
    """A tokenizer in the style of SentencePiece: ▁ for spaces, <0x00> to <0xFF> for bytes."""
    special = ["<unk>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    if kind == "bpe":
        source, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=size, show_progress=False)
    else:
        source, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=size, show_progress=False)
    source.pre_tokenizer = pre_tokenizers.Metaspace()
    source.train_from_iterator([text.replace("ï", "").replace("ü", "")] * 3, trainer)
    learned = json.loads(source.to_str())["model"]
    if kind == "bpe":
        names += sorted(learned["vocab"], key=learned["vocab"].get)
        merges = [tuple(pair) for pair in learned["merges"]]
        model = models.BPE(
            {name: place for place, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True
        )
    else:
        scored = [(name, 0.0) for name in names] + [tuple(pair) for pair in learned["vocab"]]
        model = models.Unigram(scored, unk_id=0, byte_fallback=True)
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(core, special, eos_token="</s>", unk_token="<unk>")


@cache
def tokenizer(name):
    """A tokenizer by its name. The first two have all bytes; no two tokens of theirs have the same text."""
    known = [sign for sign in ALPHABET if SIGNS[sign] not in MISSING]
    return {
        "target": lambda: trained(PROSE, 330, (END, USER)),
        "draft": lambda: trained(CODE, 305, (USER, "<|other|>", END)),
        "other ids": lambda: trained(CODE, 305, (END, USER, "<|other|>", "<|more|>")),
        "some bytes": lambda: beginning(trained(CODE, 310, ("</s>", "<s>"), known), "<s>"),
        "sentencepiece": lambda: with_bytes(PROSE, 60),
        "unigram": lambda: with_bytes(CODE, 60, "unigram"),
    }[name]()


def map_of(target, draft):
    return VocabularyMap.from_tokenizers(tokenizer(target), tokenizer(draft))


# --- the map

PAIRS = [
    ("target", "draft"),
    ("target", "some bytes"),
    ("target", "sentencepiece"),
    ("sentencepiece", "draft"),
    ("unigram", "target"),
    ("sentencepiece", "unigram"),
]


@pytest.mark.parametrize("name", ["target", "some bytes", "sentencepiece", "unigram"])
def test_texts_of_tokens_are_those_that_the_tokenizer_decodes(name):
    """Of those that are valid UTF-8. A decoder may drop the first space of a text, so another token comes first."""
    judged, first = tokenizer(name), tokenizer(name).encode("a", add_special_tokens=False)
    for token, text in texts_of(judged).items():
        if not isinstance(text, Special) and b"\xef\xbf\xbd" not in text:
            decoded = judged.decode([*first, token], clean_up_tokenization_spaces=False)
            assert decoded == "a" + text.decode(errors="replace")


def check_image(vocabulary, target, draft):
    """Assert that the image of each draft token is the target token of its text, by the texts of all tokens."""
    ours, theirs = texts_of(target), texts_of(draft)
    image = dict(enumerate(vocabulary.image.tolist()))
    found = {token: other for token, other in image.items() if other >= 0}
    ends = draft.eos_token_id, target.eos_token_id
    common = {*ours.values()} & {*theirs.values()}
    if None not in ends and theirs[ends[0]] not in common and ours[ends[1]] not in common:
        assert found.pop(ends[0]) == ends[1]
    assert all(theirs[token] == ours[other] for token, other in found.items())
    assert len(found) == len({*found.values()}) == len(common)
    preimage = vocabulary.preimage.tolist()
    assert all(preimage[other] == token for token, other in found.items())
    assert sum(token >= 0 for token in preimage) == vocabulary.num_shared >= len(found)
    # a draft model that knows a character writes it by its own token, not by its byte
    names = draft.get_vocab()
    for byte in range(33, 127):
        if {chr(byte), f"<0x{byte:02X}>"} <= names.keys() and chr(byte).encode() in common:
            assert image[names[chr(byte)]] >= 0 > image[names[f"<0x{byte:02X}>"]]


def check_pieces(vocabulary, target, draft):
    """Assert that the pieces of each target token have its text: all of it, or the end of a text of too many pieces.
    Returns the number of pieces of each ordinary token."""
    ours, theirs = texts_of(target), texts_of(draft)
    preimage, most, lengths = vocabulary.preimage.tolist(), vocabulary.most_pieces, []
    bytes_of_draft = {text for text in theirs.values() if not isinstance(text, Special) and len(text) == 1}
    for token, text in ours.items():
        count = int(vocabulary.counts[token])
        pieces = vocabulary.pieces[token, :count].tolist()
        assert 1 <= count <= most
        if preimage[token] >= 0:
            assert pieces == [preimage[token]]
            continue
        ordinary = text.content.encode() if isinstance(text, Special) else text
        spelled = bytes(byte for byte in ordinary if bytes([byte]) in bytes_of_draft)
        if not spelled:
            assert count == 1
            continue
        # an ordinary text is never read as a special token of the draft
        assert not any(isinstance(theirs[piece], Special) for piece in pieces), (text, pieces)
        joined = b"".join(theirs[piece] for piece in pieces)
        assert joined == spelled if count < most else spelled.endswith(joined), (text, joined)
        if not isinstance(text, Special):
            lengths.append(count)
    return lengths


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_the_map_agrees_with_the_texts_of_all_tokens(target, draft):
    target, draft = tokenizer(target), tokenizer(draft)
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    assert vocabulary.image.shape == (len(draft),) and len(vocabulary.counts) == len(target)
    check_image(vocabulary, target, draft)
    assert max(check_pieces(vocabulary, target, draft)) == vocabulary.most_pieces > 1


@pytest.mark.parametrize(("target", "draft"), [("target", "draft"), ("sentencepiece", "draft")])
def test_pieces_are_the_tokens_that_the_draft_would_read(target, draft):
    """Those of its own encoding of the text."""
    vocabulary, reader, compared = map_of(target, draft), tokenizer(draft), 0
    for token, text in texts_of(tokenizer(target)).items():
        if isinstance(text, Special) or text.decode(errors="ignore").encode() != text:
            continue
        wanted = reader.encode(text.decode(), add_special_tokens=False)
        assert vocabulary.pieces[token, : vocabulary.counts[token]].tolist() == wanted[-vocabulary.most_pieces :]
        compared += len(wanted) > 1
    assert compared > 10


def test_special_tokens_match_special_tokens_alone():
    """Vocabularies of Qwen hold ordinary tokens like </s>, which are ends of other models' texts."""
    names = [END, *ALPHABET, "</", "s>", "</s>"]
    core = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, [("<", "/"), ("s", ">")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    target, draft = fast(core, [END], eos_token=END), tokenizer("some bytes")
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    assert draft.eos_token == "</s>" and vocabulary.image[draft.eos_token_id] == target.eos_token_id
    check_image(vocabulary, target, draft)
    check_pieces(vocabulary, target, draft)


def local_tokenizer(name):
    """A tokenizer in a folder or in the hub's cache; the test is skipped without it."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        pytest.skip(f"needs the tokenizer of {name} on this machine")


@pytest.mark.slow
def test_the_map_between_two_published_tokenizers():
    target, draft = local_tokenizer("Qwen/Qwen2.5-Coder-1.5B-Instruct"), local_tokenizer(find_default_model())
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    check_image(vocabulary, target, draft)
    check_pieces(vocabulary, target, draft)
    assert vocabulary.num_shared == 39_237
    assert vocabulary.image[draft.eos_token_id] == target.eos_token_id


# --- drafts

CHAIN, TREE = sdt.Topology.chain(3), sdt.Topology.from_widths([3, 2, 1])
SHAPES = {
    "chain": {"num_tokens": 3},
    "tree": {"tree": TREE},
    "dynamic": {"tree": sdt.DynamicTree(9, 3, 3)},
}


class Pair(NamedTuple):
    """Two models with different tokenizers, their map, and the pieces of each target token."""

    target: torch.nn.Module
    draft: torch.nn.Module
    tokenizers: dict
    vocabulary: VocabularyMap
    pieces: dict[int, list[int]]

    def drafter(self, **shape):
        return sdt.ModelDrafter(self.draft, **self.tokenizers, **shape)


@cache
def pair(target="target", draft="draft", family="llama", **options):
    """The target's text consists mostly of few tokens, some of which the draft lacks. The draft is the target, whose
    tokens were renamed, with noise, so that it is sometimes right."""
    tokenizers = {"tokenizer": tokenizer(target), "assistant_tokenizer": tokenizer(draft)}
    sizes = [len(each) + SPARE for each in tokenizers.values()]
    vocabulary = VocabularyMap.from_tokenizers(*tokenizers.values(), *sizes)
    pieces = {
        token: vocabulary.pieces[token, : vocabulary.counts[token]].tolist() for token in range(len(vocabulary.counts))
    }
    model = build(family, 1, vocab_size=sizes[0])
    with torch.no_grad():
        by_count = [[token for token in pieces if len(pieces[token]) == count] for count in range(1, 5)]
        favoured = [*by_count[0][60:64], *(token for tokens in by_count[1:] for token in tokens[:1])]
        model.get_output_embeddings().weight[favoured] *= 4
        renamed = build(family, 1, vocab_size=sizes[1], **options)
        own = renamed.state_dict()
        given = {name: each for name, each in model.state_dict().items() if each.shape == own[name].shape}
        renamed.load_state_dict(given, strict=False)
        shared = vocabulary.image >= 0
        for table in ("get_input_embeddings", "get_output_embeddings"):
            rows = getattr(renamed, table)().weight
            rows[shared] = getattr(model, table)().weight[vocabulary.image[shared]]
    return Pair(model, add_noise(renamed, 0.05), tokenizers, vocabulary, pieces)


def prompt(pair, batch=2, length=9, padding=3, seed=0):
    """Random tokens, half of them without an image. Every row except the last is padded on the left."""
    random = torch.Generator().manual_seed(seed)
    many = torch.tensor([token for token, pieces in pair.pieces.items() if len(pieces) > 1])
    input_ids = torch.randint(3, len(pair.pieces), (batch, length), generator=random)
    chosen = torch.rand(batch, length, generator=random) < 0.5
    input_ids[chosen] = many[torch.randint(len(many), (int(chosen.sum()),), generator=random)]
    mask = torch.ones_like(input_ids)
    mask[: batch - 1, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


class Run(NamedTuple):
    """One call: its pair, its drafts (see `record`) and its text."""

    pair: Pair
    drafts: list
    text: torch.Tensor

    def literal(self, text, mistake=""):
        judge = copy.deepcopy(self.pair.draft).double()
        image = {token: target for token, target in enumerate(self.pair.vocabulary.image.tolist()) if target >= 0}
        first = self.pair.tokenizers["assistant_tokenizer"].encode("")
        return LiteralTranslation(judge, image, self.pair.pieces, len(self.pair.pieces), text, mistake, first)


def run(pair, shape, options=GREEDY, inputs=None, more=True, **settings):
    """Run a call whose drafts are recorded. For `more` see `accept_more`. Drafts read nothing on the host."""
    drafter = pair.drafter(**SHAPES[shape])
    with pytest.MonkeyPatch.context() as patches, sdt.patched(pair.target, drafter=drafter, **settings):
        drafts = record(patches, drafter)
        if more:
            accept_more(patches)
        text = pair.target.generate(**(inputs or prompt(pair)), **options)
    return Run(pair, drafts, text)


def whole(found, limit):
    """The first drafts that are not cut by the end of the text, as (draft, its number of levels)."""
    kept = [(each, each.tree.max_depth) for each in found.drafts if each.budget > each.tree.max_depth > 0]
    return kept[:limit]


def agreements(found, shape, limit=16):
    """For each of the first drafts, whether its tokens are those of the literal statement. Left out are drafts that a
    rounding error could have changed."""
    agree = []
    for drafted, levels in whole(found, limit):
        literal, tree = found.literal(drafted.text), SHAPES[shape].get("tree", CHAIN)
        if shape == "dynamic":
            tokens, parents, _ = literal.dynamic(drafted.tree.num_nodes, tree.width, levels)
        else:
            tokens, parents = literal.ranked(tree.limited(levels)), list(tree.limited(levels).parents)
        if literal.margin > TOLERANCE:
            given = drafted.tree.tokens[drafted.row].tolist(), drafted.tree.parents[drafted.row].tolist()
            agree.append(given == (tokens, parents))
    return agree


def stated(drafted):
    """(path, logits [V]) of each node of a drawn tree from which tokens were drawn."""
    tree, row, paths = drafted.tree, drafted.row, [()]
    for node in range(1, tree.num_nodes):
        paths.append((*paths[max(tree.parents[row, node], 0)], int(tree.tokens[row, node])))
    places = enumerate(tree.draft_row[row].tolist())
    return [(paths[node], tree.draft_logits[row, place].double()) for node, place in places if place >= 0]


def stated_agreements(found, mistake="", limit=6):
    """For each of the first drafts, whether the probabilities from which it was drawn are the literal ones."""
    agree = []
    for drafted, _ in whole(found, limit):
        literal = found.literal(drafted.text, mistake)
        agree.append(
            all(
                torch.allclose(logits.log_softmax(-1), literal.logits(path).log_softmax(-1), rtol=0, atol=ERROR)
                for path, logits in stated(drafted)  # -inf is close to -inf alone
            )
        )
    return agree


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_equal_the_literal_ones(shape):
    """A row is padded on the left, and the prompts have different numbers of pieces. Drafts are accepted in part."""
    found = run(pair(), shape, inputs=prompt(pair(), batch=3))
    agree, counts = agreements(found, shape), accepted(found.drafts)
    assert len(agree) >= 8 and all(agree)
    assert {0, 1, 2} <= {*counts}
    # rounds began after tokens of one and of several pieces
    roots = {len(found.pair.pieces[drafted.text[-1]]) for drafted in found.drafts}
    assert len(roots) > 2 and 1 in roots


# the options of a call, and the shapes that are drafted
OTHER_CALLS = {
    "short prompts": ({"inputs": lambda pair: prompt(pair, batch=3, length=2, padding=1)}, SHAPES),
    "one token": ({"inputs": lambda pair: {"input_ids": torch.tensor([[len(pair.pieces) - 1]])}}, SHAPES),
    "batch": ({"inputs": lambda pair: prompt(pair, batch=5, length=14, padding=6)}, SHAPES),
    "chunks": ({"options": {**GREEDY, "prefill_chunk_size": 4}}, ["chain"]),
    "fused": ({"fuse": True}, ["tree"]),
    "kernels": ({"impl": "triton", "options": {**GREEDY, "max_new_tokens": 8}}, ["chain"]),
}


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        pytest.param(case, shape, marks=[] if (case, shape) in quick else pytest.mark.slow)
        for quick in [(("short prompts", "chain"), ("one token", "chain"))]
        for case, (_, shapes) in OTHER_CALLS.items()
        for shape in shapes
    ],
)
def test_other_calls(case, shape):
    options = dict(OTHER_CALLS[case][0])
    inputs = options.pop("inputs", prompt)(pair())
    agree = agreements(run(pair(), shape, inputs=inputs, **options), shape)
    assert len(agree) >= 3 and all(agree)


@pytest.mark.parametrize(
    ("target", "draft", "family"),
    [
        ("target", "some bytes", "gpt2"),
        pytest.param("sentencepiece", "draft", "llama", marks=pytest.mark.slow),
        pytest.param("target", "unigram", "gemma3", marks=pytest.mark.slow),
        pytest.param("unigram", "sentencepiece", "mistral_window", marks=pytest.mark.slow),
        pytest.param("sentencepiece", "unigram", "qwen3", marks=pytest.mark.slow),
    ],
)
def test_other_pairs(target, draft, family):
    """Learned positions and windows count the draft's tokens."""
    found = run(pair(target, draft, family), "tree", {**GREEDY, "max_new_tokens": 14})
    agree = agreements(found, "tree")
    assert len(agree) >= 5 and all(agree)


@pytest.fixture(scope="module")
def drawn():
    return run(pair(), "tree", SAMPLED, rule="multi_round", seed=3)


def test_drawn_trees_state_the_literal_probabilities(drawn):
    """They are 0 outside the image, exactly."""
    agree, shared = stated_agreements(drawn), drawn.pair.vocabulary.preimage >= 0
    assert len(agree) == 6 and all(agree) and 0 < shared.sum() < len(shared)
    for drafted, _ in whole(drawn, len(drawn.drafts)):
        for _, logits in stated(drafted):
            assert torch.equal(logits.isfinite(), shared)
        real = drafted.tree.parents[drafted.row] >= 0
        assert shared[drafted.tree.tokens[drafted.row][real]].all()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_noticed(mistake, drawn):
    wrong = [not each for each in stated_agreements(drawn, mistake)]
    assert any(wrong) if mistake == "root without its first piece" else all(wrong)


def test_rounds_without_a_draft(monkeypatch):
    """`tree="auto"` asks for them. The draft catches up with all pieces of the rounds before."""
    prepare, rounds = LevelSession.prepare, []

    def preparing(self, tree=None):
        rounds.append(len(rounds) % 4 == 0)
        return prepare(self, tree if rounds[-1] else sdt.Topology.chain(0))

    monkeypatch.setattr(LevelSession, "prepare", preparing)
    found = run(pair(), "chain", {**GREEDY, "max_new_tokens": 60}, prompt(pair(), batch=3))
    agree = agreements(found, "chain", limit=24)
    assert sum(rounds) > 5 and len(agree) > 12 and all(agree) and max(accepted(found.drafts)) > 1


# --- texts


@pytest.mark.parametrize(
    "shape",
    [
        {"num_tokens": 3},
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in ({"tree": TREE}, {"tree": sdt.DynamicTree(9, 3, 3)}, {}, {"confidence_threshold": 0.1}, "auto")
        ),
    ],
    ids=str,
)
def test_the_text_is_the_targets(shape):
    """The coupled text is that without a draft. Rows end early."""
    found, inputs = pair(), prompt(pair(), batch=3)
    ends = {**GREEDY, "eos_token_id": eos_in_mid_row(found.target, inputs, **GREEDY)}
    shape, tree = ({}, "auto") if shape == "auto" else (shape, None)
    drafter = found.drafter(**shape)
    for options in (GREEDY, SAMPLED, ends):
        text = found.target.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
        with sdt.patched(found.target, drafter=drafter, seed=1, tree=tree):
            assert torch.equal(found.target.generate(**inputs, **options), text)
        assert sdt.stats(found.target).accepted > 0 or tree == "auto"  # which drafts little on a CPU


@pytest.mark.parametrize("options", [GREEDY, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "sampled"])
def test_the_assistant_of_a_call_is_not_changed(options):
    """transformers prunes its head, wraps its embedding and sets its repetition penalty."""
    found, inputs = pair(), prompt(pair(), batch=3)
    found.draft.generation_config.repetition_penalty = 1.5
    before, weights = snapshot(found.draft), {name: id(each) for name, each in found.draft.named_parameters()}
    text = found.target.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
    with sdt.patched(found.target, seed=1):
        for _ in range(2):
            given = found.target.generate(**inputs, **options, assistant_model=found.draft, **found.tokenizers)
            assert torch.equal(given, text) and sdt.stats(found.target).accepted > 0
    assert snapshot(found.draft) == before and {n: id(each) for n, each in found.draft.named_parameters()} == weights


def test_a_draft_whose_positions_end_before_the_text():
    """The text in its tokens is longer than that in the target's."""
    found = pair(max_position_embeddings=16)
    text = found.target.generate(**prompt(found), **GREEDY)
    with sdt.patched(found.target, drafter=found.drafter(num_tokens=3)):
        assert torch.equal(found.target.generate(**prompt(found), **GREEDY), text)


@pytest.mark.parametrize(
    ("shape", "lag", "tokens"),
    [
        ("chain", 1, 28),
        *(pytest.param(shape, lag, 90, marks=pytest.mark.slow) for shape in SHAPES for lag in (0, 1)),
    ],
)
def test_captured_rounds_draft_the_same(shape, lag, tokens, monkeypatch):
    """Drafts are accepted equally often only if they are equal. The prompt has one piece a token and the text several,
    so that the draft's text grows faster than at first. The same models with another map use no graph of the first."""
    options, found = {**GREEDY, "max_new_tokens": tokens}, pair()
    single = torch.tensor([token for token, pieces in found.pieces.items() if len(pieces) == 1][5:17])
    inputs = {"input_ids": single.view(2, 6)}
    other = {**found.tokenizers, "assistant_tokenizer": tokenizer("other ids")}
    drafters = [sdt.ModelDrafter(found.draft, **each, **SHAPES[shape]) for each in (found.tokenizers, other)]
    texts, eager = [], []
    for drafter in drafters:
        with sdt.patched(found.target, drafter=drafter, cuda_graphs=False):
            texts.append(found.target.generate(**inputs, **options))
        eager.append(sdt.stats(found.target).accepted_by_position)
    assert torch.equal(*texts) and eager[0] != eager[1]
    capture_here(monkeypatch, lag)
    with sdt.patched(found.target):
        for place, reused in ((0, 0), (1, 0), (1, 2)):
            text = found.target.generate(**inputs, **options, assistant_model=drafters[place])
            stats = sdt.stats(found.target)
            assert torch.equal(text, texts[0]) and stats.replayed > 5 and stats.reused == reused
            # the last drafts differ, because captured rounds also draft tokens that can no longer be emitted
            assert stats.accepted_by_position[:2] == pytest.approx(eager[place][:2], abs=1)


@pytest.mark.parametrize(("lag", "tokens"), [(None, 60), pytest.param(1, 245, marks=pytest.mark.slow)])
def test_the_cache_has_room_for_all_pieces(lag, tokens, monkeypatch):
    """The cache grows with the draft's text. The prompt has one piece a token, the text as many as possible, and in
    captured rounds the host reads late how many there were."""
    follow, found, rooms, slots = TranslatedForwards.follow, pair(), [], []

    def following(self, levels, *rest):
        follow(self, levels, *rest)
        slots.append(self.slots)
        now, counts = self._sequences, found.vocabulary.counts
        for row, length in enumerate(now.length.tolist()):
            text = now.tokens[row, now.start[row] : length + 1]
            rooms.append(self.slots - int(self.context.start[row]) - int(counts[text].sum()) - levels)

    monkeypatch.setattr(TranslatedForwards, "follow", following)
    verify, many = RoundSteps.verify, int(found.vocabulary.counts.argmax())

    def preferring(self, tree):
        logits = verify(self, tree).clone()
        logits[..., many] += 100
        return logits

    monkeypatch.setattr(RoundSteps, "verify", preferring)
    if lag is not None:
        capture_here(monkeypatch, lag)
    single = (found.vocabulary.counts == 1).nonzero()[5:17].view(2, 6)
    with sdt.patched(found.target, drafter=found.drafter(num_tokens=2)):
        found.target.generate(single, **{**GREEDY, "max_new_tokens": tokens})
    assert len(rooms) > tokens and min(rooms) >= 0 and len({*slots}) > 1


# --- distributions


def small(names, merges):
    model = models.BPE({name: place for place, name in enumerate(names)}, [tuple(merge.split()) for merge in merges])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


SMALL = {
    "tokenizer": small(["a", "b", "c", "ab", "bc"], ["a b", "b c"]),
    "assistant_tokenizer": small(["c", "d", "a", "bc", "b", "ca"], ["b c", "c a"]),
}


def small_drafter(tree):
    draft = build("llama", 1, vocab_size=6, num_hidden_layers=1)
    return sdt.ModelDrafter(draft, **SMALL, tree=tree, num_tokens=None if tree else 3)


def proved(rule, tree):
    target = build("llama", 0, vocab_size=5, num_hidden_layers=1)
    return prove(target, small_drafter(tree), rule, torch.tensor([[3, 4, 1]]), samples=1500, rows=1500)


@pytest.mark.parametrize(
    ("rule", "tree"),
    [
        ("multi_round", sdt.Topology.from_widths([2, 1])),
        ("block", None),
        *(
            pytest.param(rule, tree, marks=pytest.mark.slow)
            for rule, tree in (
                ("rejection", None),
                ("traversal", sdt.Topology.from_widths([2, 2])),
                ("traversal", 5),
                ("coupled", sdt.Topology.from_widths([2, 1])),
                ("coupled", None),
                ("multi_round", sdt.DynamicTree(5, 2, 2)),
                ("traversal", sdt.DynamicTree(5, 2, 2)),
                ("multi_round", sdt.Topology.from_widths([4])),  # all tokens of the image
            )
        ),
    ],
)
def test_rules_keep_the_distribution(rule, tree):
    found = proved(rule, tree)
    assert found.agrees and found.acceptance_length > 1


def test_probabilities_outside_the_image_would_be_noticed(monkeypatch):
    """A draft that states a probability for the token without an image, although it never draws it."""
    drawn = DraftTree.drawn

    def stating(self, sampling, draft_logits, *rest):
        outside = draft_logits.isinf()
        return drawn(self, sampling, draft_logits.masked_fill(outside, 2.0), *rest)

    monkeypatch.setattr(DraftTree, "drawn", stating)
    assert not proved("multi_round", sdt.Topology.from_widths([2, 1])).agrees
