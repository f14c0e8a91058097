"""Published figures of HRM-Text (arXiv 2605.20613) by benchmark, and what they were asked with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from evaluation.settings import BenchmarkPlan, config_path, read_settings

_NAMES = ("GSM8k", "MATH", "DROP", "MMLU", "ARC", "HellaSwag", "Winogrande", "BoolQ")
_PER_CENT = {
    "L": (77.6, 51.2, 78.6, 56.6, 75.9, 52.7, 67.6, 85.0),
    "XL": (84.7, 56.5, 82.3, 60.7, 81.9, 63.4, 72.4, 86.2),
}
# By size and benchmark, as shares.
BY_SIZE: dict[str, dict[str, float]] = {
    size: {name: value / 100 for name, value in zip(_NAMES, values, strict=True)}
    for size, values in _PER_CENT.items()
}
EQUAL_FLOPS_BENCHMARKS = ("MMLU", "GSM8k", "MATH")
# 1e21 training FLOPs each, by net.
AT_EQUAL_FLOPS: dict[str, dict[str, float]] = {
    net: {name: value / 100 for name, value in zip(EQUAL_FLOPS_BENCHMARKS, values, strict=True)}
    for net, values in {
        "HRM": (60.7, 84.5, 56.2),
        "looped": (56.5, 75.1, 48.3),
        "RINS": (56.1, 77.7, 48.9),
        "Transformer": (53.2, 75.1, 48.4),
    }.items()
}
# Items of the published data sets, from their cards and from memory of them: not counted here, for
# want of a network. A mirror with fewer is another benchmark of the same name.
NUM_ITEMS = {
    "GSM8k": 1319,
    "MATH": 5000,
    "DROP": 9536,
    "MMLU": 14042,
    "ARC": 1172,
    "HellaSwag": 10042,
    "Winogrande": 1267,
    "BoolQ": 3270,
}
NEARLY_ALL = 0.99  # of the items: revisions of a data set differ by a few
PUBLISHED_CONFIG = "hrm_benchmarking"
OF_THE_MACHINE = ("batch_size",)  # generation settings that change no answer


def departures(
    record: Mapping[str, Any], num_items: int, max_context: int | None = None
) -> list[str]:
    """How a recorded benchmark was asked otherwise than the published one, in words.

    `max_context` is the model's; it counts where a prompt or an answer did not fit. Empty for
    benchmarks that have no published figure. Settings that its engine does not have (conditions of
    other people's models) are passed by.
    """
    plan = _published_plans().get(record["benchmark"])
    if plan is None:
        return []
    told = []
    expected = NUM_ITEMS[plan.benchmark.name]
    if num_items < NEARLY_ALL * expected:
        told.append(f"{num_items:,} items instead of {expected:,}")
    published = plan.generation | plan.benchmark.model_dump(mode="json")
    given = {**(record.get("generation") or {}), **(record.get("settings") or {})}
    asked = given.get("max_context")
    if asked and max_context and (record.get("over_long") or record.get("cut_off")):
        given["max_context"] = min(asked, max_context)  # what the engine had
    for key, value in given.items():
        if value != published.get(key) and key not in OF_THE_MACHINE:
            told.append(f"{key}={value} instead of {published.get(key)}")
    told += [note.partition(": ")[0] for note in record.get("notes") or () if is_on_shots(note)]
    template = record.get("prompt_template")
    if template not in (None, "{prompt}"):
        told.append(f"prompts within {template!r}")
    return told


def is_on_shots(note: str) -> bool:
    """Whether a benchmark notes that its shots are not the published ones (DROP, or fewer)."""
    return note.startswith(("asked without its", "the shot ")) or note.endswith("were asked for")


@cache
def _published_plans() -> dict[str, BenchmarkPlan]:
    text = config_path(PUBLISHED_CONFIG).read_text(encoding="utf-8")
    engine = "SimpleEngine"
    plans = read_settings(text, (), engines=(engine,)).plans
    return {plan.benchmark.name: plan for plan in plans}
