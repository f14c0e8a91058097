"""Makes chat data of several sources: sampled data, or .bin shards with masks.

    python -m data_io.prepare_mixture mixture=config/data/mixtures/sft.yaml output=data/sft \\
        tokenizer=tokenizer.json [format=bin] [data_dir=DIR]

The mixture file names the sources (docs/mixtures.md); its validation part becomes DIR/validation,
or the shards of `val`. Questions of the validation part are left out of training. The table of what
went in is printed on standard output.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from data_io.console import note, run_command
from data_io.encoding import RowEncoder, Tally
from data_io.example_writer import ExampleWriter
from data_io.examples import ExampleEncoder
from data_io.held_out import digest
from data_io.loaded_format import LoadedFormat
from data_io.mixture import MAKERS, ChatMixture, MissingSourceError, MixtureSource
from data_io.options import parse_options
from data_io.records import Record
from data_io.sampled_format import SampledData
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, EOA, EOQ
from data_io.spelling import spelling_rows, words_to_train_on
from data_io.token_shards import (
    SHARD_TOKENS,
    ShardConfig,
    ShardFolderWriter,
    examples_as_documents,
)

ASKED_LATER = "asked in the validation part"


class MixtureOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixture: Path = Field(description="YAML file of the sources")
    tokenizer: Path | None = Field(default=None, description="one to use; null: $LLAMA_TOKENIZER")
    add_special: bool = Field(default=False, description="adds the special tokens that it lacks")
    output: Path = Field(description="folder to make")
    format: Literal["sampled", "bin"] = Field(
        default="sampled", description="sampled data, or .bin shards with masks"
    )
    data_dir: Path | None = Field(
        default=None,
        description="folder with copies of the sources, such as a mirror of evaluation.fetch; with "
        "it nothing is read from the hub",
    )
    context_size: int = Field(
        default=2049, ge=4, description="examples of so many tokens and more are left out"
    )
    epochs: PositiveInt = Field(default=1, description="epochs, each in an order of its own")
    seed: NonNegativeInt = Field(default=0, description="of orders, limits and made rows")
    turns: Literal["each", "last", "all"] = Field(
        default="each", description="of a conversation: each answer, the last, or all in one"
    )
    scores_tools: bool = Field(
        default=False, description="what tools gave back is learned too, not only read"
    )
    boq: str = Field(default=BOQ, description="token that opens a question")
    eoq: str = Field(default=EOQ, description="token that closes a question")
    eoa: str = Field(default=EOA, description="token that closes an answer")
    bos: str = Field(default="<|endoftext|>", description="begins a document of .bin shards")
    shard_tokens: PositiveInt = Field(default=SHARD_TOKENS, description="of a .bin shard, about")
    overwrite: bool = Field(default=False, description="replaces sampled data in the folder")


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What a source gave."""

    source: MixtureSource
    tally: Tally | None  # None: it was not there

    def line(self, total_tokens: int) -> str:
        if self.tally is None:
            return f"| {self.source.name} | not there | | | | |"
        tally, repeat = self.tally, self.source.repeat
        share = repeat * tally.num_tokens / max(1, total_tokens)
        dropped = sum(tally.dropped.values())
        return (
            f"| {self.source.name} | {tally.num_rows:,} | {dropped:,} | "
            f"{tally.num_examples:,} x {repeat} | {repeat * tally.num_tokens:,} | {share:.1%} |"
        )


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(MixtureOptions, arguments, __doc__ or "")
    preparation = MixturePreparation(options)
    reports = preparation.make()
    for title, part in reports.items():
        print(table(title, part))
    data = f"; data.path={options.output}" * (options.format == "sampled")
    if data and preparation.mixture.validation:
        data += f" val_data.path={options.output}/validation"
    note(f"{options.output} is made{data}")


def table(title: str, reports: Sequence[SourceReport]) -> str:
    """Markdown."""
    total = sum(each.source.repeat * each.tally.num_tokens for each in reports if each.tally)
    lines = [
        f"## {title}: {total:,} tokens an epoch\n",
        "| source | rows | dropped | examples | tokens | share |",
        "|---|---|---|---|---|---|",
        *(each.line(total) for each in reports),
    ]
    for each in reports:
        lines += [f"\n{each.source.name}:"] * bool(each.tally and each.tally.dropped)
        lines += [f"- {line}" for line in (each.tally.lines() if each.tally else ())]
    return "\n".join((*lines, ""))


