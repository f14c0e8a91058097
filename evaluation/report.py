"""The report of an evaluation, report.md and report.html, from its results.json and items.jsonl.

`evaluation.main` writes it at the end; to write it again:

    python -m evaluation.report RUN/results/NAME
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluation.published import AT_EQUAL_FLOPS, EQUAL_FLOPS_BENCHMARKS
from evaluation.recorded import AnsweredItem, RecordedResults, find_results, read_results
from evaluation.report_content import (
    BenchmarkSummary,
    Share,
    curve_unit,
    equal_flops,
    extent,
    filled_columns,
    means,
    model_line,
    run_line,
    settings_rows,
    summaries,
    unfinished_line,
)
from evaluation.report_page import page
from evaluation.shown_text import as_text, in_markdown_cell, markdown_block, shortened
from training.console import refuse
from training.publishing import write_atomically

MARKDOWN_FILE, PAGE_FILE = "report.md", "report.html"
MAX_PROMPT, MAX_ANSWER = 500, 800  # characters of an example


def write_report(folder: Path) -> None:
    """Writes report.md and report.html beside the results, each whole or not at all."""
    results = read_results(folder)
    found = summaries(results)
    write_atomically(folder / MARKDOWN_FILE, "\n".join(markdown(results, found)) + "\n")
    write_atomically(folder / PAGE_FILE, page(results, found))


def markdown(results: RecordedResults, found: Sequence[BenchmarkSummary]) -> Iterator[str]:
    """The lines of report.md."""
    yield f"# Evaluation {in_markdown_cell(results.name)}"
    yield from ("", in_markdown_cell(model_line(results)))
    yield from ("", in_markdown_cell(run_line(results)))
    warning = unfinished_line(results)
    if warning:
        yield from ("", f"**{in_markdown_cell(warning)}**")
    if found:
        yield from _overview(found)
    if means(results):
        rows = [(name, _share(share), told) for name, (share, told) in means(results).items()]
        yield from ("", *_table(("mean", "%, ± standard error", "over"), rows))
    if equal_flops(found):
        yield from _flops_table(found)
    for summary in found:
        yield from _benchmark(summary)
    yield from ("", "## Settings and versions", "")
    yield from _table(("key", "value"), settings_rows(results))


def _overview(found: Sequence[BenchmarkSummary]) -> Iterator[str]:
    names = (
        "benchmark", "n", "figure", "%, ± standard error", "robust", "chance",
        "published L", "published XL", "invalid", "over-long", "cut off",
    )  # fmt: skip
    rows = [
        (
            each.label,
            f"{each.n:,}",
            each.metric,
            _share(each.headline),
            _share(each.robust),
            _percent(each.chance),
            _percent(each.published.get("L")),
            _percent(each.published.get("XL")),
            f"{each.num_invalid:,}",
            f"{each.num_over_long:,}",
            f"{each.num_cut_off:,}",
        )
        for each in found
    ]
    yield from ("", *_table(*filled_columns(names, rows)), "")
    yield (
        "Invalid: no answer could be read. Over-long: the prompt left no room, so the answer is "
        "empty. Cut off: the answer ended at its limit."
    )
    for each in found:
        if each.departures:
            told = in_markdown_cell("; ".join(each.departures))
            label = in_markdown_cell(each.label)
            yield from ("", f"{label} was asked otherwise than for the published figure: {told}.")


def _flops_table(found: Sequence[BenchmarkSummary]) -> Iterator[str]:
    own = equal_flops(found)
    by_net = {**AT_EQUAL_FLOPS, "this model, at its own FLOPs": own}
    rows = [
        (net, *(_percent(values.get(name)) for name in EQUAL_FLOPS_BENCHMARKS))
        for net, values in by_net.items()
    ]
    yield from ("", "## At equal training FLOPs, 1e21 (published)", "")
    yield from _table(("net", *EQUAL_FLOPS_BENCHMARKS), rows)


def _benchmark(each: BenchmarkSummary) -> Iterator[str]:
    yield from ("", f"## {in_markdown_cell(each.label)}", "", in_markdown_cell(extent(each)))
    if each.robust is not None and each.robust_rule:
        rule = in_markdown_cell(each.robust_rule)
        yield from ("", f"{in_markdown_cell(each.metric)}\\_robust {_share(each.robust)}: {rule}")
    if each.notes:
        yield from ("", *(f"- {in_markdown_cell(note)}" for note in each.notes))
    if each.curve:
        yield ""
        rows = [
            (
                point.task,
                f"{point.difficulty} {curve_unit(point.task, each.curve)}",
                f"{point.n:,}",
                _share(Share(point.accuracy, point.standard_error)),
            )
            for point in each.curve
        ]
        yield from _table(("task", "difficulty", "n", "%, ± standard error"), rows)
    if each.categories:
        yield ""
        rows = [
            (part.name, f"{part.n:,}", _share(part.accuracy), _percent(part.robust))
            for part in each.categories
        ]
        yield from _table(("category", "n", "%, ± standard error", "robust"), rows)
    if each.other_figures:
        yield ""
        rows = [(name, _share(share)) for name, share in each.other_figures.items()]
        yield from _table(("other figure", "%, ± standard error"), rows)
    for kind, items in each.examples.items():
        yield from ("", f"<details><summary>Examples, {kind}</summary>", "")
        for item in items:
            yield from _example(item)
        yield "</details>"


def _example(item: AnsweredItem) -> Iterator[str]:
    extracted = "unreadable" if item.invalid else as_text(item.extracted)
    prompt = item.prompt[-MAX_PROMPT:]
    if item.prompt_characters > len(prompt):
        prompt = f"[... {item.prompt_characters - len(prompt):,} characters ...]\n{prompt}"
    yield from (f"{in_markdown_cell(item.id)}, ended by {item.finish_reason}", "")
    yield from (markdown_block(prompt), "", "answered", "")
    yield from (markdown_block(shortened(item.answer, MAX_ANSWER)), "")
    told = [extracted, as_text(item.truth)]
    read, truth = (in_markdown_cell(shortened(text, MAX_ANSWER)) for text in told)
    yield from (f"read as {read or '(empty)'}; the truth is {truth or '(empty)'}", "")


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(map(in_markdown_cell, row))} |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _share(share: Share | None) -> str:
    if share is None:
        return ""
    error = "" if share.error is None else f" ± {100 * share.error:.1f}"
    return f"{_percent(share.value)}{error}"


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    try:
        folder = find_results(Path(arguments[0]))
        write_report(folder)
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(f"written: {folder / MARKDOWN_FILE} and {PAGE_FILE}")


if __name__ == "__main__":
    main(sys.argv[1:])
