"""Prefill and decode with a cache compute what the whole forward pass does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from net_cases import NETS, VOCAB_SIZE, build
from torch import Tensor

from models.batch import PackedLayout
from models.kv_cache import KVCache
from models.language_model import LanguageModel

ATOL = 1e-5  # logits are about 1
all_nets = pytest.mark.parametrize("net", NETS)


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def random_tokens(length: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (length,))


def uncached_logits(model: LanguageModel, prompt: Tensor, answer: Tensor) -> Tensor:
    """Logits after the prompt and after each token of the answer, [1 + len(answer), V]."""
    tokens = torch.cat((prompt, answer))
    layout = PackedLayout.from_lengths(
        torch.tensor([len(prompt)]), torch.tensor([len(answer)]), num_slots=1
    )
    hidden = model(tokens, torch.arange(len(tokens)), layout)
    return model.logits(hidden[len(prompt) - 1 :])


def prefill(
    model: LanguageModel,
    cache: KVCache,
    prompts: Sequence[Tensor],
    rows: Sequence[int],
    num_padding: int = 0,
) -> Tensor:
    """Logits after each prompt, [prompts, V]."""
    lens = torch.tensor([len(prompt) for prompt in prompts])
    layout = PackedLayout.from_lengths(lens, torch.zeros_like(lens), len(prompts) + 1)
    padding = torch.zeros(num_padding, dtype=torch.int64)
    positions = [torch.arange(len(prompt)) for prompt in prompts]
    slots = torch.tensor([*rows, 10**6])  # the last slot is unused
    hidden = model.prefill(
        torch.cat((*prompts, padding)), torch.cat((*positions, padding)), layout, cache, slots
    )
    return model.logits(hidden[lens.cumsum(0) - 1])


def decode(model: LanguageModel, cache: KVCache, *answers: Tensor) -> list[Tensor]:
    """Logits after each token of the answers in the first rows, [len(answer), V] for each."""
    steps = [
        model.logits(model.decode(torch.stack(tokens), cache))
        for tokens in zip(*answers, strict=True)
    ]
    return list(torch.stack(steps, 1))


@all_nets
def test_prefill_and_decode_equal_the_whole_forward_pass(net: str) -> None:
    model = build(NETS[net])
    prompts = [random_tokens(length) for length in (5, 1, 13)]
    answers = [random_tokens(6) for _ in prompts]
    cache = model.new_cache(num_rows=3, max_length=19)
    rows = [2, 0, 1]
    first = prefill(model, cache, prompts, rows, num_padding=4)
    later = decode(model, cache, *(answers[rows.index(row)] for row in range(3)))
    for index, row in enumerate(rows):
        cached = torch.cat((first[index : index + 1], later[row]))
        whole = uncached_logits(model, prompts[index], answers[index])
        torch.testing.assert_close(cached, whole, atol=ATOL, rtol=0)


@all_nets
def test_a_row_is_the_same_alone_in_a_batch_and_after_a_neighbour_left(net: str) -> None:
    model = build(NETS[net])
    leaving, staying, entering = (random_tokens(length) for length in (9, 4, 3))
    answer, others = random_tokens(8), random_tokens(4)
    expected = uncached_logits(model, staying, answer)[1:]

    alone = model.new_cache(1, 12)
    prefill(model, alone, [staying], [0])
    torch.testing.assert_close(decode(model, alone, answer)[0], expected, atol=ATOL, rtol=0)

    cache = model.new_cache(2, 16)
    prefill(model, cache, [leaving, staying], [0, 1])
    _, together = decode(model, cache, others, answer[:4])
    cache.move_rows([1], [0])
    (moved,) = decode(model, cache, answer[4:6])
    prefill(model, cache, [entering], [1])
    after, entered = decode(model, cache, answer[6:], others[:2])
    torch.testing.assert_close(torch.cat((together, moved, after)), expected, atol=ATOL, rtol=0)
    whole = uncached_logits(model, entering, others[:2])[1:]
    torch.testing.assert_close(entered, whole, atol=ATOL, rtol=0)


def test_growing_keeps_what_the_rows_hold() -> None:
    model = build(NETS["hrm with another H"])
    prompt, answer = random_tokens(4), random_tokens(9)
    cache = model.new_cache(2, max_length=4)
    prefill(model, cache, [prompt], [0])
    lengths, steps = [], []
    for token in answer:
        cache.reserve(int(cache.lengths[0]) + 1)
        lengths.append(cache.max_length)
        steps.append(model.logits(model.decode(token[None], cache)))
    assert lengths == [8] * 4 + [16] * 5
    expected = uncached_logits(model, prompt, answer)[1:]
    torch.testing.assert_close(torch.cat(steps), expected, atol=ATOL, rtol=0)


def test_decoding_leaves_the_other_rows_alone() -> None:
    model = build(NETS["ut"])
    cache = model.new_cache(3, 8)
    prefill(model, cache, [random_tokens(3), random_tokens(2)], [0, 2])
    before = [cache.layers(call).keys[:, 1:].clone() for call in range(4)]
    decode(model, cache, random_tokens(2))
    assert cache.lengths.tolist() == [5, 0, 2]
    for call, keys in enumerate(before):
        torch.testing.assert_close(cache.layers(call).keys[:, 1:], keys, atol=0, rtol=0)


def test_every_application_has_a_cache_of_its_stacks_shape() -> None:
    config = NETS["hrm with another H"]
    cache = build(config).new_cache(num_rows=5, max_length=7)
    for call, application in enumerate(config.applications()):
        stack = config.stacks()[application.stack]
        shape = (stack.n_layers, 5 + 1, 7, stack.num_heads, stack.head_size)
        assert cache.layers(call).keys.shape == cache.layers(call).values.shape == shape


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    model = build(NETS["ut"])
    with pytest.raises(ValueError, match="a prompt of 9 tokens does not fit into a cache of 8"):
        prefill(model, model.new_cache(1, 8), [random_tokens(9)], [0])


def test_a_full_row_is_refused_before_it_changes_anything() -> None:
    model = build(NETS["ut"])
    cache = model.new_cache(2, 4)
    prefill(model, cache, [random_tokens(4), random_tokens(2)], [0, 1])
    with pytest.raises(ValueError, match=r"a row of the cache is full \(4 tokens\)"):
        decode(model, cache, random_tokens(1), random_tokens(1))
    assert cache.lengths.tolist() == [4, 2]
