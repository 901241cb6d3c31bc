"""JSON from strangers: bounded depth, no repeated key, no NaN, and exactly the fields that were agreed on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

#: The deepest value that tlc writes lies at 6; what a solver chose may go a little deeper.
MAX_DEPTH = 12

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def parse(data: bytes) -> Any:
    """Return the value of strict JSON; raises ValueError naming what is wrong with it."""
    depth = 0
    # Counted before parsing, because Python's parser recurses.
    for bracket in _BRACKET.finditer(_STRING.sub(b"", data)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"its JSON is nested deeper than {MAX_DEPTH}")
    # Decoded here, because json.loads takes bytes for UTF-16 where it finds zeros in them.
    return json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def take(value: Any, what: str, expected: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Return a copy of `value` that has exactly the expected keys and types (a bool is no int here)."""
    if not isinstance(value, dict) or set(value) != set(expected):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} has the fields {found}, expected {sorted(expected)}")
    for name, kind in expected.items():
        if type(value[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise ValueError(f"{what}: {name} is a {type(value[name]).__name__}")
    return dict(value)


def each(values: list[Any], kind: type | tuple[type, ...], what: str) -> list[Any]:
    """Return `values`, all of which must be of this very type, or of one of these."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not all(type(value) in kinds for value in values):
        raise ValueError(f"{what} must hold {' or '.join(one.__name__ for one in kinds)} values alone")
    return values
