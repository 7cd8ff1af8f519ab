"""Marginals of parallel drafts: rows of a mask token follow the text, and one causal forward predicts the tokens at all
next depths.

Sources: P-EAGLE (Hui et al. 2026, arXiv 2602.01469), whose drafts are EAGLE-3 heads, and PARD (An et al. 2025, arXiv
2504.18583), whose drafts are small language models.

The keys and values of mask rows are not kept. A later round computes those of the tokens that were accepted in their
place.

Letters: B sequences, R text rows, n block rows, K depths, H hidden size of the head.
"""

import torch
from transformers import PreTrainedModel

from ..forward.wrappers import num_weights
from ..heads.eagle import EagleModel
from ..ops.rules import CHAIN_RULES
from ..tree import DynamicTree, Topology
from .base import DraftContext, Drafter
from .blocks import BlockMarginals
from .forwards import MissingColumns, as_known, known_tokens, last_position, run_prompt
from .head_forwards import PromptRows, accepted_features, embedded, head_logits, head_weights
from .marginals import Shape, check_marginal_tree, check_marginals, shape_of


def most_depths(drafter: Drafter, trained: int) -> int:
    """Largest number of depths that a drafter predicts: those that its model was trained for, or more if its own
    arguments ask for them."""
    deepest = drafter.tree.max_depth if isinstance(drafter.tree, (Topology, DynamicTree)) else 0
    return max(trained, drafter.num_tokens or 0, deepest)


def parallel_shape(drafter: Drafter, tree: Shape | None, rule: str | None, trained: int, default: Shape) -> Shape:
    """The shape to draft: `tree` if it is given, else the drafter's tree or number of tokens, else `default`, or a
    chain of `trained` tokens if the rule accepts only chains."""
    if drafter.num_tokens is not None or rule in CHAIN_RULES:
        default = Topology.chain(drafter.num_tokens or trained)
    return shape_of(drafter.tree if tree is None else tree, default, rule, most_depths(drafter, trained))


def check_parallel(
    drafter: Drafter, tree: Shape | None, rule: str | None, trained: int, num_known: int, limit: str
) -> None:
    """Refuse a tree that cannot be drafted. For `num_known` and `limit` see `check_marginals`."""
    for each in (tree, drafter.tree):
        check_marginal_tree(type(drafter).__name__, each, most_depths(drafter, trained))
    shape = parallel_shape(drafter, tree, rule, trained, Topology.chain(trained))
    check_marginals(drafter, shape, rule, num_known, limit)


def num_depths(drafter: Drafter, shape: Shape, trained: int) -> int:
    """Number of depths to predict for a shape, at least 1."""
    deepest = shape - 1 if isinstance(shape, int) else shape.max_depth
    return max(1, min(deepest, most_depths(drafter, trained)))


class HeadMarginals(BlockMarginals):
    """The marginals of a P-EAGLE head. The text rows are those of the tokens that were accepted last, the root
    included. The block consists of K - 1 mask rows, which join the mask token with the head's mask feature. The root's
    row and the mask rows predict the tokens at depths 1 to K.

    Args:
        model: the head.
        context: the call's sequences.
        prompt: the rows of the prompt.
        depths: K.
    """

    def __init__(self, model: EagleModel, context: DraftContext, prompt: PromptRows, depths: int):
        block, batch = depths - 1, len(context.start)
        super().__init__(
            model,
            context,
            max_depth=depths,
            deepest=depths,
            num_block=block,
            causal=True,
            first_column=prompt.first,
            start=prompt.start,
            last_position=context.max_length - 1,
            count=1,
        )
        self.num_known = None if model.target_ids is None else len(model.target_ids)
        self._take(prompt)
        features = model.mask_feature.repeat(batch, self._text_rows.most + block, 1)
        features[:, :1] = prompt.last
        self._features = context.buffers.put("draft.features", features)  # of all rows; the first are those of the text
        masks = torch.full((batch, block), model.mask_token_id, device=context.start.device)
        self._masks = context.buffers.put("draft.masks", masks)

    @property
    def weights(self):
        return head_weights(self._model, self.context.target.model)

    def skip(self):
        first = self._first()
        tokens = self._text_tokens(first, 1)
        self._run_text(tokens, first, **self._inputs(tokens))

    def logits(self, depth):
        first = self._first()
        tokens = torch.cat([self._text_tokens(first, 1), self._masks], 1)
        states = self._run(tokens, first, **self._inputs(tokens)).last_hidden_state
        root = (self._count - 1)[:, None, None].expand(-1, 1, states.shape[-1])
        states = torch.cat([states.gather(1, root), states[:, self._text_rows.count :]], 1)[:, :depth]
        head = self._runner.fused.model if self._runner.fused else self._model
        return head_logits(head, self.context.target.model, states, self.context.vocab_size)

    def _inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of the head for the rows of the text, and as many rows of the block as tokens [B, N] has."""
        embeds = embedded(self._model, self.context.target.model, tokens)
        count, most, features = self._text_rows.count, self._text_rows.most, self._features
        if count < most:
            features = torch.cat([features[:, :count], features[:, most:]], 1)
        return {"inputs_embeds": embeds, "features": features[:, : tokens.shape[1]]}

    def observe(self, accepted):
        """Keep the features of the verified root and of the accepted nodes."""
        features = accepted_features(self._model, self.context.states, accepted)
        self._features[:, : features.shape[1]] = features
        super().observe(accepted)


class ModelMarginals(BlockMarginals):
    """The marginals of a PARD model. The text rows are the last root and the tokens that were accepted after it. The
    block consists of the root and K - 1 mask tokens; its row j predicts the token at depth j + 1.

    Args:
        model: the draft model.
        context: the call's sequences.
        mask_token_id: the mask token.
        depths: K.
    """

    def __init__(self, model: PreTrainedModel, context: DraftContext, mask_token_id: int, depths: int):
        super().__init__(
            model,
            context,
            max_depth=depths,
            deepest=depths,
            num_block=depths,
            causal=True,
            first_column=0,
            start=context.start,
            last_position=last_position(model, context),
            count=0,
        )
        self._known = known_tokens(model, context)
        run_prompt(self._runner, context, self._room, self._known)
        # text rows end before the root, whose row in the block is not kept
        self._missing = MissingColumns(self._runner, context, self._known, ahead=0)
        masks = torch.full((len(context.start), depths - 1), mask_token_id, device=context.start.device)
        self._masks = context.buffers.put("draft.masks", masks)
        self._keep = {"logits_to_keep": depths} if model._supports_logits_to_keep() else {}

    @property
    def weights(self):
        return num_weights(self._model)

    def follow(self, levels):
        """Reserve cache slots for the round. If it drafts, first run the tokens of earlier rounds that did not, and the
        tokens that were accepted before them."""
        super().follow(levels)
        self._missing.follow(levels > 0)

    def logits(self, depth):
        first = self._first()
        text = as_known(torch.cat([self._text_tokens(first, 0), self.context.root[:, None]], 1), self._known)
        logits = self._run(torch.cat([text, self._masks], 1), first, **self._keep).logits
        return logits[:, -self.max_depth :][:, :depth]
