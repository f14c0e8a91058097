"""scripts/prepare_sft_data.py: the published command's output, and what it does beyond that."""

from __future__ import annotations

import gzip
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.hub import HubData
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from data_io.source_files import RawRow
from scripts import prepare_sft_data

Ids = list[int]


def prepare(*arguments: object) -> None:
    prepare_sft_data.main([str(argument) for argument in arguments])


def rows_of(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def sequences(folder: Path) -> tuple[list[tuple[Ids, Ids]], list[list[int]]]:
    """Prefix and response of the examples in file order, and each epoch as numbers of those."""
    tokens = np.load(folder / "tokens.npy")
    epochs = sorted(folder.glob("epoch_*"))
    columns = [
        [np.load(epoch / f"{name}.npy") for name in ("inst_start", "inst_len", "resp_start")]
        + [np.load(epoch / "resp_len.npy")]
        for epoch in epochs
    ]
    in_order = sorted(zip(*(column.tolist() for column in columns[0]), strict=True))
    numbers = {spans[0]: number for number, spans in enumerate(in_order)}
    found = [
        (tokens[start : start + size].tolist(), tokens[begin : begin + length].tolist())
        for start, size, begin, length in in_order
    ]
    return found, [[numbers[start] for start in each[0].tolist()] for each in columns]


def spells_a_token(row: dict[str, Any], tokenizer: Path) -> bool:
    tokens = [each["content"] for each in json.loads(tokenizer.read_text())["added_tokens"]]
    return any(token in row["instruction"] + row["response"] for token in tokens)


def test_the_published_command_on_golden_data(golden_sft: Path, tmp_path: Path) -> None:
    case = json.loads((golden_sft / "case.json").read_text())
    source, tokenizer = golden_sft / case["input"], golden_sft / case["tokenizer"]
    rows = rows_of(source)
    output = tmp_path / "out"
    arguments = ["--train", source, "--tokenizer", tokenizer, "--output", output, *case["args"]]
    joins_conditions = any("," in row.get("condition", "") for row in rows)
    if case["exit_code"] and not joins_conditions:
        with pytest.raises(ValueError) as told:
            prepare(*arguments)
        numbers = [word for word in case["stderr_last"].split() if word.isdigit()]
        assert all(number in str(told.value) for number in numbers)  # sizes of what is too long
        assert not any(tmp_path.iterdir())
        return
    prepare(*arguments)
    assert (output / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    used = [row for row in rows if row["response"]]
    found, orders = sequences(output)
    assert len(found) == len(used)
    if case["exit_code"]:  # refused there for its joint conditions
        return
    golden, golden_orders = sequences(golden_sft / case["output"])
    assert orders == golden_orders
    kept_apart = [at for at, row in enumerate(used) if spells_a_token(row, tokenizer)]
    for at in set(range(len(used))) - set(kept_apart):
        assert found[at] == golden[at], used[at]
    assert np.load(output / "tokens.npy").dtype == np.int32
    assert np.load(output / "epoch_0" / "inst_len.npy").dtype == np.int64
    for name in ("metadata.json", "tokenizer_info.json"):
        ours = json.loads((output / name).read_text())
        theirs = json.loads((golden_sft / case["output"] / name).read_text())
        for record in (ours, theirs):
            del record.get("tokenizer_info", record)["tokenizer_path"]  # of the machine
            if kept_apart:
                record.pop("total_length", None)
        assert ours == theirs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def texts_of(folder: Path) -> list[tuple[str, str]]:
    info = SampledData.open(folder).metadata.tokenizer_info
    prompt_format = PromptFormat.from_info(info, folder)
    return [
        (prompt_format.decode(prefix), prompt_format.decode(response))
        for prefix, response in sequences(folder)[0]
    ]


SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": f"first {number}?"},
            {"from": "gpt", "value": "one", "weight": 0},
            {"from": "human", "value": "second?"},
            {"from": "gpt", "value": f"two {number}", "weight": 1},
        ]
    }
    for number in range(3)
]


def test_weights_of_turns_reach_the_scored_mask(tokenizer: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "talks.jsonl.gz", SHAREGPT)
    prepare(f"train={source}", f"tokenizer={tokenizer}", f"output={tmp_path / 'all'}", "epochs=1",
            "turns=all")  # fmt: skip
    data = SampledData.open(tmp_path / "all")
    scored, index = data.scored(), data.epoch(0)
    assert data.metadata.scored and scored is not None
    for start, size, length in zip(
        index.resp_start, index.resp_len, np.full(len(index), len("two 0") + 1), strict=True
    ):
        assert scored[start : start + size].tolist() == [0] * (size - length) + [1] * length


def test_answers_one_by_one_need_no_mask(tokenizer: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "talks.jsonl", SHAREGPT)
    prepare("--train", source, "--tokenizer", tokenizer, "--output", tmp_path / "each",
            "--epochs", 2)  # fmt: skip
    data = SampledData.open(tmp_path / "each")
    assert not data.metadata.scored and data.num_epochs == 2
    assert ("Be kind.\n\nfirst 0?onesecond?", "two 0") in texts_of(tmp_path / "each")


