"""Bytes per token by kind of text, beside vocabularies that everybody knows."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_io.byte_tokenizer import byte_tokenizer, write_byte_tokenizer
from data_io.compare_tokenizers import SAMPLES, compare, main, sample_texts
from data_io.tiktoken_ranks import byte_characters

KINDS = [path.stem for path in sorted(SAMPLES.glob("*.txt"))]


def table(text: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of each row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def write_pairs(folder: Path) -> Path:
    """GPT-2's pair of files, with a vocabulary of bytes and `th`, `the`."""
    names = [*byte_characters(), "th", "the"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({name: k for k, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    return folder


def write_ranks(path: Path) -> Path:
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" t", b" the"]
    lines = [f"{base64.b64encode(token).decode()} {k}\n" for k, token in enumerate(tokens)]
    path.write_text("".join(lines))
    return path


def test_the_samples_are_plain_text_of_every_kind() -> None:
    samples = dict(sample_texts())
    assert sorted(samples) == KINDS
    assert {"prose", "code", "maths", "chinese", "arabic", "hindi", "russian"} <= set(samples)
    for kind, (text,) in samples.items():
        assert len(text.encode()) > 350, kind
        assert "\ufffd" not in text


def test_the_table_counts_bytes_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write_byte_tokenizer(tmp_path / "mine")
    texts = tmp_path / "texts"
    (texts / "letters").mkdir(parents=True)
    (texts / "letters" / "a.txt").write_text("the the")
    (texts / "letters" / "b.jsonl").write_text('{"text": "the"}\n{"text": "x"}\n')
    (texts / "notes.txt").write_text("é")
    (texts / "picture.png").write_bytes(b"\x89PNG")
    main(
        [
            f"tokenizer={mine}",
            f"texts={texts}",
            f"gpt2={write_pairs(tmp_path / 'pairs')}",
            f"gpt4={write_ranks(tmp_path / 'cl100k_base.tiktoken')}",
        ]
    )
    out, err = capsys.readouterr()
    rows = table(out)
    assert rows["bytes per token"] == ["bytes", "mine", "GPT-2", "GPT-4"]
    assert rows["vocabulary"] == ["", "287", "258", "261"]
    assert rows["text comes back"] == ["", "yes", "yes", "yes"]
    # the| |the, the, x -> GPT-2: 3 + 1 + 1 tokens; GPT-4: the| the, the, x: 2 + 1 + 1
    assert rows["letters"] == ["11", "1.00", "2.20", "2.75"]
    assert rows["notes"] == ["2", "1.00", "1.00", "1.00"]
    total = sum(path.stat().st_size for path in SAMPLES.glob("*.txt")) + 11 + 2
    assert rows["all"][:2] == [f"{total:,}", "1.00"]
    assert set(rows) == {
        *("bytes per token", "---", "vocabulary", "text comes back", "letters", "notes", "all"),
        *KINDS,
    }
    assert err == ""


def test_columns_that_are_missing_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_byte_tokenizer(tmp_path / name / "same") for name in ("a", "b"))
    main([f"tokenizer={one},{two}"])
    out, err = capsys.readouterr()
    assert table(out)["bytes per token"] == ["bytes", str(one), str(two)]
    assert "no column for GPT-2: gpt2=FILE names its vocabulary" in err
    assert "no column for GPT-4: gpt4=FILE" in err


def test_a_tokenizer_that_loses_text_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lossy = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy.save(str(tmp_path / "tokenizer.json"))
    main([f"tokenizer={tmp_path}"])
    out, err = capsys.readouterr()
    assert table(out)["text comes back"] == ["", "no"]
    assert f"{len(KINDS)} texts do not come back" in err


def test_text_is_read_up_to_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = write_byte_tokenizer(tmp_path / "mine")
    (tmp_path / "long.jsonl").write_text('{"text": "0123456789"}\n' * 100)
    main([f"tokenizer={mine}", f"texts={tmp_path / 'long.jsonl'}", "max_bytes=45"])
    assert table(capsys.readouterr().out)["long"] == ["50", "1.00"]


def test_special_tokens_in_a_text_are_counted_as_text() -> None:
    comparison = compare({"bytes": byte_tokenizer()}, [("spelled", ["<|im_end|>", "<think>"])])
    assert comparison.kinds["spelled"].num_tokens == {"bytes": 17}


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("tokenizer={}/gone", "no tokenizer at"),
        ("tokenizer=", "tokenizer="),
        ("texts={}", "holds no .txt or .jsonl file"),
        ("gpt2={}", "holds neither"),
        ("gpt4={}/gone.tiktoken", "No such file"),
        ("max_bytes=0", "max_bytes=0"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, option: str, told: str) -> None:
    arguments = {"tokenizer": f"tokenizer={write_byte_tokenizer(tmp_path / 'mine')}"}
    (tmp_path / "empty").mkdir()
    given = option.format(tmp_path / "empty")
    arguments[given.partition("=")[0]] = given
    with pytest.raises((ValueError, OSError), match=told):
        main(list(arguments.values()))
