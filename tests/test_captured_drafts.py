"""Captured rounds with drafters that read hidden states of the target, on a GPU and with simulated graphs: blocks of
DFlash, MTP layers, and likeliest trees.

The target and the heads are those of the benches: the heads are right except after some tokens. If a captured round
read the root of an old round, fewer drafts would be accepted. If it read old hidden states of the target, the keys that
the head keeps would differ.
"""

import pytest
import torch
from _models import dflash_head, prompts, successors, synthetic, wrong_share

import specdec_triton as sdt
import tiny
from helpers import capture_here, speculative
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.heads.checkpoint import Checkpoint
from specdec_triton.heads.medusa import MedusaHeads
from specdec_triton.tree import DynamicTree, Topology

ERRORS = 0.15
COLUMNS, PADDING, TOKENS = 12, 5, 44
SAMPLED = {"do_sample": True, "temperature": 0.7}
FP32, BF16 = torch.float32, torch.bfloat16


def blocks(**shape):
    return lambda target, folder: sdt.DFlashDrafter(dflash_head("tiny", target, ERRORS), **shape)


def mtp(**shape):
    def drafter(target, folder):
        target.save_pretrained(folder)
        tiny.add_mtp_layer(folder, noise=3.0)
        return sdt.MTPDrafter.from_target(target, folder, **shape)

    return drafter


def medusa(target, folder):
    """Heads that map the last state, which is the embedding of the token before the root, to the tokens after it."""
    embedding, vocab = target.get_input_embeddings().weight, target.config.vocab_size
    follows, wrong, tensors = successors(vocab), wrong_share(ERRORS, vocab), {}
    for head in range(3):
        token = follows
        for _ in range(head):
            token = follows[token]
        output = torch.empty_like(embedding)
        output[follows[token].to(embedding.device)] = embedding * (1 - 2 * wrong[token, None].to(embedding))
        tensors[f"{head}.0.linear.weight"] = torch.zeros(embedding.shape[1], embedding.shape[1])
        tensors[f"{head}.0.linear.bias"] = torch.zeros(embedding.shape[1])
        tensors[f"{head}.1.weight"] = output.detach().cpu()
    checkpoint = Checkpoint("synthetic heads", {}, tensors)
    return sdt.MedusaDrafter(MedusaHeads.from_checkpoint(checkpoint, dtype=target.dtype, device=target.device))


# name -> drafter, options of the call, and dtype
CASES = {
    "DFlash, likeliest nodes": (blocks(), {}, FP32),
    "DFlash, likeliest nodes, bf16": (blocks(), {}, BF16),
    "DFlash, sampled tree": (blocks(tree=Topology.from_widths([2, 2, 1])), SAMPLED, FP32),
    "MTP, chain": (mtp(num_tokens=3), {}, FP32),
    "MTP, dynamic tree": (mtp(tree=DynamicTree(12, width=3, depth=3)), {}, FP32),
    "Medusa, likeliest nodes": (medusa, {}, FP32),
}


def check(name, device, folder, monkeypatch):
    """Compare texts, acceptance and keys of captured and uncaptured rounds."""
    build, sampling, dtype = CASES[name]
    target = synthetic("tiny", dtype, torch.device(device))
    text = prompts(2, COLUMNS + TOKENS, target.config.vocab_size, target.device)
    inputs = {"input_ids": text[:, :COLUMNS], "attention_mask": torch.ones_like(text[:, :COLUMNS])}
    inputs["attention_mask"][0, :PADDING] = 0
    inputs |= {"do_sample": False, "max_new_tokens": TOKENS, **sampling}
    drafter, options = build(target, folder), {"seed": 3, "rule": "coupled"} if sampling else {}
    caches, take = [], TreeRunner.take_cache

    def recording(runner, *args):
        take(runner, *args)
        caches.append(runner.cache)  # of the target, then of the draft

    def kept_keys():
        """Of the last layer, in columns of the text that every round has left behind."""
        return caches[-1].layers[-1].keys[:, :, PADDING : COLUMNS + TOKENS - 8].clone()

    monkeypatch.setattr(TreeRunner, "take_cache", recording)
    eager, wanted = speculative(target, drafter, inputs, cuda_graphs=False, **options)
    assert sampling or torch.equal(eager, text)
    assert 2 < wanted.acceptance_length < 3.9
    keys = kept_keys()
    custom = sdt.SpeculativeGenerate(drafter=drafter, cuda_graphs=True, **options)
    for call in range(2):  # the second replays the graphs of the first
        assert torch.equal(target.generate(**inputs, custom_generate=custom), eager)
        found = sdt.stats(target)
        assert found.why_eager is None and found.replayed > 0 and bool(found.reused) == bool(call)
        # the last drafts are cut in uncaptured rounds alone, and captured rounds are reported late
        assert abs(found.rounds - wanted.rounds) <= 1
        if dtype == FP32:
            torch.testing.assert_close(kept_keys(), keys, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [name for name, (_, _, dtype) in CASES.items() if dtype == FP32])
def test_with_simulated_graphs(name, tmp_path, monkeypatch):
    capture_here(monkeypatch, 1)
    check(name, "cpu", tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("name", CASES)
def test_with_cuda_graphs(name, tmp_path, monkeypatch):
    check(name, "cuda", tmp_path, monkeypatch)
