"""Work is shared out in threads that stay, and that a forked process makes for itself."""

from __future__ import annotations

import multiprocessing
from threading import Barrier, Thread, current_thread

import pytest
import torch

from models.cpu_threads import share_out

THREADS = 3


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS)


def shared(end: int, max_parts: int) -> tuple[list[tuple[int, int]], set[Thread]]:
    """The parts, and the threads that they ran in."""
    parts, threads = list[tuple[int, int]](), set[Thread]()
    together = Barrier(max(1, min(max_parts, THREADS)))

    def work(first: int, end: int) -> None:
        together.wait(5)  # no thread takes two parts
        parts.append((first, end))
        threads.add(current_thread())

    share_out(work, end, max_parts=max_parts)
    return sorted(parts), threads


@pytest.mark.parametrize(
    ("max_parts", "expected"),
    [
        (0, [(0, 7)]),
        (1, [(0, 7)]),
        (2, [(0, 3), (3, 7)]),
        (9, [(0, 2), (2, 4), (4, 7)]),
    ],
)
def test_the_parts_make_up_the_whole(max_parts: int, expected: list[tuple[int, int]]) -> None:
    parts, threads = shared(7, max_parts)
    assert parts == expected
    assert len(threads) == len(expected)


def test_threads_stay_whatever_the_number_of_parts() -> None:
    _, threads = shared(7, THREADS)
    for max_parts in (2, 3, 2):
        assert shared(7, max_parts)[1] <= threads


def test_an_error_reaches_the_caller() -> None:
    def work(first: int, end: int) -> None:
        raise FloatingPointError(f"{first} to {end}")

    with pytest.raises(FloatingPointError, match="0 to 3"):
        share_out(work, 7, max_parts=2)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    shared(7, 3)
    child = multiprocessing.get_context("fork").Process(target=shared, args=(7, 3), daemon=True)
    child.start()
    child.join(5)
    is_stuck = child.exitcode is None
    child.kill()
    assert not is_stuck
    assert child.exitcode == 0
