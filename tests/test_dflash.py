"""DFlash: its drafts for random checkpoints in every published layout, and the text and cost of calls.

A wrong draft never changes the text, and only lowers acceptance. Probabilities, tokens and parents of drafts are
therefore compared with a literal statement, `literal_dflash`, and with transformers' own generator for Muse Glimmer.
"""

import copy
import gc
import weakref
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
import transformers
from transformers import DynamicCache

import specdec_triton as sdt
from checkpoints import target_of
from dflash_checkpoints import DFLASH_LAYOUTS, write_dflash
from families import NEVER, VOCAB, build, enlarge_weights, prompt
from helpers import accept_more, accepted, capture_here
from literal_dflash import MISTAKES, LiteralBlock
from recorded_drafts import watch
from specdec_triton import _patch
from specdec_triton.drafters.dflash import DFlashMarginals
from specdec_triton.drafters.marginals import NODES, WIDTH
from specdec_triton.forward import runner
from specdec_triton.forward.versions import CACHE
from specdec_triton.heads.checkpoint import read_checkpoint
from specdec_triton.heads.dflash import DFlashModel
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.noise import COUPLED, gumbel, row_seeds
from specdec_triton.ops.rules import LOSSY_RULES, RULES
from specdec_triton.tools.check_distribution import prove
from specdec_triton.tools.host_sync import count_forwards, count_host_reads
from specdec_triton.tree import DraftTree

FIXED = sdt.Topology.from_widths([3, 2, 1, 1])
DYNAMIC = sdt.DynamicTree(16, width=4, depth=4)
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
# The drafter computes in fp32, the literal statement in fp64. Log-probabilities may differ by ERROR. Trees in which two
# of them differ by less than TOLERANCE are not compared.
TOLERANCE, ERROR = 5e-4, 2e-3


class Drafted(NamedTuple):
    """The draft for one row in one round.

    Attributes:
        row: the row.
        text: its tokens without padding, the root included.
        budget: the number of tokens that it may still emit.
        tree: the trees of the round.
        log_probs: [D, V] fp64. Those of the tokens at each depth; None if the round drafted nothing.
    """

    row: int
    text: list[int]
    budget: int
    tree: DraftTree
    log_probs: torch.Tensor | None


def record(monkeypatch, drafter):
    """A list to which each later draft of the drafter appends a `Drafted` for each unfinished row."""
    drafts, blocks, logits = [], [], DFlashMarginals.logits

    def predicting(self, depth):
        blocks.append(logits(self, depth).clone())
        return blocks[-1]

    def after(row, *drafted):
        drafts.append(Drafted(row, *drafted, blocks[0][row].double().log_softmax(-1) if blocks else None))

    monkeypatch.setattr(DFlashMarginals, "logits", predicting)
    watch(monkeypatch, drafter, blocks.clear, after)
    return drafts


def paths_of(drafted):
    """The drafted tokens from the root to each node."""
    paths = [()]
    tokens, parents = (each[drafted.row].tolist() for each in (drafted.tree.tokens, drafted.tree.parents))
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def is_likeliest(literal, drafted, log_probs=None):
    """Whether the drafted tree consists of the most likely paths."""
    wanted = literal.likeliest(drafted.tree.num_nodes, drafted.tree.max_depth, WIDTH, log_probs)
    paths = paths_of(drafted)
    return set(paths) == set(wanted) and len(paths) == len(wanted)


