"""Random arguments of `accept_sample`: trees that are drawn from a draft close to the target."""

import torch

from helpers import DEVICE
from specdec_triton.ops import noise
from specdec_triton.ops.filters import Filters, filtered_log_probs

FILTERS = ("none", "temperature", "top_k", "top_p", "min_p", "all")


def filters_of(kind, batch, random):
    if kind == "none":
        return Filters()
    drawn = torch.rand(4, batch, generator=random)
    options = Filters(
        temperature=0.5 + drawn[0],
        top_k=torch.randint(1, 20, (batch,), generator=random),
        top_p=(0.3 + 0.6 * drawn[2]).double(),
        min_p=0.2 * drawn[3],
    )
    return options if kind == "all" else Filters(**{kind: getattr(options, kind)})


def draw_tokens(tokens, parents, probs, sampling, random):
    """Draw the children of node i from probs[b, i]. If the support is exhausted, the token is 0."""
    for row, parent in torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(tokens.shape[1])).tolist():
        children = (parents[row] == parent).nonzero().flatten()
        if len(children) and probs[row, parent].isfinite().all():
            support = int((probs[row, parent] > 0).sum())
            count = len(children) if sampling == "with" else min(len(children), support)
            chosen = torch.multinomial(probs[row, parent], count, sampling == "with", generator=random)
            tokens[row, children] = torch.nn.functional.pad(chosen, (0, len(children) - count))


def case(rule, sampling, batch=2, nodes=7, vocab=61, kind="none", dtype=torch.float32, seed=0, spread=0.5):
    """Keyword arguments of `reference.accept_sample`: random trees that are drawn from a draft close to the target."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, nodes, vocab, generator=random)
    draft_logits = (logits + spread * torch.randn(logits.shape, generator=random)).to(dtype)
    logits = logits.to(dtype)
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    for row in range(batch):
        for node in range(1, nodes):
            parents[row, node] = int(torch.randint(0 if node < 3 else -1, node, (), generator=random))
            if rule in ("rejection", "block") and parents[row, node] >= 0:
                parents[row, node] = node - 1
    filters, draft_filters = filters_of(kind, batch, random), filters_of(kind, batch, random)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=random)
    draft_probs = filtered_log_probs(draft_logits, draft_filters).exp()
    draw_tokens(tokens, parents, draft_probs, "with" if sampling == "none" else sampling, random)
    if rule == "coupled":
        follow_noise(logits, tokens, parents, filters, seed)
    arguments = {
        "logits": logits,
        "tokens": tokens,
        "parents": parents,
        "rule": rule,
        "seeds": torch.arange(batch) * 2**40 - seed,
        "position": torch.arange(batch) * 3 + 2**20,
        "filters": filters,
        "max_depth": nodes - 1,
        "budget": torch.full((batch,), nodes),
        "eos_ids": None,
        "sampling": sampling,
        "draft_logits": None,
        "draft_row": None,
        "draft_filters": Filters(),
    }
    if sampling != "none":
        arguments |= {"draft_logits": draft_logits, "draft_filters": draft_filters}
        # the rows are in a different order than the nodes
        arguments |= {"draft_row": torch.arange(nodes - 1, -1, -1).int().expand(batch, -1).clone()}
        arguments["draft_logits"] = draft_logits.flip(1).contiguous()
    return on_device(arguments)


def follow_noise(logits, tokens, parents, filters, seed):
    """Give about half of the nodes the token that the target will choose after their parent."""
    batch, nodes, vocab = logits.shape
    log_probs = filtered_log_probs(logits, filters)
    seeds, position = torch.arange(batch) * 2**40 - seed, torch.arange(batch) * 3 + 2**20
    for row in range(batch):
        depth = [0]
        for node in range(1, nodes):
            depth.append(depth[max(int(parents[row, node]), 0)] + 1)
            if parents[row, node] >= 0 and node % 3:
                at = position[row : row + 1] + depth[node]
                added = noise.gumbel(seeds[row : row + 1], at, 0, noise.COUPLED, vocab)[0]
                tokens[row, node] = (log_probs[row, parents[row, node]] + added).argmax()


def on_device(arguments):
    def moved(value):
        if isinstance(value, Filters):
            return Filters(*(moved(field) for field in value))
        return value.to(DEVICE) if torch.is_tensor(value) else value

    return {name: moved(value) for name, value in arguments.items()}
