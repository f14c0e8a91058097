"""One source as ids: in order, in bounded memory, with marks where not all is scored."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from source_tree import ROOT

from data_io import tokenizing
from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.records import Conversation, Document, Row, Turn
from data_io.source_files import MAX_LINE_BYTES, find_sources
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from data_io.tokenized_format import TokenizedSource
from data_io.tokenizing import EncodingSettings, TokenizeJob, texts_of, tokenize_source

MEBIBYTE = 2**20


@pytest.fixture
def settings(tmp_path: Path) -> EncodingSettings:
    return EncodingSettings(
        tokenizer_file=write_byte_tokenizer(tmp_path / "tok"),
        tokenizer_digest="d",
        boq=BOQ,
        eoq=EOQ,
        eoa=EOA,
        conditions=dict(CONDITION_TOKENS),
        reader="auto",
        condition="direct",
        turns="each",
        document_window=4096,
        token_type="uint16",
    )


def job_of(path: Path, settings: EncodingSettings) -> TokenizeJob:
    (source,) = find_sources([path])
    return TokenizeJob(source, path.parent / "out" / path.name, settings)


def test_batches_keep_the_order_of_rows(
    tmp_path: Path, settings: EncodingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_ROWS", 3)
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": f"{k}", "response": "x" * (k % 7 + 1)} for k in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = tokenize_source(job_of(path, settings))
    assert outcome.made is not None and outcome.made.examples == 100
    source = TokenizedSource.open(tmp_path / "out" / "a.jsonl")
    source.check()
    form = settings.prompt_format()
    expected = [form.encode_prompt("direct", row["instruction"]) for row in rows]
    for ids, start, length in zip(expected, source.inst_start, source.inst_len, strict=True):
        assert source.tokens[start : start + length].tolist() == ids
    assert source.resp_len.tolist() == [len(row["response"]) + 1 for row in rows]
    assert (
        outcome.made.tokens == len(source.tokens) == int((source.inst_len + source.resp_len).sum())
    )


def test_marks_stand_where_a_batch_has_them(
    tmp_path: Path, settings: EncodingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_ROWS", 2)
    plain = {"instruction": "q", "response": "a"}
    turns = [("human", "q"), ("gpt", "no"), ("human", "r"), ("gpt", "yes")]
    chat = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    chat["conversations"][1]["weight"] = 0  # pyright: ignore[reportArgumentType]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [plain] * 3 + [chat, plain]))
    outcome = tokenize_source(job_of(path, replace(settings, turns="all")))
    assert outcome.error == ""
    source = TokenizedSource.open(tmp_path / "out" / "a.jsonl")
    assert source.scored is not None
    unscored = [at for at, mark in enumerate(source.scored) if mark == 0]
    start = int(source.resp_start[3])
    assert unscored == list(range(start, start + 3 + 4))  # `no` eoa, boq direct r eoq


def test_the_fingerprint_knows_all_that_decides_ids(settings: EncodingSettings) -> None:
    others = [
        replace(settings, tokenizer_digest="e"),
        replace(settings, eoa=EOQ),
        replace(settings, conditions={}),
        replace(settings, turns="last"),
        replace(settings, document_window=17),
        replace(settings, token_type="uint32"),
    ]
    assert len({each.fingerprint() for each in (settings, *others)}) == 1 + len(others)
    elsewhere = replace(settings, tokenizer_file=Path("elsewhere"))
    assert elsewhere.fingerprint() == settings.fingerprint()


def test_a_source_that_changed_before_its_turn_is_an_error(
    tmp_path: Path, settings: EncodingSettings
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    job = job_of(path, settings)
    path.write_text('{"text": "xx"}\n')
    outcome = tokenize_source(job)
    assert "changed while it was read (14 bytes, now 15)" in outcome.error
    assert outcome.made is None and not outcome.is_fatal
    assert not list((tmp_path / "out").glob("*"))


def test_texts_are_all_that_is_said() -> None:
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    assert texts_of(Row("direct", "q", "a")) == ("q", "a")
    assert texts_of(Conversation("direct", "s", turns)) == ("s", "q", "a")
    assert texts_of(Document("d")) == ("d",)


def peak_mebibytes(path: Path, tokenizer: Path) -> float:
    """What tokenizing a file takes at most, in a process of its own."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'data_io.tokenize', *sys.argv[1:]], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    arguments = [str(path), "-o", str(path.with_suffix(".out")), f"tokenizer_path={tokenizer}"]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 1024 / MEBIBYTE


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path: Path, settings: EncodingSettings) -> None:
    lines = [json.dumps({"instruction": "q" * k, "response": "words " * k}) for k in range(1, 301)]
    block = "\n".join(lines) + "\n"
    peaks = []
    for megabytes in (16, 160):
        path = tmp_path / f"{megabytes}.jsonl"
        path.write_text(block * (megabytes * 10**6 // len(block)))
        peaks.append(peak_mebibytes(path, settings.tokenizer_file))
    assert peaks[1] < peaks[0] + 120 and peaks[1] < 500, peaks  # allocators vary by some 80


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "documents"])
def test_the_longest_rows_fit_in_a_gibibyte(
    tmp_path: Path, settings: EncodingSettings, kind: str
) -> None:
    longest = "wörd 12 " * (tokenizing.MAX_TEXT_BYTES // 9)  # a token is a byte here
    question = {"instruction": "?", "response": longest}
    document = {"text": longest * (MAX_LINE_BYTES // len(longest.encode()) - 1)}
    path = tmp_path / "a.jsonl"
    row = json.dumps(document if kind == "documents" else question, ensure_ascii=False)
    path.write_text(f"{row}\n" * 4)
    assert peak_mebibytes(path, settings.tokenizer_file) < 1024
