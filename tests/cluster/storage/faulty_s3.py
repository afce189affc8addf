"""A proxy between a client and a real S3 server, which spoils what a test asks it to."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal["flip answer", "flip request", "cut", "503"]


@dataclass
class FaultyS3:
    """Faults are taken in order, by the requests whose method and path fit."""

    url: str = ""
    away: bool = False
    """Every connection is closed without an answer."""
    requests: list[str] = field(default_factory=list)
    _faults: list[tuple[Fault, str, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, kind: Fault, method: str, path: str, times: int = 1) -> None:
        """Spoil the next ``times`` requests of ``method`` whose path contains ``path``."""
        self._faults += [(kind, method, path)] * times

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for number, (kind, wanted, part) in enumerate(self._faults):
                if wanted == method and part in path:
                    del self._faults[number]
                    return kind
        return None


@contextlib.contextmanager
def faulty_s3(server_url: str) -> Iterator[FaultyS3]:
    """A proxy to the server, in this process; its ``url`` is the endpoint for clients."""
    proxy, behind = FaultyS3(), urlsplit(server_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def handle_expect_100(self) -> bool:
            return True if proxy.away else super().handle_expect_100()

        def forward(self) -> None:
            if proxy.away:
                proxy.requests.append(f"{self.command} {self.path}")
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            fault = proxy.take(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault == "503":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "flip request":
                body = _flipped(body)
            assert behind.hostname
            upstream = http.client.HTTPConnection(behind.hostname, behind.port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            upstream.request(self.command, self.path, body or None, headers)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if fault == "flip answer":
                data = _flipped(data)
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
            elif self.command != "HEAD":
                self.wfile.write(data)

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
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
