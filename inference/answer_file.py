"""A JSONL file of answers that grows line by line and can be gone on with after a kill.

Beside it lies `<file>.settings.json`: how its answers are made. Lines come as answers finish; once
all are there they are put in order.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_io.parsing import parse_json

SETTINGS_SUFFIX = ".settings.json"


class AnswerFile:
    """The lines that are there, and more of them; each has an `index` of its own."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Begins the file, or goes on with it where it was begun with the same settings.

        A last line that was cut off by a kill is dropped. ValueError for a file of other settings,
        of other origin, with a broken line, or that another process is writing.
        """
        self.path = path
        self.settings_path = path.with_name(path.name + SETTINGS_SUFFIX)
        self._lock = _locked(path)
        try:
            self._begin(dict(settings))
            self.done = {line["index"] for line in self._lines()}
        except ValueError:
            self._unlock()
            raise
        self._file: IO[bytes] = path.open("ab", buffering=0)

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends a line in one piece."""
        self._file.write(_encoded(line))
        self.done.add(line["index"])

    def in_order(self) -> list[dict[str, Any]]:
        """Closes the file, puts its lines in the order of their indices, and returns them."""
        self._file.close()
        lines = {line["index"]: line for line in self._lines()}
        ordered = [lines[index] for index in sorted(lines)]
        _replace(self.path, b"".join(map(_encoded, ordered)))
        self._unlock()
        return ordered

    def _unlock(self) -> None:
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def _begin(self, settings: dict[str, Any]) -> None:
        if not self.path.exists():
            content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            _replace(self.settings_path, content.encode())
            return
        if not self.settings_path.is_file():
            raise ValueError(
                f"{self.path} exists without {self.settings_path.name} to tell how it was "
                "made; give another output=, or remove it"
            )
        try:
            begun = parse_json(self.settings_path.read_bytes())
            if not isinstance(begun, dict):
                raise ValueError("it holds no object")
        except ValueError as error:
            raise ValueError(f"{self.settings_path} is no JSON: {error}") from None
        keys = dict.fromkeys((*settings, *begun))
        changed = [
            f"{key}={begun.get(key)} (now {settings.get(key)})"
            for key in keys
            if begun.get(key) != settings.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was begun with {', '.join(changed)}; go on with the same settings, "
                "give another output=, or remove it"
            )
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, content in enumerate(file, 1):
                try:
                    line = parse_json(content)
                except ValueError:
                    line = None
                if not isinstance(line, dict) or not isinstance(line.get("index"), int):
                    raise ValueError(
                        f"{self.path}:{number} is no line of answers; remove that line, or the file"
                    )
                yield line


def _locked(path: Path) -> IO[bytes]:
    """Held as long as it is open, by this process alone; a killed one holds nothing."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder; make it first")
    lock = path.with_name(f".{path.name}.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(
            f"{path} is being written by another process; wait for it, or give another output="
        ) from None
    return lock


def _encoded(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    """Writes a file aside and puts it in its place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
