"""The instruction template, and which rows are held out for its test."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from data_io.records import BadRowError, Conversation, Document, Row, Turn
from data_io.trm_template import SplitRule, main, to_trm_row

ASKED, SAID = Turn("user", "Why?", is_scored=False), Turn("assistant", "Because.")


def test_a_conversation_is_written_out_up_to_its_answer() -> None:
    assert to_trm_row(Conversation("cot", "Be short.", (ASKED, SAID))) == Row(
        "cot", "[SYSTEM]\nBe short.\n[USER]\nWhy?\n[ASSISTANT]\n", "Because."
    )
    longer = Conversation("direct", "", (ASKED, SAID, Turn("user", "And?"), Turn("assistant", "")))
    assert to_trm_row(longer).instruction == (
        "[USER]\nWhy?\n[ASSISTANT]\nBecause.\n[USER]\nAnd?\n[ASSISTANT]\n"
    )


def test_a_row_is_a_question_without_a_system() -> None:
    row = to_trm_row(Row("direct", "Why?", "Because."))
    assert row == Row("direct", "[USER]\nWhy?\n[ASSISTANT]\n", "Because.")


def test_the_answer_is_the_last_that_is_scored() -> None:
    unscored = Turn("assistant", "Never mind.", is_scored=False)
    turns = (ASKED, SAID, Turn("user", "And?", is_scored=False), unscored)
    row = to_trm_row(Conversation("direct", "", turns))
    assert row == Row("direct", "[USER]\nWhy?\n[ASSISTANT]\n", "Because.")
    with pytest.raises(BadRowError, match="no scored turn"):
        to_trm_row(Conversation("direct", "", (ASKED, unscored)))


def test_what_the_template_has_no_place_for_is_a_reason() -> None:
    with pytest.raises(BadRowError, match="document"):
        to_trm_row(Document("A page."))
    turns = (ASKED, SAID, Turn("tool", "42", is_scored=False), SAID)
    with pytest.raises(BadRowError, match="tool turn"):
        to_trm_row(Conversation("direct", "", turns))


def rows(count: int) -> list[Row | None]:
    return [Row("direct", f"{k}", "x") for k in range(count)]


def split(rule: SplitRule, given: list[Row | None]) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {"train": [], "test": []}
    for part, row in rule.parts(given):
        parts[part].append(int(row.instruction))
    return parts


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_split_is_the_published_rule(seed: int) -> None:
    expected = [k for k in range(500) if random.Random((seed << 32) ^ k).random() < 0.05]
    assert 5 < len(expected) < 60
    parts = split(SplitRule(seed), rows(500))
    assert parts["test"] == expected
    assert parts["train"] == sorted({*range(500)} - {*expected})


def test_a_bad_row_keeps_its_number() -> None:
    given = rows(500)
    whole = split(SplitRule(), given)
    given[0] = given[3] = given[whole["test"][0]] = None
    parts = split(SplitRule(), given)
    assert parts["test"] == whole["test"][1:]
    assert set(parts["train"]) == set(whole["train"]) - {0, 3}


def test_the_subset_size_limits_each_split_and_reads_no_further() -> None:
    whole = split(SplitRule(), rows(500))
    read = []
    counted = (read.append(row) or row for row in rows(500))
    parts: dict[str, list[int]] = {"train": [], "test": []}
    for part, row in SplitRule(subset_size=4).parts(counted):
        parts[part].append(int(row.instruction))
    assert parts == {part: numbers[:4] for part, numbers in whole.items()}
    assert len(read) == whole["test"][3] + 1


@pytest.mark.parametrize("count", [2, 3, 10, 64])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("test_ratio", [0.0, 1e-9, 1.0])
def test_an_empty_split_is_filled_by_the_ratio_that_the_error_names(
    count: int, seed: int, test_ratio: float
) -> None:
    empty = "train" if test_ratio == 1 else "test"
    with pytest.raises(ValueError, match=f"leaves the {empty} split of {count} rows") as told:
        split(SplitRule(seed, test_ratio), rows(count))
    found = re.search(r"test_ratio=(\S+) fills it", str(told.value))
    assert found is not None
    parts = split(SplitRule(seed, float(found[1])), rows(count))
    assert parts["train"]
    assert parts["test"]


def test_too_few_rows_are_told() -> None:
    too_few: list[list[Row | None]] = [[], [None, None], rows(1), [None, *rows(1)]]
    for given in too_few:
        with pytest.raises(ValueError, match="cannot fill a train and a test split"):
            split(SplitRule(), given)


def slim_orca(number: int) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "system", "value": "Be short.", "weight": None},
            {"from": "human", "value": f"What is {number} + 1?", "weight": 0.0},
            {"from": "gpt", "value": str(number + 1), "weight": 1.0},
        ]
    }


def test_the_command_writes_both_splits_and_counts_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [slim_orca(k) for k in range(200)]
    given[0]["conversations"][2]["weight"] = 0.5
    source = tmp_path / "slimorca.jsonl"
    source.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    main([f"input={source}", f"output={tmp_path / 'out'}", "seed=3"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "left out: 1 rows, weight is neither 0 nor 1" in err
    assert err.count("slimorca.jsonl is read as sharegpt") == 1
    written = {
        part: [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").open()]
        for part in ("train", "test")
    }
    held_out = [k for k in range(1, 200) if random.Random((3 << 32) ^ k).random() < 0.05]
    assert [row["response"] for row in written["test"]] == [str(k + 1) for k in held_out]
    assert len(written["train"]) == 199 - len(held_out)
    assert written["train"][0] == {
        "condition": "direct",
        "instruction": "[SYSTEM]\nBe short.\n[USER]\nWhat is 1 + 1?\n[ASSISTANT]\n",
        "response": "2",
    }


def test_an_empty_split_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps(slim_orca(1)) + "\n" + json.dumps(slim_orca(2)))
    with pytest.raises(ValueError, match="leaves the test split of 2 rows empty"):
        main([f"input={source}", f"output={tmp_path / 'out'}"])
    assert list((tmp_path / "out").iterdir()) == []


def test_files_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps(slim_orca(k)) for k in range(90)))
    main([f"input={source}", f"output={tmp_path / 'out'}"])
    before = (tmp_path / "out" / "test.jsonl").read_text()
    with pytest.raises(ValueError, match=r"train\.jsonl exists; delete it.*overwrite=true"):
        main([f"input={source}", f"output={tmp_path / 'out'}", "seed=1"])
    assert (tmp_path / "out" / "test.jsonl").read_text() == before
    main([f"input={source}", f"output={tmp_path / 'out'}", "seed=1", "overwrite=true"])
    assert (tmp_path / "out" / "test.jsonl").read_text() != before


@pytest.mark.parametrize("name", ["reader=alpaca", "test_ratio=2", "subset_size=0"])
def test_options_out_of_range_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name.partition("=")[0]):
        main([f"input={tmp_path}", f"output={tmp_path / 'out'}", name])
