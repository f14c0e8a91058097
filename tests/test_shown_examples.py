"""Examples on the screen: what is read, learned and passed over."""

from __future__ import annotations

import pytest

from data_io.byte_tokenizer import byte_tokenizer
from data_io.examples import Example
from data_io.shown_examples import SHOWN_CHARS, shown

TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def test_stretches_are_shown_by_what_becomes_of_them() -> None:
    example = Example([6, *ids("why?")], ids("abcd"), [1, 0, 0, 1])
    assert shown(TOKENIZER, example, is_colored=False).split("\n") == [
        "example of 5 + 4 tokens",
        "  read    <|im_start|>why?",
        "  learned a",
        "  passed  bc",
        "  learned d",
    ]


def test_colours_wait_for_a_terminal_and_obey_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    example = Example(ids("q"), ids("a"))
    assert "\x1b" not in shown(TOKENIZER, example)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32ma\x1b[0m" in shown(TOKENIZER, example)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(TOKENIZER, example)


def test_text_cannot_steer_the_terminal_and_is_cut() -> None:
    text = shown(TOKENIZER, Example(ids("\x1b[2J\n"), ids("x" * 5000)), is_colored=False)
    assert "\x1b" not in text and r"\x1b[2J\n" in text
    assert SHOWN_CHARS < len(text) < SHOWN_CHARS + 100
