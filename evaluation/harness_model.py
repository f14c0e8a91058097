"""What lm-evaluation-harness asks of a model, answered by our engine.

A context is a prompt in the model's own format, a continuation is an answer: contexts are read in
both directions and continuations causally. Text is data. Knows lm-eval's interface without
importing it; `evaluation.lm_eval_adapter` makes its model class of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm

from data_io.prompt_format import PromptFormat
from evaluation.harness_generation import Generation, read_generation
from inference.requests import Answer, Request, Score, Span
from inference.scoring import score_spans
from inference.stop_texts import StopTexts
from simple_inference_engine import LoadedModel


class Instance(Protocol):
    """A request of lm-eval."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Conversation(str):
    """Turns as lm-eval sees them, special tokens spelled out; what is asked is `turns`."""

    turns: tuple[tuple[str, str], ...]

    def __new__(cls, spelled: str, turns: Sequence[tuple[str, str]] = ()) -> Conversation:
        made = super().__new__(cls, spelled)
        made.turns = tuple(turns)
        return made


@dataclass(frozen=True, slots=True)
class _Context:
    ids: list[int]
    num_prefix_tokens: int
    begun: str  # of the answer: a continuation goes on from here


class HarnessModel:
    """The methods of `lm_eval.api.model.LM`.

    What does not fit into the context loses its beginning, as with lm-eval's `hf`;
    `num_cropped` counts these in the latest call of each method.
    """

    def __init__(self, loaded: LoadedModel, condition: str, *, seed: int = 0) -> None:
        super().__init__()
        self.condition = condition
        self.num_cropped: dict[str, int] = {}
        self._engine = loaded.engine
        self._format: PromptFormat = loaded.prompt_format
        self._seed = seed
        condition_text = loaded.prompt_format.encode_prompt(condition, "")[:-1]
        decode = loaded.prompt_format.tokenizer.decode
        self._opening = decode(condition_text, skip_special_tokens=False)

    @property
    def tokenizer_name(self) -> str:
        return f"{self._opening}...{self._format.eoq}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the record of an evaluation says of it."""
        return f"{self._opening}question{self._format.eoq}answer{self._format.eoa}"

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> Conversation:
        """`chat_history` ends with the user's turn, or with the beginning of the answer."""
        turns = [(message["role"], message["content"]) for message in chat_history]
        asked = turns if add_generation_prompt else turns[:-1]
        ids = self._format.encode_conversation(self.condition, asked)
        spelled = self._format.tokenizer.decode(ids, skip_special_tokens=False)
        return Conversation(spelled + ("" if add_generation_prompt else turns[-1][1]), turns)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding says the same) of each (context, continuation).

        After an empty context the continuation is plain text, as in `loglikelihood_rolling`.
        Without a chat template lm-eval separates it from its context, as a rule by a space or a
        line end. One such character is left out: the end of the prompt separates them here.
        """
        self.num_cropped["loglikelihood"] = 0
        is_chat = any(isinstance(request.args[0], Conversation) for request in requests)

        def spans() -> Iterator[Span]:
            last, context = None, None
            for request in tqdm(requests, "loglikelihood", disable=disable_tqdm, unit=" texts"):
                text, continuation = request.args
                if context is None or text is not last:
                    last, context = text, self._context(text)
                if not is_chat and continuation[:1].isspace():
                    continuation = continuation[1:] or continuation
                yield self._fitted(self._span(context, continuation))

        scores = [(score.total, score.is_greedy) for score in self._scores(spans())]
        self._tell_cropped("loglikelihood", len(requests))
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text, read causally behind one begin-of-question token.

        A longer one than the context is read in windows: each token is predicted once, and those of
        the last window see a full context.
        """
        window_of: list[int] = []

        def spans() -> Iterator[Span]:
            bar = tqdm(requests, "loglikelihood_rolling", disable=disable_tqdm, unit=" texts")
            for index, request in enumerate(bar):
                (text,) = request.args
                for span in windows(self._format.boq_id, self._text_ids(text), self._room - 1):
                    window_of.append(index)
                    yield span

        totals = [0.0] * len(requests)
        for score in self._scores(spans()):
            totals[window_of[score.index]] += score.total
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each (context, settings): greedy where these do not say otherwise."""
        stops: dict[int, StopTexts] = {}
        self.num_cropped["generate_until"] = 0

        def asked() -> Iterator[Request]:
            for index, request in enumerate(requests):
                text, settings = request.args
                generation = read_generation(settings, self._seed)
                stops[index] = StopTexts(generation.until, self._format.decode)
                is_complete = stops[index].are_in if generation.until else None
                yield self._request(text, generation, index, is_complete)

        texts = [""] * len(requests)
        bar = tqdm(
            total=len(requests), desc="generate_until", disable=disable_tqdm, unit=" answers"
        )
        with bar:
            for answer in self._engine.answer(asked()):
                texts[answer.index] = self._text(answer, stops.pop(answer.index))
                bar.update()
        self._tell_cropped("generate_until", len(requests))
        return texts

    def _text(self, answer: Answer, stops: StopTexts) -> str:
        return stops.cut(self._format.decode(answer.token_ids))

    def _request(
        self,
        text: str,
        generation: Generation,
        index: int,
        is_complete: Callable[[Sequence[int]], bool] | None,
    ) -> Request:
        context = self._context(text)
        if context.begun:
            raise ValueError(
                "the task begins the answer (gen_prefix) and has the model go on; the engine reads "
                "all of a prompt in both directions, and the answers would be others"
            )
        num_kept = self._engine.max_context - generation.max_new_tokens
        if num_kept < 1:
            raise ValueError(
                f"max_gen_toks={generation.max_new_tokens} fills the context of "
                f"{self._engine.max_context} tokens; use less: --gen_kwargs max_gen_toks="
                f"{self._engine.max_context // 4}"
            )
        self.num_cropped["generate_until"] += len(context.ids) > num_kept
        return Request(
            context.ids[-num_kept:],
            max_new_tokens=generation.max_new_tokens,
            sampling=generation.sampling.for_prompt(index),
            stop_ids=frozenset((self._format.eoa_id,)),
            is_complete=is_complete,
        )

    @property
    def _room(self) -> int:
        """Tokens of a text that is scored: the last is asked for, and not in the context."""
        return self._engine.max_context + 1

    def _scores(self, spans: Iterator[Span]) -> Iterator[Score]:
        return score_spans(self._engine.model, spans, max_context=self._room)

    def _text_ids(self, text: str) -> list[int]:
        return self._format.encode_response(text)[:-1]

    def _context(self, text: str) -> _Context:
        if isinstance(text, Conversation):
            *_, (role, last) = text.turns
            begun = last if role == "assistant" else ""
            turns = text.turns[:-1] if role == "assistant" else text.turns
            ids = self._format.encode_conversation(self.condition, turns)
            return _Context(ids, len(ids), begun)
        if text.startswith(self._opening):
            raise ValueError(
                f"a context begins with {self._opening!r}, as if the chat template had been "
                "applied, but is no Conversation: this version of lm-eval copies it as text"
            )
        if not text:
            return _Context([self._format.boq_id], 1, "")
        ids = self._format.encode_prompt(self.condition, text)
        return _Context(ids, len(ids), "")

    def _span(self, context: _Context, continuation: str) -> Span:
        # White space belongs to the word after it, for tokenizers that join the two.
        begun = context.begun.rstrip()
        begun_ids = self._text_ids(begun)
        whole = self._text_ids(context.begun + continuation)
        answer = whole[len(begun_ids) :]
        if not answer:
            raise ValueError(f"a continuation ({continuation!r}) has no token to score")
        before = [*context.ids, *begun_ids]
        return Span((*before, *answer), context.num_prefix_tokens, len(before))

    def _fitted(self, span: Span) -> Span:
        num_over = len(span.token_ids) - self._room
        self.num_cropped["loglikelihood"] += num_over > 0
        if num_over <= 0:
            return span
        if num_over >= span.start:
            raise ValueError(
                f"a continuation of {len(span.token_ids) - span.start} tokens does not fit into "
                f"the context of {self._engine.max_context}"
            )
        num_prefix_tokens = max(1, span.num_prefix_tokens - num_over)
        return Span(span.token_ids[num_over:], num_prefix_tokens, span.start - num_over)

    def _tell_cropped(self, method: str, num_requests: int) -> None:
        if count := self.num_cropped.get(method):
            print(
                f"{method}: {count:,} of {num_requests:,} contexts were too long and lost their "
                f"beginnings (context {self._engine.max_context} tokens)",
                flush=True,
            )


def windows(boq_id: int, ids: Sequence[int], max_context: int) -> Iterator[Span]:
    """Spans that score each of `ids` once, `max_context` at a time, behind one token at least."""
    whole = (boq_id, *ids)
    for first in range(1, len(whole), max_context):
        end = min(first + max_context, len(whole))
        beginning = max(0, end - max_context - 1)
        yield Span(whole[beginning:end], 1, first - beginning)
