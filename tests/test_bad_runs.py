"""A run that is to be continued or started from, and is damaged or does not fit, is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import TINY, assert_refused, cut, files_in, run_pretrain, write_tiny_data


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


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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
    told = ("has another vocabulary than", "1024 ids, 512 there", "make the data with that run's")
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
    told = ("has another vocabulary than", "Quad_start|>', '<|quad_start|>' there")
    assert_refused(folder, *arguments, told=told)


def test_average_weights_that_were_not_kept(source: Path, trained: Path, folder: Path) -> None:
    run = folder.parent / "without"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "fsdp2_epoch_1/ema")
    arguments = (f"data.path={source}", "epochs=1", f"resume_from={run}", *TINY)
    told = ("holds no EMA weights; leave weights_only_resume_from_ema out",)
    assert_refused(folder, *arguments, "weights_only_resume_from_ema=true", told=told)
