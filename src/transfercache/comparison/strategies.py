"""The table of strategies, and how one is run, named, found again and timed in advance."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from transfercache import config
from transfercache.backbones.devices import device_name
from transfercache.comparison.cached import head, knn
from transfercache.comparison.pixels import pixels_knn
from transfercache.comparison.results import RunResult, load_result
from transfercache.comparison.strategy import Setting, Source, Strategy
from transfercache.comparison.trained import finetuned, partial, probed_first, scratch, tutorial
from transfercache.environment import describe_environment
from transfercache.errors import ArtefactError, UsageError, did_you_mean
from transfercache.version import __version__

logger = logging.getLogger(__name__)

#: Cheapest first, as far as that can be told before anything is measured.
STRATEGIES = (
    knn(),
    head("logistic"),
    head("ridge"),
    head("linear"),
    pixels_knn(),
    tutorial("tutorial-frozen", lr_backbone=None),
    partial(),
    finetuned(),
    probed_first(),
    scratch(),
    tutorial("tutorial-finetune", lr_backbone=config.SEED_LR_BACKBONE),
)


def pick_strategies(names: str) -> tuple[Strategy, ...]:
    """Return the strategies of a comma-separated list, cheapest first; raises UsageError for an unknown name."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    known = [strategy.name for strategy in STRATEGIES]
    for name in asked:
        if name not in known:
            raise UsageError(f"unknown strategy {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}")
    if not asked:
        raise UsageError(f"--strategies names none; known are {', '.join(known)}")
    return tuple(strategy for strategy in STRATEGIES if strategy.name in asked)


def run_strategy(strategy: Strategy, setting: Setting, seed: int) -> RunResult:
    """Run once; the result says also on what machine, with which versions, and when."""
    outcome, rows = strategy.run(setting, seed), setting.rows
    return RunResult(
        strategy=strategy.name,
        backbone=setting.backbone_name if strategy.has_backbone else None,
        seed=seed,
        split=rows.reported,
        class_names=rows.manifest.class_names,
        n_train_per_class=rows.n_train_per_class,
        row=rows.row[rows.is_reported],
        target=rows.manifest.labels[rows.is_reported],
        probabilities=outcome.probabilities,
        seconds=outcome.seconds,
        backbone_passes=outcome.passes,
        chosen=outcome.chosen,
        best_on_reported=outcome.best_on_reported,
        extraction=outcome.extraction,
        environment={**describe_environment(), "device": device_name(setting.device)},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        tlc_version=__version__,
    )


def result_path(folder: Path, strategy: Strategy, setting: Setting, seed: int) -> Path:
    """Return where the result of this run is kept: its name is a digest of everything that the result depends on."""
    identity = {
        "rows": setting.rows.digest,
        "source": strategy.source.name,
        "spec": _source_digest(strategy.source, setting),
        "strategy": strategy.name,
        "options": dict(strategy.options(setting)),
        "seed": seed if strategy.is_seeded else None,
        "tlc": __version__,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def load_kept(path: Path, strategy: Strategy, setting: Setting, seed: int) -> RunResult | None:
    """Return the result that an earlier run kept at `path`, or None; one damaged or of another run is warned of."""
    if not path.exists():
        return None
    target = setting.rows.manifest.labels[setting.rows.is_reported]
    try:
        kept = load_result(path)
        is_of_run = kept.strategy == strategy.name and (kept.seed == seed or not strategy.is_seeded)
        if not is_of_run or not np.array_equal(kept.target, target):
            raise ArtefactError(f"{path}: of another run; delete it, or pass --fresh")
    except ArtefactError as error:
        logger.warning("%s; it is computed again", error)
        return None
    # The same rows by content, in the same order; their numbers change when other rows come or go.
    row = setting.rows.row[setting.rows.is_reported]
    extraction = None if kept.extraction is None else {**kept.extraction, "is_from_this_run": False}
    return replace(kept, row=row, extraction=extraction)


def _source_digest(source: Source, setting: Setting) -> str:
    if source is Source.PIXELS:
        return ""
    return setting.backbone_name if source is Source.ARCHITECTURE else setting.spec(setting.backbone()).digest()
