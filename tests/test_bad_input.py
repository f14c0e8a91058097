"""Bad input ends with exit code 2 and one message, and leaves no file behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import (
    PRETRAIN,
    TINY,
    assert_refused,
    cut,
    resolved,
    start_command,
    write_tiny_data,
)

from pretrain import prepare
from torture.tiny_runs import VOCAB_SIZE
from training.distributed import World

Breaking = Callable[[Path], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sampled data of two epochs."""
    return write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty working directory."""
    path = tmp_path / "work"
    path.mkdir()
    return path


def put(name: str, index: int, value: int, dtype: type = np.int64) -> Breaking:
    """Writes one value into an array."""

    def breaking(folder: Path) -> None:
        array = np.load(folder / name).astype(dtype)
        array[index] = value
        np.save(folder / name, array)

    return breaking


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (shutil.rmtree, ("is no folder of sampled data; make one with",)),
        (
            lambda data: (data / "metadata.json").unlink(),
            ("metadata.json is missing from the sampled folder; sample the data again",),
        ),
        (lambda data: (data / "tokens.npy").unlink(), ("tokens.npy is missing",)),
        (lambda data: (data / "epoch_1/resp_len.npy").unlink(), ("epoch_1/resp_len.npy is miss",)),
        (lambda data: shutil.rmtree(data / "epoch_1"), ("holds 1 prepared epochs, but epochs=2",)),
        (cut("tokens.npy"), ("tokens.npy is no whole .npy file",)),
        (cut("epoch_0/inst_start.npy"), ("inst_start.npy is no whole .npy file",)),
        (cut("metadata.json"), ("metadata.json is not a sampled folder's metadata",)),
        (
            put("epoch_1/resp_start.npy", 7, 1000),
            ("epoch_1/resp_start.npy: example 7 has resp_start=1000", "within the 1000 tokens"),
        ),
        (put("epoch_0/inst_start.npy", 3, -1), ("example 3 has inst_start=-1",)),
        (put("epoch_0/inst_len.npy", 0, 0), ("example 0 has inst_len=0",)),
        (
            put("tokens.npy", 400, VOCAB_SIZE, np.uint16),
            (f"id {VOCAB_SIZE} in tokens 0 to ", f"is not in 0..{VOCAB_SIZE - 1}"),
        ),
    ],
)
def test_data_that_is_not_whole(
    breaking: Breaking, told: tuple[str, ...], source: Path, folder: Path
) -> None:
    data = folder.parent / "broken"
    shutil.copytree(source, data)
    breaking(data)
    assert_refused(folder, f"data.path={data}", "epochs=2", *TINY, told=told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["epochs=5"], ("2 prepared epochs, but epochs=5", "or train for fewer")),
        (["global_batch_size=16"], ("example ", "batch_max_length=16")),
        (["global_batch_size=100000"], ("makes no step", "use fewer tokens in a batch")),
        (["lr_warmup_steps=5000"], ("lr_warmup_steps=5000 is not shorter than the run of",)),
        (["arch.hidden_size=100", "arch.num_heads=3"], ("e.g. hidden_size=102",)),
        (["lr=abc", "seed=1.5"], ("lr=abc must be a valid number\nseed=1.5 must be a valid int",)),
        (["lrr=3"], ("unknown key 'lrr'; did you mean lr?",)),
        (["+arch.H_override.xx=3"], ("unknown key 'arch.H_override.xx'",)),
        (["arch/net@arch=hrn"], ("did you mean hrm?",)),
        (["arch/size@arch=XXXL"], ("did you mean XXL?",)),
        (["data=resoning"], ("did you mean reasoning?",)),
        (["--config-name", "cfg_stf"], ("did you mean cfg_sft?",)),
        (["--lr=1e-3"], ("written without dashes",)),
        (["lr=1e-3,3e-3"], ("'lr=1e-3,3e-3'", "add --multirun")),
        (["-m", "lr=-1,1e-3"], ("lr=-1 must be greater than 0",)),
        (["lr=[1"], ("error: lr=[1 no viable alternative",)),
        (["lr=${nothing}"], ("nothing",)),
        (["run_name=a", "seed"], ("'seed' is no override",)),
        (["resume_from=nowhere"], ("resume_from=nowhere is no run directory",)),
        (["checkpoint_path=''"], ("checkpoint_path= ",)),
        (["attention=flash3"], ("flash3",)),
    ],
)
def test_settings_that_cannot_be(
    arguments: list[str], told: tuple[str, ...], source: Path, folder: Path
) -> None:
    assert_refused(folder, f"data.path={source}", "epochs=1", *TINY, *arguments, told=told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(source: Path, folder: Path) -> None:
    told = ("device=cuda is not available here; this machine has cpu",)
    assert_refused(folder, f"data.path={source}", "epochs=1", *TINY, "device=cuda", told=told)


@pytest.mark.parametrize(("batch", "use"), [(63, 64), (1, 2)])
def test_a_batch_that_ranks_cannot_share(
    batch: int, use: int, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    config = resolved(f"data.path={source}", *TINY, f"global_batch_size={batch}")
    world = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"={batch} is not divisible by the 2 ranks.* {use}$"):
        prepare(config, [], world)
    assert not list(folder.iterdir())


def test_the_traceback_is_shown_where_it_is_asked_for(source: Path, folder: Path) -> None:
    command = (str(PRETRAIN), f"data.path={source}", "epochs=9")
    done = start_command(*command, cwd=folder, environment={"HYDRA_FULL_ERROR": "1"}).wait()
    assert done.code == 1
    assert "Traceback" in done.stderr and "but epochs=9 are asked for" in done.stderr
