"""How likely given texts are: whole prompts and continuations, packed into rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from inference.requests import OptionScores, Score
from models.language_model import LanguageModel


def score_continuations(
    model: LanguageModel,
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    max_context: int,
) -> Iterator[Score]:
    """The log-probability of every token of each continuation of its prompt, in order."""
    raise NotImplementedError


def score_options(
    model: LanguageModel,
    questions: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    max_context: int,
) -> Iterator[OptionScores]:
    """The log-probability of every option as the first token of the answer, in order."""
    raise NotImplementedError
