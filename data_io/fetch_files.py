"""The files of a data set from an address or the hub: kept in a folder, resumed where they stopped.

A file appears under its name when it is whole; until then it is `.NAME.part`, and beside it stands
by which sign of the server's its beginning is known to belong to the rest.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote

from tqdm import tqdm

from data_io.parsing import parse_json
from data_io.redaction import require_no_password
from data_io.safe_paths import require_inside
from data_io.source_files import SUFFIXES, SourceFile, SourceState

ADDRESSES = ("https://", "http://")
CHUNK_BYTES = 1 << 20
SILENCE_S = 60  # without a byte, after which the network counts as gone
ATTEMPTS, PAUSE_S = 5, 1.0  # the pause doubles from attempt to attempt
WHOLE, REST, BEYOND = 200, 206, 416  # HTTP's codes of answers
PARQUET_END = b"PAR1"


def fetch_all(address: str, names: Sequence[str], folder: Path, *, workers: int) -> list[Path]:
    """`address/NAME` for each name, into `folder`; what is there is kept.

    ValueError names the file that could not be had; the others stay, and so does what came of it.
    """
    require_no_password(address, "source")
    require_inside(names)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = [
            pool.submit(fetch, f"{address.rstrip('/')}/{quote(path.name)}", path)
            for path in missing
        ]
        for job in tqdm(jobs, desc="fetching", unit=" files", disable=None if jobs else True):
            job.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return paths


def as_sources(paths: Iterable[Path], folder: Path) -> list[SourceFile]:
    """Fetched files, by their names below the folder: those of a data set may differ by folder."""
    files = []
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path} is no {', '.join(SUFFIXES)} file; ask for one that is")
        files.append(SourceFile(path, os.path.relpath(path, folder), SourceState.of(path)))
    return files


def fetch(address: str, path: Path) -> None:
    """One file; tried again after failures of the network, from where it stopped."""
    part = path.with_name(f".{path.name}.part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _continue(address, part)
            break
        except HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS:
                raise ValueError(
                    f"{address} is not to be had ({error}); correct the address, or ask for fewer "
                    "shards"
                ) from None
        except (OSError, HTTPException) as error:
            if attempt == ATTEMPTS:
                raise ValueError(
                    f"{address} is not to be had ({error}); run again to go on from byte "
                    f"{part.stat().st_size if part.is_file() else 0}"
                ) from None
        time.sleep(PAUSE_S * 2 ** (attempt - 1))
    if path.suffix == ".parquet" and not _ends_with(part, PARQUET_END):
        part.unlink()
        raise ValueError(f"{address} is no Parquet file; correct the address")
    part.replace(path)
    _sign_of(part).unlink(missing_ok=True)


def fetch_from_hub(name: str, num_files: int | None, folder: Path) -> list[Path]:
    """The first files of a data set on the hub, by name; its client keeps and resumes them."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        files = sorted(HfApi().list_repo_files(name, repo_type="dataset"))
        wanted = [file for file in files if file.endswith(SUFFIXES)][:num_files]
        if not wanted:
            raise ValueError(f"source={name} on the hub holds no {', '.join(SUFFIXES)} file")
        require_inside(wanted)
        return [
            Path(hf_hub_download(name, file, repo_type="dataset", local_dir=folder))
            for file in tqdm(wanted, desc="fetching", unit=" files", disable=None)
        ]
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        told = " ".join((str(error) or type(error).__name__).split())[:300]
        raise ValueError(
            f"source={name} is not to be had from the hub ({told}); give a folder, or an address"
        ) from None


def _continue(address: str, part: Path) -> None:
    """Appends what is missing, or begins again where the server has another file by now."""
    start = part.stat().st_size if part.is_file() else 0
    sign = _read_sign(part) if start else ""
    request = urllib.request.Request(address)
    if sign:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", sign)
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=SILENCE_S)
    except HTTPError as error:
        if error.code != BEYOND:
            raise
        part.unlink()  # it was whole, or is of another file: ask for all of it
        raise OSError("the part kept does not fit the file") from None
    with answer:
        is_rest = answer.status == REST
        place = answer.headers.get("Content-Range", "")
        if is_rest and not place.startswith(f"bytes {start}-"):
            raise OSError(f"the rest from byte {start} was asked for, but {place!r} came")
        if not is_rest:
            _sign_of(part).write_text(json.dumps(_sign(answer)))
        start = start if is_rest else 0
        length = answer.headers.get("Content-Length")
        with part.open("ab" if is_rest else "wb") as file:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
            size = file.tell()
        if length is not None and size != start + int(length):
            raise OSError(f"{size:,} of {start + int(length):,} bytes came")


def _sign(answer: HTTPResponse) -> str:
    """By which the server tells versions of a file apart; "" where it does not."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _sign_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.sign")


def _read_sign(part: Path) -> str:
    with suppress(OSError, ValueError):
        sign = parse_json(_sign_of(part).read_text())
        return sign if isinstance(sign, str) else ""
    return ""


def _ends_with(path: Path, ending: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(ending)))
        return file.read() == ending