def agreements(drafts, head, target, mistake="", first=0, limit=24, is_right=is_likeliest):
    """For each draft, whether it is the one of the literal statement. Left out are drafts deeper than the rest of the
    text, and trees that a rounding error could have changed.

    Args:
        drafts: see `record`.
        head, target, mistake, first: see `LiteralBlock`.
        limit: at most so many drafts are compared.
        is_right: tells from a `LiteralBlock` and a draft whether the tree is right.
    """
    found, close = [], 0
    for drafted in drafts:
        if drafted.log_probs is None or drafted.budget <= len(drafted.log_probs) or len(found) == limit:
            continue
        literal = LiteralBlock(head, target, drafted.text, mistake, first)
        wanted = literal.marginals.log_softmax(-1)[: len(drafted.log_probs)]
        if wanted.shape != drafted.log_probs.shape:
            found.append(False)
            continue
        near = torch.allclose(drafted.log_probs, wanted, rtol=0, atol=ERROR)
        right = is_right(literal, drafted)
        if literal.margin < TOLERANCE:
            close, right = close + 1, True
        found.append(near and right)
    assert mistake or 3 * close <= 2 * len(found), f"{close} of {len(found)} drafts had paths of equal probabilities"
    return found


def drafts_of(
    folder, target, layout, head_seed=0, inputs=None, tree=None, num_tokens=None, options=GREEDY, more=False, **settings
):
    """A head, its recorded drafts in one call, and the text of the call. `more` accepts more drafts, see
    `accept_more`."""
    head = write_dflash(folder, target, layout, head_seed)
    drafter = sdt.DFlashDrafter.from_pretrained(folder, target, tree=tree, num_tokens=num_tokens)
    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=drafter, **settings):
        drafts = record(patches, drafter)
        if more:
            accept_more(patches)
        text = target.generate(**(inputs or prompt()), **options)
    return head, drafts, text


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A function of a layout: a head, its drafts of one call, and a copy of the target. Each layout runs once."""

    @cache
    def run(layout):
        target, options = target_of(), {**GREEDY, "max_new_tokens": 30}
        head, drafts, _ = drafts_of(
            tmp_path_factory.mktemp("head"), target, layout, tree=12, options=options, more=True
        )
        return head, drafts, copy.deepcopy(target)

    return run


# --- the literal statement


@pytest.mark.parametrize("length", [3, 20])
def test_the_literal_statement_is_transformers_assistant(length, tmp_path):
    """Muse Glimmer's assistant reads the checkpoint, and gives the same logits of a block."""
    target = target_of()
    head = write_dflash(tmp_path, target, "muse")
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assistant = transformers.MuseGlimmerAssistantModel.from_pretrained(tmp_path, **ends).eval()
    text, block = prompt(1, length)["input_ids"], [head.layout.mask] * head.layout.block_size
    with torch.no_grad():
        states = target(text[:, :-1], output_hidden_states=True).hidden_states
        block[0] = int(text[0, -1])
        cached = transformers.cache_utils.DFlashCache(config=assistant.config)
        cached.activate_past_recording()
        cached.set_previous_accepted_tokens(length - 1)
        outputs = assistant(
            noise_embeds=target.get_input_embeddings()(torch.tensor([block])),
            context_hidden_states=torch.cat([states[layer + 1] for layer in head.layout.ids], -1),
            **{CACHE: cached},
        )
        logits = target.get_output_embeddings()(outputs.last_hidden_state[0, 1:])
    literal = LiteralBlock(head, target, text[0].tolist())
    torch.testing.assert_close(logits.double(), literal.marginals, rtol=0, atol=ERROR)


# --- drafts


@pytest.mark.parametrize("layout", DFLASH_LAYOUTS)
def test_drafts_equal_the_literal_statement(layout, recorded):
    """A row is padded on the left. Drafts are accepted in part, so the cache holds rows of blocks that were replaced by
    rows of verified tokens."""
    head, drafts, judge = recorded(layout)
    found = agreements(drafts, head, judge, limit=10)
    assert len(found) == 10 and all(found)
    depth, counts = drafts[0].tree.max_depth, accepted(drafts)
    assert depth == min(head.layout.block_size - (not head.layout.from_anchor), 11)
    assert sum(0 < count < depth for count in counts) >= 3 and max(counts) > 1 and 0 in counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 4))
