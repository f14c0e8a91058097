"""A Hugging Face data set, by its name on the hub or as a local folder, as a stream of rows.

A folder may be what `save_to_disk` wrote, or hold files that `datasets` reads (JSONL, Parquet).
Nothing is kept on disk but what `datasets` itself keeps: its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_io.source_files import RawRow

SAVED_FILES = ("dataset_dict.json", "state.json")  # one of these is in what save_to_disk wrote


@dataclass(frozen=True, slots=True)
class HubData:
    """One split of a data set."""

    path: str  # a name on the hub, such as openai/gsm8k, or a local folder
    name: str | None = None  # of its configuration
    split: str = "train"
    data_files: tuple[str, ...] = ()  # of the data set; none: all of the split

    def __str__(self) -> str:
        return ", ".join(part for part in (self.path, self.name, self.split) if part)

    def rows(self) -> Iterator[RawRow]:
        """All rows, streamed. ValueError says why the data set cannot be read."""
        from datasets.exceptions import DatasetsError

        number = 0
        try:
            for fields in self._opened():
                number += 1
                yield RawRow(f"{self}, row {number}", dict(fields))
        except (OSError, ValueError, DatasetsError) as error:
            place = f"after row {number}" if number else "from the beginning"
            raise ValueError(
                f"{self} cannot be read {place} ({_one_line(error)}); {self._way_out()}"
            ) from None

    def _opened(self) -> Iterator[Mapping[str, Any]]:
        from datasets import load_dataset  # seconds

        folder = Path(self.path)
        if folder.is_dir() and any((folder / name).is_file() for name in SAVED_FILES):
            return iter(self._saved())
        return iter(
            load_dataset(
                self.path,
                self.name,
                split=self.split,
                data_files=list(self.data_files) or None,
                streaming=True,
            )
        )

    def _saved(self) -> Any:
        """What `save_to_disk` wrote, mapped."""
        from datasets import DatasetDict, load_from_disk

        if self.name is not None or self.data_files:
            raise ValueError("a folder of save_to_disk has neither configurations nor data_files")
        data = load_from_disk(self.path)
        if isinstance(data, DatasetDict):
            if self.split not in data:
                raise ValueError(f"its splits are {', '.join(map(str, data))}")
            return data[self.split]
        if data.split is not None and str(data.split) != self.split:
            raise ValueError(f"its only split is {data.split}")
        return data

    def _way_out(self) -> str:
        if Path(self.path).exists():
            return "correct the folder, or the split, name or data_files asked for"
        return (
            "where there is no network, copy its files here and give their folder instead of the "
            "name; where there is one, look at name and split"
        )


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
