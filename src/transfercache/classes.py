"""Which classes can be trained and reported on: an error below two, a named warning for each that is short of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfercache import config
from transfercache.arrays import Int64Array, UInt8Array
from transfercache.errors import DataError
from transfercache.splits import Split, count_straddling, divide_roles

#: Long-tailed data has hundreds of rare classes; the first few show what is the matter.
_MAX_WARNINGS_OF_A_KIND = 10


def check_classes(
    *, labels: Int64Array, split: UInt8Array, component: Int64Array, class_names: Sequence[str], where: str
) -> list[str]:
    """Return one warning for each class that is empty, one-sided or rare; the work can go on.

    `labels` int64 [N] (-1: not labelled, or not readable), `split` uint8 [N] and `component` int64 [N] (see
    `splits.join_groups`) are after every split and overlay. Raises DataError, beginning with `where`, below two
    classes with training rows.
    """
    n_train = _count_per_class(labels[split == Split.TRAIN], class_names)
    trainable = [name for name, n in zip(class_names, n_train, strict=True) if n]
    if len(trainable) < 2:
        has = f"only {trainable[0]!r} has any" if trainable else "none has any"
        advice = "add images of another class, or label some with --labels"
        elsewhere = sorted(set(split[labels >= 0].tolist()) - {Split.TRAIN})
        if elsewhere and not trainable:
            names = [Split(code).name.lower() if code else "no split" for code in elsewhere]
            has, advice = f"all labelled ones are in {' and '.join(names)}", "give some the split train"
        raise DataError(f"{where}: fewer than two classes with training images ({has}); {advice}")
    warnings: list[str] = []
    for lines in (
        _one_sided_classes(labels, split, class_names, n_train),
        _rare_classes(labels, split, component, class_names, n_train),
    ):
        warnings += lines[:_MAX_WARNINGS_OF_A_KIND]
        if len(lines) > _MAX_WARNINGS_OF_A_KIND:
            warnings.append(f"... and {len(lines) - _MAX_WARNINGS_OF_A_KIND} more classes like these")
    if n_straddling := count_straddling(split, labels, component):
        warnings.append(f"{n_straddling} groups or sets of equal images lie on both sides of the given split")
    n_unused = int(np.sum((labels >= 0) & (split == Split.NONE)))
    if n_unused:
        warnings.append(f"{n_unused} labelled images are in no split: they are scored, never trained or reported on")
    return warnings


def _count_per_class(labels: Int64Array, class_names: Sequence[str]) -> list[int]:
    counts: list[int] = np.bincount(labels[labels >= 0], minlength=len(class_names)).tolist()
    return counts


def _one_sided_classes(
    labels: Int64Array, split: UInt8Array, class_names: Sequence[str], n_train: list[int]
) -> list[str]:
    reported = divide_roles(split, labels).reported
    split_name = "" if reported is None else reported.name.lower()
    n_all = _count_per_class(labels, class_names)
    n_reported = n_all if reported is None else _count_per_class(labels[split == reported], class_names)
    lines = [] if reported is not None else ["no labelled image is held out: no accuracy can be reported"]
    for name, every, train, report in zip(class_names, n_all, n_train, n_reported, strict=True):
        if not every:
            lines.append(f"class {name!r} has no image")
        elif not train and reported is not None and report:
            lines.append(
                f"class {name!r} has no training image: its {_images(report)} in {split_name} cannot be right, "
                "and each counts as wrong"
            )
        elif not train:
            lines.append(f"class {name!r} has no training image")
        elif not report:
            lines.append(f"class {name!r} has no {split_name} image: its recall is unknown")
    return lines


def _rare_classes(
    labels: Int64Array, split: UInt8Array, component: Int64Array, class_names: Sequence[str], n_train: list[int]
) -> list[str]:
    training = (labels >= 0) & (split == Split.TRAIN)
    pairs = np.unique(np.stack([labels[training], component[training]]), axis=1)
    n_components = _count_per_class(pairs[0], class_names)
    lines = []
    for name, images, components in zip(class_names, n_train, n_components, strict=True):
        if 0 < components < config.N_FOLDS:
            apart = "" if components == images else f" in {components} groups (or sets of copies)"
            held_out = components if components > 1 else "none"
            lines.append(
                f"class {name!r} has {_images(images, 'training ')}{apart}, fewer than {config.N_FOLDS} folds: "
                f"it is held out in {held_out} of them"
            )
    return lines


def _images(count: int, kind: str = "") -> str:
    return f"{count} {kind}image{'' if count == 1 else 's'}"
