"""From documents to tokenizer, shards and sampled data: of a folder, and of a server here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.fetch_files import fetch
from data_io.prepare_corpus import main
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from data_io.token_shards import Part, ShardFolder

NUM_FILES, DOCUMENTS = 3, 30


def text(number: int) -> str:
    lines = (f"The number {number} times {k} is {number * k}.\n" for k in range(8))
    return "".join(lines) + "é<|im_end|>"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for file in range(NUM_FILES):
        texts = [text(file * DOCUMENTS + number) for number in range(DOCUMENTS)]
        table = pa.table({"text": [*texts, ""], "id": [str(k) for k in range(DOCUMENTS + 1)]})
        pq.write_table(table, folder / f"shard_{file:05d}.parquet")
    return folder


def command(source: object, output: Path, *options: str) -> list[str]:
    small = ("vocab_size=305", "tok_train_shards=1", "context_size=33")
    return [f"source={source}", f"output={output}", *small, *options]


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "corpus"
    main(command(source, output, "epochs=2", "shard_tokens=3000"))
    return output


def format_of(folder: Path) -> PromptFormat:
    return PromptFormat.from_info(SampledData.open(folder).metadata.tokenizer_info, folder)


def shard_texts(folder: Path, prompt_format: PromptFormat, part: Part) -> list[str]:
    shards = ShardFolder.open(folder)
    tokens = np.concatenate([shard.tokens() for shard in shards.parts[part]])
    starts = np.flatnonzero(tokens == shards.config.bos_id)
    assert starts[0] == 0
    return [prompt_format.decode(ids.tolist()) for ids in np.split(tokens, starts[1:])]


def sampled_texts(folder: Path, prompt_format: PromptFormat) -> list[str]:
    data = SampledData.open(folder)
    index, tokens = data.epoch(0), data.tokens()
    ids = [
        tokens[start : start + length]
        for start, length in sorted(zip(index.resp_start, index.resp_len, strict=True))
    ]
    assert set(index.inst_len) == {1}
    whole = np.concatenate(ids)
    ends = np.flatnonzero(whole == prompt_format.eoa_id) + 1
    return [prompt_format.decode(each.tolist()) for each in np.split(whole, ends[:-1])]


def test_the_last_file_is_for_validation_in_both_formats(made: Path) -> None:
    prompt_format = format_of(made / "sampled")
    texts = [text(number) for number in range(NUM_FILES * DOCUMENTS)]
    parts: tuple[tuple[Part, Path, list[str]], ...] = (
        ("train", made / "sampled", texts[:-DOCUMENTS]),
        ("val", made / "sampled" / "validation", texts[-DOCUMENTS:]),
    )
    for part, folder, expected in parts:
        assert shard_texts(made / "bin", prompt_format, part) == expected
        assert sampled_texts(folder, prompt_format) == expected
    assert SampledData.open(made / "sampled").num_epochs == 2


def test_the_summary_counts_what_is_there(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    texts = [text(number) for number in range(NUM_FILES * DOCUMENTS)]
    assert summary["dropped_rows"] == {"empty text": NUM_FILES}
    parts: dict[Part, list[str]] = {"train": texts[:-DOCUMENTS], "val": texts[-DOCUMENTS:]}
    for part, expected in parts.items():
        size = summary[part]
        tokens = sum(len(each.tokens()) for each in ShardFolder.open(made / "bin").parts[part])
        assert size["num_documents"] == len(expected)
        assert size["num_tokens"] == tokens - len(expected)  # without bos_id
        assert size["num_bytes"] == sum(len(each.encode()) for each in expected)
        assert size["bytes_per_token"] == size["num_bytes"] / size["num_tokens"] > 1.5


def test_the_tokenizer_comes_with_its_bytes_and_a_comparison(made: Path) -> None:
    shards = ShardFolder.open(made / "bin")
    assert shards.config.vocab_size == 305 and not shards.is_masked
    bytes_of = np.load(made / "tokenizer" / "token_bytes.npy")
    tokens = np.concatenate([shard.tokens() for shard in shards.parts["val"]])
    summary = json.loads((made / "summary.json").read_text())
    assert bytes_of[tokens].sum() == summary["val"]["num_bytes"]
    assert "| validation |" in (made / "tokenizer" / "comparison.md").read_text()
    for folder in ("bin", "sampled", "sampled/validation"):
        copy = (made / folder / "tokenizer.json").read_bytes()
        assert copy == (made / "tokenizer" / "tokenizer.json").read_bytes()


def test_the_same_command_does_nothing_again_and_another_is_refused(
    made: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    main(command(source, made, "epochs=2", "shard_tokens=3000"))
    assert "is already made" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"was made otherwise \(epochs differ"):
        main(command(source, made, "epochs=1", "shard_tokens=3000"))
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_what_a_stopped_run_left_is_kept(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    main(command(source, output))
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "bin").iterdir()}
    tokenizer = (output / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    summary = (output / "summary.json").read_bytes()
    (output / "summary.json").unlink()
    (output / "sampled").rename(tmp_path / "sampled")
    main(command(source, output))
    assert {path.name: path.stat().st_mtime_ns for path in (output / "bin").iterdir()} == kept
    assert (output / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer
    assert (output / "summary.json").read_bytes() == summary
    name = "epoch_0/resp_start.npy"
    assert (output / "sampled" / name).read_bytes() == (tmp_path / "sampled" / name).read_bytes()


def test_a_command_that_failed_early_can_be_corrected(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    with pytest.raises(ValueError, match="leaves no room for merges"):
        main([*command(source, output)[:2], "vocab_size=100"])
    main(command(source, output, "formats=bin"))
    assert json.loads((output / "recipe.json").read_text())["vocab_size"] == 305


def test_files_of_equal_names_in_several_folders_are_told_apart(
    source: Path, tmp_path: Path
) -> None:
    for number, file in enumerate(sorted(source.iterdir())):
        place = tmp_path / "texts" / f"part{number}"
        place.mkdir(parents=True)
        (place / "train.parquet").write_bytes(file.read_bytes())
    options = ("formats=bin", "tok_train_shards=2")
    arguments = command(tmp_path / "texts", tmp_path / "corpus", *options)
    main([each for each in arguments if each != "tok_train_shards=1"])
    files = json.loads((tmp_path / "corpus" / "recipe.json").read_text())["files"]
    assert [name for name, _ in files] == [f"part{k}/train.parquet" for k in range(NUM_FILES)]


def test_of_a_single_file_some_documents_are_held_out(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps({"text": text(number)}) + "\n" for number in range(300)))
    tokenizer = write_byte_tokenizer(tmp_path / "bytes")
    options = (f"tokenizer={tokenizer}", "formats=bin")
    main(command(file, tmp_path / "corpus", *options))
    assert not (tmp_path / "corpus" / "sampled").exists()
    prompt_format = PromptFormat.load(
        tokenizer, boq="<|im_start|>", eoq="<|im_end|>", eoa="<|box_end|>", conditions={}
    )
    val, train = (
        shard_texts(tmp_path / "corpus" / "bin", prompt_format, part) for part in ("val", "train")
    )
    assert 0 < len(val) < 12 and sorted(val + train) == sorted(text(k) for k in range(300))


@pytest.fixture
def address(source: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(source)))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_files_at_an_address_are_fetched_once(
    address: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "corpus"
    main(command(address, output, "num_shards=2", "formats=sampled"))
    names = [f"shard_{number:05d}.parquet" for number in range(2)]
    assert sorted(path.name for path in (tmp_path / "corpus_source").iterdir()) == names
    prompt_format = format_of(output / "sampled")
    expected = [text(DOCUMENTS + number) for number in range(DOCUMENTS)]
    assert sampled_texts(output / "sampled" / "validation", prompt_format) == expected
    fetched: list[str] = []
    monkeypatch.setattr("data_io.fetch_files.fetch", lambda *_: fetched.append("again"))
    main(command(address, output, "num_shards=2", "formats=sampled"))
    assert not fetched and callable(fetch)


def test_uploading_is_asked_for_and_private(
    made: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    def create(self: object, name: str, **options: object) -> None:
        done.append((name, options["repo_type"], options["private"]))

    def upload(self: object, **options: object) -> None:
        done.append((options["repo_id"], options["repo_type"], options["folder_path"]))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    main(command(source, made, "epochs=2", "shard_tokens=3000"))
    assert not done
    main(command(source, made, "epochs=2", "shard_tokens=3000", "upload=someone/corpus"))
    assert done == [("someone/corpus", "dataset", True), ("someone/corpus", "dataset", made)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["source=nowhere"], "is no folder, no address"),
        (["source=http://127.0.0.1:9/"], "num_shards says how many"),
        (["source=http://127.0.0.1:9/", "num_shards=1", "shard_name=x"], "names no files by num"),
        (["source=http://127.0.0.1:9/", "num_shards=1", "shard_name={a}"], "cannot be numbered"),
        (["formats=text"], "formats"),
        (["bos=<|begin|>"], "is no token of the tokenizer"),
        (["vocab_size=100"], "leaves no room for merges"),
    ],
)
def test_bad_options_are_refused(
    source: Path, tmp_path: Path, options: list[str], told: str
) -> None:
    given = {option.partition("=")[0]: option for option in command(source, tmp_path / "corpus")}
    given |= {option.partition("=")[0]: option for option in options}
    with pytest.raises(ValueError, match=told):
        main(list(given.values()))
    left = {path.name for path in tmp_path.rglob("*")}
    assert not left & {"bin", "sampled", "summary.json"}
    assert not any("partial" in name for name in left)
