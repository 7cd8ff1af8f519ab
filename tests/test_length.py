"""The length of drafted chains: it follows the draft's generation config as in transformers, and does not bias the
text."""

import numpy as np
import pytest
import torch

import specdec_triton as sdt
from families import NEVER, VOCAB, build, perturbed, prompt
from helpers import capture_here, context, record_drafts
from specdec_triton import ops
from specdec_triton.drafters.length import ChainLength, LengthRule, in_steps
from specdec_triton.drafters.level_session import LevelSession
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.tools.check_distribution import prove
from specdec_triton.tree import DraftTree

GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}


@pytest.fixture(params=["", "captured"])
def captured(request, monkeypatch):
    """Rounds as on a CPU, and as on a GPU, with captured rounds and late reports."""
    if request.param:
        capture_here(monkeypatch, 1)
    return bool(request.param)


def assisted(target, draft, **options):
    """The text, and the number of forwards of the draft model."""
    calls = []
    hook = draft.register_forward_pre_hook(lambda *_: calls.append(1))
    text = target.generate(**prompt(batch=1), **GREEDY, assistant_model=draft, **options)
    hook.remove()
    return text, len(calls)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"assistant_confidence_threshold": 0.7},
        {"assistant_confidence_threshold": 0.95},
        {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0},
        {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0, "num_assistant_tokens_schedule": "heuristic"},
        {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic"},
        {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic_transient"},
    ],
    ids=str,
)
def test_a_draft_runs_about_as_often_as_in_transformers(asked, captured):
    """The schedule also leaves the same number in the config, or none. (transformers has an additional first round,
    which may change the bound by one step of at most 2.)"""
    target = build("llama", num_hidden_layers=3)
    draft = perturbed("llama", 0.1, num_hidden_layers=3)
    for name, value in asked.items():
        setattr(draft.generation_config, name, value)
    text, theirs = assisted(target, draft)
    left = draft.generation_config.num_assistant_tokens
    draft.generation_config.num_assistant_tokens = before = asked.get("num_assistant_tokens")
    with sdt.patched(target):
        again, ours = assisted(target, draft)
    assert torch.equal(text, again)
    assert ours <= (1.5 if captured else 1.15) * theirs + 1
    kept = draft.generation_config.num_assistant_tokens
    if asked.get("num_assistant_tokens_schedule") != "heuristic":
        assert kept == left == before
    elif not captured:  # with captured rounds, levels that were not drafted are not accepted
        assert kept != before and abs(kept - left) <= 2


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed"])
@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection", "block"])
def test_each_row_stops_after_its_first_unlikely_token(rule, fixed, monkeypatch):
    target, stop = build("llama"), 0.25
    draft, rounds = perturbed("llama", 0.05), record_drafts(monkeypatch)
    prepare = LevelSession.prepare

    def preparing(session, tree=None):
        assert session.on_device == fixed
        return prepare(session, tree)

    monkeypatch.setattr(LevelSession, "prepare", preparing)
    if fixed:
        monkeypatch.setattr(Fixed, "on", True)
    drafter = Fixed(draft, num_tokens=6, confidence_threshold=stop)
    with sdt.patched(target, drafter=drafter, seed=3, rule=None if rule == "greedy" else rule):
        target.generate(**prompt(), **(GREEDY if rule == "greedy" else SAMPLED))
    stats = sdt.stats(target)
    filters = Filters() if rule == "greedy" else Filters(torch.tensor([0.8]), torch.tensor([20]))
    lengths, drafted = set(), 0
    for tokens, length, budget, proposed in rounds:
        root = torch.from_numpy(tokens[np.arange(2), length])
        proposed.check(root, VOCAB, "ModelDrafter")
        for row, start in ((0, 3), (1, 0)):
            if not budget[row]:
                continue
            chain = proposed.tokens[row, 1 : 1 + int((proposed.parents[row] >= 0).sum())]
            drafted += len(chain)
            if budget[row] <= 6:
                continue  # nodes that are too deep to be emitted have no position of their own
            text = torch.cat([torch.from_numpy(tokens[row, start : length[row] + 1]), chain])
            logits = draft(text[None]).logits[:, -len(chain) - 1 : -1].detach()
            chance = filtered_log_probs(logits, filters)[0].gather(1, chain[:, None]).exp().squeeze(1)
            assert (chance[:-1] >= stop - 1e-4).all()
            if not fixed:  # with captured rounds, each row has its own limit, too
                assert len(chain) == 6 or chance[-1] < stop + 1e-4
            lengths.add(len(chain))
    assert drafted == stats.drafted and len(lengths) > 1


