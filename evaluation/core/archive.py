"""A CORE bundle out of its zip archive: nothing is written outside of the folder asked for."""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from evaluation.core.bundle import CORE_FILE, Bundle
from evaluation.remote_files import local_copy

# Of the family's own; 22 tasks are named in its core.yaml.
ADDRESS = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MOST_BYTES = 4 << 30  # unpacked; the bundle has a tenth of this
LEFT_OUT = ("__MACOSX", ".DS_Store")  # what packers add


def fetch_bundle(folder: Path, source: str = ADDRESS) -> None:
    """Unpacks the archive at an address or path into `folder`, which appears when it is whole.

    A bundle that is there is kept. ValueError for an archive that holds no bundle, or paths that
    lead elsewhere; FileNotFoundError where it is not to be had.
    """
    if (folder / CORE_FILE).is_file():
        print(f"{folder}: is there")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and holds no bundle; give a folder that is not there")
    with local_copy(source, what="the CORE bundle", option="bundle_from") as archive:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
            unpack(archive, Path(aside))
            root = _root_of(Path(aside), source)
            bundle = Bundle.open(root)
            for entry in bundle.entries:
                bundle.file_of(entry)
            if folder.is_dir():
                folder.rmdir()  # it is empty
            shutil.move(root, folder)
    print(f"{folder}: {len(bundle.entries)} tasks")


def unpack(archive: Path, folder: Path) -> None:
    """All plain files of a zip archive. ValueError names a member that is unsafe."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = list(_checked(zipped.infolist(), archive))
            for member, path in members:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as packed, target.open("xb") as file:
                    shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive} is no whole zip archive: {error}") from None


def _checked(
    members: list[zipfile.ZipInfo], archive: Path
) -> Iterator[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files to write, and where; checked before the first is written."""
    total_bytes = sum(member.file_size for member in members)
    if total_bytes > MOST_BYTES:
        raise ValueError(f"{archive} unpacks to {total_bytes:,} bytes, more than {MOST_BYTES:,}")
    seen: set[str] = set()
    for member in members:
        path = PurePosixPath(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or {"\\", ":"} & set(member.filename):
            raise ValueError(f"{archive}: {member.filename[:200]!r} leads out of the folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{archive}: {member.filename[:200]!r} is a link or no plain file")
        if member.is_dir() or any(part in LEFT_OUT for part in path.parts):
            continue
        if path.as_posix().lower() in seen:
            raise ValueError(f"{archive}: {member.filename[:200]!r} is in it twice")
        seen.add(path.as_posix().lower())
        yield member, path


def _root_of(folder: Path, source: str) -> Path:
    """Where core.yaml is: at the top, or in the only folder there."""
    found = [path.parent for path in (folder / CORE_FILE, *folder.glob(f"*/{CORE_FILE}"))]
    found = [path for path in found if (path / CORE_FILE).is_file()]
    if len(found) != 1:
        raise ValueError(f"{source} holds {len(found) or 'no'} {CORE_FILE}; it is no CORE bundle")
    return found[0]
