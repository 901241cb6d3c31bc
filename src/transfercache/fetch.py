"""Files from the network: downloads that resume and are verified, and archives that are unpacked safely."""

from __future__ import annotations

import http.client
import logging
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from transfercache.errors import DataError, DownloadError
from transfercache.files import locked, resource_errors, sha256_file
from transfercache.version import __version__

_LOG = logging.getLogger(__name__)
_BLOCK_BYTES = 1 << 18
#: For the name lookup, and for every answer of the server.
_WAIT_SECONDS = 5.0
#: 32 bits, as in the names of torch hub files; fewer digits would prove too little.
_MIN_DIGITS = 8
_NETWORK_ERRORS = (OSError, http.client.HTTPException)  # URLError and timeouts are OSErrors
# What zipfile raises for damage, for a compression it does not know (NotImplementedError), and for an encrypted member.
_ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError),
    *(FileExistsError, IsADirectoryError, NotADirectoryError),  # one member is a file and the folder of another
)


def download(url: str, destination: Path, *, sha256: str, max_bytes: int) -> Path:
    """Bring `url` to `destination`, verified, and return it; a file that is there and right needs no network.

    `sha256` is the digest in hex, or its first digits (at least 8). An interrupted download leaves
    `<destination>.part` and goes on from there. Every wait is bounded, not the whole. Where another
    process downloads the same file this one waits for it to end, and says so in the log.
    Raises DownloadError: unreachable, larger than `max_bytes`, or of another digest, and also where a file of
    another digest stands at `destination` already (it is never overwritten).
    """
    digits = sha256.lower()
    if not re.fullmatch(rf"[0-9a-f]{{{_MIN_DIGITS},64}}", digits):
        raise ValueError(f"sha256 {sha256!r} must be {_MIN_DIGITS} to 64 hex digits")
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"{url}: only http and https addresses are downloaded")
    if not destination.exists():
        with resource_errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
        lock, what = destination.with_name(f".{destination.name}.lock"), str(destination)
        waits = "%s: another process is downloading it; waiting for that to end"
        with locked(lock, what=what, on_wait=lambda: _LOG.warning(waits, what)):
            if not destination.exists():  # else the process that was waited for has brought it
                return _bring(url, destination, digits, max_bytes=max_bytes)
    _verify(destination, digits, "remove it and run the same command again")
    return destination


def _bring(url: str, destination: Path, digits: str, *, max_bytes: int) -> Path:
    part = destination.with_name(destination.name + ".part")
    _fill(part, url, destination, max_bytes=max_bytes)
    try:
        _verify(part, digits, f"nothing was kept of {url}; run the same command again")
    except DownloadError:
        part.unlink()
        raise
    os.replace(part, destination)
    return destination


def _verify(path: Path, digits: str, next_step: str) -> None:
    found = sha256_file(path)
    if not found.startswith(digits):
        raise DownloadError(f"{path}: its SHA-256 is {found[: len(digits)]}, expected {digits}; {next_step}")


def _fill(part: Path, url: str, destination: Path, *, max_bytes: int) -> None:
    """Bring `part` to its full length; a connection that broke after bringing something is taken up again."""
    while True:
        before = _size(part)
        try:
            if _receive(part, url, max_bytes=max_bytes):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            error.close()
            raise DownloadError(_unreachable(url, destination, f"HTTP {error.code} {error.reason}")) from None
        except _NETWORK_ERRORS as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if _size(part) <= before:
            raise DownloadError(_unreachable(url, destination, reason))
        _LOG.info("%s: %s after %d bytes; going on from there", url, reason, _size(part))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unreachable(url: str, destination: Path, reason: str) -> str:
    return (
        f"{url}: cannot be downloaded ({reason}); run the same command again where the network reaches it, "
        f"or put the file at {destination} yourself"
    )


def _receive(part: Path, url: str, *, max_bytes: int) -> bool:
    """Append what the server sends to `part`, little more than `max_bytes` in all; True where that completes it."""
    held = _size(part)
    headers = {"User-Agent": f"transfercache/{__version__}", "Accept-Encoding": "identity"}
    if held:
        headers["Range"] = f"bytes={held}-"
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=_WAIT_SECONDS)
    except urllib.error.HTTPError as error:
        if held and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            error.close()
            return True  # nothing lies beyond what is held; the digest decides whether that is the file
        raise
    with response:
        goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT and _range_start(response) == held
        held = held if goes_on else 0
        length = response.headers.get("Content-Length", "")
        total = held + int(length) if length.isdecimal() else None
        if total is not None and total > max_bytes:
            raise _too_large(url, max_bytes)
        with resource_errors(part), open(part, "ab" if goes_on else "wb") as file:
            held = _copy(response, file, url, held=held, total=total, max_bytes=max_bytes)
    if held > max_bytes:
        part.unlink()
        raise _too_large(url, max_bytes)
    return total is None or held == total


