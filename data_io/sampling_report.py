"""What sampling took of each source, as the published Markdown report.

Categories are the parts of the names before `__`. Covered counts a row as often as the epochs have
it; unique counts it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CATEGORY_END = "__"
COLUMNS = (
    "Name", "Rows (%)", "Tokens (%)", "Cov Rows (%)", "Cov Toks (%)", "Cov IToks (%)",
    "Cov RToks (%)",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Amount:
    """So many rows, and the tokens of their instructions and responses."""

    rows: int = 0
    inst_tokens: int = 0
    resp_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.inst_tokens + self.resp_tokens

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.rows + other.rows,
            self.inst_tokens + other.inst_tokens,
            self.resp_tokens + other.resp_tokens,
        )

    def __mul__(self, times: int) -> Amount:
        return Amount(self.rows * times, self.inst_tokens * times, self.resp_tokens * times)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of one source, or of several together."""

    name: str
    usable: Amount = Amount()
    covered: Amount = Amount()
    unique: Amount = Amount()

    def joined(self, other: Coverage) -> Coverage:
        return Coverage(
            self.name,
            self.usable + other.usable,
            self.covered + other.covered,
            self.unique + other.unique,
        )


def sampling_report(sources: Sequence[Coverage]) -> str:
    """The report on all sources, in their order."""
    whole = Coverage("GLOBAL")
    categories: dict[str, Coverage] = {}
    for source in sources:
        whole = whole.joined(source)
        category = source.name.split(CATEGORY_END)[0]
        categories[category] = categories.get(category, Coverage(category)).joined(source)
    return "\n".join(_lines(whole, list(categories.values()), sources)) + "\n"


def _lines(
    whole: Coverage, categories: Sequence[Coverage], sources: Sequence[Coverage]
) -> Iterator[str]:
    yield from ("", "### Category Coverage Stats")
    yield from _table([whole, *categories], whole)
    yield from ("", "### Task Coverage Stats")
    yield from _table(sources, whole)
    yield from ("", "### Global Summary")
    unique, usable = whole.unique, whole.usable
    for kind, part, of in (
        ("Tokens", unique.tokens, usable.tokens),
        ("Rows", unique.rows, usable.rows),
    ):
        yield f"**Total Unique {kind} Sampled:** {part:,} out of {of:,} ({_share(part, of):.2f}%)"
    yield ""


def _table(lines: Sequence[Coverage], whole: Coverage) -> Iterator[str]:
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'|'.join('-' * (len(column) + 2) for column in COLUMNS)}|"
    for line in lines:
        cells = [
            f"{part:,} ({_share(part, of):.1f}%)"
            for part, of in zip(_figures(line), _figures(whole), strict=True)
        ]
        yield f"| **{line.name.replace('|', chr(92) + '|')}** | {' | '.join(cells)} |"


def _figures(line: Coverage) -> tuple[int, ...]:
    usable, covered = line.usable, line.covered
    return (
        usable.rows,
        usable.tokens,
        covered.rows,
        covered.tokens,
        covered.inst_tokens,
        covered.resp_tokens,
    )


def _share(part: int, of: int) -> float:
    return 100 * part / of if of else 0.0
