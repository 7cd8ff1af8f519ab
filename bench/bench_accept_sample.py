"""Sampled acceptance: from the target's logits to the accepted path and the next token.

    python bench/bench_accept_sample.py [--rehearse]

Providers: the Triton kernels; the reference; with --compiled, the reference under torch.compile. For rejection also
`_speculative_sampling` of transformers' assisted decoding (one sequence, a chain, softmax over all logits, waits for
the GPU), and FlashInfer's `chain_speculative_sampling` after a softmax in PyTorch, if it is installed. These two use
their own random numbers, so only the range of their outputs is verified. The floor is one read of the logits.

Trees are best-first, and chains for rejection and block. Tokens are drawn from a draft that is near the target. For
coupled and typical they are chosen without sampling; the target agrees with the first four candidates of rank 0.
"""

import sys

import torch
from _common import Bench, Provider, absent_unless_importable

from specdec_triton import ops
from specdec_triton.ops import noise
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.tree import DraftTree, Topology

EOS_ID = 2
AGREED = 4
SPREAD = 0.5

RULES = {"coupled": "none", "typical": "none", "rejection": "with", "block": "with"}
RULES |= {"multi_round": "without", "traversal": "without"}  # how the tree was drawn
KINDS = ("temperature", "filtered")
# B, N, V, rule, filters; the goals' sizes first, then Llama 2's, Qwen's and Gemma's vocabularies, and small trees
CASES = [(1, nodes, 128256, rule, kind) for rule in RULES for nodes in (64, 32) for kind in KINDS]
CASES += [(8, 8, 128256, rule, kind) for rule in RULES for kind in KINDS]
CASES += [
    (1, nodes, vocab, rule, kind)
    for nodes, vocab in ((8, 128256), (16, 128256), (64, 32000), (64, 151936), (64, 262144))
    for rule in RULES
    for kind in KINDS
]
SMALL = [(1, 4, 2048, rule, kind) for rule in RULES for kind in KINDS]
REHEARSED = [(1, 3, 70, rule, KINDS[place % 2]) for place, rule in enumerate(RULES)]
# compiling takes long
COMPILED = [(1, 32, 128256, rule, kind) for rule in ("coupled", "rejection") for kind in KINDS]
CHAIN_RULES = ("rejection", "block")


def make_filters(kind: str, batch: int, device: torch.device) -> Filters:
    temperature = torch.full((batch,), 0.8, device=device)
    if kind == "temperature":
        return Filters(temperature)
    top_k = torch.full((batch,), 50, device=device)
    return Filters(
        temperature, top_k, torch.full_like(temperature, 0.95, dtype=torch.float64), torch.full_like(temperature, 0.02)
    )


def make_inputs(batch, nodes, vocab, dtype, device, rule, sampling, kind) -> dict:
    topology = Topology.chain(nodes - 1) if rule in CHAIN_RULES else Topology.from_budget(nodes)
    filters = make_filters(kind, batch, device)
    logits = 4 * torch.randn(batch, nodes, vocab, device=device)
    draft_logits = (logits + SPREAD * torch.randn_like(logits)).to(dtype) if sampling != "none" else None
    logits = logits.to(dtype)
    tokens = torch.randint(3, vocab, (batch, nodes), device=device)
    seeds = torch.arange(batch, device=device) * 2**33 + 5
    position = torch.full((batch,), 1000, device=device)
    children = {}
    for node, parent in enumerate(topology.parents):
        if node:
            children.setdefault(parent, []).append(node)
    last = accepted = 0
    for parent, group in children.items():
        row = filtered_log_probs((logits if sampling == "none" else draft_logits)[:, parent, None], filters)[:, 0]
        if sampling != "none":
            tokens[:, group] = torch.multinomial(row.exp() + 1e-30, len(group), sampling == "with")
        elif parent == last and accepted < AGREED:
            row = row + noise.gumbel(seeds, position + 1 + accepted, 0, noise.COUPLED, vocab)
            tokens[:, group[0]] = row.argmax(-1)
            last, accepted = group[0], accepted + 1
    tree = DraftTree.from_topology(topology, tokens)
    inputs = {
        "logits": logits,
        "tokens": tree.tokens,
        "parents": tree.parents,
        "rule": rule,
        "seeds": seeds,
        "position": position,
        "filters": filters,
        "max_depth": tree.max_depth,
        "budget": torch.full((batch,), 1000, device=device),
        "eos_ids": torch.tensor([EOS_ID], device=device),
        "sampling": sampling,
    }
    if sampling != "none":
        rows = torch.arange(nodes, device=device, dtype=torch.int32).expand(batch, -1).contiguous()
        inputs |= {"draft_logits": draft_logits, "draft_row": rows, "draft_filters": filters}
    return inputs


