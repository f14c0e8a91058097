"""The tokenizer of an export marks the prefix, and its chat template makes the ids of training."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from export_cases import (
    MAX_SEQ_LEN,
    bpe_tokenizer,
    exported,
    hf_tokenizer,
    loaded,
    write_run,
)

from conversion.exported_tokenizer import prompt_text
from data_io.prompt_format import PromptFormat


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("hf") / "run")


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """Its export, for tests that only read it."""
    return exported(run, run.parent / "out", is_compared=False)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer_and_format(
    request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, PromptFormat, Path]:
    if request.param == "bytes":
        folder = exported(run, tmp_path_factory.mktemp("bytes") / "out", is_compared=False)
        return hf_tokenizer(folder), loaded(run).prompt_format, folder
    place = tmp_path_factory.mktemp("bpe")
    with_bpe = write_run(place / "run", tokenizer=bpe_tokenizer())
    folder = exported(with_bpe, place / "out", is_compared=False)
    return hf_tokenizer(folder), loaded(with_bpe).prompt_format, folder


def test_the_tokenizer_marks_the_prefix(
    tokenizer_and_format: tuple[Any, PromptFormat, Path], tmp_path: Path
) -> None:
    tokenizer, prompt_format, _ = tokenizer_and_format
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, hf_tokenizer(tmp_path)):
        text = prompt_text(prompt_format, "synth,cot", " what's\n 42 é日 ")
        made = each([text, "b"], padding=True)
        ids = prompt_format.encode_prompt("synth,cot", " what's\n 42 é日 ")
        assert made["input_ids"][0] == ids
        assert made["token_type_ids"][0] == [1] * len(ids) == made["attention_mask"][0]
        padding = len(ids) - 1
        assert made["token_type_ids"][1] == [0] * padding + [1] == made["attention_mask"][1]
        pair = each("ab", "cde")
        assert pair["token_type_ids"] == [1] * len(each("ab").input_ids) + [0] * len(
            each("cde").input_ids
        )
        assert (each.bos_token, each.eos_token, each.pad_token) == (
            *("<|im_start|>", "<|box_end|>"),
            "<|PAD|>",
        )
        assert each.model_max_length == MAX_SEQ_LEN
    kept = json.loads((tmp_path / "tokenizer_config.json").read_text())["prompt_format"]
    assert kept["condition_mapping"] == dict(prompt_format.conditions)
    assert (kept["boq"], kept["eoq"], kept["eoa"]) == ("<|im_start|>", "<|im_end|>", "<|box_end|>")


CONVERSATION = [
    ("system", "Be brief. \n"),
    ("user", " Hi 'there'\n"),
    ("assistant", "{{ Hello }}"),
    ("user", "what's 42?"),
]


@pytest.mark.parametrize("condition", [None, "synth,cot", "synth, cot", "noisy"])
@pytest.mark.parametrize("turns", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]])
def test_the_chat_template_makes_the_ids_of_training(
    tokenizer_and_format: tuple[Any, PromptFormat, Path],
    condition: str | None,
    turns: list[tuple[str, str]],
) -> None:
    tokenizer, prompt_format, _ = tokenizer_and_format
    messages = [{"role": role, "content": text} for role, text in turns]
    given = {} if condition is None else {"condition": condition}
    made = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, **given
    )
    expected = prompt_format.encode_conversation(condition or "direct", turns)
    assert made["input_ids"] == expected
    assert made["token_type_ids"] == [1] * len(expected)


@pytest.mark.parametrize(
    ("roles", "condition", "told"),
    [
        (["user"], "smart", "condition=smart is unknown; known are cot, direct, noisy, synth"),
        (["user"], "synth,", "condition=synth, is unknown"),
        (["user", "user"], "cot", "message 2 is of user: after a system message"),
        (["assistant"], "cot", "message 1 is of assistant"),
        (["user", "assistant"], "cot", "nothing to answer"),
        (["user", "system"], "cot", "message 2 is of system"),
    ],
)
def test_the_chat_template_refuses(
    folder: Path, roles: list[str], condition: str, told: str
) -> None:
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(Exception, match=re.escape(told)):
        hf_tokenizer(folder).apply_chat_template(
            messages, condition=condition, add_generation_prompt=True
        )


def test_a_model_with_other_conditions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", conditions={"short": "<|cot|>"})
    tokenizer = hf_tokenizer(exported(run, tmp_path / "out", is_compared=False))
    chat = partial(
        tokenizer.apply_chat_template, [{"role": "user", "content": "x"}], tokenize=False
    )
    assert chat(condition="short") == "<|im_start|><|cot|>x<|im_end|>"
    with pytest.raises(Exception, match="condition= is unknown; known are short"):
        chat()


def test_a_model_without_conditions_asks_for_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", conditions={})
    folder = exported(run, tmp_path / "out", is_compared=False)
    tokenizer = hf_tokenizer(folder)
    chat = partial(
        tokenizer.apply_chat_template, [{"role": "user", "content": "x"}], tokenize=False
    )
    assert chat() == "<|im_start|>x<|im_end|>"
    with pytest.raises(Exception, match="this model has no conditions"):
        chat(condition="direct")
    assert "condition=" not in (folder / "README.md").read_text()


def test_without_a_padding_token_nothing_pads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    path = run / "tokenizer.json"
    path.write_text(path.read_text().replace("<|PAD|>", "<|first|>"))
    folder = exported(run, tmp_path / "out", is_compared=False)
    assert "has no <|PAD|>: prompts of different lengths go one by one" in capsys.readouterr().out
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["pad_token_id"] is None
