"""Drafters alone: what they propose."""

import gc
import weakref

import numpy as np
import pytest
import torch
import transformers

import specdec_triton as sdt
from families import NEVER, build, prompt
from specdec_triton.drafters import DraftContext
from specdec_triton.drafters.model_session import ModelSession
from specdec_triton.drafters.prompt_lookup import _matches
from specdec_triton.forward.wrappers import embedded_tokens
from specdec_triton.ops.reference import Acceptance
from specdec_triton.tools.host_sync import count_host_reads
from test_patch import snapshot


def context(rows, start=0, budget=20, vocab=100, max_length=64):
    """Texts of one batch, left-aligned from `start`."""
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


def test_matches_are_the_longest_first_then_the_earliest():
    text = np.array([1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 7, 1, 2, 3])
    assert _matches(text, 3, 9) == ([2, 9, 5], 3)
    assert _matches(text, 2, 9) == ([2, 5, 9], 2)
    assert _matches(text, 1, 2) == ([2, 5], 1)
    assert _matches(np.array([4]), 3, 1) == _matches(np.array([4, 5]), 3, 1) == ([], 0)
    assert _matches(np.array([4, 4]), 3, 1) == ([0], 1)


def test_lookup_copies_what_followed():
    session = sdt.PromptLookupDrafter(num_tokens=3).start(context([[5, 6, 7, 8, 9, 5, 6]]))
    tree = session.draft()
    assert tree.tokens.tolist() == [[6, 7, 8, 9]] and tree.is_chain
    assert session.max_nodes == 4


def test_lookup_branches_share_what_they_have_in_common():
    rows = [[5, 1, 2, 3, 5, 1, 4, 3, 5], [7, 8, 9]]
    tree = sdt.PromptLookupDrafter(num_tokens=3, branches=2, adaptive=False).start(context(rows)).draft()
    assert tree.tokens[0].tolist() == [5, 1, 4, 3, 2, 3, 0, 0]  # padded to a multiple of 4
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 1, 4, -1, -1], [-1] * 8]  # no match in the second row: padding
    tree.check(torch.tensor([5, 9]), 100, "lookup")


def test_no_match_is_no_draft():
    tree = sdt.PromptLookupDrafter().start(context([[1, 2, 3]])).draft()
    assert tree.num_nodes == 1


def test_lookup_does_not_match_padding_and_stops_at_the_budget():
    assert sdt.PromptLookupDrafter().start(context([[0]], start=5)).draft().num_nodes == 1
    eager = sdt.PromptLookupDrafter(adaptive=False)
    assert eager.start(context([[1, 2, 3, 4, 1]], budget=3)).draft().tokens.tolist() == [[1, 2, 3, 0]]  # and padding
    assert eager.start(context([[1, 2, 1]], budget=1)).draft().num_nodes == 1


def test_lookup_drafts_where_matches_of_such_a_length_have_paid():
    phrase = [5, 6, 7, 8]
    now = context([[*phrase, 1, 2, 3, 20, *phrase]], budget=400, max_length=400)

    def after(*tokens):
        """The width of the draft once the target has said `tokens` in one round."""
        now.host_tokens[0, now.host_length[0] + 1 :][: len(tokens)] = tokens
        now.host_length = now.host_length + len(tokens)
        return session.draft().num_nodes

    session = sdt.PromptLookupDrafter(num_tokens=3).start(now)
    assert session.draft().num_nodes == 4  # four tokens in common
    assert after(5) == 4 and after(60) == 1  # one in common, and the draft fails
    assert after(5) == 1  # such a match does not pay now
    assert after(6) == 4  # a longer one does
    tries = 0
    while after(5) == 1 and tries < 99:  # passed over, the short one is tried again some time
        tries += 1
        assert after(1000 + tries) == 1
    assert 20 < tries < 90
    steady = sdt.PromptLookupDrafter(num_tokens=3, adaptive=False).start(now)
    assert steady.draft().num_nodes == steady.draft().num_nodes == 4


def test_a_tree_asked_of_the_lookup():
    lookup = sdt.PromptLookupDrafter(num_tokens=9, adaptive=False)
    for tree in (3, sdt.Topology.chain(2)):
        assert lookup.start(context([[1, 2, 3, 4, 1]]), tree).draft().parents.tolist() == [[-1, 0, 1, -1]]
    with pytest.raises(ValueError, match="PromptLookupDrafter: tree must be None, a number of nodes or a chain"):
        lookup.check(build("llama"), tree=sdt.Topology.from_widths([2]))


@pytest.mark.parametrize("adapted", ["lora", "tokens", "saved"])
def test_a_draft_may_be_wrapped(adapted):
    """In PEFT, its embedding replaced, and drafts as the model inside does."""
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


