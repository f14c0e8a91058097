"""Small reasoning tasks, written so short that a model of 0.2 M parameters learns them.

Owns how tasks of reasoning_gym are asked and answered here, and drawing from and scoring these and
those of `procedural_tasks` alike. Files belong to `scripts/make_reasoning_data.py`.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evaluation.procedural_tasks import PROCEDURAL_TASKS, Part, ProceduralTask, part_of

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
    entry: Entry | None = None  # None: an answer is judged from the question alone


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
Task = ReasoningTask | ProceduralTask
TASKS: dict[str, Task] = {task.name: task for task in (*_TASKS, *PROCEDURAL_TASKS)}
DEFAULT_TASKS = ("spell_backward", "binary_matrix", "number_sorting")  # learnt in about a minute
PATIENCE = 2_000  # so many draws in a row without a new question: the task has hardly any more


def task_named(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"no task is named {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def distinct_examples(
    task: Task, count: int, *, seed: int, part: Part, excluded: Set[str] = frozenset()
) -> list[Example]:
    """`count` examples whose instructions differ from each other and from all in `excluded`.

    Each part has random numbers of its own, so the order in which parts are drawn does not matter.
    Procedural tasks share no content between parts; for the others, exclude the other parts.
    """
    examples: dict[str, Example] = {}
    draws_in_vain = 0
    draws = _draws(task, part, random.Random(f"{task.name}/{seed}/{part}"))
    while len(examples) < count:
        if draws_in_vain == PATIENCE:
            raise ValueError(
                f"{task.name} gave {len(examples)} new questions and then none in {PATIENCE} "
                f"draws; ask for at most {len(examples)} instead of {count}"
            )
        example = next(draws)
        if example.instruction in excluded or example.instruction in examples:
            draws_in_vain += 1
        else:
            draws_in_vain = 0
            examples[example.instruction] = example
    return list(examples.values())


def _draws(task: Task, part: Part, source: random.Random) -> Iterator[Example]:
    if isinstance(task, ProceduralTask):
        while True:
            puzzle = task.draw(source)
            if part_of(puzzle.content) == part:
                yield Example(puzzle.instruction, puzzle.response)
    # reasoning_gym seeds entry i with seed + i, so neighbouring seeds would repeat each other.
    dataset = _create_dataset(task.name, seed=source.getrandbits(48), **task.config)
    for index in itertools.count():
        entry = dataset[index]
        yield Example(task.instruction(entry), task.response(entry), entry)


def scored_row(task: Task, example: Example) -> dict[str, Any]:
    """What `score` needs, fit for JSON."""
    row = {
        "task": task.name,
        "instruction": example.instruction,
        "response": example.response,
    }
    if isinstance(task, ProceduralTask):
        return row
    return {**row, "config": dict(task.config), "entry": example.entry}


def score(row: Mapping[str, Any], answer: str) -> float:
    """What the task's own verifier gives for `answer`: 1 is right, partial credit is its affair.

    `row` is as `scored_row` made it. Malformed answers get 0 without being shown to the verifier.
    """
    task = task_named(row["task"])
    if isinstance(task, ProceduralTask):
        return float(task.is_right(row["instruction"], answer.strip()))
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
