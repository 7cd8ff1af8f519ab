"""Tiny tokenizers with different vocabularies, and models for them, for tests of drafts with another tokenizer."""

import copy

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from families import add_noise, build
from specdec_triton.drafters.vocabulary import VocabularyMap

LETTERS = "abcdefghijklmnopqrst"
SIGNS = "ĠĊÃ©ä"  # the characters of the bytes 20, 0A, C3, A9 and E4 in byte-level tokenizers
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def merged(*words: str) -> list[tuple[str, str]]:
    """Merges that build each word from the left."""
    steps = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    return list(dict.fromkeys(steps))


def fast(core: Tokenizer, special: tuple[str, ...], **named: str) -> PreTrainedTokenizerFast:
    core.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)


def byte_level(
    *words: str, first: tuple[str, ...] = (), signs: str = SIGNS, end: str = "<|end|>", reverse: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of LETTERS, `signs` and `words`.

    Args:
        words: words in the characters of byte-level tokenizers. All their beginnings are tokens, too.
        first: special tokens that come before all others.
        signs: the characters of other bytes.
        end: the end-of-sequence token, a special one; the last token.
        reverse: True to number the tokens from the last to the first.
    """
    tokens = [*LETTERS, *signs, *("".join(pair) for pair in merged(*words))]
    tokens = [*first, *(reversed(tokens) if reverse else tokens)]
    core = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merged(*words)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return fast(core, (*first, end), eos_token=end)


def sentences(
    *words: str, first: tuple[str, ...] = ("<unk>", "<s>", "</s>"), begins: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer like those of SentencePiece: ▁ is the space, one is put before each text, and characters without a
    token are spelled as byte tokens, such as <0x0A>. With `begins`, it puts <s> before each text."""
    tokens = [*first, *BYTES, "▁", *LETTERS, *("".join(pair) for pair in merged(*words))]
    core = Tokenizer(
        models.BPE(
            vocab={token: place for place, token in enumerate(tokens)},
            merges=merged(*words),
            unk_token=first[0],
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if begins:
        core.post_processor = processors.TemplateProcessing(single=f"{first[1]} $0", special_tokens=[(first[1], 1)])
    return fast(core, first, unk_token=first[0], bos_token=first[1], eos_token=first[2])


def target_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level("abc", "Ġab", "Ġbad", "hi", "Ġä", "hot", first=("<|user|>",))


def draft_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers that lack some tokens of `target_tokenizer`."""
    return {
        "bytes": byte_level("ab", "Ġa", "hi", "deaf", "Ġb", "hot", end="</s>", reverse=True),
        "sentences": sentences("ab", "▁a", "hi", "deaf", "hot"),
    }


def twin(target, vocabulary: VocabularyMap, noise: float = 0.0, **options):
    """A draft model with the weights of `target`, a Llama of `families`, and of each token's image. On texts whose
    tokens all have one, it is always right without noise."""
    size = len(vocabulary.image)
    draft = build("llama", seed=1, **{**target.config.to_dict(), "vocab_size": size, **options})
    weights = copy.deepcopy(target.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own = draft.state_dict()[name].clone()
        own[vocabulary.drafted] = weights[name][vocabulary.images]
        weights[name] = own
    draft.load_state_dict(weights)
    return add_noise(draft, noise) if noise else draft


def texts(batch: int, length: int, vocab: int, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts over all tokens below `vocab`. Every row except the last is padded on the left."""
    ids = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[:-1, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
