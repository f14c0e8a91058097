"""Command lines of the form `key=value`, read into a record that says what is legal.

Text is taken as it stands: a value is what follows the first `=`, never parsed as YAML and never
interpolated.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

OptionsT = TypeVar("OptionsT", bound=BaseModel)
NOTHING = ("none", "null")


def parse_options(record: type[OptionsT], arguments: Sequence[str], usage: str) -> OptionsT:
    """The record that the arguments make. `-h` and `--help` print `usage` and every option.

    Lists are written `a,b` or `[a,b]`, an absent value `null`. ValueError names what is wrong.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text(record, usage))
        sys.exit(0)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator:
            raise ValueError(f"{argument!r} is no option; options are written key=value (--help)")
        if key not in record.model_fields:
            raise ValueError(unknown_option(key, record))
        if key in values:
            raise ValueError(f"{key} is given twice; leave one out")
        values[key] = _value(record, key, value)
    try:
        return record.model_validate(values)
    except ValidationError as error:
        raise ValueError(_reasons(error)) from None


def help_text(record: type[BaseModel], usage: str) -> str:
    """`usage`, then a line for each option: what it is by default, what it means."""
    width = max(len(name) for name in record.model_fields)
    lines = [usage.strip(), "", "options (key=value):"]
    for name, field in record.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default())
        lines.append(f"  {name:<{width}}  {field.description or ''} [{default}]")
    return "\n".join(lines)


def unknown_option(key: str, record: type[BaseModel]) -> str:
    """The message for a key that the record does not have."""
    near = difflib.get_close_matches(key, record.model_fields, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(record.model_fields)}"
    return f"unknown option {key!r}{hint}"


def _value(record: type[BaseModel], key: str, text: str) -> Any:
    annotation = record.model_fields[key].annotation
    kinds = {get_origin(kind) or kind for kind in (annotation, *get_args(annotation))}
    if type(None) in kinds and text.lower() in NOTHING:
        return None
    if kinds & {list, tuple}:
        inner = text.removeprefix("[").removesuffix("]")
        return [part.strip() for part in inner.split(",") if part.strip()]
    return text


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(str, value))}]"
    return str(value) if str(value) else '""'


def _reasons(error: ValidationError) -> str:
    """One line of all that is wrong, by option."""
    reasons = []
    for each in error.errors():
        name = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "missing":
            reasons.append(f"{name}=... is required")
        elif name:
            reasons.append(f"{name}={each['input']}: {message}")
        else:
            reasons.append(message)
    return "; ".join(reasons)
