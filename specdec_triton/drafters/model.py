"""Drafts from a smaller model: a chain, a tree that is expanded level by level, or all levels from one forward."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forward.checks import check_supported, graph_hazard
from ..forward.wrappers import embedded_tokens, unwrap
from ..heads.eagle import EagleModel
from ..tree import DynamicTree, Topology
from .base import DraftContext, Drafter, check_children, check_rule, check_tree, topology_of
from .dynamic import DynamicSession
from .forwards import ModelForwards
from .length import ChainLength, LengthRule, assistant_rule, assistant_tokens
from .level_session import LevelSession
from .marginals import start_session as start_marginal_session
from .parallel import ModelMarginals, check_parallel, num_depths, parallel_shape
from .translated import TranslatedForwards
from .vocabulary import VocabularyMap, have_same_vocabulary

# Vocabularies whose sizes differ by at most this share are assumed to belong to one tokenizer with different padding.
VOCABULARY_PADDING = 0.01
# of a parallel draft, if the generation config sets no number: the number in the code and documentation of PARD
PARALLEL_TOKENS = 12
# model types of Gemma 4 assistants, which read their target's keys, and the versions of transformers that build them
SHARED_KV_ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")
SHARED_KV_VERSIONS = "5.17 to 5.22 and 5.24, but not 5.23.0"
SIZE, SHARED = "the size of the vocabulary", "the tokens that both vocabularies have"  # limits of a node's children


class ModelDrafter(Drafter):
    """Drafts with a smaller model. If it does not have the target's tokenizer, both tokenizers must be given.

    The acceptance rule of the call decides how the children of a node are chosen:

    - "greedy" and "typical": the draft's most likely tokens, by rank.
    - "coupled": the most likely tokens after adding the noise that the target will use.
    - Rules that use draft probabilities ("rejection", "block", "multi_round", "traversal"): tokens drawn from the
      draft's distribution, with the call's filters applied.

    The nodes of a `DynamicTree` are selected by score, so its tokens are never drawn. Rules that use draft
    probabilities treat them as having probability 1.

    The draft model has its own tree cache during the call. The keys and values of each token are computed once, except
    those of the last token, which are computed twice to keep shapes fixed.

    Args:
        model: a decoder-only model that uses transformers' attention interface, on the target's device. PEFT and
            `torch.compile` wrappers are unwrapped.
        num_tokens: length of the drafted chain. If `num_tokens` and `tree` are None, the model's generation config
            sets the length, as in transformers: at most `num_assistant_tokens` (5 if it is not set), adjusted by
            `num_assistant_tokens_schedule` ("constant" by default), and the draft ends early after a token of low
            probability (see `confidence_threshold`).
        tree: a topology, a number of nodes (root included) or a `DynamicTree`, instead of a chain.
        replacement: True draws siblings with replacement, so that they may be equal. False draws them without
            replacement.
        confidence_threshold: a chain ends after a token whose draft probability is below this, also if `num_tokens`
            is given; 0 disables it. None: if `num_tokens` and `tree` are None, the model's own
            `assistant_confidence_threshold` (0.4 by default) applies, otherwise no threshold.
        parallel: True for a PARD model (An et al. 2025, arXiv 2504.18583), whose config names its mask token
            (`pard_token`). One forward then predicts the tokens at all next depths, independently of each other. An
            integer is the id of the mask token of a model whose config lacks it. By default, the tokens of a chain are
            drafted one after another, also by a PARD model. With `parallel`, the default is a chain of
            `num_assistant_tokens` tokens (12 if it is not set), a number of nodes means the likeliest ones, and neither
            schedules nor confidence thresholds apply.
        tokenizer, assistant_tokenizer: the tokenizers of the target and of `model`, if they differ. Tokens that only
            the draft has are never drafted, and tokens that only the target has are given to the draft as the tokens of
            their text, see `VocabularyMap`.

    Raises:
        ValueError: the model is not supported, `num_tokens` and `tree` are both given, a number is out of range,
            `parallel` is True and the model's config names no mask token, only one tokenizer is given, a tokenizer is
            not that of its model, or the tokenizers have no token in common.
    """

    follows_text = True

    def __init__(
        self,
        model: PreTrainedModel,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
        confidence_threshold: float | None = None,
        parallel: bool | int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        check_alone(model)
        model = unwrap(model, "ModelDrafter")
        check_supported(model, "the draft model")
        self.model, self.num_tokens, self.tree, self.replacement = model, num_tokens, tree, replacement
        self.confidence_threshold, self.parallel = confidence_threshold, parallel
        check_shape(self)
        check_confidence(self)
        self._mask_token_id = mask_token_of(model, parallel)
        if self._mask_token_id is not None and confidence_threshold:
            raise ValueError(
                "ModelDrafter: confidence_threshold must be None or 0 with parallel, which drafts all tokens at once, "
                f"got {confidence_threshold}"
            )
        self._vocabulary = vocabulary_of(model, tokenizer, assistant_tokenizer)
        self._same_tokens = tokenizer is not None and self._vocabulary is None
        if self._mask_token_id is not None and self._vocabulary is not None:
            raise ValueError("ModelDrafter: tokenizer and assistant_tokenizer must be None with parallel, got both")

    def __repr__(self) -> str:
        shown = super().__repr__()
        return shown if self._vocabulary is None else f"{shown[:-1]}, shared_tokens={self._vocabulary.num_shared})"

    def check(self, model, rule=None, tree=None):
        if self.model.device != model.device:
            raise ValueError(f"ModelDrafter: the draft model must be on {model.device}, got {self.model.device}")
        sizes = [each.config.get_text_config().vocab_size for each in (model, self.model)]
        if self._vocabulary is not None:
            check_fits("tokenizer", len(self._vocabulary.counts), sizes[0], "target")
            shared = self._vocabulary.resized(sizes[0], model.device).num_shared
            draft_shape(self, tree, self.model, rule, shared, SHARED)
            return
        if not self._same_tokens and abs(sizes[0] - sizes[1]) > VOCABULARY_PADDING * max(sizes):
            raise ValueError(
                f"ModelDrafter: the draft model must have the target's vocabulary of {sizes[0]} tokens, up to "
                f"{VOCABULARY_PADDING:.0%} of padding, got {sizes[1]}: if it has another tokenizer, give tokenizer and "
                "assistant_tokenizer"
            )
        if self._mask_token_id is None:
            draft_shape(self, tree, self.model, rule, min(sizes))
        else:
            check_parallel(self, tree, rule, self._parallel_tokens, min(sizes), SIZE)

    @property
    def _parallel_tokens(self) -> int:
        """Number of tokens of a parallel draft if no other is asked for."""
        return assistant_tokens("ModelDrafter", self.model.generation_config, PARALLEL_TOKENS)

    @property
    def resizable(self):
        return not self.confidence_threshold

    def graph_hazard(self):
        return graph_hazard(self.model)

    def start(self, context, tree=None):
        if self._mask_token_id is None:
            vocabulary = self._vocabulary and self._vocabulary.resized(context.vocab_size, context.start.device)
            return start_session(self, self.model, context, tree, vocabulary=vocabulary)
        tokens = self._parallel_tokens
        shape = parallel_shape(self, tree, context.rule, tokens, Topology.chain(tokens))
        source = ModelMarginals(self.model, context, self._mask_token_id, num_depths(self, shape, tokens))
        return start_marginal_session(source, context, shape, self.replacement)


def check_alone(model: PreTrainedModel) -> None:
    """Refuse a model that cannot draft from tokens alone, because it reads hidden states or keys of its target.

    Raises:
        ValueError: the message names the class.
    """
    config, name = getattr(model, "config", None), type(model).__name__
    kind = str(getattr(config, "model_type", ""))
    is_head = isinstance(model, EagleModel) or "DFlash" in name or hasattr(config, "dflash_config")
    if kind in SHARED_KV_ASSISTANTS:
        instead = f"use Gemma4AssistantDrafter (transformers that build the model: {SHARED_KV_VERSIONS})"
    elif is_head or kind.endswith("_assistant"):
        instead = (
            "heads are loaded by EagleDrafter.from_pretrained, DFlashDrafter.from_pretrained and "
            "MedusaDrafter.from_pretrained, or pass the model as assistant_model= of generate"
        )
    else:
        return
    raise ValueError(
        f"ModelDrafter: model must draft from tokens alone, got {name}, which reads hidden states or keys of its "
        f"target: {instead}"
    )


def mask_token_of(model: PreTrainedModel, parallel: bool | int | None) -> int | None:
    """The id of the mask token that `parallel` of `ModelDrafter` asks for; None if drafts are not parallel.

    Raises:
        ValueError: `parallel` is True and the model's config names no mask token, or the model has no embedding of it.
    """
    if parallel is None or parallel is False:
        return None
    token = getattr(model.config, "pard_token", None) if parallel is True else parallel
    if token is None:
        raise ValueError(
            f"ModelDrafter: parallel=True needs a PARD model, whose config has pard_token, got {type(model).__name__} "
            "without it: give the id of its mask token as parallel="
        )
    known = embedded_tokens(model)
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < known:
        raise ValueError(
            f"ModelDrafter: the mask token of parallel must be the id of one of the {known} embeddings of the draft "
            f"model, got {token!r}"
        )
    return token


def vocabulary_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    assistant_tokenizer: PreTrainedTokenizerBase | None,
) -> VocabularyMap | None:
    """The map between the vocabularies of a target and the draft model `model`; None if they are the same.

    Raises:
        ValueError: only one tokenizer is given, an argument is not a tokenizer, a tokenizer has more tokens than the
            model, or the vocabularies have no token in common.
    """
    given = {"tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer}
    if tokenizer is None and assistant_tokenizer is None:
        return None
    for name, each in given.items():
        if not isinstance(each, PreTrainedTokenizerBase):
            raise ValueError(
                f"ModelDrafter: {name} must be a tokenizer of transformers, together with the other's, got "
                f"{'None' if each is None else type(each).__name__}"
            )
    size = min(model.config.get_text_config().vocab_size, embedded_tokens(model))
    check_fits("assistant_tokenizer", len(assistant_tokenizer), size, "draft")
    if have_same_vocabulary(tokenizer, assistant_tokenizer):
        return None
    return VocabularyMap.from_tokenizers(tokenizer, assistant_tokenizer, draft_vocab_size=size)


def check_fits(name: str, size: int, known: int, role: str) -> None:
    """Refuse a tokenizer that is not that of its model, because it has many more tokens."""
    if size > (1 + VOCABULARY_PADDING) * known:
        raise ValueError(
            f"ModelDrafter: {name} must be the tokenizer of the {role} model, which has {known} tokens, got one of "
            f"{size}"
        )


def check_shape(drafter: Drafter) -> None:
    """Refuse invalid values of a drafter's `num_tokens`, `tree` and `replacement`."""
    name, length = type(drafter).__name__, drafter.num_tokens
    if length is not None and drafter.tree is not None:
        raise ValueError(f"{name}: give either num_tokens (a chain) or tree, got both")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise ValueError(f"{name}: num_tokens must be an integer of at least 1, got {length!r}")
    check_tree(name, drafter.tree)
    if not isinstance(drafter.replacement, bool):
        raise ValueError(f"{name}: replacement must be True or False, got {drafter.replacement!r}")


