"""pretrain.py trains as the original did: every batch, loss, learning rate, and the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from net_cases import golden_net, read_case
from run_cases import ALONE, by_our_names, whole_state
from safetensors.torch import load_file
from torch import Tensor
from training_cases import StepRecord, golden_run, set_weights, train_recorded

from training.checkpoint import METADATA_FILE
from training.export_format import parameter_name_from_reference
from training.telemetry import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Outcome:
    """A golden training run repeated."""

    folder: Path
    case: dict[str, Any]
    total_steps: int
    records: list[StepRecord]
    metrics: list[dict[str, Any]]
    train_metadata: dict[str, Any]
    state: dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def outcome(golden_train: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    case = read_case(golden_train)
    path = tmp_path_factory.mktemp("golden") / "run"
    run, progress = golden_run(case, golden_train, path, ALONE)
    nets = golden_train.parent.parent / "nets"
    set_weights(run.model, run.optimizer, golden_net(nets / case["net_case"]).state_dict())
    records = train_recorded(run, progress, case["num_steps"])
    yield Outcome(
        folder=golden_train,
        case=case,
        total_steps=run.facts.total_steps,
        records=records,
        metrics=read_metrics(path / METRICS_FILE),
        train_metadata=yaml.safe_load((path / METADATA_FILE).read_text()),
        state=whole_state(run.model, run.optimizer),
    )
    torch.set_flush_denormal(False)  # a run turns it on for its process


def test_golden_run_has_the_published_length_and_data_record(outcome: Outcome) -> None:
    assert outcome.total_steps == outcome.case["total_steps"]
    assert len(outcome.records) == outcome.case["num_steps"] == len(outcome.metrics)
    assert outcome.train_metadata == outcome.case["train_metadata"]


def test_golden_run_sees_the_original_batches(outcome: Outcome) -> None:
    batches = load_file(outcome.folder / "batches.safetensors")
    for record, log in zip(outcome.records, outcome.case["log"], strict=True):
        (batch,) = record.micro_batches
        layout, step = batch.layout, log["step"]
        found = {
            f"step{step}.inputs": batch.tokens,
            f"step{step}.labels": batch.labels,
            f"step{step}.position_ids": batch.positions,
        }
        expected = {name: t for name, t in batches.items() if name.startswith(f"step{step}.")}
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
        assert int(layout.num_seqs) == log["numseqs"]
        assert int(layout.num_tokens) == batch.global_num_tokens == log["total_seqlen"]
        used = slice(log["numseqs"])
        assert layout.prefix_lens[used].tolist() == log["prefix_lens"]
        assert layout.causal_lens[used].tolist() == log["causal_lens"]


def test_golden_run_has_the_original_loss_and_counts_at_every_step(outcome: Outcome) -> None:
    rtol = outcome.case["tolerance"]["suggest_loss_rtol"]
    for record, log in zip(outcome.records, outcome.case["log"], strict=True):
        sums, expected = record.sums, log["metrics_sum_count"]
        loss, scored_tokens = expected["loss"]
        assert float(sums.loss) == pytest.approx(loss, rel=rtol, abs=0)
        assert int(sums.scored_tokens) == scored_tokens == record.divisor
        assert [int(sums.correct_tokens), int(sums.scored_tokens)] == expected["accuracy"]
        correct, scored = expected["exact_accuracy"]
        assert (int(sums.correct_sequences), int(sums.scored_sequences)) == (correct, scored)


def test_golden_run_follows_the_original_schedules(outcome: Outcome) -> None:
    for record, line, log in zip(
        outcome.records, outcome.metrics, outcome.case["log"], strict=True
    ):
        assert record.lr == line["train/lr"] == pytest.approx(log["lr"], rel=0, abs=1e-12)
        assert record.backprop_steps == line.get("bp_steps") == log["extra"].get("bp_steps")


def test_golden_run_logs_the_original_averages(outcome: Outcome) -> None:
    rtol, tokens = outcome.case["tolerance"]["suggest_loss_rtol"], 0
    for line, log in zip(outcome.metrics, outcome.case["log"], strict=True):
        tokens += log["total_seqlen"]
        assert (line["step"], line["tokens"]) == (log["step"], tokens)
        assert line["epoch"] == log["epoch"] - 1  # ours: epochs done
        for name, value in log["metrics_logged"].items():
            assert line[name] == pytest.approx(value, rel=rtol, abs=0), (name, log["step"])


def test_golden_run_ends_with_the_original_weights_and_averages(outcome: Outcome) -> None:
    final = load_file(outcome.folder / "final.safetensors")
    atol = outcome.case["tolerance"]["suggest_param_atol"]
    params, averages = by_our_names(final, "param."), by_our_names(final, "ema.")
    buffers = {name for name in outcome.state["model"] if name.endswith("z_L_init")}
    for found, expected in ((outcome.state["model"], params), (outcome.state["ema"], averages)):
        assert found.keys() - buffers == expected.keys()
        found = {name: found[name] for name in expected}
        torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_golden_run_steps_each_parameter_as_often_as_the_original(outcome: Outcome) -> None:
    found = {
        name.removeprefix("step."): float(count)
        for name, count in outcome.state["optimizer"].items()
        if name.startswith("step.")
    }
    assert found == {
        parameter_name_from_reference(name): count
        for name, count in outcome.case["optimizer_steps"].items()
    }
    for name, count in found.items():
        assert sum(name in record.gradients for record in outcome.records) == count
