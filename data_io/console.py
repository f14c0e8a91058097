"""What a data command says on the terminal, and how it ends: standard output is for results."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130  # the exit code that shells give Ctrl-C


def note(*lines: str) -> None:
    """Prints on standard error."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def refuse(message: str) -> NoReturn:
    """Bad input: one message, and exit code 2."""
    note(f"error: {message}")
    sys.exit(2)


def run_command(command: Callable[[list[str]], None]) -> None:
    """Runs a command on the arguments of this process; what is wrong becomes one message."""
    try:
        command(sys.argv[1:])
    except (ValueError, OSError) as error:
        refuse(_told(error))
    except KeyboardInterrupt:
        note("interrupted; run the same command again")
        sys.exit(INTERRUPTED)


def _told(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
        return (
            f"{error.strerror}: the output does not fit; make room, or choose another place, and "
            "run the same command again"
        )
    return str(error)
