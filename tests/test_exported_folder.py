"""Folders in the format of Hugging Face are read whole and safely, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import VOCAB_SIZE, hf_model, tensors_in
from net_cases import NETS, build, read_case
from safetensors.torch import load_file, save_file
from torch import Tensor

from conversion.parity import Example, packed_logits
from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import CONDITION_TOKENS
from inference.exported_folder import ExportedModel, is_exported, read_exported
from inference.model_folder import ModelOptions, open_model
from models.language_model import LanguageModel
from training.export_format import FramingIds, export_config, why_not_native

IDS = FramingIds(boq=6, eoq=7, eoa=11, pad=None)
FUSED = {"attn.gqkv_proj": ("gate", "q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}


def write_folder(folder: Path, label: str = "hrm", vocab_size: int = VOCAB_SIZE) -> LanguageModel:
    """A folder without a tokenizer, and the model in it."""
    net = NETS[label]
    model = build(net, vocab_size)
    folder.mkdir()
    config = export_config(
        net,
        is_native=why_not_native(net) is None,
        vocab_size=vocab_size,
        max_seq_len=64,
        ids=IDS,
    )
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return model


def loaded(exported: ExportedModel) -> LanguageModel:
    model = build(exported.arch, exported.vocab_size)
    exported.load_into(model)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split(tensors: dict[str, Tensor]) -> None:
    """As transformers names the parts in memory."""
    for name in list(tensors):
        for fused, parts in FUSED.items():
            if fused in name:
                block = "self_attn" if fused.startswith("attn") else "mlp"
                pieces = tensors.pop(name).chunk(len(parts))
                for part, piece in zip(parts, pieces, strict=True):
                    tensors[name.replace(fused, f"{block}.{part}_proj")] = piece.clone()
        if "attn.o_proj" in name:
            tensors[name.replace("attn.o", "self_attn.o")] = tensors.pop(name)


def assert_same(one: LanguageModel, other: LanguageModel) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


def golden_examples(golden_hf: Path) -> tuple[list[Example], list[Tensor]]:
    """The sequences of a case, which are those of its net's case, and their logits."""
    case = read_case(golden_hf)
    net = golden_hf.parent.parent / "nets" / case["net_case"]
    batch = load_file(net / read_case(net)["files"]["batch"])
    expected = load_file(golden_hf / "logits.safetensors")
    examples, logits, start = [], [], 0
    for index in range(len(expected)):
        prefix_len = int(batch["prefix_lens"][index])
        end = start + prefix_len + int(batch["causal_lens"][index])
        examples.append(Example(tuple(batch["inputs"][start:end].tolist()), prefix_len))
        logits.append(expected[f"seq{index}.logits"])
        start = end
    return examples, logits


def test_golden_export_is_read(golden_hf: Path) -> None:
    examples, expected = golden_examples(golden_hf)
    model = loaded(read_exported(golden_hf / "model"))
    for logits, case in zip(packed_logits(model, examples), expected, strict=True):
        torch.testing.assert_close(logits, case, atol=2e-5, rtol=0)


@torch.no_grad()
def test_golden_export_in_transformers(golden_hf: Path) -> None:
    examples, expected = golden_examples(golden_hf)
    model = hf_model(golden_hf / "model")
    for example, case in zip(examples, expected, strict=True):
        types = (torch.arange(len(example.ids)) < example.prefix_len).long()
        logits = model(torch.tensor([example.ids]), token_type_ids=types[None]).logits[0]
        torch.testing.assert_close(logits, case, atol=2e-5, rtol=0)


def test_golden_export_of_the_published_exporter_is_refused(
    golden_hf: Path, tmp_path: Path
) -> None:
    """Its layer count is that of both stacks: transformers would fill half of them at random."""
    folder = shutil.copytree(golden_hf / "model", tmp_path / "model")
    published = json.loads((folder / "config.json").read_text())
    layers = published.pop("num_layers_per_stack", published["num_hidden_layers"])
    (folder / "config.json").write_text(json.dumps({**published, "num_hidden_layers": 2 * layers}))
    with pytest.raises(ValueError, match="published exporter writes the total of both stacks"):
        read_exported(folder)


@pytest.mark.parametrize("label", NETS)
def test_every_net_is_read(label: str, tmp_path: Path) -> None:
    net = NETS[label]
    if why_not_native(net) is None and len(net.stacks()) == 1:
        return  # trm's own stack stands for two in a native folder: see test_convert_to_hf
    model = write_folder(tmp_path / "out", label)
    assert is_exported(tmp_path / "out")
    exported = read_exported(tmp_path / "out")
    assert_same(loaded(exported), model)
    assert (exported.vocab_size, exported.max_seq_len) == (VOCAB_SIZE, 64)


