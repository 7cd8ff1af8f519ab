"""Sampling with speculation: seeded texts do not depend on the drafter, and rules do not change distributions."""

from dataclasses import replace

import pytest
import torch
import transformers

import specdec_triton as sdt
from checkpoints import write_head
from families import NEVER, PAD, build, perturbed, prompt
from helpers import prepared_processors, record_drafts
from specdec_triton.heads.checkpoint import read_checkpoint
from specdec_triton.heads.eagle import EagleModel
from specdec_triton.ops.rules import CHAIN_RULES, LOSSY_RULES, RULES
from specdec_triton.tools.check_distribution import exact_distribution, prove
from specdec_triton.tools.goodness_of_fit import benjamini_hochberg
from specdec_triton.tree import DraftTree

OPTIONS = {
    "do_sample": True,
    "max_new_tokens": 20,
    "eos_token_id": NEVER,
    "temperature": 0.9,
    "top_k": 24,
    "top_p": 0.95,
}
BUSHY = sdt.Topology.from_widths([3, 2, 1])
FOUR_FAMILIES = ["llama", "gemma2", "mistral_window", "gpt_neox"]


def drafters(family, text):
    """Four drafters for `build(family)`, some much better than others."""
    return [
        sdt.PromptLookupDrafter(branches=2, adaptive=False),
        sdt.ModelDrafter(perturbed(family), tree=BUSHY),
        sdt.EarlyExitDrafter(1, num_tokens=4),
        sdt.OracleDrafter(text, 0.3, tree=9),
    ]


@pytest.mark.parametrize(
    ("family", "penalty"),
    [
        pytest.param(
            family, penalty, marks=[] if family == "llama" or (family, penalty) == ("gemma2", 1.3) else pytest.mark.slow
        )
        for family in FOUR_FAMILIES
        for penalty in (1.0, 1.3)
    ],
)
def test_coupled_text_does_not_depend_on_the_drafter(family, penalty):
    model, inputs = build(family), prompt(batch=3)
    options = {**OPTIONS, "repetition_penalty": penalty}
    text = model.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=11))
    other = model.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=12))
    assert not torch.equal(text, other)
    lengths = []
    for drafter in drafters(family, text):
        with sdt.patched(model, drafter=drafter, seed=11):
            assert torch.equal(model.generate(**inputs, **options), text)
        lengths.append(sdt.stats(model).acceptance_length)
    assert max(lengths) > 1.5 and sdt.stats(model).rule == "coupled" and sdt.stats(model).lossless


def test_coupled_rows_keep_their_texts_when_shuffled_with_their_seeds():
    model, inputs, seeds = build("llama"), prompt(batch=4), [3, 1, 4, 1]
    options = {**OPTIONS, "repetition_penalty": 1.2}
    with sdt.patched(model, drafter=sdt.ModelDrafter(build("llama", seed=5), tree=BUSHY), seed=seeds):
        text = model.generate(**inputs, **options)
    order = [2, 0, 3, 1]
    with sdt.patched(model, drafter=sdt.PromptLookupDrafter(), seed=[seeds[row] for row in order]):
        shuffled = model.generate(**{name: value[order] for name, value in inputs.items()}, **options)
    assert torch.equal(shuffled, text[order])
    # alone, without padding
    with sdt.patched(model, drafter=sdt.EarlyExitDrafter(1), seed=[seeds[0]]):
        alone = model.generate(inputs["input_ids"][:1, 3:], **OPTIONS)
        padded = model.generate(**{name: value[:1] for name, value in inputs.items()}, **OPTIONS)
    assert torch.equal(alone, padded[:, 3:])


def test_a_draft_with_the_targets_noise_is_accepted_more_often():
    """If ranked without the noise, a draft model that equals the target would agree only by chance."""
    model = build("llama")
    with sdt.patched(model, drafter=sdt.ModelDrafter(build("llama"), num_tokens=4), seed=1):
        model.generate(**prompt(), **OPTIONS)
    assert sdt.stats(model).acceptance_length > 4


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in LOSSY_RULES])
def test_a_draft_that_is_the_target_is_always_accepted(rule):
    model = build("llama")
    with sdt.patched(model, drafter=sdt.ModelDrafter(build("llama"), num_tokens=4), rule=rule, seed=1):
        model.generate(**prompt(batch=1), **{**OPTIONS, "max_new_tokens": 21})
    assert sdt.stats(model).acceptance_length == 5


