"""Dynamic trees: their nodes, and the independence of the text from their shape."""

import numpy as np
import pytest
import torch

import specdec_triton as sdt
from families import NEVER, VOCAB, build, perturbed, prompt
from helpers import capture_here, context
from specdec_triton.drafters import dynamic
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.noise import COUPLED, gumbel, row_seeds
from specdec_triton.tools.check_distribution import prove
from specdec_triton.tools.host_sync import count_host_reads

TREE = sdt.DynamicTree(12, width=3, depth=4)
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}


def made_by_hand(draft, text, tree, levels, score):
    """Paths of tokens with their scores, expanded as in EAGLE-2, with one forward without a cache for every node."""
    found, level = {(): 0.0}, [()]
    for depth in range(1, levels + 1):
        children = {}
        for path in level:
            scores = score(draft(torch.tensor([[*text, *path]])).logits[0, -1].detach(), depth)
            for token in scores.argsort(descending=True)[: tree.width].tolist():
                children[(*path, token)] = found[path] + float(scores[token])
        found |= children
        level = sorted(children, key=children.get, reverse=True)[: tree.width]
    return found


# the trees that a call asks for in its rounds, in order
SHRINKING = [None, sdt.Topology.from_budget(6), sdt.Topology.chain(0), sdt.Topology.chain(0)]


@pytest.mark.parametrize(
    ("tree", "asked", "rule", "fixed"),
    [
        pytest.param(*cell, fixed, marks=[] if fixed in quick else pytest.mark.slow, id=f"{cell[0]}-{cell[2]}-{fixed}")
        for *cell, quick in (
            (TREE, [None], "greedy", (True, False)),
            (TREE, [None], "coupled", (False,)),
            (TREE, [None], "multi_round", (True,)),
            (TREE, SHRINKING, "greedy", (True,)),
            (sdt.DynamicTree(5, width=1, depth=4), [None], "greedy", (False,)),
            # gives forwards over more than 64 nodes
            (sdt.DynamicTree(67, width=6, depth=13), [None], "greedy", (True,)),
        )
        for fixed in (True, False)
    ],
)
def test_the_likeliest_nodes_are_kept(tree, asked, rule, fixed, monkeypatch):
    """The draft's cache is also correct after every round, whatever was accepted: drafts are compared with forwards
    over the whole text. Nothing is read on the host, and tensors keep their addresses."""
    target, rounds, addresses = build("llama"), [], set()
    draft = perturbed("llama", 0.03)  # so that long paths are accepted
    prepare, propose, observe = (getattr(dynamic.DynamicSession, name) for name in ("prepare", "draft", "observe"))

    def preparing(session, _=None):
        session.context.fixed_shapes = fixed
        session.shape = prepare(session, asked[len(rounds) % len(asked)])
        return session.shape

    def proposing(session):
        with count_host_reads() as reads:
            proposed = propose(session)
        assert not reads.total
        now = session.context
        rounds.append((now.host_tokens.copy(), now.host_length.copy(), now.host_budget.copy(), session.shape, proposed))
        return proposed

    def observing(session, *seen):
        with count_host_reads() as reads:
            observe(session, *seen)
        assert not reads.total
        addresses.add((session._slots.data_ptr(), session._forwards._runner.cache.storage.data_ptr()))

    for name, method in (("prepare", preparing), ("draft", proposing), ("observe", observing)):
        monkeypatch.setattr(dynamic.DynamicSession, name, method)
    with sdt.patched(target, drafter=sdt.ModelDrafter(draft, tree=tree), seed=5, rule=rule):
        target.generate(**prompt(), **(GREEDY if rule == "greedy" else SAMPLED))
    assert sdt.stats(target).accepted > 9 and len(addresses) == 1
    seeds = row_seeds(5, 2)
    filters = Filters() if rule == "greedy" else Filters(torch.tensor([0.8]), torch.tensor([20]))
    compared = 0
    for tokens, length, budget, (levels, kept, _), proposed in rounds[:6]:
        root = torch.from_numpy(tokens[np.arange(2), length])
        proposed.check(root, VOCAB, "ModelDrafter")
        assert (proposed.num_nodes, proposed.sampling) == (kept, "none")
        for row, start in ((0, 3), (1, 0)):
            if budget[row] <= levels:
                continue  # nodes that are too deep to be emitted have no position of their own
            compared += 1

            def score(logits, depth, row=row, position=length[row] - start):
                log_probs = filtered_log_probs(logits[None, None], filters)[0, 0]
                if rule != "coupled":
                    return log_probs
                noise = gumbel(seeds[row], int(position) + depth, 0, COUPLED, VOCAB)
                return (log_probs + noise).log_softmax(-1)

            found = made_by_hand(draft, tokens[row, start : length[row] + 1], tree, levels, score)
            paths = [()]
            for node in range(1, kept):
                paths.append((*paths[proposed.parents[row, node]], int(proposed.tokens[row, node])))
            assert len(set(paths)) == kept
            best = sorted(found.values(), reverse=True)[:kept]
            assert sorted((found[path] for path in paths), reverse=True) == pytest.approx(best, abs=1e-3)
    assert compared > 2
    if fixed and asked == [None]:
        assert {proposed.num_nodes for *_, proposed in rounds} == {tree.num_nodes}


