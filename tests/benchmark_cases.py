"""Small data sets in memory, and judging one answer, for the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.benchmarks.protocol import Benchmark, Item, Row, Split, Verdict
from evaluation.mirror import LocalMirror

GOLDEN_DATA = Path(__file__).parent / "golden" / "evaluation" / "data"


@dataclass(frozen=True)
class Rows:
    """A data source of rows by the name of their split (`str(Split)`)."""

    by_split: Mapping[str, Sequence[Row]]

    def rows(self, split: Split, *, benchmark: str) -> Iterator[Row]:
        if str(split) not in self.by_split:
            raise FileNotFoundError(f"{benchmark} needs {split}")
        return iter(self.by_split[str(split)])


def golden_mirror() -> LocalMirror:
    return LocalMirror(GOLDEN_DATA)


def judged(benchmark: Benchmark, item: Item, *answers: str) -> list[Verdict]:
    return [benchmark.judge(item, answer) for answer in answers]
