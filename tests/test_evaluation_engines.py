"""What the engines hand to their back ends (golden), and letters read off packed prompts."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from asking_cases import write_run
from evaluation_cases import vllm_stub
from golden_cases import golden_dirs

from evaluation import engines
from evaluation.benchmarks import BENCHMARKS
from evaluation.command_line import model_options, read_command
from evaluation.engines import (
    ANSWERS,
    FIRST_TOKENS,
    Asked,
    Engine,
    SimpleEngine,
    StreamKind,
    generation_for,
)
from evaluation.vllm_engine import VLLMEngine
from inference.model_folder import ModelOptions
from inference.requests import Answer, Request

Call = Mapping[str, Any]
PLENTY = 10**6


class WordFormat:
    """Prompts of one id each; answers named by their number."""

    eoa_id = 0
    id_limit = None
    asked: list[tuple[str, str]]

    def __init__(self) -> None:
        self.asked = []

    def encode_prompts(self, conditions: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        self.asked += zip(conditions, texts, strict=True)
        return [[1] for _ in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return f"gen{ids[0]}"


@dataclass
class BackwardEngine:
    """The golden stub: answers from last to first, and never the second prompt."""

    model: Any
    max_context: int
    max_rows: int
    decode: str
    id_limit: int | None
    log: list[Any]

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        taken = list(requests)
        self.log.append((self.max_rows, taken))
        for index in reversed(range(len(taken))):
            if index != 1:
                yield Answer(index, (index,), "stop")


@pytest.fixture(scope="module")
def golden_calls(pytestconfig: pytest.Config) -> list[Call]:
    """The golden cases of both engines."""
    folders = golden_dirs(pytestconfig, "evaluation")
    read = [json.loads((folder / "case.json").read_text()) for folder in folders]
    cases = [case for each in read for case in each.get("cases", []) if "engine" in case]
    if not cases:
        pytest.skip("no case of engines")
    return cases


def answers_of(engine: Engine, call: Call, generation: Mapping[str, Any]) -> list[str]:
    """One answer a prompt; what the back end leaves out is empty."""
    prompts = engine.prepare(call["prompts"], generation)
    asked = [Asked(key, prompt, generation) for key, prompt in enumerate(prompts)]
    given = {each.key: each.text for each in engine.answer(asked, engine.kind_of(generation))}
    return [given.get(key, "") for key in range(len(prompts))]


def test_golden_simple_engine_hands_on_what_it_is_given(
    golden_calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[ModelOptions] = []
    words, log = WordFormat(), list[Any]()

    def open_stub(options: ModelOptions) -> Any:
        opened.append(options)
        return SimpleNamespace(model=None, prompt_format=words, max_context=PLENTY)

    monkeypatch.setattr(engines, "open_for_answers", open_stub)
    monkeypatch.setattr(
        engines, "InferenceEngine", lambda model, **given: BackwardEngine(model, **given, log=log)
    )
    for case in golden_calls:
        if case["engine"] != "SimpleEngine":
            continue
        if "reference_raises" in case:
            with pytest.raises(ValueError, match="is no setting of SimpleEngine"):
                model_options(case["ctor"])
            continue
        engine = SimpleEngine(model_options(case["ctor"]))
        (loaded,) = case["ctor_log"]
        path, epoch, use_ema = loaded["inference_load_checkpoint"]["args"]
        options = opened[-1]
        assert (str(options.ckpt_path), options.ckpt_epoch) == (path, epoch)
        # None is the same as true for a run that kept averaged weights, and no error for others
        assert options.ckpt_use_ema == (use_ema if "ckpt_use_ema" in case["ctor"] else None)
        for call in case["calls"]:
            words.asked.clear()
            check_simple_call(engine, call, words, log)


def check_simple_call(engine: SimpleEngine, call: Call, words: WordFormat, log: list[Any]) -> None:
    plain = BENCHMARKS["GSM8k"]()
    if "reference_raises" in call:
        with pytest.raises(ValueError, match="is no setting of SimpleEngine"):
            generation_for(engine.generation_keys, call["kwargs"], plain, "SimpleEngine")
        return
    generation, left_out = generation_for(
        engine.generation_keys, call["kwargs"], plain, "SimpleEngine"
    )
    assert not left_out
    assert answers_of(engine, call, generation) == call["returned"]
    (handed,) = call["backend_log"]
    handed = handed["inference_generate"]
    max_rows, requests = log[-1]
    assert [list(each) for each in words.asked] == [prompt for _, prompt in handed["prompts"]]
    assert max_rows == handed["batch_size"]
    assert {each.sampling.temperature for each in requests} == {handed["temperature"]}
    # a prompt and its answer share the context, so one token of it is taken by the prompt
    left = handed["max_context"] - 1
    assert {each.max_new_tokens for each in requests} == {min(handed["max_tokens"], left)}


def test_golden_vllm_engine_hands_on_what_it_is_given(
    golden_calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []
    monkeypatch.setitem(sys.modules, "vllm", vllm_stub(log))
    plain = BENCHMARKS["GSM8k"]()
    for case in golden_calls:
        if case["engine"] != "VLLMEngine":
            continue
        if "reference_raises" in case:
            words = [f"{key}={value}" for key, value in case["ctor"].items()]
            with pytest.raises(ValueError, match=r"ckpt_path=\.\.\. is required"):
                read_command(["config=vllm_benchmarking", *words])
            continue
        log.clear()
        given = dict(case["ctor"])
        engine = VLLMEngine(given.pop("ckpt_path"), given)
        assert log == case["ctor_log"]
        for call in case["calls"]:
            if "reference_raises" in call:
                with pytest.raises(ValueError, match="is no setting of VLLMEngine"):
                    generation_for(engine.generation_keys, call["kwargs"], plain, "VLLMEngine")
                continue
            log.clear()
            generation, _ = generation_for(
                engine.generation_keys, call["kwargs"], plain, "VLLMEngine"
            )
            assert answers_of(engine, call, generation) == call["returned"]
            assert log == call["backend_log"]


def test_a_setting_of_the_benchmark_itself_may_be_left_out() -> None:
    puzzles = BENCHMARKS["reasoning_gym"]()
    generation = {"condition": "direct", "temperature": 0.0, "max_tokens": None}
    given, left_out = generation_for(VLLMEngine.generation_keys, generation, puzzles, "VLLMEngine")
    assert (given, left_out) == ({"temperature": 0.0}, ["condition"])
    with pytest.raises(ValueError, match="condition=cot is no setting of VLLMEngine"):
        generation_for(VLLMEngine.generation_keys, {"condition": "cot"}, puzzles, "VLLMEngine")


def test_the_absence_of_vllm_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-eval\.txt"):
        VLLMEngine("gpt2", {})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleEngine:
    run = write_run(tmp_path_factory.mktemp("run"), seed=1)
    return SimpleEngine(ModelOptions(ckpt_path=run))


def test_letters_of_packed_prompts_are_those_of_one_prompt_at_a_time(tiny: SimpleEngine) -> None:
    generation = {"max_tokens": 1, "temperature": 0.0}
    texts = [f"{index} {'abcxyz'[index % 6] * (7 * index % 40)} {index}" for index in range(60)]
    prompts = tiny.prepare(texts, generation)
    asked = [Asked(key, prompt, generation) for key, prompt in enumerate(prompts)]

    def said(kind: StreamKind) -> dict[int, tuple[str, str, int]]:
        found = tiny.answer(asked, kind)
        return {each.key: (each.text, each.finish_reason, each.num_tokens) for each in found}

    assert tiny.kind_of(generation).unit == "tokens"
    packed = said(tiny.kind_of(generation))
    assert packed == said(StreamKind(ANSWERS, 1, "prompts"))
    assert packed == said(StreamKind(FIRST_TOKENS, 64, "tokens"))
    assert len({text for text, *_ in packed.values()}) > 2
    assert {reason for _, reason, _ in packed.values()} == {"stop", "length"}


def test_the_batch_size_bounds_the_tokens_of_a_packed_row(tiny: SimpleEngine) -> None:
    generation = {"max_tokens": 1, "batch_size": 2, "max_context": 50}
    assert tiny.kind_of(generation) == StreamKind(FIRST_TOKENS, 100, "tokens")
    assert tiny.kind_of({**generation, "max_context": 4096}).size == 2 * 64  # the model's own
    assert tiny.kind_of({**generation, "temperature": 0.5}) == StreamKind(ANSWERS, 2, "prompts")


def test_prompts_are_stripped_and_answers_end_where_the_context_does(tiny: SimpleEngine) -> None:
    generation = {"max_context": 20}
    padded, plain = tiny.prepare([" \n abc\t", "abc"], generation)
    assert padded == plain and isinstance(plain, array)
    answered = list(tiny.answer([Asked(5, plain, generation)], tiny.kind_of(generation)))
    assert [each.key for each in answered] == [5]
    assert 1 <= answered[0].num_tokens <= 20 - len(plain)
