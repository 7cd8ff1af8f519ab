"""A literal statement of drafts by a model with another tokenizer than the target's, and of the texts of tokens.

Sources: token-level intersection of two vocabularies (Timor et al. 2025, arXiv 2502.05202), and the definitions below.

The text of a token is a string of bytes, or the content of a special token, which is the text of no other token. The
image of a draft token is the target token of the same text. The pieces of a target token are the draft tokens that
together have its text. The draft model reads the token with which its texts begin, if there is one, and then the pieces
of all tokens of a text, one after another. Its logits of a token are those of the image.
"""

from typing import NamedTuple

import torch
from tokenizers import pre_tokenizers

from literal_eagle import DraftedTrees

# Names of deliberate mistakes. The code that uses a name makes the mistake.
MISTAKES = (
    "first piece alone",
    "last piece alone",
    "pieces in reverse order",
    "positions of target tokens",
    "tokens of many pieces left out",
    "prompt without its first token",
    "root without its first piece",
    "logits under the draft's ids",
    "logits of pieces",
)


class Special(NamedTuple):
    """The text of a special token."""

    content: str


def byte_of_each_sign() -> dict[str, int]:
    """The byte of each character of byte-level tokenizers: printable characters of Latin-1 stand for themselves, the
    other bytes for the characters from U+0100 on, in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    assert signs.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return signs


SIGNS = byte_of_each_sign()


def texts_of(tokenizer) -> dict[int, bytes | Special]:
    """The text of each token of a tokenizer of transformers. A tokenizer is byte-level if it has a token of each
    printable character of one byte, otherwise ▁ stands for a space and <0x0A> for a byte."""
    added, names = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    byte_level = "Ġ" in names
    found = {}
    for name, token in names.items():
        if token in added:
            content = added[token].content
            found[token] = Special(content) if added[token].special else content.encode()
        elif byte_level:
            found[token] = bytes(SIGNS[sign] for sign in name)
        elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            found[token] = bytes([int(name[3:5], 16)])
        else:
            found[token] = name.replace("▁", " ").encode()
    return found


def image_of(target, draft) -> dict[int, int]:
    """The image of each draft token that has one, from two tokenizers in which no two tokens have the same text."""
    texts = {text: token for token, text in texts_of(target).items()}
    found = {token: texts[text] for token, text in texts_of(draft).items() if text in texts}
    ends = draft.eos_token_id, target.eos_token_id
    if None not in ends and ends[0] not in found and ends[1] not in found.values():
        found[ends[0]] = ends[1]
    return found


class LiteralTranslation(DraftedTrees):
    """The draft of a model with another tokenizer after one text.

    Args:
        model: the draft model in fp64, a copy that nothing else uses.
        image: the image of each draft token that has one.
        pieces: the pieces of each target token.
        vocab_size: number of the target's logits.
        text: t_0, ..., t_n, tokens of the target.
        mistake: one of `MISTAKES`, or "" for none.
        first: the tokens of an empty text of the draft.
    """

    mistakes = MISTAKES

    def __init__(self, model, image, pieces, vocab_size: int, text: list[int], mistake: str = "", first=()):
        super().__init__(text, mistake)
        self.first = [] if [*first] == pieces[text[0]][: len(first)] else [*first]
        self.model, self.image, self.pieces, self.vocab_size = model, image, pieces, vocab_size
        self.computed: dict[tuple[int, ...], torch.Tensor] = {}

    def read(self, path: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """The draft's tokens of the text and `path`, and their positions."""
        tokens, positions = [*self.first], [*range(len(self.first))]
        for number, token in enumerate([*self.text, *path]):
            pieces = list(self.pieces[token])
            if self.mistake == "first piece alone":
                pieces = pieces[:1]
            if self.mistake == "last piece alone":
                pieces = pieces[-1:]
            if self.mistake == "pieces in reverse order":
                pieces.reverse()
            if self.mistake == "tokens of many pieces left out" and len(pieces) > 1:
                pieces = []
            if self.mistake == "prompt without its first token" and number == 0:
                pieces = []
            if self.mistake == "root without its first piece" and number == len(self.text) - 1:
                pieces = pieces[1:] or pieces
            tokens += pieces
            target_positions = self.mistake == "positions of target tokens"
            positions += [number if target_positions else len(positions) + place for place in range(len(pieces))]
        return tokens, positions

    def logits(self, path):
        if path not in self.computed:
            tokens, positions = self.read(path)
            named = {"position_ids": torch.tensor([positions])} if self.mistake else {}
            with torch.no_grad():
                own = self.model(torch.tensor([tokens]), **named).logits[0, -1]
            given = own.new_full((self.vocab_size,), -torch.inf)
            if self.mistake == "logits under the draft's ids":
                given[: len(own)] = own[: self.vocab_size]
            elif self.mistake == "logits of pieces":  # of tokens that are no single token of the draft
                for token, pieces in self.pieces.items():
                    given[token] = own[pieces[0]]
            else:
                for token, target in self.image.items():
                    given[target] = own[token]
            self.computed[path] = given
        return self.computed[path]
