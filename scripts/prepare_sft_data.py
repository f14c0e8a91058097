"""Makes sampled data for fine-tuning of questions and answers, or of whole conversations.

    python scripts/prepare_sft_data.py --train train.jsonl --tokenizer tokenizer.json \\
        --output data/sft --epochs 2 [--seed 0] [--context-size 4097]
    python scripts/prepare_sft_data.py train=sharegpt.jsonl.gz,more/ reader=sharegpt turns=all \\
        tokenizer=checkpoints/hf output=data/chat epochs=2 validation=0.02

Options are written `--name value` or `name=value`. Rows that cannot be used are left out, counted
by reason. Train on the folder with data.path=DIR, validate with val_data.path=DIR/validation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_io.console import note, run_command
from data_io.encoding import TOO_LONG, RowEncoder, Tally
from data_io.example_writer import ExampleWriter
from data_io.examples import Example, ExampleEncoder
from data_io.held_out import HeldOut
from data_io.hub import HubData
from data_io.loaded_format import LoadedFormat
from data_io.options import parse_options
from data_io.published_options import as_key_values
from data_io.readers import require_reader, to_record
from data_io.records import DEFAULT_CONDITION
from data_io.sampled_writer import SampledWriter
from data_io.shown_examples import shown
from data_io.source_files import RawRow, SourceFile, find_sources
from data_io.sources import require_apart, separated
from data_io.special_tokens import BOQ, EOA, EOQ
from multipack_sampler import count_epoch

ROW_EXAMPLES = 16  # a row of the packing statistics holds so many of the longest legal examples


class SftOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: tuple[Path, ...] = Field(
        min_length=1,
        description="JSONL (also .gz, .zst), JSON, Parquet; a folder is searched; hub:OWNER/NAME "
        "is a data set of the Hugging Face hub",
    )
    config: str | None = Field(default=None, description="of data sets of the hub")
    split: str = Field(default="train", description="of data sets of the hub")
    tokenizer: Path | None = Field(
        default=None,
        description="tokenizer.json, a Hugging Face folder, or SentencePiece .model; null: "
        "$LLAMA_TOKENIZER",
    )
    output: Path = Field(description="folder to make")
    epochs: PositiveInt = Field(description="epochs to prepare, each in an order of its own")
    seed: NonNegativeInt = Field(default=0, description="of the orders and of the split")
    context_size: int = Field(
        default=4097, ge=4, description="every example is shorter; the model sees one token less"
    )
    boq: str = Field(default=BOQ, description="token that opens a question")
    eoq: str = Field(default=EOQ, description="token that closes a question")
    eoa: str = Field(default=EOA, description="token that closes an answer")
    conditions: tuple[str, ...] = Field(
        default=(),
        description="NAME=TOKEN,... (null or nothing: those of the published ones that the "
        "tokenizer has)",
    )
    add_special: bool = Field(
        default=False, description="adds the framing tokens to a tokenizer that lacks them"
    )
    reader: str = Field(default="auto", description="what the fields mean (docs/importing.md)")
    condition: str = Field(
        default=DEFAULT_CONDITION, description="of rows without one: names, joined by commas"
    )
    turns: Literal["each", "last", "all"] = Field(
        default="each",
        description="of a conversation: each answer is an example, the last one, or all in one",
    )
    scores_tools: bool = Field(
        default=False, description="what tools gave back is learned too, not only read"
    )
    too_long: Literal["error", "drop"] = Field(
        default="error", description="what to do about an example of context_size tokens and more"
    )
    validation: float = Field(
        default=0, ge=0, description="held out in DIR/validation: a share, or from 1 on a number"
    )
    batch_tokens: PositiveInt | None = Field(
        default=None,
        description=f"of the packing statistics (null: {ROW_EXAMPLES} times the model's context)",
    )
    show: NonNegativeInt = Field(default=3, description="so many examples are shown")
    overwrite: bool = Field(default=False, description="replaces sampled data in the folder")

    @field_validator("conditions")
    @classmethod
    def _are_pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        if not all(name and token for name, _, token in (pair.partition("=") for pair in pairs)):
            raise ValueError("conditions are written NAME=TOKEN,NAME=TOKEN")
        return pairs

    @field_validator("reader")
    @classmethod
    def _is_reader(cls, reader: str) -> str:
        require_reader(reader)
        return reader

    @field_validator("validation")
    @classmethod
    def _is_share_or_count(cls, validation: float) -> float:
        if validation > 1 and validation != int(validation):
            raise ValueError("below 1 it is a share, from 1 on a whole number of rows")
        return validation


def main(arguments: list[str]) -> None:
    """Command line."""
    pairs = as_key_values(arguments, SftOptions, by_position="train", short={"-o": "output"})
    Preparation(parse_options(SftOptions, pairs, __doc__ or "")).make()


class Preparation:
    """Sources on their way to sampled data."""

    def __init__(self, options: SftOptions) -> None:
        self.options = options
        require_apart(options.output, options.train)
        self.sources = sources_of(options)
        self.format = LoadedFormat.load(
            options.tokenizer,
            framing=(options.boq, options.eoq, options.eoa),
            conditions=dict(pair.split("=", 1) for pair in options.conditions),
            add_special=options.add_special,
        )
        self.prompt_format = self.format.prompt_format
        self.prompt_format.condition_ids(options.condition)
        encoder = ExampleEncoder(
            self.prompt_format,
            options.turns,
            document_window=options.context_size - 2,
            scores_tools=options.scores_tools,
        )
        self.rows = RowEncoder(
            encoder,
            partial(to_record, reader=options.reader, condition=options.condition),
            options.context_size,
            Tally(),
        )
        self.shown: list[Example] = []

    def make(self) -> None:
        """Writes the folder, aside until it is whole."""
        options, folder = self.options, self.options.output
        held_out = self.split()
        with ExitStack() as stack:
            writer = stack.enter_context(self.writer(folder, folder))
            self.format.accompany(writer)
            train, validation = ExampleWriter(writer), None
            if held_out is not None:
                place = writer.staging / "validation"
                validation_writer = stack.enter_context(self.writer(place, folder / place.name))
                self.format.accompany(validation_writer)
                validation = ExampleWriter(validation_writer)
            self.encode(train, validation, held_out)
            self.require_usable(train, validation)
            generator = np.random.Generator(np.random.Philox(seed=options.seed))
            if validation is not None:
                validation.finish([np.arange(len(validation))])
            train.finish(generator.permutation(len(train)) for _ in range(options.epochs))
        for example in self.shown:
            note(shown(self.prompt_format.tokenizer, example))
        self.report(train, validation)

    def split(self) -> HeldOut | None:
        """What is held out; a number of rows is chosen in a reading of its own."""
        validation, seed = self.options.validation, self.options.seed
        if not validation:
            return None
        if validation < 1:
            return HeldOut.share(validation, seed)
        counting = RowEncoder(self.rows.encoder, self.rows.to_record, self.rows.limit, Tally())
        records = (record for _, record in counting.records(self.raw_rows("choosing")))
        return HeldOut.count(int(validation), seed, records)

    def raw_rows(self, what: str) -> Iterator[RawRow]:
        rows = (row for source in self.sources for row in source.rows())
        return iter(tqdm(rows, desc=what, unit=" rows", disable=None, leave=False))

    def encode(
        self, train: ExampleWriter, validation: ExampleWriter | None, held_out: HeldOut | None
    ) -> None:
        for record, examples in self.rows.encoded(self.rows.records(self.raw_rows("encoding"))):
            is_held_out = held_out is not None and held_out.has(record)
            side = validation if is_held_out and validation is not None else train
            side.add(examples)
            room = self.options.show - len(self.shown)
            self.shown += examples[: max(0, room)]

    def writer(self, folder: Path, final_folder: Path) -> SampledWriter:
        return SampledWriter(
            folder,
            self.format.info(final_folder),
            max_seq_len=self.options.context_size,
            scored=True,
            dtype=np.dtype(np.int32),
            overwrite=self.options.overwrite,
        )

    def require_usable(self, train: ExampleWriter, validation: ExampleWriter | None) -> None:
        """Says what was dropped, and refuses what would be no data, or data cut short."""
        options, tally = self.options, self.rows.tally
        note(*tally.lines())
        where = ",".join(map(str, options.train))
        if options.too_long == "error" and tally.dropped[TOO_LONG]:
            raise ValueError(
                f"the longest example has {tally.longest} tokens ({tally.longest_at}), but "
                f"context_size={options.context_size}, and all must be shorter; raise it to "
                f"{tally.longest + 1}, or leave long ones out with too_long=drop"
            )
        if not len(train):
            raise ValueError(
                f"train={where}: none of {tally.num_rows:,} rows makes an example to train on; "
                "see above what was dropped"
                + (", or hold out less" if validation is not None and len(validation) else "")
            )
        if validation is not None and not len(validation):
            raise ValueError(
                f"validation={options.validation:g} holds out none of {tally.num_rows:,} rows; "
                "give a larger share, or a number"
            )

    def report(self, train: ExampleWriter, validation: ExampleWriter | None) -> None:
        """The results, on standard output."""
        options, tally = self.options, self.rows.tally
        print(f"Loaded {tally.num_rows} samples from {','.join(map(str, options.train))}")
        for reason, count in sorted(tally.dropped.items()):
            joint = " with " if reason == "empty response" else ": "
            print(f"Skipped {count} samples{joint}{reason}")
        lengths = train.lengths
        total, mean = int(lengths.sum()), lengths.mean()
        print(f"Tokens: {total}  avg sample = {mean:.1f}  max = {lengths.max()}")
        if validation is not None:
            print(f"Held out: {len(validation)} samples, in {options.output / 'validation'}")
        print(packing_line(lengths, options))
        print(f"Wrote {options.epochs} epoch shuffles to {options.output}")
        print(f"Done. Point cfg.data.path to: {options.output}")


def sources_of(options: SftOptions) -> list[SourceFile | HubData]:
    """Files first, then data sets of the hub."""
    files, data = separated(options.train, options.config, options.split)
    return [*(find_sources(files) if files else ()), *data]


def packing_line(lengths: NDArray[np.int64], options: SftOptions) -> str:
    """How full rows of `batch_tokens` are, in file order."""
    row_tokens = options.batch_tokens or ROW_EXAMPLES * (options.context_size - 1)
    in_rows = (lengths - 1).astype(np.int32)
    if in_rows.max() > row_tokens:
        return f"Packing: batch_tokens={row_tokens} is less than the longest sample takes"
    count = count_epoch(
        in_rows, batch_max_length=row_tokens, num_replicas=1, drop_last_batch=False, cursor=0
    )
    filled = count.filled_tokens / (count.num_batches * row_tokens)
    return (
        f"Packing: {count.num_batches} rows of {row_tokens} tokens an epoch, {filled:.1%} filled, "
        f"at most {count.max_row_examples} samples in a row"
    )


if __name__ == "__main__":
    run_command(main)
