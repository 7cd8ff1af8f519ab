"""Swapping speculative decoding into a model's own `generate`, one instance at a time, and out again.

`generate` looks `_assisted_decoding` and `_sample` up on the model's class. A patched instance gets a subclass of its
class with the same name; the subclass is made once per class, and each instance's options are kept outside of it.
"""

import copyreg
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from weakref import WeakKeyDictionary

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from .attention import check_supported, graph_hazard
from .drafters import Drafter, EarlyExitDrafter, ModelDrafter, NoDrafter, PromptLookupDrafter
from .engine import cannot_capture
from .generate import TURN, Speculation
from .options import Options
from .stats import Stats
from .tree import DynamicTree, Topology
from .wrappers import unwrap

ASSISTANCE = ("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens")
MODEL_ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


_options: WeakKeyDictionary[PreTrainedModel, Options] = WeakKeyDictionary()
_holders: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()  # threads inside a `patched` block
_PATCHING = threading.RLock()
_stats: WeakKeyDictionary[PreTrainedModel, Stats] = WeakKeyDictionary()


def patch(model: PreTrainedModel, **options) -> None:
    """Make this model's `generate` speculative, until `unpatch`.

    Without a `drafter`, calls that ask for assistance (`assistant_model`, `prompt_lookup_num_tokens`,
    `assistant_early_exit`) are served and all others are untouched; with one, every call that decodes greedily
    or samples is. On a patched model
    the options are replaced.

    Args:
        model: a decoder-only transformers model (PEFT and `torch.compile` wrappers are looked through).
        **options: see `Options`.

    Raises:
        ValueError: an option or the model's family is not supported; names which, and what to do instead. Or another
            thread is inside a `patched` block of this model.
    """
    target = unwrap(model)
    chosen = Options.of(options)
    check_supported(target)
    if chosen.drafter is not None:
        _check_drafter(target, chosen.drafter, chosen.rule, chosen.tree)
    _check_graphs(target, chosen)
    with _PATCHING:
        _check_holder("patch", target)
        if not isinstance(target, SpeculativeModel):
            target.__class__ = _speculative_class(type(target))
        _options[target] = chosen


def _check_drafter(
    model: PreTrainedModel, drafter: Drafter, rule: str | None, tree: Topology | DynamicTree | int | str | None
) -> None:
    if tree == "auto" and not drafter.resizable:
        raise ValueError(
            f'patch: tree="auto" must have a drafter that drafts what it is asked for, got {type(drafter).__name__}: '
            "give a tree, or for prompt lookup branches=1"
        )
    drafter.check(model, rule, None if tree == "auto" else tree)


def _check_graphs(model: PreTrainedModel, options: Options) -> None:
    """Refuse `cuda_graphs=True` where nothing could be captured; say why "auto" will not, on a device that could."""
    hazard = graph_hazard(model) or (options.drafter and options.drafter.graph_hazard())
    why = cannot_capture(model.device) or hazard
    if options.cuda_graphs is True and why:
        raise ValueError(f'patch: cuda_graphs must be "auto" or False where rounds cannot be captured, got True: {why}')
    if options.cuda_graphs == "auto" and hazard and not cannot_capture(model.device):
        warnings.warn(f"patch: rounds will run without CUDA graphs: {hazard}", stacklevel=3)


def unpatch(model: PreTrainedModel) -> None:
    """Make `generate` what it was before `patch`.

    Raises:
        ValueError: the model is not patched, its class was changed since, or another thread is inside a `patched`
            block of it.
    """
    target = unwrap(model)
    with _PATCHING:
        if target not in _options:
            raise ValueError(f"unpatch: model must be patched, got an unpatched {type(target).__name__}")
        if not _is_ours(type(target)):
            raise ValueError(
                f"unpatch: the model's class must be the one that patch gave it, got {type(target).__name__}: undo "
                "what changed it first"
            )
        _check_holder("unpatch", target)
        _remove(target)


def _remove(model: PreTrainedModel) -> None:
    model.__class__ = type(model).__bases__[1]
    del _options[model]


