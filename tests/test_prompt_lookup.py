"""Prompt lookup: its drafts on the host and on the device."""

import numpy as np
import pytest
import torch

import specdec_triton as sdt
from families import NEVER, build, prompt
from helpers import context
from specdec_triton.drafters.prompt_lookup import _matches
from specdec_triton.ops.reference import Acceptance
from specdec_triton.tools.host_sync import count_host_reads


def test_matches_are_the_longest_first_then_the_earliest():
    text = np.array([1, 2, 3, 9, 2, 3, 8, 1, 2, 3, 7, 1, 2, 3])
    assert _matches(text, 3, 9) == ([2, 9, 5], 3)
    assert _matches(text, 2, 9) == ([2, 5, 9], 2)
    assert _matches(text, 1, 2) == ([2, 5], 1)
    assert _matches(np.array([4]), 3, 1) == _matches(np.array([4, 5]), 3, 1) == ([], 0)
    assert _matches(np.array([4, 4]), 3, 1) == ([0], 1)


def test_lookup_copies_the_continuation():
    session = sdt.PromptLookupDrafter(num_tokens=3).start(context([[5, 6, 7, 8, 9, 5, 6]]))
    tree = session.draft()
    assert tree.tokens.tolist() == [[6, 7, 8, 9]] and tree.is_chain
    assert session.max_nodes == 4


def test_lookup_branches_share_common_prefixes():
    rows = [[5, 1, 2, 3, 5, 1, 4, 3, 5], [7, 8, 9]]
    tree = sdt.PromptLookupDrafter(num_tokens=3, branches=2, adaptive=False).start(context(rows)).draft()
    assert tree.tokens[0].tolist() == [5, 1, 4, 3, 2, 3, 0, 0]  # padded to a multiple of 4
    # no match in the second row, so it is padding
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 1, 4, -1, -1], [-1] * 8]
    tree.check(torch.tensor([5, 9]), 100, "lookup")


def test_no_match_is_no_draft():
    tree = sdt.PromptLookupDrafter().start(context([[1, 2, 3]])).draft()
    assert tree.num_nodes == 1


def test_lookup_does_not_match_padding_and_stops_at_the_budget():
    assert sdt.PromptLookupDrafter().start(context([[0]], start=5)).draft().num_nodes == 1
    eager = sdt.PromptLookupDrafter(adaptive=False)
    assert eager.start(context([[1, 2, 3, 4, 1]], budget=3)).draft().tokens.tolist() == [[1, 2, 3, 0]]  # then padding
    assert eager.start(context([[1, 2, 1]], budget=1)).draft().num_nodes == 1


def test_lookup_drafts_where_matches_of_such_a_length_have_paid():
    phrase = [5, 6, 7, 8]
    now = context([[*phrase, 1, 2, 3, 20, *phrase]], budget=400, max_length=400)

    def after(*tokens):
        """The width of the draft after the target has emitted `tokens` in one round."""
        now.host_tokens[0, now.host_length[0] + 1 :][: len(tokens)] = tokens
        now.host_length = now.host_length + len(tokens)
        return session.draft().num_nodes

    session = sdt.PromptLookupDrafter(num_tokens=3).start(now)
    assert session.draft().num_nodes == 4  # a match of four tokens
    assert after(5) == 4 and after(60) == 1  # a match of one token, whose draft is rejected
    assert after(5) == 1  # matches of one token are skipped now
    assert after(6) == 4  # a longer match is drafted
    tries = 0
    while after(5) == 1 and tries < 99:  # after a few skips, the short match is tried again
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


def accepted_in(tree, length):
    """The `Acceptance` of a round with this number of accepted tokens in each row."""
    return Acceptance(
        path=torch.full((len(length), tree.max_depth), -1, dtype=torch.int32),
        length=length,
        next_ids=torch.zeros_like(length),
        has_nan=torch.zeros_like(length, dtype=torch.bool),
    )


def say(now, count, random, alphabet):
    """Let the target emit this number of tokens in each row, on the host and on the device."""
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
        ({"num_tokens": 4, "branches": 40, "max_ngram": 1}, None),
        ({"num_tokens": 4, "branches": 2, "max_ngram": 99}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lookups_on_device_and_host_agree(options, asked, impl):
    """The drafts are equal node for node, at a constant width and without host reads, over rounds with accepted and
    rejected drafts."""
    random, lookup, drafted = np.random.default_rng(0), sdt.PromptLookupDrafter(**options), 0
    for alphabet in (1, 2, 3, 9):
        texts = [random.integers(0, alphabet, length).tolist() for length in (2, 9, 30, 17)]
        now = context(texts, start=5, budget=99)
        now.start.copy_(torch.tensor([5, 7, 5, 21]))  # the text of the last row has one token
        now.tokens.masked_fill_(torch.arange(65) > now.length[:, None], 0)
        host = lookup.start(now, asked)
        now.fixed_shapes, now.impl = True, impl
        device = lookup.start(now, asked)
        assert device.on_device and not host.on_device
        for number in range(8):
            limit = sdt.Topology.chain(number - 2) if number % 3 == 2 else None
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
