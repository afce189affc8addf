"""A proxy between a client and a real S3 server, which spoils what a test asks it to."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ANSWERS = {
    "503": (503, ""),
    "SlowDown": (503, "Please reduce your request rate."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "InsufficientStorage": (507, "The storage is full."),
    "ExpiredToken": (400, "The provided token has expired."),
    "AccessDenied": (403, "Access Denied"),
    "NoSuchBucket": (404, "The specified bucket does not exist"),
}
"""Faults that are an answer of the proxy itself: status and message under the error code."""
SPOILT = frozenset(
    {
        "flip answer",  # one bit in the middle of the body
        "flip request",
        "cut",  # the connection ends in the middle of the answer's body
        "cut request",  # and of the request's, which never reaches the server
        "cut after",  # the server has done it, and nobody hears of it
        "short answer",  # half of the body, of a length that says so
        "long answer",  # a length that promises seven bytes more than come
        "hang",  # no answer until ``hang_s`` have passed
        "late listing",  # what the same listing said before
        "nothing",  # the request comes through
    }
)
Fault = str
"""A key of ``ANSWERS``, or one of ``SPOILT``."""


@dataclass
class FaultyS3:
    """Faults are taken in order, by the requests whose method and path fit."""

    server_url: str
    """Where requests go; another URL once the server was started again."""
    url: str = ""
    away: bool = False
    """Every connection is closed without an answer."""
    hang_s: float = 1.0
    requests: list[str] = field(default_factory=list)
    refused_key: str = ""
    """Requests that are signed with this access key have expired credentials."""
    on_refusal: Callable[[], None] = lambda: None
    """Called at each of those."""
    before: Callable[[str, str], None] = lambda method, path: None
    """Called before a request reaches the server."""
    after: Callable[[str, str], None] = lambda method, path: None
    """Called once the server has done a request, before the answer."""
    _faults: list[tuple[Fault, str, str]] = field(default_factory=list)
    _listings: dict[str, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, kind: Fault, method: str, path: str, times: int = 1) -> None:
        """Spoil the next ``times`` requests of ``method`` whose path contains ``path``.

        An empty ``method`` fits every one.
        """
        assert kind in SPOILT or kind in ANSWERS, kind
        self._faults += [(kind, method, path)] * times

    def heal(self) -> None:
        """From now on every request comes through."""
        with self._lock:
            self._faults.clear()
        self.away, self.refused_key = False, ""
        self.before = self.after = lambda method, path: None
        self.on_refusal = lambda: None

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for number, (kind, wanted, part) in enumerate(self._faults):
                if wanted in ("", method) and part in path:
                    del self._faults[number]
                    return kind
        return None

    def listed(self, path: str, data: bytes, late: bool) -> bytes:
        """The answer to a listing: ``data``, or where it is ``late``, what was said before."""
        with self._lock:
            if not late:
                self._listings[path] = data
            return self._listings.get(path, data)


@contextlib.contextmanager
def faulty_s3(server_url: str) -> Iterator[FaultyS3]:
    """A proxy to the server, in this process; its ``url`` is the endpoint for clients."""
    proxy = FaultyS3(server_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError, http.client.HTTPException):
                self.close_connection = True

        def handle_expect_100(self) -> bool:
            return True if proxy.away else super().handle_expect_100()

        def hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def answer_error(self, code: str) -> None:
            status, message = ANSWERS[code]
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            body = text.encode() if message and self.command != "HEAD" else b""
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def forward(self) -> None:
            if proxy.away:
                proxy.requests.append(f"{self.command} {self.path}")
                self.hang_up()
                return
            fault = proxy.take(self.command, self.path)
            length = int(self.headers.get("Content-Length", 0))
            if fault == "cut request":
                self.rfile.read(length // 2)
                self.hang_up()
                return
            body = self.rfile.read(length)
            if proxy.refused_key and proxy.refused_key in self.headers.get("Authorization", ""):
                fault = "ExpiredToken"
                proxy.on_refusal()
            if fault in ANSWERS:
                self.answer_error(fault)
                return
            if fault == "hang":
                threading.Event().wait(proxy.hang_s)
                self.hang_up()
                return
            if fault == "flip request":
                body = _flipped(body)
            proxy.before(self.command, self.path)
            status, headers, data = self.ask_server(body)
            proxy.after(self.command, self.path)
            if fault == "cut after":
                self.hang_up()
                return
            if self.command == "GET" and "list-type=2" in self.path and status == 200:
                data = proxy.listed(self.path, data, late=fault == "late listing")
            if fault == "flip answer":
                data = _flipped(data)
            if fault == "short answer":
                data = data[: len(data) // 2]
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            if self.command == "HEAD":
                lengths = [value for name, value in headers if name.lower() == "content-length"]
                self.send_header("Content-Length", lengths[0] if lengths else "0")
            else:
                more = 7 if fault == "long answer" else 0
                self.send_header("Content-Length", str(len(data) + more))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.hang_up()
            elif self.command != "HEAD":
                self.wfile.write(data)
                if fault == "long answer":
                    self.hang_up()

        def ask_server(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            behind = urlsplit(proxy.server_url)
            assert behind.hostname
            upstream = http.client.HTTPConnection(behind.hostname, behind.port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            with contextlib.closing(upstream):
                upstream.request(self.command, self.path, body or None, headers)
                answer = upstream.getresponse()
                return answer.status, answer.getheaders(), answer.read()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that went away

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


def _flipped(data: bytes) -> bytes:
    """``data`` with one bit in its middle changed."""
    if not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
