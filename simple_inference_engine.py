"""Prompts to answers and scores: packed prefill, cached decoding of many answers at once.

    loaded = load_model(ModelOptions(ckpt_path="checkpoints/quickstart/nano-hrm"))
    for answer in loaded.engine.generate([("direct", "rev neon")], loaded.prompt_format): ...

Puts the parts in `inference/` together: rows of the cache, sampling, scores, states by cycle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

from data_io.prompt_format import PromptFormat
from inference.decoding import pick_decode_mode
from inference.depth import at_depth, with_depth
from inference.inspection import Inspection, inspect_prompt
from inference.model_folder import ModelOptions
from inference.packed_weights import open_for_answers
from inference.requests import (
    GREEDY,
    Answer,
    OptionScores,
    Request,
    Sampling,
    Score,
    Span,
    TextAnswer,
    Token,
)
from inference.rows import CacheRows, drafts_of, take_ready
from inference.scoring import score_continuations, score_options, score_spans
from inference.stop_texts import StopTexts
from inference.texts import answer_ids, option_ids, pairs_of
from models.language_model import LanguageModel


class InferenceEngine:
    """A model of at most `max_context` tokens that makes `max_rows` answers at a time.

    Tokens are the same whatever else is in the batch, up to ties in the last bits of the logits.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_context: int,
        max_rows: int = 64,
        decode: str = "eager",
        id_limit: int | None = None,
    ) -> None:
        """`decode`: eager, or with static shapes compiled or cuda_graph, for a model whose weights
        stay where they are; auto: cuda_graph on CUDA, else eager. Samples are drawn from the ids
        below `id_limit` (None: all), since a vocabulary is larger than its tokenizer."""
        if max_context < 2:
            raise ValueError(f"{max_context=} leaves no room for an answer; use 2 or more")
        if max_rows < 1:
            raise ValueError(f"{max_rows=} decodes nothing; use 1 or more")
        self.model = model
        self.max_context = max_context
        self.max_rows = max_rows
        self.id_limit = id_limit
        self.decode = pick_decode_mode(decode, model.lm_head.weight.device)
        self._kept_rows: CacheRows | None = None  # with what was compiled or captured for them

    def at_depth(
        self,
        *,
        H_cycles: int | None = None,
        L_cycles: int | None = None,
        cycles: int | None = None,
    ) -> InferenceEngine:
        """The same weights, in no further memory, with other numbers of cycles (None: as here)."""
        arch = at_depth(self.model.config, H_cycles=H_cycles, L_cycles=L_cycles, cycles=cycles)
        other = copy(self)
        other.model, other._kept_rows = with_depth(self.model, arch), None
        return other

    def generate(
        self,
        prompts: Iterable[tuple[str, str]],
        prompt_format: PromptFormat,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        stop_texts: Sequence[str] = (),
    ) -> Iterator[TextAnswer]:
        """Answers (condition, text) pairs, each as soon as it is finished.

        An answer ends before the first of `stop_texts` that comes up in it. Prompt i is sampled
        with a seed of its own, made of `sampling.seed` and i.
        """
        if isinstance(stop_texts, str):
            raise ValueError(f"{stop_texts=} must be a list of texts, e.g. [{stop_texts!r}]")
        stops = StopTexts(stop_texts, prompt_format.decode)
        asked = (
            Request(
                prompt_format.encode_prompt(condition, text),
                max_new_tokens=max_new_tokens,
                sampling=sampling.for_prompt(index),
                stop_ids=frozenset((prompt_format.eoa_id,)),
                is_complete=stops.are_in if stop_texts else None,
            )
            for index, (condition, text) in enumerate(pairs_of(prompts))
        )
        for answer in self.answer(asked):
            text = stops.cut(prompt_format.decode(answer.token_ids))
            yield TextAnswer(answer.index, text, answer.finish_reason)

    def generate_ids(
        self,
        prompts: Iterable[Sequence[int]],
        *,
        stop_ids: Collection[int],
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
    ) -> Iterator[Answer]:
        """Answers prompts of token ids, each as soon as it is finished.

        An answer has at most `max_new_tokens` tokens and ends where the context does. A prompt that
        fills the context is answered with `prompt_too_long`. Prompt i is sampled with a seed of its
        own, made of `sampling.seed` and i.
        """
        stops = frozenset(stop_ids)
        requests = (
            Request(
                prompt,
                max_new_tokens=max_new_tokens,
                sampling=sampling.for_prompt(index),
                stop_ids=stops,
            )
            for index, prompt in enumerate(prompts)
        )
        return self.answer(requests)

    def answer(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answers requests, each as soon as it is finished."""
        return (event for event in self.stream(requests) if isinstance(event, Answer))

    def stream(self, requests: Iterable[Request | None]) -> Iterator[Token | Answer]:
        """Answers requests token by token; an `Answer` ends each of them.

        Requests are taken from the iterable when there are rows for them. One that waits makes the
        engine wait: a queue gives None where it has nothing yet, and is asked again after the next
        token. Tokens of different requests alternate; a stop token is not reported. Closing the
        iterator, or a request that is none (ValueError), gives up what is unfinished.
        """
        rows = self._take_rows()
        vocab_size = len(self.model.lm_head.weight)
        waiting = drafts_of(requests, vocab_size, max_context=self.max_context)
        is_open = True
        try:
            while is_open or rows.drafts:
                taken, added = [], []
                if is_open:
                    taken, is_open = take_ready(waiting, rows.num_rows_to_fill())
                if taken:
                    yield from (draft.answer() for draft in taken if draft.finish_reason)
                    added = rows.prefill([draft for draft in taken if not draft.finish_reason])
                elif rows.drafts:
                    added = rows.decode()
                yield from [draft.newest() for draft in added]
                yield from (draft.answer() for draft in rows.take_finished())
        finally:
            self._give_back(rows)

    def _take_rows(self) -> CacheRows:
        rows, self._kept_rows = self._kept_rows, None
        return rows or CacheRows(
            self.model, self.max_rows, decode=self.decode, id_limit=self.id_limit
        )

    def _give_back(self, rows: CacheRows) -> None:
        rows.clear()
        if self.decode != "eager":  # an eager one would but keep its memory
            self._kept_rows = rows

    def score_ids(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Score]:
        """Log-probabilities of given continuations, in order: (prompt ids, continuation ids)."""
        return score_continuations(self.model, pairs, max_context=self.max_context)

    def score_spans_ids(
        self, spans: Iterable[Span], *, row_tokens: int | None = None
    ) -> Iterator[Score]:
        """Log-probabilities of the ends of sequences, in order, whose prefix may be shorter than
        what stands before them: of plain text it is one token.
        """
        return score_spans(self.model, spans, max_context=self.max_context, row_tokens=row_tokens)

    def score_options_ids(
        self,
        questions: Iterable[tuple[Sequence[int], Sequence[int]]],
        *,
        row_tokens: int | None = None,
    ) -> Iterator[OptionScores]:
        """Log-probabilities of options as the first token of the answer, in order.

        A question is its prompt's ids and the ids of its options, one token each. At most
        `row_tokens` are run at a time (a longer prompt alone); None: what suits the device.
        """
        return score_options(
            self.model, questions, max_context=self.max_context, row_tokens=row_tokens
        )

    def inspect_ids(self, prompt_ids: Sequence[int], answer_ids: Sequence[int] = ()) -> Inspection:
        """The states of one prompt (and a given answer) after every application of a stack."""
        return inspect_prompt(self.model, prompt_ids, answer_ids, max_context=self.max_context)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A trained model, ready to be asked."""

    engine: InferenceEngine
    prompt_format: PromptFormat
    description: str  # what was loaded, in one line

    def score(
        self, answers: Iterable[tuple[str, str, str]], *, ends: bool = False
    ) -> Iterator[Score]:
        """Log-probabilities of given answers, in order: (condition, prompt, answer).

        With `ends`, the token that ends the answer is scored too, as the last one.
        """
        encode = self.prompt_format.encode_prompt
        return self.engine.score_ids(
            (encode(condition, prompt), answer_ids(self.prompt_format, answer, ends=ends))
            for condition, prompt, answer in answers
        )

    def score_options(
        self, questions: Iterable[tuple[str, str, Sequence[str]]]
    ) -> Iterator[OptionScores]:
        """Log-probabilities of options as the first of the answer: (condition, prompt, options).

        An option is a text of one token, such as a letter.
        """
        encode = self.prompt_format.encode_prompt
        return self.engine.score_options_ids(
            (encode(condition, prompt), option_ids(self.prompt_format, options))
            for condition, prompt, options in questions
        )

    def inspect(
        self, condition: str, prompt: str, answer: str | None = None, *, max_new_tokens: int = 64
    ) -> Inspection:
        """The states behind an answer, the given one or the model's own (greedy)."""
        prompt_ids = self.prompt_format.encode_prompt(condition, prompt)
        if answer is not None:
            given = answer_ids(self.prompt_format, answer, ends=False)
        else:
            stop_ids = (self.prompt_format.eoa_id,)
            (own,) = self.engine.generate_ids(
                [prompt_ids], stop_ids=stop_ids, max_new_tokens=max_new_tokens
            )
            if own.finish_reason == "prompt_too_long":
                limit = self.engine.max_context
                raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the context {limit}")
            given = own.token_ids
        return self.engine.inspect_ids(prompt_ids, given)


def load_model(options: ModelOptions) -> LoadedModel:
    """What a run directory or an exported folder holds.

    ValueError or FileNotFoundError where it holds no model that this version knows.
    """
    opened = open_for_answers(options)
    engine = InferenceEngine(
        opened.model,
        max_context=opened.max_context,
        max_rows=options.batch_size,
        decode=options.decode,
        id_limit=opened.prompt_format.id_limit,
    )
    description = f"{opened.description}; decode {engine.decode}"
    return LoadedModel(engine, opened.prompt_format, description)


__all__ = [
    "GREEDY",
    "Answer",
    "InferenceEngine",
    "LoadedModel",
    "ModelOptions",
    "OptionScores",
    "Request",
    "Sampling",
    "Score",
    "Span",
    "TextAnswer",
    "Token",
    "load_model",
]
