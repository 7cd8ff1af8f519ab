"""Drafts from a smaller model: a chain, or a tree whose children are expanded level by level."""

from transformers import PreTrainedModel

from ..forward.checks import check_supported, graph_hazard
from ..forward.wrappers import unwrap
from ..tree import DynamicTree, Topology
from .base import DraftContext, Drafter, check_rule, check_tree, topology_of
from .dynamic import DynamicSession
from .length import LengthRule, assistant_rule, assistant_tokens
from .model_session import ModelSession

VOCABULARY_PADDING = 0.01  # vocabularies whose sizes differ by no more share a tokenizer, padded differently


class ModelDrafter(Drafter):
    """A draft model with the target's tokenizer.

    A node's children are what the call's acceptance rule has use for: the draft's likeliest tokens, by rank; under
    "coupled" the likeliest with the target's own noise added; under the rules that weigh a token by its draft
    probability, draws from the draft's distribution, filtered as the target's is. A `DynamicTree` is cut by value, so
    it is made without sampling under every rule, and those weigh its tokens as certain.

    The draft keeps its own tree cache through the call: a token's keys and values are computed once (the last one
    twice, to keep shapes fixed).

    Args:
        model: decoder-only, in transformers' attention interface, on the target's device (PEFT and `torch.compile`
            wrappers are looked through).
        num_tokens: length of a chain. Without it (and a tree) the model's own generation config says how long drafts
            are, as in transformers: up to `num_assistant_tokens` (20), moved by `num_assistant_tokens_schedule`
            ("constant"), and no further than a token that the draft holds for unlikely.
        tree: a topology, a number of nodes (root included) or a `DynamicTree`; instead of a chain.
        replacement: siblings that are drawn may be equal; else the draft's distribution loses a token once drawn.
        confidence_threshold: nothing is drafted after a token whose draft probability is below this; 0 for never. It
            cuts chains of a fixed length, too. None: the model's own `assistant_confidence_threshold` (0.4), and
            never in a shape that was asked for.

    Raises:
        ValueError: the model cannot draft, both shapes are given, or a number is outside its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
        confidence_threshold: float | None = None,
    ):
        model = unwrap(model, "ModelDrafter")
        check_supported(model, "the draft model")
        self.model, self.num_tokens, self.tree, self.replacement = model, num_tokens, tree, replacement
        self.confidence_threshold = confidence_threshold
        check_shape(self)

    def check(self, model, rule=None, tree=None):
        if self.model.device != model.device:
            raise ValueError(f"ModelDrafter: the draft model must be on {model.device}, got {self.model.device}")
        sizes = [each.config.get_text_config().vocab_size for each in (model, self.model)]
        if abs(sizes[0] - sizes[1]) > VOCABULARY_PADDING * max(sizes):
            raise ValueError(
                f"ModelDrafter: the draft model must have the target's vocabulary of {sizes[0]} tokens, up to "
                f"{VOCABULARY_PADDING:.0%} of padding, got {sizes[1]}"
            )
        draft_shape(self, tree, self.model, rule, min(sizes))

    @property
    def resizable(self):
        return not self.confidence_threshold

    def graph_hazard(self):
        return graph_hazard(self.model)

    def start(self, context, tree=None):
        return start_session(self, self.model, context, tree)


def check_shape(drafter: Drafter) -> None:
    """Refuse a drafter's options: both shapes at once, and what is none."""
    name, length = type(drafter).__name__, drafter.num_tokens
    if length is not None and drafter.tree is not None:
        raise ValueError(f"{name}: give num_tokens (a chain) or tree, got both")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"{name}: num_tokens must be an integer of at least 1, got {length!r}")
    check_tree(name, drafter.tree)
    if not isinstance(drafter.replacement, bool):
        raise ValueError(f"{name}: replacement must be True or False, got {drafter.replacement!r}")
    confidence = drafter.confidence_threshold
    is_number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if confidence is not None and not (is_number and 0 <= confidence <= 1):
        raise ValueError(f"{name}: confidence_threshold must be None or a probability, 0 to 1, got {confidence!r}")


def draft_shape(
    drafter: Drafter,
    tree: Topology | DynamicTree | int | None,
    model: PreTrainedModel,
    rule: str | None,
    vocab_size: int,
) -> Topology | DynamicTree:
    """The tree asked for in the call, else the drafter's, else a chain as long as the drafter or `model` says.

    Raises:
        ValueError: the rule cannot use it, it is none that confidence could cut where it shall, or it has more children
            a node than there are tokens.
    """
    name = type(drafter).__name__
    length = drafter.num_tokens or assistant_tokens(name, model.generation_config)
    shape = topology_of(drafter.tree if tree is None else tree, Topology.chain(length), rule)
    dynamic = isinstance(shape, DynamicTree)
    check_rule(drafter, rule, shape.is_chain, "none" if dynamic else "without")
    if drafter.confidence_threshold and not shape.is_chain:
        raise ValueError(
            f"{name}: confidence_threshold must be None or 0 with a tree that is no chain, got "
            f"{drafter.confidence_threshold}: give num_tokens, or no threshold"
        )
    children = shape.width if dynamic else 1 + max(shape.ranks)
    if children > vocab_size:
        raise ValueError(
            f"{name}: tree must not have more children a node than the vocabulary's {vocab_size} tokens, got {children}"
        )
    return shape


def length_rule(
    drafter: Drafter, tree: Topology | DynamicTree | int | None, model: PreTrainedModel, shape: Topology | DynamicTree
) -> LengthRule | None:
    """How long chains are drafted; None: as long as the shape that was asked for."""
    if tree is None and drafter.tree is None and drafter.num_tokens is None:
        rule = assistant_rule(type(drafter).__name__, model.generation_config, drafter.confidence_threshold)
        return rule if rule.confidence > 0 or rule.config is not None else None
    return LengthRule(shape.max_depth, drafter.confidence_threshold) if drafter.confidence_threshold else None


def start_session(
    drafter: Drafter,
    model: PreTrainedModel,
    context: DraftContext,
    tree: Topology | DynamicTree | int | None,
    shares_cache: bool = False,
) -> ModelSession:
    """The session in which `model` drafts what the call or `drafter` asks for; `shares_cache`: see `ModelSession`."""
    shape = draft_shape(drafter, tree, model, context.rule, context.vocab_size)
    if isinstance(shape, DynamicTree):
        return DynamicSession(model, context, shape, shares_cache)
    length = length_rule(drafter, tree, model, shape)
    return ModelSession(model, context, shape, shares_cache, drafter.replacement, length)
