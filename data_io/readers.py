"""The fields of a row of anybody's data, as a record: one small reader per layout.

    rows             condition (optional), instruction, response        as published
    messages         messages: [{role, content}]                        chat records
    sharegpt         conversations: [{from, value, weight (optional)}]  ShareGPT, SlimOrca
    openorca         system_prompt (optional), question, response       OpenOrca
    prompt_response  prompt, response, system (optional)
    text             text                                               documents, as FineWeb

Fields that a reader does not name are ignored. Text is never changed: a special token spelled in it
stays text. A row that cannot be used is a `BadRowError`, whose reason the caller counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from data_io.records import (
    DEFAULT_CONDITION,
    BadRowError,
    Conversation,
    Document,
    Record,
    Role,
    Row,
    Turn,
)

AUTO = "auto"
Fields = Mapping[str, Any]
Speaker = Role | Literal["system"]
FOLLOWERS: Mapping[Role | None, tuple[Role, ...]] = {  # None: the conversation begins
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
MESSAGE_ROLES: Mapping[str, Speaker] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES: Mapping[str, Speaker] = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
}


@dataclass(frozen=True, slots=True)
class Reader:
    """`read` makes a record of the fields of a row and of the condition of rows without one."""

    required: tuple[str, ...]
    read: Callable[[Fields, str], Record]


def to_record(fields: Fields, reader: str = AUTO, *, condition: str = DEFAULT_CONDITION) -> Record:
    """The record of a row; with `auto`, by the reader whose fields it has.

    `condition` is for rows that name none. BadRowError: this row cannot be used. Any other
    ValueError concerns all rows: no such reader, or several that fit.
    """
    if reader not in READERS:
        require_reader(reader)
        reader = choose_reader(fields)
    chosen = READERS[reader]
    missing = [name for name in chosen.required if fields.get(name) is None]
    if missing:
        raise BadRowError("missing field", f"{reader} needs {', '.join(missing)}")
    return chosen.read(fields, condition)


def require_reader(reader: str) -> None:
    """Refuses a name that is neither a reader's nor `auto`."""
    if reader != AUTO and reader not in READERS:
        raise ValueError(f"{reader=} is none of {', '.join((AUTO, *READERS))}")


def choose_reader(fields: Fields) -> str:
    """The one reader that finds all its fields in a row; a field that is null counts as absent."""
    fitting = _fitting(tuple(name for name, value in fields.items() if value is not None))
    if len(fitting) > 1:
        raise ValueError(
            f"a row with the fields {_shown(fields)} can be read as {' and as '.join(fitting)}; "
            f"say which: reader={fitting[0]}"
        )
    if not fitting:
        known = "; ".join(f"{name}: {', '.join(each.required)}" for name, each in READERS.items())
        raise BadRowError("missing field", f"{_shown(fields)} fit no reader ({known})")
    return fitting[0]


@lru_cache(maxsize=1024)  # most files have few kinds of rows
def _fitting(present: tuple[str, ...]) -> list[str]:
    return [name for name, reader in READERS.items() if set(reader.required) <= set(present)]


def text_field(fields: Fields, name: str) -> str:
    """The text of a field that must be there; BadRowError if it is none."""
    return _text(fields.get(name), name)


def _read_row(fields: Fields, condition: str) -> Row:
    return Row(
        _condition(fields, condition),
        _text(fields["instruction"], "instruction"),
        _response(fields["response"]),
    )


def _read_prompt_response(fields: Fields, condition: str) -> Row | Conversation:
    if _optional_text(fields, "system"):
        return _exchange(fields, condition, system="system", question="prompt")
    return Row(
        _condition(fields, condition),
        _text(fields["prompt"], "prompt"),
        _response(fields["response"]),
    )


def _read_openorca(fields: Fields, condition: str) -> Conversation:
    return _exchange(fields, condition, system="system_prompt", question="question")


def _exchange(fields: Fields, condition: str, *, system: str, question: str) -> Conversation:
    """A conversation of one question and its answer, by the names of their fields."""
    asked = Turn("user", _text(fields[question], question), is_scored=False)
    answered = Turn("assistant", _response(fields["response"]))
    turns = (asked, answered)
    return Conversation(_condition(fields, condition), _optional_text(fields, system), turns)


def _read_text(fields: Fields, condition: str) -> Document:
    text = _text(fields["text"], "text")
    if not text:
        raise BadRowError("empty text")
    return Document(text)


