"""Drafts copied from the text so far: the tokens that followed an earlier occurrence of the last few tokens.

It needs no draft model and helps if the output repeats its input, as in edits, quotes and summaries. Source: prompt
lookup decoding (Saxena 2023), as in transformers' `prompt_lookup_num_tokens`. Here several matches may become the
branches of one tree.
"""

import numpy as np
import torch

from ..ops.reference import Acceptance
from ..tree import DraftTree, Topology
from .base import DraftContext, Drafter, DraftSession, check_rule, check_static

# The number of nodes is padded to a multiple of this. On CPUs a matrix product over 2, 3 or 11 rows takes longer than
# one over 4 or 12, and fewer widths mean fewer compiled graphs.
NODE_BUCKET = 4
# With `adaptive`, each row estimates the number of accepted tokens for each length of the match. The estimate for a
# match of m tokens starts at m * FIRST_WORTH. Nothing is drafted if it is below PAYS, because the longer forward would
# then cost more than it gains. LEARNING is the weight of the latest round in the estimate. If nothing was drafted, the
# estimate moves by the share DRIFT towards its start, so that drafts are tried again later.
FIRST_WORTH, PAYS = 0.8, 0.75
LEARNING, DRIFT = 0.2, 0.02


class PromptLookupDrafter(Drafter):
    """N-gram lookup in the prompt and the output. Nothing is drafted in a round without a match.

    Args:
        num_tokens: largest number of tokens copied from one match.
        max_ngram: length of the longest n-gram that is compared, `max_matching_ngram_size` in transformers. Longer
            matches are preferred, and earlier ones among equally long matches.
        branches: largest number of matches that become branches of the tree. Branches share their common prefix.
        adaptive: draft only if matches of the same length were accepted often enough in this row. This matters if a
            forward over more rows takes longer, as on a CPU.

    Raises:
        ValueError: a number is not an integer of at least 1.
    """

    def __init__(self, num_tokens: int = 10, max_ngram: int = 4, branches: int = 1, adaptive: bool = True):
        for name, number in (("num_tokens", num_tokens), ("max_ngram", max_ngram), ("branches", branches)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"PromptLookupDrafter: {name} must be an integer of at least 1, got {number!r}")
        self.num_tokens, self.max_ngram, self.branches, self.adaptive = num_tokens, max_ngram, branches, adaptive

    @property
    def resizable(self) -> bool:
        return self.branches == 1

    def check(self, model, rule=None, tree=None):
        check_static("PromptLookupDrafter", tree)
        check_rule(self, rule, is_chain=self.branches == 1)
        if isinstance(tree, Topology) and not tree.is_chain:
            raise ValueError(
                "PromptLookupDrafter: tree must be None, a number of nodes or a chain (its branches come from the "
                f"matches in the text), got a topology of {tree.num_nodes} nodes"
            )

    def start(self, context, tree=None):
        if isinstance(tree, Topology):
            tree = tree.num_nodes
        session = _DeviceLookupSession if context.fixed_shapes else _LookupSession
        return session(self, context, 1 + self.num_tokens * self.branches if tree is None else tree)


class _Session(DraftSession):
    """Base class of both sessions; it determines the shape of the tree."""

    trusted = chains_only = True

    def __init__(self, drafter: PromptLookupDrafter, context: DraftContext, max_nodes: int):
        self.drafter, self.context = drafter, context
        self._most = min(max_nodes, 1 + drafter.num_tokens * drafter.branches)
        self.max_nodes = padded_width(self._most)
        self.max_depth = self._depth = min(drafter.num_tokens, self._most - 1)

    def prepare(self, tree=None):
        """The depth of a requested `tree` limits the length of continuations. Returns the largest number of nodes of
        the next draft, and its depth."""
        self._depth = self.max_depth if tree is None else min(self.max_depth, tree.max_depth)
        return self._width, self._depth

    @property
    def _width(self) -> int:
        return padded_width(min(self._most, 1 + self._depth * self.drafter.branches))


