"""A comparison as a table, for the terminal and for a notebook, under a caption that says what the figures are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transfercache.comparison.summary import SIGNIFICANT, Entry, Summary

# In two lines, so that the table fits 80 columns. Where there are several seeds, they take the last one's place: the
# title says how many images each strategy was trained on.
_COLUMNS = ("strategy", "accuracy", "95 %\ninterval", "first\nrun", "further\nrun", "passes", "trained\non")
_EXCLUDED = "interpreter start, imports, downloads, reading the weights"
_MAX_PAIRS = 4
#: Augmented training images are harder than reported ones, so a network that has converged may lie a little below.
_UNDERTRAINED = 0.1


def terminal_table(summary: Summary) -> RenderableType:
    """Return the table and its caption for rich, which honours NO_COLOR and the terminal's width."""
    table = Table(title=title(summary), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in _columns(summary):
        table.add_column(column, justify="left" if column == _COLUMNS[0] else "right")
    for entry in summary.entries:
        # As text: a file's or a timm model's name may hold what rich would take for markup.
        table.add_row(*(Text(cell) for cell in _cells(summary, entry)))
    return Group(table, *(Text(line) for line in caption(summary)))


def html_table(summary: Summary) -> str:
    """Return the same as one piece of HTML, everything escaped."""
    header = "".join(f"<th>{escape(column.replace(chr(10), ' '))}</th>" for column in _columns(summary))
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(summary, entry)) + "</tr>"
        for entry in summary.entries
    )
    lines = "<br>".join(escape(line) for line in caption(summary))
    return (
        f"<table><caption>{escape(title(summary))}</caption><thead><tr>{header}</tr></thead>"
        f"<tbody>{body}</tbody></table><p><small>{lines}</small></p>"
    )


def result_line(entry: Entry) -> str:
    """Return one finished strategy on one line, as it is shown while others still run."""
    low, high = entry.interval
    return (
        f"{entry.label}: accuracy {entry.accuracy:.3f} [{low:.3f}, {high:.3f}], first run "
        f"{show_seconds(entry.first_seconds)}, further run {show_seconds(entry.again_seconds)}"
        + (f" (kept from {_minute(entry.first.date)})" if entry.is_kept else "")
    )


