"""One speculative `generate` call, from prompt to output. `Speculation.step` is the whole algorithm.

In a round the drafter proposes a tree of tokens for every sequence; the target model verifies all of them in one
forward; the longest path that the target agrees with is accepted, and the target's own next token follows it. So a
round emits at least one token, and every token is the target's.

Everything a round needs is on the device; the host reads one small tensor a round: what was emitted. On a GPU a round
is a few CUDA graphs, and that look is a round late (`engine`).
"""

from collections import deque
from collections.abc import Hashable
from contextlib import nullcontext

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import ops
from .._stats import Stats, timed
from ..drafters import DraftContext
from ..drafters.base import check_rule
from ..forward.checks import check_attention, check_forward, constant_rope_limit, graph_hazard
from ..forward.runner import TreeRunner
from ..forward.versions import CACHE
from ..ops.filters import Filters, filtered_log_probs
from ..ops.noise import COUPLED, gumbel
from ..ops.reference import Acceptance
from ..ops.rules import LOSSY_RULES
from ..options import Options
from ..processors.device import is_vectorised, process_nodes
from ..processors.host import check_stateless, first_choice, is_stateless, process_each, process_path, split_processors
from ..tree import DraftTree, Topology
from ..tree_choice.controller import AdaptiveTree
from .auto_tree import controller, most_nodes
from .finished_rows import EndedRows
from .inputs import left_padding, row_seeds_of
from .output import Transcript
from .stages import LAG, Reports, Stages, cannot_capture
from .stateful_processors import Lockstep

ONE_CHOICE_RULES = ("greedy", "coupled")  # which look at one node of each depth
LEAST_TEMPERATURE = 1e-20
FIRST_RESERVE = 512  # new tokens that the first cache buffer has room for
NODES_RESERVE = 256  # and draft tokens, where it should not move
WORTH_CAPTURING = 16  # tokens left to emit: fewer are done sooner by rounds that are not captured


