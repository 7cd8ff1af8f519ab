"""bench_generate times captured rounds or fails; a draft that replays a trace errs at the trace's tokens and at no
others."""

import dataclasses
import json

import _rows
import bench_generate
import bench_round
import pytest
import torch
from _models import BLOCKS as BLOCK_SHAPES
from _models import dflash_head, eagle_head, prompts, successors, synthetic, wrong_share
from _rows import CONTROLLED, REPLAYED, way_of
from bench_draft import HeadCase, draft_of
from bench_generate import (
    ASSISTED,
    BLOCKS,
    COMPILED,
    DRAFTED,
    EAGER_LAYERS,
    FUSED,
    GRAPHS,
    HEAD_TREE,
    HEADED,
    HEADED_TREE,
    PLAIN,
    Call,
    Case,
    check_graphs,
    shown_options,
)

from bench_helpers import CEILINGS, bench, rows
from bench_helpers import quick as quick
from helpers import capture_here
from specdec_triton.engine.workspace import Workspaces
from specdec_triton.forward import fusion

pytestmark = pytest.mark.usefixtures("quick")

SHORT = Case("graphs", (PLAIN,), context=12, tokens=(8, 40), turns=1, options=GRAPHS)


def test_a_short_call_reuses_the_graphs_of_a_long_one(tmp_path, monkeypatch):
    capture_here(monkeypatch, 1)
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], [SHORT]) == 0
    assert all("p50_tokens_s" in row for row in rows(tmp_path, bench="generate"))


def test_a_short_call_that_is_not_captured_gives_no_row(tmp_path, monkeypatch):
    """Eight tokens are not worth a capture. If nothing is reused, the difference would include the captures of the long
    call."""
    capture_here(monkeypatch, 1)
    monkeypatch.setattr(Workspaces, "put_back", lambda self, workspace: workspace.graph_runner.forget())
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], [SHORT]) == 1
    for row in rows(tmp_path, bench="generate"):
        assert (
            "p50_tokens_s" not in row
            and "8 and 40 tokens must capture the same number of graphs and replay" in row["failed"]
        )


@pytest.mark.parametrize("short", [Call(1.0, 0, 0), Call(1.0, 4, 20), Call(1.0, 2, 90)])
def test_calls_must_differ_by_replayed_rounds_alone(short):
    check_graphs(SHORT, [(Call(1.0, 2, 20), Call(2.0, 2, 60))])
    with pytest.raises(RuntimeError, match="must capture the same number of graphs and replay them, got"):
        check_graphs(SHORT, [(Call(1.0, 2, 20), Call(2.0, 2, 60)), (short, Call(2.0, 2, 60))])


def test_a_row_says_whether_layers_are_fused(tmp_path, monkeypatch):
    capture_here(monkeypatch, 1)
    cases = [dataclasses.replace(SHORT, options=options) for options in (FUSED, EAGER_LAYERS)]
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], cases) == 0
    fused, eager = rows(tmp_path, bench="generate")
    assert fused["shapes"] == eager["shapes"] | {"fuse": True}
    # 4 layers with 2 norms each, and the last norm
    assert fused["fused"] == {
        "LlamaRMSNorm": 9, "LlamaMLP": 4, "LlamaAttention": 4, "LlamaDecoderLayer": 4,
    } and not fused["not_fused"] and "fused" not in eager  # fmt: skip


def test_a_row_of_fused_layers_is_none_if_none_were_fused(tmp_path, monkeypatch):
    capture_here(monkeypatch, 1)
    monkeypatch.setattr(fusion._Fusion, "unfit_model", lambda self, model: "it is Tuesday")
    case = dataclasses.replace(SHORT, options=FUSED)
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], [case]) == 1
    (row,) = rows(tmp_path, bench="generate")
    assert "layers must be fused, got none: {'LlamaForCausalLM': 'it is Tuesday'}" in row["failed"]
    assert "p50_tokens_s" not in row