def test_rows_of_an_embedding_that_tells_nothing():
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


def accepted_in(tree, length):
    """What verification says of a round that accepted so many tokens in each row."""
    return Acceptance(
        path=torch.full((len(length), tree.max_depth), -1, dtype=torch.int32),
        length=length,
        next_ids=torch.zeros_like(length),
        has_nan=torch.zeros_like(length, dtype=torch.bool),
    )


def say(now, count, random, alphabet):
    """The target emits so many tokens of each row, on the host and on the device."""
    for row, number in enumerate(count):
        columns = slice(now.host_length[row] + 1, now.host_length[row] + 1 + number)
        now.host_tokens[row, columns] = random.integers(0, alphabet, number)
        now.tokens[row, columns] = torch.from_numpy(now.host_tokens[row, columns])
    now.host_length = now.host_length + count
    now.length.copy_(torch.from_numpy(now.host_length))


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"num_tokens": 3}, None),
        ({"num_tokens": 5, "max_ngram": 2, "adaptive": False}, None),
        ({"num_tokens": 4, "branches": 3}, None),
        ({"num_tokens": 6, "branches": 4, "max_ngram": 3, "adaptive": False}, None),
        ({"num_tokens": 5, "branches": 3}, 7),
        ({"num_tokens": 4, "branches": 70, "max_ngram": 1}, None),
        ({"num_tokens": 4, "branches": 2, "max_ngram": 99}, 1),
    ],
    ids=str,
)
def test_the_lookup_on_the_device_proposes_what_it_would_on_the_host(options, asked):
    """Node for node, at one width, without a read of the host, over rounds in which it succeeds and fails."""
    random, lookup, drafted = np.random.default_rng(0), sdt.PromptLookupDrafter(**options), 0
    for alphabet in (1, 2, 3, 9):
        texts = [random.integers(0, alphabet, length).tolist() for length in (2, 9, 30, 17)]
        now = context(texts, start=5, budget=99)
        now.start.copy_(torch.tensor([5, 7, 5, 21]))  # of the last row one token is text
        now.tokens.masked_fill_(torch.arange(65) > now.length[:, None], 0)
        host = lookup.start(now, asked)
        now.fixed_shapes = True
        device = lookup.start(now, asked)
        assert device.on_device and not host.on_device
        for number in range(8):
            limit = sdt.Topology.chain(number) if number % 3 == 2 else None
            assert host.prepare(limit) == device.prepare(limit)
            wanted = host.draft()
            with count_host_reads() as reads:
                tree = device.draft()
            assert not reads.total
            tree.check(now.root, 100, "lookup")
            assert tree.num_nodes == device.prepare(limit)[0] >= wanted.num_nodes and tree.max_depth <= device.max_depth
            missing = tree.num_nodes - wanted.num_nodes
            real = wanted.parents >= 0
            assert torch.equal(tree.parents, torch.nn.functional.pad(wanted.parents, (0, missing), value=-1))
            assert torch.equal(tree.tokens[:, : wanted.num_nodes][real], wanted.tokens[real])
            drafted += int(real.sum())
            length = torch.from_numpy(random.integers(0, 3, 4)).minimum(tree.depth.amax(1))
            with count_host_reads() as reads:
                device.observe(tree, accepted_in(tree, length))
            assert not reads.total
            say(now, (length + 1).numpy(), random, alphabet)
    assert (drafted > 0) == (asked != 1)


class FixedShapes(sdt.PromptLookupDrafter):
    def start(self, context, tree=None):
        context.fixed_shapes = True
        return super().start(context, tree)


@pytest.mark.parametrize("branches", [1, 3])
def test_the_text_of_the_lookup_on_the_device(branches):
    model, options = build("llama"), {"do_sample": False, "max_new_tokens": 30, "eos_token_id": NEVER}
    plain = model.generate(**prompt(), **options)
    with sdt.patched(model, drafter=FixedShapes(3, max_ngram=1, branches=branches, adaptive=False)):
        assert torch.equal(model.generate(**prompt(), **options), plain)
    assert sdt.stats(model).accepted > 0


LOPSIDED = sdt.Topology((-1, 0, 0, 0, 3, 3, 5), (0, 0, 1, 2, 0, 1, 0))


