"""Long prompts, large batches, long outputs and many calls: the text is exact, and memory follows from the shapes."""

import gc
import os
import random
from pathlib import Path

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from specdec_triton.forward.cache import BUCKET

FLOAT = 4  # bytes


@pytest.fixture
def allocations(monkeypatch):
    """Bytes of every cache buffer of target and draft, and the number of slots that each sequence has in it."""
    made, honest = [], sdt.TreeCache._allocate

    def record(cache, capacity, like):
        honest(cache, capacity, like)
        made.append((cache.storage.numel() * cache.storage.element_size(), cache.capacity))

    monkeypatch.setattr(sdt.TreeCache, "_allocate", record)
    return made


def slot_bytes(model):
    """Bytes of one token of one sequence in all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * FLOAT


def assert_exact(model, inputs, max_new_tokens, **options):
    call = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": NEVER}
    plain = model.generate(**inputs, **call)
    with sdt.patched(model, **options):
        assert torch.equal(model.generate(**inputs, **call), plain)
    assert sdt.stats(model).accepted > 0


def assert_as_computed(allocations, model, batch, first, last):
    """Assert that buffers are whole buckets of all sequences' slots. The first holds `first` tokens; the last holds
    `last` tokens and is at most a bucket and a half larger than needed."""
    for size, capacity in allocations:
        assert capacity % BUCKET == 0 and size == batch * capacity * slot_bytes(model)
    capacities = [capacity for _, capacity in allocations]
    assert capacities == sorted(capacities) and first <= capacities[0] < first + 2 * BUCKET
    assert last <= capacities[-1] <= 1.5 * last + 2 * BUCKET
    # each is at least half as large again as the one before, so there are few copies, however long the text
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
    assert_exact(model, inputs, 40, drafter=sdt.EarlyExitDrafter(1, tree=12))
    assert_as_computed(allocations, model, 64, 60, 60 + 12)


@pytest.mark.slow
def test_2000_new_tokens(allocations):
    model = build("llama", num_hidden_layers=2, max_position_embeddings=3000)
    assert_exact(model, prompt(batch=2), 2000, drafter=sdt.EarlyExitDrafter(1, tree=7))
    assert_as_computed(allocations, model, 2, 9 + 512, 9 + 2000 + 7)
    assert 3 <= len(allocations) <= 5


STATM = Path("/proc/self/statm")


def resident_bytes():
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not STATM.exists(), reason="memory is read from /proc")
def test_300_calls_in_a_row():
    """Different drafters, trees, rules, batches, patches and blocks: every text is correct, and memory does not
    grow."""
    chosen, model, draft = random.Random(0), build("llama"), build("llama", seed=1)
    model.generation_config.pad_token_id = 0
    chains = [sdt.PromptLookupDrafter(4), sdt.ModelDrafter(draft, num_tokens=3), sdt.EarlyExitDrafter(1, num_tokens=2)]
    trees = [
        sdt.ModelDrafter(draft, tree=9),
        sdt.ModelDrafter(draft, tree=sdt.DynamicTree(8, width=2, depth=3)),
        sdt.EarlyExitDrafter(skip=[1], tree=6),
        sdt.PromptLookupDrafter(3, branches=2),
    ]
    middle = None
    for call in range(300):
        inputs = prompt(batch=chosen.choice([1, 2, 4]), length=chosen.randint(4, 20), padding=chosen.randint(0, 3))
        options = {"max_new_tokens": chosen.randint(1, 24), "eos_token_id": chosen.choice([2, NEVER, [3, 4, 5]])}
        seed, rule = chosen.randint(0, 99), chosen.choice(["greedy", "greedy", "coupled", "rejection", "block"])
        drafter = chosen.choice(chains if rule in ("rejection", "block") else chains + trees)
        if rule == "greedy":
            plain, rule = model.generate(**inputs, **options, do_sample=False), None
            options["do_sample"] = False
        else:
            options |= {"do_sample": True, "top_k": 20, "temperature": 0.8}
            baseline = sdt.SpeculativeGenerate(seed=seed, rule="coupled")
            plain = model.generate(**inputs, **options, custom_generate=baseline)
        if chosen.random() < 0.5:
            with sdt.patched(model, drafter=drafter, rule=rule, seed=seed):
                text = model.generate(**inputs, **options)
        else:
            sdt.patch(model, drafter=drafter, rule=rule, seed=seed)
            text = model.generate(**inputs, **options)
            sdt.unpatch(model)
        if rule in (None, "coupled"):
            assert torch.equal(text, plain), f"call {call}"
        assert sdt.stats(model).emitted <= len(text) * options["max_new_tokens"]
        if call == 149:
            middle = resident_bytes()
    assert resident_bytes() - middle < 8 * 2**20
