"""Checks the arguments of a `generate` call, and creates tensors from them."""

import warnings
from collections.abc import Sequence

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..drafters import Drafter
from ..forward.preparation import is_neutral
from ..forward.taps import TappedModel
from ..forward.versions import CACHE
from ..ops.noise import row_seeds
from ..options import Options, Tree

ASSISTANCE = ("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens", "use_mtp")
DRAFTERS_OWN = "as in transformers: set it in the generation_config of the model that drafts, or pass a drafter"
# arguments of a call that speculative decoding does not use, and the way to ask for the same
UNUSED = {
    "assistant_confidence_threshold": DRAFTERS_OWN,
    "num_assistant_tokens": DRAFTERS_OWN,
    "num_assistant_tokens_schedule": DRAFTERS_OWN,
    "max_matching_ngram_size": "unless the call asks for prompt lookup: pass PromptLookupDrafter(max_ngram=...)",
    "compile_config": "which compiles in its own way: patch the model with compile=True",
}
MODEL_ARGUMENTS = {"attention_mask", "inputs_embeds", "logits_to_keep", "position_ids", "use_cache", CACHE}


def asked_assistance(generation_config: GenerationConfig, arguments: dict) -> list[str]:
    """Names of the arguments by which a call asks for assistance."""
    asked = [name for name in ("assistant_model", "assistant_tokenizer") if arguments.get(name) is not None]
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_ensemble_weight", "use_mtp"):
        if getattr(generation_config, name, None) not in (None, False):
            asked.append(name)
    if getattr(generation_config, "speculation_type", None) not in (None, "assistant"):
        asked.append("speculation_type")
    return asked


def check_call(model: PreTrainedModel, config: GenerationConfig, arguments: dict, options: Options) -> None:
    """Refuse options of the call that are not supported with speculation.

    `use_cache` and `cache_implementation` are overridden, with a warning, if they come from the model's saved
    generation config. Options of the call that are not used get a warning as well.

    Raises:
        ValueError: an option is not supported; the message names it.
    """
    asked = asked_assistance(config, arguments)
    if "speculation_type" in asked:
        asked.remove("speculation_type")  # a property of the assistant model
        if config.speculation_type != "dflash" or "assistant_model" not in asked:
            raise ValueError(
                'generate: speculation_type must be None, or "dflash" with an assistant_model, on a patched model, got '
                f"{config.speculation_type!r} with {', '.join(asked) or 'no assistance'}"
            )
    if "assistant_tokenizer" in asked:
        asked.remove("assistant_tokenizer")  # of the assistant model
        others = [name for name in ("assistant_model", "tokenizer") if arguments.get(name) is None]
        if others:
            raise ValueError(
                "generate: assistant_tokenizer must come with assistant_model and tokenizer on a patched model, got no "
                f"{' and no '.join(others)}"
            )
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
            f"generate: num_beams must be 1 with speculative decoding, got {config.num_beams}: run beam search without "
            "speculation"
        )
    for name, wanted, accepted in (
        ("use_cache", "True", (True, None)),
        ("cache_implementation", "None or 'dynamic'", (None, "dynamic", "dynamic_full")),
    ):
        value = getattr(config, name)
        if value in accepted:
            continue
        if value != getattr(model.generation_config, name):
            raise ValueError(
                f"generate: {name} must be {wanted} with speculative decoding, got {value!r}: it creates its own cache"
            )
        warnings.warn(
            f"generate: {name}={value!r} of the model's generation config is not used with speculative decoding, which "
            "makes its own cache",
            stacklevel=4,
        )
        setattr(config, name, accepted[0])
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise ValueError(f"generate: {name} must be False with speculative decoding, got True")
    if arguments.get("synced_gpus"):
        raise ValueError("generate: synced_gpus must be False with speculative decoding, got True")
    defaults = config._get_default_generation_params()
    for name, instead in UNUSED.items():
        value = getattr(config, name)
        if name == "max_matching_ngram_size" and "prompt_lookup_num_tokens" in asked:
            continue
        if value not in (None, defaults.get(name), getattr(model.generation_config, name)):
            said = f"generate: {name} of the call is not used with speculative decoding, {instead}"
            warnings.warn(said, stacklevel=4)


def check_continuous_batching(owner: str, config: GenerationConfig, arguments: dict, options: Options | None) -> None:
    """Refuse continuous batching, which decodes without speculation, if a drafter or assistance is asked for.

    Raises:
        ValueError: names `owner` and the drafter.
    """
    asked = asked_assistance(config, arguments) if options else []
    if options and options.drafter:
        asked.append(type(options.drafter).__name__)
    if asked:
        raise ValueError(
            f"{owner}: a model that is patched with a drafter, or assistance in the call, must not be used with "
            f"continuous batching, which decodes without speculation, got {', '.join(asked)}: call generate with a "
            "padded batch, or unpatch the model"
        )