def check_confidence(drafter: Drafter) -> None:
    """Refuse an invalid value of a drafter's `confidence_threshold`."""
    confidence = drafter.confidence_threshold
    is_number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if confidence is not None and not (is_number and 0 <= confidence <= 1):
        raise ValueError(
            f"{type(drafter).__name__}: confidence_threshold must be None or a probability, 0 to 1, got {confidence!r}"
        )


def check_drafted(
    drafter: Drafter,
    shape: Topology | DynamicTree,
    rule: str | None,
    vocab_size: int,
    limit: str = SIZE,
) -> None:
    """Refuse a shape that the rule does not accept, or with a node of more children than there are tokens."""
    check_rule(drafter, rule, shape.is_chain, "none" if isinstance(shape, DynamicTree) else "without")
    check_children(drafter, shape, vocab_size, limit)


def draft_shape(
    drafter: Drafter,
    tree: Topology | DynamicTree | int | None,
    model: PreTrainedModel,
    rule: str | None,
    vocab_size: int,
    limit: str = SIZE,
) -> Topology | DynamicTree:
    """The shape to draft: `tree` if it is given, else the drafter's tree, else a chain. The length of the chain is the
    drafter's `num_tokens` or, without it, `num_assistant_tokens` of `model`'s generation config. `limit`: see
    `check_children`.

    Raises:
        ValueError: the rule does not accept the shape, a confidence threshold is set but the shape is not a chain, or a
            node has more children than there are tokens.
    """
    name = type(drafter).__name__
    length = drafter.num_tokens or assistant_tokens(name, model.generation_config)
    shape = topology_of(drafter.tree if tree is None else tree, Topology.chain(length), rule)
    if drafter.confidence_threshold and not shape.is_chain:
        raise ValueError(
            f"{name}: confidence_threshold must be None or 0 with a tree that is not a chain, got "
            f"{drafter.confidence_threshold}: give num_tokens, or no threshold"
        )
    check_drafted(drafter, shape, rule, vocab_size, limit)
    return shape


