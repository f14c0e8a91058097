"""Writes a mirror of the benchmarks' data, for machines without a network.

    python -m evaluation.fetch data_dir=DIR [run_only=[MATH,DROP]] [format=parquet]
    python -m evaluation.fetch data_dir=DIR run_only=[ARC-Easy,SpellingBee]   of chat tasks
    python -m evaluation.fetch bundle=DIR [bundle_from=eval_bundle.zip]       of CORE

What is already there is kept; a file or a bundle appears when it is whole. `from_dir=DIR` copies
from another mirror instead of the hub.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_io.options import parse_options
from evaluation.benchmarks import BENCHMARKS, benchmark_named
from evaluation.benchmarks.aime import AIMEMajorityVoting
from evaluation.benchmarks.protocol import Benchmark, DataSource, Row, Split
from evaluation.chat_tasks import CHAT_TASKS, chat_task_named
from evaluation.chat_tasks.generated import WORDS, WORDS_ADDRESS
from evaluation.core.archive import ADDRESS, fetch_bundle
from evaluation.mirror import Hub, LocalMirror, folder_of
from evaluation.remote_files import local_copy
from training.console import refuse

AIME_YEARS = ("24", "25")


class FetchOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path | None = Field(
        default=None, description="folder of the mirror; made where it is missing"
    )
    run_only: tuple[str, ...] = Field(
        default=(), description="benchmarks and chat tasks, default all benchmarks"
    )
    format: Literal["jsonl", "parquet"] = Field(default="jsonl", description="jsonl or parquet")
    from_dir: Path | None = Field(default=None, description="another mirror to copy from")
    words_from: str = Field(
        default=WORDS_ADDRESS, description="words of the spelling tasks, one a line: file, address"
    )
    bundle: Path | None = Field(default=None, description="folder of the CORE bundle to make")
    bundle_from: str = Field(default=ADDRESS, description="its zip archive: file, address")

    @model_validator(mode="after")
    def _makes_something(self) -> Self:
        if self.data_dir is None and self.bundle is None:
            raise ValueError("data_dir=... is required (a mirror), or bundle=... (of CORE)")
        return self


def wanted_splits(names: Sequence[str]) -> dict[Split, str]:
    """Each split that the benchmarks read by default, with one that reads it."""
    benchmarks: list[Benchmark] = []
    for name in names or BENCHMARKS:
        kind = _task_named(name)
        if kind is AIMEMajorityVoting:
            benchmarks += [AIMEMajorityVoting(year=year) for year in AIME_YEARS]
        else:
            benchmarks.append(kind())
    return {split: each.name for each in reversed(benchmarks) for split in each.splits()}


def _task_named(name: str) -> type[Benchmark]:
    """A benchmark, or a chat task by either of its names."""
    is_chat = name in CHAT_TASKS or name in {task.name for task in CHAT_TASKS.values()}
    return chat_task_named(name) if is_chat and name not in BENCHMARKS else benchmark_named(name)


def fetch_words(data_dir: Path, source: str) -> None:
    """Writes the word list of the spelling tasks, where the mirror lacks it."""
    if LocalMirror(data_dir).files(WORDS):
        print(f"{WORDS}: is there")
        return
    with local_copy(source, what="the word list", option="words_from") as path:
        try:
            lines = path.read_text(encoding="utf-8").split()
        except UnicodeDecodeError as error:
            raise ValueError(f"words_from={source} is no text: {error}") from None
    file = folder_of(data_dir, WORDS) / f"{WORDS.split}.jsonl"
    with published_when_whole(file) as aside:
        count = write_jsonl(aside, iter([{"word": word} for word in lines]))
    print(f"{WORDS}: {count:,} words")


def fetch(source: DataSource, data_dir: Path, splits: dict[Split, str], suffix: str) -> None:
    """Writes what the mirror lacks, and says what it does.

    What another mirror lacks is named at the end (FileNotFoundError); the hub's first failure ends
    it, as a network that is not there takes half a minute per split.
    """
    mirror = LocalMirror(data_dir)
    if not splits:
        print("nothing to fetch: what is named needs no data")
    lacking: list[str] = []
    for split, benchmark in sorted(splits.items(), key=lambda pair: str(pair[0])):
        if mirror.files(split):
            print(f"{split}: is there")
            continue
        if isinstance(source, LocalMirror) and not source.files(split):
            lacking.append(f"{split} ({benchmark})")
            continue
        rows = source.rows(split, benchmark=benchmark)
        file = folder_of(data_dir, split) / f"{split.split}.{suffix}"
        with published_when_whole(file) as aside:
            count = write_jsonl(aside, rows) if suffix == "jsonl" else write_parquet(aside, rows)
        print(f"{split}: {count:,} rows, {file.stat().st_size / 1e6:.1f} MB", flush=True)
    if lacking:
        raise FileNotFoundError(f"the mirror copied from does not have {', '.join(lacking)}")


@contextmanager
def published_when_whole(file: Path) -> Iterator[Path]:
    """A path to write to, that becomes `file` at the end of the block, or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.part")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def write_jsonl(file: Path, rows: Iterator[Row]) -> int:
    """How many rows were written."""
    count = 0
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")
            count += 1
    return count


def write_parquet(file: Path, rows: Iterator[Row]) -> int:
    """How many rows were written. Holds the split in memory."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    parquet.write_table(table, file, compression="zstd")
    return table.num_rows


def main(arguments: Sequence[str]) -> None:
    try:
        options = parse_options(FetchOptions, arguments, __doc__ or "")
        if options.bundle is not None:
            fetch_bundle(options.bundle, options.bundle_from)
        if options.data_dir is not None:
            splits = wanted_splits(options.run_only)
            if options.from_dir is None and splits.pop(WORDS, None):
                fetch_words(options.data_dir, options.words_from)
            source = Hub() if options.from_dir is None else LocalMirror(options.from_dir)
            fetch(source, options.data_dir, splits, options.format)
    except (ValueError, OSError) as error:
        refuse(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
