"""Text from files and people, made fit for a line of a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Return `text` with newlines, escape codes and bytes that are not UTF-8 written out: file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
