"""Images decoded ahead of their reader: in threads, or on a machine of many cores in processes of their own.

Decoding in threads releases the interpreter lock and takes it back a dozen times an image, so that beyond some eight
threads they wait for it, and the thread that feeds a GPU with them (docs/decisions/0017-decoding-processes.md).
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from queue import Empty, SimpleQueue
from typing import IO, Any, Generic, TypeVar

from transfercache.environment import n_cores
from transfercache.errors import ResourceError, TlcError
from transfercache.images.ahead import run_ahead
from transfercache.stopwatch import Stopwatch

Item = TypeVar("Item")
Done = TypeVar("Done")

_MAX_THREADS = 8
# More processes were measured to gain nothing.
_MAX_PROCESSES = 16
# With fewer images than these for each, threads are done as soon as processes, which take half a second to start.
_IMAGES_PER_PROCESS = 200
# Images handed to a process at once: handing over each by itself would take a tenth of the time of decoding it.
_BLOCK = 16

# A bare interpreter, so that nothing of the caller's own program runs in it, as it would where multiprocessing spawns
# one. A batch system's SIGTERM goes to every process of a job, and is for the parent.
_PROGRAM = """\
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = {path!r}
from transfercache.images.processes import serve
serve()
"""
# numpy's libraries would start a thread a core in every process, for nothing.
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def decoding_workers(workers: int | None, n_images: int, *, is_light: bool = True) -> int:
    """Return how many threads or processes decode: as many as are asked for, else one a core, within bounds.

    The bounds are sixteen processes, where `n_images` are worth starting them, and otherwise eight threads.
    """
    if workers is not None:
        return workers
    cores = min(n_cores(), _MAX_PROCESSES)
    return cores if _is_worth_processes(cores, n_images, is_light=is_light) else min(cores, _MAX_THREADS)


def _is_worth_processes(workers: int, n_images: int, *, is_light: bool) -> bool:
    can_start = bool(sys.executable) and not getattr(sys, "frozen", False)  # else it is no interpreter
    return is_light and can_start and workers > _MAX_THREADS and n_images >= _IMAGES_PER_PROCESS * workers


def decode_ahead(
    items: Iterable[Item],
    decode: Callable[[Item], Done],
    *,
    n_images: int,
    workers: int | None,
    window: int,
    watch: Stopwatch,
    is_light: bool = True,
) -> Generator[tuple[Item, Future[Done]], None, None]:
    """Yield each item with the future of `decode` on it, in the order of `items`; at most `window` are under way.

    More than eight workers are processes, where there are images enough for them and `decode` is light: it loads no
    torch. It and the items are pickled then, and a process that ends early is a ResourceError. What the workers take is
    charged to "decode". Close the generator to end them.
    """
    n_workers = decoding_workers(workers, n_images, is_light=is_light)
    if not _is_worth_processes(n_workers, n_images, is_light=is_light):

        def timed(item: Item) -> Done:
            with watch.stage("decode"):
                return decode(item)

        yield from run_ahead(items, timed, workers=n_workers, window=window)
        return
    size = max(1, min(window // (2 * n_workers), _BLOCK))  # two blocks for each process even in a small window
    rest = iter(items)
    blocks: Iterable[list[Item]] = iter(lambda: list(itertools.islice(rest, size)), [])
    processes = _Processes(decode, watch)
    ahead = run_ahead(blocks, processes.run, workers=n_workers, window=window // size)
    # The processes end first: a thread that waits for one would hold up the end of the others.
    with closing(ahead), closing(processes):
        for block, outcomes in ahead:
            for item, outcome in zip(block, outcomes.result(), strict=True):
                yield item, _settled(outcome)


def _settled(outcome: Done | TlcError | MemoryError) -> Future[Done]:
    future: Future[Done] = Future()
    if isinstance(outcome, TlcError | MemoryError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return future


class _Processes(Generic[Item, Done]):
    """As many processes as there are threads that ask for one at a time."""

    def __init__(self, decode: Callable[[Item], Done], watch: Stopwatch) -> None:
        self._decode = decode
        self._watch = watch
        self._lock = threading.Lock()
        self._started: list[_Process] | None = []  # None: closed
        self._idle: SimpleQueue[_Process] = SimpleQueue()

    def run(self, block: Sequence[Item]) -> list[Done | TlcError | MemoryError]:
        """Return what came of each item of the block, in a process that has nothing else to do."""
        with self._watch.stage("decode"):
            process = self._take()
            outcomes = process.run(block)
        self._idle.put(process)  # not where an error may have left half a message in its pipe
        return outcomes

    def _take(self) -> _Process:
        with suppress(Empty):
            return self._idle.get_nowait()
        with self._lock:
            if self._started is None:
                raise RuntimeError("a process was asked for after the last one ended")
            process = _Process(self._decode)
            self._started.append(process)
        return process

    def close(self) -> None:
        """End the processes, whatever they are at: they hold nothing that anybody needs."""
        with self._lock:
            started, self._started = self._started or [], None
        for process in started:
            process.close()


class _Process:
    def __init__(self, decode: Callable[[Any], Any]) -> None:
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        ours, its = socket.socketpair()
        with its:
            try:
                self._popen = subprocess.Popen(
                    [sys.executable, "-X", f"utf8={sys.flags.utf8_mode}", "-c", _PROGRAM.format(path=path)],
                    stdin=its.fileno(),
                    stdout=subprocess.DEVNULL,  # whatever a library prints there
                    stderr=None if sys.stderr else subprocess.DEVNULL,
                    env={**os.environ, **_ONE_THREAD},
                    process_group=0,  # a terminal's Ctrl-C is for the parent
                )
            except OSError as error:
                ours.close()
                reason = error.strerror or error
                raise ResourceError(
                    f"no process could be started to decode images ({reason}); 8 --workers or fewer need none"
                ) from error
        with ours:  # closed with these two
            self._requests, self._answers = ours.makefile("wb"), ours.makefile("rb")
        self._decode: Callable[[Any], Any] | None = decode

    def run(self, block: Sequence[Any]) -> list[Any]:
        """Return what came of each item; raises ResourceError where the process was ended, by a lack of memory say."""
        outcomes = self._answer(block)
        if outcomes is None:  # not raised from what the broken pipe raised, which would be taken for that of stdout
            raise _why_it_ended(self._popen.wait())
        return outcomes

    def _answer(self, block: Sequence[Any]) -> list[Any] | None:
        try:
            if self._decode is not None:
                _send(self._decode, self._requests)
                self._decode = None
            _send(block, self._requests)
            outcomes: list[Any] = pickle.load(self._answers)
        except (EOFError, ConnectionError):
            return None
        return outcomes

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._answers.close()
        with suppress(ConnectionError):  # of a request that it did not live to read
            self._requests.close()


def _why_it_ended(code: int) -> Exception:
    if code >= 0:
        return RuntimeError(f"a process that decodes images failed (exit code {code}); its traceback is above")
    killed = "; a system short of memory does that, and fewer --workers need less" if code == -signal.SIGKILL else ""
    return ResourceError(
        f"a process that decodes images was ended (signal {-code}, {signal.strsignal(-code)}){killed}; "
        "run the same command again"
    )


def _send(value: object, pipe: IO[bytes]) -> None:
    pickle.dump(value, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def serve() -> None:
    """Decode the blocks that come and answer each, until the socket, which is stdin, ends: what such a process runs."""
    # Broken: the parent was killed.
    with suppress(ConnectionError), open(0, "rb", closefd=False) as requests, open(0, "wb", closefd=False) as answers:
        decode = _next(requests)
        while decode is not None and (block := _next(requests)) is not None:
            _send([_outcome(decode, item) for item in block], answers)


def _next(requests: IO[bytes]) -> Any:
    try:
        return pickle.load(requests)  # of the process that started this one
    except EOFError:
        return None


def _outcome(decode: Callable[[Any], Any], item: Any) -> Any:
    """Return what it decodes to, or why it cannot; any other error is a bug, and ends the process."""
    try:
        return decode(item)
    except (TlcError, MemoryError) as error:
        return error
