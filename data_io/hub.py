"""A Hugging Face data set, by its name on the hub or as a local folder, as a stream of rows.

A folder may be what `save_to_disk` wrote, or hold files that `datasets` reads (JSONL, Parquet).
Nothing is kept on disk but what `datasets` itself keeps: its cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_io.source_files import RawRow, SourceState

SAVED_FILES = ("dataset_dict.json", "state.json")  # one of these is in what save_to_disk wrote
BEGINNING = "from the beginning"


class Facts(NamedTuple):
    """What is known of a split before it is read."""

    state: SourceState
    num_rows: int | None


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
            raise self._refusal(error, f"after row {number}" if number else BEGINNING) from None

    def facts(self) -> Facts:
        """By what a change is known. ValueError: there is no such data set, or no such split."""
        from datasets.exceptions import DatasetsError

        try:
            return self._facts_of_saved() if self._is_saved else self._facts_of_builder()
        except (OSError, ValueError, DatasetsError) as error:
            raise self._refusal(error, BEGINNING) from None

    @property
    def _is_saved(self) -> bool:
        folder = Path(self.path)
        return folder.is_dir() and any((folder / name).is_file() for name in SAVED_FILES)

    def _opened(self) -> Iterator[Mapping[str, Any]]:
        from datasets import load_dataset  # seconds

        if self._is_saved:
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

    def _facts_of_saved(self) -> Facts:
        data = self._saved()
        files = [Path(file["filename"]) for file in data.cache_files]
        return Facts(_state_of(files, Path(self.path)), len(data))

    def _facts_of_builder(self) -> Facts:
        from datasets import load_dataset_builder

        files = list(self.data_files) or None
        builder = load_dataset_builder(self.path, self.name, data_files=files)
        of_splits = {str(name): each for name, each in (builder.config.data_files or {}).items()}
        infos = builder.info.splits or {}
        known = list(of_splits or map(str, infos))
        if known and self.split not in known:
            raise ValueError(f"its splits are {', '.join(known)}")
        info = infos.get(self.split)
        num_rows = info.num_examples if info else None
        paths = [Path(file) for file in of_splits.get(self.split, ())]
        if paths and all(path.is_file() for path in paths):
            return Facts(_state_of(paths, Path(self.path)), num_rows)
        version = f"{self}, {builder.config.name}, {builder.info.version}, {builder.hash}"
        size = info.num_bytes if info else 0
        return Facts(SourceState(size or 0, 0, version if builder.hash else None), num_rows)

    def _refusal(self, error: BaseException, place: str) -> ValueError:
        return ValueError(f"{self} cannot be read {place} ({_one_line(error)}); {self._way_out()}")

    def _way_out(self) -> str:
        if Path(self.path).exists():
            return "correct the folder, or the split, name or data_files asked for"
        return (
            "where there is no network, copy its files here and give their folder instead of the "
            "name; where there is one, look at name and split"
        )


def _state_of(files: Sequence[Path], folder: Path) -> SourceState:
    """Of several files as one."""
    states = {os.path.relpath(path, folder): SourceState.of(path) for path in files}
    told = [(name, state.size, state.mtime_ns) for name, state in sorted(states.items())]
    return SourceState(
        sum(state.size for state in states.values()),
        max((state.mtime_ns for state in states.values()), default=0),
        hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32],
    )


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