# a vocabulary of a few tokens, so that every text can be counted
SMALL = {"vocab_size": 5, "num_hidden_layers": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
WAYS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "typical_p": {"temperature": 1.2, "typical_p": 0.9},
    "grammar": {"prefix_allowed_tokens_fn": lambda row, text: [int(text[-1]), *{(int(text[-1]) + 2) % 5, 3}]},
}


def small(seed=0):
    model = build("llama", seed=seed, **SMALL)
    return model


def shapes(rule):
    """Drafters for a rule: chains and trees, drawn with and without replacement, and chosen without sampling."""
    draft = small(seed=1)
    made = [sdt.ModelDrafter(draft, num_tokens=2), sdt.EarlyExitDrafter(1, num_tokens=3), sdt.PromptLookupDrafter(3)]
    if rule not in CHAIN_RULES:
        tree = sdt.Topology.from_widths([2, 2])
        made += [
            sdt.ModelDrafter(draft, tree=tree),
            sdt.ModelDrafter(draft, tree=tree, replacement=True),
            sdt.EarlyExitDrafter(1, tree=tree),
            sdt.PromptLookupDrafter(3, branches=2, adaptive=False),
        ]
    return made


def assert_lossless(ways, rules, samples, tokens, pick):
    model, input_ids, cells = small(), torch.tensor([[3, 4, 1, 2, 3, 4]]), {}
    for way in ways:
        options = {"top_k": 0, **WAYS[way]}
        exact = exact_distribution(model, input_ids, tokens, **options)
        for rule in rules:
            for place, drafter in enumerate(pick(shapes(rule))):
                found = prove(
                    model,
                    drafter,
                    rule,
                    input_ids,
                    tokens=tokens,
                    samples=samples,
                    rows=samples,
                    exact=exact,
                    **options,
                )
                cells[way, rule, type(drafter).__name__, place] = found
    rejected = benjamini_hochberg([found.cell.p_value for found in cells.values()], 0.01)
    wrong = [cell for cell, bad in zip(cells, rejected, strict=True) if bad]
    wrong += [cell for cell, found in cells.items() if found.cell.distance > found.null[1] * 1.15]
    assert not wrong, {cell: cells[cell] for cell in wrong}
    assert all(found.acceptance_length > 1 for cell, found in cells.items() if "Lookup" not in cell[2])


LOSSLESS = [rule for rule in RULES if rule not in LOSSY_RULES]


@pytest.mark.parametrize(
    ("rule", "way"),
    [
        pytest.param(rule, way, marks=[] if (first + second) % 2 else pytest.mark.slow)
        for first, rule in enumerate(LOSSLESS)
        # a chain is also a tree
        for second, way in enumerate(("all", "plain" if rule in CHAIN_RULES else "repetition_penalty"))
    ],
)
def test_generate_keeps_the_distribution(rule, way):
    assert_lossless([way], [rule], 1500, 3, lambda made: made[::3])


@pytest.fixture(scope="module")
def with_head(tmp_path_factory):
    """A target of 5 tokens, and an EAGLE-3 head that can name 3 of them."""
    target = build("llama", **{**SMALL, "num_hidden_layers": 8})
    head = read_checkpoint(write_head(tmp_path_factory.mktemp("head"), target, "specforge_model").folder)
    rows = head.tensors["lm_head.weight"][[1, 3, 4]]
    tensors = {**head.tensors, "lm_head.weight": rows, "d2t": torch.tensor([1, 2, 2])}
    return target, EagleModel.from_checkpoint(replace(head, tensors=tensors))


HEAD_SHAPES = {
    "coupled": [{"num_tokens": 2}, {"tree": sdt.DynamicTree(6, 3, 2)}],
    "rejection": [{"num_tokens": 2}],
    "block": [{"num_tokens": 2}],
    "multi_round": [{"tree": sdt.Topology.from_widths([2, 2])}, {"tree": sdt.DynamicTree(6, 3, 2)}],
    "traversal": [{"tree": sdt.Topology.from_widths([3, 1]), "replacement": True}],
}


@pytest.mark.parametrize("rule", LOSSLESS)
def test_a_reduced_vocabulary_keeps_the_distribution(rule, with_head):
    """The head never drafts two of the target's five tokens. They come from the residual alone."""
    target, head = with_head
    input_ids, options = torch.tensor([[3, 4, 1, 2, 3, 4]]), {"top_k": 0, "temperature": 1.3}
    exact = exact_distribution(target, input_ids, 3, **options)
    for shape in HEAD_SHAPES[rule]:
        drafter = sdt.EagleDrafter(head, **shape)
        found = prove(target, drafter, rule, input_ids, samples=2000, rows=2000, exact=exact, **options)
        assert found.agrees and found.is_conclusive, found


