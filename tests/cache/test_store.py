from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.cache import store as store_module
from transfercache.cache.catalogue import read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.rows import Rows
from transfercache.cache.store import find, find_or_create
from transfercache.errors import CacheError, LockedError, ResourceError
from transfercache.files import sha256_file

ROOT = Path("/data/insects")


def _stem(extraction: Any) -> str:
    return f"insects-resnet18-pooled-{extraction.spec.digest()[:8]}"


def test_find_or_create__folder_and_its_labels(tmp_path: Path, extraction: Any) -> None:
    folder = extraction.store(tmp_path / "deep" / "cache").folder
    assert folder == tmp_path / "deep" / "cache" / _stem(extraction)
    assert (folder / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert (folder / ".gitignore").read_bytes() == b"*\n"
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"CACHEDIR.TAG", ".gitignore", "catalogue.json"}
    catalogue = read_catalogue(folder)
    assert (catalogue.spec, catalogue.data_name, catalogue.data_root) == (extraction.spec, "insects", str(ROOT))
    assert catalogue.canaries.tobytes() == extraction.canaries.tobytes()


def test_find_or_create__the_catalogue_decides(tmp_path: Path, extraction: Any) -> None:
    first = extraction.store(tmp_path).folder
    second = extraction.store(tmp_path, data_root=Path("/elsewhere/insects")).folder
    third = extraction.store(tmp_path, data_root=Path("/third/insects")).folder
    assert [second.name, third.name] == [f"{first.name}-2", f"{first.name}-3"]
    assert extraction.store(tmp_path).folder == first
    assert extraction.store(tmp_path, data_root=Path("/third/insects")).folder == third
    (second / "catalogue.json").unlink()
    for path in second.iterdir():
        path.unlink()
    second.rmdir()
    assert extraction.store(tmp_path, data_root=Path("/third/insects")).folder == third
    assert extraction.store(tmp_path, data_root=Path("/fourth/insects")).folder == second


def test_find__only_what_is_there(tmp_path: Path, extraction: Any) -> None:
    arguments = {"data_name": "insects", "data_root": ROOT, "spec": extraction.spec}
    assert find(tmp_path / "absent", **arguments) is None
    folder = extraction.store(tmp_path).folder
    assert find(tmp_path, **arguments) == folder
    assert find(tmp_path, **{**arguments, "data_root": Path("/other")}) is None
    assert find(tmp_path, **{**arguments, "spec": replace(extraction.spec, backbone="resnet34")}) is None
    # The digits in the name are a label: another spec under them is another cache.
    other = replace(extraction.spec, weights_digest="cd" * 32)
    folder.rename(tmp_path / f"insects-resnet18-pooled-{other.digest()[:8]}")
    assert find(tmp_path, **{**arguments, "spec": other}) is None


def test_find_or_create__names_become_file_names(tmp_path: Path, extraction: Any) -> None:
    spec = replace(extraction.spec, backbone="timm:vit/small.lvd142m")
    store = find_or_create(
        tmp_path, data_name="../../Käfer " + "x" * 300, data_root=ROOT, spec=spec, canaries=extraction.canaries
    )
    assert store.folder.parent == tmp_path
    assert store.folder.name == f"K-fer-{'x' * 74}-timm-vit-small.lvd142m-pooled-{spec.digest()[:8]}"


def test_find_or_create__torn_catalogue(tmp_path: Path, extraction: Any, tamper: Callable[[Path, int], None]) -> None:
    folder = extraction.store(tmp_path).folder
    tamper(folder / "catalogue.json", 500)
    with pytest.raises(CacheError, match=rf"{folder}/catalogue.json: fails its checksum; remove the folder"):
        extraction.store(tmp_path)
    (folder / "catalogue.json").unlink()
    (folder / "shard-00000.h5").write_bytes(b"")
    with pytest.raises(CacheError, match=rf"{folder}: not a cache folder"):
        extraction.store(tmp_path)


def test_find_or_create__folder_cannot_be_made(tmp_path: Path, extraction: Any) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((ResourceError, NotADirectoryError)):
        extraction.store(tmp_path / "file" / "cache")


def test_store__changes_need_the_lock(tmp_path: Path, extraction: Any, make_run: Any) -> None:
    store = extraction.store(tmp_path)
    with pytest.raises(RuntimeError, match=r"only inside `with store\.writing\(\):`"):
        store.begin_shard(extraction.digests, np.zeros(10, np.uint8), batch_size=4)
    with pytest.raises(RuntimeError, match="only inside"):
        store.publish(extraction.rows(), class_names=("ant", "bee"), run=make_run())


