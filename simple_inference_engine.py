"""Prompts to answers: packed prefill, then cached decoding of many answers at once.

    engine = InferenceEngine(model, max_context=512)
    for answer in engine.generate([("direct", "rev neon")], prompt_format, max_new_tokens=32): ...

Owns which answer sits in which row of the cache, when it ends, and how its next token is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_io.prompt_format import PromptFormat
from models.attention import select_attention
from models.batch import PackedLayout
from models.language_model import LanguageModel
from training.building import compute_dtype
from training.distributed import pick_device
from training.export_format import ARCH_ADAPTER
from training.run_records import choose_checkpoint, stored_config, stored_metadata

FIRST_CACHE_LENGTH = 64  # tokens a row; the cache grows with what it has to hold
PREFILL_TOKENS = 4096  # prompts are packed into one row until they have this many tokens together
REFILL_SHARE = 4  # prompts are taken in once 1 / this of the rows are free: each prefill is a pass

# stop: a stop token came; length: the budget is used up; prompt_too_long: nothing was generated
FinishReason = Literal["stop", "length", "prompt_too_long"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt."""

    index: int  # of the prompt, in the order given
    token_ids: tuple[int, ...]  # without the stop token
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """The same as text."""

    index: int
    text: str
    finish_reason: FinishReason


