"""A drafter that knows the answer: for tests, and for benchmarks with a controlled acceptance."""

import numpy as np
import torch

from ..tree import DraftTree, Topology
from .base import DraftContext, Drafter, DraftSession, check_rule, check_tree, topology_of

DEFAULT_TOKENS = 5


class OracleDrafter(Drafter):
    """Replays a given text, corrupted at a set rate.

    In a tree, one child of each node on the true path carries the true token, at a rank drawn anew each time; all other
    children carry other tokens. Where the text has ended or was left, the draft is wrong on purpose.

    Args:
        text: [B, L] int64. Prompt and continuation of every sequence, columns as `generate` returns them.
        error_rate: probability, 0 to 1, that no child carries the true token.
        tree: shape of the draft, or a number of nodes; default a chain of 5.
        seed: of the corruption.

    Raises:
        ValueError: `text` is not 2-D, or `error_rate` is not a probability.
    """

    def __init__(self, text: torch.Tensor, error_rate: float = 0.0, tree: Topology | int | None = None, seed: int = 0):
        if text.dim() != 2:
            raise ValueError(f"OracleDrafter: text must be [B, L], got {list(text.shape)}")
        if not 0 <= error_rate <= 1:
            raise ValueError(f"OracleDrafter: error_rate must be 0 to 1, got {error_rate}")
        check_tree("OracleDrafter", tree)
        self.text, self.error_rate, self.tree, self.seed = text.cpu().numpy(), error_rate, tree, seed

    def check(self, model, rule=None, tree=None):
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
    trusted = True

    def __init__(self, drafter: OracleDrafter, context: DraftContext, topology: Topology):
        self.text, self.error_rate, self.context, self.topology = drafter.text, drafter.error_rate, context, topology
        self.max_nodes, self.max_depth = topology.num_nodes, topology.max_depth
        self._random = np.random.default_rng(drafter.seed)
        self._children = [
            [node for node, parent in enumerate(topology.parents) if parent == at] for at in range(topology.num_nodes)
        ]

    def draft(self) -> DraftTree:
        tokens = np.stack([self._row(row) for row in range(len(self.text))])
        return DraftTree.from_topology(self.topology, torch.from_numpy(tokens).to(self.context.tokens.device))

    def _row(self, row: int) -> np.ndarray:
        vocab, column = self.context.vocab_size, int(self.context.host_length[row])
        tokens = self._random.integers(0, vocab, self.topology.num_nodes)
        tokens[0] = self.context.host_tokens[row, column]
        node = 0
        while self._children[node]:
            column += 1
            true = self.text[row, column] if column < self.text.shape[1] else -1
            children = self._children[node]
            tokens[children] = np.where(tokens[children] == true, (true + 1) % vocab, tokens[children])
            node = int(self._random.choice(children))
            if true >= 0 and self._random.random() >= self.error_rate:
                tokens[node] = true
        return tokens
