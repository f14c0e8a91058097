"""How an answer comes about, as a piece of a web page: what the head makes of every state of a net.

Owns the drawing alone; `inference.inspection` looks into the net. Plain HTML and CSS (`STYLE`): a
click on a token selects it without a script.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from data_io.prompt_format import PromptFormat
from inference.asking import BROKEN
from inference.inspection import Inspection, answer_probabilities, likeliest

STYLE = (Path(__file__).parent / "cycle_view.css").read_text(encoding="utf-8")
TITLE = "From cycle to cycle"
MEANING = (
    "Each row is a state of the net, in the order in which they were written, the last one being "
    "the answer: a cell shows the token that the head would choose there, and its colour how "
    "likely that state makes the token that was answered in the end."
)
SHOWN_TOKENS, TOP_TOKENS = 48, 5
WIDE_COLUMNS = 12  # so many tokens may take more room each
# Colours of probability 0 to 1, on a light page and on a dark one.
DAY = ((244, 246, 252), (199, 206, 245), (124, 137, 229), (67, 72, 186), (34, 28, 96))
NIGHT = ((42, 52, 72), (62, 68, 128), (98, 108, 204), (152, 163, 240), (226, 231, 255))
TURNS_AT = 0.45  # probability at which the text of a cell changes between dark and light
DARK_TEXT, LIGHT_TEXT = "#1f2340", "#f5f6ff"
END = "\u220e"  # how the token that ends an answer is shown


@dataclass(frozen=True, slots=True)
class CycleTable:
    """An inspected answer in numbers; A tokens, the states in order."""

    tokens: tuple[str, ...]  # of the answer, [A]
    states: tuple[tuple[str, int], ...]  # name, and which write of it
    probabilities: list[list[float]]  # of the answer's tokens by state, [states][A]
    likely: list[list[list[tuple[str, float]]]]  # [states][A][k] tokens, the likeliest first
    num_left_out: int  # tokens of the answer beyond those

    @classmethod
    def of(cls, inspection: Inspection, prompt_format: PromptFormat) -> CycleTable:
        """ValueError where no answer is given."""
        answer_ids = inspection.answer_ids[:SHOWN_TOKENS]
        if not answer_ids:
            raise ValueError("there is no answer to look at; give its token ids to inspect_ids")
        top_ids, top = likeliest(inspection, TOP_TOKENS)
        likely = [
            [
                [
                    (token_text(prompt_format, token_id), probability)
                    for token_id, probability in zip(*pairs, strict=True)
                ]
                for pairs in zip(*columns, strict=True)
            ]
            for columns in zip(
                top_ids[:, : len(answer_ids)].tolist(),
                top[:, : len(answer_ids)].tolist(),
                strict=True,
            )
        ]
        return cls(
            tuple(token_text(prompt_format, token_id) for token_id in answer_ids),
            tuple((state.name, state.write) for state in inspection.states),
            answer_probabilities(inspection)[:, : len(answer_ids)].tolist(),
            likely,
            len(inspection.answer_ids) - len(answer_ids),
        )

    def mean(self, state: int) -> float:
        return sum(self.probabilities[state]) / len(self.tokens)

    def least_certain(self) -> int:
        """The token about which the states agree least with the answer."""
        sums = [sum(column) for column in zip(*self.probabilities, strict=True)]
        return sums.index(min(sums))


def cycles_html(table: CycleTable) -> str:
    """The answer's tokens against the states as a heat map, and below it each token's rivals."""
    parts = (_selection(table), _heat_map(table), _legend(table), _panels(table))
    return f'<div class="cycles">{"".join("".join(part) for part in parts)}</div>'


def token_text(prompt_format: PromptFormat, token_id: int) -> str:
    """One token in a narrow cell: spaces and line ends are made visible."""
    if token_id == prompt_format.eoa_id:
        return END
    text = prompt_format.tokenizer.decode([token_id], skip_special_tokens=False)
    if BROKEN in text or not text:
        return prompt_format.tokenizer.id_to_token(token_id) or f"#{token_id}"
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u2423")


def _selection(table: CycleTable) -> Iterator[str]:
    """A radio button for each token, and what the chosen one shows."""
    chosen = table.least_certain()
    yield "<style>"
    for column in range(len(table.tokens)):
        at = f".cycles > #token-{column}:checked ~"
        yield f"{at} .panel-{column} {{display: block}}"
        yield f"{at} .map .head-{column} {{background: #ee7d3b; color: white}}"
    yield "</style>"
    for column in range(len(table.tokens)):
        checked = " checked" if column == chosen else ""
        yield f'<input type="radio" name="token" id="token-{column}"{checked}>'
    yield f'<h3>{TITLE}</h3><p class="why">{MEANING}</p>'


def _heat_map(table: CycleTable) -> Iterator[str]:
    width = "minmax(34px, 58px)" if len(table.tokens) <= WIDE_COLUMNS else "34px"
    columns = f"max-content repeat({len(table.tokens)}, {width}) minmax(110px, 1fr)"
    yield f'<div class="map" style="grid-template-columns: {columns}">'
    yield '<span class="row note">state</span>'
    for column, token in enumerate(table.tokens):
        yield _label(column, f"head head-{column}", token, f"answered: {token}")
    yield '<span class="mean note">mean</span>'
    for number, (name, write) in enumerate(table.states):
        kind = _kind(table, name)
        yield f'<span class="row{kind}"><i></i>{escape(name)}_{write}</span>'
        for column, probability in enumerate(table.probabilities[number]):
            token = table.tokens[column]
            said, its_probability = table.likely[number][column][0]
            title = f"{token}: {probability:.3f}; likeliest here is {said}: {its_probability:.3f}"
            same = " same" if said == token else ""
            yield _label(column, f"cell{same}", said, title, style=colours(probability))
        mean = table.mean(number)
        yield f'<span class="mean{kind}"><i style="width: {65 * mean:.1f}%"></i>{mean:.2f}</span>'
    yield "</div>"


def _legend(table: CycleTable) -> Iterator[str]:
    day, night = (
        f"linear-gradient(90deg, {', '.join(f'rgb{colour}' for colour in scale)})"
        for scale in (DAY, NIGHT)
    )
    yield (
        f'<div class="scale">0 <i style="--day: {day}; --night: {night}"></i> 1 '
        "&nbsp;probability of the answered token"
    )
    answering = table.states[-1][0]
    if any(name != answering for name, _ in table.states):
        yield f'<b style="background: #ee7d3b"></b> {escape(answering)}, from which it answers'
    if END in table.tokens:
        yield f"<b></b> {END} ends the answer"
    if table.num_left_out:
        yield f"<b></b> {table.num_left_out:,} more tokens are not shown"
    yield "</div>"


def _panels(table: CycleTable) -> Iterator[str]:
    """For each token what every state would say in its place."""
    for column, token in enumerate(table.tokens):
        yield f'<div class="panel panel-{column}">'
        yield f"<h4>Token {column + 1}, answered: <code>{escape(token)}</code></h4>"
        yield '<div class="top">'
        for number, (name, write) in enumerate(table.states):
            kind = _kind(table, name)
            yield f'<div class="row{kind}">{escape(name)}_{write}</div>'
            for said, probability in table.likely[number][column]:
                same = ' class="same"' if said == token else ""
                yield (
                    f'<span{same}><i style="width: {100 * probability:.1f}%"></i>'
                    f"{escape(said)} <em>{probability:.3f}</em></span>"
                )
        yield "</div></div>"


def _kind(table: CycleTable, name: str) -> str:
    return " answers" if name == table.states[-1][0] else ""


def _label(column: int, kind: str, text: str, title: str, style: str = "") -> str:
    end = " end" if text == END else ""
    return (
        f'<label for="token-{column}" class="{kind}{end}" title="{escape(title)}" '
        f'style="{style}">{escape(text)}</label>'
    )


def colours(probability: float) -> str:
    """Background and text of a cell, on a light page and on a dark one."""
    is_strong = probability >= TURNS_AT
    day_text, night_text = (LIGHT_TEXT, DARK_TEXT) if is_strong else (DARK_TEXT, LIGHT_TEXT)
    return (
        f"--day: {_mixed(DAY, probability)}; --day-text: {day_text}; "
        f"--night: {_mixed(NIGHT, probability)}; --night-text: {night_text}"
    )


def _mixed(scale: Sequence[tuple[int, int, int]], probability: float) -> str:
    place = min(max(probability, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    share = place - low
    red, green, blue = (
        round(a + (b - a) * share) for a, b in zip(scale[low], scale[low + 1], strict=True)
    )
    return f"rgb({red}, {green}, {blue})"
