"""What an inspection found as one HTML file that loads nothing and runs no script.

inspect_page.html owns how it looks. Special tokens are set apart from text that spells them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from data_io.examples import Example
from data_io.inspection import Lengths, Overview, Packing, Shelves
from data_io.inspection_text import MOST_SOURCES, facts, packing_line, shape_line
from data_io.prompt_format import PromptFormat

TEMPLATE = Path(__file__).with_name("inspect_page.html")
SHOWN_IDS = 1500  # of each part of an example
# control characters, marks that turn the direction of text, halves of pairs
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
KINDS = (
    ("read", "instruction: read"),
    ("learned", "response: learned"),
    ("passed", "response: read, not learned"),
)


def inspection_page(
    shelves: Shelves, found: Overview, packing: Packing | str | None, numbers: Sequence[int]
) -> str:
    """The whole file. `packing`: why it could not be done, where it could not."""
    parts = {
        "__TITLE__": _escaped(f"Data {shelves.folder}"),
        "__HEADER__": f"<h1>{_escaped(str(shelves.folder))}</h1>"
        f'<div class="soft">{_escaped(f"{shelves.kind} data, {shape_line(shelves)}")}</div>',
        "__MAIN__": "\n".join(_sections(shelves, found, packing, numbers)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub("|".join(parts), lambda match: parts[match[0]], template)


def _sections(
    shelves: Shelves, found: Overview, packing: Packing | str | None, numbers: Sequence[int]
) -> Iterator[str]:
    rows = list(facts(shelves, found))
    if packing is not None:
        told = packing if isinstance(packing, str) else packing_line(packing)
        rows.append(("packing", told))
    yield _section("What is there", _facts(rows))
    yield _section("Lengths", _bars(found.lengths))
    if found.conditions is not None and len(found.conditions) > 1:
        shares = [
            (name, f"{count:,}", f"{count / found.num_looked_at:.1%}")
            for name, count in found.conditions.most_common()
        ]
        yield _section("Conditions", _table(("condition", "rows looked at", "share"), shares))
    if len(found.sources) > 1:
        sources = [
            (name, f"{count:,}", f"{tokens:,}", f"{tokens / max(1, found.lengths.tokens):.1%}")
            for name, count, tokens in found.sources[:MOST_SOURCES]
        ]
        title = "Sources"
        if len(found.sources) > MOST_SOURCES:
            title += f", the largest {MOST_SOURCES} of {len(found.sources):,}"
        yield _section(title, _table(("source", "rows", "tokens", "of all tokens"), sources))
    if numbers:
        yield _section("Examples", "".join(_examples(shelves, numbers)))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_escaped(title)}</h2>{content}</section>"


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = (
        f'<tr><th>{_escaped(name)}</th><td class="long">{_escaped(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escaped(name)}</th>" for name in names)
    lines = (
        f"<tr><th>{_escaped(row[0])}</th>"
        + "".join(f"<td>{_escaped(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _bars(lengths: Lengths) -> str:
    """Rows and tokens by doubling length."""
    bins = lengths.bins()
    all_rows = max(1, sum(rows for _, _, rows, _ in bins))
    all_tokens = max(1, lengths.tokens)
    most = max(max(rows / all_rows, tokens / all_tokens) for _, _, rows, tokens in bins)
    lines = []
    for low, high, rows, tokens in bins:
        drawn = "".join(
            f'<rect class="{kind}" x="0" y="{y}" width="{100 * share / most:.2f}%" height="6" '
            'rx="2"/>'
            for kind, y, share in (("rows", 0, rows / all_rows), ("tokens", 8, tokens / all_tokens))
        )
        lines.append(
            f'<tr><td class="range">{low:,}-{high:,}</td><td class="drawn"><svg>{drawn}</svg></td>'
            f"<td>{rows:,} rows</td><td>{tokens:,} tokens</td></tr>"
        )
    legend = "".join(
        f'<span><span class="swatch" style="background: var(--{kind})"></span>{told}</span>'
        for kind, told in (("rows", "share of the rows"), ("tokens", "share of the tokens"))
    )
    return f'<div class="legend">{legend}</div><table class="bars">{"".join(lines)}</table>'


def _examples(shelves: Shelves, numbers: Sequence[int]) -> Iterator[str]:
    legend = "".join(
        f'<span><span class="swatch {kind}"></span>{told}</span>' for kind, told in KINDS
    )
    yield f'<div class="legend">{legend}</div>'
    for number in numbers:
        shelf, row = shelves.place_of(number)
        example = shelf.example(row)
        told = f"{number:,}: {len(example.inst_ids):,} + {len(example.resp_ids):,} tokens"
        if len(shelves.shelves) > 1:
            told += f", {shelf.name}"
        text = "".join(
            f'<span class="{kind}">{_marked_text(ids, shelves.form)}</span>'
            for kind, ids in stretches(example)
        )
        yield f'<div class="example"><div class="soft">{_escaped(told)}</div>'
        yield f'<pre class="text">{text}</pre></div>'


def stretches(example: Example) -> Iterator[tuple[str, list[int]]]:
    """(read, learned or passed; ids): the instruction, then the response piece by piece."""
    yield "read", example.inst_ids
    scored = example.scored or [1] * len(example.resp_ids)
    for is_learned, group in groupby(
        zip(scored, example.resp_ids, strict=True), lambda pair: bool(pair[0])
    ):
        yield ("learned" if is_learned else "passed"), [token for _, token in group]


def _marked_text(ids: Sequence[int], form: PromptFormat | None) -> str:
    shown, left_out = list(ids[:SHOWN_IDS]), len(ids) - SHOWN_IDS
    more = f" <b>... {left_out:,} more tokens</b>" if left_out > 0 else ""
    if form is None:
        return _escaped(" ".join(map(str, shown))) + more
    special = form.tokenizer.get_added_tokens_decoder()
    pieces = []
    for is_special, group in groupby(shown, special.__contains__):
        if is_special:
            pieces += [f"<b>{_escaped(special[token].content)}</b>" for token in group]
        else:
            pieces.append(_escaped(form.tokenizer.decode(list(group), skip_special_tokens=False)))
    return "".join(pieces) + more


def _escaped(text: str) -> str:
    return html.escape(UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text))
