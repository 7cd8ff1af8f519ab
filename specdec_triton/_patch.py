"""Adds speculative decoding to the `generate` method of single model instances, and removes it again.

`generate` looks up `_assisted_decoding` and `_sample` on the model's class. A patched instance is given a subclass of
its class. The subclass has the same name and is created once per class. The options are stored in an attribute of the
instance. Nothing else of the model changes: attention is replaced only during a verify forward, see
`forward.attention`.

There are no locks, because a forked child process could inherit a lock that is held. Each change is a single
assignment, after which `_update_class` sets the model's class accordingly. If a caller is interrupted in between, it
undoes the change or completes it.
"""

import copyreg
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from ._stats import Stats
from .drafters import (
    DFlashDrafter,
    Drafter,
    EarlyExitDrafter,
    ModelDrafter,
    MTPDrafter,
    NoDrafter,
    PromptLookupDrafter,
)
from .drafters.heads import drafter_of_assistant, load_head
from .engine.call import Call
from .engine.generate import Generation
from .engine.graph_runner import cannot_capture
from .engine.inputs import asked_assistance, check_call, check_continuous_batching, check_drafter
from .engine.workspace import Workspaces
from .forward.checks import check_generate, check_supported, graph_hazard
from .forward.versions import warn_if_untested
from .forward.wrappers import unwrap
from .options import Options, Seed, Tree, with_known_options
from .tree_choice.costs import Costs

STATE = "_specdec_triton"  # name of the attribute of a patched model that holds its `_State`

_stats: WeakKeyDictionary[PreTrainedModel, Stats] = WeakKeyDictionary()
# graphs and buffers of patched models; they refer neither to the model nor to its drafter
_workspaces: WeakKeyDictionary[PreTrainedModel, Workspaces] = WeakKeyDictionary()
# drafters that calls asked for
_drafters: WeakKeyDictionary[PreTrainedModel, "_Drafters"] = WeakKeyDictionary()


@dataclass(eq=False)
class _Drafters:
    """The drafters that calls of a patched model asked for by arguments of `generate`, kept for later calls.

    Attributes:
        by_name: heads by folder or hub name, with the dtype and device of the model for which they were loaded.
        by_model: drafters that share the parameters of a model of the caller, and do not refer to that object.
    """

    by_name: dict[str | None, tuple[tuple[torch.dtype, torch.device], Drafter]] = field(default_factory=dict)
    by_model: WeakKeyDictionary[PreTrainedModel, Drafter] = field(default_factory=WeakKeyDictionary)


@dataclass(eq=False)
class _Block:
    """A `with patched(...)` block. Its options are None if `unpatch` was called inside it, or if it is closed."""

    options: Options | None
    closed: bool = False
    thread: int = field(default_factory=threading.get_ident)


@dataclass(eq=False)
class _State:
    """The options of a model. They are stored on the model itself: a global table would keep a model alive if its
    drafter refers to it."""

    base: Options | None = None  # set by `patch`
    blocks: list[_Block] = field(default_factory=list)  # opened by `patched`


# open blocks of this thread or asyncio task, innermost last
_open_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("specdec_triton_blocks", default=())


@with_known_options
def patch(
    model: PreTrainedModel,
    *,
    drafter: Drafter | None = None,
    rule: str | None = None,
    tree: Tree = None,
    costs: Costs | None = None,
    seed: Seed = None,
    cuda_graphs: Literal["auto"] | bool = "auto",
    compile: bool = False,
    fuse: Literal["auto"] | bool = "auto",
    impl: Literal["triton", "reference"] | None = None,
) -> None:
    """Make this model's `generate` speculative until `unpatch` is called.

    Greedy decoding gives the same text as plain `generate` (in bf16 and fp16, tokens whose logits nearly tie may
    differ). Sampling gives the same distribution, except under the lossy rule "typical". If the model is already
    patched, its options are replaced.

    Args:
        model: a decoder-only transformers model. PEFT and `torch.compile` wrappers are unwrapped.
        drafter: proposes draft tokens, for example `ModelDrafter(draft_model)`. With a drafter, every call that decodes
            greedily or samples is speculative. None: only calls that ask for assistance (`assistant_model`,
            `prompt_lookup_num_tokens`, `assistant_early_exit`) are speculative; other calls run as before.
        rule: acceptance rule of calls that sample; see `Options`.
        tree: shape of the draft; see `Options`.
        costs: seconds that a round takes, for `tree="auto"`; see `Options`.
        seed: makes sampled texts repeatable; see `Options`.
        cuda_graphs: whether rounds are captured as CUDA graphs; see `Options`.
        compile: run the tree forwards through `torch.compile`.
        fuse: run the tree forwards of known decoder layers in fewer kernels; see `Options`.
        impl: implementation of the ops: "triton", "reference", or None for the better one on the model's device.

    Raises:
        ValueError: an option or the model is not supported; the message names it and suggests an alternative. Also
            raised if another thread is inside a `patched` block of this model.
        TypeError: an option is unknown; the message names the most similar one.
    """
    options = Options(drafter, rule, tree, costs, seed, cuda_graphs, compile, fuse, impl, owner="patch")
    target = unwrap(model)
    _replace("patch", target, _checked("patch", target, options))


