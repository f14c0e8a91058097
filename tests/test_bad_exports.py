"""What cannot be exported is refused with the reason, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from export_cases import bpe_tokenizer, exported, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("hf") / "run")


def edit(name: str, before: str, after: str) -> Callable[[Path], object]:
    def changing(run: Path) -> None:
        text = (run / name).read_text()
        assert before in text
        (run / name).write_text(text.replace(before, after))

    return changing


def no_digests(run: Path) -> None:
    (run / "fsdp2_epoch_2" / "digests.json").unlink()


BREAKS = {
    "not a run directory": (lambda run: (run / "all_config.yaml").unlink(), "is no run directory"),
    "an incomplete checkpoint": (no_digests, "holds no complete checkpoint"),
    "an unknown net": (edit("all_config.yaml", "name: hrm", "name: mamba"), "no architecture"),
    "a tokenizer that is gone": (lambda run: (run / "tokenizer.json").unlink(), "is gone"),
    "a tokenizer without the tokens": (
        edit("tokenizer.json", "<|im_start|>", "<|other|>"),
        "is not the tokenizer of",
    ),
    "data without framing": (edit("train_metadata.yaml", "  eoq:", "  #"), "lacks eoq"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_bad_input_is_refused_and_leaves_nothing(kind: str, run: Path, tmp_path: Path) -> None:
    change, told = BREAKS[kind]
    copy = shutil.copytree(run, tmp_path / "run")
    change(copy)
    elsewhere = (copy / "train_metadata.yaml").read_text().replace(str(run), str(copy))
    (copy / "train_metadata.yaml").write_text(elsewhere)
    with pytest.raises((ValueError, OSError), match=told):
        exported(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_in_place_of_its_run_is_told_apart(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{run} is one: name that, and the epoch"):
        exported(run / "fsdp2_epoch_2", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ckpt_epoch", "7"], "no fsdp2_epoch_7; it has fsdp2_epoch_2"),
        (["--ckpt_step", "3"], "no fsdp2_step_3"),
        (["--ckpt_step", "3", "--ckpt_epoch", "2"], "name two checkpoints"),
        (["--tokenizer_path", "nowhere"], "nowhere"),
    ],
)
def test_what_is_not_there_is_named(
    arguments: list[str], told: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=told):
        exported(run, tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_averages_has_none_to_export(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", keeps_ema=False)
    with pytest.raises(ValueError, match="holds no EMA weights"):
        exported(run, tmp_path / "out", "--ckpt_use_ema", "true")
    card = (exported(run, tmp_path / "out") / "README.md").read_text()
    assert "| weights | raw, float32 |" in card


def test_another_tokenizer_than_the_data_s_is_refused(run: Path, tmp_path: Path) -> None:
    bpe_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="other ids"):
        exported(run, tmp_path / "out", "--tokenizer_path", str(tmp_path / "tokenizer.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_folder_in_use_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is there and not empty"):
        exported(run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "out" / "thesis.tex").unlink()
    exported(run, tmp_path / "out")  # empty: it may be written
