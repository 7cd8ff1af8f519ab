"""A literal statement of the drafts of layers for multi-token prediction (MTP). Every node is computed from the whole
text: nothing is cached or batched. The decoder blocks are transformers' own modules, in fp64.

Sources: the DeepSeek-V3 report (arXiv 2412.19437), transformers' `MtpModel` and `MTPCandidateGenerator`.

The text is t_0, ..., t_n; the target has not run t_n, the root. Row i of the first layer joins token t_(i+1) with the
target's hidden state at position i after its final norm, and predicts t_(i+2). With K layers, row i of layer k joins
token t_(i+k+1) with the output of row i of layer k - 1, and predicts t_(i+k+2). A single layer is recycled: the row of
a drafted token joins it with the layer's own output at the row before. An output is that after the layer's last norm,
which is also the input of the target's language head.
"""

import math

import torch
from torch.nn.functional import linear

from families import WINDOW
from literal_eagle import DraftedTrees, rms_norm
from mtp_checkpoints import EPS, MtpCheckpoint

# Names of deliberate mistakes. The code that uses a name makes the mistake.
MISTAKES = (
    "other order of the halves",
    "hidden state before the final norm",
    "input of the last layer",
    "no norm of embeddings",
    "no norm of hidden states",
    "swapped norms",
    "no shift",
    "one position for all levels",
    "feedback before the post norm",
    "no post norm",
    "final norm for the post norm",
    "other kind of norm",
    "target's states for drafted tokens",
    "own score",
    "no window",
    "first layer for all levels",
    "no further shift in later layers",
)


class LiteralDraft(DraftedTrees):
    """The draft after one text.

    Args:
        checkpoint: the MTP layers.
        target: the target. It is called with hooks, so it must be a copy that nothing else uses.
        text: t_0, ..., t_n.
        mistake: one of `MISTAKES`, or "" for none.
        first: the number of the first row that exists; earlier positions are unknown to the layers.

    Attributes:
        margin: see `DraftedTrees`.
    """

    mistakes = MISTAKES

    def __init__(self, checkpoint: MtpCheckpoint, target, text: list[int], mistake: str = "", first: int = 0):
        super().__init__(text, mistake)
        self.mtp, self.layout, self.first = checkpoint.mtp, checkpoint.mtp.layout, first
        self.layers = self.mtp.layers
        self.embed = lambda tokens: target.get_input_embeddings()(tokens).detach().double()
        self.head = target.get_output_embeddings().weight.detach().double()
        self.final_norm = target.get_decoder().norm
        self.features = self._states(target)[first:]
        self.outputs: dict[tuple[int, ...], torch.Tensor] = {}

    def _states(self, target) -> torch.Tensor:
        """The target's hidden states at the positions before the root, [n, H]."""
        caught = {}
        decoder = target.get_decoder()
        hooks = [
            decoder.layers[-1].register_forward_pre_hook(lambda _, args: caught.update(layer=args[0])),
            decoder.norm.register_forward_pre_hook(lambda _, args: caught.update(before=args[0])),
            decoder.norm.register_forward_hook(lambda _, args, output: caught.update(after=output)),
        ]
        with torch.no_grad():
            target(input_ids=torch.tensor([self.text[:-1]]), use_cache=False)
        for hook in hooks:
            hook.remove()
        wrong = {"hidden state before the final norm": "before", "input of the last layer": "layer"}
        return caught[wrong.get(self.mistake, "after")][0].double()

    def _norm(self, norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = norm.weight.detach().double()
        if self.layout.plus_one != (self.mistake == "other kind of norm"):
            weight = 1 + weight
        return rms_norm(x, weight, EPS)

    def _rows(self, k: int, tokens: list[int], features: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """The outputs [n, H] of the block of layer k, before the layer's last norm."""
        layer, kind = self.layers[k], self.mtp.kind(k)
        norms = [layer.enorm, layer.hnorm]
        if self.mistake == "swapped norms":
            norms.reverse()
        halves = [self.embed(torch.tensor(tokens)), features]
        for place, name in enumerate(("no norm of embeddings", "no norm of hidden states")):
            if self.mistake != name:
                halves[place] = self._norm(norms[place], halves[place])
        if self.layout.names.hidden_first != (self.mistake == "other order of the halves"):
            halves.reverse()
        x = linear(torch.cat(halves, -1), layer.eh_proj.weight)[None]
        places = torch.tensor([positions])
        gap = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
        seen = gap >= 0
        if kind == "sliding_attention" and self.mistake != "no window":
            seen &= gap < WINDOW
        with torch.no_grad():
            found = layer.block(
                x,
                attention_mask=torch.zeros(seen.shape).double().masked_fill(~seen, -math.inf)[None, None],
                position_ids=places,
                position_embeddings=self.mtp.cos_sin(x, places, k),
            )
        return found[0]

    def rows(self, path: tuple[int, ...]) -> torch.Tensor:
        """The outputs [n, H] of the block, before the layer's last norm, in all rows of the level that predicts the
        token after the text and the drafted tokens `path`."""
        if path not in self.outputs:
            k, shift = self._level(path), 0 if self.mistake == "no shift" else 1
            if len(self.layers) > 1:
                features = self.normed(self._level(path[:-1]), self.rows(path[:-1])) if path else self.features
                shift += 0 if self.mistake == "no further shift in later layers" else len(path)
            else:
                features = torch.stack([*self.features, *(self._fed_back(path[:end]) for end in range(len(path)))])
            tokens = [*self.text, *path][self.first + shift :][: len(features)]
            positions = [self.first + shift + row for row in range(len(features))]
            if self.mistake == "one position for all levels":
                positions = [min(position, positions[len(self.features) - 1]) for position in positions]
            self.outputs[path] = self._rows(k, tokens, features, positions)
        return self.outputs[path]

    def _level(self, path: tuple[int, ...]) -> int:
        """The number of the layer that predicts the token after `path`."""
        return 0 if self.mistake == "first layer for all levels" else len(path) % len(self.layers)

    def _fed_back(self, path: tuple[int, ...]) -> torch.Tensor:
        """The input [H] of a recycled layer in place of the target's hidden state."""
        if self.mistake == "target's states for drafted tokens":
            return self.features[-1]
        return self.normed(0, self.rows(path)[-1])

    def normed(self, k: int, outputs: torch.Tensor, feedback: bool = True) -> torch.Tensor:
        """The outputs of layer k after its last norm, to be fed back or for the language head."""
        if self.mistake == "no post norm" or (feedback and self.mistake == "feedback before the post norm"):
            return outputs
        wrong = self.mistake == "final norm for the post norm"
        return self._norm(self.final_norm if wrong else self.layers[k].post_norm, outputs)

    def logits(self, path: tuple[int, ...]) -> torch.Tensor:
        """The logits [V] of the token after the text and the drafted tokens `path`."""
        return linear(self.normed(self._level(path), self.rows(path)[-1], feedback=False), self.head)
