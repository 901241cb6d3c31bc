"""`tlc cache list|info|verify|prune|remove`, through the command line and in Python."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transfercache
import transfercache as tc
from transfercache.cache.reader import open_cache
from transfercache.files import locked
from transfercache.version import __version__

Run = Callable[..., Any]


@pytest.fixture
def half_used(tlc: Run, draw_photos: Callable[..., Path], tmp_path: Path) -> Path:
    """A cache in ./cache of twelve photographs, six of which were deleted before it was brought up to date."""
    photos = draw_photos(tmp_path / "pets", 6)
    tlc("extract-features", photos, "--weights=random")
    for path in sorted(photos.rglob("*.png"))[::2]:
        path.unlink()
    assert tlc("extract-features", photos, "--weights=random").code == 0
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def _next(ended: Any) -> str:
    return str(ended.err.splitlines()[-1])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- list and info


def test_list__in_json(tlc: Run, made: Path) -> None:
    (folder,) = (made / "cache").iterdir()
    ended = tlc("cache", "list", "--cache-dir", made / "cache", "--json")
    assert ended.code == 0
    (item,) = json.loads(ended.out)
    assert item.pop("last_run").startswith("20")
    assert item == {
        "cache": str(folder),
        "images": 12,
        "views": 1,
        "bad": 0,
        "bytes": _size(folder),
        "unused": 0,
        "finished": True,
        "backbone": "resnet18",
        "boundary": "pooled",
        "data_name": "pets",
        "data_root": str(made / "pets"),
        "problem": None,
    }
    assert _next(ended) == f"next: tlc cache info {folder}"


def test_list__a_line_a_cache__one_of_them_torn(
    tlc: Run, cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = cache.with_name("a-torn")
    torn.mkdir()
    (torn / "catalogue.json").write_bytes(b"{}")
    monkeypatch.setenv("TRANSFERCACHE_DIR", str(cache.parent))
    ended = tlc("cache", "list")
    assert ended.code == 0
    names, first, second, last = ended.out.splitlines()
    assert re.split(r"  +", names) == [
        *("cache", "images", "views", "bad", "bytes", "unused", "finished", "last run"),
        *("backbone", "boundary", "data root", "problem"),
    ]
    assert re.split(r"  +", first) == [
        *("a-torn", "2 B", "0 B"),
        f"{torn}/catalogue.json: does not begin as a catalogue does; remove the folder and make it anew with: "
        "tlc extract-features DATA",
    ]
    cells = re.split(r"  +", second)
    assert (cells[:4], cells[5:7], cells[8:]) == (
        [cache.name, "12", "1", "0"],
        ["0 B", "yes"],
        ["resnet18", "pooled", str(made / "pets")],
    )
    assert re.fullmatch(rf"2 caches under {cache.parent}: [\d.]+ kB in all, 0 B unused", last)


def test_list__no_cache(tlc: Run) -> None:
    ended = tlc("cache", "list")
    assert (ended.code, ended.out) == (0, "0 caches under cache: 0 B in all, 0 B unused\n")
    assert _next(ended) == "next: tlc demo"
    assert json.loads(tlc("cache", "list", "--json").out) == []


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_list_and_others__where_the_cache_dir_is_a_file(tlc: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "taken").touch()
    ended = tlc("cache", command, "--cache-dir=taken")
    assert (ended.code, ended.out) == (6, "")
    assert ended.err == "tlc: taken: cannot be listed (Not a directory); look at its path and permissions\n"


def test_info__in_json(tlc: Run, half_used: Path) -> None:
    document = json.loads(tlc("cache", "info", half_used, "--json").out)
    assert (document["images"], document["views"], document["bad"]) == (6, 1, 0)
    assert document["spec"] == open_cache(half_used).spec.to_json() | {
        "preprocessing": document["spec"]["preprocessing"]
    }
    assert (document["dim"], document["has_given_split"]) == (512, False)
    assert [item["class"] for item in document["classes"]] == ["cat", "dog"]
    assert [item["train"] + item["val"] for item in document["classes"]] == [3, 3]
    (shard,) = document["shards"]
    assert shard == {
        "file": "shard-00000.h5",
        "n_rows": 12,
        "batch_size": 32,
        "finished": True,
        "used": 6,
        "bytes": (half_used / "shard-00000.h5").stat().st_size,
    }
    assert (document["bytes"], document["unused"]) == (_size(half_used), 6 * (512 * 4 + 41))
    first, second = document["provenance"]
    assert (first["computed"], second["computed"], second["reused"]) == (12, 0, 6)
    assert document["last_run"] == second["date"]
    assert {"date", "machine", "device", "engine", "versions", "seconds"} <= set(first)


def test_info__on_a_terminal__by_name(tlc: Run, half_used: Path) -> None:
    (half_used / "shard-00007.h5").write_bytes(b"abc")
    (half_used / "notes.txt").touch()
    ended = tlc("cache", "info", half_used.name)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == f"cache: cache/{half_used.name}"
    assert "images: 6" in lines
    assert "unused: 12.5 kB" in lines
    assert "leftovers: shard-00007.h5" in lines
    assert "foreign: notes.txt" in lines
    assert any(
        re.fullmatch(r"spec: backbone resnet18, weights_digest [0-9a-f]{64}, boundary pooled, .*", x) for x in lines
    )
    assert any(re.fullmatch(r"shard-00000\.h5  12 +32 +yes +6 +[\d.]+ kB", line) for line in lines)
    assert any(re.fullmatch(r"cat +\d +\d +0 +0", line) for line in lines)
    runs = [line for line in lines if line.startswith("run: date 20")]
    assert len(runs) == 2
    assert "computed 12, reused 0" in runs[0]
    assert f"transfercache {__version__}" in runs[0]
    assert _next(ended) == f"next: tlc cache prune cache/{half_used.name}"


@pytest.mark.parametrize("command", ["info", "verify"])
def test_info_and_verify__what_is_no_cache(tlc: Run, tmp_path: Path, command: str) -> None:
    ended = tlc("cache", command, "absent")
    assert (ended.code, ended.out) == (4, "")
    assert "tlc: absent: " in ended.err


# --- verify


def test_verify__all_under_the_folder(tlc: Run, cache: Path) -> None:
    ended = tlc("cache", "verify", "--cache-dir", cache.parent)
    assert ended.code == 0
    names, line, last = ended.out.splitlines()
    assert re.split(r"  +", names) == ["cache", "files", "bytes", "rows", "torn"]
    assert re.fullmatch(rf"{cache}  6 +[\d.]+ kB  12 +0", line)
    assert last == "every byte of 1 caches is proved"
    assert _next(ended) == f"next: tlc cache list --cache-dir {cache.parent}"
    (item,) = json.loads(tlc("cache", "verify", cache, "--json").out)
    assert item == {
        "cache": str(cache),
        "files": 6,
        "bytes": _size(cache),
        "rows": 12,
        "torn": 0,
        "leftovers": [],
        "foreign": [],
        "problems": [],
    }


def test_verify__names_all_that_is_wrong_in_all(tlc: Run, cache: Path) -> None:
    other = cache.with_name("b")
    other.mkdir()
    for path in cache.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (cache / ".gitignore").write_bytes(b"")
    (other / "shard-00000.h5").unlink()
    for words in ((), ("--json",)):
        ended = tlc("cache", "verify", "--cache-dir", cache.parent, *words)
        assert ended.code == 4
        document = json.loads(ended.out or "[]")
        assert [(item["cache"], item["rows"], len(item["problems"])) for item in document] == (
            [(str(other), 0, 1), (str(cache), 12, 1)] if words else []
        )
        again = "remove the folder and make it anew with: tlc extract-features DATA"
        assert sorted(ended.err.splitlines()) == sorted(
            [
                f"tlc: {other}/shard-00000.h5: cannot be opened (No such file or directory); mend it with: "
                "tlc extract-features DATA --verify-content",
                f"tlc: {cache}/.gitignore: holds what tlc did not write there; {again}",
                "tlc: 2 problems in 2 of 2 caches; mend such a one as its lines say, or remove it with tlc cache "
                f"remove {other}, and make it anew with tlc extract-features",
            ]
        )


def test_verify__what_cannot_be_removed__is_not_said_to_be(tlc: Run, made: Path, tmp_path: Path) -> None:
    ended = tlc("cache", "verify", "absent", made / "pets")
    assert ended.code == 4
    assert sorted(ended.err.splitlines()) == [
        f"tlc: {made}/pets: not a cache folder; make one with: tlc extract-features DATA",
        "tlc: 2 problems in 2 of 2 caches; mend such a one as its lines say",
        "tlc: absent: cannot be listed (No such file or directory); look at its path and permissions",
    ]


# --- prune


def test_prune__frees_what_it_said_and_serves_the_same(tlc: Run, half_used: Path, tmp_path: Path) -> None:
    served, before, size = open_cache(half_used).table().features, _state(half_used), _size(half_used)
    ended = tlc("cache", "prune", "--dry-run", "--json")
    assert ended.code == 0
    (planned,) = json.loads(ended.out)
    assert planned["bytes"] > 0
    assert {**_state(half_used), ".lock": None} == {**before, ".lock": None}
    assert _next(ended) == "next: tlc cache prune --yes"

    refused = tlc("cache", "prune")
    assert (refused.code, refused.out) == (2, "")
    assert re.fullmatch(
        r"tlc: free [\d.]+ kB in 1 caches\? Nobody is there to answer: look with --dry-run, then pass --yes\n",
        refused.err,
    )
    assert {**_state(half_used), ".lock": None} == {**before, ".lock": None}

    ended = tlc("cache", "prune", "--yes", "--json")
    assert json.loads(ended.out) == [planned]
    catalogues = [len(before["catalogue.json"][0]), (half_used / "catalogue.json").stat().st_size]
    assert planned == {
        "cache": str(half_used.relative_to(tmp_path)),
        "bytes": size - _size(half_used) - (catalogues[0] - catalogues[1]),
        "removed": False,
        "kept": [],
        "passed_over": "",
    }
    assert open_cache(half_used).table().features.tobytes() == served.tobytes()
    assert tlc("cache", "verify").code == 0
    again = json.loads(tlc("extract-features", tmp_path / "pets", "--weights=random", "--json").out)
    assert (again["computed"], again["reused"]) == (0, 6)
    # Nothing is left to free, so nothing is asked.
    ended = tlc("cache", "prune")
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "0 B freed")


def test_prune__passes_over_what_is_written_or_torn(tlc: Run, cache: Path) -> None:
    torn = cache.with_name("torn")
    torn.mkdir()
    (torn / "catalogue.json").write_bytes(b"{}")
    with locked(cache / ".lock", what="here"):
        ended = tlc("cache", "prune", "--cache-dir", cache.parent, "--yes", "--json")
    assert ended.code == 0
    assert [(item["cache"], item["bytes"], item["passed_over"]) for item in json.loads(ended.out)] == [
        (str(cache), 0, f"{cache}: another process is writing to it; wait for it to end, then run this again"),
        (
            str(torn),
            0,
            f"{torn}/catalogue.json: does not begin as a catalogue does; remove the folder and make it anew with: "
            "tlc extract-features DATA",
        ),
    ]


def test_prune__a_named_one_that_is_torn(tlc: Run, cache: Path) -> None:
    (cache / "catalogue.json").write_bytes(b"{}")
    ended = tlc("cache", "prune", cache, "--yes")
    assert (ended.code, ended.out) == (4, "")
    assert ended.err.startswith(f"tlc: {cache}/catalogue.json: does not begin as a catalogue does; remove the folder")


def test_prune__older_than(tlc: Run, cache: Path) -> None:
    now, size = (cache / "catalogue.json").stat().st_mtime, _size(cache)
    words = ("cache", "prune", "--cache-dir", cache.parent, "--older-than", "30")
    os.utime(cache / "catalogue.json", (now, now - 29 * 86_400))
    assert json.loads(tlc(*words, "--yes", "--json").out)[0]["removed"] is False
    os.utime(cache / "catalogue.json", (now, now - 31 * 86_400))
    ended = tlc(*words, "--dry-run")
    assert ended.out.splitlines()[1].split()[0] == str(cache)
    assert ended.out.splitlines()[-1].endswith("kB would be freed")
    assert _next(ended) == f"next: tlc cache prune --older-than 30.0 --cache-dir {cache.parent} --yes"
    refused = tlc(*words)
    assert refused.code == 2
    assert f"in 1 caches, removing {cache}?" in refused.err
    (item,) = json.loads(tlc(*words, "--yes", "--json").out)
    assert (item["removed"], item["bytes"]) == (True, size)
    assert not cache.exists()


# --- remove


def test_remove__asks_first(tlc: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    ended = tlc("cache", "remove", cache)
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(
        rf"tlc: free [\d.]+ kB in 1 caches, removing {cache}\? Nobody is there to answer: look with --dry-run, then "
        r"pass --yes\n",
        ended.err,
    )
    for words, out in (((), ""), (("--json",), "[]\n")):
        monkeypatch.setattr(sys, "stdin", _Terminal("n\n"))
        ended = tlc("cache", "remove", cache, *words)
        assert (ended.code, ended.out) == (0, out)
        assert ended.err.endswith(f", removing {cache}? [y/N] tlc: nothing was removed\n")
    assert cache.is_dir()
    monkeypatch.setattr(sys, "stdin", _Terminal("y\n"))
    ended = tlc("cache", "remove", cache, "--json")
    assert ended.code == 0
    assert json.loads(ended.out)[0]["removed"] is True
    assert not cache.exists()


def test_remove__dry_run_then_yes__of_several(tlc: Run, cache: Path) -> None:
    torn = cache.with_name("torn")
    torn.mkdir()
    (torn / "CACHEDIR.TAG").write_bytes((cache / "CACHEDIR.TAG").read_bytes())
    (torn / "notes.txt").write_text("mine")
    sizes = [_size(cache), _size(torn) - 4]
    words = ("cache", "remove", cache, "torn", cache, "--cache-dir", cache.parent)
    planned = json.loads(tlc(*words, "--dry-run", "--json").out)
    assert planned == [
        {"cache": str(folder), "bytes": size, "removed": True, "kept": kept, "passed_over": ""}
        for folder, size, kept in zip((cache, torn), sizes, ([], ["notes.txt"]), strict=True)
    ]
    assert cache.is_dir()
    ended = tlc(*words, "--yes")
    assert ended.code == 0
    names, first, second, last = ended.out.splitlines()
    assert re.split(r"  +", names) == ["cache", "bytes", "removed", "kept"]
    assert re.fullmatch(rf"{cache}  [\d.]+ kB +yes", first)
    assert re.fullmatch(rf"{torn} +\d+ B +yes +notes\.txt", second)
    assert last.endswith(" freed")
    assert not cache.exists()
    assert [path.name for path in torn.iterdir()] == ["notes.txt"]


def test_remove__one_that_is_no_cache__removes_none(tlc: Run, cache: Path, made: Path) -> None:
    ended = tlc("cache", "remove", cache, made / "pets", "--yes")
    assert (ended.code, ended.out) == (4, "")
    assert ended.err == (
        f"tlc: {made}/pets: not a cache folder, or a link to one, so nothing in it is removed; see: tlc cache list\n"
    )
    assert cache.is_dir()


def test_remove__one_that_is_being_written(tlc: Run, cache: Path) -> None:
    with locked(cache / ".lock", what="here"):
        ended = tlc("cache", "remove", cache, "--yes")
    assert (ended.code, ended.out) == (6, "")
    assert ended.err == f"tlc: {cache}: another process is writing to it; wait for it to end, then run this again\n"
    assert cache.is_dir()


# --- all of them


def test_group_alone__shows_its_help(tlc: Run) -> None:
    ended = tlc("cache")
    assert (ended.code, ended.err) == (0, "")
    for word in ("Usage: tlc cache", "list", "info", "verify", "prune", "remove"):
        assert word in ended.out
    ended = tlc("cache", "lits")
    assert (ended.code, ended.err) == (2, "tlc: No such command 'lits'. Did you mean 'list'?\n")


def test_prune_help__says_what_becomes_of_an_interrupted_extraction(tlc: Run) -> None:
    text = " ".join(tlc("cache", "prune", "--help").out.split())
    assert "What an interrupted extract-features has computed is kept until the same command has ended." in text


def test_read_only_disk(tlc: Run, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write where others may not, so that opening for writing is refused here as such a disk would."""
    open_file = os.open

    def refuse_writing(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system", str(path))
        return open_file(path, flags, *args, **options)

    for path in cache.iterdir():
        path.chmod(0o444)
    cache.chmod(0o555)
    before = _state(cache)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse_writing)
            assert tlc("cache", "list", "--cache-dir", cache.parent).code == 0
            assert tlc("cache", "info", cache).code == 0
            assert tlc("cache", "verify", cache).code == 0
            ended = tlc("cache", "prune", cache, "--yes")
            assert (ended.code, ended.out) == (6, "")
            assert f"tlc: {cache}/.lock: cannot be written (Read-only file system)" in ended.err
        assert _state(cache) == before
    finally:
        cache.chmod(0o755)


