"""The map between the vocabularies of a target and of a draft model with another tokenizer.

Source: token-level intersection (Timor et al. 2025, arXiv 2502.05202). Draft tokens that the target lacks are never
drafted. A target token that the draft lacks is given to the draft as the draft tokens of its text. Both are tables, so
no tokenizer runs during a call.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

# Largest number of draft tokens that stand for one target token; of more, the last ones are kept. Each round of the
# draft begins with as many rows and one more. At most 1.3% of the tokens of English, German and Python are more than 3
# tokens of the draft (Qwen2.5-Coder with SmolLM2, and SmolLM2 with Qwen2.5-Coder).
MOST_PIECES = 3
SPACE = "▁"  # the space in vocabularies of SentencePiece; "Ġ" is the space of byte-level ones
# in byte-level vocabularies, each of these bytes is the character of its own number, and the others follow from 256 on
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): chr(byte) for byte in PRINTABLE} | {chr(256 + at): chr(byte) for at, byte in enumerate(OTHERS)}

# tokenizer -> assistant tokenizer -> sizes of the vocabularies -> map, or True if they are the same
_found: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """A map between the vocabularies of a target and a draft model. Two maps are equal if their tables are.

    Letters: V target tokens, DV draft tokens, L the largest number of pieces of a target token.

    Attributes:
        image: [DV] int64. The target token with the text of each draft token; -1 if there is none. No two draft tokens
            have the same image.
        preimage: [V] int64. The draft token whose image is each target token; -1 if there is none.
        pieces: [V, L] int64. The draft tokens that stand for each target token: its preimage, or the draft tokens of
            its text. Unused places hold 0.
        counts: [V] int64. Number of pieces of each target token, 1 to L.
        filler: the only piece of target tokens without a text.
        beginning: the draft token with which the draft's texts begin; -1 if there is none.
        drafted, images: [S] int64. The draft tokens that have an image, in ascending order, and their images.
    """

    image: torch.Tensor
    preimage: torch.Tensor
    pieces: torch.Tensor
    counts: torch.Tensor
    filler: int
    beginning: int = -1
    drafted: torch.Tensor = field(init=False)
    images: torch.Tensor = field(init=False)
    _digest: bytes = field(init=False, repr=False)
    _resized: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        tables = hashlib.sha256(repr((self.filler, self.beginning)).encode())
        for table in (self.image, self.preimage, self.pieces, self.counts):
            tables.update(table.cpu().numpy().tobytes())
        object.__setattr__(self, "_digest", tables.digest())
        object.__setattr__(self, "drafted", (self.image >= 0).nonzero()[:, 0])
        object.__setattr__(self, "images", self.image[self.drafted])

    # drafters with equal maps can share captured rounds, see `forward.fingerprint`
    def __eq__(self, other: object) -> bool:
        return isinstance(other, VocabularyMap) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    @property
    def num_shared(self) -> int:
        """S."""
        return len(self.drafted)

    @property
    def most_pieces(self) -> int:
        """L."""
        return self.pieces.shape[1]

    @classmethod
    def from_tokenizers(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        assistant_tokenizer: PreTrainedTokenizerBase,
        target_vocab_size: int | None = None,
        draft_vocab_size: int | None = None,
    ) -> "VocabularyMap":
        """The map between the vocabularies of two tokenizers, which may be slow or fast. It is kept as long as both
        tokenizers exist.

        Two tokens match if they stand for the same bytes, or if both are special and have the same name. If several
        tokens of one vocabulary have the same bytes, the one with the lowest id is taken, and the byte tokens of
        SentencePiece only if there is no other. If the end-of-sequence token of neither tokenizer has a match, the two
        match each other. If the draft's tokenizer puts its beginning-of-sequence token before each text, the draft's
        texts begin with it, also if the target's do not.

        Args:
            tokenizer: the target's tokenizer.
            assistant_tokenizer: the draft's tokenizer.
            target_vocab_size: V; None for the tokenizer's size. Tokens beyond the tokenizer have the filler as piece.
            draft_vocab_size: DV; None for the tokenizer's size. Tokens from it on are not used.

        Raises:
            ValueError: the vocabularies have no token in common.
        """
        sizes = target_vocab_size, draft_vocab_size
        return _kept(tokenizer, assistant_tokenizer, sizes, lambda: _map_of(tokenizer, assistant_tokenizer, *sizes))

    def resized(self, target_vocab_size: int, device: torch.device) -> "VocabularyMap":
        """The map for a target of another number of tokens, with its tables on a device. It is kept.

        Raises:
            ValueError: no token is left in common.
        """
        key = target_vocab_size, device
        if key not in self._resized:
            more = max(target_vocab_size - len(self.counts), 0)
            beyond = self.pieces.new_zeros(more, self.most_pieces)
            beyond[:, 0] = self.filler
            image = torch.where(self.image < target_vocab_size, self.image, -1)
            _check_shared(image)
            tables = (
                image,
                torch.cat([self.preimage, self.preimage.new_full((more,), -1)]),
                torch.cat([self.pieces, beyond]),
                torch.cat([self.counts, self.counts.new_ones(more)]),
            )
            first, *rest = (table.to(device) for table in tables)
            kept = (table[:target_vocab_size] for table in rest)
            self._resized[key] = VocabularyMap(first, *kept, self.filler, self.beginning)
        return self._resized[key]


def have_same_vocabulary(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """True if two tokenizers have the same tokens with the same ids."""
    return tokenizer is other or _kept(tokenizer, other, "same", lambda: tokenizer.get_vocab() == other.get_vocab())


def _kept(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: Hashable, make: Callable) -> Any:
    """The result of `make`, kept under this name as long as both tokenizers exist and have as many tokens."""
    found, key = _found.setdefault(tokenizer, WeakKeyDictionary()).setdefault(other, {}), (len(tokenizer), len(other))
    if (*key, name) not in found:
        found[(*key, name)] = make()
    return found[(*key, name)]


class _Vocabulary:
    """The tokens of a tokenizer below a size.

    Attributes:
        texts: {id: bytes of the token, or the name of a special token}.
        by_text: {bytes or name: id}, the preferred token of each text.
        size: the size.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int | None):
        added, vocabulary = tokenizer.get_added_vocab(), tokenizer.get_vocab()
        self.size = 1 + max(vocabulary.values(), default=-1) if size is None else size
        spaces = [sum(token.startswith(sign) for token in vocabulary) for sign in ("Ġ", SPACE)]
        byte_level, table = spaces[0] > spaces[1], str.maketrans(BYTES)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.texts: dict[int, bytes | str] = {}
        text: bytes | str
        byte_tokens = set()
        for token, number in vocabulary.items():
            if number >= self.size:
                continue
            if number in special:
                text = token
            elif token in added:
                text = token.encode()
            elif byte_level:
                text = _bytes_of(token.translate(table), token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                text = bytes([int(token[3:5], 16)])
                byte_tokens.add(number)
            else:
                text = token.replace(SPACE, " ").encode()
            self.texts[number] = text
        self.by_text: dict[bytes | str, int] = {}
        for number in (*sorted(self.texts.keys() - byte_tokens), *sorted(byte_tokens)):
            if self.texts[number]:
                self.by_text.setdefault(self.texts[number], number)
        self._longest = max(map(len, self.by_text), default=0)

    def longest_matches(self, text: bytes) -> list[int]:
        """Tokens of a text: always the longest that matches. Bytes without a token are left out."""
        found, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self.by_text), None)
            if end is not None:
                found.append(self.by_text[text[at:end]])
            at = at + 1 if end is None else end
        return found

    def spell(self, numbers: Iterable[int]) -> bytes:
        """The bytes of tokens. Special ones have none."""
        texts = (self.texts.get(number) for number in numbers)
        return b"".join(text for text in texts if isinstance(text, bytes))


