"""What a run directory says of its run: checkpoints, configuration, data record, fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from commands import write_tiny_data
from run_cases import TinyRun, finished_run

from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from training.checkpoint import CONFIG_FILE, METADATA_FILE, PROGRESS_FILE, Progress
from training.environment import keep_tokenizer
from training.run_records import (
    choose_checkpoint,
    stored_config,
    stored_metadata,
    tokens_of_run,
)


def test_a_checkpoint_is_chosen_by_epoch_by_step_or_as_the_newest(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    run.save("fsdp2_step_7", Progress(1, 4, 7))
    assert choose_checkpoint(tmp_path).path.name == "fsdp2_epoch_2"
    assert choose_checkpoint(tmp_path, epoch=1).progress == Progress(1, 0, 5)
    assert choose_checkpoint(tmp_path, step=7).progress.cursor == 4
    with pytest.raises(FileNotFoundError, match="fsdp2_epoch_3 is no complete checkpoint"):
        choose_checkpoint(tmp_path, epoch=3)
    (tmp_path / "fsdp2_epoch_2" / PROGRESS_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"fsdp2_epoch_2.*delete it, or name another by its epoch"):
        choose_checkpoint(tmp_path)
    assert choose_checkpoint(tmp_path, epoch=1).progress.step == 5


def test_a_run_without_checkpoints_has_none_to_choose(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no complete checkpoint .*train it first"):
        choose_checkpoint(TinyRun(tmp_path).create().directory.path)


@pytest.mark.parametrize("text", ["a: [", "just text", "lr: 0.1", "arch: hrm", "\x00"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} (cannot be read|holds no run's config)"):
        stored_config(tmp_path)


def test_the_data_record_is_checked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{METADATA_FILE} is missing"):
        stored_metadata(tmp_path)
    (tmp_path / METADATA_FILE).write_text("vocab_size: many")
    with pytest.raises(ValueError, match=f"{METADATA_FILE} is no record of training data"):
        stored_metadata(tmp_path)
    for text in ("[]", "max_seq_len: 0", "{vocab_size: 256", "\t"):
        (tmp_path / METADATA_FILE).write_text(text)
        with pytest.raises(ValueError, match=METADATA_FILE) as told:
            stored_metadata(tmp_path)
        assert "\n" not in str(told.value)
    (tmp_path / METADATA_FILE).write_text(
        "{vocab_size: 256, max_seq_len: 32, total_length: 9, tokenizer_info: {}}"
    )
    assert stored_metadata(tmp_path).vocab_size == 256


def test_a_run_keeps_its_tokenizer(tmp_path: Path) -> None:
    data_folder, run = write_tiny_data(tmp_path / "data"), tmp_path / "run"
    data = SampledData.open(data_folder)
    TinyRun(run).create()
    (run / METADATA_FILE).write_text(yaml.safe_dump(data.metadata.train_metadata()))
    assert tokens_of_run(run)[0].tokenizer_path == data.metadata.tokenizer_info.tokenizer_path
    keep_tokenizer(run, data)
    text = (data_folder / "tokenizer.json").read_text()
    shutil.rmtree(data_folder)
    assert (run / "tokenizer.json").read_text() == text
    info, folder = tokens_of_run(run)
    assert PromptFormat.from_info(info, folder).encode_prompt("direct", "x")
    keep_tokenizer(run, data)  # the data's is gone: what is kept stays


def test_data_without_a_tokenizer_leaves_none(tmp_path: Path) -> None:
    data_folder = write_tiny_data(tmp_path / "data")
    (data_folder / "tokenizer.json").unlink()
    keep_tokenizer(tmp_path, SampledData.open(data_folder))
    assert not (tmp_path / "tokenizer.json").exists()
