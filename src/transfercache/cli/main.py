"""The program `tlc`: one line on stderr and an exit code for every error; results on stdout."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer

from transfercache.cli import cache_handlers, handlers
from transfercache.errors import ResourceError, Terminated, TlcError
from transfercache.text import one_line
from transfercache.version import __version__

EPILOG = (
    "Exit codes: 0 done, 1 a bug in tlc, 2 the command's words, 3 the data, 4 a cache or model file, 5 weights or a "
    "download, 6 a resource (disk, permission, device, memory, another writer), 141 a closed pipe, 130 and 143 "
    "interrupted: extract-features, compare and demo keep what was computed, finetune its checkpoints."
)

#: What an interrupted command keeps, where there is anything to say about it.
_KEPT = {
    **dict.fromkeys(
        ("extract-features", "compare", "demo"),
        "; what was computed is kept, and the same command goes on from there",
    ),
    "finetune": "; its checkpoints, if any, are kept, and the same command with --resume goes on from the last one",
}

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="tlc",
    help="Transfer learning with the frozen part computed once: linear heads in seconds, fine-tuning beside them.",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
handlers.register(app)
cache_handlers.register(app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"tlc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Take the options that stand before a command's name."""


def run() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    # A user adds --debug to the end of the command that failed, so it may stand anywhere.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if arguments in ([], ["cache"]):  # a group of commands alone shows what it has
        arguments.append("--help")
    _set_up_streams()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _exit_code(arguments, is_debug="--debug" in sys.argv[1:])
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # a shell's >&- leaves none
                stream.flush()
    except OSError as error:
        code = _leave(error)
    sys.exit(code)


def _set_up_streams() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File and class names may hold what the terminal's encoding lacks; half a table would be worse.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("tlc: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


class _OneLine(logging.Formatter):
    """One line a message, whatever the file names in it hold."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def _exit_code(arguments: list[str], *, is_debug: bool) -> int:
    kept = _KEPT.get(arguments[0], "")
    try:
        result = app(arguments, prog_name="tlc", standalone_mode=False)
    except BaseException as error:  # noqa: BLE001 - the one place that turns an error into an exit code
        return _report(error, kept=kept, is_debug=is_debug)
    if result == 130:
        _say(f"interrupted{kept}")
    return result if isinstance(result, int) else 0


def _report(error: BaseException, *, kept: str, is_debug: bool) -> int:
    # Typer turns a broken pipe into SystemExit(1).
    pipe = error if isinstance(error, BrokenPipeError) else error.__context__
    if isinstance(pipe, BrokenPipeError):
        raise pipe
    if isinstance(error, OSError) and error.errno in _NO_SPACE:  # stdout: files that stay have an error of their own
        raise error
    if is_debug:
        traceback.print_exception(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        _say(f"interrupted{kept}")
        return 130
    if isinstance(error, (TlcError, typer.TyperException)):
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        _say(f"{message}{kept if isinstance(error, Terminated) else ''}")
        return error.exit_code
    if isinstance(error, MemoryError):
        _say("out of memory; a smaller --batch-size or fewer --workers need less")
        return ResourceError.exit_code
    if isinstance(error, PermissionError) and error.filename is not None:
        # Paths are looked at in many places, and below a folder that may not be searched each look is refused.
        _say(f"{error.filename}: {error.strerror}; change its permissions or its folder's, or choose another path")
        return ResourceError.exit_code
    _say(f"a bug in tlc: {type(error).__name__}: {error}; run it again with --debug and report the traceback")
    return 1


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated("told to end (SIGTERM)")


def _say(message: str) -> None:
    print(f"tlc: {one_line(message)}", file=sys.stderr)


def _leave(error: OSError) -> int:
    """Leave where our output takes no more: its disk is full, or its reader has gone, and there is nothing to say."""
    is_pipe = isinstance(error, BrokenPipeError)
    if not is_pipe:
        with suppress(OSError):  # stderr may be on that disk too
            what = f"the output or a temporary file cannot be written ({error.strerror})"
            _say(f"{what}; free some space and run the same command again")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # what is still buffered would fail again when Python ends
        os.dup2(nowhere, descriptor)
    return 141 if is_pipe else ResourceError.exit_code  # 141: as a shell reports SIGPIPE
