"""How fast is data_io.tokenize, against the tokenizers library alone? And in how much memory?

    python scripts/benchmark_tokenizing.py
    python scripts/benchmark_tokenizing.py texts=rows.jsonl tokenizer=tok repeats=5
    python scripts/benchmark_tokenizing.py corpus_bytes=5000000000 folder=/tmp repeats=0

Speed: the texts in memory through `encode_batch`, in batches of several sizes of which the best
counts, and the whole tool from file to folder, in turns. Memory: the tool on a made-up corpus of
`corpus_bytes`, as the most that its process has resident at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.console import note, run_command  # noqa: E402
from data_io.options import parse_options  # noqa: E402
from data_io.prompt_format import read_tokenizer  # noqa: E402
from data_io.readers import to_record  # noqa: E402
from data_io.source_files import find_sources  # noqa: E402
from data_io.tokenizing import texts_of  # noqa: E402
from data_io.train_tokenizer import train_on  # noqa: E402

BATCH_TEXTS = (256, 1024, 4096)  # of encode_batch; the best counts
MADE_WORDS, SENTENCE_WORDS = 20_000, (5, 30)
MADE_SENTENCES, ROW_SENTENCES = 4_000, (2, 16)
VOCAB_SIZE, TRAINED_TEXTS = 8192, 4000  # of the tokenizer that is trained where none is given
LONG_WORDS = 12, 30  # letters: quicker to encode, and the same for memory
MEBIBYTE = 2**20


class BenchmarkOptions(BaseModel):
    """What is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: Path | None = Field(default=None, description="rows to encode; null: made-up ones")
    tokenizer: Path | None = Field(default=None, description="null: one trained on these texts")
    made_bytes: PositiveInt = Field(default=20_000_000, description="size of made-up rows")
    repeats: NonNegativeInt = Field(default=3, description="turns of both sides; 0: no speed")
    corpus_bytes: NonNegativeInt = Field(default=0, description="for memory; 0: no memory")
    folder: Path | None = Field(default=None, description="where files go for the while")
    output: Path | None = Field(default=None, description="JSON file of the ratios")


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(BenchmarkOptions, arguments, __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="tokenizing-", dir=options.folder) as name:
        place = Path(name)
        rows = options.texts or write_rows(place / "rows.jsonl", options.made_bytes)
        texts = texts_in(rows)
        tokenizer = options.tokenizer or train_here(texts, place / "tokenizer.json")
        if options.repeats:
            measure_speed(options, place, rows, texts, tokenizer)
        if options.corpus_bytes:
            del texts
            measure_memory(options, place, tokenizer)


def made_rows(word_lens: tuple[int, int] = (1, 12), seed: int = 0) -> Iterator[str]:
    """Endless rows as JSON; the words follow Zipf's law, as those of languages nearly do."""
    generator = np.random.Generator(np.random.Philox(seed=seed))
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    ends = np.cumsum(generator.integers(*word_lens, MADE_WORDS)).tolist()
    text = "".join(generator.choice(letters, ends[-1]))
    words = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
    chances = 1 / np.arange(3, MADE_WORDS + 3)
    ends = np.cumsum(generator.integers(*SENTENCE_WORDS, MADE_SENTENCES)).tolist()
    drawn = generator.choice(MADE_WORDS, ends[-1], p=chances / chances.sum()).tolist()
    sentences = []
    for start, end in itertools.pairwise([0, *ends]):
        sentence = " ".join(words[k] for k in drawn[start:end]).capitalize()
        sentences.append(f"{sentence} {generator.integers(10_000)}{'.?!'[end % 3]}")
    while True:
        counts = generator.integers(*ROW_SENTENCES, 1000)
        drawn = generator.integers(MADE_SENTENCES, size=int(counts.sum())).tolist()
        for count in counts:
            question, *answer = (sentences[drawn.pop()] for _ in range(count))
            yield json.dumps({"instruction": question, "response": " ".join(answer)}) + "\n"


