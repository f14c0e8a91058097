"""The folder that scripts/make_text_data.py leaves: windows of text, and documents held out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from scripts import make_text_data

ROOT = Path(__file__).parent.parent
CONTEXT_SIZE, EPOCHS = 17, 3
DOCUMENTS = [" ".join(f"{number}+{k}" for k in range(number + 1)) for number in range(40)]


def make(folder: Path, *options: str) -> Path:
    """Runs the script in this process, as its command line would."""
    sizes = (f"context_size={CONTEXT_SIZE}", f"epochs={EPOCHS}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_text_data.py", f"output={folder}", *sizes, *options])
        make_text_data.main()
    return folder


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def windows_of(folder: Path, epoch: int = 0) -> list[list[int]]:
    """Prompt and text of every example, by where it lies in tokens.npy."""
    data = SampledData.open(folder)
    index, tokens = data.epoch(epoch), data.tokens()
    prefixes = tokens[index.inst_start]
    boq_id = PromptFormat.from_info(data.metadata.tokenizer_info, folder).boq_id
    assert set(index.inst_len) == {1} and set(prefixes) == {boq_id}
    spans = sorted(zip(index.resp_start, index.resp_start + index.resp_len, strict=True))
    return [tokens[start:end].tolist() for start, end in spans]


def documents_of(folder: Path) -> list[str]:
    """The documents whose windows a folder holds, put together again."""
    info = SampledData.open(folder).metadata.tokenizer_info
    prompt_format = PromptFormat.from_info(info, folder)
    texts, ids = [], []
    for window in windows_of(folder):
        ids += window
        if window[-1] == prompt_format.eoa_id:
            texts.append(prompt_format.decode(ids))
            ids = []
    assert ids == []
    return texts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("text") / "rows.jsonl", DOCUMENTS)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "text", f"text={source}", "held_out=0.1")


def test_every_document_is_whole_on_one_side_of_the_split(made: Path) -> None:
    train, held_out = documents_of(made), documents_of(made / "validation")
    assert sorted(train + held_out) == sorted(DOCUMENTS)
    assert len(held_out) == 4


def test_windows_fill_the_context(made: Path) -> None:
    data = SampledData.open(made)
    assert data.metadata.max_seq_len == CONTEXT_SIZE
    lens = data.epoch(0).resp_len
    assert lens.max() == CONTEXT_SIZE - 1
    num_tokens = sum(len(text.encode()) + 1 for text in documents_of(made))
    assert lens.sum() == num_tokens == len(data.tokens()) - 1
    assert data.metadata.total_length == num_tokens + len(lens)


def test_each_epoch_holds_every_window_in_its_own_order(made: Path) -> None:
    data = SampledData.open(made)
    orders = [tuple(data.epoch(epoch).resp_start) for epoch in range(EPOCHS)]
    assert data.num_epochs == len(set(orders)) == EPOCHS
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
    assert SampledData.open(made / "validation").num_epochs == 1


def test_both_folders_may_be_moved(made: Path, tmp_path: Path) -> None:
    for folder in (made, made / "validation"):
        info = SampledData.open(folder).metadata.tokenizer_info
        assert info.tokenizer_path == str(folder)
        moved = info.model_copy(update={"tokenizer_path": str(tmp_path / "gone")})
        assert PromptFormat.from_info(moved, folder).vocab_size == info.vocab_size


def test_copies_of_held_out_text_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", DOCUMENTS * 2)
    data = make(tmp_path / "data", f"text={source}", "held_out=0.1")
    train, held_out = windows_of(data), windows_of(data / "validation")
    assert not {tuple(window) for window in train} & {tuple(window) for window in held_out}
    once = make(tmp_path / "once", f"text={write_rows(source, DOCUMENTS)}", "held_out=0")
    num_left_out = 2 * len(windows_of(once)) - len(train) - len(held_out)
    assert num_left_out > 0
    expected = f"left out of training: {num_left_out:,} windows, equal to one held out"
    assert expected in capsys.readouterr().err


def test_of_a_single_document_the_end_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(f"line {number}\n" for number in range(9000))  # more than one piece
    (tmp_path / "book.txt").write_text(text)
    data = make(tmp_path / "data", f"text={tmp_path / 'book.txt'}", "held_out=0.1")
    prompt_format = PromptFormat.from_info(SampledData.open(data).metadata.tokenizer_info, data)
    train, held_out = (
        [token for window in windows_of(part) for token in window]
        for part in (data, data / "validation")
    )
    at = len(text) - round(len(text) * 0.1)
    assert prompt_format.decode(train) == text[:at] and train[-1] != prompt_format.eoa_id
    assert prompt_format.decode(held_out) == text[at:] and held_out[-1] == prompt_format.eoa_id
    message = f"held out: the last {len(text) - at:,} characters of the one document"
    assert message in capsys.readouterr().err


def test_nothing_is_held_out_when_not_asked_for(source: Path, tmp_path: Path) -> None:
    data = make(tmp_path / "data", f"text={source}", "held_out=0")
    assert documents_of(data) == DOCUMENTS
    assert not (data / "validation").exists()


def test_empty_documents_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ["", *DOCUMENTS, ""])
    make(tmp_path / "data", f"text={source}", "held_out=0")
    assert documents_of(tmp_path / "data") == DOCUMENTS
    assert "left out: 2 documents without text" in capsys.readouterr().err


def test_another_tokenizer_is_taken_along(source: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    roles = ("boq=<s>", "eoa=</s>", "eoq=</s>")
    data = make(tmp_path / "data", f"text={source}", f"tokenizer={tmp_path}", *roles)
    info = SampledData.open(data).metadata.tokenizer_info
    assert (info.boq, info.eoa, info.vocab_size) == ("<s>", "</s>", tokenizer.get_vocab_size())
    assert len(documents_of(data) + documents_of(data / "validation")) == len(DOCUMENTS)
    for folder in (data, data / "validation"):
        copy = (folder / "tokenizer.json").read_bytes()
        assert copy == (tmp_path / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_loses_text_is_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"l": 0, "a": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    roles = ("boq=<s>", "eoa=<s>", "eoq=<s>")
    make(tmp_path / "data", f"text={source}", f"tokenizer={tmp_path}", "held_out=0", *roles)
    assert "it loses characters or white space, so there are no bits" in capsys.readouterr().err


def test_the_same_options_again_do_nothing(
    made: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make(made, f"text={source}", "held_out=0.1")
    assert "already made with these options; nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_other_options_or_other_text_never_replace_the_data(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", DOCUMENTS)
    data = make(tmp_path / "data", f"text={source}")
    before = files_of(data)
    with pytest.raises(SystemExit, match=r"seed=0 there, 1 here.*choose another output"):
        make(data, f"text={source}", "seed=1")
    write_rows(source, [*DOCUMENTS, "one more"])
    with pytest.raises(SystemExit, match=r"file_bytes=\d+ there, \d+ here"):
        make(data, f"text={source}")
    assert files_of(data) == before


def test_the_seed_decides_split_and_order(source: Path, tmp_path: Path) -> None:
    first, again, other = (
        files_of(make(tmp_path / name, f"text={source}", seed))
        for name, seed in (("first", "seed=0"), ("again", "--seed=0"), ("other", "seed=1"))
    )
    with_paths = {"metadata.json", "validation/metadata.json"}
    assert {name for name in first if first[name] != again[name]} <= with_paths
    assert {"tokens.npy", "validation/tokens.npy", "epoch_0/resp_start.npy"} <= {
        name for name in first if first[name] != other[name]
    }
    assert not np.array_equal(first["epoch_0/resp_start.npy"], first["epoch_1/resp_start.npy"])


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [([""], "leaves nothing for validation"), (["a", "a"], "leaves nothing for training")],
)
def test_a_failed_run_leaves_nothing(tmp_path: Path, texts: list[str], complaint: str) -> None:
    source = write_rows(tmp_path / "rows.jsonl", texts)
    with pytest.raises(SystemExit, match=complaint):
        make(tmp_path / "data", f"text={source}")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("held_out=1", r"1 is not in \[0, 1\)"),
        ("context_size=1", "1 is less than 2"),
        ("epoch=1", "unrecognized arguments: --epoch=1"),
    ],
)
def test_a_bad_option_is_named(
    tmp_path: Path, option: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make(tmp_path / "data", f"text={tmp_path}", option)
    assert complaint.replace("\\", "") in capsys.readouterr().err


def test_a_missing_tokenizer_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no tokenizer at .*nowhere; give a tokenizer.json"):
        make(tmp_path / "data", f"text={source}", f"tokenizer={tmp_path / 'nowhere'}")


def test_the_script_runs_by_its_path_and_shows_its_options() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_text_data.py"), "--help"]
    result = run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in ("--text", "--held_out", "--context_size"))
