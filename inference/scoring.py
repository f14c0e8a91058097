"""How likely given texts are: whole prompts and continuations, packed into rows.

Prompts are prefixes and continuations causal, as in training, in one forward pass a row without a
cache; the head sees the positions alone at which something is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from inference.requests import OptionScores, Score, Span
from models.batch import PackedLayout
from models.language_model import LanguageModel
from models.loss import CHUNK_LOGITS

# A row is filled up to this; what is longer has a row of its own. nano on a CPU, prompts of 20 to
# 200 tokens: 1024 and 2048 take equally long, 512 and 4096 a tenth more.
ROW_TOKENS = {"cpu": 2048, "gpu": 8192}
WINDOW_ROWS = 8  # rows' worth of prompts are read ahead and sorted by length; see _rows


@dataclass(frozen=True, slots=True)
class _Item:
    """One sequence to run, and the tokens that are asked for at its last positions."""

    index: int
    token_ids: Sequence[int]  # prompt, and all of the continuation but its last token
    num_prefix_tokens: int
    # For each of the last positions, in order: tokens whose log-probability is wanted.
    asked: Sequence[Sequence[int]]
    is_too_long: bool = False


@dataclass(frozen=True, slots=True)
class _Scored:
    """What came of an item: one entry a position."""

    index: int
    logprobs: Sequence[Sequence[float]]
    likeliest: Sequence[int]
    is_too_long: bool = False


def score_continuations(
    model: LanguageModel,
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    max_context: int,
) -> Iterator[Score]:
    """The log-probability of every token of each continuation of its prompt, in order.

    Pairs are read some rows ahead. The same prompt may come with several continuations. ValueError
    names a pair without a prompt or a continuation, or with ids that the model does not have.
    """

    def spans() -> Iterator[Span]:
        for index, (prompt, continuation) in enumerate(pairs):
            _require_ids(model, f"prompt {index}", prompt)
            _require_ids(model, f"continuation {index}", continuation)
            yield Span((*prompt, *continuation), len(prompt), len(prompt))

    return score_spans(model, spans(), max_context=max_context)


def score_spans(
    model: LanguageModel,
    spans: Iterable[Span],
    *,
    max_context: int,
    row_tokens: int | None = None,
) -> Iterator[Score]:
    """The log-probability of every token of each span, in order.

    Spans are read some rows ahead, of `row_tokens` each (None: what suits the device). ValueError
    names one that is empty, begins within its prefix, or has ids that the model does not have.
    """

    def items() -> Iterator[_Item]:
        for index, span in enumerate(spans):
            token_ids, start = span.token_ids, span.start
            _require_ids(model, f"span {index}", token_ids)
            if not 1 <= span.num_prefix_tokens <= start < len(token_ids):
                raise ValueError(
                    f"span {index} begins at {start} of {len(token_ids)} tokens after a prefix of "
                    f"{span.num_prefix_tokens}; a span has a token or more, all after the prefix"
                )
            asked = [(token,) for token in token_ids[start:]]
            is_too_long = len(token_ids) > max_context
            yield _Item(index, token_ids[:-1], span.num_prefix_tokens, asked, is_too_long)

    for scored, item in _score_all(model, items(), row_tokens):
        if scored.is_too_long:
            yield Score(scored.index, (), is_greedy=False, is_too_long=True)
            continue
        given = tuple(token for (token,) in item.asked)
        logprobs = tuple(logprob for (logprob,) in scored.logprobs)
        yield Score(scored.index, logprobs, is_greedy=given == tuple(scored.likeliest))


def score_options(
    model: LanguageModel,
    questions: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    max_context: int,
    row_tokens: int | None = None,
) -> Iterator[OptionScores]:
    """The log-probability of every option as the first token of the answer, in order.

    Questions are read some rows ahead, of `row_tokens` each (None: what suits the device).
    ValueError as in `score_continuations`.
    """

    def items() -> Iterator[_Item]:
        for index, (prompt, options) in enumerate(questions):
            _require_ids(model, f"prompt {index}", prompt)
            _require_ids(model, f"options {index}", options)
            is_too_long = len(prompt) >= max_context  # as when answers are generated
            yield _Item(index, prompt, len(prompt), (options,), is_too_long)

    for scored, _ in _score_all(model, items(), row_tokens):
        if scored.is_too_long:
            yield OptionScores(scored.index, (), None, is_too_long=True)
        else:
            yield OptionScores(scored.index, tuple(scored.logprobs[0]), scored.likeliest[0])


def _require_ids(model: LanguageModel, what: str, token_ids: Sequence[int]) -> None:
    vocab_size = len(model.lm_head.weight)
    if not len(token_ids) or min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise ValueError(
            f"{what} must be one or more token ids from 0 to {vocab_size - 1}, "
            f"but is {list(token_ids)[:16]} ({len(token_ids)} tokens)"
        )


def usual_row_tokens(model: LanguageModel) -> int:
    """What suits the device that the model is on."""
    return ROW_TOKENS["cpu" if model.lm_head.weight.device.type == "cpu" else "gpu"]


def _score_all(
    model: LanguageModel, items: Iterable[_Item], row_tokens: int | None = None
) -> Iterator[tuple[_Scored, _Item]]:
    """Results in the order of the items, one window after the other."""
    row_tokens = row_tokens or usual_row_tokens(model)
    for window in _windows(items, WINDOW_ROWS * row_tokens):
        scored: dict[int, _Scored] = {}
        for row in _rows(window, row_tokens):
            scored |= {each.index: each for each in _score_row(model, row)}
        for item in window:
            too_long = _Scored(item.index, (), (), is_too_long=True)
            yield (too_long if item.is_too_long else scored[item.index]), item


def _windows(items: Iterable[_Item], window_tokens: int) -> Iterator[list[_Item]]:
    window, num_tokens = [], 0
    for item in items:
        window.append(item)
        num_tokens += 0 if item.is_too_long else len(item.token_ids)
        if num_tokens >= window_tokens:
            yield window
            window, num_tokens = [], 0
    if window:
        yield window


def _rows(window: Sequence[_Item], row_tokens: int) -> Iterator[list[_Item]]:
    """The window's items by length, as many to a row as fit.

    Equal lengths side by side make full buckets of the attention on CPU, and fewer of them.
    """
    row: list[_Item] = []
    num_tokens = 0
    fitting = (item for item in window if not item.is_too_long)
    for item in sorted(fitting, key=lambda item: len(item.token_ids)):
        if row and num_tokens + len(item.token_ids) > row_tokens:
            yield row
            row, num_tokens = [], 0
        row.append(item)
        num_tokens += len(item.token_ids)
    if row:
        yield row


@torch.no_grad()
def _score_row(model: LanguageModel, row: Sequence[_Item]) -> Iterator[_Scored]:
    device = model.lm_head.weight.device
    lens = torch.tensor([len(item.token_ids) for item in row])
    prefix_lens = torch.tensor([item.num_prefix_tokens for item in row])
    layout = PackedLayout.from_lengths(prefix_lens, lens - prefix_lens, len(row))
    hidden = model(
        torch.tensor(list(chain.from_iterable(item.token_ids for item in row)), device=device),
        torch.cat([torch.arange(length) for length in lens.tolist()]).to(device),
        layout.map_vectors(lambda vector: vector.to(device)),
    )  # [T, D]
    positions = [
        position
        for end, item in zip(lens.cumsum(0).tolist(), row, strict=True)
        for position in range(end - len(item.asked), end)
    ]
    logprobs, likeliest = _ask(
        model,
        hidden.index_select(0, torch.tensor(positions, device=device)),
        [tokens for item in row for tokens in item.asked],
    )
    start = 0
    for item in row:
        part = slice(start, start + len(item.asked))
        yield _Scored(item.index, logprobs[part], likeliest[part])
        start += len(item.asked)


def _ask(
    model: LanguageModel, hidden: Tensor, asked: Sequence[Sequence[int]]
) -> tuple[list[list[float]], list[int]]:
    """At each of N positions, `hidden` [N, D]: log-probabilities of the tokens asked for there,
    and the likeliest token."""
    widest = max(len(tokens) for tokens in asked)
    padded = [[*tokens, *[0] * (widest - len(tokens))] for tokens in asked]
    wanted = torch.tensor(padded, device=hidden.device)  # [N, widest]
    logprobs = hidden.new_empty(wanted.shape, dtype=torch.float32)
    likeliest = wanted.new_empty(len(wanted))
    chunk = max(1, CHUNK_LOGITS // len(model.lm_head.weight))
    for start in range(0, len(wanted), chunk):
        part = slice(start, start + chunk)
        logits = model.logits(hidden[part])  # [chunk, V]
        log_normalizer = logits.logsumexp(-1, keepdim=True)
        logprobs[part] = logits.gather(1, wanted[part]) - log_normalizer
        likeliest[part] = logits.argmax(-1)
    # sync: once a row, the results are numbers of the host from here on.
    rows = logprobs.tolist()
    return [
        values[: len(tokens)] for values, tokens in zip(rows, asked, strict=True)
    ], likeliest.tolist()
