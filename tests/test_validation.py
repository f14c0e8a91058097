"""Validation scores every held-out example once, and training never notices it."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sight_cases
import torch
from commands import start_command, write_tiny_data
from run_cases import ALONE, whole_state
from safetensors.torch import load_file
from sight_cases import STEPS, TOKEN_BYTES, WatchedRun
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from data_io.byte_tokenizer import byte_tokenizer
from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from models.batch import PackedBatch, PackedLayout
from training.distributed import stop_world, unsharded
from training.samples import SAMPLES_FILE, spread_examples
from training.telemetry import read_metrics
from training.validation import averaged_weights, require_same_tokens

EXAMPLES = 40
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("sight") / "data", examples=EXAMPLES)


@pytest.fixture(autouse=True)
def left_world() -> Iterator[None]:
    yield
    stop_world()


def scores_one_by_one(run: WatchedRun) -> dict[str, float]:
    """The scores by their definition: every example in a row of its own, all logits at once."""
    nats, text_nats, num_bytes, correct, tokens, exact = 0.0, 0.0, 0, 0, 0, 0
    for prompt, response in examples_of(run.data):
        ids = torch.tensor([*prompt, *response])
        layout = PackedLayout.from_lengths(
            torch.tensor([len(prompt)]), torch.tensor([len(response) - 1]), 1
        )
        with torch.no_grad():
            hidden = run.model(ids[:-1], torch.arange(len(ids) - 1), layout)
            logits = run.model.logits(hidden)[len(prompt) - 1 :].double()
        losses = F.cross_entropy(logits, ids[len(prompt) :], reduction="none")
        token_bytes = torch.from_numpy(TOKEN_BYTES)[ids[len(prompt) :]]
        is_correct = logits.argmax(-1) == ids[len(prompt) :]
        nats, tokens = nats + float(losses.sum()), tokens + len(response)
        text_nats += float(losses[token_bytes > 0].sum())
        num_bytes += int(token_bytes.sum())
        correct, exact = correct + int(is_correct.sum()), exact + int(is_correct.all())
    return {
        "loss": nats / tokens,
        "accuracy": correct / tokens,
        "exact_accuracy": exact / EXAMPLES,
        "bits_per_byte": text_nats / math.log(2) / num_bytes,
    }


def examples_of(data: SampledData) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every example."""
    index, tokens = data.epoch(0), data.tokens()
    return [
        (
            tokens[index.inst_start[i] :][: index.inst_len[i]].tolist(),
            tokens[index.resp_start[i] :][: index.resp_len[i]].tolist(),
        )
        for i in range(len(index))
    ]


def named(scores: dict[str, float], prefix: str) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in scores.items()}


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def trained(run: WatchedRun, steps: int = 30) -> WatchedRun:
    for _ in range(steps):
        run.step()
    return run


def test_every_held_out_example_is_scored_once_by_raw_and_by_averaged_weights(data: Path) -> None:
    run = trained(WatchedRun(data, ALONE, ema=0.9))
    assert len(run.batches(256, drop_last_batch=False)) > 1
    found = run.validator.scores()
    expected = named(scores_one_by_one(run), "val")
    for param in run.model.parameters():
        param.data.copy_(run.optimizer.state[param]["param_ema"])
    expected |= named(scores_one_by_one(run), "val_ema")
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["val/accuracy"] > 0 and found["val/loss"] != found["val_ema/loss"]


def test_without_averages_and_bytes_there_are_fewer_figures(data: Path) -> None:
    run = WatchedRun(data, ALONE, ema=None)
    run.validator.token_bytes = None
    assert run.validator.scores().keys() == {"val/loss", "val/accuracy", "val/exact_accuracy"}


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_pass_gives_way_and_leaves_the_weights(batches: int, data: Path) -> None:
    run = trained(WatchedRun(data, ALONE), steps=3)
    before = whole_state(run.model, run.optimizer)
    asked = iter([False] * batches + [True])
    assert run.validator.scores(lambda: next(asked)) == {}
    after = whole_state(run.model, run.optimizer)
    for kind in before:
        assert_same_tensors(before[kind], after[kind])


