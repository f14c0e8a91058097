"""Packed rows for the tests of attention: awkward ones, and how to draw any."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from models.batch import PackedLayout

HEADS, HEAD_SIZE = 2, 8
Lengths = list[tuple[int, int]]  # (prefix, causal part) of each sequence

# lengths of the sequences, and rows of padding
AWKWARD: dict[str, tuple[Lengths, int]] = {
    "usual": ([(3, 4), (5, 2), (1, 6)], 3),
    "no padding": ([(3, 4), (5, 2)], 0),
    "only padding": ([], 7),
    "no responses": ([(3, 0), (5, 0)], 2),
    "one-token responses": ([(3, 1), (5, 1)], 2),
    "no prefixes": ([(0, 4), (0, 1), (0, 9)], 2),
    "one-token sequences": ([(1, 0), (0, 1), (1, 0)], 1),
    "an empty sequence": ([(2, 2), (0, 0), (2, 2)], 0),
    "long prefix": ([(40, 1), (1, 2)], 30),
    "much padding": ([(1, 1)], 60),
}
LAYOUTS = st.tuples(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6), st.integers(0, 40)
).filter(lambda drawn: sum(map(sum, drawn[0])) + drawn[1] > 0)


def packed(lengths: Lengths, padding: int, unused_slots: int = 2) -> tuple[PackedLayout, int]:
    """A layout of these sequences, and its number of rows."""
    prefix_lens = torch.tensor([prefix for prefix, _ in lengths], dtype=torch.int32)
    causal_lens = torch.tensor([causal for _, causal in lengths], dtype=torch.int32)
    layout = PackedLayout.from_lengths(prefix_lens, causal_lens, len(lengths) + unused_slots)
    return layout, int(layout.num_tokens) + padding


def random_rows(num_rows: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return [
        torch.randn(num_rows, HEADS, HEAD_SIZE, generator=generator, requires_grad=True)
        for _ in range(count)
    ]
