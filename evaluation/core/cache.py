"""Prompts as token ids, kept on disk: a tokenizer sees a task once.

<folder>/<name>-<digest>.ids.npy, .ends.npy    int32 ids of all prompts; int64 ends of each
<folder>/<name>-<digest>.json     what they were made of, and their SHA-256: written last
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_io.parsing import parse_json
from data_io.prompt_format import PromptFormat
from evaluation.records import folder_name
from training.digests import digest_of

FORMAT = 2
NAME_CHARACTERS = 60


def tokenizer_fingerprint(prompt_format: PromptFormat) -> str:
    """SHA-256 of the tokenizer and of the tokens that frame prompts."""
    roles = [prompt_format.boq, prompt_format.eoq, prompt_format.eoa]
    content = json.dumps([prompt_format.tokenizer.to_str(), roles, dict(prompt_format.conditions)])
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PromptCache:
    """Prompts by what they were made of, for one tokenizer."""

    folder: Path | None  # None: nothing is kept
    fingerprint: str  # of the tokenizer
    tell: Callable[[str], None] = print

    def prompts(
        self, name: str, made_of: Mapping[str, Any], make: Callable[[], Iterable[Sequence[int]]]
    ) -> list[array[int]]:
        """What is kept under the name and was made of just this, else what `make` makes."""
        key = {"format": FORMAT, "tokenizer": self.fingerprint, **made_of}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        stem = f"{folder_name(name)[:NAME_CHARACTERS]}-{digest}"
        kept = None if self.folder is None else self._read(self.folder / stem, key)
        if kept is not None:
            return kept
        made = [array("i", each) for each in make()]
        if self.folder is not None:
            try:
                _write(self.folder, stem, key, made)
            except OSError as error:
                self.tell(f"the prompts of {name} are not kept ({error}); give cache_dir=DIR")
        return made

    def _read(self, stem: Path, key: Mapping[str, Any]) -> list[array[int]] | None:
        paths = _paths(stem)
        if not paths[-1].is_file():
            return None
        try:
            if parse_json(paths[-1].read_bytes()) == _record(key, paths):
                ids, ends = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths[:2])
                return [
                    array("i", np.ascontiguousarray(ids[start:end]).tobytes())
                    for start, end in pairwise((0, *ends.tolist()))
                ]
        except (OSError, ValueError):
            pass  # cut off: told below
        self.tell(f"{paths[-1]} is not whole; its prompts are made again")
        return None


def _paths(stem: Path) -> list[Path]:
    return [stem.with_name(f"{stem.name}{end}") for end in (".ids.npy", ".ends.npy", ".json")]


def _record(key: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    return {"made_of": dict(key), "ids": digest_of(paths[0]), "ends": digest_of(paths[1])}


def _write(folder: Path, stem: str, key: Mapping[str, Any], made: Sequence[array[int]]) -> None:
    """Each file appears when it is whole, the one that is looked for last; processes may race."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.concatenate([np.frombuffer(each, np.int32) for each in made])
    ends = np.cumsum([len(each) for each in made], dtype=np.int64)
    paths = _paths(folder / stem)
    aside = [path.with_name(f".{path.name}.{os.getpid()}.writing") for path in paths]
    try:
        for path, content in zip(aside, (ids, ends), strict=False):
            with path.open("wb") as file:
                np.save(file, content, allow_pickle=False)
        aside[-1].write_text(json.dumps(_record(key, aside), indent=2))
        for path, target in zip(aside, paths, strict=True):
            path.replace(target)
    finally:
        for path in aside:
            path.unlink(missing_ok=True)
