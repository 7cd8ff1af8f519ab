"""The validated arguments of one `generate` call: those that transformers prepared, and the options of `patch`."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from ..drafters import Drafter
from ..forward.checks import check_attention, check_forward, constant_rope_limit, graph_hazard
from ..forward.versions import CACHE
from ..ops.filters import Filters
from ..options import Options
from ..processors.device import is_vectorised
from ..processors.host import check_stateless, split_processors
from .graph_runner import cannot_capture
from .inputs import callers_cache, check_drafter, check_model_arguments, left_padding, row_seeds_of

ONE_CHOICE_RULES = ("greedy", "coupled")  # rules that look at one node of each depth
LEAST_TEMPERATURE = 1e-20


@dataclass(frozen=True, eq=False)
class Call:
    """The checked arguments of a call. Letters: B sequences, T tokens of the prompt.

    Attributes:
        model: the target.
        options: the options of `patch`, with a drafter.
        input_ids: [B, T] int64, left-padded, on the model's device.
        start: [B] int64. The column of each row's first token.
        model_kwargs: arguments of the model's forward, without those that are None.
        config: the generation config.
        rule: acceptance rule; "greedy" if the call does not sample.
        seeds: [B] int64, or None if the call does not sample.
        filters: temperature, top-k, top-p and min-p, which are applied during acceptance.
        warpers: the logits processors that `filters` replaces.
        processors: all other logits processors.
        over_nodes: True if `processors` are applied on the device to all nodes of a tree at once.
        criteria: stopping criteria except the maximal length and EOS, which are checked on the device.
        streamer: the caller's streamer, or None.
        max_length: largest number of columns of the text.
        eos_ids: [E] int64 on the model's device, or None.
        pad_id: the token that fills finished rows, or None.
        keep: the kinds of scores to return: "scores", "logits", both or none.
    """

    model: PreTrainedModel
    options: Options
    input_ids: torch.Tensor
    start: torch.Tensor
    model_kwargs: dict[str, Any]
    config: GenerationConfig
    rule: str
    seeds: torch.Tensor | None
    filters: Filters
    warpers: LogitsProcessorList
    processors: LogitsProcessorList
    over_nodes: bool
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    max_length: int
    eos_ids: torch.Tensor | None
    pad_id: int | None
    keep: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        options: Options,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict,
    ) -> "Call":
        """Create a call from the arguments that `generate` passes to its decoding method.

        Args:
            model: the target.
            options: the options of `patch`, with a drafter.
            input_ids: [B, T] int64.
            logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: as `generate` prepared them.

        Raises:
            ValueError: the batch is not padded on the left, or an argument is not supported with speculation.
        """
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "tokenizer"}  # only for criteria
        check_model_arguments(input_ids, model_kwargs)
        model_kwargs[CACHE] = callers_cache(model_kwargs.get(CACHE), input_ids)
        rule = (options.rule or "coupled") if generation_config.do_sample else "greedy"
        check_drafter("generate", model, options.drafter, rule, options.tree)
        # the model's forward and attention may have changed since `patch`
        check_forward(model, "the model")
        check_attention(model, "the model")
        if torch.is_autocast_enabled(model.device.type):
            raise ValueError(
                "generate: autocast must be off with speculative decoding, got a torch.autocast context: load the "
                "model in the wanted dtype instead"
            )
        input_ids = input_ids.to(model.device).long()
        batch, prompt_length = input_ids.shape
        seeds, filters, warpers, processors = None, Filters(), LogitsProcessorList(), logits_processor
        if generation_config.do_sample:
            if (generation_config.temperature or 1.0) < LEAST_TEMPERATURE:
                raise ValueError(
                    f"generate: temperature must be at least {LEAST_TEMPERATURE} with speculative decoding, got "
                    f"{generation_config.temperature}: logits divided by it would overflow; use do_sample=False"
                )
            seeds = row_seeds_of(options.seed, batch).to(model.device)
            processors, filters, warpers = split_processors(logits_processor, batch, model.device)
        if rule not in ONE_CHOICE_RULES:
            check_stateless(processors, rule)
        # a MaxLengthCriteria of the caller replaces the one from the generation config
        limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        max_length = max(min(limits, default=generation_config.max_length), prompt_length + 1)
        limit = constant_rope_limit(model, prompt_length)
        if limit is not None and max_length > limit:
            raise ValueError(
                f"generate: the text must be at most {limit} tokens with speculative decoding, got {max_length}: "
                f"beyond that length the rotary embedding of {type(model).__name__} changes, and draft tokens would "
                "change it too early"
            )
        ends = [c.eos_token_id.view(-1) for c in stopping_criteria if type(c) is EosTokenCriteria]
        pad = generation_config._pad_token_tensor
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        keep = ("scores", "logits") if generation_config.return_dict_in_generate else ()
        given = {key: value for key, value in model_kwargs.items() if value is not None}
        return cls(
            model=model,
            options=options,
            input_ids=input_ids,
            start=left_padding(input_ids, given.get("attention_mask")),
            model_kwargs=given,
            config=generation_config,
            rule=rule,
            seeds=seeds,
            filters=filters,
            warpers=warpers,
            processors=processors,
            over_nodes=is_vectorised(processors, model.config.get_text_config().vocab_size),
            criteria=StoppingCriteriaList(
                c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)
            ),
            streamer=streamer,
            max_length=max_length,
            eos_ids=torch.cat(ends).to(model.device).long() if ends else None,
            pad_id=int(pad) if pads and pad is not None else None,
            keep=tuple(name for name in keep if getattr(generation_config, f"output_{name}")),
        )

    @property
    def drafter(self) -> Drafter:
        return self.options.drafter

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def callers_cache(self) -> Any:
        """The cache that the caller gave, or None."""
        return self.model_kwargs.get(CACHE)

    @property
    def on_device(self) -> bool:
        """True if everything between two forwards is computed on the device."""
        return not self.processors or self.over_nodes

    def why_host_processes(self) -> str | None:
        """The reason why the host must process scores in each round, or None."""
        if self.on_device:
            return None
        return f"{', '.join(type(each).__name__ for each in self.processors)} in logits_processor runs on the host"

    def why_eager(self) -> str | None:
        """The reason why rounds cannot be captured as CUDA graphs, or None.

        Raises:
            ValueError: rounds cannot be captured and `cuda_graphs` is True.
        """
        if self.options.cuda_graphs is False:
            return "cuda_graphs=False"
        why = cannot_capture(self.device) or graph_hazard(self.model) or self.drafter.graph_hazard()
        why = why or self.why_host_processes()
        if why and self.options.cuda_graphs is True:
            raise ValueError(f'generate: cuda_graphs must be "auto" or False in such a call, got True: {why}')
        return why
