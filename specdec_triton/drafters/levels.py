"""The plan by which a model drafts a topology: its forwards, and the tokens and attention mask of each."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..tree import Topology, topology_tensors


@dataclass(frozen=True)
class Level:
    """One forward of the draft model. It expands the nodes of one depth that have children.

    Each group of candidates consists of the best tokens at one expanded node. If children are drawn with replacement,
    each child is a group of one candidate.

    Attributes:
        num_parents: number of nodes that are expanded; they are the last rows of the forward.
        num_candidates: number of candidates in each group.
        rows: [groups] int64. Index of each group's node among the expanded nodes; None if each node has one group.
        nodes: [groups] int64. The node whose noise a group uses: the expanded node, or the child that is drawn with
            replacement.
        expanded: [parents of the next level] int64. The nodes that the next level expands, as indices into the
            candidates of all groups; None if they are all candidates, in order.
        parents: [num_parents] int64. Parent of each expanded node, as its number among those of the level before.
        depth, ancestors: [1, T], [1, T, W] int64. The tree in the draft's cache so far: the chain that ends in the
            root, and the expanded nodes.
        depth_below: depth of the children.
    """

    num_parents: int
    num_candidates: int
    rows: torch.Tensor | None
    nodes: torch.Tensor
    expanded: torch.Tensor | None
    parents: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    depth_below: int


@dataclass(frozen=True)
class Plan:
    """The forwards that draft a topology.

    Attributes:
        levels: the forwards in order.
        order: [N] int64. Index of each node's token in the concatenation of the root and the candidates of all levels;
            None if it is the node's number.
        slots: [N] int64. Slot of each node in the draft's cache, relative to the root's slot; -1 if it is not expanded.
        draft_row: [1, N] int32. Index of each node among the expanded nodes; -1 if it is not expanded.
    """

    levels: tuple[Level, ...]
    order: torch.Tensor | None
    slots: torch.Tensor
    draft_row: torch.Tensor


@lru_cache(maxsize=64)
def plan_of(topology: Topology, num_first: int, sampling: str, device: torch.device) -> Plan:
    """The plan for `topology` if each level's tree begins with a chain of `num_first` nodes that ends in the root.

    Plans are cached. `sampling` tells how children are chosen: "none" by rank, "with" or "without" by draws with or
    without replacement.
    """
    depths, parents = topology.depths, topology.parents
    by_depth = [[node for node, depth in enumerate(depths) if depth == at] for at in range(topology.max_depth + 1)]
    inner = set(parents)
    slots, levels = {0: 0}, []
    place = {0: 0}  # index of each node's token in the concatenation of the root and the candidates
    total, above = 1, [-1]
    cache_parents, cache_ranks = list(range(-1, num_first - 1)), [0] * num_first
    for below, (level, children) in enumerate(zip(by_depth, by_depth[1:], strict=False), 1):
        expanded = [node for node in level if node in inner]
        for node in expanded:
            if node:
                slots[node] = len(slots)
                cache_parents.append(slots[parents[node]] + num_first - 1)
                cache_ranks.append(topology.ranks[node])
        rows = [expanded.index(parents[child]) for child in children]
        if sampling == "with":
            groups, choice = range(len(children)), [0] * len(children)
        elif sampling == "without":
            groups, choice = rows, [rows[:at].count(row) for at, row in enumerate(rows)]
        else:
            groups, choice = rows, [topology.ranks[child] for child in children]
        k = 1 + max(choice)
        num_groups = len(children) if sampling == "with" else len(expanded)
        candidate = {child: group * k + at for child, group, at in zip(children, groups, choice, strict=True)}
        place |= {child: total + at for child, at in candidate.items()}
        total += num_groups * k
        _, depth, ancestors = topology_tensors(Topology(tuple(cache_parents), tuple(cache_ranks)), device)
        levels.append(
            Level(
                num_parents=len(expanded),
                num_candidates=k,
                rows=_indices(rows, len(expanded), device) if sampling == "with" else None,
                nodes=torch.tensor(children if sampling == "with" else expanded, device=device),
                expanded=_indices([candidate[child] for child in children if child in inner], num_groups * k, device),
                parents=torch.tensor([above.index(parents[node]) for node in expanded], device=device),
                depth=depth,
                ancestors=ancestors,
                depth_below=below,
            )
        )
        above = expanded
    rows = {node: row for row, node in enumerate(node for level in by_depth for node in level if node in inner)}
    return Plan(
        levels=tuple(levels),
        order=_indices([place[node] for node in range(topology.num_nodes)], total, device),
        slots=torch.tensor([slots.get(node, -1) for node in range(topology.num_nodes)], device=device),
        draft_row=torch.tensor(
            [[rows.get(node, -1) for node in range(topology.num_nodes)]], dtype=torch.int32, device=device
        ),
    )


def _indices(chosen: list[int], count: int, device: torch.device) -> torch.Tensor | None:
    """Indices [len(chosen)] int64 into `count` columns; None if they select all columns in order."""
    return None if chosen == list(range(count)) else torch.tensor(chosen, dtype=torch.int64, device=device)
