"""What a cache could do without, what pruning and removing leave, and a kill before each of their changes."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache import upkeep as upkeep_module
from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.contents import Summary, cache_folders, read_contents
from transfercache.cache.reader import open_cache
from transfercache.cache.rows import Rows
from transfercache.cache.store import Store
from transfercache.cache.upkeep import Freed, days_since_change, prune, remove
from transfercache.cache.verify import verify_folder
from transfercache.errors import CacheError, LockedError, ResourceError

from ..killing import run_and_kill

CLASS_NAMES = ("ant", "bee")
ROW_BYTES = 6 * 4 + 41  # features; digest, view and checksum
NAME = "insects-resnet18-pooled-0123abcd"


# Forking with threads about is safe here: the child runs no code but ours, and ends by _exit.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def _kept(rows: Rows, index: np.ndarray) -> Rows:
    """The rows at `index`, as data has them from which the others were deleted."""
    values = {field.name: getattr(rows, field.name) for field in fields(Rows)}
    return Rows(**{k: tuple(v[i] for i in index) if isinstance(v, tuple) else v[index] for k, v in values.items()})


def _publish(folder: Path, rows: Rows) -> None:
    store = Store(folder)
    with store.writing():
        store.publish(rows, class_names=CLASS_NAMES, run=None, has_given_split=True)


def _add_shard(folder: Path, extraction: Any, *, view: int, batch_size: int = 4, slots: slice = slice(None)) -> int:
    """Add a finished shard that holds the images again, as another view."""
    store = Store(folder)
    digests = extraction.digests[slots]
    with store.writing():
        number = store.begin_shard(digests, np.full(len(digests), view, np.uint8), batch_size=batch_size)
        with store.writer(number) as writer:
            writer.write(np.arange(len(digests)), extraction.features[slots] * (view + 1))
        store.finish_shard(number)
    return number


def _with_views(rows: Rows, shards: list[int]) -> Rows:
    """The same rows, view v of each in slot i of shard v."""
    n_views, n = len(shards), len(rows)
    both = _kept(rows, np.repeat(np.arange(n), n_views))
    view, shard = np.tile(np.arange(n_views, dtype=np.uint8), n), np.tile(np.array(shards, np.int32), n)
    return replace(both, view=view, shard=shard)


def _half_used(cache_dir: Path, extraction: Any) -> Path:
    """A cache that was made of all images, and whose data has every second of them now."""
    folder = extraction.run(cache_dir)
    _publish(folder, _kept(extraction.rows(), np.arange(0, extraction.n_images, 2)))
    return folder


def _state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir() if p.is_file()}


def _shard_and_temporary_bytes(folder: Path) -> int:
    """What all files take but the catalogue, whose own length follows the number of shards."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "catalogue.json")


