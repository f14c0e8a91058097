"""Answers in the making: which sits in which row of the cache, when it ends, what comes next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.decoding import Decoder, row_kernel
from inference.requests import Answer, FinishReason, Request, Token
from inference.sampling import SampledRows, likely_tokens, next_tokens
from models.batch import PackedLayout
from models.language_model import LanguageModel

FIRST_CACHE_LENGTH = 64  # tokens a row; the cache grows with what it has to hold
ROOM_AHEAD = 1 << 30  # bytes of a cache that is made as long as answers may get at once, on CPUs
# Prompts are packed into one row until they have this many tokens together. On CPUs what a row
# needs then stays in the cache: nano, one thread: 77 us a token at 1000, 95 to 110 at 4000.
PREFILL_TOKENS = {"cpu": 1024, "gpu": 8192}
REFILL_SHARE = 8  # prompts are taken in once 1 / this of the rows are free: each prefill is a pass


@dataclass(slots=True)
class Draft:
    """An answer in the making."""

    index: int
    request: Request
    budget: int  # tokens that it may have
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    probability: float | None = None  # of the newest token, where the request wants to know
    stopped_by: int | None = None  # the stop token
    likely: tuple[tuple[int, float], ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.token_ids)

    def add(self, token: int) -> bool:
        """Takes the next token; whether it belongs to the answer."""
        if token in self.request.stop_ids:
            self.finish_reason, self.stopped_by = "stop", token
            return False
        self.token_ids.append(token)
        if self.request.is_complete is not None and self.request.is_complete(self.token_ids):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.budget:
            self.finish_reason = "length"
        return True

    def newest(self) -> Token:
        return Token(self.index, self.token_ids[-1], self.probability, self.likely)

    def answer(self) -> Answer:
        assert self.finish_reason is not None
        last = None
        if self.stopped_by is not None and self.request.top_tokens:
            last = Token(self.index, self.stopped_by, self.probability, self.likely)
        return Answer(self.index, tuple(self.token_ids), self.finish_reason, last)


class CacheRows:
    """The answers in the making: `drafts[i]` has row i of the cache.

    The rows in use are always the first ones, so that what is finished costs nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_rows: int,
        *,
        decode: str = "eager",
        id_limit: int | None = None,
    ) -> None:
        self.drafts: list[Draft] = []
        self._model = model
        self._max_rows = max_rows
        self._id_limit = id_limit
        # Faster where nobody wants a gradient later: what inference mode makes can have none, and a
        # model in training keeps some of it (gathered shards).
        is_fixed = not any(weight.requires_grad for weight in model.parameters())
        self._without_gradient = torch.inference_mode if is_fixed else torch.no_grad
        kernel = row_kernel(model) if decode == "eager" and max_rows > 1 else None
        self._cache = model.new_cache(max_rows, FIRST_CACHE_LENGTH, kernel)
        self._decoder = Decoder(model, self._cache, decode)
        self._sampled: SampledRows | None = None

    def clear(self) -> None:
        """Forgets the answers in the making; their rows are free."""
        self.drafts.clear()

    def num_rows_to_fill(self) -> int:
        """How many prompts to prefill now; 0 while too few rows are free to be worth a pass."""
        num_free = self._max_rows - len(self.drafts)
        return num_free if num_free * REFILL_SHARE >= self._max_rows else 0

    def prefill(self, drafts: Sequence[Draft]) -> list[Draft]:
        """Adds new drafts, packed into rows, and finds their first tokens.

        Returns those whose token belongs to the answer, as `decode` does.
        """
        device = self._cache.lengths.device
        row_tokens = PREFILL_TOKENS["cpu" if device.type == "cpu" else "gpu"]
        added = []
        for together in in_rows(drafts, row_tokens):
            with self._without_gradient():
                added += self._prefill_row(together)
        return added

    def _prefill_row(self, drafts: Sequence[Draft]) -> list[Draft]:
        prompt_lens = [draft.num_tokens for draft in drafts]
        self._decoder.reserve(self._room_for(drafts))
        device = self._cache.lengths.device
        # The whole prompt is the prefix.
        prefix_lens = torch.tensor(prompt_lens, dtype=torch.int32)
        layout = PackedLayout.from_lengths(prefix_lens, torch.zeros_like(prefix_lens), len(drafts))
        tokens = [token for draft in drafts for token in draft.request.prompt_ids]
        first_row = len(self.drafts)
        hidden = self._model.prefill(
            torch.tensor(tokens, device=device),
            torch.cat([torch.arange(length) for length in prompt_lens]).to(device),
            layout.map_vectors(lambda vector: vector.to(device)),
            self._cache,
            torch.arange(first_row, first_row + len(drafts), device=device),
        )  # [T, D]
        last_tokens = (layout.cu_seqlens[1:] - 1).to(device)
        logits = self._model.logits(hidden.index_select(0, last_tokens))
        self.drafts.extend(drafts)
        self._sampled = self._sampled_rows(self.drafts)
        return self._add_tokens(logits, drafts, self._sampled_rows(drafts))

    def decode(self) -> list[Draft]:
        """Adds one token to every draft."""
        with self._without_gradient():
            return self._decode()

    def _decode(self) -> list[Draft]:
        num_columns = max(draft.num_tokens for draft in self.drafts)
        self._decoder.reserve(num_columns)
        newest = [draft.token_ids[-1] for draft in self.drafts]
        tokens = torch.tensor(newest, device=self._cache.lengths.device)
        logits = self._decoder.logits(tokens, num_columns)
        return self._add_tokens(logits, self.drafts, self._sampled)

    def _room_for(self, drafts: Sequence[Draft]) -> int:
        """Tokens of a row. A row kernel's cache takes memory only where it is written."""
        longest = max(draft.num_tokens + draft.budget for draft in drafts)
        if self._cache.kernel and longest * self._cache.bytes_per_column <= ROOM_AHEAD:
            return longest
        return max(draft.num_tokens for draft in drafts)

    def _sampled_rows(self, drafts: Sequence[Draft]) -> SampledRows | None:
        settings = [draft.request.sampling for draft in drafts]
        return SampledRows.of(settings, self._cache.lengths.device)

    def _add_tokens(
        self, logits: Tensor, drafts: Sequence[Draft], sampled: SampledRows | None
    ) -> list[Draft]:
        numbers = None
        if sampled is not None:
            numbers = torch.tensor([len(draft.token_ids) for draft in drafts]).to(logits.device)
        tokens = next_tokens(logits, sampled, numbers, id_limit=self._id_limit)
        _note_likely(logits, tokens, drafts)
        # sync: which answers are finished is decided on the host.
        added = zip(drafts, tokens.tolist(), strict=True)
        return [draft for draft, token in added if draft.add(token)]

    def take_finished(self) -> list[Draft]:
        """Removes the finished drafts, and moves the last ones into the rows that they leave."""
        finished = [draft for draft in self.drafts if draft.finish_reason]
        if not finished:
            return []
        num_left = len(self.drafts) - len(finished)
        holes = [row for row in range(num_left) if self.drafts[row].finish_reason]
        movers = [
            row for row in range(num_left, len(self.drafts)) if not self.drafts[row].finish_reason
        ]
        with self._without_gradient():
            self._cache.move_rows(movers, holes)
        for source, target in zip(movers, holes, strict=True):
            self.drafts[target] = self.drafts[source]
        del self.drafts[num_left:]
        self._sampled = self._sampled_rows(self.drafts)
        return finished


