"""The process in which verifiers run: one JSON request per line in, one JSON reply per line out.

    python -m evaluation.verifier_worker

Started and, when a verifier hangs, stopped by `evaluation.verifier`. math_verify's own time-outs
(5 s per parse and per comparison) work here, as this is a main thread, and give the published
verdicts; what blocks signals or memory is the starter's affair and the limit set below.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MEMORY_LIMIT = 8 << 30  # bytes of address space; a power tower must not take the machine with it
MAX_SHOWN = 200  # characters of a parsed answer in a record

Reply = dict[str, Any]


def judge_math(gold: str, answer: str, boxed: str | None) -> Reply:
    """MATH: what follows from the answer's box, else from all of it."""
    text = answer if boxed is None else boxed
    CLOCK.has_run_out = False
    target, wanted = _parsed(text), _parsed(gold)
    return {
        "correct": _is_verified(wanted, target),
        "robust": is_same_mathematics(gold, text),
        "parsed": target.shown,
        "gold_parsed": wanted.shown,
        "timed_out": CLOCK.has_run_out,
    }


def judge_integer(gold: str, text: str) -> Reply:
    """AIME's pass@k: the text that math_verify took for the answer is `gold` to the letter."""
    CLOCK.has_run_out = False
    target = _parsed(text)
    return {
        "correct": len(target.parts) > 1 and str(target.parts[1]) == gold,
        "parsed": target.shown,
        "timed_out": CLOCK.has_run_out,
    }


def judge_puzzle(task: str, config: dict[str, Any], index: int, answer: str) -> Reply:
    """What reasoning_gym's verifier gives for an answer to entry `index` of a data set."""
    dataset = _puzzles(task, json.dumps(config, sort_keys=True))
    try:
        return {"score": float(dataset.score_answer(answer=answer, entry=dataset[index]))}
    except ValueError:  # some of them expect a number
        return {"score": 0.0}


JUDGES: dict[str, Callable[..., Reply]] = {
    "math": judge_math,
    "integer": judge_integer,
    "puzzle": judge_puzzle,
}


def is_same_mathematics(gold: str, answer: str) -> bool:
    """The robust rule of MATH: equal when spelled plainly, or when both are read as formulas."""
    if plainly_spelled(gold) == plainly_spelled(answer):
        return True
    as_formula = answer if re.search(r"\$|\\\(|\\\[", answer) else f"${answer}$"
    return _is_verified(_parsed(_in_dollars(gold)), _parsed(as_formula))


def plainly_spelled(latex: str) -> str:
    """Without what makes no difference: dollars around it, spacing, sizes, names of fractions."""
    text = latex.strip().removeprefix("$").removesuffix("$").strip().removesuffix(".")
    text = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])", "", text)
    text = re.sub(r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = text.replace("{,}", "").replace(r"\$", "").replace(r"\%", "").replace("%", "")
    text = re.sub(r"(?<=\d)\s+(?=\d)(?!\d{3}(?!\d))", "~", text)  # 1 2 is not 12; 1 234 is 1234
    return re.sub(r"\s+|(?<=\d),(?=\d{3}(?!\d))", "", text)


def _in_dollars(latex: str) -> str:
    return latex if latex.startswith("$") else f"${latex}$"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What math_verify reads in a text."""

    parts: list[Any]
    timed_out: bool

    @property
    def shown(self) -> list[str]:
        return [str(part)[:MAX_SHOWN] for part in self.parts]


class OwnLimits(logging.Handler):
    """Notices when math_verify reaches a limit of its own, which it only logs."""

    has_run_out = False

    def emit(self, record: logging.LogRecord) -> None:
        if "imeout" in str(record.msg):
            self.has_run_out = True


CLOCK = OwnLimits()


def _is_verified(gold: Parsed, answer: Parsed) -> bool:
    from math_verify import verify

    return bool(verify(gold.parts, answer.parts))


def _parsed(text: str) -> Parsed:
    parsed = _parse_once(text)
    CLOCK.has_run_out |= parsed.timed_out
    return parsed


@lru_cache(maxsize=4096)  # samples of one problem repeat their answers
def _parse_once(text: str) -> Parsed:
    from math_verify import parse

    before, CLOCK.has_run_out = CLOCK.has_run_out, False
    parsed = Parsed(parse(text), CLOCK.has_run_out)
    CLOCK.has_run_out = before
    return parsed


@lru_cache(maxsize=64)
def _puzzles(task: str, config: str) -> Any:
    from reasoning_gym import create_dataset

    return create_dataset(task, **json.loads(config))


def main() -> None:
    """Replies go where stdout was; what libraries print there goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as replies:
        os.dup2(2, 1)
        _limit_memory()
        import math_verify  # noqa: F401  # takes a second: before the first clock starts

        logging.getLogger("math_verify").addHandler(CLOCK)

        print(json.dumps({"ready": True}), file=replies, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = JUDGES[request.pop("judge")](**request)
            except Exception as error:  # a verifier that fails judges the answer as wrong
                reply = {"failed": f"{type(error).__name__}"}
            print(json.dumps(reply), file=replies, flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))


if __name__ == "__main__":
    main()
