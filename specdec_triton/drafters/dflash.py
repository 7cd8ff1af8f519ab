"""Drafts with a DFlash model, which predicts a block of tokens in one forward.

Source: DFlash (Chen et al. 2026, arXiv 2602.06036). The rows of a block are the root and mask tokens at the positions
that follow. They see each other, and keys and values that the layers compute from the target's hidden states at all
verified positions. After verification, nothing of the block is kept.

Letters: B sequences, R text rows, n block rows, H hidden size of the draft.
"""

import torch
from transformers import DynamicCache, PreTrainedModel

from ..forward.checks import graph_hazard
from ..forward.versions import CACHE
from ..heads.dflash import DFlashModel
from ..ops.rules import CHAIN_RULES
from ..tree import DynamicTree, Topology
from .base import DraftContext, Drafter
from .blocks import BlockMarginals
from .head_forwards import accepted_features, head_logits, head_weights, leading, load_model, num_known
from .marginals import Shape, check_marginal_tree, check_marginals, default_nodes, shape_of, start_session
from .model import check_shape


class DFlashDrafter(Drafter):
    """Drafts with a DFlash model. `from_pretrained` loads one.

    A round takes one forward of the draft, whatever the depth of the tree. It gives the probabilities of the tokens at
    all next depths. They do not depend on each other, so the probability of a path is the product of those of its
    tokens.

    By default, the likeliest 64 nodes are drafted, and fewer in batches of more than two sequences. Rules that accept
    only chains get a chain of a whole block. The nodes of a number of nodes or of a `DynamicTree` are ranked by
    probability, after the call's filters; none is sampled. The tokens of a topology or a chain are chosen by the
    acceptance rule as by `ModelDrafter`. If the draft has a reduced vocabulary, other tokens have probability 0.

    The draft reads hidden states of the target at the prompt and at every verified node. They are taken in the forwards
    that run in any case, on a copy of the target's modules that shares its weights. If a call continues a cache of the
    caller, the draft sees only the columns that the call runs, so fewer drafts may be accepted.

    Args:
        model: the draft. Embeddings and language head that it lacks are the target's.
        num_tokens: length of a chain, instead of a tree; at most `model.num_drafted`.
        tree: a number of nodes (root included), a topology or a `DynamicTree`.
        replacement: see `ModelDrafter`.

    Raises:
        ValueError: `num_tokens` and `tree` are both given, a value is not valid, or the tree is deeper than a block.
    """

    resizable = follows_text = True

    def __init__(
        self,
        model: DFlashModel,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
    ):
        if not isinstance(model, DFlashModel):
            raise ValueError(
                f"DFlashDrafter: model must be a DFlashModel, got {type(model).__name__}: load a checkpoint with "
                "DFlashDrafter.from_pretrained"
            )
        self.model, self.num_tokens, self.tree, self.replacement = model, num_tokens, tree, replacement
        check_shape(self)
        if num_tokens is not None and num_tokens > model.num_drafted:
            raise ValueError(
                f"DFlashDrafter: num_tokens must be at most {model.num_drafted}, the tokens of a block, got "
                f"{num_tokens}"
            )
        check_marginal_tree("DFlashDrafter", tree, model.num_drafted)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        target: PreTrainedModel | None = None,
        *,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
        rope_theta: float | None = None,
        layers: tuple[int, ...] | None = None,
        layer_meaning: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "DFlashDrafter":
        """Load a draft from a folder or from the hub, in z-lab's layout, in speculators' or in transformers'.

        Args:
            name_or_path: a local folder, or a name on the hub.
            target: the model that it drafts for. The draft gets its device and dtype, and is checked against it.
            num_tokens, tree, replacement: see the class.
            rope_theta: base of the rotary embedding, instead of the checkpoint's.
            layers: numbers of the target's layers whose hidden states the draft reads, instead of the checkpoint's.
            layer_meaning: "input" if number i means the input of layer i, "output" if it means its output. By default,
                the checkpoint's layout decides.
            dtype, device: of the draft, if there is no `target`; the file's dtype and the CPU by default.

        Raises:
            ValueError: there is no such checkpoint, it is malformed or of a kind that is not supported, or it does not
                fit the target.
        """
        conventions = {"rope_theta": rope_theta, "layers": layers, "layer_meaning": layer_meaning}
        model, target = load_model(DFlashModel, name_or_path, target, dtype, device, **conventions)
        drafter = cls(model, num_tokens, tree, replacement)
        if target is not None:
            drafter.check(target)
        return drafter

    def check(self, model, rule=None, tree=None):
        self.model.check_target(model)
        check_marginal_tree("DFlashDrafter", tree, self.model.num_drafted)
        limit = "the size of the draft's vocabulary"
        check_marginals(self, self._shape(tree, rule), rule, num_known(self.model, model), limit)

    def _shape(self, tree: Shape | None, rule: str | None, batch: int = 1) -> Shape:
        default: Shape = default_nodes(batch)
        if self.num_tokens is not None or rule in CHAIN_RULES:
            default = Topology.chain(self.num_tokens or self.model.num_drafted)
        return shape_of(self.tree if tree is None else tree, default, rule, self.model.num_drafted)

    def taps(self, model):
        return self.model.taps(model)

    def prompt_reader(self, context):
        return PromptContext(self.model, context)

    def graph_hazard(self):
        return graph_hazard(self.model)

    def start(self, context, tree=None):
        shape = self._shape(tree, context.rule, len(context.start))
        deepest = shape - 1 if isinstance(shape, int) else shape.max_depth
        source = DFlashMarginals(self.model, context, context.prompt_reader, min(deepest, self.model.num_drafted))
        return start_session(source, context, shape, self.replacement)


