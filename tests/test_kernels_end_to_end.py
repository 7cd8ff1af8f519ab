"""Texts generated with the Triton kernels (in the interpreter if there is no GPU) equal those of plain `generate` or of
the reference."""

import pytest
import torch

import specdec_triton as sdt
from families import EOS, NEVER, VOCAB, build, prompt
from helpers import DEVICE, TREES, oracle


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Counts the runs of each kernel, because a test that runs none would prove nothing."""
    counts = dict.fromkeys(sdt.ops.OPS, 0)
    launcher = sdt.ops.registry.launcher

    def counted(op):
        counts[op] += 1
        return launcher(op)

    monkeypatch.setattr(sdt.ops.registry, "launcher", counted)
    return counts


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma3",
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("gpt_neox", marks=pytest.mark.slow),
    ],
)
def test_text_through_the_kernels(family, calls):
    model = build(family, num_hidden_layers=2).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt().items()}
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": [EOS, 7]}
    plain = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=oracle(plain, tree=TREES["skipping"]), impl="triton"):
        assert torch.equal(model.generate(**inputs, **options), plain)
    stats = sdt.stats(model)
    assert stats.accepted > 0
    assert calls["tree_attention"] == 2 * stats.rounds and calls["tree_inputs"] == stats.rounds
    assert 0 < calls["compact_kv"] <= stats.rounds  # at the end of the text a tree may be cut to a chain
    assert calls["accept_greedy"] == calls["append_tokens"] == stats.rounds + 1


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_draft_token_without_finite_numbers(family, impl):
    """Its siblings, the root and later rounds are not affected."""
    model = build(family, num_hidden_layers=2).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt().items()}
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **options)
    unused = sorted(set(range(3, VOCAB)) - set(plain.flatten().tolist()))[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = float("nan")
        # with tied embeddings every row of the head would get a NaN
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num(0.0))
    assert torch.equal(model.generate(**inputs, **options), plain)
    drafted = plain.clone()
    drafted[:, inputs["input_ids"].shape[1] + 2 :: 3] = unused
    with sdt.patched(model, drafter=oracle(drafted, tree=TREES["skipping"]), impl=impl):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert sdt.stats(model).accepted > 0


def test_a_draft_model_through_the_kernels(calls):
    model, draft = (build("llama", num_hidden_layers=1).to(DEVICE) for _ in range(2))
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt().items()}
    options = {"do_sample": False, "max_new_tokens": 7}
    plain = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=sdt.ModelDrafter(draft, tree=sdt.Topology.from_widths([2, 1])), impl="triton"):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert sdt.stats(model).rounds == 2 and calls["compact_kv"] == 4


@pytest.mark.parametrize(
    "rule",
    [
        "coupled",
        *(pytest.param(rule, marks=pytest.mark.slow) for rule in sdt.ops.rules.RULES if rule != "coupled"),
    ],
)
def test_sampling_through_the_kernels(rule, calls):
    """With the same seeds, the text is that of the reference: filters, noise, acceptance and recovered tokens are
    equal."""
    model, draft = (build("llama", seed=seed, num_hidden_layers=1).to(DEVICE) for seed in (0, 1))
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt().items()}
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "max_new_tokens": 5}
    tree = sdt.Topology.chain(2) if rule in ("rejection", "block") else sdt.Topology.from_widths([2, 1])
    texts = []
    for impl in ("reference", "triton"):
        drafter = sdt.ModelDrafter(draft, tree=tree)
        with sdt.patched(model, drafter=drafter, rule=rule, seed=5, impl=impl):
            texts.append(model.generate(**inputs, **options, eos_token_id=[EOS, 7], repetition_penalty=1.2))
    assert torch.equal(*texts)
    assert calls["accept_sample"] == calls["append_tokens"] == sdt.stats(model).rounds + 1