@contextmanager
def patched(model: PreTrainedModel, **options) -> Iterator[PreTrainedModel]:
    """`patch` for a `with` block; afterwards the model is as it was on entry, patched or not.

    Inside, `generate` may be called from any thread (calls take turns), but the thread that entered alone may patch or
    unpatch the model.

    Args:
        model, **options: see `patch`.
    """
    target = unwrap(model)
    with _PATCHING:
        before, outer = _options.get(target), _holders.get(target)
        patch(target, **options)
        _holders[target] = threading.get_ident()
    try:
        yield model
    finally:
        with _PATCHING:
            try:
                _restore(target, before)
            finally:
                if outer is None:
                    del _holders[target]
                else:
                    _holders[target] = outer


def _restore(model: PreTrainedModel, before: Options | None) -> None:
    """What was there before a `patched` block, whatever its body did and whichever thread leaves it. Nothing is checked
    again: it was good once."""
    if before is None and model in _options:
        if not _is_ours(type(model)):
            unpatch(model)  # says what is wrong
        _remove(model)
    elif before is not None:
        if model not in _options:
            model.__class__ = _speculative_class(type(model))
        _options[model] = before


def _check_holder(what: str, model: PreTrainedModel) -> None:
    if _holders.get(model, threading.get_ident()) != threading.get_ident():
        raise ValueError(
            f"{what}: the model must not be inside another thread's `with patched(...)`, got a "
            f"{type(model).__name__} that is: wait for it, or give each thread a model of its own"
        )


def stats(model: PreTrainedModel) -> Stats:
    """What the last speculative `generate` of this model did, patched still or not.

    Raises:
        RuntimeError: there was none.
    """
    target = unwrap(model)
    if target not in _stats:
        raise RuntimeError(
            f"stats: no speculative generate() has run on this {type(target).__name__}: patch it and ask for "
            "assistance, or pass a drafter"
        )
    return _stats[target]


class SpeculativeGenerate:
    """Speculation without a patch: `model.generate(..., custom_generate=SpeculativeGenerate(drafter=...))`.

    `drafter=None` decodes without speculation through the same engine. transformers does not hand `streamer`,
    `stop_strings` or `synced_gpus` through this door: use `patched` where those are needed.

    Args:
        **options: see `Options`.

    Raises:
        ValueError: an option is not supported.
    """

    def __init__(self, **options):
        self.options = Options.of(options)

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        asked = _asked(generation_config, model_kwargs)
        if asked:
            raise ValueError(f"SpeculativeGenerate: assistance must be given as its drafter, got {', '.join(asked)}")
        _check_call(generation_config, {}, self.options)
        check_supported(model)
        options = self.options if self.options.drafter else replace(self.options, drafter=NoDrafter())
        return _speculate(
            model, options, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )


class SpeculativeModel(GenerationMixin):
    """Mixed into the class of a patched model, before the class itself."""

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        asked = _asked(generation_config, generation_mode_kwargs)
        drafter = _options[self].drafter
        if not asked and drafter is None:
            return super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if asked and drafter is not None:
            raise ValueError(
                f"generate: assistance must come from one place, got a drafter in patch() and {', '.join(asked)} in "
                "the call"
            )
        wanted = GenerationMode.ASSISTED_GENERATION if asked else None
        if generation_mode not in (wanted, GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"generate: speculative decoding must run greedy search or sampling, got {generation_mode.value} "
                f"(num_beams={generation_config.num_beams}): call it without assistance, or with num_beams=1"
            )
        _check_call(generation_config, generation_mode_kwargs, _options[self])

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        inputs_tensor=None,
        assistant_model=None,
        assistant_tokenizer=None,
        tokenizer=None,
        **model_kwargs,
    ):
        if assistant_model is not None:
            drafter = ModelDrafter(assistant_model)
        elif generation_config.assistant_early_exit is not None:
            drafter = EarlyExitDrafter(generation_config.assistant_early_exit)
        else:
            ngram = generation_config.max_matching_ngram_size
            drafter = PromptLookupDrafter(
                num_tokens=generation_config.prompt_lookup_num_tokens, **({} if ngram is None else {"max_ngram": ngram})
            )
        options = replace(_options[self], drafter=drafter)
        return _speculate(
            self, options, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer
        )

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        options = _options[self]
        if options.drafter is None:
            with TURN:  # not while another thread's call has the attention swapped
                return super()._sample(
                    input_ids,
                    logits_processor=logits_processor,
                    stopping_criteria=stopping_criteria,
                    generation_config=generation_config,
                    synced_gpus=synced_gpus,
                    streamer=streamer,
                    **model_kwargs,
                )
        return _speculate(
            self, options, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer
        )

    def __reduce_ex__(self, protocol):
        """Pickles and copies are of the model's own class: what is loaded elsewhere is not patched."""
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        # pickle insists that copyreg.__newobj__ makes the object's present class
        return copyreg._reconstructor, (type(self).__bases__[1], object, None), *state


