"""Gemma 4 assistants: their drafts, and the text and cost of calls.

A wrong draft never changes the text, and only lowers acceptance. Drafts are therefore compared with a literal statement
and, in lock-step, with transformers' own generator of candidates.
"""

import copy
import gc
import json
import weakref
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers.generation import candidate_generator

import specdec_triton as sdt
from checkpoints import FAVOURED, favouring
from families import NEVER, PAD, build, enlarge_weights, prompt
from helpers import accept_more, accepted, capture_here, compiled_graphs
from specdec_triton.drafters.shared_kv import Gemma4AssistantDrafter
from specdec_triton.forward.versions import CACHE
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.noise import COUPLED, gumbel, row_seeds
from specdec_triton.tools.host_sync import count_forwards, count_host_reads

BUILDS = Version(transformers.__version__).release[:2] != (5, 23)
needs_assistant = pytest.mark.skipif(not BUILDS, reason="transformers 5.23 cannot build Gemma 4 assistants")
VOCAB = 64  # a multiple of the number of centroids
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
}
TARGETS = {
    # as E2B: the last layers read the keys of earlier ones, and layers have inputs of their own
    "e2b": {"layer_types": LAYERS * 4, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 8},
    # as 31B: all layers have keys of their own; values of full layers are their keys
    "31b": {"layer_types": LAYERS * 2, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
}
# the head of the small assistants: tokens are grouped by centroids, and only those of the likeliest ones have logits
ORDERED = {"use_ordered_embeddings": True, "num_centroids": 16, "centroid_intermediate_top_k": 5}
TARGETS["multimodal"] = TARGETS["e2b"]  # the same with a vision tower, here without one
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
        vocab_size_per_layer_input=VOCAB,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    if kind == "multimodal":
        config = transformers.Gemma4Config(text_config=config, tie_word_embeddings=False)
        target = transformers.Gemma4ForConditionalGeneration(config)
    else:
        target = transformers.Gemma4ForCausalLM(config)
    return favouring(with_other_norms(enlarge_weights(target)))


def assistant_of(
    seed=2, window=WINDOW, family="Gemma4", backbone_hidden_size=32, head_dim=8, global_head_dim=12, **options
):
    """An assistant for `target_of`. Its head favours some of the tokens that the target favours."""
    text = getattr(transformers, f"{family}TextConfig")(
        **{**COMMON, "sliding_window": window, "head_dim": head_dim, "global_head_dim": global_head_dim},
        vocab_size_per_layer_input=0,
        hidden_size_per_layer_input=0,
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
    "window of one column more",
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
        config, cache = target.config.get_text_config(), transformers.DynamicCache()
        with torch.no_grad():
            hidden = target.model(torch.tensor([text[:-1]]), use_cache=True, **{CACHE: cache}).last_hidden_state
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
            seen = self.assistant.config.get_text_config().sliding_window - 1  # the root would be the last in it
            first = max(0, layer.keys.shape[2] - seen - (self.mistake == "window of one column more"))
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
        kept = sorted(
            [0] + [1 + at for at in self._best([score for _, score in candidates[1:]], tree.num_nodes - 1)[1]]
        )
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


@pytest.fixture
def compiled(monkeypatch):
    yield from compiled_graphs(monkeypatch)


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
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in ("batch", "chunks") else []) for case in CALLS]
)
def test_other_calls(case):
    target, assistant = target_of(), assistant_of()
    options = {"tree": DYNAMIC, **CALLS[case]}
    drafts, _ = drafts_of(target, assistant, **options)
    found = agreements(drafts, assistant, copy.deepcopy(target), options["tree"], limit=10)
    assert len(found) >= 6 and all(found)


@needs_assistant
def test_coupled_drafts_rank_by_the_targets_noise():
    target, assistant, seeds = target_of(), assistant_of(), row_seeds(5, 2)
    drafts, _ = drafts_of(target, assistant, DYNAMIC, options=SAMPLED, seed=5)
    filters = Filters(torch.tensor([0.8], dtype=torch.float64), torch.tensor([20]))

    def rank(drafted):
        def ranked(log_probs, depth):
            kept = filtered_log_probs(log_probs.float()[None, None], filters)[0, 0]
            noise = gumbel(seeds[drafted.row], torch.tensor(len(drafted.text) - 1 + depth), 0, COUPLED, VOCAB)
            return (kept + noise).log_softmax(-1)

        return ranked

    found = agreements(drafts, assistant, copy.deepcopy(target), DYNAMIC, rank=rank, limit=12)
    assert len(found) >= 8 and all(found)


