"""`python -m training.checkpoint verify` finds every kind of damage; no good one is pruned away."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done, start_command
from run_cases import TinyRun

from training.checkpoint import Progress
from training.checkpoint_checks import main, verify
from training.parts import prune_steps


def steps_in(run: TinyRun) -> list[str]:
    return sorted(path.name for path in run.directory.path.glob("fsdp2_*"))


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "optimizer/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "model/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete_a_shard(checkpoint: Path) -> None:
    (checkpoint / "ema/__0_0.distcp").unlink()


def delete_a_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "optimizer")


def add_a_file(checkpoint: Path) -> None:
    (checkpoint / "model/__1_0.distcp").write_bytes(b"")


def change_the_progress(checkpoint: Path) -> None:
    text = (checkpoint / "progress.json").read_text()
    (checkpoint / "progress.json").write_text(text.replace('"step": 6', '"step": 7'))


def delete_the_digests(checkpoint: Path) -> None:
    (checkpoint / "digests.json").unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    cut_short: "fsdp2_step_6/optimizer/__0_0.distcp does not match its digest",
    flip_a_bit: "fsdp2_step_6/model/__0_0.distcp does not match its digest",
    delete_a_shard: "fsdp2_step_6/ema/__0_0.distcp is missing",
    delete_a_folder: "fsdp2_step_6/optimizer/.metadata is missing",
    add_a_file: "fsdp2_step_6/model/__1_0.distcp does not match its digest",
    change_the_progress: "fsdp2_step_6/progress.json does not match its digest",
    delete_the_digests: "fsdp2_step_6 is no complete checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3, 6)
    assert verify(tmp_path / "run") == 0
    sound = capsys.readouterr().out.splitlines()
    assert len(sound) == 2 * (2 + 3 * 2) + 1  # two records, and of each folder index and tensors
    assert sound[0] == "ok    fsdp2_step_3/digests.json"
    assert sound[-1].endswith("run: 2 checkpoints, sound")
    damage(tmp_path / "run/fsdp2_step_6")
    assert verify(tmp_path / "run") > 0
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL  ")]
    assert failed and DAMAGES[damage] in failed[0]
    assert [line for line in lines if "step_3" in line] == sound[:8]
    assert lines[-1].endswith(f"run: 2 checkpoints, {len(failed)} damaged")
    assert verify(tmp_path / "run/fsdp2_step_3") == 0
    assert verify(tmp_path / "run/fsdp2_step_6") == len(failed)


def verified(folder: Path, *arguments: str) -> Done:
    command = ("-m", "training.checkpoint", "verify", *arguments)
    return start_command(*command, cwd=folder).wait()


def test_the_exit_code_tells_sound_from_damaged_from_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    run = TinyRun(folder / "run").create()
    run.save("fsdp2_epoch_1", Progress(1, 0, 3))
    sound = verified(folder, "run")
    assert sound.code == 0, sound.stderr
    assert sound.stdout.endswith("run: 1 checkpoint, sound\n")
    flip_a_bit(folder / "run/fsdp2_epoch_1")
    assert verified(folder, "run").code == 1


@pytest.mark.parametrize(
    ("name", "told"), [("nowhere", "is no folder"), ("empty", "holds no checkpoint")]
)
def test_a_folder_without_checkpoints_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    told: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["checkpoint", "verify", str(tmp_path / name)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error


def test_pruning_keeps_the_last_ones(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3, 6, 9)
    prune_steps(run.directory, 2)
    assert steps_in(run) == ["fsdp2_step_6", "fsdp2_step_9"]


def test_pruning_never_removes_the_last_good_one(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3, 6, 8, 9)
    for name in ("fsdp2_step_8", "fsdp2_step_9"):
        flip_a_bit(tmp_path / "run" / name)
    prune_steps(run.directory, 1)  # 6 is the last good one
    assert steps_in(run) == ["fsdp2_step_6", "fsdp2_step_8", "fsdp2_step_9"]
    run.save_steps(12)
    prune_steps(run.directory, 1)
    assert steps_in(run) == ["fsdp2_step_12"]


def test_pruning_removes_nothing_where_nothing_is_good(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save_steps(3, 6, 9)
    for checkpoint in run.directory.checkpoints():
        flip_a_bit(checkpoint.path)
    prune_steps(run.directory, 1)
    assert len(steps_in(run)) == 3
