"""A literal statement of the drafts of EAGLE's heads. Every node is computed by itself, from the whole text: nothing is
cached, batched or masked.

Sources: EAGLE (Li et al. 2024, arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858), EAGLE-3 (arXiv 2503.01840), EAGLE-3.1
(arXiv 2605.09992), HASS (Zhang et al. 2024, arXiv 2408.15766).

The text is t_0, ..., t_n; the target has not run t_n, the root. Row i of a head joins token t_(i+1) with the
target's states at position i, and predicts the token after t_(i+1). A row of a drafted token has the output of the row
before in place of the target's states.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch.nn.functional import linear, silu

from checkpoints import Head

# Names of deliberate mistakes. The code that uses a name makes the mistake.
MISTAKES = (
    "offsets as ids",
    "states in reverse order",
    "neighbouring states",
    "hidden before embedding",
    "other residual",
    "other feedback",
    "no shift",
    "rope base of the target",
    "no rope scaling",
    "one position for all levels",
    "own score",
    "embedding of the target",
    "no bias of fc",
    "no biases of attention",
    "no norms of queries and keys",
    "an input norm too many",
    "no norms of inputs",
    "other norm before the head",
    "one layer",
    "no window",
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def frequencies(base: float, scaling: dict | None, size: int) -> list[float]:
    """Radians per position of each pair of channels of a head of `size` channels."""
    found = [base ** (-2 * pair / size) for pair in range(size // 2)]
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "linear":
        found = [each / scaling["factor"] for each in found]
    if kind == "llama3":
        low, high, factor = (scaling[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
        # turns in the original context; slow channels are slowed down further, fast ones are not, with a blend between
        turns = [scaling["original_max_position_embeddings"] * each / (2 * math.pi) for each in found]
        shares = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
        found = [each * (share + (1 - share) / factor) for each, share in zip(found, shares, strict=True)]
    return found


def rotated(x: torch.Tensor, positions: list[int], radians: list[float]) -> torch.Tensor:
    """x [n, heads, size], turned by its positions. Channel i is paired with channel i + size / 2."""
    angles = torch.tensor(positions, dtype=x.dtype)[:, None, None] * torch.tensor(radians, dtype=x.dtype)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class DraftedTrees(ABC):
    """The trees that follow from a draft's logits.

    Args:
        text: t_0, ..., t_n.
        mistake: one of `mistakes`, or "" for none.

    Attributes:
        mistakes: names of deliberate mistakes.
        margin: the smallest difference of two values whose order decided a tree so far. Below the error of the
            arithmetic, another tree is as good.
    """

    mistakes: tuple[str, ...] = ()

    def __init__(self, text: list[int], mistake: str):
        assert mistake in ("", *self.mistakes), mistake
        self.text, self.mistake, self.margin = text, mistake, math.inf

    @abstractmethod
    def logits(self, path: tuple[int, ...]) -> torch.Tensor:
        """The logits [V] of the token after the text and the drafted tokens `path`."""

    def best(self, values: list[float], count: int) -> list[int]:
        """Places of the `count` highest values, highest first. Of equal values, the first comes first."""
        order = sorted(range(len(values)), key=lambda place: -values[place])
        ranked = [values[place] for place in order[: count + 1]]
        gaps = [higher - lower for higher, lower in zip(ranked, ranked[1:], strict=False)]
        self.margin = min([self.margin, *gaps])
        return order[:count]

    def dynamic(
        self, num_nodes: int, width: int, levels: int, rank: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    ) -> tuple[list[int], list[int], list[float]]:
        """EAGLE-2's tree: tokens, parents and scores of its nodes, in the order in which they were made.

        Args:
            num_nodes: the number of nodes that are kept, root included.
            width: the number of nodes that a level expands, and of children of each.
            levels: the number of levels. The first consists of the root's children.
            rank: log-probabilities [V] of children, from the logits [V] at their parent and their depth.
        """
        paths: list[tuple[int, ...]] = [()]
        parents, scores, level = [-1], [0.0], [0]
        for depth in range(1, levels + 1):
            children = []
            for node in level:
                logits = self.logits(paths[node])
                own = (logits.log_softmax(-1) if rank is None else rank(logits, depth)).tolist()
                for token in self.best(own, width):
                    children.append(len(paths))
                    paths.append((*paths[node], token))
                    parents.append(node)
                    scores.append(own[token] + (0.0 if self.mistake == "own score" else scores[node]))
            level = [children[place] for place in self.best([scores[child] for child in children], width)]
        order = sorted(range(len(paths)), key=lambda node: -scores[node])
        kept = sorted(order[:num_nodes])
        if num_nodes < len(paths):
            self.margin = min(self.margin, scores[order[num_nodes - 1]] - scores[order[num_nodes]])
        place = {node: number for number, node in enumerate(kept)}
        tokens = [self.text[-1] if not paths[node] else paths[node][-1] for node in kept]
        return tokens, [place.get(parents[node], -1) for node in kept], [scores[node] for node in kept]

    def ranked(self, topology, rank: Callable[[torch.Tensor, int], torch.Tensor] | None = None) -> list[int]:
        """The tokens of a `Topology` if each node carries its parent's candidate of its rank."""
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, topology.num_nodes):
            above = paths[topology.parents[node]]
            logits = self.logits(above)
            own = (logits.log_softmax(-1) if rank is None else rank(logits, len(above) + 1)).tolist()
            paths.append((*above, self.best(own, topology.ranks[node] + 1)[-1]))
        return [self.text[-1], *(path[-1] for path in paths[1:])]


