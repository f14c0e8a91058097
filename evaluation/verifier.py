"""Verifiers under a time limit, in a process of their own that is used for many answers.

A verifier that hangs is killed with its process, one that takes the process down is noticed; the
answer counts as wrong, the reason is reported, and the next answer finds a fresh process.
"""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

LIMIT_S = 30.0  # for one answer; math_verify's own limits are 5 s per parse and per comparison
START_S = 120.0
OWN_LIMIT = "math_verify reached its own limit of 5 s (counted as wrong)"
WORKER = "evaluation.verifier_worker"
ROOT = Path(__file__).resolve().parent.parent


class VerifierStoppedError(Exception):
    """No verdict came; the text says why, for the report."""


@dataclass
class Verifier:
    """A process of `evaluation.verifier_worker`, started when first asked."""

    limit_s: float = LIMIT_S
    _process: subprocess.Popen[str] | None = field(default=None, init=False)
    _replies: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def ask(self, judge: str, **request: Any) -> dict[str, Any]:
        """The reply of one of the worker's judges. VerifierStoppedError where there is none."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"judge": judge, **request}) + "\n")
                process.stdin.flush()
            except OSError:
                self._stop()
                raise VerifierStoppedError(
                    "the verifier ended by itself (counted as wrong)"
                ) from None
            reply = self._next_reply(self.limit_s)
        if "failed" in reply:
            raise VerifierStoppedError(f"the verifier failed: {reply['failed']} (counted as wrong)")
        return reply

    def close(self) -> None:
        """Ends the process; a later `ask` starts another."""
        with self._lock:
            self._stop()

    def _next_reply(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=limit_s)
        except queue.Empty:
            self._stop()
            raise VerifierStoppedError(
                f"the verifier was stopped after {limit_s:g} s (counted as wrong)"
            ) from None
        if line is None:
            self._stop()
            raise VerifierStoppedError("the verifier ended by itself (counted as wrong)")
        return json.loads(line)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        self._replies = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C would end it, and an answer count as wrong for that
        )
        reader = threading.Thread(target=_pass_on, args=(self._process, self._replies), daemon=True)
        reader.start()
        try:
            self._next_reply(START_S)
        except VerifierStoppedError:
            raise RuntimeError(
                f"`python -m {WORKER}` does not start; run it to see why. It needs "
                "`pip install math-verify==0.9.0 latex2sympy2_extended==1.11.0`"
            ) from None
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    _close(stream)
            self._process = None


def _pass_on(process: subprocess.Popen[str], replies: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with suppress(ValueError):  # closed by _stop
        for line in process.stdout:
            replies.put(line)
    replies.put(None)


def _close(stream: Any) -> None:
    with suppress(OSError):  # what was still to be written finds no reader
        stream.close()


@lru_cache(maxsize=1)
def shared_verifier() -> Verifier:
    """The one that all benchmarks of this process ask."""
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier
