"""Curves of runs as a PNG: loss, accuracy and speed over steps, smoothed over the raw values.

python -m training.plot checkpoints/quickstart/nano-hrm [MORE_RUNS...] [--output curves.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.telemetry import METRICS_FILE, read_metrics

PANELS = (
    ("train/loss", "loss (nats per token)"),
    ("train/accuracy", "token accuracy"),
    ("train/exact_accuracy", "exact accuracy (whole answers)"),
)
SMOOTHING_SHARE = 0.02  # of a run's lines are averaged into one point


def draw_curves(runs: Sequence[Path], output: Path) -> None:
    """Draws the runs' metrics.jsonl into one PNG, one panel a metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 3.8), layout="constrained")
    for number, run in enumerate(runs):
        lines = metrics_of(run)
        steps = [line["step"] for line in lines]
        for panel, (name, _) in zip(panels, PANELS, strict=True):
            values = [line[name] for line in lines]
            color = f"C{number}"
            panel.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
            panel.plot(steps, smoothed(values), color=color, linewidth=1.8, label=run.name)
    for panel, (name, title) in zip(panels, PANELS, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(*((0, None) if name == "train/loss" else (0, 1.02)))
    if len(runs) > 1:
        panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(", ".join(run.name for run in runs), fontsize=11)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving average that narrows at both ends."""
    reach = int(len(values) * SMOOTHING_SHARE)
    averages = []
    for index in range(len(values)):
        width = min(reach, index, len(values) - 1 - index)
        part = values[index - width : index + width + 1]
        averages.append(sum(part) / len(part))
    return averages


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run; ValueError where there are none."""
    path = run / METRICS_FILE
    if not path.is_file() or not (lines := read_metrics(path)):
        raise ValueError(f"{path} holds no metrics yet; give the folder of a run that has trained")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draws the training curves of runs as a PNG.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, help="default: curves.png in the first run")
    arguments = parser.parse_args()
    output = arguments.output or arguments.runs[0] / "curves.png"
    try:
        draw_curves(arguments.runs, output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(output)


if __name__ == "__main__":
    main()
