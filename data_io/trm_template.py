"""The instruction template of instruction-tuned TRM, and its split into train and test rows.

    python -m data_io.trm_template input=slimorca.jsonl output=DIR [subset_size=64] [seed=0]

DIR/train.jsonl and DIR/test.jsonl get rows (condition, instruction, response) whose instruction is

    [SYSTEM]\\n...\\n[USER]\\n...\\n[ASSISTANT]\\n

The system's part is left out where there is none; a longer conversation repeats the others, and the
response is its last scored answer. Row i of the input is in the test split when
random.Random((seed << 32) ^ i).random() < test_ratio; rows that cannot be used are counted too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from data_io.console import note, run_command
from data_io.jsonl_writer import JsonlWriter
from data_io.options import parse_options
from data_io.readers import AUTO, READERS, choose_reader, require_reader, to_record
from data_io.records import DEFAULT_CONDITION, BadRowError, Conversation, Document, Record, Row
from data_io.source_files import SourceFile, find_sources

SYSTEM, USER, ASSISTANT = "[SYSTEM]\n", "[USER]\n", "[ASSISTANT]\n"
TEST_RATIO = 0.05
Part = Literal["train", "test"]


class TemplateOptions(BaseModel):
    """What the command line may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: list[Path] = Field(description="files or folders: JSONL (.gz, .zst), JSON, Parquet")
    output: Path = Field(description="folder for train.jsonl and test.jsonl")
    reader: str = Field(AUTO, description=f"layout of the rows: {', '.join((AUTO, *READERS))}")
    condition: str = Field(DEFAULT_CONDITION, description="of rows that name none")
    seed: NonNegativeInt = Field(0, description="of the split")
    test_ratio: float = Field(TEST_RATIO, ge=0, le=1, description="share of rows for the test")
    subset_size: PositiveInt | None = Field(None, description="most rows of each split")
    overwrite: bool = Field(False, description="replace files of an earlier run")


def to_trm_row(record: Record) -> Row:
    """A question and its answer, or the last scored answer of a conversation, in the template."""
    if isinstance(record, Document):
        raise BadRowError("document", "the template needs a question and its answer")
    if isinstance(record, Row):
        instruction = f"{USER}{record.instruction}\n{ASSISTANT}"
        return Row(record.condition, instruction, record.response)
    return _of_conversation(record)


def _of_conversation(conversation: Conversation) -> Row:
    turns = conversation.turns
    last = max((k for k, turn in enumerate(turns) if turn.is_scored), default=None)
    if last is None:
        raise BadRowError("no scored turn")
    text = f"{SYSTEM}{conversation.system}\n" if conversation.system else ""
    for turn in turns[:last]:
        if turn.role == "tool":
            raise BadRowError("tool turn", "the template has no place for it")
        text += f"{USER if turn.role == 'user' else ASSISTANT}{turn.text}\n"
    return Row(conversation.condition, text + ASSISTANT, turns[last].text)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Which rows are held out for the test, by their place in the input."""

    seed: int = 0
    test_ratio: float = TEST_RATIO
    subset_size: int | None = None  # most rows of each split; None: all

    def draw(self, index: int) -> float:
        """Row `index` is in the test split when this is below the ratio."""
        return random.Random((self.seed << 32) ^ index).random()

    def parts(self, rows: Iterable[Row | None]) -> Iterator[tuple[Part, Row]]:
        """Each row with its split, until both are full. None counts as a row, and is left out.

        Ends with ValueError where a split has stayed empty.
        """
        counts: Counter[Part] = Counter()
        lowest, highest, num_rows = 1.0, 0.0, 0
        for row in rows:
            num_rows += 1
            if row is None:
                continue
            draw = self.draw(num_rows - 1)
            lowest, highest = min(lowest, draw), max(highest, draw)
            part: Part = "test" if draw < self.test_ratio else "train"
            if counts[part] == self.subset_size:
                continue
            counts[part] += 1
            yield part, row
            if counts["train"] == counts["test"] == self.subset_size:
                return
        if len(counts) < 2:
            raise ValueError(self._emptiness(counts, lowest, highest, num_rows))

    def _emptiness(
        self, counts: Counter[Part], lowest: float, highest: float, num_rows: int
    ) -> str:
        """Why a split is empty, and the ratio of fewest digits by which none would be."""
        if lowest >= highest:
            return (
                f"of {num_rows} rows {sum(counts.values())} can be used, which cannot fill a train "
                "and a test split; give more"
            )
        ratio, digits = lowest, 1
        while not lowest < ratio <= highest:
            digits += 1
            scale = 10**digits
            above, below = floor(lowest * scale + 1) / scale, floor(highest * scale) / scale
            ratio = above if counts["train"] else below
        empty = "test" if counts["train"] else "train"
        return (
            f"test_ratio={self.test_ratio:g} leaves the {empty} split of {num_rows} rows empty; "
            f"test_ratio={ratio:.{digits}f} fills it"
        )


def rows_of(
    sources: Sequence[SourceFile], options: TemplateOptions, dropped: Counter[str]
) -> Iterator[Row | None]:
    """The rows of the sources in the template; None, counted, for one that cannot be used."""
    for source in sources:
        is_told = options.reader != AUTO
        for raw in source.rows():
            try:
                record = to_record(raw.fields, options.reader, condition=options.condition)
                if not is_told:
                    note(f"{source.name} is read as {choose_reader(raw.fields)}")
                    is_told = True
                yield to_trm_row(record)
            except BadRowError as error:
                dropped[error.reason] += 1
                yield None


def main(arguments: list[str]) -> None:
    options = parse_options(TemplateOptions, arguments, __doc__ or "")
    require_reader(options.reader)
    sources = find_sources(options.input)
    rule = SplitRule(options.seed, options.test_ratio, options.subset_size)
    dropped: Counter[str] = Counter()
    parts: tuple[Part, ...] = ("train", "test")
    try:
        with ExitStack() as stack:
            writers = {
                part: stack.enter_context(
                    JsonlWriter(options.output / f"{part}.jsonl", overwrite=options.overwrite)
                )
                for part in parts
            }
            for part, row in rule.parts(rows_of(sources, options, dropped)):
                writers[part].write(row)
    finally:
        for reason, count in dropped.most_common():
            note(f"left out: {count:,} rows, {reason}")
    note(*(f"{writer.path}: {writer.num_rows:,} rows" for writer in writers.values()))


if __name__ == "__main__":
    run_command(main)
