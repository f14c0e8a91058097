"""Questions from sampled data: its ids are asked as they are, if they are the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking_cases import Program, assert_refused, prompt_format, write_run

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from scripts import answer
from simple_inference_engine import ModelOptions, load_model

LIMIT = "max_output_tokens=6"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def ask(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(answer.main, monkeypatch, capsys, (f"ckpt_path={run}",))


def write_sampled(folder: Path, rows: list[tuple[str, str, str]], **changes: Any) -> Path:
    """Sampled data of (condition, prompt, truth) rows."""
    form = prompt_format()
    named = {"tokenizer_path": str(folder), "boq": BOQ, "eoq": EOQ, "eoa": EOA, **changes}
    info = TokenizerInfo(condition_mapping=dict(CONDITION_TOKENS), vocab_size=287, **named)
    parts = [
        part
        for condition, prompt, truth in rows
        for part in (form.encode_prompt(condition, prompt), form.encode_response(truth))
    ]
    lens = np.array([len(part) for part in parts])
    starts = np.concatenate(([0], lens.cumsum()[:-1]))
    with SampledWriter(folder, info, max_seq_len=99) as writer:
        write_byte_tokenizer(writer.staging)
        writer.add_tokens(np.concatenate(parts))
        writer.add_epoch(EpochIndex(starts[::2], lens[::2], starts[1::2], lens[1::2]))
    return folder


def test_sampled_data_is_asked_by_its_ids(run: Path, ask: Program, tmp_path: Path) -> None:
    folder = write_sampled(tmp_path / "data", [("direct", "train row", "x")])
    rows = [("synth,cot", f"{EOQ} é 1", "a b"), ("direct", "2", "c"), ("cot", "y" * 70, "d")]
    write_sampled(folder / "held", rows)
    output = tmp_path / "out.jsonl"
    done = ask(f"data.path={folder}", "split=held", f"output={output}", LIMIT)
    assert done.code == 0 and "index 2" in done.stdout
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["condition"], line["prompt"], line["truth"]) for line in lines] == rows
    loaded = load_model(ModelOptions(ckpt_path=run))
    asked = [row[:2] for row in rows[:2]]
    for expected in loaded.engine.generate(asked, loaded.prompt_format, max_new_tokens=6):
        assert lines[expected.index]["answer"] == expected.text
    ask(f"data.path={folder}", "split=train", f"output={tmp_path / 'train.jsonl'}", LIMIT)
    (line,) = (tmp_path / "train.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "train row"
    for split in ("split=test", "split=../data", "split=null"):
        done = ask(f"data.path={folder}", split, f"output={tmp_path / 'no.jsonl'}")
        assert_refused(done, "it has train, held")


def test_data_of_another_tokenizer_is_refused(ask: Program, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'out.jsonl'}"
    roles = write_sampled(tmp_path / "roles", [("direct", "a", "b")], eoa="<|endoftext|>")
    assert_refused(ask(f"data.path={roles}", "split=train", output), "eoa is <|endoftext|>")
    ids = write_sampled(tmp_path / "ids", [("direct", "a", "b")])
    file = ids / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    assert_refused(ask(f"data.path={ids}", "split=train", output), "'b' in the data, 'a' in")
