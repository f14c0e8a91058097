"""Scores are those of the whole forward pass, whatever else is in the row, and come in order."""

from __future__ import annotations

from collections.abc import Iterator
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
from inference import scoring
from inference.requests import Span
from inference.scoring import score_continuations, score_options, score_spans
from models.batch import PackedLayout
from models.language_model import LanguageModel
from simple_inference_engine import InferenceEngine, LoadedModel

ATOL = 1e-5
Pair = tuple[list[int], list[int]]


@lru_cache
def shared_model() -> LanguageModel:
    torch.manual_seed(3)
    return build(NETS["hrm"], vocab_size=512)


def random_ids(length: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,)).tolist()


def random_pairs(*lengths: tuple[int, int]) -> list[Pair]:
    return [(random_ids(prompt), random_ids(continuation)) for prompt, continuation in lengths]


@torch.no_grad()
def own_logprobs(model: LanguageModel, prompt: list[int], continuation: list[int]) -> Tensor:
    """Of all tokens after the prompt and after each of the continuation, by itself, [A + 1, V]."""
    layout = PackedLayout.from_lengths(
        torch.tensor([len(prompt)]), torch.tensor([len(continuation)]), num_slots=1
    )
    tokens = torch.tensor([*prompt, *continuation])
    hidden = model(tokens, torch.arange(len(tokens)), layout)
    return model.logits(hidden)[len(prompt) - 1 :].log_softmax(-1)


@torch.no_grad()
def prefilled_logprobs(model: LanguageModel, prompt: list[int]) -> Tensor:
    """Of all tokens after a prompt that is prefilled by itself, [V]."""
    layout = PackedLayout.from_lengths(torch.tensor([len(prompt)]), torch.tensor([0]), 1)
    hidden = model.prefill(
        torch.tensor(prompt),
        torch.arange(len(prompt)),
        layout,
        model.new_cache(1, len(prompt)),
        torch.tensor([0]),
    )
    return model.logits(hidden[-1]).log_softmax(-1)


def small_rows(monkeypatch: pytest.MonkeyPatch, row_tokens: int, window_rows: int) -> None:
    monkeypatch.setattr(scoring, "ROW_TOKENS", {"cpu": row_tokens})
    monkeypatch.setattr(scoring, "WINDOW_ROWS", window_rows)


@pytest.mark.parametrize("net", NETS)
def test_continuations_score_as_in_the_whole_forward_pass(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rows(monkeypatch, row_tokens=40, window_rows=2)
    model = build(NETS[net])
    pairs = random_pairs((5, 3), (1, 1), (30, 12), (2, 8), (9, 1), (17, 4))
    scores = list(score_continuations(model, pairs, max_context=64))
    assert [score.index for score in scores] == list(range(6))
    for score, (prompt, continuation) in zip(scores, pairs, strict=True):
        rows = torch.arange(len(continuation))
        expected = own_logprobs(model, prompt, continuation)[rows, torch.tensor(continuation)]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=ATOL, rtol=0)
        assert score.total == pytest.approx(float(expected.sum()), abs=len(rows) * ATOL)
        assert not score.is_too_long


@pytest.mark.parametrize("net", NETS)
def test_spans_may_begin_long_after_the_prefix(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rows(monkeypatch, row_tokens=40, window_rows=2)
    model = build(NETS[net])
    lengths = [(1, 4, 3), (1, 20, 1), (5, 5, 2), (3, 12, 9)]  # prefix, start, tokens of the span
    spans = [Span(random_ids(start + n), prefix, start) for prefix, start, n in lengths]
    for score, span in zip(score_spans(model, spans, max_context=64), spans, strict=True):
        prefix, ids = span.num_prefix_tokens, [*span.token_ids]
        alone = own_logprobs(model, ids[:prefix], ids[prefix:])[span.start - prefix :]
        expected = alone[torch.arange(len(ids) - span.start), torch.tensor(ids[span.start :])]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=ATOL, rtol=0)
    with pytest.raises(ValueError, match="span 0 begins at 2 of 4 tokens after a prefix of 3"):
        list(score_spans(model, [Span([1, 2, 3, 4], 3, 2)], max_context=64))


