"""One speculative `generate` call, from prompt to output: the loop over the rounds and the host's part of each round.

All inputs of a round are on the device. The host reads one small tensor per round, its report. On a GPU, a round
consists of two CUDA graphs: "draft", and "verify" with all steps after the draft. The host reads the report while the
next round runs.
"""

from collections import deque
from collections.abc import Hashable
from contextlib import nullcontext
from contextvars import ContextVar

import numpy as np
import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .. import ops
from .._stats import Stats, records_time
from ..drafters import DraftContext, DraftSession
from ..forward.runner import TreeRunner
from ..forward.versions import CACHE
from ..ops.filters import Filters
from ..ops.rules import LOSSY_RULES
from ..processors.host import is_stateless
from ..tree import DraftTree, Topology
from ..tree_choice.controller import AdaptiveTree
from .auto_tree import controller, largest_tree
from .call import Call
from .finished_rows import FinishedRows
from .graph_runner import LAG, Reports
from .output import Output
from .round import RoundSteps
from .scores import Scores
from .stateful_processors import Lockstep
from .workspace import Workspaces, top_k_bucket

FIRST_RESERVE = 512  # number of new tokens that the first cache buffer has room for
NODES_RESERVE = 256  # additional room for draft tokens if captured rounds need a buffer that is not reallocated
# True while `warmup` runs: the end-of-sequence token does not end a row
endless: ContextVar[bool] = ContextVar("specdec_triton_endless", default=False)
WORTH_CAPTURING = 16  # with fewer tokens left to emit, capturing a graph takes longer than it saves