@needs_assistant
@pytest.mark.parametrize("rule", ["multi_round", "block"])
@pytest.mark.parametrize("centroids", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_drawn_trees_state_the_literal_probabilities(rule, centroids):
    """Tokens outside of the chosen centroids have probability 0. transformers gives them a low logit."""
    shape = FIXED if rule == "multi_round" else CHAIN
    target, assistant = target_of(), assistant_of(**ORDERED if centroids else {})
    drafts, _ = drafts_of(target, assistant, shape, options=SAMPLED, rule=rule)
    judge, compared = copy.deepcopy(target), 0
    for drafted in drafts[:8]:
        if drafted.tree.max_depth < shape.max_depth:
            continue
        row, tree = drafted.row, drafted.tree
        literal, paths = LiteralDraft(assistant, judge, drafted.text), [()]
        for node, parent in enumerate(tree.parents[row].tolist()):
            if node:
                paths.append((*paths[parent], int(tree.tokens[row, node])))
            place = int(tree.draft_row[0 if len(tree.draft_row) == 1 else row, node])
            if place < 0:
                continue
            given, wanted = tree.draft_logits[row, place].double(), literal.node(paths[node])[1]
            if centroids:
                assert (
                    given.isfinite().sum() == ORDERED["centroid_intermediate_top_k"] * VOCAB / ORDERED["num_centroids"]
                )
                wanted = wanted.where(wanted > wanted.min(), -torch.inf)
            torch.testing.assert_close(given.log_softmax(-1), wanted.log_softmax(-1), rtol=0, atol=ERROR)
            compared += 1
    assert compared >= 12


# --- lock-step with transformers


def their_drafts(monkeypatch, target, assistant, inputs, corrected):
    """The drafts of transformers' own assisted generation: for each round, the length of the text, its drafted tokens,
    and the number of tokens that the round before rejected.

    Its generator hands the assistant keys of rejected tokens: one column, and all of them in layers with a window once
    the text is longer. In the first round, transformers 5.17 takes the hidden state of the first token of the prompt
    (huggingface/transformers#48703).

    Args:
        corrected: True to give the generator the keys and the state of verified tokens.
    """
    drafts, generator = [], candidate_generator.SinglePositionMultiTokenCandidateGenerator
    ask = generator.get_candidates

    def asking(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **more):
        rejected = 0
        if model_outputs is not None:
            rows = model_outputs.hidden_states[-1].shape[1]
            if not drafts and corrected:
                n_last_matches = rows - 1
            rejected = rows - 1 - n_last_matches if drafts else 0
            if corrected:
                kept = {
                    kind: tuple(each[:, :, : each.shape[2] - rejected] for each in pair)
                    for kind, pair in model_outputs.shared_kv_states.items()
                }
                model_outputs = SimpleNamespace(hidden_states=model_outputs.hidden_states, shared_kv_states=kept)
        found = ask(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **more)
        tokens = found[0][0, input_ids.shape[1] :].tolist()
        if tokens:
            drafts.append((input_ids.shape[1], tokens, rejected))
        return found

    monkeypatch.setattr(generator, "get_candidates", asking)
    text = target.generate(**inputs, **GREEDY, assistant_model=assistant)
    monkeypatch.undo()
    return drafts, text


@needs_assistant
@pytest.mark.parametrize(
    ("kind", "centroids"),
    [
        pytest.param(kind, centroids, marks=[] if quick else pytest.mark.slow)
        for kind, centroids, quick in (("e2b", True, 1), ("31b", False, 1), ("e2b", False, 0), ("31b", True, 0))
    ],
)
def test_lock_step_with_transformers(kind, centroids, monkeypatch):
    """The texts are shorter than the windows: transformers' assistant sees two more columns than its target would."""
    target, inputs = target_of(kind, window=64), prompt(batch=1)
    assistant = assistant_of(window=64, **ORDERED if centroids else {})
    assistant.generation_config.num_assistant_tokens = 4
    mine, text = drafts_of(target, assistant, None, inputs)
    mine = [(len(drafted.text), drafted.tree.tokens[0, 1:].tolist()) for drafted in mine if drafted.tree.max_depth]
    theirs, their_text = their_drafts(monkeypatch, copy.deepcopy(target), assistant, inputs, corrected=True)
    assert torch.equal(text, their_text)
    assert mine == [(length, tokens) for length, tokens, _ in theirs]
    rejections = [rejected for *_, rejected in theirs[1:]]
    assert len(mine) >= 5 and max(rejections) > 0 and min(rejections) < 4
    # as transformers runs it: the same drafts in rounds after one that rejected nothing
    known = dict(mine)
    theirs, _ = their_drafts(monkeypatch, copy.deepcopy(target), assistant, inputs, corrected=False)
    assert all(tokens == known[length] for length, tokens, rejected in theirs[1:] if not rejected and length in known)


# --- texts

SHAPES = {"default": None, "chain": CHAIN, "widths": FIXED, "dynamic": DYNAMIC, "nodes": 8, "auto": "auto"}


@needs_assistant
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("e2b", ("dynamic",))] + [pytest.param(kind, SHAPES, marks=pytest.mark.slow) for kind in TARGETS],
)
def test_the_text_is_the_targets(kind, shapes):
    """Also a sampled text with a seed: under the rule "coupled" it does not depend on the drafter."""
    target, inputs = target_of(kind), prompt(batch=3)
    drafter = Gemma4AssistantDrafter(assistant_of())
    for options in (GREEDY, SAMPLED):
        text = target.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
        for shape in shapes:
            with sdt.patched(target, drafter=drafter, seed=1, tree=SHAPES[shape]):
                assert torch.equal(target.generate(**inputs, **options), text)
    plain = target.generate(**inputs, **GREEDY)
    assert torch.equal(plain, drafts_of(target, drafter.model, CHAIN, inputs)[1])


