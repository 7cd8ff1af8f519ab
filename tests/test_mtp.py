"""MTP layers of a target's own checkpoint: their drafts for random targets of every family, in lock-step with
transformers' own generator, and the text and cost of calls.

A wrong draft never changes the text, and only lowers acceptance. Tokens, parents and scores of drafts are therefore
compared with a literal statement, `literal_mtp`.
"""

import copy
import gc
import sys
import weakref
from dataclasses import replace
from functools import cache, partial

import pytest
import safetensors
import torch
import transformers
from packaging.version import Version
from transformers.generation import candidate_generator

import specdec_triton as sdt
from families import NEVER, VOCAB, build, prompt
from helpers import accept_more, accepted, capture_here
from literal_mtp import MISTAKES, LiteralDraft
from mtp_checkpoints import DEEPSEEK, MTP_FAMILIES, write_mtp
from recorded_drafts import TOLERANCE, agreements, record
from specdec_triton.forward import runner
from specdec_triton.heads.mtp import MtpModel
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.noise import COUPLED, gumbel, row_seeds
from specdec_triton.tools.host_sync import count_forwards, count_host_reads

TREE = sdt.DynamicTree(16, width=4, depth=4)
DEEP = sdt.DynamicTree(30, width=4, depth=7)
FIXED = sdt.Topology.from_widths([3, 2, 1, 1])
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
LONG = {**GREEDY, "max_new_tokens": 36}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
# whose targets `patch` accepts
SERVED = [family for family in MTP_FAMILIES if family != "qwen3_next"]
SEVERAL = [family for family in SERVED if MTP_FAMILIES[family].most_layers > 1]
QUICK = ("deepseek_v3", "mellum", "mimo")
same_trees = partial(agreements, literal_draft=LiteralDraft)


