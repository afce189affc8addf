"""Archives from a server that cuts connections, lies about ranges and changes its files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.storage import open_store
from data_prep import download as fetching
from data_prep.download import FILES, LICENSE, FetchError, check_archives, fetch
from data_prep.places2 import ARCHIVES, LISTS, Published
from pipeline import cli
from pipeline.arguments.common import DONE, MISTAKE

NAME, FILE = "places2-val-256", "val_256.tar"
DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves ``data``; ``answers`` are used up first, one per request, then it is honest."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag = DATA, '"one"'
        self.answers: deque[Answer] = deque()
        self.ranges: list[str | None] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/places"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers["Range"])
        answer = self.server.answers.popleft() if self.server.answers else honest
        assert self.path == f"/places/{FILE}"
        with contextlib.suppress(OSError):  # the client was killed, or had enough
            answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def begin(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        self.server.sent += len(data)  # before: the client may look as soon as it has all
        self.wfile.write(data)

    @property
    def first(self) -> int:
        return int((self.headers["Range"] or "bytes=0-")[len("bytes=") : -1])


Answer = Callable[[Handler], None]


def honest(handler: Handler, cut_after: int | None = None) -> None:
    """As RFC 9110 has it, except that the connection may end early."""
    data, etag = handler.server.data, handler.server.etag
    first = handler.first
    if handler.headers["If-Range"] not in (None, etag):
        first = 0
    rest = data[first:]
    given = f"bytes {first}-{len(data) - 1}/{len(data)}" if first else None
    handler.begin(206 if first else 200, Content_Length=len(rest), Content_Range=given, ETag=etag)
    handler.body(rest[:cut_after])


def cut(after: int) -> Answer:
    return lambda handler: honest(handler, after)


def whole(status: int = 200, **headers: object) -> Answer:
    """The whole file from its first byte, whatever was asked for."""

    def answer(handler: Handler) -> None:
        headers.setdefault("Content_Length", len(handler.server.data))
        handler.begin(status, **headers)
        handler.body(handler.server.data)

    return answer


def error(status: int, **headers: object) -> Answer:
    return lambda handler: handler.begin(status, Content_Length=0, **headers)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(ARCHIVES, FILE, published(DATA))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(data: bytes) -> Published:
    return Published(hashlib.md5(data).hexdigest(), len(data))


def fetched(server: Server, out: Path, tries: int = 4, timeout_s: float = 5.0) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "TRIES", tries)
        patch.setattr(fetching, "TIMEOUT_S", timeout_s)
        patch.setattr(fetching, "FIRST_WAIT_S", 0.01)
        return fetch(NAME, out, accept_license=True, base_url=server.url)


def assert_whole(path: Path, data: bytes = DATA) -> None:
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]


def test_every_archive_with_a_published_md5_has_a_name() -> None:
    assert sorted(FILES.values()) == sorted(ARCHIVES)


def test_nothing_happens_before_the_license_is_accepted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--accept-license") as refused:
        fetch(NAME, tmp_path / "out", accept_license=False, base_url=server.url)
    assert LICENSE in str(refused.value)
    assert "\n" not in str(refused.value)
    assert server.ranges == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_archive_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"places2-val-512 is unknown: .*places2-val-256"):
        fetch("places2-val-512", tmp_path, accept_license=True)


@pytest.mark.parametrize(
    "url", ["file:///data", "places/", "http://", "http://u:secret@127.0.0.1/", "http://h:port/"]
)
def test_an_invalid_address_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"address|user name") as refused:
        fetch(NAME, tmp_path, accept_license=True, base_url=url)
    assert "secret" not in str(refused.value)


def test_an_archive_arrives_once(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        path = fetch(
            NAME,
            tmp_path / "new" / "folder",
            accept_license=True,
            base_url=server.url,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert path == tmp_path / "new" / "folder" / FILE
        assert_whole(path)
        assert seen[-1] == (len(DATA), len(DATA))
    assert len(server.ranges) == 1


def test_an_interrupted_download_resumes_without_asking_twice_for_a_byte(
    server: Server, tmp_path: Path
) -> None:
    server.answers.extend([cut(100_000), cut(0), cut(150_000)])
    assert_whole(fetched(server, tmp_path))
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=250000-"]
    assert server.sent == len(DATA)


def test_progress_resets_the_count_of_failures(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PROGRESS_BYTES", 10_000)
    server.answers.extend([cut(10_000), cut(0)] * 10)
    assert_whole(fetched(server, tmp_path, tries=3))


def test_after_so_many_failures_the_part_is_kept_for_the_next_command(
    server: Server, tmp_path: Path
) -> None:
    server.answers.extend([cut(100_000), *[cut(0)] * 3])
    with pytest.raises(FetchError, match=r"gave up after 4 tries with 100,000 bytes kept"):
        fetched(server, tmp_path)
    assert len(server.ranges) == 4
    assert not (tmp_path / FILE).exists()
    assert_whole(fetched(server, tmp_path))
    assert server.sent == len(DATA)


def test_a_server_that_ignores_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.answers.extend([cut(100_000), whole()])
    assert_whole(fetched(server, tmp_path))


@pytest.mark.parametrize(
    "lie",
    [
        whole(206, Content_Range="bytes 0-299999/300000"),
        whole(206, Content_Range="bytes 100000-299999/300000"),
        whole(206, Content_Range="bytes 100000-299999/300000", Content_Length="200000"),
        whole(206, Content_Range="bytes 100000-399999/300000"),
        whole(206, Content_Range="bytes 100000-5/300000"),
        whole(206, Content_Range="items 1-2/3"),
        whole(206),
        error(416),
    ],
    ids=["start", "length", "content", "end", "reversed", "unit", "none", "refused"],
)
def test_a_lie_about_ranges_never_makes_a_wrong_file(
    server: Server, tmp_path: Path, lie: Answer
) -> None:
    server.answers.extend([cut(100_000), lie])
    assert_whole(fetched(server, tmp_path))
    assert server.ranges == [None, "bytes=100000-", None]


def test_a_range_shorter_than_requested_is_continued(server: Server, tmp_path: Path) -> None:
    def some(handler: Handler) -> None:
        given = "bytes 100000-199999/300000"
        handler.begin(206, Content_Length=100_000, Content_Range=given, ETag=server.etag)
        handler.body(DATA[100_000:200_000])

    server.answers.extend([cut(100_000), some])
    assert_whole(fetched(server, tmp_path))
    assert server.sent == len(DATA)


def ignoring_if_range(handler: Handler) -> None:
    del handler.headers["If-Range"]
    honest(handler)


@pytest.mark.parametrize("answer", [honest, ignoring_if_range])
def test_a_file_changed_on_the_server_is_fetched_from_its_start(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    server.answers.append(cut(100_000))
    with pytest.raises(FetchError):
        fetched(server, tmp_path, tries=1)
    server.data, server.etag = OTHER, '"two"'
    monkeypatch.setitem(ARCHIVES, FILE, published(OTHER))
    server.answers.append(answer)
    assert_whole(fetched(server, tmp_path), OTHER)


def test_a_change_that_no_header_shows_is_found_by_the_md5(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "etag", None)
    server.answers.append(cut(100_000))
    with pytest.raises(FetchError):
        fetched(server, tmp_path, tries=1)
    server.data = OTHER
    monkeypatch.setitem(ARCHIVES, FILE, published(OTHER))
    assert_whole(fetched(server, tmp_path), OTHER)
    assert server.ranges == [None, "bytes=100000-", None]


def test_a_part_of_another_server_is_not_resumed(server: Server, tmp_path: Path) -> None:
    server.answers.append(cut(100_000))
    with pytest.raises(FetchError):
        fetched(server, tmp_path, tries=1)
    note = tmp_path / f"{FILE}.part.json"
    note.write_text(note.read_text().replace("127.0.0.1", "mirror.example"))
    assert_whole(fetched(server, tmp_path))
    assert server.ranges == [None, None]


def test_a_part_without_its_note_is_not_resumed(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{FILE}.part").write_bytes(OTHER[:100_000])
    assert_whole(fetched(server, tmp_path))
    assert server.ranges == [None]


def test_a_file_of_wrong_length_is_refused_before_it_is_fetched(
    server: Server, tmp_path: Path
) -> None:
    server.data = DATA[:-1]
    with pytest.raises(FetchError, match=r"has 299,999 bytes and the published archive 300,000"):
        fetched(server, tmp_path)
    assert len(server.ranges) == 1
    assert not (tmp_path / FILE).exists()


def test_a_file_of_wrong_content_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.data = OTHER
    with pytest.raises(FetchError, match=r"has MD5 \w+ and not \w+: it is not the published"):
        fetched(server, tmp_path)
    assert len(server.ranges) == 1
    assert os.listdir(tmp_path) == []


def test_a_web_page_takes_no_bytes_away(server: Server, tmp_path: Path) -> None:
    page = whole(Content_Type="text/html; charset=utf-8")
    server.answers.extend([cut(100_000), page])
    with pytest.raises(FetchError, match="answers with a web page"):
        fetched(server, tmp_path)
    assert_whole(fetched(server, tmp_path))
    assert server.ranges[-1] == "bytes=100000-"


def test_a_size_that_nobody_published_is_the_servers(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHIVES, FILE, published(DATA)._replace(bytes=None))
    server.answers.append(whole(Content_Length=None))
    with pytest.raises(FetchError, match="sends no length"):
        fetched(server, tmp_path)
    server.answers.append(cut(100_000))
    assert_whole(fetched(server, tmp_path))


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(
    server: Server, tmp_path: Path
) -> None:
    server.answers.extend([error(503, Retry_After="0"), error(404)])
    with pytest.raises(FetchError, match=r"val_256.tar: the server answers 404 Not Found"):
        fetched(server, tmp_path)
    assert len(server.ranges) == 2


def test_a_server_that_asks_for_time_gets_it(server: Server, tmp_path: Path) -> None:
    server.answers.append(error(429, Retry_After="1"))
    began = time.monotonic()
    assert_whole(fetched(server, tmp_path))
    assert time.monotonic() - began >= 1


def test_silence_is_a_failure_too(server: Server, tmp_path: Path) -> None:
    heard = threading.Event()

    def silent(handler: Handler) -> None:
        handler.begin(200, Content_Length=len(DATA), ETag=server.etag)
        handler.body(DATA[:50_000])
        heard.wait(10)

    server.answers.append(silent)
    assert_whole(fetched(server, tmp_path, timeout_s=0.2))
    heard.set()
    assert server.ranges == [None, "bytes=50000-"]


def test_an_unreachable_server_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "TRIES", 2)
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        with pytest.raises(FetchError, match=r"Connection refused; gave up after 2 tries"):
            fetch(NAME, tmp_path, accept_license=True, base_url=url)


CHILD = """
import sys
from pathlib import Path
from data_prep.download import fetch
from data_prep.places2 import ARCHIVES, Published

