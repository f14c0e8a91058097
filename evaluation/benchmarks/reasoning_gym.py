"""Puzzles of reasoning_gym, with their verifiers: offline, and over levels of difficulty.

`subset=short` asks in the notation of the quick start (`evaluation.reasoning_tasks`): first the
very questions that `scripts/make_reasoning_data.py` holds out of training data, then harder ones.
`subset=questions` asks reasoning_gym's own questions along its curricula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from evaluation.benchmarks.averages import known, macro_figures
from evaluation.benchmarks.protocol import (
    Benchmark,
    DataSource,
    Figures,
    Item,
    Loaded,
    Split,
    Verdict,
)
from evaluation.procedural_tasks import ProceduralTask
from evaluation.reasoning_tasks import (
    DEFAULT_TASKS,
    Example,
    distinct_examples,
    score,
    scored_row,
    task_named,
)
from evaluation.scoring import last_box, macro_standard_error, mean, standard_error
from evaluation.verifier import VerifierStoppedError, shared_verifier

# Harder than the training data: options of reasoning_gym's data sets, one pair per level.
HARDER: dict[str, tuple[dict[str, int], ...]] = {
    "spell_backward": tuple({"min_word_len": n, "max_word_len": n} for n in (6, 7, 8, 9)),
    "binary_matrix": tuple({"min_n": n, "max_n": n} for n in (5, 6)),
    "number_sorting": tuple({"min_numbers": n, "max_numbers": n} for n in (6, 7, 8)),
    "count_bits": tuple({"min_n": 2**n, "max_n": 2 ** (n + 1) - 1} for n in (14, 15, 16, 17)),
    "ab": tuple({"length": n} for n in (8, 9, 10)),
}
# Tasks of the own questions. Their verifiers compare or count; others of reasoning_gym run `eval`
# or a computer algebra system on what a model wrote.
QUESTION_TASKS = (
    "base_conversion",
    "chain_sum",
    "count_bits",
    "family_relationships",
    "gcd",
    "leg_counting",
    "letter_counting",
    "mini_sudoku",
    "number_sequence",
    "prime_factorization",
    "products",
    "spell_backward",
    "syllogism",
    "word_sorting",
)
QUESTION_SEED = 1_000_000_007  # entry i of a data set is drawn by seed + i: train on lower seeds
LEVEL_SEEDS = 1_000_000  # apart
BOX_REQUEST = "\nPut the final answer in \\boxed{}."


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Accuracy of one task at one difficulty."""

    task: str
    difficulty: int
    n: int
    accuracy: float
    standard_error: float | None  # None for a single item


