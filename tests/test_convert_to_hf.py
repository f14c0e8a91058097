"""A run becomes a folder that transformers loads and that answers as our engine, or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    MAX_SEQ_LEN,
    exported,
    greedy,
    hf_model,
    hf_tokenizer,
    loaded,
    options_of,
    tensors_in,
    write_run,
)
from net_cases import tiny_config
from transformers import pipeline

import conversion.convert_to_hf as convert_to_hf
from conversion.convert_to_hf import export
from conversion.exported_tokenizer import prompt_text
from data_io.prompt_format import PromptFormat
from training.checkpoint import read_checkpoint

PROMPTS = ["what is 7 times 6?", "rev neon", "a"]
NATIVE = (
    *("hrm", "trm", "trm_match_recurrence"),
    pytest.param("hrm causal", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("hf") / "run")


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """Its export, for tests that only read it."""
    return exported(run, run.parent / "out")


def texts_of(prompts: list[str], prompt_format: PromptFormat) -> list[str]:
    return [prompt_text(prompt_format, "direct", prompt) for prompt in prompts]


def generated(model: Any, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Answers of one batch, up to and including the stop token."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    stop = tokenizer.eos_token_id
    return [each[: each.index(stop) + 1] if stop in each else each for each in answers]


@pytest.mark.parametrize("label", NATIVE)
def test_native_nets_agree_in_transformers(
    label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", label)
    folder = exported(run, tmp_path / "deep" / "out")
    told = capsys.readouterr().out
    assert "fsdp2_epoch_2 (epoch 2, step 40, EMA weights)" in told
    found = re.search(r"largest difference of logits (\S+) in float32 \(tolerance 0\.0001\)", told)
    assert found and float(found[1]) <= 1e-4
    assert json.loads((folder / "config.json").read_text())["model_type"] == "hrm_text"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "deep"}
    source, model, tokenizer = loaded(run), hf_model(folder), hf_tokenizer(folder)
    expected = greedy(source, PROMPTS)
    texts = texts_of(PROMPTS, source.prompt_format)
    assert generated(model, tokenizer, texts[-1:]) == expected[-1:]
    assert len(expected[-1]) > 20  # what generate() stops at where nothing else is said
    room = MAX_SEQ_LEN - max(len(tokenizer(text).input_ids) for text in texts)
    assert [each[:room] for each in generated(model, tokenizer, texts)] == [
        each[:room] for each in expected
    ]
    assert greedy(loaded(folder), PROMPTS) == expected


def test_raw_weights_are_taken_where_asked_for(run: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(run / "fsdp2_epoch_2")
    for flag, use_ema in (("true", True), ("false", False)):
        folder = exported(run, tmp_path / flag, "--ckpt_use_ema", flag, "--ckpt_epoch", "2")
        stored = checkpoint.load_weights(use_ema=use_ema)
        name = "model.L_module.layers.0.mlp.down_proj.weight"
        assert torch.equal(tensors_in(folder)[name], stored[name])


@pytest.mark.parametrize("label", ["ut", "hrm with another H"])
def test_other_nets_come_with_code(
    label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", label)
    folder = exported(run, tmp_path / "out")
    told = capsys.readouterr().out
    assert "format    a modelling file in the folder (trust_remote_code=True): hrm_text " in told
    assert "(with the code in it)" in told
    assert "modelling files in this folder are run" in (folder / "README.md").read_text()
    assert greedy(loaded(folder), PROMPTS) == greedy(loaded(run), PROMPTS)


def test_a_net_without_class_is_refused_where_code_is_not_wanted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "rins")
    with pytest.raises(ValueError, match="--native_only: hrm_text has no net like rins"):
        export(options_of(run, tmp_path / "out", "--native_only"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_with_code_the_pipeline_is_right(run: Path, tmp_path: Path) -> None:
    """It drops token_type_ids; without code the prompt is read causally and the answer differs."""
    with_code = exported(run, tmp_path / "out", "--with_code")
    source = loaded(run)
    texts = texts_of(PROMPTS, source.prompt_format)
    expected = [source.prompt_format.decode(each) for each in greedy(source, PROMPTS)]

    def answers(folder: Path, **settings: Any) -> list[str]:
        pipe = pipeline("text-generation", str(folder), dtype=torch.float32, **settings)
        made: Any = [pipe(text, return_full_text=False, do_sample=False) for text in texts]
        return [each[0]["generated_text"] for each in made]

    assert answers(with_code, trust_remote_code=True) == expected
    bare = exported(run, tmp_path / "bare")
    assert answers(bare) != expected
    assert "drop `token_type_ids`" in (bare / "README.md").read_text()
    assert "drop `token_type_ids`" not in (with_code / "README.md").read_text()


def test_the_published_snippet_runs_unchanged(run: Path, folder: Path) -> None:
    model, tokenizer = hf_model(folder), hf_tokenizer(folder)
    condition = "<|quad_end|><|object_ref_end|>"  # synth,cot
    inputs = tokenizer(f"<|im_start|>{condition}{PROMPTS[0]}<|im_end|>", return_tensors="pt")
    inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = output[0][inputs["input_ids"].shape[1] :].tolist()
    assert answer == greedy(loaded(run), PROMPTS[:1], "synth,cot")[0][:12]


def test_large_weights_are_split(run: Path, folder: Path, tmp_path: Path) -> None:
    parts = exported(run, tmp_path / "out", "--max_file_gib", "0.00005")
    names = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    whole = tensors_in(folder)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert set(index["weight_map"]) == set(whole) and set(index["weight_map"].values()) == {*names}
    torch.testing.assert_close(tensors_in(parts), whole, atol=0, rtol=0)
    assert greedy(loaded(parts), PROMPTS) == greedy(loaded(folder), PROMPTS)


def test_weights_are_rounded_where_asked_for(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounded = exported(run, tmp_path / "out", "--dtype", "bfloat16")
    assert re.search(r"in float32 .*, \S+ computed in bfloat16 over", capsys.readouterr().out)
    expected = {name: tensor.bfloat16() for name, tensor in tensors_in(folder).items()}
    torch.testing.assert_close(tensors_in(rounded), expected, atol=0, rtol=0)
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    assert hf_model(rounded).dtype == torch.float32  # as asked for there


def shifted(write: Callable[..., int]) -> Callable[..., int]:
    """Writes one weight a little off."""

    def writing(folder: Path, *args: Any, **settings: Any) -> int:
        from safetensors.torch import load_file, save_file

        count = write(folder, *args, **settings)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"][40] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return count

    return writing


def test_a_folder_that_differs_is_withdrawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_to_hf, "write_weights", shifted(convert_to_hf.write_weights))
    with pytest.raises(ValueError, match=r"logits differ by up to .* more than 0\.0001"):
        exported(run, tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_differs_withdraws_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conversion import exported_tokenizer

    wrong = exported_tokenizer._TEMPLATE.replace('~ "\\n\\n"', '~ "\\n"')
    assert wrong != exported_tokenizer._TEMPLATE
    monkeypatch.setattr(exported_tokenizer, "_TEMPLATE", wrong)
    with pytest.raises(ValueError, match="chat template makes other ids than training"):
        exported(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--ckpt_path", "nowhere", "--out_dir", "out"], 2, "error: nowhere is no run directory"),
        (["--ckpt_path", "x", "--out_dir", "y", "--ckpt_use_ema", "perhaps"], 2, "neither true no"),
        (["--help"], 0, ""),
    ],
)
def test_the_command_line(
    arguments: list[str],
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["convert_to_hf", *arguments])
    with pytest.raises(SystemExit) as ended:
        convert_to_hf.main()
    assert ended.value.code == code
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_odd_settings_are_exported(tmp_path: Path) -> None:
    net = tiny_config("hrm", norm_eps=1e-3, rope_theta=50.0, init_type="megatron", init_std=0.2)
    run = write_run(tmp_path / "run", net)
    folder = exported(run, tmp_path / "out")
    assert greedy(loaded(folder), PROMPTS) == greedy(loaded(run), PROMPTS)