def test_the_key_of_a_row_names_fused_layers_only():
    """Rows of before the option had layers as in transformers. They keep their keys and their meaning."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    graphs = {"cuda_graphs": True}
    assert shown_options(GRAPHS, cuda) == graphs | {"fuse": True} == shown_options(FUSED, cpu)
    assert shown_options(GRAPHS, cpu) == graphs == shown_options(EAGER_LAYERS, cuda)
    assert shown_options(COMPILED, cuda) == graphs | {"compile": True}
    both = shown_options((*COMPILED, ("fuse", True)), cuda)
    assert both == graphs | {"compile": True, "fuse": True} and way_of(both) == "fused and compiled"


def test_the_cases_of_goals_run_in_all_ways():
    cuda, ways = torch.device("cuda"), {"fused", "compiled", "eager in graph"}
    wide = [case for case in bench_generate.CASES if (64, 4.5) in case.oracle and PLAIN in case.ways]
    assert {way_of(shown_options(case.options, cuda)) for case in wide} >= ways
    drafted = [case for case in bench_generate.CASES if case.name == "drafts"]
    assert [way_of(shown_options(case.options, cuda)) for case in drafted] == ["fused", "eager in graph"]
    assert all(DRAFTED in case.ways and case.pair == "llama" for case in drafted)
    for nodes in (1, 64, 128):
        found = [case for case in bench_round.CASES if (case.nodes, case.batch) == (nodes, 1)]
        assert {way_of(shown_options(case.options, cuda)) for case in found} >= ways


def test_every_case_that_asks_for_graphs_is_long_enough():
    for case in bench_generate.CASES:
        if dict(case.options).get("cuda_graphs"):
            deepest = bench_generate.LOOKUP if case.repeats else bench_generate.DEPTH
            # the prompt's token, one uncaptured round, and enough remaining tokens to be worth a capture
            assert case.tokens[0] >= 1 + (deepest + 1) + bench_generate.WORTH_CAPTURING


REPLAY = Case("replayed pair", (DRAFTED, ASSISTED), context=12, tokens=(10, 66), turns=1, pair="qwen")


def acceptance_length(flags, short, depth=5):
    """Of a chain, over the tokens after the short text. The prompt's forward gives the first token of all."""

    def rounds(flags):
        count, at = 0, 1
        while at < len(flags):
            accepted = 0
            while accepted < depth and at + accepted < len(flags) and flags[at + accepted]:
                accepted += 1
            at, count = at + accepted + 1, count + 1
        return count

    return (len(flags) - short) / (rounds(flags) - rounds(flags[:short]))


def test_a_replaying_draft_errs_at_the_traces_tokens_only():
    device = torch.device("cpu")
    flags = bench_generate.flags_of(bench_generate.replay_of(REPLAY))
    setup = bench_generate.Setup(REPLAY, False, device)
    draft, text = setup.draft, setup.plain
    with torch.no_grad():
        chosen = draft(text).logits[0, REPLAY.context - 1 : -1].argmax(-1)
    assert (chosen == text[0, REPLAY.context :]).int().tolist() == flags


def test_a_replayed_run_has_the_acceptance_of_the_trace(tmp_path):
    flags = bench_generate.flags_of(bench_generate.replay_of(REPLAY))
    length = acceptance_length(flags, REPLAY.tokens[0])
    for shifted in (flags[1:] + flags[:1], flags[-1:] + flags[:-1]):
        assert acceptance_length(shifted, REPLAY.tokens[0]) != length  # else this test could not distinguish them
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], [REPLAY]) == 0
    ours, theirs = rows(tmp_path, bench="generate", inputs=REPLAYED)
    assert ours["provider"] == DRAFTED and ours["acceptance_length"] == ours["replayed_length"] == round(length, 3)
    assert theirs["provider"] == ASSISTED and abs(theirs["rounds"] - ours["rounds"]) <= 1


def test_a_run_with_another_acceptance_than_the_trace_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_generate, "replayed_length", lambda replay: 3.0)
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], [REPLAY]) == 1
    ours, _ = rows(tmp_path, bench="generate", inputs=REPLAYED)
    assert "the trace's is 3.0" in ours["wrong"] and "p50_tokens_s" not in ours


def test_every_prompt_of_a_trace_counts_alike():
    (case,) = [case for case in bench_generate.CASES if case.pair != "llama"]
    replay = bench_generate.replay_of(case)
    trace = json.loads((_rows.RESULTS / replay.trace).read_text())["flags"]
    short, long = case.tokens
    each = (long - short) // len(trace)
    assert bench_generate.flags_of(replay)[short:] == [flag for flags in trace.values() for flag in flags[:each]]
    with pytest.raises(ValueError, match="has too few flags for texts of 32 and 500 tokens"):
        bench_generate.flags_of(replay._replace(tokens=(32, 500)))