def _bytes_of(characters: str, token: str) -> bytes:
    """The bytes of a byte-level token, given as characters below 256. A token with other characters stands for
    itself."""
    try:
        return characters.encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _map_of(
    tokenizer: PreTrainedTokenizerBase,
    assistant_tokenizer: PreTrainedTokenizerBase,
    target_size: int | None,
    draft_size: int | None,
) -> VocabularyMap:
    target, draft = _Vocabulary(tokenizer, target_size), _Vocabulary(assistant_tokenizer, draft_size)
    pairs = {draft.by_text[text]: number for text, number in target.by_text.items() if text in draft.by_text}
    ends = assistant_tokenizer.eos_token_id, tokenizer.eos_token_id
    if ends[0] in draft.texts and ends[1] in target.texts and ends[0] not in pairs and ends[1] not in pairs.values():
        pairs[ends[0]] = ends[1]
    image, preimage = torch.full((draft.size,), -1), torch.full((target.size,), -1)
    if pairs:
        ours, theirs = torch.tensor(list(pairs.items())).T
        image[ours], preimage[theirs] = theirs, ours
    _check_shared(image)
    fillers = (assistant_tokenizer.unk_token_id, ends[0], 0)
    filler = next(each for each in fillers if each is not None and each < draft.size)
    known = set(pairs.values())
    left = {number: text for number, text in target.texts.items() if number not in known}
    spelled = {number: pieces for number, pieces in _spelled(left, assistant_tokenizer, draft).items() if pieces}
    lists = [pieces[-MOST_PIECES:] for pieces in spelled.values()]
    lengths = torch.tensor([1, *map(len, lists)])  # 1, so that there is a maximum
    pieces, counts = torch.zeros(target.size, int(lengths.max()), dtype=torch.int64), torch.ones(target.size).long()
    pieces[:, 0] = torch.where(preimage >= 0, preimage, filler)
    rows, lengths = torch.tensor(list(spelled), dtype=torch.int64), lengths[1:]
    places = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    pieces[rows.repeat_interleave(lengths), places] = torch.tensor([*chain.from_iterable(lists)], dtype=torch.int64)
    counts[rows] = lengths
    begin = assistant_tokenizer.bos_token_id
    begins = begin in draft.texts and assistant_tokenizer("")["input_ids"][:1] == [begin]
    return VocabularyMap(image, preimage, pieces, counts, filler, begin if begins else -1)


