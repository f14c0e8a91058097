"""Boxes, integers, letters; averages and their standard errors against a bootstrap."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.scoring import (
    Tally,
    last_box,
    macro_average,
    macro_standard_error,
    mean,
    published_integer,
    published_letter,
    robust_letter,
    robust_number,
    standard_error,
)

# what models write when they go wrong
HOSTILE = st.lists(
    st.sampled_from(
        (
            *("\\boxed{", "\\boxed", "\\fbox{", "{", "}", "}}", "$", "\\frac{1}{", "^{9^{", "!"),
            *("9" * 5000, "1e999", "NaN", "-inf", "\u0664\u0662", "\uff21", "\u0410", "\ud800"),
            *("\u7b54\u6848\u662fA", "(A)", " B ", "answer is ", ",", ".", "-", "_", "\0", "\n"),
        )
    )
    | st.text(max_size=20),
    max_size=12,
).map("".join)
HARD = settings(max_examples=200, deadline=None, derandomize=True)


@given(HOSTILE)
@HARD
def test_readers_survive_hostile_text(text: str) -> None:
    boxed = last_box(text)
    assert boxed is None or boxed in text
    assert isinstance(published_integer(text), int | None)
    number = robust_number(text)
    assert number is None or number.is_finite()
    for read in (published_letter, robust_letter):
        assert read(text, ("A", "B")) in ("A", "B", None)


@given(st.text(alphabet="ab{} \\", max_size=30))
@HARD
def test_what_is_put_into_a_box_comes_out(content: str) -> None:
    depths = [
        content[: at + 1].count("{") - content[: at + 1].count("}") for at in range(len(content))
    ]
    is_balanced = not depths or (min(depths) >= 0 and depths[-1] == 0)
    if is_balanced:
        assert last_box(f"x \\boxed{{1}} \\boxed{{{content}}} y") == content.strip()


def test_long_text_is_read_in_linear_time() -> None:
    for text in ("{" * 10**6, "\\boxed{" * 10**5, "9" * 10**6, "1," * 10**5, "(" * 10**5):
        assert published_integer(text) is None and robust_letter(text, ("A",)) is None
        assert last_box(text) is None and (robust_number(text) or 1) == 1


@pytest.mark.parametrize(
    ("text", "published", "robust"),
    [
        ("\\boxed{42}", 42, 42),
        ("42", 42, 42),
        ("It is 42.", None, 42),
        ("\\boxed{8.99}", 8, "8.99"),
        ("8.99", 8, "8.99"),
        ("\\boxed{$1,250}", 1250, 1250),
        ("\\boxed{1{,}250}", None, 1250),
        ("\\boxed{0 \\text{ kg}}", None, 0),
        ("\\boxed{} so 7", None, 7),
        ("\\boxed{7", None, 7),
        ("first 3 then -5", None, -5),
        ("1_000", 1000, 0),
        ("9007199254740993", 9007199254740992, 9007199254740993),
        ("NaN", None, None),
        ("inf", None, None),
        ("1e400", None, "1e400"),
        ("", None, None),
        ("\u0664\u0662", 42, None),
        ("9" * 2000, None, None),
    ],
)
def test_integers(text: str, published: int | None, robust: int | str | None) -> None:
    assert published_integer(text) == published
    assert robust_number(text) == (None if robust is None else Decimal(robust))


@pytest.mark.parametrize(
    ("text", "published", "robust"),
    [
        ("B", "B", "B"),
        (" b\n", "B", "B"),
        ("B.", None, "B"),
        ("(B)", None, "B"),
        ("**B**", None, "B"),
        ("B) because it floats", None, "B"),
        ("Answer: B", None, "B"),
        ("The correct answer is (B).", None, "B"),
        ("\\boxed{B}", None, "B"),
        ("\\boxed{\\text{B}}", None, "B"),
        ("A nice day", None, None),
        ("E", None, None),
        ("BB", None, None),
        ("B or C", None, None),
        ("\u0410", None, None),  # Cyrillic
        ("\uff21", None, None),  # full width
        ("\u00df", None, None),  # upper case has two letters
        ("", None, None),
    ],
)
def test_letters(text: str, published: str | None, robust: str | None) -> None:
    letters = ("A", "B", "C", "D")
    assert published_letter(text, letters) == published
    assert robust_letter(text, letters) == robust


def test_a_macro_average_counts_strata_and_not_items() -> None:
    figures = macro_average({"x": Tally((1.0, 0.0, 0.0, 0.0), 1), "y": Tally((1.0,), 0)})
    assert (figures["n"], figures["acc"], figures["invalid"]) == (2, 0.625, 0.125)
    assert (figures["n_x"], figures["acc_x"], figures["n_y"]) == (4, 0.25, 1)


def bootstrap_error(strata: list[np.ndarray], draws: int = 4000) -> float:
    """Spread of the mean of the strata's means when items are drawn anew within each."""
    rng = np.random.default_rng(0)
    means = [
        np.mean([rng.choice(values, len(values)).mean() for values in strata]) for _ in range(draws)
    ]
    return float(np.std(means))


@pytest.mark.parametrize("sizes", [(400,), (60, 200, 35, 90), (150, 150)])
def test_standard_errors_agree_with_a_bootstrap(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(sizes))
    strata = [rng.choice([0, 0.25, 1], size, p=[0.3, 0.2, 0.5]).astype(float) for size in sizes]
    error = macro_standard_error([values.tolist() for values in strata])
    assert error == pytest.approx(bootstrap_error(strata), rel=0.06)
    if len(sizes) == 1:
        assert standard_error(strata[0].tolist()) == pytest.approx(error)


def test_the_standard_error_of_an_accuracy_is_the_binomial_one() -> None:
    values = [1.0] * 30 + [0.0] * 70
    assert standard_error(values) == pytest.approx((0.3 * 0.7 / 99) ** 0.5)


def test_too_few_values_have_no_standard_error() -> None:
    assert standard_error([1.0]) is None and standard_error([]) is None
    assert macro_standard_error([[1.0], [0.0]]) is None
    one_known = macro_standard_error([[1.0, 0.0], [1.0]])  # the single one takes the variance 1/2
    assert one_known == pytest.approx((0.5 / 2 + 0.5) ** 0.5 / 2)
    assert mean([]) == 0.0
