"""The map between the vocabularies of two tokenizers.

Expected tables are written by hand. Tables of larger vocabularies are compared with the texts of their tokens.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import PreTrainedTokenizer

from specdec_triton.drafters.vocabulary import MOST_PIECES, VocabularyMap, have_same_vocabulary
from vocabularies import LETTERS, SIGNS, byte_level, draft_tokenizers, sentences, target_tokenizer

CPU = torch.device("cpu")
END = ("<unk>", "<s>", "</s>")


def named(vocabulary, tokenizer, assistant_tokenizer):
    """The images and the pieces of a map: {draft token: target token}, {target token: draft tokens}."""
    of_target, of_draft = (
        {number: name for name, number in each.get_vocab().items()} for each in (tokenizer, assistant_tokenizer)
    )
    images = {
        of_draft[draft]: of_target[target] for draft, target in enumerate(vocabulary.image.tolist()) if target >= 0
    }
    pieces = {
        of_target[target]: [of_draft[piece] for piece in row[:count]]
        for target, (row, count) in enumerate(zip(vocabulary.pieces.tolist(), vocabulary.counts.tolist(), strict=True))
    }
    return images, pieces


def check_consistent(vocabulary):
    """`preimage` inverts `image`, a token with a preimage has it as its only piece, and unused places hold 0."""
    assert vocabulary.num_shared == len(vocabulary.drafted) == len(vocabulary.images) > 0
    assert torch.equal(vocabulary.preimage[vocabulary.images], vocabulary.drafted)
    assert torch.equal(vocabulary.image[vocabulary.drafted], vocabulary.images)
    assert (vocabulary.preimage >= 0).sum() == (vocabulary.image >= 0).sum() == vocabulary.num_shared
    assert vocabulary.counts.min() == 1 and vocabulary.counts.max() == vocabulary.most_pieces
    known = vocabulary.preimage >= 0
    assert (
        torch.equal(vocabulary.pieces[known, 0], vocabulary.preimage[known]) and (vocabulary.counts[known] == 1).all()
    )
    unused = torch.arange(vocabulary.most_pieces) >= vocabulary.counts[:, None]
    assert not vocabulary.pieces[unused].any()


def test_two_byte_level_vocabularies():
    target = byte_level("abc", "Ġab", "hi", first=("<|user|>",))
    draft = byte_level("ab", "Ġa", "hij", "Ġb", first=("<|user|>", "<|tool|>"), reverse=True)
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    check_consistent(vocabulary)
    images, pieces = named(vocabulary, target, draft)
    both = [*LETTERS, *SIGNS, "ab", "Ġa", "hi", "<|user|>", "<|end|>"]
    assert images == {token: token for token in both}
    assert pieces == {token: [token] for token in both} | {"abc": ["ab", "c"], "Ġab": ["Ġ", "ab"]}


def test_space_signs_byte_tokens_and_names_of_special_tokens():
    target = byte_level("Ġab", "ab", "Ã©", "Ġä", "ĊĊ", first=("<s>", "<|user|>"))
    draft = sentences("▁a", "ab")
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    check_consistent(vocabulary)
    images, pieces = named(vocabulary, target, draft)
    same = [*LETTERS, "ab", "<s>"]
    # the ends have no match and match each other; the letters' byte tokens are not used
    wanted = {token: token for token in same} | {"▁": "Ġ", "▁a": "Ġa", "</s>": "<|end|>"}
    wanted |= {"<0x0A>": "Ċ", "<0xC3>": "Ã", "<0xA9>": "©", "<0xE4>": "ä"}
    assert images == wanted
    others = {"Ġab": ["▁a", "b"], "Ã©": ["<0xC3>", "<0xA9>"], "Ġä": ["▁", "<0xE4>"], "ĊĊ": ["<0x0A>", "<0x0A>"]}
    others["<|user|>"] = ["r", "<0x7C>", "<0x3E>"]  # the last pieces
    assert pieces == {target: [draft] for draft, target in wanted.items()} | others


def test_the_other_direction():
    target, draft = sentences("▁ab", "hi"), byte_level("Ġa", "hi")
    images, pieces = named(VocabularyMap.from_tokenizers(target, draft), target, draft)
    assert images["Ġa"] == "▁a" and images["<|end|>"] == "</s>" and images["ä"] == "<0xE4>" and images["Ċ"] == "<0x0A>"
    assert pieces["▁ab"] == ["Ġa", "b"]
    assert pieces["<0x61>"] == ["a"]  # a second token of this text, which has no preimage
    assert pieces["<0xFF>"] == ["<|end|>"]  # the draft has no token of this byte: the filler, its end without an unk
    assert pieces["<unk>"] == ["n", "k"]  # characters without a token are left out


def test_of_several_tokens_of_one_text_the_lowest_is_taken():
    target, draft = byte_level("ab"), byte_level("ab", first=("<one>",))
    draft.add_tokens(["ab ", "a b"])  # not special: their text is ordinary text
    target.add_tokens(["a b", "ab "])
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    images, _ = named(vocabulary, target, draft)
    assert images["a b"] == "a b" and images["ab "] == "ab "
    target, draft = byte_level("Ġa", "Ġb"), byte_level("Ġa")
    for tokenizer in (target, draft):
        tokenizer.add_tokens([" a"])
        assert tokenizer.get_vocab()[" a"] > tokenizer.get_vocab()["Ġa"]
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    check_consistent(vocabulary)
    images, pieces = named(vocabulary, target, draft)
    assert images["Ġa"] == "Ġa" and " a" not in images
    assert pieces[" a"] == ["Ġa"]


def test_ends_are_paired_only_if_neither_has_a_match():
    for first, end in (("</s>",), "<|end|>"), (("<|stop|>",), "</s>"):
        target, draft = byte_level("ab", first=first, end=end), sentences("ab")
        images, _ = named(VocabularyMap.from_tokenizers(target, draft), target, draft)
        assert images["</s>"] == "</s>" and list(images.values()).count("<|end|>") == 0


def test_ordinary_tokens_with_the_name_of_a_special_token():
    """Vocabularies of Qwen hold an ordinary token </s>, the end of other models' texts."""
    target, draft = byte_level("ab"), sentences("ab")
    target.add_tokens(["</s>"])
    images, pieces = named(VocabularyMap.from_tokenizers(target, draft), target, draft)
    assert images["</s>"] == "<|end|>" and pieces["<|end|>"] == ["</s>"]
    assert pieces["</s>"] == ["<0x2F>", "s", "<0x3E>"]