@pytest.mark.parametrize("layout", DFLASH_LAYOUTS)
def test_more_seeds_and_the_default_tree(layout, seed, tmp_path):
    target = target_of(seed=seed)
    options = {**GREEDY, "max_new_tokens": 60}
    head, drafts, _ = drafts_of(tmp_path, target, layout, seed, options=options, more=True)
    assert drafts[0].tree.num_nodes == NODES
    found = agreements(drafts, head, copy.deepcopy(target), limit=100)
    assert len(found) >= 12 and all(found)
    assert len(set(accepted(drafts))) > 1


@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("gemma3", "z-lab", {"final_logit_softcapping": 10.0}),
        ("qwen3", "z-lab, sliding", {}),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (("gemma3", "speculators", {}), ("qwen3", "muse", {}))
        ),
    ],
)
def test_targets_of_other_families(family, layout, options, tmp_path):
    """Gemma 3 scales its embeddings, which a head without its own shares. A softcap holds for drafts, too."""
    target = target_of(family, **options)
    head, drafts, _ = drafts_of(tmp_path, target, layout, tree=12)
    judge = copy.deepcopy(target)
    assert len(found := agreements(drafts, head, judge, limit=8)) == 8 and all(found)
    if layout == "z-lab" and family == "gemma3":
        for mistake in ("other scale of embeddings", "no softcap of logits"):
            assert not any(agreements(drafts, head, judge, mistake, limit=4))


OTHER_CALLS = {
    "batch": {"inputs": prompt(batch=4, length=14, padding=6)},
    "one row": {"inputs": prompt(batch=1, length=12)},
    "two tokens": {"inputs": prompt(batch=2, length=2, padding=1)},
    "chunks": {"options": {**GREEDY, "prefill_chunk_size": 4}},
    "fused": {"fuse": True},
    "compiled": {"compile": True},
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=[] if quick and case != "compiled" else pytest.mark.slow)
        for case in OTHER_CALLS
        for layout, quick in (("z-lab, sliding", True), ("speculators, sliding and not causal", False), ("muse", False))
    ],
)
def test_other_calls(case, layout, tmp_path):
    target = target_of()
    head, drafts, _ = drafts_of(tmp_path, target, layout, tree=12, more=True, **OTHER_CALLS[case])
    found = agreements(drafts, head, copy.deepcopy(target), limit=8)
    assert len(found) >= 6 and all(found)


def test_long_prompts_run_in_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 4)
    target = target_of()
    inputs = prompt(length=15, padding=5)
    head, drafts, _ = drafts_of(tmp_path, target, "z-lab, sliding", inputs=inputs, tree=12, more=True)
    found = agreements(drafts, head, copy.deepcopy(target), limit=8)
    assert len(found) == 8 and all(found)


@pytest.mark.parametrize("layout", ["z-lab", pytest.param("z-lab, sliding", marks=pytest.mark.slow)])
def test_a_cache_of_an_earlier_call(layout, tmp_path):
    """The head knows the columns that this call runs, and no earlier ones."""
    target, judge = target_of(), target_of()
    options = {**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True}
    first = target.generate(**prompt(padding=0), **options)
    turn = torch.cat([first.sequences, prompt(length=5, padding=0, seed=1)["input_ids"]], 1)
    known = first.past_key_values.get_seq_length()
    inputs = {"input_ids": turn, "past_key_values": first.past_key_values}
    head, drafts, text = drafts_of(tmp_path, target, layout, inputs=inputs, tree=12)
    assert torch.equal(text, judge.generate(turn, **GREEDY))
    found = agreements(drafts, head, judge, first=known, limit=8)
    assert len(found) == 8 and all(found)
    assert not any(agreements(drafts, head, judge, limit=4))


@pytest.mark.slow  # because kernels run in Triton's interpreter
@pytest.mark.parametrize("layout", ["z-lab, sliding", "speculators, sliding and not causal", "muse"])
def test_kernels(layout, tmp_path):
    target, options = target_of(), {**GREEDY, "max_new_tokens": 9}
    head, drafts, _ = drafts_of(tmp_path, target, layout, tree=6, options=options, more=True, impl="triton")
    found = agreements(drafts, head, copy.deepcopy(target))
    assert len(found) >= 2 and all(found)


