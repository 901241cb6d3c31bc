"""Images decoded ahead of their reader: in threads, or on a machine of many cores in processes of their own.

Decoding in threads releases the interpreter lock and takes it back a dozen times an image, so that beyond some eight
threads they wait for it, and the thread that feeds a GPU with them (docs/experiments.md has the measurements).
"""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, Generic, TypeVar, cast

from transfercache.environment import n_cores
from transfercache.errors import ResourceError, TlcError
from transfercache.images.ahead import run_ahead
from transfercache.stopwatch import Stopwatch

Item = TypeVar("Item")
Done = TypeVar("Done")

_MAX_THREADS = 8
# Fewer images than these for each process are decoded before the processes have started.
_IMAGES_PER_PROCESS = 100
# Images handed to a process at once: handing over each by itself would take a tenth of the time of decoding it.
_BLOCK = 16

# A bare interpreter, so that nothing of the caller's own program runs in it, as it would where multiprocessing spawns
# one. The group's Ctrl-C and a batch system's SIGTERM are for the parent, whose end, however it comes, is the pipe's.
_PROGRAM = """\
import sys
sys.path[:] = {path!r}
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from transfercache.images.processes import serve
serve()
"""


def decoding_workers(workers: int | None, n_images: int) -> int:
    """Return how many threads or processes decode: as many as are asked for, else one a core.

    By default there are at most eight for a number of images that is not worth starting processes for.
    """
    cores = n_cores()
    return workers or (cores if _is_worth_processes(cores, n_images) else min(cores, _MAX_THREADS))


def _is_worth_processes(workers: int, n_images: int) -> bool:
    return workers > _MAX_THREADS and n_images >= _IMAGES_PER_PROCESS * workers


def decode_ahead(
    items: Iterable[Item],
    decode: Callable[[Item], Done],
    *,
    n_items: int,
    workers: int | None,
    window: int,
    watch: Stopwatch,
) -> Generator[tuple[Item, Future[Done]], None, None]:
    """Yield each item with the future of `decode` on it, in the order of `items`; at most `window` are under way.

    More than eight workers are processes, where there are images enough for them: `decode` and the items are then
    pickled, and a process that ends is a ResourceError. What the workers take is charged to "decode". Close the
    generator to end them early.
    """
    n_workers = decoding_workers(workers, n_items)
    if not _is_worth_processes(n_workers, n_items):

        def timed(item: Item) -> Done:
            with watch.stage("decode"):
                return decode(item)

        yield from run_ahead(items, timed, workers=n_workers, window=window)
        return
    with closing(_Processes(decode, watch)) as processes:
        size = max(1, min(window // (2 * n_workers), _BLOCK))  # two blocks for each process even in a small window
        rest = iter(items)
        blocks: Iterable[list[Item]] = iter(lambda: list(itertools.islice(rest, size)), [])
        with closing(run_ahead(blocks, processes.run, workers=n_workers, window=window // size)) as ahead:
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
        self._idle: SimpleQueue[_Process] = SimpleQueue()

    def run(self, block: Sequence[Item]) -> list[Done | TlcError | MemoryError]:
        """Return what came of each item of the block, in a process that has nothing else to do."""
        try:
            process = self._idle.get_nowait()
        except Empty:
            process = _Process(self._decode)
        try:
            with self._watch.stage("decode"):
                return process.run(block)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes, none of which has anything to do by then."""
        while not self._idle.empty():
            self._idle.get().close()


class _Process:
    def __init__(self, decode: Callable[[Any], Any]) -> None:
        program = _PROGRAM.format(path=sys.path)
        self._popen = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._decode: Callable[[Any], Any] | None = decode

    def run(self, block: Sequence[Any]) -> list[Any]:
        """Return what came of each item; raises ResourceError where the process has ended."""
        try:
            if self._decode is not None:
                _send(self._decode, self._popen.stdin)
                self._decode = None
            _send(block, self._popen.stdin)
            outcomes: list[Any] = pickle.load(cast("BinaryIO", self._popen.stdout))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise ResourceError(_how_it_ended(self._popen.wait())) from error
        return outcomes

    def close(self) -> None:
        with suppress(BrokenPipeError), self._popen:  # closes the pipes, which ends it, and waits
            pass


def _how_it_ended(code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
    hint = "; a system short of memory does that, and fewer --workers need less" if code == -signal.SIGKILL else ""
    return f"a process that decodes images ended ({how}){hint}; run the same command again"


def _send(value: object, file: Any) -> None:
    pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)
    file.flush()


def serve() -> None:
    """Decode the blocks that come on stdin and answer each on stdout, until stdin ends: what such a process runs."""
    requests = sys.stdin.buffer
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as answers:  # broken: the parent was killed
        os.dup2(2, 1)  # what a library prints must not get among the answers
        decode = _next(requests)
        while decode is not None and (block := _next(requests)) is not None:
            _send([_outcome(decode, item) for item in block], answers)


def _next(requests: BinaryIO) -> Any:
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