def test_the_text_is_the_targets():
    target, inputs = build("llama"), prompt(batch=3)
    greedy, sampled = ({**options, "max_new_tokens": 16} for options in (GREEDY, SAMPLED))
    plain = target.generate(**inputs, **greedy)
    text = target.generate(**inputs, **sampled, custom_generate=sdt.SpeculativeGenerate(seed=1))
    shapes = TREE, sdt.DynamicTree(40, width=5, depth=6), sdt.DynamicTree(1, width=2, depth=2)
    drafters = [sdt.ModelDrafter(perturbed("llama", 0.2), tree=shape) for shape in shapes]
    drafters += [sdt.EarlyExitDrafter(1, tree=TREE), sdt.EarlyExitDrafter(skip=[1], tree=TREE)]
    for drafter in drafters:
        with sdt.patched(target, drafter=drafter, seed=1):
            assert torch.equal(target.generate(**inputs, **greedy), plain)
            assert torch.equal(target.generate(**inputs, **sampled), text)
    with sdt.patched(target, tree=TREE):
        assert torch.equal(target.generate(**inputs, **greedy, assistant_model=perturbed("llama", 0.2)), plain)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "coupled"])
def test_a_draft_that_is_the_target_is_accepted(options):
    """The draft uses its own cache or the target's."""
    target = build("llama")
    for drafter in (sdt.ModelDrafter(build("llama"), tree=TREE), sdt.EarlyExitDrafter(2, tree=TREE)):
        with sdt.patched(target, drafter=drafter, seed=1):
            target.generate(**prompt(), **options)
        assert sdt.stats(target).acceptance_length > 3.3  # at most 5, because the tree is cut to its most likely nodes


@pytest.mark.parametrize(
    ("options", "lag"),
    [
        pytest.param(GREEDY, 1, id="greedy-late"),
        pytest.param(SAMPLED, 0, id="coupled-at once"),
        pytest.param(GREEDY, 0, marks=pytest.mark.slow, id="greedy-at once"),
        pytest.param(SAMPLED, 1, marks=pytest.mark.slow, id="coupled-late"),
    ],
)
def test_captured_rounds_draft_the_same(options, lag, monkeypatch):
    """In captured rounds the draft still follows the text: it equals the target and is accepted as often."""
    target = build("llama")
    for drafter in (sdt.ModelDrafter(build("llama"), tree=TREE), sdt.EarlyExitDrafter(2, tree=TREE)):
        with sdt.patched(target, drafter=drafter, seed=1, cuda_graphs=False):
            text = target.generate(**prompt(), **options)
        with monkeypatch.context() as patches, sdt.patched(target, drafter=drafter, seed=1):
            capture_here(patches, lag)
            assert torch.equal(target.generate(**prompt(), **options), text)
        stats = sdt.stats(target)
        assert stats.captured == 2 and stats.replayed > 5 and stats.acceptance_length > 3.3


def test_more_is_accepted_than_of_a_fixed_tree_of_as_many_nodes():
    target, lengths = build("llama"), []
    draft = perturbed("llama", 0.2)
    for tree in (TREE, TREE.num_nodes, sdt.Topology.chain(TREE.num_nodes - 1)):
        with sdt.patched(target, drafter=sdt.ModelDrafter(draft, tree=tree)):
            target.generate(**prompt(batch=8), **{**GREEDY, "max_new_tokens": 40})
        lengths.append(sdt.stats(target).acceptance_length)
    assert lengths[0] == max(lengths) > 1.3


@pytest.mark.parametrize("rule", ["multi_round", "traversal"])
def test_rules_that_weigh_tokens_keep_the_distribution(rule):
    options = {"vocab_size": 5, "num_hidden_layers": 1}
    model = build("llama", **options)
    drafter = sdt.ModelDrafter(build("llama", seed=1, **options), tree=sdt.DynamicTree(5, width=2, depth=2))
    found = prove(model, drafter, rule, torch.tensor([[3, 4, 1]]), samples=1500, rows=1500, temperature=1.2)
    assert found.agrees and found.acceptance_length > 1


def test_a_nan_of_the_draft_is_an_error_that_names_the_row():
    target, draft = build("llama"), build("llama")
    with torch.no_grad():
        draft.lm_head.weight[7] = float("nan")
    with (
        sdt.patched(target, drafter=sdt.ModelDrafter(draft, tree=TREE)),
        pytest.raises(RuntimeError, match="ModelDrafter: the draft's logits must be finite numbers.*in row 0 of 2"),
    ):
        target.generate(**prompt(), **GREEDY)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: sdt.patch(build("llama"), drafter=sdt.PromptLookupDrafter(branches=2), tree=TREE),
            "PromptLookupDrafter: tree must not be a DynamicTree",
        ),
        (lambda: sdt.OracleDrafter(torch.zeros(1, 3), tree=TREE), "OracleDrafter: tree must not be a DynamicTree"),
        (
            lambda: sdt.patch(build("llama"), drafter=sdt.OracleDrafter(torch.zeros(1, 3)), tree=TREE),
            "OracleDrafter: tree must not be a DynamicTree",
        ),
        (
            lambda: sdt.patch(build("llama"), drafter=sdt.ModelDrafter(build("llama"), tree=TREE), rule="block"),
            'ModelDrafter: rule "block" needs a chain, got a tree of tokens chosen without sampling',
        ),
        (
            lambda: sdt.ModelDrafter(build("llama", vocab_size=4), tree=sdt.DynamicTree(3, 5, 1)).start(
                context([[1]], vocab=4)
            ),
            "ModelDrafter: a node of the tree must have at most 4 children, the size of the vocabulary, got 5",
        ),
        (lambda: sdt.ModelDrafter(build("llama"), tree="dynamic"), "tree must be None, a Topology or a number of.*Dyn"),
    ],
)
def test_drafters_that_cannot_draft_them(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()
