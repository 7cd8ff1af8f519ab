"""Medusa's heads: their checkpoints, and drafts that equal a literal statement of the method."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import specdec_triton as sdt
from families import NEVER, VOCAB, build, prompt
from helpers import capture_here, eos_in_mid_row, speculative
from specdec_triton.drafters import MedusaDrafter
from specdec_triton.heads.checkpoint import Checkpoint
from specdec_triton.heads.medusa import MedusaHeads
from specdec_triton.ops.filters import Filters, filtered_log_probs
from specdec_triton.ops.noise import COUPLED, gumbel, row_seeds
from specdec_triton.ops.rules import CHAIN_RULES
from specdec_triton.tools.check_distribution import prove
from specdec_triton.tools.host_sync import count_host_reads
from specdec_triton.tools.trace import TracingDrafter

HIDDEN, HEADS, BLOCKS = 32, 3, 2
GREEDY = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": NEVER}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.3, "top_k": 5}


def random_tensors(heads=HEADS, blocks=BLOCKS, vocab=VOCAB, seed=0, hidden=HIDDEN):
    """{(head, block, name): tensor}, with an output layer as the block after the last."""
    torch.manual_seed(seed)
    found = {}
    for head in range(heads):
        for block in range(blocks):
            found[head, block, "weight"] = torch.randn(hidden, hidden) / hidden**0.5
            found[head, block, "bias"] = torch.randn(hidden)
        found[head, blocks, "weight"] = torch.randn(vocab, hidden)
    return found


def in_medusas_names(tensors, prefix="", blocks=BLOCKS):
    return {
        f"{prefix}{head}.{block}.{'' if block == blocks else 'linear.'}{name}": tensor
        for (head, block, name), tensor in tensors.items()
    }


def in_vllms_names(tensors, prefix="", blocks=BLOCKS):
    return {
        f"{prefix}lm_heads.{head}.weight" if block == blocks else f"{prefix}blocks.{head}.layers.{block}.{name}": tensor
        for (head, block, name), tensor in tensors.items()
    }


def heads_of(names, **config):
    return MedusaHeads.from_checkpoint(Checkpoint("the file", config, names))


def literal_logits(tensors, state, head, blocks=BLOCKS):
    for block in range(blocks):
        inner = tensors[head, block, "weight"] @ state + tensors.get((head, block, "bias"), 0)
        state = state + inner * torch.sigmoid(inner)
    return tensors[head, blocks, "weight"] @ state


def states_of(model, tokens):
    """The target's hidden states after the final norm, of a text without padding."""
    return model.model(tokens[None]).last_hidden_state[0].detach()


def fitted(model, inputs, tensors, blocks=BLOCKS):
    """The tensors with output layers that are often right about the plain text after `inputs`."""
    torch.manual_seed(1)
    text = model.generate(**inputs, **GREEDY)
    rows = [row[int(start) :] for row, start in zip(text, (inputs["attention_mask"] == 0).sum(1), strict=True)]
    for head in {head for head, *_ in tensors}:
        features, wanted = [], []
        own = {**tensors, (head, blocks, "weight"): torch.eye(HIDDEN)}
        for row in rows:
            # the state at a column chooses the root, one column later
            states = states_of(model, row)[: len(row) - 2 - head]
            features += [literal_logits(own, state, head, blocks) for state in states]
            wanted.append(torch.nn.functional.one_hot(row[2 + head :], VOCAB).float())
        output = torch.linalg.lstsq(torch.stack(features), torch.cat(wanted)).solution.T
        tensors[head, blocks, "weight"] = 8 * (output + 0.5 * output.std() * torch.randn(output.shape))
    return tensors


@pytest.fixture(scope="module")
def target():
    return build("llama")


@pytest.fixture(scope="module")
def tensors(target):
    return fitted(target, prompt(batch=3), random_tensors())


@pytest.fixture(scope="module")
def heads(tensors):
    return heads_of(in_medusas_names(tensors))