@cache
def _speculative_class(base: type) -> type:
    # one class a base: a fresh one each time would make torch.compile compile again
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (SpeculativeModel, base), body)


def _is_ours(cls: type) -> bool:
    return cls.__bases__[0] is SpeculativeModel


def _asked(generation_config: GenerationConfig, arguments: dict) -> list[str]:
    """The assistance that a call asks for, by argument name."""
    asked = [name for name in ("assistant_model", "assistant_tokenizer") if arguments.get(name) is not None]
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_ensemble_weight", "use_mtp"):
        if getattr(generation_config, name, None) not in (None, False):
            asked.append(name)
    if getattr(generation_config, "speculation_type", None) not in (None, "assistant"):
        asked.append("speculation_type")
    return asked


def _check_call(config: GenerationConfig, arguments: dict, options: Options) -> None:
    """Refuse, by name, what a speculative call cannot honour."""
    asked = _asked(config, arguments)
    unsupported = sorted(set(asked) - set(ASSISTANCE))
    if unsupported:
        raise ValueError(
            f"generate: assistance must be one of {', '.join(ASSISTANCE)} on a patched model, got "
            f"{', '.join(unsupported)}: unpatch the model to use transformers' own"
        )
    if len(asked) > 1:
        raise ValueError(f"generate: one kind of assistance must be asked for, got {', '.join(asked)}")
    if config.do_sample and options.rule == "greedy":
        raise ValueError(
            'generate: rule must be None or a sampling rule with do_sample=True, got "greedy": set do_sample=False, or '
            "patch the model with another rule"
        )
    if (config.num_beams or 1) > 1:
        raise ValueError(
            f"generate: num_beams must be 1 with speculative decoding, got {config.num_beams}: search beams without it"
        )
    if config.use_cache is False:
        raise ValueError("generate: use_cache must be True with speculative decoding, got False")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"generate: cache_implementation must be None or 'dynamic' with speculative decoding, got "
            f"{config.cache_implementation!r}: the cache is made here"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise ValueError(f"generate: {name} must be False with speculative decoding, got True")
    if arguments.get("synced_gpus"):
        raise ValueError("generate: synced_gpus must be False with speculative decoding, got True")


def _speculate(
    model, options, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, streamer=None
):
    if not input_ids.shape[1]:
        raise ValueError("generate: input_ids must hold a prompt with speculative decoding, got inputs_embeds alone")
    model_kwargs.pop("tokenizer", None)  # the stopping criteria have it
    unknown = sorted(key for key, value in model_kwargs.items() if value is not None and key not in MODEL_ARGUMENTS)
    if unknown:
        raise ValueError(
            f"generate: model arguments must be among {', '.join(sorted(MODEL_ARGUMENTS))} with speculative decoding, "
            f"got {', '.join(unknown)}"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        raise ValueError("generate: past_key_values must be None with speculative decoding, got the caller's cache")
    rule = (options.rule or "coupled") if generation_config.do_sample else "greedy"
    _check_drafter(model, options.drafter, rule, options.tree)
    speculation = Speculation(
        model,
        replace(options, rule=rule),
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer,
        model_kwargs,
    )
    _stats[model] = speculation.stats
    return speculation.run()
