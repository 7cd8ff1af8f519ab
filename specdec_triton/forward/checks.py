"""Checks a model before it is patched. Unsupported models are refused with an error that names the reason; the model is
not changed."""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial, reduce
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers import GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .preparation import check_preparation

# modules that take positions from the cache; attention._temperature_correction corrects the result
CORRECTED_MODULES = ("Llama4TextAttention",)
DENSE_MASK_MODELS = ("doge", "moshi")  # models whose dense mask contains more than the arguments of attention
RECURRENT_LAYERS = ("linear_attention", "mamba", "recurrent", "conv", "ssm", "hybrid")
# types of layers whose visible keys depend only on positions, and types without attention; all others are refused
KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe", "dummy"}
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # code that contains this name calls the attention function
WINDOW_MASKS = {"create_sliding_window_causal_mask", "sliding_window"}  # names in code that masks keys by a window

HOST_READS = {"bincount", "item", "nonzero", "tolist", "unique"}  # methods that wait for the device
CAPTURING_HOOKS = "transformers.utils.output_capturing"  # the Python module of hooks that capture hidden states
# packages whose functions may replace the forward of a module, and packages whose decorators those functions may have
FUSING_PACKAGES, DECORATING_PACKAGES = {"liger_kernel"}, {"liger_kernel", "torch", "transformers"}


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of the model that processes text, without a vision tower."""
    decoder = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else model
    return decoder if isinstance(decoder, PreTrainedModel) else model  # in some models `decoder` is the language head


def check_supported(model: PreTrainedModel, role: str = "the model") -> None:
    """Refuse a model whose forwards cannot verify a tree.

    Args:
        model: the model.
        role: "the model" or "the draft model", for the error message.

    Raises:
        ValueError: the model is an encoder-decoder, has recurrent state, has layers that choose keys by content, does
            not use transformers' attention interface or uses a custom attention function, does not pass its positions,
            window or softcap to attention, is not on one device, or does not continue a text token by token.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"patch: {role} must be decoder-only, got the encoder-decoder {name}: use transformers' own assisted "
            "decoding"
        )
    layer_types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    recurrent = sorted({kind for kind in layer_types if any(word in kind for word in RECURRENT_LAYERS)})
    if getattr(model, "_is_stateful", False) or recurrent:
        what = f" (layers {', '.join(recurrent)})" if recurrent else ""
        raise ValueError(
            f"patch: {role} must keep all its state in keys and values, got {name} with recurrent state{what}, which "
            "cannot be rolled back: decode it without speculation"
        )
    unknown = sorted(set(layer_types) - KNOWN_LAYERS)
    if unknown:
        raise ValueError(
            f"patch: {role} must attend to keys by their positions, got {name} with layers {', '.join(unknown)}, which "
            "choose keys otherwise: decode it without speculation"
        )
    check_attention(model, role)
    if "position_ids" not in inspect.signature(type(model).forward).parameters or (
        config.model_type in DENSE_MASK_MODELS
    ):
        raise ValueError(
            f"patch: {role} must take position_ids and no more than a mask's visible slots, got {name}, which derives "
            "positions or attention from the cache or a dense mask: decode it without speculation"
        )
    check_forward(model, role)
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        raise ValueError(
            f"patch: {role} must apply its softcap, got {name} under sdpa, which drops it: call "
            "model.set_attn_implementation('eager') first"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"patch: {role} must be on one device, with its weights there, got {name} on {sorted(map(str, devices))}: "
            "load it without offloading"
        )
    check_preparation(model, role)


def check_generate(model: PreTrainedModel) -> None:
    """Refuse a class whose `generate` does not call `GenerationMixin.generate`, because a patch would have no effect.

    Raises:
        ValueError: it does not; the message names the class.
    """
    own = inspect.unwrap(type(model).generate)
    if own is not inspect.unwrap(GenerationMixin.generate) and "super" not in own.__code__.co_names:
        name = type(model).__name__
        raise ValueError(
            f"patch: the model must generate by GenerationMixin.generate, got {name} with a generate() that does not "
            "call it: if it generates with a submodule (such as language_model), patch the submodule"
        )


