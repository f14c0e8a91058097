"""Runs of the original trainer that cannot be taken over are refused, and nothing is left."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_cases import (
    CONFIG,
    METADATA,
    assert_refused,
    edit,
    stored_of,
    tiny_run,
    write_checkpoint,
)

from conversion.convert_from_reference import convert, main
from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from simple_inference_engine import ModelOptions, load_model
from training.checkpoint import EMA, OPTIMIZER
from training.run_records import choose_checkpoint
from training.tensor_store import METADATA_FILE as INDEX_FILE
from training.tensor_store import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return tiny_run(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        (CONFIG, lambda it: it["arch"].update(name="baselines.new@Net"), "baselines.new@Net is no"),
        (CONFIG, lambda it: it["arch"].update(twist=3), r"arch\.twist=3: Extra inputs"),
        (CONFIG, lambda it: it.update(lr=-1.0), r"all_config.yaml has settings .*lr=-1.0"),
        (CONFIG, lambda it: it.pop("epochs"), "epochs is required"),
        (CONFIG, lambda it: it.pop("arch"), "no arch section"),
        (CONFIG, lambda it: it["arch"].update(n_layers=8), r"it lacks model\..*layers\.1"),
        (METADATA, lambda it: it.update(vocab_size=1024), r"embed_tokens.*has shape \[512, 32\]"),
        (METADATA, lambda it: it.pop("max_seq_len"), "max_seq_len: Field required"),
        (METADATA, lambda it: it.update(tokenizer_info=3), "tokenizer_info: "),
    ],
)
def test_settings_that_do_not_fit_are_named(
    theirs: Path, file: str, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    edit(theirs / file, change)
    assert_refused(theirs, told)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (CONFIG, "no run directory"),
        (METADATA, "train_metadata.yaml is missing"),
        (f"fsdp2_epoch_1/{INDEX_FILE}", r"no whole checkpoint .*epochs: none"),
        ("fsdp2_epoch_1/__0_0.distcp", "fsdp2_epoch_1"),
    ],
)
def test_what_is_missing_is_named(theirs: Path, file: str, told: str) -> None:
    (theirs / file).unlink()
    assert_refused(theirs, told)


def test_an_epoch_that_is_not_there_is_answered_with_those_that_are(theirs: Path) -> None:
    shutil.copytree(theirs / "fsdp2_epoch_1", theirs / "fsdp2_epoch_12")
    (theirs / "fsdp2_epoch_13").mkdir()
    assert_refused(theirs, r"no whole checkpoint of epoch 3 .*epochs: 1, 12$", epoch=3)


def test_epochs_that_were_not_written_whole_are_left_out_and_named(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (theirs / "fsdp2_epoch_2").mkdir()
    convert(theirs, theirs.parent / "run")
    assert "epoch 2 is left out: it was not written whole" in capsys.readouterr().out
    assert choose_checkpoint(theirs.parent / "run").progress.epoch == 1


def test_a_run_of_ours_is_refused(theirs: Path) -> None:
    convert(theirs, theirs.parent / "ours")
    with pytest.raises(ValueError, match="is a run of ours already"):
        convert(theirs.parent / "ours", theirs.parent / "again")


def test_a_folder_that_holds_something_is_left_alone(theirs: Path) -> None:
    (theirs.parent / "run").mkdir()
    (theirs.parent / "run" / "thesis.txt").write_text("precious")
    assert_refused(theirs, "run is there and not empty")


class Payload:
    """Pickles as a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_nothing_in_a_run_is_executed(theirs: Path) -> None:
    marker = theirs.parent / "marker"
    (theirs / "carry_epoch_1.0.pt").write_bytes(pickle.dumps(Payload(marker)))
    (theirs / "model.py").write_text(f"open({str(marker)!r}, 'w')")
    convert(theirs, theirs.parent / "ours")
    metadata = theirs / "fsdp2_epoch_1" / INDEX_FILE
    metadata.write_bytes(pickle.dumps(Payload(marker)))
    shutil.rmtree(theirs.parent / "ours")
    assert_refused(theirs, "may be malicious")
    (theirs / CONFIG).write_text(f"arch: !!python/object/apply:os.system ['touch {marker}']")
    assert_refused(theirs, "all_config.yaml cannot be read")
    assert not marker.exists()


