"""The figures of one head or model for a terminal: the headline, then class by class."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transfercache.metrics import Report
from transfercache.text import one_line

# A thousand classes would bury the headline: the worst ones are what one looks for.
_CLASSES_SHOWN = 20


def render_report(report: Report | None, *, title: str, footer: str) -> RenderableType:
    """Return headline, table of classes and footer; with more than twenty classes, those of lowest recall."""
    if report is None:
        return Group(Text(f"{title}: no labelled row in a test or val split, so nothing is reported"), Text(footer))
    low, high = report.interval
    headline = (
        f"{title}: {report.split} accuracy {report.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}, "
        f"n = {report.n}), balanced {report.balanced_accuracy:.3f}, macro-F1 {report.macro_f1:.3f}, "
        f"log loss {report.log_loss:.3f}, ECE {report.ece:.3f}"
    )
    return Group(Text(headline), _class_table(report), Text(footer))


def _class_table(report: Report) -> Table:
    shown = list(report.per_class)
    title = None
    if len(shown) > _CLASSES_SHOWN:
        shown = sorted(shown, key=lambda item: (item.recall is None, item.recall))[:_CLASSES_SHOWN]
        title = f"the {_CLASSES_SHOWN} of {len(report.per_class)} classes with the lowest recall (all in --json)"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for name in ("n", "training rows", "recall", "precision"):
        table.add_column(name, justify="right")
    for item in shown:
        figures = ["-" if value is None else f"{value:.3f}" for value in (item.recall, item.precision)]
        # Text: a class name may hold rich's markup.
        table.add_row(Text(one_line(item.name)), str(item.n), str(item.n_train), *figures)
    return table