def recorded(monkeypatch, prepare=None):
    """A list to which each later round appends the tokens and lengths on the host, the budgets, and the drafted tree.
    Rounds read nothing on the host."""
    seen, start = [], MedusaDrafter.start

    def starting(drafter, *arguments):
        session = start(drafter, *arguments)
        draft, observe, now = session.draft, session.observe, session.context

        def drafting():
            with count_host_reads() as reads:
                proposed = draft()
            assert not reads.total
            proposed.check(now.root, now.vocab_size, "MedusaDrafter")
            seen.append((now.host_tokens.copy(), now.host_length.copy(), now.host_budget.copy(), proposed))
            return proposed

        def observing(*arguments):
            with count_host_reads() as reads:
                observe(*arguments)
            assert not reads.total

        session.draft, session.observe = drafting, observing
        return session

    monkeypatch.setattr(MedusaDrafter, "start", starting)
    return seen


def paths_of(tree, row):
    paths = [()]
    for node in range(1, tree.num_nodes):
        paths.append((*paths[tree.parents[row, node]], int(tree.tokens[row, node])))
    return paths


# name -> the checkpoint of `random_tensors()` in one layout, and its config
def layouts():
    tensors = random_tensors()
    medusas, vllms = in_medusas_names(tensors), in_vllms_names(tensors)
    return {
        "medusa": (medusas, {"medusa_num_heads": 2, "medusa_num_layers": BLOCKS}),
        "with the target": (
            {**in_medusas_names(tensors, "medusa_head."), "lm_head.weight": torch.ones(5, 5)}
            | {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4)},
            {},
        ),
        "vllm": (vllms, {"num_heads": HEADS, "truncated_vocab_size": VOCAB, "vocab_size": VOCAB}),
        "vllm, prefixed": (in_vllms_names(tensors, "medusa_heads."), {}),
        # ignored, because it is of the whole vocabulary
        "vllm, map": (
            {**vllms, "token_map": torch.arange(VOCAB).flip(0)},
            {"truncated_vocab_size": VOCAB, "vocab_size": VOCAB},
        ),
    }


@pytest.mark.parametrize("layout", layouts())
def test_heads_are_read_from_every_layout(layout):
    names, config = layouts()[layout]
    heads, tensors = heads_of(names, **config), random_tensors()
    state = torch.randn(2, HIDDEN)
    assert (heads.num_heads, heads.hidden_size, heads.vocab_size) == (HEADS, HIDDEN, VOCAB)
    wanted = torch.stack([torch.stack([literal_logits(tensors, row, head) for head in range(HEADS)]) for row in state])
    torch.testing.assert_close(heads(state), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heads(state, 2), wanted[:, :2], rtol=1e-4, atol=1e-4)
    assert heads_of(names, **config, logit_scale=0.5)(state).allclose(heads(state) / 2)


