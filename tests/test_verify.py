"""`python -m data_io.verify`: sound data passes, and every broken rule is named with its file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenized_cases import Sources, numbered_rows

from data_io.console import run_command
from data_io.options import parse_options
from data_io.sample import SampleOptions, sample
from data_io.verify import main

Edit = Callable[[np.ndarray], np.ndarray]
TEXTS = [("direct", f"question {row}", f"answer {row}") for row in range(12)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenized data of two sources and the sampled data made of it."""
    folder = tmp_path_factory.mktemp("made")
    sources = Sources(folder / "tokenized")
    sources.add_texts("a.jsonl", TEXTS[:7])
    sources.add_texts("b__c.jsonl", TEXTS[7:])
    sample_with(sources.root, folder / "sampled")
    return folder


@pytest.fixture
def sampled(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "sampled", tmp_path / "sampled"))


@pytest.fixture
def tokenized(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "tokenized", tmp_path / "tokenized"))


def sample_with(tokenized: Path, output: Path, **options: object) -> None:
    given = {"prefix_config_path": "null", "epochs": 2} | options
    arguments = [f"{key}={value}" for key, value in given.items()]
    arguments += [f"tokenized_path={tokenized}", f"output_path={output}"]
    sample(parse_options(SampleOptions, arguments, ""))


