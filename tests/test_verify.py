"""The verify forward and its promises: what the host reads, what compiles, what every node sees."""

import pytest
import torch

import specdec_triton as sdt
from families import FAMILIES, FEW, NEVER, VOCAB, build, prompt
from specdec_triton.forward import runner
from specdec_triton.forward.cache import BUCKET
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.tools.host_sync import count_host_reads
from specdec_triton.tree import DraftTree
from test_generate import TREES, oracle


def arguments(inputs):
    """What `generate` prepares for a prefill."""
    mask = inputs["attention_mask"]
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def reads_a_round(model, inputs, generate):
    """Host reads that a longer output adds, a round of ours or a token of plain decoding."""

    def run(tokens):
        with count_host_reads() as reads:
            generate(max_new_tokens=tokens)
        return reads.total, sdt.stats(model).rounds

    generate(max_new_tokens=4)  # what is made once, is made
    (few, first), (many, last) = run(8), run(24)
    return (many - few) / (last - first)


@pytest.mark.parametrize(
    ("layers", "batch"),
    [(3, 4), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((1, 1), (2, 8), (6, 8), (16, 1), (16, 8)))],
)
def test_the_host_reads_once_a_round(layers, batch):
    model = build("llama", num_hidden_layers=layers)
    inputs = {**prompt(batch=batch), "do_sample": False, "eos_token_id": NEVER}
    text = model.generate(**inputs, max_new_tokens=40)
    drafters = {
        "oracle": oracle(text, tree=TREES["wide"]),
        "lookup": sdt.PromptLookupDrafter(branches=2),
        "model": sdt.ModelDrafter(build("llama", seed=1), tree=TREES["wide"]),
        "dynamic": sdt.ModelDrafter(build("llama", seed=1), tree=sdt.DynamicTree(8, 3, 3)),
        "auto": sdt.ModelDrafter(build("llama", seed=1)),
    }
    for name, drafter in drafters.items():
        with sdt.patched(model, drafter=drafter, tree="auto" if name == "auto" else None):
            assert reads_a_round(model, inputs, lambda **more: model.generate(**inputs, **more)) <= 1, name


def test_the_counter_counts():
    tensor = torch.tensor([1.0, 2.0])
    with count_host_reads() as reads:
        tensor.sum().item(), tensor.tolist(), bool(tensor[0] > 0), tensor.nonzero(), tensor[tensor > 1], int(tensor[0])
    assert reads.total == 6
    with count_host_reads() as reads:
        torch.where(tensor > 1, tensor, 0.0).gather(0, torch.tensor([0]))
    assert reads.total == 0


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3", "mistral"))]
)
def test_the_verify_forward_is_one_graph_and_is_not_compiled_again(family):
    model = build(family, num_hidden_layers=2)
    inputs = prompt(length=9)
    start = torch.tensor([3, 0])
    runner = TreeRunner(model, start, last_position=255)
    with torch.no_grad():
        config = model.generation_config
        runner.prefill(inputs["input_ids"], config, arguments(inputs), capacity=100)
        torch._dynamo.reset()
        graphs = []

        def backend(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        eager, model.forward = model.forward, torch.compile(model.forward, fullgraph=True, backend=backend)
        try:
            length, generator = torch.tensor([9, 9]), torch.Generator().manual_seed(0)
            for _ in range(8):
                tokens = torch.randint(3, VOCAB, (2, 10), generator=generator)
                tree = DraftTree.from_topology(TREES["wide"].limited(2), tokens)
                compiled = runner.forward(tree.tokens, tree.depth, tree.ancestors, length)
                fast, model.forward = model.forward, eager
                plain = runner.forward(tree.tokens, tree.depth, tree.ancestors, length)
                model.forward = fast
                torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
                length = length + torch.randint(1, 4, (2,), generator=generator)
        finally:
            del model.forward
    assert len(graphs) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox"])
def test_every_node_gets_the_logits_of_its_own_path(family):
    """Against a plain forward over prompt and path, one node at a time."""
    model, inputs = build(family), prompt()
    start, length = torch.tensor([3, 0]), torch.tensor([9, 9])
    tokens = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    tree = DraftTree.from_topology(TREES["skipping"], tokens)
    runner = TreeRunner(model, start, last_position=255)
    with torch.no_grad():
        runner.prefill(inputs["input_ids"], model.generation_config, arguments(inputs), 100)
        logits = runner.forward(tree.tokens, tree.depth, tree.ancestors, length)
        for row in range(2):
            for node in range(7):
                path, at = [], node
                while at >= 0:
                    path.insert(0, int(tokens[row, at]))
                    at = TREES["skipping"].parents[at]
                text = torch.cat([inputs["input_ids"][row, int(start[row]) :], torch.tensor(path)])[None]
                torch.testing.assert_close(logits[row, node], model(text).logits[0, -1], rtol=1e-3, atol=1e-3)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_the_cache_grows_and_keeps_its_contents():
    model, inputs = build("llama"), prompt()
    runner = TreeRunner(model, torch.tensor([3, 0]), last_position=255)
    with torch.no_grad():
        runner.prefill(inputs["input_ids"], model.generation_config, arguments(inputs), 9)
    cache = runner.cache
    assert cache.capacity == cache.slots == BUCKET
    address, before = cache.storage.data_ptr(), [layer.keys[:, :, :9].clone() for layer in cache.layers]
    cache.reserve(BUCKET)
    assert cache.storage.data_ptr() == address
    cache.reserve(BUCKET + 1)
    assert cache.capacity == cache.slots == 2 * BUCKET and cache.storage.data_ptr() != address
    cache.reserve(2 * BUCKET + 1)
    assert cache.slots == 3 * BUCKET
    for layer, keys in zip(cache.layers, before, strict=True):
        assert layer.keys.shape[2] == cache.slots
        assert torch.equal(layer.keys[:, :, :9], keys) and not layer.keys[:, :, 9:].any()
    dynamic = cache.to_dynamic(7)
    assert dynamic.get_seq_length() == 7 and torch.equal(dynamic.layers[1].keys, before[1][:, :, :7])


def test_a_cache_that_dropped_its_history_is_refused():
    from transformers import DynamicCache

    short = DynamicCache()
    short.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    short.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    with pytest.raises(ValueError, match="leave keys and values of its 3 columns in every layer, got 3, 5"):
        sdt.TreeCache.from_prefill(short, 10)


def test_dense_masks_are_refused_by_the_tree_attention():
    model = build("llama")
    with pytest.raises(ValueError, match="specdec_tree: attention_mask must be a packed tree.*got"):
        sdt.forward.attention.call_with_tree_attention(None, sdt.forward.attention.config_ids(model), model, **prompt())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "family", [*FEW, *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family not in FEW)]
)
def test_a_long_prompt_is_run_in_chunks(family, monkeypatch):
    model, inputs = build(family), {**prompt(batch=2, length=14), "do_sample": False, "max_new_tokens": 8}
    plain = model.generate(**inputs)
    widths = []
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 5)
    hook = model.register_forward_pre_hook(
        lambda module, args, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    with sdt.patched(model, drafter=sdt.ModelDrafter(build(family, seed=1), num_tokens=2)):
        text = model.generate(**inputs)
    hook.remove()
    assert torch.equal(text, plain) and widths[:3] == [5, 5, 4]
