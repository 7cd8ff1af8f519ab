"""Traces: their contents, that texts do not change, and replays compared with runs of the other trees."""

import json

import pytest
import torch

import specdec_triton as sdt
import tiny
from families import add_noise
from specdec_triton.tools import trace
from specdec_triton.tools.trace import TracedCall, TracingDrafter, ranked, read_trace, replay

WIDE = sdt.Topology.from_widths((3, 2, 2))
NARROW = [sdt.Topology.chain(3), sdt.Topology.from_widths((2, 2)), sdt.Topology.from_paths([(2,), (0, 1, 0), (1,)])]


@pytest.fixture(scope="module")
def pair():
    """A draft that is often right: the target with noise on its weights."""
    return tiny.model(), add_noise(tiny.model(), 0.07)


def decode(target, drafter, batch=2, tokens=60, **options):
    ids = torch.arange(3, 3 + 6 * batch).view(batch, 6)
    with sdt.patched(target, drafter=drafter, **options):
        text = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, eos_token_id=None,
            do_sample="rule" in options,
        )  # fmt: skip
    return text, sdt.stats(target)


def test_a_traced_drafter_keeps_outputs(pair, tmp_path):
    suffix = sdt.SuffixDrafter()
    decode(pair[0], TracingDrafter(suffix, tmp_path / "trace"))
    assert suffix.history.num_texts == 2


def test_a_trace_has_every_round_and_changes_nothing(pair, tmp_path):
    target, draft = pair
    drafter = sdt.ModelDrafter(draft, tree=WIDE)
    text, stats = decode(target, drafter)
    rounds, length = stats.rounds, stats.acceptance_length
    traced, stats = decode(target, TracingDrafter(drafter, tmp_path / "trace"))
    assert torch.equal(traced, text) and (stats.rounds, stats.acceptance_length) == (rounds, length)
    header, *lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert header == {"call": "ModelDrafter", "rule": "greedy", "batch": 2}
    assert [line["round"] for line in lines] == list(range(rounds))
    assert (lines[0]["nodes"], lines[0]["depth"], lines[0]["sampling"]) == (WIDE.num_nodes, 3, "none")
    (row, _) = lines[0]["rows"]
    assert row["position"] == 6 and row["parents"] == list(WIDE.parents) and row["depths"] == list(WIDE.depths)
    assert set(lines[0]["ms"]) == {"draft", "verify_accept"} and set(lines[1]["ms"]) > set(lines[0]["ms"])
    (call,) = read_trace(tmp_path / "trace")
    assert call.acceptance_length == pytest.approx(length) and length > 1.5
    # the prompt's own forward emits the first of each row's tokens
    assert [len(ranks) for ranks in call.ranks] == [59, 59]


def test_a_wide_trace_says_what_narrower_trees_accept(pair, tmp_path):
    target, draft = pair
    decode(target, TracingDrafter(sdt.ModelDrafter(draft, tree=WIDE), tmp_path / "trace"))
    calls = read_trace(tmp_path / "trace")
    again = replay(calls, WIDE)
    assert again.least == pytest.approx(calls[0].acceptance_length)
    lengths = set()
    for topology in NARROW:
        _, stats = decode(target, sdt.ModelDrafter(draft, tree=topology))
        found = replay(calls, topology)
        # candidates beyond the leaves of the wide tree were never drafted, so they are unknown
        assert found.least <= stats.acceptance_length <= found.most < 1.5 * found.least
        lengths.add(round(found.least, 3))
    assert len(lengths) > 1


def test_replays_by_hand():
    """Ranks 0, 1, a miss of two candidates, then an unknown (a leaf was the last)."""
    call = TracedCall("D", "greedy", [{"sampling": "none", "rows": [0]}], [[(0, 2), (1, 2), (None, 2), (None, 0)]])
    chain, tree = sdt.Topology.chain(2), sdt.Topology.from_widths((2, 1))
    found = replay(call, chain)  # 0 | 1 after one accepted; then a miss; then unknown
    assert (found.rounds, found.least, found.most) == (3, 4 / 3, 4 / 3)
    found = replay(call, tree)  # rank 1 below the first is no child of this tree; the second round has it
    assert (found.rounds, found.least) == (3, 4 / 3)
    assert replay(call, sdt.Topology.from_widths((2, 2))).rounds == 2
    # a third candidate was never drafted: it may have been right
    found = replay(call, sdt.Topology.from_widths((3, 3, 3)))
    assert (found.rounds, found.least, found.most) == (2, 2.0, 4.0)


def test_the_rank_of_a_token_among_its_siblings():
    parents, tokens = [-1, 0, 0, 1, -1], [5, 7, 8, 9, 8]
    assert ranked(parents, tokens, 0, 8) == (1, 2) and ranked(parents, tokens, 0, 9) == (None, 2)
    assert ranked(parents, tokens, 3, 9) == (None, 0)


def test_drawn_trees_carry_their_entropy_and_are_not_replayed(pair, tmp_path):
    target, draft = pair
    file = tmp_path / "trace"
    options = {"rule": "multi_round", "seed": 0}
    decode(target, TracingDrafter(sdt.ModelDrafter(draft, tree=WIDE), file), tokens=8, **options)
    row = json.loads(file.read_text().splitlines()[1])["rows"][0]
    assert len(row["entropy"]) == 10 and 0 < row["entropy"][0] < 6  # the nodes that have children
    with pytest.raises(ValueError, match=r"replay: trees must be chosen without sampling, got without"):
        replay(read_trace(file), WIDE)


def test_finished_rows_are_left_out(pair, tmp_path):
    target, draft = pair
    text, _ = decode(target, sdt.ModelDrafter(draft, tree=WIDE))
    first_only = next(t for t in text[0, 20:].tolist() if t not in text[1].tolist())
    ids = torch.arange(3, 15).view(2, 6)
    with sdt.patched(target, drafter=TracingDrafter(sdt.ModelDrafter(draft, tree=WIDE), tmp_path / "trace")):
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, eos_token_id=first_only)
    (call,) = read_trace(tmp_path / "trace")
    emitted = 1 + text[0, 6:].tolist().index(first_only)
    assert [len(ranks) for ranks in call.ranks] == [emitted - 1, 59]


@pytest.mark.parametrize("line", ["{}", "[", '{"round": 0, "rows": []}', '{"call": "D"}'])
def test_what_is_no_trace_is_refused(line, tmp_path):
    file = tmp_path / "trace"
    file.write_text(line + "\n" + line)
    with pytest.raises(
        ValueError, match="read_trace: every line must be a call or a round of one, got line 1 of trace"
    ):
        read_trace(file)


def test_misuse_is_refused(tmp_path):
    with pytest.raises(ValueError, match="TracingDrafter: drafter must be a Drafter, got int"):
        TracingDrafter(3, tmp_path / "trace")
    with pytest.raises(ValueError, match="replay: the trace must hold at least one round, got none"):
        replay([], WIDE)
    assert trace.TracedCall("D", "greedy").acceptance_length == 0.0
