"""Long prompts, large batches, long outputs: exact text, and a cache of the size that its shapes say."""

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from specdec_triton.cache import BUCKET

FLOAT = 4  # bytes


@pytest.fixture
def allocations(monkeypatch):
    """Bytes of every cache buffer made, target's and draft's, and how many slots each sequence has in it."""
    made, honest = [], sdt.TreeCache._allocate

    def record(cache, capacity, like):
        honest(cache, capacity, like)
        made.append((cache.storage.numel() * cache.storage.element_size(), cache.capacity))

    monkeypatch.setattr(sdt.TreeCache, "_allocate", record)
    return made


def slot_bytes(model):
    """Of one token of one sequence, all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * FLOAT


def assert_exact(model, inputs, max_new_tokens, **options):
    call = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **call)
    with sdt.patched(model, **options):
        assert torch.equal(model.generate(**inputs, **call), plain)
    assert sdt.stats(model).accepted > 0


def assert_as_computed(allocations, model, batch, first, last):
    """Buffers are whole buckets of all sequences' slots; the first holds `first` tokens, the last `last`, with less
    than a bucket and a half's growth to spare."""
    for size, capacity in allocations:
        assert capacity % BUCKET == 0 and size == batch * capacity * slot_bytes(model)
    capacities = [capacity for _, capacity in allocations]
    assert capacities == sorted(capacities) and first <= capacities[0] < first + 2 * BUCKET
    assert last <= capacities[-1] <= 1.5 * last + 2 * BUCKET
    # each is at least half as large again as the one before: few copies, however long the text
    assert all(later >= min(1.5 * before, last) for before, later in zip(capacities, capacities[1:], strict=False))


@pytest.mark.slow
def test_a_prompt_of_8k_tokens(allocations):
    model = build("llama", num_hidden_layers=2, max_position_embeddings=9000)
    inputs = prompt(batch=2, length=8192, padding=700)
    drafter = sdt.PromptLookupDrafter(branches=2, adaptive=False)
    assert_exact(model, inputs, 24, drafter=drafter)
    assert_as_computed(allocations, model, 2, 8192 + 24, 8192 + 24 + 21)


def test_a_batch_of_64(allocations):
    model = build("llama")
    inputs = prompt(batch=64, length=20, padding=0)
    for row in range(64):
        inputs["input_ids"][row, : row % 17] = inputs["attention_mask"][row, : row % 17] = 0
    assert_exact(model, inputs, 40, drafter=sdt.EarlyExitDrafter(2, tree=12))
    assert_as_computed(allocations, model, 64, 60, 60 + 12)


@pytest.mark.slow
def test_2000_new_tokens(allocations):
    model = build("llama", num_hidden_layers=2, max_position_embeddings=3000)
    assert_exact(model, prompt(batch=2), 2000, drafter=sdt.EarlyExitDrafter(1, tree=7))
    assert_as_computed(allocations, model, 2, 9 + 512, 9 + 2000 + 7)
    assert 3 <= len(allocations) <= 5
