"""Paths and class names as file systems allow them: newlines, rich's markup, escape codes, invalid UTF-8."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfercache.cache.reader import open_cache

Run = Callable[..., Any]

ODD = (
    "[red]x [bold]y",
    "two\nlines",
    "\x1b[31mescape",
    os.fsdecode(b"caf\xe9"),
)


@pytest.fixture
def odd_photos(draw_photos: Callable[..., Path], tmp_path: Path) -> Path:
    """Class folders with odd names, each with a bad image of an odd name too."""
    folder = draw_photos(tmp_path / "[blue]odd", 3, class_names=ODD)
    for i, name in enumerate(ODD):
        (folder / name / f"{ODD[-1 - i]}.jpg").write_text("text")
    return folder


def test_odd_names__through_every_command(tlc: Run, odd_photos: Path, tmp_path: Path) -> None:
    cache_dir = tmp_path / "[bold]cache"
    ended = tlc("extract-features", odd_photos, "--weights=random", "--cache-dir", cache_dir)
    assert ended.code == 3
    (cache,) = cache_dir.iterdir()
    assert ended.out.splitlines()[0] == str(cache)
    lines = ended.err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if "text" in line] == [
        r"tlc: \x1b[31mescape/two\nlines.jpg: not an image (it starts like text)",
        r"tlc: [red]x [bold]y/caf\udce9.jpg: not an image (it starts like text)",
        r"tlc: caf\udce9/[red]x [bold]y.jpg: not an image (it starts like text)",
        r"tlc: two\nlines/\x1b[31mescape.jpg: not an image (it starts like text)",
    ]
    assert f"next: tlc train-head {shlex.quote(str(cache))}" in lines
    assert open_cache(cache).class_names == tuple(sorted(ODD))

    for words in (("list",), ("info", cache), ("verify",), ("prune", "--yes")):
        ended = tlc("cache", *words, "--cache-dir", cache_dir, "--json")
        assert ended.code == 0
        assert all(line.isprintable() for line in ended.err.splitlines())
        document = json.loads(ended.out)
        assert (document if words[0] == "info" else document[0])["cache"] == str(cache)

    ended = tlc("train-head", cache, "--C=1", "--out", tmp_path / ODD[1] / "[b]head.safetensors", "--json")
    assert ended.code == 0
    document = json.loads(ended.out)
    assert [item["class"] for item in document["reported"]["per_class"]] == sorted(ODD)
    assert all(line.isprintable() for line in ended.err.splitlines())

    ended = tlc("predict", document["head"], odd_photos, "--cache-dir", cache_dir, "--json")
    assert ended.code == 3
    images = json.loads(ended.out)
    assert [image["path"] for image in images] == list(open_cache(cache).rows.path)
    assert {image["label"] for image in images} == {*ODD, None}


def test_odd_names__on_a_terminal(tlc: Run, odd_photos: Path, tmp_path: Path) -> None:
    tlc("extract-features", odd_photos, "--weights=random")
    (cache,) = (tmp_path / "cache").iterdir()
    ended = tlc("train-head", cache, "--C=1")
    assert ended.code == 0
    assert "[red]x [bold]y" in ended.out
    assert r"caf\udce9" in ended.out
    ended = tlc("cache", "info", cache)
    assert ended.code == 0
    assert all(line.isprintable() for line in ended.out.splitlines())
    assert {"[red]x [bold]y", r"two\nlines", r"\x1b[31mescape", r"caf\udce9"} <= {
        line.split("  ")[0] for line in ended.out.splitlines()
    }
    assert tlc("cache", "list").out.count("[blue]odd") == 1
    ended = tlc("predict", tmp_path / "models/blue-odd-logistic.safetensors", cache)
    assert ended.code == 3
    assert "[red]x [bold]y/00.png" in ended.out
    assert r"caf\udce9/00.png" in ended.out


@pytest.mark.parametrize("name", ODD)
def test_odd_path__in_an_error__is_one_printable_line(tlc: Run, name: str) -> None:
    ended = tlc("extract-features", name)
    assert (ended.code, ended.out) == (3, "")
    (line,) = ended.err.splitlines()
    assert line.isprintable()


def test_odd_model_path__in_the_text(tlc: Run, made: Path, tmp_path: Path) -> None:
    (cache,) = (made / "cache").iterdir()
    out = tmp_path / f"[red]{ODD[3]}.safetensors"
    ended = tlc("train-head", cache, "--C=1", "--out", out)
    assert ended.code == 0
    assert rf"{tmp_path}/[red]caf\udce9.safetensors" in ended.out
    assert out.is_file()
