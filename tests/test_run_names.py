"""Which run a command means: by name, by its settings, or a new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from commands import resolved

from training.checkpoint import CONFIG_FILE, Progress, RunDirectory
from training.distributed import World
from training.run_names import comparable, is_finished, names_in_sweep, resolve_run
from training.schema import MACHINE_KEYS, NAME_KEYS, RunConfig

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
NEW = "a new run; the name was drawn"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are looked for in the working directory."""
    monkeypatch.chdir(tmp_path)


def config(*arguments: str) -> RunConfig:
    return resolved("data.path=some/corpus", *arguments)


def write_run(name: str, settings: RunConfig, *, epochs_done: int, written_at: int) -> Path:
    """A run directory with the checkpoint that ended its last epoch."""
    run = Path("checkpoints/corpus", name)
    directory = RunDirectory(run, ALONE)
    directory.create(settings.model_dump(), {})
    os.utime(run / CONFIG_FILE, (written_at, written_at))
    state = {"model": {"weight": torch.zeros(1)}}
    directory.save(f"fsdp2_epoch_{epochs_done}", state, Progress(epoch=epochs_done), {})
    return run


def found(*arguments: str) -> tuple[str, str]:
    """The folder and the reason that a command gets."""
    named, reason = resolve_run(config(*arguments), ALONE)
    assert named.project_name and named.run_name == Path(str(named.checkpoint_path)).name
    return str(named.checkpoint_path), reason


def test_given_names_make_the_folder() -> None:
    assert found("run_name=a") == ("checkpoints/corpus/a", "given")
    assert found("run_name=a", "project_name=p") == ("checkpoints/p/a", "given")
    assert found("checkpoint_path=elsewhere/b") == ("elsewhere/b", "given")


def test_a_new_run_is_named_after_data_and_net() -> None:
    path, reason = found("arch/net@arch=ut")
    assert path.startswith("checkpoints/corpus/ut-") and reason == NEW
    assert not Path("checkpoints").exists()


def test_the_newest_unfinished_run_with_the_same_settings_is_continued() -> None:
    write_run("older", config(), epochs_done=2, written_at=100)
    newer = write_run("newer", config(), epochs_done=1, written_at=200)
    write_run("finished", config(), epochs_done=4, written_at=300)
    write_run("different", config("lr=1e-3"), epochs_done=1, written_at=400)
    path, reason = found()
    assert path == str(newer)
    assert reason == "the newest unfinished run with these settings; new_run=true starts another"
    assert found("lr=2e-3")[1] == NEW
    assert found("project_name=p")[1] == NEW


def test_a_finished_run_with_the_same_settings_is_found_where_none_is_unfinished() -> None:
    write_run("older", config(), epochs_done=4, written_at=100)
    newer = write_run("newer", config(), epochs_done=4, written_at=200)
    write_run("different", config("lr=1e-3"), epochs_done=1, written_at=300)
    path, reason = found()
    assert path == str(newer)
    assert reason == "the newest finished run with these settings; new_run=true starts another"
    assert found("new_run=true")[1] == NEW


def test_where_and_how_fast_a_run_computes_makes_no_other_run() -> None:
    run = write_run("one", config(), epochs_done=1, written_at=100)
    for setting in (
        "device=cpu",
        "num_threads=3",
        "data_workers=0",
        "log_interval=9",
        "linear=mkl",
    ):
        assert found(setting)[0] == str(run)


def test_new_run_starts_another() -> None:
    write_run("one", config(), epochs_done=1, written_at=100)
    path, reason = found("new_run=true")
    assert reason == NEW and not Path(path).exists()


def test_a_folder_that_cannot_be_read_is_no_run_to_continue() -> None:
    write_run("cut", config(), epochs_done=1, written_at=100)
    Path("checkpoints/corpus/cut", CONFIG_FILE).write_text("arch: [")
    write_run("binary", config(), epochs_done=1, written_at=100)
    Path("checkpoints/corpus/binary", CONFIG_FILE).write_bytes(b"\xff\xfe\x00")
    assert found()[1] == NEW


def test_a_run_is_finished_once_its_last_epoch_is_saved() -> None:
    directory = RunDirectory(write_run("a", config(), epochs_done=2, written_at=1), ALONE)
    assert [is_finished(directory, epochs) for epochs in (1, 2, 3)] == [True, True, False]


def test_jobs_of_a_sweep_share_no_folder() -> None:
    given = {"run_name": "a", "checkpoint_path": None, "lr": 1.0}
    assert names_in_sweep(given, 3) == {"run_name": "a-3"}
    assert names_in_sweep({"checkpoint_path": "runs/b"}, 0) == {"checkpoint_path": "runs/b-0"}
    assert names_in_sweep({"run_name": None}, 0) == {}


def test_settings_that_do_not_count_exist() -> None:
    assert set(MACHINE_KEYS) | set(NAME_KEYS) <= set(RunConfig.model_fields)
    assert not set(comparable(config().model_dump())) & set(MACHINE_KEYS + NAME_KEYS)
