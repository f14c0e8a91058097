"""A small CORE bundle, invented, and rows of it as prompts of the byte tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asking_cases import prompt_format

from data_io.prompt_format import PromptFormat
from evaluation.core.bundle import Example, TaskEntry, example_of
from evaluation.core.prompts import EncodedRow, PrefixKind, RenderedRow, encode_rows

COLOURS = [  # multiple choice
    {"query": "Q: red?", "choices": ["rose", "sky", "grass"], "gold": 0},
    {"query": "Q: blue?", "choices": ["rose", "sky", "grass"], "gold": 1},
    {"query": "Q: green?", "choices": ["ruby", "rust", "rush"], "gold": 2},
    {"query": "Q: white?", "choices": ["snow", "soot", "sand"], "gold": 0},
    {"query": "Q: black?", "choices": ["snow", "soot", "sand"], "gold": 1},
]
PRONOUNS = [  # schema
    {
        "context_options": ["Ann fed Bo as Ann", "Ann fed Bo as Bo"],
        "continuation": "ate",
        "gold": 1,
    },
    {"context_options": ["A cup fell; it", "A bed fell; it"], "continuation": "broke", "gold": 0},
    {"context_options": ["He ran; he", "He sat; he"], "continuation": "hid", "gold": 1},
]
ENDINGS = [  # language modelling
    {"context": " one two ", "continuation": "three"},
    {"context": "sun moon", "continuation": "star"},
    {"context": "ab ac", "continuation": "ad"},
    {"context": "up down\n", "continuation": "up"},
]
TASKS: list[dict[str, Any]] = [
    {
        "label": "colours",
        "dataset_uri": "world/colours.jsonl",
        "num_fewshot": [3],  # more than the context of asking_cases holds
        "icl_task_type": "multiple_choice",
        "continuation_delimiter": "\nA: ",
        "has_categories": False,
    },
    {
        "label": "pronouns",
        "dataset_uri": "language/pronouns.jsonl",
        "num_fewshot": [0],
        "icl_task_type": "schema",
    },
    {
        "label": "endings",
        "dataset_uri": "endings.jsonl",
        "num_fewshot": [2],
        "icl_task_type": "language_modeling",
    },
]
ROWS: dict[str, Sequence[Mapping[str, Any]]] = {
    "world/colours.jsonl": COLOURS,
    "language/pronouns.jsonl": PRONOUNS,
    "endings.jsonl": ENDINGS,
}
BASELINES = """Eval Task,Task Category,Random baseline,Description
colours,world knowledge,25,"of three, said to be of four"
pronouns,language understanding,50,
endings,language understanding,0,
"""


MC, SCHEMA, LM = (TaskEntry.model_validate(task) for task in TASKS)


def examples(entry: TaskEntry) -> list[Example]:
    """In file order."""
    rows = enumerate(ROWS[entry.dataset_uri])
    return [example_of(row, entry.icl_task_type, f"row {at}") for at, row in rows]


def byte_ids(text: str) -> list[int]:
    return prompt_format().encode_response(text)[:-1]


def encoded(
    row: RenderedRow, kind: PrefixKind = "bos", of: PromptFormat | None = None
) -> EncodedRow:
    (one,) = encode_rows([row], of or prompt_format(), kind, "direct")
    return one


def write_bundle(folder: Path) -> Path:
    for name, rows in ROWS.items():
        file = folder / "eval_data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # JSON is YAML.
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": TASKS}))
    (folder / "eval_meta_data.csv").write_text(BASELINES)
    return folder
