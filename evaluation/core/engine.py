"""The project's engine for tasks that are scored: spans by their loss, letters by their logits.

Which of the three ways a benchmark is answered in stands in its generation settings: `core` names
a task of CORE, `letters` are tokens to compare after the prompt; else the answer is generated.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from data_io.prompt_format import PromptFormat
from data_io.sampled_format import OF_ARRAYS
from evaluation.core.cache import PromptCache
from evaluation.core.prompts import EncodedRow, PrefixKind, cropped, encode_rows
from evaluation.core.task import CoreTask, measured
from evaluation.engines import (
    Answered,
    Asked,
    Generation,
    Prompt,
    SimpleEngine,
    StreamKind,
)
from inference.model_folder import ModelOptions
from inference.requests import Score, Span
from inference.run_folder import StoredModel
from inference.scoring import usual_row_tokens
from inference.texts import option_ids

SPANS, LETTERS = "spans", "letters"


class ScoringEngine(SimpleEngine):
    """Also answers tasks of CORE and chat multiple choice, with prompts that are kept on disk."""

    def __init__(self, options: ModelOptions, core: Mapping[str, CoreTask]) -> None:
        """`core`: the tasks by label."""
        super().__init__(options)
        self._core = core
        self.cache: PromptCache | None = None
        self.notes: dict[str, str] = {}  # on the encoded rows, by label

    def trained_prefix(self) -> tuple[PrefixKind, str]:
        """How raw text is best given to the model, and why, in words."""
        stored = self._opened.stored
        if not isinstance(stored, StoredModel):
            return "prompt", "an exported folder does not tell; prefix=bos for a model of raw text"
        lengths = sorted(stored.data_folder.glob("epoch_*/inst_len.npy"))
        if not lengths:
            return "prompt", "its data is not here to tell; prefix=bos for a model of raw text"
        try:
            longest = int(np.load(lengths[0], mmap_mode="r", allow_pickle=False).max(initial=1))
        except (OSError, *OF_ARRAYS):
            return "prompt", f"{lengths[0]} cannot be read; prefix=bos for a model of raw text"
        if longest == 1:
            return "bos", "it is trained on raw text"
        return "prompt", f"it is trained on prompts of up to {longest:,} tokens"

    @staticmethod
    def stream_of(generation: Generation) -> str:
        """What is scored is packed whatever its settings."""
        return scored_kind(generation) or SimpleEngine.stream_of(generation)

    def kind_of(self, generation: Generation) -> StreamKind:
        kind = scored_kind(generation)
        if kind is None:
            return super().kind_of(generation)
        return StreamKind(kind, usual_row_tokens(self.model), "tokens")

    def prepare(self, texts: Sequence[str], generation: Generation) -> Sequence[Prompt]:
        """Raw rows of CORE's tasks and prompts of all others, as they are kept."""
        assert self.cache is not None  # set before anything is loaded
        if "core" not in generation:
            digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
            made_of = {"texts": digest, "condition": generation["condition"]}
            prepare = super().prepare
            return self.cache.prompts("chat", made_of, lambda: _ids_of(prepare(texts, generation)))
        label, prefix = generation["core"], generation["prefix"]
        task, condition = self._core[label], generation.get("condition") or ""
        made_of = {
            "task": task.digest(),
            "max_per_task": task.max_per_task,
            "prefix": prefix,
            "condition": condition,
        }

        def make() -> Iterator[Sequence[int]]:
            rows = task.rows()
            try:
                for each in encode_rows(rows, self.prompt_format, prefix, condition):
                    yield each.packed()
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None

        prompts = self.cache.prompts(label, made_of, make)
        moved = sum(EncodedRow.unpacked(prompt).is_moved for prompt in prompts)
        if moved:
            self.notes[label] = (
                f"{moved:,} of {len(prompts):,} rows: the tokenizer merges across the border of a "
                "continuation, or an option begins another one (evaluation/core/prompts.py)"
            )
        return prompts

    def context_of(self, generation: Generation) -> int | None:
        """None for what is cropped, and so never too long as it is."""
        return None if "core" in generation else super().context_of(generation)

    def answer(self, asked: Iterable[Asked], kind: StreamKind) -> Iterator[Answered]:
        if kind.name == SPANS:
            return self._rows(asked, kind.size)
        if kind.name == LETTERS:
            return self._letters(asked, kind.size)
        return super().answer(asked, kind)

    def _rows(self, asked: Iterable[Asked], row_tokens: int) -> Iterator[Answered]:
        """One answer a row, once all of its options are scored."""
        waiting: deque[tuple[Asked, list[Span | None]]] = deque()

        def spans() -> Iterator[Span]:
            for each in asked:
                row = EncodedRow.unpacked(_ints(each.prompt))
                kept = kept_tokens(self.prompt_format, each.generation)
                fitting = [cropped(span, self.max_context, kept) for span in row.spans]
                waiting.append((each, fitting))
                yield from (span for span in fitting if span is not None)

        found: list[Score] = []
        for score in self._engine(1).score_spans_ids(spans(), row_tokens=row_tokens):
            found.append(score)
            while waiting and num_fitting(waiting[0][1]) <= len(found):
                each, fitting = waiting.popleft()
                yield _answered(each, fitting, found[: num_fitting(fitting)])
                del found[: num_fitting(fitting)]
        for each, fitting in waiting:  # nothing of these fits
            yield _answered(each, fitting, [])

    def _letters(self, asked: Iterable[Asked], row_tokens: int) -> Iterator[Answered]:
        taken: list[Asked] = []

        def questions() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
            for each in asked:
                taken.append(each)
                yield _ints(each.prompt), option_ids(self.prompt_format, each.generation["letters"])

        engine = self._engine(1)
        for scores in engine.score_options_ids(questions(), row_tokens=row_tokens):
            each = taken[scores.index]
            logprobs = dict(zip(each.generation["letters"], scores.logprobs, strict=True))
            yield Answered(each.key, json.dumps(logprobs), "length", 1)


def scored_kind(generation: Generation) -> str | None:
    """None: the answer is generated."""
    return SPANS if "core" in generation else LETTERS if "letters" in generation else None


def kept_tokens(prompt_format: PromptFormat, generation: Generation) -> int:
    """How many tokens at the beginning are no text and are never cropped."""
    if generation["prefix"] == "bos":
        return 1
    return 1 + len(prompt_format.condition_ids(generation["condition"]))


def num_fitting(spans: Sequence[Span | None]) -> int:
    """How many options the context has room for."""
    return len(spans) - spans.count(None)


def _answered(asked: Asked, spans: Sequence[Span | None], scores: Sequence[Score]) -> Answered:
    left = iter(scores)
    paired = [None if span is None else next(left) for span in spans]
    if not scores:
        return Answered(asked.key, "", "prompt_too_long")
    is_text = len(spans) == 1
    return Answered(asked.key, measured(paired, is_text=is_text), "length")


def _ints(prompt: Prompt) -> Sequence[int]:
    assert not isinstance(prompt, str)
    return prompt


def _ids_of(prompts: Iterable[Prompt]) -> Iterator[Sequence[int]]:
    return map(_ints, prompts)
