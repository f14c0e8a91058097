"""Which records are held out: by a digest of their question, so duplicates stay on one side."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from data_io.encoding import first_question
from data_io.records import Record

DIGESTS = 2**64


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Holds out the records whose digest is below `threshold`; another seed takes others."""

    threshold: int
    seed: int

    @classmethod
    def share(cls, share: float, seed: int) -> HeldOut:
        """About this share of the questions, 0 to 1."""
        return cls(int(share * DIGESTS), seed)

    @classmethod
    def count(cls, count: int, seed: int, records: Iterable[Record]) -> HeldOut:
        """So many of these records, and all further ones on the same questions."""
        digests = heapq.nsmallest(count, (digest(record, seed) for record in records))
        return cls(digests[-1] + 1 if digests else 0, seed)

    def has(self, record: Record) -> bool:
        return digest(record, self.seed) < self.threshold


def digest(record: Record, seed: int) -> int:
    """A number below DIGESTS, the same for all records on a question."""
    key = seed.to_bytes(16, "little")
    text = first_question(record).strip().encode()
    return int.from_bytes(blake2b(text, digest_size=8, key=key).digest(), "little")