def _checked(owner: str, model: PreTrainedModel, options: Options) -> Options:
    """Return `options`; raise a `ValueError` if the model cannot be decoded with them."""
    warn_if_untested()
    check_generate(model)
    check_supported(model)
    if options.drafter is not None:
        check_drafter(owner, model, options.drafter, options.rule, options.tree)
    _check_graphs(owner, model, options)
    return options


def _check_graphs(owner: str, model: PreTrainedModel, options: Options) -> None:
    """Refuse `cuda_graphs=True` if rounds cannot be captured. With "auto", warn if the device supports graphs but the
    model or the drafter does not."""
    hazard = graph_hazard(model) or (options.drafter and options.drafter.graph_hazard())
    why = cannot_capture(model.device) or hazard
    if options.cuda_graphs is True and why:
        raise ValueError(f'{owner}: cuda_graphs must be "auto" or False if rounds cannot be captured, got True: {why}')
    if options.cuda_graphs == "auto" and hazard and not cannot_capture(model.device):
        warnings.warn(f"{owner}: rounds will run without CUDA graphs: {hazard}", stacklevel=3)


def unpatch(model: PreTrainedModel) -> None:
    """Restore the `generate` that the model had before `patch`.

    Inside a `patched` block, the model is unpatched for the rest of that block.

    Raises:
        ValueError: the model is not patched, its class was changed since, or another thread is inside a `patched`
            block of it.
    """
    target = unwrap(model)
    state = _state(target)
    if not isinstance(target, SpeculativeModel) or (_current_options(target) is None and (state.base or state.blocks)):
        raise ValueError(f"unpatch: model must be patched, got an unpatched {type(target).__name__}")
    if not _is_ours(type(target)):
        raise ValueError(
            f"unpatch: the model's class must be the one that patch gave it, got {type(target).__name__}: undo "
            "the later change of its class first"
        )
    _replace("unpatch", target, None)


@with_known_options
@contextmanager
def patched(
    model: PreTrainedModel,
    *,
    drafter: Drafter | None = None,
    rule: str | None = None,
    tree: Tree = None,
    costs: Costs | None = None,
    seed: Seed = None,
    cuda_graphs: Literal["auto"] | bool = "auto",
    compile: bool = False,
    fuse: Literal["auto"] | bool = "auto",
    impl: Literal["triton", "reference"] | None = None,
) -> Iterator[PreTrainedModel]:
    """Patch the model for a `with` block and restore its earlier state on exit, patched or not.

    Inside the block, `generate` may be called from any thread, but no other thread may patch or unpatch the model.
    Blocks of several asyncio tasks may overlap and end in any order; the calls of each task use the options of its own
    block.

    The arguments are those of `patch`.

    Raises:
        ValueError, TypeError: as for `patch`.
    """
    options = Options(drafter, rule, tree, costs, seed, cuda_graphs, compile, fuse, impl, owner="patched")
    target = unwrap(model)
    block = _Block(_checked("patched", target, options))
    _check_threads("patched", target)
    try:
        try:
            state = _state(target, make=True)
            state.blocks.append(block)
            vars(target)[STATE] = state  # again, since another thread may have closed its last block and removed it
            _open_blocks.set((*(other for other in _open_blocks.get() if not other.closed), block))
            _update_class(target)
            yield model
        finally:
            _close(target, block)
    finally:
        _close(target, block)  # again, in case an interrupt stopped the first call


