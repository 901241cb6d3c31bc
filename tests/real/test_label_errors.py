"""Labels of the tutorial's ants and bees, turned at random, as `train-head --suspects` ranks them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from transfercache.commands.extract import Extraction
from transfercache.commands.train import train_head

pytestmark = pytest.mark.real

SEEDS = 8  # of the twenty that benchmarks/bench_label_errors.py takes


def test_suspects__most_turned_labels_come_first(extraction: Extraction, tmp_path: Path) -> None:
    table = extraction.table("train")
    shares, n_issues, n_right = [], 0, 0
    for seed in range(SEEDS):
        turned = np.random.default_rng(seed).choice(244, size=12, replace=False)
        wrong = [(table.paths[row], table.class_names[1 - table.labels[row]]) for row in turned]
        with open(tmp_path / "turned.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *wrong])
        train_head(
            extraction, labels=tmp_path / "turned.csv", suspects=tmp_path / "s.csv", seed=seed, out=tmp_path / "head"
        )
        with open(tmp_path / "s.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == 244
        is_turned = np.isin([line["path"] for line in lines], [path for path, _ in wrong])
        is_issue = np.array([line["is_issue"] == "1" for line in lines])
        shares.append((is_turned[:12].sum() / 12, is_turned[:24].sum() / 12))
        n_issues, n_right = n_issues + is_issue.sum(), n_right + (is_issue & is_turned).sum()
    first, second = np.mean(shares, axis=0)
    assert first >= 0.75
    assert second >= 0.9
    assert n_right / n_issues >= 0.85
