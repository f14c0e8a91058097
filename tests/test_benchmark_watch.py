"""Benchmarks in a run: at their steps, with the figures of evaluation.main, training untouched."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import PRETRAIN, TINY, assert_refused, run_pretrain, start_command, write_tiny_data
from evaluation_cases import items, recorded
from run_cases import ALONE, whole_state
from sight_cases import WatchedRun
from torch import Tensor

from evaluation import main as evaluation_main
from evaluation.benchmark_watch import BenchmarkWatch
from evaluation.chosen_benchmarks import ChosenBenchmarks
from training.checkpoint import Progress
from training.run_records import choose_checkpoint
from training.schema import BenchmarksConfig
from training.telemetry import METRICS_FILE, MetricsLogger, read_metrics
from training.tensor_store import read_tensors

GSM8K, WINOGRANDE = 21, 10  # items
LINE = ("data.path=data", "epochs=2", "log_interval=3", *TINY)
ASKED = (
    "benchmarks.run_only=[GSM8k,Winogrande]",
    "benchmarks.data_dir=mirror",
    "benchmarks.config=short.yaml",
    "benchmarks.batch_size=4",
)
# Shots would not fit into the context of the tiny data.
SETTINGS = """
engine: SimpleEngine
generation_config: {condition: "synth,cot"}
benchmarks:
  - {name: GSM8k}
  - {name: Winogrande, num_shots: 0, generation_config: {condition: direct}}
  - {name: BoolQ, num_shots: 0}
"""


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data, a mirror, and two runs: one that is asked, one that is not."""
    folder = tmp_path_factory.mktemp("asked") / "work"
    write_tiny_data(folder / "data")
    mirror = folder / "mirror"
    sums = [{"question": f"{n}+{n}?", "answer": f"#### {2 * n}"} for n in range(GSM8K)]
    write_rows(mirror / "gsm8k/main/test.jsonl", sums)
    gaps = [
        {"sentence": f"{n} _", "option1": "x", "option2": "y", "answer": str(n % 2 + 1)}
        for n in range(WINOGRANDE)
    ]
    write_rows(mirror / "allenai__winogrande/winogrande_debiased/validation.jsonl", gaps)
    passages = [{"passage": "long " * 9, "question": "is it", "answer": True}]
    write_rows(mirror / "google__boolq/default/validation.jsonl", passages)
    (folder / "short.yaml").write_text(SETTINGS)
    run_pretrain(*LINE, "run_name=plain", cwd=folder).check()
    when = ("benchmarks.interval=10", "benchmarks.epochs=1")
    done = run_pretrain(*LINE, *ASKED, *when, "run_name=asked", cwd=folder).check()
    told = r"^benchmarks +GSM8k 21, Winogrande 10 items, every 10 steps, every epoch, at the end$"
    assert re.search(told, done.stdout, re.M)
    return folder


def lines_of(folder: Path, run: str) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "checkpoints/data" / run / METRICS_FILE)
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def figures_of(folder: Path, run: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder, run) if "eval/GSM8k/acc" in line]


def assert_same_training(folder: Path, plain_run: str, asked_run: str) -> None:
    runs = (folder / "checkpoints/data" / run for run in (plain_run, asked_run))
    plain, asked = (choose_checkpoint(run).path for run in runs)
    for part in ("model", "ema", "optimizer"):
        before, after = read_tensors(plain / part), read_tensors(asked / part)
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)
    trained = [line for line in lines_of(folder, asked_run) if "train/loss" in line]
    assert trained == lines_of(folder, plain_run)


def test_to_ask_changes_nothing(folder: Path) -> None:
    assert_same_training(folder, "plain", "asked")


def test_it_is_asked_at_intervals_after_epochs_and_at_the_end(folder: Path) -> None:
    last = lines_of(folder, "plain")[-1]["step"]
    run = folder / "checkpoints/data/asked"
    epoch_1 = choose_checkpoint(run, epoch=1).progress.step
    assert epoch_1 % 10 and last % 10  # else an interval would hide them
    steps = sorted({*range(10, last, 10), epoch_1, last})
    assert [line["step"] for line in figures_of(folder, "asked")] == steps
    assert {path.name for path in (run / "benchmarks").iterdir()} == {f"step_{n}" for n in steps}
    names = [name for name in figures_of(folder, "asked")[0] if name.startswith("eval/")]
    assert names == [
        f"eval/{label}/{figure}"
        for label in ("GSM8k", "Winogrande")
        for figure in ("acc", "acc_robust", "invalid")
    ]


