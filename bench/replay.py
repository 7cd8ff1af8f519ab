"""Feeds a known text through a drafter without a model, and counts the rounds of a greedy call.

A greedy round accepts the draft tokens that the target's own text holds next. If that text is known, no forward is
needed, and a call takes seconds.
"""

from types import SimpleNamespace

import numpy as np
import torch

import specdec_triton as sdt
from specdec_triton.drafters import DraftContext
from specdec_triton.ops.reference import Acceptance
from specdec_triton.tree import DraftTree

VOCAB_SIZE = 2**31 - 1  # no token of a text is beyond it
_TARGET = SimpleNamespace(model=torch.nn.Module(), cache=None)


def replay(drafter: sdt.Drafter, prompt: list[int], output: list[int], max_new_tokens: int) -> dict[str, int]:
    """The counts of a call with a batch of 1 that emits `output`.

    Args:
        drafter: it drafts on the host.
        prompt: tokens of the prompt.
        output: tokens that plain greedy decoding emits after the prompt, at least one.
        max_new_tokens: of the call.

    Returns:
        rounds, draft tokens and accepted draft tokens, as in `Stats`.
    """
    counts = {"rounds": 0, "drafted": 0, "accepted": 0}
    text = np.array([*prompt, *output])
    length = len(prompt)  # column of the last emitted token; the prompt's forward emits the first one
    context = _context(text[: length + 1], len(prompt) + max_new_tokens)
    session = drafter.start(context) if len(output) > 1 else None
    while length < len(text) - 1:
        session.prepare()
        tree = session.draft()
        path = _accepted(tree, text[length:])
        padded = torch.full((1, tree.max_depth), -1, dtype=torch.int32)
        padded[0, : len(path)] = torch.tensor(path)
        emitted = text[length + 1 : length + len(path) + 2]
        none = torch.zeros(1, dtype=torch.bool)
        session.observe(tree, Acceptance(padded, torch.tensor([len(path)]), torch.tensor(emitted[-1:]), none))
        columns = slice(length + 1, length + 1 + len(emitted))
        context.host_tokens[0, columns], context.tokens[0, columns] = emitted, torch.from_numpy(emitted)
        length += len(emitted)
        context.host_length[:], context.length[:] = length, length
        context.host_budget[:] = context.max_length - 1 - length if length < len(text) - 1 else 0
        drafted = int((tree.parents >= 0).sum())
        session.observe_on_host([drafted], [len(emitted)])
        counts = {
            "rounds": counts["rounds"] + 1,
            "drafted": counts["drafted"] + drafted,
            "accepted": counts["accepted"] + len(path),
        }
    if session:
        session.finish()
    return counts


def _context(text: np.ndarray, max_length: int) -> DraftContext:
    """The state of a call after the prompt's forward."""
    host = np.zeros((1, max_length), dtype=np.int64)
    host[0, : len(text)] = text
    return DraftContext(
        tokens=torch.from_numpy(np.pad(host, ((0, 0), (0, 1)))),
        start=torch.zeros(1, dtype=torch.int64),
        length=torch.tensor([len(text) - 1]),
        host_tokens=host,
        host_length=np.array([len(text) - 1]),
        host_budget=np.array([max_length - len(text)]),
        max_length=max_length,
        vocab_size=VOCAB_SIZE,
        target=_TARGET,
    )


def _accepted(tree: DraftTree, text: np.ndarray) -> list[int]:
    """The nodes that `text` follows. It begins with the token of the root. Its last token is the target's own."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    path, node = [], 0
    for token in text[1:-1].tolist():
        node = next(
            (child for child in range(1, len(tokens)) if (parents[child], tokens[child]) == (node, token)), None
        )
        if node is None:
            break
        path.append(node)
    return path
