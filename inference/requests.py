"""What one asks of a model and what comes back, as token ids and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

# stop: a stop token or stop text came; length: the budget is used up; prompt_too_long: the prompt
# fills the context, so nothing was generated
FinishReason = Literal["stop", "length", "prompt_too_long"]

# SplitMix64 (Steele, Lea, Flood 2014): a counter with this step, and the mixing of its values.
WORD = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # shift, factor


def mixed_bits(word: int) -> int:
    """64 bits that depend on every bit of `word`; a bijection."""
    for shift, factor in MIXING:
        word = (word ^ (word >> shift)) * factor & WORD
    return word


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from the model's distribution.

    `temperature` 0 is greedy. Else the logits are divided by it, all but the `top_k` most likely
    tokens are left out, then all beyond the smallest set of likeliest ones whose probabilities sum
    to at least `top_p`, and one is drawn. What is drawn depends on `seed` and on how many tokens
    the answer has, and on nothing else in the batch.
    """

    temperature: float = 0.0
    top_k: int | None = None  # None: all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy) or a positive number, e.g. 0.7"
            )
        if self.top_k is not None and (self.top_k < 1 or self.top_k != int(self.top_k)):
            raise ValueError(
                f"top_k={self.top_k} must be a whole number, 1 or more, or None for all tokens"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens), e.g. 0.95"
            )

    def for_prompt(self, index: int) -> Sampling:
        """The same with a seed of its own for prompt `index` of several.

        Seeds that are neighbours share no prompt's seed, but by chance (1 in 2^63).
        """
        counter = mixed_bits(self.seed & WORD) + STEP * (index + 1)
        return replace(self, seed=mixed_bits(counter & WORD) >> 1)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of token ids, and how its answer is made and ended."""

    prompt_ids: Sequence[int]
    max_new_tokens: int | None = None  # None: as many as the context holds
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()  # such a token ends the answer and is no part of it
    top_tokens: int = 0  # this many likely tokens are reported with every token, each probability
    # Asked after each token with the answer so far; True ends the answer, with that token.
    is_complete: Callable[[Sequence[int]], bool] | None = None

    def check(self, index: int, vocab_size: int) -> None:
        """ValueError, with the request's number, where a model of so many ids cannot answer it."""
        prompt = self.prompt_ids
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {index} must be one or more token ids from 0 to {vocab_size - 1}, "
                f"but is {list(prompt)[:16]} ({len(prompt)} tokens)"
            )
        limit = self.max_new_tokens
        if limit is not None and (limit < 1 or limit != int(limit)):
            raise ValueError(f"max_new_tokens={limit} must be a whole number, 1 or more")
        if self.top_tokens < 0:
            raise ValueError(f"top_tokens={self.top_tokens} must be 0 (none) or more")


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of an answer, as soon as it is known."""

    index: int  # of the request, in the order given
    token_id: int
    # With Request.top_tokens alone: probabilities of the model itself (temperature 1, all tokens).
    probability: float | None = None
    likely: tuple[tuple[int, float], ...] = ()  # (token id, probability), the likeliest first


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request."""

    index: int  # of the request, in the order given
    token_ids: tuple[int, ...]  # without the stop token
    finish_reason: FinishReason
    stopped_by: Token | None = None  # the stop token, with Request.top_tokens alone


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """The same as text."""

    index: int
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Span:
    """The end of a sequence of tokens: how likely is it after what stands before it?"""

    token_ids: Sequence[int]  # of the whole sequence
    num_prefix_tokens: int  # these see each other; every later token sees those before it
    start: int  # of what is scored; no prefix token is


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a given continuation of a prompt is; natural logarithms."""

    index: int  # of the pair, in the order given
    logprobs: tuple[float, ...]  # one a token of the continuation; empty where it was too long
    is_greedy: bool  # each of its tokens is the likeliest one
    is_too_long: bool = False  # prompt and continuation together do not fit into the context

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True, slots=True)
class OptionScores:
    """Log-probabilities of some tokens as the first of the answer."""

    index: int  # of the prompt, in the order given
    logprobs: tuple[float, ...]  # one an option; empty where the prompt was too long
    likeliest_id: int | None  # of the whole vocabulary: what greedy decoding would say
    is_too_long: bool = False
