"""Processed scores of a tree's nodes: applies logits processors, and selects the scores that the call returns.

Letters: B sequences, N tree nodes, D edges on the longest path, V vocabulary.
"""

from collections import deque

import numpy as np
import torch

from ..drafters import DraftContext
from ..ops.filters import filtered_log_probs
from ..ops.noise import COUPLED, gumbel
from ..processors.device import process_nodes
from ..processors.host import first_choice, process_each, process_path
from ..tree import DraftTree
from .call import ONE_CHOICE_RULES, Call
from .finished_rows import FinishedRows
from .output import Output


class Scores:
    """The logits processors of one call.

    Args:
        call: the call.
        context: the call's sequences.
        output: knows which scores are kept. It gets the tokens that were chosen before a processor raised an exception.
        finished: computes the logits of finished rows.
    """

    def __init__(self, call: Call, context: DraftContext, output: Output, finished: FinishedRows):
        self._call, self._context, self._output, self._finished = call, context, output, finished

    def process(self, tree: DraftTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the logits processors to a tree.

        All nodes are processed on the device if all processors support it. Otherwise the host calls the processors for
        single nodes. For rules that make one choice at each depth, these are the nodes of the path that will be
        accepted; for other rules, all nodes that the target can reach.

        If a processor raises an exception, criteria and the streamer still get the tokens chosen before, as in plain
        `generate`. If a criterion stops the text at one of these tokens, plain decoding would not have called the
        processor again; the text is then complete and the exception is dropped.

        Returns:
            Processed scores [B, N, V], and parents [B, N] in which nodes that were not processed are padding.
        """
        call, context = self._call, self._context
        if not call.processors:
            return logits, tree.parents
        if call.over_nodes:
            return process_nodes(call.processors, tree, logits, context.tokens, context.length), tree.parents
        scores = logits.to(torch.float32, copy=True)
        chosen = [[] for _ in logits]
        host = context.host_tokens, context.host_length, context.host_budget, self._output.eos_ids
        if call.rule not in ONE_CHOICE_RULES:
            process_each(call.processors, tree, scores, *host)
            return scores, tree.parents
        try:
            for choices in process_path(call.processors, tree, scores, *host, self.choose):
                for row, choice in choices.items():
                    chosen[row].append(choice)
        except BaseException as error:
            self._hand_on(tree, scores, logits, chosen)
            if not (self._output.done and isinstance(error, Exception)):
                raise
            chosen = [[] for _ in logits]  # nothing is left to accept
        walked = np.zeros(tree.tokens.shape, dtype=bool)
        for row, choices in enumerate(chosen):
            walked[row, [node for node, _ in choices]] = True
        return scores, torch.where(torch.from_numpy(walked).to(logits.device), tree.parents, -1)

    def _hand_on(self, tree: DraftTree, scores: torch.Tensor, logits: torch.Tensor, chosen: list[list]) -> None:
        """Append the (node, token) pairs in `chosen` to the output."""
        counts = [len(row) for row in chosen]
        if not max(counts):
            return
        padded = [row + [(0, 0)] * (max(counts) - len(row)) for row in chosen]
        path = torch.tensor([[node for node, _ in row[1:]] for row in padded], dtype=torch.int64, device=logits.device)
        tokens = [[token for _, token in row] for row in padded]
        kept = self.along(path, scores, logits)
        if not tree.is_chain:  # finished rows may be extended later, so their cache must be compact
            path = path.where(torch.arange(1, max(counts)) < torch.tensor(counts)[:, None], -1)
            self._context.target.cache.compact(self._context.length, path.int(), self._call.options.impl)
        self._output.append(tokens, counts, kept, self.after_end)

    def choose(self, scores: torch.Tensor, rows: list[int], depth: list[int]) -> list[int]:
        """The tokens that greedy decoding or `rules.coupled` chooses.

        Args:
            scores: [R, V]. Processed scores.
            rows: R row numbers in the batch.
            depth: R depths in the tree.
        """
        call, context = self._call, self._context
        if call.rule == "greedy":
            return first_choice(scores, rows, depth)
        position = context.position[rows] + 1 + torch.tensor(depth, device=scores.device)
        noise = gumbel(call.seeds[rows], position, 0, COUPLED, scores.shape[-1])
        return (filtered_log_probs(scores[:, None], call.filters.of_rows(rows)).squeeze(1) + noise).argmax(-1).tolist()

    def along(self, path: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scores to keep, [B, K + 1, V] by name, of the root and the nodes `path` [B, K]. Nodes that are -1 have
        undefined scores. Nothing is computed if no scores are kept."""
        if not self._output.columns_kept:
            return {}
        nodes = torch.nn.functional.pad(path.clamp(min=0).long(), (1, 0))
        places = nodes[:, :, None].expand(-1, -1, logits.shape[-1])
        return self._as_returned({name: each.gather(1, places) for name, each in self._wanted(scores, logits).items()})

    def kept(self, scores: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scores to keep, by name, from processed scores and logits [..., V]."""
        return self._as_returned(self._wanted(scores, logits))

    def _wanted(self, scores: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        sources = {"scores": scores, "logits": logits}
        return {name: sources[name] for name in self._output.columns_kept}

    def _as_returned(self, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same scores, in fp32 and with the filters of plain `generate`."""
        kept = {name: each.float() for name, each in wanted.items()}
        if "scores" in kept and self._call.warpers:
            kept["scores"] = self._call.warpers(None, kept["scores"].flatten(0, -2)).view_as(kept["scores"])
        return kept

    def after_end(self, rows: list[int], count: int) -> dict[str, torch.Tensor]:
        """The scores to keep, [B, n, V] by name with n <= count, of the next columns of finished `rows`."""
        call, context, parts = self._call, self._context, []
        for tree, logits, base, counts in self._finished.run(rows, count):
            scores = logits
            if call.over_nodes:
                scores = process_nodes(call.processors, tree, logits, context.tokens, base)
            elif call.processors:
                scores = logits.to(torch.float32, copy=True)
                host = context.host_tokens, base.cpu().numpy(), counts
                deque(process_path(call.processors, tree, scores, *host, [], choose=self._pads), maxlen=0)
            most = counts.max()
            parts.append(self.kept(scores[:, :most], logits[:, :most]))
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def _pads(self, scores: torch.Tensor, rows: list[int], depth: list[int]) -> list[int]:
        """The pad token for each row, as the choice at nodes of finished rows."""
        return [self._output.pad_id] * len(rows)
