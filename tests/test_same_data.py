"""A run goes on with the data and tokenizer that it began with, on all ranks, or says why not."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import (
    PRETRAIN,
    TINY,
    assert_refused,
    run_pretrain,
    start_command,
    write_tiny_data,
)
from run_cases import ALONE, run_config

from data_io.sampled_format import SampledData
from training.checkpoint import METADATA_FILE, Checkpoint, Progress
from training.environment import keep_tokenizer
from training.same_data import agree_on_data, data_record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sampled data, and the directory of a run that has begun on it."""
    data = SampledData.open(write_tiny_data(tmp_path / "data"))
    run = tmp_path / "run"
    run.mkdir()
    (run / METADATA_FILE).write_text(yaml.safe_dump(data.metadata.train_metadata()))
    keep_tokenizer(run, data)
    (run / "record.json").write_text(json.dumps(data_record(data, 2)))
    return tmp_path


def continued(
    folder: Path, *, data: str = "data", checkpoint: Checkpoint | None = None, **settings: Any
) -> list[str]:
    """What is said where the run goes on with the data as it is now."""
    config = run_config(folder / "run", **settings)
    recorded = json.loads((folder / "run/record.json").read_text())
    found = SampledData.open(folder / data)
    return agree_on_data(
        folder / "run", found, config, recorded=recorded, checkpoint=checkpoint, world=ALONE
    )


def flip(file: Path) -> None:
    np.save(file, np.flip(np.load(file)))


def change_tokens(data: Path) -> None:
    flip(data / "tokens.npy")


def change_an_index(data: Path) -> None:
    flip(data / "epoch_1/inst_len.npy")


def rename_a_token(data: Path) -> None:
    file = data / "tokenizer.json"
    file.write_text(file.read_text().replace("quad_start", "Quad_start"))


def swap_roles(data: Path) -> None:
    metadata = json.loads((data / "metadata.json").read_text())
    info = metadata["tokenizer_info"]
    info["eoq"], info["eoa"] = info["eoa"], info["eoq"]
    (data / "metadata.json").write_text(json.dumps(metadata))


CHANGES: dict[Callable[[Path], None], str] = {
    change_tokens: "changed: tokens.npy",
    change_an_index: "changed: epoch_1/inst_len.npy",
    rename_a_token: "<|Quad_start|>', '<|quad_start|>' there",
    swap_roles: "eoq is ",
}


def test_the_same_data_needs_no_word(folder: Path) -> None:
    assert continued(folder) == []
    shutil.copytree(folder / "data", folder / "moved")
    assert continued(folder, data="moved") == []
    (folder / "data/tokenizer.json").unlink()
    assert continued(folder) == []  # it cannot be compared, and nothing reads it


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder / "data")
    with pytest.raises(ValueError, match=r"is not what .*run was trained on") as raised:
        continued(folder)
    assert CHANGES[change] in str(raised.value)
    assert "another run_name, or go on" in str(raised.value)
    (note,) = continued(folder, allow_other_data=True)
    assert note.startswith("data        other than before, as allow_other_data=true admits: ")
    assert CHANGES[change] in note


def test_many_changed_files_are_counted(folder: Path) -> None:
    for file in (folder / "data").glob("epoch_*/inst_*.npy"):
        flip(file)
    with pytest.raises(ValueError, match=r"changed: epoch_0/inst_\w+.npy, .* and 1 more\)"):
        continued(folder)


def test_data_with_fewer_epochs_than_it_had_is_other_data(folder: Path) -> None:
    write_tiny_data(folder / "shorter", epochs=1)
    with pytest.raises(ValueError, match=r"epoch_1/inst_\w+.npy is gone"):
        continued(folder, data="shorter")


def test_the_checkpoint_s_own_record_counts(folder: Path) -> None:
    """Of a run that went on with other data and fell back to a checkpoint from before."""
    before = Checkpoint(folder, Progress(step=3), {}, data_record(of(folder / "data"), 2)["data"])
    change_tokens(folder / "data")
    (folder / "run/record.json").write_text(json.dumps(data_record(of(folder / "data"), 2)))
    assert continued(folder) == []
    assert continued(folder, checkpoint=replace(before, data=None)) == []
    with pytest.raises(ValueError, match="other files or other content"):
        continued(folder, checkpoint=before)
    (folder / "run/record.json").write_text("{}")  # environment.json was deleted
    with pytest.raises(ValueError, match="other files or other content"):
        continued(folder, checkpoint=before)


def of(folder: Path) -> SampledData:
    return SampledData.open(folder)


def test_a_run_goes_on_with_other_data_only_where_that_is_admitted(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    data = write_tiny_data(folder / "data", examples=125)
    line = (*TINY, "data.path=data", "epochs=2", "run_name=a", "data_workers=0")
    run_pretrain(*line, "max_steps=9", cwd=folder).check()
    run = folder / "checkpoints/data/a"
    progress = json.loads((run / "fsdp2_step_9/progress.json").read_text())
    environment = json.loads((run / "environment.json").read_text())["choices"]
    assert progress["data"] == environment["data"] == data_record(of(data), 2)["data"]

    shutil.rmtree(data)
    write_tiny_data(data, examples=20)  # it ends before the run's position in it
    told = ("is not what checkpoints/data/a was trained on (changed: ", "allow_other_data=true")
    assert_refused(folder, *line, told=told)
    (run / "environment.json").unlink()
    assert_refused(folder, *line, told=("other files or other content",))
    told = ("stands at example", "epoch 0 in data has 20; give larger data")
    assert_refused(folder, *line, "allow_other_data=true", told=told)
    shutil.rmtree(data)
    write_tiny_data(data, examples=150)
    goes_on = run_pretrain(*line, "allow_other_data=true", cwd=folder).check()
    assert "data        other than before, as allow_other_data=true admits" in goes_on.stdout
    assert "done:" in goes_on.stdout
    run_pretrain(*line, cwd=folder).check()  # it is the run's data from here on


@pytest.mark.dist
@pytest.mark.slow
def test_a_node_with_other_data_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in range(2):
        folder = tmp_path / f"node{rank}"  # each has its own disk
        write_tiny_data(folder / "data")
        if rank == 1:
            change_an_index(folder / "data")
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        line = (*TINY, "global_batch_size=128", "data.path=data", "epochs=2")
        line = (*line, f"checkpoint_path={tmp_path / 'run'}")
        nodes.append(start_command(str(PRETRAIN), *line, cwd=folder, environment=place))
    host = socket.gethostname()
    for node in nodes:
        done = node.wait()
        assert done.code == 2 and "Traceback" not in done.stderr
        told = f"rank 1 on {host} (changed: epoch_1/inst_len.npy)"
        assert f"error: data is not the same on all ranks: other data than rank 0 on {host}" in (
            done.stderr
        )
        assert told in done.stderr
        assert not (tmp_path / "run").exists()
