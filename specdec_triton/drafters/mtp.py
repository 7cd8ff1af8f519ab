"""Drafts with the layers for multi-token prediction (MTP) of the target's own checkpoint.

Source: DeepSeek-V3 (arXiv 2412.19437).

A single layer drafts any number of tokens: it is run again for each level, with its own output as the feature. Of K > 1
layers, layer k drafts the tokens at depth k + 1. A row of layer k joins a token and the output of layer k - 1 at the
token before, so that layer k must also process the drafted tokens above its level, and later the tokens that were
accepted in their place.

Letters: B sequences, N drafted nodes so far, R rows of text, W words of bits, H hidden size, K MTP layers.
"""

from functools import lru_cache
from os import PathLike

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..forward.checks import graph_hazard
from ..forward.versions import CACHE
from ..forward.wrappers import num_weights
from ..heads.mtp import MtpModel
from ..ops.reference import Acceptance
from ..tree import WORD_BITS, DynamicTree, Topology, bits_of_nodes
from .base import DraftContext, Drafter, topology_of
from .head_forwards import HeadForwards, PromptRows, embedded, leading, start_head_session
from .model import check_drafted, check_shape

DEFAULT_TOKENS = 3  # of a chain that a single layer drafts


class MTPDrafter(Drafter):
    """Drafts with the MTP layers of the target's own checkpoint. `from_target` reads them.

    With one layer, any shape can be drafted; the default is a chain of 3 tokens. With K > 1 layers, a shape is at most
    K levels deep; the default is a chain of K tokens. Tokens of a fixed shape are chosen by the acceptance rule as by
    `ModelDrafter`.

    The layers read the target's hidden states after its final norm, at the prompt and at every verified node. They have
    a key-value cache of their own during the call. Each level of a draft takes one forward; the first also computes the
    rows of the tokens that were accepted last.

    If a call continues a cache of the caller, the layers see only the columns that the call runs, so fewer drafts may
    be accepted.

    Args:
        model: the MTP layers of the target.
        num_tokens: length of a chain, instead of a tree.
        tree: a topology, a number of nodes (root included) or a `DynamicTree`.
        replacement: see `ModelDrafter`.

    Raises:
        ValueError: `num_tokens` and `tree` are both given, or a value is not valid.
    """

    resizable = follows_text = True

    def __init__(
        self,
        model: MtpModel,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
    ):
        if not isinstance(model, MtpModel):
            raise ValueError(
                f"MTPDrafter: model must be an MtpModel, got {type(model).__name__}: read the layers of a target with "
                "MTPDrafter.from_target"
            )
        self.model, self.num_tokens, self.tree, self.replacement = model, num_tokens, tree, replacement
        check_shape(self)

    @classmethod
    def from_target(
        cls,
        target: PreTrainedModel,
        name_or_path: str | PathLike | None = None,
        *,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
    ) -> "MTPDrafter":
        """Read the MTP layers of a target. No other weights of its checkpoint are read.

        Args:
            target: the model that the layers draft for.
            name_or_path: the checkpoint, a local folder or a name on the hub; None for the one that the target was
                loaded from.
            num_tokens, tree, replacement: see the class.

        Raises:
            ValueError: there is no such checkpoint, it has no MTP layers, or they are of a kind that is not supported.
        """
        return cls(MtpModel.from_target(target, name_or_path), num_tokens, tree, replacement)

    def check(self, model, rule=None, tree=None):
        self.model.check_target(model)
        shape, layers = self._shape(tree, rule), self.model.num_layers
        check_drafted(self, shape, rule, model.config.get_text_config().vocab_size)
        if layers > 1 and shape.max_depth > layers:
            raise ValueError(
                f"MTPDrafter: a draft must be at most {layers} levels deep with the {layers} MTP layers of "
                f"{self.model.source}, got {shape.max_depth} levels"
            )

    def _shape(self, tree: Topology | DynamicTree | int | None, rule: str | None) -> Topology | DynamicTree:
        layers = self.model.num_layers
        default = Topology.chain(self.num_tokens or (DEFAULT_TOKENS if layers == 1 else layers))
        return topology_of(self.tree if tree is None else tree, default, rule)

    def taps(self, model):
        return self.model.taps(model)

    def prompt_reader(self, context):
        return PromptRows(self.model, context) if self.model.num_layers == 1 else MtpPromptRows(self.model, context)

    def graph_hazard(self):
        return graph_hazard(self.model)

    def start(self, context, tree=None):
        shape, layers = self._shape(tree, context.rule), self.model.num_layers
        if layers > 1 and isinstance(shape, Topology):
            shape = shape.limited(layers)  # the largest tree of `tree="auto"`
        return start_head_session(self, context, shape, HeadForwards if layers == 1 else MtpForwards)