def evaluated(folder: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of `evaluation.main` on a run's newest checkpoint."""
    monkeypatch.chdir(folder)
    results = folder / "results" / run
    words = ("run_only=[GSM8k,Winogrande]", "data_dir=mirror", "config=short.yaml")
    where = (f"ckpt_path=checkpoints/data/{run}", f"results_dir={results.parent}", f"name={run}")
    evaluation_main.main([*where, *words, "device=cpu"])
    return results


def test_answers_and_figures_are_those_of_evaluation_main(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = evaluated(folder, "asked", monkeypatch)
    last = figures_of(folder, "asked")[-1]
    within = folder / f"checkpoints/data/asked/benchmarks/step_{last['step']}"
    assert items(within) == items(apart)
    results, others = recorded(within), recorded(apart)
    for label, record in results["benchmarks"].items():
        other = others["benchmarks"][label]
        for each in (record, other):
            each["generation"].pop("batch_size", None)
        assert record == other
        assert last[f"eval/{label}/acc"] == record["published"]["acc"]
    same = ("step", "weights", "weights_fingerprint", "tokenizer_sha256", "dtype", "net")
    assert [results["model"][key] for key in same] == [others["model"][key] for key in same]
    assert {path.name for path in within.iterdir()} == {
        "results.json",
        "items.jsonl",
    }


@pytest.mark.slow
def test_a_run_that_was_stopped_shows_the_same(folder: Path) -> None:
    line = (*LINE, *ASKED, "benchmarks.interval=10", "benchmarks.epochs=1", "run_name=stopped")
    run_pretrain(*line, "max_steps=14", cwd=folder).check()
    run = folder / "checkpoints/data/stopped"
    with (run / METRICS_FILE).open("a") as lines:  # written after the checkpoint, before a crash
        lines.write(json.dumps({"step": 20, "eval/GSM8k/acc": 1.0}) + "\n")
    for name in ("step_20", ".step_15.writing", "step_999"):
        shutil.copytree(run / "benchmarks/step_10", run / "benchmarks" / name)
    run_pretrain(*line, cwd=folder).check()
    assert lines_of(folder, "stopped") == lines_of(folder, "asked")
    whole = folder / "checkpoints/data/asked/benchmarks"
    assert {path.name for path in (run / "benchmarks").iterdir()} == {
        path.name for path in whole.iterdir()
    }
    for path in whole.iterdir():
        assert items(run / "benchmarks" / path.name) == items(path)


@pytest.mark.slow
def test_what_was_missed_is_made_up_at_the_end_of_an_epoch(folder: Path) -> None:
    line = (*LINE, "run_name=late")
    epoch_1 = choose_checkpoint(folder / "checkpoints/data/plain", epoch=1).progress.step
    run_pretrain(*line, f"max_steps={epoch_1}", cwd=folder).check()
    run_pretrain(*line, *ASKED, "benchmarks.epochs=1", f"max_steps={epoch_1 + 1}", cwd=folder)
    late, whole = (figures_of(folder, run) for run in ("late", "asked"))
    assert late == [line for line in whole if line["step"] == epoch_1]


def test_a_dry_run_rehearses_them_and_keeps_nothing(folder: Path) -> None:
    done = run_pretrain(*LINE, *ASKED, "dry_run=true", "run_name=dry", cwd=folder).check()
    assert re.search(r"benchmarks \(the longest prompts\) \d+\.\d\d s", done.stdout)
    assert not (folder / "checkpoints/data/dry").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_share_the_prompts_and_train_as_if_nobody_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PRETRAIN))
    line = (*command, *LINE, "max_steps=12")
    environment = {"OMP_NUM_THREADS": "1"}
    start_command(*line, "run_name=two", cwd=folder, environment=environment).wait().check()
    asked = (*ASKED, "benchmarks.interval=4", "run_name=two_asked")
    start_command(*line, *asked, cwd=folder, environment=environment).wait().check()
    assert_same_training(folder, "two", "two_asked")
    apart = evaluated(folder, "two_asked", monkeypatch)
    assert items(folder / "checkpoints/data/two_asked/benchmarks/step_12") == items(apart)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["benchmarks.interval=5"], ("benchmarks.run_only", "is required")),
        (["benchmarks.run_only=[]"], ("benchmarks.run_only=[]", "at least 1")),
        (["benchmarks.run_only=GSM9k"], ("no benchmark", "did you mean GSM8k?")),
        ([*ASKED, "benchmarks.run_only=[GSM8k,9]"], ("no benchmark is named '9'",)),
        ([*ASKED, "benchmarks.run_only=[GSM9k]"], ("no benchmark", "did you mean GSM8k?")),
        ([*ASKED, "benchmarks.intervall=5"], ("did you mean benchmarks.interval?",)),
        ([*ASKED, "benchmarks.run_only=[DROP]"], ("mirror/EleutherAI__drop", "evaluation.fetch")),
        ([*ASKED, "benchmarks.run_only=[BoolQ]"], ("BoolQ: none of the 1 prompts fits", "context")),
        ([*ASKED, "benchmarks.config=long.yaml"], ("config=long.yaml is no file",)),
        (
            ["benchmarks.run_only=[AIMEMajorityVoting]", "benchmarks.limit=3"],
            ("benchmarks.limit=3 would take single samples",),
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    arguments: list[str], told: tuple[str, ...], folder: Path
) -> None:
    assert_refused(folder, *LINE, "run_name=bad", *arguments, told=told)


