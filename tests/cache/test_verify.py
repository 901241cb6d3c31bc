from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from transfercache.cache import verify as verify_module
from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.contents import Contents
from transfercache.cache.store import Store
from transfercache.cache.verify import Verification, verify_folder
from transfercache.files import sha256_bytes

Rewrite = Callable[[Path, Callable[[dict[str, Any]], Any]], None]
AGAIN = "; remove the folder and make it anew with: tlc extract-features DATA"
MEND = "; mend it with: tlc extract-features DATA --verify-content"
N_FLIPS = 40


def _problems(folder: Path) -> list[str]:
    """The problems of a folder, its path taken out."""
    return [problem.replace(f"{folder}/", "") for problem in verify_folder(folder).problems]


def _bytes_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_verify__every_file_and_row_is_counted(finished: Path) -> None:
    before = _bytes_of(finished)
    assert verify_folder(finished) == Verification(
        cache=finished,
        files=6,  # catalogue, rows, shard, lock and the two labels
        bytes=sum(len(data) for data, _ in before.values()),
        rows=10,
        torn=0,
        leftovers=(),
        foreign=(),
        problems=(),
    )
    assert _bytes_of(finished) == before


def _parts(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """Path, first and last byte of what a bit is flipped in."""
    (entry,) = read_catalogue(folder).shards
    (rows,) = folder.glob("rows-*")
    whole = {"rows": rows, "catalogue": folder / "catalogue.json"}
    first = min(extent.offset for extent in entry.extents())
    within = {"header": (0, first)} | {
        name: (extent.offset, extent.offset + extent.length)
        for name, extent in (("features", entry.features), ("checksums", entry.checksums))
    }
    shard = folder / entry.file
    return {name: (path, 0, path.stat().st_size) for name, path in whole.items()} | {
        name: (shard, start, stop) for name, (start, stop) in within.items()
    }


@pytest.mark.parametrize("part", ["header", "checksums", "features", "rows", "catalogue"])
def test_verify__a_flipped_bit(finished: Path, part: str) -> None:
    path, start, stop = _parts(finished)[part]
    original = path.read_bytes()
    path.chmod(0o644)
    rng = np.random.default_rng([len(part), stop])
    for bit in rng.choice(8 * (stop - start), N_FLIPS, replace=False).tolist():
        flipped = bytearray(original)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        problems = _problems(finished)
        assert problems
        assert problems[0].startswith(f"{path.name}: "), bit
        assert all(problem.endswith((AGAIN, MEND)) for problem in problems)
    path.write_bytes(original)
    assert _problems(finished) == []


def test_verify__names_the_row_beside_the_file(finished: Path, tamper: Callable[[Path, int], None]) -> None:
    (entry,) = read_catalogue(finished).shards
    for row in (7, 5):
        tamper(finished / entry.file, entry.features.offset + row * 24)
    assert _problems(finished) == [
        f"shard-00000.h5: fails its checksum{MEND}",
        f"shard-00000.h5: row 5 and 1 more fails its checksum{MEND}",
    ]


def test_verify__goes_on_after_the_first(finished: Path, tamper: Callable[[Path, int], None]) -> None:
    (rows,) = finished.glob("rows-*")
    for name, offset in (("CACHEDIR.TAG", 3), (".gitignore", 0), (rows.name, 200), ("shard-00000.h5", 10)):
        tamper(finished / name, offset)
    (finished / ".lock").write_bytes(b"x")
    assert _problems(finished) == [
        f"{rows.name}: fails its checksum{MEND}",
        f"CACHEDIR.TAG: holds what tlc did not write there{AGAIN}",
        f".gitignore: holds what tlc did not write there{AGAIN}",
        f".lock: holds what tlc did not write there{AGAIN}",
        f"shard-00000.h5: fails its checksum{MEND}",
    ]


@pytest.mark.parametrize("kind", ["missing", "short", "longer", "link", "fifo", "folder"])
def test_verify__a_shard_that_is_no_shard(finished: Path, tmp_path: Path, kind: str) -> None:
    shard = finished / "shard-00000.h5"
    shard.chmod(0o644)
    data = shard.read_bytes()
    shard.unlink()
    if kind in ("short", "longer"):
        shard.write_bytes(data[:3000] if kind == "short" else data + b"\0")
    elif kind == "link":
        (tmp_path / "elsewhere.h5").write_bytes(data)
        shard.symlink_to(tmp_path / "elsewhere.h5")
    elif kind == "fifo":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    assert (
        _problems(finished)
        == {
            "missing": [f"shard-00000.h5: cannot be opened (No such file or directory){MEND}"],
            "short": [f"shard-00000.h5: fails its checksum{MEND}"],
            "longer": [f"shard-00000.h5: fails its checksum{MEND}"],
            "link": [f"shard-00000.h5: is a link{MEND}"],
            "fifo": [f"shard-00000.h5: not a regular file{MEND}"],
            "folder": [f"shard-00000.h5: not a regular file{MEND}"],
        }[kind]
    )


def test_verify__labels_that_a_copy_left_out(finished: Path) -> None:
    for name in ("CACHEDIR.TAG", ".gitignore", ".lock"):
        (finished / name).unlink()
    (finished / "shard-00000.h5").chmod(0o644)
    found = verify_folder(finished)
    assert (found.files, found.problems) == (3, ())


def test_verify__rows_that_lie(finished: Path, extraction: Any, rewrite_catalogue: Rewrite) -> None:
    slots = np.array([1, 0, *range(2, 10)])
    data = extraction.rows(slot=slots).to_bytes()
    sha256 = sha256_bytes(data)
    file = f"rows-{sha256[:8]}.safetensors"
    (finished / file).write_bytes(data)
    rewrite_catalogue(finished, lambda c: c.update(rows={"file": file, "sha256": sha256}))
    assert _problems(finished) == [
        f"shard-00000.h5: does not hold the features of train/é0.jpg and 1 more{MEND}",
    ]


def test_verify__a_row_in_a_slot_that_has_none(
    tmp_path: Path, make_extraction: Any, rewrite_catalogue: Rewrite
) -> None:
    folder = make_extraction(bad=3).run(tmp_path)
    data = make_extraction().rows().to_bytes()
    sha256 = sha256_bytes(data)
    file = f"rows-{sha256[:8]}.safetensors"
    (folder / file).write_bytes(data)
    rewrite_catalogue(folder, lambda c: c.update(rows={"file": file, "sha256": sha256}))
    assert _problems(folder) == [f"shard-00000.h5: does not hold the features of train/é3.jpg{MEND}"]


def test_verify__an_interrupted_extraction_is_no_problem(
    tmp_path: Path, extraction: Any, tamper: Callable[[Path, int], None]
) -> None:
    steps = extraction.steps(tmp_path)
    while next(steps) != "wrote from 4":
        pass
    steps.close()
    (folder,) = tmp_path.iterdir()
    (entry,) = read_catalogue(folder).shards
    for row in (2, 6):
        tamper(folder / entry.file, entry.features.offset + row * 24)
    found = verify_folder(folder)
    assert (found.rows, found.torn, found.files, found.problems) == (6, 2, 4, ())


def test_verify__a_folder_that_was_only_begun(tmp_path: Path) -> None:
    folder = tmp_path / "insects-resnet18-pooled-0123abcd"
    folder.mkdir()
    (folder / ".lock").touch()
    found = verify_folder(folder)
    assert (found.files, found.problems) == (1, ())
    (folder / ".lock").unlink()  # an empty folder is nobody's
    assert verify_folder(folder).problems == (
        f"{folder}: not a cache folder; make one with: tlc extract-features DATA",
    )


def test_verify__leftovers_and_other_files_are_named_alone(finished: Path) -> None:
    for name in ("shard-00007.h5", "rows-01234567.safetensors", ".catalogue.json.123.tmp", "notes.txt"):
        (finished / name).write_bytes(b"abc")
    (finished / "results").mkdir()
    found = verify_folder(finished)
    assert found.problems == ()
    assert found.leftovers == (".catalogue.json.123.tmp", "rows-01234567.safetensors", "shard-00007.h5")
    assert found.foreign == ("notes.txt", "results")
    assert found.files == 6


def test_verify__no_catalogue(finished: Path) -> None:
    (finished / "catalogue.json").unlink()
    assert verify_folder(finished).problems == (
        f"{finished}: not a cache folder; make one with: tlc extract-features DATA",
    )


def test_verify__a_disk_that_fails(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert _problems(finished) == [f"shard-00000.h5: cannot be read (Input/output error){AGAIN}"]


def test_verify__a_writer_that_replaces_the_shard_meanwhile(
    finished: Path, extraction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_contents = verify_module.read_contents
    n_reads = 0

    def read_and_replace(folder: Path) -> Contents:
        nonlocal n_reads
        n_reads += 1
        contents = read_contents(folder)
        if n_reads == 1:
            store = Store(folder)
            with store.writing():
                number = store.begin_shard(extraction.digests, np.zeros(10, np.uint8), batch_size=4)
                with store.writer(number) as writer:
                    writer.write(np.arange(10), extraction.features)
                store.finish_shard(number)
                rows = extraction.rows(shard=np.full(10, number, np.int32))
                store.publish(rows, class_names=("ant", "bee"), run=None)
                store.drop_shards({0})
        return contents

    monkeypatch.setattr(verify_module, "read_contents", read_and_replace)
    found = verify_folder(finished)
    assert (found.rows, found.problems) == (10, ())
    assert n_reads == 3  # the old catalogue, the new one to compare, and again to prove it


def test_verify__never_runs_the_parser_of_hdf5(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened with HDF5")

    for owner, name in ((h5py, "File"), (h5py.h5f, "open"), (h5py.h5f, "create")):
        monkeypatch.setattr(owner, name, refuse)
    assert verify_folder(finished).problems == ()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_verify__a_bar_of_bytes_on_a_terminal(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Terminal())
    verify_folder(finished)
    assert sys.stderr.getvalue() == ""  # soon done
    monkeypatch.setattr(verify_module, "_BAR_AFTER_SECONDS", 0.0)
    verify_folder(finished)
    assert f"{finished.name}:" in sys.stderr.getvalue()
    assert "B/s" in sys.stderr.getvalue()
