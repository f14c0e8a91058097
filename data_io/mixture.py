"""A mixture file: which sources a chat data set is made of, and how much of each.

    train:
      - name: gsm8k               # in the report
        source: openai/gsm8k      # a name on the hub, a folder, or a file
        config: main              # of the data set, where it has several
        split: train
        reader: gsm8k_calls       # a layout of data_io.readers or data_io.mixture_readers, or a
                                  # maker of rows: spelling, spelling_bee (of a list of words)
        repeat: 2                 # each example so many times an epoch
        limit: 1000               # so many records, drawn evenly of all
        condition: direct
        optional: true            # left out, and reported, where it is not there
    validation: ...               # the same

Owns the file and finding the sources; `data_io.prepare_mixture` writes the data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from data_io.hub import SAVED_FILES, HubData
from data_io.mixture_readers import MIXTURE_READERS
from data_io.parsing import parse_yaml
from data_io.readers import AUTO, READERS, to_record
from data_io.records import DEFAULT_CONDITION, Record
from data_io.source_files import BEYOND_JSON, SUFFIXES, RawRow, find_sources

MESSAGE_LISTS = "message_lists"  # files of which every row is a list of messages
MAKERS = ("spelling", "spelling_bee")
KNOWN_READERS = (AUTO, *READERS, *MIXTURE_READERS, MESSAGE_LISTS, *MAKERS)
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)(?=[^a-z]|$)")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
WORDS_SUFFIX = ".txt"  # a word a line


class MissingSourceError(ValueError):
    """A source is not there; for an optional one that is no error."""


class MixtureSource(BaseModel):
    """One source of a part."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    source: str
    config: str | None = None
    split: str = "train"
    reader: str = AUTO
    repeat: PositiveInt = 1
    limit: PositiveInt | None = None
    condition: str = DEFAULT_CONDITION
    optional: bool = False

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        if self.reader not in KNOWN_READERS:
            raise ValueError(f"reader={self.reader} is none of {', '.join(KNOWN_READERS)}")
        if self.reader in MAKERS and self.limit is None:
            raise ValueError(f"reader={self.reader} makes rows; limit says how many")
        return self

    @property
    def to_record(self) -> Callable[[Mapping[str, Any]], Record]:
        """Makes a record of the fields of a row."""
        if self.reader in MIXTURE_READERS:
            read = MIXTURE_READERS[self.reader]
            return lambda fields: read(fields, self.condition)
        reader = "messages" if self.reader == MESSAGE_LISTS else self.reader
        return partial(to_record, reader=reader, condition=self.condition)

    def rows(self, data_dir: Path | None) -> Iterator[RawRow]:
        """The rows of this source, streamed. MissingSourceError: it is not there."""
        rows = self._found(data_dir)
        try:
            first = next(rows)
        except StopIteration:
            return iter(())
        return chain([first], rows)

    def _found(self, data_dir: Path | None) -> Iterator[RawRow]:
        for place in self._places(data_dir):
            if any((place / name).is_file() for name in SAVED_FILES):
                return HubData(str(place), None, self.split).rows()
            files = _files_of(place, self.split)
            if files:
                return chain.from_iterable(map(self._rows_of, files))
        if data_dir is None and HUB_NAME.fullmatch(self.source) and not self._is_file_name:
            return self._hub_rows()
        looked = ", ".join(map(str, self._places(data_dir)))
        way_out = "" if self.optional else ", or mark the source as optional"
        raise MissingSourceError(
            f"{self.name}: there is no {self.split} part of {self.source} (looked for {looked}); "
            f"bring it there{way_out}"
        )

    def _places(self, data_dir: Path | None) -> list[Path]:
        """Where the source may lie here, each place once; that of an evaluation mirror first."""
        places = [Path(self.source)]
        if data_dir is not None:
            places = [data_dir / self.source.replace("/", "__"), data_dir / self.source, *places]
        if self._is_file_name:
            return list(dict.fromkeys(places))
        inner = self.config or "default"
        return list(dict.fromkeys(each for place in places for each in (place / inner, place)))

    @property
    def _is_file_name(self) -> bool:
        return self.source.endswith((*SUFFIXES, WORDS_SUFFIX))

    def _hub_rows(self) -> Iterator[RawRow]:
        rows = HubData(self.source, self.config, self.split).rows()
        try:
            first = next(rows)
        except StopIteration:
            return
        except ValueError as error:
            raise MissingSourceError(
                f"{self.name}: {error}; or give data_dir=DIR with a copy of it"
            ) from None
        yield first
        yield from rows

    def _rows_of(self, file: Path) -> Iterator[RawRow]:
        if file.suffix == WORDS_SUFFIX:
            return _word_rows(file)
        if self.reader == MESSAGE_LISTS:
            return _message_rows(file)
        return chain.from_iterable(source.rows() for source in find_sources([file]))


class ChatMixture(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    train: list[MixtureSource]
    validation: list[MixtureSource] = []

    @classmethod
    def load(cls, path: Path) -> ChatMixture:
        if not path.is_file():
            raise ValueError(f"mixture={path} is no file; config/data/mixtures has some")
        try:
            content = parse_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no YAML ({error})") from None
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'the file'}: "
                f"{fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors()
            )
            raise ValueError(f"{path} is no mixture: {faults} (docs/mixtures.md)") from None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for part, sources in (("train", self.train), ("validation", self.validation)):
            names = Counter(source.name for source in sources)
            twice = [name for name, count in names.items() if count > 1]
            if twice:
                raise ValueError(f"{part} names {', '.join(twice)} twice; use repeat, or two names")
        if not self.train:
            raise ValueError("train names no source")
        return self


def _files_of(place: Path, split: str) -> list[Path]:
    """The file itself; or of a folder those whose name begins with the split.

    Files that are named after no split are training data.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        return []
    suffixes = (*SUFFIXES, WORDS_SUFFIX)
    return [
        path
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name.endswith(suffixes) and not path.name.startswith(".")
        if _split_of(path.name, split) == split
    ]


def _split_of(name: str, asked: str) -> str:
    if re.match(rf"{re.escape(asked)}(?=[^a-z]|$)", name):
        return asked
    match = SPLIT_NAME.match(name)
    return match[1] if match else "train"


def _word_rows(file: Path) -> Iterator[RawRow]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield RawRow(f"{file}, line {number}", {"word": line.strip()})
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); convert it") from None


def _message_rows(file: Path) -> Iterator[RawRow]:
    """Rows of a JSON array of lists of messages, or of JSONL with one such list a line."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); convert it") from None
    if file.suffix == ".json":
        rows = _decoded(str(file), text)
        if not isinstance(rows, list):
            raise ValueError(f"{file} holds no list of conversations; use JSONL, or a list")
        placed = [(f"{file}, row {number}", row) for number, row in enumerate(rows, 1)]
    else:
        lines = ((f"{file}, line {at}", line) for at, line in enumerate(text.split("\n"), 1))
        placed = [(where, _decoded(where, line)) for where, line in lines if line.strip()]
    for where, row in placed:
        yield RawRow(where, row if isinstance(row, dict) else {"messages": row})


def _decoded(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}); correct it") from None
    except (RecursionError, ValueError):
        raise ValueError(f"{where} {BEYOND_JSON}; correct it") from None
