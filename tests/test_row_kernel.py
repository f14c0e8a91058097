"""The kernel of decoding on CPUs computes what torch's attention does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inference.row_kernel import BLOCK, NumbaRowKernel

NUM_ROWS, NUM_BLOCKS = 5, 3
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17)  # with the new token


def random_step(
    num_heads: int, head_size: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Query, key and value as parts of one projection; keys and values [B + 1, L, H, K]."""
    query, key, value = torch.randn(NUM_ROWS, 3, num_heads, head_size).unbind(1)
    keys, values = torch.randn(2, NUM_ROWS + 1, NUM_BLOCKS * BLOCK, num_heads, head_size)
    return (query, key, value), keys, values


def in_blocks(kernel: NumbaRowKernel, cache: Tensor) -> Tensor:
    """[B + 1, L, H, K] as the kernel wants it."""
    blocks = cache.unflatten(1, (NUM_BLOCKS, BLOCK)).permute(0, 1, 3, 4, 2)
    return kernel.zeros(*blocks.shape).copy_(blocks)


@pytest.mark.parametrize(("num_heads", "head_size"), [(4, 16), (1, 4), (2, 128), (3, 20)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_it_equals_torch(
    num_heads: int, head_size: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    (query, key, value), keys, values = random_step(num_heads, head_size)
    query *= 3  # weights that differ
    kernel = NumbaRowKernel()
    blocks = in_blocks(kernel, keys), in_blocks(kernel, values)
    positions = torch.tensor(LENGTHS) - 1
    found = kernel.attend((query, key, value), *blocks, positions)
    for row, length in enumerate(LENGTHS):
        keys[row, length - 1], values[row, length - 1] = key[row], value[row]
        seen, mixed = (cache[row, :length].transpose(0, 1) for cache in (keys, values))
        wanted = F.scaled_dot_product_attention(query[row][:, None], seen, mixed)[:, 0]
        torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=0)
    assert torch.equal(blocks[0], in_blocks(kernel, keys))  # nothing else was written
    assert torch.equal(blocks[1], in_blocks(kernel, values))


def test_what_lies_beyond_a_row_is_never_read() -> None:
    (query, key, value), keys, values = random_step(2, 8)
    kernel = NumbaRowKernel()
    positions = torch.tensor(LENGTHS) - 1
    expected = kernel.attend(
        (query, key, value), in_blocks(kernel, keys), in_blocks(kernel, values), positions
    )
    for row, length in enumerate(LENGTHS):
        keys[row, length:] = values[row, length:] = float("nan")
    found = kernel.attend(
        (query, key, value), in_blocks(kernel, keys), in_blocks(kernel, values), positions
    )
    assert torch.equal(found, expected)


def test_scores_far_apart_do_not_overflow() -> None:
    kernel = NumbaRowKernel()
    keys, values = torch.zeros(2, 2, BLOCK, 1, 4)
    keys[0, 0], keys[0, 1] = 1e4, -1e4
    values[0, 0], values[0, 1] = 3.0, 5.0
    query = torch.full((1, 1, 4), 1e3)
    keys, values = (cache.permute(0, 2, 3, 1)[:, None].contiguous() for cache in (keys, values))
    new = query, torch.zeros(1, 1, 4), query
    mixed = kernel.attend(new, keys, values, torch.tensor([2]))
    torch.testing.assert_close(mixed, torch.full((1, 1, 4), 3.0), atol=1e-6, rtol=0)