def _read_messages(fields: Fields, condition: str) -> Conversation:
    turns = []
    for message in _turn_objects(fields["messages"], "messages"):
        if message.get("tool_calls"):
            raise BadRowError("tool calls as objects", "only calls written in the text are read")
        speaker = _speaker(message.get("role"), MESSAGE_ROLES)
        turns.append((speaker, _content(message.get("content")), _is_scored(message)))
    return _conversation(fields, condition, turns)


def _read_sharegpt(fields: Fields, condition: str) -> Conversation:
    turns = []
    for turn in _turn_objects(fields["conversations"], "conversations"):
        speaker = _speaker(turn.get("from"), SHAREGPT_ROLES)
        turns.append((speaker, _text(turn.get("value"), "value"), _is_scored(turn)))
    return _conversation(fields, condition, turns)


def _conversation(
    fields: Fields, condition: str, spoken: Sequence[tuple[Speaker, str, bool]]
) -> Conversation:
    """Turns after the last answer are left out: they hold nothing to learn."""
    turns: list[Turn] = []
    system = _optional_text(fields, "system")  # a column of some data sets
    for index, (speaker, text, is_scored) in enumerate(spoken):
        if speaker == "system":
            if index > 0:
                raise BadRowError("roles out of order", f"turn {index + 1} is the system's")
            if system and text != system:
                raise BadRowError("two system prompts")
            system = text
            continue
        previous = turns[-1].role if turns else None
        if speaker not in FOLLOWERS[previous]:
            place = f"after {previous}" if previous else "at the beginning"
            raise BadRowError("roles out of order", f"{speaker} {place}")
        if speaker == "assistant":
            _response(text)
        turns.append(Turn(speaker, text, is_scored and speaker == "assistant"))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise BadRowError("no assistant turn")
    if not any(turn.is_scored for turn in turns):
        raise BadRowError("no scored turn", "all assistant turns have weight 0")
    return Conversation(_condition(fields, condition), system, tuple(turns))


def _turn_objects(value: Any, name: str) -> Iterable[Fields]:
    if not isinstance(value, (list, tuple)):
        raise BadRowError("turns are no list", f"{name} is {type(value).__name__}")
    for turn in value:
        if not isinstance(turn, Mapping):
            raise BadRowError("turn is no object", f"{type(turn).__name__} in {name}")
    return value


def _speaker(role: Any, roles: Mapping[str, Speaker]) -> Speaker:
    if not isinstance(role, str) or role not in roles:
        raise BadRowError("unknown role", f"{role!r:.40}; known are {', '.join(roles)}")
    return roles[role]


def _is_scored(turn: Fields) -> bool:
    """Weights other than 0 and 1 have no counterpart here: rounding one would hide that."""
    weight = turn.get("weight")
    if weight is None:
        return True
    if isinstance(weight, (int, float)) and weight in (0, 1):
        return weight == 1
    raise BadRowError("weight is neither 0 nor 1", f"{weight!r:.40}")


def _content(content: Any) -> str:
    """Text, or the text of all parts of a list."""
    if not isinstance(content, (list, tuple)):
        return _text(content, "content")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRowError("part is no text", f"content has a part of type {kind!r:.40}")
        texts.append(_text(part.get("text"), "text of a part"))
    return "".join(texts)


def _condition(fields: Fields, default: str) -> str:
    """A row's own condition wins; without one, or with an empty one, it has the default."""
    return _optional_text(fields, "condition") or default


def _optional_text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    return "" if value is None else _text(value, name)


def _response(value: Any) -> str:
    text = _text(value, "response")
    if not text:
        raise BadRowError("empty response")
    return text


def _text(value: Any, name: str) -> str:
    if value is None:
        raise BadRowError("missing field", name)
    if not isinstance(value, str):
        raise BadRowError("field is no text", f"{name} is {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError("half of a surrogate pair", f"in {name}") from None
    return value


def _shown(fields: Fields, most: int = 12) -> str:
    names = [name for name, value in fields.items() if value is not None]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more or "none"


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "rows": Reader(("instruction", "response"), _read_row),
        "messages": Reader(("messages",), _read_messages),
        "sharegpt": Reader(("conversations",), _read_sharegpt),
        "openorca": Reader(("question", "response"), _read_openorca),
        "prompt_response": Reader(("prompt", "response"), _read_prompt_response),
        "text": Reader(("text",), _read_text),
    }
)
