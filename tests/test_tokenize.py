"""python -m data_io.tokenize: what is made, what is made again, and what is never left behind."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_tree import ROOT
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizing_cases import ROWS, Place

from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS
from data_io.tokenize import main
from data_io.tokenized_format import MadeBy, TokenizedSource, read_tokenizer_info


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def told_once(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    told = capsys.readouterr()
    return told.out, told.err


def test_rows_become_framed_ids(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.write("flan/cot_a.jsonl", ROWS)
    table = pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]})
    pq.write_table(table, place.data / "b.parquet")
    (place.data / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    place.run()
    form = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, CONDITION_TOKENS)
    expected = [
        (
            form.encode_prompt(row["condition"], row["instruction"]),
            form.encode_response(row["response"]),
        )
        for row in ROWS
    ]
    assert place.names() == ["b.parquet", "c.jsonl.gz", "flan__cot_a.jsonl"]
    assert place.examples("flan__cot_a.jsonl") == place.examples("b.parquet") == expected
    assert place.examples("c.jsonl.gz") == expected[:1]
    source = TokenizedSource.open(place.out / "flan__cot_a.jsonl")
    assert source.tokens.dtype == np.uint16 and source.scored is None
    state = (place.data / "flan" / "cot_a.jsonl").stat()
    metadata = json.loads((source.folder / "metadata.json").read_text())
    assert metadata == {"source_mtime": int(state.st_mtime), "source_size": state.st_size}
    info = read_tokenizer_info(place.out)
    assert (info.boq, info.eoq, info.eoa, info.vocab_size) == (BOQ, EOQ, EOA, 287)
    assert info.condition_mapping == CONDITION_TOKENS
    assert PromptFormat.from_info(info).encode_prompt("direct", "1+1?") == expected[0][0]
    out, err = told_once(capsys)
    assert "5 examples" in out and "3 sources (3 tokenized, 0 unchanged, 0 removed)" in out
    assert "tokenizing: 100%" in err and "tokenizing" not in out


def test_options_choose_framing_types_and_turns(place: Place) -> None:
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"] = 0
    place.write("chat.jsonl", [{"messages": messages}])
    place.write("doc.jsonl", [{"text": "abcdefgh"}])
    place.run(
        *("--boq", "<|fim_prefix|>", "--conditions", "direct=<think>,x=</think>", "condition=x"),
        *("turns=all", "token_type=uint32", "document_window=5", "workers=1"),
    )
    special = {token: at for at, token in enumerate(SPECIAL_TOKENS)}
    ((inst, _),) = place.examples("chat.jsonl")
    assert inst[:2] == [special["<|fim_prefix|>"], special["</think>"]]
    chat = TokenizedSource.open(place.out / "chat.jsonl")
    assert chat.tokens.dtype == np.uint32 and chat.scored is not None
    scored = chat.scored[int(chat.resp_start[0]) :].tolist()
    assert scored == [0] * (2 + 1 + 2 + 2 + 1) + [1] * 3  # a1 eoa, boq x q2 eoq, a2 eoa
    assert [len(resp) for _, resp in place.examples("doc.jsonl")] == [5, 4]
    assert not (place.out / "doc.jsonl" / "scored.npy").exists()


def test_only_what_changed_is_made_again(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        place.write(name, ROWS)
    place.run()
    before = {name: (place.out / name).stat().st_ino for name in place.names()}
    told_once(capsys)
    place.write("b.jsonl", ROWS[:1])
    (place.data / "c.jsonl").unlink()
    (place.out / "notes").mkdir()
    place.run()
    out, err = told_once(capsys)
    assert "2 sources (1 tokenized, 1 unchanged, 1 removed)" in out
    assert "1 sources again: source has changed" in err and "removed c.jsonl" in err
    assert place.names() == ["a.jsonl", "b.jsonl"] and (place.out / "notes").is_dir()
    assert (place.out / "a.jsonl").stat().st_ino == before["a.jsonl"]
    assert len(place.examples("b.jsonl")) == 1
    place.run()
    assert "0 tokenized, 2 unchanged, 0 removed" in told_once(capsys)[0]


def test_another_tokenizer_or_option_makes_everything_again(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write("a.jsonl", ROWS)
    place.run()
    for more in (["turns=all"], ["turns=all", "eoa=<|im_end|>"]):
        place.run("workers=1", *more)
        assert "1 sources again: tokenizer or options have changed" in told_once(capsys)[1]
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("1+1", normalized=False)])
    tokenizer.save(str(place.tokenizer / "tokenizer.json"))
    place.run("workers=1", *more)
    assert "again: tokenizer or options" in told_once(capsys)[1]
    assert 287 in place.examples("a.jsonl")[0][0]
    (place.out / "a.jsonl" / "made.json").unlink()
    place.run("workers=1", *more)
    assert "again: made by another program" in told_once(capsys)[1]


def test_rows_that_cannot_be_used_are_counted(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_io.tokenizing.MAX_TEXT_BYTES", 100)
    bad = [{"instruction": "x"}, {"instruction": "x", "response": 1}]
    bad += [{"instruction": "\ud800", "response": "x"}, {"instruction": "x", "response": "é" * 51}]
    path = place.write("a.jsonl", [*bad, *ROWS, {"text": "long document " * 20}])
    place.run()
    out, err = told_once(capsys)
    assert "3 examples" in out and "of 7 rows" in out
    assert "rows left out: 1 field is no text, 1 half of a surrogate pair, 1 missing field" in out
    assert "1 more than 100 bytes of text" in out
    assert f"1 rows left out, field is no text; the first: {path}, line 2" in err
    made = MadeBy.find(place.out / "a.jsonl")
    assert made is not None and sum(made.dropped.values()) == 4
    place.write("a.jsonl", bad)
    with pytest.raises(ValueError, match="no row of any source makes an example; left out: 1 fi"):
        place.run()
    place.write("a.jsonl", [])
    with pytest.raises(ValueError, match="makes an example; left out: none"):
        place.run()


def test_a_bad_source_stops_no_other_and_the_data_do_not_look_done(place: Place) -> None:
    place.write("a.jsonl", ROWS)
    (place.data / "b.jsonl").write_text('{"instruction": "x"\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1 is no JSON"):
        place.run()
    assert place.names() == ["a.jsonl"]
    assert not (place.out / "tokenizer_info.json").exists()
    place.write("c.jsonl", [{**ROWS[0], "condition": "odd"}])
    with pytest.raises(
        ValueError, match=r"2 of 2 sources .*\n.*b\.jsonl.*\n.*c\.jsonl, line 1: co"
    ):
        place.run()
    place.write("b.jsonl", ROWS)
    (place.data / "c.jsonl").unlink()
    place.run()
    assert place.names() == ["a.jsonl", "b.jsonl"]
    assert sorted(path.name for path in place.out.glob(".*")) == [".lock"]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["boq=<boq>"], "has no special tokens <boq>"),
        (["condition=odd"], "unknown names"),
        (["conditions=direct"], "write name=token"),
        (["conditions=a=<think>,a=</think>"], "a name stands here twice"),
        (["reader=odd"], "reader='odd' is none of"),
        (["--tokenizer-path", "x"], "tokenizer_path is given twice"),
        (["executor=odd"], "executor=odd"),
        (["executor=ray", "address=1.2.3.4:x"], "Ray"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(
    place: Place, more: list[str], fault: str
) -> None:
    place.write("a.jsonl", ROWS)
    place.run()
    before = sorted(place.out.rglob("*"))
    with pytest.raises(ValueError, match=fault):
        place.run(*more)
    assert sorted(place.out.rglob("*")) == before


def test_the_output_may_not_lie_in_a_source(place: Place) -> None:
    place.write("a.jsonl", ROWS)
    with pytest.raises(ValueError, match="lies within the source"):
        main([str(place.data), "-o", str(place.data / "out"), f"tokenizer_path={place.tokenizer}"])


@pytest.mark.parametrize("beside", [[], ["config.json"], ["metadata.json", "tokenizer_info.json"]])
def test_a_tokenizer_of_something_else_is_never_replaced(place: Place, beside: list[str]) -> None:
    place.write("a.jsonl", ROWS)
    place.out.mkdir()
    for name in ("tokenizer.json", *beside):
        (place.out / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds a tokenizer\.json that is not of tokenized data"):
        place.run()
    assert sorted(path.name for path in place.out.iterdir()) == sorted([*beside, "tokenizer.json"])
    assert (place.out / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("taken", ["a.jsonl", "sampled/metadata.json", "a.jsonl/notes.txt"])
def test_only_tokenized_sources_are_ever_replaced(place: Place, taken: str) -> None:
    source = place.write("a.jsonl", ROWS)
    content = source.read_bytes()
    other = place.out / taken
    other.parent.mkdir(parents=True)
    other.write_bytes(content)
    named = place.out / taken.partition("/")[0]
    with pytest.raises(ValueError, match=f"{named} is no tokenized source"):
        main([str(source), *place.arguments[1:], "workers=1"])
    assert other.read_bytes() == content
    assert not list(place.out.rglob("*.npy"))


def test_a_source_beside_its_output_survives(place: Place) -> None:
    source = place.write("a.jsonl", ROWS)
    content = source.read_bytes()
    arguments = [str(source), "-o", str(place.data), "--tokenizer-path", str(place.tokenizer)]
    with pytest.raises(ValueError, match="is no tokenized source"):
        main([*arguments, "workers=1"])
    assert source.read_bytes() == content


def test_vocabularies_above_65536_need_four_bytes(place: Place) -> None:
    words = {f"w{k}": k for k in range(65_600)}
    tokenizer = Tokenizer(models.WordLevel({**words, "?": 65_600}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(place.tokenizer / "tokenizer.json"))
    place.write("a.jsonl", [{"instruction": "w1 w65599", "response": "w65598"}])
    with pytest.raises(ValueError, match="add_special=true"):
        place.run()
    with pytest.raises(ValueError, match="token_type=uint16 holds ids below 65536"):
        place.run("add_special=true", "token_type=uint16")
    place.run("add_special=true")
    source = TokenizedSource.open(place.out / "a.jsonl")
    assert source.tokens.dtype == np.uint32
    ((inst, resp),) = place.examples("a.jsonl")
    assert inst[2:4] == [1, 65_599] and resp[0] == 65_598 and resp[1] > 65_600
    info = read_tokenizer_info(place.out)
    assert info.vocab_size == 65_601 + len(SPECIAL_TOKENS)
    assert PromptFormat.from_info(info).encode_response("w65598") == resp  # the tokens added


def test_errors_and_help_are_for_people(place: Place) -> None:
    for arguments, code, told in (
        (["--help"], 0, "of a conversation: each answer is an example"),
        (["-o", "x"], 2, "error: sources=... is required\n"),
    ):
        command = [sys.executable, "-m", "data_io.tokenize", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert told in (done.stdout if code == 0 else done.stderr)
        assert "Traceback" not in done.stderr
