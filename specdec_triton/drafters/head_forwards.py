"""Forwards of a head that reads a hidden state of the target at each position: the heads of EAGLE, and MTP layers.

A row of the head consists of a token and a feature: token t_{i+1}, and the feature of position i, which the head makes
from the target's hidden states there. At draft tokens, the target's hidden states are not known yet. The feature of a
node's row is then the head's own output at the row of the node's parent. After verification, the rows of draft tokens
are dropped, and the rows of the accepted tokens are computed from the target's hidden states.

Letters: B sequences, N tree nodes, R rows, D edges on the longest path, V vocabulary, H hidden size of the head.
"""

from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from ..forward.runner import TreeRunner
from ..forward.versions import CACHE
from ..forward.wrappers import num_weights, output_logits, unwrap
from ..heads.checkpoint import read_checkpoint
from ..heads.eagle import EagleModel
from ..ops.reference import Acceptance
from ..tree import DynamicTree, Topology, topology_tensors, with_rows
from .base import DraftContext, Drafter
from .dynamic import DynamicSession
from .forwards import DraftForwards, TextRows
from .level_session import LevelSession


class PromptRows:
    """The rows of the prompt, computed chunk by chunk. A chunk's hidden states are not kept.

    Attributes:
        first: number of the first column that was run; None before the first chunk.
        start: [B] int64. First column that holds a row, relative to `first`.
        cache: keys and values of the rows of all columns since `first`. The row of the last column belongs to the root,
            which is not known yet, so its keys and values are undefined.
        last: [B, 1, H]. Feature of the last column.
    """

    def __init__(self, model: EagleModel, context: DraftContext):
        # without the context, which refers to this object
        self._model, self._target = model, context.target.model
        self._tokens, self._start = context.tokens, context.start
        self.first: int | None = None
        self.cache: DynamicCache | None = DynamicCache()

    def __call__(self, states: tuple[torch.Tensor, ...], first: int) -> None:
        model = self._model
        if self.first is None:
            self.first = first
            self.start = (self._start - first).clamp(min=0)
        features = model.features(states)
        begin, count = first - self.first, features.shape[1]
        columns = torch.arange(begin + count, device=features.device)
        tokens = self._tokens[:, first + 1 : first + count + 1]
        model(
            inputs_embeds=embedded(model, self._target, tokens),
            features=features,
            position_ids=(columns[begin:] - self.start[:, None]).clamp(min=0),
            attention_mask=(columns >= self.start[:, None]).long(),
            use_cache=True,
            **{CACHE: self.cache},
        )
        self.last = features[:, -1:].clone()  # a view would keep the whole chunk


class LastState:
    """Reads the prompt's states.

    Attributes:
        state: [B, H]. The state of the last column read.
    """

    state: torch.Tensor

    def __call__(self, states: tuple[torch.Tensor, ...], first_column: int) -> None:
        self.state = states[0][:, -1].clone()  # a view would keep the whole chunk


class HeadForwards(DraftForwards):
    """Forwards of a head. In its cache, the row of token t_{i+1} and feature i has the slot of column i, counted
    from the first column that the prompt's forward ran.

    Args:
        model: the head.
        context: the call's sequences.
        prompt: the rows of the prompt.
        most_nodes: largest number of nodes that a round forwards after the root.
        max_depth: largest depth of a node that is drafted.
        older: see `TextRows`.
    """

    num_first = 1

    def __init__(
        self,
        model: EagleModel,
        context: DraftContext,
        prompt: PromptRows,
        most_nodes: int,
        max_depth: int,
        older: int = 0,
    ):
        self._model, self.context = model, context
        buffers, batch, device = context.buffers, len(context.start), context.start.device
        self._column = buffers.put("draft.column", torch.tensor(prompt.first, device=device))
        self._text_rows = TextRows(context, max_depth, older)
        rows = self._text_rows.most
        self._room = rows + most_nodes
        last = context.max_length - 1
        start = buffers.put("draft.start", prompt.start)
        self._runner = TreeRunner(
            model, start, last, context.impl, context.fixed_shapes, context.compiled, context.fused, buffers, "draft"
        )
        columns = int(context.host_length[0]) - prompt.first
        self._runner.take_cache(prompt.cache, context.cache_capacity(self._room), columns)
        prompt.cache = None  # it was copied
        self._rows = buffers.put("draft.places", torch.arange(rows, device=device))
        buffers.keep(self._chain)  # captured rounds read it
        features = prompt.last.new_zeros(batch, rows, prompt.last.shape[-1])
        features[:, : prompt.last.shape[1]] = prompt.last
        self._features = buffers.put("draft.features", features)  # of the columns verified last
        self._count = buffers.put("draft.count", torch.ones(batch, dtype=torch.int64, device=device))

    @property
    def slots(self):
        return self._runner.cache.slots

    @property
    def weights(self):
        return head_weights(self._model, self.context.target.model)

    def follow(self, levels, rows=None):
        self._text_rows.follow()
        self._runner.cache.reserve(self.context.longest + self._room)

    @property
    def _chain(self) -> tuple[torch.Tensor, ...]:
        return topology_tensors(Topology.chain(self._text_rows.count - 1), self._rows.device)

    def advance(self):
        """Compute the rows of the root and of the tokens accepted last. Later rows of `_features` are padding: their
        keys and values are overwritten."""
        context, count = self.context, self._text_rows.count
        first = (context.length - self._column - self._count).clamp(min=0)
        columns = (first[:, None] + self._rows[:count] + self._column + 1).clamp(max=context.tokens.shape[1] - 1)
        tokens = context.tokens.gather(1, columns)
        _, depth, ancestors = with_rows(len(tokens), self._chain)
        states = self._run(tokens, leading(self._features, count), depth, ancestors, first)
        last = (self._count - 1)[:, None, None].expand(-1, 1, states.shape[-1])
        self._states = states.gather(1, last)
        self._first = first + self._count - 1  # the root's slot
        return context.root[:, None]

    def begin(self):
        root = self.advance()
        return root, self._logits(self._states)

    def expand(self, tokens, parents, depth, ancestors):
        parents = parents.expand(len(tokens), -1)[..., None].expand(-1, -1, self._states.shape[-1])
        features = self._states.gather(1, parents)
        self._states = self._run(tokens, features, depth, ancestors, self._first)
        return self._logits(self._states)

    def _run(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        depth: torch.Tensor,
        ancestors: torch.Tensor,
        base: torch.Tensor,
    ) -> torch.Tensor:
        embeds = embedded(self._model, self.context.target.model, tokens)
        more = {"inputs_embeds": embeds, "features": features}
        return self._runner.run(tokens, depth, ancestors, base, **more).last_hidden_state

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [B, n, V] over the target's vocabulary after states [B, n, H]."""
        head = self._runner.fused.model if self._runner.fused else self._model
        return head_logits(head, self.context.target.model, states, self.context.vocab_size)

    def observe(self, accepted: Acceptance, slots):
        """Keep the features of the verified root and of the accepted nodes."""
        features = accepted_features(self._model, self.context.states, accepted)
        self._features[:, : features.shape[1]] = features
        self._count.copy_(accepted.length + 1)


