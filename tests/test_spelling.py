"""Spelling rows: what the evaluation asks, answered as it judges right, without its own words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from mixture_cases import write_word_mirror

from data_io.spelling import counting_row, spelling_rows, words_to_train_on
from evaluation.benchmarks.protocol import Item
from evaluation.chat_tasks.generated import Spelling, SpellingBee, WordTask
from evaluation.mirror import LocalMirror


@pytest.fixture(scope="module")
def words() -> list[str]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(draw.choices(letters, k=draw.randint(2, 12))) for _ in range(3000)] + ["o'er"]


@pytest.mark.parametrize("task", [Spelling(), SpellingBee()])
def test_no_word_that_is_asked_is_trained_on(
    task: WordTask, words: list[str], tmp_path: Path
) -> None:
    items = task.load(LocalMirror(write_word_mirror(tmp_path, words))).items
    asked = {str(item.prompt).rstrip("?").split()[-1] for item in items}
    left = words_to_train_on(words)
    assert len(items) == 1000 and len(left) > 1500
    assert asked & set(words) == asked and not asked & set(left)
    assert "o'er" not in left


def test_the_answers_are_judged_right(words: list[str]) -> None:
    for row in spelling_rows(words[:50], 60, 0, "direct", counts_letters=False):
        word = row.instruction.removeprefix("Spell the word: ")
        question, truth = Spelling().question(word, random.Random(0))
        assert row.instruction == question
        assert Spelling().judge(Item("1", question, truth), row.response).correct == 1.0
    for row in spelling_rows(words[:50], 60, 0, "direct", counts_letters=True):
        letter, word = row.instruction[len("How many ")], row.instruction.rstrip("?").split()[-1]
        assert row.instruction == f"How many {letter} are in the word {word}?"
        item = Item("1", row.instruction, word.count(letter))
        assert SpellingBee().judge(item, row.response).correct == 1.0


def test_the_questions_are_worded_as_those_asked() -> None:
    question, truth = SpellingBee().question("attic", random.Random(3))
    row = counting_row("attic", question[len("How many ")], "cot")
    assert (row.instruction, row.condition) == (question, "cot")
    assert row.response.endswith(f"#### {truth}")


def test_rows_are_drawn_by_seed_and_words_come_in_turn(words: list[str]) -> None:
    few = words[:10]

    def drawn(seed: int) -> list[str]:
        rows = spelling_rows(few, 20, seed, "direct", counts_letters=False)
        return [row.instruction.split()[-1] for row in rows]

    assert drawn(0) == drawn(0) != drawn(1)
    assert sorted(drawn(0)[:10]) == sorted(drawn(0)[10:]) == sorted(few)


@pytest.mark.parametrize(("lines", "told"), [(["1", " "], "holds none"), (["cat"], "longer list")])
def test_a_list_that_leaves_no_word_is_refused(lines: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        words_to_train_on(lines)