class MixturePreparation:
    """The sources of a mixture on their way to data."""

    def __init__(self, options: MixtureOptions) -> None:
        self.options = options
        self.mixture = ChatMixture.load(options.mixture)
        self.format = LoadedFormat.load(
            options.tokenizer,
            framing=(options.boq, options.eoq, options.eoa),
            add_special=options.add_special,
        )
        self.encoder = ExampleEncoder(
            self.format.prompt_format,
            options.turns,
            document_window=options.context_size - 2,
            scores_tools=options.scores_tools,
        )
        for source in (*self.mixture.train, *self.mixture.validation):
            try:
                self.encoder.condition_ids(source.condition)
            except ValueError as error:
                raise ValueError(f"{options.mixture}: {source.name}: {error}") from None
        self.asked: set[int] = set()  # digests of the questions of the validation part

    def make(self) -> dict[str, list[SourceReport]]:
        """Writes the data, aside until it is whole."""
        if self.options.format == "sampled":
            return self.write_sampled(self.options.output)
        config = ShardConfig(vocab_size=self.format.prompt_format.id_limit, bos_id=self.bos_id())
        with ShardFolderWriter(
            self.options.output,
            config,
            is_masked=True,
            name=self.options.mixture.stem,
            shard_tokens=self.options.shard_tokens,
        ) as shards:
            self.format.put_tokenizer(shards.staging)
            with tempfile.TemporaryDirectory(dir=shards.staging) as aside:
                reports = self.write_sampled(Path(aside) / "sampled")
                data = SampledData.open(Path(aside) / "sampled")
                if self.mixture.validation:
                    validation = SampledData.open(data.folder / "validation")
                    for ids, mask in examples_as_documents(validation, config.bos_id):
                        shards.add("val", ids, mask)
                for ids, mask in examples_as_documents(data, config.bos_id):
                    shards.add("train", ids, mask)
        return reports

    def bos_id(self) -> int:
        bos_id = self.format.loaded.tokenizer.token_to_id(self.options.bos)
        if bos_id is None:
            raise ValueError(
                f"bos={self.options.bos} is no token of the tokenizer; name one that it has, and "
                "that frames neither questions nor answers"
            )
        return bos_id

    def write_sampled(self, folder: Path) -> dict[str, list[SourceReport]]:
        reports: dict[str, list[SourceReport]] = {}
        generator = np.random.Generator(np.random.Philox(seed=self.options.seed))
        with ExitStack() as stack:
            writer = stack.enter_context(self.writer(folder, folder))
            if self.mixture.validation:
                place = writer.staging / "validation"
                part_writer = stack.enter_context(self.writer(place, folder / place.name))
                validation = ExampleWriter(part_writer)
                reports["validation"], numbers = self.write("validation", validation)
                validation.finish([numbers])
                self.format.accompany(part_writer)
            train = ExampleWriter(writer)
            reports["train"], numbers = self.write("train", train)
            orders = (generator.permutation(numbers) for _ in range(self.options.epochs))
            train.finish(orders)
            self.format.accompany(writer)
        return reports

    def writer(self, folder: Path, final_folder: Path) -> SampledWriter:
        return SampledWriter(
            folder,
            self.format.info(final_folder),
            max_seq_len=self.options.context_size,
            scored=True,
            overwrite=self.options.overwrite,
        )

    def write(
        self, part: Literal["train", "validation"], writer: ExampleWriter
    ) -> tuple[list[SourceReport], NDArray[np.int64]]:
        """Encodes a part; its report, and the numbers of its examples, repeats among them."""
        reports, numbers = [], []
        for source in getattr(self.mixture, part):
            tally, first = Tally(), len(writer)
            rows = RowEncoder(self.encoder, source.to_record, self.options.context_size, tally)
            try:
                placed = self.placed(source, rows, is_train=part == "train")
                bar = tqdm(placed, desc=f"{part} {source.name}", unit=" rows", disable=None)
                for _, examples in rows.encoded(bar):
                    writer.add(examples)
            except MissingSourceError as error:
                if not source.optional:
                    raise
                note(f"left out: {error}")
                reports.append(SourceReport(source, None))
                continue
            numbers += [np.arange(first, len(writer))] * source.repeat
            reports.append(SourceReport(source, tally))
        if not len(writer):
            raise ValueError(f"the {part} part of {self.options.mixture} makes no example")
        return reports, np.concatenate(numbers)

    def placed(
        self, source: MixtureSource, rows: RowEncoder, *, is_train: bool
    ) -> Iterator[tuple[str, Record]]:
        """The records of a source that are used."""
        found = source.rows(self.options.data_dir)
        if source.reader in MAKERS:
            words = words_to_train_on([str(row.fields.get("word", "")) for row in found])
            made = spelling_rows(
                words,
                source.limit or 0,
                self.options.seed,
                source.condition,
                counts_letters=source.reader == "spelling_bee",
            )
            rows.tally.num_rows = source.limit or 0
            records: Iterator[tuple[str, Record]] = (
                (f"{source.name} {at}", row) for at, row in enumerate(made)
            )
        else:
            records = rows.records(found)
        used = self.without_asked(records, rows.tally) if is_train else self.asking(records)
        if source.limit is None or source.reader in MAKERS:
            return used
        seed = f"{self.options.seed} {source.name}"
        return iter(drawn(used, source.limit, random.Random(seed)))

    def asking(self, records: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
        for where, record in records:
            self.asked.add(digest(record, 0))
            yield where, record

    def without_asked(
        self, records: Iterator[tuple[str, Record]], tally: Tally
    ) -> Iterator[tuple[str, Record]]:
        for where, record in records:
            if digest(record, 0) in self.asked:
                tally.drop(ASKED_LATER, where)
            else:
                yield where, record


def drawn(
    records: Iterator[tuple[str, Record]], limit: int, generator: random.Random
) -> list[tuple[str, Record]]:
    """`limit` of the records, each as likely as any other, in their order."""
    kept: list[tuple[int, tuple[str, Record]]] = []
    for number, placed in enumerate(records):
        if number < limit:
            kept.append((number, placed))
        else:
            slot = generator.randrange(number + 1)
            if slot < limit:
                kept[slot] = (number, placed)
    return [placed for _, placed in sorted(kept, key=lambda pair: pair[0])]


if __name__ == "__main__":
    run_command(main)
