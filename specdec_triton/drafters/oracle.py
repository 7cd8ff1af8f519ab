"""A drafter that replays a known text, for tests and for benchmarks with a controlled acceptance rate."""

import functools

import numpy as np
import torch

from ..tree import DraftTree, Topology, topology_tensors
from .base import DraftContext, Drafter, DraftSession, check_rule, check_static, check_tree, topology_of

DEFAULT_TOKENS = 5


class OracleDrafter(Drafter):
    """Drafts a given text with errors at a given rate.

    In a tree, one child of each node on the true path carries the true token, and its siblings carry other tokens. The
    rank of that child is drawn independently for each column of the text. All tokens are wrong on purpose after the
    end of the text, and at nodes off the true path.

    Args:
        text: [B, L] int64. Prompt and continuation of every sequence, in the columns that `generate` returns.
        error_rate: probability, 0 to 1, that no child carries the true token.
        tree: shape of the draft, or a number of nodes; a chain of 5 tokens by default.
        seed: seed of the random errors and ranks.

    Raises:
        ValueError: `text` is not 2-D, or `error_rate` is not a probability.
    """

    resizable = True

    def __init__(self, text: torch.Tensor, error_rate: float = 0.0, tree: Topology | int | None = None, seed: int = 0):
        if text.dim() != 2:
            raise ValueError(f"OracleDrafter: text must be [B, L], got {list(text.shape)}")
        if not 0 <= error_rate <= 1:
            raise ValueError(f"OracleDrafter: error_rate must be 0 to 1, got {error_rate}")
        check_tree("OracleDrafter", tree)
        check_static("OracleDrafter", tree)
        self.text, self.error_rate, self.tree, self.seed = text.cpu().long().numpy(), error_rate, tree, seed

    def check(self, model, rule=None, tree=None):
        check_static("OracleDrafter", tree)
        check_rule(self, rule, self._shape(tree, rule).is_chain)

    def _shape(self, tree: Topology | int | None, rule: str | None) -> Topology:
        return topology_of(self.tree if tree is None else tree, Topology.chain(DEFAULT_TOKENS), rule)

    def start(self, context, tree=None):
        if self.text.shape[0] != context.tokens.shape[0]:
            raise ValueError(
                f"OracleDrafter: text must have a row for each of the {context.tokens.shape[0]} sequences, got "
                f"{self.text.shape[0]}"
            )
        return _OracleSession(self, context, self._shape(tree, context.rule))


class _OracleSession(DraftSession):
    """The errors and ranks of all columns are drawn at the start of the call. They give independent trials: the target
    judges each column once, because its own token replaces a rejected one. A column is drafted a second time only if it
    was not judged before.
    """

    trusted = on_device = reusable = True

    def __init__(self, drafter: OracleDrafter, context: DraftContext, topology: Topology):
        self.context, self.topology = context, topology
        self.max_nodes, self.max_depth = topology.num_nodes, topology.max_depth
        random, device = np.random.default_rng(drafter.seed), context.tokens.device
        text = np.pad(drafter.text, ((0, 0), (0, 1)), constant_values=-1)  # the last column stands for all later ones
        others = max(context.vocab_size - 1, 1)

        # [B, L + 1] each: the text; the token that a child carries, -1 for an error; the child that carries it, as a
        # fraction of the number of children; the offset from which wrong tokens are made
        def put(name: str, table: np.ndarray) -> torch.Tensor:
            return context.buffers.put(f"oracle.{name}", torch.from_numpy(table).to(device))

        self._text = put("text", text)
        self._carried = put("carried", np.where(random.random(text.shape) < drafter.error_rate, -1, text))
        self._share = put("share", random.random(text.shape))
        self._tables: dict[Topology, tuple[torch.Tensor, ...]] = {}  # kept for captured rounds
        self._wrong = put("wrong", random.integers(0, others, text.shape))

    def prepare(self, tree=None):
        wanted, context = self.topology if tree is None else tree, self.context
        self._drafted = wanted if context.fixed_shapes else wanted.limited(context.useful_depth)
        if self._drafted not in self._tables:
            device = context.tokens.device
            self._tables[self._drafted] = *topology_tensors(self._drafted, device), *_children(self._drafted, device)
            context.buffers.keep(*self._tables[self._drafted])
        return self._drafted

    def draft(self) -> DraftTree:
        context, topology = self.context, self._drafted
        nodes = torch.arange(topology.num_nodes, device=context.tokens.device)
        depth = self._tables[topology][1]
        column = (context.length[:, None] + depth).clamp(max=self._text.shape[1] - 1)
        # adding 1 to V - 1 to the true token, modulo V, gives a different token
        offset = 1 + (self._wrong.gather(1, column) + nodes) % max(context.vocab_size - 1, 1)
        wrong = (self._text.gather(1, column) + offset) % context.vocab_size
        carried = self._carried.gather(1, column)
        tokens = torch.where(self._path(topology) & (carried >= 0), carried, wrong)
        tokens[:, 0] = context.root
        return DraftTree.from_topology(topology, tokens)

    def _path(self, topology: Topology) -> torch.Tensor:
        """[B, N] bool: the nodes that may carry the text. They form a path from the root to a leaf."""
        length, last = self.context.length, self._text.shape[1] - 1
        *_, children, counts = self._tables[topology]
        node = torch.zeros_like(length)
        nodes = torch.arange(topology.num_nodes, device=length.device)
        on_path = torch.zeros(len(length), topology.num_nodes, dtype=torch.bool, device=length.device)
        for depth in range(1, topology.max_depth + 1):
            share = self._share.gather(1, (length + depth).clamp(max=last)[:, None]).squeeze(1)
            count = counts[node]
            child = torch.minimum((share * count).long(), count - 1).clamp(min=0)
            node = children[node, child]
            on_path |= nodes == node[:, None]
        return on_path


@functools.lru_cache(maxsize=256)
def _children(topology: Topology, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The children [N + 1, K] int64 of each node and the number of them [N + 1]. Rows are padded with N, which stands
    for "no node"; row N belongs to it and has no children."""
    num_nodes = topology.num_nodes
    children = [[node for node, parent in enumerate(topology.parents) if parent == at] for at in range(num_nodes + 1)]
    most = max(1, *map(len, children))
    table = [row + [num_nodes] * (most - len(row)) for row in children]
    return torch.tensor(table, device=device), torch.tensor([len(row) for row in children], device=device)
