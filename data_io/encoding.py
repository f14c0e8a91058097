"""Rows of source files -> records -> examples, in batches; what becomes of each row is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_io.examples import Example, ExampleEncoder
from data_io.records import BadRowError, Conversation, Document, Record
from data_io.source_files import RawRow

BATCH_ROWS, BATCH_CHARS = 1024, 2**22  # encoded together
TOO_LONG = "longer than the context"
NOT_LEARNED = "nothing to learn"


@dataclass(slots=True)
class Tally:
    """What became of rows; of what was dropped, how much and the first of each kind."""

    num_rows: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)
    longest: int = 0  # tokens of the longest example, those too long included
    longest_at: str = ""

    def drop(self, reason: str, where: str, detail: str = "") -> None:
        self.dropped[reason] += 1
        self.firsts.setdefault(reason, f"{where} ({detail})" if detail else where)

    def measure(self, num_tokens: int, where: str) -> None:
        if num_tokens > self.longest:
            self.longest, self.longest_at = num_tokens, where

    def lines(self) -> list[str]:
        """What was dropped, a line for each reason."""
        return [
            f"dropped {count:,}: {reason}; the first: {self.firsts[reason]}"
            for reason, count in sorted(self.dropped.items())
        ]


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Makes examples of rows. Those of `limit` tokens and more are left out and counted."""

    encoder: ExampleEncoder
    to_record: Callable[[Mapping[str, Any]], Record]
    limit: int
    tally: Tally

    def records(self, rows: Iterable[RawRow]) -> Iterator[tuple[str, Record]]:
        """Each row's place and its record. ValueError names the row whose condition is unknown."""
        for row in rows:
            self.tally.num_rows += 1
            try:
                record = self.to_record(row.fields)
                if not isinstance(record, Document):
                    self.encoder.condition_ids(record.condition)
            except BadRowError as error:
                self.tally.drop(error.reason, row.where, error.detail)
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from None
            else:
                yield row.where, record

    def encoded(
        self, placed: Iterable[tuple[str, Record]]
    ) -> Iterator[tuple[Record, list[Example]]]:
        """The examples of each record that makes some, in order."""
        for batch in _batches(placed):
            places, records = zip(*batch, strict=True)
            for where, record, examples in zip(
                places, records, self.encoder.encode(records), strict=True
            ):
                kept = self._kept(where, examples)
                if kept:
                    yield record, kept

    def _kept(self, where: str, examples: list[Example]) -> list[Example]:
        if not examples:
            self.tally.drop(NOT_LEARNED, where)
        kept = []
        for example in examples:
            self.tally.measure(len(example), where)
            if len(example) >= self.limit:
                self.tally.drop(TOO_LONG, where, f"{len(example)} tokens")
            elif len(example.resp_ids) < 2:  # such as white space that a normalizer takes away
                self.tally.drop("empty response", where)
            else:
                self.tally.num_examples += 1
                self.tally.num_tokens += len(example)
                kept.append(example)
        return kept


def first_question(record: Record) -> str:
    """By which rows on the same question are known: duplicates share it."""
    if isinstance(record, Document):
        return record.text
    if isinstance(record, Conversation):
        return (
            f"{record.system}\n\n{record.turns[0].text}"
            if record.system
            else (record.turns[0].text)
        )
    return record.instruction


def _batches(placed: Iterable[tuple[str, Record]]) -> Iterator[list[tuple[str, Record]]]:
    batch: list[tuple[str, Record]] = []
    num_chars = 0
    for where, record in placed:
        batch.append((where, record))
        num_chars += _length(record)
        if len(batch) == BATCH_ROWS or num_chars > BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _length(record: Record) -> int:
    if isinstance(record, Document):
        return len(record.text)
    if isinstance(record, Conversation):
        return sum(len(turn.text) for turn in record.turns)
    return len(record.instruction) + len(record.response)
