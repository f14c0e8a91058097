"""A run of data_io.tokenize that does not come to its end: nothing of it looks done."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from source_tree import ROOT
from tokenizing_cases import ROWS, Place

from data_io import tokenized_writer


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path)
    place.write("a.jsonl", ROWS * 2000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.jsonl: .*; nothing of it is kept, run again"):
            place.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert place.names() == [] and not list(place.out.glob(".a*"))
    monkeypatch.setattr(tokenized_writer, "_sync", failing_sync)
    with pytest.raises(OSError, match="No space left"):
        place.run()
    assert place.names() == [] and not list(place.out.glob(".a*"))
    monkeypatch.undo()
    place.run()
    assert len(place.examples("a.jsonl")) == 4000


def failing_sync(_: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_killed_run_leaves_nothing_that_looks_done_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    place.write("a.jsonl", ROWS)
    place.run()
    large = place.write("b.jsonl", ROWS)
    with large.open("a") as file:
        for _ in range(60):
            file.write(f"{json.dumps(ROWS[0])}\n" * 5000)
    command = [sys.executable, "-m", "data_io.tokenize", *place.arguments, "workers=1"]
    run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    position = place.out / ".b.jsonl.position"
    until = time.monotonic() + 60
    while not position.exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert len(list(place.out.glob(".b.jsonl.partial-*"))) == 1
    assert place.names() == ["a.jsonl"]
    assert not (place.out / "tokenizer_info.json").exists()
    place.write("b.jsonl", ROWS)
    place.run()
    assert "(1 tokenized, 1 unchanged, 0 removed)" in capsys.readouterr().out
    assert sorted(path.name for path in place.out.glob(".*")) == [".lock"]
