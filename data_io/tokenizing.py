"""One source as a tokenized folder: rows -> records -> examples -> arrays.

Reading, encoding and writing overlap: the tokenizer works on batches in threads of its own while
rows are read and ids are written here. Memory is that of a few batches, whatever the source's size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_io.encoding import NOT_LEARNED, RowEncoder, Tally
from data_io.examples import Example, ExampleEncoder, Turns
from data_io.prompt_format import PromptFormat
from data_io.readers import to_record
from data_io.records import Conversation, Document, Record
from data_io.sampled_format import IntArray
from data_io.sources import Source
from data_io.tokenized_format import MadeBy
from data_io.tokenized_writer import TokenizedWriter

ENCODING_VERSION = 1  # goes up when the same row would get other ids
ENCODED_AT_ONCE, WAITING_BATCHES = 2, 2  # batches: in the tokenizer, and read ahead
BATCH_ROWS, BATCH_CHARS = 1024, 2**20  # encoded together
MAX_TEXT_BYTES = 2**21  # of a row: the tokenizer takes up to 150 times as much memory
NO_LIMIT = sys.maxsize  # long examples are the business of data_io.sample

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class EncodingSettings:
    """What decides the ids of a row."""

    tokenizer_file: Path
    tokenizer_digest: str  # of that file
    boq: str
    eoq: str
    eoa: str
    conditions: Mapping[str, str]
    reader: str
    condition: str  # of rows that name none
    turns: Turns
    document_window: int
    token_type: str  # of tokens.npy

    def fingerprint(self) -> str:
        """Changes when the same source would get other ids."""
        values = asdict(self)
        del values["tokenizer_file"]  # the same file elsewhere is the same tokenizer
        text = json.dumps([ENCODING_VERSION, values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def prompt_format(self) -> PromptFormat:
        roles, conditions = (self.boq, self.eoq, self.eoa), tuple(self.conditions.items())
        return _loaded(self.tokenizer_file, self.tokenizer_digest, roles, conditions)


@dataclass(frozen=True, slots=True)
class TokenizeJob:
    """A source, and where its ids go."""

    source: Source
    folder: Path
    settings: EncodingSettings

    @property
    def position_file(self) -> Path:
        """Says how many bytes of the source are read so far, while it is tokenized."""
        return self.folder.with_name(f".{self.folder.name}.position")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job."""

    name: str  # of the source's folder
    size: int  # bytes of the source
    made: MadeBy | None  # None: it failed
    firsts: Mapping[str, str]  # reason -> the first row that was dropped for it
    error: str = ""
    is_fatal: bool = False  # the others would fail too


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Examples one after another, as arrays."""

    ids: IntArray
    inst_lens: NDArray[np.int64]
    resp_lens: NDArray[np.int64]
    scored: NDArray[np.uint8] | None  # per id; None: all of every response counts
    unlearned: tuple[str, ...]  # places of records that make no example


def tokenize_source(job: TokenizeJob) -> Outcome:
    """Makes the job's folder, whole or not at all; what is wrong with the source is in the outcome.

    Can be sent to another process or machine that reaches the same files.
    """
    tally = Tally()
    made, error, is_fatal = None, "", False
    try:
        made = _tokenize(job, tally)
    except ValueError as refusal:
        error = str(refusal)
    except OSError as failure:
        told = failure.strerror or str(failure)
        error, is_fatal = f"{job.folder}: {told}; nothing of it is kept, run again", True
    finally:
        job.position_file.unlink(missing_ok=True)
    return Outcome(job.folder.name, job.source.state.size, made, tally.firsts, error, is_fatal)


def _tokenize(job: TokenizeJob, tally: Tally) -> MadeBy:
    settings, source = job.settings, job.source
    encoder = ExampleEncoder(
        settings.prompt_format(), settings.turns, document_window=settings.document_window
    )
    read = partial(to_record, reader=settings.reader, condition=settings.condition)
    token_type = np.dtype(settings.token_type)
    with TokenizedWriter(job.folder, token_type=token_type) as writer:
        rows = source.rows(lambda position: _tell(job.position_file, position))
        placed = RowEncoder(encoder, read, NO_LIMIT, tally).records(rows)
        for batch in _encoded(_encodable(placed, tally), encoder, token_type):
            for where in batch.unlearned:
                tally.drop(NOT_LEARNED, where)
            writer.add(batch.ids, batch.inst_lens, batch.resp_lens, batch.scored)
        made = MadeBy(
            fingerprint=settings.fingerprint(),
            source_size=source.state.size,
            source_mtime_ns=source.state.mtime_ns,
            source_identity=source.state.identity,
            source_rows=tally.num_rows,
            examples=writer.num_rows,
            tokens=writer.num_tokens,
            dropped=dict(sorted(tally.dropped.items())),
        )
        metadata = {
            "source_mtime": source.state.mtime_ns // 10**9,
            "source_size": source.state.size,
        }
        writer.publish(metadata, made)
    return made


@lru_cache(maxsize=1)  # a process tokenizes many sources
def _loaded(path: Path, _digest: str, roles: tuple[str, ...], conditions: Pairs) -> PromptFormat:
    boq, eoq, eoa = roles
    return PromptFormat.load(path, boq=boq, eoq=eoq, eoa=eoa, conditions=dict(conditions))


def _encodable(placed: Iterable[tuple[str, Record]], tally: Tally) -> Iterator[tuple[str, Record]]:
    """Leaves out rows that would take too much memory; documents are encoded in pieces."""
    for where, record in placed:
        texts = () if isinstance(record, Document) else texts_of(record)
        num_chars = sum(map(len, texts))
        if num_chars > MAX_TEXT_BYTES // 4 and sum(map(_size, texts)) > MAX_TEXT_BYTES:
            tally.drop(f"more than {MAX_TEXT_BYTES:,} bytes of text", where)
        else:
            yield where, record


def _size(text: str) -> int:
    return len(text.encode())


def _encoded(
    placed: Iterable[tuple[str, Record]], encoder: ExampleEncoder, token_type: np.dtype[Any]
) -> Iterator[EncodedBatch]:
    """Batches in order; some are in the tokenizer and some wait for it while the next is read.

    One that is large by itself, of a long row, has the memory for itself.
    """
    pending: deque[Future[EncodedBatch]] = deque()
    with ThreadPoolExecutor(ENCODED_AT_ONCE) as pool:
        try:
            for batch, num_chars in _batches(placed):
                is_large = num_chars > 2 * BATCH_CHARS
                most = 0 if is_large else ENCODED_AT_ONCE + WAITING_BATCHES - 1
                while len(pending) > most:
                    yield pending.popleft().result()
                pending.append(pool.submit(_encode, batch, encoder, token_type))
                if is_large:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def texts_of(record: Record) -> tuple[str, ...]:
    """All that somebody says in it."""
    if isinstance(record, Document):
        return (record.text,)
    if isinstance(record, Conversation):
        return (record.system, *(turn.text for turn in record.turns))
    return (record.instruction, record.response)


def _batches(
    placed: Iterable[tuple[str, Record]],
) -> Iterator[tuple[list[tuple[str, Record]], int]]:
    """Records that are encoded together, and how many characters they have."""
    batch: list[tuple[str, Record]] = []
    num_chars = 0
    for where, record in placed:
        batch.append((where, record))
        num_chars += sum(map(len, texts_of(record)))
        if len(batch) == BATCH_ROWS or num_chars > BATCH_CHARS:
            yield batch, num_chars
            batch, num_chars = [], 0
    if batch:
        yield batch, num_chars


def _encode(
    batch: list[tuple[str, Record]], encoder: ExampleEncoder, token_type: np.dtype[Any]
) -> EncodedBatch:
    made = encoder.encode([record for _, record in batch])
    unlearned = [where for (where, _), examples in zip(batch, made, strict=True) if not examples]
    examples = list(itertools.chain.from_iterable(made))
    ids = itertools.chain.from_iterable(
        itertools.chain(each.inst_ids, each.resp_ids) for each in examples
    )
    inst_lens = np.array([len(each.inst_ids) for each in examples], np.int64)
    resp_lens = np.array([len(each.resp_ids) for each in examples], np.int64)
    count = int(inst_lens.sum() + resp_lens.sum())
    return EncodedBatch(
        ids=np.fromiter(ids, token_type, count),
        inst_lens=inst_lens,
        resp_lens=resp_lens,
        scored=_scored(examples, count),
        unlearned=tuple(unlearned),
    )


def _scored(examples: Iterable[Example], count: int) -> NDArray[np.uint8] | None:
    if all(each.scored is None for each in examples):
        return None
    scored, at = np.ones(count, np.uint8), 0
    for each in examples:
        end = at + len(each.inst_ids) + len(each.resp_ids)
        if each.scored is not None:
            scored[end - len(each.scored) : end] = each.scored
        at = end
    return scored


def _tell(position_file: Path, position: int) -> None:
    position_file.write_text(str(position))