class Fixed(sdt.ModelDrafter):
    on = False

    def start(self, now, tree=None):
        now.fixed_shapes = self.on
        return super().start(now, tree)


@pytest.mark.parametrize(
    ("rule", "captured"),
    [
        ("rejection", "captured"),
        ("block", ""),
        ("multi_round", ""),
        *(pytest.param(rule, "captured", marks=pytest.mark.slow) for rule in ("block", "multi_round")),
    ],
    indirect=["captured"],
)
def test_the_stop_does_not_bias(rule, captured):
    options = {"vocab_size": 5, "num_hidden_layers": 1}
    model = build("llama", **options)
    drafter = sdt.ModelDrafter(build("llama", seed=1, **options), num_tokens=3, confidence_threshold=0.35)
    found = prove(model, drafter, rule, torch.tensor([[3, 4, 1]]), tokens=3, samples=2000, rows=2000)
    assert found.agrees and found.acceptance_length > 1.2


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_the_kernel_takes_chains_of_each_rows_own_length(rule):
    batch, nodes, vocab = 5, 5, 11
    random = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=random)
    length = torch.arange(batch) % nodes
    place = torch.arange(nodes)
    tree = DraftTree.chain(tokens, length)
    tree.check(tokens[:, 0], vocab, "test")
    assert torch.equal(tree.parents, torch.where(place <= length[:, None], place - 1, -1).int())
    row = torch.where(place < length[:, None], place, -1).int()
    drawn = tree.drawn("without", torch.randn(batch, nodes - 1, vocab, generator=random), row)
    logits = torch.randn(batch, nodes, vocab, generator=random)
    found = [
        ops.accept_sample(
            logits,
            tokens,
            tree.parents,
            rule=rule,
            seeds=torch.arange(batch),
            position=torch.full((batch,), 7),
            filters=Filters(),
            sampling=drawn.sampling,
            draft_logits=drawn.draft_logits,
            draft_row=drawn.draft_row,
            max_depth=nodes - 1,
            impl=impl,
        )
        for impl in ("reference", "triton")
    ]
    for name in ("path", "length", "next_ids"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert (found[0].length <= length).all() and found[0].length.max() > 0


def test_shapes_that_were_asked_for_are_not_cut(monkeypatch):
    """The first round is enough to see it; the text ends soon after."""

    def stop(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] > 10)

    target, rounds = build("llama"), record_drafts(monkeypatch)
    draft, chain = perturbed("llama", 0.5), sdt.Topology.chain(5)
    for model in (target, draft):
        model.generation_config.num_assistant_tokens = 8
        model.generation_config.assistant_confidence_threshold = 0.9
    for drafter, tree, whole in (
        (sdt.ModelDrafter(draft, num_tokens=5), None, True),
        (sdt.ModelDrafter(draft, tree=chain), None, True),
        (sdt.ModelDrafter(draft), chain, True),
        (sdt.ModelDrafter(draft, confidence_threshold=0.0), None, True),
        (sdt.ModelDrafter(draft, num_tokens=5, confidence_threshold=0.9), None, False),
        (sdt.ModelDrafter(draft, confidence_threshold=0.9), chain, False),
        (sdt.ModelDrafter(draft), None, False),
        (sdt.EarlyExitDrafter(1), None, False),
    ):
        rounds.clear()
        with sdt.patched(target, drafter=drafter, tree=tree):
            target.generate(**prompt(), **{**GREEDY, "max_new_tokens": 12}, stopping_criteria=[stop])
        _, _, budget, proposed = rounds[0]
        drafted = (proposed.parents >= 0).sum(1)
        assert budget.max() > 8
        assert (drafted == (5 if drafter.num_tokens or drafter.tree or tree else 8)).all() == whole


def test_nothing_is_drafted_after_an_end(monkeypatch):
    target, rounds = build("llama"), record_drafts(monkeypatch)
    plain = target.generate(**prompt(batch=1), **GREEDY)
    end = int(plain[0, -20])
    target.generation_config.assistant_confidence_threshold = 1e-9
    with sdt.patched(target, drafter=sdt.ModelDrafter(target)):
        target.generate(**prompt(batch=1), **{**GREEDY, "eos_token_id": end})
    last = rounds[-1][3].tokens[0, 1:].tolist()
    assert last.index(end) == len(last) - 1


