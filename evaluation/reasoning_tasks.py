"""Procedural tasks of reasoning_gym, written so short that a model of 0.2 M parameters learns them.

Owns how each task is asked and answered here, and scoring by the task's own verifier. Files and
splits belong to `scripts/make_reasoning_data.py`.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Set
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
    to_verifier: Callable[[str], str | None]  # how the verifier reads a response; None: malformed


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


def _ab_to_verifier(text: str) -> str | None:
    return {"-": "", "": None}.get(text, text)


def _plain_answer(entry: Entry) -> str:
    return entry["answer"]


def _as_it_is(text: str) -> str:
    return text


_TASKS = (
    ReasoningTask(
        name="spell_backward",
        config={"min_word_len": 3, "max_word_len": 5},
        instruction=_spell_instruction,
        response=_spell_response,
        to_verifier=_as_it_is,
    ),
    ReasoningTask(
        name="binary_matrix",
        config={"min_n": 4, "max_n": 4},
        instruction=_matrix_instruction,
        response=_matrix_response,
        to_verifier=_matrix_to_verifier,
    ),
    ReasoningTask(
        name="number_sorting",
        config={
            "min_numbers": 3,
            "max_numbers": 5,
            "min_value": 0,
            "max_value": 9,
            "max_decimals": 0,
        },
        instruction=_sort_instruction,
        response=_sort_response,
        to_verifier=_sort_to_verifier,
    ),
    ReasoningTask(
        name="count_bits",
        config={"max_n": 2**14 - 1},
        instruction=_bits_instruction,
        response=_plain_answer,
        to_verifier=_as_it_is,
    ),
    ReasoningTask(
        name="ab",
        config={"length": 7},
        instruction=_ab_instruction,
        response=_ab_response,
        to_verifier=_ab_to_verifier,
    ),
)
TASKS = {task.name: task for task in _TASKS}
DEFAULT_TASKS = ("spell_backward", "binary_matrix", "number_sorting")  # learnt in about a minute
PATIENCE = 2_000  # so many draws in a row without a new question: the task has hardly any more


def task_named(name: str) -> ReasoningTask:
    if name not in TASKS:
        raise ValueError(f"no task is named {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def distinct_examples(
    task: ReasoningTask, count: int, *, stream: str, excluded: Set[str] = frozenset()
) -> list[Example]:
    """`count` examples whose instructions differ from each other and from all in `excluded`.

    `stream` names the random numbers: the same name gives the same examples, another one others.
    """
    # reasoning_gym seeds entry i with seed + i, so neighbouring seeds would repeat each other.
    seed = random.Random(f"{task.name}/{stream}").getrandbits(48)
    dataset = _create_dataset(task.name, seed=seed, **task.config)
    examples: dict[str, Example] = {}
    draws_in_vain = 0
    for index in itertools.count():
        if len(examples) == count:
            break
        if draws_in_vain == PATIENCE:
            raise ValueError(
                f"{task.name} gave {len(examples)} new questions and then none in {PATIENCE} "
                f"draws; ask for at most {len(examples)} instead of {count}"
            )
        entry = dataset[index]
        instruction = task.instruction(entry)
        if instruction in excluded or instruction in examples:
            draws_in_vain += 1
        else:
            draws_in_vain = 0
            examples[instruction] = Example(instruction, task.response(entry), entry)
    return list(examples.values())


def held_out_row(task: ReasoningTask, example: Example) -> dict[str, Any]:
    """What `score` needs, fit for JSON."""
    return {
        "task": task.name,
        "instruction": example.instruction,
        "response": example.response,
        "config": dict(task.config),
        "entry": example.entry,
    }


def score(row: Mapping[str, Any], answer: str) -> float:
    """What the task's own verifier gives for `answer`: 1 is right, partial credit is its affair.

    `row` is as `held_out_row` made it. Malformed answers get 0 without being shown to the verifier.
    """
    task = task_named(row["task"])
    # The truth takes the answer's way, so that no text of a file reaches the verifiers' `eval`.
    truth = task.to_verifier(row["response"])
    if truth is None:
        raise ValueError(
            f"{task.name} cannot have the response {row['response']!r}; make the data anew"
        )
    verifiable = task.to_verifier(answer.strip())
    if verifiable is None:
        return 0.0
    verifier = _verifier(task.name, json.dumps(row["config"], sort_keys=True))
    return float(verifier.score_answer(answer=verifiable, entry={**row["entry"], "answer": truth}))


@lru_cache
def _verifier(name: str, config_json: str) -> ProceduralDataset:
    return _create_dataset(name, seed=0, **json.loads(config_json))


def _create_dataset(name: str, *, seed: int, **config: int | float) -> ProceduralDataset:
    from reasoning_gym import create_dataset  # takes seconds: it imports matplotlib and sympy

    return create_dataset(name, seed=seed, size=1, **config)