class Generation:
    """Runs a call.

    Args:
        call: the call.
        workspaces: keeps graphs and buffers for later calls; None keeps nothing.
    """

    def __init__(self, call: Call, workspaces: Workspaces | None = None):
        self.call, self.workspaces = call, workspaces or Workspaces()
        batch, prompt_length = call.input_ids.shape
        eos_ids = call.eos_ids
        if eos_ids is not None and endless.get():
            eos_ids = torch.full_like(eos_ids, -1)  # no token has this id
        self.stats = Stats(rule=call.rule, lossless=call.rule not in LOSSY_RULES)
        self.output = Output(
            call.input_ids,
            call.max_length,
            eos_ids=[] if eos_ids is None else eos_ids.tolist(),
            pad_id=call.pad_id,
            criteria=call.criteria,
            streamer=call.streamer,
            keep=call.keep,
        )
        # processors that run on the host need each report before the next round
        lag = LAG.get(call.device.type, 0)
        self.stats.why_no_lag = call.why_host_processes() or (None if lag else f"tensors on {call.device.type}")
        self.reports = Reports(call.device, lag if call.on_device else 0)
        room = min(call.max_length, prompt_length + FIRST_RESERVE)
        self.workspace = self.workspaces.take(call, room, NODES_RESERVE, self.reports.lag)
        self.graph_runner, self.buffers = self.workspace.graph_runner, self.workspace.buffers
        self.reusable, fixed = True, self.workspace.fixed
        impl, compiled, fused = call.options.impl, call.options.compile, call.options.fuses(call.device)
        put = self.buffers.put
        start, last = put("start", call.start), call.max_length - 1 - call.start
        taps = call.drafter.taps(call.model)
        self.runner = TreeRunner(call.model, start, last, impl, fixed, compiled, fused, self.buffers, taps=taps)
        self.stopped: set[int] = set()  # rows that a criterion has stopped
        self.controller: AdaptiveTree | None = None
        filters = [
            each if each is None else put(f"filter {name}", each) for name, each in enumerate(call.filters.tensors)
        ]
        self.context = DraftContext(
            tokens=put("tokens", torch.nn.functional.pad(call.input_ids, (0, self.workspace.width - prompt_length))),
            start=start,
            length=put("length", torch.full((batch,), prompt_length - 1, device=call.device)),
            host_tokens=self.output.tokens,
            host_length=np.full(batch, prompt_length - 1),
            host_budget=np.full(batch, call.max_length - prompt_length),
            max_length=call.max_length,
            vocab_size=call.vocab_size,
            target=self.runner,
            rule=call.rule,
            seeds=None if call.seeds is None else put("seeds", call.seeds),
            filters=Filters(*filters, max_top_k=top_k_bucket(call.filters.max_top_k)),
            eos_ids=None if eos_ids is None else put("eos", eos_ids),
            impl=impl,
            fixed_shapes=fixed,
            compiled=compiled,
            fused=fused,
            buffers=self.buffers,
        )
        self.finished = FinishedRows(self.context, self.output)
        self.scores = Scores(call, self.context, self.output, self.finished)
        self.lockstep: Lockstep | None = None
        if not all(map(is_stateless, call.processors)):
            self.lockstep = Lockstep(call.processors, self.context, self.output, self.finished)
        budget = put("budget", torch.full((batch,), call.max_length - prompt_length, device=call.device))
        by_default = impl is None and ops.implementation("tree_attention", call.device)[0] == "reference"
        plain_steps = by_default and not fixed and not compiled and not call.start.any()
        self.round = RoundSteps(call, self.context, budget, self.scores, self.lockstep, bool(plain_steps), self.stats)

    def run(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Run the call. Returns the return value of `generate`."""
        device = self.call.device
        # Triton launches and CUDA events use the current device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._run()

    def _run(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        try:
            # the prompt is treated as a verified tree of one node, its last token; its logits give the first new token
            tree = DraftTree.root_only(self.call.input_ids[:, -1:])
            accepted, kept = self.round.accept(tree, self.prefill())
            self.reports.put(self.round.emit(tree, accepted), kept, (0, None, {}))
            self.read()
            if not self.output.done:
                self.start_drafter()
                self.start_controller()
            while not self.output.done:
                # no new round if the rounds in flight emit all remaining tokens in any case
                if not self.reports or self.context.host_budget.max() > len(self.reports):
                    self.step()
                if len(self.reports) > self.reports.lag or self.context.host_budget.max() <= len(self.reports):
                    self.read()
            self.finish_stats()
            if self.call.streamer is not None:
                self.call.streamer.end()
            self.finish_session()
            result = self.result()
        except BaseException:
            if self.call.device.type == "cuda":
                torch.cuda.synchronize(self.call.device)  # kernels must end before the model is restored
            self.graph_runner.forget()  # its functions refer to this call, a reference cycle
            raise
        # only now: another call may take the workspace, and write to its cache, at once
        if self.reusable:
            self.workspace.capacity = max(self.workspace.capacity, self.runner.cache.capacity)
            self.workspaces.put_back(self.workspace)
        else:
            self.workspace.forget()
        return result

    @property
    def session(self) -> DraftSession:
        return self.round.session

    @records_time("prefill")
    def prefill(self) -> torch.Tensor:
        """Run transformers' own forward over the prompt. Returns the logits [B, 1, V] after its last token."""
        call = self.call
        prompt = call.input_ids, call.config, call.model_kwargs, self.workspace.capacity
        try:
            logits = self._prefill(*prompt)
        except torch.OutOfMemoryError:
            # a cache of the caller has a part of the prompt by now
            if call.callers_cache is not None or not self.workspaces.release():
                raise
            logits = None  # tried again below, because the exception keeps the tensors of the failed forward
        if logits is None:
            logits = self._prefill(*prompt)
        self.round.plain_steps = self.round.plain_steps and self.runner.can_decode
        return logits

    def _prefill(self, *prompt) -> torch.Tensor:
        self.context.prompt_reader = self.call.drafter.prompt_reader(self.context)
        return self.runner.prefill(*prompt, read=self.context.prompt_reader)

    @records_time("draft")
    def start_drafter(self) -> None:
        adapts = self.call.options.tree == "auto"
        largest = largest_tree(self.call.device, self.call.rule) if adapts else None
        self.round.session = self.call.drafter.start(self.context, largest or self.call.options.tree)
        # trees of sessions that are not trusted are checked on the host
        self.drafts_on_device = self.session.on_device and self.session.trusted
        if not self.drafts_on_device:
            self.reports.lag = 0  # the draft may depend on the last report
            name = type(self.call.drafter).__name__
            on_device = self.session.on_device
            self.stats.why_no_lag = (
                f"trees of {name} are checked on the host" if on_device else f"{name} drafts on the host"
            )
        # a draft of the host is not part of a graph
        self.reusable = self.reusable and (self.session.reusable or not self.drafts_on_device)
        self.context.unread_tokens = self.reports.lag * (self.session.max_depth + 1)

    @records_time("measure")
    def start_controller(self) -> None:
        if self.call.options.tree == "auto" and self.session.max_nodes > 1:
            self.controller = controller(self.context, self.session, self.graph_runner, self.call.options.costs)

    def step(self) -> None:
        """Prepare and run a round, as CUDA graphs if possible. Its report is read later."""
        before = dict(self.stats.seconds) if self.controller else {}
        asked = self.controller.choose() if self.controller else None
        if asked and not self.context.fixed_shapes:
            asked = asked.limited(self.context.useful_depth)
        if self.graph_runner.why_eager is None:
            self.graph_runner.worthwhile = self.context.host_budget.max() >= WORTH_CAPTURING
        if self.lockstep:
            self.prepare_finished_rows()  # may advance finished rows
        shape, run = self.prepare(asked), self.graph_runner.run
        if self.drafts_on_device:
            tree = run("draft", shape, self.round.draft)
            report, kept = run("verify", shape, lambda: self.round.after_draft(tree))
        else:  # the session's Python code must run in every round, so it is not part of a graph
            shape, tree = self.at_fixed_addresses(self.round.draft())
            accepted, kept, states = run("verify", shape, lambda: self.round.verify_accept_compact(tree))
            self.context.states = states
            self.session.observe(tree, accepted)
            report = run("emit", shape, lambda: self.round.emit(tree, accepted))
        self.stats.rounds += 1
        verified, spent = None, {}
        if asked:
            seconds = self.stats.seconds
            spent = {name: seconds.get(name, 0.0) - before.get(name, 0.0) for name in ("draft", "verify")}
            verified = asked.limited(tree.max_depth)
        self.reports.put(report, kept, (self.stats.rounds, verified, spent))

    @records_time("draft")
    def prepare(self, asked: Topology | None) -> Hashable:
        """Prepare the draft on the host and reserve cache slots. Returns a key; equal keys mean equal shapes."""
        cache = self.runner.cache
        cache.reserve(self.context.longest + self.session.max_nodes)
        shape = self.session.prepare(asked), cache.slots
        if self.buffers.version != self.workspace.version:
            self.workspace.forget()  # tensors have moved, for example because the cache has grown
            self.workspace.version = self.buffers.version
        return shape

    @records_time("accept")
    def prepare_finished_rows(self) -> None:
        self.lockstep.prepare(self.session.max_depth)

    def at_fixed_addresses(self, tree: DraftTree) -> tuple[Hashable, DraftTree]:
        """The shape key of a tree that was drafted on the host, and the tree, copied to the tensors that captured
        graphs read."""
        if self.graph_runner.why_eager is not None:
            return None, tree
        shape = tree.shape, self.runner.cache.slots
        if not self.graph_runner.captures("verify", shape):
            return shape, tree
        copies = self.workspace.copies
        if shape in copies:
            copies[shape].copy_(tree)
        else:
            copies[shape] = tree.clone()
        return shape, copies[shape]

    @records_time("emit")
    def read(self) -> None:
        """Read the oldest unread report. It is the only read from the device in a round."""
        report, kept, (number, verified, spent) = self.reports.take()
        if not self.output.done or self.lockstep:  # it may be done already if a processor raised after the last token
            self.process_report(report, kept, number, verified, spent)
        if self.output.done:
            self.complete_cache()

    def process_report(
        self,
        report: list[list[int]],
        kept: dict[str, torch.Tensor],
        number: int,
        verified: Topology | None,
        spent: dict[str, float],
    ) -> None:
        context, batch = self.context, len(report)
        counts, drafted, budget, has_nan, draft_nan = map(list, zip(*(row[-5:] for row in report), strict=True))
        if self.stopped:
            # a row that a criterion stopped may have emitted tokens before the device had its new budget
            counts, budget, has_nan, draft_nan = (
                [0 if row in self.stopped else number for row, number in enumerate(numbers)]
                for numbers in (counts, budget, has_nan, draft_nan)
            )
        if any(has_nan) or any(draft_nan):
            op = "accept_greedy" if self.call.rule == "greedy" else "accept_sample"
            source, rows = f"{op}: logits of {type(self.call.model).__name__}", has_nan
            if not any(has_nan):
                source, rows = f"{type(self.call.drafter).__name__}: the draft's logits", draft_nan
            raise RuntimeError(
                f"{source} must be finite numbers, got NaN or inf in row {rows.index(True)} of {batch} in round "
                f"{number}"
            )
        self.stats.emitted += sum(counts)
        if number:
            self.stats.add_round(counts, drafted)
            if verified is not None:
                self.update_controller(verified, report, counts, drafted, spent)
        context.host_length += counts
        context.host_budget[:] = budget
        if self.lockstep:
            stopped = self.lockstep.stopped
        else:
            stopped = self.output.append(report, counts, kept, self.scores.after_end)
        if stopped:
            self.stopped.update(stopped)
            context.host_budget[stopped] = 0
            self.round.budget[stopped] = 0
        if number:
            self.session.observe_on_host(drafted, counts)

    def complete_cache(self) -> None:
        """If the caller gets the cache, feed the pad tokens of finished rows, so that the cache holds their keys and
        values as after plain `generate`."""
        lacking = self.output.column - 1 - self.finished.reached()
        rows = np.flatnonzero(self.output.ended & (lacking > 0)).tolist()
        is_wanted = self.call.config.return_dict_in_generate or self.call.callers_cache is not None
        if rows and is_wanted and self.output.pad_id is not None:
            deque(self.finished.run(rows, int(lacking[rows].max())), maxlen=0)

    def update_controller(
        self, verified: Topology, report: list[list[int]], counts: list[int], drafted: list[int], spent: dict
    ) -> None:
        """Report a verified tree and its accepted paths to the controller."""
        depth = (len(report[0]) - 6) // 2
        live = [row for row, count in enumerate(counts) if count]
        paths = [report[row][depth + 1 : depth + counts[row]] for row in live]
        self.controller.record(
            verified, paths, [drafted[row] > 0 for row in live], spent, built=self.context.fixed_shapes
        )

    @records_time("draft")
    def finish_session(self) -> None:
        if self.session is not None and not endless.get():
            # a criterion may have ended a row, or the call, before the last tokens of a round
            self.context.host_length[:] = np.minimum(self.output.length, self.output.column - 1)
            self.session.finish()

    def finish_stats(self) -> None:
        stats, runner = self.stats, self.graph_runner
        stats.why_eager, stats.lag = runner.why_eager, self.reports.lag
        stats.captured, stats.reused, stats.replayed = runner.captured, runner.reused, runner.replayed
        stats.graph_bytes = runner.nbytes
        if self.runner.fused is not None:  # it is None if all forwards were replayed
            self.workspace.fused = self.runner.fused.replaced, self.runner.fused.left
        stats.fused, stats.not_fused = self.workspace.fused
        stats.auto = self.controller and self.controller.summary
        if runner.captured:
            stats.seconds["capture"] = runner.capture_seconds
        if runner.replayed:
            stats.seconds["replay"] = runner.replay_seconds

    def result(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        sequences = self.output.sequences
        as_dict, cache = self.call.config.return_dict_in_generate, None
        if as_dict or self.call.callers_cache is not None:
            # the last token is not in the cache, as after plain `generate`
            cache = self.runner.cache.to_dynamic(sequences.shape[1] - 1, self.call.callers_cache)
        if not as_dict:
            return sequences
        kept = self.output.columns_kept
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=kept.get("scores"), logits=kept.get("logits"), **{CACHE: cache}
        )
