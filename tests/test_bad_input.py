"""Bad input ends with exit code 2 and one message, and leaves no file behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import (
    PRETRAIN,
    TINY,
    VOCAB_SIZE,
    files_in,
    resolved,
    run_pretrain,
    start_command,
    write_tiny_data,
)

from pretrain import set_up
from training.distributed import World

Breaking = Callable[[Path], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sampled data of two epochs."""
    return write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=30)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """The directory of a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = (f"data.path={source}", "epochs=1", "run_name=whole", *TINY)
    run_pretrain(*arguments, cwd=folder).check()
    return folder / "checkpoints/data/whole"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty working directory."""
    path = tmp_path / "work"
    path.mkdir()
    return path


def assert_refused(cwd: Path, *arguments: str, told: tuple[str, ...]) -> None:
    """The command says what is wrong, once, and changes no file."""
    before = files_in(cwd)
    done = run_pretrain(*arguments, cwd=cwd)
    assert done.code == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr) < 1000
    for text in told:
        assert text in done.stderr
    assert files_in(cwd) == before


def cut(name: str) -> Breaking:
    """Takes the last third of a file away."""

    def breaking(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return breaking


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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
        set_up(config, [], world)
    assert not list(folder.iterdir())


def break_run(run: Path, name: str) -> None:
    """Damages a run directory in one way."""
    checkpoint = run / "fsdp2_epoch_1"
    match name:
        case "published in part":
            (checkpoint / "digests.json").unlink()
        case "a tensor file changed":
            flip_last_byte(checkpoint / "model/__0_0.distcp")
        case "a tensor file is missing":
            (checkpoint / "ema/__0_0.distcp").unlink()
        case "metadata cut":
            cut("model/.metadata")(checkpoint)
        case "progress cut":
            cut("progress.json")(checkpoint)
        case "digests cut":
            cut("digests.json")(checkpoint)
        case "no run's configuration":
            (run / "all_config.yaml").write_text("lr: 1.0\n")
        case "configuration unreadable":
            (run / "all_config.yaml").write_text("arch: [")
        case "environment unreadable":
            (run / "environment.json").write_text("{")
        case "configuration missing":
            (run / "all_config.yaml").unlink()


DAMAGED = "the checkpoint is damaged"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("published in part", ("is no complete checkpoint",)),
        ("a tensor file changed", ("model/__0_0.distcp does not match its digest", DAMAGED)),
        ("a tensor file is missing", ("ema/__0_0.distcp is missing", DAMAGED)),
        ("metadata cut", ("model/.metadata does not match its digest", DAMAGED)),
        ("progress cut", ("progress.json does not match its digest", DAMAGED)),
        ("digests cut", ("digests.json cannot be read", DAMAGED)),
        ("no run's configuration", ("all_config.yaml holds no run's configuration",)),
        ("configuration unreadable", ("all_config.yaml cannot be read",)),
        ("configuration missing", ("is no run directory (all_config.yaml is missing)",)),
    ],
)
def test_a_run_to_start_from_that_is_not_whole(
    damage: str, told: tuple[str, ...], trained: Path, source: Path, folder: Path
) -> None:
    run = folder.parent / "broken"
    shutil.copytree(trained, run)
    break_run(run, damage)
    arguments = (f"data.path={source}", "epochs=2", f"resume_from={run}", *TINY)
    assert_refused(folder, *arguments, told=told)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("a tensor file changed", ("no checkpoint that can be continued from", DAMAGED)),
        ("configuration unreadable", ("all_config.yaml cannot be read",)),
        (
            "configuration missing",
            ("holds something, but no run", "choose another checkpoint_path"),
        ),
        ("environment unreadable", ("environment.json cannot be read", "delete it")),
    ],
)
def test_a_run_to_continue_that_is_not_whole(
    damage: str, told: tuple[str, ...], trained: Path, source: Path, folder: Path
) -> None:
    run = folder / "run"
    shutil.copytree(trained, run)
    break_run(run, damage)
    longer = ("epochs=2", "schedule_steps=99")  # a schedule of given length may go on
    arguments = (f"data.path={source}", "checkpoint_path=run", *longer, *TINY)
    assert_refused(folder, *arguments, told=told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["resume_from={run}", "arch/net@arch=ut"], ("arch.name is hrm there, ut here",)),
        (
            ["resume_from={run}", "arch.n_layers=4"],
            ("another architecture", "arch.n_layers is 2 there, 4 here", "leave that out"),
        ),
        (["resume_from={run}", "resume_epoch=9"], ("fsdp2_epoch_9 is no complete checkpoint",)),
        (["checkpoint_path={run}", "arch.num_heads=4"], ("arch.num_heads is 2 there, 4 here",)),
        (["checkpoint_path={run}"], ("epochs=2, but", "was begun with epochs=1", "new_run=true")),
        (["checkpoint_path={run}", "new_run=true"], ("new_run=true, but", "already holds a run")),
    ],
)
def test_a_run_that_does_not_fit(
    arguments: list[str], told: tuple[str, ...], trained: Path, source: Path, folder: Path
) -> None:
    before = files_in(trained)
    arguments = [argument.format(run=trained) for argument in arguments]
    assert_refused(folder, f"data.path={source}", "epochs=2", *TINY, *arguments, told=told)
    assert files_in(trained) == before


def test_another_vocabulary(trained: Path, source: Path, folder: Path) -> None:
    data = folder.parent / "wider"
    shutil.copytree(source, data)
    metadata = json.loads((data / "metadata.json").read_text())
    metadata["tokenizer_info"]["vocab_size"] = 1000
    (data / "metadata.json").write_text(json.dumps(metadata))
    arguments = (f"data.path={data}", "epochs=1", f"resume_from={trained}", *TINY)
    told = ("has a vocabulary of 1024 ids, but", "was trained with 512", "make the data with that")
    assert_refused(folder, *arguments, told=told)


def test_another_tokenizer_of_the_same_size(trained: Path, source: Path, folder: Path) -> None:
    data = folder.parent / "renamed"
    shutil.copytree(source, data)
    metadata = json.loads((data / "metadata.json").read_text())
    metadata["tokenizer_info"]["tokenizer_path"] = str(data)
    (data / "metadata.json").write_text(json.dumps(metadata))
    tokenizer = data / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("quad_start", "Quad_start"))
    arguments = (f"data.path={data}", "epochs=1", f"resume_from={trained}", *TINY)
    told = ("has another vocabulary than", "Quad_start|>' here", "quad_start|>' there")
    assert_refused(folder, *arguments, told=told)


def test_average_weights_that_were_not_kept(source: Path, trained: Path, folder: Path) -> None:
    run = folder.parent / "without"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "fsdp2_epoch_1/ema")
    arguments = (f"data.path={source}", "epochs=1", f"resume_from={run}", *TINY)
    told = ("holds no EMA weights; leave weights_only_resume_from_ema out",)
    assert_refused(folder, *arguments, "weights_only_resume_from_ema=true", told=told)


def test_the_traceback_is_shown_where_it_is_asked_for(source: Path, folder: Path) -> None:
    command = (str(PRETRAIN), f"data.path={source}", "epochs=9")
    done = start_command(*command, cwd=folder, environment={"HYDRA_FULL_ERROR": "1"}).wait()
    assert done.code == 1
    assert "Traceback" in done.stderr and "but epochs=9 are asked for" in done.stderr
