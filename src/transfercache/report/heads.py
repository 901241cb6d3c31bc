"""A head or model for a terminal: its headline, class by class, and what else was asked of a head."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transfercache.heads.learning_curve import SMALL_GAIN, Gain, Point, last_gain
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


def render_asked(
    figures: RenderableType,
    *,
    shots: tuple[Point, ...],
    learning_curve: tuple[Point, ...],
    seeds: tuple[Point, ...],
) -> RenderableType:
    """Return the figures of the head, then a table of each thing that was asked."""
    parts = [figures]
    if seeds:
        parts.append(_table(seeds, {1.0: "all, by seed"}, heading="training images"))
    if shots:
        parts.append(_table(shots, {point.size: f"{point.size:g}" for point in shots}, heading="images a class"))
    if learning_curve:
        shares = {point.size: f"{point.size:.3g} ({point.n_images:.0f})" for point in learning_curve}
        parts += [
            _table(learning_curve, shares, heading="share of the images"),
            Text(_sentence(last_gain(learning_curve))),
        ]
    return Group(*parts) if len(parts) > 1 else figures


def _table(points: tuple[Point, ...], names: dict[float, str], *, heading: str) -> Table:
    table = Table()
    for name in (heading, "repeats", "accuracy", "deviation", "min", "max"):
        table.add_column(name, justify="right")
    for point in points:
        values = point.accuracies
        deviation = f"{values.std(ddof=1):.3f}" if len(values) > 1 else "-"
        figures = (f"{values.mean():.3f}", deviation, f"{values.min():.3f}", f"{values.max():.3f}")
        table.add_row(names[point.size], str(len(values)), *figures)
    return table


def _sentence(gain: Gain) -> str:
    """Answer, in one sentence, whether more labels would help: docs/statistics.md has the rule."""
    low, high = gain.interval
    last = (
        f"From {gain.n_from:.0f} to {gain.n_to:.0f} training images accuracy changed by {100 * gain.value:+.1f} points"
    )
    interval = f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    meaning = {
        "yes": "more labels would help",
        "no": f"as many labels again are unlikely to bring {100 * SMALL_GAIN:g} point",
        "unclear": "these reported images do not tell whether more labels would help",
    }[gain.answer]
    return f"Would more labels help? {last} {interval}: {meaning}."