def test_split_projections_are_put_together(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "out")
    rewrite(tmp_path / "out", split)
    assert any("self_attn.q_proj" in name for name in tensors_in(tmp_path / "out"))
    assert_same(loaded(read_exported(tmp_path / "out")), model)


def test_files_of_an_index_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    model = write_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(loaded(read_exported(folder)), model)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        read_exported(folder)
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\.\./elsewhere.* no path is followed"):
        read_exported(folder)


def test_a_model_keeps_its_type(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "out")
    rounded = build(NETS["hrm"], VOCAB_SIZE).to(torch.bfloat16)
    read_exported(tmp_path / "out").load_into(rounded)
    assert_same(rounded, model.to(torch.bfloat16))


GATE = "model.H_module.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.z_L_init"), r"model\.z_L_init not; the folder"),
        (lambda t: t.update({"visual.weight": torch.ones(2)}), r"visual\.weight, which its net"),
        (lambda t: t.update({GATE: torch.ones(2)}), r"H_module.*gate_up_proj\.weight not once"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(256, 32)}),
            r"lm_head\.weight has shape \[256, 32\], but .* wants \[512, 32\]",
        ),
    ],
)
def test_other_tensors_than_the_nets_are_refused(
    change: Callable[[dict[str, Tensor]], object], told: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "out")
    rewrite(tmp_path / "out", change)
    with pytest.raises(ValueError, match=told):
        loaded(read_exported(tmp_path / "out"))


def test_half_of_a_split_projection_is_not_enough(tmp_path: Path) -> None:
    write_folder(tmp_path / "out")
    rewrite(tmp_path / "out", lambda t: (split(t), t.pop(GATE)))
    with pytest.raises(ValueError, match=r"H_module\.layers\.0\.mlp\.gate_up_proj\.weight not"):
        loaded(read_exported(tmp_path / "out"))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (cut_weights, "model.safetensors is no whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").write_text('{"model_type": "qwen3"}'), "model_type='qwen3'"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    ],
)
def test_a_broken_folder_is_named(
    change: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        read_exported(tmp_path / "out")


def test_code_in_a_folder_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "ut")
    (tmp_path / "out" / "modeling_recurrent_lm.py").write_text("raise SystemExit('ran')")
    loaded(read_exported(tmp_path / "out"))


def with_tokenizer(folder: Path, settings: dict[str, Any] | None) -> Path:
    write_folder(folder)
    config = (folder / "config.json").read_text()
    write_byte_tokenizer(folder)
    (folder / "config.json").write_text(config)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_the_framing_tokens_are_those_that_the_exporter_wrote(tmp_path: Path) -> None:
    framing = {
        "boq": "<think>",
        "eoq": "</think>",
        "eoa": "<|endoftext|>",
        "condition_mapping": {"brief": "<|cot|>"},
    }
    exported = read_exported(with_tokenizer(tmp_path / "out", {"prompt_format": framing}))
    assert exported.notes == ()
    assert exported.tokenizer_info.model_dump(exclude_none=True) == {
        **framing,
        "tokenizer_path": str(tmp_path / "out"),
    }
    prompts = PromptFormat.from_info(exported.tokenizer_info)
    assert prompts.decode(prompts.encode_prompt("brief", "one")) == "one"


@pytest.mark.parametrize("settings", [None, {"eos_token": "<|box_end|>"}])
def test_the_published_tokens_are_taken_and_told(
    settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    exported = read_exported(with_tokenizer(tmp_path / "out", settings))
    info = exported.tokenizer_info
    assert (info.boq, info.eoq, info.eoa) == ("<|im_start|>", "<|im_end|>", "<|box_end|>")
    assert info.condition_mapping == dict(CONDITION_TOKENS)
    (note,) = exported.notes
    assert "the published ones" in note


def test_a_tokenizer_without_them_leaves_them_open(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "out", None)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    exported = read_exported(folder)
    assert exported.tokenizer_info.boq is None
    assert "does not say which tokens frame a prompt" in exported.notes[0]
    (folder / "tokenizer.json").unlink()
    assert "cannot be asked in words" in read_exported(folder).notes[0]
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json, so it cannot be asked"):
        open_model(ModelOptions(ckpt_path=folder, device="cpu"))


def test_unreadable_framing_is_refused(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "out", {"prompt_format": {"boq": 3}})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: prompt_format cannot be read"):
        read_exported(folder)
