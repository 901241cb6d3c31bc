"""Text from files and people, made fit for a line of a terminal, and options as the command line spells them."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Return `text` with newlines, escape codes and bytes that are not UTF-8 written out: file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_flag(name: str) -> str:
    """Return an option's name as the command line spells it, without the dashes before it."""
    return name.replace("_", "-")


def name_value(value: object) -> str:
    """Return an option's value as the command line spells it."""
    return "none" if value is None else str(value)
