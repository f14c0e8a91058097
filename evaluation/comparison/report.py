"""The report of a comparison: results as JSON, a table in Markdown, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.comparison.intervals import MEAN, Answers, Interval, accuracies, differences
from evaluation.comparison.plan import Planned
from evaluation.comparison.runs import TrainedRun
from evaluation.comparison.tuning import ChosenLR
from models.flops import core_parameters
from training.publishing import write_atomically

EQUAL = {
    "flops": "Equal training FLOPs",
    "tokens": "Equal tokens",
    "parameters": "Equal tokens, layers chosen for equal core weights",
}


@dataclass(frozen=True)
class Compared:
    """An entry with its runs, one for each seed, all trained."""

    planned: Planned
    chosen: ChosenLR
    runs: Sequence[TrainedRun]

    @property
    def label(self) -> str:
        return self.planned.entry.label

    @cached_property
    def answers(self) -> dict[int, Answers]:
        """Right and wrong answers to held-out items, by step: tables [seeds, items] by task."""
        by_step = {}
        for step in self.runs[0].steps:
            by_seed = [run.answers("held_out", step) for run in self.runs]
            by_step[step] = {
                task: np.array([answers[task] for answers in by_seed], float) for task in by_seed[0]
            }
        return by_step

    @property
    def final(self) -> Answers:
        return self.answers[self.planned.steps]


def write_report(
    output: Path, name: str, compared: Sequence[Compared], about: Mapping[str, Any]
) -> None:
    """Writes <name>.json, .md and .png into `output`."""
    results = results_of(compared, about)
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(output / f"{name}.json", text)
    write_atomically(output / f"{name}.md", table_of(results))
    draw(results, output / f"{name}.png")


def results_of(compared: Sequence[Compared], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the table and the plot show, fit for JSON."""
    return {
        **about,
        "environment": compared[0].runs[0].choices(),
        "entries": [_entry(each, compared[0]) for each in compared],
    }


def _entry(each: Compared, first: Compared) -> dict[str, Any]:
    planned, records = each.planned, [run.record for run in each.runs]
    against = None if each is first else _as_json(differences(each.final, first.final))
    return {
        "label": each.label,
        "arch": planned.arch.model_dump(),
        "core_parameters": core_parameters(planned.arch),
        "steps": planned.steps,
        "tokens": each.runs[0].tokens_at(planned.steps),
        "training_flops": planned.flops_at(planned.steps),
        "lr": each.chosen.lr,
        "lr_note": each.chosen.note,
        "lr_tried": {f"{lr:g}": accuracy for lr, accuracy in each.chosen.tried.items()},
        "cpu_seconds": [round(record["cpu_seconds"], 1) for record in records],
        "wall_seconds": [round(record["wall_seconds"], 1) for record in records],
        "seeds": [run.seed for run in each.runs],
        "items": {task: table.shape[1] for task, table in each.final.items()},
        "accuracy_by_seed": {
            task: table.mean(1).round(4).tolist() for task, table in each.final.items()
        },
        "points": [
            {
                "step": step,
                "training_flops": planned.flops_at(step),
                "accuracy": _as_json(accuracies(answers)),
            }
            for step, answers in each.answers.items()
        ],
        "difference": against,
    }


def _as_json(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {
        task: {name: round(value, 4) for name, value in asdict(interval).items()}
        for task, interval in intervals.items()
    }


def table_of(results: Mapping[str, Any]) -> str:
    """The results as Markdown: what each net costs, how right it answers, and the differences."""
    entries = results["entries"]
    tasks = [task for task in entries[0]["items"] if len(entries[0]["items"]) > 1]
    first = entries[0]["label"]
    costs = [
        [
            each["label"],
            f"{each['core_parameters']:,}",
            f"{each['steps']:,}",
            f"{each['tokens'] / 1e6:.2f} M",
            f"{each['training_flops']:.2e}",
            f"{np.mean(each['cpu_seconds']):.0f}",
            f"{each['lr']:g}" + (f" ({each['lr_note']})" if each["lr_note"] else ""),
        ]
        for each in entries
    ]
    scores = []
    for each in entries:
        accuracy = each["points"][-1]["accuracy"]
        difference = "" if each["difference"] is None else _difference(each["difference"][MEAN])
        cells = [str(Interval(**accuracy[task])) for task in (MEAN, *tasks)]
        scores.append([each["label"], *cells, difference])
    cost_names = ["net", "core weights", "steps", "tokens", "FLOPs", "CPU s a run", "lr"]
    score_names = ["exact accuracy, held out", "mean" if tasks else _only_task(entries), *tasks]
    return "\n".join(
        (
            *_markdown(cost_names, costs),
            "",
            *_markdown([*score_names, f"{score_names[1]} minus that of {first}"], scores),
            "",
            f"{EQUAL[results['match']]}; seeds {', '.join(map(str, entries[0]['seeds']))}; "
            f"{' + '.join(str(n) for n in entries[0]['items'].values())} items. In brackets: 95 % "
            "bootstrap intervals over seeds and items; differences are paired by item, and bold "
            "where the interval excludes 0. CPU seconds are user time, start-up included.",
            "",
        )
    )


def _difference(found: Mapping[str, float]) -> str:
    interval = Interval(**found)
    return f"**{interval}**" if interval.excludes_zero else str(interval)


def _only_task(entries: Sequence[Mapping[str, Any]]) -> str:
    (task,) = entries[0]["items"]
    return task


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Exact accuracy against training FLOPs: one panel a task and one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = results["entries"]
    tasks = list(entries[0]["items"])
    panels = [MEAN, *tasks] if len(tasks) > 1 else tasks
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.4 + 3.5 * len(panels), 3.9), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, task in zip(axes[0], panels, strict=True):
        for number, each in enumerate(entries):
            _draw_entry(axis, each, task, number)
        axis.set_title(f"mean of {len(tasks)} tasks" if task == MEAN else task, fontsize=10)
        axis.set_xlabel("training FLOPs")
        axis.set_xlim(left=0)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("exact accuracy, held-out items")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_entry(axis: Any, each: Mapping[str, Any], task: str, number: int) -> None:
    flops = np.array([point["training_flops"] for point in each["points"]])
    bounds = [point["accuracy"][task] for point in each["points"]]
    value, low, high = (np.array([b[name] for b in bounds]) for name in ("value", "low", "high"))
    color = f"C{number % 10}"
    axis.fill_between(flops, low, high, color=color, alpha=0.1, linewidth=0)
    axis.errorbar(
        flops, value, (value - low, high - value), color=color, label=each["label"],
        marker="osD^vP"[number % 6], markersize=4.5, capsize=2, linewidth=1.6, elinewidth=0.9,
    )  # fmt: skip
