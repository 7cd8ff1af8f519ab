"""Drafts of a model with another tokenizer.

A wrong draft never changes the text. The drafts' models have the target's weights, so that drafts are accepted only if
the model has read the right text.
"""

from functools import cache

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build
from helpers import TREES, speculative
from specdec_triton.drafters.vocabulary import VocabularyMap
from vocabularies import draft_tokenizers, target_tokenizer, texts, twin

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
