"""What scorers share: boxes, integers, letters, averages and standard errors.

Functions called published read model output exactly as the published tables did, oddities included
(`tests/golden/evaluation`); robust ones read what the answer says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from math import sqrt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_DIGITS = 1000  # a longer number is no answer, and Python converts it in quadratic time

_NUMBER = re.compile(
    r"[-+\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?", re.ASCII
)
_LONE_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)?"
    r"(?:[(\[{*]|\\text\{)*([a-z])(?:(?:[)\]}*.:,]+(?:\s.*)?)|\s*)",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}`, else the last `\fbox{...}`, holds, stripped.

    None where there is none or its braces never balance; an earlier box is then not looked at.
    """
    start = text.rfind(r"\boxed")
    if start < 0:
        start = text.rfind(r"\fbox")
    if start < 0:
        return None
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if text[at] == "}" and depth == 0:
            return text[text.index("{", start) + 1 : at].strip()
    return None


def published_integer(text: str) -> int | None:
    """The integer of the last box, else of the whole text, as `int(float())` reads it."""
    boxed = last_box(text)
    digits = (boxed if boxed is not None else text).replace(",", "").replace("$", "")
    try:
        return int(float(digits))
    except (ValueError, OverflowError):  # no number; infinite
        return None


def robust_number(text: str) -> Decimal | None:
    """The last number of the last box, or of the whole text where no box holds one, exactly."""
    for part in (last_box(text), text):
        found = _NUMBER.findall(part.replace(r"{,}", ",").replace(r"\,", "")) if part else []
        if found:
            return _decimal(found[-1])
    return None


def _decimal(digits: str) -> Decimal | None:
    if len(digits) > MAX_DIGITS:
        return None
    try:
        number = Decimal(digits.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def published_letter(text: str, letters: Sequence[str]) -> str | None:
    """The stripped, upper-cased text where that is one of `letters`."""
    letter = text.strip().upper()
    return letter if letter in letters else None


def robust_letter(text: str, letters: Sequence[str]) -> str | None:
    r"""Also `B.`, `(B)`, `**B**`, `B) because ...`, `Answer: B` and `\boxed{B}`."""
    boxed = last_box(text)
    match = _LONE_LETTER.fullmatch((boxed or text).strip())
    return published_letter(match[1], letters) if match else None


@dataclass(frozen=True, slots=True)
class Tally:
    """What the answers of one stratum (a subject; all of a benchmark) add up to."""

    credits: tuple[float, ...]  # per item, 0 to 1
    num_invalid: int = 0

    @property
    def n(self) -> int:
        return len(self.credits)

    @property
    def accuracy(self) -> float:
        return sum(self.credits) / max(1, self.n)

    @property
    def invalid(self) -> float:
        return self.num_invalid / max(1, self.n)


def micro_average(tally: Tally) -> dict[str, float]:
    """`n`, `acc`, `invalid` over items."""
    return {"n": tally.n, "acc": tally.accuracy, "invalid": tally.invalid}


def macro_average(strata: Mapping[str, Tally]) -> dict[str, float]:
    """`n_X`, `acc_X`, `invalid_X` per stratum X, then their means; `n` counts the strata."""
    figures: dict[str, float] = {}
    for name, tally in strata.items():
        figures |= {f"{key}_{name}": value for key, value in micro_average(tally).items()}
    return figures | {
        "n": len(strata),
        "acc": mean([tally.accuracy for tally in strata.values()]),
        "invalid": mean([tally.invalid for tally in strata.values()]),
    }


def mean(values: Sequence[float]) -> float:
    """0 where there are none."""
    return sum(values) / max(1, len(values))


def sample_variance(values: Sequence[float]) -> float | None:
    """Unbiased; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return sum((value - centre) ** 2 for value in values) / (len(values) - 1)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of `values`, from their sample variance. None for fewer than two.

    For values of 0 and 1 that is the binomial `sqrt(p (1 - p) / (n - 1))`.
    """
    variance = sample_variance(values)
    return None if variance is None else sqrt(variance / len(values))


def macro_standard_error(strata: Sequence[Sequence[float]]) -> float | None:
    """Of the mean of the strata's means, for a fixed set of strata: sqrt(sum s_i^2 / n_i) / S.

    Cochran, Sampling Techniques, 3rd ed., eq. 5.8 with equal weights. A stratum of one value takes
    the mean variance of the others; None where no stratum has two.
    """
    filled = [values for values in strata if values]
    known = [variance for values in filled if (variance := sample_variance(values)) is not None]
    if not known:
        return None
    pooled = mean(known)
    total = 0.0
    for values in filled:
        variance = sample_variance(values)
        total += (pooled if variance is None else variance) / len(values)
    return sqrt(total) / len(strata)
