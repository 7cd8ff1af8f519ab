"""Helpers of several test modules: drafters, calls of `generate`, comparison of outputs, and the state that a patch may
change."""

from contextlib import ExitStack
from functools import partial, wraps
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import specdec_triton as sdt
from families import EOS, NEVER, PAD, VOCAB, perturbed, prompt
from simulated_graph import SimulatedGraphs
from specdec_triton.drafters import DraftContext, Drafter, DraftSession
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.engine import graph_runner
from specdec_triton.engine.round import RoundSteps
from specdec_triton.forward.runner import TreeRunner
from specdec_triton.ops.filters import Filters
from specdec_triton.tools.profiling import STAGES
from specdec_triton.tree import DraftTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TREES = {
    "chain": sdt.Topology.chain(4),
    "wide": sdt.Topology.from_widths([3, 2, 1]),
    "budget": 12,
    # a topology whose first children are leaves, so that accepted paths skip slots
    "skipping": sdt.Topology((-1, 0, 0, 0, 3, 3, 5), (0, 0, 1, 2, 0, 1, 0)),
}
DRAFTERS = ("none", "model", "tree", "dynamic", "lookup", "oracle", "early")


# --- drafters


def oracle(text, error_rate=0.3, tree=None, room=40, seed=0):
    """An `OracleDrafter` for `text`, which is padded so that it never ends."""
    return sdt.OracleDrafter(torch.nn.functional.pad(text, (0, room)), error_rate, tree=tree, seed=seed)


def drafter_of(name, text):
    """A drafter for `build("llama")`, by its name in `DRAFTERS`. The oracle drafts `text`."""
    return {
        "none": lambda: None,
        "model": lambda: sdt.ModelDrafter(perturbed("llama", 0.1), num_tokens=3),
        "tree": lambda: sdt.ModelDrafter(perturbed("llama", 0.1), tree=TREES["wide"]),
        "dynamic": lambda: sdt.ModelDrafter(perturbed("llama", 0.1), tree=sdt.DynamicTree(9, 3, 3)),
        "lookup": lambda: sdt.PromptLookupDrafter(branches=2),
        "oracle": lambda: oracle(text, tree=TREES["wide"]),
        "early": lambda: sdt.EarlyExitDrafter(1, num_tokens=3),
    }[name]()


class HostDrafter(Drafter):
    """Drafts chains of random lengths on the host. Their tokens are often those of `text`."""

    def __init__(self, text):
        self.text = text

    def start(self, context, tree=None):
        return HostSession(self.text, context)


class HostSession(DraftSession):
    max_nodes, max_depth = 6, 5
    observed = 0

    def __init__(self, text, context):
        self.text, self.context = torch.nn.functional.pad(text, (0, 8)), context
        self.random = torch.Generator().manual_seed(0)

    def observe(self, tree, accepted):
        HostSession.observed += 1

    def draft(self):
        depth = int(torch.randint(1, 6, (), generator=self.random))
        columns = torch.from_numpy(self.context.host_length)[:, None] + 1 + torch.arange(depth)
        drafts = (self.text.gather(1, columns) + (torch.rand(columns.shape, generator=self.random) < 0.2)) % VOCAB
        tokens = torch.cat([self.context.root[:, None], drafts], 1)
        return DraftTree.from_topology(sdt.Topology.chain(depth), tokens)


def context(rows, start=0, budget=20, vocab=100, max_length=64):
    """A `DraftContext` with the texts of one batch, which begin at column `start`."""
    host = np.zeros((len(rows), max_length), dtype=np.int64)
    for row, text in enumerate(rows):
        host[row, start : start + len(text)] = text
    length = np.array([start + len(text) - 1 for text in rows])
    return DraftContext(
        tokens=torch.from_numpy(np.pad(host, ((0, 0), (0, 1)))),
        start=torch.full((len(rows),), start),
        length=torch.from_numpy(length),
        host_tokens=host,
        host_length=length,
        host_budget=np.full(len(rows), budget),
        max_length=max_length,
        vocab_size=vocab,
        target=None,
    )


