"""Sampled tokens have the model's distribution, and depend on nothing else in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from net_cases import NETS, VOCAB_SIZE, build
from torch import Tensor

from inference.requests import MIXING, STEP, WORD, Answer, Request, Sampling, mixed_bits
from inference.sampling import SampledRows, likely_tokens, next_tokens, uniform_numbers
from simple_inference_engine import InferenceEngine

LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.9, -3.0, 0.0, 1.2])
NUM_DRAWS = 4000


def drawn(logits: Tensor, samplings: Sequence[Sampling], number: int = 0) -> list[int]:
    """One token of each row; `number` tokens are there already."""
    sampled = SampledRows.of(samplings, logits.device)
    return next_tokens(logits, sampled, torch.full((len(logits),), number)).tolist()


def seeds_of(seeds: Sequence[int]) -> Tensor:
    """As a row holds them."""
    sampled = SampledRows.of([Sampling(1.0, seed=seed) for seed in seeds], LOGITS.device)
    assert sampled is not None
    return sampled.seeds


def many_draws(sampling: Sampling) -> Tensor:
    """How often each token comes in answers of NUM_DRAWS tokens with the same logits, [V]."""
    rows = LOGITS.expand(NUM_DRAWS, -1)
    sampled = SampledRows.of([sampling] * NUM_DRAWS, LOGITS.device)
    return next_tokens(rows, sampled, torch.arange(NUM_DRAWS)).bincount(minlength=len(LOGITS))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's; about its degrees of freedom when the distribution is right."""
    expected = probabilities * counts.sum()
    kept = expected > 0
    assert not counts[~kept].any()
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9))[kept].sum())


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, range(8)),
        ({"temperature": 0.5}, range(8)),
        ({"temperature": 3.0}, range(8)),
        ({"temperature": 1.0, "top_k": 3}, [2, 4, 7]),
        # of 0.353 + 0.319 + 0.159 + 0.130 ...: two are not enough, three are
        ({"temperature": 1.0, "top_p": 0.7}, [2, 4, 7]),
        # of the three that are left, two have 0.81 of the probability
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [2, 4]),
        ({"temperature": 2.0, "top_k": 5}, [2, 4, 7, 0, 3]),
    ],
)
def test_tokens_have_the_truncated_distribution(settings: dict, kept: Sequence[int]) -> None:
    exact = torch.zeros(len(LOGITS))
    scaled = LOGITS[list(kept)] / settings["temperature"]
    exact[list(kept)] = scaled.softmax(-1)
    degrees = len(kept) - 1
    worst = degrees + 4 * math.sqrt(2 * degrees)  # about 1 in 1,000
    for seed in (0, 1):
        assert chi_square(many_draws(Sampling(**settings, seed=seed)), exact) < worst
    other = torch.full_like(exact, 0.0)
    other[list(kept)] = 1 / len(kept)
    assert chi_square(many_draws(Sampling(**settings)), other) > worst


def test_greedy_rows_among_sampled_ones_stay_greedy() -> None:
    logits = torch.randn(6, 50)
    hot = Sampling(temperature=100.0, seed=3)
    mixed = drawn(logits, [Sampling(), hot, Sampling(), hot, hot, Sampling()])
    greedy = logits.argmax(-1).tolist()
    assert [mixed[row] for row in (0, 2, 5)] == [greedy[row] for row in (0, 2, 5)]
    assert [mixed[row] for row in (1, 3, 4)] != [greedy[row] for row in (1, 3, 4)]


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}])
def test_what_leaves_one_token_is_greedy(cut: dict) -> None:
    logits = torch.randn(40, 30)
    logits[:20, 7] = logits[:20, 21] = 9.0  # of equals the first, as with argmax
    expected = logits.argmax(-1).tolist()
    assert drawn(logits, [Sampling(5.0, **cut, seed=seed) for seed in range(40)]) == expected


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = torch.randn(40, 30)
    expected = logits.argmax(-1).tolist()
    assert drawn(logits, [Sampling(1e-30, seed=seed) for seed in range(40)]) == expected


def test_a_row_draws_the_same_beside_any_others() -> None:
    logits = torch.randn(5, 300)
    samplings = [
        Sampling(temperature=1.5, seed=11),
        Sampling(temperature=0.9, top_k=7, seed=12),
        Sampling(),
        Sampling(temperature=1.1, top_p=0.6, seed=11),
        Sampling(temperature=2.0, top_k=200, top_p=0.9, seed=-5),
    ]
    for number in range(20):
        together = drawn(logits, samplings, number)
        alone = [
            drawn(logits[row : row + 1], samplings[row : row + 1], number)[0] for row in range(5)
        ]
        assert together == alone


