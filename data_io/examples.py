"""Records as examples: what is read (the prefix), what is answered, and which of it is learned.

A conversation is framed as `PromptFormat.encode_conversation` frames it, so a model is asked later
as it was trained. What a tool gave back stands within the answer that called it:

    text <tool_call> call </tool_call> <tool_response> result </tool_response> text eoa

An assistant's turn that a tool answers may end with its call, spelled as above; there alone, and
around what a tool gave back, the tokens of these names are written (as text where the tokenizer
has none). Results are not learned, unless asked for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from data_io.prompt_format import PromptFormat
from data_io.records import BadRowError, Document, Record, Row, Turn
from data_io.text_windows import cut_text

Turns = Literal["each", "last", "all"]

CALL, RESULT = "tool_call", "tool_response"
FOLLOWERS: dict[str, tuple[str, ...]] = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
CALL_AT_END = re.compile(rf"<{CALL}>(?P<call>(?:(?!<{CALL}>).)*)</{CALL}>\s*\Z", re.DOTALL)
WRAPPED_RESULT = re.compile(rf"\s*<{RESULT}>(?P<text>.*)</{RESULT}>\s*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on."""

    inst_ids: list[int]
    resp_ids: list[int]  # with the tokens that end answers
    scored: list[int] | None = None  # per id of the response: 1 where it is learned; None: all

    def __len__(self) -> int:
        return len(self.inst_ids) + len(self.resp_ids)


class Part(NamedTuple):
    """A stretch of an answer."""

    text: str
    is_scored: bool
    tag: str = ""  # the name of the tokens around it


class Exchange(NamedTuple):
    """What a user says, and all that follows until the user speaks again."""

    question: str
    parts: tuple[Part, ...]


class Coded(NamedTuple):
    """An exchange as ids."""

    prompt: list[int]
    answer: list[int]
    scored: list[int]  # per id of the answer


class ExampleEncoder:
    """Makes examples of records.

    `turns` of a conversation: `each` answer is an example that reads all before it; only the
    `last`; or one example of `all`, that reads the first question. Answers that are not to be
    learned make no example, but are read. `document_window`: so many ids of a document are an
    example (None: all); `scores_tools`: what tools gave back is learned too.
    """

    def __init__(
        self,
        prompt_format: PromptFormat,
        turns: Turns = "each",
        *,
        document_window: int | None = None,
        scores_tools: bool = False,
    ) -> None:
        self.prompt_format, self.turns = prompt_format, turns
        self.document_window, self.scores_tools = document_window, scores_tools
        self._condition_ids: dict[str, list[int]] = {}
        tokenizer = prompt_format.tokenizer
        added = {each.content: id_ for id_, each in tokenizer.get_added_tokens_decoder().items()}
        marks = {tag: (f"<{tag}>", f"</{tag}>") for tag in (CALL, RESULT)}
        has_tags = all(mark in added for pair in marks.values() for mark in pair)
        self._tags = (
            {tag: (added[first], added[last]) for tag, (first, last) in marks.items()}
            if has_tags
            else {}
        )

    def encode(self, records: Sequence[Record]) -> list[list[Example]]:
        """The examples of each record; all texts are encoded together.

        ValueError: a condition that the format does not know. BadRowError: turns out of order.
        """
        plans = [self._plan(record) for record in records]
        texts = [text for plan in plans for text in _texts(plan)]
        ids = iter(self.prompt_format.encode_texts(texts))
        return [
            self._examples(record, plan, ids) for record, plan in zip(records, plans, strict=True)
        ]

    def condition_ids(self, condition: str) -> list[int]:
        """Of comma-separated names; ValueError names those that the format does not know."""
        if condition not in self._condition_ids:
            self._condition_ids[condition] = self.prompt_format.condition_ids(condition)
        return self._condition_ids[condition]

    def _plan(self, record: Record) -> list[Exchange] | list[str]:
        """What is to be encoded of a record: its exchanges, or the pieces of a document."""
        if isinstance(record, Document):
            return [text for text, _ in cut_text(io.StringIO(record.text, newline=""))]
        if isinstance(record, Row):
            return [Exchange(record.instruction, (Part(record.response, True),))]
        first, *others = exchanges_of(record.turns)
        if record.system:
            first = first._replace(question=f"{record.system}\n\n{first.question}")
        exchanges = [first, *others]
        if self._tags:
            return exchanges
        return [each._replace(parts=tuple(map(_spelled_out, each.parts))) for each in exchanges]

    def _examples(
        self, record: Record, plan: list[Exchange] | list[str], ids: Iterator[list[int]]
    ) -> list[Example]:
        if isinstance(record, Document):
            return self._windows([token for _ in plan for token in next(ids)])
        condition = self.condition_ids(record.condition)
        coded = [self._coded(each, condition, ids) for each in plan if isinstance(each, Exchange)]
        learned = [at for at, each in enumerate(coded) if any(each.scored)]
        if not learned:
            return []
        if self.turns == "all":
            return [_joined(coded[: learned[-1] + 1])]
        chosen = learned[-1:] if self.turns == "last" else learned
        return [_after(coded[:at], coded[at]) for at in chosen]

    def _windows(self, ids: list[int]) -> list[Example]:
        """A document: windows of its ids, each after a prefix of one token."""
        if not ids:
            return []
        ids.append(self.prompt_format.eoa_id)
        size = self.document_window or len(ids)
        starts = range(0, len(ids), size)
        return [Example([self.prompt_format.boq_id], ids[at : at + size]) for at in starts]

    def _coded(self, exchange: Exchange, condition: list[int], ids: Iterator[list[int]]) -> Coded:
        prompt_format = self.prompt_format
        prompt = [prompt_format.boq_id, *condition, *next(ids), prompt_format.eoq_id]
        answer: list[int] = []
        scored: list[int] = []
        for part in exchange.parts:
            part_ids = next(ids)
            if part.tag in self._tags:
                opening, closing = self._tags[part.tag]
                part_ids = [opening, *part_ids, closing]
            answer += part_ids
            is_scored = part.is_scored or (self.scores_tools and part.tag == RESULT)
            scored += [int(is_scored)] * len(part_ids)
        answer.append(prompt_format.eoa_id)
        scored.append(int(exchange.parts[-1].is_scored))
        return Coded(prompt, answer, scored)


