"""An MTP layer that is fitted to a target is accepted at every depth to which it is recycled, and is accepted less if
it is read wrongly.

The text is a Markov chain, see `markov`. No published weights are needed.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

import specdec_triton as sdt
from families import NEVER
from markov import LAG, LENGTH, MarkovTexts, fit, fit_target, rows_seen
from mtp_checkpoints import MtpLayers, random_mtp, write_layers
from specdec_triton.heads.mtp import MtpModel

HIDDEN_SCALE = 3.0  # of the projection before the fit: without it, the layer uses the embeddings alone
LEVELS = 3  # of drafts for which the layer is fitted
# The acceptance length of chains of 3 tokens is 3.2 with the fitted layer, and at most 1.4 with a mistake.
FLOOR = 2.6

pytestmark = pytest.mark.slow


def fit_layer(mtp: MtpLayers, target, texts: MarkovTexts) -> None:
    """Fit the only layer to the target's most likely tokens, at several levels of a draft. Deeper levels read the
    layer's own outputs."""
    layer, head, count = mtp.layers[0], target.get_output_embeddings(), LENGTH
    masks = [rows_seen(levels, count) for levels in range(1, LEVELS + 1)]

    def loss():
        tokens = texts.draw(6, count + 1)
        with torch.no_grad():
            states = target.model(tokens).last_hidden_state
            labels = head(states).argmax(-1)[:, 1:]
            embeddings = target.get_input_embeddings()(tokens[:, 1:])
        features, total = states[:, :-1], 0.0
        outputs = []
        for level in range(LEVELS):
            # MiMo's layers join the hidden state first
            halves = [layer.hnorm(features), layer.enorm(embeddings.repeat(1, level + 1, 1))]
            x = layer.eh_proj(torch.cat(halves, -1))
            places = torch.arange(count).repeat(len(tokens), level + 1)
            mask = masks[level].expand(len(tokens), -1, -1, -1)
            x = layer.block(x, attention_mask=mask, position_embeddings=mtp.cos_sin(x, places, 0))
            outputs = layer.post_norm(x).split(count, 1)
            logits, first = head(outputs[-1]), LAG + level
            total = total + cross_entropy(logits[:, first:].flatten(0, 1), labels[:, first:].flatten())
            features = torch.cat([states[:, :-1], *(output.roll(1, 1) for output in outputs)], 1)
        return total

    with torch.no_grad():
        for weight in layer.block.parameters():
            weight *= 1 if weight.dim() == 1 else 0.5  # small enough to be fitted
        layer.eh_proj.weight *= HIDDEN_SCALE
    weights = [weight.requires_grad_(True) for module in layer for weight in module.parameters()]
    fit(weights, loss)


@pytest.fixture(scope="module")
def fitted():
    """A target, its fitted MTP layer, and prompts. The weights of the target's final norm differ by a factor of up to
    100, so that its states before and after the norm differ much."""
    target, mtp = random_mtp("mimo", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    norm, random = target.model.norm.weight, torch.Generator().manual_seed(5)
    with torch.no_grad():
        norm.copy_(10 ** (2 * torch.rand(norm.shape, generator=random) - 1))
    texts = MarkovTexts(torch.arange(3, 23))
    fit_target(target, texts)
    fit_layer(mtp, target, texts)
    return target, mtp, texts.draw(4, 16)


@pytest.fixture
def acceptance_length(fitted, tmp_path):
    """A function of the length of chains: the acceptance length with the fitted layer."""

    def measure(num_tokens):
        target, mtp, prompts = fitted
        checkpoint = write_layers(tmp_path / str(num_tokens), target, mtp)
        loaded = checkpoint.target()
        drafter = sdt.MTPDrafter.from_target(loaded, num_tokens=num_tokens)
        inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
        with sdt.patched(loaded, drafter=drafter):
            loaded.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=NEVER)
        return sdt.stats(loaded).acceptance_length

    return measure


def test_deeper_chains_of_one_layer_emit_more(acceptance_length):
    assert acceptance_length(3) > FLOOR > 2 >= acceptance_length(1)


def test_it_is_accepted_less_before_the_final_norm(acceptance_length, monkeypatch):
    monkeypatch.setattr(MtpModel, "taps", lambda self, target: ("last",))
    assert acceptance_length(3) < FLOOR


def test_it_is_accepted_less_with_the_halves_swapped(fitted, acceptance_length, monkeypatch):
    weight = fitted[1].layers[0].eh_proj.weight
    monkeypatch.setattr(weight, "data", torch.cat(weight.data.chunk(2, 1)[::-1], 1))
    assert acceptance_length(3) < FLOOR
