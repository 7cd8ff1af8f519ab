"""Drafts copied from the text so far: what followed the last few tokens when they occurred before.

Costs no model and pays where the output repeats its input: edits, quotes, summaries. Source: prompt lookup decoding
(Saxena 2023), as in transformers' `prompt_lookup_num_tokens`; several matches become the branches of one tree.
"""

import numpy as np
import torch

from ..tree import DraftTree, Topology
from .base import DraftContext, Drafter, DraftSession


class PromptLookupDrafter(Drafter):
    """N-gram lookup in prompt and output.

    Args:
        num_tokens: longest continuation copied from one match.
        max_ngram: longest n-gram compared; matches of more tokens come first, earlier ones before later ones.
        branches: matches that may become branches; common beginnings are shared. No match: no draft, a plain step.
        adaptive: draft less after a draft that was wrong from its first token, and more again after one that was
            right to its end. Matters where a forward of more rows takes longer, as on a CPU.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, num_tokens: int = 10, max_ngram: int = 2, branches: int = 1, adaptive: bool = True):
        for name, number in (("num_tokens", num_tokens), ("max_ngram", max_ngram), ("branches", branches)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"PromptLookupDrafter: {name} must be an integer of at least 1, got {number!r}")
        self.num_tokens, self.max_ngram, self.branches, self.adaptive = num_tokens, max_ngram, branches, adaptive

    def start(self, context, tree=None):
        if isinstance(tree, Topology) and not tree.is_chain:
            raise ValueError(
                "PromptLookupDrafter: tree must be None, a number of nodes or a chain (its branches come from the "
                f"matches in the text), got a topology of {tree.num_nodes} nodes"
            )
        if isinstance(tree, Topology):
            tree = tree.num_nodes
        return _LookupSession(self, context, 1 + self.num_tokens * self.branches if tree is None else tree)


class _LookupSession(DraftSession):
    trusted = True

    def __init__(self, drafter: PromptLookupDrafter, context: DraftContext, max_nodes: int):
        self.drafter, self.context = drafter, context
        self.max_nodes, self.max_depth = max_nodes, min(drafter.num_tokens, max_nodes - 1)
        self._start = context.start.tolist()  # once a call, before the first round
        batch = len(self._start)
        self._limit = np.full(batch, self.max_depth)  # longest continuation that each row tries now
        self._drafted = np.zeros(batch, dtype=np.int64)  # longest continuation in the last tree
        self._length = context.host_length.copy()

    def draft(self) -> DraftTree:
        context = self.context
        device = context.tokens.device
        if self.drafter.adaptive:
            self._adapt()
        rows = [self._row(row) for row in range(len(context.host_length))]
        width = max(len(tokens) for tokens, _ in rows)
        if width == 1:
            return DraftTree.root_only(context.root[:, None])
        if len(rows) == 1 and rows[0][1] == list(range(-1, width - 1)):
            return DraftTree.from_topology(Topology.chain(width - 1), torch.tensor([rows[0][0]], device=device))
        tokens = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows], device=device)
        parents = [parents + [-1] * (width - len(parents)) for _, parents in rows]
        parents = torch.tensor(parents, dtype=torch.int32, device=device)
        return DraftTree.from_parents(tokens, parents, min(self.max_depth, width - 1))

    def _adapt(self) -> None:
        accepted = self.context.host_length - self._length - 1
        self._length = self.context.host_length.copy()
        tried = self._drafted > 0
        failed, held = tried & (accepted <= 0), tried & (accepted >= self._drafted)
        self._limit[failed] //= 2
        self._limit[held] *= 4
        self._limit.clip(min(1, self.max_depth), self.max_depth, out=self._limit)

    def _row(self, row: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of one row's tree: a trie of the continuations, cut at `max_nodes`."""
        context = self.context
        end = int(context.host_length[row]) + 1
        text = context.host_tokens[row, self._start[row] : end]
        tokens, parents, children = [int(text[-1])], [-1], {}
        longest = min(int(self._limit[row]), max(int(context.host_budget[row]) - 1, 0))
        self._drafted[row] = 0
        for match in _matches(text, self.drafter.max_ngram, self.drafter.branches) if longest else ():
            self._drafted[row] = max(self._drafted[row], min(longest, len(text) - 1 - match))
            node = 0
            for token in text[match + 1 : match + 1 + longest].tolist():
                if (node, token) not in children:
                    if len(tokens) == self.max_nodes:
                        break
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = children[node, token]
        return tokens, parents


def _matches(text: np.ndarray, max_ngram: int, count: int) -> list[int]:
    """Where the last tokens of `text` [L] occurred before: ends of `count` matches, longest first, then earliest."""
    matched = np.zeros(len(text) - 1, dtype=np.int64)
    running = np.ones(len(text) - 1, dtype=bool)
    for back in range(min(max_ngram, len(text) - 1)):
        running[back:] &= text[: len(text) - 1 - back] == text[-1 - back]
        running[:back] = False
        matched += running
    ends = np.flatnonzero(matched)
    return ends[np.argsort(-matched[ends], kind="stable")][:count].tolist()
