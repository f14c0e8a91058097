"""Merges of a BPE vocabulary that comes as tokens with ranks, without its merges."""

from __future__ import annotations

from collections.abc import Mapping


def merges_of(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Each pair of tokens that makes a token, in the order of the ranks made; of several pairs for
    one token, first those of low ranks. Nothing makes a token of one character."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:index], token[index:]) for index in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges
