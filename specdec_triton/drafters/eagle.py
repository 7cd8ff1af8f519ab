"""Drafts with a trained EAGLE head: one or a few decoder layers over the target's hidden states.

Sources: EAGLE (Li et al. 2024, arXiv 2401.15077), EAGLE-2 (Li et al. 2024, arXiv 2406.16858), EAGLE-3 (Li et al. 2025,
arXiv 2503.01840), P-EAGLE (Hui et al. 2026, arXiv 2602.01469).
"""

import torch
from transformers import PreTrainedModel

from ..forward.checks import graph_hazard
from ..heads.eagle import EagleModel
from ..ops.rules import CHAIN_RULES
from ..tree import DynamicTree, Topology
from .base import DraftContext, Drafter, most_nodes_each, topology_of
from .head_forwards import PromptRows, load_model, num_known, start_head_session
from .level_session import LevelSession
from .marginals import MarginalSession, Shape, default_nodes, start_session
from .model import check_drafted, check_shape
from .parallel import HeadMarginals, check_parallel, num_depths, parallel_shape

# The tree of EAGLE-2's code: 60 nodes of width 10; the first of its 8 levels takes no forward of its own.
DEFAULT_TREE = DynamicTree(60, width=10, depth=8)
DEFAULT_TOKENS = 5  # of a chain


class EagleDrafter(Drafter):
    """Drafts with a trained EAGLE head (EAGLE-1, EAGLE-2, EAGLE-3 or P-EAGLE). `from_pretrained` loads one.

    A dynamic tree is drafted by default, as in EAGLE-2. It has 60 nodes, and fewer in batches of more than two
    sequences, see `default_tree`. Rules that accept only chains get a chain of 5 tokens. Tokens
    of a fixed shape are chosen by the acceptance rule as by `ModelDrafter`. If the head has a reduced vocabulary, other
    tokens have draft probability 0.

    The head reads hidden states of the target at the prompt and at every verified node. They are taken in the forwards
    that run in any case, on a copy of the target's modules that shares its weights. The head has a key-value cache of
    its own during the call. Each level of a draft takes one forward of the head; the first also computes the rows of
    the tokens that were accepted last.

    A P-EAGLE head takes one forward for all levels. It gives the probabilities of the tokens at all next depths, which
    do not depend on each other. By default, the likeliest 64 nodes are drafted, fewer in batches of more than two
    sequences, as deep as the checkpoint states (7 levels if it states no number). Rules that accept only chains get a
    chain of that length. A number of nodes means the likeliest ones. Longer chains and deeper trees may be asked for
    here.

    If a call continues a cache of the caller, the head sees only the columns that the call runs, so fewer drafts may be
    accepted.

    Args:
        model: the head. Embeddings and language head that it lacks are the target's.
        num_tokens: length of a chain, instead of a tree.
        tree: a topology, a number of nodes (root included) or a `DynamicTree`.
        replacement: see `ModelDrafter`.

    Raises:
        ValueError: `num_tokens` and `tree` are both given, or a value is not valid.
    """

    resizable = follows_text = True

    def __init__(
        self,
        model: EagleModel,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
    ):
        if not isinstance(model, EagleModel):
            raise ValueError(
                f"EagleDrafter: model must be an EagleModel, got {type(model).__name__}: load a checkpoint with "
                "EagleDrafter.from_pretrained"
            )
        self.model, self.num_tokens, self.tree, self.replacement = model, num_tokens, tree, replacement
        check_shape(self)

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
    ) -> "EagleDrafter":
        """Load a head from a folder or from the hub.

        The layouts of SafeAILab, SpecForge and speculators are read; the tensors' names decide which one it is. Pickled
        weights are loaded with `weights_only=True`.

        Args:
            name_or_path: a local folder, or a name on the hub.
            target: the model that the head drafts for. The head gets its device and dtype, and is checked against it.
            num_tokens, tree, replacement: see the class.
            rope_theta: base of the rotary embedding, instead of the checkpoint's.
            layers: numbers of the target's layers whose hidden states the head reads, instead of the checkpoint's.
            layer_meaning: "input" if number i means the input of layer i, "output" if it means its output. By default,
                the checkpoint's layout decides. `specdec-triton fit-head` tries both.
            dtype, device: of the head, if there is no `target`; the file's dtype and the CPU by default.

        Raises:
            ValueError: there is no such checkpoint, it is malformed or of a kind that is not supported, or it does not
                fit the target.
        """
        conventions = {"rope_theta": rope_theta, "layers": layers, "layer_meaning": layer_meaning}
        model, target = load_model(EagleModel, name_or_path, target, dtype, device, **conventions)
        drafter = cls(model, num_tokens, tree, replacement)
        if target is not None:
            drafter.check(target)
        return drafter

    def check(self, model, rule=None, tree=None):
        self.model.check_target(model)
        limit, vocab_size = "the size of the head's vocabulary", num_known(self.model, model)
        if self.model.num_drafted:
            check_parallel(self, tree, rule, self.model.num_drafted, vocab_size, limit)
        else:
            check_drafted(self, self._shape(tree, rule), rule, vocab_size, limit)

    def _shape(
        self, tree: Topology | DynamicTree | int | None, rule: str | None, batch: int = 1
    ) -> Topology | DynamicTree:
        default: Topology | DynamicTree = default_tree(batch)
        if self.num_tokens is not None or rule in CHAIN_RULES:
            default = Topology.chain(self.num_tokens or DEFAULT_TOKENS)
        return topology_of(self.tree if tree is None else tree, default, rule)

    def taps(self, model):
        return self.model.taps(model)

    def prompt_reader(self, context):
        return PromptRows(self.model, context)

    def graph_hazard(self):
        return graph_hazard(self.model)

    def start(self, context, tree=None):
        if self.model.num_drafted:
            return self._start_parallel(context, tree, self.model.num_drafted)
        shape = self._shape(tree, context.rule, len(context.start))
        return start_head_session(self, context, shape)

    def _start_parallel(
        self, context: DraftContext, tree: Shape | None, trained: int
    ) -> LevelSession | MarginalSession:
        shape = parallel_shape(self, tree, context.rule, trained, default_nodes(len(context.start)))
        depths = num_depths(self, shape, trained)
        source = HeadMarginals(self.model, context, context.prompt_reader, depths)
        return start_session(source, context, shape, self.replacement)


def default_tree(batch: int) -> DynamicTree:
    """The tree that is drafted for each of `batch` sequences if none is asked for: EAGLE-2's, or one with
    `most_nodes_each(batch)` nodes, which is less deep and less wide."""
    nodes = most_nodes_each(batch)
    if nodes >= DEFAULT_TREE.num_nodes:
        return DEFAULT_TREE
    return DynamicTree(nodes, width=min(DEFAULT_TREE.width, nodes // 2), depth=min(DEFAULT_TREE.depth, 1 + nodes // 4))