def check_forward(model: PreTrainedModel, role: str) -> None:
    """Refuse a model whose forward was replaced and no longer takes `position_ids`, runs under autocast, or does not
    keep keys and values.

    Raises:
        ValueError: the message names the reason.
    """
    own = vars(model).get("forward")
    if own is not None:
        parameters = inspect.signature(own).parameters.values()
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        if not takes_any and "position_ids" not in {parameter.name for parameter in parameters}:
            raise ValueError(
                f"patch: {role} must have a forward that takes position_ids, got {type(model).__name__} whose forward "
                "was replaced by one that does not: let the replacement take **kwargs and pass them on"
            )
    if own is not None and _runs_under_autocast(own):
        raise ValueError(
            f"patch: {role} must run in the dtype of its weights, got {type(model).__name__} whose forward runs under "
            "torch.autocast (accelerate's mixed precision): load the model in the wanted dtype instead"
        )
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"patch: {role} must keep keys and values, got {type(model).__name__} in training mode with gradient "
            "checkpointing, which keeps none: call model.eval() first"
        )


def _runs_under_autocast(forward) -> bool:
    """True if `torch.autocast` is among the wrappers of a function."""
    pending, seen = [forward], set()
    while pending:
        each = pending.pop()
        if id(each) in seen or isinstance(each, (nn.Module, type)):
            continue
        seen.add(id(each))
        if isinstance(each, torch.autocast):
            return True
        if isinstance(each, MethodType):
            pending.append(each.__func__)
        elif callable(each):
            inside = [cell.cell_contents for cell in getattr(each, "__closure__", None) or () if cell != CellType()]
            pending += inside + list(getattr(each, "__dict__", {}).values())
    return False


def check_attention(model: PreTrainedModel, role: str) -> None:
    """Refuse a text decoder whose attention is not transformers' own, or that does not pass its window or positions.

    Only modules of the text decoder are checked, not those of a vision tower. The check inspects the modules' bytecode,
    because it must not run the model.

    Raises:
        ValueError: the message names the module or the attention function.
    """
    name, modules = type(model).__name__, list(text_decoder(model).modules())
    words = {kind: _attention_words(kind) for kind in {type(module): None for module in modules}}
    own = next((kind for kind, called in words.items() if not called and _updates_cache(kind)), None)
    if not any(words.values()) or own:
        raise ValueError(
            f"patch: {role} must take its attention from transformers' AttentionInterface, got {name}, whose "
            f"{own.__name__ if own else 'text decoder'} does not: decode it without speculation or port its attention "
            "to the interface"
        )
    masks_windows = any(WINDOW_MASKS & _words_of_forward(type(module)) for module in modules)
    for module in modules:
        called = words[type(module)]
        if not called:
            continue
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            _check_function(config, role, name)
        window = _window(config) if masks_windows else None
        if window and "sliding_window" not in called:
            raise ValueError(
                f"patch: {role} must pass its sliding_window to the attention function, got {name}, whose "
                f"{type(module).__name__} has a window of {window} in its dense mask only: decode it without "
                "speculation, or load it with sliding_window=None if texts stay shorter"
            )
        if "get_seq_length" in called and type(module).__name__ not in CORRECTED_MODULES:
            raise ValueError(
                f"patch: {role} must take its positions from position_ids, got {name}, whose {type(module).__name__} "
                "takes them from the cache: decode it without speculation"
            )


