"""Rows as lines of JSON: the file appears whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from data_io.records import Row


class JsonlWriter:
    """Writes beside `path`, and renames on a clean exit; after an error nothing is left.

    A file that is there already is kept until then, and refused unless `overwrite`.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file to write")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists; delete it, name another file, or set overwrite=true")
        self.path = path
        self._aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
        self.num_rows = 0

    def __enter__(self) -> JsonlWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._aside.open("w", encoding="utf-8", newline="\n")
        return self

    def write(self, row: Row | Mapping[str, Any]) -> None:
        fields = asdict(row) if isinstance(row, Row) else row
        self._file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        self.num_rows += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._aside.replace(self.path)
        finally:
            with suppress(OSError):  # a full disk says so once more
                self._file.close()
            self._aside.unlink(missing_ok=True)