@pytest.mark.parametrize("net", NETS)
def test_options_score_as_one_by_one(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_rows(monkeypatch, row_tokens=40, window_rows=2)
    model = build(NETS[net])
    prompts = [random_ids(length) for length in (3, 30, 1, 9, 16, 4, 45)]
    options = [[11, 200, 3, 77], [5], [1, 2]] * 3
    questions = list(zip(prompts, options, strict=False))
    scores = list(score_options(model, questions, max_context=64))
    assert [score.index for score in scores] == list(range(7))
    for score, (prompt, ids) in zip(scores, questions, strict=True):
        alone = prefilled_logprobs(model, prompt)
        torch.testing.assert_close(torch.tensor(score.logprobs), alone[ids], atol=ATOL, rtol=0)
        assert score.logprobs.index(max(score.logprobs)) == int(alone[ids].argmax())
        assert score.likeliest_id == int(alone.argmax())


def test_letters_are_those_of_one_by_one_prefill() -> None:
    questions = [(random_ids(4 + 7 * i % 61), [65, 66, 67, 68]) for i in range(200)]
    scores = score_options(shared_model(), questions, max_context=128)
    for score, (prompt, letters) in zip(scores, questions, strict=True):
        alone = prefilled_logprobs(shared_model(), prompt)[letters]
        assert score.logprobs.index(max(score.logprobs)) == int(alone.argmax())


def test_golden_logits(golden_inference: Path) -> None:
    case = read_case(golden_inference)
    model = golden_net(golden_inference.parents[1] / "nets" / case["net_case"])
    golden = load_file(golden_inference / "logits.safetensors")
    every_id = range(len(model.lm_head.weight))
    kept = [
        index for index in range(len(case["prompts"])) if f"prompt{index}.step0.logits" in golden
    ]
    questions = [(case["prompts"][index], every_id) for index in kept]
    assert kept
    for index, score in zip(
        kept, score_options(model, questions, max_context=case["max_tokens"]), strict=True
    ):
        expected = golden[f"prompt{index}.step0.logits"].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=2e-5, rtol=0)
        assert score.likeliest_id == int(expected.argmax())


def test_greedy_answers_are_greedy() -> None:
    model, prompt = shared_model(), random_ids(6)
    (answer,) = InferenceEngine(model, max_context=32).generate_ids(
        [prompt], stop_ids=(), max_new_tokens=5
    )
    other = [*answer.token_ids[:4], (answer.token_ids[4] + 1) % 512]
    pairs = [(prompt, list(answer.token_ids)), (prompt, other)]
    assert [score.is_greedy for score in score_continuations(model, pairs, max_context=32)] == [
        True,
        False,
    ]


def test_one_prompt_may_have_several_continuations() -> None:
    prompt = random_ids(12)
    pairs = [(prompt, random_ids(length)) for length in (1, 5, 3, 3)]
    together = list(score_continuations(shared_model(), pairs, max_context=32))
    for index, pair in enumerate(pairs):
        (alone,) = score_continuations(shared_model(), [pair], max_context=32)
        assert together[index].logprobs == pytest.approx(alone.logprobs, abs=ATOL)


def test_what_does_not_fit_is_reported_in_its_place() -> None:
    pairs = random_pairs((5, 3), (6, 3), (2, 2), (40, 1))
    scores = list(score_continuations(shared_model(), pairs, max_context=8))
    assert [score.is_too_long for score in scores] == [False, True, False, True]
    assert [len(score.logprobs) for score in scores] == [3, 0, 2, 0]
    questions = [(random_ids(length), [1, 2]) for length in (7, 8, 3)]
    options = list(score_options(shared_model(), questions, max_context=8))
    assert [score.is_too_long for score in options] == [False, True, False]
    assert (options[1].logprobs, options[1].likeliest_id) == ((), None)
    assert list(score_options(shared_model(), questions[1:2], max_context=8)) == [
        scoring.OptionScores(0, (), None, is_too_long=True)
    ]