def slow_unless(quick, *values, **named):
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow, **named)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function of the arguments of `write_mtp` after the folder. Each checkpoint is written once."""

    @cache
    def write(family, num_layers=1, seed=0, shards=1):
        return write_mtp(tmp_path_factory.mktemp(family), family, num_layers, seed, shards)

    return write


def drafts_of(checkpoint, inputs=None, options=GREEDY, more=False, num_tokens=None, tree=None, **settings):
    """The recorded drafts of one call, the text of the call, and a copy of the target. `more` accepts more drafts, see
    `accept_more`."""
    target = checkpoint.target()
    drafter = sdt.MTPDrafter.from_target(target, num_tokens=num_tokens, tree=tree)
    with pytest.MonkeyPatch.context() as patches, sdt.patched(target, drafter=drafter, **settings):
        drafts = record(patches, drafter)
        if more:
            accept_more(patches)
        text = target.generate(**(inputs or prompt()), **options)
    return drafts, text, copy.deepcopy(target)


@pytest.fixture(scope="module")
def recorded(written):
    """A function of a family and a number of layers: the checkpoint, its recorded drafts of one call, and a copy of the
    target. With one layer, the drafts are dynamic trees; with several, chains. Each call runs once."""

    @cache
    def run(family, num_layers=1):
        checkpoint = written(family, num_layers)
        drafts, _, judge = drafts_of(checkpoint, options=LONG, more=True, tree=TREE if num_layers == 1 else None)
        return checkpoint, drafts, judge

    return run


def same_tokens(drafts, checkpoint, target, topology, mistake="", first=0, limit=12):
    """For each draft of a topology, whether its tokens and parents are those of the literal statement. Left out are
    drafts deeper than the rest of the text, and those that a rounding error could have changed."""
    found, close = [], 0
    for row, text, budget, tree, _ in drafts:
        if not budget > tree.max_depth == topology.max_depth or len(found) == limit:
            continue
        literal = LiteralDraft(checkpoint, target, text, mistake, first)
        tokens = literal.ranked(topology)
        if literal.margin < TOLERANCE:
            close += 1
            continue
        found.append(tree.tokens[row].tolist() == tokens and tree.parents[row].tolist() == list(topology.parents))
    assert close <= 2 * len(found), f"{close} of {close + len(found)} drafts had tokens of equal scores"
    return found


# --- drafts of one layer


@pytest.mark.parametrize("family", [slow_unless(family in QUICK, family) for family in SERVED])
def test_drafts_equal_the_literal_statement(family, recorded):
    """A row is padded on the left. Drafts are accepted in part, so the layer's cache holds rows of tree nodes that were
    replaced by rows of verified tokens."""
    checkpoint, drafts, judge = recorded(family)
    found = same_trees(drafts, checkpoint, judge, limit=16)
    assert len(found) >= 12 and all(found)
    counts = accepted(drafts[:16])
    assert sum(0 < count < TREE.depth for count in counts) >= 4 and max(counts) > 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 4))
@pytest.mark.parametrize("family", SERVED)
def test_more_seeds_and_deeper_trees(family, seed, written):
    """A layer that is recycled seven times amplifies rounding errors. In the literal statement, changes of the weights
    by 3e-7 change scores by up to 9e-3 (mimo_v2_flash)."""
    checkpoint = written(family, 1, seed)
    options = {**GREEDY, "max_new_tokens": 60}
    drafts, _, judge = drafts_of(checkpoint, options=options, more=True, tree=DEEP)
    found = same_trees(drafts, checkpoint, judge, width=DEEP.width, limit=30, error=0.1)
    assert len(found) >= 12 and all(found)
    counts = accepted(drafts)
    assert sum(0 < count < DEEP.depth for count in counts) >= 5 and max(counts) > 2


OTHER_CALLS = {
    "batch": {"inputs": prompt(batch=4, length=14, padding=6)},
    "one row": {"inputs": prompt(batch=1, length=12)},
    "chunks": {"options": {**GREEDY, "prefill_chunk_size": 4}},
    "fused": {"fuse": True},
    "compiled": {"compile": True},
}


@pytest.mark.parametrize(
    ("case", "family"),
    [
        slow_unless(family == "mimo" and case in ("batch", "fused"), case, family)
        for case in OTHER_CALLS
        for family in ("mimo", "deepseek_v3", "mellum", "mimo_v2_flash")
    ],
)
def test_other_calls(case, family, written):
    checkpoint = written(family)
    drafts, _, judge = drafts_of(checkpoint, tree=TREE, **OTHER_CALLS[case])
    found = same_trees(drafts, checkpoint, judge, limit=12)
    assert len(found) >= 10 and all(found)


@pytest.mark.parametrize("family", [slow_unless(family == "mellum", family) for family in ("mellum", "deepseek_v3")])
def test_long_prompts_run_in_chunks(family, monkeypatch, written):
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 4)
    checkpoint = written(family)
    drafts, _, judge = drafts_of(checkpoint, prompt(length=15, padding=5), tree=TREE)
    found = same_trees(drafts, checkpoint, judge, limit=8)
    assert len(found) == 8 and all(found)


@pytest.mark.parametrize(
    ("family", "num_layers"), [slow_unless(False, "mimo", 1), ("deepseek_v3", 2), slow_unless(False, "glm4_moe", 3)]
)
def test_a_cache_of_an_earlier_call(family, num_layers, written):
    """The layers know the columns that this call runs, and no earlier ones."""
    checkpoint = written(family, num_layers)
    target, options = checkpoint.target(), {**GREEDY, "max_new_tokens": 6, "return_dict_in_generate": True}
    first = target.generate(**prompt(padding=0), **options)
    turn = torch.cat([first.sequences, prompt(length=5, padding=0, seed=1)["input_ids"]], 1)
    known = first.past_key_values.get_seq_length()
    inputs = {"input_ids": turn, "past_key_values": first.past_key_values}
    tree = sdt.DynamicTree(16, width=4, depth=4 if num_layers == 1 else num_layers)
    drafts, text, judge = drafts_of(checkpoint, inputs, tree=tree)
    assert torch.equal(text, target.generate(turn, **GREEDY))
    found = same_trees(drafts, checkpoint, judge, first=known, limit=12)
    assert len(found) >= 10 and all(found)


@pytest.mark.slow  # because kernels run in Triton's interpreter
@pytest.mark.parametrize("family", ["mimo", "deepseek_v3", "mellum"])
def test_kernels(family, written):
    checkpoint, tree = written(family), sdt.DynamicTree(6, width=2, depth=3)
    drafts, _, judge = drafts_of(checkpoint, options={**GREEDY, "max_new_tokens": 8}, tree=tree, impl="triton")
    found = same_trees(drafts, checkpoint, judge, width=2)
    assert len(found) >= 2 and all(found)


def test_coupled_drafts_rank_by_the_targets_noise(written):
    checkpoint, seeds = written("mimo"), row_seeds(5, 2)
    drafts, _, judge = drafts_of(checkpoint, options=SAMPLED, tree=TREE, seed=5)
    filters = Filters(torch.tensor([0.8], dtype=torch.float64), torch.tensor([20]))

    def rank(drafted):
        def ranked(logits, depth):
            log_probs = filtered_log_probs(logits[None, None], filters)[0, 0]
            noise = gumbel(seeds[drafted.row], torch.tensor(len(drafted.text) - 1 + depth), 0, COUPLED, VOCAB)
            return (log_probs + noise).log_softmax(-1)

        return ranked

    found = same_trees(drafts, checkpoint, judge, rank=rank, limit=12)
    assert len(found) >= 10 and all(found)


SHAPES = {"widths": FIXED, "chain": sdt.Topology.chain(4), "budget": 12}


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        slow_unless(family == "mimo" and shape == "widths", shape, family)
        for shape in SHAPES
        for family in ("mimo", "deepseek_v3", "mellum", "ernie4_5")
    ],
)
def test_fixed_trees_equal_the_literal_statement(shape, family, written):
    checkpoint, shape = written(family), SHAPES[shape]
    drafts, _, judge = drafts_of(checkpoint, tree=shape, more=True, options=LONG)
    topology = sdt.Topology.from_budget(shape) if isinstance(shape, int) else shape
    found = same_tokens(drafts, checkpoint, judge, topology)
    assert len(found) >= 6 and all(found)


# --- drafts of several layers, and of transformers


# cases -> the prompts for K layers. With fewer tokens than K - 1, the first draft also sees rows that do not exist
SEVERAL_INPUTS = {
    "padded": lambda layers: prompt(),
    "short": lambda layers: prompt(batch=2, length=9, padding=10 - layers),
    "shortest": lambda layers: prompt(batch=1, length=layers - 1),
    "batch": lambda layers: prompt(batch=4, length=14, padding=6),
    "chunks": lambda layers: prompt(),
}


@pytest.mark.parametrize("inputs", [slow_unless(case in ("padded", "short"), case) for case in SEVERAL_INPUTS])
@pytest.mark.parametrize(
    ("family", "num_layers"),
    [
        slow_unless(family == "deepseek_v3" and num_layers == 2, family, num_layers)
        for family in SEVERAL
        for num_layers in (2, 3)
    ],
)
def test_chains_of_several_layers_equal_the_literal_statement(family, num_layers, inputs, monkeypatch, written):
    """Each layer drafts one token. The rows of later layers hold drafted tokens, which the target may replace."""
    if inputs == "chunks":
        monkeypatch.setattr(runner, "PREFILL_CHUNK", 4)
    checkpoint = written(family, num_layers)
    drafts, _, judge = drafts_of(checkpoint, SEVERAL_INPUTS[inputs](num_layers), LONG, more=True)
    found = same_tokens(drafts, checkpoint, judge, sdt.Topology.chain(num_layers), limit=20)
    assert len(found) >= 12 and all(found)
    counts = accepted(drafts)
    assert {0, 1, num_layers} <= set(counts)


@pytest.mark.parametrize("num_layers", [2, slow_unless(False, 3)])
def test_trees_of_several_layers_equal_the_literal_statement(num_layers, written):
    checkpoint = written("deepseek_v3", num_layers)
    tree = sdt.DynamicTree(10, width=3, depth=num_layers)
    drafts, _, judge = drafts_of(checkpoint, options=LONG, more=True, tree=tree)
    found = same_trees(drafts, checkpoint, judge, width=tree.width, limit=16)
    assert len(found) >= 12 and all(found) and {0, 1, num_layers} <= set(accepted(drafts))
    topology = sdt.Topology.from_widths([3, 2, 1][:num_layers])
    drafts, _, judge = drafts_of(checkpoint, options=LONG, more=True, tree=topology)
    found = same_tokens(drafts, checkpoint, judge, topology)
    assert len(found) >= 8 and all(found)


def test_mimo_v2_recycles_its_first_layer(written):
    """As vLLM does; the other layers of published checkpoints are not read."""
    checkpoint = written("mimo_v2_flash", 2)
    drafts, _, judge = drafts_of(checkpoint, tree=TREE)
    first = replace(checkpoint, mtp=replace(checkpoint.mtp, layers=checkpoint.mtp.layers[:1]))
    found = same_trees(drafts, first, judge, limit=8)
    assert len(found) == 8 and all(found)


def test_the_default_is_a_chain(written):
    """Of three tokens with one layer, and of one token for each of several layers."""
    for num_layers, wanted in ((1, 3), (2, 2)):
        drafts, _, _ = drafts_of(written("deepseek_v3", num_layers), prompt(batch=1))
        first = drafts[0].tree
        assert first.is_chain and first.max_depth == wanted


# family -> entries of config.json without which transformers does not find its MTP layers
ENTRIES = {
    "deepseek_v3": lambda count: {},
    "glm4_moe": lambda count: {},
    "glm4_moe_lite": lambda count: {"num_mtp_layers": count, "mtp_mlp_layer_types": ["sparse"] * count},
    "mellum": lambda count: {},
    "step3p7": lambda count: {},
}


@pytest.mark.parametrize(
    ("family", "num_layers"),
    [
        slow_unless(family == "deepseek_v3", family, num_layers)
        for family in ENTRIES
        for num_layers in range(1, 1 + MTP_FAMILIES[family].most_layers)
    ],
)
def test_lock_step_with_transformers(family, num_layers, monkeypatch, tmp_path):
    """transformers drafts a chain of one token for each layer. With equal drafts, its rounds end at the same tokens as
    ours, so that all of its drafts can be compared."""
    entries = ENTRIES[family](num_layers)
    # transformers does not read the names of Step's last norms
    names = DEEPSEEK if family == "step3p7" else None
    checkpoint = write_mtp(tmp_path, family, num_layers, shards=2, names=names, **entries)
    target, theirs = checkpoint.target(), {}
    if family in ("mellum", "step3p7") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this version of transformers cannot run its MTP layers")
    if family in ("deepseek_v3", "glm4_moe", "glm4_moe_lite"):  # their classes state the layer of published models
        below = target.config.num_hidden_layers
        patterns = [rf"model\.layers\.{below + k}\." for k in range(num_layers)]
        monkeypatch.setattr(type(target), "_keys_to_ignore_on_load_unexpected", patterns)
        target = checkpoint.target()
    get_candidates = candidate_generator.MTPCandidateGenerator.get_candidates

    def spy(self, input_ids, *args, is_first_iteration, **named):
        found = get_candidates(self, input_ids, *args, is_first_iteration=is_first_iteration, **named)
        if not is_first_iteration:
            theirs[tuple(input_ids[0].tolist())] = found[0][0, input_ids.shape[1] :].tolist()
        return found

    monkeypatch.setattr(candidate_generator.MTPCandidateGenerator, "get_candidates", spy)
    inputs = prompt(batch=1)
    text = target.generate(**inputs, **LONG, use_mtp=True)
    assert torch.equal(text, target.generate(**inputs, **LONG))
    drafts, ours, _ = drafts_of(checkpoint, inputs, LONG, num_tokens=num_layers)
    assert torch.equal(ours, text)
    compared = [
        tree.tokens[0, 1:].tolist() == theirs[tuple(text)] for _, text, budget, tree, _ in drafts if budget > num_layers
    ]
    assert len(compared) >= 12 and all(compared)


@pytest.mark.parametrize(
    ("rule", "family", "num_layers"),
    [
        slow_unless((rule == "multi_round" and family == "mimo") or num_layers == 2, rule, family, num_layers)
        for family, num_layers in (("mimo", 1), ("deepseek_v3", 2), ("mellum", 1))
        for rule in ("multi_round", "block")
        if rule == "block" or num_layers == 1
    ],
)
def test_drawn_trees_state_the_literal_probabilities(rule, family, num_layers, written):
    """Rules that weigh tokens need the probabilities from which they were drawn."""
    shape = FIXED if rule == "multi_round" else None
    checkpoint = written(family, num_layers)
    drafts, _, judge = drafts_of(checkpoint, options=SAMPLED, tree=shape, rule=rule)
    compared = 0
    for row, text, budget, tree, _ in drafts[:10]:
        if budget <= tree.max_depth:
            continue
        literal, paths = LiteralDraft(checkpoint, judge, text), [()]
        for node, parent in enumerate(tree.parents[row].tolist()):
            if node:
                paths.append((*paths[parent], int(tree.tokens[row, node])))
            place = int(tree.draft_row[0 if len(tree.draft_row) == 1 else row, node])
            if place >= 0:
                given = tree.draft_logits[row, place].double().log_softmax(-1)
                wanted = literal.logits(paths[node]).log_softmax(-1)
                torch.testing.assert_close(given, wanted, rtol=0, atol=2 * TOLERANCE)
                compared += 1
    assert compared >= 12


# mistake -> a family and a number of layers that it concerns, if not those of MiMo
CONCERNED = {
    "no window": ("mellum", 1),
    "first layer for all levels": ("deepseek_v3", 2),
    "no further shift in later layers": ("deepseek_v3", 2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_be_noticed(mistake, recorded):
    family, num_layers = CONCERNED.get(mistake, ("mimo", 1))
    checkpoint, drafts, judge = recorded(family, num_layers)
    if num_layers == 1:
        assert not all(same_trees(drafts, checkpoint, judge, mistake, limit=5))
    else:
        assert not all(same_tokens(drafts, checkpoint, judge, sdt.Topology.chain(num_layers), mistake))


# --- the weights


def test_layers_of_a_target_that_cannot_be_patched(written):
    """Qwen3-Next keeps a recurrent state, so only the layer itself is compared, over a whole text."""
    checkpoint = written("qwen3_next")
    target = checkpoint.target()
    model, text = MtpModel.from_target(target), prompt(batch=1, length=16)["input_ids"]
    literal = LiteralDraft(checkpoint, copy.deepcopy(target), text[0].tolist())
    with torch.no_grad():
        states = target.model(text[:, :-1]).last_hidden_state
        found = model(
            inputs_embeds=target.get_input_embeddings()(text[:, 1:]),
            features=states,
            position_ids=torch.arange(15)[None],
            attention_mask=None,
            use_cache=False,
        ).last_hidden_state
    wanted = literal.normed(0, literal.rows(()))
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def reads(monkeypatch):
    """A list of the files that safetensors opens and of the tensors that are read, in order."""
    found, safe_open = [], safetensors.safe_open

    class Counted:
        def __init__(self, file, *args, **named):
            found.append(str(file))
            self.opened = safe_open(file, *args, **named)

        def __enter__(self):
            self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            found.append(name)
            return self.opened.get_tensor(name)

        def get_slice(self, name):
            found.append(name)
            return self.opened.get_slice(name)

    for module in list(sys.modules.values()):
        if vars(module).get("safe_open") is safe_open:  # getattr would import lazy modules
            monkeypatch.setattr(module, "safe_open", Counted)
    return found


@pytest.mark.parametrize("shards", [slow_unless(False, 1), 3])
@pytest.mark.parametrize("family", [slow_unless(family in QUICK, family) for family in MTP_FAMILIES])
def test_only_the_layers_are_read(family, shards, reads, written):
    """Of the shards, only those that hold MTP tensors are opened."""
    checkpoint = written(family, 1, 0, shards)
    target = checkpoint.target()
    reads.clear()
    model = MtpModel.from_target(target)
    files = [read for read in reads if read.endswith(".safetensors")]
    assert {read for read in reads if read not in files} == checkpoint.names
    assert len(set(files)) == 1
    modules = [module for layer in checkpoint.mtp.layers for module in layer]
    layers = sum(weight.numel() for module in modules for weight in module.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == layers  # no copy of an embedding or a language head


@pytest.mark.parametrize("family", [slow_unless(False, "mellum"), "deepseek_v3"])
def test_sharded_files_draft_the_same(family, written):
    drafts = [drafts_of(written(family, 1, 0, shards), prompt(batch=1), tree=TREE)[0] for shards in (1, 3)]
    for one, other in zip(*drafts, strict=True):
        assert one.text == other.text and torch.equal(one.tree.tokens, other.tree.tokens)


def test_the_layers_get_the_targets_dtype(written):
    target = written("deepseek_v3").target(dtype=torch.bfloat16)
    model = MtpModel.from_target(target)
    dtypes = {name: tensor.dtype for name, tensor in target.model.layers[-1].named_parameters()}
    block = [weight.dtype for name, weight in model.named_parameters() if name.endswith("o_proj.weight")]
    assert block == [dtypes["self_attn.o_proj.weight"]] == [torch.bfloat16]


def test_targets_without_layers_are_refused(written, tmp_path):
    target = written("mimo").target()
    target.save_pretrained(tmp_path)  # without its MTP layers
    with pytest.raises(ValueError, match="MTP"):
        MtpModel.from_target(type(target).from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="MTP"):
        sdt.MTPDrafter.from_target(type(target).from_pretrained(tmp_path))


def test_layers_of_another_model_are_refused(written):
    model = MtpModel.from_target(written("mimo").target())
    with pytest.raises(ValueError, match=r"hidden size must be 32, got 16"):
        sdt.patch(build("qwen2", hidden_size=16), drafter=sdt.MTPDrafter(model))


# --- texts


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("family", [slow_unless(family == "deepseek_v3", family) for family in SERVED])
def test_use_mtp(family, num_layers, written):
    """transformers' own argument on a patched model, also if transformers refuses it: in batches, and for families
    whose MTP layers it does not know."""
    if num_layers > MTP_FAMILIES[family].most_layers:
        pytest.skip("published checkpoints have one layer")
    target, inputs = written(family, num_layers).target(), prompt(batch=3)
    for options in (GREEDY, SAMPLED):
        text = target.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
        with sdt.patched(target, seed=1):
            assert torch.equal(target.generate(**inputs, **options, use_mtp=True), text)
        assert sum(sdt.stats(target).accepted_by_position) > 0


@pytest.mark.parametrize("num_layers", [1, slow_unless(False, 2)])
@pytest.mark.parametrize("rule", ["block", slow_unless(False, "rejection"), slow_unless(False, "multi_round")])
def test_rules_that_weigh_tokens(rule, num_layers, written):
    """With one possible token at each position, a sampled text is the greedy one under every lossless rule."""
    target, inputs = written("deepseek_v3", num_layers).target(), prompt(batch=3)
    text = target.generate(**inputs, **GREEDY)
    with sdt.patched(target, rule=rule, seed=1):
        assert torch.equal(target.generate(**inputs, **{**SAMPLED, "top_k": 1}, use_mtp=True), text)
        target.generate(**inputs, **{**SAMPLED, "temperature": 2.0}, use_mtp=True)
    assert sum(sdt.stats(target).accepted_by_position) > 0


@pytest.mark.parametrize(
    "shape", [None, "auto", *(slow_unless(False, shape) for shape in (TREE, FIXED, sdt.DynamicTree(1, 2, 2)))]
)
def test_the_text_is_the_targets(shape, written):
    target, inputs = written("mimo").target(), prompt(batch=3)
    drafter = sdt.MTPDrafter.from_target(target)
    for options in (GREEDY, SAMPLED):
        text = target.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
        with sdt.patched(target, drafter=drafter, seed=1, tree=shape):
            assert torch.equal(target.generate(**inputs, **options), text)


# --- cost


def test_weights_are_read_once_in_ten_calls(reads, written):
    """transformers reads the files in each call."""
    target = written("deepseek_v3", 1, 0, 3).target()
    reads.clear()
    with sdt.patched(target):
        for call in range(10):
            target.generate(**prompt(), **{**GREEDY, "max_new_tokens": 4 + call}, use_mtp=True)
    assert reads and len(reads) == len(set(reads))


def test_layers_are_dropped_by_unpatch(monkeypatch, written):
    """After a change of the target's dtype, they are read again."""
    target, made = written("mimo").target(), []
    from_target = MtpModel.from_target.__func__

    def remembering(cls, *args, **named):
        model = from_target(cls, *args, **named)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(MtpModel, "from_target", classmethod(remembering))
    with sdt.patched(target):
        target.generate(**prompt(), **GREEDY, use_mtp=True)
        gc.collect()
        assert len(made) == 1 and made[0]() is not None
        target.to(torch.bfloat16)
        target.generate(**prompt(), **GREEDY, use_mtp=True)
        gc.collect()
        assert len(made) == 2 and made[0]() is None and made[1]().dtype == torch.bfloat16
    gc.collect()
    assert made[1]() is None


