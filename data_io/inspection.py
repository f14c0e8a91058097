"""What is in tokenized or sampled data, as numbers: lengths, conditions, endings, duplicates.

Lengths are counted over all rows. What needs the tokens themselves is looked at in up to
`LOOKED_AT` rows, spread over the data: memory and time stay flat however large it is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_io.checks import prompt_format
from data_io.examples import Example
from data_io.prompt_format import PromptFormat
from data_io.sampled_checks import parts_of
from data_io.sampled_format import INDEX_NAMES, EpochIndex, IntArray, SampledData
from data_io.tokenized_format import TokenizedSource, read_tokenizer_info, tokenized_folders
from multipack_sampler import count_epoch

LOOKED_AT = 100_000  # rows
PACKED = 2_000_000  # rows, from the first on
MOST_CONDITIONS = 4  # of one row

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shelf:
    """Rows that share an array of tokens: a tokenized source, or an epoch."""

    name: str
    tokens: IntArray
    scored: IntArray | None
    index: EpochIndex
    first: int  # the number of its first row among those of all shelves

    def example(self, row: int) -> Example:
        inst, inst_len, resp, resp_len = (int(getattr(self.index, n)[row]) for n in INDEX_NAMES)
        scored = None if self.scored is None else self.scored[resp : resp + resp_len].tolist()
        return Example(
            self.tokens[inst : inst + inst_len].tolist(),
            self.tokens[resp : resp + resp_len].tolist(),
            scored,
        )


@dataclass(frozen=True, slots=True)
class Shelves:
    """All rows of a folder, numbered through: of a sampled one those of one epoch, in order."""

    folder: Path
    kind: str  # "sampled", "tokenized"
    shelves: tuple[Shelf, ...]
    form: PromptFormat | None  # None: the tokenizer is not here
    num_epochs: int | None
    max_seq_len: int | None

    @classmethod
    def of_sampled(cls, folder: Path, epoch: int) -> Shelves:
        data = SampledData.open(folder)
        if epoch >= data.num_epochs:
            last = data.num_epochs - 1
            raise ValueError(f"epoch={epoch} is not in {folder}; use one from 0 to {last}")
        shelf = Shelf(f"epoch_{epoch}", data.tokens(), data.scored(), data.epoch(epoch), 0)
        form = prompt_format(data.metadata.tokenizer_info, folder)
        return cls(folder, "sampled", (shelf,), form, data.num_epochs, data.metadata.max_seq_len)

    @classmethod
    def of_tokenized(cls, folder: Path) -> Shelves:
        shelves: list[Shelf] = []
        first = 0
        for place in tokenized_folders(folder):
            source = TokenizedSource.open(place)
            source.check()
            index = EpochIndex(*(getattr(source, name) for name in INDEX_NAMES))
            shelves.append(Shelf(source.name, source.tokens, source.scored, index, first))
            first += len(source)
        if not first:
            raise ValueError(f"{folder} holds no row; tokenize sources that have some")
        form = prompt_format(read_tokenizer_info(folder), folder)
        return cls(folder, "tokenized", tuple(shelves), form, None, None)

    def __len__(self) -> int:
        return self.shelves[-1].first + len(self.shelves[-1].index)

    def place_of(self, row: int) -> tuple[Shelf, int]:
        """The shelf of a row, and its number there."""
        if not 0 <= row < len(self):
            raise ValueError(
                f"examples={row} is not one of the {len(self):,} of {self.folder}; use 0 to "
                f"{len(self) - 1}"
            )
        shelf = next(shelf for shelf in reversed(self.shelves) if shelf.first <= row)
        return shelf, row - shelf.first


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many rows have so many tokens, by the number of tokens."""

    counts: Int64s

    @classmethod
    def of(cls, parts: Sequence[Int64s]) -> Lengths:
        size = max((len(part) for part in parts), default=0)
        counts = np.zeros(size, np.int64)
        for part in parts:
            counts[: len(part)] += part
        return cls(counts)

    @property
    def tokens(self) -> int:
        return int((self.counts * np.arange(len(self.counts))).sum())

    @property
    def mean(self) -> float:
        return self.tokens / max(1, int(self.counts.sum()))

    def quantile(self, share: float) -> int:
        """The shortest length that at least this share of all rows do not exceed."""
        total = self.counts.cumsum()
        return int(np.searchsorted(total, share * total[-1]))

    def bins(self) -> list[tuple[int, int, int, int]]:
        """(from, to, rows, tokens) by doubling length, without the empty ends."""
        found, low = [], 1
        while low < len(self.counts):
            high = 2 * low - 1
            part = self.counts[low : high + 1]
            tokens = int((part * np.arange(low, low + len(part))).sum())
            found.append((low, high, int(part.sum()), tokens))
            low = high + 1
        while found and not found[0][2]:
            found.pop(0)
        return found


@dataclass(frozen=True, slots=True)
class Packing:
    """How rows fill batches."""

    batch_tokens: int  # of all ranks
    num_rows: int  # that were packed
    num_batches: int
    padding_share: float


