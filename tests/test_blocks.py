"""The layout of a forward over text rows and a block."""

import pytest
import torch

from specdec_triton.drafters.blocks import layout_of
from specdec_triton.ops.reference import pack_bits


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_text", "num_block"), [(1, 1), (3, 5), (16, 16), (60, 9), (64, 64), (70, 3)])
def test_rows_see_the_valid_text_and_the_block(num_text, num_block, causal):
    layout = layout_of(num_text, num_block, causal, torch.device("cpu"))
    total = num_text + num_block
    text = torch.ones(num_text, total).tril().bool()
    assert torch.equal(layout.text_words[0], pack_bits(text))
    for count in (0, 1, num_text):
        block = torch.zeros(num_block, total, dtype=torch.bool)
        block[:, :count] = True
        block[:, num_text:] = torch.ones(num_block, num_block).tril().bool() if causal else True
        assert torch.equal(layout.seen_text[count] | layout.seen_block, pack_bits(block))
    assert layout.text_depth.tolist() == [list(range(num_text))]
    assert layout.offsets.tolist() == [list(range(num_block))]