def test_writing__two_writers(tmp_path: Path, extraction: Any) -> None:
    store = extraction.store(tmp_path)
    code = (
        "import sys; from pathlib import Path; from transfercache.cache.store import Store\n"
        "with Store(Path(sys.argv[1])).writing():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(store.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=rf"{store.folder}: another process is writing to it"), store.writing():
            pass
        other.kill()
    with store.writing():  # a dead writer holds no lock
        pass


def test_begin_shard__plan_is_known_without_rows(tmp_path: Path, extraction: Any) -> None:
    store = extraction.store(tmp_path)
    views = np.array([0, 1] * 5, np.uint8)
    with store.writing():
        assert store.begin_shard(extraction.digests, views, batch_size=4) == 0
        assert store.begin_shard(extraction.digests[:3], views[:3], batch_size=2) == 1
        with store.writer(1) as writer:
            writer.write(np.array([2]), extraction.features[:1])
    slots = store_module.Store(store.folder).slots()
    np.testing.assert_array_equal(slots.digest, np.concatenate([extraction.digests, extraction.digests[:3]]))
    assert slots.view.tolist() == [0, 1] * 5 + [0, 1, 0]
    assert slots.shard.tolist() == [0] * 10 + [1] * 3
    assert slots.slot.tolist() == [*range(10), 0, 1, 2]
    assert np.flatnonzero(slots.valid).tolist() == [12]
    assert store.rows() is None


def test_slots__new_cache(tmp_path: Path, extraction: Any) -> None:
    slots = extraction.store(tmp_path).slots()
    assert slots.digest.shape == (0, 32)
    assert (slots.shard.dtype, slots.slot.dtype, slots.valid.dtype) == (np.int32, np.int64, np.bool_)


def test_begin_shard__disk_full_leaves_nothing(tmp_path: Path, extraction: Any) -> None:
    store = extraction.store(tmp_path)
    before = (store.folder / "catalogue.json").read_bytes()
    n_rows = 1 << 50  # beyond any disk; broadcast, so it takes no memory
    digests, views = np.broadcast_to(np.uint8(1), (n_rows, 32)), np.broadcast_to(np.uint8(0), n_rows)
    with store.writing(), pytest.raises(ResourceError, match=r"shard-00000\.h5: the disk is full"):
        store.begin_shard(digests, views, batch_size=4)
    assert (store.folder / "catalogue.json").read_bytes() == before
    assert {path.name for path in store.folder.iterdir()} <= {"CACHEDIR.TAG", ".gitignore", "catalogue.json", ".lock"}


def test_begin_shard__catalogue_cannot_be_replaced(
    tmp_path: Path, extraction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = extraction.store(tmp_path)

    def full(path: Path, data: bytes) -> None:
        raise ResourceError(f"{path}: the disk is full")

    with store.writing():
        monkeypatch.setattr(store_module, "write_atomic", full)
        with pytest.raises(ResourceError):
            store.begin_shard(extraction.digests, np.zeros(10, np.uint8), batch_size=4)
        assert store.catalogue.shards == ()
        assert not (store.folder / "shard-00000.h5").exists()
        monkeypatch.undo()
        assert store.begin_shard(extraction.digests, np.zeros(10, np.uint8), batch_size=4) == 0


def test_finish_shard__digest_and_read_only(finished: Path) -> None:
    (entry,) = read_catalogue(finished).shards
    path = finished / "shard-00000.h5"
    assert entry.finished
    assert entry.batch_size == 4
    assert entry.digest == sha256_file(path)
    assert path.stat().st_mode & 0o777 == 0o444


def test_finish_shard__returns_the_rows_it_has_and_never_changes_again(tmp_path: Path, extraction: Any) -> None:
    store = extraction.store(tmp_path)
    with store.writing():
        store.begin_shard(extraction.digests, np.zeros(10, np.uint8), batch_size=4)
        with store.writer(0) as writer:
            writer.write(np.array([1, 8]), extraction.features[[1, 8]])
        assert np.flatnonzero(store.finish_shard(0)).tolist() == [1, 8]
        with pytest.raises(ValueError, match=r"shard-00000\.h5 is finished"), store.writer(0):
            pass


def test_finish_shard__without_a_row_is_removed(finished: Path, extraction: Any) -> None:
    store = store_module.Store(finished)
    with store.writing():
        assert store.begin_shard(extraction.digests, np.ones(10, np.uint8), batch_size=4) == 1
        assert not store.finish_shard(1).any()
    assert [entry.number for entry in read_catalogue(finished).shards] == [0]
    assert not (finished / "shard-00001.h5").exists()


def test_publish__new_labels_replace_the_rows_file_alone(finished: Path, extraction: Any, make_run: Any) -> None:
    shard_before = (finished / "shard-00000.h5").stat()
    (rows_before,) = finished.glob("rows-*")
    store = store_module.Store(finished)
    with store.writing():
        store.publish(
            extraction.rows(label=np.full(10, 2)), class_names=("ant", "bee", "wasp"), run=make_run(device="none")
        )
    (rows_after,) = finished.glob("rows-*")
    assert rows_after.name == f"rows-{sha256_file(rows_after)[:8]}.safetensors" != rows_before.name
    assert (finished / "shard-00000.h5").stat().st_mtime_ns == shard_before.st_mtime_ns
    cache = open_cache(finished)
    assert cache.class_names == ("ant", "bee", "wasp")
    assert cache.table().labels.tolist() == [2] * 10
    assert [run.device for run in cache.provenance] == ["cpu", "none"]


def test_publish__nothing_new_changes_nothing(finished: Path, extraction: Any) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.iterdir()}
    extraction.run(finished.parent)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished.iterdir()}
    del before[finished / ".lock"], after[finished / ".lock"]
    assert after == before