def test_the_oracle_errs_at_its_rate():
    """And where it does not, one child of each node on the true path carries the text, at any rank."""
    length, vocab = 400, 7
    text = torch.randint(0, vocab, (300, length), generator=torch.Generator().manual_seed(0))
    for rate in (0.0, 0.3, 1.0):
        now = context(text.tolist(), budget=9, vocab=vocab, max_length=length)
        session = sdt.OracleDrafter(text, rate, tree=sdt.Topology.from_widths([3, 2])).start(now)
        hits, ranks = torch.zeros(2), torch.zeros(3)
        for column in range(50, 350, 50):
            now.length.fill_(column)
            session.prepare()
            tree = session.draft()
            assert torch.equal(tree.tokens[:, 0], text[:, column])
            first = tree.tokens[:, 1:4] == text[:, column + 1, None]
            second = (tree.tokens[:, 4:] == text[:, column + 2, None]).unflatten(1, (3, 2)) & first[:, :, None]
            assert first.sum(1).max() <= 1 and second.sum((1, 2)).max() <= 1
            hits += torch.stack([first.sum(), second.sum()])
            ranks += first.sum(0)
        assert (hits / 1800).tolist() == pytest.approx([1 - rate, (1 - rate) ** 2], abs=0.04)
        assert (ranks / hits[0].clamp(min=1)).tolist() == pytest.approx([(rate < 1) / 3] * 3, abs=0.04)


def test_the_oracle_follows_its_text_to_the_end():
    text = torch.full((2, 6), 4)
    now = context(text.tolist(), vocab=5)
    session = sdt.OracleDrafter(text).start(now)
    now.length.copy_(torch.tensor([3, 5]))
    session.prepare()
    tree = session.draft()
    tree.check(torch.tensor([4, 4]), 5, "oracle")
    assert tree.tokens[0, :3].tolist() == [4, 4, 4]


@pytest.mark.parametrize("fixed", [False, True])
def test_the_oracle_drafts_what_it_is_asked_for(fixed):
    text = torch.arange(40)[None]
    now = context([list(range(10))], budget=3, max_length=40)
    now.fixed_shapes = fixed
    session = sdt.OracleDrafter(text, tree=LOPSIDED).start(now)
    key = session.prepare(sdt.Topology.chain(6))
    shown = 6 if fixed else 2  # only the host's view says that deeper tokens are of no use
    assert session.draft().tokens.tolist() == [list(range(9, 10 + shown))]
    assert session.prepare(sdt.Topology.chain(6)) == key != session.prepare()
    assert session.draft().num_nodes == (7 if fixed else 6)


TREES = [sdt.Topology.from_widths([3, 2, 2]), LOPSIDED]


def record_drafts(monkeypatch):
    """A list that gets an entry for each later draft: texts, lengths and budgets on the host, and the drafted tree."""
    seen, honest = [], ModelSession.draft

    def spy(session):
        proposed = honest(session)
        now = session.context
        seen.append((now.host_tokens.copy(), now.host_length.copy(), now.host_budget.copy(), proposed))
        return proposed

    monkeypatch.setattr(ModelSession, "draft", spy)
    return seen


def assert_ranked_by(draft, target, drafter, monkeypatch):
    """What `drafter` proposes, node by node, against a plain forward of `draft` over each node's path: its cache is
    right, whatever was accepted."""
    seen, tree = record_drafts(monkeypatch), drafter.tree
    with sdt.patched(target, drafter=drafter):
        target.generate(**prompt(), do_sample=False, max_new_tokens=16, eos_token_id=NEVER)
    for tokens, length, budget, proposed in seen[:5]:
        proposed.check(torch.from_numpy(tokens[np.arange(2), length]), 61, "ModelDrafter")
        for row, start in ((0, 3), (1, 0)):
            for node, parent in enumerate(tree.limited(proposed.max_depth).parents):
                if not 0 < tree.depths[node] < budget[row]:
                    continue  # the root, or too deep to be emitted
                path, at = [], parent
                while at > 0:
                    path.insert(0, int(proposed.tokens[row, at]))
                    at = tree.parents[at]
                text = torch.tensor([[*tokens[row, start : length[row] + 1], *path]])
                logits = draft(text).logits[0, -1].detach()
                gap = logits.sort(descending=True).values[tree.ranks[node]] - logits[proposed.tokens[row, node]]
                assert abs(gap) < 1e-5 * logits.std()  # near-ties may fall either way


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("seed", [0, 3], ids=["accepted", "rejected"])
def test_a_draft_model_ranks_each_nodes_children(tree, seed, monkeypatch):
    draft = build("llama", seed=seed)
    assert_ranked_by(draft, build("llama"), sdt.ModelDrafter(draft, tree=tree), monkeypatch)


