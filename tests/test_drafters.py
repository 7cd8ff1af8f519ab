"""Drafters that run models, and options that are refused."""

import dataclasses
import gc
import types
import weakref

import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import TREES, Launches, assert_ranked_by, context
from specdec_triton.drafters.forwards import ModelForwards
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.forward.wrappers import embedded_tokens
from specdec_triton.ops import noise
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.rules import WEIGHING_RULES
from specdec_triton.tree import topology_tensors


@pytest.mark.parametrize("adapted", ["lora", "tokens", "saved"])
def test_a_draft_may_be_wrapped(adapted):
    """In a PEFT wrapper or with a replaced embedding, the draft model drafts as the inner model does."""
    peft = pytest.importorskip("peft")
    options = {
        "lora": {"target_modules": ["embed_tokens", "q_proj"]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }[adapted]
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=adapted == "tokens", **options)
    target, draft = build("llama"), peft.get_peft_model(build("llama", seed=1), config).eval()
    text = target.generate(**prompt(), do_sample=False, max_new_tokens=8, eos_token_id=NEVER)
    for drafter in (sdt.ModelDrafter(draft, num_tokens=3), sdt.ModelDrafter(draft, tree=sdt.DynamicTree(4, 2, 2))):
        with sdt.patched(target, drafter=drafter):
            found = target.generate(**prompt(), do_sample=False, max_new_tokens=8, eos_token_id=NEVER)
        assert torch.equal(found, text) and sdt.stats(target).drafted > 0
    with sdt.patched(target):
        found = target.generate(
            **prompt(), do_sample=False, max_new_tokens=8, eos_token_id=NEVER, assistant_model=draft
        )
    assert torch.equal(found, text) and embedded_tokens(draft.get_base_model()) == 61


