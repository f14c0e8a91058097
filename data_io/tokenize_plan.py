"""Which sources are to be tokenized, which are as they should be, and how far a run has come."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tqdm import tqdm

from data_io.sampled_format import INDEX_NAMES
from data_io.sources import Source
from data_io.tokenized_format import MADE_FILE, METADATA_FILE, MadeBy, tokenized_folders
from data_io.tokenizing import EncodingSettings, Outcome, TokenizeJob

REFRESH_SECONDS = 0.5
ARRAY_FILES = frozenset(f"{name}.npy" for name in (*INDEX_NAMES, "tokens", "scored"))
SOURCE_FILES = ARRAY_FILES | {METADATA_FILE, MADE_FILE}  # all that a source's folder may hold


@dataclass(frozen=True, slots=True)
class TokenizePlan:
    """What is to be done."""

    jobs: list[TokenizeJob]
    remade: Counter[str]  # why, of sources that were tokenized before
    unchanged: list[Path]
    orphans: list[Path]

    @classmethod
    def make(cls, sources: Sequence[Source], output: Path, settings: EncodingSettings) -> Self:
        fingerprint = settings.fingerprint()
        jobs, remade, unchanged = [], Counter[str](), []
        for source in sources:
            folder = output / source.folder_name
            why = _why_again(folder, source, fingerprint)
            if why is None:
                unchanged.append(folder)
                continue
            jobs.append(TokenizeJob(source, folder.absolute(), settings))
            remade += Counter({why: bool(why)})
        jobs.sort(key=lambda job: -job.source.state.size)  # a large one last would run alone
        expected = {source.folder_name for source in sources}
        orphans = [folder for folder in tokenized_folders(output) if folder.name not in expected]
        for folder in (*orphans, *(job.folder for job in jobs)):
            _require_ours(folder)
        return cls(jobs, remade, unchanged, orphans)


def _why_again(folder: Path, source: Source, fingerprint: str) -> str | None:
    """None: the folder is what this run would make; "" where there is none yet."""
    if not folder.exists():
        return ""
    made = MadeBy.find(folder)
    if made is None:
        return "made by another program"
    if source.state.identity is None:
        return "nothing tells whether the data set has changed"
    if not made.is_of(source.state):
        return "source has changed"
    return None if made.fingerprint == fingerprint else "tokenizer or options have changed"


def _require_ours(folder: Path) -> None:
    """Nothing is removed or replaced that is no tokenized source, such as other data, or a file."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names & ARRAY_FILES or names - SOURCE_FILES:
        raise ValueError(
            f"{folder} is no tokenized source, and this run would remove or replace it; choose "
            "an output of its own"
        )


class TokenizeProgress:
    """A bar over the bytes of all sources; looks now and then how far each one is."""

    def __init__(self, jobs: Sequence[TokenizeJob]) -> None:
        self._running = {job.folder.name: job.position_file for job in jobs}
        self._done = 0
        total = sum(job.source.state.size for job in jobs)
        self._bar = tqdm(
            total=total,
            desc="tokenizing",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not jobs,
        )
        self._is_over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def finish(self, outcome: Outcome) -> None:
        del self._running[outcome.name]
        self._done += outcome.size
        self._show(self._done)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watch.join()
        self._bar.close()

    def _look(self) -> None:
        while not self._is_over.wait(REFRESH_SECONDS):
            positions = [_position(file) for file in list(self._running.values())]
            self._show(self._done + sum(positions))

    def _show(self, position: int) -> None:
        self._bar.update(max(0, position - self._bar.n))


def _position(file: Path) -> int:
    try:
        return int(file.read_text() or 0)
    except FileNotFoundError:
        return 0
