"""What lies on another node's disk is sent, piece by piece, and nobody is left waiting."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from thread_ranks import as_ranks

import training.sent_pieces
from training.distributed import World
from training.sent_pieces import StoredPiece, exchange

Asked = dict[int, list[StoredPiece]]  # by rank


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Of three ranks, each with a disk of its own; the last two have a file twice."""
    folders = [tmp_path / str(rank) for rank in range(3)]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        (folder / f"__{rank}_0").write_bytes(bytes(range(10 * rank, 10 * rank + 10)))
    (folders[2] / "__1_0").write_bytes(b"twice and another")
    return folders


def sent(folders: list[Path], asked: Asked, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What each rank was given, or what it raised."""
    here = threading.local()
    monkeypatch.setattr(training.sent_pieces, "_world", lambda: here.world)

    def ask(world: World) -> object:
        here.world = world
        got = []

        def use(piece: StoredPiece, content: bytes) -> None:
            if piece.start == 9:
                raise ValueError("this is no tensor")
            got.append((piece, list(content)))

        exchange(folders[world.rank], asked.get(world.rank, []), use)
        return got

    return as_ranks(len(folders), ask)


def test_each_gets_what_it_asked_for(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = StoredPiece("__1_0", 2, 3), StoredPiece("__2_0", 0, 2)
    asked = {0: [second, first], 1: [second], 2: []}
    expected = [[(first, [12, 13, 14]), (second, [20, 21])], [(second, [20, 21])], []]
    assert sent(folders, asked, monkeypatch) == expected


def test_nothing_is_sent_where_nobody_asks(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.sent_pieces, "_read", None)
    assert sent(folders, {}, monkeypatch) == [[], [], []]


def test_what_nobody_has_is_an_error_of_all(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = sent(folders, {1: [StoredPiece("__7_0", 0, 1)]}, monkeypatch)
    assert all("__7_0 is on no disk" in str(each) for each in told)
    told = sent(folders, {1: [StoredPiece("__0_0", 8, 5)]}, monkeypatch)  # it is cut short
    assert all(str(each).startswith("rank 0 cannot read") for each in told)


def test_a_rank_that_cannot_use_a_piece_does_not_keep_others_waiting(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = StoredPiece("__1_0", 9, 1), StoredPiece("__2_0", 0, 1)
    told = sent(folders, {0: [bad, good], 1: [good]}, monkeypatch)
    assert str(told[0]) == "this is no tensor"
    assert told[1:] == [[(good, [20])], []]