def _close(model: PreTrainedModel, block: _Block) -> None:
    """Close a block, whatever its body did and whichever thread leaves it. The options that apply afterwards are not
    checked again."""
    _open_blocks.set(tuple(other for other in _open_blocks.get() if other is not block))
    state = _state(model)
    if block in state.blocks:
        state.blocks.remove(block)
    block.options, block.closed = None, True
    if isinstance(model, SpeculativeModel) and not _is_ours(type(model)) and not (state.base or state.blocks):
        raise ValueError(
            f"patched: the model's class must be the one that patch gave it, got {type(model).__name__}: undo the "
            "later change of its class, then call unpatch"
        )
    _update_class(model)
    _free(model)


def _free(model: PreTrainedModel) -> int:
    """Free what earlier calls of a patched model left for later ones. Returns the number of bytes, without those of
    heads."""
    _drafters.pop(model, None)
    kept = _workspaces.pop(model, None)
    return kept.release() if kept else 0


def _replace(owner: str, model: PreTrainedModel, options: Options | None) -> None:
    """Replace the options of the caller's innermost block or, outside of blocks, those of `patch`."""
    _check_threads(owner, model)
    block = _own_block(model)
    before = block.options if block else _state(model).base
    try:
        if block:
            block.options = options
        else:
            _state(model, make=True).base = options
        _update_class(model)
        _free(model)
    except BaseException:
        if block:
            block.options = before
        else:
            _state(model, make=True).base = before
        _update_class(model)
        raise


def _state(model: PreTrainedModel, make: bool = False) -> _State:
    return vars(model).setdefault(STATE, _State()) if make else vars(model).get(STATE) or _State()


def _own_block(model: PreTrainedModel) -> _Block | None:
    """The innermost block of this model that the thread or asyncio task is in."""
    open_here = _state(model).blocks
    return next((block for block in reversed(_open_blocks.get()) if block in open_here), None)


def _current_options(model: PreTrainedModel) -> Options | None:
    """The options of a call made here: those of the caller's own block, else of the latest open block, else of
    `patch`."""
    state = _state(model)
    block = _own_block(model) or next(reversed(state.blocks), None)
    return block.options if block else state.base


def _update_class(model: PreTrainedModel) -> None:
    """Set the model's class according to its state. The function is idempotent and may be called at any time."""
    while True:
        state = _state(model)
        wanted = _wants_patch(state)
        if wanted and not isinstance(model, SpeculativeModel):
            own_class: type = type(model)
            model.__class__ = _speculative_class(own_class)
        if not wanted and _is_ours(type(model)):
            model.__class__ = type(model).__bases__[1]
        if not wanted and not state.blocks:
            vars(model).pop(STATE, None)
            if state.blocks:  # another thread has opened a block in the meantime
                vars(model)[STATE] = state
        if _wants_patch(_state(model)) == wanted:
            return


def _wants_patch(state: _State) -> bool:
    return state.base is not None or any(block.options is not None for block in state.blocks)


def _check_threads(owner: str, model: PreTrainedModel) -> None:
    if any(block.thread != threading.get_ident() for block in _state(model).blocks):
        raise ValueError(
            f"{owner}: the model must not be inside another thread's `with patched(...)`, got a "
            f"{type(model).__name__} that is: wait for that thread, or give each thread its own model"
        )


def release(model: PreTrainedModel) -> int:
    """Free the device memory that earlier calls of a patched model left for later ones: CUDA graphs, key-value caches,
    token buffers, and heads that calls named by `assistant_model`. The next call makes or loads them again.

    `unpatch`, a new `patch` and the end of a `patched` block do so, too. A `SpeculativeGenerate` frees its memory when
    it is deleted.

    Returns:
        The number of bytes that were freed, without heads; 0 if nothing was kept.
    """
    return _free(unwrap(model))


def last_stats(model: PreTrainedModel) -> Stats | None:
    """Statistics of the last speculative call of an unwrapped model, or None."""
    return _stats.get(model)


def stats(model: PreTrainedModel) -> Stats:
    """Statistics of this model's last speculative `generate` call. The model need not be patched any more.

    Raises:
        RuntimeError: there was no such call.
    """
    target = unwrap(model)
    found = last_stats(target)
    if found is None:
        raise RuntimeError(
            f"stats: no speculative generate() has run on this {type(target).__name__}: patch it and ask for "
            "assistance, or pass a drafter"
        )
    return found