class InferenceEngine:
    """Greedy decoding with a model of at most `max_context` tokens, `max_rows` answers at a time.

    Tokens are the same whatever else is in the batch, up to ties in the last bits of the logits.
    """

    def __init__(self, model: LanguageModel, *, max_context: int, max_rows: int = 64) -> None:
        if max_context < 2:
            raise ValueError(
                f"{max_context=} has no room for a prompt and an answer; use 2 or more"
            )
        if max_rows < 1:
            raise ValueError(f"{max_rows=} decodes nothing; use 1 or more")
        self.model = model
        self.max_context = max_context
        self.max_rows = max_rows

    def generate(
        self,
        prompts: Iterable[tuple[str, str]],
        prompt_format: PromptFormat,
        *,
        max_new_tokens: int,
    ) -> Iterator[TextAnswer]:
        """Answers (condition, text) pairs, each as soon as it is finished."""
        encoded = (prompt_format.encode_prompt(condition, text) for condition, text in prompts)
        stop_ids = (prompt_format.eoa_id,)
        answers = self.generate_ids(encoded, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        for answer in answers:
            text = prompt_format.decode(answer.token_ids)
            yield TextAnswer(answer.index, text, answer.finish_reason)

    def generate_ids(
        self,
        prompts: Iterable[Sequence[int]],
        *,
        stop_ids: Collection[int],
        max_new_tokens: int,
    ) -> Iterator[Answer]:
        """Answers prompts of token ids, each as soon as it is finished.

        An answer has at most `max_new_tokens` tokens and ends where the context does. A prompt that
        fills the context is answered with `prompt_too_long`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens=} generates nothing; use 1 or more")
        batch = _Batch(self.model, self.max_rows, frozenset(stop_ids))
        waiting = self._drafts(prompts, max_new_tokens)
        while True:
            taken = list(_take_together(waiting, batch.num_rows_to_fill()))
            if taken:
                yield from (draft.answer() for draft in taken if draft.finish_reason)
                batch.prefill([draft for draft in taken if not draft.finish_reason])
            elif batch.drafts:
                batch.decode()
            else:
                return
            yield from (draft.answer() for draft in batch.take_finished())

    def _drafts(self, prompts: Iterable[Sequence[int]], max_new_tokens: int) -> Iterator[_Draft]:
        vocab_size = len(self.model.lm_head.weight)
        for index, prompt in enumerate(prompts):
            if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
                raise ValueError(
                    f"prompt {index} must be one or more token ids from 0 to {vocab_size - 1}, "
                    f"but is {list(prompt)[:16]} ({len(prompt)} tokens)"
                )
            budget = min(self.max_context - len(prompt), max_new_tokens)
            draft = _Draft(index, prompt, budget)
            if budget < 1:
                draft.finish_reason = "prompt_too_long"
            yield draft


@dataclass(slots=True)
class _Draft:
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


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A trained model, ready to be asked."""

    engine: InferenceEngine
    prompt_format: PromptFormat
    description: str  # what was loaded, in one line


def load_run(
    run: Path,
    *,
    epoch: int | None = None,
    step: int | None = None,
    use_ema: bool | None = None,
    device: str = "auto",
) -> LoadedRun:
    """The newest complete checkpoint of a run directory, or that of an epoch or a step.

    Average weights (EMA) where they were kept, unless `use_ema` says otherwise. Reads only the
    tensors that it needs. Weights stay fp32 on CPU, bf16 on CUDA.
    """
    config = stored_config(run)
    if config is None:
        raise FileNotFoundError(f"{run} is no run directory: it has no all_config.yaml")
    checkpoint = choose_checkpoint(run, epoch=epoch, step=step)
    takes_ema = checkpoint.has_ema if use_ema is None else use_ema
    arch = ARCH_ADAPTER.validate_python(config["arch"])
    data = stored_metadata(run)
    world_device = pick_device(device)
    dtype = compute_dtype("auto", world_device)
    attention, _ = select_attention(
        "auto",
        device=world_device,
        dtype=dtype,
        head_size=max(stack.head_size for stack in arch.stacks().values()),
    )
    with torch.device("meta"):  # shapes alone: the weights are taken from the file, not copied
        model = LanguageModel(arch, data.vocab_size, attention)
    model.load_state_dict(checkpoint.load_weights(use_ema=takes_ema), assign=True)
    model = model.to(world_device, dtype).eval()
    kind = "EMA" if takes_ema else "raw"
    return LoadedRun(
        InferenceEngine(model, max_context=data.max_seq_len),
        PromptFormat.from_info(data.tokenizer_info, Path(config["data"]["path"])),
        f"loaded {checkpoint.path} ({kind} weights, step {checkpoint.progress.step:,})",
    )


class _Batch:
    """The answers in the making: `drafts[i]` has row i of the cache.

    The rows in use are always the first ones, so that what is finished costs nothing.
    """

    def __init__(self, model: LanguageModel, max_rows: int, stop_ids: Collection[int]) -> None:
        self.drafts: list[_Draft] = []
        self._model = model
        self._max_rows = max_rows
        self._stop_ids = stop_ids
        self._cache = model.new_cache(max_rows, FIRST_CACHE_LENGTH)

    def num_rows_to_fill(self) -> int:
        """How many prompts to prefill now; 0 while too few rows are free to be worth a pass."""
        num_free = self._max_rows - len(self.drafts)
        return num_free if num_free * REFILL_SHARE >= self._max_rows else 0

    @torch.no_grad()
    def prefill(self, drafts: Sequence[_Draft]) -> None:
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

    def _add_tokens(self, hidden: Tensor, drafts: Sequence[_Draft]) -> None:
        tokens = next_tokens(self._model.logits(hidden))
        # sync: which answers are finished is decided on the host.
        for draft, token in zip(drafts, tokens.tolist(), strict=True):
            draft.add(token, self._stop_ids)

    @torch.no_grad()
    def take_finished(self) -> list[_Draft]:
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


def next_tokens(logits: Tensor) -> Tensor:
    """The token that follows in each row, [B, V] -> [B]: the most likely one."""
    return logits.argmax(-1)


def _take_together(waiting: Iterator[_Draft], num_rows: int) -> Iterator[_Draft]:
    """Drafts to prefill in one packed row: at most `num_rows`, until there are enough tokens."""
    num_tokens = 0
    for draft in islice(waiting, num_rows):
        yield draft
        num_tokens += len(draft.prompt)
        if num_tokens >= PREFILL_TOKENS:
            return
