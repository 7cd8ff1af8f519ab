"""Four of the ops alone, on small tensors: Triton kernels on a CUDA GPU, their PyTorch references elsewhere.

python examples/kernels_alone.py

The tree has a root (node 0), its children (nodes 1 and 2), and a child of node 2 (node 3).
"""

import torch

from specdec_triton import ops
from specdec_triton.tree import DraftTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    torch.manual_seed(0)
    tokens = torch.tensor([[7, 3, 5, 9]], device=DEVICE)
    parents = torch.tensor([[-1, 0, 0, 2]], dtype=torch.int32, device=DEVICE)
    length = torch.tensor([6], device=DEVICE)  # of the prefix; the keys of node i are in slot 6 + i
    query, key, value = (torch.randn(1, heads, n, 16, device=DEVICE) for heads, n in ((4, 4), (2, 12), (2, 12)))
    packed = DraftTree.from_parents(tokens, parents).pack(start=torch.zeros_like(length), length=length)
    print("implementation:", *ops.implementation("tree_attention", DEVICE))
    print("tree_attention:", list(ops.tree_attention(query, key, value, packed).shape))

    logits = torch.randn(1, 4, 10, device=DEVICE)
    logits[0, 0, 5] += 20  # after the root the target chooses 5, the token of node 2
    logits[0, 2, 1] += 20  # after node 2 it chooses 1: node 3 is rejected
    print("accept_greedy:", accepted := ops.accept_greedy(logits, tokens, parents, max_depth=2))
    seeds, options = torch.tensor([42], device=DEVICE), {"rule": "coupled", "max_depth": 2}
    print("accept_sample:", ops.accept_sample(logits, tokens, parents, seeds=seeds, position=length, **options))

    plane = torch.arange(12.0, device=DEVICE)  # 12 slots of one element
    ops.compact_kv(plane, [1], base=length, path=accepted.path)  # node 2 moves from slot 8 to slot 7, after the root
    print("compact_kv:", plane.tolist())


if __name__ == "__main__":
    main()