class SpeculativeGenerate:
    """Speculative decoding without a patch: `model.generate(..., custom_generate=SpeculativeGenerate(drafter=...))`.

    With `drafter=None` the same engine decodes without speculation. transformers does not pass `streamer`,
    `stop_strings` or `synced_gpus` to a `custom_generate` function; use `patched` if you need them.

    The options are those of `patch`.

    Raises:
        ValueError: an option is not supported.
        TypeError: an option is unknown; the message names the most similar one.
    """

    @with_known_options
    def __init__(
        self,
        *,
        drafter: Drafter | None = None,
        rule: str | None = None,
        tree: Tree = None,
        costs: Costs | None = None,
        seed: Seed = None,
        cuda_graphs: Literal["auto"] | bool = "auto",
        compile: bool = False,
        fuse: Literal["auto"] | bool = "auto",
        impl: Literal["triton", "reference"] | None = None,
    ) -> None:
        self.options = Options(
            drafter, rule, tree, costs, seed, cuda_graphs, compile, fuse, impl, owner="SpeculativeGenerate"
        )
        self._workspaces: WeakKeyDictionary[PreTrainedModel, Workspaces] = WeakKeyDictionary()

    def __getstate__(self) -> dict:
        return {"options": self.options}

    def __setstate__(self, state: dict) -> None:
        self.options, self._workspaces = state["options"], WeakKeyDictionary()

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        asked = asked_assistance(generation_config, model_kwargs)
        if asked:
            raise ValueError(f"SpeculativeGenerate: assistance must be given as its drafter, got {', '.join(asked)}")
        check_call(model, generation_config, {}, self.options)
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"SpeculativeGenerate: decoding must be greedy search or sampling, got {mode.value}")
        warn_if_untested()
        check_supported(model)
        options = self.options if self.options.drafter else replace(self.options, drafter=NoDrafter())
        call = input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        return _speculate(self._workspaces, model, options, *call)


class SpeculativeModel(GenerationMixin):
    """Mixin that precedes a model's own class in the bases of the class of a patched model."""

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        asked, options = asked_assistance(generation_config, generation_mode_kwargs), _current_options(self)
        if options is None or (not asked and options.drafter is None):
            return super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        drafter = options.drafter
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
        check_call(self, generation_config, generation_mode_kwargs, options)

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        assistant_model=None,
        **model_kwargs,
    ):
        call = input_ids, logits_processor, stopping_criteria, generation_config
        options = _current_options(self)
        if options is None:
            plain = super()._assisted_decoding
            _update_class(self)
            return plain(
                *call, synced_gpus=synced_gpus, streamer=streamer, assistant_model=assistant_model, **model_kwargs
            )
        model_kwargs.pop("inputs_tensor", None)
        tokenizers = model_kwargs.get("tokenizer"), model_kwargs.pop("assistant_tokenizer", None)
        if generation_config.use_mtp:
            drafter = _kept(self, None, partial(MTPDrafter.from_target, self))
        elif assistant_model is not None:
            drafter = _drafter_of(self, assistant_model, generation_config.speculation_type, *tokenizers)
        elif generation_config.assistant_early_exit is not None:
            drafter = EarlyExitDrafter(generation_config.assistant_early_exit)
        else:
            ngram = generation_config.max_matching_ngram_size
            drafter = PromptLookupDrafter(
                num_tokens=generation_config.prompt_lookup_num_tokens, **({} if ngram is None else {"max_ngram": ngram})
            )
        return _speculate(_workspaces, self, replace(options, drafter=drafter), *call, model_kwargs, streamer)

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
        call = input_ids, logits_processor, stopping_criteria, generation_config
        options = _current_options(self)
        if options is None or options.drafter is None:
            plain = super()._sample
            _update_class(self)  # an interrupt may have left it half unpatched
            return plain(*call, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        return _speculate(_workspaces, self, options, *call, model_kwargs, streamer)

    @wraps(GenerationMixin.generate_batch)
    def generate_batch(self, inputs, generation_config=None, *args, **kwargs):
        self._check_continuous_batching("generate_batch", generation_config, kwargs)
        return super().generate_batch(inputs, generation_config, *args, **kwargs)

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, generation_config=None, *args, **kwargs):
        self._check_continuous_batching("init_continuous_batching", generation_config, kwargs)
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    @wraps(GenerationMixin.continuous_batching_context_manager)
    def continuous_batching_context_manager(self, generation_config=None, *args, **kwargs):
        self._check_continuous_batching("continuous_batching_context_manager", generation_config, kwargs)
        return super().continuous_batching_context_manager(generation_config, *args, **kwargs)

    def _check_continuous_batching(self, owner, generation_config, kwargs):
        check_continuous_batching(owner, generation_config or self.generation_config, kwargs, _current_options(self))

    def _extract_generation_mode_kwargs(self, custom_generate, *args, **kwargs):
        if custom_generate is not None and not isinstance(custom_generate, SpeculativeGenerate):
            self._warn_of_custom_generate()
        return super()._extract_generation_mode_kwargs(custom_generate, *args, **kwargs)

    def load_custom_generate(self, *args, **kwargs):
        self._warn_of_custom_generate()
        return super().load_custom_generate(*args, **kwargs)

    def _warn_of_custom_generate(self):
        options = _current_options(self)
        if options and options.drafter:
            warnings.warn(
                f"generate: custom_generate decodes by itself, without the {type(options.drafter).__name__} that the "
                "model is patched with",
                stacklevel=4,
            )

    def __reduce_ex__(self, protocol):
        """Pickle and copy the model as an instance of its own class: the loaded or copied model is not patched."""
        _, _, attributes, *rest = super().__reduce_ex__(max(protocol, 2))
        attributes = {name: value for name, value in attributes.items() if name != STATE}
        # with copyreg.__newobj__, pickle would insist on the object's present class
        return copyreg._reconstructor, (type(self).__bases__[1], object, None), attributes, *rest