def write_rows(path: Path, size: int, word_lens: tuple[int, int] = (1, 12)) -> Path:
    with path.open("w") as file:
        for row in made_rows(word_lens):
            size -= file.write(row)
            if size <= 0:
                break
    return path


def texts_in(path: Path) -> list[str]:
    rows = (row for source in find_sources([path]) for row in source.rows())
    return [text for row in rows for text in texts_of(to_record(row.fields))]


def train_here(texts: list[str], path: Path) -> Path:
    train_on(texts[:TRAINED_TEXTS], VOCAB_SIZE).save(str(path))
    return path


def measure_speed(
    options: BenchmarkOptions, place: Path, rows: Path, texts: list[str], tokenizer: Path
) -> None:
    """Prints megabytes of text per second of both sides, and the median of their ratios."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    library = read_tokenizer(tokenizer)
    library.encode_special_tokens = True
    best = min(BATCH_TEXTS, key=lambda count: library_seconds(library, texts, count)[0])
    print(f"{len(texts):,} texts, {size:,.1f} MB; encode_batch is best with {best:,} at once")
    ratios, cpu_ratios = [], []
    for _ in range(options.repeats):
        (library_s, library_cpu_s) = library_seconds(library, texts, best)
        (tool_s, tool_cpu_s) = tool_seconds(place, rows, tokenizer)
        ratios.append(library_s / tool_s)
        cpu_ratios.append(library_cpu_s / tool_cpu_s)
        print(
            f"encode_batch {size / library_s:6.2f} MB/s ({library_cpu_s:.1f} s of CPU)   "
            f"data_io.tokenize {size / tool_s:6.2f} MB/s ({tool_cpu_s:.1f} s of CPU)   "
            f"ratio {ratios[-1]:.2f}"
        )
    print(
        f"ratio of throughput {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), of "
        f"CPU time {median(cpu_ratios):.2f}; higher is faster than the library"
    )
    if options.output is not None:
        settings = options.model_dump(mode="json", include={"made_bytes", "repeats"})
        found = {"settings": settings, "megabytes": size, "library_texts_at_once": best}
        found |= {"ratio": median(ratios), "cpu_ratio": median(cpu_ratios)}
        found |= {"ratios": ratios, "cpu_ratios": cpu_ratios}
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def library_seconds(library: Tokenizer, texts: list[str], count: int) -> tuple[float, float]:
    """Wall clock and CPU time of the library alone, `count` texts at once."""
    started_at, cpu_before = time.perf_counter(), time.process_time()
    for at in range(0, len(texts), count):
        library.encode_batch(texts[at : at + count], add_special_tokens=False)
    return time.perf_counter() - started_at, time.process_time() - cpu_before


def tool_seconds(place: Path, rows: Path, tokenizer: Path) -> tuple[float, float]:
    """Of the tool in this process, from source file to published folder."""
    from data_io.tokenize import TokenizeOptions, tokenize

    output = place / f"tokenized-{time.monotonic_ns()}"
    options = TokenizeOptions(sources=(rows,), output=output, tokenizer_path=tokenizer)
    started_at, cpu_before = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):  # what it reports is no result here
        tokenize(options)
    return time.perf_counter() - started_at, time.process_time() - cpu_before


def measure_memory(options: BenchmarkOptions, place: Path, tokenizer: Path) -> None:
    """Prints the most memory that the tool had resident at once: one file, so one process."""
    corpus = write_rows(place / "corpus.jsonl", options.corpus_bytes, LONG_WORDS)
    note(f"{corpus.stat().st_size:,} bytes of rows are written")
    command = [sys.executable, "-m", "data_io.tokenize", str(corpus.absolute())]
    command += ["-o", str(place.absolute() / "out"), "--tokenizer-path", str(tokenizer.absolute())]
    started_at = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    elapsed_s = time.perf_counter() - started_at
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"memory: at most {most / MEBIBYTE:,.0f} MiB resident, for {corpus.stat().st_size:,} bytes "
        f"in {elapsed_s:,.0f} s on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    run_command(main)