def test_python__gives_typed_results(cache: Path) -> None:
    (summary,) = transfercache.list_caches(cache_dir=cache.parent).value
    assert (summary.cache, summary.images) == (cache, 12)
    contents = transfercache.cache_info(cache).value
    assert contents.rows is not None
    assert len(contents.rows) == 12
    (proof,) = transfercache.verify_cache([cache]).value
    assert (proof.rows, proof.problems) == (12, ())
    (pruned,) = transfercache.prune_caches(str(cache)).value
    assert pruned.bytes == 0
    (removed,) = transfercache.remove_caches(cache).value
    assert removed.removed
    assert not cache.exists()


def test_no_command__imports_torch(cache: Path) -> None:
    code = (
        "import sys\n"
        "from transfercache.cli.main import run\n"
        "def tlc(*words):\n"
        "  sys.argv = ['tlc', 'cache', *words]\n"
        "  try:\n    run()\n"
        "  except SystemExit as ended:\n    assert ended.code == 0, words\n"
        f"cache, root = {str(cache)!r}, {str(cache.parent)!r}\n"
        "tlc('list', '--cache-dir', root)\n"
        "tlc('info', cache)\n"
        "tlc('verify', cache)\n"
        "tlc('prune', cache, '--yes')\n"
        "tlc('remove', cache, '--yes')\n"
        "print('MODULES', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.rsplit("MODULES", 1)[1].split())
    assert {"numpy", "transfercache"} <= modules
    assert {"torch", "torchvision", "timm", "sklearn", "scipy"} & modules == set()
    assert not cache.exists()


def test_views__of_an_image_are_counted(tlc: Run, draw_photos: Callable[..., Path], tmp_path: Path) -> None:
    draw_photos(tmp_path / "pets", 3)
    tlc("extract-features", "pets", "--weights=random", "--views", "3")
    (item,) = json.loads(tlc("cache", "list", "--json").out)
    assert (item["images"], item["views"], item["unused"]) == (6, 3, 0)
    assert tlc("extract-features", "pets", "--weights=random", "--views", "1").code == 0
    (item,) = json.loads(tlc("cache", "list", "--json").out)
    assert (item["views"], item["unused"]) == (1, 12 * (512 * 4 + 41))
    folder = Path(item["cache"])
    served = open_cache(folder).table().features
    assert tlc("cache", "prune", "--yes").code == 0
    np.testing.assert_array_equal(open_cache(folder).table().features, served)


def test_no_caches__are_none(cache: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in cache.iterdir())
    assert tc.remove_caches([], cache_dir=cache.parent).value == ()
    assert tc.prune_caches([], cache_dir=cache.parent, older_than=0).value == ()
    assert tc.verify_cache([], cache_dir=cache.parent).value == ()
    assert sorted(path.name for path in cache.iterdir()) == before


def test_list__beside_a_link_to_itself(tlc: Run, cache: Path) -> None:
    (cache.parent / "loop").symlink_to(cache.parent / "loop")
    ended = tlc("cache", "list", "--cache-dir", cache.parent, "--json")
    assert ended.code == 0
    assert [Path(item["cache"]).name for item in json.loads(ended.out)] == [cache.name]
