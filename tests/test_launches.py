"""The kernels that a round launches, step by step. On a GPU, a launch takes about two microseconds even if it computes
almost nothing.

A launch that is added to a step fails these tests, which show its name.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import specdec_triton as sdt
from checkpoints import write_head
from dflash_checkpoints import DFLASH_LAYOUTS, write_dflash
from families import NEVER, VOCAB, build, perturbed, prompt
from helpers import HostDrafter, Launches, capture_here, launches_by_step
from specdec_triton import ops
from specdec_triton.drafters import timed
from specdec_triton.heads.checkpoint import Checkpoint
from specdec_triton.heads.medusa import MedusaHeads
from specdec_triton.tools.host_sync import count_host_reads

CHAIN, TREE = {"num_tokens": 5}, {"tree": 16}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0}
FILTERED = {**SAMPLED, "top_k": 9, "top_p": 0.9}
KEPT = {"return_dict_in_generate": True, "output_scores": True}
GREEDY, APPEND = ["_argmax_kernel", "_walk_kernel"], ["_append_tokens_kernel"]
COUPLED = ["noisy_statistics_kernel", "walk_kernel"]
WEIGHTED = ["statistics_kernel", "rows_kernel", "draws_kernel", "walk_kernel"]
OF_THE_PATH = ["clamp", "_to_copy", "constant_pad_nd", "gather"]  # scores that the call returns

# name -> options of the draft model, arguments of `generate`, rule, launches of acceptance and of compaction
CASES = {
    "greedy chain": (CHAIN, {}, None, GREEDY, []),
    "greedy tree": (TREE, {}, None, GREEDY, ["_compact_kv_kernel"]),
    "greedy chain, several EOS tokens": (CHAIN, {"eos_token_id": [5, NEVER]}, None, GREEDY, []),
    "greedy chain, scores returned": (CHAIN, KEPT, None, GREEDY + OF_THE_PATH, []),
    "coupled chain": (CHAIN, SAMPLED, "coupled", COUPLED, []),
    "coupled tree": (TREE, SAMPLED, "coupled", COUPLED, ["_compact_kv_kernel"]),
    "coupled chain, filtered": (CHAIN, FILTERED, "coupled", ["statistics_kernel", "rows_kernel", "walk_kernel"], []),
    "rejection chain": (CHAIN, SAMPLED, "rejection", WEIGHTED, []),
}


# launches of a layer, and of the rest of a forward, with the modules of transformers and with fused ones
LAYERS = {
    "llama": ((36, 16), (12, 11)),
    "qwen3": ((48, 16), (12, 11)),
    "gemma2": ((52, 21), (12, 15)),
    "gemma3": ((66, 25), (12, 19)),
    "phi3": ((35, 16), (9, 11)),
    "granite": ((38, 18), (12, 13)),
    "olmo2": ((48, 16), (14, 10)),
    "glm4": ((51, 16), (11, 11)),
}


def rounds_of(drafter, inputs, layers=1, family="llama", **options):
    model = build(family, num_hidden_layers=layers)
    inputs = {"do_sample": False, "eos_token_id": NEVER, "max_new_tokens": 15, **inputs}
    custom = sdt.SpeculativeGenerate(drafter=drafter, impl="triton", **options)
    return launches_by_step(lambda: model.generate(**inputs, custom_generate=custom))


@pytest.mark.parametrize(("name", "batch"), [(name, 1) for name in CASES] + [("greedy tree", 2), ("coupled chain", 2)])
def test_steps_after_the_target(name, batch, monkeypatch):
    capture_here(monkeypatch, 1)
    draft, arguments, rule, accept, compact = CASES[name]
    drafter = sdt.ModelDrafter(perturbed("llama", num_hidden_layers=1), **draft)
    options = {"rule": rule, "seed": 1} if rule else {}
    # the first round may compute tables that later rounds reuse
    _, steady, *_ = rounds_of(drafter, {**prompt(batch=batch), **arguments}, **options)
    found = {step: steady[step] for step in ("accept", "compact", "emit")}
    assert found == {"accept": accept, "compact": compact, "emit": APPEND}


@pytest.mark.parametrize(
    "family", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_layers_of_the_target(family, monkeypatch):
    capture_here(monkeypatch, 1)
    for fused, wanted in zip((False, True), LAYERS[family], strict=True):
        sizes = [
            len(rounds_of(sdt.NoDrafter(), prompt(), layers, family, fuse=fused)[1]["verify"]) for layers in (2, 3)
        ]
        each = sizes[1] - sizes[0]
        assert (each, sizes[0] - 2 * each) == wanted


def test_the_target_and_a_lookup(monkeypatch):
    """Of the 12 launches of a fused layer of a Llama, 7 are matrix products. A lookup takes 2 launches, plain decoding
    none but that of the root."""
    capture_here(monkeypatch, 1)
    steps = [rounds_of(drafter, prompt())[1] for drafter in (sdt.PromptLookupDrafter(), sdt.NoDrafter())]
    assert [len(found["draft"]) for found in steps] == [2, 1]
    assert steps[0]["verify"] == steps[1]["verify"]
    layer = steps[0]["verify"][-14:-2]
    assert layer.count("mm") == 7
    assert [name for name in layer if name != "mm"] == [
        "_rms_norm_kernel",
        "_rotary_and_cache_kernel",
        "_tree_attention_kernel",
        "_rms_norm_kernel",
        "_gated_activation_kernel",
    ]


# launches of a level of a dynamic draft, forward included, and of the rest of the draft
DYNAMIC = {"model": (35, 9), "head": (42, 18)}


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_drafts(name, monkeypatch, tmp_path):
    """A selection and all tensors of the tree take one launch."""
    capture_here(monkeypatch, 1)
    if name == "head":
        target = build("llama", num_hidden_layers=8)
        write_head(tmp_path, target, "safeailab")
        drafter = partial(sdt.EagleDrafter.from_pretrained, tmp_path, target)
    else:
        target = build("llama", num_hidden_layers=1)
        drafter = partial(sdt.ModelDrafter, perturbed("llama", num_hidden_layers=1))
    drafts = []
    for depth in (3, 4):
        layers = target.config.num_hidden_layers
        found = rounds_of(drafter(tree=sdt.DynamicTree(9, width=3, depth=depth)), prompt(), layers, fuse=True)[1]
        drafts.append(found["draft"])
        assert found["draft"].count("_build_tree_kernel") == 1
    each = len(drafts[1]) - len(drafts[0])
    assert (each, len(drafts[0]) - 3 * each) == DYNAMIC[name]


@pytest.mark.parametrize("rule", ["greedy", "coupled"])
def test_the_likeliest_nodes_of_medusas_heads(rule, monkeypatch):
    capture_here(monkeypatch, 1)
    tensors = {}
    for head in range(3):
        tensors[f"{head}.0.linear.weight"] = torch.eye(32)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(32)
        tensors[f"{head}.1.weight"] = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(head))
    heads = MedusaHeads.from_checkpoint(Checkpoint("the file", {}, tensors))
    arguments = {**prompt(), **(SAMPLED if rule == "coupled" else {})}
    found = rounds_of(sdt.MedusaDrafter(heads, tree=20), arguments, rule=rule)[1]["draft"]
    assert found.count("_best_first_tree_kernel") == 1 and len(found) == 10


def test_a_block_of_a_dflash_head(monkeypatch, tmp_path):
    """16 launches for each layer and 29 for the rest of the draft, and 2 for each token of a chain."""
    capture_here(monkeypatch, 1)
    target = build("llama", num_hidden_layers=8)
    for layers in (1, 2):
        layout = replace(DFLASH_LAYOUTS["z-lab"], num_layers=layers, causal=(False,) * layers)
        write_dflash(tmp_path, target, layout)
        for shape, more in (({"tree": 20}, 0), ({"num_tokens": 3}, 6)):
            drafter = sdt.DFlashDrafter.from_pretrained(tmp_path, target, **shape)
            draft = rounds_of(drafter, prompt(), target.config.num_hidden_layers, fuse=True)[1]["draft"]
            assert len(draft) == 29 + 16 * layers + more, draft


def test_steps_after_a_draft_of_the_host():
    text = prompt(batch=2, length=30)["input_ids"]
    for found in rounds_of(HostDrafter(text), prompt()):
        assert (found["accept"], found["compact"], found["emit"]) == (GREEDY, [], APPEND)


def test_copies_of_a_launcher_are_counted():
    tree = sdt.DraftTree.from_topology(sdt.Topology.chain(2), prompt(batch=2, length=3)["input_ids"])
    logits = build("llama", num_hidden_layers=1)(tree.tokens).logits.detach()
    for parents, copied in ((tree.parents, []), (tree.parents[:1].expand(2, -1), ["clone"])):
        launches = Launches()
        call = {"max_depth": 2, "budget": tree.tokens[:, 1].contiguous(), "impl": "triton"}
        launches.run(partial(ops.accept_greedy, logits, tree.tokens, parents, **call))
        assert launches.names == ["_argmax_kernel", *copied, "_walk_kernel"]


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch, views included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_round_without_a_draft_takes_no_more_operations_than_a_plain_step(batch, monkeypatch):
    """On a CPU, each operation takes microseconds, whatever it computes. A round runs the forward of plain `generate`,
    but a cache with its own memory takes fewer operations in each layer."""
    layers = 4
    model, texts = build("llama", num_hidden_layers=layers), prompt(batch=batch, padding=0)
    monkeypatch.setattr(timed, "FIRST_CHANCES", (0.0,) * len(timed.FIRST_CHANCES))  # lookups, but no drafts

    def a_token(**options):
        counts = []
        for tokens in (8, 20):
            with Operations() as operations, count_host_reads() as reads:
                model.generate(**texts, do_sample=False, eos_token_id=NEVER, max_new_tokens=tokens, **options)
            counts.append((operations.count, reads.total))
        (few, few_reads), (many, many_reads) = counts
        return (many - few) / 12, (many_reads - few_reads) / 12

    plain, _ = a_token()
    for drafter in (sdt.NoDrafter(), sdt.PromptLookupDrafter(), sdt.SuffixDrafter(history_tokens=0)):
        ours, reads = a_token(custom_generate=sdt.SpeculativeGenerate(drafter=drafter))
        assert sdt.stats(model).drafted == 0 and reads == 1
        assert ours <= plain + layers, type(drafter).__name__