def test_draft_probabilities_of_other_tokens_are_caught(with_head, monkeypatch):
    """The distribution differs if the probabilities of draft tokens are those of other tokens."""
    honest = DraftTree.drawn

    def wrong(tree, sampling, draft_logits, *rest):
        return honest(tree, sampling, draft_logits.roll(1, -1), *rest)

    monkeypatch.setattr(DraftTree, "drawn", wrong)
    target, head = with_head
    input_ids, options = torch.tensor([[3, 4, 1, 2, 3, 4]]), {"top_k": 0, "temperature": 1.3}
    drafter = sdt.EagleDrafter(head, num_tokens=2)
    found = prove(target, drafter, "rejection", input_ids, samples=2000, rows=2000, **options)
    assert not found.agrees and found.cell.p_value < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("rule", LOSSLESS)
def test_generate_keeps_the_distribution_at_length(rule):
    assert_lossless(WAYS, [rule], 12_000, 4, lambda made: made)


def test_typical_does_not():
    model, input_ids = small(), torch.tensor([[3, 4, 1, 2, 3, 4]])
    found = prove(model, sdt.ModelDrafter(small(seed=1), num_tokens=2), "typical", input_ids, samples=1500, rows=1500)
    assert not found.agrees and found.cell.p_value < 1e-6
    assert not sdt.stats(model).lossless


@pytest.mark.parametrize("rule", ["coupled", pytest.param("multi_round", marks=pytest.mark.slow)])
def test_a_penalty_blind_to_ancestors_is_caught(rule, monkeypatch):
    """The test must detect a wrong penalty: every node is penalised like the root."""
    honest = sdt.engine.scores.process_nodes

    def blind(processors, tree, *rest):
        return honest(processors, replace(tree, ancestors=torch.zeros_like(tree.ancestors)), *rest)

    monkeypatch.setattr(sdt.engine.scores, "process_nodes", blind)
    model, input_ids = small(), torch.tensor([[3, 3]])
    drafter = sdt.ModelDrafter(small(), num_tokens=3)
    found = prove(model, drafter, rule, input_ids, samples=1500, rows=1500, tokens=4, repetition_penalty=3.0, top_k=0)
    assert not found.agrees and found.cell.p_value < 1e-6


def test_seeds():
    model, inputs = build("llama"), prompt(batch=1)
    inputs = {name: value.expand(2, -1) for name, value in inputs.items()}

    def text(seed):
        return model.generate(**inputs, **OPTIONS, custom_generate=sdt.SpeculativeGenerate(seed=seed))

    assert torch.equal(text(3), text(3)) and not torch.equal(text(3), text(4))
    assert not torch.equal(*text(3)) and torch.equal(*text([9, 9]))
    torch.manual_seed(0)
    first, second = text(None), text(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(text(None), first)
    with pytest.raises(
        ValueError, match="generate: seed must be a number or a list with one for each of the 2 rows.*got 3"
    ):
        text([1, 2, 3])
    assert torch.equal(text([-(2**63), 2**63 - 1]), text([-(2**63), 2**63 - 1]))


def test_return_sequences():
    model, inputs = build("llama"), prompt()
    options = {**OPTIONS, "num_return_sequences": 3}
    with sdt.patched(model, seed=5):
        text = model.generate(**inputs, **options, assistant_model=build("llama", seed=1))
        assert text.shape[0] == 6 and len({tuple(row) for row in text.tolist()}) == 6
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), text)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, marks=[] if rule in ("coupled", "rejection", "typical") else pytest.mark.slow)
        for rule in RULES
    ],
)
def test_transformers_own_arguments(rule):
    model, draft, inputs = build("llama"), perturbed("llama"), prompt()
    with sdt.patched(model, rule=rule, seed=0):
        for assistance in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 1}):
            model.generate(**inputs, **OPTIONS, **assistance)
            assert sdt.stats(model).rule == rule and sdt.stats(model).lossless == (rule != "typical")
            model.generate(**inputs, **{**OPTIONS, "do_sample": False}, **assistance)
            assert sdt.stats(model).rule == "greedy"


