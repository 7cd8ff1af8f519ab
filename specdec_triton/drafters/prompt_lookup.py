"""Drafts copied from the text so far: the tokens that followed an earlier occurrence of the last few tokens.

It needs no draft model and helps if the output repeats its input, as in edits, quotes and summaries. Source: prompt
lookup decoding (Saxena 2023), as in transformers' `prompt_lookup_num_tokens`. Here several matches may become the
branches of one tree.
"""

from typing import NamedTuple

import numpy as np
import torch

from .. import ops
from ..ops.reference import Acceptance, longest_matches, update_estimates
from ..tree import DraftTree, Topology
from .base import DraftContext, Drafter, DraftSession, check_rule, check_static
from .timed import MATCH_CLASSES, Chances, Proposal, RoundTimes, may_use_times, padded_width, tree_of

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
        adaptive: draft only if matches of the same length were accepted often enough in this row. On a CPU, a forward
            over more rows takes longer. The measured times then decide whether a draft is made, and how long it is.
            Drafts therefore differ between runs, but texts do not. Under rules whose texts depend on the draft, which
            are all but "greedy" and "coupled", a constant threshold is used instead.

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
        if context.fixed_shapes:
            session: type[_Session] = _DeviceLookupSession
        else:
            session = _TimedLookupSession if self.adaptive and may_use_times(context) else _LookupSession
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


class _Match(NamedTuple):
    """A row's text, and the earlier occurrences of its last tokens."""

    text: np.ndarray  # without padding
    ends: list[int]  # last columns of the occurrences, the best first
    length: int  # of the longest match, 0 for none
    depth: int  # number of tokens that may be drafted


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
        if self.drafter.adaptive:
            # tokens accepted since the last draft; -1 if no round has ended since
            self._learn(context.host_length - self._length - 1)
        self._length = context.host_length.copy()
        matches = [self._match(row) for row in range(len(context.host_length))]
        self._matched[:] = [match.length if match.depth else 0 for match in matches]
        proposals = self._proposals(matches)
        drafted = [len(proposal.tokens) > 1 for proposal in proposals]
        self._drafted[:] = drafted
        if not any(drafted):
            return DraftTree.root_only(context.roots)
        return tree_of(proposals, self.max_depth, context.tokens.device)

    def _match(self, row: int) -> _Match:
        context = self.context
        text = context.host_tokens[row, self._start[row] : int(context.host_length[row]) + 1]
        ends, length = _matches(text, self.drafter.max_ngram, self.drafter.branches)
        depth = min(self._depth, max(int(context.host_budget[row]) - 1, 0))
        if ends:
            depth = min(depth, len(text) - 1 - min(ends))
        return _Match(text, ends, length, depth)

    def _learn(self, accepted: np.ndarray) -> None:
        """Update the estimates by the number of accepted tokens of the last draft [B]."""
        rows = np.flatnonzero((self._matched > 0) & (accepted >= 0))
        places = rows, self._matched[rows] - 1
        worth, first = self._worth[places], self._first_worth[places[1]]
        learnt = worth + np.float32(LEARNING) * (accepted[rows].astype(np.float32) - worth)
        drifted = worth + np.float32(DRIFT) * (first - worth)
        self._worth[places] = np.where(self._drafted[rows], learnt, drifted)

    def _proposals(self, matches: list[_Match]) -> list[Proposal]:
        """The draft of each row."""
        return [
            self._proposal(row, match)
            if match.length and (not self.drafter.adaptive or self._worth[row, match.length - 1] >= PAYS)
            else Proposal.nothing(int(match.text[-1]))
            for row, match in enumerate(matches)
        ]

    def _proposal(self, row: int, match: _Match) -> Proposal:
        """A trie of the continuations, cut at the largest number of nodes. All tokens have the chance 1."""
        text = match.text
        tokens, parents, children = [int(text[-1])], [-1], {}
        for end in match.ends if match.depth else ():
            node = 0
            for token in text[end + 1 : end + 1 + match.depth].tolist():
                if (node, token) not in children:
                    if len(tokens) == self._most:
                        break
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = children[node, token]
        return Proposal(tokens, parents, [1.0] * len(tokens), match.length)


class _TimedLookupSession(_LookupSession):
    """Lookup on the host that chooses the length of its drafts by the times of earlier rounds, see `timed`.

    If `tree="auto"` asks for a depth, the threshold of `_LookupSession` applies instead, because the depth was chosen
    by times already.
    """

    def __init__(self, drafter: PromptLookupDrafter, context: DraftContext, max_nodes: int):
        super().__init__(drafter, context, max_nodes)
        self.chances, self.times = Chances(len(self._start)), RoundTimes(context)
        self._asked, self._proposed = False, []

    def prepare(self, tree=None):
        self._asked = tree is not None
        return super().prepare(tree)

    def draft(self) -> DraftTree:
        tree = super().draft()
        self.times.drafted(tree.num_nodes)
        return tree

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        self.times.verified()

    def _learn(self, accepted: np.ndarray) -> None:
        if self._asked:
            return super()._learn(accepted)
        for row, proposal in enumerate(self._proposed):
            end = int(self.context.host_length[row]) + 1
            self.chances.learn(row, proposal, self.context.host_tokens[row, end - 1 - accepted[row] : end].tolist())

    def _proposals(self, matches: list[_Match]) -> list[Proposal]:
        if self._asked or not any(match.length for match in matches):
            self._proposed = []
            return super()._proposals(matches)
        self._proposed = [self._proposal(row, match) for row, match in enumerate(matches)]
        nodes = self.times.best(self._proposed, (self.context.host_budget > 0).tolist())
        return [proposal.first(nodes) for proposal in self._proposed]

    def _proposal(self, row: int, match: _Match) -> Proposal:
        proposal = super()._proposal(row, match)._replace(matched=_matched(match))
        return self.chances.applied(row, proposal)