def check_drafter(owner: str, model: PreTrainedModel, drafter: Drafter, rule: str | None, tree: Tree) -> None:
    """Refuse a drafter that cannot draft for this model, rule and tree, or needs hidden states that the model lacks.

    Raises:
        ValueError: the message begins with `owner` or the name of the drafter.
    """
    if tree == "auto" and not drafter.resizable:
        raise ValueError(
            f'{owner}: drafter must be resizable with tree="auto", got {type(drafter).__name__}: give a tree '
            "(resizable are prompt lookup with branches=1, suffix decoding without a fallback, and draft models "
            "without a confidence threshold)"
        )
    drafter.check(model, rule, None if tree == "auto" else tree)
    taps = drafter.taps(model)
    if taps and owner != "generate":  # a call makes its own
        TappedModel(model, taps, type(drafter).__name__)


def check_model_arguments(input_ids: torch.Tensor, model_kwargs: dict) -> None:
    """Refuse arguments of the model's forward that are not supported with speculation.

    Raises:
        ValueError: there is no prompt, an unknown argument would change the result, or `inputs_embeds` does not have
            the length of `input_ids`.
    """
    if not input_ids.shape[1]:
        raise ValueError("generate: input_ids must hold a prompt with speculative decoding, got inputs_embeds alone")
    unknown = sorted(
        name for name, value in model_kwargs.items() if name not in MODEL_ARGUMENTS and not is_neutral(name, value)
    )
    if unknown:
        raise ValueError(
            f"generate: model arguments must be among {', '.join(sorted(MODEL_ARGUMENTS))} with speculative decoding, "
            f"got {', '.join(unknown)}: images and other media are decoded without speculation"
        )
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != input_ids.shape[1]:
        raise ValueError(
            f"generate: inputs_embeds must have the {input_ids.shape[1]} columns of input_ids with speculative "
            f"decoding, got {embeds.shape[1]}"
        )


def callers_cache(cache, input_ids) -> DynamicCache | None:
    """The cache that the caller passed, or None if `generate` created it.

    Raises:
        ValueError: the caller's cache cannot be used.
    """
    if cache is None or not getattr(cache, "_is_user_defined", False):
        return None
    known = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    layers = cache.layers if known else []
    if not known or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ValueError(
            f"generate: {CACHE} must be None or a DynamicCache of keys and values with speculative decoding, got "
            f"{type(cache).__name__}"
        )
    held, columns = cache.get_seq_length(), input_ids.shape[1]
    if held >= columns:
        raise ValueError(
            f"generate: {CACHE} must hold fewer columns than the {columns} of input_ids, the whole conversation, got "
            f"{held}: crop it to what both have in common"
        )
    return cache


def row_seeds_of(seed: int | Sequence[int] | None, batch: int) -> torch.Tensor:
    """The seeds of the rows: [B] int64. A list is used as it is; a number gives each row a seed derived from it.

    Raises:
        ValueError: the length of the list is not the number of rows.
    """
    if isinstance(seed, (list, tuple)):
        if len(seed) != batch:
            raise ValueError(
                f"generate: seed must be a number or a list with one for each of the {batch} rows (each prompt has "
                f"num_return_sequences rows), got {len(seed)}"
            )
        return torch.tensor(seed, dtype=torch.int64)
    return row_seeds(int(torch.randint(2**62, ())) if seed is None else seed, batch)


def left_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The first real column of each sequence, [B] int64, from `attention_mask` [B, T]. It is 0 if there is no mask.

    Raises:
        ValueError: the mask has another shape, has holes or padding on the right, or a row is all padding.
    """
    batch, length = input_ids.shape
    columns = torch.arange(length, device=input_ids.device)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    if real.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must be [{batch}, {length}], one number for each of input_ids, got "
            f"{list(real.shape)}: with a cache of earlier turns, pass the whole conversation as input_ids"
        )
    real = real.bool()
    start = length - real.sum(1)
    if not torch.equal(real, columns >= start[:, None]) or not real[:, -1].all():
        raise ValueError(
            "generate: attention_mask must be zeros, then ones (padding on the left only) when speculation is on, got "
            "holes, padding on the right, or a row without tokens: set tokenizer.padding_side = 'left', or pass "
            "attention_mask if it was inferred from a pad token in mid-prompt"
        )
    return start