@pytest.mark.parametrize("blocks", [0, 1])
def test_blocks_without_bias_and_heads_without_blocks(blocks):
    tensors = {place: each for place, each in random_tensors(blocks=blocks).items() if place[2] != "bias"}
    state = torch.randn(HIDDEN)
    wanted = torch.stack([literal_logits(tensors, state, head, blocks) for head in range(HEADS)])
    for names in (in_medusas_names, in_vllms_names):
        got = heads_of(names(tensors, blocks=blocks))(state[None])
        torch.testing.assert_close(got[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["lm_heads.0.weight", "lm_head.weight", "the target's"])
def test_an_output_layer_that_all_heads_share(source):
    tensors, output = random_tensors(), torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    names = {name: each for name, each in in_vllms_names(tensors).items() if "lm_heads" not in name}
    if source != "the target's":
        names[source] = output.weight.detach()
    heads, state = heads_of(names, original_lm_head=True), torch.randn(HIDDEN)
    for head in range(HEADS):
        tensors[head, BLOCKS, "weight"] = output.weight.detach()
    wanted = torch.stack([literal_logits(tensors, state, head) for head in range(HEADS)])
    torch.testing.assert_close(heads(state[None], target_output=output)[0], wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match="the file must hold (an output layer for each of 3 heads|the tensors of Medusa's)"
    ):
        heads_of(names)


@pytest.mark.parametrize("rows", ["all", "reduced", "the target's"])
@pytest.mark.parametrize("name", ["token_map", "d2t"])
def test_a_reduced_vocabulary(name, rows):
    """The map has token ids, the offsets are added to the number of the token."""
    tensors, ids = random_tensors(), torch.tensor([1, 2, 7, 20, 60])
    whole = random_tensors()
    output = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    if rows == "reduced":
        for head in range(HEADS):
            tensors[head, BLOCKS, "weight"] = tensors[head, BLOCKS, "weight"][ids]
    names = in_vllms_names(tensors)
    if rows == "the target's":
        names = {name: each for name, each in names.items() if "lm_heads" not in name}
        whole |= {(head, BLOCKS, "weight"): output.weight.detach() for head in range(HEADS)}
    names[name] = ids if name == "token_map" else ids - torch.arange(5)
    config = {"vocab_size": VOCAB, "truncated_vocab_size": 5, "original_lm_head": rows == "the target's"}
    heads, state = heads_of(names, **config), torch.randn(HIDDEN)
    logits = heads(state[None], target_output=output)[0]
    wanted = torch.stack([literal_logits(whole, state, head) for head in range(HEADS)])
    torch.testing.assert_close(logits[:, ids], wanted[:, ids], rtol=1e-4, atol=1e-4)
    assert logits.isfinite().sum() == HEADS * len(ids)


def without(names, *parts):
    return {name: tensor for name, tensor in names.items() if not any(part in name for part in parts)}


MEDUSAS, VLLMS = in_medusas_names(random_tensors()), in_vllms_names(random_tensors())


@pytest.mark.parametrize(
    ("names", "config", "wanted", "got"),
    [
        ({}, {}, "the tensors of Medusa's heads alone", "none"),
        ({**MEDUSAS, "norm.weight": torch.ones(3)}, {}, "the tensors of Medusa's heads alone", "norm.weight"),
        (without(MEDUSAS, "1.0.linear"), {}, r"the weight \[32, 32\] of block 0 of head 1", "none"),
        (without(MEDUSAS, "2.1.linear.bias"), {}, r"the bias \[32\] of block 1 of head 2", "none"),
        (without(MEDUSAS, "1.2.weight"), {}, "an output layer for each of 3 heads", r"those of the heads \[0, 2\]"),
        (without(MEDUSAS, ".1.linear"), {}, "1 blocks and then an output layer in each head", "a layer 2"),
        (VLLMS | {"blocks.0.layers.0.weight": torch.ones(32, 31)}, {}, "the weight .* of head 0", r"\[32, 31\]"),
        (VLLMS | {"lm_heads.1.weight": torch.ones(7, 32)}, {}, r"output layers of one shape, \[61, 32\]", r"\[7, 32\]"),
        (VLLMS, {"vocab_size": 61, "truncated_vocab_size": 9}, "token_map, because the config has 9 of 61", "none"),
        (
            VLLMS | {"d2t": torch.tensor([3, 80])}, {},
            "output layers of 2 tokens, or of all tokens up to 81", r"\[61, 32\]",
        ),
        (without(VLLMS, "lm_heads", "weight"), {"original_lm_head": True}, "the weights of the heads", "their biases"),
    ],
)  # fmt: skip
def test_broken_checkpoints_are_refused(names, config, wanted, got):
    with pytest.raises(ValueError, match=f"^MedusaHeads: the file must hold {wanted}.*, got {got}"):
        heads_of(names, **config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64}, "the hidden size of the target LlamaForCausalLM, 64, got 32"),
        ({"vocab_size": 90}, "the vocabulary of the target LlamaForCausalLM, 90 tokens, got 61 tokens"),
        ({"vocab_size": 50}, "the vocabulary of the target LlamaForCausalLM, 50 tokens, got 61 tokens"),
        ({"dtype": torch.bfloat16}, "the dtype of the target LlamaForCausalLM, torch.bfloat16, got torch.float32"),
    ],
)
def test_heads_of_another_target_are_refused(options, message, heads):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    model = build("llama", **options).to(dtype)
    with pytest.raises(ValueError, match=f"^MedusaHeads: the heads must have {message}$"):
        sdt.patch(model, drafter=MedusaDrafter(heads))


