"""Memory and speed of sampling: `data_io.sample` against a plain rendition that holds all indices.

    python scripts/benchmark_sampling.py
    python scripts/benchmark_sampling.py rows=50_000_000 epochs=2 work=DIR

Makes tokenized sources of tiny rows on the spot and removes them again. Each side runs in a
process of its own, with one epoch and with more: the difference, divided, is the time of an epoch.
Memory is the peak of RssAnon, what a process holds that no file backs. Both sides must give the
same rows.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.console import run_command
from data_io.options import parse_options
from data_io.sample import SampleOptions, sample
from data_io.sampled_format import INDEX_NAMES, TokenizerInfo
from data_io.tokenized_format import tokenized_folders, write_tokenizer_info

VOCAB_SIZE, MOST_TOKENS, MADE_TOGETHER = 1000, 6, 2**20
POLL_SECONDS = 0.02


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: PositiveInt = Field(10_000_000, description="of all sources together")
    sources: PositiveInt = Field(10, description="tokenized sources")
    epochs: int = Field(3, ge=2, description="epochs of the longer run of each side")
    plain: bool = Field(True, description="measure the plain rendition too (116 bytes per row)")
    work: Path | None = Field(None, description="where to make the data; null: a temporary folder")
    seed: int = Field(0, description="of data and draws")
    output: Path | None = Field(None, description="JSON file of all figures")


@dataclass(frozen=True, slots=True)
class Measured:
    elapsed_s: float
    cpu_s: float  # of all its threads
    peak_bytes: int  # RssAnon


def make_sources(root: Path, settings: Settings) -> int:
    """Tokenized sources of rows of 2 to 6 tokens a side; returns bytes."""
    generator = np.random.default_rng(settings.seed)
    for number in range(settings.sources):
        folder = root / f"source_{number:03}.jsonl"
        folder.mkdir(parents=True)
        share = settings.rows // settings.sources
        rows = share + (number < settings.rows % settings.sources)
        lens = generator.integers(2, MOST_TOKENS + 1, (rows, 2), np.uint8)
        size = int(lens.sum(dtype=np.int64))
        tokens = open_memmap(folder / "tokens.npy", "w+", np.uint16, (size,))
        index = {
            name: open_memmap(folder / f"{name}.npy", "w+", np.uint64, (rows,))
            for name in INDEX_NAMES
        }
        start = 0
        for at in range(0, rows, MADE_TOGETHER):
            part, (inst, resp) = slice(at, at + MADE_TOGETHER), lens[at : at + MADE_TOGETHER].T
            ends = start + np.cumsum(inst + resp, dtype=np.uint64)
            index["inst_len"][part], index["resp_len"][part] = inst, resp
            index["resp_start"][part] = ends - resp
            index["inst_start"][part] = ends - resp - inst
            tokens[start : int(ends[-1])] = generator.integers(0, VOCAB_SIZE, int(ends[-1]) - start)
            start = int(ends[-1])
        (folder / "metadata.json").write_text('{"source_mtime": 0, "source_size": 0}')
    write_tokenizer_info(root, TokenizerInfo(vocab_size=VOCAB_SIZE))
    return sum(path.stat().st_size for path in root.rglob("*.npy"))


def ours(root: Path, output: Path, epochs: int, seed: int) -> None:
    arguments = [f"tokenized_path={root}", f"output_path={output}", f"epochs={epochs}"]
    arguments += [f"seed={seed}", "prefix_config_path=null"]
    with contextlib.redirect_stderr(io.StringIO()):
        sample(parse_options(SampleOptions, arguments, ""))


def plain(root: Path, output: Path, epochs: int, seed: int) -> None:
    """The published steps, written down one after another, all in memory."""
    generator = np.random.Generator(np.random.Philox(seed=seed))
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_NAMES}
    counts, tokens, start = [], [], 0
    for folder in tokenized_folders(root):
        source = {name: np.load(folder / f"{name}.npy").astype(np.int64) for name in INDEX_NAMES}
        tokens.append(np.load(folder / "tokens.npy"))
        for name in INDEX_NAMES:
            columns[name].append(source[name] + (start if name.endswith("start") else 0))
        counts.append(len(source["inst_len"]))
        start += len(tokens[-1])
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    del columns
    output.mkdir(parents=True)
    np.save(output / "tokens.npy", np.concatenate(tokens))
    firsts = np.cumsum([0, *counts])
    for epoch in range(epochs):
        drawn = [
            first + generator.permutation(count)
            for first, count in zip(firsts[:-1], counts, strict=True)
        ]
        order = np.concatenate(drawn)[generator.permutation(int(firsts[-1]))]
        (output / f"epoch_{epoch}").mkdir()
        for name in INDEX_NAMES:
            np.save(output / f"epoch_{epoch}" / f"{name}.npy", whole[name][order])


def measured(side: Callable[..., None], *arguments: Any) -> Measured:
    """Runs a side in a process of its own."""
    started_at, cpu_before_s = time.perf_counter(), _cpu_of_children()
    process = multiprocessing.get_context("spawn").Process(target=side, args=arguments)
    process.start()
    peak = 0
    while process.is_alive():
        peak = max(peak, _anonymous_bytes(process.pid))
        process.join(POLL_SECONDS)
    if process.exitcode:
        raise ValueError(f"{side.__name__} ended with exit code {process.exitcode}")
    elapsed_s = time.perf_counter() - started_at
    return Measured(elapsed_s, _cpu_of_children() - cpu_before_s, peak)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _anonymous_bytes(pid: int | None) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0].split()[1]) * 1024 if found else 0


def compare(settings: Settings, root: Path) -> dict[str, Any]:
    """Prints and returns what both sides need."""
    size = make_sources(root / "tokenized", settings)
    print(f"{settings.rows:,} rows in {settings.sources} sources, {size / 1e9:.2f} GB", flush=True)
    found: dict[str, Any] = {"settings": settings.model_dump(mode="json", exclude={"work"})}
    for side in (ours, plain) if settings.plain else (ours,):
        runs = []
        for epochs in (1, settings.epochs):
            output = root / side.__name__
            shutil.rmtree(output, ignore_errors=True)
            runs.append(measured(side, root / "tokenized", output, epochs, settings.seed))
        short, long = runs
        more = settings.epochs - 1
        found[side.__name__] = {
            "epoch_s": (epoch_s := (long.elapsed_s - short.elapsed_s) / more),
            "epoch_cpu_s": (cpu_s := (long.cpu_s - short.cpu_s) / more),
            "peak_bytes_per_row": (bytes_per_row := long.peak_bytes / settings.rows),
        }
        print(
            f"{side.__name__:5}: {epoch_s:.2f} s per epoch, {cpu_s:.2f} s of CPU time; all "
            f"{settings.epochs} in {long.elapsed_s:.1f} s; peak RssAnon "
            f"{long.peak_bytes / 1e6:,.0f} MB, {bytes_per_row:.1f} bytes per row",
            flush=True,
        )
    if settings.plain:
        names = {
            "epoch_s": "ratio",
            "epoch_cpu_s": "cpu_ratio",
            "peak_bytes_per_row": "memory_ratio",
        }
        for name, ratio in names.items():
            our_figure = found["ours"][name]  # 0 where there are few rows
            found[ratio] = found["plain"][name] / our_figure if our_figure else None
        found["same_rows"] = same_rows(root / "ours", root / "plain", settings.epochs)
        share = found["ours"]["epoch_s"] / found["plain"]["epoch_s"]
        print(f"ratio: ours takes {share:.2f} of the plain time")
        print(f"same rows: {found['same_rows']}")
    return found


def same_rows(one: Path, other: Path, epochs: int) -> bool:
    """Whether two sampled folders of the same rows have them in the same order."""
    return all(
        np.array_equal(*(np.load(path / f"epoch_{k}/{name}.npy", "r") for path in (one, other)))
        for k in range(epochs)
        for name in INDEX_NAMES  # both copy whole sources in file order, so offsets are equal too
    )


def main(arguments: list[str]) -> None:
    settings = parse_options(Settings, arguments, __doc__ or "")
    with tempfile.TemporaryDirectory(dir=settings.work, prefix="sampling-") as folder:
        found = compare(settings, Path(folder))
    if settings.output is not None:
        settings.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
