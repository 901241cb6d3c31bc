from __future__ import annotations

from typing import Any

import pytest

from transfercache.strict_json import MAX_DEPTH, each, parse, take


def test_parse__what_json_says() -> None:
    assert parse(b'{"a": [1, 2.5, null, true, "\\u00e9 {[\\"]}"]}') == {"a": [1, 2.5, None, True, 'é {["]}']}


def test_parse__as_deep_as_allowed_and_no_deeper() -> None:
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH) is not None
    for bracket in (b"[", b'{"a":'):
        with pytest.raises(ValueError, match="nested deeper than 12"):
            parse(bracket * (MAX_DEPTH + 1))
    # Brackets within strings are text.
    assert parse(b'"' + b"[" * 100 + b'"') == "[" * 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 1}', "a key stands twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1] 2", "Extra data"),
        (b"", "Expecting value"),
        ('{"a": 1}'.encode("utf-16-le"), "Expecting property name"),
        ('["\u2241'.encode("utf-16-le") + ("[" * 100_000).encode("utf-16-le"), "nested deeper|Expecting|codec"),
        (b'["\xff"]', "invalid start byte"),
        (b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
    ],
)
def test_parse__refuses(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_take__is_a_copy_with_just_these_fields() -> None:
    value = {"a": 1, "b": None}
    taken = take(value, "it", {"a": int, "b": (str, type(None))})
    assert taken == value
    assert taken is not value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"it has the fields list, expected \['a'\]"),
        ({}, r"it has the fields \[\], expected \['a'\]"),
        ({"a": 1, "z": 2}, r"it has the fields \['a', 'z'\]"),
        ({"a": True}, "it: a is a bool"),
        ({"a": 1.0}, "it: a is a float"),
    ],
)
def test_take__refuses(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take(value, "it", {"a": int})


def test_each__must_be_of_this_very_type() -> None:
    assert each(["a", "b"], str, "names") == ["a", "b"]
    with pytest.raises(ValueError, match="counts must hold int values alone"):
        each([1, True], int, "counts")
