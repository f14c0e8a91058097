"""How the data commands end: one message, and the exit code."""

from __future__ import annotations

import errno
import os

import pytest

from data_io.console import run_command


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("x=1: too small; use 2"), 2, "error: x=1: too small; use 2\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            2,
            "error: No space left on device: the output does not fit; make room, or choose another "
            "place, and run the same command again\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.jsonl"),
            2,
            "error: [Errno 2] No such file or directory: 'a.jsonl'\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again\n"),
    ],
)
def test_what_goes_wrong_is_one_message(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(command)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err) == (code, "", told)
