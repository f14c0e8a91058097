"""Tokenized -> sampled: the published rows in the published order, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenized_cases import Sources, TokenRow, numbered_rows, rows_of

from data_io import sample as sample_module
from data_io.options import parse_options
from data_io.sample import PUBLISHED_MIXTURE, SampleOptions, main, sample
from data_io.sampled_format import SampledData, SampledMetadata

EOA = 11


def run(output: Path, tokenized: Path, **options: Any) -> str:
    """Samples as a command line would; returns the report."""
    given = {"epochs": 2, "prefix_config_path": "null"} | options
    arguments = [f"output_path={output}", f"tokenized_path={tokenized}"]
    arguments += [f"{key}={value}" for key, value in given.items()]
    return sample(parse_options(SampleOptions, arguments, ""))


@pytest.fixture
def tokenized(tmp_path: Path) -> Path:
    """Three sources of 5, 8 and 4 rows."""
    sources = Sources(tmp_path / "tokenized")
    for name, count, first in (("b__x.jsonl", 5, 40), ("a.jsonl", 8, 60), ("b__y.jsonl", 4, 80)):
        sources.add(name, numbered_rows(count, first=first))
    return sources.root


def mixture(folder: Path, text: str) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------ as published


def test_golden_rows_come_in_the_published_order(
    golden_data_io: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = json.loads((golden_data_io / "case.json").read_text())
    assert case["kind"] == "data_io.sample"
    options = dict(case["options"])
    tokenized = (golden_data_io / case["input"]).resolve()
    output = tmp_path / "sampled"
    arguments = [f"tokenized_path={tokenized}", f"output_path={output}"]
    arguments.append(f"prefix_config_path={golden_data_io / case['prefix_config']}")
    arguments += [f"{key}={value}" for key, value in options.items()]
    if case["exit_code"] and "broadcast" not in case["stderr_last"]:
        with contextlib.suppress(ValueError):  # what nothing can be made of is refused here too
            main(arguments)
        return
    main(arguments)

    printed = capsys.readouterr().out
    ours = rows_of(output)
    assert len(ours) == options["epochs"]
    if case["exit_code"]:  # repeated rows outgrew a buffer there
        whole = published_report_totals(printed)
        assert whole == (sum(map(len, ours)), sum(map(tokens_of, ours)))
        return
    assert ours == rows_of(golden_data_io / case["output"])
    made, expected = (
        SampledMetadata.load(folder / "metadata.json")
        for folder in (output, golden_data_io / case["output"])
    )
    assert made == expected
    report = (golden_data_io / "report.md").read_text().splitlines(keepends=True)
    assert printed == "".join(line for line in report if not line.startswith("Warning"))


def tokens_of(epoch: list[TokenRow]) -> int:
    return sum(len(row.inst) + len(row.resp) for row in epoch)


def published_report_totals(report: str) -> tuple[int, int]:
    """Covered rows and tokens of all sources."""
    cells = re.findall(r"([\d,]+) \(", report.partition("**GLOBAL**")[2].partition("\n")[0])
    return int(cells[2].replace(",", "")), int(cells[3].replace(",", ""))


def test_the_published_mixture_is_the_default_and_can_be_used(
    tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it is found from anywhere
    options = parse_options(SampleOptions, ["output_path=x", "epochs=4"], "")
    assert options.prefix_config_path == PUBLISHED_MIXTURE
    run(tmp_path / "out", tokenized, prefix_config_path=PUBLISHED_MIXTURE)
    assert [len(epoch) for epoch in rows_of(tmp_path / "out")] == [17, 17]


def test_an_epoch_takes_what_the_mixture_says(tokenized: Path, tmp_path: Path) -> None:
    path = mixture(
        tmp_path, "- {prefix: b__x, repeat: 3}\n- {prefix: b__, max_per_file: 3}\n- {prefix: z}\n"
    )
    run(tmp_path / "out", tokenized, prefix_config_path=path, epochs=4)
    epochs = rows_of(tmp_path / "out")
    for epoch in epochs:
        counts = Counter(row.inst[0] // 20 for row in epoch)
        assert counts == {2: 15, 3: 8, 4: 3}
        repeated = Counter(row for row in epoch if row.inst[0] // 20 == 2)
        assert set(repeated.values()) == {3}
    of_y = [row for epoch in epochs for row in epoch if row.inst[0] // 20 == 4]
    assert set(Counter(of_y).values()) == {3}  # 12 of 4 rows: the permutation runs on


def test_the_seed_decides_the_order(tokenized: Path, tmp_path: Path) -> None:
    orders = []
    for number, seed in enumerate((0, 0, 1)):
        run(tmp_path / f"out{number}", tokenized, seed=seed)
        orders.append(rows_of(tmp_path / f"out{number}"))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][0]) == sorted(orders[0][1]) == sorted(orders[2][0])


# ------------------------------------------------------------------------ what is written


def test_only_rows_that_an_epoch_uses_are_copied(tokenized: Path, tmp_path: Path) -> None:
    path = mixture(tmp_path, "- {prefix: '', max_per_file: 1}\n")
    run(tmp_path / "out", tokenized, prefix_config_path=path)
    used = {row for epoch in rows_of(tmp_path / "out") for row in epoch}
    assert len(used) == 6
    size = len(SampledData.open(tmp_path / "out").tokens())
    assert size == tokens_of(list(used))


def test_a_cut_row_keeps_its_eoa_on_request(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    long = ([40, 41], [42, 43, 44, 45, EOA])
    sources.add("long.jsonl", [long, ([50], [51, EOA])], scored=[1, 1, 1, 1, 0, 0, 1, 1, 1, 0])
    for keep, end, scored in ((False, 44, [1, 1, 1, 1, 0]), (True, EOA, [1, 1, 1, 1, 1])):
        out = tmp_path / f"out{keep}"
        run(out, sources.root, epochs=1, context_size=5, keep_eoa_on_truncation=keep)
        assert ((40, 41), (42, 43, end)) in rows_of(out)[0]
        data = SampledData.open(out)
        found = data.scored()
        assert found is not None
        assert found.tolist() == [*scored, 1, 1, 0]


def test_a_cut_row_that_never_ended_gets_no_eoa(tmp_path: Path) -> None:
    """As windows of a document, all but the last."""
    sources = Sources(tmp_path / "tokenized")
    sources.add("windows.jsonl", [([40], [41, 42, 43]), ([40], [44, 45, EOA])])
    options = {"epochs": 1, "context_size": 3, "keep_eoa_on_truncation": True}
    run(tmp_path / "out", sources.root, **options)
    assert sorted(rows_of(tmp_path / "out")[0]) == [((40,), (41, 42)), ((40,), (44, EOA))]
    (sources.root / "tokenizer.json").unlink()  # then nothing tells which id eoa is
    run(tmp_path / "untold", sources.root, **options)
    assert sorted(rows_of(tmp_path / "untold")[0]) == [((40,), (41, 43)), ((40,), (44, EOA))]


def test_scored_is_carried_through_and_filled_up_where_a_source_has_none(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    sources.add("a.jsonl", [([40], [41, EOA]), ([42], [43, EOA])], scored=[1, 0, 1, 1, 0, 0])
    sources.add("b.jsonl", [([50], [51, EOA])])
    run(tmp_path / "out", sources.root, epochs=1)
    data = SampledData.open(tmp_path / "out")
    scored = data.scored()
    assert scored is not None
    by_id = dict(zip(data.tokens().tolist(), scored.tolist(), strict=True))
    del by_id[EOA]  # of several rows
    assert by_id == {40: 1, 41: 0, 42: 1, 43: 0, 50: 1, 51: 1}
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["scored"] is True


def test_rows_apart_from_each_other_come_to_lie_together(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    sources.add("a.jsonl", numbered_rows(7), gap=2)
    sources.add("b.jsonl", numbered_rows(7, first=60))
    run(tmp_path / "out", sources.root, epochs=1)
    expected = [TokenRow(tuple(i), tuple(r)) for i, r in numbered_rows(7)]
    expected += [TokenRow(tuple(i), tuple(r)) for i, r in numbered_rows(7, first=60)]
    (epoch,) = rows_of(tmp_path / "out")
    assert sorted(epoch) == sorted(expected)
    assert len(SampledData.open(tmp_path / "out").tokens()) == tokens_of(expected)


def test_the_tokenizer_lies_beside_the_data(tokenized: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", tokenized)
    made = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert made == (tokenized / "tokenizer.json").read_bytes()


def test_ids_take_two_bytes(tokenized: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", tokenized)
    assert np.load(tmp_path / "out" / "tokens.npy").dtype == np.uint16


# ------------------------------------------------------------------------ what is said


def test_standard_output_gets_the_report_alone(
    tokenized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["context_size=6", "epochs=1", "prefix_config_path=null", "min_resp_length=3"]
    main([f"tokenized_path={tokenized}", f"output_path={tmp_path / 'out'}", *sources])
    out, err = capsys.readouterr()
    assert out.startswith("\n### Category Coverage Stats\n| Name |")
    assert set(filter(None, (line[:1] for line in out.splitlines()))) == {"#", "|", "*"}
    assert "dropped 9 of 17 rows: response below min_resp_length=3" in err
    assert "cut 1 rows to context_size=6: no eoa at their end" in err


def test_duplicates_are_left_out_on_request_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = Sources(tmp_path / "tokenized")
    sources.add("a.jsonl", [*numbered_rows(3), *numbered_rows(2)])
    sources.add("b.jsonl", numbered_rows(4))
    run(tmp_path / "both", sources.root, epochs=1)
    assert len(rows_of(tmp_path / "both")[0]) == 9
    run(tmp_path / "once", sources.root, epochs=1, deduplicate="exact")
    (epoch,) = rows_of(tmp_path / "once")
    assert sorted(epoch) == sorted(TokenRow(tuple(i), tuple(r)) for i, r in numbered_rows(4))
    assert "dropped 5 of 9 rows: same as an earlier row" in capsys.readouterr().err
    assert not list((tmp_path / "once").glob("dupl*"))


def test_a_source_without_a_usable_row_is_named(
    tokenized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tokenized
    folder = root / "short.jsonl"
    folder.mkdir()
    for name, value in (("inst_start", 0), ("inst_len", 1), ("resp_start", 1), ("resp_len", 1)):
        np.save(folder / f"{name}.npy", np.array([value], np.uint64))
    np.save(folder / "tokens.npy", np.array([40, EOA], np.uint32))
    (folder / "metadata.json").write_text('{"source_mtime": 1, "source_size": 1}')
    run(tmp_path / "out", root, epochs=1)
    assert "1 sources have no row left, such as short.jsonl" in capsys.readouterr().err


# ------------------------------------------------------------------------ bad input


def test_what_is_wrong_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="holds no tokenized source"):
        run(out, sources.root)
    folder = sources.add("a.jsonl", numbered_rows(3))
    with pytest.raises(ValueError, match=r"no row of .* can be used with context_size=2"):
        run(out, sources.root, context_size=2)
    np.save(folder / "tokens.npy", np.load(folder / "tokens.npy") + 300)
    with pytest.raises(ValueError, match=r"a\.jsonl/tokens\.npy: ids from .*vocab_size=287"):
        run(out, sources.root)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenized"]


def test_rows_beyond_the_tokens_are_refused(tokenized: Path, tmp_path: Path) -> None:
    starts = np.load(tokenized / "a.jsonl" / "resp_start.npy")
    starts[3] = 10_000
    np.save(tokenized / "a.jsonl" / "resp_start.npy", starts)
    with pytest.raises(ValueError, match=r"a\.jsonl: row 3 has resp_start=10000"):
        run(tmp_path / "out", tokenized)


def test_an_earlier_folder_is_replaced_only_on_request(tokenized: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", tokenized)
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(tmp_path / "out", tokenized)
    run(tmp_path / "out", tokenized, epochs=1, overwrite=True)
    assert len(rows_of(tmp_path / "out")) == 1


def test_a_write_that_fails_leaves_nothing(
    tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_module.RowCopier, "epoch", fail)
    arguments = [f"tokenized_path={tokenized}", f"output_path={tmp_path / 'out'}", "epochs=1"]
    with pytest.raises(ValueError, match=r"out cannot be written \(No space left .* make room"):
        main([*arguments, "prefix_config_path=null"])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenized"]