def record_drafts(monkeypatch):
    """A list to which each later draft of a model appends the tokens, lengths and budgets on the host, and the drafted
    tree."""
    seen, draft = [], LevelSession.draft

    def spy(session):
        proposed = draft(session)
        now = session.context
        seen.append((now.host_tokens.copy(), now.host_length.copy(), now.host_budget.copy(), proposed))
        return proposed

    monkeypatch.setattr(LevelSession, "draft", spy)
    return seen


def accept_more(monkeypatch, share=0.4):
    """For the rest of the test, the target prefers this share of all drafted tokens, chosen at random. Paths of all
    lengths are then accepted."""
    verify, random = RoundSteps.verify, torch.Generator().manual_seed(0)

    def preferring(self, tree):
        logits = verify(self, tree).clone()
        drawn = torch.rand(tree.tokens.shape, generator=random)
        for row, node in (drawn < share).nonzero().tolist():
            if tree.parents[row, node] >= 0:
                logits[row, tree.parents[row, node], tree.tokens[row, node]] += 100
        return logits

    monkeypatch.setattr(RoundSteps, "verify", preferring)


def accepted(drafts):
    """The numbers of drafted tokens that rows accepted in the rounds after which they drafted again."""
    rows = {}
    for drafted in drafts:
        rows.setdefault(drafted.row, []).append(len(drafted.text))
    return [
        after - before - 1 for lengths in rows.values() for before, after in zip(lengths, lengths[1:], strict=False)
    ]


def assert_ranked_by(draft, target, drafter, monkeypatch):
    """Assert that `drafter` ranks tokens as plain forwards of the model `draft` over their paths do. Its cache is then
    correct, whatever was accepted."""
    seen, tree = record_drafts(monkeypatch), drafter.tree
    with sdt.patched(target, drafter=drafter):
        target.generate(**prompt(), do_sample=False, max_new_tokens=16, eos_token_id=NEVER)
    compared = 0
    for tokens, length, budget, proposed in seen[:5]:
        proposed.check(torch.from_numpy(tokens[np.arange(2), length]), 61, "ModelDrafter")
        for row, start in ((0, 3), (1, 0)):
            for node, parent in enumerate(tree.limited(proposed.max_depth).parents):
                if not 0 < tree.depths[node] < budget[row]:
                    continue  # the root, or a node that is too deep to be emitted
                path, at = [], parent
                while at > 0:
                    path.insert(0, int(proposed.tokens[row, at]))
                    at = tree.parents[at]
                text = torch.tensor([[*tokens[row, start : length[row] + 1], *path]])
                logits = draft(text).logits[0, -1].detach()
                gap = logits.sort(descending=True).values[tree.ranks[node]] - logits[proposed.tokens[row, node]]
                assert abs(gap) < 1e-5 * logits.std()  # tokens that nearly tie may be in either order
                compared += 1
    assert compared > 2 * tree.num_nodes


# --- runs of `generate`


def capture_here(monkeypatch, lag, graphs=SimulatedGraphs):
    """For the rest of the test, capture rounds on a CPU, too, and read reports `lag` rounds late."""
    monkeypatch.setitem(graph_runner.CAPTURES, "cpu", graphs)
    monkeypatch.setitem(graph_runner.LAG, "cpu", lag)


def speculative(model, drafter, inputs, **options):
    """The return value of `generate` and its statistics."""
    text = model.generate(**inputs, custom_generate=sdt.SpeculativeGenerate(drafter=drafter, **options))
    return text, sdt.stats(model)


def prefilled(model, inputs, capacity=100, **options):
    """A `TreeRunner` with these options, whose cache holds `inputs`, padded on the left."""
    mask = inputs["attention_mask"]
    arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    runner = TreeRunner(model, mask.shape[1] - mask.sum(1), last_position=255, **options)
    with torch.no_grad():
        runner.prefill(inputs["input_ids"], model.generation_config, arguments, capacity)
    return runner


