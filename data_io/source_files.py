"""Source files as rows of fields, streamed: JSONL (also .gz, .zst), JSON arrays, Parquet.

Owns finding and reading files; what the fields mean is the business of `data_io.readers`. The
memory of a file does not grow with its size; a row has at most MAX_LINE_BYTES.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_io.safe_paths import leads_back

MAX_LINE_BYTES = 2**24  # of a row; the tokenizer needs some 20 times as much to encode it
BLOCK_BYTES = 2**20
BATCH_BYTES = 2**23  # of a Parquet file, decoded together
BATCH_ROWS = 4096
CODECS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
READABLE = ", ".join(SUFFIXES)
REPORTED_ROWS = 256  # the position is told after so many
BEYOND_JSON = "is JSON nested too deeply, or has a number of thousands of digits"
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


class RawRow(NamedTuple):
    """The fields of a row, and where it stands, for messages."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SourceState:
    """By which a changed file is known."""

    size: int  # bytes
    mtime_ns: int
    identity: str | None = ""  # of what is no file; None: nothing tells whether it changed

    @classmethod
    def of(cls, path: Path) -> SourceState:
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file. `name` is its path below the folder it was found in."""

    path: Path
    name: str
    state: SourceState = field(compare=False)  # when it was found

    @property
    def folder_name(self) -> str:
        """Of the folder that tokenized data of this file lie in."""
        return self.name.replace("/", "__")

    def rows(self, position: Callable[[int], None] | None = None) -> Iterator[RawRow]:
        """All rows. `position` is told now and then how many bytes of the file are read.

        ValueError names the file and the place of what is no row, or says that the file changed
        since it was found.
        """
        self.require_unchanged()
        try:
            read = _parquet_rows if self.path.suffix == ".parquet" else _json_rows
            yield from read(self.path, position or (lambda _: None))
        except (ValueError, OSError) as error:
            self.require_unchanged()  # more to the point than what reading half of it gives
            if isinstance(error, OSError) and error.errno is None:  # of pyarrow: broken content
                raise _refusal(self.path, f"cannot be read ({_one_line(error)})") from None
            raise
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Refuses a file that is no longer the one that was found."""
        now = SourceState.of(self.path) if self.path.is_file() else None
        if now != self.state:
            what = f"{self.state.size} bytes, now {now.size}" if now else "now it is gone"
            raise ValueError(
                f"{self.path} changed while it was read ({what}); run again when it is complete"
            )


def find_sources(paths: Iterable[Path]) -> list[SourceFile]:
    """The files that the paths name, each once, by name; a folder is searched.

    Names are relative to the folder given, or the file's own. Hidden files and folders, and files
    of other kinds, are passed over.
    """
    found: dict[str, SourceFile] = {}
    for path in paths:
        files = _searched(path) if path.is_dir() else [(path, path.name)]
        if not files:
            raise ValueError(f"{path} holds no {READABLE} file; name a folder or file that does")
        for file, name in files:
            if not file.is_file():
                raise ValueError(f"{file} does not exist; name a file or a folder of {READABLE}")
            if not name.endswith(SUFFIXES):
                raise ValueError(f"{file} is no {READABLE} file; convert it or leave it out")
            source = SourceFile(file, name, SourceState.of(file))
            other = found.setdefault(source.folder_name, source)
            if other.path.resolve() != file.resolve():
                raise ValueError(
                    f"{other.path} and {file} would both be {source.folder_name}; rename one, or "
                    "name the folder above both"
                )
    return [found[name] for name in sorted(found)]


def _searched(folder: Path) -> list[tuple[Path, str]]:
    files = []
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        seen = (Path(parent) / name for name in sorted(subfolders) if not name.startswith("."))
        subfolders[:] = [path.name for path in seen if not leads_back(path)]
        for name in names:
            if name.endswith(SUFFIXES) and not name.startswith("."):
                path = Path(parent) / name
                files.append((path, path.relative_to(folder).as_posix()))
    return files


def _json_rows(path: Path, position: Callable[[int], None]) -> Iterator[RawRow]:
    with path.open("rb", buffering=0) as raw:
        codec = CODECS.get(path.suffix)
        plain: Any = pa.CompressedInputStream(pa.PythonFile(raw), codec) if codec else raw
        file = io.BufferedReader(plain, BLOCK_BYTES)
        start = file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        read = _array_rows if path.suffix == ".json" and start == b"[" else _line_rows
        yield from read(path, file, lambda: position(raw.tell()))


def _line_rows(path: Path, file: BinaryIO, report: Callable[[], None]) -> Iterator[RawRow]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise _too_long(where)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        yield RawRow(where, _object(where, line))
        if number % REPORTED_ROWS == 0:
            report()
    report()


