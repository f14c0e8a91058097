"""An engine made up for tests of evaluations, and what they leave on record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from evaluation.engines import Answered, Asked, Engine, Generation, Prompt, StreamKind

TIMES = ("started_at", "seconds")  # what differs between two runs of the same evaluation


@dataclass
class FakeEngine:
    """Answers a text by its length; `before` sees each prompt before it is answered."""

    before: Callable[[Asked, StreamKind], None] = lambda asked, kind: None
    size: int = 8
    context: int | None = None
    taken: list[Prompt] = field(default_factory=list)
    kinds: list[StreamKind] = field(default_factory=list)
    description: str = "a fake"
    identity: dict[str, Any] = field(default_factory=lambda: {"checkpoint": "one", "step": 1})

    @staticmethod
    def stream_of(generation: Generation) -> str:
        return str(generation.get("batch_size"))

    def kind_of(self, generation: Generation) -> StreamKind:
        return StreamKind("answers", generation.get("batch_size") or self.size, "prompts")

    def prepare(self, texts: Sequence[str], generation: Generation) -> Sequence[Prompt]:
        return list(texts)

    def context_of(self, generation: Generation) -> int | None:
        return self.context

    def num_tokens(self, prompt: Prompt) -> int:
        return len(prompt)

    def answer(self, asked: Iterable[Asked], kind: StreamKind) -> Iterator[Answered]:
        """Takes as many prompts as the size says, and answers them from last to first."""
        self.kinds.append(kind)
        waiting = iter(asked)
        while True:
            some = [each for _, each in zip(range(kind.size), waiting, strict=False)]
            if not some:
                return
            for each in reversed(some):
                self.before(each, kind)
                self.taken.append(each.prompt)
                yield Answered(each.key, str(len(each.prompt) % 3), "stop", 1)


def at_hand(engine: Engine) -> Future[Engine]:
    opened: Future[Engine] = Future()
    opened.set_result(engine)
    return opened


def recorded(folder: Path) -> dict[str, Any]:
    """results.json without names and times."""
    results = json.loads((folder / "results.json").read_text())
    for each in (results, *results["benchmarks"].values()):
        for key in TIMES:
            each.pop(key, None)
    results.pop("name")
    return results


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def vllm_stub(log: list[Any]) -> ModuleType:
    """The golden stub: two outputs a prompt, of which the first one counts."""
    module: Any = ModuleType("vllm")

    class LLM:
        def __init__(self, **given: Any) -> None:
            log.append({"LLM": given})
            context = SimpleNamespace(max_model_len=given.get("max_model_len"))
            self.llm_engine = SimpleNamespace(model_config=context)

        def get_tokenizer(self) -> Any:
            return SimpleNamespace(encode=list)  # a token per character

        def generate(self, prompts: Sequence[str], sampling: Mapping[str, Any]) -> list[Any]:
            log.append({"generate": {"prompts": prompts, "sampling_params": sampling}})
            return [
                SimpleNamespace(
                    outputs=[
                        SimpleNamespace(text=text, finish_reason="stop", token_ids=[1])
                        for text in (f"out{index}", "another")
                    ]
                )
                for index in range(len(prompts))
            ]

    module.LLM, module.SamplingParams = LLM, dict
    return module
