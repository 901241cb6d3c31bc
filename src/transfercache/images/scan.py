"""Rows collected from file listings: which files are images by name, their status, and what was passed over."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from transfercache.errors import DataError
from transfercache.images.manifest import Manifest
from transfercache.splits import Split

#: torchvision.datasets.folder.IMG_EXTENSIONS; what a file really is, its bytes decide.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

#: Some network file systems use all 64 bits of an inode number, and arrays here are signed.
_INODE_MASK = (1 << 63) - 1

#: Device and inode of a folder: the same by whatever link it is reached.
FolderId = tuple[int, int]


def _why_not(name: str) -> str:
    """Return why a file is not taken for an image, by its name alone; empty where it is."""
    if name.startswith("."):
        return "hidden"
    if name.lower().endswith(IMAGE_EXTENSIONS):
        return ""
    return f"not an image by its extension {os.path.splitext(name)[1].lower()}".rstrip()


class Scan:
    """Rows as they are found; `to_manifest` ends it."""

    def __init__(self, name: str, root: str) -> None:
        self._scanned_ns = time.time_ns()
        self.paths: list[str] = []
        self.unreadable: dict[int, str] = {}
        self._name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "data"
        self._root = root
        self._stats: list[tuple[int, int, int, int]] = []
        self._labels: list[str] = []
        self._split: list[Split] = []
        self._skipped: dict[str, tuple[str, int]] = {}

    def add(
        self, path: str, status: Callable[[], os.stat_result], *, label: str = "", split: Split = Split.NONE
    ) -> None:
        """Add a file as a row; `status` gives its (followed) status, an empty label means none.

        A link that leads nowhere, or to something other than a file, is a row too: an unreadable one.
        """
        try:
            found = status()
            if not stat.S_ISREG(found.st_mode):
                self.unreadable[len(self.paths)] = "not a regular file"
            inode = found.st_ino & _INODE_MASK
            self._stats.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns, inode))
        except OSError as error:
            self.unreadable[len(self.paths)] = f"cannot be read ({error.strerror})"
            self._stats.append((0, 0, 0, 0))
        self.paths.append(path)
        self._labels.append(label)
        self._split.append(split)

    def skip_loose(self, files: Sequence[os.DirEntry[str]], shown: str) -> None:
        """Count the files beside class folders: an image there is of no class."""
        for entry in files:
            self._skip(_join(shown, entry.name), _why_not(entry.name) or "beside the class folders")

    def _skip(self, path: str, reason: str) -> None:
        first, count = self._skipped.get(reason, (path, 0))
        self._skipped[reason] = (first, count + 1)

    def add_tree(
        self,
        folder: str,
        shown: str,
        *,
        label: str = "",
        split: Split = Split.NONE,
        above: frozenset[FolderId] = frozenset(),
    ) -> None:
        """Add the images of `folder` and all below it, in the order of torchvision's ImageFolder.

        That order is by folder path as text, then by file name. `shown` is the folder's path within the data. Links
        are followed, but for those to a folder that they lie in; `above` holds such folders above `folder`.
        """
        tree: dict[str, list[os.DirEntry[str]]] = {}
        _list_tree(folder, shown, above, tree)
        for within in sorted(tree):
            self.add_images(tree[within], within, label=label, split=split)

    def add_images(
        self, files: Sequence[os.DirEntry[str]], shown: str, *, label: str = "", split: Split = Split.NONE
    ) -> None:
        """Add those of `files` that are images by name; the others, and hidden files, are skipped."""
        for entry in files:
            path = _join(shown, entry.name)
            if reason := _why_not(entry.name):
                self._skip(path, reason)
            else:
                self.add(path, entry.stat, label=label, split=split)

    def to_manifest(
        self, *, class_names: Sequence[str] = (), group: Sequence[str] | None = None, has_given_split: bool = False
    ) -> Manifest:
        """Return the rows; classes are the sorted union of `class_names` and the rows' labels."""
        names = tuple(sorted({*class_names, *self._labels} - {""}))
        label_codes = {"": -1, **{name: code for code, name in enumerate(names)}}
        group_codes = {"": -1}
        for value in group or ():
            group_codes.setdefault(value, len(group_codes) - 1)
        n_rows = len(self.paths)
        return Manifest(
            name=self._name,
            root=Path(self._root),
            paths=tuple(self.paths),
            labels=np.array([label_codes[label] for label in self._labels], dtype=np.int64),
            split=np.array(self._split, dtype=np.uint8),
            class_names=names,
            stat=np.array(self._stats, dtype=np.int64).reshape(n_rows, 4),
            group=np.array([group_codes[value] for value in group or [""] * n_rows], dtype=np.int64),
            digests=np.zeros((n_rows, 32), dtype=np.uint8),
            unreadable=self.unreadable,
            has_given_split=has_given_split,
            skipped=self._skipped,
            scanned_ns=self._scanned_ns,
        )


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def list_folder(folder: str) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Return the folders (hidden ones left out) and the files in `folder`, each sorted by name; links are followed."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable or move it away") from error
    folders, files = [], []
    for entry in entries:
        if not _is_folder(entry):
            files.append(entry)
        elif not entry.name.startswith("."):
            folders.append(entry)
    return folders, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def folder_id(folder: str) -> FolderId:
    """Return what tells whether two paths lead to one folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _list_tree(folder: str, shown: str, above: frozenset[FolderId], tree: dict[str, list[os.DirEntry[str]]]) -> None:
    """Fill `tree` with the files by shown folder."""
    folders, files = list_folder(folder)
    here = folder_id(folder)
    if here in above:
        return
    tree[shown] = files
    for entry in folders:
        _list_tree(entry.path, _join(shown, entry.name), above | {here}, tree)