class MtpPromptRows(PromptRows):
    """The rows of the prompt in K > 1 layers. In layer k, the row of column i joins the token of column i + 1 + k and
    the output of layer k - 1 in the same row.

    The rows of the last columns join tokens that are not known yet; the first round computes them. Rounds compute K - 1
    older rows again, so the rows begin with K - 1 columns that hold nothing.

    Attributes:
        last: [B, K, H]. Features of the last columns.
    """

    def __call__(self, states: tuple[torch.Tensor, ...], first: int) -> None:
        model, layers = self._model, self._model.num_layers
        features = model.features(states)
        if self.first is None:
            self.first = first - (layers - 1)
            self.start = (self._start - first).clamp(min=0) + layers - 1
            first, features = self.first, pad(features, (0, 0, layers - 1, 0))
            self.last = features[:, :0]
        self.last = torch.cat([self.last, features[:, -layers:]], 1)[:, -layers:].clone()
        begin, count = first - self.first, features.shape[1]
        rows = torch.arange(begin + count, device=features.device)
        for layer in range(layers):
            columns = (rows[begin:] + self.first + 1 + layer).clamp(0, self._tokens.shape[1] - 1)
            features = model(
                inputs_embeds=embedded(model, self._target, self._tokens[:, columns]),
                features=features,
                position_ids=(rows[begin:] - self.start[:, None]).clamp(min=0),
                attention_mask=(rows >= self.start[:, None]).long(),
                use_cache=True,
                layer=layer,
                **{CACHE: self.cache},
            ).last_hidden_state


