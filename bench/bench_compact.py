"""The steps after acceptance: KV compaction, which moves the accepted slots, keys and values, of all layers into place;
and append, which adds the accepted tokens to the text and writes the report.

    python bench/bench_compact.py [--rehearse]

Providers: the Triton kernel; the reference; and eager PyTorch, with index_select and index_copy_ on each layer's keys
and values (the host has the paths beforehand; a decoding loop would have to wait for them). The floor is one read and
one write of the bytes that must move: nodes already in place are not counted. Sequences have enough slots that the
rounds in rotation use different ones. Append is limited by latency; its goal is a single launch.
"""

import functools
import sys

import torch
from _common import COLD_BYTES, Bench, Provider

from specdec_triton import ops
from specdec_triton.tree import DraftTree, Topology

# layers, elements a slot: Llama 3.1 8B (8 KV heads of 128), a 1B, and a model of mixed layers
MODELS = {"8B": [1024] * 64, "1B": [512] * 32, "mixed": ([1024] * 2 + [512, 640]) * 12}
SMALL = {"tiny": [64] * 4, "odd": [6, 10, 15]}
WIDTHS = MODELS | SMALL
PATHS = {"spread": (3, 9, 17, 30), "first child, then spread": (1, 2, 11, 29), "long": tuple(range(2, 34, 2))}
NODES = 34  # slots a round uses
COLUMNS = 2**19  # of the text that append writes to: more than it fills while it is timed
ACCEPTED = 3


def make_sets(widths: list[int], batch: int, nodes: tuple[int, ...], rounds: int, device: torch.device) -> list[dict]:
    slots = rounds * NODES
    storage = torch.randn(batch * slots * sum(widths), device=device, dtype=torch.bfloat16)
    path = torch.tensor([[*nodes, -1]], dtype=torch.int32, device=device).expand(batch, -1).contiguous()
    layers, first = [], 0
    for width in widths:
        layers.append(storage[first : first + batch * slots * width].view(batch, slots, width))
        first += layers[-1].numel()
    return [
        {
            "storage": storage,
            "widths": widths,
            "base": torch.full((batch,), NODES * number, device=device),
            "path": path,
            "layers": layers,
            "source": torch.tensor(nodes, device=device) + NODES * number,
            "target": torch.arange(1, 1 + len(nodes), device=device) + NODES * number,
        }
        for number in range(rounds)
    ]


def compact(inputs: dict, impl: str) -> None:
    ops.compact_kv(inputs["storage"], inputs["widths"], inputs["base"], inputs["path"], impl=impl)


def compact_eager(inputs: dict) -> None:
    for layer in inputs["layers"]:
        layer.index_copy_(1, inputs["target"], layer.index_select(1, inputs["source"]))


def make_append_sets(batch: int, nodes: int, device: torch.device) -> list[dict]:
    """Inputs of append. Each call changes them; later calls continue the text."""
    topology = Topology.from_budget(nodes)
    path = [-1] * topology.max_depth
    path[:ACCEPTED] = range(1, ACCEPTED + 1)
    accepted = ops.Acceptance(
        path=torch.tensor([path], dtype=torch.int32, device=device).repeat(batch, 1),
        length=torch.full((batch,), ACCEPTED, device=device),
        next_ids=torch.full((batch,), 7, device=device),
        has_nan=torch.zeros(batch, dtype=torch.bool, device=device),
    )
    tree = DraftTree.from_topology(topology, torch.randint(9, 99, (batch, nodes), device=device))
    return [
        {
            "text": torch.zeros(batch, COLUMNS, dtype=torch.int64, device=device),
            **{name: torch.zeros(batch, dtype=torch.int64, device=device) for name in ("length", "position")},
            "budget": torch.full((batch,), COLUMNS - 1, device=device),
            "tokens": tree.tokens,
            "parents": tree.parents,
            "accepted": accepted,
            "eos_ids": torch.tensor([2, 3], device=device),
        }
        for _ in range(4)
    ]


def append(inputs: dict, impl: str) -> torch.Tensor:
    return ops.append_tokens(**inputs, impl=impl)


def measure_append(bench: Bench, batch: int, nodes: int) -> None:
    sets = make_append_sets(batch, nodes, bench.device)

    def verify(call):
        got, want = ({name: copied(value) for name, value in sets[0].items()} for _ in range(2))
        reports = call(got), append(want, "reference")
        assert torch.equal(*reports), "the report differs from the reference's"
        for name in ("text", "length", "position", "budget"):
            assert torch.equal(got[name], want[name]), f"{name} differs from the reference's"

    depth = sets[0]["accepted"].path.shape[1]
    shapes = {"op": "append_tokens", "B": batch, "N": nodes, "D": depth}
    nbytes = batch * (4 * nodes + 8 * (2 * depth + 6) + 8 * (ACCEPTED + 1))
    for impl in ("triton", "reference"):
        provider = Provider(impl, functools.partial(append, impl=impl), kernel=impl == "triton")
        bench.measure(provider, shapes, "int64", sets, verify, nbytes=nbytes, count=provider.kernel)


def copied(value: torch.Tensor | ops.Acceptance) -> torch.Tensor | ops.Acceptance:
    return value.clone() if isinstance(value, torch.Tensor) else value


def measure(bench: Bench, case: tuple) -> None:
    if case[0] == "append":
        return measure_append(bench, *case[1:])
    model, batch, kind = case
    widths, nodes = WIDTHS[model], PATHS[kind]
    moved = sum(node != place for place, node in enumerate(nodes, start=1))
    nbytes = 2 * moved * batch * sum(widths) * torch.bfloat16.itemsize
    # as few rounds as keep the caches cold, and no more than a few GB of storage
    slot_bytes = batch * sum(widths) * torch.bfloat16.itemsize
    rounds = max(2, min(bench.num_sets(nbytes), int(20 * COLD_BYTES / (NODES * slot_bytes))))
    sets = make_sets(widths, batch, nodes, rounds, bench.device)

    def verify(call):
        storage, before = sets[0]["storage"], sets[0]["storage"].clone()
        call(sets[1])
        got = storage.clone()
        storage.copy_(before)
        compact(sets[1], "reference")
        assert torch.equal(got.view(torch.int16), storage.view(torch.int16)), "storage differs from the reference's"

    shapes = {"model": model, "B": batch, "P": len(widths), "D": len(nodes) + 1, "path": kind}
    for provider in (
        Provider("triton", lambda inputs: compact(inputs, "triton"), kernel=True),
        Provider("reference", lambda inputs: compact(inputs, "reference")),
        Provider("eager, a layer at a time", compact_eager),
    ):
        bench.measure(provider, shapes, "bf16", sets, verify, nbytes=nbytes, count=provider.kernel and batch == 1)


def main() -> int:
    bench = Bench("compact", __doc__)
    torch.manual_seed(0)
    full, small = (
        [(model, batch, kind) for model in models for batch in batches for kind in PATHS]
        for models, batches in ((MODELS, (1, 16)), (SMALL, (1, 2)))
    )
    full[1:1], small = [("append", 1, 64), ("append", 16, 8)], [*small, ("append", 1, 16)]
    return bench.run(measure, full, small, [*small[:-1:3], small[-1]])


if __name__ == "__main__":
    sys.exit(main())