def test_rows_of_an_unknown_embedding():
    model = build("llama")

    class Bare(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return self.inner(tokens)

    model.set_input_embeddings(Bare(model.get_input_embeddings()))
    assert embedded_tokens(model) == 61


@pytest.mark.parametrize("make", [sdt.ModelDrafter, lambda model: sdt.EarlyExitDrafter(1)], ids=["model", "layers"])
def test_a_model_that_drafts_for_itself_is_collected(make):
    model = build("llama")
    drafter = make(model)
    model.generate(
        **prompt(batch=1), max_new_tokens=6, do_sample=False, custom_generate=sdt.SpeculativeGenerate(drafter=drafter)
    )
    gone = weakref.ref(model)
    del model, drafter
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("tree", [sdt.Topology.from_widths([3, 2, 2]), TREES["skipping"]])
@pytest.mark.parametrize("seed", [0, 3], ids=["accepted", "rejected"])
def test_a_draft_model_ranks_each_nodes_children(tree, seed, monkeypatch):
    draft = build("llama", seed=seed)
    assert_ranked_by(draft, build("llama"), sdt.ModelDrafter(draft, tree=tree), monkeypatch)


CHAIN, TREE = sdt.Topology.chain(5), sdt.Topology.from_budget(16)
FILTERS = {
    "greedy": Filters(),
    "temperature": Filters(temperature=torch.tensor([0.7, 1.2])),
    "filtered": Filters(
        temperature=torch.tensor([0.7, 1.2]),
        top_k=torch.tensor([20, 30]),
        top_p=torch.tensor([0.9, 0.8], dtype=torch.float64),
        max_top_k=30,
    ),
}
DRAFTED = 61  # tokens of the draft's vocabulary; the target has some more


def drafting(rule, filters, tree, replacement=False, vocab=DRAFTED, impl="reference"):
    """A session, ready to draft, whose forwards return the rows of fixed logits [B, N, V] one after another; and these
    logits."""
    model = build("llama", vocab_size=DRAFTED)
    told = dataclasses.replace(
        context([[5, 6, 7, 8], [9, 8, 7, 6]], vocab=vocab),
        rule=rule,
        filters=FILTERS[filters],
        seeds=None if rule == "greedy" else torch.tensor([3, 2**40]),
        impl=impl,
        target=types.SimpleNamespace(model=build("llama", vocab_size=vocab)),
    )
    with torch.no_grad():
        session = LevelSession(ModelForwards(model, told, tree.num_nodes), told, tree, replacement)
    random = torch.Generator().manual_seed(1)
    logits, given = 4 * torch.randn(2, 2 * tree.num_nodes, DRAFTED, generator=random), [0]

    def forward(tokens, *_):
        given.append(given[-1] + tokens.shape[1])
        return logits[:, given[-2] : given[-1]]

    session._forwards._runner.forward = forward
    session.prepare()
    topology_tensors(tree, logits.device)  # made once for each shape
    return session, logits


@pytest.mark.parametrize("tree", [CHAIN, TREE, sdt.Topology.from_paths([(0, 2), (1, 0, 3), (3,)])], ids=repr)
@pytest.mark.parametrize(
    ("rule", "filters", "replacement"),
    [
        ("greedy", "greedy", False),
        ("typical", "filtered", False),
        ("coupled", "temperature", False),
        ("coupled", "filtered", False),
        ("multi_round", "temperature", False),
        ("traversal", "filtered", False),
        ("multi_round", "temperature", True),
        ("multi_round", "filtered", True),
    ],
)
def test_the_tokens_of_each_rule(rule, filters, replacement, tree):
    """Each node's token is the one that a literal statement of the rule chooses from the logits of its parent."""
    session, logits = drafting(rule, filters, tree, replacement)
    drafted, told = session.draft(), session.context
    # the first forward has one token more, to catch up with the text
    inner = sorted(set(tree.parents) - {-1}, key=lambda node: (tree.depths[node], node))
    row_of = {node: 1 + place for place, node in enumerate(inner)}
    drawn = {}
    for node in range(1, tree.num_nodes):
        parent = tree.parents[node]
        row = logits[:, row_of[parent]]
        log_probs = filtered_log_probs(row[:, None], told.filters)[:, 0]
        place = tree.ranks[node]
        if rule == "coupled":
            row = log_probs + noise.gumbel(told.seeds, told.position + tree.depths[node], 0, noise.COUPLED, DRAFTED)
        elif rule in WEIGHING_RULES:
            source = node if replacement else parent
            row = log_probs + noise.gumbel(told.seeds, told.position, source, noise.DRAFT, DRAFTED)
            place = 0 if replacement else drawn.get(parent, 0)
            drawn[parent] = place + 1
        wanted = torch.sort(row, dim=-1, descending=True, stable=True).indices[:, place]
        assert torch.equal(drafted.tokens[:, node], wanted)
    assert drafted.tokens[:, 0].tolist() == [8, 6] and not drafted.has_nan.any()
    assert drafted.sampling == ("none" if rule not in WEIGHING_RULES else "with" if replacement else "without")
    if drafted.sampling != "none":
        for node, row in row_of.items():
            assert torch.equal(drafted.draft_logits[:, drafted.draft_row[0, node]], logits[:, row])


@pytest.mark.parametrize("node", [0, 3])
def test_nan_of_any_level_is_reported_for_its_row_alone(node):
    session, logits = drafting("coupled", "temperature", CHAIN)
    logits[1, 1 + node, 7] = float("nan")
    assert session.draft().has_nan.tolist() == [False, True]


# launches of a draft of 5 and of 7 levels, without those of the model's forwards: two for each level, one more if the
# tree does not expand all candidates, and 7 or 8 for each draft
LAUNCHES = {
    ("greedy", "greedy"): (17, 26),
    ("coupled", "temperature"): (17, 26),
    ("coupled", "filtered"): (17, 26),
    ("rejection", "temperature"): (18, None),
    ("multi_round", "filtered"): (18, 27),
}


@pytest.mark.parametrize(("rule", "filters"), LAUNCHES)
def test_launches(rule, filters):
    for tree, wanted in zip((CHAIN, TREE), LAUNCHES[rule, filters], strict=True):
        if wanted is not None:
            session, _ = drafting(rule, filters, tree, impl="triton")
            session.draft()  # computes tables that later drafts reuse
            launches = Launches()
            launches.run(session.draft)
            assert len(launches.names) == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sdt.PromptLookupDrafter(num_tokens=0), "PromptLookupDrafter: num_tokens must be an integer"),
        (lambda: sdt.PromptLookupDrafter(max_ngram=1.5), "PromptLookupDrafter: max_ngram must be an integer"),
        (lambda: sdt.PromptLookupDrafter(branches=0), "PromptLookupDrafter: branches must be an integer"),
        (lambda: sdt.OracleDrafter(torch.zeros(3)), r"OracleDrafter: text must be \[B, L\]"),
        (lambda: sdt.OracleDrafter(torch.zeros(1, 3), 2.0), "OracleDrafter: error_rate must be 0 to 1"),
        (
            lambda: sdt.OracleDrafter(torch.zeros(2, 3)).start(context([[1]])),
            "OracleDrafter: text must have a row for each of the 1",
        ),
        (
            lambda: sdt.ModelDrafter("model"),
            r"ModelDrafter: model must be a transformers model with generate\(\), got builtins.str",
        ),
        (lambda: sdt.ModelDrafter(build("llama"), 3, 4), "ModelDrafter: give either num_tokens"),
        (lambda: sdt.ModelDrafter(build("llama"), 0), "ModelDrafter: num_tokens must be an integer"),
        (
            lambda: sdt.ModelDrafter(build("llama", vocab_size=4), tree=sdt.Topology.from_widths([5])).start(
                context([[1]], vocab=4)
            ),
            "ModelDrafter: a node of the tree must have at most 4 children",
        ),
        (
            lambda: sdt.patch(build("llama", vocab_size=20), drafter=sdt.ModelDrafter(build("llama"))),
            "ModelDrafter: the draft model must have the target's vocabulary of 20 tokens.*got 61",
        ),
        (lambda: sdt.EarlyExitDrafter(), "EarlyExitDrafter: give either num_layers or skip"),
        (lambda: sdt.EarlyExitDrafter(1, skip=[2]), "EarlyExitDrafter: give either num_layers or skip"),
        (lambda: sdt.EarlyExitDrafter(1.5), "EarlyExitDrafter: num_layers must be an integer, got 1.5"),
        (lambda: sdt.EarlyExitDrafter(skip=5), "EarlyExitDrafter: skip must be a list of layer indices, got 5"),
        (lambda: sdt.EarlyExitDrafter(1, tree=0), "EarlyExitDrafter: tree must be None, a Topology or a number"),
        (lambda: sdt.EarlyExitDrafter(1, replacement="no"), "EarlyExitDrafter: replacement must be True or False"),
        (lambda: sdt.ModelDrafter(build("llama"), tree="x"), "ModelDrafter: tree must be None, a Topology or a number"),
        (lambda: sdt.ModelDrafter(build("llama"), num_tokens=True), "ModelDrafter: num_tokens must be an integer"),
        (lambda: sdt.OracleDrafter(torch.zeros(2, 3), tree=2.5), "OracleDrafter: tree must be None, a Topology"),
        (
            lambda: sdt.patch(build("llama"), drafter=sdt.PromptLookupDrafter(), tree=sdt.Topology.from_widths([2])),
            "PromptLookupDrafter: tree must be None, a number of nodes or a chain",
        ),
        (lambda: sdt.EarlyExitDrafter(skip=["1"]), "EarlyExitDrafter: skip must be a list of layer indices"),
        (lambda: sdt.EarlyExitDrafter(1, num_tokens=3, tree=4), "EarlyExitDrafter: give either num_tokens"),
        (
            lambda: sdt.EarlyExitDrafter(1, confidence_threshold=1.5),
            "EarlyExitDrafter: confidence_threshold must be None or a probability, 0 to 1, got 1.5",
        ),
        (
            lambda: sdt.ModelDrafter(build("llama"), confidence_threshold=True),
            "ModelDrafter: confidence_threshold must be None or a probability, 0 to 1, got True",
        ),
        (
            lambda: sdt.ModelDrafter(build("llama"), confidence_threshold=float("nan")),
            "ModelDrafter: confidence_threshold must be None or a probability, 0 to 1, got nan",
        ),
        (
            lambda: sdt.patch(
                build("llama"), drafter=sdt.ModelDrafter(build("llama"), tree=9, confidence_threshold=0.5)
            ),
            "ModelDrafter: confidence_threshold must be None or 0 with a tree that is not a chain, got 0.5",
        ),
        (
            lambda: sdt.patch(
                build("llama"), drafter=sdt.ModelDrafter(build("llama"), confidence_threshold=0.5), tree="auto"
            ),
            'drafter must be resizable with tree="auto", got ModelDrafter',
        ),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
