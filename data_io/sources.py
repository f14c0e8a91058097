"""What the sources of a command name: files, folders of them, and Hugging Face data sets.

A data set is written hub:OWNER/NAME, or hub:FOLDER; a folder that `save_to_disk` wrote is known as
one without that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_io.hub import HubData
from data_io.source_files import (
    MAX_LINE_BYTES,
    REPORTED_ROWS,
    RawRow,
    SourceFile,
    SourceState,
    find_sources,
)

HUB = "hub:"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class DataSetSource:
    """One split of a data set, in the place of a file."""

    data: HubData
    state: SourceState = field(compare=False)  # when it was found
    num_rows: int | None = field(compare=False)

    @classmethod
    def find(cls, data: HubData) -> DataSetSource:
        """ValueError: there is none, or it cannot be reached."""
        return cls(data, *data.facts())

    @property
    def path(self) -> str:
        return self.data.path

    @property
    def name(self) -> str:
        """As on the hub, or of its folder; then configuration and split."""
        folder = Path(self.data.path)
        name = folder.resolve().name if folder.is_dir() else self.data.path
        return "/".join(part for part in (name, self.data.name, self.data.split) if part)

    @property
    def folder_name(self) -> str:
        """Of the folder that tokenized data of it lie in."""
        return self.name.replace("/", "__")

    def rows(self, position: Callable[[int], None] | None = None) -> Iterator[RawRow]:
        """All rows. `position` is told now and then how many bytes, about, are read."""
        for number, row in enumerate(self.data.rows(), start=1):
            if _size(row) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{row.where} is longer than {MAX_LINE_BYTES:,} bytes, the most a row may "
                    "have; leave it out of the data set"
                )
            yield row
            if position and self.num_rows and number % REPORTED_ROWS == 0:
                position(self.state.size * min(number, self.num_rows) // self.num_rows)
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Refuses a data set that is no longer the one that was found."""
        if self.data.facts().state.identity != self.state.identity:
            raise ValueError(f"{self.data} changed while it was read; run again")


Source = SourceFile | DataSetSource


def find_all_sources(paths: Iterable[Path], config: str | None, split: str) -> list[Source]:
    """All that the paths name, each once, by name; ValueError says what is not there."""
    files, data = separated(paths, config, split)
    found: dict[str, Source] = {}
    for source in (*(find_sources(files) if files else ()), *map(DataSetSource.find, data)):
        other = found.setdefault(source.folder_name, source)
        if other != source:
            raise ValueError(
                f"{other.path} and {source.path} would both be {source.folder_name}; rename one, "
                "or use them in two commands"
            )
    return [found[name] for name in sorted(found)]


def separated(
    paths: Iterable[Path], config: str | None, split: str
) -> tuple[list[Path], list[HubData]]:
    """Files and folders of files; data sets, of which `config` and `split` are read."""
    files, data = [], []
    for path in paths:
        if str(path).startswith(HUB):
            data.append(HubData(_data_set_name(str(path).removeprefix(HUB)), config, split))
        elif path.is_dir() and _is_data_set([each.name for each in path.iterdir()]):
            data.append(HubData(str(path), config, split))
        else:
            _require_files(path)
            files.append(path)
    return files, data


def require_apart(output: Path, sources: Iterable[Path]) -> None:
    """What is made must not be among the source files of the next run."""
    for source in sources:
        place = str(source).removeprefix(HUB)
        if place and output.resolve().is_relative_to(Path(place).resolve()):
            raise ValueError(
                f"output={output} lies within the source {source}, where the next run would take "
                "it for source files; choose a folder outside"
            )


def _data_set_name(name: str) -> str:
    if not HUB_NAME.fullmatch(name) and not (name and Path(name).is_dir()):
        raise ValueError(
            f"{HUB}{name} is neither a name on the hub nor a folder that is here; write "
            f"{HUB}OWNER/NAME or {HUB}FOLDER"
        )
    return name


def _is_data_set(names: Sequence[str]) -> bool:
    """Whether files of these names are what `save_to_disk` wrote, or the cache of `datasets`."""
    has_table = "state.json" in names or any(name.endswith(".arrow") for name in names)
    return "dataset_dict.json" in names or ("dataset_info.json" in names and has_table)


def _require_files(path: Path) -> None:
    """Refuses a folder with a data set somewhere in it: its JSON files hold no rows."""
    for parent, subfolders, names in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if _is_data_set(names):
            raise ValueError(
                f"{parent} holds a data set of save_to_disk, not files of rows; name that folder "
                f"itself among the sources, or move it out of {path}"
            )


def _size(row: RawRow) -> int:
    return sum(len(each) for each in row.fields.values() if isinstance(each, str))
