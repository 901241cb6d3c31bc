"""What `tlc train-head` returns: the head, its figures, and the answers to what else was asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from transfercache import config
from transfercache.commands.inputs import BadImage
from transfercache.errors import UsageError
from transfercache.heads.learning_curve import Point, last_gain
from transfercache.heads.linear_head import LinearHead
from transfercache.metrics import Report
from transfercache.plain import plain

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Calibration:
    """The temperature of a head, and its figures on the reported split without it (None: no labelled row there)."""

    temperature: float
    is_fitted: bool  # False: the held-out images say nothing, and it was left at 1
    n: int  # training images held out
    uncalibrated_log_loss: float | None
    uncalibrated_ece: float | None


@dataclass(frozen=True)
class SuspectsFile:
    """Where the suspicious labels were written, and how many there are."""

    file: Path
    n_scored: int  # training images
    n_issues: int  # of them, those that are confidently of another class
    n_unscored: int  # training images that could not be held out


@dataclass(frozen=True, eq=False)
class HeadResult:
    """A trained head, where it was written, and its figures on the reported split (None: no labelled row there)."""

    head: Path | None  # None for knn, which only evaluates
    solver: str
    chosen: dict[str, Any]
    n_train: int  # images
    views: int  # rows of each of them
    tta: bool  # reported by the mean of an image's views
    is_bundled: bool  # the MODEL holds the backbone as well
    straddling: int  # groups, or sets of equal images, that the given split divides
    reported: Report | None
    calibration: Calibration | None
    suspects: SuspectsFile | None
    shots: tuple[Point, ...]  # by images a class; empty where not asked for, as the two below
    learning_curve: tuple[Point, ...]  # by share of the training images
    seeds: tuple[Point, ...]  # one
    seconds: dict[str, float]  # load, fit, total; held_out and parts where asked for
    linear_head: LinearHead | None
    cache: Path
    bad: tuple[BadImage, ...] = ()  # no image is read

    def predict(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Return int64 [M], indices into the class names, for embeddings float32 [M, D]."""
        if self.linear_head is None:
            raise UsageError(f"{self.solver} only evaluates and leaves no head; train one with solver='logistic'")
        return self.linear_head.predict(features)

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        if self.head is None:
            return ("tlc", "train-head", str(self.cache), "--solver", config.SOLVER)
        return ("tlc", "predict", str(self.head), str(self.cache))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc train-head`; what was not asked for is null."""
        curve = self.learning_curve
        return {
            "head": plain(self.head),
            "solver": self.solver,
            "chosen": self.chosen,
            "n_train": self.n_train,
            "views": self.views,
            "tta": self.tta,
            "bundled": self.is_bundled,
            "straddling": self.straddling,
            "reported": plain(self.reported),
            "calibration": plain(self.calibration),
            "suspects": plain(self.suspects),
            "shots": [point.to_json("shots") for point in self.shots] or None,
            "learning_curve": [point.to_json("fraction") for point in curve] or None,
            "more_labels": last_gain(curve).to_json() if curve else None,
            "seeds": self.seeds[0].to_json("fraction") if self.seeds else None,
            "seconds": self.seconds,
        }

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from transfercache.report.heads import render_asked, render_report

        views = f" in {self.views} views" if self.views > 1 else ""
        title = f"{self.solver} on {self.n_train} training images{views}"
        figures = render_report(self.reported, title=title, footer="\n".join(self._lines()))
        return render_asked(figures, shots=self.shots, learning_curve=self.learning_curve, seeds=self.seeds)

    def _lines(self) -> list[str]:
        bundle = ", the backbone in it" if self.is_bundled else ""
        lines = [] if self.head is None else [f"{self.head}{bundle}"]
        if self.tta:
            lines.append("reported by the mean of each image's views")
        if self.calibration is not None:
            lines.append(_calibration_line(self.calibration))
        if self.suspects is not None:
            lines.append(_suspects_line(self.suspects))
        return [*lines, f"load {self.seconds['load']:.2f} s, fit {self.seconds['fit']:.2f} s"]


def _calibration_line(calibration: Calibration) -> str:
    if not calibration.is_fitted:
        return f"temperature left at 1: {calibration.n} held-out training images give no reason for another"
    line = f"temperature {calibration.temperature:.3g}, fitted on {calibration.n} held-out training images"
    if calibration.uncalibrated_log_loss is None:
        return line
    return (
        f"{line}; without it log loss {calibration.uncalibrated_log_loss:.3f}, ECE {calibration.uncalibrated_ece:.3f}"
    )


def _suspects_line(suspects: SuspectsFile) -> str:
    unscored = f"; {suspects.n_unscored} could not be held out" if suspects.n_unscored else ""
    return (
        f"{suspects.file}: {suspects.n_scored} labels, the most suspicious first, {suspects.n_issues} of them likely "
        f"wrong{unscored}; mend the column label and pass it with --labels"
    )
