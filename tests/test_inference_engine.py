"""The engine's answers are those of the uncached model, whatever else is decoded beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from net_cases import NETS, VOCAB_SIZE, build, golden_net, read_case
from safetensors.torch import load_file
from torch import Tensor

from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from inference import rows
from models.batch import PackedLayout
from models.language_model import LanguageModel
from simple_inference_engine import Answer, InferenceEngine

LOGITS_ATOL = 2e-5
NEVER = ()  # no stop token


@lru_cache
def shared_model() -> LanguageModel:
    torch.manual_seed(5)
    return build(NETS["hrm"], vocab_size=512)


@dataclass
class Calls:
    """How many tokens each call of the model got."""

    prefill: list[int] = field(default_factory=list)
    decode: list[int] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the model was called with in this test."""
    counted = Calls()
    prefill, decode = LanguageModel.prefill, LanguageModel.decode

    def counting_prefill(self: LanguageModel, tokens: Tensor, *where: Any) -> Tensor:
        counted.prefill.append(len(tokens))
        return prefill(self, tokens, *where)

    def counting_decode(self: LanguageModel, tokens: Tensor, *where: Any) -> Tensor:
        counted.decode.append(len(tokens))
        return decode(self, tokens, *where)

    monkeypatch.setattr(LanguageModel, "prefill", counting_prefill)
    monkeypatch.setattr(LanguageModel, "decode", counting_decode)
    return counted


def random_prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(VOCAB_SIZE, (length,)).tolist() for length in lengths]


