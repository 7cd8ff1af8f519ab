"""Drafts copied from texts: from the text of the call, from earlier outputs and from a corpus.

The last tokens of the text are looked up. The tokens that followed them elsewhere become a tree, and each is as likely
as it was frequent. It needs no draft model and helps if texts repeat each other, as in edits of the same file, agents
that call tools, and code.

Source: SuffixDecoding (Oliaro et al. 2024, arXiv 2411.04975). A corpus instead of earlier outputs is REST (He et al.
2023, arXiv 2311.08252).
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..ops.reference import Acceptance
from ..ops.rules import CHAIN_RULES
from ..tree import DraftTree, Topology
from .base import DraftContext, Drafter, DraftSession, check_rule, check_static, most_nodes_each
from .corpus import corpus_of
from .fallback import FallbackSession
from .history import History
from .matches import Matches, ScannedText, Texts
from .timed import Chances, Proposal, RoundTimes, may_use_times, tree_of, width_of

MOST_NODES = 64  # of a draft, the last emitted token included
MOST_MATCHED = 64  # number of tokens that are compared; with `num_tokens` at most the tokens by which texts are sorted
# First estimates of `Chances` for kept texts. Short matches with other texts are right less often than matches within a
# text. They were chosen in the same way as `timed.FIRST_CHANCES`. The first is not used, see `KEPT_MATCHED`.
KEPT_CHANCES = (0.1, 0.2, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95)
# With estimates, a kept text must match at least so many tokens, and more than the text itself does. Shorter matches
# seldom pay, and have many places.
KEPT_MATCHED = 2
# If times do not decide, a draft pays if so many accepted tokens are expected. On an H200, a round of an 8B target with
# 64 nodes took 1.26 times as long as a plain step (commit 8c943c0).
PAYS = 0.3
PROMPT_TAIL = 16  # number of prompt tokens that are kept before an output, so that its first tokens can be drafted


class SuffixDrafter(Drafter):
    """Looks the last tokens up in the text of the call, in earlier outputs and in a corpus.

    A drafter outlives calls: at the end of each call it keeps the outputs, with the last tokens of the prompt. Calls of
    several threads and models with one tokenizer may use the same drafter.

    A draft must not depend on the random numbers that verify it. Under sampling rules other than "coupled", a call
    therefore drafts no kept output if one of them was sampled with a seed of this call. The texts of a corpus must not
    be sampled with such a seed either.

    Args:
        num_tokens: largest depth of a draft, at most 64.
        tokens_per_match: a draft after a match of m tokens is at most m times this deep.
        min_prob: tokens whose estimated probability is below this are not drafted.
        history_tokens: number of tokens of earlier outputs that are kept. The first are dropped first. 0 keeps none.
        fallback: a drafter that runs a model or a trained head. It drafts for a sequence if fewer than `fallback_below`
            accepted tokens are expected of the texts' draft, see `FallbackSession`. `tree` then sets the shape of its
            drafts, and a number of nodes limits both kinds of drafts.
        fallback_below: see `fallback`. None estimates the number at which both kinds of drafts are equally fast, from
            the sizes of the models and the tokens that the fallback's drafts had accepted.
        adaptive: draft only if it is expected to pay. The estimate of a row follows the drafts that would have been
            right so far. On a CPU, measured times then decide whether a draft is made, and how large it is. Drafts
            therefore differ between runs, but texts do not. False drafts as long as counts allow, as in the paper.

    Attributes:
        history: the earlier outputs and the corpus.

    Raises:
        ValueError: a number is out of range, or `fallback` runs no model.
    """

    def __init__(
        self,
        num_tokens: int = 32,
        *,
        tokens_per_match: float = 4.0,
        min_prob: float = 0.1,
        history_tokens: int = 1_000_000,
        adaptive: bool = True,
        fallback: Drafter | None = None,
        fallback_below: float | None = None,
    ):
        if isinstance(history_tokens, bool) or not isinstance(history_tokens, int) or history_tokens < 0:
            raise ValueError(f"SuffixDrafter: history_tokens must be an integer of at least 0, got {history_tokens!r}")
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 1 <= num_tokens <= MOST_MATCHED:
            raise ValueError(f"SuffixDrafter: num_tokens must be an integer of 1 to {MOST_MATCHED}, got {num_tokens!r}")
        if fallback is not None and not getattr(fallback, "follows_text", False):
            raise ValueError(
                "SuffixDrafter: fallback must be a drafter that runs a model or a trained head, got "
                f"{type(fallback).__name__}"
            )
        for name, number, least, most in (
            ("tokens_per_match", tokens_per_match, 0, math.inf),
            ("min_prob", min_prob, 0, 1),
            ("fallback_below", 1 if fallback_below is None else fallback_below, 0, math.inf),
        ):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not least < number <= most:
                raise ValueError(
                    f"SuffixDrafter: {name} must be a number above {least}, at most {most}, got {number!r}"
                )
        self.num_tokens, self.tokens_per_match, self.min_prob = num_tokens, tokens_per_match, min_prob
        self.history_tokens, self.adaptive = history_tokens, adaptive
        self.fallback, self.fallback_below = fallback, fallback_below
        self.history = History(history_tokens)

    @classmethod
    def from_texts(
        cls, tokenizer: PreTrainedTokenizerBase, files: str | Path | Iterable[str | Path], **options
    ) -> "SuffixDrafter":
        """A drafter with a corpus.

        Args:
            tokenizer: the target's.
            files: paths of text files, or of .jsonl files with one text in each line, see `corpus.read_texts`.
            options: arguments of the drafter.

        Raises:
            ValueError: a file is malformed; the message names it.
            OSError: a file cannot be read.
        """
        drafter = cls(**options)
        drafter.history = corpus_of(tokenizer, files, drafter.history_tokens)
        return drafter

    @classmethod
    def load(cls, file: str | Path, **options) -> "SuffixDrafter":
        """A drafter with the texts that `save` wrote. `options` are arguments of the drafter.

        Raises:
            ValueError: the file was not written by `save`.
        """
        drafter = cls(**options)
        drafter.history = History.load(file, drafter.history_tokens)
        return drafter

    def save(self, file: str | Path) -> None:
        """Write the earlier outputs and the corpus to a file."""
        self.history.save(file)

    def clear(self) -> None:
        """Forget the earlier outputs. The corpus stays."""
        self.history.clear()

    @property
    def resizable(self) -> bool:
        return self.fallback is None

    def taps(self, model):
        return () if self.fallback is None else self.fallback.taps(model)

    def prompt_reader(self, context):
        return None if self.fallback is None else self.fallback.prompt_reader(context)

    def graph_hazard(self):
        return None if self.fallback is None else self.fallback.graph_hazard()

    def check(self, model, rule=None, tree=None):
        if self.fallback is not None:
            self.fallback.check(model, rule, tree)
            return
        check_static("SuffixDrafter", tree)
        check_rule(self, rule, is_chain=rule in CHAIN_RULES)
        if isinstance(tree, Topology) and not tree.is_chain:
            raise ValueError(
                "SuffixDrafter: tree must be None, a number of nodes or a chain (its branches come from the texts), "
                f"got a topology of {tree.num_nodes} nodes"
            )

    def start(self, context, tree=None):
        if self.fallback is None:
            return SuffixSession(self, context, tree)
        suffix = SuffixSession(self, context, tree if isinstance(tree, int) else None)
        return FallbackSession(suffix, self.fallback, self.fallback_below, context, tree)


class SuffixSession(DraftSession):
    """Looks texts up on the host. The tree of each round is as wide as its widest row.

    Args:
        drafter: gives the options and the history.
        context: the call's sequences.
        tree: largest number of nodes, or a topology with that number; a chain asks for chains.
    """

    trusted = chains_only = True

    def __init__(self, drafter: SuffixDrafter, context: DraftContext, tree: Topology | int | None = None):
        self.drafter, self.context = drafter, context
        batch = len(context.host_length)
        self._chain = context.rule in CHAIN_RULES or (isinstance(tree, Topology) and tree.is_chain)
        if isinstance(tree, Topology):
            tree = tree.num_nodes
        self._most = min(MOST_NODES, most_nodes_each(batch)) if tree is None else tree
        self.max_nodes = width_of(self._most, context.fixed_shapes)
        self.max_depth = self._depth = min(drafter.num_tokens, self._most - 1)
        self._asked = False
        self._start = context.start.tolist()  # read from the device, as the seeds below, before the first round
        self._first = context.host_length.copy()  # column of the first emitted token
        # of tokens copied from the text itself, and from kept texts
        self.chances = Chances(batch), Chances(batch, KEPT_CHANCES)
        self.times = RoundTimes(context) if drafter.adaptive and may_use_times(context) else None
        self._seeds = None if context.seeds is None else context.seeds.tolist()
        # the other rules verify drafts by the random numbers by which an output of the same seed was sampled
        depends = context.rule not in ("greedy", "coupled")
        self._kept: tuple[Texts, ...] = drafter.history.sources(self._seeds if depends and self._seeds else ())
        self._length = context.host_length.copy()
        self._proposals: list[tuple[Proposal, Chances]] = []

    def prepare(self, tree=None):
        """A requested `tree` asks for a chain of its depth."""
        self._asked = tree is not None
        self._depth = self.max_depth if tree is None else min(self.max_depth, tree.max_depth)

    def draft(self) -> DraftTree:
        proposals = self.cut(self.propose())
        if all(len(proposal.tokens) == 1 for proposal in proposals):
            tree = DraftTree.root_only(self.context.roots)
        else:
            tree = self.tree_of(proposals)
        if self.times is not None:
            self.times.drafted(tree.num_nodes)
        return tree

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        if self.times is not None:
            self.times.verified()

    def finish(self) -> None:
        """Keep the outputs for later calls."""
        texts = self.context.host_tokens
        for row, (start, first) in enumerate(zip(self._start, self._first.tolist(), strict=True)):
            text = texts[row, max(start, first - PROMPT_TAIL) : int(self.context.host_length[row]) + 1]
            self.drafter.history.add(text, self._seeds and self._seeds[row])

    def propose(self) -> list[Proposal]:
        """The draft of each row, before it is decided whether it pays. Finished rows have none."""
        context = self.context
        for row, (proposal, chances) in enumerate(self._proposals):
            emitted = context.host_tokens[row, self._length[row] + 1 : context.host_length[row] + 1]
            chances.learn(row, proposal, emitted.tolist())
        self._length = context.host_length.copy()
        self._proposals = [self._propose(row) for row in range(len(self._length))]
        return [proposal for proposal, _ in self._proposals]

    def cut(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The parts of the proposals that are expected to pay. `tree="auto"` has decided it already."""
        if not self.drafter.adaptive or self._asked:
            return list(proposals)
        if self.times is None:
            return [proposal if proposal.expected >= PAYS else proposal.first(1) for proposal in proposals]
        nodes = self.times.best(proposals, (self.context.host_budget > 0).tolist())
        return [proposal.first(nodes) for proposal in proposals]

    def tree_of(self, proposals: Sequence[Proposal]) -> DraftTree:
        """The tree with a proposal for each row."""
        few_shapes = self.context.fixed_shapes
        chains = self._chain or self._asked or (False if few_shapes else None)
        return tree_of(proposals, self.max_depth, self.context.tokens.device, chains, few_shapes)

    def _propose(self, row: int) -> tuple[Proposal, Chances]:
        """The best proposal for a row, and the estimates that it was made with."""
        text = self.context.host_tokens[row, self._start[row] : int(self.context.host_length[row]) + 1]
        depth, tail = min(self._depth, int(self.context.host_budget[row]) - 1), text[-MOST_MATCHED:]
        best = Proposal.nothing(int(text[-1])), self.chances[0]
        if depth < 1:
            return best
        least = 1
        for sources, chances in zip(((ScannedText(text),), self._kept), self.chances, strict=True):
            lengths, matched = [], 0
            for source in sources:
                lengths.append(source.longest(tail, max(matched, least)))
                matched = max(matched, lengths[-1])
            if self.drafter.adaptive:
                least = max(matched + 1, KEPT_MATCHED)
            if not matched:
                continue
            pairs = zip(sources, lengths, strict=True)
            found = [source.find(tail[-matched:]) for source, length in pairs if length == matched]
            longest = max(int(min(self.drafter.tokens_per_match * matched, depth)), 1)
            proposal = self._tree(partial(chances.of, row), int(text[-1]), found, matched, longest)
            best = max(best, (proposal, chances), key=lambda pair: (round(pair[0].expected, 9), pair[0].matched))
        return best

    def _tree(
        self, chance_after: Callable[[int], float], root: int, found: list[Matches], matched: int, depth: int
    ) -> Proposal:
        """The most likely tokens after the places `found`, best first."""
        tokens, parents, chances = [root], [-1], [1.0]
        # tokens that may be added, the likeliest first: minus the chance of the token, a number that breaks ties, the
        # parent, the token, its share of the places of the root, its depth, and the places of its parent
        heap: list[tuple] = []
        order = 0

        def expand(node: int, share: float, below: int, places: list[Matches]) -> None:
            nonlocal order
            right = chance_after(matched + below - 1) if self.drafter.adaptive else 1.0
            for token, ratio in next_tokens(places, self.drafter.min_prob / share, self._chain or self._asked):
                if token >= self.context.vocab_size:  # a corpus or another model may have more tokens
                    continue
                order += 1
                heapq.heappush(heap, (-chances[node] * ratio * right, order, node, token, share * ratio, below, places))

        expand(0, 1.0, 1, found)
        while heap and len(tokens) < self._most:
            chance, _, parent, token, share, level, places = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            chances.append(-chance)
            if level < depth:
                followed = [after for each in places if (after := each.after(token)).count]
                if followed:
                    expand(len(tokens) - 1, share, level + 1, followed)
        return Proposal(tokens, parents, chances, matched)


def next_tokens(places: list[Matches], min_ratio: float, only_best: bool = False) -> list[tuple[int, float]]:
    """The tokens that follow at all these places, and the ratio of the places where each follows. Tokens with a ratio
    below `min_ratio` are left out.

    Args:
        places: places in several texts, all followed by a token.
        min_ratio: the least ratio.
        only_best: True for the most frequent token alone.
    """
    total = sum(each.count for each in places)
    least = max(math.ceil(min_ratio * total - 1e-9), 1)  # products of ratios are rounded
    # a token that follows at `least` places follows at so many in some text
    somewhere = -(-least // len(places))
    found = [each.next_tokens(somewhere) for each in places]
    if len(places) == 1:
        counts = found[0]
    else:
        counts = {token: sum(each.count_of(token) for each in places) for token in dict.fromkeys(chain(*found))}
    ratios = [(token, count / total) for token, count in counts.items() if count >= least]
    return [max(ratios, key=lambda pair: pair[1])] if only_best and ratios else ratios