def test_training_and_the_random_numbers_do_not_notice(data: Path, tmp_path: Path) -> None:
    plain, watched = (WatchedRun(data, ALONE) for _ in range(2))
    before = torch.get_rng_state()
    figures = watched.train_watched(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_tensors(trained(plain, STEPS).state(), watched.state())
    assert not any(param.grad is not None for param in watched.model.parameters())
    assert figures[0]["val/loss"] > figures[-1]["val/loss"]


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_weights_and_averages_are_restored_bit_by_bit_even_on_an_error(
    data: Path, dtype: torch.dtype
) -> None:
    run = trained(WatchedRun(data, ALONE, dtype=dtype), 2)
    before, inside = run.state(), dict[str, Tensor]()
    with torch.no_grad():
        run.model(*inputs(run))  # leaves compute copies as parameters
    with pytest.raises(RuntimeError, match="in the middle"):  # noqa: SIM117 -- one thing at a time
        with averaged_weights(run.model, run.optimizer):
            inside = run.state()
            run.model(*inputs(run))
            raise RuntimeError("in the middle")
    assert_same_tensors(run.state(), before)
    for name in dict(run.model.named_parameters()):
        assert torch.equal(inside[f"model.{name}"], before[f"ema.{name}"])


def inputs(run: WatchedRun) -> tuple[Tensor, Tensor, PackedLayout]:
    (batch,) = run.batches(1024, drop_last_batch=False)
    return batch.tokens, batch.positions, batch.layout


def test_parameters_are_master_weights_again_after_a_pass_and_after_a_broken_one(
    data: Path,
) -> None:
    run = trained(WatchedRun(data, ALONE, dtype=torch.bfloat16, ema=None), 1)
    before = run.state()
    run.validator.scores()
    assert_same_tensors(run.state(), before)
    batches = run.batches(256)

    def failing() -> Iterator[PackedBatch]:
        yield batches[0]
        raise OSError("the disk is gone")

    run.validator.batches = failing
    with pytest.raises(OSError, match="gone"):
        run.validator.scores()
    assert_same_tensors(run.state(), before)


def test_whole_compute_copies_are_there_inside_alone(data: Path) -> None:
    run = trained(WatchedRun(data, ALONE, dtype=torch.bfloat16), 1)
    with pytest.raises(RuntimeError), unsharded(run.model):
        weight = run.model.lm_head.weight
        assert weight.dtype == torch.bfloat16 and not isinstance(weight, DTensor)
        raise RuntimeError
    assert isinstance(run.model.lm_head.weight, DTensor)


def test_samples_are_answers_of_the_averaged_weights(data: Path, tmp_path: Path) -> None:
    run = WatchedRun(data, ALONE)
    run.train_watched(tmp_path)
    lines = read_metrics(tmp_path / SAMPLES_FILE)
    assert [(line["step"], line["weights"]) for line in lines] == [
        (step, "ema") for step in range(1, STEPS + 1) for _ in range(2)
    ]
    examples = spread_examples(run.data, 2)
    for param in run.model.parameters():
        param.data.copy_(run.optimizer.state[param]["param_ema"])
    answers = run.answer([prompt for prompt, _ in examples])
    tokenizer = byte_tokenizer()
    for line, (prompt, truth), answer in zip(lines[-2:], examples, answers, strict=True):
        assert line["prompt"] == tokenizer.decode(prompt)
        assert line["truth"] == tokenizer.decode(truth)
        assert line["answer"] == tokenizer.decode(list(answer), skip_special_tokens=False)


def test_samples_have_prompts_of_their_own(tmp_path: Path) -> None:
    with SampledWriter(tmp_path / "text", TokenizerInfo(vocab_size=9), max_seq_len=8) as writer:
        writer.add_tokens(np.arange(9))
        starts, lens = np.array([0, 0, 1, 0]), np.array([1, 1, 1, 2])
        writer.add_epoch(EpochIndex(starts, lens, np.array([2, 3, 4, 5]), np.array([2, 1, 1, 1])))
    text = SampledData.open(tmp_path / "text")
    assert spread_examples(text, 4) == [([0], [2, 3]), ([1], [4]), ([0, 1], [5])]
    assert spread_examples(text, 2) == [([0], [2, 3]), ([1], [4])]
    assert len(spread_examples(text, 9)) == 3


def test_samples_past_the_restored_step_are_cut(data: Path, tmp_path: Path) -> None:
    WatchedRun(data, ALONE).train_watched(tmp_path)
    WatchedRun(data, ALONE).sample_log(tmp_path, start_step=1)
    assert {line["step"] for line in read_metrics(tmp_path / SAMPLES_FILE)} == {1}


def test_held_out_data_of_another_tokenizer_is_refused(data: Path) -> None:
    trained_on = SampledData.open(data)
    require_same_tokens(trained_on, trained_on)
    info = trained_on.metadata.tokenizer_info.model_copy(update={"eoa": "<|cot|>"})
    other = replace(
        trained_on, metadata=trained_on.metadata.model_copy(update={"tokenizer_info": info})
    )
    with pytest.raises(ValueError, match=r"val_data.path=.* eoa is <\|cot\|>, <\|box_end\|> there"):
        require_same_tokens(other, trained_on)


@pytest.fixture(scope="module")
def two_ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks of sight_cases.py leave."""
    outbox = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = []
    for rank in "01":
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        command = (sight_cases.__file__, str(data), str(outbox))
        ranks.append(start_command(*command, cwd=outbox, environment=environment))
    for rank in ranks:
        rank.wait().check()
    return outbox


@pytest.mark.dist
@pytest.mark.parametrize("kind", DTYPES)
def test_two_ranks_train_as_if_nobody_had_watched(two_ranks: Path, kind: str) -> None:
    for rank in range(2):
        plain, watched = (
            load_file(two_ranks / f"{kind}.{rank}" / f"{name}.safetensors")
            for name in ("plain", "watched")
        )
        assert_same_tensors(plain, watched)


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 2e-4), ("bfloat16", 3e-2)])
def test_two_ranks_find_the_figures_of_one(
    two_ranks: Path, data: Path, tmp_path: Path, kind: str, tolerance: float
) -> None:
    one, other = (
        json.loads((two_ranks / f"{kind}.{rank}" / "figures.json").read_text()) for rank in range(2)
    )
    assert one == other
    alone = WatchedRun(data, ALONE, dtype=DTYPES[kind]).train_watched(tmp_path)
    for of_two, of_one in zip(one, alone, strict=True):
        assert of_two == pytest.approx(of_one, rel=tolerance)
    first, second = (
        read_metrics(two_ranks / f"{kind}.0" / SAMPLES_FILE),
        read_metrics(tmp_path / SAMPLES_FILE),
    )
    assert kind == "bfloat16" or first == second
    assert (two_ranks / f"{kind}.1" / SAMPLES_FILE).exists() is False
