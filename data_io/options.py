"""Command lines of the form `key=value`, read into a record that says what is legal.

Text is taken as it stands: a value is what follows the first `=`, never parsed as YAML and never
interpolated.
"""

from __future__ import annotations

import difflib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

OptionsT = TypeVar("OptionsT", bound=BaseModel)
NOTHING = ("none", "null")
HELP_COLUMNS, SHOWN_CHARACTERS = 100, 80


def parse_options(record: type[OptionsT], arguments: Sequence[str], usage: str) -> OptionsT:
    """The record that the arguments make. `-h` and `--help` print `usage` and every option.

    An option is called by its field's alias where there is one (`data.path`). Lists are written
    `a,b` or `[a,b]`; `null` is no value where the field may have none, and text where it is text.
    ValueError names what is wrong.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print_help(help_text(record, usage))
        sys.exit(0)
    known = fields_of(record)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator:
            raise ValueError(
                f"{_shortened(argument)} is no option; options are written key=value (--help)"
            )
        if key not in known:
            raise ValueError(unknown_option(key, record))
        if key in values:
            raise ValueError(f"{key} is given twice; leave one out")
        values[key] = _value(known[key], key, value)
    try:
        return record.model_validate(values)
    except ValidationError as error:
        raise ValueError(_reasons(error)) from None


def with_option(options: OptionsT, key: str, text: str) -> OptionsT:
    """The same record with another value of one option, read as on a command line."""
    known = fields_of(type(options))
    if key not in known:
        raise ValueError(unknown_option(key, type(options)))
    values = {**options.model_dump(by_alias=True), key: _value(known[key], key, text)}
    try:
        return options.model_validate(values)
    except ValidationError as error:
        raise ValueError(_reasons(error)) from None


def fields_of(record: type[BaseModel]) -> dict[str, FieldInfo]:
    """The options of a record by the names that a command line uses."""
    return {field.alias or name: field for name, field in record.model_fields.items()}


def help_text(record: type[BaseModel], usage: str) -> str:
    """`usage`, then each option: what it means, what it is by default."""
    known = fields_of(record)
    width = max(map(len, known)) + 4  # two spaces on each side
    lines = [usage.strip(), "", "options (key=value):"]
    for name, field in known.items():
        default = (
            "required"
            if field.is_required()
            else _shown(field.get_default(call_default_factory=True, validated_data={}))
        )
        lines += textwrap.wrap(
            f"{field.description or ''} [{default}]".strip(),
            HELP_COLUMNS,
            initial_indent=f"  {name}".ljust(width),
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def print_help(text: str) -> None:
    """Prints it; who reads may have enough before its end, as in `... --help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what is left has nowhere to go, nor at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def unknown_option(key: str, record: type[BaseModel]) -> str:
    """The message for a key that the record does not have."""
    known = fields_of(record)
    near = difflib.get_close_matches(key.lstrip("-+~"), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"unknown option {_shortened(key)}; {hint}"


def _value(field: FieldInfo, key: str, text: str) -> Any:
    kinds = {get_origin(kind) or kind for kind in (field.annotation, *get_args(field.annotation))}
    if type(None) in kinds and text.lower() in NOTHING:
        return None
    if kinds & {list, tuple}:
        inner = text
        if text.startswith("[") and text.endswith("]"):
            inner = text[1:-1]
        return [part.strip() for part in inner.split(",") if part.strip()]
    if Path in kinds and not text:
        raise ValueError(f"{key}= names no file or folder")  # Path("") is the working directory
    return text


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(str, value))}]"
    return str(value) if str(value) else '""'


def _shortened(text: str) -> str:
    """Text of a user within a message of one line."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def _reasons(error: ValidationError) -> str:
    """One line of all that is wrong, by option."""
    reasons = []
    for each in error.errors():
        name = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "missing":
            reasons.append(f"{name}=... is required")
        elif name:
            reasons.append(f"{name}={_shortened(str(each['input']))[1:-1]}: {message}")
        else:
            reasons.append(message)
    return "; ".join(reasons)
