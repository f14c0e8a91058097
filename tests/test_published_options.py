"""Published spellings of command lines, as key=value."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from data_io.options import parse_options
from data_io.published_options import as_key_values


class Options(BaseModel):
    """Made up."""

    sources: tuple[Path, ...]
    output: Path
    tokenizer_path: Path | None = None
    special_tokens: tuple[str, ...] | None = Field(default=None)
    seed: int = 0


def respelled(*arguments: str) -> list[str]:
    return as_key_values(arguments, Options, by_position="sources", short={"-o": "output"})


def test_both_spellings_make_the_same_options() -> None:
    published = respelled("flan", "more.parquet", "-o", "OUT", "--tokenizer-path", "tok")
    assert published == ["output=OUT", "tokenizer_path=tok", "sources=flan,more.parquet"]
    ours = respelled("sources=flan,more.parquet", "output=OUT", "tokenizer_path=tok")
    assert parse_options(Options, published, "") == parse_options(Options, ours, "")


def test_spellings_mix() -> None:
    assert respelled("flan", "--seed=3", "output=OUT") == ["seed=3", "output=OUT", "sources=flan"]
    assert respelled("--help") == ["--help"]


def test_a_list_takes_values_up_to_the_next_option() -> None:
    tokens = ("--special-tokens", "<a>", "<b>", "<c>")
    assert respelled(*tokens, "-o", "OUT") == ["special_tokens=<a>,<b>,<c>", "output=OUT"]
    assert respelled(*tokens, "seed=1") == ["special_tokens=<a>,<b>,<c>", "seed=1"]
    assert respelled(*tokens[:2], "--seed", "1") == ["special_tokens=<a>", "seed=1"]


def test_a_list_ends_before_what_exists(tmp_path: Path) -> None:
    assert respelled("--special-tokens", "<a>", str(tmp_path)) == [
        "special_tokens=<a>",
        f"sources={tmp_path}",
    ]


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    path = tmp_path / "lr=1"
    path.mkdir()
    assert respelled(str(path)) == [f"sources={path}"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--tokenizer", "x"), "unknown option '--tokenizer'; did you mean tokenizer_path"),
        (("-x", "1"), "unknown option '-x'"),
        (("-seed", "1"), "unknown option '-seed'; did you mean seed"),
        (("sed=1",), "unknown option 'sed'; did you mean seed"),
        (("-o",), "-o has no value; write -o VALUE or output=VALUE"),
        (("-o", "--seed", "1"), "-o has no value"),
    ],
)
def test_what_is_no_option_is_named(arguments: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        respelled(*arguments)


def test_an_option_in_both_spellings_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is given twice"):
        parse_options(Options, respelled("x", "-o", "o", "--seed", "1", "seed=2"), "")