@pytest.mark.parametrize("layout", ["z-lab", pytest.param("speculators", marks=pytest.mark.slow)])
def test_coupled_drafts_rank_by_the_targets_noise(layout, tmp_path):
    target, seeds = target_of(), row_seeds(5, 2)
    head, drafts, _ = drafts_of(tmp_path, target, layout, tree=12, options=SAMPLED, seed=5)
    filters = Filters(torch.tensor([0.8], dtype=torch.float64), torch.tensor([20]))

    def is_right(literal, drafted):
        log_probs = filtered_log_probs(literal.marginals[None], filters)[0]
        depths = torch.arange(1, len(log_probs) + 1)
        noise = gumbel(seeds[drafted.row], len(drafted.text) - 1 + depths, 0, COUPLED, VOCAB)
        return is_likeliest(literal, drafted, (log_probs + noise).log_softmax(-1))

    found = agreements(drafts, head, copy.deepcopy(target), limit=8, is_right=is_right)
    assert len(found) == 8 and all(found)


def has_ranks(literal, drafted):
    topology = FIXED if drafted.tree.num_nodes == FIXED.num_nodes else sdt.Topology.chain(drafted.tree.max_depth)
    is_shaped = drafted.tree.parents[drafted.row].tolist() == list(topology.parents)
    return is_shaped and drafted.tree.tokens[drafted.row].tolist() == literal.ranked(topology)


def is_dynamic(literal, drafted):
    tokens, parents, _ = literal.dynamic(drafted.tree.num_nodes, DYNAMIC.width, drafted.tree.max_depth)
    return [each[drafted.row].tolist() for each in (drafted.tree.tokens, drafted.tree.parents)] == [tokens, parents]


