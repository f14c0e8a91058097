"""Plain text as windows of token ids: files -> documents -> pieces -> windows.

Everything is streamed: a document of any length takes the memory of one piece. A piece ends with a
line where it can, so that a tokenizer hardly ever sees a word cut in two.
"""

from __future__ import annotations

import glob
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from data_io.parsing import parse_json
from data_io.prompt_format import PromptFormat

ROWS = ".jsonl"  # files of this suffix hold a document a line, all others are one document
IN_FOLDERS = (".txt", ROWS)
PIECE_CHARS = 2**16
ENCODED_TOGETHER = 32  # pieces: the tokenizer's threads share them


class Piece(NamedTuple):
    """A stretch of a document, short enough to encode."""

    text: str  # empty: the document holds none
    document: int  # counted from 0, without empty ones
    is_last: bool


def text_files(patterns: str) -> list[Path]:
    """The files that comma-separated files, folders and globs name, each once."""
    found: list[Path] = []
    for pattern in patterns.split(","):
        # glob, as Path.glob takes no absolute patterns; a name that exists may hold brackets
        exists = pattern and Path(pattern).exists()
        names = [pattern] if exists else glob.glob(pattern, recursive=True)  # noqa: PTH207
        files: list[Path] = []
        for path in map(Path, names):
            inside = path.rglob("*") if path.is_dir() else ()
            files += (file for file in inside if file.suffix in IN_FOLDERS and file.is_file())
            files += [path] if path.is_file() else []
        if not files:
            raise ValueError(
                f"text={pattern} names no file; give files, globs, or folders that hold "
                f"{' or '.join(IN_FOLDERS)} files, joined by commas"
            )
        found += sorted(files)
    return list(dict.fromkeys(found))


def pieces_of(files: Sequence[Path]) -> Iterator[Piece]:
    """All documents, one after another."""
    number = 0
    for path in files:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for document in _documents(path, file):
                    for text, is_last in cut_text(document):
                        yield Piece(text, number, is_last)
                        number += is_last and text != ""
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); convert it or leave it out") from None


def windows_of(
    pieces: Iterable[Piece], prompt_format: PromptFormat, size: int
) -> Iterator[NDArray[np.int32]]:
    """The ids of each document and `eoa`, `size` at a time; its last window may be shorter."""
    rest: list[int] = []
    for ids, ends_document in _encoded(pieces, prompt_format):
        rest += ids
        end = len(rest) if ends_document else len(rest) // size * size
        for start in range(0, end, size):
            yield np.array(rest[start : start + size], np.int32)
        del rest[:end]
    if rest:  # of a document whose end is not among the pieces
        yield np.array(rest, np.int32)


def _documents(path: Path, file: TextIO) -> Iterator[TextIO]:
    """The file itself, or the `text` of each of its rows."""
    if path.suffix != ROWS:
        yield file
        return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = parse_json(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(
                f'{path}, line {number}: {line[:60]!r} is no row of text; write {{"text": "..."}}, '
                "or give the file another suffix if it is one document"
            )
        yield io.StringIO(text, newline="")


def cut_text(document: TextIO) -> Iterator[tuple[str, bool]]:
    """A text in pieces, and whether each is the last."""
    text = ""
    while block := document.read(PIECE_CHARS):
        text += block
        while len(text) > PIECE_CHARS:
            end = text.rfind("\n", 0, PIECE_CHARS) + 1 or PIECE_CHARS
            yield text[:end], False
            text = text[end:]
    yield text, True


def _encoded(
    pieces: Iterable[Piece], prompt_format: PromptFormat
) -> Iterator[tuple[list[int], bool]]:
    """The ids of each piece, and whether it ends its document."""
    pieces = iter(pieces)
    while batch := list(itertools.islice(pieces, ENCODED_TOGETHER)):
        encoded = prompt_format.encode_responses([piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            yield (ids if piece.is_last else ids[:-1]), piece.is_last
