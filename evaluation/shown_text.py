"""Texts of models and data sets made fit to be shown: what is invisible becomes visible.

Escaping for HTML, Markdown and LaTeX; a model may have written script tags, control characters,
text that runs from right to left, or a megabyte.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import Any

_KEPT = "\n\t"
_CONTROL_PICTURES = 0x2400  # U+2400 shows U+0000, and so on to U+0020
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories of Unicode
_STACKED = re.compile(r"[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u20d0-\u20ff]{5,}")
_MARKED = re.compile(r"[\\`*\[<>|~$&]|(?<!\w)_|_(?!\w)")  # but within a word
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{symbol: f"\\{symbol}" for symbol in "&%$#_"},
}


def visible(text: str) -> str:
    """The text with control and format characters, and halves of pairs, as symbols or codes."""
    shown = "".join(_visible_character(character) for character in text)
    return _STACKED.sub(lambda match: f"[{len(match[0])} marks]", shown)


def _visible_character(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(_CONTROL_PICTURES + code)
    return f"[U+{code:04X}]"


def shortened(text: str, characters: int) -> str:
    """Beginning and end of a long text, with what is left out between them."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


def as_text(value: Any) -> str:
    """A truth or an extracted answer, of whatever type."""
    if value is None:
        return "none"
    if isinstance(value, dict):  # a puzzle: what its verifier needs
        told = ", ".join(
            f"{key} {value[key]}" for key in ("task", "level", "index") if key in value
        )
        return value.get("response") or f"as the verifier says ({told})"
    if isinstance(value, list):  # of accepted answers, each a list of spans
        return " | ".join(
            ", ".join(each) if isinstance(each, list) else str(each) for each in value
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def in_html(text: str) -> str:
    return html.escape(visible(text), quote=True)


def in_markdown_cell(text: str) -> str:
    """Text within a line or a cell of a table."""
    flat = " ".join(visible(text).split())
    return _MARKED.sub(r"\\\g<0>", flat)


def markdown_block(text: str) -> str:
    """Text as a code block that it cannot end."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"


def in_latex(text: str) -> str:
    flat = " ".join(visible(text).split())
    return "".join(_LATEX.get(character, character) for character in flat)
