"""A checkpoint comes back bit for bit or not at all, and failures leave older ones as they were."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from net_cases import build, read_case
from run_cases import ALONE, TinyRun, by_our_names, whole_state
from safetensors.torch import load_file
from torch import Tensor

import training.checkpoint
import training.publishing
from training.checkpoint import PROGRESS_FILE, Progress, RunDirectory, read_checkpoint
from training.digests import DIGESTS_FILE
from training.export_format import arch_from_reference
from training.parts import recover
from training.run_records import stored_config, stored_metadata
from training.tensor_store import read_tensors


def saved(path: Path, *steps: int, **settings: Any) -> TinyRun:
    run = TinyRun(path, **settings).create()
    run.save_steps(*(steps or (3,)))
    return run


def assert_restored(run: TinyRun, expected: dict[str, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(
        whole_state(run.model, run.optimizer), expected, atol=0, rtol=0, check_stride=True
    )


@pytest.mark.parametrize("net", ["hrm", "transformer"])
@pytest.mark.parametrize("settings", [{}, {"ema": None}, {"betas": (0.0, 0.95)}])
def test_everything_comes_back_bit_for_bit(
    tmp_path: Path, net: str, settings: dict[str, Any]
) -> None:
    run = TinyRun(tmp_path / "run", net=net, **settings).create()
    run.step()
    expected = whole_state(run.model, run.optimizer)
    log_state = {"loss": 0.1 + 0.2, "scored_tokens": 2**60 + 1}
    run.save("fsdp2_epoch_1", Progress(1, 0, 12, 3456), log_state)
    run.step()  # what is saved are not the tensors that go on changing
    other = TinyRun(tmp_path / "run", net=net, seed=2, **settings)
    (checkpoint,) = other.directory.checkpoints()
    assert checkpoint.progress == Progress(1, 0, 12, 3456)
    assert checkpoint.log_state == log_state
    assert checkpoint.has_ema == ("ema" in expected)
    checkpoint.restore(other.model, other.optimizer)
    assert_restored(other, expected)


def test_a_checkpoint_holds_tensors_and_two_files_of_json(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    names = {path.name for path in (run.directory.path / "fsdp2_step_3").iterdir()}
    assert names == {"model", "ema", "optimizer", PROGRESS_FILE, DIGESTS_FILE}
    record = json.loads((run.directory.path / "fsdp2_step_3" / PROGRESS_FILE).read_text())
    assert record == {"epoch": 0, "cursor": 0, "step": 3, "tokens": 0, "log_state": {}}
    assert {path.name for path in run.directory.path.iterdir()} == {
        "all_config.yaml",
        "train_metadata.yaml",
        "fsdp2_step_3",
    }


def test_the_furthest_checkpoint_comes_last(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save("fsdp2_step_10", Progress(0, 5, 10))
    run.save("fsdp2_epoch_1", Progress(1, 0, 10))
    run.save("fsdp2_step_9", Progress(0, 4, 9))
    found = [checkpoint.path.name for checkpoint in run.directory.checkpoints()]
    assert found == ["fsdp2_step_9", "fsdp2_step_10", "fsdp2_epoch_1"]


def test_what_was_not_published_is_ignored_and_cleaned(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    staging, foreign = run.directory.path / ".fsdp2_step_9", run.directory.path / "fsdp2_step_8"
    (staging / "model").mkdir(parents=True)
    (staging / DIGESTS_FILE).write_text("{}")
    (foreign / "model").mkdir(parents=True)  # the original writes in place
    assert [c.path.name for c in run.directory.checkpoints()] == ["fsdp2_step_3"]
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint \(digests.json is missi"):
        read_checkpoint(foreign)
    run.create()
    assert not staging.exists()
    assert (run.directory.path / "fsdp2_step_3").is_dir()


def damage(checkpoint: Path, folder: str, how: str) -> None:
    """Changes one file of a checkpoint."""
    if how == "another file":
        (checkpoint / folder / "__9_9.distcp").write_bytes(b"")
        return
    pattern = ".metadata" if how == "metadata" else "*.distcp"
    file = next((checkpoint / folder).glob(pattern))
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "metadata", "cut", "deleted", "another file"])
@pytest.mark.parametrize("folder", ["model", "ema", "optimizer"])
def test_damage_to_any_file_is_noticed_before_anything_is_loaded(
    tmp_path: Path, folder: str, how: str
) -> None:
    run = saved(tmp_path / "run")
    (checkpoint,) = run.directory.checkpoints()
    checkpoint.verify()
    damage(checkpoint.path, folder, how)
    run.step()
    before = whole_state(run.model, run.optimizer)
    for use in (checkpoint.verify, lambda: checkpoint.restore(run.model, run.optimizer)):
        with pytest.raises(ValueError, match=rf"{folder}/.*the checkpoint is damaged, use another"):
            use()
    assert_restored(run, before)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"model": 1', b"\xff\x00"])
@pytest.mark.parametrize("file", [PROGRESS_FILE, DIGESTS_FILE])
def test_damage_to_the_records_is_noticed(tmp_path: Path, file: str, content: bytes) -> None:
    run = saved(tmp_path / "run", 3, 4)
    path = run.directory.path / "fsdp2_step_4"
    (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"fsdp2_step_4/{file} .*the checkpoint is damaged"):
        read_checkpoint(path)
    assert [c.path.name for c in run.directory.checkpoints()] == ["fsdp2_step_3"]
    (reason,) = run.directory.damaged()
    assert f"fsdp2_step_4/{file}" in reason


def test_a_changed_number_in_the_progress_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "run").directory.path / "fsdp2_step_3"
    text = (path / PROGRESS_FILE).read_text()
    (path / PROGRESS_FILE).write_text(text.replace('"step": 3', '"step": 7'))
    with pytest.raises(ValueError, match="does not match its digest"):
        read_checkpoint(path)


def test_only_the_weights_that_are_wanted_are_read(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    expected = whole_state(run.model, run.optimizer)
    (checkpoint,) = run.directory.checkpoints()
    for folder in ("optimizer", "model"):
        for file in (checkpoint.path / folder).iterdir():
            file.write_bytes(b"")
    found = checkpoint.load_weights(use_ema=True)
    torch.testing.assert_close(found, expected["ema"], atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"model/.*does not match its digest"):
        checkpoint.load_weights(use_ema=False)


def test_raw_weights_are_read_where_no_average_was_kept(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", ema=None)
    (checkpoint,) = run.directory.checkpoints()
    weights = checkpoint.load_weights(use_ema=False)
    torch.testing.assert_close(weights, dict(run.model.state_dict()), atol=0, rtol=0)
    with pytest.raises(ValueError, match="holds no EMA weights; load the raw ones instead"):
        checkpoint.load_weights(use_ema=True)


@pytest.mark.parametrize("net", ["transformer", "hrm with another H"])
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path, net: str) -> None:
    (checkpoint,) = saved(tmp_path / "run").directory.checkpoints()
    other = TinyRun(tmp_path / "run", net=net, seed=2)
    before = whole_state(other.model, other.optimizer)
    with pytest.raises(ValueError, match=r"has no tensor|the model wants"):
        checkpoint.restore(other.model, other.optimizer)
    assert_restored(other, before)


def full_disk(_: pytest.MonkeyPatch) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def crash_before_publishing(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Path) -> None:
        raise OSError("stopped here")

    monkeypatch.setattr(training.checkpoint, "publish", crash)


def crash_while_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(training.publishing.os, "fsync", fail)


@pytest.mark.parametrize("fail", [full_disk, crash_before_publishing, crash_while_syncing])
@pytest.mark.parametrize("name", ["fsdp2_step_4", "fsdp2_step_3"])
def test_a_save_that_fails_leaves_older_checkpoints(tmp_path: Path, name: str, fail: Any) -> None:
    run = saved(tmp_path / "run")
    expected = whole_state(run.model, run.optimizer)
    run.step()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        try:
            with pytest.raises(OSError, match=r"cannot be written|stopped here|went away"):
                run.save(name, Progress(step=4))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    (checkpoint,) = run.directory.checkpoints()
    assert checkpoint.path.name == "fsdp2_step_3" and checkpoint.progress.step == 3
    newer = whole_state(run.model, run.optimizer)
    checkpoint.restore(run.model, run.optimizer)
    assert_restored(run, expected)
    assert not torch.equal(newer["model"]["lm_head.weight"], expected["model"]["lm_head.weight"])
    run.create().save(name, Progress(step=4))  # with room again
    assert run.directory.checkpoints()[-1].progress.step == 4
    assert not list(run.directory.path.glob(".fsdp2_*"))


def test_saving_again_replaces_a_checkpoint(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    run.step()
    run.save("fsdp2_step_3", Progress(step=3, tokens=5))
    (checkpoint,) = run.directory.checkpoints()
    assert checkpoint.progress.tokens == 5
    weights = checkpoint.load_weights(use_ema=False)
    torch.testing.assert_close(weights, dict(run.model.state_dict()), atol=0, rtol=0)


def test_golden_checkpoint_is_read_exactly(golden_checkpoint: Path) -> None:
    case, run = read_case(golden_checkpoint), golden_checkpoint / "run"
    tensors = read_tensors(run / f"fsdp2_epoch_{case['epochs']}")
    state = "optim.state."
    found = {name.removeprefix(state): t for name, t in tensors.items() if name.startswith(state)}
    found |= {
        f"{n.removeprefix('model.')}.param": t for n, t in tensors.items() if n[:5] != "optim"
    }
    for name, (total, magnitude, shape, dtype) in case["checksums"].items():
        kind, _, parameter = name.partition(".")
        tensor = found[f"{parameter}.{kind}"]
        assert (list(tensor.shape), str(tensor.dtype)) == (shape, dtype), name
        sums = float(tensor.double().sum()), float(tensor.double().abs().sum())
        assert sums == pytest.approx((total, magnitude), rel=1e-12, abs=1e-12), name
    expected = load_file(golden_checkpoint / "expected_ema.safetensors")
    averages = {name: found[f"{name}.param_ema"] for name in expected}
    torch.testing.assert_close(averages, expected, atol=0, rtol=0)


def test_golden_checkpoint_fits_the_model_that_its_settings_describe(
    golden_checkpoint: Path,
) -> None:
    case, run = read_case(golden_checkpoint), golden_checkpoint / "run"
    config, metadata = stored_config(run), stored_metadata(run)
    assert config is not None and config["seed"] == case["seed"]
    model = build(arch_from_reference(config["arch"]), metadata.vocab_size)
    tensors = read_tensors(run / f"fsdp2_epoch_{case['epochs']}")
    weights = by_our_names({n: t for n, t in tensors.items() if n.startswith("model.")}, "model.")
    model.load_state_dict(weights, strict=True)
    assert {str(buffer.dtype) for buffer in model.buffers()} <= {case["zL_init_dtype"]}


def test_configuration_and_data_record_are_there_from_the_start(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", ALONE).create({"lr": 0.1}, {"vocab_size": 512})
    read = {path.name: yaml.safe_load(path.read_text()) for path in (tmp_path / "run").iterdir()}
    assert read == {"all_config.yaml": {"lr": 0.1}, "train_metadata.yaml": {"vocab_size": 512}}


def test_a_checkpoint_that_was_being_replaced_is_brought_back(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "run").create()
    run.save("fsdp2_step_3", Progress(step=3))
    folder = run.directory.path
    (folder / "fsdp2_step_3").rename(folder / ".fsdp2_step_3.replaced")
    recover(run.directory)
    assert [c.path.name for c in run.directory.checkpoints()] == ["fsdp2_step_3"]
