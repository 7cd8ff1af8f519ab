"""A literal statement of the drafts of DFlash heads. A block is computed by itself, from the whole text: nothing is
cached or batched.

Sources: DFlash (Chen et al. 2026, arXiv 2602.06036), its code z-lab/dflash, vLLM's reading of published heads, Muse
Glimmer's assistant in transformers.

The text is t_0, ..., t_n; the target has not run t_n, the root. A row of context is made of the target's states at
position i < n. It has keys and values, but no queries. The rows of the block are the root and mask tokens, at positions
n, n + 1, .... They attend to the context and to each other. Row i predicts the token at its own position.
"""

import heapq
import math

import torch
from torch.nn.functional import linear, silu

from checkpoints import Head
from literal_eagle import LiteralDraft, rotated

# Names of deliberate mistakes. The code that uses a name makes the mistake.
MISTAKES = (
    "other row",
    "causal block",
    "block that is not causal",
    "mask token in place of the root",
    "embedding of the target",
    "other scale of embeddings",
    "context through the input norm",
    "no norm of the context",
    "no context of the last token",
    "context of the block before",
    "block one position early",
    "no window",
    "window without its last key",
    "states in reverse order",
    "neighbouring states",
    "offsets as ids",
    "rope base of the target",
    "no rope scaling",
    "no biases of attention",
    "no norms of queries and keys",
    "no norm before the head",
    "no softcap of logits",
    "one layer",
    "own score",
)