@needs_assistant
def test_assistant_model_of_a_call():
    target, assistant = target_of("multimodal"), assistant_of()
    plain = target.generate(**prompt(), **GREEDY)
    with sdt.patched(target):
        assert torch.equal(target.generate(**prompt(), **GREEDY, assistant_model=assistant), plain)
    assert sdt.stats(target).drafted > 20 and sum(sdt.stats(target).accepted_by_position) > 0


@needs_assistant
def test_a_patched_model_does_not_keep_the_assistants_of_calls():
    target, assistant = target_of(), assistant_of()
    with sdt.patched(target):
        target.generate(**prompt(), **GREEDY, assistant_model=assistant)
        alive = weakref.ref(assistant)
        del assistant
        gc.collect()
        assert alive() is None


@needs_assistant
@pytest.mark.parametrize("tree", [sdt.Topology.from_widths([3, 30]), pytest.param(80, marks=pytest.mark.slow)])
def test_trees_of_more_than_64_nodes(tree):
    """Levels of fewer nodes have fewer words of bits."""
    target, drafter = target_of(), Gemma4AssistantDrafter(assistant_of(), tree=tree)
    plain = target.generate(**prompt(), **GREEDY)
    with sdt.patched(target, drafter=drafter):
        assert torch.equal(target.generate(**prompt(), **GREEDY), plain)
    assert sdt.stats(target).accepted


@needs_assistant
def test_a_unified_assistant():
    target = target_of()
    assistant = assistant_of(family="Gemma4Unified")
    drafts, _ = drafts_of(target, assistant, FIXED)
    found = agreements(drafts, assistant, copy.deepcopy(target), FIXED, limit=8)
    assert len(found) >= 6 and all(found)


@needs_assistant
def test_a_cache_of_an_earlier_call():
    target, judge, assistant = target_of("31b"), target_of("31b"), assistant_of()
    first = target.generate(**prompt(batch=1), **{**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True})
    turn = torch.cat([first.sequences, prompt(batch=1, length=5, seed=1)["input_ids"]], 1)
    inputs = {"input_ids": turn, CACHE: first[CACHE]}
    drafts, text = drafts_of(target, assistant, CHAIN, inputs)
    assert torch.equal(text, judge.generate(turn, **GREEDY))
    found = agreements(drafts, assistant, judge, CHAIN)
    assert len(found) >= 6 and all(found)


# --- cost


