"""Drafts with Medusa's heads, which need one hidden state of the target and no forward of a model."""

from functools import partial

import torch
from transformers import PreTrainedModel

from ..forward.wrappers import num_weights, output_logits, unwrap
from ..heads.checkpoint import kind_of, read_checkpoint
from ..heads.medusa import MedusaHeads
from ..tree import DynamicTree, Topology
from .base import DraftContext, Drafter
from .head_forwards import LastState, last_states
from .marginals import NODES, Marginals, Shape, check_marginal_tree, check_marginals, shape_of, start_session


class MedusaDrafter(Drafter):
    """Drafts with Medusa's heads (Cai et al. 2024, arXiv 2401.10774).

    The target's hidden state at the last accepted token gives the probabilities of the next tokens at all depths. They
    do not depend on each other, so the probability of a path is the product of those of its tokens.

    The nodes of a number of nodes or of a `DynamicTree` are ranked by probability, after the call's filters; none is
    sampled. Under "coupled", the noise that the target will use is added before. The tokens of a topology are chosen by
    the acceptance rule as by `ModelDrafter`.

    Args:
        heads: the heads, on the target's device and in its dtype.
        tree: a number of nodes, root included: the most likely nodes of each round, among the 10 best tokens of each
            head. Or a topology or a `DynamicTree`, at most as deep as there are heads. None: 64 nodes. Rules that
            accept only chains get a chain instead of a number of nodes, at most as long as there are heads.

    Raises:
        ValueError: `tree` is none of these, or is deeper than there are heads.
    """

    resizable = follows_text = True

    def __init__(self, heads: MedusaHeads, tree: Topology | DynamicTree | int | None = None):
        if not isinstance(heads, MedusaHeads):
            raise ValueError(f"MedusaDrafter: heads must be MedusaHeads, got {type(heads).__name__}")
        self.heads, self.tree = heads, tree
        check_marginal_tree("MedusaDrafter", tree, heads.num_heads)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        target: PreTrainedModel | None = None,
        *,
        tree: Topology | DynamicTree | int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "MedusaDrafter":
        """A drafter with heads in Medusa's own layout (`medusa_lm_head.pt`), in vLLM's or in speculators'.

        Args:
            name_or_path: a local folder, or a name on the hub.
            target: the model that the heads were trained for. Heads that do not fit it are refused.
            tree: see the class.
            dtype: of the heads; the target's by default, or the checkpoint's without a target.
            device: of the heads; the target's by default, or the CPU without a target.

        Raises:
            ValueError: there is no such checkpoint, it holds no such heads, or they do not fit the target.
        """
        if target is not None:
            target = unwrap(target, "MedusaDrafter")
            dtype, device = dtype or target.dtype, device or target.device
        checkpoint = read_checkpoint(name_or_path)
        kind = kind_of(checkpoint.tensors, checkpoint.config)
        if kind != "medusa":
            raise ValueError(
                f"MedusaDrafter: {name_or_path} must hold Medusa's heads, got "
                f"{'tensors of no known draft head' if kind is None else f'a head of kind {kind}: use EagleDrafter'}"
            )
        drafter = cls(MedusaHeads.from_checkpoint(checkpoint, dtype, device), tree)
        if target is not None:
            drafter.heads.check_target(target)
        return drafter

    def taps(self, model):
        return ("final",)

    def prompt_reader(self, context):
        return LastState()

    def check(self, model, rule=None, tree=None):
        self.heads.check_target(model)
        check_marginal_tree("MedusaDrafter", tree, self.heads.num_heads)
        known = model.config.get_text_config().vocab_size
        check_marginals(self, self._shape(tree, rule), rule, min(known, self.heads.num_known or known))

    def _shape(self, tree: Shape | None, rule: str | None) -> Shape:
        return shape_of(self.tree if tree is None else tree, NODES, rule, self.heads.num_heads)

    def start(self, context, tree=None):
        return start_session(MedusaMarginals(self.heads, context), context, self._shape(tree, context.rule))


class MedusaMarginals(Marginals):
    """The logits of the heads.

    Args:
        heads: the heads.
        context: the call's sequences. Its `prompt_reader` is that of `MedusaDrafter`.
    """

    def __init__(self, heads: MedusaHeads, context: DraftContext):
        self._heads, self.context = heads, context
        self.max_depth, self.num_known = heads.num_heads, heads.num_known
        self._target_output = partial(output_logits, context.target.model) if heads.output is None else None
        # [B, H]: the state of the last accepted token, whose own output is the root
        self._state = context.buffers.put("draft.state", context.prompt_reader.state)

    @property
    def weights(self):
        return num_weights(self._heads)

    def logits(self, depth):
        return self._heads(self._state, depth, self._target_output)

    def observe(self, accepted):
        self._state.copy_(last_states(self.context, accepted))
