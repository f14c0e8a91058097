"""A tokenizer file as a prompt format, and the copy that travels with data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.loaded_format import LoadedFormat
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import CONDITION_TOKENS


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_byte_tokenizer(tmp_path / "tokenizer")


def test_the_published_conditions_are_those_whose_tokens_are_there(tokenizer: Path) -> None:
    assert LoadedFormat.load(tokenizer).prompt_format.conditions == dict(CONDITION_TOKENS)
    content = json.loads(tokenizer.read_text())
    dropped = CONDITION_TOKENS["noisy"]
    content["added_tokens"] = [
        each for each in content["added_tokens"] if each["content"] != dropped
    ]
    tokenizer.write_text(json.dumps(content))
    assert set(LoadedFormat.load(tokenizer).prompt_format.conditions) == {"direct", "cot", "synth"}
    with pytest.raises(ValueError, match="add_special=true"):
        LoadedFormat.load(tokenizer, conditions={"noisy": dropped})


def test_data_travel_with_the_file_as_it_was(tokenizer: Path, tmp_path: Path) -> None:
    loaded = LoadedFormat.load(tokenizer)
    with (
        pytest.raises(ValueError, match="no epoch was added"),
        SampledWriter(tmp_path / "data", loaded.info(tmp_path / "data"), max_seq_len=9) as writer,
    ):
        loaded.accompany(writer)
        copy, record = (writer.staging / f"tokenizer{end}.json" for end in ("", "_info"))
        assert copy.read_bytes() == tokenizer.read_bytes()
        info = TokenizerInfo.model_validate_json(record.read_bytes())
        assert info == writer.metadata.tokenizer_info and info.vocab_size == 287


def test_a_tokenizer_that_got_tokens_is_written_with_them(tokenizer: Path, tmp_path: Path) -> None:
    framing = ("<|ask|>", "<|asked|>", "<|box_end|>")
    loaded = LoadedFormat.load(tokenizer, framing=framing, add_special=True)
    loaded.put_tokenizer(tmp_path)
    again = PromptFormat.from_info(loaded.info(tmp_path), tmp_path)
    assert again.encode_prompt("direct", "a <|ask|>") == loaded.prompt_format.encode_prompt(
        "direct", "a <|ask|>"
    )
    assert again.boq_id == 287