def _spelled(
    texts: dict[int, bytes | str], tokenizer: PreTrainedTokenizerBase, draft: _Vocabulary
) -> dict[int, list[int]]:
    """The draft tokens of each text. They are those of the draft's tokenizer if they spell the text exactly, perhaps
    after the space that some tokenizers put before a text, and the longest matches otherwise: of bytes that are no text
    of their own, and if the tokenizer changes the text."""
    found, words = {}, {}
    for number, named in texts.items():
        if named in draft.by_text:  # a second target token with this text
            found[number] = [draft.by_text[named]]
            continue
        text = named.encode() if isinstance(named, str) else named
        try:
            words[number] = text.decode()
        except UnicodeDecodeError:
            found[number] = draft.longest_matches(text)
    for number, numbers in zip(words, _encoded(tokenizer, list(words.values())), strict=True):
        text = words[number].encode()
        if numbers and draft.texts.get(numbers[0]) == b" " and draft.spell(numbers) == b" " + text:
            numbers = numbers[1:]
        found[number] = numbers if draft.spell(numbers) == text else draft.longest_matches(text)
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, without special tokens around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # half the time of the call below; an earlier call may have left padding or truncation switched on
    if isinstance(backend, Tokenizer) and backend.padding is None and backend.truncation is None:
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _check_shared(image: torch.Tensor) -> None:
    if not (image >= 0).any():
        raise ValueError(
            "VocabularyMap: the vocabularies of tokenizer and assistant_tokenizer must have tokens in common, got none"
        )
