"""Answers in the making: which sits in which row of the cache, when it ends, what comes next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from inference.requests import Answer, FinishReason
from inference.sampling import next_tokens
from models.batch import PackedLayout
from models.language_model import LanguageModel

FIRST_CACHE_LENGTH = 64  # tokens a row; the cache grows with what it has to hold
PREFILL_TOKENS = 4096  # prompts are packed into one row until they have this many tokens together
REFILL_SHARE = 4  # prompts are taken in once 1 / this of the rows are free: each prefill is a pass


@dataclass(slots=True)
class Draft:
    """An answer in the making."""

    index: int
    prompt: Sequence[int]
    budget: int  # tokens that it may have
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.token_ids)

    def add(self, token: int, stop_ids: Collection[int]) -> None:
        if token in stop_ids:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        if len(self.token_ids) == self.budget:
            self.finish_reason = "length"

    def answer(self) -> Answer:
        assert self.finish_reason is not None
        return Answer(self.index, tuple(self.token_ids), self.finish_reason)


class CacheRows:
    """The answers in the making: `drafts[i]` has row i of the cache.

    The rows in use are always the first ones, so that what is finished costs nothing.
    """

    def __init__(self, model: LanguageModel, max_rows: int, stop_ids: Collection[int]) -> None:
        self.drafts: list[Draft] = []
        self._model = model
        self._max_rows = max_rows
        self._stop_ids = stop_ids
        self._cache = model.new_cache(max_rows, FIRST_CACHE_LENGTH)

    def num_rows_to_fill(self) -> int:
        """How many prompts to prefill now; 0 while too few rows are free to be worth a pass."""
        num_free = self._max_rows - len(self.drafts)
        return num_free if num_free * REFILL_SHARE >= self._max_rows else 0

    @torch.no_grad()
    def prefill(self, drafts: Sequence[Draft]) -> None:
        """Adds new drafts, packed in one row, and finds their first tokens."""
        if not drafts:
            return
        prompt_lens = [len(draft.prompt) for draft in drafts]
        self._cache.reserve(max(prompt_lens))
        device = self._cache.lengths.device
        # The whole prompt is the prefix.
        prefix_lens = torch.tensor(prompt_lens, dtype=torch.int32)
        layout = PackedLayout.from_lengths(prefix_lens, torch.zeros_like(prefix_lens), len(drafts))
        first_row = len(self.drafts)
        hidden = self._model.prefill(
            torch.tensor([token for draft in drafts for token in draft.prompt], device=device),
            torch.cat([torch.arange(length) for length in prompt_lens]).to(device),
            layout.map_vectors(lambda vector: vector.to(device)),
            self._cache,
            torch.arange(first_row, first_row + len(drafts), device=device),
        )  # [T, D]
        self.drafts.extend(drafts)
        last_tokens = (layout.cu_seqlens[1:] - 1).to(device)
        self._add_tokens(hidden.index_select(0, last_tokens), drafts)

    @torch.no_grad()
    def decode(self) -> None:
        """Adds one token to every draft."""
        self._cache.reserve(max(draft.num_tokens for draft in self.drafts))
        newest = [draft.token_ids[-1] for draft in self.drafts]
        tokens = torch.tensor(newest, device=self._cache.lengths.device)
        self._add_tokens(self._model.decode(tokens, self._cache), self.drafts)

    def _add_tokens(self, hidden: Tensor, drafts: Sequence[Draft]) -> None:
        tokens = next_tokens(self._model.logits(hidden))
        # sync: which answers are finished is decided on the host.
        for draft, token in zip(drafts, tokens.tolist(), strict=True):
            draft.add(token, self._stop_ids)

    @torch.no_grad()
    def take_finished(self) -> list[Draft]:
        """Removes the finished drafts, and moves the last ones into the rows that they leave."""
        finished = [draft for draft in self.drafts if draft.finish_reason]
        num_left = len(self.drafts) - len(finished)
        holes = [row for row in range(num_left) if self.drafts[row].finish_reason]
        movers = [
            row for row in range(num_left, len(self.drafts)) if not self.drafts[row].finish_reason
        ]
        self._cache.move_rows(movers, holes)
        for source, target in zip(movers, holes, strict=True):
            self.drafts[target] = self.drafts[source]
        del self.drafts[num_left:]
        return finished


def take_together(waiting: Iterator[Draft], num_rows: int) -> Iterator[Draft]:
    """Drafts to prefill in one packed row: at most `num_rows`, until there are enough tokens."""
    num_tokens = 0
    for draft in islice(waiting, num_rows):
        yield draft
        num_tokens += len(draft.prompt)
        if num_tokens >= PREFILL_TOKENS:
            return