def accept(inputs: dict, impl: str) -> ops.Acceptance:
    return ops.accept_sample(**inputs, impl=impl)


def accept_eager(inputs: dict):
    """transformers' `_speculative_sampling` on one sequence, with filters applied to target and draft."""
    from transformers.generation.utils import _speculative_sampling

    drafted = inputs["tokens"].shape[1] - 1
    new_logits = filtered_log_probs(inputs["logits"], inputs["filters"])
    candidate_logits = filtered_log_probs(inputs["draft_logits"][:, :drafted], inputs["draft_filters"])
    _, matches = _speculative_sampling(inputs["tokens"], candidate_logits, drafted, new_logits, False)
    return int(matches)


def accept_flashinfer(inputs: dict):
    from flashinfer.sampling import chain_speculative_sampling

    drafted = inputs["tokens"].shape[1] - 1
    target = filtered_log_probs(inputs["logits"], inputs["filters"]).exp()
    draft = filtered_log_probs(inputs["draft_logits"][:, :drafted], inputs["draft_filters"]).exp()
    accepted, _, _ = chain_speculative_sampling(draft, inputs["tokens"][:, 1:].int().contiguous(), target)
    return accepted


def measure(bench: Bench, case: tuple[int, int, int, str, str]) -> None:
    batch, nodes, vocab, rule, kind = case
    sampling, dtype = RULES[rule], torch.bfloat16
    nbytes = batch * nodes * vocab * dtype.itemsize * (2 if sampling != "none" else 1)
    sets = [
        make_inputs(batch, nodes, vocab, dtype, bench.device, rule, sampling, kind)
        for _ in range(bench.num_sets(nbytes))
    ]

    def verify(call):
        """Outputs equal the reference's. One row in twenty may differ, since its outcome can depend on rounding."""
        equal = []
        for inputs in sets[:20]:
            want, got = accept(inputs, "reference"), call(inputs)
            equal += ((got.length == want.length) & (got.next_ids == want.next_ids)).tolist()
        assert sum(equal) >= 0.95 * len(equal), "length or next_ids differ from the reference"

    def verify_range(call):
        accepted = call(sets[0])
        assert 0 <= int(torch.as_tensor(accepted).max()) <= nodes - 1, "accepted tokens out of range"

    not_compiled = None if bench.size == "gpu" else "compiled on a GPU only"
    # only then: torch.compile imports its compiler, which takes seconds
    compiled = torch.compile(accept, dynamic=False) if bench.compiled else None
    checks = {
        Provider("triton", lambda inputs: accept(inputs, "triton"), kernel=True): verify,
        Provider("reference", lambda inputs: accept(inputs, "reference")): verify,
        Provider(
            "torch.compile of the reference",
            lambda inputs: compiled(inputs, "reference"),
            absent=not_compiled,
            compiles=True,
        ): verify,
    }
    if rule == "rejection":
        one = None if batch == 1 else "takes one sequence"
        theirs = Provider("transformers _speculative_sampling", accept_eager, graph=False, absent=one)
        flashinfer = absent_unless_importable("flashinfer-python", "flashinfer")
        checks |= {theirs: verify_range}
        checks |= {Provider("flashinfer chain", accept_flashinfer, absent=flashinfer): verify_range}
    shapes = {"B": batch, "N": nodes, "V": vocab, "rule": rule, "sampling": sampling, "filters": kind}
    for provider, check in checks.items():
        bench.measure(provider, shapes, "bf16", sets, check, nbytes=nbytes, count=provider.kernel and rule == "coupled")


def main() -> int:
    bench = Bench("accept_sample", __doc__)
    torch.manual_seed(0)
    if bench.compiled:
        return bench.run(measure, COMPILED, SMALL[:1], REHEARSED[:1])
    return bench.run(measure, CASES, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
