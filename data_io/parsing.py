"""JSON and YAML from files that others may have written: what cannot be read is a ValueError.

The parsers themselves raise half a dozen kinds of errors, need minutes for a thousand levels of
YAML, and take aliases that multiply to more than any memory holds.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

MOST_LEVELS = 100  # of YAML
MOST_NODES = 1_000_000  # of a YAML document, its aliases written out
TOO_DEEP = "it is nested too deeply"
# What PyYAML raises for tags that do not fit their values: !!timestamp x, !!int "", !!bool 3.
_OF_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


def parse_json(text: str | bytes) -> Any:
    """ValueError says in one line what is wrong."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_yaml(text: str | bytes) -> Any:
    """Plain values alone. ValueError says in one line what is wrong."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _require_finite(node)
        return None if node is None else loader.construct_document(node)
    except _OF_YAML as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


class _Loader(yaml.SafeLoader):
    """The safe one, with a limit to what it descends into."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise ValueError(TOO_DEEP)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def _require_finite(node: yaml.Node | None) -> None:
    num_nodes = _nodes(node, {})
    if num_nodes > MOST_NODES:
        raise ValueError(f"its aliases stand for {num_nodes:.1e} values; write out what is meant")


def _nodes(node: Any, counted: dict[int, int]) -> int:
    """How many there are in a document, one that several places share counted in each."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = 0  # while it is being counted
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_nodes(part, counted) for part in parts)
    elif not counted[id(node)]:
        raise ValueError("one of its aliases stands for what it is part of")
    return counted[id(node)]
