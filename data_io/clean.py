"""Cleans a published data set: rows (condition, instruction, response) as JSONL.

    python -m data_io.clean source=gsm8k output=gsm8k_train.jsonl [input=FILES_OR_FOLDERS]

Without `input` the training split comes from the Hugging Face hub or its cache. What is dropped is
counted by reason, on standard error. `data_io/cleaning/` has a file per source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data_io.cleaning import SOURCES
from data_io.cleaning.source import CleanedSource
from data_io.console import note, run_command
from data_io.hub import HubData
from data_io.jsonl_writer import JsonlWriter
from data_io.options import parse_options
from data_io.records import BadRowError
from data_io.source_files import RawRow, find_sources

HELD_OUT = re.compile(r"(?:^|/)(?:test|validation|valid|val|dev)(?:[^a-z]|$)")


class CleanOptions(BaseModel):
    """What the command line may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description=f"the data set: {', '.join(SOURCES)}")
    output: Path = Field(description="JSONL file to write")
    input: list[Path] = Field([], description="its files, or folders of training files alone")
    overwrite: bool = Field(False, description="replace the output of an earlier run")


def raw_rows(source: CleanedSource, inputs: list[Path]) -> Iterator[RawRow]:
    """The rows of some files, or of the hub where there are none."""
    if not inputs:
        return chain.from_iterable(
            HubData(source.dataset, name, source.split).rows() for name in source.names
        )
    files = find_sources(inputs)
    held_out = [file.name for file in files if HELD_OUT.search(file.name)]
    if held_out and any(path.is_dir() for path in inputs):
        raise ValueError(
            f"{held_out[0]} of the input looks held out, and nothing is trained on that; name the "
            "training files, or those that are meant, one by one"
        )
    return chain.from_iterable(file.rows() for file in files)


def clean(source: CleanedSource, rows: Iterator[RawRow], writer: JsonlWriter) -> Counter[str]:
    """Writes what is clean, and counts what is not by reason."""
    dropped: Counter[str] = Counter()
    for row in rows:
        try:
            writer.write(source.clean(row.fields))
        except BadRowError as error:
            if error.reason not in dropped:
                note(f"{row.where} is dropped: {error}")
            dropped[error.reason] += 1
    if not writer.num_rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
        raise ValueError(
            f"no row can be used ({reasons or 'there are none'}); are these the files of "
            f"{source.dataset}?"
        )
    return dropped


def main(arguments: list[str]) -> None:
    options = parse_options(CleanOptions, arguments, __doc__ or "")
    if options.source not in SOURCES:
        raise ValueError(f"source={options.source} is none of {', '.join(SOURCES)}")
    source = SOURCES[options.source]
    with JsonlWriter(options.output, overwrite=options.overwrite) as writer:
        dropped = clean(source, raw_rows(source, options.input), writer)
    for reason, count in dropped.most_common():
        note(f"dropped: {count:,} rows, {reason}")
    note(f"{options.output}: {writer.num_rows:,} rows")


if __name__ == "__main__":
    run_command(main)
