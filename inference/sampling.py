"""How the next tokens are chosen from their logits, and how likely they were.

What a row draws depends on its logits, its settings, its seed and the number of its token alone:
the random number comes from a hash of the last two, so no row has a generator to keep.
Shapes: B rows, V vocabulary, N rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.requests import MIXING, STEP, WORD, Sampling

FRACTION_BITS = 24  # of a float32; numbers in [0, 1) are multiples of 2^-24


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows that are sampled, with their settings; all others are greedy."""

    rows: Tensor  # [N] int64
    temperature: Tensor  # [N] fp32
    top_k: Tensor  # [N] int64
    top_p: Tensor  # [N] fp32
    seeds: Tensor  # [N] int64

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> SampledRows | None:
        """None where all rows are greedy."""
        rows = [row for row, each in enumerate(samplings) if each.temperature > 0]
        if not rows:
            return None
        sampled = [samplings[row] for row in rows]
        most = torch.iinfo(torch.int64).max
        return cls(
            torch.tensor(rows, device=device),
            torch.tensor([each.temperature for each in sampled], device=device),
            torch.tensor([min(each.top_k or most, most) for each in sampled], device=device),
            torch.tensor([each.top_p for each in sampled], device=device),
            torch.tensor([_signed(each.seed) for each in sampled], device=device),
        )


def next_tokens(
    logits: Tensor,
    sampled: SampledRows | None = None,
    token_numbers: Tensor | None = None,
    *,
    id_limit: int | None = None,
) -> Tensor:
    """The token that follows in each row, [B, V] -> [B] int64.

    `token_numbers` [B] int64 says how many tokens each answer has; only samples need it. They are
    drawn from the ids below `id_limit` (None: all).
    """
    tokens = logits.argmax(-1)
    if sampled is None:
        return tokens
    assert token_numbers is not None
    rows = sampled.rows
    uniform = uniform_numbers(sampled.seeds, token_numbers[rows])
    return tokens.index_copy(0, rows, _draw(logits[rows, :id_limit].float(), sampled, uniform))


def _draw(logits: Tensor, sampled: SampledRows, uniform: Tensor) -> Tensor:
    """Inverts the cumulative distribution of what `sampled` leaves, the likeliest token first."""
    # Stable: among equals the lower id comes first, as with argmax.
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    scaled = (values - values[:, :1]) / sampled.temperature[:, None]
    probabilities = scaled.softmax(-1)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = probabilities.masked_fill(rank >= sampled.top_k[:, None], 0.0)
    up_to = probabilities.cumsum(-1)  # [N, V]
    enough = up_to[:, -1:] * sampled.top_p[:, None]
    is_kept = (up_to - probabilities < enough) & (probabilities > 0)
    is_kept[:, 0] = True  # whatever the rounding
    num_kept = is_kept.sum(-1, keepdim=True)
    total = up_to.gather(-1, num_kept - 1)
    place = (up_to <= uniform[:, None] * total).sum(-1, keepdim=True)
    return ids.gather(-1, place.minimum(num_kept - 1)).squeeze(-1)


def likely_tokens(
    logits: Tensor, chosen: Tensor, num_likely: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Probabilities of the model itself: of `chosen` [B], and of the likeliest tokens of each row,
    the likeliest first, from logits [B, V]."""
    probabilities = logits.float().softmax(-1)
    of_chosen = probabilities.gather(-1, chosen[:, None]).squeeze(-1).tolist()
    values, ids = probabilities.topk(min(num_likely, logits.shape[-1]), dim=-1)
    likely = [
        list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return of_chosen, likely


def uniform_numbers(seeds: Tensor, token_numbers: Tensor) -> Tensor:
    """Numbers in [0, 1), fp32: the SplitMix64 hash of each seed and token number, both [N]."""
    bits = _mixed(_mixed(seeds) + (token_numbers + 1) * _signed(STEP))
    return _shifted(bits, 64 - FRACTION_BITS).float() * 2.0**-FRACTION_BITS


def _mixed(words: Tensor) -> Tensor:
    """`mixed_bits` of int64, whose products wrap around as those of unsigned words do."""
    for shift, factor in MIXING:
        words = (words ^ _shifted(words, shift)) * _signed(factor)
    return words


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros: torch fills with the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    word &= WORD
    return word - (1 << 64) if word >> 63 else word
