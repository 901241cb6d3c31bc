"""What `tlc predict` returns: a label an image, or why it has none; shown, or streamed to a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfercache.commands.inputs import BadImage
from transfercache.errors import UsageError
from transfercache.files import replacing

if TYPE_CHECKING:
    from rich.console import RenderableType

# On a terminal; --json and --out give all of them.
_ROWS_SHOWN = 20

#: The two kinds of files, each with the other.
OTHER_KIND = {".csv": ".jsonl", ".jsonl": ".csv"}


@dataclass(frozen=True)
class Prediction:
    """One image: its most probable class, or why it has none."""

    path: str
    label: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...]  # (class, probability), most probable first
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object of this image in the JSON list of `tlc predict`."""
        if self.label is None:
            return {"path": self.path, "label": None, "reason": self.reason}
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"path": self.path, "label": self.label, "probability": self.probability, "top": top}


@dataclass(frozen=True)
class Predictions:
    """All images in the order given; with `out` they are in that file, and here only the first few."""

    images: tuple[Prediction, ...]
    n_images: int
    bad: tuple[BadImage, ...]
    out: Path | None
    next_command: tuple[str, ...]  # the words of the command a person would run next

    def to_json(self) -> Any:
        """Return a list of all images; with `out`, {out, images, bad} instead, as the file has them."""
        if self.out is None:
            return [image.to_json() for image in self.images]
        return {"out": str(self.out), "images": self.n_images, "bad": [item.to_json() for item in self.bad]}

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from transfercache.report.predictions import render_predictions

        best = [(image.path, *image.top[0]) for image in self.images[:_ROWS_SHOWN] if image.top]
        return render_predictions(best, n_images=self.n_images - len(self.bad), out=self.out)


def collect(
    stream: Iterator[Prediction], *, out: Path | None, n_top: int
) -> tuple[tuple[Prediction, ...], int, tuple[BadImage, ...]]:
    """Return the predictions to keep, how many there were, and the bad images; all are written to `out`."""
    kept: list[Prediction] = []
    bad: list[BadImage] = []
    n_images = 0
    with _writing(out, n_top) as write:
        for image in stream:
            n_images += 1
            write(image)
            if image.reason is not None:
                bad.append(BadImage(image.path, image.reason))
            if out is None or n_images <= _ROWS_SHOWN:
                kept.append(image)
    return tuple(kept), n_images, tuple(bad)


@contextmanager
def _writing(out: Path | None, n_top: int) -> Iterator[Callable[[Prediction], None]]:
    """Give a function that writes one prediction to `out`, a line each; .csv (with `n_top` classes) or .jsonl."""
    if out is None:
        yield lambda _: None
        return
    if out.suffix not in OTHER_KIND:
        raise UsageError(f"--out {out}: name a .csv or a .jsonl file")
    with (
        replacing(out) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        if out.suffix == ".jsonl":
            yield lambda image: print(json.dumps(image.to_json()), file=file)
            return
        more = [name for rank in range(2, n_top + 1) for name in (f"label_{rank}", f"probability_{rank}")]
        names = ["path", "label", "probability", "reason", *more]
        rows = csv.DictWriter(file, names, restval="")
        rows.writeheader()
        yield lambda image: rows.writerow(dict(zip(names, _values(image), strict=False)))


def _values(image: Prediction) -> Iterator[str | float | None]:
    """Yield the values of a .csv in the order of its columns; a bad image has the first four."""
    yield from (image.path, image.label, image.probability, image.reason)
    for label, probability in image.top[1:]:
        yield label
        yield probability
