"""Tasks of lm-evaluation-harness on data made up here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

CHOICES = ["abc", " bad", "c d", "h"]


def instances(*arguments: tuple[Any, ...]) -> list[Any]:
    """What lm-eval hands over, as far as a model looks at it."""
    return [SimpleNamespace(args=args) for args in arguments]


def questions(max_context: int) -> list[str]:
    """Some that fit, some of every length around that of the context, and one twice as long."""
    lengths = [*range(max_context - 10, max_context + 2), 2 * max_context]
    return ["add b to c:", "bee ", "  dead\nbeef"] + [
        "ab cd " * (n // 6) + "g" * (n % 6) for n in lengths
    ]


def write_tasks(folder: Path, max_context: int) -> Path:
    """mine_choice, mine_begun (the answer is begun for the model), mine_answer, mine_text."""
    rows = [{"q": each, "a": "abc", "choices": CHOICES} for each in questions(max_context)]
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    metrics = [{"metric": "acc"}, {"metric": "acc_mutual_info"}]
    _write_task(folder, "mine_choice", rows, {**choice, "metric_list": metrics})
    _write_task(folder, "mine_begun", rows, {**choice, "gen_prefix": "It is"})
    generation = {"until": ["dd", "\n\n"], "max_gen_toks": 12}
    answer = {"output_type": "generate_until", "generation_kwargs": generation}
    exact = [{"metric": "exact_match"}]
    answer |= {"doc_to_target": "{{a}}", "metric_list": exact}
    _write_task(folder, "mine_answer", rows, answer)
    text: dict[str, Any] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
    }
    text["metric_list"] = [{"metric": "word_perplexity"}]
    _write_task(folder, "mine_text", rows, text)
    return folder


def _write_task(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{q}}",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
