"""Results folders for the tests of what reads them: given answers on record, without an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmark_cases import golden_mirror

from evaluation.benchmarks.protocol import DataSource, judge_all
from evaluation.judging import Sheet
from evaluation.loading import Planned, make_ready
from evaluation.records import Given, open_results
from evaluation.settings import BenchmarkPlan, config_path, read_settings
from evaluation.summary import lines_of, record_of

MODEL = {
    "path": "checkpoints/tiny/hrm",
    "checkpoint": "fsdp2_epoch_2",
    "epoch": 2,
    "step": 1697,
    "weights": "ema",
    "net": "hrm",
    "parameters": 343_808,
    "tokenizer_sha256": "00",
}
Answers = Mapping[str, Sequence[str]]


class NoEngine:
    """Takes prompts as they are; every prompt fits."""

    def prepare(self, texts: Sequence[str], generation: Mapping[str, Any]) -> Sequence[str]:
        return list(texts)

    def context_of(self, generation: Mapping[str, Any]) -> int:
        return 10**9

    def num_tokens(self, prompt: Sequence[int] | str) -> int:
        return len(prompt)


def write_results(
    folder: Path,
    answers: Answers,
    *,
    arguments: Sequence[str] = (),
    source: DataSource | None = None,
    model: Mapping[str, Any] = MODEL,
) -> Path:
    """Results whose items have the given answers by label, the last one again for what is beyond.

    `arguments` are those of `evaluation.main`; all benchmarks named by `answers` are asked.
    """
    names = ",".join(dict.fromkeys(label.partition("(")[0] for label in answers))
    text = config_path("hrm_benchmarking").read_text()
    chosen = [f"run_only=[{names}]", *arguments]
    settings = read_settings(text, chosen, engines=("SimpleEngine",))
    sheets = [_sheet(plan, answers[plan.label], source) for plan in settings.plans]
    header = {
        "name": folder.name,
        "model": dict(model),
        "engine": "SimpleEngine",
        "versions": {"torch": "2.13.0"},
        "started_at": "2026-11-21T12:00:00+0000",
        "seconds": 12.5,
        "settings": {
            "seed": 0,
            "benchmarks": {plan.label: plan.generation for plan in settings.plans},
        },
    }
    results = open_results(folder, header, [plan.label for plan in settings.plans])
    for sheet in sheets:
        results.add(sheet.ready.label, record_of(sheet, 2.5), lines_of(sheet))
    return folder


def _sheet(plan: BenchmarkPlan, answers: Sequence[str], source: DataSource | None) -> Sheet:
    engine: Future[Any] = Future()
    engine.set_result(NoEngine())
    ready = make_ready(Planned(plan, plan.generation), source or golden_mirror(), engine)
    sheet = Sheet(ready)
    texts = [answers[min(index, len(answers) - 1)] for index in range(len(ready.items))]
    verdicts = judge_all(plan.benchmark, ready.items, texts)
    for index, (text, verdict) in enumerate(zip(texts, verdicts, strict=True)):
        sheet.given[index] = Given(text, "stop", len(text), ready.digests[index])
        sheet.verdicts[index] = verdict
    return sheet


def lines(path: Path) -> list[Any]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