ARCHIVES["val_256.tar"] = Published(sys.argv[3], int(sys.argv[4]))
fetch("places2-val-256", Path(sys.argv[1]), accept_license=True, base_url=sys.argv[2])
"""


def test_a_fetch_killed_midway_resumes_where_it_stopped(server: Server, tmp_path: Path) -> None:
    killed = threading.Event()

    def stalled(handler: Handler) -> None:
        handler.begin(200, Content_Length=len(DATA), ETag=server.etag)
        handler.body(DATA[:120_000])
        killed.wait(30)

    server.answers.append(stalled)
    md5, size = published(DATA)
    command = [sys.executable, "-c", CHILD, str(tmp_path), server.url, md5, str(size)]
    part = tmp_path / f"{FILE}.part"
    child = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (
            part.exists() and part.stat().st_size == 120_000
        ):
            time.sleep(0.01)
        # While the child is at work, nobody else may write there.
        with pytest.raises(FetchError, match=r"another process is writing \S+val_256\.tar\.part"):
            fetched(server, tmp_path)
    finally:
        child.kill()
        child.wait()
        killed.set()
    assert part.stat().st_size == 120_000
    assert_whole(fetched(server, tmp_path))
    assert server.ranges == [None, "bytes=120000-"]


def test_a_fetch_stopped_before_its_last_step_asks_the_server_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(part: fetching.PartialFile) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching.PartialFile, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            fetched(server, tmp_path)
    assert_whole(fetched(server, tmp_path))
    assert len(server.ranges) == 1


def test_a_full_disk_is_reported_and_the_part_kept(server: Server, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, hard))
    try:
        with pytest.raises(FetchError, match=r"val_256.tar.part: File too large$"):
            fetched(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_whole(fetched(server, tmp_path))
    assert server.ranges == [None, "bytes=123456-"]


def test_a_disk_that_is_too_small_is_reported_before(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
        with pytest.raises(FetchError, match=r"has 1,000 bytes free and val_256.tar needs 300,000"):
            fetched(server, tmp_path)
    assert_whole(fetched(server, tmp_path))


def test_a_file_in_place_of_the_folder_is_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FetchError, match=r"file(/below)?: (File exists|Not a directory)$"):
            fetched(server, out)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_reported(server: Server, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FetchError, match=r"val_256.tar.part: Permission denied$"):
        fetched(server, tmp_path)


@pytest.mark.parametrize("content", [DATA[:-1], OTHER])
def test_another_file_of_that_name_is_left_as_it_is(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(FetchError, match=r"is not the published archive, it has .*: move it away"):
        fetched(server, tmp_path)
    assert_whole(tmp_path / FILE, content)
    assert server.ranges == []


@pytest.fixture
def archives(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small archives in place of the published ones; a size is known of the first only."""
    small = {FILE: DATA, "val_large.tar": OTHER}
    known = {FILE: published(DATA), "val_large.tar": published(OTHER)._replace(bytes=None)}
    monkeypatch.setattr(fetching, "ARCHIVES", known)
    return small


