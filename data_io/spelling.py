"""Words to spell and letters to count, made of a list of words: training rows of two chat tasks.

    Spell the word: cat                    How many t are in the word attic?
    cat:c,a,t                              attic:a,t,t,i,c
                                           a 0, t 1, t 2, i 2, c 2
                                           #### 2

The questions are those of the evaluation (evaluation/chat_tasks/generated.py), and what it asks is
left out: the words that it draws of the same list with its seeds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from data_io.records import Row

TEST_SEED = 10_000_000  # the evaluation draws word i with this seed plus i
TEST_ITEMS = 1000
FROM_WORD = 0.9  # share of the letters to count that are in the word for sure
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def words_to_train_on(lines: Sequence[str]) -> list[str]:
    """The words of a list that the evaluation does not ask, each once. ValueError: too few."""
    words = [word for word in map(str.strip, lines) if word.isalpha()]
    if not words:
        raise ValueError("a list of words holds none; it has one of letters alone in each line")
    asked = {random.Random(TEST_SEED + at).choice(words) for at in range(TEST_ITEMS)}
    left = [word for word in dict.fromkeys(words) if word not in asked]
    if not left:
        raise ValueError(
            f"all {len(words)} words of a list are among the {TEST_ITEMS} that the evaluation "
            "draws; give a longer list"
        )
    return left


def spelling_rows(
    words: Sequence[str], count: int, seed: int, condition: str, *, counts_letters: bool
) -> Iterator[Row]:
    """So many rows; a word comes again only when all have come."""
    generator = random.Random(f"{seed} {counts_letters}")
    order: list[str] = []
    for _ in range(count):
        if not order:
            order = generator.sample(words, len(words))
        word = order.pop()
        if counts_letters:
            pool = word if generator.random() < FROM_WORD else ALPHABET
            yield counting_row(word, generator.choice(pool), condition)
        else:
            yield Row(condition, f"Spell the word: {word}", spelled(word))


def counting_row(word: str, letter: str, condition: str) -> Row:
    """The answer spells the word and counts along; its last number is the answer."""
    steps, count = [], 0
    for each in word:
        count += each == letter
        steps.append(f"{each} {count}")
    question = f"How many {letter} are in the word {word}?"
    return Row(condition, question, f"{spelled(word)}\n{', '.join(steps)}\n#### {count}")


def spelled(word: str) -> str:
    return f"{word}:{','.join(word)}"
