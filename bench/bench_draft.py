"""The candidates of a draft level: from the draft's logits to the tokens of the next nodes.

    python bench/bench_draft.py [--rehearse]

Providers: the Triton kernels and the reference. The floor is one read of the logits. P expanded nodes have 1 (a chain)
or 4 candidates each. "greedy" ranks the logits; "coupled" and "draft" add noise after a temperature, or after all
filters.

The other kinds are a level of a dynamic tree: 10 candidates at each of 10 nodes, with their log-probabilities. Logits
of "dynamic" are finite at all V tokens; those of "reduced" at the tokens of a reduced vocabulary alone, which lie
anywhere among the V. "scattered" is "reduced" and includes the time to scatter the logits of a head. Compare it with
"dynamic" at V = 32000, the size of the reduced vocabulary: the difference is the cost of drafting over all V tokens.

Other cases run a whole draft of a DFlash head, made by `_models.dflash_head`, after a text of `context` tokens. "DFlash
block" is the forward of a block with the logits of all its tokens. "DFlash tree" is the same forward and the tree of
the N likeliest nodes. The provider "triton" also fuses the head's layers. Their floor is one read of the head's
weights, and of its keys and values.
"""

import dataclasses
import functools
import sys
from typing import NamedTuple

import numpy as np
import torch
from _common import Bench, Provider
from _models import dflash_head, prompts, successors
from bench_generate import head_bytes, pair

from specdec_triton import ops
from specdec_triton.drafters.base import DraftContext
from specdec_triton.drafters.dflash import DFlashMarginals, PromptContext
from specdec_triton.drafters.marginals import MarginalSession
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.ops.filters import Filters
from specdec_triton.tree import DraftTree

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
BLOCK, TREE = "DFlash block", "DFlash tree"
NODES = 64  # of the tree
ROUNDING = 1e-4  # of log-probabilities


@dataclasses.dataclass(frozen=True)
class HeadCase:
    """A draft of a DFlash head; `kind` is `BLOCK` or `TREE`."""

    kind: str
    batch: int
    context: int = 2048


CASES += [HeadCase(kind, batch) for batch in (1, 8) for kind in (BLOCK, TREE)]
SMALL += [HeadCase(kind, batch, 64) for batch in (1, 4) for kind in (BLOCK, TREE)]
REHEARSED += [HeadCase(BLOCK, 1, 12), HeadCase(TREE, 2, 12)]


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


@functools.lru_cache(maxsize=1)
def target_and_head(large: bool, device: torch.device) -> tuple:
    """The name of the target, the target, and a DFlash head that makes no errors."""
    name, target, _ = pair(large, device)
    return name, target, dflash_head(name, target, 0.0)


class Draft(NamedTuple):
    """One session of a head, and the source of its logits."""

    source: DFlashMarginals
    session: MarginalSession


@torch.no_grad()
def draft_of(case: HeadCase, target, head, impl: str) -> Draft:
    """A session of the head before its first draft. The hidden states of the text are random."""
    device, columns = target.device, case.context + 1
    text = prompts(case.batch, columns, target.config.vocab_size, device)
    host_tokens, ends = text.cpu().numpy(), np.full(case.batch, case.context)
    start = torch.zeros(case.batch, dtype=torch.int64, device=device)
    context = DraftContext(
        tokens=torch.nn.functional.pad(text, (0, 1)),
        start=start,
        length=start + case.context,
        host_tokens=host_tokens,
        host_length=ends,
        host_budget=np.full(case.batch, NODES),
        max_length=columns,
        vocab_size=target.config.vocab_size,
        target=TreeRunner(target, start, columns + head.block_size),
        impl=impl,
        fused=impl == "triton",
    )
    prompt, shape = PromptContext(head, context), (case.batch, case.context, target.config.hidden_size)
    generator = torch.Generator(device).manual_seed(0)
    states = [torch.randn(shape, device=device, generator=generator) for _ in head.taps(target)]
    prompt(tuple(each.to(target.dtype) for each in states), 0)
    source = DFlashMarginals(head, context, prompt, head.num_drafted)
    session = MarginalSession(source, context, NODES)
    session.prepare()
    return Draft(source, session)


def check_logits(logits: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check that the likeliest tokens of the logits [B, D, V] are `wanted` [B, D]."""
    assert torch.equal(logits.argmax(-1), wanted), "the likeliest tokens do not follow the root"


def check_tree(tree: DraftTree, wanted: torch.Tensor) -> None:
    """Check that a path from the root has the tokens `wanted` [B, D]."""
    assert tree.num_nodes == NODES, f"{tree.num_nodes} nodes"
    node = torch.zeros_like(wanted[:, :1])
    for tokens in wanted.split(1, 1):
        found = (tree.parents == node) & (tree.tokens == tokens)
        assert found.any(1).all(), "the tokens that follow the root are not drafted"
        node = found.int().argmax(1, keepdim=True)


def measure_head(bench: Bench, case: HeadCase) -> None:
    large = bench.size == "gpu"
    name, target, head = target_and_head(large, bench.device)
    vocab, drafted = target.config.vocab_size, head.num_drafted
    keys = head.config.num_hidden_layers * head.config.num_key_value_heads * head.config.head_dim
    nbytes = head_bytes(head, 1) + 2 * case.batch * case.context * keys * head.dtype.itemsize
    root, follows, wanted = (
        prompts(case.batch, case.context + 1, vocab, bench.device)[:, -1].cpu(),
        successors(vocab),
        [],
    )
    for _ in range(drafted):
        root = follows[root]
        wanted.append(root)
    wanted = torch.stack(wanted, 1).to(bench.device)

    @torch.no_grad()
    def block(draft: Draft) -> torch.Tensor:
        return draft.source.logits(drafted)

    @torch.no_grad()
    def tree(draft: Draft) -> DraftTree:
        return draft.session.draft()

    call, check = (block, check_logits) if case.kind == BLOCK else (tree, check_tree)
    shape = {"kind": case.kind, "model": name, "B": case.batch, "context": case.context}
    shape |= {"D": drafted} if case.kind == BLOCK else {"N": NODES}
    for impl in ("triton", "reference"):
        draft = draft_of(case, target, head, impl)
        provider = Provider(impl, call, kernel=impl == "triton")
        bench.measure(
            provider,
            shape,
            "bf16" if large else "fp32",
            [draft],  # the weights are larger than any cache
            lambda call, draft=draft: check(call(draft), wanted),
            nbytes=nbytes,
            count=provider.kernel,
        )


def measure(bench: Bench, case: tuple[int, int, int, int, str] | HeadCase) -> None:
    if isinstance(case, HeadCase):
        measure_head(bench, case)
        return
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