@pytest.mark.parametrize("layout", ["z-lab", pytest.param("speculators, from the anchor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "is_right"),
    [
        pytest.param({"tree": FIXED}, has_ranks, id="topology"),
        pytest.param({"num_tokens": 4}, has_ranks, id="chain"),
        pytest.param({"tree": DYNAMIC}, is_dynamic, id="dynamic"),
    ],
)
def test_other_shapes_equal_the_literal_statement(shape, is_right, layout, tmp_path):
    target = target_of()
    head, drafts, _ = drafts_of(tmp_path, target, layout, more=True, **shape)
    found = agreements(drafts, head, copy.deepcopy(target), limit=8, is_right=is_right)
    assert len(found) == 8 and all(found)


@pytest.mark.parametrize("layout", ["speculators", pytest.param("z-lab", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", ["multi_round", pytest.param("block", marks=pytest.mark.slow)])
def test_drawn_trees_state_the_literal_probabilities(rule, layout, tmp_path):
    """Rules that weigh tokens need the probabilities from which they were drawn, zero outside a reduced vocabulary."""
    target = target_of()
    shape = {"tree": FIXED} if rule == "multi_round" else {"num_tokens": 4}
    head, drafts, _ = drafts_of(tmp_path, target, layout, options=SAMPLED, rule=rule, **shape)
    judge, compared = copy.deepcopy(target), 0
    for drafted in drafts[:8]:
        tree, row = drafted.tree, drafted.row
        if drafted.budget <= tree.max_depth:
            continue
        literal = LiteralBlock(head, judge, drafted.text).marginals.log_softmax(-1)
        for node, path in enumerate(paths_of(drafted)):
            place = int(tree.draft_row[0 if len(tree.draft_row) == 1 else row, node])
            if place >= 0:
                given = tree.draft_logits[row, place].double().log_softmax(-1)
                torch.testing.assert_close(given, literal[len(path)], rtol=0, atol=ERROR)
                compared += 1
    assert compared >= 20


# mistake -> a layout that it concerns
CONCERNED = {
    "other row": "z-lab",
    "causal block": "z-lab",
    "block that is not causal": "z-lab, sliding",
    "mask token in place of the root": "z-lab",
    "embedding of the target": "speculators",
    "other scale of embeddings": "z-lab",
    "context through the input norm": "z-lab",
    "no norm of the context": "z-lab",
    "no context of the last token": "z-lab, sliding",
    "context of the block before": "z-lab",
    "block one position early": "z-lab",
    "no window": "z-lab, use_swa",
    "window without its last key": "muse",
    "states in reverse order": "z-lab",
    "neighbouring states": "speculators",
    "offsets as ids": "speculators",
    "rope base of the target": "muse",
    "no rope scaling": "z-lab, biases",
    "no biases of attention": "z-lab, biases",
    "no norms of queries and keys": "z-lab",
    "no norm before the head": "z-lab",
    "one layer": "z-lab",
    "own score": "z-lab",
}


def test_every_mistake_has_a_layout():
    assert set(CONCERNED) == set(MISTAKES) - {"no softcap of logits"}  # which concerns targets with a softcap


@pytest.mark.parametrize("mistake", CONCERNED)
def test_a_mistake_would_be_noticed(mistake, recorded):
    head, drafts, judge = recorded(CONCERNED[mistake])
    assert not all(agreements(drafts, head, judge, mistake, limit=3))


# --- texts


SHAPES = {
    "default": None,
    "nodes": 6,
    "widths": FIXED,
    "chain": sdt.Topology.chain(3),
    "dynamic": DYNAMIC,
    "root only": sdt.DynamicTree(1, 2, 2),
    "auto": "auto",
}


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        pytest.param(layout, shape, marks=[] if quick and shape == "default" else pytest.mark.slow)
        for layout, quick in (("z-lab", True), ("speculators, wider target", False), ("muse", False))
        for shape in SHAPES
    ],
)
def test_the_text_is_the_targets(layout, shape, tmp_path):
    """Greedy text is that of transformers. Sampled text is that of a call without a draft."""
    target = target_of()
    write_dflash(tmp_path, target, layout)
    drafter = sdt.DFlashDrafter.from_pretrained(tmp_path, target)
    for inputs in (prompt(batch=1), prompt(batch=3)):
        plain = target.generate(**inputs, **GREEDY)
        sampled = target.generate(**inputs, **SAMPLED, custom_generate=sdt.SpeculativeGenerate(seed=1))
        with sdt.patched(target, drafter=drafter, seed=1, tree=SHAPES[shape]):
            assert torch.equal(target.generate(**inputs, **GREEDY), plain)
            assert sdt.stats(target).accepted or shape in ("root only", "auto")
            assert torch.equal(target.generate(**inputs, **SAMPLED), sampled)


def test_a_row_that_ends_early(tmp_path):
    target, inputs = target_of(), prompt(batch=4)
    plain = target.generate(**inputs, **GREEDY)
    options = {**GREEDY, "eos_token_id": [int(plain[1, 14])]}
    ended = target.generate(**inputs, **options)
    _, _, text = drafts_of(tmp_path, target, "z-lab", inputs=inputs, options=options)
    assert torch.equal(text, ended) and not torch.equal(text, plain[:, : text.shape[1]])


def test_a_text_longer_than_the_heads_positions(tmp_path):
    """Its config states 16 positions; the texts have 9 + 60 tokens."""
    target = target_of()
    options = {**GREEDY, "max_new_tokens": 60}
    head, drafts, text = drafts_of(tmp_path, target, "z-lab, biases", options=options, tree=12)
    assert torch.equal(text, target.generate(**prompt(), **options))
    late = [drafted for drafted in drafts if len(drafted.text) > 40]
    found = agreements(late, head, copy.deepcopy(target), limit=4)
    assert len(found) == 4 and all(found)


# --- transformers' own generator


@pytest.fixture(scope="module")
def muse():
    """A tiny Muse Glimmer and its assistant."""
    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {
        **common,
        **ends,
        "vocab_size": VOCAB,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
    }
    config = transformers.MuseGlimmerConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=0,
        video_token_id=0,
        out_hidden_size=16,
        projector_hidden_size=16,
    )
    target = enlarge_weights(transformers.MuseGlimmerForConditionalGeneration(config))
    target.generation_config.pad_token_id = 0
    config = transformers.MuseGlimmerAssistantConfig(
        **common,
        **ends,
        intermediate_size=40,
        num_hidden_layers=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        block_size=5,
        mask_token_id=60,
        target_layer_ids=[0, 2, 4],
    )
    assistant = enlarge_weights(transformers.MuseGlimmerAssistantModel(config))
    with torch.no_grad():
        for model in (target, assistant):
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight += 0.3 * torch.randn_like(weight)
        target.get_output_embeddings().weight[[5, 17, 29, 41]] *= 3  # drafts are then accepted at times
    return target, assistant


def test_drafts_equal_those_of_transformers(muse, monkeypatch):
    target, assistant = muse
    options, inputs = {**GREEDY, "max_new_tokens": 40}, prompt(batch=1)
    generator = transformers.generation.candidate_generator.DFlashTokenCandidateGenerator
    propose, theirs = generator.get_candidates, {}

    def proposing(self, input_ids, *args, **named):
        candidates, logits = propose(self, input_ids, *args, **named)
        if logits is not None:
            theirs[tuple(input_ids[0].tolist())] = candidates[0, input_ids.shape[1] :].tolist(), logits[0].clone()
        return candidates, logits

    monkeypatch.setattr(generator, "get_candidates", proposing)
    text = target.generate(**inputs, **options, assistant_model=assistant, speculation_type="dflash")
    assert torch.equal(text, target.generate(**inputs, **options))
    drafter = sdt.DFlashDrafter(DFlashModel.from_assistant(assistant), num_tokens=4)
    with sdt.patched(target, drafter=drafter):
        drafts = record(monkeypatch, drafter)
        assert torch.equal(target.generate(**inputs, **options), text)
    compared, config = 0, target.config.text_config
    for drafted in drafts:
        depth = drafted.tree.max_depth
        if tuple(drafted.text) in theirs and depth:
            tokens, logits = theirs[tuple(drafted.text)]
            assert drafted.tree.tokens[0, 1:].tolist() == tokens[:depth]
            scaled = logits[:depth].double() * config.output_multiplier / config.final_logit_softcapping
            wanted = (scaled.tanh() * config.final_logit_softcapping).log_softmax(-1)
            torch.testing.assert_close(drafted.log_probs, wanted, rtol=0, atol=ERROR)
            compared += 1
    assert compared > 10 and max(accepted(drafts)) > 0


def test_transformers_own_arguments(muse):
    """The assistant's weights are shared. A call of a batch, which transformers refuses, gets a tree."""
    target, assistant = muse
    model = DFlashModel.from_assistant(assistant)
    theirs = {each.data_ptr() for each in assistant.parameters()}
    assert {each.data_ptr() for each in model.parameters()} == theirs
    for inputs in (prompt(batch=1), prompt(batch=3)):
        text = target.generate(**inputs, **GREEDY)
        with sdt.patched(target):
            ours = target.generate(**inputs, **GREEDY, assistant_model=assistant, speculation_type="dflash")
            assert torch.equal(ours, text)
            assert sdt.stats(target).accepted


# --- cost


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [GREEDY, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "coupled"])
@pytest.mark.parametrize(
    ("layout", "tree"),
    [
        ("z-lab, sliding", 8),
        *(pytest.param("speculators", tree, marks=pytest.mark.slow) for tree in (FIXED, sdt.DynamicTree(8, 3, 3))),
    ],
)
def test_captured_rounds_draft_the_same(layout, tree, options, lag, monkeypatch, tmp_path):
    """Random drafts are accepted equally often only if they are equal."""
    target = target_of()
    write_dflash(tmp_path, target, layout)
    drafter = sdt.DFlashDrafter.from_pretrained(tmp_path, target, tree=tree)
    with sdt.patched(target, drafter=drafter, seed=1, cuda_graphs=False):
        text = target.generate(**prompt(), **options)
    eager = sdt.stats(target)
    with sdt.patched(target, drafter=drafter, seed=1):
        capture_here(monkeypatch, lag)
        for call in range(2):  # a later call replays the graphs of the first
            assert torch.equal(target.generate(**prompt(), **options), text)
            stats = sdt.stats(target)
            assert stats.replayed > 5 and (stats.captured, stats.reused) == ((0, 2) if call else (2, 0))
            # the last drafts differ, because captured rounds also draft tokens that can no longer be emitted
            assert stats.accepted_by_position[:2] == pytest.approx(eager.accepted_by_position[:2], abs=1)
            assert stats.accepted


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(None, id="likeliest"),
        *(pytest.param(tree, marks=pytest.mark.slow, id=type(tree).__name__) for tree in (FIXED, DYNAMIC)),
    ],
)
def test_forwards_and_host_reads_of_a_round(tree, monkeypatch, tmp_path):
    """A round takes one forward of the target, one of the draft, and at most one read by the host."""
    target = target_of()
    write_dflash(tmp_path, target, "z-lab")
    drafter = sdt.DFlashDrafter.from_pretrained(tmp_path, target, tree=tree)
    forward, forwards, reads = DFlashModel.forward, [], []

    def counting(self, *args, **named):
        forwards.append("draft")
        return forward(self, *args, **named)

    monkeypatch.setattr(DFlashModel, "forward", counting)
    for length in (5, 17):
        forwards.clear()
        with sdt.patched(target, drafter=drafter), count_host_reads() as counted, count_forwards(target) as verified:
            target.generate(**prompt(), **{**GREEDY, "max_new_tokens": length})
        rounds = sdt.stats(target).rounds
        assert len(verified) == len(forwards) == rounds + 1  # and one for the prompt
        reads.append((counted.total, rounds))
    (few_reads, few), (many_reads, many) = reads  # their difference is free of the prompt
    assert many - few > 5 and many_reads - few_reads <= many - few


