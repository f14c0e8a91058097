"""The report of an evaluation as one HTML file that loads nothing and runs no script.

report_page.html owns how it looks; what it says comes from `evaluation.report_content`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from evaluation.benchmarks.reasoning_gym import CurvePoint
from evaluation.charts import Bar, Point, bar_chart, line_chart
from evaluation.published import AT_EQUAL_FLOPS, BY_SIZE, EQUAL_FLOPS_BENCHMARKS
from evaluation.recorded import AnsweredItem, RecordedResults
from evaluation.report_content import (
    BenchmarkSummary,
    CategoryShare,
    Share,
    curve_unit,
    equal_flops,
    extent,
    filled_columns,
    means,
    model_line,
    run_line,
    settings_rows,
    unfinished_line,
)
from evaluation.shown_text import as_text, in_html, shortened

TEMPLATE = Path(__file__).with_name("report_page.html")
MAX_PROMPT, MAX_ANSWER = 700, 1600  # characters of an example
ONE_COLUMN = 12  # categories; more are drawn in two
LEGEND = (
    '<rect class="bar" x="1" y="2" width="24" height="10" rx="2"/>',
    '<line class="whisker" x1="1" y1="7" x2="25" y2="7"/>'
    '<line class="whisker" x1="1" y1="3" x2="1" y2="11"/>'
    '<line class="whisker" x1="25" y1="3" x2="25" y2="11"/>',
    '<line class="chance" x1="13" y1="0" x2="13" y2="14"/>',
    '<path class="mark L" d="M13 1 l5.5 6 l-5.5 6 l-5.5 -6 z"/>',
    '<path class="mark XL" d="M13 1 l5.5 6 l-5.5 6 l-5.5 -6 z"/>',
)
LEGEND_WORDS = ("this model", "95 %", "chance", "published L", "published XL")


def page(results: RecordedResults, found: Sequence[BenchmarkSummary]) -> str:
    """The whole file."""
    parts = {
        "__TITLE__": in_html(f"Evaluation {results.name}"),
        "__HEADER__": _header(results),
        "__MAIN__": "\n".join(_main(results, found)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub("|".join(parts), lambda match: parts[match[0]], template)


def _header(results: RecordedResults) -> str:
    lines = [model_line(results), run_line(results)]
    told = "".join(f'<div class="soft small">{in_html(line)}</div>' for line in lines)
    warning = unfinished_line(results)
    if warning:
        told += f'<div class="warning">{in_html(warning)}</div>'
    return f"<h1>Evaluation {in_html(results.name)}</h1>{told}"


def _main(results: RecordedResults, found: Sequence[BenchmarkSummary]) -> Iterable[str]:
    if found:
        yield _section("All benchmarks", _means(results) + _overview(found))
    if equal_flops(found):
        yield _section("At equal training FLOPs, 1e21 (published)", _flops_table(found))
    for summary in found:
        yield _benchmark(summary, is_open=len(found) <= 2)
    rows = [
        (key, f'<td class="long">{in_html(value)}</td>') for key, value in settings_rows(results)
    ]
    table = _table((), [f"<th>{in_html(key)}</th>{value}" for key, value in rows])
    head = "<summary><h2>Settings and versions</h2></summary>"
    yield f"<section class='folded'><details>{head}{table}</details></section>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{in_html(title)}</h2>{content}</section>"


def _means(results: RecordedResults) -> str:
    rows = [
        f"<th>{in_html(name)}</th><td><b>{_share(share)}</b></td>"
        f'<td class="long">{in_html(told)}</td>'
        for name, (share, told) in means(results).items()
    ]
    return _table((), rows) if rows else ""


def _overview(found: Sequence[BenchmarkSummary]) -> str:
    bars = [
        Bar(each.label, each.headline.value, each.headline.error, each.chance, each.published)
        for each in found
    ]
    used = [True, any(bar.error is not None for bar in bars), any(bar.chance for bar in bars)]
    used += [any(size in bar.marks for bar in bars) for size in ("L", "XL")]
    keys = "".join(
        f'<span><svg viewBox="0 0 26 14">{shape}</svg>{words}</span>'
        for shape, words, is_used in zip(LEGEND, LEGEND_WORDS, used, strict=True)
        if is_used
    )
    chart = f"<figure>{bar_chart(bars, width=860)}</figure>"
    names = (
        "benchmark", "n", "figure", "%, ± standard error", "robust", "chance",
        "published L", "published XL", "invalid", "over-long", "cut off",
    )  # fmt: skip
    names, cells = filled_columns(names, [_overview_row(each) for each in found])
    rows = [f"<th>{row[0]}</th>" + "".join(f"<td>{c}</td>" for c in row[1:]) for row in cells]
    note = (
        "<p class='soft small'>Invalid: no answer could be read. Over-long: the prompt left no "
        "room, so the answer is empty. Cut off: the answer ended at its limit.</p>"
    )
    return f'{chart}<div class="legend">{keys}</div>{_table(names, rows)}{note}{_departures(found)}'


def _departures(found: Sequence[BenchmarkSummary]) -> str:
    lines = [
        f"<li>{in_html(each.label)}: {in_html('; '.join(each.departures))}</li>"
        for each in found
        if each.departures
    ]
    if not lines:
        return ""
    told = "* Asked otherwise than for the published figure:"
    return f'<div class="warning small">{told}<ul>{"".join(lines)}</ul></div>'


def _overview_row(each: BenchmarkSummary) -> list[str]:
    return [
        in_html(each.label),
        f"{each.n:,}",
        in_html(each.metric),
        f"<b>{_share(each.headline)}</b>",
        _share(each.robust),
        _percent(each.chance),
        *(_percent(each.published.get(size)) + _star(each, size) for size in BY_SIZE),
        f"{each.num_invalid:,}",
        f"{each.num_over_long:,}",
        f"{each.num_cut_off:,}",
    ]


def _star(each: BenchmarkSummary, size: str) -> str:
    return '<span class="error">*</span>' if each.departures and size in each.published else ""


def _flops_table(found: Sequence[BenchmarkSummary]) -> str:
    own = equal_flops(found)
    rows = [
        f"<th>{net}</th>"
        + "".join(f"<td>{_percent(values[name])}</td>" for name in EQUAL_FLOPS_BENCHMARKS)
        for net, values in AT_EQUAL_FLOPS.items()
    ]
    cells = "".join(f"<td><b>{_percent(own.get(name))}</b></td>" for name in EQUAL_FLOPS_BENCHMARKS)
    rows.append(f"<th>this model, at its own FLOPs</th>{cells}")
    return _table(("net", *EQUAL_FLOPS_BENCHMARKS), rows)


def _benchmark(each: BenchmarkSummary, *, is_open: bool) -> str:
    head = (
        f"<summary><h2>{in_html(each.label)}</h2>"
        f'<span class="figure">{in_html(each.metric)} {_share(each.headline)}</span>'
        f'<span class="soft small">{in_html(extent(each))}</span></summary>'
    )
    parts = []
    if each.robust is not None and each.robust_rule:
        parts.append(
            f"<p><b>{in_html(each.metric)}_robust {_share(each.robust)}</b> "
            f'<span class="soft">{in_html(each.robust_rule)}</span></p>'
        )
    if each.notes:
        lines = "".join(f"<li>{in_html(note)}</li>" for note in each.notes)
        parts.append(f"<ul>{lines}</ul>")
    if each.curve:
        parts.append(f"<h3>Accuracy over difficulty</h3>{_panels(each.curve)}")
    if each.categories:
        parts.append(f"<h3>By category</h3>{_categories(each)}")
    if each.other_figures:
        rows = [
            f"<th>{in_html(name)}</th><td>{_share(share)}</td>"
            for name, share in each.other_figures.items()
        ]
        parts.append(f"<h3>Other figures</h3>{_table((), rows)}")
    for kind, items in each.examples.items():
        shown = "".join(map(_example, items))
        title = f"<h3 style='display:inline'>Examples, {in_html(kind)}</h3>"
        parts.append(f"<details><summary>{title}</summary>{shown}</details>")
    opened = " open" if is_open else ""
    return f"<section class='folded'><details{opened}>{head}{''.join(parts)}</details></section>"


def _panels(curve: Sequence[CurvePoint]) -> str:
    tasks = list(dict.fromkeys(point.task for point in curve))
    panels = []
    for task in tasks:
        points = [
            Point(
                point.difficulty,
                point.accuracy,
                point.standard_error,
                f"{point.difficulty}: {100 * point.accuracy:.1f} of {point.n} items",
            )
            for point in curve
            if point.task == task
        ]
        chart = line_chart(points, x_label=curve_unit(task, curve))
        panels.append(f"<figure><figcaption>{in_html(task)}</figcaption>{chart}</figure>")
    return f'<div class="panels">{"".join(panels)}</div>'


def _categories(each: BenchmarkSummary) -> str:
    ordered = sorted(each.categories, key=lambda category: -category.accuracy.value)
    halves = [ordered]
    if len(ordered) > ONE_COLUMN:
        middle = (len(ordered) + 1) // 2
        halves = [ordered[:middle], ordered[middle:]]
    charts = "".join(f"<figure>{_category_chart(half, each.chance)}</figure>" for half in halves)
    columns = f'<div class="columns">{charts}</div>' if len(halves) > 1 else charts
    rows = [
        f"<th>{in_html(category.name)}</th><td>{category.n:,}</td>"
        f"<td>{_share(category.accuracy)}</td><td>{_percent(category.robust)}</td>"
        for category in ordered
    ]
    table = _table(("category", "n", "%, ± standard error", "robust"), rows)
    summary = '<summary class="soft small">as a table</summary>'
    return f"{columns}<details>{summary}{table}</details>"


def _category_chart(categories: Sequence[CategoryShare], chance: float | None) -> str:
    bars = [
        Bar(category.name, category.accuracy.value, category.accuracy.error, chance)
        for category in categories
    ]
    return bar_chart(bars, width=560, label_width=210)


def _example(item: AnsweredItem) -> str:
    kind = "right" if item.correct == 1 else "wrong"
    credit = "" if item.correct in (0, 1) else f", credit {item.correct:.2f}"
    robust = "" if item.robust is None or item.robust == item.correct else (
        f", robust rule {'right' if item.robust == 1 else 'wrong'}"
    )  # fmt: skip
    problem = f", {in_html(item.problem)}" if item.problem else ""
    where = item.id if item.category is None else f"{item.id} ({item.category})"
    prompt = item.prompt[-MAX_PROMPT:]
    if item.prompt_characters > MAX_PROMPT:
        prompt = f"[... {item.prompt_characters - MAX_PROMPT:,} characters ...]\n{prompt}"
    extracted = "unreadable" if item.invalid else as_text(item.extracted)
    rows = {
        "prompt": prompt,
        "answer": shortened(item.answer, MAX_ANSWER),
        "read as": shortened(extracted, MAX_ANSWER),
        "truth": shortened(as_text(item.truth), MAX_ANSWER),
    }
    listed = "".join(
        f"<dt>{name}</dt><dd><pre>{in_html(text)}</pre></dd>" for name, text in rows.items()
    )
    return (
        f'<div class="example"><span class="verdict {kind}">{kind}{credit}{robust}{problem}</span> '
        f'<span class="soft small">{in_html(where)}, ended by {in_html(item.finish_reason)}</span>'
        f"<dl>{listed}</dl></div>"
    )


def _table(names: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    head = f"<thead><tr>{head}</tr></thead>" if names else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _share(share: Share | None) -> str:
    if share is None:
        return ""
    error = "" if share.error is None else f' <span class="error">± {100 * share.error:.1f}</span>'
    return f"{_percent(share.value)}{error}"
