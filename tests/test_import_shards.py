"""Token shards as sampled data: every learned token once, behind the right prefix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_token_shards import CONFIG, Document, documents, write_shards

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.import_shards import main
from data_io.sampled_format import SampledData
from data_io.token_shards import Part

Ids = list[int]


def sampled(source: Path, output: Path, *options: str) -> SampledData:
    main([f"source={source}", f"output={output}", *options])
    return SampledData.open(output)


def examples_of(data: SampledData) -> list[tuple[Ids, Ids, Ids]]:
    """Prefix, response, and which of it is learned; in the order of the shards."""
    index, tokens, scored = data.epoch(0), data.tokens(), data.scored()
    found = []
    for at in np.argsort(index.resp_start):
        prefix = slice(index.inst_start[at], index.inst_start[at] + index.inst_len[at])
        response = slice(index.resp_start[at], index.resp_start[at] + index.resp_len[at])
        learned = np.ones(index.resp_len[at]) if scored is None else scored[response]
        found.append((tokens[prefix].tolist(), tokens[response].tolist(), learned.tolist()))
    return found


@pytest.fixture
def parts() -> dict[Part, list[Document]]:
    return {"val": documents(5), "train": documents(60, 1)}


def test_plain_documents_are_windows_that_end_with_the_next_bos(
    tmp_path: Path, parts: dict[Part, list[Document]]
) -> None:
    source = write_shards(tmp_path / "shards", parts, is_masked=False)
    data = sampled(source, tmp_path / "data", "context_size=9", "epochs=2")
    assert data.num_epochs == 2 and data.metadata.max_seq_len == 9 and not data.metadata.scored
    folders: dict[Part, Path] = {"val": data.folder / "validation", "train": data.folder}
    for part, folder in folders.items():
        windows = []
        for ids, _ in parts[part]:
            text = [*ids[1:].tolist(), CONFIG.bos_id]
            windows += [text[at : at + 8] for at in range(0, len(text), 8)]
        found = examples_of(SampledData.open(folder))
        assert [response for _, response, _ in found] == windows
        assert all(prefix == [CONFIG.bos_id] for prefix, _, _ in found)


def test_masked_documents_are_one_example_each(
    tmp_path: Path, parts: dict[Part, list[Document]]
) -> None:
    never, late = np.array([7, 8, 9]), np.array([7, 8, 9, 10])
    parts["train"] += [(never, np.zeros(3, np.int64)), (never, np.array([1, 0, 0]))]
    parts["train"] += [(late, np.array([0, 0, 1, 0]))]
    source = write_shards(tmp_path / "shards", parts, is_masked=True)
    data = sampled(source, tmp_path / "data", "context_size=40")
    expected = []
    for ids, mask in parts["train"]:
        learned = np.flatnonzero(mask[1:]) + 1
        if len(learned):
            first, last = learned[0], learned[-1] + 1
            expected.append((ids[:first].tolist(), ids[first:last].tolist(), mask[first:last]))
    found = examples_of(data)
    assert len(found) == len(expected) > 50
    for (prefix, response, scored), (ids, answer, mask) in zip(found, expected, strict=True):
        assert (prefix, response, scored) == (ids, answer, mask.tolist())
    assert found[-1] == ([7, 8], [9], [1])


def test_a_document_may_run_on_into_the_next_shard(tmp_path: Path) -> None:
    parts: dict[Part, list[Document]] = {"train": documents(1) + documents(20, 1)}
    whole = write_shards(tmp_path / "whole", parts, is_masked=False, shard_tokens=10_000)
    tokens = np.concatenate([ids for ids, _ in parts["train"]])
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((whole / "config.json").read_bytes())
    for number, part in enumerate(np.array_split(tokens, 7)):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        content = header.tobytes() + part.astype("<u2").tobytes()
        (cut / f"x_train_{number:06d}.bin").write_bytes(content)
    one, other = (sampled(each, tmp_path / f"{each.name}_data") for each in (whole, cut))
    assert examples_of(one) == examples_of(other)


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = np.r_[7, np.arange(8, 100)]
    parts: dict[Part, list[Document]] = {
        "train": [*documents(3), (long, np.ones(len(long), np.int64))]
    }
    source = write_shards(tmp_path / "shards", parts, is_masked=True, shard_tokens=1000)
    data = sampled(source, tmp_path / "data", "context_size=40")
    assert len(data.epoch(0)) == 3
    assert "left out: 1 documents, longer than context_size=40" in capsys.readouterr().err


def test_the_tokenizer_travels_along(tmp_path: Path, parts: dict[Part, list[Document]]) -> None:
    source = write_shards(tmp_path / "shards", parts, is_masked=False)
    tokenizer = write_byte_tokenizer(tmp_path / "tokenizer")
    data = sampled(source, tmp_path / "data", f"tokenizer={tokenizer}")
    assert data.metadata.id_limit == CONFIG.vocab_size and data.metadata.tokenizer_info.boq
    assert (data.folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert (data.folder / "validation" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('{"vocab_size": 200, "bos_id": 7}', r"id \d+ within .* is not in 0..199"),
        ('{"vocab_size": 300, "bos_id": 5}', "bos_id=5 comes nowhere"),
    ],
)
def test_ids_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, parts: dict[Part, list[Document]], config: str, told: str
) -> None:
    source = write_shards(tmp_path / "shards", parts, is_masked=False)
    (source / "config.json").write_text(config)
    with pytest.raises(ValueError, match=told):
        sampled(source, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