@dataclass(frozen=True, slots=True)
class Overview:
    """What is in a folder."""

    lengths: Lengths
    inst_lengths: Lengths
    resp_lengths: Lengths
    sources: tuple[tuple[str, int, int], ...]  # (name, rows, tokens), the largest first
    num_looked_at: int
    conditions: Counter[str] | None  # None: no tokenizer tells them
    num_without_eoa: int | None
    scored_share: float  # of the response tokens of the rows looked at
    num_repeated: int  # rows that are the same as another one looked at
    num_prompts_repeated: int  # the same instruction, whatever the response


def overview(shelves: Shelves) -> Overview:
    """Counts everything, in two passes."""
    counted: list[list[Int64s]] = [[], [], []]
    sources = []
    for shelf in shelves.shelves:
        tokens = 0
        for part in parts_of(shelf.index):
            whole = part.inst_len + part.resp_len
            for counts, values in zip(counted, (whole, part.inst_len, part.resp_len), strict=True):
                counts[:] = [Lengths.of([*counts, np.bincount(values)]).counts]
            tokens += int(whole.sum())
        sources.append((shelf.name, len(shelf.index), tokens))
    looked_at = _LookedAt(shelves.form)
    for shelf, rows in _spread(shelves):
        looked_at.add(shelf, rows)
    return Overview(
        *(Lengths.of(counts) for counts in counted),
        sources=tuple(sorted(sources, key=lambda source: -source[2])),
        num_looked_at=looked_at.num_rows,
        conditions=looked_at.conditions if shelves.form else None,
        num_without_eoa=looked_at.num_without_eoa if shelves.form else None,
        scored_share=looked_at.num_scored / max(1, looked_at.num_resp_tokens),
        num_repeated=looked_at.num_rows - len(looked_at.rows),
        num_prompts_repeated=looked_at.num_rows - len(looked_at.prompts),
    )


def pack(shelves: Shelves, batch_tokens: int, ranks: int) -> Packing:
    """Packs rows in their order, as training does; ValueError where one does not fit."""
    if batch_tokens % ranks:
        raise ValueError(f"batch={batch_tokens} is not divisible by ranks={ranks}; change one")
    lengths: list[Int64s] = []
    left = PACKED
    for shelf in shelves.shelves:
        for part in parts_of(EpochIndex(*(getattr(shelf.index, n)[:left] for n in INDEX_NAMES))):
            lengths.append(part.inst_len + part.resp_len - 1)
            left -= len(part)
    packed = np.concatenate(lengths)
    count = count_epoch(
        packed, batch_max_length=batch_tokens // ranks, num_replicas=ranks, drop_last_batch=False
    )
    room = count.num_batches * batch_tokens
    return Packing(
        batch_tokens, len(packed), count.num_batches, 1 - count.filled_tokens / max(1, room)
    )


def _spread(shelves: Shelves) -> Iterator[tuple[Shelf, Int64s]]:
    """Up to LOOKED_AT rows, one of each stretch of the data."""
    total = len(shelves)
    count = min(total, LOOKED_AT)
    offsets = np.random.default_rng(0).random(count) if count < total else np.zeros(count)
    rows = ((np.arange(count) + offsets) * (total / count)).astype(np.int64)
    for shelf in shelves.shelves:
        bounds = np.searchsorted(rows, [shelf.first, shelf.first + len(shelf.index)])
        if bounds[0] < bounds[1]:
            yield shelf, rows[bounds[0] : bounds[1]] - shelf.first


class _LookedAt:
    """What the tokens of rows tell."""

    def __init__(self, form: PromptFormat | None) -> None:
        self.form = form
        self.names = condition_names(form) if form is not None else {}
        self.num_rows = self.num_without_eoa = self.num_scored = self.num_resp_tokens = 0
        self.conditions: Counter[str] = Counter()
        self.rows: set[bytes] = set()
        self.prompts: set[bytes] = set()

    def add(self, shelf: Shelf, rows: Int64s) -> None:
        for row in rows.tolist():
            example = shelf.example(row)
            prompt = _digest(example.inst_ids)
            self.prompts.add(prompt)
            self.rows.add(prompt + _digest(example.resp_ids))
            self.num_resp_tokens += len(example.resp_ids)
            scored = example.scored
            self.num_scored += len(example.resp_ids) if scored is None else sum(map(bool, scored))
            if self.form is not None:
                self.num_without_eoa += example.resp_ids[-1] != self.form.eoa_id
                self.conditions[condition_of(example, self.names)] += 1
            self.num_rows += 1


def condition_names(form: PromptFormat) -> dict[int, str]:
    """The conditions by the ids of their tokens."""
    return {form.condition_ids(name)[0]: name for name in form.conditions}


def condition_of(example: Example, names: Mapping[int, str]) -> str:
    """The names of the condition tokens after boq; "none" where there are none."""
    after_boq = example.inst_ids[1 : 1 + MOST_CONDITIONS]
    return ",".join(names[token] for token in takewhile(names.__contains__, after_boq)) or "none"


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.array(ids, "<u4").tobytes(), digest_size=16).digest()
