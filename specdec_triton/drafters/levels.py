"""How a model drafts a topology: which forwards it takes, and what each of them looks at."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..tree import Topology, topology_tensors


@dataclass(frozen=True)
class Level:
    """One forward of the draft: the nodes of one depth that have children.

    Attributes:
        num_parents: nodes expanded; the last rows of the forward.
        num_ranks, num_draws: candidates wanted of each, by rank or by drawing them.
        parent_rows, ranks, draws: [children] int64. Which expanded node, and which of its candidates, each child is.
        expanded: [next level's parents] int64. Which children are expanded in their turn.
        depth, ancestors: [1, T], [1, T, W] int64. The draft cache's tree so far: catch-up tokens and expanded nodes.
        parents, children: [parents], [children] int64. Their nodes in the tree.
        depth_below: depth of the children.
    """

    num_parents: int
    num_ranks: int
    num_draws: int
    parent_rows: torch.Tensor
    ranks: torch.Tensor
    draws: torch.Tensor
    expanded: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    parents: torch.Tensor
    children: torch.Tensor
    depth_below: int


@dataclass(frozen=True)
class Plan:
    """How to draft a topology.

    Attributes:
        levels: forwards in order.
        order: [N] int64. Where each node's token stands when root and levels are put one after another.
        slots: [N] int64. Slot of each expanded node in the draft's cache, from the root's; -1: never forwarded.
        draft_row: [1, N] int32. Place of each node among the expanded ones, -1: not expanded.
    """

    levels: tuple[Level, ...]
    order: torch.Tensor
    slots: torch.Tensor
    draft_row: torch.Tensor


@lru_cache(maxsize=64)
def plan_of(topology: Topology, catch_up: int, device: torch.device) -> Plan:
    """How to draft `topology` from a cache that lacks the last `catch_up` tokens of the text; made once."""
    depths, parents = topology.depths, topology.parents
    by_depth = [[node for node, depth in enumerate(depths) if depth == at] for at in range(topology.max_depth + 1)]
    inner = set(parents)
    slots, levels = {0: 0}, []
    cache_parents, cache_ranks = list(range(-1, catch_up - 1)), [0] * catch_up
    for below, (level, children) in enumerate(zip(by_depth, by_depth[1:], strict=False), 1):
        expanded = [node for node in level if node in inner]
        for node in expanded:
            if node:
                slots[node] = len(slots)
                cache_parents.append(slots[parents[node]] + catch_up - 1)
                cache_ranks.append(topology.ranks[node])
        of_parent = [parents[node] for node in children]
        draws = [of_parent[:place].count(parent) for place, parent in enumerate(of_parent)]
        _, depth, ancestors = topology_tensors(Topology(tuple(cache_parents), tuple(cache_ranks)), device)
        levels.append(
            Level(
                num_parents=len(expanded),
                num_ranks=1 + max(topology.ranks[node] for node in children),
                num_draws=1 + max(draws),
                parent_rows=torch.tensor([expanded.index(parent) for parent in of_parent], device=device),
                ranks=torch.tensor([topology.ranks[node] for node in children], device=device),
                draws=torch.tensor(draws, device=device),
                expanded=torch.tensor(
                    [place for place, node in enumerate(children) if node in inner], dtype=torch.int64, device=device
                ),
                depth=depth,
                ancestors=ancestors,
                parents=torch.tensor(expanded, device=device),
                children=torch.tensor(children, device=device),
                depth_below=below,
            )
        )
    rows = {node: row for row, node in enumerate(node for level in by_depth for node in level if node in inner)}
    listed = [node for level in by_depth for node in level]
    return Plan(
        levels=tuple(levels),
        order=torch.tensor([listed.index(node) for node in range(topology.num_nodes)], device=device),
        slots=torch.tensor([slots.get(node, -1) for node in range(topology.num_nodes)], device=device),
        draft_row=torch.tensor(
            [[rows.get(node, -1) for node in range(topology.num_nodes)]], dtype=torch.int32, device=device
        ),
    )