class MtpForwards(HeadForwards):
    """Forwards of K > 1 MTP layers. In the cache of layer k, the row of column i has the slot of column i, as in
    `HeadForwards`, and joins the token of column i + 1 + k.

    A round begins K - 1 rows before those of the columns that were verified last, because these rows joined drafted
    tokens in the last round. The forward of layer k has the rows of the text, and then those of all drafted nodes down
    to depth k. Nodes see the text up to the root's row, which is k rows before that of layer 0.

    Args: see `HeadForwards`.
    """

    def __init__(self, model: MtpModel, context: DraftContext, prompt: MtpPromptRows, most_nodes: int, max_depth: int):
        self._older = model.num_layers - 1
        super().__init__(model, context, prompt, most_nodes, max_depth, self._older)
        self._start = context.buffers.put("draft.start", prompt.start)
        self._most_nodes = most_nodes
        context.buffers.keep(self._words)  # captured rounds read them

    @property
    def _words(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _words_of(self._text_rows.count, self._most_nodes, self._rows.device)

    @property
    def weights(self):
        return super().weights - num_weights(self._model.layers) * self._older // self._model.num_layers

    def follow(self, levels, rows=None):
        super().follow(levels, rows)
        self._levels = levels

    def advance(self):
        root = self._begin()
        for layer in range(self._older + 1):
            self._run_layer(layer)
        return root

    def begin(self):
        return self._begin(), self._draft(0, 1)

    def expand(self, tokens, parents, depth, ancestors):
        # the nodes of a level have the same depth, so the numbers of the level before follow those above it
        parents = parents.expand(len(tokens), -1) + self._above
        self._above, level = self._bits.shape[1], self._level + 1
        words = self._bits.gather(1, parents[..., None].expand(-1, -1, self._bits.shape[-1]))
        made = self._tokens.shape[1]
        own = self._words[2][made : made + tokens.shape[1]]
        self._bits = torch.cat([self._bits, words | own], 1)
        self._tokens, self._parents = torch.cat([self._tokens, tokens], 1), torch.cat([self._parents, parents], 1)
        self._depth = torch.cat([self._depth, torch.full_like(tokens, level)], 1)
        self._level = level
        return self._draft(level, tokens.shape[1])

    def _begin(self) -> torch.Tensor:
        """Prepare the rows of the text. Returns the root's tokens [B, 1]."""
        context, rows = self.context, self._text_rows.count
        self._base = (context.length - self._column - self._count).clamp(min=self._older) - self._older
        own, seen, _ = self._words
        # rows before the first token of a sequence are seen by no other row, and by no node
        empty = seen[(self._start - self._base).clamp(0, rows)][:, None]
        self._seen = seen[1:] & ~empty
        self._text_bits = self._seen | own
        self._text = leading(self._features, rows)
        batch = len(self._base)
        # of the root and the nodes: bits of the nodes that each sees. Of the nodes: tokens, parents and depths
        self._bits = seen.new_zeros(batch, 1, seen.shape[-1])
        self._tokens = self._parents = self._depth = seen.new_zeros(batch, 0)
        self._level = self._above = 0
        return context.root[:, None]

    def _draft(self, layer: int, count: int) -> torch.Tensor:
        """Run a layer. Returns logits [B, count, V] at the last nodes, or at the root if there are none."""
        self._run_layer(layer)
        logits = self._logits(self._states[:, -count:])
        if layer == self._levels - 1:  # the draft has fewer levels: the other layers process the text alone
            for other in range(layer + 1, self._older + 1):
                self._run_layer(other)
        return logits

    def _run_layer(self, layer: int) -> None:
        """Compute the outputs of a layer: `_text` [B, R, H] of the rows of the text, and `_states` [B, 1 + N, H] of the
        root and the nodes."""
        context, rows, batch = self.context, self._text_rows.count, len(self._base)
        columns = self._base[:, None] + self._rows[:rows] + self._column + 1 + layer
        tokens = context.tokens.gather(1, columns.clamp(0, context.tokens.shape[1] - 1))
        tokens, features = torch.cat([tokens, self._tokens], 1), self._text
        if self._tokens.shape[1]:
            parents = self._parents[..., None].expand(-1, -1, features.shape[-1])
            features = torch.cat([features, self._states.gather(1, parents)], 1)
        root = (self._count - 1 + self._older - layer)[:, None]
        depth = torch.cat([self._rows[:rows].expand(batch, -1), root + self._depth], 1)
        words = -(-depth.shape[1] // WORD_BITS)
        of_root = self._seen.gather(1, root[..., None].expand(-1, -1, self._seen.shape[-1]))
        ancestors = torch.cat([self._text_bits, self._bits[:, 1:] | of_root], 1)[..., :words].contiguous()
        more = {"inputs_embeds": embedded(self._model, context.target.model, tokens), "features": features}
        states = self._runner.run(tokens, depth, ancestors, self._base, layer=layer, **more).last_hidden_state
        self._text = states[:, :rows]
        of_root = self._text.gather(1, root[..., None].expand(-1, -1, states.shape[-1]))
        self._states = torch.cat([of_root, states[:, rows:]], 1)

    def observe(self, accepted: Acceptance, slots):
        """Keep the features of the verified root and of the accepted nodes, and of K - 1 columns before them."""
        older = (self._count[:, None] + self._rows[: self._older])[..., None]
        kept = self._features.gather(1, older.expand(-1, -1, self._features.shape[-1]))
        super().observe(accepted, slots)
        self._features.copy_(torch.cat([kept, self._features[:, : -self._older]], 1))


@lru_cache(maxsize=64)
def _words_of(rows: int, nodes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words of bits, int64, for a tree of R = `rows` rows of text and then `nodes` nodes: [R, W] the bit of each row,
    [R + 1, W] the bits of the first 0 to R rows, and [nodes, W] the bit of each node."""
    own = bits_of_nodes(rows + nodes)
    seen = own[:rows].cumsum(0)  # sums of different bits are their unions
    words = own[:rows], torch.cat([torch.zeros_like(own[:1]), seen]), own[rows:]
    return words[0].to(device), words[1].to(device), words[2].to(device)
