"""Drafts with Medusa's heads, which need one hidden state of the target and no forward of a model."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..forward.wrappers import num_weights, output_logits, unwrap
from ..heads.checkpoint import kind_of, read_checkpoint
from ..heads.medusa import MedusaHeads
from ..ops.reference import Acceptance
from ..ops.rules import CHAIN_RULES
from ..tree import DraftTree, DynamicTree, Topology, topology_tensors
from .base import DraftContext, Drafter, DraftSession, check_rule, check_tree
from .candidates import ranked
from .model import check_children

NODES, WIDTH = 64, 10  # nodes of the default tree, and tokens of each head among which a tree of likely nodes chooses


class MedusaDrafter(Drafter):
    """Drafts with Medusa's heads (Cai et al. 2024, arXiv 2401.10774).

    The target's hidden state at the last accepted token gives the probabilities of the next tokens at all depths. They
    do not depend on each other, so the probability of a path is the product of those of its tokens. Tokens are ranked
    by probability, after the call's filters; none is sampled. Under "coupled", the noise that the target will use is
    added before.

    Args:
        heads: the heads, on the target's device and in its dtype.
        tree: a number of nodes, root included: the most likely nodes of each round, among the 10 best tokens of each
            head. Or a topology, at most as deep as there are heads. None: 64 nodes. Rules that accept only chains get a
            chain instead of a number of nodes, at most as long as there are heads.

    Raises:
        ValueError: `tree` is neither, or is deeper than there are heads.
    """

    resizable = True

    def __init__(self, heads: MedusaHeads, tree: Topology | int | None = None):
        if not isinstance(heads, MedusaHeads):
            raise ValueError(f"MedusaDrafter: heads must be MedusaHeads, got {type(heads).__name__}")
        self.heads, self.tree = heads, tree
        self._check_tree(tree)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        target: PreTrainedModel | None = None,
        *,
        tree: Topology | int | None = None,
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
        return _LastState()

    def check(self, model, rule=None, tree=None):
        self.heads.check_target(model)
        self._check_tree(tree)
        shape = self._shape(tree, rule)
        check_rule(self, rule, isinstance(shape, Topology) and shape.is_chain)
        known = model.config.get_text_config().vocab_size
        if isinstance(shape, Topology):
            known = min(known, self.heads.num_known or known)
            check_children(self, shape, known, "the number of tokens")

    def _check_tree(self, tree: Topology | DynamicTree | int | None) -> None:
        check_tree("MedusaDrafter", tree)
        if isinstance(tree, DynamicTree):
            raise ValueError(
                "MedusaDrafter: tree must be a Topology or a number of nodes, whose shape follows the probabilities of "
                f"the heads, got {tree}"
            )
        num_heads = self.heads.num_heads
        if isinstance(tree, int) and tree > (most := most_nodes(WIDTH, num_heads)):
            raise ValueError(
                f"MedusaDrafter: tree must have at most {most} nodes, those of the {WIDTH} best tokens of {num_heads} "
                f"heads, got {tree}"
            )
        if isinstance(tree, Topology) and tree.max_depth > num_heads:
            raise ValueError(
                f"MedusaDrafter: tree must be at most as deep as there are heads, {num_heads}, got depth "
                f"{tree.max_depth}"
            )

    def _shape(self, tree: Topology | int | None, rule: str | None) -> Topology | int:
        """The shape to draft: a topology, or the number of most likely nodes."""
        shape = self.tree if tree is None else tree
        shape = NODES if shape is None else shape
        if isinstance(shape, int) and rule in CHAIN_RULES:
            return Topology.chain(min(shape - 1, self.heads.num_heads))
        return shape

    def start(self, context, tree=None):
        return MedusaSession(self.heads, context, self._shape(tree, context.rule))


class _LastState:
    """Reads the prompt's states.

    Attributes:
        state: [B, H]. The state of the last column read.
    """

    state: torch.Tensor

    def __call__(self, states: tuple[torch.Tensor, ...], first_column: int) -> None:
        self.state = states[0][:, -1].clone()  # a view would keep the whole chunk


class _Round(NamedTuple):
    """The shape of a round's tree, a key for graphs."""

    topology: Topology | None  # None: the most likely nodes
    num_nodes: int
    depth: int