def answers_of(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int] = NEVER,
    max_new_tokens: int = 8,
) -> list[Answer]:
    """All answers, in the order of the prompts."""
    answers = engine.generate_ids(prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    in_order = sorted(answers, key=lambda answer: answer.index)
    assert [answer.index for answer in in_order] == list(range(len(prompts)))
    return in_order


@torch.no_grad()
def uncached_greedy(model: LanguageModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """One token after the other by whole forward passes."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        layout = PackedLayout.from_lengths(
            torch.tensor([len(prompt)]), torch.tensor([len(tokens) - len(prompt)]), num_slots=1
        )
        hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), layout)
        tokens.append(int(model.logits(hidden[-1]).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("eos", ["eos_id", None])
def test_golden_greedy_tokens(golden_inference: Path, eos: str | None) -> None:
    case = read_case(golden_inference)
    model = golden_net(golden_inference.parents[1] / "nets" / case["net_case"])
    expected = case["outputs" if eos else "outputs_without_eos"]
    for max_rows in (1, case["batch_size"], 64):
        answers = answers_of(
            InferenceEngine(model, max_context=case["max_tokens"], max_rows=max_rows),
            case["prompts"],
            stop_ids=[case[eos]] if eos else NEVER,
            max_new_tokens=case["max_generation"],
        )
        for answer, output in zip(answers, expected, strict=True):
            if output is None:
                assert (answer.token_ids, answer.finish_reason) == ((), "prompt_too_long")
                continue
            assert list(answer.token_ids) == output["tokens_stripped"]
            was_stopped = len(output["tokens_raw"]) > len(output["tokens_stripped"])
            assert answer.finish_reason == ("stop" if was_stopped else "length")


def test_golden_step_logits(golden_inference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = read_case(golden_inference)
    model = golden_net(golden_inference.parents[1] / "nets" / case["net_case"])
    engine = InferenceEngine(model, max_context=case["max_tokens"], max_rows=1)
    golden = load_file(golden_inference / "logits.safetensors")
    steps: list[Tensor] = []

    def remember(logits: Tensor, *_: object, **__: object) -> Tensor:
        steps.extend(logits)
        return logits.argmax(-1)

    monkeypatch.setattr(rows, "next_tokens", remember)
    num_compared = 0
    for index, prompt in enumerate(case["prompts"]):
        steps.clear()
        answers_of(engine, [prompt], max_new_tokens=case["max_generation"])
        for step, logits in enumerate(steps):
            expected = golden.get(f"prompt{index}.step{step}.logits")
            if expected is not None:
                torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)
                num_compared += 1
    assert num_compared == len(golden)


@pytest.mark.parametrize("net", NETS)
def test_greedy_tokens_are_those_of_the_uncached_model(net: str) -> None:
    model = build(NETS[net])
    prompts = random_prompts(5, 1, 12, 3)
    answers = answers_of(InferenceEngine(model, max_context=64, max_rows=3), prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == uncached_greedy(model, prompt, num_tokens=8)


def test_an_answer_is_the_same_alone_and_in_any_batch() -> None:
    prompts = random_prompts(3, 40, 1, 17, 8, 2, 25, 5, 11, 30, 4, 9, 6)
    stop_ids = range(0, 512, 8)  # answers of many lengths
    settings = {"stop_ids": stop_ids, "max_new_tokens": 20}
    alone = [
        answers_of(InferenceEngine(shared_model(), max_context=50), [prompt], **settings)[0]
        for prompt in prompts
    ]
    assert len({len(answer.token_ids) for answer in alone}) > 3
    assert {answer.finish_reason for answer in alone} == {"stop", "length"}
    for max_rows in (1, 2, 3, 5, 8, 64):
        engine = InferenceEngine(shared_model(), max_context=50, max_rows=max_rows)
        together = answers_of(engine, prompts, **settings)
        for answer, expected in zip(together, alone, strict=True):
            assert answer.token_ids == expected.token_ids
            assert answer.finish_reason == expected.finish_reason


def test_prompts_are_prefilled_in_rows_of_bounded_length(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rows.PREFILL_TOKENS, "cpu", 10)
    monkeypatch.setattr(rows, "FIRST_CACHE_LENGTH", 1)
    prompts = random_prompts(4, 4, 4, 4, 15, 1, 2)
    answers = answers_of(InferenceEngine(shared_model(), max_context=64), prompts)
    assert calls.prefill == [12, 19, 3]
    expected = [uncached_greedy(shared_model(), prompt, 8) for prompt in prompts]
    assert [list(answer.token_ids) for answer in answers] == expected


def test_finished_answers_take_no_part_in_decoding(calls: Calls) -> None:
    prompts = random_prompts(*[32, 16] * 4)  # 16 and 32 tokens of context are left
    answers_of(InferenceEngine(shared_model(), max_context=48), prompts, max_new_tokens=99)
    assert calls.decode == [8] * 15 + [4] * 16


def test_free_rows_are_taken_by_the_next_prompts(calls: Calls) -> None:
    engine = InferenceEngine(shared_model(), max_context=64, max_rows=4)
    long, short = random_prompts(43, 60)  # 21 and 4 tokens of context are left
    answers_of(engine, [long] + [short] * 9, max_new_tokens=99)
    # three short answers beside the long one, three times
    assert calls.prefill == [43 + 3 * 60, 3 * 60, 3 * 60]
    assert calls.decode == [4] * 9 + [1] * 11


def test_a_few_free_rows_wait_for_more_before_they_are_filled(calls: Calls) -> None:
    engine = InferenceEngine(shared_model(), max_context=64, max_rows=16)
    short, long, next_one = random_prompts(60, 54, 54)  # 4 and 10 tokens of context are left
    answers_of(engine, [short] + [long] * 15 + [next_one], max_new_tokens=99)
    assert calls.decode == [16] * 3 + [15] * 6 + [1] * 9


def test_a_stop_token_that_comes_first_ends_the_answer_at_once() -> None:
    (prompt,) = random_prompts(5)
    engine = InferenceEngine(shared_model(), max_context=64)
    first, second = uncached_greedy(shared_model(), prompt, 2)
    (answer,) = answers_of(engine, [prompt], stop_ids=[first])
    assert answer == Answer(0, (), "stop")
    (answer,) = answers_of(engine, [prompt], stop_ids=[second])
    assert answer == Answer(0, (first,) if first != second else (), "stop")


def test_the_budget_ends_with_the_context() -> None:
    engine = InferenceEngine(shared_model(), max_context=12)
    answers = answers_of(engine, random_prompts(3, 10, 11, 12, 30), max_new_tokens=5)
    assert [len(answer.token_ids) for answer in answers] == [5, 2, 1, 0, 0]
    reasons = [answer.finish_reason for answer in answers]
    assert reasons == ["length"] * 3 + ["prompt_too_long"] * 2


def test_prompts_that_are_all_too_long_are_all_reported() -> None:
    engine = InferenceEngine(shared_model(), max_context=4, max_rows=2)
    answers = answers_of(engine, random_prompts(*[5] * 7))
    assert {answer.finish_reason for answer in answers} == {"prompt_too_long"}
    assert answers_of(engine, []) == []


def test_answers_stream_out_before_all_prompts_are_read() -> None:
    num_read = 0

    def endless() -> Iterator[list[int]]:
        nonlocal num_read
        while True:
            num_read += 1
            yield [num_read % VOCAB_SIZE]

    engine = InferenceEngine(shared_model(), max_context=64, max_rows=4)
    answers = engine.generate_ids(endless(), stop_ids=NEVER, max_new_tokens=3)
    assert sorted(next(answers).index for _ in range(8)) == list(range(8))
    assert num_read == 8


def test_text_goes_in_and_comes_out() -> None:
    prompt_format = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, CONDITION_TOKENS)
    engine = InferenceEngine(shared_model(), max_context=30)
    asked = [("direct", "rev neon"), ("synth,cot", EOA), ("direct", "x" * 40)]
    answers = sorted(
        engine.generate(asked, prompt_format, max_new_tokens=6), key=lambda answer: answer.index
    )
    prompts = [prompt_format.encode_prompt(*pair) for pair in asked]
    by_ids = answers_of(engine, prompts, stop_ids=[prompt_format.eoa_id], max_new_tokens=6)
    for answer, expected in zip(answers, by_ids, strict=True):
        assert answer.text == prompt_format.decode(expected.token_ids)
        assert answer.finish_reason == expected.finish_reason
    assert answers[2].finish_reason == "prompt_too_long"
    with pytest.raises(ValueError, match="unknown names"):
        list(engine.generate([("direkt", "x")], prompt_format, max_new_tokens=6))


def test_it_runs_in_bf16() -> None:
    model = build(NETS["hrm"]).bfloat16()
    (answer,) = answers_of(InferenceEngine(model, max_context=64), random_prompts(9))
    assert len(answer.token_ids) == 8


@pytest.mark.parametrize("prompt", [[], [1, 512], [3, -1]])
def test_a_prompt_that_is_none_is_refused_by_its_number(prompt: list[int]) -> None:
    engine = InferenceEngine(shared_model(), max_context=64)
    with pytest.raises(ValueError, match="prompt 1 must be one or more token ids from 0 to 511"):
        answers_of(engine, [[1], prompt])


@pytest.mark.parametrize("prompts", ["rev neon", ["rev neon"], [("direct", "rev", "neon")]])
def test_prompts_are_pairs_of_condition_and_text(prompts: Any) -> None:
    prompt_format = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, CONDITION_TOKENS)
    engine = InferenceEngine(shared_model(), max_context=32)
    with pytest.raises(ValueError, match="each is a pair of condition and text"):
        list(engine.generate(prompts, prompt_format))


def test_limits_that_leave_nothing_to_do_are_refused() -> None:
    with pytest.raises(ValueError, match="use 2 or more"):
        InferenceEngine(shared_model(), max_context=1)
    with pytest.raises(ValueError, match="use 1 or more"):
        InferenceEngine(shared_model(), max_context=9, max_rows=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        answers_of(InferenceEngine(shared_model(), max_context=9), [[1]], max_new_tokens=0)
