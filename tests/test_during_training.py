"""Held-out data and norms in a run: there, right after a stop too, and without effect on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import PRETRAIN, TINY, assert_refused, run_pretrain, start_command, write_tiny_data

from training.run_records import choose_checkpoint
from training.telemetry import METRICS_FILE, read_metrics
from training.tensor_store import read_tensors

LINE = ("data.path=data", "epochs=2", "log_interval=3", *TINY)
SIGHT = ("val_data.path=held_out", "val_data.interval=10", "log_recurrence=true")
SPEED = "tokens_per_second"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data, and two runs of it: one that is watched, one that is not."""
    folder = tmp_path_factory.mktemp("sight") / "work"
    write_tiny_data(folder / "data")
    write_tiny_data(folder / "held_out", examples=21, epochs=1)
    run_pretrain(*LINE, "run_name=plain", cwd=folder).check()
    done = run_pretrain(*LINE, *SIGHT, "run_name=watched", cwd=folder).check()
    assert re.search(r"^held out +held_out, 21 examples every 10 steps$", done.stdout, re.M)
    return folder


def lines_of(folder: Path, run: str, file: str = METRICS_FILE) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "checkpoints/data" / run / file)
    return [{k: v for k, v in line.items() if k != SPEED} for line in lines]


def test_to_look_on_changes_nothing(folder: Path) -> None:
    runs = [choose_checkpoint(folder / "checkpoints/data" / run) for run in ("plain", "watched")]
    for part in ("model", "ema", "optimizer"):
        plain, watched = (read_tensors(run.path / part) for run in runs)
        assert plain.keys() == watched.keys()
        assert all(plain[name].equal(watched[name]) for name in plain)
    plain, watched = lines_of(folder, "plain"), lines_of(folder, "watched")
    trained = [line for line in watched if "train/loss" in line]
    assert [{k: line[k] for k in plain[0]} for line in trained] == plain


def test_scores_come_at_intervals_and_at_the_end(folder: Path) -> None:
    scored = [line for line in lines_of(folder, "watched") if "val/loss" in line]
    last = lines_of(folder, "plain")[-1]["step"]
    assert [line["step"] for line in scored] == [*range(10, last, 10), last]
    for name in ("loss", "accuracy", "exact_accuracy", "bits_per_byte"):
        assert all(f"{weights}/{name}" in scored[0] for weights in ("val", "val_ema"))


def test_norms_come_with_every_logged_line(folder: Path) -> None:
    trained = [line for line in lines_of(folder, "watched") if "train/loss" in line]
    for line in trained:
        for level in ("H", "L", "embedding", "head", "total"):
            assert f"grad_norm/{level}" in line and f"update_norm/{level}" in line
        assert line["state/z_H_2/change"] > 0 and "state/z_H_1/change" not in line


def test_prompts_are_answered_at_each_look(folder: Path) -> None:
    samples = lines_of(folder, "watched", "samples.jsonl")
    steps = sorted({line["step"] for line in samples})
    assert len(samples) == 4 * len(steps)
    assert {line["prompt"] for line in samples[:4]} == {line["prompt"] for line in samples[-4:]}
    assert samples[0].keys() == {"step", "weights", "prompt", "answer", "truth"}


def test_a_run_that_was_stopped_shows_the_same(folder: Path) -> None:
    line = (*LINE, *SIGHT, "run_name=stopped")
    run_pretrain(*line, "max_steps=14", cwd=folder).check()
    log = folder / "checkpoints/data/stopped"
    for file in (METRICS_FILE, "samples.jsonl"):  # written after the checkpoint, before a crash
        with (log / file).open("a") as lines:
            lines.write(json.dumps({"step": 20, "val/loss": 1.0}) + "\n")
    run_pretrain(*line, cwd=folder).check()
    for file in (METRICS_FILE, "samples.jsonl"):
        assert lines_of(folder, "stopped", file) == lines_of(folder, "watched", file)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_look_on_as_one(folder: Path) -> None:
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PRETRAIN))
    line = (*LINE, *SIGHT, "run_name=two", "val_data.max_examples=20", "max_steps=12")
    done = start_command(*command, *line, cwd=folder, environment={"OMP_NUM_THREADS": "1"}).wait()
    assert "held_out, 20 examples" in done.check().stdout
    (scored,) = (line for line in lines_of(folder, "two") if "val/loss" in line)
    whole = next(line for line in lines_of(folder, "watched") if "val/loss" in line)
    assert scored["val/loss"] == pytest.approx(whole["val/loss"], rel=0.2)  # packed otherwise
    assert len(lines_of(folder, "two", "samples.jsonl")) == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["val_data.path=nowhere"], ("nowhere is no folder of sampled data",)),
        (["val_data.interval=5"], ("val_data.path", "is required")),
        (["val_data.pth=held_out"], ("unknown key 'val_data.pth'", "did you mean val_data.path?")),
        (["val_data.path=held_out", "val_data.interval=0"], ("val_data.interval=0", "greater")),
    ],
)
def test_held_out_data_that_cannot_be(
    arguments: list[str], told: tuple[str, ...], folder: Path
) -> None:
    assert_refused(folder, *LINE, "run_name=bad", *arguments, told=told)


def test_held_out_data_of_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_data(tmp_path / "other", examples=9, epochs=1)
    text = (other / "metadata.json").read_text().replace('"vocab_size": 287', '"vocab_size": 288')
    (other / "metadata.json").write_text(text)
    told = ("is made with another tokenizer than data", "vocab_size is 288, 287 there")
    assert_refused(folder, *LINE, "run_name=bad", f"val_data.path={other}", told=told)
