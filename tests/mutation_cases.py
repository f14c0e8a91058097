"""Files that went wrong, made of files that are right: what readers must refuse, and how.

A mutation knows the layout of a file, so that what it breaks lies deeper than the first check:
values of JSON and YAML, headers of .npy and safetensors, fields of protocol buffers; or bytes.
"""

from __future__ import annotations

import ast
import copy
import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

DEEP = 10_000  # levels; Python's own limit is 1,000
DEEP_JSON, DEEP_YAML = "[" * DEEP + "]" * DEEP, "[" * 2000 + "]" * 2000
HUGE = 2**63
LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)
)
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**70, 10**400, 1.5, 1e308, -0.0),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "../../x", "/proc/self/mem", "\0"),
    *("x" * 5000, "\ud800", "\u0660", "${oc.env:HOME}", "1e5", [], {}, [[]], {"": {}}),
    *([None], {"a": None}, ["x", 1], list(range(50))),
]
SNIPPETS = [
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"{", b"}", b"[", b'"', b"NaN", b"-"),
    *(b"9" * 5000, b"\\ud800", b"../", b"\xf0\x9f", b"\r\n\r\n", b"\x80\x04", b"null", b"*a"),
    *(b"&a [*a]", b"!!python/object/apply:os.getcwd []", b"!!timestamp x", b"!!int ''", b"<<: 3"),
]


class _Hostile:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


PICKLES = [
    pickle.dumps(_Hostile(eval, "__import__('os').getcwd()")),
    pickle.dumps(_Hostile(open, "pickled_was_here", "w")),
    pickle.dumps(_Hostile(bytearray, 2**40)),
    *(pickle.dumps(value) for value in (None, {}, [], "x", 2**100, {"state_dict_metadata": 1})),
    b"\x80\x04" + b"(" * 100_000 + b".",
    b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",  # a list in a list, 50,000 times
    b"\x80\x04Nr\xff\xff\xff\x0f.",  # a memo of 2**28 places
    b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",  # a bytearray of 1 TB
    b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # bytes of 1 TB
    b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"x.",  # a frame of 1 TB
    b"\x80\x02ctorch\nSize\n(I1\nI2\nt\x85R}b.",
]


@st.composite
def mutated(draw: st.DrawFn, content: bytes, kind: str) -> bytes:
    """The content of a file of this kind, changed in one or a few places."""
    layout = LAYOUTS.get(kind)
    if layout is not None and draw(st.integers(0, 3)):
        try:
            return layout(draw, content)
        except (ValueError, TypeError, RecursionError, struct.error, yaml.YAMLError):
            pass  # what it was mutated to cannot be written this way
    return _bytes(draw, content)


def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        size = draw(st.sampled_from([1, 2, 4, 8, 100]))
        match draw(st.integers(0, 6)):
            case 0 if changed:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if changed:
                changed[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22]))
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = draw(st.sampled_from(SNIPPETS))
            case 5:
                changed[at:at] = changed[at : at + size]
            case _:
                changed[at : at + size] = draw(st.binary(min_size=size, max_size=size))
    return bytes(changed)


def _json(draw: st.DrawFn, content: bytes) -> bytes:
    value = json.loads(content)
    match draw(st.integers(0, 9)):
        case 0:
            return b'{"a": ' + DEEP_JSON.encode() + b"}"
        case 1 if isinstance(value, dict) and value:  # a key twice; of two, json takes the last
            key = json.dumps(draw(st.sampled_from(sorted(value))))
            twin = json.dumps(draw(st.sampled_from(VALUES)))
            return f"{{{key}: {twin}, {json.dumps(value)[1:]}".encode()
        case 2:
            text, deep = json.dumps(_changed(draw, value, "@@")), DEEP_JSON
            return text.replace('"@@"', deep).encode()
    return json.dumps(_changed(draw, value, draw(st.sampled_from(VALUES)))).encode()


def _changed(draw: st.DrawFn, value: Any, put: Any) -> Any:
    """A value somewhere inside is replaced by `put`, taken away, or gets a neighbour."""
    whole = copy.deepcopy(value)
    place: Any = whole
    while isinstance(place, (dict, list)) and place:
        key = draw(st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else [0, -1]))
        below = place[key]
        if isinstance(below, (dict, list)) and below and draw(st.integers(0, 3)):
            place = below
            continue
        match draw(st.integers(0, 5)):
            case 0:
                del place[key]
            case 1 if isinstance(place, dict):
                place[draw(st.sampled_from(["", "x", "../x", "\0", "y" * 300]))] = put
            case 2 if isinstance(place, list):
                place.append(put)
            case _:
                place[key] = put
        return whole
    return put


