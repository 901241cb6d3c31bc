"""What `tlc cache` says on a terminal: its JSON documents as aligned lines, none of which is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from transfercache.text import one_line

# More would bury the rest; --json has all.
_ROWS_SHOWN = 20
_SIZES = ("bytes", "unused")
_DATES = ("date", "last_run")


def render_rows(rows: Sequence[Mapping[str, Any]], *, last: str) -> Text:
    """Return one line a cache under the names of what is known of any, and a last line."""
    return _text([*_table(rows), last])


def render_info(document: Mapping[str, Any]) -> Text:
    """Return the document of one cache: a line a field, tables of its classes and shards, a line a run."""
    tables = ("classes", "shards")
    known = {name: _cell(name, value) for name, value in document.items() if name not in (*tables, "provenance")}
    lines = [f"{name}: {text}" for name, text in known.items() if text]
    for name in tables:
        rows = document[name]
        rest = [f"and {len(rows) - _ROWS_SHOWN} more: --json has all"] if len(rows) > _ROWS_SHOWN else []
        lines += ["", *_table(rows[:_ROWS_SHOWN]), *rest] if rows else []
    return _text([*lines, "", *(f"run: {_cell('run', run)}" for run in document["provenance"][-_ROWS_SHOWN:])])


def show_bytes(n_bytes: float) -> str:
    """Return a size in the unit that a person would use, of powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.{0 if unit == 'B' or n_bytes >= 99.95 else 1}f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names, then one line a row, in columns; one that holds nothing is left out."""
    columns = []
    for name in rows[0] if rows else ():
        cells = [one_line(_cell(name, row[name])) for row in rows]
        if any(cells):
            width = max(map(len, [name, *cells]))
            columns.append([cell.ljust(width) for cell in [name.replace("_", " "), *cells]])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _cell(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(key, item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return (" " if value and isinstance(value[0], float) else ", ").join(_cell(name, item) for item in value)
    if value is None or isinstance(value, bool):
        return "yes" if value else "" if value is None else "no"
    if isinstance(value, int):
        return show_bytes(value) if name in _SIZES else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:16].replace("T", " ") if name in _DATES else str(value)


def _text(lines: Sequence[str]) -> Text:
    # Text: paths and class names may hold rich's markup, or bytes that are not UTF-8.
    return Text("\n".join(map(one_line, lines)))
