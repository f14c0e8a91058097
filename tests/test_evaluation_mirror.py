"""Reading data sets from a mirror or the hub, and writing the mirror."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_cases import GOLDEN_DATA, golden_mirror

from evaluation.benchmarks import BENCHMARKS
from evaluation.benchmarks.arc import ARC
from evaluation.benchmarks.gsm8k import GSM8k
from evaluation.benchmarks.protocol import Split
from evaluation.fetch import main, wanted_splits
from evaluation.mirror import Hub, LocalMirror, data_source, read_rows

OFFLINE_BENCHMARKS = [name for name in BENCHMARKS if name not in ("DROP", "reasoning_gym")]
COPY = f"from_dir={GOLDEN_DATA}"


def test_a_missing_file_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        ARC().load(LocalMirror(tmp_path))
    message = str(refused.value)
    assert str(tmp_path / "allenai__ai2_arc" / "ARC-Challenge" / "validation.jsonl") in message
    assert f"python -m evaluation.fetch data_dir={tmp_path} run_only=[ARC]" in message


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k" / "main" / "test.jsonl"
    file.parent.mkdir(parents=True)
    for text, why in (('{"question": "a"', "no JSON"), ("[1]", "no JSON object")):
        file.write_text(f"\n{text}\n")
        with pytest.raises(ValueError, match=rf"test\.jsonl:2 is {why}"):
            GSM8k().load(LocalMirror(tmp_path))
    file.write_bytes(b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl:2 is no JSON: 'utf-8' codec"):
        GSM8k().load(LocalMirror(tmp_path))
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"test\.jsonl has no rows"):
        GSM8k().load(LocalMirror(tmp_path))
    parquet = tmp_path / "x.parquet"
    parquet.write_text("no parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is no Parquet file"):
        list(read_rows(parquet))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", OFFLINE_BENCHMARKS)
def test_a_copied_mirror_gives_the_same_items(name: str, suffix: str, tmp_path: Path) -> None:
    main([f"data_dir={tmp_path}", COPY, f"run_only=[{name}]", f"format={suffix}"])
    copied = BENCHMARKS[name]().load(LocalMirror(tmp_path))
    assert copied == BENCHMARKS[name]().load(golden_mirror())
    assert {file.suffix for file in tmp_path.rglob("*.*")} == {f".{suffix}"}


def test_what_is_there_is_kept_and_the_hubs_file_names_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"data_dir={tmp_path}", COPY, "run_only=[GSM8k]", "format=parquet"])
    file = tmp_path / "gsm8k" / "main" / "test.parquet"
    for part in ("00000", "00001"):
        shutil.copy(file, file.with_name(f"test-{part}-of-00002.parquet"))
    file.unlink()
    main([f"data_dir={tmp_path}", COPY, "run_only=[GSM8k]"])
    assert capsys.readouterr().out.endswith("gsm8k/main/test: is there\n")
    assert len(GSM8k().load(LocalMirror(tmp_path)).items) == 20
    file.with_name("test-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"has 1 of the parts .*test-00001-of-00002\.parquet"):
        GSM8k().load(LocalMirror(tmp_path))


def test_what_needs_no_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([f"data_dir={tmp_path}", "run_only=[reasoning_gym]"])
    assert "needs no data" in capsys.readouterr().out


def test_a_mirror_that_lacks_a_split_is_copied_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"data_dir={tmp_path}", COPY])
    assert ended.value.code == 2
    assert "not have EleutherAI/drop/default/train (DROP)" in capsys.readouterr().err
    copied = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl")}
    golden = {path.relative_to(GOLDEN_DATA) for path in GOLDEN_DATA.rglob("*.jsonl")}
    assert copied == golden


def test_an_unknown_benchmark_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([f"data_dir={tmp_path}", "run_only=[GSM9k]"])
    assert "did you mean GSM8k?" in capsys.readouterr().err


def test_both_years_of_aime_are_fetched() -> None:
    assert [str(split)[:14] for split in wanted_splits(["AIMEMajorityVoting"])] == [
        "math-ai/aime25",
        "math-ai/aime24",
    ]
    assert Split("EleutherAI/drop", "train") in wanted_splits([])


def stub_hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_the_hub_is_asked_for_the_published_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load_dataset(dataset: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((dataset, config, split))
        return [{"question": "1 + 1?", "answer": "#### 2"}]

    stub_hub(monkeypatch, load_dataset)
    main([f"data_dir={tmp_path}", "run_only=[GSM8k]"])
    assert asked == [("gsm8k", "main", "test")]
    assert data_source(None) == Hub()
    for source in (Hub(), LocalMirror(tmp_path)):
        (item,) = GSM8k().load(source).items
        assert (item.id, item.prompt, item.truth) == ("test/0", "1 + 1?", 2)


def test_a_hub_out_of_reach_names_the_mirror_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it\nand more")

    stub_hub(monkeypatch, load_dataset)
    with pytest.raises(FileNotFoundError, match=r"reach it\)\. Without a network, .*data_dir=DIR"):
        GSM8k().load(Hub())
    with pytest.raises(SystemExit):
        main([f"data_dir={tmp_path}", "run_only=[GSM8k]"])
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.*"))


def test_a_download_that_breaks_off_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        yield {"question": "q", "answer": "#### 1"}
        raise OSError("gone")

    stub_hub(monkeypatch, load_dataset)
    with pytest.raises(SystemExit):
        main([f"data_dir={tmp_path}", "run_only=[GSM8k]"])
    assert not list(tmp_path.rglob("*.*"))