def test_a_reduced_vocabulary_of_another_target_is_refused():
    names = without(VLLMS, "lm_heads") | {"d2t": torch.tensor([3, 80])}
    heads = heads_of(names, original_lm_head=True)
    with pytest.raises(ValueError, match="the vocabulary of the target LlamaForCausalLM, 61 tokens, got 82 tokens"):
        heads.check_target(build("llama"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda heads: sdt.patch(build("llama"), drafter=MedusaDrafter(heads), tree=sdt.DynamicTree(9, 3, 4)),
            "tree must be at most 3 deep, the number of depths that one forward predicts, got depth 4",
        ),
        (
            lambda heads: sdt.patch(build("llama"), drafter=MedusaDrafter(heads), tree=sdt.Topology.chain(4)),
            "tree must be at most 3 deep, the number of depths that one forward predicts, got depth 4",
        ),
        (lambda heads: MedusaDrafter(heads, 1112), "tree must have at most 1111 nodes, those of the 10 best tokens at"),
        (
            lambda heads: MedusaDrafter(heads, sdt.Topology.from_widths([2])).check(build("llama"), "block"),
            'rule "block" needs a chain, got a tree drawn without replacement',
        ),
        (
            lambda heads: MedusaDrafter(heads, sdt.Topology.from_widths([62])).check(build("llama")),
            "a node of the tree must have at most 61 children, the number of tokens, got 62",
        ),
        (lambda heads: MedusaDrafter(build("llama")), "heads must be MedusaHeads, got LlamaForCausalLM"),
        (lambda heads: MedusaDrafter(heads, "wide"), "tree must be None, a Topology or a number of nodes"),
    ],
)
def test_arguments_that_are_refused(ask, message, heads):
    with pytest.raises(ValueError, match=f"^MedusaDrafter: {message}"):
        ask(heads)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "model.safetensors"])
