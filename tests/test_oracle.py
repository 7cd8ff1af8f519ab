"""The oracle's error rate, and its drafts on and off the text."""

import pytest
import torch

import specdec_triton as sdt
from helpers import TREES, context


def test_the_oracle_errs_at_its_rate():
    """If it makes no error, one child of each node on the true path carries the text, at any rank."""
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
def test_the_oracle_drafts_the_requested_tree(fixed):
    text = torch.arange(40)[None]
    now = context([list(range(10))], budget=3, max_length=40)
    now.fixed_shapes = fixed
    session = sdt.OracleDrafter(text, tree=TREES["skipping"]).start(now)
    key = session.prepare(sdt.Topology.chain(6))
    shown = 6 if fixed else 2  # only the host knows that deeper tokens are not needed
    assert session.draft().tokens.tolist() == [list(range(9, 10 + shown))]
    assert session.prepare(sdt.Topology.chain(6)) == key != session.prepare()
    assert session.draft().num_nodes == (7 if fixed else 6)
