from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfercache.errors import DecodeError, ResourceError
from transfercache.images import processes
from transfercache.images.files import HashedFile
from transfercache.images.processes import decode_ahead, decoding_workers
from transfercache.stopwatch import Stopwatch

N_PROCESSES = 9  # the least number of workers that are processes


@pytest.fixture(autouse=True)
def _processes_for_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process imports the functions of this module by its name, which starts at the checkout."""
    monkeypatch.setattr(processes, "_IMAGES_PER_PROCESS", 1)
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def square(item: int) -> np.ndarray:
    return np.full((3, 2), item * item)


def own_id(item: int) -> int:
    time.sleep(0.02)
    return os.getpid()


def bad(item: int) -> int:
    if item == 3:
        raise DecodeError(f"{item}.jpg", "truncated")
    if item == 5:
        raise MemoryError
    return item


def loud(item: int) -> int:
    print("a library prints", flush=True)
    os.write(1, b"and so does its C code")
    return item


def killed(item: int) -> int:
    if item == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def failing(item: int) -> int:
    if item == 7:
        raise ZeroDivisionError("a bug in the seventh")
    return item


def ahead(decode: Callable[[int], Any], n: int, *, workers: int = N_PROCESSES, window: int = 36, **changes: Any) -> Any:
    return decode_ahead(range(n), decode, n_images=n, workers=workers, window=window, watch=Stopwatch(), **changes)


def test_decode_ahead__in_processes__in_the_order_of_the_items() -> None:
    done = [(item, future.result()) for item, future in ahead(square, 100)]
    assert [item for item, _ in done] == list(range(100))
    for item, found in done:
        np.testing.assert_array_equal(found, np.full((3, 2), item * item))


def test_decode_ahead__more_than_eight_workers_are_processes_and_fewer_are_threads() -> None:
    assert {future.result() for _, future in ahead(own_id, 16, workers=8)} == {os.getpid()}
    found = {future.result() for _, future in ahead(own_id, 54)}
    assert os.getpid() not in found
    assert 1 < len(found) <= N_PROCESSES
    assert {future.result() for _, future in ahead(own_id, 54, is_light=False)} == {os.getpid()}


def test_decode_ahead__few_images__are_decoded_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_IMAGES_PER_PROCESS", 10)
    assert {future.result() for _, future in ahead(own_id, 10 * N_PROCESSES - 1)} == {os.getpid()}


def test_decode_ahead__charges_what_the_processes_take() -> None:
    watch = Stopwatch()
    for _, future in decode_ahead(range(18), own_id, n_images=18, workers=N_PROCESSES, window=18, watch=watch):
        future.result()
    assert watch.seconds()["decode"] >= 18 * 0.02


def test_decode_ahead__an_error_is_its_items_own() -> None:
    outcomes = [future.exception() for _, future in ahead(bad, 10)]
    assert [type(outcome) for outcome in outcomes] == [
        DecodeError if i == 3 else MemoryError if i == 5 else type(None) for i in range(10)
    ]
    assert (outcomes[3].path, outcomes[3].reason, str(outcomes[3])) == ("3.jpg", "truncated", "3.jpg: truncated")


def test_decode_ahead__what_a_library_prints_is_no_answer(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('and before all else')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [future.result() for _, future in ahead(loud, 18)] == list(range(18))
    assert capfd.readouterr() == ("", "")


def test_decode_ahead__a_process_that_is_killed__is_named_with_what_to_do() -> None:
    with pytest.raises(ResourceError) as caught:
        list(ahead(killed, 90))
    assert str(caught.value) == (
        "a process that decodes images was ended (signal 9, Killed); a system short of memory does that, and fewer "
        "--workers need less; run the same command again"
    )


def test_run__of_a_process_that_was_killed_while_idle__is_no_broken_stdout() -> None:
    """What has a BrokenPipeError behind it is taken for a reader of stdout that has gone, and ends without a word."""
    process = processes._Process(square)
    try:
        process.run([1])
        process._popen.kill()
        process._popen.wait()
        with pytest.raises(ResourceError, match=r"was ended \(signal 9, Killed\)") as caught:
            process.run([2])
    finally:
        process.close()
    assert caught.value.__context__ is None


def test_close__while_a_fork_holds_the_socket__does_not_wait_for_it() -> None:
    process = processes._Process(square)
    process.run([1])
    fork = subprocess.Popen(["sleep", "60"], pass_fds=[process._requests.fileno()])
    try:
        process.close()
        assert fork.poll() is None
    finally:
        fork.kill()
        fork.wait()


def test_process__that_cannot_be_started__is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ResourceError) as caught:
        list(ahead(square, 90))
    assert str(caught.value) == (
        "no process could be started to decode images (No such file or directory); 8 --workers or fewer need none"
    )


def test_process__of_a_path_that_is_relative_or_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("def double(item):\n    return 2 * item\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path, tmp_path])
    double = importlib.import_module("only_here").double
    assert [future.result() for _, future in ahead(double, 18)] == [2 * item for item in range(18)]


def test_decode_ahead__a_bug_ends_its_process_with_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"failed \(exit code 1\); its traceback is above"):
        list(ahead(failing, 90))
    assert "ZeroDivisionError: a bug in the seventh" in capfd.readouterr().err


def running(children_of: int) -> list[int]:
    """The processes whose parent this is and which have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().rsplit(")", 1)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH):
                raise
            continue
        state, parent = rest.split()[:2]
        if int(parent) == children_of and state != "Z":
            found.append(int(name.split()[0]))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux alone lists processes there")
def test_decode_ahead__closed_early__leaves_neither_process_nor_thread() -> None:
    before, threads = running(os.getpid()), threading.active_count()
    images = ahead(own_id, 1000)
    next(images)
    assert len(running(os.getpid())) > len(before)
    images.close()
    assert running(os.getpid()) == before
    assert threading.active_count() == threads


_PARENT = """\
import importlib
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where a shell runs the tests with &
from transfercache.images import processes
processes._IMAGES_PER_PROCESS = 1
tests = importlib.import_module({name!r})
for _, future in tests.ahead(tests.own_id, 100000):
    print(future.result(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux alone lists processes there")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_decode_ahead__whose_parent_ends__ends_its_processes(number: signal.Signals) -> None:
    words = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{_PARENT.format(name=__name__)}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) > 0
        children = running(parent.pid)
        if number == signal.SIGINT:  # a terminal sends it to the whole group
            os.killpg(parent.pid, number)
        else:
            parent.kill()
        _, errors = parent.communicate(timeout=30)
    assert children
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert errors.count("Traceback") == (1 if number == signal.SIGINT else 0)  # the parent's own


@pytest.mark.parametrize(
    ("workers", "n_images", "cores", "expected"),
    [
        (None, 10**6, 16, 16),
        (None, 1599, 16, 8),
        (None, 1600, 16, 16),
        (None, 10**6, 64, 16),
        (None, 10**6, 4, 4),
        (3, 10, 16, 3),
        (12, 9, 2, 12),
    ],
)
def test_decoding_workers(
    workers: int | None, n_images: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_IMAGES_PER_PROCESS", 100)
    monkeypatch.setattr(processes, "n_cores", lambda: cores)
    assert decoding_workers(workers, n_images) == expected


def test_hashed_file__that_changed__is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"other bytes")
    assert HashedFile(path, "a.jpg", None).read() == b"other bytes"
    with pytest.raises(DecodeError, match=r"a.jpg: it changed while it was being read; run the same command again"):
        HashedFile(path, "a.jpg", bytes(32)).read()
