"""Tree attention of one layer: N draft nodes over a prefix and their own ancestors.

    python bench/bench_tree_attention.py [--rehearse]

Providers: the Triton kernel; the reference; eager attention as in transformers; SDPA with the dense mask. With
--compiled: FlexAttention with a block mask, and FlashInfer's batch prefill with a custom mask, if it is installed.
Masks and plans are made outside the timed calls, which favours the peers. The floor is one read of the keys and values
of [start, length + N), or the tensor cores' time for both products, whichever is longer.
"""

import sys
from functools import partial

import torch
from _common import Bench, Provider, absent_unless_importable

from specdec_triton import ops
from specdec_triton.ops.reference import visible_slots
from specdec_triton.tools.roofline import attention_work
from specdec_triton.tree import DraftTree, Topology

# B, Hq, Hkv, D, context, N: Llama 3.1 8B's heads; then Gemma 2's head dim, plain multi-head attention, batches
LLAMA = (32, 8, 128)
NODES = (32, 64, 1, 16, 128)
CASES = [(1, *LLAMA, context, nodes) for nodes in NODES for context in (32768, 8192)]
CASES += [(1, *LLAMA, context, nodes) for context in (1024, 512, 2048) for nodes in NODES]
CASES += [(16, *LLAMA, 2048, 8), (64, *LLAMA, 2048, 4)]
CASES += [(1, 16, 8, 256, 8192, 32), (1, 32, 32, 128, 8192, 32), (1, 28, 4, 128, 8192, 32)]
SMALL = [(1, 4, 2, 64, context, nodes) for context in (256, 1024) for nodes in (1, 8, 16)]
REHEARSED = [(1, 4, 2, 16, 60, 5), (2, 4, 2, 16, 140, 3)]
# the only cases of providers that compile or plan for seconds
PEER_CASES = [case for case in CASES if case[:4] == (1, *LLAMA) and case[4] > 2048 and case[5] in (32, 64)]
# Up to 127 queries, Inductor has a kernel with split keys. By default its row tile has all rows of a KV head: 256 for
# N = 64. It must divide the block mask's 128 queries, or there is no choice to compile. The last option is the kernel
# without splits. The fastest one is timed.
FLEX_OPTIONS = ({"BLOCK_M": 64}, {"BLOCK_M": 128}, {"BLOCK_M": 64, "num_warps": 4}, {"FORCE_USE_FLEX_ATTENTION": True})
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float32: 1e-4}


