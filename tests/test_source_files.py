"""Source files as rows: every format, streamed, and what is no row named by its place."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_io import source_files
from data_io.source_files import MAX_LINE_BYTES, SourceFile, find_sources

ROWS = [{"instruction": f"what is {k}?", "response": "é€😀" * k, "n": k} for k in range(7)]


def write(path: Path, content: bytes | str) -> SourceFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return found(path)


def found(path: Path) -> SourceFile:
    (source,) = find_sources([path])
    return source


def fields(source: SourceFile) -> list[dict[str, Any]]:
    return [row.fields for row in source.rows()]


def lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(content: bytes, path: Path) -> bytes:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path.read_bytes()


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    array = json.dumps(ROWS, indent=2, ensure_ascii=False)
    table = pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]})
    large = table.set_column(1, "response", table["response"].cast(pa.large_utf8()))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(large, tmp_path / "large.parquet")
    sources = [
        write(tmp_path / "a.jsonl", lines()),
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\n")[:-2]),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines()[:100]) + gzip.compress(lines()[100:])),
        write(tmp_path / "a.jsonl.zst", zstd(lines(), tmp_path / "zst")),
        write(tmp_path / "a.json", array),
        write(tmp_path / "lines.json", lines()),
        write(tmp_path / "tight.json", " " + json.dumps(ROWS) + "\n"),
        found(tmp_path / "a.parquet"),
        found(tmp_path / "large.parquet"),
    ]
    for source in sources:
        assert fields(source) == ROWS, source.name


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    content = {"gz": gzip.compress(b""), "zst": zstd(b"", tmp_path / "zst")}
    source = write(tmp_path / name, content.get(name.rpartition(".")[2], b""))
    assert fields(source) == []
    assert fields(write(tmp_path / "b.json", " [ ] ")) == []
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    assert fields(found(tmp_path / "b.parquet")) == []


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "a.jsonl, line 3 is no JSON: Expecting value"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"line 2 holds '\[1\]', but a row is an object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.jsonl", "[" * 10**5, "line 1 is JSON nested too deeply"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"row 2 \(line 2\) is no JSON: .* in line 2"),
        ("a.json", '[{"a":\n1},\n\n 3]', r"row 2 \(line 4\) is no row"),
        ("a.json", '[{"a": 1} {"a": 2}]', r"line 1 has '\{' instead of , or \]"),
        ("a.json", '[{"a": 1},\n', r"row 2 \(line 2\) is no row"),
        ("a.json", '[{"a": 1}', "the end of the file instead of , or"),
        ("a.json", '[{"a": 1}]\n{}', "goes on after the end of its array, in line 2"),
        ("a.json", b'[{"a": "\xff"}]', "is not UTF-8"),
        ("a.json", '[{"a":' + "[" * 10**5, "nested too deeply"),
        ("a.jsonl", '{"a": ' + "9" * 10**4 + "}", "line 1 is JSON .* thousands of digits"),
        ("a.json", '[{"a": ' + "9" * 10**4 + "}]", r"row 1 \(line 1\) is JSON .* of digits"),
        ("a.jsonl.gz", gzip.compress(os.urandom(10**5))[:-50], "a.jsonl.gz"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        ("a.parquet", b"PAR1 no parquet PAR1", "is no Parquet file"),
    ],
)
def test_what_is_no_row_is_named(
    tmp_path: Path, name: str, content: bytes | str, fault: str
) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=fault) as refusal:
        fields(source)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_objects_longer_than_the_buffer_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_files, "BLOCK_BYTES", 64)
    rows = [{"text": "x y\n" * k} for k in (1, 40, 0, 300, 7)]
    assert fields(write(tmp_path / "a.json", json.dumps(rows))) == rows
    assert fields(write(tmp_path / "b.json", json.dumps(rows, indent=3))) == rows
    with pytest.raises(ValueError, match=r"row 4 \(line 10\) is no JSON: .* in line 12"):
        fields(write(tmp_path / "c.json", json.dumps(rows[:3], indent=3)[:-2] + ',{\n"a":\n x}]'))


def test_a_row_of_100_megabytes_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    size = 100 * 10**6
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "ok"}\n{"text": "')
        file.seek(size)  # a hole of zeros: no disk is used
        file.write(b'"}\n')
    (tmp_path / "a.json").write_bytes(b'[{"text": "' + b"x" * (2 * MAX_LINE_BYTES))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is longer than 16,777,216 bytes"):
        fields(found(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"row 1 \(line 1\) is no JSON, or longer than"):
        fields(found(tmp_path / "a.json"))
    assert tracemalloc.get_traced_memory()[1] < 8 * MAX_LINE_BYTES
    tracemalloc.stop()


def test_long_cells_of_parquet_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["short", "x" * 200]}), tmp_path / "a.parquet")
    monkeypatch.setattr(source_files, "MAX_LINE_BYTES", 100)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2 is longer than 100 bytes"):
        fields(found(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"n": range(3)}), path)
    else:
        path.write_text('[{"n": 1}]' if name == "a.json" else '{"n": 1}\n')
    rows = found(path).rows()
    next(rows)
    with path.open("ab") as file:
        file.write(b'{"n":')
    with pytest.raises(ValueError, match="changed while it was read"):
        list(rows)
    source = found(path) if name == "a.jsonl" else None
    path.unlink()
    if source is not None:
        with pytest.raises(ValueError, match="now it is gone"):
            fields(source)


def test_folders_are_searched_and_names_kept(tmp_path: Path) -> None:
    for name in ("b.jsonl", "flan/cot_a.jsonl", ".cache/x.jsonl", "README.md", ".hidden.jsonl"):
        write_only(tmp_path / "data" / name)
    write_only(tmp_path / "more.jsonl.gz")
    sources = find_sources([tmp_path / "data", tmp_path / "more.jsonl.gz", tmp_path / "data"])
    assert [source.name for source in sources] == ["b.jsonl", "flan/cot_a.jsonl", "more.jsonl.gz"]
    assert sources[1].folder_name == "flan__cot_a.jsonl"


def write_only(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_sources_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for name in ("one/a.jsonl", "two/a.jsonl", "notes.txt", "empty/notes.txt"):
        write_only(tmp_path / name)
    with pytest.raises(ValueError, match=r"would both be a\.jsonl; rename one"):
        find_sources([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(ValueError, match=r"notes\.txt is no \.jsonl"):
        find_sources([tmp_path / "notes.txt"])
    with pytest.raises(ValueError, match=r"empty holds no \.jsonl"):
        find_sources([tmp_path / "empty"])
    with pytest.raises(ValueError, match="absent does not exist"):
        find_sources([tmp_path / "absent"])


def test_the_position_goes_up_to_the_size(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "a.parquet")
    for source in (
        write(tmp_path / "a.jsonl", lines() * 200),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines() * 200)),
        write(tmp_path / "a.json", json.dumps(ROWS * 200)),
        found(tmp_path / "a.parquet"),
    ):
        told: list[int] = []
        list(source.rows(told.append))
        assert told == sorted(told) and told[-1] == source.state.size
        assert len(told) <= 10  # each may be a file that is written


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        find_sources([tmp_path / "a.jsonl"])