class LiteralBlock(LiteralDraft):
    """The draft of a DFlash head after one text. Its marginals do not depend on drafted tokens.

    Args:
        head, target, text, mistake, first: see `LiteralDraft`; positions before `first` are unknown to the head.

    Attributes:
        marginals: [D, V] fp64. Logits of the tokens at depths 1 to D after the root; -inf outside the vocabulary.
        margin: see `LiteralDraft`.
    """

    mistakes = MISTAKES

    def __init__(self, head: Head, target, text: list[int], mistake: str = "", first: int = 0):
        super().__init__(head, target, text, mistake, first)
        table = target.get_input_embeddings()
        if "embed_tokens.weight" not in self.weights:
            scaled = hasattr(table, "embed_scale") != (mistake == "other scale of embeddings")
            scale = head.layout.hidden or target.config.get_text_config().hidden_size
            rows = table.weight.detach().double() * (scale**0.5 if scaled else 1)
            self.embed = lambda tokens: rows[tokens]
        self.cap = None
        if "lm_head.weight" not in head.tensors and mistake != "no softcap of logits":
            self.cap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)
        self.kept: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = []
        if mistake == "context of the block before" and len(text) - first > 2:
            self._block(self.features[:-1], text[-2], len(text) - 2)
        self.marginals = self._block(self.features, text[-1], len(text) - 1)

    # --- the head

    def _features(self, states: list[torch.Tensor]) -> torch.Tensor:
        """The rows of the context, [n, H]."""
        joined = self._linear("fc", torch.cat(states, -1))
        return joined if self.mistake == "no norm of the context" else self._norm("hidden_norm", joined)

    def _block(self, context: torch.Tensor, root: int, position: int) -> torch.Tensor:
        """The marginals [D, V] after a root at a position, for rows of context [n, H]."""
        layout, mistake = self.head.layout, self.mistake
        if mistake == "no context of the last token":
            context = context[:-1]
        tokens = [layout.mask if mistake == "mask token in place of the root" else root]
        tokens += [layout.mask] * (layout.block_size - 1)
        before = list(range(self.first, self.first + len(context)))
        begin = position - (mistake == "block one position early")
        own = list(range(begin, begin + len(tokens)))
        x = self.embed(torch.tensor(tokens))
        kept, self.kept = self.kept, []
        for layer in range(1 if mistake == "one layer" else layout.num_layers):
            name = f"layers.{layer}"
            seen = context
            if mistake == "context through the input norm":
                seen = self._norm(f"{name}.input_layernorm", context)
            attended = self._norm(f"{name}.input_layernorm", x)
            earlier = kept[layer] if kept else None
            x = x + self._block_attention(layer, seen, before, attended, own, earlier)
            inner = self._norm(f"{name}.post_attention_layernorm", x)
            gate, up = (linear(inner, self.weights[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
            x = x + linear(silu(gate) * up, self.weights[f"{name}.mlp.down_proj.weight"])
        if mistake != "no norm before the head":
            x = self._norm("norm", x)
        rows = linear(x, self.weights["lm_head.weight"])
        if layout.from_anchor == (mistake == "other row"):
            rows = rows[1:]
        else:
            rows = rows[: layout.block_size if layout.from_anchor else layout.block_size - 1]
        if self.cap is not None:
            rows = self.cap * torch.tanh(rows / self.cap)
        return torch.stack([self._named(row) for row in rows])

    def _block_attention(self, layer, context, before, block, own, earlier) -> torch.Tensor:
        """The update [b, H] that the attention of a layer makes to the rows `block` [b, H] at the positions `own`.

        They also see the rows `context` [n, H] at the positions `before`, and the keys, values and positions `earlier`
        of another block, if it is given.
        """
        layout, size, mistake = self.head.layout, self.head.head_dim, self.mistake
        heads, kv_heads, _ = layout.heads
        name = f"layers.{layer}.self_attn"

        def projected(part: str, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
            rows = self._linear(f"{name}.{part}_proj", x).view(len(x), -1, size)
            if part == "v":
                return rows
            if mistake != "no norms of queries and keys":
                rows = self._norm(f"{name}.{part}_norm", rows)
            return rotated(rows, positions, self.radians)

        queries = projected("q", block, own)
        keys, values = (torch.cat([projected(each, context, before), projected(each, block, own)]) for each in "kv")
        self.kept.append((keys[len(context) :], values[len(context) :], own))
        positions, number = before + own, [-1] * len(before) + list(range(len(own)))
        if earlier is not None:
            keys, values = torch.cat([keys, earlier[0]]), torch.cat([values, earlier[1]])
            positions, number = positions + earlier[2], number + [-1] * len(earlier[2])
        window = layout.windows[layer] if layout.windows and mistake != "no window" else None
        if window is not None:
            window -= mistake == "window without its last key"
        causal = layout.causal[layer]
        causal = causal or mistake == "causal block"
        causal = causal and mistake != "block that is not causal"
        outputs = []
        for row, at in enumerate(own):
            sees = [
                place
                for place, position in enumerate(positions)
                if (window is None or at - position < window) and not (causal and number[place] > row)
            ]
            parts = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                weights = (keys[sees, group] @ queries[row, head] / size**0.5).softmax(-1)
                parts.append(weights @ values[sees, group])
            outputs.append(torch.cat(parts))
        return self._linear(f"{name}.o_proj", torch.stack(outputs))

    # --- its drafts

    @property
    def depth(self) -> int:
        return len(self.marginals)

    def logits(self, path: tuple[int, ...]) -> torch.Tensor:
        """The logits [V] of the token after the root and the drafted tokens `path`. Only their number matters."""
        return self.marginals[len(path)]

    def chain(self, length: int) -> list[int]:
        """The tokens of a chain of the best tokens, without the root."""
        return [self.best(row.tolist(), 1)[0] for row in self.marginals[:length]]

    def likeliest(
        self, num_nodes: int, depth: int, width: int, log_probs: torch.Tensor | None = None
    ) -> dict[tuple[int, ...], float]:
        """The most likely paths and their log-probabilities, the sums of those of their tokens. The root's path is ().

        Args:
            num_nodes: the number of paths.
            depth: the largest number of tokens of a path.
            width: so many tokens of each depth are candidates.
            log_probs: [D, V]. Of the tokens at each depth; None for those of `marginals`.
        """
        log_probs = self.marginals.log_softmax(-1) if log_probs is None else log_probs
        levels = [row.tolist() for row in log_probs[:depth]]
        candidates = [self.best(level, width) for level in levels]
        found: dict[tuple[int, ...], float] = {}
        queue: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        while queue and len(found) < num_nodes:
            cost, path = heapq.heappop(queue)
            found[path] = -cost
            if len(path) < len(levels):
                own = levels[len(path)]
                above = 0.0 if self.mistake == "own score" else cost
                for token in candidates[len(path)]:
                    if own[token] > -math.inf:
                        heapq.heappush(queue, (above - own[token], (*path, token)))
        if queue and self.mistake != "own score":  # with it, paths are not found in the order of their probabilities
            self.margin = min(self.margin, queue[0][0] + min(found.values()))
        return found
