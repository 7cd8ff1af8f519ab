"""A target and a draft whose logits are tables, drafting functions for every kind of tree, and batched generation.

The logits after a text depend on its last two tokens. Each row of a batch is an independent sample with its own seed;
rounds run until every row has its tokens. Letters: B rows, N nodes, V vocabulary, L length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from specdec_triton import Topology, ops
from specdec_triton.ops import noise
from specdec_triton.ops.filters import Filters, filtered_log_probs

START = 3  # real tokens before the first sampled one

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.3},
    "all": {"temperature": 1.3, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
}


def filters(options: dict, batch: int) -> Filters:
    made = {name: torch.full((batch,), value, dtype=ops.FILTER_DTYPES[name]) for name, value in options.items()}
    return Filters(**made, max_top_k=options.get("top_k"))


@dataclass(frozen=True)
class TableModels:
    """target, draft: [V + 1, V + 1, V] fp32 logits by the last two tokens; V stands for tokens of the prompt."""

    target: torch.Tensor
    draft: torch.Tensor

    @classmethod
    def random(cls, vocab: int, seed: int, spread: float = 1.5, agreement: float = 0.3) -> "TableModels":
        """Draft logits are partly the target's; some tokens are impossible for one of the two, or tie."""
        generator = torch.Generator().manual_seed(seed)
        shape = (vocab + 1, vocab + 1, vocab)
        target, other = (spread * torch.randn(shape, generator=generator) for _ in range(2))
        draft = agreement * target + (1 - agreement) * other
        target[0, 1, 0], draft[1, 0, 1], draft[0, 0] = -torch.inf, -torch.inf, target[0, 0]
        target[1, 1, :2] = target[1, 1, 2]
        return cls(target, draft)

    @property
    def vocab(self) -> int:
        return self.target.shape[-1]

    def text_probs(self, options: dict, length: int) -> torch.Tensor:
        """[V ** L] float64: the exact probability of every text of L tokens, the first token the slowest index."""
        table = self.target.flatten(0, 1)[:, None]
        probs = filtered_log_probs(table, filters(options, len(table))).double().exp().view_as(self.target)
        probs = probs / probs.sum(-1, keepdim=True)
        texts = probs[self.vocab, self.vocab]
        context = torch.tensor([[self.vocab, token] for token in range(self.vocab)])
        for _ in range(length - 1):
            texts = (texts.flatten()[:, None] * probs[context[:, 0], context[:, 1]]).flatten()
            tokens = torch.arange(self.vocab)
            context = torch.stack([context[:, 1].repeat_interleave(self.vocab), tokens.repeat(len(context))], dim=1)
        return texts


@dataclass
class Draft:
    """A drafted tree for the op. contexts: [B, N, 2], the last two tokens after each node."""

    tokens: torch.Tensor
    parents: torch.Tensor
    contexts: torch.Tensor
    sampling: str = "none"
    draft_row: torch.Tensor | None = None
    draft_filters: Filters = field(default_factory=Filters)


def grow(models: TableModels, topology: Topology, root: torch.Tensor, choose: Callable) -> Draft:
    """Draft a tree, node by node.

    Args:
        root: [B, 2]. The last two tokens.
        choose: (node, its rank among siblings, the last two tokens before it [B, 2]) -> token [B], -1 for none.
    """
    batch, num_nodes = len(root), topology.num_nodes
    tokens, parents, contexts = [root[:, 1]], [torch.full((batch,), -1)], [root]
    for node in range(1, num_nodes):
        parent = topology.parents[node]
        token = choose(node, topology.ranks[node], contexts[parent])
        # descendants of padding are padding
        real = (token >= 0) & ((parents[parent] >= 0) if parent else torch.ones(batch, dtype=torch.bool))
        tokens.append(token.clamp(min=0))
        parents.append(torch.where(real, parent, -1))
        contexts.append(torch.stack([contexts[parent][:, 1], tokens[-1]], dim=1))
    return Draft(torch.stack(tokens, 1), torch.stack(parents, 1).int(), torch.stack(contexts, 1))


def sampled(
    models: TableModels, topology: Topology, root: torch.Tensor, seeds: torch.Tensor, position: torch.Tensor,
    options: dict, sampling: str,
) -> Draft:  # fmt: skip
    """Children drawn from the draft's filtered probabilities, by the library's own noise keys."""
    given = filters(options, len(root))

    def choose(node, rank, context):
        logits = models.draft[context[:, 0], context[:, 1]][:, None]
        log_probs = filtered_log_probs(logits, given).squeeze(1)
        if sampling == "with":
            return (log_probs + noise.gumbel(seeds, position, node, noise.DRAFT, models.vocab)).argmax(-1)
        key = topology.parents[node]
        ranked, order = (log_probs + noise.gumbel(seeds, position, key, noise.DRAFT, models.vocab)).sort(
            descending=True
        )
        if rank >= models.vocab:
            return torch.full_like(seeds, -1)
        return torch.where(ranked[:, rank].isfinite(), order[:, rank], -1)

    draft = grow(models, topology, root, choose)
    draft.sampling, draft.draft_filters = sampling, given
    draft.draft_row = torch.arange(topology.num_nodes).int().expand(len(root), -1).contiguous()
    return draft


