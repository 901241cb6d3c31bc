"""Ends a writer, as SIGKILL would, before a chosen call that changes a file, or in the middle of a write."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

# Every way in which the cache room, and files.py below it, change what is on the disk.
CALLS = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync", "fdatasync", "pwrite", "posix_fallocate", "fchmod")
KILLED = 9


def run_and_kill(work: Callable[[], object], *, before_call: int, is_torn: bool = False) -> bool:
    """Run `work` in a fork that ends before its call number `before_call`, or within it if that is a torn write.

    Returns whether it was ended. Forking with threads about is safe here: the child runs no code but ours, and ends by
    _exit; a test that uses this ignores the interpreter's warning of it.
    """
    pid = os.fork()
    if pid != 0:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, KILLED)
        return code == KILLED
    try:
        _count_calls(before_call, is_torn=is_torn)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def _count_calls(before_call: int, *, is_torn: bool) -> None:
    numbers = itertools.count()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **options: Any) -> Any:
            if next(numbers) == before_call:
                if name == "pwrite" and is_torn:
                    call(args[0], args[1][: len(args[1]) * 2 // 3], args[2])
                os._exit(KILLED)
            return call(*args, **options)

        return run

    for name in CALLS:
        if hasattr(os, name):  # macOS has no fdatasync and no posix_fallocate
            setattr(os, name, counted(name, getattr(os, name)))
