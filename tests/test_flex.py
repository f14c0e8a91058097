"""FlexAttention's mask against the oracle's, block by block; its kernel runs on GPUs alone."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from attention_cases import LAYOUTS, Lengths, packed, random_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

from models.attention import flex
from models.attention.dense import DenseAttention, prefix_lm_mask


@settings(max_examples=60)
@given(drawn=LAYOUTS, block=st.sampled_from([4, 16]))
@example(drawn=([(300, 100), (20, 0)], 41), block=128)
def test_flex_mask_is_the_oracles(drawn: tuple[Lengths, int], block: int) -> None:
    layout, num_rows = packed(*drawn)
    with patch.object(flex, "BLOCK", block):
        blocks = flex.prefix_lm_block_mask(layout, num_rows)
    visible = prefix_lm_mask(layout, num_rows)
    of_mask_mod = create_mask(blocks.mask_mod, None, None, num_rows, num_rows, device="cpu")
    assert torch.equal(of_mask_mod[0, 0], visible)
    assert blocks.full_kv_num_blocks is not None and blocks.full_kv_indices is not None
    partial = listed_blocks(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed_blocks(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    gap = len(partial) * block - num_rows
    tiled = F.pad(visible, (0, gap, 0, gap))
    tiled = tiled.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [N, block, N, block]
    assert torch.equal(full, tiled.all(3).all(1))
    assert torch.equal(partial | full, tiled.any(3).any(1))


def listed_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """[N, N] bool: which blocks a BlockMask lists."""
    num_blocks = counts.shape[-1]
    listed = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for row in range(num_blocks):
        listed[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    return listed


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_agrees_with_the_oracle_forward() -> None:
    layout, num_rows = packed([(50, 30), (3, 0), (20, 60)], 20)
    rows = [tensor.detach() for tensor in random_rows(num_rows, 3)]
    # Not compiled: Triton needs a GPU. Nor is there a backward pass on CPU.
    with patch.object(flex, "compiled_flex_attention", lambda: flex_attention):
        found = flex.FlexAttention().prepare(layout, num_rows).attend(*rows)
    wanted = DenseAttention().prepare(layout, num_rows).attend(*rows)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
