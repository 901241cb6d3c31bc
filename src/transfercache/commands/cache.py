"""`tlc cache`: list, describe, verify, prune and remove cache folders. Torch-free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.contents import Contents, Summary, cache_folders, read_contents
from transfercache.cache.rows import OK
from transfercache.cache.upkeep import Freed, days_since_change, is_removable, prune, remove
from transfercache.cache.verify import Verification, verify_folder
from transfercache.commands.inputs import BadImage, cache_root, changed_words
from transfercache.errors import CacheError, DamageError, LockedError, ResourceError
from transfercache.plain import plain
from transfercache.report.caches import render_info, render_rows, show_bytes
from transfercache.splits import SPLIT_NAMES

if TYPE_CHECKING:
    from rich.text import Text

logger = logging.getLogger(__name__)

Caches = str | Path | Sequence[str | Path]
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class CacheResult(Generic[Value]):
    """What a command found or did: `value`, and the same in plain JSON and for a terminal."""

    value: Value
    document: Any
    render: Callable[[], Text]
    next_command: tuple[str, ...]  # the words of the command a person would run next
    question: str = ""  # what a person is asked before it is done; empty where there is nothing to do
    bad: tuple[BadImage, ...] = ()  # no image is read

    def to_json(self) -> Any:
        """Return the JSON document of the command."""
        return self.document


def list_caches(*, cache_dir: Path | str | None = None) -> CacheResult[tuple[Summary, ...]]:
    """List the caches under `cache_dir`, with what they take; one that cannot be trusted says why in `problem`."""
    root = cache_root(cache_dir)
    found = tuple(read_contents(folder).summary() for folder in cache_folders(root))
    n_bytes, n_unused = sum(item.bytes for item in found), sum(item.unused for item in found)
    lines = [{**plain(item), "cache": item.cache.name, "data_name": None} for item in found]
    last = f"{len(found)} caches under {root}: {show_bytes(n_bytes)} in all, {show_bytes(n_unused)} unused"
    words = ("tlc", "cache", "info", str(found[0].cache)) if found else ("tlc", "demo")
    return CacheResult(
        value=found,
        document=plain(found),
        render=lambda: render_rows(lines, last=last),
        next_command=("tlc", "cache", "prune", *_root_words(cache_dir)) if n_unused else words,
    )


def cache_info(cache: str | Path, *, cache_dir: Path | str | None = None) -> CacheResult[Contents]:
    """Describe a cache, a folder or the name of one under `cache_dir`: its spec, classes, shards, bytes and runs.

    Raises CacheError where its catalogue is not to be trusted.
    """
    folder = _folder(cache, cache_root(cache_dir))
    read_catalogue(folder)  # says what is wrong with it
    contents = read_contents(folder)
    document = _describe(contents)
    return CacheResult(
        value=contents,
        document=document,
        render=lambda: render_info(document),
        next_command=("tlc", "cache", "prune" if contents.unused else "verify", str(folder)),
    )


def verify_cache(
    caches: Caches | None = None, *, cache_dir: Path | str | None = None
) -> CacheResult[tuple[Verification, ...]]:
    """Prove every byte of every file of these caches (None: of all under `cache_dir`); see cache/verify.py.

    Raises DamageError, a CacheError, where anything is wrong, after all of it has been logged.
    """
    root = cache_root(cache_dir)
    found = tuple(verify_folder(folder) for folder in _folders(caches, root))
    document = plain(found)
    for problem in (line for item in found for line in item.problems):
        logger.error("%s", problem)
    torn = [item.cache for item in found if item.problems]
    if torn:
        n_problems = sum(len(item.problems) for item in found)
        removable = next(filter(is_removable, torn), None)
        anew = f", or remove it with tlc cache remove {removable}, and make it anew with tlc extract-features"
        raise DamageError(
            f"{n_problems} problems in {len(torn)} of {len(found)} caches; mend such a one as its lines say"
            f"{anew if removable else ''}",
            document=document,
        )
    return CacheResult(
        value=found,
        document=document,
        render=lambda: render_rows(document, last=f"every byte of {len(found)} caches is proved"),
        next_command=("tlc", "cache", "list", *_root_words(cache_dir)),
    )


def prune_caches(
    caches: Caches | None = None,
    *,
    cache_dir: Path | str | None = None,
    older_than: float | None = None,
    dry_run: bool = False,
) -> CacheResult[tuple[Freed, ...]]:
    """Free what no row needs in these caches (None: in all under `cache_dir`); see `prune` in cache/upkeep.py.

    A cache whose catalogue is older than `older_than` days is removed whole. One that is being written is passed over,
    and so is one that cannot be trusted or written, unless it was named: then CacheError or ResourceError is raised.
    With `dry_run` nothing is changed.
    """

    def freed(folder: Path) -> Freed:
        is_old = older_than is not None and days_since_change(folder) > older_than
        try:
            return (remove if is_old else prune)(folder, dry_run=dry_run)
        except (CacheError, ResourceError) as error:
            if caches is not None and not isinstance(error, LockedError):
                raise
            return Freed(folder, passed_over=str(error))

    found = tuple(map(freed, _folders(caches, cache_root(cache_dir))))
    words = ["prune", *map(str, _several(caches)), *changed_words(older_than=(older_than, None))]
    return _freed(found, words, cache_dir=cache_dir, dry_run=dry_run)


def remove_caches(
    caches: Caches, *, cache_dir: Path | str | None = None, dry_run: bool = False
) -> CacheResult[tuple[Freed, ...]]:
    """Remove these caches, torn ones too; files that are not tlc's stay, with their folder.

    Raises CacheError where one is no cache folder, LockedError where one is being written, before any is removed. With
    `dry_run` nothing is changed.
    """
    folders = _folders(caches, cache_root(cache_dir))
    found = tuple(remove(folder, dry_run=True) for folder in folders)
    if not dry_run:
        found = tuple(remove(folder, dry_run=False) for folder in folders)
    return _freed(found, ["remove", *map(str, _several(caches))], cache_dir=cache_dir, dry_run=dry_run)


def _freed(
    found: tuple[Freed, ...], words: Sequence[str], *, cache_dir: Path | str | None, dry_run: bool
) -> CacheResult[tuple[Freed, ...]]:
    size = show_bytes(sum(item.bytes for item in found))
    n_caches = sum(item.bytes > 0 or item.removed for item in found)
    whole = [str(item.cache) for item in found if item.removed]
    removing = f", removing {', '.join(whole)}" if whole else ""
    next_words = [*words, *_root_words(cache_dir), "--yes"] if dry_run else ["list", *_root_words(cache_dir)]
    document = plain(found)
    return CacheResult(
        value=found,
        document=document,
        render=lambda: render_rows(document, last=f"{size} {'would be ' if dry_run else ''}freed"),
        next_command=("tlc", "cache", *next_words),
        question=f"free {size} in {n_caches} caches{removing}?" if n_caches else "",
    )


def _root_words(cache_dir: Path | str | None) -> tuple[str, ...]:
    return changed_words(cache_dir=(cache_dir, None))


def _several(caches: Caches | None) -> Sequence[str | Path]:
    return [caches] if isinstance(caches, (str, Path)) else caches or []


def _folders(caches: Caches | None, root: Path) -> list[Path]:
    """Return the folders that are named, none of them for an empty list; None stands for all there are."""
    if caches is None:
        return cache_folders(root)
    return list(dict.fromkeys(_folder(word, root) for word in _several(caches)))


def _folder(cache: str | Path, root: Path) -> Path:
    path = Path(cache)
    return root / path if not path.exists() and (root / path).is_dir() else path


def _describe(contents: Contents) -> dict[str, Any]:
    catalogue = contents.catalogue
    if catalogue is None:
        raise CacheError(contents.problem)
    shards = [
        {
            **{name: getattr(entry, name) for name in ("file", "n_rows", "batch_size", "finished")},
            "used": contents.n_used(entry),
            "bytes": contents.size_of([entry.file]),
        }
        for entry in catalogue.shards
    ]
    return {
        **plain(contents.summary()),
        "has_given_split": catalogue.has_given_split,
        "spec": catalogue.spec.to_json(),
        "dim": catalogue.dim,
        "leftovers": contents.leftovers,
        "foreign": contents.foreign,
        "classes": _classes(contents),
        "shards": shards,
        "provenance": [run.to_json() for run in catalogue.provenance],
    }


def _classes(contents: Contents) -> list[dict[str, Any]]:
    """Return the good images of each class by split; those without a label, if any, come last, under None."""
    catalogue, rows = contents.catalogue, contents.rows
    if catalogue is None or rows is None:
        return []
    good = (rows.view == 0) & (rows.status == OK)
    counts = {
        name: np.bincount(rows.label[good & (rows.split == code)] + 1, minlength=len(catalogue.class_names) + 1)
        for name, code in {**SPLIT_NAMES, "none": 0}.items()
    }
    names = [*enumerate(catalogue.class_names), *([(-1, None)] if (rows.label[good] < 0).any() else [])]
    return [{"class": name, **{split: int(n[label + 1]) for split, n in counts.items()}} for label, name in names]
