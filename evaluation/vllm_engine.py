"""Other people's models through vLLM, which is imported when the engine is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from evaluation.engines import ANSWERS, Answered, Asked, Generation, Prompt, StreamKind

INSTALL = "pip install -r requirements-eval.txt"
CHUNK = 2048  # prompts handed over at a time: a kill loses the answers to no more of them


class VLLMEngine:
    """A model by its name on the hub or its folder; prompts are passed on as they are."""

    generation_keys: ClassVar[tuple[str, ...]] = ("temperature", "max_tokens", "stop")

    def __init__(self, ckpt_path: str, settings: Mapping[str, Any]) -> None:
        """`settings` go to `vllm.LLM`. ValueError where vLLM is not installed."""
        try:
            from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"engine=VLLMEngine needs vLLM, which does not import here ({error}); {INSTALL}"
            ) from None
        self._sampling_params = SamplingParams
        self._path = ckpt_path
        self._settings = dict(settings)
        self._llm: Any = LLM(model=ckpt_path, **settings)

    @property
    def description(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self._settings.items())
        return f"loaded {self._path} into vLLM{f' ({given})' if given else ''}"

    @property
    def identity(self) -> dict[str, Any]:
        return {"path": self._path, "checkpoint": self._path, "weights": "vllm", **self._settings}

    @staticmethod
    def stream_of(generation: Generation) -> str:
        """A call has one set of settings."""
        return ", ".join(f"{key}={generation[key]!r}" for key in sorted(generation))

    def kind_of(self, generation: Generation) -> StreamKind:
        """vLLM finds its batch size itself."""
        return StreamKind(ANSWERS, CHUNK, "prompts")

    def prepare(self, texts: Sequence[str], generation: Generation) -> Sequence[Prompt]:
        return list(texts)

    def context_of(self, generation: Generation) -> int | None:
        return self._llm.llm_engine.model_config.max_model_len

    def num_tokens(self, prompt: Prompt) -> int:
        return len(self._llm.get_tokenizer().encode(prompt))

    def answer(self, asked: Iterable[Asked], kind: StreamKind) -> Iterator[Answered]:
        waiting = iter(asked)
        while some := list(islice(waiting, kind.size)):
            generation = some[0].generation
            sampling = self._sampling_params(
                temperature=generation.get("temperature", 0.0),
                max_tokens=generation.get("max_tokens"),
                stop=generation.get("stop"),
            )
            results = self._llm.generate([each.prompt for each in some], sampling)
            for each, result in zip(some, results, strict=True):
                first = result.outputs[0]
                reason = "length" if first.finish_reason == "length" else "stop"
                yield Answered(each.key, first.text, reason, len(first.token_ids))
