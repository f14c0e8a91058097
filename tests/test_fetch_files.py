"""Files from an address: kept, resumed where they stopped, begun again where another is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from data_io import fetch_files
from data_io.fetch_files import as_sources, fetch, fetch_all, fetch_from_hub

CONTENT = bytes(range(256)) * 5000


@dataclass
class Site:
    """A server on this machine, and what was asked of it."""

    address: str
    files: dict[str, bytes]
    tag: str = '"one"'
    knows_ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # answers end after so many bytes, in turn
    failures: list[int] = field(default_factory=list)  # codes of answers, in turn
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # name and range


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(fetch_files, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetch_files, "CHUNK_BYTES", 1000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(lambda: found))
    found = Site(f"http://127.0.0.1:{server.server_port}/data", {"a.jsonl": CONTENT})
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def handler_of(site_of: Callable[[], Site]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site = site_of()
            name, wanted = self.path.removeprefix("/data/"), self.headers.get("Range")
            site.asked.append((name, wanted))
            if site.failures or name not in site.files:
                self.send_error(site.failures.pop(0) if site.failures else 404)
                return
            content, start = site.files[name], 0
            is_same = self.headers.get("If-Range") == site.tag
            if wanted and site.knows_ranges and is_same:
                match = re.fullmatch(r"bytes=(\d+)-", wanted)
                assert match
                start = int(match[1])
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/*")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", site.tag)
            self.end_headers()
            end = start + site.cuts.pop(0) if site.cuts else len(content)
            self.wfile.write(content[start:end])

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    return Handler


def test_a_download_that_is_cut_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.cuts = [400_000, 300_000]
    fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT
    ranges = [None, "bytes=400000-", "bytes=700000-"]
    assert site.asked == [("a.jsonl", wanted) for wanted in ranges]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_later_run_goes_on_with_what_came(site: Site, tmp_path: Path) -> None:
    site.cuts, site.failures = [], []
    part = tmp_path / ".a.jsonl.part"
    part.write_bytes(CONTENT[:1234])
    part.with_name(".a.jsonl.part.sign").write_text(json.dumps(site.tag))
    fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT
    assert site.asked == [("a.jsonl", "bytes=1234-")]


@pytest.mark.parametrize("sign", ['"another"', None])
def test_a_part_of_another_file_is_fetched_again(
    site: Site, tmp_path: Path, sign: str | None
) -> None:
    part = tmp_path / ".a.jsonl.part"
    part.write_bytes(b"x" * 1234)
    if sign is not None:
        part.with_name(".a.jsonl.part.sign").write_text(json.dumps(sign))
    fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_fetched_again(site: Site, tmp_path: Path) -> None:
    part = tmp_path / ".a.jsonl.part"
    part.write_bytes(CONTENT + b"more")
    part.with_name(".a.jsonl.part.sign").write_text(json.dumps(site.tag))
    fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT


def test_a_server_without_ranges_is_read_from_the_beginning(site: Site, tmp_path: Path) -> None:
    site.knows_ranges, site.cuts = False, [100_000]
    fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT


def test_failures_of_the_server_are_tried_again(site: Site, tmp_path: Path) -> None:
    site.failures = [503, 502]
    fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    assert len(site.asked) == 3


def test_what_is_not_there_is_named_and_the_rest_kept(site: Site, tmp_path: Path) -> None:
    del site.files["a.jsonl"]
    site.files["b%20c.jsonl"] = b"b"
    with pytest.raises(ValueError, match=r"a\.jsonl is not to be had \(HTTP Error 404"):
        fetch_all(site.address, ["b c.jsonl", "a.jsonl"], tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["b c.jsonl"]
    site.files["a.jsonl"] = b"a"
    site.asked.clear()
    paths = fetch_all(site.address, ["b c.jsonl", "a.jsonl"], tmp_path, workers=2)
    assert [path.read_bytes() for path in paths] == [b"b", b"a"]
    assert site.asked == [("a.jsonl", None)]


def test_a_page_is_no_parquet_file(site: Site, tmp_path: Path) -> None:
    site.files["a.parquet"] = b"<html>"
    with pytest.raises(ValueError, match="is no Parquet file"):
        fetch(f"{site.address}/a.parquet", tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_a_server_that_stays_away_is_named_with_what_came(site: Site, tmp_path: Path) -> None:
    site.cuts = [1000, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="run again to go on from byte 1000"):
        fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    site.cuts = []
    fetch(f"{site.address}/a.jsonl", tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == CONTENT


def test_the_hub_is_asked_for_the_first_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(self: object, name: str, repo_type: str) -> list[str]:
        return ["README.md", "b.parquet", "a.parquet", "c.parquet"]

    def download(name: str, file: str, repo_type: str, local_dir: Path) -> str:
        assert (name, repo_type, local_dir) == ("someone/text", "dataset", tmp_path)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = fetch_from_hub("someone/text", 2, tmp_path)
    assert found == [tmp_path / "a.parquet", tmp_path / "b.parquet"]


def test_fetched_files_keep_their_folders_apart(tmp_path: Path) -> None:
    paths = [tmp_path / place / "train.parquet" for place in ("b", "a")]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    assert [file.name for file in as_sources(paths, tmp_path)] == [
        "b/train.parquet",
        "a/train.parquet",
    ]
    with pytest.raises(ValueError, match=r"README\.md is no \.jsonl"):
        as_sources([tmp_path / "README.md"], tmp_path)


def test_the_hub_out_of_reach_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(self: object, name: str, repo_type: str) -> list[str]:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
    with pytest.raises(ValueError, match=r"not to be had from the hub \(no network\)"):
        fetch_from_hub("someone/text", 2, tmp_path)