def _matched(match: _Match) -> int:
    """Number of tokens that the best occurrence has in common with the text, beyond the longest n-gram of the lookup.
    It is compared up to the largest class of `MATCH_CLASSES`."""
    text, length = match.text, match.length
    while 0 < length < min(MATCH_CLASSES[-1], match.ends[0] + 1):
        if text[match.ends[0] - length] != text[len(text) - 1 - length]:
            break
        length += 1
    return length


class _DeviceLookupSession(_Session):
    """Lookup on the device. All rounds have the same width. The trees equal those of the host session with constant
    thresholds, except that they are not cut at the row's budget."""

    on_device = reusable = True

    def __init__(self, drafter: PromptLookupDrafter, context: DraftContext, max_nodes: int):
        super().__init__(drafter, context, max_nodes)
        length = context.length
        matches = torch.arange(1, drafter.max_ngram + 1, dtype=torch.float32, device=length.device)
        put = context.buffers.put
        worth = (matches * FIRST_WORTH).repeat(len(length), 1)
        self._worth = put("lookup.worth", worth)  # [B, max_ngram], see `_LookupSession`
        # [B, 3]: length of the last match, number of draft tokens, column of the root; see `ops.ngram_lookup`
        last_draft = torch.stack([torch.zeros_like(length), torch.zeros_like(length), length], 1)
        self._last_draft = put("lookup.last_draft", last_draft)

    def draft(self) -> DraftTree:
        context = self.context
        if self._most == 1:
            return DraftTree.root_only(context.roots)
        text, state = context.tokens, (self._worth, self._last_draft)
        threshold = PAYS if self.drafter.adaptive else 0.0
        weights = {"first": FIRST_WORTH, "learning": LEARNING, "drift": DRIFT}
        if self.drafter.branches == 1:
            shape = {"num_nodes": self._width, "max_depth": self._depth}
            columns = context.start, context.length
            tree = ops.ngram_lookup(text, *columns, *state, **shape, threshold=threshold, **weights, impl=context.impl)
            return DraftTree(*tree, max_depth=self._depth, is_chain=True)
        update_estimates(context.length, *state, **weights)
        return self._branches(text, threshold)

    def _branches(self, text: torch.Tensor, threshold: float) -> DraftTree:
        root, width = self.context.root, self._width
        copied, real = self._continuations(text, threshold)
        if width == 1:
            return DraftTree.root_only(root[:, None])
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
        return DraftTree.from_parents(tokens, parents, self._depth)

    def _continuations(self, text: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The continuations of the M best matches: tokens [B, M, D] int64, and [B, M, D] bool, True for tokens inside
        the text. It also records the match and the number of draft tokens for the next `update_estimates`."""
        context, depth = self.context, self._depth
        length, drafter = context.length[:, None], self.drafter
        matched, end = longest_matches(text, context.start, context.length, drafter.max_ngram, drafter.branches)
        longest = matched[:, :1] if depth else torch.zeros_like(length)
        drafts = (longest > 0) & (self._worth.gather(1, (longest - 1).clamp(min=0)) >= threshold)
        column = end[:, :, None] + 1 + torch.arange(depth, device=text.device)
        real = (drafts & (matched > 0))[:, :, None] & (column <= length[:, :, None])
        self._last_draft.copy_(torch.cat([longest, drafts.long(), length], 1))
        return text.gather(1, column.clamp(max=text.shape[1] - 1).flatten(1)).view_as(column), real


def _matches(text: np.ndarray, max_ngram: int, count: int) -> tuple[list[int], int]:
    """Earlier occurrences of the last tokens of `text` [L].

    Returns:
        The end positions of at most `count` matches, longest first, then earliest; and the length of the longest match,
        0 if there is none.
    """
    last = len(text) - 1
    ends = np.flatnonzero(text[:last] == text[last])
    if not len(ends):
        return [], 0
    running, matched = np.ones(len(ends), dtype=bool), np.ones(len(ends), dtype=np.int64)
    for back in range(1, min(max_ngram, last)):
        running &= (ends >= back) & (text[ends - back] == text[last - back])
        matched += running
    return ends[np.argsort(-matched, kind="stable")][:count].tolist(), int(matched.max())
