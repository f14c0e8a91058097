"""A folder of Hugging Face becomes a run directory that is asked and fine-tuned as any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run_pretrain, write_tiny_data
from export_cases import exported, greedy, loaded, tensors_in, write_run
from net_cases import NETS, read_case
from run_cases import TinyRun, run_config
from test_exported_folder import GATE, golden_examples, rewrite, split

from conversion import convert_from_hf
from conversion.convert_from_hf import convert
from conversion.parity import packed_logits
from training.export_format import ARCH_ADAPTER
from training.inherited_arch import ChosenArch, inherit_arch
from training.run_records import choose_checkpoint, stored_config
from training.starting import find_start

PROMPTS = ["rev neon", "a"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, what it is exported to, and what that becomes."""
    place = tmp_path_factory.mktemp("from_hf")
    write_run(place / "run")
    convert(exported(place / "run", place / "out", is_compared=False), place / "imported")
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("label", ["hrm", "ut", "hrm with another H"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_changes_no_bit(label: str, dtype: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", label)
    there = exported(run, tmp_path / "there", "--dtype", dtype, is_compared=False)
    convert(there, tmp_path / "back")
    again = exported(tmp_path / "back", tmp_path / "again", "--dtype", dtype, is_compared=False)
    assert contents(again) == contents(there)
    if dtype == "float32":
        checkpoint = choose_checkpoint(run)
        weights = choose_checkpoint(tmp_path / "back").load_weights(use_ema=True)
        expected = checkpoint.load_weights(use_ema=True)
        torch.testing.assert_close(weights, expected, atol=0, rtol=0)


def test_a_shared_stack_becomes_two(tmp_path: Path) -> None:
    """Nothing in the folder says that the levels are one, so that trm comes back as hrm."""
    run = write_run(tmp_path / "run", "trm")
    there = exported(run, tmp_path / "there", is_compared=False)
    convert(there, tmp_path / "back")
    stored = stored_config(tmp_path / "back")
    assert stored is not None and stored["arch"]["name"] == "hrm"
    assert greedy(loaded(tmp_path / "back"), PROMPTS) == greedy(loaded(run), PROMPTS)
    again = exported(tmp_path / "back", tmp_path / "again", is_compared=False)
    torch.testing.assert_close(tensors_in(again), tensors_in(there), atol=0, rtol=0)


def test_an_imported_run_is_asked_wherever_it_lies(place: Path, tmp_path: Path) -> None:
    expected = greedy(loaded(place / "run"), PROMPTS)
    assert greedy(loaded(place / "imported"), PROMPTS) == expected
    moved = shutil.copytree(place / "imported", tmp_path / "moved")
    source = loaded(moved)
    assert greedy(source, PROMPTS) == expected
    assert (tmp_path / "moved" / "tokenizer.json").is_file()


def test_weights_are_stored_once_and_kept_apart_in_name(place: Path) -> None:
    checkpoint = choose_checkpoint(place / "imported")
    checkpoint.verify()
    model, ema = (checkpoint.path / name / "__0_0.distcp" for name in ("model", "ema"))
    assert model.stat().st_ino == ema.stat().st_ino
    raw = checkpoint.load_weights(use_ema=False)
    torch.testing.assert_close(raw, checkpoint.load_weights(use_ema=True), atol=0, rtol=0)
    assert {tensor.dtype for tensor in raw.values()} == {torch.float32, torch.bfloat16}


def test_the_records_are_those_of_a_run(place: Path) -> None:
    stored = stored_config(place / "imported")
    assert stored is not None
    assert ARCH_ADAPTER.validate_python(stored["arch"]).stacks() == NETS["hrm"].stacks()
    raw = {"resume_from": str(place / "imported"), "arch": {"name": "hrm", "n_layers": 32}}
    inherited, _ = inherit_arch(raw, ChosenArch(frozenset(), frozenset()))
    assert inherited["arch"]["n_layers"] == 2


def test_fine_tuning_starts_from_it(place: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    write_tiny_data(work / "data", epochs=1)
    tuning = (
        *("--config-name", "cfg_sft", "data.path=data", f"resume_from={place / 'imported'}"),
        *("+checkpoint_path=tuned", "global_batch_size=64", "epochs=1", "max_steps=2"),
        *("linear=mkl", "device=cpu"),
    )
    done = run_pretrain(*tuning, "weights_only_resume_from_ema=true", cwd=work).check()
    assert "imported/fsdp2_epoch_1 (EMA weights; a fresh optimizer)" in done.stdout
    assert "was None" not in done.stdout  # an imported run knows no settings to differ from


def test_a_plain_start_from_it_says_what_to_add(place: Path, tmp_path: Path) -> None:
    tiny = TinyRun(tmp_path / "run")
    config = run_config(tmp_path / "run", resume_from=str(place / "imported"))
    with pytest.raises(ValueError, match=r"no optimizer state.*weights_only_resume_from_ema=true"):
        find_start(tiny.directory, config)


def test_it_cannot_be_continued_but_started_from(place: Path) -> None:
    tiny = TinyRun(place / "imported")
    told = "nothing to continue.*resume_from=.*imported weights_only_resume_from_ema=true"
    with pytest.raises(ValueError, match=told):
        find_start(tiny.directory, run_config(place / "imported"))


def test_golden_export_becomes_a_run(golden_hf: Path, tmp_path: Path) -> None:
    """It has no tokenizer: its weights are a run's, but there are no words to ask it in."""
    convert(golden_hf / "model", tmp_path / "run")
    stored = stored_config(tmp_path / "run")
    assert stored is not None
    examples, expected = golden_examples(golden_hf)
    tiny: Any = TinyRun(tmp_path / "other")
    model = type(tiny.model)(
        ARCH_ADAPTER.validate_python(stored["arch"]),
        read_case(golden_hf)["hf_config_used"]["vocab_size"],
        tiny.model.attention,
    )
    model.load_state_dict(choose_checkpoint(tmp_path / "run").load_weights(use_ema=True))
    for logits, case in zip(packed_logits(model, examples), expected, strict=True):
        torch.testing.assert_close(logits, case, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="tokenizer_info lacks"):
        loaded(tmp_path / "run")


def test_a_folder_as_published_is_taken(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Split names, the inflated number of layers, and nothing of ours beside the tokenizer."""
    folder = shutil.copytree(place / "out", tmp_path / "out")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|box_end|>"}')
    rewrite(folder, split)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_layers_per_stack": 1, "num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "run")
    assert "prompt tokens: the published ones" in capsys.readouterr().out
    assert greedy(loaded(tmp_path / "run"), PROMPTS) == greedy(loaded(place / "run"), PROMPTS)
    assert greedy(loaded(folder), PROMPTS) == greedy(loaded(place / "run"), PROMPTS)


def test_a_fixed_vector_of_other_precision_is_kept_and_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(place / "out", tmp_path / "out")
    rewrite(folder, lambda tensors: tensors["model.z_L_init"].add_(1e-4))
    convert(folder, tmp_path / "run")
    assert "z_L_init is finer than bfloat16" in capsys.readouterr().out
    again = exported(tmp_path / "run", tmp_path / "again", is_compared=False)
    assert "does not know how they were trained" in (again / "README.md").read_text()
    exported(tmp_path / "run", tmp_path / "rounded", "--dtype", "bfloat16")
    torch.testing.assert_close(tensors_in(again), tensors_in(folder), atol=0, rtol=0)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def deeper(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))


def biased(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))


def larger_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["more"] = 600
    path.write_text(json.dumps(tokenizer))


def of_size(key: str, value: int) -> Callable[[Path], None]:
    def changing(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))

    return changing


def half_a_projection(folder: Path) -> None:
    rewrite(folder, lambda tensors: (split(tensors), tensors.pop(GATE)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (no_config, "no folder with a config.json; download it first, e.g. hf download"),
        (deeper, "published exporter"),
        (biased, "our nets cannot be that: attention_bias is True"),
        (larger_tokenizer, "is not the tokenizer of .*: its 601 ids"),
        (half_a_projection, "gate_up_proj.weight not once"),
        (of_size("vocab_size", 2**40), r"lm_head.weight has shape \[\d+, 32\]"),
        (of_size("vocab_size", 2**62), "is larger than any; the file is damaged"),
        (of_size("intermediate_size", 2**40), "proj.weight has shape"),
    ],
)
def test_what_cannot_be_taken_leaves_nothing(
    change: Any, told: str, place: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(place / "out", tmp_path / "out")
    change(folder)
    with pytest.raises((ValueError, OSError), match=told):
        convert(folder, tmp_path / "deep" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_on_the_way_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(convert_from_hf, "_store_once", full)
    with pytest.raises(OSError, match="no space left"):
        convert(place / "out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_no_folder_to_import(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a run directory already"):
        convert(place / "run", tmp_path / "again")


def test_a_folder_in_use_is_left_alone(place: Path) -> None:
    with pytest.raises(ValueError, match="is there and not empty"):
        convert(place / "out", place / "run")


def test_code_in_the_folder_is_not_run_and_not_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "ut")
    folder = exported(run, tmp_path / "out", is_compared=False)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('ran')")
    convert(folder, tmp_path / "back")
    assert not list((tmp_path / "back").glob("**/*.py"))
    assert (
        yaml.safe_load((tmp_path / "back" / "all_config.yaml").read_text())["arch"]["cycles"] == 4
    )


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["convert_from_hf", "--hf_path", str(tmp_path), "--out_dir", str(tmp_path / "x")]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as ended:
        convert_from_hf.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no folder with a config.json")