class Speculation:
    """One `generate` call.

    Args:
        model: the target.
        options: what the caller of `patch` asked for, with a drafter, and with a rule if the call samples.
        input_ids: [B, T] int64, left-padded.
        logits_processor, stopping_criteria, generation_config, streamer, model_kwargs: as `generate` prepared them.

    Raises:
        ValueError: a batch that is padded elsewhere than on the left, or an argument that speculation cannot honour.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: Options,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict,
    ):
        self.model, self.options, self.drafter, self.impl = model, options, options.drafter, options.impl
        self.input_ids = input_ids.to(model.device).long()
        self.config, self.processors, self.streamer = generation_config, logits_processor, streamer
        self.rule, self.filters, self.warpers = "greedy", Filters(), LogitsProcessorList()
        self.model_kwargs = {key: value for key, value in model_kwargs.items() if value is not None}
        self.callers_cache = self.model_kwargs.get(CACHE)
        # both may have changed since `patch`
        check_forward(model, "the model")
        check_attention(model, "the model")
        if torch.is_autocast_enabled(model.device.type):
            raise ValueError(
                "generate: autocast must be off with speculative decoding, got a torch.autocast context: load the "
                "model in the dtype wanted instead"
            )
        batch, prompt_length = self.input_ids.shape
        self.seeds = None
        if generation_config.do_sample and (generation_config.temperature or 1.0) < LEAST_TEMPERATURE:
            raise ValueError(
                f"generate: temperature must be at least {LEAST_TEMPERATURE} with speculative decoding, got "
                f"{generation_config.temperature}: logits divided by it would overflow; use do_sample=False"
            )
        if generation_config.do_sample:
            self.rule, self.seeds = options.rule, row_seeds_of(options.seed, batch).to(model.device)
            self.processors, self.filters, self.warpers = split_processors(logits_processor, batch, model.device)
        if self.rule not in ONE_CHOICE_RULES:
            check_stateless(self.processors, self.rule)
        self.stats = Stats(rule=self.rule, lossless=self.rule not in LOSSY_RULES)
        # a criterion of the caller's replaces the one that the generation config would have made
        limits = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        self.max_length = max(min(limits, default=generation_config.max_length), prompt_length + 1)
        limit = constant_rope_limit(model, prompt_length)
        if limit is not None and self.max_length > limit:
            raise ValueError(
                f"generate: the text must be at most {limit} tokens with speculative decoding, got {self.max_length}: "
                f"from there on the rope of {type(model).__name__} changes with the length, and draft tokens would "
                "change it too early"
            )
        ends = [c.eos_token_id.view(-1) for c in stopping_criteria if type(c) is EosTokenCriteria]
        self.eos_ids = torch.cat(ends).to(model.device).long() if ends else None
        self.start = left_padding(self.input_ids, self.model_kwargs.get("attention_mask"))

        keep = []
        if generation_config.return_dict_in_generate:
            keep = [name for name in ("scores", "logits") if getattr(generation_config, f"output_{name}")]
        pad = generation_config._pad_token_tensor
        pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.transcript = Transcript(
            self.input_ids,
            self.max_length,
            eos_ids=[] if self.eos_ids is None else self.eos_ids.tolist(),
            pad_id=int(pad) if pads and pad is not None else None,
            # the device itself stops where these two kinds would
            criteria=StoppingCriteriaList(
                c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)
            ),
            streamer=streamer,
            keep=tuple(keep),
        )
        vocab_size = model.config.get_text_config().vocab_size
        self.over_nodes = is_vectorised(self.processors, vocab_size)
        self.stages = Stages(model.device, self.why_eager())
        # what runs on the host at every node cannot run behind
        self.reports = Reports(model.device, LAG.get(model.device.type, 0) if self.on_device else 0)
        fixed = self.stages.why_eager is None or self.reports.lag > 0
        by_default = self.impl is None and ops.implementation("tree_attention", model.device)[0] == "reference"
        self.plain_steps = by_default and not fixed and not options.compile and not self.start.any()
        self.runner = TreeRunner(model, self.start, self.max_length - 1 - self.start, self.impl, fixed, options.compile)
        self.budget = torch.full((batch,), self.max_length - prompt_length, device=model.device)
        self.stopped = np.zeros(batch, dtype=bool)  # by a criterion
        self.slots = 0  # of the cache in the last round
        self.controller: AdaptiveTree | None = None
        self.held: dict[Hashable, DraftTree] = {}
        self.context = DraftContext(
            tokens=torch.nn.functional.pad(self.input_ids, (0, self.max_length + 1 - prompt_length)),
            start=self.start,
            length=torch.full((batch,), prompt_length - 1, device=model.device),
            host_tokens=self.transcript.tokens,
            host_length=np.full(batch, prompt_length - 1),
            host_budget=np.full(batch, self.max_length - prompt_length),
            max_length=self.max_length,
            vocab_size=vocab_size,
            target=self.runner,
            rule=self.rule,
            seeds=self.seeds,
            filters=self.filters,
            eos_ids=self.eos_ids,
            impl=self.impl,
            fixed_shapes=fixed,
            compiled=options.compile,
        )
        self.ended = EndedRows(self.context, self.transcript)
        self.lockstep: Lockstep | None = None
        if not all(map(is_stateless, self.processors)):
            self.lockstep = Lockstep(self.processors, self.context, self.transcript, self.ended)

    @property
    def on_device(self) -> bool:
        """Everything between two forwards is computed on the device."""
        return not self.processors or self.over_nodes

    def why_eager(self) -> str | None:
        """Why rounds cannot be captured, or None.

        Raises:
            ValueError: they cannot, and `cuda_graphs=True`.
        """
        if self.options.cuda_graphs is False:
            return "cuda_graphs=False"
        why = cannot_capture(self.model.device) or graph_hazard(self.model) or self.drafter.graph_hazard()
        if not why and not self.on_device:
            why = f"{', '.join(type(each).__name__ for each in self.processors)} in logits_processor: on the host"
        if why and self.options.cuda_graphs is True:
            raise ValueError(f'generate: cuda_graphs must be "auto" or False in such a call, got True: {why}')
        return why

    def run(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The whole call: what `generate` returns."""
        device = self.model.device
        # Triton and events go by the current device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._run()

    def _run(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        try:
            # the prompt is verified as a tree of one node, its last token, whose logits give the first token
            tree = DraftTree.root_only(self.input_ids[:, -1:])
            accepted, kept = self.accept(tree, self.prefill())
            self.reports.put(self.append(tree, accepted), kept, (0, None, {}))
            self.read()
            if not self.transcript.done:
                self.start_drafter()
                self.start_controller()
            while not self.transcript.done:
                # unless what is on its way is all that may still be emitted
                if self.context.host_budget.max() > len(self.reports) or not self.reports:
                    self.step()
                if len(self.reports) > self.reports.lag or self.context.host_budget.max() <= len(self.reports):
                    self.read()
        except BaseException:
            if self.input_ids.device.type == "cuda":
                torch.cuda.synchronize(self.input_ids.device)  # nothing may be restored under a running kernel
            self.stages.forget()  # whose stages hold this call in a cycle
            raise
        self.stats.why_eager, self.stats.lag = self.stages.why_eager, self.reports.lag
        self.stats.captured, self.stats.replayed = self.stages.captured, self.stages.replayed
        self.stats.auto = self.controller and self.controller.summary
        self.stats.graph_bytes = self.stages.nbytes
        if self.stages.captured:
            self.stats.seconds["capture"] = self.stages.capture_seconds
        if self.stages.replayed:
            self.stats.seconds["replay"] = self.stages.replay_seconds
        self.stages.forget()
        if self.streamer is not None:
            self.streamer.end()
        return self.output()

    @timed("prefill")
    def prefill(self) -> torch.Tensor:
        """transformers' own forward over the prompt: logits [B, 1, V]."""
        room = min(self.max_length, self.input_ids.shape[1] + FIRST_RESERVE)
        if self.context.fixed_shapes:
            room += NODES_RESERVE
        logits = self.runner.prefill(self.input_ids, self.config, self.model_kwargs, room)
        self.plain_steps = self.plain_steps and self.runner.can_decode
        return logits

    @timed("draft")
    def start_drafter(self) -> None:
        adapts = self.options.tree == "auto"
        largest = Topology.chain(most_nodes(self.model.device) - 1) if adapts else None
        self.session = self.drafter.start(self.context, largest or self.options.tree)
        # a tree that must be checked is looked at by the host
        self.drafts_on_device = self.session.on_device and self.session.trusted
        if not self.drafts_on_device:
            self.reports.lag = 0  # it drafts from what the host has read
        self.context.ahead = self.reports.lag * (self.session.max_depth + 1)

    @timed("measure")
    def start_controller(self) -> None:
        if self.options.tree == "auto" and self.session.max_nodes > 1:
            self.controller = controller(self.context, self.session, self.stages, self.options.costs)

    def step(self) -> None:
        """One round, but for the host's look at it."""
        before = dict(self.stats.seconds)
        asked = self.controller.choose() if self.controller else None
        if asked and not self.context.fixed_shapes:
            asked = asked.limited(self.context.useful_depth)
        self.stages.worthwhile = self.context.host_budget.max() >= WORTH_CAPTURING
        self.prepare_ended()  # which moves rows on
        shape = self.prepare(asked)
        if self.drafts_on_device:
            tree = self.stages.run("draft", shape, self.draft)
            report, kept = self.stages.run("verify", shape, lambda: self.settle(tree))
        else:  # its Python comes between, and a replay would not run it
            shape, tree = self.hold(self.draft())
            accepted, kept = self.stages.run("verify", shape, lambda: self.judge(tree))
            self.session.observe(tree, accepted)
            report = self.stages.run("append", shape, lambda: self.append(tree, accepted))
        self.stats.rounds += 1
        seconds = self.stats.seconds
        spent = {name: seconds.get(name, 0.0) - before.get(name, 0.0) for name in ("draft", "verify")}
        verified = asked and asked.limited(tree.max_depth)
        self.reports.put(report, kept, (self.stats.rounds, verified, spent))

    @timed("draft")
    def prepare(self, asked: Topology | None) -> Hashable:
        """The host's part before a round: the shape of the draft, and room for it."""
        cache = self.runner.cache
        cache.reserve(self.context.longest + self.session.max_nodes)
        shape = self.session.prepare(asked), cache.slots
        if self.context.fixed_shapes and cache.slots > self.slots:
            self.stages.forget()  # the buffer was outgrown, now or by rows that ended
        self.slots = cache.slots
        return shape

    @timed("accept")
    def prepare_ended(self) -> None:
        if self.lockstep:
            self.lockstep.prepare(self.session.max_depth)

    @timed("draft")
    def draft(self) -> DraftTree:
        tree = self.session.draft()
        if not self.session.trusted:
            name = type(self.drafter).__name__
            if not isinstance(tree, DraftTree):
                raise ValueError(f"{name}: draft must return a DraftTree, got {type(tree).__name__}")
            tree.check(self.context.root, self.context.vocab_size, name)
            check_rule(self.drafter, self.rule, tree.is_chain, tree.sampling)
            if tree.num_nodes > self.session.max_nodes:
                raise ValueError(
                    f"{name}: draft must return at most its max_nodes, {self.session.max_nodes} nodes, got "
                    f"{tree.num_nodes}"
                )
        return tree

    def hold(self, tree: DraftTree) -> tuple[Hashable, DraftTree]:
        """A tree drafted on the host, in tensors that stay where they are where stages are captured; and its shape."""
        shape = tree.shape, self.runner.cache.slots
        if not self.stages.captures("verify", shape):
            return shape, tree
        if shape in self.held:
            self.held[shape].copy_(tree)
        else:
            self.held[shape] = tree.clone()
        return shape, self.held[shape]

    def settle(self, tree: DraftTree) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """All that follows the draft, on the device: the round's report to the host, and the scores to keep."""
        accepted, kept = self.judge(tree)
        self.session.observe(tree, accepted)
        return self.append(tree, accepted), kept

    def judge(self, tree: DraftTree) -> tuple[Acceptance, dict[str, torch.Tensor]]:
        """The accepted path, its keys and values in place, and the scores to keep."""
        logits = self.verify(tree)
        accepted, kept = self.accept(tree, logits)
        self.compact(tree, accepted)
        return accepted, kept

    @timed("verify")
    def verify(self, tree: DraftTree) -> torch.Tensor:
        """The target's logits [B, N, V] at every node."""
        # the reference pays for a mask that a lone root in unpadded rows of one length does not need
        length = int(self.context.host_length[0])
        if self.plain_steps and tree.num_nodes == 1 and (self.context.host_length == length).all():
            return self.runner.decode(tree.tokens, length)
        return self.runner.forward(tree.tokens, tree.depth, tree.ancestors, self.context.length)

    @timed("accept")
    def accept(self, tree: DraftTree, logits: torch.Tensor) -> tuple[Acceptance, dict[str, torch.Tensor]]:
        """The accepted path, and the scores to keep: [B, D + 1, V] at the root and along the path."""
        if self.lockstep:
            return self.lockstep.accept(tree, logits, self.choose, self.kept_of), {}
        scores, parents = self.process(tree, logits) if self.processors else (logits, tree.parents)
        shape = {"max_depth": tree.max_depth, "budget": self.budget, "eos_ids": self.eos_ids, "impl": self.impl}
        if self.rule == "greedy":
            accepted = ops.accept_greedy(scores, tree.tokens, parents, **shape)
        else:
            accepted = ops.accept_sample(
                scores,
                tree.tokens,
                parents,
                rule=self.rule,
                seeds=self.seeds,
                position=self.context.position,
                filters=self.filters,
                sampling=tree.sampling,
                draft_logits=tree.draft_logits,
                draft_row=tree.draft_row,
                draft_filters=tree.draft_filters or Filters(),
                **shape,
            )
        nodes = torch.nn.functional.pad(accepted.path.clamp(min=0).long(), (1, 0))
        return accepted, self.kept_at(nodes, scores, logits)

    def kept_at(self, nodes: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the scores to keep, those of `nodes` [B, K]: [B, K, V] by name."""
        if not self.transcript.columns_kept:
            return {}
        places = nodes[:, :, None].expand(-1, -1, logits.shape[-1])
        return self.kept_of(scores.gather(1, places), logits.gather(1, places))

    def kept_of(self, scores: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of processed scores and logits [..., V], by name."""
        sources = {"scores": scores, "logits": logits}
        kept = {name: sources[name].float() for name in self.transcript.columns_kept}
        if "scores" in kept and self.warpers:
            kept["scores"] = self.warpers(None, kept["scores"].flatten(0, -2)).view_as(scores)
        return kept

    def after_end(self, rows: list[int], count: int) -> dict[str, torch.Tensor]:
        """The scores to keep [B, n <= count, V] of the next columns of `rows`, which ended."""
        context, parts = self.context, []
        for tree, logits, base, counts in self.ended.run(rows, count):
            scores = logits
            if self.over_nodes:
                scores = process_nodes(self.processors, tree, logits, context.tokens, base)
            elif self.processors:
                scores = logits.to(torch.float32, copy=True)
                host = context.host_tokens, base.cpu().numpy(), counts
                deque(process_path(self.processors, tree, scores, *host, [], choose=self.pads), maxlen=0)
            most = counts.max()
            parts.append(self.kept_of(scores[:, :most], logits[:, :most]))
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def process(self, tree: DraftTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Processed scores [B, N, V], and parents [B, N] for acceptance, where what was not processed is padding.

        The device processes every node, where it can. Else the host asks node by node: along the path that will be
        accepted, for rules that make one choice at a node; for the others, wherever the target may get to.

        Where a processor raises, the tokens chosen before it did are still criteria's and the streamer's: plain
        `generate` had handed them on by then. What a criterion stops among them, no processor would have seen: the
        text is then complete, and the exception does not count.
        """
        context = self.context
        if self.over_nodes:
            return process_nodes(self.processors, tree, logits, context.tokens, context.length), tree.parents
        scores = logits.to(torch.float32, copy=True)
        chosen = [[] for _ in logits]
        host = context.host_tokens, context.host_length, context.host_budget, self.transcript.eos_ids
        if self.rule not in ONE_CHOICE_RULES:
            process_each(self.processors, tree, scores, *host)
            return scores, tree.parents
        try:
            for choices in process_path(self.processors, tree, scores, *host, self.choose):
                for row, choice in choices.items():
                    chosen[row].append(choice)
        except BaseException as error:
            counts = [len(row) for row in chosen]
            if max(counts):
                padded = [row + [(0, 0)] * (max(counts) - len(row)) for row in chosen]
                nodes = torch.tensor([[node for node, _ in row] for row in padded], device=logits.device)
                tokens = [[token for _, token in row] for row in padded]
                kept = self.kept_at(nodes, scores, logits)
                if not tree.is_chain:  # rows that end here may be taken further
                    path = nodes[:, 1:].where(torch.arange(1, max(counts)) < torch.tensor(counts)[:, None], -1)
                    self.runner.cache.compact(context.length, path.int(), self.impl)
                self.transcript.append(tokens, counts, kept, self.after_end)
                chosen = [[] for _ in logits]  # nothing is left to accept
            if not (self.transcript.done and isinstance(error, Exception)):
                raise
        walked = np.zeros(tree.tokens.shape, dtype=bool)
        for row, choices in enumerate(chosen):
            walked[row, [node for node, _ in choices]] = True
        return scores, torch.where(torch.from_numpy(walked).to(logits.device), tree.parents, -1)

    def pads(self, scores: torch.Tensor, rows: list[int], depth: list[int]) -> list[int]:
        """What a row that ended goes on with."""
        return [self.transcript.pad_id] * len(rows)

    def choose(self, scores: torch.Tensor, rows: list[int], depth: list[int]) -> list[int]:
        """What greedy decoding or `rules.coupled` makes of processed scores [R, V] at these depths of these rows."""
        if self.rule == "greedy":
            return first_choice(scores, rows, depth)
        position = self.context.position[rows] + 1 + torch.tensor(depth, device=scores.device)
        noise = gumbel(self.seeds[rows], position, 0, COUPLED, scores.shape[-1])
        return (filtered_log_probs(scores[:, None], self.filters.of_rows(rows)).squeeze(1) + noise).argmax(-1).tolist()

    @timed("compact")
    def compact(self, tree: DraftTree, accepted: Acceptance) -> None:
        """Accepted keys and values move next to the root's, in the target's cache and the drafter's."""
        if not tree.is_chain:
            self.runner.cache.compact(self.context.length, accepted.path, self.impl)

    @timed("emit")
    def append(self, tree: DraftTree, accepted: Acceptance) -> torch.Tensor:
        """Append the accepted tokens and the target's own: the report [B, 2 D + 6], tokens, path and five numbers."""
        context = self.context
        drafts = tree.tokens.gather(1, accepted.path.clamp(min=0).long())
        emitted = torch.cat([drafts, torch.zeros_like(accepted.next_ids)[:, None]], dim=1)
        emitted.scatter_(1, accepted.length[:, None], accepted.next_ids[:, None])
        live = self.budget > 0
        count = torch.where(live, accepted.length + 1, 0)

        place = torch.arange(emitted.shape[1], device=emitted.device)
        # a spare last column takes what is not emitted
        columns = torch.where(place < count[:, None], context.length[:, None] + 1 + place, self.max_length)
        context.tokens.scatter_(1, columns, emitted)
        context.length.add_(count)
        left = self.budget - count
        if self.eos_ids is not None:
            left = torch.where((accepted.next_ids[:, None] == self.eos_ids).any(1), 0, left)
        self.budget.copy_(left)

        drafted = torch.where(live, (tree.parents >= 0).sum(1), 0)
        draft_nan = torch.zeros_like(live) if tree.has_nan is None else live & tree.has_nan
        fields = torch.stack([count, drafted, left, accepted.has_nan, draft_nan], dim=1)
        return torch.cat([emitted, accepted.path, fields], dim=1)

    @timed("emit")
    def read(self) -> None:
        """The host's look at the oldest round it has not seen: the one read of a round."""
        report, kept, (number, verified, spent) = self.reports.take()
        if not self.transcript.done or self.lockstep:  # else it was, while a processor raised
            self.take_in(report, kept, number, verified, spent)
        if self.transcript.done:
            self.complete_cache()

    def take_in(
        self,
        report: list[list[int]],
        kept: dict[str, torch.Tensor],
        number: int,
        verified: Topology | None,
        spent: dict[str, float],
    ) -> None:
        context, batch = self.context, len(report)
        counts, drafted, budget, has_nan, draft_nan = ([row[field] for row in report] for field in range(-5, 0))
        # a row that a criterion stopped may have gone on until the device heard of it
        counts, budget, has_nan, draft_nan = (
            [0 if stopped else number for number, stopped in zip(numbers, self.stopped, strict=True)]
            for numbers in (counts, budget, has_nan, draft_nan)
        )
        op = "accept_greedy" if self.rule == "greedy" else "accept_sample"
        for source, rows in (
            (f"{op}: logits of {type(self.model).__name__}", has_nan),
            (f"{type(self.drafter).__name__}: the draft's logits", draft_nan),
        ):
            if any(rows):
                raise RuntimeError(
                    f"{source} must be finite numbers, got NaN or inf in row {rows.index(True)} of {batch} in round "
                    f"{number}"
                )
        self.stats.emitted += sum(counts)
        if number:
            self.stats.row_rounds += sum(count > 0 for count in counts)
            self.stats.drafted += sum(nodes for nodes, count in zip(drafted, counts, strict=True) if count)
            self.stats.accepted += sum(count - 1 for count in counts if count)
            for position in range(max(counts) - 1):
                if position == len(self.stats.accepted_by_position):
                    self.stats.accepted_by_position.append(0)
                self.stats.accepted_by_position[position] += sum(count - 1 > position for count in counts)
            if verified is not None:
                self.learn(verified, report, counts, drafted, spent)
        context.host_length += counts
        context.host_budget[:] = budget
        if self.lockstep:
            stopped = self.lockstep.stopped
        else:
            stopped = self.transcript.append(report, counts, kept, self.after_end)
        if stopped:
            self.stopped[stopped] = True
            context.host_budget[stopped] = 0
            self.budget[stopped] = 0
        if number:
            self.session.heard(drafted, counts)

    def complete_cache(self) -> None:
        """If the caller gets the cache, rows that ended have the keys and values of the pad tokens after it."""
        lacking = self.transcript.column - 1 - self.ended.reached()
        rows = np.flatnonzero(self.transcript.ended & (lacking > 0)).tolist()
        is_wanted = self.config.return_dict_in_generate or self.callers_cache is not None
        if rows and is_wanted and self.transcript.pad_id is not None:
            deque(self.ended.run(rows, int(lacking[rows].max())), maxlen=0)

    def learn(
        self, verified: Topology, report: list[list[int]], counts: list[int], drafted: list[int], spent: dict
    ) -> None:
        """Tell what chooses the trees what became of one."""
        depth = (len(report[0]) - 6) // 2
        live = [row for row, count in enumerate(counts) if count]
        paths = [report[row][depth + 1 : depth + counts[row]] for row in live]
        self.controller.record(
            verified, paths, [drafted[row] > 0 for row in live], spent, built=self.context.fixed_shapes
        )

    def output(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        sequences = self.transcript.sequences
        as_dict, cache = self.config.return_dict_in_generate, None
        if as_dict or self.callers_cache is not None:
            # plain `generate` does not run the last token either
            cache = self.runner.cache.to_dynamic(sequences.shape[1] - 1, self.callers_cache)
        if not as_dict:
            return sequences
        kept = self.transcript.columns_kept
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=kept.get("scores"), logits=kept.get("logits"), **{CACHE: cache}
        )