def test_heads_are_loaded_from_a_folder_for_a_target(target, heads, tensors, tmp_path, file):
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    names, save = in_medusas_names(tensors), torch.save if file.endswith(".pt") else save_file
    save({name: tensor.contiguous() for name, tensor in names.items()}, tmp_path / file)
    drafter = MedusaDrafter.from_pretrained(tmp_path, target, tree=12)
    assert torch.equal(drafter.heads(torch.ones(1, HIDDEN)), heads(torch.ones(1, HIDDEN)))
    assert repr(drafter) == "MedusaDrafter(heads=MedusaHeads, tree=12)"
    assert MedusaDrafter.from_pretrained(tmp_path, dtype=torch.bfloat16).heads.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="MedusaHeads: the heads must have the hidden size of the target"):
        MedusaDrafter.from_pretrained(str(tmp_path), build("llama", hidden_size=64))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"hydra_head.0.linear.weight": 1}, "the draft head must be EAGLE-1, .* or Medusa, got Hydra"),
        (
            {"fc.weight": 1, "layers.0.self_attn.q_proj.weight": 1},
            "MedusaDrafter: .* must hold Medusa's heads, got a head of kind eagle: use EagleDrafter",
        ),
        ({"embed_tokens.weight": 1, "norm.weight": 1}, "Medusa's heads, got tensors of no known draft head"),
    ],
)
def test_other_checkpoints_are_refused_by_name(names, message, tmp_path):
    save_file({name: torch.ones(size) for name, size in names.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        MedusaDrafter.from_pretrained(tmp_path)


def test_heads_within_a_checkpoint_of_the_target(tensors, heads, tmp_path):
    names = in_medusas_names(tensors, "medusa_head.") | {"model.embed_tokens.weight": torch.ones(2, 2)}
    save_file({**names, "model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    drafter = MedusaDrafter.from_pretrained(tmp_path)
    assert torch.equal(drafter.heads(torch.ones(1, HIDDEN)), heads(torch.ones(1, HIDDEN)))


def test_a_trace_of_heads(target, heads, tmp_path):
    with sdt.patched(target, drafter=MedusaDrafter(heads)):
        text = target.generate(**prompt(), **GREEDY)
    accepted = sdt.stats(target).accepted
    with sdt.patched(target, drafter=TracingDrafter(MedusaDrafter(heads), tmp_path / "trace.jsonl")):
        assert torch.equal(target.generate(**prompt(), **GREEDY), text)
    assert sdt.stats(target).accepted == accepted > 5


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        pytest.param(tree, rule, marks=[] if rule in quick else pytest.mark.slow, id=f"{name}-{rule}")
        for name, tree, *quick in (
            ("default", None, "greedy"),
            ("12 nodes", 12, "coupled"),
            ("topology", sdt.Topology.from_paths([(0, 0, 1), (0, 2), (3,)]), "greedy", "coupled"),
        )
        for rule in ("greedy", "coupled", *([] if name == "topology" else ["multi_round"]))
    ],
)
def test_drafts_equal_a_literal_statement(target, tensors, heads, tree, rule, monkeypatch):
    """In every round, whatever was accepted: one state from a forward over the whole text, one head for each depth, and
    the paths with the largest products of probabilities."""
    seen, inputs = recorded(monkeypatch), prompt(batch=3)
    starts = (inputs["attention_mask"] == 0).sum(1).tolist()
    with sdt.patched(target, drafter=MedusaDrafter(heads, tree), rule=rule, seed=6):
        target.generate(**inputs, **(GREEDY if rule == "greedy" else SAMPLED))
    advances = np.diff([length for _, length, *_ in seen], axis=0)
    assert len(seen) > 8 and (advances == 1).any() and len(np.unique(advances)) > 2
    filters = Filters() if rule == "greedy" else Filters(torch.tensor([0.3]), torch.tensor([5]))
    compared = 0
    for tokens, length, budget, proposed in seen:
        depth = min(HEADS, int(budget.max()) - 1)
        for row in np.flatnonzero(budget):
            text = torch.from_numpy(tokens[row, starts[row] : length[row]])  # without the root
            state, levels = states_of(target, text)[-1], []
            for head in range(depth):
                log_probs = filtered_log_probs(literal_logits(tensors, state, head)[None, None], filters)[0, 0]
                if rule == "coupled":
                    noise = gumbel(row_seeds(6, 3)[row], len(text) + 1 + head, 0, COUPLED, VOCAB)
                    log_probs = (log_probs + noise).log_softmax(-1)
                levels.append(log_probs)
            if isinstance(tree, sdt.Topology):
                assert_ranks(proposed, row, tree.limited(depth), levels)
            else:
                assert_likeliest(proposed, row, tree or 64, levels)
            compared += 1
    assert compared > 20


def assert_ranks(proposed, row, shape, levels):
    ranked = [level.argsort(descending=True, stable=True).tolist() for level in levels]
    wanted = [ranked[depth - 1][rank] for depth, rank in zip(shape.depths[1:], shape.ranks[1:], strict=True)]
    assert proposed.tokens[row, 1:].tolist() == wanted
    assert proposed.parents[row].tolist() == list(shape.parents)


def assert_likeliest(proposed, row, num_nodes, levels):
    def prob(path):
        return float(np.prod([float(level[token].exp()) for level, token in zip(levels, path, strict=False)]))

    best = [level.topk(10).indices.tolist() for level in levels]
    every = [path for depth in range(len(levels) + 1) for path in product(*best[:depth])]
    paths = [()]
    for node in range(1, proposed.num_nodes):
        paths.append((*paths[proposed.parents[row, node]], int(proposed.tokens[row, node])))
    assert len(set(paths)) == len(paths) == min(num_nodes, len(every))
    wanted = sorted(map(prob, every), reverse=True)[: len(paths)]
    assert sorted(map(prob, paths), reverse=True) == pytest.approx(wanted, rel=1e-3, abs=1e-30)


def test_the_text_is_the_targets(target, heads):
    """Also if rows end early."""
    inputs = prompt(batch=3)
    sampled = target.generate(**inputs, **SAMPLED, custom_generate=sdt.SpeculativeGenerate(seed=1))
    ends = {**GREEDY, "eos_token_id": eos_in_mid_row(target, inputs, **GREEDY)}
    plain, ended = (target.generate(**inputs, **options) for options in (GREEDY, ends))
    for tree in (None, 2, sdt.Topology.from_widths([3, 2, 1]), "auto"):
        with sdt.patched(target, drafter=MedusaDrafter(heads), tree=tree, seed=1):
            assert torch.equal(target.generate(**inputs, **GREEDY), plain)
            assert torch.equal(target.generate(**inputs, **ends), ended)
            assert torch.equal(target.generate(**inputs, **SAMPLED), sampled)


@pytest.mark.parametrize(
    ("tree", "options", "lag"),
    [
        pytest.param(*cell, marks=[] if cell in quick else pytest.mark.slow, id="-".join(map(str, cell)))
        for quick in [(("likeliest", "greedy", 1), ("topology", "coupled", 0))]
        for cell in product(("likeliest", "topology"), ("greedy", "coupled"), (0, 1))
    ],
)
def test_captured_rounds_draft_the_same(target, heads, tree, options, lag, monkeypatch):
    """In captured rounds the drafts still follow the text: as many are accepted. A later call replays the graphs."""
    inputs, tree = prompt(batch=3), {"likeliest": None, "topology": sdt.Topology.from_widths([3, 2, 1])}[tree]
    options = GREEDY if options == "greedy" else SAMPLED
    with sdt.patched(target, drafter=MedusaDrafter(heads, tree), seed=1, cuda_graphs=False):
        text = target.generate(**inputs, **options)
    accepted = sdt.stats(target).accepted
    with sdt.patched(target, drafter=MedusaDrafter(heads, tree), seed=1):
        capture_here(monkeypatch, lag)
        for call in range(2):
            assert torch.equal(target.generate(**inputs, **options), text)
            stats = sdt.stats(target)
            # rounds of fixed shape are not cut at the end of the text
            assert accepted <= stats.accepted <= accepted + 3 * HEADS and stats.accepted > 9
            assert (stats.captured, stats.reused) == ((2, 0), (0, 2))[call] and stats.replayed > 5


def test_a_tree_is_chosen_each_round(target, heads, monkeypatch):
    """`tree="auto"` gets the trees that it asks for, and learns their acceptance by rank."""
    inputs = {**prompt(batch=3), **GREEDY, "max_new_tokens": 60}
    plain = target.generate(**inputs)
    costs = sdt.Costs(verify=((1, 1.0), (64, 1.1)), draft=((1, 0.01), (10, 0.02)))
    for lag in (0, 1):
        with monkeypatch.context() as patches:
            if lag:
                capture_here(patches, lag)
            text, stats = speculative(target, MedusaDrafter(heads), inputs, tree="auto", costs=costs)
        assert torch.equal(text, plain)
        trees = stats.auto["trees"]
        assert max(tree["nodes"] for tree in trees) > 8 and max(tree["depth"] for tree in trees) == HEADS
        assert stats.auto["speedup"] > 1.05


@pytest.mark.parametrize(
    "rule",
    ["block", "multi_round", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("rejection", "traversal"))],
)
def test_rules_that_weigh_tokens_keep_the_distribution(rule):
    """The likeliest nodes count as drawn with probability 1. Rules for chains get chains. The tokens of a topology are
    drawn from the heads' probabilities."""
    model = build("llama", vocab_size=5, num_hidden_layers=1)
    heads = heads_of(in_medusas_names(random_tensors(heads=2, vocab=5)))
    shapes = [6] if rule in CHAIN_RULES else [6, sdt.Topology.from_widths([2, 2])]
    for tree in shapes:
        found = prove(model, MedusaDrafter(heads, tree), rule, torch.tensor([[3, 4, 1]]), samples=1500, rows=1500)
        assert found.agrees and found.acceptance_length > 1


def test_the_tokens_of_a_topology_are_drawn_from_the_heads(target, heads, tensors, monkeypatch):
    seen, inputs = recorded(monkeypatch), prompt(batch=3)
    with sdt.patched(target, drafter=MedusaDrafter(heads, sdt.Topology.from_widths([2, 2])), rule="multi_round"):
        target.generate(**inputs, **SAMPLED)
    start = int((inputs["attention_mask"][0] == 0).sum())
    for tokens, length, _, proposed in seen[:4]:
        assert proposed.sampling == "without"
        state = states_of(target, torch.from_numpy(tokens[0, start : length[0]]))[-1]
        for node, row in enumerate(proposed.draft_row[0].tolist()):
            if row >= 0:
                depth = int(proposed.depth[0, node])
                assert torch.allclose(proposed.draft_logits[0, row], literal_logits(tensors, state, depth), atol=1e-4)


def test_a_nan_of_the_heads_is_an_error_that_names_the_row(target, tensors):
    broken = tensors | {(1, BLOCKS, "weight"): torch.full((VOCAB, HIDDEN), float("nan"))}
    with (
        sdt.patched(target, drafter=MedusaDrafter(heads_of(in_medusas_names(broken)))),
        pytest.raises(RuntimeError, match="MedusaDrafter: the draft's logits must be finite numbers.*in row 0 of 2"),
    ):
        target.generate(**prompt(), **GREEDY)
