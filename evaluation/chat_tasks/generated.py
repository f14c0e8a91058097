"""Chat tasks that are answered in text: grade-school maths, counting letters, spelling words."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from decimal import Decimal
from typing import Any, ClassVar

from evaluation.benchmarks.gsm8k import gold_integer
from evaluation.benchmarks.protocol import (
    DataSource,
    Item,
    Loaded,
    Split,
    Verdict,
    take,
)
from evaluation.chat_tasks.task import ChatTask
from evaluation.mirror import Hub, fetch_command
from evaluation.scoring import robust_number

TEST_SEED = 10_000_000  # word i is drawn with this seed plus i, far from seeds of training
WORDS = Split("english-words", "words")  # of a mirror; the hub has no such data set
WORDS_ADDRESS = (
    "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
)
USUAL_ITEMS = 1000
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
FROM_WORD = 0.9  # share of the letters to count that are in the word for sure


class ChatGSM8K(ChatTask):
    """The question alone; the last number of the answer counts."""

    name: ClassVar[str] = "ChatGSM8K"

    def splits(self) -> list[Split]:
        return [Split("gsm8k", "test", "main")]

    def load(self, source: DataSource) -> Loaded:
        (split,) = self.splits()
        items = []
        for at, row in enumerate(source.rows(split, benchmark=self.name)):
            where = f"{split} row {at}"
            question = take(row, "question", str, where)
            items.append(Item(f"test/{at}", question, gold_integer(row, where)))
        return Loaded(self.cut(items))

    def judge(self, item: Item, answer: str) -> Verdict:
        return judge_last_number(item, answer)


def judge_last_number(item: Item, answer: str) -> Verdict:
    """The last number of the text (of its last box, where one holds a number)."""
    number = robust_number(answer)
    is_right = number is not None and number == Decimal(item.truth)
    extracted = None if number is None else f"{number}"
    return Verdict(extracted, float(is_right), invalid=number is None)


class WordTask(ChatTask):
    """Prompts on English words, drawn with a seed of their own each."""

    def splits(self) -> list[Split]:
        return [WORDS]

    def load(self, source: DataSource) -> Loaded:
        if isinstance(source, Hub):
            raise FileNotFoundError(
                f"{self.name} draws words from a mirror: give data_dir=DIR; where there is a "
                f"network, {fetch_command(self.name, None)} writes it"
            )
        rows = enumerate(source.rows(WORDS, benchmark=self.name))
        words = [take(row, "word", str, f"{WORDS} row {at}").strip() for at, row in rows]
        words = [word for word in words if word.isalpha()]
        if not words:
            raise ValueError(f"{WORDS} holds no words")
        items = []
        for at in range(self.max_items or USUAL_ITEMS):
            generator = random.Random(TEST_SEED + at)
            prompt, truth = self.question(generator.choice(words), generator)
            items.append(Item(f"test/{at}", prompt, truth))
        return Loaded(items)

    @abstractmethod
    def question(self, word: str, generator: random.Random) -> tuple[str, Any]:
        """Prompt and truth."""


class SpellingBee(WordTask):
    """How often a letter comes in a word; the last number of the answer counts."""

    name: ClassVar[str] = "SpellingBee"

    def question(self, word: str, generator: random.Random) -> tuple[str, Any]:
        pool = word if generator.random() < FROM_WORD else ALPHABET
        letter = generator.choice(pool)
        return f"How many {letter} are in the word {word}?", word.count(letter)

    def judge(self, item: Item, answer: str) -> Verdict:
        return judge_last_number(item, answer)


class Spelling(WordTask):
    """A word letter by letter: `cat:c,a,t`."""

    name: ClassVar[str] = "Spelling"
    robust_rule: ClassVar[str | None] = (
        "what follows the last colon, with any separators, in either case (otherwise: just "
        "word:w,o,r,d)"
    )

    def question(self, word: str, generator: random.Random) -> tuple[str, Any]:
        return f"Spell the word: {word}", f"{word}:{','.join(word)}"

    def judge(self, item: Item, answer: str) -> Verdict:
        word = str(item.truth).partition(":")[0]
        spelled = answer.rpartition(":")[2]
        letters = re.findall(r"[^\W\d_]+", spelled)
        is_spelled = bool(letters) and all(len(each) == 1 for each in letters)
        return Verdict(
            extracted="".join(letters)[:200] if is_spelled else None,
            correct=float(answer.strip() == item.truth),
            invalid=not is_spelled,
            robust=float(is_spelled and "".join(letters).lower() == word.lower()),
        )