@pytest.mark.parametrize(
    ("num_layers", "tree"),
    [
        slow_unless(False, 1, TREE, id="dynamic"),
        slow_unless(True, 1, FIXED, id="fixed"),
        slow_unless(True, 2, None, id="two layers"),
    ],
)
def test_forwards_and_host_reads_of_a_round(num_layers, tree, monkeypatch, written):
    """A round takes one forward of the target, at most one of an MTP layer for each level, and at most one read by the
    host."""
    target = written("deepseek_v3", num_layers).target()
    drafter = sdt.MTPDrafter.from_target(target, tree=tree)
    forward, forwards, reads = MtpModel.forward, [], []
    depth = num_layers if tree is None else tree.max_depth

    def counting(self, *args, **named):
        forwards.append("layer")
        return forward(self, *args, **named)

    monkeypatch.setattr(MtpModel, "forward", counting)
    for length in (8, 28):
        forwards.clear()
        with sdt.patched(target, drafter=drafter), count_host_reads() as counted, count_forwards(target) as verified:
            target.generate(**prompt(), **{**GREEDY, "max_new_tokens": length})
        rounds = sdt.stats(target).rounds
        assert len(verified) == rounds + 1  # and one for the prompt
        assert 0.5 * rounds * depth < len(forwards) - num_layers <= rounds * depth
        reads.append((counted.total, rounds))
    (few_reads, few), (many_reads, many) = reads  # their difference is free of the prompt
    assert many - few > 5 and many_reads - few_reads <= many - few


