"""N-grams of normalised words as 64-bit hashes, and the set of those that are looked for.

Words are letters and digits, case-folded (NFKC); a character of Chinese, Japanese or Korean writing
is a word of its own. A text with fewer than n words counts as one n-gram of all its words.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Int64s = NDArray[np.int64]
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts without spaces
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])[^\W_])+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: a factor loses no bits
_CACHED_WORDS = 2**20
_FILTER_BITS = 26  # 64 MiB: most n-grams of training data are told apart by one look


class WordHashes(dict[str, int]):
    """The hash of each word, remembered for a while."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        self[word] = value = _hash(word)
        return value


def words_of(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def hash_whole(words: Sequence[str]) -> int:
    """Of a text as a whole."""
    return _hash(" ".join(words))


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest)


def hash_words(words: Sequence[str], cache: WordHashes) -> Hashes:
    """[words]"""
    return np.fromiter((cache[word] for word in words), np.uint64, len(words))


def hash_ngrams(words: Hashes, n: int) -> Hashes:
    """Of every n neighbouring words: [max(0, words - n + 1)]."""
    count = max(0, len(words) - n + 1)
    total = np.full(count, n, np.uint64)
    for offset in range(n):
        total *= _BASE
        total += words[offset : offset + count]
        total ^= total >> np.uint64(29)
    return total


@dataclass(frozen=True, slots=True)
class NgramSet:
    """N-grams to look for, by number."""

    hashes: Hashes  # [k], sorted, all different
    lengths: tuple[int, ...]  # how many words they have
    is_possible: NDArray[np.bool_]  # [2**_FILTER_BITS], by the lowest bits of a hash

    @classmethod
    def of(cls, hashes: Iterable[Hashes], lengths: Iterable[int]) -> NgramSet:
        every = list(hashes)
        unique = np.unique(np.concatenate(every)) if every else np.empty(0, np.uint64)
        is_possible = np.zeros(2**_FILTER_BITS, np.bool_)
        is_possible[_low_bits(unique)] = True
        return cls(unique, tuple(sorted(set(lengths))), is_possible)

    def numbers(self, hashes: Hashes) -> Int64s:
        """The numbers of n-grams that are in the set."""
        return np.searchsorted(self.hashes, hashes)

    def find(self, words: Hashes, text_numbers: Int64s) -> tuple[Int64s, Int64s]:
        """The n-grams of several texts that are in the set: numbers, and the texts they stand in.

        `words` [words] are those of all texts in a row, `text_numbers` [words] rise with them. No
        n-gram reaches from one text into the next.
        """
        numbers, texts = [], []
        for n in self.lengths:
            hashes = hash_ngrams(words, n)
            if not len(hashes):
                continue
            starts = text_numbers[: len(hashes)]
            is_within = starts == text_numbers[n - 1 :]
            at = np.flatnonzero(self.is_possible[_low_bits(hashes)] & is_within)
            places = np.minimum(self.numbers(hashes[at]), len(self.hashes) - 1)
            is_found = self.hashes[places] == hashes[at]
            numbers.append(places[is_found])
            texts.append(starts[at[is_found]])
        if not numbers:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate(numbers), np.concatenate(texts)


def _low_bits(hashes: Hashes) -> Int64s:
    return (hashes & np.uint64(2**_FILTER_BITS - 1)).astype(np.int64)
