"""Readers of files that others may have written take them, or refuse them in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_cases import FaultError, Fuzzed, Reader, watched
from fuzz_worker import try_examples
from mutation_cases import DEEP_JSON
from reader_cases import KEPT, READERS

ROOT = Path(__file__).resolve().parents[1]
FAST = ("sampled", "tokenized", "tokenizer.json", "SentencePiece", "tiktoken", "shards")
FAST += ("metrics", "answers", "questions", "mixtures", "results", "lock", "CORE bundle")
# What the search found: (reader, file, content); each broke a reader before it was mended.
FOUND: list[tuple[str, str, bytes]] = [
    ("sampled", "tokens.npy", b"\x93NUMPY\x01\x00\x02\x00{\n"),
    (
        "sampled",
        "tokens.npy",
        b"\x93NUMPY\x01\x00\x3c\x00{'descr': '<u2', 'fortran_order': False, 'shape': 3, 3: 'x'} \n",
    ),
    (
        "tokenized",
        "numbers.jsonl/resp_len.npy",
        b"\x93NUMPY\x01\x00\x47\x00{'descr': '<i8', 'fortran_order': False, 'shape': ("
        b"1180591620717411303424,)}\n",
    ),
    ("metrics", "metrics.jsonl", b'{"loss": 1}\n{"step": 5}\n'),
    ("metrics", "metrics.jsonl", b'3\n{"step": 5}\n'),
    ("metrics", "metrics.jsonl", DEEP_JSON.encode() + b'\n{"step": 5}\n'),
    ("answers", "a.jsonl.settings.json", b"[1]"),
    ("mixtures", "mixture.yaml", b"train: !!timestamp x"),
    ("results", "results.json", DEEP_JSON.encode()),
]
# So did these, which are now taken for a lock that is torn and for prompts that were not kept.
PASSED_OVER: list[tuple[str, str, bytes]] = [
    ("lock", ".lock", b'{"host": "HOST", "process": 4294967296, "begun": ""}'),
    ("kept prompts", f"{KEPT}.ids.npy", b"\x93NUMPY\x01\x00\x02\x00{\n"),
]


@pytest.mark.parametrize("name", FAST)
def test_mutated_files_are_taken_or_refused(name: str, tmp_path: Path) -> None:
    fuzzed = Fuzzed(name, READERS[name], tmp_path)
    try_examples(fuzzed, fuzzed.try_file, number=0, count=8)
    assert fuzzed.told["refused"] > 1


@pytest.mark.parametrize(("name", "file", "content"), FOUND, ids=range(len(FOUND)))
def test_what_was_found_stays_mended(name: str, file: str, content: bytes, tmp_path: Path) -> None:
    fuzzed = Fuzzed(name, READERS[name], tmp_path)
    fuzzed.try_file(file, content)
    assert fuzzed.told["refused"] == 1


@pytest.mark.parametrize(("name", "file", "content"), PASSED_OVER, ids=range(len(PASSED_OVER)))
def test_what_was_found_is_passed_over(
    name: str, file: str, content: bytes, tmp_path: Path
) -> None:
    fuzzed = Fuzzed(name, READERS[name], tmp_path)
    fuzzed.try_file(file, content.replace(b"HOST", socket.gethostname().encode()))
    assert fuzzed.told == {"accepted": 1, "refused": 0}


@pytest.mark.parametrize(
    ("name", "file", "value"),
    [
        ("export", "config.json", {"vocab_size": 2**63}),
        ("export", "config.json", {"vocab_size": float("inf")}),
        ("results", "results.json", {"benchmarks": [["x"]]}),
        ("results", "results.json", {"model": "x"}),
        ("results", "items.jsonl", {"benchmark": {}}),
        ("results", "items.jsonl", {"benchmark": []}),
    ],
)
def test_values_that_were_found_stay_mended(
    name: str, file: str, value: dict[str, Any], tmp_path: Path
) -> None:
    fuzzed = Fuzzed(name, READERS[name], tmp_path)
    text = fuzzed.contents[file].decode()
    first = text.splitlines()[0] if file.endswith("l") else text
    fuzzed.try_file(file, json.dumps(json.loads(first) | value).encode())
    assert fuzzed.told["refused"] == 1


def reads(folder: Path) -> None:
    """A reader that makes mistakes of every kind."""
    match (folder / "a").read_text():
        case "no":
            raise ValueError("no")
        case "key":
            raise KeyError("key")
        case "out":
            (folder.parent.parent / "elsewhere").write_text("x")
        case "run":
            subprocess.run(["true"])
        case "long":
            raise ValueError("x" * 100_000)


@pytest.mark.parametrize(
    ("content", "told"),
    [("key", "KeyError"), ("out", "outside the folder"), ("run", "Popen"), ("long", "characters")],
)
def test_a_reader_that_goes_wrong_is_caught(content: str, told: str, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "a").write_text("yes")

    fuzzed = Fuzzed("x", Reader(make, {"a": "bytes"}, reads), tmp_path / "home")
    fuzzed.try_file("a", b"yes")
    fuzzed.try_file("a", b"no")
    assert fuzzed.told == {"accepted": 1, "refused": 1}
    with pytest.raises(FaultError, match=told):
        fuzzed.try_file("a", content.encode())


def test_writing_inside_is_no_fault(tmp_path: Path) -> None:
    with watched(tmp_path):
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path.parent / "after").write_text("x")  # nothing is watched any more


@pytest.mark.slow
def test_a_minute_of_all_readers_finds_no_fault(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_readers.py"), "minutes=1", "turn=2"]
    output = tmp_path / "fuzz.json"
    done = subprocess.run(
        [*command, f"output={output}", f"kept={tmp_path / 'kept'}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    told: dict[str, Any] = json.loads(output.read_text())["readers"]
    assert told.keys() == READERS.keys() and sum(each["examples"] for each in told.values()) > 20
