"""What answers the prompts of benchmarks: this project's engine, or vLLM for other models.

An engine prepares prompts and answers a stream of them. Which are asked, in which order, and what
becomes of the answers is the affair of `evaluation.running`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from data_io.prompt_format import PromptFormat
from evaluation.benchmarks.protocol import Benchmark
from inference.asking import USUAL_CONDITION, weights_fingerprint
from inference.depth import depth_of, net_name
from inference.model_folder import ModelOptions
from inference.packed_weights import open_for_answers
from inference.requests import Answer, FinishReason, Request, Sampling
from inference.run_folder import StoredModel
from inference.scoring import usual_row_tokens
from models.flops import total_parameters
from models.language_model import LanguageModel
from simple_inference_engine import InferenceEngine
from training.checkpoint import EMA, read_checkpoint

USUAL_CONTEXT, USUAL_BATCH_SIZE = 1024, 100  # published
ENCODED_TOGETHER = 1024  # texts
ANSWERS, FIRST_TOKENS = "answers", "first tokens"  # names of streams
FEWEST_ROW_TOKENS = 64  # a packed row cannot usefully be shorter

Prompt = Sequence[int] | str  # as an engine takes it
Generation = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt, and how its answer is made."""

    key: int  # comes back with the answer
    prompt: Prompt
    generation: Generation
    seed: int = 0  # of sampling, for this prompt alone


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of it."""

    key: int
    text: str
    finish_reason: FinishReason
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StreamKind:
    """How one stream of prompts is computed."""

    name: str
    size: int  # how much is computed at a time, an upper bound
    unit: str  # of the size

    def halved(self) -> StreamKind | None:
        """None where there is nothing left to halve."""
        fewest = FEWEST_ROW_TOKENS if self.unit == "tokens" else 1
        return None if self.size <= fewest else replace(self, size=self.size // 2)


class Engine(Protocol):
    """What the runner needs of an engine."""

    @property
    def description(self) -> str:
        """The model, in one line."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the model and its checkpoint from others, fit for JSON."""
        ...

    @staticmethod
    def stream_of(generation: Generation) -> str:
        """Prompts with equal ones go through the engine together."""
        ...

    def kind_of(self, generation: Generation) -> StreamKind:
        """Of the stream whose first prompt has these settings."""
        ...

    def prepare(self, texts: Sequence[str], generation: Generation) -> Sequence[Prompt]:
        """The prompts as the engine takes them; ValueError for a text that is none."""
        ...

    def context_of(self, generation: Generation) -> int | None:
        """Tokens that prompt and answer share; None: not known."""
        ...

    def num_tokens(self, prompt: Prompt) -> int: ...

    def answer(self, asked: Iterable[Asked], kind: StreamKind) -> Iterator[Answered]:
        """Each answer as soon as it is there. All prompts are of one kind and fit the context."""
        ...


