"""The plan by which a model drafts a topology: its forwards, and the tokens and attention mask of each."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..tree import Topology, topology_tensors


@dataclass(frozen=True)
class Level:
    """One forward of the draft model. It expands the nodes of one depth that have children.

    Attributes:
        num_parents: number of nodes that are expanded; they are the last rows of the forward.
        num_ranks, num_draws: number of candidates needed from each parent, if they are ranked or if they are drawn.
        parent_rows: [children] int64. Index of each child's parent among the expanded nodes.
        ranks, draws: [children] int64. Index of each child among its parent's ranked or drawn candidates.
        expanded: [parents of the next level] int64. Indices of the children that the next level expands.
        depth, ancestors: [1, T], [1, T, W] int64. The tree in the draft's cache so far: catch-up tokens and expanded
            nodes.
        parents, children: [parents], [children] int64. Their node numbers in the topology.
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
    """The forwards that draft a topology.

    Attributes:
        levels: the forwards in order.
        order: [N] int64. Index of each node's token in the concatenation of the root and the children of all levels.
        slots: [N] int64. Slot of each node in the draft's cache, relative to the root's slot; -1 if it is not expanded.
        draft_row: [1, N] int32. Index of each node among the expanded nodes; -1 if it is not expanded.
    """

    levels: tuple[Level, ...]
    order: torch.Tensor
    slots: torch.Tensor
    draft_row: torch.Tensor


@lru_cache(maxsize=64)
def plan_of(topology: Topology, catch_up: int, device: torch.device) -> Plan:
    """The plan for `topology` if the draft's cache lacks the last `catch_up` tokens of the text. Plans are cached."""
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