def _note_likely(logits: Tensor, tokens: Tensor, drafts: Sequence[Draft]) -> None:
    """Writes into the drafts whose requests want it how likely their next tokens are."""
    rows = [row for row, draft in enumerate(drafts) if draft.request.top_tokens]
    if not rows:
        return
    num_likely = max(drafts[row].request.top_tokens for row in rows)
    of_chosen, likely = likely_tokens(logits[rows], tokens[rows], num_likely)
    for row, probability, tops in zip(rows, of_chosen, likely, strict=True):
        drafts[row].probability = probability
        drafts[row].likely = tuple(tops[: drafts[row].request.top_tokens])


def drafts_of(
    requests: Iterable[Request | None], vocab_size: int, *, max_context: int
) -> Iterator[Draft | None]:
    """A draft for each request, in order; None where there is none yet."""
    index = -1
    for request in requests:
        if request is None:
            yield None
            continue
        index += 1
        request.check(index, vocab_size)
        num_left = max_context - len(request.prompt_ids)
        draft = Draft(index, request, min(num_left, request.max_new_tokens or max_context))
        if draft.budget < 1:
            draft.finish_reason = "prompt_too_long"
        yield draft


def take_ready(waiting: Iterator[Draft | None], num_rows: int) -> tuple[list[Draft], bool]:
    """At most `num_rows` drafts, those before the first None; and whether more may come."""
    taken: list[Draft] = []
    while len(taken) < num_rows:
        try:
            draft = next(waiting)
        except StopIteration:
            return taken, False
        if draft is None:
            break
        taken.append(draft)
    return taken, True


def in_rows(drafts: Sequence[Draft], row_tokens: int) -> Iterator[list[Draft]]:
    """Drafts in groups, each of which is as many as have `row_tokens` tokens together."""
    group, num_tokens = [], 0
    for draft in drafts:
        group.append(draft)
        num_tokens += draft.num_tokens
        if num_tokens >= row_tokens:
            yield group
            group, num_tokens = [], 0
    if group:
        yield group