class PromptContext:
    """The draft's keys and values of the prompt, computed chunk by chunk. A chunk's hidden states are not kept.

    Attributes:
        first: number of the first column that was run; None before the first chunk.
        start: [B] int64. First column that holds a token, relative to `first`.
        cache: keys and values of all columns since `first`.
        feature: [B, 1, H]. Feature of the last column.
    """

    def __init__(self, model: DFlashModel, context: DraftContext):
        # without the context, which refers to this object
        self._model, self.start = model, context.start
        self.first: int | None = None
        self.cache: DynamicCache | None = DynamicCache()

    def __call__(self, states: tuple[torch.Tensor, ...], first: int) -> None:
        if self.first is None:
            self.first, self.start = first, (self.start - first).clamp(min=0)
        features = self._model.features(states)
        columns = first - self.first + torch.arange(features.shape[1], device=features.device)
        position_ids = (columns - self.start[:, None]).clamp(min=0)
        self._model(features, position_ids, None, **{CACHE: self.cache})
        self.feature = features[:, -1:].clone()  # a view would keep the whole chunk


class DFlashMarginals(BlockMarginals):
    """The logits of a block.

    Args:
        model: the draft.
        context: the call's sequences.
        prompt: the keys and values of the prompt.
        deepest: depth of the deepest node that is drafted.
    """

    def __init__(self, model: DFlashModel, context: DraftContext, prompt: PromptContext, deepest: int):
        block = model.block_size
        super().__init__(
            model,
            context,
            max_depth=model.num_drafted,
            deepest=deepest,
            num_block=block,
            causal=False,
            first_column=prompt.first,
            start=prompt.start,
            last_position=context.max_length + block,
            count=0,
        )
        self.num_known = None if model.target_ids is None else len(model.target_ids)
        self._take(prompt)
        rows = self._text_rows.most
        self._features = context.buffers.put("draft.features", prompt.feature.repeat(1, rows, 1))
        masks = torch.full((len(context.start), rows + block), model.mask_token_id, device=context.start.device)
        self._tokens = context.buffers.put("draft.block", masks)  # of text rows, which are not read, and the block

    @property
    def weights(self):
        return head_weights(self._model, self.context.target.model)

    def skip(self):
        count = self._text_rows.count
        self._run_text(self._tokens[:, :count], self._first(), features=leading(self._features, count))

    def logits(self, depth):
        context, model, count = self.context, self._model, self._text_rows.count
        block = self._tokens[:, self._features.shape[1] :]
        block[:, 0] = context.root
        embeds = model.embedded(context.target.model, block)
        more = {"features": leading(self._features, count), "inputs_embeds": embeds}
        rows = depth + model.block_size - model.num_drafted  # those that predict deeper tokens have no logits
        tokens = self._tokens[:, -count - block.shape[1] :]
        states = self._run(tokens, self._first(), **more).last_hidden_state[:, :rows]
        head = self._runner.fused.model if self._runner.fused else model
        return head_logits(head, context.target.model, states, context.vocab_size)

    def observe(self, accepted):
        """Keep the features of the verified root and of the accepted nodes."""
        features = accepted_features(self._model, self.context.states, accepted)
        self._features[:, : features.shape[1]] = features
        super().observe(accepted)
