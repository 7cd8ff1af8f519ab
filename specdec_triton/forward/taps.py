"""Hidden states of a model, read inside its forward.

A copy of the model that shares all parameters holds recorders: modules in place of some decoder layers, which store
their input or output and call the layer itself. Neither hooks nor `output_hidden_states` are used. The model is not
changed. A forward that is compiled or captured returns the states as outputs.

Letters: B sequences, n columns or nodes of a forward, Ht hidden size, L decoder layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .checks import layer_forward
from .copies import HOOKS, copy_with, decoder_layers, subclass

# int i, 0 <= i < L: the input of decoder layer i, which is transformers' hidden_states[i]
# "last": the output of the last decoder layer, before the final norm
# "final": the decoder's last_hidden_state, after the final norm, which is transformers' hidden_states[L]
Tap = int | Literal["last", "final"]
# gets the states of one forward over the prompt, [B, n, Ht] for each tap, and its first column
Read = Callable[[tuple[torch.Tensor, ...], int], None]
OWNER = "generate: the drafter reads hidden states of the target"  # the beginning of error messages


class TappedModel:
    """A copy of a model that also returns hidden states.

    Args:
        model: the model. It is not changed.
        taps: the wanted states.
        owner: the beginning of error messages.

    Attributes:
        model: the copy. It shares all modules except those that contain the list of decoder layers, and the layers
            that have recorders.

    Raises:
        ValueError: a tap is not one of the model's, the model has no single list of decoder layers, or the forward of a
            module that contains it was replaced. In a forward: a layer was not called, or a state is not [B, n, Ht].
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[Tap], owner: str = OWNER):
        name, layers = decoder_layers(model, owner)
        self.taps, self._owner, self._found = tuple(taps), owner, _Found()
        total = len(layers)
        strange = [tap for tap in self.taps if tap not in ("last", "final") and not _is_index(tap, total)]
        if strange:
            raise ValueError(
                f"{owner}: taps must be the {total} layers of {type(model).__name__}.{name}, 0 to {total - 1}, or "
                f"'last' or 'final', got {strange}"
            )
        last = total - 1 if "last" in self.taps else None
        listed = [
            _recording(layer, self._found, index if index in self.taps else None, index == last)
            for index, layer in enumerate(layers)
        ]
        copies = copy_with(model, name, nn.ModuleList(listed), owner)
        self.model = copies[0]
        if "final" in self.taps:
            decoder = copies[-1]
            decoder.recorder = _DecoderRecorder(layer_forward(decoder), self._found)
            vars(decoder).pop("forward", None)
            decoder.__class__ = subclass(type(decoder), "Recording", _decoder_forward)

    def __call__(self, **arguments: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """The model's outputs, and the states [B, n, Ht] of each tap."""
        self._found.states = {}
        outputs = self.model(**arguments)
        return outputs, self._take()

    def _take(self) -> tuple[torch.Tensor, ...]:
        """The recorded states. They are not kept."""
        found, self._found.states = self._found.states, {}
        lacking = [tap for tap in self.taps if tap not in found]
        if lacking:
            raise ValueError(
                f"{self._owner}: the forward of {type(self.model).__name__} must call every decoder layer, got no "
                f"state for the taps {lacking}: use another drafter"
            )
        states = tuple(found[tap] for tap in self.taps)
        if any(state.dim() != 3 for state in states):
            raise ValueError(
                f"{self._owner}: hidden states must be [B, n, Ht], got {[list(state.shape) for state in states]} for "
                f"the taps {list(self.taps)} of {type(self.model).__name__}: use another drafter"
            )
        return states

    @contextmanager
    def reading(self, read: Read | None, cache: Cache) -> Iterator[None]:
        """Within this context, each forward of `model` gives its states to `read`, and they are not kept.

        Args:
            read: called after each forward with the states and the first column of the forward; None drops them.
            cache: the cache of these forwards. Its length is the first column of the next one.
        """
        column = cache.get_seq_length()

        def after(*_: Any) -> None:
            nonlocal column
            states = self._take()
            if read is not None:
                read(states, column)
            column = cache.get_seq_length()

        hook = self.model.register_forward_hook(after)
        try:
            yield
        finally:
            hook.remove()
            self._found.states = {}


class _Found:
    """The states that recorders have stored in a forward, by tap."""

    def __init__(self) -> None:
        self.states: dict[Tap, torch.Tensor] = {}


class _LayerRecorder:
    """Data of a layer that records. `tap`: the tap of its input, or None; `is_last`: True to record its output."""

    def __init__(self, layer: nn.Module, found: _Found, tap: int | None, is_last: bool):
        self.layer, self.found, self.tap, self.is_last = layer, found, tap, is_last


class _DecoderRecorder:
    """Data of a decoder that records its output. `function`: its forward before it recorded."""

    def __init__(self, function: Callable, found: _Found):
        self.function, self.found = function, found


def _is_index(tap: Any, total: int) -> bool:
    return isinstance(tap, int) and not isinstance(tap, bool) and 0 <= tap < total


def _recording(layer: nn.Module, found: _Found, tap: int | None, is_last: bool) -> nn.Module:
    """A module with the attributes of a layer that records states and calls the layer; the layer itself if there is
    nothing to record. Hooks, compilation and a replaced forward of the layer are used by that call.

    The class has another forward. Hooks would not do: compiled code does not check whether a module's hooks changed.
    """
    if tap is None and not is_last:
        return layer
    recorder = object.__new__(subclass(type(layer), "Recording", _layer_forward))
    recorder.__dict__ = {**vars(layer), "_compiled_call_impl": None}
    vars(recorder).pop("forward", None)
    for name in HOOKS:
        recorder.__dict__[name] = type(vars(layer)[name])()
    recorder.recorder = _LayerRecorder(layer, found, tap, is_last)
    return recorder


def _layer_forward(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    recorder: _LayerRecorder = module.recorder
    if recorder.tap is not None:
        recorder.found.states[recorder.tap] = inputs[0] if inputs else named["hidden_states"]
    outputs = recorder.layer(*inputs, **named)
    if recorder.is_last:
        recorder.found.states["last"] = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return outputs


def _decoder_forward(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    recorder: _DecoderRecorder = module.recorder
    outputs = recorder.function(module, *inputs, **named)
    recorder.found.states["final"] = outputs[0]
    return outputs