def test_parameters_that_never_had_a_gradient_begin_where_they_would(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_tensors(theirs / "fsdp2_epoch_1")
    untrained = "embed_tokens.embedding_weight"
    kept = {
        name: t for name, t in content.items() if not name.startswith(f"optim.state.{untrained}")
    }
    write_checkpoint(theirs / "fsdp2_epoch_1", kept)
    convert(theirs, theirs.parent / "run")
    stored = stored_of(choose_checkpoint(theirs.parent / "run"))
    ours = "model.embed_tokens.weight"
    assert f"never trained: {ours}" in capsys.readouterr().out
    torch.testing.assert_close(stored[EMA][ours], content[f"model.{untrained}"], atol=0, rtol=0)
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        assert not stored[OPTIMIZER][f"{kind}.{ours}"].any()
    assert stored[OPTIMIZER]["step.lm_head.weight"] == 7


def test_a_run_without_first_moment_or_average_has_none_here(theirs: Path) -> None:
    content = read_tensors(theirs / "fsdp2_epoch_1")
    kept = {name: t for name, t in content.items() if not name.endswith(("exp_avg", "param_ema"))}
    write_checkpoint(theirs / "fsdp2_epoch_1", kept)
    assert_refused(theirs, r"no tensor 'optim.state.*other optimizer settings")
    edit(theirs / CONFIG, lambda it: it.update(beta1=0.0, ema=None))
    convert(theirs, theirs.parent / "run")
    checkpoint = choose_checkpoint(theirs.parent / "run")
    assert not checkpoint.has_ema
    kinds = {name.partition(".")[0] for name in read_tensors(checkpoint.path / OPTIMIZER)}
    assert kinds == {"step", "exp_avg_sq"}


def test_the_tokenizer_comes_along_and_the_run_can_be_asked(theirs: Path) -> None:
    write_byte_tokenizer(theirs.parent / "tokenizer")
    info = {"tokenizer_path": str(theirs.parent / "tokenizer"), "boq": BOQ, "eoq": EOQ, "eoa": EOA}
    info |= {"condition_mapping": dict(CONDITION_TOKENS)}
    edit(theirs / METADATA, lambda it: it.update(tokenizer_info=info))
    convert(theirs, theirs.parent / "run")
    shutil.rmtree(theirs.parent / "tokenizer")
    loaded = load_model(ModelOptions(ckpt_path=theirs.parent / "run", device="cpu"))
    (answer,) = loaded.engine.generate([("direct", "a")], loaded.prompt_format, max_new_tokens=3)
    assert answer.finish_reason in ("length", "stop")


def test_settings_without_a_place_here_are_told(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"wandb_entity": "x", "resume_from": "elsewhere", "weights_only_resume_from_ema": True}
    edit(theirs / CONFIG, lambda it: it.update(more))
    edit(theirs / METADATA, lambda it: it["tokenizer_info"].update(language="en"))
    convert(theirs, theirs.parent / "run")
    told = capsys.readouterr().out
    assert "wandb_entity='x' is left out: nothing here reads it" in told
    assert "resume_from=elsewhere is left out: it has happened already" in told
    assert "tokenizer_info.language='en' is left out" in told
    assert "3 of 4 epochs are left" in told and "resume_from=" in told


def test_the_command_says_what_is_wrong_in_one_line(
    theirs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--ckpt_path", str(theirs / "nowhere"), "--out_dir", str(theirs.parent / "run")]
    monkeypatch.setattr("sys.argv", ["convert_from_reference", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
