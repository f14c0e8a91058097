"""Where and with what a run was computed, and its sources where git does not have them."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data_io.parsing import parse_json
from data_io.prompt_format import TOKENIZER_FILE, find_tokenizer
from data_io.redaction import without_secrets
from data_io.sampled_format import SampledData
from training.publishing import write_atomically

ENVIRONMENT_FILE, CODE_FILE = "environment.json", "code.zip"
SOURCE_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "numpy", "numba", "hydra-core", "omegaconf", "pydantic", "safetensors")
_FLOOR = re.compile(r"^([\w-]+)>=([\d.]+)", re.MULTILINE)
DIFF_CHARACTERS = 500_000  # of git_diff in environment.json
_SOURCE_SUFFIXES = {".py", ".yaml", ".toml", ".txt", ".html", ".js"}


def check_floors(requirements: Path = SOURCE_ROOT / "requirements.txt") -> None:
    """Compares what is installed with the floors of requirements.txt; ValueError names the rest."""
    if not requirements.is_file():  # the package was installed without its sources
        return
    below = []
    for name, floor in _FLOOR.findall(requirements.read_text()):
        installed = _version(name)
        if installed is None or _numbers(installed) < _numbers(floor):
            below.append(f"{name} {installed or 'is not installed'} (needs {floor} or newer)")
    if below:
        raise ValueError(f"packages are too old: {'; '.join(below)}; run make setup")


def record_environment(run_path: Path, choices: Mapping[str, Any]) -> None:
    """Writes environment.json, and code.zip when the sources are not a clean commit.

    `choices` is what was found at start (device, attention, threads): used again on continuing.
    """
    commit, is_clean = _git_state()
    record = {
        "choices": dict(choices),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "command": [_word(word) for word in sys.orig_argv[1:]],
        "git_commit": commit,
        "git_clean": is_clean,
        "git_diff": None if is_clean else _git_diff(),
        "code": None,  # the sources of a sitting that is no clean commit
        "earlier": _earlier_sittings(run_path),
    }
    if not is_clean:
        number = len(record["earlier"]) + 1
        record["code"] = CODE_FILE if number == 1 else f"code_{number}.zip"
        _zip_sources(run_path / str(record["code"]))
    write_atomically(run_path / ENVIRONMENT_FILE, json.dumps(record, indent=2))


def keep_tokenizer(run: Path, data: SampledData) -> None:
    """Copies the data's tokenizer into the run, so that it can be asked when the data is gone."""
    tokenizer = find_tokenizer(data.metadata.tokenizer_info, data.folder)
    if tokenizer is not None and not (run / TOKENIZER_FILE).exists():
        write_atomically(run / TOKENIZER_FILE, tokenizer.read_text())


def _earlier_sittings(run_path: Path) -> list[dict[str, Any]]:
    """The records of a continued run before this sitting, the oldest first."""
    path = run_path / ENVIRONMENT_FILE
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    return [*before.pop("earlier", []), before]


def recorded_choices(run_path: Path) -> dict[str, Any]:
    """What a run chose when it started; empty where it left no record."""
    path = run_path / ENVIRONMENT_FILE
    if not path.is_file():
        return {}
    try:
        return dict(parse_json(path.read_text())["choices"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to choose anew") from None


def project_commit() -> str | None:
    """The commit of these sources, with `+changes` where they differ from it; None: not known."""
    commit, is_clean = _git_state()
    return commit if commit is None or is_clean else f"{commit}+changes"


def _word(word: str) -> str:
    return Path(word).name if word.endswith(".py") else without_secrets(word)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=SOURCE_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _git_state() -> tuple[str | None, bool]:
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return (commit.strip() if commit else None), commit is not None and changes == ""


def _git_diff() -> str | None:
    """What differs from the commit, without the golden tensors; new files are in the zip alone."""
    diff = _git("diff", "--no-color", "--no-ext-diff", "HEAD", "--", ".", ":!tests/golden")
    if diff is None:
        return None
    diff = without_secrets(diff)
    if len(diff) <= DIFF_CHARACTERS:
        return diff
    return f"{diff[:DIFF_CHARACTERS]}\n... cut after {DIFF_CHARACTERS} characters; see the sources"


def _zip_sources(path: Path) -> None:
    listed = _git("ls-files", "--cached")
    added = _git("ls-files", "--others", "--exclude-standard")
    if listed is None or added is None:  # no repository: all but what users put beside it
        found = (file.relative_to(SOURCE_ROOT) for file in SOURCE_ROOT.rglob("*"))
        files = [file for file in found if file.parts[0] not in (".venv", "data", "checkpoints")]
    else:
        files = [Path(name) for name in listed.splitlines()]
        # New files are code for sure if they are Python; others may be notes, or keys.
        files += [Path(name) for name in added.splitlines() if name.endswith(".py")]
    aside = path.with_name(f".{path.name}.writing")
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files):
            is_source = file.suffix in _SOURCE_SUFFIXES and "golden" not in file.parts
            if is_source and (SOURCE_ROOT / file).is_file():
                text = (SOURCE_ROOT / file).read_text(encoding="utf-8", errors="surrogateescape")
                told = without_secrets(text).encode(errors="surrogateescape")
                archive.writestr(file.as_posix(), told)
    aside.replace(path)
