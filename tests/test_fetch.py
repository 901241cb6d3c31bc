from __future__ import annotations

import hashlib
import http.server
import os
import re
import socket
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from transfercache import fetch as fetch_module
from transfercache.errors import DataError, DownloadError
from transfercache.fetch import download, unpack_zip, whole_folder
from transfercache.files import locked

BODY = bytes(range(256)) * 4000  # 1,024,000 bytes
DIGEST = hashlib.sha256(BODY).hexdigest()


@dataclass
class Server:
    """What the next answers shall be like, and the requests that came."""

    url: str = ""
    cut_after: int | None = None  # bytes of body that one answer sends before the connection closes
    honours_range: bool = True
    sends_length: bool = True
    redirect_to: str = ""
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    """A real HTTP server on this machine that serves BODY at /file.bin and nothing else."""
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.endswith("/file.bin"):
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            if state.redirect_to:
                self.send_response(302)
                self.send_header("Location", state.redirect_to)
                self.end_headers()
                return
            start = int(re.findall(r"\d+", asked)[0]) if asked and state.honours_range else 0
            if start >= len(BODY):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
            if state.sends_length:
                self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            end = len(BODY) if state.cut_after is None else start + state.cut_after
            self.wfile.write(BODY[start:end])

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state.url = f"http://127.0.0.1:{running.server_port}/file.bin"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield state
        running.shutdown()
        thread.join()


def fetch(url: str, destination: Path, *, sha256: str = DIGEST, max_bytes: int = 2_000_000) -> Path:
    return download(url, destination, sha256=sha256, max_bytes=max_bytes)


@pytest.mark.parametrize("digits", [64, 8])
def test_download__verifies_and_is_not_repeated(server: Server, tmp_path: Path, digits: int) -> None:
    destination = tmp_path / "new" / "file.bin"
    assert fetch(server.url, destination, sha256=DIGEST[:digits].upper()) == destination
    assert destination.read_bytes() == BODY
    fetch(server.url, destination)
    assert server.ranges == [None]
    assert not destination.with_name("file.bin.part").exists()


def test_download__goes_on_from_a_part(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY[:300_000])
    assert fetch(server.url, tmp_path / "file.bin").read_bytes() == BODY
    assert server.ranges == ["bytes=300000-"]


def test_download__a_complete_part_needs_no_more_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY)
    assert fetch(server.url, tmp_path / "file.bin").read_bytes() == BODY


def test_download__a_server_without_range_starts_again(server: Server, tmp_path: Path) -> None:
    server.honours_range = False
    (tmp_path / "file.bin.part").write_bytes(b"x" * 300_000)
    assert fetch(server.url, tmp_path / "file.bin").read_bytes() == BODY


def test_download__connection_that_breaks_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.cut_after = 400_000
    assert fetch(server.url, tmp_path / "file.bin").read_bytes() == BODY
    assert server.ranges == [None, "bytes=400000-", "bytes=800000-"]


def test_download__truncated_body_is_kept_as_a_part_and_named(server: Server, tmp_path: Path) -> None:
    server.cut_after, server.honours_range = 400_000, False
    with pytest.raises(DownloadError, match=r"file\.bin: cannot be downloaded \(the connection ended early\); run the"):
        fetch(server.url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").stat().st_size == 400_000
    assert not (tmp_path / "file.bin").exists()


def test_download__wrong_digest_keeps_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=rf"its SHA-256 is {DIGEST[:8]}, expected 00000000; nothing was kept"):
        fetch(server.url, tmp_path / "file.bin", sha256="0" * 8)
    assert not list(tmp_path.glob("file*"))


