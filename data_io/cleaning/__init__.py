"""Published data sets made rows to train on: one file and one small function per source.

A function takes the fields of a row and gives a `Row`, or raises `BadRowError` with the reason by
which the row is counted. `python -m data_io.clean` streams the rows through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from data_io.cleaning.competition_math import MATH
from data_io.cleaning.gsm8k import GSM8K
from data_io.cleaning.no_robots import NO_ROBOTS
from data_io.cleaning.source import CleanedSource

SOURCES: Mapping[str, CleanedSource] = MappingProxyType(
    {"gsm8k": GSM8K, "math": MATH, "no_robots": NO_ROBOTS}
)
