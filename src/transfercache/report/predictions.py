"""Predictions for a terminal: one line an image, the first few."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transfercache.text import one_line


def render_predictions(rows: Sequence[tuple[str, str, float]], *, n_images: int, out: Path | None) -> RenderableType:
    """Return a table of (path, label, probability) and where the rest is."""
    if out is not None:
        return Text(f"{out}: {n_images} images")
    table = Table()
    for name in ("image", "label"):
        table.add_column(name, overflow="fold")
    table.add_column("probability", justify="right")
    for path, label, probability in rows:
        # Text: names may hold rich's markup, or bytes that are not UTF-8.
        table.add_row(Text(one_line(path)), Text(one_line(label)), f"{probability:.3f}")
    rest = n_images - len(rows)
    return Group(table, Text(f"and {rest} more: --out FILE.csv or --json gives all")) if rest > 0 else table