def eos_in_mid_row(model, inputs, **options):
    """An EOS list that ends the first row in the middle of its text and the others later or never."""
    text = model.generate(**inputs, **{**options, "do_sample": False, "eos_token_id": NEVER})
    text = text[:, inputs["input_ids"].shape[1] :]
    return [int(text[0, text.shape[1] // 2]), EOS]


def prepared_processors(model, inputs, options):
    """The logits processors that `generate` creates from its options."""
    caught = []

    def catch(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        caught.append(logits_processor)
        return input_ids

    model.generate(**inputs, **options, custom_generate=catch)
    return caught[0]


def compiled_graphs(monkeypatch):
    """The body of a fixture: yields a list of the graphs that models are compiled to. They run eagerly."""
    compiled, compile_it = [], torch.compile

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_it(call, backend=backend, **options))
    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


# --- outputs


def last_columns(text):
    """The columns in which rows of a padded text end. There are several if some rows end early."""
    return {int((row != PAD).nonzero().max()) for row in text}


def assert_same_output(model, ours, plain, inputs):
    """Assert that both have the same text, scores, logits and cache, as far as both have them."""
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        if plain.get(name) is not None:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-3, atol=1e-3)
    if plain.get("scores") is not None:
        transitions = (model.compute_transition_scores(each.sequences, each.scores) for each in (ours, plain))
        torch.testing.assert_close(*transitions, rtol=1e-3, atol=1e-3)
    real = inputs["attention_mask"].bool()  # keys and values of padding are undefined
    real = torch.nn.functional.pad(real, (0, plain.sequences.shape[1] - 1 - real.shape[1]), value=True)
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    for mine, theirs in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            got, wanted = (getattr(layer, name).where(real[:, None, :, None], 0) for layer in (mine, theirs))
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


# --- state that a patch may change


def snapshot(model):
    """Class, attention, hooks, attributes and configs of a model. They are equal before and after a patch that was
    undone."""
    modules = dict(model.named_modules())
    configs = [getattr(module, "config", None) for module in modules.values()]
    configs = {id(config): config for config in configs if config is not None}.values()
    return {
        "class": type(model),
        "attention": [config._attn_implementation for config in configs],
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "attributes": {name: sorted(m.__dict__) for name, m in modules.items()},
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "training": model.training,
    }


# --- launches

# operations of PyTorch that launch nothing, besides those that return views
SILENT = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would launch. Each Triton kernel is one launch, and so is each operation of PyTorch
    that does more than allocate or return a view.

    The launchers of registered ops run, but their kernels do not. The ops' references compute the results instead,
    because they are faster than the interpreter.

    Attributes:
        names: the names of the kernels and operations, in order.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def run(self, function):
        """Run a function and count its launches."""
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        def count(kernel, *args, **kwargs):
            self.names.append(kernel.__name__)

        with ExitStack() as patches:
            for kind in (InterpretedFunction, JITFunction):
                patches.enter_context(mock.patch.object(kind, "run", count))
            with self:
                return function()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "specdec_triton":
            with self:
                sdt.ops.registry.launcher(name)(*args)
            if name in ("accept_sample", "draft_topk"):  # the registered ops take filters as lists
                args = [Filters(*each) if isinstance(each, list) else each for each in args]
            return sdt.ops.registry.reference_of(name)(*args)
        with self:  # a composite operation, such as `contiguous`, counts as its parts
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        if not (func.is_view or name in SILENT):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches_by_step(call):
    """The launches of every round that is neither captured nor replayed: a list with {step: names} for each.

    Args:
        call: a function that calls `generate`. Steps are the methods of `RoundSteps` named in `STAGES`.
    """
    rounds = []

    def counted(name, step):
        @wraps(step)
        def run(*args):
            if _get_current_dispatch_mode() is not None:  # a capture
                return step(*args)
            if name == STAGES[0]:
                rounds.append({})
            launches = Launches()
            result = launches.run(partial(step, *args))
            if rounds:  # not the acceptance of the token after the prompt
                rounds[-1][name] = launches.names
            return result

        return run

    with ExitStack() as patches:
        for name in STAGES:
            patches.enter_context(mock.patch.object(RoundSteps, name, counted(name, vars(RoundSteps)[name])))
        call()
    return rounds
