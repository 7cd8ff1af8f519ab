"""A head that is fitted to a target is accepted, and is accepted less if it is read wrongly.

The text is a Markov chain, see `markov`. No published weights are needed.
"""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import specdec_triton as sdt
from checkpoints import Layout, write_head, write_tensors
from families import FAMILIES, NEVER
from markov import LAG, LENGTH, MarkovTexts, fit, fit_target, rows_seen
from specdec_triton.heads.checkpoint import read_checkpoint
from specdec_triton.heads.eagle import EagleModel

LEVELS = 3  # of drafts for which the head is fitted
LAYOUT = Layout(writer="speculators", ids=(0, 1, 3), states=(0, 1, 3), draft_vocab=20, rope_theta=20.0)
# The acceptance length of chains of 4 tokens is 4.9 with the fitted head, and at most 3.8 with a mistake.
FLOOR = 4.4

pytestmark = pytest.mark.slow


def fit_head(model: EagleModel, target, texts: MarkovTexts) -> None:
    """Fit the head to the target's most likely tokens, at several levels of a draft. Deeper levels read the head's own
    outputs (the training-time test of EAGLE-3)."""
    count = LENGTH
    named = torch.full((target.config.vocab_size,), -100)
    named[model.target_ids] = torch.arange(len(model.target_ids))
    masks = [rows_seen(levels, count) for levels in range(1, LEVELS + 1)]

    def loss():
        tokens = texts.draw(6, count + 1)
        with torch.no_grad():
            given = target(tokens, output_hidden_states=True)
            labels = named[given.logits.argmax(-1)][:, 1:]
            embeddings = target.get_input_embeddings()(tokens[:, 1:])
        verified = model.features(tuple(given.hidden_states[state][:, :-1] for state in LAYOUT.states))
        features, total = verified, 0.0
        for level in range(LEVELS):
            outputs = model(
                inputs_embeds=embeddings.repeat(1, level + 1, 1),
                features=features,
                position_ids=torch.arange(count).repeat(len(tokens), level + 1),
                attention_mask=masks[level].expand(len(tokens), -1, -1, -1),
                use_cache=False,
            ).last_hidden_state.split(count, 1)
            logits = model.lm_head(model.logits_input(outputs[-1]))
            first = LAG + level
            total = total + cross_entropy(logits[:, first:].flatten(0, 1), labels[:, first:].flatten())
            features = torch.cat([verified, *(output.roll(1, 1) for output in outputs)], 1)
        return total

    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 if weight.dim() == 1 else 0.5  # norms stay random; matrices are small enough to be fitted
    fit(model.requires_grad_(True).parameters(), loss)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A target, the fitted head, and prompts."""
    torch.manual_seed(0)
    options = {**FAMILIES["llama"].options, "num_hidden_layers": 4, "rope_theta": 10000.0}
    target = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    folder = tmp_path_factory.mktemp("head")
    tensors = write_head(folder, target, LAYOUT).tensors
    texts = MarkovTexts(tensors["t2d"].nonzero().flatten())
    fit_target(target, texts)
    model = EagleModel.from_checkpoint(read_checkpoint(folder))
    fit_head(model, target, texts)
    trained = {name.replace("final_norm", "norm"): tensor for name, tensor in model.state_dict().items()}
    head = write_tensors(folder, target, LAYOUT, {**tensors, **trained})
    return target, head, texts.draw(4, 16)


def acceptance_length(target, folder, prompts, **overrides):
    drafter = sdt.EagleDrafter.from_pretrained(folder, target, num_tokens=4, **overrides)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    with sdt.patched(target, drafter=drafter):
        target.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=NEVER)
    return sdt.stats(target).acceptance_length


def test_it_is_accepted(fitted):
    target, head, prompts = fitted
    assert acceptance_length(target, head.folder, prompts) > FLOOR


def test_it_is_accepted_less_if_all_levels_have_one_position(fitted, monkeypatch):
    target, head, prompts = fitted
    forward, level = EagleModel.forward, 0

    def moved(self, position_ids, **arguments):
        nonlocal level
        level = level + 1 if position_ids.shape[1] == 1 else 0  # the first forward of a round has more rows
        return forward(self, position_ids=position_ids - max(level - 1, 0), **arguments)

    monkeypatch.setattr(EagleModel, "forward", moved)
    assert acceptance_length(target, head.folder, prompts) < FLOOR


def halves_swapped(tensors):
    for part in "qkv":
        name = f"layers.0.self_attn.{part}_proj.weight"
        tensors[name] = torch.cat(tensors[name].chunk(2, 1)[::-1], 1)


def states_reversed(tensors):
    tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(3, 1)[::-1], 1)


def offsets_shifted(tensors):
    tensors["d2t"] = tensors["d2t"] - 1


# mistake -> a change of the checkpoint that has the effect of the mistake: of its tensors, or of its flags
CHANGES = {
    "shifted offsets": offsets_shifted,
    "states in reverse order": states_reversed,
    "hidden before embedding": halves_swapped,
    "normed residual": {"norm_before_residual": True},
    "normed feedback": {"norm_output": True},
}
OVERRIDES = {
    "rope base of the target": {"rope_theta": 10000.0},
    "neighbouring states": {"layer_meaning": "output"},
    "other layers": {"layers": (1, 2, 3)},
}


@pytest.mark.parametrize("mistake", [*CHANGES, *OVERRIDES])
def test_it_is_accepted_less_if_it_is_read_wrongly(mistake, fitted, tmp_path):
    target, head, prompts = fitted
    tensors, layout, change = dict(head.tensors), LAYOUT, CHANGES.get(mistake)
    if isinstance(change, dict):
        layout = replace(LAYOUT, flags=change)
    elif change is not None:
        change(tensors)
    changed = write_tensors(tmp_path, target, layout, {name: each.contiguous() for name, each in tensors.items()})
    assert acceptance_length(target, changed.folder, prompts, **OVERRIDES.get(mistake, {})) < FLOOR
