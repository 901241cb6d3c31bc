"""How many wrong labels `train-head --suspects` finds: some of the training labels are turned at random.

Run: .venv/bin/python benchmarks/bench_label_errors.py DATA [--weights PATH] [--seeds 20] [--share 0.05]
Prints JSON: for each seed and in the mean, the share of the turned labels among the first rows of the file (as many
as were turned, and twice as many), and of those that it calls issues, how many were turned. A seed draws the labels
that are turned, each to another class, and the folds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import transfercache as tc
from transfercache.environment import describe_environment
from transfercache.randomness import derive_rng
from transfercache.splits import Split


def turned_labels(table: Any, *, share: float, seed: int) -> dict[str, str]:
    """Return path -> wrong label for a random share of the training images, at least one."""
    rng = derive_rng(seed, "turned-labels")
    rows = np.flatnonzero((table.split == Split.TRAIN) & (table.labels >= 0) & (table.view == 0))
    chosen = rng.choice(rows, size=max(1, round(share * len(rows))), replace=False)
    n_classes = len(table.class_names)
    wrong = (table.labels[chosen] + rng.integers(1, n_classes, size=len(chosen))) % n_classes
    return {table.paths[row]: table.class_names[label] for row, label in zip(chosen, wrong, strict=True)}


def ranked(extraction: Any, turned: dict[str, str], *, seed: int, folder: Path) -> list[dict[str, str]]:
    """Return the lines of the file of suspects, the most suspicious first."""
    with open(folder / "turned.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *turned.items()])
    suspects = folder / "suspects.csv"
    tc.train_head(
        extraction, labels=folder / "turned.csv", suspects=suspects, seed=seed, out=folder / "head.safetensors"
    )
    with open(suspects, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def figures(lines: list[dict[str, str]], turned: dict[str, str]) -> dict[str, float]:
    """Return the share of the turned labels found by rank, and what the issues are worth."""
    is_turned = [line["path"] in turned for line in lines]
    issues = [wrong for wrong, line in zip(is_turned, lines, strict=True) if line["is_issue"] == "1"]
    n_turned = len(turned)
    return {
        "recall_in_as_many": sum(is_turned[:n_turned]) / n_turned,
        "recall_in_twice_as_many": sum(is_turned[: 2 * n_turned]) / n_turned,
        "recall_of_issues": sum(issues) / n_turned,
        "issues": len(issues),
        "issues_turned": sum(issues),
    }


def main(data: str, *, weights: str, seeds: int, share: float) -> dict[str, Any]:
    """Measure and return what is printed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extraction = tc.extract_features(data, weights=weights, cache_dir=folder, on_bad="skip")
        table = extraction.table()
        runs = []
        for seed in range(seeds):
            turned = turned_labels(table, share=share, seed=seed)
            lines = ranked(extraction, turned, seed=seed, folder=folder)
            runs.append(figures(lines, turned))
    return {
        "mean": {key: round(statistics.mean(run[key] for run in runs), 3) for key in runs[0]},
        "runs": [{key: round(value, 3) for key, value in run.items()} for run in runs],
        "turned": len(turned),
        "training_images": len(lines),
        "environment": describe_environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.05)
    given = parser.parse_args()
    print(json.dumps(main(given.data, weights=given.weights, seeds=given.seeds, share=given.share), indent=1))
