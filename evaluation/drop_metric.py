"""DROP's exact match and F1 (Dua et al. 2019, section 5), for answers of one span of text.

Written from the definition; `tests/test_evaluation_drop_metric.py` holds it against numbers of
lm-eval's own implementation.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def drop_em_f1(answer: str, golds: Sequence[Sequence[str]]) -> tuple[float, float]:
    """The best exact match and the best F1 (two decimals) over the accepted answers.

    Each of `golds` is the spans of one accepted answer; those that begin with an empty span are
    passed over.
    """
    normal = normalized(answer)
    em, f1 = 0.0, 0.0
    for spans in golds:
        if not spans or not spans[0].strip():
            continue
        gold_spans = [normalized(span) for span in spans]
        em = max(em, float(gold_spans == [normal]))
        # One predicted span can be paired with one gold span; the others stay without a partner.
        best = max(_bag_f1(set(normal.split()), set(gold.split())) for gold in gold_spans)
        f1 = max(f1, round(best / len(gold_spans), 2))
    return em, f1


def _bag_f1(predicted: set[str], gold: set[str]) -> float:
    """F1 of two bags of words; 0 where gold has numbers and none of them is predicted."""
    numbers = {word for word in gold if _as_number(word) is not None}
    if numbers and not numbers & predicted:
        return 0.0
    shared = len(predicted & gold)
    precision = shared / len(predicted) if predicted else 1.0
    recall = shared / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def normalized(text: str) -> str:
    """Lower-case words without punctuation and articles; numbers as Python prints floats."""
    words = (_normal_word(word) for word in re.split(r"[ \-]", text.lower()))
    return " ".join(word for word in words if word)


def _normal_word(word: str) -> str:
    """A number keeps its sign and point; whatever else becomes one after losing them is one too."""
    if _as_number(word) is None:
        word = word.translate(PUNCTUATION)
    number = _as_number(word)
    if number is not None:
        word = str(number)
    return " ".join(ARTICLES.sub(" ", word).split())


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
