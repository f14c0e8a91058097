"""Conversations on words, in the form that SlimOrca has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_io.readers import to_record
from data_io.records import Conversation
from scripts.make_chat_data import TASKS, main


def test_every_row_is_a_conversation_with_right_answers(tmp_path: Path) -> None:
    output = tmp_path / "chat.jsonl"
    main([f"output={output}", "rows=60"])
    lengths, systems, tasks = set(), set(), set()
    for line in output.read_text().splitlines():
        record = to_record(json.loads(line), "sharegpt")
        assert isinstance(record, Conversation)
        systems.add(record.system)
        lengths.add(len(record.turns))
        for question, answer in zip(record.turns[::2], record.turns[1::2], strict=True):
            task, word = question.text.split()
            tasks.add(task)
            assert answer.is_scored and answer.text == TASKS[task](word)
    assert lengths == {2, 4, 6} and len(systems) == 3 and tasks == set(TASKS)


def test_the_same_seed_makes_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        main([f"output={tmp_path / name}", "rows=5", "seed=3"])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        main([f"output={tmp_path / 'one'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