def exchanges_of(turns: Sequence[Turn]) -> list[Exchange]:
    """A conversation by its questions. BadRowError: no such conversation.

    A question after the last answer, and what a tool gave back after it, has no use and goes.
    """
    last = max((at for at, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    exchanges: list[Exchange] = []
    before = ""
    for turn, following in zip(turns[: last + 1], (*turns[1 : last + 1], None), strict=True):
        if turn.role not in FOLLOWERS[before]:
            shown = ", ".join(turn.role for turn in turns[:8])
            raise BadRowError("turns out of order", f"{shown}{', ...' * (len(turns) > 8)}")
        before = turn.role
        if turn.role == "user":
            exchanges.append(Exchange(turn.text, ()))
        else:
            calls = following is not None and following.role == "tool"
            question, parts = exchanges[-1]
            exchanges[-1] = Exchange(question, (*parts, *_parts_of(turn, calls=calls)))
    if not exchanges:
        raise BadRowError("no assistant turn")
    return exchanges


def _parts_of(turn: Turn, *, calls: bool) -> Iterator[Part]:
    if turn.role == "tool":
        wrapped = WRAPPED_RESULT.match(turn.text)
        yield Part(wrapped["text"] if wrapped else turn.text, False, RESULT)
        return
    call = CALL_AT_END.search(turn.text) if calls else None
    said = turn.text[: call.start()] if call else turn.text
    if said or call is None:
        yield Part(said, turn.is_scored)
    if call is not None:
        yield Part(call["call"], turn.is_scored, CALL)


def _spelled_out(part: Part) -> Part:
    """The same where the tokenizer has no tokens for it; a result's tag still says what it is."""
    return part._replace(text=f"<{part.tag}>{part.text}</{part.tag}>") if part.tag else part


def _texts(plan: list[Exchange] | list[str]) -> Iterator[str]:
    for each in plan:
        if isinstance(each, str):
            yield each
        else:
            yield each.question
            yield from (part.text for part in each.parts)


def _after(earlier: Sequence[Coded], coded: Coded) -> Example:
    """An answer, after all that came before it."""
    read = chain.from_iterable([*each.prompt, *each.answer] for each in earlier)
    is_whole = all(coded.scored)
    return Example([*read, *coded.prompt], coded.answer, None if is_whole else coded.scored)


def _joined(coded: Sequence[Coded]) -> Example:
    """All after the first question as one response, in which later questions are not learned."""
    first, *others = coded
    response, scored = list(first.answer), list(first.scored)
    for each in others:
        response += each.prompt + each.answer
        scored += [0] * len(each.prompt) + each.scored
    return Example(first.prompt, response, None if all(scored) else scored)
