"""Printing a result: one JSON document, or text for people; then, on stderr, what is bad and what comes next."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import transfercache
from transfercache.errors import DataError
from transfercache.text import one_line

if TYPE_CHECKING:  # `tlc --help` loads neither rich's tables nor numpy
    from transfercache.finetuning.result import EpochRecord

# Beside a JSON document, which lists them all.
_BAD_SHOWN = 10


def call(name: str, words: Mapping[str, Any], **callbacks: Any) -> Any:
    """Call a command by its Python name with what its handler was given: `words` are that handler's `locals()`.

    The command's file is imported now. That handler and command have the same parameters is tested.
    """
    return getattr(transfercache, name)(**{key: words[key] for key in words if key != "json"}, **callbacks)


def run(name: str, words: Mapping[str, Any], **callbacks: Any) -> int:
    """Call a command and print its result; returns the exit code."""
    return finish_as_asked(call(name, words, **callbacks), words)


def finish_as_asked(result: Any, words: Mapping[str, Any]) -> int:
    """Print `result` in the way that the handler's `words` ask for; returns the exit code."""
    return finish(result, as_json=words["json"], on_bad=words.get("on_bad", "fail"))


def finish(result: Any, *, as_json: bool, on_bad: str = "fail") -> int:
    """Print what a command returned: its document or what it renders, then its bad images and the next command.

    Returns the exit code: 3 where images are bad and `on_bad` is fail, else 0.
    """
    if as_json:
        print_document(result.to_json())
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(result.render())
    shown = result.bad[:_BAD_SHOWN] if as_json else result.bad
    for item in shown:
        print(f"tlc: {one_line(item.path)}: {one_line(item.reason)}", file=sys.stderr)
    if len(result.bad) > len(shown):
        print(f"tlc: and {len(result.bad) - len(shown)} more unreadable images, in the document", file=sys.stderr)
    print(f"next: {one_line(shlex.join(result.next_command))}", file=sys.stderr)
    return DataError.exit_code if result.bad and on_bad == "fail" else 0


def print_document(document: Any) -> None:
    """Print the JSON document of a command on stdout."""
    print(json.dumps(document, allow_nan=False))


def show_line(line: str) -> None:
    """Print a line about what is going on on stderr."""
    print(one_line(line), file=sys.stderr)


def show_epoch(epoch: EpochRecord) -> None:
    """Print one line about a finished epoch on stderr."""
    held_out = ""
    if epoch.selection_loss is not None:
        held_out = f", held out: loss {epoch.selection_loss:.4f}, accuracy {epoch.selection_accuracy:.3f}"
    bad = f", {epoch.n_bad} images cannot be read and are left out" if epoch.n_bad else ""
    print(
        f"epoch {epoch.epoch}: loss {epoch.train_loss:.4f}, training accuracy {epoch.train_accuracy:.3f}{held_out}, "
        f"{epoch.seconds:.1f} s ({epoch.images_per_second:.1f} images/s), {epoch.passes} passes, "
        f"{epoch.peak_memory_bytes / 2**30:.1f} GiB{bad}",
        file=sys.stderr,
    )