@pytest.mark.parametrize("name", ["bytes", "sentences"])
@pytest.mark.parametrize("swapped", [False, True])
def test_pieces_spell_the_token(name, swapped):
    pair = target_tokenizer(), draft_tokenizers()[name]
    target, draft = pair[::-1] if swapped else pair
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    check_consistent(vocabulary)
    _, pieces = named(vocabulary, target, draft)

    def spelled(*tokens):
        """In the characters of SentencePiece; bytes that are no ASCII characters are <0xNN>."""
        signs = {"Ġ": "▁", "Ċ": "<0x0A>", "Ã": "<0xC3>", "©": "<0xA9>", "ä": "<0xE4>", "<0x20>": "▁"}
        signs |= {f"<0x{ord(letter):02X}>": letter for letter in LETTERS}
        text = "".join(tokens)
        for sign, wanted in signs.items():
            text = text.replace(sign, wanted)
        return text

    special = {"<|user|>", "<unk>", "<s>", target.eos_token}
    compared = 0
    for token, own in pieces.items():
        if token not in special and own != [draft.eos_token] and len(own) < MOST_PIECES:
            assert spelled(*own) == spelled(token)
            compared += len(own) > 1
    assert compared >= (0 if swapped else 4)
    assert not swapped or pieces["deaf"] == [*"deaf"][-MOST_PIECES:]


def test_the_beginning_of_a_text():
    target, plain, begins = byte_level("ab"), sentences("ab"), sentences("ab", begins=True)
    without, having = (VocabularyMap.from_tokenizers(target, draft) for draft in (plain, begins))
    assert without.beginning == -1 and having.beginning == having.resized(99, CPU).beginning == 1
    assert torch.equal(having.pieces, without.pieces) and having != without


def test_the_last_pieces_are_kept():
    target, draft = byte_level("abcdefgh"), byte_level("bc")
    images, pieces = named(VocabularyMap.from_tokenizers(target, draft), target, draft)
    assert MOST_PIECES < 7 and pieces["abcdefgh"] == ["a", "bc", *"defgh"][-MOST_PIECES:]
    assert pieces["abc"] == ["a", "bc"]


def test_a_tokenizer_that_changes_texts():
    """If the draft's tokenizer does not spell a text exactly, the longest tokens that match it are taken."""
    from tokenizers import normalizers

    target, draft = byte_level("Ġab", "hij"), byte_level("ij")
    draft.backend_tokenizer.normalizer = normalizers.Replace("h", "g")
    _, pieces = named(VocabularyMap.from_tokenizers(target, draft), target, draft)
    assert pieces["hij"] == ["h", "ij"] and pieces["hi"] == ["h", "i"] and pieces["Ġab"] == ["Ġ", "a", "b"]


@pytest.mark.parametrize("setting", [{"padding": True}, {"truncation": True, "max_length": 1}])
def test_settings_of_an_earlier_call_do_not_change_the_map(setting):
    target, draft = target_tokenizer(), draft_tokenizers()["bytes"]
    wanted = VocabularyMap.from_tokenizers(target, draft)
    draft = draft_tokenizers()["bytes"]
    draft.pad_token = "a"
    draft(["ab", "abab a"], **setting)
    assert VocabularyMap.from_tokenizers(target, draft) == wanted


