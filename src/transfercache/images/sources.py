"""From DATA, in each of its forms, to a manifest without digests: folders, CSV files, named sets, lists of paths."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transfercache.errors import DataError, did_you_mean
from transfercache.images.manifest import Manifest
from transfercache.images.named import NAMED, materialise
from transfercache.images.scan import IMAGE_EXTENSIONS, Scan, folder_id, list_folder
from transfercache.overlay import read_columns
from transfercache.splits import SPLIT_NAMES, Split

_LOG = logging.getLogger(__name__)

#: A folder whose subfolders all have such names was meant as splits, not as classes.
_LIKE_SPLITS = {*SPLIT_NAMES, "valid", "validation", "dev", "training", "testing"}


def read_source(data: str | Path) -> Manifest:
    """Return the manifest of DATA in file order, not yet hashed or split.

    `data` is a folder with train/ and val/ or test/, a folder of class folders, a flat folder (unlabelled), a .csv
    with the columns `path,label[,split][,group]`, or the name of a set (made or downloaded on first use); an existing
    path goes before a name. Raises DataError naming what is missing; DownloadError for a named set.
    """
    text = os.fspath(data)
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        return replace(_read_folder(path), given=text)
    if os.path.isfile(path):
        if path.lower().endswith(".csv"):
            return replace(_read_csv(Path(path)), given=text)
        raise DataError(
            f"{text}: neither a folder nor a .csv; give the folder that it lies in, or a .csv that lists files"
        )
    if text in NAMED:
        return replace(_read_folder(os.fspath(materialise(text))), name=text, given=text)
    raise DataError(
        f"{text}: no such folder or .csv{did_you_mean(text, NAMED)}; give a folder of images, a .csv, "
        f"or one of {', '.join(sorted(NAMED))}"
    )


def read_images(words: Sequence[str]) -> Manifest:
    """Scan one CSV file or name as `read_source` does, and all else as `read_paths`: of a folder every image below."""
    is_data = len(words) == 1 and (words[0] in NAMED or words[0].lower().endswith(".csv"))
    return read_source(words[0]) if is_data and not Path(words[0]).expanduser().is_dir() else read_paths(words)


def read_paths(paths: Sequence[str | Path]) -> Manifest:
    """Return an unlabelled manifest of files and folders in the given order (folders sorted, with all below them).

    A single folder has the name, root and paths that `read_source` gives it, and so the same cache. Otherwise paths
    stay as given, relative to the working folder, which is the root. A file named here is taken whatever its
    extension. Raises DataError for a path that is not there and where there is no image at all.
    """
    names = [os.path.expanduser(os.fspath(path)) for path in paths]
    if len(names) == 1 and os.path.isdir(names[0]):
        root = os.path.abspath(names[0])
        scan = Scan(os.path.basename(root), root)
        scan.add_tree(root, "")
        return _not_empty(scan.to_manifest(), root)
    scan = Scan("images", os.getcwd())
    for name in names:
        if os.path.isdir(name):
            scan.add_tree(name, name.rstrip("/") or "/")
        elif os.path.lexists(name):
            scan.add(name, partial(os.stat, name))
        else:
            raise DataError(f"{name}: no such file or folder; check the path")
    return _not_empty(scan.to_manifest(), ", ".join(names))


def _not_empty(manifest: Manifest, shown: str) -> Manifest:
    if not manifest.n_rows:
        skipped = list(manifest.skipped.values())
        n_skipped = sum(count for _, count in skipped)
        passed = f"; {n_skipped} other files, such as {skipped[0][0]}" if skipped else ""
        raise DataError(
            f"{shown}: no image in it (looked for {' '.join(IMAGE_EXTENSIONS)}{passed}); "
            "give a folder with images, or with one folder of images per class"
        )
    return manifest


def _read_folder(root: str) -> Manifest:
    scan = Scan(os.path.basename(root), root)  # first, as listing may look at files
    folders, files = list_folder(root)
    by_name = {entry.name: entry.path for entry in folders}
    if "train" in by_name and by_name.keys() & {"val", "test"}:
        return _not_empty(_read_splits(root, by_name), root)
    if by_name and by_name.keys() <= _LIKE_SPLITS:
        raise DataError(
            f"{root}: has {', '.join(f'{name}/' for name in by_name)}, but splits are named train/ with val/ or test/ "
            "or both; rename them, or give the one folder that is to be split"
        )
    for name, path in by_name.items():
        scan.add_tree(path, name, label=name, above=frozenset({folder_id(root)}))
    if scan.paths:
        scan.skip_loose(files, "")
    else:
        scan.add_images(files, "")  # flat; folders without any image beside the images are no classes
        by_name = {} if scan.paths else by_name
    return _not_empty(scan.to_manifest(class_names=tuple(by_name)), root)


def _read_splits(root: str, by_name: dict[str, str]) -> Manifest:
    scan = Scan(os.path.basename(root), root)
    class_names: set[str] = set()
    for split_name, split in SPLIT_NAMES.items():
        if split_name not in by_name:
            continue
        classes, files = list_folder(by_name[split_name])
        class_names.update(entry.name for entry in classes)
        above = frozenset({folder_id(root), folder_id(by_name[split_name])})
        for entry in classes:
            scan.add_tree(entry.path, f"{split_name}/{entry.name}", label=entry.name, split=split, above=above)
        if classes:
            scan.skip_loose(files, split_name)
        else:
            scan.add_images(files, split_name, split=split)  # as contests hand out their test images: unlabelled
    ignored = sorted(by_name.keys() - SPLIT_NAMES.keys())
    if ignored:
        _LOG.warning("%s: has train/, so %s beside it is not read", root, ", ".join(f"{name}/" for name in ignored))
    return scan.to_manifest(class_names=tuple(class_names), has_given_split=True)


def _read_csv(csv_path: Path) -> Manifest:
    lines, columns = read_columns(csv_path, required=("path",), optional=("label", "split", "group"))
    root = os.fspath(csv_path.parent)
    paths = columns["path"]
    labels = columns.get("label", [""] * len(paths))
    has_split = any(columns.get("split", ()))
    splits = columns["split"] if has_split else [""] * len(paths)
    _check_unique(csv_path, lines, paths, labels)
    scan = Scan(f"{csv_path.stem}-csv", root)  # apart from a folder of that name, which may lie around it
    for line, path, label, split in zip(lines, paths, labels, splits, strict=True):
        if not path:
            raise DataError(f"{csv_path}: line {line}: its path is empty; name a file there, or remove the line")
        if "\0" in path:  # a torn line: no file has such a name, and no cache may list it
            raise DataError(f"{csv_path}: line {line}: {path!r} holds a zero byte, as no path does; correct it")
        code = _split_code(csv_path, line, split, is_labelled=has_split and bool(label))
        scan.add(path, partial(os.stat, os.path.join(root, path)), label=label, split=code)
    if not paths:
        raise DataError(f"{csv_path}: no row below the header; add one line per image")
    missing = {row for row in scan.unreadable if not os.path.lexists(os.path.join(root, paths[row]))}
    if len(missing) == len(paths):
        raise DataError(
            f"{csv_path}: line {lines[0]}: {paths[0]!r} does not exist, nor does any other file that it lists; "
            f"paths are relative to {root}; correct them"
        )
    for row, reason in scan.unreadable.items():
        why = "does not exist" if row in missing else reason
        scan.unreadable[row] = f"{why} ({csv_path.name}, line {lines[row]})"
    return scan.to_manifest(group=columns.get("group"), has_given_split=has_split)


def _check_unique(csv_path: Path, lines: list[int], paths: list[str], labels: list[str]) -> None:
    first: dict[str, tuple[int, str]] = {}
    for line, path, label in zip(lines, paths, labels, strict=True):
        seen_line, seen_label = first.setdefault(path, (line, label))
        if seen_label != label:
            raise DataError(
                f"{csv_path}: line {seen_line} labels {path!r} {seen_label!r} and line {line} {label!r}; "
                "an image has one label"
            )


def _split_code(csv_path: Path, line: int, split: str, *, is_labelled: bool) -> Split:
    if not split and not is_labelled:
        return Split.NONE
    try:
        return SPLIT_NAMES[split.lower()]
    except KeyError:
        raise DataError(
            f"{csv_path}: line {line}: split {split!r} is none of {', '.join(SPLIT_NAMES)}"
            f"{did_you_mean(split.lower(), SPLIT_NAMES)}; correct it, or leave the whole column out"
        ) from None