class _StopsAfter:
    """Asks to stop after so many answers."""

    def __init__(self, num_answers: int) -> None:
        self.num_left = num_answers

    def is_wanted_here(self) -> bool:
        self.num_left -= 1
        return self.is_wanted()

    def is_wanted(self) -> bool:
        return self.num_left <= 0


@pytest.fixture
def watched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchmarkWatch:
    """A watch over a run of one process."""
    monkeypatch.chdir(folder)
    run = WatchedRun(folder / "data", ALONE)
    names = ["GSM8k", "Winogrande"]
    config = BenchmarksConfig(run_only=names, interval=2, data_dir="mirror", config="short.yaml")
    logger = MetricsLogger(tmp_path, ALONE, log_interval=1, total_steps=4, start=Progress())
    return BenchmarkWatch(
        ChosenBenchmarks.open(config, run.data),
        tmp_path,
        logger,
        model=run.model,
        optimizer=run.optimizer,
        start=Progress(),
        epoch_ends={4: 1},
    )


def state_of(watch: BenchmarkWatch) -> dict[str, dict[str, Tensor]]:
    return whole_state(watch.model, watch.optimizer)


@pytest.mark.parametrize("num_answers", [0, 1, GSM8K, GSM8K + WINOGRANDE])
def test_a_look_gives_way_and_is_made_up(
    num_answers: int, watched: BenchmarkWatch, tmp_path: Path
) -> None:
    before = state_of(watched)
    progress = Progress(0, 3, 2, 9)
    assert watched.is_due(2) and not watched.is_due(3) and watched.is_due(4)
    watched.look(progress, _StopsAfter(num_answers))
    after = state_of(watched)
    assert all(
        before[kind][name].equal(after[kind][name]) for kind in before for name in after[kind]
    )
    assert watched.is_due(2) and not list(tmp_path.glob("benchmarks/*"))
    assert not (tmp_path / METRICS_FILE).exists()
    watched.look(progress, _StopsAfter(GSM8K + WINOGRANDE + 1))
    assert not watched.is_due(2)
    assert len(items(tmp_path / "benchmarks/step_2")) == GSM8K + WINOGRANDE
    (line,) = read_metrics(tmp_path / METRICS_FILE)
    assert line["step"] == 2 and "eval/Winogrande/acc" in line


def test_a_limit_takes_items_from_all_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    data = WatchedRun(folder / "data", ALONE).data
    config = BenchmarksConfig(run_only=["GSM8k"], limit=3, data_dir="mirror", config="short.yaml")
    chosen = ChosenBenchmarks.open(config, data)
    assert [item.id for item in chosen.ready[0].items] == ["test/0", "test/7", "test/14"]
    assert "GSM8k: 3 of 21 items are asked" in chosen.notes
