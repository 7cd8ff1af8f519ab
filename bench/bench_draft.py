"""The candidates of a draft level: from the draft's logits to the tokens of the next nodes.

    python bench/bench_draft.py [--rehearse]

Providers: the Triton kernels and the reference. The floor is one read of the logits. P expanded nodes have 1 (a chain)
or 4 candidates each. "greedy" ranks the logits; "coupled" and "draft" add noise after a temperature, or after all
filters.
"""

import sys

import torch
from _common import Bench, Provider

from specdec_triton import ops
from specdec_triton.ops.filters import Filters

KINDS = ("greedy", "coupled", "coupled filtered", "draft", "draft filtered")
# B, P, k, V, kind
CASES = [(1, parents, 1 if parents == 1 else 4, 128256, kind) for parents in (1, 4, 16) for kind in KINDS]
SMALL = [(1, parents, 2, 2048, kind) for parents in (1, 4) for kind in KINDS]
REHEARSED = [(1, 2, 2, 70, kind) for kind in KINDS]
DTYPE = torch.bfloat16


def make_inputs(batch: int, parents: int, k: int, vocab: int, kind: str, device: torch.device) -> dict:
    filters = Filters()
    if kind != "greedy":
        filters = Filters(torch.full((batch,), 0.8, device=device))
    if kind.endswith("filtered"):
        top_p = torch.full((batch,), 0.95, dtype=torch.float64, device=device)
        filters = filters._replace(top_k=torch.full((batch,), 50, device=device), top_p=top_p)
    return {
        "logits": (4 * torch.randn(batch, parents, vocab, device=device)).to(DTYPE),
        "k": k,
        "filters": filters,
        "noise": "none" if kind == "greedy" else kind.split()[0],
        "seeds": torch.arange(batch, device=device) * 2**33 + 5,
        "position": torch.full((batch,), 1000, device=device),
        "depth": 1,
        "nodes": torch.arange(parents, device=device),
    }


def measure(bench: Bench, case: tuple[int, int, int, int, str]) -> None:
    batch, parents, k, vocab, kind = case
    nbytes = batch * parents * vocab * DTYPE.itemsize
    sets = [make_inputs(*case, bench.device) for _ in range(bench.num_sets(nbytes))]

    def verify(call):
        for inputs in sets[:2]:
            got, wanted = call(inputs), ops.draft_topk(**inputs, impl="reference")
            assert not got.has_nan.any() and not wanted.has_nan.any(), "a row is flagged"
            assert torch.equal(got.tokens, wanted.tokens), "the candidates differ from the reference's"

    for impl in ("triton", "reference"):
        provider = Provider(
            impl, lambda inputs, impl=impl: ops.draft_topk(**inputs, impl=impl), kernel=impl == "triton"
        )
        shape = {"B": batch, "P": parents, "k": k, "V": vocab, "kind": kind}
        bench.measure(provider, shape, "bf16", sets, verify, nbytes=nbytes, count=provider.kernel and parents == 1)


def main() -> int:
    bench = Bench("draft", __doc__)
    torch.manual_seed(0)
    return bench.run(measure, CASES, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