@contextmanager
def _locked_elsewhere(folder: Path) -> Iterator[None]:
    code = (
        "import sys; from pathlib import Path; from transfercache.files import locked\n"
        "with locked(Path(sys.argv[1]) / '.lock', what=''):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        yield
        other.kill()


# --- what it could do without


def test_contents__of_a_cache_that_uses_all(finished: Path) -> None:
    contents = read_contents(finished)
    assert contents.bytes == sum(path.stat().st_size for path in finished.iterdir())
    assert (contents.unused, contents.leftovers, contents.foreign, contents.problem) == (0, (), (), "")
    assert contents.summary() == Summary(
        cache=finished,
        images=10,
        views=1,
        bad=0,
        bytes=contents.bytes,
        unused=0,
        finished=True,
        last_run="2026-01-02T03:04:05+00:00",
        backbone="resnet18",
        boundary="pooled",
        data_name="insects",
        data_root="/data/insects",
        problem=None,
    )


def test_contents__unused_slots_shards_and_leftovers(tmp_path: Path, make_extraction: Any) -> None:
    extraction = make_extraction(n_images=20)
    folder = _half_used(tmp_path, extraction)
    assert read_contents(folder).unused == 10 * ROW_BYTES
    number = _add_shard(folder, extraction, view=1)
    idle_bytes = (folder / f"shard-{number:05d}.h5").stat().st_size
    (folder / ".rows-01234567.safetensors.77.tmp").write_bytes(b"abc")
    (folder / "notes.txt").write_bytes(b"not counted")
    contents = read_contents(folder)
    assert [entry.number for entry in contents.idle] == [1]
    assert contents.leftovers == (".rows-01234567.safetensors.77.tmp",)
    assert contents.foreign == ("notes.txt",)
    assert contents.unused == 10 * ROW_BYTES + idle_bytes + 3
    assert contents.bytes == sum(p.stat().st_size for p in folder.iterdir() if p.name != "notes.txt")


def test_contents__bad_images_views_and_equal_content(tmp_path: Path, make_extraction: Any) -> None:
    extraction = make_extraction(bad=3)
    folder = extraction.run(tmp_path)
    assert read_contents(folder).unused == ROW_BYTES  # the slot that was planned for the bad image
    good = np.array([0, 0, 1, 2, 4, 5, 6, 7, 8, 9])
    number = _add_shard(folder, extraction, view=1)
    rows = _with_views(_kept(extraction.rows(), good), [0, number])
    _publish(folder, rows)
    summary = read_contents(folder).summary()
    assert (summary.images, summary.views, summary.bad) == (10, 2, 0)
    assert summary.unused == 2 * ROW_BYTES  # slot 3 of both shards; slot 0 serves two images


def test_contents__of_what_cannot_be_trusted(finished: Path, tamper: Callable[[Path, int], None]) -> None:
    (rows,) = finished.glob("rows-*")
    tamper(rows, 300)
    summary = read_contents(finished).summary()
    assert (summary.images, summary.unused, summary.finished, summary.backbone) == (None, 0, True, "resnet18")
    assert str(summary.problem).startswith(f"{rows}: fails its checksum")
    tamper(finished / "catalogue.json", 300)
    summary = read_contents(finished).summary()
    assert (summary.images, summary.finished, summary.backbone, summary.last_run) == (None, None, None, None)
    assert str(summary.problem).startswith(f"{finished}/catalogue.json: fails its checksum")
    assert summary.bytes == sum(path.stat().st_size for path in finished.iterdir())


def test_contents__of_a_first_extraction_that_has_not_ended(tmp_path: Path, extraction: Any) -> None:
    steps = extraction.steps(tmp_path)
    while next(steps) != "finished":
        pass
    steps.close()
    (folder,) = tmp_path.iterdir()
    summary = read_contents(folder).summary()
    assert (summary.images, summary.unused, summary.finished, summary.problem) == (None, 0, False, None)


def test_contents__reads_no_features(tmp_path: Path, make_extraction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _half_used(tmp_path, make_extraction(n_images=20))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished shard was opened")

    monkeypatch.setattr("transfercache.cache.contents.ShardReader", refuse)
    assert read_contents(folder).unused == 10 * ROW_BYTES


def test_cache_folders__catalogue_or_tag(tmp_path: Path, extraction: Any) -> None:
    assert cache_folders(tmp_path / "absent") == []
    finished = extraction.run(tmp_path / "cache")
    torn, elsewhere = finished.with_name("a-torn"), tmp_path / "elsewhere"
    torn.mkdir()
    shutil.copy(finished / "CACHEDIR.TAG", torn)
    (finished.parent / "results").mkdir()
    (finished.parent / "file").touch()
    other_tag = finished.parent / "other"
    other_tag.mkdir()
    (other_tag / "CACHEDIR.TAG").write_bytes(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    shutil.copytree(finished, elsewhere)
    (finished.parent / "z-link").symlink_to(elsewhere)
    assert [folder.name for folder in cache_folders(finished.parent)] == ["a-torn", finished.name, "z-link"]


def test_cache_folders__that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ResourceError, match=rf"{tmp_path}: cannot be listed \(Permission denied\); look at its path"):
        cache_folders(tmp_path)


def test_days_since_change__of_the_catalogue(finished: Path) -> None:
    now = (finished / "catalogue.json").stat().st_mtime
    os.utime(finished / "catalogue.json", (now, now - 3 * 86_400))
    assert 3 <= days_since_change(finished) < 3.1
    (finished / "catalogue.json").unlink()
    assert days_since_change(finished) == 0


# --- prune


@pytest.mark.parametrize(
    ("n_images", "dtype"), [(60, "float32"), (201, "float32"), (2500, "float32"), (202, "float16")]
)
def test_prune__half_of_the_rows(tmp_path: Path, make_extraction: Any, n_images: int, dtype: str) -> None:
    extraction = make_extraction(n_images=n_images)
    extraction.spec = replace(extraction.spec, storage_dtype=dtype)
    folder = _half_used(tmp_path, extraction)
    (folder / "shard-00009.h5").write_bytes(b"a leftover")
    served, before, catalogue = open_cache(folder).table(), _state(folder), read_catalogue(folder)
    n_bytes = _shard_and_temporary_bytes(folder)

    planned = prune(folder, dry_run=True)
    assert {name: state for name, state in _state(folder).items() if name != ".lock"} == {
        name: state for name, state in before.items() if name != ".lock"
    }
    done = prune(folder, dry_run=False)
    assert done == planned
    assert done.bytes == n_bytes - _shard_and_temporary_bytes(folder) > 10

    table, now = open_cache(folder).table(), read_catalogue(folder)
    assert table.features.tobytes() == served.features.tobytes()
    assert table.paths == served.paths
    assert table.labels.tolist() == served.labels.tolist()
    assert (now.provenance, now.class_names, now.has_given_split) == (catalogue.provenance, CLASS_NAMES, True)
    (entry,) = now.shards
    assert (entry.file, entry.n_rows, entry.batch_size) == ("shard-00001.h5", (n_images + 1) // 2, 4)
    assert (folder / entry.file).stat().st_mode & 0o777 == 0o444
    assert {path.name for path in folder.glob("shard-*")} == {entry.file}
    assert verify_folder(folder).problems == ()
    assert read_contents(folder).unused == 0
    assert prune(folder, dry_run=False) == Freed(folder, 0)


def test_prune__shards_of_one_grid_become_one_and_full_ones_stay(tmp_path: Path, make_extraction: Any) -> None:
    extraction = make_extraction(n_images=600)
    folder = extraction.run(tmp_path)
    third = slice(0, None, 3)
    _add_shard(folder, extraction, view=1, batch_size=8)
    _add_shard(folder, extraction, view=2, batch_size=4)
    _add_shard(folder, extraction, view=3, batch_size=4, slots=third)
    rows = _with_views(_kept(extraction.rows(), np.arange(600)[third]), [0, 1, 2, 3])
    _publish(folder, replace(rows, slot=np.where(rows.view == 3, rows.slot // 3, rows.slot)))
    served, full = open_cache(folder).table(), _state(folder)["shard-00003.h5"]
    planned = prune(folder, dry_run=True)
    n_bytes = _shard_and_temporary_bytes(folder)
    assert prune(folder, dry_run=False) == planned
    assert planned.bytes == n_bytes - _shard_and_temporary_bytes(folder)
    shards = [(entry.file, entry.n_rows, entry.batch_size) for entry in read_catalogue(folder).shards]
    assert shards == [("shard-00003.h5", 200, 4), ("shard-00004.h5", 400, 4), ("shard-00005.h5", 200, 8)]
    assert _state(folder)["shard-00003.h5"] == full
    assert open_cache(folder).table().features.tobytes() == served.features.tobytes()
    assert verify_folder(folder).problems == ()


def test_prune__a_shard_that_no_row_needs(finished: Path, extraction: Any) -> None:
    _add_shard(finished, extraction, view=1)
    size = (finished / "shard-00001.h5").stat().st_size
    before = _state(finished)
    assert prune(finished, dry_run=True) == prune(finished, dry_run=False) == Freed(finished, size)
    assert [entry.number for entry in read_catalogue(finished).shards] == [0]
    after = _state(finished)
    assert set(before) - set(after) == {"shard-00001.h5"}
    assert after["shard-00000.h5"] == before["shard-00000.h5"]


def test_prune__where_a_smaller_file_is_not_to_be_had(tmp_path: Path, make_extraction: Any) -> None:
    extraction = make_extraction(bad=3)
    folder = extraction.run(tmp_path)
    before = _state(folder)
    assert read_contents(folder).unused == ROW_BYTES
    assert prune(folder, dry_run=True) == prune(folder, dry_run=False) == Freed(folder, 0)
    after = _state(folder)
    del before[".lock"], after[".lock"]
    assert after == before


@pytest.mark.parametrize("is_first", [True, False])
def test_prune__what_an_interrupted_extraction_has_computed_stays(
    tmp_path: Path, extraction: Any, make_extraction: Any, is_first: bool
) -> None:
    folder = extraction.store(tmp_path).folder if is_first else extraction.run(tmp_path)
    more = make_extraction(n_images=14)
    store = Store(folder)
    with store.writing():
        number = store.begin_shard(more.digests[10:], np.zeros(4, np.uint8), batch_size=4)
        with store.writer(number) as writer:
            writer.write(np.array([1, 2]), more.features[11:13])
    (folder / ".x.1.tmp").write_bytes(b"12345")
    assert prune(folder, dry_run=True) == prune(folder, dry_run=False) == Freed(folder, 5)
    slots = Store(folder).slots()
    assert np.flatnonzero(slots.valid[slots.shard == number]).tolist() == [1, 2]


def test_prune__what_an_interrupted_prune_has_copied_goes(finished: Path, extraction: Any) -> None:
    store = Store(finished)
    with store.writing():
        store.begin_shard(extraction.digests[3:9], np.zeros(6, np.uint8), batch_size=4)
    size = (finished / "shard-00001.h5").stat().st_size
    assert read_contents(finished).unused == size
    assert prune(finished, dry_run=True) == prune(finished, dry_run=False) == Freed(finished, size)
    assert verify_folder(finished).problems == ()


def test_prune__a_row_that_fails_its_checksum__changes_nothing(
    tmp_path: Path, make_extraction: Any, tamper: Callable[[Path, int], None]
) -> None:
    folder = _half_used(tmp_path, make_extraction(n_images=40))
    (entry,) = read_catalogue(folder).shards
    tamper(folder / entry.file, entry.features.offset + 6 * 24)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CacheError, match=rf"{entry.file}: row 6 fails its checksum; mend it with: tlc"):
        prune(folder, dry_run=False)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert read_catalogue(folder).shards == (entry,)


def test_prune__rows_that_lie_are_not_made_true(tmp_path: Path, make_extraction: Any, rewrite_catalogue: Any) -> None:
    extraction = make_extraction(n_images=40)
    folder = _half_used(tmp_path, extraction)
    lying = replace(_kept(extraction.rows(), np.arange(0, 40, 2)), digest=extraction.digests[1::2])
    (published,) = folder.glob("rows-*")
    published.write_bytes(lying.to_bytes())
    digest = subprocess.run(["sha256sum", str(published)], capture_output=True, text=True, check=True).stdout[:64]
    published.rename(folder / f"rows-{digest[:8]}.safetensors")
    rewrite_catalogue(folder, lambda c: c["rows"].update(file=f"rows-{digest[:8]}.safetensors", sha256=digest))
    with pytest.raises(CacheError, match=r"shard-00000\.h5: does not hold the features of its rows; mend it with: tlc"):
        prune(folder, dry_run=False)
    assert [path.name for path in folder.glob("shard-*")] == ["shard-00000.h5"]


def test_prune__a_full_disk__changes_nothing(
    tmp_path: Path, make_extraction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _half_used(tmp_path, make_extraction(n_images=40))
    before = _state(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ResourceError, match=r"shard-00001\.h5: the disk is full"):
        prune(folder, dry_run=False)
    after = _state(folder)
    del before[".lock"], after[".lock"]
    assert after == before


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("command", [prune, remove])
def test_prune_and_remove__a_cache_that_is_being_written(finished: Path, command: Any, dry_run: bool) -> None:
    with _locked_elsewhere(finished), pytest.raises(LockedError, match="another process is writing to it; wait"):
        command(finished, dry_run=dry_run)
    assert verify_folder(finished).problems == ()


@pytest.mark.parametrize("command", [prune, remove])
def test_prune_and_remove__a_lock_that_is_a_link(finished: Path, tmp_path: Path, command: Any) -> None:
    (tmp_path / "precious").write_text("kept")
    (finished / ".lock").unlink()
    (finished / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(CacheError, match=r"\.lock: is a link; remove it and run this again"):
        command(finished, dry_run=False)
    assert (tmp_path / "precious").read_text() == "kept"


def test_prune__torn(finished: Path, tamper: Callable[[Path, int], None]) -> None:
    (rows,) = finished.glob("rows-*")
    tamper(rows, 300)
    with pytest.raises(CacheError, match=f"{rows.name}: fails its checksum"):
        prune(finished, dry_run=False)


def test_drop_shards__one_that_a_row_lies_in(finished: Path) -> None:
    store = Store(finished)
    with store.writing(), pytest.raises(ValueError, match=r"a row lies in one of the shards \[0\]"):
        store.drop_shards({0})
    with pytest.raises(RuntimeError, match="only inside"):
        store.drop_shards({1})


# --- remove


def test_remove__all_of_it(finished: Path) -> None:
    (finished / "shard-00007.h5").write_bytes(b"leftover")
    before, n_bytes = _state(finished), sum(path.stat().st_size for path in finished.iterdir())
    expected = Freed(finished, n_bytes, removed=True)
    assert remove(finished, dry_run=True) == expected
    assert set(_state(finished)) == set(before)
    assert remove(finished, dry_run=False) == expected
    assert not finished.exists()


def test_remove__what_is_not_its_own_stays(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.h5").write_text("kept")
    (finished / "shard-00008.h5").symlink_to(tmp_path / "precious.h5")
    (finished / "shard-00009.h5").mkdir()
    (finished / "notes.txt").write_text("mine")
    done = remove(finished, dry_run=False)
    assert (done.removed, done.kept) == (True, ("notes.txt", "shard-00009.h5"))
    assert sorted(path.name for path in finished.iterdir()) == ["notes.txt", "shard-00009.h5"]
    assert (tmp_path / "precious.h5").read_text() == "kept"


@pytest.mark.parametrize(
    "left",
    [
        {"catalogue.json": b"torn", "CACHEDIR.TAG": None},
        {"catalogue.json": b'{"checksum":"torn'},
        {"CACHEDIR.TAG": None, "shard-00000.h5": b""},
        {".lock": b""},
        {},
    ],
)
def test_remove__a_torn_one(tmp_path: Path, finished: Path, left: dict[str, bytes | None]) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    for name, data in left.items():
        (folder / name).write_bytes((finished / name).read_bytes() if data is None else data)
    assert remove(folder, dry_run=False).removed
    assert not folder.exists()


def _foreign(folder: Path, finished: Path) -> None:
    folder.mkdir()
    (folder / "catalogue.json").write_text('{"stac_version": "1.0.0"}')


def _empty(folder: Path, finished: Path) -> None:
    folder.mkdir()


def _file(folder: Path, finished: Path) -> None:
    folder.touch()


def _link(folder: Path, finished: Path) -> None:
    folder.symlink_to(finished)


def _linked_files(folder: Path, finished: Path) -> None:
    folder.mkdir()
    for name in ("catalogue.json", "CACHEDIR.TAG"):
        (folder / name).symlink_to(finished / name)


@pytest.mark.parametrize("make", [_foreign, _empty, _file, _link, _linked_files])
def test_remove__what_is_no_cache_folder(tmp_path: Path, finished: Path, make: Callable[[Path, Path], None]) -> None:
    folder = tmp_path / "photos"
    make(folder, finished)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match=rf"^{folder}: not a cache folder, or a link to one, so nothing in it is rem"):
        remove(folder, dry_run=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_remove__a_disk_that_is_read_only(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(ResourceError, match=rf"{finished}: cannot be written \(Read-only file system\)"):
        remove(finished, dry_run=False)


# --- killed


def _is_served(folder: Path) -> bool:
    try:
        open_cache(folder)
    except CacheError as error:
        if re.search(r"cannot be opened \(No such file|not a cache folder", str(error)):
            return False
        raise
    return True


@pytest.mark.parametrize("is_torn", [False, True])
def test_prune__killed_before_every_change(
    tmp_path: Path, make_extraction: Any, monkeypatch: pytest.MonkeyPatch, is_torn: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    extraction = make_extraction(n_images=80)
    made = _half_used(tmp_path / "made", extraction)
    _add_shard(made, extraction, view=1)
    (made / "shard-00009.h5").write_bytes(b"leftover")
    expected = open_cache(made).table().features
    n_shards = []
    for before_call in itertools.count():
        folder = tmp_path / str(before_call) / made.name
        shutil.copytree(made, folder)
        was_killed = run_and_kill(
            functools.partial(prune, folder, dry_run=False), before_call=before_call, is_torn=is_torn
        )
        assert verify_folder(folder).problems == ()
        np.testing.assert_array_equal(open_cache(folder).table().features, expected)
        n_shards.append(len(read_catalogue(folder).shards))
        planned, n_bytes = prune(folder, dry_run=True), _shard_and_temporary_bytes(folder)
        assert prune(folder, dry_run=False) == planned
        assert planned.bytes == n_bytes - _shard_and_temporary_bytes(folder)
        np.testing.assert_array_equal(open_cache(folder).table().features, expected)
        contents = read_contents(folder)
        assert (contents.unused, len(contents.catalogue.shards)) == (0, 1)
        if not was_killed:
            break
    # The two shards, the new one beside them, and then that alone.
    assert [n for n, _ in itertools.groupby(n_shards)] == [2, 3, 1]
    assert len(n_shards) > 25


def test_remove__killed_before_every_change(tmp_path: Path, make_extraction: Any) -> None:
    made = make_extraction().run(tmp_path / "made")
    (made / "shard-00009.h5").write_bytes(b"leftover")
    is_served = []
    for before_call in itertools.count():
        folder = tmp_path / str(before_call) / made.name
        shutil.copytree(made, folder)
        was_killed = run_and_kill(functools.partial(remove, folder, dry_run=False), before_call=before_call)
        if not was_killed:
            assert not folder.exists()
            break
        is_served.append(_is_served(folder))
        remove(folder, dry_run=False)
        assert not folder.exists()
    # Valid until the rows are gone; from there no reader takes it for a cache.
    assert [served for served, _ in itertools.groupby(is_served)] == [True, False]
    assert is_served.count(False) == 7  # before two shards, catalogue, two labels, lock and folder


def test_planned_size__is_that_of_the_shard(finished: Path) -> None:
    catalogue = read_catalogue(finished)
    (entry,) = catalogue.shards
    assert upkeep_module._shard_bytes(10, catalogue) == (finished / entry.file).stat().st_size
