"""The identity of a cache's rows: whatever can change an embedding changes the digest, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from transfercache.spec import ExtractSpec, Preprocessing

PREPROCESSING = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPEC = ExtractSpec("resnet18", "ab" * 32, "pooled", PREPROCESSING)

# Another value for every field; a new field without one fails the first test.
OTHER_PREPROCESSING: dict[str, Any] = {
    "resize": 232,
    "crop": 192,
    "interpolation": "bicubic",
    "mean": (0.5, 0.456, 0.406),
    "std": (0.229, 0.224, 0.5),
    "antialias": False,
    "colour": "rgb",
    "exif": "ignored",
    "decoder": "fast",
}
OTHER: dict[str, Any] = {
    "backbone": "resnet34",
    "weights_digest": "ac" * 32,
    "boundary": "layer3",
    "compute": "bf16",
    "storage_dtype": "float16",
    "view_policy": "eval,mirror,augment/2",
    "schema_version": 2,
}


def test_digest__changes_with_every_field() -> None:
    assert set(OTHER_PREPROCESSING) == {field.name for field in fields(Preprocessing)}
    assert {*OTHER, "preprocessing"} == {field.name for field in fields(ExtractSpec)}
    changed = [replace(SPEC, **{name: value}) for name, value in OTHER.items()]
    changed += [
        replace(SPEC, preprocessing=replace(PREPROCESSING, **{name: value}))
        for name, value in OTHER_PREPROCESSING.items()
    ]
    assert len({SPEC.digest(), *(spec.digest() for spec in changed)}) == 1 + len(OTHER) + len(OTHER_PREPROCESSING)


def test_digest__is_the_same_for_ever() -> None:
    # A change here makes every cache that was ever made another one: it needs a new schema version.
    assert SPEC.digest() == "8849ef7bce1b9fed773c21dda9051349dcf5be6e73ffb2e9040f2bded0bcaecd"


def test_from_json__gives_back_what_was_written() -> None:
    again = ExtractSpec.from_json(json.loads(json.dumps(SPEC.to_json())))
    assert again == SPEC
    assert again.digest() == SPEC.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trick": 1}, r"ExtractSpec has the fields \["),
        ({"backbone": 3}, "ExtractSpec: backbone is a int"),
        ({"schema_version": True}, "ExtractSpec: schema_version is a bool"),
        ({"weights_digest": "AB" * 32}, "weights_digest must be 64 lower-case hex digits"),
        ({"weights_digest": "ab"}, "weights_digest must be 64 lower-case hex digits"),
        ({"preprocessing": []}, "ExtractSpec: preprocessing is a list"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "crop": 0}}, "crop 0 must lie between 1 and 4096"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "resize": 1 << 40}}, "must lie between 1 and 4096"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "interpolation": "best"}}, "'best' is neither"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "decoder": "jpeg"}}, "'jpeg' is none of pillow, fast, draft"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "mean": [1, 2]}}, "three finite numbers"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "mean": "abc"}}, "Preprocessing: mean is a str"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "std": [1, 1, 0]}}, "std must be positive"),
        ({"preprocessing": {**PREPROCESSING.__dict__, "std": [1, 1, True]}}, "std must hold int or float values alone"),
    ],
)
def test_from_json__what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractSpec.from_json({**SPEC.to_json(), **change})