@pytest.mark.parametrize("layout", ["z-lab", "speculators, from the anchor"])
def test_only_the_depths_of_the_tree_have_logits(layout, monkeypatch, tmp_path):
    target, rows, forward = target_of(), [], DFlashModel.logits_input
    write_dflash(tmp_path, target, layout)
    drafter = sdt.DFlashDrafter.from_pretrained(tmp_path, target, num_tokens=2)
    assert drafter.model.num_drafted > 2

    def counting(self, states):
        rows.append(forward(self, states).shape[1])
        return forward(self, states)

    monkeypatch.setattr(DFlashModel, "logits_input", counting)
    with sdt.patched(target, drafter=drafter):
        target.generate(**prompt(), **GREEDY)
    assert set(rows[:10]) == {2}


@pytest.mark.slow
def test_later_turns_of_a_conversation_replay_graphs(monkeypatch, tmp_path):
    """The draft sees only the columns that a turn runs; their number is not part of the graphs. Nothing accumulates."""
    capture_here(monkeypatch, 1)
    target = target_of()
    write_dflash(tmp_path, target, "z-lab")
    drafter = sdt.DFlashDrafter.from_pretrained(tmp_path, target, tree=6)
    cached, text, reused, kept = DynamicCache(), prompt(batch=1)["input_ids"], [], []
    with sdt.patched(target, drafter=drafter):
        for _ in range(5):
            options = {**GREEDY, "max_new_tokens": 20, "past_key_values": cached}
            text = target.generate(text, attention_mask=torch.ones_like(text), **options)
            reused.append(sdt.stats(target).reused)
            kept.append(len(_patch._workspaces[target]._idle[-1].buffers._kept))
            text = torch.cat([text, text[:, :3]], 1)
    assert reused.count(2) >= 3, "the capacity grows once"
    assert kept[1] == kept[-1]


