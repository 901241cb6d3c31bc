"""A small grid of options: each combination trains on the same rows and is judged on the same ones held out of them.

No trial is given the rows of other splits with their labels, so that what is reported afterwards is read once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from typing import Any, get_type_hints

import numpy as np

from transfercache import config
from transfercache.backbones.registry import Backbone
from transfercache.errors import DivergenceError, OutOfMemoryError, UsageError, did_you_mean
from transfercache.finetuning.checkpoints import Checkpoints
from transfercache.finetuning.groups import describe_effects
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.result import FinetuneResult
from transfercache.finetuning.rows import divide_rows
from transfercache.finetuning.training import OnLine, ignore
from transfercache.images.manifest import Manifest
from transfercache.splits import Split
from transfercache.text import name_flag, name_value

logger = logging.getLogger(__name__)

#: One combination: the name of a field of FinetuneOptions -> its value.
Values = dict[str, Any]
#: Trains with these options on this manifest, checkpoints going there.
Train = Callable[[Manifest, FinetuneOptions, Checkpoints], FinetuneResult]

# What the names of checkpoints begin with: of the trial under way, by its number, and of what is finished.
_TRY, _DONE = "try-", "try-done-"
# What says which rows judge and how, what is no setting (a seed that wins has won by luck), or changes no bit.
_NOT_TRIED = ("compute", "has_head", "patience", "seed", "select", "workers")
_NAMES = tuple(field.name for field in fields(FinetuneOptions) if field.name not in _NOT_TRIED)


@dataclass(frozen=True)
class Trial:
    """One combination, trained and judged; without figures where its loss stopped being a number, or memory ran out."""

    values: Values
    failure: str | None  # why it has no figures: diverged, or out of memory
    held_out_log_loss: float | None
    held_out_accuracy: float | None
    epoch: int  # whose figures these are: with `select` its best, else the last; or the one it ended in
    seconds: float
    passes: int  # images through the network, forward
    n_held_out: int  # training rows, the same for all


def describe_values(values: Values) -> str:
    """Return one combination for a line of text, such as `lr-head 0.003, ema none`."""
    return ", ".join(f"{name_flag(name)} {name_value(value)}" for name, value in values.items())


def combine(options: FinetuneOptions, grid: Mapping[str, Sequence[object]]) -> tuple[Values, ...]:
    """Return all combinations of a grid (option -> values or their words), the last option's values changing fastest.

    Raises UsageError for a name or value that is off, also beside others of its combination; for an option that
    `options` has set already; and where there is nothing to choose from.
    """
    parsed = {name: _parse_values(options, name, words) for name, words in grid.items()}
    combinations = tuple(dict(zip(parsed, values, strict=True)) for values in product(*parsed.values()))
    if len(combinations) < 2:
        names = ", ".join(map(name_flag, grid))
        raise UsageError(f"--try {names}: leaves nothing to choose; give several values, with commas between them")
    for values in combinations:
        try:
            replace(options, **values)
        except UsageError as error:
            raise UsageError(f"--try: {error}") from error
    return combinations


def _parse_values(options: FinetuneOptions, name: str, words: Sequence[object]) -> list[Any]:
    flag = name_flag(name)
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise UsageError(f"--try {flag}: {words!r} must be a list of values")
    if name not in _NAMES:
        known = [name_flag(item) for item in _NAMES]
        raise UsageError(f"--try {flag}: must be one of {', '.join(known)}{did_you_mean(flag, known)}")
    given = getattr(options, name)
    if given != getattr(FinetuneOptions(), name):
        raise UsageError(f"--{flag} {given}: is given and tried as well; leave out one of them")
    values = [_parse(name, name_value(word).strip()) for word in words]
    twice = next((word for at, word in enumerate(words) if values[at] in values[:at]), None)
    if twice is not None:
        raise UsageError(f"--try {flag}: {twice} stands there twice")
    return values


def _parse(name: str, word: str) -> Any:
    kind = get_type_hints(FinetuneOptions)[name]
    if kind is str:
        return word.replace("+", ",")  # of stages, whose commas would end a value
    if name == "ema" and word == "none":
        return None
    try:
        return int(word) if kind is int else float(word)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"--try {name_flag(name)}={word}: must be {what}") from error


def check_effects(backbone: Backbone, options: FinetuneOptions, combinations: Sequence[Values]) -> None:
    """Raise UsageError for an option whose values change nothing beside the others, and for an unknown stage."""

    def effects(changes: Values) -> list[object]:
        return [describe_effects(backbone, replace(options, **{**values, **changes})) for values in combinations]

    as_tried = effects({})
    for name, first in combinations[0].items() if combinations else ():
        is_tried = any(values[name] != first for values in combinations)
        if is_tried and as_tried == effects({name: first}):
            cause = "augment" if name == "crop_area" else "unfreeze"
            with_words = " or ".join(dict.fromkeys(v.get(cause, getattr(options, cause)) for v in combinations))
            raise UsageError(
                f"--try {name_flag(name)}: its values all train the same with --{cause} {with_words}; leave it out"
            )


def check_search(checkpoints: Checkpoints, combinations: Sequence[Values]) -> None:
    """Raise UsageError where a run with a search would go on from one without it, or the other way round."""
    folder = checkpoints.folder
    is_tried = any(folder.glob(f"{_TRY}*.pt"))
    if combinations and not is_tried and any(folder.glob("*.pt")):
        raise UsageError(
            f"{folder}: holds the checkpoints of a run without --try; leave it out as then, or remove that folder to "
            "begin anew"
        )
    if is_tried and not combinations:
        raise UsageError(
            f"{folder}: holds the trials of a run with --try; give it as then, or remove that folder to begin anew"
        )


def search(
    train: Train,
    manifest: Manifest,
    options: FinetuneOptions,
    combinations: Sequence[Values],
    *,
    checkpoints: Checkpoints,
    on_line: OnLine = ignore,
) -> tuple[Trial, ...]:
    """Try each combination, in order; those that an interrupted search has finished are taken from its checkpoints.

    The share `options.select` of the training rows, or by default `config.TRY_SHARE`, is held out by content: the
    same rows each time. `checkpoints.identity` is that of a run with `options`; what is tried is added to it. Raises
    UsageError for trials of another run, and where no combination has figures.
    """
    checkpoints.identity = {**checkpoints.identity, "--try": "; ".join(map(describe_values, combinations))}
    share = options.select or config.TRY_SHARE
    n_held_out = len(divide_rows(manifest, select=share, seed=options.seed).held_out)
    hidden = _hide_reported(manifest)
    done = checkpoints.part(_DONE, is_first=False)
    kept = done.newest() or {"trials": []}
    trials = [Trial(**trial) for trial in kept["trials"]]
    for number, values in enumerate(combinations, 1):
        own = checkpoints.part(f"{_TRY}{number}-", is_first=not trials)
        if number > len(trials):
            on_line(f"try {number} of {len(combinations)}: {describe_values(values)}")
            tried = replace(options, **values, select=share)
            run = partial(train, hidden, tried, own)
            trials.append(_judge(run, values, n_held_out=n_held_out, is_best_kept=options.select is not None))
            done.write({"trials": [asdict(trial) for trial in trials]}, epoch=number, n_trained=0)
        own.remove()
    if all(trial.held_out_log_loss is None for trial in trials):
        checkpoints.remove()
        raise UsageError("--try: every combination diverged or ran out of memory; give lower rates, or smaller batches")
    on_line(f"the best of {len(trials)}: {describe_values(choose_trial(trials).values)}")
    return tuple(trials)


def choose_trial(trials: Sequence[Trial]) -> Trial:
    """Return the one of lowest held-out log loss, the first of equals."""
    losses = [math.inf if trial.held_out_log_loss is None else trial.held_out_log_loss for trial in trials]
    return trials[losses.index(min(losses))]


def _hide_reported(manifest: Manifest) -> Manifest:
    """Return the same rows, those outside the training split without split and label: no run can evaluate them."""
    is_train = manifest.split == Split.TRAIN
    split = np.where(is_train, Split.TRAIN, Split.NONE).astype(np.uint8)
    return replace(manifest, split=split, labels=np.where(is_train, manifest.labels, -1))


def _judge(run: Callable[[], FinetuneResult], values: Values, *, n_held_out: int, is_best_kept: bool) -> Trial:
    start = time.perf_counter()
    try:
        result = run()
    except DivergenceError as error:
        return Trial(values, "diverged", None, None, error.epoch, error.seconds, error.passes, n_held_out)
    except OutOfMemoryError as error:
        logger.warning("--try %s: %s", describe_values(values), error)
        return Trial(values, "out of memory", None, None, 1, time.perf_counter() - start, 0, n_held_out)
    record = result.epochs[result.chosen_epoch - 1] if is_best_kept else result.epochs[-1]
    return Trial(
        values=values,
        failure=None,
        held_out_log_loss=record.selection_loss,
        held_out_accuracy=record.selection_accuracy,
        epoch=record.epoch,
        seconds=result.seconds["total"],
        passes=result.passes,
        n_held_out=n_held_out,
    )
