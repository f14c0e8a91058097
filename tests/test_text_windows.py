"""Documents as windows: nothing of a text is lost, wherever it is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_io import text_windows
from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, EOA, EOQ
from data_io.text_windows import Piece, pieces_of, text_files, windows_of

FORMAT = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, {})


def write_rows(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_in(*paths: Path) -> list[str]:
    texts: dict[int, str] = {}
    for piece in pieces_of(paths):
        texts[piece.document] = texts.get(piece.document, "") + piece.text
    return list(texts.values())


def test_a_file_is_a_document_and_so_is_a_row(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_bytes("déjà\r\nvu\rtwo\n\n".encode())
    rows = write_rows(tmp_path / "rows.jsonl", "first\r\nrow", "second")
    assert documents_in(text, rows) == ["déjà\r\nvu\rtwo\n\n", "first\r\nrow", "second"]


def test_an_empty_document_is_an_empty_piece_without_a_number(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "a", "", "b")
    assert list(pieces_of([rows])) == [Piece("a", 0, True), Piece("", 1, True), Piece("b", 1, True)]


@pytest.mark.parametrize("text", ["ab\ncd\n" * 9, "abcdefg" * 9, "a\n" + "b" * 50, "\n" * 30 + "c"])
def test_pieces_end_with_lines_where_they_can(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_windows, "PIECE_CHARS", 8)
    (tmp_path / "one.txt").write_text(text)
    pieces = list(pieces_of([tmp_path / "one.txt"]))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for piece in pieces:
        assert 0 < len(piece.text) <= 8
        assert piece.is_last or piece.text.endswith("\n") or "\n" not in piece.text


def test_windows_hold_every_token_once_and_end_documents(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "abcdef", "ghi", "jklmnop")
    windows = [window.tolist() for window in windows_of(pieces_of([rows]), FORMAT, 4)]
    assert [len(window) for window in windows] == [4, 3, 4, 4, 4]
    assert [FORMAT.decode(window) for window in windows] == ["abcd", "ef", "ghi", "jklm", "nop"]
    ends = [window[-1] == FORMAT.eoa_id for window in windows]
    assert ends == [False, True, True, False, True]


def test_windows_do_not_depend_on_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_text("one line\nand another, longer one\n" * 40)
    whole = [w.tolist() for w in windows_of(pieces_of([tmp_path / "long.txt"]), FORMAT, 33)]
    monkeypatch.setattr(text_windows, "PIECE_CHARS", 20)
    monkeypatch.setattr(text_windows, "ENCODED_TOGETHER", 3)
    assert whole == [w.tolist() for w in windows_of(pieces_of([tmp_path / "long.txt"]), FORMAT, 33)]


def test_files_are_named_by_name_folder_or_glob(tmp_path: Path) -> None:
    names = ("a[1].txt", "b.py", "c.jsonl", "deep/d.txt", "deep/e.md")
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / name).write_text("text")

    def found(patterns: str) -> list[str]:
        patterns = ",".join(str(tmp_path / pattern) for pattern in patterns.split(","))
        return [path.relative_to(tmp_path).as_posix() for path in text_files(patterns)]

    assert found(".") == ["a[1].txt", "c.jsonl", "deep/d.txt"]
    assert found("*.py,**/*.md,b.py") == ["b.py", "deep/e.md"]
    assert found("a[1].txt") == ["a[1].txt"]
    for nothing in ("*.rst", "missing"):
        with pytest.raises(ValueError, match="names no file; give files, globs, or folders"):
            found(nothing)
    with pytest.raises(ValueError, match="text= names no file"):
        text_files("")


@pytest.mark.parametrize("line", ["text", '{"content": "x"}', '{"text": 1}', '["text"]'])
def test_a_row_without_text_is_named(tmp_path: Path, line: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "fine")
    rows.write_text(rows.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: .* is no row of text; write"):
        documents_in(rows)


def test_a_blank_line_is_no_row(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "fine")
    expected = documents_in(rows)
    rows.write_text(rows.read_text() + "\n")
    assert documents_in(rows) == expected


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 .*convert it or leave it out"):
        documents_in(tmp_path / "latin.txt")