def ranked(models: TableModels, topology: Topology, root: torch.Tensor, *_) -> Draft:
    """Children are the draft's likeliest tokens, without sampling."""

    def choose(node, rank, context):
        logits = models.draft[context[:, 0], context[:, 1]]
        return logits.sort(descending=True, stable=True).indices[:, min(rank, models.vocab - 1)]

    return grow(models, topology, root, choose)


def coupled(
    models: TableModels, topology: Topology, root: torch.Tensor, seeds: torch.Tensor, position: torch.Tensor,
    options: dict, sampling: str,
) -> Draft:  # fmt: skip
    """Children are the draft's likeliest tokens after the target's own noise is added, as `ModelDrafter` chooses them
    under "coupled"."""
    given = filters(options, len(root))
    depths = topology.depths

    def choose(node, rank, context):
        log_probs = filtered_log_probs(models.draft[context[:, 0], context[:, 1]][:, None], given).squeeze(1)
        scores = log_probs + noise.gumbel(seeds, position + depths[node], 0, noise.COUPLED, models.vocab)
        best, order = scores.sort(descending=True)
        return torch.where(best[:, rank].isfinite(), order[:, rank], -1)

    return grow(models, topology, root, choose)


CHAIN = Topology.chain(2)
BRANCHES = Topology((-1, 0, 0, 1, 1, 2), (0, 0, 1, 0, 1, 0))
# name: (topology, drafting function, sampling)
TREES = {
    "sampled chain": (CHAIN, sampled, "with"),
    "sampled chain without": (CHAIN, sampled, "without"),  # the same distribution by other noise keys
    "one-hot chain": (CHAIN, ranked, "none"),
    "tree with replacement": (BRANCHES, sampled, "with"),
    "tree without replacement": (BRANCHES, sampled, "without"),
    "ranked tree": (BRANCHES, ranked, "none"),
    "coupled chain": (CHAIN, coupled, "none"),
    "coupled tree": (BRANCHES, coupled, "none"),
    "no draft": (Topology.chain(0), ranked, "none"),
}


def draft_tree(models, tree, root, seeds, position, options) -> Draft:
    topology, draw, sampling = TREES[tree]
    return draw(models, topology, root, seeds, position, options, sampling)


class Run(NamedTuple):
    """counts: [V ** L] of each text. text: [B, L]. accepted: [B] accepted tokens of each row's first round."""

    counts: torch.Tensor
    text: torch.Tensor
    accepted: torch.Tensor


def generate(
    models: TableModels, rule: str, tree: str, options: dict, length: int, samples: int, seed: int = 0,
    draft=draft_tree, impl: str | None = None,
) -> Run:  # fmt: skip
    """Round after round until each of `samples` rows has `length` tokens.

    Args:
        draft: (models, tree, root, seeds, position, options) -> `Draft`; mutants pass their own.
        impl: as in `ops.accept_sample`.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (samples,), generator=generator)
    # two tokens before the first, and a column for tokens beyond the end
    text = torch.full((samples, length + 3), models.vocab)
    done = torch.zeros(samples, dtype=torch.int64)
    first_accepted = None
    for _ in range(length):  # a round emits at least one token
        position, root = START + done, text.gather(1, done[:, None] + torch.arange(2))
        drafted = draft(models, tree, root, seeds, position, options)
        earlier, later = drafted.contexts.unbind(-1)
        drawn = {}
        if drafted.sampling != "none":
            drawn = {
                "draft_logits": models.draft[earlier, later],
                "draft_row": drafted.draft_row,
                "draft_filters": drafted.draft_filters,
            }
        num_nodes = drafted.tokens.shape[1]
        result = ops.accept_sample(
            models.target[earlier, later],
            drafted.tokens,
            drafted.parents,
            rule=rule,
            seeds=seeds,
            position=position,
            filters=filters(options, samples),
            max_depth=num_nodes - 1,
            # the first round is measured, so it is not cut
            budget=torch.full_like(done, num_nodes) if first_accepted is None else length - done,
            sampling=drafted.sampling,
            impl=impl,
            **drawn,
        )
        first_accepted = result.length if first_accepted is None else first_accepted
        emitted = torch.cat([drafted.tokens.gather(1, result.path.long().clamp(min=0)), root[:, :1]], dim=1)
        emitted.scatter_(1, result.length[:, None], result.next_ids[:, None])
        step = torch.arange(num_nodes)
        count = torch.where(done < length, result.length + 1, 0)
        place = done[:, None] + step
        text.scatter_(1, torch.where((step < count[:, None]) & (place < length), place, length) + 2, emitted)
        done = (done + count).clamp(max=length)
    text = text[:, 2:-1]
    powers = models.vocab ** torch.arange(length - 1, -1, -1)
    return Run(torch.bincount((text * powers).sum(1), minlength=models.vocab**length), text, first_accepted)
