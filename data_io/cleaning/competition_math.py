"""MATH: competition problems with solutions that people wrote, hence the condition cot.

The text stays as it is, LaTeX and diagrams included. A solution without a box is left out: the
published scoring reads the box alone.
"""

from __future__ import annotations

import re

from data_io.cleaning.source import CleanedSource
from data_io.readers import Fields, text_field
from data_io.records import BadRowError, Row

BOX = re.compile(r"\\(?:boxed|fbox)\s*[{0-9a-zA-Z\\]")


def clean(fields: Fields) -> Row:
    problem = text_field(fields, "problem").strip()
    solution = text_field(fields, "solution").strip()
    if not problem:
        raise BadRowError("empty problem")
    if not solution:
        raise BadRowError("no solution")
    if not BOX.search(solution):
        raise BadRowError("no boxed answer")
    return Row("cot", problem, solution)


MATH = CleanedSource(
    "EleutherAI/hendrycks_math",
    clean,
    names=(
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ),
)
