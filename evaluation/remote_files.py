"""Single files by path or address; what is downloaded is there for as long as it is used."""

from __future__ import annotations

import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from data_io.redaction import require_no_password

ADDRESSES = ("https://", "http://")
CHUNK_BYTES = 1 << 20
SILENCE_S = 60  # without a byte, after which the network counts as gone


@contextmanager
def local_copy(source: str, *, what: str, option: str) -> Iterator[Path]:
    """The file that `source` names, a path or an address.

    FileNotFoundError says what could not be had, and that `option` names another place.
    """
    if not source.startswith(ADDRESSES):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"{option}={source} is no file; give a file, or an address (https://...)"
            )
        yield path
        return
    require_no_password(source, option)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "download"
        try:
            _download(source, path)
        except (OSError, HTTPException, ValueError) as error:
            raise FileNotFoundError(
                f"{what} is not to be had from {source} ({error}); {option}= names another "
                "address, or a file that was brought here by other means"
            ) from None
        print(f"{source}: {path.stat().st_size / 1e6:,.1f} MB", flush=True)
        yield path


def _download(address: str, path: Path) -> None:
    with urllib.request.urlopen(address, timeout=SILENCE_S) as answer, path.open("wb") as file:
        expected = answer.headers.get("Content-Length")
        while chunk := answer.read(CHUNK_BYTES):
            file.write(chunk)
        if expected is not None and file.tell() != int(expected):
            raise OSError(f"{file.tell():,} of {int(expected):,} bytes came")
