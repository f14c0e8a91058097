"""Curves of runs: a PNG of the main ones, and a page to explore and compare all that was logged.

python -m training.plot checkpoints/quickstart/nano-hrm [MORE_RUNS...] [--output curves.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.plot_page import write_page
from training.run_curves import RunCurves, read_runs

PANELS = {
    "loss": "loss (nats per token)",
    "accuracy": "token accuracy",
    "exact_accuracy": "exact accuracy (whole answers)",
    "bits_per_byte": "bits per byte",
}
# Of the same metric, in one panel.
LINE_STYLES: dict[str, Any] = {"train": "-", "val": "--", "val_ema": ":"}
BENCHMARKS = "eval"  # eval/BENCHMARK/FIGURE: asked now and then, so each point is marked
MARKERS = "osD^vpP*Xh"  # by benchmark
SMOOTHING_SHARE = 0.02  # of a curve's points, to either side, are averaged into one


def draw_curves(paths: Sequence[Path], output: Path) -> None:
    """Draws the runs' main metrics into one PNG, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = read_runs(paths)
    logged = {name for run in runs for name in run.metrics()}
    kinds = [kind for kind in LINE_STYLES if any(name.startswith(f"{kind}/") for name in logged)]
    names = {last: [f"{kind}/{last}" for kind in kinds] for last in PANELS}
    names = {last: found for last in PANELS if (found := logged.intersection(names[last]))}
    benchmarks = headlines(runs)
    if not names and not benchmarks:
        raise ValueError(
            f"none of {', '.join(PANELS)} was logged by {runs[0].name}; the page shows the rest"
        )
    count = len(names) + bool(benchmarks)
    figure, panels = plt.subplots(
        1, count, figsize=(4.4 * count, 3.9), layout="constrained", squeeze=False
    )
    for axes, (last, found) in zip(panels.flat, names.items(), strict=False):
        _draw_panel(axes, runs, sorted(found))
        axes.set_title(PANELS[last], fontsize=10)
    if benchmarks:
        _draw_benchmarks(panels.flat[-1], runs, benchmarks)
    _draw_legend(figure, runs, kinds)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def headlines(runs: Sequence[RunCurves]) -> list[str]:
    """The first figure of each benchmark, which is the one that a table shows."""
    first: dict[str, str] = {}
    for name in (name for run in runs for name in run.metrics()):
        kind, _, rest = name.partition("/")
        if kind == BENCHMARKS:
            first.setdefault(rest.rpartition("/")[0], name)
    return list(first.values())


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving average; it narrows towards the start, where curves are steep."""
    reach = int(len(values) * SMOOTHING_SHARE)
    averages = []
    for index in range(len(values)):
        before = min(reach, index)
        part = values[index - before : index + before + 1]
        averages.append(sum(part) / len(part))
    return averages


def _draw_panel(axes: Any, runs: Sequence[RunCurves], names: Sequence[str]) -> None:
    for number, run in enumerate(runs):
        for name in names:
            at, values = run.series(name)
            steps, color = [run.lines[index]["step"] for index in at], f"C{number % 10}"
            style = LINE_STYLES[name.partition("/")[0]]
            if style == "-":  # the raw values, pale
                axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(steps, smoothed(values), color=color, linewidth=1.8, linestyle=style)
    _finish_panel(axes)


def _draw_benchmarks(axes: Any, runs: Sequence[RunCurves], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    entries = []
    for at, name in enumerate(names):
        marker = MARKERS[at % len(MARKERS)]
        for number, run in enumerate(runs):
            lines, values = run.series(name)
            steps = [run.lines[line]["step"] for line in lines]
            axes.plot(steps, values, color=f"C{number % 10}", marker=marker, linewidth=1.2)
        label = name.partition("/")[2].replace("/", " ")
        entries.append(Line2D([], [], color="0.3", marker=marker, linestyle="", label=label))
    axes.legend(handles=entries, frameon=False, fontsize=8)
    axes.set_title("benchmarks (averaged weights)", fontsize=10)
    axes.set_xlim(left=0)
    _finish_panel(axes)


def _finish_panel(axes: Any) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(figure: Any, runs: Sequence[RunCurves], kinds: Sequence[str]) -> None:
    """One for all panels: runs by colour, and held-out data by line style where there is any."""
    from matplotlib.lines import Line2D

    entries = {
        run.name: Line2D([], [], color=f"C{number % 10}", linewidth=2)
        for number, run in enumerate(runs)
    }
    for kind in kinds if len(kinds) > 1 else ():
        entries[kind] = Line2D([], [], color="0.3", linewidth=1.8, linestyle=LINE_STYLES[kind])
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=min(6, len(entries)),
        frameon=False,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Draws the training curves of runs: a PNG, and a page (HTML) beside it."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--output", type=Path, help="default: curves.png in the run, or comparison.png in the first"
    )
    arguments = parser.parse_args()
    default = "curves.png" if len(arguments.runs) == 1 else "comparison.png"
    output: Path = arguments.output or arguments.runs[0] / default
    picture, page = output.with_suffix(".png"), output.with_suffix(".html")
    try:
        write_page(read_runs(arguments.runs), page)
        draw_curves(arguments.runs, picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(picture, page, sep="\n")


if __name__ == "__main__":
    main()