@cache
def _speculative_class(base: type) -> type:
    # cached: torch.compile would compile again for each new class
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (SpeculativeModel, base), body)


def _is_ours(cls: type) -> bool:
    return cls.__bases__[0] is SpeculativeModel


def _drafter_of(
    model: PreTrainedModel,
    assistant: PreTrainedModel | Drafter | str | os.PathLike,
    kind: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    assistant_tokenizer: PreTrainedTokenizerBase | None,
) -> Drafter:
    """The drafter that `assistant_model` asks for. `kind` is the call's `speculation_type`. A trained head is loaded
    once for each patched model and name."""
    drafter: Drafter
    if assistant_tokenizer is not None and isinstance(assistant, (Drafter, str, os.PathLike)):
        raise ValueError(
            "generate: assistant_tokenizer must be None unless assistant_model is a draft model, got it with "
            f"{type(assistant).__name__}: a ModelDrafter takes both tokenizers itself"
        )
    if isinstance(assistant, Drafter):
        drafter = assistant
    elif isinstance(assistant, (str, os.PathLike)):
        name = os.fspath(assistant)
        drafter = _kept(model, name, partial(load_head, name, model))
    elif assistant_tokenizer is not None:
        drafter = ModelDrafter(assistant, tokenizer=tokenizer, assistant_tokenizer=assistant_tokenizer)
    else:
        drafter = drafter_of_assistant(assistant, _drafters.setdefault(model, _Drafters()).by_model)
    if kind == "dflash" and not isinstance(drafter, DFlashDrafter):
        got = assistant if isinstance(assistant, (str, os.PathLike)) else type(assistant).__name__
        raise ValueError(
            f'generate: assistant_model must be a DFlash model with speculation_type="dflash", got {got}, which '
            f"{type(drafter).__name__} runs"
        )
    return drafter


def _kept(model: PreTrainedModel, name: str | None, load: Callable[[], Drafter]) -> Drafter:
    """The drafter of this name, loaded once for each patched model, and again after a change of its dtype or device.
    `None` names the MTP layers in the model's own checkpoint."""
    kept, form = _drafters.setdefault(model, _Drafters()).by_name, (model.dtype, model.device)
    if name not in kept or kept[name][0] != form:
        kept[name] = form, load()
    return kept[name][1]


def _speculate(
    workspaces,
    model,
    options,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    model_kwargs,
    streamer=None,
):
    call = Call.of(
        model, options, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
    )
    generation = Generation(call, workspaces.setdefault(model, Workspaces()))
    _stats[model] = generation.stats
    return generation.run()