@pytest.mark.parametrize(
    ("family", "num_layers", "tree", "options", "lag"),
    [
        slow_unless(quick, *case)
        for quick, case in (
            (True, ("mimo", 1, sdt.DynamicTree(8, width=3, depth=3), GREEDY, 0)),
            (False, ("mimo", 1, sdt.DynamicTree(8, width=3, depth=3), SAMPLED, 1)),
            (False, ("deepseek_v3", 1, None, GREEDY, 1)),
            (True, ("deepseek_v3", 2, None, GREEDY, 1)),
            (False, ("deepseek_v3", 2, None, SAMPLED, 0)),
            (False, ("mellum", 1, FIXED, GREEDY, 1)),
        )
    ],
)
def test_captured_rounds_draft_the_same(family, num_layers, tree, options, lag, monkeypatch, written):
    """Random drafts are accepted equally often only if they are equal."""
    target = written(family, num_layers).target()
    drafter = sdt.MTPDrafter.from_target(target, tree=tree)
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


@pytest.mark.parametrize(("num_layers", "tree"), [(1, TREE), slow_unless(False, 1, FIXED), (2, None)])
def test_nothing_of_a_call_outlives_it(num_layers, tree, monkeypatch, written):
    """Not even until Python collects reference cycles."""
    target = written("deepseek_v3", num_layers).target()
    drafter, alive = sdt.MTPDrafter.from_target(target, tree=tree), []
    start = type(drafter).start

    def starting(self, context, *args):
        session = start(self, context, *args)
        alive.extend(map(weakref.ref, (context, context.target, context.prompt_reader)))
        return session

    monkeypatch.setattr(type(drafter), "start", starting)
    gc.collect()
    gc.disable()
    try:
        target.generate(**prompt(), **GREEDY, custom_generate=sdt.SpeculativeGenerate(drafter=drafter))
        assert [each() for each in alive] == [None] * 3
    finally:
        gc.enable()