class LiteralDraft(DraftedTrees):
    """The draft of a head after one text.

    Args:
        head: the head.
        target: the target. It is called with `output_hidden_states=True`, so it must be a copy that nothing else uses.
        text: t_0, ..., t_n.
        mistake: one of `MISTAKES`, or "" for none.
        first: the number of the first row that exists; earlier positions are unknown to the head.
    """

    mistakes = MISTAKES

    def __init__(self, head: Head, target, text: list[int], mistake: str = "", first: int = 0):
        super().__init__(text, mistake)
        self.head, self.first = head, first
        self.weights = {name: tensor.double() for name, tensor in head.tensors.items() if tensor.is_floating_point()}
        self.is_eagle3 = head.layout.kind == "eagle3"
        self.vocab_size = target.config.vocab_size
        own = self.weights.get("embed_tokens.weight")
        shared = target.get_input_embeddings()
        if own is None or mistake == "embedding of the target":
            self.embed = lambda tokens: shared(tokens).detach().double()
        else:
            self.embed = lambda tokens: own[tokens]
        self.weights.setdefault("lm_head.weight", target.get_output_embeddings().weight.detach().double())
        base, scaling = head.rope_theta, head.layout.rope_scaling
        if mistake == "rope base of the target":
            base = target.config.rope_parameters["rope_theta"]
        self.radians = frequencies(base, None if mistake == "no rope scaling" else scaling, head.head_dim)
        self.features = self._features(self._states(target))[first:]
        self.outputs: dict[tuple[int, ...], torch.Tensor] = {}

    # --- the head

    def _states(self, target) -> list[torch.Tensor]:
        """The states of the target that the head reads, [n, Ht] each."""
        caught = []
        hook = target.base_model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        with torch.no_grad():
            hidden = target(torch.tensor([self.text[:-1]]), output_hidden_states=True).hidden_states
        hook.remove()
        (last,) = caught
        found = dict(enumerate(hidden[:-1])) | {"last": last, "final": hidden[-1]}
        names = list(self.head.layout.states)
        if self.mistake == "states in reverse order":
            names.reverse()
        if self.mistake == "neighbouring states":
            order = list(found)
            names = [order[order.index(name) + (1 if name != "final" else -1)] for name in names]
        return [found[name][0].double() for name in names]

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x through the norm of this name, if the head has it."""
        weight = self.weights.get(f"{name}.weight")
        return x if weight is None else rms_norm(x, weight, self.head.eps)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = self.weights.get(f"{name}.bias")
        without = "no bias of fc" if name == "fc" else "no biases of attention"
        return linear(x, self.weights[f"{name}.weight"], None if self.mistake == without else bias)

    def _features(self, states: list[torch.Tensor]) -> torch.Tensor:
        """The features of the positions that the target has run, [n, H]."""
        if not self.is_eagle3:
            return states[0]
        if self.mistake != "no norms of inputs":
            states = [self._norm(f"fc_norm.{tap}", state) for tap, state in enumerate(states)]
        joined = torch.cat(states, -1)
        if self.mistake != "no norms of inputs":
            joined = self._norm("input_norm", joined)
        return self._linear("fc", joined)

    def output(self, path: tuple[int, ...]) -> torch.Tensor:
        """The output [H] of the last row, if the drafted tokens `path` follow the text."""
        if path not in self.outputs:
            shift = 0 if self.mistake == "no shift" else 1
            tokens = [*self.text, *path][self.first + shift :][: len(self.features) + len(path)]
            fed_back = [self._fed_back(self.output(path[:end])) for end in range(len(path))]
            positions = list(range(self.first, self.first + len(tokens)))
            if self.mistake == "one position for all levels":
                positions = [min(position, len(self.text) - 1) for position in positions]
            features = torch.cat([self.features, torch.stack(fed_back)]) if path else self.features
            self.outputs[path] = self._rows(self.embed(torch.tensor(tokens)), features, positions)[-1]
        return self.outputs[path]

    def _fed_back(self, output: torch.Tensor) -> torch.Tensor:
        normed = self.head.layout.flags.get("norm_output", False)
        if normed != (self.mistake == "other feedback"):
            return rms_norm(output, self.weights.get("norm.weight", torch.ones(())), self.head.eps)
        return output

    def _rows(self, embeddings: torch.Tensor, features: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """The outputs [n, H] of rows with these embeddings [n, E] and features [n, H]."""
        if not self.is_eagle3 and self.mistake != "no norms of inputs":
            embeddings = self._norm("embedding_layernorm", embeddings)
            features = self._norm("hidden_states_layernorm", features)
        if self.is_eagle3:
            normed = self._norm("layers.0.hidden_norm", features)
            pair = [self._norm("layers.0.input_layernorm", embeddings), normed]
            before = self.head.layout.flags.get("norm_before_residual", False)
            x = normed if before != (self.mistake == "other residual") else features
        else:
            pair = [embeddings, features]
        joined = torch.cat(pair[::-1] if self.mistake == "hidden before embedding" else pair, -1)
        if not self.is_eagle3:
            x = self._linear("fc", joined)
            joined = self._norm("layers.0.input_layernorm", x)
            if self.mistake == "an input norm too many" and joined is x:
                joined = rms_norm(x, torch.ones(()), self.head.eps)
        for layer in range(1 if self.mistake == "one layer" else self.head.layout.num_layers):
            name = f"layers.{layer}"
            attended = joined if layer == 0 else self._norm(f"{name}.input_layernorm", x)
            window = self.head.layout.windows[layer] if self.head.layout.windows else None
            x = x + self._attention(f"{name}.self_attn", attended, positions, window)
            inner = self._norm(f"{name}.post_attention_layernorm", x)
            gate, up = (linear(inner, self.weights[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
            x = x + linear(silu(gate) * up, self.weights[f"{name}.mlp.down_proj.weight"])
        return x

    def _attention(self, name: str, x: torch.Tensor, positions: list[int], window: int | None) -> torch.Tensor:
        heads, kv_heads, _ = self.head.layout.heads
        size = self.head.head_dim
        queries = self._linear(f"{name}.q_proj", x).view(-1, heads, size)
        keys, values = (self._linear(f"{name}.{part}_proj", x).view(-1, kv_heads, size) for part in ("k", "v"))
        if self.mistake != "no norms of queries and keys":
            queries, keys = self._norm(f"{name}.q_norm", queries), self._norm(f"{name}.k_norm", keys)
        queries, keys = rotated(queries, positions, self.radians), rotated(keys, positions, self.radians)
        outputs = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = queries[:, head] @ keys[:, group].T / size**0.5
            seen = self._seen(len(x))
            if window is not None and self.mistake != "no window":
                seen = seen.triu(1 - window)
            outputs.append(scores.masked_fill(seen == 0, -math.inf).softmax(-1) @ values[:, group])
        return self._linear(f"{name}.o_proj", torch.cat(outputs, -1))

    def _seen(self, rows: int) -> torch.Tensor:
        """[n, n]: 1 if row i sees row j, else 0. Windows are left out."""
        return torch.ones(rows, rows).tril()

    # --- its drafts

    def logits(self, path: tuple[int, ...]) -> torch.Tensor:
        """The head's logits [V] of the token after the text and the drafted tokens `path`; -inf outside its
        vocabulary."""
        output = self.output(path)
        normed = "norm.weight" in self.weights
        if normed != (self.mistake == "other norm before the head"):
            output = rms_norm(output, self.weights.get("norm.weight", torch.ones(())), self.head.eps)
        return self._named(linear(output, self.weights["lm_head.weight"]))

    def _named(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [DV] of the head's vocabulary as logits [V]; -inf outside it."""
        if "d2t" not in self.head.tensors:
            return logits
        tokens = self.head.tensors["d2t"]
        if self.mistake != "offsets as ids":
            tokens = torch.arange(len(tokens)) + tokens
        return logits.new_full((self.vocab_size,), -math.inf).index_put((tokens,), logits)
