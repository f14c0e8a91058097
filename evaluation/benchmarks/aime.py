"""AIME by majority vote: many samples per problem, and how often the truth is among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import ClassVar

from pydantic import Field, PositiveInt

from evaluation.benchmarks.averages import known, problems
from evaluation.benchmarks.protocol import (
    Benchmark,
    DataSource,
    Figures,
    Item,
    Loaded,
    Row,
    Split,
    Verdict,
    take,
)
from evaluation.scoring import last_box, mean, robust_number, standard_error
from evaluation.verifier import OWN_LIMIT, VerifierStoppedError, shared_verifier

ANSWERS = range(1, 1000)  # what a vote may be; the competition's answers are 0 to 999


class AIMEMajorityVoting(Benchmark):
    """Each problem is asked `n` times; figures for each k of `pass_k`."""

    year: str = Field(default="25", pattern=r"^\d\d$", coerce_numbers_to_str=True)
    n: PositiveInt = 256
    pass_k: tuple[PositiveInt, ...] = (1, 10, 100)

    name: ClassVar[str] = "AIMEMajorityVoting"
    headline: ClassVar[str] = "maj_pass@1"
    robust_rule: ClassVar[str | None] = (
        "votes and pass@k both take the last number of the box, else of the text, if it is whole "
        "and 0 to 999 (published: a vote is int(text) in 1..999, pass@k compares spelling, so "
        "\\boxed{55.0} is neither and 'it is 55' no vote)"
    )

    def splits(self) -> list[Split]:
        return [Split(f"math-ai/aime{self.year}", "test")]

    def load(self, source: DataSource) -> Loaded:
        (split,) = self.splits()
        items = []
        for index, row in enumerate(source.rows(split, benchmark=self.name)):
            where = f"{split} row {index}"
            problem, truth = take(row, "problem", str, where), gold_answer(row, where)
            items += [
                Item(f"test/{index}#{sample}", problem, truth, category=str(index))
                for sample in range(self.n)
            ]
        return Loaded(items)

    def judge(self, item: Item, answer: str) -> Verdict:
        boxed, number = last_box(answer), robust_number(answer)
        text = answer if boxed is None else boxed
        vote = published_vote(text)
        is_whole = number is not None and number == number.to_integral_value()
        robust_vote = (
            int(number) if number is not None and is_whole and 0 <= number < 1000 else None
        )
        robust = float(robust_vote == item.truth)
        detail = {"robust_vote": robust_vote}
        try:
            reply = shared_verifier().ask("integer", gold=str(item.truth), text=text)
        except VerifierStoppedError as stopped:
            return Verdict(vote, 0.0, vote is None, robust, str(stopped), detail)
        detail["parsed"] = reply["parsed"]
        problem = OWN_LIMIT if reply["timed_out"] else None
        return Verdict(vote, float(reply["correct"]), vote is None, robust, problem, detail)

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        """A problem that no answer has reached counts as failed, as in the published figures."""
        polls = self._polls(items, verdicts)
        published: dict[str, float] = {}
        for index, poll in enumerate(polls):
            published[f"{index}_valid"] = len(poll.votes)
            published[f"{index}_cons_count"] = max(Counter(poll.votes).values(), default=0)
        robust: dict[str, float] = {}
        errors: dict[str, float | None] = {}
        for k in self.pass_k:
            per_problem = {
                f"maj_pass@{k}": [_is_voted(poll.truth, poll.votes, k) for poll in polls],
                f"pass@{k}": [pass_at_k(self.n, poll.num_correct, k) for poll in polls],
                f"maj_pass@{k}_robust": [
                    _is_voted(poll.truth, poll.robust_votes, k) for poll in polls
                ],
                f"pass@{k}_robust": [
                    pass_at_k(self.n, poll.robust_votes.count(poll.truth), k) for poll in polls
                ],
            }
            for figure, values in per_problem.items():
                (robust if figure.endswith("_robust") else published)[figure] = mean(values)
                errors[figure] = standard_error(values)
        too_many = [k for k in self.pass_k if k > self.n]
        notes = [f"pass@{k} needs {k} samples per problem, there are {self.n}" for k in too_many]
        return Figures(published, robust, known(errors), (*problems(verdicts), *notes))

    def _polls(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> list[Poll]:
        answered = list(verdicts) + [None] * (len(items) - len(verdicts))
        groups: dict[str | None, Poll] = {}
        for item, verdict in zip(items, answered, strict=True):
            poll = groups.setdefault(item.category, Poll(item.truth, [], []))
            if verdict is None:
                continue
            poll.num_correct += verdict.correct == 1
            if isinstance(verdict.extracted, int):
                poll.votes.append(verdict.extracted)
            if verdict.detail["robust_vote"] is not None:
                poll.robust_votes.append(verdict.detail["robust_vote"])
        return list(groups.values())


@dataclass(slots=True)
class Poll:
    """The answers to one problem, as votes in the order in which they came."""

    truth: int
    votes: list[int]
    robust_votes: list[int]
    num_correct: int = 0  # by pass@k's rule


def published_vote(text: str) -> int | None:
    """The whole text as an integer of 1..999."""
    try:
        vote = int(text)
    except ValueError:  # no integer, or thousands of digits
        return None
    return vote if vote in ANSWERS else None


def _is_voted(truth: int, votes: Sequence[int], k: int) -> float:
    """Whether the truth is among the k most frequent votes; of equals the earlier one leads."""
    return float(any(vote == truth for vote, _ in Counter(votes).most_common(k)))


def pass_at_k(n: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k of the n samples is right (Chen et al. 2021); 0 if k > n."""
    if k > n:
        return 0.0
    return 1.0 - comb(n - num_correct, k) / comb(n, k)


def gold_answer(row: Row, where: str) -> int:
    """The column `answer`, else the last box of `solution`."""
    if row.get("answer") is not None:
        text = str(row["answer"])
    else:
        text = last_box(take(row, "solution", str, where)) or ""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: its answer is no integer: {text[:80]!r}") from None