def padded_width(nodes: int) -> int:
    """`nodes` rounded up to a multiple of `NODE_BUCKET`; a tree of the root alone is not padded."""
    return nodes if nodes == 1 else -(-nodes // NODE_BUCKET) * NODE_BUCKET


class _LookupSession(_Session):
    """Lookup on the host. The tree of each round is as wide as its widest row."""

    def __init__(self, drafter: PromptLookupDrafter, context: DraftContext, max_nodes: int):
        super().__init__(drafter, context, max_nodes)
        self._start = context.start.tolist()  # the only read from the device, before the first round
        batch = len(self._start)
        self._first_worth = np.arange(1, drafter.max_ngram + 1, dtype=np.float32) * np.float32(FIRST_WORTH)
        self._worth = np.tile(self._first_worth, (batch, 1))  # estimated accepted tokens, by length of the match
        self._matched = np.zeros(batch, dtype=np.int64)  # length of the row's last match, 0 for none
        self._drafted = np.zeros(batch, dtype=bool)  # whether the row's last tree had draft tokens
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
        depth, width = min(self.max_depth, width - 1), padded_width(width)
        chains = all(parents == list(range(-1, len(parents) - 1)) for _, parents in rows)
        tokens = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in rows], device=device)
        parents = [parents + [-1] * (width - len(parents)) for _, parents in rows]
        parents = torch.tensor(parents, dtype=torch.int32, device=device)
        return DraftTree.from_parents(tokens, parents, depth, is_chain=chains)

    def _adapt(self) -> None:
        accepted = (self.context.host_length - self._length - 1).clip(0)
        self._length = self.context.host_length.copy()
        rows = np.flatnonzero(self._matched)
        places = rows, self._matched[rows] - 1
        worth, first = self._worth[places], self._first_worth[places[1]]
        learnt = worth + np.float32(LEARNING) * (accepted[rows].astype(np.float32) - worth)
        drifted = worth + np.float32(DRIFT) * (first - worth)
        self._worth[places] = np.where(self._drafted[rows], learnt, drifted)

    def _row(self, row: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of one row's tree: a trie of the continuations, cut at the largest number of nodes."""
        context = self.context
        end = int(context.host_length[row]) + 1
        text = context.host_tokens[row, self._start[row] : end]
        tokens, parents, children = [int(text[-1])], [-1], {}
        longest = min(self._depth, max(int(context.host_budget[row]) - 1, 0))
        matches, matched = _matches(text, self.drafter.max_ngram, self.drafter.branches)
        self._matched[row], self._drafted[row] = matched if longest else 0, False
        if matched and self.drafter.adaptive and self._worth[row, matched - 1] < PAYS:
            return tokens, parents
        for match in matches if longest else ():
            self._drafted[row] = True
            node = 0
            for token in text[match + 1 : match + 1 + longest].tolist():
                if (node, token) not in children:
                    if len(tokens) == self._most:
                        break
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = children[node, token]
        return tokens, parents


class _DeviceLookupSession(_Session):
    """Lookup on the device. All rounds have the same width. The trees equal those of the host session, except that
    they are not cut at the row's budget."""

    on_device = True

    def __init__(self, drafter: PromptLookupDrafter, context: DraftContext, max_nodes: int):
        super().__init__(drafter, context, max_nodes)
        lengths = torch.arange(1, drafter.max_ngram + 1, dtype=torch.float32, device=context.length.device)
        self._first_worth = (lengths * FIRST_WORTH).expand(len(context.length), -1)
        self._worth = self._first_worth.clone()  # [B, max_ngram]: estimated accepted tokens, by length of the match
        self._matched = torch.zeros_like(context.length)  # length of the row's last match, 0 for none

    def draft(self) -> DraftTree:
        root, width = self.context.root, self._width
        if width == 1:
            return DraftTree.root_only(root[:, None])
        copied, real = self._continuations()
        branch = torch.arange(copied.shape[1], device=root.device)[:, None]
        # tokens of two branches are one node if the branches are equal up to them; the earlier branch owns the node
        alike = (copied[:, :, None] == copied[:, None]) & real[:, :, None] & real[:, None]  # [B, M, M, D]
        alike = alike.int().cumprod(-1).bool()
        owner = torch.where(alike, branch, len(branch)).amin(2)
        number = (real & (owner == branch)).flatten(1).cumsum(1).view_as(copied)
        node = number.gather(1, owner.clamp(max=len(branch) - 1))
        parent = torch.nn.functional.pad(node[:, :, :-1], (1, 0))
        # tokens without a node of their own, and those beyond the limit, are written to place 0; the root then
        # overwrites it
        place = torch.where(real & (owner == branch) & (node < self._most), node, 0).flatten(1)
        tokens = root.new_zeros(len(root), width).scatter_(1, place, copied.flatten(1))
        parents = torch.full_like(tokens, -1, dtype=torch.int32).scatter_(1, place, parent.flatten(1).int())
        tokens[:, 0], parents[:, 0] = root, -1
        return DraftTree.from_parents(tokens, parents, self._depth, is_chain=self.drafter.branches == 1)

    def _continuations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The continuations of the M best matches: tokens [B, M, D] int64, and [B, M, D] bool, True for tokens inside
        the text."""
        context = self.context
        text, length = context.tokens[:, : context.max_length], context.length[:, None]
        columns = torch.arange(text.shape[1], device=text.device)
        running = (columns >= context.start[:, None]) & (columns < length)
        matched = torch.zeros_like(text)
        for back in range(min(self.drafter.max_ngram, text.shape[1])):
            same = text[:, : text.shape[1] - back] == text.gather(1, (length - back).clamp(min=0))
            running = running & torch.nn.functional.pad(same, (back, 0))
            running = running & (columns - back >= context.start[:, None])
            matched = matched + running
        # longest matches first, then earliest
        order = torch.where(matched > 0, (matched + 1) * len(columns) - columns, 0)
        best, end = order.topk(min(self.drafter.branches, len(columns)), dim=1)
        self._matched.copy_(matched.amax(1))
        if self.drafter.adaptive:
            best = torch.where(self._worth.gather(1, self._place) >= PAYS, best, 0)
        column = end[:, :, None] + 1 + torch.arange(self._depth, device=text.device)
        real = (best > 0)[:, :, None] & (column <= length[:, :, None])
        return text.gather(1, column.clamp(max=len(columns) - 1).flatten(1)).view_as(column), real

    @property
    def _place(self) -> torch.Tensor:
        """[B, 1] int64. The column of `_worth` for the length of the row's last match."""
        return (self._matched - 1).clamp(min=0)[:, None]

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        if not self.drafter.adaptive:
            return
        worth, first = (table.gather(1, self._place) for table in (self._worth, self._first_worth))
        learnt = worth + LEARNING * (accepted.length[:, None].float() - worth)
        drifted = worth + DRIFT * (first - worth)
        drafted = (tree.parents[:, 1:] >= 0).any(1, keepdim=True)
        now = torch.where(drafted, learnt, torch.where(self._matched[:, None] > 0, drifted, worth))
        self._worth.scatter_(1, self._place, now)


def _matches(text: np.ndarray, max_ngram: int, count: int) -> tuple[list[int], int]:
    """Earlier occurrences of the last tokens of `text` [L].

    Returns:
        The end positions of at most `count` matches, longest first, then earliest; and the length of the longest match,
        0 if there is none.
    """
    matched = np.zeros(len(text) - 1, dtype=np.int64)
    running = np.ones(len(text) - 1, dtype=bool)
    for back in range(min(max_ngram, len(text) - 1)):
        running[back:] &= text[: len(text) - 1 - back] == text[-1 - back]
        running[:back] = False
        matched += running
    ends = np.flatnonzero(matched)
    return ends[np.argsort(-matched[ends], kind="stable")][:count].tolist(), int(matched.max(initial=0))
