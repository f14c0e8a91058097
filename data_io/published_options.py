"""Command lines as the published tools have them, respelled as the `key=value` of ours.

    flan more.parquet -o OUT --tokenizer-path tok     sources=flan,more.parquet output=OUT
                                                      tokenizer_path=tok

Both spellings may be mixed. What is legal is the business of the record of options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel

from data_io.options import fields_of, unknown_option

HELP = ("-h", "--help")


def as_key_values(
    arguments: Sequence[str],
    record: type[BaseModel],
    *,
    by_position: str,
    short: Mapping[str, str],
) -> list[str]:
    """The arguments for `parse_options`: those by position are values of one list option.

    `short`: the options that have a name of one letter, as `-o`. An option that is a list takes
    all values up to the next option.
    """
    known = fields_of(record)
    respelled: list[str] = []
    positional: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in HELP:
            respelled.append(argument)
        elif argument.startswith("-"):
            flag, separator, value = argument.partition("=")
            key = short.get(flag) or flag.removeprefix("--").replace("-", "_")
            if key not in known or not (flag in short or flag.startswith("--")):
                raise ValueError(unknown_option(flag, record))
            values = [value] if separator else _values(rest, known, record, key)
            if not values:
                raise ValueError(f"{flag} has no value; write {flag} VALUE or {key}=VALUE")
            respelled.append(f"{key}={','.join(values)}")
        elif _is_key_value(argument, known):
            respelled.append(argument)
        elif "=" in argument and not Path(argument).exists():
            raise ValueError(unknown_option(argument.partition("=")[0], record))
        else:
            positional.append(argument)
    if positional:
        respelled.append(f"{by_position}={','.join(positional)}")
    return respelled


def _values(
    rest: list[str], known: Mapping[str, object], record: type[BaseModel], key: str
) -> list[str]:
    """Takes what belongs to an option off the front of `rest`."""
    most = len(rest) if _is_list(record, key) else 1
    count = 0
    while count < min(most, len(rest)):
        is_option = rest[count].startswith("-") or _is_key_value(rest[count], known)
        if is_option or (count and Path(rest[count]).exists()):
            break
        count += 1
    values, rest[:] = rest[:count], rest[count:]
    return values


def _is_list(record: type[BaseModel], key: str) -> bool:
    annotation = fields_of(record)[key].annotation
    kinds = {get_origin(kind) or kind for kind in (annotation, *get_args(annotation))}
    return bool(kinds & {list, tuple})


def _is_key_value(argument: str, known: Mapping[str, object]) -> bool:
    key, separator, _ = argument.partition("=")
    return bool(separator) and key in known