@pytest.mark.parametrize("where", ["file", "s3"])
def test_archives_are_checked_where_they_lie(
    archives: dict[str, bytes], tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "file" else request.getfixturevalue("s3_url")
    store = open_store(root)
    for name, data in archives.items():
        store.put(f"raw/{name}", data)
    store.put("raw/other.tar", b"nobody knows this one")
    reported: list[tuple[int, int]] = []
    checked = list(check_archives(root, progress=lambda *bytes: reported.append(bytes)))
    assert checked == [("raw/val_256.tar", ""), ("raw/val_large.tar", "")]
    assert reported[-1] == (600_000, 600_000)
    assert reported == sorted(reported)
    assert list(check_archives(f"{root}/raw/{FILE}")) == [(FILE, "")]
    store.put(f"raw/{FILE}", DATA[:-1])
    store.put("raw/val_large.tar", DATA)
    assert dict(check_archives(root)) == {
        "raw/val_256.tar": "has 299,999 bytes; the published one has 300,000",
        "raw/val_large.tar": f"has MD5 {hashlib.md5(DATA).hexdigest()}; the published one has "
        f"{hashlib.md5(OTHER).hexdigest()}",
    }


def test_official_lists_are_checked_with_the_archives(tmp_path: Path) -> None:
    for name in LISTS:
        (tmp_path / name).write_text("Places365_val_00000001.jpg 165\n")
    assert [name for name, fault in check_archives(str(tmp_path)) if fault] == sorted(LISTS)


def test_archives_that_are_not_there_or_unknown_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.tar").write_bytes(b"")
    lines = {
        "nowhere": f"ValueError: folder {tmp_path}/nowhere was not found: give a folder, ",
        "my.tar": f"ValueError: {tmp_path}/my.tar: archives of Places2 must have their ",
        FILE: f"{tmp_path}/{FILE}: No such file or directory",
    }
    for name, line in lines.items():
        assert cli.main(["dataset", "check-archives", str(tmp_path / name)]) == MISTAKE
        (reported,) = capsys.readouterr().err.splitlines()
        assert line in reported


def test_a_wrong_archive_fails_the_command_and_each_has_one_line(
    archives: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dataset", "check-archives", str(tmp_path)]
    assert cli.main(command) == MISTAKE
    assert "holds no archive of Places2 under its published name" in capsys.readouterr().err
    for name, data in archives.items():
        (tmp_path / name).write_bytes(data)
    assert cli.main(command) == DONE
    assert capsys.readouterr().out == "ok val_256.tar\nok val_large.tar\n"
    (tmp_path / FILE).write_bytes(OTHER)
    assert cli.main(command) == MISTAKE
    wrong, right = capsys.readouterr().out.splitlines()
    assert wrong.startswith("wrong val_256.tar has MD5 ")
    assert right == "ok val_large.tar"