@pytest.mark.parametrize("rule", ["coupled", "traversal"])
def test_scores_are_those_that_were_sampled_from(rule):
    model, inputs = build("llama"), prompt()
    options = {**OPTIONS, "repetition_penalty": 1.2, "min_p": 0.02}
    options |= {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    with sdt.patched(model, drafter=sdt.ModelDrafter(build("llama", seed=1), tree=BUSHY), rule=rule, seed=2):
        ours = model.generate(**inputs, **options)
    wanted = prepared_processors(model, inputs, options)
    for place, (scores, logits) in enumerate(zip(ours.scores, ours.logits, strict=True)):
        text = ours.sequences[:, : inputs["input_ids"].shape[1] + place]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, place), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        plain = model(text, attention_mask=mask, position_ids=positions).logits[:, -1]
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(scores, wanted(text, logits.clone()), rtol=1e-5, atol=1e-5)
        chosen = ours.sequences[:, inputs["input_ids"].shape[1] + place]
        assert scores.gather(1, chosen[:, None]).isfinite().all()


def test_the_end_of_a_text_and_criteria():
    model, inputs = build("llama"), prompt(batch=3)
    options = {**OPTIONS, "eos_token_id": list(range(3, 12)), "pad_token_id": PAD, "min_new_tokens": 3}
    text = model.generate(**inputs, **options, custom_generate=sdt.SpeculativeGenerate(seed=1))
    assert (text[:, 9:] == PAD).any()
    stop = {"stopping_criteria": [lambda ids, scores, **kwargs: ids[:, -1] % 5 == 0]}
    stopped = model.generate(**inputs, **options, **stop, custom_generate=sdt.SpeculativeGenerate(seed=1))
    for drafter in drafters("llama", text):
        with sdt.patched(model, drafter=drafter, seed=1):
            assert torch.equal(model.generate(**inputs, **options), text)
            assert torch.equal(model.generate(**inputs, **options, **stop), stopped)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"rule": "nonsense"}, {}, "rule must be None, greedy or one of coupled, .*got 'nonsense'"),
        ({"rule": "greedy"}, {}, 'rule must be None or a sampling rule with do_sample=True, got "greedy"'),
        ({"seed": 2**64}, {}, "seed must be None, a 64-bit integer or a list of them"),
        ({"seed": "one"}, {}, "seed must be None, a 64-bit integer or a list of them"),
        ({}, {"temperature": 1e-40}, "temperature must be at least 1e-20 with speculative decoding, got 1e-40"),
        ({"rule": "block", "tree": BUSHY}, {}, 'rule "block" needs a chain, got a tree drawn without replacement'),
        ({"rule": "rejection", "lookup": 2}, {}, 'PromptLookupDrafter: rule "rejection" needs a chain'),
    ],
)
def test_refusals(options, call, message):
    model = build("llama")
    branches = options.pop("lookup", None)
    drafter = sdt.PromptLookupDrafter(branches=2) if branches else sdt.ModelDrafter(build("llama", seed=1))
    with pytest.raises(ValueError, match=message), sdt.patched(model, drafter=drafter, **options):
        model.generate(**prompt(), **{**OPTIONS, **call})
    assert type(model) is transformers.LlamaForCausalLM


def test_a_budget_of_nodes_is_a_chain_if_the_rule_takes_no_other(monkeypatch):
    model, drafts = build("llama"), record_drafts(monkeypatch)
    for rule in RULES:
        drafts.clear()
        with sdt.patched(model, drafter=sdt.ModelDrafter(build("llama", seed=1)), tree=9, rule=rule):
            model.generate(**prompt(), **{**OPTIONS, "max_new_tokens": 4})
        assert drafts[0][-1].is_chain == (rule in CHAIN_RULES)


def test_an_illegal_tree_of_a_drafter_of_ones_own():
    class Own(sdt.Drafter):
        def start(self, context, tree=None):
            return OwnSession(context)

    class OwnSession(sdt.DraftSession):
        max_nodes, max_depth = 3, 1

        def __init__(self, context):
            self.context = context

        def draft(self):
            root = self.context.root[:, None]
            return sdt.DraftTree.from_topology(sdt.Topology.from_widths([2]), root.repeat(1, 3))

    model = build("llama")
    for rule in RULES:
        with sdt.patched(model, drafter=Own(), rule=rule):
            if rule in CHAIN_RULES:
                with pytest.raises(ValueError, match=f'Own: rule "{rule}" needs a chain, got a tree of tokens chosen'):
                    model.generate(**prompt(), **OPTIONS)
            else:
                model.generate(**prompt(), **OPTIONS)
                assert sdt.stats(model).rule == rule and sdt.stats(model).drafted
