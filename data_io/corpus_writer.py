"""Documents of source files as .bin shards and as sampled data, both in one reading."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_io.encoding import RowEncoder, Tally
from data_io.example_writer import ExampleWriter
from data_io.examples import Example, ExampleEncoder
from data_io.held_out import HeldOut
from data_io.loaded_format import LoadedFormat
from data_io.readers import to_record
from data_io.records import BadRowError, Document, Record
from data_io.sampled_writer import SampledWriter
from data_io.source_files import RawRow, SourceFile
from data_io.token_shards import Part, ShardConfig, ShardFolderWriter

HELD_OUT_SHARE = 0.01  # of the documents of a single file
PARTS: tuple[Part, ...] = ("val", "train")  # in the order of the numbers of their shards


@dataclass(slots=True)
class PartSize:
    """How much a part is."""

    num_documents: int = 0
    num_tokens: int = 0  # of text
    num_bytes: int = 0

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / max(1, self.num_tokens)


@dataclass(frozen=True, slots=True)
class CorpusShape:
    """How the documents are laid out."""

    context_size: int  # of an example of sampled data
    epochs: int
    bos: str  # begins a document of .bin shards
    shard_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Targets:
    """Where the data go; None: not made."""

    bin: Path | None
    sampled: Path | None


@dataclass(slots=True)
class CorpusWriter:
    """Writes each format whole or not at all."""

    format: LoadedFormat
    files: Sequence[SourceFile]
    shape: CorpusShape
    tally: Tally = field(default_factory=Tally)

    def write(self, targets: Targets) -> dict[Part, PartSize]:
        sizes: dict[Part, PartSize] = {}
        generator = np.random.Generator(np.random.Philox(seed=self.shape.seed))
        with ExitStack() as stack:
            shards = sampled = None
            if targets.bin is not None:
                shards = stack.enter_context(self._shard_writer(targets.bin))
                self.format.put_tokenizer(shards.staging)
            if targets.sampled is not None:
                sampled = stack.enter_context(self._sampled_writer(targets.sampled))
                self.format.accompany(sampled)
            for part in PARTS:
                sizes[part] = self._write_part(part, shards, sampled, generator)
        return sizes

    def _write_part(
        self,
        part: Part,
        shards: ShardFolderWriter | None,
        sampled: SampledWriter | None,
        generator: np.random.Generator,
    ) -> PartSize:
        size = PartSize()
        with ExitStack() as stack:
            examples = None
            if sampled is not None and part == "val":
                place = sampled.staging / "validation"
                writer = stack.enter_context(
                    self._sampled_writer(place, sampled.folder / place.name)
                )
                self.format.accompany(writer)
                examples = ExampleWriter(writer)
            elif sampled is not None:
                examples = ExampleWriter(sampled)
            for document, ids in self._encoded(part):
                size.num_documents += 1
                size.num_tokens += len(ids) - 1
                size.num_bytes += len(document.text.encode())
                if shards is not None:
                    whole = np.array([shards.config.bos_id, *ids[:-1]], np.int64)
                    shards.add(part, whole, None)
                if examples is not None:
                    examples.add(self._windows(ids))
            if not size.num_documents:
                raise ValueError(
                    f"no document for {part} among {self.tally.num_rows:,} rows of "
                    f"{len(self.files)} files; give more"
                )
            if examples is not None:
                epochs = 1 if part == "val" else self.shape.epochs
                examples.finish(generator.permutation(len(examples)) for _ in range(epochs))
        return size

    def _windows(self, ids: list[int]) -> list[Example]:
        boq_id, width = self.format.prompt_format.boq_id, self.shape.context_size - 1
        return [Example([boq_id], ids[at : at + width]) for at in range(0, len(ids), width)]

    def _encoded(self, part: Part) -> Iterator[tuple[Document, list[int]]]:
        """Each document of a part, and its ids with the one that ends it."""
        encoder = ExampleEncoder(self.format.prompt_format)
        rows = RowEncoder(encoder, _to_document, sys.maxsize, self.tally)
        held_out = HeldOut.share(HELD_OUT_SHARE, self.shape.seed)
        files = self.files
        if len(files) > 1:
            files = files[-1:] if part == "val" else files[:-1]
        bar = tqdm(_rows(files), desc=part, unit=" rows", disable=None)
        placed = (
            (where, record)
            for where, record in rows.records(bar)
            if len(self.files) > 1 or held_out.has(record) == (part == "val")
        )
        for record, examples in rows.encoded(placed):
            assert isinstance(record, Document)
            yield record, examples[0].resp_ids

    def _shard_writer(self, folder: Path) -> ShardFolderWriter:
        prompt_format = self.format.prompt_format
        bos_id = prompt_format.tokenizer.token_to_id(self.shape.bos)
        if bos_id is None:
            raise ValueError(f"bos={self.shape.bos} is no token of the tokenizer; name another")
        return ShardFolderWriter(
            folder,
            ShardConfig(vocab_size=prompt_format.id_limit, bos_id=bos_id),
            is_masked=False,
            name="corpus",
            shard_tokens=self.shape.shard_tokens,
        )

    def _sampled_writer(self, folder: Path, final_folder: Path | None = None) -> SampledWriter:
        info = self.format.info(final_folder or folder)
        return SampledWriter(folder, info, max_seq_len=self.shape.context_size, scored=True)


def _rows(files: Sequence[SourceFile]) -> Iterator[RawRow]:
    return (row for file in files for row in file.rows())


def _to_document(fields: Mapping[str, Any]) -> Record:
    record = to_record(fields, "text")
    assert isinstance(record, Document)
    if not record.text.strip():
        raise BadRowError("empty text")
    return record
