"""Gemma 4 assistants: their drafts, and the text and cost of calls.

A wrong draft never changes the text, and only lowers acceptance. Drafts are therefore compared with a literal statement
and, in lock-step, with transformers' own generator of candidates.
"""

import copy
import gc
import weakref
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.generation import candidate_generator

import specdec_triton as sdt
from checkpoints import FAVOURED, favouring
from families import NEVER, PAD, VOCAB, add_noise, enlarge_weights, prompt
from helpers import accept_more, accepted, capture_here
from specdec_triton.drafters.shared_kv import Gemma4AssistantDrafter
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.noise import COUPLED, gumbel, row_seeds
from specdec_triton.tools.host_sync import count_forwards, count_host_reads
from specdec_triton.tree import DraftTree

BUILDS = Version(transformers.__version__).release[:2] != (5, 23)
needs_assistant = pytest.mark.skipif(not BUILDS, reason="transformers 5.23 cannot build Gemma 4 assistants")
WINDOW = 6  # most texts are longer
LAYERS = ["sliding_attention", "full_attention"]
COMMON = {
    "vocab_size": VOCAB,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "sliding_window": WINDOW,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": None,
    "vocab_size_per_layer_input": VOCAB,
}
TARGETS = {
    # as E2B: the last layers read the keys of earlier ones, and layers have inputs of their own
    "e2b": {"layer_types": LAYERS * 4, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 8},
    # as 31B: all layers have keys of their own; values of full layers are their keys
    "31b": {"layer_types": LAYERS * 2, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
}
CHAIN, FIXED, DYNAMIC = sdt.Topology.chain(4), sdt.Topology.from_widths([3, 2, 1]), sdt.DynamicTree(16, 4, 4)
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
# Drafts in which two scores differ by less than TOLERANCE are not compared. Log-probabilities may differ by ERROR.
TOLERANCE, ERROR = 1e-3, 1e-3


def target_of(kind="e2b", seed=1, window=WINDOW):
    """A target whose text consists mostly of few tokens, so that random drafts are accepted at times."""
    options = TARGETS[kind]
    config = transformers.Gemma4TextConfig(
        **{**COMMON, **options, "sliding_window": window},
        hidden_size=32,
        num_hidden_layers=len(options["layer_types"]),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return favouring(with_other_norms(enlarge_weights(transformers.Gemma4ForCausalLM(config))))


def assistant_of(seed=2, window=WINDOW, family="Gemma4", backbone_hidden_size=32, **options):
    """An assistant for `target_of`. Its head favours some of the tokens that the target favours."""
    text = getattr(transformers, f"{family}TextConfig")(
        **{**COMMON, "sliding_window": window, "vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0},
        hidden_size=24,
        num_hidden_layers=3,
        num_kv_shared_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    config = getattr(transformers, f"{family}AssistantConfig")(
        text_config=text, backbone_hidden_size=backbone_hidden_size, tie_word_embeddings=False, **options
    )
    torch.manual_seed(seed)
    assistant = getattr(transformers, f"{family}AssistantForCausalLM")(config)
    assistant = with_other_norms(enlarge_weights(assistant))
    with torch.no_grad():
        assistant.lm_head.weight[list(FAVOURED)] *= 2
        if assistant.masked_embedding is not None:
            assistant.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB))
    return assistant


def with_other_norms(model):
    """The model itself, with norm weights unlike one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


# --- a literal statement

MISTAKES = (
    "position of the last column",
    "later positions at deeper levels",
    "one column less",
    "no window",
    "state of the first column",
    "own state before the projection",
    "state before embedding",
    "embedding without its scale",
    "keys of the first layers",
)


class LiteralDraft:
    """The drafts of an assistant after one text t_0, ..., t_n. Every node is computed by itself, with dense keys and
    values of t_0, ..., t_(n-1) that a forward over the whole text computes.

    Args:
        assistant: the assistant. Its layers are transformers' own.
        target: a copy of the target that nothing else uses.
        text: t_0, ..., t_n.
        mistake: one of `MISTAKES`, or "" for none.

    Attributes:
        margin: the smallest difference of two values whose order decided a tree so far.
    """

    def __init__(self, assistant, target, text, mistake=""):
        assert mistake in ("", *MISTAKES), mistake
        self.assistant, self.text, self.mistake, self.margin = assistant, text, mistake, float("inf")
        config, cache = target.config, transformers.DynamicCache()
        with torch.no_grad():
            hidden = target.model(torch.tensor([text[:-1]]), past_key_values=cache, use_cache=True).last_hidden_state
        self.state = hidden[:, :1] if mistake == "state of the first column" else hidden[:, -1:]
        own = config.layer_types[: config.num_hidden_layers - (config.num_kv_shared_layers or 0)]
        last = {kind: layer for layer, kind in enumerate(own)}
        if mistake == "keys of the first layers":
            last = {kind: own.index(kind) for kind in LAYERS}
        self.keys = {kind: self._columns(cache.layers[layer], kind) for kind, layer in last.items()}
        embedding = target.get_input_embeddings()
        self.embed = embedding
        if mistake == "embedding without its scale":
            self.embed = lambda tokens: torch.nn.functional.embedding(tokens, embedding.weight)
        self.found = {}

    def _columns(self, layer, kind):
        first = 0
        if kind == "sliding_attention" and self.mistake != "no window":
            first = max(0, layer.keys.shape[2] - self.assistant.config.get_text_config().sliding_window)
        last = layer.keys.shape[2] - (self.mistake == "one column less")
        return layer.keys[:, :, first:last], layer.values[:, :, first:last]

    def node(self, path):
        """The state that is fed back [1, 1, Ht] and the logits [V] after the drafted tokens `path`."""
        if path not in self.found:
            before = self.state if not path else self.node(path[:-1])[0]
            position = len(self.text) - 1 - (self.mistake == "position of the last column")
            position += len(path) * (self.mistake == "later positions at deeper levels")
            embedded = self.embed(torch.tensor([[[self.text[-1], *path][-1]]]))
            parts = (before, embedded) if self.mistake == "state before embedding" else (embedded, before)
            with torch.no_grad():
                outputs = self.assistant(
                    inputs_embeds=torch.cat(parts, -1),
                    position_ids=torch.tensor([[position]]),
                    shared_kv_states=self.keys,
                    output_hidden_states=self.mistake == "own state before the projection",
                )
            state = outputs.last_hidden_state
            if self.mistake == "own state before the projection":
                state = torch.nn.functional.pad(outputs.hidden_states[-1], (0, 8))
            self.found[path] = state, outputs.logits[0, 0].double()
        return self.found[path]

    def log_probs(self, path):
        return self.node(path)[1].log_softmax(-1)

    def _best(self, values, count):
        best, places = torch.as_tensor(values).topk(min(count + 1, len(values)))
        self.margin = min([self.margin, *(best[:-1] - best[1:])[:count].tolist()])
        return best[:count].tolist(), places[:count].tolist()

    def ranked(self, topology):
        """The tokens of a topology: the best ones at each node, by rank."""
        paths = [()]
        for parent, rank in zip(topology.parents[1:], topology.ranks[1:], strict=True):
            _, tokens = self._best(self.log_probs(paths[parent]), 1 + rank)
            paths.append((*paths[parent], tokens[rank]))
        return [self.text[-1], *(path[-1] for path in paths[1:])]

    def dynamic(self, tree, levels, rank=None):
        """Tokens and parents of a dynamic tree. `rank` turns the log-probabilities at a depth into other values."""
        frontier, candidates = [((), 0.0)], [((), 0.0)]
        for depth in range(1, levels + 1):
            children = []
            for path, score in frontier:
                log_probs = self.log_probs(path)
                values = log_probs if rank is None else rank(log_probs, depth)
                for value, token in zip(*self._best(values, tree.width), strict=True):
                    children.append(((*path, token), score + value))
            candidates += children
            frontier = [children[place] for place in self._best([score for _, score in children], tree.width)[1]]
        kept = sorted([0] + [1 + at for at in self._best([score for _, score in candidates[1:]], tree.num_nodes - 1)[1]])
        paths = [candidates[at][0] for at in kept]
        return [self.text[-1], *(path[-1] for path in paths[1:])], [-1, *(paths.index(path[:-1]) for path in paths[1:])]


# --- drafts


def recording(monkeypatch):
    """A list to which each later draft appends, for each unfinished row, the row, its text without padding, its budget
    and the trees of the round."""
    drafts, start = [], Gemma4AssistantDrafter.start

    def starting(self, context, *args):
        session = start(self, context, *args)
        draft = session.draft

        def drafting():
            tree = draft()
            for row, budget in enumerate(context.host_budget.tolist()):
                text = context.tokens[row, context.start[row] : context.length[row] + 1].tolist()
                if budget:
                    drafts.append(SimpleNamespace(row=row, text=text, budget=budget, tree=tree.clone()))
            return tree

        session.draft = drafting
        return session

    monkeypatch.setattr(Gemma4AssistantDrafter, "start", starting)
    return drafts


def drafts_of(target, assistant, tree, inputs=None, options=GREEDY, more=False, **settings):
    """The recorded drafts of one call, and its text. `more` accepts more drafts, see `accept_more`."""
    drafter = Gemma4AssistantDrafter(assistant, tree=tree)
    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=drafter, **settings):
        drafts = recording(patches)
        if more:
            accept_more(patches)
        return drafts, target.generate(**(inputs or prompt()), **options)


def agreements(drafts, assistant, target, tree, mistake="", rank=None, limit=16):
    """For each draft, whether it is the one of the literal statement. Left out are drafts that are deeper than the rest
    of the text, and those that a rounding error could have changed."""
    found, close = [], 0
    for drafted in drafts:
        levels = drafted.tree.max_depth
        if levels < tree.max_depth or drafted.budget <= levels or len(found) == limit:
            continue
        literal = LiteralDraft(assistant, target, drafted.text, mistake)
        if isinstance(tree, sdt.DynamicTree):
            tokens, parents = literal.dynamic(tree, levels, None if rank is None else rank(drafted))
        else:
            tokens, parents = literal.ranked(tree), list(tree.parents)
        if literal.margin < TOLERANCE:
            close += 1
            continue
        mine = drafted.tree.tokens[drafted.row].tolist(), drafted.tree.parents[drafted.row].tolist()
        found.append(mine == (tokens, parents))
    assert close <= 2 * len(found), f"{close} of {close + len(found)} drafts had nodes of equal scores"
    return found


@pytest.fixture(scope="module")
def recorded():
    """A function of a kind of target: an assistant, its drafts of one call, and a copy of the target."""

    @cache
    def run(kind):
        target, assistant = target_of(kind), assistant_of()
        drafts, _ = drafts_of(target, assistant, DYNAMIC, options={**GREEDY, "max_new_tokens": 36}, more=True)
        return assistant, drafts, copy.deepcopy(target)

    return run


@needs_assistant
@pytest.mark.parametrize("kind", TARGETS)
def test_drafts_equal_the_literal_statement(kind, recorded):
    """A row is padded on the left. Drafts are accepted in part, so the target's cache holds keys of rejected tokens."""
    assistant, drafts, judge = recorded(kind)
    found = agreements(drafts, assistant, judge, DYNAMIC)
    assert len(found) >= 12 and all(found)
    counts = accepted(drafts[:16])
    assert sum(0 < count < DYNAMIC.depth for count in counts) >= 5 and max(counts) > 1


@needs_assistant
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_noticed(mistake, recorded):
    assistant, drafts, judge = recorded("e2b")
    assert not all(agreements(drafts, assistant, judge, DYNAMIC, mistake, limit=8))


CALLS = {
    "chain": {"tree": CHAIN},
    "fixed": {"tree": FIXED},
    "one row": {"inputs": prompt(batch=1, length=12)},
    "batch": {"inputs": prompt(batch=4, length=14, padding=6)},
    "prompt of one token": {"inputs": prompt(batch=1, length=1)},
    "chunks": {"options": {**GREEDY, "prefill_chunk_size": 4}},
}


@needs_assistant
@pytest.mark.parametrize("case", CALLS)
def test_other_calls(case):
    target, assistant = target_of(), assistant_of()
    options = {"tree": DYNAMIC, **CALLS[case]}
    drafts, _ = drafts_of(target, assistant, **options)
    found = agreements(drafts, assistant, copy.deepcopy(target), options["tree"], limit=10)
    assert len(found) >= 6 and all(found)