class _NameLookup(urllib.request.BaseHandler):
    """Waits for the lookup of the host, or of its proxy, before it is connected to: no socket timeout bounds that."""

    handler_order = 300  # after ProxyHandler, which puts the proxy in the host's place; before those that connect

    def http_open(self, request: urllib.request.Request) -> None:
        host = urllib.parse.urlsplit(f"//{request.host}").hostname
        # A daemon: a lookup that never ends must not keep the process.
        lookup = threading.Thread(target=_look_up, args=(host,), daemon=True)
        lookup.start()
        lookup.join(_WAIT_SECONDS)
        if lookup.is_alive():
            raise TimeoutError(f"no answer to the name lookup of {host} within {_WAIT_SECONDS:g} s")

    https_open = http_open


def _look_up(host: str | None) -> None:
    with suppress(OSError, UnicodeError):  # connecting will say so
        socket.getaddrinfo(host, None)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener without urllib's file, ftp and data handlers, so that no redirect leads to them."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _NameLookup(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _range_start(response: Any) -> int:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def _copy(response: Any, file: IO[bytes], url: str, *, held: int, total: int | None, max_bytes: int) -> int:
    name = url.rsplit("/", 1)[-1]
    with tqdm(
        desc=name, initial=held, total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None
    ) as progress:
        while held <= max_bytes and (block := response.read(_BLOCK_BYTES)):
            held += file.write(block)
            progress.update(len(block))
    return held


def _too_large(url: str, max_bytes: int) -> DownloadError:
    return DownloadError(f"{url}: larger than the {max_bytes} bytes that are expected at most; check the address")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling to fill, which becomes `folder` when the block ends well and is removed otherwise.

    Where another process made `folder` meanwhile, that one stays.
    """
    with resource_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            temporary.chmod(0o755)  # mkdtemp's 0700 would hide a shared folder from others
            yield temporary
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def unpack_zip(archive: Path, folder: Path, *, max_bytes: int, max_files: int) -> None:
    """Unpack `archive` into the new folder `folder`, all of it or nothing.

    Raises DataError, before anything is written, for an absolute or `..` member, a link or other special file, an
    encrypted or repeated one, and for more files or unpacked bytes than are allowed; also for a damaged archive.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            _check_members(archive, members, max_bytes=max_bytes, max_files=max_files)
            with whole_folder(folder) as temporary:
                for member in members:
                    _unpack_member(opened, member, temporary)
    except _ARCHIVE_ERRORS as error:
        raise DataError(f"{archive}: not a readable zip archive ({error}); remove it and fetch it again") from error


def _check_members(archive: Path, members: list[zipfile.ZipInfo], *, max_bytes: int, max_files: int) -> None:
    # zipfile never yields more bytes for a member than its header declares, so the declared sizes bound the total.
    if len(members) > max_files:
        raise DataError(f"{archive}: holds {len(members)} files, more than the {max_files} expected; not unpacked")
    n_bytes = sum(member.file_size for member in members)
    if n_bytes > max_bytes:
        raise DataError(f"{archive}: unpacks to {n_bytes} bytes, more than the {max_bytes} expected; not unpacked")
    seen: set[str] = set()
    for member in members:
        fault = _fault(member) or ("named twice" if member.filename in seen else None)
        if fault:
            raise DataError(f"{archive}: its member {member.filename!r} is {fault}; not unpacked")
        seen.add(member.filename)


def _fault(member: zipfile.ZipInfo) -> str | None:
    parts = member.filename.split("/")
    if member.filename.startswith("/") or ":" in parts[0] or "\\" in member.filename:
        return "an absolute path"
    if ".." in parts:
        return "a path that leaves the folder"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a special file"
    return "encrypted" if member.flag_bits & 1 else None


def _unpack_member(opened: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / member.filename
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(member) as source, open(target, "xb") as file:
        shutil.copyfileobj(source, file, _BLOCK_BYTES)
