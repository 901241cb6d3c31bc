"""What more views of each image do to a head's accuracy, and what they cost.

Run: .venv/bin/python benchmarks/bench_views.py DATA [--weights PATH] [--views 1,2,4,8] [--seeds 5]
Prints JSON: for each number of views the seconds of embedding them all (from an empty cache), and per solver the
accuracy on the reported split over fold seeds (mean, minimum, maximum), evaluated in view 0 and by the mean of the
views, and the seconds of the fit. Ratios are against one view in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from typing import Any

import transfercache as tc
from transfercache.environment import describe_environment

SOLVERS = ("logistic", "linear")


def heads(extraction: Any, solver: str, *, seeds: int, folder: str) -> dict[str, Any]:
    """Train with fold seeds 0, 1, ...; returns accuracies and the median seconds of a fit."""
    out = f"{folder}/head.safetensors"
    results = [tc.train_head(extraction, solver=solver, seed=seed, out=out) for seed in range(seeds)]
    figures: dict[str, Any] = {
        "accuracy": spread([result.reported.accuracy for result in results]),
        "log_loss": spread([result.reported.log_loss for result in results]),
        "fit_s": round(statistics.median(result.seconds["fit"] for result in results), 3),
    }
    if extraction.views > 1:
        averaged = [tc.train_head(extraction, solver=solver, seed=seed, out=out, tta=True) for seed in range(seeds)]
        figures["accuracy_of_the_mean_of_views"] = spread([result.reported.accuracy for result in averaged])
    return figures


def spread(values: list[float]) -> dict[str, float]:
    """Return mean, minimum and maximum."""
    return {name: round(of(values), 4) for name, of in (("mean", statistics.mean), ("min", min), ("max", max))}


def main(data: str, *, weights: str, views: list[int], seeds: int) -> dict[str, Any]:
    """Measure and return what is printed."""
    figures: dict[str, Any] = {}
    for number in views:
        with tempfile.TemporaryDirectory() as folder:
            extraction = tc.extract_features(data, weights=weights, views=number, cache_dir=folder, on_bad="skip")
            extract_s = extraction.seconds["total"]
            figures[str(number)] = {
                "extract_s": round(extract_s, 2),
                "extract_times_the_first": round(extract_s / figures[str(views[0])]["extract_s"], 2)
                if figures
                else 1.0,
                **{solver: heads(extraction, solver, seeds=seeds, folder=folder) for solver in SOLVERS},
            }
    return {"seeds": seeds, "views": figures, "environment": describe_environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--views", default="1,2,4,8")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    numbers = [int(number) for number in given.views.split(",")]
    print(json.dumps(main(given.data, weights=given.weights, views=numbers, seeds=given.seeds), indent=1))
