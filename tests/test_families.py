"""Every family gives plain `generate`'s text, through the reference and the kernels, or is refused by name."""

import pytest
import torch

import specdec_triton as sdt
from families import FAMILIES, NEVER, PAD, REFUSED, build, perturbed, prompt
from helpers import DEVICE, TREES, oracle, snapshot
from specdec_triton.engine.graph_runner import cannot_capture
from specdec_triton.forward.checks import graph_hazard

# all features of attention: groups and chunks, softcap and window, sinks, narrow values, one key head
QUICK_KERNELS = ("llama4", "gemma2", "gpt_oss", "deepseek_v3", "gemma")
# a repetition penalty keeps the text of a random model from repeating; it is applied outside of the model
CELLS = [
    pytest.param(family, "reference", penalty, marks=[] if penalty > 1 or family == "llama4" else pytest.mark.slow)
    for family in FAMILIES
    for penalty in (1.0, 1.3)
] + [
    pytest.param(family, "triton", 1.3, marks=[] if family in QUICK_KERNELS else pytest.mark.slow)
    for family in FAMILIES
]


@pytest.fixture
def paths(monkeypatch):
    """The accepted paths [B, D] of all rounds, each with [B] bool, True for rows that could emit tokens."""
    seen, accept = [], sdt.ops.accept_greedy

    def spy(*args, **options):
        accepted = accept(*args, **options)
        seen.append((accepted.path.cpu(), options["budget"].cpu() > 0))
        return accepted

    monkeypatch.setattr(sdt.ops, "accept_greedy", spy)
    return seen


def ends_one_row(text: torch.Tensor) -> int:
    """A token that first occurs in one of two rows before its end, and nowhere in the other row."""
    columns = text.shape[1]
    for row, other in ((0, 1), (1, 0)):
        mine, theirs = text[row].tolist(), text[other].tolist()
        for column in range(columns // 4, columns - 2):
            if mine[column] != PAD and mine[column] not in mine[:column] + theirs:
                return mine[column]
    raise AssertionError(f"no token ends one row of {text.tolist()}")


@pytest.mark.parametrize(("family", "impl", "penalty"), CELLS)
def test_text_is_plain_generates(family, impl, penalty, paths):
    through_kernels = impl == "triton"
    size = {"num_hidden_layers": 2 if "layers" in FAMILIES[family].features else 1} if through_kernels else {}
    model, inputs = build(family, **size).to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in prompt().items()}
    options = {
        "do_sample": False,
        "max_new_tokens": 8 if through_kernels else 24 if penalty > 1 else 30,
        "repetition_penalty": penalty,
    }
    first = inputs["input_ids"].shape[1]
    options["eos_token_id"] = ends_one_row(model.generate(**inputs, **options, eos_token_id=NEVER)[:, first:])
    plain = model.generate(**inputs, **options)
    assert (plain[:, first:] == options["eos_token_id"]).sum() == 1

    # a replayed round does not call the function that records paths
    with sdt.patched(model, drafter=oracle(plain, 0.5, tree=TREES["skipping"]), impl=impl, cuda_graphs=False):
        assert torch.equal(model.generate(**inputs, **options), plain)
    accepted = [path[live] for path, live in paths[1:]]
    assert any((path >= 0).any() for path in accepted), "no draft was accepted"
    assert any((path < 0).all(1).any() for path in accepted), "no draft was rejected at its first token"
    places = [(path, 1 + torch.arange(path.shape[1])) for path in accepted]
    assert any(((path >= 0) & (path != in_place)).any() for path, in_place in places), "no key was moved"

    drafter = sdt.ModelDrafter(
        perturbed(family, **size).to(DEVICE), tree=sdt.Topology.from_widths([2] if through_kernels else [2, 1])
    )
    with sdt.patched(model, drafter=drafter, impl=impl):
        assert torch.equal(model.generate(**inputs, **options), plain)
    stats = sdt.stats(model)
    assert 0 < stats.accepted < drafter.tree.max_depth * stats.row_rounds
    assert stats.why_eager == (cannot_capture(model.device) or graph_hazard(model))


LEARNED = [family for family in FAMILIES if "learned positions" in FAMILIES[family].features]


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        pytest.param(family, padding, marks=[] if (place + padding) % 2 else pytest.mark.slow)
        for place, family in enumerate(LEARNED)
        for padding in (0, 3)
    ],
)
def test_the_last_learned_position_is_never_passed(family, padding):
    """One position more would be an index error. Padding takes no positions, so a padded text may have as many
    additional columns."""
    limit, shape = 24, {"padding": 0, "length": 8 + padding}
    model, inputs = build(family, max_position_embeddings=limit).to(DEVICE), prompt(**shape)
    inputs["attention_mask"][:, :padding] = 0
    inputs["attention_mask"][0, : padding + 2] = 0
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    options = {"do_sample": False, "max_length": limit + padding, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options)
    draft = perturbed(family, max_position_embeddings=limit).to(DEVICE)
    shorter = perturbed(family, max_position_embeddings=limit // 2).to(DEVICE)
    for drafter in (
        oracle(plain, tree=sdt.Topology.chain(9)),
        oracle(plain, tree=TREES["skipping"]),
        sdt.ModelDrafter(draft, tree=TREES["wide"]),
        sdt.ModelDrafter(shorter, num_tokens=9),
    ):
        with sdt.patched(model, drafter=drafter):
            assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family):
    model = build(family)
    before = snapshot(model)
    with pytest.raises(ValueError) as refusal:
        sdt.patch(model)
    assert snapshot(model) == before
    message = str(refusal.value)
    assert message.startswith("patch: the model must ") and type(model).__name__ in message
    assert REFUSED[family].features in message
    assert "decode it without speculation" in message or "use transformers' own" in message
    with pytest.raises(ValueError, match="patch: the draft model must"):
        sdt.ModelDrafter(model)


def test_a_softcap_that_sdpa_would_drop_is_refused():
    """transformers 5.17 runs Gemma 2 under sdpa without its softcap; 5.23 refuses it."""
    model = build("gemma2")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="apply its softcap.*got Gemma2ForCausalLM.*set_attn_implementation"):
        sdt.patch(model)
    model.set_attn_implementation("eager")
    with sdt.patched(model):
        pass


def test_positions_from_the_cache_are_refused_unless_corrected():
    """Llama 4's attention is corrected, and it is recognised by name. Another module that takes positions from the
    cache would be wrong."""
    model = build("llama4")
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("OtherAttention", (type(attention),), {})
    with pytest.raises(ValueError, match="positions from position_ids, got Llama4ForCausalLM, whose OtherAttention"):
        sdt.patch(model)