def load_model(
    kind: type[Any],
    name_or_path: str,
    target: PreTrainedModel | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    **conventions: Any,
) -> tuple[Any, PreTrainedModel | None]:
    """Load a head, and unwrap its target.

    Args:
        kind: the class of the head.
        name_or_path: a local folder, or a name on the hub.
        target: the model that the head drafts for, or None.
        dtype, device: of the head; the target's if they are None.
        conventions: further arguments of `from_checkpoint`.
    """
    if target is not None:
        target = unwrap(target, f"{kind.__name__.removesuffix('Model')}Drafter.from_pretrained")
        dtype, device = dtype or target.dtype, device or target.device
    return kind.from_checkpoint(read_checkpoint(name_or_path), dtype=dtype, device=device, **conventions), target


def num_known(model: PreTrainedModel, target: PreTrainedModel) -> int:
    """Number of tokens that a head can name."""
    return target.config.get_text_config().vocab_size if model.target_ids is None else len(model.target_ids)


def start_head_session(
    drafter: Drafter, context: DraftContext, shape: Topology | DynamicTree, kind: type[HeadForwards] = HeadForwards
) -> LevelSession:
    """Start the session in which `drafter.model` drafts a shape with forwards of a class."""
    nodes = shape.num_expanded if isinstance(shape, DynamicTree) else shape.num_nodes
    forwards = kind(drafter.model, context, context.prompt_reader, nodes, shape.max_depth)
    if isinstance(shape, DynamicTree):
        return DynamicSession(forwards, context, shape)
    return LevelSession(forwards, context, shape, drafter.replacement)


def embedded(model: EagleModel, target: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings [B, N, E] of tokens [B, N], by the head's own table or the target's."""
    table = model.embed_tokens
    if table is None:
        return target.get_input_embeddings()(tokens)
    return table(tokens.clamp(max=table.num_embeddings - 1))


def head_logits(model: EagleModel, target: PreTrainedModel, states: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits [B, n, V] after states [B, n, H], by the head's own language head or the target's. Tokens that a reduced
    vocabulary lacks have logit -inf."""
    states = model.logits_input(states)
    if model.lm_head is None:
        return output_logits(target, states)
    logits = model.lm_head(states)
    if model.target_ids is None:
        return logits
    everywhere = logits.new_full((*logits.shape[:-1], vocab_size), float("-inf"))
    return everywhere.index_copy_(-1, model.target_ids, logits)


def head_weights(model: EagleModel, target: PreTrainedModel) -> int:
    """Number of weights that a forward of the head reads, its language head included."""
    own = num_weights(model)
    if model.embed_tokens is not None:
        own -= num_weights(model.embed_tokens)
    if model.lm_head is None:
        own += num_weights(target.get_output_embeddings())
    return own


def leading(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` of R rows [B, R, ...]."""
    return rows if rows.shape[1] == count else rows[:, :count].contiguous()


def accepted_features(model: EagleModel, states: tuple[torch.Tensor, ...], accepted: Acceptance) -> torch.Tensor:
    """The features [B, D + 1, H] of the verified root and of the accepted nodes, from the target's states [B, N, Ht] at
    all nodes. Those after the accepted path are padding."""
    path = pad(accepted.path.clamp(min=0).long(), (1, 0))[..., None]
    return model.features(tuple(each.gather(1, path.expand(-1, -1, each.shape[-1])) for each in states))


def last_states(context: DraftContext, accepted: Acceptance) -> torch.Tensor:
    """[B, H]. The first tap's states at the last accepted nodes, or at the roots if none was accepted."""
    (states,) = context.states
    last = pad(accepted.path, (1, 0)).amax(1)  # node numbers grow along a path; the root is 0
    return states[torch.arange(len(last), device=last.device), last.long()]
