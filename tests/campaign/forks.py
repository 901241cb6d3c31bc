"""A process that has imported everything once and forks itself for each command: real processes, without the wait.

Run as a script it takes a `Command` a line on stdin, as JSON, and answers each with its `Ended` on stdout. Torch has
one thread here: the others that it starts for its operations would not be there in a fork, which would wait for them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

# Every way in which the cache room, and files.py below it, change what is on the disk.
CALLS = ("mkdir", "replace", "rename", "unlink", "fsync", "fdatasync", "pwrite", "posix_fallocate", "fchmod")
# A thousand by default: then a made cache of some fifty rows would be committed once.
ROWS_PER_COMMIT = 8
# What hangs is ended by its alarm, so that the test that started it says so.
DEADLINE_SECONDS = 120
# Before each call of a command that is to be killed: who has read of it may find it still to come.
PAUSE_SECONDS = 0.0005
#: Loaded once, with random weights, for all forks.
BACKBONE = "mobilenet_v3_small"
#: OpenVINO would start threads of its own, and convert the network in a fork whose calls are counted.
ENGINE = "--engine=eager"
#: Instead of 224.
FINETUNED_PIXELS = 96
_FILLER = "filler"


@dataclass(frozen=True)
class Command:
    """The words of one `tlc`, and what becomes of it: `*_at` are numbers of lines in its report of its own calls."""

    words: list[str]
    kill_at: int | None = None  # SIGKILL as soon as this line has been read, and `delay` has passed
    delay: float = 0.0  # seconds
    fill_at: int | None = None  # before this call another program takes all the space that is left ...
    fill: str = ""  # ... in this folder


@dataclass(frozen=True)
class Call:
    """One call that changes a file, before it runs or after it has returned."""

    is_before: bool
    name: str
    target: str  # the path that it changes, or the number of the open file
    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (a signal's number negated), what it wrote, and its calls in order."""

    code: int
    out: str
    err: str
    calls: list[Call]


class Forks:
    """Runs commands in forks of one process, one after the other; `inside` are words that it is started with."""

    def __init__(self, inside: Sequence[str] = ()) -> None:
        # Two threads an operation would also wait for each other wherever the cores are busy.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*inside, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    @property
    def pid(self) -> int:
        """The number of the process that forks."""
        return self._process.pid

    def run(self, command: Command) -> Ended:
        """Run one command to its end, whatever that is."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(command)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process to fork from has died; what it said is on stderr"
        answer = json.loads(line)
        # What computes, in words of this machine, is no part of how a command ended.
        err = re.sub(r"\Aengine [^\n]*\n", "", answer["err"])
        return Ended(answer["code"], answer["out"], err, [Call(*call) for call in answer["calls"]])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _serve() -> None:
    for line in sys.stdin:
        command = Command(**json.loads(line))
        with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
            code, calls = _run(command, out.fileno(), err.fileno())
            texts = [_text_of(file.fileno()) for file in (out, err)]
        print(json.dumps({"code": code, "out": texts[0], "err": texts[1], "calls": calls}), flush=True)


def _text_of(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode("utf-8", "surrogateescape")


def _run(command: Command, out: int, err: int) -> tuple[int, list[Any]]:
    """Fork, read the report until its end, kill at the line that is planned; return exit code and calls."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _become(command, writing, out, err)
    os.close(writing)
    calls = []
    with open(reading, "rb") as report:
        for number, line in enumerate(report):
            if number == command.kill_at:
                time.sleep(command.delay)
                # Not waited for yet, so that the number is still its own.
                os.kill(pid, signal.SIGKILL)
            # The last line of a killed process may be cut.
            with contextlib.suppress(ValueError):
                calls.append(json.loads(line))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), calls


def _become(command: Command, report: int, out: int, err: int) -> NoReturn:
    from transfercache.cli import main
    from transfercache.extract import loop
    from transfercache.finetuning import checkpoints

    code = 1
    try:
        signal.alarm(DEADLINE_SECONDS)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.argv = ["tlc", *command.words]
        loop._ROWS_PER_COMMIT = ROWS_PER_COMMIT
        checkpoints._SECONDS_BETWEEN = 0.0
        _report_calls(report, command)
        main.run()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        os._exit(code)


def _report_calls(report: int, command: Command) -> None:
    """Make every call that changes a file report itself before and after."""
    numbers = itertools.count()

    def say(is_before: bool, described: tuple[str, str, int, int]) -> None:
        if next(numbers) == command.fill_at:
            fill_disk(Path(command.fill))
        # Below PIPE_BUF bytes, so that a line is whole.
        os.write(report, json.dumps([is_before, *described]).encode() + b"\n")

    def reported(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **options: Any) -> Any:
            described = _described(name, args)
            say(True, described)
            if command.kill_at is not None:
                time.sleep(PAUSE_SECONDS)
            result = call(*args, **options)
            say(False, described)
            return result

        return run

    for name in CALLS:
        if hasattr(os, name):  # macOS has no fdatasync and no posix_fallocate
            setattr(os, name, reported(name, getattr(os, name)))


def _described(name: str, args: tuple[Any, ...]) -> tuple[str, str, int, int]:
    if name in ("replace", "rename"):
        return name, os.fspath(args[1]), 0, 0
    target = str(args[0]) if isinstance(args[0], int) else os.fspath(args[0])
    if name == "pwrite":
        return name, target, args[2], len(args[1])
    return name, target, 0, 0


def fill_disk(folder: Path) -> None:
    """Write a file there until nothing more fits."""
    with open(folder / _FILLER, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def empty_disk(folder: Path) -> None:
    """Remove what `fill_disk` wrote."""
    (folder / _FILLER).unlink(missing_ok=True)


def _load_smaller(name: str, *, weights: str) -> Any:
    """The backbone on images of FINETUNED_PIXELS, so that an epoch of fine-tuning is soon over."""
    from transfercache.backbones.registry import load_backbone

    backbone = load_backbone(name, weights=weights)
    pixels = replace(backbone.preprocessing, resize=FINETUNED_PIXELS, crop=FINETUNED_PIXELS)
    return replace(backbone, preprocessing=pixels)


@contextlib.contextmanager
def forking(inside: Sequence[str] = ()) -> Iterator[Forks]:
    """A process to fork from, for the block."""
    forks = Forks(inside)
    try:
        yield forks
    finally:
        forks.close()


if __name__ == "__main__":
    # What every fork would else import and load for itself.
    from transfercache.cli import main as cli
    from transfercache.commands import extract, finetune
    from transfercache.errors import DataError

    extract.find_backbone = functools.cache(extract.find_backbone)
    finetune.load_backbone = functools.cache(_load_smaller)
    extract.find_backbone(BACKBONE, weights="random")
    with contextlib.suppress(DataError):
        cli.app(["extract-features", "no such data"], prog_name="tlc", standalone_mode=False)
    _serve()
    os._exit(0)  # at once: torch takes a second to go
