"""Draft trees: their shape (`Topology`, or `DynamicTree` if the draft's probabilities decide it), their tokens
(`DraftTree`), and the packed form that attention reads (`pack_tree`).

A tree has N nodes. Node 0 is the root: the last emitted token, which is not in the cache yet. Every other node is a
draft token that follows its parent's token. Parents come before their children. During verification, node i occupies
cache slot length + i.

Letters: B sequences, N nodes, D edges on the longest path, W = ceil(N/64) words of ancestor bits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from .ops.arguments import ANY_FLOAT, Check
from .ops.filters import Filters
from .ops.reference import WORD_BITS, ancestor_matrix, pack_bits, pack_tree
from .ops.rules import SAMPLING
from .ops.trees import best_first_tree, build_tree

# Assumed probability that the target chooses a drafter's candidate of each rank. Used if only a node budget is given.
RANK_ACCEPTANCE = (0.65, 0.12, 0.05, 0.03, 0.02, 0.01)


@dataclass(frozen=True)
class Topology:
    """The shape of a tree, fixed before its tokens are known.

    Attributes:
        parents: N node numbers. parents[0] is -1 (the root has no parent); parents[i] < i for every other node.
        ranks: N ranks. Node i carries candidate number ranks[i] of its parent; 0 is the most likely candidate. The
            root's rank is 0.

    Raises:
        ValueError: `parents` is not a tree with its root first, or two siblings have the same rank.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or len(self.parents) != len(self.ranks):
            raise ValueError(
                f"Topology: parents and ranks must have the same length, at least 1, got {len(self.parents)} and "
                f"{len(self.ranks)}"
            )
        if self.parents[0] != -1 or any(not 0 <= parent < node for node, parent in enumerate(self.parents) if node):
            raise ValueError(f"Topology: parents must be -1, then 0 <= parents[i] < i, got {self.parents}")
        children = list(zip(self.parents, self.ranks, strict=True))
        if min(self.ranks) < 0 or len(set(children)) < len(children):
            raise ValueError(f"Topology: ranks must be >= 0 and differ between siblings, got {self.ranks}")

    @classmethod
    def chain(cls, num_tokens: int) -> "Topology":
        """A single path of `num_tokens` draft tokens."""
        return cls(tuple(range(-1, num_tokens)), (0,) * (num_tokens + 1))

    @classmethod
    def from_widths(cls, widths: Sequence[int]) -> "Topology":
        """A tree in which every node at depth d has `widths[d]` children."""
        parents, ranks, level = [-1], [0], [0]
        for width in widths:
            children = [(node, rank) for node in level for rank in range(width)]
            level = list(range(len(parents), len(parents) + len(children)))
            parents += [node for node, _ in children]
            ranks += [rank for _, rank in children]
        return cls(tuple(parents), tuple(ranks))

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> "Topology":
        """A tree from paths of candidate ranks, in Medusa's notation: `[(0,), (0, 0), (1,)]`. Missing prefixes are
        added."""
        prefixes = {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}
        ordered = [(), *sorted(prefixes, key=lambda path: (len(path), path))]
        index = {path: node for node, path in enumerate(ordered)}
        return cls(
            tuple(index[path[:-1]] if path else -1 for path in ordered),
            tuple(path[-1] if path else 0 for path in ordered),
        )

    @classmethod
    def from_budget(cls, num_nodes: int, rank_acceptance: Sequence[float] = RANK_ACCEPTANCE) -> "Topology":
        """The tree of the `num_nodes` nodes that are most likely to be accepted.

        Args:
            num_nodes: N >= 1, root included.
            rank_acceptance: probability that the target chooses the candidate of each rank. The probabilities
                decrease and apply at every depth.
        """
        if num_nodes < 1:
            raise ValueError(f"Topology.from_budget: num_nodes must be at least 1, got {num_nodes}")
        paths: list[tuple[int, ...]] = []
        frontier: dict[tuple[int, ...], float] = {(): 1.0}
        while len(paths) < num_nodes:
            best = max(frontier, key=lambda path: frontier[path])
            mass = frontier.pop(best)
            paths.append(best)
            frontier |= {(*best, rank): mass * share for rank, share in enumerate(rank_acceptance)}
        return cls.from_paths(paths)

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def max_depth(self) -> int:
        return max(self.depths)

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, self.num_nodes - 1))

    def limited(self, max_depth: int) -> "Topology":
        """The same tree without the nodes that are deeper than `max_depth`."""
        if self.max_depth <= max_depth:
            return self
        kept = [node for node, depth in enumerate(self.depths) if depth <= max_depth]
        index = {node: place for place, node in enumerate(kept)} | {-1: -1}
        return Topology(tuple(index[self.parents[node]] for node in kept), tuple(self.ranks[node] for node in kept))


