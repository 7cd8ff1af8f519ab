"""Literal statements of parallel drafts: P-EAGLE heads and PARD models. The tokens at all depths are computed at once,
from the whole text: nothing is cached, batched or masked but by the definition.

Sources: P-EAGLE (Hui et al. 2026, arXiv 2602.01469), PARD (An et al. 2025, arXiv 2504.18583), their training code, and
vLLM's reading of published heads.

The text is t_0, ..., t_n; the target has not run t_n, the root. Mask rows follow the root's row. Row i after the root's
predicts the token t_(n+1+i), whatever the tokens before it are.
"""

import torch

from checkpoints import Head
from literal_eagle import LiteralDraft

# Names of deliberate mistakes of both. The code that uses a name makes the mistake.
MISTAKES = (
    "another mask token",
    "one position for all mask rows",
    "mask rows one position late",
    "mask rows see each other",
    "other row",
    "keys of earlier mask rows",
)
PEAGLE_MISTAKES = (*MISTAKES, "mask states not through fc", "no norms of mask states")


def placed(tokens: list[int], mask: int, count: int, mistake: str, first: int = 0) -> tuple[list[int], list[int], int]:
    """The tokens and positions of all rows, and the number of the root's row: the rows of `tokens`, which end with the
    root's, and `count` - 1 mask rows. The first row has position `first`."""
    positions = list(range(first, first + len(tokens)))
    if mistake == "keys of earlier mask rows":  # of a round in which the token before the root was the root
        tokens = [*tokens[:-1], *[mask] * (count - 1), tokens[-1]]
        positions = [*positions[:-1], *(positions[-1] + each for each in range(count - 1)), positions[-1]]
    steps = [1 if mistake == "one position for all mask rows" else step for step in range(1, count)]
    late = positions[-1] + (mistake == "mask rows one position late")
    return [*tokens, *[mask] * (count - 1)], [*positions, *(late + step for step in steps)], len(tokens) - 1


class LiteralHead(LiteralDraft):
    """The draft of a P-EAGLE head after one text.

    Args:
        head, target, text, mistake, first: see `LiteralDraft`.
        count: the number of tokens that are drafted.

    Attributes:
        marginals: [count, V] fp64. Logits of the tokens at depths 1 to `count`; -inf outside the vocabulary.
    """

    mistakes = PEAGLE_MISTAKES

    def __init__(self, head: Head, target, text: list[int], count: int, mistake: str = "", first: int = 0):
        super().__init__(head, target, text, mistake, first)
        mask = abs(head.layout.mask_token - (mistake == "another mask token"))
        tokens, positions, self.root = placed(text[first + 1 :], mask, count, mistake, first)
        masks = self._mask_feature().expand(count - 1, -1)
        features = torch.cat([self.features, masks])
        if mistake == "keys of earlier mask rows":
            features = torch.cat([self.features[:-1], masks, self.features[-1:], masks])
        rows = self._rows(self.embed(torch.tensor(tokens)), features, positions)
        self.rows = rows[self.root - (mistake == "other row") :]
        self.marginals = torch.stack([self.logits((0,) * depth) for depth in range(count)])

    def _mask_feature(self) -> torch.Tensor:
        """[1, H]."""
        states = self.weights["mask_hidden"].flatten()[None]
        if self.mistake == "mask states not through fc":
            return states[:, : self.features.shape[1]]
        if self.mistake == "no norms of mask states":
            return self._linear("fc", states)
        return self._features(list(states.chunk(len(self.head.layout.states), 1)))

    def _seen(self, rows: int) -> torch.Tensor:
        seen = super()._seen(rows)
        if self.mistake == "mask rows see each other":
            seen[self.root :, self.root :] = 1
        return seen

    def output(self, path: tuple[int, ...]) -> torch.Tensor:
        """The output [H] of the row that predicts the token after the drafted tokens `path`. Only their number
        matters."""
        return self.rows[len(path)]


class LiteralModel:
    """The draft of a PARD model after one text. transformers runs the model over the text and the mask tokens.

    Args:
        model: the model in fp64, a copy that nothing else uses.
        mask: the mask token.
        text, count, mistake: see `LiteralHead`.

    Attributes:
        marginals: see `LiteralHead`.
    """

    def __init__(self, model, mask: int, text: list[int], count: int, mistake: str = ""):
        assert mistake in ("", *MISTAKES), mistake
        tokens, positions, root = placed(text, mask - (mistake == "another mask token"), count, mistake)
        named = {}
        if mistake:
            seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            seen[root:, root:] |= torch.tensor(mistake == "mask rows see each other")
            mask_of_scores = torch.zeros(seen.shape).double().masked_fill(~seen, float("-inf"))
            named = {"position_ids": torch.tensor([positions]), "attention_mask": mask_of_scores[None, None]}
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), **named).logits[0]
        first = root - (mistake == "other row")
        self.marginals = logits[first : first + count]