def _with_exchanged_features(extraction: Any) -> Rows:
    return extraction.rows(slot=np.array([1, 0, *range(2, 10)]))


def _with_a_view_that_no_slot_holds(extraction: Any) -> Rows:
    index, rows = np.array([0, 0, *range(2, 10)]), extraction.rows()
    columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
    taken = {name: tuple(v[i] for i in index) if isinstance(v, tuple) else v[index] for name, v in columns.items()}
    return Rows(**{**taken, "view": np.array([0, 1, *[0] * 8], np.uint8), "slot": np.arange(10)})


@pytest.mark.parametrize("make_rows", [_with_exchanged_features, _with_a_view_that_no_slot_holds])
def test_publish__rows_that_the_shards_do_not_hold(
    finished: Path, extraction: Any, make_run: Any, make_rows: Callable[[Any], Rows]
) -> None:
    store = store_module.Store(finished)
    with store.writing(), pytest.raises(ValueError, match=r"not the one that shard-00000\.h5 holds in its slot"):
        store.publish(make_rows(extraction), class_names=("ant", "bee"), run=make_run())


def test_publish__rows_never_written_or_not_finished(tmp_path: Path, make_extraction: Any, make_run: Any) -> None:
    extraction = make_extraction(bad=3)
    folder = extraction.run(tmp_path)
    all_good = {"status": np.zeros(10, np.uint8), "reason": ("",) * 10, "shard": np.zeros(10, np.int32)}
    store = store_module.Store(folder)
    with store.writing():
        with pytest.raises(ValueError, match=r"not the one that shard-00000\.h5 holds"):
            store.publish(extraction.rows(**all_good, slot=np.arange(10)), class_names=("ant", "bee"), run=make_run())
        store.begin_shard(extraction.digests, np.zeros(10, np.uint8), batch_size=4)
        shard = np.where(np.arange(10) == 3, 1, 0).astype(np.int32)
        rows = extraction.rows(**{**all_good, "shard": shard}, slot=np.arange(10))
        with pytest.raises(ValueError, match="in shard 1, which is not there or not finished"):
            store.publish(rows, class_names=("ant", "bee"), run=make_run())


def test_writing__removes_leftovers_and_nothing_else(finished: Path, extraction: Any) -> None:
    leftovers = ["shard-00007.h5", "rows-01234567.safetensors", ".catalogue.json.123.tmp", ".shard-00001.h5.9.tmp"]
    foreign = ["notes.txt", "shard-1.h5", "rows.safetensors", "x.tmp"]
    for name in (*leftovers, *foreign):
        (finished / name).write_bytes(b"")
    (finished / "shard-00000.h5").chmod(0o644)  # a crash between `finished` and the protection
    with store_module.Store(finished).writing():
        pass
    names = {path.name for path in finished.iterdir()}
    assert names & set(leftovers) == set()
    assert names >= set(foreign)
    assert (finished / "shard-00000.h5").stat().st_mode & 0o777 == 0o444
    np.testing.assert_array_equal(open_cache(finished).table().features, extraction.features)


def test_record__keeps_the_latest_runs(finished: Path, make_run: Any) -> None:
    store = store_module.Store(finished)
    with store.writing():
        store.record(*(make_run(computed=i) for i in range(1200)))
    assert [run.computed for run in read_catalogue(finished).provenance] == list(range(200, 1200))