@needs_assistant
@pytest.mark.parametrize(
    ("tree", "options"),
    [
        pytest.param(DYNAMIC, GREEDY, id="dynamic-greedy"),
        pytest.param(FIXED, GREEDY, id="fixed-greedy", marks=pytest.mark.slow),
        pytest.param(DYNAMIC, SAMPLED, id="dynamic-coupled", marks=pytest.mark.slow),
        pytest.param(FIXED, SAMPLED, id="fixed-coupled", marks=pytest.mark.slow),
    ],
)
def test_captured_rounds_draft_the_same(tree, options, monkeypatch):
    """Random drafts are accepted equally often only if they are equal. Graphs read the tensors of the first call."""
    target, drafter = target_of(), Gemma4AssistantDrafter(assistant_of(**ORDERED), tree=tree)
    with sdt.patched(target, drafter=drafter, seed=1, cuda_graphs=False):
        text = target.generate(**prompt(), **options)
    eager, start, read = sdt.stats(target), Gemma4AssistantDrafter.start, []

    def starting(self, context, *args):
        session = start(self, context, *args)
        read.append([id(each) for each in vars(session._forwards).values() if isinstance(each, torch.Tensor)])
        return session

    monkeypatch.setattr(Gemma4AssistantDrafter, "start", starting)
    with sdt.patched(target, drafter=drafter, seed=1):
        capture_here(monkeypatch, 1)
        for call in range(2):  # a later call replays the graphs of the first
            assert torch.equal(target.generate(**prompt(), **options), text)
            stats = sdt.stats(target)
            assert stats.replayed > 5 and (stats.captured, stats.reused) == ((0, 2) if call else (2, 0))
            # the last drafts differ, because captured rounds also draft tokens that can no longer be emitted
            assert stats.accepted_by_position[:2] == pytest.approx(eager.accepted_by_position[:2], abs=1)
    assert read[0] and read[0] == read[1]


@needs_assistant
@pytest.mark.parametrize(
    "tree", [pytest.param(DYNAMIC, id="dynamic"), pytest.param(FIXED, id="fixed", marks=pytest.mark.slow)]
)
def test_forwards_and_host_reads_of_a_round(tree, monkeypatch):
    """A round takes one forward of the target, at most one of the assistant for each level, and at most one read by the
    host. The prompt takes no forward of the assistant. The assistant is not changed."""
    target, assistant = target_of(), assistant_of(**ORDERED)
    drafter, forwards, reads = Gemma4AssistantDrafter(assistant, tree=tree), [], []
    before = {name: (id(each), sorted(vars(each))) for name, each in assistant.named_modules()}
    forward = type(assistant.model).forward
    monkeypatch.setattr(
        type(assistant.model),
        "forward",
        lambda self, *args, **named: (forwards.append(self is assistant.model), forward(self, *args, **named))[1],
    )
    for length in (8, 22):
        forwards.clear()
        with sdt.patched(target, drafter=drafter), count_host_reads() as counted, count_forwards(target) as verified:
            target.generate(**prompt(), **{**GREEDY, "max_new_tokens": length})
        rounds = sdt.stats(target).rounds
        assert len(verified) == rounds + 1  # and one for the prompt
        assert 0.5 * rounds * tree.max_depth < sum(forwards) <= rounds * tree.max_depth
        reads.append((counted.total, rounds))
    (few_reads, few), (many_reads, many) = reads  # their difference is free of the prompt
    assert many - few > 5 and many_reads - few_reads <= many - few
    assert before == {name: (id(each), sorted(vars(each))) for name, each in assistant.named_modules()}
    assert drafter.graph_hazard() is None


@needs_assistant
def test_nothing_of_a_call_outlives_it(monkeypatch):
    target, drafter, alive = target_of(), Gemma4AssistantDrafter(assistant_of(), tree=FIXED), []
    start = Gemma4AssistantDrafter.start

    def starting(self, context, *args):
        alive.extend(map(weakref.ref, (context, context.target, context.prompt_reader)))
        state = context.prompt_reader.state
        assert state.untyped_storage().nbytes() == state.nbytes  # of a chunk of the prompt, one state is kept
        return start(self, context, *args)

    monkeypatch.setattr(Gemma4AssistantDrafter, "start", starting)
    gc.collect()
    gc.disable()
    try:
        target.generate(**prompt(), **GREEDY, custom_generate=sdt.SpeculativeGenerate(drafter=drafter))
        assert [each() for each in alive] == [None] * 3
    finally:
        gc.enable()


