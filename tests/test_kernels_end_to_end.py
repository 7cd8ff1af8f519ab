"""Text through the Triton kernels (in the interpreter where there is no GPU): every token is plain `generate`'s."""

import pytest
import torch

import specdec_triton as sdt
from families import EOS, build, prompt
from test_generate import TREES, oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often each kernel ran: a test that reached none of them would prove nothing."""
    counts = dict.fromkeys(sdt.ops.OPS, 0)
    launcher = sdt.ops._launcher

    def counted(op):
        counts[op] += 1
        return launcher(op)

    monkeypatch.setattr(sdt.ops, "_launcher", counted)
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
    assert calls["tree_attention"] == 2 * stats.rounds and calls["compact_kv"] == stats.rounds
    assert calls["accept_greedy"] == stats.rounds + 1


def test_a_draft_model_through_the_kernels(calls):
    model, draft = (build("llama", num_hidden_layers=1).to(DEVICE) for _ in range(2))
    inputs = {name: tensor.to(DEVICE) for name, tensor in prompt().items()}
    options = {"do_sample": False, "max_new_tokens": 7}
    plain = model.generate(**inputs, **options)
    with sdt.patched(model, drafter=sdt.ModelDrafter(draft, tree=sdt.Topology.from_widths([2, 1])), impl="triton"):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert sdt.stats(model).rounds == 2 and calls["compact_kv"] == 4
