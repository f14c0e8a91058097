"""Procedural tasks of reasoning_gym, written so short that a model of 0.2 M parameters learns them.

Owns how each task is asked and answered here, and scoring by the task's own verifier. Files and splits
belong to `scripts/make_reasoning_data.py`. reasoning_gym takes seconds to import, so only first use does.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Entry = Mapping[str, Any]  # reasoning_gym's `question`, `answer`, `metadata`


@dataclass(frozen=True, slots=True)
class ReasoningTask:
    """One data set of reasoning_gym in compact notation."""

    name: str  # reasoning_gym's name of the data set
    config: Mapping[str, int | float]  # its options but size and seed
    instruction: Callable[[Entry], str]
    response: Callable[[Entry], str]
    to_verifier: Callable[[str], str | None]  # a response as the verifier reads it; None if malformed


@dataclass(frozen=True, slots=True)
class Example:
    """A question, its right answer, and the entry of reasoning_gym by which answers are scored."""

    instruction: str
    response: str
    entry: Entry


def _spell_instruction(entry: Entry) -> str:
    return f"rev {entry['metadata']['word'].lower()}"


def _spell_response(entry: Entry) -> str:
    return entry["answer"].lower()


def _spell_to_verifier(text: str) -> str:
    return text


def _rows_of_digits(matrix: list[list[int]]) -> str:
    return " ".join("".join(str(cell) for cell in row) for row in matrix)


def _matrix_instruction(entry: Entry) -> str:
    return f"near {_rows_of_digits(entry['metadata']['matrix'])}"


def _matrix_response(entry: Entry) -> str:
    return _rows_of_digits(entry["metadata"]["solution"])


def _matrix_to_verifier(text: str) -> str | None:
    """Digits alone get through: the verifier runs `eval` on an answer that is not the right one."""
    if not re.fullmatch(r"[0-9]+( [0-9]+)*", text):
        return None
    return "\n".join(" ".join(row) for row in text.split(" "))


def _digits(numbers: list[str]) -> str:
    return " ".join(str(int(float(number))) for number in numbers)


def _sort_instruction(entry: Entry) -> str:
    direction = {"ascending": "asc", "descending": "desc"}[entry["metadata"]["direction"]]
    return f"{direction} {_digits(entry['metadata']['original_numbers'])}"


def _sort_response(entry: Entry) -> str:
    return _digits(entry["metadata"]["sorted_numbers"])


def _sort_to_verifier(text: str) -> str | None:
    """Times ten, in answer and truth alike: the verifier forgives numbers that are off by one."""
    if not re.fullmatch(r"[0-9]( [0-9])*", text):
        return None
    return json.dumps([f"{digit}0" for digit in text.split(" ")])


def _bits_instruction(entry: Entry) -> str:
    return f"ones {entry['metadata']['binary']}"


def _ab_instruction(entry: Entry) -> str:
    program = entry["question"].split("following program:")[1].split("Return")[0].strip()
    return f"ab {program}"


def _ab_response(entry: Entry) -> str:
    return entry["answer"] or "-"  # a response must not be empty


def _ab_to_verifier(text: str) -> str:
    return "" if text == "-" else text


def _plain_answer(entry: Entry) -> str:
    return entry["answer"]
