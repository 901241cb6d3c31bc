"""The finished strategies side by side: accuracies with their intervals, paired differences, costs. Torch-free."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import mean, median
from typing import Any

from transfercache.comparison.results import RunResult
from transfercache.comparison.statistics import break_even, count_pairs, difference_interval, mcnemar_p
from transfercache.metrics import Report, wilson_interval

COMPARISON_SCHEMA_VERSION = 1
SIGNIFICANT = 0.05
#: What a duration depends on, of an environment.
_PLACE = ("machine", "device")


@dataclass(frozen=True, eq=False)
class Entry:
    """One strategy on one backbone: its results by seed, the first of which the paired figures and details are of."""

    label: str  # the strategy's name; with several backbones "name (backbone)"
    results: tuple[RunResult, ...]
    is_kept: bool  # every one was found, none was run now

    @property
    def first(self) -> RunResult:
        """The result of the first seed."""
        return self.results[0]

    @cached_property
    def report(self) -> Report:
        """The figures of the first seed."""
        return self.first.report()

    @property
    def accuracies(self) -> tuple[float, ...]:
        """By seed."""
        return tuple(float(result.is_right.mean()) for result in self.results)

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return mean(self.accuracies)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % of the mean accuracy on M rows: further seeds answer for the same rows, and add none."""
        n = self.report.n
        return wilson_interval(min(self.accuracy * n, n), n)

    @property
    def first_seconds(self) -> float:
        """Of a first run, extraction included; the median over the seeds."""
        return median(result.seconds.first for result in self.results)

    @property
    def again_seconds(self) -> float:
        """Of every further run; the median over the seeds."""
        return median(result.seconds.again for result in self.results)

    @property
    def is_cached(self) -> bool:
        """Whether it works on extracted embeddings."""
        return self.first.extraction is not None

    def to_json(self) -> dict[str, Any]:
        """Return the object under `strategies` of the command line's JSON."""
        first, seeds = self.first, [result.seed for result in self.results]
        per_seed = [{"seed": seed, "accuracy": accuracy} for seed, accuracy in zip(seeds, self.accuracies, strict=True)]
        averaged = {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "accuracy_is": f"of seed {seeds[0]}"
            if len(seeds) == 1
            else f"mean over {len(seeds)} seeds; the other figures are of seed {seeds[0]}",
            "per_seed": per_seed,
        }
        return {
            "name": first.strategy,
            "label": self.label,
            "backbone": first.backbone,
            "n_train": first.n_train,
            "reported": {**self.report.to_json(), **averaged},
            "seconds": {
                "first": self.first_seconds,
                "again": self.again_seconds,
                "stages": dict(first.seconds.stages),
            },
            "backbone_passes": first.backbone_passes,
            "chosen": dict(first.chosen),
            "best_on_reported": None if first.best_on_reported is None else dict(first.best_on_reported),
            "extraction": None if first.extraction is None else dict(first.extraction),
            "environment": dict(first.environment),
            "date": first.date,
            "kept": self.is_kept,
        }


@dataclass(frozen=True)
class Pair:
    """Two strategies on the same rows, by their first seeds; `difference` is the accuracy of a less that of b."""

    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class BreakEven:
    """From how many experiments on extraction and heads cost no more than training on images every time."""

    cached: str
    against: str
    experiments: int | None  # None: a further head is no faster


@dataclass(frozen=True)
class LeftOut:
    """A strategy that was not run, and why."""

    label: str
    estimated_seconds: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the object under `left_out` of the command line's JSON."""
        return {"name": self.label, "estimated_seconds": self.estimated_seconds, "reason": self.reason}


@dataclass(frozen=True, eq=False)
class Summary:
    """What `tlc compare` found so far, in the order in which it ran."""

    data: str
    split: str
    n_train: int
    n_reported: int
    backbones: tuple[str, ...]
    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]
    unfinished: tuple[str, ...]  # asked for, and not run yet
    straddling: int
    warnings: tuple[str, ...]
    environment: dict[str, Any]
    note: str = ""  # what the title adds

    def from_elsewhere(self, entry: Entry) -> RunResult | None:
        """Return the first of its results that another machine or device made: its seconds tell nothing here."""
        here = [self.environment[key] for key in _PLACE]
        others = (result for result in entry.results if [result.environment[key] for key in _PLACE] != here)
        return next(others, None)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every two strategies."""
        return tuple(_pair(a, b) for a, b in itertools.combinations(self.entries, 2))

    @cached_property
    def break_even(self) -> tuple[BreakEven, ...]:
        """Each cached strategy against each that trained on images through the same backbone, both on this machine."""
        here = [entry for entry in self.entries if self.from_elsewhere(entry) is None]
        return tuple(
            BreakEven(
                cached.label,
                other.label,
                break_even(
                    once=cached.first_seconds - cached.again_seconds,
                    each=cached.again_seconds,
                    against=other.again_seconds,
                ),
            )
            for cached in here
            for other in here
            if cached.is_cached and not other.is_cached and cached.first.backbone == other.first.backbone
        )

    def to_json(self) -> dict[str, Any]:
        """Return the command line's JSON document, but for the images that are bad."""
        return {
            "schema_version": COMPARISON_SCHEMA_VERSION,
            "data": self.data,
            "split": self.split,
            "n_train": self.n_train,
            "n_reported": self.n_reported,
            "strategies": [entry.to_json() for entry in self.entries],
            "pairs": [asdict(pair) for pair in self.pairs],
            "break_even": [asdict(item) for item in self.break_even],
            "straddling": self.straddling,
            "left_out": [item.to_json() for item in self.left_out],
            "unfinished": list(self.unfinished),
            "warnings": list(self.warnings),
            "environment": self.environment,
        }


def _pair(a: Entry, b: Entry) -> Pair:
    # Every strategy answered for the same rows, or nothing here is paired.
    if a.first.row.tolist() != b.first.row.tolist() or a.first.target.tolist() != b.first.target.tolist():
        raise ValueError(f"{a.label} and {b.label} were not evaluated on the same rows")
    counts = count_pairs(a.first.is_right, b.first.is_right)
    return Pair(a.label, b.label, counts.difference, difference_interval(counts), mcnemar_p(counts))
