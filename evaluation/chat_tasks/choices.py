"""Chat multiple choice: the likeliest of an item's letters right after the prompt.

    Multiple Choice question: <question>
    - <choice>=<letter>
    ...
    <blank line>
    Respond only with the letter of the correct answer.

The letter follows its choice, as one token without a space, so that it is the very token that
answers. Nothing but the letters of the item is compared.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from evaluation.benchmarks import arc, mmlu
from evaluation.benchmarks.protocol import (
    DataSource,
    Item,
    Loaded,
    Row,
    Split,
    Verdict,
    take,
)
from evaluation.chat_tasks.task import ChatTask


class ChatChoices(ChatTask):
    """Questions of one split."""

    guessing: ClassVar[float] = 0.25  # in this family also for items of three or five options
    letters: ClassVar[tuple[str, ...]]  # that an item may have; each has to be one token

    @abstractmethod
    def item_of(self, row: Row, item_id: str, where: str) -> Item:
        """The question that a row of the data set asks."""

    def load(self, source: DataSource) -> Loaded:
        (split,) = self.splits()
        rows = enumerate(source.rows(split, benchmark=self.name))
        items = [self.item_of(row, f"test/{at}", f"{split} row {at}") for at, row in rows]
        return Loaded(self.cut(items))

    def judge(self, item: Item, answer: str) -> Verdict:
        """`answer`: the log-probability of each letter, as JSON."""
        logprobs = json.loads(answer) if answer else {}
        among = [letter for letter in item.letters if letter in logprobs]
        chosen = max(among, key=lambda letter: logprobs[letter]) if among else None
        return Verdict(chosen, float(chosen == item.truth), invalid=chosen is None)


def prompt_of(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The question with its choices, as the family writes it."""
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    asked = "Respond only with the letter of the correct answer."
    return "\n".join((f"Multiple Choice question: {question}", *lines, "", asked))


def _item(
    item_id: str, question: str, letters: Sequence[str], choices: Sequence[str], truth: str
) -> Item:
    return Item(item_id, prompt_of(question, letters, choices), truth, tuple(letters))


class ChatARCEasy(ChatChoices):
    """ARC's letters are the labels of the row: A to E, or 1 to 5."""

    name: ClassVar[str] = "ChatARC-Easy"
    subset: ClassVar[str] = "ARC-Easy"
    letters: ClassVar[tuple[str, ...]] = tuple("ABCDE12345")

    def splits(self) -> list[Split]:
        return [Split(arc.DATASET, "test", self.subset)]

    def item_of(self, row: Row, item_id: str, where: str) -> Item:
        options = take(row, "choices", dict, where)
        labels = take(options, "label", (list, tuple), where)
        texts = take(options, "text", (list, tuple), where)
        truth = take(row, "answerKey", str, where)
        strange = [label for label in labels if label not in self.letters]
        if strange or len(labels) != len(texts) or truth not in labels:
            raise ValueError(
                f"{where}: labels {labels!r:.80} of {len(texts)} texts and answerKey={truth!r:.80} "
                f"are no question; labels are among {' '.join(self.letters)}"
            )
        return _item(item_id, take(row, "question", str, where), labels, texts, truth)


class ChatARCChallenge(ChatARCEasy):
    """The harder questions."""

    name: ClassVar[str] = "ChatARC-Challenge"
    subset: ClassVar[str] = "ARC-Challenge"


class ChatMMLU(ChatChoices):
    """All subjects together; the mean is over questions."""

    name: ClassVar[str] = "ChatMMLU"
    letters: ClassVar[tuple[str, ...]] = tuple("ABCD")

    def splits(self) -> list[Split]:
        return [Split(mmlu.DATASET, "test", mmlu.CONFIG)]

    def item_of(self, row: Row, item_id: str, where: str) -> Item:
        choices = take(row, "choices", (list, tuple), where)
        gold = take(row, "answer", int, where)
        if len(choices) != len(self.letters) or not 0 <= gold < len(choices):
            raise ValueError(f"{where}: {len(choices)} choices and answer={gold} are no question")
        question = take(row, "question", str, where)
        item = _item(item_id, question, self.letters, choices, self.letters[gold])
        return Item(item.id, item.prompt, item.truth, item.letters, row.get("subject"))