class Slow(PreTrainedTokenizer):
    """Letters, and a few words of them; written in Python."""

    def __init__(self, words=(), **kwargs):
        self.tokens = [*LETTERS, "▁", *words, "<unk>", "</s>"]
        super().__init__(unk_token="<unk>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.tokens)

    def get_vocab(self):
        return {token: number for number, token in enumerate(self.tokens)}

    def _tokenize(self, text, **kwargs):
        return list(text.replace(" ", "▁"))

    def _convert_token_to_id(self, token):
        return self.tokens.index(token) if token in self.tokens else self.tokens.index("<unk>")

    def _convert_id_to_token(self, index):
        return self.tokens[index]


def test_slow_tokenizers():
    slow, quick = Slow(["ab", "▁ba"]), byte_level("Ġba")
    assert not slow.is_fast
    images, pieces = named(VocabularyMap.from_tokenizers(quick, slow), quick, slow)
    assert images == {token: token for token in LETTERS} | {"▁": "Ġ", "▁ba": "Ġba", "</s>": "<|end|>"}
    assert pieces["Ġb"] == ["▁", "b"] and pieces["Ċ"] == ["<unk>"]
    images, pieces = named(VocabularyMap.from_tokenizers(slow, quick), slow, quick)
    assert images["Ġba"] == "▁ba" and pieces["ab"] == ["a", "b"]


def test_the_map_is_made_once_and_kept_as_long_as_the_tokenizers():
    target, draft = target_tokenizer(), draft_tokenizers()["bytes"]
    vocabulary = VocabularyMap.from_tokenizers(target, draft)
    assert VocabularyMap.from_tokenizers(target, draft) is vocabulary
    target.get_vocab = None  # later calls do not read the vocabulary again
    assert VocabularyMap.from_tokenizers(target, draft) is vocabulary
    del target.get_vocab
    target.add_tokens(["abab"])
    assert VocabularyMap.from_tokenizers(target, draft) is not vocabulary
    gone = weakref.ref(target), weakref.ref(vocabulary)
    del target, vocabulary
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_equal_tables_make_equal_maps():
    maps = [VocabularyMap.from_tokenizers(target_tokenizer(), draft_tokenizers()["bytes"]) for _ in range(2)]
    other = VocabularyMap.from_tokenizers(target_tokenizer(), draft_tokenizers()["sentences"])
    assert maps[0] is not maps[1] and maps[0] == maps[1] and hash(maps[0]) == hash(maps[1])
    assert maps[0] != other and maps[0] != maps[0].resized(50, CPU)
    for copied in (copy.deepcopy(maps[0]), pickle.loads(pickle.dumps(maps[0]))):
        assert copied == maps[0] and torch.equal(copied.pieces, maps[0].pieces)


def test_other_numbers_of_tokens():
    target, draft = target_tokenizer(), draft_tokenizers()["bytes"]
    size, own = len(target), len(draft)
    vocabulary = VocabularyMap.from_tokenizers(target, draft, draft_vocab_size=own + 7)
    larger = vocabulary.resized(size + 5, CPU)
    assert len(vocabulary.image) == own + 7 and vocabulary.resized(size + 5, CPU) is larger
    check_consistent(larger)
    assert larger == VocabularyMap.from_tokenizers(target, draft, size + 5, own + 7)
    assert torch.equal(larger.pieces[:size], vocabulary.pieces) and (larger.counts[size:] == 1).all()
    assert (larger.pieces[size:, 0] == draft.eos_token_id).all() and (larger.preimage[size:] == -1).all()
    smaller = vocabulary.resized(20, CPU)
    assert smaller.image.max() < 20 and len(smaller.preimage) == len(smaller.counts) == len(smaller.pieces) == 20
    assert torch.equal(smaller.image, vocabulary.image.where(vocabulary.image < 20, -1))
    few = VocabularyMap.from_tokenizers(target, draft, draft_vocab_size=12)
    assert len(few.image) == 12 and few.pieces.max() < 12 and few.num_shared <= 12


def test_no_token_in_common_is_refused():
    target = byte_level(end="<|end|>")
    draft = Slow()
    draft.tokens, draft._eos_token = ["x", "y", "z", "<unk>"], None
    draft.eos_token = None
    message = (
        "VocabularyMap: the vocabularies of tokenizer and assistant_tokenizer must have tokens in common, got none"
    )
    with pytest.raises(ValueError, match=message):
        VocabularyMap.from_tokenizers(target, draft)
    target, draft = target_tokenizer(), draft_tokenizers()["bytes"]
    with pytest.raises(ValueError, match=message):
        VocabularyMap.from_tokenizers(target, draft).resized(1, CPU)  # <|user|>, which the draft lacks


def test_same_vocabularies():
    assert have_same_vocabulary(target_tokenizer(), target_tokenizer())
    one, other = byte_level("ab"), byte_level("ba")
    assert len(one) == len(other) and not have_same_vocabulary(one, other)