def test_heads_have_the_acceptance_that_was_set(tmp_path):
    """The errors are those of the draft model. In the dynamic tree and among the likeliest nodes, only the likeliest
    path can be right."""
    case = Case("drafts", (DRAFTED, HEADED, HEADED_TREE, BLOCKS), context=12, tokens=(10, 100), turns=1)
    assert bench(tmp_path, name="generate").run(bench_generate.measure, [], [], [case]) == 0
    found = {row["provider"]: row for row in rows(tmp_path, bench="generate", inputs=CONTROLLED)}
    nodes = {DRAFTED: 6, HEADED: 6, HEADED_TREE: 60, BLOCKS: 64}
    assert {provider: row["shapes"]["N"] for provider, row in found.items()} == nodes
    assert all(row["draft_errors"] == 0.1 and row["identical"] and row["eta"] > 0 for row in found.values())
    wrong, text = wrong_share(0.1, 512), prompts(1, 12 + 100, 512, torch.device("cpu"))[0]
    flags = [int(not wrong[token]) for token in text[11:-1]]
    block, chain, deeper = (acceptance_length(flags, 10, depth) for depth in (3, 5, HEAD_TREE.depth))
    assert 1 < block < chain < deeper < 6  # else this test could not distinguish the rows
    assert found[DRAFTED]["acceptance_length"] == found[HEADED]["acceptance_length"] == round(chain, 3)
    assert found[HEADED_TREE]["acceptance_length"] == round(deeper, 3)
    assert found[BLOCKS]["acceptance_length"] == round(block, 3)
    nbytes = {
        provider: row["eta"] * row["round_ms"] / 1e3 * CEILINGS["read_bytes_s"] for provider, row in found.items()
    }
    head = eagle_head("tiny", synthetic("tiny", torch.float32, torch.device("cpu")), 0.1)
    level = bench_generate.head_bytes(head, 6) - bench_generate.head_bytes(head, 5)
    assert nbytes[HEADED_TREE] - nbytes[HEADED] == pytest.approx(level, rel=0.1)  # eta is rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eagle_head_errs_at_the_set_tokens_only(dtype):
    """Every row follows from its own token by a wide margin, whatever the features and the other rows are."""
    target = synthetic("tiny", dtype, torch.device("cpu"))
    head, known = eagle_head("tiny", target, 0.25), prompts(1, 128, 512, torch.device("cpu"))
    assert torch.equal(head.target_ids, known[0].sort().values)
    features = torch.randn(1, 127, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    embeds, places = target.get_input_embeddings()(known[:, :-1]), torch.arange(127)[None]
    with torch.no_grad():
        for _ in range(6):  # levels: the output is the feature of the next one
            states = head(inputs_embeds=embeds, features=features, position_ids=places).last_hidden_state
            logits = head.lm_head(head.logits_input(states))[0]
            best = logits.topk(2)
            right = head.target_ids[best.indices[:, 0]] == successors(512)[known[0, :-1]]
            assert torch.equal(right, ~wrong_share(0.25, 512)[known[0, :-1]])
            assert (best.values[right, 0] - best.values[right, 1] > 2).all()
            features = states
    assert all((weight != 0).all() for weight in head.parameters())  # dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [1, 40])
def test_a_dflash_head_errs_at_the_set_tokens_only(dtype, context):
    """Row i of a block predicts the i-th successor of the root by itself, whatever the context is."""
    target = synthetic("tiny", dtype, torch.device("cpu"))
    head, wrong = dflash_head("tiny", target, 0.25), wrong_share(0.25, 512)
    draft = draft_of(HeadCase("DFlash block", 512, context), target, head, "reference")
    roots = draft.session.context.root
    assert len(roots.unique()) == 512
    with torch.no_grad():
        logits = draft.source.logits(head.num_drafted)
    kept, token = roots != head.mask_token_id, roots
    for best in logits.argmax(-1).unbind(1):
        right, token = ~wrong[token], successors(512)[token]
        assert torch.equal((best == token)[kept], right[kept])
    dense = [weight for name, weight in head.named_parameters() if not name.endswith("bias")]
    assert all((weight != 0).float().mean() > 0.999 for weight in dense)  # few are rounded to 0


def test_a_block_is_as_large_as_published_ones():
    """z-lab's files for Qwen3-8B have 2.1 GB in bf16."""
    sizes = BLOCK_SHAPES["llama 8B"]
    hidden, heads, keys = sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"]
    layer = 2 * hidden * (heads + keys) * sizes["head_dim"] + 3 * hidden * sizes["intermediate_size"]
    assert round(2 * (sizes["num_hidden_layers"] * layer + 5 * hidden * hidden) / 1e9, 1) == 2.1
    assert (sizes["block_size"], sizes["num_hidden_layers"]) == (16, 5)


def test_a_head_is_read_at_each_level_but_for_its_first_layer():
    head = eagle_head("tiny", synthetic("tiny", torch.float32, torch.device("cpu")), 0.0)
    fc, attention, mlp = 3 * 256 * 128, (256 + 2 * 128) * (256 + 128) + 256 * 128, 3 * 256 * 128
    output, norms = 128 * 128, 256 + 3 * 128
    assert bench_generate.head_bytes(head, 5) == 4 * (fc + 5 * (attention + mlp + output + norms))


def test_chosen_cases_leave_the_others_for_a_later_run(tmp_path, capsys):
    cases, measured = [Case(name, ()) for name in ("a", "b", "c")], []
    run = bench(tmp_path, name="generate")
    assert run.run(lambda _, case: measured.append(case.name), [], [], cases, ["a", "x"]) == 2
    assert "no case x; the cases are a, b, c" in capsys.readouterr().err and not measured
    for chosen, left in ((["c", "a"], 1), (["a"], 1), (None, 0)):
        run = bench(tmp_path, name="generate")
        assert run.run(lambda _, case: measured.append(case.name), [], [], cases, chosen) == 0
        assert run.state["left"] == left and run.state["complete"] == (not left)
    assert measured == ["a", "c", "b"]
