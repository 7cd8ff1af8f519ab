"""Self-drafting: the target without some of its layers is the draft model. It needs no second set of weights."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..forward.copies import copy_with, decoder_layers
from ..tree import DynamicTree, Topology
from .base import Drafter
from .model import check_confidence, check_shape, draft_shape, start_session

OWNER = "EarlyExitDrafter"  # the beginning of error messages
PER_LAYER_OPTIONS = ("hidden_size_per_layer_input", "num_kv_shared_layers")


class EarlyExitDrafter(Drafter):
    """Drafts with the target without some of its layers. The target's final norm and head follow the last layer kept.

    The layers left out are the last ones (LayerSkip, Elhoushi et al. 2024) or any given ones (Draft & Verify, Zhang et
    al. 2024). Early exit needs a model that was trained for it, such as the LayerSkip checkpoints; with other models
    few drafts are accepted.

    The draft uses the target's weights. If the first layers are kept, it also uses the target's key-value cache: those
    layers compute the same keys and values while drafting and verifying, so the prompt is not run a second time. If a
    layer is left out before one that is kept, the draft has its own cache.

    Args:
        num_layers: number of layers to keep, from the first.
        skip: indices of the layers to leave out, instead of `num_layers`.
        num_tokens: see `ModelDrafter`; the generation config is the target's.
        tree: see `ModelDrafter`.
        replacement: see `ModelDrafter`.
        confidence_threshold: see `ModelDrafter`.

    Raises:
        ValueError: `num_layers` and `skip` are both given or both missing, `num_tokens` and `tree` are both given, or a
            number is out of range.
    """

    follows_text = True

    def __init__(
        self,
        num_layers: int | None = None,
        skip: Sequence[int] | None = None,
        num_tokens: int | None = None,
        tree: Topology | DynamicTree | int | None = None,
        replacement: bool = False,
        confidence_threshold: float | None = None,
    ):
        if (num_layers is None) == (skip is None):
            raise ValueError(f"EarlyExitDrafter: give either num_layers or skip, got {num_layers!r} and {skip!r}")
        if num_layers is not None and (isinstance(num_layers, bool) or not isinstance(num_layers, int)):
            raise ValueError(f"EarlyExitDrafter: num_layers must be an integer, got {num_layers!r}")
        if skip is not None and (
            not isinstance(skip, (list, tuple, set, range))
            or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in skip)
        ):
            raise ValueError(f"EarlyExitDrafter: skip must be a list of layer indices, got {skip!r}")
        self.num_layers, self.skip = num_layers, None if skip is None else sorted(set(skip))
        self.num_tokens, self.tree, self.replacement = num_tokens, tree, replacement
        self.confidence_threshold = confidence_threshold
        check_shape(self)
        check_confidence(self)

    @property
    def resizable(self):
        return not self.confidence_threshold

    def check(self, model, rule=None, tree=None):
        kept = self._kept(model)
        with_layers(model, kept)
        config = model.config.get_text_config()
        uneven = [name for name in PER_LAYER_OPTIONS if getattr(config, name, None)]
        if uneven and len(kept) < config.num_hidden_layers:
            raise ValueError(
                f"EarlyExitDrafter: layers must not share inputs or caches, got {type(model).__name__} with "
                f"{', '.join(uneven)}: use another drafter"
            )
        draft_shape(self, tree, model, rule, config.vocab_size)

    def _kept(self, model: PreTrainedModel) -> list[int]:
        """Indices of the layers that are kept."""
        name, layers = decoder_layers(model, OWNER)
        total = len(layers)
        if self.skip is None:
            if not 1 <= self.num_layers <= total:
                raise ValueError(
                    f"EarlyExitDrafter: num_layers must be 1 to the {total} of {type(model).__name__}.{name}, got "
                    f"{self.num_layers}"
                )
            return list(range(self.num_layers))
        if self.skip and not (0 <= self.skip[0] and self.skip[-1] < total and len(self.skip) < total):
            raise ValueError(
                f"EarlyExitDrafter: skip must name some of the layers 0 to {total - 1} of {type(model).__name__}."
                f"{name}, not all, got {self.skip}"
            )
        return [layer for layer in range(total) if layer not in self.skip]

    def start(self, context, tree=None):
        model = context.target.model
        kept = self._kept(model)
        draft = with_layers(model, kept)
        shares_cache = kept == list(range(len(kept)))
        return start_session(self, draft, context, tree, shares_cache)


def with_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of the model that shares all modules but whose list of layers holds only those `kept`. `model` itself is
    not changed.

    Raises:
        ValueError: the model has no single list of layers, or `forward` was replaced on a module that contains it, see
            `copy_with`.
    """
    name, layers = decoder_layers(model, OWNER)
    copies = copy_with(model, name, nn.ModuleList(layers[layer] for layer in kept), OWNER)
    configs: dict[int, Any] = {}
    for copied in copies:
        config = getattr(copied, "config", None)
        if getattr(config, "num_hidden_layers", None) == len(layers):
            copied.config = configs.setdefault(id(config), _config_of(config, kept))
    return copies[0]


def _config_of(config, kept: Sequence[int]):
    trimmed = copy.copy(config)
    for name, value in vars(config).items():
        if name.endswith("layer_types") and value is not None:
            setattr(trimmed, name, [value[layer] for layer in kept])
    trimmed.num_hidden_layers = len(kept)
    return trimmed