def test_numbers_are_the_published_hash() -> None:
    seeds, numbers = [0, 1, 2**63 - 1, -1, 2**80 + 17], [0, 1, 12345, 7, 3]
    found = uniform_numbers(
        seeds_of(seeds),
        torch.tensor(numbers),
    )
    for seed, number, value in zip(seeds, numbers, found.tolist(), strict=True):
        word = mixed_bits((mixed_bits(seed & WORD) + STEP * (number + 1)) & WORD)
        assert value == (word >> 40) / 2**24
    # SplitMix64 from state 0: its first value, as its authors' program prints it
    assert mixed_bits(STEP) == 0xE220A8397B1DCDAF
    assert [shift for shift, _ in MIXING] == [30, 27, 31]


def test_neighbouring_seeds_and_prompts_share_nothing() -> None:
    seeds = {Sampling(seed=seed).for_prompt(i).seed for seed in range(40) for i in range(40)}
    assert len(seeds) == 1600
    assert Sampling(seed=1).for_prompt(0) == Sampling(seed=1).for_prompt(0)
    assert min(seeds) >= 0
    rows = seeds_of(range(2000))
    for number in range(2):
        numbers = uniform_numbers(rows, torch.full((2000,), number))
        assert abs(float(numbers.mean()) - 0.5) < 0.03
        assert abs(float(numbers[1:] @ numbers[:-1]) / 1999 - 0.25) < 0.03  # uncorrelated


def test_likely_tokens_are_the_models_own() -> None:
    logits = torch.randn(3, 20)
    exact = logits.softmax(-1)
    of_chosen, likely = likely_tokens(logits, torch.tensor([4, 0, 19]), 5)
    assert of_chosen == pytest.approx([float(exact[row, t]) for row, t in enumerate((4, 0, 19))])
    for row, tops in enumerate(likely):
        assert [token for token, _ in tops] == exact[row].argsort(descending=True)[:5].tolist()
        assert dict(tops) == pytest.approx({token: float(exact[row, token]) for token, _ in tops})
    assert len(likely_tokens(logits, torch.zeros(3, dtype=torch.int64), 99)[1][0]) == 20


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Sampling(**settings)


def test_an_answer_is_the_same_alone_in_a_batch_and_after_a_neighbour_left() -> None:
    model = build(NETS["hrm"])
    requests = [
        Request(
            torch.randint(VOCAB_SIZE, (3 + 5 * number,)).tolist(),
            max_new_tokens=4 + 3 * (number % 4),
            sampling=Sampling(1.3, top_k=(None, 40)[number % 2], top_p=0.95, seed=number % 3)
            if number % 4
            else Sampling(),
        )
        for number in range(9)
    ]

    def answers(max_rows: int, asked: Sequence[Request]) -> list[Answer]:
        engine = InferenceEngine(model, max_context=64, max_rows=max_rows)
        return sorted(engine.answer(asked), key=lambda answer: answer.index)

    alone = [answers(1, [request])[0].token_ids for request in requests]
    for max_rows in (1, 2, 3, 9):
        assert [answer.token_ids for answer in answers(max_rows, requests)] == alone


def test_prompts_of_one_seed_are_sampled_apart_and_again_the_same() -> None:
    model = build(NETS["ut"])
    engine = InferenceEngine(model, max_context=64, max_rows=3)

    def tokens(seed: int) -> list[tuple[int, ...]]:
        found = engine.generate_ids(
            [[5, 6, 7]] * 6, stop_ids=(), max_new_tokens=8, sampling=Sampling(2.0, seed=seed)
        )
        return [answer.token_ids for answer in sorted(found, key=lambda answer: answer.index)]

    first = tokens(0)
    assert len(set(first)) == 6
    assert tokens(0) == first
    assert not set(tokens(1)) & set(first)


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn() -> None:
    model = build(NETS["ut"], vocab_size=512)
    hot = Sampling(temperature=50.0, seed=3)

    def ids_of(id_limit: int | None) -> set[int]:
        engine = InferenceEngine(model, max_context=64, id_limit=id_limit)
        prompts = [[index + 1] for index in range(8)]
        answers = engine.generate_ids(prompts, stop_ids=(), max_new_tokens=40, sampling=hot)
        return {token for answer in answers for token in answer.token_ids}

    assert max(ids_of(None)) >= 287
    assert max(ids_of(287)) < 287