@pytest.mark.parametrize(
    "tree", [pytest.param(None, id="likeliest"), pytest.param(FIXED, marks=pytest.mark.slow, id="fixed")]
)
def test_nothing_of_a_call_outlives_it(tree, monkeypatch, tmp_path):
    """Not even until Python collects reference cycles. Of a chunk of the prompt, at most one state is kept."""
    target = target_of()
    write_dflash(tmp_path, target, "z-lab")
    drafter, alive = sdt.DFlashDrafter.from_pretrained(tmp_path, target, tree=tree), []
    start = type(drafter).start

    def starting(self, context, *args):
        session = start(self, context, *args)
        reader = context.prompt_reader
        alive.extend(map(weakref.ref, (context, context.target, reader)))
        kept = [each for each in vars(reader).values() if torch.is_tensor(each) and each.is_floating_point()]
        assert reader.cache is None and all(each.untyped_storage().nbytes() <= 2 * 32 * 4 for each in kept)
        return session

    monkeypatch.setattr(type(drafter), "start", starting)
    gc.collect()
    gc.disable()
    try:
        target.generate(**prompt(), **GREEDY, custom_generate=sdt.SpeculativeGenerate(drafter=drafter))
        assert [each() for each in alive] == [None] * 3
    finally:
        gc.enable()


