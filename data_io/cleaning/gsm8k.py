"""GSM8K: word problems with solutions that people wrote, hence the condition cot.

The calculator's marks `<<48/2=24>>` go: nothing computes them when a model answers. The last line
`#### 1,000` becomes `\\boxed{1000}`, which is where the published scoring looks for the integer.
"""

from __future__ import annotations

import re

from data_io.cleaning.source import CleanedSource
from data_io.readers import Fields, text_field
from data_io.records import BadRowError, Row

CALCULATION = re.compile(r"<<[^<>]*>>")
INTEGER = re.compile(r"-?[0-9]+")


def clean(fields: Fields) -> Row:
    question = text_field(fields, "question").strip()
    solution, mark, final = text_field(fields, "answer").rpartition("####")
    if not question:
        raise BadRowError("empty question")
    if not mark:
        raise BadRowError("no final answer", "no line begins with ####")
    number = final.strip().replace(",", "")
    if not INTEGER.fullmatch(number):
        raise BadRowError("final answer is no integer", f"{final.strip()!r:.40}")
    steps = CALCULATION.sub("", solution).strip()
    if not steps:
        raise BadRowError("no solution", "nothing stands before ####")
    return Row("cot", question, f"{steps}\n\\boxed{{{number}}}")


GSM8K = CleanedSource("openai/gsm8k", clean, names=("main",))