class MedusaSession(DraftSession):
    """Drafts a topology, or the most likely nodes.

    Args:
        heads: the heads.
        context: the call's sequences. Its `prompt_reader` is that of `MedusaDrafter`.
        shape: a topology, or a number of nodes. Levels of a topology that are deeper than there are heads are not
            drafted: `tree="auto"` opens a session with the deepest tree that it might ask for.
    """

    trusted = on_device = reusable = True

    def __init__(self, heads: MedusaHeads, context: DraftContext, shape: Topology | int):
        self.heads, self.context, self.shape = heads, context, shape
        self._width = min(WIDTH, heads.num_known or WIDTH, context.vocab_size)
        if isinstance(shape, Topology):
            self.max_depth, self.max_nodes = min(heads.num_heads, shape.max_depth), shape.num_nodes
        else:
            self.max_depth = min(heads.num_heads, shape - 1)
            self.max_nodes = min(shape, most_nodes(self._width, self.max_depth))
        self._target_output = partial(output_logits, context.target.model) if heads.output is None else None
        # [B, H]: the state of the last accepted token, whose own output is the root
        self._state = context.buffers.put("medusa.state", context.prompt_reader.state)
        self._depths = context.buffers.put(
            "medusa.depths", torch.arange(1, heads.num_heads + 1, device=context.start.device)
        )

    @property
    def level_cost_ratio(self) -> float:
        return num_weights(self.heads) / self.heads.num_heads / num_weights(self.context.target.model)

    def prepare(self, tree: Topology | None = None):
        """A requested `tree` is drafted in place of the session's shape."""
        context, shape = self.context, self.shape if tree is None else tree
        depth = self.max_depth if context.fixed_shapes else min(self.max_depth, context.useful_depth)
        if isinstance(shape, int):
            self._round = _Round(None, min(shape, most_nodes(self._width, depth)), min(depth, shape - 1))
            return self._round
        shape = shape.limited(depth)
        self._round = _Round(shape, shape.num_nodes, shape.max_depth)
        # captured rounds read them
        context.buffers.keep(_places(shape, context.start.device), topology_tensors(shape, context.start.device))
        return self._round

    def draft(self) -> DraftTree:
        context, (topology, num_nodes, depth) = self.context, self._round
        if not depth:
            return DraftTree.root_only(context.root[:, None])
        logits = self.heads(self._state, depth, self._target_output)[..., : context.vocab_size]
        width = self._width if topology is None else 1 + max(topology.ranks)
        log_probs, tokens, has_nan = ranked(context, logits, width, self._depths[:depth])
        if topology is None:
            tree = DraftTree.best_first(context.root, tokens, log_probs.exp(), num_nodes, context.impl)
        else:
            drafts = tokens.flatten(1)[:, _places(topology, tokens.device)]
            tree = DraftTree.from_topology(topology, torch.cat([context.root[:, None], drafts], 1))
        return replace(tree, has_nan=has_nan.any(1))

    def observe(self, tree: DraftTree, accepted: Acceptance) -> None:
        (states,) = self.context.states
        last = pad(accepted.path, (1, 0)).amax(1)  # node numbers grow along a path; the root is 0
        self._state.copy_(states[torch.arange(len(last), device=last.device), last.long()])


def most_nodes(width: int, depth: int) -> int:
    """Number of nodes, root included, of a tree in which each node above `depth` has `width` children."""
    return sum(width**level for level in range(depth + 1))


@lru_cache(maxsize=256)
def _places(topology: Topology, device: torch.device) -> torch.Tensor:
    """[N - 1] int64: for each node below the root, the place of its token among the candidates of all depths."""
    width = 1 + max(topology.ranks)
    places = [(depth - 1) * width + rank for depth, rank in zip(topology.depths, topology.ranks, strict=True)]
    return torch.tensor(places[1:], dtype=torch.int64, device=device)