TREE_TENSORS = ("tokens", "parents", "depth", "ancestors", "draft_logits", "draft_row", "has_nan")


@dataclass(frozen=True)
class DynamicTree:
    """A tree whose shape follows the draft's probabilities and changes every round (EAGLE-2, Li et al. 2024, arXiv
    2406.16858).

    The score of a node is the product of the draft's probabilities along its path. Each level expands the `width` nodes
    with the highest scores into their `width` most likely children. After the last level, the `num_nodes` nodes with
    the highest scores are kept.

    Attributes:
        num_nodes: N, the number of nodes that are kept, root included.
        width: K, the number of nodes that each level expands, and the number of children of each of them.
        depth: D, the number of levels. Each level takes one forward of the draft model.

    Raises:
        ValueError: a number is not an integer of at least 1, or `num_nodes` is larger than the number of candidates.
    """

    num_nodes: int
    width: int
    depth: int

    def __post_init__(self) -> None:
        for name in ("num_nodes", "width", "depth"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"DynamicTree: {name} must be an integer of at least 1, got {number!r}")
        most = self.num_candidates(self.depth)
        if self.num_nodes > most:
            raise ValueError(
                f"DynamicTree: num_nodes must be at most the {most} candidates of width {self.width} and depth "
                f"{self.depth}, got {self.num_nodes}"
            )

    def num_candidates(self, levels: int) -> int:
        """Number of nodes in the first `levels` levels before the selection, root included."""
        return 1 + self.width * (1 + self.width * (levels - 1)) if levels else 1

    @property
    def num_expanded(self) -> int:
        """Number of nodes that the draft forwards after the root."""
        return self.width * (self.depth - 1)

    @property
    def max_depth(self) -> int:
        return min(self.depth, self.num_nodes - 1)

    @property
    def is_chain(self) -> bool:
        return False