@needs_assistant
@pytest.mark.slow
def test_compiled(compiled):
    tree = DYNAMIC
    target, assistant = target_of(), assistant_of(**ORDERED)
    drafts, _ = drafts_of(target, assistant, tree, compile=True)
    assert compiled
    found = agreements(drafts, assistant, copy.deepcopy(target), tree, limit=8)
    assert len(found) >= 6 and all(found)


@needs_assistant
@pytest.mark.slow  # because kernels run in Triton's interpreter
def test_kernels():
    target, assistant, tree = target_of(), assistant_of(), sdt.DynamicTree(6, width=2, depth=3)
    drafts, _ = drafts_of(target, assistant, tree, options={**GREEDY, "max_new_tokens": 8}, impl="triton")
    found = agreements(drafts, assistant, copy.deepcopy(target), tree)
    assert len(found) >= 2 and all(found)


# --- loading, and refusals


@needs_assistant
@pytest.mark.parametrize("family", ["Gemma4", "Gemma4Unified"])
def test_from_pretrained(family, tmp_path):
    target, assistant = target_of(), assistant_of(family=family, **ORDERED)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.save_pretrained(tmp_path)
    drafter = Gemma4AssistantDrafter.from_pretrained(tmp_path, target)
    loaded, saved = drafter.model.state_dict(), assistant.state_dict()
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=drafter):
        drafts = recording(patches)
        target.generate(**prompt(), **GREEDY)
    assert drafts[0].tree.max_depth == 3


def test_what_this_version_builds(tmp_path):
    """The refusal names the versions that can build an assistant."""
    if BUILDS:
        assistant_of()
        return
    with pytest.raises(ValueError, match="layer types"):
        assistant_of()
    config = {"model_type": "gemma4_assistant", "architectures": ["Gemma4AssistantForCausalLM"]}
    text = {"model_type": "gemma4_text", "num_hidden_layers": 2, "num_kv_shared_layers": 2, "layer_types": LAYERS}
    text |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
    save_file({"pre_projection.weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="5.17 to 5.22 and 5.24, but not 5.23.0.*got .* with transformers 5.23"):
        Gemma4AssistantDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"])
def test_other_drafters_refuse_an_assistant(name):
    """By name; the message names the drafter for it, and the versions of transformers that can build one."""
    kind = getattr(transformers, name)
    assistant = kind.__new__(kind)
    vars(assistant)["config"] = SimpleNamespace(model_type=kind.config_class.model_type)
    with pytest.raises(
        ValueError, match=f"got {name}.*use Gemma4AssistantDrafter .*5.17 to 5.22 and 5.24, but not 5.23"
    ):
        sdt.ModelDrafter(assistant)


@needs_assistant
def test_targets_that_do_not_fit_are_refused():
    target = target_of()
    for other, message in (
        ({"backbone_hidden_size": 48}, "must have hidden size 48, .*got Gemma4ForCausalLM with 32"),
        ({"head_dim": 16}, "head size in sliding_attention layers 16, .*with 8"),
        ({"global_head_dim": 16}, "head size in full_attention layers 16, .*with 12"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            sdt.patched(target, drafter=Gemma4AssistantDrafter(assistant_of(**other))),
        ):
            pass
    drafter = Gemma4AssistantDrafter(assistant_of())
    with pytest.raises(ValueError, match="layers 8, head size in full_attention layers 12, .*with None, None"):
        drafter.check(build("llama"))
    with pytest.raises(ValueError, match="dtype torch.float32, .*with torch.bfloat16"):
        drafter.check(target_of().to(torch.bfloat16))
    with pytest.raises(ValueError, match="at most 20 children, the number of tokens that the assistant can name"):
        Gemma4AssistantDrafter(assistant_of(**ORDERED), tree=sdt.DynamicTree(60, 21, 3)).check(target)
    with pytest.raises(ValueError, match="model must be of type gemma4_assistant or .*got LlamaForCausalLM"):
        Gemma4AssistantDrafter(build("llama"))
    with pytest.raises(ValueError, match="give either num_tokens .* or tree, got both"):
        Gemma4AssistantDrafter(assistant_of(), num_tokens=3, tree=4)
