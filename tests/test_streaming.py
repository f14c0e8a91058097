"""Requests answered token by token: what is reported, what ends an answer, and giving up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeGuard

import pytest
import torch
from net_cases import NETS, build
from torch import Tensor

from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from inference.stop_texts import StopTexts
from models.batch import PackedLayout
from models.language_model import LanguageModel
from simple_inference_engine import Answer, InferenceEngine, Request, Sampling, Token

PROMPT_FORMAT = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, CONDITION_TOKENS)


@lru_cache
def shared_model() -> LanguageModel:
    torch.manual_seed(5)
    return build(NETS["hrm"], vocab_size=512)


def engine(max_rows: int = 64) -> InferenceEngine:
    return InferenceEngine(shared_model(), max_context=64, max_rows=max_rows)


def is_token(event: Token | Answer) -> TypeGuard[Token]:
    return isinstance(event, Token)


def greedy(prompt: Sequence[int], num_tokens: int) -> tuple[int, ...]:
    (answer,) = engine().answer([Request(prompt, max_new_tokens=num_tokens)])
    return answer.token_ids


def test_every_token_comes_before_its_answer() -> None:
    requests = [Request([7, 8, 9 + number], max_new_tokens=3 + number) for number in range(4)]
    events = list(engine(max_rows=2).stream(requests))
    for index, request in enumerate(requests):
        own = [event for event in events if event.index == index]
        *tokens, answer = own
        assert isinstance(answer, Answer)
        assert tuple(token.token_id for token in tokens if is_token(token)) == answer.token_ids
        assert len(tokens) == len(answer.token_ids)
        assert answer.token_ids == greedy(request.prompt_ids, 3 + index)
    first_done = next(place for place, event in enumerate(events) if isinstance(event, Answer))
    assert {event.index for event in events[:first_done]} == {0, 1}  # they alternate


def test_a_stop_token_is_not_reported() -> None:
    first, second, third = greedy([4, 4, 2], 3)
    assert third not in (first, second)
    events = list(engine().stream([Request([4, 4, 2], stop_ids=frozenset([third]))]))
    assert [event.token_id for event in events[:-1] if is_token(event)] == [first, second]
    assert events[-1] == Answer(0, (first, second), "stop")


def test_an_answer_that_is_complete_ends_with_that_token() -> None:
    seen: list[list[int]] = []

    def is_complete(token_ids: Sequence[int]) -> bool:
        seen.append(list(token_ids))
        return len(token_ids) == 3

    tokens = greedy([1, 2], 5)
    (answer,) = engine().answer([Request([1, 2], max_new_tokens=5, is_complete=is_complete)])
    assert answer == Answer(0, tokens[:3], "stop")
    assert seen == [list(tokens[:length]) for length in (1, 2, 3)]


def test_probabilities_are_the_models_own_whatever_is_sampled() -> None:
    prompt = [5, 6, 7, 8]
    asked = [
        Request(prompt, max_new_tokens=3, top_tokens=4, sampling=Sampling(3.0, top_k=50, seed=1)),
        Request(prompt, max_new_tokens=3),
        Request(prompt, max_new_tokens=3, top_tokens=1),
    ]
    events = list(engine().stream(asked))
    tokens = {
        index: [e for e in events if isinstance(e, Token) and e.index == index]
        for index in range(3)
    }
    sampled = [token.token_id for token in tokens[0]]
    layout = PackedLayout.from_lengths(torch.tensor([4]), torch.tensor([2]), num_slots=1)
    with torch.no_grad():
        hidden = shared_model()(torch.tensor(prompt + sampled[:2]), torch.arange(6), layout)
        exact = shared_model().logits(hidden[3:]).softmax(-1)  # [3, V]
    for step, token in enumerate(tokens[0]):
        assert token.probability == pytest.approx(float(exact[step, token.token_id]), abs=1e-5)
        values, ids = exact[step].topk(4)
        assert [likely for likely, _ in token.likely] == ids.tolist()
        assert [p for _, p in token.likely] == pytest.approx(values.tolist(), abs=1e-5)
    assert all(token.probability is None and token.likely == () for token in tokens[1])
    for token in tokens[2]:
        assert token.likely == ((token.token_id, token.probability),)


def test_requests_are_taken_when_there_is_a_row() -> None:
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        while True:
            taken += 1
            yield Request([taken % 250 + 1], max_new_tokens=2)

    events = engine(max_rows=3).stream(endless())
    for _ in range(3):
        next(events)
    assert taken == 3
    events.close()  # type: ignore[attr-defined]


def test_a_stream_given_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def remember(function: Callable[[Tensor], Tensor], **_: object) -> Callable[[Tensor], Tensor]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", remember)
    kept = InferenceEngine(shared_model(), max_context=64, max_rows=2, decode="compiled")
    requests = [Request([3, 1], max_new_tokens=6), Request([9], max_new_tokens=4)]
    expected = [event for event in kept.stream(requests) if isinstance(event, Answer)]
    given_up = kept.stream(requests)
    next(given_up)
    beside = [event for event in kept.stream(requests) if isinstance(event, Answer)]  # at once
    given_up.close()  # type: ignore[attr-defined]
    assert beside == expected
    assert [event for event in kept.stream(requests) if isinstance(event, Answer)] == expected
    assert len(compiled) == 2  # for two streams at once, and never again


def test_a_request_that_fails_says_which_and_ends_the_stream() -> None:
    for request, complaint in (
        (Request([]), "prompt 1 must be one or more token ids"),
        (Request([1], max_new_tokens=0), "max_new_tokens=0 must be a whole number"),
        (Request([1], top_tokens=-1), "top_tokens=-1 must be 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            list(engine().stream([Request([1], max_new_tokens=1), request]))


def test_answers_end_before_the_first_stop_text() -> None:
    asked = [("direct", text) for text in ("rev neon", "sum 1 2", "x")]
    settings = {"max_new_tokens": 24, "sampling": Sampling(1.0, top_k=60, seed=4)}
    whole = {a.index: a for a in engine(max_rows=2).generate(asked, PROMPT_FORMAT, **settings)}
    stops = [whole[0].text[5:7], whole[1].text[3:4]]
    assert all(stops)
    cut = engine(max_rows=2).generate(asked, PROMPT_FORMAT, stop_texts=stops, **settings)
    for answer in cut:
        text = whole[answer.index].text
        expected = min((text.split(stop)[0] for stop in stops), key=len)
        assert answer.text == expected
        assert (answer.finish_reason == "stop") == (expected != text)
    with pytest.raises(ValueError, match="an empty stop text"):
        list(engine().generate(asked, PROMPT_FORMAT, stop_texts=["", "x"]))


def test_a_stop_text_is_found_across_tokens_and_within_characters() -> None:
    ids = PROMPT_FORMAT.encode_response("before — after")[:-1]
    stops = StopTexts(["— a"], PROMPT_FORMAT.decode)
    found = [length for length in range(1, len(ids) + 1) if stops.are_in(ids[:length])]
    complete = len(PROMPT_FORMAT.encode_response("before — a")) - 1
    assert found[0] == complete
    assert stops.cut("before — after — a") == "before "
    assert stops.cut("nothing") == "nothing"


def test_a_queue_that_has_nothing_yet_keeps_nobody_waiting() -> None:
    asked: list[Request | None] = [Request([1], max_new_tokens=3)]
    finished: list[int] = []

    def queue() -> Iterator[Request | None]:
        yield from asked
        while not finished:  # the next request depends on the first answer
            yield None
        yield Request([2], max_new_tokens=3)

    for event in engine().stream(queue()):
        if isinstance(event, Answer):
            finished.append(event.index)
    assert finished == [0, 1]


def test_the_stop_token_is_told_where_likely_tokens_are_asked_for() -> None:
    first, second = greedy([5], 2)
    request = Request([5], stop_ids=frozenset({second}), top_tokens=2)
    *_, answer = engine().stream([request])
    assert isinstance(answer, Answer) and answer.stopped_by is not None
    assert answer.token_ids == (first,) and answer.stopped_by.token_id == second
    assert answer.stopped_by.likely[0] == (second, answer.stopped_by.probability)


def test_a_plain_text_is_no_list_of_stop_texts() -> None:
    with pytest.raises(ValueError, match="must be a list of texts"):
        list(engine().generate([("direct", "x")], PROMPT_FORMAT, stop_texts="ab"))