def show_seconds(seconds: float) -> str:
    """Return a duration in the unit that a person would use."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _minute(date: str) -> str:
    return date[:16].replace("T", " ")


def title(summary: Summary) -> str:
    """Return what was compared on what."""
    on = f" with {', '.join(summary.backbones)}" if summary.backbones else ""
    counts = f"{summary.n_train:,} images to train on, {summary.n_reported:,} reported ({summary.split})"
    note = f" ({summary.note})" if summary.note else ""
    return f"{summary.data}: {counts}{on}{note}"


def caption(summary: Summary) -> Iterator[str]:
    """Yield what a reader must know before believing the table."""
    yield f"first run: from images; further run: with what is cached. Excluded: {_EXCLUDED}."
    yield from _extractions(summary)
    yield from _machine(summary)
    yield from _differences(summary)
    for entry in summary.entries:
        best = entry.first.best_on_reported
        if best is not None:
            yield (
                f"{entry.label} prints {best['accuracy']:.3f} as its best (epoch {best['epoch']}): "
                f"chosen on {summary.split} itself, so not comparable."
            )
    yield from _undertrained(summary)
    yield from _break_even(summary)
    for item in summary.left_out:
        yield f"left out: {item.label}, about {show_seconds(item.estimated_seconds)} ({item.reason})."
    if summary.unfinished:
        yield f"not finished: {', '.join(summary.unfinished)}."
    if summary.straddling:
        yield f"{summary.straddling} groups or sets of equal images lie on both sides of the given split."
    kept = list(_kept(summary))
    if kept:
        is_far = any(summary.from_elsewhere(entry) for entry in summary.entries)
        excluded = "; seconds of another machine are in no break-even" if is_far else ""
        yield f"kept from an earlier run (--fresh repeats it): {', '.join(kept)}{excluded}."


def _columns(summary: Summary) -> tuple[str, ...]:
    n_seeds = _n_seeds(summary)
    return (*_COLUMNS[:-1], f"over\n{n_seeds} seeds") if n_seeds > 1 else _COLUMNS


def _n_seeds(summary: Summary) -> int:
    return max((len(entry.results) for entry in summary.entries), default=1)


def _cells(summary: Summary, entry: Entry) -> tuple[str, ...]:
    low, high = entry.interval
    last = f"{entry.first.n_train:,}"
    if _n_seeds(summary) > 1:
        last = f"{min(entry.accuracies):.3f}-{max(entry.accuracies):.3f}" if len(entry.results) > 1 else ""
    return (
        entry.label,
        f"{entry.accuracy:.3f}",
        f"{low:.3f}-{high:.3f}",
        show_seconds(entry.first_seconds),
        show_seconds(entry.again_seconds),
        f"{entry.first.backbone_passes:,}",
        last,
    )


def _extractions(summary: Summary) -> Iterator[str]:
    records = [(entry, entry.first.extraction) for entry in summary.entries if entry.first.extraction is not None]
    yield from sorted(
        {f"{_extracted(entry)} {_extraction(made)}" for entry, made in records if not made["is_from_this_run"]}
    )
    if not all(record["is_complete"] for _, record in records):
        yield "extraction: an interrupted run's seconds are not in it."


def _extracted(entry: Entry) -> str:
    activations = entry.first.chosen.get("cached")
    return f"{entry.first.backbone}: " + (f"activations ({activations})" if activations else "embeddings")


def _extraction(record: Mapping[str, Any]) -> str:
    runs = record["runs"]
    if len({_place(run) for run in runs}) > 1:
        return f"extracted in parts, {'; '.join(_run(run, _place(run)) for run in runs)}."
    return f"extracted earlier, {_run(record, record['device'])}."


def _run(run: Mapping[str, Any], place: str) -> str:
    return f"{run['date']} on {place}: {show_seconds(run['seconds'])} for {run['images']} images"


def _place(environment: Mapping[str, Any]) -> str:
    machine = environment["machine"]
    return f"{environment['device']}, {machine['cores']} cores ({machine['vector_units']})"


def _kept(summary: Summary) -> Iterator[str]:
    for entry in summary.entries:
        elsewhere = summary.from_elsewhere(entry)
        if elsewhere is not None:
            yield f"{entry.label} {_minute(elsewhere.date)} on another machine ({_place(elsewhere.environment)})"
        elif entry.is_kept:
            yield f"{entry.label} {_minute(entry.first.date)}"


def _machine(summary: Summary) -> Iterator[str]:
    versions = summary.environment["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "torchvision") if name in versions)
    yield f"{_place(summary.environment)}; {shown}."
    for n_workers in {
        e.first.chosen["worker_processes"] for e in summary.entries if "worker_processes" in e.first.chosen
    }:
        yield f"tutorial-*: images loaded by {n_workers} worker processes (the tutorial has 4)."


def _differences(summary: Summary) -> Iterator[str]:
    found = sorted((pair for pair in summary.pairs if pair.p < SIGNIFICANT), key=lambda pair: pair.p)
    n_others = len(summary.pairs) - len(found)
    for pair in found[:_MAX_PAIRS]:
        low, high = pair.interval
        yield f"{pair.a} - {pair.b}: {pair.difference:+.3f} [{low:+.3f}, {high:+.3f}], paired p {pair.p:.2g}."
    if len(found) > _MAX_PAIRS:
        yield f"As far apart (p < {SIGNIFICANT}), in --json: {len(found) - _MAX_PAIRS} more pairs."
    if n_others:
        which = f"{n_others} of {len(summary.pairs)} pairs" if found else "any two of them"
        yield (
            f"These {summary.n_reported} images alone do not tell {which} apart (paired test, p >= {SIGNIFICANT}, "
            "not adjusted for the number of pairs)."
        )


def _undertrained(summary: Summary) -> Iterator[str]:
    """Name what stopped before it knew its own training images: its accuracy says little about fine-tuning."""
    best = max((entry.accuracy for entry in summary.entries), default=0.0)
    for entry in summary.entries:
        curve = entry.first.chosen.get("by_epoch", [])
        learned = curve[-1].get("train_accuracy") if curve else None
        if learned is not None and learned < best - _UNDERTRAINED:
            yield (
                f"{entry.label} is undertrained: after {len(curve)} epochs it was right on {learned:.3f} of its own "
                "(augmented) training images; give it more --epochs before believing its accuracy."
            )


def _break_even(summary: Summary) -> Iterator[str]:
    """Say for each way of training on images when the soonest of the cached strategies has paid for the extraction."""
    soonest: dict[str, int] = {}
    for item in summary.break_even:
        if item.experiments is not None:
            soonest[item.against] = min(item.experiments, soonest.get(item.against, item.experiments))
    for experiments in sorted(set(soonest.values())):
        against = [label for label, n in soonest.items() if n == experiments]
        yield f"Extraction has paid for itself from experiment {experiments} on against {', '.join(against)}."