def test_download__file_of_another_digest_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(DownloadError, match=r"file\.bin: its SHA-256 is .* remove it and run the same command again"):
        fetch("http://127.0.0.1:9/file.bin", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("sends_length", [True, False])
def test_download__larger_than_expected_keeps_nothing(server: Server, tmp_path: Path, sends_length: bool) -> None:
    server.sends_length = sends_length
    with pytest.raises(DownloadError, match="larger than the 500000 bytes that are expected at most"):
        fetch(server.url, tmp_path / "file.bin", max_bytes=500_000)
    assert not list(tmp_path.glob("file*"))


def test_download__unreachable_says_url_and_way_out(tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch("http://127.0.0.1:9/file.bin", tmp_path / "file.bin")
    message = str(caught.value)
    assert message.startswith("http://127.0.0.1:9/file.bin: cannot be downloaded (")
    assert message.endswith(f"or put the file at {tmp_path / 'file.bin'} yourself")
    assert caught.value.exit_code == 5


def test_download__name_lookup_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(fetch_module, "_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: ended.wait(60))
    try:
        with pytest.raises(
            DownloadError, match=r"no answer to the name lookup of some\.host within 0\.05 s\); run the"
        ):
            fetch("https://some.host:444/file.bin", tmp_path / "file.bin")
    finally:
        ended.set()


def test_download__through_a_proxy_looks_up_no_other_host(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts: list[str] = []
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args: hosts.append(host) or real(host, *args))
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/file.bin"))
    assert fetch("http://some.host/file.bin", tmp_path / "file.bin").read_bytes() == BODY
    assert set(hosts) == {"127.0.0.1"}


def test_download__missing_on_the_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot be downloaded \(HTTP 404 Not Found\)"):
        fetch(server.url.replace("file.bin", "other"), tmp_path / "file.bin")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/file.bin", "/etc/hostname"])
def test_download__only_http(server: Server, tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http and https"):
        fetch(url, tmp_path / "file.bin")
    server.redirect_to = url
    with pytest.raises(DownloadError):
        fetch(server.url, tmp_path / "file.bin")


def test_download__too_few_digits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 to 64 hex digits"):
        fetch("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", sha256="abcd")


def test_download__of_a_file_that_others_download__waits_and_finds_it(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    destination, n_others = tmp_path / "file.bin", 3
    deadline = time.monotonic() + 20
    with ThreadPoolExecutor(n_others) as pool:
        with locked(tmp_path / ".file.bin.lock", what="x"):
            found = [pool.submit(fetch, server.url, destination) for _ in range(n_others)]
            while len(caplog.messages) < n_others and time.monotonic() < deadline:
                time.sleep(0.01)
            assert server.ranges == []
        assert [each.result() for each in found] == [destination] * n_others
    assert caplog.messages == [f"{destination}: another process is downloading it; waiting for that to end"] * n_others
    assert server.ranges == [None]  # the first of them, as whoever held the lock had brought nothing
    assert destination.read_bytes() == BODY


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def symlink_member() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("data/link.jpg")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def unpack(archive: Path, folder: Path) -> None:
    unpack_zip(archive, folder, max_bytes=1000, max_files=4)


def test_unpack_zip__files_and_folders(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("data/", b""), ("data/ants/a.jpg", b"ant"), ("data/bees/b.jpg", b"bee"))
    unpack(archive, tmp_path / "out" / "set")
    assert (tmp_path / "out/set/data/ants/a.jpg").read_bytes() == b"ant"
    assert sorted(os.listdir(tmp_path / "out")) == ["set"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil.jpg", b"x")], r"its member '../evil.jpg' is a path that leaves the folder; not unpacked"),
        ([("ok/../../evil.jpg", b"x")], "leaves the folder"),
        ([("/evil.jpg", b"x")], "its member '/evil.jpg' is an absolute path"),
        ([("C:/evil.jpg", b"x")], "is an absolute path"),
        ([(symlink_member(), b"/etc/hostname")], "'data/link.jpg' is a link or a special file"),
        ([("big.jpg", b"0" * 1001)], "unpacks to 1002 bytes, more than the 1000 expected"),
        ([(f"{number}.jpg", b"x") for number in range(5)], "holds 6 files, more than the 4 expected"),
    ],
)
def test_unpack_zip__hostile_archive_leaves_nothing(tmp_path: Path, members: list[Any], message: str) -> None:
    archive = make_zip(tmp_path / "a.zip", ("data/good.jpg", b"x"), *members)
    with pytest.raises(DataError, match=message):
        unpack(archive, tmp_path / "in" / "out")
    assert not (tmp_path / "in").exists()
    assert not list(tmp_path.glob("**/evil.jpg"))


def test_unpack_zip__member_named_twice(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make_zip(tmp_path / "a.zip", ("a.jpg", b"x"), ("a.jpg", b"y"))
    with pytest.raises(DataError, match=r"'a\.jpg' is named twice"):
        unpack(archive, tmp_path / "out")


def test_unpack_zip__member_that_is_file_and_folder(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a", b"x"), ("a/b.jpg", b"y"))
    with pytest.raises(DataError, match="not a readable zip archive"):
        unpack(archive, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.zip"]


def test_unpack_zip__size_in_the_header_is_a_lie(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a.jpg", b"0" * 900_000))
    declared = (900_000).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(declared, (10).to_bytes(4, "little")))
    with pytest.raises(DataError, match="not a readable zip archive"):
        unpack(archive, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.zip"]


def test_unpack_zip__damaged_and_not_an_archive(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", ("a.jpg", os.urandom(900)))
    data = bytearray(archive.read_bytes())
    data[200] ^= 0xFF
    archive.write_bytes(data)
    (tmp_path / "b.zip").write_bytes(b"<html>")
    for path in (archive, tmp_path / "b.zip"):
        with pytest.raises(DataError, match=rf"{path.name}: not a readable zip archive"):
            unpack(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "b.zip"]


def test_whole_folder__an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "made") as temporary:  # noqa: PT012
        (temporary / "a").write_bytes(b"x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_whole_folder__made_by_another_process_meanwhile(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "made") as temporary:
        (temporary / "a").write_bytes(b"mine")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "a").write_bytes(b"theirs")
    assert (tmp_path / "made" / "a").read_bytes() == b"theirs"
    assert sorted(os.listdir(tmp_path)) == ["made"]
