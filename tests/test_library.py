"""The kernels as registered ops: their behaviour under torch.compile, torch.export and graph capture."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from specdec_triton import ops
from specdec_triton.ops.filters import Filters
from specdec_triton.tree import DraftTree, Topology

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NODES = Topology.from_widths((2, 2))


def attention_inputs(batch=2, dtype=torch.float32):
    tree = DraftTree.from_topology(NODES, torch.zeros(batch, NODES.num_nodes, dtype=torch.int64, device=DEVICE))
    start = torch.arange(batch, device=DEVICE)
    packed = tree.pack(start, start + 5)
    query = torch.randn(batch, 4, NODES.num_nodes, 16, device=DEVICE, dtype=dtype)
    key, value = torch.randn(2, batch, 2, 32, 16, device=DEVICE, dtype=dtype)
    return query, key, value, packed


def tree_inputs(batch=2):
    tree = DraftTree.from_topology(NODES, torch.zeros(batch, NODES.num_nodes, dtype=torch.int64, device=DEVICE))
    start = torch.arange(batch, device=DEVICE)
    return tree.depth, tree.ancestors, start, start + 5, start + 6, torch.stack([start, start * 0 + 1])


def acceptance_inputs(batch=2, vocab=70):
    tokens = torch.randint(0, 3, (batch, NODES.num_nodes), device=DEVICE)
    tree = DraftTree.from_topology(NODES, tokens)
    logits = torch.randint(0, 4, (batch, NODES.num_nodes, vocab), device=DEVICE).float()
    return logits, tree.tokens, tree.parents


def sampling_inputs(batch=2, vocab=70):
    logits, tokens, parents = acceptance_inputs(batch, vocab)
    draft_logits = torch.randn(batch, 2, vocab, device=DEVICE)
    draft_row = torch.tensor([0, 1, -1, -1, -1, -1, -1], device=DEVICE).int().expand(batch, -1)
    return logits, tokens, parents, torch.arange(batch, device=DEVICE), draft_logits, draft_row


def compaction_inputs(batch=2):
    storage = torch.randn(batch * 20 * 12, device=DEVICE)
    return storage, torch.full((batch,), 3, device=DEVICE), torch.tensor([[2, 4, -1]] * batch, device=DEVICE).int()


def append_inputs(batch=2):
    _, tokens, parents = acceptance_inputs(batch)
    text = torch.arange(batch * 20, device=DEVICE).view(batch, 20)
    length, position = torch.arange(2, 2 + batch, device=DEVICE), torch.arange(batch, device=DEVICE)
    budget, path = torch.full((batch,), 3, device=DEVICE), torch.tensor([[1, 4, -1]] * batch, device=DEVICE).int()
    return text, length, position, budget, tokens, parents, path


def lookup_inputs(batch=2):
    tokens = torch.arange(12, device=DEVICE).repeat(batch, 2) % 5
    start = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    state = torch.ones(batch, 3, device=DEVICE), torch.ones(batch, 3, dtype=torch.int64, device=DEVICE)
    return tokens, start, start + 20, *state


def build_inputs(batch=2):
    parents = torch.tensor([[-1, 0, 0, 0, 1, 1, 2, 5, 5]] * batch, device=DEVICE)
    scores = -torch.arange(9 * batch, device=DEVICE).view(batch, 9) / 4
    return torch.arange(9 * batch, device=DEVICE).view(batch, 9), parents, scores


def best_first_inputs(batch=2):
    candidates = torch.arange(12 * batch, device=DEVICE).view(batch, 3, 4)
    return candidates[:, 0, 0] + 50, candidates, -candidates.float() / 7


def rotary_inputs(batch=2):
    query, key, value = torch.randn(batch, 3, 8, 16, device=DEVICE).split([4, 2, 2], 2)
    cos, sin = torch.randn(2, batch, 3, 16, device=DEVICE)
    keys, values = (torch.randn(batch, 9, 2, 16, device=DEVICE).transpose(1, 2) for _ in range(2))
    return query, key, value, cos, sin, keys, values, torch.arange(3, device=DEVICE).expand(batch, -1) * 4


def norm_inputs(batch=2):
    hidden, residual = torch.randn(2, batch, 3, 40, device=DEVICE)
    return hidden, residual, *torch.randn(2, 40, device=DEVICE)


def gate_inputs(batch=2):
    return torch.randn(batch, 3, 80, device=DEVICE).chunk(2, -1)


def attention(query, key, value, packed, impl="triton"):
    return ops.tree_attention(query, key, value, packed, sliding_window=4, impl=impl)


def inputs_of_tree(*inputs, impl="triton"):
    return ops.tree_inputs(*inputs, num_rows=4, impl=impl)


def draft_inputs(batch=2, vocab=70):
    seeds = torch.arange(batch, device=DEVICE)
    return torch.randn(batch, 3, vocab, device=DEVICE), seeds, torch.arange(3, device=DEVICE)


def acceptance(logits, tokens, parents, impl="triton"):
    budget = torch.full_like(tokens[:, 0], 2)
    return ops.accept_greedy(logits, tokens, parents, max_depth=2, budget=budget, eos_ids=budget[:1], impl=impl)


def drafting(logits, seeds, nodes, impl="triton"):
    filters = Filters(temperature=torch.full_like(seeds, 0.7, dtype=torch.float32))
    options = {"noise": "draft", "seeds": seeds, "position": seeds + 7, "nodes": nodes, "with_log_probs": True}
    return ops.draft_topk(logits, 4, filters=filters, **options, impl=impl)


def sampling(logits, tokens, parents, seeds, draft_logits, draft_row, impl="triton"):
    return ops.accept_sample(
        logits,
        tokens,
        parents,
        rule="multi_round",
        seeds=seeds,
        position=seeds + 7,
        filters=Filters(temperature=torch.full_like(seeds, 0.7, dtype=torch.float32)),
        max_depth=2,
        eos_ids=seeds[:1],
        sampling="with",
        draft_logits=draft_logits,
        draft_row=draft_row,
        impl=impl,
    )


def compaction(storage, base, path, impl="triton"):
    ops.compact_kv(storage, [8, 4], base, path, impl=impl)
    return storage * 2


def append(text, length, position, budget, tokens, parents, path, impl="triton"):
    accepted = ops.Acceptance(path, (path >= 0).sum(1), tokens[:, 0], tokens[:, 0] > 1)
    options = {"eos_ids": tokens[0, :2], "draft_nan": budget < 0, "impl": impl}
    report = ops.append_tokens(text, length, position, budget, tokens, parents, accepted, **options)
    return report, text + 1, length * 2, position * 2, budget * 2


def lookup(tokens, start, length, estimates, last_draft, impl="triton"):
    shape = {"num_nodes": 6, "max_depth": 4}
    return ops.ngram_lookup(tokens, start, length, estimates, last_draft, **shape, threshold=0.5, impl=impl)


def building(tokens, parents, scores, impl="triton"):
    return ops.build_tree(tokens, parents, scores, num_nodes=6, max_depth=3, impl=impl)


def best_first(root, candidates, log_probs, impl="triton"):
    return ops.best_first_tree(root, candidates, log_probs, num_nodes=9, impl=impl)


def rotary(query, key, value, cos, sin, keys, values, slots, impl="triton"):
    norms = {"query_norm": cos[0, 0], "key_norm": sin[0, 0], "eps": 1e-6}
    rotated = ops.rotary_and_cache(query, key, value, cos, sin, keys, values, slots, **norms, impl=impl)
    return rotated, keys + 1, values * 2


def norm(hidden, residual, weight, update_weight, impl="triton"):
    options = {"eps": 1e-6, "style": "one_plus", "multiplier": 0.5}
    return ops.rms_norm(hidden, weight, residual=residual, update_weight=update_weight, **options, impl=impl)


def gated(gate, up, impl="triton"):
    return ops.gated_activation(gate, up, activation="gelu_tanh", impl=impl)


CALLS = {
    "tree_inputs": (inputs_of_tree, tree_inputs),
    "tree_attention": (attention, attention_inputs),
    "draft_topk": (drafting, draft_inputs),
    "build_tree": (building, build_inputs),
    "best_first_tree": (best_first, best_first_inputs),
    "accept_greedy": (acceptance, acceptance_inputs),
    "accept_sample": (sampling, sampling_inputs),
    "compact_kv": (compaction, compaction_inputs),
    "append_tokens": (append, append_inputs),
    "ngram_lookup": (lookup, lookup_inputs),
    "rotary_and_cache": (rotary, rotary_inputs),
    "rms_norm": (norm, norm_inputs),
    "gated_activation": (gated, gate_inputs),
}


def operator(op):
    return getattr(torch.ops.specdec_triton, op).default


def arguments(op):
    if op == "tree_inputs":
        return *tree_inputs(), 4
    if op == "tree_attention":
        return (*attention_inputs(), 0.25, 4, None, 2.0, torch.randn(4, device=DEVICE))
    if op == "draft_topk":
        logits, seeds, nodes = draft_inputs()
        filters = [torch.full((2,), 0.7, device=DEVICE), torch.full((2,), 9, device=DEVICE), None, None]
        return logits, 3, filters, "draft", seeds, seeds + 7, 0, None, nodes, None, True, True
    if op == "accept_greedy":
        return (*acceptance_inputs(), 2, torch.tensor([3, 0], device=DEVICE), None)
    if op == "accept_sample":
        logits, tokens, parents, seeds, draft_logits, draft_row = sampling_inputs()
        filters = [torch.full((2,), 0.7, device=DEVICE), torch.full((2,), 9, device=DEVICE), None, None]
        budget = torch.full_like(seeds, 3)
        return (
            logits, tokens, parents, "multi_round", seeds, seeds + 7, filters, 2, budget, None,
            "without", draft_logits, draft_row, [None] * 4,
        )  # fmt: skip
    if op == "append_tokens":
        inputs = append_inputs()
        next_ids = torch.tensor([5, 6], device=DEVICE)
        return *inputs, torch.full_like(next_ids, 2), next_ids, next_ids > 5, next_ids[:1], None
    if op == "ngram_lookup":
        return (*lookup_inputs(), 6, 4, 0.8, 0.75, 0.2, 0.02)
    if op == "build_tree":
        return (*build_inputs(), 6, 3)
    if op == "best_first_tree":
        return (*best_first_inputs(), 9)
    if op == "rotary_and_cache":
        inputs = rotary_inputs()
        return *inputs, True, None, inputs[3][0, 0], 1e-6, "cast_last"
    if op == "rms_norm":
        hidden, residual, weight, update_weight = norm_inputs()
        return hidden, weight, 1e-6, "cast_last", residual, 0.5, update_weight
    if op == "gated_activation":
        return *gate_inputs(), "silu"
    storage, base, path = compaction_inputs()
    return storage, [8, 4], base, path


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op):
    torch.library.opcheck(operator(op), arguments(op))


@pytest.mark.parametrize("op", CALLS)
def test_the_fake_outputs_are_like_the_real_ones(op):
    from torch._subclasses import FakeTensorMode

    given = arguments(op)
    real = operator(op)(*given)
    with FakeTensorMode() as mode:
        fake = operator(op)(*tree_map_only(torch.Tensor, mode.from_tensor, given))
    assert (real is None) == (fake is None)
    for one, other in zip(_tensors(real), _tensors(fake), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def _tensors(outputs):
    return [outputs] if torch.is_tensor(outputs) else outputs or ()


@pytest.mark.parametrize("op", CALLS)
def test_impl_triton_is_one_registered_op_and_impl_reference_none(op):
    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    call, inputs = CALLS[op]
    given = inputs()
    for impl, wanted in (("triton", 1), ("reference", 0)):
        with Record() as record:
            call(*given, impl=impl)
        assert sum(func is operator(op) for func in record.seen) == wanted
        assert sum(func.namespace == "specdec_triton" for func in record.seen) == wanted


@pytest.mark.parametrize(
    ("op", "dynamic"),
    [
        pytest.param(op, dynamic, marks=[] if dynamic == place % 2 else pytest.mark.slow)
        for place, op in enumerate(CALLS)
        for dynamic in (False, True)
    ],
)
def test_torch_compile_takes_it_whole(op, dynamic):
    torch._dynamo.reset()
    call, inputs = CALLS[op]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        given = inputs(batch)
        wanted = call(*(tensor.clone() for tensor in given), impl="reference")
        got = compiled(*given)
        assert type(got) is type(wanted)
        for one, other in zip(_tensors(got), _tensors(wanted), strict=True):
            torch.testing.assert_close(one, other)


def test_compiled_compaction_changes_the_storage_in_place():
    torch._dynamo.reset()
    storage, base, path = compaction_inputs()
    wanted = storage.clone()
    compaction(wanted, base, path, impl="reference")
    torch.compile(compaction, fullgraph=True, backend="aot_eager")(storage, base, path)
    assert torch.equal(storage, wanted)


def test_a_compiled_rotation_changes_the_cache_in_place():
    torch._dynamo.reset()
    given = rotary_inputs()
    *others, keys, values, slots = given
    wanted = [plane.clone() for plane in (keys, values)]
    rotary(*others, *wanted, slots, impl="reference")
    torch.compile(rotary, fullgraph=True, backend="aot_eager")(*given)
    for plane, want in zip((keys, values), wanted, strict=True):
        torch.testing.assert_close(plane, want)


def test_a_traced_graph_holds_the_op():
    traced = make_fx(lambda *inputs: acceptance(*inputs), tracing_mode="symbolic")(*acceptance_inputs())
    called = [node.target for node in traced.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert [op for op in called if op.namespace == "specdec_triton"] == [operator("accept_greedy")]


@pytest.mark.gpu
@pytest.mark.first_gpu
@pytest.mark.parametrize("op", CALLS)
def test_inductor_and_cuda_graphs(op):
    from torch._inductor import config

    torch._dynamo.reset()
    call, inputs = CALLS[op]
    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    with config.patch(compile_threads=1):  # no pool of compiler processes next to each of pytest's
        for _ in range(4):
            given = inputs()
            wanted = call(*(tensor.clone() for tensor in given), impl="reference")
            for one, other in zip(_tensors(compiled(*given)), _tensors(wanted), strict=True):
                torch.testing.assert_close(one, other)
