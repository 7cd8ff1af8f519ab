"""The candidates of a draft level: from the draft's logits to the tokens of the next nodes.

    python bench/bench_draft.py [--rehearse]

Providers: the Triton kernels and the reference. The floor is one read of the logits. P expanded nodes have 1 (a chain)
or 4 candidates each. "greedy" ranks the logits; "coupled" and "draft" add noise after a temperature, or after all
filters.

The other kinds are a level of a dynamic tree: 10 candidates at each of 10 nodes, with their log-probabilities. Logits
of "dynamic" are finite at all V tokens; those of "reduced" at the tokens of a reduced vocabulary alone, which lie
anywhere among the V. "scattered" is "reduced" and includes the time to scatter the logits of a head. Compare it with
"dynamic" at V = 32000, the size of the reduced vocabulary: the difference is the cost of drafting over all V tokens.
"""

import functools
import sys

import torch
from _common import Bench, Provider

from specdec_triton import ops
from specdec_triton.ops.filters import Filters

KINDS = ("greedy", "coupled", "coupled filtered", "draft", "draft filtered")
DYNAMIC = ("dynamic", "reduced", "scattered")
REDUCED = DYNAMIC[1:]
NAMED = 32000 / 128256  # the share of the tokens that a reduced vocabulary has
# B, P, k, V, kind
CASES = [(1, 10, 10, vocab, kind) for vocab, kind in ((32000, "dynamic"), *((128256, kind) for kind in DYNAMIC))]
CASES += [(1, parents, 1 if parents == 1 else 4, 128256, kind) for parents in (1, 4, 16) for kind in KINDS]
SMALL = [(1, parents, 2, 2048, kind) for parents in (1, 4) for kind in KINDS]
SMALL += [(1, 4, 4, 2048, kind) for kind in DYNAMIC]
REHEARSED = [(1, 2, 2, 70, kind) for kind in (*KINDS, *DYNAMIC)]
DTYPE = torch.bfloat16
ROUNDING = 1e-4  # of log-probabilities


def make_inputs(batch: int, parents: int, k: int, vocab: int, kind: str, device: torch.device) -> dict:
    """Arguments of `candidates`."""
    dynamic = kind in DYNAMIC
    filters = Filters()
    if kind != "greedy" and not dynamic:
        filters = Filters(torch.full((batch,), 0.8, device=device))
    if kind.endswith("filtered"):
        top_p = torch.full((batch,), 0.95, dtype=torch.float64, device=device)
        filters = filters._replace(top_k=torch.full((batch,), 50, device=device), top_p=top_p)
    ids = None
    if kind in REDUCED:
        ids = torch.randperm(vocab, device=device)[: round(vocab * NAMED)].sort().values
    logits = (4 * torch.randn(batch, parents, vocab if ids is None else len(ids), device=device)).to(DTYPE)
    if kind == "reduced":
        logits, ids = everywhere(logits, ids, vocab), None
    return {
        "logits": logits,
        "k": k,
        "filters": filters,
        "noise": "none" if kind == "greedy" or dynamic else kind.split()[0],
        "seeds": torch.arange(batch, device=device) * 2**33 + 5,
        "position": torch.full((batch,), 1000, device=device),
        "depth": 1,
        "nodes": torch.arange(parents, device=device),
        "with_log_probs": dynamic,
        "ids": ids,
        "vocab": vocab,
    }


def everywhere(logits: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Logits [B, P, V] for those [B, P, DV] of the tokens `ids` [DV]; -inf at all others."""
    return logits.new_full((*logits.shape[:-1], vocab), float("-inf")).index_copy_(-1, ids, logits)


def candidates(inputs: dict, impl: str) -> ops.Candidates:
    """The candidates of a level. If there are `ids`, the logits are scattered to them first."""
    inputs = dict(inputs)
    ids, vocab = inputs.pop("ids"), inputs.pop("vocab")
    if ids is not None:
        inputs["logits"] = everywhere(inputs["logits"], ids, vocab)
    return ops.draft_topk(**inputs, impl=impl)


def measure(bench: Bench, case: tuple[int, int, int, int, str]) -> None:
    batch, parents, k, vocab, kind = case
    read = vocab if kind != "scattered" else round(vocab * NAMED)
    nbytes = batch * parents * read * DTYPE.itemsize
    sets = [make_inputs(*case, bench.device) for _ in range(bench.num_sets(nbytes))]

    def verify(call):
        for inputs in sets[:2]:
            got, wanted = call(inputs), candidates(inputs, "reference")
            assert not got.has_nan.any() and not wanted.has_nan.any(), "a row is flagged"
            assert torch.equal(got.tokens, wanted.tokens), "the candidates differ from the reference's"
            if kind in DYNAMIC:
                close = torch.allclose(got.log_probs, wanted.log_probs, rtol=ROUNDING, atol=ROUNDING)
                assert close, "the log-probabilities differ from the reference's"

    for impl in ("triton", "reference"):
        provider = Provider(impl, functools.partial(candidates, impl=impl), kernel=impl == "triton")
        shape = {"B": batch, "P": parents, "k": k, "V": vocab, "kind": kind}
        count = provider.kernel and (parents == 1 or kind in DYNAMIC)
        bench.measure(provider, shape, "bf16", sets, verify, nbytes=nbytes, count=count)


def main() -> int:
    bench = Bench("draft", __doc__)
    torch.manual_seed(0)
    return bench.run(measure, CASES, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