def test_prompts_are_read_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    small_rows(monkeypatch, row_tokens=20, window_rows=2)
    num_read = 0

    def endless() -> Iterator[Pair]:
        nonlocal num_read
        while True:
            num_read += 1
            yield random_ids(9), random_ids(2)  # 10 tokens of a row

    scores = score_continuations(shared_model(), endless(), max_context=32)
    assert num_read == 0
    assert [next(scores).index for _ in range(4)] == [0, 1, 2, 3]
    assert num_read == 4
    next(scores)
    assert num_read == 8


def test_rows_are_filled_up_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    small_rows(monkeypatch, row_tokens=20, window_rows=3)
    rows: list[int] = []
    forward = LanguageModel.forward

    def counting(self: LanguageModel, tokens: Tensor, *where: Any) -> Tensor:
        rows.append(len(tokens))
        return forward(self, tokens, *where)

    monkeypatch.setattr(LanguageModel, "forward", counting)
    lengths = (25, 10, 9, 11, 4, 6)
    questions = [(random_ids(length), [1]) for length in lengths]
    assert len(list(score_options(shared_model(), questions, max_context=64))) == 6
    assert rows == [4 + 6 + 9, 10, 11, 25]  # by length; the long one by itself


def test_the_head_sees_what_is_asked_alone_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs((20, 3), (9, 4))
    expected = list(score_continuations(shared_model(), pairs, max_context=64))
    seen: list[int] = []
    logits = LanguageModel.logits

    def counting(self: LanguageModel, hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(LanguageModel, "logits", counting)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 2 * 512)
    found = list(score_continuations(shared_model(), pairs, max_context=64))
    assert seen == [2, 2, 2, 1]
    for score, other in zip(found, expected, strict=True):
        assert score.logprobs == pytest.approx(other.logprobs, abs=ATOL)


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (([], [1]), r"prompt 1 must be one or more token ids from 0 to 511, but is \[\]"),
        (([1, 512], [1]), "prompt 1 must be"),
        (([1], []), "continuation 1 must be one or more"),
        (([1], [3, -1]), "continuation 1 must be"),
    ],
)
def test_what_is_none_is_refused_by_its_number(pair: Pair, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        list(score_continuations(shared_model(), [([1], [2]), pair], max_context=9))
    with pytest.raises(ValueError, match=told.replace("continuation", "options")):
        list(score_options(shared_model(), [([1], [2]), pair], max_context=9))


def test_nothing_scores_to_nothing() -> None:
    assert list(score_continuations(shared_model(), [], max_context=9)) == []


def texts() -> LoadedModel:
    prompt_format = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, CONDITION_TOKENS)
    return LoadedModel(InferenceEngine(shared_model(), max_context=64), prompt_format, "")


def test_texts_score_as_their_ids() -> None:
    loaded, encode = texts(), texts().prompt_format
    prompt = encode.encode_prompt("synth,cot", "rev neon")
    for ends in (False, True):
        ids = encode.encode_response("noen")[: 5 if ends else 4]
        (found,) = loaded.score([("synth,cot", "rev neon", "noen")], ends=ends)
        (expected,) = loaded.engine.score_ids([(prompt, ids)])
        assert found == expected
        assert len(found.logprobs) == 4 + ends
    (found,) = loaded.score_options([("direct", "A or B?", ["A", "B"])])
    ids = [encode.encode_response(letter)[0] for letter in "AB"]
    question = (encode.encode_prompt("direct", "A or B?"), ids)
    assert [found] == list(loaded.engine.score_options_ids([question]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["A", "BC"], "the option 'BC' is 2 tokens, and options are compared by one"),
        (["A", ""], "the option '' is 0 tokens"),
        (["A", "A"], r"the options \['A', 'A'\] are not all different"),
    ],
)
def test_options_that_are_not_one_token_are_refused(options: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        list(texts().score_options([("direct", "which?", options)]))


def test_the_states_behind_an_answer() -> None:
    loaded = texts()
    own, given = (
        loaded.inspect("direct", "x", max_new_tokens=3),
        loaded.inspect("direct", "x", "ab"),
    )
    encode = loaded.prompt_format
    assert given.answer_ids == tuple(encode.encode_response("ab")[:-1])
    (answer,) = loaded.engine.generate_ids(
        [encode.encode_prompt("direct", "x")], stop_ids=[encode.eoa_id], max_new_tokens=3
    )
    assert own.answer_ids == answer.token_ids
