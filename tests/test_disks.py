"""Ranks find out which of them see one folder, and leave nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from commands import files_in
from run_cases import ALONE
from thread_ranks import as_ranks

import training.disks
from training.agreement import errors_of_all
from training.disks import find_disks, told_disks
from training.distributed import Disk, World

HOSTS = ["a", "a", "b", "b"]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Each rank sets `name`: the machine that it runs on."""
    here = threading.local()
    monkeypatch.setattr(training.disks, "_MACHINE", Path("/nowhere"))
    monkeypatch.setattr(training.disks, "PATIENCE_S", 0.2)
    monkeypatch.setattr("socket.gethostname", lambda: here.name)
    return here


def found(machines: threading.local, folders: list[Path], hosts: list[str] = HOSTS) -> list[object]:
    """What each rank finds of a run in its folder."""

    def look(world: World) -> object:
        machines.name = hosts[world.rank]
        return find_disks(folders[world.rank] / "checkpoints/data/run", world)

    return as_ranks(len(folders), look)


def test_one_process_looks_nowhere() -> None:
    assert find_disks(Path("/nowhere/at/all"), ALONE) == ()


@pytest.mark.parametrize("hosts", [HOSTS, ["a"] * 4])
def test_ranks_that_see_one_folder_have_no_disks_of_their_own(
    tmp_path: Path, machines: threading.local, hosts: list[str]
) -> None:
    assert found(machines, [tmp_path] * 4, hosts) == [()] * 4
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("hosts", [HOSTS, ["a"] * 4])
def test_ranks_are_told_by_what_they_see(
    tmp_path: Path, machines: threading.local, hosts: list[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "checkpoints").mkdir(parents=True)
    other.mkdir()
    disks = (Disk(hosts[0], (0, 1)), Disk(hosts[2], (2, 3)))
    assert found(machines, [one, one, other, other], hosts) == [disks] * 4
    assert list(files_in(tmp_path)) == ["one", "one/checkpoints", "other"]


def test_nodes_that_take_turns_are_told_apart(tmp_path: Path, machines: threading.local) -> None:
    folders = [tmp_path / name for name in "abab"]
    for folder in folders[:2]:
        folder.mkdir()
    disks = (Disk("a", (0, 2)), Disk("b", (1, 3)))
    assert found(machines, folders, ["a", "b", "a", "b"]) == [disks] * 4
    assert told_disks(disks) == (
        "a (ranks 0, 2), b (ranks 1, 3): each keeps its part of every checkpoint"
    )


def test_sight_in_one_direction_is_refused(
    tmp_path: Path, machines: threading.local, monkeypatch: pytest.MonkeyPatch
) -> None:
    appears = training.disks._appears
    monkeypatch.setattr(
        training.disks, "_appears", lambda *each: machines.name == "a" or appears(*each)
    )
    for name in "ab":
        (tmp_path / name).mkdir()
    told = found(machines, [tmp_path / name for name in "aabb"])
    beginning = "a (ranks 0-1) sees what b (ranks 2-3) writes around"
    assert all(str(each).startswith(beginning) for each in told)
    assert list(files_in(tmp_path)) == ["a", "b"]


def test_a_folder_that_cannot_be_written_to_is_an_error_of_all(
    tmp_path: Path, machines: threading.local, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = Path.touch

    def refuse(path: Path) -> None:
        if machines.name == "b":
            raise PermissionError(f"nobody may write {path}")
        touch(path)

    monkeypatch.setattr(Path, "touch", refuse)
    for name in "ab":
        (tmp_path / name).mkdir()
    told = found(machines, [tmp_path / name for name in "aabb"])
    assert all(str(each).startswith("b (ranks 2-3): nobody may write") for each in told)
    assert list(files_in(tmp_path)) == ["a", "b"]


def test_what_went_wrong_with_one_rank_is_known_to_all() -> None:
    said = ["", "the disk is full " * 100, ""]
    (found,) = {tuple(each) for each in as_ranks(3, lambda w: errors_of_all(w, said[w.rank]))}
    assert len(found) == 1 and found[0].startswith("the disk is full the disk")
