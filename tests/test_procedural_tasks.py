"""Puzzles made and solved here: against answers worked out by hand, and by another way."""

from collections import defaultdict
from random import Random

import pytest

from evaluation.procedural_tasks import (
    PROCEDURAL_TASKS,
    ProceduralTask,
    Puzzle,
    arranged,
    evolved,
    flooded,
    full_sudokus,
    part_of,
)

by_name = pytest.mark.parametrize("task", PROCEDURAL_TASKS, ids=lambda task: task.name)


def puzzles_of(task: ProceduralTask, count: int = 200) -> list[Puzzle]:
    random = Random(0)
    return [task.draw(random) for _ in range(count)]


@by_name
def test_the_verifier_takes_the_truth_and_nothing_near_it(task: ProceduralTask) -> None:
    for puzzle in puzzles_of(task):
        answer = puzzle.response
        assert task.is_right(puzzle.instruction, answer)
        swapped = {"0": "1", "1": "0", "2": "1", "3": "4", "4": "3", "5": "1"}
        swapped |= {"o": ".", ".": "o", "#": "."}
        for at in {0, len(answer) // 2 - 1, len(answer) - 1}:
            nearly = answer[:at] + swapped[answer[at]] + answer[at + 1 :]
            assert not task.is_right(puzzle.instruction, nearly)
        for malformed in ("", "?", answer[:-1], answer + answer[-1], f"{answer} {answer}"):
            assert not task.is_right(puzzle.instruction, malformed)


@by_name
def test_all_parts_get_their_share_of_contents(task: ProceduralTask) -> None:
    shares: dict[str, int] = defaultdict(int)
    for puzzle in puzzles_of(task, 800):
        shares[part_of(puzzle.content)] += 1
    assert 40 <= shares["validation"] <= 140 and 60 <= shares["held_out"] <= 140


@by_name
def test_questions_of_one_content_are_in_one_part(task: ProceduralTask) -> None:
    # what a content is: that which a question shows of its puzzle, or its solution
    contents = {
        "ca": lambda puzzle: puzzle.instruction.split(" ")[2],
        "flood_fill": lambda puzzle: puzzle.instruction[5:].replace("s", ".").replace(" ", ""),
        "s5": lambda puzzle: puzzle.instruction[3:],
        "sudoku": lambda puzzle: puzzle.response.replace(" ", ""),
    }
    for puzzle in puzzles_of(task):
        assert puzzle.content == contents[task.name](puzzle)


def test_the_part_of_a_content_never_changes() -> None:
    parts = [part_of(f"{row:016b}") for row in range(6)]
    assert parts == ["train", "train", "held_out", "validation", "train", "train"]


def test_rule_110_makes_its_known_rows() -> None:
    rows = ["0000000000000001", "0000000000000011", "0000000000000111", "0000000000001101"]
    rows += ["0000000000011111", "0000000000110001", "0000000001110011"]
    for steps, row in enumerate(rows):
        assert evolved(rows[0], steps) == row


def test_flood_fill_goes_around_corners_and_not_across_them() -> None:
    assert flooded("s.#.. ##.#. ...#. .##.. ...##") == "oo#.. ##.#. ...#. .##.. ...##"
    assert flooded("..#.. #..#. ...#. .##.. .s.##") == "oo#.. #oo#. ooo#. o##.. ooo##"


def test_moves_of_s5_act_from_left_to_right() -> None:
    assert arranged("a") == "21345" and arranged("e") == "23451"
    assert arranged("ab") == "23145" and arranged("ae") == "13452"
    assert arranged("dd") == "12345" and arranged("eeeee") == "12345"


def test_there_are_288_sudokus_and_each_question_fits_one() -> None:
    grids = full_sudokus()
    assert len(set(grids)) == 288
    (task,) = (task for task in PROCEDURAL_TASKS if task.name == "sudoku")
    for puzzle in puzzles_of(task, 50):
        question = puzzle.instruction.removeprefix("sudoku ").replace(" ", "")
        fitting = [
            grid
            for grid in grids
            if all(given in (".", digit) for given, digit in zip(question, grid, strict=True))
        ]
        assert fitting == [puzzle.content]


def test_a_full_sudoku_that_breaks_a_rule_or_the_givens_is_wrong() -> None:
    (task,) = (task for task in PROCEDURAL_TASKS if task.name == "sudoku")
    assert task.is_right("sudoku 12.. 34.. 2143 4321", "1234 3412 2143 4321")
    assert not task.is_right("sudoku 12.. .... 2143 4321", "1234 1234 2143 4321")
    assert not task.is_right("sudoku 21.. 34.. 2143 4321", "1234 3412 2143 4321")
    assert not task.is_right("sudoku 12.. 34.. 2143 4321", "1234341221434321")