def _object(where: str, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _refusal(where, f"is not UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        raise _refusal(where, f"is no JSON: {error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError):
        raise _refusal(where, BEYOND_JSON) from None
    if not isinstance(fields, dict):
        raise _refusal(where, f"holds {str(fields)[:40]!r}, but a row is an object {{...}}")
    return fields


def _array_rows(path: Path, file: BinaryIO, report: Callable[[], None]) -> Iterator[RawRow]:
    """The objects of one JSON array, decoded one at a time out of a buffer."""
    text = _ArrayText(path, io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    text.expect("[")
    is_over = text.next_character() == "]" and bool(text.expect("]"))
    while not is_over:
        text.next_character()  # so that the line is that of the object
        where = f"{path}, row {text.number + 1} (line {text.line})"
        yield RawRow(where, text.read_object(where))
        if text.number % REPORTED_ROWS == 0:
            report()
        is_over = text.expect(",]") == "]"
    report()
    if text.next_character():
        raise _refusal(path, f"goes on after the end of its array, in line {text.line}")


class _ArrayText:
    """The text of a JSON array, as far as it is needed."""

    def __init__(self, path: Path, file: io.TextIOWrapper) -> None:
        self.path, self.file = path, file
        self.text, self.at = "", 0
        self.line = 1  # of the next character
        self.number = 0  # of objects read
        self.decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """The next one that is no white space; "" at the end."""
        while True:
            space = WHITE_SPACE.match(self.text, self.at)
            assert space is not None  # it also matches nothing
            self._pass(space.end() - self.at)
            if self.at < len(self.text) or not self._read(BLOCK_BYTES):
                return self.text[self.at : self.at + 1]

    def expect(self, characters: str) -> str:
        found = self.next_character()
        if not found or found not in characters:
            fault = f"has {found!r}" if found else "has the end of the file"
            fault += f" instead of {' or '.join(characters)}"
            raise _refusal(f"{self.path}, line {self.line}", fault)
        self._pass(1)
        return found

    def read_object(self, where: str) -> dict[str, Any]:
        if self.next_character() != "{":
            raise _refusal(where, "is no row: a row is an object {...}")
        wanted = BLOCK_BYTES
        while True:
            try:
                fields, end = self.decoder.raw_decode(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > MAX_LINE_BYTES:
                    raise _refusal(
                        where, f"is no JSON, or longer than {MAX_LINE_BYTES} characters: {error}"
                    ) from None
                line = self.line + self.text.count("\n", self.at, error.pos)
                if not self._read(wanted):
                    raise _refusal(where, f"is no JSON: {error.msg} in line {line}") from None
                wanted *= 2  # so that a long object is tried a few times only
            except (RecursionError, ValueError):
                raise _refusal(where, BEYOND_JSON) from None
        if end - self.at > MAX_LINE_BYTES:
            raise _too_long(where)
        self._pass(end - self.at)
        self.number += 1
        return fields

    def _pass(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def _read(self, count: int) -> bool:
        """Reads on; False at the end of the file."""
        try:
            more = self.file.read(count)
        except UnicodeDecodeError as error:
            raise _refusal(self.path, f"is not UTF-8 ({error})") from None
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)


def _parquet_rows(path: Path, position: Callable[[int], None]) -> Iterator[RawRow]:
    """Row by row; `position` is estimated from the share of rows read."""
    try:
        file = pq.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _refusal(path, f"is no Parquet file ({_one_line(error)})") from None
    size, number = path.stat().st_size, 0
    with file:
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        row_bytes = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=1)
        batch_rows = int(min(BATCH_ROWS, max(1, BATCH_BYTES // max(1, row_bytes))))
        try:
            for batch in file.iter_batches(batch_rows):
                for fields in _batch_fields(batch):
                    number += 1
                    where = f"{path}, row {number}"
                    length = sum(len(each) for each in fields.values() if isinstance(each, str))
                    if length > MAX_LINE_BYTES:
                        raise _too_long(where)
                    yield RawRow(where, fields)
                position(size * number // max(1, file.metadata.num_rows))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise _refusal(f"{path}, after row {number}", f"is broken ({error})") from None
        except UnicodeDecodeError as error:
            raise _refusal(f"{path}, after row {number}", f"is not UTF-8 ({error})") from None


def _batch_fields(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        yield dict(zip(names, values, strict=True))


def _too_long(where: str) -> ValueError:
    return _refusal(where, f"is longer than {MAX_LINE_BYTES:,} bytes, the most a row may have")


def _refusal(where: str | Path, fault: str) -> ValueError:
    return ValueError(f"{where} {fault}; correct the file or leave it out")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
