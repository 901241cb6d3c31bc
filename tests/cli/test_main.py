from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transfercache.errors import Terminated
from transfercache.version import __version__

Run = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[str]"]
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;)")
TIMEOUT = 120


def _cache_of(made: Path) -> Path:
    (folder,) = (made / "cache").iterdir()
    return folder


def test_no_words__shows_the_help(tlc: Run) -> None:
    ended = tlc()
    assert (ended.code, ended.err) == (0, "")
    assert "Usage: tlc" in ended.out
    assert "train-head" in ended.out
    assert "141 a closed pipe" in " ".join(ended.out.replace("\u2502", " ").split())


def test_help__shows_the_defaults_that_a_command_fills_in(tlc: Run) -> None:
    text = " ".join(tlc("train-head", "--help").out.replace("\u2502", " ").split())
    for default in ("(auto)", "(adamw)", "(the cache's own split)", "(under ./models)", "(./cache)"):
        assert f"[default: {default}" in text


@pytest.mark.parametrize("words", [("-h",), ("--help",), ("predict", "-h")])
def test_help__by_either_name(tlc: Run, words: tuple[str, ...]) -> None:
    ended = tlc(*words)
    assert (ended.code, ended.err) == (0, "")
    assert "Usage: tlc" in ended.out


def test_version__is_printed_alone(tlc: Run) -> None:
    ended = tlc("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"tlc {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("trian-head", "x"), "tlc: No such command 'trian-head'. Did you mean 'train-head'?"),
        (("train-head", "x", "--solvr", "knn"), "tlc: No such option: --solvr"),
        (("train-head",), "tlc: Missing argument 'CACHE|DATA'."),
        # What typer says about values differs from version to version.
        (("extract-features", "x", "--device", "gpu"), "tlc: Invalid value for '--device': "),
        (("extract-features", "x", "--on-bad", "stop"), "tlc: Invalid value for '--on-bad': "),
        (("extract-features", "x", "--batch-size", "0"), "tlc: Invalid value for '--batch-size': "),
        (("extract-features", "x", "--val-fraction", "1"), "tlc: Invalid value for '--val-fraction': "),
    ],
)
def test_words_that_are_off__are_named_in_one_line(tlc: Run, words: tuple[str, ...], line: str) -> None:
    ended = tlc(*words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(line)
    assert ended.err.count("\n") == 1


def test_paths__are_left_to_the_commands_to_read(
    tlc: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so that reading is refused here as it is to others."""
    shutil.copy(made / "head.safetensors", tmp_path / "mine")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for code, *words in (
        (2, "predict", "mine", "none", "--out=mine"),  # which is no .csv
        (2, "export", "mine", "--out=mine"),  # the MODEL itself
        (3, "train-head", "none", "--labels=mine", "--suspects=mine", "--out=mine", "--cache-dir=mine"),
        (3, "compare", "none", "--weights=random", "--results=mine"),
        (3, "finetune", "none", "--weights=random", "--init-head=mine"),
        (4, "cache", "info", "mine"),
        (4, "cache", "verify", "mine"),
        (4, "cache", "remove", "mine"),
    ):
        ended = tlc(*words)
        assert ended.code == code, words
        assert "is not readable" not in ended.err


def test_option_that_is_off__gets_the_close_ones(tlc: Run) -> None:
    ended = tlc("train-head", "x", "--solvr", "knn")
    assert "--solver" in ended.err


@pytest.mark.parametrize("words", [("--debug", "extract-features", "none"), ("extract-features", "none", "--debug")])
def test_debug__anywhere__adds_the_traceback(tlc: Run, words: tuple[str, ...]) -> None:
    ended = tlc(*words)
    assert ended.code == 3
    assert ended.err.startswith("Traceback (most recent call last):")
    assert "transfercache.errors.DataError: none: no such folder" in ended.err
    assert ended.err.splitlines()[-1].startswith("tlc: none: no such folder")


def test_error__without_debug__is_one_line(tlc: Run) -> None:
    ended = tlc("extract-features", "none")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err == (
        "tlc: none: no such folder or .csv; give a folder of images, a .csv, or one of digits, hymenoptera\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ZeroDivisionError("by\nzero"),
            1,
            r"tlc: a bug in tlc: ZeroDivisionError: by\nzero; run it again with --debug",
        ),
        (MemoryError(), 6, "tlc: out of memory; a smaller --batch-size or fewer --workers need less"),
        (KeyboardInterrupt(), 130, "tlc: interrupted\n"),
        (Terminated("told to end (SIGTERM)"), 143, "tlc: told to end (SIGTERM)\n"),
    ],
)
def test_unexpected_error__has_its_code_and_line(
    tlc: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transfercache.train_head", failing)
    ended = tlc("train-head", "x")
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(line)
    assert ended.err.count("\n") == 1


KEPT = "; what was computed is kept, and the same command goes on from there"
CHECKPOINTS_KEPT = "; its checkpoints, if any, are kept, and the same command with --resume goes on from the last one"


@pytest.mark.parametrize(
    ("command", "words", "rest"),
    [
        ("extract_features", ("extract-features", "x"), KEPT),
        ("compare", ("compare", "x"), KEPT),
        ("demo", ("demo",), KEPT),
        ("finetune", ("finetune", "x"), CHECKPOINTS_KEPT),
        ("predict", ("predict", "x", "y"), ""),
    ],
)
@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (KeyboardInterrupt(), 130, "tlc: interrupted"),
        (Terminated("told to end (SIGTERM)"), 143, "tlc: told to end (SIGTERM)"),
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_interruption__says_what_this_command_keeps(
    tlc: Run,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: tuple[str, ...],
    rest: str,
    error: BaseException,
    code: int,
    start: str,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"transfercache.{command}", failing)
    ended = tlc(*words)
    assert (ended.code, ended.out, ended.err) == (code, "", f"{start}{rest}\n")


def test_json__is_the_only_thing_on_stdout(tlc: Run, made: Path) -> None:
    for words in (
        ("extract-features", made / "pets", "--weights=random", "--cache-dir", made / "cache"),
        ("train-head", _cache_of(made)),
        ("train-head", _cache_of(made), "--solver=knn"),
        ("predict", made / "head.safetensors", _cache_of(made)),
    ):
        ended = tlc(*words, "--json")
        assert ended.code == 0
        assert ended.out.count("\n") == 1
        assert json.loads(ended.out)
        assert ended.err.splitlines()[-1].startswith("next: tlc ")


def test_next_line__is_a_command_that_works(tlc: Run, made: Path) -> None:
    words = ("extract-features", made / "pets", "--weights=random", "--cache-dir", made / "cache")
    for _ in range(2):
        ended = tlc(*words)
        assert ended.code == 0
        (line,) = [line for line in ended.err.splitlines() if line.startswith("next: ")]
        words = tuple(line.removeprefix("next: tlc ").split())
    assert words[0] == "predict"
    assert tlc(*words).code == 0


def test_text__names_the_cache_and_the_figures(tlc: Run, made: Path) -> None:
    cache = _cache_of(made)
    ended = tlc("extract-features", made / "pets", "--weights=random", "--cache-dir", made / "cache")
    assert ended.out.startswith(f"{cache}\n12 images, 512 features each: 0 computed, 12 reused in ")
    ended = tlc("train-head", cache)
    assert ended.out.startswith("logistic on 10 training images: val accuracy ")
    assert "models/pets-logistic.safetensors" in ended.out


def test_colours__not_with_no_color(start: Start) -> None:
    with_colour = start("--help", FORCE_COLOR="1").communicate(timeout=TIMEOUT)[0]
    without = start("--help", FORCE_COLOR="1", NO_COLOR="1").communicate(timeout=TIMEOUT)[0]
    piped = start("--help").communicate(timeout=TIMEOUT)[0]
    assert COLOUR.search(with_colour)
    assert not COLOUR.search(without)
    assert "\x1b" not in piped


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away__is_no_error(start: Start, made: Path, unbuffered: str) -> None:
    process = start("train-head", str(_cache_of(made)), "--C=1", "--json", PYTHONUNBUFFERED=unbuffered)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 141
    assert err in ("", f"next: tlc predict models/pets-logistic.safetensors {_cache_of(made)}\n")


def test_stdout_that_is_closed__is_no_error(start: Start, made: Path, tmp_path: Path) -> None:
    code = "from transfercache.cli.main import run; run()"
    words = f"'{_cache_of(made)}' --solver knn --json"
    done = subprocess.run(
        ["bash", "-c", f'"$PYTHON" -c "{code}" train-head {words} >&-'],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[0][:9]) == (0, "next: tlc")


def test_warnings__reach_stderr_as_one_line_each(start: Start, made: Path) -> None:
    process = start("train-head", str(_cache_of(made)), "--labels", str(made / "fixes.csv"), "--json")
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (3, "")
    assert err == f"tlc: {made / 'fixes.csv'}: cannot be read (No such file or directory); check the path\n"


def test_train_head__of_a_cache__imports_no_torch(made: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['tlc', 'train-head', {str(_cache_of(made))!r}, '--solver', 'logistic', '--json']\n"
        "from transfercache.cli.main import run\n"
        "try:\n  run()\n"
        "finally:\n  print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    modules = set(done.stderr.splitlines()[-1].split())
    assert {"numpy", "h5py", "transfercache"} <= modules
    assert {"torch", "torchvision", "timm", "PIL"} & modules == set()
    assert json.loads(done.stdout)["solver"] == "logistic"


def test_finetune__describes_a_backbone_without_data(tlc: Run) -> None:
    ended = tlc("finetune", "--describe", "resnet18", "--unfreeze=layer4", "--json")
    assert ended.code == 0
    document = json.loads(ended.out)
    assert [stage["name"] for stage in document["stages"]] == ["layer1", "layer2", "layer3", "layer4"]
    assert [group["name"] for group in document["groups"]] == ["layer4", "head"]
    missing = tlc("finetune")
    assert (missing.code, missing.err) == (2, "tlc: finetune: DATA is missing; only --describe BACKBONE does without\n")