def verified(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """(exit code, what was printed)"""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def change(path: Path, edit: Edit) -> None:
    np.save(path, edit(np.load(path)))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_sound_data_passes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = verified(capsys, made / "sampled")
    lines = out.splitlines()
    assert code == 0
    assert lines[-1].endswith("sampled: sound")
    assert {line[:6] for line in lines[:-1]} == {"ok    "}
    for told in ("tokens.npy", "scored.npy", "epoch_0", "epoch_1", "total_length", "framing"):
        assert sum(told in line for line in lines) == 1, told
    assert "all 2 are orders of the same rows" in out
    assert "sha256" in out

    code, out = verified(capsys, made / "tokenized")
    assert code == 0
    assert "sources: 2 with 12 rows" in out
    assert "framing: 12 rows begin and end as they should" in out


def test_golden_data_of_the_published_pipeline_passes(
    golden_data_io: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = json.loads((golden_data_io / "case.json").read_text())
    assert verified(capsys, golden_data_io / case["input"])[0] == 0
    if not case["exit_code"]:
        code, out = verified(capsys, golden_data_io / case["output"])
        assert (code, "framing: not looked at" in out) == (0, True)


def set_at(place: int, value: int) -> Edit:
    def edit(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return edit


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("tokens.npy", set_at(5, 400), "tokens.npy: id 400 in tokens 0 to"),
        ("tokens.npy", lambda a: a[:-3], "resp_start.npy: example"),
        ("tokens.npy", lambda a: a.astype(np.float32), "must hold one row of integers"),
        ("epoch_1/inst_len.npy", set_at(4, 0), "epoch_1/inst_len.npy: example 4 has inst_len=0"),
        ("epoch_1/resp_len.npy", lambda a: a[:-1], "all four arrays must hold one value"),
        ("epoch_0/inst_start.npy", set_at(2, -1), "inst_start.npy: example 2 has inst_start=-1"),
        ("epoch_0/resp_len.npy", lambda a: a - 1, "total_length="),
        ("epoch_0/inst_start.npy", lambda a: a + 1, "an instruction begins with <|im_start|>"),
        ("epoch_0/inst_len.npy", lambda a: a - 1, "an instruction ends with <|im_end|>"),
        ("epoch_0/resp_len.npy", lambda a: a - 1, "a response ends with <|box_end|>"),
    ],
)
def test_a_broken_array_is_named(
    sampled: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    edit: Edit,
    message: str,
) -> None:
    change(sampled / file, edit)
    code, out = verified(capsys, sampled)
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert code == 1
    assert any(message in line for line in failed), out
    assert f"{len(failed)} problems" in out.splitlines()[-1]


def test_other_faults_of_sampled_data_are_named(
    sampled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sampled / "epoch_1").rename(sampled / "epoch_2")
    assert "epoch_2 is out of reach" in verified(capsys, sampled)[1]
    (sampled / "epoch_2").rename(sampled / "epoch_1")

    tokens = np.load(sampled / "tokens.npy")
    np.save(sampled / "scored.npy", np.full(len(tokens), 2, np.uint8))
    assert 'does not say "scored": true' in verified(capsys, sampled)[1]
    change_json(sampled / "metadata.json", scored=True)
    assert "scored.npy: token 0 has 2; 1 is scored" in verified(capsys, sampled)[1]
    np.save(sampled / "scored.npy", np.ones(3, np.uint8))
    assert "scored.npy holds 3 values" in verified(capsys, sampled)[1]
    np.save(sampled / "scored.npy", np.ones(len(tokens), np.uint8))
    assert verified(capsys, sampled)[0] == 0

    shutil.rmtree(sampled / "epoch_1")
    shutil.copytree(sampled / "epoch_0", sampled / "epoch_1")
    code, out = verified(capsys, sampled)
    assert (code, "note  epoch_1 has the rows and order of epoch_0" in out) == (0, True)

    (sampled / "metadata.json").write_text("{}")
    code, out = verified(capsys, sampled)
    assert (code, "metadata.json is not a sampled folder's metadata" in out) == (1, True)


def test_a_tokenizer_that_does_not_fit_is_named(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = json.loads((sampled / "metadata.json").read_text())["tokenizer_info"]
    change_json(sampled / "metadata.json", tokenizer_info={**info, "vocab_size": 280})
    assert "has ids up to 286, but tokenizer_info.vocab_size=280" in verified(capsys, sampled)[1]
    change_json(sampled / "metadata.json", tokenizer_info={**info, "eoa": "<|none|>"})
    assert "not special tokens of the tokenizer: {'eoa'" in verified(capsys, sampled)[1]
    other = tmp_path / "other.json"
    other.write_text((sampled / "tokenizer.json").read_text() + "\n")
    change_json(sampled / "metadata.json", tokenizer_info={**info, "tokenizer_path": str(other)})
    assert "differ, and the first one counts" in verified(capsys, sampled)[1]
    change_json(sampled / "metadata.json", tokenizer_info={"vocab_size": 287})
    code, out = verified(capsys, sampled)
    assert (code, out.count("note  ")) == (0, 2)
    assert "cannot be asked, fine-tuned or exported" in out


def test_cut_rows_are_told_but_no_problem(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_with(made / "tokenized", tmp_path / "cut", context_size=18)
    code, out = verified(capsys, tmp_path / "cut")
    assert code == 0
    assert "note  24 rows are cut at max_seq_len=18 and end without <|box_end|>" in out
    sample_with(made / "tokenized", tmp_path / "kept", context_size=18, keep_eoa_on_truncation=True)
    assert "are cut" not in verified(capsys, tmp_path / "kept")[1]


def test_windows_of_documents_need_no_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = Sources(tmp_path / "tokenized")
    sources.add("text.jsonl", [([6], [40, 41, 42]), ([6], [43, 11])])
    code, out = verified(capsys, sources.root)
    assert (code, "note  1 rows are windows in a document" in out) == (0, True)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("tokens.npy", set_at(5, 400), "id 400 in tokens 0 to"),
        ("tokens.npy", set_at(0, 40), "an instruction begins with <|im_start|>"),
        ("resp_len.npy", set_at(1, 9999), "row 1 has resp_start="),
        ("inst_len.npy", lambda a: a[:-1], "all four arrays must hold one value per row"),
    ],
)
def test_a_broken_source_is_named(
    tokenized: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    edit: Edit,
    message: str,
) -> None:
    change(tokenized / "a.jsonl" / file, edit)
    code, out = verified(capsys, tokenized)
    assert (code, message in out, "a.jsonl" in out) == (1, True, True), out


def test_other_faults_of_tokenized_data_are_named(
    tokenized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tokenized / "a.jsonl" / "metadata.json").unlink()
    code, out = verified(capsys, tokenized)
    assert (code, "a.jsonl is not whole: metadata.json is missing" in out) == (1, True)
    np.save(tokenized / "b__c.jsonl" / "scored.npy", np.zeros(1, np.uint8))
    assert "scored.npy" in verified(capsys, tokenized)[1]
    (tokenized / "tokenizer_info.json").unlink()
    code, out = verified(capsys, tokenized)
    assert (code, "tokenizer_info.json is missing" in out) == (1, True)


def test_data_without_a_row_are_not_sound(
    tokenized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tokenized / "a.jsonl", tokenized / "b__c.jsonl"):
        for path in folder.glob("*.npy"):
            np.save(path, np.load(path)[:0])
    code, out = verified(capsys, tokenized)
    assert (code, "sources: no row in 2" in out) == (1, True)


def test_stale_sources_are_named(
    tokenized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    for name in ("a.jsonl", "b/c.jsonl"):
        path = source / name
        path.write_text("{}\n")
        metadata = tokenized / name.replace("/", "__") / "metadata.json"
        change_json(metadata, source_mtime=path.stat().st_mtime, source_size=3)
    code, out = verified(capsys, tokenized, f"sources={source}")
    assert (code, "all 2 are as they were when tokenized" in out) == (0, True)
    os.utime(source / "a.jsonl", (1, 1))
    out = verified(capsys, tokenized, f"sources={source}")[1]
    assert "a.jsonl changed after it was tokenized" in out
    (source / "a.jsonl").rename(source / "d.jsonl")
    code, out = verified(capsys, tokenized, f"sources={source}")
    assert code == 1
    assert "d.jsonl is not tokenized" in out
    assert "a.jsonl has no source any more" in out


def test_what_is_no_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    Sources(tmp_path / "tokenized").add("a", numbered_rows(2))
    for arguments in (
        ["nowhere"],
        ["empty"],
        ["tokenized", "sources=nowhere"],
        ["tokenized", "x=1"],
        [],
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["verify", *arguments])
        with pytest.raises(SystemExit) as refused:
            run_command(main)
        assert refused.value.code == (1 if "sources=nowhere" in arguments else 2), arguments
