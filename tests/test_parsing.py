"""JSON and YAML of others: what is right is taken as it is, all else is one ValueError in time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mutation_cases import DEEP_JSON, LAUGHS

from data_io.parsing import TOO_DEEP, parse_json, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}\n" for k in range(1, 12)
)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/**/*.yaml")), ids=lambda path: path.stem)
def test_yaml_of_ours_reads_as_ever(path: Path) -> None:
    assert parse_yaml(path.read_text()) == yaml.safe_load(path.read_text())


def test_shared_parts_and_merged_keys_are_taken() -> None:
    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n"
    assert parse_yaml(text) == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    assert parse_yaml("") is None and parse_yaml(b"x") == "x"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "expected the node content"),
        ("a: " + "[" * 5000, TOO_DEEP),
        ("\n".join(f"{' ' * k}a:" for k in range(500)), TOO_DEEP),
        (LAUGHS, "its aliases stand for"),
        (MERGES, "its aliases stand for"),
        ("a: &a [*a]", "stands for what it is part of"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("!!timestamp x", "NoneType"),
        ("!!int ''", "index"),
        ("!!bool 3", "3"),
        ("? [a]\n: b", "unhashable"),
        (b"\xff\xfe\x00", "unacceptable character"),
    ],
    ids=lambda value: str(value)[:20].strip(),
)
def test_what_is_no_plain_yaml_is_one_line_at_once(text: str | bytes, told: str) -> None:
    started_at = time.process_time()
    with pytest.raises(ValueError, match=told) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert time.process_time() - started_at < 5  # without limits: minutes, or the memory is full


@pytest.mark.parametrize("text", ["{", b"\xff", "9" * 5000, DEEP_JSON], ids=lambda text: text[:3])
def test_what_is_no_json_is_one_line(text: str | bytes) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_json_reads_as_ever() -> None:
    value: dict[str, Any] = {"a": [1, 2.5, None, True, "\u00e9"], "b": {}}
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value