def test_held_out_questions_are_not_trained_on(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"q{number % 40}", "response": f"a{number}", "condition": "synth,cot"}
        for number in range(60)
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    for validation in ("0.2", "7"):
        output = tmp_path / validation
        prepare(f"train={source}", f"tokenizer={tokenizer}", f"output={output}", "epochs=1",
                f"validation={validation}")  # fmt: skip
        train, held_out = texts_of(output), texts_of(output / "validation")
        assert sorted(train + held_out) == sorted(
            (row["instruction"], row["response"]) for row in rows
        )
        assert not {question for question, _ in train} & {question for question, _ in held_out}
        assert 0 < len(held_out) < 30
        if validation == "7":
            assert 7 <= len(held_out) <= 8  # a question that comes twice is whole on one side


def test_dropped_rows_are_counted_by_reason(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"instruction": "q", "response": "a"}
    rows = [good, {**good, "response": ""}, {**good, "response": 3}, {"instruction": "q"}]
    rows += [{**good, "instruction": "\ud800"}, {**good, "instruction": "long" * 10}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    prepare(f"train={source}", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}", "epochs=1",
            "reader=rows", "context_size=20", "too_long=drop")  # fmt: skip
    out, err = capsys.readouterr()
    assert len(sequences(tmp_path / "out")[0]) == 1
    assert out.startswith(f"Loaded 6 samples from {source}\n")
    assert "Skipped 1 samples with empty response\n" in out
    assert err.count("dropped 1: ") == 5 and f"{source}, line 4" in err
    assert "Packing: 1 rows" in out and "learned a<|box_end|>" in err


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([{"instruction": "q", "response": "a", "condition": "direkt"}], [], "line 1.*direkt"),
        ([{"instruction": "q", "response": ""}], [], "none of 1 rows"),
        ([], [], "none of 0 rows"),
        ([{"instruction": "q", "response": "a" * 20}], ["context_size=12"], "has 25 tokens"),
        ([{"instruction": "q", "response": "a"}], ["validation=3"], "hold out less"),
        ([{"instruction": "q", "response": "a"}], ["validation=1.5"], "whole number"),
        ([{"instruction": "q", "response": "a"}], ["reader=chat"], "is none of"),
        ([{"instruction": "q", "response": "a"}], ["conditions=direct"], "NAME=TOKEN"),
        ([{"instruction": "q", "response": "a"}], ["boq=<|begin|>"], "add_special=true"),
        ([{"instruction": "q", "response": "a"}], ["--epoch", "3"], "did you mean epochs"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    tokenizer: Path, tmp_path: Path, rows: list[Any], options: list[str], told: str
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=told):
        prepare(f"train={source}", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}",
                "epochs=1", *options)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_data_set_of_the_hub_comes_by_name(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(self: HubData) -> Iterator[RawRow]:
        assert self == HubData("someone/talks", "main", "test")
        yield RawRow("row 1", {"prompt": "q of the hub", "response": "a"})

    monkeypatch.setattr(HubData, "rows", rows)
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    prepare(f"train=hub:someone/talks,{source}", "config=main", "split=test",
            f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}", "epochs=1")  # fmt: skip
    assert texts_of(tmp_path / "out") == [("q", "a"), ("q of the hub", "a")]


def test_a_folder_of_save_to_disk_is_read_as_what_it_is(tokenizer: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "q", "response": "a"}]).save_to_disk(tmp_path / "saved")
    prepare(f"train={tmp_path / 'saved'}", f"tokenizer={tokenizer}",
            f"output={tmp_path / 'out'}", "epochs=1")  # fmt: skip
    assert texts_of(tmp_path / "out") == [("q", "a")]


def test_the_output_may_not_lie_in_a_source(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "a.jsonl", [{"prompt": "q", "response": "a"}])
    with pytest.raises(ValueError, match="lies within the source"):
        prepare(f"train={tmp_path / 'data'}", f"tokenizer={tokenizer}",
                f"output={tmp_path / 'data' / 'out'}", "epochs=1")  # fmt: skip
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl"]


def test_malformed_json_names_file_and_line(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"instruction": "q", "response": "a"}\n{"instruction": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is no JSON"):
        prepare(f"train={source}", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}",
                "epochs=1")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_other_data_are_never_replaced_unasked(tokenizer: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    command = (f"train={source}", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}")
    prepare(*command, "epochs=1")
    with pytest.raises(ValueError, match="exists and is not empty"):
        prepare(*command, "epochs=2")
    prepare(*command, "epochs=2", "overwrite=true")
    assert SampledData.open(tmp_path / "out").num_epochs == 2


def test_a_tokenizer_gets_missing_tokens_on_request(tokenizer: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    prepare(f"train={source}", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}", "epochs=1",
            "boq=<|begin|>", "add_special=true")  # fmt: skip
    data = SampledData.open(tmp_path / "out")
    assert data.metadata.id_limit == 288 and data.tokens()[0] == 287
    assert PromptFormat.from_info(data.metadata.tokenizer_info, data.folder).boq_id == 287


def test_a_full_disk_leaves_nothing_behind(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "q" * 100, "response": "a" * 100}] * 2000
    source = write_rows(tmp_path / "rows.jsonl", rows)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # as a full disk would
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare(f"train={source}", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}",
                    "epochs=1")  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
