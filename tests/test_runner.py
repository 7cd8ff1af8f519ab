"""The verify forward: its host reads, its masks, its compilation, and the logits of every node."""

import gc
import weakref

import pytest
import torch

import specdec_triton as sdt
from families import FAMILIES, FEW, NEVER, VOCAB, build, perturbed, prompt
from helpers import TREES, compiled_graphs, oracle, prefilled, speculative
from specdec_triton.engine import graph_runner
from specdec_triton.forward import attention, runner
from specdec_triton.ops import reference
from specdec_triton.tools.host_sync import count_host_reads
from specdec_triton.tree import DraftTree


def reads_a_round(model, generate):
    """Host reads per round of the engine, or per token of plain decoding, measured by a longer output."""

    def run(tokens):
        with count_host_reads() as reads:
            generate(max_new_tokens=tokens)
        return reads.total, sdt.stats(model).rounds

    generate(max_new_tokens=4)  # creates everything that is created only once
    (few, first), (many, last) = run(8), run(20)
    assert last > first
    return (many - few) / (last - first)


@pytest.mark.parametrize(
    ("layers", "batch"),
    [(3, 4), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((1, 1), (2, 8), (6, 8), (16, 1), (16, 8)))],
)
def test_the_host_reads_once_a_round(layers, batch):
    model = build("llama", num_hidden_layers=layers)
    inputs = {**prompt(batch=batch), "do_sample": False, "eos_token_id": NEVER}
    text = model.generate(**inputs, max_new_tokens=20)
    draft = perturbed("llama", num_hidden_layers=layers)
    drafters = {
        "oracle": oracle(text, tree=TREES["wide"]),
        "lookup": sdt.PromptLookupDrafter(branches=2),
        "model": sdt.ModelDrafter(draft, tree=TREES["wide"]),
        "dynamic": sdt.ModelDrafter(draft, tree=sdt.DynamicTree(8, 3, 3)),
        "auto": sdt.ModelDrafter(draft),
    }
    for name, drafter in drafters.items():
        with sdt.patched(model, drafter=drafter, tree="auto" if name == "auto" else None):
            assert reads_a_round(model, lambda **more: model.generate(**inputs, **more)) <= 1, name


@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma3", 2), ("llama4", 2)])
def test_the_reference_builds_each_mask_once_in_a_forward(family, kinds, monkeypatch):
    """There is one mask for each window or chunk size, however many layers share it. It ends with the forward."""
    model, inputs = build(family, num_hidden_layers=4), prompt()
    target, masks, build_mask = prefilled(model, inputs), [], reference.visible_slots
    tokens = torch.randint(0, VOCAB, (2, 6))

    def watched(*arguments):
        mask = build_mask(*arguments)
        masks.append((weakref.ref(mask), arguments[3:]))
        return mask

    length = torch.full((2,), inputs["input_ids"].shape[1])
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(attention, "share_masks", lambda: None)
        wanted = [target.forward_chain(tokens, base) for base in (length, length + 1)]
    monkeypatch.setattr(reference, "visible_slots", watched)
    with torch.no_grad():
        for base, logits in zip((length, length + 1), wanted, strict=True):
            masks.clear()
            assert torch.equal(target.forward_chain(tokens, base), logits)
            assert len(masks) == len({limits for _, limits in masks}) == kinds
    gc.collect()
    assert not any(mask() is not None for mask, _ in masks)


def test_the_counter_counts():
    tensor = torch.tensor([1.0, 2.0])
    with count_host_reads() as reads:
        tensor.sum().item(), tensor.tolist(), bool(tensor[0] > 0), tensor.nonzero(), tensor[tensor > 1], int(tensor[0])
    assert reads.total == 6
    with count_host_reads() as reads:
        torch.where(tensor > 1, tensor, 0.0).gather(0, torch.tensor([0]))
    assert reads.total == 0


@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "qwen3", "mistral"))]
)
def test_the_verify_forward_is_one_graph_and_is_not_compiled_again(family):
    model = build(family, num_hidden_layers=2)
    runner = prefilled(model, prompt(length=9))
    with torch.no_grad():
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


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that models are compiled to under `compile=True`. Shapes are as on a GPU: the model sees all slots."""
    monkeypatch.setitem(graph_runner.LAG, "cpu", 1)
    yield from compiled_graphs(monkeypatch)


@pytest.mark.parametrize("family", ["llama", pytest.param("llama4", marks=pytest.mark.slow)])
def test_one_compilation_serves_all_numbers_of_nodes_and_slots(graphs, family):
    """Forwards over one node have up to two compilations of their own: over a root, and over a node below others."""
    model = build(family, num_hidden_layers=1, max_position_embeddings=1024)
    draft = perturbed(family, 0.1, num_hidden_layers=1, max_position_embeddings=1024)
    capacities = set()

    def decode(length, make, **options):
        inputs = {**prompt(length=length), "do_sample": False, "max_new_tokens": 20, "eos_token_id": NEVER}
        plain = model.generate(**inputs)
        text, stats = speculative(model, make(plain), inputs, compile=True, **options)
        assert torch.equal(text, plain) and stats.rounds > 5
        capacities.add(-(-(length + 20) // 128))

    for length, tree in ((9, 5), (9, 12), (9, 80), (150, 6), (300, TREES["wide"])):
        decode(length, lambda plain, tree=tree: oracle(plain, tree=tree))
    assert len(graphs) == 1 and len(capacities) == 3
    if family != "llama":
        return
    for nodes in (6, 9):
        decode(9, lambda plain, nodes=nodes: sdt.ModelDrafter(draft, tree=sdt.DynamicTree(nodes, 3, 3)))
    decode(150, lambda plain: sdt.ModelDrafter(draft, num_tokens=3))
    decode(9, lambda plain: sdt.ModelDrafter(draft), tree="auto")
    assert len(graphs) <= 3
    before = len(graphs)
    decode(300, oracle)
    decode(300, lambda plain: sdt.NoDrafter())
    assert len(graphs) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox"])
def test_every_node_gets_the_logits_of_its_own_path(family):
    """Compare with a plain forward over prompt and path, one node at a time."""
    model, inputs = build(family), prompt()
    start, length = [3, 0], torch.tensor([9, 9])
    tokens = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    tree = DraftTree.from_topology(TREES["skipping"], tokens)
    runner = prefilled(model, inputs)
    with torch.no_grad():
        logits = runner.forward(tree.tokens, tree.depth, tree.ancestors, length)
        for row in range(2):
            for node in range(7):
                path, at = [], node
                while at >= 0:
                    path.insert(0, int(tokens[row, at]))
                    at = TREES["skipping"].parents[at]
                text = torch.cat([inputs["input_ids"][row, start[row] :], torch.tensor(path)])[None]
                torch.testing.assert_close(logits[row, node], model(text).logits[0, -1], rtol=1e-3, atol=1e-3)
    assert model.config._attn_implementation in ("sdpa", "eager")


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