def length_rule(
    drafter: Drafter, tree: Topology | DynamicTree | int | None, model: PreTrainedModel, shape: Topology | DynamicTree
) -> LengthRule | None:
    """The rule for the length of chains, or None if every chain has the length of `shape`."""
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
    vocabulary: VocabularyMap | None = None,
) -> LevelSession:
    """Start the session in which `model` drafts the shape that the call or `drafter` asks for.

    Args:
        drafter: the drafter.
        model: the draft model.
        context: the call's sequences.
        tree: see `Drafter.start`.
        shares_cache: see `ModelForwards`.
        vocabulary: see `TranslatedForwards`; None if the model has the target's tokenizer.
    """
    known, limit = (context.vocab_size, SIZE) if vocabulary is None else (vocabulary.num_shared, SHARED)
    shape = draft_shape(drafter, tree, model, context.rule, known, limit)

    def forwards(most_nodes: int) -> ModelForwards:
        if vocabulary is None:
            return ModelForwards(model, context, most_nodes, shares_cache)
        return TranslatedForwards(model, context, most_nodes, shape.max_depth, vocabulary)

    if isinstance(shape, DynamicTree):
        return DynamicSession(forwards(shape.num_expanded), context, shape)
    rule = length_rule(drafter, tree, model, shape)
    length = None if rule is None else ChainLength(context, rule)
    if length is not None:
        shape = Topology.chain(length.longest)
    return LevelSession(forwards(shape.num_nodes), context, shape, drafter.replacement, length)