@pytest.mark.parametrize(
    ("family", "tree"),
    [
        ("llama", TREES[0]),
        ("llama", TREES[1]),
        ("gemma3", TREES[1]),
        pytest.param("gemma3", TREES[0], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "kept", [[0], pytest.param([0, 1], marks=pytest.mark.slow), [0, 1, 2], [0, 2], [1, 2]], ids=str
)
def test_layers_left_out_draft_like_a_model_without_them(family, kept, tree, monkeypatch):
    """With the target's keys and values where the first layers are kept, with a cache of its own elsewhere."""
    target, draft = (build(family, num_hidden_layers=3) for _ in range(2))
    draft.model.layers = torch.nn.ModuleList(draft.model.layers[layer] for layer in kept)
    draft.config.num_hidden_layers = len(kept)
    for index, layer in enumerate(draft.model.layers):
        layer.self_attn.layer_idx = index
    if family == "gemma3":
        draft.config.layer_types = [draft.config.layer_types[layer] for layer in kept]
    before = snapshot(target)
    drafter = sdt.EarlyExitDrafter(skip=[layer for layer in range(3) if layer not in kept], tree=tree)
    assert_ranked_by(draft, target, drafter, monkeypatch)
    assert snapshot(target) == before


def test_an_early_exit_runs_no_prompt():
    """The first layers, counted: the prompt once, then each round's draft and verification."""
    model, calls = build("llama"), []
    hook = model.model.layers[0].register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    with sdt.patched(model, drafter=sdt.EarlyExitDrafter(1, num_tokens=2)):
        model.generate(**prompt(batch=1), do_sample=False, max_new_tokens=4, eos_token_id=NEVER)
    hook.remove()
    assert calls[:4] == [9, 1, 1, 3] and 9 not in calls[1:]


def test_assistant_early_exit():
    model, options = (
        build("llama", num_hidden_layers=3),
        {"do_sample": False, "max_new_tokens": 20, "eos_token_id": NEVER},
    )
    model.generation_config.num_assistant_tokens = 4
    plain = model.generate(**prompt(), **options)
    with sdt.patched(model):
        assert torch.equal(model.generate(**prompt(), **options, assistant_early_exit=2), plain)
        assert sdt.stats(model).drafted > 0
        with pytest.raises(ValueError, match="EarlyExitDrafter: num_layers must be 1 to the 3 of LlamaFor.*got 4"):
            model.generate(**prompt(), **options, assistant_early_exit=4)


def test_what_an_early_exit_cannot_draft_for():
    model = build("llama", num_hidden_layers=3)
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="EarlyExitDrafter: layers must not have inputs or caches of each other"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(2))
    model.config.num_kv_shared_layers = 0
    with pytest.raises(ValueError, match=r"EarlyExitDrafter: skip must name some of the layers 0 to 2.*got \[0, 3\]"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(skip=[0, 3]))
    with pytest.raises(ValueError, match=r"EarlyExitDrafter: skip must name some.*not all, got \[0, 1, 2\]"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(skip=[2, 1, 0]))
    with pytest.raises(ValueError, match="EarlyExitDrafter: num_layers must be 1 to the 3 of .*model.layers, got 0"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(0))
    assert type(model) is transformers.LlamaForCausalLM
    model.model.forward = model.model.forward
    with pytest.raises(ValueError, match="forward was replaced"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(1))
    model.model.other = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match="must have one list of its 3 layers, got LlamaForCausalLM with"):
        sdt.patch(model, drafter=sdt.EarlyExitDrafter(1))


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
        (lambda: sdt.ModelDrafter(build("llama"), 3, 4), "ModelDrafter: give num_tokens"),
        (lambda: sdt.ModelDrafter(build("llama"), 0), "ModelDrafter: num_tokens must be an integer"),
        (
            lambda: sdt.ModelDrafter(build("llama", vocab_size=4), tree=sdt.Topology.from_widths([5])).start(
                context([[1]], vocab=4)
            ),
            "ModelDrafter: tree must not have more children",
        ),
        (
            lambda: sdt.patch(build("llama", vocab_size=20), drafter=sdt.ModelDrafter(build("llama"))),
            "ModelDrafter: the draft model must have the target's vocabulary of 20 tokens.*got 61",
        ),
        (lambda: sdt.EarlyExitDrafter(), "EarlyExitDrafter: give num_layers .* or skip"),
        (lambda: sdt.EarlyExitDrafter(1, skip=[2]), "EarlyExitDrafter: give num_layers .* or skip"),
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
        (lambda: sdt.EarlyExitDrafter(1, num_tokens=3, tree=4), "EarlyExitDrafter: give num_tokens"),
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
            "ModelDrafter: confidence_threshold must be None or 0 with a tree that is no chain, got 0.5",
        ),
        (
            lambda: sdt.patch(
                build("llama"), drafter=sdt.ModelDrafter(build("llama"), confidence_threshold=0.5), tree="auto"
            ),
            'tree="auto" must have a drafter that drafts what it is asked for, got ModelDrafter',
        ),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
