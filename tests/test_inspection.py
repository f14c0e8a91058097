"""What is kept of a prompt is what the net computes: every state, and the head's view of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from net_cases import NETS, VOCAB_SIZE, build

from inference.inspection import answer_probabilities, inspect_prompt, likeliest
from models.batch import PackedLayout
from models.language_model import LanguageModel

PROMPT, ANSWER = [7, 3, 200, 41, 5], [9, 77, 4]


@torch.no_grad()
def own_logits(model: LanguageModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The model's logits after the prompt and each token of the answer, [A + 1, V]."""
    layout = PackedLayout.from_lengths(
        torch.tensor([len(prompt)]), torch.tensor([len(answer)]), num_slots=1
    )
    tokens = torch.tensor([*prompt, *answer])
    hidden = model(tokens, torch.arange(len(tokens)), layout)
    return model.logits(hidden)[len(prompt) - 1 :]


@pytest.mark.parametrize("net", NETS)
def test_the_last_state_is_what_the_model_says(net: str) -> None:
    model = build(NETS[net])
    inspection = inspect_prompt(model, PROMPT, ANSWER, max_context=16)
    assert (inspection.token_ids, inspection.answer_ids) == ((*PROMPT, *ANSWER), tuple(ANSWER))
    *earlier, last = inspection.states
    expected = own_logits(model, PROMPT, ANSWER)
    torch.testing.assert_close(last.logits, expected, atol=1e-6, rtol=0)
    assert all(not torch.allclose(state.logits, expected, atol=1e-3) for state in earlier)
    for state in inspection.states:
        assert state.hidden.shape == (8, 32) and state.logits.shape == (4, VOCAB_SIZE)
        with torch.no_grad():
            of_hidden = model.logits(state.hidden)[4:]
        torch.testing.assert_close(state.logits, of_hidden, atol=1e-6, rtol=0)


@pytest.mark.parametrize("net", NETS)
def test_every_application_is_there_by_name(net: str) -> None:
    applications = list(NETS[net].applications())
    inspection = inspect_prompt(build(NETS[net]), PROMPT, max_context=16)
    seen: Counter[str] = Counter()
    for index, (state, made) in enumerate(zip(inspection.states, applications, strict=True)):
        seen[made.writes] += 1
        assert (state.application, state.stack, state.name) == (index, made.stack, made.writes)
        assert state.write == seen[made.writes]
        assert state.label == f"{made.writes}_{seen[made.writes]}"


def test_states_are_kept_as_they_were_though_the_net_goes_on() -> None:
    model = build(NETS["ut"])
    states = inspect_prompt(model, PROMPT, max_context=16).states
    assert len({state.hidden.data_ptr() for state in states}) == len(states)
    assert not torch.allclose(states[0].hidden, states[1].hidden)


def test_probabilities_of_the_answer_come_from_each_states_logits() -> None:
    inspection = inspect_prompt(build(NETS["hrm"]), PROMPT, ANSWER, max_context=16)
    probabilities = answer_probabilities(inspection)
    assert probabilities.shape == (8, 3)
    for state, row in zip(inspection.states, probabilities, strict=True):
        for token, logits, probability in zip(ANSWER, state.logits, row, strict=False):
            assert float(probability) == pytest.approx(float(logits.softmax(-1)[token]), abs=1e-7)
    alone = inspect_prompt(build(NETS["hrm"]), PROMPT, max_context=16)
    assert answer_probabilities(alone).shape == (8, 0)


def test_the_likeliest_tokens_come_first() -> None:
    inspection = inspect_prompt(build(NETS["trm"]), PROMPT, ANSWER, max_context=16)
    token_ids, probabilities = likeliest(inspection, 3)
    num_states = len(inspection.states)
    assert token_ids.shape == probabilities.shape == (num_states, 4, 3)
    assert bool((probabilities.diff(dim=-1) <= 0).all())
    greedy = torch.stack([state.logits.argmax(-1) for state in inspection.states])
    assert torch.equal(token_ids[..., 0], greedy)
    with pytest.raises(ValueError, match=r"k=0 must be 1 to 256"):
        likeliest(inspection, 0)


def test_it_works_in_bf16() -> None:
    inspection = inspect_prompt(build(NETS["hrm"]).bfloat16(), PROMPT, ANSWER, max_context=16)
    assert {state.hidden.dtype for state in inspection.states} == {torch.float32}


@pytest.mark.parametrize(
    ("prompt", "answer", "told"),
    [
        ([], [], "a prompt is one or more token ids from 0 to 255"),
        ([1, 256], [], "token ids from 0 to 255"),
        ([1], [-1], "token ids from 0 to 255"),
        ([1] * 9, [2] * 8, "9 tokens of prompt and 8 of answer exceed the context of 16"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: list[int], answer: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        inspect_prompt(build(NETS["ut"]), prompt, answer, max_context=16)
