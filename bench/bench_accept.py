"""Greedy acceptance: from the target's logits to the accepted path and the next token.

    python bench/bench_accept.py [--rehearse]

Providers: the Triton kernels; the reference; and eager PyTorch as in a decoding loop: torch.argmax, then a walk on the
host, as transformers compares a draft with the target's choices (one wait for the GPU a round). The floor is one read
of the logits. Trees are best-first; the target agrees with the first four candidates of rank 0.
"""

import sys

import torch
from _common import Bench, Provider

from specdec_triton import ops
from specdec_triton.tree import DraftTree, Topology

EOS_ID = 2
AGREED = 4

# B, N, V: one sequence, then batches of small trees; Llama 3's vocabulary, Qwen's, Gemma's, and GPT-2's odd one
CASES = [(1, nodes, 128256) for nodes in (64, 32, 1, 8, 16, 128, 256)]
CASES += [(16, 8, 128256), (64, 4, 128256), (1, 64, 151936), (1, 64, 262144), (1, 64, 50257)]
SMALL = [(1, 8, 4096), (1, 32, 4096), (8, 4, 4096)]
REHEARSED = [(1, 8, 333), (2, 3, 70)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make_inputs(batch: int, nodes: int, vocab: int, dtype: torch.dtype, device: torch.device) -> dict:
    topology = Topology.from_budget(nodes)
    tree = DraftTree.from_topology(topology, torch.randint(3, vocab, (batch, nodes), device=device))
    logits = torch.randn(batch, nodes, vocab, device=device, dtype=dtype)
    last = accepted = 0
    for node, (parent, rank) in enumerate(zip(topology.parents, topology.ranks, strict=True)):
        if node and parent == last and rank == 0 and accepted < AGREED:
            logits[:, last].scatter_(1, tree.tokens[:, node, None], 100.0)
            last, accepted = node, accepted + 1
    return {
        "logits": logits,
        "tokens": tree.tokens,
        "parents": tree.parents,
        "max_depth": tree.max_depth,
        "budget": torch.full((batch,), 1000, device=device),
        "eos_ids": torch.tensor([EOS_ID], device=device),
        "topology": topology,
    }


def accept(inputs: dict, impl: str) -> ops.Acceptance:
    arguments = {name: value for name, value in inputs.items() if name != "topology"}
    return ops.accept_greedy(**arguments, impl=impl)


def accept_eager(inputs: dict) -> tuple[list, list, list]:
    choices, tokens = torch.stack([inputs["logits"].argmax(-1), inputs["tokens"]]).tolist()
    parents = inputs["topology"].parents
    paths, next_ids = [], []
    for choice, token in zip(choices, tokens, strict=True):
        path, here = [], 0
        for node in range(1, len(parents)):
            if parents[node] == here and token[node] == choice[here] != EOS_ID:
                path.append(node)
                here = node
        paths.append(path + [-1] * (inputs["max_depth"] - len(path)))
        next_ids.append(choice[here])
    return paths, [sum(node >= 0 for node in path) for path in paths], next_ids


def measure(bench: Bench, case: tuple[int, int, int]) -> None:
    batch, nodes, vocab = case
    shapes = {"B": batch, "N": nodes, "V": vocab}
    for name, dtype in DTYPES.items():
        nbytes = batch * nodes * vocab * dtype.itemsize
        sets = [make_inputs(batch, nodes, vocab, dtype, bench.device) for _ in range(bench.num_sets(nbytes))]

        def verify(call, sets=sets):
            for inputs in sets[:2]:
                wanted = [field.tolist() for field in accept(inputs, "reference")]
                got = [field.tolist() if torch.is_tensor(field) else field for field in call(inputs)]
                assert got == wanted[: len(got)], "path, length or next_ids differ from the reference"

        for provider in (
            Provider("triton", lambda inputs: accept(inputs, "triton"), kernel=True),
            Provider("reference", lambda inputs: accept(inputs, "reference")),
            Provider("eager argmax, walk on the host", accept_eager, graph=False),
        ):
            bench.measure(provider, shapes, name, sets, verify, nbytes=nbytes, count=provider.kernel and nodes == 64)


def main() -> int:
    bench = Bench("accept", __doc__)
    torch.manual_seed(0)
    return bench.run(measure, CASES, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