def test_the_number_of_tokens_may_be_none_and_must_be_a_number():
    target, draft = build("llama"), build("llama")
    for tokens, drafted in ((0, False), (2.0, True)):
        draft.generation_config.num_assistant_tokens = tokens
        with sdt.patched(target):
            target.generate(**prompt(), **GREEDY, assistant_model=draft)
        assert (sdt.stats(target).drafted > 0) == drafted
    for tokens in (-1, "five", True, float("nan")):
        draft.generation_config.num_assistant_tokens = tokens
        with pytest.raises(
            ValueError, match="ModelDrafter: num_assistant_tokens of the draft's generation_config must"
        ):
            sdt.patch(target, drafter=sdt.ModelDrafter(draft))


def test_the_default_bound_is_5_and_a_set_number_is_used(monkeypatch):
    """The target is its own draft, so each draft is accepted and no token has a low probability."""
    target, rounds = build("llama"), record_drafts(monkeypatch)
    target.generation_config.assistant_confidence_threshold = 0.0
    for tokens, deepest in ((None, 5), (9, 9)):
        target.generation_config.num_assistant_tokens = tokens
        for drafter in (None, sdt.ModelDrafter(target)):
            rounds.clear()
            asked = {} if drafter else {"assistant_model": target}
            with sdt.patched(target, drafter=drafter):
                target.generate(**prompt(batch=1), **GREEDY, **asked)
            assert max(proposed.max_depth for *_, proposed in rounds) == deepest


def test_the_bound_of_each_row_moves_with_its_luck():
    config = build("llama").generation_config
    config.num_assistant_tokens_schedule = "heuristic"
    now = context([[1], [2], [3]], budget=40)
    length = ChainLength(now, LengthRule(5, 0.0, config))
    assert (length.next_round(), length.limit.tolist()) == (5, [5, 5, 5])
    length.observe_on_host([5, 5, 2], [6, 3, 3])  # full length, not full length, and full length of a shorter draft
    assert (length.next_round(), length.limit.tolist()) == (7, [7, 4, 7])
    now.host_budget[:] = 4, 20, 0
    length.observe_on_host([7, 4, 0], [1, 1, 0])
    assert (length.next_round(), length.limit.tolist()) == (3, [3, 3, 0])
    now.host_budget[:] = 0
    assert config.num_assistant_tokens is None
    length.observe_on_host([3, 3, 0], [4, 1, 0])
    assert config.num_assistant_tokens == (8 + 2 + 7) // 3


def test_captured_rounds_have_few_lengths_and_follow_late_reports():
    now = context([[1]], budget=40)
    now.fixed_shapes = True
    length = ChainLength(now, LengthRule(20, 0.4))
    assert length.longest == 20 and not length.looks
    levels, on_its_way = [], []
    for number in range(60):
        levels.append(length.next_round())
        on_its_way.append(int(length.limit))
        if len(on_its_way) > 1:  # read one round late
            limit = on_its_way.pop(0)
            # a draft that is certain and right, then one that is uncertain
            length.observe_on_host(*(([limit], [limit + 1]) if number < 30 else ([1], [1])))
    assert levels[0] == 4 and levels[29] == 20 and levels[-1] == 1
    assert set(levels) <= {in_steps(step, 20) for step in range(1, 99)} == {1, 2, 4, 8, 16, 20}


def test_a_row_stops_at_its_own_limit_though_another_goes_on():
    now = context([[1], [2], [3]], budget=40)
    now.host_budget[:] = 2, 4, 40
    length = ChainLength(now, LengthRule(5, 0.5))
    assert length.next_round() == 5 and length.limit.tolist() == [1, 3, 5]
    going, tokens, sure = length.going(), torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 0.5, 0.9])
    seen = []
    for depth in range(1, 6):
        going = length.goes_on(going, depth, tokens, sure)
        seen.append(going.tolist())
    assert seen == [[False, True, True]] * 2 + [[False, False, True]] * 2 + [[False] * 3]


def test_logits_of_a_stopped_row_are_not_checked():
    """The row is fed through the levels that other rows need, with tokens that are not part of its draft."""
    model, inputs = build("llama"), prompt(padding=0)
    options = {"do_sample": False, "max_new_tokens": 12}
    text = model.generate(**inputs, **options, eos_token_id=NEVER)[:, inputs["input_ids"].shape[1] :]
    end = next(int(token) for token in text[0, 2:] if token not in text[1] and token not in inputs["input_ids"])
    draft = build("llama")
    draft.generation_config.assistant_confidence_threshold = 1e-6
    with torch.no_grad():
        draft.get_input_embeddings().weight[end] = float("nan")
    plain = model.generate(**inputs, **options, eos_token_id=end, pad_token_id=0)
    with sdt.patched(model):
        ours = model.generate(**inputs, **options, eos_token_id=end, pad_token_id=0, assistant_model=draft)
    assert torch.equal(ours, plain)