@dataclass(frozen=True)
class DraftTree:
    """Draft tokens in a tree: one tree for each sequence, all tensors on one device.

    Attributes:
        tokens: [B, N] int64. Token of each node; node 0 is the last emitted token.
        parents: [B, N] int32. -1 at the root and at padding nodes; parents[:, i] < i at all other nodes.
        depth: [B, N] int64. Number of edges from the root; 0 at padding nodes.
        ancestors: [B, N, W] int64. In the words of node i, bit j % 64 of word j // 64 is set if node j is node i or an
            ancestor of it.
        max_depth: D, a bound on the depth that is known on the host.
        is_chain: in every sequence, each node except padding is the child of the node before it. The accepted keys
            and values are then in their final slots already.
        sampling: how the tokens were chosen. "none": without sampling; they may have been ranked, cut or reordered.
            "with" or "without": siblings were drawn from the draft's probabilities with or without replacement, in
            index order, into a shape that was fixed before (see `drawn`).
        draft_logits: [B, P, V] fp32, bf16 or fp16. The draft's logits at its P expanded nodes; None if `sampling` is
            "none".
        draft_row: [B, N] int32. The row of `draft_logits` that a node's children were drawn from; -1 if it has none.
        draft_filters: the `Filters` that were applied to `draft_logits` before tokens were drawn.
        has_nan: [B] bool or None. True if the draft logits of the row contain a NaN.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depth: torch.Tensor
    ancestors: torch.Tensor
    max_depth: int
    is_chain: bool = False
    sampling: str = "none"
    draft_logits: torch.Tensor | None = None
    draft_row: torch.Tensor | None = None
    draft_filters: Filters | None = None
    has_nan: torch.Tensor | None = None

    @classmethod
    def from_topology(
        cls, topology: Topology, tokens: torch.Tensor, has_nan: torch.Tensor | None = None
    ) -> "DraftTree":
        """Tokens [B, N] int64 in a fixed shape. The tensors of the shape are made once for each device."""
        batch, _ = Check("DraftTree", N=topology.num_nodes)("tokens", tokens, "B?, N", torch.int64)
        _, depth, ancestors = topology_tensors(topology, tokens.device)
        return cls(
            tokens=tokens,
            parents=_parents_of(topology, batch, tokens.device),
            depth=depth.expand(batch, -1),
            ancestors=ancestors.expand(batch, -1, -1),
            max_depth=topology.max_depth,
            is_chain=topology.is_chain,
            has_nan=has_nan,
        )

    @classmethod
    def chain(cls, tokens: torch.Tensor, length: torch.Tensor, has_nan: torch.Tensor | None = None) -> "DraftTree":
        """A chain for each sequence, from tokens [B, N] int64. `length` [B] int64 is the number of draft tokens in each
        row, 0 to N - 1; later tokens are padding."""
        parents, depth, ancestors = topology_tensors(Topology.chain(tokens.shape[1] - 1), tokens.device)
        real = depth <= length[:, None]
        alone = ancestors ^ torch.nn.functional.pad(ancestors[:, :-1], (0, 0, 1, 0))
        return cls(
            tokens=tokens,
            parents=torch.where(real, parents, -1),
            depth=torch.where(real, depth, 0),
            ancestors=torch.where(real[..., None], ancestors, alone),
            max_depth=tokens.shape[1] - 1,
            is_chain=True,
            has_nan=has_nan,
        )

    @classmethod
    def from_parents(
        cls, tokens: torch.Tensor, parents: torch.Tensor, max_depth: int | None = None, is_chain: bool = False
    ) -> "DraftTree":
        """A tree for each sequence; the shapes may differ.

        Args:
            tokens: [B, N] int64.
            parents: [B, N] int32. A node other than 0 whose parent is -1 is padding and is never reached.
            max_depth: a bound on the depth, if the caller knows one; N - 1 by default.
            is_chain: True if the caller knows that each node except padding is the child of the node before it.

        Raises:
            ValueError: a shape, dtype or device differs from the above. Values are not checked; see `check`.
        """
        check = Check("DraftTree")
        check("tokens", tokens, "B?, N", torch.int64)
        check("parents", parents, "B?, N", torch.int32)
        member = ancestor_matrix(parents)
        return cls(
            tokens=tokens,
            parents=parents,
            depth=member.sum(-1) - 1,
            ancestors=pack_bits(member),
            max_depth=tokens.shape[1] - 1 if max_depth is None else max_depth,
            is_chain=is_chain,
        )

    @classmethod
    def root_only(cls, tokens: torch.Tensor) -> "DraftTree":
        """The last emitted tokens [B, 1] as a tree without draft tokens. Verifying it is a plain decoding step."""
        return cls(tokens, *_root_tensors(tokens.shape[0], tokens.device), max_depth=0, is_chain=True)

    @classmethod
    def best_first(
        cls,
        root: torch.Tensor,
        candidates: torch.Tensor,
        log_probs: torch.Tensor,
        num_nodes: int,
        impl: str | None = None,
    ) -> "DraftTree":
        """The most likely tree of `num_nodes` nodes if the candidates of different positions are independent.

        The arguments are those of `ops.best_first_tree`. Log-probabilities may have any float dtype; they are added in
        fp32. Nothing is read on the host.
        """
        tokens, parents, depth, ancestors = best_first_tree(
            root, candidates, log_probs.float(), num_nodes=num_nodes, impl=impl
        )
        return cls(tokens, parents, depth, ancestors, max_depth=min(candidates.shape[1], num_nodes - 1))

    @classmethod
    def likeliest(
        cls,
        tokens: torch.Tensor,
        parents: torch.Tensor,
        scores: torch.Tensor,
        num_nodes: int,
        max_depth: int,
        impl: str | None = None,
    ) -> tuple["DraftTree", torch.Tensor]:
        """The `num_nodes` nodes with the highest scores from a tree of C nodes. Nothing is read on the host.

        The arguments are those of `ops.build_tree`. Scores may have any float dtype; they are compared in fp32.

        Returns:
            The tree, and the number of each of its nodes among the C nodes: [B, N] int64, ascending.
        """
        kept, kept_parents, depth, ancestors, nodes = build_tree(
            tokens, parents, scores.float(), num_nodes=num_nodes, max_depth=max_depth, impl=impl
        )
        return cls(kept, kept_parents, depth, ancestors, max_depth), nodes

    def drawn(
        self, sampling: str, draft_logits: torch.Tensor, draft_row: torch.Tensor, draft_filters: Filters | None = None
    ) -> "DraftTree":
        """This tree, marked as one whose tokens were drawn from the draft's probabilities.

        The shape must not depend on the drawn tokens, and siblings must be in the order in which they were drawn. A
        tree that is cut or reordered by value after drawing biases every rule that uses draft probabilities.

        The arguments are attributes of the class, described there.

        Raises:
            ValueError: `sampling` is neither "with" nor "without", or a shape, dtype or device is wrong.
        """
        if sampling not in SAMPLING[1:]:
            raise ValueError(f'DraftTree.drawn: sampling must be "with" or "without", got {sampling!r}')
        batch, num_nodes = self.tokens.shape
        check = Check("DraftTree.drawn", self.tokens.device, B=batch, N=num_nodes)
        check("draft_logits", draft_logits, "B, P?, V", *ANY_FLOAT)
        check("draft_row", draft_row, "B, N", torch.int32)
        return replace(
            self,
            sampling=sampling,
            draft_logits=draft_logits,
            draft_row=draft_row,
            draft_filters=Filters() if draft_filters is None else draft_filters,
        )

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def shape(self) -> tuple:
        """A hashable key. Trees with equal keys can be copied into each other with `copy_`."""
        tensors = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in self._tensors()]
        most = self.draft_filters and self.draft_filters.max_top_k
        return self.max_depth, self.is_chain, self.sampling, most, *tensors

    def _tensors(self) -> list[torch.Tensor | None]:
        filters = self.draft_filters or Filters()
        return [*(getattr(self, name) for name in TREE_TENSORS), *filters.tensors]

    def clone(self) -> "DraftTree":
        """A copy of this tree with its own tensors."""

        def cloned(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.clone()

        own: dict[str, Any] = {name: cloned(getattr(self, name)) for name in TREE_TENSORS}
        if self.draft_filters is not None:
            filters = self.draft_filters
            own["draft_filters"] = Filters._make([*map(cloned, filters.tensors), filters.max_top_k])
        return replace(self, **own)

    def copy_(self, other: "DraftTree") -> None:
        """Copy the tensors of `other` into the tensors of this tree. Both must have equal `shape`."""
        for mine, its in zip(self._tensors(), other._tensors(), strict=True):
            if mine is not None:
                mine.copy_(its)

    def pack(self, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The packed form of this tree, for `ops.tree_attention`; see `pack_tree`."""
        return pack_tree(self.depth, self.ancestors, start, length)

    def check(self, root: torch.Tensor, vocab_size: int, source: str) -> None:
        """Refuse a malformed tree. The tree is read on the host, so only trees of third-party drafters are checked.

        Args:
            root: [B] int64. The tokens that node 0 must carry.
            vocab_size: draft tokens must be below it.
            source: name of the drafter, for the error message.

        Raises:
            ValueError: the tree is malformed; the message names `source` and the fault.
        """
        words = -(-self.num_nodes // WORD_BITS)
        check = Check(f"{source}: malformed draft tree", root.device, B=len(root), N=self.num_nodes, W=words)
        check("tokens", self.tokens, "B, N", torch.int64)
        check("parents", self.parents, "B, N", torch.int32)
        check("depth", self.depth, "B, N", torch.int64)
        check("ancestors", self.ancestors, "B, N, W", torch.int64)
        drawn = self.sampling != "none"
        if (
            self.sampling not in SAMPLING
            or drawn != (self.draft_logits is not None)
            or drawn != (self.draft_row is not None)
        ):
            raise ValueError(
                f"{source}: malformed draft tree: sampling must be one of {', '.join(SAMPLING)}, with draft_logits and "
                f"draft_row if tokens were drawn (see DraftTree.drawn), got {self.sampling!r}"
            )
        nodes = torch.arange(self.num_nodes, device=self.tokens.device)
        parents = self.parents
        member = ancestor_matrix(parents)
        faults = {
            "parents[:, 0] must be -1": parents[:, 0] != -1,
            "parents[:, i] must be -1 (padding) or a real node before i": (
                (parents < -1)
                | (parents >= nodes.clamp(min=1))
                | ((parents > 0) & (parents.gather(1, parents.clamp(min=0).long()) < 0))
            ).any(1),
            f"tokens must be 0 to {vocab_size - 1}": ((self.tokens < 0) | (self.tokens >= vocab_size)).any(1),
            "tokens[:, 0] must be the last emitted token": self.tokens[:, 0] != root,
            f"depth must be at most max_depth, {self.max_depth}": (self.depth > self.max_depth).any(1),
            "depth must count the edges from the root": (self.depth != member.sum(-1) - 1).any(1),
            "ancestors must be those of parents": (self.ancestors != pack_bits(member)).any(-1).any(1),
            "is_chain must hold": (self.is_chain & (parents >= 0) & (parents != nodes - 1)).any(1),
        }
        if self.draft_logits is not None and self.draft_row is not None:
            expanded = self.draft_logits.shape[1]
            faults[f"draft_row must be -1 or below {expanded}"] = (
                (self.draft_row < -1) | (self.draft_row >= expanded)
            ).any(1)
        for (fault, _), rows in zip(faults.items(), torch.stack(list(faults.values())).tolist(), strict=True):
            if any(rows):
                raise ValueError(f"{source}: malformed draft tree in row {rows.index(True)}: {fault}")


_ROOT = Topology((-1,), (0,))


def bits_of_nodes(num_nodes: int) -> torch.Tensor:
    """[N, W] int64 on the CPU. In row i, only the bit of node i is set, see `DraftTree.ancestors`."""
    return pack_bits(torch.eye(num_nodes, dtype=torch.bool))


def with_children(ancestors: torch.Tensor, parents: torch.Tensor, own_bits: torch.Tensor) -> torch.Tensor:
    """Add n nodes to the ancestor words of a tree of T nodes.

    Args:
        ancestors: [B, T, W] int64, see `DraftTree`.
        parents: [B, n] int64. Parents of the new nodes T, T + 1, ..., T + n - 1; each is below T.
        own_bits: [B, n, at least ceil((T + n) / 64)] int64. Rows T, T + 1, ..., T + n - 1 of `bits_of_nodes`.

    Returns:
        [B, T + n, ceil((T + n) / 64)] int64.
    """
    words = -(-(ancestors.shape[1] + parents.shape[1]) // WORD_BITS)
    if words > ancestors.shape[2]:
        ancestors = torch.nn.functional.pad(ancestors, (0, words - ancestors.shape[2]))
    inherited = ancestors.gather(1, parents[:, :, None].expand(-1, -1, words))
    return torch.cat([ancestors, inherited | own_bits[..., :words]], 1)


@lru_cache(maxsize=256)
def topology_tensors(topology: Topology, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """parents [1, N] int32, depth [1, N] int64, ancestors [1, N, W] int64. They are cached: callers must not write to
    them."""
    parents = torch.tensor([topology.parents], dtype=torch.int32)
    member = ancestor_matrix(parents)
    return parents.to(device), (member.sum(-1) - 1).to(device), pack_bits(member).to(device)


@lru_cache(maxsize=256)
def _root_tensors(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """parents, depth and ancestors of trees of a root alone. They are cached: callers must not write to them."""
    _, depth, ancestors = topology_tensors(_ROOT, device)
    return _parents_of(_ROOT, batch, device), *with_rows(batch, (depth, ancestors))


@lru_cache(maxsize=256)
def _parents_of(topology: Topology, batch: int, device: torch.device) -> torch.Tensor:
    """[B, N] int32, contiguous, because kernels would copy expanded parents in every round. They are cached: callers
    must not write to them."""
    return topology_tensors(topology, device)[0].repeat(batch, 1)


def chain_tensors(num_nodes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """depth [1, N] int64 and ancestors [1, N, W] int64 of a chain, computed on the device."""
    depth = torch.arange(num_nodes, device=device)
    words = torch.arange(-(-num_nodes // WORD_BITS), device=device)
    bits = (depth[:, None] + 1 - words * WORD_BITS).clamp(0, WORD_BITS)  # number of set bits in each word
    ones = torch.where(bits == WORD_BITS, -1, (1 << bits.clamp(max=WORD_BITS - 1)) - 1)
    return depth[None], ones[None]


def with_rows(batch: int, parts: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Views [B, ...] of tensors [1, ...] that all sequences share."""
    return tuple(part.expand(batch, *part.shape[1:]) for part in parts)
