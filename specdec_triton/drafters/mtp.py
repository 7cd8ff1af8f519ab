"""Drafts with the layers for multi-token prediction (MTP) of the target's own checkpoint.

Source: DeepSeek-V3 (arXiv 2412.19437). A single layer drafts any number of tokens: it is run again for each level, with
its own output as the feature.
"""

from os import PathLike

from transformers import PreTrainedModel

from ..forward.checks import graph_hazard
from ..heads.mtp import MtpModel
from ..tree import DynamicTree, Topology
from .base import Drafter, topology_of
from .dynamic import DynamicSession
from .head_forwards import HeadForwards, PromptRows
from .level_session import LevelSession
from .model import check_drafted, check_shape

DEFAULT_TOKENS = 3  # of a chain that a single layer drafts


class MTPDrafter(Drafter):
    """Drafts with the MTP layers of the target's own checkpoint. `from_target` reads them.

    The default is a chain of 3 tokens. Tokens of a fixed shape are chosen by the acceptance rule as by `ModelDrafter`.

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

    resizable = True

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
        if model.num_layers > 1:
            raise ValueError(f"MTPDrafter: model must have one layer, got {model.num_layers} in {model.source}")

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
        check_drafted(self, self._shape(tree, rule), rule, model.config.get_text_config().vocab_size)

    def _shape(self, tree: Topology | DynamicTree | int | None, rule: str | None) -> Topology | DynamicTree:
        default = Topology.chain(self.num_tokens or DEFAULT_TOKENS)
        return topology_of(self.tree if tree is None else tree, default, rule)

    def taps(self, model):
        return self.model.taps(model)

    def prompt_reader(self, context):
        return PromptRows(self.model, context)

    def graph_hazard(self):
        return graph_hazard(self.model)

    def start(self, context, tree=None):
        shape = self._shape(tree, context.rule)
        dynamic = isinstance(shape, DynamicTree)
        nodes = shape.num_expanded if dynamic else shape.num_nodes
        forwards = HeadForwards(self.model, context, context.prompt_reader, nodes, shape.max_depth)
        if dynamic:
            return DynamicSession(forwards, context, shape)
        return LevelSession(forwards, context, shape, self.replacement)
