"""Command lines `key=value`: text stays text, and what is wrong is said in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator
from source_tree import ROOT

from data_io.options import help_text, parse_options

USAGE = "ask.py ckpt_path=..."


class Options(BaseModel):
    """One field of every kind that programs use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ckpt_path: Path = Field(description="where the model is")
    message: str = Field(default="", description="what is asked")
    condition: str | None = Field(default=None, description="how it is answered")
    data_path: Path | None = Field(default=None, alias="data.path", description="a folder of data")
    names: list[str] = Field(default_factory=list, description="several words")
    sizes: tuple[PositiveInt, ...] | None = None
    rows: PositiveInt = 4
    temperature: float = 0.0
    verbose: bool = False
    dtype: Literal["auto", "float32"] = "auto"

    @field_validator("message")
    @classmethod
    def has_no_bell(cls, message: str) -> str:
        if "\a" in message:
            raise ValueError("a bell cannot be asked")
        return message


def test_a_reader_of_the_help_may_leave_before_its_end() -> None:
    code = "from data_io.options import print_help; print_help('long\\n' * 100_000)"
    line = f'{sys.executable} -c "{code}" | head -1'
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("long\n", "")


def parse(*arguments: str) -> Options:
    return parse_options(Options, ["ckpt_path=run", *arguments], USAGE)


HOSTILE = [
    *("", " ", "null", "None", "true", "1e3", "0x10", "~", "-", "--help", "-h", "a=b=c", "=", "=="),
    *("a,b", "[a,b]", "[", "{a: b}", "${oc.env:HOME}", "${message}", "$HOME", "`id`", "a: b", "#x"),
    *(
        "!!python/object:x",
        "'",
        '"',
        '"quoted"',
        "it's",
        "line\nbreak\r\n\ttab",
        "\\n",
        "%s",
        "{0}",
    ),
    *("é 漢字 🙂 \u200d", "<|im_start|>", "\x1b[31m", "x" * 100_000),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert parse(f"message={text}").message == text


@given(st.text().filter(lambda text: "\a" not in text))
def test_any_text_is_taken_as_it_stands(text: str) -> None:
    assert parse(f"message={text}").message == text


def test_null_is_no_value_only_where_the_field_may_have_none() -> None:
    for null in ("null", "None", "NONE"):
        assert parse(f"condition={null}", f"message={null}").condition is None
        assert parse(f"message={null}").message == null
    assert parse("condition=nullable", "data.path=null").condition == "nullable"


@pytest.mark.parametrize("text", ["a,b", "[a,b]", " a , b ", "[a, b,]"])
def test_lists_are_separated_by_commas(text: str) -> None:
    assert parse(f"names={text}").names == ["a", "b"]


def test_lists_may_be_empty_absent_or_of_numbers() -> None:
    assert parse("names=[]").names == parse("names=").names == []
    assert parse("sizes=null").sizes is None
    assert parse("sizes=1,20").sizes == (1, 20)
    assert parse("names=[a").names == ["[a"]


def test_values_become_what_the_record_says() -> None:
    options = parse("rows=8", "temperature=0.7", "verbose=true", "dtype=float32", "data.path=a/b")
    assert (options.rows, options.temperature, options.verbose) == (8, 0.7, True)
    assert (options.dtype, options.data_path) == ("float32", Path("a/b"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mesage=x"], ["unknown option 'mesage'", "did you mean message?"]),
        (["--message=x"], ["unknown option '--message'", "did you mean message?"]),
        (["data_path=x"], ["did you mean data.path?"]),
        (["zzzz=x"], ["unknown option 'zzzz'", "known are ckpt_path, message", "data.path"]),
        (["=x"], ["unknown option ''"]),
        (["message"], ["'message' is no option", "key=value"]),
        (["rev neon " * 1000], ["is no option", "..."]),
        (["rows=4", "rows=4"], ["rows is given twice"]),
        (["message=a", "message=b"], ["message is given twice"]),
        (["rows=0"], ["rows=0", "greater than 0"]),
        (["rows=x", "temperature=hot"], ["rows=x", "temperature=hot", "; "]),
        (["rows=null"], ["rows=null"]),
        (["dtype=int8"], ["dtype=int8", "'auto' or 'float32'"]),
        (["sizes=1,x"], ["sizes.1=x"]),
        (["message=\a"], ["a bell cannot be asked"]),
        (["data.path="], ["data.path= names no file or folder"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], told: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        parse(*arguments)
    for text in told:
        assert text in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_missing_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"^ckpt_path=\.\.\. is required$"):
        parse_options(Options, [], USAGE)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_every_option_and_reads_none(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_options(Options, ["nonsense", flag], USAGE)
    shown = capsys.readouterr()
    assert (end.value.code, shown.err) == (0, "")
    assert shown.out.startswith(f"{USAGE}\n")
    for line in (
        "  ckpt_path    where the model is [required]",
        '  message      what is asked [""]',
        "  data.path    a folder of data [null]",
        "  names        several words [[]]",
        "  rows         [4]",
        "  verbose      [false]",
    ):
        assert line in shown.out.splitlines()


def test_help_is_never_wider_than_the_terminal() -> None:
    class Wordy(BaseModel):
        option: int = Field(default=1, description="word " * 60)

    assert max(map(len, help_text(Wordy, USAGE).splitlines())) <= 100