def _window(config: PreTrainedConfig | None) -> int | None:
    """The sliding window of a config's layers; None or 0 if no layer has one."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def _check_function(config: PreTrainedConfig, role: str, name: str) -> None:
    """Refuse an attention function that is not part of transformers, because verification would not run it."""
    setting = config._attn_implementation or "eager"
    function = ALL_ATTENTION_FUNCTIONS.get(setting.removeprefix("paged|"))
    if function is None and setting.removeprefix("paged|") == "eager":
        return
    while isinstance(function, partial):
        function = function.func
    if getattr(function, "__module__", "").split(".")[0] != "transformers":
        got = "which is not registered" if function is None else f"a function of {function.__module__}"
        raise ValueError(
            f"patch: {role} must run an attention function of transformers (eager, sdpa, flash_attention_2, ...), got "
            f"{name} with {setting!r}, {got}: verification would run ops.tree_attention in its place; if you want "
            "that, call model.set_attn_implementation('sdpa') first"
        )


def constant_rope_limit(model: PreTrainedModel, prompt_length: int) -> int | None:
    """The length of text up to which the model's rotary embedding does not change with the length; None if it never
    changes.

    "dynamic" rope changes with every token after a certain length. "longrope" has one set of frequencies up to a
    certain length and another beyond it; a prompt of `prompt_length` tokens may already be beyond it. A draft tree is
    longer than the text, so it could change the embedding too early. The text must therefore not reach that length.
    """
    limits = []
    for module in model.modules():
        kinds = vars(module).get("rope_type")  # `getattr` would take a millisecond for the modules that have none
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "dynamic":
                limits.append(module.original_max_seq_len)
            elif kind == "longrope":
                options = module.config.rope_parameters
                length = (options if layer is None else options[layer])["original_max_position_embeddings"]
                limits += [length] if prompt_length <= length else []
    return min(limits, default=None)


def graph_hazard(model: PreTrainedModel) -> str | None:
    """The reason why the model's forward cannot be captured as a CUDA graph, or None.

    There are three reasons. A rotary embedding that changes with the length compares positions on the host. Experts
    that run one by one list the tokens of each expert on the host; torch's grouped matrix product in fp32 does so, too,
    on devices other than the CPU (torch 2.11). Hooks and replaced forwards are Python code, which a replay does not
    run; the forwards of fused layers (`layer_forward`) only launch kernels.
    """
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "forward hooks of all modules"
    for module in model.modules():
        forward = layer_forward(module)
        if has_hooks(module) or forward is None:
            return f"{type(module).__name__}: has hooks or a replaced forward"
        kinds = getattr(module, "rope_type", None)
        changing = {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds])
        if changing:
            return f"{type(module).__name__}: {changing.pop()} rope compares positions on the host"
        reads = sorted(_host_reads(forward))
        if not reads:
            continue
        experts = module.config._experts_implementation if hasattr(forward, "__wrapped__") else "eager"
        if experts == "eager":
            return f"{type(module).__name__}: its forward reads values on the host ({', '.join(reads)})"
        if experts == "grouped_mm" and model.dtype == torch.float32 and model.device.type != "cpu":
            return (
                f"{type(module).__name__}: grouped_mm in fp32 reads its groups on the host "
                '(model.set_experts_implementation("batched_mm") does not)'
            )
    return None


def has_hooks(module: nn.Module) -> bool:
    """True if a module has forward hooks. Those that transformers leaves on a model after a call with
    `output_hidden_states=True` do not count, because they do nothing in other calls."""
    hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
    return any(getattr(hook, "__module__", None) != CAPTURING_HOOKS for hook in hooks)


def layer_forward(module: nn.Module) -> Callable | None:
    """The function that computes a module: the forward of its class, or that of a fused layer. None if any other
    forward was set on the module.

    Two libraries set the forward of a fused layer as a method of the module. Liger-Kernel does so for a model that
    exists (`apply_liger_kernel_to_llama(model=model)`). The `kernels` package does so for classes with a
    `kernel_layer_name` (`use_kernels=True` in transformers); if it finds no layer, it sets the class's own forward.
    """
    of_class, own = type(module).forward, vars(module).get("forward")
    if own is None:
        return of_class
    if not isinstance(own, MethodType) or own.__self__ is not module:
        return None
    function = own.__func__
    of_a_layer = hasattr(type(module), "kernel_layer_name") and _is_forward_of_a_class(function)
    return function if function is of_class or of_a_layer or _is_of_a_fusing_package(function) else None


def _is_of_a_fusing_package(function: Callable) -> bool:
    """True if a function is from one of `FUSING_PACKAGES`, with decorators of known packages only."""
    packages = []
    while isinstance(function, FunctionType):  # the attribute __module__ may be that of a function it wraps
        packages.append(package_of(function))
        function = getattr(function, "__wrapped__", None)
    return bool(packages) and packages[-1] in FUSING_PACKAGES and DECORATING_PACKAGES.issuperset(packages)


def _is_forward_of_a_class(function: Callable) -> bool:
    """True if a function is the forward of a class of modules that an imported Python module defines."""
    name = getattr(function, "__qualname__", "").removesuffix(".forward")
    place = sys.modules.get(getattr(function, "__module__", None))
    found = reduce(lambda each, part: getattr(each, part, None), name.split("."), place)
    return isinstance(found, type) and issubclass(found, nn.Module) and vars(found).get("forward") is function


@cache
def _host_reads(forward: Callable) -> set[str]:
    """Those of `HOST_READS` that a forward calls, either itself or in autograd functions that it names."""
    forward = inspect.unwrap(forward)
    found, seen, pending = HOST_READS & _words_of(forward), set(), []
    for kind in _named_by(forward):
        if isinstance(kind, type) and issubclass(kind, torch.autograd.Function):
            pending.append(inspect.unwrap(kind.forward))
    while pending:
        function = pending.pop()
        seen.add(function)
        found |= HOST_READS & _words_of(function)
        named = [each for each in _named_by(function) if isinstance(each, FunctionType) and each not in seen]
        pending += [each for each in named if package_of(each) == package_of(function)]
    return found


def _named_by(function: Callable) -> list:
    """The global variables of its Python module that a function names."""
    variables = getattr(function, "__globals__", {})
    return [variables[word] for word in _words_of(function) if word in variables]


def package_of(function: Any) -> str:
    """The package that has the code of a function, whatever name it took from a function it wraps. Empty for other
    objects."""
    return str(getattr(function, "__globals__", {}).get("__name__", "")).split(".")[0]


@cache
def _attention_words(module_class: type[nn.Module]) -> frozenset:
    """The names and constants in the bytecode of the method that calls the attention function, including the keywords
    of its calls. Empty if no method calls it."""
    words = _words_of_forward(module_class)
    if INTERFACE in words:
        return words
    for base in () if issubclass(module_class, PreTrainedModel) else module_class.__mro__:
        for method in () if base.__module__.split(".")[0] == "torch" else vars(base).values():
            if isinstance(method, FunctionType) and INTERFACE in (found := frozenset(_words(method.__code__))):
                return found | words
    return frozenset()


@cache
def _updates_cache(module_class: type[nn.Module]) -> bool:
    """True if the forward of a module writes keys and values to the cache: the module is an attention module."""
    code = getattr(inspect.unwrap(module_class.forward), "__code__", None)
    names = {"cache", "past_key_value", "past_key_values", "layer_past"}
    is_model = issubclass(module_class, PreTrainedModel)
    return code is not None and not is_model and "update" in code.co_names and bool(names & {*code.co_varnames})


def _words_of_forward(module_class: type[nn.Module]) -> frozenset:
    return _words_of(module_class.forward)


@cache
def _words_of(function: Callable) -> frozenset:
    """The names and constants in the bytecode of a function."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset() if code is None else frozenset(_words(code))


def _words(code: CodeType) -> Iterator:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        else:
            yield from constant if isinstance(constant, tuple) else [constant]