class OwnEngine(ABC):
    """A model of this project through `InferenceEngine`, wherever it comes from."""

    generation_keys: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "max_context",
        "max_tokens",
        "temperature",
        "condition",
    )

    def __init__(self, prompt_format: PromptFormat, max_context: int, decode: str) -> None:
        """`decode` as in `InferenceEngine`."""
        self.prompt_format = prompt_format
        self.max_context = max_context
        self._decode = decode

    @property
    @abstractmethod
    def model(self) -> LanguageModel:
        """What answers; only preparing prompts can do without it."""

    def _identity(self, where: Mapping[str, Any]) -> dict[str, Any]:
        """`where` it was taken from, and what it is."""
        weight, config = self.model.lm_head.weight, self.model.config
        tokenizer = self.prompt_format.tokenizer.to_str()
        return {
            **where,
            "net": net_name(config),
            "depth": depth_of(config),
            "parameters": total_parameters(config, len(weight)),
            "max_context": self.max_context,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "weights_fingerprint": weights_fingerprint(self.model),
            "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(),
        }

    @staticmethod
    def stream_of(generation: Generation) -> str:
        """Contexts, conditions and lengths may differ within one: requests have their own."""
        name = FIRST_TOKENS if is_one_greedy_token(generation) else ANSWERS
        return f"{name}, batch_size={generation.get('batch_size')}"

    def kind_of(self, generation: Generation) -> StreamKind:
        """A single greedy token is read off packed prompts; a batch is then counted in tokens."""
        batch_size = generation.get("batch_size") or USUAL_BATCH_SIZE
        if not is_one_greedy_token(generation):
            return StreamKind(ANSWERS, batch_size, "prompts")
        most = batch_size * self._context(generation)
        return StreamKind(FIRST_TOKENS, min(usual_row_tokens(self.model), most), "tokens")

    def prepare(self, texts: Sequence[str], generation: Generation) -> Sequence[Prompt]:
        condition = generation.get("condition") or USUAL_CONDITION
        prompts: list[Prompt] = []
        for start in range(0, len(texts), ENCODED_TOGETHER):
            some = [text.strip() for text in texts[start : start + ENCODED_TOGETHER]]
            encoded = self.prompt_format.encode_prompts([condition] * len(some), some)
            prompts += [array("i", ids) for ids in encoded]
        return prompts

    def context_of(self, generation: Generation) -> int | None:
        return self._context(generation)

    def _context(self, generation: Generation) -> int:
        """What is asked for, within what the model was trained with."""
        return min(generation.get("max_context") or USUAL_CONTEXT, self.max_context)

    def num_tokens(self, prompt: Prompt) -> int:
        return len(prompt)

    def answer(self, asked: Iterable[Asked], kind: StreamKind) -> Iterator[Answered]:
        if kind.name == FIRST_TOKENS:
            return self._first_tokens(asked, kind.size)
        return self._answers(asked, kind.size)

    def _answers(self, asked: Iterable[Asked], batch_size: int) -> Iterator[Answered]:
        taken: list[Asked] = []
        stop_ids = frozenset((self.prompt_format.eoa_id,))

        def requests() -> Iterator[Request]:
            for each in asked:
                taken.append(each)
                sampling = Sampling(each.generation.get("temperature") or 0.0, seed=each.seed)
                yield Request(_ids(each.prompt), self._budget(each), sampling, stop_ids)

        for event in self._engine(batch_size).stream(requests()):
            if isinstance(event, Answer):
                text = self.prompt_format.decode(event.token_ids)
                key = taken[event.index].key
                yield Answered(key, text, event.finish_reason, len(event.token_ids))

    def _budget(self, asked: Asked) -> int:
        """Tokens that the answer may have."""
        left = self._context(asked.generation) - len(asked.prompt)
        limit = asked.generation.get("max_tokens")
        return left if limit is None else min(limit, left)

    def _first_tokens(self, asked: Iterable[Asked], row_tokens: int) -> Iterator[Answered]:
        taken: list[Asked] = []
        eoa_id = self.prompt_format.eoa_id

        def questions() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
            for each in asked:
                taken.append(each)
                yield _ids(each.prompt), (eoa_id,)

        engine = self._engine(1)
        for scores in engine.score_options_ids(questions(), row_tokens=row_tokens):
            key, token = taken[scores.index].key, scores.likeliest_id
            assert token is not None  # the prompt fits the context
            if token == eoa_id:
                yield Answered(key, "", "stop")
            else:
                yield Answered(key, self.prompt_format.decode([token]), "length", 1)

    def _engine(self, max_rows: int) -> InferenceEngine:
        """A new one for each stream: what an earlier one held in memory is gone."""
        return InferenceEngine(
            self.model,
            max_context=self.max_context,
            max_rows=max_rows,
            decode=self._decode,
            id_limit=self.prompt_format.id_limit,
        )


class SimpleEngine(OwnEngine):
    """A run directory, an exported folder or the published weights."""

    def __init__(self, options: ModelOptions) -> None:
        """ValueError or FileNotFoundError where the folder holds no model."""
        self._options = options
        self._opened = opened = open_for_answers(options)
        super().__init__(opened.prompt_format, opened.max_context, options.decode)

    @property
    def model(self) -> LanguageModel:
        return self._opened.model

    @property
    def description(self) -> str:
        return self._opened.description

    @property
    def identity(self) -> dict[str, Any]:
        stored = self._opened.stored
        where = {"checkpoint": None, "epoch": None, "step": None, "weights": "exported"}
        if isinstance(stored, StoredModel):
            checkpoint = read_checkpoint(stored.weights.parent)
            where = {
                "checkpoint": checkpoint.path.name,
                "epoch": checkpoint.progress.epoch,
                "step": checkpoint.progress.step,
                "weights": "ema" if stored.weights.name == EMA else "raw",
            }
        return self._identity({"path": str(self._options.ckpt_path), **where})


def is_one_greedy_token(generation: Generation) -> bool:
    """Whether an answer is the likeliest token after the prompt."""
    return generation.get("max_tokens") == 1 and not generation.get("temperature")


def _ids(prompt: Prompt) -> Sequence[int]:
    assert not isinstance(prompt, str)
    return prompt


def generation_for(
    keys: Sequence[str], generation: Generation, benchmark: Benchmark, engine: str
) -> tuple[dict[str, Any], list[str]]:
    """What of a benchmark's settings an engine with these keys is given, and what was left out.

    A key that the benchmark sets by itself may be left out; ValueError names any other that the
    engine does not have.
    """
    strange = {key: value for key, value in generation.items() if key not in keys}
    for key, value in strange.items():
        if value is not None and benchmark.generation.get(key) != value:
            raise ValueError(
                f"{benchmark.name}: generation_config.{key}={value} is no setting of {engine}, "
                f"which has {', '.join(keys)}"
            )
    left_out = [key for key, value in strange.items() if value is not None]
    given = {key: value for key, value in generation.items() if key in keys and value is not None}
    return given, left_out
