"""A gate before the real S3 server: a proxy that lets through, slows down, or spoils signatures."""

from __future__ import annotations

import contextlib
import http.client
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?>"
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
HOP_BY_HOP = {"connection", "expect", "transfer-encoding", "content-length"}


class Gate:
    """What happens to requests; a test changes it while they are under way."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.open()

    def open(self) -> None:
        """Let everything through."""
        self.asked = self.refused = 0
        self.refuses: Callable[[int], bool] = lambda number: False
        """From the number of the request, whether it is answered with 503 SlowDown."""
        self.spoils: Callable[[str], bool] = lambda method: False
        """Whether the server gets another access key with a request of this method."""


@contextlib.contextmanager
def gate_before(server: str) -> Iterator[Gate]:
    """A gate on a free port of loopback, before the server at this URL."""
    with _Listener(("127.0.0.1", 0), _Passage) as listener:
        passages: Any = listener
        passages.lock, passages.server_url = threading.Lock(), urlsplit(server)
        passages.gate = Gate(f"http://127.0.0.1:{listener.server_address[1]}")
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        try:
            yield passages.gate
        finally:
            listener.shutdown()
            thread.join()


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed are no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Passage(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        gate = self.server.gate
        with self.server.lock:
            gate.asked += 1
            refuses = gate.refuses(gate.asked)
            gate.refused += refuses
        if refuses:
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        if gate.spoils(self.command):
            headers["Authorization"] = headers["Authorization"].replace(
                "Credential=", "Credential=X"
            )
        there = http.client.HTTPConnection(self.server.server_url.netloc, timeout=30)
        with contextlib.closing(there):
            # The signature covers the Host header, so it stays as the client wrote it.
            there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                there.putheader(name, value)
            there.endheaders(body)
            answer = there.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read())

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        head = self.command == "HEAD" and status == 200
        length = headers.get("Content-Length", "0") if head else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test reports what matters."""