def _jsonl(draw: st.DrawFn, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    at = draw(st.integers(0, max(0, len(lines) - 1)))
    if lines:
        lines[at] = _json(draw, lines[at]) + b"\n" * draw(st.integers(0, 1))
    return b"".join(lines)


def _yaml(draw: st.DrawFn, content: bytes) -> bytes:
    value = yaml.safe_load(content)
    match draw(st.integers(0, 9)):
        case 0:
            return b"a: " + DEEP_YAML.encode()
        case 1:
            return content + LAUGHS.encode()
        case 2:  # as the value of a key, since all else is refused at once
            text = yaml.safe_dump(_changed(draw, value, "@@"))
            hostile = draw(st.sampled_from([*SNIPPETS[-5:], b"&a [*a]", DEEP_YAML.encode()]))
            return text.replace("'@@'", "@@").encode().replace(b"@@", hostile)
        case 3 if isinstance(value, dict):
            key = draw(st.sampled_from(sorted(value)))
            inner = LAUGHS.replace("\n", "\n  ")
            return yaml.safe_dump({**value, key: "@@"}).replace("'@@'", f"\n  {inner}").encode()
    return yaml.safe_dump(_changed(draw, value, draw(st.sampled_from(VALUES)))).encode()


def _npy(draw: st.DrawFn, content: bytes) -> bytes:
    size = struct.unpack("<H", content[8:10])[0]
    header = ast.literal_eval(content[10 : 10 + size].decode())
    match draw(st.integers(0, 5)):
        case 0:
            header["shape"] = draw(
                st.sampled_from(
                    [
                        *((), (0,), (-1,), (2**40,), (2**62,), (2**63,), (2**70,), (1, 1)),
                        *((2, 0), (True,), (1.0,), ("x",), None, "x", (1,) * 70),
                    ]
                )
            )
        case 1:
            header["descr"] = draw(
                st.sampled_from(
                    [
                        *("|O", "<f8", "|V8", "|S3", "<M8[s]", "<U4", ">i8", "|b1", "<i1", "<c16"),
                        *([("a", "<i8")], [("a", "|O")], "x", 3, None, "<i8,<i8", "<i999999999"),
                        *("(9,9)<i8", "<U999999999", "|V999999999"),
                    ]
                )
            )
        case 2:
            header["fortran_order"] = draw(st.sampled_from(VALUES))
        case 3:
            header[draw(st.sampled_from(["x", "shape", 3]))] = draw(st.sampled_from(VALUES))
    text = repr(header).encode()
    match draw(st.integers(0, 5)):
        case 0:
            text = draw(
                st.sampled_from(
                    [
                        *(b"__import__('os').getcwd()", b"(" * 5000, b"[" * 200 + b"]" * 200),
                        *(b"{", b"9" * 5000, b"'" + b"x" * 60_000 + b"'", b"{1: 2}", b"\0"),
                    ]
                )
            )
        case 1:
            return content[:8] + b"\xff\xff" + content[10:]
        case 2:
            return (
                content[:6]
                + draw(st.sampled_from([b"\x02\x00", b"\x03\x00", b"\x09\x09"]))
                + (content[8:])
            )
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return content[:8] + struct.pack("<H", len(text) % 2**16) + text + content[10 + size :]


def _safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size]
    if draw(st.integers(0, 4)) == 0:
        wrong = draw(st.sampled_from([0, 1, size - 1, size + 1, 10**8, 2**40, 2**63, 2**64 - 1]))
        return struct.pack("<Q", wrong) + content[8:]
    header = _json(draw, header)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _shard(draw: st.DrawFn, content: bytes) -> bytes:
    header = list(struct.unpack("<256i", content[:1024]))
    header[draw(st.integers(0, 3))] = draw(
        st.sampled_from([0, 1, 2, -1, 2**31 - 1, -(2**31), 20240520, len(content)])
    )
    return struct.pack("<256i", *header) + content[1024:]


def _pickle(draw: st.DrawFn, content: bytes) -> bytes:
    if draw(st.integers(0, 1)):
        return draw(st.sampled_from(PICKLES))
    names = [b"Size", b"StorageMeta", b"ChunkStorageMetadata", b"_get_layout", b"float32", b"Path"]
    there = [name for name in names if name in content]
    one, other = draw(st.sampled_from(there)), draw(st.sampled_from([*there, b"nothing", b"load"]))
    return content.replace(_short(one), _short(other), 1)


def _short(text: bytes) -> bytes:
    """A text of a pickle, with its length."""
    return b"\x8c" + bytes([len(text)]) + text


LAYOUTS: dict[str, Callable[[st.DrawFn, bytes], bytes]] = {
    "json": _json,
    "jsonl": _jsonl,
    "yaml": _yaml,
    "npy": _npy,
    "safetensors": _safetensors,
    "shard": _shard,
    "pickle": _pickle,
}