class ReasoningGym(Benchmark):
    """`n` items per task and level; the mean over tasks."""

    subset: Literal["short", "questions"] = "short"
    tasks: tuple[str, ...] = ()  # none: DEFAULT_TASKS, or QUESTION_TASKS
    levels: NonNegativeInt = 2  # how many levels beyond the first
    n: PositiveInt = 100
    seed: NonNegativeInt = 0  # of scripts/make_reasoning_data.py

    name: ClassVar[str] = "reasoning_gym"
    generation: ClassVar = {"condition": "direct"}

    def splits(self) -> list[Split]:
        return []

    def load(self, source: DataSource) -> Loaded:
        """Takes seconds: reasoning_gym imports much. `source` has no part in it."""
        items: list[Item] = []
        for task in self.task_names:
            items += self._short(task) if self.subset == "short" else self._questions(task)
        return Loaded(items)

    @property
    def task_names(self) -> tuple[str, ...]:
        """ValueError where one cannot be asked."""
        if self.subset == "short":
            return tuple(task_named(name).name for name in self.tasks or DEFAULT_TASKS)
        unknown = [name for name in self.tasks if name not in QUESTION_TASKS]
        if unknown:
            raise ValueError(
                f"reasoning_gym's questions are not asked for {', '.join(unknown)}; tasks are "
                f"{', '.join(QUESTION_TASKS)}"
            )
        return self.tasks or QUESTION_TASKS

    def _short(self, name: str) -> list[Item]:
        task = task_named(name)
        levels = [self._rows(task, self.n)]
        if not isinstance(task, ProceduralTask):
            harder = HARDER[name][: self.levels]
            levels += [
                self._rows(replace(task, config={**task.config, **config}), self.n)
                for config in harder
            ]
        return [
            Item(
                f"{name}/level_{level}/{index}",
                row["instruction"],
                row | {"level": level, "difficulty": difficulty(name, row["instruction"])},
                category=name,
            )
            for level, rows in enumerate(levels)
            for index, row in enumerate(rows)
        ]

    def _rows(self, task: Any, count: int) -> list[dict[str, Any]]:
        examples: list[Example] = distinct_examples(task, count, seed=self.seed, part="held_out")
        return [scored_row(task, example) for example in examples]

    def _questions(self, name: str) -> list[Item]:
        from reasoning_gym import create_dataset

        items = []
        for level in range(self.levels + 1):
            config = curriculum_config(name, level, self.n)
            dataset = create_dataset(name, **config)
            for index in range(self.n):
                truth = {"task": name, "config": config, "index": index}
                truth |= {"level": level, "difficulty": level}
                prompt = dataset[index]["question"] + BOX_REQUEST
                items.append(Item(f"{name}/level_{level}/{index}", prompt, truth, category=name))
        return items

    def judge(self, item: Item, answer: str) -> Verdict:
        """Right is what the verifier gives full marks; its partial marks are in the detail."""
        boxed = last_box(answer)
        try:
            if "instruction" in item.truth:
                text, marks = answer.strip(), score(item.truth, answer)
            else:
                text = answer.strip() if boxed is None else boxed
                request = {key: item.truth[key] for key in ("task", "config", "index")}
                marks = shared_verifier().ask("puzzle", answer=text, **request)["score"]
        except VerifierStoppedError as stopped:
            return Verdict(boxed, 0.0, invalid=False, problem=str(stopped))
        return Verdict(text, float(marks >= 1), invalid=not text, detail={"score": marks})

    def figures(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Figures:
        """Over all levels, and `acc_level_L`: the mean over the tasks that have level L."""
        figures = macro_figures(items, verdicts)
        levels: dict[int, dict[str, list[float]]] = {}
        for item, verdict in zip(items, verdicts, strict=False):
            by_task = levels.setdefault(item.truth["level"], {})
            by_task.setdefault(item.category or "", []).append(verdict.correct)
        for level, by_task in sorted(levels.items()):
            credits = list(by_task.values())
            figures.published[f"acc_level_{level}"] = mean([mean(each) for each in credits])
            error = macro_standard_error(credits)
            figures.standard_errors.update(known({f"acc_level_{level}": error}))
        return figures


def curriculum_config(name: str, level: int, size: int) -> dict[str, Any]:
    """The options of a data set at a level of its curriculum, or at its highest below that.

    Ranges begin where the level before ends, so that a level holds no questions of easier ones.
    """
    from reasoning_gym.coaching import RangeAttributeDefinition, ScalarAttributeDefinition
    from reasoning_gym.factory import create_curriculum

    config: dict[str, Any] = {"size": size, "seed": QUESTION_SEED + level * LEVEL_SEEDS}
    for attribute in create_curriculum(name).attributes.values():
        values = attribute.levels
        at = min(level, len(values) - 1)
        if isinstance(attribute, RangeAttributeDefinition):
            highest = max(at, 1) if attribute.ensure_interval else at
            config[attribute.lower_field_name] = values[max(at - 1, 0)]
            config[attribute.upper_field_name] = values[highest]
        elif isinstance(attribute, ScalarAttributeDefinition):
            config[attribute.field_name] = values[at]
    return config


def difficulty(task: str, instruction: str) -> int:
    """How hard a short question is: letters, rows, numbers, bits, tokens, moves, gaps or cells."""
    _, _, rest = instruction.partition(" ")
    match task:
        case "spell_backward" | "count_bits" | "s5":
            return len(rest)
        case "binary_matrix" | "number_sorting" | "ab":
            return len(rest.split(" "))
        case "ca":
            return int(rest.split(" ")[0])
        case "sudoku":
            return rest.count(".")
        case "flood_fill":
            return rest.count(".") + 1
    raise AssertionError(task)


def accuracy_curve(items: Sequence[Item], verdicts: Sequence[Verdict]) -> list[CurvePoint]:
    """Accuracy over difficulty, task by task in their order, from easy to hard."""
    groups: dict[tuple[str, int], list[float]] = {}
    for item, verdict in zip(items, verdicts, strict=False):
        key = (item.category or "", item.truth["difficulty"])
        groups.setdefault(key, []).append(verdict.correct)
    tasks = list(dict.fromkeys(task for task, _ in groups))
    return [
        CurvePoint(task, level, len(credits), mean(credits), standard_error(credits))
        for (task, level), credits in sorted(
            groups.items(), key=lambda pair: (tasks.index(pair[0][0]), pair[0][1])
        )
    ]