def make_inputs(batch, query_heads, kv_heads, head_dim, context, nodes, dtype, device) -> dict:
    slots = context + nodes
    query, key, value = (
        torch.randn(batch, size, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for size, heads in ((nodes, query_heads), (slots, kv_heads), (slots, kv_heads))
    )
    tree = DraftTree.from_topology(
        Topology.from_budget(nodes), torch.zeros(batch, nodes, dtype=torch.int64, device=device)
    )
    length = torch.full((batch,), context, device=device)
    return {"query": query, "key": key, "value": value, "packed_tree": tree.pack(torch.zeros_like(length), length)}


def least_work(batch, query_heads, kv_heads, head_dim, context, nodes, dtype) -> dict[str, float]:
    """`nbytes` and `flops`."""
    return attention_work(batch, query_heads, kv_heads, head_dim, context, nodes, dtype.itemsize)._asdict()


def dtype_of(device: torch.device) -> tuple[str, torch.dtype]:
    """The dtype for a device: its name in rows, and the dtype."""
    return ("fp32", torch.float32) if device.type == "cpu" else ("bf16", torch.bfloat16)


def check_output(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raises AssertionError if they differ by more than the tolerance of `found`'s dtype."""
    difference = (found.float() - wanted.float()).abs().max().item()
    assert difference <= TOLERANCE[found.dtype], f"differs from the reference by {difference}"


def with_dense_mask(inputs: dict) -> dict:
    mask = visible_slots(inputs["packed_tree"], inputs["query"].shape[2], inputs["key"].shape[2])[:, None]
    bias = torch.zeros(mask.shape, dtype=inputs["query"].dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    return inputs | {"mask": mask, "bias": bias}


def ours(inputs: dict, impl: str) -> torch.Tensor:
    return ops.tree_attention(**{name: inputs[name] for name in ("query", "key", "value", "packed_tree")}, impl=impl)


def eager(inputs: dict) -> torch.Tensor:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + inputs["bias"]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def sdpa(inputs: dict) -> torch.Tensor:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, inputs["bias"], enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def flex_provider(device: torch.device, inputs: dict) -> Provider:
    """FlexAttention, compiled, with the fastest of `FLEX_OPTIONS`; all sets share one block mask, since their trees are
    the same."""
    if device.type != "cuda":
        return Provider("flex_attention", None, absent="is timed on a GPU only", compiles=True)
    import triton
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # else the eighth shape is the last that is compiled
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = inputs["mask"]
    batch, _, nodes, slots = mask.shape
    block_mask = create_block_mask(lambda b, h, q, k: mask[b, 0, q, k], batch, None, nodes, slots, device=device)

    def call(inputs: dict, options: dict) -> torch.Tensor:
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
        out = compiled(query, key, value, block_mask=block_mask, enable_gqa=True, kernel_options=options)
        return out.transpose(1, 2).contiguous()

    times = [triton.testing.do_bench(partial(call, inputs, options)) for options in FLEX_OPTIONS]
    fastest = FLEX_OPTIONS[times.index(min(times))]
    print(f"flex_attention: {fastest} is the fastest of " + ", ".join(f"{1e3 * time:.1f} us" for time in times))
    return Provider("flex_attention", partial(call, options=fastest), compiles=True)


def flashinfer_provider(device: torch.device, inputs: dict) -> Provider:
    """FlashInfer's ragged prefill, planned once: all sets have the same lengths and mask."""
    absent = absent_unless_importable("flashinfer-python", "flashinfer")
    if absent is None and device.type != "cuda":
        absent = "needs a GPU"
    if absent is not None:
        return Provider("flashinfer", None, absent=absent, compiles=True)
    import flashinfer

    batch, query_heads, nodes, head_dim = inputs["query"].shape
    kv_heads, slots = inputs["key"].shape[1:3]
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(128 * 2**20, dtype=torch.uint8, device=device), "NHD"
    )
    ends = torch.arange(batch + 1, dtype=torch.int32, device=device)
    wrapper.plan(
        ends * nodes, ends * slots, query_heads, kv_heads, head_dim, custom_mask=inputs["mask"].flatten(),
        q_data_type=inputs["query"].dtype,
    )  # fmt: skip

    def call(inputs: dict) -> torch.Tensor:
        query, key, value = (inputs[name].transpose(1, 2).flatten(0, 1) for name in ("query", "key", "value"))
        return wrapper.run(query, key, value).view(inputs["query"].transpose(1, 2).shape)

    return Provider("flashinfer", call, compiles=True)


PEERS = {"flex_attention": flex_provider, "flashinfer": flashinfer_provider}


def measure(bench: Bench, case: tuple[int, ...]) -> None:
    batch, query_heads, kv_heads, head_dim, context, nodes = case
    name, dtype = dtype_of(bench.device)
    work = least_work(*case, dtype)
    sets = [with_dense_mask(make_inputs(*case, dtype, bench.device)) for _ in range(bench.num_sets(work["nbytes"]))]

    def verify(call):
        for inputs in sets[:2]:
            check_output(call(inputs), ours(inputs, "reference"))

    ours_and_eager = [
        Provider("triton", lambda inputs: ours(inputs, "triton"), kernel=True),
        Provider("reference", lambda inputs: ours(inputs, "reference")),
        Provider("eager", eager),
        Provider("sdpa, dense mask", sdpa),
    ]
    peers = [bench.made(peer, partial(make, bench.device, sets[0])) for peer, make in PEERS.items() if bench.compiled]
    shapes = {"B": batch, "Hq": query_heads, "Hkv": kv_heads, "D": head_dim, "context": context, "N": nodes}
    for provider in peers or ours_and_eager:
        bench.measure(provider, shapes, name, sets, verify, **work, count=provider.kernel and context <= 1024)


def main() -> int:
    bench = Bench("tree_attention", __doc__)
    torch.manual_seed(0)
    if bench.compiled:
        return bench.run(measure, PEER_CASES, SMALL[:1], REHEARSED)
    return bench.run(measure, CASES, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