# --- distributions


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    """A target of 4 tokens, and a head that can name 3 of them."""
    small = {"vocab_size": 4, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    target = build("llama", num_hidden_layers=3, **small)
    layout = replace(DFLASH_LAYOUTS["speculators, converted"], mask=2, ids=(0, 1, 2), states=(0, 1, 2))
    checkpoint = read_checkpoint(write_dflash(tmp_path_factory.mktemp("head"), target, layout).folder)
    rows = checkpoint.tensors["lm_head.weight"][[0, 1, 3]]
    tensors = {**checkpoint.tensors, "lm_head.weight": rows, "d2t": torch.tensor([0, 0, 1])}
    config = {**checkpoint.config, "draft_vocab_size": 3}
    return target, DFlashModel.from_checkpoint(replace(checkpoint, config=config, tensors=tensors))


OF_RULES = {
    "coupled": [{"tree": 5}, {"num_tokens": 2}],
    "rejection": [{"num_tokens": 2}],
    "block": [{}],  # a chain
    "multi_round": [{"tree": sdt.Topology.from_widths([2, 2])}, {"tree": 5}],
    "traversal": [{"tree": sdt.Topology.from_widths([3, 1]), "replacement": True}],
}
BEGINNING = torch.tensor([[3, 1, 2, 3, 0, 3]])
# a draft of two tokens needs four: the first is the prompt's, and the last follows the draft
PROOF = {"tokens": 4, "samples": 2000, "rows": 2000, "top_k": 0, "temperature": 1.3}


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        pytest.param(rule, shape, marks=[] if (rule, number) == ("multi_round", 0) else pytest.mark.slow)
        for rule, shapes in OF_RULES.items()
        for number, shape in enumerate(shapes)
    ],
)
def test_tokens_drawn_from_marginals_keep_the_distribution(rule, shape, of_four):
    """The head never drafts one of the target's four tokens. It comes from the residual alone."""
    target, head = of_four
    found = prove(target, sdt.DFlashDrafter(head, **shape), rule, BEGINNING, **PROOF)
    assert found.agrees and found.is_conclusive and found.acceptance_length > 1.1, found


def test_every_lossless_rule_is_proven():
    assert set(OF_RULES) == set(RULES) - set(LOSSY_RULES)


@pytest.mark.parametrize(
    "dimension",
    [pytest.param(-1, marks=pytest.mark.slow, id="of other tokens"), pytest.param(-2, id="of other depths")],
)
def test_wrong_draft_probabilities_are_caught(dimension, of_four, monkeypatch):
    honest = DraftTree.drawn

    def wrong(tree, sampling, draft_logits, *rest):
        return honest(tree, sampling, draft_logits.roll(1, dimension), *rest)

    monkeypatch.setattr(DraftTree, "drawn", wrong)
    target, head = of_four
    found = prove(target, sdt.DFlashDrafter(head, **OF_RULES["multi_round"][0]), "multi_round", BEGINNING, **PROOF)
    assert not found.agrees and found.cell.p_value < 1e-6
