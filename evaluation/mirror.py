"""Where the rows of data sets come from: a local mirror, or the hub.

A mirror is a folder of `<data set with / as __>/<configuration or 'default'>/<split>.jsonl`, one
JSON object a line; `.parquet` and the hub's own `<split>-00000-of-00001.parquet` are read as well.
`python -m evaluation.fetch data_dir=DIR` makes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from data_io.parsing import parse_json
from evaluation.benchmarks.protocol import DataSource, Row, Split

BATCH_ROWS = 1024  # of a Parquet file at a time


def data_source(data_dir: Path | None) -> DataSource:
    """The mirror in `data_dir`, or the hub where that is None."""
    return Hub() if data_dir is None else LocalMirror(data_dir)


def folder_of(data_dir: Path, split: Split) -> Path:
    """Where a mirror keeps the files of a configuration."""
    return data_dir / split.dataset.replace("/", "__") / (split.config or "default")


@dataclass(frozen=True, slots=True)
class LocalMirror:
    """Data sets as files below a folder; nothing is downloaded."""

    data_dir: Path

    def rows(self, split: Split, *, benchmark: str) -> Iterator[Row]:
        """In file order. FileNotFoundError names the file expected and the command that gets it."""
        files = self.files(split)
        if not files:
            expected = (folder_of(self.data_dir, split) / f"{split.split}.jsonl").absolute()
            raise FileNotFoundError(
                f"{benchmark} needs {expected} (or .parquet), which is not there; where there is a "
                f"network, {fetch_command(benchmark, self.data_dir)} writes it"
            )
        return _some_rows(files, split)

    def files(self, split: Split) -> list[Path]:
        """The files of a split; none where the mirror lacks it."""
        folder = folder_of(self.data_dir, split)
        for suffix in (".jsonl", ".parquet"):
            if (folder / f"{split.split}{suffix}").is_file():
                return [folder / f"{split.split}{suffix}"]
        return _all_parts(sorted(folder.glob(f"{split.split}-[0-9]*-of-[0-9]*.parquet")))


@dataclass(frozen=True, slots=True)
class Hub:
    """The published data sets, through the cache of `datasets`."""

    def rows(self, split: Split, *, benchmark: str) -> Iterator[Row]:
        """FileNotFoundError where there is neither a network nor a cached copy."""
        from datasets import load_dataset  # seconds

        try:
            table = load_dataset(split.dataset, split.config, split=split.split)
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FileNotFoundError(
                f"{benchmark} needs {split}, and load_dataset did not give it ({reason}). Without "
                f"a network, read a mirror with data_dir=DIR; where there is one, "
                f"{fetch_command(benchmark, None)} makes it"
            ) from error
        return cast(Iterator[Row], iter(table))


def _all_parts(files: list[Path]) -> list[Path]:
    """ValueError where parts of a split are missing: a part of a benchmark is another benchmark."""
    counts = {int(file.stem.rpartition("-of-")[2]) for file in files}
    if files and counts != {len(files)}:
        raise ValueError(
            f"{files[0].parent} has {len(files)} of the parts that its names tell of "
            f"({files[0].name}, ...); copy the others too"
        )
    return files


def _some_rows(files: list[Path], split: Split) -> Iterator[Row]:
    """ValueError where there are none."""
    has_rows = False
    for file in files:
        for row in read_rows(file):
            has_rows = True
            yield row
    if not has_rows:
        raise ValueError(f"{split}: {files[0]} has no rows; remove it, and fetch it again")


def fetch_command(benchmark: str, data_dir: Path | None) -> str:
    return f"`python -m evaluation.fetch data_dir={data_dir or 'DIR'} run_only=[{benchmark}]`"


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a JSONL or Parquet file. ValueError names a line that is no JSON object."""
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8")
                row = parse_json(text)
            except ValueError as error:  # of UTF-8 too
                raise ValueError(f"{file}:{number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{number} is no JSON object: {text[:80]!r}")
            yield row


def _parquet_rows(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{file} is no Parquet file: {error}") from None
