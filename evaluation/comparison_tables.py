"""Evaluations side by side as tables for a paper: Markdown, and LaTeX with booktabs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evaluation.comparison.intervals import Interval
from evaluation.paired import PairedBenchmark, mean_difference
from evaluation.recorded import RecordedResults
from evaluation.shown_text import in_latex, in_markdown_cell

LISTED = 5  # flipped items that the Markdown names


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several evaluations against the first."""

    names: Sequence[str]
    results: Sequence[RecordedResults]
    # label -> the others against the first, in their order
    benchmarks: Mapping[str, Sequence[PairedBenchmark]]
    left_out: Sequence[str]  # benchmarks that are not compared, and why

    def is_clear(self, index: int) -> bool:
        """Whether the mean difference of one of the others excludes 0 and is to be trusted."""
        can_tell = not any(row[index].num_lone for row in self.benchmarks.values())
        return can_tell and self.means()[index].excludes_zero

    def means(self) -> list[Interval]:
        """Mean differences over benchmarks of the others."""
        columns = zip(*self.benchmarks.values(), strict=True)
        return [mean_difference(column) for column in columns]


def markdown(comparison: Comparison) -> Iterator[str]:
    """The table for a paper, then what flipped and what differs."""
    first, *others = map(in_markdown_cell, comparison.names)
    names = ["benchmark", "n", first]
    for each in others:
        names += [each, f"{each} - {first} [95 %]"]
    yield _markdown_row(names)
    yield f"|---|{'---:|' * (len(names) - 1)}"
    for label, row in comparison.benchmarks.items():
        cells = [
            in_markdown_cell(f"{label} ({row[0].metric})"),
            f"{row[0].num_units:,}",
            _percent(row[0].first),
        ]
        for each in row:
            cells += [
                _percent(each.second),
                _points(each.difference, is_clear=each.is_clear(each.difference)),
            ]
        yield _markdown_row(cells)
    if len(comparison.benchmarks) > 1:
        cells = [
            "mean",
            "",
            _percent(_mean(row[0].first for row in comparison.benchmarks.values())),
        ]
        for index, mean in enumerate(comparison.means()):
            seconds = (row[index].second for row in comparison.benchmarks.values())
            cells += [_percent(_mean(seconds)), _points(mean, is_clear=comparison.is_clear(index))]
        yield _markdown_row(cells)
    yield ""
    yield "Differences in points, bold where the interval excludes 0."
    for index, name in enumerate(others):
        yield from _details(comparison, index, name)
    if comparison.left_out:
        yield from ("", "Not compared:", "")
        yield from (f"- {in_markdown_cell(each)}" for each in comparison.left_out)


def _details(comparison: Comparison, index: int, name: str) -> Iterator[str]:
    """Flips, robust differences and settings that differ, of one against the first."""
    yield from ("", f"## {in_markdown_cell(name)} against {in_markdown_cell(comparison.names[0])}")
    yield ""
    yield _markdown_row(["benchmark", "robust difference", "now right", "now wrong"])
    yield "|---|---:|---|---|"
    for label, row in comparison.benchmarks.items():
        each = row[index]
        robust = ""
        if each.robust_difference is not None:
            is_clear = each.is_clear(each.robust_difference)
            robust = _points(each.robust_difference, is_clear=is_clear)
        yield _markdown_row(
            [in_markdown_cell(label), robust, _listed(each.gained), _listed(each.lost)]
        )
    notes = [
        (label, note) for label, row in comparison.benchmarks.items() for note in row[index].notes
    ]
    if notes:
        yield from ("", "What differs besides the model:", "")
        yield from (f"- {in_markdown_cell(f'{label}: {note}')}" for label, note in notes)


def latex(comparison: Comparison) -> Iterator[str]:
    """The table with booktabs: \\usepackage{booktabs}."""
    first, *others = comparison.names
    yield r"\begin{tabular}{lrr" + "rl" * len(others) + "}"
    yield r"\toprule"
    names = ["Benchmark", "$n$", in_latex(first)]
    for each in others:
        names += [in_latex(each), r"difference [95\,\%]"]
    yield " & ".join(names) + r" \\"
    yield r"\midrule"
    for label, row in comparison.benchmarks.items():
        cells = [in_latex(label), f"{row[0].num_units:,}".replace(",", r"\,")]
        cells.append(_percent(row[0].first))
        for each in row:
            cells += [
                _percent(each.second),
                _latex_points(each.difference, is_clear=each.is_clear(each.difference)),
            ]
        yield " & ".join(cells) + r" \\"
    if len(comparison.benchmarks) > 1:
        yield r"\midrule"
        rows = comparison.benchmarks.values()
        cells = ["Mean", "", _percent(_mean(row[0].first for row in rows))]
        for index, mean in enumerate(comparison.means()):
            cells += [
                _percent(_mean(row[index].second for row in rows)),
                _latex_points(mean, is_clear=comparison.is_clear(index)),
            ]
        yield " & ".join(cells) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _listed(ids: Sequence[str]) -> str:
    shown = in_markdown_cell(", ".join(ids[:LISTED]))
    return f"{len(ids):,}" + (f": {shown}{', ...' if len(ids) > LISTED else ''}" if ids else "")


def _points(interval: Interval, *, is_clear: bool) -> str:
    value, low, high = _signed(interval)
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if is_clear else text


def _latex_points(interval: Interval, *, is_clear: bool) -> str:
    value, low, high = _signed(interval)
    number = rf"\mathbf{{{value}}}" if is_clear else value
    return rf"${number}$ {{\small $[{low}, {high}]$}}"


def _signed(interval: Interval) -> list[str]:
    """In points; no negative zero."""
    values = (interval.value, interval.low, interval.high)
    return [f"{round(100 * value, 1) + 0.0:+.1f}" for value in values]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
